"""The grpc_http1_reverse_bridge filter; tests/differential/test_grpc_reverse_bridge.py compares it with Envoy's."""

from __future__ import annotations

from typing import Any

from meshproxy.codec import grpc
from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.http.filters import grpc_http1_reverse_bridge as bridge
from meshproxy.http.replies import Reply
from tests.unit.filter_help import context, counters, proto
from tests.unit.stream_help import make as make_stream

V3 = "envoy.extensions.filters.http.grpc_http1_reverse_bridge.v3."
GRPC = (b"content-type", b"application/grpc+proto")
PROTOBUF = (b"content-type", b"application/x-protobuf")
TRAILERS = [(b"grpc-status", b"0")]


def make(text: str = "withhold_grpc_frames: true", **more: Any) -> tuple[Any, Any, Any, Any]:
    ctx = context()
    filter_ = bridge.compile(proto(f"{V3}FilterConfig", f"{{content_type: application/x-protobuf, {text}}}"), ctx)
    stream, codec, forwarding = make_stream(filter_, items=[GRPC, (b"content-length", b"8")], **more)
    stream.clear_route_cache = lambda: None
    stream.go(False)
    stream.on_data(grpc.frame(b"abc"), True)
    return stream, codec, forwarding, ctx


def test_sample_configuration() -> None:
    stream, codec, forwarding, _ = make()
    assert forwarding.out == [("head", [PROTOBUF, (b"content-length", b"3"), (b"accept", b"application/x-protobuf")], False), ("data", b"abc", True)]
    stream.send_headers(ResponseHead(200, [PROTOBUF, (b"content-length", b"4")]), False)
    stream.send_data(b"", False)
    stream.send_data(b"de", False)
    stream.send_data(b"fg", True)
    assert codec.out == [
        ("head", 200, [GRPC, (b"content-length", b"9")], False),
        ("data", grpc.frame(b"defg")[:5], False),
        ("data", b"de", False),
        ("data", b"fg", False),
        ("trailers", TRAILERS),
        ("done",),
    ]


def test_frames_can_stay() -> None:
    stream, codec, forwarding, _ = make("withhold_grpc_frames: false")
    assert forwarding.out[1] == ("data", grpc.frame(b"abc"), True)
    stream.send_headers(ResponseHead(404, [PROTOBUF]), False)
    stream.send_data(b"x", True)
    assert codec.out == [("head", 200, [GRPC], False), ("data", b"x", False), ("trailers", [(b"grpc-status", b"12")]), ("done",)]


def test_a_response_of_unknown_length_waits_for_its_end() -> None:
    for trailers in (False, True):
        stream, codec, _, _ = make()
        stream.send_headers(ResponseHead(200, [PROTOBUF]), False)
        stream.send_data(b"de", False)
        stream.send_data(b"fg", not trailers)
        if trailers:
            stream.send_trailers(Headers([(b"grpc-status", b"5")]))
        assert codec.out == [("head", 200, [GRPC], False), ("data", grpc.frame(b"defg"), False), ("trailers", TRAILERS), ("done",)]


def test_and_may_not_be_too_large() -> None:
    stream, codec, forwarding, ctx = make(buffer_limit=3)
    stream.send_headers(ResponseHead(200, [PROTOBUF]), False)
    stream.send_data(b"defg", False)
    assert codec.out[1:] == [("reset",), ("done",)]
    assert forwarding.done
    assert counters(ctx) == {"http.ing.rs_too_large": 1}


def test_a_wrong_size_resets() -> None:
    stream, codec, _, _ = make("withhold_grpc_frames: true, response_size_header: X-Size")
    stream.send_headers(ResponseHead(200, [PROTOBUF, (b"x-size", b"5, 6")]), False)
    stream.send_data(b"defg", True)
    assert codec.out == [("head", 200, [GRPC, (b"x-size", b"5, 6"), (b"content-length", b"10")], False), ("reset",), ("done",)]
    assert stream.details == "grpc_bridge_content_length_wrong"


def test_local_replies_are_of_the_wrong_type_too() -> None:
    stream, codec, _, _ = make()
    stream.local_reply(Reply(503, b"gone", details="why"))
    text = b"envoy reverse bridge: upstream responded with unsupported content-type application/grpc, status code 200"
    assert codec.out == [("head", 200, [(b"content-type", b"application/grpc"), (b"grpc-status", b"2"), (b"grpc-message", text)], True), ("done",)]


def test_a_reset_while_it_waits() -> None:
    stream, codec, forwarding, _ = make()
    stream.send_headers(ResponseHead(200, [PROTOBUF]), False)
    stream.send_data(b"de", False)
    stream.on_reset(0, "gone")
    assert codec.out == [("head", 200, [GRPC], False), ("done",)]
    assert forwarding.done


def test_routes() -> None:
    ctx = context()
    base = bridge.compile(proto(f"{V3}FilterConfig", "{content_type: x}"), ctx)
    assert bridge.specialise(base, [proto(f"{V3}FilterConfigPerRoute", "{disabled: true}")], ctx) is None
    assert bridge.specialise(base, [proto(f"{V3}FilterConfigPerRoute")], ctx) is base
