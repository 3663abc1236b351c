"""Waiting for what tells nobody when it comes: statistics and log files of another process, the kernel's buffers, the end of strangers.

All of that kind is asked again and again here, so that pause and limit stand once. What can say so itself (a server of the test, a pipe, a transport, a
callback) is waited for by its event instead.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 90.0  # seconds until something that must happen counts as not happening; generous, because the machine may be busy


def _pauses() -> Iterator[float]:
    """Seconds between two looks: short at first, for most things come soon, then longer, for looking keeps a busy machine from what is waited for."""
    pause = 0.001
    while True:
        yield pause
        pause = min(pause * 1.5, 0.02)


def wait_until(look: Callable[[], Any], limit: float = PATIENCE) -> Any:
    """The first true value of `look()`. Raises TimeoutError after `limit` seconds."""
    deadline = time.monotonic() + limit
    late = False
    for pause in _pauses():
        if value := look():
            return value
        if late:
            raise TimeoutError(f"not within {limit} s")
        time.sleep(pause)
        late = time.monotonic() > deadline  # one look more: it may be the whole machine that stood still
    raise AssertionError("there is no last pause")


async def until(look: Callable[[], Any], limit: float = PATIENCE) -> Any:
    """The same in an event loop; what `look()` returns may have to be awaited."""
    async with asyncio.timeout(limit):
        for pause in _pauses():
            value = look()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(pause)
    raise AssertionError("there is no last pause")


async def quiet(count: Callable[[], Any], pause: float = 0.02, times: int = 1, limit: float = PATIENCE) -> Any:
    """What `count()` says, which may have to be awaited, once that was the same for `times` pauses: that something goes no further shows only in time."""
    last, same = None, -1
    async with asyncio.timeout(limit):
        while same < times:
            value = count()
            if inspect.isawaitable(value):
                value = await value
            same = same + 1 if value == last else 0
            last = value
            await asyncio.sleep(pause)
    return last
