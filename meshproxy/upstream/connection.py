"""What connections to upstream hosts have in common, whatever they carry: who dialled them and when, and how long they may live."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from meshproxy.net import dial
from meshproxy.upstream.options import IDLE_TIMEOUT

if TYPE_CHECKING:
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.upstream.pool import Pool


class Connection(asyncio.Protocol):
    """A connection of a pool."""

    __slots__ = (
        "_duration_timer",
        "_idle_timer",
        "_info",
        "closed",
        "connected_at",
        "dialled_at",
        "draining",
        "host",
        "idle_since",
        "made_at",  # for TLS: when the socket was connected and the handshake began
        "pool",
        "served",
        "stats",
        "transport",
    )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.host = pool.host
        self.stats = pool.stats
        self.transport: Any = None
        self.served = 0  # requests
        self.closed = False
        self.draining = False  # takes no more requests, and closes after those that it has
        self.connected_at = self.dialled_at = self.idle_since = 0.0
        self.made_at = pool.context.clock()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._duration_timer: asyncio.TimerHandle | None = None
        self._info: ConnectionInfo | None = None

    @property
    def active(self) -> int:
        """Requests that are being served."""
        raise NotImplementedError

    @property
    def room(self) -> int:
        """How many more it takes now."""
        raise NotImplementedError

    def take(self, request: Any) -> Any:
        """The exchange of `request`. The connection is the last of those that are ready, and perhaps not ready afterwards."""
        raise NotImplementedError

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

    def close(self) -> None:
        """Close once. An upstream that has not taken all of a request by now need not take the rest, and could keep us waiting."""
        if not self.closed:
            self.closed = True
            self.pool.forget(self)
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            else:
                self.transport.close()

    def flush_and_close(self) -> None:
        """Close once, when all that was written has gone out. An upstream that does not take it has as long as an idle connection."""
        if self.closed:
            return
        self.closed = True
        self.pool.forget(self)
        if self.transport.get_write_buffer_size():
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            self._idle_timer = self.pool.context.loop.call_later(self.pool.cluster.idle_timeout or IDLE_TIMEOUT, self.transport.abort)
        self.transport.close()

    def drain(self) -> None:
        """Take no more requests; close now when idle, else after the last one."""
        self.draining = True
        if not self.active:
            self.close()

    def watch(self, idle_timeout: float, max_duration: float) -> None:
        """Close when idle for `idle_timeout` seconds, and drain after `max_duration`; 0: never.

        One timer for idleness, checked lazily: using the connection costs nothing.
        """
        loop = self.pool.context.loop
        if idle_timeout:
            self._idle_timer = loop.call_later(idle_timeout, self._check_idle, idle_timeout)
        if max_duration:
            self._duration_timer = loop.call_later(max_duration, self._duration_reached)

    def _check_idle(self, timeout: float) -> None:
        self._idle_timer = None
        if self.closed:
            return
        left = timeout if self.active else self.idle_since + timeout - self.pool.context.clock()
        if left <= 0.0005:
            self.stats.upstream_cx_idle_timeout.n += 1
            self.close()
        else:
            self._idle_timer = self.pool.context.loop.call_later(left, self._check_idle, timeout)

    def _duration_reached(self) -> None:
        self._duration_timer = None
        if not self.closed and not self.draining:
            self.stats.upstream_cx_max_duration_reached.n += 1
            self.pool.drain_one(self)

    def ended(self) -> None:
        """The transport is gone: stop the timers and count."""
        for timer in (self._idle_timer, self._duration_timer):
            if timer is not None:
                timer.cancel()
        self._idle_timer = self._duration_timer = None
        stats = self.stats
        if self.closed:
            stats.upstream_cx_destroy_local.n += 1
        else:
            self.closed = True
            stats.upstream_cx_destroy_remote.n += 1
        stats.upstream_cx_destroy.n += 1

    def __repr__(self) -> str:
        state = "closed" if self.closed else "busy" if self.active else "idle"
        return f"<{type(self).__name__} {self.host.address.text} {state} served={self.served}>"
