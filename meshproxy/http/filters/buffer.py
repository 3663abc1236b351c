"""Waits for the whole request before anything goes upstream (envoy.extensions.filters.http.buffer.v3.Buffer).

A request longer than `max_request_bytes` is answered 413. A body that came without content-length goes upstream with one.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from envoy.extensions.filters.http.buffer.v3.buffer_pb2 import Buffer as BufferProto
    from envoy.extensions.filters.http.buffer.v3.buffer_pb2 import BufferPerRoute

    from meshproxy.http.filters import FilterContext
    from meshproxy.observe.stats import Counter

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer"
ROUTE_TYPE_URLS = ("type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute",)
HONOURS = {
    "envoy.extensions.filters.http.buffer.v3.Buffer": "max_request_bytes",
    "envoy.extensions.filters.http.buffer.v3.BufferPerRoute": "disabled buffer",
}


# The rest of the body is not waited for: the connection ends.
_TOO_LARGE = Reply(413, b"Payload Too Large", details="request_payload_too_large", close=True, early=True)


class Buffer:
    """The filter: `limit` bytes of request body at most."""

    __slots__ = ("_too_large", "limit", "name")

    def __init__(self, limit: int, too_large: Counter) -> None:
        self.limit = limit
        self._too_large = too_large

    def request_headers(self, stream: Any, end_stream: bool) -> Awaitable[Reply | None] | None:
        return None if end_stream else self._wait(stream)

    async def _wait(self, stream: Any) -> Reply | None:
        if not await stream.buffered_request(self.limit):
            self._too_large.n += 1
            return _TOO_LARGE
        head = stream.request
        if head.get(b"content-length") is None:
            head.set(b"content-length", b"%d" % stream.bytes_received)
        return None


def compile(proto: BufferProto, context: FilterContext) -> Buffer:
    """The filter for a Buffer proto."""
    if not proto.HasField("max_request_bytes") or proto.max_request_bytes.value == 0:
        errors.fail("max_request_bytes", "must be greater than 0")
    return Buffer(proto.max_request_bytes.value, context.scope.counter("downstream_rq_too_large"))


def specialise(base: Buffer | None, overrides: list[BufferPerRoute], context: FilterContext) -> Buffer | None:
    """The filter for a route: the most specific override says how much, or that there is none."""
    override = overrides[-1]
    if override.disabled:
        return None
    with errors.under("buffer"):
        return compile(override.buffer, context)
