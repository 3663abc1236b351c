"""Bodies and tunnels that one side does not take, over HTTP/2 on either side or both: how much of them is held is bounded, and all of it arrives in the end.

What is stated in docs/decisions/0009-http2.md: of one stream, at most the window that was granted to whoever sends, as much again and a read in the queue
towards whoever does not take it, and `per_connection_buffer_limit_bytes` behind a socket that takes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.attack.target import Deaf, Target, arena, http
from tests.differential import http2_wire as h2
from tests.differential.config import cluster, to
from tests.differential.harness import Body, EchoData, Ended, Got, Headers, Heard, Hello, Open, Play, Sync, Update, h2_cluster, head, lines, reply
from tests.differential.proxy import dechunk
from tests.differential.wire import Echo, Head, Request, Signals, Wait, Wire, answer, play

MB = 1 << 20
SIZE = 24 * MB
WINDOW = 256 * 1024
NARROW = {"initial_stream_window_size": WINDOW, "initial_connection_window_size": 4 * WINDOW, "allow_connect": True}
READ = 256 * 1024  # the most that one read of a socket brings
HELD = 65_535 + 2 * WINDOW + READ  # what the peer's window allows, what waits, what we had granted before we knew
BUFFERED = 1 * MB  # per_connection_buffer_limit_bytes, unless it is set: what may come before there is a connection to send it on
SOCKETS = 16 * MB  # what kernels take for both ends of a connection, with what we hold
WS = {"upgrade_configs": [{"upgrade_type": "websocket"}]}
CONFIG = arena(
    http("main", to("a")),
    http("narrow_a", to("a", timeout="0s", **WS), http2_protocol_options=NARROW),
    http("narrow_h2a", to("h2a", timeout="0s", **WS), http2_protocol_options=NARROW),
    clusters=[cluster("a"), h2_cluster("h2a", options=NARROW)],
)
LENGTH = f"content-length: {SIZE}"
BODY = bytes(range(256)) * (SIZE // 256)
WIDE = {h2.WINDOW: (1 << 31) - 1}
OPEN = [Update((1 << 31) - 1 - 65_535)]
UPS = ["a", "h2a"]


@asynccontextmanager
async def sending(wire: Any, target: Target, *steps: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """Steps of a client that go on beside the test; they have to come to their end."""
    task = asyncio.get_running_loop().create_task(play(list(steps), wire, target.signals))
    try:
        yield task
        assert await task is None
    finally:
        task.cancel()


def upstream(target: Target, name: str, script: list[Any], **fields: Any) -> None:
    """What an upstream does in this test."""
    target.signals = Signals()
    target.upstreams[name].begin(Play([script], **fields), target.signals)


def bulky(up: str) -> list[Any]:
    """An upstream that answers with the body."""
    return [Request(), answer(body=BODY)] if up == "a" else [Ended(), *reply(body=BODY)]


async def connect(target: Target, up: str, hello: Hello) -> Wire:
    wire = await target.connect(f"narrow_{up}")
    assert await play([hello], wire, target.signals) is None
    return wire


@pytest.mark.parametrize("up", UPS)
async def test_a_client_that_opens_no_window(target: Target, up: str):
    """Its windows stay as they were at the beginning."""
    upstream(target, up, bulky(up))
    wire = await connect(target, up, Hello(manual=("window",)))
    async with target.within(12 * MB):
        await play([Open(head())], wire, target.signals)
        assert 65_535 < await target.stalled(f"cluster.{up}.upstream_cx_rx_bytes_total") < HELD + READ
    assert wire.http2 is not None
    assert len(wire.http2.streams[1].data) == 65_535
    wire.http2.manual.clear()
    assert await play([*OPEN, Update(1 << 30, 1), Ended(1)], wire, target.signals) is None
    assert wire.http2.streams[1].data == BODY


@pytest.mark.parametrize("up", UPS)
async def test_a_client_that_opens_the_window_of_another_stream(target: Target, up: str):
    """A stream that waits for its window holds no other one back, and one that gets a large window needs no second one to go on."""
    upstream(target, up, bulky(up))
    wire = await connect(target, up, Hello(manual=("window",)))
    await play([*OPEN, Open(head()), Open(head())], wire, target.signals)
    async with target.within(12 * MB):
        await target.stalled(f"cluster.{up}.upstream_cx_rx_bytes_total")
    assert wire.http2 is not None
    assert await play([Update(1 << 30, 3), Ended(3)], wire, target.signals) is None
    assert (len(wire.http2.streams[1].data), wire.http2.streams[3].data == BODY) == (65_535, True)
    assert await play([Update(1 << 30, 1), Ended(1)], wire, target.signals) is None
    assert wire.http2.streams[1].data == BODY


@pytest.mark.parametrize("up", UPS)
async def test_a_client_that_does_not_read(target: Target, up: str):
    """Its windows are open, its socket is not."""
    upstream(target, up, bulky(up))
    wire = await connect(target, up, Hello(WIDE))
    await play([*OPEN, Sync()], wire, target.signals)
    wire.transport.pause_reading()
    async with target.within(12 * MB):
        await play([Open(head())], wire, target.signals)
        assert await target.stalled(f"cluster.{up}.upstream_cx_rx_bytes_total") < SOCKETS
    wire.transport.resume_reading()
    assert await play([Ended(1)], wire, target.signals) is None
    assert wire.http2 is not None
    assert wire.http2.streams[1].data == BODY


async def test_a_client_of_http1_that_does_not_read(target: Target):
    upstream(target, "h2a", bulky("h2a"))
    wire = await target.connect("narrow_h2a")
    wire.transport.pause_reading()
    async with target.within(12 * MB):
        wire.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
        assert await target.stalled("cluster.h2a.upstream_cx_rx_bytes_total") < SOCKETS
        wire.transport.resume_reading()
        got = await target.read(wire)
    assert dechunk(got.data.partition(b"\r\n\r\n")[2]) == BODY


@pytest.mark.parametrize("http2", [True, False], ids=["h2", "h1"])
async def test_an_upstream_that_opens_no_window(target: Target, http2: bool):
    """It grants nothing beyond its first windows until it is told to."""
    upstream(target, "h2a", [Heard("headers"), Wait("open"), Update(1 << 30), Update(1 << 30, None), Ended(), *reply()], manual=("window",))
    counter = "http.narrow_h2a.downstream_cx_rx_bytes_total"
    async with target.within(12 * MB):
        if http2:
            wire = await connect(target, "h2a", Hello())
            async with sending(wire, target, Open(head("POST", "/", LENGTH), end=False), Body(BODY), Ended()):
                assert await target.stalled(counter) < HELD
                target.signals["open"].set()
        else:
            wire = await target.connect("narrow_h2a")
            wire.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % SIZE)
            wire.send(BODY)
            assert await target.stalled(counter) < max(HELD, 65_535 + BUFFERED) + READ
            target.signals["open"].set()
            assert (await target.read(wire)).data.endswith(b"ok\r\n0\r\n\r\n")
    (connection,) = target.upstreams["h2a"].connections
    assert connection.http2 is not None
    assert connection.http2.streams[1].data == BODY


@pytest.mark.parametrize("up", UPS)
async def test_an_upstream_that_does_not_read(target: Target, up: str):
    """Nor does its client go on sending what it cannot pass on."""
    if up == "a":
        upstream(target, up, [Deaf("read"), Request(), answer()])
    else:
        upstream(target, up, [Deaf("read"), Ended(), *reply()], settings=WIDE)
    wire = await connect(target, up, Hello())
    async with target.within(12 * MB), sending(wire, target, Open(head("POST", "/", LENGTH), end=False), Body(BODY), Ended()):
        assert await target.stalled(f"http.narrow_{up}.downstream_cx_rx_bytes_total") < SOCKETS
        target.signals["read"].set()


def websocket(path: str = "/chat") -> Open:
    fields = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", path), (":authority", "a.test")]
    return Open(fields, end=False)


SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
TUNNEL = Headers(lines(":status: 200"))
CONNECTS = {h2.CONNECT_PROTOCOL: 1}


@pytest.mark.parametrize("up", UPS)
async def test_a_tunnel_whose_client_opens_no_window(target: Target, up: str):
    """A WebSocket's server that speaks and speaks."""
    upstream(target, up, [Head(), SWITCHING, BODY] if up == "a" else [TUNNEL, Body(BODY, end=False)], settings=CONNECTS)
    wire = await connect(target, up, Hello(manual=("window",)))
    async with target.within(12 * MB):
        await play([websocket()], wire, target.signals)
        assert await target.stalled(f"cluster.{up}.upstream_cx_rx_bytes_total") < HELD + READ
    assert wire.http2 is not None
    wire.http2.manual.clear()
    assert await play([*OPEN, Update(1 << 30, 1), Got(SIZE, 1)], wire, target.signals) is None
    assert wire.http2.streams[1].data == BODY


@pytest.mark.parametrize("up", UPS)
async def test_a_tunnel_whose_upstream_takes_nothing(target: Target, up: str):
    """And a client that does."""
    script = [Head(), SWITCHING, Deaf("read"), Echo()] if up == "a" else [TUNNEL, Wait("read"), Update(1 << 30), Update(1 << 30, None), EchoData()]
    upstream(target, up, script, settings=CONNECTS, **({} if up == "a" else {"manual": ("window",)}))
    wire = await connect(target, up, Hello())
    async with target.within(12 * MB), sending(wire, target, websocket(), Heard("headers"), Body(BODY, end=False), Got(SIZE)):
        assert await target.stalled(f"http.narrow_{up}.downstream_cx_rx_bytes_total") < (SOCKETS if up == "a" else HELD + READ)
        target.signals["read"].set()
    assert wire.http2 is not None
    assert wire.http2.streams[1].data == BODY
