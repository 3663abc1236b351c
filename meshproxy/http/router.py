"""The router: the terminal HTTP filter. `Router.start` chooses cluster and host, or says why a request cannot be forwarded, and sets its timeouts.

From there on a request is a `Forwarding` (http/forwarding.py): its way up and its response back. That is also the first of its tries (http/tries.py: timeouts,
retries, hedging), each of which is an `Attempt` (http/attempt.py).

Source: envoy.extensions.filters.http.router.v3.Router; behaviour: Envoy's router filter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.http import mirror, replies, retry, timeouts
from meshproxy.http.forwarding import Forwarding
from meshproxy.http.replies import Reply
from meshproxy.http.retry import ATTEMPT_COUNT
from meshproxy.http.stream import UNCHOSEN
from meshproxy.net.timers import TimeoutQueue
from meshproxy.observe import flags

if TYPE_CHECKING:
    from envoy.extensions.filters.http.router.v3 import router_pb2

    from meshproxy.http.filters import FilterContext
    from meshproxy.http.stream import Stream
    from meshproxy.upstream.cluster import Cluster

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
    passthrough_internal_redirect_too_many_redirects passthrough_internal_redirect_unsafe_scheme rq_overload_local_reply rq_redirect""".split(),
)


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
        self._rq_direct_response = scope.counter("rq_direct_response")
        self.rq_reset_after_downstream_response_started = scope.counter("rq_reset_after_downstream_response_started")
        scope.declare("counter", _DECLARED)
        self.async_rq_total = context.context.stats.scope("http.async-client.").counter("rq_total")
        self.suppress = proto.suppress_envoy_headers
        self.starts_spans = proto.start_child_span  # each try has a span of its own, where there is tracing
        self.dynamic_stats = proto.dynamic_stats.value if proto.HasField("dynamic_stats") else True
        self.respect_expected = proto.respect_expected_rq_timeout
        self.charges_plainly = self.dynamic_stats  # what `Attempt.on_response_whole` counts itself
        self.suppress_grpc_failures = proto.suppress_grpc_request_failure_code_stats
        self.strict = tuple(name.lower().encode() for name in proto.strict_check_headers)
        self._timeouts: dict[float, TimeoutQueue] = {}
        self.scheme_matches_upstream = False  # as the connection manager says
        self.tells_callers = True  # hosts that want to know; as well
        self.forwarding_class = Forwarding

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
        cluster = self.clusters.get(route.cluster_name)
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
        forwarding = self.forwarding_class(self, stream, route, cluster)
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
            head.set(ATTEMPT_COUNT, b"1")
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
        if self.scheme_matches_upstream:
            head.scheme = b"http" if host.transport is None else b"https"
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
        return self.clusters.get(route.cluster_name)

    def _dropped(self, stream: Stream, cluster: Cluster, what: str) -> Reply:
        Forwarding(self, stream, stream.route, cluster).charge(503, None)
        cluster.rq_dropped += 1
        if what == "maintenance":
            cluster.stats.upstream_rq_maintenance_mode.n += 1
            return replies.MAINTENANCE if not self.suppress else replies.MAINTENANCE_PLAIN
        cluster.rq_drop_overload += 1
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
