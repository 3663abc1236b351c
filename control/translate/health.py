"""How a workload's sidecar is told to ask the application beside it: a HealthCheckSpecifier (HDS)."""

from __future__ import annotations

import functools
from typing import Any

from control.model.health import GRPC, HTTP, Probe
from control.model.service import Workload
from control.names import is_ip
from control.translate.resource import duration, typed
from meshproxy.api import convert, messages

QUICK_S = 0.1  # between reports of who is not ready: so soon is known that it is
SLOW_S = 5.0  # at most, of who is
IDLE_S = 3600.0  # of who has nothing to report any more
_UPSTREAM_TLS = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_SPECIFIER = "envoy.service.health.v3.HealthCheckSpecifier"
# As Kubernetes: these are well, and all others count as one failure, where Envoy would believe them at once.
_WELL, _FAILURES = [{"start": 200, "end": 400}], [{"start": 100, "end": 200}, {"start": 400, "end": 600}]


def cluster_of(workload: Workload) -> str:
    """What reports call the one endpoint that is asked; "" when there is nothing to be asked: no probe, no such port, no address.

    How it is asked is in the name: Envoy 1.40 does not begin with gRPC under a name that it knows.
    """
    probe = workload.readiness
    host, port = _where(workload, probe) if probe is not None else ("", 0)
    return f"readiness|{_port(workload, probe)}|{probe.kind}|" if probe is not None and (is_ip(host) if port else host) else ""


def nothing() -> bytes:
    """For a sidecar that has nothing to ask any more."""
    message = convert.to_message({"interval": duration(IDLE_S)}, messages.known(_SPECIFIER))
    return bytes(message.SerializeToString())


@functools.lru_cache(10_000)
def specifier(workload: Workload, ready: bool) -> bytes:
    """For the sidecar of a workload; empty where there is nothing to be asked."""
    probe, name = workload.readiness, cluster_of(workload)
    if probe is None or not name:
        return b""
    host, port = _where(workload, probe)
    address = {"socket_address": {"address": host, "port_value": port}} if port else {"pipe": {"path": host}}
    cluster: dict[str, Any] = {
        "cluster_name": name,
        "health_checks": [_check(probe, _authority(workload, host, port))],
        "locality_endpoints": [{"endpoints": [{"address": address}]}],
    }
    if probe.secure:
        tls = {"name": "envoy.transport_sockets.tls", "typed_config": typed(_UPSTREAM_TLS)}
        cluster["transport_socket_matches"] = [{"name": "tls", "match": {}, "transport_socket": tls}]
    interval = min(max(probe.period_s / 2, QUICK_S), SLOW_S) if ready else QUICK_S
    message = convert.to_message({"cluster_health_checks": [cluster], "interval": duration(interval)}, messages.known(_SPECIFIER))
    return bytes(message.SerializeToString(deterministic=True))


def _check(probe: Probe, authority: str) -> dict[str, Any]:
    every = duration(probe.period_s)
    check: dict[str, Any] = {
        "timeout": duration(probe.timeout_s),
        "interval": every,
        "no_traffic_interval": every,
        "unhealthy_threshold": probe.failures,
        "healthy_threshold": probe.successes,
        "reuse_connection": False,  # as the kubelet: an application may have no connection to spare
    }
    if probe.kind == HTTP:
        named = [value for name, value in probe.headers if name.lower() == "host"]
        check["http_health_check"] = {
            "path": probe.path,
            "host": named[0] if named else authority,
            "expected_statuses": _WELL,
            "retriable_statuses": _FAILURES,
            "request_headers_to_add": [
                {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
                for name, value in probe.headers
                if name.lower() != "host"
            ],
        }
    elif probe.kind == GRPC:
        check["grpc_health_check"] = {"service_name": probe.service, "authority": authority}
    else:
        check["tcp_health_check"] = {}
    return check


def _port(workload: Workload, probe: Probe | None) -> int:
    """Of the application; 0 when it has none of that name."""
    if probe is None:
        return 0
    return probe.port if isinstance(probe.port, int) else workload.ports.get(probe.port, 0)


def _where(workload: Workload, probe: Probe) -> tuple[str, int]:
    """Where the application listens for it: an address and a port, or a path and 0; "" when that is not known."""
    number = _port(workload, probe)
    if not number:
        return "", 0
    ingress = workload.sidecar.ingress.get(number) if workload.sidecar is not None else None
    host, port = ingress.endpoint if ingress is not None and ingress.endpoint is not None else ("", number)
    return (probe.host if probe.host and port else host or workload.address), port


def _authority(workload: Workload, host: str, port: int) -> str:
    """Host of requests: where they go."""
    if not port:
        return workload.address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
