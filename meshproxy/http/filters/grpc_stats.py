"""Statistics of gRPC by cluster, service and method (envoy.extensions.filters.http.grpc_stats.v3.FilterConfig).

Requests and responses pass as they are. Messages are counted as they begin; the status is taken from trailers, or from the head of a response without any.
As Envoy's filter, this one also knows the Connect protocol, unary and streaming.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from meshproxy.codec import grpc
from meshproxy.http.grpc_context import GRPC, Charges, cluster_of

if TYPE_CHECKING:
    from envoy.extensions.filters.http.grpc_stats.v3.config_pb2 import FilterConfig

    from meshproxy.codec.headers import Headers, RequestHead
    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.grpc_stats.v3.FilterConfig"
ROUTE_TYPE_URLS = ()
HONOURS = {
    "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig": (
        "emit_filter_state individual_method_stats_allowlist stats_for_all_methods enable_upstream_stats replace_dots_in_grpc_service_name"
    ),
    "envoy.config.core.v3.GrpcMethodList": "services",
    "envoy.config.core.v3.GrpcMethodList.Service": "name method_names",
}

FILTER_STATE = "envoy.filters.http.grpc_stats"
_CONNECT = b"application/connect+"
_END_OF_STREAM = 2  # the flag of Connect's last message, which holds the status
_MAX_END = 65536  # bytes of such a message that are kept to be read


class MessageCounts(dict[str, str]):
    """What `emit_filter_state` leaves for access logs and `istio_stats`: the counts so far, as the JSON of a FilterObject, and as plain text."""

    def set(self, requests: int, responses: int) -> None:
        """Take the present counts."""
        self.requests, self.responses = requests, responses
        self._text = f"{requests},{responses}"
        for name, count in (("requestMessageCount", requests), ("responseMessageCount", responses)):
            if count:
                self[name] = str(count)

    def __str__(self) -> str:
        return self._text


class _State:
    """One request."""

    __slots__ = ("charges", "grpc", "grpc_response", "request", "requests", "response", "responses", "streaming", "streaming_response", "unary")

    def __init__(self, head: RequestHead) -> None:
        content_type = head.get(b"content-type")
        self.grpc = grpc.is_content_type(content_type)
        self.unary = b"connect-protocol-version" in head
        self.streaming = content_type is not None and content_type.startswith(_CONNECT)
        self.grpc_response = self.streaming_response = False
        self.charges: Charges | None = None
        self.request = grpc.MessageCounter()
        self.response = ResponseCounter()
        self.requests = self.responses = 0


class GrpcStats:
    """The filter."""

    __slots__ = ("_all", "_allowed", "_context", "_emits", "_replaces_dots", "_times", "name")

    def __init__(self, proto: FilterConfig, context: FilterContext) -> None:
        self._context = context
        self._all = proto.stats_for_all_methods.value
        self._allowed = {
            (service.name, method) for service in proto.individual_method_stats_allowlist.services for method in service.method_names
        }  # empty when all methods count, or none
        self._emits = proto.emit_filter_state
        self._times = proto.enable_upstream_stats
        self._replaces_dots = proto.replace_dots_in_grpc_service_name

    def request_headers(self, stream: Any, end_stream: bool) -> None:
        head = stream.request
        state = _State(head)
        if not (state.grpc or state.unary or state.streaming):
            if self._emits:
                stream.locals[self] = state
            return
        stream.locals[self] = state
        cluster = cluster_of(stream, self._context)
        method = grpc.method_of(head.path)
        if cluster is None or method is None:
            return
        if self._all:
            if self._replaces_dots:
                method = method[0].replace(".", "_"), method[1]
        elif method not in self._allowed:
            method = None
        state.charges = Charges(cluster, GRPC, method)

    def request_data(self, stream: Any, data: bytes, end_stream: bool) -> None:
        state = stream.locals.get(self)
        if state is None:
            return
        if state.grpc or state.streaming:
            count = state.request.feed(data)
            if not state.unary:
                state.requests += count
        else:
            count = state.requests = int(state.unary and end_stream)
        if count:
            self._counted(stream, state, "request_message_count", count)

    def response_headers(self, stream: Any, end_stream: bool) -> None:
        state = stream.locals.get(self)
        if state is None:
            return
        head = stream.response
        content_type = head.get(b"content-type")
        if end_stream:
            state.grpc_response = b"grpc-status" in head
        else:
            state.grpc_response = head.status == 200 and grpc.is_content_type(content_type)
        state.streaming_response = head.status == 200 and content_type is not None and content_type.startswith(_CONNECT)
        if state.charges is None:
            return
        if state.unary:
            state.charges.outcome(success=head.status == 200)
        elif not state.streaming_response:
            state.charges.status(head.get(b"grpc-status"))
        if end_stream:
            self._time(stream, state)

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> None:
        state = stream.locals.get(self)
        if state is None:
            return
        if state.grpc_response or state.streaming:
            count = state.response.feed(data)
            if not state.unary:
                state.responses += count
        else:
            count = state.responses = int(state.unary and end_stream)
        if count:
            self._counted(stream, state, "response_message_count", count)
        if end_stream and state.streaming and not state.grpc_response and state.charges is not None:
            state.charges.outcome(success=state.response.success)
        if end_stream and not state.grpc_response and (state.streaming or state.unary):
            self._time(stream, state)

    def response_trailers(self, stream: Any, trailers: Headers) -> None:
        state = stream.locals.get(self)
        if state is not None and state.grpc and state.charges is not None:
            state.charges.status(trailers.get(b"grpc-status"))
            self._time(stream, state)

    def _counted(self, stream: Any, state: _State, name: str, count: int) -> None:
        if self._emits:
            stream.filter_state.setdefault(FILTER_STATE, MessageCounts()).set(state.requests, state.responses)
        if state.charges is not None:
            state.charges.count(name, count)

    def _time(self, stream: Any, state: _State) -> None:
        if self._times and state.charges is not None and stream.upstream_sent and stream.upstream_last:
            state.charges.time(stream.upstream_last - stream.upstream_sent)


class ResponseCounter:
    """Counts the messages of a response. One that is flagged as Connect's end of the stream is read instead. `success`: it says that all went well."""

    __slots__ = ("_body", "_ending", "_left", "_prefix", "success")

    def __init__(self) -> None:
        self.success = False
        self._prefix = b""
        self._left = 0  # bytes of a message that are still to come
        self._ending = False
        self._body = b""

    def feed(self, data: bytes) -> int:
        """Take more of the body; how many messages begin in it."""
        count = position = 0
        while position < len(data):
            if self._left:
                piece = data[position : position + self._left]
                self._left -= len(piece)
                if self._ending and len(self._body) < _MAX_END:
                    self._body += piece
            elif self._ending and not self._prefix:
                break
            else:
                piece = data[position : position + grpc.PREFIX - len(self._prefix)]
                if not self._prefix:
                    self._ending = bool(piece[0] & _END_OF_STREAM)
                    count += not self._ending
                self._prefix += piece
                if len(self._prefix) == grpc.PREFIX:
                    self._left = int.from_bytes(self._prefix[1:], "big")
                    self._prefix = b""
            position += len(piece)
            if self._ending and not self._left and not self._prefix:
                self._read()
        return count

    def _read(self) -> None:
        try:
            message = json.loads(self._body)
        except (ValueError, RecursionError):
            return
        self.success = isinstance(message, dict) and "error" not in message


def compile(proto: FilterConfig, context: FilterContext) -> GrpcStats:
    """The filter for a FilterConfig."""
    return GrpcStats(proto, context)
