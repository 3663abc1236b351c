"""What a peer's certificate must be, beyond being issued by a trusted authority: subject alternative names, pinned certificates, pinned keys.

OpenSSL checks the chain; Python's ssl has no hook in that check, so the rest is looked at when the handshake ends and before a byte of it is used.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail
from meshproxy.api.san import SanMatcher, compile_san, compile_string_at, dns_match, ip_text
from meshproxy.net.certificate import Certificate, DerError
from meshproxy.net.tls_stats import PeerRejected

if TYPE_CHECKING:
    from meshproxy.net.tls_stats import TlsStats

_KEY_USAGE = re.compile(rb"\x06\x03\x55\x1d\x0f(?:\x01\x01\xff)?\x04.\x03.[\0-\x07](.)", re.DOTALL)  # its first eight bits: digitalSignature is the highest


class PeerChecks:
    """The checks of one validation context. `sans`: one of them must match; `hashes` and `spki`: one of either kind must be the peer's."""

    __slots__ = ("hashes", "sans", "spki")

    def __init__(self, sans: tuple[SanMatcher, ...] = (), hashes: frozenset[str] = frozenset(), spki: frozenset[bytes] = frozenset()) -> None:
        self.sans = sans
        self.hashes = hashes
        self.spki = spki

    def __bool__(self) -> bool:
        return bool(self.sans or self.hashes or self.spki)

    def verify(self, certificate: Certificate, stats: TlsStats, override: tuple[str, ...] = ()) -> None:
        """Raise PeerRejected, counted, unless the certificate passes. `override`: names of which the certificate must have one, instead of `sans`."""
        try:
            if override:
                if not any(has_name(certificate, name) for name in override):
                    stats.fail_verify_san.n += 1
                    raise PeerRejected(
                        f"verify cert failed: verify SAN list, expected SANs: [{', '.join(override)}], certificate SANs: [{', '.join(names(certificate))}]"
                    )
            elif self.sans and not any(matches(certificate) for matches in self.sans):
                stats.fail_verify_san.n += 1
                raise PeerRejected(f"verify cert failed: SAN matcher, certificate SANs are [{', '.join(names(certificate))}]")
            if (self.hashes or self.spki) and certificate.sha256 not in self.hashes and (not self.spki or certificate.spki_sha256 not in self.spki):
                stats.fail_verify_cert_hash.n += 1
                raise PeerRejected("verify cert failed: cert hash and spki")
        except DerError as error:
            stats.fail_verify_error.n += 1
            raise PeerRejected(f"verify cert failed: {error}") from error


def signs(der: bytes) -> bool:
    """Whether a certificate (DER) may be used for signatures: it says so, or nothing of what it is for (RFC 5280 section 4.2.1.3).

    Looked for in the bytes, because this is for every handshake. Bytes like those of the extension elsewhere in a certificate can only make it be refused.
    """
    return all(bits >= b"\x80" for bits in _KEY_USAGE.findall(der))


def compile_checks(proto: Any) -> PeerChecks:
    """The checks of a `CertificateValidationContext`. Raises ConfigError with paths relative to it."""
    sans = [compile_san(matcher, f"match_typed_subject_alt_names[{at}]") for at, matcher in enumerate(proto.match_typed_subject_alt_names)]
    if proto.match_subject_alt_names:
        if sans:
            fail(
                "match_subject_alt_names",
                "SAN-based verification using both match_typed_subject_alt_names and the deprecated match_subject_alt_names is not allowed",
            )
        sans = [_compile_untyped_san(matcher, f"match_subject_alt_names[{at}]") for at, matcher in enumerate(proto.match_subject_alt_names)]
    if sans and not proto.HasField("trusted_ca") and not proto.HasField("system_root_certs"):
        fail("trusted_ca", "SAN-based verification of peer certificates without trusted CA is insecure and not allowed")
    hashes = frozenset(_hash(text, f"verify_certificate_hash[{at}]") for at, text in enumerate(proto.verify_certificate_hash))
    spki = frozenset(_spki(text, f"verify_certificate_spki[{at}]") for at, text in enumerate(proto.verify_certificate_spki))
    return PeerChecks(tuple(sans), hashes, spki)


def names(certificate: Certificate) -> list[str]:
    """All subject alternative names as text, for messages."""
    return [*certificate.dns_sans, *map(ip_text, certificate.ip_sans), *certificate.uri_sans, *certificate.email_sans]


def has_name(certificate: Certificate, name: str) -> bool:
    """Whether the certificate is for `name`: a DNS name (wildcards of the certificate apply), an IP address or a URI."""
    return any(dns_match(name, san) for san in certificate.dns_sans) or name in certificate.uri_sans or name in map(ip_text, certificate.ip_sans)


def _compile_untyped_san(proto: Any, path: str) -> SanMatcher:
    matches = compile_string_at(proto, path)
    exact = proto.exact if proto.WhichOneof("match_pattern") == "exact" else ""

    def match(certificate: Certificate) -> bool:
        if exact and any(dns_match(exact, san) for san in certificate.dns_sans):
            return True
        return any(matches(san.encode("latin-1")) for san in names(certificate))

    return match


def _hash(text: str, path: str) -> str:
    plain = text.replace(":", "") if len(text) == 95 else text
    try:
        digest = bytes.fromhex(plain)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        fail(path, f"Invalid hex-encoded SHA-256 {text}")
    return digest.hex()


def _spki(text: str, path: str) -> bytes:
    try:
        digest = base64.b64decode(text, validate=True)
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        fail(path, f"Invalid base64-encoded SHA-256 {text}")
    return digest
