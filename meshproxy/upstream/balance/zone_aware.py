"""Zone-aware routing: stay in the proxy's own zone as far as that keeps the hosts of all zones equally busy.

Needs to know how many proxies there are in each zone, from the cluster that this proxy itself belongs to (`cluster_manager.local_cluster_name`). When the
own zone has at least as large a share of the upstream's hosts as of the proxies, everything stays; else what exceeds its share goes to the zones that
have capacity left, in proportion. Shares are in 1/10000, as in Envoy.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.upstream.balance.base import LocalityConfig
    from meshproxy.upstream.host import Host, HostSet, Locality
    from meshproxy.upstream.stats import ClusterStats


class Zones:
    """The decision for one set of hosts: `pick()` gives the index of a locality."""

    __slots__ = ("_capacity", "_direct", "_random", "_stats", "_to_local")

    def __init__(self, stats: ClusterStats, random: Callable[[], float], capacity: list[int], *, to_local: int = 0, direct: bool = False) -> None:
        self._stats = stats
        self._random = random
        self._capacity = capacity  # running sum of what each zone can still take
        self._to_local = to_local  # of 10000
        self._direct = direct

    @classmethod
    def compute(cls, upstream: HostSet, local: HostSet, config: LocalityConfig, stats: ClusterStats, runtime: Any, random: Callable[[], float]) -> Zones | None:
        """The decision, or None when zones should play no part."""
        stats.lb_recalculate_zone_structures.n += 1
        forced = config.force_local_zone_min_size
        if not _applicable(upstream, local, config, stats, runtime):
            return None
        healthy = [[host for host in hosts if host.healthy] for hosts in upstream.by_locality]
        shares = _shares([[host for host in hosts if host.healthy] for hosts in local.by_locality], healthy, config.basis_weight)
        if upstream.has_local:
            proxies, hosts = shares[0]
            if 0 < hosts >= proxies or (forced is not None and len(healthy[0]) >= forced):
                return cls(stats, random, [], direct=True)
        to_local = shares[0][1] * 10000 // shares[0][0] if upstream.has_local and shares[0][0] > 0 else 0
        capacity = []
        total = 0
        for index, (proxies, hosts) in enumerate(shares):
            if not (index == 0 and upstream.has_local) and hosts > proxies:
                total += hosts - proxies
            capacity.append(total)
        return cls(stats, random, capacity, to_local=to_local)

    def pick(self) -> int:
        """The index of the locality that takes the next request."""
        stats = self._stats
        if self._direct:
            stats.lb_zone_routing_all_directly.n += 1
            return 0
        random = self._random
        if int(random() * 10000) < self._to_local:
            stats.lb_zone_routing_sampled.n += 1
            return 0
        stats.lb_zone_routing_cross_zone.n += 1
        capacity = self._capacity
        total = capacity[-1]
        if total == 0:  # rounding took all of it
            stats.lb_zone_no_capacity_left.n += 1
            return int(random() * len(capacity))
        return bisect.bisect_right(capacity, int(random() * total))


def _applicable(upstream: HostSet, local: HostSet, config: LocalityConfig, stats: ClusterStats, runtime: Any) -> bool:
    if len(upstream.by_locality) < 2:
        return False
    if config.force_local_zone_min_size is None and len(local.by_locality) < 2:
        return False
    if not local.has_local or not local.by_locality[0]:
        stats.lb_local_cluster_not_ok.n += 1
        return False
    minimum = config.min_cluster_size if runtime is None else runtime.integer("upstream.zone_routing.min_cluster_size", config.min_cluster_size)
    if len(upstream.healthy) < minimum:
        stats.lb_zone_cluster_too_small.n += 1
        return False
    return True


def _shares(local: list[list[Host]], upstream: list[list[Host]], by_weight: bool) -> list[tuple[int, int]]:
    """For each upstream locality its share of the proxies and of the upstream hosts."""

    def size(hosts: list[Host]) -> int:
        return sum(host.weight for host in hosts) if by_weight else len(hosts)

    proxies: dict[Locality, int] = {hosts[0].locality: size(hosts) for hosts in local if hosts}
    all_proxies = sum(map(size, local))
    all_hosts = sum(map(size, upstream))
    shares = []
    for hosts in upstream:
        if not hosts:
            shares.append((0, 0))
            continue
        here = proxies.get(hosts[0].locality, 0)
        shares.append((10000 * here // all_proxies if all_proxies else 0, 10000 * size(hosts) // all_hosts if all_hosts else 0))
    return shares
