"""What an HTTP/2 connection has to send: frames in a list, which its owner takes; and data that waits for windows and for the transport.

Of what the peer does not take, only so much piles up: `Options.max_outbound_*`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NoReturn, Protocol

from meshproxy.codec.h2 import errors, frames
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.frames import CONTINUATION, DEFAULT_FRAME_SIZE, DEFAULT_WINDOW, END_HEADERS, HEADERS
from meshproxy.codec.hpack.encoder import Encoder

if TYPE_CHECKING:
    from meshproxy.codec.h2.settings import Options
    from meshproxy.codec.h2.stream import Http2Stream

_SEGMENT = 256  # frames
_NOTHING = 0, 0, 0
_LARGE_PIECE = 1 << 16  # bytes of frames that were passed on together, from which on they are not copied once more


class Sink(Protocol):
    """What a session calls besides its streams."""

    def new_stream(self) -> Http2Stream:
        """A server's: the peer begins a request."""
        ...

    def on_output(self) -> None:
        """Something is to be sent where there was nothing: `take` it soon."""
        ...

    def on_settings(self) -> None:
        """The peer's settings have come, or changed."""
        ...

    def on_goaway(self, last_id: int, code: int) -> None:
        """The peer takes no more streams; those above `last_id` were told that they were refused."""
        ...

    def on_ping_ack(self, data: bytes) -> None:
        """The peer has answered a PING."""
        ...


class Output:
    """The half of a `Session` that sends."""

    __slots__ = (
        "_bytes",
        "_closed",
        "_control_frames",
        "_frames",
        "_segments",
        "apart",
        "blocked",
        "data_frames",
        "encoder",
        "high_watermark",
        "more",
        "options",
        "out",
        "peer_frame_size",
        "pending_bytes",
        "send_window",
        "sink",
        "stats",
        "writable",
    )

    def __init__(self, sink: Sink, options: Options) -> None:
        self.sink = sink
        self.options = options
        self.stats = options.stats
        self.pending_bytes = options.stats.pending_send_bytes
        self.blocked: dict[int, Http2Stream] = {}  # streams with something queued, in the order in which they are served next
        self.out: list[bytes | memoryview] = []
        self.apart = 0  # pieces of data in `out` that are not joined to their frames' heads: large ones, which are not copied
        self.writable = True  # the transport takes more; see `set_writable`
        self.high_watermark = options.initial_stream_window_size
        self.more = False  # `pump` has stopped before its time; call it again when what there is has been written
        self.encoder = Encoder(options.hpack_table_size)
        self.send_window = DEFAULT_WINDOW
        self.peer_frame_size = DEFAULT_FRAME_SIZE
        self.data_frames = 0
        # That wait to be taken by the peer, as far as is known. Of many, where each few hundred of them end is kept: what is taken can be told by bytes only.
        self._control_frames = self._frames = self._bytes = 0
        self._segments: deque[tuple[int, int, int]] | None = None  # bytes, frames, and how many of them the peer has provoked
        self._closed = _NOTHING  # all segments together

    def emit(self, frame: bytes) -> None:
        """HOT: queue a frame, or a part of one."""
        out = self.out
        if not out:
            self.sink.on_output()
        out.append(frame)

    def take(self) -> bytes:
        """HOT: what is to be written now. Raises Http2Error when the peer lets too much of it pile up."""
        out = self.out
        self._frames += len(out)
        data = b"".join(out)
        self._bytes += len(data)
        out.clear()
        self.apart = 0
        if self._frames - self._closed[1] > _SEGMENT:
            self._close_segment()
        if self._frames > self.options.max_outbound_frames and not self.writable:
            self._outbound_flood()
        return data

    def take_parts(self) -> list[bytes | memoryview]:
        """The same in parts: to be preferred if something is `apart`."""
        parts = self.out.copy()
        self.out.clear()
        self._frames += len(parts) - self.apart
        self._bytes += sum(map(len, parts))
        self.apart = 0
        if self._frames - self._closed[1] > _SEGMENT:
            self._close_segment()
        if self._frames > self.options.max_outbound_frames and not self.writable:
            self._outbound_flood()
        return parts

    def _outbound_flood(self) -> NoReturn:
        self.stats.outbound_flood.n += 1
        raise Http2Error(errors.ENHANCE_YOUR_CALM, "Too many frames in the outbound queue.", errors.OUTBOUND_FLOOD, flood=True)

    def drained(self) -> None:
        """The transport has nothing left to write."""
        self._frames = self._control_frames = self._bytes = 0
        if self._segments is not None:
            self._segments = None
            self._closed = _NOTHING

    def _close_segment(self) -> None:
        size, count, control = self._closed
        if self._segments is None:
            self._segments = deque()
        self._segments.append((self._bytes - size, self._frames - count, self._control_frames - control))
        self._closed = self._bytes, self._frames, self._control_frames

    def remain(self, size: int) -> None:
        """The transport has `size` bytes left to write, and has written what came before them."""
        segments = self._segments
        while segments and segments[0][0] <= self._bytes - size:
            gone, count, control = segments.popleft()
            self._bytes -= gone
            self._frames -= count
            self._control_frames -= control
            self._closed = self._closed[0] - gone, self._closed[1] - count, self._closed[2] - control

    @property
    def outbound(self) -> tuple[int, int]:
        """How many frames wait to be taken by the peer, as far as is known (see `drained` and `remain`); and how many of them it has provoked."""
        return self._frames, self._control_frames

    def set_writable(self, writable: bool) -> None:
        """Whether the transport takes more. While it does not, data is kept by its streams."""
        self.writable = writable
        if writable:
            self.drained()
            if self.blocked:
                self.pump()

    def emit_long_block(self, stream_id: int, block: bytes, flags: int) -> None:
        """A header block that needs more than one frame."""
        size = self.peer_frame_size
        parts = [block[start : start + size] for start in range(0, len(block), size)]
        self.emit(frames.encode(HEADERS, flags, stream_id, parts[0]))
        for part in parts[1:-1]:
            self.emit(frames.encode(CONTINUATION, 0, stream_id, part))
        self.emit(frames.encode(CONTINUATION, END_HEADERS, stream_id, parts[-1]))

    def send_frames(self, frames: memoryview, count: int, size: int) -> None:
        """`count` frames of DATA with `size` bytes in them, in one piece. Their streams' windows are the caller's."""
        self.send_window -= size
        self.data_frames += count
        out = self.out
        if not out:
            self.sink.on_output()
        out.append(frames)
        self._frames += count - 1
        if len(frames) >= _LARGE_PIECE:
            self.apart += 1
            self._frames += 1

    def emit_control(self, frame: bytes) -> None:
        """A frame that the peer has provoked."""
        self._control_frames += 1
        if self._control_frames > self.options.max_outbound_control_frames:
            self.stats.outbound_control_flood.n += 1
            raise Http2Error(errors.ENHANCE_YOUR_CALM, "Too many control frames in the outbound queue.", errors.OUTBOUND_FLOOD, flood=True)
        self.emit(frame)

    def pump(self) -> None:
        """Send what is queued as far as windows and transport allow, a frame of each stream in turn; not more at once than a stream may have queued."""
        blocked = self.blocked
        touched: list[Http2Stream] = []
        room = self.high_watermark
        turns = len(blocked)
        while turns and self.writable and room > 0:
            stream_id = next(iter(blocked))
            stream = blocked.pop(stream_id)
            before = stream.queued
            turns -= 1
            if stream.send_some():
                turns = len(blocked) + 1
            if stream.queue is not None:
                blocked[stream_id] = stream  # to the end of the line
            room -= before - stream.queued
            if stream.queued != before:
                touched.append(stream)
        self.more = turns > 0 and room <= 0
        for stream in touched:
            if not stream.remote_closed or not stream.local_closed or stream.queue is not None:
                stream.unwarn()
