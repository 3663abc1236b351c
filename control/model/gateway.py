"""Gateways: proxies at the edge, which listen for the world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
    Versions are Envoy's names of them, "" for its own default.
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

    @property
    def place(self) -> tuple[str, int]:
        """Where it listens."""
        return self.bind or EVERYWHERE, self.target or self.port

    @property
    def server_names(self) -> tuple[str, ...]:
        """What clients must say in their ClientHello; nothing when any will do."""
        names = sorted({host for _, host in self.hosts})
        return () if "*" in names else tuple(names)


@dataclass(frozen=True, slots=True, eq=False)
class Gateway:
    """What workloads with the labels of `selector` listen for; `anywhere`: in any namespace, not only the gateway's own."""

    name: str
    namespace: str
    selector: Mapping[str, str]
    servers: tuple[GatewayServer, ...]
    anywhere: bool = True

    @property
    def key(self) -> str:
        """As rules name it."""
        return f"{self.namespace}/{self.name}"

    def is_on(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Whether a workload serves this gateway."""
        return (self.anywhere or namespace == self.namespace) and self.selector.items() <= labels.items()
