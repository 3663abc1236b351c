"""Traffic policies: how callers treat a service (Istio's DestinationRule)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True, eq=False)
class ConsistentHash:
    """Which property of a request chooses its endpoint. One of `header`, `cookie`, `source_ip`, `query_parameter` is set."""

    header: str = ""
    cookie: str = ""
    cookie_path: str = ""
    cookie_ttl_s: float | None = None
    cookie_attributes: tuple[tuple[str, str], ...] = ()
    source_ip: bool = False
    query_parameter: str = ""
    minimum_ring_size: int = 1024
    maglev_table_size: int = 0  # 0: a ring


@dataclass(frozen=True, slots=True, eq=False)
class LoadBalancer:
    """`simple` is Envoy's name of the policy, or "" for the default; with `hash`, it is ring hash or maglev."""

    simple: str = ""
    hash: ConsistentHash | None = None
    warmup_s: float | None = None
    locality: LocalitySettings | None = None
    warmup_minimum_percent: float | None = None
    warmup_aggression: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LocalitySettings:
    """Where requests go, seen from where they come from.

    `distribute`: (from, {to: weight}) with localities that may end in `*`. `failover`: (from region, to region). `priority`: labels, or `label=value`, in
    which endpoints should be like the caller, the most important first. With none of them, nearest first. `always`: also where no outlier detection tells which
    endpoints fail.
    """

    enabled: bool = True
    distribute: tuple[tuple[str, Mapping[str, int]], ...] = ()
    failover: tuple[tuple[str, str], ...] = ()
    priority: tuple[str, ...] = ()
    always: bool = False
    zone_aware: bool = False  # proxies stay in their zone as far as that keeps all endpoints of the region equally busy; only regions fail over then
    minimum_cluster_size: int | None = None  # of endpoints, for that


@dataclass(frozen=True, slots=True, eq=False)
class ConnectionPool:
    """Limits; None leaves what Istio leaves: none."""

    max_connections: int | None = None
    connect_timeout_s: float | None = None
    max_connection_duration_s: float | None = None
    keepalive_probes: int | None = None
    keepalive_time_s: float | None = None
    keepalive_interval_s: float | None = None
    tcp_keepalive: bool = False
    max_pending_requests: int | None = None
    max_requests: int | None = None
    max_requests_per_connection: int | None = None
    max_retries: int | None = None
    idle_timeout_s: float | None = None
    max_concurrent_streams: int | None = None
    h2_upgrade: str = ""  # "", "UPGRADE" or "DO_NOT_UPGRADE"
    tcp_idle_timeout_s: float | None = None  # of connections that are no HTTP
    use_client_protocol: bool = False  # requests go on by the version of HTTP by which they came


@dataclass(frozen=True, slots=True, eq=False)
class OutlierDetection:
    """None: Envoy's default."""

    consecutive_5xx: int | None = None
    consecutive_gateway: int | None = None
    consecutive_local_origin: int | None = None
    split_local_origin: bool = False
    interval_s: float | None = None
    base_ejection_s: float | None = None
    max_ejection_percent: int | None = None
    min_health_percent: int = 0


SIMPLE = "SIMPLE"
MUTUAL = "MUTUAL"
REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True, eq=False)
class TlsSettings:
    """TLS that callers originate. `mode` is DISABLE, SIMPLE, MUTUAL, ISTIO_MUTUAL or REFUSED, which is none that could be trusted.

    `ca_pem` are authorities to trust in place of those of the file `ca_certificates`; `ca_certificates`, `crl`, `certificate` and `private_key` are files on
    the callers' machines. In place of all of them, `credential` is the name of a Secret in the callers' namespace. `by_service`: the service asks for it, not a
    rule of the callers; `shown` is then the name over SDS of the certificate that a gateway has for such services.
    """

    mode: str
    sni: str = ""
    ca_certificates: str = ""
    subject_alt_names: tuple[str, ...] = ()
    insecure_skip_verify: bool = False
    ca_pem: str = ""
    crl: str = ""
    certificate: str = ""
    private_key: str = ""
    credential: str = ""
    by_service: bool = False
    shown: str = ""
    cipher_suites: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()

    @property
    def is_originated(self) -> bool:
        """Whether it is with the world: not of the mesh."""
        return self.mode in (SIMPLE, MUTUAL)


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Connections go through an HTTP proxy, which is asked for `target` (host:port): by CONNECT, or if it `posts`, by POST."""

    target: str
    posts: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TrafficPolicy:
    """Every part that is None is inherited from the policy around it."""

    load_balancer: LoadBalancer | None = None
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None
    tls: TlsSettings | None = None
    ports: Mapping[int, TrafficPolicy] = field(default_factory=dict)
    retry_budget: tuple[float, int] | None = None  # percent of requests, and how many retries there may always be
    proxy_protocol: int = 0  # its version, by which endpoints are told who calls; 0: they are not
    tunnel: Tunnel | None = None  # in Istio a subset has its own or none, whatever its rule says: `over` leaves it out

    def over(self, base: TrafficPolicy | None) -> TrafficPolicy:
        """This policy, with what it leaves open taken from `base`."""
        if base is None:
            return self
        return TrafficPolicy(
            self.load_balancer or base.load_balancer,
            self.connection_pool or base.connection_pool,
            self.outlier_detection or base.outlier_detection,
            self.tls or base.tls,
            self.ports or base.ports,
            self.retry_budget or base.retry_budget,
            self.proxy_protocol or base.proxy_protocol,
        )

    def for_port(self, number: int) -> TrafficPolicy:
        """What holds for one port: a port's own settings replace the others as a whole, as in Istio, but for what ports cannot say."""
        return _of_port(self, self.ports[number]) if number in self.ports else self


NO_POLICY = TrafficPolicy()


@functools.lru_cache(10_000)
def _of_port(policy: TrafficPolicy, port: TrafficPolicy) -> TrafficPolicy:
    """The same object for the same two, since what is made of it is remembered by it."""
    return replace(port, retry_budget=policy.retry_budget, proxy_protocol=policy.proxy_protocol)


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    name: str
    labels: Mapping[str, str]
    policy: TrafficPolicy | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DestinationRule:
    """Policies of one service, by its host name (which may be a pattern), and its subsets.

    `selector`: it is only for the workloads of its namespace with these labels.
    """

    name: str
    namespace: str
    host: str
    policy: TrafficPolicy | None = None
    subsets: tuple[Subset, ...] = ()
    export_to: tuple[str, ...] = ("*",)
    selector: Mapping[str, str] | None = None

    def credentials(self) -> set[str]:
        """Names of all Secrets that it asks for."""
        policies = [one for one in (self.policy, *(subset.policy for subset in self.subsets)) if one is not None]
        policies += [one for policy in policies for one in policy.ports.values()]
        return {one.tls.credential for one in policies if one.tls is not None and one.tls.credential}

    def subset(self, name: str) -> Subset | None:
        return next((subset for subset in self.subsets if subset.name == name), None)
