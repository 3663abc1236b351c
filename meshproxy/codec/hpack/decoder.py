"""Header blocks to fields (RFC 7541 section 3): memos in front, and behind them a loop with little to do for each field.

A block decodes to the same fields for as long as the dynamic table does not change, so a connection remembers its blocks by their bytes; and connections
share what their blocks were decoded to (`Fields`), for users to keep there what they concluded. Only what comes for the second time is remembered: what is
unique (a path, an id) does not have to make room for what never comes again. All memos are bounded, and emptied when they are full: an order would cost every
use something. `memos` has those that connections share, `foresight` the blocks that change the table and come again all the same.
"""

from __future__ import annotations

import re
from itertools import accumulate, chain, islice
from struct import error as LengthError  # noqa: N812

from meshproxy.codec.headers import Pair
from meshproxy.codec.hpack.fields import CutFields, Fields, Shape, ShapedFields, size_of
from meshproxy.codec.hpack.foresight import Added, Form, Start, Step, entries_of, foresee
from meshproxy.codec.hpack.huffman import decode as decode_huffman
from meshproxy.codec.hpack.huffman import decode_visible
from meshproxy.codec.hpack.layout import Layout
from meshproxy.codec.hpack.memos import (
    INDEPENDENT,
    LITERAL_NAMES,
    MAX_INDEPENDENT,
    MAX_ONCE,
    MAX_PAIR,
    MAX_PAIRS,
    MAX_SHARED,
    MAX_SHARED_SIZE,
    ONCE,
    PAIRS,
    SECRETS,
    SHAPES,
    SHARED,
    STATIC_TABLE,
    Part,
    Segment,
    layout_of,
    literal_name,
    new_shape,
    secret_of,
    shape_of,
)
from meshproxy.codec.hpack.scan import insertions_of, read_string
from meshproxy.codec.hpack.tables import CREDENTIALS, DEFAULT_TABLE_SIZE, ENTRY_OVERHEAD, FIRST_DYNAMIC, NEWEST, STATIC, UNIQUE, HpackError, decode_rest

MAX_LIST_SIZE = 65536
MAX_FIELDS = 1024

# Between the limits on memory and those of a peer that never repeats itself.
_MAX_KNOWN = 32  # blocks of a connection
_MAX_KNOWN_BLOCK = 2048  # bytes
_MAX_SHAPES = 4  # of a connection
_MAX_LITERALS = 32  # in such a block
_MAX_PENDING = 28672  # bytes of memory: not much more than a table of 4096 bytes takes of small entries
_FEW_PENDING = _MAX_PENDING * 3 // 4
_TURNS = 3

_PIECE = 4096  # bytes of a block after which the fields are counted: a byte can stand for a whole table

_indexed = re.compile(rb"[\x81-\xfe]+").match  # fields that are one byte each

_new = object.__new__
NOTHING_KNOWN: dict[bytes, Fields] = {}  # of all decoders that know no block; stays empty


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
        "_spare",
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
        # What the peer may reference, by the byte that does so (0x80 and the index): the static table and from `NEWEST` on the dynamic one, newest first.
        self._table = STATIC_TABLE
        self._size = DEFAULT_TABLE_SIZE  # the dynamic table's maximum, as the peer last set it
        self._used = 0
        self._limit = DEFAULT_TABLE_SIZE
        self._least: int | None = None  # the peer owes a size update to this or less
        self.known = NOTHING_KNOWN  # HOT, for the session: blocks that came before, since when the table has not changed; others it asks `decode_new` for
        # With where their values are, the parts of their blocks that are the same, and the credentials, at their place among the values, if those are, too.
        self._shapes: tuple[tuple[Shape, Layout, tuple[bytes, ...], tuple[int, bytes] | None], ...] = ()
        self._shapes_missed = 0
        self._turn = 0  # blocks of a known shape until one is looked at whether it came before
        self._step: Step | None = None  # what may come next
        self._shape: Shape | None = None  # of the last block that put new values into the table
        # Blocks that were foreseen do not touch the table: there is work to do only for what is still in it when somebody looks (`_settle`). What they put
        # there, as their steps have it, their values, how many bytes of the table that takes, and how many of memory the values; oldest first.
        self._pending = _NOTHING_PENDING
        self._spare = _MAX_PENDING  # bytes of memory that more of them may take
        self._last: tuple[Start, list[bytes], int] | None = None  # the last start that was taken: its values, and bytes that it has put into the table
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
                    cost = step.overhead + size
                    if cost > self._spare:
                        self._trim()
                    self._spare -= cost
                    self._pending.append((step.added, strings, self._room - room, cost))
                    self._room = room
                    self._step = step.next or step.go_on()
                if room >= 0 or self._take_last(step, strings, self._room - room):
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
        independent = INDEPENDENT.get(block)
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
            if block in ONCE:
                return self._fields(block, [*shaped.items], size, shape)
            if len(block) <= _MAX_KNOWN_BLOCK:
                if len(ONCE) >= MAX_ONCE:
                    ONCE.clear()
                ONCE.add(block)
        return shaped

    def _take_last(self, step: Step, values: list[bytes], size: int) -> bool:
        """A step with which something falls out of the table that it refers to, if it does. False, and nothing done, if it comes too late. `size`: of what it
        puts there."""
        if step.late:
            return False
        # What names are taken from are entries of the block before: they have to be there when they are.
        pending = self._pending
        if not pending or pending[-1][0] is not step.added or sum(map(len, chain(values, pending[-1][1]))) + 2 * step.size > self._size:
            count = len(step.added)
            before = self._newest(count)
            if len(before) < count or size_of(before) + size_of(entries_of(step.added, values)) > self._size:
                return False
        self._defer(step, values, size)
        self._step = None if step.deepest >= 0 else step.next or step.go_on()
        return True

    def _expect(self, step: Step | None) -> None:
        """Be prepared for `step`, if all is there that it refers to."""
        self._step = None
        if step is None:
            return
        deepest = step.deepest if step.deepest >= 0 else len(step.added)
        entries = self._newest(deepest + 1)
        if len(entries) <= deepest:
            return
        self._room = self._size - size_of(entries) if step.deepest >= 0 else -1
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
                reach = size_of(before)
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
            self._defer(start, values, size)
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
        for added, values, _, _ in reversed(self._pending):
            if len(found) >= count:
                break
            found += entries_of(added, values)
        del found[count:]
        if len(found) == count and size_of(found) <= self._size:
            return found
        self._settle()
        return self._table[NEWEST : NEWEST + count]

    def _defer(self, form: Form, values: list[bytes], size: int) -> None:
        """Put the fields of a block into the table, later; their `size` is not too large for it."""
        if self._pending is _NOTHING_PENDING:
            self._pending = []
        cost = form.overhead + sum(map(len, values))
        if cost > self._spare:
            self._trim()
        self._spare -= cost
        self._pending.append((form.added, values, size, cost))

    def _trim(self) -> None:
        """Forget what is pending and would have fallen out of the table since. If that does not help, nothing is pending any more."""
        pending = self._pending
        most = self._size
        filled = taken = few = 0
        for _, _, size, cost in reversed(pending):
            few += 1
            taken += cost
            filled += size
            if filled >= most:
                break
        if filled < most or taken > _FEW_PENDING:
            self._settle()
            return
        del pending[:-few]
        self._spare = _MAX_PENDING - taken
        if self._used:
            del self._table[NEWEST:]
            self._used = 0

    def _settle(self) -> None:
        """Put into the table what is pending. What came last is what stays: each field for as long as there is room for it and all that came later."""
        pending = self._pending
        if not pending:
            return
        table = self._table
        if table is STATIC_TABLE:
            table = self._table = table.copy()
        newest: list[Pair] = []
        size = 0
        for added, values, _, _ in reversed(pending):
            entries = entries_of(added, values)
            newest += entries
            size += size_of(entries)
            if size >= self._size:
                del table[NEWEST:]
                self._used = 0
                break
        pending.clear()
        self._spare = _MAX_PENDING
        table[NEWEST:NEWEST] = newest
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
                            name = LITERAL_NAMES.get(block[start:position])
                            if name is None:
                                name, position = literal_name(block, start)
                    begin = position
                    length = block[position]
                    if length & 127 == 127:
                        value, position = read_string(block, position)
                    elif length < 128:
                        position += length + 1
                        value = block[begin + 1 : position]
                    else:
                        position += length - 127
                        value = block[begin + 1 : position]
                        if first == 0x1F:  # most of all, authorization
                            value = SECRETS.get(value) or secret_of(value)
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
                            del table[NEWEST:]
                            used = 0
                            changed = True
                        items.append(pair)
                        continue
                    changed = True
                    used += size
                    while used > most:
                        oldest, old = table.pop()
                        used -= len(oldest) + len(old) + ENTRY_OVERHEAD
                    if table is STATIC_TABLE:
                        table = self._table = table.copy()
                    known = None
                    if size <= MAX_PAIR and name not in UNIQUE:
                        known = PAIRS.get(pair)
                        if known is None:
                            if len(PAIRS) >= MAX_PAIRS:
                                PAIRS.clear()
                            PAIRS[pair] = pair
                        else:
                            pair = known
                    if known is None:
                        varied = True
                        literals.append((len(items), begin, position))
                    table.insert(NEWEST, pair)
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
        return self._fields(block, items, size_of(items), None, changed=changed)

    def _varied(self, block: bytes, items: list[Pair], literals: list[tuple[int, int, int]]) -> Fields:
        # HOT: a block that puts new values into the table, so that it will not come again, but may be of a known shape.
        fields = Fields()
        fields.items = (*items,)
        size = 0
        for place, _, _ in literals:
            items[place], value = items[place]  # type: ignore[call-overload]  # see `SHAPES`
            size += len(value)
        key = (*items,)
        shape = fields.shape = SHAPES.get(key) or new_shape(key)
        size = fields.size = size_of(fields.items) if shape is None else shape.size + size
        if size > self.max_list_size or len(items) > self.max_fields:
            return self._over([*fields.items])
        fields.known = None
        self._shape = shape
        if shape is not None and len(block) <= _MAX_KNOWN_BLOCK:
            # Where blocks of several shapes alternate, all this is in vain.
            self._shapes_missed += 1
            if self._shapes_missed < 8 or self._shapes_missed % 8 == 0:
                self._expect(foresee(block, fields.items, shape, literals, self._table, self._size))
        return fields

    def _over(self, items: list[Pair]) -> Fields:
        """What of a block with too many fields is within the limits."""
        fields = CutFields()
        cut = self._cut(items)
        fields.beyond = items[cut]
        del items[cut:]
        fields.items = (*items,)
        fields.size = size_of(items)
        fields.shape = fields.known = None
        return fields

    def _fields(self, block: bytes, items: list[Pair], size: int, shape: Shape | None, *, changed: bool = False) -> Fields:
        # HOT
        if size > self.max_list_size or len(items) > self.max_fields:
            return self._over(items)
        if block in ONCE:
            return self._again(block, (*items,), size, shape, changed=changed)
        if len(block) <= _MAX_KNOWN_BLOCK:
            if len(ONCE) >= MAX_ONCE:
                ONCE.clear()
            ONCE.add(block)
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
        place = next((number for number, (place, _, _) in enumerate(literals) if items[place][0] in CREDENTIALS), None)
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
            if segments and number in ONCE:
                self._keep_shape(items, literals, tuple(segments), tail, secret, coded=coded)
                return
            ONCE.add(number)  # bounded by `_fields`, which comes next

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
        shape = shape_of((*parts,))
        if shape is None:
            return
        known = shape, layout_of(segments, tail, coded=coded), (*(segment for segment, _ in segments), tail), secret
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
        fields = SHARED.get(items)
        if fields is None:
            fields = Fields()
            fields.items = items
            fields.size = size
            fields.shape = shape
            fields.known = None
            if size > MAX_SHARED_SIZE:
                return fields
            fields.shape = None  # more can be concluded from the whole
            if len(SHARED) >= MAX_SHARED:
                SHARED.clear()
            SHARED[items] = fields
        if changed:
            self._note_independent(block, fields)
        else:
            if len(self.known) >= _MAX_KNOWN or self.known is NOTHING_KNOWN:
                self.known = {}
            self.known[block] = fields
        return fields

    def _note_independent(self, block: bytes, fields: Fields) -> None:
        """Remember a block that changes the dynamic table in the same way whenever it comes: some servers index all fields of every response anew."""
        places = insertions_of(block)
        if places is None:
            return
        added = [fields.items[place] for place in reversed(places)]  # the newest first
        if len(INDEPENDENT) >= MAX_INDEPENDENT:
            INDEPENDENT.clear()
        INDEPENDENT[block] = fields, added, size_of(added)

    def _add(self, added: list[Pair], size: int) -> None:
        # HOT: several insertions at once, for which there is room in an empty table.
        if self._pending:
            self._settle()
        self._forget()
        if self._used + size > self._size:
            self._evict(size)
        self._used += size
        if self._table is STATIC_TABLE:
            self._table = STATIC_TABLE.copy()
        self._table[NEWEST:NEWEST] = added

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
        oldest = islice(reversed(table), len(table) - NEWEST)
        for length in islice(accumulate(map(len, chain.from_iterable(oldest))), 1, None, 2):
            count += 1
            size = length + count * ENTRY_OVERHEAD
            if size >= missing:
                break
        del table[len(table) - count :]
        self._used -= size


_NOTHING_PENDING: list[tuple[Added, list[bytes], int, int]] = []  # stays empty

# The names of literals by their first bytes: from the static table; empty for a literal name, None where there is more to see.
_NAMES: list[bytes | None] = [None] * 0x81
for _kind, _last in ((0x00, 14), (0x10, 14), (0x40, FIRST_DYNAMIC - 1)):
    _NAMES[_kind : _kind + _last + 1] = [name for name, _ in STATIC[: _last + 1]]

# Where in a table the names are whose index goes on in a second byte.
_BASES = [0] * 0x81
_BASES[0x0F] = _BASES[0x1F] = 0x80 + 15
_BASES[0x7F] = 0x80 + 63


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
