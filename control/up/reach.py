"""Where a gateway that is run here is reached, and what a first request to it may look like."""

from __future__ import annotations

from collections.abc import Iterator

from control.model.gateway import EVERYWHERE, GatewayServer
from control.model.routing import RouteRules
from control.model.service import Workload
from control.model.snapshot import Config, is_for
from control.translate.workloads import at_their_targets

_LOOPBACK = "127.0.0.1"


def servers(config: Config, workload: Workload) -> Iterator[tuple[str, GatewayServer]]:
    """(key of a Gateway, server) of all that a workload serves."""
    served = tuple(one for one in config.gateways if one.is_on(workload.namespace, workload.labels))
    for gateway in at_their_targets(config, workload, served):
        for server in gateway.servers:
            yield gateway.key, server


def places(config: Config, workload: Workload) -> list[str]:
    """ADDRESS:PORT of each port on which it listens as a gateway."""
    return list(dict.fromkeys(_joined(*server.place) for _, server in servers(config, workload)))


def first(config: Config, workload: Workload) -> str:
    """A command that sends a request to a gateway in the clear, by a rule that it has; "" if there is none."""
    for key, server in servers(config, workload):
        if server.tls is not None or server.https_redirect or not server.protocol.is_http:
            continue
        for rules in config.route_rules:
            if is_for(rules, key) and rules.http:
                host, port = server.place
                name = next((one for one in (*rules.hosts, *(name for _, name in server.hosts)) if "*" not in one), "")
                to = _joined(_LOOPBACK if host == EVERYWHERE else host, port)
                return f"curl -i http://{to}{_path(rules)}" + (f" -H 'host: {name}'" if name else "")
    return ""


def _path(rules: RouteRules) -> str:
    """The first one that a rule of these asks for."""
    matches = [match for route in rules.http for match in route.matches]
    return next((match.path.text for match in matches if match.path is not None and match.path.kind != "regex" and match.path.text.startswith("/")), "/")


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
