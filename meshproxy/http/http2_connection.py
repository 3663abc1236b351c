"""A downstream HTTP/2 connection: the asyncio protocol around a `codec.h2.session.Session`, whose streams are `http.http2_exchange.Http2Exchange`.

What is to be sent collects in the session, and is written once a turn of the event loop.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from meshproxy.codec.h2 import errors
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.session import Session
from meshproxy.http.downstream import NEVER, DownstreamConnection
from meshproxy.http.http2_exchange import Http2Exchange
from meshproxy.http.replies import Reply
from meshproxy.net.flusher import flusher_of
from meshproxy.net.keepalive import Keepalive
from meshproxy.observe import flags

if TYPE_CHECKING:
    import asyncio

    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.stream import Stream
    from meshproxy.net.connection import ConnectionInfo

log = logging.getLogger("meshproxy.http")

_OPEN, _DRAINING, _CLOSING = range(3)  # DRAINING: a notice was sent, requests are still taken; CLOSING: no more are, and it closes with the last of them
_new = object.__new__
_PREMATURE_LIMIT = "overload.premature_reset_total_stream_count"
_PREMATURE_LIFETIME = "overload.premature_reset_min_stream_lifetime_seconds"


class Http2ServerConnection(DownstreamConnection):
    """One downstream HTTP/2 connection. Owns its session; the session owns the exchanges."""

    __slots__ = (
        "_drain_timer",
        "_exchange_class",
        "_head_timer",
        "head_since",
        "_flusher",
        "_keepalive",
        "_leaving",
        "_premature",
        "_state",
        "additions",
        "changes",
        "ended",
        "ending",
        "passed",
        "plans",
        "preparer",
        "session",
        "waiting",
    )

    protocol = "HTTP/2"
    exchange_class = Http2Exchange

    def __init__(self, manager: HttpConnectionManager, info: ConnectionInfo) -> None:
        super().__init__(manager, info)
        self._exchange_class = self.exchange_class  # HOT: to read it there costs more
        self.session = self._make_session()
        self._flusher = flusher_of(manager.context)
        self._state = _OPEN
        self._leaving = False  # closes as soon as there are no requests
        self._drain_timer: asyncio.TimerHandle | None = None
        self.head_since = 0.0  # when the header block began of which a part is here
        self._head_timer: asyncio.TimerHandle | None = None
        self._keepalive: Keepalive | None = None
        self.ended = self._premature = 0  # requests that have ended; those of them that the client reset before they had an answer
        self.ending = False  # no more requests are wanted
        # -- for http.plan
        self.plans = not (manager.has_stream_timers or manager.max_requests)
        self.preparer = manager.preparer
        self.changes = manager.changes
        self.additions: Any = None  # from when the client speaks on
        self.passed: Any = None  # the plan whose head the filters let pass last
        self.waiting: list[Http2Exchange] = []  # heads whose bodies may be in the same read

    def _make_session(self) -> Session:
        return Session(self, self.manager.http2_options, client=False)

    # -- the transport's calls

    def data_received(self, data: bytes) -> None:
        """HOT"""
        if not self.spoken:
            self._speak()
        self.stats.downstream_cx_rx_bytes_total.n += len(data)
        if self._discarding:
            return
        if self._keepalive is not None:
            self._keepalive.heard()
        session = self.session
        try:
            session.feed(data)
        except Http2Error as error:
            self._begin_waiting()
            self._fail(error)
            return
        if self._discarding:  # that is how it came to be so
            self.stats.downstream_cx_protocol_error.n += 1
            self.info.flags |= flags.DPE
            self.info.local_close_reason = "codec_error:Connection_was_closed_while_dispatching_frames"
            return
        if self.waiting:
            self._begin_waiting()
        if session.unfinished and not self.head_since:
            self._begin_head()
        if self._state == _CLOSING and not session.streams:
            self._close(delayed=True)

    def _begin_waiting(self) -> None:
        """The bodies of these requests are not here."""
        for exchange in self.waiting:
            exchange.general()
        self.waiting.clear()

    def _begin_head(self) -> None:
        """A header block has begun and is not complete: from now on it is a request, as for Envoy."""
        manager, options = self.manager, self.manager.options
        self.head_since = manager.clock()
        limits = [seconds for seconds in (options.request_headers_timeout, options.request_timeout, options.stream_idle_timeout) if seconds]
        if limits:
            self._head_timer = manager.loop.call_later(min(limits), self._head_timed_out, min(limits))

    def head_complete(self) -> None:
        """It is complete."""
        self.head_since = 0.0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self, seconds: float) -> None:
        self._head_timer = None
        exchange = None if self._discarding or not self.session.unfinished else self.session.open_unfinished()
        if isinstance(exchange, Http2Exchange):
            options, stats = self.manager.options, self.stats
            if seconds == options.request_headers_timeout:
                stats.downstream_rq_header_timeout.n += 1
                reply = Reply(408, b"request header timeout", details="request_header_timeout")
            elif seconds == options.request_timeout:
                stats.downstream_rq_timeout.n += 1
                reply = Reply(408, b"request timeout", details="request_overall_timeout")
            else:
                stats.downstream_rq_idle_timeout.n += 1
                reply = Reply(408, b"stream timeout", details="stream_idle_timeout", flag=flags.SI)
            exchange.refuse(reply)

    def _speak(self) -> None:
        super()._speak()
        manager = self.manager
        self.additions = self.preparer.additions(self.info)
        self.session.start()
        options = manager.http2_options
        if options.keepalive_interval:
            self._keepalive = Keepalive(manager.loop, manager.context.random, options, self.session.ping, self._unanswered)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(error, active=False)
        if self.session.streams:
            self._count_active(local=False)  # as Envoy, whoever it was
        reason = self.info.local_close_reason
        details = f"downstream_local_disconnect({reason})" if self._local and reason else "downstream_remote_disconnect"
        self._end_streams(flags.DC, details)
        self.manager.connection_closed(self)
        self.info.closed()
        self.session.end()

    def pause_writing(self) -> None:
        """The client takes its answers more slowly than they come: upstreams are held back."""
        self.full = True
        session = self.session
        session.set_writable(False)
        for exchange in list(session.streams.values()):
            stream = exchange.stream
            if stream is not None and not exchange._warned:
                stream.on_writable(False)

    def resume_writing(self) -> None:
        self.full = False
        session = self.session
        waiting = [exchange for exchange in session.streams.values() if not exchange._warned]
        session.set_writable(True)
        for exchange in waiting:
            stream = exchange.stream
            if stream is not None and not exchange._warned:
                stream.on_writable(True)

    # -- the session's calls

    def new_stream(self) -> Http2Exchange:
        """HOT: the client begins a request."""
        # As Http2Stream.__init__: to make an object by its class costs twice as much.
        exchange = _new(self._exchange_class)
        session = exchange.session = self.session
        exchange.id = exchange.received = 0
        exchange.local_closed = exchange.remote_closed = False
        exchange.headed = True
        exchange.send_window = session.peer_stream_window
        exchange.left = -1
        exchange.queue = exchange.stream = None
        exchange.connection = self
        exchange.manager = self.manager
        exchange.info = self.info
        return exchange

    def on_output(self) -> None:
        """Something is to be sent."""
        self._flusher.add(self)

    def on_settings(self) -> None:
        """Nothing depends on them but the session."""

    def on_goaway(self, last_id: int, code: int) -> None:
        """As Envoy: a client that says goodbye closes when it likes."""

    def on_ping_ack(self, data: bytes) -> None:
        """The client is there."""
        if self._keepalive is not None:
            self._keepalive.answered()

    # -- the exchanges' calls

    def begin_planned(self) -> float:
        """HOT: a whole request begins. Returns the time."""
        manager = self.manager
        clock = manager.clock
        now = clock()
        if now >= manager.next_second:
            manager.tick(now)
        self.requests += 1
        if self._check_at > now + manager.stream_idle_timeout:
            self._watch_streams()
        return now

    def begin_request(self, now: float) -> None:
        """HOT: a request begins."""
        self.requests += 1
        if self.head_since:
            self.head_complete()
        manager = self.manager
        if self._check_at > now + manager.stream_idle_timeout:
            self._watch_streams()
        if manager.max_requests and self.requests >= manager.max_requests:
            self.stats.downstream_cx_max_requests_reached.n += 1
            self.begin_drain()

    def request_done(self, stream: Stream) -> None:
        """HOT: a request has ended."""
        self.idle_since = stream.end
        self.ended += 1
        if not stream.status:
            self._check_premature(stream)
        if (self._state == _CLOSING or self._leaving) and not self.session.streams:
            self.manager.loop.call_soon(self._finish)

    def announce_drain(self) -> None:
        """A drain goes on, and it is this connection's turn."""
        if self._state == _OPEN:
            self.stats.downstream_cx_drain_close.n += 1
            self.begin_drain()

    def flooded(self, error: Http2Error) -> None:
        """The client lets too much pile up, and it shows when something is to be sent: it is not reading, so nothing waits for it."""
        self.manager.loop.call_soon(self._abort, "http2_connection_protocol_violation")
        log.debug("connection %d: %s", self.info.id, error)

    # -- output

    def flush(self) -> None:
        """Write what there is."""
        session = self.session
        if not session.out:
            return
        if self._discarding:
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
                self.stats.downstream_cx_tx_bytes_total.n += sum(map(len, parts))
                transport.writelines(parts)
                if session.more:
                    session.pump()
                return
            data = session.take()
        except Http2Error as error:
            self.flooded(error)
            return
        self.stats.downstream_cx_tx_bytes_total.n += len(data)
        transport.write(data)
        if session.more:
            session.pump()

    # -- the end

    def drain(self) -> None:
        """The listener is draining: an idle connection is closed now, a busy one after its last response."""
        self._leaving = self.ending = True
        if self.session.streams:
            self._notify()
        else:
            self._finish()

    def _finish(self) -> None:
        """The last request of a connection that is to end has been answered."""
        if self._discarding or self.session.streams:
            return
        if self._state != _CLOSING and self.spoken:
            self.session.goaway()
        self._close(delayed=not self._leaving)

    def _start_drain(self, reason: str) -> None:
        if not self.spoken:
            self._close(delayed=False, reason=reason)
        else:
            self.begin_drain()

    def begin_drain(self) -> None:
        """GOAWAY in two steps, so that no request is lost that is under way already (RFC 9113 6.8)."""
        if self._state == _OPEN and not self._discarding:
            self._notify()
            self._drain_timer = self.manager.loop.call_later(self.manager.options.drain_timeout, self._drained)

    def _notify(self) -> None:
        if self._state == _OPEN:
            self._state = _DRAINING
            self.ending = True
            self.session.shutdown_notice()

    def _drained(self) -> None:
        self._drain_timer = None
        if self._discarding:
            return
        self._state = _CLOSING
        self.ending = True
        self.session.goaway()
        if not self.session.streams:
            self._close(delayed=True)

    def _close(self, *, delayed: bool, reason: str = "deferred_close_on_drained_connection") -> None:
        if not self._discarding:
            self._stop_timers()
        super()._close(delayed=delayed, reason=reason)

    def _stop_timers(self) -> None:
        super()._stop_timers()
        self.head_complete()
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None
        if self._keepalive is not None:
            self._keepalive.stop()
            self._keepalive = None

    def _fail(self, error: Http2Error) -> None:
        """What came is not HTTP/2, or too much of it. The GOAWAY that says so is in the session's output."""
        log.debug("connection %d: %s", self.info.id, error)
        if not error.flood:
            self.stats.downstream_cx_protocol_error.n += 1
        details = "codec_error:" + error.reason.replace(" ", "_")
        self.info.flags |= flags.DPE
        if self.session.streams:
            self._count_active(local=True)
        self._end_streams(flags.DPE, details, error)
        self._close(delayed=True, reason=details)

    def _abort(self, reason: str) -> None:
        """Close without waiting for anything."""
        if self._discarding:
            return
        self.info.local_close_reason = reason
        self._local = self._discarding = True
        self.transport.abort()

    def _end_streams(self, flag: int, details: str, error: Http2Error | None = None) -> None:
        """Requests in flight end without a word to the client. `error`: of one of them."""
        streams = self.session.streams
        while streams:
            _, exchange = streams.popitem()
            exchange.local_closed = exchange.remote_closed = True
            exchange.drop_queue()
            exchange.end(flag, error.details or details if error is not None and exchange is error.stream else details)

    def _unanswered(self) -> None:
        """A PING was not answered in time."""
        self.session.stats.keepalive_timeout.n += 1
        self._abort("http2_ping_timeout")

    def _check_premature(self, stream: Stream) -> None:
        """A client that resets its requests right after it has made them costs us much more than itself (CVE-2023-44487)."""
        get = self.manager.context.runtime.integer
        if int(stream.end - stream.start) <= get(_PREMATURE_LIFETIME, 1):
            self._premature += 1
        if self._premature * 2 >= max(get(_PREMATURE_LIMIT, 500), self.ended) and not self._discarding:
            self.stats.downstream_rq_too_many_premature_resets.n += 1
            if self.session.streams:
                self._count_active(local=True)
            self._abort("too_many_premature_resets")
            self._end_streams(0, "too_many_premature_resets")

    # -- idle timeouts

    def _check_idle(self) -> None:
        self._timer = None
        if self._discarding:
            return
        manager = self.manager
        now = manager.clock()
        left = NEVER
        streams = self.session.streams
        if streams:
            left = self._end_idle_streams(now)
            if manager.idle_timeout:
                left = min(left, manager.idle_timeout)  # the connection may be idle by then
        elif manager.idle_timeout:
            left = self.idle_since + manager.idle_timeout - now
            if left <= 0.0005:
                self._check_at = NEVER
                self.stats.downstream_cx_idle_timeout.n += 1
                self._start_drain("on_idle_timeout")
                return
        self._check_at = NEVER
        if left != NEVER:
            self._watch(left)

    def _end_idle_streams(self, now: float) -> float:
        """End the streams that were idle for too long. Returns when the next may be: seconds."""
        left = NEVER
        default = self.manager.stream_idle_timeout
        for exchange in list(self.session.streams.values()):
            stream = exchange.stream
            if stream is None:
                continue
            timeout = self.manager.flush_timeout(stream) if exchange.local_closed and stream.ended else stream.idle_timeout or default
            if not timeout:
                continue
            exchange.settle_relays()
            remaining = stream.last_active + timeout - now
            if remaining > 0.0005:
                left = min(left, remaining)
            elif stream.ended:  # the client does not take the end of its response
                self.session.stats.tx_flush_timeout.n += 1
                exchange._reset(stream, errors.INTERNAL_ERROR)
                exchange._completed(stream)
            else:
                stream.on_idle()
        return left

    def __repr__(self) -> str:
        return f"<Http2ServerConnection {self.info.remote} requests={self.requests} streams={len(self.session.streams)}>"
