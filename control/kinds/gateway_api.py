"""The Gateway API's Gateway and BackendTLSPolicy."""

from __future__ import annotations

from dataclasses import replace

from control.kinds.common import Meta, host_of, label_selector
from control.kinds.fields import Fields
from control.kinds.gateway import share_a_port
from control.model.backend_tls import BackendTls
from control.model.gateway import GATEWAY_API, PASSTHROUGH, Gateway, GatewayServer, SecretRef, ServerTls
from control.model.service import Protocol
from control.names import is_ip, service_host

GROUP = GATEWAY_API
GATEWAY_NAME = f"{GROUP}/gateway-name"  # the label of workloads that serve a Gateway
_KINDS_OF = {"HTTP": ("HTTPRoute", "GRPCRoute"), "HTTPS": ("HTTPRoute", "GRPCRoute"), "TLS": ("TLSRoute", "TCPRoute"), "TCP": ("TCPRoute",)}
_TERMINATE_MODE = "gateway.istio.io/tls-terminate-mode"  # an option of Istio's


def parse_gateway(meta: Meta, body: Fields) -> Gateway:
    """`spec` of a Gateway: it is served by workloads of its namespace with the label GATEWAY_NAME."""
    spec = body.need("spec")
    spec.not_honoured("allowedListeners", "backendTLS")
    spec.text("gatewayClassName", required=True)
    infrastructure = spec.child("infrastructure")
    if infrastructure is not None:  # of what a cluster would make for it; here, nothing is made
        infrastructure.string_map("labels")
        infrastructure.string_map("annotations")
        infrastructure.not_honoured("parametersRef", why="there are no parameters of gateways")
    clients, certificate = _Clients(meta, None), None
    tls = spec.child("tls")
    if tls is not None:
        clients = _Clients(meta, tls.child("frontend"))
        backend = tls.child("backend")
        shown = backend.child("clientCertificateRef") if backend is not None else None
        certificate = _certificate(meta, shown) if shown is not None else None
    servers = spec.each("listeners", lambda fields: _listener(meta, fields, clients), required=True)
    for index, server in enumerate(servers):
        if any(server.name == other.name for other in servers[:index]):
            spec.error(f"listeners[{index}].name", f"there are two listeners {server.name!r}")
        if any(server.port == other.port and not share_a_port(other, server) for other in servers[:index]):
            spec.error(f"listeners[{index}].port", f"there is a listener on {server.port} that connections could not be told apart from")
    addresses = spec.each("addresses", _address)
    if addresses:
        servers = tuple(replace(server, bind=address) for address in dict.fromkeys(addresses) for server in servers)
    return Gateway(meta.name, meta.namespace, {GATEWAY_NAME: meta.name}, servers, anywhere=False, certificate=certificate)


def _address(fields: Fields) -> str | None:
    """Where listeners are; None for any address, which is what they have without."""
    kind, value = fields.text("type", "IPAddress"), fields.text("value")
    if kind != "IPAddress":
        fields.error("type", f"{kind} is not served, only IPAddress", "unsupported")
    elif value and not is_ip(value):
        fields.error("value", f"{value!r} is no IP address")
    return value or None


class _Clients:
    """What a Gateway says about certificates of clients: the authorities that they must be from, by port; 0 is for all other ports."""

    def __init__(self, meta: Meta, fields: Fields | None) -> None:
        self._meta = meta
        self._by_port: dict[int, tuple[SecretRef, ...]] = {}
        if fields is None:
            return
        default = fields.child("default")
        if default is not None:
            self._by_port[0] = self._validation(default)
        for port, found in fields.each("perPort", lambda one: (one.port("port", required=True), self._validation(one.need("tls")))):
            if port in self._by_port:
                fields.error("perPort", f"there are two of port {port}")
            self._by_port[port] = found

    def _validation(self, fields: Fields) -> tuple[SecretRef, ...]:
        validation = fields.child("validation")
        if validation is None:
            return ()
        if validation.text("mode", "AllowValidOnly", choices=("AllowValidOnly", "AllowInsecureFallback")) == "AllowInsecureFallback":
            validation.error("mode", "AllowInsecureFallback is not served: our sidecar cannot take certificates that it does not trust", "unsupported")
        return validation.each("caCertificateRefs", self._bundle, required=True)

    def _bundle(self, fields: Fields) -> SecretRef:
        return SecretRef(_config_map(fields), fields.text("namespace", self._meta.namespace))

    def ask(self, port: int, tls: ServerTls) -> ServerTls:
        """TLS as it is for a listener of HTTPS on a port."""
        bundles = self._by_port.get(port, self._by_port.get(0, ()))
        return replace(tls, mode="MUTUAL", bundles=bundles) if bundles and tls.mode == "SIMPLE" else tls


def _listener(meta: Meta, fields: Fields, clients: _Clients) -> GatewayServer:
    word = fields.text("protocol", required=True, choices=("HTTP", "HTTPS", "TLS", "TCP", "UDP"))
    if word == "UDP":
        fields.error("protocol", f"{word} is not served", "unsupported")
    tls = fields.child("tls")
    made = None
    if word in ("HTTPS", "TLS"):
        made = _listener_tls(meta, tls, word) if tls is not None else None
        if tls is None:
            fields.error("tls", f"is needed for {word}")
    elif tls is not None:
        tls.rest()
        fields.error("tls", f"{word} is without TLS")
    port = fields.port("port", required=True)
    if word == "HTTPS" and made is not None:
        made = clients.ask(port, made)
    namespace, kinds, selector = meta.namespace, list(_KINDS_OF.get(word, ())), None
    allowed = fields.child("allowedRoutes")
    if allowed is not None:
        if "kinds" in allowed:
            kinds = [kind for kind in allowed.each("kinds", _route_kind) if kind in kinds]
            if not kinds:
                allowed.error("kinds", f"none of them can be routes of {word}")
        namespaces = allowed.child("namespaces")
        if namespaces is not None:
            where = namespaces.text("from", "Same", choices=("All", "Same", "Selector", "None"))
            namespace = {"All": "*", "None": ""}.get(where, namespace)
            chosen = namespaces.child("selector", required=where == "Selector")
            if chosen is not None:
                selector = label_selector(chosen)
            if where != "Selector":
                selector = None
    host = host_of(fields, "hostname", fields.text("hostname") or "*")
    protocol = Protocol.HTTP if word in ("HTTP", "HTTPS") else Protocol.TCP
    name = fields.text("name", required=True)
    return GatewayServer(name, port, protocol, ((namespace, host),), made, kinds=tuple(kinds), selector=selector)


def _route_kind(fields: Fields) -> str:
    group, kind = fields.text("group", GROUP), fields.text("kind", required=True)
    return kind if group == GROUP else ""


def _listener_tls(meta: Meta, fields: Fields, protocol: str) -> ServerTls:
    fields.not_honoured("frontendValidation", why="is no longer part of the API; use the Gateway's tls.frontend")
    mode = fields.text("mode", "Terminate", choices=("Terminate", "Passthrough"))
    references = fields.each("certificateRefs", lambda one: _certificate(meta, one))
    options = fields.child("options")
    kind = "SIMPLE"
    if options is not None:
        kind = options.text(_TERMINATE_MODE, kind, choices=("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL", "ISTIO_MUTUAL"))
    if mode == "Passthrough":
        if protocol == "HTTPS":
            fields.error("mode", "Passthrough is for listeners of TLS")
        return ServerTls(PASSTHROUGH)
    if not references and kind != "ISTIO_MUTUAL":
        fields.error("certificateRefs", "is needed to end TLS here")
    if len(references) > 2:
        fields.error("certificateRefs", "at most two, one with RSA and one with ECDSA", "unsupported")
    return ServerTls(kind, references)


def _certificate(meta: Meta, fields: Fields) -> SecretRef:
    group, kind = fields.text("group"), fields.text("kind", "Secret")
    if (group, kind) != ("", "Secret"):
        fields.error("kind", f"{kind} of {group or 'core'} is no certificate that meshctl serves", "unsupported")
    return SecretRef(fields.text("name", required=True), fields.text("namespace", meta.namespace))


def parse_backend_tls(meta: Meta, body: Fields) -> BackendTls:
    """`spec` of a BackendTLSPolicy."""
    spec = body.need("spec")
    spec.not_honoured("options")
    targets = spec.each("targetRefs", lambda one: _target(meta, one), required=True)
    validation = spec.need("validation")
    which = validation.one_of("caCertificateRefs", "wellKnownCACertificates", required=True)
    validation.text("wellKnownCACertificates", choices=("System",))
    bundles = validation.each("caCertificateRefs", _config_map)
    if which == "caCertificateRefs" and not bundles:
        validation.error("caCertificateRefs", "must not be empty")
    hostname = validation.text("hostname", required=True)
    names = validation.each("subjectAltNames", _subject_alt_name)
    return BackendTls(meta.name, meta.namespace, targets, hostname, names, bundles)


def _target(meta: Meta, fields: Fields) -> tuple[str, str]:
    group, kind = fields.text("group"), fields.text("kind", required=True)
    if (group, kind) != ("", "Service"):
        fields.error("kind", f"{kind} of {group or 'core'} is nothing that meshctl serves policies for", "unsupported")
    return service_host(fields.text("name", required=True), meta.namespace), fields.text("sectionName")


def _config_map(fields: Fields) -> str:
    group, kind = fields.text("group"), fields.text("kind", required=True)
    if (group, kind) != ("", "ConfigMap"):
        fields.error("kind", f"{kind} of {group or 'core'}: only ConfigMaps are served", "unsupported")
    return fields.text("name", required=True)


def _subject_alt_name(fields: Fields) -> str:
    kind = fields.text("type", required=True, choices=("Hostname", "URI"))
    hostname, uri = fields.text("hostname", required=kind == "Hostname"), fields.text("uri", required=kind == "URI")
    return hostname or uri
