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
    if isinstance(value, int):
        return b"%d" % value
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return b"{%b}" % b",".join([b"%b:%b" % (quote(key), dump(value[key])) for key in sorted(value)])
    if isinstance(value, (list, tuple)):
        return b"[%b]" % b",".join(map(dump, value))
    return quote(value if isinstance(value, (bytes, str)) else str(value))


def number(value: float) -> bytes:
    """A number: whole ones without a fraction, others in the shortest form that reads back the same; null when it is not finite."""
    if not math.isfinite(value):
        return b"null"
    if value.is_integer() and abs(value) < 2**63:
        return b"%d" % int(value)
    return repr(value).encode()
