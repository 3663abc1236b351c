"""Who takes the next connection of a listener with exact_balance."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.net import connection_balance
from meshproxy.net.connection_balance import FORGIVEN_AFTER, LOOKS, ConnectionBalance
from meshproxy.net.listener import Listener
from meshproxy.net.shared import Cells
from tests.unit.net_help import context, listener_proto, run

EXACT = {"exact_balance": {}}


class Workers:
    """Some workers with a balance each, one clock, and a connection that waits or does not."""

    def __init__(self, count: int) -> None:
        self.cells = Cells.create(64)
        self.count = count
        self.now = 0.0
        self.waiting = True
        self.balances = [self.balance(worker) for worker in range(count)]
        self.open = [0] * count

    def balance(self, worker: int) -> ConnectionBalance:
        cells = Cells(os.dup(self.cells.fileno()))
        made = connection_balance.make("l", SimpleNamespace(cells=cells, concurrency=self.count, worker_id=worker, clock=lambda: self.now))
        assert made is not None
        return made

    def have(self, *connections: int) -> None:
        self.open = list(connections)
        for balance, count in zip(self.balances, connections, strict=True):
            balance.publish(count)

    def ask(self, worker: int) -> bool | None:
        return self.balances[worker].is_mine(self.open[worker], lambda: self.waiting)

    def take(self, worker: int) -> None:
        self.balances[worker].took()
        self.open[worker] += 1
        self.balances[worker].publish(self.open[worker])


@pytest.fixture
def two() -> Workers:
    workers = Workers(2)
    workers.have(0, 0)
    return workers


def test_the_least_busy_one_accepts(two):
    assert (two.ask(0), two.ask(1)) == (True, True)
    two.have(3, 2)
    assert (two.ask(0), two.ask(1)) == (False, True)
    two.take(1)
    assert (two.ask(0), two.ask(1)) == (True, True)


def test_no_pause_when_nothing_waits(two):
    two.have(3, 2)
    two.waiting = False
    assert two.ask(0) is None


def looks(workers: Workers, worker: int) -> int:
    """How often a worker looks until it accepts."""
    answers = []
    while not answers or not answers[-1]:
        answers.append(workers.ask(worker))
    workers.take(worker)
    return len(answers)


def test_a_stuck_worker_is_waited_for_more_and_more_rarely(two):
    two.have(3, 2)
    late, short, long = FORGIVEN_AFTER
    assert late == 0
    assert [looks(two, 0) for _ in range(4)] == [LOOKS + 1, LOOKS + 1, 1, 1]
    two.now += short
    assert [looks(two, 0) for _ in range(3)] == [LOOKS + 1, 1, 1]
    for _ in range(2):
        two.now += long
        assert [looks(two, 0) for _ in range(3)] == [LOOKS + 1, 1, 1]


def test_a_worker_that_accepts_is_no_longer_stuck(two):
    two.have(3, 0)
    assert [looks(two, 0) for _ in range(3)] == [LOOKS + 1, LOOKS + 1, 1]
    two.take(1)
    assert [looks(two, 0) for _ in range(3)] == [LOOKS + 1, LOOKS + 1, 1]


def test_progress_starts_the_wait_anew(two):
    """Looks at connections that others took since do not add up."""
    two.have(9, 0)
    for _ in range(LOOKS):
        assert two.ask(0) is False
        two.take(1)
    assert [two.ask(0) for _ in range(LOOKS)] == [False] * LOOKS
    assert two.ask(0)


def test_stale_looks_do_not_count(two):
    """A connection that went away while it was looked at, and another one much later."""
    two.have(1, 0)
    assert [two.ask(0) for _ in range(LOOKS)] == [False] * LOOKS
    two.waiting = False
    assert two.ask(0) is None
    two.waiting = True
    assert two.ask(0) is False


def test_stuck_workers_cost_one_wait_together():
    workers = Workers(4)
    workers.have(9, 5, 0, 9)
    assert looks(workers, 0) == LOOKS + 1


def test_workers_that_do_not_accept_are_not_waited_for(two):
    two.have(7, 0)
    two.balances[1].leave()
    assert two.ask(0)
    assert Workers(3).ask(0), "others have not started yet"


def test_a_replacement_starts_from_nothing(two):
    two.have(2, 5)
    assert two.ask(1) is False
    two.balances[0] = two.balance(0)
    assert two.ask(1), "nobody waits for one that is not there yet"
    two.have(0, 5)
    assert (two.ask(0), two.ask(1)) == (True, False)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_it_ends_even_whoever_is_quickest(count):
    workers = Workers(count)
    workers.have(*[0] * count)
    chance = random.Random(count)
    for _ in range(10 * count):
        quick = chance.sample(range(count), count)
        workers.take(next(worker for worker in quick if workers.ask(worker)))
    assert workers.open == [10] * count


def test_no_cells_left():
    cells = Cells.create(3)
    assert connection_balance.make("l", SimpleNamespace(cells=cells, concurrency=2, worker_id=0, clock=None)) is None


def listener_of(workers: int, **fields: Any) -> tuple[bool, bool]:
    """Whether a listener balances, and whether uvloop accepts for it."""
    found = []

    async def main() -> None:
        made = context()
        made.concurrency = workers
        made.cells = Cells.create(16)
        listener = Listener(listener_proto(**fields), [], made)
        found.append((listener._balance is not None, listener.direct))

    run(main)
    return found[0]


def test_it_takes_several_workers(monkeypatch):
    monkeypatch.setattr("meshproxy.net.filter_chain._compile_filters", lambda *_: ([], SimpleNamespace(terminal=True)))
    assert listener_of(2, connection_balance_config=EXACT) == (True, False)
    assert listener_of(1, connection_balance_config=EXACT) == (False, True)
    assert listener_of(2) == (False, True)


@pytest.mark.parametrize("fields", [{"bind_to_port": False}, {"deprecated_v1": {"bind_to_port": False}}], ids=["current", "deprecated"])
def test_connections_of_other_listeners_are_not_balanced(monkeypatch, fields):
    monkeypatch.setattr("meshproxy.net.filter_chain._compile_filters", lambda *_: ([], SimpleNamespace(terminal=True)))
    with pytest.raises(ConfigError) as caught:
        listener_of(2, connection_balance_config=EXACT, **fields)
    assert [(problem.path, problem.kind) for problem in caught.value.problems] == [("connection_balance_config", UNSUPPORTED)]
