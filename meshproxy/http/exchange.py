"""The seam between a request (`http.stream.Stream`) and the version of HTTP that it came with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from meshproxy.codec.h2.fields import KnownTrailers
    from meshproxy.codec.headers import Headers, ResponseHead
    from meshproxy.http.planned_response import PlannedResponse
    from meshproxy.http.stream import Stream
    from meshproxy.net.connection import ConnectionInfo


class Exchange(Protocol):
    """The downstream side of one request: `stream.codec`.

    An HTTP/1 connection is the exchange of the one request that it serves; an HTTP/2 connection has one for each of its streams. The exchange calls the
    stream's `begin`, `on_data`, `on_trailers`, `on_reset`, `on_writable` and `on_idle`; the stream calls what follows. The head that `send_headers` and
    `send_whole` get is the one that logs show: what only this version's wire needs goes onto the wire alone.
    """

    head_size: int  # bytes of the request's head as it came; 0 where the connection does not know

    @property
    def info(self) -> ConnectionInfo:
        """Of the connection."""

    @property
    def transport(self) -> Any:
        """Of the connection: only asked about, never written to."""

    @property
    def full(self) -> bool:
        """Too much of the response waits to be sent: `on_writable(False)` was called."""

    @property
    def queued(self) -> int:
        """Bytes of the response that wait for the client's flow control."""

    def send_informational(self, head: ResponseHead) -> None:
        """A 1xx response of the upstream; the exchange knows whether the client may see it."""

    def send_headers(self, stream: Stream, head: ResponseHead, end_stream: bool) -> None:
        """The response's head, after everything that the connection manager adds. It may be kept back until `send_data`, `send_trailers` or `flush`."""

    def send_whole(self, stream: Stream, head: ResponseHead, body: bytes) -> None:
        """HOT: head and body of a response that has a content length. The same as `send_headers` and `send_data`."""

    def send_data(self, data: bytes, end_stream: bool) -> None:
        """Part of the response's body; may be empty with `end_stream`."""

    def send_trailers(self, trailers: Headers) -> None:
        """The response's end."""

    def send_metadata(self, fields: dict[bytes, bytes]) -> None:
        """A map that is no part of the response (codec.h2.metadata), at any time before its end; dropped where the client cannot know it."""

    def flush(self) -> None:
        """Send what was kept back: whoever acts on a stream from a timer or a task calls this at the end."""

    def pause_reading(self) -> None:
        """Let no more of the request come than is on its way. Idempotent."""

    def resume_reading(self) -> None:
        """Let the request come. Idempotent."""

    def watch_stream(self, seconds: float) -> None:
        """The stream's idle timeout is `seconds` (and its `idle_timeout`)."""

    def settle_relays(self) -> None:
        """Tell the stream of all data that has gone past it. Its byte counts and `last_active` lag behind until then, or until it ends."""

    def discard_request(self) -> None:
        """We answer before the request is complete, and nobody will read the rest."""

    def linger(self, stream: Stream) -> None:
        """The stream has ended, but bytes of it are `queued`. When they have gone out, or cannot any more, call the manager's `stream_done` and ours."""

    def reset_stream(self, stream: Stream) -> None:
        """The response cannot be finished, or not be begun: tell the client so. `stream_done` follows."""

    def stream_done(self, stream: Stream) -> None:
        """The stream has ended, in order or not, and calls nothing any more. Of a request that is not complete the rest is refused."""


class PlanExchange(Exchange, Protocol):
    """What `http.plan` asks of an exchange besides."""

    def takes(self, size: int) -> bool:
        """HOT: whether a response with a body of `size` bytes can be sent at once, and nothing is to be said besides."""

    def answer(
        self, response: PlannedResponse, service_time: bytes, body: bytes, trailers: KnownTrailers | None, now: float, values: tuple[bytes, ...] | None = None
    ) -> None:
        """HOT: a whole response, and the end of its stream, which the exchange forgets first. `service_time`: empty where the response does not tell it.

        `trailers`: of HTTP/2 only. `values`: where it is an http.shaped_response.ShapedResponse.
        """

    def leave_plan(self, received: int) -> None:
        """The stream goes the general way from here. `received`: bytes of its request that nobody has counted."""
