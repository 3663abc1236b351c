"""Header blocks to fields (RFC 7541 section 3): memos in front, and behind them a loop with little to do for each field.

A block decodes to the same fields for as long as the dynamic table does not change, so a connection remembers its blocks by their bytes; and connections
share what their blocks were decoded to (`Fields`), for users to keep there what they concluded. Only what comes for the second time is remembered: what is
unique (a path, an id) does not have to make room for what never comes again. All memos are bounded, and emptied when they are full: an order would cost every
use something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, chain, islice
from struct import Struct
from struct import error as LengthError  # noqa: N812
from typing import Any

from meshproxy.codec.headers import Pair
from meshproxy.codec.hpack.huffman import decode as decode_huffman
from meshproxy.codec.hpack.huffman import decode_visible
from meshproxy.codec.hpack.tables import DEFAULT_TABLE_SIZE, ENTRY_OVERHEAD, FIRST_DYNAMIC, STATIC, UNIQUE, HpackError, decode_rest

MAX_LIST_SIZE = 65536
MAX_FIELDS = 1024

# Between the limits on memory and those of a peer that never repeats itself.
_MAX_KNOWN = 32  # blocks of a connection
_MAX_KNOWN_BLOCK = 2048  # bytes
_MAX_SHARED = 256  # decoded blocks that connections share ...
_MAX_SHARED_SIZE = 8192  # ... of at most so many bytes
_MAX_SHARED_SHAPES = 256
_MAX_SHAPES = 4  # of a connection
_MAX_LITERALS = 32  # in such a block
_MAX_LAYOUTS = 16
_MAX_LENGTHS = 512  # of the values of a layout, together
_MAX_CHAINS = 32  # of a hundred steps at most
_MAX_STARTS = 8  # of a shape
_MAX_PENDING = 128  # blocks, besides those of a chain
_MAX_KEPT = 4  # values of such a block that do not go into the table
_MAX_ONCE = 1024
_TURNS = 3
_MAX_INDEPENDENT = 256
_MAX_NAMES = 512
_MAX_NAME = 64
_MAX_SECRETS = 512  # of at most 126 bytes
_MAX_PAIRS = 2048
_MAX_PAIR = 256

_NEWEST = 0x80 + FIRST_DYNAMIC  # see `Decoder._table`
_PIECE = 4096  # bytes of a block after which the fields are counted: a byte can stand for a whole table

Part = Pair | bytes
Segment = tuple[bytes, int]  # with its length
Added = tuple[tuple[Any, int], ...]  # see `_Form.added`
_indexed = re.compile(rb"[\x81-\xfe]+").match  # fields that are one byte each

_new = object.__new__
NOTHING_KNOWN: dict[bytes, Fields] = {}  # of all decoders that know no block; stays empty


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
        self.size = _size(items)
        self.values = values
        self.starts: tuple[_Start, ...] = ()
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
    """What of a decoded block is within the limits."""

    __slots__ = ()

    over = True


class _Layout:
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
        ends = _CODED if self.coded else _PLAIN
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
        if self._known >= _MAX_LENGTHS:
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


class _Form:
    """What there is to a block that puts some of its values into the dynamic table, but for the values.

    `rest`: what is around them, where `layout` finds them. `secret`: credentials among `rest`, and their place among the values. `added`: what goes into the
    table, newest first: a field and -1, or where the value differs, the name and which of the values. `size`: of that, but for the values, and less the
    credentials; `kept`: the other values.
    """

    __slots__ = ("added", "kept", "layout", "rest", "secret", "shape", "size")

    def __init__(self, shape: Shape, layout: _Layout, rest: tuple[bytes, ...], secret: tuple[int, bytes] | None, added: Added) -> None:
        self.shape = shape
        self.layout = layout
        self.rest = rest
        self.secret = secret
        self.added = added
        self.size = _size([(what, b"") if number >= 0 else what for what, number in added])
        among = {number for _, number in added}
        if secret is not None:
            self.size -= len(secret[1])
            among.add(secret[0])
        self.kept = tuple(number for number in range(len(shape.values)) if number not in among)


class _Step(_Form):
    """What a block looks like but for its values, if it has the shape of the one before and puts the same of its values into the dynamic table: the same, and
    references to all that was there before are as much higher as there are insertions.

    Steps follow each other in chains, which connections share whose blocks were the same. `deepest`: how many entries are newer than the oldest that is
    referenced, -1 if none is; `late`: one is referenced behind an insertion, which may have evicted it.
    """

    __slots__ = ("_moving", "deepest", "late", "next")

    def __init__(self, form: _Form, rest: tuple[bytes, ...], moving: tuple[tuple[int, ...], ...], deepest: int, *, late: bool) -> None:
        """`moving`: where in each part of `rest` the bytes of such references are."""
        super().__init__(form.shape, form.layout, rest, form.secret, form.added)
        self._moving = moving
        self.deepest = deepest
        self.late = late
        self.next: _Step | None = None  # as far as it is known

    def go_on(self) -> _Step | None:
        """The next step; None when some reference takes another byte from there on."""
        count = len(self.added)
        rest = []
        for part, places in zip(self.rest, self._moving, strict=True):
            moved = bytearray(part)
            for place in places:
                byte = moved[place] + count
                if byte >= (0xFF if moved[place] >= 0x80 else 0x80):
                    return None
                moved[place] = byte
            rest.append(bytes(moved))
        self.next = _Step(self, (*rest,), self._moving, self.deepest + count if self.deepest >= 0 else -1, late=self.late)
        return self.next


class _Start(_Form):
    """A block that was parsed and put new values into the dynamic table, and that may come again but for those: as soon as much was put there, clients put
    there anew what fell out.

    `references`: to which entries, by how many were newer when the block began, and what they have to be: a field, or one of that name. `deepest`: as that of
    a step. `step`: what may come next. `then`: a start that came next lately, and refers to nothing but what this one has put into the table.
    """

    __slots__ = ("deepest", "references", "step", "then")

    def __init__(self, form: _Form, references: tuple[tuple[int, Pair | bytes], ...], step: _Step | None) -> None:
        super().__init__(form.shape, form.layout, form.rest, form.secret, form.added)
        self.references = references
        self.deepest = max((newer for newer, _ in references), default=-1)
        self.step = step
        self.then: _Start | None = None

    def follows(self, other: _Start) -> bool:
        """Whether all references are to what `other` has put into the table right before."""
        if self.deepest >= len(other.added):
            return False
        for newer, expected in self.references:
            what, number = other.added[newer]
            name, entry = (what, None) if number >= 0 else (what[0], what)
            if expected != (name if expected.__class__ is bytes else entry):
                return False
        return True

    def same(self, other: _Start) -> bool:
        """Whether there is no difference but in what comes next."""
        return self.layout is other.layout and self.rest == other.rest and self.added == other.added and self.references == other.references

    def fits(self, newest: list[Pair]) -> bool:
        """Whether all references are to what they have to be."""
        if self.deepest >= len(newest):
            return False
        for newer, expected in self.references:
            entry = newest[newer]
            if expected != (entry[0] if expected.__class__ is bytes else entry):
                return False
        return True


class Decoder:
    """One direction of a connection. After an HpackError it is unusable, as the connection is.

    `max_list_size` (bytes, as `Fields.size`) and `max_fields` bound what a block is decoded to. The work for a block, and the memory meanwhile, are linear in
    its length.
    """

    __slots__ = (
        "_least",
        "_limit",
        "_pending",
        "_room",
        "_shape",
        "_shapes",
        "_shapes_missed",
        "_size",
        "_step",
        "_table",
        "_turn",
        "_used",
        "_last",
        "known",
        "max_fields",
        "max_list_size",
    )

    def __init__(self, max_table_size: int = DEFAULT_TABLE_SIZE, max_list_size: int = MAX_LIST_SIZE, max_fields: int = MAX_FIELDS) -> None:
        """`max_table_size`: what our SETTINGS_HEADER_TABLE_SIZE allows the peer. Below 4096, the peer has to start with a size update."""
        self.max_list_size = max_list_size
        self.max_fields = max_fields
        # What the peer may reference, by the byte that does so (0x80 and the index): the static table and from `_NEWEST` on the dynamic one, newest first.
        self._table = _STATIC_TABLE
        self._size = DEFAULT_TABLE_SIZE  # the dynamic table's maximum, as the peer last set it
        self._used = 0
        self._limit = DEFAULT_TABLE_SIZE
        self._least: int | None = None  # the peer owes a size update to this or less
        self.known = NOTHING_KNOWN  # HOT, for the session: blocks that came before, since when the table has not changed; others it asks `decode_new` for
        # With where their values are, the parts of their blocks that are the same, and the credentials, at their place among the values, if those are, too.
        self._shapes: tuple[tuple[Shape, _Layout, tuple[bytes, ...], tuple[int, bytes] | None], ...] = ()
        self._shapes_missed = 0
        self._turn = 0  # blocks of a known shape until one is looked at whether it came before
        self._step: _Step | None = None  # what may come next
        self._shape: Shape | None = None  # of the last block that put new values into the table
        # Blocks that were foreseen do not touch the table: there is work to do only for what is still in it when somebody looks (`_settle`). What they put
        # there, as their steps have it, and their values; oldest first.
        self._pending = _NOTHING_PENDING
        self._last: tuple[_Start, list[bytes], int] | None = None  # the last start that was taken: its values, and bytes that it has put into the table
        self._room = -1  # bytes that may be put there before anything falls out that `_step` refers to; below zero, that has to be looked at
        if max_table_size != DEFAULT_TABLE_SIZE:
            self.max_table_size = max_table_size

    @property
    def max_table_size(self) -> int:
        """What the peer may set its dynamic table to, in bytes: to be set when the peer has acknowledged our SETTINGS."""
        return self._limit

    @max_table_size.setter
    def max_table_size(self, size: int) -> None:
        self._limit = size
        if size < self._size and (self._least is None or size < self._least):
            self._least = size
            self._forget()

    def decode(self, block: bytes) -> Fields:
        """A complete header block. Raises HpackError and nothing else."""
        fields = self.known.get(block)
        return self.decode_new(block) if fields is None else fields

    def decode_new(self, block: bytes) -> Fields:
        """The same for a block that is not in `known`."""
        # HOT: a block that differs from others in nothing but the values of literals, or that says the same whatever the dynamic table.
        step = self._step
        if step is not None:
            layout = step.layout
            position, node = layout.start
            strings: list[bytes] | None
            try:
                for _ in layout.sizes:
                    position, node = node[block[position]]
                values, others = node
                strings = [*values(block)] if others(block) == step.rest else None
            except KeyError:
                strings = layout.values(block, step.rest)
            except (IndexError, LengthError):  # it is too short, or not of that length
                strings = None
            if strings is not None:
                shaped = _new(ShapedFields)
                shaped.visible = False
                if layout.coded:
                    visible = decode_visible(strings)
                    if visible is None:
                        strings = [*map(decode_huffman, strings)]
                    else:
                        strings = visible
                        shaped.visible = True
                if step.secret is not None:
                    strings.insert(*step.secret)
                size = sum(map(len, strings))
                room = self._room - step.size - size
                for number in step.kept:
                    room += len(strings[number])
                if room >= 0:
                    self._room = room
                    self._pending.append((step.added, strings))
                    self._step = step.next or step.go_on()
                if room >= 0 or self._take_last(step, strings):
                    if self._shapes:
                        self._shapes = ()
                    self._shapes_missed = 0
                    self.known = NOTHING_KNOWN
                    shaped.values = strings
                    shape = shaped.shape = step.shape
                    size = shaped.size = shape.size + size
                    shaped.known = None
                    return shaped if size <= self.max_list_size else self._over([*shaped.items])
        for shape, layout, rest, secret in self._shapes:
            position, node = layout.start
            try:
                for _ in layout.sizes:
                    position, node = node[block[position]]
                values, others = node
                if others(block) != rest:
                    continue
                strings = [*values(block)]
            except KeyError:
                strings = layout.values(block, rest)
                if strings is None:
                    continue
            except (IndexError, LengthError):
                continue
            return self._shaped(block, shape, strings, secret, layout.coded)
        independent = _independent.get(block)
        if independent is not None and independent[2] <= self._size:
            fields, added, size = independent
            if fields.size <= self.max_list_size and len(fields.items) <= self.max_fields and self._least is None:
                self._add(added, size)
                return fields
        if self._shape is not None and self._least is None and (self._shapes_missed < 8 or self._shapes_missed % 8 == 0):
            begun = self._take_start(self._shape, block)
            if begun is not None:
                return begun
        return self._parse(block)

    def _shaped(self, block: bytes, shape: Shape, values: list[bytes], secret: tuple[int, bytes] | None, coded: bool) -> Fields:
        # HOT: a keyword would cost more than the rest of the call
        shaped = _new(ShapedFields)
        shaped.visible = False
        if coded:
            strings = decode_visible(values)
            if strings is None:
                values = [*map(decode_huffman, values)]
            else:
                values = strings
                shaped.visible = True
        if secret is not None:
            place, value = secret
            values.insert(place, value)
        shaped.values = values
        size = shaped.size = shape.size + sum(map(len, values))
        shaped.shape = shape
        shaped.known = None
        if size > self.max_list_size or len(shape.items) > self.max_fields:
            return self._over([*shaped.items])
        # Most do not come again: so only some are remembered, and looked for.
        turn = self._turn
        if turn:
            self._turn = turn - 1
        else:
            self._turn = _TURNS
            if block in _once:
                return self._fields(block, [*shaped.items], size, shape)
            if len(block) <= _MAX_KNOWN_BLOCK:
                if len(_once) >= _MAX_ONCE:
                    _once.clear()
                _once.add(block)
        return shaped

    def _take_last(self, step: _Step, values: list[bytes]) -> bool:
        """A step with which something falls out of the table that it refers to, if it does. False, and nothing done, if it comes too late."""
        if step.late:
            return False
        # What names are taken from are entries of the block before: they have to be there when they are.
        pending = self._pending
        if not pending or pending[-1][0] is not step.added or sum(map(len, chain(values, pending[-1][1]))) + 2 * step.size > self._size:
            count = len(step.added)
            before = self._newest(count)
            if len(before) < count or _size(before) + _size(_entries(step.added, values)) > self._size:
                return False
        self._defer(step.added, values)
        self._step = None if step.deepest >= 0 else step.next or step.go_on()
        return True

    def _expect(self, step: _Step | None) -> None:
        """Be prepared for `step`, if all is there that it refers to."""
        self._step = None
        if step is None:
            return
        deepest = step.deepest if step.deepest >= 0 else len(step.added)
        entries = self._newest(deepest + 1)
        if len(entries) <= deepest:
            return
        self._room = self._size - _size(entries) if step.deepest >= 0 else -1
        if self._pending is _NOTHING_PENDING:
            self._pending = []
        self._step = step

    def _take_start(self, shape: Shape, block: bytes) -> Fields | None:
        """None, and nothing done, for a block that is none of those that are known to begin something."""
        last = self._last
        then = None
        if last is not None and self._pending and self._pending[-1][1] is last[1]:  # nothing came since
            then = last[0].then
        else:
            last = None
        for start in shape.starts if then is None else (then, *shape.starts):
            values = None if start.layout.retired else start.layout.find(block, start.rest)
            if values is None:
                continue
            if last is not None and start is then:
                reach = last[2]
            else:
                before = self._newest(start.deepest + 1)
                if not start.fits(before):
                    continue
                reach = _size(before)
                if start is not shape.starts[0]:  # those that follow another one are not looked for
                    shape.starts = (start, *[other for other in shape.starts if other is not start])
            shaped = ShapedFields()
            shaped.visible = False
            if start.layout.coded:
                strings = decode_visible(values)
                shaped.visible = strings is not None
                values = [*map(decode_huffman, values)] if strings is None else strings
            if start.secret is not None:
                values.insert(*start.secret)
            total = sum(map(len, values))
            size = start.size + total - sum([len(values[number]) for number in start.kept])
            if size + reach > self._size:  # what it refers to might fall out before it does
                return None
            self._forget()
            self._defer(start.added, values)
            self._shapes_missed = 0
            shaped.values = values
            shape = shaped.shape = start.shape
            shaped.size = shape.size + total
            shaped.known = None
            if shaped.size > self.max_list_size or len(shape.items) > self.max_fields:
                return self._over([*shaped.items])
            if last is not None and start is not then and start.follows(last[0]):
                last[0].then = start
            self._last = start, values, size
            step = start.step
            if last is not None and start is then and step is not None and step.deepest + 1 == len(start.added) + len(last[0].added):
                self._room = self._size - size - reach
                self._step = step
            else:
                self._expect(step)
            return shaped
        return None

    def _newest(self, count: int) -> list[Pair]:
        """The newest `count` fields of the dynamic table, or all."""
        found: list[Pair] = []
        for added, values in reversed(self._pending):
            if len(found) >= count:
                break
            found += _entries(added, values)
        del found[count:]
        if len(found) == count and _size(found) <= self._size:
            return found
        self._settle()
        return self._table[_NEWEST : _NEWEST + count]

    def _defer(self, added: Added, values: list[bytes]) -> None:
        """Put fields into the table, later; together they are not too large for it."""
        pending = self._pending
        if pending is _NOTHING_PENDING:
            pending = self._pending = []
        elif len(pending) >= _MAX_PENDING:
            self._settle()
        pending.append((added, values))

    def _settle(self) -> None:
        """Put into the table what is pending. What came last is what stays: each field for as long as there is room for it and all that came later."""
        pending = self._pending
        if not pending:
            return
        table = self._table
        if table is _STATIC_TABLE:
            table = self._table = table.copy()
        newest: list[Pair] = []
        size = 0
        for added, values in reversed(pending):
            entries = _entries(added, values)
            newest += entries
            size += _size(entries)
            if size >= self._size:
                del table[_NEWEST:]
                self._used = 0
                break
        pending.clear()
        table[_NEWEST:_NEWEST] = newest
        self._used += size
        self._evict(0)

    def _parse(self, block: bytes) -> Fields:
        # HOT: no call in the loop that is not needed.
        items: list[Pair] = []
        position = 0
        end = len(block)
        literals: list[tuple[int, int, int]] = []  # those with values that are new or not indexed: place, where the value's length is, and where it ends
        changed = varied = False  # insertions into the table, also of values that are new
        if self._pending:
            self._settle()
        try:
            if self._least is not None or b" " <= block[:1] < b"@":  # 0x20 to 0x3f
                position = self._size_updates(block)
                changed = True
            table = self._table
            used = self._used
            most = self._size
            stop = end if end <= _PIECE else position + _PIECE
            while True:
                while position < stop:
                    first = block[position]
                    if first > 0x80:
                        if first < 0xFF:
                            run = _indexed(block, position, stop)
                            items += map(table.__getitem__, run[0])  # type: ignore[index]  # it begins with such a byte
                            position = run.end()  # type: ignore[union-attr]
                        else:
                            index, position = decode_rest(block, position + 1, 0xFF)
                            items.append(table[index])
                        continue
                    position += 1
                    name = _NAMES[first]
                    if not name:
                        if name is None:
                            base = _BASES[first]
                            index = block[position]
                            if base and index < 128:
                                name = table[base + index][0]
                                position += 1
                            else:
                                name, position = _name_of(table, block, first, position)
                        else:
                            start = position
                            position += 1 + (block[position] & 127)
                            name = _literal_names.get(block[start:position])
                            if name is None:
                                name, position = _literal_name(block, start)
                    begin = position
                    length = block[position]
                    if length & 127 == 127:
                        value, position = _string(block, position)
                    elif length < 128:
                        position += length + 1
                        value = block[begin + 1 : position]
                    else:
                        position += length - 127
                        value = block[begin + 1 : position]
                        if first == 0x1F:  # most of all, authorization
                            value = _secrets.get(value) or _secret(value)
                        else:
                            value = decode_huffman(value)
                    pair = name, value
                    if first < 0x40:
                        literals.append((len(items), begin, position))
                        items.append(pair)
                        continue
                    size = len(name) + len(value) + ENTRY_OVERHEAD
                    if size > most:
                        if used:  # an empty table stays so: nginx has one of no bytes, and indexes everything all the same
                            del table[_NEWEST:]
                            used = 0
                            changed = True
                        items.append(pair)
                        continue
                    changed = True
                    used += size
                    while used > most:
                        oldest, old = table.pop()
                        used -= len(oldest) + len(old) + ENTRY_OVERHEAD
                    if table is _STATIC_TABLE:
                        table = self._table = table.copy()
                    known = None
                    if size <= _MAX_PAIR and name not in UNIQUE:
                        known = _pairs.get(pair)
                        if known is None:
                            if len(_pairs) >= _MAX_PAIRS:
                                _pairs.clear()
                            _pairs[pair] = pair
                        else:
                            pair = known
                    if known is None:
                        varied = True
                        literals.append((len(items), begin, position))
                    table.insert(_NEWEST, pair)
                    items.append(pair)
                if position >= end:
                    break
                self._cut(items)
                literals.clear()
                stop = position + _PIECE if end - position > _PIECE else end
        except IndexError:
            raise HpackError("truncated block, or an index that nothing has") from None
        if position > end:
            raise HpackError("truncated block")
        if changed:
            self._used = used
            self._forget()
            if varied and len(literals) <= _MAX_LITERALS:
                return self._varied(block, items, literals)
        elif 0 < len(literals) <= _MAX_LITERALS and end <= _MAX_KNOWN_BLOCK:
            self._learn(block, items, literals)
        return self._fields(block, items, _size(items), None, changed=changed)

    def _varied(self, block: bytes, items: list[Pair], literals: list[tuple[int, int, int]]) -> Fields:
        # HOT: a block that puts new values into the table, so that it will not come again, but may be of a known shape.
        fields = Fields()
        fields.items = (*items,)
        size = 0
        for place, _, _ in literals:
            items[place], value = items[place]  # type: ignore[call-overload]  # see `_shapes`
            size += len(value)
        key = (*items,)
        shape = fields.shape = _shapes.get(key) or _new_shape(key)
        size = fields.size = _size(fields.items) if shape is None else shape.size + size
        if size > self.max_list_size or len(items) > self.max_fields:
            return self._over([*fields.items])
        fields.known = None
        self._shape = shape
        if shape is not None and len(block) <= _MAX_KNOWN_BLOCK:
            # Where blocks of several shapes alternate, all this is in vain.
            self._shapes_missed += 1
            if self._shapes_missed < 8 or self._shapes_missed % 8 == 0:
                self._foresee(block, fields.items, shape, literals)
        return fields

    def _foresee(self, block: bytes, items: tuple[Pair, ...], shape: Shape, literals: list[tuple[int, int, int]]) -> None:
        """Be prepared for a block of the same shape to come next, and for this one to come again."""
        scanned = _references(block)
        if scanned is None:
            return
        found, inserted = scanned
        if _size([items[place] for place, _ in inserted]) > self._size:
            return
        # Credentials are mostly the same: then they belong to what is compared.
        secret = None
        begins = {begin for _, begin in inserted}
        for number, (place, begin, end) in enumerate(literals):
            if items[place][0] in _SECRETS and begin not in begins and block[begin] >= 128 and decode_visible([block[begin + 1 : end]]) is not None:
                known = hash((shape.items, items[place]))
                if known in _once:
                    secret = number, items[place][1]
                elif len(_once) < _MAX_ONCE:
                    _once.add(known)
                break
        values = [(begin, end) for number, (_, begin, end) in enumerate(literals) if secret is None or number != secret[0]]
        coded = block[values[0][0]] >= 128
        if len(values) - len(inserted) > _MAX_KEPT or any((block[begin] >= 128) != coded for begin, _ in values):
            return
        moved = _moving(found, len(inserted), items, self._table)
        moving, deepest, late = moved or ([], 0, False)
        parts, places, position = [], [], 0
        for begin, end in [*values, (len(block), 0)]:
            parts.append(block[position:begin])
            places.append(tuple(place - position for place in moving if position <= place < begin))
            position = end
        layout = _layout(tuple((part, len(part)) for part in parts[:-1]), parts[-1], coded=coded)
        numbers = {begin: number for number, (_, begin, _) in enumerate(literals)}
        added = tuple((items[place][0], numbers[begin]) if begin in numbers else (items[place], -1) for place, begin in reversed(inserted))
        form = _Form(shape, layout, (*parts,), secret, added)
        step = None
        if moved is not None and numbers.keys() >= begins:  # what else is inserted, the next one refers to
            key = shape, layout, secret, form.rest, (*places,), added, deepest, late
            first = _steps.get(key)
            if first is None:
                if len(_steps) >= _MAX_CHAINS:
                    _steps.clear()
                first = _steps[key] = _Step(form, form.rest, (*places,), deepest, late=late)
            step = first.next or first.go_on()
            self._expect(step)
        # What it has put there itself, and refers to, would have to be looked at more closely.
        if all(newer >= 0 or not whole for _, newer, _, whole, _ in found):
            references = tuple((newer, items[place] if whole else items[place][0]) for _, newer, place, whole, _ in found if newer >= 0)
            number = hash((layout, form.rest, added, references))
            if number in _once:
                start = _Start(form, references, step)
                shape.starts = (start, *[other for other in shape.starts if not start.same(other)][: _MAX_STARTS - 1])
            elif len(_once) < _MAX_ONCE:
                _once.add(number)

    def _over(self, items: list[Pair]) -> Fields:
        """What of a block with too many fields is within the limits."""
        fields = CutFields()
        del items[self._cut(items) :]
        fields.items = (*items,)
        fields.size = _size(items)
        fields.shape = fields.known = None
        return fields

    def _fields(self, block: bytes, items: list[Pair], size: int, shape: Shape | None, *, changed: bool = False) -> Fields:
        # HOT
        if size > self.max_list_size or len(items) > self.max_fields:
            return self._over(items)
        if block in _once:
            return self._again(block, (*items,), size, shape, changed=changed)
        if len(block) <= _MAX_KNOWN_BLOCK:
            if len(_once) >= _MAX_ONCE:
                _once.clear()
            _once.add(block)
        fields = Fields()
        fields.items = (*items,)
        fields.size = size
        fields.shape = shape
        fields.known = None
        return fields

    def _learn(self, block: bytes, items: list[Pair], literals: list[tuple[int, int, int]]) -> None:
        """Remember the shape of a block, if it comes for the second time."""
        coded = block[literals[0][1]] >= 128
        if any((block[begin] >= 128) != coded for _, begin, _ in literals):
            return
        ways: list[tuple[int, bytes] | None] = [None]
        place = next((number for number, (place, _, _) in enumerate(literals) if items[place][0] in _SECRETS), None)
        if place is not None and coded:
            _, begin, end = literals[place]
            if decode_visible([block[begin + 1 : end]]) is not None:
                ways.insert(0, (place, items[literals[place][0]][1]))
        for secret in ways:
            segments = []
            position = 0
            for number, (_, begin, end) in enumerate(literals):
                if secret is None or number != secret[0]:
                    segments.append((block[position:begin], begin - position))
                    position = end
            tail = block[position:]
            number = hash((*segments, tail))
            if segments and number in _once:
                self._keep_shape(items, literals, tuple(segments), tail, secret, coded=coded)
                return
            _once.add(number)  # bounded by `_fields`, which comes next

    def _keep_shape(
        self,
        items: list[Pair],
        literals: list[tuple[int, int, int]],
        segments: tuple[Segment, ...],
        tail: bytes,
        secret: tuple[int, bytes] | None,
        *,
        coded: bool,
    ) -> None:
        parts: list[Part] = [*items]
        for place, _, _ in literals:
            parts[place] = items[place][0]
        shape = _shape((*parts,))
        if shape is None:
            return
        known = shape, _layout(segments, tail, coded=coded), (*(segment for segment, _ in segments), tail), secret
        if len(self._shapes) < _MAX_SHAPES:
            self._shapes = (known, *self._shapes)
        else:
            # Where many shapes alternate, all this is in vain: so a new one replaces another not every time.
            self._shapes_missed += 1
            if self._shapes_missed % 8 == 0:
                self._shapes = (known, *self._shapes[:-1])

    def _cut(self, items: list[Pair]) -> int:
        """How many of `items` are within the limits. Of those that are not, one is left."""
        size = 0
        for position, (name, value) in enumerate(items):
            size += len(name) + len(value) + ENTRY_OVERHEAD
            if size > self.max_list_size or position == self.max_fields:
                del items[position + 1 :]
                return position
        return len(items)

    def _again(self, block: bytes, items: tuple[Pair, ...], size: int, shape: Shape | None, *, changed: bool) -> Fields:
        """The fields of a block that came before: those that connections share. If the table is still the same, the block is remembered."""
        fields = _shared.get(items)
        if fields is None:
            fields = Fields()
            fields.items = items
            fields.size = size
            fields.shape = shape
            fields.known = None
            if size > _MAX_SHARED_SIZE:
                return fields
            fields.shape = None  # more can be concluded from the whole
            if len(_shared) >= _MAX_SHARED:
                _shared.clear()
            _shared[items] = fields
        if changed:
            self._note_independent(block, fields)
        else:
            if len(self.known) >= _MAX_KNOWN or self.known is NOTHING_KNOWN:
                self.known = {}
            self.known[block] = fields
        return fields

    def _note_independent(self, block: bytes, fields: Fields) -> None:
        """Remember a block that changes the dynamic table in the same way whenever it comes: some servers index all fields of every response anew."""
        places = _insertions(block)
        if places is None:
            return
        added = [fields.items[place] for place in reversed(places)]  # the newest first
        if len(_independent) >= _MAX_INDEPENDENT:
            _independent.clear()
        _independent[block] = fields, added, _size(added)

    def _add(self, added: list[Pair], size: int) -> None:
        # HOT: several insertions at once, for which there is room in an empty table.
        if self._pending:
            self._settle()
        self._forget()
        if self._used + size > self._size:
            self._evict(size)
        self._used += size
        if self._table is _STATIC_TABLE:
            self._table = _STATIC_TABLE.copy()
        self._table[_NEWEST:_NEWEST] = added

    def _size_updates(self, block: bytes) -> int:
        """Do what `block` begins with of size updates; where its fields begin."""
        position = 0
        while position < len(block) and block[position] & 0xE0 == 0x20:
            size = block[position] & 31
            position += 1
            if size == 31:
                size, position = decode_rest(block, position, 31)
            if size > self._limit or (self._least is not None and size > self._least):
                raise HpackError(f"the dynamic table set to {size} bytes, {self._limit} are allowed")
            self._least = None
            self._size = size
            self._forget()
            self._evict(0)
        if self._least is not None:
            raise HpackError("no size update after a smaller SETTINGS_HEADER_TABLE_SIZE")
        return position

    def _forget(self) -> None:
        self.known = NOTHING_KNOWN
        self._shapes = ()
        self._step = None

    def _evict(self, room: int) -> None:
        """Forget the oldest fields until there are `room` bytes, or the dynamic table is empty (section 4.3)."""
        missing = self._used + room - self._size
        if missing <= 0:
            return
        table = self._table
        count = size = 0
        oldest = islice(reversed(table), len(table) - _NEWEST)
        for length in islice(accumulate(map(len, chain.from_iterable(oldest))), 1, None, 2):
            count += 1
            size = length + count * ENTRY_OVERHEAD
            if size >= missing:
                break
        del table[len(table) - count :]
        self._used -= size


_NOTHING_PENDING: list[tuple[Added, list[bytes]]] = []  # stays empty

# What the decoders of the process share.
# The table of decoders whose dynamic table was never used; not changed. No byte that references something is below 0x81.
_STATIC_TABLE = [STATIC[0]] * 0x80 + [*STATIC]
_literal_names: dict[bytes, bytes] = {}  # literal names as they came lately, with their length -> themselves
_secrets: dict[bytes, bytes] = {}  # values that are never indexed, Huffman coded -> as they are: the same ones come all the time, from one client
_pairs: dict[Pair, Pair] = {}  # fields in dynamic tables: those of different connections are mostly the same
_once: set[bytes | int] = set()  # blocks that came lately, and hashes of what is the same in similar ones
_shapes: dict[tuple[Part, ...], Shape] = {}  # by the fields; of those with values that differ, the names
_layouts: dict[tuple[int, ...], _Layout] = {}  # by the sizes of what is no value, and whether values are coded
_shared: dict[tuple[Pair, ...], Fields] = {}
_steps: dict[Any, _Step] = {}  # the first of each chain, by what its block was like
# Blocks without references to the dynamic table -> their fields, what they put into it (the newest first), and the size of that.
_independent: dict[bytes, tuple[Fields, list[Pair], int]] = {}

# The names of literals by their first bytes: from the static table; empty for a literal name, None where there is more to see.
_NAMES: list[bytes | None] = [None] * 0x81
for _kind, _last in ((0x00, 14), (0x10, 14), (0x40, FIRST_DYNAMIC - 1)):
    _NAMES[_kind : _kind + _last + 1] = [name for name, _ in STATIC[: _last + 1]]


def _new_shape(key: tuple[Part, ...]) -> Shape | None:
    """A shape that nobody knows, if it comes for the second time."""
    number = hash(key)
    if number in _once:
        return _shape(key)
    if len(_once) >= _MAX_ONCE:
        _once.clear()
    _once.add(number)
    return None


def _shape(key: tuple[Part, ...]) -> Shape | None:
    """The shape that connections share; None if it is too large."""
    shape = _shapes.get(key)
    if shape is None:
        items = tuple((part, b"") if isinstance(part, bytes) else part for part in key)
        if _size(items) > _MAX_SHARED_SIZE:
            return None
        if len(_shapes) >= _MAX_SHARED_SHAPES:
            _shapes.clear()
        shape = _shapes[key] = Shape(items, tuple((place, part) for place, part in enumerate(key) if isinstance(part, bytes)))
    return shape


def _layout(segments: tuple[Segment, ...], tail: bytes, *, coded: bool) -> _Layout:
    """The layout that connections share."""
    key = (*(size for _, size in segments), len(tail), coded)
    layout = _layouts.get(key)
    if layout is None:
        if len(_layouts) >= _MAX_LAYOUTS:
            for retired in _layouts.values():
                retired.retire()
            _layouts.clear()
        layout = _layouts[key] = _Layout(key[:-2], len(tail), coded=coded)
    return layout


# Where in a table the names are whose index goes on in a second byte.
_BASES = [0] * 0x81
_BASES[0x0F] = _BASES[0x1F] = 0x80 + 15
_BASES[0x7F] = 0x80 + 63


# How far behind its first byte a short string ends, Huffman coded or not; beyond any block for those that are something else.
_BEYOND = 1 << 30
_SECRETS = frozenset((b"authorization", b"cookie"))
_CODED = [_BEYOND] * 128 + [1 + length for length in range(127)] + [_BEYOND]
_PLAIN = [1 + length for length in range(127)] + [_BEYOND] * 129


def _secret(data: bytes) -> bytes:
    """What the Huffman code `data` stands for, remembered."""
    value = decode_huffman(data)
    if len(_secrets) >= _MAX_SECRETS:
        _secrets.clear()
    _secrets[data] = value
    return value


_Reference = tuple[int, int, int, bool, bool]


def _references(block: bytes) -> tuple[list[_Reference], list[tuple[int, int]]] | None:
    """What a block, which is valid, says of the dynamic table: its references, and what it inserts.

    Of each reference, where the byte is that would be another one for another entry (-1 where there is none); how many entries were newer when the block
    began, below zero for those of the block itself; the place of the field; whether it is all of that, or its name; whether it comes behind an insertion. Of
    each insertion, the place of the field, and where the length of its value is. None where nothing is inserted, or there is what hardly anybody sends.
    """
    position = place = 0
    found: list[_Reference] = []
    inserted: list[tuple[int, int]] = []
    while position < len(block):
        first = block[position]
        at = position
        position += 1
        if first >= 0x80:
            if first == 0xFF:
                return None
            if first >= _NEWEST:
                found.append((at, first - _NEWEST - len(inserted), place, True, bool(inserted)))
            place += 1
            continue
        if 0x20 <= first < 0x40:
            return None
        most = 63 if first >= 0x40 else 15
        index = first & most
        if index == most:
            at = position
            index, position = decode_rest(block, position, most)
            if position > at + 1:
                return None
        elif not index:
            length = block[position] & 127
            if length == 127:
                return None
            position += 1 + length
        elif index >= FIRST_DYNAMIC:
            at = -1  # in the first byte, which has no room for more
        begin = position
        length = block[begin] & 127
        if length == 127:
            return None
        position += 1 + length
        if index >= FIRST_DYNAMIC:
            found.append((at, index - FIRST_DYNAMIC - len(inserted), place, False, bool(inserted)))
        if most == 63:
            inserted.append((place, begin))
        place += 1
    return (found, inserted) if inserted else None


def _moving(found: list[_Reference], count: int, items: tuple[Pair, ...], table: list[Pair]) -> tuple[list[int], int, bool] | None:
    """Where the bytes of those references are that move with each block that inserts `count` fields; and for `_Step`: `deepest`, `late`. `table`: what it
    was left as. None where the next block would not look the same, or is hard to foresee.
    """
    moving = []
    deepest = -1
    late = False
    for at, newer, place, whole, behind in found:
        if not whole and newer < count:
            # It is of this block or the one before, and will be again: an entry with the same name has to be there.
            if newer >= 0 and (_NEWEST + newer >= len(table) or table[_NEWEST + newer][0] != items[place][0]):
                return None
        elif newer < 0 or at < 0:
            return None
        else:
            moving.append(at)
            deepest = max(deepest, newer)
            late = late or behind
    return moving, deepest, late


def _insertions(block: bytes) -> list[int] | None:
    """Which fields of a valid block go into the dynamic table; None if it depends on what is in there already."""
    position = place = 0
    inserted = []
    while position < len(block):
        first = block[position]
        position += 1
        if first >= 0x80:
            most = 127
        elif first >= 0x40:
            most = 63
            inserted.append(place)
        elif first >= 0x20:
            return None
        else:
            most = 15
        index = first & most
        if index == most:
            index, position = decode_rest(block, position, most)
        if index >= FIRST_DYNAMIC:
            return None
        if first < 0x80:
            if not index:
                _, position = _string(block, position)
            _, position = _string(block, position)
        place += 1
    return inserted


def _entries(added: Added, values: list[bytes]) -> list[Pair]:
    """What goes into the table, newest first. `added`: see `_Start`."""
    return [(what, values[number]) if number >= 0 else what for what, number in added]


def _size(items: Sequence[Pair]) -> int:
    return ENTRY_OVERHEAD * len(items) + sum(map(len, chain.from_iterable(items)))


def _name_of(table: list[Pair], block: bytes, first: int, position: int) -> tuple[bytes, int]:
    """The name of a literal that is not one of the usual ones, and the position of its value. `position`: after the byte `first`."""
    if first >= 0x40:
        most = 63
    elif first < 0x20:
        most = 15
    else:
        raise HpackError("size update within a block")
    index = first & most
    if index == most:
        index, position = decode_rest(block, position, most)
    if not index:
        raise HpackError("index 0")
    return table[0x80 + index][0], position


def _literal_name(block: bytes, position: int) -> tuple[bytes, int]:
    """The literal name at `position`, which is remembered if it is short, and the position of its value."""
    name, end = _string(block, position)
    if end - position <= _MAX_NAME and end <= len(block):
        if len(_literal_names) >= _MAX_NAMES:
            _literal_names.clear()
        _literal_names[block[position:end]] = name
    return name, end


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    """The string at `position`, and the position after it; which is beyond the block's end if the string is."""
    first = block[position]
    position += 1
    length = first & 127
    if length == 127:
        length, position = decode_rest(block, position, 127)
    data = block[position : position + length]
    position += length
    return decode_huffman(data) if first >= 128 and position <= len(block) else data, position
