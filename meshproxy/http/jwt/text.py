"""Base64url and JSON as tokens and key sets hold them: of bounded depth, no name twice; strings may hold control characters, as in Envoy."""

from __future__ import annotations

import binascii
import json
import re
from typing import Any

MAX_DEPTH = 100  # objects and lists inside one another; protobuf's JSON parser, which is Envoy's, has the same limit

_WHITE = b"\t\n\v\f\r "
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_ALPHABET = re.compile(rb"[A-Za-z0-9_-]*")
_PADDING = {0: 0, 2: 2, 3: 1}  # characters of the last group -> how many `=` complete it
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEP = re.compile(rb'"(?:[^"\\]|\\.)*"?|([\[{])|([\]}])', re.DOTALL)


def decode_base64url(data: bytes) -> bytes | None:
    """The bytes that base64url text says; None when it is none. Padding may be left out, white space may stand anywhere, as in Envoy."""
    data = data.translate(None, _WHITE)
    body = data.rstrip(b"=")
    padding = len(data) - len(body)
    wanted = _PADDING.get(len(body) % 4)
    if wanted is None or padding not in (0, wanted) or _ALPHABET.fullmatch(body) is None:
        return None
    return binascii.a2b_base64(body.translate(_TO_STANDARD) + b"=" * wanted)


def decode_object(data: bytes) -> dict[str, Any] | None:
    """A JSON object as plain data, null as an empty one; None when `data` is anything else. Numbers are what a double can hold: ints where they are whole."""
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        return None
    try:
        value = _decoder.decode(data.decode())
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair is no text: UnicodeEncodeError is a ValueError
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or what the hooks below refuse
        return None
    return value if isinstance(value, dict) else {} if value is None else None


def _depth(data: bytes) -> int:
    """How deep brackets outside of strings are nested."""
    depth = deepest = 0
    for match in _DEEP.finditer(data):
        if match[1]:
            depth += 1
            deepest = max(deepest, depth)
        elif match[2]:
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Whoever reads the first of two equal names is told something else than who reads the last: there must be one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _number(text: str) -> float | int:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("no double can hold it")
    return int(value) if value.is_integer() and abs(value) < 2**63 else value


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


_decoder = json.JSONDecoder(strict=False, object_pairs_hook=_object, parse_float=_number, parse_int=_number, parse_constant=_constant)
