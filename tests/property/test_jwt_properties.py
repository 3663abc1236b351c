"""Tokens of any kind: a verdict always comes, and only what was signed passes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.http.filters import jwt_authn
from meshproxy.http.jwt.keys import Keys
from meshproxy.http.jwt.status import Bad, Status
from meshproxy.http.jwt.text import decode_base64url, decode_object
from meshproxy.http.jwt.token import Jwt
from tests.jwt_help import ISSUER, b64, jwk, jwks, token
from tests.unit.filter_help import Stream, context, proto

KINDS = "rsa", "p256", "p384", "p521", "ed", "oct"
CONFIG = {
    "providers": {"p": {"issuer": ISSUER, "local_jwks": {"inline_string": jwks(*KINDS)}, "payload_in_metadata": "claims"}},
    "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}],
}
FILTER = jwt_authn.compile(proto("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", json.dumps(CONFIG)), context())
GOOD = {kind: token(kind) for kind in KINDS}
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def ask(value: bytes) -> tuple[Any, Stream]:
    stream = Stream(b"/", [(b"authorization", b"Bearer " + value)])
    return FILTER.request_headers(stream, True), stream


@given(st.binary(max_size=200) | st.lists(st.binary(max_size=40).map(b64), max_size=5).map(lambda parts: ".".join(parts).encode()))
def test_garbage_is_refused(value: bytes) -> None:
    reply, stream = ask(value)
    assert reply.status == 401
    assert not stream.metadata


@given(st.sampled_from(KINDS), st.data())
def test_one_changed_byte_never_passes_with_other_contents(kind: str, data: st.DataObject) -> None:
    good = GOOD[kind].encode()
    position = data.draw(st.integers(0, len(good) - 1))
    changed = good[:position] + bytes([data.draw(st.integers(33, 126))]) + good[position + 1 :]
    reply, stream = ask(changed)
    if reply is None:  # bits that base64 throws away, at a section's end
        before, after = good.split(b"."), changed.split(b".")
        assert [decode_base64url(part) for part in before] == [decode_base64url(part) for part in after]
        assert before[:2] == after[:2]
        assert stream.metadata["envoy.filters.http.jwt_authn"]["claims"]["sub"] == "someone"
    else:
        assert reply.status == 401


@given(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.sampled_from(["none", *(f"{family}{bits}" for family in ("HS", "RS", "ES", "PS") for bits in (256, 384, 512)), "EdDSA"]),
)
def test_no_algorithm_but_the_one_that_signed(kind: str, kid: str, alg: str) -> None:
    usual = {"rsa": "RS256", "p256": "ES256", "p384": "ES384", "p521": "ES512", "ed": "EdDSA", "oct": "HS256"}[kind]
    reply, _ = ask(token(kind, usual, header={"alg": alg, "kid": kid}).encode())
    assert (reply is None) == (alg == usual and kid == kind)


@given(st.dictionaries(st.text(), plain))
def test_what_is_signed_is_what_is_told(claims: dict[str, Any]) -> None:
    text = json.dumps({**{name: value for name, value in claims.items() if name not in ("nbf", "exp", "iat", "aud", "sub", "jti")}, "iss": ISSUER})
    reply, stream = ask(token("oct", payload=text).encode())
    wanted = decode_object(text.encode())
    if wanted is None:
        assert reply.body == b"Jwt payload is an invalid JSON"
    else:
        assert reply is None
        assert stream.metadata["envoy.filters.http.jwt_authn"]["claims"] == wanted


members = st.dictionaries(st.sampled_from(["kty", "kid", "alg", "crv", "x", "y", "n", "e", "k"]), plain | st.text(alphabet="AZaz09-_="))
key_sets = members.map(lambda key: json.dumps({"keys": [{"kty": "EC"} | key]}))


@given(st.text() | plain.map(json.dumps) | key_sets)
def test_key_sets_are_read_or_refused(text: str) -> None:
    status = Status.OK
    try:
        assert Keys(text.encode("utf-8", "surrogatepass")).keys
    except Bad as bad:
        status = bad.status
    assert status == Status.OK or status >= Status.JWKS_BAD_JSON


@given(st.sampled_from(["rsa", "p256", "ed", "oct"]), st.sampled_from(["kty", "crv", "x", "y", "n", "e", "k", "alg"]), plain)
def test_keys_with_a_wrong_member_spoil_no_others(kind: str, member: str, value: Any) -> None:
    keys = (
        Keys(jwks(jwk(kind, **{member: value, "kid": "spoilt"}), "p384").encode("utf-8", "surrogatepass")) if _sayable(value) else Keys(jwks("p384").encode())
    )
    assert keys.verify(Jwt(GOOD["p384"].encode())) == Status.OK


def _sayable(value: Any) -> bool:
    return decode_object(json.dumps({"x": value}).encode()) is not None
