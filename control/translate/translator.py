"""Which resources each proxy gets.

Every resource is made by a function whose arguments are all that it may depend on, and is remembered under exactly those arguments: proxies that get the same
get the same object, and a snapshot that changed little costs little. What was not asked for during one whole snapshot is forgotten.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from control.model.gateway import Gateway
from control.model.protocols import protocol_of_port
from control.model.routing import RouteRules
from control.model.security import mtls_mode
from control.model.service import NOWHERE, Endpoint, Locality, Port, Resolution, Service, SidecarPorts, Workload
from control.model.sidecar import Imports, Unknown
from control.model.snapshot import Config, Endpoints, MeshSnapshot, is_for, same_config, visible
from control.model.traffic import NO_POLICY, DestinationRule, LoadBalancer, Subset, TrafficPolicy
from control.names import BLACK_HOLE, HTTP_PROXY_ROUTES, MESH, PASSTHROUGH, host_matches, inbound_cluster, outbound_cluster, short_hosts
from control.translate import clusters, listeners, routes
from control.translate.endpoints import depends_on_locality, load_assignment
from control.translate.http_route import Target
from control.translate.listeners import Guard
from control.translate.proxy import GRPC, ProxyKey
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, NO_RESOURCES, ROUTES, Resource, ResourceSet, make
from control.translate.routes import Caller

_T = TypeVar("_T")
_EVERYWHERE = "0.0.0.0"  # where gateways listen


class View:
    """All resources of one proxy: for each type, sets that others may share. Names are unique within a type."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Mapping[str, tuple[ResourceSet, ...]]) -> None:
        self._parts = parts

    def parts(self, url: str) -> tuple[ResourceSet, ...]:
        """The sets of one type; empty for a type that we do not serve."""
        return self._parts.get(url, ())

    def get(self, url: str, name: str) -> Resource | None:
        """One resource."""
        return next((part[name] for part in self.parts(url) if name in part), None)

    def all(self, url: str) -> Iterator[Resource]:
        """All resources of a type."""
        for part in self.parts(url):
            yield from part.values()


class _Same:
    """An argument that is compared by identity: tuples of endpoints are long, and `model` keeps those that did not change."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


class _Scope(NamedTuple):
    """What proxies must have in common to share what they see of the mesh."""

    namespace: str
    labels: tuple[tuple[str, str], ...]
    grpc: bool
    identity: bool  # they have certificates of the mesh
    unknown: Unknown | None  # what becomes of requests to what is not in the mesh, if that is said

    @property
    def caller(self) -> Caller:
        return Caller((self.namespace, self.labels, self.grpc, MESH))


class _Use(NamedTuple):
    """One cluster that callers in a namespace know: a port of a service, or of one of its subsets."""

    service: Service
    port: Port
    subset: Subset | None
    policy: TrafficPolicy
    rule: DestinationRule | None

    @property
    def cluster(self) -> str:
        return outbound_cluster(self.service.host, self.port.number, self.subset.name if self.subset is not None else "")


class Translator:
    """Views of proxies, for one snapshot after another."""

    def __init__(self) -> None:
        self._snapshot: MeshSnapshot | None = None
        self._old: dict[Any, Any] = {}
        self._new: dict[Any, Any] = {}
        self._seen_before: dict[tuple[str, Imports], tuple[Config, Config]] = {}
        self._seen: dict[tuple[str, Imports], tuple[Config, Config]] = {}

    def view(self, proxy: ProxyKey, snapshot: MeshSnapshot) -> View:
        """What `proxy` gets; the same object as long as neither of the two changes."""
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            self._old, self._new = self._new, {}
            self._seen_before, self._seen = self._seen, {}
        return self._once((_Same(snapshot), proxy), lambda: self._view(proxy, snapshot))

    def _once(self, key: Any, make: Callable[[], _T]) -> _T:
        """What was made for these arguments before, or else is made now."""
        found = self._new.get(key)
        if found is None:
            found = self._old.get(key)
            if found is None:
                found = make()
            self._new[key] = found
        return found

    def _resource(self, url: str, name: str, build: Callable[..., Mapping[str, Any]], *arguments: Any) -> Resource:
        plain = tuple(one.value if isinstance(one, _Same) else one for one in arguments)
        return self._once((build, name, *arguments), lambda: make(url, name, build(*plain)))

    # --- a proxy

    def _within(self, whole: Config, namespace: str, imports: Imports) -> Config:
        """What is seen of a configuration. It is the same object as before if what differs is not seen: then nothing is made anew for who sees so much."""
        key = namespace, imports
        found = self._seen.get(key)
        if found is None:
            found = self._seen_before.get(key)
            if found is None or found[0] is not whole:
                made = whole.within(namespace, imports)
                found = whole, found[1] if found is not None and same_config(found[1], made) else made
            self._seen[key] = found
        return found[1]

    def _view(self, proxy: ProxyKey, snapshot: MeshSnapshot) -> View:
        whole = snapshot.config
        workload = snapshot.workloads.get((proxy.namespace, proxy.name))
        labels = dict(proxy.labels) or dict(workload.labels if workload is not None else {})
        identity = workload is not None and workload.sidecar is not None and workload.sidecar.identity and proxy.kind != GRPC
        gateways = tuple(one for one in whole.gateways if one.is_on(proxy.namespace, labels))
        sidecar = whole.sidecar_for(proxy.namespace, labels) if not gateways else None  # gateways see everything, as in Istio
        config = self._within(whole, proxy.namespace, sidecar.imports) if sidecar is not None and sidecar.imports is not None else whole
        scope = _Scope(
            proxy.namespace,
            tuple(sorted((key, value) for key, value in labels.items() if key in config.source_labels)),
            proxy.kind == GRPC,
            identity,
            sidecar.unknown if sidecar is not None else None,
        )
        here = proxy.locality if proxy.locality != NOWHERE or workload is None else workload.locality
        own = (_Same(whole), _Same(config), scope, workload, gateways)
        clusters_key = (CLUSTER, _Same(config), scope.namespace, scope.grpc, scope.identity, scope.unknown)
        parts = {
            CLUSTER: (
                self._once(clusters_key, lambda: self._clusters(config, scope)),
                self._once((CLUSTER, _Same(whole), workload), lambda: self._inbound_clusters(whole, workload)),
            ),
            ENDPOINTS: (self._endpoint_set(snapshot, config, scope, here),),
        }
        if scope.grpc:
            parts[LISTENER] = (self._once((LISTENER, _Same(config), scope.namespace), lambda: self._api_listeners(config, scope)),)
            parts[ROUTES] = (self._once((ROUTES, _Same(config), scope), lambda: self._api_routes(config, scope)),)
        else:
            parts[LISTENER] = (self._once((LISTENER, *own), lambda: self._listeners(whole, config, scope, workload, gateways)),)
            parts[ROUTES] = (self._once((ROUTES, _Same(config), scope, workload, gateways), lambda: self._routes(config, scope, workload, gateways)),)
        return View(parts)

    # --- what all proxies of a scope share

    def _uses(self, config: Config, namespace: str) -> tuple[_Use, ...]:
        return self._once((_uses, _Same(config), namespace), lambda: tuple(_uses(config, namespace)))

    def _clusters(self, config: Config, scope: _Scope) -> ResourceSet:
        uses = self._uses(config, scope.namespace)
        if not scope.identity:  # who has no certificates cannot call what wants them: better no cluster than a plain one
            uses = tuple(use for use in uses if use.policy.tls is None or use.policy.tls.mode != "ISTIO_MUTUAL")
        made = [self._cluster(config, use, scope) for use in uses]
        if scope.unknown is Unknown.ALLOW_ANY:
            made.append(self._resource(CLUSTER, PASSTHROUGH, clusters.passthrough))
        elif scope.unknown is Unknown.REGISTRY_ONLY:
            made.append(self._resource(CLUSTER, BLACK_HOLE, clusters.black_hole))
        return ResourceSet(made)

    def _cluster(self, config: Config, use: _Use, scope: _Scope) -> Resource:
        endpoints = config.resolved.get((use.service.host, use.port.number)) if use.service.resolution is not Resolution.ENDPOINTS else None
        if endpoints is not None and use.subset is not None:
            endpoints = self._of_subset(endpoints, use.subset)
        policy = _for_grpc(use.policy) if scope.grpc else use.policy
        identities = config.security.identities.get(use.service.host, ()) if scope.identity else None
        name = use.subset.name if use.subset is not None else ""
        return self._resource(CLUSTER, use.cluster, clusters.outbound, use.service, use.port, name, policy, _Same(endpoints), _origin(use), identities)

    def _of_subset(self, endpoints: tuple[Endpoint, ...], subset: Subset) -> tuple[Endpoint, ...]:
        return self._once((Subset, _Same(endpoints), subset), lambda: tuple(one for one in endpoints if one.has_labels(subset.labels)))

    def _endpoint_set(self, snapshot: MeshSnapshot, config: Config, scope: _Scope, here: Locality) -> ResourceSet:
        namespace = scope.namespace
        local = self._once(
            (depends_on_locality, _Same(config), namespace), lambda: any(depends_on_locality(use.policy) for use in self._uses(config, namespace))
        )
        key = (ENDPOINTS, _Same(config), _Same(snapshot.endpoints), namespace, here if local else NOWHERE)
        return self._once(key, lambda: ResourceSet(self._load_assignments(self._uses(config, namespace), snapshot.endpoints, here)))

    def _load_assignments(self, uses: Iterable[_Use], everything: Endpoints, here: Locality) -> Iterator[Resource]:
        for use in uses:
            if use.service.resolution is not Resolution.ENDPOINTS:
                continue
            endpoints = everything[use.service.host, use.port.number]
            if use.subset is not None:
                endpoints = self._of_subset(endpoints, use.subset)
            local = depends_on_locality(use.policy)
            arguments = (use.cluster, _Same(endpoints), use.policy, here) if local else (use.cluster, _Same(endpoints))
            yield self._resource(ENDPOINTS, use.cluster, load_assignment, *arguments)

    # --- a gRPC client

    def _api_listeners(self, config: Config, scope: _Scope) -> ResourceSet:
        made: dict[str, Resource] = {}
        for service, port in _ports(config, scope.namespace):
            for host in (service.host, *short_hosts(service.host, scope.namespace)):
                name = f"{host}:{port.number}"
                made.setdefault(name, self._resource(LISTENER, name, listeners.api, name, outbound_cluster(service.host, port.number)))
        return ResourceSet(made.values())

    def _api_routes(self, config: Config, scope: _Scope) -> ResourceSet:
        return ResourceSet(
            self._service_routes(config, scope, outbound_cluster(service.host, port.number), service, port) for service, port in _ports(config, scope.namespace)
        )

    def _service_routes(self, config: Config, scope: _Scope, name: str, service: Service, port: Port) -> Resource:
        rules = config.routes_for(service.host, port.number, scope.namespace)
        targets = _targets(config, scope.namespace, service.host, routes.mentioned(rules))
        return self._resource(ROUTES, name, routes.for_service, name, service, port, rules, targets, scope.caller)

    # --- a gateway

    def _gateway_listeners(self, config: Config, gateways: tuple[Gateway, ...], namespace: str) -> list[Resource]:
        """One listener a port; for plain connections the first rule that concerns it."""
        made: dict[int, Resource] = {}
        for gateway in gateways:
            for server in gateway.servers:
                if server.port in made:
                    continue
                name = listeners.name(_EVERYWHERE, server.port)
                if server.protocol.is_http:
                    made[server.port] = self._resource(LISTENER, name, listeners.gateway_http, _EVERYWHERE, server.port, f"http.{server.port}")
                    continue
                caller = Caller((gateway.namespace, (), False, gateway.key))
                route = routes.tcp_route((one for one in config.route_rules if is_for(one, gateway.key) and visible(one, namespace)), server.port, caller)
                if route is not None:
                    targets = tuple(_targets(config, gateway.namespace, "", (one.destination.host for one in route.destinations)))
                    made[server.port] = self._resource(LISTENER, name, listeners.gateway_tcp, _EVERYWHERE, server.port, route, targets)
        return list(made.values())

    def _gateway_routes(self, config: Config, scope: _Scope, gateways: tuple[Gateway, ...]) -> list[Resource]:
        made = []
        for port in sorted({server.port for gateway in gateways for server in gateway.servers if server.protocol.is_http}):
            name = f"http.{port}"
            hosts = []
            for host, entries in _gateway_hosts(config, gateways, port, scope.namespace).items():
                targets = dict(_targets(config, scope.namespace, host, routes.mentioned(rules for _, rules in entries)))
                found = []
                for gateway, rules in entries:
                    if not rules.gateway_api:
                        found += routes.rule_routes(rules, port, targets, Caller((scope.namespace, (), False, gateway)))
                found += routes.together((rules for _, rules in entries if rules.gateway_api), port, targets, scope.caller)
                hosts.append(routes.host(f"{host}:{port}", [host], found))
            made.append(make(ROUTES, name, {**routes.configuration(name, hosts), "ignore_port_in_host_matching": True}))
        return made

    # --- a sidecar

    def _inbound_clusters(self, config: Config, workload: Workload | None) -> ResourceSet:
        if workload is None or workload.sidecar is None:
            return NO_RESOURCES
        made = []
        for target in workload.sidecar.inbound:
            _, port = _served(config, workload, target)
            ingress = workload.sidecar.ingress.get(target)
            host, number = ingress.endpoint if ingress is not None and ingress.endpoint is not None else ("", target)
            made.append(self._resource(CLUSTER, inbound_cluster(target), clusters.inbound, target, (host or workload.address, number), port.protocol.is_http2))
        return ResourceSet(made)

    def _listeners(self, whole: Config, config: Config, scope: _Scope, workload: Workload | None, gateways: tuple[Gateway, ...]) -> ResourceSet:
        """`whole` is for what a workload serves itself, whether it sees its own services or not; `config` for what it calls."""
        made = self._gateway_listeners(whole, gateways, scope.namespace)
        if workload is not None and workload.sidecar is not None:
            made += self._inbound_listeners(whole, workload, workload.sidecar)
            made += self._outbound_listeners(config, scope, workload, workload.sidecar)
        return ResourceSet(made)

    def _inbound_listeners(self, config: Config, workload: Workload, sidecar: SidecarPorts) -> list[Resource]:
        made = []
        for target, listen in sidecar.inbound.items():
            host, port = _served(config, workload, target)
            guard = _guard(config, workload, target)
            ingress = sidecar.ingress.get(target)
            bind = ingress.bind if ingress is not None and ingress.bind else workload.address
            name = listeners.name(bind, listen)
            if port.protocol.is_http:
                operation = f"{host}:{port.number}/*"
                arguments = (bind, listen, target, operation, port.protocol.is_http2, guard)
                made.append(self._resource(LISTENER, name, listeners.inbound_http, *arguments))
            else:
                made.append(self._resource(LISTENER, name, listeners.inbound_tcp, bind, listen, target, guard))
        return made

    def _outbound_listeners(self, config: Config, scope: _Scope, workload: Workload, sidecar: SidecarPorts) -> list[Resource]:
        made = []
        local = "::1" if ":" in workload.address else "127.0.0.1"
        if sidecar.http_proxy:
            listen = sidecar.http_proxy
            made.append(self._resource(LISTENER, listeners.name(local, listen), listeners.outbound_http, local, listen, HTTP_PROXY_ROUTES))
        for listen, service, port in _outbound(config, scope.namespace, workload):
            name = listeners.name(local, listen)
            if port.protocol.is_http:
                made.append(self._resource(LISTENER, name, listeners.outbound_http, local, listen, f"{service.host}:{port.number}"))
            else:
                route = routes.tcp_route(config.routes_for(service.host, port.number, scope.namespace), port.number, scope.caller)
                made.append(self._resource(LISTENER, name, listeners.outbound_tcp, local, listen, service.host, port.number, route))
        return made

    def _routes(self, config: Config, scope: _Scope, workload: Workload | None, gateways: tuple[Gateway, ...]) -> ResourceSet:
        made = {one.name: one for one in self._gateway_routes(config, scope, gateways)}
        if workload is None or workload.sidecar is None:
            return ResourceSet(made.values())
        for _, service, port in _outbound(config, scope.namespace, workload):
            name = f"{service.host}:{port.number}"
            if port.protocol.is_http and name not in made:
                made[name] = self._service_routes(config, scope, name, service, port)
        if workload.sidecar.http_proxy:
            made[HTTP_PROXY_ROUTES] = self._once((HTTP_PROXY_ROUTES, _Same(config), scope), lambda: _http_proxy(config, scope))
        return ResourceSet(made.values())


def _domain_rank(host: str) -> tuple[int, int]:
    """Exact names before patterns, longer patterns before shorter ones."""
    return int(host.startswith("*")), -len(host)


def _gateway_hosts(config: Config, gateways: tuple[Gateway, ...], port: int, namespace: str) -> dict[str, list[tuple[str, RouteRules]]]:
    """What is said at one port of a gateway that runs in `namespace`: host -> (gateway, rules)."""
    found: dict[str, list[tuple[str, RouteRules]]] = {}
    for gateway in gateways:
        for server in gateway.servers:
            if server.port != port or not server.protocol.is_http:
                continue
            for rules in config.route_rules:
                if (
                    not rules.http
                    or not is_for(rules, gateway.key)
                    or not visible(rules, namespace)
                    or rules.section not in ("", server.name)
                    or (rules.ports and port not in rules.ports)
                ):
                    continue
                for host in rules.hosts:
                    for where, pattern in server.hosts:
                        both = _both(host, pattern)
                        if both and where in ("*", rules.namespace) and (gateway.key, rules) not in found.setdefault(both, []):
                            found[both].append((gateway.key, rules))
    return {host: entries for host, entries in sorted(found.items(), key=lambda item: (_domain_rank(item[0]), item[0])) if entries}


def _both(host: str, pattern: str) -> str:
    """What two names or patterns of hosts have in common, "" for nothing."""
    if host_matches(pattern, host) or pattern == host:
        return host
    return pattern if host_matches(host, pattern) else ""


def _uses(config: Config, namespace: str) -> Iterator[_Use]:
    for host, service in config.services.items():
        if not visible(service, namespace):
            continue
        yield from _service_uses(service, config.rule_for(host, namespace))


def _service_uses(service: Service, rule: DestinationRule | None) -> Iterator[_Use]:
    base = rule.policy if rule is not None and rule.policy is not None else NO_POLICY
    for port in service.ports:
        yield _Use(service, port, None, base.for_port(port.number), rule)
        for subset in rule.subsets if rule is not None else ():
            policy = _merged(subset.policy, base) if subset.policy is not None else base
            yield _Use(service, port, subset, policy.for_port(port.number), rule)


@functools.lru_cache(10_000)
def _merged(policy: TrafficPolicy, base: TrafficPolicy) -> TrafficPolicy:
    """The same object for the same two, since what is made of it is remembered by it."""
    return policy.over(base)


@functools.lru_cache(10_000)
def _for_grpc(policy: TrafficPolicy) -> TrafficPolicy:
    """gRPC's clients know few balancers: what they do not know is round robin to them."""
    balancer = policy.load_balancer
    if balancer is not None and balancer.hash is not None:
        return policy
    return TrafficPolicy(LoadBalancer("ROUND_ROBIN", None, None, balancer.locality if balancer else None)).over(policy)


def _origin(use: _Use) -> tuple[tuple[str, str], ...]:
    found = []
    if use.rule is not None:
        found.append(("config", f"/apis/networking.istio.io/v1/namespaces/{use.rule.namespace}/destination-rule/{use.rule.name}"))
    if use.subset is not None:
        found.append(("subset", use.subset.name))
    return tuple(found)


def _ports(config: Config, namespace: str) -> Iterator[tuple[Service, Port]]:
    for service in config.services.values():
        if visible(service, namespace) and not service.host.startswith("*"):
            for port in service.ports:
                yield service, port


def _targets(config: Config, namespace: str, host: str, mentioned: Iterable[str]) -> tuple[tuple[str, Target], ...]:
    return tuple((one, _target(config, namespace, one)) for one in sorted({host, *mentioned}))


def _target(config: Config, namespace: str, host: str) -> Target:
    service = config.services.get(host)
    rule = config.rule_for(host, namespace)
    if service is None or rule is None:
        return Target(service)
    found = []
    for use in _service_uses(service, rule):
        hash = use.policy.load_balancer.hash if use.policy.load_balancer is not None else None
        if hash is not None:
            found.append(((use.port.number, use.subset.name if use.subset is not None else ""), hash))
    return Target(service, tuple(found))


def _served(config: Config, workload: Workload, target: int) -> tuple[str, Port]:
    """Which service a port of a workload belongs to: its host (or the workload's name) and port. Of the protocol a Sidecar's ingress knows best."""
    host, port = _service_of(config, workload, target)
    ingress = workload.sidecar.ingress.get(target) if workload.sidecar is not None else None
    return host, port if ingress is None else dataclasses.replace(port, protocol=ingress.protocol)


def _service_of(config: Config, workload: Workload, target: int) -> tuple[str, Port]:
    for service in config.services.values():
        if service.selector and service.namespace == workload.namespace and service.selector.items() <= workload.labels.items():
            for port in service.ports:
                if workload.port_for(port) == target:
                    return service.host, port
    name = next((name for name, number in workload.ports.items() if number == target), "")
    return f"{workload.name}.{workload.namespace}", Port(target, name, protocol_of_port(name))


def _guard(config: Config, workload: Workload, port: int) -> Guard:
    """Who may reach a port of a workload. Without an identity of its own a sidecar cannot know who calls: then policies that ask for one let nobody in."""
    security = config.security
    policies = tuple(one for one in security.authorization if one.is_for(workload.namespace, workload.labels))
    identity = workload.sidecar is not None and workload.sidecar.identity
    mode = mtls_mode(security.peer_authentication, workload.namespace, workload.labels, port) if identity else None
    return Guard(mode, security.trust_domain, policies)


def _outbound(config: Config, namespace: str, workload: Workload) -> Iterator[tuple[int, Service, Port]]:
    """(port of the sidecar, service, its port); for services that are not there the sidecar does not listen."""
    assert workload.sidecar is not None
    for one in workload.sidecar.outbound:
        service = config.services.get(one.host)
        port = service.port(one.port) if service is not None and visible(service, namespace) else None
        if service is not None and port is not None and one.listen:
            yield one.listen, service, port


def _http_proxy(config: Config, scope: _Scope) -> Resource:
    """All HTTP services by their names, for applications that use the sidecar as their HTTP proxy."""
    taken: set[str] = {"*"}
    hosts = []
    for service, port in _ports(config, scope.namespace):
        if not port.protocol.is_http:
            continue
        domains = [one for one in routes.domains(service, port.number, scope.namespace, bare=port.number == 80) if one not in taken]
        if domains:
            taken.update(domains)
            rules = config.routes_for(service.host, port.number, scope.namespace)
            targets = _targets(config, scope.namespace, service.host, routes.mentioned(rules))
            hosts.append(routes.virtual_host(f"{service.host}:{port.number}", domains, service, port, rules, targets, scope.caller))
    for one in config.route_rules:  # hosts that are no services of the mesh, and are sent to some that are
        for host in one.hosts if visible(one, scope.namespace) and MESH in one.gateways else ():
            domains = [domain for domain in (host, f"{host}:80") if domain not in taken]
            if host.startswith("*") or not domains or host in config.services:
                continue
            made = routes.rule_routes(one, 80, dict(_targets(config, scope.namespace, host, routes.mentioned([one]))), scope.caller)
            if made:
                taken.update(domains)
                hosts.append(routes.host(f"{host}:80", domains, made))
    others = routes.allow_any() if scope.unknown is Unknown.ALLOW_ANY else routes.block_all()
    return make(ROUTES, HTTP_PROXY_ROUTES, routes.configuration(HTTP_PROXY_ROUTES, [*hosts, others]))
