"""What is spoken on a port, by the names that Kubernetes and Istio have for it."""

from __future__ import annotations

from control.model.service import Protocol

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
