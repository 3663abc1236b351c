"""A downstream connection whose bytes are counted for each of its requests, for logs that ask (`%DOWNSTREAM_WIRE_BYTES_RECEIVED%` and its like)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.metering import CountingTransport, HeadMeter
from meshproxy.http.connection import ServerConnection

if TYPE_CHECKING:
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.stream import Stream
    from meshproxy.net.connection import ConnectionInfo


class MeteredConnection(ServerConnection):
    """HTTP/1 carries one request at a time: the counts are those of the request at hand, and begin anew when it is done."""

    __slots__ = ("_early", "_meter", "_written_before", "header_bytes_received", "wire_bytes_received")

    def __init__(self, manager: HttpConnectionManager, info: ConnectionInfo) -> None:
        super().__init__(manager, info)
        self.wire_bytes_received = self.header_bytes_received = self._written_before = 0
        self._meter = HeadMeter()
        self._early = b""  # what came of the next requests

    @property
    def wire_bytes_sent(self) -> int:
        """Of the response so far."""
        return int(self.transport.written) - self._written_before

    def connection_made(self, transport: Any) -> None:
        super().connection_made(CountingTransport(transport))

    def data_received(self, data: bytes) -> None:
        stream = self.stream
        if stream is not None and stream.request_ended:
            self._early += data
        else:
            self._count(data)
        super().data_received(data)

    def _count(self, data: bytes) -> None:
        # As Envoy: what a client pipelines counts for the request that it came with, and once more for its own.
        self.wire_bytes_received += len(data)
        if not self._meter.complete:
            self.header_bytes_received += sum(self._meter.feed(data))

    def stream_done(self, stream: Stream) -> None:
        early = self._early if self._early or stream.bytes_received else self._meter.rest
        self.wire_bytes_received = self.header_bytes_received = 0
        self._written_before = self.transport.written
        self._meter.start()
        self._early = b""
        if early:
            self._count(early)
        super().stream_done(stream)
