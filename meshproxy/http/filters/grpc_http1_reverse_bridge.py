"""Lets gRPC clients call services that know HTTP but not gRPC (envoy.extensions.filters.http.grpc_http1_reverse_bridge.v3.FilterConfig).

A request goes upstream with another content type; the response gets the client's back, status 200, and its own status as `grpc-status` in trailers.
`withhold_grpc_frames`: the service sees, and sends, one message without gRPC's prefix. The prefix needs the response's length: from `response_size_header`,
from its content-length, or from its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api.matchers import parse_int64
from meshproxy.codec import grpc
from meshproxy.codec.headers import Headers
from meshproxy.http.filter_chain import HOLD
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from envoy.extensions.filters.http.grpc_http1_reverse_bridge.v3.config_pb2 import FilterConfig, FilterConfigPerRoute

    from meshproxy.codec.headers import ResponseHead
    from meshproxy.http.filters import FilterContext

_V3 = "envoy.extensions.filters.http.grpc_http1_reverse_bridge.v3."
TYPE_URL = f"type.googleapis.com/{_V3}FilterConfig"
ROUTE_TYPE_URLS = (f"type.googleapis.com/{_V3}FilterConfigPerRoute",)
HONOURS = {_V3 + "FilterConfig": "content_type withhold_grpc_frames response_size_header", _V3 + "FilterConfigPerRoute": "disabled"}

_PREFIX = "envoy reverse bridge: upstream "
_TOO_SMALL = Reply(200, b"invalid request body", details="grpc_bridge_data_too_small", grpc_status=grpc.UNKNOWN, early=True)
_NO_LENGTH = Reply(200, f"{_PREFIX}did not set content length".encode(), details="grpc_bridge_content_length_missing", grpc_status=grpc.INTERNAL)
_WRONG_LENGTH = Reply(200, f"{_PREFIX}set incorrect content length".encode(), details="grpc_bridge_content_length_wrong", grpc_status=grpc.INTERNAL)
_TOO_LARGE = Reply(500, b"Internal Server Error", details="response_payload_too_large")


class _State:
    """One request."""

    __slots__ = ("begun", "body", "content_type", "empty", "length", "received", "status", "stripped")

    def __init__(self, content_type: bytes) -> None:
        self.content_type = content_type  # the client's
        self.stripped = False  # the request's prefix is gone
        self.status = grpc.OK
        self.empty = False  # the response is all head
        self.length: int | None = None  # of the response's message, where it is known before its end
        self.begun = False  # some of the response's body has come
        self.received = 0  # bytes of it
        self.body = bytearray()  # that wait for its end


class GrpcHttp1ReverseBridge:
    """The filter."""

    __slots__ = ("_content_type", "_scope", "_size_header", "_withholds", "name")

    def __init__(self, proto: FilterConfig, context: FilterContext) -> None:
        self._content_type = proto.content_type.encode()
        self._withholds = proto.withhold_grpc_frames
        self._size_header = proto.response_size_header.lower().encode()
        self._scope = context.scope

    def request_headers(self, stream: Any, end_stream: bool) -> None:
        head = stream.request
        content_type = head.get(b"content-type")
        if end_stream or not grpc.is_content_type(content_type):
            return
        stream.locals[self] = _State(content_type)
        stream.replies_grpc = True
        head.set(b"content-type", self._content_type)
        head.set(b"accept", self._content_type)
        if self._withholds:
            _adjust_length(head, -grpc.PREFIX)
        stream.clear_route_cache()

    def request_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes | Reply | None:
        state = stream.locals.get(self)
        if state is None or state.stripped or not self._withholds:
            return None
        if len(data) < grpc.PREFIX:
            return _TOO_SMALL
        state.stripped = True
        return data[grpc.PREFIX :]

    def response_headers(self, stream: Any, end_stream: bool) -> Any:
        state = stream.locals.get(self)
        if state is None:
            return None
        head = stream.response
        content_type = head.get(b"content-type")
        if content_type != self._content_type:
            return _wrong_type(content_type, head.status)
        head.set(b"content-type", state.content_type)
        if self._withholds:
            if self._size_header:
                state.length = _unsigned((head.get(self._size_header) or b"").partition(b",")[0])
                if state.length is None:
                    return _NO_LENGTH
                head.set(b"content-length", b"%d" % (state.length + grpc.PREFIX))
            else:
                state.length = _unsigned(head.get(b"content-length") or b"") or None
                _adjust_length(head, grpc.PREFIX)
        state.status = grpc.OK if head.status == 200 else grpc.status_of_http(head.status)
        head.status = 200
        if not (end_stream and self._withholds):
            return None
        state.empty = True
        return HOLD

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> Any:
        state = stream.locals.get(self)
        if state is None:
            return None
        if state.empty:
            stream.response.set(b"content-length", b"%d" % grpc.PREFIX)
            stream.release_headers()
            self._add_status(stream, state)
            return grpc.frame(b"")
        first, state.begun = not state.begun, True
        state.received += len(data)
        if self._withholds:
            if state.length is None:
                state.body += data
                if not end_stream:
                    return self._wait(stream, state)
                data = grpc.frame(bytes(state.body))
            elif first:
                data = b"\0" + (state.length & 0xFFFFFFFF).to_bytes(4, "big") + data
            if end_stream and self._size_header and state.received != state.length:
                return _WRONG_LENGTH
        if end_stream:
            self._add_status(stream, state)
        return data

    def _wait(self, stream: Any, state: _State) -> Any:
        if len(state.body) <= stream.manager.buffer_limit:
            return HOLD
        self._scope.counter("rs_too_large").n += 1
        return _TOO_LARGE

    @staticmethod
    def _add_status(stream: Any, state: _State) -> None:
        stream.response_trailers = Headers([(b"grpc-status", b"%d" % state.status)])

    def response_trailers(self, stream: Any, trailers: Headers) -> bytes | None:
        state = stream.locals.get(self)
        if state is None:
            return None
        trailers.set(b"grpc-status", b"%d" % state.status)
        return grpc.frame(bytes(state.body)) if self._withholds and state.length is None else None


def compile(proto: FilterConfig, context: FilterContext) -> GrpcHttp1ReverseBridge:
    """The filter for a FilterConfig."""
    return GrpcHttp1ReverseBridge(proto, context)


def specialise(base: GrpcHttp1ReverseBridge | None, overrides: list[FilterConfigPerRoute], context: FilterContext) -> GrpcHttp1ReverseBridge | None:
    """The filter for a route: there, or not."""
    return None if overrides[-1].disabled else base


def _wrong_type(content_type: bytes | None, status: int) -> Reply:
    what = "no content-type header" if content_type is None else f"unsupported content-type {content_type.decode('latin-1')}"
    text = f"{_PREFIX}responded with {what}, status code {status}"
    return Reply(200, text.encode("latin-1"), details="grpc_bridge_content_type_wrong", grpc_status=grpc.UNKNOWN)


def _adjust_length(head: Headers | ResponseHead, by: int) -> None:
    length = _unsigned(head.get(b"content-length") or b"")
    if length:
        head.set(b"content-length", b"%d" % max(0, length + by))


def _unsigned(text: bytes) -> int | None:
    number = parse_int64(text)
    return number if number is not None and number >= 0 else None
