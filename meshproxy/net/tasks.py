"""The one place that starts tasks: each has a name, stays referenced until it is done, and reports its failure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_running: set[asyncio.Task[Any]] = set()  # the event loop itself only keeps weak references


def spawn(name: str, coro: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    """Run `coro` on the running loop. Cancel or await the task, or let it go: a failure that nobody awaited is logged with `name`."""
    task = asyncio.get_running_loop().create_task(coro, name=name)
    _running.add(task)
    task.add_done_callback(_done)
    return task


def running() -> tuple[asyncio.Task[Any], ...]:
    """The tasks that are not done yet: for shutdown and for tests."""
    return tuple(_running)


def _done(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled():
        error = task.exception()
        if error is not None:
            log.error("task %s failed", task.get_name(), exc_info=error)
