"""What is read along of a TLS server's first flight, from handshakes that OpenSSL makes in memory."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.net.tls_flight import UNKNOWN_SIGNATURE, ServerFlight, usual_signature
from tests.unit.net_help import client_context, pki


def server_context(curve: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki()["server.pem"], pki()["server.key"])
    if curve:
        context.set_ecdh_curve(curve)
    return context


def flights(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[list[bytes], ssl.SSLObject]:
    """What the server sent, answer by answer, and its end of the finished handshake."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up, server_hostname="server.example.com"), server.wrap_bio(up, down, server_side=True)
    sent = []
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            if end is ends[1] and down.pending:
                sent.append(down.read())
                down.write(sent[-1])
    return sent, ends[1]


def tls_1_2(**options: str) -> ssl.SSLContext:
    context = client_context(**options)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def der(name: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(Path(pki()[f"{name}.pem"]).read_text())


def read(data: bytes, pieces: int) -> ServerFlight:
    """A flight that was fed in pieces of that size until it had seen enough."""
    flight = ServerFlight()
    for at in range(0, len(data), pieces):
        if flight.feed(data[at : at + pieces]):
            break
    return flight


@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
@pytest.mark.parametrize(("curve", "group"), [("", "X25519"), ("prime256v1", "P-256"), ("secp384r1", "P-384")])
def test_tls_1_3(curve, group, pieces):
    # With P-256 and P-384 the server asks the client to begin again.
    sent, server = flights(client_context(), server_context(curve))
    assert server.version() == "TLSv1.3"
    flight = read(b"".join(sent), pieces)
    assert (flight.group, flight.signature, flight.certificate) == (group, "", b"")


@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
@pytest.mark.parametrize(("curve", "group"), [("", "X25519"), ("prime256v1", "P-256"), ("secp521r1", "P-521")])
def test_tls_1_2(curve, group, pieces):
    sent, server = flights(tls_1_2(), server_context(curve))
    assert server.version() == "TLSv1.2"
    flight = read(b"".join(sent), pieces)
    assert (flight.group, flight.signature, flight.certificate) == (group, "ecdsa_secp256r1_sha256", der("server"))


def test_resumed_tls_1_2_says_nothing():
    client, server = tls_1_2(), server_context()
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    first = client.wrap_bio(down, up, server_hostname="server.example.com")
    other = server.wrap_bio(up, down, server_side=True)
    for _ in range(3):
        for end in (first, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    again = client.wrap_bio(down, up, server_hostname="server.example.com", session=first.session)
    with pytest.raises(ssl.SSLWantReadError):
        again.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        server.wrap_bio(up, down, server_side=True).do_handshake()
    flight = ServerFlight()
    assert flight.feed(down.read())
    assert (flight.group, flight.signature, flight.certificate) == ("", "", b"")


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_anything_else_is_only_not_understood(messages):
    records = b"".join(b"\x16\x03\x03" + len(message).to_bytes(2) + message for message in messages)
    flight = ServerFlight()
    flight.feed(records)
    assert flight.signature in ("", UNKNOWN_SIGNATURE) or flight.group


def test_alert_ends_the_reading():
    assert ServerFlight().feed(b"\x15\x03\x03\x00\x02\x02\x28")


def test_signature_of_a_key():
    assert usual_signature(der("server")) == "ecdsa_secp256r1_sha256"
    assert usual_signature(der("rsa")) == "rsa_pss_rsae_sha256"
    assert usual_signature(b"") == UNKNOWN_SIGNATURE
