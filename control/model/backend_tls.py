"""TLS that a service's own side asks callers for (the Gateway API's BackendTLSPolicy)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from control.model.secret import CaBundle
from control.model.service import Service
from control.model.traffic import REFUSED, TlsSettings


@dataclass(frozen=True, slots=True, eq=False)
class BackendTls:
    """`targets`: hosts of services, each with the name of a port, "" for all. `bundles`: names of ConfigMaps beside it, none for the system's authorities.
    `created`: see RouteRules."""

    name: str
    namespace: str
    targets: tuple[tuple[str, str], ...]
    hostname: str
    subject_alt_names: tuple[str, ...] = ()
    bundles: tuple[str, ...] = ()
    created: str = ""


def with_backend_tls(services: Mapping[str, Service], policies: Iterable[BackendTls], bundles: Mapping[tuple[str, str], CaBundle]) -> dict[str, Service]:
    """The services as their policies have them; of two policies for a port, the one that names it, and of those the first."""
    by_port: dict[str, dict[int, TlsSettings]] = {}
    for named in (True, False):
        for policy in policies:
            settings = _settings(policy, tuple(bundles.get((policy.namespace, name)) for name in policy.bundles))
            for host, section in policy.targets:
                for port in services[host].ports if host in services and bool(section) is named else ():
                    if section in ("", port.name):
                        by_port.setdefault(host, {}).setdefault(port.number, settings)
    return {host: _with(service, tuple(by_port[host].items())) if host in by_port else service for host, service in services.items()}


@functools.lru_cache(10_000)
def _settings(policy: BackendTls, bundles: tuple[CaBundle | None, ...]) -> TlsSettings:
    """Without the authorities that it names, nobody could be trusted."""
    known = [one.pem for one in bundles if one is not None]
    if len(known) < len(bundles):
        return TlsSettings(REFUSED)
    return TlsSettings("SIMPLE", policy.hostname, "", policy.subject_alt_names or (policy.hostname,), ca_pem="".join(known), by_service=True)


@functools.lru_cache(10_000)
def _with(service: Service, settings: tuple[tuple[int, TlsSettings], ...]) -> Service:
    return replace(service, backend_tls=settings)
