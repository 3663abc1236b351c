"""TLS contexts: what is refused, what a handshake checks, what it counts, what its failure says. Against OpenSSL's own client and server in memory."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.net import tickets, tls
from meshproxy.net.tls_stats import failure_text
from meshproxy.net.tls_verify import dns_match, signs
from meshproxy.observe.stats import Store
from tests.unit.net_help import client_context, downstream_tls, message, own, pki, upstream_tls

DOWNSTREAM = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
UPSTREAM = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
SPIFFE = {"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://mesh/ns/c/"}}]}
OTHER_NAME = {"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "other.example.com"}}]}
TLS13 = {"tls_maximum_protocol_version": "TLSv1_3"}


def downstream(*certificates: str, **fields: Any) -> tuple[tls.DownstreamTls, Store]:
    store = Store()
    return tls.compile_downstream(message(DOWNSTREAM, downstream_tls(*certificates, **fields)), store.scope("listener.l.")), store


def upstream(**fields: Any) -> tuple[tls.UpstreamTls, Store]:
    store = Store()
    return tls.compile_upstream(message(UPSTREAM, upstream_tls(**fields)), store.scope("cluster.c.")), store


class Pair:
    """A client and a server connected in memory."""

    def __init__(self, client: ssl.SSLContext | tls.UpstreamTls, server: ssl.SSLContext, name: str | None = "server.example.com", **wrap: Any) -> None:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap(down, up, **wrap) if isinstance(client, tls.UpstreamTls) else client.wrap_bio(down, up, server_hostname=name, **wrap)
        self.server = server.wrap_bio(up, down, server_side=True)

    def shake(self) -> tuple[Exception | None, Exception | None]:
        """Run the handshakes to their ends; what each side failed with."""
        errors: list[Exception | None] = [None, None]
        for _ in range(6):
            for at, side in enumerate((self.client, self.server)):
                try:
                    if errors[at] is None:
                        side.do_handshake()
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    errors[at] = error
        return errors[0], errors[1]


def serve(server: tls.DownstreamTls, client: ssl.SSLContext, name: str | None = "server.example.com") -> tuple[Pair, Exception | None]:
    pair = Pair(client, server.context, name)
    return pair, pair.shake()[1]


def call(client: tls.UpstreamTls, certificate: str = "server", *, client_ca: bool = False, **wrap: Any) -> tuple[Pair, Exception | None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki()[f"{certificate}.pem"], pki()[f"{certificate}.key"])
    if client_ca:
        context.load_verify_locations(pki()["ca.pem"])
        context.verify_mode = ssl.CERT_REQUIRED
    pair = Pair(client, context, **wrap)
    return pair, pair.shake()[0]


# -- downstream


def test_plain_handshake_counts():
    server, store = downstream()
    pair, error = serve(server, client_context())
    assert error is None
    assert pair.server.version() == "TLSv1.3"
    for name in ("handshake", "no_certificate", "versions.TLSv1.3", "curves.X25519"):
        assert store.value(f"listener.l.ssl.{name}") == 1
    assert sum(store.value(name) for name in list(store.metrics) if ".ciphers." in name) == 1
    assert store.value("listener.l.ssl.connection_error") == 0


def test_what_is_known_of_the_peer():
    server, _ = downstream(validation=SPIFFE)
    pair, error = serve(server, client_context("client"))
    assert error is None
    info = server.describe(pair.server)
    assert info.validated
    assert info.presented
    assert info.peer_certificate is not None
    assert info.peer_certificate.uri_sans == ("spiffe://mesh/ns/c/sa/client",)
    assert info.local_certificate is not None
    assert info.local_certificate.subject == "CN=server"
    assert (info.version, info.alpn) == ("TLSv1.3", None)
    info = server.describe(serve(server, client_context())[0].server)  # a failed handshake can be asked as well
    assert not info.presented


def test_alpn():
    server, _ = downstream(alpn_protocols=["h2", "http/1.1"])
    assert serve(server, client_context(alpn=("http/1.1",)))[0].server.selected_alpn_protocol() == "http/1.1"
    pair, error = serve(server, client_context(alpn=("other",)))
    assert error is None
    assert pair.server.selected_alpn_protocol() is None


def test_client_certificate_required():
    server, store = downstream(validation={}, require_client_certificate=True)
    assert serve(server, client_context("client"))[1] is None
    error = serve(server, client_context())[1]
    assert failure_text(error) == (
        "TLS_error:|268435648:SSL routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE:peer did not provide required client certificate:TLS_error_end"
    )
    assert store.value("listener.l.ssl.fail_verify_no_cert") == 1
    assert store.value("listener.l.ssl.connection_error") == 0


def test_client_certificate_optional():
    server, store = downstream(validation={})
    assert serve(server, client_context())[1] is None
    assert store.value("listener.l.ssl.no_certificate") == 1
    rogue = client_context("rogue")
    error = serve(server, rogue)[1]
    assert "CERTIFICATE_VERIFY_FAILED:verify cert failed: X509_verify_cert: certificate verification error at depth 0:" in failure_text(error)
    assert store.value("listener.l.ssl.fail_verify_error") == 1


def test_expired():
    server, _ = downstream(validation={})
    assert "certificate has expired" in failure_text(serve(server, client_context("expired"))[1])
    server, _ = downstream(validation={"allow_expired_certificate": True})
    assert serve(server, client_context("expired"))[1] is None


def test_san_does_not_match():
    server, store = downstream(validation={"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": "spiffe://mesh/ns/x"}}]})
    error = serve(server, client_context("client"))[1]
    assert failure_text(error) == (
        "TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:verify cert failed: SAN matcher, certificate SANs are"
        " [client.example.com, spiffe://mesh/ns/c/sa/client]:TLS_error_end"
    )
    assert store.value("listener.l.ssl.fail_verify_san") == 1
    assert store.value("listener.l.ssl.handshake") == 0
    assert serve(server, client_context())[1] is not None  # SANs to match make a certificate required


@pytest.mark.parametrize(
    ("kind", "matcher", "accepted"),
    [
        ("DNS", {"exact": "client.example.com"}, True),
        ("DNS", {"exact": "x.example.com"}, False),
        ("DNS", {"suffix": ".example.com"}, True),
        ("URI", {"safe_regex": {"regex": "spiffe://mesh/.*"}}, True),
        ("URI", {"safe_regex": {"regex": "spiffe://mesh"}}, False),
        ("EMAIL", {"prefix": ""}, False),
        ("IP_ADDRESS", {"exact": "127.0.0.1"}, False),
    ],
)
def test_san_matchers(kind, matcher, accepted):
    server, _ = downstream(validation={"match_typed_subject_alt_names": [{"san_type": kind, "matcher": matcher}]})
    assert (serve(server, client_context("client"))[1] is None) is accepted


def test_untyped_san_matchers():
    server, _ = downstream(validation={"match_subject_alt_names": [{"exact": "spiffe://mesh/ns/c/sa/client"}]})
    assert serve(server, client_context("client"))[1] is None
    assert serve(server, client_context("server"))[1] is not None


def test_pins():
    from meshproxy.net.certificate import pem_certificates

    certificate = pem_certificates(Path(pki()["client.pem"]).read_bytes())[0]
    import base64

    colons = ":".join(certificate.sha256[at : at + 2] for at in range(0, 64, 2))
    for pins in (
        {"verify_certificate_hash": [certificate.sha256]},
        {"verify_certificate_hash": ["00" * 32, colons]},
        {"verify_certificate_spki": [base64.b64encode(certificate.spki_sha256).decode()], "verify_certificate_hash": ["00" * 32]},
    ):
        server, store = downstream(validation=pins)
        assert serve(server, client_context("client"))[1] is None
        assert "cert hash and spki" in failure_text(serve(server, client_context("server"))[1])
        assert store.value("listener.l.ssl.fail_verify_cert_hash") == 1


def test_revoked():
    crl = {"crl": {"filename": pki()["crl.pem"]}}
    for extra in ({}, {"only_verify_leaf_cert_crl": True}):
        server, store = downstream(validation=crl | extra)
        assert "certificate revoked" in failure_text(serve(server, client_context("client"))[1])
        assert serve(server, client_context("other"))[1] is None
        assert store.value("listener.l.ssl.fail_verify_error") == 1


def test_certificate_by_server_name():
    server, _ = downstream("server", "other")

    def subject(name: str | None) -> str:
        client = client_context()
        client.check_hostname = False
        pair, error = serve(server, client, name)
        assert error is None
        return str(pair.client.getpeercert()["subject"][0][0][1])  # type: ignore[index]

    assert subject("server.example.com") == "server"
    assert subject("other.example.com") == "other"
    assert subject("a.wild.example.com") == "server"
    assert subject("nobody.example.com") == "server"
    assert subject(None) == "server"


def test_certificate_by_key_type():
    server, _ = downstream("server", "rsa")
    for ciphers, expected in (("ECDHE-ECDSA-AES128-GCM-SHA256", "server"), ("ECDHE-RSA-AES128-GCM-SHA256", "rsa")):
        client = client_context()
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client.set_ciphers(ciphers)
        pair, error = serve(server, client)
        assert error is None
        assert pair.client.getpeercert()["subject"][0][0][1] == expected  # type: ignore[index]


def test_server_name_required():
    server, _ = downstream(require_sni=True)
    client = client_context()
    client.check_hostname = False
    assert serve(server, client, None)[1] is not None
    assert serve(server, client, "x")[1] is None


def test_versions_and_ciphers():
    server, _ = downstream(params={"tls_minimum_protocol_version": "TLSv1_3"})
    client = client_context()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert "UNSUPPORTED_PROTOCOL" in failure_text(serve(server, client)[1])
    server, _ = downstream(params={"tls_maximum_protocol_version": "TLSv1_2", "cipher_suites": ["[ECDHE-ECDSA-AES256-GCM-SHA384|ECDHE-RSA-AES256-GCM-SHA384]"]})
    pair, error = serve(server, client_context())
    assert error is None
    assert pair.server.cipher()[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"  # type: ignore[index]


def test_curve_is_counted_when_it_is_known():
    server, store = downstream(params={"ecdh_curves": ["P-256"]})
    assert serve(server, client_context())[1] is None
    assert store.value("listener.l.ssl.curves.P-256") == 1


def test_sessions():
    for fields, reused in (({}, 1), ({"disable_stateless_session_resumption": True}, 0)):
        server, store = downstream(**fields)
        client = client_context()
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        first = Pair(client, server.context)
        assert first.shake() == (None, None)
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        second = Pair(client, server.context)
        second.client = client.wrap_bio(down, up, server_hostname="server.example.com", session=first.client.session)
        second.server = server.context.wrap_bio(up, down, server_side=True)
        assert second.shake() == (None, None)
        if reused:
            assert store.value("listener.l.ssl.session_reused") == 1
            assert second.server.session_reused
        else:
            assert first.client.session is None or not first.client.session.has_ticket


def test_sessions_are_resumed_by_any_worker():
    """Two workers compile the same configuration, each with the contexts that it inherited."""
    shared: dict[bytes, ssl.SSLContext] = {}
    config = message(DOWNSTREAM, downstream_tls())
    tls.compile_downstream(config, Store().scope("listener.l."), shared)
    assert len(shared) == 1
    store = Store()
    first, second = (tls.compile_downstream(config, store.scope("listener.l."), dict(shared)) for _ in range(2))
    client = client_context()
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # its session is there when the handshake is over
    begun = Pair(client, first.context)
    assert begun.shake() == (None, None)
    resumed = Pair(client, second.context, session=begun.client.session)
    assert resumed.shake() == (None, None)
    assert resumed.server.session_reused
    assert store.value("listener.l.ssl.session_reused") == 1


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_sessions_are_resumed_by_workers_that_made_their_contexts_themselves(version):
    """What comes after the fork: the keys of tickets follow from a seed that all have."""
    config = message(DOWNSTREAM, downstream_tls())
    store, seed = Store(), b"s" * tickets.SEED_SIZE
    first, second = (tls.compile_downstream(config, store.scope("listener.l."), None, seed) for _ in range(2))
    assert first.context is not second.context
    stranger = tls.compile_downstream(config, store.scope("listener.l."), None, b"t" * tickets.SEED_SIZE)
    elsewhere = tls.compile_downstream(config, store.scope("listener.m."), None, seed)
    if not tickets.keys_of(first.context):
        pytest.skip("this Python's OpenSSL cannot be called: workers do not share the keys of tickets")
    client = client_context()
    client.minimum_version = client.maximum_version = getattr(ssl.TLSVersion, version)
    begun = Pair(client, first.context)
    assert begun.shake() == (None, None)
    begun.server.write(b"x")
    assert begun.client.read(1) == b"x"  # with TLS 1.3 tickets come after the handshake
    for server, reused in ((second, True), (stranger, False), (elsewhere, False)):
        resumed = Pair(client, server.context, session=begun.client.session)
        assert resumed.shake() == (None, None)
        assert resumed.server.session_reused is reused


def test_keys_of_tickets_are_of_their_context():
    contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(3)]
    if not all(tickets.share(context, b"s" * tickets.SEED_SIZE, identity) for context, identity in zip(contexts, (b"a", b"a", b"b"), strict=True)):
        pytest.skip("this Python's OpenSSL cannot be called")
    one, same, other = map(tickets.keys_of, contexts)
    assert one == same != other
    assert len(one) == 80


@pytest.mark.parametrize("other", ["listener", "certificate", "authority"])
def test_contexts_that_differ_are_not_shared(other):
    shared: dict[bytes, ssl.SSLContext] = {}
    tls.compile_downstream(message(DOWNSTREAM, downstream_tls()), Store().scope("listener.l."), shared)
    document = downstream_tls(
        "other" if other == "certificate" else "server", validation={"trusted_ca": {"filename": pki()["ca.pem"]}} if other == "authority" else None
    )
    compiled = tls.compile_downstream(message(DOWNSTREAM, document), Store().scope("listener.m." if other == "listener" else "listener.l."), shared)
    assert len(shared) == 2
    assert compiled.context is list(shared.values())[1]


def test_who_chooses_the_cipher():
    preference = ssl.OP_CIPHER_SERVER_PREFERENCE
    assert downstream()[0].context.options & preference
    assert not downstream(prefer_client_ciphers=True)[0].context.options & preference
    assert not downstream(params={"tls_minimum_protocol_version": "TLSv1_3"})[0].context.options & preference


def test_not_tls():
    server, store = downstream()
    incoming = ssl.MemoryBIO()
    incoming.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ssl.SSLError) as caught:
        server.context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
    assert failure_text(caught.value) == "TLS_error:|268435612:SSL routines:OPENSSL_internal:HTTP_REQUEST:TLS_error_end"
    assert store.value("listener.l.ssl.connection_error") == 1


def test_for_admin():
    server, _ = downstream("server", "other", validation={})
    assert [(Path(path).name, certificate.subject) for path, certificate in server.certificates] == [("server.pem", "CN=server"), ("other.pem", "CN=other")]
    assert [Path(path).name for path, _ in server.material.authorities] == ["ca.pem"]


@pytest.mark.parametrize(
    ("document", "path", "why"),
    [
        ({"common_tls_context": {}}, "common_tls_context.tls_certificates", "No TLS certificates"),
        ({"tls_certificates": [{"private_key": {"inline_string": "x"}}]}, "tls_certificates[0].certificate_chain", "required"),
        ({"tls_certificates": [{"certificate_chain": {"filename": "/nope"}, "private_key": {"filename": "/nope"}}]}, "", "/nope"),
        ({"tls_certificates": [own("server") | {"private_key": {"filename": pki()["other.key"]}}]}, "tls_certificates[0].private_key", "does not belong"),
        (
            {"tls_certificates": [own("server") | {"private_key": {"inline_string": "garbage"}}]},
            "tls_certificates[0].private_key",
            "Failed to load private key",
        ),
        ({"tls_certificates": [own("server") | {"certificate_chain": {"inline_string": "garbage"}}]}, "tls_certificates[0].certificate_chain", "PEM"),
        ({"tls_certificates": [own("locked")]}, "tls_certificates[0].private_key", "Failed to load private key"),
        ({"tls_certificates": [own("locked") | {"password": {"inline_string": "wrong"}}]}, "tls_certificates[0].private_key", "Failed to load private key"),
        ({"validation_context": {"trusted_ca": {"inline_string": "garbage"}}}, "validation_context.trusted_ca", "Failed to load trusted CA"),
        ({"validation_context": SPIFFE}, "validation_context.trusted_ca", "without trusted CA is insecure"),
        ({"validation_context": {"crl": {"filename": pki()["crl.pem"]}}}, "validation_context.crl", "without trusted CA"),
        ({"validation_context": {"trusted_ca": {"filename": pki()["ca.pem"]}, "crl": {"inline_string": "x"}}}, "validation_context.crl", "Failed to load CRL"),
        ({"validation_context": {"verify_certificate_hash": ["abc"]}}, "validation_context.verify_certificate_hash[0]", "Invalid hex-encoded"),
        ({"validation_context": {"verify_certificate_spki": ["abc"]}}, "validation_context.verify_certificate_spki[0]", "Invalid base64-encoded"),
        ({"tls_params": {"cipher_suites": ["NOPE"]}}, "tls_params.cipher_suites", "NOPE"),
        ({"tls_params": {"ecdh_curves": ["P-1"]}}, "tls_params.ecdh_curves", "P-1"),
        ({"tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_2"}}, "tls_params.tls_minimum_protocol_version", ""),
        ({"alpn_protocols": ["x" * 256]}, "alpn_protocols", "255"),
    ],
)
def test_refused(document, path, why):
    if "common_tls_context" not in document:
        document = {"common_tls_context": {"tls_certificates": [own("server")], **document}}
        path = f"common_tls_context.{path}" if path else ""
    with pytest.raises(ConfigError) as caught:
        tls.compile_downstream(message(DOWNSTREAM, document), Store().scope("listener.l."))
    problem = caught.value.problems[0]
    assert problem.path == path or (not path and "certificate_chain" in problem.path)
    assert why in problem.why


@pytest.mark.parametrize(
    "document",
    [
        {"require_client_certificate": True},
        {"common_tls_context": {"validation_context": {"trust_chain_verification": "ACCEPT_UNTRUSTED"}}},
        {"common_tls_context": {"validation_context": {"verify_certificate_hash": ["00" * 32]}}},
        {"common_tls_context": {"tls_params": {"ecdh_curves": ["X25519", "P-256"]}}},
        {"ocsp_staple_policy": "MUST_STAPLE"},
        {"disable_stateful_session_resumption": True},
    ],
)
def test_unsupported(document):
    document = {**document, "common_tls_context": {"tls_certificates": [own("server")], **document.get("common_tls_context", {})}}
    with pytest.raises(ConfigError) as caught:
        tls.compile_downstream(message(DOWNSTREAM, document), Store().scope("listener.l."))
    assert caught.value.problems[0].kind == UNSUPPORTED


def test_password_and_inline_material():
    document = own("locked") | {"password": {"inline_string": "secret"}}
    document["certificate_chain"] = {"inline_string": Path(pki()["locked.pem"]).read_text()}
    server = tls.compile_downstream(message(DOWNSTREAM, {"common_tls_context": {"tls_certificates": [document]}}), Store().scope("listener.l."))
    assert serve(server, client_context())[1] is None
    assert server.certificates[0][0] == "<inline>"


# -- upstream


def test_upstream_handshake():
    client, store = upstream(sni="server.example.com", certificate="client", params=TLS13)
    pair, error = call(client, client_ca=True)
    assert error is None
    assert pair.client.version() == "TLSv1.3"
    assert store.value("cluster.c.ssl.handshake") == 1
    assert client.describe(pair.client).peer_certificate.subject == "CN=server"  # type: ignore[union-attr]


def test_upstream_stops_at_tls_1_2_by_default():
    assert call(upstream()[0])[0].client.version() == "TLSv1.2"


def test_upstream_does_not_check_the_host_name():
    assert call(upstream(sni="nobody")[0])[1] is None


def test_upstream_untrusted():
    client, store = upstream()
    error = call(client, "rogue")[1]
    assert "CERTIFICATE_VERIFY_FAILED" in failure_text(error)
    assert store.value("cluster.c.ssl.fail_verify_error") == 1
    client, _ = upstream(validation={"trust_chain_verification": "ACCEPT_UNTRUSTED"})
    assert call(client, "rogue")[1] is None
    store = Store()
    nothing = tls.compile_upstream(message(UPSTREAM, {"common_tls_context": {}}), store.scope("cluster.c."))
    assert call(nothing, "rogue")[1] is None


def test_upstream_san():
    client, _ = upstream(validation={"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "a.wild.example.com"}}]})
    assert call(client)[1] is None
    error = call(client, "other")[1]
    assert "SAN matcher, certificate SANs are [other.example.com]" in failure_text(error)


def test_server_with_the_wrong_name_never_has_a_connection():
    client, store = upstream(validation=OTHER_NAME)
    pair, error = call(client)
    assert error is not None
    assert store.value("cluster.c.ssl.fail_verify_san") == 1
    assert store.value("cluster.c.ssl.connection_error") == 0
    with pytest.raises(ssl.SSLError):  # under TLS 1.2 it has not got our part of the handshake
        pair.server.write(b"x")


def test_upstream_handshake_counts():
    client, store = upstream()
    assert call(client)[1] is None
    for name in ("handshake", "versions.TLSv1.2", "curves.X25519", "sigalgs.ecdsa_secp256r1_sha256"):
        assert store.value(f"cluster.c.ssl.{name}") == 1
    client, store = upstream(params=TLS13)
    assert call(client)[1] is None
    for name in ("handshake", "versions.TLSv1.3", "curves.X25519", "sigalgs.ecdsa_secp256r1_sha256"):
        assert store.value(f"cluster.c.ssl.{name}") == 1


def test_names_given_with_the_dial():
    client, store = upstream()
    assert call(client, san="server.example.com")[1] is None
    assert call(client, san="127.0.0.1")[1] is None
    error = call(client, san="other.example.com")[1]
    assert "verify SAN list, expected SANs: [other.example.com]" in failure_text(error)
    assert store.value("cluster.c.ssl.fail_verify_san") == 1
    client, _ = upstream(sni="other.example.com", auto_sni_san_validation=True)
    assert call(client)[1] is not None
    assert call(client, server_name="server.example.com")[1] is None


def wrapped(client: tls.UpstreamTls, *alpn: str) -> ssl.SSLContext:
    return client.wrap(ssl.MemoryBIO(), ssl.MemoryBIO(), alpn=alpn).context


def test_upstream_alpn():
    client, _ = upstream()
    context = wrapped(client, "h2")
    assert context is wrapped(client, "h2")
    assert context is not wrapped(client)
    fixed = tls.compile_upstream(message(UPSTREAM, {"common_tls_context": {"alpn_protocols": ["http/1.1"]}}), Store().scope("cluster.c."))
    assert wrapped(fixed, "h2") is wrapped(fixed)


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"sni": "a\0b"}, "sni"),
        ({"common_tls_context": {"tls_certificates": [own("server"), own("other")]}}, "common_tls_context.tls_certificates"),
        ({"auto_sni_san_validation": True}, "auto_sni_san_validation"),
    ],
)
def test_upstream_refused(document, path):
    with pytest.raises(ConfigError) as caught:
        tls.compile_upstream(message(UPSTREAM, document), Store().scope("cluster.c."))
    assert caught.value.problems[0].path == path


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("a.example.com", "a.EXAMPLE.com", True),
        ("a.example.com", "*.example.com", True),
        ("a.b.example.com", "*.example.com", False),
        ("example.com", "*.example.com", False),
        (".example.com", "*.example.com", False),
        ("abc.example.com", "a*c.example.com", True),
        ("ac.example.com", "a*c.example.com", True),
        ("a.example.com", "a*a.example.com", False),
        ("abc.example.com", "a*.*.com", False),
        ("xn--abc.example.com", "xn--*.example.com", False),
        ("com", "*", False),
    ],
)
def test_dns_names(name, pattern, matches):
    assert dns_match(name, pattern) is matches


@pytest.mark.parametrize(
    ("extension", "expected"),
    [(b"", True), (b"\x06\x03\x55\x1d\x0f\x01\x01\xff\x04\x04\x03\x02\x07\x80", True), (b"\x06\x03\x55\x1d\x0f\x01\x01\xff\x04\x04\x03\x02\x05\xa0", True),
     (b"\x06\x03\x55\x1d\x0f\x01\x01\xff\x04\x04\x03\x02\x05\x20", False), (b"\x06\x03\x55\x1d\x0f\x04\x04\x03\x02\x05\x20", False)],
)  # fmt: skip
def test_certificates_that_are_for_signing(extension: bytes, expected: bool) -> None:
    assert signs(b"before" + extension + b"after") is expected
