"""Local replies as responses: plain text or gRPC, after the mappers and the body format of `local_reply_config`.

Source: envoy.extensions.filters.network.http_connection_manager.v3.LocalReplyConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import datasource, errors
from meshproxy.codec import grpc
from meshproxy.codec.headers import ResponseHead

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.http.replies import Reply
    from meshproxy.http.stream import Stream

_HCM = "envoy.extensions.filters.network.http_connection_manager.v3."
HONOURS = {
    _HCM + "LocalReplyConfig": "mappers body_format",
    _HCM + "ResponseMapper": "filter status_code body body_format_override headers_to_add",
}

_BODILESS = frozenset((*range(100, 200), 204, 304))  # statuses of responses without a body (RFC 9110 6.4.1)
_TEXT = (b"content-type", b"text/plain")

Format = Callable[[Any], bytes]


class LocalReplies:
    """Renders replies for one connection manager."""

    def __init__(self, mappers: list[_Mapper], body_format: tuple[Format, bytes] | None) -> None:
        self._mappers = mappers
        self._format = body_format

    def render(self, stream: Stream, reply: Reply, finalize: Callable[[Stream], None] | None) -> tuple[ResponseHead, bytes]:
        """The response's head, complete but for what the connection manager adds, and its body (already empty for gRPC).

        `finalize`: a route's mutations of the head of its own direct response. They come before the reply's own content type and length; those of a route
        that forwards come before all else.
        """
        status, body = reply.status, reply.body
        if reply.as_is:
            return ResponseHead(status, list(reply.headers)), body
        head = ResponseHead(status, [])
        stream.response, stream.status = head, status
        route = stream.route
        if finalize is None and route is not None and route.finalize_response is not None and route.reply is None:
            route.finalize_response(stream)
        head.items += reply.headers
        head.touch()
        if finalize is not None:
            finalize(stream)
        content_type = head.get(b"content-type")
        is_grpc = stream.is_grpc if stream.replies_grpc is None else stream.replies_grpc
        if self._mappers or self._format is not None:
            status, body, content_type = self._map(stream, head, body, content_type)
        if is_grpc:
            if content_type == b"application/json":
                body = body.removesuffix(b"\n")  # the formatter's
            return self._grpc(head, reply, b"" if stream.request.method == b"HEAD" else body), b""  # type: ignore[union-attr]  # gRPC by its head
        if status in _BODILESS:
            body = b""  # which Envoy sends: clients take it for the beginning of the next response
        items = head.items
        if body:
            if b"content-length" in head:
                head.set(b"content-length", b"%d" % len(body))  # a filter's own cannot be right
                items = head.items
            else:
                items.append((b"content-length", b"%d" % len(body)))
            if content_type is None:
                items.append(_TEXT)
            elif b"content-type" not in head:
                items.append((b"content-type", content_type))
            head.touch()
        else:
            head.remove(b"content-length")
            head.remove(b"content-type")
        if stream.request is not None and stream.request.method == b"HEAD":
            body = b""
        return head, body

    def _map(self, stream: Stream, head: ResponseHead, body: bytes, content_type: bytes | None) -> tuple[int, bytes, bytes | None]:
        # Mappers and formats see the reply as the response that it is about to be.
        stream.response, stream.status = head, head.status
        stream.local_reply_body = body
        chosen = self._format
        for mapper in self._mappers:
            if mapper.applies(stream):
                if mapper.status is not None:
                    head.status = stream.status = mapper.status
                if mapper.body is not None:
                    body = stream.local_reply_body = mapper.body
                if mapper.mutate is not None:
                    mapper.mutate(stream, head)
                chosen = mapper.format or chosen
                break
        if chosen is not None:
            body = chosen[0](stream)
            content_type = chosen[1]
        stream.local_reply_body = b""  # access logs do not show it
        return head.status, body, content_type

    def _grpc(self, head: ResponseHead, reply: Reply, body: bytes) -> ResponseHead:
        status = reply.grpc_status if reply.grpc_status is not None else grpc.status_of_http(head.status)
        head.status = 200
        head.remove(b"content-length")
        head.set(b"content-type", grpc.CONTENT_TYPE)
        if not head.get(b"grpc-status"):  # the route may have set one
            head.set(b"grpc-status", b"%d" % status)
        if body:
            head.set(b"grpc-message", grpc.encode_message(body))
        return head


class _Mapper:
    """One `ResponseMapper`: the first that applies is used."""

    __slots__ = ("applies", "body", "format", "mutate", "status")

    def __init__(self, proto: Any, context: Context) -> None:
        from meshproxy.http.header_mutations import compile_mutation
        from meshproxy.observe import access_filters

        with errors.under("filter"):
            self.applies: Callable[[Any], bool] = access_filters.compile(proto.filter, context)
        self.status: int | None = proto.status_code.value if proto.HasField("status_code") else None
        self.body: bytes | None = None
        if proto.HasField("body"):
            with errors.under("body"):
                self.body = datasource.read(proto.body)
        self.format = _compile_format(proto.body_format_override, "body_format_override") if proto.HasField("body_format_override") else None
        self.mutate: Callable[[Any, ResponseHead], None] | None = compile_mutation(proto.headers_to_add, (), "headers", request=False)


def compile(proto: Any, context: Context) -> LocalReplies:
    """From an HttpConnectionManager."""
    if not proto.HasField("local_reply_config"):
        return LocalReplies([], None)
    config = proto.local_reply_config
    mappers = []
    with errors.under("local_reply_config"):
        for position, mapper in enumerate(config.mappers):
            with errors.under(f"mappers[{position}]"):
                mappers.append(_Mapper(mapper, context))
        body_format = _compile_format(config.body_format, "body_format") if config.HasField("body_format") else None
    return LocalReplies(mappers, body_format)


def _compile_format(proto: Any, path: str) -> tuple[Format, bytes]:
    from meshproxy.observe.format import compile_substitution_format

    with errors.under(path):
        render = compile_substitution_format(proto)
    default = "application/json" if proto.WhichOneof("format") == "json_format" else "text/plain"
    return render, (proto.content_type or default).encode()
