"""Timers for many things with the same duration, at the cost of a dict entry each.

A timer of the event loop per request costs more than most of what else a request does. Timeouts of one duration expire in the order in which they were
started, so one loop timer for the oldest is enough: `TimeoutQueue` keeps the others in insertion order. Starting and stopping a timeout are one dict
operation, and code on the hot path does them on `started` directly while `handle` is not None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio


class TimeoutQueue:
    """All running timeouts of `seconds`. `on_expired(item)` is called once for an item that is still in the queue when its time is over.

    Starting an item again while it runs does not move its place: stop it first. Items are hashed, so use objects that compare by identity.
    """

    __slots__ = ("_clock", "_loop", "handle", "on_expired", "seconds", "started")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float], seconds: float, on_expired: Callable[[Any], None]) -> None:
        self._loop = loop
        self._clock = clock
        self.seconds = seconds
        self.on_expired = on_expired
        self.started: dict[Any, float] = {}
        self.handle: asyncio.TimerHandle | None = None

    def start(self, item: Any, now: float) -> None:
        """`now`: the clock's present time, which the caller mostly has at hand."""
        self.started[item] = now
        if self.handle is None:
            self.handle = self._loop.call_later(self.seconds, self._tick)

    def stop(self, item: Any) -> None:
        """No-op for an item that is not running."""
        self.started.pop(item, None)

    def _tick(self) -> None:
        self.handle = None
        started = self.started
        horizon = self._clock() - self.seconds
        while started:
            item = next(iter(started))
            at = started[item]
            if at > horizon + 0.0005:  # half a millisecond of rounding in the loop's timer
                self.handle = self._loop.call_later(at - horizon, self._tick)
                return
            del started[item]
            self.on_expired(item)

    def close(self) -> None:
        """Forget all items."""
        self.started.clear()
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None


class Timers:
    """The queues of a process, shared by duration and purpose."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._queues: dict[tuple[float, Callable[[Any], None]], TimeoutQueue] = {}

    def queue(self, seconds: float, on_expired: Callable[[Any], None]) -> TimeoutQueue:
        """The queue for `seconds`; `on_expired` should be a plain function or a class's method taken from the class, so that equal callers share one."""
        key = seconds, on_expired
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = TimeoutQueue(self._loop, self._clock, seconds, on_expired)
        return queue

    def close(self) -> None:
        """Stop every queue."""
        for queue in self._queues.values():
            queue.close()
