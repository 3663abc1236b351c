"""Pools of HTTP/1.1 connections, and of connections for what a terminated CONNECT carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.upstream.http1 import Http1Connection, RawConnection
from meshproxy.upstream.pool import METERED, OVERFLOW, Pool

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.http2_pool import AutoPool
    from meshproxy.upstream.stats import ClusterStats


class Http1Pool(Pool):
    """Connections that serve one request at a time."""

    alpn: tuple[str, ...] = ("http/1.1",)

    def __init__(self, cluster: Cluster, host: Host, priority: int, context: Context, server_name: str | None = None) -> None:
        super().__init__(cluster, host, priority, context, server_name)
        self.h1_options = cluster.h1_options
        self.spelling = cluster.header_case
        self.special = bool(self.max_requests)  # `release` has more to do than to keep the connection

    def make(self) -> Http1Connection:
        """See `Pool.make`."""
        return new_http1_connection(self)

    def count_dial(self) -> None:
        """Count a connection by its protocol."""
        count_http1(self.stats)

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
            connection: Http1Connection = ready.pop()
            connection.request = request
            limits.rq += 1
            self.stats.upstream_rq_total.n += 1
            host = self.host
            host.rq_total += 1
            host.rq_active += 1
            connection.served += 1
            return connection
        return super().acquire(request)

    def release(self, connection: Http1Connection) -> None:
        """HOT: see `Pool.release`."""
        if self.special and is_spent(self, connection):
            connection.close()
            return
        self.ready.append(connection)
        if self.pending:
            self.serve_pending()

    def drain_one(self, connection: Any) -> None:
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
    acquire = Pool.acquire

    def make(self) -> RawConnection:
        """See `Pool.make`."""
        return RawConnection(self)

    def count_dial(self) -> None:
        """It has no protocol to be counted by."""


def new_http1_connection(pool: Http1Pool | AutoPool) -> Http1Connection:
    """A connection that is metered where a log asks for it."""
    if METERED in pool.context.shared:
        from meshproxy.upstream.metered import MeteredConnection

        return MeteredConnection(pool)
    return Http1Connection(pool)


def count_http1(stats: ClusterStats) -> None:
    """Count a connection as one that speaks HTTP/1.1."""
    stats.declare_codec()
    stats.upstream_cx_http1_total.n += 1


def is_spent(pool: Pool, connection: Http1Connection) -> bool:
    """Whether `connection`, which has no request any more, is to have no other one."""
    if connection.draining or (pool.draining and not pool.pending):
        return True
    if pool.max_requests and connection.served >= pool.max_requests:
        pool.stats.upstream_cx_max_requests.n += 1
        return True
    return False
