"""User instructions per request where the processor's counters are hidden: the proxy's processes run under valgrind's callgrind, which counts every one.

Fifty times slower, so requests come from an exact sender that keeps 64 connections busy (HTTP/2: eight, with many streams each), as under real load: every
turn of the event loop finds several sockets ready. Two bursts of different size are counted in one process; the difference of the counts, divided by the
difference of the sizes, has neither start-up nor connecting in it. What a proxy does once a second weighs fifty times more than in reality; that is part of
the figure, against the slower start of nothing: both proxies have such timers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import load as loads
from benchmarks import proxies
from benchmarks.errors import BenchmarkError, Missing

if TYPE_CHECKING:
    from benchmarks.configs import Spec
    from benchmarks.load import Load
    from benchmarks.proxies import Kind

_LIMIT_S = 120.0
_TOTALS = re.compile(r"^totals: (\d+)", re.MULTILINE)
# Instrumentation begins when we ask for it: starting costs nothing then. Traced children can be asked too.
_COMMAND = ["--tool=callgrind", "--instr-atstart=no", "--vgdb=yes", "--trace-children=yes", "-q"]


@dataclass(frozen=True, slots=True)
class Bursts:
    """How many requests: to warm up, and in the two bursts that are counted."""

    warm_up: int = 1000
    small: int = 500
    big: int = 2500


def available() -> bool:
    """Whether valgrind is installed, with the program that talks to it."""
    return shutil.which("valgrind") is not None and shutil.which("vgdb") is not None


def instructions_per_request(kind: Kind, spec: Spec, load: Load, backend_port: int, folder: Path, bursts: Bursts) -> float:
    """User instructions of the proxy's workers for one request. Raises Missing without valgrind, BenchmarkError if the proxy does not run under it."""
    if not available():
        raise Missing("valgrind is not installed (Debian: apt-get install valgrind): no instructions are counted")
    folder.mkdir(parents=True, exist_ok=True)
    wrapper = ["valgrind", *_COMMAND, f"--callgrind-out-file={folder}/out.%p", f"--vgdb-prefix={folder}/vgdb"]
    # Hashes of str are seeded, so that dicts collide equally in every run.
    with proxies.start(kind, spec, backend_port, folder / "proxy", wrapper=wrapper, env={"PYTHONHASHSEED": "0"}) as proxy:
        workers = proxy.workers()
        counter = _Counter(folder, workers)
        loads.exactly(load, proxy.port, max(bursts.warm_up, load.limit), _LIMIT_S)
        for pid in workers:
            counter.tell(pid, "instrumentation on")
        counts = []
        for requests in (bursts.small, bursts.big):
            loads.exactly(load, proxy.port, requests, _LIMIT_S)
            counts.append(counter.dump())
        return (counts[1] - counts[0]) / (bursts.big - bursts.small)


class _Counter:
    """Asks the callgrind of each process for its counts; `folder` holds its pipes and its dumps."""

    def __init__(self, folder: Path, pids: list[int]) -> None:
        self._folder = folder
        self._pids = pids
        self._dumps = 0

    def dump(self) -> int:
        """Instructions since the last dump, of all processes."""
        self._dumps += 1
        total = 0
        for pid in self._pids:
            self.tell(pid, "dump")
            counts = _TOTALS.search((self._folder / f"out.{pid}.{self._dumps}").read_text())
            if counts is None:
                raise BenchmarkError("callgrind's dump has no totals")
            total += int(counts[1])
        return total

    def tell(self, pid: int, command: str) -> None:
        """One monitor command, done when this returns."""
        prefix = f"--vgdb-prefix={self._folder}/vgdb"
        # vgdb wakes a process that waits in a system call after a tenth of a second, unless told to do so at once.
        done = subprocess.run(["vgdb", prefix, "--max-invoke-ms=1", f"--pid={pid}", *command.split()], capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"callgrind of process {pid} does not answer: {done.stderr or done.stdout}")
