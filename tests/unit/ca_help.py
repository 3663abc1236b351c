"""What the tests of the authority share: a clock that is set by hand, requests of all kinds, and openssl as somebody who knows nothing of us."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from control.ca import certificates
from meshproxy.api import spiffe
from tests.polling import PATIENCE

NOW = 1_800_000_000.0
WEB = spiffe.workload("mesh.test", "default", "web")
API = spiffe.workload("mesh.test", "default", "api")

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


class Clock:
    """Seconds since 1970, as told."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def csr(identity: object = WEB, *, key: object = None, names: list[x509.GeneralName] | None = None, extensions: list[x509.ExtensionType] | None = None) -> str:
    """PEM of a request. `identity` None: it names nobody; `names`: instead of the identity."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names is None and identity is not None:
        names = [x509.UniformResourceIdentifier(str(identity))]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions or ():
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def key_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def openssl(*arguments: str, data: str = "") -> str:
    """Its output; what it says on stderr, too, when it fails."""
    done = subprocess.run(["openssl", *arguments], input=data, capture_output=True, text=True, check=False, timeout=PATIENCE)
    return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}\nexit {done.returncode}"


def verify(folder: Path, chain: tuple[x509.Certificate, ...], bundle: tuple[x509.Certificate, ...], at: float) -> str:
    """`openssl verify` of a chain for both purposes at a time: "OK", or what it says instead."""
    (folder / "leaf.pem").write_text(certificates.pem(chain[0]))
    (folder / "rest.pem").write_text(certificates.pem(*chain[1:]))
    (folder / "bundle.pem").write_text(certificates.pem(*bundle))
    files = ["-CAfile", str(folder / "bundle.pem"), "-untrusted", str(folder / "rest.pem"), str(folder / "leaf.pem")]
    for purpose in ("sslserver", "sslclient"):
        said = openssl("verify", "-x509_strict", "-attime", str(int(at)), "-purpose", purpose, *files)
        if not said.endswith(": OK\n"):
            return said
    return "OK"
