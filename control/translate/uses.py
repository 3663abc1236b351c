"""Which clusters callers know: ports of services and of their subsets, each with the policy that holds for it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from control.model.mesh import NO_DEFAULTS, NO_LIMITS, MeshDefaults, TlsLimits, completed
from control.model.service import Port, Service
from control.model.snapshot import Config, visible
from control.model.traffic import MUTUAL, NO_POLICY, DestinationRule, LoadBalancer, LocalitySettings, Subset, TlsSettings, TrafficPolicy
from control.names import outbound_cluster
from control.translate import mtls
from control.translate.flow import STRAIGHT, flow_of
from control.translate.http_route import Target


class Use(NamedTuple):
    """One cluster that callers in a namespace know: a port of a service, or of one of its subsets."""

    service: Service
    port: Port
    subset: Subset | None
    policy: TrafficPolicy
    rule: DestinationRule | None

    @property
    def server_name(self) -> str:
        """What callers in the mesh say in their ClientHello."""
        return mtls.server_name(self.port.number, self.subset.name if self.subset is not None else "", self.service.host)

    @property
    def cluster(self) -> str:
        return outbound_cluster(self.service.host, self.port.number, self.subset.name if self.subset is not None else "")


def uses_of(config: Config, namespace: str) -> Iterator[Use]:
    """Of all services that callers in a namespace see."""
    for host, service in config.services.items():
        if not visible(service, namespace):
            continue
        yield from service_uses(service, config.rule_for(host, namespace), config.general)


def service_uses(service: Service, rule: DestinationRule | None, general: MeshDefaults = NO_DEFAULTS) -> Iterator[Use]:
    """Of one service, with what holds in `general`."""
    base = rule.policy if rule is not None and rule.policy is not None else NO_POLICY
    asked = dict(service.backend_tls)
    for port in service.ports:
        yield Use(service, port, None, _for_service(service, base.for_port(port.number), asked.get(port.number), port, general), rule)
        for subset in rule.subsets if rule is not None else ():
            policy = _merged(subset.policy, base) if subset.policy is not None else base
            yield Use(service, port, subset, _for_service(service, policy.for_port(port.number), asked.get(port.number), port, general), rule)


def _for_service(service: Service, policy: TrafficPolicy, asked: TlsSettings | None, port: Port, general: MeshDefaults) -> TrafficPolicy:
    own = _with_names(_with_tls(_near(policy, service.prefers), asked), service.subject_alt_names)
    if general is NO_DEFAULTS:
        return own
    return _limited(completed(own, general.clusters, port.protocol.is_http), general.other_tls)


@functools.lru_cache(10_000)
def _limited(policy: TrafficPolicy, limits: TlsLimits) -> TrafficPolicy:
    """By what callers begin TLS."""
    tls = policy.tls
    if limits == NO_LIMITS or tls is None or not tls.is_originated:
        return policy
    return replace(policy, tls=replace(tls, cipher_suites=limits.cipher_suites, curves=limits.curves))


@functools.lru_cache(10_000)
def _merged(policy: TrafficPolicy, base: TrafficPolicy) -> TrafficPolicy:
    """The same object for the same two, since what is made of it is remembered by it."""
    return policy.over(base)


@functools.lru_cache(10_000)
def _near(policy: TrafficPolicy, labels: tuple[str, ...]) -> TrafficPolicy:
    """How near its endpoints should be, by what a service says, unless the callers' own rules say otherwise."""
    balancer = policy.load_balancer or LoadBalancer()
    if not labels or balancer.locality is not None:
        return policy
    return replace(policy, load_balancer=replace(balancer, locality=LocalitySettings(priority=labels, always=True)))


@functools.lru_cache(10_000)
def _with_tls(policy: TrafficPolicy, tls: TlsSettings | None) -> TrafficPolicy:
    """What a service asks callers for, unless their own rules say otherwise."""
    return policy if tls is None or policy.tls is not None else replace(policy, tls=tls)


@functools.lru_cache(10_000)
def _with_names(policy: TrafficPolicy, names: tuple[str, ...]) -> TrafficPolicy:
    """Whom a service says to be, unless the callers' own rules say otherwise."""
    tls = policy.tls
    if not names or tls is None or not tls.is_originated or tls.subject_alt_names or tls.insecure_skip_verify:
        return policy
    return replace(policy, tls=replace(tls, subject_alt_names=names))


@functools.lru_cache(10_000)
def for_grpc(policy: TrafficPolicy) -> TrafficPolicy:
    """gRPC's clients know few balancers: what they do not know is round robin to them."""
    balancer = policy.load_balancer
    if balancer is not None and balancer.hash is not None:
        return policy
    return TrafficPolicy(LoadBalancer("ROUND_ROBIN", None, None, balancer.locality if balancer else None)).over(policy)


@functools.lru_cache(10_000)
def showing(policy: TrafficPolicy, certificate: str) -> TrafficPolicy:
    """The policy of a gateway that has a certificate (by its name over SDS) for services that ask for TLS."""
    tls = policy.tls
    if tls is None or not tls.by_service or not tls.is_originated:
        return policy
    return replace(policy, tls=replace(tls, mode=MUTUAL, shown=certificate))


def origin(use: Use) -> tuple[tuple[str, str], ...]:
    """What tools want to know of where a cluster comes from."""
    found = []
    if use.rule is not None:
        found.append(("config", f"/apis/networking.istio.io/v1/namespaces/{use.rule.namespace}/destination-rule/{use.rule.name}"))
    if use.subset is not None:
        found.append(("subset", use.subset.name))
    return tuple(found)


def ports_of(config: Config, namespace: str, *, captured: bool = False) -> Iterator[tuple[Service, Port]]:
    """All services that callers in a namespace see, by port. `captured`: also those of many names, where it is known which connections are meant."""
    for service in config.services.values():
        if visible(service, namespace) and (not service.host.startswith("*") or (captured and service.as_meant)):
            for port in service.ports:
                yield service, port


def targets_of(config: Config, namespace: str, host: str, mentioned: Iterable[str]) -> tuple[tuple[str, Target], ...]:
    """What `mentioned` hosts, and `host`, are to callers in a namespace."""
    return tuple((one, target_of(config, namespace, one)) for one in sorted({host, *mentioned}))


def target_of(config: Config, namespace: str, host: str) -> Target:
    """What a host is to them."""
    service = config.services.get(host)
    rule = config.rule_for(host, namespace)
    pool = config.general.clusters.pool
    if service is None or (rule is None and pool is None):
        return Target(service)
    hashes, flows = [], []
    for use in service_uses(service, rule):
        key = use.port.number, use.subset.name if use.subset is not None else ""
        hash = use.policy.load_balancer.hash if use.policy.load_balancer is not None else None
        if hash is not None:
            hashes.append((key, hash))
        whole = rule.policy if rule is not None else None
        own = use.subset.policy if use.subset is not None else whole
        flow = flow_of(use.policy, whole, pool, own.tunnel if own is not None else None)
        if flow != STRAIGHT:
            flows.append((key, flow))
    return Target(service, tuple(hashes), tuple(flows))
