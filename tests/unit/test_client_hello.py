"""The ClientHello reader."""

from __future__ import annotations

import ssl

import pytest

from meshproxy.codec import client_hello
from meshproxy.codec.client_hello import NotClientHelloError, TooLargeError, parse


def hello(server_name: str | None = "www.example.com", alpn: tuple[str, ...] = ("h2", "http/1.1")) -> bytes:
    """What a real TLS stack sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def built(body: bytes, *, version: int = 0x0303) -> bytes:
    """A ClientHello with this after the compression methods."""
    message = version.to_bytes(2, "big") + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0" + body
    handshake = b"\x01" + len(message).to_bytes(3, "big") + message
    return b"\x16\x03\x01" + len(handshake).to_bytes(2, "big") + handshake


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def extensions(*all: bytes) -> bytes:
    joined = b"".join(all)
    return len(joined).to_bytes(2, "big") + joined


def names(*names: bytes, kind: int = 0) -> bytes:
    joined = b"".join(bytes((kind,)) + len(name).to_bytes(2, "big") + name for name in names)
    return extension(0, len(joined).to_bytes(2, "big") + joined)


def test_of_openssl():
    data = hello("WWW.Example.com")
    assert parse(data) == client_hello.ClientHello("www.example.com", ("h2", "http/1.1"), len(data))
    assert parse(data + b"more") == parse(data)
    assert parse(hello(None, ())) == client_hello.ClientHello(None, (), len(hello(None, ())))


def test_needs_every_byte():
    data = hello()
    assert all(parse(data[:size]) is None for size in range(len(data)))


def test_across_records():
    data = hello()
    message = data[5:]
    records = b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in (message[:1], message[1:3], message[3:50], message[50:]))
    assert parse(records) == client_hello.ClientHello("www.example.com", ("h2", "http/1.1"), len(records))


def test_without_extensions():
    assert parse(built(b"")) == client_hello.ClientHello(None, (), len(built(b"")))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x02",  # not major version 3
        b"\x15\x03\x01\0\x02\x02\x28",  # an alert
        b"\x16\x03\x01\0\0",  # an empty record
        b"\x16\x03\x01\x40\x01" + bytes(10),  # a record that is too large
        b"\x16\x03\x01\0\x04\x02\0\0\0",  # a ServerHello
        b"\x16\x03\x01\0\x20" + b"x" * 64,
        built(b"\0\x01"),  # extensions cut short
        built(extensions() + b"x"),
        built(extensions(extension(0, b""))),
        built(extensions(names(b""))),
        built(extensions(names(b"a", b"b"))),
        built(extensions(names(b"a", kind=1))),
        built(extensions(names(b"a\0b"))),
        built(extensions(names(b"a"), names(b"a"))),  # an extension twice
        built(b"", version=0x0300),
        built(b"")[:3] + (len(built(b"")) - 4).to_bytes(2, "big") + built(b"")[5:],  # a record that goes on after the message
    ],
)
def test_not_a_client_hello(data):
    with pytest.raises(NotClientHelloError):
        parse(data)


def test_malformed_alpn_is_left_to_the_tls_stack():
    for content in (b"", b"\0\0x", b"\0\x01\0", b"\0\x02\x02h", b"\0\x03\x02h2x"):
        found = parse(built(extensions(names(b"a"), extension(16, content))))
        assert found is not None
        assert found.server_name == "a"
        assert found.alpn == ()


def test_too_large():
    data = built(extensions(extension(21, bytes(3000))))
    with pytest.raises(TooLargeError):
        parse(data[:1000], 1000)
    assert parse(data[:999], 1000) is None
    with pytest.raises(NotClientHelloError):  # larger than any can be: it says so itself
        parse(b"\x16\x03\x01\x40\0\x01\xff\xff\xff")


def test_too_large_even_when_all_of_it_is_there():
    whole = hello()
    assert parse(whole, len(whole)) is not None
    with pytest.raises(TooLargeError):
        parse(whole, len(whole) - 1)
