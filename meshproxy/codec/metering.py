"""Bytes of messages on the wire, counted as Envoy's HTTP/1 codec does: for logs that ask for them.

Counting costs every message a second look at its head, so connections are only metered where a configured log names such a value (`METERED`).
"""

from __future__ import annotations

import re
from typing import Any

from meshproxy.codec.h1.grammar import ProtocolError, parse_header_line

# The log commands that need metered connections, in a logger's configuration as bytes.
METERED = re.compile(rb"STREAM_(?:WIRE|(?:DECOMPRESSED_)?HEADER)_BYTES_|US_RX_BODY_BEG|ROUTE_RESOLUTION_TIME_US").search

_PER_FIELD = 3  # Envoy's parser does not tell of the space after the colon
_INFORMATIONAL = re.compile(rb"HTTP/1\.[01] 1(?!01)[0-9][0-9]").match


class HeadMeter:
    """Finds the head of a message in what comes over a connection. `rest`: what came with the head and after it."""

    __slots__ = ("_head", "complete", "rest")

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Another message begins."""
        self._head = self.rest = b""
        self.complete = False

    def feed(self, data: bytes) -> list[int]:
        """What the fields of the heads take that end in `data`; only informational responses are followed by another head."""
        sizes: list[int] = []
        data = self._head + data
        while not self.complete:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return sizes
            head, data = data[:end], data[end + 4 :]
            sizes.append(_received(head))
            if _INFORMATIONAL(head) is None:
                self.complete = True
                self.rest = data
        self._head = b""
        return sizes


def _received(head: bytes) -> int:
    first, *lines = head.split(b"\r\n")
    if b"HTTP/1." not in first:  # no message
        return 0
    try:
        return sum([len(name) + len(value) + _PER_FIELD for name, value in map(parse_header_line, lines)]) or _PER_FIELD
    except ProtocolError:  # refused before its fields are counted
        return 0


def sent_fields(message: bytes) -> int:
    """What the lines of the fields take in a message that goes out, whose head is complete."""
    start = message.find(b"\r\n") + 2
    return message.find(b"\r\n\r\n", start - 2) + 2 - start


class CountingTransport:
    """Stands before a transport and counts what is written to it."""

    __slots__ = ("_transport", "written")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.written = 0

    def write(self, data: bytes) -> None:
        """Pass `data` on."""
        self.written += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
