"""Outlier detection: hosts that fail real requests are taken out for a while.

Each response costs a few integer operations on the host's `Monitor`; everything else happens when a threshold is reached and in `Detector.sweep`, once an
interval. Detection is per worker. An ejection is told to the other workers through main (`on_eject`, `adopt`), so that all agree on who is out;
consecutive failures are counted by each worker for itself, so that with N workers it may take up to N times as many of them.

Source: envoy.config.cluster.v3.OutlierDetection; behaviour: Envoy's outlier detector.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.durations import milliseconds_of
from meshproxy.upstream.host import FAILED_ACTIVE_HC, FAILED_OUTLIER_CHECK

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host

HONOURS = {
    "envoy.config.cluster.v3.OutlierDetection": (
        "consecutive_5xx interval base_ejection_time max_ejection_percent enforcing_consecutive_5xx enforcing_success_rate success_rate_minimum_hosts"
        " success_rate_request_volume success_rate_stdev_factor consecutive_gateway_failure enforcing_consecutive_gateway_failure"
        " split_external_local_origin_errors consecutive_local_origin_failure enforcing_consecutive_local_origin_failure"
        " enforcing_local_origin_success_rate failure_percentage_threshold enforcing_failure_percentage enforcing_failure_percentage_local_origin"
        " failure_percentage_minimum_hosts failure_percentage_request_volume max_ejection_time max_ejection_time_jitter"
        " successful_active_health_check_uneject_host always_eject_one_host"
    ),
}

# Ejection types, as the counters name them.
CONSECUTIVE_5XX = "consecutive_5xx"
GATEWAY_FAILURE = "consecutive_gateway_failure"
LOCAL_ORIGIN_FAILURE = "consecutive_local_origin_failure"
SUCCESS_RATE = "success_rate"
LOCAL_SUCCESS_RATE = "local_origin_success_rate"
FAILURE_PERCENTAGE = "failure_percentage"
LOCAL_FAILURE_PERCENTAGE = "local_origin_failure_percentage"
_TYPES = (
    CONSECUTIVE_5XX,
    GATEWAY_FAILURE,
    LOCAL_ORIGIN_FAILURE,
    SUCCESS_RATE,
    LOCAL_SUCCESS_RATE,
    FAILURE_PERCENTAGE,
    LOCAL_FAILURE_PERCENTAGE,
)

_COUNTERS = (
    *(f"outlier_detection.ejections_detected_{kind}" for kind in _TYPES),
    *(f"outlier_detection.ejections_enforced_{kind}" for kind in _TYPES),
    "outlier_detection.ejections_detected_degradation",
    "outlier_detection.ejections_enforced_total",
    "outlier_detection.ejections_overflow",
    # No longer documented by Envoy, still counted.
    "outlier_detection.ejections_consecutive_5xx",
    "outlier_detection.ejections_success_rate",
    "outlier_detection.ejections_total",
)
_GAUGES = ("outlier_detection.ejections_active",)

# (field, default) of the plain numbers; runtime keys are `outlier_detection.<field>`.
_NUMBERS = (
    ("consecutive_5xx", 5),
    ("consecutive_gateway_failure", 5),
    ("consecutive_local_origin_failure", 5),
    ("max_ejection_percent", 10),
    ("success_rate_minimum_hosts", 5),
    ("success_rate_request_volume", 100),
    ("success_rate_stdev_factor", 1900),
    ("failure_percentage_threshold", 85),
    ("failure_percentage_minimum_hosts", 5),
    ("failure_percentage_request_volume", 50),
    ("enforcing_consecutive_5xx", 100),
    ("enforcing_consecutive_gateway_failure", 0),
    ("enforcing_consecutive_local_origin_failure", 100),
    ("enforcing_success_rate", 100),
    ("enforcing_local_origin_success_rate", 100),
    ("enforcing_failure_percentage", 0),
    ("enforcing_failure_percentage_local_origin", 0),
)
_ENFORCING = {
    CONSECUTIVE_5XX: "enforcing_consecutive_5xx",
    GATEWAY_FAILURE: "enforcing_consecutive_gateway_failure",
    LOCAL_ORIGIN_FAILURE: "enforcing_consecutive_local_origin_failure",
    SUCCESS_RATE: "enforcing_success_rate",
    LOCAL_SUCCESS_RATE: "enforcing_local_origin_success_rate",
    FAILURE_PERCENTAGE: "enforcing_failure_percentage",
    LOCAL_FAILURE_PERCENTAGE: "enforcing_failure_percentage_local_origin",
}


def declare(scope: Scope) -> None:
    """Make the names of a cluster's statistics known."""
    scope.declare("counter", _COUNTERS)
    scope.declare("gauge", _GAUGES)


class Rate:
    """Requests and successes of the running interval; `finish` moves them to the one that is judged."""

    __slots__ = ("failure", "judged_success", "judged_total", "success", "success_rate")

    def __init__(self) -> None:
        self.success = 0
        self.failure = 0
        self.judged_total = 0
        self.judged_success = 0
        self.success_rate = -1.0  # percent, -1 when there were too few requests

    def finish(self) -> None:
        """The interval is over."""
        self.judged_total, self.judged_success = self.total, self.success
        self.success = self.failure = 0
        self.success_rate = -1.0

    @property
    def total(self) -> int:
        """Requests of the running interval."""
        return self.success + self.failure


class Monitor:
    """What is known of one host."""

    __slots__ = (
        "backoff",
        "ejected_at",
        "external",
        "failures_5xx",
        "failures_gateway",
        "failures_local",
        "host",
        "jitter",
        "local",
        "unejected_at",
    )

    def __init__(self, host: Host) -> None:
        self.host = host
        self.external = Rate()
        self.local = Rate()
        self.failures_5xx = 0
        self.failures_gateway = 0
        self.failures_local = 0
        self.backoff = 0  # multiplier of the base ejection time
        self.jitter = 0.0  # seconds
        self.ejected_at: float | None = None
        self.unejected_at: float | None = None

    @property
    def ejected(self) -> bool:
        """Whether the host is out."""
        return bool(self.host.health_flags & FAILED_OUTLIER_CHECK)

    def forget_failures(self) -> None:
        """Start counting consecutive failures anew."""
        self.failures_5xx = self.failures_gateway = self.failures_local = 0


class Detector:
    """Outlier detection of one cluster."""

    def __init__(self, proto: Any, cluster: Cluster) -> None:
        """Raises ConfigError."""
        self._cluster = cluster
        self._clock = cluster.context.clock
        self._random = cluster.context.random
        self._runtime = cluster.context.runtime
        self._proto = proto
        self.split: bool = proto.split_external_local_origin_errors
        self._always_eject_one: bool = proto.always_eject_one_host.value
        self._uneject_on_check = (
            proto.successful_active_health_check_uneject_host.value if proto.HasField("successful_active_health_check_uneject_host") else True
        )
        self._read_settings()
        if self.max_ejection_time < self.base_ejection_time:
            errors.fail("max_ejection_time", "outlier detector's max_ejection_time cannot be smaller than base_ejection_time")
        self._monitors: dict[int, Monitor] = {}
        self.on_eject: Callable[[Host], None] | None = None
        self.averages = {SUCCESS_RATE: (-1.0, -1.0), LOCAL_SUCCESS_RATE: (-1.0, -1.0)}  # (average, ejection threshold) of success rates in percent
        self._scope = cluster.stats.scope
        self._active = 0

    def _read_settings(self) -> None:
        """From the configuration, with runtime overrides: read again at each sweep."""
        proto, runtime = self._proto, self._runtime
        numbers = {field: getattr(proto, field).value if proto.HasField(field) else default for field, default in _NUMBERS}
        base = milliseconds_of(proto, "base_ejection_time", 30_000)
        times = {
            "interval_ms": milliseconds_of(proto, "interval", 10_000),
            "base_ejection_time_ms": base,
            "max_ejection_time_ms": milliseconds_of(proto, "max_ejection_time", max(300_000, base)),
            "max_ejection_time_jitter_ms": milliseconds_of(proto, "max_ejection_time_jitter", 0),
        }
        if runtime is not None:
            numbers = {field: runtime.integer(f"outlier_detection.{field}", value) for field, value in numbers.items()}
            times = {key: runtime.integer(f"outlier_detection.{key}", value) for key, value in times.items()}
        self._numbers = numbers
        self._consecutive_5xx = numbers["consecutive_5xx"]
        self._consecutive_gateway = numbers["consecutive_gateway_failure"]
        self._consecutive_local = numbers["consecutive_local_origin_failure"]
        self.interval = times["interval_ms"] / 1000.0
        self.base_ejection_time = times["base_ejection_time_ms"] / 1000.0
        self.max_ejection_time = times["max_ejection_time_ms"] / 1000.0
        self._max_jitter_ms = times["max_ejection_time_jitter_ms"]

    # -- hosts

    def add(self, host: Host) -> None:
        """Watch a host."""
        monitor = Monitor(host)
        host.outlier = monitor
        self._monitors[id(host)] = monitor

    def remove(self, host: Host) -> None:
        """A host has left the cluster."""
        monitor = self._monitors.pop(id(host), None)
        if monitor is not None and monitor.ejected:
            self._set_active(self._active - 1)

    # -- for the hot path

    def result(self, host: Host, status: int) -> None:
        """HOT: a response came; `status` is its code, or the one that its gRPC status maps to."""
        monitor = host.outlier
        if 500 <= status < 600:
            monitor.external.failure += 1
            self._failed(monitor, status)
            return
        monitor.external.success += 1
        if monitor.failures_5xx:
            monitor.failures_5xx = monitor.failures_gateway = 0

    def local_failure(self, host: Host, kind: str) -> None:
        """No response: `kind` is "connect_failed" or "reset" (counts as 503) or "timeout" (504)."""
        if not self.split:
            self.result(host, 504 if kind == "timeout" else 503)
            return
        monitor = host.outlier
        monitor.local.failure += 1
        monitor.failures_local += 1
        if monitor.failures_local == self._consecutive_local:
            self._consecutive(monitor, LOCAL_ORIGIN_FAILURE)

    def connected(self, host: Host, *, final: bool = False) -> None:
        """A connection for a request is there. For HTTP it only needs to be said when `split` is set; `final`: that is all there is to say (TCP)."""
        if self.split:
            monitor = host.outlier
            monitor.local.success += 1
            monitor.failures_local = 0
        elif final:
            self.result(host, 200)

    def _failed(self, monitor: Monitor, status: int) -> None:
        if 502 <= status <= 504:
            monitor.failures_gateway += 1
            if monitor.failures_gateway == self._consecutive_gateway:
                self._consecutive(monitor, GATEWAY_FAILURE)
        else:
            monitor.failures_gateway = 0
        monitor.failures_5xx += 1
        if monitor.failures_5xx == self._consecutive_5xx:
            self._consecutive(monitor, CONSECUTIVE_5XX)

    # -- ejection

    def _consecutive(self, monitor: Monitor, kind: str) -> None:
        if monitor.ejected or id(monitor.host) not in self._monitors:
            return
        self._count(f"detected_{kind}")
        self._eject(monitor, kind)
        if kind == CONSECUTIVE_5XX:
            self._count(CONSECUTIVE_5XX)
            monitor.failures_5xx = 0
        elif kind == GATEWAY_FAILURE:
            monitor.failures_gateway = 0
        else:
            monitor.failures_local = 0

    def _eject(self, monitor: Monitor, kind: str) -> None:
        if not self._may_eject():
            self._count("overflow")
            return
        if kind in (CONSECUTIVE_5XX, SUCCESS_RATE):
            self._count("total")
        if not self._enforced(kind):
            return
        self._count("enforced_total")
        self._count(f"enforced_{kind}")
        self._out(monitor)
        if self.on_eject is not None:
            self.on_eject(monitor.host)

    def _may_eject(self) -> bool:
        """Over the whole cluster, not per priority, as in Envoy."""
        if self._always_eject_one and self._active == 0:
            return True
        return 100.0 * (self._active + 1) / len(self._monitors) <= min(100, self._numbers["max_ejection_percent"])

    def _enforced(self, kind: str) -> bool:
        percent = self._numbers[_ENFORCING[kind]]
        return percent >= 100 or (percent > 0 and self._random.random() * 100 < percent)

    def _out(self, monitor: Monitor) -> None:
        self._set_active(self._active + 1)
        monitor.ejected_at = self._clock()
        monitor.jitter = self._random.randint(0, self._max_jitter_ms) / 1000.0 if self._max_jitter_ms else 0.0
        if monitor.backoff * self.base_ejection_time < self.max_ejection_time + self.base_ejection_time:
            monitor.backoff += 1
        self._cluster.set_flags(monitor.host, FAILED_OUTLIER_CHECK)

    def adopt(self, host: Host) -> None:
        """Another worker has ejected `host`."""
        monitor = self._monitors.get(id(host))
        if monitor is not None and not monitor.ejected:
            self._out(monitor)

    def on_health_check_passed(self, host: Host) -> None:
        """An active health check of `host` has passed: it is back, unless the configuration says otherwise."""
        monitor = self._monitors.get(id(host))
        if self._uneject_on_check and monitor is not None and monitor.ejected and not host.health_flags & FAILED_ACTIVE_HC:
            self._back(monitor)

    def _back(self, monitor: Monitor) -> None:
        self._set_active(self._active - 1)
        monitor.forget_failures()
        monitor.unejected_at = self._clock()
        self._cluster.set_flags(monitor.host, clear_bits=FAILED_OUTLIER_CHECK)

    # -- once an interval

    def sweep(self, now: float) -> None:
        """Let hosts back whose time is over, and judge success rates of the interval that ends now."""
        self._read_settings()
        for monitor in self._monitors.values():
            if monitor.ejected and monitor.ejected_at is not None:
                period = min(self.base_ejection_time * monitor.backoff, self.max_ejection_time) + monitor.jitter
                if now - monitor.ejected_at >= period:
                    self._back(monitor)
            monitor.external.finish()
            monitor.local.finish()
        self._judge(SUCCESS_RATE, FAILURE_PERCENTAGE, [(monitor, monitor.external) for monitor in self._monitors.values()])
        self._judge(LOCAL_SUCCESS_RATE, LOCAL_FAILURE_PERCENTAGE, [(monitor, monitor.local) for monitor in self._monitors.values()])
        for monitor in self._monitors.values():
            if not monitor.ejected and monitor.backoff and monitor.unejected_at is not None and now - monitor.unejected_at >= self.interval:
                monitor.backoff -= 1

    def _judge(self, success_kind: str, failure_kind: str, rates: list[tuple[Monitor, Rate]]) -> None:
        numbers = self._numbers
        self.averages[success_kind] = -1.0, -1.0
        if len(rates) < numbers["success_rate_minimum_hosts"] and len(rates) < numbers["failure_percentage_minimum_hosts"]:
            return
        success_volume, failure_volume = numbers["success_rate_request_volume"], numbers["failure_percentage_request_volume"]
        by_success: list[tuple[Monitor, float]] = []
        by_failure: list[tuple[Monitor, float]] = []
        for monitor, rate in rates:
            total = rate.judged_total
            if monitor.ejected or not total:
                continue
            percent = rate.judged_success * 100.0 / total
            if total >= min(success_volume, failure_volume):
                rate.success_rate = percent
            if total >= success_volume:
                by_success.append((monitor, percent))
            if total >= failure_volume:
                by_failure.append((monitor, percent))
        if by_success and len(by_success) >= numbers["success_rate_minimum_hosts"]:
            average, threshold = ejection_threshold([percent for _, percent in by_success], numbers["success_rate_stdev_factor"] / 1000.0)
            self.averages[success_kind] = average, threshold
            for monitor, percent in by_success:
                if percent < threshold:
                    self._count("success_rate")
                    self._count(f"detected_{success_kind}")
                    self._eject(monitor, success_kind)
        if by_failure and len(by_failure) >= numbers["failure_percentage_minimum_hosts"]:
            for monitor, percent in by_failure:
                if 100.0 - percent >= numbers["failure_percentage_threshold"]:
                    self._count(f"detected_{failure_kind}")
                    if not monitor.ejected:  # its success rate may just have done it
                        self._eject(monitor, failure_kind)

    # -- counting

    def _count(self, name: str) -> None:
        self._scope.counter(f"outlier_detection.ejections_{name}").n += 1

    def _set_active(self, active: int) -> None:
        self._active = active
        self._scope.gauge("outlier_detection.ejections_active", shared=True).n = active

    def __repr__(self) -> str:
        return f"<Detector of {self._cluster.name}: {self._active} of {len(self._monitors)} hosts ejected>"


def ejection_threshold(percents: list[float], factor: float) -> tuple[float, float]:
    """(mean, mean - factor x standard deviation of the population)."""
    mean = sum(percents) / len(percents)
    variance = sum((percent - mean) ** 2 for percent in percents) / len(percents)
    return mean, mean - factor * math.sqrt(variance)
