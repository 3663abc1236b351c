"""JSON text as bytes, escaped as Envoy's JSON formatter escapes it.

Valid UTF-8 is passed on, only quotes, backslashes and control characters are escaped. Of a value that is not UTF-8 every special or non-ASCII byte is
written as `\\u00XX` on its own, so that hostile bytes can neither end a string nor make the line unreadable.
"""

from __future__ import annotations

import math
from typing import Any

_SAFE = bytes(code for code in range(0x20, 0x7F) if code not in b'"\\')
_BYTES = tuple(bytes((code,)) if code in _SAFE else b"\\u%04x" % code for code in range(256))

#: Leaves bytes that need no escaping as they are: `raw.translate(UNESCAPED) is raw` is the quickest test for that.
UNESCAPED = bytes(code if code in _SAFE else code ^ 1 for code in range(256))


def quote(value: bytes | str) -> bytes:
    """A JSON string, with its quotes. `bytes` are UTF-8, or anything."""
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    if raw.translate(UNESCAPED) == raw:
        return b'"%b"' % raw
    from json.encoder import encode_basestring

    try:
        return encode_basestring(raw.decode()).encode()
    except UnicodeDecodeError:
        return b'"%b"' % b"".join([_BYTES[code] for code in raw])


class Quoted(dict[bytes | str | None, bytes]):
    """Value -> JSON string, null for None: for what recurs in a log, such as hosts and agents. Bounded: a full memo is emptied."""

    __slots__ = ()

    def __missing__(self, value: bytes | str | None) -> bytes:
        if value is None:
            text = b"null"
        else:
            text = quote(value)
            if len(self) >= _LIMIT:
                self.clear()
        self[value] = text
        return text


_LIMIT = 512
quoted = Quoted()


def dump(value: Any) -> bytes:
    """A plain value (None, bool, number, str, bytes, list, dict) as compact JSON with sorted keys. Anything else is written as its text."""
    if value is None:
        return b"null"
    if value is True:
        return b"true"
    if value is False:
        return b"false"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, dict):
        return b"{%b}" % b",".join([b"%b:%b" % (quote(key), dump(value[key])) for key in sorted(value)])
    if isinstance(value, (list, tuple)):
        return b"[%b]" % b",".join(map(dump, value))
    return quote(value if isinstance(value, (bytes, str)) else str(value))


def number(value: float) -> bytes:
    """A number as Envoy writes it, for which all are doubles: the fewest digits that read back the same, with an exponent where that is shorter (4e+09).

    null when it is not finite.
    """
    if not math.isfinite(value):
        return b"null"
    if -10000 <= value <= 10000 and value == int(value):
        return b"%d" % value  # no other form of these is shorter
    from decimal import Decimal  # only where numbers are large or have fractions

    value = float(value)
    sign = "-" if value < 0 else ""
    _, found, shift = Decimal(repr(abs(value))).normalize().as_tuple()
    assert isinstance(shift, int)
    digits = "".join(map(str, found))
    exponent = len(digits) - 1 + shift
    mantissa = f"{digits[0]}.{digits[1:]}" if len(digits) > 1 else digits
    scientific = f"{mantissa}e{exponent:+03d}"
    if exponent >= len(digits) - 1:
        fixed = str(int(abs(value)))
    elif exponent >= 0:
        fixed = f"{digits[: exponent + 1]}.{digits[exponent + 1 :]}"
    else:
        fixed = f"0.{'0' * (-exponent - 1)}{digits}"
    return (sign + (fixed if len(fixed) <= len(scientific) else scientific)).encode()
