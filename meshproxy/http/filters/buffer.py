"""Waits for the whole request before anything goes upstream (envoy.extensions.filters.http.buffer.v3.Buffer).

A request longer than `max_request_bytes` is answered 413. A body that came without content-length goes upstream with one.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.http import replies

if TYPE_CHECKING:
    from envoy.extensions.filters.http.buffer.v3.buffer_pb2 import Buffer as BufferProto
    from envoy.extensions.filters.http.buffer.v3.buffer_pb2 import BufferPerRoute

    from meshproxy.http.filters import FilterContext
    from meshproxy.http.replies import Reply

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer"
ROUTE_TYPE_URLS = ("type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute",)
HONOURS = {
    "envoy.extensions.filters.http.buffer.v3.Buffer": "max_request_bytes",
    "envoy.extensions.filters.http.buffer.v3.BufferPerRoute": "disabled buffer",
}


class Buffer:
    """The filter: `limit` bytes of request body at most."""

    __slots__ = ("limit", "name")

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def request_headers(self, stream: Any, end_stream: bool) -> Awaitable[Reply | None] | None:
        return None if end_stream else self._wait(stream)

    async def _wait(self, stream: Any) -> Reply | None:
        if not await stream.buffered_request(self.limit):
            return replies.PAYLOAD_TOO_LARGE
        head = stream.request
        if head.get(b"content-length") is None:
            head.set(b"content-length", b"%d" % stream.bytes_received)
        return None


def compile(proto: BufferProto, context: FilterContext) -> Buffer:
    """The filter for a Buffer proto."""
    if not proto.HasField("max_request_bytes") or proto.max_request_bytes.value == 0:
        errors.fail("max_request_bytes", "must be greater than 0")
    return Buffer(proto.max_request_bytes.value)


def specialise(base: Buffer | None, overrides: list[BufferPerRoute], context: FilterContext) -> Buffer | None:
    """The filter for a route: the most specific override says how much, or that there is none."""
    override = overrides[-1]
    if override.disabled:
        return None
    with errors.under("buffer"):
        return compile(override.buffer, context)
