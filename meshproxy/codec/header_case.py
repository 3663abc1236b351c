"""Header names on an HTTP/1 wire: lower case by default, or `Proper-Case`, or as the other side spelt them.

Source: envoy.config.core.v3.Http1ProtocolOptions.HeaderKeyFormat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from meshproxy.codec.headers import Pair

Formatter = Callable[[list[Pair], Any], list[Pair]]


def compile(style: str | None) -> Formatter | None:
    """A function (items, head) -> items with other names; None when names stay in lower case."""
    if style is None:
        return None
    return _proper if style == "proper" else _preserve


@lru_cache(maxsize=1024)
def proper_case(name: bytes) -> bytes:
    """`content-type` -> `Content-Type`: every letter that begins the name or follows something that is neither letter nor digit."""
    out = bytearray(name)
    start = True
    for position, byte in enumerate(out):
        letter = 97 <= byte <= 122
        if start and letter:
            out[position] = byte - 32
        start = not (letter or 48 <= byte <= 57 or 65 <= byte <= 90)
    return bytes(out)


def _proper(items: list[Pair], head: Any) -> list[Pair]:
    return [(proper_case(name), value) for name, value in items]


def _preserve(items: list[Pair], head: Any) -> list[Pair]:
    case: dict[bytes, bytes] | None = getattr(head, "case", None)
    return [(case.get(name, name), value) for name, value in items] if case else items
