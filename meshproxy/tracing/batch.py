"""Spans that wait until there are some of them, or until some have waited for long enough."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

from meshproxy.net import tasks

if TYPE_CHECKING:
    from meshproxy.context import Context

_T = TypeVar("_T")


class Batch(Generic[_T]):
    """`send` gets lists of what was `put`, in a task. No more than `limit` wait or are being sent: `put` refuses what comes on top.

    `prefix`: of Envoy's runtime keys, which are asked each time: `<prefix>.min_flush_spans` (5) and `<prefix>.flush_interval_ms` (5000).
    """

    def __init__(self, context: Context, prefix: str, limit: int, send: Callable[[list[_T]], Coroutine[Any, Any, None]], on_timer: Callable[[], None]) -> None:
        self._loop = context.loop
        self._integer = context.runtime.integer
        self._enough, self._interval = f"{prefix}.min_flush_spans", f"{prefix}.flush_interval_ms"
        self._limit = limit
        self._send = send
        self._timed = on_timer
        self._waiting: list[_T] = []
        self._under_way = 0
        self._timer: asyncio.TimerHandle | None = None
        context.shared.setdefault("span batches", WeakSet()).add(self)  # the worker looks here before it ends

    @property
    def busy(self) -> bool:
        """Whether anything is being sent."""
        return self._under_way > 0

    def put(self, one: _T) -> bool:
        """One more; whether there is room for it."""
        waiting = self._waiting
        if len(waiting) + self._under_way >= self._limit:
            return False
        waiting.append(one)
        if len(waiting) >= self._integer(self._enough, 5):
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._integer(self._interval, 5000) / 1000, self._on_timer)
        return True

    def _on_timer(self) -> None:
        self._timer = None
        self._timed()
        self.flush()

    def flush(self) -> None:
        """Send what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        some, self._waiting = self._waiting, []
        if some:
            self._under_way += len(some)
            tasks.spawn("trace export", self._run(some))

    async def _run(self, some: list[_T]) -> None:
        try:
            await self._send(some)
        finally:
            self._under_way -= len(some)
