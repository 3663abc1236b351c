"""Plans: requests whose heads repeat, without parsing, routing and encoding them again.

Most clients send the same few heads over and over. When a head that asks nothing special is seen for the second time, `make` takes it once through what
every such request goes through (forwarded headers, route, chain, header mutations) and writes down the outcome: a `Plan`, which holds the bytes that go
upstream, but for the request id. `Plan.start` is the way of a request that has one; its stream is a `PlannedStream`, which knows little more than its plan.

Nothing here decides anything that the general way would decide otherwise. Two things see to that:

- A plan is made by running the general code on a stand-in for the stream (`_Probe`) that has a request head and nothing else. Whatever looks at something
  that could be different the next time (the request id, random numbers, runtime, certificates, metadata) makes the attempt fail, and there is no plan.
- A planned stream is an ordinary `Stream` of which most attributes have not been set. Whoever reads one of those (a filter, a reset, a timeout, an access
  log, a response that is not planned) turns it into what it would have been on the general way (`PlannedStream._become_ordinary`), and goes on from there.

Counters that follow from how often a plan was used are settled when statistics are collected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec import h1
from meshproxy.codec.headers import Pair, RequestHead, ResponseHead
from meshproxy.http import retry, timeouts
from meshproxy.http.route import Route
from meshproxy.http.router import Forwarding
from meshproxy.http.stream import Stream

if TYPE_CHECKING:
    from meshproxy.codec.h1 import KnownRequest, KnownResponse
    from meshproxy.http.connection import ServerConnection
    from meshproxy.http.filter_chain import Chain
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.request_head import Additions
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.pool import Http1Connection

MAX_PLANS = 512  # of one connection manager
MAX_PER_HEAD = 16  # plans of one head: clients at so many addresses
_MAX_RESPONSES = 16  # of one plan

_ID = b"x-request-id"
_SERVICE_TIME = b"x-envoy-upstream-service-time"
_METHODS = frozenset((b"GET", b"DELETE", b"TRACE"))  # without a body, and the response has one
_NEW = object.__new__

# Where a planned stream is: its filters run; its request has gone upstream; its response has gone downstream.
_FILTERS, _UPSTREAM, _DONE = range(3)


class Plan:
    """What every repetition of a request head comes to, for clients that get the same additions."""

    __slots__ = (
        "after",
        "before",
        "chain",
        "cluster",
        "generation",
        "head_bytes",
        "hooks",
        "internal",
        "manager",
        "new_id",
        "outlier",
        "prepared",
        "priority",
        "queue",
        "queue_per_try",
        "request_id",
        "responses",
        "route",
        "sent",
        "size",
        "started",
        "watched",
    )

    def __init__(self, manager: HttpConnectionManager, head_bytes: int, outcome: _Outcome) -> None:
        route, cluster = outcome.route, outcome.cluster
        self.manager = manager
        self.generation: int = manager.changes.n
        self.route = route
        self.priority = route.priority
        self.chain: Chain = outcome.chain
        self.hooks = outcome.chain.repeated
        self.cluster: Cluster = cluster
        self.outlier = cluster.outlier
        self.queue = manager.router.timeout_queue(route.timeout) if route.timeout else None
        self.queue_per_try = manager.router.per_try_queue(route.per_try_timeout) if route.per_try_timeout else None
        self.internal = outcome.internal
        self.watched = bool(manager.logs or outcome.chain.complete)
        self.head_bytes = head_bytes
        self.prepared = _Template(outcome.prepared, outcome.id)  # the head as filters see it
        self.sent = _Template(outcome.sent, outcome.id)  # the head as it goes upstream
        self.new_id = manager.preparer.new_id if outcome.id else None
        self.request_id = outcome.prepared.get(_ID)  # where none is generated
        before, _, after = outcome.wire.partition(outcome.id) if outcome.id else (outcome.wire, b"", b"")
        self.before: bytes = before
        self.after: bytes = after
        self.size = len(outcome.wire)
        self.responses: dict[KnownResponse, PlannedResponse] = {}
        self.started = 0  # requests that went upstream, since `settle`

    def start(self, codec: ServerConnection) -> None:
        """HOT: a request, in place of `ServerConnection.on_known`. The connection is ready, and its filters let this head pass before."""
        stream = codec.stream = _NEW(PlannedStream)
        stream.plan = self
        stream.codec = codec
        stream.manager = manager = self.manager
        stream.connection = codec.info
        stream.start = stream.last_active = now = manager.clock()
        stream.stage = _FILTERS
        if self.hooks and not self._run_hooks(stream):
            return
        host = self.cluster.pick(None)
        pools = None if host is None else host.pools
        pool = None if pools is None else pools.get(self.priority)
        if pool is None or not pool.idle or pool.limits.rq >= pool.limits.max_rq:
            stream._become_ordinary()
            stream.forward(True, host)
            return
        connection = pool.idle.pop()
        connection.request = connection.planned = stream
        connection.served += 1
        pool.limits.rq += 1
        host.rq_total += 1  # type: ignore[union-attr]  # there is a pool, so there is a host
        host.rq_active += 1  # type: ignore[union-attr]
        stream.connected = connection
        stream.stage = _UPSTREAM
        queue = self.queue
        if queue is not None:
            if queue.handle is None:
                queue.start(stream, now)
            else:
                queue.started[stream] = now
        queue = self.queue_per_try
        if queue is not None:
            if queue.handle is None:
                queue.start(stream, now)
            else:
                queue.started[stream] = now
        self.started += 1
        new_id = self.new_id
        if new_id is None:
            connection.transport.write(self.before)
        else:
            stream.request_id = request_id = new_id()
            connection.transport.write(self.before + request_id + self.after)

    def _run_hooks(self, stream: PlannedStream) -> bool:
        """HOT: the filters; False when the request took another way."""
        for position, hook in enumerate(self.hooks, 1):
            result = hook(stream)
            if result is not None:
                stream._hold_headers(result, position, True)
                return False
        if stream.__class__ is PlannedStream:
            return True
        if not stream.ended:
            stream.forward(True)
        return False

    def respond(self, stream: PlannedStream, connection: Http1Connection, known: KnownResponse, data: bytes, end: int) -> bool:
        """HOT: a whole response, `data`, whose head ends at `end`. False, and nothing done, when it has to go the general way."""
        response = self.responses.get(known) or self._learn(known)
        if response is None:
            return False
        manager = self.manager
        codec = stream.codec
        pool = connection.pool
        host = pool.host
        if codec.closing or self.generation != manager.changes.n or host.canary or host.zone_stat:
            return False
        now = manager.clock()
        if now >= manager.next_second:
            manager.tick(now)
        queue = self.queue
        if queue is not None:
            del queue.started[stream]
        queue = self.queue_per_try
        if queue is not None:
            del queue.started[stream]
        # The connection first: it may serve the next request.
        connection.request = connection.planned = None
        connection.idle_since = now
        pool.limits.rq -= 1
        host.rq_active -= 1
        if response.success:
            host.rq_success += 1
        else:
            host.rq_error += 1
        if self.outlier is not None:
            self.outlier.result(host, known.status)
        if pool.pending or pool.special:
            pool.release(connection)
        else:
            pool.idle.append(connection)
        stream.stage = _DONE
        start = stream.start
        milliseconds = int((now - start) * 1000)
        times = response.times
        try:
            times[milliseconds] += 1
        except KeyError:
            times[milliseconds] = 1
        codec.stream = None
        codec.idle_since = now
        service_time = (_TIMES[milliseconds] if milliseconds < 1000 else b"%d" % milliseconds) if response.timed else b""
        codec.transport.write(
            b"".join(
                (
                    response.before,
                    service_time,
                    response.between,
                    manager.date if response.dated else b"",
                    response.after,
                    data[end:],
                )
            )
        )
        if self.watched:
            stream.end = now
            stream.answer = response, known, milliseconds
            request_id = self.request_id if self.new_id is None else stream.request_id
            stated = service_time if response.timed else known.index.get(_SERVICE_TIME)
            stream.facts = response, codec.info, host, request_id, stated, start, now, start + manager.wall_offset
            manager.watch(stream, self.chain)
        if codec.parser.buffer:
            codec.go_on()
        else:
            codec.ready = True
        return True

    def _learn(self, known: KnownResponse) -> PlannedResponse | None:
        if known.status >= 400 and self.route.retry is not None:
            return None
        response = _plan_response(self, known)
        if response is not None:
            if len(self.responses) >= _MAX_RESPONSES:
                self.manager.settle()
                self.responses.clear()
            self.responses[known] = response
        return response

    def settle(self) -> int:
        """Count what was done since the last call. Returns how many requests began."""
        manager, stats = self.manager, self.cluster.stats
        started, self.started = self.started, 0
        manager.stats.downstream_cx_rx_bytes_total.n += started * self.head_bytes
        manager.router.rq_total.n += started
        stats.upstream_cx_tx_bytes_total.n += started * self.size
        stats.upstream_rq_total.n += started
        for known, response in self.responses.items():
            if response.times:
                response.settle(self, known)
        return started


class PlannedResponse:
    """A response head as it goes downstream, cut where the service time and the date stand, and how long the responses that had it took."""

    __slots__ = ("after", "before", "between", "dated", "items", "success", "timed", "times")

    def __init__(self, before: bytes, between: bytes, after: bytes, items: list[Pair], *, timed: bool, dated: bool, success: bool) -> None:
        self.before = before
        self.between = between
        self.after = after
        self.items = items  # with marks in the place of the service time and the date
        self.timed = timed
        self.dated = dated
        self.success = success
        self.times: dict[int, int] = {}  # milliseconds -> responses, since `settle`

    def settle(self, plan: Plan, known: KnownResponse) -> None:
        """Count the responses since the last call."""
        manager, stats = plan.manager, plan.cluster.stats
        times = self.times.copy()
        self.times.clear()
        count = sum(times.values())
        sent = count * (len(self.before) + len(self.between) + len(self.after) + known.length + (len(manager.date) if self.dated else 0))
        if self.timed:
            sent += sum(len(str(milliseconds)) * n for milliseconds, n in times.items())
        manager.stats.downstream_cx_tx_bytes_total.n += sent
        stats.upstream_cx_rx_bytes_total.n += count * (known.size + known.length)
        stats.charge_many(known.status, plan.internal, times)
        manager.stats.downstream_rq_time.count(times)
        manager.count_responses(known.status, count)


class _Template:
    """A request head without its id."""

    __slots__ = ("_at", "_head")

    def __init__(self, head: RequestHead, request_id: bytes) -> None:
        self._head = head
        self._at = head.items.index((_ID, request_id)) if request_id else -1

    def head(self, request_id: bytes) -> RequestHead:
        """An independent head with that id; empty: the one that it was made with."""
        of = self._head
        items = of.items.copy()
        if request_id:
            items[self._at] = _ID, request_id
        return RequestHead(of.method, of.path, of.authority, items, scheme=of.scheme)


class PlannedStream(Stream):
    """A stream on its plan's way; see the module's docstring. Only `Plan` sets its attributes."""

    __slots__ = ()

    plan: Plan
    stage: int
    connected: Http1Connection
    request_id: bytes
    answer: tuple[PlannedResponse, KnownResponse, int]
    facts: tuple[Any, ...]

    def __getattr__(self, name: str) -> Any:
        """Somebody asks for what the plan's way does not set: be an ordinary stream from here on."""
        self._become_ordinary()
        return getattr(self.forwarding if name in _OF_ATTEMPTS else self, name)

    def leave_plan(self) -> None:
        """The response is not one that a plan can deal with."""
        self._become_ordinary()

    def _become_ordinary(self) -> None:
        """What it would be on the general way, wherever it is."""
        stage, plan = self.stage, self.plan
        self.__class__ = Stream  # type: ignore[assignment]
        for name, value in _UNSET:
            setattr(self, name, value)
        self.request_ended = True
        self.request_end = self.start
        self.route, self.chain, self.is_internal = plan.route, plan.chain, plan.internal
        if stage == _FILTERS:
            self.request = plan.prepared.head(plan.new_id() if plan.new_id is not None else b"")
            self.manager.rq_started += 1
            self.manager.stats.downstream_cx_rx_bytes_total.n += plan.head_bytes
            self.codec.parser.state = h1.DONE
            return
        self.request = plan.sent.head(self.request_id if plan.new_id is not None else b"")
        self.cluster = plan.cluster
        self._upstream = self.connected
        self.host = self.connected.host
        self.upstream_start = self.upstream_sent = self.start
        self.upstream_bytes_sent = plan.size
        self.attempts = 1
        if stage == _UPSTREAM:
            self.codec.parser.state = h1.DONE
            self.forwarding = Forwarding.under_way(plan.manager.router, self, self.connected, plan.queue, plan.queue_per_try)
            return
        response, known, milliseconds = self.answer
        self.ended = self.response_started = True
        self.details = "via_upstream"
        self.status = known.status
        self.bytes_sent = known.length
        self.upstream_bytes_received = known.size + known.length
        self.upstream_first = self.upstream_last = self.response_start = self.end
        time = b"%d" % milliseconds if response.timed else b""
        date = self.manager.date if response.dated else b""
        items = [(name, time if value is _TIME_MARK else date if value is _DATE_MARK else value) for name, value in response.items]
        self.response = ResponseHead(known.status, items, reason=known.reason)


# Unset: the attributes of a stream that the plan's way never sets, with the values that they have on the general way before anything happens.
_UNSET = tuple(
    {
        **dict.fromkeys(
            ("_request_hold", "_response_hold", "_timers", "_upstream", "cluster", "details", "facts", "forwarding", "host", "response", "upgrade")
        ),
        **dict.fromkeys(("attempts", "bytes_received", "bytes_sent", "flags", "status"), 0),
        **dict.fromkeys(("upstream_bytes_received", "upstream_bytes_sent"), 0),
        **dict.fromkeys(("upstream_start", "upstream_sent", "upstream_first", "upstream_last", "response_start"), 0.0),
        **dict.fromkeys(("close_connection", "ended", "response_started", "tunnel"), False),
    }.items()
)
_OF_ATTEMPTS = frozenset(name for name in dir(Forwarding) if name.startswith("on_")) | {"stream"}
_TIMES = [b"%d" % milliseconds for milliseconds in range(1000)]


# -- making plans


def make(manager: HttpConnectionManager, known: KnownRequest, additions: Additions) -> Plan | None:
    """The plan for a head that is plain (see `RequestHeadPreparer.is_plain`); None when such requests are not all alike, or need more than a plan can do."""
    if known.method not in _METHODS or not manager.plannable:
        return None
    first = _try_out(manager, known, additions)
    # Once more: what comes out differently is no plan.
    second = None if first is None else _try_out(manager, known, additions)
    if first is None or second is None or first.but_id() != second.but_id() or first.route is not second.route:
        return None
    return Plan(manager, known.size, first)


class _Varies(Exception):
    """Something looked at what a plan cannot tell."""


class _Probe:
    """Stands in for a stream: it has a head, and nothing else is known of it."""

    __slots__ = ("request", "response")

    request: RequestHead
    response: ResponseHead
    tunnel = echoes_request_id = False  # or there would be no plan

    def __getattr__(self, name: str) -> Any:
        raise _Varies(name)


class _GuardedIndex(dict[bytes, bytes]):
    """The index of a probe's head. The request id is another one each time: nobody may read it."""

    __slots__ = ()

    def get(self, name: bytes, default: Any = None) -> Any:
        if name == _ID:
            raise _Varies(name)
        return dict.get(self, name, default)

    def __getitem__(self, name: bytes) -> bytes:
        if name == _ID:
            raise _Varies(name)
        return dict.__getitem__(self, name)

    def __contains__(self, name: object) -> bool:
        if name == _ID:
            raise _Varies(name)
        return dict.__contains__(self, name)


class _Outcome:
    """What became of a probe."""

    __slots__ = ("chain", "cluster", "id", "internal", "prepared", "route", "sent", "wire")

    route: Route
    chain: Chain
    cluster: Cluster
    internal: bool
    id: bytes  # the generated request id; empty where none is generated
    prepared: RequestHead
    sent: RequestHead
    wire: bytes

    def but_id(self) -> list[bytes]:
        """The head on the wire, in pieces around the request id."""
        return self.wire.split(self.id) if self.id else [self.wire]


def _try_out(manager: HttpConnectionManager, known: KnownRequest, additions: Additions) -> _Outcome | None:
    outcome = _Outcome()
    head = RequestHead(known.method, known.path, known.authority, known.items.copy(), known.index.copy(), scheme=known.scheme)
    given = known.index.get(_ID)
    scratch = Stream.__new__(Stream)
    manager.complete_head(scratch, head, additions)
    outcome.internal = scratch.is_internal
    value = head.get(_ID)
    outcome.id = b"" if value is None or value == given else value
    outcome.prepared = head.copy()
    probe = _Probe()
    probe.request = head
    guarded = head._index = _GuardedIndex(dict(reversed(head.items)))
    try:
        route = manager.match(probe)  # type: ignore[arg-type]
        if route is None or not _is_plannable(manager, route, guarded):
            return None
        chain = manager.chains.get(route) or manager.compile_chain(route)
        cluster = manager.router.clusters.get(route.cluster_name or "")
        if cluster is None or not chain.plannable or not cluster.plannable:
            return None
        if route.expected_timeout is not None and not manager.router.suppress:
            head.add(timeouts.EXPECTED, route.expected_timeout)
        if route.finalize_request is not None:
            route.finalize_request(probe)  # type: ignore[arg-type]
    except _Varies:
        return None
    outcome.route, outcome.chain, outcome.cluster = route, chain, cluster
    outcome.sent = head.copy()
    outcome.wire = h1.encode_request_head(head.method, head.path, head.authority, head.items)
    return outcome if not outcome.id or outcome.wire.count(outcome.id) == 1 else None


def _is_plannable(manager: HttpConnectionManager, route: Route, index: dict[bytes, bytes]) -> bool:
    """Whether requests of the route need nothing that the plan's way does not do."""
    return bool(
        route.reply is None
        and route.cluster_name
        and not route.careful
        and not route.needs_lb_context
        and not route.mirrors
        and not route.include_attempt_count_in_request
        and not route.include_attempt_count_in_response
        and route.max_grpc_timeout_ms is None
        and timeouts.CONTROL_HEADERS.isdisjoint(index)
        and retry.REQUEST_HEADERS.isdisjoint(index)
        and not manager.router.strict
    )


_TIME_MARK = b"<service time>"
_DATE_MARK = b"<date>"


def _plan_response(plan: Plan, known: KnownResponse) -> PlannedResponse | None:
    manager, route = plan.manager, plan.route
    timed = not manager.router.suppress
    items = known.items
    if not _SPECIAL_RESPONSE.isdisjoint(known.index):
        return None
    written = []
    for _ in range(2):
        head = ResponseHead(known.status, items.copy(), known.index.copy(), reason=known.reason)
        if timed:
            head.set(_SERVICE_TIME, _TIME_MARK)
        probe = _Probe()
        probe.request = plan.sent.head(b"")
        probe.request._index = _GuardedIndex(dict(reversed(probe.request.items)))
        probe.response = head
        try:
            if route.finalize_response is not None:
                route.finalize_response(probe)  # type: ignore[arg-type]
            manager.finish_response_head(probe, head, (b"date", _DATE_MARK))  # type: ignore[arg-type]
        except _Varies:
            return None
        written.append(head.items)
    if written[0] != written[1]:
        return None
    items = written[0]
    wire = h1.encode_response_head(known.status, items, known.reason if manager.keeps_reason else None)
    dated = wire.count(_DATE_MARK) == 1
    if wire.count(_TIME_MARK) != timed or wire.count(_DATE_MARK) > 1:
        return None
    before, _, rest = wire.partition(_TIME_MARK) if timed else (b"", b"", wire)
    between, _, after = rest.partition(_DATE_MARK) if dated else (rest, b"", b"")
    if _DATE_MARK in before:
        return None
    return PlannedResponse(before, between, after, items, timed=timed, dated=dated, success=known.status < 500)


# Responses with these change more than the response.
_SPECIAL_RESPONSE = frozenset((b"x-envoy-upstream-canary", b"x-envoy-immediate-health-check-fail", b"grpc-status"))
