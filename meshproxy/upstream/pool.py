"""HTTP/1.1 connection pools: one per host and priority (and TLS server name, where requests choose it).

A request asks `acquire`: an idle connection comes back at once, else the request waits in `pending` while a connection is dialled, or is told through
`on_pool_failure` that a circuit breaker is open or the dial failed. Dialling is the only thing here that takes a task.

Requests (see `http.forwarding.Forwarding`) are called: `on_connected(connection)`, `on_pool_failure(reason, failure)`, `on_response_headers(head, end_stream)`,
`on_response_data(data, end_stream)`, `on_response_trailers(trailers)`, `on_response_end()` is implied by `end_stream`, `on_upstream_reset(reason, details)`,
`on_upstream_writable(bool)`, `on_read_end()` (everything that has come was handed over, and the response is not complete).

Ownership: a host owns its pools, a pool its connections. A connection points at its request while it serves one; the request clears that when it is done.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.grammar import ProtocolError
from meshproxy.codec.h1.parser import DONE, HEAD, TUNNEL, Options
from meshproxy.codec.h1.response import KnownResponse, ResponseParser
from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.net import dial, tasks
from meshproxy.net.connection import ConnectionInfo

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host

# Why a stream ended early, in the words of Envoy's StreamResetReason and PoolFailureReason.
OVERFLOW = "overflow"
CONNECT_FAILURE = "remote connection failure"
LOCAL_CONNECT_FAILURE = "local connection failure"
CONNECT_TIMEOUT = "connection timeout"
TERMINATION = "connection termination"
PROTOCOL_ERROR = "protocol error"
LOCAL_RESET = "local reset"
REMOTE_RESET = "remote reset"
REFUSED = "remote refused stream reset"

_ALPN = ("http/1.1",)  # offered where the cluster's TLS context names no protocols

METERED = "upstream heads are metered"  # in `Context.shared`: a log asks what they take


class Http1Connection(asyncio.Protocol):
    """A connection to one upstream host. Serves one request at a time; the sink of its parser."""

    __slots__ = (
        "_idle_timer",
        "_info",
        "closed",
        "connected_at",
        "dialled_at",
        "heads",
        "host",
        "idle_since",
        "made_at",  # for TLS: when the socket was connected and the handshake began
        "parser",
        "planned",
        "pool",
        "request",
        "served",
        "stats",
        "transport",
    )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.host = pool.host
        self.stats = pool.stats
        self.parser = ResponseParser(self, pool.options)
        self.heads = self.parser.heads
        self.transport: Any = None
        self.request: Any = None
        self.planned: Any = None  # http.plan.PlannedStream: the request, as long as it goes by its plan
        self.served = 0
        self.closed = False
        self.connected_at = self.dialled_at = 0.0
        self.made_at = pool.context.clock()
        self.idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._info: ConnectionInfo | None = None

    @property
    def info(self) -> ConnectionInfo:
        """Addresses and TLS of this connection, for logs; made when first asked for."""
        info = self._info
        if info is None:
            info = self._info = dial.describe(self.transport, self.host.address)
            info.start = self.dialled_at
            info.connected = self.connected_at
            if info.tls is not None:
                info.connected, info.handshake_end = self.made_at, self.connected_at
        return info

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        planned = self.planned
        if planned is not None:
            # HOT: a whole response with a known head.
            end = data.find(b"\r\n\r\n") + 4
            known = self.heads.get(data[:end])
            if known is not None and len(data) - end == known.length and planned.lane.respond(planned, self, known, data, end):
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
        except ProtocolError as error:
            self._protocol_error(error)
            return
        if parser.state == DONE:
            self._response_done()
        elif self.request is not None:
            request.on_read_end()

    def on_whole(self, known: KnownResponse, body: bytes) -> None:
        self.request.on_response_whole(known, body)

    def on_headers(self, head: ResponseHead, end_stream: bool) -> None:
        if self.request is not None:
            self.request.on_response_headers(head, end_stream)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        if self.request is not None:
            self.request.on_response_data(data, end_stream)

    def on_trailers(self, trailers: Headers) -> None:
        if self.request is not None:
            self.request.on_response_trailers(trailers)

    def _response_done(self) -> None:
        """A whole response was read. The request has let go of the connection, unless it is still sending."""
        if self.closed:
            return
        request = self.request
        if request is not None:
            # The response overtook the request. What is left of the body must not reach the next response.
            self.request = None
            self.stats.upstream_cx_destroy_with_active_rq.n += 1
            self.stats.upstream_cx_destroy_local_with_active_rq.n += 1
            if not self.parser.keep_alive:
                self.stats.upstream_cx_close_notify.n += 1
            self.pool.detach(self)
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

    def _protocol_error(self, error: ProtocolError) -> None:
        self.stats.upstream_cx_protocol_error.n += 1
        request = self.request
        if request is not None:
            self.request = None
            self.stats.upstream_cx_destroy_with_active_rq.n += 1
            self.stats.upstream_cx_destroy_local_with_active_rq.n += 1
            self.pool.detach(self)
            self.close()
            request.on_upstream_reset(PROTOCOL_ERROR, "")
        else:
            self.close()

    def eof_received(self) -> bool:
        """The upstream half-closed: ends a response without a length; anything else is a termination, found by connection_lost."""
        if self.request is not None and not self.closed:
            self.parser.keep_alive = False
            self.parser.feed_eof()
            if self.pool.raw and not self.closed:
                # The end of what a terminated CONNECT reached: as Envoy, our side ends the connection.
                self.stats.upstream_cx_destroy_with_active_rq.n += 1
                self.stats.upstream_cx_destroy_local_with_active_rq.n += 1
                if self.request is not None:
                    self.request = None
                    self.pool.detach(self)
                self.close()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        was_closed = self.closed
        self.closed = True
        stats = self.stats
        if not was_closed:
            stats.upstream_cx_destroy_remote.n += 1
        else:
            stats.upstream_cx_destroy_local.n += 1
        stats.upstream_cx_destroy.n += 1
        request = self.request
        self.pool.lost(self)
        if request is not None:
            stats.upstream_cx_destroy_with_active_rq.n += 1
            stats.upstream_cx_destroy_remote_with_active_rq.n += 1
            self.request = None
            self.pool.detach(self)
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

    def close(self) -> None:
        """Close once. An upstream that has not taken all of a request by now need not take the rest, and could keep us waiting."""
        if not self.closed:
            self.closed = True
            self.pool.forget(self)
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            else:
                self.transport.close()

    def abort(self) -> None:
        """Close at once, dropping what is queued; the request, if any, has let go of it."""
        if not self.closed:
            self.closed = True
            if self.request is not None:
                self.stats.upstream_cx_destroy_with_active_rq.n += 1
                self.stats.upstream_cx_destroy_local_with_active_rq.n += 1
                self.request = None
                self.pool.detach(self)
            self.pool.forget(self)
            self.transport.abort()

    def watch_idle(self, timeout: float) -> None:
        """Close when idle for `timeout` seconds. One timer a connection, checked lazily: using the connection costs nothing."""
        self._idle_timer = self.pool.context.loop.call_later(timeout, self._check_idle, timeout)

    def _check_idle(self, timeout: float) -> None:
        self._idle_timer = None
        if self.closed:
            return
        left = timeout if self.request is not None else self.idle_since + timeout - self.pool.context.clock()
        if left <= 0.0005:
            self.stats.upstream_cx_idle_timeout.n += 1
            self.close()
        else:
            self._idle_timer = self.pool.context.loop.call_later(left, self._check_idle, timeout)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "idle" if self.request is None else "busy"
        return f"<Http1Connection {self.host.address.text} {state} served={self.served}>"


class Pool:
    """The connections to one host at one priority."""

    def __init__(self, cluster: Cluster, host: Host, priority: int, context: Context, server_name: str | None = None, *, raw: bool = False) -> None:
        """`raw`: its connections carry no HTTP (CONNECT that is terminated here)."""
        self.cluster = cluster
        self.host = host
        self.context = context
        self.limits = cluster.limits[priority]
        self.stats = cluster.stats
        self.server_name = server_name
        self.options: Options = cluster.h1_options
        self.max_requests = cluster.max_requests_per_connection
        self.idle: list[Http1Connection] = []
        self.connections: set[Http1Connection] = set()
        self.pending: deque[Any] = deque()
        self.connecting = 0
        self.draining = False
        self.special = bool(self.max_requests)  # `release` has more to do than to keep the connection
        self.raw = raw
        if not raw:
            cluster.stats.declare_codec()

    # -- for requests

    def acquire(self, request: Any) -> Http1Connection | None:
        """A connection with `request` attached to it, or None: then `request` hears (or has heard) through `on_connected` or `on_pool_failure`."""
        idle = self.idle
        if idle:
            limits = self.limits
            if limits.rq >= limits.max_rq:
                self.stats.upstream_rq_active_overflow.n += 1
                request.on_pool_failure(OVERFLOW, None)
                return None
            # As in `_attach`. upstream_rq_active follows from the limits when statistics are collected.
            connection = idle.pop()
            connection.request = request
            limits.rq += 1
            self.stats.upstream_rq_total.n += 1
            host = self.host
            host.rq_total += 1
            host.rq_active += 1
            connection.served += 1
            return connection
        self._enqueue(request)
        return None

    def _attach(self, connection: Http1Connection, request: Any) -> None:
        connection.request = request
        self.limits.rq += 1
        self.stats.upstream_rq_total.n += 1
        host = self.host
        host.rq_total += 1
        host.rq_active += 1
        connection.served += 1

    def detach(self, connection: Http1Connection) -> None:
        """A request is over (or gave up); its connection may still be reading the end of the response."""
        self.limits.rq -= 1
        self.host.rq_active -= 1

    def release(self, connection: Http1Connection) -> None:
        """`connection` is ready for another request."""
        if self.draining or (self.max_requests and connection.served >= self.max_requests):
            if not self.draining:
                self.stats.upstream_cx_max_requests.n += 1
            connection.close()
            return
        if self.pending:
            self._serve_pending(connection)
            return
        self.idle.append(connection)

    def cancel(self, request: Any) -> None:
        """`request` no longer wants to wait for a connection."""
        try:
            self.pending.remove(request)
        except ValueError:
            return
        self.limits.pending -= 1
        self.stats.upstream_rq_pending_active.n -= 1
        self.stats.upstream_rq_cancelled.n += 1

    # -- connections

    def _enqueue(self, request: Any) -> None:
        limits, stats = self.limits, self.stats
        if limits.pending >= limits.max_pending:
            stats.upstream_rq_pending_overflow.n += 1
            request.on_pool_failure(OVERFLOW, None)
            return
        self.pending.append(request)
        limits.pending += 1
        stats.upstream_rq_pending_total.n += 1
        stats.upstream_rq_pending_active.n += 1
        if self.connecting < len(self.pending):
            alone = not self.connections and not self.connecting
            if (limits.cx < limits.max_cx and self.host.cx_active < limits.max_cx_per_host) or alone:
                self._dial()
            else:
                stats.upstream_cx_overflow.n += 1

    def _dial(self) -> None:
        self.connecting += 1
        self.limits.cx += 1
        self.host.cx_active += 1
        self.host.cx_total += 1
        self.stats.upstream_cx_total.n += 1
        if not self.raw:
            self.stats.upstream_cx_http1_total.n += 1
        self.stats.upstream_cx_active.n += 1
        tasks.spawn(f"dial {self.host.address.text}", self._connect())

    async def _connect(self) -> None:
        context, cluster = self.context, self.cluster
        make = Http1Connection if self.raw or METERED not in context.shared else self._metered_class()
        started = context.clock()
        try:
            transport, connection = await dial.connect(
                self.host.address,
                lambda: make(self),
                timeout=cluster.connect_timeout,
                transport=self.host.transport,
                options=cluster.dial_options,
                server_name=self.server_name,
                alpn=_ALPN,
                san=self.server_name if cluster.auto_san_validation else None,
            )
        except dial.DialError as error:
            self._dial_failed(error)
            return
        connection.dialled_at = started
        connection.connected_at = connection.idle_since = context.clock()
        self.stats.upstream_cx_connect_ms.record((connection.connected_at - started) * 1000)
        transport.set_write_buffer_limits(cluster.per_connection_buffer_limit)
        self.connecting -= 1
        self.connections.add(connection)
        if connection.closed:  # lost before we heard that it was made
            self.lost(connection)
            return
        if cluster.idle_timeout:
            connection.watch_idle(cluster.idle_timeout)
        self.release(connection)

    @staticmethod
    def _metered_class() -> type[Http1Connection]:
        from meshproxy.upstream.metered import MeteredConnection

        return MeteredConnection

    def _dial_failed(self, error: dial.DialError) -> None:
        self.connecting -= 1
        self._count_closed()
        stats = self.stats
        stats.upstream_cx_connect_fail.n += 1
        stats.upstream_cx_destroy.n += 1
        self.host.cx_connect_fail += 1
        reason = CONNECT_FAILURE
        if error.reason == "connect_timeout":
            stats.upstream_cx_connect_timeout.n += 1
            stats.upstream_cx_destroy_local.n += 1
            reason = CONNECT_TIMEOUT
        elif error.immediate:
            stats.upstream_cx_destroy_local.n += 1
            reason = LOCAL_CONNECT_FAILURE
        else:
            stats.upstream_cx_destroy_remote.n += 1
        # All that wait fail together, as in Envoy: they would only fail one by one.
        waiting, self.pending = self.pending, deque()
        self.limits.pending -= len(waiting)
        stats.upstream_rq_pending_active.n -= len(waiting)
        for request in waiting:
            stats.upstream_rq_pending_failure_eject.n += 1
            request.on_pool_failure(reason, error.failure)

    def _serve_pending(self, connection: Http1Connection) -> None:
        limits, stats = self.limits, self.stats
        request = self.pending.popleft()
        limits.pending -= 1
        stats.upstream_rq_pending_active.n -= 1
        if limits.rq >= limits.max_rq:
            stats.upstream_rq_active_overflow.n += 1
            self.idle.append(connection)
            request.on_pool_failure(OVERFLOW, None)
            return
        self._attach(connection, request)
        request.on_connected(connection)

    def forget(self, connection: Http1Connection) -> None:
        """`connection` is closing: it gets no more requests."""
        if connection in self.idle:
            self.idle.remove(connection)

    def lost(self, connection: Http1Connection) -> None:
        """The transport is gone."""
        self.forget(connection)
        if connection in self.connections:
            self.connections.discard(connection)
            self._count_closed()
            self.stats.upstream_cx_length_ms.record((self.context.clock() - connection.connected_at) * 1000)
            self.stats.upstream_rq_per_cx.record(connection.served)
            if self.pending and len(self.pending) > self.connecting and self.limits.cx < self.limits.max_cx:
                self._dial()

    def _count_closed(self) -> None:
        self.limits.cx -= 1
        self.host.cx_active -= 1
        self.stats.upstream_cx_active.n -= 1

    def drain(self) -> None:
        """Close idle connections now and the others after their request (the host left the cluster, or the process ends)."""
        self.draining = self.special = True
        for connection in self.idle.copy():
            connection.close()

    def __repr__(self) -> str:
        return f"<Pool {self.host.address.text} idle={len(self.idle)} all={len(self.connections)} connecting={self.connecting} pending={len(self.pending)}>"
