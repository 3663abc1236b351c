"""Route configurations: which rules concern a port of a service, as one virtual host, and virtual hosts together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from control.model.routing import RouteMatch, RouteRules, TcpRoute, TlsRoute
from control.model.service import Port, Service
from control.names import ALLOW_ANY, BLOCK_ALL, MESH, PASSTHROUGH, outbound_cluster, short_hosts
from control.translate import http_route
from control.translate.http_route import UNKNOWN_SERVICE, Around, Target

MAX_DIRECT_RESPONSE = 1 << 20
Labels = tuple[tuple[str, str], ...]


class Caller(tuple[str, Labels, bool, str]):
    """Whose routes these are: namespace, labels as far as rules ask for them, whether it is a gRPC client, and a gateway's name, MESH for sidecars."""

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
        made = [http_route.default_route(cluster, hash, f"{service.host}:{port.number}/*", http2=port.protocol.is_http2, grpc=caller.grpc)]
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
            around = Around(port, targets, one.name, True, caller.grpc)
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
    around = Around(port, targets, rules.name, False, caller.grpc)
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
    if caller.gateway != MESH or match.gateways:
        return True
    return match.source_labels.items() <= dict(caller.labels).items() and match.source_namespace in ("", caller.namespace)


def tcp_route(rules: Iterable[RouteRules], port: int, caller: Caller) -> TcpRoute | None:
    """What is said about plain connections to a port; None: nothing."""
    return next((route for one in rules for route in one.tcp if concerns(route, port, one, caller)), None)


def tls_routes(rules: Iterable[RouteRules], port: int, caller: Caller) -> tuple[TlsRoute, ...]:
    """What is said about connections to a port by the names in their ClientHello; of two routes for a name, the first has it."""
    made = []
    taken: set[str] = set()
    for one in rules:
        for route in one.tls:
            names = tuple(name for name in route.sni_hosts if name not in taken)
            if names and concerns(route, port, one, caller):
                taken.update(names)
                made.append(replace(route, sni_hosts=names))
    return tuple(made)


def tcp_clusters(route: TcpRoute | TlsRoute, port: int, targets: Mapping[str, Target]) -> tuple[tuple[str, int], ...]:
    """(cluster, weight) of each destination."""
    made = []
    for one in route.destinations:
        if not one.destination.host:
            made.append((UNKNOWN_SERVICE, one.weight))
            continue
        target = targets.get(one.destination.host)
        service = target.service if target is not None else None
        number = one.destination.port or (service.ports[0].number if service is not None and len(service.ports) == 1 else port)
        made.append((outbound_cluster(one.destination.host, number, one.destination.subset), one.weight))
    return tuple(made)


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
