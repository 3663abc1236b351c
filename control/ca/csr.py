"""A certificate signing request as it comes from outside: read, doubted, and reduced to a public key and the identity that is asked for.

Nothing else of a request ever gets into a certificate. What asks for more than an identity (an authority's rights, other names) is refused rather than cut
down, so that nobody believes to have got it.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from control.ca.certificates import LeafKey
from meshproxy.api import spiffe
from meshproxy.api.spiffe import SpiffeId
from meshproxy.record import Record

MAX_REQUEST = 16 * 1024  # bytes of PEM: an RSA key of 4096 bits needs two thousand
_BEGIN = "-----BEGIN CERTIFICATE REQUEST-----", "-----BEGIN NEW CERTIFICATE REQUEST-----"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # what Envoy's TLS library takes; it takes no Ed25519 by default
_RSA_BITS = 2048, 4096  # more make a verification slow for everybody
_RSA_EXPONENT = 65537


class BadRequest(ValueError):
    """A request that is never signed, whoever it comes from."""


class SigningRequest(Record, frozen=True):
    """What was asked for. `identity` is None when the request names nobody."""

    public_key: LeafKey
    identity: SpiffeId | None


def parse_csr(text: str) -> SigningRequest:
    """Read one PEM request. Raises BadRequest."""
    if len(text) > MAX_REQUEST:
        raise BadRequest(f"the request has more than {MAX_REQUEST} bytes")
    if sum(text.count(begin) for begin in _BEGIN) != 1:
        raise BadRequest("there is not exactly one PEM certificate request")
    try:
        request = x509.load_pem_x509_csr(text.encode("utf-8", "surrogatepass"))
        public_key = request.public_key()
        signed = request.is_signature_valid
        extensions = request.extensions
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise BadRequest(f"the request cannot be read: {error}") from None
    checked = _check_key(public_key)
    if not signed:
        raise BadRequest("the request is not signed by its own key")
    _check_rights(extensions)
    return SigningRequest(checked, _identity(extensions))


def _check_key(key: object) -> LeafKey:
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name not in _CURVES:
            raise BadRequest(f"the key's curve is {key.curve.name}; it must be one of {', '.join(_CURVES)}")
        return key
    if isinstance(key, rsa.RSAPublicKey):
        least, most = _RSA_BITS
        if not least <= key.key_size <= most:
            raise BadRequest(f"the RSA key has {key.key_size} bits; it must have {least} to {most}")
        if key.public_numbers().e != _RSA_EXPONENT:
            raise BadRequest(f"the RSA key's exponent is not {_RSA_EXPONENT}")
        return key
    raise BadRequest("the key is neither ECDSA nor RSA")


def _check_rights(extensions: x509.Extensions) -> None:
    for extension in extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise BadRequest("the request asks to be an authority (CA:TRUE)")
        if isinstance(value, x509.KeyUsage) and (value.key_cert_sign or value.crl_sign):
            raise BadRequest("the request asks to sign certificates or revocation lists")
        if isinstance(value, x509.NameConstraints | x509.PolicyConstraints):
            raise BadRequest(f"the request asks for {extension.oid.dotted_string}, which only authorities have")


def _identity(extensions: x509.Extensions) -> SpiffeId | None:
    try:
        names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return None
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        raise BadRequest("the request asks for something else than exactly one URI as its subject alternative name")
    try:
        found = spiffe.parse(names[0].value)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if not found.path:
        raise BadRequest(f"{found} is a trust domain, and no workload's identity")
    return found
