"""Whatever is asked of the authority: it signs one SPIFFE ID that the caller may have, for a key that is good, or says why not. Nothing else comes out."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import functools
import tempfile

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from control.ca import certificates
from control.ca.authority import Authority, CannotSign, Denied
from control.ca.csr import BadRequest, parse_csr
from control.ca.rotation import DAY, Settings
from meshproxy.api import spiffe
from tests.unit.ca_help import API, NOW, WEB, Clock, csr

KEYS = {
    "p256": ec.generate_private_key(ec.SECP256R1()),
    "p224": ec.generate_private_key(ec.SECP224R1()),
    "rsa1024": rsa.generate_private_key(65537, 1024),
    "rsa2048": rsa.generate_private_key(65537, 2048),
}
ALLOWED = (WEB, API)
GOOD = x509.load_pem_x509_csr(csr(key=KEYS["p256"]).encode()).public_bytes(Encoding.DER)  # signatures are random: made once

URIS = st.sampled_from(
    [str(WEB), str(API), "spiffe://mesh.test", "spiffe://mesh.test/ns/default/sa/admin", "spiffe://evil.test/ns/default/sa/web", "https://mesh.test/"]
)
NAMES = st.one_of(
    URIS.map(x509.UniformResourceIdentifier),
    st.sampled_from(["web.test", "*.test", "localhost"]).map(x509.DNSName),
    st.just(x509.RFC822Name("web@mesh.test")),
    st.just(x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x03web")),
)
EXTENSIONS = st.one_of(
    st.builds(lambda ca: x509.BasicConstraints(ca=ca, path_length=None), st.booleans()),
    st.builds(lambda sign, crl: _usage(sign, crl), st.booleans(), st.booleans()),
    st.just(x509.NameConstraints([x509.DNSName("test")], None)),
    st.just(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\x00")),
    st.just(x509.TLSFeature([x509.TLSFeatureType.status_request])),
)


def _usage(sign: bool, crl: bool) -> x509.KeyUsage:
    return x509.KeyUsage(True, False, False, False, False, sign, crl, False, False)


@functools.cache
def authority() -> Authority:
    return Authority(tempfile.mkdtemp() + "/ca", "mesh.test", clock=Clock())


def sign(text: str) -> tuple[x509.Certificate, ...] | None:
    """The chain, or None when the request was refused in one of the ways that there are."""
    try:
        return authority().issue(parse_csr(text), ALLOWED).chain
    except (BadRequest, Denied):
        return None


def check(leaf: x509.Certificate) -> None:
    """An X509-SVID and nothing more."""
    names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    assert [type(one) for one in names] == [x509.UniformResourceIdentifier]
    assert spiffe.parse(names[0].value) in ALLOWED
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(ca=False, path_length=None)
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, False, False, True)
    assert len(leaf.extensions) == 6
    assert not list(leaf.subject)


@given(st.lists(NAMES, max_size=3), st.lists(EXTENSIONS, max_size=3, unique_by=type), st.sampled_from(sorted(KEYS)))
def test_hostile_requests(names, extensions, key):
    chain = sign(csr(None, key=KEYS[key], names=names, extensions=extensions))
    wanted = [str(one.value) for one in names if isinstance(one, x509.UniformResourceIdentifier)]
    bad = (
        key not in ("p256", "rsa2048")
        or len(names) != 1
        or wanted not in ([str(WEB)], [str(API)])
        or any(isinstance(one, x509.NameConstraints) for one in extensions)
        or any(isinstance(one, x509.BasicConstraints) and one.ca for one in extensions)
        or any(isinstance(one, x509.KeyUsage) and (one.key_cert_sign or one.crl_sign) for one in extensions)
    )
    assert (chain is None) == bad
    if chain is not None:
        check(chain[0])
        assert chain[0].public_key() == KEYS[key].public_key()


@given(st.data())
def test_damaged_requests(data):
    """One byte or a piece of a good request changed: it is refused, or it is still good (what was changed did not matter)."""
    der = bytearray(GOOD)
    at = data.draw(st.integers(0, len(der) - 1))
    der[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    text = f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.encodebytes(bytes(der)).decode()}-----END CERTIFICATE REQUEST-----\n"
    chain = sign(text)
    if chain is not None:
        check(chain[0])


@given(st.text(), st.binary(max_size=200))
def test_garbage(text, data):
    assert sign(text) is None
    assert sign(f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.encodebytes(data).decode()}-----END CERTIFICATE REQUEST-----\n") is None


def test_ed25519_is_refused():
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(ed25519.Ed25519PrivateKey.generate(), None)
    assert sign(request.public_bytes(Encoding.PEM).decode()) is None


STEPS = st.lists(st.one_of(st.floats(-3 * DAY, 3 * DAY), st.floats(-1000 * DAY, 1000 * DAY), st.sampled_from([0.0, 0.5 * DAY, DAY])), max_size=12)


@pytest.mark.slow
@settings(max_examples=30)
@given(STEPS, st.lists(st.sampled_from(["tick", "rotate_root", "restart"]), min_size=12, max_size=12))
def test_clock_steps(steps, actions):
    """Wherever the clock goes and whatever is done there: what is signed verifies with the bundle of that time, and with the clock set right again, whoever
    has a leaf of before and whoever gets one now trust each other."""
    clock, lives = Clock(), Settings(intermediate_life_s=10 * DAY, root_life_s=100 * DAY)
    with tempfile.TemporaryDirectory() as parent:
        mine = Authority(f"{parent}/ca", "mesh.test", lives, clock=clock)
        request = parse_csr(csr(key=KEYS["p256"]))
        before = mine.issue(request, [WEB])
        for step, action in zip(steps, actions, strict=False):
            clock.now = max(clock.now + step, 0.0)
            if action == "restart":
                mine = Authority(f"{parent}/ca", "mesh.test", lives, clock=clock)
            elif action == "tick":
                mine.tick()
            elif action == "rotate_root":
                with contextlib.suppress(certificates.BadCertificate):  # the clock is before another one's beginning
                    mine.rotate_root()
            try:
                issued = mine.issue(request, [WEB])
            except CannotSign:
                continue
            certificates.check_chain(issued.chain, issued.bundle)
            assert issued.chain[0].not_valid_before_utc.timestamp() <= clock.now < issued.chain[0].not_valid_after_utc.timestamp()
            assert issued.not_after <= certificates.not_after(issued.chain[1])
        clock.now = NOW + 0.5 * DAY
        mine.tick()
        after = mine.issue(request, [WEB])
        certificates.check_chain(after.chain, before.bundle)
        certificates.check_chain(before.chain, after.bundle)
        assert dt.datetime.fromtimestamp(clock.now, dt.UTC) < after.chain[0].not_valid_after_utc
