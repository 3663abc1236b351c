"""Requests: their heads, and how their bodies are framed."""

from __future__ import annotations

import re
from typing import Any, Protocol

from meshproxy.codec.grammar import JOINED_IN_REQUESTS, MAX_LENGTH, TOKEN, join_repeated
from meshproxy.codec.h1.grammar import ProtocolError, connection_tokens, content_length, header_line, spelling
from meshproxy.codec.h1.parser import CHUNK_SIZE, DONE, HEAD, LENGTH, TUNNEL, Options, Parser, Sink
from meshproxy.codec.h1.shapes import HeadShape
from meshproxy.codec.headers import NO_PLANS, Pair, RequestHead, SpeltRequestHead

_EMPTY_LINES = re.compile(rb"(?:\r\n)*").match
_ABSOLUTE = re.compile(rb"([A-Za-z]+)://([!$%&'()*+,\-.0-9:;=@A-Z\[\]_a-z~]*)([/?].*)?").fullmatch
_AUTHORITY = re.compile(rb"(?:[\-.0-9A-Za-z]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?").fullmatch
_LINE_END = frozenset(b"\r\n")
# What no Connection header may name: it would have a proxy remove what routing and trust stand on.
_NOT_HOP_BY_HOP = frozenset((b"host", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"))
_MAX_CONNECTION_TOKENS = 9
_MAX_SHAPES = 4  # of a connection: each is tried
# Header names that change how a message is framed or connected; a head without any of them takes the short way.
_FRAMING = frozenset(
    (b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"keep-alive", b"proxy-connection", b"te", b"expect", b"http2-settings")
)
# All that most clients say in Connection, if anything: the one is what HTTP/1.1 means anyway.
_STAYS_OR_CLOSES = {b"keep-alive": True, b"Keep-Alive": True, b"close": False, b"Close": False}
_OTHER_FRAMING = _FRAMING - {b"content-length"}


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
        self.plain: int | None = None
        self.plans: dict[Any, Any] = NO_PLANS

    @property
    def received(self) -> int:
        """Bytes that one takes on the wire."""
        return self.size

    def head(self) -> RequestHead:
        """The head for one request. The first time that a head is seen there is only one, and nothing is copied."""
        if self.kept:
            return RequestHead(self.method, self.path, self.authority, self.items.copy(), self.index.copy(), scheme=self.scheme)
        return RequestHead(self.method, self.path, self.authority, self.items, self.index, scheme=self.scheme)


class RequestSink(Sink, Protocol):
    """What a RequestParser calls."""

    def on_known(self, known: KnownRequest, body: bytes) -> None: ...


class RequestParser(Parser):
    """The server side. After `on_headers`, `keep_alive`, `expect_continue` and `upgrade` tell what the head asked of the connection.

    A whole HTTP/1.1 request that asks nothing of the connection, without a body or with one of known length that came with its head, comes as
    `sink.on_known(KnownRequest, body)` in place of `on_headers` and `on_data`: the connection stays, the message is complete, and the next one may be a
    repetition that is not parsed at all.
    """

    __slots__ = ("expect_continue", "head_size", "keep_alive", "shapes", "upgrade")

    sink: RequestSink

    def __init__(self, sink: RequestSink, options: Options) -> None:
        super().__init__(sink, options)
        self.head_size = 0  # bytes of the last head that was parsed
        self.keep_alive = True
        self.expect_continue = False
        self.upgrade: bytes | None = None
        self.shapes: tuple[HeadShape, ...] = ()  # of the latest heads

    def feed(self, data: bytes) -> None:
        # HOT: a client that sends one request at a time, and often repeats itself.
        if self.state != HEAD or self.buffer or self._feeding or not data:
            Parser.feed(self, data)
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
                Parser.feed(self, b"")

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
        self.head_size = end
        options = self.options
        method, target, version = self._request_line(lines[0])
        del lines[0]
        if len(lines) > options.max_headers:
            raise ProtocolError("http1.too_many_headers", 431)
        items = [*map(header_line, lines)]
        index = dict(items)
        stays = version == 11
        if b"connection" in index and stays and len(index) == len(items) and b"proxy-connection" not in index:
            said = _STAYS_OR_CLOSES.get(index[b"connection"])
            if said is not None:  # it goes no further than here in any case
                stays = said
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
                size = MAX_LENGTH
            rest = end + size
            if rest <= len(data):
                del items[0]
                self.keep_alive = stays
                self.expect_continue = False
                self.upgrade = None
                if not stays:
                    head: RequestHead = RequestHead(method, target, index.pop(b"host"), items, index)
                    self.remaining = size
                    self.state = LENGTH if size else DONE
                    self.sink.on_headers(head, not size)
                    return data[end:]
                self.state = DONE
                known = KnownRequest(method, target, index.pop(b"host"), items, index, end)
                if size:
                    self.sink.on_known(known, data[end:rest])
                else:
                    self._bodiless(known, data, end, lines)
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
            items = join_repeated(items, JOINED_IN_REQUESTS)
            index = dict(reversed(items))
        if options.keep_case:
            head = SpeltRequestHead(method, target, host, items, version=version)
            head.case = spelling(lines, proper_else=options.proper_else)
        else:
            head = RequestHead(method, target, host, items, version=version)
        head._index = index
        if target[0] != 47 or method == b"CONNECT":  # "/"
            self._other_form(head)
        # -- what the head asks of the connection, and how the body is framed
        self.keep_alive = stays
        if _FRAMING.isdisjoint(index):
            self.expect_continue = False
            self.upgrade = None
            if method != b"CONNECT":
                self.state = DONE
                if stays and head.case is None:
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

    def _bodiless(self, known: KnownRequest, data: bytes, end: int, lines: list[bytes] | None = None) -> None:
        """A whole request that asks nothing of the connection. `lines`: those of its header fields, if it is of the most common kind."""
        if end != len(data):
            data = data[:end]
        heads = self.heads
        if not heads.is_new(data):
            known.kept = heads.remember(data, known)
        elif lines is not None:
            shape = self.options.shapes.learn(known, lines, end)
            if shape is not None and shape not in self.shapes:
                self.shapes = (shape, *[other for other in self.shapes if not other.retired][: _MAX_SHAPES - 1])
        self.sink.on_known(known, b"")

    def _check_beginning(self, data: bytes) -> None:
        """An incomplete head must still be able to become one: what is no HTTP is refused without waiting for more."""
        if self.begun:
            return
        end = data.find(b"\r\n", self.seen)
        if end >= 0:
            self._request_line(data[:end])
            self.begun = True
        elif TOKEN(data[:1]) is None:
            raise ProtocolError("http1.codec_error")

    def _request_line(self, line: bytes) -> tuple[bytes, bytes, int]:
        """HOT: method, target, version. As for Envoy, what a target looks like counts before a version that is not spoken here."""
        try:
            found = self.options.request_line(line)
            if found[2] == 11 or self.options.accept_http_10:
                return found
            error = ProtocolError("low_version", 426)
        except ProtocolError as failure:
            error = failure
        if error.status == 426:
            method, target, *_ = line.split(b" ")
            if target[:1] != b"/" or method == b"CONNECT":
                self._other_form(RequestHead(method, target))
        raise error

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
        """Read the connection headers, decide the body's framing, set the state; whether the message ends with its head. `keep_alive`: what is known of it."""
        version = head.version
        keep_alive = self.keep_alive
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
