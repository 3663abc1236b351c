"""Blocks that put new values into the dynamic table, and what comes after them: chains of steps, and starts."""

from __future__ import annotations

from typing import Any

from meshproxy.codec.headers import Pair
from meshproxy.codec.hpack.fields import Shape, size_of
from meshproxy.codec.hpack.huffman import decode_visible
from meshproxy.codec.hpack.layout import Layout
from meshproxy.codec.hpack.memos import MAX_CHAINS, MAX_ONCE, ONCE, STEPS, layout_of
from meshproxy.codec.hpack.scan import Reference, references_of
from meshproxy.codec.hpack.tables import CREDENTIALS, NEWEST

MAX_STARTS = 8  # of a shape
_MAX_KEPT = 4  # values of such a block that do not go into the table
_OVERHEAD = 120  # bytes: a list, and the pair that it is kept in
_VALUE_OVERHEAD = 48  # a short string, but for its characters, and its place in the list

Added = tuple[tuple[Any, int], ...]  # see `Form.added`


class Form:
    """What there is to a block that puts some of its values into the dynamic table, but for the values.

    `rest`: what is around them, where `layout` finds them. `secret`: credentials among `rest`, and their place among the values. `added`: what goes into the
    table, newest first: a field and -1, or where the value differs, the name and which of the values. `size`: of that, but for the values, and less the
    credentials; `kept`: the other values. `overhead`: bytes of memory that its values take besides their characters.
    """

    __slots__ = ("added", "kept", "layout", "overhead", "rest", "secret", "shape", "size")

    def __init__(self, shape: Shape, layout: Layout, rest: tuple[bytes, ...], secret: tuple[int, bytes] | None, added: Added) -> None:
        self.shape = shape
        self.layout = layout
        self.rest = rest
        self.secret = secret
        self.added = added
        self.size = size_of([(what, b"") if number >= 0 else what for what, number in added])
        among = {number for _, number in added}
        if secret is not None:
            self.size -= len(secret[1])
            among.add(secret[0])
        self.kept = tuple(number for number in range(len(shape.values)) if number not in among)
        self.overhead = _OVERHEAD + _VALUE_OVERHEAD * len(shape.values)


class Step(Form):
    """What a block looks like but for its values, if it has the shape of the one before and puts the same of its values into the dynamic table: the same, and
    references to all that was there before are as much higher as there are insertions.

    Steps follow each other in chains, which connections share whose blocks were the same. `deepest`: how many entries are newer than the oldest that is
    referenced, -1 if none is; `late`: one is referenced behind an insertion, which may have evicted it.
    """

    __slots__ = ("_moving", "deepest", "late", "next")

    def __init__(self, form: Form, rest: tuple[bytes, ...], moving: tuple[tuple[int, ...], ...], deepest: int, *, late: bool) -> None:
        """`moving`: where in each part of `rest` the bytes of such references are."""
        super().__init__(form.shape, form.layout, rest, form.secret, form.added)
        self._moving = moving
        self.deepest = deepest
        self.late = late
        self.next: Step | None = None  # as far as it is known

    def go_on(self) -> Step | None:
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
        self.next = Step(self, (*rest,), self._moving, self.deepest + count if self.deepest >= 0 else -1, late=self.late)
        return self.next


class Start(Form):
    """A block that was parsed and put new values into the dynamic table, and that may come again but for those: as soon as much was put there, clients put
    there anew what fell out.

    `references`: to which entries, by how many were newer when the block began, and what they have to be: a field, or one of that name. `deepest`: as that of
    a step. `step`: what may come next. `then`: a start that came next lately, and refers to nothing but what this one has put into the table.
    """

    __slots__ = ("deepest", "references", "step", "then")

    def __init__(self, form: Form, references: tuple[tuple[int, Pair | bytes], ...], step: Step | None) -> None:
        super().__init__(form.shape, form.layout, form.rest, form.secret, form.added)
        self.references = references
        self.deepest = max((newer for newer, _ in references), default=-1)
        self.step = step
        self.then: Start | None = None

    def follows(self, other: Start) -> bool:
        """Whether all references are to what `other` has put into the table right before."""
        if self.deepest >= len(other.added):
            return False
        for newer, expected in self.references:
            what, number = other.added[newer]
            name, entry = (what, None) if number >= 0 else (what[0], what)
            if expected != (name if expected.__class__ is bytes else entry):
                return False
        return True

    def same(self, other: Start) -> bool:
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


def _moving(found: list[Reference], count: int, items: tuple[Pair, ...], table: list[Pair]) -> tuple[list[int], int, bool] | None:
    """Where the bytes of those references are that move with each block that inserts `count` fields; and for `Step`: `deepest`, `late`. `table`: what it
    was left as. None where the next block would not look the same, or is hard to foresee.
    """
    moving = []
    deepest = -1
    late = False
    for at, newer, place, whole, behind in found:
        if not whole and newer < count:
            # It is of this block or the one before, and will be again: an entry with the same name has to be there.
            if newer >= 0 and (NEWEST + newer >= len(table) or table[NEWEST + newer][0] != items[place][0]):
                return None
        elif newer < 0 or at < 0:
            return None
        else:
            moving.append(at)
            deepest = max(deepest, newer)
            late = late or behind
    return moving, deepest, late


def entries_of(added: Added, values: list[bytes]) -> list[Pair]:
    """What goes into the table, newest first. `added`: see `Start`."""
    return [(what, values[number]) if number >= 0 else what for what, number in added]


def foresee(block: bytes, items: tuple[Pair, ...], shape: Shape, literals: list[tuple[int, int, int]], table: list[Pair], most: int) -> Step | None:
    """What may come next if it is of the same shape; that the block itself may come again is noted in its shape.

    `literals`: see `Decoder._parse`. `table`: what the block has left it as; `most`: bytes that its dynamic part may hold.
    """
    scanned = references_of(block)
    if scanned is None:
        return None
    found, inserted = scanned
    if size_of([items[place] for place, _ in inserted]) > most:
        return None
    # Credentials are mostly the same: then they belong to what is compared.
    secret = None
    begins = {begin for _, begin in inserted}
    for number, (place, begin, end) in enumerate(literals):
        if items[place][0] in CREDENTIALS and begin not in begins and block[begin] >= 128 and decode_visible([block[begin + 1 : end]]) is not None:
            known = hash((shape.items, items[place]))
            if known in ONCE:
                secret = number, items[place][1]
            elif len(ONCE) < MAX_ONCE:
                ONCE.add(known)
            break
    values = [(begin, end) for number, (_, begin, end) in enumerate(literals) if secret is None or number != secret[0]]
    coded = block[values[0][0]] >= 128
    if len(values) - len(inserted) > _MAX_KEPT or any((block[begin] >= 128) != coded for begin, _ in values):
        return None
    moved = _moving(found, len(inserted), items, table)
    moving, deepest, late = moved or ([], 0, False)
    parts, places, position = [], [], 0
    for begin, end in [*values, (len(block), 0)]:
        parts.append(block[position:begin])
        places.append(tuple(place - position for place in moving if position <= place < begin))
        position = end
    layout = layout_of(tuple((part, len(part)) for part in parts[:-1]), parts[-1], coded=coded)
    numbers = {begin: number for number, (_, begin, _) in enumerate(literals)}
    added = tuple((items[place][0], numbers[begin]) if begin in numbers else (items[place], -1) for place, begin in reversed(inserted))
    form = Form(shape, layout, (*parts,), secret, added)
    step = None
    if moved is not None and numbers.keys() >= begins:  # what else is inserted, the next one refers to
        key = shape, layout, secret, form.rest, (*places,), added, deepest, late
        first = STEPS.get(key)
        if first is None:
            if len(STEPS) >= MAX_CHAINS:
                STEPS.clear()
            first = STEPS[key] = Step(form, form.rest, (*places,), deepest, late=late)
        step = first.next or first.go_on()
    # What it has put there itself, and refers to, would have to be looked at more closely.
    if all(newer >= 0 or not whole for _, newer, _, whole, _ in found):
        references = tuple((newer, items[place] if whole else items[place][0]) for _, newer, place, whole, _ in found if newer >= 0)
        number = hash((layout, form.rest, added, references))
        if number in ONCE:
            start = Start(form, references, step)
            shape.starts = (start, *[other for other in shape.starts if not start.same(other)][: MAX_STARTS - 1])
        elif len(ONCE) < MAX_ONCE:
            ONCE.add(number)
    return step
