"""Plans of connection managers that trace: what a repeated head comes to that brings no context of a trace and is not sampled.

Each request has a trace of its own, which nobody hears of but those further on: what goes upstream has a gap for `traceparent` beside that for the request id,
as heads of one shape have them (`http.shape_plan`). Whether a request is sampled its id decides, which is new: so it is drawn first, and one that is sampled
becomes an ordinary traced stream before anything else happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.http import shape_plan
from meshproxy.http.plan import Plan, try_out
from meshproxy.http.planned_stream import FILTERS, PlannedStream
from meshproxy.http.probe import REQUEST_ID
from meshproxy.http.tracing import DECORATOR
from meshproxy.tracing.context import TRACEPARENT, TRACESTATE
from meshproxy.tracing.span import Span

if TYPE_CHECKING:
    from meshproxy.http.manager import HttpConnectionManager

_NEW = object.__new__
_MARK = b"<traceparent>"
# Heads with one of these say something of the trace, or of the decision.
_SAY = frozenset((REQUEST_ID, TRACEPARENT, TRACESTATE, DECORATOR, b"x-client-trace-id", b"x-envoy-force-trace"))


class _Ids:
    """What is different about one request: as `codec.h2.fields.ShapedRequest` has it."""

    __slots__ = ("values",)

    values: tuple[bytes, ...]


class TracedPlan(shape_plan.ShapedPlan):
    """See the module's docstring."""

    __slots__ = ("_chance", "_root", "_tracing")

    decided = True
    _run_hooks = Plan._run_hooks  # heads are the same

    def __init__(self, outcome: Any, received: int, manager: HttpConnectionManager) -> None:
        super().__init__(outcome, -1, ())
        tracing: Any = manager.tracing
        self.hooks = outcome.lane.chain.repeated
        self.received = received
        self._tracing = tracing
        self._root = tracing.root
        self._chance = tracing.chance(outcome.lane.route)

    def start(self, codec: Any, now: float, body: bytes, known: Any = None) -> PlannedStream:
        """HOT: as `Plan.start`, of which this is a copy but for who has drawn the ids."""
        lane = self.lane
        stream = codec.stream = _NEW(PlannedStream)
        stream.plan = self
        stream.lane = lane
        stream.body = body
        stream.codec = codec
        stream.manager = lane.manager
        stream.connection = codec.info
        stream.start = stream.last_active = now
        stream.stage = FILTERS
        ids = stream.known = _NEW(_Ids)
        request_id = stream.request_id = self.new_id()  # type: ignore[misc]  # there is no such plan without
        numerator, denominator = self._chance
        if numerator and int(request_id[:8], 16) % 10_000 % denominator < numerator:
            ids.values = (b"",)
            self._trace(stream)
            return stream
        ids.values = (self._root(),)
        if self.hooks and not self._run_hooks(stream):
            return stream
        host = lane.cluster.pick(None)
        pools = None if host is None else host.pools
        pool = None if pools is None else pools.get(lane.pool_key)
        if pool is None or not pool.ready or pool.limits.rq >= pool.limits.max_rq:
            stream.leave_plan()
            stream.forward(not body, host)
            return stream
        tally = lane.tally
        tally.received += self.received
        tally.sent += lane.begin(stream, codec, now, host, pool).ask_known(self, stream, ids, request_id, body)
        return stream

    def restore(self, stream: Any) -> None:
        """Let a stream that leaves its plan have what tracing would have given to it."""
        value = stream.known.values[0]
        tracing = self._tracing
        stream.tracing, stream.reason, stream.operation = tracing.holds(self.lane.route), None, self.lane.operation
        span = stream.span = Span(tracing.tracer, value[3:35], value[36:52], b"", stream.start, client=False, sampled=False)
        span.state = b""

    def _trace(self, stream: PlannedStream) -> None:
        """The general way."""
        body = stream.body
        stream.leave_plan()
        self._tracing.begin(stream)
        stream.go(not body)


def make_traced_plan(manager: HttpConnectionManager, known: Any, additions: Any) -> TracedPlan | None:
    """As `plan.make_plan`; None, too, for heads that say anything of a trace."""
    tracing: Any = manager.tracing
    if not tracing.plans or not _SAY.isdisjoint(known.index):
        return None
    first = try_out(manager, known, additions, _MARK)
    if first is not None and (chance := tracing.chance(first.lane.route))[0] >= chance[1]:
        return None  # they are all sampled
    second = None if first is None else try_out(manager, known, additions, _MARK)
    if first is None or second is None or not first.id or first.but_id() != second.but_id() or first.lane is not second.lane:
        return None
    outcome = shape_plan.Outcome()
    outcome.lane, outcome.id, outcome.peer = first.lane, first.id, first.peer
    outcome.filtered, outcome.finished, outcome.wire = first.filtered, first.finished, first.wire
    outcome.marks = [_MARK, first.id]
    return TracedPlan(outcome, known.received, manager)
