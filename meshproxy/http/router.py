"""The router: the terminal HTTP filter. Chooses cluster and host, and carries one request to it, with timeouts, retries, hedging and mirroring.

`Router.start` decides whether a request can be forwarded; `Forwarding` is the request on its way, `Attempt` one try at one host. The first try is the
`Forwarding` itself, so that a request that is not retried needs no second object.

Source: envoy.extensions.filters.http.router.v3.Router; behaviour: Envoy's router filter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec import h1, header_case
from meshproxy.codec.h1 import KnownResponse
from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http import mirror, replies, retry, timeouts
from meshproxy.http.replies import OVERLOADED, Reply
from meshproxy.http.route import NO_LIMIT
from meshproxy.http.route_rewrite import update_authority
from meshproxy.http.stream import UNCHOSEN
from meshproxy.net.timers import TimeoutQueue
from meshproxy.observe import flags
from meshproxy.upstream import pool as pools
from meshproxy.upstream.cluster import LbContext
from meshproxy.upstream.pool import Pool

if TYPE_CHECKING:
    from envoy.extensions.filters.http.router.v3 import router_pb2

    from meshproxy.http.filters import FilterContext
    from meshproxy.http.routes import Route
    from meshproxy.http.stream import Stream
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
ROUTE_TYPE_URLS = ()
TERMINAL = True
HONOURS = {
    "envoy.extensions.filters.http.router.v3.Router": (
        "dynamic_stats start_child_span suppress_envoy_headers strict_check_headers respect_expected_rq_timeout suppress_grpc_request_failure_code_stats"
    ),
}

_CONTROL = timeouts.CONTROL_HEADERS
# Envoy's names that stay at zero: redirects are not followed inside, and there is no overload manager.
_DECLARED = tuple(
    """passthrough_internal_redirect_bad_location passthrough_internal_redirect_no_route passthrough_internal_redirect_predicate
    passthrough_internal_redirect_too_many_redirects passthrough_internal_redirect_unsafe_scheme rq_overload_local_reply""".split(),
)
_CHUNKED = h1.CHUNKED
_NO_LENGTH = h1.NO_LENGTH
# A request with one of these methods has no body unless it says so (RFC 9110 9.3).
_BODILESS = frozenset((b"GET", b"HEAD", b"DELETE", b"CONNECT", b"TRACE"))

_RESET_FLAGS = {
    pools.OVERFLOW: flags.UO,
    pools.CONNECT_FAILURE: flags.UF,
    pools.LOCAL_CONNECT_FAILURE: flags.UF,
    pools.CONNECT_TIMEOUT: flags.UF,
    pools.TERMINATION: flags.UC,
    pools.PROTOCOL_ERROR: flags.UPE,
    pools.LOCAL_RESET: flags.LR,
    pools.REMOTE_RESET: flags.UR,
    pools.REFUSED: flags.UR,
}


def compile(proto: router_pb2.Router, context: FilterContext) -> Router:
    """The terminal filter of a connection manager."""
    return Router(proto, context)


class Router:
    """What all requests of a connection manager share."""

    def __init__(self, proto: router_pb2.Router, context: FilterContext) -> None:
        self.context = context.context
        self.clusters = context.clusters
        self.clock = context.clock
        self.random = context.random
        scope = context.scope
        self._no_route = scope.counter("no_route")
        self._no_cluster = scope.counter("no_cluster")
        self.rq_total = scope.counter("rq_total")
        self._rq_redirect = scope.counter("rq_redirect")
        self._rq_direct_response = scope.counter("rq_direct_response")
        self.rq_reset_after_downstream_response_started = scope.counter("rq_reset_after_downstream_response_started")
        scope.declare("counter", _DECLARED)
        self.async_rq_total = context.context.stats.scope("http.async-client.").counter("rq_total")
        self.suppress = proto.suppress_envoy_headers
        self.dynamic_stats = proto.dynamic_stats.value if proto.HasField("dynamic_stats") else True
        self.respect_expected = proto.respect_expected_rq_timeout
        self.charges_plainly = self.dynamic_stats  # what `Attempt.on_response_whole` counts itself
        self.suppress_grpc_failures = proto.suppress_grpc_request_failure_code_stats
        self.strict = tuple(name.lower().encode() for name in proto.strict_check_headers)
        self._timeouts: dict[float, TimeoutQueue] = {}

    def start(self, stream: Stream, end_stream: bool, host: Any = UNCHOSEN, finalized: bool = False) -> Reply | None:
        """Take a request whose filters are done; a Reply when it cannot be forwarded. `host`: chosen already, None if there was none.

        `finalized`: what the route and the router write into the head is there.
        """
        self.rq_total.n += 1
        route = stream.route
        if route is None:
            self._no_route.n += 1
            return replies.NO_ROUTE
        if route.reply is not None:
            self._rq_direct_response.n += 1
            stream.local_reply(route.reply(stream), finalize=route.finalize_response)
            return None
        name = route.cluster_name
        if name is None:
            name = route.select_cluster(stream)
        cluster = self.clusters.get(name) if name else None
        if cluster is None:
            self._no_cluster.n += 1
            return Reply(route.cluster_not_found_status, details="cluster_not_found", flag=flags.NC)
        stream.cluster = cluster
        head = stream.request
        assert head is not None
        if self.strict and (refused := timeouts.check_strict(head, self.strict)) is not None:
            return refused
        if cluster.drops is not None and (dropped := cluster.drops(self.random)) is not None:
            return self._dropped(stream, cluster, dropped)
        stream.attempts = 1
        forwarding = Forwarding(self, stream, route, cluster)
        index = head._index
        if not finalized and (index is None or route.max_grpc_timeout_ms is not None or not _CONTROL.isdisjoint(index)):
            forwarding.hedges = retry.hedges(route, head)
            forwarding.timeout, forwarding.per_try_timeout = timeouts.prepare(route, stream, self)
        else:
            forwarding.hedges = route.hedge_on_per_try_timeout
            forwarding.timeout = route.timeout
            forwarding.per_try_timeout = route.per_try_timeout
            expected = route.expected_timeout
            if expected is not None and not self.suppress and not finalized:
                index[b"x-envoy-expected-rq-timeout-ms"] = expected  # type: ignore[index]  # None: the branch above was taken
                head.items.append((b"x-envoy-expected-rq-timeout-ms", expected))
        if route.include_attempt_count_in_request:
            head.set(b"x-envoy-attempt-count", b"1")
        if route.finalize_request is not None and not finalized:
            # After the timeouts, before the choice of a host: hashing and retries see what the route added.
            route.finalize_request(stream)
        if host is UNCHOSEN:
            host = cluster.pick(forwarding.lb_context() if cluster.needs_context or route.needs_lb_context else None)
        if host is None:
            cluster.stats.upstream_cx_none_healthy.n += 1
            forwarding.charge(503, None)
            return replies.NO_HEALTHY_UPSTREAM
        index = head._index
        stream.host = host
        if index is None or not retry.REQUEST_HEADERS.isdisjoint(index):
            forwarding.retry = retry.start(route, head, cluster, self.random, self.context.runtime)
            forwarding.retries = forwarding.retry is not None
        else:
            forwarding.retries = route.retry is not None
        if route.mirrors and head.method != b"CONNECT":
            forwarding.mirrors = mirror.start(route, stream, self)
        stream.forwarding = forwarding
        forwarding.begin(host, end_stream)
        return None

    def cluster_of(self, stream: Stream) -> Cluster | None:
        """The cluster that a stream's route names, for a stream that does not get there."""
        route = stream.route
        if route.reply is not None:
            return None
        name = route.cluster_name
        if name is None:
            name = route.select_cluster(stream)
        return self.clusters.get(name) if name else None

    def _dropped(self, stream: Stream, cluster: Cluster, what: str) -> Reply:
        Forwarding(self, stream, stream.route, cluster).charge(503, None)
        if what == "maintenance":
            cluster.stats.upstream_rq_maintenance_mode.n += 1
            return replies.MAINTENANCE if not self.suppress else replies.MAINTENANCE_PLAIN
        return replies.DROP_OVERLOAD if what == "drop_overload" else replies.UNCONDITIONAL_DROP_OVERLOAD

    def timeout_queue(self, seconds: float) -> TimeoutQueue:
        """Requests whose route timeout is `seconds`."""
        queue = self._timeouts.get(seconds)
        if queue is None:
            queue = self._timeouts[seconds] = self.context.timers.queue(seconds, _timed_out)
        return queue

    def per_try_queue(self, seconds: float) -> TimeoutQueue:
        """Requests that go by plan and whose route has a per-try timeout of `seconds`."""
        return self.context.timers.queue(seconds, _per_try_timed_out)


def _timed_out(stream: Stream) -> None:
    stream.forwarding.on_timeout()


def _per_try_timed_out(stream: Stream) -> None:
    stream.forwarding._per_try_timed_out()


_NOTHING: list[bytes] = []  # the body of requests without one; never appended to


class Attempt:
    """One try at one host: what the pool and the connection call."""

    __slots__ = ("_idle_timer", "_per_try_timer", "abandoned", "connection", "host", "owner", "pool", "responded", "retried", "sent", "sent_all", "stream")

    def __init__(self, owner: Forwarding, stream: Stream) -> None:
        self.owner: Any = owner  # the Forwarding; None once the stream is over
        self.stream = stream
        self._reset_state()

    def _reset_state(self) -> None:
        self.connection: Any = None
        self.pool: Pool | None = None
        self.host: Host | None = None
        self.sent = 0  # chunks of owner.body that went out
        self.sent_all = False
        self.responded = False  # response headers came
        self.retried = False  # a hedged retry has taken over; this one may still win
        self.abandoned = False
        self._per_try_timer: Any = None
        self._idle_timer: Any = None

    # -- to the upstream

    def try_host(self, host: Host) -> None:
        """Get a connection to `host` and send what there is of the request."""
        self.host = self.stream.host = host
        owner = self.owner
        pool = owner.pool_for(host)
        self.pool = pool
        connection = pool.acquire(self)
        if connection is not None:
            self.on_connected(connection)

    def on_connected(self, connection: Any) -> None:
        """HOT: the pool has a connection for us."""
        self.connection = connection
        owner = self.owner
        stream = self.stream
        stream._upstream = connection
        head = stream.request
        assert head is not None
        parser = connection.parser
        parser.method = head.method
        parser.tunnel = owner.tunnel
        if owner.terminates:
            owner.on_raw_connection(self)
            return
        if owner.careful:
            owner.before_sending(self, head)
        if owner.plain:
            # The head is all there is, and goes as it is.
            self.sent_all = True
            out = h1.encode_request_head(head.method, head.path, head.authority, head.items)
            now = stream.upstream_sent = stream.last_active if not owner.is_retry and not owner.waited else owner.router.clock()
        else:
            out = self._first_bytes(head)
            now = owner.router.clock()
            if self.sent_all:
                stream.upstream_sent = now
        if not stream.upstream_start:
            stream.upstream_start = now
        if owner.per_try_timeout and owner.ended:
            self.start_per_try_timer()
        size = len(out)
        stream.upstream_bytes_sent += size
        connection.stats.upstream_cx_tx_bytes_total.n += size
        connection.transport.write(out)

    def _first_bytes(self, head: RequestHead) -> bytes:
        """The head, and as much of the body as is here."""
        owner = self.owner
        out = owner.encode_head(head)
        body = owner.body
        if body and not (owner.tunnel and not self.stream.tunnel):
            out += b"".join(owner.framed(chunk) for chunk in body)
            self.sent = len(body)
            if not owner.keeps_body:
                owner.body = []
                self.sent = 0
        if owner.ended:
            out += owner.trailer_bytes
            self.sent_all = True
        if owner.paused_for_connection:
            owner.paused_for_connection = False
            self.stream.resume_request()
        return out

    def send(self, data: bytes, last: bool) -> None:
        """More of the body, framed."""
        if last:
            self.sent_all = True
            self.stream.upstream_sent = self.owner.router.clock()
        self._write(data)

    def _write(self, data: bytes) -> None:
        connection = self.connection
        size = len(data)
        if size:
            self.stream.upstream_bytes_sent += size
            connection.stats.upstream_cx_tx_bytes_total.n += size
            connection.transport.write(data)

    def start_per_try_timer(self) -> None:
        """The per-try timeout runs from the time that both the request is complete and the connection is there."""
        self._per_try_timer = self.owner.router.context.loop.call_later(self.owner.per_try_timeout, self._per_try_timed_out)

    def restart_idle_timer(self) -> None:
        """per_try_idle_timeout: nothing came from the upstream for too long."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        owner = self.owner
        self._idle_timer = owner.router.context.loop.call_later(owner.route.per_try_idle_timeout, self._idle_timed_out)

    def _per_try_timed_out(self) -> None:
        self._per_try_timer = None
        if not self.abandoned and not self.responded:
            self.owner.on_per_try_timeout(self, "upstream_per_try_timeout")
            self.stream.codec.flush()

    def _idle_timed_out(self) -> None:
        self._idle_timer = None
        if not self.abandoned and not self.owner.done:
            self.owner.on_per_try_timeout(self, "upstream_per_try_idle_timeout")
            self.stream.codec.flush()

    # -- from the upstream

    def on_pool_failure(self, reason: str, failure: str | None) -> None:
        """No connection: refused by a circuit breaker, or it could not be made."""
        self.connection = None
        if self.owner is None:
            return
        if failure:
            self.stream.upstream_failure = failure
        if reason is pools.OVERFLOW and self.pool is not None and self.pool.limits.rq < self.pool.limits.max_rq:
            self.stream.host = None  # it did not get as far as a connection of the host
        self.owner.on_attempt_failed(self, reason, failure or "")
        self.stream.codec.flush()

    def on_response_headers(self, head: ResponseHead, end_stream: bool) -> None:
        """A response's head, informational ones included."""
        if head.status < 200:
            if head.status == 101:
                self.owner.on_switching(self, head)
            else:
                self.owner.on_informational(self, head)
            return
        self.responded = True
        if self._per_try_timer is not None:
            self._per_try_timer.cancel()
            self._per_try_timer = None
        if self._idle_timer is not None and not end_stream:
            self.restart_idle_timer()
        if end_stream and self.sent_all:
            self._let_go()
        self.owner.on_attempt_headers(self, head, end_stream)

    def on_response_whole(self, known: KnownResponse, body: bytes) -> None:
        """HOT: a complete response in one piece."""
        owner = self.owner
        stream = self.stream
        status = known.status
        head = ResponseHead(status, known.items.copy(), known.index.copy(), reason=known.reason)
        connection = self.connection
        may_retry = owner.retries and (owner.retry is not None or status >= owner.route.retry.from_status or not retry.RESPONSE_HEADERS.isdisjoint(known.index))
        if may_retry or not self.sent_all or not owner.plain or owner.attempts is not None:
            self.on_response_headers(head, not body)
            if body and not self.abandoned:
                self.on_response_data(body, True)
            return
        router = owner.router
        now = router.clock()
        # The connection is free as soon as its parser is done.
        self.connection = None
        connection.request = None
        connection.idle_since = now
        pool = connection.pool
        pool.limits.rq -= 1
        host = pool.host
        host.rq_active -= 1
        self.responded = owner.done = True
        if self._per_try_timer is not None:
            self._per_try_timer.cancel()
            self._per_try_timer = None
        queue = owner._queue
        if queue is not None:
            owner._queue = None
            del queue.started[stream]
        cluster = owner.cluster
        if cluster.outlier is not None:
            cluster.outlier.result(host, status)
        index = head._index
        if cluster.checks_health and b"x-envoy-immediate-health-check-fail" in index:  # type: ignore[operator]
            cluster.fail_immediately(host)
        elapsed = now - stream.request_end
        if not router.suppress:
            milliseconds = int(elapsed * 1000)
            pair = _SERVICE_TIMES[milliseconds] if milliseconds < 256 else (b"x-envoy-upstream-service-time", b"%d" % milliseconds)
            if b"x-envoy-upstream-service-time" in index:  # type: ignore[operator]
                head.set(*pair)
            else:
                head.items.append(pair)
                index[b"x-envoy-upstream-service-time"] = pair[1]  # type: ignore[index]
        if (
            router.charges_plainly
            and stream._locals is None
            and not stream.health_check
            and not host.canary
            and owner.route.virtual_cluster is None
            and b"x-envoy-upstream-canary" not in index  # type: ignore[operator]
        ):
            key = status, stream.is_internal, False, host.zone_stat
            codes = cluster.stats._codes
            try:
                codes[key] += 1
            except KeyError:
                codes[key] = 1
            if status >= 500:
                host.rq_error += 1
            cluster.stats.charge_time(elapsed * 1000, stream.is_internal, False, host.zone_stat)
        else:
            owner.charge(status, host, head)
            if router.dynamic_stats and not stream.health_check:
                cluster.stats.charge_time(elapsed * 1000, stream.is_internal, host.canary, host.zone_stat)
        if status < 500:
            host.rq_success += 1
        stream.upstream_first = stream.upstream_last = now
        stream.details = "via_upstream"
        route = owner.route
        if cluster.observes_latency:
            cluster.observe(host, now - stream.upstream_start)
        stream.response = head
        stream.status = status
        if route.finalize_response is not None:
            route.finalize_response(stream)
        if route.include_attempt_count_in_response:
            head.set(b"x-envoy-attempt-count", b"%d" % stream.attempts)
        stream.send_whole(head, body)

    def on_response_data(self, data: bytes, end_stream: bool) -> None:
        """Response body."""
        owner = self.owner
        if owner is None:  # the stream ended with the head
            return
        if end_stream:
            if self.sent_all:
                self._let_go()
            owner.complete(self)
        elif self._idle_timer is not None:
            self.restart_idle_timer()
        self.stream.send_data(data, end_stream)

    def on_response_trailers(self, trailers: Headers) -> None:
        """Response trailers."""
        owner = self.owner
        if owner is None:
            return
        if self.sent_all:
            self._let_go()
        owner.on_attempt_trailers(self, trailers)

    def on_upstream_reset(self, reason: str, details: str) -> None:
        """The connection broke under us."""
        self.connection = None
        if self.owner is not None:
            self.owner.on_attempt_failed(self, reason, details)
        self.stream.codec.flush()

    def on_upstream_done_early(self) -> None:
        """The response is complete and the connection gone although we had not sent everything."""
        self.connection = None

    def on_read_end(self) -> None:
        """A head whose body is still to come does not wait for it."""
        self.stream.codec.flush()

    def on_upstream_writable(self, writable: bool) -> None:
        """The upstream's write buffer crossed its watermark: hold the downstream back."""
        if self.owner is None:
            return
        stats = self.owner.cluster.stats
        if writable:
            stats.upstream_flow_control_drained_total.n += 1
            self.stream.resume_request()
        else:
            stats.upstream_flow_control_backed_up_total.n += 1
            self.stream.pause_request()

    def _let_go(self) -> None:
        """Everything was sent and received: the connection may serve others. It returns itself to its pool once its parser is done."""
        connection = self.connection
        if connection is not None:
            self.connection = None
            connection.request = None
            connection.idle_since = self.owner.router.clock()
            connection.pool.detach(connection)

    def cancel(self) -> None:
        """Give this try up: leave the queue, or break the connection, which cannot be used for anything else now."""
        if self.abandoned:
            return
        self.abandoned = True
        for timer in (self._per_try_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        self._per_try_timer = self._idle_timer = None
        connection = self.connection
        if connection is not None:
            self.connection = None
            connection.abort()
        elif self.pool is not None and not self.responded:
            self.pool.cancel(self)


class Forwarding(Attempt):
    """A request on its way upstream: the first attempt, and what all its attempts share."""

    __slots__ = (
        "_duration_timer",
        "_lb",
        "_queue",
        "_retry_timer",
        "attempts",
        "body",
        "body_size",
        "careful",
        "chunked",
        "cluster",
        "done",
        "ended",
        "hedges",
        "informed",
        "is_retry",
        "keeps_body",
        "mirrors",
        "paused_for_connection",
        "pending_retries",
        "per_try_timeout",
        "plain",
        "retries",
        "retry",
        "route",
        "router",
        "terminates",
        "timeout",
        "trailer_bytes",
        "tunnel",
        "waited",
        "winner",
    )

    def __init__(self, router: Router, stream: Stream, route: Route, cluster: Cluster) -> None:
        # All in one place, for every request comes here: first what every attempt has.
        self.owner = self
        self.stream = stream
        self.connection = self.pool = self.host = None
        self.sent = 0
        self.sent_all = self.responded = self.retried = self.abandoned = False
        self._per_try_timer = self._idle_timer = None
        self.router = router
        self.route = route
        self.cluster = cluster
        self.timeout = self.per_try_timeout = 0.0
        self.retry: retry.RetryState | None = None  # made when the first decision is due, unless headers ask for retries
        self.retries = False  # whether there may be retries
        self.hedges = False
        self.mirrors: Any = None
        self.body: list[bytes] = _NOTHING
        self.body_size = 0
        self.plain = False  # no body, no tunnel, nothing that rewrites the head on its way out
        # Something that few routes ask for is due before a try is sent: `before_sending`.
        self.careful = route.careful or cluster.max_stream_duration > 0 or stream._locals is not None
        self.waited = False  # a connection had to be made or waited for
        self.keeps_body = self.chunked = self.tunnel = self.terminates = self.is_retry = self.paused_for_connection = self.informed = False
        self.ended = False  # the request is complete
        self.done = False  # nothing more comes from upstream
        self.winner: Attempt | None = None  # the attempt whose response is passed on
        self.attempts: list[Attempt] | None = None  # all tries in flight, when there is or may be more than one
        self.pending_retries = 0
        self.trailer_bytes = b""
        self._queue: TimeoutQueue | None = None
        self._retry_timer: Any = None
        self._duration_timer: Any = None
        self._lb: LbContext | None = None

    @classmethod
    def under_way(cls, router: Router, stream: Stream, connection: Any, body: bytes, queue: TimeoutQueue | None, per_try: TimeoutQueue | None) -> Forwarding:
        """The forwarding of a whole request that has gone out already, on `connection`. `queue`, `per_try`: where its timeouts run."""
        self = cls(router, stream, stream.route, stream.cluster)
        self.timeout = self.route.timeout
        self.per_try_timeout = self.route.per_try_timeout
        if per_try is not None and (started := per_try.started.pop(stream, None)) is not None:
            left = max(0.0, started + self.per_try_timeout - router.clock())
            self._per_try_timer = router.context.loop.call_later(left, self._per_try_timed_out)
        self.retries = self.keeps_body = self.route.retry is not None
        self.ended = self.sent_all = True
        self.plain = not body
        if body and self.keeps_body:
            self.body = [body]
            self.body_size = len(body)
            self.sent = 1
        self.connection = connection
        self.pool = connection.pool
        self.host = connection.host
        self._queue = queue
        connection.planned = None
        connection.request = self
        connection.parser.expect(stream.request.method)  # type: ignore[union-attr]
        return self

    # -- choosing

    def lb_context(self) -> LbContext:
        """What the balancer may look at, made for the first try and kept for retries."""
        context = self._lb
        if context is None:
            context = self._lb = LbContext()
            stream, route = self.stream, self.route
            context.stream = stream
            if route.hash is not None and self.cluster.needs_hash:
                context.hash = route.hash(stream)
            context.metadata_match = route.metadata_match
        return context

    def pool_for(self, host: Host) -> Pool:
        """The pool of `host` for this route's priority."""
        cluster = self.cluster
        pools_of_host: dict[Any, Pool] | None
        key: Any = self.route.priority
        if self.terminates:
            pools_of_host = host.pools = host.pools if host.pools is not None else {}
            key = (key, "tcp")
            pool = pools_of_host.get(key)
            if pool is None:
                pool = pools_of_host[key] = Pool(cluster, host, self.route.priority, self.router.context, raw=True)
            return pool
        if cluster.auto_sni:
            key = (key, cluster.server_name_for(self.stream))
        pools_of_host = host.pools
        if pools_of_host is None:
            pools_of_host = host.pools = {}
        pool = pools_of_host.get(key)
        if pool is None:
            pool = pools_of_host[key] = Pool(cluster, host, self.route.priority, self.router.context, None if key.__class__ is int else key[1])
        return pool

    # -- the request

    def begin(self, host: Host, end_stream: bool) -> None:
        """HOT: send the head; `end_stream`: that is all."""
        stream = self.stream
        self.keeps_body = self.retries or self.mirrors is not None
        cluster = self.cluster
        if stream.upgrade is not None:
            self.tunnel = True
            self.terminates = self.route.connect_config is not None and stream.upgrade == b"CONNECT"
            if self.timeout:  # until the tunnel is there: what is in it has no end that could be timed
                queue = self._queue = self.router.timeout_queue(self.timeout)
                queue.start(stream, stream.last_active)
        elif end_stream:
            self.ended = True
            head = stream.request
            self.plain = cluster.header_case is None and head.case is None and (head.method in _BODILESS or b"content-length" in head)  # type: ignore[union-attr,operator]
            timeout = self.timeout
            if timeout:
                queue = self._queue = self.router._timeouts.get(timeout) or self.router.timeout_queue(timeout)
                if queue.handle is None:
                    queue.start(stream, stream.request_end)
                else:
                    queue.started[stream] = stream.request_end
            if self.mirrors is not None:
                self.mirrors.finish()
        elif b"content-length" not in stream.request:  # type: ignore[operator]
            self.chunked = True
        pools_of_host = host.pools
        pool = None if pools_of_host is None or cluster.auto_sni or self.terminates else pools_of_host.get(self.route.priority)
        if pool is None:
            pool = self.pool_for(host)
        self.host = host
        self.pool = pool
        connection = pool.acquire(self)
        if connection is not None:
            self.on_connected(connection)
        else:
            self.waited = True

    def before_sending(self, attempt: Attempt, head: RequestHead) -> None:
        """What some routes ask for once the host of a try is known: its name as the request's host, timers, counts by virtual cluster."""
        stream, route = self.stream, self.route
        host = attempt.host
        if route.auto_host_rewrite and host is not None and host.hostname:
            update_authority(
                head, host.hostname.encode(), append_forwarded=route.append_x_forwarded_host, keep_original=not self.router.suppress and not self.is_retry
            )
        if route.virtual_cluster is not None:
            route.virtual_cluster.count(stream, "upstream_rq_total")
        if route.per_try_idle_timeout:
            attempt.restart_idle_timer()
        duration = stream.locals.get("stream_duration", self.cluster.max_stream_duration)
        if duration and self._duration_timer is None:
            self._duration_timer = self.router.context.loop.call_later(duration, self._duration_reached)
            stream.add_timer(self._duration_timer)

    def _duration_reached(self) -> None:
        if self.done:
            return
        self.cluster.stats.upstream_rq_max_duration_reached.n += 1
        stream = self.stream
        self.fail(
            Reply(
                504 if stream.request_ended else 408,
                b"upstream max stream duration reached",
                details="upstream_max_stream_duration_reached",
                flag=flags.UMSDR,
            )
        )
        stream.codec.flush()

    def encode_head(self, head: RequestHead) -> bytes:
        """The head for HTTP/1.1."""
        items = head.items
        path = head.path
        if self.chunked:
            items = [*items, _CHUNKED]
        elif self.ended and head.method not in _BODILESS and not self.body and b"content-length" not in head:
            items = [*items, _NO_LENGTH]
        cluster = self.cluster
        if self.tunnel and head.method == b"CONNECT":
            path = head.authority
        style = cluster.header_case
        if style is None and head.case is None:
            return h1.encode_request_head(head.method, path, head.authority, items)
        items = [(b"host", head.authority), *items]
        return h1.encode_spelt_request_head(head.method, path, header_case.spell(items, head.case, style))

    def framed(self, data: bytes) -> bytes:
        """Body data as it goes on the wire."""
        return h1.encode_chunk(data) if self.chunked and data else data

    def data(self, data: bytes, end_stream: bool) -> None:
        """More of the request body."""
        if self.done:
            return
        if self.tunnel and not self.stream.tunnel:
            # Nothing goes upstream before the upgrade is accepted: a server that refuses it would read the bytes as a request.
            self._keep(data)
            return
        if end_stream:
            self.ended = True
            if self.chunked:
                self.trailer_bytes = h1.LAST_CHUNK
        attempt = self.winner or (self.attempts[-1] if self.attempts else self)
        connected = attempt.connection is not None
        if self.keeps_body or not connected:
            self._keep(data)
        if connected:
            attempt.sent = len(self.body)
            if data or end_stream:
                attempt.send(self.framed(data) + self.trailer_bytes if end_stream else self.framed(data), end_stream)
        if end_stream:
            self._request_complete()

    def trailers(self, trailers: Headers) -> None:
        """The request's trailers: its end."""
        if self.done:
            return
        self.ended = True
        if self.chunked:
            self.trailer_bytes = h1.encode_trailers(trailers.items if self.cluster.h1_options.trailers else [])
        attempt = self.winner or (self.attempts[-1] if self.attempts else self)
        if attempt.connection is not None:
            attempt.send(self.trailer_bytes, True)
        self._request_complete()

    def _keep(self, data: bytes) -> None:
        if data:
            if self.body is _NOTHING:
                self.body = []
            self.body.append(data)
            self.body_size += len(data)
        limit = self.route.buffer_limit
        if limit == NO_LIMIT:
            limit = self.stream.manager.buffer_limit
        if self.body_size <= limit:
            return
        if self.keeps_body:
            self.keeps_body = False
            self.cluster.stats.retry_or_shadow_abandoned.n += 1
            self._end_retries()
            if self.mirrors is not None:
                self.mirrors.cancel()
                self.mirrors = None
            if self._retry_timer is not None:
                self._cancel_retry()
                self.stream.local_reply(
                    Reply(507, b"exceeded request buffer limit while retrying upstream", details="request_payload_exceeded_retry_buffer_limit")
                )
                return
            attempt = self.attempts[-1] if self.attempts else self
            if attempt.connection is not None:
                self.body = []
                return
        if not self.paused_for_connection:
            self.paused_for_connection = True
            self.stream.pause_request()

    def _request_complete(self) -> None:
        if self.done:
            return
        if self.timeout:
            queue = self._queue = self.router.timeout_queue(self.timeout)
            queue.start(self.stream, self.stream.request_end)
        if self.per_try_timeout:
            for attempt in self.attempts or (self,):
                if attempt.connection is not None and not attempt.responded:
                    attempt.start_per_try_timer()
        if self.mirrors is not None:
            self.mirrors.finish(self.body)

    # -- the response

    def on_informational(self, attempt: Attempt, head: ResponseHead) -> None:
        """100 to 199 but 101. As Envoy, only the first one counts and is passed on."""
        if self.informed:
            return
        self.informed = True
        self.charge(head.status, attempt.host)
        self._end_retries()
        self.stream.informational(head)

    def on_switching(self, attempt: Attempt, head: ResponseHead) -> None:
        """101 Switching Protocols: from here on bytes go both ways."""
        attempt.responded = True
        stream = self.stream
        stream.tunnel = True
        self._stop_timeout()
        self.on_attempt_headers(attempt, head, False)
        if self.body and attempt.connection is not None:
            body, self.body = self.body, []
            attempt.send(b"".join(body), False)

    def on_raw_connection(self, attempt: Attempt) -> None:
        """A CONNECT that ends here: the connection itself is the answer, and carries the tunnel's bytes as they are."""
        attempt.connection.parser.state = h1.UNTIL_CLOSE
        attempt.responded = True
        stream = self.stream
        stream.upstream_start = stream.upstream_sent = self.router.clock()
        self.on_attempt_headers(attempt, ResponseHead(200, []), False)
        stream.codec.flush()

    def on_attempt_headers(self, attempt: Attempt, head: ResponseHead, end_stream: bool) -> None:
        """A final response's head: retry, or pass it on."""
        stream = self.stream
        cluster = self.cluster
        host = attempt.host
        assert host is not None
        status = head.status
        now = self.router.clock()
        stream.upstream_first = now
        grpc_status: int | None = None
        grpc = False
        if head.get(b"grpc-status") is not None or (status == 200 and stream.is_grpc):
            grpc = stream.is_grpc
            grpc_status = _grpc_status(head) if grpc else None
        if cluster.outlier is not None:
            cluster.outlier.result(host, status if grpc_status is None else _GRPC_TO_HTTP.get(grpc_status, 500))
        if cluster.checks_health and b"x-envoy-immediate-health-check-fail" in head:
            cluster.fail_immediately(host)
        if self.tunnel and stream.request is not None and stream.request.method == b"CONNECT" and status < 300:
            stream.tunnel = True
            self._stop_timeout()
        if self.retries and self._retry_response(attempt, head, end_stream):
            return
        if self.tunnel and 200 <= status < 400 and not stream.tunnel and stream.upgrade.lower() == b"websocket":  # type: ignore[union-attr]
            self._refused_handshake(head)
            return
        self.winner = attempt
        if self.attempts is not None:
            self._drop_others(attempt)
        if stream.request_end and not self.router.suppress:
            head.set(b"x-envoy-upstream-service-time", b"%d" % ((now - stream.request_end) * 1000))
        self.charge(status, host, head)
        if status < 500:
            if not grpc:
                host.rq_success += 1
            elif end_stream:
                self._grpc_done(host, grpc_status)
        route = self.route
        stream.details = "via_upstream"
        stream.response = head
        stream.status = status
        if route.finalize_response is not None:
            route.finalize_response(stream)
        if route.include_attempt_count_in_response:
            head.set(b"x-envoy-attempt-count", b"%d" % stream.attempts)
        if end_stream:
            self.complete(attempt)
        stream.send_headers(head, end_stream)
        if stream.tunnel and self.body and not self.done and attempt.connection is not None and status != 101:
            body, self.body = self.body, []
            attempt.send(b"".join(body), False)

    def _refused_handshake(self, head: ResponseHead) -> None:
        """A WebSocket handshake that came to something else than 101 or an error: the client gets the head, and that is all; Envoy does not count it."""
        self.stream.close_connection = True  # whatever the client sent after asking for a tunnel was not meant to be a request
        stream = self.stream
        head.remove(b"content-length")
        stream.details = "websocket_handshake_unsuccessful"
        stream.response = head
        stream.status = head.status
        self.abandon()
        stream.send_headers(head, True)

    def on_attempt_trailers(self, attempt: Attempt, trailers: Headers) -> None:
        """The response ends with trailers."""
        if attempt.host is not None and self.stream.is_grpc:
            self._grpc_done(attempt.host, _grpc_status(trailers))
        self.complete(attempt)
        self.stream.send_trailers(trailers)

    def _grpc_done(self, host: Host, grpc_status: int | None) -> None:
        if grpc_status is not None and _GRPC_TO_HTTP.get(grpc_status, 500) < 500:
            host.rq_success += 1
        else:
            host.rq_error += 1

    def complete(self, attempt: Attempt) -> None:
        """The response has been read to its end."""
        self.done = True
        self._stop_timeout()
        stream = self.stream
        if attempt._idle_timer is not None:
            attempt._idle_timer.cancel()
            attempt._idle_timer = None
        now = self.router.clock()
        stream.upstream_last = now
        if self.router.dynamic_stats and not stream.health_check and stream.request_end:
            cluster = self.cluster
            host = attempt.host
            canary, zone = (host.canary, host.zone_stat) if host is not None else (False, "")
            cluster.stats.charge_time((now - stream.request_end) * 1000, stream.is_internal, canary, zone)
            if cluster.observes_latency and host is not None:
                cluster.observe(host, now - stream.upstream_start)
        if self.retry is not None:
            self._end_retries()

    def charge(self, status: int, host: Host | None, head: ResponseHead | None = None) -> None:
        """Count a response code for the cluster, and an error for the host."""
        stream = self.stream
        if self.router.dynamic_stats and not stream.health_check:
            canary = (host is not None and host.canary) or (head is not None and head.get(b"x-envoy-upstream-canary") == b"true")
            if not (self.router.suppress_grpc_failures and stream.is_grpc):
                self.cluster.stats.charge(status, stream.is_internal, canary, "" if host is None else host.zone_stat)
                if stream._locals is not None and (alternative := stream._locals.get("alt_stat")):
                    self.cluster.stats.charge_alternative(f"{alternative}.", status, stream.is_internal, canary)
            virtual_cluster = self.route.virtual_cluster
            if virtual_cluster is not None:
                virtual_cluster.charge(stream, status)
        if host is not None and status >= 500:
            host.rq_error += 1

    # -- failures

    def on_attempt_failed(self, attempt: Attempt, reason: str, details: str) -> None:
        """A try ended without a complete response."""
        if self.done or attempt.abandoned:
            return
        cluster, stream = self.cluster, self.stream
        host = attempt.host
        if reason is not pools.OVERFLOW and cluster.outlier is not None and host is not None:
            cluster.outlier.local_failure(host, "connect_failed" if reason in (pools.CONNECT_FAILURE, pools.CONNECT_TIMEOUT) else "reset")
        if self.retries and not attempt.responded and not attempt.retried and not stream.response_started:
            verdict = self.retry_state().should_retry_reset(reason, request_sent=attempt.sent_all or attempt.sent > 0 or bool(stream.upstream_bytes_sent))
            if self._start_retry(attempt, verdict):
                if host is not None:
                    host.rq_error += 1
                return
        if stream.response_started:
            self._failed_late(attempt, reason, details)
            return
        status = 502 if reason == pools.PROTOCOL_ERROR else 503
        if not self.informed:
            self.charge(status, host)
        self._remove(attempt)
        if self._others_in_flight():
            return
        suffix = f"|{details}" if details else ""
        began = "after" if self.informed else "before"
        self.fail(
            Reply(
                status,
                f"upstream connect error or disconnect/reset before headers. {'retried and the latest ' * self.is_retry}reset reason: {reason}".encode(),
                details=f"upstream_reset_{began}_response_started{{{reason}{suffix}}}".replace(" ", "_"),
                flag=_RESET_FLAGS.get(reason, flags.UR),
                headers=OVERLOADED if reason == pools.OVERFLOW and not self.router.suppress else (),
            )
        )

    def _failed_late(self, attempt: Attempt, reason: str, details: str) -> None:
        """The response had begun: the downstream can only be reset."""
        stream = self.stream
        self.done = True
        self._stop_timeout()
        if stream.is_grpc and attempt.host is not None:  # others were counted as successes with their status
            attempt.host.rq_error += 1
            self.router.rq_reset_after_downstream_response_started.n += 1
        stream.flags |= _RESET_FLAGS.get(reason, flags.UR)
        suffix = f"|{details}" if details else ""
        stream.details = f"upstream_reset_after_response_started{{{reason}{suffix}}}".replace(" ", "_")
        stream.reset()

    def fail(self, reply: Reply) -> None:
        """Answer the downstream ourselves; every attempt is over."""
        stream = self.stream
        self.abandon()
        if self.route.include_attempt_count_in_response:
            reply = Reply(
                reply.status,
                reply.body,
                details=reply.details,
                flag=reply.flag,
                headers=(*reply.headers, (b"x-envoy-attempt-count", b"%d" % stream.attempts)),
                grpc_status=reply.grpc_status,
            )
        stream.local_reply(reply)

    def on_timeout(self) -> None:
        """The route's timeout."""
        self._queue = None
        if self.done:
            return
        stats = self.cluster.stats
        for attempt in self._in_flight():
            stats.upstream_rq_timeout.n += 1
            if self.route.virtual_cluster is not None:
                self.route.virtual_cluster.count(self.stream, "upstream_rq_timeout")
            host = attempt.host
            if host is not None:
                host.rq_timeout += 1
            if not attempt.responded:
                if self.cluster.outlier is not None and host is not None:
                    self.cluster.outlier.local_failure(host, "timeout")
                self.charge(self.timeout_status, host)
        self._timed_out("response_timeout")
        self.stream.codec.flush()

    @property
    def timeout_status(self) -> int:
        """504, or 204 where the client asked for it."""
        return 204 if self.stream.locals.get("timeout_204") else 504

    def _timed_out(self, details: str) -> None:
        status = self.timeout_status
        self.fail(Reply(status, b"upstream request timeout" if status == 504 else b"", details=details, flag=flags.UT))

    def on_per_try_timeout(self, attempt: Attempt, details: str) -> None:
        """A try took too long: retry, hedge, or give up."""
        cluster = self.cluster
        host = attempt.host
        if self.hedges and self.retries:
            self._hedge(attempt)
            return
        (cluster.stats.upstream_rq_per_try_timeout if details == "upstream_per_try_timeout" else cluster.stats.upstream_rq_per_try_idle_timeout).n += 1
        if host is not None:
            host.rq_timeout += 1
            if cluster.outlier is not None:
                cluster.outlier.local_failure(host, "timeout")
        responded = attempt.responded
        sent = attempt.connection is not None
        attempt.cancel()
        if self.retries and not responded:
            verdict = self.retry_state().should_retry_reset(pools.LOCAL_RESET, request_sent=sent)
            if self._start_retry(attempt, verdict, after_timeout=True):
                if host is not None:
                    host.rq_error += 1
                return
        if not self.stream.response_started:
            self.charge(self.timeout_status, host)
        self._timed_out(details)

    def _hedge(self, attempt: Attempt) -> None:
        """hedge_on_per_try_timeout: start another try and let this one go on."""
        if self.cluster.outlier is not None and attempt.host is not None:
            self.cluster.outlier.local_failure(attempt.host, "timeout")
        if self.stream.response_started or attempt.retried:
            return
        verdict = self.retry_state().should_hedge()
        if verdict == retry.RETRY:
            attempt.retried = True
            if self.attempts is None:
                self.attempts = [attempt]
            self.pending_retries += 1
            self._retry_timer = self.router.context.loop.call_later(self.retry_state().backoff(), self._do_retry, True, True)
        elif verdict == retry.NO_OVERFLOW:
            self.stream.flags |= flags.UO
        elif verdict == retry.NO_LIMIT:
            self.stream.flags |= flags.URX

    # -- retries

    def _retry_response(self, attempt: Attempt, head: ResponseHead, end_stream: bool) -> bool:
        state = self.retry_state()
        if attempt.retried:
            verdict = retry.NO_LIMIT if state.would_retry_headers(head) else retry.NO
        else:
            verdict = state.should_retry_headers(head)
            if verdict == retry.RETRY:
                host = attempt.host
                if host is not None:
                    host.rq_error += 1
                self.cluster.stats.charge_prefixed("retry.", head.status)
                if not (end_stream and attempt.sent_all):
                    attempt.cancel()
                return self._start_retry(attempt, verdict)
            if verdict == retry.NO_OVERFLOW:
                self.stream.flags |= flags.UO
            elif verdict == retry.NO_LIMIT:
                self.stream.flags |= flags.URX
        if verdict != retry.NO:
            self._remove(attempt)
            if self._others_in_flight():
                # A bad answer, but another try may still bring a good one.
                if attempt.host is not None:
                    attempt.host.rq_error += 1
                attempt.cancel()
                return True
        return False

    def retry_state(self) -> retry.RetryState:
        """The state of this request's retries, made when it is first needed: most requests succeed."""
        state = self.retry
        if state is None:
            policy = self.route.retry
            state = self.retry = retry.RetryState(
                policy,  # type: ignore[arg-type]  # asked for only where the route has one
                self.cluster,
                self.route.priority,
                self.router.random,
                self.router.context.runtime,
                self.stream.request,
            )
        return state

    def _end_retries(self) -> None:
        self.retries = False
        if self.retry is not None:
            self.retry.finish()
            self.retry = None

    def _start_retry(self, attempt: Attempt, verdict: int, after_timeout: bool = False) -> bool:
        """Begin the back-off when `verdict` allows; otherwise note why not."""
        stream = self.stream
        if verdict != retry.RETRY:
            if verdict == retry.NO_OVERFLOW:
                stream.flags |= flags.UO
            elif verdict == retry.NO_LIMIT:
                stream.flags |= flags.URX
            return False
        self._remove(attempt)
        self.pending_retries += 1
        context = self.lb_context()
        if attempt.host is not None:
            self.retry_state().on_host_attempted(attempt.host)
        context.attempt = stream.attempts
        delay = self.retry_state().backoff()
        if self.route.virtual_cluster is not None:
            self.route.virtual_cluster.count(stream, "upstream_rq_retry")
        self._retry_timer = self.router.context.loop.call_later(delay, self._do_retry, False, after_timeout)
        return True

    def _do_retry(self, hedged: bool, after_timeout: bool) -> None:
        self._retry_timer = None
        if self.done or self.stream.ended:
            return
        self.pending_retries -= 1
        self.is_retry = True
        stream = self.stream
        stream._upstream = None
        stream.attempts += 1
        head = stream.request
        assert head is not None
        if self.route.include_attempt_count_in_request:
            head.set(b"x-envoy-attempt-count", b"%d" % stream.attempts)
        if self.route.include_is_timeout_retry_header:
            head.set(b"x-envoy-is-timeout-retry", b"true" if after_timeout else b"false")
        if self.timeout and not self.router.suppress and b"x-envoy-expected-rq-timeout-ms" in head:
            timeouts.refresh_expected(head, self, self.router.clock())
        host = self.retry_state().pick(self.cluster, self.lb_context())
        if host is None:
            self.cluster.stats.upstream_cx_none_healthy.n += 1
            self.charge(503, None)
            if not self._others_in_flight():
                self.fail(replies.NO_HEALTHY_UPSTREAM)
            return
        if hedged:
            attempt: Attempt = Attempt(self, stream)
        else:
            attempt = self
            self._reset_state()
        if self.attempts is not None:
            self.attempts.append(attempt)
        attempt.try_host(host)
        stream.codec.flush()

    def _cancel_retry(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
            self.pending_retries = 0

    def _in_flight(self) -> list[Attempt]:
        if self.attempts is not None:
            return [attempt for attempt in self.attempts if not attempt.abandoned]
        return [] if self._retry_timer is not None else [self]

    def _others_in_flight(self) -> bool:
        return self.pending_retries > 0 or (bool(self.attempts) and any(not attempt.responded and not attempt.abandoned for attempt in self.attempts or ()))

    def _remove(self, attempt: Attempt) -> None:
        if self.attempts is not None and attempt in self.attempts:
            self.attempts.remove(attempt)

    def _drop_others(self, winner: Attempt) -> None:
        for attempt in self.attempts or ():
            if attempt is not winner:
                attempt.cancel()
        self._cancel_retry()
        self.attempts = None
        self._end_retries()

    # -- the downstream

    def downstream_writable(self, writable: bool) -> None:
        """The downstream's write buffer crossed its watermark: hold the upstream back."""
        attempt = self.winner
        if attempt is None or attempt.connection is None:
            return
        transport = attempt.connection.transport
        stats = self.cluster.stats
        if transport.is_closing():
            return
        if writable:
            stats.upstream_flow_control_resumed_reading_total.n += 1
            transport.resume_reading()
        else:
            stats.upstream_flow_control_paused_reading_total.n += 1
            transport.pause_reading()

    def abandon(self) -> None:
        """Stop: the downstream has gone, or was answered otherwise."""
        if self.done:
            return
        self.done = True
        self._stop_timeout()
        self._cancel_retry()
        for attempt in self.attempts or (self,):
            attempt.cancel()
        if self.retry is not None:
            self._end_retries()
        if self.mirrors is not None and not self.ended:
            self.mirrors.cancel()

    def _stop_timeout(self) -> None:
        queue = self._queue
        if queue is not None:
            self._queue = None
            queue.started.pop(self.stream, None)


_SERVICE_TIMES = [(b"x-envoy-upstream-service-time", b"%d" % milliseconds) for milliseconds in range(256)]
_GRPC_TO_HTTP = {0: 200, 1: 499, 2: 500, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501, 13: 500, 14: 503, 15: 500, 16: 401}


def _grpc_status(headers: Headers) -> int | None:
    value = headers.get(b"grpc-status")
    if value is None or not value.isdigit() or len(value) > 9:  # Python refuses to read some thousands of digits
        return None
    return int(value)
