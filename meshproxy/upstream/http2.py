"""An HTTP/2 connection to an upstream host: the asyncio protocol around a `codec.h2.session.Session`, and the exchanges (`upstream.pool`) on its streams.

What is to be sent collects in the session, and is written once a turn of the event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h2 import errors
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.frames import MAX_STREAM_ID
from meshproxy.codec.h2.session import Session
from meshproxy.codec.h2.stream import Http2Stream
from meshproxy.codec.headers import ResponseHead
from meshproxy.codec.hpack.encoder import encode_literal
from meshproxy.net.keepalive import Keepalive
from meshproxy.upstream.connection import Connection
from meshproxy.upstream.pool import CONNECT_ERROR, PROTOCOL_ERROR, REFUSED, REMOTE_RESET, TERMINATION

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshproxy.codec.h2.fields import KnownResponse, KnownTrailers
    from meshproxy.codec.h2.settings import Options
    from meshproxy.codec.headers import Headers, Pair, RequestHead
    from meshproxy.codec.hpack.encoder import Encoder
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.http2_pool import Http2Pool
    from meshproxy.upstream.stats import ClusterStats

_FRAME_HEAD = 9  # bytes
_new = object.__new__
_CONNECT = (b":method", b"CONNECT")
# What an upgrade is in HTTP/1, and in HTTP/2 `:protocol` says (RFC 8441).
_UPGRADE = frozenset((b"connection", b"upgrade"))
_ACCEPT = b"sec-websocket-accept"
_REQUEST_ID = encode_literal(b"x-request-id", bytes(36))[:-36]  # how the field of a new id begins


class Http2Connection(Connection):
    """Serves many requests at once. Owns its session; the session owns the exchanges."""

    __slots__ = ("_exchange_class", "_flusher", "_headed", "_heard_at", "_keepalive", "full", "in_order", "is_ready", "said_goodbye", "session")

    protocol = "HTTP/2"
    exchange_class: type[Http2Request]
    pool: Http2Pool

    def __init__(self, pool: Http2Pool) -> None:
        super().__init__(pool)
        self._exchange_class = self.exchange_class  # HOT: to read it there costs more
        self.session = self._make_session(pool.h2_options)
        self.session.limit = min(self.session.limit, pool.expected_streams)  # until the server's SETTINGS say what it is
        self.is_ready = False  # it is in `pool.ready`
        self.full = False  # the transport takes nothing more
        self.said_goodbye = False  # the server, by GOAWAY
        self.in_order = False  # that it is closed counts as no protocol error, or as one already
        self._flusher = pool.flusher
        self._keepalive: Keepalive | None = None
        self._heard_at = 0.0  # when something came last; only where a PING depends on it
        self._headed: list[Http2Request] = []  # exchanges whose response's head has come, and not yet its end

    def _make_session(self, options: Options) -> Session:
        return Session(self, options, client=True)

    @property
    def active(self) -> int:
        """Requests that are being served."""
        return len(self.session.streams)

    @property
    def room(self) -> int:
        """How many more requests it takes."""
        room = self.session.free
        most = self.pool.max_requests
        return min(room, most - self.served) if most else room

    # -- the pool's calls

    def begin_planned(self, stream: Any) -> Http2Request:
        """HOT: see `upstream.pool.PlanExchange`."""
        session = self.session
        if self._keepalive is not None:
            self._try_out()
        # As Http2Request.__init__ and Session.open: to call them costs half as much again.
        exchange = _new(self._exchange_class)
        exchange.session = session
        stream_id = exchange.id = session.next_id
        exchange.local_closed = exchange.remote_closed = exchange.headed = False
        exchange.send_window = session.peer_stream_window
        exchange.received = 0
        exchange.left = -1
        exchange.queue = exchange._known = None
        exchange._data = b""
        exchange.connection = self
        exchange.pool = self.pool
        exchange.request = exchange.planned = stream
        streams = session.streams
        streams[stream_id] = exchange
        stream_id = session.next_id = stream_id + 2
        if stream_id > MAX_STREAM_ID:
            session.settle_limit()
        self.served += 1
        if len(streams) >= session.limit:
            self.pool.forget(self)
        if self.full:
            exchange.hold_back()
        return exchange

    def take(self, request: Any) -> Http2Request:
        """The exchange of `request`. What it is to send comes next."""
        pool = self.pool
        if self._keepalive is not None:
            self._try_out()
        exchange = self.exchange_class(self, request)
        self.session.open(exchange)
        if pool.max_requests and self.served >= pool.max_requests:
            self.stats.upstream_cx_max_requests.n += 1
            pool.drain_one(self)
        elif self.session.free <= 0:
            pool.forget(self)
        if self.full:
            exchange.hold_back()
        return exchange

    def _try_out(self) -> None:
        """A PING ahead of a request, if the connection was silent for so long that it may be gone."""
        interval = self.session.options.keepalive_idle_interval
        if interval and self.pool.context.clock() - self._heard_at > interval:
            self._keepalive.send()  # type: ignore[union-attr]  # whoever calls this knows

    # -- the transport's calls

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        session = self.session
        session.start()
        options = session.options
        if options.keepalive_timeout:
            context = self.pool.context
            self._keepalive = Keepalive(context.loop, context.random, options, session.ping, self._unanswered)
            self._heard_at = context.clock()

    def data_received(self, data: bytes) -> None:
        """HOT"""
        self.stats.upstream_cx_rx_bytes_total.n += len(data)
        if self.closed:
            return
        if self._keepalive is not None:
            self._keepalive.heard()
            self._heard_at = self.pool.context.clock()
        try:
            self.session.feed(data)
        except Http2Error as error:
            self._fail(error)
        headed = self._headed
        if headed:
            self._headed = []
            for exchange in headed:
                if exchange.planned is not None:
                    exchange.release()
                if exchange.request is not None:
                    exchange.request.on_read_end()
        if self.closed and not self.in_order:  # with the last response of a connection that drains: Envoy takes the end of that read for an error
            self.stats.upstream_cx_protocol_error.n += 1

    def eof_received(self) -> bool:
        """The upstream said what it had to say: `connection_lost` follows."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        was_closed = self.closed
        self.ended()
        if self._keepalive is not None:
            self._keepalive.stop()
            self._keepalive = None
        self.pool.lost(self)
        self._end_streams(TERMINATION, local=was_closed)
        self.session.end()

    def pause_writing(self) -> None:
        self.full = True
        self.session.set_writable(False)
        for exchange in list(self.session.streams.values()):
            exchange.hold_back()

    def resume_writing(self) -> None:
        self.full = False
        self.session.set_writable(True)
        for exchange in list(self.session.streams.values()):
            exchange.go_on()

    # -- the session's calls

    def new_stream(self) -> Http2Stream:
        """A server's only."""
        raise AssertionError("a server opens no streams")

    def on_output(self) -> None:
        """Something is to be sent."""
        self._flusher.add(self)

    def on_settings(self) -> None:
        """The server may allow more or fewer requests than was thought."""
        self.session.settle_limit()
        self.pool.learn(self)

    def on_goaway(self, last_id: int, code: int) -> None:
        """The server takes no more requests; those that it will not answer have heard so."""
        self.said_goodbye = True
        if not self.draining:
            self.in_order = not self.session.streams
            self.stats.upstream_cx_close_notify.n += 1
            self.pool.drain_one(self)
            if self.pool.pending:
                self.pool.dial_as_needed()

    def on_ping_ack(self, data: bytes) -> None:
        """The server is there."""
        if self._keepalive is not None:
            self._keepalive.answered()

    # -- output

    def flush(self) -> None:
        """Write what there is."""
        session = self.session
        if self.closed or not session.out:
            session.out.clear()
            return
        transport = self.transport
        waiting = transport.get_write_buffer_size()
        if waiting:
            session.remain(waiting)
        else:
            session.drained()
        try:
            if session.apart:
                parts = session.take_parts()
                self.stats.upstream_cx_tx_bytes_total.n += sum(map(len, parts))
                transport.writelines(parts)
                if session.more:
                    session.pump()
                return
            data = session.take()
        except Http2Error as error:
            self._fail(error)
            return
        self.stats.upstream_cx_tx_bytes_total.n += len(data)
        transport.write(data)
        if session.more:
            session.pump()

    # -- the end

    def close(self) -> None:
        """See `Connection.close`."""
        self.flush()
        super().close()

    def stream_gone(self) -> None:
        """HOT: the session has one stream less."""
        if self.closed:
            return
        if self.draining:
            if not self.session.streams:
                self.close()
        else:
            self.pool.release(self)

    def _fail(self, error: Http2Error) -> None:
        """What came is not HTTP/2, or the server does not take what we send. The GOAWAY that says so is in the session's output."""
        if self.closed:
            return
        self.in_order = True
        self.stats.upstream_cx_protocol_error.n += 1
        self.close()
        self._end_streams(PROTOCOL_ERROR, local=True)

    def _unanswered(self) -> None:
        """A PING was not answered in time."""
        self.session.stats.keepalive_timeout.n += 1
        self.closed = True
        self.pool.forget(self)
        self.transport.abort()

    def _end_streams(self, reason: str, *, local: bool) -> None:
        """Requests in flight end without a word to the server."""
        session, stats = self.session, self.stats
        streams = session.streams
        if not streams:
            return
        if reason is TERMINATION:
            stats.upstream_cx_destroy_with_active_rq.n += 1
            (stats.upstream_cx_destroy_local_with_active_rq if local else stats.upstream_cx_destroy_remote_with_active_rq).n += 1
        while streams:
            _, exchange = streams.popitem()
            exchange.local_closed = exchange.remote_closed = True
            exchange.drop_queue()
            if exchange._known is not None:
                exchange.release()
            if exchange.request is not None:
                (stats.upstream_rq_pending_failure_eject if reason is TERMINATION else stats.upstream_rq_tx_reset).n += 1
                exchange.fail(reason)


class Http2Request(Http2Stream):
    """A request and its response: a stream of the session, and an exchange."""

    __slots__ = ("_data", "_known", "connection", "planned", "pool", "request", "way")

    protocol = "HTTP/2"
    _maps: Iterable[dict[bytes, bytes]] = ()  # metadata that follows the head
    held_back = False  # the request was told to wait
    upgrade: bytes | None = None  # what the stream is to become
    half_closes = False  # the response's end is not the request's: it is a tunnel's
    half_closed = False  # and it has come
    _key: bytes | None = None  # of a WebSocket, which the client wants to be answered
    way: Any  # only of planned requests: see `upstream.pool.PlanExchange`

    def __init__(self, connection: Http2Connection, request: Any) -> None:
        super().__init__(connection.session)
        self.connection = connection
        self.request = request
        self.pool = connection.pool
        self.planned: Any = None  # the request, as long as it goes by its plan; then a response waits until it is complete, or nothing more is here
        self._known: KnownResponse | None = None  # its head
        self._data = b""  # what has come of its body

    @property
    def host(self) -> Host:
        """Of the connection."""
        return self.connection.host

    @property
    def stats(self) -> ClusterStats:
        """Of the cluster."""
        return self.connection.stats

    @property
    def info(self) -> ConnectionInfo:
        """Of the connection."""
        return self.connection.info

    @property
    def closed(self) -> bool:
        """Whether nothing can come any more."""
        return self.remote_closed

    # -- the request's calls: see `upstream.pool.Exchange`

    def send_whole(self, head: RequestHead) -> None:
        """HOT: a request that is all head."""
        if head.method == b"HEAD":
            self.bodiless = True
        self._send_block(pseudo_fields(head) + head.items, end_stream=True)

    def send_head(self, head: RequestHead, body: Iterable[bytes], *, ended: bool, trailers: Headers | None, upgrade: bytes | None) -> None:
        """A head, and what is here of the body."""
        items = head.items
        if upgrade is None:
            self.bodiless = head.method == b"HEAD"
            pseudo = pseudo_fields(head)
        else:
            pseudo = [(b":authority", head.authority)]
            if upgrade == b"CONNECT":
                pseudo.append(_CONNECT)
            else:
                self.upgrade = upgrade
                if head.version < 20 and upgrade.lower() == b"websocket":
                    self._key = head.get(b"sec-websocket-key")
                pseudo += ((b":path", head.path), _CONNECT, (b":scheme", head.scheme), (b":protocol", upgrade))
                items = [pair for pair in items if pair[0] not in _UPGRADE and pair != (b"content-length", b"0")]
        self._send_block(pseudo + items, end_stream=False)
        for fields in self._maps:
            self.send_metadata(fields)
        for data in body:
            self.send_data(data, False)
        if ended:
            if trailers is None:
                self.send_data(b"", True)
            else:
                self.send_trailers(trailers)

    def _send_block(self, items: list[Pair], *, end_stream: bool) -> None:
        block = self.session.encoder.encode(items)
        self.request.stream.upstream_bytes_sent += len(block) + _FRAME_HEAD  # not all: see upstream.http2_metered
        self.send_block(block, end_stream)

    def send_trailers(self, trailers: Headers) -> None:  # type: ignore[override]  # that one takes pairs
        """The request's end."""
        super().send_trailers(trailers.items)

    def add_metadata(self, maps: Iterable[dict[bytes, bytes]]) -> None:
        """See `upstream.pool.Exchange`."""
        self._maps = maps

    def let_go(self) -> None:
        """All was sent and received; the stream may still have some of it in its queue."""
        self._leave()

    def abort(self) -> None:
        """RST_STREAM."""
        if self.request is not None:
            self._leave()
            self.stats.upstream_rq_tx_reset.n += 1
        self._reset(errors.INTERNAL_ERROR)

    def pause_reading(self) -> None:
        """Grant the server no more than it has."""
        self.pause()

    def resume_reading(self) -> None:
        """Grant it more again."""
        self.resume()

    # -- what `http.plan` calls: see `upstream.pool.PlanExchange`

    def ask(self, head: RequestHead, body: bytes) -> int:
        """HOT"""
        block = self.session.encoder.encode(all_fields(head))
        self.request.upstream_bytes_sent = len(block)
        if body:
            self._send(block, b"", b"", body)
        else:
            self.send_block(block, True)
        return 0

    def ask_known(self, plan: Any, stream: Any, known: Any, request_id: bytes, body: bytes) -> int:
        """HOT"""
        encoder = self.session.encoder
        if plan.varying:
            try:
                before = plan.join(encoder.parts[plan], known.values, request_id)
            except (KeyError, IndexError):  # the first of this plan here, or one with a long value
                before = plan.block(encoder, known, request_id)
            after = request_id = b""
        else:
            before, after = encoder.whole.get(plan) or _encode(encoder, plan)
        stream.upstream_bytes_sent = len(before) + len(request_id) + len(after)
        if body:
            self._send(before, request_id, after, body)
        else:
            self.send_whole_head(before, request_id, after)
        return 0

    def _send(self, before: bytes, request_id: bytes, after: bytes, body: bytes) -> None:
        if self.takes(len(body)):
            self.send_message(before, request_id, after, body)
        else:
            self.send_block(before + request_id + after, False)
            self.send_data(body, True)

    def answered(self, now: float) -> None:
        """HOT"""
        self.request = self.planned = self.way = None
        connection = self.connection
        connection.idle_since = now
        # As Session.forget: a planned stream was never paused, so nothing has to be granted for it.
        del self.session.streams[self.id]
        if not connection.is_ready or connection.pool.pending:
            connection.stream_gone()

    def leave_plan(self, request: Any, method: bytes) -> None:
        """See `upstream.pool.PlanExchange`."""
        self.planned = self.way = None
        self.request = request

    def _respond(self, known: KnownResponse, body: bytes, trailers: KnownTrailers | None = None) -> bool:
        """HOT: a whole response. False when it has to go the general way."""
        if not self.local_closed or self.queue is not None:
            return False
        lane, codec, start = self.way
        return lane.respond(self.planned, codec, start, self, known, body, trailers)

    def release(self) -> None:
        """The response takes the general way: hand over what has come of it."""
        known, data = self._known, self._data
        self._known, self._data = None, b""
        if self.planned is not None:
            self.planned.leave_plan()
        if known is not None:
            self._head(known, end_stream=False)
            if data:
                self._body(data, end_stream=False)

    # -- the session's calls

    def on_head(self, known: Any, end_stream: bool) -> None:
        """HOT"""
        if self.planned is not None:
            if known.kept and known.final:
                if not end_stream:
                    self._known = known
                    self.connection._headed.append(self)
                    return
                if self._respond(known, b""):
                    return
            self.planned.leave_plan()
        self._head(known, end_stream)

    def _head(self, known: KnownResponse, end_stream: bool) -> None:
        request = self.request
        if request is None:
            return
        head = known.head()
        if self.upgrade is not None and known.status == 200:
            request.on_response_headers(_switching(head, self.upgrade, self._key), False)
            if end_stream and self.request is not None:
                request.on_response_data(b"", True)
        else:
            request.on_response_headers(head, end_stream)
        if end_stream:
            self._response_done()
        elif known.final:
            self.connection._headed.append(self)

    def on_whole(self, known: Any, data: bytes, values: tuple[bytes, ...] | None = None) -> bool:
        """HOT"""
        if self.planned is None or not self.local_closed or self.queue is not None:
            return False
        lane, codec, start = self.way
        return lane.respond(self.planned, codec, start, self, known, data, None, values)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        """HOT"""
        known = self._known
        if known is not None:
            if self._data:
                data = self._data + data
            if not end_stream:
                self._data = data
                return
            if self._respond(known, data):
                return
            self._data = b""
            self.release()
        self._body(data, end_stream)

    def _body(self, data: bytes, end_stream: bool) -> None:
        request = self.request
        if request is None:
            return
        if self.relay is not None:
            self.relay.send(data)
            return
        request.on_response_data(data, end_stream)
        if end_stream:
            self._response_done()

    def on_relayed(self, size: int, now: float) -> None:
        stream = self.request.stream
        stream.bytes_sent += size
        stream.last_active = max(stream.last_active, now)

    def on_trailers(self, trailers: KnownTrailers) -> None:
        """HOT"""
        known = self._known
        if known is not None:
            if self._respond(known, self._data, trailers):
                return
            self.release()
        request = self.request
        if request is None:
            return
        request.on_response_trailers(trailers.own())
        self._response_done()

    def _response_done(self) -> None:
        """The response is complete. One that has overtaken its request ends that too."""
        request = self.request
        if request is None:
            return
        if self.half_closes:
            self.half_closed = True
            return
        self._leave()
        self.stats.upstream_rq_tx_reset.n += 1
        self._reset(errors.INTERNAL_ERROR)
        request.on_upstream_done_early()

    def on_metadata(self, fields: dict[bytes, bytes]) -> None:
        if self._known is not None or self.planned is not None:
            self.release()
        take = getattr(self.request, "on_metadata", None)  # the proxy's own requests have no use for it
        if take is not None:
            take(fields)

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        if self._known is not None:
            self.release()
        if self.request is not None:
            if code == errors.PROTOCOL_ERROR or (not remote and code != errors.INTERNAL_ERROR):
                self.stats.upstream_rq_tx_reset.n += 1
                reason = PROTOCOL_ERROR
            elif code == errors.REFUSED_STREAM:
                reason = REFUSED
            elif code == errors.CONNECT_ERROR:
                reason = CONNECT_ERROR
            elif code == errors.NO_ERROR and self.half_closed:
                self.stats.upstream_rq_rx_reset_no_error.n += 1
                reason = REMOTE_RESET
            else:  # as for Envoy also when it was us, since the head was too long
                self.stats.upstream_rq_rx_reset.n += 1
                reason = REMOTE_RESET
            self.fail(reason)
        connection = self.connection
        if connection.said_goodbye:
            connection.in_order = not connection.session.streams
        connection.stream_gone()

    def on_writable(self, writable: bool) -> None:
        if writable:
            self.go_on()
        else:
            self.hold_back()

    def on_done(self) -> None:
        connection = self.connection
        if not connection.is_ready or connection.pool.pending:
            connection.stream_gone()

    # -- inside

    def fail(self, reason: str) -> None:
        """The stream is over before the response is complete."""
        request = self.request
        self._leave()
        request.on_upstream_reset(reason, "")
        self.request = None  # a planned request became an ordinary one on the way, and was given to us: a cycle

    def hold_back(self) -> None:
        """The request goes faster than the server takes it."""
        if not self.held_back:
            self.held_back = True
            if self.request is not None:
                self.request.on_upstream_writable(False)

    def go_on(self) -> None:
        """Something of what had piled up was taken."""
        if self.held_back and not self._warned and not self.connection.full:
            self.held_back = False
            if self.request is not None:
                self.request.on_upstream_writable(True)

    def _leave(self) -> None:
        """The request is over, or has given up."""
        if self.relay is not None or self.feeder is not None:
            self.end_relays()
        self.request = None
        connection = self.connection
        connection.idle_since = connection.pool.context.clock()
        connection.pool.detach()

    def _reset(self, code: int) -> None:
        if self.session.streams.get(self.id) is not self:
            return
        connection = self.connection
        try:
            self.reset(code)
        except Http2Error as error:
            connection._fail(error)
        connection.stream_gone()


Http2Connection.exchange_class = Http2Request


def pseudo_fields(head: RequestHead) -> list[Pair]:
    """What HTTP/2 has in place of a request line, in the order of Envoy's clients where the request came by HTTP/1, else in that of most others'."""
    if head.version < 20:
        first = (b":path", head.path), (b":method", head.method), (b":scheme", head.scheme)
        return [(b":authority", head.authority), *first] if head.authority else [*first]
    return [(b":method", head.method), (b":scheme", head.scheme), (b":authority", head.authority), (b":path", head.path)]


def all_fields(head: RequestHead) -> list[Pair]:
    """HOT: all of a request's fields."""
    return pseudo_fields(head) + head.items


def _encode(encoder: Encoder, plan: Any) -> tuple[bytes, bytes]:
    """The block of an http.plan.Plan around its new request id; all of it comes before where there is none."""
    before, after = plan.fields or plan.make_fields(all_fields)
    block = encoder.blocks.get(before) or encoder.encode_known(before, before.pairs)
    rest = b""
    parts = [before]
    if plan.new_id is not None:
        block += _REQUEST_ID
        if after.pairs:
            rest = encoder.blocks.get(after) or encoder.encode_known(after, after.pairs, begun=True)
            parts.append(after)
    encoder.keep(plan, (block, rest), parts)
    return block, rest


def _switching(head: ResponseHead, upgrade: bytes, key: bytes | None) -> ResponseHead:
    """The answer to an extended CONNECT as the answer to an upgrade in HTTP/1."""
    items = [*head.items, (b"upgrade", upgrade), (b"connection", b"upgrade")]
    if key is not None and _ACCEPT not in head:
        from meshproxy.codec.websocket import answer_to  # few have any

        items.append((_ACCEPT, answer_to(key)))
    return ResponseHead(101, items)
