"""ROUND_ROBIN: in turn, from a random start; with differing weights or slow start, by an EDF schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.upstream.balance.pipeline import Key, Pipeline
from meshproxy.upstream.balance.slow_start import HONOURS as _SLOW_START
from meshproxy.upstream.balance.slow_start import SlowStart, compile_slow_start
from meshproxy.upstream.balance.weighted import HONOURS as _LOCALITY
from meshproxy.upstream.balance.weighted import WeightedPolicy, locality_config

if TYPE_CHECKING:
    from meshproxy.upstream.balance.base import Balancer, Deps, LbContext, Picker
    from meshproxy.upstream.host import Host

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
HONOURS = {
    "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin": "slow_start_config locality_lb_config",
    **_SLOW_START,
    **_LOCALITY,
}


def compile(proto: Any, deps: Deps) -> Balancer:
    """The balancer that a RoundRobin message asks for. Raises ConfigError."""
    deps.locality = locality_config(proto.locality_lb_config)
    return Pipeline(RoundRobin(deps, compile_slow_start(proto.slow_start_config, deps.clock, deps.runtime)), deps)


class RoundRobin(WeightedPolicy):
    """In turn. The place in each list is kept when the list changes."""

    looks_ahead = True

    def __init__(self, deps: Deps, slow_start: SlowStart | None = None) -> None:
        super().__init__(deps, slow_start)
        self._turns: dict[Key, _Turn] = {}
        if slow_start is None:
            self.weight = _weight  # type: ignore[method-assign]

    def weight(self, host: Host) -> float:
        return self.slow_start.apply(host.weight, host)  # type: ignore[union-attr]

    def unweighted(self, hosts: list[Host], key: Key) -> Picker:
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = _Turn(self._seed)
        turn.hosts = hosts
        turn.count = len(hosts)
        return turn.pick


def _weight(host: Host) -> float:
    return host.weight


class _Turn:
    """Whose turn it is."""

    __slots__ = ("count", "hosts", "next")

    def __init__(self, start: int) -> None:
        self.hosts: list[Host] = []
        self.count = 0
        self.next = start

    def pick(self, context: LbContext | None = None) -> Host:
        turn = self.next
        self.next = turn + 1
        return self.hosts[turn % self.count]
