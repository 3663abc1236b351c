"""Hosts of a cluster: who they are, how healthy they are, and the sets that load balancing looks at.

A `Host` belongs to its cluster and keeps its counters over configuration updates; a `HostSet` is the list of hosts of one priority, sorted by health
and by locality, rebuilt as a whole whenever one of its hosts changes its health.
"""

from __future__ import annotations

from sys import intern
from typing import TYPE_CHECKING, Any, NamedTuple

from meshproxy.codec.grpc import http_of_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from meshproxy.net.address import Address
    from meshproxy.upstream.cluster import Cluster

# Health flags, with Envoy's bits, in the order in which /clusters prints them.
FAILED_ACTIVE_HC = 0x1
FAILED_OUTLIER_CHECK = 0x2
FAILED_EDS_HEALTH = 0x4
DEGRADED_ACTIVE_HC = 0x8
DEGRADED_EDS_HEALTH = 0x10
PENDING_DYNAMIC_REMOVAL = 0x20
PENDING_ACTIVE_HC = 0x40
EXCLUDED_VIA_IMMEDIATE_HC_FAIL = 0x80
ACTIVE_HC_TIMEOUT = 0x100
EDS_STATUS_DRAINING = 0x200

FLAG_NAMES = (
    (FAILED_ACTIVE_HC, "failed_active_hc"),
    (FAILED_OUTLIER_CHECK, "failed_outlier_check"),
    (FAILED_EDS_HEALTH, "failed_eds_health"),
    (DEGRADED_ACTIVE_HC, "degraded_active_hc"),
    (DEGRADED_EDS_HEALTH, "degraded_eds_health"),
    (PENDING_DYNAMIC_REMOVAL, "pending_dynamic_removal"),
    (PENDING_ACTIVE_HC, "pending_active_hc"),
    (EXCLUDED_VIA_IMMEDIATE_HC_FAIL, "excluded_via_immediate_hc_fail"),
    (ACTIVE_HC_TIMEOUT, "active_hc_timeout"),
    (EDS_STATUS_DRAINING, "eds_status_draining"),
)

UNHEALTHY = FAILED_ACTIVE_HC | FAILED_OUTLIER_CHECK | FAILED_EDS_HEALTH | EDS_STATUS_DRAINING
DEGRADED = DEGRADED_ACTIVE_HC | DEGRADED_EDS_HEALTH
EXCLUDED = PENDING_ACTIVE_HC | EXCLUDED_VIA_IMMEDIATE_HC_FAIL | EDS_STATUS_DRAINING
EDS_FLAGS = FAILED_EDS_HEALTH | DEGRADED_EDS_HEALTH | EDS_STATUS_DRAINING
ACTIVE_FLAGS = FAILED_ACTIVE_HC | DEGRADED_ACTIVE_HC | PENDING_ACTIVE_HC | ACTIVE_HC_TIMEOUT | EXCLUDED_VIA_IMMEDIATE_HC_FAIL

# envoy.config.core.v3.HealthStatus -> flags. UNKNOWN and HEALTHY set none.
_EDS_STATUS = {2: FAILED_EDS_HEALTH, 3: EDS_STATUS_DRAINING, 4: FAILED_EDS_HEALTH, 5: DEGRADED_EDS_HEALTH}


def eds_flags(health_status: int) -> int:
    """The health flags that an endpoint's `health_status` sets."""
    return _EDS_STATUS.get(health_status, 0)


def flags_text(flags: int) -> str:
    """`healthy`, or `/failed_active_hc/failed_outlier_check` as in /clusters."""
    if not flags:
        return "healthy"
    return "".join(f"/{name}" for bit, name in FLAG_NAMES if flags & bit) or "healthy"


class Locality(NamedTuple):
    """Where a host is. Ordered as Envoy orders localities."""

    region: str = ""
    zone: str = ""
    sub_zone: str = ""


NOWHERE = Locality()


class Host:
    """One upstream host.

    Hot code counts directly: `host.rq_active += 1`. `pools` belongs to upstream.pool (the connections to this host), `outlier` to upstream.outlier.
    `health_flags` is a union of the bits above; it is changed through the cluster (`Cluster.set_flags`), which rebuilds the host sets.
    """

    __slots__ = (
        "address",
        "addresses",
        "canary",
        "cluster",
        "cx_active",
        "cx_connect_fail",
        "cx_total",
        "health_check",
        "health_flags",
        "hostname",
        "last_healthy",
        "latency",
        "locality",
        "locality_metadata",
        "metadata",
        "outlier",
        "pools",
        "priority",
        "proxy_protocol",
        "rq_active",
        "rq_error",
        "rq_pending_active",
        "rq_success",
        "rq_timeout",
        "rq_total",
        "transport",
        "weight",
        "zone_stat",
    )

    def __init__(
        self,
        cluster: Cluster,
        address: Address,
        *,
        hostname: str = "",
        weight: int = 1,
        priority: int = 0,
        locality: Locality = NOWHERE,
        metadata: dict[str, Any] | None = None,
        locality_metadata: dict[str, Any] | None = None,
        health_flags: int = 0,
        health_check: Any = None,
        addresses: tuple[Address, ...] = (),
    ) -> None:
        self.cluster = cluster
        self.address = address
        self.addresses = addresses  # all of them when there is more than one (dual-stack endpoints), the primary one first
        self.hostname = hostname
        self.weight = weight
        self.priority = priority
        self.locality = locality
        self.metadata = metadata
        self.locality_metadata = locality_metadata
        self.canary = _is_canary(metadata)
        # `<our zone>.<its zone>`, by which responses are counted too; '' where one of them is not known.
        self.zone_stat = intern(f"{zone}.{locality.zone}") if locality.zone and (zone := getattr(cluster, "local_zone", "")) else ""
        self.health_flags = health_flags
        self.health_check = health_check  # envoy.config.endpoint.v3.Endpoint.HealthCheckConfig or None
        self.last_healthy: float | None = None  # monotonic time of becoming healthy (first successful check); slow start counts from here
        self.transport: Any = None  # net.tls upstream context of this host, or None for plaintext; the cluster's, unless a transport socket match chose another
        self.proxy_protocol = 0  # version of the PROXY header that its connections begin with; 0: none
        self.outlier: Any = None
        self.latency: Any = None  # state of the balancer, if it has one for each host
        self.pools: dict[Any, Any] | None = None
        self.cx_active = 0
        self.cx_total = 0
        self.cx_connect_fail = 0
        self.rq_active = 0
        self.rq_pending_active = 0
        self.rq_total = 0
        self.rq_error = 0
        self.rq_success = 0
        self.rq_timeout = 0

    @property
    def healthy(self) -> bool:
        """Neither unhealthy nor degraded."""
        return not self.health_flags & (UNHEALTHY | DEGRADED)

    @property
    def degraded(self) -> bool:
        """Degraded, but not unhealthy."""
        flags = self.health_flags
        return bool(flags & DEGRADED) and not flags & UNHEALTHY

    def set_metadata(self, metadata: dict[str, Any] | None) -> None:
        """Replace the endpoint's metadata and what follows from it."""
        self.metadata = metadata
        self.canary = _is_canary(metadata)

    def hash_key(self, use_hostname: bool) -> str:
        """What consistent hashing knows this host by: `hash_key` of its envoy.lb metadata, else host name or address."""
        metadata = self.metadata
        if metadata:
            key = metadata.get("envoy.lb", _NO_METADATA).get("hash_key")
            if key and isinstance(key, str):
                return key
        return self.hostname if use_hostname else self.address.text

    def __repr__(self) -> str:
        return f"<Host {self.address.text} {flags_text(self.health_flags)} weight={self.weight} rq_active={self.rq_active}>"


_NO_METADATA: Mapping[str, Any] = {}


def _is_canary(metadata: dict[str, Any] | None) -> bool:
    return bool(metadata) and metadata.get("envoy.lb", _NO_METADATA).get("canary") is True  # type: ignore[union-attr]


class HostSet:
    """The hosts of one priority, by health and by locality. Immutable: changes make a new one.

    Localities keep Envoy's order: the proxy's own first (`has_local`), the others sorted. `locality_weights` runs parallel to `by_locality`.
    """

    __slots__ = (
        "by_locality",
        "degraded",
        "excluded",
        "has_local",
        "healthy",
        "hosts",
        "locality_weights",
        "overprovisioning_factor",
        "priority",
        "weighted_health",
    )

    def __init__(
        self,
        priority: int,
        hosts: Iterable[Host] = (),
        *,
        locality_weights: Mapping[Locality, int] | None = None,
        local: Locality | None = None,
        overprovisioning_factor: int = 140,
        weighted_health: bool = False,
    ) -> None:
        self.priority = priority
        self.hosts = list(hosts)
        self.overprovisioning_factor = overprovisioning_factor
        self.weighted_health = weighted_health
        self.healthy = [host for host in self.hosts if not host.health_flags & (UNHEALTHY | DEGRADED)]
        if len(self.healthy) == len(self.hosts):
            self.degraded: list[Host] = []
            self.excluded: list[Host] = [host for host in self.hosts if host.health_flags & EXCLUDED]
        else:
            self.degraded = [host for host in self.hosts if host.degraded]
            self.excluded = [host for host in self.hosts if host.health_flags & EXCLUDED]
        groups: dict[Locality, list[Host]] = {}
        for host in self.hosts:
            groups.setdefault(host.locality, []).append(host)
        order = sorted(groups)
        self.has_local = local is not None and local in groups
        if self.has_local:
            order.remove(local)  # type: ignore[arg-type]
            order.insert(0, local)  # type: ignore[arg-type]
        self.by_locality = [groups[locality] for locality in order]
        weights = locality_weights or {}
        self.locality_weights = [weights.get(locality, 0) for locality in order]

    def __repr__(self) -> str:
        return f"<HostSet {self.priority}: {len(self.healthy)} healthy, {len(self.degraded)} degraded, {len(self.excluded)} excluded of {len(self.hosts)}>"


def count_grpc(host: Host, status: int | None) -> None:
    """Count a gRPC response by the status that it ended with."""
    if status is not None and http_of_status(status) < 500:
        host.rq_success += 1
    else:
        host.rq_error += 1
