"""One gRPC call on its way: a request to the cluster's pool (`upstream.pool`), messages to whoever awaits them."""

from __future__ import annotations

import asyncio
import binascii
from collections import deque
from typing import TYPE_CHECKING, Self

from meshproxy.codec import grpc
from meshproxy.codec.headers import ResponseHead
from meshproxy.observe.stream_info import StreamInfo
from meshproxy.upstream.balance.base import LbContext

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.codec.headers import Headers, RequestHead
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.pool import Exchange, Pool

# Bytes of messages that nobody has read yet above which the server is granted no more, and below which it is again.
_READ_HIGH, _READ_LOW = 65536, 32768
# Bytes that wait for a connection above which `send` waits too.
_SEND_HIGH = 65536


class GrpcError(Exception):
    """A call that did not end well. `details_bin`: a serialised google.rpc.Status where the server sent one; `trailing_metadata`: what came with the status."""

    def __init__(self, status: int, message: str, *, details_bin: bytes = b"", trailing_metadata: list[tuple[str, str | bytes]] | None = None) -> None:
        name = grpc.SNAKE_NAMES[status] if 0 <= status < len(grpc.SNAKE_NAMES) else str(status)
        super().__init__(f"{name}: {message}" if message else name)
        self.status = status
        self.message = message
        self.details_bin = details_bin
        self.trailing_metadata = trailing_metadata or []


class GrpcStream:
    """A call. One task may send while another one reads; neither in two tasks at once.

    Owned by whoever asked for it; points at its exchange while it has one. Every method raises GrpcError once the call has failed.
    """

    def __init__(self, head: RequestHead, max_receive_message_length: int) -> None:
        self._head = head
        self.initial_metadata: list[tuple[str, str | bytes]] | None = None  # once the response has begun
        self.trailing_metadata: list[tuple[str, str | bytes]] | None = None  # once the call has ended
        self.status: int | None = None  # once the call has ended
        self.stream = StreamInfo()  # exchanges count bytes for their request's stream
        self._error: GrpcError | None = None
        self._cluster: Cluster | None = None
        self._host: Host | None = None
        self._pool: Pool | None = None
        self._exchange: Exchange | None = None
        self._unsent: list[bytes] = []  # until there is a connection
        self._unsent_size = 0
        self._full = True  # no more is taken at present
        self._done_writing = False
        self._decoder = grpc.MessageDecoder(max_receive_message_length)
        self._messages: deque[bytes] = deque()
        self._unread = 0  # bytes of them
        self._paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._started = 0.0

    # -- the call

    def start(self, cluster: Cluster | None, name: str, timeout: float | None) -> None:
        """Choose a host of `cluster` and ask for a connection."""
        if cluster is None:
            self._end(GrpcError(grpc.UNAVAILABLE, f"there is no cluster {name!r}"))
            return
        self._cluster = cluster
        self._started = cluster.context.clock()
        host = cluster.pick(LbContext() if cluster.needs_context else None)
        if host is None:
            cluster.stats.upstream_cx_none_healthy.n += 1
            cluster.stats.charge(503, internal=True)
            self._end(GrpcError(grpc.UNAVAILABLE, "no healthy upstream"))
            return
        if timeout is not None:
            self._deadline = asyncio.get_running_loop().call_later(timeout, self._timed_out)
        self._host = host
        pool = self._pool = cluster.pool_for(host, 0, self._head)
        exchange = pool.acquire(self)
        if exchange is not None:
            self.on_connected(exchange)

    async def send(self, message: bytes, *, done: bool = False) -> None:
        """Send a message; waits while the server does not take what was sent before. `done`: it is the last one."""
        assert not self._done_writing, "the call was told that there is nothing more"
        data = grpc.frame(message)
        while self._full and (self._exchange is not None or self._unsent_size >= _SEND_HIGH) and self.status is None:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self._raise_if_over()
        self._done_writing = done
        if self._exchange is None:
            self._unsent.append(data)
            self._unsent_size += len(data)
        else:
            self._exchange.send_data(data, done)

    async def done_writing(self) -> None:
        """There is nothing more to send."""
        if not self._done_writing and self.status is None:
            self._done_writing = True
            if self._exchange is not None:
                self._exchange.send_data(b"", True)

    async def read(self) -> bytes | None:
        """The next message; None when the server has ended the call, and well."""
        while not self._messages:
            if self.status is not None:
                self._raise_error()
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self._messages.popleft()
        self._unread -= len(message)
        if self._paused and self._unread <= _READ_LOW:
            self._paused = False
            if self._exchange is not None:
                self._exchange.resume_reading()
        return message

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        message = await self.read()
        if message is None:
            raise StopAsyncIteration
        return message

    def cancel(self) -> None:
        """Give the call up, unless it is over. Messages that have come can still be read."""
        if self.status is None:
            self._give_up()
            self._end(GrpcError(grpc.CANCELLED, "the call was cancelled"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    # -- the pool's and the exchange's calls: see `upstream.pool`

    def on_connected(self, exchange: Exchange) -> None:
        """There is a connection: send what is here."""
        self._exchange = exchange
        self._full = False
        unsent, self._unsent = self._unsent, []
        self._unsent_size = 0
        exchange.send_head(self._head, unsent, ended=self._done_writing, trailers=None, upgrade=None)
        if not self._full:
            self._wake_writer()

    def on_pool_failure(self, reason: str, failure: str | None) -> None:
        """There is none, and will be none."""
        self._fail_before_response(reason, failure or "")

    def on_response_whole(self, known: KnownResponse, body: bytes) -> None:
        """All at once, from HTTP/1."""
        self.on_response_headers(ResponseHead(known.status, known.items.copy()), not body)
        if body and self.status is None:
            self.on_response_data(body, True)

    def on_response_headers(self, head: ResponseHead, end_stream: bool) -> None:
        """The response begins."""
        if head.status < 200:
            return
        assert self._cluster is not None
        assert self._host is not None
        status = grpc.status_of(head)
        if self._cluster.outlier is not None:
            self._cluster.outlier.result(self._host, head.status if status is None else grpc.http_of_status(status))
        self._cluster.stats.charge(head.status, internal=True)
        self.initial_metadata = [] if end_stream else decode_metadata(head)
        if head.status != 200:
            # As the mapping of HTTP statuses asks: a status of the server's own goes before.
            if end_stream and status is not None:
                self._end_with(head)
                return
            error = GrpcError(grpc.status_of_http(head.status), f"the server answered with HTTP status {head.status}")
            if end_stream and self._done_writing:
                self._end_with(None, error)
            else:
                self._abandon(error)
        elif end_stream:
            self._end_with(head)

    def on_response_data(self, data: bytes, end_stream: bool) -> None:
        """More of the response."""
        if self.status is not None:
            return
        try:
            for flags, message in self._decoder.feed(data):
                if flags:
                    raise grpc.FramingError(grpc.INTERNAL, "the server sent a compressed message, which nobody asked for")
                self._messages.append(message)
                self._unread += len(message)
        except grpc.FramingError as error:
            self._abandon(GrpcError(error.status, str(error)))
            return
        if end_stream:
            self._end_with(None)
            return
        if self._messages:
            self._wake_reader()
        if self._unread > _READ_HIGH and not self._paused and self._exchange is not None:
            self._paused = True
            self._exchange.pause_reading()

    def on_response_trailers(self, trailers: Headers) -> None:
        """The response's end, and what became of the call."""
        if self.status is None:
            self._end_with(trailers)

    def on_upstream_reset(self, reason: str, details: str) -> None:
        """The connection broke, or the stream was reset."""
        self._exchange = None
        if self.initial_metadata is None:
            self._fail_before_response(reason, details)
        elif self.status is None:
            self._end(GrpcError(grpc.INTERNAL, f"the response ended early: {reason}"))

    def on_upstream_done_early(self) -> None:
        """The response is complete, and nothing more can be sent."""
        self._exchange = None

    def on_upstream_writable(self, writable: bool) -> None:
        """Whether the server takes more."""
        self._full = not writable
        if writable:
            self._wake_writer()

    def on_read_end(self) -> None:
        """Everything that has come was handed over already."""

    # -- the end

    def _end_with(self, trailers: Headers | None, error: GrpcError | None = None) -> None:
        """The server has ended the call, with a status in `trailers`, or with one of HTTP alone, which is the `error`."""
        assert self._cluster is not None
        exchange = self._exchange
        if exchange is not None and self._done_writing:
            # Else the exchange itself ends what is still to be sent.
            self._exchange = None
            exchange.let_go()
        self._cluster.stats.charge_time((self._cluster.context.clock() - self._started) * 1000, internal=True)
        status = grpc.status_of(trailers)
        assert self._host is not None
        if status is not None and grpc.http_of_status(status) < 500:
            self._host.rq_success += 1
        else:
            self._host.rq_error += 1
        if error is not None:
            self._end(error)
            return
        if status == grpc.OK and self._decoder.between:
            self.trailing_metadata = decode_metadata(trailers)
            self._end(None)
            return
        if status == grpc.OK:
            self._end(GrpcError(grpc.INTERNAL, "the response ended in the middle of a message"))
        elif status is None or status == grpc.INVALID:
            self._end(GrpcError(grpc.UNKNOWN, "the response ended without a status"))
        else:
            assert trailers is not None
            text = grpc.decode_message(trailers.get(b"grpc-message") or b"").decode("utf-8", "replace")
            details = _decode_binary(trailers.get(b"grpc-status-details-bin") or b"")
            self._end(GrpcError(status, text, details_bin=details, trailing_metadata=decode_metadata(trailers)))

    def _fail_before_response(self, reason: str, details: str) -> None:
        assert self._cluster is not None
        self._count_failure(503, None if reason == "overflow" else "reset" if self.stream.upstream_bytes_sent else "connect_failed")
        suffix = f" ({details})" if details else ""
        self._end(GrpcError(grpc.UNAVAILABLE, f"upstream connect error or disconnect/reset before headers. reset reason: {reason}{suffix}"))

    def _timed_out(self) -> None:
        assert self._cluster is not None
        self._deadline = None
        self._cluster.stats.upstream_rq_timeout.n += 1
        if self.initial_metadata is None:
            self._count_failure(504, "timeout")
        self._abandon(GrpcError(grpc.DEADLINE_EXCEEDED, "the call took longer than its timeout"))

    def _count_failure(self, status: int, kind: str | None) -> None:
        """Count a call without an answer: as an HTTP status for the cluster, and as an event of outlier detection."""
        cluster, host = self._cluster, self._host
        assert cluster is not None
        assert host is not None
        cluster.stats.charge(status, internal=True)
        host.rq_error += 1
        if cluster.outlier is not None and kind is not None:
            cluster.outlier.local_failure(host, kind)

    def _abandon(self, error: GrpcError) -> None:
        """Fail a call that the server has not ended."""
        self._give_up()
        self._end(error)

    def _give_up(self) -> None:
        exchange = self._exchange
        if exchange is not None:
            self._exchange = None
            exchange.abort()
        elif self._pool is not None and self.initial_metadata is None:
            self._pool.cancel(self)

    def _end(self, error: GrpcError | None) -> None:
        self._error = error
        self.status = grpc.OK if error is None else error.status
        if self.trailing_metadata is None:
            self.trailing_metadata = [] if error is None else error.trailing_metadata
        self._unsent = []
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._wake_reader()
        self._wake_writer()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _raise_if_over(self) -> None:
        if self.status is not None:
            self._raise_error()
            raise GrpcError(grpc.OK, "the server has ended the call")

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _wake_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.done():
            writer.set_result(None)

    def __repr__(self) -> str:
        state = "ended" if self.status is not None else "responding" if self.initial_metadata is not None else "waiting"
        return f"<GrpcStream {self._head.path.decode('latin-1')} {state} unread={len(self._messages)}>"


def decode_metadata(headers: Headers | None) -> list[tuple[str, str | bytes]]:
    """Header fields as metadata: without those of gRPC itself, and with binary values as bytes."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers or ():
        if name.startswith(b"grpc-") or name == b"content-type":
            continue
        if not name.endswith(b"-bin"):
            found.append((name.decode("latin-1"), value.decode("latin-1")))
            continue
        # Several values may have been joined by commas on the way.
        found += ((name.decode("latin-1"), _decode_binary(part)) for part in value.split(b","))
    return found


def _decode_binary(value: bytes) -> bytes:
    """Base64, with padding or without; nothing when it is neither."""
    try:
        return binascii.a2b_base64(value + b"=" * (-len(value) % 4))
    except binascii.Error:
        return b""
