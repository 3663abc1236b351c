"""What the proxies of some workloads are to know of the mesh, and where they listen for them (Istio's Sidecar)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from control.model.security import ROOT_NAMESPACE
from control.model.service import Ingress, SidecarPorts, Workload
from control.names import host_matches

OWN = "."  # the namespace of the proxy that asks
ANY = "*"


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


@dataclass(frozen=True, slots=True, eq=False)
class Sidecar:
    """`imports` None: everything. `ingress` None: as the workload itself says. `selector` None: all workloads of the namespace."""

    name: str
    namespace: str
    selector: Mapping[str, str] | None = None
    imports: Imports | None = None
    ingress: tuple[Ingress, ...] | None = None
    unknown: Unknown | None = None


def sidecar_for(sidecars: Iterable[Sidecar], namespace: str, labels: Mapping[str, str]) -> Sidecar | None:
    """The one that holds for a workload: one that selects it, else that of its namespace, else that of the mesh; of equals the first."""
    narrowest: dict[int, Sidecar] = {}
    for one in sidecars:
        if one.selector is not None:
            if one.namespace == namespace and one.selector.items() <= labels.items():
                return one
        elif one.namespace == namespace:
            narrowest.setdefault(0, one)
        elif one.namespace == ROOT_NAMESPACE:
            narrowest.setdefault(1, one)
    return narrowest.get(0) or narrowest.get(1)


def with_ingress(workload: Workload, sidecars: Iterable[Sidecar]) -> Workload:
    """A workload as the Sidecar that holds for it has its proxy listen; the same object for the same two."""
    if workload.sidecar is None:
        return workload
    found = sidecar_for(sidecars, workload.namespace, workload.labels)
    if found is None or found.ingress is None:
        return workload
    return _listening(workload, found)


@functools.lru_cache(10_000)
def _listening(workload: Workload, sidecar: Sidecar) -> Workload:
    """Only the ports of `ingress`, each where the workload has that port's traffic go, or else on the port itself, if that leads elsewhere."""
    ports = workload.sidecar
    assert ports is not None
    inbound: dict[int, int] = {}
    ingress: dict[int, Ingress] = {}
    for one in sidecar.ingress or ():
        listen = ports.inbound.get(one.port, one.port)
        host, port = one.endpoint or (workload.address, one.port)
        if (host or workload.address, port) in ((workload.address, listen), (one.bind, listen)):
            continue  # it would call itself
        inbound[one.port] = listen
        ingress[one.port] = one
    return replace(workload, sidecar=SidecarPorts(inbound, ports.http_proxy, ports.outbound, ports.identity, ingress, ports.scope))
