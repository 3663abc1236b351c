"""Header names on an HTTP/1 wire: lower case by default, or `Proper-Case`, or as the other side spelt them.

What was spelt by the sender is kept with the head (`SpeltRequestHead`) and wins over what the receiver's configuration says, as in Envoy.

Source: envoy.config.core.v3.Http1ProtocolOptions.HeaderKeyFormat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from meshproxy.codec.headers import Pair

Formatter = Callable[[bytes], bytes]


def compile(style: str | None) -> Formatter | None:
    """What makes a name that goes out of a lower-case one; None when names go out as they are. Preserving is done where heads are read."""
    return proper_case if style == "proper" else None


def spell(items: list[Pair], case: dict[bytes, bytes] | None, style: Formatter | None) -> list[Pair]:
    """The items with their names as they go on the wire: as `case` remembers them, or else in `style`."""
    if case is not None:
        return [(case.get(name, name), value) for name, value in items]
    if style is not None:
        return [(style(name), value) for name, value in items]
    return items


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


class ProperElse(dict[bytes, bytes]):
    """Names as they were spelt; what nobody has spelt is `Proper-Case` (PreserveCaseFormatterConfig.formatter_type_on_envoy_headers)."""

    def get(self, name: bytes, default: bytes | None = None) -> bytes:  # type: ignore[override]  # never the default
        """The spelling of a lower-case name."""
        return self[name] if name in self else proper_case(name)
