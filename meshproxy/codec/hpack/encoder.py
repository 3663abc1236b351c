"""Fields to header blocks (RFC 7541 section 6): a memo of what each field is encoded as, and few insertions.

The dynamic table takes fields that came twice, for as long as there is room, and evicts nothing: with every insertion the indices change, and all that was
encoded with them. What hardly ever comes twice is a literal that costs no more than a few concatenations. When many fields came repeatedly that found no
room, the table is emptied and starts anew.

Nothing is Huffman coded: it would cost us and the peer more than the bytes are worth, since what repeats is in the tables.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from meshproxy.codec.headers import Pair
from meshproxy.codec.hpack.tables import (
    DEFAULT_TABLE_SIZE,
    ENTRY_OVERHEAD,
    FIRST_DYNAMIC,
    STATIC_NAMES,
    STATIC_PAIRS,
    UNIQUE,
    encode_integer,
)

_MAX_KNOWN = 512  # fields of a connection that are remembered as they are encoded
_MAX_KNOWN_VALUE = 1024  # bytes
_MAX_BLOCKS = 64  # blocks of a connection
_MAX_ONCE = 4096  # of the whole process
_MAX_LITERALS = 512  # names
_MAX_WITHOUT_ROOM = 64  # fields that came twice, since the table was full, before it starts anew

# What is never put into the dynamic table, as nghttp2 (and Envoy with it) has it, and what differs from user to user or from second to second.
_NOT_INDEXED = frozenset(
    b"""age content-length cookie date etag grpc-timeout if-modified-since if-none-match last-modified location set-cookie x-forwarded-for
    x-envoy-expected-rq-timeout-ms x-envoy-upstream-service-time""".split(),
)
# Secrets that could be guessed, so that nobody on the way may put them into a table (section 7.1.3).
_NEVER_INDEXED = frozenset((b"authorization", b"proxy-authorization"))
_SHORT_COOKIE = 20  # bytes; shorter ones are as easily guessed

_LITERAL, _INDEXING, _NEVER = 0x00, 0x40, 0x10
LENGTHS = [bytes((length,)) for length in range(127)]  # of short strings, as they are encoded


class _Prefixes(dict[bytes, bytes]):
    """Name -> how a literal with it begins: the kind, and the name or its index. Of all encoders, bounded."""

    __slots__ = ("bits", "kind")

    def __init__(self, kind: int, bits: int) -> None:
        super().__init__()
        self.kind = kind
        self.bits = bits

    def __missing__(self, name: bytes) -> bytes:
        index = STATIC_NAMES.get(name)
        if index is None:
            prefix = encode_integer(0, self.bits, self.kind) + encode_integer(len(name), 7, 0) + name
        else:
            prefix = encode_integer(index, self.bits, self.kind)
        if len(prefix) <= 64:
            if len(self) >= _MAX_LITERALS:
                self.clear()
            self[name] = prefix
        return prefix


_literal = _Prefixes(_LITERAL, 4)
_indexing = _Prefixes(_INDEXING, 6)
_never = _Prefixes(_NEVER, 4)
# Of fields that are not remembered: their values are unique, or many.
_UNIQUE_PREFIXES = {name: _literal[name] for name in (b":path", *UNIQUE)}


def encode_literal(name: bytes, value: bytes) -> bytes:
    """A field that is in no table and goes into none: the same bytes for every connection, so it may be put together beforehand."""
    length = len(value)
    return _literal[name] + (LENGTHS[length] if length < 127 else encode_integer(length, 7, 0)) + value


def _prefix(name: bytes) -> bytes:
    """How a literal begins whose value is another one each time."""
    return (_never if name in _NEVER_INDEXED or name == b"cookie" else _literal)[name]


class Encoder(dict[Pair, bytes]):
    """One direction of a connection, and the memo of its fields: field -> its bytes, as long as the dynamic table stays as it is.

    Blocks may be put together: `encode(a) + encode_known(key, b, begun=True)` is a block of a and b, and `encode_literal` may come anywhere but first. All
    blocks must be sent, in the order in which they were encoded.
    """

    __slots__ = (
        "_declared",
        "_inserted",
        "_limit",
        "_news",
        "_pending",
        "_places",
        "_restart",
        "_size",
        "_used",
        "_without_room",
        "blocks",
        "generation",
        "parts",
        "whole",
    )

    def __init__(self, max_table_size: int = DEFAULT_TABLE_SIZE) -> None:
        """`max_table_size`: what we spend on the dynamic table, in bytes, whatever more the peer allows."""
        super().__init__()
        # Changes whenever bytes returned earlier may no longer be sent, or `encode` would return others for the same items.
        self.generation = 0
        self._limit = max_table_size
        self._declared = DEFAULT_TABLE_SIZE  # what the peer takes for the table's maximum
        self._size = min(max_table_size, DEFAULT_TABLE_SIZE)  # what we use of that
        self._used = 0
        self._places: dict[Pair, int] = _NO_PLACES  # field in the dynamic table -> how many were inserted before it
        self._inserted = 0
        self._without_room = 0
        self.blocks: dict[Hashable, bytes] = _NO_BLOCKS
        self.parts: dict[Hashable, tuple[bytes, ...]] = _NO_PARTS
        self.whole: dict[Hashable, Any] = _NO_WHOLE
        self._news = 0  # fields that came for the first time
        self._pending = False  # the next block begins with size updates
        self._restart = False  # ... and an empty table

    def set_max_table_size(self, size: int) -> None:
        """The peer's SETTINGS_HEADER_TABLE_SIZE has changed."""
        self._size = min(size, self._limit)
        if size < self._declared:
            self._restart = True
        elif self._size <= self._declared:
            return
        self._change()
        self._pending = True

    def encode(self, items: Iterable[Pair]) -> bytes:
        """A header block."""
        # HOT: for a field that is known, no Python code runs.
        if self._pending:
            return self._begin() + b"".join(map(self.__getitem__, items))
        return b"".join(map(self.__getitem__, items))

    def encode_known(self, key: Hashable, items: Iterable[Pair], *, begun: bool = False) -> bytes:
        """`encode(items)`, for items that come again and again: always the same ones for one `key`, which is kept for some time.

        `begun`: they are not the first of their block.
        """
        # HOT
        block = self.blocks.get(key)
        if block is None:
            before = self.generation, self._news
            block = b"".join(map(self.__getitem__, items)) if begun else self.encode(items)
            if before == (self.generation, self._news) and not self._pending:
                if self.blocks is _NO_BLOCKS or len(self.blocks) >= _MAX_BLOCKS:
                    self.blocks = {}
                self.blocks[key] = block
        return block

    def encode_parts(self, key: Hashable, parts: Iterable[tuple[Iterable[Pair], bytes]]) -> tuple[bytes, ...]:
        """A block with gaps for values: after each part come the length and the value of a literal with the name that is given with it; after the last nothing.

        Kept as `encode_known` keeps them, in `parts`.
        """
        before = self.generation, self._news
        start = self._begin() if self._pending else b""
        encoded = tuple(b"".join(map(self.__getitem__, items)) + (_prefix(name) if name else b"") for items, name in parts)
        if before == (self.generation, self._news) and not self._pending:
            if self.parts is _NO_PARTS or len(self.parts) >= _MAX_BLOCKS:
                self.parts = {}
            self.parts[key] = encoded
        return (start + encoded[0], *encoded[1:])

    def keep(self, key: Hashable, made: Any, parts: Iterable[Hashable]) -> None:
        """Remember in `whole` what was put together of literals and `parts`, keys of `encode_known`; if all of those are remembered."""
        if all(map(self.blocks.__contains__, parts)):
            if self.whole is _NO_WHOLE or len(self.whole) >= _MAX_BLOCKS:
                self.whole = {}
            self.whole[key] = made

    def __missing__(self, pair: Pair) -> bytes:
        # HOT: a field whose value is unique, or that came for the first time.
        name, value = pair
        prefix = _UNIQUE_PREFIXES.get(name)
        if prefix is not None:
            length = len(value)
            return prefix + (LENGTHS[length] if length < 127 else encode_integer(length, 7, 0)) + value
        index = STATIC_PAIRS.get(pair)
        if index is None:
            place = self._places.get(pair)
            if place is None:
                return self._new(pair)
            index = FIRST_DYNAMIC + self._inserted - 1 - place
        return self._remember(pair, encode_integer(index, 7, 0x80))

    def _new(self, pair: Pair) -> bytes:
        """A field that is in no table: a literal, which goes into the table if it came before."""
        name, value = pair
        length = len(value)
        coded = (LENGTHS[length] if length < 127 else encode_integer(length, 7, 0)) + value
        number = hash(pair)
        once = _once
        if name in _NEVER_INDEXED or (name == b"cookie" and length < _SHORT_COOKIE):
            prefixes = _never
        elif name in _NOT_INDEXED or number not in once or not self._has_room(len(name) + length + ENTRY_OVERHEAD):
            prefixes = _literal
        else:
            self._insert(pair)
            return _indexing[name] + coded
        if number in once:
            return self._remember(pair, prefixes[name] + coded) if length <= _MAX_KNOWN_VALUE else prefixes[name] + coded
        if len(once) >= _MAX_ONCE:
            once.clear()
        once.add(number)
        self._news += 1
        return prefixes[name] + coded

    def _remember(self, pair: Pair, field: bytes) -> bytes:
        if len(self) >= _MAX_KNOWN:
            self.clear()
        self[pair] = field
        return field

    def _has_room(self, size: int) -> bool:
        if self._used + size <= self._size:
            return size <= self._size >> 1
        if size <= self._size >> 1:
            self._without_room += 1
            if self._without_room >= _MAX_WITHOUT_ROOM:
                self._change()
                self._pending = self._restart = True
        return False

    def _insert(self, pair: Pair) -> None:
        name, value = pair
        places = self._places
        if places is _NO_PLACES:
            places = self._places = {}
        for known in places:
            self.pop(known, None)  # all indices grow by one
        places[pair] = self._inserted
        self._inserted += 1
        self._used += len(name) + len(value) + ENTRY_OVERHEAD
        self._change()

    def _change(self) -> None:
        self.generation += 1
        self.blocks = _NO_BLOCKS
        self.parts = _NO_PARTS
        self.whole = _NO_WHOLE

    def _begin(self) -> bytes:
        """The size updates at the start of a block: the smallest maximum first (section 4.2), for which an empty table is small enough."""
        self._pending = False
        self._change()
        self._declared = self._size
        update = encode_integer(self._size, 5, 0x20)
        if self._restart:
            self._restart = False
            self.clear()
            self._places = _NO_PLACES
            self._used = self._inserted = self._without_room = 0
            if self._size:
                update = encode_integer(0, 5, 0x20) + update
        return update


# What all encoders share, besides the prefixes.
_NO_PLACES: dict[Pair, int] = {}  # stays empty
_NO_BLOCKS: dict[Hashable, bytes] = {}  # stays empty
_NO_PARTS: dict[Hashable, tuple[bytes, ...]] = {}  # stays empty
_NO_WHOLE: dict[Hashable, Any] = {}  # stays empty
_once: set[int] = set()  # hashes of fields that came lately, whoever sent them: the second time they go into a table
