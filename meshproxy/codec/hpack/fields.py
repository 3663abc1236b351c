"""What header blocks are decoded to. Shared between requests and connections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from meshproxy.codec.headers import Pair
from meshproxy.codec.hpack.tables import ENTRY_OVERHEAD

if TYPE_CHECKING:
    from meshproxy.codec.hpack.foresight import Start


class Fields:
    """A decoded block. Shared between requests and connections, so nobody changes it, except for `known`.

    `items`: the fields in order as they were sent; nothing about them is validated. `size`: what SETTINGS_MAX_HEADER_LIST_SIZE counts, names, values and 32
    bytes each. `over`: there were more, but here the limits were reached. `shape`: what is known of it to be the same as in other blocks, or None. `known`
    belongs to the user.
    """

    __slots__ = ("items", "known", "shape", "size")

    # Without `__init__`, which would be a good part of the work for a block.
    items: tuple[Pair, ...]
    size: int
    shape: Shape | None
    known: Any
    over = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.items!r})"


class Shape:
    """What blocks have in common that differ in nothing but the values of literals: a path, a request id, a trace context. Shared as `Fields` are.

    `items`: the fields, those with empty values that may differ. `values`: where those are and their names. `starts`: such blocks that changed the dynamic
    table. `known` belongs to the user.
    """

    __slots__ = ("items", "known", "size", "starts", "values")

    def __init__(self, items: tuple[Pair, ...], values: tuple[tuple[int, bytes], ...]) -> None:
        self.items = items
        self.size = size_of(items)
        self.values = values
        self.starts: tuple[Start, ...] = ()
        self.known: Any = None

    def __repr__(self) -> str:
        return f"Shape({self.items!r}, {self.values!r})"


class ShapedFields(Fields):
    """A decoded block of a known shape; the fields are put together when they are asked for.

    `values`: those of the literals that the shape leaves open, in order. `visible`: known to be of visible ASCII characters and spaces.
    """

    __slots__ = ("_items", "values", "visible")

    shape: Shape
    values: list[bytes]
    visible: bool
    _items: tuple[Pair, ...]

    @property
    def items(self) -> tuple[Pair, ...]:  # type: ignore[override]
        """See `Fields`."""
        try:
            return self._items
        except AttributeError:
            items = [*self.shape.items]
            for (place, name), value in zip(self.shape.values, self.values, strict=True):
                items[place] = name, value
            self._items = (*items,)
            return self._items


class CutFields(Fields):
    """What of a decoded block is within the limits, and `beyond`, the first field that is not."""

    __slots__ = ("beyond",)

    over = True

    beyond: Pair


def size_of(items: Sequence[Pair]) -> int:
    """What SETTINGS_MAX_HEADER_LIST_SIZE counts of fields, and a dynamic table of its entries: names, values and 32 bytes each."""
    return ENTRY_OVERHEAD * len(items) + sum(map(len, chain.from_iterable(items)))
