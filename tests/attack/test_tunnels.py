"""Bytes that are no messages: tunnels and TCP proxies, with a side that does not read, or does not stop."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attack.target import Deaf, Pour, Target, arena, http
from tests.differential.config import cluster, filter_, listener, to
from tests.differential.rig import Tls
from tests.differential.wire import Eof, Head, Wire

MB = 1 << 20
SIZE = 32 * MB
UPGRADE = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"


def tls(base: dict[str, Any]) -> dict[str, Any]:
    certificate = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
    context = {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate]}}
    base["filter_chains"][0]["transport_socket"] = {"name": "tls", "typed_config": context}
    return base


CONFIG = arena(
    http("main", to("a", timeout="0s")),
    http("websocket", to("a", timeout="0s"), upgrade_configs=[{"upgrade_type": "websocket"}]),
    listener("tcp", filter_("tcp_proxy", stat_prefix="tcp", cluster="a")),
    tls(listener("tcp_tls", filter_("tcp_proxy", stat_prefix="tcp_tls", cluster="a"))),
    clusters=[cluster("a")],
)


async def tunnel(target: Target, kind: str, *script: Any) -> Wire:
    """A client's end of a tunnel; the upstream plays the script once it is there."""
    if kind == "websocket":
        target.upstream("a", [Head(), SWITCHING, *script])
    else:
        target.upstream("a", [*script], on_connect=True)
    wire = await target.connect(kind, Tls() if kind == "tcp_tls" else None)
    if kind == "websocket":
        wire.send(UPGRADE)
        await wire.until(lambda: b"\r\n\r\n" in wire.received)
    return wire


KINDS = ["websocket", "tcp", "tcp_tls"]


@pytest.mark.parametrize("kind", KINDS)
async def test_client_that_does_not_read(target: Target, kind: str):
    """An upstream that sends without end to a client that does not read waits."""
    wire = await tunnel(target, kind, Pour(b"x" * 65_536, SIZE // 65_536), Eof())
    async with target.within(16 * MB):
        wire.transport.pause_reading()
        assert await target.stalled("cluster.a.upstream_cx_rx_bytes_total") < 24 * MB
        wire.transport.resume_reading()
        while len(wire.received) < SIZE and wire.end is None:
            before = len(wire.received)
            await wire.until(lambda before=before: len(wire.received) > before)
    assert wire.received.count(b"x") >= SIZE


@pytest.mark.parametrize("kind", KINDS)
async def test_upstream_that_does_not_read(target: Target, kind: str):
    """And the other way round; when both have gone, what was on its way is given back."""
    wire = await tunnel(target, kind, Deaf("go"))
    async with target.within(16 * MB):
        wire.send(bytes(SIZE))
        assert await target.stalled("cluster.a.upstream_cx_tx_bytes_total") < 24 * MB
    wire.reset()
    target.signals["go"].set()
    await target.wait_gauge("cluster.a.upstream_cx_active", 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_both_pour(target: Target, kind: str):
    """Neither side reads what the other sends, and both go on sending."""
    wire = await tunnel(target, kind, Pour(b"x" * 65_536, 100), Deaf("go"))
    async with target.within(16 * MB):
        wire.transport.pause_reading()
        wire.send(bytes(SIZE))
        await target.stalled("cluster.a.upstream_cx_rx_bytes_total")
    wire.reset()
    target.signals["go"].set()
    await target.wait_gauge("cluster.a.upstream_cx_active", 0)
