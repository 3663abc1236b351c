"""What the proxies of some workloads are to know of the mesh, and where they listen for them (Istio's Sidecar)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from control.model.security import ROOT_NAMESPACE
from control.model.service import Ingress, SidecarPorts, Workload
from control.model.traffic import ConnectionPool
from control.names import host_matches

OWN = "."  # the namespace of the proxy that asks
ANY = "*"
UNIX = "unix://"


class Unknown(Enum):
    """What becomes of traffic to what is not in the mesh."""

    ALLOW_ANY = "ALLOW_ANY"
    REGISTRY_ONLY = "REGISTRY_ONLY"


@dataclass(frozen=True, slots=True)
class Imports:
    """Which services and rules a proxy sees: pairs of a namespace (OWN, ANY, or one by its name) and a host or a pattern of hosts, sorted."""

    hosts: tuple[tuple[str, str], ...]

    def within(self, namespace: str) -> Imports:
        """The same for proxies of one namespace, which OWN then is."""
        return Imports(tuple(sorted({(namespace if where == OWN else where, host) for where, host in self.hosts})))

    def service(self, namespace: str, host: str) -> bool:
        """Whether a service of a namespace is among them."""
        return any(where in (ANY, namespace) and _covers(pattern, host) for where, pattern in self.hosts)

    def rules(self, namespace: str, hosts: Iterable[str]) -> bool:
        """Whether rules of a namespace say something about a host that is among them."""
        patterns = [pattern for where, pattern in self.hosts if where in (ANY, namespace)]
        return any(_covers(pattern, host) or _covers(host, pattern) for host in hosts for pattern in patterns)


def _covers(pattern: str, host: str) -> bool:
    return pattern == host or host_matches(pattern, host)


class Speaks(Enum):
    """What applications speak where sidecars listen for some services."""

    HTTP = "HTTP"
    HTTP_PROXY = "HTTP_PROXY"  # requests may name any port
    TLS = "TLS"  # whose server names say which service is meant
    TCP = "TCP"


@dataclass(frozen=True, slots=True)
class Egress:
    """Where a sidecar listens for the services among `imports`: on a port at `bind`, or, with port 0, on the Unix socket of that path. `bind` "": on this
    machine's own address.
    """

    port: int
    speaks: Speaks
    bind: str
    imports: Imports

    @property
    def routes(self) -> str:
        """The name of its route configuration, which is Istio's."""
        return str(self.port) if self.port else f"{UNIX}{self.bind}"


@dataclass(frozen=True, slots=True, eq=False)
class Sidecar:
    """`imports` None: everything. `ingress` None: as the workload itself says. `selector` None: all workloads of the namespace. `egress`: see Egress; what it
    imports is among `imports`, too.
    """

    name: str
    namespace: str
    selector: Mapping[str, str] | None = None
    imports: Imports | None = None
    ingress: tuple[Ingress, ...] | None = None
    unknown: Unknown | None = None
    pool: ConnectionPool | None = None  # of connections to applications
    egress: tuple[Egress, ...] = ()


def sidecar_for(sidecars: Iterable[Sidecar], namespace: str, labels: Mapping[str, str], root: str = ROOT_NAMESPACE) -> Sidecar | None:
    """The one that holds for a workload: one that selects it, else that of its namespace, else that of the mesh; of equals the first."""
    narrowest: dict[int, Sidecar] = {}
    for one in sidecars:
        if one.selector is not None:
            if one.namespace == namespace and one.selector.items() <= labels.items():
                return one
        elif one.namespace == namespace:
            narrowest.setdefault(0, one)
        elif one.namespace == root:
            narrowest.setdefault(1, one)
    return narrowest.get(0) or narrowest.get(1)


def with_ingress(workload: Workload, sidecars: Iterable[Sidecar], root: str = ROOT_NAMESPACE) -> Workload:
    """A workload as the Sidecar that holds for it has its proxy listen; the same object for the same two."""
    if workload.sidecar is None:
        return workload
    found = sidecar_for(sidecars, workload.namespace, workload.labels, root)
    if found is None or (found.ingress is None and found.pool is None):
        return workload
    return _listening(workload, found)


@functools.lru_cache(10_000)
def _listening(workload: Workload, sidecar: Sidecar) -> Workload:
    """Only the ports of `ingress`, each where the workload has that port's traffic go, or else on the port itself, if that leads elsewhere."""
    ports = workload.sidecar
    assert ports is not None
    if sidecar.ingress is None:
        return replace(workload, sidecar=replace(ports, pool=sidecar.pool))
    inbound: dict[int, int] = {}
    ingress: dict[int, Ingress] = {}
    for one in sidecar.ingress:
        listen = ports.inbound.get(one.port, one.port)
        host, port = one.endpoint or (workload.address, one.port)
        if (host or workload.address, port) in ((workload.address, listen), (one.bind, listen)):
            continue  # it would call itself
        inbound[one.port] = listen
        ingress[one.port] = one
    return replace(workload, sidecar=SidecarPorts(inbound, ports.http_proxy, ports.outbound, ports.identity, ingress, ports.scope, sidecar.pool, ports.capture))
