"""Bytes that are no messages: tunnels and TCP proxies, with a side that does not read, or does not stop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.attack.target import Deaf, Pour, Target, arena, http
from tests.differential.config import cluster, filter_, listener, to
from tests.differential.harness import h2_cluster
from tests.differential.http2_steps import Headers, Heard, lines
from tests.differential.rig import Tls
from tests.differential.wire import Eof, Head, Wire

MB = 1 << 20
SIZE = 32 * MB
UPGRADE = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
OPEN = b"HTTP/1.1 200 OK\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"


def tls(base: dict[str, Any]) -> dict[str, Any]:
    certificate = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
    context = {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate]}}
    base["filter_chains"][0]["transport_socket"] = {"name": "tls", "typed_config": context}
    return base


def carried(name: str, to: str, **fields: Any) -> dict[str, Any]:
    """A TCP proxy whose connections travel in requests."""
    return listener(name, filter_("tcp_proxy", stat_prefix=name, cluster=to, tunneling_config={"hostname": "target.test:443", **fields}))


CONFIG = arena(
    http("main", to("a", timeout="0s")),
    http("websocket", to("a", timeout="0s"), upgrade_configs=[{"upgrade_type": "websocket"}]),
    listener("tcp", filter_("tcp_proxy", stat_prefix="tcp", cluster="a")),
    tls(listener("tcp_tls", filter_("tcp_proxy", stat_prefix="tcp_tls", cluster="a"))),
    carried("connect", "a"),
    carried("post", "a", use_post=True),
    carried("connect_h2", "h2a"),
    clusters=[cluster("a"), h2_cluster("h2a", options={"initial_stream_window_size": MB // 4, "initial_connection_window_size": MB})],
)


async def tunnel(target: Target, kind: str, *script: Any) -> Wire:
    """A client's end of a tunnel; the upstream plays the script once it is there."""
    if kind == "websocket":
        target.upstream("a", [Head(), SWITCHING, *script])
    elif kind in ("connect", "post"):
        target.upstream("a", [Head(), OPEN, *script])
    else:
        target.upstream("a", [*script], on_connect=True)
    wire = await target.connect(kind, Tls() if kind == "tcp_tls" else None)
    if kind == "websocket":
        wire.send(UPGRADE)
        await wire.until(lambda: b"\r\n\r\n" in wire.received)
    return wire


KINDS = ["websocket", "tcp", "tcp_tls", "connect", "post"]


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
        assert await target.stalled("cluster.a.upstream_cx_rx_bytes_total") <= 100 * 65_536 + 4096  # all that there is, and the head of an answer
    wire.reset()
    target.signals["go"].set()
    await target.wait_gauge("cluster.a.upstream_cx_active", 0)


# ---- tunnels of our own, to upstreams that mean no good

ANSWERS = {
    "never": [],
    "head_without_end": [Pour(b"x-more: " + b"y" * 1000 + b"\r\n")],
    "line_without_end": [Pour(b"y" * 65_536)],
    "informational_without_end": [Pour(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)],
    "garbage": [b"\x00\xff" * 4096],
    "no_http": [b"SSH-2.0-OpenSSH_9.6\r\n"],
    "two_answers": [b"HTTP/1.1 403 No\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"],
    "endless_refusal": [b"HTTP/1.1 403 No\r\ntransfer-encoding: chunked\r\n\r\n", Pour(b"1000\r\n" + b"z" * 4096 + b"\r\n")],
}


@pytest.mark.parametrize("kind", ["connect", "post"])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_answer(target: Target, kind: str, answer: str):
    """Whatever an upstream says in place of an answer takes no memory, lets nothing through, and leaves nothing behind when the client has gone."""
    begin = [] if answer in ("never", "garbage", "no_http", "two_answers", "informational_without_end", "endless_refusal") else [b"HTTP/1.1 200 OK\r\n"]
    target.upstream("a", [Head(), *begin, *ANSWERS[answer], Eof()])
    async with target.within(16 * MB):
        wire = await target.connect(kind)
        if answer in ("never", "informational_without_end"):  # a client of whom more came is not read until there is an answer
            await target.wait_counted("cluster.a.upstream_rq_total", 1)
            wire.reset()
        else:
            wire.send(bytes(MB))
            await wire.until(lambda: False)
            assert wire.received == b""
        await target.wait_gauge("cluster.a.upstream_cx_active", 0)
    assert await target.counted("cluster.a.upstream_cx_tx_bytes_total") < 200  # nothing but the question


@pytest.mark.parametrize("way", ["down", "up"])
async def test_shared_connection(target: Target, way: str):
    """Over HTTP/2 a tunnel whose one end does not read takes little, and does not hold up another one on the same connection."""
    accept = Headers(lines(":status: 200"))
    target.upstream("h2a", [accept, Heard("never")])
    stuck = await target.connect("connect_h2")
    end = await upstream_end(target)
    end.manual.add("window")
    pouring = asyncio.get_running_loop().create_task(end.body(1, bytes(SIZE if way == "down" else 1), end=False))
    try:
        async with target.within(8 * MB):
            if way == "up":
                stuck.send(bytes(SIZE))
                await target.stalled("cluster.h2a.upstream_cx_tx_bytes_total")
            else:
                stuck.transport.pause_reading()
                assert await target.stalled("cluster.h2a.upstream_cx_rx_bytes_total") < 8 * MB
            before = len(end.streams)
            other = await target.connect("connect_h2")
            await end.wire.until(lambda: len(end.streams) > before)
            end.data(max(end.streams), b"not held up", end=False)
            await other.until(lambda: b"not held up" in other.received)
            assert b"not held up" in other.received
    finally:
        pouring.cancel()
        await asyncio.gather(pouring, return_exceptions=True)
    stuck.reset()
    other.reset()
    target.upstreams["h2a"].end_case()  # a client that is held back is not heard to be gone
    await target.wait_gauge("cluster.h2a.upstream_rq_active", 0)


async def upstream_end(target: Target) -> Any:
    """The HTTP/2 end of the upstream's connection, once a stream is there."""
    upstream = target.upstreams["h2a"]
    await target.wait_counted("cluster.h2a.upstream_rq_total", 1)
    end = upstream.connections[-1].http2
    assert end is not None
    await end.wire.until(lambda: 1 in end.streams)
    return end
