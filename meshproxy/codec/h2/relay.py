"""Data that goes on from a stream of one session to a stream of another, and that nobody looks at in between.

`pass_on` takes such DATA frames over into the other session's output as they came, as long as nothing falls due: no window is closed or has to be granted
anew, nothing is paused, nothing ends. Whatever else comes goes the general way, by `Http2Stream.on_data`; what goes out is the same on either.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING

from meshproxy.codec.h2.frames import DEFAULT_FRAME_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshproxy.codec.h2.session import Session
    from meshproxy.codec.h2.stream import Http2Stream

_HEAD = 9  # bytes of a frame's head; the last four are its stream
# The head as it suits DATA that is neither long nor the end, where the first and the third number are 0: the length's first byte, the rest of it, type and
# flags, stream.
_unpack = Struct(">BHHI").unpack_from
_pack_stream = Struct(">I").pack_into
_WORTH_IT = 4  # frames


@lru_cache(maxsize=64)
def _unpack_all(length: int) -> Callable[[memoryview], Iterator[tuple[int, int, int]]]:
    """The heads of frames that follow each other, all with so much data: its length and the type, flags, stream."""
    return Struct(f">IBI{length}x").iter_unpack


class Relay:
    """One direction of two streams that go on to each other. It ends with what its source has to say, or with either stream; both hold it until then.

    So that a frame costs one subtraction, `room` bytes of what both streams still allow are booked beforehand. Who looks at their windows, or changes
    anything that room depends on, calls `settle` first.
    """

    __slots__ = ("_booked", "clock", "heard_at", "room", "session", "source", "stream_id", "target")

    def __init__(self, source: Http2Stream, target: Http2Stream, clock: Callable[[], float]) -> None:
        self.source = source
        self.target = target
        self.session = target.session
        self.stream_id = target.id
        self.clock = clock
        self.heard_at = 0.0  # when something passed last
        self.room = self._booked = 0
        source.relay = target.feeder = self
        source.session.relays[source.id] = self

    def send(self, data: bytes) -> None:
        """Pass on what came the general way, and is not the end."""
        self.source.on_relayed(len(data), self.clock())
        self.target.send_data(data, False)

    def book(self, size: int) -> bool:
        """Make as much room as there can be. False, and there is none, if that is less than `size`."""
        self.settle()
        source, target = self.source, self.target
        if source.paused or target.queue is not None or target.local_closed:
            return False
        room = min(source.ungranted, target.send_window)
        if 0 <= source.left < room:
            room = source.left
        if room < size:
            return False
        self.room = self._booked = room
        self._move(room)
        return True

    def settle(self) -> None:
        """Book back what has not passed, and tell the source's owner of what has."""
        booked = self._booked
        if booked:
            room = self.room
            self.room = self._booked = 0
            self._move(-room)
            self.source.on_relayed(booked - room, self.heard_at)

    def _move(self, size: int) -> None:
        source = self.source
        source.received += size
        if source.left >= 0:
            source.left -= size
        self.target.send_window -= size

    def close(self) -> None:
        """Whatever still comes goes the general way. No cycle is left behind."""
        self.settle()
        source = self.source
        del source.session.relays[source.id]
        source.relay = self.target.feeder = None


def pass_on(session: Session, data: bytes, copy: bytearray, position: int, size: int) -> int:
    """HOT: pass on the frames of `data` from `position` on. Returns where the first begins that has to go the general way, or is none of a relay.

    What goes out differs from what came in by the streams' numbers alone: they are written into `copy`, which has begun as the same bytes, and of which as many
    frames as follow each other on the way to one session are one piece of its output. When this returns, nothing is booked for a frame that did not pass.
    """
    relay_of = session.relays.get
    now = -1.0
    target: Session | None = None  # where the frames go on from `first` to `position`; `count` of them
    first = stop = position
    count = before = 0
    last = size - _HEAD
    while position <= last:
        high, length, kind, stream_id = _unpack(data, position)
        relay = relay_of(stream_id)
        if relay is None:
            break
        end = position + _HEAD + length
        room = relay.room - length
        if room < 0 or end > stop or relay.session is not target or high or kind or not length or length > DEFAULT_FRAME_SIZE:
            if target is not None and count:
                _write(session, target, memoryview(copy)[first:position], count)
                count = 0
            if now < 0.0:
                now = relay.clock()
            first = position
            target = relay.session
            stop = min(size, position + session.can_pass(target))
            if end > stop or high or kind or not length or length > DEFAULT_FRAME_SIZE or (room < 0 and not relay.book(length)):
                relay.settle()
                return position
            room = relay.room - length
        relay.room = room
        relay.heard_at = now
        _pack_stream(copy, position + 5, relay.stream_id)
        position = end
        count += 1
        if length == before:
            # Most messages are as long as the one before, and large ones come in frames of the greatest length: those heads are read ahead.
            whole = _HEAD + length
            ahead = (stop - position) // whole
            if ahead >= _WORTH_IT:
                kind_and_length = length << 8
                for sort, flags, stream_id in _unpack_all(length)(memoryview(data)[position : position + ahead * whole]):
                    relay = relay_of(stream_id)
                    if sort != kind_and_length or flags or relay is None or relay.session is not target:
                        break
                    room = relay.room - length
                    if room < 0:
                        break
                    relay.room = room
                    relay.heard_at = now
                    _pack_stream(copy, position + 5, relay.stream_id)
                    position += whole
                    count += 1
        before = length
    if target is not None and count:
        _write(session, target, memoryview(copy)[first:position], count)
    return position


def _write(session: Session, target: Session, frames: memoryview, count: int) -> None:
    size = len(frames) - _HEAD * count
    session.passed(size)
    target.send_frames(frames, count, size)
