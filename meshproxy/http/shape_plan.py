"""Plans for heads of one shape (`codec.h1.shapes`, `codec.h2.fields.RequestShape`), which differ in nothing but a few values: a path, a request id, a trace
context.

What a `Plan` (`http.plan`) is for a head that repeats itself, a `ShapedPlan` is for all heads of a shape that have one route: what goes upstream, with gaps
for the values. Which route that is depends on the path, so every request is matched, by the general code, on a stand-in that knows only what is the same in
all of them. If that looks at another of the values, requests of this shape have no plans. Filters get the same stand-in, if they say that they can do with
it (`request_headers_varying`).

Routes with other filters that look at requests and those that rewrite paths have none either: such requests go by their lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api.matchers import HASH
from meshproxy.codec.h1.encode import encode_request_head
from meshproxy.codec.headers import RequestHead
from meshproxy.http import gaps, paths, timeouts
from meshproxy.http.plan import BODIED, METHODS, Plan
from meshproxy.http.planned_stream import PlannedStream
from meshproxy.http.probe import REQUEST_ID, GuardedIndex, Probe, Varies
from meshproxy.http.retry import ATTEMPT_COUNT
from meshproxy.http.stream import Stream
from meshproxy.upstream.http2 import all_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshproxy.codec.h1 import shapes
    from meshproxy.codec.h2 import fields
    from meshproxy.codec.hpack.encoder import Encoder
    from meshproxy.http.lane import Lane
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.route import Route

    Shaped = fields.ShapedRequest | shapes.ShapedRequest

_MAX_ROUTES = 64  # of one shape
_CONTROL = timeouts.CONTROL_HEADERS
_PATH = b":path"


class ShapedPlans:
    """What requests of one shape come to, from clients that get the same additions."""

    __slots__ = ("_additions", "_by_route", "_head", "_is_plain_path", "_keeps_paths", "_key", "_manager", "_matcher", "_probe", "generation")

    def __init__(self, manager: HttpConnectionManager, key: Any, additions: Any, head: RequestHead) -> None:
        """`key`: in `plans` of the shape. `head`: that of the stand-in."""
        self._key = key
        self.generation = manager.changes.n
        self._manager = manager
        self._additions = additions
        self._is_plain_path = manager.preparer.is_plain_path
        self._keeps_paths = self._is_plain_path is paths.has_no_fragment
        self._matcher: Any = manager.routes.virtual_host(head.authority) or manager.routes
        self._probe = Probe()
        self._probe.request = self._head = head
        self._by_route: dict[Route | None, ShapedPlan | None] = {}

    def find(self, known: Shaped, body: bytes) -> ShapedPlan | None:
        """HOT: the plan for a whole request; None when it has to take another way."""
        path = self._head.path = known.path
        is_plain, match = self._is_plain_path, self._matcher.match  # neither is a method, and to call them as such would cost more
        if HASH in path if self._keeps_paths else not is_plain(path):
            return None
        try:
            route = match(self._probe)
        except Varies:
            known.shape.plans[self._key] = None
            return None
        try:
            plan = self._by_route[route]
        except KeyError:
            plan = self._learn(route, known)
        if plan is None or (plan.own_id >= 0 and not known.values[plan.own_id]):
            return None
        if plan.bodied:
            if not body or len(body) > plan.lane.body_limit:
                return None
        elif body:
            return None
        return plan

    def _learn(self, route: Route | None, known: Shaped) -> ShapedPlan | None:
        if len(self._by_route) >= _MAX_ROUTES:
            self._by_route.clear()
        self._manager.count_plan()
        plan = self._by_route[route] = _make_plan(self._manager, route, known, self._additions)
        return plan

    def drop(self, plan: ShapedPlan) -> None:
        """One of these plans, if it is one, turned out to be for nothing: a filter looks at what differs."""
        for route in [route for route, known in self._by_route.items() if known is plan]:
            self._by_route[route] = None


def make_plans(manager: HttpConnectionManager, known: Shaped, additions: Any) -> ShapedPlans | None:
    """For requests like `known` from clients that get `additions`; None where they are not plain. The path of this one has to be."""
    preparer, shape = manager.preparer, known.shape
    if manager.times_routes:
        return None
    key = additions
    head = known.head()
    index: Any = head._index
    http2 = head.version == 20
    if (http2 and head.scheme != additions.scheme) or not preparer.is_plain(head, index, http2=http2):
        if b"x-forwarded-proto" in shape.names or not preparer.is_relayed(head, index, http2=http2):
            return None
        additions = additions.relayed
    if additions.forgets_trace_reason and not additions.replaces_id and REQUEST_ID in shape.names:
        return None  # what becomes of the id depends on what it is
    stand_in = _copy(head)
    manager.complete_head(Stream.__new__(Stream), stand_in, additions)
    _guard(stand_in, shape.names)
    return ShapedPlans(manager, key, additions, stand_in)


def _guard(head: RequestHead, names: tuple[bytes, ...]) -> GuardedIndex:
    """Nobody may read the values of these fields; the path is an attribute, and may be read if it is there."""
    made = head._index = GuardedIndex(dict(reversed(head.items)), (*(name for name in names if name != _PATH),))
    return made


class ShapedPlan(Plan):
    """What requests of one shape and route come to.

    `own_id`: the place of the client's request id among the values, if it has to have one; or -1. `places`: of the values among those that the shape leaves
    open, by name in the head that goes upstream; behind them the new request id. `names`: all of that head.
    """

    __slots__ = ("_join_wire", "_order", "_parts", "_seen", "_wire", "join", "names", "own_id", "places")

    def __init__(self, outcome: Outcome, own_id: int, names: tuple[bytes, ...]) -> None:
        """`names`: whose values the shape leaves open."""
        self.varying = True
        lane = self.lane = outcome.lane
        self.generation = lane.manager.changes.n
        self.hooks = lane.chain.varying or ()
        self._seen = outcome.filtered.copy()  # by filters; the path is put in
        _guard(self._seen, names)
        self.bodied = outcome.finished.method in BODIED
        self.new_id = lane.manager.preparer.new_id if outcome.id else None
        self.own_id = own_id
        self.authority = outcome.filtered.authority
        self.peer = outcome.peer
        self.received = 0
        self.size = len(outcome.wire)  # about: values differ
        self.filtered: Any = _Template(outcome.filtered, outcome.marks)
        self.finished: Any = _Template(outcome.finished, outcome.marks)
        self.places = self.finished.places()
        fields = dict(outcome.finished.items)
        self.names = frozenset(fields)
        self.request_id = None if outcome.id or REQUEST_ID in self.places else fields.get(REQUEST_ID)
        count = len(outcome.marks) - bool(outcome.id)
        self._parts, self._order = gaps.cut_fields(all_fields(outcome.finished), outcome.marks)
        self.join = gaps.joiner(self._order, count, lengths=True)
        self._wire, order = gaps.cut_wire(outcome.wire, outcome.marks)
        self._join_wire = gaps.joiner(order, count, lengths=False)

    def block(self, encoder: Encoder, known: Shaped, request_id: bytes) -> bytes:
        """The header block that goes upstream over HTTP/2."""
        parts = encoder.parts.get(self) or encoder.encode_parts(self, self._parts)
        join = self.join
        try:
            return join(parts, known.values, request_id)
        except IndexError:  # one of them is long
            return gaps.join_long(parts, [*known.values, request_id], self._order)

    def wire(self, known: Shaped, request_id: bytes) -> bytes:
        """HOT: the head that goes upstream over HTTP/1."""
        join = self._join_wire
        return join(self._wire, known.values, request_id)

    def _run_hooks(self, stream: PlannedStream) -> bool:
        """HOT: as `Plan._run_hooks`, with filters that look."""
        chain = self.lane.chain
        at = -1
        head = stream.request = self._seen
        head.path = stream.known.path
        for hook in self.hooks:
            at += 1
            try:
                result = hook(stream)
            except Varies:
                for plans in stream.known.shape.plans.values():
                    if plans is not None:
                        plans.drop(self)
                stream.leave_plan()  # with a head of its own
                result = chain.request_headers[chain.positions[at] - 1](stream, not stream.body)
            if result is not None:
                if stream.__class__ is PlannedStream:
                    stream.leave_plan()
                stream._hold_headers(result, chain.positions[at], not stream.body)
                return False
        if stream.__class__ is PlannedStream:
            del stream.request
            return True
        if not stream.ended:
            stream.forward(not stream.body)
        return False

    def head(self, stream: PlannedStream, template: Any) -> RequestHead:
        """See `Plan.head`."""
        head: RequestHead = template.head([*stream.known.values, stream.request_id] if self.new_id is not None else stream.known.values)
        return head


class _Template:
    """A request head without its values."""

    __slots__ = ("_head", "_path", "_places")

    def __init__(self, head: RequestHead, marks: list[bytes]) -> None:
        self._head = head
        self._path = marks.index(head.path) if head.path in marks else -1
        self._places = [(at, marks.index(value)) for at, (_, value) in enumerate(head.items) if value in marks]

    def places(self) -> dict[bytes, int]:
        """The place of the value, by name."""
        places = {self._head.items[at][0]: place for at, place in self._places}
        if self._path >= 0:
            places[_PATH] = self._path
        return places

    def head(self, values: Sequence[bytes]) -> RequestHead:
        """An independent head with these values."""
        of = self._head
        items = of.items.copy()
        for at, place in self._places:
            items[at] = items[at][0], values[place]
        path = of.path if self._path < 0 else values[self._path]
        return RequestHead(of.method, path, of.authority, items, scheme=of.scheme, version=of.version)


class Outcome:
    """What became of a head with marks in the place of its values, and then of the new request id if there is one."""

    __slots__ = ("filtered", "finished", "id", "lane", "marks", "peer", "wire")

    lane: Lane
    id: bytes  # the generated request id; empty where none is generated
    marks: list[bytes]
    peer: Any  # observe.peers.Peer, None
    filtered: RequestHead  # as filters see it
    finished: RequestHead  # as it goes upstream
    wire: bytes

    def but_id(self) -> list[bytes]:
        """The head on the wire, in pieces around the request id."""
        return self.wire.split(self.id) if self.id else [self.wire]


class _Pathless(RequestHead):
    """A head whose path nobody may read or change."""

    __slots__ = ()

    @property
    def path(self) -> bytes:
        raise Varies(_PATH)

    @path.setter
    def path(self, value: bytes) -> None:
        raise Varies(_PATH)


def _make_plan(manager: HttpConnectionManager, route: Route | None, known: Shaped, additions: Any) -> ShapedPlan | None:
    try:
        first = _try_out(manager, route, known, additions)
        # Once more: what comes out differently is no plan.
        second = None if first is None else _try_out(manager, route, known, additions)
    except Varies:
        return None
    if first is None or second is None or first.but_id() != second.but_id() or first.lane is not second.lane:
        return None
    names = known.shape.names
    return ShapedPlan(first, names.index(REQUEST_ID) if REQUEST_ID in names and not first.id and additions.generates_id else -1, names)


def _try_out(manager: HttpConnectionManager, route: Route | None, known: Shaped, additions: Any) -> Outcome | None:
    """As `http.plan`'s, for all requests of a shape. Raises Varies."""
    outcome = Outcome()
    names = known.shape.names
    marks = outcome.marks = [b"<value %d>" % place for place in range(len(names))]
    marked = dict(zip(names, marks, strict=True))
    head = _copy(known.head(), marked)
    path = marked.get(_PATH, head.path)
    before = head.get(REQUEST_ID)
    scratch = Stream.__new__(Stream)
    manager.complete_head(scratch, head, additions)
    value = head.get(REQUEST_ID)
    outcome.id = b"" if value is None or value == before else value
    if outcome.id:
        marks.append(outcome.id)
    head.path = path
    outcome.peer = None
    outcome.filtered = head.copy()
    head.__class__ = _Pathless
    guarded = _guard(head, names)
    method = head.method
    lane = manager.lane(route, head, scratch.is_internal) if method in METHODS or method in BODIED else None
    if lane is None or lane.chain.varying is None or not _CONTROL.isdisjoint(guarded):
        return None
    if method in BODIED and known.length < 0 and not lane.cluster.speaks_http2(head.version):
        return None  # HTTP/1 would have to frame the body
    if lane.chain.shaper is not None:
        outcome.peer = lane.chain.shaper.shape_request(head, lane.cluster)
        outcome.filtered.items = head.items.copy()
    if lane.route.expected_timeout is not None and not manager.router.suppress:
        head.add(timeouts.EXPECTED, lane.route.expected_timeout)
    if lane.route.include_attempt_count_in_request:
        head.set(ATTEMPT_COUNT, b"1")
    if lane.route.finalize_request is not None:
        probe = Probe()
        probe.request = head
        lane.route.finalize_request(probe)  # type: ignore[arg-type]
    head.__class__ = RequestHead
    outcome.lane = lane
    if lane.scheme is not None:
        head.scheme = lane.scheme
    outcome.finished = head
    outcome.wire = encode_request_head(head.method, head.path, head.authority, head.items)
    return outcome if all(outcome.wire.count(mark) <= 1 for mark in marks) else None


def _copy(head: RequestHead, values: dict[bytes, bytes] | None = None) -> RequestHead:
    """An independent head that can be `complete`d. `values`: instead of those that it has."""
    items = head.items.copy() if values is None else [(name, values.get(name, value)) for name, value in head.items]
    return RequestHead(head.method, head.path, head.authority, items, dict(reversed(items)), scheme=head.scheme, version=head.version)
