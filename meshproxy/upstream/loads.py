"""What load reports (LRS) are made of: what each host of this process has done since it was asked last. Taken in each worker, put together in main."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.record import Record

if TYPE_CHECKING:
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.cluster_manager import ClusterManager
    from meshproxy.upstream.host import Host

# Of a host: its address (ip, port, path), its priority, its locality.
HostKey = tuple[tuple[str, int, str], int, tuple[str, str, str]]


class Tally(Record):
    """Requests of one host: those that ended well or not and those that began since the last time, and those under way."""

    success: int = 0
    error: int = 0
    issued: int = 0
    active: int = 0

    def add(self, success: int, error: int, issued: int, active: int) -> None:
        """Add what another process says of the same host."""
        self.success += success
        self.error += error
        self.issued += issued
        self.active += active


class Loads:
    """One process's part. Hosts that have gone since the last time are not spoken of, as in Envoy."""

    def __init__(self, clusters: ClusterManager) -> None:
        self._clusters = clusters
        self._hosts: dict[Host, tuple[int, int, int]] = {}
        self._drops: dict[Cluster, tuple[int, int]] = {}

    def take(self) -> dict[str, Any]:
        """Cluster -> [requests dropped, of these by an overload policy, its category, hosts that have something to say]; can be marshalled."""
        hosts, drops = self._hosts, self._drops
        self._hosts, self._drops = {}, {}
        taken = {}
        for cluster in self._clusters.compiled():
            now = self._drops[cluster] = cluster.rq_dropped, cluster.rq_drop_overload
            before = drops.get(cluster, (0, 0))
            said = list(self._of_hosts(cluster, hosts))
            if said or now != before:
                taken[cluster.name] = [now[0] - before[0], now[1] - before[1], cluster.drop_category, said]
        return taken

    def _of_hosts(self, cluster: Cluster, before: dict[Host, tuple[int, int, int]]) -> Iterator[tuple[HostKey, tuple[int, int, int, int]]]:
        for host in cluster.hosts:
            now = self._hosts[host] = host.rq_success, host.rq_error, host.rq_total
            success, error, issued = before.get(host, (0, 0, 0))
            numbers = now[0] - success, now[1] - error, now[2] - issued, host.rq_active
            if any(numbers):
                address = host.address
                region, zone, sub_zone = host.locality
                yield ((address.ip, address.port, address.path), host.priority, (region, zone, sub_zone)), numbers
