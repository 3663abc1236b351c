"""Circuit breakers: how much of a cluster may be in use at once, for each routing priority.

Hot code compares plain numbers, `limits.rq < limits.max_rq`, and counts itself. In Envoy one limit holds for all its threads; with one worker so does
ours, at no cost. Several workers are several processes: `SharedLimits` keeps each worker's count in a shared cell of its own, so that a comparison sees
what the others use, and a worker that dies takes its count with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope

HONOURS = {
    "envoy.config.cluster.v3.CircuitBreakers": "thresholds per_host_thresholds",
    "envoy.config.cluster.v3.CircuitBreakers.Thresholds": (
        "priority max_connections max_pending_requests max_requests max_retries retry_budget track_remaining max_connection_pools"
    ),
    "envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget": "budget_percent min_retry_concurrency",
}

PRIORITIES = ("default", "high")
UNLIMITED = 18446744073709551615  # what Envoy prints for no limit

_OPEN = ("cx_open", "cx_pool_open", "rq_open", "rq_pending_open", "rq_retry_open")
GAUGES = tuple(f"circuit_breakers.{priority}.{name}" for priority in PRIORITIES for name in _OPEN)


class Limits:
    """What one priority of a cluster uses (`cx`, `pending`, `rq`, `retries`, `pools`) and may use (`max_*`)."""

    __slots__ = (
        "budget_percent",
        "cx",
        "max_cx",
        "max_cx_per_host",
        "max_pending",
        "max_pools",
        "max_retries",
        "max_rq",
        "min_retry_concurrency",
        "pending",
        "pools",
        "priority",
        "retries",
        "rq",
        "track_remaining",
    )

    def __init__(
        self,
        priority: str = "default",
        *,
        max_cx: int = 1024,
        max_pending: int = 1024,
        max_rq: int = 1024,
        max_retries: int = 3,
        max_pools: int = UNLIMITED,
        max_cx_per_host: int = UNLIMITED,
        budget_percent: float | None = None,
        min_retry_concurrency: int = 3,
        track_remaining: bool = False,
    ) -> None:
        self.priority = priority
        self.max_cx = max_cx
        self.max_pending = max_pending
        self.max_rq = max_rq
        self.max_retries = max_retries
        self.max_pools = max_pools
        self.max_cx_per_host = max_cx_per_host
        self.budget_percent = budget_percent  # None: no retry budget, max_retries holds
        self.min_retry_concurrency = min_retry_concurrency
        self.track_remaining = track_remaining
        self.cx = 0
        self.pending = 0
        self.rq = 0
        self.retries = 0
        self.pools = 0

    def retry_limit(self) -> int:
        """How many retries may be active now: the fixed maximum, or the budget's share of active and pending requests."""
        budget = self.budget_percent
        if budget is None:
            return self.max_retries
        return max(int(budget / 100.0 * (self.rq + self.pending)), self.min_retry_concurrency)

    def can_retry(self) -> bool:
        """Whether one more retry may start. The caller counts `retries` up, and down when the retry is over."""
        return self.retries < self.retry_limit()

    def publish(self, scope: Scope) -> None:
        """Set the gauges `circuit_breakers.<priority>.*`. Called when statistics are collected, never per request."""
        prefix = f"circuit_breakers.{self.priority}."
        limit = self.retry_limit()
        state = (
            ("cx", "cx_open", self.cx, self.max_cx),
            ("cx_pools", "cx_pool_open", self.pools, self.max_pools),
            ("rq", "rq_open", self.rq, self.max_rq),
            ("pending", "rq_pending_open", self.pending, self.max_pending),
            ("retries", "rq_retry_open", self.retries, limit),
        )
        for short, open_name, used, maximum in state:
            scope.gauge(prefix + open_name, shared=True).n = int(used >= maximum)
            if self.track_remaining:
                scope.gauge(f"{prefix}remaining_{short}", shared=True).n = max(maximum - used, 0)

    def __repr__(self) -> str:
        return (
            f"<Limits {self.priority} cx={self.cx}/{self.max_cx} pending={self.pending}/{self.max_pending} rq={self.rq}/{self.max_rq} retries={self.retries}>"
        )


class _Shared:
    """A descriptor pair for one counted resource: `used` is this worker's own count, in a cell; `maximum` what the other workers leave of it."""

    def __init__(self, index: int) -> None:
        self.used = property(lambda limits: int(limits.cells[limits.own[index]]), lambda limits, value: limits.cells.__setitem__(limits.own[index], value))
        self.maximum = property(lambda limits: limits.left(index), lambda limits, value: limits.maxima.__setitem__(index, value))


_CX, _PENDING, _RQ, _RETRIES = range(4)
_cx, _pending, _rq, _retries = map(_Shared, range(4))


class SharedLimits(Limits):
    """Limits of several workers together. Reading a number costs about 0.2 us more than in `Limits`."""

    __slots__ = ("cells", "maxima", "others", "own")

    cx, max_cx = _cx.used, _cx.maximum
    pending, max_pending = _pending.used, _pending.maximum
    rq, max_rq = _rq.used, _rq.maximum
    retries, max_retries = _retries.used, _retries.maximum

    def __init__(self, priority: str, cells: Any, own: list[int], others: list[list[int]], **limits: Any) -> None:
        self.cells = cells
        self.own = own  # cell of each resource
        self.others = others  # of each resource, the cells of the other workers
        self.maxima = [0, 0, 0, 0]
        super().__init__(priority, **limits)

    def left(self, index: int) -> int:
        """What the other workers leave of a maximum."""
        cells = self.cells
        used = 0.0
        for cell in self.others[index]:
            used += cells[cell]
        return max(0, self.maxima[index] - int(used))

    def elsewhere(self, index: int) -> int:
        """How much the other workers use."""
        return int(sum(self.cells[cell] for cell in self.others[index]))

    def retry_limit(self) -> int:
        budget = self.budget_percent
        if budget is None:
            return self.max_retries
        active = self.rq + self.pending + self.elsewhere(_RQ) + self.elsewhere(_PENDING)
        return max(int(budget / 100.0 * active), self.min_retry_concurrency) - self.elsewhere(_RETRIES)


_RESOURCES = ("cx", "pending", "rq", "retries")


def compile_limits(proto: Any, cluster_name: str, context: Context, *, share: bool = True) -> tuple[Limits, Limits]:
    """The limits of the default and of the high priority. `proto`: envoy.config.cluster.v3.CircuitBreakers. Raises ConfigError.

    `share`: with several workers, count together with them.
    """
    return _compile(proto, 0, cluster_name, context, share), _compile(proto, 1, cluster_name, context, share)


def _compile(proto: Any, priority: int, cluster_name: str, context: Context, share: bool) -> Limits:
    values = _thresholds(proto, priority)
    per_host = next((entry for entry in proto.per_host_thresholds if entry.priority == priority), None)
    if per_host is not None:
        for name in ("max_pending_requests", "max_requests", "max_retries", "max_connection_pools", "retry_budget"):
            if per_host.HasField(name):
                errors.fail(f"per_host_thresholds[{list(proto.per_host_thresholds).index(per_host)}].{name}", "Unsupported field in per_host_thresholds")
        if per_host.HasField("max_connections"):
            values["max_cx_per_host"] = per_host.max_connections.value
    name = PRIORITIES[priority]
    _apply_runtime(values, f"circuit_breakers.{cluster_name}.{name}.", context)
    if share and context.concurrency > 1 and context.worker_id >= 0:  # what main asks for itself is counted apart
        return _share(name, values, cluster_name, context)
    return Limits(name, **values)


def _thresholds(proto: Any, priority: int) -> dict[str, Any]:
    # The first entry of a priority counts, as in Envoy.
    entry = next((entry for entry in proto.thresholds if entry.priority == priority), None)
    if entry is None:
        return {}
    values: dict[str, Any] = {}
    for field, name in (
        ("max_connections", "max_cx"),
        ("max_pending_requests", "max_pending"),
        ("max_requests", "max_rq"),
        ("max_retries", "max_retries"),
        ("max_connection_pools", "max_pools"),
    ):
        if entry.HasField(field):
            values[name] = getattr(entry, field).value
    if entry.HasField("retry_budget"):
        budget = entry.retry_budget
        values["budget_percent"] = budget.budget_percent.value if budget.HasField("budget_percent") else 20.0
        values["min_retry_concurrency"] = budget.min_retry_concurrency.value if budget.HasField("min_retry_concurrency") else 3
    values["track_remaining"] = entry.track_remaining
    return values


_RUNTIME = {"max_connections": "max_cx", "max_pending_requests": "max_pending", "max_requests": "max_rq", "max_retries": "max_retries"}


def _apply_runtime(values: dict[str, Any], prefix: str, context: Context) -> None:
    runtime = context.runtime
    if runtime is None:
        return
    for key, name in _RUNTIME.items():
        override = runtime.integer(prefix + key, -1)
        if override >= 0:
            values[name] = override


def _share(name: str, values: dict[str, Any], cluster_name: str, context: Context) -> Limits:
    cells = getattr(context, "cells", None)
    if cells is not None:
        keys = [[f"limits/{cluster_name}/{name}/{resource}/{worker}".encode() for worker in range(context.concurrency)] for resource in _RESOURCES]
        found = [[cells.find(key) for key in row] for row in keys]
        if all(cell is not None for row in found for cell in row):
            own = [row[context.worker_id] for row in found]
            others = [[cell for worker, cell in enumerate(row) if worker != context.worker_id] for row in found]
            mark = SharedLimits, cluster_name, name
            if mark not in context.shared:  # else an earlier version of the cluster still counts there
                context.shared[mark] = True
                for cell in own:
                    cells.values[cell] = 0.0  # a crashed predecessor may have left its count
            return SharedLimits(name, cells.values, own, others, **values)
    # No shared memory to be had: an equal share each, right in sum when connections are spread evenly.
    limits = Limits(name, **values)
    for attribute in ("max_cx", "max_pending", "max_rq", "max_retries"):
        setattr(limits, attribute, -(-getattr(limits, attribute) // context.concurrency))
    return limits
