"""`meshctl` as a process, and programs that are told what to do line by line."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks import processes
from benchmarks.errors import BenchmarkError, Missing
from benchmarks.processes import Process

_PATIENCE_S = 60.0


def need_grpc() -> None:
    """Raise Missing without gRPC, which the control plane and its clients speak."""
    try:
        import grpc  # noqa: F401
    except ModuleNotFoundError as error:
        raise Missing("grpcio is not installed (pip install 'meshproxy[control]')") from error


def meshctl(*arguments: str) -> str:
    """What a subcommand prints."""
    return processes.run([sys.executable, "-m", "control", *arguments], cpus=processes.CPUS, limit_s=_PATIENCE_S)


class Plane:
    """`meshctl serve` over a folder; a context manager that ends it. `work` is for what it leaves."""

    def __init__(self, folder: Path, work: Path, cpus: Collection[int], *flags: str) -> None:
        self.folder = folder
        self._work = work
        self._cpus = cpus
        self._flags = flags
        self._listen = "127.0.0.1:0"
        self._starts = 0
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, at the same address as before."""
        self._starts += 1
        path = self._work / "address"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "control", "serve", str(self.folder), "--listen", self._listen, "--address-path", str(path), *self._flags]
        self.process = Process(command, self._work / f"control-{self._starts}.log", self._cpus)
        self.process.wait(lambda: path.exists() and bool(path.read_text()), _PATIENCE_S, "the control plane")
        self.address = self._listen = path.read_text()

    def stop(self) -> None:
        """End it."""
        self.process.stop()

    def kill(self) -> None:
        """It is gone from one moment to the next."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.stop()

    def pids(self) -> list[int]:
        """Its process."""
        return [self.process.pid]

    def status(self) -> list[dict[str, Any]]:
        """How each proxy stands with each type."""
        found: list[dict[str, Any]] = json.loads(meshctl("proxy-status", "--server", self.address, "-o", "json"))
        return found

    def not_synced(self) -> list[str]:
        """Proxies that have not acknowledged everything, with how they stand."""
        return [str(one) for one in self.status() if any(re.fullmatch("STALE|ERROR", str(state)) for state in one.values())]


class Helper:
    """A module of ours as a process, which obeys lines of JSON and answers with them. A context manager that ends it."""

    def __init__(self, module: str, work: Path, cpus: Sequence[int], *arguments: str) -> None:
        self._name = module.rpartition(".")[2]
        self._log = work / f"{self._name}.log"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=processes.ROOT,
                preexec_fn=lambda: os.sched_setaffinity(0, cpus),  # noqa: PLW1509  the harness has one thread
            )
        self.pid = self._popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.communicate()

    def tell(self, **job: Any) -> None:
        """Give it something to do."""
        assert self._popen.stdin is not None
        try:
            print(json.dumps(job), file=self._popen.stdin, flush=True)
        except BrokenPipeError:
            self._fail("has ended")

    def hear(self, limit_s: float) -> Any:
        """Its next answer. Raises BenchmarkError when there is none in time."""
        assert self._popen.stdout is not None
        if not select.select([self._popen.stdout], [], [], limit_s)[0]:
            self._fail(f"said nothing for {limit_s:.0f} s")
        line = self._popen.stdout.readline()
        if not line:
            self._fail("has ended")
        return json.loads(line)

    def _fail(self, what: str) -> None:
        raise BenchmarkError(f"{self._name} {what}: {self._log.read_text(errors='replace')[-2000:]}")
