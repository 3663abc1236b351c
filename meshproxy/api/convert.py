"""Plain values (what YAML or JSON gives) to protobuf messages: the proto3 JSON mapping, with every mistake found and named by its path.

Each message type is compiled once into a `_Message` plan: a dict from the accepted field names to a converter. A plan turns a dict into keyword arguments
for the message's constructor, which builds whole trees in C; that is five times faster than json_format, and the paths come for free.

What is accepted is what Envoy accepts, which is protobuf's mapping in its lenient mode: both spellings of field names, numbers as strings, quoted booleans,
enum values in any case or by number, a single value for a list, null for "not set". Stricter than Envoy: two spellings of one field are an error.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from google.protobuf import any_pb2, message_factory, struct_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from meshproxy.api import messages
from meshproxy.api.errors import ConfigError, Problem

MAX_DEPTH = 200  # fields and list indices on the way to a value

_M = TypeVar("_M", bound=Message)
_Convert = Callable[[Any, "_Walk"], Any]

_DURATION = re.compile(r"(-?)([0-9]{1,12})(?:\.([0-9]{1,9}))?s")
_MAX_DURATION = 315_576_000_000
_INTEGER = re.compile(r"-?[0-9]{1,20}")
# No spaces, underscores or hexadecimal, which float() or int() would take.
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NAN = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_QUOTED_BOOLS = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
_MAX_FLOAT = 3.4028234663852886e38
# The binary form of a message is readable only up to 100 levels; a Struct has three for each of JSON's.
_SURELY_SHALLOW = 30


def to_message(value: Any, cls: type[_M]) -> _M:
    """The message that `value` describes. Raises ConfigError with everything that is wrong."""
    walk = _Walk()
    arguments = _plan(cls.DESCRIPTOR)(value, walk)
    if walk.problems:
        raise ConfigError(walk.problems)
    message = cls(**arguments) if arguments.__class__ is dict else arguments
    if walk.deepest > _SURELY_SHALLOW:
        try:
            cls.FromString(message.SerializeToString())
        except DecodeError as error:
            raise ConfigError("nested too deeply") from error
    return message


def from_struct(struct: struct_pb2.Struct) -> dict[str, Any]:
    """The plain value of a Struct; whole numbers become int."""
    return {key: _from_value(value) for key, value in struct.fields.items()}


def _from_value(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return from_struct(value.struct_value)
    if kind == "list_value":
        return [_from_value(item) for item in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    return getattr(value, kind) if kind and kind != "null_value" else None


class _Walk:
    """One conversion: where it is, and what it found. `stack` holds field names, indices and map keys."""

    __slots__ = ("deepest", "problems", "stack")

    def __init__(self) -> None:
        self.stack: list[str | int] = []
        self.problems: list[Problem] = []
        self.deepest = 0

    def report(self, why: str, *below: str | int) -> None:
        """Note a problem of the current field, or of one `below` it."""
        path = ""
        for part in (*self.stack, *below):
            path += f"[{part}]" if isinstance(part, int) else part if part[0] == "[" else f".{part}"
        self.problems.append(Problem(path.removeprefix("."), why))

    def too_deep(self) -> bool:
        """Whether to go no deeper; the first time it is reported."""
        depth = len(self.stack)
        if depth > self.deepest:
            if depth > MAX_DEPTH >= self.deepest:
                self.report("nested too deeply")
            self.deepest = depth
        return depth > MAX_DEPTH


class _Field(NamedTuple):
    """How to convert one field. A value whose class is `exact` needs no conversion."""

    name: str
    exact: type | None
    convert: _Convert
    oneof: str | None
    null: bool  # null is a value, not the absence of one


class _Message:
    """The plan of one message type. Fields are compiled on first use: message types refer to each other in circles."""

    __slots__ = ("_descriptor", "_fields")

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self._fields: dict[str, _Field] = {}

    def __call__(self, value: Any, walk: _Walk) -> dict[str, Any]:
        if value.__class__ is not dict:
            walk.report(f"expected a mapping with the fields of {self._descriptor.full_name}, got {_show(value)}")
            return {}
        if walk.too_deep():
            return {}
        fields = self._fields or self._compile()
        stack = walk.stack
        result: dict[str, Any] = {}
        oneofs: dict[str, str] | None = None
        for key, item in value.items():
            field = fields.get(key)
            if field is None:
                self._unknown(key, walk)
                continue
            name, exact, convert, oneof, null = field
            if item is None and not null:
                continue
            if name in result:
                walk.report("the field is there twice, under both of its spellings", name)
            if oneof is not None:
                if oneofs is None:
                    oneofs = {}
                other = oneofs.setdefault(oneof, name)
                if other != name:
                    walk.report(f"cannot be set together with {other}: one of them must go", name)
            if item.__class__ is exact:
                result[name] = item
            else:
                stack.append(name)
                result[name] = convert(item, walk)
                stack.pop()
        return result

    def _compile(self) -> dict[str, _Field]:
        fields = self._fields
        for field in self._descriptor.fields:
            compiled = _compile_field(field)
            fields[field.name] = fields[field.json_name] = compiled
        return fields

    def _unknown(self, key: str, walk: _Walk) -> None:
        close = difflib.get_close_matches(key, self._fields, 1) if len(key) < 80 else ()
        hint = f"; did you mean {close[0]!r}?" if close else ""
        walk.report(f"{self._descriptor.full_name} has no such field{hint}", key if re.fullmatch(r"\w{1,80}", key) else f"[{_show(key)}]")


_plans: dict[str, _Convert] = {}


def _plan(descriptor: Descriptor) -> _Convert:
    plan = _plans.get(descriptor.full_name)
    if plan is None:
        plan = _plans[descriptor.full_name] = _SPECIAL.get(descriptor.full_name) or _Message(descriptor)
        if descriptor.full_name.startswith("google.protobuf.") and descriptor.full_name.endswith("Value") and "value" in descriptor.fields_by_name:
            plan = _plans[descriptor.full_name] = _wrapper(descriptor)
    return plan


def _compile_field(field: FieldDescriptor) -> _Field:
    entry = field.message_type
    oneof = field.containing_oneof
    # A proto3 `optional` field is alone in a oneof of its own.
    group = oneof.name if oneof is not None and len(oneof.fields) > 1 else None
    if field.is_repeated:
        if entry is not None and entry.GetOptions().map_entry:
            return _Field(field.name, None, _map(entry), None, False)
        return _Field(field.name, None, _repeated(field), None, False)
    return _Field(field.name, _exact(field), _convert_one(field), group, entry is not None and entry.full_name == "google.protobuf.Value")


def _exact(field: FieldDescriptor) -> type | None:
    return {FieldDescriptor.TYPE_STRING: str, FieldDescriptor.TYPE_BOOL: bool}.get(field.type)


def _convert_one(field: FieldDescriptor) -> _Convert:
    """The converter of a single value of the field's type."""
    if field.message_type is not None:
        return _plan(field.message_type)
    if field.enum_type is not None:
        return _enum(field.enum_type)
    return _SCALARS[field.type]


def _repeated(field: FieldDescriptor) -> _Convert:
    convert = _convert_one(field)
    exact = _exact(field)
    if field.message_type is None:
        null = 0 if field.enum_type is not None else field.default_value
    else:
        null = struct_pb2.Value(null_value=struct_pb2.NULL_VALUE) if field.message_type.full_name == "google.protobuf.Value" else None

    def run(value: Any, walk: _Walk) -> list[Any]:
        if value.__class__ is not list:
            value = [value]
        stack = walk.stack
        result = []
        for i, item in enumerate(value):
            if item.__class__ is exact:
                result.append(item)
            elif item is None:
                result.append({} if null is None else null)
            else:
                stack.append(i)
                result.append(convert(item, walk))
                stack.pop()
        return result

    return run


def _map(entry: Descriptor) -> _Convert:
    key_type = entry.fields_by_name["key"].type
    value_field = entry.fields_by_name["value"]
    convert = _convert_one(value_field)
    cls = message_factory.GetMessageClass(value_field.message_type) if value_field.message_type is not None else None

    def run(value: Any, walk: _Walk) -> dict[Any, Any]:
        if value.__class__ is not dict:
            walk.report(f"expected a mapping, got {_show(value)}")
            return {}
        result = {}
        for key, item in value.items():
            walk.stack.append(f'["{key}"]')
            converted_key = key if key_type == FieldDescriptor.TYPE_STRING else _SCALARS[key_type](key, walk)
            if item is None:
                converted = {} if cls is not None else value_field.default_value
            else:
                converted = convert(item, walk)
            walk.stack.pop()
            if converted.__class__ is dict and cls is not None:
                converted = {} if walk.problems else cls(**converted)
            result[converted_key] = converted
        return result

    return run


# -- scalars


def _string(value: Any, walk: _Walk) -> str:
    if value.__class__ is str:
        return value
    hint = " (put it in quotes)" if isinstance(value, bool | int | float) else ""
    walk.report(f"expected a string, got {_show(value)}{hint}")
    return ""


def _bool(value: Any, walk: _Walk) -> bool:
    if value.__class__ is bool:
        return value
    flag = _QUOTED_BOOLS.get(value.lower()) if value.__class__ is str else None
    if flag is None:
        walk.report(f"expected true or false, got {_show(value)}")
        return False
    return flag


def _integer(low: int, high: int) -> _Convert:
    def run(value: Any, walk: _Walk) -> int:
        number: int | None = None
        if value.__class__ is int:
            number = value
        elif value.__class__ is str and _INTEGER.fullmatch(value):
            number = int(value)
        elif value.__class__ is float or (value.__class__ is str and len(value) < 400 and _NUMBER.fullmatch(value)):
            real = float(value)
            number = int(real) if real.is_integer() else None
        if number is None:
            walk.report(f"expected an integer, got {_show(value)}")
            return 0
        if low <= number <= high:
            return number
        walk.report(f"{number} is out of range: {low} to {high}")
        return 0

    return run


def _real(limit: float) -> _Convert:
    def run(value: Any, walk: _Walk) -> float:
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
            walk.report(f"expected a number, got {_show(value)}")
            return 0.0
        if abs(number) > limit:
            walk.report(f"{_show(value)} is out of range")
            return 0.0
        return number

    return run


def _bytes(value: Any, walk: _Walk) -> bytes:
    if value.__class__ is not str:
        walk.report(f"expected bytes as a base64 string, got {_show(value)}")
        return b""
    text = value.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        walk.report(f"{_show(value)} is not base64")
        return b""


_SCALARS: dict[int, _Convert] = {
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


def _enum(enum: EnumDescriptor) -> _Convert:
    numbers = {value.name: value.number for value in enum.values}
    lenient = {name.upper(): number for name, number in numbers.items()}
    as_number = _SCALARS[FieldDescriptor.TYPE_INT32]

    def run(value: Any, walk: _Walk) -> int:
        if value.__class__ is str:
            number = numbers.get(value)
            if number is None:
                number = lenient.get(value.upper().replace("-", "_"))
            if number is not None:
                return number
            if not _INTEGER.fullmatch(value):
                walk.report(f"{_show(value)} is not one of {', '.join(numbers)}")
                return 0
        elif value.__class__ is bool:
            walk.report(f"expected one of {', '.join(numbers)}, got {_show(value)}")
            return 0
        return as_number(value, walk)

    return run


# -- well-known types


def _wrapper(descriptor: Descriptor) -> _Convert:
    field = descriptor.fields_by_name["value"]
    convert = _convert_one(field)
    return lambda value, walk: {"value": convert(value, walk)}


def _duration(value: Any, walk: _Walk) -> dict[str, int]:
    found = _DURATION.fullmatch(value) if value.__class__ is str else None
    if found is None:
        walk.report(f'expected a duration in seconds, such as "0.25s", got {_show(value)}')
        return {}
    sign = -1 if found[1] else 1
    seconds = int(found[2])
    if seconds > _MAX_DURATION:
        walk.report(f"{_show(value)} is out of range: at most {_MAX_DURATION}s")
        return {}
    return {"seconds": sign * seconds, "nanos": sign * int((found[3] or "").ljust(9, "0"))}


def _timestamp(value: Any, walk: _Walk) -> timestamp_pb2.Timestamp:
    result = timestamp_pb2.Timestamp()
    try:
        result.FromJsonString(value)
    except (ValueError, TypeError, AttributeError, OverflowError):
        walk.report(f'expected a time such as "2030-01-01T00:00:00Z", got {_show(value)}')
    return result


def _field_mask(value: Any, walk: _Walk) -> dict[str, list[str]]:
    if value.__class__ is not str:
        walk.report(f"expected field names separated by commas, got {_show(value)}")
        return {}
    return {"paths": [re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", path) for path in value.split(",") if path]}


def _struct(value: Any, walk: _Walk) -> struct_pb2.Struct:
    if value.__class__ is not dict:
        walk.report(f"expected a mapping, got {_show(value)}")
        return struct_pb2.Struct()
    fields = {}
    for key, item in value.items():
        walk.stack.append(f'["{key}"]')
        fields[key] = _value(item, walk)
        walk.stack.pop()
    return struct_pb2.Struct(fields=fields)


def _value(value: Any, walk: _Walk) -> struct_pb2.Value:
    kind = value.__class__
    if kind is str:
        return struct_pb2.Value(string_value=value)
    if kind is bool:
        return struct_pb2.Value(bool_value=value)
    if kind is int or kind is float:
        return struct_pb2.Value(number_value=_SCALARS[FieldDescriptor.TYPE_DOUBLE](value, walk))
    if value is None:
        return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
    if walk.too_deep():
        return struct_pb2.Value()
    return struct_pb2.Value(struct_value=_struct(value, walk)) if kind is dict else struct_pb2.Value(list_value=_list_value(value, walk))


def _list_value(value: Any, walk: _Walk) -> struct_pb2.ListValue:
    if value.__class__ is not list:
        walk.report(f"expected a list, got {_show(value)}")
        return struct_pb2.ListValue()
    values = []
    for i, item in enumerate(value):
        walk.stack.append(i)
        values.append(_value(item, walk))
        walk.stack.pop()
    return struct_pb2.ListValue(values=values)


def _any(value: Any, walk: _Walk) -> Any:
    if value.__class__ is not dict:
        walk.report(f'expected a mapping with "@type" and the fields of that type, got {_show(value)}')
        return {}
    if not value:
        return {}
    type_url = value.get("@type")
    if type_url.__class__ is not str:
        walk.report('"@type" is missing' if type_url is None else f'"@type" must be a string, not {_show(type_url)}')
        return {}
    host, slash, name = type_url.rpartition("/")
    if not slash or not host:
        walk.report(f'"@type" must look like type.googleapis.com/package.Message, not {_show(type_url)}')
        return {}
    cls = messages.message_class(name)
    if cls is None:
        walk.report(f"unknown type {_show(type_url)}")
        return {}
    rest = {key: item for key, item in value.items() if key != "@type"}
    plan = _plan(cls.DESCRIPTOR)
    if not isinstance(plan, _Message):  # a type with a JSON form of its own
        if set(rest) - {"value"}:
            walk.report(f'{name} has only the field "value" here')
            return {}
        rest = rest.get("value", {})
    before = len(walk.problems)
    arguments = plan(rest, walk)
    if len(walk.problems) > before:
        return {}
    message = cls(**arguments) if arguments.__class__ is dict else arguments
    return any_pb2.Any(type_url=type_url, value=message.SerializeToString())


_SPECIAL: dict[str, _Convert] = {
    "google.protobuf.Any": _any,
    "google.protobuf.Duration": _duration,
    "google.protobuf.FieldMask": _field_mask,
    "google.protobuf.ListValue": _list_value,
    "google.protobuf.Struct": _struct,
    "google.protobuf.Timestamp": _timestamp,
    "google.protobuf.Value": _value,
}


def _show(value: Any) -> str:
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
