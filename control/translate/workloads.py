"""What holds for one workload: the services that it serves, whom it lets in, what it calls, and what it traces."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

from control.model.gateway import Gateway
from control.model.labels import HOSTNAME
from control.model.protocols import protocol_of_port
from control.model.security import AccessRule, AuthorizationPolicy, Condition, jwt_rules, mtls_mode
from control.model.service import Port, Service, Workload
from control.model.snapshot import Config, visible
from control.model.telemetry import Provider, local_metadata
from control.model.traffic import ConnectionPool
from control.names import outbound_cluster
from control.translate import custom, listeners, tokens
from control.translate.listeners import Guard
from control.translate.proxy import ProxyKey
from control.translate.telling import Told, Traces

TRACING = "tracing"  # in names of clusters of collectors
_PORT = "destination.port"  # a condition's key
_NO_PORT = "0"


def told(config: Config, proxy: ProxyKey, labels: Mapping[str, str], serves: Iterable[Gateway], *, client: bool) -> Told:
    """What a side of a proxy that `serves` some gateways tells."""
    keys = frozenset(one.key for one in serves)
    telemetry = config.telemetry
    metrics = telemetry.metrics(proxy.namespace, labels, keys, client=client) if proxy.counts else None
    local = local_metadata(proxy.name, proxy.namespace, labels) if metrics is not None else ()
    return Told(_traces(config, proxy, labels, keys, client=client), metrics, telemetry.logs(proxy.namespace, labels, keys, client=client), local)


def _traces(config: Config, proxy: ProxyKey, labels: Mapping[str, str], serves: frozenset[str], *, client: bool) -> Traces:
    """What a side of a proxy traces, and who gets it."""
    settings = config.telemetry.tracing(proxy.name, proxy.namespace, labels, config.security.trust_domain, serves, client=client)
    if settings is None:
        return None
    service = config.services.get(settings.provider.host)
    if service is not None and not visible(service, proxy.namespace):
        return None  # without its cluster, Envoy would refuse the listener
    return settings, collector(config, settings.provider)


def placed(labels: Mapping[str, str], workload: Workload | None) -> Mapping[str, str]:
    """The labels of a proxy, with that of its machine."""
    return {HOSTNAME: workload.node, **labels} if workload is not None and workload.node else labels


def needed(config: Config, namespace: str, workload: Workload | None) -> frozenset[str]:
    """The hosts that a proxy calls for itself, whatever its application does: for traces, and for the keys of tokens."""
    found = {one.host for one in config.telemetry.mesh.providers.values()}
    if workload is not None:
        for rule in jwt_rules(config.security.request_authentication, namespace, workload.labels, (), config.general.root):
            found.update(tokens.hosts(rule))
        policies = (one for one in config.security.authorization if one.is_for(namespace, workload.labels, (), config.general.root))
        found.update(one.host for one, _ in _authorizers(config, namespace, policies))
    return frozenset(one for one in found if one in config.services)


def _authorizers(config: Config, namespace: str, policies: Iterable[AuthorizationPolicy]) -> custom.Authorizers:
    """Whom policies leave decisions to and a proxy in a namespace can reach."""
    known = config.telemetry.mesh.authorizers
    named = {one.provider for one in policies if one.action == "CUSTOM"}
    found = [known[name] for name in sorted(named) if name in known]
    return tuple((one, outbound_cluster(one.host, one.port)) for one in found if _reaches(config, namespace, one.host, one.port))


def _reaches(config: Config, namespace: str, host: str, port: int) -> bool:
    service = config.services.get(host)
    return service is not None and visible(service, namespace) and service.port(port) is not None


def is_service(config: Config, provider: Provider) -> bool:
    """Whether a provider is a service of the mesh."""
    service = config.services.get(provider.host)
    return service is not None and any(port.number == provider.port for port in service.ports)


def collector(config: Config, provider: Provider) -> str:
    """The cluster of a provider."""
    return outbound_cluster(provider.host, provider.port) if is_service(config, provider) else f"{TRACING}|{provider.port}||{provider.host}"


def served(config: Config, workload: Workload, target: int) -> tuple[str, Port]:
    """Which service a port of a workload belongs to: its host (or the workload's name) and port. Of the protocol a Sidecar's ingress knows best."""
    host, port = _service_of(config, workload, target)
    ingress = workload.sidecar.ingress.get(target) if workload.sidecar is not None else None
    return host, port if ingress is None else dataclasses.replace(port, protocol=ingress.protocol)


def first_service(config: Config, workload: Workload) -> Service | None:
    """A service that a workload is behind."""
    services = (one for one in config.services.values() if one.selector and one.namespace == workload.namespace)
    return next((one for one in services if one.selector and one.selector.items() <= workload.labels.items()), None)


def service_of(config: Config, workload: Workload, target: int) -> Service | None:
    """The service that a port of a workload belongs to."""
    return next((service for service, _ in _services(config, workload, target)), None)


def pool_of(config: Config, workload: Workload, target: int) -> ConnectionPool | None:
    """Of connections to a port of the application: as a Sidecar says it, else as the rule for callers of its service does, as in Istio."""
    sidecar = workload.sidecar
    assert sidecar is not None
    ingress = sidecar.ingress.get(target)
    own = (ingress.pool if ingress is not None else None) or sidecar.pool
    if own is not None:
        return own
    for service, port in _services(config, workload, target):
        rule = config.rule_for(service.host, workload.namespace)
        return rule.policy.for_port(port.number).connection_pool if rule is not None and rule.policy is not None else None
    return None


def _services(config: Config, workload: Workload, target: int) -> Iterator[tuple[Service, Port]]:
    for service in config.services.values():
        if service.selector and service.namespace == workload.namespace and service.selector.items() <= workload.labels.items():
            for port in service.ports:
                if workload.port_for(port) == target:
                    yield service, port


def _service_of(config: Config, workload: Workload, target: int) -> tuple[str, Port]:
    for service, port in _services(config, workload, target):
        return service.host, port
    name = next((name for name, number in workload.ports.items() if number == target), "")
    return f"{workload.name}.{workload.namespace}", Port(target, name, protocol_of_port(name))


def guard(config: Config, workload: Workload, port: int, listen: int = 0) -> Guard:
    """Who may reach a port of a workload. Without an identity of its own a sidecar cannot know who calls: then policies that ask for one let nobody in.

    `listen`: where its sidecar has that port, if that is elsewhere; policies mean the port of the application.
    """
    security = config.security
    policies = tuple(one for one in security.authorization if one.is_for(workload.namespace, workload.labels, (), security.root))
    if listen not in (0, port) and any(map(_has_ports, policies)):
        meant = _meant(config, workload)
        elsewhere = frozenset(number for target, numbers in meant.items() if target != port for number in numbers)
        policies = tuple(_listening(one, str(listen), frozenset(meant[port]), elsewhere) for one in policies)
    identity = workload.sidecar is not None and workload.sidecar.identity
    mode = mtls_mode(security.peer_authentication, workload.namespace, workload.labels, port, security.root) if identity else None
    rules = jwt_rules(security.request_authentication, workload.namespace, workload.labels, (), security.root)
    authorizers = _authorizers(config, workload.namespace, policies)
    keyed = tokens.with_clusters(rules, config.services, security.fetched)
    return Guard(mode, security.trust_domains, policies, keyed, authorizers)


def _meant(config: Config, workload: Workload) -> dict[int, set[str]]:
    """Its ports, and the numbers by which documents call each: its own and, where that was chosen for it, that of a service that names no other."""
    found = {port: {str(port)} for port in (*workload.ports.values(), *(workload.sidecar.inbound if workload.sidecar is not None else ()))}
    for service in config.services.values():
        if service.selector and service.namespace == workload.namespace and service.selector.items() <= workload.labels.items():
            for port in service.ports:
                if not port.target and workload.port_for(port) in found:
                    found[workload.port_for(port)].add(str(port.number))
    return found


def _has_ports(policy: AuthorizationPolicy) -> bool:
    return any(
        any(one.ports or one.not_ports for one in rule.operations) or any(one.key == _PORT for one in rule.conditions)
        for rule in policy.rules
    )  # fmt: skip


@functools.lru_cache(10_000)
def _listening(policy: AuthorizationPolicy, listen: str, meant: frozenset[str], elsewhere: frozenset[str]) -> AuthorizationPolicy:
    """The policy as a listener sees ports: `meant` are numbers of the one that it has, `elsewhere` those of others."""
    if not _has_ports(policy):
        return policy

    def seen(numbers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(listen if one in meant else _NO_PORT if one in elsewhere else one for one in numbers))

    def of_rule(rule: AccessRule) -> AccessRule:
        operations = tuple(dataclasses.replace(one, ports=seen(one.ports), not_ports=seen(one.not_ports)) for one in rule.operations)
        conditions = tuple(Condition(_PORT, seen(one.values), seen(one.not_values)) if one.key == _PORT else one for one in rule.conditions)
        return dataclasses.replace(rule, operations=operations, conditions=conditions)

    return dataclasses.replace(policy, rules=tuple(map(of_rule, policy.rules)))


def edge_guard(config: Config, namespace: str, labels: Mapping[str, str], served: tuple[Gateway, ...]) -> Guard:
    """Whom the gateways of a proxy let in."""
    security = config.security
    serves = frozenset(one.key for one in served)
    policies = tuple(one for one in security.authorization if one.is_for(namespace, labels, serves, security.root))
    rules = jwt_rules(security.request_authentication, namespace, labels, serves, security.root)
    keyed = tokens.with_clusters(rules, config.services, security.fetched)
    return Guard(None, security.trust_domains, policies, keyed, _authorizers(config, namespace, policies))


def outbound(config: Config, namespace: str, workload: Workload) -> Iterator[tuple[int, Service, Port]]:
    """(port of the sidecar, service, its port); for services that are not there the sidecar does not listen."""
    assert workload.sidecar is not None
    for one in workload.sidecar.outbound:
        service = config.services.get(one.host)
        port = service.port(one.port) if service is not None and visible(service, namespace) else None
        if service is not None and port is not None and one.listen:
            yield one.listen, service, port


def at_their_targets(config: Config, workload: Workload | None, served: tuple[Gateway, ...]) -> tuple[Gateway, ...]:
    """The gateways of a workload. Where a Service in front of it has another target port for one of theirs, they listen on that, as in Istio."""
    if workload is None or not served:
        return served
    found: dict[int, int] = {}
    for service in config.services.values():
        if service.selector and service.namespace == workload.namespace and service.selector.items() <= workload.labels.items():
            for port in service.ports:
                target = workload.port_for(port) if port.target else 0
                if target and target != port.number:
                    found.setdefault(port.number, target)
    return tuple(_targeted(one, tuple(sorted(found.items()))) for one in served)


@functools.lru_cache(10_000)
def _targeted(gateway: Gateway, targets: tuple[tuple[int, int], ...]) -> Gateway:
    known = dict(targets)
    if not any(server.port in known and not server.target for server in gateway.servers):
        return gateway
    return dataclasses.replace(gateway, servers=tuple(dataclasses.replace(one, target=one.target or known.get(one.port, 0)) for one in gateway.servers))


def edges(served: tuple[Gateway, ...]) -> tuple[str, ...]:
    """Names of the listeners of gateways."""
    return tuple(sorted({listeners.name(*server.place) for gateway in served for server in gateway.servers}))


def meant(workload: Workload | None, served: tuple[Gateway, ...]) -> tuple[tuple[int, int], ...]:
    """(port where the proxy listens, port that callers mean by it)."""
    at_the_edge = tuple(sorted({(server.target, server.port) for gateway in served for server in gateway.servers if server.target}))
    if workload is None or workload.sidecar is None:
        return at_the_edge
    sidecar = workload.sidecar
    return (*at_the_edge, *((listen, port) for port, listen in sorted(sidecar.inbound.items())), *((one.listen, one.port) for one in sidecar.outbound))


def asks(workload: Workload) -> bool:
    """Whether its sidecar can ask for what is called when it is called: for what goes through its HTTP proxy, and not for what is redirected to it."""
    return workload.sidecar is not None and bool(workload.sidecar.http_proxy) and not workload.sidecar.capture


def declared(workload: Workload | None) -> frozenset[str]:
    """The services for which it has ports of their own."""
    return frozenset(one.host for one in workload.sidecar.outbound) if workload is not None and workload.sidecar is not None else frozenset()
