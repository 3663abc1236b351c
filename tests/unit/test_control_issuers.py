"""Keys of issuers that the control plane asks: what is taken of their answers, how often they are asked, and what proxies get."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Self

import pytest
from aiohttp import web

from control.app import App
from control.kinds.store import Store
from control.model.security import KeySource
from control.model.snapshot import build
from control.sources.issuers import KEPT_S, Issuers, Unusable
from control.sources.key_fetch import MAX_BYTES, Fetcher, check_address, keys_of, usable
from control.status_page import StatusPage
from control.translate import tokens as translated
from control.translate.resource import LISTENER
from control.translate.translator import Translator
from tests.jwt_help import jwk, jwks
from tests.polling import PATIENCE
from tests.unit.control_help import MESH, plain, snapshot
from tests.unit.test_control_kinds import complaints
from tests.unit.test_control_security import CALLED, CALLED_KEY
from tests.unit.test_control_tokens import filters, rules, tokens

ISSUER = "https://issuer.test"
SOURCE = KeySource(ISSUER)
ALONE = json.dumps({"jwtRules": [{"issuer": ISSUER}]})


def said(**fields: Any) -> bytes:
    return json.dumps({"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys", **fields}).encode()


# --- what is taken of answers


def test_an_issuer_says_where_its_keys_are():
    assert keys_of(ISSUER, said()) == "https://issuer.test/keys"
    assert keys_of(f"{ISSUER}/", said()) == "https://issuer.test/keys", "with or without a slash at its end"
    assert keys_of("http://a.test/x", said(issuer="http://a.test/x", jwks_uri="http://b.test/k")) == "http://b.test/k"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (said(issuer="https://other.test"), "is about another issuer, 'https://other.test'"),
        (said(issuer=5), "is about another issuer, 5"),
        (said(jwks_uri=None), "says no jwks_uri"),
        (said(jwks_uri="http://issuer.test/keys"), "says a jwks_uri that is not https"),
        (said(jwks_uri="file:///etc/passwd"), "is no http or https URL"),
        (said(jwks_uri="http://169.254.169.254/"), "is never asked"),
        (b"[]", "no JSON object"),
        (b"{", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
    ],
)
def test_what_an_issuer_says_may_be_no_use(content, why):
    with pytest.raises(Unusable, match=why):
        keys_of(ISSUER, content)


def test_only_public_keys_are_taken():
    mixed = {"keys": [{**jwk("rsa"), "d": "secret", "p": "secret"}, jwk("oct"), jwk("p256"), {"kty": "RSA"}, 5, {**jwk("p384"), "use": "enc"}, {"kty": "X"}]}
    found = json.loads(usable("u", json.dumps(mixed).encode()))
    assert found == {"keys": [jwk("rsa"), jwk("p256")]}


@pytest.mark.parametrize("content", [b"", b"{}", b'{"keys": []}', b'{"keys": {}}', b"<html>", json.dumps({"keys": [jwk("oct")]}).encode()])
def test_an_answer_without_keys_is_no_use(content):
    with pytest.raises(Unusable):
        usable("u", content)


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("169.254.169.254", False), ("fe80::1%eth0", False), ("::ffff:169.254.169.254", False), ("fd00:ec2::254", False), ("0.0.0.0", False), ("::", False),
        ("224.0.0.1", False), ("10.0.0.1", True), ("127.0.0.1", True), ("2001:db8::1", True),
    ],
)  # fmt: skip
def test_some_addresses_are_never_asked(address, asked):
    if asked:
        check_address(address)
    else:
        with pytest.raises(Unusable):
            check_address(address)


# --- over HTTP


class Web:
    """An issuer. `answers`: path -> (status, headers, content); `asked`: paths."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None)
        self.url = ""
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.set()
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        status, headers, content = self.answers.get(request.path, (404, {}, b""))
        if status == 0:
            await self._ended.wait()
        return web.Response(status=status, headers=headers, body=content)


@pytest.fixture
async def issuer():
    async with Web() as one:
        one.answers["/a/.well-known/openid-configuration"] = 200, {}, json.dumps({"issuer": f"{one.url}/a", "jwks_uri": f"{one.url}/keys"}).encode()
        one.answers["/keys"] = 200, {}, jwks("rsa").encode()
        yield one


@pytest.fixture
async def fetch():
    made = Fetcher()
    yield made
    await made.close()


async def test_keys_are_fetched_where_the_issuer_says(issuer, fetch):
    assert json.loads(await fetch(KeySource(f"{issuer.url}/a"), PATIENCE)) == json.loads(jwks("rsa"))
    assert issuer.asked == ["/a/.well-known/openid-configuration", "/keys"]
    assert json.loads(await fetch(KeySource("anybody", f"{issuer.url}/keys"), PATIENCE)) == json.loads(jwks("rsa"))


async def test_redirects_are_followed_a_few_times(issuer, fetch):
    issuer.answers["/1"] = 302, {"location": "/2"}, b""
    issuer.answers["/2"] = 307, {"location": f"{issuer.url}/keys"}, b""
    assert json.loads(await fetch(KeySource("a", f"{issuer.url}/1"), PATIENCE)) == json.loads(jwks("rsa"))
    issuer.answers["/2"] = 302, {"location": "/1"}, b""
    with pytest.raises(Unusable, match="leads on and on"):
        await fetch(KeySource("a", f"{issuer.url}/1"), PATIENCE)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((404, {}, b""), "answers 404"),
        ((200, {}, b" " * (MAX_BYTES + 1)), "more than 262144 bytes"),
        ((200, {}, b"hello"), "no JSON object"),
        ((302, {"location": "http://169.254.169.254/latest/meta-data"}, b""), "169.254.169.254 is never asked"),
        ((302, {"location": "ftp://a.test/"}, b""), "is no http or https URL"),
        ((0, {}, b""), "did not answer within 0.2 s"),
    ],
)
async def test_what_is_wrong_is_said(issuer, fetch, answer, why):
    issuer.answers["/x"] = answer
    with pytest.raises(Unusable, match=why):
        await fetch(KeySource("a", f"{issuer.url}/x"), 0.2 if not answer[0] else PATIENCE)


async def test_who_is_not_there_is_said(fetch):
    with pytest.raises(Unusable, match=r"http://no-issuer.invalid/.well-known/openid-configuration: "):
        await fetch(KeySource("http://no-issuer.invalid"), PATIENCE)


# --- again and again


class Played:
    """Answers and pauses, as a test has them."""

    def __init__(self) -> None:
        self.answers: list[str | Unusable] = []
        self.asked = 0
        self.now = 0.0
        self.pauses: list[float] = []
        self._go = asyncio.Semaphore(0)
        self._paused = asyncio.Event()
        self.issuers = Issuers(self._fetch, clock=lambda: self.now, pause=self._pause)

    async def _fetch(self, source: KeySource, timeout_s: float) -> str:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Unusable):
            raise answer
        return answer

    async def _pause(self, wait_s: float) -> None:
        self.pauses.append(wait_s)
        self._paused.set()
        await self._go.acquire()
        self.now += wait_s

    async def again(self, answer: str | Unusable) -> None:
        """The next answer has come."""
        self.answers.append(answer)
        self._paused.clear()
        self._go.release()
        await self._paused.wait()


@pytest.fixture
async def played():
    made = Played()
    yield made
    await made.issuers.close()


async def test_the_last_keys_are_kept_while_an_issuer_is_away(played, caplog):
    issuers = played.issuers
    played.answers = ["one"]
    issuers.want({SOURCE: 5.0})
    await issuers.wait_tried(PATIENCE)
    assert (issuers.known, issuers.changed.is_set()) == ({SOURCE: "one"}, True)
    assert 270 <= played.pauses[-1] <= 330
    issuers.changed.clear()
    for at_most in (1.1, 2.2, 4.4):
        await played.again(Unusable("away"))
        assert 0.8 * at_most <= played.pauses[-1] <= at_most
    assert issuers.known == {SOURCE: "one"}
    assert issuers.statistics()[0][:3] == (ISSUER, "", True)
    assert issuers.statistics()[0].why == "away"
    assert caplog.text.count("keys of issuer https://issuer.test: away; its last ones stay good") == 1
    await played.again("one")
    assert not issuers.changed.is_set()
    assert issuers.statistics()[0].why == ""
    await played.again("two")
    assert (issuers.known, issuers.changed.is_set()) == ({SOURCE: "two"}, True)


async def test_keys_are_not_kept_for_ever(played):
    played.answers = ["one"]
    played.issuers.want({SOURCE: 5.0})
    await played.issuers.wait_tried(PATIENCE)
    played.now += KEPT_S
    await played.again(Unusable("away"))
    assert played.issuers.known == {}


async def test_who_is_not_wanted_any_more_is_not_asked(played):
    played.answers = ["one"]
    played.issuers.want({SOURCE: 5.0})
    await played.issuers.wait_tried(PATIENCE)
    played.issuers.want({SOURCE: 1.0})
    assert played.asked == 1
    played.issuers.changed.clear()
    played.issuers.want({})
    assert (played.issuers.known, played.issuers.changed.is_set(), played.issuers.statistics()) == ({}, True, [])


# --- what proxies get


def provider(snapshot) -> Any:
    made = plain(Translator().view(CALLED_KEY, snapshot), LISTENER, "127.0.0.1_19000")
    (found,) = [one["typed_config"] for one in filters(made) if "jwt" in one["name"]]
    return found["providers"]["origins-0"]


def test_until_keys_are_known_no_token_is_good():
    store = Store()
    before = snapshot(MESH, CALLED, tokens(ALONE), store=store)
    closed = provider(before)
    assert closed["remote_jwks"]["http_uri"]["cluster"] == "outbound|443||no-keys.invalid"
    after = build(store.objects, before, fetched={SOURCE: jwks("rsa")})
    assert after.config is not before.config
    assert provider(after)["local_jwks"] == {"inline_string": jwks("rsa")}
    assert provider(after)["issuer"] == ISSUER
    assert build(store.objects, after, fetched={SOURCE: jwks("rsa")}).config is after.config


def test_keys_that_proxies_fetch_are_not_fetched_for_them():
    near = tokens(json.dumps({"jwtRules": [{"issuer": "a", "jwksUri": "http://reviews:9080/keys"}, {"issuer": "b", "jwksUri": "https://far.test/keys"}]}))
    holds = tokens(rules({"issuer": "c", "jwks": jwks("rsa")}), "more")
    made = snapshot(MESH, CALLED, near, holds)
    wanted = translated.wanted(made.config.security.request_authentication, made.config.services)
    assert wanted == {KeySource("b", "https://far.test/keys"): 5.0}
    far = build({}, None, fetched={})
    assert translated.wanted(far.config.security.request_authentication, far.config.services) == {}


def test_what_stands_in_for_a_wrong_document_is_not_asked_for():
    store = Store()
    store.put("a.yaml", tokens('{"jwtRules": [{"issuer": "https://a.test", "form": 1}]}').encode())
    store.settle()
    assert store.troubles
    config = build(store.objects).config
    assert config.security.request_authentication
    assert translated.wanted(config.security.request_authentication, config.services) == {}


def test_an_issuer_that_cannot_be_asked_needs_keys():
    (complaint,) = complaints(tokens('{"jwtRules": [{"issuer": "somebody@else"}]}'))
    assert complaint.startswith("spec.jwtRules[0].issuer: 'somebody@else' is no http or https URL")


async def test_the_control_plane_serves_keys_as_they_come(tmp_path, played):
    """From the beginning if the issuer answers; and new ones without another look at documents."""
    for name, text in (("mesh", MESH), ("called", CALLED), ("tokens", tokens(ALONE))):
        (tmp_path / f"{name}.yaml").write_text(text)
    app = App(str(tmp_path), issuers=played.issuers)
    played.answers = ["first"]
    app.load()
    await app.wait_keys()
    assert provider(app.mesh.snapshot)["local_jwks"] == {"inline_string": "first"}
    assert StatusPage(app.mesh, app.issuers).status()["issuers"] == [{"issuer": ISSUER, "uri": "", "known": True, "age_s": 0.0, "why": ""}]
    published = asyncio.Event()
    publish = app.hub.publish

    def told(made: Any) -> None:
        publish(made)
        published.set()

    app.hub.publish = told  # type: ignore[method-assign]
    running = asyncio.create_task(app.run())
    try:
        await played.again("second")
        async with asyncio.timeout(PATIENCE):
            await published.wait()
        assert provider(app.mesh.snapshot)["local_jwks"] == {"inline_string": "second"}
    finally:
        running.cancel()
        await asyncio.wait([running])
