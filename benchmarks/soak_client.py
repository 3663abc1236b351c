"""Clients of a soak test: many kinds of requests over HTTP/2 connections that come and go, each request followed until it is answered in full.

What a client does to itself is not held against the proxy: streams that it resets, and streams under way on a connection that it closes. Everything else
has to be answered exactly once and completely, or it is lost.
"""

from __future__ import annotations

import select
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from time import monotonic

import hpack

from benchmarks import h2_frames
from benchmarks.backend import BODY
from benchmarks.h2_frames import ACK, CANCEL, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, NO_ERROR, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, frame
from benchmarks.load import ELEVEN, STREAMING, UNARY, Load
from meshproxy.codec.hpack.decoder import Decoder  # the `hpack` package would need the whole core

STREAMS = 16  # at once on a connection
CONNECTIONS = 8
_LIFE = (500, 4000)  # requests of a connection
_ABRUPT = 0.5  # of the connections end with requests under way
_RESET = 0.03  # of the requests are reset by the client
_CHUNK = 1 << 18
_FRAME = 16384
_POLL_S = 0.002
_STALL_S = 30.0  # without any answer, with requests under way


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request. `unique`: path and ids never come twice. `messages` of `size` bytes go there and back, one after the other; 0: a plain request."""

    load: Load
    weight: int
    unique: bool = False
    messages: int = 0
    size: int = 0


KINDS = (
    Kind(ELEVEN, 35),
    Kind(ELEVEN, 25, unique=True),
    Kind(UNARY, 25, messages=1, size=128),
    Kind(UNARY, 5, messages=1, size=48 << 10),
    Kind(STREAMING, 10, messages=20, size=1024),
)


@dataclass(slots=True)
class Tally:
    """What has become of the requests. `lost`: reason -> how many."""

    started: int = 0
    answered: int = 0
    messages: int = 0
    reset: int = 0
    abandoned: int = 0
    connections: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    def under_way(self) -> int:
        """Requests that are still to be answered."""
        return self.started - self.answered - self.reset - self.abandoned - self.lost.total()


class _Exchange:
    """One request. `expected`: bytes of the response that are still to come. `left`: messages that are still to be sent."""

    __slots__ = ("cancels", "expected", "grpc", "left", "message", "missing", "status")

    def __init__(self, kind: Kind, message: bytes, *, cancels: bool) -> None:
        self.grpc = bool(kind.messages)
        self.message = message
        self.left = kind.messages
        self.expected = len(message) * kind.messages if self.grpc else len(BODY)
        self.missing = len(message)  # of the message under way
        self.cancels = cancels  # as soon as the response begins
        self.status = ""


def _blocks() -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """The header blocks of each kind for the first requests of a connection, one of each kind in order, and for all that follow.

    Each has two parts, between which and after which the unique fields belong: literals, which change no table. All else is in the table from the second
    time on.
    """
    encoder = hpack.Encoder()
    rounds = []
    for _ in range(2):
        blocks = []
        for kind in KINDS:
            fields = kind.load.fields()
            if kind.unique:
                blocks.append((encoder.encode(fields[:3]), encoder.encode([pair for pair in fields[4:] if pair[0] != "traceparent"])))
            else:
                blocks.append((encoder.encode(fields), b""))
        rounds.append(blocks)
    return rounds[0], rounds[1]


_FIRST, _LATER = _blocks()
_PATH = b"\x04"  # a literal without indexing, whose name is in the static table
_WEIGHTS = [kind.weight for kind in KINDS]
_MESSAGES = [b"\0" + kind.size.to_bytes(4, "big") + b"m" * kind.size if kind.messages else b"" for kind in KINDS]


def _string(value: str) -> bytes:
    return len(value).to_bytes(1, "big") + value.encode()


def _unique_block(parts: tuple[bytes, bytes], number: int) -> bytes:
    path = _PATH + _string(f"/api/orders/{number:012x}?page=1")
    ids = b"\0" + _string("x-request-id") + _string(f"7f1c2d3e-4b5a-4c6d-8e9f-{number:012x}")
    trace = b"\0" + _string("traceparent") + _string(f"00-0af7651916cd43dd8448{number:012x}-b7ad6b7169203331-01")
    return b"".join((parts[0], path, parts[1], ids, trace))


class _Connection:
    """One connection: `life` requests, then it ends, in order or abruptly."""

    def __init__(self, port: int, tally: Tally, random: Random) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=_STALL_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        tally.connections += 1
        self.open: dict[int, _Exchange] = {}
        self.life = random.randint(*_LIFE)
        self.ended = False
        self._abrupt = random.random() < _ABRUPT
        self._tally = tally
        self._random = random
        self._next = 1
        self._begun = 0
        self._reset: set[int] = set()
        self._window = h2_frames.FIRST_WINDOW
        self._reader = h2_frames.Reader()
        self._decoder = Decoder()
        self._out = [h2_frames.PREFACE + h2_frames.hello({})]

    def free(self) -> bool:
        """Whether another request may begin."""
        return self.life > 0 and len(self.open) < STREAMS

    def begin(self) -> None:
        """Another request, of whatever kind."""
        first = self._begun < len(KINDS)
        position = self._begun if first else self._random.choices(range(len(KINDS)), _WEIGHTS)[0]
        message = _MESSAGES[position]
        if len(message) > self._window:
            return  # the proxy has yet to take what it was sent
        self._begun += 1
        self.life -= 1
        self._tally.started += 1
        kind = KINDS[position]
        parts = (_FIRST if first else _LATER)[position]
        block = _unique_block(parts, self._random.getrandbits(48)) if kind.unique else parts[0]
        stream, self._next = self._next, self._next + 2
        self._out.append(frame(HEADERS, END_HEADERS | (0 if message else END_STREAM), stream, block))
        cancelled = self._random.random() < _RESET
        exchange = self.open[stream] = _Exchange(kind, message, cancels=cancelled and self._random.random() < 0.5)
        if message:
            self._send_message(stream, exchange)
        if cancelled and not exchange.cancels:
            self._cancel(stream)

    def _send_message(self, stream: int, exchange: _Exchange) -> None:
        message = exchange.message
        exchange.left -= 1
        exchange.missing = len(message)
        self._window -= len(message)
        for start in range(0, len(message), _FRAME):
            last = not exchange.left and start + _FRAME >= len(message)
            self._out.append(frame(DATA, END_STREAM if last else 0, stream, message[start : start + _FRAME]))

    def _cancel(self, stream: int) -> None:
        del self.open[stream]
        self._reset.add(stream)
        self._tally.reset += 1
        self._out.append(frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big")))

    def flush(self) -> bool:
        """Write what there is; whether all of it is written."""
        data = b"".join(self._out)
        if data:
            try:
                written = self.sock.send(data)
            except BlockingIOError:
                written = 0
            except OSError as error:
                self._fail(f"the connection broke: {error}")
                return True
            self._out = [data[written:]] if written < len(data) else []
        return not self._out

    def end(self) -> None:
        """Its life is over: close it, at once or when everything is answered."""
        if self._abrupt:
            self._tally.abandoned += len(self.open)
            self.open.clear()
        elif self.open:
            return
        else:
            self._out.append(frame(GOAWAY, 0, 0, bytes(4) + NO_ERROR.to_bytes(4, "big")))
            self.flush()
        self.ended = True

    def receive(self) -> None:
        """Read what there is, once."""
        try:
            data = self.sock.recv(_CHUNK)
        except OSError as error:
            self._fail(f"the connection broke: {error}")
            return
        if not data:
            self._fail("the proxy closed a connection")
            return
        for kind, flags, stream, payload in self._reader.frames(data):
            if kind == WINDOW_UPDATE and not stream:
                self._window += int.from_bytes(payload, "big")
            elif kind == SETTINGS and not flags & ACK:
                self._out.append(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self._out.append(frame(PING, ACK, 0, payload))
            elif kind == GOAWAY:
                self._fail(f"GOAWAY {payload[4:8].hex()} {payload[8:].decode(errors='replace')}")
                return
            elif kind in (DATA, HEADERS, RST_STREAM):
                self._on_frame(kind, flags, stream, payload)

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        fields = dict(self._decoder.decode(payload).items) if kind == HEADERS else {}
        exchange = self.open.get(stream)
        if exchange is None:
            # After a whole response, RST_STREAM with NO_ERROR says no more than that the rest of the request is not wanted.
            if stream not in self._reset and (kind != RST_STREAM or payload != bytes(4)):
                self._tally.lost["a frame after the end of its stream: answered twice"] += 1
        elif kind == RST_STREAM:
            self._lose(stream, f"RST_STREAM {int.from_bytes(payload, 'big')}")
        elif exchange.cancels:
            self._cancel(stream)
        else:
            if kind == HEADERS:
                self._on_head(exchange, fields)
            else:
                self._on_data(stream, exchange, payload)
            if flags & END_STREAM:
                self._on_end(stream, exchange)

    @staticmethod
    def _on_head(exchange: _Exchange, fields: dict[bytes, bytes]) -> None:
        status = fields.get(b":status")
        if status is not None and status != b"200":
            exchange.status = f"status {status.decode()}"
        elif fields.get(b"grpc-status", b"0") != b"0":
            exchange.status = f"gRPC status {fields[b'grpc-status'].decode()}: {fields.get(b'grpc-message', b'').decode()}"
        elif b"grpc-status" in fields:
            exchange.grpc = False  # it is no longer missing

    def _on_data(self, stream: int, exchange: _Exchange, data: bytes) -> None:
        if exchange.status:
            exchange.status += f": {data.decode(errors='replace')}"
            return
        exchange.expected -= len(data)
        exchange.missing -= len(data)
        if exchange.left and not exchange.missing:
            self._send_message(stream, exchange)

    def _on_end(self, stream: int, exchange: _Exchange) -> None:
        if exchange.status or exchange.expected or exchange.grpc:
            self._lose(stream, exchange.status or (f"{exchange.expected} bytes are missing" if exchange.expected else "no gRPC status"))
            return
        del self.open[stream]
        self._tally.answered += 1

    def _lose(self, stream: int, reason: str) -> None:
        del self.open[stream]
        self._tally.lost[reason] += 1

    def _fail(self, reason: str) -> None:
        for stream in [*self.open]:
            self._lose(stream, reason)
        self.life = 0
        self.ended = True


class Clients:
    """All connections and their loop."""

    def __init__(self, port: int, seed: int = 1) -> None:
        self.tally = Tally()
        self._port = port
        self._random = Random(seed)
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        for _ in range(CONNECTIONS):
            self._connect()

    def _connect(self) -> None:
        connection = _Connection(self._port, self.tally, self._random)
        self._connections[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock, select.EPOLLIN)

    def run(self, seconds: float, rate: float = float("inf"), every_second: Callable[[], None] = lambda: None) -> None:
        """For so long, so many requests a second, or as many as the proxy takes."""
        start = second = monotonic()
        begun = self.tally.started
        while (now := monotonic()) < start + seconds:
            due = (now - start) * rate - (self.tally.started - begun)
            self._turn(due)
            if now - second >= 1:
                second += 1
                every_second()

    def finish(self) -> None:
        """Begin nothing more, and wait until all is answered: what is not after a while is lost."""
        deadline = monotonic() + _STALL_S
        while self.tally.under_way() and monotonic() < deadline:
            self._turn(0)
        for connection in self._connections.values():
            for _ in connection.open:
                self.tally.lost["never answered"] += 1
            connection.open.clear()
        self.close()

    def close(self) -> None:
        """Close everything at once."""
        for fd, connection in [*self._connections.items()]:
            self._drop(fd, connection)
        self._epoll.close()

    def _turn(self, due: float) -> None:
        for fd, events in self._epoll.poll(_POLL_S):
            if events & ~select.EPOLLOUT:
                self._connections[fd].receive()
        for fd, connection in [*self._connections.items()]:
            while due >= 1 and connection.free():
                connection.begin()
                due -= 1
            if not connection.life and not connection.ended:
                connection.end()
            done = connection.flush()
            if connection.ended:
                self._drop(fd, connection)
                self._connect()
            else:
                self._epoll.modify(fd, select.EPOLLIN if done else select.EPOLLIN | select.EPOLLOUT)

    def _drop(self, fd: int, connection: _Connection) -> None:
        self._epoll.unregister(fd)
        del self._connections[fd]
        connection.sock.close()
