"""What the parsers of both directions share: options, the buffer, bodies.

Parsers push what they read to their sink:

    on_headers(head, end_stream)     RequestHead or ResponseHead; a response below 200 is informational and another head follows
    on_data(data, end_stream)        never empty unless it ends the message
    on_trailers(trailers)            ends a chunked message that had trailers

and, for what is by far the most common, in one call instead:

    on_known(known_request, body)    a complete request in one piece
    on_whole(known_response, body)   a complete response with a body of known length

A parser stops after each message (`done`) until `next_message()`: what a peer pipelined waits in `buffer`. Anything malformed raises `ProtocolError`
out of `feed` and leaves the parser unusable; no other exception leaves it, and splitting the input differently changes neither the calls (data may be
cut elsewhere) nor the error.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Protocol

from meshproxy.codec.grammar import MAX_LENGTH
from meshproxy.codec.h1.grammar import ProtocolError, parse_header_line, parse_request_line
from meshproxy.codec.h1.response_shapes import ResponseShapes
from meshproxy.codec.h1.shapes import RequestShapes
from meshproxy.codec.headers import Headers

MAX_HEAD_BYTES = 60 * 1024  # Envoy's max_request_headers_kb
MAX_HEADERS = 100  # Envoy's max_headers_count
MAX_CHUNK_LINE_BYTES = 4096  # chunk size and extensions of one chunk; extensions are dropped, so there is no use for long ones

# Where a parser is.
HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILERS, UNTIL_CLOSE, TUNNEL, DONE = range(9)

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?").fullmatch
_LONE_LF = re.compile(rb"(?<!\r)\n").search
# What comes too late in a trailer section, where only some would look (RFC 9110 6.5.1).
_NOT_IN_TRAILERS = frozenset((b"authorization", b"content-length", b"host", b"transfer-encoding"))


class Sink(Protocol):
    """What a parser calls. See the module's docstring."""

    def on_headers(self, head: Any, end_stream: bool) -> None: ...
    def on_data(self, data: bytes, end_stream: bool) -> None: ...
    def on_trailers(self, trailers: Headers) -> None: ...


class Heads(dict[bytes, Any]):
    """The heads seen lately, by their bytes. A full memo is emptied: keeping an order would cost every request something."""

    __slots__ = ("_once", "limit", "max_bytes")

    _MAX_ONCE = 1024

    def __init__(self, limit: int = 256, max_bytes: int = 2048) -> None:
        super().__init__()
        self.limit = limit
        self.max_bytes = max_bytes
        self._once: set[int] = set()

    def is_new(self, head: bytes) -> bool:
        """Whether a head has not been seen lately. Only what comes twice is worth being remembered, and does not have to make room for what never will."""
        number = hash(head)
        once = self._once
        if number in once:
            return False
        if len(once) >= self._MAX_ONCE:
            once.clear()
        once.add(number)
        return True

    def remember(self, head: bytes, known: Any) -> bool:
        """Keep what is known of a head: at most `limit` heads of at most `max_bytes`. Whether it is kept."""
        if len(head) > self.max_bytes or not self.limit:
            return False
        if len(self) >= self.limit:
            self.clear()
        self[head] = known
        return True


class Options:
    """Limits and liberties of a parser, from `Http1ProtocolOptions` and the connection manager. Parsers with the same options share their memo of heads."""

    __slots__ = (
        "absolute_url",
        "accept_http_10",
        "heads",
        "keep_case",
        "keep_reason",
        "max_head_bytes",
        "max_headers",
        "ordinary",
        "proper_else",
        "rejects_underscores",
        "request_line",
        "response_shapes",
        "shapes",
        "trailers",
    )

    def __init__(
        self,
        *,
        max_head_bytes: int = MAX_HEAD_BYTES,
        max_headers: int = MAX_HEADERS,
        absolute_url: bool = True,
        trailers: bool = False,
        keep_case: bool = False,
        keep_reason: bool = False,
        proper_else: bool = False,
        accept_http_10: bool = True,
        any_method: bool = False,
        rejects_underscores: bool = False,
    ) -> None:
        self.max_head_bytes = max_head_bytes
        self.max_headers = max_headers
        self.absolute_url = absolute_url
        self.trailers = trailers
        self.keep_case = keep_case
        self.keep_reason = keep_reason
        self.proper_else = proper_else
        self.rejects_underscores = rejects_underscores
        self.accept_http_10 = accept_http_10
        self.request_line = partial(parse_request_line, any_method=True) if any_method else parse_request_line
        self.heads = Heads(0 if keep_case else 256)
        self.shapes = RequestShapes(max_head_bytes)
        self.response_shapes = ResponseShapes(max_head_bytes)
        self.ordinary = not (keep_case or rejects_underscores)


class Parser:
    """What both directions share: the buffer, and bodies."""

    __slots__ = ("_feeding", "begun", "buffer", "heads", "options", "remaining", "seen", "sink", "state", "trailer_lines")

    def __init__(self, sink: Sink, options: Options) -> None:
        self.sink = sink
        self.options = options
        self.heads = options.heads
        self.state = HEAD
        self.buffer = b""
        self.remaining = 0
        self.begun = False  # of an incomplete head: its first line is complete, and was found right
        self.seen = 0  # of an incomplete head: how far it was looked at, so that a head in small pieces is not looked through for each of them
        self.trailer_lines: list[bytes] = []
        self._feeding = False

    @property
    def done(self) -> bool:
        """Whether a message is complete and `next_message` has not been called since."""
        return self.state == DONE

    def feed(self, data: bytes) -> None:
        """Parse `data`; calls the sink. Raises ProtocolError."""
        if self._feeding or self.state == DONE:
            self.buffer += data
            return
        self._feeding = True
        try:
            if self.buffer:
                data = self.buffer + data
                self.buffer = b""
            while data:
                rest = self._head(data) if self.state == HEAD else self._body(data)
                stuck = len(rest) == len(data)
                data = rest
                if stuck or self.state == DONE:
                    break
            if data:
                self.buffer = data + self.buffer
        finally:
            self._feeding = False

    def next_message(self) -> None:
        """Go on with the next message: parses what is buffered already, unless `feed` is running and will do so itself. Raises ProtocolError."""
        self.state = HEAD
        if self.buffer and not self._feeding:
            self.feed(b"")

    def _head(self, data: bytes) -> bytes:
        raise AssertionError  # replaced by both directions

    def _lines(self, data: bytes) -> tuple[list[bytes], int] | None:
        """The lines of a complete head and where it ends; None when more bytes are needed."""
        seen = self.seen
        end = data.find(b"\r\n\r\n", seen)
        if end < 0 or end > self.options.max_head_bytes:
            if len(data) > self.options.max_head_bytes:
                raise ProtocolError("http1.headers_too_large", 431)
            if _LONE_LF(data, seen) is not None:
                raise ProtocolError("http1.codec_error")
            return None
        if seen:
            self.seen = 0
            self.begun = False
        return data[:end].split(b"\r\n"), end + 4

    def _body(self, data: bytes) -> bytes:
        """Parse body bytes; returns what is left over."""
        state = self.state
        if state == LENGTH:
            left = self.remaining - len(data)
            if left > 0:
                self.remaining = left
                self.sink.on_data(data, False)
                return b""
            rest = data[self.remaining :] if left else b""
            self.state = DONE
            self.sink.on_data(data[: self.remaining] if left else data, True)
            return rest
        if state == UNTIL_CLOSE or state == TUNNEL:
            self.sink.on_data(data, False)
            return b""
        return self._chunked(data)

    def _chunked(self, data: bytes) -> bytes:
        """Chunks up to the end of `data` or of the message."""
        parts: list[bytes] = []
        trailers: Headers | None = None
        try:
            position, ended = self._chunks(data, parts)
            if ended:
                trailers = self._finish_trailers()
        except ProtocolError:
            if parts:  # what came before the error goes on, however the input was cut
                self.sink.on_data(b"".join(parts), False)
            raise
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if not ended:
            if body:
                self.sink.on_data(body, False)
            return data[position:]
        self.state = DONE
        if trailers is None:
            self.sink.on_data(body, True)
        else:
            if body:
                self.sink.on_data(body, False)
            self.sink.on_trailers(trailers)
        return data[position:]

    def _chunks(self, data: bytes, parts: list[bytes]) -> tuple[int, bool]:
        """HOT: collect the content of chunks in `parts`. Returns how much of `data` was used, and whether the message has ended."""
        position = 0
        size = len(data)
        state = self.state
        ended = False
        while position < size:
            if state == CHUNK_DATA:
                end = position + self.remaining
                if end > size:
                    parts.append(data[position:])
                    self.remaining = end - size
                    position = size
                    break
                parts.append(data[position:end])
                position = end
                state = CHUNK_END
            elif state == CHUNK_END:
                crlf = data[position : position + 2]
                if crlf != b"\r\n":
                    if crlf == b"\r":
                        break
                    raise ProtocolError("http1.codec_error")
                position += 2
                state = CHUNK_SIZE
            elif state == CHUNK_SIZE:
                end = data.find(b"\n", position)
                if end < 0:
                    self._check_chunk_line(data, position)
                    break
                line = data[position : end - 1]
                match = _CHUNK_SIZE(line)
                if match is None or data[end - 1 : end] != b"\r" or end - position > MAX_CHUNK_LINE_BYTES:
                    raise ProtocolError("http1.codec_error")
                position = end + 1
                self.remaining = int(match.group(1), 16)
                if self.remaining > MAX_LENGTH:
                    raise ProtocolError("http1.codec_error")
                state = CHUNK_DATA if self.remaining else TRAILERS
            else:  # TRAILERS
                end = data.find(b"\n", position)
                if end < 0:
                    if size - position + sum(map(len, self.trailer_lines)) > self.options.max_head_bytes:
                        raise ProtocolError("http1.trailers_too_large", 431)
                    break
                line = data[position : end - 1]
                if data[end - 1 : end] != b"\r" or (end == position):
                    raise ProtocolError("http1.codec_error")
                position = end + 1
                if not line:
                    ended = True
                    break
                self.trailer_lines.append(line)
                if len(self.trailer_lines) > self.options.max_headers or sum(map(len, self.trailer_lines)) > self.options.max_head_bytes:
                    raise ProtocolError("http1.trailers_too_large", 431)
        self.state = state
        return position, ended

    def _check_chunk_line(self, data: bytes, position: int) -> None:
        """An incomplete chunk-size line must still be able to become one: garbage is refused without waiting for its end."""
        line = data[position:]
        if len(line) > MAX_CHUNK_LINE_BYTES:
            raise ProtocolError("http1.codec_error")
        if line.endswith(b"\r"):
            line = line[:-1]
        line = line.rstrip(b" \t")  # white space may still be followed by an extension
        if line and _CHUNK_SIZE(line) is None:
            raise ProtocolError("http1.codec_error")

    def _finish_trailers(self) -> Headers | None:
        """The trailers, validated even where they are dropped; None when there are none to hand on."""
        lines, self.trailer_lines = self.trailer_lines, []
        if not lines:
            return None
        pairs = [parse_header_line(line) for line in lines]
        if any(name in _NOT_IN_TRAILERS for name, _ in pairs):
            raise ProtocolError("http1.codec_error")
        return Headers(pairs) if self.options.trailers else None
