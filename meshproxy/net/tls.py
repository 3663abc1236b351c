"""TLS on either side: `DownstreamTlsContext` and `UpstreamTlsContext` compiled into Python SSL contexts, and what happens around a handshake.

The handshake itself is OpenSSL's, driven by `net.tls_transport`. `HandshakeObject` sits between the two: it sees the end of each handshake before anybody
else, so that a peer whose certificate is not the one asked for is turned away before a byte is exchanged, and failures are counted.
"""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import UNSUPPORTED, fail, under
from meshproxy.net.connection import TlsInfo
from meshproxy.net.tls_config import HONOURS as _CONFIG_HONOURS
from meshproxy.net.tls_config import compile_common, new_context
from meshproxy.net.tls_flight import ServerFlight, usual_signature
from meshproxy.net.tls_stats import PeerRejected, TlsStats, WrongKeyUsageError, failure_text
from meshproxy.net.tls_verify import signs

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.net.certificate import Certificate
    from meshproxy.net.tls_config import Common, OwnCertificate
    from meshproxy.observe.stats import Scope

__all__ = ["HONOURS", "DownstreamTls", "HandshakeObject", "TlsStats", "UpstreamTls", "compile_downstream", "compile_upstream", "failure_text"]

HONOURS = {
    **_CONFIG_HONOURS,
    "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext": (
        "common_tls_context require_client_certificate require_sni disable_stateless_session_resumption disable_stateful_session_resumption"
        " ocsp_staple_policy full_scan_certs_on_sni_mismatch prefer_client_ciphers"
    ),
    "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext": (
        "common_tls_context sni auto_host_sni auto_sni_san_validation allow_renegotiation max_session_keys enforce_rsa_key_usage"
    ),
    "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer": "",
}

log = logging.getLogger(__name__)


# The alert certificate_unknown, as a TLS 1.2 record: before the keys are in use it goes in clear.
_CERTIFICATE_UNKNOWN = b"\x15\x03\x03\x00\x02\x02\x2e"


class HandshakeObject(ssl.SSLObject):
    """An SSLObject that reports the end of its handshake to the DownstreamTls or UpstreamTls that it belongs to, and reads along what the server says.

    `names`: see `PeerChecks.verify`. `flight` is what the server said; `incoming` is None once all of it is read, `outgoing` once the handshake is done.
    `last_words`: after a failure, what is to be sent before closing. `read_plain`, `write_plain` and `pending_plain` are `read`, `write` and `pending`
    without a Python frame each.
    """

    names: tuple[str, ...]
    incoming: ssl.MemoryBIO | None
    outgoing: ssl.MemoryBIO | None
    flight: ServerFlight
    last_words: bytes
    read_plain: Callable[[int], bytes]
    write_plain: Callable[[bytes], int]
    pending_plain: Callable[[], int]

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> HandshakeObject:
        self: HandshakeObject = super()._create(incoming, outgoing, *args, **kwargs)  # type: ignore[misc]
        self.names = ()
        self.incoming = incoming
        self.outgoing = outgoing
        self.flight = ServerFlight()
        self.last_words = b""
        inner = self._sslobj  # type: ignore[attr-defined]
        self.read_plain = inner.read
        self.write_plain = inner.write
        self.pending_plain = inner.pending
        return self

    def do_handshake(self) -> None:
        outgoing = self.outgoing
        if outgoing is None:  # it was finished before
            super().do_handshake()
            return
        try:
            if not self.server_side:
                self._read_along(self.incoming)
            try:
                super().do_handshake()
            finally:
                if self.server_side:
                    self._read_along(outgoing)
            self.context.owner.finish(self)  # type: ignore[attr-defined]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not self.flight.certificate:
                raise
            self._examine(outgoing)
            raise
        except ssl.SSLError as error:
            # What waits after a certificate that only we object to is our part of a handshake that OpenSSL thinks well of: it must not go out.
            words = outgoing.read()
            self._fail(error, b"" if isinstance(error, PeerRejected) else words)
            raise
        self.outgoing = None

    def _read_along(self, server: ssl.MemoryBIO | None) -> None:
        """Look at the bytes that wait in the server's direction."""
        if self.incoming is None or server is None or not server.pending:
            return
        data = server.read()
        server.write(data)
        if self.flight.feed(data):
            self.incoming = None

    def _examine(self, outgoing: ssl.MemoryBIO) -> None:
        """Check a server's certificate when it has come in clear, as soon as OpenSSL has found its chain good: before our part of the handshake goes out."""
        if self.server_side:
            return
        certificate, self.flight.certificate = self.flight.certificate, b""
        try:
            self.context.owner.examine(certificate, self.names)  # type: ignore[attr-defined]
        except PeerRejected as error:
            outgoing.read()
            self._fail(error, _CERTIFICATE_UNKNOWN)
            raise

    def _fail(self, error: ssl.SSLError, last_words: bytes) -> None:
        self.last_words = last_words
        self.context.owner.stats.count_failure(error)  # type: ignore[attr-defined]


class _Tls:
    """What both sides share: the material, the checks, the counters."""

    def __init__(self, common: Common, stats: TlsStats) -> None:
        self.stats = stats
        self.checks = common.checks
        self.material = common.material
        self.verifies = common.trusts or bool(common.checks)

    @property
    def certificates(self) -> list[tuple[str, Certificate]]:
        """Own leaf certificates with the paths they came from ('<inline>' for others): for /certs."""
        return [(item.path, item.leaf) for item in self.material.certificates]

    def describe(self, ssl_object: ssl.SSLObject) -> TlsInfo:
        """What logs and filters see of a finished handshake."""
        certificates = self.material.certificates
        if len(certificates) < 2:
            return TlsInfo(ssl_object, certificates[0].leaf if certificates else None, self.verifies)
        # OpenSSL chooses one of the context's by its key type, and Python's ssl does not say which. Of TLS 1.2 the cipher says it; clients that speak TLS 1.3
        # prefer ECDSA.
        chosen: list[OwnCertificate] = ssl_object.context.certificates  # type: ignore[attr-defined]
        cipher = (ssl_object.cipher() or ("",))[0]
        wanted = "RSA" if "-RSA-" in cipher else "EC"
        return TlsInfo(ssl_object, next((item for item in chosen if item.key_type == wanted), chosen[0]).leaf, self.verifies)


class DownstreamTls(_Tls):
    """TLS of the connections that one filter chain accepts. `ready`: there is all that a handshake needs (net.tls_sds)."""

    ready = True

    def __init__(self, common: Common, stats: TlsStats, context: ssl.SSLContext) -> None:
        super().__init__(common, stats)
        self.context = context

    def refuse(self) -> None:
        """Count a connection that came before it was ready."""

    def wrap(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> HandshakeObject:
        """The TLS object of one connection; it reads and writes encrypted bytes there."""
        return self.context.wrap_bio(incoming, outgoing, server_side=True)  # type: ignore[return-value]

    def finish(self, ssl_object: HandshakeObject) -> None:
        """Count the handshake and check the client's certificate. Raises PeerRejected."""
        der = ssl_object.getpeercert(True) if self.verifies else None
        if der and self.checks:
            from meshproxy.net.certificate import Certificate

            self.checks.verify(Certificate(der), self.stats)
        self.stats.count_handshake(ssl_object, ssl_object.flight.group, usual_signature(der) if der else "", presented=bool(der))


class UpstreamTls(_Tls):
    """TLS of the connections to one cluster (or to those of its hosts that a transport socket match selects).

    `sni`: the configured name, '' when there is none; `auto_host_sni`: use the host's name instead when it has one.
    """

    def __init__(self, proto: Any, common: Common, stats: TlsStats) -> None:
        super().__init__(common, stats)
        self.sni: str = proto.sni
        self.auto_host_sni: bool = proto.auto_host_sni
        self.auto_sni_san_validation: bool = proto.auto_sni_san_validation
        self.alpn = common.alpn
        self._signed = all(name.startswith(("ECDHE-", "@")) for name in common.ciphers.split(":"))  # others may have the server decipher instead
        self._renegotiate: bool = proto.allow_renegotiation
        self._common = common
        self._contexts: dict[tuple[str, ...], ssl.SSLContext] = {}
        self._context(self.alpn)  # so that errors show when the configuration is compiled

    def _context(self, alpn: tuple[str, ...]) -> ssl.SSLContext:
        context = self._contexts.get(alpn)
        if context is None:
            context = new_context(self._common, server_side=False, alpn=alpn)
            if self._renegotiate:
                context.options &= ~ssl.OP_NO_RENEGOTIATION
            context.sslobject_class = HandshakeObject
            context.owner = self  # type: ignore[attr-defined]
            self._contexts[alpn] = context
        return context

    def wrap(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        *,
        server_name: str | None = None,
        alpn: tuple[str, ...] = (),
        san: str | None = None,
    ) -> HandshakeObject:
        """The TLS object of one connection; it reads and writes encrypted bytes there. For the rest see `dial.connect`."""
        name = self.sni if server_name is None else server_name
        wrapped: HandshakeObject = self._context(self.alpn or alpn).wrap_bio(incoming, outgoing, server_hostname=name or None)  # type: ignore[assignment]
        if san:
            wrapped.names = (san,)
        elif self.auto_sni_san_validation and name:
            wrapped.names = (name,)
        return wrapped

    def examine(self, certificate: bytes, names: tuple[str, ...]) -> None:
        """Check the server's certificate (DER). Raises PeerRejected."""
        if certificate and self._signed and not signs(certificate):  # whatever enforce_rsa_key_usage says, as in Envoy
            self.stats.connection_error.n += 1
            raise WrongKeyUsageError("the certificate's key is not for signing")
        if certificate and (self.checks or names):
            from meshproxy.net.certificate import Certificate

            self.checks.verify(Certificate(certificate), self.stats, names)

    def finish(self, ssl_object: HandshakeObject) -> None:
        """Count the handshake and check the server's certificate. Raises PeerRejected."""
        certificate = ssl_object.getpeercert(True) or b""
        self.examine(certificate, ssl_object.names)
        flight = ssl_object.flight
        self.stats.count_handshake(ssl_object, flight.group, flight.signature or usual_signature(certificate), presented=True)


def compile_downstream(proto: Any, scope: Scope, shared: dict[bytes, ssl.SSLContext] | None = None, ticket_seed: bytes = b"") -> DownstreamTls:
    """From `DownstreamTlsContext`; `scope` is the listener's. Reads the certificates. Raises ConfigError.

    An SSL context that is in `shared` is taken from there, others are added. The keys of session tickets are random and those of a context, and Python's ssl
    cannot set them: so that any worker resumes a session that another began, main fills `shared` and workers inherit it with the fork. With `ticket_seed`
    nothing is added, and what was not inherited gets keys that follow from it, see net.tickets.
    """
    with under("common_tls_context"):
        common = compile_common(proto.common_tls_context, server_side=True)
    if not common.material.certificates:
        fail("common_tls_context.tls_certificates", "No TLS certificates found for server context")
    required = proto.require_client_certificate.value or bool(common.checks)
    if required and not common.trusts:
        fail(
            "common_tls_context.validation_context.trusted_ca",
            "client certificates can only be asked for together with the authority that issues them (Python's ssl accepts no others)",
            UNSUPPORTED,
        )
    common.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL if common.trusts else ssl.CERT_NONE
    if proto.ocsp_staple_policy:
        fail("ocsp_staple_policy", "OCSP stapling is not supported", UNSUPPORTED)
    if proto.disable_stateful_session_resumption and common.minimum < ssl.TLSVersion.TLSv1_3:
        fail("disable_stateful_session_resumption", "it is only honoured together with tls_minimum_protocol_version TLSv1_3", UNSUPPORTED)
    tls = DownstreamTls(common, TlsStats(scope, server_side=True), None)  # type: ignore[arg-type]  # set in the next line
    with under("common_tls_context"):
        tls.context = _ServerContexts(tls, proto, common, {} if shared is None else shared, ticket_seed, scope.prefix).first
    return tls


def compile_upstream(proto: Any, scope: Scope) -> UpstreamTls:
    """From `UpstreamTlsContext`; `scope` is the cluster's. Reads the certificates. Raises ConfigError."""
    if "\0" in proto.sni:
        fail("sni", "SNI names containing NULL-byte are not allowed")
    if len(proto.common_tls_context.tls_certificates) > 1:
        fail("common_tls_context.tls_certificates", "Multiple TLS certificates are not supported for client contexts")
    with under("common_tls_context"):
        common = compile_common(proto.common_tls_context, server_side=False)
    if proto.auto_sni_san_validation and not common.trusts:
        fail("auto_sni_san_validation", "'auto_sni_san_validation' was configured without configuring a trusted CA")
    return UpstreamTls(proto, common, TlsStats(scope, server_side=False))


class _ServerContexts:
    """The SSL contexts of one `DownstreamTlsContext`: one for each set of certificates among which OpenSSL chooses by key type.

    Which set a client gets depends on the name it asks for: exact DNS SANs first, then wildcards, then the first certificate (all of them, first of each
    key type, when the client names nothing or `full_scan_certs_on_sni_mismatch` is set). That chain goes on for a client that cannot use what the name has,
    which is one without ECDSA: the name's set ends with the RSA certificate that such a client comes to (not with `prefer_client_ciphers`).
    """

    def __init__(self, tls: DownstreamTls, proto: Any, common: Common, shared: dict[bytes, ssl.SSLContext], seed: bytes, prefix: str) -> None:
        self._tls = tls
        self._proto = proto
        self._common = common
        self._shared = shared
        self._seed = seed
        material = common.material
        parts = [prefix.encode(), proto.SerializeToString(deterministic=True), material.trusted, material.crl]
        # Of one listener and of equal contents, and nothing less: what a session was allowed to do, it may do again.
        import hashlib

        self._key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in (*parts, *(item.chain + item.key for item in material.certificates))))
        self._memo: dict[tuple[int, ...], ssl.SSLContext] = {}
        self._names: dict[str, ssl.SSLContext] = {}
        certificates = common.material.certificates
        everything = range(len(certificates))
        anything = self._context(self._first_of_each_type(everything))
        self.first: ssl.SSLContext = anything
        at_last = everything if proto.full_scan_certs_on_sni_mismatch.value else range(1)
        # Clients whose order counts could prefer RSA, and so the certificate of another name.
        goes_on = not proto.prefer_client_ciphers
        by_name: dict[str, list[int]] = {}
        for at, item in enumerate(certificates):
            for name in item.names:
                by_name.setdefault(name, []).append(at)
        for name, found in by_name.items():
            wildcard = by_name.get(f"*.{name.partition('.')[2]}", [])
            rsa = next((at for at in (*found, *wildcard, *at_last) if certificates[at].key_type == "RSA"), found[0])
            self._names[name] = self._context(self._first_of_each_type([*found, rsa] if goes_on else found))
        self._mismatch = self._context(self._first_of_each_type(at_last))
        if len(self._memo) > 1 or proto.require_sni.value:
            self.first.sni_callback = self._select

    def _first_of_each_type(self, candidates: Any) -> tuple[int, ...]:
        chosen: dict[str, int] = {}
        for at in candidates:
            chosen.setdefault(self._common.material.certificates[at].key_type, at)
        return tuple(sorted(chosen.values()))

    def _context(self, certificates: tuple[int, ...]) -> ssl.SSLContext:
        context = self._memo.get(certificates)
        if context is None:
            key = self._key.copy()
            key.update(repr(certificates).encode())
            context = self._shared.get(key.digest())
            if context is None:
                context = self._make(certificates)
                if self._seed:
                    from meshproxy.net import tickets

                    tickets.share(context, self._seed, key.digest())
                else:
                    self._shared[key.digest()] = context
            context.owner = self._tls  # type: ignore[attr-defined]
            context.certificates = [self._common.material.certificates[at] for at in certificates]  # type: ignore[attr-defined]
            self._memo[certificates] = context
        return context

    def _make(self, certificates: tuple[int, ...]) -> ssl.SSLContext:
        common, proto = self._common, self._proto
        context = new_context(common, server_side=True, alpn=common.alpn, certificates=certificates)
        if proto.disable_stateless_session_resumption:
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        if proto.prefer_client_ciphers:
            context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        context.sslobject_class = HandshakeObject
        return context

    def _select(self, ssl_object: ssl.SSLObject, server_name: str | None, _context: ssl.SSLContext) -> int | None:
        if not server_name:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME if self._proto.require_sni.value else None
        name = server_name.lower()
        context = self._names.get(name)
        if context is None:
            _, dot, rest = name.partition(".")
            context = self._names.get(f"*.{rest}") if dot else None
        if context is None:
            context = self._mismatch
        if context is not ssl_object.context:
            ssl_object.context = context
        return None
