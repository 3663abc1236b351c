"""Trace contexts in headers: W3C (traceparent, tracestate) and B3 (one header or several). Pure functions of a head.

Ids are lower-case hexadecimal digits, as bytes. Sources: W3C Trace Context, openzipkin/b3-propagation; where those leave a choice, Envoy's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from meshproxy.codec.headers import Headers

TRACEPARENT, TRACESTATE = b"traceparent", b"tracestate"
B3, B3_TRACE, B3_SPAN, B3_PARENT, B3_SAMPLED = b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled"
NO_PARENT = b""

# Whatever the version says; a longer header of a later version is not understood.
_TRACEPARENT = re.compile(rb"[0-9a-fA-F]{2}-([0-9a-fA-F]{32})-([0-9a-fA-F]{16})-([0-9a-fA-F]{2})").fullmatch
_B3 = re.compile(rb"((?:[0-9a-fA-F]{16}){1,2})-([0-9a-fA-F]{16})(?:-([01d]))?(?:-([0-9a-fA-F]{16}))?").fullmatch
_ID = re.compile(rb"[0-9a-fA-F]{1,16}").fullmatch
_ZERO_TRACE, _ZERO = b"0" * 32, b"0" * 16


class Malformed(ValueError):
    """A head names a context, but what it says of it cannot be understood."""


class SpanContext(NamedTuple):
    """What a caller says of its span. `trace_id`: 32 digits, or 16 where the rest is zero; `parent_id`: of the caller's own parent, where B3 says it."""

    trace_id: bytes
    span_id: bytes
    sampled: bool
    state: bytes = b""  # tracestate
    parent_id: bytes = NO_PARENT


def extract_w3c(head: Headers) -> SpanContext | None:
    """The context of `traceparent`; None where there is none. Raises Malformed."""
    value = head.get(TRACEPARENT)
    if value is None:
        return None
    found = _TRACEPARENT(value)
    if found is None or found[1] == _ZERO_TRACE or found[2] == _ZERO:
        raise Malformed("traceparent")
    return SpanContext(found[1].lower(), found[2].lower(), bool(int(found[3], 16) & 1), head.joined(TRACESTATE) or b"")


def inject_w3c(head: Headers, trace_id: bytes, span_id: bytes, sampled: bool, state: bytes | None) -> None:
    """Say it, after all that is there. As Envoy, `tracestate` is there even where there is nothing in it; None leaves it as it is."""
    head.remove(TRACEPARENT)
    head.add(TRACEPARENT, b"00-%b-%b-0%d" % (trace_id if len(trace_id) == 32 else trace_id.rjust(32, b"0"), span_id, sampled))
    if state is not None:
        head.remove(TRACESTATE)
        head.add(TRACESTATE, state)


def b3_sampled(head: Headers, default: bool) -> bool:
    """Whether a head in B3's manner says that the trace is sampled; `default` where it does not say."""
    value = head.get(B3)
    if value is not None:
        parts = value.split(b"-")
        flag = value if len(value) == 1 else parts[2] if len(parts) >= 3 else b""
        return flag != b"0" if flag in (b"0", b"1", b"d") else default
    value = head.get(B3_SAMPLED)
    return default if value is None else value in (b"1", b"true")


def extract_b3(head: Headers, sampled: bool) -> SpanContext | None:
    """The context of `b3`, or of the `x-b3-` headers; None where none is named. `sampled`: as `b3_sampled` found. Raises Malformed."""
    value = head.get(B3)
    if value is not None:
        if value in (b"0", b"1", b"d"):
            return None  # a decision, and no context
        found = _B3(value)
        if found is None:
            raise Malformed("b3")
        return SpanContext(_shortened(found[1].lower()), found[2].lower(), sampled, b"", (found[4] or NO_PARENT).lower())
    trace, span = head.get(B3_TRACE), head.get(B3_SPAN)
    if trace is None or span is None:
        return None
    parent = head.get(B3_PARENT) or NO_PARENT
    low = trace[16:] if len(trace) == 32 else trace
    high = trace[:16] if len(trace) == 32 else b"0"
    if not (_ID(low) and _ID(high) and _ID(span) and (not parent or _ID(parent))):
        raise Malformed("x-b3-traceid, x-b3-spanid or x-b3-parentspanid")
    return SpanContext(
        _shortened(trace.lower()) if len(trace) == 32 else _sixteen(trace), _sixteen(span), sampled, b"", _sixteen(parent) if parent else NO_PARENT
    )


def inject_b3(head: Headers, trace_id: bytes, span_id: bytes, parent_id: bytes, sampled: bool, *, single: bool = False) -> None:
    """Say it, in several headers or in a single one, after all that is there."""
    flag = b"1" if sampled else b"0"
    if single:
        said = [(B3, b"-".join((trace_id, span_id, flag, parent_id) if parent_id else (trace_id, span_id, flag)))]
    else:
        said = [(B3_TRACE, trace_id), (B3_SPAN, span_id), *([(B3_PARENT, parent_id)] if parent_id else []), (B3_SAMPLED, flag)]
    for name, _ in said:
        head.remove(name)
    for name, value in said:
        head.add(name, value)


def _shortened(trace_id: bytes) -> bytes:
    """32 digits, or those 16 that say something."""
    return trace_id[16:] if trace_id.startswith(_ZERO) else trace_id


def _sixteen(digits: bytes) -> bytes:
    return digits.lower().rjust(16, b"0")
