"""LEAST_REQUEST: of a few random hosts the one with the fewest active requests.

With equal weights `choice_count` (2) hosts are drawn, with replacement as in Envoy, and the first of the least busy wins; or all hosts are looked at
(`FULL_SCAN`). With differing weights or slow start it is an EDF schedule with weight / (active + 1) ^ bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.upstream.balance.pipeline import Key, Pipeline
from meshproxy.upstream.balance.slow_start import HONOURS as _SLOW_START
from meshproxy.upstream.balance.slow_start import SlowStart, compile_slow_start, runtime_double
from meshproxy.upstream.balance.weighted import HONOURS as _LOCALITY
from meshproxy.upstream.balance.weighted import WeightedPolicy, locality_config

if TYPE_CHECKING:
    from meshproxy.upstream.balance.base import Balancer, Deps, LbContext, Picker
    from meshproxy.upstream.host import Host

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest"
HONOURS = {
    "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest": (
        "choice_count active_request_bias slow_start_config locality_lb_config selection_method"
    ),
    **_SLOW_START,
    **_LOCALITY,
}


def compile(proto: Any, deps: Deps) -> Balancer:
    """The balancer that a LeastRequest message asks for. Raises ConfigError."""
    deps.locality = locality_config(proto.locality_lb_config)
    policy = LeastRequest(
        deps,
        compile_slow_start(proto.slow_start_config, deps.clock, deps.runtime),
        choice_count=proto.choice_count.value if proto.HasField("choice_count") else 2,
        bias=runtime_double(proto, "active_request_bias", 1.0, deps.runtime),
        full_scan=proto.selection_method == 1,
    )
    return Pipeline(policy, deps)


class LeastRequest(WeightedPolicy):
    """The least busy of `choice_count` random hosts."""

    def __init__(self, deps: Deps, slow_start: SlowStart | None = None, *, choice_count: int = 2, bias: float = 1.0, full_scan: bool = False) -> None:
        super().__init__(deps, slow_start)
        self._random = deps.random.random
        self._choice_count = choice_count
        self._bias = bias if bias >= 0.0 else 1.0  # as Envoy; also for not-a-number
        self._full_scan = full_scan

    def weight(self, host: Host) -> float:
        bias = self._bias
        active = host.rq_active + 1
        weight = host.weight / active if bias == 1.0 else host.weight / active**bias
        return weight if self.slow_start is None else self.slow_start.apply(weight, host)

    def unweighted(self, hosts: list[Host], key: Key) -> Picker:
        random, count = self._random, len(hosts)
        if self._full_scan:
            return self._scan(hosts)
        choices = self._choice_count
        if choices != 2:
            return self._choose(hosts, choices)

        def pick(context: LbContext | None = None) -> Host:
            first = hosts[int(random() * count)]
            second = hosts[int(random() * count)]
            return second if second.rq_active < first.rq_active else first

        return pick

    def _choose(self, hosts: list[Host], choices: int) -> Picker:
        random, count = self._random, len(hosts)

        def pick(context: LbContext | None = None) -> Host:
            best = hosts[int(random() * count)]
            for _ in range(choices - 1):
                other = hosts[int(random() * count)]
                if other.rq_active < best.rq_active:
                    best = other
            return best

        return pick

    def _scan(self, hosts: list[Host]) -> Picker:
        random = self._random

        def pick(context: LbContext | None = None) -> Host:
            best = hosts[0]
            tied = 1
            for host in hosts[1:]:
                if host.rq_active < best.rq_active:
                    best, tied = host, 1
                elif host.rq_active == best.rq_active:
                    # Each of the tied hosts ends up chosen with the same probability.
                    tied += 1
                    if random() * tied < 1.0:
                        best = host
            return best

        return pick
