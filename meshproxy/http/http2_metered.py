"""Downstream HTTP/2 connections whose bytes are counted for each of their requests, for logs that ask; see `http.metered`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h2.metered import MeteredSession, MeteredStream
from meshproxy.http.http2_connection import Http2ServerConnection
from meshproxy.http.http2_exchange import Http2Exchange

if TYPE_CHECKING:
    from meshproxy.codec.h2.fields import KnownTrailers
    from meshproxy.codec.h2.session import Session
    from meshproxy.http.stream import Stream


class _MeteredExchange(MeteredStream, Http2Exchange):
    __slots__ = ("decompressed_header_bytes_received", "header_bytes_received", "header_bytes_sent", "wire_bytes_received", "wire_bytes_sent")

    session: MeteredSession
    header_bytes_received: int
    wire_bytes_received: int
    decompressed_header_bytes_received: int
    header_bytes_sent: int
    wire_bytes_sent: int

    def count_received(self, size: int, *, head: bool) -> None:
        self.wire_bytes_received += size
        if head:
            self.header_bytes_received += size

    def count_sent(self, size: int, *, head: bool) -> None:
        self.wire_bytes_sent += size
        if head:
            self.header_bytes_sent += size

    def on_head(self, known: Any, end_stream: bool) -> None:
        self.decompressed_header_bytes_received = self.session.decoder.decoded_bytes
        super().on_head(known, end_stream)

    def on_trailers(self, trailers: KnownTrailers) -> None:
        self.decompressed_header_bytes_received += self.session.decoder.decoded_bytes
        super().on_trailers(trailers)

    def _relay(self, stream: Stream) -> None:
        """Data is counted on its way."""


class MeteredHttp2Connection(Http2ServerConnection):
    """Counts in its session what comes, and in its exchanges what is sent."""

    __slots__ = ()

    exchange_class = _MeteredExchange
    session: MeteredSession

    def _make_session(self) -> Session:
        return MeteredSession(self, self.manager.http2_options, client=False)

    def new_stream(self) -> Http2Exchange:
        exchange: Any = super().new_stream()
        exchange.header_bytes_received = exchange.wire_bytes_received = self.session.head_bytes
        exchange.decompressed_header_bytes_received = exchange.header_bytes_sent = exchange.wire_bytes_sent = 0
        return exchange
