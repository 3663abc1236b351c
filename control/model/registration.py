"""Workloads that nobody has written down: a proxy says which group it belongs to and where it is, its WorkloadGroup says the rest."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from control.model.health import Probe
from control.model.service import NOWHERE, Locality, SidecarPorts, Workload


@dataclass(frozen=True, slots=True)
class Registration:
    """What a proxy says of itself. `account`: the service account that it has proved to have; None: it is believed."""

    name: str
    namespace: str
    group: str
    address: str
    labels: tuple[tuple[str, str], ...] = ()
    locality: Locality = NOWHERE
    account: str | None = None

    def __str__(self) -> str:
        return f"{self.name}.{self.namespace}"


@dataclass(frozen=True, slots=True, eq=False)
class WorkloadGroup:
    """What Istio's WorkloadGroup says of the workloads in it. `sidecar`: how theirs listen; `probe`: how they are asked whether they can be called."""

    name: str
    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    service_account: str = "default"
    weight: int = 1
    locality: Locality = NOWHERE
    sidecar: SidecarPorts | None = None
    probe: Probe | None = None


def why_not(one: Registration, groups: Mapping[tuple[str, str], WorkloadGroup], workloads: Mapping[tuple[str, str], Workload]) -> str:
    """Why a proxy does not become a workload; "" if it does. `workloads`: those of documents."""
    group = groups.get((one.namespace, one.group))
    if (one.namespace, one.name) in workloads:
        return "a document describes a workload of this name"
    if group is None:
        return f"there is no WorkloadGroup {one.namespace}/{one.group}"
    if one.account not in (None, group.service_account):
        return f"its service account is {one.account}, and that of WorkloadGroup {one.namespace}/{one.group} is {group.service_account}"
    return "" if one.address else "its node says no address: INSTANCE_IPS is needed"


@functools.lru_cache(10_000)
def workload_of(one: Registration, group: WorkloadGroup) -> Workload:
    """The workload that a proxy is: what it says of itself goes before what its group says, as in Istio."""
    return Workload(
        one.name,
        one.namespace,
        one.address,
        {**group.labels, **dict(one.labels)},
        group.ports,
        group.service_account,
        group.weight,
        one.locality if one.locality != NOWHERE else group.locality,
        sidecar=group.sidecar,
        readiness=group.probe,
        group=group.name,
    )
