"""Whatever comes, and however it is cut: a header, more bytes, or the parser's own error; never a byte beyond the header."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec.proxy_protocol import ProxyHeader, ProxyProtocolError, parse, write_v1, write_v2
from tests.unit.test_proxy_protocol import SIGNATURE, addresses, tlv, v2

ports = st.integers(0, 65535)
v4 = st.ip_addresses(v=4).filter(lambda ip: not ip.is_multicast and not ip.is_unspecified and int(ip) != 0xFFFFFFFF).map(str)
v6 = st.ip_addresses(v=6).filter(lambda ip: not ip.is_multicast and not ip.is_unspecified).map(str)
pairs = st.one_of(st.tuples(v4, v4), st.tuples(v6, v6))
tlvs = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=5)


def outcome(data: bytes) -> ProxyHeader | str | None:
    try:
        return parse(data)
    except ProxyProtocolError as error:
        return f"error {error.version}"


def check_prefixes(data: bytes, rest: bytes, expected: ProxyHeader) -> None:
    assert all(parse(data[:size]) is None for size in range(len(data)))
    assert parse(data) == expected
    assert parse(data + rest) == expected


@given(pairs, ports, ports, st.binary(max_size=20))
def test_v1(pair, source_port, destination_port, rest):
    family = "TCP6" if ":" in pair[0] else "TCP4"
    line = f"PROXY {family} {pair[0]} {pair[1]} {source_port} {destination_port}\r\n".encode()
    check_prefixes(line, rest, ProxyHeader(1, len(line), (pair[0], source_port), (pair[1], destination_port)))


@given(pairs, ports, ports, tlvs, st.binary(max_size=20))
def test_v2(pair, source_port, destination_port, extensions, rest):
    body = addresses(*pair, (source_port, destination_port)) + b"".join(tlv(*entry) for entry in extensions)
    data = v2(body, family=0x21 if ":" in pair[0] else 0x11)
    source, destination = (str(ipaddress.ip_address(ip)) for ip in pair)
    check_prefixes(data, rest, ProxyHeader(2, len(data), (source, source_port), (destination, destination_port), tuple(extensions)))


@given(pairs, ports, ports, st.binary(max_size=20))
def test_what_is_written_is_read(pair, source_port, destination_port, rest):
    source, destination = ((str(ipaddress.ip_address(ip)), port) for ip, port in zip(pair, (source_port, destination_port), strict=True))
    for version, write in ((1, write_v1), (2, write_v2)):
        data = write(source, destination)
        check_prefixes(data, rest, ProxyHeader(version, len(data), source, destination))


@given(st.binary(max_size=200))
def test_garbage(data):
    for prefix in (b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"):
        found = outcome(prefix + data)
        assert not isinstance(found, ProxyHeader) or 0 < found.size <= len(prefix + data)


@given(st.binary(max_size=150), st.sampled_from([b"", b"PROXY ", SIGNATURE]))
def test_a_verdict_never_changes_with_more_bytes(data, prefix):
    first: object = None
    for size in range(len(prefix + data) + 1):
        found = outcome((prefix + data)[:size])
        if first is not None:
            assert found == first
        first = found
