"""Which resources each proxy gets.

Every resource is made by a function whose arguments are all that it may depend on, and is remembered under exactly those arguments: proxies that get the same
get the same object, and a snapshot that changed little costs little. What was not asked for during one whole snapshot is forgotten, or while MAX_ASKED views
were made of what proxies asked for: a snapshot may last for weeks, in which every call of another service makes one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from control.model.envoy_filter import GATEWAY, OUTBOUND, Patch
from control.model.gateway import Gateway
from control.model.labels import HOSTNAME
from control.model.mesh import pool_of
from control.model.routing import Retries, TlsRoute
from control.model.service import EXPECTED, NOWHERE, Endpoint, Locality, Port, Resolution, Service, SidecarPorts, Workload
from control.model.sidecar import Egress, Imports, Sidecar, Speaks, Unknown
from control.model.snapshot import Config, Endpoints, MeshSnapshot, same_config
from control.model.traffic import DestinationRule, Subset
from control.names import (
    BLACK_HOLE,
    CAPTURED,
    HTTP_PROXY_ROUTES,
    LOCAL_CLUSTER,
    MESH,
    PASSTHROUGH,
    SERVER_LISTENER,
    VIRTUAL_OUTBOUND,
    host_matches,
    inbound_cluster,
    is_ip,
    outbound_cluster,
    short_hosts,
)
from control.translate import clusters, gateways, http_proxy, listeners, routes, secrets, tls, workloads
from control.translate.endpoints import Labels, depends_on_locality, load_assignment, priority_labels
from control.translate.flow import NOWHERE as NO_WAY
from control.translate.flow import Way
from control.translate.gateways import Serving
from control.translate.listeners import ByName, Guard, Some
from control.translate.patches import Proxy as Patched
from control.translate.patches import added, concerned, is_meant, patched
from control.translate.proxy import GRPC, ProxyKey
from control.translate.resource import (
    CLUSTER,
    ENDPOINTS,
    EXTENSION,
    LISTENER,
    NO_RESOURCES,
    ROUTES,
    SECRET,
    VIRTUAL_HOST,
    Held,
    Nothing,
    Resource,
    ResourceSet,
    make,
)
from control.translate.routes import Caller
from control.translate.secrets import Means
from control.translate.telling import Told
from control.translate.uses import Use, for_grpc, origin, ports_of, showing, targets_of, uses_of
from control.translate.view import View

_T = TypeVar("_T")
MAX_ASKED = 1000


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
    edge: bool  # by the documents, they serve gateways
    known: bool  # a document describes them
    shown: str  # name over SDS of what they show to services that ask for TLS
    unknown: Unknown | None  # what becomes of requests to what is not in the mesh, if that is said
    on_demand: bool = False  # what they have not called is sent when they do
    retries: Retries | None = None  # of requests of which nothing else says it
    captured: bool = False  # what their applications open is redirected to them

    @property
    def caller(self) -> Caller:
        return Caller((self.namespace, self.labels, self.grpc, MESH, self.retries))

    @property
    def means(self) -> Means:
        return Means(self.namespace, self.identity, self.edge, self.known, self.grpc)


_Seen = tuple[Any, ...]
_Index = Mapping[str, http_proxy.Proxied]


class Exit(NamedTuple):
    """A listener for some of the services, and what is seen of the mesh by it."""

    egress: Egress
    seen: _Same

    @property
    def config(self) -> Config:
        found: Config = self.seen.value
        return found


class Asked(NamedTuple):
    """What a proxy has asked for: names of virtual hosts, and services whose clusters it has."""

    names: frozenset[str]
    hosts: frozenset[str] = frozenset()


class Translator:
    """Views of proxies, for one snapshot after another."""

    def __init__(self) -> None:
        self._snapshot: MeshSnapshot | None = None
        self._old: dict[Any, Any] = {}
        self._new: dict[Any, Any] = {}
        self._seen_before: dict[_Seen, tuple[Config, Config]] = {}
        self._seen: dict[_Seen, tuple[Config, Config]] = {}
        self._asked = 0  # views of what was asked for, since something was forgotten

    @property
    def remembered(self) -> int:
        """How many things."""
        return len(self._old) + len(self._new) + len(self._seen_before) + len(self._seen)

    def view(self, proxy: ProxyKey, snapshot: MeshSnapshot, asked: Asked | None = None) -> View:
        """What `proxy` gets; the same object as long as neither of the two changes. `asked`: it is to get no more than it asks for, which its sidecar can do
        for what is called by HTTP."""
        if snapshot is not self._snapshot or self._asked >= MAX_ASKED:
            self._snapshot, self._asked = snapshot, 0
            self._old, self._new = self._new, {}
            self._seen_before, self._seen = self._seen, {}
        if asked is not None:
            self._asked += 1
            return self._view(proxy, snapshot, asked)
        return self._once((_Same(snapshot), proxy), lambda: self._view(proxy, snapshot, None))

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

    def _seen_from(self, config: Config, namespace: str) -> Config:
        return self._once((Config, _Same(config), namespace), lambda: config.seen_from(namespace)) if config.others else config

    def _ruled(self, config: Config, chosen: tuple[DestinationRule, ...]) -> Config:
        if all(one.selector is None for one in config.destination_rules):
            return config
        return self._once((DestinationRule, _Same(config), chosen), lambda: config.ruled_by(chosen))

    def _within(self, whole: Config, namespace: str, imports: Imports, chosen: tuple[DestinationRule, ...], needed: frozenset[str]) -> Config:
        """What is seen of a configuration."""
        return self._narrowed(whole, (namespace, imports, chosen, needed), lambda: whole.within(namespace, imports, needed))

    def _narrowed(self, whole: Config, key: _Seen, narrow: Callable[[], Config]) -> Config:
        """A part of a configuration. It is the same object as before if what differs is not in it: then nothing is made anew for who sees so much."""
        found = self._seen.get(key)
        if found is None:
            found = self._seen_before.get(key)
            if found is None or found[0] is not whole:
                made = narrow()
                found = whole, found[1] if found is not None and same_config(found[1], made) else made
            self._seen[key] = found
        return found[1]

    def _view(self, proxy: ProxyKey, snapshot: MeshSnapshot, asked: Asked | None) -> View:
        workload = snapshot.workloads.get((proxy.namespace, proxy.name))
        own_labels = workload.labels if workload is not None else {}  # and not what it says of itself: others may say the same
        labels = dict(proxy.labels) or dict(own_labels)
        chosen = snapshot.config.selecting(proxy.namespace, own_labels if workload is not None else labels)
        whole = self._ruled(self._seen_from(snapshot.config, proxy.namespace), chosen)
        identity = workload is not None and workload.sidecar is not None and workload.sidecar.identity
        served = workloads.at_their_targets(whole, workload, tuple(one for one in whole.gateways if one.is_on(proxy.namespace, labels)))
        sidecar = whole.sidecar_for(proxy.namespace, labels) if not served else None  # gateways see everything, as in Istio
        config = whole
        if sidecar is not None and sidecar.imports is not None:
            config = self._within(whole, proxy.namespace, sidecar.imports, chosen, workloads.needed(whole, proxy.namespace, workload))
        seen = config
        if served or workload is None or not workloads.asks(workload) or proxy.kind == GRPC:
            asked = None
        entitled = tuple(one for one in served if workload is not None and one.is_on(proxy.namespace, own_labels))
        captured = workload is not None and workload.sidecar is not None and bool(workload.sidecar.capture) and not served
        unknown = (sidecar.unknown if sidecar is not None else None) or whole.telemetry.mesh.unknown
        scope = _Scope(
            proxy.namespace,
            tuple(sorted((key, value) for key, value in labels.items() if key in seen.source_labels)),
            proxy.kind == GRPC,
            identity,
            bool(entitled),
            workload is not None,
            next((name for name, _ in gateways.shown(whole, entitled)), ""),
            unknown or (Unknown.REGISTRY_ONLY if captured else None),
            asked is not None,
            whole.general.retries,
            captured,
        )
        exits = self._exits(whole, proxy.namespace, sidecar, chosen) if sidecar is not None and not scope.grpc else ()
        led: dict[str, frozenset[str]] = {}
        if asked is not None:
            led = self._led(seen, scope, asked.names)
            needed = workloads.needed(whole, proxy.namespace, workload)
            hosts = asked.hosts.union(*led.values(), needed, workloads.declared(workload), *(one.config.services for one in exits))
            imports = sidecar.imports if sidecar is not None else None
            config = self._narrowed(seen, (proxy.namespace, imports, chosen, hosts, Asked), lambda: seen.only(proxy.namespace, hosts))
        here = proxy.locality if proxy.locality != NOWHERE or workload is None else workload.locality
        told = workloads.told(whole, proxy, labels, served, client=True), workloads.told(whole, proxy, labels, served, client=False)
        edge = workloads.edge_guard(whole, proxy.namespace, labels, served) if served else None
        own = (_Same(whole), _Same(config), scope, workload, served, edge, told, exits)
        clusters_key = (CLUSTER, _Same(config), scope.means, scope.shown, scope.unknown, scope.captured)
        parts = {
            CLUSTER: (
                self._once(clusters_key, lambda: self._clusters(config, scope)),
                self._once((CLUSTER, _Same(whole), workload), lambda: self._inbound_clusters(whole, workload)),
                self._once((CLUSTER, _Same(whole), workloads.TRACING), lambda: self._collectors(whole)),
                self._passed_clusters(whole, scope, served),
            ),
            ENDPOINTS: (
                self._endpoint_set(snapshot, config, scope, here, workloads.placed(labels, workload)),
                self._passed_endpoints(whole, snapshot, scope, served),
                self._local_endpoints(whole, snapshot, workload, proxy.locality),
            ),
        }
        if scope.grpc:
            parts[LISTENER] = (
                self._once((LISTENER, _Same(config), scope.namespace), lambda: self._api_listeners(config, scope)),
                self._once((LISTENER, _Same(whole), workload), lambda: self._server_listeners(whole, workload)),
            )
            parts[ROUTES] = (self._once((ROUTES, _Same(config), scope), lambda: self._api_routes(config, scope)),)
        else:
            parts[LISTENER] = (self._once((LISTENER, *own), lambda: self._listeners(whole, config, scope, workload, served, edge, *told, exits)),)
            parts[ROUTES] = (
                self._once((ROUTES, _Same(config), scope, workload, served), lambda: self._routes(config, scope, workload, served)),
                self._exit_routes(scope, exits),
            )
            key = (SECRET, _Same(whole), _Same(snapshot.secrets), scope, entitled)
            parts[SECRET] = (
                self._once(key, lambda: self._gateway_secrets(whole, snapshot, scope, entitled)) if entitled else NO_RESOURCES,
                self._callers_secrets(config, snapshot, scope),
                self._once((SECRET, _Same(config), scope, served, workload), lambda: self._file_secrets(config, scope, served, workload)),
            )
            parts[EXTENSION] = (NO_RESOURCES,)
            said, serves = {"NAME": proxy.name, "NAMESPACE": proxy.namespace, **dict(proxy.metadata)}, {one.key for one in served}
            ours = (one for one in snapshot.envoy_filters if one.is_for(proxy.namespace, labels, serves, whole.general.root))
            patches = tuple(patch for one in ours for patch in one.patches if is_meant(patch, said))
            who = Patched(GATEWAY if served else OUTBOUND, workloads.meant(workload, served), workloads.edges(served))
            if patches:
                parts = self._patched(parts, patches, who)
            parts[VIRTUAL_HOST] = (self._virtual_hosts(seen, scope, asked.names, patches, who) if asked is not None else NO_RESOURCES,)
        return View(parts, led)

    # --- what is asked for

    def _index(self, config: Config, scope: _Scope) -> _Index:
        return self._once((http_proxy.index, _Same(config), scope.caller), lambda: http_proxy.index(config, scope.caller))

    def _led(self, config: Config, scope: _Scope, names: frozenset[str]) -> dict[str, frozenset[str]]:
        """The services to which virtual hosts lead, by their names; without those that lead nowhere."""
        index = self._index(config, scope)
        return {name: found.hosts() for name in names if (found := index.get(name.removeprefix(http_proxy.PREFIX))) is not None}

    def _virtual_hosts(self, config: Config, scope: _Scope, names: frozenset[str], patches: tuple[Patch, ...], proxy: Patched) -> ResourceSet:
        ours = concerned(ROUTES, patches)
        who = proxy._replace(ports=(), edges=())
        return ResourceSet([http_proxy.GREETING, *(self._virtual_host(config, scope, name, ours, who) for name in sorted(names))])

    def _virtual_host(self, config: Config, scope: _Scope, name: str, patches: tuple[Patch, ...], proxy: Patched) -> Resource:
        """Of one host, as it would be among all others."""

        def build() -> Resource:
            host = name.removeprefix(http_proxy.PREFIX)
            whole = http_proxy.only(self._index(config, scope).get(host), host, scope.unknown)
            left = patched(ROUTES, whole, patches, proxy) if patches else (whole,)
            return http_proxy.alone(left[0], name) if left else Nothing(name)

        return self._once((http_proxy.alone, _Same(config), scope, name, patches, proxy), build)

    def _patched(self, parts: Mapping[str, tuple[ResourceSet, ...]], patches: tuple[Patch, ...], proxy: Patched) -> dict[str, tuple[ResourceSet, ...]]:
        made = dict(parts)
        for url, sets in parts.items():
            ours = concerned(url, patches)
            if ours:
                who = proxy if url == LISTENER else proxy._replace(ports=(), edges=())  # the others are the same for all proxies of a role
                made[url] = tuple(self._patched_set(url, one, ours, who, adds=not index) for index, one in enumerate(sets))
        return made

    def _patched_set(self, url: str, resources: ResourceSet, patches: tuple[Patch, ...], proxy: Patched, *, adds: bool) -> ResourceSet:
        def build() -> ResourceSet:
            found = list(added(url, patches, proxy)) if adds else []
            for resource in resources.values():
                found += self._once((patched, url, _Same(resource), patches, proxy), lambda one=resource: patched(url, one, patches, proxy))  # type: ignore[misc]
            return ResourceSet(found)

        return self._once((patched, url, _Same(resources), patches, proxy, adds), build)

    # --- what all proxies of a scope share

    def _uses(self, config: Config, namespace: str) -> tuple[Use, ...]:
        return self._once((uses_of, _Same(config), namespace), lambda: tuple(uses_of(config, namespace)))

    def _clusters(self, config: Config, scope: _Scope) -> ResourceSet:
        uses = self._uses(config, scope.namespace)
        means = scope.means
        made = [self._cluster(config, use, scope) for use in uses if means.can_call(config, use)]
        if scope.unknown is Unknown.ALLOW_ANY:
            made.append(self._resource(CLUSTER, PASSTHROUGH, clusters.passthrough, config.general.clusters))
        elif scope.unknown is Unknown.REGISTRY_ONLY:
            made.append(self._resource(CLUSTER, BLACK_HOLE, clusters.black_hole))
        return ResourceSet(made)

    def _cluster(self, config: Config, use: Use, scope: _Scope) -> Resource:
        endpoints = config.resolved.get((use.service.key, use.port.number)) if use.service.resolution is not Resolution.ENDPOINTS else None
        if endpoints is not None and use.subset is not None:
            endpoints = self._of_subset(endpoints, use.subset)
        policy = for_grpc(use.policy) if scope.grpc else use.policy
        if scope.shown:
            policy = showing(policy, scope.shown)
        identities = config.security.identities.get(use.service.key, ()) if scope.identity else None
        name = use.subset.name if use.subset is not None else ""
        arguments = (use.service, use.port, name, policy, _Same(endpoints), origin(use), identities, scope.grpc, config.general.dns_refresh_s, scope.captured)
        return self._resource(CLUSTER, use.cluster, clusters.outbound, *arguments)

    def _of_subset(self, endpoints: tuple[Endpoint, ...], subset: Subset) -> tuple[Endpoint, ...]:
        return self._once((Subset, _Same(endpoints), subset), lambda: tuple(one for one in endpoints if one.has_labels(subset.labels)))

    def _of_machine(self, endpoints: tuple[Endpoint, ...], name: str | None) -> tuple[Endpoint, ...]:
        return self._once((HOSTNAME, _Same(endpoints), name), lambda: tuple(one for one in endpoints if dict(one.labels).get(HOSTNAME) == name))

    def _endpoint_set(self, snapshot: MeshSnapshot, config: Config, scope: _Scope, here: Locality, labels: Mapping[str, str]) -> ResourceSet:
        namespace = scope.namespace
        local, names = self._once(
            (depends_on_locality, _Same(config), namespace),
            lambda: (
                any(use.service.node_local or depends_on_locality(use.policy) for use in self._uses(config, namespace)),
                frozenset(
                    name for use in self._uses(config, namespace) for name in (*priority_labels(use.policy), *([HOSTNAME] if use.service.node_local else []))
                ),
            ),
        )
        place = (here, tuple(sorted((key, value) for key, value in labels.items() if key in names))) if local else (NOWHERE, ())
        key = (ENDPOINTS, _Same(config), _Same(snapshot.endpoints), namespace, place)
        return self._once(key, lambda: ResourceSet(self._load_assignments(self._uses(config, namespace), snapshot.endpoints, *place)))

    def _local_endpoints(self, config: Config, snapshot: MeshSnapshot, workload: Workload | None, here: Locality) -> ResourceSet:
        """Who else serves what a proxy's workload serves, in its region: for proxies that say where they are, and ask for it."""
        if workload is None or here == NOWHERE:
            return NO_RESOURCES
        service = workloads.first_service(config, workload)
        found = snapshot.endpoints[service.key, service.ports[0].number] if service is not None and service.ports else ()
        region = here.region

        def build() -> ResourceSet:
            return ResourceSet([make(ENDPOINTS, LOCAL_CLUSTER, load_assignment(LOCAL_CLUSTER, [one for one in found if one.locality.region == region]))])

        return self._once((ENDPOINTS, LOCAL_CLUSTER, _Same(found), region), build)

    def _load_assignments(self, uses: Iterable[Use], everything: Endpoints, here: Locality, labels: Labels) -> Iterator[Resource]:
        for use in uses:
            if use.service.resolution is not Resolution.ENDPOINTS:
                continue
            endpoints = everything[use.service.key, use.port.number]
            if endpoints and endpoints[0] is EXPECTED:
                yield self._once((Held, use.cluster), lambda name=use.cluster: Held(make(ENDPOINTS, name, load_assignment(name, ()))))  # type: ignore[misc]
                continue
            if use.subset is not None:
                endpoints = self._of_subset(endpoints, use.subset)
            if use.service.node_local:
                endpoints = self._of_machine(endpoints, dict(labels).get(HOSTNAME))
            local = depends_on_locality(use.policy)
            asked = priority_labels(use.policy)
            own = tuple(label for label in labels if label[0] in asked)
            arguments = (use.cluster, _Same(endpoints), use.policy, here, own) if local else (use.cluster, _Same(endpoints))
            yield self._resource(ENDPOINTS, use.cluster, load_assignment, *arguments)

    # --- a gRPC client

    def _api_listeners(self, config: Config, scope: _Scope) -> ResourceSet:
        made: dict[str, Resource] = {}
        for service, port in ports_of(config, scope.namespace):
            for host in (service.host, *short_hosts(service.host, scope.namespace)):
                name = f"{host}:{port.number}"
                made.setdefault(name, self._resource(LISTENER, name, listeners.api, name, outbound_cluster(service.host, port.number)))
        return ResourceSet(made.values())

    def _server_listeners(self, config: Config, workload: Workload | None) -> ResourceSet:
        """For a gRPC server: one for each address that it may listen on."""
        made = []
        for target in sorted(set(workload.ports.values()) - {0}) if workload is not None else ():
            assert workload is not None
            host, port = workloads.served(config, workload, target)
            guard = workloads.guard(config, workload, target)
            for bind in (workload.address, "0.0.0.0", "::"):
                name = SERVER_LISTENER % (f"[{bind}]:{target}" if ":" in bind else f"{bind}:{target}")
                made.append(self._resource(LISTENER, name, listeners.grpc_server, name, bind, target, f"{host}:{port.number}/*", guard))
        return ResourceSet(made)

    def _api_routes(self, config: Config, scope: _Scope) -> ResourceSet:
        seen = ports_of(config, scope.namespace)
        return ResourceSet(self._service_routes(config, scope, outbound_cluster(service.host, port.number), service, port) for service, port in seen)

    def _service_routes(self, config: Config, scope: _Scope, name: str, service: Service, port: Port) -> Resource:
        rules = config.routes_for(service.host, port.number, scope.namespace)
        targets = targets_of(config, scope.namespace, service.host, routes.mentioned(rules))
        return self._resource(ROUTES, name, routes.for_service, name, service, port, rules, targets, scope.caller)

    # --- a gateway

    def _servings(self, config: Config, scope: _Scope, served: tuple[Gateway, ...]) -> dict[tuple[str, int], list[Serving]]:
        key = (gateways.by_place, _Same(config), scope.namespace, scope.identity, served)
        return self._once(key, lambda: gateways.by_place(config, served, scope.namespace, identity=scope.identity))

    def _passed(self, config: Config, scope: _Scope, served: tuple[Gateway, ...]) -> tuple[Use, ...]:
        """What gateways pass the mutual TLS of: no services outside, which proxies resolve themselves."""
        patterns = gateways.passed_on(served)
        if not patterns:
            return ()

        def build() -> tuple[Use, ...]:
            uses = (use for use in self._uses(config, scope.namespace) if use.service.resolution is Resolution.ENDPOINTS)
            return tuple(use for use in uses if any(one == use.service.host or host_matches(one, use.service.host) for one in patterns))

        return self._once((gateways.passed_on, _Same(config), scope.namespace, patterns), build)

    def _passed_clusters(self, config: Config, scope: _Scope, served: tuple[Gateway, ...]) -> ResourceSet:
        uses = self._passed(config, scope, served)
        made = []
        for use in uses:
            name = use.subset.name if use.subset is not None else ""
            made.append(self._resource(CLUSTER, use.server_name, clusters.passed_on, use.service, use.port, name, use.policy, origin(use)))
        return self._once((CLUSTER, _Same(uses)), lambda: ResourceSet(made)) if made else NO_RESOURCES

    def _passed_endpoints(self, config: Config, snapshot: MeshSnapshot, scope: _Scope, served: tuple[Gateway, ...]) -> ResourceSet:
        uses = self._passed(config, scope, served)
        if not uses:
            return NO_RESOURCES

        def build() -> ResourceSet:
            made = []
            for use in uses:
                endpoints = snapshot.endpoints[use.service.host, use.port.number]
                if use.subset is not None:
                    endpoints = self._of_subset(endpoints, use.subset)
                made.append(self._resource(ENDPOINTS, use.server_name, load_assignment, use.server_name, _Same(endpoints)))
            return ResourceSet(made)

        return self._once((ENDPOINTS, _Same(uses), _Same(snapshot.endpoints)), build)

    def _gateway_listeners(self, config: Config, scope: _Scope, served: tuple[Gateway, ...], guard: Guard, told: Told) -> list[Resource]:
        """One listener for each address and port."""
        made = []
        for (bind, port), servings in self._servings(config, scope, served).items():
            targets = dict(targets_of(config, scope.namespace, "", gateways.mentioned(config, servings)))
            mesh = tuple((use.service.host, use.server_name) for use in self._passed(config, scope, served))
            chains = gateways.chains(config, servings, targets, mesh)
            if chains:
                name = listeners.name(bind, port)
                made.append(self._resource(LISTENER, name, listeners.gateway, bind, port, chains, guard, told, config.general.listeners))
        return made

    def _gateway_routes(self, config: Config, scope: _Scope, served: tuple[Gateway, ...]) -> list[Resource]:
        together: dict[str, list[Serving]] = {}
        for servings in self._servings(config, scope, served).values():
            for one in servings:
                if one.server.protocol.is_http:
                    together.setdefault(one.route_name, []).append(one)
        return [self._gateway_route(config, scope, name, servings) for name, servings in sorted(together.items())]

    def _gateway_route(self, config: Config, scope: _Scope, name: str, servings: list[Serving]) -> Resource:
        port = servings[0].server.port
        hosts = []
        for host, entries in gateways.hosts(config, servings).items():
            targets = dict(targets_of(config, scope.namespace, host, routes.mentioned(rules for _, rules in entries)))
            found = []
            for serving, rules in entries:
                if not rules.gateway_api:
                    found += routes.rule_routes(rules, port, targets, serving.caller)
            found += routes.together((rules for _, rules in entries if rules.gateway_api), port, targets, scope.caller)
            made = routes.host(f"{host}:{port}", [host], found)
            if gateways.is_redirected(host, servings):
                made["require_tls"] = "ALL"
            hosts.append(made)
        return make(ROUTES, name, {**routes.configuration(name, hosts), "ignore_port_in_host_matching": True})

    def _gateway_secrets(self, config: Config, snapshot: MeshSnapshot, scope: _Scope, served: tuple[Gateway, ...]) -> ResourceSet:
        """Certificates and authorities, for the workload alone that documents say serves the gateways."""
        servings = [one for some in self._servings(config, scope, served).values() for one in some]
        found = list(gateways.secrets(config, servings, snapshot.secrets))
        found += [(name, snapshot.secrets[key], False) for name, key in gateways.shown(config, served)]
        return ResourceSet(self._resource(SECRET, name, tls.secret, name, one, authorities) for name, one, authorities in found)

    def _callers_secrets(self, config: Config, snapshot: MeshSnapshot, scope: _Scope) -> ResourceSet:
        """Certificates and authorities that rules for calls name."""
        if not any(rule.credentials() for rule in config.destination_rules):
            return NO_RESOURCES

        def build() -> ResourceSet:
            found = secrets.of_callers(config, self._uses(config, scope.namespace), scope.means, snapshot.secrets)
            return ResourceSet(self._resource(SECRET, name, tls.secret, name, one, authorities) for name, one, authorities in found)

        return self._once((SECRET, secrets.of_callers, _Same(config), _Same(snapshot.secrets), scope.means), build)

    def _file_secrets(self, config: Config, scope: _Scope, served: tuple[Gateway, ...], workload: Workload | None) -> ResourceSet:
        """What is in files of the proxy's machine: nothing but their names, which are no secret."""
        settings = {use.policy.tls for use in self._uses(config, scope.namespace) if use.policy.tls is not None}
        names = {name for one in settings for name in tls.files_of_settings(one)}
        names.update(gateways.files(one for some in self._servings(config, scope, served).values() for one in some))
        for one in workload.sidecar.ingress.values() if workload is not None and workload.sidecar is not None else ():
            names.update(tls.names_of_files(one.tls) if one.tls is not None else ())
        return ResourceSet(self._resource(SECRET, name, tls.files, name) for name in sorted(names))

    # --- a sidecar

    def _inbound_clusters(self, config: Config, workload: Workload | None) -> ResourceSet:
        if workload is None or workload.sidecar is None:
            return NO_RESOURCES
        made = []
        for target in workload.sidecar.inbound:
            _, port = workloads.served(config, workload, target)
            ingress = workload.sidecar.ingress.get(target)
            host, number = ingress.endpoint if ingress is not None and ingress.endpoint is not None else ("", target)
            arguments = target, (host or workload.address, number), port.protocol.is_http2, workloads.service_of(config, workload, target)
            pool = pool_of(workloads.pool_of(config, workload, target), config.general.clusters)
            made.append(self._resource(CLUSTER, inbound_cluster(target), clusters.inbound, *arguments, pool))
        return ResourceSet(made)

    def _collectors(self, config: Config) -> ResourceSet:
        """Who gets traces and is no service of the mesh."""
        found = {workloads.collector(config, one): one for one in config.telemetry.mesh.providers.values() if not workloads.is_service(config, one)}
        return ResourceSet(
            self._resource(CLUSTER, name, clusters.collector, name, one.host, one.port, bool(one.http_path)) for name, one in sorted(found.items())
        )

    def _listeners(
        self,
        whole: Config,
        config: Config,
        scope: _Scope,
        workload: Workload | None,
        served: tuple[Gateway, ...],
        edge: Guard | None,
        client: Told,
        server: Told,
        exits: tuple[Exit, ...] = (),
    ) -> ResourceSet:
        """`whole` is for what a workload serves itself, whether it sees its own services or not; `config` for what it calls. `edge`: of its gateways."""
        made = self._gateway_listeners(whole, scope, served, edge, client) if edge is not None else []
        if workload is not None and workload.sidecar is not None:
            made += self._inbound_listeners(whole, workload, workload.sidecar, server)
            made += self._outbound_listeners(config, scope, workload, workload.sidecar, client)
        local = "::1" if workload is not None and ":" in workload.address else "127.0.0.1"
        taken = {one.name for one in made}  # the ports of a workload are its own, whatever a Sidecar says
        made += [one for one in self._exit_listeners(scope, exits, local, client) if one.name not in taken]
        return ResourceSet(made)

    def _inbound_listeners(self, config: Config, workload: Workload, sidecar: SidecarPorts, told: Told) -> list[Resource]:
        made = []
        for target, listen in sidecar.inbound.items():
            host, port = workloads.served(config, workload, target)
            guard = workloads.guard(config, workload, target, listen)
            ingress = sidecar.ingress.get(target)
            ends = ingress.tls if ingress is not None else None
            bind = ingress.bind if ingress is not None and ingress.bind else workload.address
            name, usual = listeners.name(bind, listen), config.general.listeners
            if port.protocol.is_http:
                operation = f"{host}:{port.number}/*"
                arguments = (bind, listen, target, operation, port.protocol.is_http2, guard, told, usual, ends)
                made.append(self._resource(LISTENER, name, listeners.inbound_http, *arguments))
            else:
                made.append(self._resource(LISTENER, name, listeners.inbound_tcp, bind, listen, target, guard, told, usual, ends))
        return made

    def _outbound_listeners(self, config: Config, scope: _Scope, workload: Workload, sidecar: SidecarPorts, told: Told) -> list[Resource]:
        made = []
        local = "::1" if ":" in workload.address else "127.0.0.1"
        if sidecar.http_proxy:
            listen = sidecar.http_proxy
            arguments = (local, listen, HTTP_PROXY_ROUTES, told, scope.on_demand, config.general.listeners)
            made.append(self._resource(LISTENER, listeners.name(local, listen), listeners.outbound_http, *arguments))
        if scope.captured:
            made += self._captured_listeners(config, scope, workload, sidecar.capture, told)
        for listen, service, port in workloads.outbound(config, scope.namespace, workload):
            name = listeners.name(local, listen)
            if port.protocol.is_http:
                arguments = local, listen, f"{service.host}:{port.number}", told, False, config.general.listeners
                made.append(self._resource(LISTENER, name, listeners.outbound_http, *arguments))
            else:
                some, rest = self._outbound_tcp(config, scope, service, port.number)
                made.append(self._resource(LISTENER, name, listeners.outbound_tcp, local, listen, service.host, port.number, some, rest, told))
        return made

    # --- what an application opens is redirected to its sidecar

    def _captured_listeners(self, config: Config, scope: _Scope, workload: Workload, port: int, told: Told) -> Iterator[Resource]:
        anywhere = "::" if ":" in workload.address else "0.0.0.0"
        allows = scope.unknown is Unknown.ALLOW_ANY
        yield self._resource(LISTENER, VIRTUAL_OUTBOUND, listeners.virtual_outbound, anywhere, port, allows, told)
        numbers = http_proxy.ports(config, scope.namespace)
        for number in numbers:
            of_http = (listeners.outbound_http, anywhere, number, CAPTURED % number, told, False, config.general.listeners)
            yield self._resource(LISTENER, listeners.name(anywhere, number), listeners.captured, *of_http)
        taken: set[tuple[str, int]] = {(anywhere, number) for number in numbers}
        named: dict[int, list[tuple[Service, Port]]] = {}
        for service, one in ports_of(config, scope.namespace, captured=True):
            if one.protocol.is_http:
                continue
            addresses = [address for address in service.addresses if is_ip(address)]
            if not addresses and one.tls:
                named.setdefault(one.number, []).append((service, one))
            elif not addresses and service.as_meant:  # where it was meant to go, it goes, whoever that is
                addresses = [anywhere]
            for address in addresses:
                if (address, one.number) not in taken:
                    taken.add((address, one.number))
                    some, rest = self._outbound_tcp(config, scope, service, one.number)
                    of_tcp = (listeners.outbound_tcp, address, one.number, service.host, one.number, some, rest, told)
                    yield self._resource(LISTENER, listeners.name(address, one.number), listeners.captured, *of_tcp)
        for number, services in named.items():
            if (anywhere, number) not in taken:
                of_tls = (listeners.outbound_tls, anywhere, number, tuple(self._by_name(config, scope, services)), told, PASSTHROUGH if allows else BLACK_HOLE)
                yield self._resource(LISTENER, listeners.name(anywhere, number), listeners.captured, *of_tls)

    def _captured_routes(self, config: Config, scope: _Scope) -> Iterator[Resource]:
        for number in http_proxy.ports(config, scope.namespace):
            name = CAPTURED % number
            key = (http_proxy.of_port, _Same(config), scope, name)
            yield self._once(key, lambda name=name, number=number: http_proxy.of_port(name, config, scope.caller, scope.unknown, number))  # type: ignore[misc]

    # --- listeners for some of the services, by a Sidecar

    def _exits(self, whole: Config, namespace: str, sidecar: Sidecar, chosen: tuple[DestinationRule, ...]) -> tuple[Exit, ...]:
        return tuple(Exit(one, _Same(self._within(whole, namespace, one.imports, chosen, frozenset()))) for one in sidecar.egress)

    def _exit_listeners(self, scope: _Scope, exits: tuple[Exit, ...], local: str, told: Told) -> Iterator[Resource]:
        for one, config in exits:
            bind = one.bind or local
            name = listeners.name(bind, one.port)
            if one.speaks in (Speaks.HTTP, Speaks.HTTP_PROXY):
                yield self._resource(LISTENER, name, listeners.outbound_http, bind, one.port, one.routes, told, False, config.value.general.listeners)
                continue
            among = one.imports.within(scope.namespace)  # rules may have brought others along
            plain = ((service, port) for service, port in ports_of(config.value, scope.namespace) if not port.protocol.is_http)
            services = [(service, port) for service, port in plain if one.port in (0, port.number) and among.service(service.namespace, service.host)]
            if one.speaks is Speaks.TLS and services:
                found = tuple(self._by_name(config.value, scope, services))
                yield self._resource(LISTENER, name, listeners.outbound_tls, bind, one.port, found, told)
            elif services:  # as in Istio, of several the first: nothing tells their connections apart
                service, port = services[0]
                some, rest = self._outbound_tcp(config.value, scope, service, port.number)
                yield self._resource(LISTENER, name, listeners.outbound_tcp, bind, one.port, service.host, port.number, some, rest, told)

    def _by_name(self, config: Config, scope: _Scope, services: list[tuple[Service, Port]]) -> Iterator[ByName]:
        taken: set[tuple[str, str]] = set()
        for service, port in services:
            some, rest = self._outbound_tcp(config, scope, service, port.number)
            whole = (*some, *([Some(rest, (service.host,))] if rest.clusters else ()))
            left = [
                Some(one.way, route.sni_hosts, route.subnets)
                for one in whole
                for route in routes.untaken(TlsRoute((), one.names or (service.host,), subnets=one.subnets), taken)
            ]
            if left:
                yield ByName(service.host, port.number, tuple(left))

    def _exit_routes(self, scope: _Scope, exits: tuple[Exit, ...]) -> ResourceSet:
        if not exits:
            return NO_RESOURCES

        def build() -> ResourceSet:
            made: dict[str, Resource] = {}
            for one, config in exits:
                port = one.port if one.speaks is Speaks.HTTP else 0
                if one.speaks in (Speaks.HTTP, Speaks.HTTP_PROXY) and one.routes not in made:  # as in Istio, whatever the address
                    made[one.routes] = http_proxy.of_port(one.routes, config.value, scope.caller, scope.unknown, port, one.imports)
            return ResourceSet(made.values())

        return self._once((ROUTES, Exit, exits, scope), build)

    def _outbound_tcp(self, config: Config, scope: _Scope, service: Service, port: int) -> tuple[tuple[Some, ...], Way]:
        """Where some connections go, and where the others go: to the service itself, if there are no rules."""
        rules = config.routes_for(service.host, port, scope.namespace)
        targets = dict(targets_of(config, scope.namespace, service.host, routes.mentioned(rules)))
        by_name = tuple(Some(routes.way(one, port, targets), one.sni_hosts, one.subnets) for one in routes.tls_routes(rules, port, scope.caller))
        plain = routes.tcp_routes(rules, port, scope.caller)
        if any("*" in one.names and not one.subnets for one in by_name):
            return by_name, NO_WAY
        some = (*by_name, *(Some(routes.way(one, port, targets), (), one.subnets) for one in plain if one.subnets))
        for route in plain:
            if not route.subnets:
                return some, routes.way(route, port, targets)
        return some, NO_WAY if by_name else routes.straight(service, port, targets)

    def _routes(self, config: Config, scope: _Scope, workload: Workload | None, served: tuple[Gateway, ...]) -> ResourceSet:
        made = {one.name: one for one in self._gateway_routes(config, scope, served)}
        if workload is None or workload.sidecar is None:
            return ResourceSet(made.values())
        for _, service, port in workloads.outbound(config, scope.namespace, workload):
            name = f"{service.host}:{port.number}"
            if port.protocol.is_http and name not in made:
                made[name] = self._service_routes(config, scope, name, service, port)
        if scope.captured:
            made.update((one.name, one) for one in self._captured_routes(config, scope))
        if workload.sidecar.http_proxy and scope.on_demand:
            made[HTTP_PROXY_ROUTES] = self._resource(ROUTES, HTTP_PROXY_ROUTES, http_proxy.on_demand)
        elif workload.sidecar.http_proxy:
            made[HTTP_PROXY_ROUTES] = self._once((HTTP_PROXY_ROUTES, _Same(config), scope), lambda: http_proxy.whole(config, scope.caller, scope.unknown))
        return ResourceSet(made.values())
