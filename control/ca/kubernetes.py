"""Kubernetes service account tokens: the API server says whose they are (TokenReview, authentication.k8s.io/v1).

A token must be meant for us: its audience is ours (`istio-ca`, as Istio projects it), so that one which a workload shows to somebody else is of no use here.
"""

from __future__ import annotations

from typing import Any, Protocol

from control.ca.attestation import Caller, Rejected
from control.ca.csr import SigningRequest
from control.ca.tokens import PREFIX
from meshproxy.api import spiffe
from meshproxy.api.spiffe import SpiffeId

AUDIENCE = "istio-ca"
_USER = "system:serviceaccount:"
_MAX_TOKEN = 16 * 1024


class Reviews(Protocol):
    """Who says whose tokens are; see `token_review`."""

    async def review(self, token: str, audiences: tuple[str, ...]) -> dict[str, Any]: ...


class KubernetesTokens:
    """Attests bearer tokens that are no join tokens."""

    def __init__(self, trust_domain: str, server: Reviews, audiences: tuple[str, ...] = (AUDIENCE,)) -> None:
        spiffe.check_trust_domain(trust_domain)
        self._trust_domain = trust_domain
        self._server = server
        self._audiences = audiences

    async def attest(self, caller: Caller, request: SigningRequest) -> tuple[SpiffeId, ...] | None:
        """The identity of the service account."""
        for token in caller.tokens:
            if not token.startswith(PREFIX):
                return (await self.identity(token),)
        return None

    async def identity(self, token: str) -> SpiffeId:
        """Whose token it is. Raises Rejected and AttestorUnavailable."""
        if len(token) > _MAX_TOKEN:
            raise Rejected("the token is too long")
        return self._identity(await self._server.review(token, self._audiences))

    def _identity(self, status: dict[str, Any]) -> SpiffeId:
        if status.get("authenticated") is not True:
            raise Rejected(f"the service account token is not valid: {status.get('error') or 'not authenticated'}")
        audiences = status.get("audiences")
        if not isinstance(audiences, list) or not set(map(str, audiences)) & set(self._audiences):
            raise Rejected(f"the service account token is not for the audience {', '.join(self._audiences)}")
        user = status.get("user")
        name = str(user.get("username")) if isinstance(user, dict) else ""
        namespace, colon, account = name.removeprefix(_USER).partition(":")
        if not name.startswith(_USER) or not colon:
            raise Rejected(f"the token is {name!r}'s, which is no service account")
        try:
            return spiffe.workload(self._trust_domain, namespace, account)
        except ValueError as error:
            raise Rejected(str(error)) from None
