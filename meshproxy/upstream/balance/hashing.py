"""What ring hash and Maglev share: priorities chosen by the request's hash, normalised weights, bounded load.

The tables are bit for bit Envoy's, so that a request lands on the same host whichever of the two proxies it comes through.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Protocol

from meshproxy.api import errors
from meshproxy.upstream.balance.priority import PriorityState, choose, priority_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from meshproxy.upstream.balance.base import Deps, LbContext, Picker
    from meshproxy.upstream.host import Host, HostSet

HONOURS = {
    "envoy.extensions.load_balancing_policies.common.v3.ConsistentHashingLbConfig": "use_hostname_for_hashing hash_balance_factor",
    "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig.LocalityWeightedLbConfig": "",
}

MAX_HASH = 0xFFFFFFFFFFFFFFFF
_MAX_WEIGHTS = 0xFFFFFFFF

Weights = list[tuple["Host", float]]  # normalised: they add up to 1


class Table(Protocol):
    """Hosts by hash."""

    def choose(self, hash: int, attempt: int) -> Host | None:
        """The host for `hash`; another one, mostly, for each further `attempt`."""
        ...


class HashBalancer:
    """A balancer around a table. `build(weights)` makes the table of one priority."""

    needs_hash = True
    looks_ahead = False
    observes_latency = False

    def __init__(self, build: Callable[[Weights], Table], deps: Deps, *, locality_weighted: bool = False, balance_factor: int = 0) -> None:
        self._build = build
        self._stats = deps.stats
        self._bits = deps.random.getrandbits
        self._runtime = deps.runtime
        self._panic_threshold = deps.panic_threshold
        self._locality_weighted = locality_weighted
        self._balance_factor = balance_factor
        self._active = deps.active
        self._state = PriorityState([100], [0], [False])
        self._host_sets: Sequence[HostSet] = ()
        self._tables: list[Table] = []

    def rebuild(self, host_sets: Sequence[HostSet]) -> Picker:
        """See `Balancer.rebuild`."""
        threshold = self._panic_threshold if self._runtime is None else self._runtime.integer("upstream.healthy_panic_threshold", self._panic_threshold)
        state = self._state = priority_state(host_sets, threshold)
        self._host_sets = host_sets
        self._tables = []
        for host_set in host_sets:
            weights = normalise(host_set, state.panic[host_set.priority], self._locality_weighted)
            table = self._build(weights)
            if self._balance_factor and weights:
                table = Bounded(table, weights, self._balance_factor, self._active)
            self._tables.append(table)
        return self._pick_only if len(host_sets) == 1 and not state.panic[0] else self._pick

    def _pick_only(self, context: LbContext | None = None) -> Host | None:
        if context is None or context.hash is None:
            return self._tables[0].choose(self._bits(64), 0 if context is None else context.attempt)
        return self._tables[0].choose(context.hash, context.attempt)

    def _pick(self, context: LbContext | None = None) -> Host | None:
        hash = None if context is None else context.hash
        if hash is None:
            hash = self._bits(64)
        state = self._state
        # Priority loads of retry plugins do not reach hash policies in Envoy either.
        priority = choose(hash % 100 + 1, state.healthy_load, state.degraded_load)[0]
        if state.panic[priority]:
            self._stats.lb_healthy_panic.n += 1
        return self._tables[priority].choose(hash, 0 if context is None else context.attempt)

    def observe(self, host: Host, seconds: float) -> None:
        """Latency plays no part."""


def normalise(host_set: HostSet, panic: bool, locality_weighted: bool) -> Weights:
    """Hosts with weights that add up to 1: the healthy ones, or all in panic; by locality first when localities have weights."""
    if not locality_weighted or not host_set.locality_weights:
        return _share(host_set.hosts if panic else host_set.healthy, 1.0)
    total = sum(host_set.locality_weights)
    weights: Weights = []
    for hosts, weight in zip(host_set.by_locality, host_set.locality_weights, strict=True):
        if weight:
            weights += _share([host for host in hosts if panic or host.healthy], weight / total)
    return weights


def _share(hosts: list[Host], part: float) -> Weights:
    total = sum(host.weight for host in hosts)
    return [(host, host.weight * part / total) for host in hosts]


def check_weights(host_sets: Sequence[HostSet]) -> None:
    """Sums of weights must fit into 32 bits. Raises ConfigError."""
    for host_set in host_sets:
        if sum(host.weight for host in host_set.hosts) > _MAX_WEIGHTS:
            errors.fail("", f"The sum of weights of all upstream hosts in a locality exceeds {_MAX_WEIGHTS}")
        if sum(host_set.locality_weights) > _MAX_WEIGHTS:
            errors.fail("", f"The sum of weights of all localities at the same priority exceeds {_MAX_WEIGHTS}")


class Bounded:
    """Consistent hashing with bounded loads: no host gets more than `factor` percent of the average, what exceeds goes to hosts in an order that only
    depends on the hash (arXiv 1608.01350 with the random jumps of arXiv 1908.08762).
    """

    __slots__ = ("_active", "_factor", "_hosts", "_table", "_weights")

    def __init__(self, table: Table, weights: Weights, factor: int, active: Callable[[], int]) -> None:
        self._table = table
        self._hosts = weights
        self._weights = {id(host): weight for host, weight in weights}
        self._factor = factor
        self._active = active

    def choose(self, hash: int, attempt: int) -> Host | None:
        """See `Table.choose`."""
        host = self._table.choose(hash, attempt)
        if host is None:
            return None
        least = self._overload(host, self._weights[id(host)])
        if least <= 1.0:
            return host
        best = host
        for other, weight in self._order(hash):
            if other is host:
                continue
            overload = self._overload(other, weight)
            if overload <= 1.0:
                return other
            if overload < least:
                best, least = other, overload
        return best

    def _overload(self, host: Host, weight: float) -> float:
        slots = ((self._active() + 1) * self._factor + 99) // 100
        return host.rq_active / max(math.ceil(slots * weight), 1)

    def _order(self, hash: int) -> Sequence[tuple[Host, float]]:
        """The hosts in the random order that belongs to a hash."""
        hosts = self._hosts.copy()
        generator = _mersenne_twister(hash)
        for index in range(len(hosts)):
            left = len(hosts) - index
            step = 0x100000000 // left
            jump = left
            while jump >= left:
                jump = generator.getrandbits(32) // step
            hosts[index], hosts[index + jump] = hosts[index + jump], hosts[index]
        return hosts


def _mersenne_twister(seed: int) -> random.Random:
    """MT19937 seeded as C++'s std::mt19937 seeds it (Python's own seeding differs)."""
    word = seed & 0xFFFFFFFF
    state = [word]
    for index in range(1, 624):
        word = (1812433253 * (word ^ (word >> 30)) + index) & 0xFFFFFFFF
        state.append(word)
    generator = random.Random()
    generator.setstate((3, (*state, 624), None))
    return generator
