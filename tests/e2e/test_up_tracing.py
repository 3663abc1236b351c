"""Traces of a whole mesh on this machine: every hop, seen from both sides, is in one trace."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.differential.config import bootstrap, cluster, http, to
from tests.differential.proxy import envoy_binary, our_command
from tests.differential.tracing_rig import Collector, Site
from tests.e2e.proxy import ROOT
from tests.e2e.test_up import Up

pytestmark = pytest.mark.slow
HOPS = [  # service, side; each the parent of the next
    ("front.default", "server"),
    ("front.default", "client"),
    ("orders.default", "server"),
    ("orders.default", "client"),
    ("prices.default", "server"),
]


@pytest.mark.parametrize("proxy", ["ours", "envoy"])
async def test_both_sides_of_each_hop_are_in_one_trace(tmp_path: Path, proxy: str) -> None:
    if proxy == "envoy" and envoy_binary() is None:
        pytest.skip("no `envoy` binary")
    flags = ["--proxy", str(envoy_binary())] if proxy == "envoy" else []
    collector = Collector(asyncio.get_running_loop())
    with Up(tmp_path, ROOT / "examples" / "mesh", "--otlp", f"127.0.0.1:{collector.port}", *flags) as up:
        await asyncio.to_thread(up.wait_ready)
        collector.start()
        try:
            trace, state = "0af7651916cd43dd8448eb211c80319c", "rojo=1"
            chain = await asyncio.to_thread(up.chain, traceparent=f"00-{trace}-b7ad6b7169203331-01", tracestate=state)
            assert [one["service"] for one in chain] == ["front", "orders", "prices"]
            await collector.until(lambda spans: sum(span["trace"] == trace for span in spans) >= len(HOPS))
        finally:
            collector.stop()
        await asyncio.to_thread(up.down)
    spans = {span["parent"]: span for span in collector.received if span["trace"] == trace}
    found, parent = [], "b7ad6b7169203331"
    while span := spans.get(parent):
        found.append(span)
        parent = span["id"]
    assert [(span["resource"]["service.name"], span["kind"]) for span in found] == HOPS
    assert {span["state"] for span in found} == {state}
    assert {span["attributes"]["http.status_code"] for span in found} == {"200"}
    assert {span["attributes"]["guid:x-request-id"] for span in found} == {found[0]["attributes"]["guid:x-request-id"]}
    assert [span["attributes"]["istio.canonical_service"] for span in found] == ["front", "front", "orders", "orders", "prices"]
    assert {span["attributes"]["istio.mesh_id"] for span in found} == {"cluster.local"}
    assert found[1]["name"] == found[2]["name"] == "orders.default.svc.cluster.local:80/*"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_waits_is_sent_before_a_proxy_ends(number: signal.Signals) -> None:
    options = {"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}
    provider = {"@": "envoy.config.trace.v3.OpenTelemetryConfig", "grpc_service": {"envoy_grpc": {"cluster_name": "otlp"}}}
    tracing = {"provider": {"name": "otlp", "typed_config": provider}}
    otlp = cluster("otlp", typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options})
    site = Site(our_command(), "ours")
    try:
        await site.start(bootstrap(http("main", to("a"), tracing=tracing), clusters=[cluster("a"), otlp]))
        site.collect()
        reader, writer = await asyncio.open_connection("127.0.0.1", site.proxy.ports["main"])
        writer.write(b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        assert site.proxy.process is not None
        site.proxy.process.send_signal(number)
        await site.collector.until(lambda spans: len(spans) == 1)
        assert await asyncio.to_thread(site.proxy.process.wait, 10) == 0
    finally:
        await site.stop()
