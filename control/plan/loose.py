"""What rules name and nobody has: no mistake of a document by itself, since the other one may be on its way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from control.kinds.registry import Identity
from control.model.routing import Destination, HttpRoute, RouteRules, TcpRoute, TlsRoute
from control.model.service import Service, Workload
from control.model.snapshot import Config
from control.model.traffic import DestinationRule
from control.names import MESH, host_matches


def loose_ends(objects: Mapping[Identity, Any], config: Config) -> Iterator[tuple[Identity, str]]:
    """(object, what of it leads nowhere), by the names of objects; each thing once."""
    gateways = {one.key for one in config.gateways}
    captured = any(isinstance(one, Workload) and one.sidecar is not None and one.sidecar.capture for one in objects.values())
    for identity in sorted(objects):
        one = objects[identity]
        for service in one if isinstance(one, tuple) and not captured else ():
            if isinstance(service, Service) and service.as_meant and service.host.startswith("*"):
                yield identity, f"{service.host} is reached by sidecars with a capture only, and there is none"
        if isinstance(one, RouteRules):
            for found in dict.fromkeys(_of_routes(one, config, gateways)):
                yield identity, found
        elif isinstance(one, DestinationRule) and not any(one.host == host or host_matches(one.host, host) for host in config.services):
            yield identity, f"there is no service {one.host}"


def _of_routes(rules: RouteRules, config: Config, gateways: set[str]) -> Iterator[str]:
    for gateway in rules.gateways if not rules.gateway_api else ():  # what routes of the Gateway API say of their parents has conditions of its own
        if gateway != MESH and gateway not in gateways:
            yield f"there is no Gateway {gateway}"
    routes: tuple[HttpRoute | TcpRoute | TlsRoute, ...] = (*rules.http, *rules.tcp, *rules.tls)
    for route in routes:
        for one in route.destinations:
            yield from _of_destination(one.destination, rules, config)
        for mirror in route.mirrors if isinstance(route, HttpRoute) else ():
            yield from _of_destination(mirror.destination, rules, config)


def _of_destination(one: Destination, rules: RouteRules, config: Config) -> Iterator[str]:
    service = config.services.get(one.host) or next((found for host, found in config.services.items() if host_matches(host, one.host)), None)
    if service is None:
        yield f"there is no service {one.host}"
        return
    if one.port and service.port(one.port) is None:
        yield f"{one.host} has no port {one.port}"
    rule = config.rule_for(one.host, rules.namespace)
    if one.subset and (rule is None or rule.subset(one.subset) is None):
        yield f"{one.host} has no subset {one.subset!r}"
