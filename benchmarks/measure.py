"""What a proxy costs: CPU time, memory, and instructions by the processor's own counters where they exist (`callgrind` counts them where they do not)."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.errors import BenchmarkError

_TICKS = os.sysconf("SC_CLK_TCK")
_EVENTS = "instructions:u,instructions:k"


def cpu_seconds(pids: Iterable[int]) -> tuple[float, float]:
    """User and kernel seconds that the processes have used, all threads; steps of 10 ms."""
    user = kernel = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user += int(fields[11])
        kernel += int(fields[12])
    return user / _TICKS, kernel / _TICKS


@dataclass(frozen=True, slots=True)
class Memory:
    """MB (2^20 bytes) of all processes together.

    `pss`: proportional set size, as the kernel adds it up. `alone`: the same, as it were if no other process on the machine mapped the same files; for an
    interpreter that other programs use too, such as this harness, that is the honest figure. `pss_anon`: anonymous memory, pages shared by main and workers
    counted once. `anonymous`: the same, counted once for each process.
    """

    pss: float
    alone: float
    pss_anon: float
    anonymous: float


def memory(pids: Iterable[int]) -> Memory:
    """The memory of these processes now."""
    totals = {"Pss": 0, "Pss_Anon": 0, "Pss_Shmem": 0, "Anonymous": 0}
    files: dict[tuple[str, str], int] = {}  # (file, offset) -> kB resident, of the process that has most of it
    for pid in pids:
        for key, value in re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE):
            if key in totals:
                totals[key] += int(value)
        for mapping, resident in _file_mappings(pid):
            files[mapping] = max(files.get(mapping, 0), resident)
    alone = totals["Pss_Anon"] + totals["Pss_Shmem"] + sum(files.values())
    return Memory(*(value / 1024 for value in (totals["Pss"], alone, totals["Pss_Anon"], totals["Anonymous"])))


def _file_mappings(pid: int) -> Iterable[tuple[tuple[str, str], int]]:
    """((file, offset), kB of the file's own pages that are resident) for every mapped file on disk."""
    mapping, resident = None, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split(" ", 1)[0]:
            fields = line.split(None, 5)
            on_disk = fields[4] != "0" and not fields[5].startswith(("/dev/", "/memfd:")) and "(deleted)" not in fields[5]
            mapping = (fields[5], fields[2]) if on_disk else None
        elif mapping and line.startswith("Rss:"):
            resident = int(line.split()[1])
        elif mapping and line.startswith("Anonymous:"):
            yield mapping, resident - int(line.split()[1])  # pages written to are no longer the file's


def others(name: str, own: Iterable[int] = ()) -> list[int]:
    """Processes of that proxy that are not among `own`: they would share its pages and so lower its PSS."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) not in own:
            try:
                arguments = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(os.path.basename(argument).decode(errors="replace") == name for argument in arguments[:3]):
                found.append(int(entry))
    return found


# -- the processor's counters


@functools.cache
def perf_works() -> bool:
    """Whether `perf stat` can count instructions here; virtual machines often hide the counters."""
    if shutil.which("perf") is None:
        return False
    done = subprocess.run(["perf", "stat", "-x,", "-e", _EVENTS, "true"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and parse_perf(done.stderr) is not None


def parse_perf(text: str) -> tuple[int, int] | None:
    """User and kernel instructions from the output of `perf stat -x,`; None if it could not count both."""
    counts = {fields[2]: fields[0] for line in text.splitlines() if len(fields := line.split(",")) > 2}
    values = [counts.get(event, "") for event in _EVENTS.split(",")]
    if not all(value.isdecimal() for value in values):
        return None
    return int(values[0]), int(values[1])


class Instructions:
    """Counts instructions of running processes between enter and exit; `counted` is (user, kernel) afterwards."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._command = ["perf", "stat", "-x,", "-e", _EVENTS, "-p", ",".join(map(str, pids))]
        self.counted = (0, 0)

    def __enter__(self) -> Self:
        self._perf = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._perf.send_signal(signal.SIGINT)
        said = self._perf.communicate(timeout=10)[1]
        counted = parse_perf(said)
        if counted is not None:
            self.counted = counted
        elif kind is None:
            raise BenchmarkError(f"perf counted nothing: {said}")
