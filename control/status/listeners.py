"""What is to be said of listeners, of a Gateway or of a ListenerSet: whether they are taken, and why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from control.model.gateway import GATEWAY_API, Gateway, GatewayServer, Refused
from control.model.secret import Referent, Referrer, is_granted
from control.model.snapshot import Config
from control.status.conditions import Object, Said, conditions
from control.translate.gateways import has_certificates

_NO_CONFLICT = Said("Conflicted", False, "NoConflicts")
_RESOLVED = Said("ResolvedRefs", True, "ResolvedRefs")
_NO_AUTHORITY = "NoValidCACertificate"


class Listeners:
    """`bundles`: the ConfigMaps that have authorities, by namespace and name. `now`: RFC 3339."""

    def __init__(self, config: Config, bundles: AbstractSet[tuple[str, str]], now: str) -> None:
        self._config = config
        self._bundles = bundles
        self._now = now

    def entries(self, one: Object, gateway: Gateway, serves: bool, attached: Callable[[str], int]) -> list[dict[str, Any]]:
        """`listeners` of a status, in the order of the spec. `serves`: whether anybody serves them; `attached`: how many routes one has, by its name."""
        before = {entry.get("name"): entry for entry in one.status.get("listeners") or ()}
        servers = {server.name: server for server in gateway.servers}
        refused = {each.name: each for each in gateway.refused}
        made = []
        for asked in one.spec.get("listeners") or ():
            name = asked.get("name")
            server = servers.get(name)
            if server is not None:
                said, kinds, routes = self._served(asked, gateway, server, serves), server.kinds, attached(name)
            elif name in refused:
                said, kinds, routes = _refused(refused[name]), (), 0
            else:
                continue
            entry = {"name": name, "supportedKinds": [{"group": GATEWAY_API, "kind": kind} for kind in kinds], "attachedRoutes": routes}
            entry["conditions"] = conditions(one, (before.get(name) or {}).get("conditions"), said, self._now)
            made.append(entry)
        return made

    def is_whole(self, gateway: Gateway, server: GatewayServer) -> bool:
        """Whether all that it shows and asks for is there."""
        return server.tls is None or has_certificates(self._config, gateway, server.tls, gateway.namespace, identity=True)

    def _served(self, asked: Mapping[str, Any], gateway: Gateway, server: GatewayServer, serves: bool) -> list[Said]:
        whole = self.is_whole(gateway, server)
        accepted, resolved = Said("Accepted", True, "Accepted"), self._of_clients(gateway, server)
        if not resolved.holds:
            accepted = Said("Accepted", False, _NO_AUTHORITY, resolved.message)
        else:
            resolved = self._of_certificates(asked, gateway, server, whole)
        programmed = Said("Programmed", serves and whole, "Programmed" if serves and whole else "Pending" if whole else "Invalid")
        return [accepted, _NO_CONFLICT, resolved, programmed]

    def _of_certificates(self, asked: Mapping[str, Any], gateway: Gateway, server: GatewayServer, whole: bool) -> Said:
        named = [Referent("", "Secret", secret.namespace, secret.name) for secret in (server.tls.credentials if server.tls is not None else ())]
        if any(not is_granted(self._config.references.grants, gateway.referrer, what) for what in named):
            return Said("ResolvedRefs", False, "RefNotPermitted", "no ReferenceGrant allows a Secret of another namespace")
        if not whole:
            return Said("ResolvedRefs", False, "InvalidCertificateRef", "a Secret is missing, or has no certificate")
        others = [kind for kind in (asked.get("allowedRoutes") or {}).get("kinds") or () if not _is_among(kind, server.kinds)]
        if others:
            return Said("ResolvedRefs", False, "InvalidRouteKinds", f"{others[0].get('kind')} is no route for this protocol")
        return _RESOLVED

    def _of_clients(self, gateway: Gateway, server: GatewayServer) -> Said:
        """Whether some of the authorities that certificates of clients must be from are there. They are named by the Gateway, also for its ListenerSets."""
        if server.tls is None or not server.tls.bundles or server.tls.ca_pem:
            return _RESOLVED
        first = server.tls.bundles[0]
        if not first.name:
            return Said("ResolvedRefs", False, "InvalidCACertificateKind", "only ConfigMaps are served")
        who = Referrer(GATEWAY_API, "Gateway", gateway.home[0])
        if not is_granted(self._config.references.grants, who, Referent("", "ConfigMap", *first[::-1])):
            return Said("ResolvedRefs", False, "RefNotPermitted", f"no ReferenceGrant in {first.namespace} allows {first.name}")
        return Said("ResolvedRefs", False, "InvalidCACertificateRef", f"no ConfigMap with ca.crt: {first.name}")


def _refused(one: Refused) -> list[Said]:
    conflicted = one.condition == "Conflicted"
    reason = one.reason if conflicted else "Invalid"
    said = [Said("Accepted", False, one.reason, one.message), _RESOLVED, Said("Programmed", False, reason, one.message)]
    return [*said, Said("Conflicted", True, one.reason, one.message) if conflicted else _NO_CONFLICT]


def _is_among(kind: Mapping[str, Any], kinds: tuple[str, ...]) -> bool:
    return kind.get("group", GATEWAY_API) == GATEWAY_API and kind.get("kind") in kinds
