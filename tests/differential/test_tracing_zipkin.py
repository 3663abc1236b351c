"""Zipkin: B3 contexts in and out, and spans as JSON, as Envoy's."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.differential.config import bootstrap, cluster, filter_, http
from tests.differential.proxy import envoy_binary, envoy_command, our_command
from tests.differential.test_tracing import HOSTS, Case, get
from tests.differential.tracing_rig import Site

ZIPKIN: dict[str, Any] = {
    "@": "envoy.config.trace.v3.ZipkinConfig",
    "collector_cluster": "zipkin",
    "collector_endpoint": "/api/v2/spans",
    "collector_endpoint_version": "HTTP_JSON",
}


def traced(
    name: str, *, direction: str = "INBOUND", tracing: dict[str, Any] | None = None, manager: dict[str, Any] | None = None, **provider: Any
) -> dict[str, Any]:
    """A listener whose connection manager traces to Zipkin."""
    config = {"provider": {"name": "zipkin", "typed_config": ZIPKIN | provider}, **(tracing or {})}
    name = f"zipkin_{name}"
    return http(name, HOSTS, tracing=config, listener_fields={"traffic_direction": direction}, route_config={"validate_clusters": False}, access_log=[],
                **(manager or {}))  # fmt: skip


def traced_by_http() -> dict[str, Any]:
    """OpenTelemetry's, which can be sent by HTTP as well."""
    provider = {
        "@": "envoy.config.trace.v3.OpenTelemetryConfig",
        "service_name": "tested",
        "http_service": {
            "http_uri": {"uri": "http://collector.test:1234/v1/traces?a=b", "cluster": "zipkin", "timeout": "1s"},
            "request_headers_to_add": [{"header": {"key": "x-added", "value": "token"}}],
        },
    }
    return http("zipkin_otlp", HOSTS, tracing={"provider": {"name": "t", "typed_config": provider}}, route_config={"validate_clusters": False}, access_log=[])


CHILD = {"http_filters": [filter_("router", start_child_span=True)]}
OFF = {"random_sampling": {"value": 0}}
W3C = "USE_B3_WITH_W3C_PROPAGATION"
ONE = {"thresholds": [{"max_connections": 1}]}  # so that spans come in the order in which they were sent
DEAD = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}}}}
CONFIG = bootstrap(
    traced("last"),
    traced("in"),
    traced_by_http(),
    traced("out", direction="OUTBOUND"),
    traced("off", tracing=OFF),
    traced("wide", trace_id_128bit=True),
    traced("wide_out", direction="OUTBOUND", trace_id_128bit=True),
    traced("unshared", shared_span_context=False),
    traced("spawn", tracing={"spawn_upstream_span": True}),
    traced("child", manager=CHILD),
    traced("child_unshared", manager=CHILD, shared_span_context=False),
    traced("child_out", direction="OUTBOUND", manager=CHILD),
    traced("spawn_out", direction="OUTBOUND", tracing={"spawn_upstream_span": True}),
    traced("verbose", tracing={"verbose": True, "spawn_upstream_span": True}),
    traced("w3c", trace_context_option=W3C),
    traced("w3c_out", direction="OUTBOUND", trace_context_option=W3C, trace_id_128bit=True),
    clusters=[cluster("a", alt_stat_name="alt_a"), cluster("dead", DEAD), cluster("zipkin", circuit_breakers=ONE)],
    layered_runtime={"layers": [{"name": "static", "static_layer": {"tracing.zipkin.min_flush_spans": 1, "tracing.opentelemetry.min_flush_spans": 1}}]},
)

TRACE, SHORT, SPAN, PARENT = "0af7651916cd43dd8448eb211c80319c", "8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"
CONTEXTS = {
    "fresh": (),
    "multi": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-sampled: 1"),
    "multi_parent": (f"x-b3-traceid: {SHORT}", f"x-b3-spanid: {SPAN}", f"x-b3-parentspanid: {PARENT}", "x-b3-sampled: 1"),
    "multi_unsampled": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-sampled: 0"),
    "multi_true": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-sampled: true"),
    "multi_other": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-sampled: maybe"),
    "multi_unsaid": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}"),
    "multi_debug": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-flags: 1"),
    "multi_short": ("x-b3-traceid: abc", "x-b3-spanid: 1", "x-b3-parentspanid: 2", "x-b3-sampled: 1"),
    "multi_upper": (f"x-b3-traceid: {TRACE.upper()}", f"x-b3-spanid: {SPAN.upper()}"),
    "multi_wrong_trace": ("x-b3-traceid: xyz", f"x-b3-spanid: {SPAN}", "x-b3-sampled: 1"),
    "multi_wrong_span": (f"x-b3-traceid: {TRACE}", "x-b3-spanid: xyz", "x-b3-sampled: 1"),
    "multi_wrong_parent": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-parentspanid: xyz", "x-b3-sampled: 1"),
    "multi_empty_parent": (f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-parentspanid:", "x-b3-sampled: 1"),
    "multi_half": (f"x-b3-traceid: {TRACE}", "x-b3-sampled: 0"),
    "multi_zero": (f"x-b3-traceid: {'0' * 32}", f"x-b3-spanid: {'0' * 16}", "x-b3-sampled: 1"),
    "sampled_alone": ("x-b3-sampled: 0",),
    "single": (f"b3: {TRACE}-{SPAN}-1",),
    "single_parent": (f"b3: {TRACE}-{SPAN}-1-{PARENT}",),
    "single_short": (f"b3: {SHORT}-{SPAN}-d",),
    "single_short_parent": (f"b3: {SHORT}-{SPAN}-0-{PARENT}",),
    "single_unsaid": (f"b3: {TRACE}-{SPAN}",),
    "single_unsampled": (f"b3: {TRACE}-{SPAN}-0",),
    "single_yes": ("b3: 1",),
    "single_no": ("b3: 0",),
    "single_debug": ("b3: d",),
    "single_wrong_flag": (f"b3: {TRACE}-{SPAN}-x",),
    "single_wrong": ("b3: what",),
    "single_empty": ("b3:",),
    "single_wrong_hex": (f"b3: {TRACE[:-1]}g-{SPAN}-1",),
    "single_long": (f"b3: {TRACE}-{SPAN}-1-{PARENT}0",),
    "both": (f"b3: {SHORT}-{PARENT}-1", f"x-b3-traceid: {TRACE}", f"x-b3-spanid: {SPAN}", "x-b3-sampled: 0"),
    "w3c": (f"traceparent: 00-{TRACE}-{SPAN}-01", "tracestate: a=b"),
    "w3c_unsampled": (f"traceparent: 00-{TRACE}-{SPAN}-00",),
    "w3c_wrong": (f"traceparent: 00-{TRACE}-{SPAN}",),
    "w3c_and_b3": (f"traceparent: 00-{TRACE}-{SPAN}-00", f"b3: {SHORT}-{PARENT}-1"),
    "w3c_and_wrong_b3": (f"traceparent: 00-{TRACE}-{SPAN}-01", "b3: what"),
    "forced": ("x-client-trace-id: c",),
}


def _cases() -> Iterator[Case]:
    for name, headers in CONTEXTS.items():
        for on in ("in", "out", "off", "wide_out", "unshared", "w3c", "w3c_out"):
            yield Case(f"{on}_{name}", f"zipkin_{on}", get("/", *headers))
    for on in ("spawn", "spawn_out", "child", "child_unshared", "child_out", "verbose", "wide"):
        for name in ("fresh", "multi", "single_unsampled"):
            yield Case(f"{on}_{name}", f"zipkin_{on}", get("/", *CONTEXTS[name]))
    yield Case("otlp_fresh", "zipkin_otlp", get("/"))
    yield Case("otlp_parent", "zipkin_otlp", get("/", *CONTEXTS["w3c"]))
    for path in ("/direct", "/decorated", "/tagged", "/operation", "/retried", "/dead", "/status/404", "/status/500", "/grpc/14"):
        for on in ("in", "out", "spawn", "child", "child_out"):
            yield Case(f"{on}{path}", f"zipkin_{on}", get(path))


CASES = list(_cases())


@pytest.fixture(scope="module")
def sites(loop: asyncio.AbstractEventLoop) -> Iterator[list[Site]]:
    """The real Envoy, and ours."""
    if envoy_binary() is None:
        pytest.skip("THE ORACLE IS MISSING: no `envoy` binary: nothing was compared")

    async def begin() -> list[Site]:
        made = [Site(envoy_command(), "envoy"), Site(our_command(), "ours")]
        await asyncio.gather(*(site.start(CONFIG) for site in made))
        return made

    made = loop.run_until_complete(begin())
    yield made
    for site in made:
        loop.run_until_complete(site.stop())


@pytest.mark.differential
@pytest.mark.parametrize("case", CASES, ids=str)
def test_traces(sites: list[Site], case: Case, loop: asyncio.AbstractEventLoop) -> None:
    async def ask() -> list[dict[str, Any]]:
        return await asyncio.gather(*(site.ask(case.on, case.request) for site in sites))

    theirs, ours = (json.dumps(seen, indent=1, sort_keys=True).splitlines() for seen in loop.run_until_complete(ask()))
    assert any(case.on in line for line in theirs), "the case is not conclusive on Envoy: nothing was counted"
    assert ours == theirs, "\n".join(["differs from Envoy:", *difflib.unified_diff(theirs, ours, "envoy", "ours", lineterm="", n=2)])
