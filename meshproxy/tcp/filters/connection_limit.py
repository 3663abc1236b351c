"""At most so many connections at a time (envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit).

A connection too many is closed, after `delay` if that is set; while it waits it counts as one of them, as in Envoy. All workers count together when the
context has shared cells, else each worker admits its share, rounded up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from meshproxy.api import errors, runtime
from meshproxy.api.durations import seconds
from meshproxy.net import shared

if TYPE_CHECKING:
    from envoy.extensions.filters.network.connection_limit.v3.connection_limit_pb2 import ConnectionLimit as ConnectionLimitProto

    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit"
HONOURS = {"envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit": "stat_prefix max_connections delay runtime_enabled"}


class ConnectionLimit:
    """The filter. Holds the ids of the connections that it counted."""

    def __init__(self, proto: ConnectionLimitProto, context: NetworkContext, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._sleep = sleep
        self._delay = seconds(proto.delay)
        flag = proto.runtime_enabled if proto.HasField("runtime_enabled") else None
        self._enabled = runtime.compile_flag(flag, context.context.runtime)
        identity = b"connection_limit:%b:%b" % (context.listener_prefix.encode(), proto.SerializeToString(deterministic=True))
        self._active, share = shared.counter_for(context.context, identity)
        self._limit = -(-proto.max_connections.value // share)
        scope = context.scope.scope(f"connection_limit.{proto.stat_prefix}.")
        self._limited = scope.counter("limited_connections")
        self._gauge = scope.gauge("active_connections")
        self._counted: set[int] = set()

    def on_connection(self, conn: ConnectionInfo) -> Awaitable[bool] | bool | None:
        enabled = self._enabled
        if not (enabled if isinstance(enabled, bool) else enabled()):
            return None
        self._counted.add(conn.id)
        self._gauge.n += 1
        if self._active.acquire(self._limit):
            return None
        self._active.add(1)
        self._limited.n += 1
        conn.local_close_reason = "over_connection_limit"
        return self._close_later() if self._delay else False

    def on_close(self, conn: ConnectionInfo) -> None:
        if conn.id in self._counted:
            self._counted.discard(conn.id)
            self._active.add(-1)
            self._gauge.n -= 1

    async def _close_later(self) -> bool:
        await self._sleep(self._delay)
        return False


def compile(proto: ConnectionLimitProto, context: NetworkContext) -> ConnectionLimit:
    """The filter for a ConnectionLimit proto. Raises ConfigError."""
    if not proto.stat_prefix:
        errors.fail("stat_prefix", "must not be empty")
    if proto.max_connections.value < 1:
        errors.fail("max_connections", "must be at least 1")
    return ConnectionLimit(proto, context)
