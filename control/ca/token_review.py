"""Asking an API server whose a token is (TokenReview, authentication.k8s.io/v1)."""

from __future__ import annotations

from typing import Any

from control.api_server import ApiServer, Refused, Unreachable
from control.ca.attestation import AttestorUnavailable

_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"


class TokenReviews:
    """Reviews of one API server."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server

    async def review(self, token: str, audiences: tuple[str, ...]) -> dict[str, Any]:
        """The status of a TokenReview. Raises AttestorUnavailable."""
        document = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token, "audiences": list(audiences)}}
        try:
            status = (await self._server.send("POST", _PATH, document)).get("status")
        except Refused as error:
            raise AttestorUnavailable(f"the API server answered the TokenReview with {error.status}: may we create tokenreviews?") from error
        except Unreachable as error:
            raise AttestorUnavailable(f"the API server could not be asked: {error}") from error
        if not isinstance(status, dict):
            raise AttestorUnavailable("the API server's answer has no status")
        return status
