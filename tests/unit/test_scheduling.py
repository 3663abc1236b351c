"""How main shares a processor with its workers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from meshproxy import scheduling
from meshproxy.scheduling import CREDIT, LONGEST, PATIENCE, Turns
from tests import polling

_PROGRAM = """
import json, os
from meshproxy import scheduling
before = scheduling._get()
scheduling.turns.lengthen()
scheduling.turns.lengthen()
mine = scheduling._get()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, json.dumps([scheduling.turns.long, scheduling._get()]).encode())
    os._exit(0)
os.wait()
print(json.dumps({"before": before, "mine": mine, "long": scheduling.turns.long, "child": json.loads(os.read(read, 4096))}))
"""


def test_main_has_long_turns_and_its_children_have_ordinary_ones():
    found = json.loads(subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, timeout=polling.PATIENCE).stdout)
    assert found["child"] == [False, found["before"]]
    if found["long"]:
        assert found["mine"] == [*found["before"][:5], LONGEST, *found["before"][6:]]
    else:  # an older kernel, or one that knows nothing of it
        assert found["mine"] == found["before"]


def test_a_kernel_that_takes_the_length_of_turns_and_forgets_it_is_found_out(monkeypatch):
    monkeypatch.setattr(scheduling, "_get", lambda: (48, 0, 0, 0, 0, 0, 0, 0))
    monkeypatch.setattr(scheduling, "_set", lambda attributes, runtime: True)
    turns = Turns()
    turns.lengthen()
    assert not turns.long


@pytest.mark.parametrize("attributes", [None, (48, 1, 0, 0, 50, 0, 0, 0), (48, 5, 0, 0, 0, 0, 0, 0)])
def test_a_process_that_is_scheduled_otherwise_stays_so(monkeypatch, attributes):
    monkeypatch.setattr(scheduling, "_get", lambda: attributes)
    monkeypatch.setattr(scheduling, "_set", lambda *what: pytest.fail("nothing is to be changed"))
    turns = Turns()
    turns.lengthen()
    assert not turns.long


class _Processor:
    """One that a worker wants all of: to offer it costs `turn` seconds."""

    def __init__(self, turn: float) -> None:
        self.now = 100.0
        self.waited = 0.0
        self._turn = turn

    def offered(self) -> None:
        self.now += self._turn
        self.waited += self._turn


@pytest.mark.parametrize(("turn", "share"), [(0.0, 1.0), (0.0001, 2 / 3), (0.004, 1 / (1 + PATIENCE)), (0.1, 1 / (1 + PATIENCE))])
def test_main_offers_its_turn_but_does_not_starve(monkeypatch, turn, share):
    processor = _Processor(turn)
    monkeypatch.setattr(scheduling, "monotonic", lambda: processor.now)
    monkeypatch.setattr(scheduling.os, "sched_yield", processor.offered)
    turns = Turns()
    turns.give_way()
    piece, pieces = 0.0002, 10_000
    start, processor.waited = processor.now, 0.0
    for _ in range(pieces):
        processor.now += piece
        turns.give_way()
    assert processor.now - start == pytest.approx(piece * pieces + processor.waited)
    assert piece * pieces / (processor.now - start) == pytest.approx(share, abs=0.01)
    assert processor.waited <= PATIENCE * piece * pieces + CREDIT + turn
