"""What proxies tell about requests: Telemetry policies, and where a mesh sends its traces."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from control.model.mesh import NO_DEFAULTS, MeshDefaults
from control.model.metrics import Defaults, Logging, LogSettings, Metrics, MetricsSettings, logs_of, metrics_of
from control.model.security import ROOT_NAMESPACE, Authorizer
from control.model.sidecar import Unknown

DEFAULT_SAMPLING = 1.0  # percent, as in Istio
OTLP = "otlp"  # the provider that the command line names
CLUSTER_ID = "Kubernetes"  # as Istio names a cluster of which it is not told otherwise
_CANONICAL_NAME = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_CANONICAL_REVISION = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")


class Tag(NamedTuple):
    """A custom tag. `kind`: literal, environment, header or formatter; `value`: that, or a name; `default`: of a variable or header that is not there."""

    name: str
    kind: str
    value: str
    default: str = ""


@dataclass(frozen=True, slots=True)
class Provider:
    """Where spans go: an OpenTelemetry collector that takes OTLP. `host` is that of a service of the mesh, or any name or address."""

    name: str
    host: str
    port: int
    max_tag_length: int = 0  # of the URL's path; 0 is the proxy's default
    http_path: str = ""  # OTLP by HTTP to this path, instead of gRPC
    http_headers: tuple[tuple[str, str], ...] = ()
    http_timeout_s: float = 0.0  # 0 is the proxy's default


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """What holds for the whole mesh, as in Istio's MeshConfig. `sampling`: percent of the requests whose callers have not decided; `unknown`: what becomes of
    those to what is not in the mesh; `authorizers`: whom policies may leave their decision to."""

    providers: Mapping[str, Provider] = field(default_factory=dict)
    defaults: tuple[str, ...] = ()
    sampling: float = DEFAULT_SAMPLING
    enabled: bool = True
    unknown: Unknown | None = None
    beside: Defaults = field(default_factory=Defaults)  # metrics and access logs
    authorizers: Mapping[str, Authorizer] = field(default_factory=dict)
    tags: tuple[Tag, ...] = ()
    trust_domain: str = ""  # what it must be; "" says nothing
    aliases: tuple[str, ...] = ()  # other trust domains whose principals, in policies, are those of this one
    stands_in: str = ""  # see PeerAuthentication
    general: MeshDefaults = NO_DEFAULTS

    def over(self, base: MeshConfig) -> MeshConfig:
        """This one with what `base` has besides: its providers, and its default provider where this one names none."""
        providers = {**base.providers, **self.providers}
        return replace(
            self,
            providers=providers,
            defaults=self.defaults or base.defaults,
            sampling=self.sampling if self.defaults else base.sampling,
            unknown=self.unknown or base.unknown,
            authorizers={**base.authorizers, **self.authorizers},
        )


NO_MESH_CONFIG = MeshConfig()


@dataclass(frozen=True, slots=True)
class Tracing:
    """One entry of `tracing` of a Telemetry; None: what the policy around it says. `client`, `server`: for which side it is."""

    client: bool = True
    server: bool = True
    providers: tuple[str, ...] | None = None
    sampling: float | None = None
    disabled: bool | None = None
    tags: tuple[Tag, ...] | None = None
    by_request_id: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Telemetry:
    """Of workloads that have the labels of `selector`, or that serve the Gateways in `targets`; without either of a namespace, or in the root namespace of the
    mesh."""

    name: str
    namespace: str
    selector: Mapping[str, str] | None = None
    tracing: tuple[Tracing, ...] = ()
    metrics: tuple[Metrics, ...] = ()
    logging: tuple[Logging, ...] = ()
    targets: tuple[str, ...] = ()


def to_collector(address: str) -> MeshConfig:
    """A mesh all of whose requests are traced, by a collector at `host:port`. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise ValueError(f"{address!r} is not of the form HOST:PORT")
    return MeshConfig({OTLP: Provider(OTLP, host, int(port))}, (OTLP,), 100.0)


class TracingSettings(NamedTuple):
    """What one side of a proxy does."""

    provider: Provider
    sampling: float
    tags: tuple[Tag, ...]
    by_request_id: bool
    service_name: str


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """All that documents say about it."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    policies: tuple[Telemetry, ...] = ()

    def metrics(self, namespace: str, labels: Mapping[str, str], serves: Container[str] = (), *, client: bool) -> MetricsSettings | None:
        """What a side of the proxy of a workload counts; None: nothing. `serves`: keys of its Gateways."""
        chosen = narrowing(self.policies, namespace, labels, serves, self.mesh.general.root)
        return metrics_of([entry for policy in chosen for entry in policy.metrics], self.mesh.beside, client=client)

    def logs(self, namespace: str, labels: Mapping[str, str], serves: Container[str] = (), *, client: bool) -> tuple[LogSettings, ...]:
        """Its access logs."""
        chosen = narrowing(self.policies, namespace, labels, serves, self.mesh.general.root)
        return logs_of([policy.logging for policy in chosen if policy.logging], self.mesh.beside, client=client)

    def tracing(
        self, name: str, namespace: str, labels: Mapping[str, str], trust_domain: str, serves: Container[str] = (), *, client: bool
    ) -> TracingSettings | None:
        """How a side of the proxy of a workload traces: as its own policy says, else that of its namespace, else that of the mesh; None: not at all."""
        mesh = self.mesh
        if not mesh.enabled:
            return None
        providers, sampling, disabled, by_request_id = mesh.defaults, mesh.sampling, False, True
        tags = mesh.tags
        for policy in narrowing(self.policies, namespace, labels, serves, mesh.general.root):
            for one in policy.tracing:
                if not (one.client if client else one.server):
                    continue
                providers = providers if one.providers is None else one.providers
                sampling = sampling if one.sampling is None else one.sampling
                disabled = disabled if one.disabled is None else one.disabled
                tags = tags if one.tags is None else one.tags
                by_request_id = by_request_id if one.by_request_id is None else one.by_request_id
        provider = next((mesh.providers[one] for one in providers if one in mesh.providers), None)
        if provider is None:
            return None
        service = canonical_service(name, labels)
        standard = (
            Tag("istio.canonical_revision", "literal", canonical_revision(labels)),
            Tag("istio.canonical_service", "literal", service),
            Tag("istio.mesh_id", "literal", trust_domain),
            Tag("istio.namespace", "literal", namespace),
        )
        return TracingSettings(provider, 0.0 if disabled else sampling, (*standard, *tags), by_request_id, f"{service}.{namespace}")


def narrowing(
    policies: Iterable[Telemetry], namespace: str, labels: Mapping[str, str], serves: Container[str] = (), root: str = ROOT_NAMESPACE
) -> list[Telemetry]:
    """The policies for a workload: that of the mesh, that of its namespace, its own; of several for the same the first one, as in Istio."""
    found: dict[int, Telemetry] = {}
    for one in policies:
        if one.targets:
            if any(f"{one.namespace}/{name}" in serves for name in one.targets):
                found.setdefault(2, one)
        elif one.namespace == namespace and one.selector is not None and one.selector.items() <= labels.items():
            found.setdefault(2, one)
        elif one.selector is None and one.namespace == namespace != root:
            found.setdefault(1, one)
        elif one.selector is None and one.namespace == root:
            found.setdefault(0, one)
    return [found[rank] for rank in sorted(found)]


def canonical_service(name: str, labels: Mapping[str, str]) -> str:
    """The service that a workload is of, by its labels, else its own name."""
    return next((labels[label] for label in _CANONICAL_NAME if labels.get(label)), name)


def canonical_revision(labels: Mapping[str, str]) -> str:
    """The version of it, by its labels."""
    return next((labels[label] for label in _CANONICAL_REVISION if labels.get(label)), "latest")


def endpoint_name(name: str, namespace: str, labels: Mapping[str, str]) -> str:
    """What the metadata of an endpoint say of the workload there, as Istio's proxies read it."""
    return f"{name};{namespace};{canonical_service(name, labels)};{canonical_revision(labels)};{CLUSTER_ID}"


def local_metadata(name: str, namespace: str, labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Who a workload is, as the metadata of its node would say: of its labels those that metrics have, as `LABELS.<name>`."""
    told = {label: labels[label] for label in ("app", "app.kubernetes.io/name", "app.kubernetes.io/version", "version") if labels.get(label)}
    told["service.istio.io/canonical-name"] = canonical_service(name, labels)
    told["service.istio.io/canonical-revision"] = canonical_revision(labels)
    plain = (("CLUSTER_ID", CLUSTER_ID), ("NAME", name), ("NAMESPACE", namespace), ("WORKLOAD_NAME", name))
    return (*plain, *((f"LABELS.{label}", value) for label, value in sorted(told.items())))
