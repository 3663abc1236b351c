"""The jwt_authn filter: what can be seen without a network; verdicts are compared with Envoy's in tests/differential."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from typing import Any

import pytest
from jwt.algorithms import RSAAlgorithm

from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import ResponseHead
from meshproxy.http.client import Answer, HttpClient, HttpError
from meshproxy.http.filters import jwt_authn
from meshproxy.http.jwt import keys as jwt_keys
from meshproxy.http.jwt.remote import RemoteKeys
from meshproxy.http.jwt.status import Status
from meshproxy.http.jwt.text import decode_base64url, decode_object
from meshproxy.net import tasks
from tests.jwt_help import FAR, ISSUER, jwks, token
from tests.unit.filter_help import Stream, context, counters, proto

JWT = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
ROUTE = "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig"
RULES = [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}]
REMOTE = {"http_uri": {"uri": "https://keys.test/jwks?x", "cluster": "keys", "timeout": "1s"}}


def provider(**fields: Any) -> dict[str, Any]:
    source = {} if "remote_jwks" in fields else {"local_jwks": {"inline_string": jwks("rsa")}}
    return {"issuer": ISSUER} | source | fields


def make(ctx: Any = None, *, rules: Any = None, **fields: Any) -> Any:
    config = {"providers": {"p": provider(**fields)}, "rules": RULES if rules is None else rules}
    return jwt_authn.compile(proto(JWT, json.dumps(config)), ctx or context())


def stream(text: str | None = None, path: bytes = b"/", *headers: tuple[bytes, bytes]) -> Stream:
    return Stream(path, [*([(b"authorization", f"Bearer {text}".encode())] if text is not None else []), *headers])


class Server:
    """Stands for the cluster that has the keys: what is asked waits until the test answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[asyncio.Future[Answer]] = []
        self.heads: list[Any] = []
        monkeypatch.setattr(HttpClient, "request", self._request)

    async def _request(self, client: HttpClient, head: Any, body: bytes = b"") -> Answer:
        self.heads.append(head)
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]

    async def answer(self, body: str, status: int = 200) -> None:
        self.asked[-1].set_result(Answer(ResponseHead(status), body.encode()))
        await self.settle()

    @staticmethod
    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(monkeypatch)
    monkeypatch.setattr(HttpClient, "request", lambda client, head, body=b"": made._request(client, head, body))
    return made


def test_sample() -> None:
    ctx = context()
    filter = make(ctx, payload_in_metadata="claims")
    good = stream(token())
    assert filter.request_headers(good, True) is None
    assert good.metadata == {"envoy.filters.http.jwt_authn": {"claims": {"iss": ISSUER, "sub": "someone", "exp": FAR}}}
    assert good.request.get(b"authorization") is None
    reply = filter.request_headers(stream(path=b"/x?y"), True)
    assert (reply.status, reply.body, reply.details) == (401, b"Jwt is missing", "jwt_authn_access_denied{Jwt_is_missing}")
    assert reply.headers == ((b"www-authenticate", b'Bearer realm="://example.com/x?y"'),)
    assert counters(ctx) == {"http.ing.jwt_authn.allowed": 1, "http.ing.jwt_authn.denied": 1, "http.ing.jwt_authn.jwt_cache_miss": 1}


def test_metadata_of_other_filters_and_of_earlier_instances_stays() -> None:
    good = stream(token())
    good.metadata["other"] = {"x": 1}
    good.metadata["envoy.filters.http.jwt_authn"] = {"before": {}}
    make(payload_in_metadata="claims").request_headers(good, True)
    assert set(good.metadata) == {"other", "envoy.filters.http.jwt_authn"}
    assert set(good.metadata["envoy.filters.http.jwt_authn"]) == {"before", "claims"}


def test_forged_headers_are_removed_even_without_a_token() -> None:
    rules = [{"match": {"prefix": "/"}, "requires": {"allow_missing": {}}}]
    filter = make(rules=rules, forward_payload_header="x-payload", claim_to_headers=[{"header_name": "x-sub", "claim_name": "sub"}])
    forged = stream(None, b"/", (b"x-payload", b"forged"), (b"x-sub", b"root"), (b"x-kept", b"1"))
    assert filter.request_headers(forged, True) is None
    assert forged.request.items == [(b"x-kept", b"1")]


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\0b", "a\x7fb", "a\nb"])
def test_a_claim_that_no_header_can_hold_is_left_out(value: str) -> None:
    filter = make(claim_to_headers=[{"header_name": "x-sub", "claim_name": "sub"}])
    good = stream(token(sub=value))
    assert filter.request_headers(good, True) is None
    assert good.request.get(b"x-sub") is None


def test_per_route() -> None:
    ctx = context()
    config = {"providers": {"p": provider()}, "rules": [], "requirement_map": {"one": {"provider_name": "p"}}}
    base = jwt_authn.compile(proto(JWT, json.dumps(config)), ctx)
    assert base.request_headers(stream(), True) is None  # no rule matches
    named = jwt_authn.specialise(base, [proto(ROUTE, "{disabled: true}"), proto(ROUTE, "{requirement_name: one}")], ctx)
    assert named.request_headers(stream(), True).status == 401
    assert jwt_authn.specialise(base, [proto(ROUTE, "{disabled: true}")], ctx).request_headers(stream(), True) is None
    wrong = jwt_authn.specialise(base, [proto(ROUTE, "{requirement_name: two}")], ctx).request_headers(stream(token()), True)
    assert (wrong.status, wrong.body) == (403, b"Failed JWT authentication: Wrong requirement_name: two. It should be one of [one]")
    assert counters(ctx)["http.ing.jwt_authn.denied"] == 2


@pytest.mark.parametrize(
    ("config", "path", "why"),
    [
        ({"providers": {"p": {"issuer": "x"}}}, 'providers["p"]', "one of remote_jwks and local_jwks"),
        ({"providers": {"p": {"local_jwks": {"inline_string": "{}"}}}}, 'providers["p"].local_jwks', "does not have [keys]"),
        ({"providers": {"p": {"local_jwks": {"filename": "/nowhere"}}}}, 'providers["p"].local_jwks.filename', "cannot read"),
        ({"providers": {"p": {"remote_jwks": {"http_uri": {"uri": "nonsense", "cluster": "c", "timeout": "1s"}}}}}, "http_uri.uri", "invalid URI"),
        ({"providers": {"p": {"remote_jwks": {"http_uri": {"uri": "http://a b/", "cluster": "c", "timeout": "1s"}}}}}, "http_uri.uri", "invalid URI"),
        ({"providers": {"p": {"remote_jwks": {"http_uri": {"uri": "http://a/", "cluster": "c"}}}}}, "http_uri.timeout", "is required"),
        ({"rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "q"}}]}, "rules[0].requires.provider_name", "['q'] is not configured"),
        ({"rules": [{"match": {"prefix": "/"}, "requirement_name": "q"}]}, "rules[0].requirement_name", "Wrong requirement_name: q"),
        ({"rules": [{"requirement_name": "q"}]}, "rules[0].match", "is required"),
        ({"rules": [{"match": {"prefix": "/", "grpc": {}}}]}, "rules[0].match.grpc", "plays no part"),
        ({"filter_state_rules": {"name": "x"}}, "filter_state_rules", "not supported"),
        ({"rules": [{"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [{}]}}}]}, "requires_any.requirements", "at least 2"),
    ],
)
def test_configuration_errors_have_paths(config: dict[str, Any], path: str, why: str) -> None:
    with pytest.raises(ConfigError) as error:
        jwt_authn.compile(proto(JWT, json.dumps(config)), context())
    assert path in str(error.value)
    assert why in str(error.value)


# -- attacks


def test_an_algorithm_of_another_kind_of_key_is_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public key as an HMAC secret, the oldest trick."""
    tried = []
    for cls in (jwt_keys.HMACAlgorithm, jwt_keys.ECAlgorithm, jwt_keys.OKPAlgorithm):
        monkeypatch.setattr(cls, "verify", lambda *args: tried.append(args) or True)
    for alg in ("HS256", "ES256"):
        confused = token("rsa", alg="RS256", header={"alg": alg, "kid": "rsa"})
        assert make().request_headers(stream(confused), True).body == b"Jwt verification fails"
    assert not tried


def test_signatures_are_verified_once_a_token_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    verify = RSAAlgorithm.verify

    def counting(self: Any, *args: Any) -> bool:
        nonlocal calls
        calls += 1
        return verify(self, *args)

    monkeypatch.setattr(RSAAlgorithm, "verify", counting)
    filter = make(jwt_cache_config={})
    for _ in range(3):
        assert filter.request_headers(stream(token()), True) is None
    assert calls == 1
    many = Stream(b"/", [(b"authorization", f"Bearer {token('rsa2', header={'alg': 'RS256'})}".encode())] * 50)
    assert filter.request_headers(many, True).status == 401
    assert calls == 2  # the first that is bad ends it


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 50_000, b'{"a":"' + b"{" * 100_000 + b'"}', b'{"a":' + b"9" * 100_000 + b"}", b'"' * 99_999])
def test_hostile_json_is_refused_or_read(text: bytes) -> None:
    value = decode_object(text)
    assert value is None or value == {"a": "{" * 100_000}


def test_cached_tokens_expire_and_are_bounded() -> None:
    ctx = context()
    now = 5000.0
    ctx.context.wall = lambda: now
    filter = make(ctx, jwt_cache_config={"jwt_cache_size": 2})
    short = token(exp=5010)
    assert filter.request_headers(stream(short), True) is None
    now = 5071.0
    assert filter.request_headers(stream(short), True).body == b"Jwt is expired"
    for number in range(10):
        assert filter.request_headers(stream(token(jti=str(number))), True) is None
    cache = filter._rules[0][1]._provider.cache
    assert len(cache._tokens) == 2


# -- keys from afar


async def test_a_request_waits_for_its_keys_and_others_for_the_same(server: Server) -> None:
    ctx = context()
    filter = make(ctx, remote_jwks=REMOTE)
    first, second = (asyncio.ensure_future(filter.request_headers(stream(token()), True)) for _ in range(2))
    await server.settle()
    assert len(server.asked) == 1
    assert not first.done()
    assert (server.heads[0].method, server.heads[0].path, server.heads[0].authority) == (b"GET", b"/jwks?x", b"keys.test")
    await server.answer(jwks("rsa"))
    assert (await first, await second) == (None, None)
    assert filter.request_headers(stream(token()), True) is None  # now they are at hand
    assert filter.request_headers(stream(token("rsa2", header={"alg": "RS256"})), True).status == 401
    ctx.context.clock.now += 600
    again = filter.request_headers(stream(token()), True)
    assert asyncio.iscoroutine(again)  # they are too old
    again.close()
    assert counters(ctx)["http.ing.jwt_authn.jwks_fetch_success"] == 1


@pytest.mark.parametrize(("body", "status"), [("", 200), ("[]", 200), ('{"keys": []}', 200), ("oops", 503)])
async def test_a_fetch_that_fails_refuses_and_is_tried_again(server: Server, body: str, status: int) -> None:
    ctx = context()
    filter = make(ctx, remote_jwks=REMOTE)
    waiting = asyncio.ensure_future(filter.request_headers(stream(token()), True))
    await server.settle()
    await server.answer(body, status)
    assert (await waiting).body == b"Jwks remote fetch is failed"
    assert counters(ctx)["http.ing.jwt_authn.jwks_fetch_failed"] == 1
    waiting = asyncio.ensure_future(filter.request_headers(stream(token()), True))
    await server.settle()
    await server.answer(jwks("rsa"))
    assert await waiting is None


async def test_a_client_that_goes_away_leaves_the_fetch_to_others(server: Server) -> None:
    filter = make(remote_jwks=REMOTE)
    gone, stays = (asyncio.ensure_future(filter.request_headers(stream(token()), True)) for _ in range(2))
    await server.settle()
    gone.cancel()
    await server.settle()
    await server.answer(jwks("rsa"))
    assert await stays is None
    assert gone.cancelled()
    assert not [task for task in tasks.running() if task.get_name().startswith("keys from")]


async def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> Answer:
        raise HttpError("there is no cluster 'keys'")

    monkeypatch.setattr(HttpClient, "request", refuse)
    assert (await make(remote_jwks=REMOTE).request_headers(stream(token()), True)).body == b"Jwks remote fetch is failed"


async def test_any_of_two_goes_on_with_whichever_keys_come_first(server: Server) -> None:
    both = [{"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [{"provider_name": "p"}, {"provider_name": "q"}]}}}]
    config = {"providers": {name: provider(remote_jwks=REMOTE) for name in "pq"}, "rules": both}
    filter = jwt_authn.compile(proto(JWT, json.dumps(config)), context())
    waiting = asyncio.ensure_future(
        filter.request_headers(
            stream(
                token(),
                b"/",
            ),
            True,
        )
    )
    await server.settle()
    assert len(server.asked) == 2
    await server.answer(jwks("rsa"))  # the second one's
    assert await waiting is None
    server.asked[0].cancel()
    await server.settle()


class Loop:
    """Timers that go off when the test says so."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Any]] = []

    def call_later(self, seconds: float, work: Any) -> None:
        self.timers.append((seconds, work))

    def fire(self) -> float:
        seconds, work = self.timers.pop(0)
        work()
        return seconds


async def test_the_background_fetches_before_anybody_asks_and_again_before_they_are_old(server: Server) -> None:
    ctx = context()
    loop = ctx.context.loop = Loop()
    filter = make(ctx, remote_jwks={**REMOTE, "cache_duration": "60s", "async_fetch": {"failed_refetch_duration": "2s"}})
    assert loop.fire() == 0.0
    await server.settle()
    await server.answer("no", 500)
    assert loop.fire() == 2.0
    await server.settle()
    await server.answer(jwks("rsa"))
    assert filter.request_headers(stream(token()), True) is None
    ctx.context.clock.now += 3600
    assert filter.request_headers(stream(token()), True) is None  # the background will have new ones
    assert loop.fire() == 55.0
    await server.settle()
    await server.answer(jwks("rsa2"))
    assert filter.request_headers(stream(token()), True).status == 401


async def test_a_filter_that_was_replaced_fetches_no_more(server: Server) -> None:
    ctx = context()
    loop = ctx.context.loop = Loop()
    filter = make(ctx, remote_jwks={**REMOTE, "async_fetch": {}})
    remote: weakref.ref[RemoteKeys] = weakref.ref(filter._rules[0][1]._provider._remote)
    del filter
    gc.collect()
    assert remote() is None
    loop.fire()
    await server.settle()
    assert not server.asked


# -- text


BASE64 = [(b"", b""), (b"YQ", b"a"), (b"YQ==", b"a"), (b"YQ=", None), (b"Y", None), (b"-_8", b"\xfb\xff"), (b"+/8", None), (b" Y Q ", b"a"), (b"Y=Q", None)]


@pytest.mark.parametrize(("text", "wanted"), BASE64)
def test_base64url(text: bytes, wanted: bytes | None) -> None:
    assert decode_base64url(text) == wanted


def test_status_codes_are_envoys() -> None:
    assert (Status.MISSING, Status.VERIFICATION_FAILS, Status.FETCH_FAILED, Status.KTY_UNKNOWN, Status.OKP_X_BAD) == (1, 26, 40, 43, 65)
