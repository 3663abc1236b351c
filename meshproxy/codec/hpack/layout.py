"""Where the values are in blocks that differ in nothing else."""

from __future__ import annotations

from struct import Struct
from struct import error as LengthError  # noqa: N812
from typing import Any

MAX_LENGTHS = 512  # of the values of a layout, together

# How far behind its first byte a short string ends, Huffman coded or not; beyond any block for those that are something else.
_BEYOND = 1 << 30
CODED = [_BEYOND] * 128 + [1 + length for length in range(127)] + [_BEYOND]
PLAIN = [1 + length for length in range(127)] + [_BEYOND] * 129


class Layout:
    """Where values are in blocks in which so many bytes come before, between and behind them, by what their lengths are. Shared as shapes are, bounded.

    `start`: the place of the first length, and a tree: by that byte the place of the next length, and another tree. In place of the last one are what takes the
    values out of a block of that length, and what takes all else. `sizes`: of what comes before each value. `coded`: the values are.
    """

    __slots__ = ("_known", "_missed", "_tail", "coded", "sizes", "start")

    def __init__(self, sizes: tuple[int, ...], tail: int, *, coded: bool) -> None:
        self.sizes = sizes
        self.coded = coded
        self.start: tuple[int, Any] = sizes[0], {}
        self._tail = tail
        self._known = self._missed = 0

    def values(self, block: bytes, rest: tuple[bytes, ...]) -> list[bytes] | None:
        """The values of a block whose lengths are not in the tree; None if not all else is `rest`."""
        ends = CODED if self.coded else PLAIN
        values = []
        position = 0
        try:
            for size, part in zip(self.sizes, rest):  # noqa: B905  # one more part than values
                start = position + size
                if block[position:start] != part:
                    return None
                position = start + ends[block[start]]
                values.append(block[start + 1 : position])
        except IndexError:  # it is too short
            return None
        if block[position:] != rest[-1] or position > len(block):
            return None
        if self._known < 0:
            return values
        if self._known >= MAX_LENGTHS:
            # Where lengths are this many, most of what is learnt comes too late to be of use.
            self._missed += 1
            if self._missed % 8:
                return values
            self.forget()
        self._learn(list(map(len, values)))
        return values

    def _learn(self, lengths: list[int]) -> None:
        pairs = [*zip(self.sizes, lengths, strict=True)]
        values = Struct("".join(f"{size + 1}x{length}s" for size, length in pairs) + f"{self._tail}x").unpack
        others = Struct("".join(f"{size}s{length + 1}x" for size, length in pairs) + f"{self._tail}s").unpack
        self._known += 1
        coded = 128 if self.coded else 0
        position, node = self.start
        for length, size in zip(lengths, self.sizes[1:]):  # noqa: B905  # the last one is behind it
            position, node = node.setdefault(coded + length, (position + 1 + length + size, {}))
        node[coded + lengths[-1]] = 0, (values, others)

    def find(self, block: bytes, rest: tuple[bytes, ...]) -> list[bytes] | None:
        """The values of a block; None if not all else is `rest`."""
        position, node = self.start
        try:
            for _ in self.sizes:
                position, node = node[block[position]]
            values, others = node
            return [*values(block)] if others(block) == rest else None
        except KeyError:
            return self.values(block, rest)
        except (IndexError, LengthError):  # it is too short, or not of that length
            return None

    @property
    def retired(self) -> bool:
        """It is shared no more."""
        return self._known < 0

    def forget(self) -> None:
        """Know no lengths."""
        self.start[1].clear()
        self._known = 0

    def retire(self) -> None:
        """It is shared no more: what still uses it shall not fill memory."""
        self.forget()
        self._known = -1
