"""All that is known at one time, immutable: what `translate` works from."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from control.model.routing import RouteRules
from control.model.service import Endpoint, EndpointSlice, Locality, Port, Service, Workload
from control.model.traffic import DestinationRule
from control.names import host_matches, service_host


class _Exported(Protocol):
    @property
    def namespace(self) -> str: ...
    @property
    def export_to(self) -> tuple[str, ...]: ...


def visible(thing: _Exported, namespace: str) -> bool:
    """Whether proxies of a namespace see a service or a policy: `*` is all of them, `.` its own namespace."""
    return any(where in ("*", namespace) or (where == "." and thing.namespace == namespace) for where in thing.export_to)


Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class MeshSnapshot:
    """Objects in the order of namespace and name. `endpoints`: by host and port number of a service; absent where the proxies find them by DNS."""

    services: Mapping[str, Service] = field(default_factory=dict)
    workloads: Mapping[tuple[str, str], Workload] = field(default_factory=dict)
    endpoints: Mapping[tuple[str, int], tuple[Endpoint, ...]] = field(default_factory=dict)
    route_rules: tuple[RouteRules, ...] = ()
    destination_rules: tuple[DestinationRule, ...] = ()

    def rule_for(self, host: str, namespace: str) -> DestinationRule | None:
        """The DestinationRule for callers in `namespace`: theirs, else the service's own, and of those the one that names the host most exactly."""
        service = self.services.get(host)
        found = [rule for rule in self.destination_rules if host_matches(rule.host, host) and visible(rule, namespace)]
        if not found:
            return None
        homes = [namespace] + ([service.namespace] if service is not None else [])

        def rank(rule: DestinationRule) -> tuple[int, int]:
            return (homes.index(rule.namespace) if rule.namespace in homes else len(homes), -len(rule.host.lstrip("*")) - (rule.host == host))

        return min(found, key=rank)


def build(objects: Mapping[Any, Any], before: MeshSnapshot | None = None) -> MeshSnapshot:
    """The snapshot of what documents describe. Endpoints that are as they were `before` are the same objects."""
    services: dict[str, Service] = {}
    workloads: dict[tuple[str, str], Workload] = {}
    slices: dict[str, list[EndpointSlice]] = defaultdict(list)
    rules: list[RouteRules] = []
    destination_rules: list[DestinationRule] = []
    for one in _flat(objects[identity] for identity in sorted(objects, key=lambda identity: identity[2:])):
        if isinstance(one, Service):
            services.setdefault(one.host, one)
        elif isinstance(one, Workload):
            workloads[one.namespace, one.name] = one
        elif isinstance(one, EndpointSlice):
            slices[service_host(one.service, one.namespace)].append(one)
        elif isinstance(one, RouteRules):
            rules.append(one)
        elif isinstance(one, DestinationRule):
            destination_rules.append(one)
    old = before.endpoints if before is not None else {}
    endpoints: dict[tuple[str, int], tuple[Endpoint, ...]] = {}
    finder = _Finder(workloads)
    for host, service in services.items():
        behind = finder.behind(service)
        for port in service.ports:
            key = host, port.number
            found = tuple(finder.endpoints(service, port, behind, slices.get(host, ())))
            known = old.get(key)
            endpoints[key] = known if known == found else found
    return MeshSnapshot(services, workloads, endpoints, tuple(rules), tuple(destination_rules))


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        else:
            yield value


class _Finder:
    """Which workloads stand behind a service."""

    def __init__(self, workloads: Mapping[tuple[str, str], Workload]) -> None:
        self._workloads = workloads
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

    def endpoints(self, service: Service, port: Port, behind: list[Workload], slices: Iterable[EndpointSlice]) -> Iterable[Endpoint]:
        """All endpoints of one port: those that the service itself names, those in slices, or else those of the workloads behind it."""
        for workload in service.static:
            yield _endpoint(workload, workload.port_for(port), "")
        seen = False
        for one in slices:
            seen = True
            number = one.ports.get(port.name)
            if number:
                for address in one.addresses:
                    workload_of = self._workloads.get((one.namespace, address.pod)) if address.pod else None
                    yield Endpoint(
                        address.address,
                        workload_of.reached_at(number) if workload_of is not None else number,
                        _labels(workload_of) if workload_of is not None else (),
                        1,
                        Locality("", address.zone) if address.zone else workload_of.locality if workload_of is not None else Locality(),
                        address.healthy,
                        f"{address.pod}.{one.namespace}" if address.pod else "",
                    )
        if not seen:
            for workload in behind:
                number = workload.port_for(port)
                if number:
                    yield _endpoint(workload, workload.reached_at(number), f"{workload.name}.{workload.namespace}")


def _endpoint(workload: Workload, port: int, name: str) -> Endpoint:
    return Endpoint(workload.address, port, _labels(workload), workload.weight, workload.locality, workload.healthy, name)


@functools.lru_cache(100_000)
def _labels(workload: Workload) -> Labels:
    return tuple(sorted(workload.labels.items()))
