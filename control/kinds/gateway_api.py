"""The Gateway API's Gateway and BackendTLSPolicy."""

from __future__ import annotations

from dataclasses import replace

from control.kinds.common import Meta, host_of, label_selector
from control.kinds.fields import Fields
from control.model.backend_tls import BackendTls
from control.model.gateway import GATEWAY_API, PASSTHROUGH, Gateway, GatewayServer, Refused, SecretRef, ServerTls, conflict
from control.model.labels import LabelSelector
from control.model.listener_set import ListenerSet
from control.model.service import Protocol
from control.names import is_ip, service_host

GROUP = GATEWAY_API
GATEWAY_NAME = f"{GROUP}/gateway-name"  # the label of workloads that serve a Gateway
LISTENER_SETS = ((GROUP, "ListenerSet"), ("gateway.networking.x-k8s.io", "XListenerSet"))  # the second is what it was called in experiments
_KINDS_OF = {"HTTP": ("HTTPRoute", "GRPCRoute"), "HTTPS": ("HTTPRoute", "GRPCRoute"), "TLS": ("TLSRoute", "TCPRoute"), "TCP": ("TCPRoute",)}
_TERMINATE_MODE = "gateway.istio.io/tls-terminate-mode"  # an option of Istio's


def parse_gateway(meta: Meta, body: Fields) -> Gateway:
    """`spec` of a Gateway: it is served by workloads of its namespace with the label GATEWAY_NAME."""
    spec = body.need("spec")
    spec.not_honoured("backendTLS")
    spec.text("gatewayClassName", required=True)
    infrastructure = spec.child("infrastructure")
    if infrastructure is not None:  # of what a cluster would make for it; here, nothing is made
        infrastructure.string_map("labels")
        infrastructure.string_map("annotations")
        infrastructure.not_honoured("parametersRef", why="there are no parameters of gateways")
    clients, certificate = _clients(meta, None), None
    tls = spec.child("tls")
    if tls is not None:
        clients = _clients(meta, tls.child("frontend"))
        backend = tls.child("backend")
        shown = backend.child("clientCertificateRef") if backend is not None else None
        certificate = _certificate(meta, shown) if shown is not None else None
    servers, refused = _listeners(meta, spec, required="allowedListeners" not in spec)
    addresses = spec.each("addresses", _address)
    if addresses:
        servers = tuple(replace(server, bind=address) for address in dict.fromkeys(addresses) for server in servers)
    made = Gateway(
        meta.name,
        meta.namespace,
        {GATEWAY_NAME: meta.name},
        servers,
        anywhere=False,
        certificate=certificate,
        clients=clients,
        allowed_sets=_allowed_sets(spec.child("allowedListeners")),
        refused=refused,
    )
    return replace(made, servers=tuple(replace(server, tls=made.asking(server)) for server in servers))


def _allowed_sets(fields: Fields | None) -> tuple[str, LabelSelector | None]:
    namespaces = fields.child("namespaces") if fields is not None else None
    if namespaces is None:
        return "None", None
    where = namespaces.text("from", "None", choices=("All", "Same", "Selector", "None"))
    chosen = namespaces.child("selector", required=where == "Selector")
    return where, label_selector(chosen) if chosen is not None else None


def parse_listener_set(meta: Meta, body: Fields) -> ListenerSet:
    """`spec` of a ListenerSet, or of the XListenerSet that it was."""
    spec = body.need("spec")
    parent = spec.need("parentRef")
    group, kind = parent.text("group", GROUP), parent.text("kind", "Gateway")
    if (group, kind) != (GROUP, "Gateway"):
        parent.error("kind", f"{kind} of {group or 'core'} is no Gateway")
    at = parent.text("namespace", meta.namespace), parent.text("name", required=True)
    own, _, _ = body.text("apiVersion").partition("/")
    servers, refused = _listeners(meta, spec)
    return ListenerSet(meta.name, meta.namespace, at, servers, own, body.text("kind"), refused, meta.created)


def _listeners(meta: Meta, spec: Fields, *, required: bool = True) -> tuple[tuple[GatewayServer, ...], tuple[Refused, ...]]:
    """Those that can be served, and the others. Of those that cannot be on a port together, the first counts."""
    servers: list[GatewayServer] = []
    refused: list[Refused] = []
    read: tuple[GatewayServer | Refused, ...] = spec.each("listeners", lambda fields: _listener(meta, fields), required=required)
    for index, one in enumerate(read):
        if any(one.name == other.name for other in read[:index]):
            spec.error(f"listeners[{index}].name", f"there are two listeners {one.name!r}")
        if isinstance(one, Refused):
            refused.append(one)
        elif reason := next(filter(None, (conflict(other, one) for other in servers)), ""):
            why = f"there is a listener on {one.port} that requests or connections could not be told apart from"
            spec.flaw(f"listeners[{index}].port", why)
            refused.append(Refused(one.name, "Conflicted", reason, why))
        else:
            servers.append(one)
    return tuple(servers), tuple(refused)


def _address(fields: Fields) -> str | None:
    """Where listeners are; None for any address, which is what they have without."""
    kind, value = fields.text("type", "IPAddress"), fields.text("value")
    if kind != "IPAddress":
        fields.error("type", f"{kind} is not served, only IPAddress", "unsupported")
    elif value and not is_ip(value):
        fields.error("value", f"{value!r} is no IP address")
    return value or None


def _clients(meta: Meta, fields: Fields | None) -> dict[int, tuple[SecretRef, ...]]:
    """What a Gateway says about certificates of clients: the authorities that they must be from, by port; 0 is for all other ports."""
    found: dict[int, tuple[SecretRef, ...]] = {}
    if fields is None:
        return found
    default = fields.child("default")
    if default is not None:
        found[0] = _validation(meta, default)
    for port, bundles in fields.each("perPort", lambda one: (one.port("port", required=True), _validation(meta, one.need("tls")))):
        if port in found:
            fields.error("perPort", f"there are two of port {port}")
        found[port] = bundles
    return found


def _validation(meta: Meta, fields: Fields) -> tuple[SecretRef, ...]:
    validation = fields.child("validation")
    if validation is None:
        return ()
    if validation.text("mode", "AllowValidOnly", choices=("AllowValidOnly", "AllowInsecureFallback")) == "AllowInsecureFallback":
        validation.error("mode", "AllowInsecureFallback is not served: our sidecar cannot take certificates that it does not trust", "unsupported")
    return validation.each("caCertificateRefs", lambda one: SecretRef(_config_map(one), one.text("namespace", meta.namespace)), required=True)


def _listener(meta: Meta, fields: Fields) -> GatewayServer | Refused:
    word, name = fields.text("protocol", required=True), fields.text("name", required=True)
    if word and word not in _KINDS_OF:
        why = f"{word} is not served, only {', '.join(_KINDS_OF)}"
        fields.flaw("protocol", why)
        fields.rest()
        return Refused(name, "Accepted", "UnsupportedProtocol", why)
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
    namespace, kinds, selector = meta.namespace, list(_KINDS_OF.get(word, ()) if made is None or made.is_terminated else ("TLSRoute",)), None
    allowed = fields.child("allowedRoutes")
    if allowed is not None:
        if "kinds" in allowed:
            asked = allowed.each("kinds", _route_kind)
            for index, kind in enumerate(asked):
                if kind not in kinds:
                    allowed.flaw(f"kinds[{index}]", f"this is no kind of routes of {word}")
            kinds = [kind for kind in asked if kind in kinds]
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
        fields.flaw("kind", f"{kind} of {group or 'core'} is no certificate that meshctl serves")
        fields.ignore("name", "namespace")
        return SecretRef("", meta.namespace)
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
    return BackendTls(meta.name, meta.namespace, targets, hostname, names, bundles, meta.created)


def _target(meta: Meta, fields: Fields) -> tuple[str, str]:
    group, kind = fields.text("group"), fields.text("kind", required=True)
    if (group, kind) != ("", "Service"):
        fields.error("kind", f"{kind} of {group or 'core'} is nothing that meshctl serves policies for", "unsupported")
    return service_host(fields.text("name", required=True), meta.namespace), fields.text("sectionName")


def _config_map(fields: Fields) -> str:
    group, kind = fields.text("group"), fields.text("kind", required=True)
    if (group, kind) != ("", "ConfigMap"):
        fields.flaw("kind", f"{kind} of {group or 'core'}: only ConfigMaps are served")
        fields.ignore("name")
        return ""
    return fields.text("name", required=True)


def _subject_alt_name(fields: Fields) -> str:
    kind = fields.text("type", required=True, choices=("Hostname", "URI"))
    hostname, uri = fields.text("hostname", required=kind == "Hostname"), fields.text("uri", required=kind == "URI")
    return hostname or uri
