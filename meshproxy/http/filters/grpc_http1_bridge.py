"""Lets HTTP/1.1 clients without trailers call gRPC services (envoy.extensions.filters.http.grpc_http1_bridge.v3.Config).

A response is kept until its trailers have come: a status other than 0 makes it a 503, and `grpc-status` and `grpc-message` go into its head.
`upgrade_protobuf_to_grpc`: a body of `application/x-protobuf` becomes a gRPC message, and the response's message a plain body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec import grpc
from meshproxy.http.filter_chain import HOLD
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from envoy.extensions.filters.http.grpc_http1_bridge.v3.config_pb2 import Config

    from meshproxy.codec.headers import Headers
    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.grpc_http1_bridge.v3.Config"
ROUTE_TYPE_URLS = ()
HONOURS = {"envoy.extensions.filters.http.grpc_http1_bridge.v3.Config": "upgrade_protobuf_to_grpc ignore_query_parameters"}

_PROTOBUF = b"application/x-protobuf"
_REQUEST_TOO_LARGE = Reply(413, b"Payload Too Large", details="request_payload_too_large", close=True, early=True)
_RESPONSE_TOO_LARGE = Reply(500, b"Internal Server Error", details="response_payload_too_large")


class _State:
    """One request."""

    __slots__ = ("body", "framed", "held", "prefix")

    def __init__(self, framed: bool) -> None:
        self.framed = framed  # the client sends, and gets, a message without gRPC's prefix
        self.prefix = grpc.PREFIX if framed else 0  # bytes of the response that the client does not get
        self.body = bytearray()  # of the request while it comes in, then of the response
        self.held = False


class GrpcHttp1Bridge:
    """The filter."""

    __slots__ = ("_ignores_query", "_scope", "_upgrades", "name")

    def __init__(self, proto: Config, context: FilterContext) -> None:
        self._upgrades = proto.upgrade_protobuf_to_grpc
        self._ignores_query = proto.ignore_query_parameters
        self._scope = context.scope

    def request_headers(self, stream: Any, end_stream: bool) -> None:
        head = stream.request
        content_type = head.get(b"content-type")
        framed = self._upgrades and content_type == _PROTOBUF
        if not framed and not grpc.is_content_type(content_type):
            return
        if framed:
            stream.replies_grpc = False
            head.set(b"content-type", grpc.CONTENT_TYPE)
            head.remove(b"content-length")
            stream.clear_route_cache()
        if head.version >= 20:
            return
        stream.locals[self] = _State(framed)
        if self._ignores_query:
            head.path = head.path.partition(b"?")[0]

    def request_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes | Reply | None:
        state = stream.locals.get(self)
        if state is None or not state.framed:
            return None
        state.body += data
        if end_stream:
            return self._message(state)
        if len(state.body) > stream.manager.buffer_limit:
            self._scope.counter("downstream_rq_too_large").n += 1
            return _REQUEST_TOO_LARGE
        return HOLD

    def request_trailers(self, stream: Any, trailers: Headers) -> bytes | None:
        state = stream.locals.get(self)
        return self._message(state) if state is not None and state.framed else None

    @staticmethod
    def _message(state: _State) -> bytes:
        """The body as a message. As in Envoy, one that came to nothing is no message."""
        message = grpc.frame(bytes(state.body)) if state.body else b""
        state.body.clear()
        return message

    def response_headers(self, stream: Any, end_stream: bool) -> Any:
        state = stream.locals.get(self)
        if state is None or end_stream:
            return None
        if not grpc.is_content_type(stream.response.get(b"content-type")):
            state.prefix = 0  # an error page is no message
        state.held = True
        return HOLD

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes | Reply | None:
        state = stream.locals.get(self)
        if state is None or not state.held:
            return None
        body = state.body
        if state.prefix:
            cut = min(state.prefix, len(data))
            state.prefix -= cut
            data = data[cut:]
        body += data
        if end_stream:
            # No trailers came: the response is what it is.
            state.held = False
            if state.framed and b"content-length" in stream.response:
                stream.response.set(b"content-length", b"%d" % len(body))
            stream.release_headers()
            return bytes(body)
        if len(body) > stream.manager.buffer_limit:
            state.held = False
            self._scope.counter("rs_too_large").n += 1
            return _RESPONSE_TOO_LARGE
        return HOLD

    def response_trailers(self, stream: Any, trailers: Headers) -> bytes | None:
        state = stream.locals.get(self)
        if state is None or not state.held:
            return None
        state.held = False
        head = stream.response
        status = trailers.get(b"grpc-status")
        if status is not None:
            if grpc.status_of(trailers) != grpc.OK:
                head.status = 503
            head.set(b"grpc-status", status)
        message = trailers.get(b"grpc-message")
        if message is not None:
            head.set(b"grpc-message", message)
        head.set(b"content-length", b"%d" % len(state.body))
        stream.release_headers()
        return bytes(state.body)


def compile(proto: Config, context: FilterContext) -> GrpcHttp1Bridge:
    """The filter for a Config."""
    return GrpcHttp1Bridge(proto, context)
