"""What TLS handshakes count and what they say when they fail, in Envoy's words."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshproxy.observe.stats import Counter, Scope

_COUNTERS = (
    "connection_error",
    "fail_verify_cert_hash",
    "fail_verify_error",
    "fail_verify_no_cert",
    "fail_verify_san",
    "handshake",
    "no_certificate",
    "ocsp_staple_failed",
    "ocsp_staple_omitted",
    "ocsp_staple_requests",
    "ocsp_staple_responses",
    "session_reused",
)

# What Envoy counts of secrets that are discovered; here they come with the configuration.
_FACTORY = ("downstream_context_secrets_not_ready", "ssl_context_update_by_sds", "upstream_context_secrets_not_ready")
_SERVER_FACTORY = tuple(f"server_ssl_socket_factory.{name}" for name in _FACTORY)
_CLIENT_FACTORY = tuple(f"client_ssl_socket_factory.{name}" for name in _FACTORY)

# Reason codes of Envoy's TLS library, for the reasons that occur in practice. Alerts of the peer are 1000 and the number of the alert.
_LIBRARY = 0x10000000
_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": 125,
    "EXCESSIVE_MESSAGE_SIZE": 150,
    "KEY_USAGE_BIT_INCORRECT": 302,
    "HTTP_REQUEST": 156,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": 192,
    "UNEXPECTED_MESSAGE": 223,
    "UNSUPPORTED_PROTOCOL": 240,
    "WRONG_VERSION_NUMBER": 247,
    "SSLV3_ALERT_UNEXPECTED_MESSAGE": 1010,
    "SSLV3_ALERT_BAD_RECORD_MAC": 1020,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": 1040,
    "SSLV3_ALERT_BAD_CERTIFICATE": 1042,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": 1043,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": 1044,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": 1045,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": 1046,
    "SSLV3_ALERT_ILLEGAL_PARAMETER": 1047,
    "TLSV1_ALERT_UNKNOWN_CA": 1048,
    "TLSV1_ALERT_ACCESS_DENIED": 1049,
    "TLSV1_ALERT_DECODE_ERROR": 1050,
    "TLSV1_ALERT_DECRYPT_ERROR": 1051,
    "TLSV1_ALERT_PROTOCOL_VERSION": 1070,
    "TLSV1_ALERT_INSUFFICIENT_SECURITY": 1071,
    "TLSV1_ALERT_INTERNAL_ERROR": 1080,
    "TLSV1_UNRECOGNIZED_NAME": 1112,
    "TLSV1_CERTIFICATE_REQUIRED": 1116,
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": 1120,
}
# The same reasons under OpenSSL's names.
_SYNONYMS = {
    "PACKET_LENGTH_TOO_LONG": "EXCESSIVE_MESSAGE_SIZE",
    "EXCESSIVE_MESSAGE_LENGTH": "EXCESSIVE_MESSAGE_SIZE",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "TLSV1_CERTIFICATE_REQUIRED",
    "NO_SUITABLE_KEY_SHARE": "NO_SHARED_GROUP",
}
_VERIFY_MESSAGES = {
    "self-signed certificate": "self signed certificate",
    "self-signed certificate in certificate chain": "self signed certificate in certificate chain",
}


class PeerRejected(ssl.SSLCertVerificationError):
    """The peer's certificate is good for its issuer, but not what the configuration asks for (SAN, pinned hash)."""


class WrongKeyUsageError(PeerRejected):
    """The peer's certificate is not for signing, which is what its key does in a handshake."""


def declare(scope: Scope, *, server_side: bool) -> None:
    """Make the names known that a TLS context brings along."""
    scope.declare("counter", _SERVER_FACTORY if server_side else _CLIENT_FACTORY)
    scope.scope("ssl.").declare("counter", _COUNTERS)


class TlsStats:
    """The `ssl.` counters of one listener or cluster. `versions`, `ciphers`, `curves` and `sigalgs` come into being with the first handshake that used them."""

    __slots__ = ("_memo", "_scope", *_COUNTERS)

    connection_error: Counter
    fail_verify_cert_hash: Counter
    fail_verify_error: Counter
    fail_verify_no_cert: Counter
    fail_verify_san: Counter
    handshake: Counter
    no_certificate: Counter
    session_reused: Counter

    def __init__(self, scope: Scope, *, server_side: bool) -> None:
        """`scope`: that of the listener or cluster (`listener.127.0.0.1_443.`, `cluster.foo.`)."""
        declare(scope, server_side=server_side)
        self._scope = scope.scope("ssl.")
        for name in _COUNTERS:
            setattr(self, name, self._scope.counter(name))
        self._memo: dict[tuple[str, ...], tuple[Counter, ...]] = {}

    def count_handshake(self, ssl_object: ssl.SSLObject, curve: str, signature: str, *, presented: bool) -> None:
        """Count a completed handshake. `curve` and `signature` (how the peer signed) are "" when they are not known or there was none."""
        self.handshake.n += 1
        if ssl_object.session_reused:
            self.session_reused.n += 1
        if not presented:
            self.no_certificate.n += 1
        cipher = ssl_object.cipher()
        key = ssl_object.version() or "", cipher[0] if cipher else "", curve, signature
        counters = self._memo.get(key)
        if counters is None:
            kinds = ("versions", "ciphers", "curves", "sigalgs")
            counters = self._memo[key] = tuple(self._scope.counter(f"{kind}.{name}") for kind, name in zip(kinds, key, strict=True) if name)
        for counter in counters:
            counter.n += 1

    def count_failure(self, error: BaseException) -> None:
        """Count a failed handshake. A peer that only went away is not an error of TLS."""
        if isinstance(error, PeerRejected) or not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return  # a rejected peer was counted where it was rejected
        if isinstance(error, ssl.SSLCertVerificationError):
            self.fail_verify_error.n += 1
        elif error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            self.fail_verify_no_cert.n += 1
        else:
            self.connection_error.n += 1


def failure_text(error: BaseException) -> str:
    """The transport failure reason: `TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:...:TLS_error_end`.

    '' for a peer that closed the connection in the middle of the handshake.
    """
    if not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return ""
    reason = getattr(error, "reason", None) or "UNKNOWN"  # errors that did not come from OpenSSL have no such attribute
    reason = _SYNONYMS.get(reason, reason)
    detail = ""
    if isinstance(error, WrongKeyUsageError):
        reason = "KEY_USAGE_BIT_INCORRECT"
    elif isinstance(error, PeerRejected):
        reason, detail = "CERTIFICATE_VERIFY_FAILED", f":{error.args[-1]}"
    elif isinstance(error, ssl.SSLCertVerificationError):
        message = _VERIFY_MESSAGES.get(error.verify_message, error.verify_message)
        detail = f":verify cert failed: X509_verify_cert: certificate verification error at depth 0: {message}"
    elif reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        detail = ":peer did not provide required client certificate"
    code = _LIBRARY + _REASONS.get(reason, 0)
    return f"TLS_error:|{code}:SSL routines:OPENSSL_internal:{reason}{detail}:TLS_error_end"
