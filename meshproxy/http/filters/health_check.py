"""Answers health checks in the application's place, or marks and caches the application's answers (envoy.extensions.filters.http.health_check.v3).

Without pass-through, a request that matches `headers` is answered here: 503 after `/healthcheck/fail` or when a named cluster has too few healthy
hosts, else 200. With pass-through it goes upstream, and with `cache_time` the last answer is repeated until the present cache window ends. While the
proxy is failed, every response carries x-envoy-immediate-health-check-fail.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, matchers
from meshproxy.api.durations import seconds
from meshproxy.http.replies import Reply
from meshproxy.observe import flags

if TYPE_CHECKING:
    from envoy.extensions.filters.http.health_check.v3.health_check_pb2 import HealthCheck as HealthCheckProto

    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck"
ROUTE_TYPE_URLS = ()
HONOURS = {
    "envoy.extensions.filters.http.health_check.v3.HealthCheck": "pass_through_mode cache_time cluster_min_healthy_percentages headers",
}

_STATS = (
    "request_total", "failed", "ok", "cached_response", "failed_cluster_not_found", "failed_cluster_empty", "failed_cluster_unhealthy", "degraded",
)  # fmt: skip
_BODY_LIMIT = 1 << 20  # of a health check that we answer ourselves: its body is read and dropped


class Cache:
    """The last answer of the application, good until the window of `seconds` in which it came has passed.

    The windows follow one another from the start, as the ticks of a repeating timer would.
    """

    __slots__ = ("_clock", "_origin", "_window", "degraded", "seconds", "status")

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds = seconds
        self._clock = clock
        self._origin = clock()
        self._window = -1
        self.status = 0
        self.degraded = False

    def store(self, status: int, degraded: bool) -> None:
        self.status = status
        self.degraded = degraded
        self._window = self._now()

    def valid(self) -> bool:
        return self._window == self._now()

    def _now(self) -> int:
        return math.floor((self._clock() - self._origin) / self.seconds)


class HealthCheck:
    """The filter. `minimums`: cluster name -> least percentage of its hosts that must be healthy or degraded."""

    __slots__ = ("_cache", "_context", "_local_cluster", "_matches", "_minimums", "_pass_through", "_stats", "name")

    def __init__(
        self, matches: Callable[[Any], bool] | None, *, pass_through: bool, cache: Cache | None, minimums: dict[str, int], context: FilterContext
    ) -> None:
        self._matches = matches
        self._pass_through = pass_through
        self._cache = cache
        self._minimums = minimums
        self._context = context.context
        node = context.context.node
        self._local_cluster = node.cluster.encode() if node is not None else b""
        scope = context.scope.scope("health_check.")
        scope.declare("counter", _STATS)
        self._stats = {name: scope.counter(name) for name in _STATS}

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | Awaitable[Reply] | None:
        if self._matches is not None and not self._matches(stream.request):
            return None
        stream.health_check = True
        if self._pass_through and not self._failed() and (self._cache is None or not self._cache.valid()):
            return None
        return self._answer() if end_stream else self._answer_after_body(stream)

    def response_headers(self, stream: Any, end_stream: bool) -> None:
        response = stream.response
        if stream.health_check:
            if self._cache is not None:
                self._cache.store(response.status, b"x-envoy-degraded" in response)
            response.set(b"x-envoy-upstream-healthchecked-cluster", self._local_cluster)
        if self._failed():
            response.set(b"x-envoy-immediate-health-check-fail", b"true")

    def _failed(self) -> bool:
        drain = self._context.drain
        return drain is not None and drain.health_failed

    async def _answer_after_body(self, stream: Any) -> Reply:
        await stream.buffered_request(_BODY_LIMIT)
        return self._answer()

    def _answer(self) -> Reply:
        self._count("request_total")
        if self._failed():
            self._count("failed")
            return Reply(503, details="health_check_failed", flag=flags.LH)
        degraded = False
        if self._cache is not None:
            status, details, degraded = self._cache.status, "health_check_cached", self._cache.degraded
            self._count("cached_response")
        else:
            status, details = self._clusters()
        healthy = 200 <= status < 300
        self._count("ok" if healthy else "failed")
        if degraded:
            self._count("degraded")
        return Reply(status, details=details, flag=0 if healthy else flags.LH, headers=((b"x-envoy-degraded", b""),) if degraded else ())

    def _clusters(self) -> tuple[int, str]:
        if not self._minimums:
            return 200, "health_check_ok"
        for name, minimum in self._minimums.items():
            cluster = self._context.clusters.get(name)
            if cluster is None:
                self._count("failed_cluster_not_found")
                return 503, "health_check_failed_no_cluster_found"
            total, available = membership(cluster)
            if total == 0:
                if minimum == 0:
                    continue
                self._count("failed_cluster_empty")
                return 503, "health_check_failed_cluster_empty"
            if 100 * available < total * minimum:
                self._count("failed_cluster_unhealthy")
                return 503, "health_check_failed_cluster_unhealthy"
        return 200, "health_check_ok_cluster_healthy"

    def _count(self, name: str) -> None:
        self._stats[name].n += 1


def membership(cluster: Any) -> tuple[int, int]:
    """(hosts, hosts that are healthy or degraded) of a cluster, over all priorities."""
    stats = cluster.stats
    return stats.membership_total.n, stats.membership_healthy.n + stats.membership_degraded.n


def compile(proto: HealthCheckProto, context: FilterContext) -> HealthCheck:
    """The filter for a HealthCheck proto. Raises ConfigError."""
    if not proto.HasField("pass_through_mode"):
        errors.fail("pass_through_mode", "must be set")
    pass_through = proto.pass_through_mode.value
    life = seconds(proto.cache_time)
    if life and not pass_through:
        errors.fail("cache_time", "must not be set when pass_through_mode is off")
    minimums = {}
    for name, percent in sorted(proto.cluster_min_healthy_percentages.items()):
        if math.isnan(percent.value):
            errors.fail(f'cluster_min_healthy_percentages["{name}"]', "is not a number")
        minimums[name] = int(percent.value)
    return HealthCheck(
        matchers.compile_headers(proto.headers),
        pass_through=pass_through,
        cache=Cache(life, context.clock) if life else None,
        minimums={} if pass_through else minimums,
        context=context,
    )
