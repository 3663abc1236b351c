"""How main shares a processor with its workers: as whoever is in no hurry.

Linux lets a thread that wakes up run at once, in the place of one that asked for longer turns (`sched_runtime` of sched_setattr(2), which counts for ordinary
threads since Linux 6.12). Main asks for the longest. Its share of the processor stays what it was, which a lower priority would take from it: beside workers
that are busy its health checks would starve. Whatever it forks has turns of the ordinary length again.

That is not all, for a worker that has just run has had its share and is not preferred; the kernel looks again with its next tick, which may be milliseconds
away. So main offers its turn in the midst of long work, too, but does not wait for ever: busy workers would let it do one piece in a tenth of a second.
"""

from __future__ import annotations

import ctypes
import os
import struct
from time import monotonic

LONGEST = 100_000_000  # ns, the kernel's limit
PATIENCE = 4.0  # seconds that main waits for each that it works, where workers want all of a processor
CREDIT = 0.01  # seconds that it waits without having worked for them
_ATTR = struct.Struct("=IIQiIQQQ")  # sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
_NUMBERS = {"x86_64": (314, 315), "aarch64": (274, 275), "riscv64": (274, 275)}  # of sched_setattr and sched_getattr
_ORDINARY = (0, 3)  # SCHED_OTHER, SCHED_BATCH
_RUNTIME = 5  # where it is in the structure


class Turns:
    """Of the thread that uses it. `long`: whether the kernel gives it the long turns that it was asked for."""

    def __init__(self) -> None:
        self.long = False
        self._credit = CREDIT
        self._since = 0.0  # when work went on

    def lengthen(self) -> None:
        """Have long turns from now on, where the kernel knows of that; children have ordinary ones."""
        before = _get()
        if self.long or before is None or before[1] not in _ORDINARY or not _set(before, LONGEST):
            return
        after = _get()
        self.long = after is not None and after[_RUNTIME] == LONGEST
        if self.long:
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        before = _get()
        if self.long and before is not None:
            _set(before, 0)
        self.long = False

    def give_way(self) -> None:
        """In the midst of long work: let a worker that wants the same processor have it."""
        now = monotonic()
        self._credit = min(self._credit + (now - self._since) * PATIENCE, CREDIT)
        if self._credit > 0.0:
            os.sched_yield()
            self._since = monotonic()
            self._credit -= self._since - now
        else:
            self._since = now


turns = Turns()


def _get() -> tuple[int, ...] | None:
    """The thread's attributes; None where they cannot be asked for."""
    numbers = _NUMBERS.get(os.uname().machine)
    if numbers is None:
        return None
    buffer = ctypes.create_string_buffer(_ATTR.size)
    if ctypes.CDLL(None).syscall(numbers[1], 0, buffer, _ATTR.size, 0):
        return None
    return _ATTR.unpack(buffer.raw)


def _set(attributes: tuple[int, ...], runtime: int) -> bool:
    """Whether the kernel took them, with other turns: ns, or 0 for ordinary ones."""
    changed = (*attributes[:_RUNTIME], runtime, *attributes[_RUNTIME + 1 :])
    return not ctypes.CDLL(None).syscall(_NUMBERS[os.uname().machine][0], 0, _ATTR.pack(*changed), 0)
