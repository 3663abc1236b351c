"""What holds for all services and proxies of a mesh where nothing else says it (Istio's MeshConfig)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from control.model.routing import Retries
from control.model.security import ROOT_NAMESPACE
from control.model.traffic import ConnectionPool, LoadBalancer, LocalitySettings, OutlierDetection, TlsSettings, TrafficPolicy

NO_TLS = TlsSettings("DISABLE")


@dataclass(frozen=True, slots=True)
class TlsLimits:
    """Versions are Envoy's names of them; "" and none of a list leave Envoy's own."""

    min_version: str = ""
    cipher_suites: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()


NO_LIMITS = TlsLimits()


@dataclass(frozen=True, slots=True)
class ClusterDefaults:
    """Of clusters. `pool` and `outlier` are for services whose policy has none at all, the rest for what a policy leaves open.

    `connect_timeout_s` None: Istio's. `h2`: HTTP goes on as HTTP/2. `mutual_tls`: callers speak it to whoever takes it. `keepalive` has nothing but that.
    """

    connect_timeout_s: float | None = None
    keepalive: ConnectionPool | None = None
    locality: LocalitySettings | None = None
    h2: bool = False
    mutual_tls: bool = True
    pool: ConnectionPool | None = None
    outlier: OutlierDetection | None = None


NO_CLUSTER_DEFAULTS = ClusterDefaults()
NORMAL = "BASE"  # of paths: what RFC 3986 says


@dataclass(frozen=True, slots=True)
class ListenerDefaults:
    """Of listeners. `paths`: how they are normalised, by Istio's names. `mesh_tls` is for mutual TLS of the mesh, `other_tls` for what gateways end.

    `trusted_proxies`: how many in front of gateways tell the truth about their clients; `client_certificates`: what gateways do with what is told of clients'
    certificates, "" for the usual; `told_clients`: connections to gateways begin with the PROXY protocol.
    """

    paths: str = NORMAL
    mesh_tls: TlsLimits = TlsLimits("TLSv1_2")
    other_tls: TlsLimits = NO_LIMITS
    trusted_proxies: int = 0
    client_certificates: str = ""
    told_clients: bool = False


NO_LISTENER_DEFAULTS = ListenerDefaults()


@dataclass(frozen=True, slots=True)
class MeshDefaults:
    """`root`: the namespace whose policies are for all. `exported...`: which namespaces see what does not say so, nothing for all of them.

    `retries`: of requests, where no rule says any. `dns_refresh_s`: how often names are asked for whose records do not say it.
    """

    root: str = ROOT_NAMESPACE
    exported_services: tuple[str, ...] = ()
    exported_routes: tuple[str, ...] = ()
    exported_policies: tuple[str, ...] = ()
    clusters: ClusterDefaults = NO_CLUSTER_DEFAULTS
    listeners: ListenerDefaults = NO_LISTENER_DEFAULTS
    retries: Retries | None = None
    dns_refresh_s: float = 60.0
    other_tls: TlsLimits = NO_LIMITS  # of what callers begin; its version is not theirs to say


NO_DEFAULTS = MeshDefaults()


@functools.lru_cache(10_000)
def completed(policy: TrafficPolicy, defaults: ClusterDefaults, http: bool) -> TrafficPolicy:
    """How callers treat a port of a service, for which a policy was found; `http`: that is what it speaks. The same object for the same arguments."""
    if defaults == NO_CLUSTER_DEFAULTS:
        return policy
    balancer = policy.load_balancer
    if defaults.locality is not None and (balancer is None or balancer.locality is None):
        balancer = replace(balancer or LoadBalancer(), locality=defaults.locality)
    return replace(
        policy,
        load_balancer=balancer,
        connection_pool=pool_of(policy.connection_pool, defaults, http),
        outlier_detection=policy.outlier_detection or defaults.outlier,
        tls=policy.tls if policy.tls is not None or defaults.mutual_tls else NO_TLS,
    )


@functools.lru_cache(10_000)
def pool_of(pool: ConnectionPool | None, defaults: ClusterDefaults, http: bool = False) -> ConnectionPool | None:
    """Limits of connections, with what they leave open."""
    found = pool or defaults.pool
    if defaults.connect_timeout_s is None and defaults.keepalive is None and not (defaults.h2 and http):
        return found
    made = found or ConnectionPool()
    if made.connect_timeout_s is None:
        made = replace(made, connect_timeout_s=defaults.connect_timeout_s)
    if defaults.keepalive is not None and not made.tcp_keepalive:
        alive = defaults.keepalive
        made = replace(
            made,
            tcp_keepalive=True,
            keepalive_probes=alive.keepalive_probes,
            keepalive_time_s=alive.keepalive_time_s,
            keepalive_interval_s=alive.keepalive_interval_s,
        )
    if defaults.h2 and http and not made.h2_upgrade and not made.use_client_protocol:
        made = replace(made, h2_upgrade="UPGRADE")
    return made
