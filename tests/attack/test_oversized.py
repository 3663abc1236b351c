"""Parts of messages that are too big, or have no end: refused at their limits while they come, and never gathered beyond them.

What Envoy answers at each limit is compared in tests/differential/test_invalid.py and test_limits.py.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from tests.attack.target import Deaf, Mirror, Target, arena, http
from tests.differential.config import cluster, filter_
from tests.differential.wire import OK, Request, Wire

MB = 1 << 20
POST = b"POST / HTTP/1.1\r\nHost: %b\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def host(name: str, **route: Any) -> dict[str, Any]:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a", "timeout": "0s", **route}}]}


DELAY, LONG_DELAY = (filter_("fault", delay={"fixed_delay": seconds, "percentage": {"numerator": 100}}) for seconds in ("0.5s", "600s"))
HOSTS = [
    host("plain"),
    host("retried", retry_policy={"retry_on": "5xx,reset", "num_retries": 2}),
    host("mirrored", request_mirror_policies=[{"cluster": "b"}]),
]
# These clients go on sending when they are refused. However late they look for the answer, it must not have been lost to the end of the connection.
LATE_END = {"delayed_close_timeout": "600s"}
CONFIG = arena(
    http("main", HOSTS),
    http("endless", HOSTS, **LATE_END),
    http("buffered", HOSTS, filters=[filter_("buffer", max_request_bytes=10_000)], **LATE_END),
    http("held", HOSTS, filters=[DELAY]),
    http("held_long", HOSTS, filters=[LONG_DELAY]),
    clusters=[cluster("a"), cluster("b")],
)


async def pour(wire: Wire, begin: bytes, piece: bytes, limit: int) -> int:
    """Send a beginning and then pieces until the peer has answered or ended; how many bytes of pieces there were. Fails when it took more than `limit`."""
    wire.send(begin)
    wire.transport.set_write_buffer_limits(1 << 16)
    sent = 0
    while wire.end is None and not wire.received and not wire.transport.is_closing():
        if wire.full:
            await wire.until(lambda: not wire.full or wire.received)
            continue
        wire.send(piece)
        sent += len(piece)
        assert sent <= limit, f"{limit:,} bytes were taken"
        await asyncio.sleep(0)
    return sent


ENDLESS = {
    "method": (b"G", b"E" * 1000, {400, 431}),
    "target": (b"GET /", b"p" * 1000, {431}),
    "query": (b"GET /?", b"a=b&" * 250, {431}),
    "absolute_target": (b"GET http://", b"h" * 1000, {431}),
    "host": (b"GET / HTTP/1.1\r\nHost: ", b"h" * 1000, {431}),
    "header_name": (b"GET / HTTP/1.1\r\n", b"x" * 1000, {431}),
    "header_value": (b"GET / HTTP/1.1\r\nx: ", b"x" * 1000, {431}),
    "headers": (b"GET / HTTP/1.1\r\n", b"x: y\r\n" * 160, {431}),
    "empty_headers": (b"GET / HTTP/1.1\r\n", b"x:\r\n" * 250, {431}),
    "cookies": (b"GET / HTTP/1.1\r\n", b"cookie: a=b\r\n" * 80, {431}),
    "white_space": (b"GET / HTTP/1.1\r\nx:", b" " * 1000, {431}),
    "chunk_size": (POST % b"plain.test" + CHUNKED, b"0" * 1000, {400}),
    "chunk_extension": (POST % b"plain.test" + CHUNKED + b"5;", b"e" * 1000, {400}),
    "trailer": (POST % b"plain.test" + CHUNKED + b"0\r\nx: ", b"x" * 1000, {400, 431}),
    "trailers": (POST % b"plain.test" + CHUNKED + b"0\r\n", b"x: y\r\n" * 160, {400, 431}),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_endless(target: Target, name: str):
    """Twenty clients whose request does not end: each is refused when it is over the limit, which is far from a megabyte."""
    begin, piece, statuses = ENDLESS[name]

    async def one() -> None:
        wire = await target.connect("endless")
        await pour(wire, begin, piece, 8 * MB)  # most of it waits in the kernel
        found = (await target.read(wire, b"\r\n\r\n")).statuses
        assert len(found) == 1, found
        assert found[0] in statuses

    async with target.within(12 * MB):
        await asyncio.gather(*(one() for _ in range(20)))
    assert await target.counted("http.endless.downstream_cx_rx_bytes_total") < 20 * MB


async def test_chunk_extensions_are_not_kept(target: Target):
    """Four megabytes of extensions for a kilobyte of content: the upstream sees the content."""
    target.upstream("a", [Mirror()])
    chunk = b"1;" + b"e" * 4000 + b"\r\nx\r\n"
    async with target.within(8 * MB):
        answer = await target.send(POST % b"plain.test" + b"Connection: close\r\n" + CHUNKED + chunk * 1000 + b"0;" + b"e" * 4000 + b"\r\n\r\n")
    assert answer.statuses == [200]
    sent = b"".join(bytes(wire.received) for wire in target.upstreams["a"].connections)
    assert sum(len(chunk) for chunk in re.findall(rb"\r\n(x+)\r\n", sent)) == 1000
    assert b"eee" not in sent


@pytest.mark.parametrize("framing", [b"Content-Length: 33554432\r\n\r\n", CHUNKED + b"2000000\r\n"])
async def test_body_over_the_limit_of_the_buffer_filter(target: Target, framing: bytes):
    """413 as soon as it is known, and no megabytes before that."""
    wire = await target.connect("buffered")
    async with target.within(8 * MB):
        sent = await pour(wire, POST % b"plain.test" + framing, b"x" * 65536, 32 * MB)
        assert (await target.read(wire, b"\r\n\r\n")).statuses == [413]
    assert sent < 16 * MB
    assert not target.upstreams["a"].connections


async def upload(target: Target, listener: str, name: bytes, size: int = 24 * MB) -> list[int]:
    """A big body; the statuses that came for it."""
    wire = await target.connect(listener)
    wire.send(POST % name + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % size)
    wire.send(bytes(size))
    return (await target.read(wire)).statuses


async def test_body_that_might_have_to_be_sent_again(target: Target):
    """What is kept for retries has a limit; a body over it is sent once."""
    async with target.within(12 * MB):
        assert await upload(target, "main", b"retried.test") == [200]
    target.upstream("a", [Request(), b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"], [Request(), OK])
    async with target.within(12 * MB):
        assert await upload(target, "main", b"retried.test") == [503]


async def test_body_while_the_request_is_held(target: Target):
    """A request that a filter holds does not fill the memory with its body."""
    wires = [await target.connect("held") for _ in range(4)]
    async with target.within(16 * MB):
        for wire in wires:
            wire.send(POST % b"plain.test" + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (8 * MB) + bytes(8 * MB))
        answers = [await target.read(wire) for wire in wires]
    assert [answer.statuses for answer in answers] == [[200]] * 4


async def test_body_to_a_mirror_that_does_not_read(target: Target):
    """The mirror's slowness is its own; what it has not taken is not gathered."""
    target.upstream("b", [Deaf("never")])
    async with target.within(16 * MB):
        assert await upload(target, "main", b"mirrored.test") == [200]
    target.signals["never"].set()


async def test_clients_that_vanish_while_a_filter_holds_them(target: Target):
    """What a filter waits for ends with its stream (CVE-2026-48090): nothing goes upstream for a client that is gone."""
    wires = []
    for number in range(60):
        wire = await target.connect("held_long")
        wire.send(POST % b"plain.test" + (CHUNKED + b"5\r\nhello\r\n" if number % 2 else b"Content-Length: 5\r\n\r\nhello"))
        wires.append(wire)
    await target.wait_counted("http.held_long.downstream_rq_total", 60)
    for number, wire in enumerate(wires):
        (wire.reset if number % 3 else wire.close)()
    await target.wait_gauge("http.held_long.downstream_rq_active", 0)
    assert not target.upstreams["a"].connections
