"""Upstreams that mean harm: endless answers, floods of them, lengths that lie. The client gets a whole answer or none, the next request is served.

Single bad answers, and what Envoy makes of them, are in tests/differential/test_bad_upstreams.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.attack.target import Deaf, Pour, Target, arena, http
from tests.differential.config import cluster
from tests.differential.wire import OK, Close, Eof, Head, Request, Reset, Signal, Wait

MB = 1 << 20
GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
H = b"HTTP/1.1 200 OK\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </" + b"s" * 900 + b">\r\n\r\n"


def to_a(**route: Any) -> list[dict[str, Any]]:
    return [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a", **route}}]}]


CONFIG = arena(
    http("main", to_a(timeout="0s")),
    http("continue", to_a(timeout="0s"), proxy_100_continue=True),
    http("impatient", to_a(timeout="0.3s")),
    http("persistent", to_a(timeout="0s", retry_policy={"retry_on": "connect-failure,reset,5xx", "num_retries": 3})),
    clusters=[cluster("a")],
)

ENDLESS = {
    "status_line": [Pour(b"HTTP/1.1 200 " + b"y" * 1000)],
    "reason": [H[:-2], Pour(b"y" * 1000)],
    "header": [H + b"x: ", Pour(b"y" * 1000)],
    "headers": [H, Pour(b"x: yyyyyyyyyyy\r\n" * 60)],
    "header_name": [H, Pour(b"y" * 1000)],
    "empty_lines": [Pour(b"\r\n" * 500)],
    "no_line_ends": [Pour(b"\0" * 1000)],
    "chunk_extension_before_data": [H + b"transfer-encoding: chunked\r\n\r\n5;", Pour(b"e" * 1000)],
    "chunk_size": [H + b"transfer-encoding: chunked\r\n\r\n", Pour(b"0" * 1000)],
}
CUT = {
    "chunk_extension": [H + b"transfer-encoding: chunked\r\n\r\n4\r\npart\r\n5;", Pour(b"e" * 1000)],
    "trailers": [H + b"transfer-encoding: chunked\r\n\r\n4\r\npart\r\n0\r\n", Pour(b"x: yyyyyyyyyyy\r\n" * 60)],
    "trailer": [H + b"transfer-encoding: chunked\r\n\r\n4\r\npart\r\n0\r\nx: ", Pour(b"y" * 1000)],
    "chunk_too_long": [H + b"transfer-encoding: chunked\r\n\r\n4\r\npart\r\n", b"4\r\ntoo long\r\n0\r\n\r\n"],
    "shorter_than_declared": [H + b"content-length: 100\r\n\r\npart", Close()],
    "reset": [H + b"content-length: 100\r\n\r\npart", Reset()],
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_endless_head(target: Target, name: str):
    """A head that does not end is given up at the limit; the client hears of a bad gateway, and the next request is served."""
    target.upstream("a", [Request(), *ENDLESS[name]], [Request(), OK])
    async with target.within(8 * MB):
        answer = await target.send(GET, token=b"\r\n\r\n")
    # Where the head was all right, it may be out; then the body must not look whole.
    assert answer.statuses in ([502], [200], []), answer
    assert b"0\r\n\r\n" not in answer.data
    assert (await target.send(LAST)).data.endswith(b"ok")


@pytest.mark.parametrize("name", CUT)
async def test_body_that_breaks_off_never_looks_whole(target: Target, name: str):
    """What has begun as an answer and cannot be ended ends with the connection, short of the declared length and without a last chunk."""
    target.upstream("a", [Request(), *CUT[name]], [Request(), OK])
    async with target.within(8 * MB):
        answer = await target.send(GET)
    assert answer.end is not None
    body = answer.data.partition(b"\r\n\r\n")[2]
    assert not body.endswith(b"0\r\n\r\n"), answer
    assert answer.data.startswith((H, b"HTTP/1.1 502 "))
    assert len(body) < 100
    assert (await target.send(LAST)).data.endswith(b"ok")


async def test_flood_of_1xx(target: Target):
    """Ten thousand informational answers before the final one: dropped, as Envoy does, and the answer arrives."""
    target.upstream("a", [Request(), Pour(HINTS, 10_000), OK])
    async with target.within(8 * MB):
        answer = await target.send(LAST)
    assert answer.data.startswith(H)
    assert b"103" not in answer.data


async def test_endless_1xx_end_with_the_timeout(target: Target):
    """1xx are no progress: the route's timeout runs on."""
    target.upstream("a", [Request(), Pour(HINTS)])
    async with target.within(8 * MB):
        answer = await target.send(GET, listener="impatient", token=b"upstream request timeout")
    assert answer.statuses == [504]


async def test_flood_of_1xx_where_they_are_passed_on(target: Target):
    """As Envoy, the first one is."""
    target.upstream("a", [Request(), Pour(HINTS, 10_000), OK])
    async with target.within(8 * MB):
        answer = await target.send(LAST, listener="continue")
    assert answer.data.count(b"HTTP/1.1 103 ") == 1
    assert answer.data.endswith(b"ok")


async def test_endless_body_to_a_client_that_does_not_read(target: Target):
    """The client's slowness reaches the upstream; nothing piles up between them."""
    target.upstream("a", [Request(), H + b"content-length: %d\r\n\r\n" % (32 * MB), Pour(b"x" * 65536, 32 * MB // 65536)])
    wire = await target.connect()
    wire.transport.pause_reading()
    async with target.within(12 * MB):
        wire.send(LAST)
        await target.wait_counted("http.main.downstream_flow_control_paused_reading_total", 1)
        assert await target.stalled("cluster.a.upstream_cx_rx_bytes_total") < 16 * MB
        wire.transport.resume_reading()
        answer = await target.read(wire)
    assert len(answer.data.partition(b"\r\n\r\n")[2]) == 32 * MB


async def test_upload_to_an_upstream_that_does_not_read(target: Target):
    """The upstream's slowness reaches the client."""
    target.upstream("a", [Deaf("read"), Request(), OK])
    wire = await target.connect()
    async with target.within(12 * MB):
        wire.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (32 * MB))
        wire.send(b"x" * (32 * MB))
        await target.wait_counted("cluster.a.upstream_flow_control_backed_up_total", 1)
        assert await target.stalled("cluster.a.upstream_cx_tx_bytes_total") < 16 * MB
        target.signals["read"].set()
        answer = await target.read(wire)
    assert answer.data.endswith(b"ok")


async def test_early_answer_of_an_upstream_that_reads_no_more(target: Target):
    """The connection is of no use any more, and goes although the upload cannot be flushed."""
    target.upstream("a", [Head(), Deaf("never"), OK])
    wire = await target.connect()
    wire.send(b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n" % (16 * MB) + b"x" * (16 * MB))
    await target.wait_counted("cluster.a.upstream_flow_control_backed_up_total", 1)
    target.upstreams["a"].connections[0].send(OK)
    assert (await target.read(wire)).statuses == [200]
    await target.wait_counted("cluster.a.upstream_cx_destroy", 1)
    target.signals["never"].set()


async def test_tiny_chunks(target: Target):
    """A body in chunks of one byte costs memory for its bytes, not for its chunks."""
    target.upstream("a", [Request(), H + b"transfer-encoding: chunked\r\n\r\n", Pour(b"1\r\nx\r\n" * 10_000, 40), b"0\r\n\r\n"])
    async with target.within(16 * MB):
        answer = await target.send(LAST)
    assert answer.data.count(b"x") - answer.data.partition(b"\r\n\r\n")[0].count(b"x") == 400_000


async def test_upstream_that_talks_without_being_asked(target: Target):
    """A pooled connection on which bytes come that nobody asked for is closed; they are no answer to the next request."""
    target.upstream("a", [Request(), OK, Wait("idle"), b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\npoisoned", Signal("said"), Eof()], [Request(), OK])
    first = await target.send(LAST)
    target.signals["idle"].set()
    await target.signals["said"].wait()
    await target.wait_counted("cluster.a.upstream_cx_protocol_error", 1)
    second = await target.send(LAST)
    assert first.data.endswith(b"ok")
    assert second.data.endswith(b"ok")


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-x\r\n", b"\x15\x03\x01\x00\x02\x02\x28", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\x12\x04\0\0\0\0\0" + b"\0" * 18, b"220 ready\r\n"]
)
async def test_upstream_of_another_protocol_at_once(target: Target, said: bytes):
    """What speaks first, and no HTTP: a bad gateway, or no upstream at all, again and again."""
    target.upstream("a", [said, Request(), Eof()], on_connect=True)
    for _ in range(3):
        assert (await target.send(LAST)).statuses in ([502], [503])


async def test_upstream_that_closes_at_once_is_not_stormed(target: Target):
    """Retries are counted: every request costs the upstream one connection and three more, whatever it does with them."""
    target.upstream("a", [Close()], on_connect=True)
    answers = await asyncio.gather(*(target.send(LAST, listener="persistent") for _ in range(20)))
    assert {answer.statuses[0] for answer in answers} == {503}
    assert await target.counted("cluster.a.upstream_cx_total") <= 80
    assert await target.counted("cluster.a.upstream_rq_retry") <= 60


async def test_compressed_bomb_is_not_opened(target: Target):
    """Nothing here decompresses."""
    import gzip

    bomb = gzip.compress(bytes(32 * MB))
    target.upstream("a", [Request(), H + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb) + bomb])
    async with target.within(8 * MB):
        answer = await target.send(LAST)
    assert answer.data.endswith(bomb)
