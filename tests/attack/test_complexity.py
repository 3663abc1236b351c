"""Hostile input costs what its size says, and no more: instructions are counted, not time, for inputs of which one is four times the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import callgrind
from tests.attack.costs import PROBES

ROOT = Path(__file__).resolve().parents[2]
CEILING = 6.0  # linear work costs four times as much for four times the input; quadratic work sixteen times


class Counted:
    """tests/attack/costs.py under callgrind."""

    def __init__(self, folder: Path) -> None:
        options = ["--tool=callgrind", "--instr-atstart=no", "--vgdb=yes", "-q", f"--callgrind-out-file={folder}/out.%p", f"--vgdb-prefix={folder}/vgdb"]
        self._process = subprocess.Popen(
            ["valgrind", *options, sys.executable, "-m", "tests.attack.costs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"} | {"PYTHONPATH": str(ROOT)},
        )
        self._counter = callgrind._Counter(folder, [self._process.pid])
        self._hear("ready")
        self._counter.tell(self._process.pid, "instrumentation on")

    def cost(self, name: str, number: int = 0) -> int:
        """Instructions of a probe's work for its first or second size."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {number}\n")
        self._process.stdin.flush()
        self._hear("done")
        return self._counter.dump()

    def _hear(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == word + "\n"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    made = Counted(tmp_path_factory.mktemp("costs"))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.skipif(not callgrind.available(), reason="valgrind is not installed: instructions of hostile input are NOT counted")
@pytest.mark.parametrize("name", [name for name in PROBES if "names" not in name])
def test_cost_is_linear(counted: Counted, name: str):
    # The first time may also pay for memory that the heap has to get: what an input costs, it costs again.
    small, big = (min(counted.cost(name, number), counted.cost(name, number)) for number in (0, 1))
    print(f"{name}: {small:,} and {big:,} instructions: {big / small:.1f} times as many")
    assert big <= small * CEILING


@pytest.mark.slow
@pytest.mark.skipif(not callgrind.available(), reason="valgrind is not installed: instructions of hostile input are NOT counted")
def test_names_that_collide_elsewhere(counted: Counted):
    """Whoever makes hashes collide has to know our seed: a hundred such names cost what others cost."""
    assert counted.cost("colliding names") <= 1.3 * counted.cost("names")
