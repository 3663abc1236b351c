"""Numbers that the workers of one proxy share: what Envoy keeps once per process, such as the fill of a token bucket.

Envoy's threads share one address space; our workers are processes. `Cells` is one small anonymous memory file of doubles, made by main before it starts
the workers and inherited by them as a descriptor. A cell is found by a key, which every worker derives from the same configuration, so that no worker
has to ask main.

A read-modify-write takes the cell's byte of the file as an fcntl lock: the kernel releases it when its holder dies, so a crashed worker blocks nobody.
The wait is bounded: a worker that cannot get the lock goes on without it, because a count that is off by one harms less than a stalled event loop.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any

_HEADER = 8  # one u64: cells in use


class Cells:
    """At most `capacity` named doubles in memory shared by main and its workers; each starts at 0.0.

    `create` in main, `Cells(fd)` in a worker. Lives as long as its process; the memory is freed with the last descriptor.
    """

    __slots__ = ("_counters", "_fd", "_known", "_map", "_names", "capacity", "patience", "values")

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        self._fd = fd
        self.patience = 1000  # tries to get a lock, about 1 ms in all; a holder needs 2 us unless the scheduler took its core away
        self._map = mmap.mmap(fd, size)
        self.capacity = (size - _HEADER) // 16
        view = memoryview(self._map)
        self._names = view[_HEADER : _HEADER + 8 * self.capacity].cast("Q")
        self.values = view[_HEADER + 8 * self.capacity :].cast("d")
        self._known: dict[int, int] = {}
        self._counters: dict[bytes, Counter] = {}

    @classmethod
    def create(cls, capacity: int = 4096) -> Cells:
        """New cells (16 bytes each, only pages that are used take memory). Raises OSError."""
        fd = os.memfd_create("meshproxy-cells", os.MFD_CLOEXEC)
        os.ftruncate(fd, _HEADER + 16 * capacity)
        return cls(fd)

    def fileno(self) -> int:
        """The descriptor to hand to a worker."""
        return self._fd

    def find(self, key: bytes, initial: Callable[[], float] | None = None) -> int | None:
        """The index of the cell named `key`, made (with the value of `initial()`) when there is none; None when all cells are taken."""
        from xxhash import xxh3_64_intdigest  # workers without shared numbers do not load it

        name = xxh3_64_intdigest(key)
        self.lock(-1)
        try:
            used = struct.unpack_from("Q", self._map, 0)[0]
            for index in range(len(self._known), used):
                self._known[self._names[index]] = index
            found = self._known.get(name)
            if found is not None or used >= self.capacity:
                return found
            self._names[used] = name
            self.values[used] = initial() if initial else 0.0
            self._known[name] = used
            struct.pack_into("Q", self._map, 0, used + 1)
            return used
        finally:
            self.unlock(-1)

    def counter(self, key: bytes, worker_id: int, workers: int) -> Counter | None:
        """The counter named `key`, the same object for the same key; None when there are not enough free cells."""
        counter = self._counters.get(key)
        if counter is None:
            found = [self.find(b"%b/%d" % (key, worker)) for worker in range(workers)]
            indexes = [index for index in found if index is not None]
            if len(indexes) < workers:
                return None
            # The cell may hold what a crashed predecessor of this worker had counted.
            self.values[indexes[worker_id]] = 0.0
            counter = self._counters[key] = Counter(self, indexes, worker_id)
        return counter

    def lock(self, index: int) -> None:
        """Take the lock of one cell (-1: of the names); see the module about what happens when it cannot be had. `unlock` in a finally clause."""
        for _ in range(self.patience):
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index + 1)
                return
            except BlockingIOError:
                os.sched_yield()

    def unlock(self, index: int) -> None:
        """Release what `lock` took; no-op if it could not."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, index + 1)


class Counter:
    """How many of something all workers hold together. Each worker has a cell of its own, so that what a dead worker held is dropped with it."""

    __slots__ = ("_cells", "_indexes", "_own")

    def __init__(self, cells: Cells, indexes: list[int], worker_id: int) -> None:
        self._cells = cells
        self._indexes = indexes
        self._own = indexes[worker_id]

    def total(self) -> int:
        values = self._cells.values
        return int(sum(values[index] for index in self._indexes))

    def acquire(self, limit: int) -> bool:
        """Count one more unless that would be more than `limit`; whether it was counted."""
        cells = self._cells
        cells.lock(self._indexes[0])
        try:
            if self.total() >= limit:
                return False
            cells.values[self._own] += 1
            return True
        finally:
            cells.unlock(self._indexes[0])

    def add(self, difference: int) -> None:
        """Count `difference` more (or less), whatever the limit."""
        self._cells.values[self._own] += difference


class LocalCounter:
    """A `Counter` of this process alone: one worker, or no shared cells."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def total(self) -> int:
        return self._count

    def acquire(self, limit: int) -> bool:
        if self._count >= limit:
            return False
        self._count += 1
        return True

    def add(self, difference: int) -> None:
        self._count += difference


def counter_for(context: Any, key: bytes) -> tuple[Counter | LocalCounter, int]:
    """The best counter there is for `key`, and by what to divide a limit on it: 1 when it counts all workers, else the number of workers."""
    cells = context.cells
    if context.concurrency > 1 and cells is not None:
        counter = cells.counter(b"count:" + key, context.worker_id, context.concurrency)
        if counter is not None:
            return counter, 1
    return LocalCounter(), context.concurrency
