"""`CommonTlsContext` into SSL contexts: certificates and keys, trusted authorities, versions, ciphers.

Everything is read into memory first (files, inline data, environment) and given to OpenSSL through an anonymous file, because Python's ssl loads keys
and revocation lists from files only. What Python's ssl cannot express is rejected, not ignored.
"""

from __future__ import annotations

import os
import re
import ssl
from typing import Any

from meshproxy.api.errors import UNSUPPORTED, ConfigError, fail, under
from meshproxy.net.certificate import Certificate, DerError, pem_certificates
from meshproxy.net.tls_verify import PeerChecks, compile_checks
from meshproxy.record import Record, field

_T = "envoy.extensions.transport_sockets.tls.v3."

HONOURS = {
    f"{_T}CommonTlsContext": "tls_params tls_certificates validation_context alpn_protocols",
    f"{_T}TlsParameters": "tls_minimum_protocol_version tls_maximum_protocol_version cipher_suites ecdh_curves",
}

# Envoy's defaults. The brackets of its syntax (equal preference) do not exist in OpenSSL: there the order decides, except for a client that begins with
# ChaCha20 (it computes AES slowly), which has its way where a group has it in it.
_DEFAULT_CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-CHACHA20-POLY1305"
    ":ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384"
)
_VERSIONS = {1: ssl.TLSVersion.TLSv1, 2: ssl.TLSVersion.TLSv1_1, 3: ssl.TLSVersion.TLSv1_2, 4: ssl.TLSVersion.TLSv1_3}
_CURVES = {"X25519": "X25519", "P-256": "prime256v1", "P-384": "secp384r1", "P-521": "secp521r1"}
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME
_PRIORITIZE_CHACHA = 0x200000  # SSL_OP_PRIORITIZE_CHACHA
_EC_KEY = b"\x2a\x86\x48\xce\x3d\x02\x01"  # id-ecPublicKey
INLINE = "<inline>"


class OwnCertificate(Record):
    """A certificate chain with its key, as PEM. `names`: lower-case DNS SANs, or the common name when there is none."""

    path: str
    chain: bytes
    key_path: str
    key: bytes
    password: bytes
    leaf: Certificate
    key_type: str
    names: tuple[str, ...]


class Material(Record):
    """What was read: own certificates, trusted authorities (for /certs: the first of them, with its path), revocation lists."""

    certificates: list[OwnCertificate] = field(default_factory=list)
    trusted: bytes = b""
    authorities: list[tuple[str, Certificate]] = field(default_factory=list)
    crl: bytes = b""
    system_roots: bool = False


class Common(Record):
    """A compiled `CommonTlsContext`.

    `trusts`: there is an authority to verify the peer with. `curve`: the only curve, when one is configured.
    `chacha`: ChaCha20 is preferred for a client that prefers it.
    """

    material: Material
    checks: PeerChecks
    trusts: bool
    alpn: tuple[str, ...]
    minimum: ssl.TLSVersion
    maximum: ssl.TLSVersion
    ciphers: str
    curve: str
    verify_flags: int
    verify_mode: ssl.VerifyMode
    chacha: bool = True


def compile_common(proto: Any, *, server_side: bool) -> Common:
    """Read and check everything. Raises ConfigError with paths relative to `proto`."""
    material = Material()
    for at, certificate in enumerate(proto.tls_certificates):
        with under(f"tls_certificates[{at}]"):
            material.certificates.append(_read_certificate(certificate))
    checks = PeerChecks()
    trusts = untrusted = False
    flags = int(ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN)
    if proto.HasField("validation_context"):
        context = proto.validation_context
        with under("validation_context"):
            checks = compile_checks(context)
            trusts = _read_authorities(context, material)
            untrusted = bool(context.trust_chain_verification)
            if untrusted and server_side:
                fail("trust_chain_verification", "ACCEPT_UNTRUSTED is not possible for client certificates with Python's ssl", UNSUPPORTED)
            if material.crl and not trusts:
                fail("crl", f"Failed to load CRL from {_path(context.crl)} without trusted CA")
            flags |= _verify_flags(context, material)
    if untrusted:
        # Envoy checks and counts, but lets every certificate pass.
        checks, trusts = PeerChecks(), False
    minimum, maximum = _versions(proto.tls_params, server_side)
    common = Common(
        material=material,
        checks=checks,
        trusts=trusts,
        alpn=tuple(proto.alpn_protocols),
        minimum=minimum,
        maximum=maximum,
        ciphers=_ciphers(proto.tls_params, minimum),
        curve=_curve(proto.tls_params),
        verify_flags=flags,
        verify_mode=ssl.CERT_REQUIRED if trusts else ssl.CERT_NONE,
        chacha=not proto.tls_params.cipher_suites or any("|" in suite and "CHACHA20" in suite for suite in proto.tls_params.cipher_suites),
    )
    for name in common.alpn:
        if not name or len(name.encode()) > 255:
            fail("alpn_protocols", f"{name!r} is not a protocol name of 1 to 255 bytes")
    if not server_side:
        new_context(common, server_side=False, alpn=common.alpn)
    return common


def new_context(common: Common, *, server_side: bool, alpn: tuple[str, ...], certificates: tuple[int, ...] | None = None) -> ssl.SSLContext:
    """An SSL context; `certificates` are indexes of own certificates, at most one of each key type (default: all). Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    if not server_side:
        context.check_hostname = False
    context.minimum_version = common.minimum
    context.maximum_version = common.maximum
    context.options |= ssl.OP_NO_RENEGOTIATION
    if server_side and common.minimum >= ssl.TLSVersion.TLSv1_3:
        # Envoy lets the client choose under TLS 1.3, and only there: OpenSSL has one option for all versions.
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if server_side and common.chacha:
        context.options |= _PRIORITIZE_CHACHA
    try:
        context.set_ciphers(common.ciphers)
    except ssl.SSLError:
        fail("tls_params.cipher_suites", f"Failed to initialize cipher suites {common.ciphers}: none of them is known")
    if common.curve:
        context.set_ecdh_curve(_CURVES[common.curve])
    if alpn:
        context.set_alpn_protocols(list(alpn))
    for at in range(len(common.material.certificates)) if certificates is None else certificates:
        with under(f"tls_certificates[{at}]"):
            _load_certificate(context, common.material.certificates[at])
    material = common.material
    if common.trusts:
        if material.system_roots:
            context.load_default_certs(ssl.Purpose.CLIENT_AUTH if server_side else ssl.Purpose.SERVER_AUTH)
        for data, name in ((material.trusted, "trusted_ca"), (material.crl, "crl")):
            if data:
                with under(f"validation_context.{name}"):
                    _load_authorities(context, data)
    context.verify_mode = common.verify_mode
    context.verify_flags = ssl.VerifyFlags(common.verify_flags)
    return context


def _read_certificate(proto: Any) -> OwnCertificate:
    if not proto.HasField("certificate_chain"):
        fail("certificate_chain", "a certificate chain is required")
    if not proto.HasField("private_key"):
        fail("private_key", "Failed to load incomplete private key: a private key is required")
    chain_path = _path(proto.certificate_chain)
    with under("certificate_chain"):
        chain = _read(proto.certificate_chain)
        try:
            leaf = pem_certificates(chain)[0]
            names = tuple(name.lower() for name in leaf.dns_sans) or _common_name(leaf)
            # The algorithm's identifier stands at the front of the key info.
            spki = leaf._parsed.spki[:32]
        except (DerError, IndexError) as error:
            raise ConfigError.at("", f"Failed to load certificate chain from {chain_path}: it is not PEM of an X.509 certificate") from error
    key_type = "EC" if _EC_KEY in spki else "RSA" if b"\x2a\x86\x48\x86\xf7\x0d\x01\x01" in spki else "other"
    with under("private_key"):
        key = _read(proto.private_key)
    password = b""
    if proto.HasField("password"):
        with under("password"):
            password = _read(proto.password).rstrip(b"\r\n")
    return OwnCertificate(chain_path, chain, _path(proto.private_key), key, password, leaf, key_type, names)


def _common_name(leaf: Certificate) -> tuple[str, ...]:
    found = re.search(r"(?:^|,)CN=([^,+\\]+)", leaf.subject)
    return (found.group(1).lower(),) if found else ()


def _read_authorities(context: Any, material: Material) -> bool:
    """Fill in what verifies the peer's chain; whether there is anything."""
    material.system_roots = context.HasField("system_root_certs")
    if context.HasField("trusted_ca"):
        path = _path(context.trusted_ca)
        with under("trusted_ca"):
            material.trusted = _read(context.trusted_ca)
            try:
                found = pem_certificates(material.trusted)
                material.authorities = [(path, certificate) for certificate in found[:1] if certificate.serial]
            except DerError as error:
                raise ConfigError.at("", f"Failed to load trusted CA certificates from {path}: {error}") from error
            if not found:
                fail("", f"Failed to load trusted CA certificates from {path}: there is no PEM certificate in it")
    if context.HasField("crl"):
        with under("crl"):
            material.crl = _read(context.crl)
            if b"-----BEGIN X509 CRL-----" not in material.crl:
                fail("", f"Failed to load CRL from {_path(context.crl)}")
    return material.system_roots or bool(material.trusted)


def _verify_flags(context: Any, material: Material) -> int:
    flags = _NO_CHECK_TIME if context.allow_expired_certificate and material.trusted else 0
    if material.crl or b"-----BEGIN X509 CRL-----" in material.trusted:
        flags |= int(ssl.VERIFY_CRL_CHECK_LEAF if context.only_verify_leaf_cert_crl else ssl.VERIFY_CRL_CHECK_CHAIN)
    return flags


def _versions(params: Any, server_side: bool) -> tuple[ssl.TLSVersion, ssl.TLSVersion]:
    # Envoy's clients stop at TLS 1.2 unless they are told otherwise.
    minimum = _VERSIONS.get(params.tls_minimum_protocol_version, ssl.TLSVersion.TLSv1_2)
    maximum = _VERSIONS.get(params.tls_maximum_protocol_version, ssl.TLSVersion.TLSv1_3 if server_side else ssl.TLSVersion.TLSv1_2)
    if minimum > maximum:
        fail("tls_params.tls_minimum_protocol_version", "is above the maximum version (clients: TLSv1_2 unless tls_maximum_protocol_version is set)")
    return minimum, maximum


def _ciphers(params: Any, minimum: ssl.TLSVersion) -> str:
    text = ":".join(params.cipher_suites).replace("[", "").replace("]", "").replace("|", ":") or _DEFAULT_CIPHERS
    for name in text.split(":"):
        if not re.fullmatch(r"[-+!]?[A-Za-z0-9_+-]+", name):
            fail("tls_params.cipher_suites", f"{name!r} is not the name of a cipher suite")
    # OpenSSL allows the old versions' hashes at its lowest security level only.
    return text + ":@SECLEVEL=0" if minimum < ssl.TLSVersion.TLSv1_2 else text


def _curve(params: Any) -> str:
    curves = list(params.ecdh_curves)
    if not curves:
        return ""
    for name in curves:
        if name not in _CURVES:
            fail("tls_params.ecdh_curves", f"Failed to initialize ECDH curves {name}")
    if len(curves) > 1:
        fail("tls_params.ecdh_curves", "Python's ssl can restrict a context to one curve, not to several", UNSUPPORTED)
    return str(curves[0])


def _load_certificate(context: ssl.SSLContext, item: OwnCertificate) -> None:
    with _AnonymousFile(item.chain) as chain, _AnonymousFile(item.key) as key:
        try:
            context.load_cert_chain(chain, key, password=lambda: item.password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                fail("private_key", f"Failed to load private key from {item.key_path}: it does not belong to the certificate in {item.path}")
            if error.reason and ("KEY_TOO_SMALL" in error.reason or "MD_TOO_WEAK" in error.reason):
                fail("certificate_chain", f"Failed to load certificate chain from {item.path}, Cause: {_words(error)}")
            fail("private_key", f"Failed to load private key from {item.key_path}, Cause: {_words(error)}")


def _load_authorities(context: ssl.SSLContext, data: bytes) -> None:
    with _AnonymousFile(data) as path:
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as error:
            fail("", f"Failed to load it, Cause: {_words(error)}")


def _words(error: ssl.SSLError) -> str:
    if not error.reason:
        return "it is not PEM of such a thing, or the password is wrong"
    return error.reason.replace("_", " ").lower()


class _AnonymousFile:
    """Bytes under a file name, in memory: secrets never touch a disk."""

    def __init__(self, data: bytes) -> None:
        self._fd = os.memfd_create("tls", os.MFD_CLOEXEC)
        with open(self._fd, "wb", closefd=False) as file:
            file.write(data)

    def __enter__(self) -> str:
        return f"/proc/self/fd/{self._fd}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _path(source: Any) -> str:
    return source.filename if source.WhichOneof("specifier") == "filename" else INLINE


def _read(source: Any) -> bytes:
    from meshproxy.api import datasource

    return datasource.read(source)
