"""HTTP/2 frames as the load generator and the small service need them: both know what they send, and trust what they get no further than they must."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
NO_ERROR, CANCEL = 0, 8
WINDOW = (1 << 31) - 1  # the largest
FIRST_WINDOW = 65535
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4  # settings
_head = Struct(">BHBBI")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame; `payload` must fit into it."""
    return _head.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def hello(settings: dict[int, int]) -> bytes:
    """SETTINGS with the largest window for every stream, and the same for the connection."""
    entries = {INITIAL_WINDOW_SIZE: WINDOW, **settings}.items()
    payload = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in entries)
    return frame(SETTINGS, 0, 0, payload) + window_update(0, WINDOW - FIRST_WINDOW)


def window_update(stream: int, size: int) -> bytes:
    """WINDOW_UPDATE; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


class Reader:
    """Cuts what arrives into frames."""

    __slots__ = ("_received",)

    def __init__(self) -> None:
        self._received = b""

    def frames(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, stream, payload) of each frame that is complete with `data`. To be read to the end."""
        if self._received:
            data = self._received + data
        position, size = 0, len(data)
        while size - position >= 9:
            high, low, kind, flags, stream = _head.unpack_from(data, position)
            end = position + 9 + (high << 16 | low)
            if end > size:
                break
            yield kind, flags, stream, data[position + 9 : end]
            position = end
        self._received = data[position:]
