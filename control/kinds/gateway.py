"""Istio's Gateway."""

from __future__ import annotations

from control.kinds.common import Meta, host_of
from control.kinds.fields import Fields
from control.model.gateway import AUTO_PASSTHROUGH, PASSTHROUGH, Gateway, GatewayServer, SecretRef, ServerTls, share_a_port
from control.model.protocols import protocol_of
from control.model.service import Protocol
from control.names import is_ip

_PROTOCOLS = ("HTTP", "HTTP2", "GRPC", "GRPC-WEB", "TCP", "MONGO")
_TLS = ("HTTPS", "TLS")
_ASKS = ("MUTUAL", "OPTIONAL_MUTUAL")
_MODES = ("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL", "ISTIO_MUTUAL", PASSTHROUGH, AUTO_PASSTHROUGH)
_VERSIONS = {"TLS_AUTO": "", "TLSV1_0": "TLSv1_0", "TLSV1_1": "TLSv1_1", "TLSV1_2": "TLSv1_2", "TLSV1_3": "TLSv1_3"}
# What Istio takes, of what BoringSSL knows.
CIPHER_SUITES = tuple(
    "ECDHE-ECDSA-AES128-GCM-SHA256 ECDHE-RSA-AES128-GCM-SHA256 ECDHE-ECDSA-AES256-GCM-SHA384 ECDHE-RSA-AES256-GCM-SHA384 ECDHE-ECDSA-CHACHA20-POLY1305 "
    "ECDHE-RSA-CHACHA20-POLY1305 ECDHE-ECDSA-AES128-SHA ECDHE-RSA-AES128-SHA ECDHE-ECDSA-AES256-SHA ECDHE-RSA-AES256-SHA AES128-GCM-SHA256 "
    "AES256-GCM-SHA384 AES128-SHA AES256-SHA".split()
)


def parse(meta: Meta, body: Fields) -> Gateway:
    """`spec` of a Gateway."""
    spec = body.need("spec")
    servers = spec.each("servers", lambda fields: _server(meta, fields), required=True)
    seen: dict[tuple[str, int], GatewayServer] = {}
    for index, server in enumerate(servers):
        first = seen.setdefault(server.place, server)
        if first is not server and not share_a_port(first, server):
            spec.error(f"servers[{index}].port.number", f"there is a server on {server.port} already")
    return Gateway(meta.name, meta.namespace, spec.string_map("selector"), servers)


def _server(meta: Meta, fields: Fields) -> GatewayServer:
    fields.not_honoured("defaultEndpoint", why="Istio's gateways do without, too")
    port = fields.need("port")
    bind = fields.text("bind")
    if bind and not is_ip(bind):
        fields.error("bind", f"{bind!r} is no IP address", "unsupported")
    word = port.text("protocol", required=True).upper()
    if word not in _PROTOCOLS + _TLS:
        port.error("protocol", f"{word!r} is not one of {', '.join(_PROTOCOLS + _TLS)}")
    tls = fields.child("tls")
    redirect = bool(tls.boolean("httpsRedirect")) if tls is not None else False
    made = None
    if word in _TLS:
        made = server_tls(tls) if tls is not None else None
        if tls is None:
            fields.error("tls", f"is needed for {word}")
        elif redirect:
            tls.error("httpsRedirect", f"is for plain HTTP, not for {word}")
    elif tls is not None and tls.names() and tls.names() != ["httpsRedirect"]:
        tls.rest()
        tls.error("", f"{word} is without TLS; the protocol must be HTTPS or TLS")
    elif redirect and not word.startswith(("HTTP", "GRPC")):
        fields.error("tls.httpsRedirect", f"is for HTTP, not for {word}")
    hosts = []
    for index, host in enumerate(fields.texts("hosts", required=True)):
        namespace, slash, name = host.rpartition("/")
        if slash and not namespace:
            fields.error(f"hosts[{index}]", f"{host!r} has an empty namespace")
        hosts.append(({"": "*", ".": meta.namespace}.get(namespace, namespace), host_of(fields, f"hosts[{index}]", name)))
    name = port.text("name", required=True)
    fields.text("name")
    protocol = Protocol.HTTP if word == "HTTPS" and made is not None and made.is_terminated else protocol_of(word) or Protocol.TCP
    return GatewayServer(name, port.port("number", required=True), protocol, tuple(hosts), made, redirect, bind=bind, target=port.port("targetPort"))


def server_tls(fields: Fields) -> ServerTls:
    """Istio's ServerTLSSettings."""
    mode = fields.text("mode", PASSTHROUGH, choices=_MODES)
    fields.one_of("credentialName", "credentialNames", "serverCertificate", "tlsCertificates")
    pair, ca_file, crl_file = _certificate_files(fields), fields.text("caCertificates"), fields.text("caCrl")
    files = fields.each("tlsCertificates", _certificate_files) or ((pair,) if pair is not None else ())
    credentials = fields.texts("credentialNames") or tuple(filter(None, [fields.text("credentialName")]))
    ca = fields.text("caCertCredentialName")
    for name in (*credentials, ca):
        if "://" in name or "/" in name:
            fields.error("credentialName", f"{name!r}: only names of Secrets are served", "unsupported")
    ends = mode in ("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL")
    if ends and not credentials and not files:
        fields.error("credentialName", f"is needed for {mode}, or serverCertificate and privateKey")
    for name, several in (("credentialNames", len(credentials)), ("tlsCertificates", len(files))):
        if several > 2:
            fields.error(name, "at most two, one with RSA and one with ECDSA")
    if files and not ends:
        fields.error("serverCertificate", f"is not for {mode}")
    if files and mode in _ASKS and not ca_file:
        fields.error("caCertificates", f"is needed for {mode}")
    for name, file in (("caCertificates", ca_file), ("caCrl", crl_file)):
        if file and credentials:
            fields.error(name, "cannot go with credentialName, which is a Secret that has it")
    if crl_file and not ca_file and not credentials:
        fields.error("caCrl", "needs caCertificates")
    suites = fields.texts("cipherSuites")
    for index, suite in enumerate(suites):
        if suite not in CIPHER_SUITES:
            fields.error(f"cipherSuites[{index}]", f"{suite!r} is not one of {', '.join(CIPHER_SUITES)}")
    low = _VERSIONS[fields.text("minProtocolVersion", "TLS_AUTO", choices=_VERSIONS)]
    high = _VERSIONS[fields.text("maxProtocolVersion", "TLS_AUTO", choices=_VERSIONS)]
    if high and (low or "TLSv1_2") > high:
        fields.error("maxProtocolVersion", f"is older than minProtocolVersion{'' if low else ', which is TLSV1_2'}")
    names = fields.texts("subjectAltNames")
    spki, hashes = fields.texts("verifyCertificateSpki"), fields.texts("verifyCertificateHash")
    if mode not in _ASKS:
        checks = {
            "subjectAltNames": names,
            "verifyCertificateSpki": spki,
            "verifyCertificateHash": hashes,
            "caCertCredentialName": ca,
            "caCertificates": ca_file,
        }
        for field, there in checks.items():
            if there:
                fields.error(field, f"is about certificates of clients, which {mode} does not ask for", "unsupported")
    return ServerTls(
        mode,
        tuple(SecretRef(name) for name in credentials),
        SecretRef(ca) if ca else None,
        names,
        spki,
        hashes,
        low,
        high,
        tuple(dict.fromkeys(suites)),
        files,
        ca_file,
        crl_file,
    )


def _certificate_files(fields: Fields) -> tuple[str, str] | None:
    """Paths of a certificate and its key."""
    if "serverCertificate" not in fields and "privateKey" not in fields:
        return None
    return fields.text("serverCertificate", required=True), fields.text("privateKey", required=True)
