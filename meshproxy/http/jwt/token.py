"""A token, parsed: `header.payload.signature`, each in base64url, the first two JSON objects. Nothing is believed yet."""

from __future__ import annotations

from typing import Any

from meshproxy.http.jwt.status import Bad, Status
from meshproxy.http.jwt.text import decode_base64url, decode_object

ALGORITHMS = frozenset("ES256 ES384 ES512 HS256 HS384 HS512 RS256 RS384 RS512 PS256 PS384 PS512 EdDSA".split())
CLOCK_SKEW_S = 60
_BEYOND_64_BITS = 2.0**64


class Jwt:
    """A token. `nbf` and `exp` are 0 when the payload does not say. `encoded_payload` and `signed` are as they came."""

    __slots__ = ("alg", "audiences", "encoded_payload", "exp", "header", "issuer", "kid", "nbf", "payload", "signature", "signed", "subject")

    def __init__(self, token: bytes) -> None:
        """Raises Bad."""
        parts = [part for part in token.split(b".", 64) if part]  # empty sections do not count; no token has as many dots
        if len(parts) != 3:
            raise Bad(Status.BAD_FORMAT)
        encoded_header, encoded_payload, encoded_signature = parts
        self.header = header = _section(encoded_header, Status.HEADER_BAD_BASE64, Status.HEADER_BAD_JSON)
        alg = header.get("alg")
        if not isinstance(alg, str):
            raise Bad(Status.HEADER_BAD_ALG)
        if alg not in ALGORITHMS:
            raise Bad(Status.HEADER_UNKNOWN_ALG)
        self.alg = alg
        self.kid = _text(header, "kid", Status.HEADER_BAD_KID)
        self.payload = payload = _section(encoded_payload, Status.PAYLOAD_BAD_BASE64, Status.PAYLOAD_BAD_JSON)
        self.issuer = _text(payload, "iss", Status.ISS_NOT_STRING)
        self.subject = _text(payload, "sub", Status.SUB_NOT_STRING)
        _integer(payload, "iat", Status.IAT_NOT_INTEGER, Status.IAT_OUT_OF_RANGE)
        self.nbf = _integer(payload, "nbf", Status.NBF_NOT_INTEGER, Status.NBF_OUT_OF_RANGE)
        self.exp = _integer(payload, "exp", Status.EXP_NOT_INTEGER, Status.EXP_OUT_OF_RANGE)
        _text(payload, "jti", Status.JTI_NOT_STRING)
        self.audiences = _audiences(payload)
        signature = decode_base64url(encoded_signature)
        if signature is None:
            raise Bad(Status.SIGNATURE_BAD_BASE64)
        self.signature = signature
        self.encoded_payload = encoded_payload
        self.signed = encoded_header + b"." + encoded_payload

    def check_time(self, now: int, skew: int = CLOCK_SKEW_S) -> Status:
        """Whether it is valid at a Unix time, give or take `skew` seconds."""
        if now + skew < self.nbf:
            return Status.NOT_YET_VALID
        if self.exp and now > self.exp + skew:
            return Status.EXPIRED
        return Status.OK

    def claim(self, path: str) -> Any:
        """A claim by its name, or by the names that lead to it with dots between; None when there is none."""
        value: Any = self.payload
        for name in path.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(name)
        return value

    def __repr__(self) -> str:
        return f"<Jwt {self.alg} kid={self.kid!r} iss={self.issuer!r}>"


def _section(encoded: bytes, bad_base64: Status, bad_json: Status) -> dict[str, Any]:
    data = decode_base64url(encoded)
    if data is None:
        raise Bad(bad_base64)
    value = decode_object(data)
    if value is None:
        raise Bad(bad_json)
    return value


def _text(section: dict[str, Any], name: str, wrong: Status) -> str:
    value = section.get(name, "")
    if not isinstance(value, str):
        raise Bad(wrong)
    return value


def _integer(payload: dict[str, Any], name: str, wrong: Status, out_of_range: Status) -> int:
    value = payload.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Bad(wrong)
    if not 0 <= value < _BEYOND_64_BITS:
        raise Bad(out_of_range)
    return int(value)


def _audiences(payload: dict[str, Any]) -> tuple[str, ...]:
    value = payload.get("aud", ())
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise Bad(Status.AUD_NOT_STRING)
    return tuple(value)
