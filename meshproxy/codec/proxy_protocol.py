"""The PROXY protocol, versions 1 and 2: who a connection is really from, said by the load balancer in front. Sans-IO.

Source: "The PROXY protocol" by Willy Tarreau (HAProxy's doc/proxy-protocol.txt), sections 2.1 and 2.2, and Envoy's stricter reading: addresses must be
unicast, Unix addresses and unspecified families are refused for proxied connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.record import Record

if TYPE_CHECKING:
    import ipaddress

V1_SIGNATURE = b"PROXY "
V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V1_MAX = 108  # bytes of the longest line, as Envoy counts
_V2_HEADER = 16
_LOCAL, _PROXY = 0, 1
_ADDRESS_SIZES = {1: 12, 2: 36}  # family -> size of the two addresses and ports


class ProxyProtocolError(ValueError):
    """The bytes are not a PROXY header that may be accepted. `version` is 1 or 2 when that much is known, 0 when they are no PROXY header at all."""

    def __init__(self, why: str, version: int = 0) -> None:
        super().__init__(why)
        self.version = version


class ProxyHeader(Record, frozen=True):
    """`size` bytes belong to the header. `source` and `destination` are (IP, port), None for LOCAL and UNKNOWN: the connection's own addresses count.

    `tlvs`: type and value of each extension, in order.
    """

    version: int
    size: int
    source: tuple[str, int] | None = None
    destination: tuple[str, int] | None = None
    tlvs: tuple[tuple[int, bytes], ...] = ()


def version_of(data: bytes) -> int | None:
    """1 or 2 when `data` begins like that version, 0 when like neither, None when it is too short to tell."""
    if data[:12] == V2_SIGNATURE:
        return 2
    if data[:6] == V1_SIGNATURE:
        return 1
    if V2_SIGNATURE.startswith(data) or V1_SIGNATURE.startswith(data):
        return None
    return 0


def parse(data: bytes) -> ProxyHeader | None:
    """The header at the start of `data`, None when more bytes are needed. Raises ProxyProtocolError."""
    version = version_of(data)
    if version is None:
        return None
    if version == 0:
        raise ProxyProtocolError("no PROXY header")
    return _parse_v1(data) if version == 1 else _parse_v2(data)


def _parse_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, _V1_MAX)
    if end < 0:
        if len(data) >= _V1_MAX:
            raise ProxyProtocolError("the line is too long", 1)
        return None
    parts = data[:end].rstrip(b" \t\r\n\v\f").split(b" ")
    size = end + 2
    if len(parts) >= 2 and parts[1] == b"UNKNOWN":
        return ProxyHeader(1, size)
    if len(parts) != 6 or parts[1] not in (b"TCP4", b"TCP6"):
        raise ProxyProtocolError("the line is malformed", 1)
    wanted = 4 if parts[1] == b"TCP4" else 6
    source, destination = _text_address(parts[2], wanted), _text_address(parts[3], wanted)
    return ProxyHeader(1, size, (source, _text_port(parts[4])), (destination, _text_port(parts[5])))


def _text_address(text: bytes, wanted: int) -> str:
    import ipaddress

    try:
        address = ipaddress.ip_address(text.decode("ascii"))
    except ValueError:
        raise ProxyProtocolError("an address is malformed", 1) from None
    if address.version != wanted or b"%" in text:
        raise ProxyProtocolError("an address is not of the family that the line names", 1)
    return _unicast(address, 1)


def _text_port(text: bytes) -> int:
    if not text.isdigit() or len(text) > 5 or int(text) > 65535:
        raise ProxyProtocolError("a port is malformed", 1)
    return int(text)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _V2_HEADER:
        if len(data) > 12 and data[12] >> 4 != 2:
            raise ProxyProtocolError("unsupported version", 2)
        return None
    command, family, transport = data[12] & 15, data[13] >> 4, data[13] & 15
    length = data[14] << 8 | data[15]
    if data[12] >> 4 != 2:
        raise ProxyProtocolError("unsupported version", 2)
    size = _V2_HEADER + length
    if command == _LOCAL:
        return ProxyHeader(2, size) if len(data) >= size else None
    if command != _PROXY or transport not in (1, 2) or family not in _ADDRESS_SIZES:
        raise ProxyProtocolError("unsupported command, address family or transport", 2)
    addresses = _ADDRESS_SIZES[family]
    if length < addresses:
        raise ProxyProtocolError("too short for its addresses", 2)
    if len(data) < size:
        return None
    import ipaddress

    half = (addresses - 4) // 2
    at = _V2_HEADER
    source = _unicast(ipaddress.ip_address(data[at : at + half]), 2)
    destination = _unicast(ipaddress.ip_address(data[at + half : at + 2 * half]), 2)
    ports = data[at + 2 * half : at + addresses]
    tlvs = _parse_tlvs(data[at + addresses : size])
    return ProxyHeader(2, size, (source, ports[0] << 8 | ports[1]), (destination, ports[2] << 8 | ports[3]), tlvs)


def _parse_tlvs(data: bytes) -> tuple[tuple[int, bytes], ...]:
    """Never reads past `data`, whatever the lengths inside claim (CVE-2026-47692)."""
    tlvs = []
    at = 0
    while at < len(data):
        value = at + 3
        if value > len(data):
            raise ProxyProtocolError("an extension has no length", 2)
        end = value + (data[at + 1] << 8 | data[at + 2])
        if end > len(data):
            raise ProxyProtocolError("an extension is cut short", 2)
        tlvs.append((data[at], data[value:end]))
        at = end
    return tuple(tlvs)


def _unicast(address: ipaddress.IPv4Address | ipaddress.IPv6Address, version: int) -> str:
    if address.is_multicast or address.is_unspecified or (address.version == 4 and int(address) == 0xFFFFFFFF):
        raise ProxyProtocolError("an address is not unicast", version)
    return str(address)


# --- writing


def write_v1(source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """The line for a connection from `source` to `destination`, each an IP and a port; the source's family is the line's, as with Envoy."""
    family = 6 if ":" in source[0] else 4
    return f"PROXY TCP{family} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n".encode("ascii")


def write_v2(source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """The binary header for the same; LOCAL if the two are not of one family, since it could not be said."""
    import ipaddress

    ends = [ipaddress.ip_address(ip.partition("%")[0]) for ip, _ in (source, destination)]
    if ends[0].version != ends[1].version:
        return write_local()
    addresses = b"".join(one.packed for one in ends) + source[1].to_bytes(2, "big") + destination[1].to_bytes(2, "big")
    return V2_SIGNATURE + bytes((0x20 | _PROXY, 0x11 if ends[0].version == 4 else 0x21)) + len(addresses).to_bytes(2, "big") + addresses


def write_local() -> bytes:
    """The binary header of a connection that is for nobody."""
    return V2_SIGNATURE + bytes((0x20 | _LOCAL, 0, 0, 0))
