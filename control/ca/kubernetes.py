"""Kubernetes service account tokens: the API server says whose they are (TokenReview, authentication.k8s.io/v1).

A token must be meant for us: its audience is ours (`istio-ca`, as Istio projects it), so that one which a workload shows to somebody else is of no use here.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

from control.ca.attestation import AttestorUnavailable, Caller, Rejected
from control.ca.csr import SigningRequest
from control.ca.tokens import PREFIX
from meshproxy.api import spiffe
from meshproxy.api.spiffe import SpiffeId

AUDIENCE = "istio-ca"
_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_USER = "system:serviceaccount:"
_MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_TIMEOUT_S = 10.0
_MAX_ANSWER = 1 << 20
_MAX_TOKEN = 16 * 1024


class ApiServer:
    """Asks an API server. `url`: https://host:port; `token_file`: our own token, read at each call since it is rotated; `authority`: file of its roots."""

    def __init__(self, url: str = "https://kubernetes.default.svc", token_file: str = f"{_MOUNT}/token", authority: str = f"{_MOUNT}/ca.crt") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of an API server")
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = parts.scheme == "https"
        self._token_file = token_file
        self._authority = authority

    async def review(self, token: str, audiences: tuple[str, ...]) -> dict[str, Any]:
        """The status of a TokenReview. Raises AttestorUnavailable."""
        return await asyncio.to_thread(self._review, token, audiences)

    def _review(self, token: str, audiences: tuple[str, ...]) -> dict[str, Any]:
        document = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token, "audiences": list(audiences)}}
        try:
            headers = {"content-type": "application/json", "accept": "application/json"}
            if self._token_file:
                with open(self._token_file, encoding="ascii") as file:
                    headers["authorization"] = f"Bearer {file.read().strip()}"
            connection = (
                http.client.HTTPSConnection(self._host, self._port, timeout=_TIMEOUT_S, context=ssl.create_default_context(cafile=self._authority or None))
                if self._tls
                else http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
            )
            try:
                connection.request("POST", _PATH, json.dumps(document).encode(), headers)
                response = connection.getresponse()
                body = response.read(_MAX_ANSWER)
            finally:
                connection.close()
            if response.status not in (200, 201):
                raise AttestorUnavailable(f"the API server answered the TokenReview with {response.status}: may we create tokenreviews?")
            status = json.loads(body)["status"]
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise AttestorUnavailable(f"the API server could not be asked: {error!r}") from error
        if not isinstance(status, dict):
            raise AttestorUnavailable("the API server's answer has no status")
        return status


class KubernetesTokens:
    """Attests bearer tokens that are no join tokens. `server`: an ApiServer, or what has its `review`."""

    def __init__(self, trust_domain: str, server: ApiServer, audiences: tuple[str, ...] = (AUDIENCE,)) -> None:
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
