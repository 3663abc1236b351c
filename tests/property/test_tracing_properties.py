"""Contexts of traces in headers: whatever a client sends is understood or refused, and what is understood says the same when it is passed on."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from meshproxy.codec.headers import RequestHead
from meshproxy.tracing import context, otlp
from meshproxy.tracing.span import Span

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
hex_digits = st.text("0123456789abcdefABCDEF", min_size=0, max_size=40).map(str.encode)
near = st.one_of(
    st.binary(max_size=80),
    st.lists(st.one_of(hex_digits, st.sampled_from([b"00", b"01", b"ff", TRACE.encode(), SPAN.encode(), b"1", b"0", b"d", b""])), max_size=6).map(b"-".join),
)
NAMES = (b"traceparent", b"tracestate", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags")
heads = st.lists(st.tuples(st.sampled_from(NAMES), near), max_size=8).map(lambda items: RequestHead(b"GET", b"/", b"a", items))


def is_hex(value: bytes, *sizes: int) -> bool:
    return len(value) in sizes and set(value) <= set(b"0123456789abcdef")


def parent(text: str) -> RequestHead:
    return RequestHead(b"GET", b"/", b"a", [(b"traceparent", text.encode())])


@given(heads)
@example(parent(f"00-{TRACE}-{SPAN}-01"))
@example(parent(f"00-{'0' * 32}-{SPAN}-01"))
@example(parent(f"00-{TRACE}-{SPAN}-01-"))
def test_w3c_contexts_are_understood_or_refused(head: RequestHead) -> None:
    try:
        found = context.extract_w3c(head)
    except context.Malformed:
        assert b"traceparent" in head
        return
    if found is None:
        assert b"traceparent" not in head
        return
    assert is_hex(found.trace_id, 32)
    assert is_hex(found.span_id, 16)
    assert int(found.trace_id, 16)
    assert int(found.span_id, 16)
    context.inject_w3c(head, found.trace_id, found.span_id, found.sampled, found.state)
    assert context.extract_w3c(head) == found
    assert len(head.get_all(b"traceparent")) == len(head.get_all(b"tracestate")) == 1


@given(heads, st.booleans())
def test_b3_contexts_are_understood_or_refused(head: RequestHead, default: bool) -> None:
    sampled = context.b3_sampled(head, default)
    try:
        found = context.extract_b3(head, sampled)
    except context.Malformed:
        assert b"b3" in head or b"x-b3-traceid" in head
        return
    if found is None:
        return
    assert is_hex(found.trace_id, 16, 32)
    assert is_hex(found.span_id, 16)
    assert is_hex(found.parent_id, 0, 16)
    head.remove(b"b3")
    context.inject_b3(head, found.trace_id, found.span_id, found.parent_id, found.sampled)
    assert context.b3_sampled(head, not sampled) == sampled
    assert context.extract_b3(head, sampled) == found


ids = st.integers(1, (1 << 64) - 1).map(lambda value: b"%016x" % value)
times = st.floats(1e9, 4e9)


names = st.binary(max_size=300)
tag_sets = st.dictionaries(st.text(min_size=1, max_size=140), st.binary(max_size=20_000), max_size=4)
event_lists = st.lists(st.tuples(times, st.text(max_size=9)), max_size=3)
trace_ids = st.integers(1, (1 << 128) - 1).map(lambda value: b"%032x" % value)


@given(trace_ids, ids, st.one_of(st.just(b""), ids), names, st.booleans(), st.booleans(), tag_sets, times, event_lists)
def test_spans_are_written_as_the_schema_says(trace_id, span_id, parent_id, name, client, remote, tags, start, events):
    span = Span(None, trace_id, span_id, name, start, client=client, sampled=True)
    span.parent, span.remote, span.tags, span.events = parent_id, remote, tags, events
    wire = otlp.encode_request(otlp.encode_resource({"service.name": "x" * 200}), otlp.encode_scope("us", "1"), [otlp.encode_span(span, start + 1)] * 2)
    request = trace_service_pb2.ExportTraceServiceRequest.FromString(wire)
    [of_resource] = request.resource_spans
    assert of_resource.resource.attributes[0].value.string_value == "x" * 200
    [of_scope] = of_resource.instrumentation_library_spans  # by now scope_spans, with the same number
    assert of_scope.instrumentation_library.name == "us"
    assert len(of_scope.spans) == 2
    read = of_scope.spans[1]
    assert (read.trace_id.hex(), read.span_id.hex(), read.parent_span_id.hex()) == (trace_id.decode(), span_id.decode(), parent_id.decode())
    assert read.name == name.decode("utf-8", "replace")
    assert read.kind == (3 if client else 2)
    assert {pair.key: pair.value.string_value for pair in read.attributes} == {key: value.decode("utf-8", "replace") for key, value in tags.items()}
    assert (read.start_time_unix_nano, read.end_time_unix_nano) == (int(start * 1e9), int((start + 1) * 1e9))
    assert [(event.time_unix_nano, event.name) for event in read.events] == [(int(when * 1e9), what) for when, what in events]
