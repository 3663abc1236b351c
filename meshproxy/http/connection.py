"""A downstream HTTP/1.1 connection: the asyncio protocol, the sink of its parser, and the encoder of responses (`http.exchange.Exchange`).

HTTP/1 carries one request at a time: what a client pipelines waits in the parser. A head that is ready is kept back until the first body bytes or the end
of the event, so that a small response is one write.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1 import header_case
from meshproxy.codec.h1.encode import CHUNKED, LAST_CHUNK, NO_LENGTH, encode_chunk, encode_response_head, encode_trailers, reason_phrase
from meshproxy.codec.h1.grammar import ProtocolError
from meshproxy.codec.h1.parser import DONE, HEAD, UNTIL_CLOSE
from meshproxy.codec.h1.request import KnownRequest, RequestParser
from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http import plan as plans
from meshproxy.http.downstream import NEVER, DownstreamConnection
from meshproxy.http.planned_stream import PlannedStream
from meshproxy.http.replies import Reply
from meshproxy.http.stream import Stream
from meshproxy.net import gates
from meshproxy.observe import flags

if TYPE_CHECKING:
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.planned_response import PlannedResponse
    from meshproxy.net.connection import ConnectionInfo

log = logging.getLogger("meshproxy.http")

_CLOSE = (b"connection", b"close")
_KEEP_ALIVE = (b"connection", b"keep-alive")
_MAX_PIPELINED = 1 << 16  # bytes of further requests that are read ahead while one is served
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CONTINUE_10 = b"HTTP/1.0 100 Continue\r\n\r\n"


class ServerConnection(DownstreamConnection):
    """One downstream HTTP/1.1 connection. Owns its stream and its parser."""

    __slots__ = (
        "_chunked",
        "_draining",
        "_out",
        "_soft_drain",
        "additions",
        "changes",
        "closing",
        "head_since",
        "head_size",
        "headers_timer",
        "heads",
        "parser",
        "passed",
        "ready",
        "stream",
    )

    protocol = "HTTP/1.1"
    queued = 0  # what is sent is the transport's at once

    def __init__(self, manager: HttpConnectionManager, info: ConnectionInfo) -> None:
        super().__init__(manager, info)
        self.parser = RequestParser(self, manager.parser_options)
        self.heads = self.parser.heads
        self.changes = manager.changes
        self.ready = False  # for a whole request: no stream, nothing buffered, nothing pending
        self.passed: Any = None  # the plan (http.plan) whose head the filters let pass last on this connection
        self.stream: Stream | None = None
        self.head_since = 0.0  # when the head began of which a part is here
        self.headers_timer: asyncio.TimerHandle | None = None
        self.head_size = 0  # of the request at hand
        self._out = b""
        self._chunked = False
        self.closing = False  # close after the present response
        self._draining = False  # responses say that the connection will close; it does when `drain_timeout` is over, or the client closes
        self._soft_drain = False  # what begins from now on is the last request
        self.additions: Any = None

    # -- the transport's calls

    def data_received(self, data: bytes) -> None:
        if self.ready:
            # HOT: a whole request that repeats one of before.
            self.ready = False
            known = self.heads.get(data)
            if known is not None:
                plan = known.plans.get(self.additions)
                if plan is not None and plan.generation == self.changes.n and (plan is self.passed or not plan.hooks):
                    plan.start(self, self.manager.clock(), b"")
                    return
            elif self.parser.shapes and self._shaped(data):
                return
        if not self.spoken:
            if self.manager.speaks_http2(self, data):
                self._hand_over(data)
                return
            self._speak()
        self.stats.downstream_cx_rx_bytes_total.n += len(data)
        if self._discarding:
            return
        if self.stream is not None and self.parser.state == HEAD:
            self.parser.state = DONE  # the stream goes by plan; what comes meanwhile waits
        try:
            self.parser.feed(data)
        except ProtocolError as error:
            self._protocol_error(error)
        if self._out:
            self.flush()
        if self.stream is None:
            if self.parser.buffer and not self.head_since and not self._discarding:
                self._begin_head()
        elif self.parser.buffer and len(self.parser.buffer) > _MAX_PIPELINED:
            self.pause_reading()

    def _shaped(self, data: bytes) -> bool:
        """HOT: a whole request with a head of a shape that came before. False, and nothing done, where there is none, or it has no plan."""
        for shape in self.parser.shapes:
            values = shape.values(data)
            if values is not None:
                break
        else:
            return False
        known = shape.take(values)
        additions = self.additions
        plans = shape.plans.get(additions)
        if plans is None or plans.generation != self.changes.n:
            if additions is None:
                return False
            plans = self.manager.shaped_plans(known, additions)
            if plans is None:
                return False
        plan = plans.find(known, b"")
        if plan is None:
            return False
        size = self.head_size = len(data)
        self.stats.downstream_cx_rx_bytes_total.n += size
        plan.start(self, self.manager.clock(), b"", known)
        return True

    def _hand_over(self, data: bytes) -> None:
        """The client speaks HTTP/2."""
        successor = self.manager.http2_protocol(self.info)
        successor.take_over(self)
        gates.replace(self.transport, self, successor)
        self.parser.sink = None  # type: ignore[assignment]  # as when the connection ends: for this object it does
        successor.data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._soft_drain:
            self.stats.downstream_cx_http1_soft_drain.n -= 1
        if self.headers_timer is not None:
            self.headers_timer.cancel()
            self.headers_timer = None
        if self.head_since and self.stream is None and not self._discarding:
            self.stream = self._broken_stream()
        stream = self.stream
        self._lost(error, active=stream is not None)
        if stream is not None:
            stream.on_reset(flags.DC, "downstream_remote_disconnect")
        self.manager.connection_closed(self)
        self.info.closed()
        self.parser.sink = None  # type: ignore[assignment]  # else the two, and all that TLS has for them, wait for the garbage collector

    def pause_writing(self) -> None:
        """The client takes its answers more slowly than they come: none of its further requests is begun until it has taken most of them."""
        self.full = True
        stream = self.stream
        if stream is None or stream.request_ended:
            self.pause_reading()
        if stream is not None:
            self.manager.stats.downstream_flow_control_paused_reading_total.n += 1
            stream.on_writable(False)

    def resume_writing(self) -> None:
        self.full = False
        if self.stream is not None:
            self.manager.stats.downstream_flow_control_resumed_reading_total.n += 1
            self.stream.on_writable(True)
        elif not self._discarding:
            self.resume_reading()
            self.manager.loop.call_soon(self._next_request)

    # -- the parser's calls

    def on_known(self, known: KnownRequest, body: bytes) -> None:
        """HOT: a complete request in one piece that asks nothing of the connection."""
        manager = self.manager
        plain = known.plain
        plan = None
        if plain is None:
            preparer = manager.preparer
            plain = known.plain = 1 if preparer.is_plain(known, known.index) else 2 if preparer.is_relayed(known, known.index) else 0
        elif plain == 1 and self.additions is not None:
            plan = manager.plan(known, self.additions)
        if not plain or manager.has_stream_timers or manager.max_requests or self.head_since:
            self.parser.head_size = known.size
            self.on_headers(known.head(), not body)
            if body:
                self.on_data(body, True)
            return
        now = manager.clock()
        if now >= manager.next_second:
            manager.tick(now)
        self.requests += 1
        self.head_size = known.size
        if self._check_at > now + manager.stream_idle_timeout:
            self._watch_streams()
        additions = self.additions
        if additions is None:
            additions = self.additions = manager.preparer.additions(self.info)
        stream = plans.start(self, known, body, additions if plain == 1 else additions.relayed, now)
        if body and not stream.stage:
            self.on_data(body, True)  # it takes the general way
        if plan is not None and stream.stage:
            self.passed = plan  # every filter let it pass, at once

    def on_headers(self, head: RequestHead, end_stream: bool) -> None:
        manager = self.manager
        now = manager.clock()
        if now >= manager.next_second:
            manager.tick(now)
        stream = self.stream = manager.stream_class(manager, self, head, now)
        if self.head_since:
            self.head_complete(stream, now)
        else:
            manager.rq_started += 1
        if end_stream:
            stream.request_ended = True
            stream.request_end = now
        self.requests += 1
        parser = self.parser
        self.head_size = parser.head_size
        if not parser.keep_alive:
            self.closing = True
        if self._check_at > now + manager.stream_idle_timeout:
            self._watch_streams()
        if manager.max_requests and self.requests >= manager.max_requests:
            self.stats.downstream_cx_max_requests_reached.n += 1
            self.closing = True
        if manager.has_stream_timers:
            manager.start_timers(stream)
        if parser.upgrade is not None or head.method == b"CONNECT":
            stream.upgrade = parser.upgrade or b"CONNECT"
        if parser.expect_continue and not manager.proxy_100_continue:
            self._informed()
            self.transport.write(_CONTINUE if head.version == 11 else _CONTINUE_10)
        reply = manager.preparer.prepare(stream)
        if reply is not None:
            stream.local_reply(reply)
            return
        stream.begin(end_stream)

    def _begin_head(self) -> None:
        """A head has begun and is not complete: from now on it is a request, as for Envoy."""
        manager = self.manager
        now = self.head_since = manager.clock()
        manager.rq_started += 1
        if self._check_at > now + manager.stream_idle_timeout:
            self._watch_streams()
        if manager.times_heads:
            self._time_head()

    def head_complete(self, stream: Stream, now: float) -> None:
        """What the request of a head that came in pieces has from its beginning."""
        stream.start = self.head_since
        stream.head_end = now
        self.head_since = 0.0
        if self.headers_timer is not None:
            self.headers_timer.cancel()
            self.headers_timer = None

    def on_data(self, data: bytes, end_stream: bool) -> None:
        stream = self.stream
        if stream is not None:
            stream.on_data(data, end_stream)

    def on_trailers(self, trailers: Headers) -> None:
        stream = self.stream
        if stream is not None:
            stream.on_trailers(trailers)

    # -- the stream's calls

    def send_informational(self, head: ResponseHead) -> None:
        """A 1xx response of the upstream; as Envoy, passed on only where 100-continue is proxied."""
        request = self.stream.request if self.stream is not None else None
        if self.manager.proxy_100_continue and request is not None and request.version == 11:
            self._informed()
            self.write(encode_response_head(head.status, head.items))

    def _informed(self) -> None:
        for counter in self.stats.by_class[1]:
            counter.n += 1

    def send_headers(self, stream: Stream, head: ResponseHead, end_stream: bool) -> None:
        """Encode a final response's head; it goes out with the first data, or with `flush`."""
        request = stream.request
        items = head.items
        status = head.status
        self._chunked = False
        if not stream.request_ended:
            self.stats.downstream_rq_response_before_rq_complete.n += 1
        if stream.tunnel:
            self._out = encode_response_head(status, items)
            return
        if not stream.request_ended:
            # The rest of the request would be read as the next one, or never come: this connection cannot be kept.
            self.closing = True
        assert request is not None
        manager = self.manager
        if stream.close_connection:
            self.closing = True
        elif not self.closing and manager.drain_close():
            self._announce_drain()
        if not end_stream and request.version == 10 and b"content-length" not in head:
            self.closing = True
        if self.closing or self._draining:
            items.append(_CLOSE)
        elif request.version == 10:
            items.append(_KEEP_ALIVE)
        if status == 204:
            if b"content-length" in head:
                head.remove(b"content-length")
                items = head.items
        elif b"content-length" in head or (status == 304 and end_stream):
            pass
        elif end_stream and request.method != b"HEAD":
            items.append(NO_LENGTH)
        elif request.version != 10:
            items.append(CHUNKED)
            self._chunked = not end_stream
        if manager.header_case is not None or head.case is not None:
            items = header_case.spell(items, head.case, manager.header_case)
        out = encode_response_head(status, items, head.reason if head.case is not None else None)
        if request.version == 10:
            out = b"HTTP/1.0" + out[8:]
        self._out = out
        stream.response_start = manager.clock() if manager.logs_times else 0.0
        if end_stream:
            self.flush()

    def send_whole(self, stream: Stream, head: ResponseHead, body: bytes) -> None:
        """HOT: encode a whole response with a content length and write it."""
        request = stream.request
        manager = self.manager
        if self.closing or stream.close_connection or manager.codec_special or not stream.request_ended or request.version != 11 or manager.drain_active():  # type: ignore[union-attr]
            self.send_headers(stream, head, not body)
            if body:
                self.send_data(body, True)
            return
        out = encode_response_head(head.status, head.items)
        if body:
            out += body
        self.stats.downstream_cx_tx_bytes_total.n += len(out)
        self.transport.write(out)

    def send_data(self, data: bytes, end_stream: bool) -> None:
        """Encode body data."""
        out = self._out
        if self._chunked:
            if data:
                data = encode_chunk(data)
            if end_stream:
                data += LAST_CHUNK
        if out:
            data = out + data
            self._out = b""
        if data:
            self.stats.downstream_cx_tx_bytes_total.n += len(data)
            self.transport.write(data)

    def send_trailers(self, trailers: Headers) -> None:
        """End a body with trailers; dropped where the client could not know them for trailers, or they are not enabled."""
        if self._chunked:
            self.write(encode_trailers(trailers.items if self.manager.parser_options.trailers else []))
        else:
            self.flush()

    def send_metadata(self, fields: dict[bytes, bytes]) -> None:
        """HTTP/1 has nothing for it."""
        self.stats.metadata_not_supported_error.n += 1

    def write(self, data: bytes) -> None:
        """Write at once, after what was kept back."""
        data = self._out + data
        self._out = b""
        self.stats.downstream_cx_tx_bytes_total.n += len(data)
        self.transport.write(data)

    def flush(self) -> None:
        """Send a head that was kept back."""
        out = self._out
        if out:
            self._out = b""
            self.stats.downstream_cx_tx_bytes_total.n += len(out)
            self.transport.write(out)

    def stream_done(self, stream: Stream) -> None:
        """The stream has ended: make ready for the next request, or close."""
        self.stream = None
        if self._discarding:
            return
        if self.closing or not stream.request_ended or stream.tunnel:
            if not stream.request_ended:
                self.stats.downstream_rq_rx_reset.n += 1
            self._close(delayed=not stream.request_ended or stream.close_connection)
            return
        self.closing = self._soft_drain
        self.idle_since = stream.end
        if self.full:
            self.pause_reading()  # `resume_writing` goes on
            return
        if self._paused:
            self.resume_reading()
        parser = self.parser
        if parser.buffer and not parser._feeding:
            # Not from here: a client that pipelines would make this call itself once for each request.
            self.manager.loop.call_soon(self._next_request)
        else:
            parser.state = HEAD
            self.ready = not parser.buffer and not parser._feeding

    def takes(self, size: int) -> bool:
        """HOT: see `PlanExchange`."""
        return not self.closing

    def answer(self, response: PlannedResponse, service_time: bytes, body: bytes, trailers: None, now: float, values: tuple[bytes, ...] | None = None) -> None:
        """HOT: see `PlanExchange`."""
        self.stream = None
        self.idle_since = now
        parser = self.parser
        if parser.buffer:
            self._go_on()
        else:
            parser.state = HEAD
            self.ready = True
        if values is None:
            self.transport.write(
                b"".join((response.before, service_time, response.between, self.manager.date if response.dated else b"", response.after, body))
            )
        else:
            data = response.wire(values, service_time, self.manager.date) + body  # type: ignore[attr-defined]  # a ShapedResponse
            self.stats.downstream_cx_tx_bytes_total.n += len(data)
            self.transport.write(data)

    def leave_plan(self, received: int) -> None:
        """See `PlanExchange`."""
        self.stats.downstream_cx_rx_bytes_total.n += received
        self.parser.state = DONE

    def _go_on(self) -> None:
        """A request that went by plan is done, and more has come meanwhile."""
        if not self._discarding:
            if self._paused and not self.full:
                self.resume_reading()
            self.manager.loop.call_soon(self._next_request)

    def _next_request(self) -> None:
        if self._discarding or self.stream is not None or self.full:
            return
        try:
            self.parser.next_message()
        except ProtocolError as error:
            self._protocol_error(error)
        if self._out:
            self.flush()
        if self.stream is None and self.parser.buffer and not self.head_since and not self._discarding:
            self._begin_head()

    def linger(self, stream: Stream) -> None:
        """Nothing is ever queued here."""

    def settle_relays(self) -> None:
        """Nothing goes past a stream here."""

    def reset_stream(self, stream: Stream) -> None:
        """The response cannot be finished: HTTP/1 can only say so by closing."""
        self._close(delayed=True)

    def discard_request(self) -> None:
        """A response was made before the request was complete: what still comes of it is thrown away, and the connection closes after the response."""
        self.closing = True

    # -- the end

    def _broken_stream(self) -> Stream:
        """A stream for a request that could not be parsed: only to be answered, counted and logged."""
        manager = self.manager
        now = manager.clock()
        if now >= manager.next_second:
            manager.tick(now)
        stream = manager.stream_class(manager, self, RequestHead(b"", b""), now)
        if self.head_since:
            self.head_complete(stream, now)
        else:
            manager.rq_started += 1
        return stream

    def drain(self) -> None:
        """The listener is draining: an idle connection is closed now, a busy one after its response."""
        if self.stream is None and not self.parser.buffer:
            self.closing = True
            self._close(delayed=False)
        else:
            self.closing = True

    def _protocol_error(self, error: ProtocolError) -> None:
        log.debug("connection %d: %s", self.info.id, error.details)
        self.stats.downstream_cx_protocol_error.n += 1
        if error.details == "http1.unexpected_underscore":
            self.stats.requests_rejected_with_underscores_in_headers.n += 1
        stream = self.stream
        if stream is None:
            stream = self.stream = self._broken_stream()
        self.closing = True
        self.parser.state = UNTIL_CLOSE
        stream.flags |= flags.DPE
        self.info.flags |= flags.DPE
        if stream.response_started:
            stream.details = error.details
            stream.reset()
            return
        body = reason_phrase(error.status)
        stream.local_reply(Reply(error.status, body, details=error.details, flag=flags.DPE, close=True))

    def _time_head(self) -> None:
        """A head has begun: request_headers_timeout and request_timeout run from its first byte."""
        manager = self.manager
        overall = manager.options.request_timeout
        if manager.headers_timeout and (not overall or manager.headers_timeout <= overall):
            reply = Reply(408, b"request header timeout", details="request_header_timeout", close=True)
            self.headers_timer = manager.loop.call_later(manager.headers_timeout, self._head_timed_out, self.stats.downstream_rq_header_timeout, reply)
        else:
            reply = Reply(408, b"request timeout", details="request_overall_timeout", close=True)
            self.headers_timer = manager.loop.call_later(overall, self._head_timed_out, self.stats.downstream_rq_timeout, reply)

    def _head_timed_out(self, counter: Any, reply: Reply) -> None:
        if self.stream is not None or self._discarding:
            return
        counter.n += 1
        stream = self.stream = self._broken_stream()
        self.closing = True
        stream.local_reply(reply)
        self.flush()

    def _close(self, *, delayed: bool, reason: str = "deferred_close_on_drained_connection") -> None:
        self.ready = False
        super()._close(delayed=delayed, reason=reason)

    def _expire(self) -> None:
        if self._discarding or not self.spoken or not self.manager.options.http1_safe_max_connection_duration:
            super()._expire()
            return
        self.stats.downstream_cx_max_duration_reached.n += 1
        if self.closing or self._draining:
            return
        self.stats.downstream_cx_http1_soft_drain.n += 1
        self._soft_drain = True
        self.ready = False
        stream = self.stream
        if stream is not None:
            if stream.__class__ is PlannedStream:
                stream.leave_plan()  # only `stream_done` looks whether the next request is the last
        elif not self.head_since:
            self.closing = True

    def _start_drain(self, reason: str) -> None:
        """The next response is the last; close when none has come for `drain_timeout`. A connection that never had a request closes at once."""
        self.closing = True
        self.ready = False
        if not self.requests:
            self._close(delayed=False, reason=reason)
        elif self.stream is None:
            self._replace_timer(self.manager.loop.call_later(self.manager.options.drain_timeout, self._drained))

    def _announce_drain(self) -> None:
        """A drain goes on. As Envoy, the client gets the time to close by itself: what it has sent already is still answered."""
        if not self._draining:
            self._draining = True
            self.stats.downstream_cx_drain_close.n += 1
            self.manager.loop.call_later(self.manager.options.drain_timeout, self._drained)

    def _drained(self) -> None:
        self.closing = True
        self.ready = False
        if self.stream is None and not self._discarding:
            self._close(delayed=True)

    # -- idle timeouts: one timer a connection, checked lazily

    def _check_idle(self) -> None:
        self._timer = None
        if self._discarding:
            return
        manager = self.manager
        now = manager.clock()
        stream = self.stream
        if stream is not None:
            timeout = stream.idle_timeout or manager.stream_idle_timeout
            left = stream.last_active + timeout - now if timeout else NEVER
            if left <= 0.0005:
                self._check_at = NEVER
                self.ready = False
                stream.on_idle()
                self.flush()
                if self._timer is None and manager.idle_timeout:  # neither closing nor at the next request
                    self._watch(manager.idle_timeout)
                return
        elif self.head_since and manager.stream_idle_timeout:
            left = self.head_since + manager.stream_idle_timeout - now
            if left <= 0.0005:
                reply = Reply(408, b"stream timeout", details="stream_idle_timeout", flag=flags.SI, close=True)
                self._head_timed_out(self.stats.downstream_rq_idle_timeout, reply)
                return
        elif manager.idle_timeout:
            left = self.idle_since + manager.idle_timeout - now
            if left <= 0.0005:
                self.stats.downstream_cx_idle_timeout.n += 1
                self._start_drain("on_idle_timeout")
                return
        else:
            left = NEVER
        if manager.idle_timeout:
            left = min(left, manager.idle_timeout)  # the connection may be idle by then, and must not stay so for as long as a stream may
        if left == NEVER:
            self._check_at = NEVER
            return
        self.ready = False  # the next request sees to the stream's timeout
        self._watch(min(left, manager.idle_timeout) if manager.idle_timeout else left)  # the stream may end before, and the connection be idle from then on

    def __repr__(self) -> str:
        return f"<ServerConnection {self.info.remote} requests={self.requests} {self.stream!r}>"
