"""Responses: their heads, and how their bodies are framed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from meshproxy.codec.grammar import JOINED_IN_RESPONSES, join_repeated
from meshproxy.codec.h1.grammar import BAD_IN_VALUE, ProtocolError, connection_tokens, content_length, header_line, spelling
from meshproxy.codec.h1.parser import CHUNK_SIZE, DONE, HEAD, LENGTH, TUNNEL, UNTIL_CLOSE, Options, Parser, Sink
from meshproxy.codec.headers import ResponseHead, SpeltResponseHead

if TYPE_CHECKING:
    from meshproxy.codec.h1.response_shapes import ResponseHeadShape
    from meshproxy.codec.response_shape import ResponseShape

_FRAMING = frozenset((b"connection", b"transfer-encoding", b"keep-alive", b"proxy-connection", b"upgrade"))
_NO_BODY = frozenset((b"HEAD", b"CONNECT"))
_MAX_SHAPES = 4  # of a connection: each is tried


class StatusLines(dict[bytes, tuple[int, bytes, int]]):
    """Status line -> (version, reason, status), validated; bounded."""

    __slots__ = ()

    def __missing__(self, line: bytes) -> tuple[int, bytes, int]:
        version, _, rest = line.partition(b" ")
        code, _, reason = rest.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(code) != 3 or not code.isdigit() or BAD_IN_VALUE(reason) is not None or code < b"100":
            raise ProtocolError("http1.codec_error")
        result = 11 if version == b"HTTP/1.1" else 10, reason, int(code)
        if len(line) <= 256:
            if len(self) >= 256:
                self.clear()
            self[line] = result
        return result


_status_line = StatusLines().__getitem__  # shared by all parsers of the process, as header lines are


class KnownResponse:
    """A response's head with a content length and nothing else that matters for framing, parsed. `items` and `index` are never changed.

    `size`: the head's length on the wire; `length`: the body's.
    """

    __slots__ = ("index", "items", "length", "reason", "received", "size", "status")

    def __init__(self, head: ResponseHead, length: int, size: int) -> None:
        self.size = size
        assert head._index is not None
        self.status = head.status
        self.reason = head.reason
        self.items = head.items.copy()
        self.index = head._index.copy()
        self.length = length
        self.received = size + length  # bytes that one takes on the wire, with its body


class ResponseSink(Sink, Protocol):
    """What a ResponseParser calls."""

    def on_whole(self, known: KnownResponse, body: bytes) -> None: ...


class ResponseParser(Parser):
    """The client side. Call `expect(method)` before each response; `keep_alive` is known after `on_headers`.

    A whole response in one piece whose head is known comes as `sink.on_whole(KnownResponse, body)`, in place of `on_headers` and `on_data`.
    """

    __slots__ = ("keep_alive", "method", "shapes", "tunnel")

    sink: ResponseSink

    def __init__(self, sink: ResponseSink, options: Options) -> None:
        super().__init__(sink, options)
        self.method = b"GET"
        self.keep_alive = True
        self.tunnel = False
        self.shapes: tuple[ResponseHeadShape, ...] = ()  # of the latest heads

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
        Parser.feed(self, data)

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
        status_line = lines.pop(0)
        version, reason, status = _status_line(status_line)
        if len(lines) > self.options.max_headers:
            raise ProtocolError("http1.too_many_headers", 431)
        items = [*map(header_line, lines)]
        index = dict(reversed(items))
        if len(index) != len(items):
            items = join_repeated(items, JOINED_IN_RESPONSES)
            index = dict(reversed(items))
        if self.options.keep_case:
            head: ResponseHead = SpeltResponseHead(status, items, version=version, reason=reason if self.options.keep_reason else None)
            head.case = spelling(lines, proper_else=self.options.proper_else)  # type: ignore[misc]  # a Spelt one
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
            if version == 11 and len(index) == len(items) and _FRAMING.isdisjoint(index):
                known = KnownResponse(head, remaining, end)
                if self.heads.remember(data[:end], known):
                    self._learn(known, lines, end, status_line)
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

    def _learn(self, known: KnownResponse, lines: list[bytes], size: int, status_line: bytes) -> None:
        shape = self.options.response_shapes.learn(known, lines, size, status_line)
        if shape is not None and shape not in self.shapes:
            self.shapes = (shape, *[other for other in self.shapes if not other.retired][: _MAX_SHAPES - 1])

    def shaped(self, data: bytes, end: int) -> tuple[ResponseShape, tuple[bytes, ...]] | None:
        """HOT: the shape and the values of a head that is not known, all of whose body is here; None where it has no shape, or the body is not all of it."""
        head = data[:end]
        for shape in self.shapes:
            values = shape.values(head)
            if values is not None:
                break
        else:
            return None
        response = shape.response
        if len(data) - end != response.length_of(values):
            return None
        if not self.heads.is_new(head):  # it may come again and again
            self.heads.remember(head, KnownResponse(response.head(values), len(data) - end, end))
        return response, values

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
            elif length is not None:
                head.remove(b"content-length")
            return False
        if self.method == b"CONNECT" and status < 300:
            self.state = TUNNEL
            return False
        if coding is not None:
            if length is not None or len(head.get_all(b"transfer-encoding")) > 1 or coding.lower() != b"chunked" or head.version == 10:
                raise ProtocolError("http1.codec_error")
        else:
            self.remaining = 0 if length is None else content_length(head)
        if status == 204 and self.method != b"HEAD":
            if coding is not None or self.remaining:
                raise ProtocolError("http1.codec_error")
            if length is not None:
                head.remove(b"content-length")
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
