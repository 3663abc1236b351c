"""What of a stream waits while a filter holds it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from meshproxy.http.replies import Reply
from meshproxy.net import tasks

if TYPE_CHECKING:
    from meshproxy.http.stream import Stream

log = logging.getLogger("meshproxy.http")

DATA, TRAILERS = range(2)  # what may have to wait


class Buffering:
    """A filter that waits for the whole request body, or (`partly`) for so much of it."""

    __slots__ = ("done", "limit", "partly")

    def __init__(self, limit: int, done: asyncio.Future[bool], partly: bool) -> None:
        self.limit = limit
        self.done = done
        self.partly = partly


class Hold:
    """One direction of a stream that waits for a filter: the filter's task, and what arrived meanwhile.

    Above `limit` queued bytes reading is paused (the request) or the upstream is (the response).
    """

    __slots__ = ("_buffering", "_paused", "_queue", "_replay", "_task", "_to_await", "limit", "size", "stream")

    def __init__(self, stream: Stream, replay: Callable[[int, Any, bool, int], None], limit: int) -> None:
        self.stream = stream
        self._replay = replay
        self.limit = limit
        self.size = 0
        self._queue: list[tuple[int, Any, bool, int]] = []  # kind, payload, end of stream, the hook at which it goes on
        self._task: asyncio.Task[None] | None = None
        self._to_await: Awaitable[Any] | None = None  # until the task has begun
        self._buffering: Buffering | None = None
        self._paused = False

    def wait(self, awaitable: Awaitable[Any], resume: Callable[[Any], Any]) -> None:
        self._to_await = awaitable
        self._task = tasks.spawn("http filter", self._run(awaitable, resume))

    async def _run(self, awaitable: Awaitable[Any], resume: Callable[[Any], Any]) -> None:
        stream = self.stream
        self._to_await = None
        try:
            result = await awaitable
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("a filter failed while it held %r", stream)
            stream.local_reply(Reply(500, details="filter_error"), replace=stream._response_hold is self)
            return
        mine = self._task
        if stream.ended:
            return
        if type(result) is Reply:
            stream.local_reply(result, replace=stream._response_hold is self)
            return
        resume(result)
        # The walk may have stopped at the next awaitable; then the queue goes on waiting for that one.
        if self._task is mine and not stream.ended:
            self._unpause()  # first: whoever takes the queue now may have to pause for reasons of its own
        while self._task is mine and not stream.ended:
            if not self._queue:
                stream.release_hold(self)
                return
            kind, payload, end_stream, position = self._queue.pop(0)
            if kind == DATA:
                self.size -= len(payload)
            self._replay(kind, payload, end_stream, position)

    def watch(self, buffering: Buffering) -> None:
        self._buffering = buffering
        self._check()
        if not buffering.done.done():
            self._unpause()  # whoever waited before may have had enough

    def unwatch(self) -> None:
        """Nobody waits for the body any more: from here on what comes is held back above the limit."""
        self._buffering = None

    def body(self, limit: int) -> tuple[bytes, bool]:
        """The first bytes that wait, and whether there are more."""
        size = 0
        pieces = []
        for kind, payload, _, _ in self._queue:
            if kind == DATA and size < limit:
                pieces.append(payload[: limit - size])
                size += len(pieces[-1])
        return b"".join(pieces), self.size > limit

    def put(self, kind: int, payload: Any, end_stream: bool, position: int = 0) -> None:
        if kind == DATA:
            self.size += len(payload)
        self._queue.append((kind, payload, end_stream, position))
        if self._buffering is not None:
            self._check()
        elif self.size > self.limit and not self._paused:
            self._paused = True
            if self.stream._response_hold is self:
                self.stream.on_writable(False)
            else:
                self.stream.pause_request()

    def put_back(self, kind: int, payload: Any, end_stream: bool, position: int) -> None:
        """The same, but before all that has come since."""
        self.size += len(payload)
        self._queue.insert(0, (kind, payload, end_stream, position))

    def over(self, limit: int) -> bool:
        """Whether more than `limit` bytes wait. As for Envoy, what comes whole in one frame of HTTP/2 does not: it could go on at once."""
        if self.size <= limit:
            return False
        kind, _, end_stream, _ = self._queue[0]
        return kind != DATA or not end_stream or self.stream.request.version < 20  # type: ignore[union-attr]  # it is being held

    def _check(self) -> None:
        buffering = self._buffering
        if buffering is None or buffering.done.done():
            return
        if buffering.partly and self.size >= buffering.limit:
            buffering.done.set_result(True)
        elif not buffering.partly and self.over(buffering.limit):
            buffering.done.set_result(False)
        elif (self._queue and self._queue[-1][2]) or self.stream.request_ended:
            buffering.done.set_result(True)

    def _unpause(self) -> None:
        if self._paused:
            self._paused = False
            if self.stream._response_hold is not self:
                self.stream.resume_request()
            elif not self.stream.codec.full:
                self.stream.on_writable(True)

    def cancel(self) -> None:
        task = self._task
        self._task = None
        self._queue.clear()
        if task is not None and task is not _current_task():
            task.cancel()
            if isinstance(self._to_await, Coroutine):
                self._to_await.close()  # nobody will
        if self._paused and not self.stream.ended:
            self._unpause()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
