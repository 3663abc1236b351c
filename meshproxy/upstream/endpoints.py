"""ClusterLoadAssignment messages: checked, turned into hosts, and merged into the hosts that a cluster already has.

A host is known by its address: as long as that stays in the assignment, the host keeps its counters, connections and health over updates, also when its
weight, metadata or priority changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.api.metadata import metadata_dict
from meshproxy.net.address import Address
from meshproxy.record import Record
from meshproxy.upstream import host as hosts
from meshproxy.upstream.host import Host, Locality

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshproxy.upstream.cluster import Cluster

_ENDPOINT = "envoy.config.endpoint.v3."
HONOURS = {
    _ENDPOINT + "ClusterLoadAssignment": "cluster_name endpoints policy",
    _ENDPOINT + "ClusterLoadAssignment.Policy": "drop_overloads overprovisioning_factor weighted_priority_health endpoint_stale_after",
    _ENDPOINT + "ClusterLoadAssignment.Policy.DropOverload": "category drop_percentage",
    _ENDPOINT + "LocalityLbEndpoints": "locality metadata lb_endpoints load_balancing_weight priority",
    _ENDPOINT + "LbEndpoint": "endpoint health_status metadata load_balancing_weight",
    _ENDPOINT + "Endpoint": "address health_check_config hostname",
    _ENDPOINT + "Endpoint.HealthCheckConfig": "port_value hostname address disable_active_health_check",
    "envoy.config.core.v3.Locality": "region zone sub_zone",
}

_DENOMINATORS = (100, 10_000, 1_000_000)


class Policy(Record, frozen=True):
    """What an assignment says about all of its endpoints."""

    overprovisioning_factor: int = 140  # percent
    weighted_priority_health: bool = False
    drop_ratio: float = 0.0  # of all requests, from 0 to 1
    drop_category: str = ""


class Assignment(Record, frozen=True):
    """The hosts of each priority, and for each priority the weights of its localities that have one."""

    hosts: list[list[Host]]
    locality_weights: list[dict[Locality, int]]
    policy: Policy


def parse(proto: Any, cluster: Cluster, address_of: Callable[[Any], Address] = Address.from_proto) -> Assignment:
    """New hosts for everything in a ClusterLoadAssignment. Raises ConfigError with every problem, with paths relative to `proto`."""
    priorities = max((locality.priority for locality in proto.endpoints), default=0) + 1
    assignment = Assignment([[] for _ in range(priorities)], [{} for _ in range(priorities)], parse_policy(proto))
    problems = errors.Collector()
    for index, group in enumerate(proto.endpoints):
        place = group.locality
        locality = Locality(place.region, place.zone, place.sub_zone)
        locality_metadata = metadata_dict(group.metadata) if group.HasField("metadata") else None
        if group.HasField("locality") and group.HasField("load_balancing_weight"):
            assignment.locality_weights[group.priority][locality] = group.load_balancing_weight.value
        into = assignment.hosts[group.priority]
        for number, endpoint in enumerate(group.lb_endpoints):
            try:
                into.append(_host(endpoint, cluster, group.priority, locality, locality_metadata, address_of))
            except ConfigError as error:
                problems.problems.extend(problem.under(f"endpoints[{index}].lb_endpoints[{number}]") for problem in error.problems)
    problems.raise_any()
    return assignment


def check(proto: Any) -> None:
    """Raise what `parse` would raise, and make no hosts."""
    problems = errors.Collector()
    parse_policy(proto)
    for index, group in enumerate(proto.endpoints):
        for number, endpoint in enumerate(group.lb_endpoints):
            try:
                _address(endpoint.endpoint, Address.from_proto)
            except ConfigError as error:
                problems.problems.extend(problem.under(f"endpoints[{index}].lb_endpoints[{number}]") for problem in error.problems)
    problems.raise_any()


def parse_policy(proto: Any) -> Policy:
    """The assignment's policy. Raises ConfigError."""
    if not proto.HasField("policy"):
        return _DEFAULT
    policy = proto.policy
    ratio, category = 0.0, ""
    if len(policy.drop_overloads) > 1:
        errors.fail("policy.drop_overloads", f"Cluster drop_overloads config has {len(policy.drop_overloads)} categories. Envoy only support one.", UNSUPPORTED)
    for drop in policy.drop_overloads:
        category = drop.category
        ratio = drop.drop_percentage.numerator / _DENOMINATORS[drop.drop_percentage.denominator]
        if ratio > 1:
            errors.fail("policy.drop_overloads[0].drop_percentage", f"Cluster drop_overloads config is invalid. drop_ratio={ratio:g}. The valid range is 0~1.")
    factor = policy.overprovisioning_factor.value if policy.HasField("overprovisioning_factor") else 140
    return Policy(factor, policy.weighted_priority_health, ratio, category)


_DEFAULT = Policy()


def _host(
    endpoint: Any,
    cluster: Cluster,
    priority: int,
    locality: Locality,
    locality_metadata: dict[str, Any] | None,
    address_of: Callable[[Any], Address],
) -> Host:
    inner = endpoint.endpoint
    address = _address(inner, address_of)
    return Host(
        cluster,
        address,
        hostname=inner.hostname,
        weight=endpoint.load_balancing_weight.value if endpoint.HasField("load_balancing_weight") else 1,
        priority=priority,
        locality=locality,
        metadata=metadata_dict(endpoint.metadata) if endpoint.HasField("metadata") else None,
        locality_metadata=locality_metadata,
        health_flags=hosts.eds_flags(endpoint.health_status),
        health_check=inner.health_check_config if inner.HasField("health_check_config") else None,
    )


def _address(inner: Any, address_of: Callable[[Any], Address]) -> Address:
    try:
        address = address_of(inner.address)
    except ConfigError as error:
        raise error.under("endpoint.address") from error
    if inner.HasField("health_check_config") and inner.health_check_config.port_value and address.kind != "ip":
        errors.fail("endpoint.health_check_config.port_value", "Invalid host configuration: non-zero port for non-IP address")
    return address


class Merge:
    """The outcome of bringing an assignment together with the hosts that are already there."""

    __slots__ = ("added", "changed", "hosts", "removed")

    def __init__(self) -> None:
        self.hosts: list[list[Host]] = []
        self.added: list[Host] = []
        self.removed: list[Host] = []
        self.changed = False  # something that load balancing sees


def merge(current: list[list[Host]], assignment: Assignment, *, keep_healthy: bool, checked: bool, pending: bool) -> Merge:
    """Keep known hosts, add new ones, remove the others.

    `checked`: there is an active health checker, new hosts wait for it (`pending`: and do not count until their first check). `keep_healthy`: a host that
    left the assignment stays as long as its checks pass (not with `ignore_health_on_host_removal`).
    """
    known = {host.address.text: host for group in current for host in group}
    result = Merge()
    seen: set[str] = set()
    for group in assignment.hosts:
        final: list[Host] = []
        for new in group:
            key = new.address.text
            if key in seen:
                continue  # the same address twice: the first one counts
            seen.add(key)
            old = known.get(key)
            if old is not None and _same_place(old, new, checked):
                result.changed |= _update(old, new)
                final.append(old)
                continue
            if checked and not _unchecked(new):
                flags = hosts.FAILED_ACTIVE_HC | (hosts.PENDING_ACTIVE_HC if pending else 0)
                if old is not None and _same_check(old, new):
                    flags = old.health_flags & hosts.ACTIVE_FLAGS
                new.health_flags |= flags
            final.append(new)
            result.added.append(new)
            if old is not None:
                result.removed.append(old)
        result.hosts.append(final)
    _retire(current, seen, result, keep_healthy)
    result.changed |= bool(result.added or result.removed) or [len(group) for group in current] != [len(group) for group in result.hosts]
    return result


def _retire(current: list[list[Host]], seen: set[str], result: Merge, keep_healthy: bool) -> None:
    for priority, group in enumerate(current):
        for host in group:
            if host.address.text in seen:
                continue
            if keep_healthy and not host.health_flags & (hosts.FAILED_ACTIVE_HC | hosts.FAILED_EDS_HEALTH) and not _unchecked(host):
                host.health_flags |= hosts.PENDING_DYNAMIC_REMOVAL
                while len(result.hosts) <= priority:
                    result.hosts.append([])
                result.hosts[priority].append(host)
            else:
                result.removed.append(host)


def _same_place(old: Host, new: Host, checked: bool) -> bool:
    return old.locality == new.locality and (not checked or _same_check(old, new))


def _same_check(old: Host, new: Host) -> bool:
    one, other = old.health_check, new.health_check
    if one is None or other is None:
        return one is other
    return bool(one.port_value == other.port_value and one.address == other.address and one.disable_active_health_check == other.disable_active_health_check)


def _unchecked(host: Host) -> bool:
    return host.health_check is not None and host.health_check.disable_active_health_check


def _update(old: Host, new: Host) -> bool:
    """Take over what may change in place; whether load balancing sees a difference."""
    changed = False
    before = old.health_flags
    old.health_flags = (before & ~(hosts.EDS_FLAGS | hosts.PENDING_DYNAMIC_REMOVAL)) | (new.health_flags & hosts.EDS_FLAGS)
    changed |= old.health_flags != before
    if old.weight != new.weight:
        old.weight = new.weight
        changed = True
    if old.metadata != new.metadata:
        old.set_metadata(new.metadata)
        changed = True
    if old.priority != new.priority:
        old.priority = new.priority
        changed = True
    old.hostname = new.hostname
    old.locality_metadata = new.locality_metadata
    return changed


def count(proto: Any) -> list[tuple[int, int, int, int]]:
    """(total, healthy, degraded, excluded) of each priority, straight from the message: for clusters that nobody has used yet."""
    counts = [[0, 0, 0, 0] for _ in range(max((locality.priority for locality in proto.endpoints), default=0) + 1)]
    for group in proto.endpoints:
        row = counts[group.priority]
        for endpoint in group.lb_endpoints:
            flags = hosts.eds_flags(endpoint.health_status)
            row[0] += 1
            row[1] += flags == 0
            row[2] += flags == hosts.DEGRADED_EDS_HEALTH
            row[3] += bool(flags & hosts.EXCLUDED)
    return [tuple(row) for row in counts]  # type: ignore[misc]


def all_hosts(groups: Iterable[Iterable[Host]]) -> list[Host]:
    """The hosts of all priorities."""
    return [host for group in groups for host in group]
