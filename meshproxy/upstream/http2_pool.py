"""Pools of HTTP/2 connections, and of those whose protocol ALPN decides."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from meshproxy.net.flusher import flusher_of
from meshproxy.upstream.http1_pool import count_http1, is_spent, new_http1_connection
from meshproxy.upstream.http2 import Http2Connection
from meshproxy.upstream.pool import METERED, Pool

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.connection import Connection
    from meshproxy.upstream.host import Host


class Http2Pool(Pool):
    """Connections that serve as many requests at once as both sides allow; another one is dialled when all are full."""

    alpn: tuple[str, ...] = ("h2",)

    def __init__(self, cluster: Cluster, host: Host, priority: int, context: Context, server_name: str | None = None) -> None:
        super().__init__(cluster, host, priority, context, server_name)
        self.h2_options = cluster.h2_options
        self.flusher = flusher_of(context)
        self.expected_streams: int = self.h2_options.max_concurrent_streams  # that the host will allow, as far as it is known
        self.learns = bool(server_name or (host.transport is not None and host.transport.sni))  # as Envoy, which keeps what it learns by server name

    def make(self) -> Any:
        """A protocol for a new connection."""
        return new_http2_connection(self)

    def count_dial(self) -> None:
        """Count a connection by its protocol."""
        self.stats.upstream_cx_http2_total.n += 1

    def room_expected(self) -> int:
        """See `Pool.room_expected`."""
        each = min(self.expected_streams, self.h2_options.max_concurrent_streams)
        return self.connecting * max(min(each, self.max_requests) if self.max_requests else each, 1)

    def release(self, connection: Any) -> None:
        """See `Pool.release`: here also of one that was not full."""
        if connection.draining or (self.draining and not self.pending):
            self.drain_one(connection)
            return
        if not connection.is_ready and connection.room > 0:
            connection.is_ready = True
            self.ready.append(connection)
        if self.pending and self.ready:
            self.serve_pending()

    def learn(self, connection: Http2Connection) -> None:
        """The host said how many requests a connection may have. One that takes none now will take some when it is asked anew."""
        if self.learns:
            self.expected_streams = connection.session.peer_max_streams or self.h2_options.max_concurrent_streams
        if connection not in self.connections or connection.closed or connection.draining:
            return
        if connection.room > 0:
            self.release(connection)
        else:
            self.forget(connection)

    def forget(self, connection: Any) -> None:
        """See `Pool.forget`."""
        if connection.is_ready:
            connection.is_ready = False
            self.ready.remove(connection)


def new_http2_connection(pool: Http2Pool) -> Http2Connection:
    """A connection that is metered where a log asks for it."""
    if METERED in pool.context.shared:
        from meshproxy.upstream.http2_metered import MeteredHttp2Connection

        return MeteredHttp2Connection(pool)
    return Http2Connection(pool)


class AutoPool(Http2Pool):
    """Connections that speak HTTP/2 or HTTP/1.1, as the host chose by ALPN: HTTP/1.1 when it did not."""

    alpn = ("h2", "http/1.1")

    def __init__(self, cluster: Cluster, host: Host, priority: int, context: Context, server_name: str | None = None) -> None:
        super().__init__(cluster, host, priority, context, server_name)
        self.h1_options = cluster.h1_options
        self.spelling = cluster.header_case
        self.special = True  # HTTP/1 connections come back through `release`

    def make(self) -> _Undecided:
        """See `Pool.make`."""
        return _Undecided(self)

    def made(self, protocol: _Undecided) -> Connection:
        """See `Pool.made`."""
        return protocol.connection

    def count_dial(self) -> None:
        """Counted when the protocol is known."""

    def choose(self, alpn: str | None) -> Connection:
        """The connection for the protocol that was negotiated. As for Envoy, it is one more connection than that which was dialled."""
        self.host.cx_total += 1
        self.stats.upstream_cx_total.n += 1
        if alpn == "h2":
            super().count_dial()
            return new_http2_connection(self)
        count_http1(self.stats)
        if self.learns:
            self.expected_streams = 1
        return new_http1_connection(self)

    def release(self, connection: Any) -> None:
        """See `Pool.release`."""
        if isinstance(connection, Http2Connection):
            super().release(connection)
        elif is_spent(self, connection):
            connection.close()
        else:
            self.ready.append(connection)
            if self.pending:
                self.serve_pending()

    def forget(self, connection: Any) -> None:
        """See `Pool.forget`."""
        if isinstance(connection, Http2Connection):
            super().forget(connection)
        elif connection in self.ready:
            self.ready.remove(connection)


class _Undecided(asyncio.Protocol):
    """A connection up to the end of its handshake."""

    connection: Connection

    def __init__(self, pool: AutoPool) -> None:
        self._pool = pool

    def connection_made(self, transport: Any) -> None:
        self.connection = self._pool.choose(transport.get_extra_info("ssl_object").selected_alpn_protocol())
        transport.set_protocol(self.connection)
        self.connection.connection_made(transport)
