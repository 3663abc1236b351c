"""Istio's Gateway."""

from __future__ import annotations

from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.model.gateway import Gateway, GatewayServer
from control.model.protocols import protocol_of
from control.model.service import Protocol

_PROTOCOLS = ("HTTP", "HTTP2", "GRPC", "GRPC-WEB", "TCP", "MONGO")
_TLS = ("HTTPS", "TLS")


def parse(meta: Meta, body: Fields) -> Gateway:
    """`spec` of a Gateway."""
    spec = body.need("spec")
    servers = spec.each("servers", lambda fields: _server(meta, fields), required=True)
    seen: set[int] = set()
    for index, server in enumerate(servers):
        if server.port in seen and not server.protocol.is_http:
            spec.error(f"servers[{index}].port.number", f"there is a server on {server.port} already")
        seen.add(server.port)
    return Gateway(meta.name, meta.namespace, spec.string_map("selector"), servers)


def _server(meta: Meta, fields: Fields) -> GatewayServer:
    fields.not_honoured("bind", "defaultEndpoint", "tls")
    port = fields.need("port")
    port.not_honoured("targetPort")
    word = port.text("protocol", required=True).upper()
    if word in _TLS:
        port.error("protocol", f"{word} is not served yet", "unsupported")
    elif word not in _PROTOCOLS:
        port.error("protocol", f"{word!r} is not one of {', '.join(_PROTOCOLS + _TLS)}")
    hosts = []
    for index, host in enumerate(fields.texts("hosts", required=True)):
        namespace, slash, name = host.rpartition("/")
        if slash and not namespace:
            fields.error(f"hosts[{index}]", f"{host!r} has an empty namespace")
        hosts.append(({"": "*", ".": meta.namespace}.get(namespace, namespace), name))
    name = port.text("name", required=True)
    fields.text("name")
    return GatewayServer(name, port.port("number", required=True), protocol_of(word) or Protocol.TCP, tuple(hosts))
