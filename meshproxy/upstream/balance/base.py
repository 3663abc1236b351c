"""What all load balancing policies share: what they are told about a request, what they are made from, and their interface.

A *balancer* belongs to one cluster. `rebuild(host_sets)` takes the cluster's hosts (one `HostSet` a priority) after every change and returns a *picker*,
a plain function `pick(context) -> Host | None`, which is all that the hot path ever calls: whatever can be decided when hosts change is decided there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.record import Record

if TYPE_CHECKING:
    import random

    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.balance.priority import PriorityState
    from meshproxy.upstream.host import Host, HostSet
    from meshproxy.upstream.stats import ClusterStats

Picker = Callable[["LbContext | None"], "Host | None"]
# (host sets, the balancer's own state) -> (healthy load, degraded load) of each priority, in percent
PriorityLoad = Callable[["Sequence[HostSet]", "PriorityState"], tuple[Sequence[int], Sequence[int]]]


class LbContext:
    """What a policy may know about the request. `None` instead of one means: nothing.

    `hash` is the request's hash (64 bits) if its route has a hash policy. `attempt` counts the picks of one host selection whose result was refused, from 0
    (retry host predicates): hash policies go on from there. `priority_load` replaces the load of the priorities (retry priority plugins).
    """

    __slots__ = ("attempt", "hash", "metadata_match", "priority_load", "stream", "tried")

    def __init__(
        self,
        hash: int | None = None,
        *,
        metadata_match: dict[str, Any] | None = None,
        attempt: int = 0,
        tried: Sequence[Host] = (),
        stream: Any = None,
        priority_load: PriorityLoad | None = None,
    ) -> None:
        self.hash = hash
        self.metadata_match = metadata_match
        self.attempt = attempt
        self.tried = tried
        self.stream = stream
        self.priority_load = priority_load


class Balancer(Protocol):
    """A policy at work for one cluster."""

    looks_ahead: bool  # whether what the picker says does not depend on when it is asked: hosts can be chosen before their requests come
    needs_hash: bool  # whether a request hash makes a difference
    observes_latency: bool  # whether `observe` wants to be called

    def rebuild(self, host_sets: Sequence[HostSet]) -> Picker:
        """Take new hosts, or new health of hosts; from now on only the returned picker may be used."""
        ...

    def observe(self, host: Host, seconds: float) -> None:
        """A response took that long."""
        ...


class Deps(Record):
    """What a balancer is made from."""

    stats: ClusterStats
    scope: Scope  # cluster.<name>.
    random: random.Random
    clock: Callable[[], float]
    panic_threshold: int = 50  # percent
    active: Callable[[], int] = lambda: 0  # active requests of the whole cluster
    runtime: Any = None  # api.runtime.Runtime or None
    locality: LocalityConfig | None = None
    # () -> host set of the cluster that this proxy belongs to (cluster_manager.local_cluster_name), for zone-aware routing
    local_hosts: Callable[[], HostSet | None] = lambda: None


class LocalityConfig(Record, frozen=True):
    """How localities take part: by their weights, or by zone-aware routing (when `weighted` is false)."""

    weighted: bool = False
    routing_enabled: int = 100  # percent
    min_cluster_size: int = 6
    fail_traffic_on_panic: bool = False
    force_local_zone_min_size: int | None = None
    basis_weight: bool = False  # a locality's share is the sum of its hosts' weights instead of their number


def nobody(context: LbContext | None = None) -> None:
    """The picker of an empty set of hosts."""
