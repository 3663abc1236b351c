"""Gateways: proxies at the edge, which listen for the world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from control.model.service import Protocol


@dataclass(frozen=True, slots=True)
class GatewayServer:
    """A port on which a gateway listens. `hosts` are those that it serves: names, `*.suffix` or `*`, each with the namespace of the rules that may say so."""

    name: str
    port: int
    protocol: Protocol
    hosts: tuple[tuple[str, str], ...] = (("*", "*"),)


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
