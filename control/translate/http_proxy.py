"""The routes of sidecars that are the HTTP proxy of their application: every HTTP service by its names, all at once, or each when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from control.model.sidecar import Imports, Unknown
from control.model.snapshot import Config, visible
from control.names import HTTP_PROXY_ROUTES, MESH
from control.translate import routes
from control.translate.clusters import ADS
from control.translate.resource import ROUTES, VIRTUAL_HOST, Nothing, Resource, make
from control.translate.routes import Caller
from control.translate.uses import ports_of, targets_of

PREFIX = f"{HTTP_PROXY_ROUTES}/"  # of the names of virtual hosts
# What is always there: Envoy does not take an answer without any virtual host for its first one, and would wait for another.
GREETING = Nothing(PREFIX)


@dataclass(frozen=True, slots=True, eq=False)
class Proxied:
    """A virtual host. `domains`: the names that no other one has taken. `make(domains)`: its JSON form; `hosts()`: where its requests may go."""

    domains: tuple[str, ...]
    make: Callable[[list[str]], dict[str, Any]]
    hosts: Callable[[], frozenset[str]]


def proxied(config: Config, caller: Caller, only_port: int = 0, among: Imports | None = None, *, captured: bool = False) -> Iterator[Proxied]:
    """What a caller may name. `only_port`: of the services with a port of this number alone, which then need not be named; `among`: of these alone;
    `captured`: see `ports_of`."""
    namespace = caller.namespace
    taken: set[str] = {"*"}
    for service, port in ports_of(config, namespace, captured=captured):
        if not port.protocol.is_http or only_port not in (0, port.number) or (among is not None and not among.service(service.namespace, service.host)):
            continue
        domains = [one for one in routes.domains(service, port.number, namespace, bare=port.number == (only_port or 80)) if one not in taken]
        if domains:
            taken.update(domains)

            def of_service(names: list[str], service: Any = service, port: Any = port) -> dict[str, Any]:
                rules = config.routes_for(service.host, port.number, namespace)
                targets = targets_of(config, namespace, service.host, routes.mentioned(rules))
                return routes.virtual_host(f"{service.host}:{port.number}", names, service, port, rules, targets, caller)

            def hosts(service: Any = service, port: Any = port) -> frozenset[str]:
                return frozenset((service.host, *routes.mentioned(config.routes_for(service.host, port.number, namespace))))

            yield Proxied(tuple(domains), of_service, hosts)
    if only_port not in (0, 80):
        return
    for one in config.route_rules:  # hosts that are no services of the mesh, and are sent to some that are
        for host in one.hosts if visible(one, namespace) and MESH in one.gateways else ():
            domains = [domain for domain in (host, f"{host}:80") if domain not in taken]
            if host.startswith("*") or not domains or host in config.services:
                continue
            made = routes.rule_routes(one, 80, dict(targets_of(config, namespace, host, routes.mentioned([one]))), caller)
            if made:
                taken.update(domains)
                yield Proxied(
                    tuple(domains),
                    lambda names, host=host, made=made: routes.host(f"{host}:80", names, made),  # type: ignore[misc]
                    lambda one=one: frozenset(routes.mentioned([one])),  # type: ignore[misc]
                )


def whole(config: Config, caller: Caller, unknown: Unknown | None) -> Resource:
    """The route configuration with all of them."""
    hosts = [one.make(list(one.domains)) for one in proxied(config, caller)]
    return make(ROUTES, HTTP_PROXY_ROUTES, routes.configuration(HTTP_PROXY_ROUTES, [*hosts, _others(unknown)]))


def ports(config: Config, namespace: str) -> list[int]:
    """The numbers of all ports to which requests may go that are captured."""
    return sorted({port.number for _, port in ports_of(config, namespace, captured=True) if port.protocol.is_http})


def of_port(name: str, config: Config, caller: Caller, unknown: Unknown | None, port: int, among: Imports | None = None) -> Resource:
    """The route configuration of a listener for some services and one of their ports, or, with port 0, for all of them. `among` None: for captured requests."""
    some = among.within(caller.namespace) if among is not None else None
    hosts = [one.make(list(one.domains)) for one in proxied(config, caller, port, some, captured=among is None)]
    return make(ROUTES, name, routes.configuration(name, [*hosts, _others(unknown)]))


def on_demand() -> dict[str, Any]:
    """The route configuration without any: they come by VHDS."""
    return {**routes.configuration(HTTP_PROXY_ROUTES, []), "vhds": {"config_source": ADS}}


def index(config: Config, caller: Caller) -> Mapping[str, Proxied]:
    """All of them by what requests may name."""
    return {domain.lower(): one for one in proxied(config, caller) for domain in one.domains}


def only(found: Proxied | None, host: str, unknown: Unknown | None) -> Resource:
    """A route configuration with the virtual host for the requests that name `host`, and for no others."""
    made = {**_others(unknown), "domains": [host]} if found is None else found.make([host])
    return make(ROUTES, HTTP_PROXY_ROUTES, routes.configuration(HTTP_PROXY_ROUTES, [made]))


def alone(configuration: Resource, name: str) -> Resource:
    """The virtual host of such a route configuration, as a resource of that name; Nothing if a patch has taken it away."""
    hosts = configuration.message.virtual_hosts
    if not hosts:
        return Nothing(name)
    hosts[0].name = name  # by which it can be taken away again
    return Resource(VIRTUAL_HOST, name, hosts[0].SerializeToString(deterministic=True))


def _others(unknown: Unknown | None) -> dict[str, Any]:
    return routes.allow_any() if unknown is Unknown.ALLOW_ANY else routes.block_all()
