"""Responses whose heads have one shape: see `shapes`. Their lengths, dates and tags are others each time.

A response whose head did come before is known by that already (`response.KnownResponse`); the shape is for those that have not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.codec.h1.shapes import WORDS, Form, Shape, Shapes, cut_lines
from meshproxy.codec.response_shape import LENGTH, STEADY, ResponseShape

if TYPE_CHECKING:
    from meshproxy.codec.h1.response import KnownResponse

_DIGITS = rb"([0-9]{1,17})"
_FRAMING = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"))
_STEADY = STEADY | _FRAMING
_SLOW = frozenset((b"date",))  # the same for a second
_PRINTABLE = bytes(code if 32 <= code <= 126 else code ^ 128 for code in range(256))


class ResponseHeadShape(Shape):
    """That of responses with a content length, and nothing else that matters for framing. `response`: what it says of them."""

    __slots__ = ("response",)

    def __init__(self, known: KnownResponse, parts: list[tuple[bytes, bytes]], tail: bytes, names: tuple[bytes, ...], most: int) -> None:
        super().__init__(parts, tail, names, most)
        self.response = ResponseShape(known.status, known.items, names, stated=known.length, size=sum(map(len, self._rest)), reason=known.reason)

    def values(self, head: bytes) -> tuple[bytes, ...] | None:
        """HOT: the values of a whole head; None if it is not of this shape."""
        known = self._by_size.get(len(head))
        if known is not None:
            values_of, rest_of = known
            if rest_of(head) == self._rest:
                values = values_of(head)
                text = b" %b " % b" ".join(values)
                if text.translate(_PRINTABLE) is text and b"  " not in text:
                    return values
        return self._search(head)


class ResponseShapes(Shapes[ResponseHeadShape]):
    """The shapes of the responses seen lately."""

    __slots__ = ()

    def learn(self, known: KnownResponse, lines: list[bytes], size: int, status_line: bytes) -> ResponseHeadShape | None:
        """What shape a head has that no other had lately; None while that is not known, or where there is none.

        `known`: what the parser made of it, whose names are all different. `lines`: its header lines. `size`: of all of it.
        """
        return self._find((status_line, *known.index), known, lines) if size <= self._most else None

    def _form(self, lines: list[bytes]) -> Form[ResponseHeadShape]:
        names = [line.partition(b":")[0].lower() for line in lines]
        steady, slow = (frozenset(place for place, name in enumerate(names) if name in these) for these in (_STEADY, _SLOW))
        return Form(len(lines), steady, slow)

    def _make(self, known: KnownResponse, key: tuple[bytes, ...], lines: list[bytes], varying: frozenset[int]) -> ResponseHeadShape | None:
        cut = cut_lines(key[0] + b"\r\n", lines, varying, _pattern)
        if cut is None:
            return None
        names, parts, tail = cut
        return ResponseHeadShape(known, parts, tail, (*names,), self._most)


def _pattern(name: bytes, value: bytes) -> bytes:
    return _DIGITS if name == LENGTH else WORDS
