"""How a workload that has a certificate proves it when it asks for the next one, where its connection does not (mutual TLS).

Two metadata entries go with CreateCertificate: the chain that it holds (PEM, leaf first), and a signature by the leaf's key of the new request's text
(ECDSA or RSA PKCS #1 v1.5, SHA-256). An authority that does not know them ignores them.
"""

from __future__ import annotations

CHAIN_HEADER = "x-meshproxy-chain-bin"
SIGNATURE_HEADER = "x-meshproxy-signature-bin"


def signed_text(csr: str) -> bytes:
    """What is signed. The first line keeps the signature from being good for anything else."""
    return b"meshproxy certificate renewal 1\n" + csr.encode("utf-8", "surrogatepass")
