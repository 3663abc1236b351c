"""Gateways: proxies at the edge, which listen for the world."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from control.model.labels import LabelSelector
from control.model.secret import CaBundle, ReferenceGrant, Referent, Referrer, is_granted
from control.model.service import Protocol

EVERYWHERE = "0.0.0.0"
GATEWAY_API = "gateway.networking.k8s.io"
PASSTHROUGH = "PASSTHROUGH"
AUTO_PASSTHROUGH = "AUTO_PASSTHROUGH"
ISTIO_MUTUAL = "ISTIO_MUTUAL"


class SecretRef(NamedTuple):
    """A Secret as a gateway names it. Without a namespace, it is in that of the workload that serves the gateway."""

    name: str
    namespace: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ServerTls:
    """TLS of a server. `mode` is SIMPLE, MUTUAL, OPTIONAL_MUTUAL, ISTIO_MUTUAL, PASSTHROUGH or AUTO_PASSTHROUGH; all but the last two end it here.

    `credentials`: certificates to show; `ca`: whom clients' certificates must be from, None for the authorities that are with the first of `credentials`.
    `files` are certificates to show that are files of the gateway's machine, each with its key; `ca_file` and `crl_file` are about those of clients.
    `bundles` are ConfigMaps with the authorities of clients, and `ca_pem` what is in them. Versions are Envoy's names of them, "" for its own default.
    """

    mode: str
    credentials: tuple[SecretRef, ...] = ()
    ca: SecretRef | None = None
    subject_alt_names: tuple[str, ...] = ()
    spki: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    min_version: str = ""
    max_version: str = ""
    cipher_suites: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    ca_file: str = ""
    crl_file: str = ""
    bundles: tuple[SecretRef, ...] = ()
    ca_pem: str = ""

    @property
    def is_terminated(self) -> bool:
        return self.mode not in (PASSTHROUGH, AUTO_PASSTHROUGH)

    @property
    def asks_clients(self) -> bool:
        """Whether certificates of clients are looked at."""
        return self.mode in ("MUTUAL", "OPTIONAL_MUTUAL")


@dataclass(frozen=True, slots=True)
class GatewayServer:
    """A port on which a gateway listens. `hosts` are those that it serves: names, `*.suffix` or `*`, each with the namespace of the rules that may say so.
    `selector` says of which namespaces these are; without it they say so themselves.

    `https_redirect`: plain requests are sent to https. `kinds`: of the rules that may say so, as far as the Gateway API limits them. `bind`: the address of the
    listener, "" for all of the machine's; `target`: its port, if that is not the one that clients mean.
    """

    name: str
    port: int
    protocol: Protocol
    hosts: tuple[tuple[str, str], ...] = (("*", "*"),)
    tls: ServerTls | None = None
    https_redirect: bool = False
    kinds: tuple[str, ...] = ()
    bind: str = ""
    target: int = 0
    selector: LabelSelector | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Where it listens."""
        return self.bind or EVERYWHERE, self.target or self.port

    @property
    def server_names(self) -> tuple[str, ...]:
        """What clients must say in their ClientHello; nothing when any will do."""
        names = sorted({host for _, host in self.hosts})
        return () if "*" in names else tuple(names)


class Refused(NamedTuple):
    """A listener of the Gateway API that is not served, by its name; `condition` is what says so, with a reason of that API."""

    name: str
    condition: str
    reason: str
    message: str = ""


HOSTNAME_CONFLICT, PROTOCOL_CONFLICT = "HostnameConflict", "ProtocolConflict"


def conflict(one: GatewayServer, other: GatewayServer) -> str:
    """Why two listeners of the Gateway API cannot be on their port together: a reason of that API, or "" if they can."""
    if one.port != other.port:
        return ""
    if not share_a_port(one, other):
        both = one.tls is not None and other.tls is not None and one.protocol is other.protocol
        return HOSTNAME_CONFLICT if both else PROTOCOL_CONFLICT
    return HOSTNAME_CONFLICT if {host for _, host in one.hosts} & {host for _, host in other.hosts} else ""


def share_a_port(one: GatewayServer, other: GatewayServer) -> bool:
    """Whether connections can be told apart: by their requests, or by the names in their ClientHello."""
    if one.tls is None or other.tls is None:
        return one.tls is other.tls and one.protocol.is_http and other.protocol.is_http
    if not one.tls.is_terminated and not other.tls.is_terminated:
        return True  # the names are those of routes
    mine, theirs = set(one.server_names or "*"), set(other.server_names or "*")
    return not mine & theirs


@dataclass(frozen=True, slots=True, eq=False)
class Gateway:
    """What workloads with the labels of `selector` listen for; `anywhere`: in any namespace, not only the gateway's own.

    `certificate`: what they show to services that want TLS, in the sense of a BackendTLSPolicy. `clients`: whom clients of HTTPS must be from, by port, 0 for
    all other ports. `allowed_sets`: of which namespaces others may add listeners (None, Same, All, Selector), see `listener_set`; of what they add, `parent` is
    the Gateway. `group` and `kind`: of the document. `refused`: listeners of it that are not among its servers.
    """

    name: str
    namespace: str
    selector: Mapping[str, str]
    servers: tuple[GatewayServer, ...]
    anywhere: bool = True
    certificate: SecretRef | None = None
    clients: Mapping[int, tuple[SecretRef, ...]] = field(default_factory=dict)
    allowed_sets: tuple[str, LabelSelector | None] = ("None", None)
    parent: tuple[str, str] | None = None
    group: str = GATEWAY_API
    kind: str = "Gateway"
    refused: tuple[Refused, ...] = ()

    @property
    def home(self) -> tuple[str, str]:
        """Namespace and name of the Gateway whose listeners these are."""
        return self.parent or (self.namespace, self.name)

    @property
    def referrer(self) -> Referrer:
        """Who refers to Secrets."""
        return Referrer(self.group, self.kind, self.namespace)

    def asking(self, server: GatewayServer) -> ServerTls | None:
        """TLS of a server, which asks clients for certificates if this says so."""
        tls = server.tls
        bundles = self.clients.get(server.port, self.clients.get(0, ()))
        if tls is None or not bundles or tls.mode != "SIMPLE" or not server.protocol.is_http:
            return tls
        return replace(tls, mode="MUTUAL", bundles=bundles)

    @property
    def key(self) -> str:
        """As rules name it."""
        return f"{self.namespace}/{self.name}"

    def is_on(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Whether a workload serves this gateway."""
        return (self.anywhere or namespace == self.home[0]) and self.selector.items() <= labels.items()


def with_references(
    gateways: Iterable[Gateway], namespaces: Mapping[str, Mapping[str, str]], bundles: Mapping[tuple[str, str], CaBundle], grants: tuple[ReferenceGrant, ...]
) -> tuple[Gateway, ...]:
    """The gateways with what other documents say: which namespaces there are, by their labels, and what is in ConfigMaps. The same objects for the same."""
    made = []
    for gateway in gateways:
        chosen = tuple(
            None if one.selector is None else tuple(sorted(name for name, labels in namespaces.items() if one.selector.chooses(labels)))
            for one in gateway.servers
        )
        pems = tuple("" if one.tls is None else _pem(gateway, one.tls.bundles, bundles, grants) for one in gateway.servers)
        made.append(_complete(gateway, chosen, pems) if any(pems) or any(one is not None for one in chosen) else gateway)
    return tuple(made)


def _pem(gateway: Gateway, named: tuple[SecretRef, ...], bundles: Mapping[tuple[str, str], CaBundle], grants: tuple[ReferenceGrant, ...]) -> str:
    who = Referrer(GATEWAY_API, "Gateway", gateway.home[0])
    known = [bundles[one.namespace, one.name] for one in named if (one.namespace, one.name) in bundles]
    return "".join(one.pem for one in known if is_granted(grants, who, Referent("", "ConfigMap", one.namespace, one.name)))


@functools.lru_cache(10_000)
def _complete(gateway: Gateway, chosen: tuple[tuple[str, ...] | None, ...], pems: tuple[str, ...]) -> Gateway:
    servers = []
    for server, namespaces, pem in zip(gateway.servers, chosen, pems, strict=True):
        made = server
        if namespaces is not None:  # without any, its names stay its own: nobody says anything about them
            made = replace(made, hosts=tuple((namespace, host) for _, host in server.hosts for namespace in namespaces or ("",)))
        if pem and server.tls is not None:
            made = replace(made, tls=replace(server.tls, ca_pem=pem))
        servers.append(made)
    return replace(gateway, servers=tuple(servers))
