"""Peers that take their time, on purpose: each is ended by a timeout of the configuration, however it drips, and its memory and its upstream are given back."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.attack.target import Deaf, Pour, Target, arena, http
from tests.differential.config import cluster, filter_, listener, to
from tests.differential.wire import OK, Head, Request, Signal, Wait, Wire

MB = 1 << 20
SOON = "0.3s"
MANY = 100


def tls() -> dict[str, Any]:
    certificate = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
    return {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate]}}}


def with_tls(base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    base["filter_chains"][0] |= {"transport_socket": tls(), **fields}
    return base


def filters(*names: str) -> dict[str, Any]:
    return {"listener_filters": [filter_(name) for name in names], "listener_filters_timeout": SOON}


NO_TIMEOUT = to("a", timeout="0s")
CONFIG = arena(
    http("main", NO_TIMEOUT),
    http("heads", NO_TIMEOUT, request_headers_timeout=SOON),
    http("requests", NO_TIMEOUT, request_timeout=SOON),
    http("streams", NO_TIMEOUT, stream_idle_timeout=SOON),
    http("idle", NO_TIMEOUT, common_http_protocol_options={"idle_timeout": SOON}, drain_timeout="0.05s"),
    http("aged", NO_TIMEOUT, common_http_protocol_options={"max_connection_duration": SOON}, drain_timeout="0.05s"),
    http("duration", NO_TIMEOUT, common_http_protocol_options={"max_stream_duration": SOON}),
    with_tls(http("tls", NO_TIMEOUT), transport_socket_connect_timeout=SOON),
    http("inspected", NO_TIMEOUT, listener_fields=filters("tls_inspector", "http_inspector")),
    http("proxied", NO_TIMEOUT, listener_fields=filters("proxy_protocol")),
    listener("tcp", filter_("tcp_proxy", stat_prefix="tcp", cluster="a", idle_timeout=SOON)),
    clusters=[cluster("a")],
)  # fmt: skip

GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1000000\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"


async def drip(wire: Wire, begin: bytes, drop: bytes) -> None:
    """Send a beginning, and then a little now and then until the peer has had enough."""
    wire.send(begin)
    while wire.end is None and not wire.transport.is_closing():
        await asyncio.sleep(0.02)
        wire.send(drop)


async def dripping(target: Target, listener: str, *ways: tuple[bytes, bytes]) -> list[tuple[bytes, bytes, list[int]]]:
    """What many clients that drip in each of these ways (beginning, drops) are told before their connections end, if it is not just 408."""

    async def one(begin: bytes, drop: bytes) -> tuple[bytes, bytes, list[int]]:
        wire = await target.connect(listener)
        await drip(wire, begin, drop)
        return begin, drop, (await target.read(wire)).statuses

    told = await asyncio.gather(*(one(*way) for way in ways for _ in range(MANY // len(ways))))
    return [entry for entry in told if entry[2] != [408]]


async def test_slow_heads(target: Target):
    """Slowloris: request_headers_timeout runs from the first byte of a head, and nothing that still comes moves it."""
    assert await dripping(target, "heads", *((GET[:-2], drop) for drop in (b"", b"a", b": ", b"X: y\r\n"))) == []
    assert await target.counted("http.heads.downstream_rq_header_timeout") == MANY


async def test_slow_requests(target: Target):
    """R-U-Dead-Yet: request_timeout is for the whole request, body and trailers included."""
    ways = (POST, b"x"), (CHUNKED, b"1\r\nx\r\n"), (CHUNKED, b"0"), (GET[:-2], b"x"), (CHUNKED + b"0\r\n", b"x: y\r\n")
    assert await dripping(target, "requests", *ways) == []
    assert await target.counted("http.requests.downstream_rq_timeout") == MANY


async def test_second_head_is_timed_too(target: Target):
    """A connection that has behaved once is trusted no more than a new one."""
    wire = await target.connect("heads")
    wire.send(GET)
    await wire.until(lambda: wire.received.endswith(b"ok"))
    await drip(wire, GET[:-4], b"x")
    assert (await target.read(wire)).data.count(b"HTTP/1.1 408 ") == 1


async def test_body_that_stops(target: Target):
    """stream_idle_timeout ends a request whose body stops coming, and frees the upstream connection that it holds."""
    target.upstream("a", [Head(), Signal("held")])
    wires = [await target.connect("streams") for _ in range(20)]
    for wire in wires:
        wire.send(POST + b"x")
    answers = [await target.read(wire) for wire in wires]
    assert [answer.statuses for answer in answers] == [[408]] * 20
    await target.wait_counted("cluster.a.upstream_cx_destroy", 20)


async def test_answer_that_never_comes(target: Target):
    """The same for an upstream that is silent."""
    target.upstream("a", [Request(), Deaf("never")])
    answers = await asyncio.gather(*(target.send(GET, listener=name, token=b"timeout") for name in ("streams", "duration") for _ in range(10)))
    assert [answer.statuses for answer in answers] == [[504]] * 20
    target.signals["never"].set()


async def begun(wire: Wire) -> None:
    """Read the beginning of an answer, and no more. On a busy machine a timeout may come before it: then ask again."""
    while wire.end is None:
        await wire.until(lambda: wire.received)
        if wire.received.startswith(b"HTTP/1.1 200"):
            wire.transport.pause_reading()
            return
        await wire.until(lambda: wire.received.endswith(b"timeout"))
        wire.received.clear()
        wire.send(GET)


@pytest.mark.parametrize("listener", ["streams", "duration", "tcp"])
async def test_answer_that_nobody_reads(target: Target, listener: str):
    """A client that asks for much and reads nothing is cut off: its connection is closed although its answer cannot be flushed, and the upstream is free."""
    target.upstream("a", [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (32 * MB), Pour(b"x" * 65536, 512)])
    async with target.within(24 * MB):
        wires = [await target.connect(listener) for _ in range(4)]
        for wire in wires:
            wire.send(GET)
        await asyncio.gather(*(begun(wire) for wire in wires))
        await target.wait_counted("listener.tcp.downstream_cx_destroy" if listener == "tcp" else f"http.{listener}.downstream_cx_destroy", 4)
    await target.wait_counted("cluster.a.upstream_cx_destroy", 4)


@pytest.mark.parametrize(("listener", "said"), [("idle", GET), ("aged", GET), ("tcp", b"bytes")])
async def test_connections_that_do_nothing(target: Target, listener: str, said: bytes):
    """Clients that connect and then do nothing, or no more, are let go by idle_timeout and max_connection_duration."""
    target.upstream("a", *([[b"hello", Deaf("never")]] if listener == "tcp" else [[Request(), OK]]), on_connect=listener == "tcp")
    answers = await asyncio.gather(*(target.send(begin, listener=listener) for begin in (b"", said) for _ in range(MANY // 2)))
    assert all(answer.end for answer in answers)
    if listener == "tcp":
        target.signals["never"].set()


async def test_idle_after_a_request_that_took_long(target: Target):
    """A connection that was busy when it would have been idle long enough is let go all the same, soon after its answer."""
    target.upstream("a", [Request(), Wait("go"), OK])
    busy = await target.connect("idle")
    busy.send(GET)
    await target.wait_counted("cluster.a.upstream_rq_total", 1)
    await target.send(b"", listener="idle")  # its end says that so much time has gone by
    target.signals["go"].set()
    assert (await target.read(busy)).statuses == [200]


async def test_handshakes_that_stop(target: Target):
    """transport_socket_connect_timeout ends a TLS handshake that does not go on."""
    begins = b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
    answers = await asyncio.gather(*(target.send(begin, listener="tls") for begin in begins for _ in range(MANY)))
    assert all(answer.end for answer in answers)
    assert await target.counted("listener.tls.downstream_cx_transport_socket_connect_timeout") == len(begins) * MANY


@pytest.mark.parametrize(
    ("listener", "begins"),
    [
        ("inspected", (b"", b"\x16\x03\x01\x02\x00\x01", b"GE", b"PRI * HTTP/2.0\r\n")),
        ("proxied", (b"", b"PROXY TCP4 1.2.3.4", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c")),
    ],
)
async def test_first_bytes_that_stop(target: Target, listener: str, begins: tuple[bytes, ...]):
    """listener_filters_timeout ends a connection about which too little is known."""
    answers = await asyncio.gather(*(target.send(begin, listener=listener) for begin in begins for _ in range(MANY)))
    assert [answer for answer in answers if answer.data or not answer.end] == []
    assert await target.counted(f"listener.{listener}.downstream_pre_cx_timeout") == len(begins) * MANY


async def test_clients_that_vanish(target: Target):
    """Resets and half-closed connections in every state leave nothing behind; that is what the end of each test looks at."""
    target.upstream("a", [Head(), Deaf("never")])
    for begin in (b"", b"G", GET[:-2], GET, POST, POST + b"x", CHUNKED, CHUNKED + b"5\r\nhel", GET + GET, b"\x16\x03\x01"):
        for on in ("main", "tls", "inspected", "proxied", "tcp"):
            for ending in ("close", "reset", "half"):
                wire = await target.connect(on)
                wire.send(begin)
                if ending == "half":
                    with contextlib.suppress(OSError):  # it has been closed already
                        wire.transport.write_eof()
                else:
                    getattr(wire, ending)()
    target.signals["never"].set()
