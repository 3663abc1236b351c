"""Processes: forking a worker so that it keeps nothing it must not keep, and so that it cannot outlive main; and errands for children.

`fork` is used from main's running event loop as well: the child shares main's pages (modules, protos, compiled tables), which is what makes a worker
cheap, but none of main's descriptors. Everything here is for one thread: main has no other that holds locks when it forks, except resolver threads, and
a worker never resolves names.
"""

from __future__ import annotations

import fcntl
import gc
import marshal
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from typing import Any, NoReturn

_PROC_FDS = "/proc/self/fd"


class Lifeline:
    """A pipe between main and one worker, whose writing end only main holds: when main is gone, however it went, the kernel kills the worker.

    It needs neither the worker's event loop to be alive nor ctypes for prctl(PR_SET_PDEATHSIG), which would also be bound to the thread that forked. One
    for each worker: the owner of the signal belongs to the open pipe, not to the descriptor.
    """

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def arm(self) -> None:
        """In the worker: die by SIGKILL as soon as the writing end is closed everywhere."""
        fd = self.read_fd
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        try:
            gone = os.read(fd, 1) == b""
        except BlockingIOError:
            return
        if gone:  # main went between the fork and here: no signal will come
            os._exit(1)


def fork(run: Callable[[], None], keep: Collection[int]) -> tuple[int, int]:
    """Fork a child that calls `run` and exits. It keeps the standard streams and the descriptors in `keep`.

    Returns its process id and a descriptor that keeps it alive: to be closed when the child has ended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # Objects made so far are moved out of the collector's sight on both sides: a collection in the child would write to (and so copy) every shared page.
    gc.freeze()
    lifeline = Lifeline()
    pid = os.fork()
    if pid == 0:
        _be_child(run, keep, lifeline)
    os.close(lifeline.read_fd)
    return pid, lifeline.write_fd


class Errand:
    """Work done by a short-lived child, so that its memory goes with it and this process can do something else meanwhile.

    `work` returns plain data (what `marshal` takes). Either `result` waits for it, or a child forked later takes it with `read`, and this process waits for
    the end of the errand with `wait`. What the child printed is printed; its failure raises RuntimeError.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._read_fd)  # or a result that nobody takes would never find the pipe broken
            _run_errand(work, write_fd)
        os.close(write_fd)

    def result(self) -> Any:
        """What `work` returned."""
        data = self._read()
        self.wait()
        return marshal.loads(data)

    def read(self) -> Any:
        """What `work` returned, in a child of the process that started the errand."""
        data = self._read()
        if not data:
            raise RuntimeError("a child process failed")
        return marshal.loads(data)

    def close(self) -> None:
        """Leave the result to a child that has been forked."""
        os.close(self._read_fd)

    def wait(self) -> None:
        """Wait until the child has ended."""
        _, status = os.waitpid(self._pid, 0)
        if status:
            raise RuntimeError(f"a child process failed: {os.waitstatus_to_exitcode(status)}")

    def _read(self) -> bytes:
        with os.fdopen(self._read_fd, "rb") as pipe:
            return pipe.read()


def _run_errand(work: Callable[[], Any], write_fd: int) -> NoReturn:
    status = 1
    try:
        data = marshal.dumps(work())
        with os.fdopen(write_fd, "wb") as pipe:
            pipe.write(data)
        status = 0
    except BrokenPipeError:
        status = 1  # nobody wants the result any more
    except BaseException:  # noqa: BLE001  nothing may return into the parent's stack
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _be_child(run: Callable[[], None], keep: Collection[int], lifeline: Lifeline) -> NoReturn:
    status = 1
    try:
        _reset_signals()
        detach_fds({0, 1, 2, lifeline.read_fd, *keep})
        lifeline.arm()
        run()
        status = 0
    except BaseException:  # noqa: BLE001  nothing may return into main's stack, whatever happened
        traceback.print_exc()
    finally:
        # Never unwind into main's frames: its exit handlers, buffers and event loop are copies that must not run twice.
        os._exit(status)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)  # main's event loop must not hear of the child's signals
    for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
    # A terminal, or a supervisor that signals the whole group, must not end a worker behind main's back: main tells it when.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def detach_fds(keep: Collection[int]) -> None:
    """Point every other open descriptor at /dev/null.

    Not closed: Python objects inherited from main still carry the numbers, and would close a stranger when they are collected.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in open_fds():
        if fd not in keep and fd != null:
            try:
                os.dup2(null, fd, inheritable=False)
            except OSError:
                continue  # the listing's own descriptor, closed by now
    os.close(null)


def open_fds() -> list[int]:
    """The process's open descriptors."""
    try:
        return [int(name) for name in os.listdir(_PROC_FDS)]
    except OSError:  # no /proc: try them all
        return list(range(min(os.sysconf("SC_OPEN_MAX"), 1 << 16)))


def reap() -> list[tuple[int, int]]:
    """(pid, exit code as `os.waitstatus_to_exitcode`) of every child that ended: our workers and, as PID 1 of a container, orphans that we inherited."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, os.waitstatus_to_exitcode(status)))


def name_process(name: str) -> None:
    """Name the process as ps and top show it (at most 15 bytes)."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(name)
    except OSError:
        return  # no /proc: only a nicety is lost


def cpu_count() -> int:
    """The CPUs that this process may use: its affinity, and no more than a container's quota rounded up."""
    count = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, -(-int(quota) // int(period))))
