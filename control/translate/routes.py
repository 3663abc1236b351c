"""Route configurations: which rules concern a port of a service, as one virtual host, and virtual hosts together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from control.model.routing import Retries, RouteMatch, RouteRules, TcpRoute, TlsRoute
from control.model.service import Port, Service
from control.names import ALLOW_ANY, BLOCK_ALL, MESH, PASSTHROUGH, outbound_cluster, short_hosts
from control.translate import http_route
from control.translate.flow import STRAIGHT, Flow, Way
from control.translate.http_route import UNKNOWN_SERVICE, Around, Target

MAX_DIRECT_RESPONSE = 1 << 20
Labels = tuple[tuple[str, str], ...]


class Caller(tuple[str, Labels, bool, str, Retries | None]):
    """Whose routes these are: namespace, labels as far as rules ask for them, whether it is a gRPC client, a gateway's name, MESH for sidecars, and how often
    it tries what no rule speaks of, None for as usual."""

    __slots__ = ()

    @property
    def namespace(self) -> str:
        return self[0]

    @property
    def labels(self) -> Labels:
        return self[1]

    @property
    def grpc(self) -> bool:
        return self[2]

    @property
    def gateway(self) -> str:
        return self[3]

    @property
    def retries(self) -> Retries | None:
        return self[4]


def configuration(name: str, hosts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """envoy.config.route.v3.RouteConfiguration."""
    return {"name": name, "virtual_hosts": list(hosts), "validate_clusters": False, "max_direct_response_body_size_bytes": MAX_DIRECT_RESPONSE}


def for_service(
    name: str, service: Service, port: Port, rules: tuple[RouteRules, ...], targets: tuple[tuple[str, Target], ...], caller: Caller
) -> dict[str, Any]:
    """The routes of a listener that is there for one port of one service, whatever host a request names."""
    return configuration(name, [virtual_host(f"{service.host}:{port.number}", ["*"], service, port, rules, targets, caller)])


def virtual_host(
    name: str,
    domains: list[str],
    service: Service,
    port: Port,
    rules: tuple[RouteRules, ...],
    targets: tuple[tuple[str, Target], ...],
    caller: Caller,
) -> dict[str, Any]:
    """All that is said about requests to one port of a service. `targets` has every host that the rules name, and the service's own."""
    by_host = dict(targets)
    made = together(rules, port.number, by_host, caller)
    if not made:
        cluster = outbound_cluster(service.host, port.number)
        hash = dict(by_host[service.host].hash).get((port.number, "")) if service.host in by_host else None
        operation = f"{service.host}:{port.number}/*"
        made = [http_route.default_route(cluster, hash, operation, http2=port.protocol.is_http2, grpc=caller.grpc, retries=caller.retries)]
    return host(name, domains, made)


def host(name: str, domains: list[str], routes: list[dict[str, Any]]) -> dict[str, Any]:
    """envoy.config.route.v3.VirtualHost."""
    return {"name": name, "domains": domains, "routes": routes, "include_request_attempt_count": True}


def together(rules: Iterable[RouteRules], port: int, targets: dict[str, Target], caller: Caller) -> list[dict[str, Any]]:
    """The routes of several documents: VirtualServices one after another, rules of the Gateway API by how exact their matches are."""
    rules = list(rules)
    made = [route for one in rules if not one.gateway_api for route in rule_routes(one, port, targets, caller)]
    exact: list[tuple[tuple[int, ...], dict[str, Any]]] = []
    for one in rules:
        if one.gateway_api:
            around = Around(port, targets, one.name, True, caller.grpc, caller.retries)
            for rule in one.http:
                for match in rule.matches or (None,):
                    exact += [(_exactness(match), route) for route in http_route.routes(rule, (match,), around)]
    exact.sort(key=lambda pair: pair[0], reverse=True)  # stable: of equals the first counts
    return made + [route for _, route in exact]


def _exactness(match: RouteMatch | None) -> tuple[int, ...]:
    """What the Gateway API compares, in its order: exact path, length of the prefix, method, number of headers, number of query parameters."""
    if match is None:
        return 1, 1, 0, 0, 0
    path = match.path
    kind = 1 if path is None else {"exact": 2, "path_prefix": 1, "prefix": 1}.get(path.kind, 0)
    length = 1 if path is None else len(path.text) if kind else 0  # without a path, it is the prefix `/`
    return kind, length, int(match.method is not None), len(match.headers), len(match.query)


def rule_routes(rules: RouteRules, port: int, targets: dict[str, Target], caller: Caller) -> list[dict[str, Any]]:
    """The routes of one VirtualService for one port, as far as they concern the caller. What can never be reached is left out, as in Istio."""
    around = Around(port, targets, rules.name, False, caller.grpc, caller.retries)
    made: list[dict[str, Any]] = []
    for rule in rules.http:
        matches: list[RouteMatch | None] = [None] if not rule.matches else []
        for match in rule.matches:
            if concerns(match, port, rules, caller):
                matches.append(match)
                if http_route.catches_all(rule, match):
                    break
        made += http_route.routes(rule, tuple(matches), around)
        if any(http_route.catches_all(rule, match) for match in matches):
            break
    return made


def concerns(match: RouteMatch | TcpRoute | TlsRoute, port: int, rules: RouteRules, caller: Caller) -> bool:
    """Whether a caller gets, for a port, what stands under a match."""
    if match.port and match.port != port:
        return False
    if caller.gateway not in (match.gateways or rules.gateways):
        return False
    if caller.gateway != MESH or (match.gateways and isinstance(match, RouteMatch)):  # as in Istio, which looks at both for connections only
        return True
    return match.source_labels.items() <= dict(caller.labels).items() and match.source_namespace in ("", caller.namespace)


def tcp_routes(rules: Iterable[RouteRules], port: int, caller: Caller) -> tuple[TcpRoute, ...]:
    """What is said about plain connections to a port, by their addresses; of two routes for a subnet, the first has it. Only the last may be for all others."""
    made: list[TcpRoute] = []
    taken: set[str] = set()
    for one in rules:
        for route in one.tcp:
            if not concerns(route, port, one, caller):
                continue
            if not route.subnets:
                return (*made, route)
            subnets = tuple(subnet for subnet in route.subnets if subnet not in taken)
            if subnets:
                taken.update(subnets)
                made.append(replace(route, subnets=subnets))
    return tuple(made)


def tls_routes(rules: Iterable[RouteRules], port: int, caller: Caller) -> tuple[TlsRoute, ...]:
    """What is said about connections to a port by the names in their ClientHello, and by their addresses; of two routes for the same, the first has it."""
    made = []
    taken: set[tuple[str, str]] = set()
    for one in rules:
        for route in one.tls:
            if concerns(route, port, one, caller):
                made += untaken(route, taken)
    return tuple(made)


def untaken(route: TlsRoute, taken: set[tuple[str, str]]) -> list[TlsRoute]:
    """The route for those of its names and subnets ("" for any) that are not `taken` together; they are, then. Several, where it is not the same for all."""
    left: dict[tuple[str, ...], list[str]] = {}
    for name in route.sni_hosts:
        subnets = tuple(subnet for subnet in route.subnets or ("",) if (name, subnet) not in taken)
        taken.update((name, subnet) for subnet in subnets)
        if subnets:
            left.setdefault(subnets, []).append(name)
    return [replace(route, sni_hosts=tuple(names), subnets=() if subnets == ("",) else subnets) for subnets, names in left.items()]


def way(route: TcpRoute | TlsRoute, port: int, targets: Mapping[str, Target]) -> Way:
    """Where plain connections go: how they are carried is what is said of the first destination, of its subset only if there is no other, as in Istio."""
    made = []
    flow: Flow | None = None
    for one in route.destinations:
        if not one.destination.host:
            made.append((UNKNOWN_SERVICE, one.weight))
            continue
        target = targets.get(one.destination.host)
        service = target.service if target is not None else None
        number = one.destination.port or (service.ports[0].number if service is not None and len(service.ports) == 1 else port)
        made.append((outbound_cluster(one.destination.host, number, one.destination.subset), one.weight))
        if flow is None and target is not None:
            subset = one.destination.subset if len(route.destinations) == 1 else ""
            flow = dict(target.flows).get((number, subset), STRAIGHT)
    return Way(tuple(made), flow or STRAIGHT)


def straight(service: Service, port: int, targets: Mapping[str, Target]) -> Way:
    """To a port of a service, as nothing else is said."""
    target = targets.get(service.host)
    return Way(((outbound_cluster(service.host, port), 0),), dict(target.flows).get((port, ""), STRAIGHT) if target is not None else STRAIGHT)


def mentioned(rules: Iterable[RouteRules]) -> set[str]:
    """All hosts that requests are sent to."""
    return {host for one in rules for host in one.destinations()}


def domains(service: Service, port: int, namespace: str, *, bare: bool) -> list[str]:
    """The hosts that requests to one port of a service may name; `bare`: without the port, too."""
    names = [service.host, *short_hosts(service.host, namespace), *(f"[{one}]" if ":" in one else one for one in service.addresses if "/" not in one)]
    return [domain for name in names for domain in ([name, f"{name}:{port}"] if bare else [f"{name}:{port}"])]


def block_all() -> dict[str, Any]:
    """The virtual host of whatever is not in the mesh."""
    return {"name": BLOCK_ALL, "domains": ["*"], "routes": [{"name": BLOCK_ALL, "match": {"prefix": "/"}, "direct_response": {"status": 502}}]}


def allow_any() -> dict[str, Any]:
    """The same where it may be reached all the same."""
    action = {"cluster": PASSTHROUGH, "timeout": "0s"}
    return {
        "name": ALLOW_ANY,
        "domains": ["*"],
        "routes": [{"name": ALLOW_ANY, "match": {"prefix": "/"}, "route": action}],
        "include_request_attempt_count": True,
    }
