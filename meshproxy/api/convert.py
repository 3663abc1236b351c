"""Plain values (what YAML or JSON gives) to protobuf messages: the proto3 JSON mapping, with every mistake found and named by its path.

Each message type is compiled once into a `_Message` plan: a dict from the accepted field names to a converter. A plan turns a dict into keyword arguments
for the message's constructor, which builds whole trees in C; that is five times faster than json_format, and the paths come for free.

What is accepted is what Envoy accepts, which is protobuf's mapping in its lenient mode: both spellings of field names, numbers as strings, quoted booleans,
enum values in any case or by number, a single value for a list, null for "not set". Stricter than Envoy: two spellings of one field are an error.

A large configuration is ten thousand times the same few fields. So values are first converted by columns: all messages of one kind together, field by field,
which for values that need no conversion is a few calls into C. Whatever is unusual ends that attempt, and every value is converted on its own, with its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import chain, islice
from types import NoneType
from typing import Any, NamedTuple, TypeVar

from google.protobuf import any_pb2, duration_pb2, struct_pb2, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from meshproxy.api import messages
from meshproxy.api.errors import UNKNOWN, ConfigError, Problem
from meshproxy.api.scalars import SCALARS, Convert, Walk, enum, show

_M = TypeVar("_M", bound=Message)

_DURATION = re.compile(r"(-?)([0-9]{1,12})(?:\.([0-9]{1,9}))?s")
_MAX_DURATION = 315_576_000_000
# The binary form of a message is readable only up to 100 levels; a Struct has three for each of JSON's.
_SURELY_SHALLOW = 30


def to_message(value: Any, cls: type[_M], unknown: list[Problem] | None = None) -> _M:
    """The message that `value` describes. Raises ConfigError with everything that is wrong; with a list `unknown`, fields that no message has only go there."""
    plan = _plan(cls.DESCRIPTOR)
    walk = Walk(columns=True)
    try:
        try:
            arguments = _single(plan, value, walk)
        except _UnusualError:
            arguments = None
        if arguments is None or walk.problems:
            walk = Walk()
            arguments = plan(value, walk)
            problems = walk.problems
            if unknown is not None:
                unknown += [problem for problem in problems if problem.kind == UNKNOWN]
                problems = [problem for problem in problems if problem.kind != UNKNOWN]
            if problems:
                raise ConfigError(problems)
        message = cls(**arguments) if arguments.__class__ is dict else arguments
        if walk.deepest > _SURELY_SHALLOW:
            cls.FromString(message.SerializeToString())
    except DecodeError as error:
        # Copies go through the binary form, which has a limit of its own.
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


Column = Callable[[list[Any], Walk], list[Any]]  # converts values of one field of many messages; the same list when nothing had to be converted


class _UnusualError(Exception):
    """Something that conversion by columns does not deal with. It may be a mistake, or not."""


class _Field(NamedTuple):
    """How to convert one field, of one message or of many. A value whose class is `exact` needs no conversion."""

    name: str
    exact: type | None
    convert: Convert
    oneof: str | None
    null: bool  # null is a value, not the absence of one
    column: Column


class _Fields(dict[str, _Field | None]):
    """The fields of one message type that were asked for, by each of their spellings; None for what is none."""

    __slots__ = ("_descriptor", "_json_names")

    def __init__(self, descriptor: Any) -> None:
        self._descriptor = descriptor
        self._json_names: dict[str, Any] | None = None

    def __missing__(self, key: str) -> _Field | None:
        found = self._descriptor.fields_by_name.get(key)
        if found is None:
            if self._json_names is None:
                self._json_names = {field.json_name: field for field in self._descriptor.fields}
            found = self._json_names.get(key)
            if found is None:
                return None  # not kept: anything may come from outside
        field = self[key] = _compile_field(found)
        return field


class _Message:
    """The plan of one message type. Fields are compiled on first use: message types refer to each other in circles, and most fields are never used."""

    __slots__ = ("_descriptor", "_fields")

    def __init__(self, descriptor: Any) -> None:
        self._descriptor = descriptor
        self._fields = _Fields(descriptor)

    def __call__(self, value: Any, walk: Walk) -> dict[str, Any]:
        if value.__class__ is not dict:
            walk.report(f"expected a mapping with the fields of {self._descriptor.full_name}, got {show(value)}")
            return {}
        if len(walk.stack) > walk.deepest and walk.too_deep():
            return {}
        fields = self._fields
        stack = walk.stack
        result: dict[str, Any] = {}
        oneofs: tuple[str, ...] = ()
        for key, item in value.items():
            field = fields[key]
            if field is None:
                self._unknown(key, walk)
                continue
            name, exact, convert, oneof, null, _ = field
            if item.__class__ is exact and oneof is None and name not in result:
                result[name] = item
                continue
            if item is None and not null:
                continue
            if name in result:
                walk.report("the field is there twice, under both of its spellings", name)
            if oneof is not None:
                if oneof in oneofs:
                    other = next(one.name for one in fields.values() if one is not None and one.oneof == oneof and one.name in result)
                    if other != name:
                        walk.report(f"cannot be set together with {other}: one of them must go", name)
                oneofs += (oneof,)
            if item.__class__ is exact:
                result[name] = item
            else:
                stack.append(name)
                result[name] = convert(item, walk)
                stack.pop()
        return result

    def column(self, values: list[Any], walk: Walk) -> list[Any]:
        """Many at once. Raises _UnusualError."""
        if len(walk.stack) > walk.deepest and walk.too_deep():
            raise _UnusualError
        if set(map(type, values)) != {dict}:
            if values:
                raise _UnusualError
            return values
        kinds = set(map(tuple, values))
        if len(kinds) == 1:
            return self._group(kinds.pop(), values, walk)
        groups: dict[tuple[str, ...], list[int]] = {}
        for at, value in enumerate(values):
            groups.setdefault(tuple(value), []).append(at)
        result = list(values)
        for keys, places in groups.items():
            for at, converted in zip(places, self._group(keys, [values[at] for at in places], walk), strict=True):
                result[at] = converted
        return result

    def _group(self, keys: tuple[str, ...], values: list[dict[str, Any]], walk: Walk) -> list[dict[str, Any]]:
        """Messages with the same keys in the same order."""
        fields = self._fields
        names: list[str] = []
        columns: list[list[Any]] = []
        oneofs: set[str] = set()
        same = True
        for key in keys:
            field = fields[key]
            if field is None or field.name in names or field.oneof in oneofs:
                raise _UnusualError
            if field.oneof is not None:
                oneofs.add(field.oneof)
            names.append(field.name)
            before = [value[key] for value in values]
            walk.stack.append(field.name)
            after = field.column(before, walk)
            walk.stack.pop()
            columns.append(after)
            same = same and after is before and key == field.name
        return values if same else [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _unknown(self, key: str, walk: Walk) -> None:
        import difflib

        spellings = [name for field in self._descriptor.fields for name in dict.fromkeys((field.name, field.json_name))]
        close = difflib.get_close_matches(key, spellings, 1) if len(key) < 80 else ()
        hint = f"; did you mean {close[0]!r}?" if close else ""
        walk.report(f"{self._descriptor.full_name} has no such field{hint}", key if re.fullmatch(r"\w{1,80}", key) else f"[{show(key)}]", kind=UNKNOWN)


_plans: dict[str, Convert] = {}


def _plan(descriptor: Any) -> Convert:
    plan = _plans.get(descriptor.full_name)
    if plan is None:
        plan = _plans[descriptor.full_name] = _SPECIAL.get(descriptor.full_name) or _Message(descriptor)
        if descriptor.full_name.startswith("google.protobuf.") and descriptor.full_name.endswith("Value") and "value" in descriptor.fields_by_name:
            plan = _plans[descriptor.full_name] = _wrapper(descriptor)
    return plan


def _compile_field(field: Any) -> _Field:
    entry = field.message_type
    oneof = field.containing_oneof
    # A proto3 `optional` field is alone in a oneof of its own.
    group = oneof.name if oneof is not None and len(oneof.fields) > 1 else None
    if field.is_repeated:
        if entry is not None and entry.GetOptions().map_entry:
            pairs = _map(entry)
            return _Field(field.name, None, pairs, None, False, _each(pairs))
        return _Field(field.name, None, _repeated(field), None, False, _repeated_column(field))
    convert = _convert_one(field)
    null = entry is not None and entry.full_name == "google.protobuf.Value"
    return _Field(field.name, _exact(field), convert, group, null, _each(convert, _exact(field), null=null))


def _exact(field: Any) -> type | None:
    return {FieldDescriptor.TYPE_STRING: str, FieldDescriptor.TYPE_BOOL: bool}.get(field.type)


def _convert_one(field: Any) -> Convert:
    """The converter of a single value of the field's type."""
    if field.message_type is not None:
        return _plan(field.message_type)
    if field.enum_type is not None:
        return enum(field.enum_type)
    return SCALARS[field.type]


def _repeated(field: Any) -> Convert:
    convert = _convert_one(field)
    exact = _exact(field)
    null = _null_item(field)

    def run(value: Any, walk: Walk) -> list[Any]:
        if value.__class__ is not list:
            value = [value]
        stack = walk.stack
        stack.append(0)
        result = []
        for i, item in enumerate(value):
            if item.__class__ is exact:
                result.append(item)
            elif item is None:
                result.append(null)
            else:
                stack[-1] = i
                result.append(convert(item, walk))
        stack.pop()
        return result

    return run


def _each(convert: Convert, exact: type | None = None, *, null: bool = False) -> Column:
    """A column of values that are not repeated."""
    if isinstance(convert, _Message):
        return convert.column

    def run(values: list[Any], walk: Walk) -> list[Any]:
        kinds = set(map(type, values))
        if NoneType in kinds and not null:
            raise _UnusualError
        if len(kinds) == 1:
            if exact in kinds:
                return values
            if str in kinds or int in kinds:
                # Ports, durations and enums are a few different values.
                known = {value: convert(value, walk) for value in set(values)}
                return values if all(value is converted for value, converted in known.items()) else [known[value] for value in values]
        return [convert(value, walk) for value in values]

    return run


def _repeated_column(field: Any) -> Column:
    """A column of lists: all of their items are one column."""
    convert_items = _each(_convert_one(field), _exact(field))

    def run(values: list[Any], walk: Walk) -> list[Any]:
        if set(map(type, values)) != {list}:
            raise _UnusualError
        items = list(chain.from_iterable(values))
        walk.stack.append(0)
        converted = convert_items(items, walk)
        walk.stack.pop()
        if converted is items:
            return values
        rest = iter(converted)
        return [list(islice(rest, len(value))) for value in values]

    return run


def _single(plan: Convert, value: Any, walk: Walk) -> Any:
    """One value, with all that is below it by columns if that is how this walk goes."""
    return plan.column([value], walk)[0] if walk.columns and isinstance(plan, _Message) else plan(value, walk)


def _null_item(field: Any) -> Any:
    """What null in a list means: the default of an item."""
    if field.message_type is not None:
        return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE) if field.message_type.full_name == "google.protobuf.Value" else {}
    return {FieldDescriptor.TYPE_STRING: "", FieldDescriptor.TYPE_BYTES: b"", FieldDescriptor.TYPE_BOOL: False}.get(field.type, 0)


def _map(entry: Any) -> Convert:
    key_type = entry.fields_by_name["key"].type
    value_field = entry.fields_by_name["value"]
    convert = _convert_one(value_field)
    cls = messages.class_of(value_field.message_type) if value_field.message_type is not None else None

    def run(value: Any, walk: Walk) -> dict[Any, Any]:
        if value.__class__ is not dict:
            walk.report(f"expected a mapping, got {show(value)}")
            return {}
        result = {}
        for key, item in value.items():
            walk.stack.append(f'["{key}"]')
            converted_key = key if key_type == FieldDescriptor.TYPE_STRING else SCALARS[key_type](key, walk)
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


# -- well-known types


def _wrapper(descriptor: Any) -> Convert:
    field = descriptor.fields_by_name["value"]
    convert = _convert_one(field)
    exact = _exact(field)
    message = _Message(descriptor)

    def run(value: Any, walk: Walk) -> Any:
        if value.__class__ is exact:
            return {"value": value}
        if value.__class__ is dict:  # protobuf's lenient mode takes it as the message that it is, too
            return message(value, walk)
        return {"value": convert(value, walk)}

    return run


@cache
def _duration_message() -> _Message:
    return _Message(duration_pb2.Duration.DESCRIPTOR)


def _duration(value: Any, walk: Walk) -> Any:
    if value.__class__ is dict:  # as a wrapper
        parts = _duration_message()(value, walk)
        if walk.problems:
            return {}
        seconds, nanos = parts.get("seconds", 0), parts.get("nanos", 0)
        if abs(seconds) > _MAX_DURATION or abs(nanos) > 999_999_999 or seconds * nanos < 0:
            walk.report(f"out of range: at most {_MAX_DURATION}s, with less than a second of nanoseconds and of the same sign")
        return parts
    found = _DURATION.fullmatch(value) if value.__class__ is str else None
    if found is None:
        walk.report(f'expected a duration in seconds, such as "0.25s", got {show(value)}')
        return {}
    sign = -1 if found[1] else 1
    seconds = int(found[2])
    if seconds > _MAX_DURATION:
        walk.report(f"{show(value)} is out of range: at most {_MAX_DURATION}s")
        return {}
    return {"seconds": sign * seconds, "nanos": sign * int((found[3] or "").ljust(9, "0"))}


def _timestamp(value: Any, walk: Walk) -> timestamp_pb2.Timestamp:
    result = timestamp_pb2.Timestamp()
    try:
        result.FromJsonString(value)
    except (ValueError, TypeError, AttributeError, OverflowError):
        walk.report(f'expected a time such as "2030-01-01T00:00:00Z", got {show(value)}')
    return result


def _field_mask(value: Any, walk: Walk) -> dict[str, list[str]]:
    if value.__class__ is not str:
        walk.report(f"expected field names separated by commas, got {show(value)}")
        return {}
    return {"paths": [re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", path) for path in value.split(",") if path]}


def _struct(value: Any, walk: Walk) -> struct_pb2.Struct:
    if value.__class__ is not dict:
        walk.report(f"expected a mapping, got {show(value)}")
        return struct_pb2.Struct()
    fields = {}
    for key, item in value.items():
        walk.stack.append(f'["{key}"]')
        fields[key] = _value(item, walk)
        walk.stack.pop()
    return struct_pb2.Struct(fields=fields)


def _value(value: Any, walk: Walk) -> struct_pb2.Value:
    kind = value.__class__
    if kind is str:
        return struct_pb2.Value(string_value=value)
    if kind is bool:
        return struct_pb2.Value(bool_value=value)
    if kind is int or kind is float:
        return struct_pb2.Value(number_value=SCALARS[FieldDescriptor.TYPE_DOUBLE](value, walk))
    if value is None:
        return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
    if walk.too_deep():
        return struct_pb2.Value()
    return struct_pb2.Value(struct_value=_struct(value, walk)) if kind is dict else struct_pb2.Value(list_value=_list_value(value, walk))


def _list_value(value: Any, walk: Walk) -> struct_pb2.ListValue:
    if value.__class__ is not list:
        walk.report(f"expected a list, got {show(value)}")
        return struct_pb2.ListValue()
    values = []
    for i, item in enumerate(value):
        walk.stack.append(i)
        values.append(_value(item, walk))
        walk.stack.pop()
    return struct_pb2.ListValue(values=values)


def _any(value: Any, walk: Walk) -> Any:
    if value.__class__ is not dict:
        walk.report(f'expected a mapping with "@type" and the fields of that type, got {show(value)}')
        return {}
    if not value:
        return {}
    type_url = value.get("@type")
    if type_url.__class__ is not str:
        walk.report('"@type" is missing' if type_url is None else f'"@type" must be a string, not {show(type_url)}')
        return {}
    host, slash, name = type_url.rpartition("/")
    if not slash or not host:
        walk.report(f'"@type" must look like type.googleapis.com/package.Message, not {show(type_url)}')
        return {}
    cls = messages.message_class(name)
    if cls is None:
        walk.report(f"unknown type {show(type_url)}")
        return {}
    rest = {key: item for key, item in value.items() if key != "@type"}
    plan = _plan(cls.DESCRIPTOR)
    if not isinstance(plan, _Message):  # a type with a JSON form of its own
        if set(rest) - {"value"}:
            walk.report(f'{name} has only the field "value" here')
            return {}
        rest = rest.get("value", {})
    before = len(walk.problems)
    arguments = _single(plan, rest, walk)
    if any(problem.kind != UNKNOWN for problem in walk.problems[before:]):
        return {}
    message = cls(**arguments) if arguments.__class__ is dict else arguments
    return any_pb2.Any(type_url=type_url, value=message.SerializeToString(deterministic=True))


_SPECIAL: dict[str, Convert] = {
    "google.protobuf.Any": _any,
    "google.protobuf.Duration": _duration,
    "google.protobuf.FieldMask": _field_mask,
    "google.protobuf.ListValue": _list_value,
    "google.protobuf.Struct": _struct,
    "google.protobuf.Timestamp": _timestamp,
    "google.protobuf.Value": _value,
}
