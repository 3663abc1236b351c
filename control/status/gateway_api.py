"""The conditions that users of the Gateway API look for, on the objects that are ours: classes by their `controllerName`, Gateways by their class, routes by
their parents. Pure: objects and a snapshot in, statuses out; what others wrote into a status stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from control.kinds.gateway_api import LISTENER_SETS
from control.model import listener_set
from control.model.gateway import GATEWAY_API, Gateway
from control.model.routing import RouteRules
from control.model.secret import Referent, Referrer, is_granted
from control.model.snapshot import MeshSnapshot
from control.names import is_ip
from control.status.conditions import CONTROLLER, Object, Said, conditions, key_of, of_others, of_ours
from control.status.listeners import Listeners
from control.status.policies import Policies
from control.translate.gateways import Serving, shown

_ROUTES = ("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute")
_MOST_ADDRESSES = 16  # that the API has room for
# As the Gateway API's pkg/features has them, in the order that it asks for, but for those of meshes, which are no class's. tests/data has what proves them.
FEATURES = """
BackendTLSPolicy BackendTLSPolicySANValidation GRPCRoute GRPCRouteNamedRouteRule GRPCRouteRequestHeaderModifier Gateway GatewayAddressEmpty
GatewayBackendClientCertificate GatewayFrontendClientCertificateValidation GatewayHTTPListenerIsolation GatewayPort8080 HTTPRoute
HTTPRoute303RedirectStatusCode HTTPRoute307RedirectStatusCode HTTPRoute308RedirectStatusCode HTTPRouteBackendProtocolH2C HTTPRouteBackendProtocolWebSocket
HTTPRouteBackendRequestHeaderModification HTTPRouteBackendRequestRedirect HTTPRouteBackendTimeout HTTPRouteBackendURLRewrite HTTPRouteCORS
HTTPRouteDestinationPortMatching HTTPRouteHostRewrite HTTPRouteMethodMatching HTTPRouteNamedRouteRule HTTPRouteParentRefPort HTTPRoutePathRedirect
HTTPRoutePathRewrite HTTPRoutePortRedirect HTTPRouteQueryParamMatching HTTPRouteRequestMirror HTTPRouteRequestMultipleMirrors HTTPRouteRequestPercentageMirror
HTTPRouteRequestTimeout HTTPRouteResponseHeaderModification HTTPRouteRetry HTTPRouteRetryBackendTimeout HTTPRouteRetryConnectionError HTTPRouteSchemeRedirect
ListenerSet ReferenceGrant TCPRoute TLSRoute TLSRouteModeMixed TLSRouteModeTerminate
"""


def statuses(
    objects: Iterable[Object], snapshot: MeshSnapshot, now: str, bundles: AbstractSet[tuple[str, str]] = frozenset()
) -> Iterator[tuple[Object, dict[str, Any]]]:
    """The objects whose status says something else than it should, with what is to be merged into it. `now`: RFC 3339; `bundles`: see Policies."""
    every = [one for one in objects if one.identity[0] == GATEWAY_API or one.identity[:2] in LISTENER_SETS]
    classes = {one.identity[3] for one in every if one.identity[1] == "GatewayClass" and one.spec.get("controllerName") == CONTROLLER}
    gateways = {one.identity[2:]: one for one in every if one.identity[1] == "Gateway" and one.spec.get("gatewayClassName") in classes}
    routes = [one for one in every if one.identity[1] in _ROUTES]
    sets = {tuple(one.identity) for one in every if one.identity[:2] in LISTENER_SETS and _home(one) in gateways}
    made = _Statuses(snapshot, gateways, sets, routes, bundles, now)
    policies = [one for one in every if one.identity[1] == "BackendTLSPolicy"]
    of_policies = Policies(policies, snapshot.config.services, bundles, made.senders(), now)
    for one in every:
        status: dict[str, Any] = {}
        if one.identity[1] == "GatewayClass" and one.identity[3] in classes:
            status = made.gateway_class(one)
        elif one.identity[2:] in gateways and one.identity[1] == "Gateway":
            status = made.gateway(one)
        elif one.identity[:2] == LISTENER_SETS[0]:  # what it was called in experiments is not told
            status = made.listener_set(one)
        elif one.identity[1] in _ROUTES:
            status = made.route(one)
        elif one.identity[1] == "BackendTLSPolicy":
            status = of_policies.status(one)
        if any(one.status.get(key) != value for key, value in status.items()):
            yield one, status


class _Statuses:
    def __init__(
        self,
        snapshot: MeshSnapshot,
        gateways: Mapping[Any, Object],
        sets: AbstractSet[tuple[str, ...]],
        routes: list[Object],
        bundles: AbstractSet[tuple[str, str]],
        now: str,
    ) -> None:
        self._config = snapshot.config
        self._workloads = snapshot.workloads
        self._gateways = gateways
        self._sets = sets  # ListenerSets of those Gateways
        self._routes = routes
        self._now = now
        self._listeners = Listeners(snapshot.config, bundles, now)
        # As they are served: with the namespaces that selectors choose, and with what ListenerSets add, by their marked names.
        self._complete = {(one.namespace, one.name): one for one in snapshot.config.gateways if not one.anywhere}

    def gateway_class(self, one: Object) -> dict[str, Any]:
        """Of a GatewayClass that is ours."""
        said = Said("Accepted", True, "Accepted")
        if one.spec.get("parametersRef"):
            said = Said("Accepted", False, "InvalidParameters", "spec.parametersRef: there are no parameters of classes")
        features = [{"name": name} for name in FEATURES.split()]
        return {"conditions": conditions(one, one.status.get("conditions"), [said], self._now), "supportedFeatures": features}

    def gateway(self, one: Object) -> dict[str, Any]:
        """Of a Gateway that is ours: as a whole, and of each of its listeners."""
        value = self._complete.get(one.identity[2:]) if isinstance(one.value, Gateway) else None
        addresses = self._addresses(one, value) if value is not None else None
        said = self._of_gateway(one, value, serves=addresses is not None)
        listeners: list[dict[str, Any]] = []
        if value is not None and not one.problems:
            listeners = self._listeners.entries(one, value, addresses is not None, self._counted(value))
        found = [{"type": "IPAddress" if is_ip(address) else "Hostname", "value": address} for address in addresses or ()]
        status: dict[str, Any] = {"conditions": conditions(one, one.status.get("conditions"), said, self._now), "listeners": listeners}
        sets = sum(each.parent == one.identity[2:] and self._has_whole(each) for each in self._complete.values())
        if sets or one.status.get("attachedListenerSets"):
            status["attachedListenerSets"] = sets
        return {**status, "addresses": found} if found or one.status.get("addresses") else status

    def _of_gateway(self, one: Object, value: Gateway | None, *, serves: bool) -> list[Said]:
        """What is to be said of a Gateway as a whole."""
        if one.problems or value is None:
            reason = "InvalidParameters" if (one.spec.get("infrastructure") or {}).get("parametersRef") else "Invalid"
            return [Said("Accepted", False, reason, "; ".join(one.problems)), Said("Programmed", False, "Invalid", "it is as it was last right, if ever")]
        some = Said("Accepted", bool(value.servers) or not value.refused, "ListenersNotValid" if value.refused else "Accepted")
        programmed = Said("Programmed", True, "Programmed")
        if not some.holds:
            programmed = Said("Programmed", False, "Invalid", "none of its listeners can be served")
        elif not serves:
            why = f"no pod in {one.identity[2]} has the label gateway.networking.k8s.io/gateway-name: {one.identity[3]}"
            programmed = Said("Programmed", False, "Pending", why)
        return [some, programmed, self._shown(value)]

    def _shown(self, gateway: Gateway) -> Said:
        """Whether the certificate for services that ask for one is there."""
        ref = gateway.certificate
        if ref is not None and not is_granted(self._config.references.grants, gateway.referrer, Referent("", "Secret", ref.namespace, ref.name)):
            return Said("ResolvedRefs", False, "RefNotPermitted", f"no ReferenceGrant in {ref.namespace} allows {ref.name}")
        if ref is not None and not any(shown(self._config, (gateway,))):
            return Said("ResolvedRefs", False, "InvalidClientCertificateRef", "the Secret is missing, or has no certificate")
        return Said("ResolvedRefs", True, "ResolvedRefs")

    def _has_whole(self, gateway: Gateway) -> bool:
        """Whether anything of it can be served."""
        return any(self._listeners.is_whole(gateway, server) for server in gateway.servers)

    def listener_set(self, one: Object) -> dict[str, Any]:
        """Of a ListenerSet whose Gateway is ours; nothing of others."""
        home = _home(one)
        if home not in self._gateways:
            return {}
        at, value = self._complete.get(home), self._complete.get((one.identity[2], listener_set.MARK + one.identity[3]))
        serves = at is not None and self._addresses(self._gateways[home], at) is not None
        listeners: list[dict[str, Any]] = []
        if one.problems:
            said = [Said(name, False, "Invalid", "; ".join(one.problems)) for name in ("Accepted", "Programmed")]
        elif at is None or self._gateways[home].problems:
            said = [Said("Accepted", False, "ParentNotAccepted", "its Gateway is refused"), Said("Programmed", False, "ParentNotProgrammed")]
        elif value is None:
            said = [Said(name, False, "NotAllowed", "its Gateway allows no listeners of this namespace") for name in ("Accepted", "Programmed")]
        else:
            listeners = self._listeners.entries(one, value, serves, self._counted(value))
            said = self._of_set(value, serves=serves)
        status: dict[str, Any] = {"conditions": conditions(one, one.status.get("conditions"), said, self._now)}
        return {**status, "listeners": listeners} if listeners or one.status.get("listeners") else status

    def _of_set(self, gateway: Gateway, *, serves: bool) -> list[Said]:
        if not self._has_whole(gateway):
            return [Said(name, False, "ListenersNotValid", "none of its listeners can be served") for name in ("Accepted", "Programmed")]
        partly = gateway.refused or not all(self._listeners.is_whole(gateway, server) for server in gateway.servers)
        programmed = Said("Programmed", True, "Programmed") if serves else Said("Programmed", False, "ParentNotProgrammed", "no pod serves its Gateway")
        return [Said("Accepted", True, "ListenersNotValid" if partly else "Accepted"), programmed]

    def _addresses(self, one: Object, gateway: Gateway) -> list[str] | None:
        """Where a Gateway is reached: what it asks for itself, the Services before its pods as their load balancers have it, or else as the cluster has it, or
        else the pods. None when no pod serves it."""
        pods = [pod for pod in self._workloads.values() if gateway.is_on(pod.namespace, pod.labels)]
        if not pods:
            return None
        asked = [str(entry["value"]) for entry in one.spec.get("addresses") or () if entry.get("value")]
        services = [service for service in self._config.services.values() if service.namespace == gateway.namespace and service.selector]
        before = [service for service in services if any((service.selector or {}).items() <= pod.labels.items() for pod in pods)]
        outside = [address for service in before for address in service.outside]
        inside = [address for service in before for address in service.addresses]
        return list(dict.fromkeys(asked or sorted(outside) or sorted(inside) or sorted(pod.address for pod in pods)))[:_MOST_ADDRESSES]

    def senders(self) -> dict[str, set[tuple[str, str]]]:
        """By host of a service, which of the Gateways that are ours send to it."""
        found: dict[str, set[tuple[str, str]]] = {}
        for gateway in self._complete.values():
            for route in self._routes if gateway.home in self._gateways else ():
                for rules in route.value if isinstance(route.value, tuple) else ():
                    if gateway.key in rules.gateways and self._accepted(rules, gateway).holds:
                        for host in rules.destinations():
                            found.setdefault(host, set()).add(gateway.home)
        return found

    def _counted(self, gateway: Gateway) -> Callable[[str], int]:
        """How many routes a listener has, by its name."""
        return lambda name: sum(self._attaches(route, gateway, name) for route in self._routes)

    def _attaches(self, route: Object, gateway: Gateway | None, name: str) -> bool:
        rules = route.value if isinstance(route.value, tuple) else ()
        return gateway is not None and any(
            serving.takes(one) and any(serving.hosts(one)) for one in rules for serving in _servings(gateway) if serving.server.name == name
        )

    def route(self, one: Object) -> dict[str, Any]:
        """Of a route: an entry for each parent that is ours, beside those of other controllers; nothing without any."""
        known = one.status.get("parents")
        ours = of_ours(known, "parentRef")
        rules = one.value if isinstance(one.value, tuple) and not one.problems else ()
        parents = []
        for index, parent in enumerate(one.spec.get("parentRefs") or ()):
            group, kind = parent.get("group", GATEWAY_API), parent.get("kind", "Gateway")
            key = (parent.get("namespace") or one.identity[2], parent.get("name"))
            if (group, kind) == ("", "Service"):
                accepted = Said("Accepted", True, "Accepted")
            elif (group, kind) == (GATEWAY_API, "Gateway") and key in self._gateways:
                accepted = self._accepted(rules[index], self._complete.get(key)) if index < len(rules) else Said("Accepted", True, "Accepted")
            elif (group, kind) in LISTENER_SETS and (group, kind, *key) in self._sets:
                at = self._complete.get((key[0], f"{listener_set.MARK}{key[1]}"))
                accepted = self._accepted(rules[index], at) if index < len(rules) else Said("Accepted", True, "Accepted")
            else:
                continue
            if one.problems:
                accepted = Said("Accepted", False, "UnsupportedValue", "; ".join(one.problems))
            resolved = self._resolved(one, rules[index]) if index < len(rules) else Said("ResolvedRefs", True, "ResolvedRefs")
            made = conditions(one, (ours.get(key_of(parent)) or {}).get("conditions"), [accepted, resolved], self._now)
            parents.append({"parentRef": dict(parent), "controllerName": CONTROLLER, "conditions": made})
        if not parents and not ours:
            return {}
        return {"parents": [*of_others(known), *parents]}

    def _accepted(self, rules: RouteRules, gateway: Gateway | None) -> Said:
        """Whether any listener takes a route."""
        if gateway is None:
            return Said("Accepted", False, "NoMatchingParent", "the parent is refused")
        named = [one for one in _servings(gateway) if rules.section in ("", one.server.name) and (not rules.ports or one.server.port in rules.ports)]
        if not named:
            return Said("Accepted", False, "NoMatchingParent", "the parent has no such listener")
        taken = [one for one in named if one.takes(rules) and any(where in ("*", rules.namespace) for where, _ in one.server.hosts)]
        if not taken:
            return Said("Accepted", False, "NotAllowedByListeners", "no listener takes such routes, or routes of this namespace")
        if not any(any(one.hosts(rules)) for one in taken):
            return Said("Accepted", False, "NoMatchingListenerHostname", "no listener has any of the hostnames")
        return Said("Accepted", True, "Accepted")

    def _resolved(self, one: Object, rules: RouteRules) -> Said:
        """Whether all backends are there, and may be referred to."""
        who = Referrer(GATEWAY_API, one.identity[1], one.identity[2])
        for destination in rules.all_destinations():
            if (
                destination.foreign is not None
                and not rules.is_of_mesh
                and not is_granted(self._config.references.grants, who, Referent("", "Service", *destination.foreign))
            ):
                return Said("ResolvedRefs", False, "RefNotPermitted", f"no ReferenceGrant in {destination.foreign[0]} allows {destination.foreign[1]}")
            if not destination.host:
                return Said("ResolvedRefs", False, "InvalidKind", "only Services are backends")
            service = self._config.services.get(destination.host)
            if service is None or (destination.port and service.port(destination.port) is None):
                return Said("ResolvedRefs", False, "BackendNotFound", f"there is no {destination.host}:{destination.port}")
        return Said("ResolvedRefs", True, "ResolvedRefs")


def _home(one: Object) -> tuple[str, str]:
    """The Gateway of a ListenerSet."""
    parent = one.spec.get("parentRef") or {}
    return str(parent.get("namespace") or one.identity[2]), str(parent.get("name"))


def _servings(gateway: Gateway) -> list[Serving]:
    return [Serving(gateway, server, gateway.namespace) for server in gateway.servers]
