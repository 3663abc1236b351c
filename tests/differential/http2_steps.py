"""Steps of scripts that speak HTTP/2, for the client and for the streams of an upstream.

A step's `stream` is by default the current one: of an upstream's script the stream that it answers, of a client's the last one that it has opened.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hpack

from tests.differential import http2_wire as h2
from tests.differential.http2_wire import Fields, Http2End

if TYPE_CHECKING:
    from tests.differential.wire import Script, Signals, Wire


def _end(wire: Wire) -> Http2End:
    assert wire.http2 is not None, "the connection does not speak HTTP/2"
    return wire.http2


@dataclass(frozen=True)
class Hello:
    """Client: preface and SETTINGS (None: no SETTINGS). `show`, `manual`: see http2_wire."""

    settings: dict[int, int] | None = field(default_factory=dict)
    show: tuple[str, ...] = ()
    manual: tuple[str, ...] = ()

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.http2 = Http2End(wire, client=True)
        wire.http2.show |= set(self.show)
        wire.http2.manual |= set(self.manual)
        wire.http2.begin(self.settings)
        wire.http2.read()


@dataclass(frozen=True)
class Open:
    """Client: HEADERS on a new stream, which becomes the current one. `split`: in frames of so many bytes; `block`: these bytes for a header block; `literal`:
    names of fields that go into no table.
    """

    fields: Fields
    end: bool = True
    stream: int | None = None
    split: int = 0
    block: bytes | None = None
    literal: frozenset[str] = frozenset()

    async def run(self, wire: Wire, signals: Signals) -> None:
        end = _end(wire)
        wire.current = self.stream or end.next_id
        end.opened(wire.current)
        end.headers(wire.current, self.fields, end=self.end, split=self.split, block=self.block, literal=self.literal)


@dataclass(frozen=True)
class Headers:
    """HEADERS on the current stream. `literal`: as in `Open`."""

    fields: Fields
    end: bool = False
    stream: int | None = None
    split: int = 0
    literal: frozenset[str] = frozenset()

    async def run(self, wire: Wire, signals: Signals) -> None:
        _end(wire).headers(self.stream or wire.current, self.fields, end=self.end, split=self.split, literal=self.literal)


@dataclass(frozen=True)
class Data:
    """One DATA frame, whatever the peer's windows say."""

    data: bytes = b""
    end: bool = False
    stream: int | None = None
    padding: int | None = None

    async def run(self, wire: Wire, signals: Signals) -> None:
        _end(wire).data(self.stream or wire.current, self.data, end=self.end, padding=self.padding)

    def __repr__(self) -> str:
        return f"Data({len(self.data)} bytes, end={self.end})"


@dataclass(frozen=True)
class Body:
    """DATA frames as the peer's windows allow."""

    data: bytes
    end: bool = True
    stream: int | None = None

    async def run(self, wire: Wire, signals: Signals) -> None:
        await _end(wire).body(self.stream or wire.current, self.data, end=self.end)

    def __repr__(self) -> str:
        return f"Body({len(self.data)} bytes, end={self.end})"


@dataclass(frozen=True)
class Frame:
    """Any frame. `times`: again and again, in one write."""

    type: int
    flags: int = 0
    stream: int = 0
    payload: bytes = b""
    length: int | None = None
    times: int = 1

    async def run(self, wire: Wire, signals: Signals) -> None:
        end = _end(wire)
        if self.type == h2.HEADERS and end.client:
            end.opened(self.stream & 0x7FFFFFFF)
        wire.send(h2.frame(self.type, self.flags, self.stream, self.payload, length=self.length) * self.times)


@dataclass(frozen=True)
class Metadata:
    """METADATA frames on the current stream: one map. `split`: in frames of so many bytes; `block`: these bytes for it; `end`: whether it ends."""

    fields: Fields = ()
    stream: int | None = None
    split: int = 0
    block: bytes | None = None
    end: bool = True

    async def run(self, wire: Wire, signals: Signals) -> None:
        block = self.block
        if block is None:  # nothing that depends on what came before
            block = hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.fields])
        pieces = [block[at : at + self.split] for at in range(0, len(block), self.split)] if self.split else [block]
        for number, piece in enumerate(pieces, 1):
            flags = h2.END_METADATA if self.end and number == len(pieces) else 0
            wire.send(h2.frame(h2.METADATA, flags, wire.current if self.stream is None else self.stream, piece))

    def __repr__(self) -> str:
        return f"Metadata({len(list(self.fields))} fields, stream={self.stream})"


@dataclass(frozen=True)
class Rst:
    """RST_STREAM on the current stream."""

    code: int = h2.CANCEL
    stream: int | None = None

    async def run(self, wire: Wire, signals: Signals) -> None:
        stream = self.stream or wire.current
        wire.send(h2.frame(h2.RST_STREAM, 0, stream, struct.pack(">I", self.code)))


@dataclass(frozen=True)
class Update:
    """WINDOW_UPDATE on the connection (`stream` 0) or a stream (None: the current one)."""

    increment: int
    stream: int | None = 0

    async def run(self, wire: Wire, signals: Signals) -> None:
        stream = wire.current if self.stream is None else self.stream
        wire.send(h2.frame(h2.WINDOW_UPDATE, 0, stream, struct.pack(">I", self.increment)))


@dataclass(frozen=True)
class GoAway:
    """GOAWAY."""

    last: int = 0
    code: int = h2.NO_ERROR

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.send(h2.frame(h2.GOAWAY, 0, 0, struct.pack(">II", self.last, self.code)))


@dataclass(frozen=True)
class Settings:
    """SETTINGS."""

    settings: dict[int, int]

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.send(h2.frame(h2.SETTINGS, 0, 0, h2.settings(self.settings)))


@dataclass(frozen=True)
class Show:
    """What of the connection is compared besides GOAWAY, and what is not answered by itself from now on."""

    show: tuple[str, ...] = ()
    manual: tuple[str, ...] = ()

    async def run(self, wire: Wire, signals: Signals) -> None:
        _end(wire).show |= set(self.show)
        _end(wire).manual |= set(self.manual)


@dataclass(frozen=True)
class Ended:
    """Wait until these streams (default: the current one) have ended or been reset from the other side."""

    streams: tuple[int, ...] = ()

    def __init__(self, *streams: int) -> None:
        object.__setattr__(self, "streams", streams)

    async def run(self, wire: Wire, signals: Signals) -> None:
        end = _end(wire)
        streams = [end.stream(number) for number in self.streams or (wire.current,)]
        await wire.until(lambda: all(seen.ended for seen in streams) or end.garbage)


@dataclass(frozen=True)
class Heard:
    """Wait until so many frames of a kind have come in all: kinds as in http2_wire (headers, data, rst_stream, goaway, ping_ack, settings_ack, ...)."""

    kind: str
    count: int = 1

    async def run(self, wire: Wire, signals: Signals) -> None:
        end = _end(wire)
        await wire.until(lambda: end.counts.get(self.kind, 0) >= self.count or end.garbage)


@dataclass(frozen=True)
class Got:
    """Wait until the current stream has had so many bytes of data, or these."""

    what: bytes | int
    stream: int | None = None

    async def run(self, wire: Wire, signals: Signals) -> None:
        seen = _end(wire).stream(self.stream or wire.current)
        await wire.until(lambda: (len(seen.data) >= self.what if isinstance(self.what, int) else self.what in seen.data) or seen.ended)


@dataclass(frozen=True)
class Sync:
    """Wait until the peer has seen all that was sent, by a PING; or until it has ended the connection."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        end = _end(wire)
        before = end.counts.get("ping_ack", 0)
        wire.send(h2.frame(h2.PING, 0, 0, b"__sync__"))
        await wire.until(lambda: end.counts.get("ping_ack", 0) > before)


@dataclass(frozen=True)
class EchoData:
    """Upstream or client of a tunnel: send back the stream's data as it comes, to its end; then end too."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        end = _end(wire)
        seen, sent = end.stream(wire.current), 0

        def more() -> bool:
            return len(seen.data) > sent or seen.ended

        while True:
            await wire.until(more)
            piece, sent = bytes(seen.data[sent:]), len(seen.data)
            if wire.end or any(kind == "rst_stream" for kind, _ in seen.events):
                return
            ended = seen.ended
            if piece or ended:
                await end.body(wire.current, piece, end=ended)
            if ended:
                return


class StreamWire:
    """A wire as the script of one of its streams sees it."""

    def __init__(self, wire: Wire, stream: int) -> None:
        self.wire = wire
        self.current = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wire, name)


# ---- shorthand -----------------------------------------------------------------------------------------------------------------------------------------


def lines(*headers: str) -> list[tuple[str, str]]:
    """ "name: value" lines -> fields. A pseudo header is written with its colon (":path: /")."""
    fields = []
    for header in headers:
        name, _, value = header[1:].partition(":")
        fields.append((header[0] + name, value.removeprefix(" ")))
    return fields


def head(method: str = "GET", path: str | None = "/", *headers: str, authority: str | None = "a.test", scheme: str | None = "http") -> list[tuple[str, str]]:
    """A request head; None leaves a pseudo header out."""
    pseudo = ((":method", method), (":scheme", scheme), (":authority", authority), (":path", path))
    return [(name, value) for name, value in pseudo if value is not None] + lines(*headers)


def ask(method: str = "GET", path: str | None = "/", *headers: str, body: bytes | None = None, trailers: tuple[str, ...] = (), **fields: Any) -> Script:
    """Client: a request on a stream of its own, and its whole answer."""
    steps: Script = [Open(head(method, path, *headers, **fields), end=body is None and not trailers)]
    if body is not None:
        steps.append(Body(body, end=not trailers))
    if trailers:
        steps.append(Headers(lines(*trailers), end=True))
    return [*steps, Ended()]


def reply(status: int = 200, *headers: str, body: bytes | None = b"ok", trailers: tuple[str, ...] = (), literal: frozenset[str] = frozenset()) -> Script:
    """Upstream: an answer, without content-length."""
    steps: Script = [Headers([(":status", str(status)), *lines(*headers)], end=body is None and not trailers, literal=literal)]
    if body is not None:
        steps.append(Body(body, end=not trailers))
    if trailers:
        steps.append(Headers(lines(*trailers), end=True))
    return steps


def message(data: bytes = b"hello") -> bytes:
    """A gRPC message: not compressed, with its length."""
    return b"\0" + struct.pack(">I", len(data)) + data
