"""The authority: what it signs, what is trusted while it rotates, and what it does when time or disk go wrong. openssl verifies."""

from __future__ import annotations

import errno
import os
import re
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from control.ca import certificates, rotation
from control.ca.authority import Authority, CannotSign, Denied
from control.ca.certificates import BadCertificate
from control.ca.csr import parse_csr
from control.ca.keystore import StoreError
from control.ca.rotation import DAY, Settings
from meshproxy.api import spiffe
from tests.unit.ca_help import API, NOW, WEB, Clock, csr, key_pem, needs_openssl, openssl, verify

REQUEST = parse_csr(csr())
HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path, clock) -> Authority:
    return Authority(str(tmp_path / "ca"), "mesh.test", clock=clock)


@needs_openssl
def test_a_leaf_as_openssl_sees_it(authority, tmp_path):
    issued = authority.issue(REQUEST, [WEB])
    assert verify(tmp_path, issued.chain, issued.bundle, NOW) == "OK"
    text = re.sub(r"\s+", " ", openssl("x509", "-noout", "-text", data=certificates.pem(issued.chain[0])))
    assert "X509v3 Subject Alternative Name: critical URI:spiffe://mesh.test/ns/default/sa/web X509v3" in text
    assert "X509v3 Basic Constraints: critical CA:FALSE" in text
    assert "X509v3 Key Usage: critical Digital Signature X509v3" in text
    assert "X509v3 Extended Key Usage: TLS Web Server Authentication, TLS Web Client Authentication" in text
    assert "Subject: Subject Public Key Info" in text
    text = re.sub(r"\s+", " ", openssl("x509", "-noout", "-text", data=certificates.pem(issued.chain[1])))
    assert "X509v3 Basic Constraints: critical CA:TRUE, pathlen:0" in text
    assert "X509v3 Key Usage: critical Certificate Sign, CRL Sign" in text
    assert "URI:spiffe://mesh.test X509v3" in text


@needs_openssl
def test_a_leaf_is_no_authority(authority, tmp_path):
    key = certificates.new_key()
    issued = authority.issue(parse_csr(csr(key=key)), [WEB])
    below = certificates.make_leaf(certificates.new_key().public_key(), issued.chain[0], key, API, NOW, HOUR)
    assert "invalid CA certificate" in verify(tmp_path, (below, *issued.chain), issued.bundle, NOW)


def test_lives(authority):
    for wanted, given in [(0, DAY), (HOUR, HOUR), (7 * DAY, DAY), (-5, DAY), (0.1, 1)]:
        issued = authority.issue(REQUEST, [WEB], wanted)
        assert (issued.not_before, issued.not_after) == (NOW - certificates.BACKDATED_S, int(NOW + given)), wanted


def test_rsa_leaves_may_encipher_keys(authority):
    leaf = authority.issue(parse_csr(csr(key=rsa.generate_private_key(65537, 2048))), [WEB]).chain[0]
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment


def test_who_may_be_who(authority):
    assert authority.issue(REQUEST, [API, WEB]).identity == WEB
    assert authority.issue(parse_csr(csr(None)), [API]).identity == API
    for request, allowed, why in [
        (REQUEST, [API], "may not be spiffe://mesh.test/ns/default/sa/web"),
        (REQUEST, [], "may not be"),
        (parse_csr(csr(None)), [], "the caller has none"),
        (parse_csr(csr(None)), [API, WEB], "the caller has several"),
        (parse_csr(csr("spiffe://other.test/ns/default/sa/web")), [spiffe.parse("spiffe://other.test/ns/default/sa/web")], "no workload of the trust domain"),
    ]:
        with pytest.raises(Denied, match=why):
            authority.issue(request, allowed)


def test_it_is_the_same_after_a_restart(authority, tmp_path, clock):
    again = Authority(str(tmp_path / "ca"), "mesh.test", clock=clock)
    assert again.bundle() == authority.bundle()
    assert again.issue(REQUEST, [WEB]).chain[1:] == authority.issue(REQUEST, [WEB]).chain[1:]
    assert {oct(os.stat(tmp_path / "ca" / name).st_mode & 0o777) for name in os.listdir(tmp_path / "ca")} == {"0o600"}
    with pytest.raises(BadCertificate, match=r"the authority of mesh.test, not of other.test"):
        Authority(str(tmp_path / "ca"), "other.test", clock=clock)


def test_two_processes_share_a_folder(authority, tmp_path, clock):
    other = Authority(str(tmp_path / "ca"), "mesh.test", clock=clock)
    authority.rotate_intermediate()
    assert other.issue(REQUEST, [WEB]).chain[1:] == authority.issue(REQUEST, [WEB]).chain[1:]
    other.rotate_root()
    authority.tick()
    assert len(authority.bundle()) == 2
    assert authority.bundle() == other.bundle()


_NO_ROOT = '{"version": 1, "trust_domain": "mesh.test", "longest_life_s": 1, "roots": [], "intermediates": []}'


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"version": 2}', _NO_ROOT])
def test_damaged_folders(authority, tmp_path, clock, damage):
    (tmp_path / "ca" / "state.json").write_text(damage)
    with pytest.raises(BadCertificate, match="is damaged"):
        Authority(str(tmp_path / "ca"), "mesh.test", clock=clock)


def test_keys_that_others_can_read(authority, tmp_path, clock):
    key = next((tmp_path / "ca").glob("intermediate-*.key"))
    key.chmod(0o640)
    with pytest.raises(StoreError, match="is open to others"):
        Authority(str(tmp_path / "ca"), "mesh.test", clock=clock)


@pytest.mark.slow
@needs_openssl
def test_no_leaf_is_ever_without_trust_while_everything_rotates(tmp_path, clock):
    """Months of a mesh in small: who renews at half life and learns of the bundle then only verifies everybody else at any time."""
    settings = Settings(life_s=DAY, max_life_s=DAY, intermediate_life_s=8 * DAY, root_life_s=40 * DAY)
    authority = Authority(str(tmp_path / "ca"), "mesh.test", settings, clock=clock)
    # Two workloads, out of step, and one that was away just short of the whole life of its leaf.
    holders = {"a": (0.0, 12 * HOUR), "b": (5 * HOUR, 12 * HOUR), "late": (7 * HOUR, DAY - 1)}
    held: dict[str, object] = {name: authority.issue(REQUEST, [WEB]) for name in holders}
    due = {name: NOW + first + every for name, (first, every) in holders.items()}
    roots, intermediates, checked = set(), set(), 0
    while clock.now < NOW + 100 * DAY:
        clock.now = min(due.values())
        authority.tick()
        # Everybody can verify everybody just before the next one renews.
        for mine in held.values():
            for other in held.values():
                if clock.now < other.not_after and clock.now < mine.not_after:
                    certificates.check_chain(other.chain, mine.bundle)
                    checked += 1
        for name, at in due.items():
            if at <= clock.now:
                held[name] = issued = authority.issue(REQUEST, [WEB])
                assert issued.not_after - clock.now == DAY
                due[name] = clock.now + holders[name][1]
                roots.add(certificates.check_chain(issued.chain, issued.bundle).serial_number)
                intermediates.add(issued.chain[1].serial_number)
    assert (len(roots), len(intermediates) >= 15, checked > 2000) == (4, True, True)
    assert verify(tmp_path, issued.chain, issued.bundle, clock.now) == "OK"
    assert len(authority.bundle()) <= 2
    assert len(list((tmp_path / "ca").glob("*.key"))) < 30


def test_a_root_signs_when_everybody_knows_it(authority, clock):
    old = authority.bundle()
    calls: list[int] = []
    authority.on_bundle.append(lambda: calls.append(len(authority.bundle())))
    authority.rotate_root()
    assert (authority.bundle()[:1], len(authority.bundle()), calls) == (old, 2, [2])
    new = authority.bundle()[1]
    for after, root, trusted in [
        (0, old[0], 2), (DAY - 1, old[0], 2), (DAY, new, 2), (2 * DAY, new, 2), (2 * DAY + certificates.BACKDATED_S, new, 1), (3 * DAY, new, 1)
    ]:  # fmt: skip
        clock.now = NOW + after
        authority.tick()
        issued = authority.issue(REQUEST, [WEB])
        assert (certificates.check_chain(issued.chain, issued.bundle), len(issued.bundle)) == (root, trusted), after
    assert calls == [2, 1]


def test_a_clock_that_goes_forward_and_back(authority, tmp_path, clock):
    before = authority.issue(REQUEST, [WEB])
    for step in (40 * DAY, 400 * DAY, 3650 * DAY * 0.9):
        clock.now = NOW + step
        authority.tick()
        far = authority.issue(REQUEST, [WEB])
        assert far.not_before <= clock.now < far.not_after
        clock.now = NOW
        authority.tick()
        assert before.bundle[0] in authority.bundle()
        again = authority.issue(REQUEST, [WEB])
        assert again.not_before <= NOW < again.not_after
        assert certificates.check_chain(again.chain, before.bundle) == before.bundle[0]
        assert certificates.check_chain(before.chain, again.bundle) == before.bundle[0]


def test_clocks_that_nothing_is_valid_at(authority, clock):
    clock.now = NOW - DAY
    with pytest.raises(CannotSign, match="the clock is before the root's beginning"):
        authority.issue(REQUEST, [WEB])
    with pytest.raises(BadCertificate, match="begins later than now"):
        authority.rotate_root()
    clock.now = NOW + 20 * 365 * DAY
    with pytest.raises(CannotSign, match="the root has expired"):
        authority.issue(REQUEST, [WEB])
    clock.now = NOW
    assert authority.issue(REQUEST, [WEB]).identity == WEB


def test_a_full_disk_stops_rotation_and_nothing_else(authority, tmp_path, clock, monkeypatch):
    clock.now = NOW + 25 * DAY  # a new intermediate is due, the one there is has five days to go

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    authority.tick()
    first = authority.issue(REQUEST, [WEB])
    with pytest.raises(StoreError, match="the disk is full"):
        authority.rotate_root()
    assert authority.issue(REQUEST, [WEB]).chain[1] == first.chain[1]
    monkeypatch.undo()
    authority.tick()
    assert authority.issue(REQUEST, [WEB]).chain[1] != first.chain[1]
    assert Authority(str(tmp_path / "ca"), "mesh.test", clock=clock).issue(REQUEST, [WEB]).chain[1:] == authority.issue(REQUEST, [WEB]).chain[1:]


def test_a_folder_that_goes_away(authority, tmp_path):
    for name in os.listdir(tmp_path / "ca"):
        os.unlink(tmp_path / "ca" / name)
    os.rmdir(tmp_path / "ca")
    authority.tick()
    assert authority.issue(REQUEST, [WEB]).identity == WEB


def root(path_length: int | None = None, ca: bool = True, life_s: float = 365 * DAY, now: float = NOW):
    """Somebody's own root."""
    key = rsa.generate_private_key(65537, 2048)
    made = certificates.make_root(key, "corp.test", now, life_s)
    if not ca:
        made = certificates.make_leaf(key.public_key(), made, key, WEB, now, life_s)
    elif path_length == 0:
        made = certificates.make_intermediate(key, made, key, "corp.test", now, life_s)
    return made, key


@needs_openssl
def test_a_root_that_is_brought(tmp_path, clock):
    certificate, key = root()
    authority = Authority(str(tmp_path / "ca"), "mesh.test", root=(certificates.pem(certificate), key_pem(key)), clock=clock)
    issued = authority.issue(REQUEST, [WEB])
    assert issued.bundle == (certificate,)
    assert verify(tmp_path, issued.chain, issued.bundle, NOW) == "OK"
    another, another_key = root()
    authority.bring_root(certificates.pem(another), key_pem(another_key))
    assert authority.bundle() == (certificate, another)
    with pytest.raises(BadCertificate, match="is known already"):
        authority.bring_root(certificates.pem(another), key_pem(another_key))


def test_roots_that_are_none(authority):
    good, key = root()
    for certificate, private, why in [
        (certificates.pem(root(ca=False)[0]), key_pem(key), "no authority"),
        (certificates.pem(root(path_length=0)[0]), key_pem(key), "path length is 0"),
        (certificates.pem(good), key_pem(certificates.new_key()), "private key is another certificate's"),
        (certificates.pem(good, good), key_pem(key), "a root is one certificate"),
        ("", key_pem(key), "no PEM certificate"),
        (certificates.pem(good), "", "no PEM private key"),
    ]:
        with pytest.raises(BadCertificate, match=why):
            authority.bring_root(certificate, private)
    expired, private = root(now=NOW - 400 * DAY)
    with pytest.raises(BadCertificate, match="not valid now"):
        authority.bring_root(certificates.pem(expired), key_pem(private))
    assert len(authority.bundle()) == 1


@needs_openssl
def test_an_intermediate_that_is_brought(authority, tmp_path, clock):
    """As Istio's cacerts: the root's key stays elsewhere."""
    certificate, root_key = root()
    key = certificates.new_key()
    intermediate = certificates.make_intermediate(key, certificate, root_key, "mesh.test", NOW, 90 * DAY)
    authority.bring_intermediate(certificates.pem(intermediate, certificate), key_pem(key), certificates.pem(certificate))
    clock.now = NOW + DAY
    issued = authority.issue(REQUEST, [WEB])
    assert issued.chain[1:] == (intermediate,)
    assert verify(tmp_path, issued.chain, issued.bundle, clock.now) == "OK"
    with pytest.raises(BadCertificate, match="bring the new intermediate"):
        authority.rotate_intermediate()
    second_key = certificates.new_key()
    second = certificates.make_intermediate(second_key, certificate, root_key, "mesh.test", clock.now, 90 * DAY)
    authority.bring_intermediate(certificates.pem(second), key_pem(second_key), certificates.pem(certificate))
    assert authority.issue(REQUEST, [WEB]).chain[1:] == (second,)
    assert Authority(str(tmp_path / "ca"), "mesh.test", clock=clock).issue(REQUEST, [WEB]).chain[1:] == (second,)
    clock.now = NOW + 200 * DAY
    with pytest.raises(CannotSign, match="bring another one"):
        authority.issue(REQUEST, [WEB])
    with pytest.raises(BadCertificate, match="no root signed it"):
        authority.bring_intermediate(certificates.pem(second), key_pem(second_key), certificates.pem(root()[0]))


def test_what_is_there_in_plain_values(authority):
    authority.rotate_root()
    found = authority.statistics()
    assert [one["status"] for one in found["roots"]] == ["signing", "trusted"]
    assert [one["status"] for one in found["intermediates"]] == ["signing", "spare"]
    assert found["roots"][1]["signs_at"] == NOW + DAY


def test_pythons_tls_takes_it(authority, tmp_path):
    """The chain and its key load, so that names and formats are what TLS libraries expect."""
    key = certificates.new_key()
    issued = authority.issue(parse_csr(csr(key=key)), [WEB])
    (tmp_path / "chain.pem").write_text(certificates.pem(*issued.chain))
    (tmp_path / "key.pem").write_text(key_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
    context.load_verify_locations(cadata=certificates.pem(*issued.bundle))
    assert len(context.get_ca_certs()) == 1


def test_longer_lives_are_remembered(tmp_path, clock):
    """A life that was once possible keeps old roots trusted for that long, whatever is configured later."""
    folder = str(tmp_path / "ca")
    Authority(folder, "mesh.test", Settings(life_s=HOUR, max_life_s=10 * DAY), clock=clock)
    authority = Authority(folder, "mesh.test", Settings(life_s=HOUR, max_life_s=HOUR), clock=clock)
    authority.rotate_root()
    clock.now = NOW + 19 * DAY
    assert len(authority.bundle()) == 2
    clock.now = NOW + 21 * DAY
    assert len(authority.bundle()) == 1
    assert rotation.DAY == 86400
