"""Pools of HTTP/1.1 connections, and of connections for what a terminated CONNECT carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.parser import UNTIL_CLOSE, Options
from meshproxy.upstream.http1 import Http1Connection, RawConnection
from meshproxy.upstream.pool import METERED, OVERFLOW, Pool

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host


class Http1Pool(Pool[Http1Connection]):
    """Connections that serve one request at a time."""

    alpn: tuple[str, ...] = ("http/1.1",)

    def __init__(self, cluster: Cluster, host: Host, priority: int, context: Context, server_name: str | None = None) -> None:
        super().__init__(cluster, host, priority, context, server_name)
        self.options: Options = cluster.h1_options
        self.spelling = cluster.header_case
        self.special = bool(self.max_requests)  # `release` has more to do than to keep the connection

    def make(self) -> Http1Connection:
        """A protocol for a new connection."""
        if METERED in self.context.shared:
            from meshproxy.upstream.metered import MeteredConnection

            return MeteredConnection(self)
        return Http1Connection(self)

    def count_dial(self) -> None:
        """Count a connection by its protocol."""
        self.stats.declare_codec()
        self.stats.upstream_cx_http1_total.n += 1

    def acquire(self, request: Any) -> Http1Connection | None:
        """HOT: see `Pool.acquire`."""
        ready = self.ready
        if ready and self.ratio <= 1.0:
            limits = self.limits
            if limits.rq >= limits.max_rq:
                self.stats.upstream_rq_active_overflow.n += 1
                request.on_pool_failure(OVERFLOW, None)
                return None
            # As in `_attach`.
            connection = ready.pop()
            connection.request = request
            limits.rq += 1
            self.stats.upstream_rq_total.n += 1
            host = self.host
            host.rq_total += 1
            host.rq_active += 1
            connection.served += 1
            return connection
        return super().acquire(request)

    def begin(self, connection: Http1Connection, request: Any) -> Http1Connection:
        """Take the connection for `request`."""
        self.ready.pop()
        connection.request = request
        return connection

    def begin_planned(self, stream: Any) -> Http1Connection:
        """HOT: see `http.lane.Lane.begin`."""
        connection = self.ready.pop()
        connection.request = connection.planned = stream
        connection.served += 1
        return connection

    def release(self, connection: Http1Connection) -> None:
        """HOT: see `Pool.release`."""
        if self.special and self._is_spent(connection):
            connection.close()
            return
        self.ready.append(connection)
        if self.pending:
            self.serve_pending()

    def _is_spent(self, connection: Http1Connection) -> bool:
        if connection.draining or (self.draining and not self.pending):
            return True
        if self.max_requests and connection.served >= self.max_requests:
            self.stats.upstream_cx_max_requests.n += 1
            return True
        return False

    def drain_one(self, connection: Http1Connection) -> None:
        """See `Pool.drain_one`."""
        self.special = True
        super().drain_one(connection)

    def drain(self) -> None:
        """See `Pool.drain`."""
        self.special = True
        super().drain()


class RawPool(Http1Pool):
    """Connections without HTTP."""

    alpn = ()

    def make(self) -> RawConnection:
        """A protocol for a new connection."""
        return RawConnection(self)

    def count_dial(self) -> None:
        """It has no protocol."""

    acquire = Pool.acquire

    def begin(self, connection: Http1Connection, request: Any) -> Http1Connection:
        """Whatever comes is for `request`."""
        connection.parser.state = UNTIL_CLOSE
        return super().begin(connection, request)
