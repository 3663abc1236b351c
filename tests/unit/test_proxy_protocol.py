"""The PROXY protocol's parser."""

from __future__ import annotations

import socket

import pytest

from meshproxy.codec.proxy_protocol import ProxyHeader, ProxyProtocolError, parse, version_of, write_local, write_v2

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(body: bytes, *, command: int = 1, family: int = 0x11, version: int = 2) -> bytes:
    return SIGNATURE + bytes((version << 4 | command, family)) + len(body).to_bytes(2, "big") + body


def addresses(source: str = "1.2.3.4", destination: str = "5.6.7.8", ports: tuple[int, int] = (1000, 2000)) -> bytes:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    return socket.inet_pton(family, source) + socket.inet_pton(family, destination) + b"".join(port.to_bytes(2, "big") for port in ports)


def tlv(kind: int, value: bytes) -> bytes:
    return bytes((kind,)) + len(value).to_bytes(2, "big") + value


def test_v1():
    line = b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000\r\n"
    assert parse(line + b"GET /") == ProxyHeader(1, len(line), ("1.2.3.4", 1000), ("5.6.7.8", 2000))
    line = b"PROXY TCP6 2001:DB8::1 ::2 0 65535\r\n"
    assert parse(line) == ProxyHeader(1, len(line), ("2001:db8::1", 0), ("::2", 65535))


@pytest.mark.parametrize("line", [b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n"])
def test_v1_unknown(line):
    assert parse(line) == ProxyHeader(1, len(line))


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1000\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000 3\r\n",
        b"PROXY  TCP4 1.2.3.4 5.6.7.8 1000 2000\r\n",
        b"PROXY TCP5 1.2.3.4 5.6.7.8 1000 2000\r\n",
        b"PROXY TCP4 ::1 ::2 1000 2000\r\n",
        b"PROXY TCP6 1.2.3.4 5.6.7.8 1000 2000\r\n",
        b"PROXY TCP6 fe80::1%1 ::2 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 2000\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2000\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 65536 2000\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 000001 2000\r\n",
        b"PROXY TCP4 01.2.3.4 5.6.7.8 1 2000\r\n",
        b"PROXY TCP4 1.2.3.4 224.0.0.1 1 2\r\n",
        b"PROXY TCP4 0.0.0.0 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 255.255.255.255 1 2\r\n",
        b"PROXY TCP4 \xff.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY \r\n",
        b"PROXY UNKNOWN" + b" " * 95 + b"\r\n",  # longer than any line
        b"PROXY TCP4 " + b"1" * 100,
    ],
)
def test_v1_malformed(line):
    with pytest.raises(ProxyProtocolError) as caught:
        parse(line)
    assert caught.value.version == 1


def test_v2():
    data = v2(addresses())
    assert parse(data + b"more") == ProxyHeader(2, len(data), ("1.2.3.4", 1000), ("5.6.7.8", 2000))
    data = v2(addresses("2001:db8::1", "::2") + tlv(1, b"h2") + tlv(0xE0, b""), family=0x21)
    assert parse(data) == ProxyHeader(2, len(data), ("2001:db8::1", 1000), ("::2", 2000), ((1, b"h2"), (0xE0, b"")))
    assert parse(v2(addresses(), family=0x12)) is not None  # datagrams too, as Envoy


def test_v2_local():
    assert parse(v2(b"", command=0, family=0)) == ProxyHeader(2, 16)
    assert parse(v2(b"ignored", command=0, family=0)) == ProxyHeader(2, 23)


@pytest.mark.parametrize(
    "data",
    [
        v2(addresses(), version=1),
        v2(addresses(), command=2),
        v2(addresses(), family=0x10),
        v2(addresses(), family=0x01),
        v2(bytes(216), family=0x31),  # Unix sockets
        v2(addresses()[:-1]),
        v2(addresses(), family=0x21),
        v2(addresses("1.2.3.4", "224.0.0.1")),
        v2(addresses("0.0.0.0", "5.6.7.8")),
        v2(addresses("ff02::1", "::1"), family=0x21),
        v2(addresses() + b"\x01"),
        v2(addresses() + b"\x01\0"),
        v2(addresses() + b"\x01\0\x05abcd"),
        v2(addresses() + b"\x01\xff\xffabcd") + bytes(70000),  # an extension that would reach into the stream
        SIGNATURE + b"\x10",
    ],
)
def test_v2_malformed(data):
    with pytest.raises(ProxyProtocolError) as caught:
        parse(data)
    assert caught.value.version == 2


def test_what_cannot_be_said_is_local():
    assert parse(write_local()) == ProxyHeader(2, 16)
    assert write_v2(("10.0.0.1", 1), ("::1", 2)) == write_local()


def test_neither():
    for data in (b"GET / HTTP/1.1\r\n", b"PROXX", b"\r\n\r\n\0\r\nQUIX"):
        assert version_of(data) == 0
        with pytest.raises(ProxyProtocolError) as caught:
            parse(data)
        assert caught.value.version == 0


def test_cannot_tell_yet():
    for data in (b"", b"P", b"PROXY", b"\r", b"\r\n\r\n\0\r\nQUIT"):
        assert version_of(data) is None
        assert parse(data) is None
