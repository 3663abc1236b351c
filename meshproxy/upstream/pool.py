"""Connection pools: the connections to one host at one priority (and for one TLS server name and protocol, where requests choose them).

A request asks `acquire`: when a connection has room, its exchange comes back at once, else the request waits in `pending` while a connection is dialled, or
is told through `on_pool_failure` that a circuit breaker is open or the dial failed. Dialling is the only thing here that takes a task.

Requests (see `http.attempt.Attempt`) are called: `on_connected(exchange)`, `on_pool_failure(reason, failure)`, `on_response_whole(known, body)`,
`on_response_headers(head, end_stream)`, `on_response_data(data, end_stream)`, `on_response_trailers(trailers)`, `on_upstream_reset(reason, details)`,
`on_upstream_done_early()`, `on_upstream_writable(bool)`, `on_read_end()` (everything that has come was handed over, and the response is not complete).

Ownership: a host owns its pools, a pool its connections, a connection its exchanges. An exchange points at its request while it serves one; the request
clears that when it is done.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.net import dial, tasks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from meshproxy.codec.headers import Headers, RequestHead
    from meshproxy.context import Context
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.stats import ClusterStats

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
CONNECT_ERROR = "remote error with CONNECT request"

METERED = "upstream heads are metered"  # in `Context.shared`: a log asks what they take

_MAX_DIALS = 3  # that one request sets off


class Exchange(Protocol):
    """A request and its response on an upstream connection, as the request sees it. HTTP/1 connections are their own, HTTP/2 has one a stream.

    How messages are framed is known here and nowhere above. Bytes that go out are counted for the cluster and for the request's stream.
    """

    request: Any
    pool: Pool
    host: Host
    stats: ClusterStats
    closed: bool
    protocol: str | None  # "HTTP/1.1" or "HTTP/2", as logs name it; None where it is not HTTP

    @property
    def info(self) -> ConnectionInfo:
        """Of the connection."""

    def send_whole(self, head: RequestHead) -> None:
        """A request that is all head."""

    def send_head(self, head: RequestHead, body: Iterable[bytes], *, ended: bool, trailers: Headers | None, upgrade: bytes | None) -> None:
        """A head, and what is here of the body. `ended`: that is all, but for the trailers. `upgrade`: what it asks to become, b"CONNECT" for that method."""

    def send_data(self, data: bytes, end_stream: bool) -> None:
        """More of the body."""

    def send_trailers(self, trailers: Headers) -> None:
        """The request's end."""

    def send_metadata(self, fields: dict[bytes, bytes]) -> None:
        """A map that is no part of the request (codec.h2.metadata). Dropped where the host cannot know it."""

    def add_metadata(self, maps: Collection[dict[bytes, bytes]]) -> None:
        """The same for those that are to follow the head, which has not gone out."""

    def let_go(self) -> None:
        """All was sent and received: `request` is served no more."""

    def abort(self) -> None:
        """Give it up; `request` hears no more of it."""

    def pause_reading(self) -> None:
        """Take no more of the response than cannot be helped."""

    def resume_reading(self) -> None:
        """Go on."""


class PlanExchange(Exchange, Protocol):
    """What `http.plan` asks of an exchange besides: its request is whole, and its counters are kept elsewhere."""

    planned: Any  # http.planned_stream.PlannedStream; None when the request goes the general way
    way: Any  # its lane, its downstream exchange, and when it came; None as `planned` is

    def begin_planned(self, stream: Any) -> PlanExchange:
        """HOT: of a connection, which is the last one of its pool that is ready: an exchange for a planned stream."""

    def ask(self, head: RequestHead, body: bytes) -> int:
        """Send a request; how many bytes that were, 0 where the connection counts what it writes."""

    def ask_known(self, plan: Any, stream: Any, known: Any, request_id: bytes, body: bytes) -> int:
        """The same for the head that an http.plan.Plan knows, with `request_id` where it has `new_id`, and for `known` where heads of its shape vary."""

    def answered(self, now: float) -> None:
        """The response is complete: the request is served no more."""

    def leave_plan(self, request: Any, method: bytes) -> None:
        """The request goes the general way from here, for `request` (http.attempt.Attempt)."""


class Pool:
    """The connections to one host at one priority."""

    alpn: tuple[str, ...] = ()  # offered where the cluster's TLS context names no protocols
    preamble: dial.Preamble | None = None  # what connections begin with

    def __init__(self, cluster: Cluster, host: Host, priority: int, context: Context, server_name: str | None = None) -> None:
        self.cluster = cluster
        self.host = host
        self.context = context
        self.limits = cluster.limits[priority]
        self.stats = cluster.stats
        self.server_name = server_name
        self.san: str | None = None  # that the host's certificate has to be for, besides what the cluster's TLS context asks for
        self.max_requests = cluster.max_requests_per_connection
        self.ratio = cluster.preconnect_ratio
        self.ready: list[Any] = []  # connections with room for another request; the last one is the next
        self.connections: set[Any] = set()
        self.pending: deque[Any] = deque()
        self.connecting = 0
        self.draining = False

    # -- what protocols differ in

    def make(self) -> Any:
        """What the transport of a new connection calls."""
        raise NotImplementedError

    def made(self, protocol: Any) -> Any:
        """The connection that it became."""
        return protocol

    def room_expected(self) -> int:
        """How many requests the connections will take that are being dialled."""
        return self.connecting

    def count_dial(self) -> None:
        """Count a connection by its protocol."""

    # -- for requests

    def acquire(self, request: Any) -> Any:
        """An exchange for `request`, or None: then `request` hears (or has heard) through `on_connected` or `on_pool_failure`."""
        if self.ready:
            limits = self.limits
            if limits.rq >= limits.max_rq:
                self.stats.upstream_rq_active_overflow.n += 1
                request.on_pool_failure(OVERFLOW, None)
                return None
            exchange = self._attach(request)
            if self.ratio > 1.0:
                self.dial_as_needed()
            return exchange
        self._enqueue(request)
        return None

    def _attach(self, request: Any) -> Any:
        # upstream_rq_active follows from the limits when statistics are collected.
        self.limits.rq += 1
        self.stats.upstream_rq_total.n += 1
        host = self.host
        host.rq_total += 1
        host.rq_active += 1
        connection = self.ready[-1]
        connection.served += 1
        return connection.take(request)

    def detach(self) -> None:
        """A request is over (or gave up); its connection may still be reading the end of the response."""
        self.limits.rq -= 1
        self.host.rq_active -= 1

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
        self.dial_as_needed()

    def serve_pending(self) -> None:
        """Some connection is ready: let those that wait have it."""
        limits, stats, pending = self.limits, self.stats, self.pending
        while pending and self.ready:
            request = pending.popleft()
            limits.pending -= 1
            stats.upstream_rq_pending_active.n -= 1
            if limits.rq >= limits.max_rq:
                stats.upstream_rq_active_overflow.n += 1
                request.on_pool_failure(OVERFLOW, None)
            else:
                request.on_connected(self._attach(request))
        if pending:
            self.dial_as_needed()

    def dial_as_needed(self) -> None:
        """Dial for those that wait, and ahead of need where the cluster says so, as far as circuit breakers allow."""
        for _ in range(_MAX_DIALS):
            if not self._wants_more():
                return
            if not self._dial_if_allowed():
                return

    def _dial_if_allowed(self) -> bool:
        limits = self.limits
        allowed = limits.cx < limits.max_cx and self.host.cx_active < limits.max_cx_per_host
        if not allowed:
            self.stats.upstream_cx_overflow.n += 1
            if self.connections or self.connecting:  # else nothing would ever serve those that wait
                return False
        self._dial()
        return allowed

    def _wants_more(self) -> bool:
        waiting, expected = len(self.pending), self.room_expected()
        if self.ratio <= 1.0 or not self.host.healthy:
            return waiting > expected
        waiting, active, room = self.load()
        return (waiting + active) * self.ratio > room + active

    def load(self) -> tuple[int, int, int]:
        """How many requests wait and are served, and how many more there is room for, on connections that are being dialled, too."""
        active = sum(connection.active for connection in self.connections)
        room = sum(connection.room for connection in self.ready)
        return len(self.pending), active, self.room_expected() + room

    def dial_ahead(self, ratio: float) -> bool:
        """Dial for a request that is expected, unless there is room for `ratio` times what is going on. Whether that was done, and may be again."""
        waiting, active, room = self.load()
        wanted = (waiting + active + 1) * ratio > room + active if self.host.healthy else waiting > self.room_expected()
        return wanted and self._dial_if_allowed()

    def _dial(self) -> None:
        self.connecting += 1
        self.limits.cx += 1
        self.host.cx_active += 1
        self.host.cx_total += 1
        self.stats.upstream_cx_total.n += 1
        self.stats.upstream_cx_active.n += 1
        self.count_dial()
        tasks.spawn(f"dial {self.host.address.text}", self._connect())

    async def _connect(self) -> None:
        context, cluster = self.context, self.cluster
        started = context.clock()
        try:
            transport, protocol = await dial.connect(
                self.host.address,
                self.make,
                timeout=cluster.connect_timeout,
                transport=self.host.transport,
                options=cluster.dial_options,
                server_name=self.server_name or self._hosts_name(),
                alpn=self.alpn,
                san=self.san,
                preamble=self.preamble,
            )
        except dial.DialError as error:
            self._dial_failed(error)
            return
        connection = self.made(protocol)
        connection.dialled_at = started
        connection.connected_at = connection.idle_since = context.clock()
        self.stats.upstream_cx_connect_ms.record((connection.connected_at - started) * 1000)
        transport.set_write_buffer_limits(cluster.per_connection_buffer_limit)
        self.connecting -= 1
        self.connections.add(connection)
        if connection.closed:  # lost before we heard that it was made
            self.lost(connection)
            return
        connection.watch(cluster.idle_timeout, cluster.max_connection_duration)
        self.release(connection)

    def _hosts_name(self) -> str | None:
        """The SNI where the host's own name is to be it (auto_host_sni), None for that of the TLS context."""
        host = self.host
        return host.hostname if host.hostname and host.transport is not None and host.transport.auto_host_sni else None

    def release(self, connection: Any) -> None:
        """`connection` is ready for a request, or for another one."""
        if connection.draining or (self.draining and not self.pending):
            connection.drain()
            return
        self.ready.append(connection)
        if self.pending:
            self.serve_pending()

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
        if not self.draining:
            self.dial_as_needed()

    def forget(self, connection: Any) -> None:
        """`connection` is closing or full: it gets no more requests."""
        if connection in self.ready:
            self.ready.remove(connection)

    def lost(self, connection: Any) -> None:
        """The transport is gone."""
        self.forget(connection)
        if connection in self.connections:
            self.connections.discard(connection)
            self._count_closed()
            self.stats.upstream_cx_length_ms.record((self.context.clock() - connection.connected_at) * 1000)
            self.stats.upstream_rq_per_cx.record(connection.served)
            if self.pending:
                self.dial_as_needed()

    def _count_closed(self) -> None:
        self.limits.cx -= 1
        self.host.cx_active -= 1
        self.stats.upstream_cx_active.n -= 1

    def drain_one(self, connection: Any) -> None:
        """Give `connection` no more requests, and let it close after those that it has."""
        self.forget(connection)
        connection.drain()

    def drain(self) -> None:
        """Close idle connections now and the others after their requests (the host left the cluster, or the process ends)."""
        self.draining = True
        for connection in self.ready.copy():
            self.drain_one(connection)

    def __repr__(self) -> str:
        counts = f"ready={len(self.ready)} all={len(self.connections)} connecting={self.connecting} pending={len(self.pending)}"
        return f"<{type(self).__name__} {self.host.address.text} {counts}>"
