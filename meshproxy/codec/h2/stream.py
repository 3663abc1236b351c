"""One request and its response on an HTTP/2 connection: what is sent, queued and received, and both flow-control windows.

Owners subclass `Http2Stream`, so that there is one object a request, and override the `on_*` methods.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.codec.h2 import frames
from meshproxy.codec.h2.frames import (
    DATA,
    DEFAULT_FRAME_SIZE,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    LARGE,
    heads_of_last_data,
    heads_of_messages,
    heads_of_whole,
    pack_head,
)

if TYPE_CHECKING:
    from meshproxy.codec.h2.fields import KnownTrailers
    from meshproxy.codec.h2.relay import Relay
    from meshproxy.codec.h2.session import Session
    from meshproxy.codec.headers import Pair


class Http2Stream:
    """A stream in the states between `open` and `closed` (RFC 9113 5.1). Made by the owner, put to use by its session.

    Of body data that cannot be sent at once (windows, a slow transport) any amount is queued: `on_writable(False)` says when more than
    `Session.high_watermark` bytes are, and whoever goes on regardless fills memory.
    """

    # What every stream sets or reads is a slot; the rest are defaults of the class, and cost a stream nothing until it needs others.
    __slots__ = ("__dict__", "headed", "id", "left", "local_closed", "queue", "received", "remote_closed", "send_window", "session")

    paused = False
    unconsumed = 0  # bytes that came while it was paused
    bodiless = False  # a client's: the response has no body whatever its length says (HEAD)
    queued = 0
    _queued_end: Any = None  # what comes after the queue: True for END_STREAM, or trailers
    _warned = False
    relay: Relay | None = None  # by which its data goes on to another stream
    feeder: Relay | None = None  # by which another's comes
    metadata: Any = None  # what has come of maps (metadata.Incoming)

    def __init__(self, session: Session) -> None:
        self.session = session
        self.id = 0  # until the session gives it one
        self.local_closed = False  # we have sent END_STREAM, or have queued it, or the stream was reset
        self.remote_closed = False
        self.headed = not session.client  # the peer's final head has come: what opens a server's streams
        self.send_window = session.peer_stream_window
        self.received = 0  # bytes that count against the peer's window
        self.left = -1  # of the body, as its content-length has it; -1: unknown
        self.queue: deque[bytes] | None = None  # data that could not be sent yet; None: everything was sent

    # -- the owner's calls

    def send_headers(self, items: Iterable[Pair], end_stream: bool) -> None:
        """A head, pseudo fields first. Informational ones do not end the stream."""
        if not self.local_closed:
            self.send_block(self.session.encoder.encode(items), end_stream)

    def send_block(self, block: bytes, end_stream: bool) -> None:
        """The same when it is encoded already. The stream must be open."""
        session = self.session
        size = len(block)
        if size <= DEFAULT_FRAME_SIZE:
            out = session.out
            if not out:
                session.sink.on_output()
            out.append(pack_head(size << 8 | HEADERS, END_HEADERS | end_stream, self.id) + block)
        else:
            session.emit_long_block(self.id, block, END_STREAM if end_stream else 0)
        if end_stream:
            self.local_closed = True
            if self.remote_closed:
                session.forget(self)

    def takes(self, size: int) -> bool:
        """HOT: whether so much data would be sent at once, in one frame."""
        session = self.session
        return self.queue is None and size <= self.send_window and size <= session.send_window and size <= DEFAULT_FRAME_SIZE and session.writable

    def send_whole_head(self, before: bytes, value: bytes, after: bytes) -> None:
        """HOT: an encoded head, in three parts, that is all of the message. The stream must be open; a caller that sends last takes it out of its session."""
        session = self.session
        size = len(before) + len(value) + len(after)
        if size > DEFAULT_FRAME_SIZE:
            self.send_block(before + value + after, True)
            return
        out = session.out
        if not out:
            session.sink.on_output()
        # One copy instead of three.
        out.append(b"".join((heads_of_whole[size], self.id.to_bytes(4, "big"), before, value, after)))
        self.local_closed = True

    def send_message(self, before: bytes, value: bytes, after: bytes, data: bytes) -> None:
        """HOT: an encoded head, in three parts, and all of the body: not empty, and no more than `takes` says. As for `send_whole_head`."""
        session = self.session
        head, size = len(before) + len(value) + len(after), len(data)
        if head > DEFAULT_FRAME_SIZE:
            self.send_block(before + value + after, False)
            self.send_data(data, True)
            return
        self.send_window -= size
        session.send_window -= size
        session.data_frames += 1
        out = session.out
        if not out:
            session.sink.on_output()
        stream_id = self.id.to_bytes(4, "big")
        # One copy instead of three.
        out.append(b"".join((heads_of_messages[head], stream_id, before, value, after, heads_of_last_data[size], stream_id, data)))
        self.local_closed = True

    def send_with_trailers(self, block: bytes, data: bytes, trailers: bytes) -> None:
        """HOT: the same with trailers, encoded too; there may be no data."""
        session = self.session
        head, size, tail = len(block), len(data), len(trailers)
        if head > DEFAULT_FRAME_SIZE or tail > DEFAULT_FRAME_SIZE or not size:
            self.send_block(block, False)
            self.send_data(data, False)
            self.send_block(trailers, True)
            return
        self.send_window -= size
        session.send_window -= size
        session.data_frames += 1
        out = session.out
        if not out:
            session.sink.on_output()
        stream_id = self.id
        out.append(
            pack_head(head << 8 | HEADERS, END_HEADERS, stream_id)
            + block
            + pack_head(size << 8, 0, stream_id)  # DATA is 0
            + data
            + pack_head(tail << 8 | HEADERS, END_HEADERS | END_STREAM, stream_id)
            + trailers
        )
        self.local_closed = True
        if self.remote_closed:
            session.forget(self)

    def send_data(self, data: bytes, end_stream: bool) -> None:
        """HOT: body: at once as far as possible, the rest when it is."""
        if self.local_closed:
            return
        session = self.session
        size = len(data)
        if self.queue is None and size <= self.send_window and size <= session.send_window and session.writable:
            if size >= LARGE:
                self._emit_frames(data, end_stream)
            elif size or end_stream:
                out = session.out
                if not out:
                    session.sink.on_output()
                out.append(pack_head(size << 8, end_stream, self.id) + data)  # DATA is 0
                session.data_frames += 1
            self.send_window -= size
            session.send_window -= size
            if end_stream:
                self._end()
            return
        if end_stream:
            self.local_closed = True
            self._queued_end = True
        self._enqueue(data)

    def send_trailers(self, items: Iterable[Pair]) -> None:
        """Trailers, after all data: the message's end. None at all: the end only."""
        if self.local_closed:
            return
        pairs = list(items)
        if not pairs:
            self.send_data(b"", True)
        elif self.queue is None:
            self.send_block(self.session.encoder.encode(pairs), end_stream=True)  # shells have a send_headers of their own
        else:
            self.local_closed = True
            self._queued_end = pairs

    def send_metadata(self, fields: dict[bytes, bytes]) -> None:
        """A map in METADATA frames, at once whatever is queued; dropped where options do not allow it, or our side has ended."""
        session = self.session
        if session.options.allow_metadata and not self.local_closed:
            from meshproxy.codec.h2.metadata import encode  # few have any

            for frame in encode(self.id, fields):
                session.emit(frame)

    def reset(self, code: int) -> None:
        """RST_STREAM; what is queued is dropped and nothing more comes. No-op on a stream that is over, or was never opened."""
        session = self.session
        if session.streams.get(self.id) is self:
            self.local_closed = True
            session.reset_stream(self, code)

    def pause(self) -> None:
        """Grant the peer nothing more: its window is all that it can still send. Idempotent."""
        self.paused = True
        if self.relay is not None:
            self.relay.settle()

    def resume(self) -> None:
        """Grant what was withheld. Idempotent."""
        if self.paused:
            self.paused = False
            self.session.consumed(self)

    @property
    def ungranted(self) -> int:
        """How many bytes can come before there is something to be granted."""
        return (self.session.stream_window - 1 >> 1) - self.received

    # -- the session's calls, for owners to override

    def on_head(self, known: Any, end_stream: bool) -> None:
        """The peer's head; `known`: see `fields.py`. A client's stream hears of informational heads, too."""

    def on_whole(self, known: Any, data: bytes, values: tuple[bytes, ...] | None = None) -> bool:
        """A client's: a final head that is `kept`, and all of the body: the owner takes the stream out of its session, as `Session.forget` would.

        Or it returns False and has done nothing: then they come one by one, by `on_head` and `on_data`. So it has to be where the stream is `bodiless`.
        `values`: where `known` is the shape of the head (codec.response_shape).
        """
        return False

    def on_data(self, data: bytes, end_stream: bool) -> None:
        """Body. Empty only at its end."""

    def on_relayed(self, size: int, now: float) -> None:
        """So much data has gone on by `relay` since the last call; the last of it at the time `now`."""

    def on_trailers(self, trailers: KnownTrailers) -> None:
        """The message's end."""

    def on_metadata(self, fields: dict[bytes, bytes]) -> None:
        """A map, not empty, in METADATA frames; at any time before the peer's end."""

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        """The stream is over: by the peer (`remote`), or because of what it sent, and then it was told so already. Nothing follows."""

    def on_writable(self, writable: bool) -> None:
        """False: more than `Session.high_watermark` bytes are queued; True: less than half of it again."""

    def on_sent(self) -> None:
        """Our side has ended some time after its owner had said so, and the peer's has not."""

    def on_done(self) -> None:
        """Both sides have ended as they should: the session has forgotten the stream. Nothing follows."""

    # -- between stream and session

    def _emit_frames(self, data: bytes, end_stream: bool) -> None:
        """DATA that needs more than one frame, or is better not copied."""
        session = self.session
        most = session.peer_frame_size
        size = len(data)
        if size <= most:
            session.emit(pack_head(size << 8 | DATA, end_stream, self.id))
            session.out.append(data)
            session.apart += 1
            session.data_frames += 1
            return
        view = memoryview(data)
        for start in range(0, size, most):
            part = view[start : start + most]
            last = end_stream and start + most >= size
            session.emit(pack_head(len(part) << 8 | DATA, last, self.id))
            session.out.append(part)
            session.apart += 1
            session.data_frames += 1

    def _enqueue(self, data: bytes) -> None:
        session = self.session
        queue = self.queue
        first = queue is None
        if queue is None:
            queue = self.queue = deque()
        if data:
            queue.append(data)
            self.queued += len(data)
            session.pending_bytes.n += len(data)
        if first:
            # Others that wait do so for windows of their own, or for what this one cannot do without either.
            if session.writable:
                while self.send_some():
                    pass
            if self.queue is not None:
                session.blocked[self.id] = self
        if self.queued > session.high_watermark and not self._warned:
            self._warned = True
            self.on_writable(False)

    def send_some(self) -> bool:
        """One frame of what is queued; False when there is nothing more, or the stream's window is closed."""
        queue = self.queue
        session = self.session
        if queue:
            room = min(self.send_window, session.send_window, session.peer_frame_size)
            if room <= 0:
                return False
            data = queue.popleft()
            while len(data) < room and queue and len(data) + len(queue[0]) <= room:
                data += queue.popleft()
            if len(data) > room:
                queue.appendleft(data[room:])
                data = data[:room]
            size = len(data)
            self.send_window -= size
            session.send_window -= size
            self.queued -= size
            session.pending_bytes.n -= size
            last = not queue and self._queued_end is True
            if size < LARGE:
                session.emit(frames.encode(DATA, int(last), self.id, data))
                session.data_frames += 1
            else:
                self._emit_frames(data, last)
            if queue:
                return True
        else:
            last = False
        self.queue = None
        end, self._queued_end = self._queued_end, None
        if end is True:
            if not last:
                session.emit(pack_head(DATA, END_STREAM, self.id))
            self._end()
        elif end is not None:
            self.send_block(session.encoder.encode(end), True)
        if self.local_closed and not self.remote_closed:
            self.on_sent()
        return False

    def unwarn(self) -> None:
        """Tell the owner when enough of the queue has gone out."""
        if self._warned and self.queued * 2 <= self.session.high_watermark:
            self._warned = False
            self.on_writable(True)

    def drop_queue(self) -> None:
        """The stream is over."""
        self.end_relays()
        if self.queue is not None:
            self.session.pending_bytes.n -= self.queued
            self.queue = self._queued_end = None
            self.queued = 0
            self.session.blocked.pop(self.id, None)

    def settle_relays(self) -> None:
        """Hear by `on_relayed` of all that has gone on so far, in both directions."""
        for relay in (self.relay, self.feeder):
            if relay is not None:
                relay.settle()

    def end_relays(self) -> None:
        """What comes in either direction goes the general way from here on. Idempotent."""
        for relay in (self.relay, self.feeder):
            if relay is not None:
                relay.close()

    def _end(self) -> None:
        self.local_closed = True
        if self.remote_closed:
            self.session.forget(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} local_closed={self.local_closed} remote_closed={self.remote_closed} queued={self.queued}>"
