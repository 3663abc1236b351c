"""Downstream HTTP/2 connections whose bytes are counted for each of their requests, frame heads included, for logs that ask; see `http.metered`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.codec.h2.frames import MAX_STREAM_ID
from meshproxy.codec.h2.session import Session
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.http.http2_connection import Http2ServerConnection
from meshproxy.http.http2_exchange import Http2Exchange

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from meshproxy.codec.h2.settings import Options
    from meshproxy.codec.headers import Headers
    from meshproxy.codec.hpack.decoder import Fields
    from meshproxy.http.stream import Stream

_FRAME_HEAD = 9
_RESET = _FRAME_HEAD + 4


class MeteredHttp2Connection(Http2ServerConnection):
    """Counts in its session what comes, and in its exchanges what is sent."""

    __slots__ = ()

    session: _MeteredSession

    def _make_session(self) -> Session:
        return _MeteredSession(self, self.manager.http2_options)

    def new_stream(self) -> Http2Exchange:
        return _MeteredExchange(self)


class _MeteredDecoder(Decoder):
    __slots__ = ("decoded_bytes",)

    decoded_bytes: int  # names and values of the last block

    def decode(self, block: bytes) -> Fields:
        fields = super().decode(block)
        self.decoded_bytes = fields.size - 32 * len(fields.items)
        return fields


class _MeteredSession(Session):
    """What frames take is added to their streams before anybody hears of what is in them."""

    __slots__ = ("_begun", "head_bytes")

    decoder: _MeteredDecoder

    def __init__(self, sink: MeteredHttp2Connection, options: Options) -> None:
        super().__init__(sink, options, client=False)
        self.head_bytes = 0  # of the last header block
        self._begun = 0  # of one that is padded, has a priority or comes in pieces
        self.decoder = _MeteredDecoder(options.hpack_table_size, options.max_head_bytes + 32 * (options.max_headers + 8), options.max_headers)

    def _headers(self, flags: int, stream_id: int, block: bytes) -> None:
        self._begun = _FRAME_HEAD + len(block)
        super()._headers(flags, stream_id, block)

    def _expected(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is not None:
            self._begun += len(payload)
        super()._expected(kind, flags, stream_id, payload)

    def _request(self, flags: int, stream_id: int, block: bytes) -> None:
        self.head_bytes = self._begun or _FRAME_HEAD + len(block)
        self._begun = 0
        super()._request(flags, stream_id, block)

    def _fields(self, flags: int, stream_id: int, block: bytes) -> None:
        self.head_bytes = self._begun or _FRAME_HEAD + len(block)
        stream = self.streams.get(stream_id & MAX_STREAM_ID)
        if stream is not None:
            stream.header_bytes_received += self.head_bytes
            stream.wire_bytes_received += self.head_bytes
            self._begun = 0
        super()._fields(flags, stream_id, block)

    def _data(self, flags: int, stream_id: int, length: int, data: bytes) -> None:
        self._count(stream_id, _FRAME_HEAD + length)
        super()._data(flags, stream_id, length, data)

    def _more_data(self, data: bytes, position: int, size: int) -> int:
        self._count(self._data_stream, -_FRAME_HEAD)  # it was counted with the frame's beginning
        return super()._more_data(data, position, size)

    def _count(self, stream_id: int, size: int) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.wire_bytes_received += size


class _MeteredExchange(Http2Exchange):
    __slots__ = ("decompressed_header_bytes_received", "header_bytes_received", "header_bytes_sent", "wire_bytes_received", "wire_bytes_sent")

    connection: MeteredHttp2Connection

    def __init__(self, connection: MeteredHttp2Connection) -> None:
        super().__init__(connection)
        self.header_bytes_received = self.wire_bytes_received = connection.session.head_bytes
        self.decompressed_header_bytes_received = self.header_bytes_sent = self.wire_bytes_sent = 0

    def on_head(self, known: Any, end_stream: bool) -> None:
        self.decompressed_header_bytes_received = self.connection.session.decoder.decoded_bytes
        super().on_head(known, end_stream)

    def on_trailers(self, trailers: Headers) -> None:
        self.decompressed_header_bytes_received += self.connection.session.decoder.decoded_bytes
        super().on_trailers(trailers)

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        if remote:
            self.wire_bytes_received += _RESET
        super().on_reset(code, details, remote)

    def send_block(self, block: bytes, end_stream: bool) -> None:
        self.header_bytes_sent += self._sent(super().send_block, block, end_stream)[0]

    def send_data(self, data: bytes, end_stream: bool) -> None:
        self._sent(super().send_data, data, end_stream)

    def send_some(self) -> bool:
        return bool(self._sent(super().send_some)[1])

    def _relay(self, stream: Stream) -> None:
        """Data does not go by itself: it is counted."""

    def _sent(self, send: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
        """Call `send`; returns how many bytes it made, and what it returned. Nothing else gets into the session's output meanwhile."""
        out = self.session.out
        before = len(out)
        result = send(*arguments)
        size = sum(map(len, out[before:]))
        self.wire_bytes_sent += size
        return size, result
