"""Frames: their types and flags, and how they are written (RFC 9113 4 and 6)."""

from __future__ import annotations

from struct import Struct

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
METADATA = 0x4D  # see metadata.py

END_STREAM = ACK = 1
END_HEADERS = 4
PADDED = 8
WITH_PRIORITY = 32

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = range(1, 7)
ENABLE_CONNECT_PROTOCOL = 8

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW = 65535
DEFAULT_FRAME_SIZE = 16384
LARGE = 4096  # bytes of a frame's data from which on a copy costs more than one piece more to write
MAX_WINDOW = (1 << 31) - 1
MAX_STREAM_ID = (1 << 31) - 1

# The head of a frame: length and type in one number (`length << 8 | type`), flags, stream.
_head = Struct(">IBI")
pack_head = _head.pack
unpack_head = _head.unpack_from
# The same by what tells the usual frames from all others at once: whether it is far too large (not 0), length, what it is (`type << 8 | flags`), stream.
unpack_sort = Struct(">BHHI").unpack_from
_setting = Struct(">HI")

SETTINGS_ACK = pack_head(SETTINGS, ACK, 0)


def encode(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A frame of fewer than 2**24 bytes."""
    return pack_head(len(payload) << 8 | kind, flags, stream_id) + payload


class _Heads(dict[int, bytes]):
    """Length -> how the heads of frames of one sort begin, up to the stream; bounded."""

    __slots__ = ("kind",)

    def __init__(self, kind: int, flags: int) -> None:
        super().__init__()
        self.kind = bytes((kind, flags))

    def __missing__(self, length: int) -> bytes:
        if len(self) >= _MAX_HEADS:
            self.clear()
        head = self[length] = length.to_bytes(3, "big") + self.kind
        return head


_MAX_HEADS = 1024
heads_of_whole = _Heads(HEADERS, END_HEADERS | END_STREAM)
heads_of_messages = _Heads(HEADERS, END_HEADERS)
heads_of_last_data = _Heads(DATA, END_STREAM)


def encode_settings(settings: list[tuple[int, int]]) -> bytes:
    """SETTINGS, in order."""
    return encode(SETTINGS, 0, 0, b"".join(_setting.pack(*pair) for pair in settings))


def decode_settings(payload: bytes) -> list[tuple[int, int]]:
    """The settings of a frame whose length is a multiple of six."""
    return list(_setting.iter_unpack(payload))


def encode_window_update(stream_id: int, increment: int) -> bytes:
    """`increment`: 1 to 2**31-1 bytes."""
    return pack_head(4 << 8 | WINDOW_UPDATE, 0, stream_id) + increment.to_bytes(4, "big")


def encode_reset(stream_id: int, code: int) -> bytes:
    """RST_STREAM."""
    return pack_head(4 << 8 | RST_STREAM, 0, stream_id) + code.to_bytes(4, "big")


def encode_goaway(last_stream_id: int, code: int) -> bytes:
    """GOAWAY, without debug data."""
    return pack_head(8 << 8 | GOAWAY, 0, 0) + last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big")
