"""What documents of several families have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from control.kinds.fields import Fields
from control.model.service import Locality, Protocol


@dataclass(frozen=True, slots=True)
class Meta:
    """Where an object is, and how it is labelled."""

    name: str
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]


# A kind: the object of a document's body, which has `spec` and whatever else that kind has. Problems are noted in the Fields.
Parser = Callable[[Meta, Fields], Any]

_PROTOCOLS = {
    "http": Protocol.HTTP,
    "http2": Protocol.HTTP2,
    "grpc": Protocol.GRPC,
    "grpc-web": Protocol.HTTP,
    "tcp": Protocol.TCP,
    "https": Protocol.TCP,
    "tls": Protocol.TCP,
    "mongo": Protocol.TCP,
    "mysql": Protocol.TCP,
    "redis": Protocol.TCP,
    "kubernetes.io/h2c": Protocol.HTTP2,
    "kubernetes.io/ws": Protocol.HTTP,
    "kubernetes.io/wss": Protocol.TCP,
}
PROTOCOL_NAMES = ("HTTP", "HTTP2", "GRPC", "GRPC-Web", "TCP", "HTTPS", "TLS", "Mongo", "MySQL", "Redis")


def protocol_of(name: str) -> Protocol | None:
    """A protocol by its name as Istio and Kubernetes write it (`appProtocol`); None for one that we do not know."""
    return _PROTOCOLS.get(name.lower())


def protocol_of_port(name: str, app_protocol: str = "") -> Protocol:
    """What is spoken on a port: as `appProtocol` says, or the first word of the port's name (`http`, `grpc-web`, `http2-api`); bytes if neither says."""
    if app_protocol:
        return protocol_of(app_protocol) or Protocol.TCP
    if name.lower().startswith("grpc-web"):
        return Protocol.HTTP
    return protocol_of(name.partition("-")[0]) or Protocol.TCP


def locality_of(text: str) -> Locality:
    """`region/zone/sub-zone`, as Istio writes localities."""
    parts = (text.split("/") + ["", "", ""])[:3]
    return Locality(*parts)


def export_to(spec: Fields, name: str = "exportTo") -> tuple[str, ...]:
    """Namespaces that may see an object: `*` all, `.` its own."""
    return spec.texts(name) or ("*",)
