"""Join tokens: one identity, one key, for a while; nothing on the disk that could be shown."""

from __future__ import annotations

import os

import pytest

from control.ca.attestation import Caller, Rejected
from control.ca.csr import parse_csr
from control.ca.keystore import StoreError
from control.ca.tokens import JoinTokens
from tests.unit.ca_help import API, NOW, WEB, Clock, csr

REQUEST, ANOTHER, NAMELESS = parse_csr(csr()), parse_csr(csr()), parse_csr(csr(None))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(tmp_path, clock) -> JoinTokens:
    return JoinTokens(str(tmp_path / "tokens"), clock)


def test_a_token_is_good_for_one_key(tokens):
    token = tokens.create(WEB)
    assert tokens.redeem(token, REQUEST) == WEB
    assert tokens.redeem(token, REQUEST) == WEB  # the answer was lost: the same request again
    with pytest.raises(Rejected, match="used by somebody else"):
        tokens.redeem(token, ANOTHER)
    assert tokens.redeem(token, REQUEST) == WEB


def test_it_is_for_one_identity_and_asking_for_another_does_not_use_it_up(tokens):
    token = tokens.create(API)
    with pytest.raises(Rejected, match=r"not for spiffe://mesh.test/ns/default/sa/web"):
        tokens.redeem(token, REQUEST)
    assert tokens.redeem(token, NAMELESS) == API


def test_it_expires_used_or_not(tokens, clock):
    used, unused = tokens.create(WEB, 60), tokens.create(WEB, 60)
    tokens.redeem(used, REQUEST)
    clock.now = NOW + 59
    assert tokens.redeem(used, REQUEST) == WEB
    clock.now = NOW + 60
    for token in (used, unused):
        with pytest.raises(Rejected):
            tokens.redeem(token, REQUEST)
    tokens.sweep()
    assert tokens.statistics() == []


@pytest.mark.parametrize("token", ["", "mpj_", "mpj_" + "A" * 43, "mpj_" + "../" * 14 + "A", "x" * 5000, "mpj_" + "A" * 42 + "\n"])
def test_what_is_no_token(tokens, token):
    with pytest.raises(Rejected):
        tokens.redeem(token, REQUEST)


def test_the_folder_does_not_tell_tokens(tokens, tmp_path):
    token = tokens.create(WEB)
    for name in os.listdir(tmp_path / "tokens"):
        assert token[4:] not in name
        assert token[4:].encode() not in (tmp_path / "tokens" / name).read_bytes()
    assert [{**one, "id": len(one["id"])} for one in tokens.statistics()] == [{"id": 12, "identity": str(WEB), "expires": NOW + 3600, "used": False}]


def test_two_processes_redeem_it_once(tokens, tmp_path, clock):
    token, other = tokens.create(WEB), JoinTokens(str(tmp_path / "tokens"), clock)
    assert other.redeem(token, ANOTHER) == WEB
    with pytest.raises(Rejected):
        tokens.redeem(token, REQUEST)


def test_it_can_be_revoked(tokens):
    token = tokens.create(WEB)
    (id,) = (one["id"] for one in tokens.statistics())
    assert not tokens.revoke(id[:1]), "there may be others that begin like that"
    assert tokens.revoke(id)
    assert not tokens.revoke("")
    with pytest.raises(Rejected):
        tokens.redeem(token, REQUEST)


def test_damaged_files_redeem_nothing(tokens, tmp_path):
    token = tokens.create(WEB)
    file = next((tmp_path / "tokens").glob("*.json"))
    for damage in ("", "{}", '{"identity": "x", "expires": 9e99}', '{"identity": 1, "expires": 1}', "[]"):
        file.write_text(damage)
        with pytest.raises(Rejected):
            tokens.redeem(token, REQUEST)
    file.chmod(0o644)
    with pytest.raises(StoreError, match="open to others"):
        tokens.redeem(token, REQUEST)


async def test_as_an_attestor(tokens):
    token = tokens.create(WEB)
    assert await tokens.attest(Caller(tokens=("a kubernetes token", token)), REQUEST) == (WEB,)
    assert await tokens.attest(Caller(tokens=("a kubernetes token",)), REQUEST) is None
    assert await tokens.attest(Caller(), REQUEST) is None
