"""An HTTP/1.1 connection to an upstream host: one request at a time, so that the connection is its own exchange (see `upstream.pool`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1 import header_case
from meshproxy.codec.h1.encode import CHUNKED, LAST_CHUNK, NO_LENGTH, encode_chunk, encode_request_head, encode_spelt_request_head, encode_trailers
from meshproxy.codec.h1.grammar import ProtocolError
from meshproxy.codec.h1.parser import DONE, HEAD, TUNNEL, UNTIL_CLOSE
from meshproxy.codec.h1.response import KnownResponse, ResponseParser
from meshproxy.upstream.connection import Connection
from meshproxy.upstream.pool import PROTOCOL_ERROR, TERMINATION

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from meshproxy.codec.headers import Headers, Pair, RequestHead, ResponseHead
    from meshproxy.upstream.http1_pool import Http1Pool
    from meshproxy.upstream.http2_pool import AutoPool

# A request with one of these methods has no body unless it says so (RFC 9110 9.3).
_BODILESS = frozenset((b"GET", b"HEAD", b"DELETE", b"CONNECT", b"TRACE"))
_ACCEPT = b"sec-websocket-accept"


class Http1Connection(Connection):
    """Serves one request at a time; the sink of its parser."""

    __slots__ = ("accept", "chunked", "heads", "parser", "planned", "request", "way")

    protocol: str | None = "HTTP/1.1"
    pool: Any  # Http1Pool or AutoPool

    def __init__(self, pool: Http1Pool | AutoPool) -> None:
        super().__init__(pool)
        self.parser = ResponseParser(self, pool.h1_options)
        self.heads = self.parser.heads
        self.request: Any = None
        self.planned: Any = None  # http.planned_stream.PlannedStream: the request, as long as it goes by its plan
        self.way: Any = None  # see `upstream.pool.PlanExchange`
        self.chunked = False  # the request's body
        self.accept: bytes | None = None  # what the server has to say to a WebSocket's key that is ours

    @property
    def active(self) -> int:
        """Whether it has a request."""
        return int(self.request is not None)

    @property
    def room(self) -> int:
        """Whether it has none."""
        return int(self.request is None)

    def take(self, request: Any) -> Http1Connection:
        """See `Connection.take`."""
        self.pool.ready.pop()
        self.request = request
        return self

    # -- the request's calls: see `upstream.pool.Exchange`

    def send_whole(self, head: RequestHead) -> None:
        """HOT: a request that is all head."""
        method = head.method
        if head.case is None and self.pool.spelling is None and (method in _BODILESS or b"content-length" in head):
            parser = self.parser
            parser.method = method
            parser.tunnel = False
            self.write(encode_request_head(method, head.path, head.authority, head.items))
            return
        items = head.items if method in _BODILESS or b"content-length" in head else [*head.items, NO_LENGTH]
        self.write(self._encode(head, head.path, items, tunnel=False))

    def send_head(self, head: RequestHead, body: Iterable[bytes], *, ended: bool, trailers: Headers | None, upgrade: bytes | None) -> None:
        """A head, and what is here of the body."""
        items = head.items
        self.chunked = upgrade is None and b"content-length" not in head
        if self.chunked:
            items = [*items, CHUNKED]
        elif upgrade is not None and head.version >= 20:
            from meshproxy.codec import websocket  # few have any

            if websocket.lacks_key(head, upgrade):
                key = websocket.make_key(self.pool.context.random)
                self.accept = websocket.answer_to(key)
                items = [*items, (websocket.KEY, key)]
        out = self._encode(head, head.authority if upgrade == b"CONNECT" else head.path, items, tunnel=upgrade is not None)
        out += b"".join(map(encode_chunk, body) if self.chunked else body)
        if ended and self.chunked:
            out += LAST_CHUNK if trailers is None else self._encode_trailers(trailers)
        self.write(out)

    def _encode(self, head: RequestHead, target: bytes, items: list[Pair], *, tunnel: bool) -> bytes:
        self.parser.expect(head.method, tunnel=tunnel)
        style = self.pool.spelling
        if style is None and head.case is None:
            return encode_request_head(head.method, target, head.authority, items)
        items = [(b"host", head.authority), *items]
        return encode_spelt_request_head(head.method, target, header_case.spell(items, head.case, style))

    def send_data(self, data: bytes, end_stream: bool) -> None:
        """More of the body."""
        if self.chunked:
            data = encode_chunk(data) if data else data
            if end_stream:
                data += LAST_CHUNK
        if data:
            self.write(data)
        if end_stream and not self.chunked and self.request.stream.upgrade == b"CONNECT":
            # As Envoy: an HTTP/2 client has ended its side of a tunnel, and HTTP/1 has no other way to say so.
            request = self.request
            self.hang_up()
            request.on_upstream_reset(TERMINATION, "")

    def hang_up(self) -> None:
        """The request has sent all of its side of a tunnel: close when that has gone out. The request hears no more."""
        if not self.closed:
            self._leave(self.request)
            self.flush_and_close()

    def send_metadata(self, fields: dict[bytes, bytes]) -> None:
        """HTTP/1 has nothing for it."""
        self.add_metadata((fields,))

    def add_metadata(self, maps: Collection[dict[bytes, bytes]]) -> None:
        """HTTP/1 has nothing for it."""
        self.stats.scope.counter("http1.metadata_not_supported_error").n += len(maps)

    def send_trailers(self, trailers: Headers) -> None:
        """The request's end; trailers need a chunked body."""
        if self.chunked:
            self.write(self._encode_trailers(trailers))

    def _encode_trailers(self, trailers: Headers) -> bytes:
        return encode_trailers(trailers.items if self.pool.h1_options.trailers else [])

    def write(self, data: bytes) -> None:
        """Send bytes of the request."""
        size = len(data)
        self.request.stream.upstream_bytes_sent += size
        self.stats.upstream_cx_tx_bytes_total.n += size
        self.transport.write(data)

    def let_go(self) -> None:
        """All was sent and received: the connection may serve others. It returns itself to its pool once its parser is done."""
        self.request = None
        self.idle_since = self.pool.context.clock()
        self.pool.detach()

    def abort(self) -> None:
        """Close at once, dropping what is queued; the request, if any, has let go of it."""
        if not self.closed:
            self.closed = True
            if self.request is not None:
                self._leave(self.request)
            self.pool.forget(self)
            self.transport.abort()

    def pause_reading(self) -> None:
        """Take no more of the response."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        if not self.transport.is_closing():
            self.transport.resume_reading()

    # -- what `http.plan` calls

    def begin_planned(self, stream: Any) -> Http1Connection:
        """HOT: see `upstream.pool.PlanExchange`."""
        self.pool.ready.pop()
        self.request = self.planned = stream
        self.served += 1
        return self

    def ask(self, head: RequestHead, body: bytes) -> int:
        """HOT: see `upstream.pool.PlanExchange`."""
        if not body:
            out = encode_request_head(head.method, head.path, head.authority, head.items)
        elif b"content-length" in head:
            out = encode_request_head(head.method, head.path, head.authority, head.items) + body
        else:  # it came over HTTP/2
            out = encode_request_head(head.method, head.path, head.authority, [*head.items, CHUNKED]) + encode_chunk(body) + LAST_CHUNK
        size = self.request.upstream_bytes_sent = len(out)
        self.transport.write(out)
        return size

    def ask_known(self, plan: Any, stream: Any, known: Any, request_id: bytes, body: bytes) -> int:
        """HOT: see `upstream.pool.PlanExchange`."""
        if plan.varying:
            out = plan.wire(known, request_id)
            size = len(out)
        else:
            out = plan.before if plan.new_id is None else plan.before + request_id + plan.after
            size = plan.size
        stream.upstream_bytes_sent = size
        if not body:
            self.transport.write(out)
            return size
        self.transport.write(out + body)
        return size + len(body)

    def answered(self, now: float) -> None:
        """HOT: see `upstream.pool.PlanExchange`."""
        self.request = self.planned = self.way = None
        self.idle_since = now
        pool = self.pool
        if pool.pending or pool.special:
            pool.release(self)
        else:
            pool.ready.append(self)

    def leave_plan(self, request: Any, method: bytes) -> None:
        """See `upstream.pool.PlanExchange`."""
        self.planned = self.way = None
        self.request = request
        self.parser.expect(method)

    # -- the transport's calls

    def data_received(self, data: bytes) -> None:
        planned = self.planned
        if planned is not None:
            # HOT: a whole response with a known head.
            end = data.find(b"\r\n\r\n") + 4
            known = self.heads.get(data[:end])
            if known is not None and len(data) - end == known.length:
                lane, codec, start = self.way
                if lane.respond(planned, codec, start, self, known, data[end:]):
                    return
            elif known is None and self.parser.shapes and self._shaped(planned, data, end):
                return
            planned.leave_plan()
        stats = self.stats
        stats.upstream_cx_rx_bytes_total.n += len(data)
        request = self.request
        if request is None:
            # Nothing was asked: a server that talks anyway cannot be trusted with the next request.
            if self.closed is False:
                stats.upstream_cx_protocol_error.n += 1
                self.close()
            return
        parser = self.parser
        request.stream.upstream_bytes_received += len(data)
        try:
            parser.feed(data)
        except ProtocolError:
            self._protocol_error()
            return
        if parser.state == DONE:
            self._response_done()
        elif self.request is not None:
            request.on_read_end()

    def _shaped(self, planned: Any, data: bytes, end: int) -> bool:
        """HOT: a whole response with a head of a shape that came before. False, and nothing done, where there is none, or it goes the general way."""
        found = self.parser.shaped(data, end)
        if found is None:
            return False
        shape, values = found
        lane, codec, start = self.way
        if not lane.respond(planned, codec, start, self, shape, data[end:], None, values):
            return False
        self.stats.upstream_cx_rx_bytes_total.n += len(data)
        return True

    def eof_received(self) -> bool:
        """The upstream half-closed: ends a response without a length; anything else is a termination, found by connection_lost.

        As Envoy, we are those who close where CONNECT was asked for.
        """
        request = self.request
        if request is not None and not self.closed:
            self.parser.keep_alive = False
            self.parser.feed_eof()
            if self.parser.method == b"CONNECT" and self.request is not None:
                self._leave(request)
                self.flush_and_close()
                request.on_upstream_reset(TERMINATION, "")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.ended()
        request = self.request
        self.pool.lost(self)
        if request is not None:
            stats = self.stats
            stats.upstream_cx_destroy_with_active_rq.n += 1
            stats.upstream_cx_destroy_remote_with_active_rq.n += 1
            self.request = None
            self.pool.detach()
            parser = self.parser
            if parser.state in (TUNNEL, DONE) or (parser.state == HEAD and not parser.buffer):
                request.on_upstream_reset(TERMINATION, "")
            else:  # in the middle of a message: the codec cannot make sense of it
                stats.upstream_cx_protocol_error.n += 1
                request.on_upstream_reset(PROTOCOL_ERROR, "")

    def pause_writing(self) -> None:
        if self.request is not None:
            self.request.on_upstream_writable(False)

    def resume_writing(self) -> None:
        if self.request is not None:
            self.request.on_upstream_writable(True)

    # -- the parser's calls

    def on_whole(self, known: KnownResponse, body: bytes) -> None:
        self.request.on_response_whole(known, body)

    def on_headers(self, head: ResponseHead, end_stream: bool) -> None:
        if self.accept is not None:
            self._check_accepted(head)
        if self.request is not None:
            self.request.on_response_headers(head, end_stream)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        if self.request is not None:
            self.request.on_response_data(data, end_stream)

    def on_trailers(self, trailers: Headers) -> None:
        if self.request is not None:
            self.request.on_response_trailers(trailers)

    def _check_accepted(self, head: ResponseHead) -> None:
        """The answer to a WebSocket's key that is ours; the client knows of neither. Raises ProtocolError."""
        if head.status == 101:
            if head.get(_ACCEPT) != self.accept:
                raise ProtocolError("the key of a WebSocket was answered wrongly")
            head.remove(_ACCEPT)
        if head.status >= 200 or head.status == 101:
            self.accept = None

    def _response_done(self) -> None:
        """A whole response was read. The request has let go of the connection, unless it is still sending."""
        if self.closed:
            return
        request = self.request
        if request is not None:
            # The response overtook the request. What is left of the body must not reach the next response.
            if not self.parser.keep_alive:
                self.stats.upstream_cx_close_notify.n += 1
            self._leave(request)
            self.close()
            request.on_upstream_done_early()
            return
        parser = self.parser
        if parser.buffer:
            # More than was asked for: it could be taken for the answer to the next request.
            self.stats.upstream_cx_protocol_error.n += 1
            self.close()
            return
        if not parser.keep_alive:
            self.stats.upstream_cx_close_notify.n += 1
            self.close()
            return
        parser.state = HEAD
        self.pool.release(self)

    def _protocol_error(self) -> None:
        self.stats.upstream_cx_protocol_error.n += 1
        request = self.request
        if request is not None:
            self._leave(request)
            self.close()
            request.on_upstream_reset(PROTOCOL_ERROR, "")
        else:
            self.close()

    def _leave(self, request: Any) -> None:
        """We close on a request."""
        self.request = None
        self.stats.upstream_cx_destroy_with_active_rq.n += 1
        self.stats.upstream_cx_destroy_local_with_active_rq.n += 1
        self.pool.detach()


class RawConnection(Http1Connection):
    """Carries no HTTP, but the bytes of a CONNECT that is terminated here. Serves one."""

    __slots__ = ()

    protocol = None

    def take(self, request: Any) -> Http1Connection:
        """Whatever comes is for `request`."""
        self.parser.state = UNTIL_CLOSE
        return super().take(request)

    def send_data(self, data: bytes, end_stream: bool) -> None:
        """More bytes, or the end of them."""
        if data:
            self.write(data)
        if end_stream and self.transport.can_write_eof():
            self.transport.write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        self.parser.state = TUNNEL  # there is no message that could be cut off
        super().connection_lost(error)

    def eof_received(self) -> bool:
        """As Envoy: the end of what a terminated CONNECT reached ends the connection from our side."""
        super().eof_received()
        if self.request is not None and not self.closed:
            self._leave(self.request)
            self.close()
        return False
