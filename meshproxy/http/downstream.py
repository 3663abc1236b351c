"""What downstream connections have in common, whatever version of HTTP they speak: their life, its counters, and how they are closed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.net.connection import ConnectionInfo

NEVER = float("inf")


class DownstreamConnection(asyncio.Protocol):
    """One downstream connection of an HTTP connection manager. Times are seconds of the connection manager's clock."""

    __slots__ = (
        "_check_at",
        "_discarding",
        "_expiry",
        "_local",
        "_paused",
        "_timer",
        "_unsent",
        "full",
        "idle_since",
        "info",
        "manager",
        "requests",
        "spoken",
        "started",
        "stats",
        "transport",
    )

    protocol: str  # as logs name it

    def __init__(self, manager: HttpConnectionManager, info: ConnectionInfo) -> None:
        self.manager = manager
        self.info = info
        self.stats = manager.stats
        self.transport: Any = None
        self.requests = 0  # that have begun
        self.started = self.idle_since = 0.0
        self.spoken = False  # something came: only then does it speak HTTP for the statistics
        self.full = False  # too much waits to be sent
        self._discarding = False  # nothing that still comes is read
        self._local = False  # it was us who closed
        self._paused = False
        self._unsent = 0  # bytes not yet sent when the wait for closing began
        self._timer: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._check_at = NEVER  # when the idle timer fires

    # -- the version's part

    def flush(self) -> None:
        """Send what was kept back."""
        raise NotImplementedError

    def drain(self) -> None:
        """The listener is draining: close as soon as nothing is going on."""
        raise NotImplementedError

    def _start_drain(self, reason: str) -> None:
        """The connection is to end, in a way that loses no request."""
        raise NotImplementedError

    def _check_idle(self) -> None:
        """The idle timer fired."""
        raise NotImplementedError

    # -- its life

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        manager = self.manager
        self.started = self.idle_since = manager.clock()
        transport.set_write_buffer_limits(manager.buffer_limit)
        manager.connection_opened(self)
        if manager.idle_timeout:
            self._watch(manager.idle_timeout)
        if manager.max_connection_duration:
            self._expiry = manager.loop.call_later(manager.max_connection_duration, self._expire)

    def take_over(self, before: DownstreamConnection) -> None:
        """Be the connection that `before` was until now."""
        manager = self.manager
        self.transport = before.transport
        self.started = self.idle_since = before.started
        before._discarding = True
        before._stop_timers()
        manager.connections.remove(before)
        manager.connections.add(self)
        now = manager.clock()
        if manager.idle_timeout:
            self._watch(manager.idle_timeout)
        if manager.max_connection_duration:
            self._expiry = manager.loop.call_later(max(0.0, self.started + manager.max_connection_duration - now), self._expire)

    def eof_received(self) -> bool:
        """As Envoy: a client that closes its side has gone, whatever it still waits for, also inside a tunnel."""
        return False

    def _speak(self) -> None:
        self.spoken = True
        total, active = self.stats.by_protocol[self.protocol]
        total.n += 1
        active.n += 1

    def _lost(self, error: Exception | None, *, active: bool) -> None:
        """The connection is gone. `active`: requests were in flight."""
        self._discarding = True
        self._stop_timers()
        if isinstance(error, ConnectionResetError):
            self.info.detected_close = "RemoteReset"
        if active:
            self._count_active(local=self._local)

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._expiry):
            if timer is not None:
                timer.cancel()
        self._timer = self._expiry = None

    def _count_active(self, *, local: bool) -> None:
        """The connection ends while requests are in flight."""
        stats = self.stats
        stats.downstream_cx_destroy_active_rq.n += 1
        (stats.downstream_cx_destroy_local_active_rq if local else stats.downstream_cx_destroy_remote_active_rq).n += 1

    @property
    def closed_locally(self) -> bool:
        """Whether it was us who closed it."""
        return self._local

    def pause_reading(self) -> None:
        """Idempotent."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Idempotent."""
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def _expire(self) -> None:
        """max_connection_duration."""
        if not self._discarding:
            self.stats.downstream_cx_max_duration_reached.n += 1
            self._start_drain("duration_timeout")

    # -- the end

    def _close(self, *, delayed: bool, reason: str = "deferred_close_on_drained_connection") -> None:
        """Flush and close. `delayed`: the client may still be sending, and would lose our response to a reset if we closed at once (RFC 9112 9.6)."""
        if self._discarding:
            return
        self.info.local_close_reason = reason
        self.flush()
        self._discarding = True
        manager = self.manager
        if delayed and manager.delayed_close_timeout and not self.transport.is_closing():
            self.resume_reading()
            self._close_later()
        else:
            self._local = True
            self.transport.close()
            if manager.delayed_close_timeout and self.transport.get_write_buffer_size():
                self._close_later()

    def _close_later(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._replace_timer(self.manager.loop.call_later(self.manager.delayed_close_timeout, self._delayed_close))

    def _delayed_close(self) -> None:
        """The end, also of a client that does not take what is still to be sent. One that takes some of it gets the time once more, as from Envoy."""
        self._timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._close_later()
            return
        self._local = True
        self.info.local_close_reason = "triggered_delayed_close_timeout"
        self.stats.downstream_cx_delayed_close_timeout.n += 1
        if unsent:
            self.transport.abort()
        else:
            self.transport.close()

    # -- idle timeouts: one timer a connection, checked lazily

    def _watch(self, seconds: float) -> None:
        loop = self.manager.loop
        self._check_at = self.manager.clock() + seconds
        self._replace_timer(loop.call_later(seconds, self._check_idle))

    def watch_stream(self, seconds: float) -> None:
        """A stream has an idle timeout of its own: look again in `seconds` at the latest."""
        if self._check_at > self.manager.clock() + seconds or self._timer is None:
            self._watch(seconds)

    def _watch_streams(self) -> None:
        if self.manager.stream_idle_timeout:
            self._watch(self.manager.stream_idle_timeout)

    def _replace_timer(self, timer: asyncio.TimerHandle) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer
