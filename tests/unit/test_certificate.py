"""The certificate reader, against the cryptography package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.net.certificate import Certificate, DerError, pem_certificates
from tests.unit.net_help import pki

FILES = ("ca.pem", "server.pem", "client.pem", "rsa.pem", "expired.pem", "rogue.pem")


def load(name: str) -> tuple[Certificate, x509.Certificate]:
    data = Path(pki()[name]).read_bytes()
    return pem_certificates(data)[0], x509.load_pem_x509_certificate(data)


@pytest.mark.parametrize("name", FILES)
def test_agrees_with_cryptography(name):
    ours, theirs = load(name)
    assert int(ours.serial, 16) == theirs.serial_number
    assert len(ours.serial) % 2 == 0
    assert ours.sha256 == theirs.fingerprint(hashes.SHA256()).hex()
    assert ours.sha1 == theirs.fingerprint(hashes.SHA1()).hex()
    assert ours.not_before == int(theirs.not_valid_before_utc.timestamp())
    assert ours.not_after == int(theirs.not_valid_after_utc.timestamp())
    assert ours.pem == Path(pki()[name]).read_text()


def test_subject_as_openssl_prints_it():
    certificate = load("client.pem")[0]
    assert certificate.subject == r"CN=client,O=Exa\, mple,C=DE"
    printed = subprocess.run(
        ["openssl", "x509", "-in", pki()["client.pem"], "-noout", "-subject", "-issuer", "-nameopt", "RFC2253"], check=True, capture_output=True, text=True
    ).stdout
    assert printed.splitlines() == [f"subject={certificate.subject}", f"issuer={certificate.issuer}"]


def test_names():
    certificate = load("server.pem")[0]
    assert certificate.dns_sans == ("server.example.com", "*.wild.example.com")
    assert certificate.uri_sans == ("spiffe://mesh/ns/a/sa/server",)
    assert certificate.ip_sans == (b"\x7f\0\0\1",)
    assert certificate.email_sans == ()
    assert load("ca.pem")[0].uri_sans == ()


def test_embedded_nul_is_kept():
    """CVE-2026-47778: a name must be compared in full."""
    der = bytearray(load("client.pem")[0].der)
    at = der.index(b"spiffe://mesh/ns/c/sa/client")
    der[at + 13] = 0
    assert Certificate(bytes(der)).uri_sans == ("spiffe://mesh\0ns/c/sa/client",)


def test_chain():
    both = Path(pki()["server.pem"]).read_bytes() + b"text between\n" + Path(pki()["ca.pem"]).read_bytes()
    assert [certificate.subject for certificate in pem_certificates(both)] == ["CN=server", "O=Test,CN=Test CA"]
    assert pem_certificates(b"nothing") == []
    for broken in (b"-----BEGIN CERTIFICATE-----\nAAAA", b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"):
        with pytest.raises(DerError):
            pem_certificates(broken)


def read_all(certificate: Certificate) -> None:
    for name in ("subject", "issuer", "serial", "not_before", "uri_sans", "dns_sans", "ip_sans", "other_sans", "spki_sha256"):
        getattr(certificate, name)


@given(st.data())
def test_damaged(data):
    der = bytearray(load("client.pem")[0].der)
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_all(Certificate(bytes(der[: data.draw(st.integers(0, len(der)))])))
    except DerError:
        pass


@given(st.binary(max_size=100))
def test_garbage(data):
    for der in (data, b"\x30\x82" + len(data).to_bytes(2, "big") + data):
        with pytest.raises(DerError):
            read_all(Certificate(der))
