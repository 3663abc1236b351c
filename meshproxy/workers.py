"""The pool of worker processes, as main sees it: starts them, replaces those that die, talks to all of them at once.

See docs/decisions/0001-process-model.md.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable

from meshproxy import channel, process
from meshproxy.channel import Channel, ChannelClosed, Kind
from meshproxy.record import Record

log = logging.getLogger("meshproxy.main")

STOP_DEADLINE = 2.0  # seconds for a worker to flush and exit before it is killed
STABLE_AFTER = 10.0  # seconds of life after which a crash is the first again
BACKOFF = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before the n-th replacement in a row: the first comes at once


class Worker(Record, eq=False):
    """One slot of the pool. The process in it may change; the slot and its number stay."""

    index: int
    pid: int = 0
    lifeline: int = -1  # descriptor without which the process dies
    channel: Channel | None = None
    started: float = 0.0
    ready: bool = False
    idle: bool = False
    crashes: int = 0
    restart: asyncio.TimerHandle | None = None


class Events(Record):
    """What the pool tells its owner."""

    on_ready: Callable[[Worker], None]
    on_stats: Callable[[Worker, bytes], None]
    on_gone: Callable[[Worker], None]
    on_message: Callable[[Worker, Kind, bytes], None]  # everything else
    replay: Callable[[Worker], None]  # send a new worker what happened before it


class Pool:
    """The workers: forks them, replaces them when they die, and talks to all of them at once.

    `run_worker(index, channel socket)` runs in the child and returns when the worker is done. `keep(index)` are the descriptors that the child needs.
    """

    def __init__(
        self,
        size: int,
        loop: asyncio.AbstractEventLoop,
        run_worker: Callable[[int, socket.socket], None],
        keep: Callable[[int], set[int]],
        events: Events,
    ) -> None:
        self.workers = [Worker(index) for index in range(size)]
        self._loop = loop
        self._run_worker = run_worker
        self._keep = keep
        self._events = events
        self._stopping = False

    @property
    def size(self) -> int:
        """How many workers there are to be."""
        return len(self.workers)

    # -- life ------------------------------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Fork every worker."""
        for worker in self.workers:
            self._fork(worker)

    def _fork(self, worker: Worker) -> None:
        worker.restart = None
        if worker.crashes:
            # Whatever main threw away since the last time must not be frozen along, in this process for ever and in the new one.
            gc.unfreeze()
            gc.collect()
        ours, theirs = channel.pair()
        index = worker.index

        def run() -> None:
            self._run_worker(index, theirs)

        worker.pid, worker.lifeline = process.fork(run, {theirs.fileno(), *self._keep(index)})
        theirs.close()
        worker.started = time.monotonic()
        worker.ready = worker.idle = False
        worker.channel = Channel(ours, self._loop, lambda kind, body, _, __: self._on_message(worker, kind, body), lambda: self._on_eof(worker))
        self._events.replay(worker)

    def _on_message(self, worker: Worker, kind: Kind, body: bytes) -> None:
        if kind is Kind.STATS:
            self._events.on_stats(worker, body)
        elif kind is Kind.READY:
            worker.ready = True
            self._events.on_ready(worker)
        else:
            self._events.on_message(worker, kind, body)

    def _on_eof(self, worker: Worker) -> None:
        # A worker that closed its end is finished, even if its process hangs: SIGCHLD tells the rest.
        if worker.pid and not self._stopping:
            _kill(worker.pid, signal.SIGKILL)

    def on_exit(self, pid: int, code: int) -> None:
        """A child ended: replace it if it was a worker."""
        worker = next((worker for worker in self.workers if worker.pid == pid), None)
        if worker is None:
            return  # an orphan that we inherited as PID 1
        worker.pid = 0
        os.close(worker.lifeline)
        worker.ready = False
        if worker.channel is not None:
            worker.channel.close()
        self._events.on_gone(worker)
        if self._stopping:
            return
        lived = time.monotonic() - worker.started
        worker.crashes = 1 if lived > STABLE_AFTER else worker.crashes + 1
        delay = BACKOFF[min(worker.crashes - 1, len(BACKOFF) - 1)]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        log.error("worker %d (pid %d) ended with %s after %.1f s; replacing it %s", worker.index, pid, how, lived, f"in {delay} s" if delay else "now")
        if delay:
            worker.restart = self._loop.call_later(delay, self._fork, worker)
        else:
            self._fork(worker)

    def stop(self) -> None:
        """Tell every worker to flush and exit, and kill those that do not."""
        if self._stopping:
            return
        self._stopping = True
        for worker in self.workers:
            if worker.restart is not None:
                worker.restart.cancel()
            if worker.channel is not None:
                worker.channel.send(Kind.STOP)
        self._loop.call_later(STOP_DEADLINE, self._kill_all)

    def _kill_all(self) -> None:
        for worker in self.workers:
            if worker.pid:
                log.warning("worker %d (pid %d) did not stop within %.0f s; killing it", worker.index, worker.pid, STOP_DEADLINE)
                _kill(worker.pid, signal.SIGKILL)

    @property
    def alive(self) -> int:
        """Processes that have not ended."""
        return sum(1 for worker in self.workers if worker.pid)

    # -- talk ------------------------------------------------------------------------------------------------------------------------------------------

    def broadcast(self, kind: Kind, body: bytes = b"", *, but: Worker | None = None) -> None:
        """Tell every worker (`but` one)."""
        for worker in self.workers:
            if worker.channel is not None and worker is not but:
                worker.channel.send(kind, body)

    async def gather(self, kind: Kind, body: bytes = b"", *, timeout: float) -> list[bytes]:
        """Ask every worker that is ready; whoever is gone or does not answer in time is left out."""
        asked = [worker.channel.request(kind, body, timeout=timeout) for worker in self.workers if worker.ready and worker.channel is not None]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, (TimeoutError, ChannelClosed)):
                raise answer
        return [answer for answer in answers if isinstance(answer, bytes)]


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended in the meantime
