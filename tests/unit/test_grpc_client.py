"""Our gRPC client over a fake pool: what a well-behaved server never does. tests/interop/test_grpc_client.py has the well-behaved one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshproxy.codec import grpc
from meshproxy.codec.h1.response import KnownResponse
from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.upstream import pool as pools
from meshproxy.upstream.grpc_client import GrpcClient, encode_metadata
from meshproxy.upstream.grpc_stream import GrpcError, GrpcStream, decode_metadata
from tests.unit import upstream_help

GRPC = [(b"content-type", b"application/grpc")]
OK = Headers([(b"grpc-status", b"0")])


class Exchange:
    """What a call sends: `out`."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.out: list[Any] = []

    def send_head(self, head: Any, body: Any, *, ended: bool, trailers: Any, upgrade: Any) -> None:
        self.out.append((dict(head.items), list(body), ended))

    def send_data(self, data: bytes, end_stream: bool) -> None:
        self.out.append((data, end_stream))

    def let_go(self) -> None:
        self.out.append("let go")

    def abort(self) -> None:
        self.out.append("abort")

    def pause_reading(self) -> None:
        self.out.append("pause")

    def resume_reading(self) -> None:
        self.out.append("resume")


class Pool:
    def __init__(self, *, ready: bool) -> None:
        self.ready = ready
        self.waiting: Any = None
        self.cancelled: Any = None

    def acquire(self, request: Any) -> Exchange | None:
        if self.ready:
            return Exchange(request)
        self.waiting = request
        return None

    def cancel(self, request: Any) -> None:
        self.cancelled = request


def begin(*, ready: bool = True, limit: int = 0, timeout: float | None = None, **fields: Any) -> tuple[GrpcStream, Pool, Any]:
    clusters = upstream_help.manager(upstream_help.static(upstream_help.group("127.0.0.1:1"), **fields))
    pool = Pool(ready=ready)
    cluster: Any = clusters.get("c")
    cluster.hosts[0].pools = {0: pool}
    return GrpcClient(clusters, "c", max_receive_message_length=limit).stream("/s/m", timeout=timeout), pool, cluster


async def failure(stream: GrpcStream) -> GrpcError:
    with pytest.raises(GrpcError) as caught:
        await stream.read()
    assert stream.status == caught.value.status
    return caught.value


async def test_the_request() -> None:
    stream, _, _ = begin(timeout=1.5)
    exchange: Any = stream._exchange
    await stream.send(b"abc")
    await stream.send(b"", done=True)
    items = {b"te": b"trailers", b"grpc-timeout": b"1500m", b"content-type": b"application/grpc"}
    assert exchange.out == [(items, [], False), (grpc.frame(b"abc"), False), (grpc.frame(b""), True)]
    head = stream._head
    assert (head.method, head.path, head.authority, head.scheme) == (b"POST", b"/s/m", b"c", b"http")
    stream.cancel()
    assert exchange.out[-1] == "abort"
    assert stream._deadline is None


async def test_what_waits_for_a_connection_is_sent_with_the_head() -> None:
    stream, pool, _ = begin(ready=False)
    await stream.send(bytes(70_000))
    blocked = asyncio.create_task(stream.send(b"more", done=True))
    await asyncio.sleep(0)
    assert not blocked.done()
    exchange = Exchange(stream)
    pool.waiting.on_connected(exchange)
    await blocked
    assert exchange.out[0][1:] == ([grpc.frame(bytes(70_000))], False)
    assert exchange.out[1] == (grpc.frame(b"more"), True)


async def test_a_call_without_messages() -> None:
    stream, pool, _ = begin(ready=False)
    await stream.done_writing()
    await stream.done_writing()
    exchange = Exchange(stream)
    pool.waiting.on_connected(exchange)
    assert exchange.out[0][1:] == ([], True)
    again, _, _ = begin()
    await again.done_writing()
    assert again._exchange.out[-1] == (b"", True)  # type: ignore[union-attr]


async def test_the_server_takes_no_more() -> None:
    stream, _, _ = begin()
    stream.on_upstream_writable(False)
    blocked = asyncio.create_task(stream.send(b"x"))
    await asyncio.sleep(0)
    assert not blocked.done()
    stream.on_upstream_writable(True)
    await blocked
    stream.on_upstream_writable(False)
    blocked = asyncio.create_task(stream.send(b"x"))
    await asyncio.sleep(0)
    stream.on_response_headers(ResponseHead(200, GRPC), False)
    stream.on_response_trailers(OK)
    with pytest.raises(GrpcError, match="OK: the server has ended the call"):
        await blocked


async def test_a_reader_that_does_not_read() -> None:
    stream, _, _ = begin()
    exchange: Any = stream._exchange
    stream.on_response_headers(ResponseHead(200, GRPC), False)
    stream.on_response_data(grpc.frame(bytes(40_000)) * 2, False)
    stream.on_response_data(grpc.frame(bytes(40_000)), False)
    assert exchange.out[1:] == ["pause"]
    await stream.read()
    assert exchange.out[1:] == ["pause"]
    await stream.read()
    await stream.read()
    assert exchange.out[1:] == ["pause", "resume"]


@pytest.mark.parametrize(
    ("head", "end", "status", "text"),
    [
        (ResponseHead(503, []), False, grpc.UNAVAILABLE, "HTTP status 503"),
        (ResponseHead(404, []), True, grpc.UNIMPLEMENTED, "HTTP status 404"),
        (ResponseHead(500, [(b"grpc-status", b"5"), (b"grpc-message", b"a%20b")]), True, grpc.NOT_FOUND, "a b"),
        (ResponseHead(200, [(b"grpc-status", b"5")]), True, grpc.NOT_FOUND, "NOT_FOUND"),
        (ResponseHead(200, GRPC), True, grpc.UNKNOWN, "without a status"),
        (ResponseHead(200, [(b"grpc-status", b"soon")]), True, grpc.UNKNOWN, "without a status"),
        (ResponseHead(200, [(b"grpc-status", b"99")]), True, 99, "99"),
    ],
)
async def test_heads_that_are_errors(head: ResponseHead, end: bool, status: int, text: str) -> None:
    stream, _, _ = begin()
    exchange: Any = stream._exchange
    stream.on_response_headers(ResponseHead(103, []), False)
    stream.on_response_headers(head, end)
    error = await failure(stream)
    assert error.status == status
    assert text in str(error)
    assert ("abort" in exchange.out) is (not end or head.status == 404)


@pytest.mark.parametrize(
    ("pieces", "trailers", "status", "text"),
    [
        ([b"\1\0\0\0\1x"], OK, grpc.INTERNAL, "compressed"),
        ([b"\x80\0\0\0\0"], OK, grpc.INTERNAL, "flags"),
        ([grpc.frame(b"12345")], OK, grpc.RESOURCE_EXHAUSTED, "over the limit of 4"),
        ([b"\0\0\0"], OK, grpc.INTERNAL, "in the middle of a message"),
        ([b""], Headers([(b"x", b"1")]), grpc.UNKNOWN, "without a status"),
        ([b"\0\0"], None, grpc.UNKNOWN, "without a status"),
    ],
)
async def test_bodies_that_are_errors(pieces: list[bytes], trailers: Headers | None, status: int, text: str) -> None:
    stream, _, _ = begin(limit=4)
    stream.on_response_headers(ResponseHead(200, GRPC), False)
    for piece in pieces:
        stream.on_response_data(piece, trailers is None)
    if trailers is not None:
        stream.on_response_trailers(trailers)
    error = await failure(stream)
    assert error.status == status
    assert text in str(error)


async def test_a_response_over_http1() -> None:
    stream, _, _ = begin()
    head = ResponseHead(200, [(b"content-length", b"0"), (b"grpc-status", b"7"), (b"x", b"1")])
    head.get(b"x")
    stream.on_response_whole(KnownResponse(head, 0, 10), b"")
    error = await failure(stream)
    assert (error.status, error.trailing_metadata) == (grpc.PERMISSION_DENIED, [("content-length", "0"), ("x", "1")])
    stream, _, _ = begin()
    head = ResponseHead(200, [(b"content-length", b"6")])
    head.get(b"x")
    stream.on_response_whole(KnownResponse(head, 6, 10), grpc.frame(b"x"))
    assert await stream.read() == b"x"
    assert (await failure(stream)).status == grpc.UNKNOWN


async def test_no_connection() -> None:
    outlier = {"consecutive_local_origin_failure": 1, "split_external_local_origin_errors": True}
    stream, pool, cluster = begin(ready=False, outlier_detection=outlier)
    reader = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    pool.waiting.on_pool_failure(pools.CONNECT_FAILURE, "Connection refused")
    with pytest.raises(GrpcError, match=r"UNAVAILABLE: .* reset reason: remote connection failure \(Connection refused\)"):
        await reader
    cluster.stats.settle()
    assert cluster.context.stats.value("cluster.c.internal.upstream_rq_503") == 1
    assert cluster.hosts[0].rq_error == 1
    assert cluster.context.stats.value("cluster.c.outlier_detection.ejections_detected_consecutive_local_origin_failure") == 1


async def test_resets() -> None:
    stream, _, _ = begin()
    stream.on_upstream_reset(pools.REFUSED, "")
    assert (await failure(stream)).status == grpc.UNAVAILABLE
    stream, _, _ = begin()
    stream.on_response_headers(ResponseHead(200, GRPC), False)
    stream.on_response_data(grpc.frame(b"x"), False)
    stream.on_upstream_reset(pools.REMOTE_RESET, "")
    assert await stream.read() == b"x"
    assert "remote reset" in str(await failure(stream))
    stream.cancel()
    assert stream.status == grpc.INTERNAL


async def test_a_timeout_while_it_waits() -> None:
    stream, pool, cluster = begin(ready=False, timeout=0.0)
    assert (await failure(stream)).status == grpc.DEADLINE_EXCEEDED
    assert pool.cancelled is stream
    cluster.stats.settle()
    assert cluster.context.stats.value("cluster.c.upstream_rq_504") == 1


@pytest.mark.parametrize("answered", [False, True])
async def test_a_timeout_while_the_server_is_silent(answered: bool) -> None:
    stream, _, cluster = begin(timeout=0.0)
    exchange: Any = stream._exchange
    if answered:
        stream.on_response_headers(ResponseHead(200, GRPC), False)
    assert (await failure(stream)).status == grpc.DEADLINE_EXCEEDED
    assert exchange.out[-1] == "abort"
    cluster.stats.settle()
    counted = [cluster.context.stats.value(f"cluster.c.{name}") for name in ("upstream_rq_timeout", "upstream_rq_504", "internal.upstream_rq_504")]
    assert counted == ([1, 0, 0] if answered else [1, 1, 1])


async def test_unary_wants_exactly_one_message() -> None:
    for messages, text in (([], "no response"), ([b"a", b"b"], "more than one response")):
        clusters = upstream_help.manager(upstream_help.static(upstream_help.group("127.0.0.1:1")))
        pool = Pool(ready=False)
        clusters.get("c").hosts[0].pools = {0: pool}  # type: ignore[union-attr,dict-item]
        task = asyncio.create_task(GrpcClient(clusters, "c").unary("/s/m", b""))
        await asyncio.sleep(0)
        pool.waiting.on_connected(Exchange(pool.waiting))
        pool.waiting.on_response_headers(ResponseHead(200, GRPC), False)
        pool.waiting.on_response_data(b"".join(map(grpc.frame, messages)), False)
        pool.waiting.on_response_trailers(OK)
        with pytest.raises(GrpcError, match=f"INTERNAL: .*{text}"):
            await task


def test_metadata() -> None:
    items = encode_metadata((("Text", "a b"), ("raw-bin", b"\xff"), ("some-bin", "text")))
    assert items == [(b"text", b"a b"), (b"raw-bin", b"/w"), (b"some-bin", b"dGV4dA")]
    for value in ("ä", "line\nbreak"):
        with pytest.raises(ValueError, match=r"(?s).*"):
            encode_metadata((("text", value),))
    found = decode_metadata(Headers([(b"content-type", b"x"), (b"grpc-status", b"0"), (b"a-bin", b"/w,/w=="), (b"b-bin", b"*"), (b"c", b"d")]))
    assert found == [("a-bin", b"\xff"), ("a-bin", b"\xff"), ("b-bin", b""), ("c", "d")]
    assert decode_metadata(None) == []
