"""gRPC-Web to gRPC and back, binary or as base64 text (envoy.extensions.filters.http.grpc_web.v3.GrpcWeb).

A browser cannot see trailers: they become the last frame of the body. A response that is no gRPC at all, local replies included, becomes a status: its body is
the `grpc-message`. Source: grpc/grpc doc/PROTOCOL-WEB.md, and Envoy's filter for all that is not there.
"""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING, Any

from meshproxy.codec import grpc
from meshproxy.http.filter_chain import HOLD
from meshproxy.http.grpc_context import GRPC_WEB, Charges, cluster_of
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from envoy.extensions.filters.http.grpc_web.v3.grpc_web_pb2 import GrpcWeb as GrpcWebProto

    from meshproxy.codec.headers import Headers
    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"
ROUTE_TYPE_URLS = ()
HONOURS = {"envoy.extensions.filters.http.grpc_web.v3.GrpcWeb": ""}

_WEB, _WEB_PROTO = b"application/grpc-web", b"application/grpc-web+proto"
_TEXT, _TEXT_PROTO = b"application/grpc-web-text", b"application/grpc-web-text+proto"
_TRAILERS_FLAG = 0x80
_MAX_MESSAGE = 16384  # bytes of a body that become the grpc-message
_MAX_TEXT = 65536  # bytes of a message that wait for its end before they become text
_BAD_TEXT = b"Bad gRPC-web request, invalid base64 data."
_BAD_SIZE = Reply(400, _BAD_TEXT, details="grpc_base_64_decode_failed_bad_size")
_BAD_DATA = Reply(400, _BAD_TEXT, details="grpc_base_64_decode_failed", early=True)


class _State:
    """One request."""

    __slots__ = ("charges", "encoder", "foreign", "message", "rest", "text")

    def __init__(self, text: bool, charges: Charges | None) -> None:
        self.text = text  # the request is base64
        self.charges = charges
        self.rest = b""  # of the request: less than a block of base64
        self.encoder: TextEncoder | None = None  # of a response that goes out as base64
        self.foreign = False  # the response is no gRPC: its body becomes `message`
        self.message = b""


class GrpcWeb:
    """The filter."""

    __slots__ = ("_context", "name")

    def __init__(self, context: FilterContext) -> None:
        self._context = context

    def request_headers(self, stream: Any, end_stream: bool) -> None:
        head = stream.request
        content_type = head.get(b"content-type")
        if content_type not in (_WEB, _WEB_PROTO, _TEXT, _TEXT_PROTO):
            return
        cluster, method = cluster_of(stream, self._context), grpc.method_of(head.path)
        charges = Charges(cluster, GRPC_WEB, method) if cluster is not None and method is not None else None
        state = stream.locals[self] = _State(content_type in (_TEXT, _TEXT_PROTO), charges)
        if head.get(b"accept") in (_TEXT, _TEXT_PROTO):
            state.encoder = TextEncoder()
        stream.replies_grpc = False
        head.remove(b"content-length")
        head.set(b"content-type", grpc.CONTENT_TYPE)
        head.set(b"te", b"trailers")
        if b"grpc-accept-encoding" not in head:
            head.add(b"grpc-accept-encoding", b"identity")

    def request_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes | Reply | None:
        state = stream.locals.get(self)
        if state is None or not state.text:
            return None
        data = state.rest + data
        whole = len(data) // 4 * 4
        if end_stream and whole != len(data):
            return _BAD_SIZE
        state.rest = data[whole:]
        if not whole:
            return b"" if end_stream else HOLD
        decoded = _decode(data[:whole])
        return _BAD_DATA if decoded is None else decoded

    def response_headers(self, stream: Any, end_stream: bool) -> Any:
        state = stream.locals.get(self)
        if state is None:
            return None
        head = stream.response
        if state.charges is not None:
            state.charges.status(head.get(b"grpc-status"))
        foreign = not (b"grpc-status" in head if end_stream else head.status == 200 and _is_either(head.get(b"content-type")))
        head.remove(b"content-length")
        head.set(b"content-type", _WEB_PROTO if state.encoder is None else _TEXT_PROTO)
        if end_stream or not foreign:
            return None
        state.foreign = True
        return HOLD

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> bytes | None:
        state = stream.locals.get(self)
        if state is None:
            return None
        if state.foreign:
            return self._collect(stream, state, data, end_stream)
        if state.encoder is None:
            return None
        text = state.encoder.feed(data)
        return text if text or end_stream else HOLD

    def _collect(self, stream: Any, state: _State, data: bytes, end_stream: bool) -> bytes:
        """More of the body of a response that is no gRPC."""
        state.message += data[: _MAX_MESSAGE - len(state.message)]
        if not end_stream:
            return HOLD
        self._release(stream, state)
        return b""

    def _release(self, stream: Any, state: _State) -> None:
        state.foreign = False
        head = stream.response
        head.set(b"grpc-message", grpc.encode_message(state.message))
        head.set(b"grpc-status", b"%d" % grpc.status_of_http(head.status))
        head.set(b"content-length", b"0")
        stream.release_headers()

    def response_trailers(self, stream: Any, trailers: Headers) -> bytes | None:
        state = stream.locals.get(self)
        if state is None:
            return None
        if state.charges is not None:
            state.charges.status(trailers.get(b"grpc-status"))
        if state.foreign:
            self._release(stream, state)
            return None
        frame = grpc.frame(b"".join(b"%b:%b\r\n" % pair for pair in trailers), _TRAILERS_FLAG)
        trailers.items = []
        trailers.touch()
        return frame if state.encoder is None else _encode(frame)


class TextEncoder:
    """Messages as base64, each for itself, as it becomes complete; the beginning of a long one goes before. Nothing more once the framing is broken."""

    __slots__ = ("_broken", "_buffer", "_left")

    def __init__(self) -> None:
        self._buffer = bytearray()  # what of a message has not been encoded
        self._left: int | None = None  # bytes of it that are still to come; None: its prefix is not complete
        self._broken = False

    def feed(self, data: bytes) -> bytes:
        """Take more of the response's body; the text for it."""
        text = b""
        buffer = self._buffer
        position, end = 0, len(data)
        while position < end and not self._broken:
            take = min(end - position, grpc.PREFIX - len(buffer) if self._left is None else self._left)
            buffer += data[position : position + take]
            position += take
            if self._left is not None:
                self._left -= take
            elif len(buffer) == grpc.PREFIX:
                self._left = int.from_bytes(buffer[1:], "big")
                self._broken = bool(buffer[0] & ~grpc.COMPRESSED)
            if self._left == 0 and not self._broken:
                text += _encode(buffer)
                buffer.clear()
                self._left = None
            elif len(buffer) >= _MAX_TEXT:
                whole = len(buffer) // 3 * 3
                text += _encode(buffer[:whole])
                del buffer[:whole]
        return text


def compile(proto: GrpcWebProto, context: FilterContext) -> GrpcWeb:
    """The filter for a GrpcWeb."""
    return GrpcWeb(context)


def _is_either(content_type: bytes | None) -> bool:
    """Whether a response's content type is that of gRPC, or of gRPC-Web already."""
    if content_type is None or grpc.is_content_type(content_type):
        return content_type is not None
    return content_type.partition(b";")[0].rstrip().lower() in (_WEB, _WEB_PROTO)


def _encode(data: bytes | bytearray) -> bytes:
    return binascii.b2a_base64(data, newline=False)


def _decode(data: bytes) -> bytes | None:
    """Blocks of base64, of which the last may be padded; None when they are something else."""
    try:
        decoded = binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error:
        return None
    # What padding leaves over must be zero.
    return decoded if decoded and _encode(decoded[-(len(decoded) % 3 or 3) :]) == data[-4:] else None
