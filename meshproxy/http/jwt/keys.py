"""Key sets (RFC 7517, or certificates by key id) and the verification of signatures with them.

A key serves only algorithms of its own type and curve, whatever the token's head says: an HMAC algorithm with an RSA key is no match, as is any other mixture.
A token without key id, or one that several keys have, is tried with every key that fits.
"""

from __future__ import annotations

import warnings
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of whatever PyJWT's own dependencies deprecate
    from jwt.algorithms import Algorithm, ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.exceptions import InvalidKeyError

from meshproxy.http.jwt.status import Bad, Status
from meshproxy.http.jwt.text import decode_base64url, decode_object
from meshproxy.http.jwt.token import Jwt

MAX_KEYS = 1000  # of one set; a set is the operator's, yet may come from afar

_ED25519_SIGNATURE_BYTES = 64
_ED25519_KEY_BYTES = 32
_CERTIFICATE = "-----BEGIN CERTIFICATE-----\n", "\n-----END CERTIFICATE-----\n"
_CURVES: dict[str, tuple[str, type[ec.EllipticCurve], int]] = {
    "P-256": ("ES256", ec.SECP256R1, 32),
    "P-384": ("ES384", ec.SECP384R1, 48),
    "P-521": ("ES512", ec.SECP521R1, 66),
}
_CURVE_OF = {alg: curve for curve, (alg, _, _) in _CURVES.items()}
_RSA_ALGORITHMS: dict[str, Algorithm] = {
    "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
    "RS384": RSAAlgorithm(RSAAlgorithm.SHA384),
    "RS512": RSAAlgorithm(RSAAlgorithm.SHA512),
    "PS256": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA256),
    "PS384": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA384),
    "PS512": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA512),
}
_HMAC_ALGORITHMS: dict[str, Algorithm] = {
    "HS256": HMACAlgorithm(HMACAlgorithm.SHA256),
    "HS384": HMACAlgorithm(HMACAlgorithm.SHA384),
    "HS512": HMACAlgorithm(HMACAlgorithm.SHA512),
}
_EC_ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "P-256": {"ES256": ECAlgorithm(ECAlgorithm.SHA256)},
    "P-384": {"ES384": ECAlgorithm(ECAlgorithm.SHA384)},
    "P-521": {"ES512": ECAlgorithm(ECAlgorithm.SHA512)},
}
_ED_ALGORITHMS: dict[str, Algorithm] = {"EdDSA": OKPAlgorithm()}


class Key:
    """A key for verifying. `kid` and `alg` are empty where the set does not say. `algorithms` are those that it can serve."""

    __slots__ = ("alg", "algorithms", "key", "kid")

    def __init__(self, kid: str, alg: str, key: Any, algorithms: dict[str, Algorithm]) -> None:
        self.kid = kid
        self.alg = alg
        self.key = key
        self.algorithms = algorithms

    def verify(self, jwt: Jwt) -> bool:
        """Whether the token's signature is this key's. Raises Bad where no other key could do better."""
        algorithm = self.algorithms.get(jwt.alg)
        if self.algorithms is _ED_ALGORITHMS and len(jwt.signature) != _ED25519_SIGNATURE_BYTES:
            raise Bad(Status.ED25519_WRONG_LENGTH)
        return algorithm is not None and algorithm.verify(jwt.signed, self.key, jwt.signature)


class Keys:
    """A set of keys. Raises Bad when there is none that can be used."""

    __slots__ = ("keys",)

    def __init__(self, text: bytes) -> None:
        value = decode_object(text)
        if value is None:
            raise Bad(Status.JWKS_BAD_JSON)
        listed = value.get("keys")
        if "keys" not in value:
            self.keys = _certificates(value)
            return
        if not isinstance(listed, list):
            raise Bad(Status.JWKS_BAD_KEYS)
        self.keys = []
        first: Bad | None = None
        for jwk in listed[:MAX_KEYS]:
            if not isinstance(jwk, dict):
                continue
            try:
                self.keys.append(_key(jwk))
            except Bad as bad:  # one that cannot be used does not spoil the others
                first = first or bad
        if not self.keys:
            raise first or Bad(Status.JWKS_NO_VALID_KEYS)

    def verify(self, jwt: Jwt) -> Status:
        """Whether one of the keys made the token's signature."""
        candidates = False
        for key in self.keys:
            if (jwt.kid and key.kid and key.kid != jwt.kid) or (key.alg and key.alg != jwt.alg):
                continue
            candidates = True
            try:
                if key.verify(jwt):
                    return Status.OK
            except Bad as bad:
                return bad.status
        return Status.VERIFICATION_FAILS if candidates else Status.JWKS_NO_MATCH

    def __repr__(self) -> str:
        return f"<Keys {[key.kid for key in self.keys]}>"


def _certificates(value: dict[str, Any]) -> list[Key]:
    """A set of another kind: key id -> certificate in PEM, with an RSA key."""
    begin, end = _CERTIFICATE
    if not value or not all(kid and isinstance(pem, str) and pem.startswith(begin) and pem.endswith(end) for kid, pem in value.items()):
        raise Bad(Status.JWKS_NO_KEYS)
    from cryptography import x509

    keys = []
    for kid in sorted(value)[:MAX_KEYS]:
        try:
            public = x509.load_pem_x509_certificate(value[kid].encode()).public_key()
        except Exception as error:  # whatever an ASN.1 parser finds wrong with it
            raise Bad(Status.X509_PARSE) from error
        if not isinstance(public, rsa.RSAPublicKey):
            raise Bad(Status.X509_KEY)
        keys.append(Key(kid, "", public, _RSA_ALGORITHMS))
    return keys


def _key(jwk: dict[str, Any]) -> Key:
    kty = _member(jwk, "kty", Status.KTY_MISSING, Status.KTY_BAD)
    kid, alg = (value if isinstance(value, str) else "" for value in (jwk.get("kid"), jwk.get("alg")))
    make = {"RSA": _rsa, "EC": _ec, "oct": _oct, "OKP": _okp}.get(kty)
    if make is None:
        raise Bad(Status.KTY_UNKNOWN)
    return Key(kid, alg, *make(jwk, alg))


def _member(jwk: dict[str, Any], name: str, missing: Status, wrong: Status) -> str:
    if name not in jwk:
        raise Bad(missing)
    value = jwk[name]
    if not isinstance(value, str):
        raise Bad(wrong)
    return value


def _decode(text: str) -> bytes | None:
    return decode_base64url(text.encode())


def _encode(data: bytes) -> str:
    """As PyJWT takes it: of JWKs only the members that we have looked at get there."""
    import base64

    return base64.urlsafe_b64encode(data).decode()


def _rsa(jwk: dict[str, Any], alg: str) -> tuple[Any, dict[str, Algorithm]]:
    if alg and alg[:2] not in ("RS", "PS"):
        raise Bad(Status.RSA_BAD_ALG)
    n = _decode(_member(jwk, "n", Status.RSA_N_MISSING, Status.RSA_N_BAD))
    e = _decode(_member(jwk, "e", Status.RSA_E_MISSING, Status.RSA_E_BAD))
    # Other exponents than these two are of keys that somebody made up.
    if n is None or e is None or int.from_bytes(e) not in (3, 65537) or not 512 <= int.from_bytes(n).bit_length() <= 16384:
        raise Bad(Status.RSA_PARSE)
    try:
        return RSAAlgorithm.from_jwk({"kty": "RSA", "n": _encode(n), "e": _encode(e)}), _RSA_ALGORITHMS
    except (InvalidKeyError, ValueError) as error:
        raise Bad(Status.RSA_PARSE) from error


def _ec(jwk: dict[str, Any], alg: str) -> tuple[Any, dict[str, Algorithm]]:
    if alg and not alg.startswith("ES"):
        raise Bad(Status.EC_BAD_ALG)
    curve = jwk.get("crv", "")
    if not isinstance(curve, str):
        raise Bad(Status.EC_CRV_BAD)
    if alg and curve and _CURVE_OF.get(alg) != curve:
        raise Bad(Status.EC_CONTRADICTION)
    curve = curve or (_CURVE_OF.get(alg, "") if alg else "P-256")
    if curve not in _CURVES:
        raise Bad(Status.EC_UNKNOWN)
    size = _CURVES[curve][2]
    x = _decode(_member(jwk, "x", Status.EC_X_MISSING, Status.EC_X_BAD))
    y = _decode(_member(jwk, "y", Status.EC_Y_MISSING, Status.EC_Y_BAD))
    if x is None or y is None:
        raise Bad(Status.EC_BAD_BASE64)
    try:
        point = {name: _encode(int.from_bytes(value).to_bytes(size)) for name, value in (("x", x), ("y", y))}
        return ECAlgorithm.from_jwk({"kty": "EC", "crv": curve, **point}), _EC_ALGORITHMS[curve]
    except (InvalidKeyError, ValueError, OverflowError) as error:  # not a point of the curve
        raise Bad(Status.EC_PARSE) from error


def _oct(jwk: dict[str, Any], alg: str) -> tuple[Any, dict[str, Algorithm]]:
    if alg and alg not in _HMAC_ALGORITHMS:
        raise Bad(Status.OCT_BAD_ALG)
    secret = _decode(_member(jwk, "k", Status.OCT_K_MISSING, Status.OCT_K_BAD))
    if not secret:
        raise Bad(Status.OCT_BAD_BASE64)
    return secret, _HMAC_ALGORITHMS


def _okp(jwk: dict[str, Any], alg: str) -> tuple[Any, dict[str, Algorithm]]:
    if alg and alg != "EdDSA":
        raise Bad(Status.OKP_BAD_ALG)
    if _member(jwk, "crv", Status.OKP_CRV_MISSING, Status.OKP_CRV_BAD) != "Ed25519":
        raise Bad(Status.OKP_CRV_UNKNOWN)
    x = _decode(_member(jwk, "x", Status.OKP_X_MISSING, Status.OKP_X_BAD))
    if x is None:
        raise Bad(Status.OKP_BAD_BASE64)
    if len(x) != _ED25519_KEY_BYTES:
        raise Bad(Status.OKP_WRONG_LENGTH)
    try:
        return OKPAlgorithm.from_jwk({"kty": "OKP", "crv": "Ed25519", "x": _encode(x)}), _ED_ALGORITHMS
    except (InvalidKeyError, ValueError) as error:
        raise Bad(Status.OKP_WRONG_LENGTH) from error
