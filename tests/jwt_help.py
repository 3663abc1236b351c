"""Tokens and keys for the tests of the jwt_authn filter: made with PyJWT's algorithms and by hand, so that they can be as wrong as a test wants."""

from __future__ import annotations

import base64
import functools
import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

ISSUER = "https://issuer.test"
FAR = 4_000_000_000  # 2096
_ALGORITHMS = get_default_algorithms()
SECRET = b"a secret of thirty-two bytes, yes"


@functools.cache
def private(kind: str) -> Any:
    """A key, the same each time: `rsa`, `rsa2`, `p256`, `p384`, `p521`, `ed`, `oct`."""
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, 2048)
    if kind == "ed":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "oct":
        return SECRET
    return ec.generate_private_key({"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}[kind])


def algorithm_of(kind: str) -> str:
    """The algorithm that a key is for, where a test does not say."""
    return {"p256": "ES256", "p384": "ES384", "p521": "ES512", "ed": "EdDSA", "oct": "HS256"}.get(kind, "RS256")


def jwk(kind: str, **members: Any) -> dict[str, Any]:
    """The public JWK of a key, with its kind as key id; None removes a member."""
    key = private(kind)
    if kind == "oct":
        made = {"kty": "oct", "k": b64(key)}
    else:
        made = dict(_ALGORITHMS[algorithm_of(kind)].to_jwk(key.public_key(), as_dict=True))
        made.pop("key_ops", None)
    return {name: value for name, value in (made | {"kid": kind} | members).items() if value is not None}


def jwks(*keys: Any) -> str:
    """A key set of kinds of keys, and of JWKs."""
    return json.dumps({"keys": [jwk(key) if isinstance(key, str) else key for key in keys]})


def b64(data: bytes | str) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data.encode() if isinstance(data, str) else data).rstrip(b"=").decode()


def sign(header: str, payload: str, alg: str, key: Any) -> str:
    """A token of two encoded sections."""
    signed = f"{header}.{payload}"
    return f"{signed}.{b64(_ALGORITHMS[alg].sign(signed.encode(), key))}"


def token(kind: str = "rsa", alg: str = "", payload: Any = None, header: Any = None, **claims: Any) -> str:
    """A good token, unless something in it is not. `payload`, `header`: text or data instead of the usual; claims that are None are left out."""
    alg = alg or algorithm_of(kind)
    usual = {"iss": ISSUER, "sub": "someone", "exp": FAR}
    body = {name: value for name, value in (usual | claims).items() if value is not None} if payload is None else payload
    head = {"alg": alg, "kid": kind} if header is None else header
    parts = [b64(part if isinstance(part, (str, bytes)) else json.dumps(part)) for part in (head, body)]
    return sign(*parts, alg, private(kind))
