"""Lanes and plans: the short way of a request that came whole, and the shorter one of a request whose head was seen before.

A **lane** (`Lane`) is what all such requests of one route have in common: cluster, filters, timeouts, and the response heads of its upstreams as they go
downstream. Most clients also send the same few heads over and over. When a head is seen for the second time, `make_plan` takes it once through what every
such request goes through (forwarded headers, route, header mutations) and writes down the outcome: a `Plan`, which holds the bytes that go upstream, but for
the request id. `start` and `Plan.start` are the ways in, `Lane.respond` is the way back. `http.shape_plan` does the
same for HTTP/2 heads whose paths and ids are others each time.

Nothing here decides anything that the general way (`http.stream`, `http.router`) would decide otherwise. Two things see to that:

- Lanes and plans are made by running the general code on a stand-in for the stream (`http.probe.Probe`) that has a head and nothing else. Whatever looks at
  something that could be different the next time (the request id, random numbers, certificates, metadata) makes the attempt fail, and there is no plan.
- A `PlannedStream` is an ordinary `Stream` of which most attributes have not been set. Whoever reads one of those (a filter, a reset, a timeout, an access
  log, a response that is not planned) turns it into what it would have been on the general way (`PlannedStream.leave_plan`), and goes on from there.

Counters that follow from how often a lane or a plan was used are settled when statistics are collected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.encode import encode_request_head
from meshproxy.codec.headers import Pair, RequestHead
from meshproxy.http import timeouts
from meshproxy.http.filter_chain import EMPTY
from meshproxy.http.planned_response import Piece
from meshproxy.http.planned_stream import FILTERS, UPSTREAM, PlannedStream
from meshproxy.http.probe import REQUEST_ID, GuardedIndex, Probe, Varies
from meshproxy.http.retry import ATTEMPT_COUNT
from meshproxy.http.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.http.lane import Lane
    from meshproxy.http.manager import HttpConnectionManager

DECORATOR = b"x-envoy-decorator-operation"
MAX_PLANS = 512  # of one connection manager
MAX_PER_HEAD = 16  # plans of one head: clients at so many addresses

METHODS = frozenset((b"GET", b"DELETE", b"TRACE"))  # of requests without a body whose responses have one
_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH", b"GET", b"DELETE"))
BODIED = frozenset((b"POST", b"PUT", b"PATCH"))  # of requests that have plans for when they have a body
_CONTROL = timeouts.CONTROL_HEADERS
_NEW = object.__new__
_NEW_ID = b"<new>"


class _NoLane:
    """In place of the lane of a stream that has none (yet)."""

    route = None
    chain = EMPTY


_NO_LANE: Any = _NoLane()


class Plan:
    """What every repetition of a request head comes to, for clients that get the same additions."""

    decided = False  # the request id is drawn before the filters run: see http.traced_plan

    __slots__ = (
        "after",
        "authority",
        "before",
        "bodied",
        "fields",
        "filtered",
        "finished",
        "generation",
        "hooks",
        "lane",
        "new_id",
        "peer",
        "received",
        "request_id",
        "size",
        "varying",
    )

    def __init__(self, lane: Lane, outcome: _Outcome, received: int) -> None:
        self.varying = False  # heads differ in more than their ids: see http.shape_plan
        self.lane = lane
        self.generation: int = lane.manager.changes.n
        self.hooks = lane.chain.repeated
        self.bodied = outcome.finished.method in BODIED  # it is for requests that have a body, else for those that have none
        self.filtered = _Template(outcome.filtered, outcome.id)
        self.finished = _Template(outcome.finished, outcome.id)
        self.new_id = lane.manager.preparer.new_id if outcome.id else None
        self.request_id = outcome.filtered.get(REQUEST_ID)  # where none is generated
        before, _, after = outcome.wire.partition(outcome.id) if outcome.id else (outcome.wire, b"", b"")
        self.before: bytes = before
        self.after: bytes = after
        self.fields: Any = None  # the pairs around the id, for HTTP/2; made when they are first needed
        self.authority = outcome.filtered.authority
        self.peer = outcome.peer  # who sends it, where the head says so
        self.received = received  # bytes, where the connection does not count them itself
        self.size = len(outcome.wire)

    def start(self, codec: Any, now: float, body: bytes, known: Any = None) -> PlannedStream:
        """HOT: a whole request, for `codec` (http.exchange.PlanExchange). The filters of its connection let this head pass before.

        `known`: what its head is, where heads vary. The stream's `stage` says whether it was sent, as that of `start`.
        """
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
        if known is not None:
            stream.known = known
        if self.hooks and not self._run_hooks(stream):
            return stream
        pick = lane.cluster.pick  # not as a method, which it is not: that would cost more
        host: Any = pick(None)
        pools = None if host is None else host.pools
        pool = None if pools is None else pools.get(lane.pool_key)
        if pool is None or not pool.ready or pool.limits.rq >= pool.limits.max_rq:
            stream.leave_plan()
            stream.forward(not body, host)
            return stream
        new_id = self.new_id
        request_id = b""
        if new_id is not None:
            request_id = stream.request_id = new_id()
        # As Lane.begin.
        pool.limits.rq += 1
        host.rq_total += 1
        host.rq_active += 1
        exchange = stream.connected = pool.ready[-1].begin_planned(stream)
        exchange.way = lane, codec, now
        stream.stage = UPSTREAM
        queue = lane.queue
        if queue is not None:
            if queue.handle is None:
                queue.start(stream, now)
            else:
                queue.started[stream] = now
        queue = lane.queue_per_try
        if queue is not None:
            if queue.handle is None:
                queue.start(stream, now)
            else:
                queue.started[stream] = now
        tally = lane.tally
        started = tally.started
        if not started:
            lane.manager.busy.add(tally)
        tally.started = started + 1
        # What the stream knows is handed on: to read it from a class with a `__getattr__` costs ten times as much as from others.
        sent = exchange.ask_known(self, stream, known, request_id, body)
        if sent:  # HTTP/2 connections count what they read and write
            tally.sent += sent
        received = self.received
        if received:
            tally.received += received
        return stream

    def make_fields(self, fields_of: Callable[[RequestHead], list[Pair]]) -> tuple[Piece, Piece]:
        """What goes upstream over HTTP/2 around the new request id. `fields_of`: the pairs of a head."""
        pairs = fields_of(self.finished.head(_NEW_ID if self.new_id is not None else b""))
        at = pairs.index((REQUEST_ID, _NEW_ID)) if self.new_id is not None else len(pairs)
        made = self.fields = Piece(pairs[:at]), Piece(pairs[at + 1 :])
        return made

    def head(self, stream: PlannedStream, template: Any) -> RequestHead:
        """An independent head of a stream. `template`: of `filtered` and `finished` the one."""
        head: RequestHead = template.head(b"" if self.new_id is None else stream.request_id)
        return head

    def _run_hooks(self, stream: PlannedStream) -> bool:
        """HOT: the filters; False when the request took another way."""
        at = -1
        for hook in self.hooks:
            at += 1
            result = hook(stream)
            if result is not None:
                stream._hold_headers(result, self.lane.chain.positions[at], not stream.body)
                return False
        if stream.__class__ is PlannedStream:
            return True
        if not stream.ended:
            stream.forward(not stream.body)
        return False


class _Template:
    """A request head without its id."""

    __slots__ = ("_at", "_head")

    def __init__(self, head: RequestHead, request_id: bytes) -> None:
        self._head = head
        self._at = head.items.index((REQUEST_ID, request_id)) if request_id else -1

    def head(self, request_id: bytes) -> RequestHead:
        """An independent head with that id; empty: the one that it was made with."""
        of = self._head
        items = of.items.copy()
        if request_id:
            items[self._at] = REQUEST_ID, request_id
        return RequestHead(of.method, of.path, of.authority, items, scheme=of.scheme, version=of.version)


def start(codec: Any, known: Any, body: bytes, additions: Any, now: float) -> PlannedStream:
    """HOT: a request with a plain head (see `RequestHeadPreparer.is_plain`) that has no plan.

    The stream's `stage` says whether it was sent with its body, or goes the general way, on which the body comes after the head.
    """
    manager = codec.manager
    stream = codec.stream = _NEW(PlannedStream)
    stream.body = body
    stream.plan = stream.route = None
    stream.lane = _NO_LANE
    stream.chain = EMPTY
    stream.codec = codec
    stream.manager = manager
    stream.connection = codec.info
    stream.start = stream.last_active = now
    stream.stage = FILTERS
    head = stream.request = known.head()
    manager.complete_head(stream, head, additions)
    route = stream.route = manager.match(stream)
    lane = manager.lane(route, head, stream.is_internal) if known.method in (_WITH_BODY if body else METHODS) else None
    if body and lane is not None and len(body) > lane.body_limit:
        lane = None
    tracing = manager.tracing
    if tracing is not None and not tracing.stays_in_lane(stream):
        lane = None
    if lane is None or stream.__class__ is not PlannedStream:
        if stream.__class__ is PlannedStream:
            stream.leave_plan()
        stream.go(not body)
        return stream
    stream.lane = lane
    chain = stream.chain = lane.chain
    if chain.request_headers:
        position = 0
        for hook in chain.request_headers:
            position += 1  # noqa: SIM113  # enumerate costs more
            result = hook(stream, not body)
            if result is not None:
                stream._hold_headers(result, position, not body)
                return stream
        if stream.__class__ is not PlannedStream:
            if not stream.ended:
                stream.forward(not body)
            return stream
    lane.forward(stream)
    return stream


def make_plan(manager: HttpConnectionManager, known: Any, additions: Any) -> Plan | None:
    """The plan for a plain head; None when such requests are not all alike, or have no lane."""
    first = try_out(manager, known, additions)
    # Once more: what comes out differently is no plan.
    second = None if first is None else try_out(manager, known, additions)
    if first is None or second is None or first.but_id() != second.but_id() or first.lane is not second.lane:
        return None
    return Plan(first.lane, first, known.received)


class _Outcome:
    """What became of a probe."""

    __slots__ = ("filtered", "finished", "id", "lane", "peer", "wire")

    lane: Lane
    peer: Any  # observe.peers.Peer, None
    id: bytes  # the generated request id; empty where none is generated
    filtered: RequestHead  # as filters see it
    finished: RequestHead  # as it goes upstream
    wire: bytes

    def but_id(self) -> list[bytes]:
        """The head on the wire, in pieces around the request id."""
        return self.wire.split(self.id) if self.id else [self.wire]


def try_out(manager: HttpConnectionManager, known: Any, additions: Any, trace: bytes = b"") -> _Outcome | None:
    """Take a stand-in with this head to where it goes upstream; None where it needs more than a plan. `trace`: stands for its trace, if it has one."""
    outcome = _Outcome()
    head = known.head()
    scratch = Stream.__new__(Stream)
    manager.complete_head(scratch, head, additions)
    value = head.get(REQUEST_ID)
    outcome.id = b"" if value is None or value == known.index.get(REQUEST_ID) else value
    outcome.peer = None
    probe = Probe()
    probe.request = head
    guarded = head._index = GuardedIndex(dict(reversed(head.items)))
    try:
        route = manager.match(probe)  # type: ignore[arg-type]
        planned = known.method in METHODS or (known.method in BODIED and head.version == 20)
        lane = manager.lane(route, head, scratch.is_internal) if planned else None
        if lane is None or not _CONTROL.isdisjoint(guarded):
            return None
        if known.method in BODIED and known.length < 0 and not lane.cluster.speaks_http2(head.version):
            return None  # HTTP/1 would have to frame the body
        tracing: Any = lane.tracing
        operation: Any = lane.operation
        if trace and tracing.tells_operation(operation):
            head.set(DECORATOR, operation)
        if lane.chain.shaper is not None:
            outcome.peer = lane.chain.shaper.shape_request(head, lane.cluster)
        outcome.filtered = head.copy()
        if route.expected_timeout is not None and not manager.router.suppress:  # type: ignore[union-attr]
            head.add(timeouts.EXPECTED, route.expected_timeout)  # type: ignore[union-attr]
        if route.include_attempt_count_in_request:  # type: ignore[union-attr]
            head.set(ATTEMPT_COUNT, b"1")
        if route.finalize_request is not None:  # type: ignore[union-attr]
            route.finalize_request(probe)  # type: ignore[union-attr,arg-type]
    except Varies:
        return None
    outcome.lane = lane
    if lane.scheme is not None:
        head.scheme = lane.scheme
    if trace and not tracing.tracer.inject_root(head, trace):
        return None
    outcome.finished = head.copy()
    outcome.wire = encode_request_head(head.method, head.path, head.authority, head.items)
    return outcome if not outcome.id or outcome.wire.count(outcome.id) == 1 else None
