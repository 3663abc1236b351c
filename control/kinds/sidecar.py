"""Istio's Sidecar."""

from __future__ import annotations

from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.model.protocols import PROTOCOL_NAMES, protocol_of
from control.model.security import ROOT_NAMESPACE
from control.model.service import Ingress, Protocol
from control.model.sidecar import ANY, OWN, Imports, Sidecar, Unknown
from control.names import is_ip

_NOWHERE = "~"
_UNIX = "unix://"


def parse(meta: Meta, body: Fields) -> Sidecar:
    """`spec` of a Sidecar."""
    spec = body.child("spec") or Fields({})
    spec.not_honoured("inboundConnectionPool")
    selector = spec.child("workloadSelector")
    labels = selector.string_map("labels") or None if selector is not None else None
    egress = [one for some in spec.each("egress", _egress) for one in some]
    ingress = spec.each("ingress", _ingress)
    seen: set[int] = set()
    for index, one in enumerate(ingress):
        if one.port in seen:
            spec.error(f"ingress[{index}].port.number", f"there is a listener on {one.port} already")
        seen.add(one.port)
    if ingress and labels is None and meta.namespace == ROOT_NAMESPACE:
        spec.error("ingress", f"needs a workloadSelector: a Sidecar of {ROOT_NAMESPACE} without one is for every workload of the mesh")
    return Sidecar(
        meta.name,
        meta.namespace,
        labels,
        Imports(tuple(sorted(set(egress)))) if "egress" in spec else None,
        ingress or None,
        unknown_of(spec.child("outboundTrafficPolicy")),
    )


def _egress(fields: Fields) -> list[tuple[str, str]]:
    """(namespace, host) of a listener; none for those of no namespace."""
    fields.not_honoured("port", "bind", "tls", why="listeners for some of the services are ports of the Workload: its sidecar.outbound and httpProxy")
    fields.not_honoured("captureMode", why="traffic is not captured here")
    found = []
    for index, text in enumerate(fields.texts("hosts", required=True)):
        namespace, slash, host = text.partition("/")
        if not slash or not namespace or not host or "/" in host:
            fields.error(f"hosts[{index}]", f"{text!r} is not a namespace and a host, such as ./* or shop/reviews.shop.svc.cluster.local")
        elif host != ANY and ("." not in host or "*" in host.removeprefix("*.") or host == "*."):
            fields.error(f"hosts[{index}]", f"{host!r} is neither *, nor *.SUFFIX, nor a whole host name such as reviews.shop.svc.cluster.local")
        elif namespace not in (ANY, OWN, _NOWHERE) and "*" in namespace:
            fields.error(f"hosts[{index}]", f"{namespace!r} is neither a namespace, nor one of *, ., ~")
        elif namespace != _NOWHERE:
            found.append((namespace, host))
    return found


def _ingress(fields: Fields) -> Ingress:
    fields.not_honoured("tls", "connectionPool")
    fields.not_honoured("captureMode", why="traffic is not captured here")
    port = fields.need("port")
    port.not_honoured("targetPort")
    port.text("name")
    word = port.text("protocol", required=True)
    protocol = protocol_of(word)
    if protocol is None and word:
        port.error("protocol", f"{word!r} is not one of {', '.join(PROTOCOL_NAMES)}")
    bind = fields.text("bind")
    if bind and not is_ip(bind):
        fields.error("bind", f"{bind!r} is no IP address")
    return Ingress(port.port("number", required=True), protocol or Protocol.TCP, bind, _endpoint(fields))


def _endpoint(fields: Fields) -> tuple[str, int] | None:
    """Where the application listens: of this host, as Istio allows it, or a Unix socket."""
    text = fields.text("defaultEndpoint")
    if not text:
        return None
    if text.startswith(_UNIX):
        path = text.removeprefix(_UNIX)
        if path.startswith("/") and len(path) < 108:
            return path, 0
    host, _, number = text.rpartition(":")
    if number.isascii() and number.isdigit() and 0 < int(number[:6]) < 65536:
        if host in ("0.0.0.0", "[::]"):
            return "", int(number)
        if host in ("127.0.0.1", "[::1]"):
            return host.strip("[]"), int(number)
    fields.error("defaultEndpoint", f"{text!r} is none of 127.0.0.1:PORT, [::1]:PORT, 0.0.0.0:PORT, [::]:PORT, unix:///PATH")
    return None


def unknown_of(fields: Fields | None) -> Unknown | None:
    """An OutboundTrafficPolicy."""
    if fields is None:
        return None
    fields.not_honoured("egressProxy")
    return Unknown(fields.text("mode", "REGISTRY_ONLY", choices=[one.value for one in Unknown]))
