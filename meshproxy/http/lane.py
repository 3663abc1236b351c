"""What requests of one route have in common that come whole: see `http.plan`."""

from __future__ import annotations

from math import floor
from typing import TYPE_CHECKING, Any

from meshproxy.codec.grpc import is_content_type
from meshproxy.http import timeouts
from meshproxy.http.planned_response import MAX_RESPONSES, SERVICE_TIME, PlannedResponse, plan_response
from meshproxy.http.planned_stream import ANSWERED, UPSTREAM, PlannedStream
from meshproxy.http.probe import Probe, Varies
from meshproxy.http.retry import ATTEMPT_COUNT
from meshproxy.http.shaped_response import shape_response
from meshproxy.upstream.host import count_grpc

if TYPE_CHECKING:
    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.codec.h2.fields import KnownTrailers
    from meshproxy.codec.headers import RequestHead
    from meshproxy.codec.response_shape import ResponseShape
    from meshproxy.http.filter_chain import Chain
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.route import Route
    from meshproxy.upstream.cluster import Cluster

_MAX_OWN_RESPONSES = 4  # of one lane, whose route changes responses; they rarely outlast a second, for most have a date
_CONTROL = timeouts.CONTROL_HEADERS
_TIMES = [b"%d" % milliseconds for milliseconds in range(1000)]


class Lane:
    """What requests of one route have in common that come from clients of one sort (internal or not)."""

    __slots__ = (
        "_planned",
        "body_limit",
        "chain",
        "clock",
        "cluster",
        "grpc",
        "internal",
        "manager",
        "operation",
        "outlier",
        "pool_key",
        "queue",
        "queue_per_try",
        "responses",
        "retired",
        "route",
        "said",
        "scheme",
        "tally",
        "tracing",
        "version",
        "watched",
    )

    def __init__(
        self, manager: HttpConnectionManager, route: Route, chain: Chain, cluster: Cluster, *, internal: bool, version: int, grpc: bool, said: int = 0
    ) -> None:
        """`version`: of HTTP downstream, 11 or 20. `said`: what requests tell of their senders, where the chain's `shaper` wants to know."""
        self.grpc = grpc
        self.manager = manager
        self.clock = manager.clock
        self.version = version
        self.route = route
        self.pool_key = cluster.pool_key(route.priority, version)
        self.chain = chain
        # Filters that look at bodies see them on the general way.
        self.body_limit = -1 if chain.request_data else min(manager.buffer_limit, route.buffer_limit)
        self.cluster = cluster
        self.outlier = cluster.outlier
        self.queue = manager.router.timeout_queue(route.timeout) if route.timeout else None
        self.queue_per_try = manager.router.per_try_queue(route.per_try_timeout) if route.per_try_timeout else None
        self.internal = internal
        self.scheme: bytes | None = None  # that requests go upstream with, whatever theirs was
        shaper = chain.shaper
        self.said = 0 if shaper is None or shaper.skips(cluster) else said
        # What responses are told that the route is called, where requests are traced; None where they are not.
        tracing = manager.tracing
        self.operation = None if tracing is None else tracing.lane_operation(route)
        self.tracing = tracing
        self.watched = bool(manager.logs or chain.complete)
        self.retired = False  # something changed: what is still on its way goes the general way back
        # Responses as they go downstream, and tallies: the same for all routes that do not change responses.
        if route.finalize_response is None:
            shaped = shaper, self.said, self.operation, route.include_attempt_count_in_response
            self._planned = manager.planned_responses.setdefault((version, *shaped), {})
            key = cluster, internal, version, None if route.retry is None else route.retry.from_status, *shaped
            self.tally: Tally = manager.tallies.get(key) or manager.tallies.setdefault(key, Tally(manager, cluster, internal=internal, version=version))
        else:
            self._planned = {}
            self.tally = Tally(manager, cluster, internal=internal, version=version)
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
        if route.include_attempt_count_in_request:
            head.set(ATTEMPT_COUNT, b"1")  # type: ignore[union-attr]
        if route.finalize_request is not None:
            route.finalize_request(stream)
        if self.tracing is not None:
            self.tracing.begin_try(stream, head, 0.0)  # type: ignore[arg-type]  # it has begun as one that is traced
        host = self.cluster.pick(None)
        pools = None if host is None else host.pools
        pool = None if pools is None else pools.get(self.pool_key)
        if pool is None or not pool.ready or pool.limits.rq >= pool.limits.max_rq or stream.__class__ is not PlannedStream:
            if stream.__class__ is PlannedStream:
                stream.leave_plan()
            stream.forward(not body, host, finalized=True)
            return
        self.tally.sent += self.begin(stream, stream.codec, stream.start, host, pool).ask(head, body)

    def begin(self, stream: PlannedStream, codec: Any, now: float, host: Any, pool: Any) -> Any:
        """HOT: an exchange for a request that comes by `codec`, on a ready connection of `pool`. `Plan.start` does the same without this call."""
        pool.limits.rq += 1
        host.rq_total += 1
        host.rq_active += 1
        exchange = stream.connected = pool.ready[-1].begin_planned(stream)
        exchange.way = self, codec, now
        stream.stage = UPSTREAM
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
        tally = self.tally
        started = tally.started
        if not started:
            self.manager.busy.add(tally)
        tally.started = started + 1
        return exchange

    def respond(
        self,
        stream: PlannedStream,
        codec: Any,
        start: float,
        exchange: Any,
        known: KnownResponse | ResponseShape,
        body: bytes,
        trailers: KnownTrailers | None = None,
        values: tuple[bytes, ...] | None = None,
    ) -> bool:
        """HOT: a whole response, to the request of `codec` that came at `start`. False, and nothing done, when it has to go the general way.

        `values`: where `known` is the shape of its head.
        """
        learnt = self.responses.get(known) or self._learn(known, shaped=values is not None)
        if learnt is None:
            return False
        response, times = learnt
        manager = self.manager
        pool = exchange.pool
        host = pool.host
        if self.retired or host.canary or host.zone_stat or not codec.takes(len(body)) or (trailers is not None and self.version != 20):
            return False
        clock = self.clock
        now = clock()
        if now >= manager.next_second:
            manager.tick(now)
        queue = self.queue
        if queue is not None:
            del queue.started[stream]
        queue = self.queue_per_try
        if queue is not None:
            del queue.started[stream]
        pool.limits.rq -= 1
        host.rq_active -= 1
        if self.grpc and response.success:
            count_grpc(host, None if trailers is None else trailers.grpc_status)
        elif response.success:
            host.rq_success += 1
        else:
            host.rq_error += 1
        if self.outlier is not None:
            self.outlier.result(host, known.status)
        exchange.answered(now)  # the connection may serve the next request
        stream.stage = ANSWERED
        milliseconds = floor((now - start) * 1000)
        try:
            times[milliseconds] += 1
        except KeyError:
            times[milliseconds] = 1
        service_time = (_TIMES[milliseconds] if milliseconds < 1000 else b"%d" % milliseconds) if response.timed else b""
        codec.answer(response, service_time, body, trailers, now, values)
        if self.tracing is not None:
            plan = stream.plan
            self.tracing.count(None if plan is not None and plan.decided else stream.reason)
        if self.watched:
            stream.end = now
            size = len(body)
            plan = stream.plan
            asked = len(stream.body)
            stream.answer = response, milliseconds, size, trailers, self, plan, exchange, codec, asked, values
            stream.response_trailers = trailers  # that a stream has none is what its class says, and makes it no ordinary one
            stated = service_time if response.timed else known.index.get(SERVICE_TIME) if values is None else response.stated_time(values)  # type: ignore[attr-defined]
            if plan is not None and plan.decided:
                stream.request = plan.head(stream, plan.finished)
                if plan.peer is not None:
                    stream.downstream_peer = plan.peer
                stream.route, stream.chain, stream.is_internal = self.route, self.chain, self.internal
                plan.restore(stream)  # type: ignore[attr-defined]  # http.traced_plan.TracedPlan
                plan = stream.plan = None
            wall = start + manager.wall_offset
            kind: Any = self if plan is None else plan, response.kind
            if asked or trailers is not None:
                kind = *kind, asked, trailers and tuple(trailers.items)
            if values is not None and response.logged:  # type: ignore[attr-defined]  # a ShapedResponse
                kind = *kind, *[values[place] for place in response.logged]  # type: ignore[attr-defined]
            if plan is None:
                stream.facts = kind, False, codec.info, host, exchange, size, None, stated, start, now, wall
            else:
                request_id = plan.request_id if plan.new_id is None else stream.request_id
                stream.facts = kind, stream.known.values if plan.varying else True, codec.info, host, exchange, size, request_id, stated, start, now, wall
            manager.watch(stream, self.chain)
        return True

    def _learn(self, known: Any, *, shaped: bool) -> tuple[PlannedResponse, dict[int, int]] | None:
        retries = self.route.retry
        if retries is not None and known.status >= retries.from_status:
            return None
        if not self.grpc and self.version != 20 and is_content_type(known.index.get(b"content-type")):
            return None  # whether it is a success, its HTTP status does not say
        planned = self._planned
        if known in planned:
            response = planned[known]
        else:
            response = shape_response(self, known) if shaped else plan_response(self, known)
            if len(planned) >= (MAX_RESPONSES if self.route.finalize_response is None else _MAX_OWN_RESPONSES):
                planned.clear()
            planned[known] = response
        if response is None:
            return None
        self.manager.busy.add(self.tally)
        learnt = self.responses[known] = response, {}
        return learnt


class SchemeLane(Lane):
    """A lane of a connection manager whose requests get the scheme of the way upstream."""

    __slots__ = ()

    def __init__(self, *of: Any, **more: Any) -> None:
        super().__init__(*of, **more)
        self.scheme = b"http" if self.cluster.transport is None else b"https"

    def forward(self, stream: PlannedStream) -> None:
        """HOT: see `Lane.forward`."""
        stream.request.scheme = self.scheme  # type: ignore[union-attr]
        super().forward(stream)


class Tally:
    """What is counted of the requests of one cluster, or of one lane whose route changes responses, until it is settled.

    Not by lane: with thousands of routes, most of those in use had one request since the last time.
    """

    __slots__ = ("cluster", "internal", "manager", "received", "responses", "sent", "started", "version")

    def __init__(self, manager: HttpConnectionManager, cluster: Cluster, *, internal: bool, version: int) -> None:
        self.manager = manager
        self.cluster = cluster
        self.internal = internal
        self.version = version
        # Responses, and how many took how many milliseconds.
        self.responses: dict[KnownResponse | ResponseShape, tuple[PlannedResponse, dict[int, int]]] = {}
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


def make_lane(manager: HttpConnectionManager, route: Route | None, head: RequestHead, *, internal: bool, grpc: bool, said: int) -> Lane | None:
    """The lane of a route; None when its requests need more than a lane does. `head`: of one of them. `said`: see `Lane`."""
    if route is None or not route.cluster_name or not manager.plannable or not _is_plannable(route):
        return None
    if manager.tracing is not None and manager.tracing.lane_operation(route) is None:
        return None
    chain = manager.chains.get(route) or manager.compile_chain(route)
    cluster = manager.router.clusters.get(route.cluster_name)
    if cluster is None or not chain.plannable or not cluster.plannable or (grpc and manager.router.suppress_grpc_failures):
        return None
    if route.finalize_request is not None:
        probe = Probe()
        probe.request = head.copy()
        try:
            route.finalize_request(probe)  # type: ignore[arg-type]
        except Varies:
            return None
    kind = Lane
    if manager.options.scheme_matches_upstream:
        if cluster.options.choose_transport is not None:
            return None  # hosts differ
        kind = SchemeLane
    return kind(manager, route, chain, cluster, internal=internal, version=20 if head.version == 20 else 11, grpc=grpc, said=said)


def _is_plannable(route: Route) -> bool:
    return bool(route.reply is None and not route.careful and not route.needs_lb_context and not route.mirrors and route.max_grpc_timeout_ms is None)
