"""Tracing: what upstreams see of a trace, which requests are sampled, and what spans say, as Envoy's."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.differential.config import bootstrap, cluster, file_log, filter_, http, to
from tests.differential.proxy import envoy_binary, envoy_command, our_command
from tests.differential.tracing_rig import EXPORT, Request, Site

OTLP: dict[str, Any] = {"@": "envoy.config.trace.v3.OpenTelemetryConfig", "grpc_service": {"envoy_grpc": {"cluster_name": "otlp"}}, "service_name": "tested"}
ZIPKIN: dict[str, Any] = {
    "@": "envoy.config.trace.v3.ZipkinConfig",
    "collector_cluster": "zipkin",
    "collector_endpoint": "/api/v2/spans",
    "collector_endpoint_version": "HTTP_JSON",
}
HTTP2 = {"@": "http_options", "explicit_http_config": {"http2_protocol_options": {}}}
RETRY = {"retry_on": "5xx", "num_retries": 2, "retry_back_off": {"base_interval": "0.001s"}}
HOSTS: list[Any] = [
    {
        "name": "all",
        "domains": ["*"],
        "routes": [
            {"match": {"path": "/direct"}, "direct_response": {"status": 201, "body": {"inline_string": "made"}}},
            {"match": {"prefix": "/decorated"}, "route": {"cluster": "a"}, "decorator": {"operation": "by-the-route"}},
            {"match": {"prefix": "/silent"}, "route": {"cluster": "a"}, "decorator": {"operation": "quiet", "propagate": False}},
            {"match": {"prefix": "/never"}, "route": {"cluster": "a"}, "tracing": {"random_sampling": {"numerator": 0}}},
            {
                "match": {"prefix": "/forced-only"},
                "route": {"cluster": "a"},
                "tracing": {"random_sampling": {"numerator": 0}, "client_sampling": {"numerator": 0}},
            },
            {"match": {"prefix": "/not-at-all"}, "route": {"cluster": "a"}, "tracing": {"overall_sampling": {"numerator": 0}}},
            {
                "match": {"prefix": "/tagged"},
                "route": {"cluster": "a"},
                "metadata": {"filter_metadata": {"mine": {"key": "from-route", "deep": {"number": 3, "list": [1, "b"], "yes": True}}}},
                "tracing": {
                    "custom_tags": [
                        {"tag": "by", "literal": {"value": "route"}},
                        {"tag": "one", "metadata": {"kind": {"route": {}}, "metadata_key": {"key": "mine", "path": [{"key": "key"}]}}},
                        {"tag": "deep", "metadata": {"kind": {"route": {}}, "metadata_key": {"key": "mine", "path": [{"key": "deep"}]}}},
                        {"tag": "number", "metadata": {"kind": {"route": {}}, "metadata_key": {"key": "mine", "path": [{"key": "deep"}, {"key": "number"}]}}},
                        {"tag": "list", "metadata": {"kind": {"route": {}}, "metadata_key": {"key": "mine", "path": [{"key": "deep"}, {"key": "list"}]}}},
                        {"tag": "yes", "metadata": {"kind": {"route": {}}, "metadata_key": {"key": "mine", "path": [{"key": "deep"}, {"key": "yes"}]}}},
                        {
                            "tag": "missing",
                            "metadata": {"kind": {"route": {}}, "metadata_key": {"key": "mine", "path": [{"key": "none"}]}, "default_value": "default"},
                        },
                        {"tag": "absent", "metadata": {"kind": {"route": {}}, "metadata_key": {"key": "mine", "path": [{"key": "none"}]}}},
                        {"tag": "cluster", "metadata": {"kind": {"cluster": {}}, "metadata_key": {"key": "mine", "path": [{"key": "key"}]}}},
                        {"tag": "host", "metadata": {"kind": {"host": {}}, "metadata_key": {"key": "mine", "path": [{"key": "key"}]}}},
                        {"tag": "request", "metadata": {"kind": {"request": {}}, "metadata_key": {"key": "mine", "path": [{"key": "key"}]}}},
                    ]
                },
            },
            {
                "match": {"prefix": "/operation"},
                "route": {"cluster": "a"},
                "tracing": {"operation": "of %REQ(:METHOD)%", "upstream_operation": "up %REQ(:PATH)%"},
            },
            {"match": {"prefix": "/once"}, "route": {"cluster": "a", "retry_policy": RETRY}},
            {"match": {"prefix": "/retried"}, "route": {"cluster": "a", "prefix_rewrite": "/status/503", "retry_policy": RETRY}},
            {"match": {"prefix": "/slow/all"}, "route": {"cluster": "a", "timeout": "0.05s"}},
            {
                "match": {"prefix": "/slow/tries"},
                "route": {"cluster": "a", "retry_policy": {"retry_on": "5xx", "num_retries": 1, "per_try_timeout": "0.05s"}},
            },
            {
                "match": {"prefix": "/slow/hedged"},
                "route": {
                    "cluster": "a",
                    "timeout": "0.2s",
                    "hedge_policy": {"hedge_on_per_try_timeout": True},
                    "retry_policy": {"retry_on": "5xx", "num_retries": 1, "per_try_timeout": "0.05s"},
                },
            },
            {"match": {"prefix": "/mirrored"}, "route": {"cluster": "a", "request_mirror_policies": [{"cluster": "mirror"}]}},
            {"match": {"prefix": "/badly-mirrored"}, "route": {"cluster": "a", "request_mirror_policies": [{"cluster": "dead"}]}},
            {"match": {"prefix": "/dead"}, "route": {"cluster": "dead"}},
            {"match": {"prefix": "/missing"}, "route": {"cluster": "missing"}},
            {"match": {"prefix": "/rewritten"}, "route": {"cluster": "a", "prefix_rewrite": "/other"}},
            {"match": {"prefix": "/nowhere"}, "non_forwarding_action": {}},
            {"match": {"prefix": "/"}, "route": {"cluster": "a"}},
        ],
    }
]


def traced(
    name: str, provider: dict[str, Any] | None = None, *, direction: str = "INBOUND", tracing: dict[str, Any] | None = None, hosts: Any = None, **options: Any
) -> dict[str, Any]:
    """A listener whose connection manager traces."""
    provider = {"name": "tracer", "typed_config": OTLP if provider is None else provider}
    options = {"route_config": {"validate_clusters": False}, "access_log": [file_log("%TRACE_ID% %SPAN_ID%\n", file=f"{name}.log")]} | options
    return http(name, hosts or HOSTS, tracing={"provider": provider, **(tracing or {})}, listener_fields={"traffic_direction": direction}, **options)


INTERNAL = {"use_remote_address": True, "internal_address_config": {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}}
KEEP = {"use_remote_address": True, "preserve_external_request_id": True}
OFF = {"random_sampling": {"value": 0}}
TAGS = [
    {"tag": "literal", "literal": {"value": "value"}},
    {"tag": "home", "environment": {"name": "MESHPROXY_TEST_NOT_SET", "default_value": "somewhere"}},
    {"tag": "unset", "environment": {"name": "MESHPROXY_TEST_NOT_SET"}},
    {"tag": "header", "request_header": {"name": "X-Tag", "default_value": "none"}},
    {"tag": "bare", "request_header": {"name": "x-bare"}},
    {"tag": "by", "literal": {"value": "manager"}},
    {"tag": "component", "literal": {"value": "overridden"}},
]
CONFIG = bootstrap(
    traced("last", access_log=[]),
    traced("nowhere", hosts=to("a", "b.test")),
    traced("calls", hosts=to("otlp"), tracing={"spawn_upstream_span": True}),
    traced("calls_out", hosts=to("otlp"), direction="OUTBOUND"),
    traced("in"),
    traced("out", direction="OUTBOUND"),
    traced("plain", direction="UNSPECIFIED"),
    traced("internal", **INTERNAL),
    traced("internal_off", tracing=OFF, **INTERNAL),
    traced("edge", **KEEP),
    traced("edge_off", tracing=OFF, **KEEP),
    traced("off", tracing=OFF),
    traced("overall_off", tracing={"overall_sampling": {"value": 0}}, **INTERNAL),
    traced("client_off", tracing={"client_sampling": {"value": 0}, **OFF}),
    traced("spawn", tracing={"spawn_upstream_span": True}),
    traced("spawn_out", direction="OUTBOUND", tracing={"spawn_upstream_span": True}),
    traced("verbose", tracing={"verbose": True, "spawn_upstream_span": True}),
    traced("tags", tracing={"custom_tags": TAGS}),
    traced("short", tracing={"max_path_tag_length": 12}),
    traced(
        "named",
        direction="OUTBOUND",
        tracing={"operation": "%REQ(:METHOD)% %REQ(X-NONE)%", "upstream_operation": "to %REQ(:AUTHORITY)%", "spawn_upstream_span": True},
    ),
    traced("no_id", generate_request_id=False),
    traced(
        "unpacked",
        request_id_extension={"typed_config": {"@": "uuid_request_id", "pack_trace_reason": False}},
        tracing={"random_sampling": {"value": 100}},
    ),
    traced("not_by_id", tracing=OFF, request_id_extension={"typed_config": {"@": "uuid_request_id", "use_request_id_for_trace_sampling": False}}),
    traced("nobody", OTLP | {"service_name": ""}),
    traced(
        "always",
        OTLP | {"sampler": {"name": "s", "typed_config": {"@": "envoy.extensions.tracers.opentelemetry.samplers.v3.AlwaysOnSamplerConfig"}}},
        tracing=OFF,
    ),
    traced("always_on", OTLP | {"sampler": {"name": "s", "typed_config": {"@": "envoy.extensions.tracers.opentelemetry.samplers.v3.AlwaysOnSamplerConfig"}}}),
    traced(
        "half",
        OTLP
        | {
            "sampler": {
                "name": "s",
                "typed_config": {
                    "@": "envoy.extensions.tracers.opentelemetry.samplers.v3.TraceIdRatioBasedSamplerConfig",
                    "sampling_percentage": {"numerator": 50},
                },
            }
        },
    ),
    traced(
        "coded",
        tracing={
            "operation": "of %RESPONSE_CODE% %REQ(X-LATER)%",
            "custom_tags": [{"tag": "said", "value": "%REQ(:PATH)% and %RESPONSE_CODE% %REQ(X-NONE)%"}, {"tag": "nothing", "value": "%REQ(X-NONE)%"}],
        },
    ),
    traced("coded_up", tracing={"spawn_upstream_span": True, "upstream_operation": "of %RESPONSE_CODE% %REQ(TRACEPARENT)%"}),
    traced("some", tracing={"random_sampling": {"value": 33.337}}),
    traced("most", tracing={"random_sampling": {"value": 100}, "overall_sampling": {"value": 50.5}}),
    traced(
        "ratio",
        OTLP
        | {
            "sampler": {
                "name": "s",
                "typed_config": {
                    "@": "envoy.extensions.tracers.opentelemetry.samplers.v3.TraceIdRatioBasedSamplerConfig",
                    "sampling_percentage": {"numerator": 0},
                },
            }
        },
    ),
    traced(
        "parents",
        OTLP
        | {
            "sampler": {
                "name": "s",
                "typed_config": {
                    "@": "envoy.extensions.tracers.opentelemetry.samplers.v3.ParentBasedSamplerConfig",
                    "wrapped_sampler": {"name": "a", "typed_config": {"@": "envoy.extensions.tracers.opentelemetry.samplers.v3.AlwaysOnSamplerConfig"}},
                },
            }
        },
    ),
    traced(
        "detected",
        OTLP
        | {
            "resource_detectors": [
                {
                    "name": "d",
                    "typed_config": {
                        "@": "envoy.extensions.tracers.opentelemetry.resource_detectors.v3.StaticConfigResourceDetectorConfig",
                        "attributes": {"team": "mesh", "service.name": "detected"},
                    },
                }
            ]
        },
    ),
    traced(
        "checked",
        filters=[filter_("health_check", pass_through_mode=False, headers=[{"name": ":path", "string_match": {"exact": "/healthz"}}])],
    ),
    traced(
        "refusing",
        filters=[
            filter_(
                "rbac",
                rules={
                    "action": "DENY",
                    "policies": {"p": {"permissions": [{"header": {"name": "x-deny", "present_match": True}}], "principals": [{"any": True}]}},
                },
            )
        ],
    ),
    clusters=[
        cluster("a", metadata={"filter_metadata": {"mine": {"key": "from-cluster"}}}, alt_stat_name="alt_a"),
        {
            "name": "dead",
            "connect_timeout": "1s",
            "load_assignment": {
                "cluster_name": "dead",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}}}}]}],
            },
        },
        cluster("mirror", "a"),
        cluster("otlp", typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": HTTP2}),
        cluster("zipkin"),
    ],
    layered_runtime={"layers": [{"name": "static", "static_layer": {"tracing.opentelemetry.min_flush_spans": 1, "tracing.zipkin.min_flush_spans": 1}}]},
)

ID = "11111111-2222-4333-8444-555555555555"
PARENT = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"


@dataclass
class Case:
    """Requests to a listener."""

    name: str
    on: str
    request: Request

    def __str__(self) -> str:
        return self.name


def get(path: str = "/", *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: a.test", *headers, "\r\n"]).encode()


def _cases() -> Iterator[Case]:
    for on in ("in", "out", "plain", "internal", "edge", "off", "spawn", "spawn_out", "no_id", "unpacked", "not_by_id", "nobody", "always", "ratio", "parents"):
        yield Case(f"{on}_fresh", on, get())
        yield Case(f"{on}_parent", on, get("/", PARENT, "tracestate: a=1,b=2"))
        yield Case(f"{on}_unsampled_parent", on, get("/", UNSAMPLED))
    for nibble in "49abc":
        value = f"x-request-id: {ID[:14]}{nibble}{ID[15:]}"
        for on in ("in", "internal", "internal_off", "edge", "edge_off", "off", "overall_off"):
            yield Case(f"{on}_reason_{nibble}", on, get("/", value))
    for on in ("in", "internal", "internal_off", "edge_off", "off", "overall_off", "client_off"):
        yield Case(f"{on}_forced", on, get("/", "x-envoy-force-trace: 1"))
        yield Case(f"{on}_client", on, get("/", "x-client-trace-id: mine"))
        yield Case(f"{on}_both", on, get("/", "x-client-trace-id: mine", "x-envoy-force-trace: 1"))
    for name, value in {"short": "abc", "other": "1-2-3", "upper": ID.upper(), "no_dashes": "1" * 36, "wrong_hex": "1111111g" + ID[8:], "empty": ""}.items():
        yield Case(f"in_request_id_{name}", "in", get("/", f"x-request-id: {value}"))
        yield Case(f"off_request_id_{name}", "off", get("/", f"x-request-id: {value}", "x-client-trace-id: c"))
    for path in ("/never", "/forced-only", "/not-at-all"):
        for header in ("x-none: 1", "x-client-trace-id: c", "x-envoy-force-trace: 1"):
            yield Case(f"internal{path}_{header[:8]}", "internal", get(path, header))
    for path in (
        "/direct", "/decorated", "/silent", "/tagged", "/operation", "/once/503", "/retried", "/dead", "/missing", "/rewritten/x?y=z", "/nowhere",
        "/status/404", "/status/500", "/status/503", "/reset", "/grpc/0", "/grpc/5", "/grpc/14",
    ):  # fmt: skip
        for on in ("in", "out", "spawn", "spawn_out"):
            yield Case(f"{on}{path}", on, get(path, "user-agent: tests"))
    for on in ("in", "out"):
        yield Case(f"{on}_operation_from_before", on, get("/", "x-envoy-decorator-operation: from-before"))
        yield Case(f"{on}_operation_from_before_decorated", on, get("/decorated", "x-envoy-decorator-operation: from-before"))
        yield Case(f"{on}_operation_of_the_server", on, get("/decorated/x"))
    yield Case("grpc_request", "in", get("/grpc/14", "content-type: application/grpc", "grpc-timeout: 5S", "te: trailers"))
    yield Case("grpc_request_ok", "out", get("/grpc/0", "content-type: application/grpc+proto", "te: trailers"))
    yield Case("verbose", "verbose", get())
    yield Case("tags", "tags", get("/", "x-tag: from-client"))
    yield Case("tags_empty_header", "tags", get("/", "x-tag:", "x-bare: there"))
    yield Case("tags_of_the_route", "tags", get("/tagged"))
    yield Case("short_path", "short", get("/a/path/that/is/too/long?and=query"))
    yield Case("long_path", "in", get("/" + "x" * 300))
    yield Case("named", "named", get())
    yield Case("named_operation", "named", get("/operation"))
    yield Case("named_decorated", "named", get("/decorated"))
    yield Case("detected", "detected", get())
    yield Case("healthz", "checked", get("/healthz"))
    yield Case("not_healthz", "checked", get("/"))
    yield Case("denied", "refusing", get("/", "x-deny: 1"))
    yield Case("post", "in", get("/", "content-length: 5", method="POST") + b"12345")
    yield Case("two", "in", [get(), get("/", "x-n: 2")])
    yield Case("forwarded_for", "in", get("/", "x-forwarded-for: 1.2.3.4", "x-forwarded-proto: https"))
    yield Case("downstream_cluster", "in", get("/", "x-envoy-downstream-service-cluster: before"))
    bad = {
        "version": "traceparent: 01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "version_ff": "traceparent: ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "upper": PARENT.upper().replace("TRACEPARENT", "traceparent"),
        "short": PARENT[:-1],
        "long": PARENT + "1",
        "longer": PARENT + "-more",
        "zero_trace": "traceparent: 00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "zero_parent": "traceparent: 00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "no_hex": "traceparent: 00-0af7651916cd43dd8448eb211c80319g-b7ad6b7169203331-01",
        "flags": "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff",
        "flags_2": "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02",
        "dashes": "traceparent: 00--0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
        "empty": "traceparent:",
        "twice": PARENT + "\r\n" + PARENT.replace("b7ad", "aaaa"),
        "state_alone": "tracestate: a=1",
        "b3": "b3: 0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
        "state_twice": PARENT + "\r\ntracestate: a=1\r\ntracestate: b=2",
        "state_empty": PARENT + "\r\ntracestate:",
        "baggage": PARENT + "\r\nbaggage: k=v",
    }  # fmt: skip
    for name, header in bad.items():
        yield Case(f"parent_{name}", "in", get("/", header))
        yield Case(f"parent_{name}_off", "off", get("/", header))


def _more() -> Iterator[Case]:
    for status in range(18):
        for on in ("in", "out"):
            yield Case(f"{on}_grpc_{status}", on, get(f"/grpc/{status}"))
    for status in (302, 399, 400, 499, 500, 599):
        yield Case(f"spawn_status_{status}", "spawn", get(f"/status/{status}"))
    for trace in ("0af7651916cd43dd8448eb211c80319c", "32" * 16, "31" * 16, "00000000000000010000000000000000", "6300000000000000" * 2, "3100000000000000" * 2):
        yield Case(f"half_{trace[:8]}", "half", get("/", f"traceparent: 00-{trace}-b7ad6b7169203331-00", "tracestate: a=b"))
    for on in ("always_on", "coded"):
        yield Case(f"{on}_unsampled_parent", on, get("/", UNSAMPLED))
        yield Case(f"{on}_parent", on, get("/", PARENT))
    for path in ("/slow/all", "/slow/tries", "/slow/hedged"):
        for on in ("in", "spawn"):
            yield Case(f"{on}{path}", on, get(path))
    yield Case("coded_up", "coded_up", get())
    for on in ("in", "out", "off", "spawn"):
        yield Case(f"{on}_mirrored", on, get("/mirrored"))
        yield Case(f"{on}_badly_mirrored", on, get("/badly-mirrored"))
    yield Case("no_route", "nowhere", get())
    yield Case("no_route_parent", "nowhere", get("/", PARENT))
    yield Case("no_path", "in", b"GET no-path HTTP/1.1\r\nhost: a.test\r\n\r\n")
    yield Case("malformed", "in", b"GET / HTTP/1.1\r\nhost a.test\r\n\r\n")
    yield Case("no_host", "in", b"GET / HTTP/1.0\r\n\r\n")
    yield Case("coded_missing", "coded", get("/missing"))
    for digits in (
        "00000d05",
        "00000d06",
        "00000d07",
        "00001000",
        "ffffffff",
        "000013b9",
        "000013ba",
        "000013bb",
        "+0000001",
        " 0000001",
        "0x000001",
        "1_000000",
    ):
        for on in ("some", "most"):
            yield Case(f"{on}_{digits}", on, get("/", f"x-request-id: {digits}{ID[8:]}"))
    yield Case("utf8", "in", get("/", "user-agent: \u00e4"))


CASES = [*_cases(), *_more()]


@pytest.fixture(scope="module")
def sites(loop: asyncio.AbstractEventLoop, request: pytest.FixtureRequest) -> Iterator[list[Site]]:
    """The real Envoy, and ours."""
    if envoy_binary() is None:
        pytest.skip("THE ORACLE IS MISSING: no `envoy` binary: nothing was compared")

    async def begin() -> list[Site]:
        made = [Site(envoy_command(), "envoy"), Site(our_command(), "ours")]
        await asyncio.gather(*(site.start(CONFIG) for site in made))
        for site in made:
            site.collect()
        return made

    made = loop.run_until_complete(begin())
    yield made
    for site in made:
        loop.run_until_complete(site.stop())


def _comparable(seen: dict[str, Any]) -> list[str]:
    """What everybody saw, without who says so."""
    for span in seen["spans"]:
        span["resource"] = {name: value for name, value in span["resource"].items() if not name.startswith("telemetry.sdk.")}
        span["scope"] = bool(span["scope"])
    return json.dumps(seen, indent=1, sort_keys=True).splitlines()


@pytest.mark.differential
@pytest.mark.parametrize("case", CASES, ids=str)
def test_traces(sites: list[Site], case: Case, loop: asyncio.AbstractEventLoop) -> None:
    async def ask() -> list[dict[str, Any]]:
        return await asyncio.gather(*(site.ask(case.on, case.request) for site in sites))

    theirs, ours = (_comparable(seen) for seen in loop.run_until_complete(ask()))
    assert any(case.on in line for line in theirs), "the case is not conclusive on Envoy: nothing was counted"
    assert ours == theirs, "\n".join(["differs from Envoy:", *difflib.unified_diff(theirs, ours, "envoy", "ours", lineterm="", n=2)])


@pytest.mark.differential
@pytest.mark.parametrize("method", [EXPORT, "/some.Service/NoSuchMethod"])
@pytest.mark.parametrize("listener", ["calls", "calls_out"])
def test_grpc_calls(sites: list[Site], loop: asyncio.AbstractEventLoop, listener: str, method: str) -> None:
    async def call() -> list[dict[str, Any]]:
        return await asyncio.gather(*(site.call(listener, method) for site in sites))

    theirs, ours = (_comparable(seen) for seen in loop.run_until_complete(call()))
    assert any("grpc.status_code" in line for line in theirs)
    assert ours == theirs, "\n".join(["differs from Envoy:", *difflib.unified_diff(theirs, ours, "envoy", "ours", lineterm="", n=2)])
