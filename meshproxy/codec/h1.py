"""HTTP/1.1 on the wire (RFC 9112), sans-IO: bytes in, calls on a sink out; `encode_*` return bytes.

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

Strict on purpose. No message passes that two parsers could read differently: one framing header at the most, digits only, CRLF only, no white space
before a colon, no folding. Each distinct header line is validated once and remembered (`HeaderLines`), which is what makes strictness cheap.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Protocol

from meshproxy.codec.headers import Headers, Pair, RequestHead, ResponseHead, SpeltRequestHead, SpeltResponseHead

MAX_HEAD_BYTES = 60 * 1024  # Envoy's max_request_headers_kb
MAX_HEADERS = 100  # Envoy's max_headers_count
MAX_CHUNK_LINE_BYTES = 4096  # chunk size and extensions of one chunk; extensions are dropped, so there is no use for long ones

# Where a parser is.
HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILERS, UNTIL_CLOSE, TUNNEL, DONE = range(9)

_EMPTY_LINES = re.compile(rb"(?:\r\n)*").match
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_BAD_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search
_TARGET = re.compile(rb"[\x21-\x7e]+").fullmatch
# Tables that change bad bytes and leave the others: `value.translate(table) is value` says that there are none, in a third of the time of the regex.
_VALUE = bytes(code if code == 9 or 32 <= code != 127 else code ^ 64 for code in range(256))
_VISIBLE = bytes(code if 33 <= code <= 126 else code ^ 64 for code in range(256))
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]").search
_HOST = re.compile(rb"[!$%&'()*+,\-.0-9:;=@A-Z\[\]_a-z~]*").fullmatch
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]").fullmatch
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,18}").fullmatch  # no leading zeros: some read them as octal
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?").fullmatch
_ABSOLUTE = re.compile(rb"([A-Za-z]+)://([!$%&'()*+,\-.0-9:;=@A-Z\[\]_a-z~]*)([/?].*)?").fullmatch
_AUTHORITY = re.compile(rb"(?:[\-.0-9A-Za-z]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?").fullmatch
# The methods of IANA's registry and WebDAV that Envoy knows; others only where they are allowed (`allow_custom_methods`).
_METHODS = frozenset(
    b"""ACL BIND CHECKOUT CONNECT COPY DELETE GET HEAD LINK LOCK MERGE MKACTIVITY MKCALENDAR MKCOL MOVE MSEARCH NOTIFY OPTIONS PATCH POST PROPFIND PROPPATCH
    PURGE PUT REBIND REPORT SEARCH SOURCE SUBSCRIBE TRACE UNBIND UNLINK UNLOCK UNSUBSCRIBE""".split(),
)
# What no Connection header may name: it would have a proxy remove what routing and trust stand on.
_NOT_HOP_BY_HOP = frozenset((b"host", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"))
_MAX_CONNECTION_TOKENS = 9
# What comes too late in a trailer section, where only some would look (RFC 9110 6.5.1).
_NOT_IN_TRAILERS = frozenset((b"authorization", b"content-length", b"host", b"transfer-encoding"))
_LINE_END = frozenset(b"\r\n")
_LONE_LF = re.compile(rb"(?<!\r)\n").search
_MAX_LENGTH = (1 << 63) - 1

# Header names that change how a message is framed or connected; a head without any of them takes the short way.
_FRAMING = frozenset(
    (b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"keep-alive", b"proxy-connection", b"te", b"expect", b"http2-settings")
)
_KEEP_ALIVE = frozenset((b"keep-alive", b"Keep-Alive"))
_OTHER_FRAMING = _FRAMING - {b"content-length"}
_FRAMING_RESPONSE = frozenset((b"connection", b"transfer-encoding", b"keep-alive", b"proxy-connection", b"upgrade"))
_NO_BODY = frozenset((b"HEAD", b"CONNECT"))
# Header fields whose values hardly ever repeat: remembering their lines would only push the others out.
_UNIQUE = frozenset((b"x-request-id", b"traceparent", b"tracestate", b"etag", b"x-b3-traceid", b"x-b3-spanid", b"b3", b"idempotency-key"))


class ProtocolError(Exception):
    """The peer broke the protocol. `status` is what a server answers before it closes; `details` is Envoy's response code details."""

    def __init__(self, details: str, status: int = 400) -> None:
        super().__init__(details)
        self.details = details
        self.status = status


class Sink(Protocol):
    """What a parser calls. See the module's docstring."""

    def on_headers(self, head: Any, end_stream: bool) -> None: ...
    def on_data(self, data: bytes, end_stream: bool) -> None: ...
    def on_trailers(self, trailers: Headers) -> None: ...


class RequestSink(Sink, Protocol):
    """What a RequestParser calls."""

    def on_known(self, known: KnownRequest, body: bytes) -> None: ...


class ResponseSink(Sink, Protocol):
    """What a ResponseParser calls."""

    def on_whole(self, known: KnownResponse, body: bytes) -> None: ...


def parse_header_line(line: bytes) -> Pair:
    """`Name: value` -> (name in lower case, value), validated."""
    spelt, colon, value = line.partition(b":")
    if not colon or _TOKEN(spelt) is None or _BAD_IN_VALUE(value) is not None:
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
        if name is None or not colon or value.translate(_VALUE) is not value:
            pair = parse_header_line(line)
            name = pair[0]
        else:
            pair = name, value.strip(b" \t")
        if name not in _UNIQUE and len(line) <= self.max_line:
            if len(self) >= self.limit:
                self.clear()
            self[line] = pair
        return pair


def parse_request_line(line: bytes, *, any_method: bool = False) -> tuple[bytes, bytes, int]:
    """Request line -> (method, target, version), validated. `any_method`: methods that nobody knows are allowed."""
    parts = line.split(b" ")
    if len(parts) == 3 and parts[2] == b"HTTP/1.1" and parts[0] in _METHODS and parts[1] and parts[1].translate(_VISIBLE) is parts[1]:
        return parts[0], parts[1], 11  # HOT: one C call for the target
    method, target, text = parts if len(parts) == 3 else (parts[0], parts[-1], b"")
    known = _TOKEN(method) is not None if any_method else method in _METHODS
    if not known or not 2 <= len(parts) <= 3 or _TARGET(target) is None or (text and _VERSION(text) is None):
        control = _CONTROL(line) is not None and _TOKEN(line[:1]) is not None
        raise ProtocolError("http1.invalid_characters" if control else "http1.codec_error")
    if text == b"HTTP/1.1":
        return method, target, 11
    if text == b"HTTP/1.0":
        return method, target, 10
    raise ProtocolError("low_version", 426)


class StatusLines(dict[bytes, tuple[int, bytes, int]]):
    """Status line -> (version, reason, status), validated; bounded."""

    __slots__ = ()

    def __missing__(self, line: bytes) -> tuple[int, bytes, int]:
        version, _, rest = line.partition(b" ")
        code, _, reason = rest.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(code) != 3 or not code.isdigit() or _BAD_IN_VALUE(reason) is not None or code < b"100":
            raise ProtocolError("http1.codec_error")
        result = 11 if version == b"HTTP/1.1" else 10, reason, int(code)
        if len(line) <= 256:
            if len(self) >= 256:
                self.clear()
            self[line] = result
        return result


# Shared by all parsers of the process: values are immutable and valid whoever sent them.
_header_lines = HeaderLines()
_status_lines = StatusLines()
_header_line = _header_lines.__getitem__
_status_line = _status_lines.__getitem__


# Fields whose repeated lines Envoy joins with a comma, at the place of the first one; the others stay lines of their own.
_JOINED_IN_REQUESTS = frozenset(
    b"""accept accept-encoding access-control-request-headers access-control-request-method authorization cache-control content-encoding content-type expect
    grpc-accept-encoding grpc-timeout if-match if-modified-since if-none-match if-range if-unmodified-since origin pragma proxy-status referer te user-agent via
    x-client-trace-id x-envoy-attempt-count x-envoy-decorator-operation x-envoy-downstream-service-cluster x-envoy-downstream-service-node
    x-envoy-external-address x-envoy-force-trace x-envoy-ip-tags x-envoy-max-retries x-envoy-original-host x-envoy-original-path x-envoy-original-url
    x-envoy-retry-on x-forwarded-client-cert x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-proto x-request-id""".split(),
)
_JOINED_IN_RESPONSES = frozenset(
    b"""access-control-allow-credentials access-control-allow-headers access-control-allow-methods access-control-allow-origin access-control-expose-headers
    access-control-max-age age cache-control content-encoding content-type date etag expires grpc-message grpc-status last-modified location proxy-status
    server vary via x-envoy-attempt-count x-envoy-decorator-operation x-envoy-degraded x-envoy-immediate-health-check-fail x-envoy-ratelimited
    x-envoy-upstream-canary x-envoy-upstream-healthchecked-cluster x-request-id""".split(),
)


def _spelling(lines: list[bytes]) -> dict[bytes, bytes]:
    """Lower-case name -> name as it came; of several spellings the first."""
    return {name.lower(): name for name in (line.partition(b":")[0] for line in reversed(lines))}


def _join_repeated(items: list[Pair], names: frozenset[bytes]) -> list[Pair]:
    joined: list[Pair] = []
    places: dict[bytes, int] = {}
    for pair in items:
        name = pair[0]
        if name in names:
            place = places.get(name)
            if place is not None:
                joined[place] = name, joined[place][1] + b"," + pair[1]
                continue
            places[name] = len(joined)
        joined.append(pair)
    return joined


class KnownRequest:
    """A head that asks nothing of the connection, parsed: what `RequestParser` remembers by the head's bytes.

    `items` and `index` are never changed while it is `kept`; `head` gives each request its own. `size` is the head's length on the wire. `plain` and `plans`
    belong to the sink, which may keep there what it concluded from the head.
    """

    __slots__ = ("authority", "index", "items", "kept", "method", "path", "plain", "plans", "scheme", "size")

    def __init__(self, method: bytes, path: bytes, authority: bytes, items: list[Pair], index: dict[bytes, bytes], size: int, scheme: bytes = b"http") -> None:
        self.method = method
        self.path = path
        self.authority = authority
        self.items = items
        self.index = index
        self.size = size
        self.scheme = scheme
        self.kept = False
        self.plain: bool | None = None
        self.plans: dict[Any, Any] = NO_PLANS

    def head(self) -> RequestHead:
        """The head for one request. The first time that a head is seen there is only one, and nothing is copied."""
        if self.kept:
            return RequestHead(self.method, self.path, self.authority, self.items.copy(), self.index.copy(), scheme=self.scheme)
        return RequestHead(self.method, self.path, self.authority, self.items, self.index, scheme=self.scheme)


NO_PLANS: dict[Any, Any] = {}  # of all heads that have no plans of their own; stays empty


class KnownResponse:
    """A response's head with a content length and nothing else that matters for framing, parsed. `items` and `index` are never changed.

    `size`: the head's length on the wire; `length`: the body's.
    """

    __slots__ = ("index", "items", "length", "reason", "size", "status")

    def __init__(self, head: ResponseHead, length: int, size: int) -> None:
        self.size = size
        assert head._index is not None
        self.status = head.status
        self.reason = head.reason
        self.items = head.items.copy()
        self.index = head._index.copy()
        self.length = length


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
        "max_head_bytes",
        "max_headers",
        "ordinary",
        "rejects_underscores",
        "request_line",
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
        accept_http_10: bool = True,
        any_method: bool = False,
        rejects_underscores: bool = False,
    ) -> None:
        self.max_head_bytes = max_head_bytes
        self.max_headers = max_headers
        self.absolute_url = absolute_url
        self.trailers = trailers
        self.keep_case = keep_case
        self.rejects_underscores = rejects_underscores
        self.accept_http_10 = accept_http_10
        self.request_line = partial(parse_request_line, any_method=True) if any_method else parse_request_line
        self.heads = Heads(0 if keep_case else 256)
        self.ordinary = not (keep_case or rejects_underscores)


class _Parser:
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
                if self.remaining > _MAX_LENGTH:
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


class RequestParser(_Parser):
    """The server side. After `on_headers`, `keep_alive`, `expect_continue` and `upgrade` tell what the head asked of the connection.

    A whole HTTP/1.1 request that asks nothing of the connection, without a body or with one of known length that came with its head, comes as
    `sink.on_known(KnownRequest, body)` in place of `on_headers` and `on_data`: the connection stays, the message is complete, and the next one may be a
    repetition that is not parsed at all.
    """

    __slots__ = ("expect_continue", "keep_alive", "upgrade")

    sink: RequestSink

    def __init__(self, sink: RequestSink, options: Options) -> None:
        super().__init__(sink, options)
        self.keep_alive = True
        self.expect_continue = False
        self.upgrade: bytes | None = None

    def feed(self, data: bytes) -> None:
        # HOT: a client that sends one request at a time, and often repeats itself.
        if self.state != HEAD or self.buffer or self._feeding or not data:
            _Parser.feed(self, data)
            return
        known = self.heads.get(data)
        if known is not None:
            self.state = DONE
            self.sink.on_known(known, b"")
            return
        self._feeding = True
        try:
            rest = self._head(data)
        finally:
            self._feeding = False
        if rest:
            self.buffer = rest + self.buffer
            if self.state != DONE and len(rest) != len(data):
                _Parser.feed(self, b"")

    def _head(self, data: bytes) -> bytes:
        if data[0] in _LINE_END:
            # RFC 9112 2.2: an empty line before a request line is ignored; some clients send one after a body.
            if data[:2] == b"\r\n":
                return data[_EMPTY_LINES(data).end() :]  # type: ignore[union-attr]
            if data != b"\r":
                raise ProtocolError("http1.codec_error")
            return data
        found = self._lines(data)
        if found is None:
            self._check_beginning(data)
            self.seen = max(len(data) - 3, 0)
            return data
        lines, end = found
        options = self.options
        method, target, version = options.request_line(lines[0])
        if version == 10 and not options.accept_http_10:
            raise ProtocolError("low_version", 426)
        del lines[0]
        if len(lines) > options.max_headers:
            raise ProtocolError("http1.too_many_headers", 431)
        items = [*map(_header_line, lines)]
        index = dict(items)
        if version == 11 and index.get(b"connection") in _KEEP_ALIVE and len(index) == len(items):
            # What HTTP/1.1 means anyway; many clients say it all the same. It goes no further than here in any case.
            del index[b"connection"]
            items = [pair for pair in items if pair[0] != b"connection"]
        if (
            version == 11
            and len(index) == len(items)
            and items
            and items[0][0] == b"host"
            and target[0] == 47  # "/"
            and options.ordinary
            and _OTHER_FRAMING.isdisjoint(index)
            and method != b"CONNECT"
        ):
            # HOT: what by far the most requests look like.
            length = index.get(b"content-length")
            if length is None:
                size = 0
            elif length.isdigit() and len(length) < 8 and length[0] != 48:  # "0"; what is unusual about it is looked at below
                size = int(length)
            else:
                size = _MAX_LENGTH
            rest = end + size
            if rest <= len(data):
                del items[0]
                self.keep_alive = True
                self.expect_continue = False
                self.upgrade = None
                self.state = DONE
                known = KnownRequest(method, target, index.pop(b"host"), items, index, end)
                if size:
                    self.sink.on_known(known, data[end:rest])
                else:
                    self._bodiless(known, data, end)
                return data[rest:]
        if options.rejects_underscores and any(b"_" in name for name in index):
            raise ProtocolError("http1.unexpected_underscore")
        # -- the authority: Host, unless the target is absolute
        host = index.pop(b"host", b"")
        repeated = len(index) + (1 if host else 0) != len(items)
        if host or repeated:
            if items and items[0][0] == b"host" and not repeated:
                del items[0]
            else:
                items = self._without_host(items, host)
        if repeated:
            items = _join_repeated(items, _JOINED_IN_REQUESTS)
            index = dict(reversed(items))
        if options.keep_case:
            head: RequestHead = SpeltRequestHead(method, target, host, items, version=version)
            head.case = _spelling(lines)  # type: ignore[misc]  # a Spelt one
        else:
            head = RequestHead(method, target, host, items, version=version)
        head._index = index
        if target[0] != 47 or method == b"CONNECT":  # "/"
            self._other_form(head)
        # -- what the head asks of the connection, and how the body is framed
        if _FRAMING.isdisjoint(index):
            self.keep_alive = version == 11
            self.expect_continue = False
            self.upgrade = None
            if method != b"CONNECT":
                self.state = DONE
                if version == 11 and head.case is None:
                    self._bodiless(KnownRequest(method, head.path, head.authority, items, index, end, head.scheme), data, end)
                else:
                    self.sink.on_headers(head, True)
            else:
                self.state = TUNNEL
                self.sink.on_headers(head, False)
            return data[end:]
        end_stream = self._framing(head, index)
        self.sink.on_headers(head, end_stream)
        return data[end:]

    def _bodiless(self, known: KnownRequest, data: bytes, end: int) -> None:
        """A whole request that asks nothing of the connection."""
        if end != len(data):
            data = data[:end]
        heads = self.heads
        if not heads.is_new(data):
            known.kept = heads.remember(data, known)
        self.sink.on_known(known, b"")

    def _check_beginning(self, data: bytes) -> None:
        """An incomplete head must still be able to become one: what is no HTTP is refused without waiting for more."""
        if self.begun:
            return
        end = data.find(b"\r\n", self.seen)
        if end >= 0:
            self.options.request_line(data[:end])
            self.begun = True
        elif _TOKEN(data[:1]) is None:
            raise ProtocolError("http1.codec_error")

    @staticmethod
    def _without_host(items: list[Pair], host: bytes) -> list[Pair]:
        kept = [pair for pair in items if pair[0] != b"host"]
        # RFC 9112 3.2: more than one Host line is an error, even with equal values; Envoy joins them, which two parsers read differently.
        if len(items) - len(kept) > 1:
            raise ProtocolError("http1.codec_error")
        return kept

    def _other_form(self, head: RequestHead) -> None:
        """Absolute-form, authority-form and asterisk-form targets (RFC 9112 3.2)."""
        target = head.path
        if head.method == b"CONNECT":
            match = _AUTHORITY(target)
            if match is None or match[1] is None or int(match[1]) > 65535:
                raise ProtocolError("http1.invalid_url")
            head.authority = target
            head.path = b""
            return
        if target[:1] == b"*":
            if head.method != b"OPTIONS":
                raise ProtocolError("http1.invalid_url")
            return
        match = _ABSOLUTE(target)
        if match is None:
            raise ProtocolError("http1.codec_error")
        if not self.options.absolute_url:
            return
        scheme, authority, path = match.groups()
        scheme = scheme.lower()
        if scheme not in (b"http", b"https"):
            raise ProtocolError("http1.invalid_scheme")
        # User names in a target are an error (RFC 9110 4.2.4): they are there to deceive.
        match = _AUTHORITY(authority)
        if match is None or (match[1] is not None and int(match[1]) > 65535):
            raise ProtocolError("http1.invalid_url")
        head.scheme = scheme
        head.authority = authority
        head.path = path or b"/"

    def _framing(self, head: RequestHead, index: dict[bytes, bytes]) -> bool:
        """Read the connection headers, decide the body's framing, set the state; whether the message ends with its head."""
        version = head.version
        keep_alive = version == 11
        self.upgrade = None
        connection = index.get(b"connection")
        if connection is not None or b"proxy-connection" in index:
            tokens = connection_tokens(head)
            if not tokens.isdisjoint(_NOT_HOP_BY_HOP) or len(tokens) > _MAX_CONNECTION_TOKENS or any(token[:1] == b":" for token in tokens):
                raise ProtocolError("http1.connection_header_rejected")
            if b"close" in tokens:
                keep_alive = False
            elif b"keep-alive" in tokens:
                keep_alive = True
            if b"upgrade" in tokens and version == 11:
                upgrade = index.get(b"upgrade")
                # h2c by upgrade is not offered: the request is an ordinary one, as for Envoy.
                if upgrade is not None and b"h2c" not in upgrade.lower():
                    self.upgrade = upgrade
        self.keep_alive = keep_alive
        expect = index.get(b"expect")
        self.expect_continue = expect is not None and expect.lower() == b"100-continue"
        length = index.get(b"content-length")
        coding = index.get(b"transfer-encoding")
        if head.method == b"CONNECT":
            if coding is not None or (length is not None and length != b"0"):
                raise ProtocolError("http1.body_disallowed")
            self.state = TUNNEL
            return False
        if coding is not None:
            if coding.lower() != b"chunked" or len(head.get_all(b"transfer-encoding")) > 1:
                raise ProtocolError("http1.invalid_transfer_encoding", 501)
            if length is not None:
                raise ProtocolError("http1.content_length_and_chunked_not_allowed")
            if version == 10:
                raise ProtocolError("http1.codec_error")
            self.state = CHUNK_SIZE
            return False
        if length is not None:
            self.remaining = content_length(head)
            if self.remaining and self.upgrade is None:
                self.state = LENGTH
                return False
        if self.upgrade is not None:  # whatever follows the head belongs to the tunnel, and goes nowhere before there is one
            self.state = TUNNEL
            return False
        self.state = DONE
        return True


class ResponseParser(_Parser):
    """The client side. Call `expect(method)` before each response; `keep_alive` is known after `on_headers`.

    A whole response in one piece whose head is known comes as `sink.on_whole(KnownResponse, body)`, in place of `on_headers` and `on_data`.
    """

    __slots__ = ("keep_alive", "method", "tunnel")

    sink: ResponseSink

    def __init__(self, sink: ResponseSink, options: Options) -> None:
        super().__init__(sink, options)
        self.method = b"GET"
        self.keep_alive = True
        self.tunnel = False

    def feed(self, data: bytes) -> None:
        # HOT: a response whose head was seen lately and whose body came with it.
        if self.state == HEAD and not self.buffer:
            end = data.find(b"\r\n\r\n") + 4
            known = self.heads.get(data[:end])
            if known is not None and len(data) - end == known.length and self.method not in _NO_BODY:
                self.state = DONE
                self.keep_alive = True
                self.sink.on_whole(known, data[end:])
                return
        _Parser.feed(self, data)

    def expect(self, method: bytes, *, tunnel: bool = False) -> None:
        """The request that the next response answers. `tunnel`: it asked for an upgrade, so 101 starts a tunnel; CONNECT does with any 2xx."""
        self.method = method
        self.tunnel = tunnel

    def _head(self, data: bytes) -> bytes:
        found = self._lines(data)
        if found is None:
            end = -1 if self.begun else data.find(b"\r\n", self.seen)
            if end >= 0:
                _status_line(data[:end])
                self.begun = True
            elif not data.startswith(b"HTTP/1.") and not b"HTTP/1.".startswith(data):
                raise ProtocolError("http1.codec_error")
            self.seen = max(len(data) - 3, 0)
            return data
        lines, end = found
        version, reason, status = _status_line(lines[0])
        del lines[0]
        if len(lines) > self.options.max_headers:
            raise ProtocolError("http1.too_many_headers", 431)
        items = [*map(_header_line, lines)]
        index = dict(reversed(items))
        if len(index) != len(items):
            items = _join_repeated(items, _JOINED_IN_RESPONSES)
            index = dict(reversed(items))
        if self.options.keep_case:
            head: ResponseHead = SpeltResponseHead(status, items, version=version, reason=reason)
            head.case = _spelling(lines)  # type: ignore[misc]  # a Spelt one
        else:
            head = ResponseHead(status, items, version=version, reason=reason)
        head._index = index
        length = index.get(b"content-length")
        connection = index.get(b"connection")
        if connection is not None and connection.lower() == b"keep-alive" and version == 11 and len(index) == len(items):
            # What HTTP/1.1 means anyway; many servers say it all the same.
            del index[b"connection"]
            items = head.items = [pair for pair in items if pair[0] != b"connection"]
            connection = None
        if (
            length is not None
            and status >= 200
            and connection is None
            and b"transfer-encoding" not in index
            and status != 204
            and status != 304
            and self.method not in _NO_BODY
        ):
            # By far the most common response.
            self.keep_alive = version == 11
            self.remaining = remaining = int(length) if len(length) < 18 and length.isdigit() and len(index) == len(items) else content_length(head)
            if version == 11 and len(index) == len(items) and _FRAMING_RESPONSE.isdisjoint(index):
                self.heads.remember(data[:end], KnownResponse(head, remaining, end))
            if remaining:
                self.state = LENGTH
                self.sink.on_headers(head, False)
            else:
                self.state = DONE
                self.sink.on_headers(head, True)
            return data[end:]
        end_stream = self._framing(head, index)
        self.sink.on_headers(head, end_stream)
        return data[end:]

    def _framing(self, head: ResponseHead, index: dict[bytes, bytes]) -> bool:
        status = head.status
        if b"connection" in index or b"proxy-connection" in index:
            tokens = connection_tokens(head)
            self.keep_alive = b"close" not in tokens and (head.version == 11 or b"keep-alive" in tokens)
        else:
            self.keep_alive = head.version == 11
        coding = index.get(b"transfer-encoding")
        length = index.get(b"content-length")
        if status < 200:
            if status == 101:
                if not self.tunnel:
                    raise ProtocolError("http1.codec_error")
                self.state = TUNNEL
            elif (length is not None and length != b"0") or coding is not None:
                raise ProtocolError("http1.codec_error")
            return False
        if self.method == b"CONNECT" and status < 300:
            self.state = TUNNEL
            return False
        if coding is not None:
            if length is not None or len(head.get_all(b"transfer-encoding")) > 1 or coding.lower() != b"chunked" or head.version == 10:
                raise ProtocolError("http1.codec_error")
        else:
            self.remaining = 0 if length is None else content_length(head)
        if status == 204 and self.method != b"HEAD" and (coding is not None or self.remaining):
            raise ProtocolError("http1.codec_error")
        if self.method == b"HEAD" or status == 204 or status == 304:
            self.state = DONE
            return True
        if coding is not None:
            self.state = CHUNK_SIZE
            return False
        if length is not None:
            self.state = LENGTH if self.remaining else DONE
            return not self.remaining
        self.keep_alive = False
        self.state = UNTIL_CLOSE
        return False

    def feed_eof(self) -> bool:
        """The peer closed its side. True when that ends a message properly (and the sink was told); False when it cuts one short or none was due."""
        if self.state == UNTIL_CLOSE:
            self.state = DONE
            self.sink.on_data(b"", True)
            return True
        return False


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
    if len(values) != 1 or _LENGTH(values[0]) is None:
        raise ProtocolError("http1.codec_error")
    length = int(values[0])
    if length > _MAX_LENGTH:
        raise ProtocolError("http1.codec_error")
    return length


# -- encoding

# How a body without a known length, and one that is not there, are framed. These very objects: logs tell them from a peer's own fields.
CHUNKED: Pair = (b"transfer-encoding", b"chunked")
NO_LENGTH: Pair = (b"content-length", b"0")

_field = b": ".join


def encode_request_head(method: bytes, target: bytes, authority: bytes, items: list[Pair]) -> bytes:
    """A request's head, Host first. `items` end with the framing header if the request has one."""
    if items:
        return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b\r\n\r\n" % (method, target, authority, b"\r\n".join(map(_field, items)))
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n\r\n" % (method, target, authority)


def encode_spelt_request_head(method: bytes, target: bytes, items: list[Pair]) -> bytes:
    """A request's head from items that include Host, whose names are as they go on the wire."""
    return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (method, target, b"\r\n".join(map(_field, items)))


def encode_response_head(status: int, items: list[Pair], reason: bytes | None = None) -> bytes:
    """A response's head, with the standard reason phrase unless `reason` is given."""
    line = STATUS_LINES.get(status) if reason is None else None
    if line is None:
        line = b"HTTP/1.1 %d %b\r\n" % (status, b"Unknown" if reason is None else reason)
    if items:
        return line + b"\r\n".join(map(_field, items)) + b"\r\n\r\n"
    return line + b"\r\n"


def encode_chunk(data: bytes) -> bytes:
    """One chunk; `data` is not empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_trailers(items: list[Pair]) -> bytes:
    """The end of a chunked body, with its trailers."""
    if items:
        return b"0\r\n%b\r\n\r\n" % b"\r\n".join(map(_field, items))
    return b"0\r\n\r\n"


LAST_CHUNK = b"0\r\n\r\n"

_REASONS = {
    100: "Continue", 101: "Switching Protocols",
    200: "OK", 201: "Created", 202: "Accepted", 203: "Non-Authoritative Information", 204: "No Content", 205: "Reset Content", 206: "Partial Content",
    207: "Multi-Status", 208: "Already Reported", 226: "IM Used",
    300: "Multiple Choices", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified", 305: "Use Proxy", 307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 406: "Not Acceptable",
    407: "Proxy Authentication Required", 408: "Request Timeout", 409: "Conflict", 410: "Gone", 411: "Length Required", 412: "Precondition Failed",
    413: "Payload Too Large", 414: "URI Too Long", 415: "Unsupported Media Type", 416: "Range Not Satisfiable", 417: "Expectation Failed",
    421: "Misdirected Request", 422: "Unprocessable Entity", 423: "Locked", 424: "Failed Dependency", 425: "Too Early", 426: "Upgrade Required",
    428: "Precondition Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
    505: "HTTP Version Not Supported", 506: "Variant Also Negotiates", 507: "Insufficient Storage", 508: "Loop Detected", 510: "Not Extended",
    511: "Network Authentication Required", 599: "Last Unassigned Server Error Code",
}  # fmt: skip

STATUS_LINES: dict[int, bytes] = {status: f"HTTP/1.1 {status} {reason}\r\n".encode() for status, reason in _REASONS.items()}


def reason_phrase(status: int) -> bytes:
    """The standard reason phrase; `Unknown` for others, as Envoy prints."""
    return _REASONS.get(status, "Unknown").encode()
