"""Which worker takes a new connection of a listener with `exact_balance`: the one that has the fewest.

Envoy lets any thread accept and hands the connection to the least busy one. Here all workers watch one socket, and a worker that has more connections than
another leaves it to that one. Nobody can be sure that the other one comes, so whoever leaves a connection looks again after a pause, and after some pauses
in which no worker accepted anything it goes on without those it has waited for. See docs/decisions/0003-accepting-connections.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.net.shared import Cells

LOOKS = 4  # in vain, until the others count as stuck. Counted and not timed: a machine that is too busy for them may be so for this worker
# Seconds until a worker that did not come is waited for again: the first time it may only have been late, so just this connection goes elsewhere.
FORGIVEN_AFTER = (0.0, 0.01, 0.1)


class ConnectionBalance:
    """One worker's view of how many connections of a listener each worker has. A worker that does not accept at all has infinitely many.

    Every worker writes cells of its own only, so there are no locks: `counts` are the cells of connections open, `accepted` of all ever accepted.
    """

    PAUSE = 0.001  # seconds between two looks at a connection that others should take

    __slots__ = ("_accepted", "_cells", "_clock", "_counts", "_looks", "_others", "_own", "_progress", "_stuck")

    def __init__(self, cells: Cells, counts: list[int], accepted: list[int], worker_id: int, clock: Callable[[], float]) -> None:
        self._cells = cells.values
        self._counts = counts
        self._accepted = accepted
        self._own = worker_id
        self._others = [worker for worker in range(len(counts)) if worker != worker_id]
        self._clock = clock
        self._stuck: dict[int, tuple[float, float, int]] = {}  # worker -> when it is forgiven, what it had accepted, how often it did not come
        self._progress = 0.0  # what all had accepted at the first look
        self._looks = 0
        self.leave()  # also what a crashed predecessor left behind

    def publish(self, connections: int) -> None:
        """Tell the others how many connections this worker has, and that it accepts."""
        self._cells[self._counts[self._own]] = connections

    def leave(self) -> None:
        """Tell the others not to wait for this worker."""
        self._cells[self._counts[self._own]] = math.inf

    def took(self) -> None:
        """This worker has accepted a connection."""
        self._cells[self._accepted[self._own]] += 1
        self._looks = 0

    def is_mine(self, connections: int, is_waiting: Callable[[], bool]) -> bool | None:
        """Whether this worker, with that many connections, accepts the next one now. False: look again after a pause. None: there was none any more.

        `is_waiting` tells whether there is a connection to accept; it is asked only where the answer matters.
        """
        if connections <= self._least():
            return True
        # In this order: whoever takes the connection that is waiting now counts it after this sum was made.
        progress = sum(map(self._cells.__getitem__, self._accepted))
        if not is_waiting():
            self._looks = 0
            return None
        if not self._looks or progress != self._progress:
            self._progress = progress
            self._looks = 0
        self._looks += 1
        if self._looks <= LOOKS:
            return False
        # All who should have come count as stuck, also those who may have waited for each other: this connection has waited long enough.
        now = self._clock()
        for worker in self._waited_for():
            if self._cells[self._counts[worker]] < connections:
                times = self._stuck[worker][2] if worker in self._stuck else 0
                until = now + FORGIVEN_AFTER[min(times, len(FORGIVEN_AFTER) - 1)]
                self._stuck[worker] = until, self._cells[self._accepted[worker]], times + 1
        self._looks = 0
        return True

    def _least(self) -> float:
        """Connections of the least busy other worker that is not stuck."""
        return min((self._cells[self._counts[worker]] for worker in self._waited_for()), default=math.inf)

    def _waited_for(self) -> list[int]:
        """The other workers, but those that are stuck."""
        if not self._stuck:
            return self._others
        for worker, (_, accepted, _) in list(self._stuck.items()):
            if self._cells[self._accepted[worker]] != accepted:
                del self._stuck[worker]
        now = self._clock()
        return [worker for worker in self._others if worker not in self._stuck or now >= self._stuck[worker][0]]


def make(key: str, context: Any) -> ConnectionBalance | None:
    """For the listener `key`; None when there are not enough free cells."""
    counts, accepted = (
        [context.cells.find(f"balance:{what}:{key}/{worker}".encode(), lambda: initial) for worker in range(context.concurrency)]  # noqa: B023
        for what, initial in (("open", math.inf), ("accepted", 0.0))
    )
    if None in counts or None in accepted:
        return None
    return ConnectionBalance(context.cells, counts, accepted, context.worker_id, context.clock)
