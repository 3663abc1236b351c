"""One connection through the TCP proxy: choose a host, connect, move bytes, count and log the end."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from meshproxy.net import dial
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo, next_id
from meshproxy.net.relay import Side
from meshproxy.net.splice import Splice
from meshproxy.net.tasks import spawn
from meshproxy.observe import events, flags
from meshproxy.observe.stream_info import StreamInfo
from meshproxy.upstream.balance.base import LbContext

if TYPE_CHECKING:
    import socket

    from meshproxy.tcp.proxy import TcpProxy
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host

log = logging.getLogger(__name__)


class Session(StreamInfo):
    """Owns both connections from the moment it is given the downstream one. Ends exactly once, in `_end`."""

    _asked = False  # the host has a connection, and was asked for a tunnel

    def __init__(self, proxy: TcpProxy, conn: ConnectionInfo) -> None:
        self.proxy = proxy
        self.connection = conn
        conn.stream = self
        context = proxy.context
        self._clock = context.clock
        self.start = context.clock()
        self.start_wall = context.wall()
        self.requested_server_name = conn.server_name
        self.termination_details = conn.termination_details
        self._metadata = conn.metadata
        self._filter_state = conn.filter_state
        self._socket: socket.socket | None = None  # downstream, until it is spliced or given a transport
        self._side: Side | None = None  # downstream, with a transport
        self._splice: Splice | None = None
        self._connect_task: asyncio.Task[None] | None = None
        self._dialled_at = self._connected_at = 0.0
        self._timers: list[asyncio.TimerHandle] = []
        self._log_timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._holds: Any = None  # the cluster's limits while a connection counts in them
        stats = proxy.stats
        stats.downstream_cx_total.n += 1
        self._received_counter = stats.downstream_cx_rx_bytes_total
        self._sent_counter = stats.downstream_cx_tx_bytes_total
        self._upstream_stats: Any = None

    # -- the downstream connection

    def start_with_socket(self, sock: socket.socket) -> None:
        """The downstream connection is a bare plaintext socket."""
        self._socket = sock
        self._begin()

    def downstream_side(self) -> Side:
        """The protocol of a downstream connection that has a transport."""
        self._side = _DownstreamSide(self)
        return self._side

    def _begin(self) -> None:
        proxy = self.proxy
        if proxy.idle is not None:  # an upstream that is not to be had, or never answers, is idle as well
            proxy.idle.start(self, self._clock())
        if proxy.max_duration:
            seconds = proxy.max_duration * (1 + proxy.duration_jitter * proxy.context.random.random())
            self._timers.append(proxy.loop.call_later(seconds, self._duration_reached))
        if proxy.log_interval:
            self._log_timer = proxy.loop.call_later(proxy.log_interval, self._log_periodically)
        self._connect_task = spawn("tcp proxy connect", self._connect())

    def missed(self) -> None:
        """The downstream connection was over before the session could begin."""
        self._ended = True
        self.end = self.start
        self.start = self.connection.start
        self.start_wall -= self.end - self.start
        self.flags |= self.connection.flags
        self._write_logs()

    # -- choosing and connecting

    async def _connect(self) -> None:
        proxy = self.proxy
        attempts = 0
        while not self._ended:
            target = proxy.pick_target(self.connection)
            cluster: Cluster | None = proxy.context.clusters.get(target.cluster)
            if cluster is None:
                proxy.stats.downstream_cx_no_route.n += 1
                self._refuse(flags.NC, 3)
                return
            self.cluster = cluster
            limits, stats = cluster.limits[0], cluster.stats
            if limits.cx >= limits.max_cx:
                stats.upstream_cx_overflow.n += 1
                self._refuse(flags.UO, 2)
                return
            if attempts >= proxy.max_connect_attempts:
                stats.upstream_cx_connect_attempts_exceeded.n += 1
                self._refuse(flags.URX_LAST, 0)
                return
            if attempts and proxy.backoff_base:
                await asyncio.sleep(self._backoff(attempts))
            attempts += 1
            host = cluster.pick(LbContext(proxy.hash_of(self.connection), metadata_match=target.metadata_match, stream=self))
            if host is None:
                stats.upstream_cx_none_healthy.n += 1
                self._refuse(flags.UH, 1)
                return
            self.attempts = attempts
            if await self._attempt(cluster, host):
                return

    def _backoff(self, attempts: int) -> float:
        proxy = self.proxy
        return proxy.context.random.random() * min(proxy.backoff_base * (1 << min(attempts - 1, 32)), proxy.backoff_max)

    async def _attempt(self, cluster: Cluster, host: Host) -> bool:
        """Try one host; whether the session is under way (or over)."""
        stats, limits = cluster.stats, cluster.limits[0]
        self.host = host
        stats.upstream_rq_pending_total.n += 1
        if limits.pending >= limits.max_pending:
            stats.upstream_rq_pending_overflow.n += 1
            self.flags |= flags.UO
            return False
        limits.cx += 1
        limits.pending += 1
        host.cx_total += 1
        host.cx_active += 1
        stats.upstream_cx_total.n += 1
        stats.upstream_cx_active.n += 1
        stats.upstream_rq_pending_active.n += 1
        self._holds = limits
        started = self._dialled_at = self._clock()
        failure: dial.DialError | None = None
        try:
            await self._dial(cluster, host)
        except dial.DialError as error:
            failure = error
        except asyncio.CancelledError:
            stats.upstream_rq_cancelled.n += 1
            self._count_destroyed(local=True)
            raise
        finally:
            limits.pending -= 1
            stats.upstream_rq_pending_active.n -= 1
        if failure is not None:
            self._attempt_failed(failure)
            return False
        now = self._connected_at = self._clock()
        stats.upstream_cx_connect_ms.record((now - started) * 1000)
        if cluster.outlier is not None:
            cluster.outlier.connected(host, final=True)
        return True

    def _attempt_failed(self, error: dial.DialError) -> None:
        cluster, host = self.cluster, self.host
        stats = cluster.stats
        host.cx_connect_fail += 1
        stats.upstream_cx_connect_fail.n += 1
        stats.upstream_rq_pending_failure_eject.n += 1
        timed_out = error.reason == dial.CONNECT_TIMEOUT
        if timed_out:
            stats.upstream_cx_connect_timeout.n += 1
        self._count_destroyed(local=timed_out)
        self.flags |= flags.UF
        self.upstream_failure = error.failure or None
        log.debug("%r: cannot connect to %s: %s", self.connection, host.address, error)
        if cluster.outlier is not None:
            cluster.outlier.local_failure(host, "timeout" if timed_out else "connect_failed")

    async def _dial(self, cluster: Cluster, host: Host) -> None:
        """Connect and start to move bytes. Raises DialError."""
        loop, tls = self.proxy.loop, host.transport
        sock = self._socket
        if sock is not None and tls is None:
            upstream = await dial.connect_socket(host.address, timeout=cluster.connect_timeout, options=cluster.dial_options, preamble=self._preamble(host))
            self._socket = None
            local = Address.from_sockaddr(upstream.family, upstream.getsockname())
            self.upstream = ConnectionInfo(next_id(), host.address, local, self._clock())
            self._splice = Splice(loop, sock, upstream, self.proxy.pipes, self)
            self._connected()
            self._splice.start()
            return
        if sock is not None:
            self._socket = None
            made = self._side = Side(self, False)
            await loop.connect_accepted_socket(lambda: made, sock)
        side = self._side
        assert side is not None
        server_name = host.hostname if tls is not None and tls.auto_host_sni and host.hostname else None
        await dial.connect(
            host.address,
            lambda: _UpstreamSide(self, side),
            timeout=cluster.connect_timeout,
            transport=tls,
            options=cluster.dial_options,
            server_name=server_name,
            preamble=self._preamble(host),
        )

    def _preamble(self, host: Host) -> dial.Preamble | None:
        """What tells the host who calls, if it is told."""
        if not host.proxy_protocol:
            return None
        from meshproxy.upstream.proxy_protocol import ends_of, preamble  # few workers need it

        return preamble(host, ends_of(self))

    def upstream_made(self, side: Side, transport: Any) -> None:
        """The upstream connection has a transport: bytes may come from now on, before the task that dialled runs again."""
        if self._ended:
            transport.abort()
            return
        transport.set_write_buffer_limits(self.cluster.per_connection_buffer_limit)
        self.upstream = dial.describe(transport, self.host.address)
        self._connected()
        downstream = side.peer
        if downstream is not None and not downstream.lost:
            downstream.transport.set_write_buffer_limits(self.proxy.buffer_limit)
            downstream.release()

    def _connected(self) -> None:
        """Both connections are there."""
        cluster, host = self.cluster, self.host
        stats = self._upstream_stats = cluster.stats
        stats.upstream_rq_total.n += 1
        stats.upstream_rq_active.n += 1
        host.rq_total += 1
        host.rq_active += 1
        self._upstream_received_counter = stats.upstream_cx_rx_bytes_total
        self._upstream_sent_counter = stats.upstream_cx_tx_bytes_total
        self.upstream_start = self.upstream.connected = self._clock()
        self.upstream.start = self._dialled_at
        if self.upstream.tls is not None:
            self.upstream.handshake_end = self.upstream_start
        idle = self.proxy.idle
        if idle is not None:
            idle.stop(self)
            idle.start(self, self.upstream_start)
        if self.proxy.log_on_connected:
            self._write_logs(events.TCP_CONNECTED)

    # -- while bytes move (net.splice.Observer)

    def received(self, upstream: bool, count: int) -> None:
        """Bytes were read."""
        if upstream:
            self.upstream_bytes_received += count
            self._upstream_received_counter.n += count
        else:
            self.bytes_received += count
            self._received_counter.n += count
        idle = self.proxy.idle
        if idle is not None:
            started = idle.started
            started.pop(self, None)
            started[self] = self._clock()

    def sent(self, upstream: bool, count: int) -> None:
        """Bytes were written."""
        if upstream:
            self.upstream_bytes_sent += count
            self._upstream_sent_counter.n += count
        else:
            self.bytes_sent += count
            self._sent_counter.n += count

    def blocked(self, upstream: bool, blocked: bool) -> None:
        """One side is left unread, because the other is full."""
        if upstream:
            of_cluster = self.cluster.stats
            counter = of_cluster.upstream_flow_control_paused_reading_total if blocked else of_cluster.upstream_flow_control_resumed_reading_total
        else:
            stats = self.proxy.stats
            counter = stats.downstream_flow_control_paused_reading_total if blocked else stats.downstream_flow_control_resumed_reading_total
        counter.n += 1

    def ended(self, upstream: bool, error: OSError | None) -> None:
        """A connection is gone, and with it the session."""
        if isinstance(error, ConnectionResetError):
            if upstream:
                self.flags |= flags.UR
                self.upstream_detected_close = "RemoteReset"
                self.connection.detected_close = "LocalReset"
            else:
                self.connection.detected_close = "RemoteReset"
        side = self._side
        if side is not None and upstream and not side.lost and self._upstream_stats is not None:
            # Downstream still flushes; its own end is the end of the session.
            self._count_upstream_end(local=False)
            return
        self._end(local_upstream=not upstream)

    # -- the end

    def _refuse(self, flag: int, why: int) -> None:
        """No upstream connection. `why`: Envoy's number of the reason: 0 connect failed, 1 no healthy host, 2 limit, 3 no route."""
        self.flags |= flag
        self._abort(f"tcp_initializion_failure:{why}")  # spelled as Envoy does

    def idle_expired(self) -> None:
        """idle_timeout is over."""
        self.proxy.stats.idle_timeout.n += 1
        self._abort("tcp_session_idle_timeout")

    def _duration_reached(self) -> None:
        self.proxy.stats.max_downstream_connection_duration.n += 1
        self.flags |= flags.DT
        self._abort("max_connection_duration_reached")

    def abort(self) -> None:
        """The listener is closed."""
        self._abort(None)

    def _abort(self, reason: str | None) -> None:
        """Drop both connections."""
        if self._ended:
            return
        self.connection.local_close_reason = reason
        if self._splice is not None:
            self._splice.abort()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        side = self._side
        self._end(local_upstream=True)
        if side is not None:
            if side.peer is not None:
                side.peer.abort()
            side.abort()

    def _end(self, local_upstream: bool) -> None:
        if self._ended:
            return
        self._ended = True
        self.end = self._clock()
        for timer in self._timers:
            timer.cancel()
        if self._log_timer is not None:
            self._log_timer.cancel()
        if self.proxy.idle is not None:
            self.proxy.idle.stop(self)
        task = self._connect_task
        host = self.host
        if task is not None and not task.done() and self._upstream_stats is None and task is not asyncio.current_task():
            task.cancel()
            if not self._asked:
                self.host = None  # as Envoy, which names a host when it has, or has not, got a connection
        self._count_upstream_end(local=local_upstream)
        self.connection.closed()
        self._write_logs()
        self.host = host

    def _count_upstream_end(self, local: bool) -> None:
        """Count a connected upstream connection out; only the first call counts."""
        stats = self._upstream_stats
        if stats is None:
            return
        self._upstream_stats = None
        stats.upstream_rq_active.n -= 1
        self.host.rq_active -= 1
        stats.upstream_cx_destroy_with_active_rq.n += 1
        (stats.upstream_cx_destroy_local_with_active_rq if local else stats.upstream_cx_destroy_remote_with_active_rq).n += 1
        stats.upstream_cx_length_ms.record((self._clock() - self._connected_at) * 1000)
        self._count_destroyed(local)

    def _count_destroyed(self, local: bool) -> None:
        limits = self._holds
        if limits is None:
            return
        self._holds = None
        limits.cx -= 1
        self.host.cx_active -= 1
        stats = self.cluster.stats
        stats.upstream_cx_active.n -= 1
        stats.upstream_cx_destroy.n += 1
        (stats.upstream_cx_destroy_local if local else stats.upstream_cx_destroy_remote).n += 1

    # -- logs

    def _log_periodically(self) -> None:
        self._log_timer = self.proxy.loop.call_later(self.proxy.log_interval, self._log_periodically)
        self._write_logs(events.TCP_PERIODIC)

    def _write_logs(self, event: str = events.TCP_END) -> None:
        for logger in self.proxy.logs:
            logger.log(self, event)

    def __repr__(self) -> str:
        return f"<tcp session {self.connection!r} to {self.host.address if self.host else None}>"


class _DownstreamSide(Side):
    """The downstream end of a session that was given a transport: begins the session when the transport is there."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        super().__init__(session, False)
        self._session = session

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._session._begin()


class _UpstreamSide(Side):
    """The upstream end."""

    __slots__ = ("_session",)

    def __init__(self, session: Session, peer: Side) -> None:
        super().__init__(session, True, peer)
        self._session = session

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._session.upstream_made(self, transport)
