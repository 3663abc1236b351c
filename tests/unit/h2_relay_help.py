"""Two sessions in a row, as in a proxy: what comes on a stream of one goes on to a stream of the other. Without sockets; peers are bytes."""

from __future__ import annotations

from typing import Any

from meshproxy.codec.h2 import frames
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.relay import Relay
from meshproxy.codec.h2.session import Session
from meshproxy.codec.h2.settings import Options
from meshproxy.codec.h2.stream import Http2Stream
from meshproxy.codec.headers import Headers
from meshproxy.codec.hpack.encoder import Encoder
from meshproxy.observe.http2_stats import Http2Stats
from meshproxy.observe.stats import Store

POST = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]
OK = [(b":status", b"200")]


class Linked(Http2Stream):
    """A stream that hands everything on to `other`. `log`: what its owner heard; `passed`: bytes of data that have gone on; `heard_at`: when, last."""

    other: Linked

    def __init__(self, row: Row, session: Session) -> None:
        super().__init__(session)
        self.row = row
        self.log: list[Any] = []
        self.passed = 0
        self.heard_at = 0.0

    def on_data(self, data: bytes, end_stream: bool) -> None:
        if self.relay is not None:
            self.log.append("general")
            self.relay.send(data)
        else:
            self.on_relayed(len(data), self.row.now)
            self.other.send_data(data, end_stream)

    def on_relayed(self, size: int, now: float) -> None:
        self.passed += size
        self.heard_at = max(self.heard_at, now)

    def on_trailers(self, trailers: Headers) -> None:
        self.other.send_trailers(trailers.items)

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        self.row.events.append(("reset", self.id, code, details, remote))
        self.other.reset(code)

    def on_writable(self, writable: bool) -> None:
        self.row.events.append(("writable", self.id, writable))
        if writable:
            self.other.resume()
        else:
            self.other.pause()

    def on_done(self) -> None:
        self.row.events.append(("done", self.id))


class Side:
    """One of the two sessions, and its peer's encoder."""

    def __init__(self, row: Row, *, client: bool, options: dict[str, Any]) -> None:
        self.row = row
        self.outputs = 0  # how often there was something to be sent where there was nothing
        self.session = Session(self, Options(stats=Http2Stats(Store().scope("http2.")), **options), client=client)
        self.session.start()
        self.encoder = Encoder()
        self.error: int | None = None

    def new_stream(self) -> Linked:
        return Linked(self.row, self.session)

    def on_output(self) -> None:
        self.outputs += 1

    def on_settings(self) -> None: ...

    def on_goaway(self, last_id: int, code: int) -> None:
        self.row.events.append(("goaway", last_id, code))

    def on_ping_ack(self, data: bytes) -> None: ...

    def feed(self, data: bytes) -> None:
        """What the peer sends. After an error of the connection nothing more is read, and its streams are over."""
        if self.error is not None or not data:
            return
        try:
            self.session.feed(data)
        except Http2Error as error:
            self.error = error.code
            streams = self.session.streams
            while streams:
                _, stream = streams.popitem()
                stream.local_closed = stream.remote_closed = True
                stream.drop_queue()
                stream.other.reset(2)

    def take(self) -> bytes:
        """What the peer gets."""
        session = self.session
        data = b"".join(session.take_parts()) if session.apart else session.take()
        if session.writable:
            session.drained()
        return data


class Row:
    """Streams 1, 3, 5 ... of a downstream connection, which go on to those of an upstream one in the other order. `relays`: by relays, else the general way."""

    def __init__(self, count: int, *, relays: bool = True, downstream: dict[str, Any] | None = None, upstream: dict[str, Any] | None = None) -> None:
        self.now = 0.0
        self.events: list[tuple[Any, ...]] = []
        self.down = Side(self, client=False, options=downstream or {})
        self.up = Side(self, client=True, options=upstream or {})
        self.down.feed(frames.PREFACE + frames.encode_settings([]))
        self.up.feed(frames.encode_settings([]))
        for position in range(count):
            self.down.feed(frames.encode(frames.HEADERS, frames.END_HEADERS, 2 * position + 1, self.down.encoder.encode(self.head(position))))
        self.requests: list[Linked] = [self.down.session.streams[2 * position + 1] for position in range(count)]
        self.responses: list[Linked] = []
        for request in reversed(self.requests):
            response = self.up.new_stream()
            self.up.session.open(response)
            response.send_headers(POST, False)
            request.other, response.other = response, request
            self.responses.insert(0, response)
        for response in self.responses:
            self.up.feed(frames.encode(frames.HEADERS, frames.END_HEADERS, response.id, self.up.encoder.encode(OK)))
            response.other.send_headers(OK, False)
            if relays:
                Relay(response.other, response, lambda: self.now)
                Relay(response, response.other, lambda: self.now)
        self.take()

    @staticmethod
    def head(position: int) -> list[tuple[bytes, bytes]]:
        """Of the request: one in three says how long it is."""
        return [*POST, (b"content-length", b"3000")] if position % 3 == 2 else POST

    def take(self) -> tuple[bytes, bytes]:
        """What both peers get."""
        return self.down.take(), self.up.take()

    def state(self) -> list[Any]:
        """Everything that must not depend on the way that data takes."""
        found: list[Any] = [self.events, self.down.error, self.up.error]
        for side in (self.down, self.up):
            session = side.session
            found.append((session.send_window, session._consumed, session._withheld, session.data_frames, session._empty_frames, session.pending_bytes.n))
            found.append((sorted(session.streams), sorted(session.blocked), session.stats.outbound_flood.n))
        for stream in (*self.requests, *self.responses):
            stream.settle_relays()
            found.append((stream.id, stream.passed, stream.heard_at, stream.send_window, stream.received, stream.left, stream.unconsumed, stream.queued))
        return found


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    """A frame of DATA."""
    return frames.encode(frames.DATA, flags, stream, payload)
