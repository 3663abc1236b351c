"""Header blocks to fields (RFC 7541 section 3): memos in front, and behind them a loop with little to do for each field.

A block decodes to the same fields for as long as the dynamic table does not change, so a connection remembers its blocks by their bytes; and connections
share what their blocks were decoded to (`Fields`), for users to keep there what they concluded. Only what comes for the second time is remembered: what is
unique (a path, an id) does not have to make room for what never comes again. All memos are bounded, and emptied when they are full: an order would cost every
use something.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from meshproxy.codec.headers import Pair
from meshproxy.codec.hpack.huffman import decode as decode_huffman
from meshproxy.codec.hpack.tables import DEFAULT_TABLE_SIZE, ENTRY_OVERHEAD, FIRST_DYNAMIC, STATIC, UNIQUE, HpackError, decode_rest

MAX_LIST_SIZE = 65536
MAX_FIELDS = 1024

# Between the limits on memory and those of a peer that never repeats itself.
_MAX_KNOWN = 64  # blocks of a connection
_MAX_KNOWN_BLOCK = 2048  # bytes
_MAX_SHARED = 512  # decoded blocks that connections share ...
_MAX_SHARED_SIZE = 8192  # ... of at most so many bytes
_MAX_ONCE = 2048
_MAX_NAMES = 512
_MAX_NAME = 64
_MAX_PAIRS = 2048
_MAX_PAIR = 256

_PIECE = 4096  # bytes of a block after which the fields are counted: a byte can stand for a whole table

_INDEXED = re.compile(rb"[\x81-\xfe]+").match
_TO_INDEX = bytes(byte & 127 for byte in range(256))
_NOTHING_KNOWN: dict[bytes, Fields] = {}  # of all decoders that know no block; stays empty


class Fields:
    """A decoded block. Shared between requests and connections, so nobody changes it, except for `known`.

    `items`: the fields in order as they were sent; nothing about them is validated. `size`: their size as SETTINGS_MAX_HEADER_LIST_SIZE has it: names, values
    and 32 bytes each. `over`: there were more, but here the limits were reached. `known` belongs to the user.
    """

    __slots__ = ("items", "known", "over", "size")

    def __init__(self, items: tuple[Pair, ...], size: int, over: bool) -> None:
        self.items = items
        self.size = size
        self.over = over
        self.known: Any = None

    def __repr__(self) -> str:
        return f"Fields({self.items!r}{', over' if self.over else ''})"


class Decoder:
    """One direction of a connection. After an HpackError it is unusable, as the connection is.

    `max_list_size` (bytes, as `Fields.size`) and `max_fields` bound what a block is decoded to. The work for a block, and the memory meanwhile, are linear in
    its length.
    """

    __slots__ = ("_known", "_least", "_limit", "_size", "_table", "_used", "max_fields", "max_list_size")

    def __init__(self, max_table_size: int = DEFAULT_TABLE_SIZE, max_list_size: int = MAX_LIST_SIZE, max_fields: int = MAX_FIELDS) -> None:
        """`max_table_size`: what our SETTINGS_HEADER_TABLE_SIZE allows the peer. Below 4096, the peer has to start with a size update."""
        self.max_list_size = max_list_size
        self.max_fields = max_fields
        # What the peer may reference, by index: the static table and from `FIRST_DYNAMIC` on the dynamic one, newest first.
        self._table: list[Pair] = _STATIC_TABLE
        self._size = DEFAULT_TABLE_SIZE  # the dynamic table's maximum, as the peer last set it
        self._used = 0
        self._limit = DEFAULT_TABLE_SIZE
        self._least: int | None = None  # the peer owes a size update to this or less
        self._known = _NOTHING_KNOWN
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
            self._known = _NOTHING_KNOWN

    def decode(self, block: bytes) -> Fields:
        """A complete header block. Raises HpackError and nothing else."""
        # HOT: a block that came before, since when the table has not changed.
        fields = self._known.get(block)
        return self._decode(block) if fields is None else fields

    def _decode(self, block: bytes) -> Fields:
        # HOT: a block with something new in it.
        items: list[Pair] = []
        append = items.append
        counted = size = 0
        over = changed = False
        end = len(block)
        try:
            position = 0
            if self._least is not None or (block and 0x20 <= block[0] < 0x40):
                position = self._size_updates(block)
                changed = True
            table = self._table
            while True:
                stop = end if end - position <= _PIECE else position + _PIECE
                while position < stop:
                    first = block[position]
                    if first >= 0x80:  # fields out of the table, as many as there are
                        run = _INDEXED(block, position, stop)
                        if run is not None:
                            position = run.end()
                            items += map(table.__getitem__, run[0].translate(_TO_INDEX))
                        elif first == 0xFF:
                            index, position = decode_rest(block, position + 1, 127)
                            append(table[index])
                        else:
                            raise HpackError("index 0")
                        continue
                    position += 1
                    # A literal: with indexing, or without. A name out of the table, or a literal one.
                    if first >= 0x40:
                        index = first & 63
                        if index == 63:
                            index, position = decode_rest(block, position, 63)
                    elif first < 0x20:
                        index = first & 15
                        if index == 15:
                            index, position = decode_rest(block, position, 15)
                    else:
                        raise HpackError("size update within a block")
                    if index:
                        name = table[index][0]
                    else:
                        name, position = _name(block, position)
                    length = block[position]
                    position += 1
                    if length < 127:
                        value = block[position : position + length]
                        position += length
                    elif 128 <= length < 255:
                        length -= 128
                        value = decode_huffman(block[position : position + length])
                        position += length
                    else:
                        value, position = _long_string(block, position - 1)
                    pair = name, value
                    append(pair)
                    if first >= 0x40:
                        if position > end:
                            break
                        self._insert(pair)
                        table = self._table
                        changed = True
                if position > end:
                    raise HpackError("truncated block")
                if not over:
                    new = items[counted:] if counted else items
                    size += ENTRY_OVERHEAD * len(new) + sum(map(len, chain.from_iterable(new)))
                    over = size > self.max_list_size or len(items) > self.max_fields
                    if over:
                        size = self._cut(items)
                    counted = len(items)
                elif len(items) > counted:
                    del items[counted:]
                if position == end:
                    break
        except IndexError:
            raise HpackError("truncated block, or an index that nothing has") from None
        return _fields(self, block, (*items,), size, over, changed)

    def _cut(self, items: list[Pair]) -> int:
        """Leave of `items` what fits; its size."""
        size = 0
        for position, (name, value) in enumerate(items):
            next_size = size + len(name) + len(value) + ENTRY_OVERHEAD
            if next_size > self.max_list_size or position == self.max_fields:
                del items[position:]
                break
            size = next_size
        return size

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
            self._known = _NOTHING_KNOWN
            self._evict(0)
        if self._least is not None:
            raise HpackError("no size update after a smaller SETTINGS_HEADER_TABLE_SIZE")
        return position

    def _evict(self, room: int) -> None:
        """Forget the oldest fields until there are `room` bytes, or the dynamic table is empty (section 4.3)."""
        table = self._table
        used = self._used
        while used + room > self._size and len(table) > FIRST_DYNAMIC:
            name, value = table.pop()
            used -= len(name) + len(value) + ENTRY_OVERHEAD
        self._used = used

    def _insert(self, pair: Pair) -> None:
        name, value = pair
        size = len(name) + len(value) + ENTRY_OVERHEAD
        self._known = _NOTHING_KNOWN
        if self._used + size > self._size:
            self._evict(size)
            if size > self._size:
                return
        self._used += size
        if self._table is _STATIC_TABLE:
            self._table = _STATIC_TABLE.copy()
        if size <= _MAX_PAIR and name not in UNIQUE:
            pair = _pairs.setdefault(pair, pair)
            if len(_pairs) > _MAX_PAIRS:
                _pairs.clear()
        self._table.insert(FIRST_DYNAMIC, pair)


# What the decoders of the process share.
_STATIC_TABLE = [*STATIC]  # the table of decoders whose dynamic table was never used; not changed
_names: dict[bytes, bytes] = {}  # names as they came lately, with the bit for Huffman -> themselves
_pairs: dict[Pair, Pair] = {}  # fields in dynamic tables: those of different connections are mostly the same
_once: set[int] = set()  # hashes of blocks seen lately
_shared: dict[tuple[Pair, ...], Fields] = {}


def _fields(decoder: Decoder, block: bytes, items: tuple[Pair, ...], size: int, over: bool, changed: bool) -> Fields:
    """What others share, if the block comes for the second time; `decoder` remembers it then."""
    if over or len(block) > _MAX_KNOWN_BLOCK or size > _MAX_SHARED_SIZE:
        return Fields(items, size, over)
    number = hash(block)
    if number not in _once:
        if len(_once) >= _MAX_ONCE:
            _once.clear()
        _once.add(number)
        return Fields(items, size, over)
    fields = _shared.get(items)
    if fields is None:
        if len(_shared) >= _MAX_SHARED:
            _shared.clear()
        fields = _shared[items] = Fields(items, size, over)
    if not changed:
        known = decoder._known
        if len(known) >= _MAX_KNOWN or known is _NOTHING_KNOWN:
            known = decoder._known = {}
        known[block] = fields
    return fields


def _name(block: bytes, position: int) -> tuple[bytes, int]:
    """The literal name at `position`, and the position after it."""
    length = block[position]
    if length & 127 > _MAX_NAME:
        return _long_string(block, position)
    end = position + 1 + (length & 127)
    spelt = block[position:end]
    name = _names.get(spelt)
    if name is None:
        name = decode_huffman(spelt[1:]) if length >= 128 else spelt[1:]
        if len(_names) >= _MAX_NAMES:
            _names.clear()
        _names[spelt] = name
    return name, end


def _long_string(block: bytes, position: int) -> tuple[bytes, int]:
    """The string at `position`, whatever its length, and the position after it; which is beyond the block's end if that is missing."""
    first = block[position]
    position += 1
    length = first & 127
    if length == 127:
        length, position = decode_rest(block, position, 127)
    data = block[position : position + length]
    position += length
    return decode_huffman(data) if first >= 128 and position <= len(block) else data, position
