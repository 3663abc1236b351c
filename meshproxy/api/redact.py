"""Removes secrets from a message before it is shown: fields that the API marks as sensitive, with everything inside them, also within Any.

As in Envoy, a sensitive string becomes "[redacted]" (so that one sees that it was set), bytes likewise, and other values are cleared.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from udpa.annotations import sensitive_pb2

from meshproxy.api import messages

REDACTED = "[redacted]"
_MAX_DEPTH = 200  # protobuf itself refuses deeper messages when it parses


def redact(message: Any, *, sensitive: bool = False, depth: int = 0) -> None:
    """Redact `message` in place; with `sensitive`, everything in it."""
    if depth > _MAX_DEPTH:
        message.Clear()
        return
    if isinstance(message, any_pb2.Any):
        _redact_any(message, sensitive, depth)
        return
    if isinstance(message, struct_pb2.Struct) and not sensitive:
        return  # plain JSON carries no annotations
    for field, value in message.ListFields():
        secret = sensitive or field.GetOptions().Extensions[sensitive_pb2.sensitive]
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            _redact_messages(message, field, value, secret, depth)
        elif secret:
            _redact_scalar(message, field, value)


def _redact_messages(message: Any, field: Any, value: Any, secret: bool, depth: int) -> None:
    entry = field.message_type.GetOptions().map_entry
    if entry and field.message_type.fields_by_name["value"].type != FieldDescriptor.TYPE_MESSAGE:
        if secret:
            for key in list(value):
                value[key] = _hidden(value[key])
        return
    for inner in value.values() if entry else value if field.is_repeated else (value,):
        redact(inner, sensitive=secret, depth=depth + 1)


def _redact_scalar(message: Any, field: Any, value: Any) -> None:
    if field.is_repeated:
        hidden = [_hidden(item) for item in value]
        message.ClearField(field.name)
        if hidden and hidden[0]:
            getattr(message, field.name).extend(hidden)
    elif isinstance(value, (str, bytes)):
        setattr(message, field.name, _hidden(value))
    else:
        message.ClearField(field.name)


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return REDACTED
    return REDACTED.encode() if isinstance(value, bytes) else type(value)()


def _redact_any(message: any_pb2.Any, sensitive: bool, depth: int) -> None:
    try:
        inner = messages.known(message.TypeName())()
        inner.ParseFromString(message.value)
    except (LookupError, ValueError):  # a type that we do not know: nothing of it may be shown if it was meant to be secret
        if sensitive:
            message.Clear()
        return
    redact(inner, sensitive=sensitive, depth=depth + 1)
    message.value = inner.SerializeToString()
