"""Services and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from control.model.health import Probe
from control.model.traffic import ConnectionPool, TlsSettings

if TYPE_CHECKING:
    from control.model.gateway import ServerTls


class Protocol(Enum):
    """What is spoken on a port."""

    HTTP = "http"
    HTTP2 = "http2"
    GRPC = "grpc"
    TCP = "tcp"

    @property
    def is_http(self) -> bool:
        return self is not Protocol.TCP

    @property
    def is_http2(self) -> bool:
        return self in (Protocol.HTTP2, Protocol.GRPC)


class Resolution(Enum):
    """How the endpoints of a service are found."""

    ENDPOINTS = "endpoints"  # the control plane knows them
    DNS = "dns"  # the proxy asks DNS for each of them, all addresses count
    DNS_ROUND_ROBIN = "dns-round-robin"  # the proxy asks DNS, and uses one address at a time


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a service. `target` is where workloads listen: a number, the name of one of their ports, or "" for the same number. `tls`: connections begin
    with a server's name."""

    number: int
    name: str
    protocol: Protocol
    target: int | str = ""
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Locality:
    region: str = ""
    zone: str = ""
    sub_zone: str = ""

    def __str__(self) -> str:
        return f"{self.region}/{self.zone}/{self.sub_zone}".rstrip("/")


NOWHERE = Locality()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address that serves one port of a service. `address` is an IP address, or a name where the service is resolved by DNS."""

    address: str
    port: int
    labels: tuple[tuple[str, str], ...] = ()
    weight: int = 1
    locality: Locality = NOWHERE
    healthy: bool = True
    workload: str = ""  # what serves there, if it is known: see `telemetry.endpoint_name`
    mtls: bool = False  # it takes mutual TLS of the mesh
    draining: bool = False  # it serves what it has, and is to get nothing new; it is not `healthy` then
    probed: tuple[str, str] | None = None  # namespace and name of its workload, if whether that is ready is found out

    def has_labels(self, wanted: Mapping[str, str]) -> bool:
        """Whether all of these labels are among the endpoint's."""
        return not wanted or wanted.items() <= dict(self.labels).items()


EXPECTED = Endpoint("", 0)  # stands alone in the place of endpoints of which nobody has told us yet


@dataclass(frozen=True, slots=True)
class Ingress:
    """How a sidecar serves a port: `endpoint` is where the application listens, with the workload's own address for "" and a path for port 0.

    `bind` "": at the workload's address. `endpoint` None: the same port there.
    """

    port: int
    protocol: Protocol
    bind: str = ""
    endpoint: tuple[str, int] | None = None
    pool: ConnectionPool | None = None  # of connections to the application
    tls: ServerTls | None = None  # that callers from outside of the mesh begin, where there is none of the mesh


@dataclass(frozen=True, slots=True, eq=False)
class SidecarPorts:
    """Where the sidecar of a workload listens. `inbound`: port of the application -> port of the sidecar; `http_proxy` is 0 without one.

    `identity`: it has certificates of the mesh. `ingress`: of `inbound`, what a Sidecar says about it. `scope`: how much of the mesh it is sent, ALL or
    OBSERVED; empty: as the control plane has it. `pool`: of connections to the application, where `ingress` does not say it.
    """

    inbound: Mapping[int, int] = field(default_factory=dict)
    http_proxy: int = 0
    outbound: tuple[Outbound, ...] = ()
    identity: bool = False
    ingress: Mapping[int, Ingress] = field(default_factory=dict)
    scope: str = ""
    pool: ConnectionPool | None = None
    capture: int = 0  # to which port what the application opens is redirected


ALL = "all"  # everything that it may call
OBSERVED = "observed"  # what it has called


@dataclass(frozen=True, slots=True)
class Outbound:
    """A port of a sidecar on which the application reaches one port of one service. `listen` is 0 for one that is yet to be chosen."""

    listen: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Run:
    """How to start the process of a workload. Without a `command` there is only its sidecar. `folder`: where it runs, seen from the mesh's folder."""

    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    folder: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """A process, pod or machine that serves. `ports`: name -> number where it listens, 0 for one that is chosen when it is run.

    `readiness`: how its sidecar finds out whether it can be called. `group`: the WorkloadGroup that it is in.
    """

    name: str
    namespace: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    service_account: str = "default"
    weight: int = 1
    locality: Locality = NOWHERE
    healthy: bool = True
    sidecar: SidecarPorts | None = None
    run: Run | None = None
    node: str = ""  # whose place is its own
    readiness: Probe | None = None
    group: str = ""

    def port_for(self, port: Port) -> int:
        """Where this workload serves that port of a service; 0 when it does not."""
        if isinstance(port.target, str) and port.target:
            return self.ports.get(port.target, 0)
        return port.target or self.ports.get(port.name) or port.number

    def reached_at(self, port: int) -> int:
        """Where callers reach a port of the application: its sidecar's, where it has one in front."""
        return port if self.sidecar is None else self.sidecar.inbound.get(port, port)


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """A service by its host name.

    With `selector`, workloads of its namespace stand behind it; `static` are endpoints that it names itself. `export_to`: see `snapshot.visible`. `further`:
    there is another one of that host, in another namespace, which goes before it where both are seen.
    """

    host: str
    namespace: str
    ports: tuple[Port, ...]
    addresses: tuple[str, ...] = ()  # virtual addresses, as far as callers know any
    resolution: Resolution = Resolution.ENDPOINTS
    selector: Mapping[str, str] | None = None
    static: tuple[Workload, ...] = ()
    export_to: tuple[str, ...] = ("*",)
    backend_tls: tuple[tuple[int, TlsSettings], ...] = ()  # what callers of a port are asked for
    further: bool = False
    prefers: tuple[str, ...] = ()  # labels in which endpoints should be like callers who say nothing of it themselves
    subject_alt_names: tuple[str, ...] = ()  # who may answer callers that begin TLS themselves
    outside: tuple[str, ...] = ()  # where load balancers have it, by address or name
    publishes_unready: bool = False  # probes say nothing of its endpoints
    node_local: bool = False  # callers only get its endpoints on their own machine
    as_meant: bool = False  # captured connections go where they were meant to

    @property
    def key(self) -> str:
        """What its endpoints are known by: no other service has it."""
        return f"{self.namespace}/{self.host}" if self.further else self.host

    def port(self, number: int) -> Port | None:
        return next((port for port in self.ports if port.number == number), None)


@dataclass(frozen=True, slots=True)
class SliceAddress:
    """One address of an EndpointSlice; `pod` names the pod that has it, whose labels count. `draining`: see Endpoint."""

    address: str
    healthy: bool = True
    zone: str = ""
    pod: str = ""
    draining: bool = False


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Where a machine of a cluster is."""

    name: str
    locality: Locality


@dataclass(frozen=True, slots=True, eq=False)
class EndpointSlice:
    """Endpoints that somebody else found for a service: every address serves all of `ports`, by the names of the service's ports."""

    service: str
    namespace: str
    ports: Mapping[str, int]
    addresses: tuple[SliceAddress, ...]
