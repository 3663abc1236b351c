"""Join tokens: whoever shows one gets the identity that it was made for, once.

Once means one key: the first request that shows the token binds it to the public key in that request, and the same request may come again until the token
expires (the answer may have been lost on the way). Anybody else who shows it is refused. On disk there is only the hash: a token is 256 random bits, so
nothing slower than SHA-256 is needed. Claiming is a rename: of several processes and requests one succeeds, also when the disk is full.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from control.ca.attestation import Caller, Rejected
from control.ca.certificates import LeafKey
from control.ca.csr import SigningRequest
from control.ca.keystore import KeyStore, StoreError
from meshproxy.api import spiffe
from meshproxy.api.spiffe import SpiffeId

PREFIX = "mpj_"  # so that scanners for leaked secrets and people know what it is
LIFE_S = 3600.0
_ID = 12  # digits of a hash that people are shown, and write
_TOKEN = re.compile(r"mpj_[A-Za-z0-9_-]{43}")
_REFUSED = "the join token is unknown, was used by somebody else, or has expired"  # which of them is nobody's business


class JoinTokens:
    """The tokens of one folder. `clock`: seconds since 1970. Also an attestor (see `attestation`)."""

    def __init__(self, folder: str, clock: Callable[[], float] = time.time) -> None:
        self._store = KeyStore(folder)
        self._clock = clock

    def create(self, identity: SpiffeId, life_s: float = LIFE_S) -> str:
        """A new token. Only its caller ever sees it. Raises StoreError."""
        self.sweep()
        token = PREFIX + secrets.token_urlsafe(32)
        entry = {"identity": str(identity), "expires": self._clock() + life_s}
        self._store.write(f"{_hash(token)}.json", json.dumps(entry).encode())
        return token

    async def attest(self, caller: Caller, request: SigningRequest) -> tuple[SpiffeId, ...] | None:
        """The identity that one of the caller's tokens was made for."""
        for token in caller.tokens:
            if token.startswith(PREFIX):
                return (self.redeem(token, request),)
        return None

    def redeem(self, token: str, request: SigningRequest) -> SpiffeId:
        """Claim the token for the key of `request`. Raises Rejected, and StoreError when the folder cannot be used."""
        if not _TOKEN.fullmatch(token):
            raise Rejected(_REFUSED)
        name = _hash(token)
        used = f"{name}.{_key_id(request.public_key)}.used"
        identity = self._look(f"{name}.json")
        if identity is None:
            identity = self._look(used)
        elif request.identity not in (None, identity):
            raise Rejected(f"the join token is not for {request.identity}")
        elif not self._store.rename(f"{name}.json", used):
            identity = self._look(used)
        if identity is None:
            raise Rejected(_REFUSED)
        return identity

    def sweep(self) -> None:
        """Delete what has expired."""
        for name, entry in self._entries():
            if entry["expires"] <= self._clock():
                self._store.remove(name)

    def statistics(self) -> list[dict[str, Any]]:
        """What there is: `id` (the beginning of the hash), `identity`, `expires` (seconds since 1970), `used`."""
        return [{"id": name[:_ID], **entry, "used": name.endswith(".used")} for name, entry in self._entries()]

    def revoke(self, id: str) -> bool:
        """Delete the token whose `id` this is; False when there is none."""
        found = [name for name, _ in self._entries() if name[:_ID] == id]
        for name in found:
            self._store.remove(name)
        return bool(found)

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for name in self._store.names():
            if name.endswith((".json", ".used")):
                try:
                    entry = json.loads(self._store.read(name))
                    found.append((name, {"identity": str(entry["identity"]), "expires": float(entry["expires"])}))
                except (StoreError, ValueError, KeyError, TypeError):
                    continue  # gone meanwhile, or nothing that anybody could redeem
        return found

    def _look(self, name: str) -> SpiffeId | None:
        if name not in self._store:
            return None
        try:
            entry = json.loads(self._store.read(name))
            identity, expires = spiffe.parse(entry["identity"]), float(entry["expires"])
        except (ValueError, KeyError, TypeError):
            return None
        return identity if self._clock() < expires else None

    def __repr__(self) -> str:
        return f"<JoinTokens in {self._store.folder}>"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _key_id(key: LeafKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:32]
