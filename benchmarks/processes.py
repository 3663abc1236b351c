"""Processes that the harness starts: pinned to a core, gone when the harness is gone, ended by their id, with whatever they started themselves."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.errors import BenchmarkError

ROOT = Path(__file__).resolve().parents[1]
STOP_LIMIT_S = 5.0
CPUS = sorted(os.sched_getaffinity(0))
PROXY_CPU, LOAD_CPU = CPUS[0], CPUS[-1]  # the same one on a machine of one core, where the report says so
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Process:
    """One started process and its descendants; a context manager that ends them. What it writes goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, cpus: Collection[int], *, env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
        def prepare() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.sched_setaffinity(0, cpus)

        self.command = command
        self.log = log
        self.started = time.monotonic()
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509  the harness has one thread
            )
        self.pid = self._popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def pids(self) -> list[int]:
        """The process and every descendant that lives, oldest first."""
        parents = {}
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                parents[int(entry)] = _parent(int(entry))
        tree = [self.pid]
        for pid in tree:
            tree += sorted(child for child, parent in parents.items() if parent == pid)
        return tree

    def check_alive(self) -> None:
        """Raise BenchmarkError, with what it said last, if the process has ended."""
        if self._popen.poll() is not None:
            said = self.log.read_text(errors="replace")[-2000:]
            raise BenchmarkError(f"{' '.join(self.command[:4])} ... ended with status {self._popen.returncode}:\n{said}")

    def wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> float:
        """Seconds from its start until the condition held; asked every millisecond. If it does not within `limit_s`, or the process ends, it is stopped, and
        BenchmarkError raised."""
        try:
            wait(lambda: condition() or self.check_alive(), limit_s, what, 0.001)
        except BaseException:
            self.stop()
            raise
        return time.monotonic() - self.started

    def stop(self) -> None:
        """End it: at once if it obeys SIGINT, which all of ours take as 'now', and by force after STOP_LIMIT_S."""
        everyone = self.pids()
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGINT)
            try:
                self._popen.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        for pid in everyone[1:]:
            if _session(pid) == self.pid:  # still ours: the number was not given to somebody else
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def wait(condition: Callable[[], Any], limit_s: float, what: str, pause_s: float = 0.01) -> Any:
    """The condition's first true value. Raises BenchmarkError after `limit_s`. Asks again and again: what others listen on or write tells nobody."""
    deadline = time.monotonic() + limit_s
    late = False
    while not (value := condition()):
        if late:
            raise BenchmarkError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(pause_s)
        late = time.monotonic() > deadline  # one look more: it may be the whole machine that stood still
    return value


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(command: Sequence[str], *, cpus: Collection[int] = (LOAD_CPU,), limit_s: float, input: str = "") -> str:
    """What a command wrote to its standard output, pinned. Raises BenchmarkError if it failed or took longer than `limit_s`."""
    try:
        done = subprocess.run(
            command,
            input=input,
            capture_output=True,
            text=True,
            timeout=limit_s,
            cwd=ROOT,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{' '.join(command[:3])} ... took longer than {limit_s:.0f} s") from error
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command[:3])} ... failed with status {done.returncode}:\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields and fields[0] != "Z" else -1


def _session(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[3]) if fields else -1
