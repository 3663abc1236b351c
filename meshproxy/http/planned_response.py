"""Response heads as lanes (`http.plan`) know them: what every repetition of an upstream's head comes to downstream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.encode import encode_response_head
from meshproxy.codec.headers import Pair, ResponseHead
from meshproxy.http import retry
from meshproxy.http.probe import GuardedValues, Probe, Varies
from meshproxy.http.retry import ATTEMPT_COUNT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.codec.response_shape import ResponseShape
    from meshproxy.http.lane import Lane, Tally
    from meshproxy.http.manager import HttpConnectionManager

MAX_RESPONSES = 64  # planned, of one connection manager
SERVICE_TIME = b"x-envoy-upstream-service-time"


class PlannedResponse:
    """A response head as it goes downstream, cut where the service time and the date stand. `peer`: who it says it is from (`Chain.shaper`).

    The pieces are bytes for HTTP/1, and `Piece`s for HTTP/2. `kind`: the same for all that differ in their
    date only. `size`: bytes that one takes downstream, but for time and date; 0 where the connection counts what it writes.
    """

    __slots__ = ("after", "before", "between", "dated", "head_size", "items", "kind", "known", "peer", "size", "success", "timed")

    def __init__(self, known: KnownResponse | ResponseShape, pieces: tuple[Any, Any, Any], items: list[Pair], kind: object) -> None:
        self.known = known
        self.before, self.between, self.after = pieces
        self.size = sum(map(len, pieces)) + known.length if type(pieces[0]) is bytes else 0
        self.items = items  # with marks in the place of the service time and the date
        self.timed = any(value is TIME_MARK for _, value in items)
        self.dated = any(value is DATE_MARK for _, value in items)
        self.success = known.status < 500
        self.kind = kind
        self.peer: Any = None
        self.head_size = 0  # about; until somebody measures it

    def head(self, time: bytes, date: bytes, values: Sequence[bytes] | None) -> ResponseHead:
        """The head with a service time and a date. `values`: those of a head that has a shape (`http.shaped_response`)."""
        known = self.known
        items = [(name, time if value is TIME_MARK else date if value is DATE_MARK else value) for name, value in self.items]
        return ResponseHead(known.status, items, reason=known.reason)

    def measure(self) -> int:
        """About how many bytes the head takes in HTTP/1."""
        made = self.head_size = 17 + sum([len(name) + len(value) + 4 for name, value in self.items])
        return made

    def settle(self, tally: Tally, times: dict[int, int]) -> None:
        """Count responses. `times`: milliseconds -> how many."""
        manager, stats, known = tally.manager, tally.cluster.stats, self.known
        count = sum(times.values())
        if self.size:
            sent = count * (self.size + (len(manager.date) if self.dated else 0))
            if self.timed:
                sent += sum(len(str(milliseconds)) * n for milliseconds, n in times.items())
            manager.stats.downstream_cx_tx_bytes_total.n += sent
        stats.upstream_cx_rx_bytes_total.n += count * known.received
        stats.charge_many(known.status, tally.internal, times)
        manager.stats.downstream_rq_time.count(times)
        manager.count_responses(known.status, count)


TIME_MARK = b"<service time>"
DATE_MARK = b"<date>"


def plan_response(lane: Lane, known: KnownResponse) -> PlannedResponse | None:
    """What a head comes to; None where that is not the same each time."""
    finished = finish(lane, known)
    if finished is None:
        return None
    items, peer = finished
    pieces = _fields(known.status, items) if lane.version == 20 else _wire(known, items)
    if pieces is None:
        return None
    made = PlannedResponse(known, pieces, items, kind_of(lane.manager, known.status, items))
    made.peer = peer
    return made


def finish(lane: Lane, known: KnownResponse | ResponseShape, varying: frozenset[bytes] = frozenset()) -> tuple[list[Pair], Any] | None:
    """The fields of a head as they go downstream, with marks in the place of the service time and the date, and who it says it is from; None where that is
    not the same each time. `varying`: fields whose values nobody may look at."""
    if not _SPECIAL_RESPONSE.isdisjoint(known.index):
        return None
    first, second = (_finish(lane, known, varying) for _ in range(2))
    return first if first is not None and second is not None and first[0] == second[0] else None


def _finish(lane: Lane, known: KnownResponse | ResponseShape, varying: frozenset[bytes]) -> tuple[list[Pair], Any] | None:
    manager, route = lane.manager, lane.route
    shaper, peer = lane.chain.shaper, None
    head = ResponseHead(known.status, known.items.copy(), known.index.copy(), reason=known.reason)
    if not manager.router.suppress:
        head.set(SERVICE_TIME, TIME_MARK)
        varying -= {SERVICE_TIME}
    if varying:
        head._index = GuardedValues(head._index, varying)  # type: ignore[arg-type]  # it was given one
    probe = Probe()
    probe.response = head
    if lane.operation is not None:
        probe.tracing, probe.operation, probe.span = manager.tracing.holds(route), lane.operation, None  # type: ignore[union-attr]
    try:
        if route.finalize_response is not None:
            route.finalize_response(probe)  # type: ignore[arg-type]
        if route.include_attempt_count_in_response:
            head.set(ATTEMPT_COUNT, b"1")
        if shaper is not None:
            peer = shaper.shape_response(head, lane.said)
        manager.finish_response_head(probe, head, (b"date", DATE_MARK))  # type: ignore[arg-type]
    except Varies:
        return None
    return head.items, peer


def kind_of(manager: HttpConnectionManager, status: int, items: list[Pair]) -> object:
    """The same for all responses that differ in their date only."""
    kinds = manager.response_kinds
    if len(kinds) >= MAX_RESPONSES:
        kinds.clear()
    return kinds.setdefault((status, *(pair for pair in items if pair[0] != b"date")), object())


def _wire(known: KnownResponse, items: list[Pair]) -> tuple[bytes, bytes, bytes] | None:
    """The head for HTTP/1, in pieces; None if the marks are not where they should be."""
    if known.length < 0:
        return None
    wire = encode_response_head(known.status, items)
    times, dates = (sum(value is mark for _, value in items) for mark in (TIME_MARK, DATE_MARK))
    if wire.count(TIME_MARK) != times or wire.count(DATE_MARK) != dates or times > 1 or dates > 1:
        return None
    before, _, rest = wire.partition(TIME_MARK) if times else (b"", b"", wire)
    between, _, after = rest.partition(DATE_MARK) if dates else (rest, b"", b"")
    return None if DATE_MARK in before else (before, between, after)


class Piece:
    """Pairs that every connection encodes in its own way and remembers so."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs


def _fields(status: int, items: list[Pair]) -> tuple[Piece, Piece, Piece] | None:
    """The same for HTTP/2. The marks stand for whole fields here."""
    pairs = [(b":status", b"%d" % status), *items]
    places = [[place for place, pair in enumerate(pairs) if pair[1] is mark] for mark in (TIME_MARK, DATE_MARK)]
    time, date = places
    if len(time) > 1 or len(date) > 1 or (time and date and date < time):
        return None
    before = pairs[: time[0]] if time else []
    rest = pairs[time[0] + 1 :] if time else pairs
    cut = len(rest) if not date else date[0] - (len(pairs) - len(rest))
    return Piece(before), Piece(rest[:cut]), Piece(rest[cut + 1 :])


# Responses with these change more than the response.
_SPECIAL_RESPONSE = retry.RESPONSE_HEADERS | {b"x-envoy-upstream-canary", b"x-envoy-immediate-health-check-fail"}
