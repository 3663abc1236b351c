"""The conditions that users of the Gateway API look for, on the objects that are ours: classes by their `controllerName`, Gateways by their class, routes by
their parents. Pure: objects and a snapshot in, statuses out; what others wrote into a status stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from control.kinds.registry import Identity
from control.model.gateway import GATEWAY_API, Gateway
from control.model.routing import RouteRules
from control.model.secret import Referent, Referrer, is_granted
from control.model.snapshot import MeshSnapshot
from control.translate.gateways import Serving, has_certificates

CONTROLLER = "meshproxy/gateway"
_ROUTES = ("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute")


class Object(NamedTuple):
    """A document of the API server, what is served of it, and what is wrong with it."""

    identity: Identity
    document: Mapping[str, Any]
    value: Any
    problems: tuple[str, ...]

    @property
    def generation(self) -> int:
        return int(self.document["metadata"].get("generation") or 0)

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.document.get("spec") or {}

    @property
    def status(self) -> Mapping[str, Any]:
        return self.document.get("status") or {}


class _Said(NamedTuple):
    """A condition without its history."""

    type: str
    holds: bool
    reason: str
    message: str = ""


def statuses(objects: Iterable[Object], snapshot: MeshSnapshot, now: str) -> Iterator[tuple[Object, dict[str, Any]]]:
    """The objects whose status says something else than it should, with what is to be merged into it. `now`: RFC 3339."""
    every = [one for one in objects if one.identity[0] == GATEWAY_API]
    classes = {one.identity[3] for one in every if one.identity[1] == "GatewayClass" and one.spec.get("controllerName") == CONTROLLER}
    gateways = {one.identity[2:]: one for one in every if one.identity[1] == "Gateway" and one.spec.get("gatewayClassName") in classes}
    routes = [one for one in every if one.identity[1] in _ROUTES]
    made = _Statuses(snapshot, gateways, routes, now)
    for one in every:
        status: dict[str, Any] = {}
        if one.identity[1] == "GatewayClass" and one.identity[3] in classes:
            status = {"conditions": made.conditions(one, one.status.get("conditions"), [_Said("Accepted", True, "Accepted")])}
        elif one.identity[2:] in gateways and one.identity[1] == "Gateway":
            status = made.gateway(one)
        elif one.identity[1] in _ROUTES:
            status = made.route(one)
        if any(one.status.get(key) != value for key, value in status.items()):
            yield one, status


class _Statuses:
    def __init__(self, snapshot: MeshSnapshot, gateways: Mapping[Any, Object], routes: list[Object], now: str) -> None:
        self._config = snapshot.config
        self._workloads = snapshot.workloads
        self._gateways = gateways
        self._routes = routes
        self._now = now
        # As they are served: with the namespaces that selectors choose.
        self._complete = {(one.namespace, one.name): one for one in snapshot.config.gateways if not one.anywhere}

    def conditions(self, one: Object, before: Any, said: Iterable[_Said]) -> list[dict[str, Any]]:
        """A list of conditions. Their times are those of their last change; conditions of others stay."""
        known = {entry.get("type"): entry for entry in before or ()}
        for each in said:
            status = "True" if each.holds else "False"
            old = known.get(each.type) or {}
            since = old["lastTransitionTime"] if old.get("status") == status and old.get("lastTransitionTime") else self._now
            known[each.type] = {
                "type": each.type,
                "status": status,
                "reason": each.reason,
                "message": each.message,
                "observedGeneration": one.generation,
                "lastTransitionTime": since,
            }
        return list(known.values())

    def gateway(self, one: Object) -> dict[str, Any]:
        """Of a Gateway that is ours: as a whole, and of each of its listeners."""
        value = self._complete.get(one.identity[2:]) if isinstance(one.value, Gateway) else None
        serves = value is not None and any(value.is_on(workload.namespace, workload.labels) for workload in self._workloads.values())
        if one.problems:
            said = [_Said("Accepted", False, "Invalid", "; ".join(one.problems)), _Said("Programmed", False, "Invalid", "it is as it was last right, if ever")]
        elif serves:
            said = [_Said("Accepted", True, "Accepted"), _Said("Programmed", True, "Programmed")]
        else:
            why = f"no pod in {one.identity[2]} has the label gateway.networking.k8s.io/gateway-name: {one.identity[3]}"
            said = [_Said("Accepted", True, "Accepted"), _Said("Programmed", False, "Pending", why)]
        before = {entry.get("name"): entry for entry in one.status.get("listeners") or ()}
        listeners = []
        for server in value.servers if value is not None and not one.problems else ():
            certificates = value is not None and (server.tls is None or has_certificates(self._config, value, server.tls, value.namespace, identity=True))
            of_it = [
                _Said("Accepted", True, "Accepted"),
                _Said("ResolvedRefs", certificates, "ResolvedRefs" if certificates else "InvalidCertificateRef", "" if certificates else _NO_CERTIFICATE),
                _Said("Programmed", serves and certificates, "Programmed" if serves and certificates else "Pending"),
            ]
            attached = sum(self._attaches(route, value, server.name) for route in self._routes)
            old = before.get(server.name) or {}
            kinds = [{"group": GATEWAY_API, "kind": kind} for kind in server.kinds]
            conditions = self.conditions(one, old.get("conditions"), of_it)
            listeners.append({"name": server.name, "supportedKinds": kinds, "attachedRoutes": attached, "conditions": conditions})
        return {"conditions": self.conditions(one, one.status.get("conditions"), said), "listeners": listeners}

    def _attaches(self, route: Object, gateway: Gateway | None, name: str) -> bool:
        rules = route.value if isinstance(route.value, tuple) else ()
        return gateway is not None and any(
            serving.takes(one) and any(serving.hosts(one)) for one in rules for serving in _servings(gateway) if serving.server.name == name
        )

    def route(self, one: Object) -> dict[str, Any]:
        """Of a route: an entry for each parent that is ours, beside those of other controllers; nothing without any."""
        known = [entry for entry in one.status.get("parents") or () if isinstance(entry, dict)]
        ours = {_key(entry.get("parentRef") or {}): entry for entry in known if entry.get("controllerName") == CONTROLLER}
        rules = one.value if isinstance(one.value, tuple) and not one.problems else ()
        parents = []
        for index, parent in enumerate(one.spec.get("parentRefs") or ()):
            group, kind = parent.get("group", GATEWAY_API), parent.get("kind", "Gateway")
            key = (parent.get("namespace") or one.identity[2], parent.get("name"))
            if (group, kind) == ("", "Service"):
                accepted = _Said("Accepted", True, "Accepted")
            elif (group, kind) == (GATEWAY_API, "Gateway") and key in self._gateways:
                accepted = self._accepted(rules[index], self._complete.get(key)) if index < len(rules) else _Said("Accepted", True, "Accepted")
            else:
                continue
            if one.problems:
                accepted = _Said("Accepted", False, "UnsupportedValue", "; ".join(one.problems))
            resolved = self._resolved(one, rules[index]) if index < len(rules) else _Said("ResolvedRefs", True, "ResolvedRefs")
            conditions = self.conditions(one, (ours.get(_key(parent)) or {}).get("conditions"), [accepted, resolved])
            parents.append({"parentRef": dict(parent), "controllerName": CONTROLLER, "conditions": conditions})
        if not parents and not ours:
            return {}
        return {"parents": [*(entry for entry in known if entry.get("controllerName") != CONTROLLER), *parents]}

    def _accepted(self, rules: RouteRules, gateway: Gateway | None) -> _Said:
        """Whether any listener takes a route."""
        if gateway is None:
            return _Said("Accepted", False, "NoMatchingParent", "the Gateway is refused")
        named = [one for one in _servings(gateway) if rules.section in ("", one.server.name) and (not rules.ports or one.server.port in rules.ports)]
        if not named:
            return _Said("Accepted", False, "NoMatchingParent", "the Gateway has no such listener")
        taken = [one for one in named if one.takes(rules) and any(where in ("*", rules.namespace) for where, _ in one.server.hosts)]
        if not taken:
            return _Said("Accepted", False, "NotAllowedByListeners", "no listener takes such routes, or routes of this namespace")
        if not any(any(one.hosts(rules)) for one in taken):
            return _Said("Accepted", False, "NoMatchingListenerHostname", "no listener has any of the hostnames")
        return _Said("Accepted", True, "Accepted")

    def _resolved(self, one: Object, rules: RouteRules) -> _Said:
        """Whether all backends are there, and may be referred to."""
        who = Referrer(GATEWAY_API, one.identity[1], one.identity[2])
        for destination in rules.all_destinations():
            if destination.foreign is not None and not is_granted(self._config.references.grants, who, Referent("", "Service", *destination.foreign)):
                return _Said("ResolvedRefs", False, "RefNotPermitted", f"no ReferenceGrant in {destination.foreign[0]} allows {destination.foreign[1]}")
            service = self._config.services.get(destination.host)
            if service is None or (destination.port and service.port(destination.port) is None):
                return _Said("ResolvedRefs", False, "BackendNotFound", f"there is no {destination.host or 'such backend'}:{destination.port}")
        return _Said("ResolvedRefs", True, "ResolvedRefs")


_NO_CERTIFICATE = "a Secret is missing, has no certificate, or may not be referred to from here"


def _servings(gateway: Gateway) -> list[Serving]:
    return [Serving(gateway, server, gateway.namespace) for server in gateway.servers]


def _key(parent: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells parents apart."""
    group, kind = parent.get("group", GATEWAY_API), parent.get("kind", "Gateway")
    return group, kind, parent.get("namespace"), parent.get("name"), parent.get("sectionName"), parent.get("port")
