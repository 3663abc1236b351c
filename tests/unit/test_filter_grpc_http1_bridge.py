"""The grpc_http1_bridge filter; tests/differential/test_grpc_bridge.py compares it with Envoy's."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.codec import grpc
from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.http.filters import grpc_http1_bridge
from meshproxy.http.replies import Reply
from tests.unit.filter_help import context, counters, proto
from tests.unit.stream_help import make as make_stream

CONFIG = "envoy.extensions.filters.http.grpc_http1_bridge.v3.Config"
GRPC = (b"content-type", b"application/grpc")
PROTOBUF = (b"content-type", b"application/x-protobuf")
TRAILERS = [(b"grpc-status", b"7"), (b"grpc-message", b"no")]


def make(*items: tuple[bytes, bytes], text: str = "{upgrade_protobuf_to_grpc: true}", **more: Any) -> tuple[Any, Any, Any, Any]:
    ctx = context()
    stream, codec, forwarding = make_stream(grpc_http1_bridge.compile(proto(CONFIG, text), ctx), items=list(items), **more)
    stream.clear_route_cache = lambda: None
    return stream, codec, forwarding, ctx


def respond(stream: Any, *pieces: bytes, trailers: list[tuple[bytes, bytes]] | None, head: ResponseHead | None = None) -> None:
    stream.send_headers(head or ResponseHead(200, [GRPC]), False)
    for position, piece in enumerate(pieces):
        stream.send_data(piece, trailers is None and position == len(pieces) - 1)
    if trailers is not None:
        stream.send_trailers(Headers(trailers))


def test_sample_configuration() -> None:
    stream, codec, _, _ = make(GRPC)
    stream.go(True)
    respond(stream, grpc.frame(b"abc"), grpc.frame(b""), trailers=TRAILERS)
    head = ("head", 503, [GRPC, *TRAILERS, (b"content-length", b"13")], False)
    assert codec.out == [head, ("data", grpc.frame(b"abc") + grpc.frame(b""), False), ("trailers", TRAILERS), ("done",)]
    assert stream.status == 503


def test_a_message_each_way() -> None:
    stream, codec, forwarding, _ = make(PROTOBUF, (b"content-length", b"3"))
    stream.go(False)
    for piece, last in ((b"a", False), (b"bc", True)):
        stream.on_data(piece, last)
    assert forwarding.out == [("head", [GRPC], False), ("data", grpc.frame(b"abc"), True)]
    respond(stream, b"\0\0", b"\0\0\2d", b"e", trailers=[(b"grpc-status", b"0")])
    assert codec.out[:2] == [("head", 200, [GRPC, (b"grpc-status", b"0"), (b"content-length", b"2")], False), ("data", b"de", False)]


def test_request_trailers_end_a_message() -> None:
    stream, _, forwarding, _ = make(PROTOBUF)
    stream.go(False)
    stream.on_data(b"abc", False)
    stream.on_trailers(Headers([(b"x", b"1")]))
    assert forwarding.out[1:] == [("data", grpc.frame(b"abc"), False), ("trailers", [(b"x", b"1")])]


@pytest.mark.parametrize(
    ("head", "body", "length"),
    [
        (ResponseHead(503, [(b"content-length", b"10")]), b"busy today", b"10"),
        (ResponseHead(200, [GRPC, (b"content-length", b"8")]), grpc.frame(b"abc"), b"3"),
    ],
)
def test_responses_without_trailers_keep_what_is_no_prefix(head: ResponseHead, body: bytes, length: bytes) -> None:
    stream, codec, _, _ = make(PROTOBUF)
    stream.go(True)
    respond(stream, body, trailers=None, head=head)
    assert dict(codec.out[0][2])[b"content-length"] == length
    assert codec.out[1] == ("data", body[-int(length) :], True)


def test_too_large() -> None:
    stream, codec, forwarding, ctx = make(PROTOBUF, buffer_limit=4)
    stream.go(False)
    stream.on_data(b"abcde", False)
    assert codec.out[0][1] == 413
    assert forwarding.done
    stream, codec, forwarding, ctx = make(GRPC, buffer_limit=4)
    stream.go(True)
    respond(stream, b"abc", b"de", b"f", trailers=TRAILERS)
    assert codec.out == [("head", 200, [GRPC, (b"grpc-status", b"2"), (b"grpc-message", b"Internal Server Error")], True), ("done",)]
    assert counters(ctx) == {"http.ing.rs_too_large": 1}


def test_local_replies_of_upgraded_requests_are_plain() -> None:
    stream, codec, _, _ = make(PROTOBUF)
    stream.go(True)
    stream.local_reply(Reply(503, b"gone", details="why"))
    assert codec.out == [("head", 503, [(b"content-length", b"4"), (b"content-type", b"text/plain")], False), ("data", b"gone", True), ("done",)]


def test_http2_needs_no_bridge() -> None:
    stream, codec, _, _ = make(GRPC)
    stream.request.version = 20
    stream.go(True)
    respond(stream, grpc.frame(b"abc"), trailers=TRAILERS)
    assert codec.out == [("head", 200, [GRPC], False), ("data", grpc.frame(b"abc"), False), ("trailers", TRAILERS), ("done",)]


def test_a_reset_drops_what_is_kept() -> None:
    stream, codec, forwarding, _ = make(GRPC)
    stream.go(True)
    stream.send_headers(ResponseHead(200, [GRPC]), False)
    stream.send_data(b"abc", False)
    stream.on_reset(0, "gone")
    assert codec.out == [("done",)]
    assert forwarding.done
