"""Earliest deadline first: weighted round robin with any weights, in O(log n) a pick.

Each entry has a deadline, one 1/weight after its last pick; the earliest is picked, and among equals the one that waits longest.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_MAX_PICKS = 429496729
_EPSILON = 1e-13


class Edf(Generic[T]):
    """A schedule over `entries`. `weight(entry)`, which must be positive, is asked when an entry is put back.

    `picks` is how many picks to pretend to have made, so that several proxies (or several workers) do not start with the same hosts. It is done in O(n), not
    pick by pick, with Envoy's arithmetic.
    """

    __slots__ = ("_heap", "_order", "_weight")

    def __init__(self, entries: Sequence[T], weight: Callable[[T], float], picks: int = 0) -> None:
        self._weight = weight
        picks %= _MAX_PICKS
        # An epsilon on each weight: without it, weights that are multiples of one another meet at equal deadlines that differ in the last bit.
        weights = [weight(entry) + _EPSILON for entry in entries]
        total = sum(weights)
        made = 0
        heap: list[tuple[float, int, T]] = []
        for index, (entry, share) in enumerate(zip(entries, weights, strict=True)):
            count = int(share * picks / total)
            if count > 0 and count / share >= picks / total:
                count -= 1
            heap.append(((count + 1) / share, index, entry))
            made += count
        heapq.heapify(heap)
        self._heap = heap
        self._order = len(heap)
        for _ in range(picks - made):
            self.pick()

    def pick(self) -> T:
        """The next entry. IndexError when there are none."""
        heap = self._heap
        deadline, _, entry = heap[0]
        order = self._order
        self._order = order + 1
        heapq.heapreplace(heap, (deadline + 1.0 / self._weight(entry), order, entry))
        return entry
