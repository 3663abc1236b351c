"""Slow start: a host that has just become healthy gets its share of requests little by little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.durations import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshproxy.upstream.host import Host

_FIELDS = "slow_start_window aggression min_weight_percent"
HONOURS = {
    "envoy.config.cluster.v3.Cluster.SlowStartConfig": _FIELDS,
    "envoy.extensions.load_balancing_policies.common.v3.SlowStartConfig": _FIELDS,
    "envoy.config.core.v3.RuntimeDouble": "default_value runtime_key",
}


class SlowStart:
    """Weights during `window` seconds after a host became healthy: weight x max(min_weight, (age / window) ^ (1 / aggression))."""

    __slots__ = ("_clock", "_exponent", "_latest", "min_weight", "window")

    def __init__(self, window: float, clock: Callable[[], float], *, aggression: float = 1.0, min_weight: float = 0.1) -> None:
        self.window = window
        self.min_weight = min_weight
        self._clock = clock
        self._exponent = 1.0 / (aggression if aggression > 0.0 else 1.0)  # not positive can only come from runtime; Envoy falls back to 1 as well
        self._latest = clock()  # when the youngest host came

    def note(self, hosts: Iterable[Host]) -> None:
        """Take notice of hosts that may have become healthy."""
        now = self._clock()
        for host in hosts:
            if host.healthy:
                since = host.last_healthy
                if since is None:
                    since = host.last_healthy = now
                if since > self._latest and now - since <= self.window:
                    self._latest = since

    @property
    def running(self) -> bool:
        """Whether any host may be in slow start."""
        return self._clock() - self._latest <= self.window

    def apply(self, weight: float, host: Host) -> float:
        """The weight of `host` now."""
        since = host.last_healthy
        if since is None or not host.healthy:
            return weight
        age = self._clock() - since
        if age >= self.window:
            return weight
        share = max(0.001, age) / self.window
        if self._exponent != 1.0 and share != 1.0:
            share **= self._exponent
        return weight * max(share, self.min_weight)


def compile_slow_start(proto: Any, clock: Callable[[], float], runtime: Any) -> SlowStart | None:
    """From a SlowStartConfig (either package); None when its window is zero. Raises ConfigError."""
    window = seconds(proto.slow_start_window)
    if window <= 0:
        return None
    aggression = runtime_double(proto, "aggression", 1.0, runtime)
    if proto.HasField("min_weight_percent") and not 0 <= proto.min_weight_percent.value <= 100:
        errors.fail("min_weight_percent.value", "value must be between 0 and 100")
    min_weight = proto.min_weight_percent.value / 100.0 if proto.HasField("min_weight_percent") else 0.1
    return SlowStart(window, clock, aggression=aggression, min_weight=min_weight)


def runtime_double(proto: Any, field: str, default: float, runtime: Any) -> float:
    """A RuntimeDouble field of `proto`, or `default` when it is not set."""
    if not proto.HasField(field):
        return default
    value = getattr(proto, field)
    return runtime.number(value.runtime_key, value.default_value) if runtime is not None else value.default_value
