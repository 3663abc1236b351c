"""One write for each connection per turn of the event loop, whatever made it have something to say.

HTTP/2 connections carry many streams: one read of an upstream can be answers for several of them, and several reads can be for the same one. Whoever gets
output registers here; when everything that was ready has been handled, all are flushed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

    from meshproxy.context import Context


class Flushable(Protocol):
    """A connection with output."""

    def flush(self) -> None:
        """Write what there is. Must not raise."""
        ...


class Flusher:
    """Of one event loop."""

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[Flushable] = []

    def add(self, connection: Flushable) -> None:
        """HOT: flush `connection` before the loop waits again. To be called once until that happens."""
        waiting = self._waiting
        if not waiting:
            self._loop.call_soon(self._flush)
        waiting.append(connection)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            connection.flush()


def flusher_of(context: Context) -> Flusher:
    """The one of a context's loop, made when it is first asked for."""
    made = context.shared.get(Flusher)
    if made is None:
        made = context.shared[Flusher] = Flusher(context.loop)
    return made
