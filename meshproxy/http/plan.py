"""Lanes and plans: the short way of a request that came whole, and the shorter one of a request whose head was seen before.

A **lane** (`Lane`) is what all such requests of one route have in common: cluster, filters, timeouts, and the response heads of its upstreams as they go
downstream. Most clients also send the same few heads over and over. When a head is seen for the second time, `make_plan` takes it once through what every
such request goes through (forwarded headers, route, header mutations) and writes down the outcome: a `Plan`, which holds the bytes that go upstream, but for
the request id. `start` and `Plan.start` are the ways in, `Lane.respond` is the way back.

Nothing here decides anything that the general way (`http.stream`, `http.router`) would decide otherwise. Two things see to that:

- Lanes and plans are made by running the general code on a stand-in for the stream (`_Probe`) that has a head and nothing else. Whatever looks at something
  that could be different the next time (the request id, random numbers, certificates, metadata) makes the attempt fail, and there is no plan.
- A `PlannedStream` is an ordinary `Stream` of which most attributes have not been set. Whoever reads one of those (a filter, a reset, a timeout, an access
  log, a response that is not planned) turns it into what it would have been on the general way (`PlannedStream.leave_plan`), and goes on from there.

Counters that follow from how often a lane or a plan was used are settled when statistics are collected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.encode import encode_request_head, encode_response_head
from meshproxy.codec.h1.parser import DONE, HEAD
from meshproxy.codec.headers import Pair, RequestHead, ResponseHead
from meshproxy.http import retry, timeouts
from meshproxy.http.filter_chain import EMPTY
from meshproxy.http.forwarding import Forwarding
from meshproxy.http.stream import Stream

if TYPE_CHECKING:
    from meshproxy.codec.h1.request import KnownRequest
    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.http.connection import ServerConnection
    from meshproxy.http.filter_chain import Chain
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.request_head import Additions
    from meshproxy.http.route import Route
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.http1 import Http1Connection

MAX_PLANS = 512  # of one connection manager
MAX_PER_HEAD = 16  # plans of one head: clients at so many addresses
_MAX_RESPONSES = 64  # planned, of one connection manager
_MAX_OWN_RESPONSES = 4  # of one lane, whose route changes responses; they rarely outlast a second, for most have a date

_ID = b"x-request-id"
_SERVICE_TIME = b"x-envoy-upstream-service-time"
_METHODS = frozenset((b"GET", b"DELETE", b"TRACE"))  # of requests without a body whose responses have one
_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH", b"GET", b"DELETE"))
_CONTROL = timeouts.CONTROL_HEADERS
_NEW = object.__new__
_TIMES = [b"%d" % milliseconds for milliseconds in range(1000)]

# Where a planned stream is: its filters run; its request has gone upstream; its response has gone downstream.
_FILTERS, _UPSTREAM, _ANSWERED = range(3)


class Lane:
    """What requests of one route have in common that come from clients of one sort (internal or not)."""

    __slots__ = (
        "_planned",
        "body_limit",
        "chain",
        "cluster",
        "internal",
        "manager",
        "outlier",
        "priority",
        "queue",
        "queue_per_try",
        "responses",
        "retired",
        "route",
        "tally",
        "watched",
    )

    def __init__(self, manager: HttpConnectionManager, route: Route, chain: Chain, cluster: Cluster, *, internal: bool) -> None:
        self.manager = manager
        self.route = route
        self.priority = route.priority
        self.chain = chain
        # Filters that look at bodies see them on the general way.
        self.body_limit = -1 if chain.request_data else min(manager.buffer_limit, route.buffer_limit)
        self.cluster = cluster
        self.outlier = cluster.outlier
        self.queue = manager.router.timeout_queue(route.timeout) if route.timeout else None
        self.queue_per_try = manager.router.per_try_queue(route.per_try_timeout) if route.per_try_timeout else None
        self.internal = internal
        self.watched = bool(manager.logs or chain.complete)
        self.retired = False  # something changed: what is still on its way goes the general way back
        # Responses as they go downstream, and tallies: the same for all routes that do not change responses.
        if route.finalize_response is None:
            self._planned = manager.planned_responses
            key = cluster, internal, None if route.retry is None else route.retry.from_status
            self.tally: Tally = manager.tallies.get(key) or manager.tallies.setdefault(key, Tally(manager, cluster, internal=internal))
        else:
            self._planned = {}
            self.tally = Tally(manager, cluster, internal=internal)
        self.responses = self.tally.responses

    def forward(self, stream: PlannedStream) -> None:
        """HOT: send a request whose filters are done."""
        route = self.route
        head = stream.request
        index = head._index  # type: ignore[union-attr]
        body = stream.body
        if index is None or not _CONTROL.isdisjoint(index):
            stream.leave_plan()
            stream.forward(not body)
            return
        expected = route.expected_timeout
        if expected is not None and not self.manager.router.suppress:
            index[timeouts.EXPECTED] = expected
            head.items.append((timeouts.EXPECTED, expected))  # type: ignore[union-attr]
        if route.finalize_request is not None:
            route.finalize_request(stream)
        host = self.cluster.pick(None)
        pools = None if host is None else host.pools
        pool = None if pools is None else pools.get(self.priority)
        if pool is None or not pool.ready or pool.limits.rq >= pool.limits.max_rq or stream.__class__ is not PlannedStream:
            if stream.__class__ is PlannedStream:
                stream.leave_plan()
            stream.forward(not body, host, finalized=True)
            return
        out = encode_request_head(head.method, head.path, head.authority, head.items)  # type: ignore[union-attr]
        if body:
            out += body
        self.tally.sent += len(out)
        stream.upstream_bytes_sent = len(out)
        self.send(stream, host, pool, out)

    def send(self, stream: PlannedStream, host: Any, pool: Any, out: bytes) -> None:
        """HOT: send a request's head on an idle connection of `pool`."""
        connection = pool.ready.pop()
        connection.request = connection.planned = stream
        connection.served += 1
        pool.limits.rq += 1
        host.rq_total += 1
        host.rq_active += 1
        stream.connected = connection
        stream.stage = _UPSTREAM
        queue = self.queue
        if queue is not None:
            if queue.handle is None:
                queue.start(stream, stream.start)
            else:
                queue.started[stream] = stream.start
        queue = self.queue_per_try
        if queue is not None:
            if queue.handle is None:
                queue.start(stream, stream.start)
            else:
                queue.started[stream] = stream.start
        tally = self.tally
        started = tally.started
        if not started:
            self.manager.busy.add(tally)
        tally.started = started + 1
        connection.transport.write(out)

    def respond(self, stream: PlannedStream, connection: Http1Connection, known: KnownResponse, data: bytes, end: int) -> bool:
        """HOT: a whole response, `data`, whose head ends at `end`. False, and nothing done, when it has to go the general way."""
        learnt = self.responses.get(known) or self._learn(known)
        if learnt is None:
            return False
        response, times = learnt
        manager = self.manager
        codec = stream.codec
        pool = connection.pool
        host = pool.host
        if codec.closing or self.retired or host.canary or host.zone_stat:
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
            pool.ready.append(connection)
        stream.stage = _ANSWERED
        start = stream.start
        milliseconds = int((now - start) * 1000)
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
            stream.answer = response, milliseconds
            stated = service_time if response.timed else known.index.get(_SERVICE_TIME)
            plan = stream.plan
            wall = start + manager.wall_offset
            if plan is None:
                body = stream.body
                kind = (self, response.kind, len(body)) if body else (self, response.kind)
                stream.facts = kind, False, codec.info, host, None, stated, start, now, wall
            else:
                request_id = plan.request_id if plan.new_id is None else stream.request_id
                stream.facts = (plan, response.kind), True, codec.info, host, request_id, stated, start, now, wall
            manager.watch(stream, self.chain)
        parser = codec.parser
        if parser.buffer:
            codec.go_on()
        else:
            parser.state = HEAD
            codec.ready = True
        return True

    def _learn(self, known: KnownResponse) -> tuple[PlannedResponse, dict[int, int]] | None:
        retries = self.route.retry
        if retries is not None and known.status >= retries.from_status:
            return None
        planned = self._planned
        response = planned.get(known)
        if response is None:
            response = _plan_response(self, known)
            if response is None:
                return None
            if len(planned) >= (_MAX_RESPONSES if planned is self.manager.planned_responses else _MAX_OWN_RESPONSES):
                planned.clear()
            planned[known] = response
        self.manager.busy.add(self.tally)
        learnt = self.responses[known] = response, {}
        return learnt


class Tally:
    """What is counted of the requests of one cluster, or of one lane whose route changes responses, until it is settled.

    Not by lane: with thousands of routes, most of those in use had one request since the last time.
    """

    __slots__ = ("cluster", "internal", "manager", "received", "responses", "sent", "started")

    def __init__(self, manager: HttpConnectionManager, cluster: Cluster, *, internal: bool) -> None:
        self.manager = manager
        self.cluster = cluster
        self.internal = internal
        # Responses, and how many took how many milliseconds.
        self.responses: dict[KnownResponse, tuple[PlannedResponse, dict[int, int]]] = {}
        # Requests that went upstream, the bytes of the heads of those that had plans, and of all heads as they went.
        self.started = self.received = self.sent = 0

    def settle(self) -> int:
        """Count what was done since the last call. Returns how many requests began."""
        started = self.started
        if started:
            manager, stats = self.manager, self.cluster.stats
            manager.stats.downstream_cx_rx_bytes_total.n += self.received
            manager.router.rq_total.n += started
            stats.upstream_cx_tx_bytes_total.n += self.sent
            stats.upstream_rq_total.n += started
            self.started = self.received = self.sent = 0
        if self.responses:
            for response, times in self.responses.values():
                response.settle(self, times)
            # Most responses have a date, and will not come again. To learn them anew from those that are planned costs next to nothing.
            self.responses.clear()
        return started


class _NoLane:
    """In place of the lane of a stream that has none (yet)."""

    route = None
    chain = EMPTY


_NO_LANE: Any = _NoLane()


class Plan:
    """What every repetition of a request head comes to, for clients that get the same additions."""

    __slots__ = ("after", "before", "filtered", "finished", "generation", "hooks", "lane", "new_id", "received", "request_id", "size")

    def __init__(self, lane: Lane, outcome: _Outcome, received: int) -> None:
        self.lane = lane
        self.generation: int = lane.manager.changes.n
        self.hooks = lane.chain.repeated
        self.filtered = _Template(outcome.filtered, outcome.id)
        self.finished = _Template(outcome.finished, outcome.id)
        self.new_id = lane.manager.preparer.new_id if outcome.id else None
        self.request_id = outcome.filtered.get(_ID)  # where none is generated
        before, _, after = outcome.wire.partition(outcome.id) if outcome.id else (outcome.wire, b"", b"")
        self.before: bytes = before
        self.after: bytes = after
        self.received = received
        self.size = len(outcome.wire)

    def start(self, codec: ServerConnection) -> None:
        """HOT: a request, in place of `ServerConnection.on_known`. The connection is ready, and its filters let this head pass before."""
        lane = self.lane
        stream = codec.stream = _NEW(PlannedStream)
        stream.plan = self
        stream.lane = lane
        stream.body = b""
        stream.codec = codec
        stream.manager = manager = lane.manager
        stream.connection = codec.info
        stream.start = stream.last_active = manager.clock()
        stream.stage = _FILTERS
        if self.hooks and not self._run_hooks(stream):
            return
        host = lane.cluster.pick(None)
        pools = None if host is None else host.pools
        pool = None if pools is None else pools.get(lane.priority)
        if pool is None or not pool.ready or pool.limits.rq >= pool.limits.max_rq:
            stream.leave_plan()
            stream.forward(True, host)
            return
        tally = lane.tally
        tally.received += self.received
        tally.sent += self.size
        new_id = self.new_id
        if new_id is None:
            lane.send(stream, host, pool, self.before)
        else:
            stream.request_id = request_id = new_id()
            lane.send(stream, host, pool, self.before + request_id + self.after)

    def _run_hooks(self, stream: PlannedStream) -> bool:
        """HOT: the filters; False when the request took another way."""
        position = 0
        for hook in self.hooks:
            position += 1  # noqa: SIM113  # enumerate costs more
            result = hook(stream)
            if result is not None:
                stream._hold_headers(result, position, True)
                return False
        if stream.__class__ is PlannedStream:
            return True
        if not stream.ended:
            stream.forward(True)
        return False


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


class PlannedResponse:
    """A response head as it goes downstream, cut where the service time and the date stand. `kind`: the same for all that differ in their date only."""

    __slots__ = ("after", "before", "between", "dated", "items", "kind", "known", "success", "timed")

    def __init__(self, known: KnownResponse, before: bytes, between: bytes, after: bytes, items: list[Pair], kind: object, *, timed: bool, dated: bool) -> None:
        self.known = known
        self.before = before
        self.between = between
        self.after = after
        self.items = items  # with marks in the place of the service time and the date
        self.timed = timed
        self.dated = dated
        self.success = known.status < 500
        self.kind = kind

    def head(self, time: bytes, date: bytes) -> ResponseHead:
        """The head with a service time and a date."""
        known = self.known
        items = [(name, time if value is _TIME_MARK else date if value is _DATE_MARK else value) for name, value in self.items]
        return ResponseHead(known.status, items, reason=known.reason)

    def settle(self, tally: Tally, times: dict[int, int]) -> None:
        """Count responses. `times`: milliseconds -> how many."""
        manager, stats, known = tally.manager, tally.cluster.stats, self.known
        count = sum(times.values())
        sent = count * (len(self.before) + len(self.between) + len(self.after) + known.length + (len(manager.date) if self.dated else 0))
        if self.timed:
            sent += sum(len(str(milliseconds)) * n for milliseconds, n in times.items())
        manager.stats.downstream_cx_tx_bytes_total.n += sent
        stats.upstream_cx_rx_bytes_total.n += count * (known.size + known.length)
        stats.charge_many(known.status, tally.internal, times)
        manager.stats.downstream_rq_time.count(times)
        manager.count_responses(known.status, count)


class PlannedStream(Stream):
    """A stream on the short way; see the module's docstring. Only this module sets its attributes."""

    __slots__ = ()

    protocol = "HTTP/1.1"  # to be asked is no reason to leave the plan

    lane: Lane
    plan: Plan | None
    body: bytes
    stage: int
    connected: Http1Connection
    request_id: bytes
    answer: tuple[PlannedResponse, int]
    facts: tuple[Any, ...] | None

    def __getattr__(self, name: str) -> Any:
        """Somebody asks for what the short way does not set: be an ordinary stream from here on."""
        self.leave_plan()
        return getattr(self.forwarding if name in _OF_ATTEMPTS else self, name)

    def leave_plan(self) -> None:
        """Become what it would be on the general way, wherever it is."""
        stage, lane, plan = self.stage, self.lane, self.plan
        # As in Stream.__init__; what those who make plans have set stays.
        self._request_hold = self._response_hold = self._timers = self.upgrade = self.forwarding = self.facts = None
        self.close_connection = self.tunnel = False
        self.flags = 0
        body = self.body
        if stage == _FILTERS and body:  # comes after the head
            self.bytes_received, self.request_ended, self.request_end = 0, False, 0.0
        else:
            self.bytes_received, self.request_ended, self.request_end = len(body), True, self.start
        if plan is not None:
            self.request = (plan.filtered if stage == _FILTERS else plan.finished).head(self._request_id(plan))
            self.route, self.chain, self.is_internal = lane.route, lane.chain, lane.internal
            self.upstream_bytes_sent = plan.size
        if stage == _FILTERS:
            self._before_sending(plan)
            self.__class__ = Stream  # type: ignore[assignment]
            return
        self.cluster = lane.cluster
        self._upstream = connected = self.connected
        self.host = connected.host
        self.upstream_start = self.upstream_sent = self.start
        self.attempts = 1
        if stage == _UPSTREAM:
            self._nothing_back()
            self.codec.parser.state = DONE
            self.__class__ = Stream  # type: ignore[assignment]
            self.forwarding = Forwarding.under_way(lane.manager.router, self, connected, body, lane.queue, lane.queue_per_try)
        else:
            self._finished()
            self.__class__ = Stream  # type: ignore[assignment]

    def _request_id(self, plan: Plan) -> bytes:
        if plan.new_id is None:
            return b""
        if self.stage == _FILTERS:
            self.request_id = plan.new_id()
        return self.request_id

    def _before_sending(self, plan: Plan | None) -> None:
        """The filters run; nothing was counted yet."""
        self.cluster = self.host = self._upstream = None
        self.attempts = self.upstream_bytes_sent = 0
        self.upstream_start = self.upstream_sent = 0.0
        self._nothing_back()
        self.manager.rq_started += 1
        if plan is not None:
            self.manager.stats.downstream_cx_rx_bytes_total.n += plan.received
            self.codec.parser.state = DONE

    def _nothing_back(self) -> None:
        self.response = self.details = None
        self.ended = self.response_started = False
        self.status = self.bytes_sent = self.upstream_bytes_received = 0
        self.upstream_first = self.upstream_last = self.response_start = 0.0

    def _finished(self) -> None:
        """The response went downstream: for those who want to know what it was."""
        response, milliseconds = self.answer
        known = response.known
        self.ended = self.response_started = True
        self.details = "via_upstream"
        self.status = known.status
        self.bytes_sent = known.length
        self.upstream_bytes_received = known.size + known.length
        self.upstream_first = self.upstream_last = self.response_start = self.end
        time = b"%d" % milliseconds if response.timed else b""
        date = self.manager.date if response.dated else b""
        self.response = response.head(time, date)


_OF_ATTEMPTS = frozenset(name for name in dir(Forwarding) if name.startswith("on_")) | {"stream"}


def start(codec: ServerConnection, known: KnownRequest, body: bytes, additions: Additions, now: float) -> PlannedStream:
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
    stream.stage = _FILTERS
    head = stream.request = known.head()
    manager.complete_head(stream, head, additions)
    route = stream.route = manager.match(stream)
    lane = manager.lane(route, head, stream.is_internal) if known.method in (_WITH_BODY if body else _METHODS) else None
    if body and lane is not None and len(body) > lane.body_limit:
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


# -- making lanes and plans


def make_lane(manager: HttpConnectionManager, route: Route | None, head: RequestHead, *, internal: bool) -> Lane | None:
    """The lane of a route; None when its requests need more than a lane does. `head`: of one of them."""
    if route is None or not route.cluster_name or not manager.plannable or not _is_plannable(route):
        return None
    chain = manager.chains.get(route) or manager.compile_chain(route)
    cluster = manager.router.clusters.get(route.cluster_name)
    if cluster is None or not chain.plannable or not cluster.plannable:
        return None
    if route.finalize_request is not None:
        probe = _Probe()
        probe.request = head.copy()
        try:
            route.finalize_request(probe)  # type: ignore[arg-type]
        except _Varies:
            return None
    return Lane(manager, route, chain, cluster, internal=internal)


def _is_plannable(route: Route) -> bool:
    return bool(
        route.reply is None
        and not route.careful
        and not route.needs_lb_context
        and not route.mirrors
        and not route.include_attempt_count_in_request
        and not route.include_attempt_count_in_response
        and route.max_grpc_timeout_ms is None
    )


def make_plan(manager: HttpConnectionManager, known: KnownRequest, additions: Additions) -> Plan | None:
    """The plan for a plain head; None when such requests are not all alike, or have no lane."""
    first = _try_out(manager, known, additions)
    # Once more: what comes out differently is no plan.
    second = None if first is None else _try_out(manager, known, additions)
    if first is None or second is None or first.but_id() != second.but_id() or first.lane is not second.lane:
        return None
    return Plan(first.lane, first, known.size)


class _Varies(Exception):
    """Something looked at what a plan cannot tell."""


class _Probe:
    """Stands in for a stream: it has the head that it was given, and nothing else is known of it."""

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

    __slots__ = ("filtered", "finished", "id", "lane", "wire")

    lane: Lane
    id: bytes  # the generated request id; empty where none is generated
    filtered: RequestHead  # as filters see it
    finished: RequestHead  # as it goes upstream
    wire: bytes

    def but_id(self) -> list[bytes]:
        """The head on the wire, in pieces around the request id."""
        return self.wire.split(self.id) if self.id else [self.wire]


def _try_out(manager: HttpConnectionManager, known: KnownRequest, additions: Additions) -> _Outcome | None:
    outcome = _Outcome()
    head = known.head()
    scratch = Stream.__new__(Stream)
    manager.complete_head(scratch, head, additions)
    value = head.get(_ID)
    outcome.id = b"" if value is None or value == known.index.get(_ID) else value
    outcome.filtered = head.copy()
    probe = _Probe()
    probe.request = head
    guarded = head._index = _GuardedIndex(dict(reversed(head.items)))
    try:
        route = manager.match(probe)  # type: ignore[arg-type]
        lane = manager.lane(route, head, scratch.is_internal) if known.method in _METHODS else None
        if lane is None or not _CONTROL.isdisjoint(guarded):
            return None
        if route.expected_timeout is not None and not manager.router.suppress:  # type: ignore[union-attr]
            head.add(timeouts.EXPECTED, route.expected_timeout)  # type: ignore[union-attr]
        if route.finalize_request is not None:  # type: ignore[union-attr]
            route.finalize_request(probe)  # type: ignore[union-attr,arg-type]
    except _Varies:
        return None
    outcome.lane = lane
    outcome.finished = head.copy()
    outcome.wire = encode_request_head(head.method, head.path, head.authority, head.items)
    return outcome if not outcome.id or outcome.wire.count(outcome.id) == 1 else None


_TIME_MARK = b"<service time>"
_DATE_MARK = b"<date>"


def _plan_response(lane: Lane, known: KnownResponse) -> PlannedResponse | None:
    manager, route = lane.manager, lane.route
    timed = not manager.router.suppress
    if not _SPECIAL_RESPONSE.isdisjoint(known.index):
        return None
    written = []
    for _ in range(2):
        head = ResponseHead(known.status, known.items.copy(), known.index.copy(), reason=known.reason)
        if timed:
            head.set(_SERVICE_TIME, _TIME_MARK)
        probe = _Probe()
        probe.response = head
        try:
            if route.finalize_response is not None:
                route.finalize_response(probe)  # type: ignore[arg-type]
            manager.finish_response_head(probe, head, (b"date", _DATE_MARK))  # type: ignore[arg-type]
        except _Varies:
            return None
        written.append(head.items)
    items = written[0]
    wire = encode_response_head(known.status, items, known.reason if manager.keeps_reason else None)
    if items != written[1] or wire.count(_TIME_MARK) != timed or wire.count(_DATE_MARK) > 1:
        return None
    before, _, rest = wire.partition(_TIME_MARK) if timed else (b"", b"", wire)
    dated = _DATE_MARK in wire
    between, _, after = rest.partition(_DATE_MARK) if dated else (rest, b"", b"")
    if _DATE_MARK in before:
        return None
    kinds = manager.response_kinds
    if len(kinds) >= _MAX_RESPONSES:
        kinds.clear()
    kind = kinds.setdefault((known.status, *(pair for pair in items if pair[0] != b"date")), object())
    return PlannedResponse(known, before, between, after, items, kind, timed=timed, dated=dated)


# Responses with these change more than the response.
_SPECIAL_RESPONSE = retry.RESPONSE_HEADERS | {b"x-envoy-upstream-canary", b"x-envoy-immediate-health-check-fail"}
