"""The routes of one virtual host by path: which of ten thousand may match, without looking at ten thousand.

First match wins, in configured order. Exact paths are one dictionary look-up; prefixes one for each distinct length of a prefix, so the cost follows the
number of lengths that fit the path and not the number of routes. Regular expressions and the like are tried in their turn.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshproxy.http.route_match import EXACT, PREFIX

Orders = tuple[int, ...]


class PathIndex:
    """Positions of routes by path. Built from (kind, operand) of each route in order."""

    __slots__ = ("_exact", "_lengths", "_prefixes", "others")

    def __init__(self, keys: Iterable[tuple[int, bytes]]) -> None:
        exact: dict[bytes, list[int]] = {}
        prefixes: dict[bytes, list[int]] = {}
        others: list[int] = []
        for order, (kind, operand) in enumerate(keys):
            if kind == EXACT:
                exact.setdefault(operand, []).append(order)
            elif kind == PREFIX:
                prefixes.setdefault(operand, []).append(order)
            else:
                others.append(order)
        self._exact = {path: tuple(orders) for path, orders in exact.items()}
        self._prefixes = {prefix: tuple(orders) for prefix, orders in prefixes.items()}
        self._lengths = tuple(sorted({len(prefix) for prefix in prefixes}))
        self.others: Orders = tuple(others)  # routes that must be tested one by one

    def candidates(self, path: bytes) -> Orders:
        """The routes that may match a path without query, in order. Path-separated prefixes and `others` still need their own test."""
        found = self._exact.get(path, _NONE)
        prefixes = self._prefixes
        size = len(path)
        for length in self._lengths:
            if length > size:
                break
            more = prefixes.get(path[:length])
            if more is not None:
                found = _merge(found, more) if found else more
        return _merge(found, self.others) if self.others else found


def _merge(one: Orders, other: Orders) -> Orders:
    """Two ascending sequences as one; most often one lies wholly before the other."""
    if not one or not other:
        return one or other
    if one[-1] < other[0]:
        return one + other
    if other[-1] < one[0]:
        return other + one
    return tuple(sorted(one + other))


_NONE: Orders = ()
