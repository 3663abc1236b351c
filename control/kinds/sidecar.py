"""Istio's Sidecar."""

from __future__ import annotations

from control.kinds.common import Meta
from control.kinds.destination_rule import connection_pool
from control.kinds.fields import Fields
from control.kinds.gateway import server_tls
from control.model.protocols import PROTOCOL_NAMES, protocol_of
from control.model.security import ROOT_NAMESPACE
from control.model.service import Ingress, Protocol
from control.model.sidecar import ANY, OWN, UNIX, Egress, Imports, Sidecar, Speaks, Unknown
from control.names import is_ip
from meshproxy.api.errors import UNSUPPORTED

_NOWHERE = "~"
_LONGEST_PATH = 108  # of a Unix socket, with the zero at its end


def parse(meta: Meta, body: Fields) -> Sidecar:
    """`spec` of a Sidecar."""
    spec = body.child("spec") or Fields({})
    selector = spec.child("workloadSelector")
    labels = selector.string_map("labels") or None if selector is not None else None
    listeners = spec.each("egress", _egress)
    egress = [one for some, _ in listeners for one in some]
    places: set[tuple[str, int]] = set()
    for index, (_, listener) in enumerate(listeners):
        if listener is not None:
            if (listener.bind, listener.port) in places:
                spec.error(f"egress[{index}].port", f"there is a listener on {listener.routes} already")
            places.add((listener.bind, listener.port))
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
        connection_pool(spec.child("inboundConnectionPool")),
        tuple(listener for _, listener in listeners if listener is not None),
    )


def _egress(fields: Fields) -> tuple[list[tuple[str, str]], Egress | None]:
    """(namespace, host) of a listener, none for those of no namespace; and the listener, if it is on a port of its own."""
    hosts = _imported(fields)
    _check_capture(fields)
    port, bind = fields.child("port"), fields.text("bind")
    if port is None:
        if bind:
            fields.error("bind", "needs a port: sidecars listen where that says")
        return hosts, None
    port.not_honoured("targetPort", why="Istio does not look at it, either")
    port.text("name")
    word = port.text("protocol", required=True)
    speaks = _speaks(word)
    if speaks is None and word:
        port.error("protocol", f"{word!r} is not one of HTTP_PROXY, {', '.join(PROTOCOL_NAMES)}")
    number = port.integer("number", 0, high=65535) or 0
    if bind.startswith(UNIX):
        bind = bind.removeprefix(UNIX)
        if not _is_path(bind):
            fields.error("bind", f"{bind!r} is no path of a Unix socket")
        if number:
            port.error("number", "must be 0 for a Unix socket")
    elif bind and not is_ip(bind):
        fields.error("bind", f"{bind!r} is neither an IP address nor {UNIX}PATH")
    elif not number:
        port.error("number", f"is needed, or a bind of {UNIX}PATH")
    return hosts, Egress(number, speaks or Speaks.TCP, bind, Imports(tuple(sorted(set(hosts)))))


def _speaks(word: str) -> Speaks | None:
    if word.upper() in ("HTTP_PROXY", "TLS", "HTTPS"):
        return Speaks.HTTP_PROXY if word.upper() == "HTTP_PROXY" else Speaks.TLS
    protocol = protocol_of(word)
    return None if protocol is None else Speaks.HTTP if protocol.is_http else Speaks.TCP


def _check_capture(fields: Fields) -> None:
    if fields.text("captureMode", "DEFAULT", choices=("DEFAULT", "IPTABLES", "NONE")) == "IPTABLES":
        fields.error("captureMode", "IPTABLES: traffic is not captured here, sidecars listen for it; NONE, or nothing, says so", UNSUPPORTED)


def _is_path(path: str) -> bool:
    return path.startswith("/") and len(path.encode()) < _LONGEST_PATH


def _imported(fields: Fields) -> list[tuple[str, str]]:
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
    _check_capture(fields)
    tls = fields.child("tls")
    ends = server_tls(tls) if tls is not None else None
    if tls is not None and ends is not None:
        if ends.mode not in ("SIMPLE", "MUTUAL"):
            tls.error("mode", f"{ends.mode} is not for a Sidecar; SIMPLE and MUTUAL are", UNSUPPORTED)
        elif ends.credentials or ends.ca is not None:
            tls.error("credentialName", "Secrets are for gateways; serverCertificate and privateKey name files of the workload's machine", UNSUPPORTED)
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
    number, pool = port.port("number", required=True), connection_pool(fields.child("connectionPool"))
    return Ingress(number, protocol or Protocol.TCP, bind, _endpoint(fields), pool, ends)


def _endpoint(fields: Fields) -> tuple[str, int] | None:
    """Where the application listens: of this host, as Istio allows it, or a Unix socket."""
    text = fields.text("defaultEndpoint")
    if not text:
        return None
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if _is_path(path):
            return path, 0
    host, _, number = text.rpartition(":")
    if number.isascii() and number.isdigit() and 0 < int(number[:6]) < 65536:
        if host in ("0.0.0.0", "[::]"):
            return "", int(number)
        if host in ("127.0.0.1", "[::1]", ""):
            return host.strip("[]") or "127.0.0.1", int(number)
    fields.error("defaultEndpoint", f"{text!r} is none of 127.0.0.1:PORT, [::1]:PORT, 0.0.0.0:PORT, [::]:PORT, unix:///PATH")
    return None


def unknown_of(fields: Fields | None) -> Unknown | None:
    """An OutboundTrafficPolicy."""
    if fields is None:
        return None
    fields.not_honoured("egressProxy")
    return Unknown(fields.text("mode", "REGISTRY_ONLY", choices=[one.value for one in Unknown]))
