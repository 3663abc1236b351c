"""PEAK_EWMA: of two random hosts the one that will answer sooner.

A host's cost is its latency times the requests that it already has, plus one, divided by its weight. Latency is a peak-sensitive moving average, as
Finagle and Linkerd keep it: a slower response counts at once and in full, a faster one counts the more the longer ago the last one was, and an idle
host's average decays towards zero, so that it is tried again. A host that never answered has `default_rtt`; while its first requests are out it costs
`penalty_value`, so that a host that hangs from the start does not fill up.

Configured by the message of Envoy's contrib extension. Envoy gathers samples for `aggregation_interval`, at most `max_samples_per_host` a host, because
its workers share the averages; ours count each sample at once, and both fields are satisfied by that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from meshproxy.api.durations import seconds_of
from meshproxy.upstream.balance.pipeline import Key, Pipeline
from meshproxy.upstream.balance.weighted import only

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from meshproxy.upstream.balance.base import Balancer, Deps, LbContext, Picker
    from meshproxy.upstream.host import Host, HostSet

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.peak_ewma.v3alpha.PeakEwma"
HONOURS = {
    "envoy.extensions.load_balancing_policies.peak_ewma.v3alpha.PeakEwma": ("decay_time aggregation_interval max_samples_per_host default_rtt penalty_value"),
}

DECAY_TIME = 10.0  # seconds in which an old average loses 63 % of its weight
DEFAULT_RTT = 0.010  # seconds
PENALTY = 1_000_000.0  # milliseconds


def compile(proto: Any, deps: Deps) -> Balancer:
    """The balancer that a PeakEwma message asks for."""
    policy = PeakEwma(
        deps,
        decay_time=seconds_of(proto, "decay_time", DECAY_TIME),
        default_rtt=seconds_of(proto, "default_rtt", DEFAULT_RTT),
        penalty=(proto.penalty_value.value if proto.HasField("penalty_value") else PENALTY) / 1000.0,
    )
    return Pipeline(policy, deps)


class Average:
    """The latency of one host, in seconds."""

    __slots__ = ("at", "seconds")

    def __init__(self, seconds: float, at: float) -> None:
        self.seconds = seconds
        self.at = at  # time of the last sample

    def __repr__(self) -> str:
        return f"Average({self.seconds * 1000:.3f} ms)"


class PeakEwma:
    """Power of two choices by expected latency."""

    looks_ahead = False
    observes_latency = True

    def __init__(self, deps: Deps, *, decay_time: float = DECAY_TIME, default_rtt: float = DEFAULT_RTT, penalty: float = PENALTY / 1000.0) -> None:
        self._clock: Callable[[], float] = deps.clock
        self._random = deps.random.random
        self._rate = -1.0 / max(decay_time, 1e-9)
        self._default_rtt = default_rtt
        self._penalty = penalty

    def refresh(self, host_sets: Sequence[HostSet]) -> None:
        """Averages live in the hosts."""

    def source(self, hosts: list[Host], key: Key) -> Picker:
        """See `Policy.source`."""
        random, count, cost, clock = self._random, len(hosts), self.cost, self._clock
        if count == 1:
            return only(hosts[0])

        def pick(context: LbContext | None = None) -> Host:
            # Two different hosts: the second index is drawn from the others.
            index = int(random() * count)
            other = int(random() * (count - 1))
            first = hosts[index]
            second = hosts[other + 1 if other >= index else other]
            now = clock()
            return second if cost(second, now) < cost(first, now) else first

        return pick

    def cost(self, host: Host, now: float) -> float:
        """What one more request to `host` would cost, in seconds of expected latency."""
        average = host.latency
        active = host.rq_active
        if average is None:
            return (self._penalty + active if active else self._default_rtt) / host.weight
        return average.seconds * math.exp((now - average.at) * self._rate) * (active + 1) / host.weight

    def observe(self, host: Host, seconds: float) -> None:
        """See `Policy.observe`."""
        now = self._clock()
        average = host.latency
        if average is None:
            host.latency = Average(seconds, now)
            return
        if seconds > average.seconds:
            average.seconds = seconds
        else:
            kept = math.exp((now - average.at) * self._rate)
            average.seconds = average.seconds * kept + seconds * (1.0 - kept)
        average.at = now
