"""An upstream HTTP/2 connection whose bytes are counted for each of its requests, for logs that ask; see `upstream.metered`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h2.metered import MeteredSession, MeteredStream
from meshproxy.upstream.http2 import Http2Connection, Http2Request, all_fields

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshproxy.codec.h2.fields import KnownTrailers
    from meshproxy.codec.h2.session import Session
    from meshproxy.codec.h2.settings import Options
    from meshproxy.codec.headers import Headers, Pair, RequestHead


class MeteredHttp2Connection(Http2Connection):
    """Its requests count for their streams. Tries of a request add up, as in Envoy."""

    __slots__ = ()

    session: MeteredSession

    def _make_session(self, options: Options) -> Session:
        return MeteredSession(self, options, client=True)


class _MeteredRequest(MeteredStream, Http2Request):
    __slots__ = ()

    session: MeteredSession
    _counts: Any = None  # the StreamInfo that is counted for: from the head on

    # -- what is sent

    def _send_block(self, items: list[Pair], *, end_stream: bool) -> None:
        self.send_block(self.session.encoder.encode(items), end_stream)
        self._count_fields(items)

    def send_trailers(self, trailers: Headers) -> None:  # type: ignore[override]  # see Http2Request
        self._count_fields(trailers.items)
        super().send_trailers(trailers)

    def ask(self, head: RequestHead, body: bytes) -> int:
        super().ask(head, body)
        self._count_fields(all_fields(head))
        return 0

    def ask_known(self, plan: Any, stream: Any, known: Any, request_id: bytes, body: bytes) -> int:
        super().ask_known(plan, stream, known, request_id, body)
        self._count_fields(all_fields(stream.request))  # it has left its plan
        return 0

    def send_block(self, block: bytes, end_stream: bool) -> None:
        if self._counts is None:
            is_planned = self.planned is not None
            self._counts = self.request.stream  # which leaves its plan here
            if is_planned:
                self._counts.upstream_bytes_sent = 0
        super().send_block(block, end_stream)

    def _count_fields(self, items: Iterable[Pair]) -> None:
        self._counts.upstream_decompressed_header_bytes_sent += sum([len(name) + len(value) for name, value in items])

    def count_sent(self, size: int, *, head: bool) -> None:
        counts = self._counts
        counts.upstream_bytes_sent += size
        if head:
            counts.upstream_header_bytes_sent += size

    # -- what comes

    def count_received(self, size: int, *, head: bool) -> None:
        counts = self._counts
        counts.upstream_bytes_received += size
        if head:
            counts.upstream_header_bytes_received += size

    def on_head(self, known: Any, end_stream: bool) -> None:
        self._counts.upstream_decompressed_header_bytes_received += self.session.decoder.decoded_bytes
        super().on_head(known, end_stream)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        if data and not self._counts.upstream_body_first:
            self._counts.upstream_body_first = self.pool.context.clock()
        super().on_data(data, end_stream)

    def on_trailers(self, trailers: KnownTrailers) -> None:
        self._counts.upstream_decompressed_header_bytes_received += self.session.decoder.decoded_bytes
        super().on_trailers(trailers)


MeteredHttp2Connection.exchange_class = _MeteredRequest
