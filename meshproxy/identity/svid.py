"""What a workload holds: a checked certificate chain with its key, and the roots that it trusts.

What an authority or an agent sends is checked before it replaces what is there: a chain that does not lead to one of its own roots, or is of another key,
would break every connection, and there is a better one in use.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from meshproxy.api import spiffe
from meshproxy.api.spiffe import SpiffeId
from meshproxy.record import Record

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class BadSvid(ValueError):
    """What came cannot be used."""


class Svid(Record, frozen=True):
    """A certificate in use. `chain`: leaf first, without the root; `bundle`: roots of the trust domain; `federated`: of others, by their SPIFFE ID."""

    identity: SpiffeId
    key: PrivateKey
    chain: tuple[x509.Certificate, ...]
    bundle: tuple[x509.Certificate, ...]
    federated: tuple[tuple[str, tuple[x509.Certificate, ...]], ...] = ()

    @property
    def not_before(self) -> float:
        """Seconds since 1970."""
        return self.chain[0].not_valid_before_utc.timestamp()

    @property
    def not_after(self) -> float:
        """Seconds since 1970."""
        return self.chain[0].not_valid_after_utc.timestamp()

    @property
    def key_pem(self) -> bytes:
        """PKCS #8, without a password."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def __repr__(self) -> str:
        return f"<Svid {self.identity} until {self.chain[0].not_valid_after_utc:%FT%TZ}>"  # never the key


def checked(key: PrivateKey, chain: Sequence[x509.Certificate], bundle: Iterable[x509.Certificate], now: float) -> Svid:
    """An Svid of parts that fit together. Raises BadSvid."""
    if not chain:
        raise BadSvid("the chain is empty")
    leaf, bundle = chain[0], tuple(bundle)
    if leaf.public_key() != key.public_key():
        raise BadSvid("the certificate is of another key")
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
        if len(names) != 1:
            raise BadSvid(f"the certificate has {len(names)} URIs, and must have exactly one")
        identity = spiffe.parse(names[0])
        constraints = [one.value.ca for one in leaf.extensions if isinstance(one.value, x509.BasicConstraints)]
    except x509.ExtensionNotFound:
        raise BadSvid("the certificate has no subject alternative name") from None
    except ValueError as error:
        raise BadSvid(str(error)) from None
    if not identity.path or any(constraints):
        raise BadSvid(f"the certificate of {identity} is an authority's")
    if now >= leaf.not_valid_after_utc.timestamp():
        raise BadSvid("the certificate has expired (or our clock is wrong)")
    for one, issuer in itertools.pairwise(chain):
        if not _signed_by(one, issuer):
            raise BadSvid("a certificate of the chain is not signed by the next one")
    if not any(chain[-1] == root or _signed_by(chain[-1], root) for root in bundle):
        raise BadSvid("the chain leads to none of the roots")
    return Svid(identity, key, tuple(one for one in chain if one not in bundle), bundle)


def read_pem(text: str) -> list[x509.Certificate]:
    """Certificates of a PEM text, at least one. Raises BadSvid."""
    try:
        return x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise BadSvid("there is no PEM certificate, or a damaged one") from None


def read_der(data: bytes) -> list[x509.Certificate]:
    """Certificates in DER one after the other, as the Workload API sends them. Raises BadSvid."""
    found = []
    at = 0
    while at < len(data):
        end = _end(data, at)
        try:
            found.append(x509.load_der_x509_certificate(data[at:end]))
        except ValueError:
            raise BadSvid("a DER certificate is damaged") from None
        at = end
    return found


def read_key(data: bytes) -> PrivateKey:
    """A PKCS #8 key in DER. Raises BadSvid, which says nothing of the key."""
    try:
        key = load_der_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadSvid("the private key is damaged") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise BadSvid("the private key is neither ECDSA nor RSA")
    return key


def _end(data: bytes, at: int) -> int:
    """Where the SEQUENCE that begins at `at` ends."""
    head = data[at : at + 6]
    if len(head) < 2 or head[0] != 0x30:
        raise BadSvid("what should be a DER certificate is none")
    size = head[1] & 0x7F if head[1] & 0x80 else 0
    if size > 4:
        raise BadSvid("a DER certificate is damaged")
    length = int.from_bytes(head[2 : 2 + size], "big") if size else head[1]
    end = at + 2 + size + length
    if end > len(data):
        raise BadSvid("a DER certificate is cut short")
    return end


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
