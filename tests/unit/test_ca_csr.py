"""Requests to be signed: which are, and why others are not."""

from __future__ import annotations

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from control.ca.csr import BadRequest, parse_csr
from tests.unit.ca_help import WEB, csr

URI = x509.UniformResourceIdentifier


def usage(**allowed: bool) -> x509.KeyUsage:
    names = "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign encipher_only decipher_only".split()
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)])
def test_good_requests(key):
    found = parse_csr(csr(key=key))
    assert (found.identity, found.public_key) == (WEB, key.public_key())


def test_harmless_extensions_are_let_by():
    extensions = [
        x509.BasicConstraints(ca=False, path_length=None), usage(digital_signature=True), x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    ]  # fmt: skip
    assert parse_csr(csr(extensions=extensions)).identity == WEB
    assert parse_csr(csr(None)).identity is None


@pytest.mark.parametrize(
    ("request_pem", "why"),
    [
        (csr(extensions=[x509.BasicConstraints(ca=True, path_length=None)]), "to be an authority"),
        (csr(extensions=[usage(key_cert_sign=True)]), "to sign certificates"),
        (csr(extensions=[usage(crl_sign=True)]), "to sign certificates"),
        (csr(extensions=[x509.NameConstraints([URI("mesh.test")], None)]), "which only authorities have"),
        (csr(names=[URI(str(WEB)), URI("spiffe://mesh.test/ns/default/sa/admin")]), "exactly one URI"),
        (csr(names=[URI(str(WEB)), x509.DNSName("admin.test")]), "exactly one URI"),
        (csr(names=[x509.DNSName("admin.test")]), "exactly one URI"),
        (csr(names=[URI("spiffe://mesh.test")]), "no workload's identity"),
        (csr(names=[URI("spiffe://mesh.test/ns/../sa/x")]), "no segment"),
        (csr(names=[URI("https://mesh.test/ns/default/sa/web")]), "no SPIFFE ID"),
        (csr(key=rsa.generate_private_key(65537, 1024)), "1024 bits"),
        (csr(key=rsa.generate_private_key(3, 2048)), "exponent"),
        (csr(key=ec.generate_private_key(ec.SECP224R1())), "curve is secp224r1"),
        (csr(key=ec.generate_private_key(ec.SECP256K1())), "curve is secp256k1"),
        ("", "not exactly one"),
        (csr() + csr(), "not exactly one"),
        ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "cannot be read"),
        ("-----BEGIN CERTIFICATE REQUEST-----\n\ud800\n-----END CERTIFICATE REQUEST-----\n", "cannot be read"),
        ("x" * 20000, "more than 16384 bytes"),
    ],
)
def test_bad_requests(request_pem, why):
    with pytest.raises(BadRequest, match=why):
        parse_csr(request_pem)


def test_keys_of_other_kinds():
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(ed25519.Ed25519PrivateKey.generate(), None)
    with pytest.raises(BadRequest, match="neither ECDSA nor RSA"):
        parse_csr(request.public_bytes(Encoding.PEM).decode())


def test_a_request_for_somebody_elses_key():
    """The signature is proof that the caller has the key: with another's public key in it, it is not valid."""
    mine, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def info(key: ec.EllipticCurvePrivateKey) -> bytes:
        return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    der = x509.load_pem_x509_csr(csr(key=mine).encode()).public_bytes(Encoding.DER)
    forged = base64.encodebytes(der.replace(info(mine), info(other))).decode()
    with pytest.raises(BadRequest, match="not signed by its own key"):
        parse_csr(f"-----BEGIN CERTIFICATE REQUEST-----\n{forged}-----END CERTIFICATE REQUEST-----\n")
