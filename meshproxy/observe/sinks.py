"""Where access log lines go: files and standard streams, written in batches so that a request costs an append to a list.

Each process has its own `Sinks`. Several processes append to the same file: it is opened with O_APPEND and every write holds whole lines. A pipe or
terminal that nobody reads must not stop the proxy: such a sink writes only what fits now, keeps up to 1 MiB for later, and drops lines beyond that.
"""

from __future__ import annotations

import logging
import os
import select
import stat
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import ConfigError

if TYPE_CHECKING:
    from meshproxy.context import Context

log = logging.getLogger(__name__)

MAX_DELAY = 1.0  # seconds until a line is written at the latest, whatever the flush interval: people watch logs
MIN_SIZE = 64 * 1024
_RETRY = 0.05  # seconds until a full pipe is tried again
_BACKLOG = 1024 * 1024
_PIPE_CHUNK = select.PIPE_BUF  # a pipe that polls writable takes this much without blocking, in one piece
_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2, "/proc/self/fd/1": 1, "/proc/self/fd/2": 2, "/dev/fd/1": 1, "/dev/fd/2": 2}


class Sinks:
    """The open sinks of one process, one a path.

    Owned by the process' context; `flush` at every shutdown, `reopen` after the files were rotated. A context without an event loop (a dry run) opens
    files only to see whether it can.
    """

    def __init__(self, context: Context, *, flush_interval: float = MAX_DELAY, min_size: int = MIN_SIZE) -> None:
        self._context = context
        self.delay = min(flush_interval, MAX_DELAY)
        self.min_size = min_size
        self.stats = _Stats(context.stats)
        self._open: dict[str, Sink] = {}
        context.stats.collectors.append(self._settle)

    def file(self, path: str) -> Sink:
        """The sink of a path, opened now. ConfigError when it cannot be."""
        descriptor = _STREAMS.get(path)
        if descriptor is not None:
            return self.stream(descriptor)
        found = self._open.get(path)
        if found is None:
            try:
                found = Sink(self, _open(path), path)
            except OSError as error:
                raise ConfigError(f"unable to open file '{path}': {error.strerror}") from None
            if self._context.loop is None:
                found.close()
            self._open[path] = found
        return found

    def stream(self, descriptor: int) -> Sink:
        """The sink of standard output (1) or standard error (2)."""
        key = f"fd {descriptor}"
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = Sink(self, descriptor, "")
        return found

    def later(self, delay: float, sink: Sink) -> None:
        """Flush `sink` after `delay` seconds."""
        self._context.loop.call_later(delay, sink.flush_by_timer)

    def flush(self) -> None:
        """Write everything that can be written without waiting."""
        for sink in self._open.values():
            sink.flush()

    def reopen(self) -> None:
        """Open all files anew, after writing what belongs to the old ones."""
        for sink in self._open.values():
            sink.reopen()

    def close(self) -> None:
        """Write everything, for a full pipe up to a tenth of a second, and close the files."""
        for sink in self._open.values():
            sink.close()
        self._open.clear()

    def _settle(self) -> None:
        self.stats.write_total_buffered.n = sum(sink.size for sink in self._open.values())

    def __repr__(self) -> str:
        return f"<Sinks {sorted(self._open)}>"


class Sink:
    """One file or stream. `write(line)` takes a whole line with its newline."""

    __slots__ = ("_buffer", "_descriptor", "_poll", "_scheduled", "_sinks", "_size", "_stuck", "path")

    def __init__(self, sinks: Sinks, descriptor: int, path: str) -> None:
        self._sinks = sinks
        self.path = path  # empty for a standard stream
        self._descriptor = -1
        self._poll: Any = None
        self._buffer: list[bytes] = []
        self._size = 0
        self._scheduled = False
        self._stuck = False  # the last write left something over: only the timer tries again
        self._use(descriptor)

    def write(self, line: bytes) -> None:
        """Add a line. It is written within `Sinks.delay` seconds, or when enough lines have come together."""
        self._buffer.append(line)
        size = self._size = self._size + len(line)
        if not self._scheduled:
            self._scheduled = True
            self._sinks.later(self._sinks.delay, self)
        elif size >= self._sinks.min_size:
            self._full()

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return self._size

    def flush(self) -> None:
        """Write what has come together. Errors are counted: there is nobody to tell."""
        if not self._buffer:
            return
        data = b"".join(self._buffer)
        lines = len(self._buffer)
        self._buffer.clear()
        self._size = 0
        stats = self._sinks.stats
        rest = _write_some(self._descriptor, self._poll, data, stats) if self._poll is not None else _write(self._descriptor, data, stats)
        self._stuck = bool(rest)
        if rest:
            self._buffer.append(rest)
            self._size = len(rest)
        stats.write_buffered.n += lines

    def flush_by_timer(self) -> None:
        """The timer's call: flush, and try again soon if something is left."""
        self._scheduled = False
        self._sinks.stats.flushed_by_timer.n += 1
        self.flush()
        if self._buffer:
            self._scheduled = True
            self._sinks.later(_RETRY, self)

    def reopen(self) -> None:
        """Open the path anew: after rotation it names another file. The old one stays in use when that fails."""
        if not self.path or self._descriptor < 0:
            return
        self.flush()
        try:
            descriptor = _open(self.path)
        except OSError as error:
            self._sinks.stats.reopen_failed.n += 1
            log.warning("cannot reopen the access log %s: %s", self.path, error.strerror)
            return
        old = self._descriptor
        self._use(descriptor)
        os.close(old)

    def close(self) -> None:
        """Write what is left and close the file; standard streams stay open."""
        self.flush()
        if self._buffer and self._poll is not None and self._poll.poll(100):
            self.flush()
        if self.path and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _use(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = None
        try:
            mode = os.fstat(descriptor).st_mode
        except OSError:  # standard output may be closed
            return
        if not stat.S_ISREG(mode):
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    def _full(self) -> None:
        if not self._stuck:
            self.flush()
        elif self._size > _BACKLOG:
            self._sinks.stats.write_failed.n += 1
            self._size -= len(self._buffer.pop())

    def __repr__(self) -> str:
        return f"<sink {self.path or self._descriptor} {self._size} bytes waiting>"


class _Stats:
    """`filesystem.*`, as Envoy counts what its access log files do."""

    def __init__(self, store: Any) -> None:
        scope = store.scope("filesystem.")
        self.write_buffered = scope.counter("write_buffered")
        self.write_completed = scope.counter("write_completed")
        self.write_failed = scope.counter("write_failed")
        self.flushed_by_timer = scope.counter("flushed_by_timer")
        self.reopen_failed = scope.counter("reopen_failed")
        self.write_total_buffered = scope.gauge("write_total_buffered")


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)


def _write(descriptor: int, data: bytes, stats: _Stats) -> bytes:
    """Everything to a regular file; nothing is left over, what cannot be written is lost."""
    view = memoryview(data)
    while view:
        try:
            written = os.write(descriptor, view)
        except OSError:
            stats.write_failed.n += 1
            return b""
        view = view[written:]
    stats.write_completed.n += 1
    return b""


def _write_some(descriptor: int, poll: Any, data: bytes, stats: _Stats) -> bytes:
    """As much as a pipe, socket or terminal takes now, in pieces of whole lines where they fit; returns the rest."""
    position = 0
    while position < len(data):
        if not poll.poll(0):
            return data[position:]
        end = position + _PIPE_CHUNK
        if end < len(data):
            newline = data.rfind(b"\n", position, end)
            end = newline + 1 if newline >= 0 else end
        try:
            position += os.write(descriptor, data[position:end])
        except BlockingIOError:
            return data[position:]
        except OSError:
            stats.write_failed.n += 1
            return b""
    stats.write_completed.n += 1
    return b""
