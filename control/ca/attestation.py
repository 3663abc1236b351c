"""Who a caller is: what is known of a call goes in, the identities that it may have come out.

An attestor looks at one kind of proof. It returns None when the call has none of its kind, and raises `Rejected` when the proof is no good: nobody else is
asked then. Join tokens are in `tokens.py`, Kubernetes in `kubernetes.py`; here are processes of this machine, and those who were somebody before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from control.ca import certificates
from control.ca.certificates import BadCertificate
from control.ca.csr import SigningRequest
from meshproxy.api import spiffe
from meshproxy.api.renewal import signed_text
from meshproxy.api.spiffe import SpiffeId
from meshproxy.record import Record

MAX_CHAIN = 16 * 1024  # bytes of PEM in a proof
_GRACE_S = 86400.0


class Rejected(Exception):
    """The proof is no good. The text is for the caller."""


class AttestorUnavailable(Exception):
    """Nobody can say now whether the proof is good: the caller should try again."""


class PeerCredentials(Record, frozen=True):
    """Of the process at the other end of a Unix socket when it connected, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class Caller(Record, frozen=True):
    """What is known of a call. `certificate`: PEM of the leaf that it was made with (mutual TLS; verified). `proof_chain` and `proof`: see `renewal`."""

    tokens: tuple[str, ...] = ()
    peer: PeerCredentials | None = None
    certificate: str = ""
    proof_chain: str = ""
    proof: bytes = b""
    csr: str = ""
    address: str = ""


class Attestor(Protocol):
    """See above. `request` was checked; its identity is what the caller wishes, and proves nothing."""

    async def attest(self, caller: Caller, request: SigningRequest) -> tuple[SpiffeId, ...] | None: ...


class _Rule(Record, frozen=True):
    identity: SpiffeId
    uid: int
    pid: int | None


class UnixPeers:
    """Processes of this machine: who started them says who they are.

    A pid says something only as long as whoever registered it has not waited for the process: no other gets the number before.
    """

    def __init__(self) -> None:
        self._rules: list[_Rule] = []

    def register(self, identity: SpiffeId, *, uid: int, pid: int | None = None) -> None:
        """All processes of a user, or one of them, may be `identity`."""
        self._rules.append(_Rule(identity, uid, pid))

    def unregister(self, pid: int) -> None:
        """The process is gone."""
        self._rules = [rule for rule in self._rules if rule.pid != pid]

    async def attest(self, caller: Caller, request: SigningRequest) -> tuple[SpiffeId, ...] | None:
        """All identities of the process; None for calls that did not come through a Unix socket."""
        peer = caller.peer
        if peer is None:
            return None
        found = tuple(rule.identity for rule in self._rules if rule.uid == peer.uid and rule.pid in (None, peer.pid))
        if not found:
            raise Rejected(f"process {peer.pid} of user {peer.uid} is not known here")
        return found


class Renewals:
    """Those who hold a certificate of ours, by mutual TLS or by a signature of its key under the new request (`meshproxy.api.renewal`), may be who it says.

    A repeated signature does no harm: what is signed for is the new key, which whoever repeats it does not have. `grace_s`: how long after its end a
    certificate may still be renewed, so that an authority that was away finds its workloads again.
    """

    def __init__(
        self, trust_domain: str, bundle: Callable[[], tuple[x509.Certificate, ...]], *, clock: Callable[[], float] = time.time, grace_s: float = _GRACE_S
    ) -> None:
        self._trust_domain = trust_domain
        self._bundle = bundle
        self._clock = clock
        self._grace_s = grace_s

    async def attest(self, caller: Caller, request: SigningRequest) -> tuple[SpiffeId, ...] | None:
        """The identity of the certificate."""
        if caller.certificate:
            leaf = _certificates(caller.certificate)[0]
        elif caller.proof_chain:
            chain = _certificates(caller.proof_chain)
            leaf = chain[0]
            self._check_chain(chain)
            _check_signature(leaf, caller.proof, signed_text(caller.csr))
        else:
            return None
        # One that is not valid yet is ours all the same: the clock has been set back since, which is when everybody has to renew.
        if self._clock() >= certificates.not_after(leaf) + self._grace_s:
            raise Rejected("the certificate has expired too long ago: join again")
        try:
            identity = spiffe.parse(certificates.identity_of(leaf))
        except ValueError:
            raise Rejected("the certificate has no SPIFFE ID") from None
        if identity.trust_domain != self._trust_domain or not identity.path:
            raise Rejected(f"the certificate's identity is no workload of {self._trust_domain}")
        return (identity,)

    def _check_chain(self, chain: list[x509.Certificate]) -> None:
        try:
            certificates.check_chain(chain, self._bundle())
            for depth, one in enumerate(chain[1:]):
                certificates.check_authority(one, None, path_length=depth)
        except BadCertificate as error:
            raise Rejected(f"the certificate is not ours: {error}") from None


def _certificates(pem: str) -> list[x509.Certificate]:
    if len(pem) > MAX_CHAIN:
        raise Rejected(f"the chain has more than {MAX_CHAIN} bytes")
    try:
        return x509.load_pem_x509_certificates(pem.encode("utf-8", "surrogatepass"))
    except ValueError:
        raise Rejected("the certificate cannot be read") from None


def _check_signature(leaf: x509.Certificate, signature: bytes, text: bytes) -> None:
    key = leaf.public_key()
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, text, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, text, padding.PKCS1v15(), hashes.SHA256())
        else:
            raise Rejected("the certificate's key is neither ECDSA nor RSA")
    except InvalidSignature:
        raise Rejected("the request is not signed by the certificate's key") from None
