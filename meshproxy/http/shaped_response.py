"""Response heads of one shape (`codec.h1.response_shapes`) as lanes know them: what they come to downstream, with gaps for the values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.encode import encode_response_head
from meshproxy.codec.headers import ResponseHead
from meshproxy.http import gaps
from meshproxy.http.planned_response import DATE_MARK, SERVICE_TIME, TIME_MARK, PlannedResponse, finish, kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshproxy.codec.headers import Pair
    from meshproxy.codec.hpack.encoder import Encoder
    from meshproxy.codec.response_shape import ResponseShape
    from meshproxy.http.lane import Lane

_NOTHING = (b"", b"", b"")


class ShapedResponse(PlannedResponse):
    """What the responses of one shape come to. `logged`: the places of values that access logs show, but for the service time."""

    __slots__ = ("_join", "_marks", "_order", "_parts", "_places", "logged")

    def __init__(self, shape: ResponseShape, items: list[Pair], lane: Lane) -> None:
        super().__init__(shape, _NOTHING, items, kind_of(lane.manager, shape.status, items))
        self.size = 0  # connections count what they write
        names = shape.names
        shown = lane.manager.logged_response_headers
        self.logged = (*(place for place, name in enumerate(names) if name != SERVICE_TIME and (shown is None or name in shown)),)
        self._marks = [*shape.marks, TIME_MARK, DATE_MARK]
        self._places = {mark: place for place, mark in enumerate(self._marks)}
        self._parts: Any
        if lane.version == 20:
            self._parts, self._order = gaps.cut_fields([(b":status", b"%d" % shape.status), *items], self._marks)
        else:
            self._parts, self._order = gaps.cut_wire(encode_response_head(shape.status, items), self._marks)
        self._join = gaps.joiner(self._order, len(self._marks), lengths=lane.version == 20)

    def wire(self, values: tuple[bytes, ...], time: bytes, date: bytes) -> bytes:
        """HOT: the head for HTTP/1."""
        join = self._join
        return join(self._parts, (*values, time, date), b"")

    def block(self, encoder: Encoder, values: tuple[bytes, ...], time: bytes, date: bytes) -> bytes:
        """HOT: the header block for HTTP/2."""
        parts = encoder.parts.get(self) or encoder.encode_parts(self, self._parts)
        values = *values, time, date
        join = self._join
        try:
            return join(parts, values, b"")
        except IndexError:  # one of them is long
            return gaps.join_long(parts, values, self._order)

    def head(self, time: bytes, date: bytes, values: Sequence[bytes] | None) -> ResponseHead:
        """See `PlannedResponse.head`."""
        assert values is not None
        known, places = self.known, self._places
        all_values = *values, time, date
        items = [(name, value if (place := places.get(value)) is None else all_values[place]) for name, value in self.items]
        return ResponseHead(known.status, items, reason=known.reason)

    def stated_time(self, values: tuple[bytes, ...]) -> bytes | None:
        """The service time that the upstream says, where that goes on."""
        value = self.known.index.get(SERVICE_TIME)
        place = None if value is None else self._places.get(value)
        return value if place is None else values[place]

    def measure(self) -> int:
        """The same without the values."""
        self.head_size = super().measure() - sum([len(value) for _, value in self.items if value in self._places])
        return self.head_size


def shape_response(lane: Lane, shape: ResponseShape) -> ShapedResponse | None:
    """What heads of a shape come to; None where that depends on values, or where HTTP/1 would have to frame the body."""
    if lane.version != 20 and not shape.says_length:
        return None
    finished = finish(lane, shape, frozenset(shape.names))
    if finished is None:
        return None
    items, peer = finished
    values = [value for _, value in items]
    marks = [*shape.marks, TIME_MARK, DATE_MARK]
    for mark in marks:
        found = [value for value in values if mark in value]
        if len(found) > 1 or (found and found[0] is not mark):
            return None  # it is somewhere else, too, or is what somebody really says
    made = ShapedResponse(shape, items, lane)
    made.peer = peer
    return made
