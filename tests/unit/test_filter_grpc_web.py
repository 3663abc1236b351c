"""The grpc_web filter; tests/differential/test_grpc_web.py compares it with Envoy's."""

from __future__ import annotations

import base64
import itertools
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec import grpc
from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.http.filter_chain import HOLD
from meshproxy.http.filters import grpc_web
from meshproxy.http.replies import Reply
from meshproxy.observe.stats import Scope
from tests.unit.filter_help import Stream, context, counters, proto
from tests.unit.stream_help import make as make_stream

TEXT = (b"content-type", b"application/grpc-web-text")
ACCEPTS_TEXT = (b"accept", b"application/grpc-web-text")
WEB = (b"content-type", b"application/grpc-web+proto")
GRPC = (b"content-type", b"application/grpc")


def make() -> tuple[grpc_web.GrpcWeb, Any]:
    clusters: dict[str, Any] = {}
    ctx = context(clusters=clusters)
    clusters["up"] = SimpleNamespace(stats=SimpleNamespace(scope=Scope(ctx.context.stats, "cluster.up.")))
    return grpc_web.compile(proto("envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"), ctx), ctx


def test_sample_configuration() -> None:
    filter_, ctx = make()
    stream, codec, forwarding = make_stream(filter_, items=[WEB, (b"content-length", b"6")])
    stream.go(False)
    stream.on_data(grpc.frame(b"x"), True)
    stream.send_headers(ResponseHead(200, [GRPC]), False)
    stream.send_data(grpc.frame(b"y"), False)
    stream.send_trailers(Headers([(b"grpc-status", b"0"), (b"x", b"1")]))
    assert forwarding.out == [
        ("head", [GRPC, (b"te", b"trailers"), (b"grpc-accept-encoding", b"identity")], False),
        ("data", grpc.frame(b"x"), True),
    ]
    assert codec.out == [
        ("head", 200, [WEB], False),
        ("data", grpc.frame(b"y"), False),
        ("data", grpc.frame(b"grpc-status:0\r\nx:1\r\n", 0x80), False),
        ("data", b"", True),
        ("done",),
    ]
    assert counters(ctx) == {f"cluster.up.grpc-web.s.m.{name}": 1 for name in ("0", "success", "total")}


def test_local_replies_become_statuses() -> None:
    filter_, _ = make()
    stream, codec, _ = make_stream(filter_, items=[WEB])
    stream.go(True)
    stream.local_reply(Reply(503, b"50 % off", details="why"))
    items = [WEB, (b"grpc-message", b"50 %25 off"), (b"grpc-status", b"14"), (b"content-length", b"0")]
    assert codec.out == [("head", 503, items, False), ("data", b"", True), ("done",)]


def test_a_text_response_that_ends_without_trailers_ends() -> None:
    filter_, _ = make()
    stream, codec, _ = make_stream(filter_, items=[TEXT, ACCEPTS_TEXT])
    stream.go(True)
    stream.send_headers(ResponseHead(200, [GRPC]), False)
    stream.send_data(b"\0\0", False)
    stream.send_data(b"\0\0\0\0", True)
    assert [part[0] for part in codec.out] == ["head", "data", "done"]
    assert codec.out[1][1:] == (base64.b64encode(grpc.frame(b"")), True)


def test_nothing_more_after_broken_framing() -> None:
    filter_, _ = make()
    stream, codec, _ = make_stream(filter_, items=[TEXT, ACCEPTS_TEXT])
    stream.go(True)
    stream.send_headers(ResponseHead(200, [GRPC]), False)
    stream.send_data(b"\x40\0\0\0\0", True)
    assert codec.out[1:] == [("data", b"", True), ("done",)]


def test_a_reset_while_the_head_is_kept() -> None:
    filter_, _ = make()
    stream, codec, forwarding = make_stream(filter_, items=[WEB])
    stream.go(True)
    stream.send_headers(ResponseHead(500, []), False)
    stream.send_data(b"x" * 100_000, False)
    assert len(stream.locals[filter_].message) == 16384
    stream.on_reset(0, "gone")
    assert codec.out == [("done",)]
    assert forwarding.done


@given(st.lists(st.binary(max_size=9), max_size=4), st.lists(st.integers(0, 60), max_size=5))
def test_any_split_of_a_response_is_the_same_text(messages: list[bytes], cuts: list[int]) -> None:
    frames = [grpc.frame(message, len(message) % 2) for message in messages]
    data = b"".join(frames)
    encoder = grpc_web.TextEncoder()
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    assert b"".join(encoder.feed(data[start:end]) for start, end in itertools.pairwise(edges)) == b"".join(map(base64.b64encode, frames))


def test_long_messages_do_not_wait_for_their_end() -> None:
    encoder = grpc_web.TextEncoder()
    frame = grpc.frame(bytes(range(256)) * 2000)
    text = b""
    for start in range(0, len(frame), 1000):
        text += encoder.feed(frame[start : start + 1000])
        assert len(encoder._buffer) < 70_000
    assert text == base64.b64encode(frame)


def decode(body: bytes, cuts: list[int]) -> tuple[bytes, Reply | None]:
    """What a body as text comes to, in pieces."""
    filter_, _ = make()
    stream = Stream(b"/s/m", [TEXT])
    filter_.request_headers(stream, False)
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    out = b""
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        result = filter_.request_data(stream, body[start:end], number == len(edges) - 2)
        if isinstance(result, Reply):
            return out, result
        if result is not HOLD:
            out += result or b""
    return out, None


@given(st.binary(max_size=40), st.lists(st.integers(0, 60), max_size=5))
def test_any_split_of_text(data: bytes, cuts: list[int]) -> None:
    assert decode(base64.b64encode(data), cuts) == (data, None)


@given(st.binary(max_size=24), st.lists(st.integers(0, 24), max_size=4))
def test_any_bytes_are_text_or_refused(data: bytes, cuts: list[int]) -> None:
    out, reply = decode(data, cuts)
    assert reply is None or reply.status == 400
    assert reply is not None or base64.b64encode(out).rstrip(b"=") == data.rstrip(b"=") or b"=" in data[:-2]
