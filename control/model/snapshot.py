"""All that is known at one time, immutable: what `translate` works from."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from control.model.backend_tls import BackendTls, with_backend_tls
from control.model.delegation import in_effect
from control.model.envoy_filter import EnvoyFilter
from control.model.gateway import Gateway, with_references
from control.model.health import Probe
from control.model.labels import HOSTNAME, Namespace, labels_of
from control.model.listener_set import ListenerSet, attached
from control.model.mesh import MeshDefaults
from control.model.registration import Registration, WorkloadGroup, why_not, workload_of
from control.model.routing import RouteRules
from control.model.secret import CA_SUFFIX, CaBundle, Credential, ReferenceGrant, Secret
from control.model.security import (
    DEFAULT_TRUST_DOMAIN,
    ROOT_NAMESPACE,
    AuthorizationPolicy,
    KeySource,
    Mtls,
    PeerAuthentication,
    RequestAuthentication,
    mtls_mode,
    spiffe_id,
    under_all_names,
)
from control.model.service import EXPECTED, NOWHERE, Endpoint, EndpointSlice, Locality, NodePlace, Port, Resolution, Service, SliceAddress, Workload
from control.model.sidecar import Imports, Sidecar, sidecar_for, with_ingress
from control.model.telemetry import NO_MESH_CONFIG, MeshConfig, Telemetry, TelemetryConfig, endpoint_name
from control.model.traffic import DestinationRule
from control.names import CLUSTER_DOMAIN, MESH, host_matches, service_host


class _Exported(Protocol):
    @property
    def namespace(self) -> str: ...
    @property
    def export_to(self) -> tuple[str, ...]: ...


def visible(thing: _Exported, namespace: str) -> bool:
    """Whether proxies of a namespace see a service or a policy: `*` is all of them, as nothing is, `.` its own namespace."""
    return any(where in ("*", namespace) or (where == "." and thing.namespace == namespace) for where in thing.export_to or ("*",))


Labels = tuple[tuple[str, str], ...]
Endpoints = Mapping[tuple[str, int], tuple[Endpoint, ...]]
_T = TypeVar("_T")
_P = TypeVar("_P", RouteRules, DestinationRule)


@dataclass(frozen=True, slots=True)
class Security:
    """`identities`: by key of a service, the SPIFFE IDs that the workloads behind it may have, those that have one. `aliases`: other names of the trust domain,
    which peers may have, too."""

    trust_domain: str
    peer_authentication: tuple[PeerAuthentication, ...]
    authorization: tuple[AuthorizationPolicy, ...]
    identities: Mapping[str, tuple[str, ...]]
    request_authentication: tuple[RequestAuthentication, ...] = ()
    root: str = ROOT_NAMESPACE  # the namespace whose policies are for all
    aliases: tuple[str, ...] = ()
    fetched: Mapping[KeySource, str] = field(default_factory=dict)  # keys of issuers of tokens

    @property
    def trust_domains(self) -> tuple[str, ...]:
        """All names of the trust domain, its own first."""
        return self.trust_domain, *self.aliases


Key = tuple[str, str]  # namespace and name


@dataclass(frozen=True, slots=True)
class References:
    """What documents refer to by name. `credentials` say what Secrets are good for, and not what is in them, so that a new certificate changes nothing here."""

    credentials: Mapping[Key, Credential]
    grants: tuple[ReferenceGrant, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Config:
    """All but where things run. The same object again as long as no document of it changes, so that what is made of it can be kept.

    `general`: what holds where nothing else says it. `others`: of hosts that several services have, those besides the one in `services`, in their order.
    `resolved`: by key of a service and port, what proxies ask DNS for. `source_labels`: the labels of callers that any rule asks for.
    """

    services: Mapping[str, Service]
    others: Mapping[str, tuple[Service, ...]]
    route_rules: tuple[RouteRules, ...]
    destination_rules: tuple[DestinationRule, ...]
    gateways: tuple[Gateway, ...]
    sidecars: tuple[Sidecar, ...]
    security: Security
    telemetry: TelemetryConfig
    references: References
    resolved: Endpoints
    source_labels: frozenset[str]
    general: MeshDefaults
    _rules: _ByHost[DestinationRule]
    _routes: _ByHost[RouteRules]

    def rule_for(self, host: str, namespace: str) -> DestinationRule | None:
        """The DestinationRule for callers in `namespace`: theirs, else the service's own, else the mesh's, and of those the one that names the host most
        exactly. Others have no say about a service that is not theirs."""
        service = self.services.get(host)
        homes = [namespace, *([service.namespace] if service is not None else []), self.general.root]
        found = [(one, rank) for one, rank in self._rules.matching(host) if one.namespace in homes and visible(one, namespace)]
        best = min(found, key=lambda pair: (homes.index(pair[0].namespace), pair[1]), default=None)
        return best[0] if best is not None else None

    def routes_for(self, host: str, port: int, namespace: str) -> tuple[RouteRules, ...]:
        """The rules for requests of sidecars to a port of `host`: of those that name it most exactly, the first one, as in Istio.

        Rules of the Gateway API add up. Those of the callers' own namespace go before those of the service's.
        """
        found = [(one, rank) for one, rank in self._routes.matching(host) if is_for(one, MESH) and visible(one, namespace)]
        found = [(one, rank) for one, rank in found if not one.ports or port in one.ports]
        if not found:
            return ()
        best = min(rank for _, rank in found)
        chosen = [one for one, rank in found if rank == best]
        if not chosen[0].gateway_api:
            return (chosen[0],)
        together = [one for one in chosen if one.gateway_api]
        return tuple([one for one in together if one.export_to == (namespace,)] or together)

    def sidecar_for(self, namespace: str, labels: Mapping[str, str]) -> Sidecar | None:
        """Which Sidecar holds for a proxy."""
        return sidecar_for(self.sidecars, namespace, labels, self.general.root)

    def seen_from(self, namespace: str) -> Config:
        """The same, where a host that several services have is that of the namespace's own, or else of the first one that it sees."""
        chosen = {}
        for host, more in self.others.items():
            seen = [one for one in (self.services[host], *more) if visible(one, namespace)]
            best = min(seen, key=lambda one: one.namespace != namespace, default=self.services[host])
            if best is not self.services[host]:
                chosen[host] = best
        if not chosen:
            return self
        services = {**self.services, **chosen}
        rest = {host: tuple(one for one in (self.services[host], *more) if one is not services[host]) for host, more in self.others.items()}
        return replace(self, services=services, others=rest)

    def selecting(self, namespace: str, labels: Mapping[str, str]) -> tuple[DestinationRule, ...]:
        """The DestinationRules that are for this workload and not for all."""
        return tuple(
            one for one in self.destination_rules if one.selector is not None and one.namespace == namespace and one.selector.items() <= labels.items()
        )

    def ruled_by(self, chosen: tuple[DestinationRule, ...]) -> Config:
        """The same with these rules ahead of those that are for all."""
        rules = (*chosen, *(one for one in self.destination_rules if one.selector is None))
        return replace(self, destination_rules=rules, _rules=_ByHost((rule.host, rule) for rule in rules))

    def within(self, namespace: str, imports: Imports, needed: frozenset[str] = frozenset()) -> Config:
        """What of this sidecars of a namespace see that import so much: no more than is exported to them.

        Where rules that they import send requests comes along, as in Istio, and the hosts that are `needed` for other things. What a workload says of itself
        (access, gateways) is not part of it.
        """
        imports = imports.within(namespace)
        rules = tuple(one for one in self.route_rules if is_for(one, MESH) and visible(one, namespace) and imports.rules(one.namespace, one.hosts))
        wanted = needed.union(*(one.destinations() for one in rules))
        services = {host: chosen for host in self.services if (chosen := self._imported(host, namespace, imports, host in wanted)) is not None}
        return self._narrowed(namespace, services, rules)

    def only(self, namespace: str, hosts: frozenset[str]) -> Config:
        """What of this sidecars of a namespace need who call these hosts: with where rules for them send requests."""
        found = {id(one) for host in hosts for one, _ in self._routes.matching(host) if is_for(one, MESH) and visible(one, namespace)}
        rules = tuple(one for one in self.route_rules if id(one) in found) if found else ()
        wanted = hosts.union(*(one.destinations() for one in rules))
        services = {host: self.services[host] for host in sorted(wanted) if host in self.services and visible(self.services[host], namespace)}
        return self._narrowed(namespace, services, rules)

    def _narrowed(self, namespace: str, services: dict[str, Service], rules: tuple[RouteRules, ...]) -> Config:
        """The same with these services and rules alone, and what is said of them."""
        policies = tuple(
            one
            for one in self.destination_rules
            if visible(one, namespace) and (one.host in services or (one.host.startswith("*") and any(host_matches(one.host, host) for host in services)))
        )
        keys = {one.key for one in services.values()}
        identities = {key: self.security.identities[key] for key in sorted(keys) if key in self.security.identities}
        resolved = {key: found for key, found in self.resolved.items() if key[0] in keys}
        security = Security(self.security.trust_domain, (), (), identities, (), self.general.root, self.security.aliases)
        named = {(namespace, name + suffix) for rule in policies for name in rule.credentials() for suffix in ("", CA_SUFFIX)}
        references = References({key: found for key, found in self.references.credentials.items() if key in named}, ())
        return _config(services, {}, rules, policies, (), (), security, TelemetryConfig(), references, resolved, self.general)

    def _imported(self, host: str, namespace: str, imports: Imports, wanted: bool) -> Service | None:
        """The service that a host is: one that is imported, or else, if it is `wanted`, any that is seen."""
        seen = [one for one in (self.services[host], *self.others.get(host, ())) if visible(one, namespace)]
        imported = next((one for one in seen if imports.service(one.namespace, host)), None)
        return imported or (seen[0] if wanted and seen else None)


def same_config(one: Config, other: Config) -> bool:
    """Whether two say the same, of the same objects."""
    return (
        one.route_rules == other.route_rules
        and one.destination_rules == other.destination_rules
        and one.services == other.services
        and one.others == other.others
        and one.gateways == other.gateways
        and one.sidecars == other.sidecars
        and one.security == other.security
        and one.telemetry == other.telemetry
        and one.references == other.references
        and one.resolved == other.resolved
        and one.general == other.general
    )


def is_for(rules: RouteRules, gateway: str) -> bool:
    """Whether anything of these rules concerns a gateway, or sidecars (MESH)."""
    own = [match.gateways for rule in rules.http for match in rule.matches] + [one.gateways for one in rules.tcp] + [one.gateways for one in rules.tls]
    return gateway in rules.gateways or any(gateway in some for some in own)


class _ByHost(Generic[_P]):
    """Objects by the hosts, or patterns of hosts, that they name."""

    __slots__ = ("_exact", "_patterns")

    def __init__(self, named: Iterable[tuple[str, _P]]) -> None:
        self._exact: dict[str, list[_P]] = defaultdict(list)
        self._patterns: list[tuple[str, _P]] = []
        for host, one in named:
            if host.startswith("*"):
                self._patterns.append((host, one))
            else:
                self._exact[host].append(one)

    def matching(self, host: str) -> list[tuple[_P, int]]:
        """(object, how inexactly it names the host), in their order; exact names have the lowest number."""
        found = [(one, -1000) for one in self._exact.get(host, ())]
        return found + [(one, -len(pattern)) for pattern, one in self._patterns if host_matches(pattern, host) or pattern == host]


@dataclass(frozen=True, slots=True, eq=False)
class MeshSnapshot:
    """Everything at one time. `endpoints`: by key and port number of a service. `envoy_filters`: in the order in which they are applied. `unregistered`: of
    proxies that would be workloads of a group, those that are not, and why."""

    config: Config
    workloads: Mapping[Key, Workload]
    endpoints: Endpoints
    secrets: Mapping[Key, Secret]
    envoy_filters: tuple[EnvoyFilter, ...]
    unregistered: Mapping[Registration, str] = field(default_factory=dict)


def build(
    objects: Mapping[Any, Any],
    before: MeshSnapshot | None = None,
    trust_domain: str = DEFAULT_TRUST_DOMAIN,
    mesh: MeshConfig = NO_MESH_CONFIG,
    unready: frozenset[Key] = frozenset(),
    registered: Sequence[Registration] = (),
    fetched: Mapping[KeySource, str] | None = None,
    *,
    expects: bool = False,
) -> MeshSnapshot:
    """The snapshot of what documents describe, in the order of namespace and name. Parts that are as they were `before` are the same objects.

    `unready`: the workloads with a probe that are known not to be ready; `registered`: proxies that say which group they belong to, `expects`: others may
    soon; `fetched`: keys of
    issuers of tokens.
    """
    found = _Found(objects[identity] for identity in sorted(objects, key=lambda identity: (identity[2:], identity)))
    configs = found.all(MeshConfig)
    told = TelemetryConfig(configs[0].over(mesh) if configs else mesh, tuple(found.all(Telemetry)))
    general = told.mesh.general
    services: dict[str, Service] = {}
    others: dict[str, list[Service]] = defaultdict(list)
    for one in _exported(found.all(Service), general.exported_services):
        first = services.setdefault(one.host, one)
        if _is_at_home(one) and not _is_at_home(first):  # a ServiceEntry of any other namespace may name the host of a Kubernetes Service
            services[one.host], one = one, first
        if all(one.namespace != known.namespace for known in (services[one.host], *others[one.host])):
            others[one.host].append(_further(one))
    places = {one.name: one.locality for one in found.all(NodePlace) if one.locality != NOWHERE}
    workloads = {(one.namespace, one.name): _placed(one, places[one.node]) if one.node in places else one for one in found.all(Workload)}
    groups = {(one.namespace, one.name): one for one in found.all(WorkloadGroup)}
    if probes := {key: one.probe for key, one in groups.items() if one.probe is not None}:
        workloads = {key: _probed(one, probes[key[0], one.group]) if (key[0], one.group) in probes else one for key, one in workloads.items()}
    unregistered = {one: why for one in registered if (why := why_not(one, groups, workloads))}
    workloads.update(((one.namespace, one.name), workload_of(one, groups[one.namespace, one.group])) for one in registered if one not in unregistered)
    slices: dict[str, list[EndpointSlice]] = defaultdict(list)
    for one_slice in found.all(EndpointSlice):
        slices[service_host(one_slice.service, one_slice.namespace)].append(one_slice)
    secrets = {(one.namespace, one.name): one for one in found.all(Secret)}
    bundles = {(one.namespace, one.name): one for one in found.all(CaBundle)}
    namespaces = {one.name: one.labels for one in found.all(Namespace)}
    rules = sorted(_exported(found.all(RouteRules), general.exported_routes), key=lambda one: one.created)
    sets = sorted(found.all(ListenerSet), key=lambda one: one.created)
    for namespace in (*(one.namespace for one in rules), *(one.namespace for one in sets)):
        namespaces.setdefault(namespace, labels_of(namespace))
    backend_tls = sorted(found.all(BackendTls), key=lambda one: one.created)
    sidecars, grants, peers = found.all(Sidecar), found.all(ReferenceGrant), found.all(PeerAuthentication)
    if backend_tls:
        services = with_backend_tls(services, backend_tls, bundles)
    references = References({key: Credential(bool(one.chain), bool(one.ca)) for key, one in secrets.items()}, tuple(grants))
    if sidecars:
        workloads = {key: with_ingress(one, sidecars, general.root) for key, one in workloads.items()}
    in_order = tuple(sorted(found.all(EnvoyFilter), key=lambda one: one.order(general.root)))
    finder = _Finder(workloads, tuple(peers), unready, general.root)
    by_key = {one.key: one for one in (*services.values(), *(one for more in others.values() for one in more))}
    endpoints = _endpoints(by_key, finder, slices, before.endpoints if before is not None else {})
    if expects:
        endpoints = {key: found or _expected(by_key[key[0]], groups.values()) for key, found in endpoints.items()}
    resolved = {key: known for key, known in endpoints.items() if by_key[key[0]].resolution is not Resolution.ENDPOINTS}
    aliases, closing = told.mesh.aliases, bool(told.mesh.stands_in)
    names = tuple(dict.fromkeys((trust_domain, *(() if closing else aliases))))
    identities = {key: who for key, service in by_key.items() if (who := finder.identities(service, names))}
    access, tokens = tuple(found.all(AuthorizationPolicy)), tuple(found.all(RequestAuthentication))
    if aliases or trust_domain != DEFAULT_TRUST_DOMAIN:
        access = tuple(under_all_names(one, trust_domain, () if closing else aliases) for one in access)
    if aliases and closing:
        access = tuple(under_all_names(one, trust_domain, aliases, closing=True) for one in access)
    security = Security(trust_domain, tuple(peers), access, identities, tokens, general.root, names[1:], fetched or {})
    more = {host: tuple(some) for host, some in others.items() if some}
    edges = with_references(attached(found.all(Gateway), sets, namespaces), namespaces, bundles, tuple(grants))
    policies = tuple(_exported(found.all(DestinationRule), general.exported_policies))
    config = _config(services, more, in_effect(rules, grants), policies, edges, tuple(sidecars), security, told, references, resolved, general)
    if before is not None:
        if same_config(config, before.config):
            config = before.config
        if len(endpoints) == len(before.endpoints) and all(before.endpoints.get(key) is known for key, known in endpoints.items()):
            endpoints = before.endpoints
        if secrets == before.secrets:
            return MeshSnapshot(config, workloads, endpoints, before.secrets, in_order, unregistered)
    return MeshSnapshot(config, workloads, endpoints, secrets, in_order, unregistered)


@functools.lru_cache(100_000)
def _placed(workload: Workload, place: Locality) -> Workload:
    """A workload that is where its machine is, if it does not say itself where."""
    return workload if workload.locality != NOWHERE else replace(workload, locality=place)


@functools.lru_cache(100_000)
def _probed(workload: Workload, probe: Probe) -> Workload:
    """A workload that is asked as its group is, if it does not say itself how."""
    return workload if workload.readiness is not None else replace(workload, readiness=probe)


def with_unready(snapshot: MeshSnapshot, unready: frozenset[Key], changed: Iterable[Key]) -> MeshSnapshot:
    """The same snapshot, with the workloads that are known not to be ready; `changed`: those of which something else is known than before."""
    endpoints = dict(snapshot.endpoints)
    config = snapshot.config
    services = [*config.services.values(), *(one for more in config.others.values() for one in more)]
    for key in changed:
        workload = snapshot.workloads.get(key)
        if workload is None or workload.readiness is None:
            continue
        healthy = workload.healthy and key not in unready
        for service in services:
            if service.selector and service.namespace == key[0] and service.selector.items() <= workload.labels.items():
                for port in service.ports:
                    behind = endpoints[service.key, port.number]
                    if any(one.probed == key and one.healthy is not healthy for one in behind):
                        endpoints[service.key, port.number] = tuple(replace(one, healthy=healthy) if one.probed == key else one for one in behind)
    return replace(snapshot, endpoints=endpoints)


_E = TypeVar("_E", Service, RouteRules, DestinationRule)


def _exported(found: list[_E], where: tuple[str, ...]) -> list[_E]:
    """Objects that are seen `where` if they do not say it themselves; the same ones again for the same ones."""
    return [one if one.export_to else _exported_to(one, where) for one in found] if where else found


@functools.lru_cache(100_000)
def _exported_to(one: Any, where: tuple[str, ...]) -> Any:
    return replace(one, export_to=where)


def _is_at_home(service: Service) -> bool:
    """Whether its host is that of a Kubernetes Service of its own namespace."""
    return service.host.endswith(f".{service.namespace}.svc.{CLUSTER_DOMAIN}")


@functools.lru_cache(10_000)
def _further(service: Service) -> Service:
    return replace(service, further=True)


def _config(
    services: dict[str, Service],
    others: Mapping[str, tuple[Service, ...]],
    rules: tuple[RouteRules, ...],
    destination_rules: tuple[DestinationRule, ...],
    gateways: tuple[Gateway, ...],
    sidecars: tuple[Sidecar, ...],
    security: Security,
    telemetry: TelemetryConfig,
    references: References,
    resolved: Endpoints,
    general: MeshDefaults,
) -> Config:
    labels = {label for one in rules for route in one.http for match in route.matches for label in match.source_labels}
    labels |= {label for one in rules for route in one.tcp for label in route.source_labels}
    labels |= {label for one in rules for route in one.tls for label in route.source_labels}
    return Config(
        services,
        others,
        rules,
        destination_rules,
        gateways,
        sidecars,
        security,
        telemetry,
        references,
        resolved,
        frozenset(labels),
        general,
        _ByHost((rule.host, rule) for rule in destination_rules),
        _ByHost((host, one) for one in rules for host in one.hosts),
    )


def _endpoints(services: Mapping[str, Service], finder: _Finder, slices: Mapping[str, list[EndpointSlice]], old: Endpoints) -> Endpoints:
    made: dict[tuple[str, int], tuple[Endpoint, ...]] = {}
    for known_by, service in services.items():
        behind = finder.behind(service)
        for port in service.ports:
            key = known_by, port.number
            found = tuple(finder.endpoints(service, port, behind, slices.get(known_by, ())))
            known = old.get(key)
            made[key] = known if known is not None and known == found else found
    return made


def _expected(service: Service, groups: Iterable[WorkloadGroup]) -> tuple[Endpoint, ...]:
    """What is known of the endpoints of a service that has none: that workloads of a group may still come."""
    if not service.selector:
        return ()
    may = any(service.namespace == one.namespace and service.selector.items() <= one.labels.items() for one in groups)
    return (EXPECTED,) if may else ()


class _Found:
    """Objects by their class, in their order."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._by_class: dict[type, list[Any]] = defaultdict(list)
        for value in values:
            for one in value if isinstance(value, tuple) else (value,):
                self._by_class[type(one)].append(one)

    def all(self, kind: type[_T]) -> list[_T]:
        return self._by_class.get(kind, [])


class _Finder:
    """Which workloads stand behind a service."""

    def __init__(self, workloads: Mapping[tuple[str, str], Workload], peers: tuple[PeerAuthentication, ...], unready: frozenset[Key], root: str) -> None:
        self._workloads = workloads
        self._root = root
        self._peers = peers
        self._unready = unready
        self._by_label: dict[tuple[str, str, str], list[Workload]] = defaultdict(list)
        for workload in workloads.values():
            for key, value in workload.labels.items():
                self._by_label[workload.namespace, key, value].append(workload)

    def behind(self, service: Service) -> list[Workload]:
        """Those that its selector chooses."""
        selector = service.selector
        if not selector:
            return []
        candidates = min((self._by_label.get((service.namespace, key, value), []) for key, value in selector.items()), key=len)
        return [workload for workload in candidates if selector.items() <= workload.labels.items()]

    def identities(self, service: Service, trust_domains: Sequence[str]) -> tuple[str, ...]:
        """Who may answer for a service."""
        found = [one for one in self.behind(service) if one.sidecar is not None and one.sidecar.identity]
        return tuple(sorted({spiffe_id(name, one.namespace, one.service_account) for one in found for name in trust_domains}))

    def takes_mtls(self, workload: Workload, port: int) -> bool:
        """Whether a port of a workload takes mutual TLS: its sidecar listens for it, and no policy says otherwise."""
        sidecar = workload.sidecar
        if sidecar is None or not sidecar.identity or port not in sidecar.inbound:
            return False
        return mtls_mode(self._peers, workload.namespace, workload.labels, port, self._root) is not Mtls.DISABLE

    def endpoints(self, service: Service, port: Port, behind: list[Workload], slices: Sequence[EndpointSlice]) -> Iterable[Endpoint]:
        """All endpoints of one port: those that the service itself names, those in slices, or else those of the workloads behind it."""
        for workload in service.static:
            yield _endpoint(workload, workload.port_for(port), "", workload.healthy, None, mtls=False)
        if service.resolution is not Resolution.ENDPOINTS and not service.static and not service.selector:
            yield Endpoint(service.host, port.target if isinstance(port.target, int) else port.number)
        there: dict[tuple[str, int], Endpoint] = {}
        for one in slices:
            number = one.ports.get(port.name)
            if number and len(slices) == 1:
                yield from [self._of_slice(one, address, number) for address in one.addresses]
            elif number:
                for address in one.addresses:
                    known = there.get((address.address, number))  # while endpoints move between slices, one may be in two
                    if known is None or (address.healthy and not known.healthy):
                        there[address.address, number] = self._of_slice(one, address, number)
        yield from there.values()
        if not slices:
            for workload in behind:
                number = workload.port_for(port)
                if number:
                    name = endpoint_name(workload.name, workload.namespace, workload.labels)
                    key = (workload.namespace, workload.name)
                    probed = key if workload.readiness is not None and _minds(service) else None
                    healthy = workload.healthy and not (probed and probed in self._unready)
                    yield _endpoint(workload, workload.reached_at(number), name, healthy, probed, mtls=self.takes_mtls(workload, number))

    def _of_slice(self, one: EndpointSlice, address: SliceAddress, number: int) -> Endpoint:
        healthy, draining = address.healthy, address.draining
        workload = self._workloads.get((one.namespace, address.pod)) if address.pod else None
        if workload is None:
            name = endpoint_name(address.pod, one.namespace, {}) if address.pod else ""
            return Endpoint(address.address, number, (), 1, Locality("", address.zone) if address.zone else NOWHERE, healthy, name, False, draining)
        place = workload.locality if address.zone in ("", workload.locality.zone) else Locality("", address.zone)
        name, mtls = endpoint_name(address.pod, one.namespace, workload.labels), self.takes_mtls(workload, number)
        return Endpoint(address.address, workload.reached_at(number), _labels(workload), 1, place, healthy, name, mtls, draining)


def _minds(service: Service) -> bool:
    """Whether the endpoints of a service are only those that are ready."""
    return service.resolution is Resolution.ENDPOINTS and not service.publishes_unready


def _endpoint(workload: Workload, port: int, name: str, healthy: bool, probed: Key | None, *, mtls: bool) -> Endpoint:
    return Endpoint(workload.address, port, _labels(workload), workload.weight, workload.locality, healthy, name, mtls, probed=probed)


@functools.lru_cache(100_000)
def _labels(workload: Workload) -> Labels:
    labels = workload.labels if not workload.node else {HOSTNAME: workload.node, **workload.labels}
    return tuple(sorted(labels.items()))
