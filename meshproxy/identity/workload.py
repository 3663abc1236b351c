"""A certificate from an authority with Istio's API (CreateCertificate): asked for, renewed at half of its life, kept while the authority is away.

The key is made here for each certificate and never written anywhere. Who we are is proved by a bearer token (read anew each time, since Kubernetes rotates
it), by a join token the first time, by the Unix socket that the call goes through, or, once there is a certificate, by that one (`meshproxy.api.renewal`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.message import DecodeError

from meshproxy.api import identity_protos
from meshproxy.api.renewal import CHAIN_HEADER, SIGNATURE_HEADER, signed_text
from meshproxy.api.spiffe import SpiffeId
from meshproxy.identity import schedule
from meshproxy.identity.calls import CallFailed, Calls
from meshproxy.identity.svid import BadSvid, PrivateKey, Svid, checked, read_pem
from meshproxy.record import Record

log = logging.getLogger("meshproxy.identity")

_TIMEOUT_S = 10.0
_EXPIRED_SOON = 0.25  # of a life that is left when failures become warnings


class Wish(Record, frozen=True):
    """What is asked for. `identity`: None takes the one that the proof is for. `life_s`: 0 leaves it to the authority. `token_file`: of a bearer token;
    `join_token`, or the file with it: for the first time only."""

    identity: SpiffeId | None = None
    life_s: float = 0.0
    token_file: str = ""
    join_token: str = ""
    join_token_file: str = ""


class WorkloadSource:
    """Runs until cancelled. `clock`: seconds since 1970; `sleep`: as asyncio's; `chance`: 0 to 1."""

    def __init__(
        self,
        calls: Calls,
        wish: Wish,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._calls = calls
        self._wish = wish
        self._clock = clock
        self._sleep = sleep
        self._chance = chance
        self.svid: Svid | None = None
        self.failures = 0  # in a row
        self.renewals = 0
        self._why = ""

    async def run(self, publish: Callable[[Svid], None]) -> None:
        """Call `publish` with each new certificate."""
        while True:
            key = ec.generate_private_key(ec.SECP256R1())  # kept for all tries: a join token is good for one key
            received = await self._until_it_is_there(key)
            publish(received)
            await self._until_it_is_due(received)

    async def _until_it_is_there(self, key: ec.EllipticCurvePrivateKey) -> Svid:
        csr = self._request(key)
        while True:
            try:
                svid = await self._ask(key, csr)
            except (CallFailed, ValueError, OSError) as error:
                self.failures += 1
                self._failed(error)
                await self._sleep(schedule.back_off(self.failures, self._chance))
                continue
            if self.failures:
                log.info("the authority is back: %r", svid)
            self.failures, self._why = 0, ""
            self.renewals += 1
            self.svid = svid
            return svid

    async def _ask(self, key: PrivateKey, csr: str) -> Svid:
        request = identity_protos.message("istio.v1.auth.IstioCertificateRequest")(csr=csr, validity_duration=int(self._wish.life_s))
        answer = await self._calls.unary(identity_protos.CREATE_CERTIFICATE, request.SerializeToString(), self._proofs(csr), _TIMEOUT_S)
        try:
            texts = list(identity_protos.message("istio.v1.auth.IstioCertificateResponse").FromString(answer).cert_chain)
        except DecodeError as error:
            raise BadSvid("the authority's answer is none") from error
        if len(texts) < 2:
            raise BadSvid("the authority's answer has no chain and root")
        chain = [one for text in texts[:-1] for one in read_pem(text)]
        svid = checked(key, chain, read_pem(texts[-1]), self._clock())
        if self._wish.identity not in (None, svid.identity):
            raise BadSvid(f"the authority gave us the certificate of {svid.identity}")
        return svid

    def _request(self, key: ec.EllipticCurvePrivateKey) -> str:
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        if self._wish.identity is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(self._wish.identity))]), critical=True)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode("ascii")

    def _proofs(self, csr: str) -> list[tuple[str, str | bytes]]:
        found: list[tuple[str, str | bytes]] = []
        if self._wish.token_file:
            with open(self._wish.token_file, encoding="ascii") as file:
                found.append(("authorization", f"Bearer {file.read().strip()}"))
        if self.svid is not None:
            key = self.svid.key
            assert isinstance(key, ec.EllipticCurvePrivateKey)  # it was made here
            found.append((CHAIN_HEADER, b"".join(one.public_bytes(Encoding.PEM) for one in self.svid.chain)))
            found.append((SIGNATURE_HEADER, key.sign(signed_text(csr), ec.ECDSA(hashes.SHA256()))))
        elif token := self._join_token():
            found.append(("authorization", f"Bearer {token}"))
        return found

    def _join_token(self) -> str:
        if not self._wish.join_token_file:
            return self._wish.join_token
        with open(self._wish.join_token_file, encoding="ascii") as file:
            return file.read().strip()

    async def _until_it_is_due(self, svid: Svid) -> None:
        received = self._clock()
        at = schedule.renew_at(received, svid.not_after, self._chance)
        # Even if our clock and the authority's do not agree at all, it is not asked all the time.
        await self._sleep(min((at - received) / 2, schedule.LOOK_S))
        while not schedule.is_due(now := self._clock(), svid.not_before, at):
            await self._sleep(min(at - now, schedule.LOOK_S))

    def _failed(self, error: Exception) -> None:
        """Say it once for each reason, and louder when it becomes urgent."""
        svid, now = self.svid, self._clock()
        urgent = svid is None or now > svid.not_after - _EXPIRED_SOON * (svid.not_after - svid.not_before)
        why = f"{'!' if urgent else ''}{error}"
        if why != self._why:
            self._why = why
            state = "there is no certificate yet" if svid is None else f"going on with {svid!r}"
            log.log(logging.WARNING if urgent else logging.INFO, "no certificate from the authority (%s); %s", error, state)

    def __repr__(self) -> str:
        return f"<WorkloadSource {self.svid!r}, {self.renewals} renewals, {self.failures} failures>"
