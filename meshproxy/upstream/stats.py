"""Statistics of a cluster, under Envoy's names (`cluster.<name>.*`).

Every name is declared, so that it is shown at zero, and becomes an object when it is first touched: `stats.upstream_rq_total.n += 1`. A cluster that
nobody uses has no objects at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.upstream import limits

if TYPE_CHECKING:
    from meshproxy.observe.stats import Scope

COUNTERS = (
    "assignment_stale",
    "assignment_timeout_received",
    "assignment_use_cached",
    "bind_errors",
    "lb_healthy_panic",
    "lb_local_cluster_not_ok",
    "lb_recalculate_zone_structures",
    "lb_subsets_created",
    "lb_subsets_fallback",
    "lb_subsets_fallback_panic",
    "lb_subsets_removed",
    "lb_subsets_selected",
    "lb_zone_cluster_too_small",
    "lb_zone_no_capacity_left",
    "lb_zone_routing_all_directly",
    "lb_zone_routing_cross_zone",
    "lb_zone_routing_sampled",
    "membership_change",
    "original_dst_host_invalid",
    "retry_or_shadow_abandoned",
    "update_attempt",
    "update_empty",
    "update_failure",
    "update_no_rebuild",
    "update_success",
    "upstream_cx_close_notify",
    "upstream_cx_connect_attempts_exceeded",
    "upstream_cx_connect_fail",
    "upstream_cx_connect_timeout",
    "upstream_cx_connect_with_0_rtt",
    "upstream_cx_destroy",
    "upstream_cx_destroy_local",
    "upstream_cx_destroy_local_with_active_rq",
    "upstream_cx_destroy_remote",
    "upstream_cx_destroy_remote_with_active_rq",
    "upstream_cx_destroy_with_active_rq",
    "upstream_cx_http1_total",
    "upstream_cx_http2_total",
    "upstream_cx_http3_total",
    "upstream_cx_idle_timeout",
    "upstream_cx_max_duration_reached",
    "upstream_cx_max_requests",
    "upstream_cx_none_healthy",
    "upstream_cx_overflow",
    "upstream_cx_pool_overflow",
    "upstream_cx_preconnect_skipped",
    "upstream_cx_protocol_error",
    "upstream_cx_rx_bytes_total",
    "upstream_cx_total",
    "upstream_cx_tx_bytes_total",
    "upstream_flow_control_backed_up_total",
    "upstream_flow_control_drained_total",
    "upstream_flow_control_paused_reading_total",
    "upstream_flow_control_resumed_reading_total",
    "upstream_http3_broken",
    "upstream_internal_redirect_failed_total",
    "upstream_internal_redirect_succeeded_total",
    "upstream_rq_0rtt",
    "upstream_rq_active_overflow",
    "upstream_rq_cancelled",
    "upstream_rq_completed",
    "upstream_rq_maintenance_mode",
    "upstream_rq_max_duration_reached",
    "upstream_rq_pending_failure_eject",
    "upstream_rq_pending_overflow",
    "upstream_rq_pending_total",
    "upstream_rq_per_try_idle_timeout",
    "upstream_rq_per_try_timeout",
    "upstream_rq_retry",
    "upstream_rq_retry_backoff_exponential",
    "upstream_rq_retry_backoff_ratelimited",
    "upstream_rq_retry_limit_exceeded",
    "upstream_rq_retry_overflow",
    "upstream_rq_retry_success",
    "upstream_rq_rx_reset",
    "upstream_rq_rx_reset_no_error",
    "upstream_rq_timeout",
    "upstream_rq_total",
    "upstream_rq_tx_reset",
)
# Each worker has its share of these; main adds them up.
_SUMMED_GAUGES = (
    "upstream_cx_active",
    "upstream_cx_rx_bytes_buffered",
    "upstream_cx_tx_bytes_buffered",
    "upstream_queue_overloaded",
    "upstream_rq_active",
    "upstream_rq_pending_active",
)
# Every worker sees the same; main shows one of them.
_SHARED_GAUGES = (
    "lb_subsets_active",
    "max_host_weight",
    "membership_degraded",
    "membership_excluded",
    "membership_healthy",
    "membership_total",
    "version",
    "warming_state",
)
# Every worker counts the same event.
_SHARED_COUNTERS = frozenset((
    "membership_change",
    "assignment_stale",
    "lb_recalculate_zone_structures",
    "update_attempt",
    "update_empty",
    "update_failure",
    "update_no_rebuild",
    "update_success",
))  # fmt: skip
GAUGES = _SUMMED_GAUGES + _SHARED_GAUGES
HISTOGRAMS = ("upstream_cx_connect_ms", "upstream_cx_length_ms", "upstream_rq_per_cx")
_LATER_HISTOGRAMS = ("upstream_rq_time",)  # not shown by Envoy either until the first response

_CODEC_COUNTERS = (
    "http1.dropped_headers_with_underscores", "http1.metadata_not_supported_error", "http1.requests_rejected_with_underscores_in_headers",
    "http1.response_flood",
)  # fmt: skip
_DECLARED_COUNTERS = (*COUNTERS, "default.total_match_count")
_DECLARED_GAUGES = GAUGES + limits.GAUGES
_KINDS = {
    **dict.fromkeys(COUNTERS, "counter"),
    **dict.fromkeys(GAUGES, "gauge"),
    **dict.fromkeys(HISTOGRAMS + _LATER_HISTOGRAMS, "histogram"),
}


def declare(scope: Scope) -> None:
    """Make every name known, at the cost of three references."""
    scope.declare("counter", _DECLARED_COUNTERS)
    scope.declare("gauge", _DECLARED_GAUGES)
    scope.declare("histogram", HISTOGRAMS)


class ClusterStats:
    """The metrics of one cluster as attributes: counters and gauges have `.n`, histograms (in milliseconds) `.record`."""

    __slots__ = (*_KINDS, "_codes", "_rq_times", "scope")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._codes: dict[tuple[int, bool, bool, str], int] = {}
        self._rq_times: dict[tuple[bool, bool, str], list[float]] = {}

    def declare_codec(self) -> None:
        """Envoy shows these once a cluster has had an HTTP/1 connection."""
        self.scope.declare("counter", _CODEC_COUNTERS)

    def __getattr__(self, name: str) -> Any:
        # Only for a slot that is still empty: make the metric, and never come here again for it.
        kind = _KINDS.get(name)
        if kind is None:
            raise AttributeError(name)
        scope = self.scope
        metric: Any
        if kind == "counter":
            metric = scope.counter(name, shared=name in _SHARED_COUNTERS)
        elif kind == "gauge":
            metric = scope.gauge(name, shared=name in _SHARED_GAUGES)
        else:
            metric = scope.histogram(name)
        setattr(self, name, metric)
        return metric

    def charge(self, status: int, internal: bool = False, canary: bool = False, zone: str = "") -> None:
        """Count one final response: upstream_rq_completed, _<class>xx and _<status>, plain, and for internal or external, canary, zone.

        `zone` is `<from>.<to>` when both are known. Counted in one place and spread over the counters by `settle`.
        """
        key = status, internal, canary, zone
        try:
            self._codes[key] += 1
        except KeyError:
            self._codes[key] = 1

    def charge_apart(self, status: int, internal: bool, canary: bool, zone: str) -> None:
        """The same, but plain only that it is complete."""
        self.scope.counter("upstream_rq_completed").n += 1
        for prefix in _categories(internal, canary, zone)[1:]:
            for name in _code_names(status):
                self.scope.counter(prefix + name).n += 1

    def charge_time(self, milliseconds: float, internal: bool = False, canary: bool = False, zone: str = "") -> None:
        """Record the time from the end of a request to the end of its response, in the same variants."""
        try:
            self._rq_times[internal, canary, zone].append(milliseconds)
        except KeyError:
            self._rq_times[internal, canary, zone] = [milliseconds]

    def charge_many(self, status: int, internal: bool, times: dict[int, int]) -> None:
        """`charge` and `charge_time` for many responses: milliseconds -> how many took so long."""
        self._count_codes(status, internal, False, "", sum(times.values()))
        for prefix in _categories(internal, False, ""):
            self.scope.histogram(prefix + "upstream_rq_time").count(times)

    def settle(self) -> None:
        """Spread what was charged since the last call over the metrics. Part of `Cluster.publish`."""
        for key, count in self._codes.items():
            self._count_codes(*key, count)
        self._codes.clear()
        for (internal, canary, zone), times in self._rq_times.items():
            if times:
                for prefix in _categories(internal, canary, zone):
                    self.scope.histogram(prefix + "upstream_rq_time").extend(times)
                times.clear()

    def _count_codes(self, status: int, internal: bool, canary: bool, zone: str, count: int) -> None:
        names = _code_names(status)
        for prefix in _categories(internal, canary, zone):
            for name in names:
                self.scope.counter(prefix + name).n += count

    def charge_prefixed(self, prefix: str, status: int) -> None:
        """Count a response under a prefix of its own (`retry.`), without internal, canary and zone variants."""
        for name in ("completed", f"{status // 100}xx", str(status)):
            self.scope.counter(f"{prefix}upstream_rq_{name}").n += 1

    def charge_alternative(self, prefix: str, status: int, internal: bool, canary: bool) -> None:
        """Count a response under the name that the client gave in `x-envoy-upstream-alt-stat-name`, in all variants."""
        for category in _categories(internal, canary, ""):
            self.charge_prefixed(prefix + category, status)


def _code_names(status: int) -> list[str]:
    return ["upstream_rq_completed", *([f"upstream_rq_{status // 100}xx", f"upstream_rq_{status}"] if 100 <= status < 600 else ["upstream_rq_unknown"])]


def _categories(internal: bool, canary: bool, zone: str) -> list[str]:
    prefixes = [""]
    if canary:
        prefixes.append("canary.")
    prefixes.append("internal." if internal else "external.")
    if zone:
        prefixes.append(f"zone.{zone}.")
    return prefixes
