"""Certificates of the TLS cases, made anew for each test run: files `<name>.pem` (certificate and chain) and `<name>.key` in one folder."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_NOT_BEFORE = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(days=1)


class Authority:
    """A certificate authority that writes what it issues into a folder. With `parent` it is an intermediate one, and what it issues comes with its chain."""

    def __init__(self, folder: Path, name: str, parent: Authority | None = None) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests"), x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            (parent or self)
            ._builder(self.subject, self.key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign((parent or self).key, hashes.SHA256())
        )
        pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        self.chain = pem if parent else b""
        (folder / f"{name}.pem").write_bytes(pem)

    def revoke(self, *certificates: x509.Certificate) -> bytes:
        """A revocation list in PEM."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.subject).last_update(_NOT_BEFORE).next_update(_NOT_BEFORE + dt.timedelta(days=365))
        for certificate in certificates:
            revoked = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(_NOT_BEFORE).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, days: float = 3650) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(key.public_key())
            .serial_number(1 << 152 | x509.random_serial_number() >> 8)  # an odd number of hexadecimal digits
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_BEFORE + dt.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )

    def issue(self, name: str, *sans: str, days: float = 365, with_rsa: bool = False, signs: bool = True) -> x509.Certificate:
        """A certificate for servers and clients; SANs are URIs (with ://), IP addresses or DNS names. Without `signs` its key is to encipher keys only."""
        key = rsa.generate_private_key(65537, 2048) if with_rsa else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests"), x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            self._builder(subject, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False, signs=signs), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        )
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName([_san(san) for san in sans]), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        (self.folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + self.chain)
        (self.folder / f"{name}.key").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        )
        return certificate


def _san(text: str) -> x509.GeneralName:
    if "://" in text:
        return x509.UniformResourceIdentifier(text)
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _key_usage(*, signs_certificates: bool, signs: bool = True) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs,
        content_commitment=False,
        key_encipherment=not signs,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def create(folder: Path) -> None:
    """All that the cases name."""
    mesh = Authority(folder, "ca")
    mesh.issue("server", "a.test", "*.wild.test", "127.0.0.1")
    mesh.issue("other", "other.test")
    mesh.issue("client", "spiffe://mesh.test/ns/default/sa/web", "web.mesh.test")
    mesh.issue("nosan")
    mesh.issue("rsa", "rsa.mesh.test", with_rsa=True)
    mesh.issue("rsa_wild", "*.test", with_rsa=True)
    mesh.issue("rsa_enciphers", "a.test", with_rsa=True, signs=False)
    mesh.issue("expired", "a.test", days=0.5)
    mesh.issue("wild", "*.mesh.test", "10.1.2.3")
    revoked = mesh.issue("revoked", "a.test")
    between = Authority(folder, "between-ca", mesh)
    between.issue("deep", "deep.mesh.test")
    deep_revoked = between.issue("deep_revoked", "deep.mesh.test")
    (folder / "ca.crl").write_bytes(mesh.revoke(revoked))
    (folder / "between-ca.crl").write_bytes(between.revoke(deep_revoked))
    (folder / "both.crl").write_bytes(mesh.revoke(revoked) + between.revoke(deep_revoked))
    (folder / "between-ca-revoked.crl").write_bytes(mesh.revoke(between.certificate) + between.revoke())
    rogue = Authority(folder, "rogue-ca")
    rogue.issue("rogue", "spiffe://mesh.test/ns/default/sa/web", "a.test")


def with_clients(folder: Path, server: str) -> Path:
    """Certificates of `server`.test and client.test by one authority, and one of client.test by another, in a folder."""
    ca = Authority(folder, "ca")
    for name in (server, "client"):
        ca.issue(name, f"{name}.test")
    Authority(folder, "rogue-ca").issue("rogue", "client.test")
    return folder
