"""What both sides of HPACK share: the static table (RFC 7541 appendix A), integers, errors."""

from __future__ import annotations

from meshproxy.codec.headers import Pair

ENTRY_OVERHEAD = 32  # bytes that a field counts for besides its name and value (section 4.1)
DEFAULT_TABLE_SIZE = 4096  # SETTINGS_HEADER_TABLE_SIZE before either side says otherwise

_VALUES = {
    b":method": (b"GET", b"POST"),
    b":path": (b"/", b"/index.html"),
    b":scheme": (b"http", b"https"),
    b":status": (b"200", b"204", b"206", b"304", b"400", b"404", b"500"),
    b"accept-encoding": (b"gzip, deflate",),
}
_NAMES = b""":authority :method :path :scheme :status accept-charset accept-encoding accept-language accept-ranges accept access-control-allow-origin age allow
    authorization cache-control content-disposition content-encoding content-language content-length content-location content-range content-type cookie date
    etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since last-modified link location max-forwards
    proxy-authenticate proxy-authorization range referer refresh retry-after server set-cookie strict-transport-security transfer-encoding user-agent vary via
    www-authenticate""".split()

# The static table, by index: 1 is the first, 0 stands for none. What comes after it is the dynamic table.
STATIC: tuple[Pair, ...] = ((b"", b""), *((name, value) for name in _NAMES for value in _VALUES.get(name, (b"",))))
FIRST_DYNAMIC = len(STATIC)  # 62
NEWEST = 0x80 + FIRST_DYNAMIC  # where a decoder's table has the newest entry: by the byte that references it

STATIC_PAIRS: dict[Pair, int] = {pair: index for index, pair in enumerate(STATIC) if index}
STATIC_NAMES: dict[bytes, int] = {pair[0]: index for pair, index in reversed(STATIC_PAIRS.items())}

# Fields whose values hardly ever come twice: nobody remembers them.
UNIQUE = frozenset(
    b"""x-request-id traceparent tracestate b3 x-b3-traceid x-b3-spanid x-b3-parentspanid x-cloud-trace-context x-amzn-trace-id x-datadog-trace-id
    x-datadog-parent-id grpc-trace-bin x-ot-span-context x-client-trace-id uber-trace-id idempotency-key""".split(),
)

# Fields that belong to nobody else: where the encoder may not index them, peers do not either, and send the same ones all the time.
CREDENTIALS = frozenset((b"authorization", b"cookie"))


class HpackError(Exception):
    """A header block that is malformed, so that the two sides' tables are no longer the same: the connection's COMPRESSION_ERROR."""


def encode_integer(value: int, bits: int, first: int) -> bytes:
    """An integer with a prefix of `bits` bits in a byte whose other bits are those of `first` (section 5.1)."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    encoded = bytearray((first | most,))
    value -= most
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def decode_rest(block: bytes, position: int, most: int) -> tuple[int, int]:
    """The rest of an integer whose prefix was all ones, `most`: (value, position after it).

    Five more bytes at the most: no size or index needs more. Raises IndexError at the end of the block.
    """
    shift = 0
    while True:
        byte = block[position]
        position += 1
        most += (byte & 127) << shift
        if byte < 128:
            return most, position
        shift += 7
        if shift == 35:
            raise HpackError("integer too long")
