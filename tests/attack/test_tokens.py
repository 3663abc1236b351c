"""Ways past the verification of tokens, and tokens and key servers that are meant to cost more than they should. Verdicts are in tests/differential."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import jwt_help
from tests.attack.readings import one_reading
from tests.attack.target import Pour, Target, arena, http
from tests.attack.test_policies import PATHS, raw, seen_by_a_server
from tests.differential.config import cluster, filter_, to
from tests.differential.wire import Request, Signal, answer
from tests.jwt_help import ISSUER, b64, jwks, sign, token

LOCAL = {"issuer": ISSUER, "local_jwks": {"inline_string": jwks("rsa", "p521")}}
STRICT = {"normalize_path": True, "merge_slashes": True, "path_with_escaped_slashes_action": "REJECT_REQUEST"}


def jwt(name: str, requires: dict[str, Any], *, prefix: str = "/", provider: dict[str, Any] | None = None, **fields: Any) -> Any:
    rules = [{"match": {"prefix": "/polite"}}, {"match": {"prefix": prefix}, "requires": requires}]
    return http(name, to("a"), filters=[filter_("jwt_authn", providers={"p": provider or LOCAL}, rules=rules)], **fields)


NEEDED = {"provider_name": "p"}
URI = {"uri": "http://keys.test/jwks", "cluster": "keys", "timeout": "1s"}
CONFIG = arena(
    jwt("main", NEEDED),
    jwt("admin", NEEDED, prefix="/admin", **STRICT),
    jwt("lenient", {"allow_missing_or_failed": {}}),
    jwt("remote", NEEDED, provider={"issuer": ISSUER, "remote_jwks": {"http_uri": URI, "cache_duration": "0.002s"}}),
    clusters=[cluster("a"), cluster("keys")],
)


def bearer(text: str) -> bytes:
    return b"Authorization: Bearer " + text.encode("latin-1")


def forwarded(target: Target) -> list[bytes]:
    return [line for wire in target.upstreams["a"].connections for _, line, _ in one_reading(bytes(wire.received))]


async def test_a_path_that_needs_a_token(target: Target):
    """However it is written, without a token nothing gets there."""
    for path in PATHS:
        assert (await target.send(raw(path), listener="admin")).statuses[0] in {200, 400, 401, 404}, path
    for path in forwarded(target):
        assert not seen_by_a_server(path).startswith(b"/admin"), path


HEAD = b64(json.dumps({"alg": "RS256", "kid": "rsa"}))
BODY = b64(json.dumps({"iss": ISSUER, "sub": "root"}))
FORGED = {
    "none": f"{b64(json.dumps({'alg': 'none'}))}.{BODY}.",
    "none_with_dots": f"{b64(json.dumps({'alg': 'none'}))}.{BODY}..",
    "public_key_as_secret": sign(b64(json.dumps({"alg": "HS256", "kid": "rsa"})), BODY, "HS256", jwks("rsa").encode()),
    "key_of_its_own": token("rsa2", header={"alg": "RS256", "kid": "rsa", "jwk": jwt_help.jwk("rsa2"), "jku": "http://evil.test/"}),
    "kid_of_a_file": token("rsa2", header={"alg": "RS256", "kid": "/dev/null"}),
    "no_kid": token("rsa2", header={"alg": "RS256"}),
    "signature_of_zeros": f"{b64(json.dumps({'alg': 'ES512', 'kid': 'p521'}))}.{BODY}.{b64(bytes(132))}",
    "signature_of_another": f"{HEAD}.{BODY}.{token().split('.')[2]}",
    "names_twice": token("rsa2", header='{"alg":"none","alg":"RS256","kid":"rsa"}'),
    "deep": token(payload='{"iss":"%s","x":%s}' % (ISSUER, "[" * 20_000)),  # noqa: UP031
    "dots": "." * 40_000,
    "one_section": "a" * 40_000,
    "digits": token(payload='{"iss":"%s","exp":%s}' % (ISSUER, "9" * 20_000)),  # noqa: UP031
    "comma": f"{token()},{token('rsa2')}",
}


@pytest.mark.parametrize("name", FORGED)
async def test_forged_tokens(target: Target, name: str):
    """Refused, in the header and in the query, and nothing of them gets to the upstream."""
    for request in (raw("/", bearer(FORGED[name])), raw(f"/?access_token={FORGED[name]}")):
        assert (await target.send(request)).statuses == [401]
    assert not forwarded(target)


async def test_many_tokens(target: Target):
    """As many as heads may have headers: all refused, or all passed on where bad ones may pass, and the neighbour is served meanwhile."""
    good, bad = bearer(token("p521", alg="ES512")), bearer(token("p521", alg="ES512", iss="other"))
    changed = [good[:-8] + b"%08d" % at for at in range(90)]
    for listener, status in (("main", 401), ("lenient", 200)):
        assert (await target.send(raw("/", *changed), listener=listener)).statuses == [status]
        assert (await target.send(raw("/", *[bad] * 90), listener=listener)).statuses == [status]
    assert (await target.send(raw("/", good))).statuses == [200]


KEYS = answer(body=jwks("rsa").encode())
HOSTILE = {
    "endless": [Request(), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", Pour(b"400\r\n" + b" " * 1024 + b"\r\n")],
    "silent": [Request(), Signal("asked")],
    "large": [Request(), answer(body=b'{"keys": [' + b'{"kty": "RSA"},' * 60_000 + b"{}]}")],
    "deep": [Request(), answer(body=b"[" * 500_000)],
    "garbage": [Request(), b"\0" * 1000],
    "redirect": [Request(), answer("302 Found", location="http://evil.test/")],
    "many": [Request(), answer(body=json.dumps({"keys": [jwt_help.jwk("oct", kid=str(at)) for at in range(8000)]}).encode())],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_key_servers_that_mean_harm(target: Target, name: str):
    """A request that needs them is refused, soon, and later ones are served when the server is well again."""
    target.upstream("keys", HOSTILE[name])
    assert (await target.send(raw("/", bearer(token(header={"alg": "RS256"}))), listener="remote")).statuses == [401]
    target.upstream("keys", [Request(), KEYS])
    assert (await target.send(raw("/", bearer(token(header={"alg": "RS256"}))), listener="remote")).statuses == [200]
