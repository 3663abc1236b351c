"""Heads of one shape, which differ in nothing but a few values: a path, a request id, a trace context.

Clients that send no two equal requests still send nearly the same head each time. Which of its lines differ is learnt from what comes (`Shapes.learn`): a line
that was seen in more than a few ways varies, all others are part of the shape. From then on a head of that shape is recognised by one regular expression, or
where its values are as long as those of one before by one comparison of all that is around them, and never taken apart into lines. That is for values of
visible characters, of fields that say nothing of how messages are framed; all else goes through the parser.

`http.shape_plan` has what is concluded from shapes; `codec.hpack` finds those of HTTP/2, `response_shapes` those of responses.
"""

from __future__ import annotations

import re
from struct import Struct
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from meshproxy.codec.headers import NO_PLANS, RequestHead

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.codec.h1.request import KnownRequest

_METHODS = frozenset((b"GET", b"DELETE"))  # of requests without a body whose responses have one
# Fields that decide how a message is framed, and where it goes before any route is asked.
_FIXED = frozenset(
    (
        b"connection", b"content-length", b"expect", b"host", b"http2-settings", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade",
    )
)  # fmt: skip
_MAX_FORMS = 128  # of all parsers with the same options
_MAX_SHAPES = 64  # of all those forms
_FEW = 3  # ways in which a line that does not vary may come
_MAX_BYTES = 4096  # of a head that is worth it
# To make a shape costs as much as a few requests. So that nobody has us make them all the time, they are paid for: each head that is looked at earns one.
_COST = 200
_MAX_CREDIT = 4000
_VISIBLE = rb"([!-~]+)"
WORDS = rb"([!-~]+(?: [!-~]+)*)"
_PATH = rb"(/[!-~]*)"
_VALUE = re.compile(WORDS).fullmatch
_ONLY_VISIBLE = bytes(code if 33 <= code <= 126 else code ^ 64 for code in range(256))
_MAX_SIZES = 64  # of heads, for each shape; about a kilobyte each
_MISSES = 64  # how many heads of other sizes it takes to learn these anew


S = TypeVar("S", bound="Shape")


class Shape:
    """What heads of one shape have in common.

    `names`: whose values differ, in lower case. `most`: bytes that a head may have. `retired`: no head is of it any more, there may be a better one.
    """

    __slots__ = ("_by_size", "_match", "_missed", "_rest", "most", "names", "retired")

    def __init__(self, parts: list[tuple[bytes, bytes]], tail: bytes, names: tuple[bytes, ...], most: int) -> None:
        """`parts`: what comes before each value, and a pattern for the value; `tail`: what comes behind the last one."""
        self._rest = (*(before for before, _ in parts), tail)
        pattern = b"".join([re.escape(before) + value for before, value in parts]) + re.escape(tail)
        self._match: Callable[[bytes], re.Match[bytes] | None] = re.compile(pattern).fullmatch
        # By how long a head is, where its values are if they are as long as those of the last one of that length: that is one comparison, and no search.
        self._by_size: dict[int, tuple[Callable[[bytes], tuple[bytes, ...]], Callable[[bytes], tuple[bytes, ...]]]] = {}
        self.names = names
        self.most = most
        self.retired = False
        self._missed = 0

    def retire(self) -> None:
        """It is shared no more: who still has it shall look for another one, and not fill memory."""
        self.retired = True
        self._match = _nothing
        self._by_size.clear()

    def _search(self, head: bytes) -> tuple[bytes, ...] | None:
        """The values of a head with a size that is not known, or other sizes of its values."""
        match = self._match(head)
        if match is None or len(head) > self.most:
            return None
        values = match.groups()
        self._learn_size(len(head), values)
        return values

    def _learn_size(self, size: int, values: tuple[bytes, ...]) -> None:
        full = len(self._by_size) >= _MAX_SIZES
        if full or size in self._by_size:
            # Where there are so many, most of what is learnt comes too late to be of use.
            self._missed += 1
            if self._missed < _MISSES:
                return
            self._missed = 0
            if full:
                self._by_size.clear()
        sizes = [*zip(map(len, self._rest), map(len, values), strict=False)]
        tail = len(self._rest[-1])
        self._by_size[size] = (
            Struct("".join(f"{before}x{length}s" for before, length in sizes) + f"{tail}x").unpack,
            Struct("".join(f"{before}s{length}x" for before, length in sizes) + f"{tail}s").unpack,
        )


class HeadShape(Shape):
    """That of requests.

    `path` is that of heads that have none of their own. `plans` belongs to the connection manager, and is the only thing about it that changes, but for
    `retired`.
    """

    __slots__ = ("_authority", "_index", "_items", "_method", "_places", "path", "plans", "varies_path")

    def __init__(self, known: KnownRequest, parts: list[tuple[bytes, bytes]], tail: bytes, names: tuple[bytes, ...], most: int) -> None:
        """`known`: one of them. The rest is as for any shape."""
        super().__init__(parts, tail, names, most)
        self.varies_path = names[:1] == (b":path",)
        self.path = known.path
        self._method = known.method
        self._authority = known.authority
        self._items = known.items.copy()
        self._index = known.index.copy()
        where = {name: place for place, (name, _) in enumerate(known.items)}
        self._places = tuple((number, where[name], name) for number, name in enumerate(names) if name != b":path")
        self.plans: dict[Any, Any] = NO_PLANS

    def values(self, head: bytes) -> tuple[bytes, ...] | None:
        """HOT: the values of a whole head; None if it is not of this shape."""
        known = self._by_size.get(len(head))
        if known is not None:
            values_of, rest_of = known
            if rest_of(head) == self._rest:
                values = values_of(head)
                text = b"".join(values)
                if text.translate(_ONLY_VISIBLE) is text and (not self.varies_path or text[0] == 47):  # "/"
                    return values
        return self._search(head)

    def take(self, values: tuple[bytes, ...]) -> ShapedRequest:
        """HOT: the head with these values."""
        known = _new(ShapedRequest)
        known.shape = self
        known.values = values
        known.path = values[0] if self.varies_path else self.path
        return known

    def head(self, values: tuple[bytes, ...], path: bytes) -> RequestHead:
        """The same as others know heads."""
        items = self._items.copy()
        index = self._index.copy()
        for number, place, name in self._places:
            value = index[name] = values[number]
            items[place] = name, value
        return RequestHead(self._method, path, self._authority, items, index)


class ShapedRequest:
    """A request's head of a known shape, not yet put together. As `codec.h2.fields.ShapedRequest`."""

    __slots__ = ("path", "shape", "values")

    length = -1

    path: bytes
    shape: HeadShape
    values: tuple[bytes, ...]

    def head(self) -> RequestHead:
        """The head of the request."""
        return self.shape.head(self.values, self.path)


_new = object.__new__


def _nothing(head: bytes) -> None:
    """The expression of a shape that is retired."""


class Shapes(Generic[S]):
    """The shapes of the heads seen lately. Parsers with the same options share them."""

    __slots__ = ("_credit", "_forms", "_made", "_most")

    def __init__(self, max_head_bytes: int) -> None:
        self._forms: dict[tuple[bytes, ...], Form[S]] = {}
        self._most = min(max_head_bytes, _MAX_BYTES)
        self._credit = _MAX_CREDIT
        self._made = 0  # shapes

    def _find(self, key: tuple[bytes, ...], known: Any, lines: list[bytes]) -> S | None:
        """The shape of a head that came now. `key`: what heads with that shape have in common for certain. `lines`: all else, in pieces that may vary."""
        if self._credit < _MAX_CREDIT:
            self._credit += 1
        form = self._forms.get(key)
        if form is None:
            if len(self._forms) >= _MAX_FORMS:
                self._forget()
            form = self._forms[key] = self._form(lines)
        fixed = form.fixed(lines)
        if fixed is None:
            return None
        try:
            return form.shapes[fixed]
        except KeyError:
            if self._credit < _COST:
                return None
            self._credit -= _COST
            if self._made >= _MAX_SHAPES:
                self._forget()
                return None
            self._made += 1
            made = form.shapes[fixed] = self._make(known, key, lines, form.varying)
            return made

    def _form(self, lines: list[bytes]) -> Form[S]:
        return Form(len(lines))

    def _make(self, known: Any, key: tuple[bytes, ...], lines: list[bytes], varying: frozenset[int]) -> S | None:
        """The shape of a head of which there is none yet; None where one of its lines may not vary that does."""
        raise NotImplementedError

    def _forget(self) -> None:
        for form in self._forms.values():
            form.retire()
        self._forms.clear()
        self._made = 0


class RequestShapes(Shapes[HeadShape]):
    """Those of requests."""

    __slots__ = ()

    def learn(self, known: KnownRequest, lines: list[bytes], size: int) -> HeadShape | None:
        """What shape a head has that no other had lately; None while that is not known, or where there is none.

        `known`: what the parser made of it, whose names are all different. `lines`: its header lines. `size`: of all of it.
        """
        if known.method not in _METHODS or size > self._most:
            return None
        return self._find((known.method, known.authority, *known.index), known, [*lines, known.path])

    def _make(self, known: KnownRequest, key: tuple[bytes, ...], lines: list[bytes], varying: frozenset[int]) -> HeadShape | None:
        *lines, _ = lines
        names: list[bytes] = []
        parts: list[tuple[bytes, bytes]] = []
        before = known.method + b" "
        if len(lines) in varying:
            names.append(b":path")
            parts.append((before, _PATH))
            before = b""
        else:
            before += known.path
        cut = cut_lines(before + b" HTTP/1.1\r\n", lines, varying, _pattern)
        if cut is None:
            return None
        more_names, more_parts, tail = cut
        return HeadShape(known, parts + more_parts, tail, (*names, *more_names), self._most)


def _pattern(name: bytes, value: bytes) -> bytes | None:
    return None if name in _FIXED else WORDS if b" " in value else _VISIBLE


class Form(Generic[S]):
    """Heads of which some lines vary: which ones, and the shapes by what those are that do not. `varying`: the places of lines that do."""

    __slots__ = ("_seen", "_slow", "_steady", "shapes", "varying")

    def __init__(self, count: int, steady: frozenset[int] = frozenset(), slow: frozenset[int] = frozenset()) -> None:
        """`count`: of lines. `steady`: the places of those that are never taken to vary; `slow`: of those that stay the same for so long that they are no
        reason for a shape."""
        self._seen: list[set[bytes]] = [set() for _ in range(count)]
        self._steady = steady
        self._slow = slow
        self.varying: frozenset[int] = frozenset()
        self.shapes: dict[tuple[bytes, ...], S | None] = {}

    def retire(self) -> None:
        """Forget the shapes."""
        for shape in self.shapes.values():
            if shape is not None:
                shape.retire()
        self.shapes.clear()

    def fixed(self, lines: list[bytes]) -> tuple[bytes, ...] | None:
        """Those lines of a head that do not vary; None if all do, or it is not known yet which."""
        if len(lines) != len(self._seen):
            return None  # a Connection line more or less, which is no field that goes on
        varying, steady = self.varying, self._steady
        grown = []
        fixed = []
        place = -1
        for line, seen in zip(lines, self._seen, strict=True):
            place += 1  # enumerate costs more
            if place in varying:
                continue
            fixed.append(line)
            if line not in seen and place not in steady:
                if len(seen) >= _FEW:
                    grown.append(place)
                    seen.clear()
                else:
                    seen.add(line)
        if grown:
            self.varying = varying.union(grown)
            self.retire()
            return None
        return (*fixed,) if varying and not varying <= self._slow else None


def cut_lines(
    before: bytes, lines: list[bytes], varying: frozenset[int], pattern_of: Callable[[bytes, bytes], bytes | None]
) -> tuple[list[bytes], list[tuple[bytes, bytes]], bytes] | None:
    """Header lines, of which some vary, as a `Shape` takes them: names, parts and tail; None where one may not vary that does.

    `before`: what stands in front of the first line. `pattern_of`: that for values of a field, by its name in lower case and one of its values; or None.
    """
    names = []
    parts = []
    for place, line in enumerate(lines):
        if place not in varying:
            before += line + b"\r\n"
            continue
        spelt, _, rest = line.partition(b":")
        value = rest.lstrip(b" \t")
        name = spelt.lower()
        pattern = None if _VALUE(value) is None else pattern_of(name, value)
        if pattern is None:
            return None
        names.append(name)
        parts.append((before + line[: len(line) - len(value)], pattern))
        before = b"\r\n"
    return names, parts, before + b"\r\n"
