"""What a worker asks main for because a request needs it: virtual hosts (VHDS) and clusters (ODCDS). Whoever asks is woken when main has an answer, which
comes after everything that the answer is about.

Clients choose what is asked for, so main bounds what it remembers of it: names may be so long, and so many that nothing is known of stay asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

HOST, CLUSTER = "host", "cluster"
MAX_NAME = 1024  # bytes; nobody has such a host or cluster
MAX_NAMES = 4096  # of one source

# What is asked for: HOST, the key of a route configuration (`route_configs.key_of`) and a host; or CLUSTER, a serialised ConfigSource and a cluster's name.
What = tuple[str, bytes, str]


def name_of(text: bytes) -> str | None:
    """A name as it can be asked for; None for one that nobody has."""
    if len(text) > MAX_NAME:
        return None
    try:
        return text.decode()
    except UnicodeDecodeError:  # the names of resources are UTF-8
        return None


class Demand:
    """All questions of one worker that are not answered. `ask(what, timeout)`: tells main, once for all who wait for the same."""

    def __init__(self, ask: Callable[[What, float], None]) -> None:
        self._ask = ask
        self._waiting: dict[What, list[asyncio.Future[bool]]] = {}

    async def wait(self, what: What, timeout: float = 0.0) -> bool:
        """Wait for the answer: whether it is there now. `timeout`: seconds that main has for one, of who asks first; 0.0: as long as it takes."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(what, [])
        waiting.append(future)
        if len(waiting) == 1:
            self._ask(what, timeout)
        try:
            return await future
        finally:
            if future in waiting:
                waiting.remove(future)
                if not waiting:
                    self._waiting.pop(what, None)

    def answered(self, what: What, *, found: bool) -> None:
        """Main has an answer."""
        for future in self._waiting.pop(what, ()):
            if not future.done():
                future.set_result(found)
