"""Makes and checks certificates. Pure: keys, names and times in, certificates out.

Source: RFC 5280 section 4; the X509-SVID standard, sections 2 to 5 (one URI SAN, which key usages, what a signing certificate may be).
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshproxy.api.spiffe import SpiffeId

AuthorityKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
LeafKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

BACKDATED_S = 60  # what clocks of a mesh may differ by: a certificate is valid that much before it was made


class BadCertificate(ValueError):
    """A certificate that cannot be what it is meant to be."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """For authorities and leaves alike: P-256, the fastest that every TLS library verifies."""
    return ec.generate_private_key(ec.SECP256R1())


def make_root(key: AuthorityKey, trust_domain: str, now: float, life_s: float) -> x509.Certificate:
    """A self-signed certificate of a trust domain, that may sign intermediates, and those leaves only."""
    subject = _authority_name(trust_domain, "Root CA")
    return _authority(subject, key, subject, key, trust_domain, now - BACKDATED_S, now + life_s, path_length=1)


def make_intermediate(key: AuthorityKey, root: x509.Certificate, root_key: AuthorityKey, trust_domain: str, now: float, life_s: float) -> x509.Certificate:
    """A certificate that may sign leaves only; ends with its root at the latest."""
    begin, end = within(root, now - BACKDATED_S, now + life_s)
    return _authority(_authority_name(trust_domain, "Intermediate CA"), key, root.subject, root_key, trust_domain, begin, end, path_length=0)


def make_leaf(
    public: LeafKey,
    issuer: x509.Certificate,
    issuer_key: AuthorityKey,
    identity: SpiffeId,
    now: float,
    life_s: float,
    names: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    """An X509-SVID; ends with its issuer at the latest. Its subject is empty, so that nobody takes that for a name; its SAN is critical, therefore.

    `names`: beside the identity, DNS names and IP addresses (the standard allows them, and one URI only).
    """
    begin, end = within(issuer, now - BACKDATED_S, now + life_s)
    builder = _builder(x509.Name([]), public, issuer.subject, issuer_key.public_key(), begin, end)
    return (
        builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity)), *names]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(key_encipherment=isinstance(public, rsa.RSAPublicKey)), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def within(issuer: x509.Certificate, begin: float, end: float) -> tuple[float, float]:
    """A validity that does not reach beyond its issuer's."""
    return max(begin, not_before(issuer)), min(end, not_after(issuer))


def not_before(certificate: x509.Certificate) -> float:
    """Unix time."""
    return certificate.not_valid_before_utc.timestamp()


def not_after(certificate: x509.Certificate) -> float:
    """Unix time."""
    return certificate.not_valid_after_utc.timestamp()


def pem(*certificates: x509.Certificate) -> str:
    """PEM text of some certificates, in that order."""
    return "".join(one.public_bytes(Encoding.PEM).decode("ascii") for one in certificates)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 in lower-case hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def identity_of(certificate: x509.Certificate) -> str:
    """The SPIFFE ID that a certificate says, not parsed; "" when it has not exactly one URI."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        return ""
    return found[0] if len(found) == 1 else ""


def check_authority(certificate: x509.Certificate, key: AuthorityKey | None, *, path_length: int) -> None:
    """Refuse what cannot sign, or has no room for `path_length` authorities below it. Raises BadCertificate."""
    name = certificate.subject.rfc4514_string() or fingerprint(certificate)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise BadCertificate(f"{name}: it has no basic constraints, so it is no authority") from None
    if not constraints.ca:
        raise BadCertificate(f"{name}: it is no authority (CA:FALSE)")
    if constraints.path_length is not None and constraints.path_length < path_length:
        raise BadCertificate(f"{name}: its path length is {constraints.path_length}, and {path_length} is needed")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise BadCertificate(f"{name}: it has no key usage, and must have the one to sign certificates") from None
    if not usage.key_cert_sign:
        raise BadCertificate(f"{name}: its key usage does not allow it to sign certificates")
    if key is not None and key.public_key() != certificate.public_key():
        raise BadCertificate(f"{name}: the private key is another certificate's")


def check_chain(chain: Iterable[x509.Certificate], roots: Iterable[x509.Certificate]) -> x509.Certificate:
    """Each of the chain is signed by the next, and the last by a root, which is returned; a root at the end of the chain may be left out of it. Times are not
    looked at. Raises BadCertificate."""
    chain = list(chain)
    for one, issuer in itertools.pairwise(chain):
        if not signed_by(one, issuer):
            raise BadCertificate(f"{one.subject.rfc4514_string()}: it is not signed by the next certificate of the chain, {issuer.subject.rfc4514_string()}")
    for root in roots:
        if chain[-1] == root or signed_by(chain[-1], root):
            return root
    raise BadCertificate(f"{chain[-1].subject.rfc4514_string()}: no root signed it")


def signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether names and signature say so."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _authority(
    subject: x509.Name, key: AuthorityKey, issuer: x509.Name, issuer_key: AuthorityKey, trust_domain: str, begin: float, end: float, *, path_length: int
) -> x509.Certificate:
    return (
        _builder(subject, key.public_key(), issuer, issuer_key.public_key(), begin, end)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def _builder(subject: x509.Name, public: LeafKey, issuer: x509.Name, issuer_public: LeafKey, begin: float, end: float) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(dt.datetime.fromtimestamp(int(begin), dt.UTC))
        .not_valid_after(dt.datetime.fromtimestamp(int(end), dt.UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False)
    )


def _authority_name(trust_domain: str, what: str) -> x509.Name:
    # The upper bound of a common name is 64 characters (RFC 5280, appendix A); the serial number keeps subjects of one name apart.
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, what),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{x509.random_serial_number():040x}"[:32]),
        ]
    )


def _key_usage(*, signs: bool = False, key_encipherment: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
