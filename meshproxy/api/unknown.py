"""Fields of a binary message that no schema of ours knows: somebody speaks a newer version of the API, or another one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf import unknown_fields

from meshproxy.api import registry
from meshproxy.api.errors import ConfigError

_ANY = "google.protobuf.Any"


def find(message: Any) -> list[str]:
    """What is unknown in a message and in what it contains, through every Any: a text for each message with such fields, in Envoy's words."""
    found: list[str] = []
    _look(message, found, set())
    return found


def _look(message: Any, found: list[str], clean: set[bytes]) -> None:
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    # Nearly always there is nothing, and protobuf alone has looked at the message.
    if known.ByteSize() != message.ByteSize():
        found.extend(_describe(message))
    if not _may_hold_any(message.DESCRIPTOR) or b"/" not in message.SerializeToString():
        return  # what is in an Any is named by a URL
    for packed in _packed(message):
        serialised = packed.SerializeToString()
        if serialised in clean:
            continue
        before = len(found)
        try:
            _look(registry.unpack(packed), found, clean)
        except ConfigError:
            continue  # somebody else's to say
        if len(found) == before:
            clean.add(serialised)


def _describe(message: Any) -> Iterator[str]:
    unknown = unknown_fields.UnknownFieldSet(message)
    numbers = sorted({unknown[index].field_number for index in range(len(unknown))})
    if numbers:
        yield f"type {message.DESCRIPTOR.full_name} with unknown field set {{{', '.join(map(str, numbers))}}}"
    for below in _messages(message):
        yield from _describe(below)


def _messages(message: Any) -> Iterator[Any]:
    """The messages that the fields of a message hold."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                yield from value.values()
        elif field.is_repeated:
            yield from value
        else:
            yield value


def _packed(message: Any) -> Iterator[Any]:
    """Every Any in a message, but for those in an Any."""
    if message.DESCRIPTOR.full_name == _ANY:
        yield message
        return
    if _may_hold_any(message.DESCRIPTOR):
        for below in _messages(message):
            if _may_hold_any(below.DESCRIPTOR):
                yield from _packed(below)


@cache
def _may_hold_any(descriptor: Any) -> bool:
    """Whether a message of this type can have an Any somewhere in it."""
    seen: set[str] = set()
    todo = [descriptor]
    while todo:
        one = todo.pop()
        if one.full_name == _ANY:
            return True
        if one.full_name not in seen:
            seen.add(one.full_name)
            todo += [field.message_type for field in one.fields if field.message_type is not None]
    return False
