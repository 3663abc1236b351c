"""Who calls the control plane's other services by TLS: whoever has a certificate of the mesh, or a token of a service account."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import grpc
from cryptography import x509

from control.ca import certificates
from control.ca.attestation import AttestorUnavailable, Rejected
from control.ca.kubernetes import KubernetesTokens
from control.ca.tokens import PREFIX
from meshproxy.api import spiffe
from meshproxy.api.spiffe import SpiffeId

log = logging.getLogger("meshctl.ca")


class Admission:
    """Says who a call is from. `tokens`: who knows service account tokens; without, only certificates count. Join tokens are for a first certificate only."""

    def __init__(self, trust_domain: str, tokens: KubernetesTokens | None = None, clock: Callable[[], float] = time.time) -> None:
        self._trust_domain = trust_domain
        self._tokens = tokens
        self._clock = clock

    async def __call__(self, context: grpc.aio.ServicerContext) -> SpiffeId:
        """The caller's identity. Ends the call for one that has none."""
        found = context.auth_context().get("x509_pem_cert", [])
        bearers = [
            str(value)[7:].strip() for key, value in context.invocation_metadata() or () if key == "authorization" and str(value)[:7].lower() == "bearer "
        ]
        try:
            return _of_certificate(found[0], self._trust_domain, self._clock()) if found else await self._of_token(bearers)
        except Rejected as error:
            code, why = grpc.StatusCode.UNAUTHENTICATED, str(error)
        except AttestorUnavailable as error:
            code, why = grpc.StatusCode.UNAVAILABLE, str(error)
        log.warning("%s is not let in: %s", context.peer(), why)
        await context.abort(code, why)
        raise AssertionError

    async def _of_token(self, bearers: Iterable[str]) -> SpiffeId:
        for token in bearers:
            if token.startswith(PREFIX):
                raise Rejected("a join token is for a first certificate; come with that certificate, to the port for it")
            if self._tokens is not None:
                return await self._tokens.identity(token)
        raise Rejected("the call proves nothing about who makes it: it needs a certificate of the mesh, or a service account token")


def _of_certificate(pem: bytes, trust_domain: str, now: float) -> SpiffeId:
    """The handshake has verified it, which may be long ago."""
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        identity = spiffe.parse(certificates.identity_of(certificate))
    except ValueError:
        raise Rejected("the certificate has no SPIFFE ID") from None
    if certificate.not_valid_after_utc.timestamp() < now:
        raise Rejected(f"the certificate of {identity} has expired since the connection was made; a new connection needs a new one")
    if identity.trust_domain != trust_domain or not identity.path:
        raise Rejected(f"{identity} is no workload of {trust_domain}")
    return identity
