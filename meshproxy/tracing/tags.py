"""Custom tags of spans, compiled to functions of a stream.

Source: envoy.type.tracing.v3.CustomTag. A tag without a value is not set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.observe import stream_values
from meshproxy.observe.format import Compiler

if TYPE_CHECKING:
    from meshproxy.observe.stream_info import StreamInfo

Tag = Callable[["StreamInfo"], bytes]  # b"" where there is no value


def compile_tags(protos: Iterable[Any]) -> dict[str, Tag]:
    """Tags by name; of two that have the same the last one counts. Raises ConfigError relative to the list."""
    tags = {}
    for position, proto in enumerate(protos):
        with errors.under(f"[{position}]"):
            tags[proto.tag] = _compile(proto)
    return tags


def _compile(proto: Any) -> Tag:
    which = proto.WhichOneof("type")
    if which == "literal":
        return _constant(proto.literal.value)
    if which == "environment":
        return _constant(os.environ.get(proto.environment.name, proto.environment.default_value))
    if which == "request_header":
        return _header(proto.request_header.name.lower().encode(), proto.request_header.default_value.encode())
    if which == "metadata":
        return _metadata(proto.metadata)
    if which == "value":
        with errors.under("value"):
            made = Compiler().text(proto.value, omit_empty=True)
        return made if callable(made) else _constant(made.decode())
    raise errors.ConfigError.at("type", "value is required")


def _constant(value: str) -> Tag:
    encoded = value.encode("utf-8", "surrogateescape")
    return lambda stream: encoded


def _header(name: bytes, default: bytes) -> Tag:
    def tag(stream: StreamInfo) -> bytes:
        request = stream.request
        value = None if request is None else request.get(name)
        return default if value is None else value

    return tag


def _metadata(proto: Any) -> Tag:
    default = proto.default_value.encode()
    namespace = proto.metadata_key.key
    path = tuple(segment.key for segment in proto.metadata_key.path)
    kind = proto.kind.WhichOneof("kind")
    if kind is None:
        errors.fail("metadata.kind", "value is required")

    def tag(stream: StreamInfo) -> bytes:
        if kind == "request":
            found = stream_values.dynamic_metadata(stream, namespace)
        else:
            found = stream_values.metadata_of(getattr(stream, kind), namespace)
        value = stream_values.dig(found, path)
        return default if value is None else _text(value)

    return tag


def _text(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int | float):
        return f"{value:.17g}".encode() if value != int(value) else b"%d" % value
    return json.dumps(_whole(value), separators=(",", ":"), ensure_ascii=False).encode()


def _whole(value: Any) -> Any:
    """Numbers of metadata are floating-point numbers; those that are whole are written so."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
