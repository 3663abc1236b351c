"""Spans on the wire: opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest, written directly.

A span is some thirty short fields whose numbers and keys are always the same; to write them takes a third of the time that it takes to fill a message and
have it serialised, and workers need no message classes for it. Tests read what is written with the real ones.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from meshproxy.tracing.span import Span

_SERVER, _CLIENT = b"\x30\x02", b"\x30\x03"  # Span.kind
_TIMES = struct.Struct("<BQBQ").pack
_EVENT_TIME = struct.Struct("<BQ").pack
_ERROR = b"\x7a\x02\x18\x02"  # Span.status: STATUS_CODE_ERROR
# Span.flags: the sampled bit, and that it is known whether the parent is remote, and if so that it is.
_FLAGS = b"\x85\x01\x01\x01\x00\x00"
_FLAGS_REMOTE = b"\x85\x01\x01\x03\x00\x00"
_SIZES = [bytes((size,)) for size in range(128)]
# gRPC statuses that are a server's own fault; to a client, all but OK are failures.
_FAULTS = frozenset((b"2", b"4", b"12", b"13", b"14", b"15"))

_keys: dict[str, bytes] = {}  # KeyValue.key of the tags in use; as many as configurations name


def encode_span(span: Span, end: float) -> bytes:
    """A Span that ended at `end` (Unix time)."""
    parts = [b"\x0a\x10", bytes.fromhex(span.trace_id.decode()).rjust(16, b"\0"), b"\x12\x08", bytes.fromhex(span.id.decode())]
    if span.state:
        parts.append(_field(b"\x1a", _text(span.state)))
    if span.parent:
        parts += (b"\x22\x08", bytes.fromhex(span.parent.decode()))
    parts.append(_field(b"\x2a", _text(span.name)))
    parts.append(_CLIENT if span.client else _SERVER)
    parts.append(_TIMES(0x39, int(span.start * 1e9), 0x41, int(end * 1e9)))
    tags = span.tags
    for name, value in tags.items():
        parts.append(_attribute(name, value))
    for when, what in span.events:
        parts.append(_field(b"\x5a", _EVENT_TIME(0x09, int(when * 1e9)) + _field(b"\x12", what.encode())))
    if is_error(span):
        parts.append(_ERROR)
    parts.append(_FLAGS_REMOTE if span.remote else _FLAGS)
    return b"".join(parts)


def is_error(span: Span) -> bool:
    """Whether a span failed, by OpenTelemetry's conventions: what is a client's mistake is no error of a server."""
    status = span.tags.get("http.status_code", b"")
    if len(status) == 3 and status >= (b"400" if span.client else b"500"):
        return True
    status = span.tags.get("grpc.status_code", b"0")
    return status != b"0" if span.client else status in _FAULTS


def encode_resource(attributes: Mapping[str, str]) -> bytes:
    """What is common to all spans of a tracer: ResourceSpans.resource."""
    return _field(b"\x0a", b"".join(_field(b"\x0a", _pair(name, value.encode())) for name, value in attributes.items()))


def encode_scope(name: str, version: str) -> bytes:
    """ScopeSpans.scope."""
    return _field(b"\x0a", _field(b"\x0a", name.encode()) + _field(b"\x12", version.encode()))


def encode_request(resource: bytes, scope: bytes, spans: Iterable[bytes]) -> bytes:
    """An ExportTraceServiceRequest. `resource`, `scope`: from `encode_resource` and `encode_scope`; `spans`: from `encode_span`."""
    of_scope = scope + b"".join([_field(b"\x12", span) for span in spans])
    return _field(b"\x0a", resource + _field(b"\x12", of_scope))


def _attribute(name: str, value: bytes) -> bytes:
    return _field(b"\x4a", _pair(name, value))


def _pair(name: str, value: bytes) -> bytes:
    key = _keys.get(name)
    if key is None:
        key = _keys[name] = _field(b"\x0a", name.encode())
    return key + _field(b"\x12", _field(b"\x0a", _text(value)))


def _text(value: bytes) -> bytes:
    """A value as a string field may hold it: collectors throw a request away that has one that is no UTF-8."""
    if value.isascii():
        return value
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace").encode()
    return value


def _field(tag: bytes, data: bytes) -> bytes:
    """A length-delimited field."""
    size = len(data)
    if size < 128:
        return tag + _SIZES[size] + data
    prefix = bytearray(tag)
    while size > 127:
        prefix.append(size & 127 | 128)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + data
