"""gRPC over HTTP: statuses and what they mean in HTTP, the encodings of its headers, and the framing of its messages.

Sources: grpc/grpc doc/PROTOCOL-HTTP2.md, doc/http-grpc-status-mapping.md; the tables are those of Envoy's source/common/grpc/status.cc.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshproxy.codec.headers import Headers

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED = range(9)
FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = range(9, 17)
INVALID = -1  # in place of a status that is none

# Names by status, as Envoy's %GRPC_STATUS% writes them.
NAMES = (
    "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists", "PermissionDenied", "ResourceExhausted",
    "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated",
)  # fmt: skip
SNAKE_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip

_OF_HTTP = {400: INTERNAL, 401: UNAUTHENTICATED, 403: PERMISSION_DENIED, 404: UNIMPLEMENTED, **dict.fromkeys((429, 502, 503, 504), UNAVAILABLE)}
_AS_HTTP = (200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401)

CONTENT_TYPE = b"application/grpc"


def status_of_http(status: int) -> int:
    """The gRPC status that an HTTP status stands for, where the response has none of its own."""
    return _OF_HTTP.get(status, UNKNOWN)


def http_of_status(status: int) -> int:
    """The HTTP status that stands for a gRPC status, for those who judge by HTTP statuses (outlier detection, statistics)."""
    return _AS_HTTP[status] if 0 <= status < len(_AS_HTTP) else 500


def status_of(headers: Headers | None) -> int | None:
    """`grpc-status` of a head or trailers; None when there is none, INVALID when it is not a number."""
    value = None if headers is None else headers.get(b"grpc-status")
    if not value:
        return None
    return int(value) if value.isdigit() and len(value) < 10 else INVALID  # Python refuses to read some thousands of digits


def is_content_type(value: bytes | None) -> bool:
    """Whether a content type is gRPC: alone, or with `+` and a format. `application/grpc-web` is something else."""
    return value is not None and value.startswith(CONTENT_TYPE) and value[16:17] in (b"", b"+")


def method_of(path: bytes) -> tuple[str, str] | None:
    """Service and method of a `:path`; None when it does not have exactly these two parts."""
    parts = [part for part in path.partition(b"?")[0].split(b"/") if part]
    return (parts[0].decode("latin-1"), parts[1].decode("latin-1")) if len(parts) == 2 else None


# -- grpc-message

_UNSAFE = re.compile(rb"[^ -$&-}]")  # Envoy escapes the tilde as well
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


def encode_message(text: bytes) -> bytes:
    """UTF-8 text as the value of a `grpc-message` header."""
    return _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], text)


def decode_message(value: bytes) -> bytes:
    """The text of a `grpc-message` header. What is no escape stays as it is: a message is never worth losing."""
    return _ESCAPE.sub(lambda found: bytes((int(found[1], 16),)), value)


# -- grpc-timeout

_MAX_TIMEOUT = 99_999_999
_UNITS_NS = {b"H": 3_600_000_000_000, b"M": 60_000_000_000, b"S": 1_000_000_000, b"m": 1_000_000, b"u": 1_000, b"n": 1}
_WHOLE = re.compile(rb"\s*(?:\+?0*([0-9]{1,9})|-0+)\s*")  # as absl::SimpleAtoi reads numbers


def parse_timeout(value: bytes | None) -> int | None:
    """A `grpc-timeout` header in milliseconds, rounded up; None when there is none, or none that is valid."""
    if not value:
        return None
    number, unit = _WHOLE.fullmatch(value[:-1]), _UNITS_NS.get(value[-1:])
    if number is None or unit is None:
        return None
    count = int(number[1] or 0)
    return None if count > _MAX_TIMEOUT else -(-count * unit // 1_000_000)


def format_timeout(milliseconds: int) -> bytes:
    """A `grpc-timeout` header: at most eight digits, in the finest unit that they fit."""
    value, units = milliseconds, b"mSMH"
    position = 0
    if value > _MAX_TIMEOUT:
        value //= 1000
        position = 1
    while value > _MAX_TIMEOUT:
        if position == 3:
            value = _MAX_TIMEOUT
        else:
            value //= 60
            position += 1
    return b"%d%c" % (value, units[position])


# -- messages: a flag byte (1: compressed), the length in four bytes, the message

PREFIX = 5
COMPRESSED = 1


class FramingError(Exception):
    """The peer broke the framing. `status` is the gRPC status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def frame(message: bytes, flags: int = 0) -> bytes:
    """A message with its prefix."""
    return b"%c%b%b" % (flags, len(message).to_bytes(4, "big"), message)


class MessageCounter:
    """Counts the messages of a byte stream as they begin, whatever their flags. `count`: so far."""

    __slots__ = ("_left", "_prefix", "count")

    def __init__(self) -> None:
        self.count = 0
        self._prefix = b""  # of a message whose length is not complete
        self._left = 0  # bytes of a message that are still to come

    def feed(self, data: bytes) -> int:
        """Take more of the stream; how many messages begin in it."""
        before = self.count
        position = self._left
        end = len(data)
        if position >= end:
            self._left -= end
            return 0
        if self._prefix:
            data = self._prefix + data
            end = len(data)
            self.count -= 1  # it is seen again
            self._prefix = b""
        while position < end:
            self.count += 1
            if end - position < PREFIX:
                self._prefix = data[position:]
                self._left = 0
                return self.count - before
            position += PREFIX + int.from_bytes(data[position + 1 : position + PREFIX], "big")
        self._left = position - end
        return self.count - before


class MessageDecoder:
    """Cuts a byte stream into messages: pairs of flags and message.

    At most one message is kept, of at most `limit` bytes; a longer one is refused when its length is known. 0: no limit.
    """

    __slots__ = ("_buffer", "_wanted", "limit")

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._wanted = PREFIX  # below this there is nothing to be had from the buffer

    @property
    def between(self) -> bool:
        """Whether the stream may end here."""
        return not self._buffer

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take more of the stream; the messages that are complete now. Raises FramingError; then the stream is lost."""
        buffer = self._buffer
        buffer += data
        end = len(buffer)
        if end < self._wanted:
            return []
        messages = []
        position = 0
        wanted = PREFIX
        while end - position >= PREFIX:
            flags = buffer[position]
            if flags & ~COMPRESSED:
                raise FramingError(INTERNAL, f"unknown flags {flags:#04x} in a gRPC message")
            length = int.from_bytes(buffer[position + 1 : position + PREFIX], "big")
            if self.limit and length > self.limit:
                raise FramingError(RESOURCE_EXHAUSTED, f"a gRPC message of {length} bytes is over the limit of {self.limit}")
            wanted = PREFIX + length
            if end - position < wanted:
                break
            messages.append((flags, bytes(buffer[position + PREFIX : position + wanted])))
            position += wanted
            wanted = PREFIX
        del buffer[:position]
        self._wanted = wanted
        return messages
