"""Single values of the JSON mapping: strings, numbers, booleans, bytes and enums, as protobuf's lenient mode takes them."""

from __future__ import annotations

import binascii
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor

from meshproxy.api.errors import INVALID, Problem

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor

MAX_DEPTH = 200  # fields and list indices on the way to a value

Convert = Callable[[Any, "Walk"], Any]

_INTEGER = re.compile(r"-?[0-9]{1,20}")
# No spaces, underscores or hexadecimal, which float() or int() would take.
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NAN = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_QUOTED_BOOLS = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
_MAX_FLOAT = 3.4028234663852886e38


class Walk:
    """One conversion: where it is, and what it found. `stack` holds field names, indices and map keys. `columns`: many values are converted at once."""

    __slots__ = ("columns", "deepest", "problems", "stack")

    def __init__(self, *, columns: bool = False) -> None:
        self.columns = columns
        self.stack: list[str | int] = []
        self.problems: list[Problem] = []
        self.deepest = 0

    def report(self, why: str, *below: str | int, kind: str = INVALID) -> None:
        """Note a problem of the current field, or of one `below` it."""
        path = ""
        for part in (*self.stack, *below):
            path += f"[{part}]" if isinstance(part, int) else part if part[0] == "[" else f".{part}"
        self.problems.append(Problem(path.removeprefix("."), why, kind))

    def too_deep(self) -> bool:
        """Whether to go no deeper; the first time it is reported."""
        depth = len(self.stack)
        if depth > self.deepest:
            if depth > MAX_DEPTH >= self.deepest:
                self.report("nested too deeply")
            self.deepest = depth
        return depth > MAX_DEPTH


def _string(value: Any, walk: Walk) -> str:
    if value.__class__ is str:
        return value
    hint = " (put it in quotes)" if isinstance(value, bool | int | float) else ""
    walk.report(f"expected a string, got {show(value)}{hint}")
    return ""


def _bool(value: Any, walk: Walk) -> bool:
    if value.__class__ is bool:
        return value
    flag = _QUOTED_BOOLS.get(value.lower()) if value.__class__ is str else None
    if flag is None:
        walk.report(f"expected true or false, got {show(value)}")
        return False
    return flag


def _integer(low: int, high: int) -> Convert:
    def run(value: Any, walk: Walk) -> int:
        number: int | None = None
        if value.__class__ is int:
            number = value
        elif value.__class__ is str and _INTEGER.fullmatch(value):
            number = int(value)
        elif value.__class__ is float or (value.__class__ is str and len(value) < 400 and _NUMBER.fullmatch(value)):
            real = float(value)
            number = int(real) if real.is_integer() else None
        if number is None:
            walk.report(f"expected an integer, got {show(value)}")
            return 0
        if low <= number <= high:
            return number
        walk.report(f"{number} is out of range: {low} to {high}")
        return 0

    return run


def _real(limit: float) -> Convert:
    def run(value: Any, walk: Walk) -> float:
        if value.__class__ is float or value.__class__ is int:
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
        elif value.__class__ is str and len(value) < 400 and _NUMBER.fullmatch(value):
            number = float(value)
        elif value.__class__ is str and value in _NAN:
            return _NAN[value]
        else:
            walk.report(f"expected a number, got {show(value)}")
            return 0.0
        if math.isinf(number) or abs(number) > limit:
            walk.report(f"{show(value)} is out of range")
            return 0.0
        return number

    return run


def _bytes(value: Any, walk: Walk) -> bytes:
    import base64  # few fields are bytes

    if value.__class__ is not str:
        walk.report(f"expected bytes as a base64 string, got {show(value)}")
        return b""
    text = value.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        walk.report(f"{show(value)} is not base64")
        return b""


SCALARS: dict[int, Convert] = {
    FieldDescriptor.TYPE_STRING: _string,
    FieldDescriptor.TYPE_BYTES: _bytes,
    FieldDescriptor.TYPE_BOOL: _bool,
    FieldDescriptor.TYPE_DOUBLE: _real(math.inf),
    FieldDescriptor.TYPE_FLOAT: _real(_MAX_FLOAT),
    **dict.fromkeys((FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32), _integer(0, (1 << 32) - 1)),
    **dict.fromkeys((FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64), _integer(0, (1 << 64) - 1)),
    **dict.fromkeys((FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32, FieldDescriptor.TYPE_SFIXED32), _integer(-(1 << 31), (1 << 31) - 1)),
    **dict.fromkeys((FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64, FieldDescriptor.TYPE_SFIXED64), _integer(-(1 << 63), (1 << 63) - 1)),
}


def enum(enum: EnumDescriptor) -> Convert:
    numbers = {value.name: value.number for value in enum.values}
    lenient = {name.upper(): number for name, number in numbers.items()}
    as_number = SCALARS[FieldDescriptor.TYPE_INT32]

    def run(value: Any, walk: Walk) -> int:
        if value.__class__ is str:
            number = numbers.get(value)
            if number is None:
                number = lenient.get(value.upper().replace("-", "_"))
            if number is not None:
                return number
            if not _INTEGER.fullmatch(value):
                walk.report(f"{show(value)} is not one of {', '.join(numbers)}")
                return 0
        elif value.__class__ is bool:
            walk.report(f"expected one of {', '.join(numbers)}, got {show(value)}")
            return 0
        return as_number(value, walk)

    return run


def show(value: Any) -> str:
    """A value in an error message: short, and as the reader wrote it."""
    if value is None:
        return "null"
    if value.__class__ is bool:
        return "true" if value else "false"
    if value.__class__ is dict:
        return "a mapping"
    if value.__class__ is list:
        return "a list"
    text = repr(value) if value.__class__ is str else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
