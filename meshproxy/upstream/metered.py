"""An upstream connection that counts what the heads of its messages take, for logs that ask (`%UPSTREAM_HEADER_BYTES_SENT%` and its like)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.metering import CountingTransport, HeadMeter, sent_fields
from meshproxy.upstream.http1 import Http1Connection

if TYPE_CHECKING:
    from meshproxy.upstream.http1_pool import Http1Pool
    from meshproxy.upstream.http2_pool import AutoPool


class MeteredConnection(Http1Connection):
    """Adds to its requests' streams. Tries of a request add up, as in Envoy."""

    __slots__ = ("_meter", "_metered")

    def __init__(self, pool: Http1Pool | AutoPool) -> None:
        super().__init__(pool)
        self._metered = 0  # `served` when the last request's head was sent
        self._meter = HeadMeter()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_MeteredTransport(transport, self))

    def wrote(self, data: bytes) -> None:
        """The first that is written of a request is its whole head."""
        if self._metered != self.served:
            self._metered = self.served
            self._meter.start()
            stream = self.request.stream
            stream.upstream_header_bytes_sent += sent_fields(data)
            stream.upstream_decompressed_header_bytes_sent = stream.upstream_header_bytes_sent

    def data_received(self, data: bytes) -> None:
        if self.request is not None:
            self._count(self.request.stream, data)
        super().data_received(data)

    def _count(self, stream: Any, data: bytes) -> None:
        meter = self._meter
        if not meter.complete:
            for size in meter.feed(data):
                stream.upstream_header_bytes_received += size
                # Envoy counts what the heads before took again with each of them.
                stream.upstream_decompressed_header_bytes_received += stream.upstream_header_bytes_received
            data = meter.rest
        if data and not stream.upstream_body_first:
            stream.upstream_body_first = self.pool.context.clock()


class _MeteredTransport(CountingTransport):
    __slots__ = ("_connection",)

    def __init__(self, transport: Any, connection: MeteredConnection) -> None:
        super().__init__(transport)
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._connection.wrote(data)
        self._transport.write(data)
