"""Moves bytes between two plaintext sockets, both ways, with as little work as possible.

Each direction begins by copying (`recv`, `send`): for small messages two system calls are the least there is. A direction that fills its buffer several
times in a row is bulk traffic and changes to `splice` through a pipe, where the bytes never enter the process; it goes back when the bulk is over, so that
an idle connection holds no pipe. At most one buffer or one pipe full of bytes (`COPY_SIZE`, `PIPE_SIZE`) waits in each direction: while it does, the
source is not read, and a source that goes away meanwhile is noticed only when the destination moves again, or by the idle timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from typing import Any, Protocol

COPY_SIZE = 16 * 1024  # bytes read at once when copying
PIPE_SIZE = 1 << 20  # bytes; what an unprivileged process may have
_BULK = 3  # full buffers in a row that make it bulk traffic
_SMALL = 16  # spliced reads in a row, smaller than a copy buffer, that end it
_PART = 64 * 1024  # bytes, what the smallest usual pipe holds; a spliced read of fewer has emptied the source
_ROUNDS = 8  # splices in a row before other connections have their turn
_SPARE_PIPES = 8
_LINGER_ZERO = struct.pack("ii", 1, 0)
_FLAGS = 1 | 2  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK


class Observer(Protocol):
    """Who wants to know what happens between the two sockets."""

    def received(self, upstream: bool, count: int) -> None:
        """`count` bytes were read from that side."""

    def sent(self, upstream: bool, count: int) -> None:
        """`count` bytes were written to that side."""

    def blocked(self, upstream: bool, blocked: bool) -> None:
        """That side is (no longer) left unread because the other does not take more."""

    def ended(self, upstream: bool, error: OSError | None) -> None:
        """Over: both directions have ended (the last of them at that side), or that side failed. Both sockets are closed."""


def linger_zero(sock: Any) -> None:
    """Let the next close send a reset."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


class Pipes:
    """Pipes for splicing. A few empty ones are kept."""

    __slots__ = ("_spare",)

    def __init__(self) -> None:
        self._spare: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int] | None:
        """An empty pipe (read end, write end); None when the system has none to give."""
        if self._spare:
            return self._spare.pop()
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        # A user with many pipes gets small ones only: splicing works all the same.
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        return pipe

    def give(self, pipe: tuple[int, int], *, empty: bool) -> None:
        """Return a pipe. One with bytes in it is closed."""
        if empty and len(self._spare) < _SPARE_PIPES:
            self._spare.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close the spare ones."""
        while self._spare:
            self.give(self._spare.pop(), empty=False)


class Splice:
    """Two connected non-blocking sockets, which it owns and closes."""

    __slots__ = ("_down", "_downstream", "_loop", "_up", "_upstream", "closed", "observer", "pipes")

    def __init__(self, loop: asyncio.AbstractEventLoop, downstream: socket.socket, upstream: socket.socket, pipes: Pipes, observer: Observer) -> None:
        self._loop = loop
        self._downstream = downstream
        self._upstream = upstream
        self.pipes = pipes
        self.observer = observer
        self.closed = False
        self._up = _Way(self, downstream, upstream, False)
        self._down = _Way(self, upstream, downstream, True)

    def start(self) -> None:
        """Begin, with what is there already."""
        for way in (self._up, self._down):
            if not self.closed:
                way.start()

    def abort(self, reset: bool = False) -> None:
        """Close both sockets, with a reset if so; the observer is not told."""
        if self.closed:
            return
        if reset:
            linger_zero(self._downstream)
            linger_zero(self._upstream)
        self.closed = True
        for sock in (self._downstream, self._upstream):
            fd = sock.fileno()
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
        self._up.release()
        self._down.release()
        self._downstream.close()
        self._upstream.close()

    def way_done(self, from_upstream: bool) -> None:
        """One direction has ended."""
        if self._up.done and self._down.done:
            self.fail(from_upstream, None)

    def fail(self, upstream: bool, error: OSError | None) -> None:
        """End everything. A reset of one side is passed on to the other."""
        if not self.closed:
            self.abort(reset=isinstance(error, ConnectionResetError))
            self.observer.ended(upstream, error)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop."""
        return self._loop


class _Way:
    """One direction. `_pending`: copied bytes that the destination did not take; `_in_pipe`: bytes in the pipe.

    It waits for one socket at a time: the source, or, while `_writing`, the destination.
    """

    __slots__ = (
        "_destination",
        "_destination_fd",
        "_from_upstream",
        "_full",
        "_in_pipe",
        "_pending",
        "_pipe",
        "_small",
        "_source",
        "_source_fd",
        "_splice",
        "_writing",
        "done",
    )

    def __init__(self, splice: Splice, source: socket.socket, destination: socket.socket, from_upstream: bool) -> None:
        self._splice = splice
        self._source = source
        self._destination = destination
        self._source_fd = source.fileno()
        self._destination_fd = destination.fileno()
        self._from_upstream = from_upstream
        self._pending: memoryview | None = None
        self._pipe: tuple[int, int] | None = None
        self._in_pipe = 0
        self._full = 0
        self._small = 0
        self._writing = False
        self.done = False

    def start(self) -> None:
        self._splice.loop.add_reader(self._source_fd, self._readable)
        self._readable()

    def release(self) -> None:
        """Give the pipe back."""
        self._pending = None
        if self._pipe is not None:
            self._splice.pipes.give(self._pipe, empty=not self._in_pipe)
            self._pipe = None

    def _readable(self) -> None:
        if self._pipe is None:
            self._copy()
        else:
            self._move()

    def _copy(self) -> None:
        splice, from_upstream = self._splice, self._from_upstream
        try:
            data = self._source.recv(COPY_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            splice.fail(from_upstream, error)
            return
        count = len(data)
        if not count:
            self._finish()
            return
        splice.observer.received(from_upstream, count)
        try:
            sent = self._destination.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            splice.fail(not from_upstream, error)
            return
        splice.observer.sent(not from_upstream, sent)
        if sent < count:
            self._pending = memoryview(data)[sent:]
            self._block()
        if count < COPY_SIZE:
            self._full = 0
            return
        self._full += 1
        if self._full >= _BULK:
            self._full = self._small = 0
            self._pipe = splice.pipes.take()

    def _move(self) -> None:
        # HOT: what happened is counted once, after the loop. The megabytes that the kernel moves push this code out of the processor's caches: what is run
        # between two of them is dear.
        splice, from_upstream, pipe = self._splice, self._from_upstream, self._pipe
        assert pipe is not None
        source, (out, into), destination, move = self._source_fd, pipe, self._destination_fd, os.splice
        count = received = 0
        waited = in_pipe = self._in_pipe
        ended = False
        failure: OSError | None = None
        try:
            for _ in range(_ROUNDS):
                if not in_pipe:
                    count = in_pipe = move(source, into, PIPE_SIZE, None, None, _FLAGS)
                    if not count:
                        ended = True
                        break
                    received += count
                in_pipe -= move(out, destination, in_pipe, None, None, _FLAGS)
                # Fewer than were there: the destination is full. Fewer than could be: the source has no more. To ask again would be an exception.
                if in_pipe or 0 < count < _PART:
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            failure = error
        self._in_pipe = in_pipe
        if received:
            splice.observer.received(from_upstream, received)
        if sent := waited + received - in_pipe:
            splice.observer.sent(not from_upstream, sent)
        if waited and (received or not in_pipe):
            splice.observer.blocked(from_upstream, False)
        if failure is not None:
            splice.fail(not from_upstream if in_pipe else from_upstream, failure)
        elif ended:
            self._finish()
        elif in_pipe:
            if received:
                self._block()
        else:
            self._weigh(count)

    def _weigh(self, count: int) -> None:
        """Back to copying when there is no bulk any more; `count`: the bytes of the last read, 0 for none."""
        if count >= COPY_SIZE:
            self._small = 0
        elif count:
            self._small += 1
            if self._small >= _SMALL:
                self.release()

    def _block(self) -> None:
        """The destination is full: leave the source alone until it is not."""
        if not self._writing:
            self._writing = True
            loop = self._splice.loop
            loop.remove_reader(self._source_fd)
            loop.add_writer(self._destination_fd, self._writable)
        self._splice.observer.blocked(self._from_upstream, True)

    def _writable(self) -> None:
        splice = self._splice
        pending = self._pending
        if pending is not None:
            try:
                sent = self._destination.send(pending)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                splice.fail(not self._from_upstream, error)
                return
            splice.observer.sent(not self._from_upstream, sent)
            if sent < len(pending):
                self._pending = pending[sent:]
                return
            self._pending = None
            splice.observer.blocked(self._from_upstream, False)
        self._readable()
        # A destination that is full again, as it is when it is the slower one, goes on being waited for.
        if self._pending is None and not self._in_pipe and not splice.closed:
            self._writing = False
            splice.loop.remove_writer(self._destination_fd)
            if not self.done:
                splice.loop.add_reader(self._source_fd, self._readable)

    def _finish(self) -> None:
        """The source has sent everything: say so to the destination, which may still be sending."""
        self._splice.loop.remove_reader(self._source_fd)
        self.release()
        self.done = True
        with contextlib.suppress(OSError):
            self._destination.shutdown(socket.SHUT_WR)
        self._splice.way_done(self._from_upstream)
