"""From a policy for a list of hosts to a balancer for a cluster: priority, panic, locality, then the policy.

A policy (`round_robin`, `least_request`, `random`, `peak_ewma`) offers `source(hosts, key) -> Picker` for one list of hosts. `Pipeline.rebuild` decides
which lists can be chosen at all. Mostly that is one, the healthy hosts of priority 0, and then its picker *is* the cluster's picker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from meshproxy.upstream.balance.base import Deps, LbContext, LocalityConfig, Picker, nobody
from meshproxy.upstream.balance.edf import Edf
from meshproxy.upstream.balance.priority import PriorityState, choose, in_panic, priority_state
from meshproxy.upstream.balance.zone_aware import Zones

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from meshproxy.upstream.host import Host, HostSet


# Names a list of hosts over rebuilds, so that a policy may keep what it knows about it: its priority; "all", "healthy" or "degraded"; the index of its
# locality, or -1: all of them.
Key = tuple[int, str, int]


class Policy(Protocol):
    """How to choose among the hosts of one list."""

    looks_ahead: bool
    observes_latency: bool

    def refresh(self, host_sets: Sequence[HostSet]) -> None:
        """Hosts changed; `source` calls follow."""
        ...

    def source(self, hosts: list[Host], key: Key) -> Picker:
        """A picker for a list that is not empty."""
        ...

    def observe(self, host: Host, seconds: float) -> None:
        """A response took that long."""
        ...


class Pipeline:
    """A balancer around a policy."""

    needs_hash = False

    def __init__(self, policy: Policy, deps: Deps) -> None:
        self.policy = policy
        self.looks_ahead = policy.looks_ahead
        self.observes_latency = policy.observes_latency
        self.observe = policy.observe
        self._stats = deps.stats
        self._random = deps.random.random
        self._bits = deps.random.getrandbits
        self._runtime = deps.runtime
        self._panic_threshold = deps.panic_threshold
        self._locality = deps.locality or LocalityConfig()
        self._local_hosts = deps.local_hosts
        self._host_sets: Sequence[HostSet] = ()
        self._state = PriorityState([100], [0], [False])
        self._pickers: dict[tuple[int, bool], Picker] = {}
        self._table: list[Picker] = []

    def weigh_localities(self, config: LocalityConfig) -> None:
        """Let localities take part as `config` says; before the first `rebuild`."""
        self._locality = config

    def rebuild(self, host_sets: Sequence[HostSet]) -> Picker:
        """See `Balancer.rebuild`."""
        self._host_sets = host_sets
        threshold = self._panic_threshold if self._runtime is None else self._runtime.integer("upstream.healthy_panic_threshold", self._panic_threshold)
        state = self._state = priority_state(host_sets, threshold)
        self._pickers = {}
        self.policy.refresh(host_sets)
        table: list[Picker] = []
        for degraded, loads in ((False, state.healthy_load), (True, state.degraded_load)):
            for priority, load in enumerate(loads):
                if load:
                    table += [self._picker(priority, degraded)] * load
        table += [self._picker(0, False)] * (100 - len(table))
        self._table = table
        if len(host_sets) == 1 and all(picker is table[0] for picker in table):
            return table[0]
        return self._pick

    def _pick(self, context: LbContext | None = None) -> Host | None:
        if context is not None and context.priority_load is not None:
            loads = context.priority_load(self._host_sets, self._state)
            return self._picker(*choose(int(self._random() * 100) + 1, *loads))(context)
        return self._table[int(self._random() * 100)](context)

    def _picker(self, priority: int, degraded: bool) -> Picker:
        key = priority, degraded
        picker = self._pickers.get(key)
        if picker is None:
            picker = self._pickers[key] = self._build(self._host_sets[priority], degraded)
        return picker

    def _build(self, host_set: HostSet, degraded: bool) -> Picker:
        if self._state.panic[host_set.priority]:
            return self._panicking(host_set)
        hosts, kind = (host_set.degraded, "degraded") if degraded else (host_set.healthy, "healthy")
        flat = self._source(hosts, (host_set.priority, kind, -1))
        if self._locality.weighted:
            return self._weighted(host_set, degraded) or flat
        if host_set.priority == 0:
            local = self._local_hosts()
            if local is not None:
                return self._zone_aware(host_set, local, degraded, flat)
        return flat

    def _source(self, hosts: list[Host], key: Key) -> Picker:
        return self.policy.source(hosts, key) if hosts else nobody

    def _panicking(self, host_set: HostSet) -> Picker:
        pick = nobody if self._locality.fail_traffic_on_panic else self._source(host_set.hosts, (host_set.priority, "all", -1))
        counter = self._stats.lb_healthy_panic

        def panicking(context: LbContext | None = None) -> Host | None:
            counter.n += 1
            return pick(context)

        return panicking

    def _locality_pickers(self, host_set: HostSet, degraded: bool) -> list[Picker]:
        kind = "degraded" if degraded else "healthy"
        return [
            self._source([host for host in hosts if (host.degraded if degraded else host.healthy)], (host_set.priority, kind, index))
            for index, hosts in enumerate(host_set.by_locality)
        ]

    def _weighted(self, host_set: HostSet, degraded: bool) -> Picker | None:
        """Choose a locality by its weight and availability first; None when no locality has any."""
        weights = locality_weights(host_set, degraded)
        entries = [index for index, weight in enumerate(weights) if weight > 0]
        if not entries:
            return None
        pickers = self._locality_pickers(host_set, degraded)
        if len(entries) == 1:
            return pickers[entries[0]]
        schedule = Edf(entries, weights.__getitem__, self._bits(32))
        return _through(schedule.pick, pickers)

    def _zone_aware(self, host_set: HostSet, local: HostSet, degraded: bool, flat: Picker) -> Picker:
        """Prefer the proxy's own zone as far as that keeps all hosts equally busy."""
        zones = Zones.compute(host_set, local, self._locality, self._stats, self._runtime, self._random)
        if zones is None:
            return flat
        if in_panic(local, self._panic_threshold):
            counter = self._stats.lb_local_cluster_not_ok
            fallback = nobody if self._locality.fail_traffic_on_panic else flat

            def local_cluster_in_panic(context: LbContext | None = None) -> Host | None:
                counter.n += 1
                return fallback(context)

            return local_cluster_in_panic
        pickers = self._locality_pickers(host_set, degraded)
        enabled = (
            self._locality.routing_enabled if self._runtime is None else self._runtime.integer("upstream.zone_routing.enabled", self._locality.routing_enabled)
        )
        routed = _through(zones.pick, pickers)
        if enabled >= 100:
            return routed
        random = self._random

        def pick(context: LbContext | None = None) -> Host | None:
            return (routed if random() * 100 < enabled else flat)(context)

        return pick


def _through(choose_locality: Callable[[], int], pickers: list[Picker]) -> Picker:
    def pick(context: LbContext | None = None) -> Host | None:
        return pickers[choose_locality()](context)

    return pick


def locality_weights(host_set: HostSet, degraded: bool = False) -> list[float]:
    """The effective weight of each locality: its weight times its availability, over-provisioning included."""
    if not any(host_set.locality_weights) or not (host_set.degraded if degraded else host_set.healthy):
        return [0.0] * len(host_set.by_locality)
    excluded = set(map(id, host_set.excluded))
    weights = []
    for hosts, weight in zip(host_set.by_locality, host_set.locality_weights, strict=True):
        count = sum(id(host) not in excluded for host in hosts)
        eligible = sum(host.degraded if degraded else host.healthy for host in hosts)
        available = min(1.0, host_set.overprovisioning_factor / 100.0 * (1.0 * eligible / count)) if count > 0 else 0.0
        weights.append(weight * available)
    return weights
