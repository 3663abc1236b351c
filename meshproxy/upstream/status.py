"""What /clusters shows, as plain data: taken in each worker, merged and rendered in main.

`snapshot` is the workers' part (clusters that they use). `collect` joins the snapshots of all workers with the clusters that nobody has used, and
`render_text` and `render_json` print the result as Envoy does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.api import messages
from meshproxy.observe.stats import Store
from meshproxy.record import replace
from meshproxy.upstream import host as hosts
from meshproxy.upstream.limits import PRIORITIES
from meshproxy.upstream.outlier import LOCAL_SUCCESS_RATE, SUCCESS_RATE

if TYPE_CHECKING:
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.cluster_manager import ClusterManager
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.limits import Limits

COUNTERS = ("cx_connect_fail", "cx_total", "rq_error", "rq_success", "rq_timeout", "rq_total")
GAUGES = ("cx_active", "rq_active", "rq_pending_active")
_LIMITS = (("max_connections", "max_cx"), ("max_pending_requests", "max_pending"), ("max_requests", "max_rq"), ("max_retries", "max_retries"))

Status = dict[str, Any]  # of one cluster; everything in it can be marshalled
Snapshot = dict[str, Status]


def snapshot(manager: ClusterManager) -> Snapshot:
    """The clusters that this process uses, by name."""
    return {cluster.name: statistics(cluster) for cluster in manager.compiled()}


def statistics(cluster: Cluster) -> Status:
    """One cluster: its limits, its outlier detection, its hosts with their counters."""
    outlier = cluster.outlier
    return {
        "observability_name": cluster.observability_name,
        "via_api": cluster.via_api,
        "limits": [[_maximum(limits, attribute) for _, attribute in _LIMITS] for limits in cluster.limits],
        "outlier": None if outlier is None else [*outlier.averages[SUCCESS_RATE], *outlier.averages[LOCAL_SUCCESS_RATE]],
        "hosts": [_host(host) for host in cluster.hosts],
    }


def _maximum(limits: Limits, attribute: str) -> int:
    """The configured maximum, also where workers share it."""
    shared = getattr(limits, "maxima", None)
    if shared is not None:
        return int(shared[("max_cx", "max_pending", "max_rq", "max_retries").index(attribute)])
    return limits.retry_limit() if attribute == "max_retries" else int(getattr(limits, attribute))


def _host(host: Host) -> Status:
    monitor = host.outlier
    return {
        "address": host.address.text,
        "hostname": host.hostname,
        "weight": host.weight,
        "locality": tuple(host.locality),
        "canary": host.canary,
        "priority": host.priority,
        "flags": host.health_flags,
        "success_rate": -1.0 if monitor is None else monitor.external.success_rate,
        "local_success_rate": -1.0 if monitor is None else monitor.local.success_rate,
        "stats": {name: getattr(host, name) for name in COUNTERS + GAUGES},
    }


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """One snapshot out of those of several workers: numbers are added up, a host is unhealthy if any worker says so."""
    merged: Snapshot = {}
    for one in snapshots:
        for name, status in one.items():
            known = merged.get(name)
            if known is None:
                merged[name] = status
                continue
            by_address = {host["address"]: host for host in known["hosts"]}
            for host in status["hosts"]:
                same = by_address.get(host["address"])
                if same is None:
                    known["hosts"].append(host)
                    continue
                same["flags"] |= host["flags"]
                for rate in ("success_rate", "local_success_rate"):
                    same[rate] = max(same[rate], host[rate])
                for key, value in host["stats"].items():
                    same["stats"][key] += value
    return merged


def collect(manager: ClusterManager, snapshots: Iterable[Snapshot], accepts: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Status]]:
    """(name, status) of every cluster that `accepts` wants. Clusters that nobody uses are compiled for the moment, one at a time."""
    used = merge(snapshots)
    scratch = replace(manager.context, stats=Store())
    for name in manager.names():
        if accepts(name):
            yield name, used.get(name) or statistics(manager.inspect(name, scratch))


# -- rendering -----------------------------------------------------------------------------------------------------------------------------------------------


def render_text(statuses: Iterable[tuple[str, Status]]) -> str:
    """The text form of /clusters."""
    lines: list[str] = []
    for name, status in statuses:
        lines.append(f"{name}::observability_name::{status['observability_name']}")
        if status["outlier"] is not None:
            labels = (
                "success_rate_average",
                "success_rate_ejection_threshold",
                "local_origin_success_rate_average",
                "local_origin_success_rate_ejection_threshold",
            )
            lines += [f"{name}::outlier::{label}::{value:g}" for label, value in zip(labels, status["outlier"], strict=True)]
        for priority, limits in zip(PRIORITIES, status["limits"], strict=True):
            lines += [f"{name}::{priority}_priority::{label}::{value}" for (label, _), value in zip(_LIMITS, limits, strict=True)]
        lines.append(f"{name}::added_via_api::{_bool(status['via_api'])}")
        for host in status["hosts"]:
            lines += _host_lines(f"{name}::{host['address']}::", host)
    return "".join(f"{line}\n" for line in lines)


def _host_lines(prefix: str, host: Status) -> list[str]:
    region, zone, sub_zone = host["locality"]
    values = (
        *sorted(host["stats"].items()),
        ("hostname", host["hostname"]),
        ("health_flags", hosts.flags_text(host["flags"])),
        ("weight", host["weight"]),
        ("region", region),
        ("zone", zone),
        ("sub_zone", sub_zone),
        ("canary", _bool(host["canary"])),
        ("priority", host["priority"]),
        ("success_rate", _number(host["success_rate"])),
        ("local_origin_success_rate", _number(host["local_success_rate"])),
    )
    return [f"{prefix}{name}::{value}" for name, value in values]


def render_json(statuses: Iterable[tuple[str, Status]]) -> str:
    """The JSON form of /clusters: an envoy.admin.v3.Clusters message."""
    from google.protobuf.json_format import MessageToJson

    return str(MessageToJson(to_message(statuses), indent=1, preserving_proto_field_name=True))


def to_message(statuses: Iterable[tuple[str, Status]]) -> Any:
    """The envoy.admin.v3.Clusters message."""
    message = messages.known("envoy.admin.v3.Clusters")()
    for name, status in statuses:
        cluster = message.cluster_statuses.add(name=name, observability_name=status["observability_name"], added_via_api=status["via_api"])
        for priority, limits in enumerate(status["limits"]):
            thresholds = cluster.circuit_breakers.thresholds.add(priority=priority)
            for (label, _), value in zip(_LIMITS, limits, strict=True):
                getattr(thresholds, label).value = value
        if status["outlier"] is not None:
            _, threshold, _, local_threshold = status["outlier"]
            if threshold > 0:
                cluster.success_rate_ejection_threshold.value = threshold
            if local_threshold > 0:
                cluster.local_origin_success_rate_ejection_threshold.value = local_threshold
        for host in status["hosts"]:
            _host_message(cluster.host_statuses.add(), host)
    return message


def _host_message(message: Any, host: Status) -> None:
    address: str = host["address"]
    if address.startswith(("/", "@")):
        message.address.pipe.path = address
    else:
        ip, _, port = address.rpartition(":")
        message.address.socket_address.address = ip.strip("[]")
        message.address.socket_address.port_value = int(port)
    for kind, names in enumerate((COUNTERS, GAUGES)):
        for name in names:
            message.stats.add(name=name, value=host["stats"][name], type=kind)
    _health_message(message.health_status, host["flags"])
    if host["success_rate"] >= 0:
        message.success_rate.value = host["success_rate"]
    message.weight = host["weight"]
    message.hostname = host["hostname"]
    message.priority = host["priority"]
    if host["local_success_rate"] >= 0:
        message.local_origin_success_rate.value = host["local_success_rate"]
    locality = message.locality
    locality.SetInParent()
    locality.region, locality.zone, locality.sub_zone = host["locality"]


def _health_message(message: Any, flags: int) -> None:
    message.failed_active_health_check = bool(flags & hosts.FAILED_ACTIVE_HC)
    message.failed_outlier_check = bool(flags & hosts.FAILED_OUTLIER_CHECK)
    message.failed_active_degraded_check = bool(flags & hosts.DEGRADED_ACTIVE_HC)
    message.pending_dynamic_removal = bool(flags & hosts.PENDING_DYNAMIC_REMOVAL)
    message.pending_active_hc = bool(flags & hosts.PENDING_ACTIVE_HC)
    message.excluded_via_immediate_hc_fail = bool(flags & hosts.EXCLUDED_VIA_IMMEDIATE_HC_FAIL)
    message.active_hc_timeout = bool(flags & hosts.ACTIVE_HC_TIMEOUT)
    # Numbers of envoy.config.core.v3.HealthStatus.
    status = 1
    if flags & hosts.FAILED_EDS_HEALTH:
        status = 2
    elif flags & hosts.DEGRADED_EDS_HEALTH:
        status = 5
    message.eds_health_status = 3 if flags & hosts.EDS_STATUS_DRAINING else status


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _number(value: float) -> str:
    """Shortest form, without a trailing `.0`."""
    text = repr(value)
    return text.removesuffix(".0")
