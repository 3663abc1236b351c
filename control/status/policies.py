"""What a BackendTLSPolicy is told: an entry for each Gateway of ours that sends to its services, or else for these, whose callers mind it in the mesh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from control.model.gateway import GATEWAY_API
from control.model.service import Service
from control.names import service_host
from control.status.conditions import CONTROLLER, Object, Said, conditions, key_of, of_others, of_ours

_MOST = 16  # entries that the API has room for
_Key = tuple[str, str]  # namespace and name
_Place = tuple[str, str]  # the host of a service, and the name of a port, "" for all


class Policies:
    """`bundles`: the ConfigMaps that have authorities, by namespace and name; `senders`: by host of a service, the Gateways that send to it."""

    def __init__(
        self, policies: Iterable[Object], services: Mapping[str, Service], bundles: AbstractSet[_Key], senders: Mapping[str, AbstractSet[_Key]], now: str
    ) -> None:
        self._services = services
        self._bundles = bundles
        self._senders = senders
        self._now = now
        self._first: dict[_Place, Object] = {}  # who has a place: the oldest, and of those the first by name, as it is served
        for one in sorted(policies, key=lambda one: (str(one.document["metadata"].get("creationTimestamp") or ""), one.identity[2:])):
            for place in _places(one) if one.value is not None else ():
                self._first.setdefault(place, one)

    def status(self, one: Object) -> dict[str, Any]:
        """Of a policy. Entries of other controllers stay."""
        namespace, known = one.identity[2], one.status.get("ancestors")
        ours = of_ours(known, "ancestorRef")
        said = [self._accepted(one), self._resolved(one)]
        hosts = dict.fromkeys(host for host, _ in _places(one))
        gateways = sorted({key for host in hosts for key in self._senders.get(host, ())})
        ancestors = [{"group": GATEWAY_API, "kind": "Gateway", "namespace": where, "name": name} for where, name in gateways]
        if not ancestors:
            ancestors = [{"group": "", "kind": "Service", "namespace": namespace, "name": host.partition(".")[0]} for host in hosts]
        made = []
        for ancestor in ancestors[: _MOST - len(of_others(known))]:
            before = (ours.get(key_of(ancestor)) or {}).get("conditions")
            made.append({"ancestorRef": ancestor, "controllerName": CONTROLLER, "conditions": conditions(one, before, said, self._now)})
        return {"ancestors": [*of_others(known), *made]}

    def _accepted(self, one: Object) -> Said:
        if one.problems:
            return Said("Accepted", False, "Invalid", "; ".join(one.problems))
        places = _places(one)
        if not any(self._is_there(place) for place in places):
            return Said("Accepted", False, "TargetNotFound", "there is no such service, or no such port of it")
        if all(self._first.get(place, one) is not one for place in places):
            return Said("Accepted", False, "Conflicted", f"{self._first[places[0]].identity[3]} is about the same, and comes first")
        if self._missing(one):
            return Said("Accepted", False, "NoValidCACertificate", "all authorities must be there: nobody could be trusted, and so nobody is called")
        return Said("Accepted", True, "Accepted")

    def _resolved(self, one: Object) -> Said:
        kinds = [reference for reference in _authorities(one) if (reference.get("group", ""), reference.get("kind")) != ("", "ConfigMap")]
        if kinds:
            return Said("ResolvedRefs", False, "InvalidKind", f"{kinds[0].get('kind')}: only ConfigMaps are served")
        missing = self._missing(one)
        if missing:
            return Said("ResolvedRefs", False, "InvalidCACertificateRef", f"no ConfigMap with ca.crt: {', '.join(missing)}")
        return Said("ResolvedRefs", True, "ResolvedRefs")

    def _missing(self, one: Object) -> list[str]:
        return [str(reference.get("name")) for reference in _authorities(one) if (one.identity[2], reference.get("name")) not in self._bundles]

    def _is_there(self, place: _Place) -> bool:
        service = self._services.get(place[0])
        return service is not None and (not place[1] or any(port.name == place[1] for port in service.ports))


def _places(one: Object) -> list[_Place]:
    """What a policy is about, as far as that are services."""
    found = [reference for reference in one.spec.get("targetRefs") or () if (reference.get("group", ""), reference.get("kind")) == ("", "Service")]
    return [(service_host(str(reference.get("name")), one.identity[2]), str(reference.get("sectionName") or "")) for reference in found]


def _authorities(one: Object) -> list[Mapping[str, Any]]:
    return list((one.spec.get("validation") or {}).get("caCertificateRefs") or ())
