"""Draining: telling downstream connections to go away, at once or little by little.

Envoy's rules (`drain_manager_impl.cc`): a failed health check drains every listener of the default type; after that a gradual drain closes each
connection that finishes a response with a probability that grows from 0 to 1 over the drain time, so that clients do not come back all together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from random import Random
from typing import Protocol


class Drainable(Protocol):
    """What holds downstream connections, such as an HTTP connection manager."""

    def drain_connections(self) -> None:
        """Close idle connections now and the others after their response."""

    def drain_changed(self) -> None:
        """`Drain.active` may have changed."""


class Drain:
    """The drain state of one process. `seconds`: the drain time. `active` is False in normal operation: hot code looks at nothing else."""

    __slots__ = ("_clock", "_items", "_random", "_started", "active", "health_failed", "immediate", "seconds")

    def __init__(self, clock: Callable[[], float], random: Random, seconds: float = 600.0, *, immediate: bool = False) -> None:
        self._clock = clock
        self._random = random
        self.seconds = seconds
        self.immediate = immediate
        self._started: float | None = None
        self.health_failed = False
        self.active = False
        self._items: weakref.WeakSet[Drainable] = weakref.WeakSet()

    def register(self, item: Drainable) -> None:
        """`item.drain_connections()` is called by `close_connections`. Held weakly."""
        self._items.add(item)

    def start(self) -> None:
        """Begin to drain; no effect when it has begun."""
        if self._started is None:
            self._started = self._clock()
        self.active = True
        self._tell()

    def set_health_failed(self, failed: bool) -> None:
        """/healthcheck/fail and /healthcheck/ok."""
        self.health_failed = failed
        self.active = failed or self._started is not None
        self._tell()

    def _tell(self) -> None:
        for item in list(self._items):
            item.drain_changed()

    @property
    def draining(self) -> bool:
        """Whether `start` was called."""
        return self._started is not None

    def close_now(self, modify_only: bool = False) -> bool:
        """Whether a connection that could be closed now should be. `modify_only`: the listener's drain_type is MODIFY_ONLY."""
        if self.health_failed and not modify_only:
            return True
        if self._started is None:
            return False
        elapsed = self._clock() - self._started
        if self.immediate or elapsed >= self.seconds:
            return True
        return elapsed > self._random.random() * self.seconds

    def close_connections(self) -> None:
        """Tell everything registered to close its connections as soon as they are idle."""
        for item in list(self._items):
            item.drain_connections()
