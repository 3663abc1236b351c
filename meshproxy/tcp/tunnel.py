"""A connection of a TCP proxy that travels in an HTTP request: CONNECT, or POST.

The request is the session's end of the upstream: the pool's exchange carries what the client sends, as far as it takes it, and what the response brings goes
to the client. HTTP/1 knows no half of a tunnel: the end of either direction ends both, as in Envoy. With HTTP/2 each direction ends by itself, and many
tunnels share a connection. Nothing of the client is read before the tunnel is there, but for one read.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from meshproxy.codec.headers import ResponseHead
from meshproxy.net.relay import Side
from meshproxy.observe import events, flags
from meshproxy.tcp.session import Session
from meshproxy.tcp.tunneling import speaks_http2
from meshproxy.upstream import pool as pools

if TYPE_CHECKING:
    import asyncio

    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.codec.headers import Headers, RequestHead
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.tcp.proxy import TcpProxy
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.pool import Pool

log = logging.getLogger(__name__)

# Of these resets the client hears as of one of its own connection; it was the tunnel's other end that was reset.
_RESET = (pools.REMOTE_RESET, pools.REFUSED)


class _Uncounted:
    """In place of the cluster's counters of bytes: its connections count for themselves."""

    n = 0


class TunnelSession(Session):
    """A session whose upstream is a `Tunnel`."""

    upgrade: bytes | None = None  # exchanges ask it of their request's stream: how a tunnel ends is up to the tunnel

    def __init__(self, proxy: TcpProxy, conn: ConnectionInfo) -> None:
        super().__init__(proxy, conn)
        self._tunnel: Tunnel | None = None
        self._upstream_received_counter = self._upstream_sent_counter = _Uncounted()

    async def _attempt(self, cluster: Cluster, host: Host) -> bool:
        tunneling = self.proxy.tunneling
        self.host = host
        head = tunneling.head(self, scheme=b"http" if host.transport is None else b"https")
        if head is None:
            log.debug("%r: the name for the tunnel is no host", self.connection)
            self.flags |= flags.UF
            self.upstream_failure = "invalid_tunnel_hostname"
            return False
        tunnel = self._tunnel = Tunnel(self, head, self.proxy.loop.create_future(), strictly=speaks_http2(cluster))
        tunnel.ask(tunneling.pool_for(self, cluster))
        return await tunnel.answered

    def failed(self, reason: str, failure: str) -> None:
        """There is no tunnel. `reason`: in the pool's words."""
        self._tunnel = None
        self.upstream_failure = failure or None
        log.debug("%r: no tunnel to %s: %s %s", self.connection, self.host.address, reason, failure)
        if reason in (pools.OVERFLOW, pools.LOCAL_CONNECT_FAILURE):
            return
        self.flags |= flags.UF
        if self.cluster.outlier is not None:
            self.cluster.outlier.local_failure(self.host, "timeout" if reason == pools.CONNECT_TIMEOUT else "connect_failed")

    def established(self, tunnel: Tunnel, info: ConnectionInfo) -> None:
        """The upstream has agreed: bytes go both ways from now on, before the task that asked runs again."""
        self._upstream_stats = self.cluster.stats
        self.upstream = info
        self.upstream_start = self._clock()
        if self.cluster.outlier is not None:
            self.cluster.outlier.connected(self.host, final=True)
        idle = self.proxy.idle
        if idle is not None:
            idle.stop(self)
            idle.start(self, self.upstream_start)
        if self.proxy.log_on_connected:
            self._write_logs(events.TCP_CONNECTED)
        downstream = self._side
        assert downstream is not None
        if downstream.lost:
            tunnel.abort()
            return
        tunnel.join(downstream)
        downstream.transport.set_write_buffer_limits(self.proxy.buffer_limit)
        downstream.release()
        if tunnel.full:
            tunnel.pause_writing()

    def _end(self, local_upstream: bool) -> None:
        tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None and not self._ended and tunnel.give_up():
            self._asked = True
            self.flags |= flags.UF
        super()._end(local_upstream)

    def _count_upstream_end(self, local: bool) -> None:
        """The pool counts."""


class Tunnel(Side):
    """The upstream side of a session, and a request of the pool (see `upstream.pool`). `answered`: whether the upstream agreed.

    Owned by its session. It points at its exchange as long as that serves it, and the exchange at it.
    """

    __slots__ = ("_exchange", "_head", "_pool", "_session", "_strictly", "answered", "full", "stream")

    def __init__(self, session: TunnelSession, head: RequestHead, answered: asyncio.Future[bool], *, strictly: bool) -> None:
        """`strictly`: 200 alone is an agreement, and not any 2xx."""
        super().__init__(session, True)
        self._session = self.stream = session
        self._head = head
        self._strictly = strictly
        self._pool: Pool | None = None
        self._exchange: Any = None  # upstream.pool.Exchange
        self.answered = answered
        self.full = False  # the upstream takes no more for now

    # -- the session's calls

    def ask(self, pool: Pool) -> None:
        """Begin."""
        self._pool = pool
        exchange = pool.acquire(self)
        if exchange is not None:
            self.on_connected(exchange)

    def join(self, downstream: Side) -> None:
        """Become the peer of the client's side."""
        self.transport = _Carrier(self)
        self.peer = downstream
        downstream.peer = self

    def give_up(self) -> bool:
        """The session has ended; whether an answer was waited for. No-op for a tunnel that is there."""
        if self.peer is not None:
            return False
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.abort()
        elif self._pool is not None:
            self._pool.cancel(self)
        return exchange is not None

    # -- the client's side calls: see `Side`, and `_Carrier`

    def reset(self) -> None:
        self.abort()

    def abort(self) -> None:
        exchange, self._exchange = self._exchange, None
        self.lost = True
        if exchange is not None:
            exchange.abort()

    def send(self, data: bytes) -> None:
        """What the client said."""
        if self._exchange is not None:
            self._exchange.send_data(data, False)

    def end(self) -> None:
        """The client has said all."""
        exchange = self._exchange
        if exchange is None:
            return
        exchange.send_data(b"", True)
        if self._exchange is None:  # that was the end of it
            return
        if exchange.protocol != "HTTP/2":
            self._exchange = None
            exchange.hang_up()
            self.connection_lost(None)

    def close(self) -> None:
        """The client's connection has ended."""
        exchange = self._exchange
        if exchange is None:
            return
        downstream = self.peer
        if self._eof and downstream is not None and downstream._eof:
            self._exchange = None
            self.lost = True
            exchange.send_data(b"", True)
            exchange.let_go()
        else:
            self.abort()

    @property
    def is_over(self) -> bool:
        """Whether nothing can be sent, nor come."""
        return self._exchange is None

    def hold(self) -> None:
        """The client does not take what comes."""
        if self._exchange is not None:
            self._exchange.pause_reading()

    def go_on(self) -> None:
        """It does again."""
        if self._exchange is not None:
            self._exchange.resume_reading()

    # -- the pool's and the exchange's calls

    def on_connected(self, exchange: Any) -> None:
        """There is a connection."""
        self._exchange = exchange
        if exchange.protocol == "HTTP/2":
            exchange.half_closes = True
        head = self._head
        exchange.send_head(head, (), ended=False, trailers=None, upgrade=b"CONNECT" if head.method == b"CONNECT" else None)

    def on_pool_failure(self, reason: str, failure: str | None) -> None:
        """There is none, and will be none."""
        pool = self._pool
        session = self._session
        session.failed(reason, failure or "")
        if reason is pools.OVERFLOW and pool is not None and pool.limits.rq < pool.limits.max_rq:
            session.host = None  # it did not get as far as a connection of the host
        self._answer(False)

    def on_response_whole(self, known: KnownResponse, body: bytes) -> None:
        """All at once."""
        self.on_response_headers(ResponseHead(known.status, known.items.copy()), not body)
        if body and self._exchange is not None:
            self.on_response_data(body, True)

    def on_response_headers(self, head: ResponseHead, end_stream: bool) -> None:
        """The answer, or what comes before it."""
        status = head.status
        exchange = self._exchange
        if (status < 200 and status != 101) or exchange is None:
            return
        session = self._session
        session.proxy.tunneling.tell_headers(session, status, head)
        if end_stream or not (status == 200 if self._strictly else 200 <= status < 300):
            self._exchange = None
            exchange.abort()
            session.failed(pools.REMOTE_RESET, f"tunnel_response:{status}")
            self._answer(False)
            return
        self._answer(True)
        session.established(self, exchange.info)

    def on_response_data(self, data: bytes, end_stream: bool) -> None:
        """What the other end said."""
        if data:
            self.data_received(data)
        if end_stream:
            self._said_all()

    def on_response_trailers(self, trailers: Headers) -> None:
        """Its end."""
        self._session.proxy.tunneling.tell_trailers(self._session, trailers)
        self._said_all()

    def _said_all(self) -> None:
        exchange = self._exchange
        if exchange is None or self.eof_received():
            return
        # Both have.
        self._exchange = None
        exchange.let_go()
        self.connection_lost(None)

    def on_upstream_reset(self, reason: str, details: str) -> None:
        """The connection broke, or the stream was reset."""
        self._exchange = None
        if self.peer is None:
            self._session.failed(reason, "")
            self._answer(False)
        elif reason in _RESET and not self._eof:
            self.connection_lost(ConnectionResetError())
        else:
            self.connection_lost(None)

    def on_upstream_done_early(self) -> None:
        """The response is complete, and nothing more can be sent."""
        self._exchange = None
        self.connection_lost(None)

    def on_upstream_writable(self, writable: bool) -> None:
        """The upstream takes less than comes, or enough again."""
        self.full = not writable
        if writable:
            self.resume_writing()
        else:
            self.pause_writing()

    def on_read_end(self) -> None:
        """Everything that has come was handed over already."""

    def _answer(self, agreed: bool) -> None:
        if not self.answered.done():
            self.answered.set_result(agreed)


class _Carrier:
    """A tunnel as the transport that the client's side writes to and holds back."""

    __slots__ = ("abort", "close", "pause_reading", "resume_reading", "tunnel", "write", "write_eof")

    def __init__(self, tunnel: Tunnel) -> None:
        self.tunnel = tunnel
        self.write = tunnel.send
        self.write_eof = tunnel.end
        self.close = tunnel.close
        self.abort = tunnel.abort
        self.pause_reading = tunnel.hold
        self.resume_reading = tunnel.go_on

    def is_closing(self) -> bool:
        """Whether it is of no use any more."""
        return self.tunnel.is_over
