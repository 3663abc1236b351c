"""What the lines of a head may look like (RFC 9110, RFC 9112): request line, header lines, lengths, lists. Anything else is a `ProtocolError`."""

from __future__ import annotations

import re

from meshproxy.codec.grammar import LENGTH, MAX_LENGTH, TOKEN, VALUE
from meshproxy.codec.h1.header_case import ProperElse
from meshproxy.codec.headers import Headers, Pair

BAD_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search
_TARGET = re.compile(rb"[\x21-\x7e]+").fullmatch
# As `VALUE`, for what is visible.
_VISIBLE = bytes(code if 33 <= code <= 126 else code ^ 64 for code in range(256))
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]").search
_HOST = re.compile(rb"[!$%&'()*+,\-.0-9:;=@A-Z\[\]_a-z~]*").fullmatch
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]").fullmatch
# The methods of IANA's registry and WebDAV that Envoy knows; others only where they are allowed (`allow_custom_methods`).
_METHODS = frozenset(
    b"""ACL BIND CHECKOUT CONNECT COPY DELETE GET HEAD LINK LOCK MERGE MKACTIVITY MKCALENDAR MKCOL MOVE MSEARCH NOTIFY OPTIONS PATCH POST PROPFIND PROPPATCH
    PURGE PUT REBIND REPORT SEARCH SOURCE SUBSCRIBE TRACE UNBIND UNLINK UNLOCK UNSUBSCRIBE""".split(),
)
# Header fields whose values hardly ever repeat: remembering their lines would only push the others out.
_UNIQUE = frozenset((b"x-request-id", b"traceparent", b"tracestate", b"etag", b"x-b3-traceid", b"x-b3-spanid", b"b3", b"idempotency-key"))


class ProtocolError(Exception):
    """The peer broke the protocol. `status` is what a server answers before it closes; `details` is Envoy's response code details."""

    def __init__(self, details: str, status: int = 400) -> None:
        super().__init__(details)
        self.details = details
        self.status = status


def parse_header_line(line: bytes) -> Pair:
    """`Name: value` -> (name in lower case, value), validated."""
    spelt, colon, value = line.partition(b":")
    if not colon or TOKEN(spelt) is None or BAD_IN_VALUE(value) is not None:
        if spelt.lower() == b"host" and _CONTROL(value) is None:
            raise ProtocolError("http.invalid_authority")
        raise ProtocolError("http1.invalid_characters" if _CONTROL(line) is not None else "http1.codec_error")
    name = spelt.lower()
    value = value.strip(b" \t")
    if name == b"host":
        if _HOST(value) is None:
            raise ProtocolError("http.invalid_authority")
    elif len(spelt) <= _MAX_KNOWN_NAME:
        if len(_names) >= _MAX_KNOWN_NAMES:
            _names.clear()
        _names[spelt] = name
    return name, value


# Header names as they came lately -> in lower case. Never Host, whose values are special.
_names: dict[bytes, bytes] = {}
_MAX_KNOWN_NAMES = 512
_MAX_KNOWN_NAME = 64  # bytes


class HeaderLines(dict[bytes, Pair]):
    """Header line -> validated pair, for the lines seen lately.

    A look-up that hits runs without Python code: `map(lines.__getitem__, head_lines)`. Bounded by `limit` entries of at most `max_line` bytes; a full
    memo is emptied, which costs less than keeping an order.
    """

    __slots__ = ("limit", "max_line")

    def __init__(self, limit: int = 2048, max_line: int = 1024) -> None:
        super().__init__()
        self.limit = limit
        self.max_line = max_line

    def __missing__(self, line: bytes) -> Pair:
        # HOT: what `parse_header_line` does for a name that is known, without its call.
        spelt, colon, value = line.partition(b":")
        name = _names.get(spelt)
        if name is None or not colon or value.translate(VALUE) is not value:
            pair = parse_header_line(line)
            name = pair[0]
        else:
            pair = name, value.strip(b" \t")
        if name not in _UNIQUE and len(line) <= self.max_line:
            if len(self) >= self.limit:
                self.clear()
            self[line] = pair
        return pair


# Header line -> validated pair. Shared by all parsers of the process: values are immutable and valid whoever sent them.
header_line = HeaderLines().__getitem__


def parse_request_line(line: bytes, *, any_method: bool = False) -> tuple[bytes, bytes, int]:
    """Request line -> (method, target, version), validated. `any_method`: methods that nobody knows are allowed."""
    parts = line.split(b" ")
    if len(parts) == 3 and parts[2] == b"HTTP/1.1" and parts[0] in _METHODS and parts[1] and parts[1].translate(_VISIBLE) is parts[1]:
        return parts[0], parts[1], 11  # HOT: one C call for the target
    method, target, text = parts if len(parts) == 3 else (parts[0], parts[-1], b"")
    known = TOKEN(method) is not None if any_method else method in _METHODS
    if not known or not 2 <= len(parts) <= 3 or _TARGET(target) is None or (text and _VERSION(text) is None):
        control = _CONTROL(line) is not None and TOKEN(line[:1]) is not None
        raise ProtocolError("http1.invalid_characters" if control else "http1.codec_error")
    if text == b"HTTP/1.1":
        return method, target, 11
    if text == b"HTTP/1.0":
        return method, target, 10
    raise ProtocolError("low_version", 426)


def spelling(lines: list[bytes], *, proper_else: bool = False) -> dict[bytes, bytes]:
    """Lower-case name -> name as it came; of several spellings the first. `proper_else`: asked for another, it gives `Proper-Case`."""
    found = {name.lower(): name for name in (line.partition(b":")[0] for line in reversed(lines))}
    return ProperElse(found) if proper_else else found


def connection_tokens(head: Headers) -> set[bytes]:
    """The options of Connection (and the old Proxy-Connection), in lower case."""
    tokens: set[bytes] = set()
    for name in (b"connection", b"proxy-connection"):
        for value in head.get_all(name):
            tokens.update(token.strip(b" \t").lower() for token in value.split(b","))
    return tokens


def content_length(head: Headers) -> int:
    """The body's length: one field, digits only, below 2^63. Raises ProtocolError."""
    values = head.get_all(b"content-length")
    if len(values) != 1 or LENGTH(values[0]) is None:
        raise ProtocolError("http1.codec_error")
    length = int(values[0])
    if length > MAX_LENGTH:
        raise ProtocolError("http1.codec_error")
    return length
