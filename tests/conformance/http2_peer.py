"""A codec/h2 session with an owner that behaves, and the frames that it answers with. Frames of the other side are written and read without codec/h2."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import hpack

from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.session import Session
from meshproxy.codec.h2.settings import Options
from meshproxy.codec.h2.stream import Http2Stream
from meshproxy.codec.headers import Headers
from meshproxy.observe.http2_stats import Http2Stats
from meshproxy.observe.stats import Store
from tests.differential import http2_wire as h2

BODY = b"hello, world"
GET = [(":method", "GET"), (":scheme", "http"), (":authority", "a.test"), (":path", "/")]
POST = [(":method", "POST"), *GET[1:]]


def block(fields: Iterable[tuple[str, str]] = GET) -> bytes:
    """A header block that needs no state."""
    return b"".join(literal(name.encode(), value.encode()) for name, value in fields)


def literal(name: bytes, value: bytes) -> bytes:
    """A field that is not indexed; both are shorter than 127 bytes."""
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


def headers(stream: int = 1, fields: Iterable[tuple[str, str]] = GET, *, end: bool = True, flags: int = h2.END_HEADERS, extra: bytes = b"") -> bytes:
    """HEADERS, whole unless `flags` say otherwise; `extra` bytes after the block."""
    return h2.frame(h2.HEADERS, flags | (h2.END_STREAM if end else 0), stream, block(fields) + extra)


def data(stream: int = 1, payload: bytes = b"test", *, end: bool = True) -> bytes:
    return h2.frame(h2.DATA, h2.END_STREAM if end else 0, stream, payload)


def settings(values: dict[int, int]) -> bytes:
    return h2.frame(h2.SETTINGS, 0, 0, h2.settings(values))


def reset(stream: int = 1, code: int = h2.CANCEL) -> bytes:
    return h2.frame(h2.RST_STREAM, 0, stream, struct.pack(">I", code))


def update(stream: int, increment: int) -> bytes:
    return h2.frame(h2.WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def priority(stream: int, on: int = 0, weight: int = 15, *, exclusive: bool = False) -> bytes:
    return h2.frame(h2.PRIORITY, 0, stream, struct.pack(">IB", on | (exclusive << 31), weight))


def continuation(stream: int = 1, payload: bytes = b"", *, end: bool = True) -> bytes:
    return h2.frame(h2.CONTINUATION, h2.END_HEADERS if end else 0, stream, payload)


PING = h2.frame(h2.PING, 0, 0, b"12345678")


@dataclass
class Owned:
    """What a session told the owner of one stream."""

    head: list[tuple[bytes, bytes]] = field(default_factory=list)
    heads: int = 0
    data: bytes = b""
    trailers: list[tuple[bytes, bytes]] | None = None
    ended: bool = False
    reset: tuple[int, str, bool] | None = None
    done: bool = False


class _Stream(Http2Stream):
    """Owned by an `End`."""

    def __init__(self, session: Session, end: End) -> None:
        super().__init__(session)
        self.owner = end
        self.seen = Owned()

    def on_head(self, known: Any, end_stream: bool) -> None:
        self.owner.owned[self.id] = self.seen
        head = known.head()
        self.seen.head = list(head.items)
        self.seen.heads += 1
        self._ended(end_stream)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        self.seen.data += data
        self._ended(end_stream)

    def on_trailers(self, trailers: Headers) -> None:
        self.seen.trailers = list(trailers.items)
        self._ended(True)

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        assert self.seen.reset is None, "reset twice"
        self.owner.owned[self.id] = self.seen
        self.seen.reset = (code, details, remote)

    def on_done(self) -> None:
        self.seen.done = True

    def _ended(self, end_stream: bool) -> None:
        assert not self.seen.ended, "something after the end"
        assert self.seen.reset is None, "something after the reset"
        if end_stream:
            self.seen.ended = True
            self.owner.whole(self)


@dataclass
class Frame:
    """One frame that a session has sent; `fields` of a header block that is in one frame."""

    type: int
    flags: int
    stream: int
    payload: bytes
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def code(self) -> str:
        """Of RST_STREAM and GOAWAY."""
        return h2.error_name(int.from_bytes(self.payload[:4] if self.type == h2.RST_STREAM else self.payload[4:8]))


class End:
    """A session and its owner: as server it answers whole requests with BODY (`answers`), as client it opens `requests` streams by a GET each."""

    def __init__(self, *, client: bool = False, answers: bool = True, requests: int = 1, **options: Any) -> None:
        self.owned: dict[int, Owned] = {}
        self.frames: list[Frame] = []
        self.error: Http2Error | None = None
        self.acked: list[bytes] = []
        self.answers = answers and not client
        self.stats = Http2Stats(Store().scope("http2."))
        self.session = Session(self, Options(stats=self.stats, **options), client=client)
        self._sent = b""
        self._decoder = hpack.Decoder()
        self._preface = len(h2.PREFACE) if client else 0
        self.session.start()
        if client:
            for _ in range(requests):
                stream = self.new_stream()
                self.session.open(stream)
                self.owned[stream.id] = stream.seen
                stream.send_headers([(name.encode(), value.encode()) for name, value in GET], True)
        self._take()

    # -- the session's sink

    def new_stream(self) -> _Stream:
        return _Stream(self.session, self)

    def on_output(self) -> None:
        """Taken after each `feed`."""

    def on_settings(self) -> None:
        """Nothing to do."""

    def on_goaway(self, last_id: int, code: int) -> None:
        """Nothing to do."""

    def on_ping_ack(self, data: bytes) -> None:
        self.acked.append(data)

    def whole(self, stream: _Stream) -> None:
        """A message has ended."""
        if self.answers:
            stream.send_headers([(b":status", b"200"), (b"content-length", b"%d" % len(BODY))], False)
            stream.send_data(BODY, True)

    # -- the peer

    def feed(self, *pieces: bytes, split: bool = False) -> End:
        """Hand over what comes from the peer: piece by piece, or byte by byte."""
        for piece in pieces:
            for part in [piece[at : at + 1] for at in range(len(piece))] if split else [piece]:
                if self.error is None:
                    try:
                        self.session.feed(part)
                    except Http2Error as error:
                        self.error = error
                    self._take()
        return self

    def _take(self) -> None:
        try:
            self._sent += self.session.take()
        except Http2Error as error:
            self.error = error
        self.session.drained()
        if self._preface:
            assert self._sent.startswith(h2.PREFACE)
            self._sent = self._sent[self._preface :]
            self._preface = 0
        while self._sent:
            length = int.from_bytes(self._sent[:3])
            type_, flags, stream = struct.unpack(">BBI", self._sent[3:9])
            frame = Frame(type_, flags, stream, self._sent[9 : 9 + length])
            assert len(frame.payload) == length
            if type_ == h2.HEADERS and flags & h2.END_HEADERS:
                frame.fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(frame.payload, raw=True)]
            self.frames.append(frame)
            self._sent = self._sent[9 + length :]

    # -- what came back

    def of(self, type_: int, stream: int | None = None) -> list[Frame]:
        """The frames of a type, and of a stream if one is given."""
        return [frame for frame in self.frames if frame.type == type_ and stream in (None, frame.stream)]

    def answered(self, stream: int) -> bool:
        """Whether the stream has had a whole answer."""
        heads = self.of(h2.HEADERS, stream)
        body = self.of(h2.DATA, stream)
        return bool(heads) and (b":status", b"200") in heads[0].fields and b"".join(f.payload for f in body) == BODY and bool(body[-1].flags & h2.END_STREAM)

    def acknowledged(self) -> int:
        """How many of the peer's SETTINGS were."""
        return sum(1 for frame in self.of(h2.SETTINGS) if frame.flags & h2.ACK)

    def alive(self) -> bool:
        """Whether the connection still works: a PING is answered."""
        before = len(self.of(h2.PING))
        self.feed(PING)
        return self.error is None and len(self.of(h2.PING)) == before + 1 and not self.of(h2.GOAWAY)
