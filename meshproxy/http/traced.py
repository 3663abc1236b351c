"""The streams of connection managers that trace, and the forwardings of those: where spans begin, what they hear of, where they end. See `http.tracing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.http.forwarding import Forwarding
from meshproxy.http.stream import Stream
from meshproxy.http.tracing import tell_grpc
from meshproxy.http.tries import RESET_FLAGS
from meshproxy.observe import flags

if TYPE_CHECKING:
    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.codec.headers import Headers, ResponseHead
    from meshproxy.http.attempt import Attempt
    from meshproxy.http.router import Router
    from meshproxy.tracing.span import Span
    from meshproxy.upstream.host import Host


class TracedStream(Stream):
    """A stream with a span. It has no slots of its own, so that one that went by a lane (`http.planned_stream`) can become one."""

    __slots__ = ()

    span: Span | None = None
    reason: str | None = None  # why it is traced: the name of the statistic that counts it
    tracing: Any = None  # what holds for its route, from the moment that it has one
    operation: bytes = b""  # what the route calls it, where others are told

    def begin(self, end_stream: bool) -> None:
        """Run a request whose head was prepared: begin its span before filters see it."""
        self.route = self.manager.match(self)
        self.manager.tracing.begin(self)  # type: ignore[union-attr]  # else its streams are no such ones
        self.go(end_stream)

    def finish(self) -> None:
        """The stream is over."""
        if not self.ended and self.forwarding is not None:
            self.forwarding.all_over()
        super().finish()

    @property
    def trace_id(self) -> str | None:
        """For logs."""
        return None if self.span is None else self.span.trace_id.decode()

    @property
    def span_id(self) -> str | None:
        """For logs."""
        return None if self.span is None else self.span.id.decode()


class _Try:
    """A try with a span of its own."""

    __slots__ = ("done", "flag", "host", "span", "status")

    def __init__(self, span: Span, host: Host) -> None:
        self.span = span
        self.host = host
        self.status = 0
        self.flag = 0
        self.done = False  # it came to its end by itself


class TracedForwarding(Forwarding):
    """A forwarding whose tries name a span as their parent."""

    __slots__ = ("_tries",)

    stream: TracedStream

    @classmethod
    def under_way(cls, router: Router, stream: Stream, connection: Any, body: bytes, queue: Any, per_try: Any) -> TracedForwarding:
        """See `Forwarding`: a request whose head has named its span's parent, and that has no span of its own for a try."""
        made = super().under_way(router, stream, connection, body, queue, per_try)
        assert isinstance(made, TracedForwarding)
        made._tries = {}
        return made

    def begin(self, host: Host, end_stream: bool) -> None:
        """Send the head."""
        self._tries: dict[Attempt, _Try] = {}
        self.before_try(self, host)
        super().begin(host, end_stream)

    def before_try(self, attempt: Attempt, host: Host) -> None:
        """A try is about to begin."""
        stream = self.stream
        assert stream.request is not None
        tracing = stream.manager.tracing
        assert tracing is not None
        span = tracing.begin_try(stream, stream.request, self.router.clock() + stream.manager.wall_offset)
        if span is not None:
            self._tries[attempt] = _Try(span, host)

    def on_response_whole(self, known: KnownResponse, body: bytes) -> None:
        """A complete response in one piece."""
        one = None if self.done else self._tries.get(self)
        if one is not None:
            one.status = known.status
            one.done = True
            tell_grpc(one.span.tags, known.index)
        super().on_response_whole(known, body)

    def on_attempt_headers(self, attempt: Attempt, head: ResponseHead, end_stream: bool) -> None:
        """The response's head."""
        one = self._tries.get(attempt)
        if one is not None:
            one.status = head.status
            one.done = end_stream and attempt.sent_all
            tell_grpc(one.span.tags, head)
        super().on_attempt_headers(attempt, head, end_stream)
        if one is not None and attempt.abandoned:
            self._over(attempt)

    def _start_retry(self, attempt: Attempt, verdict: int, after_timeout: bool = False) -> bool:
        begun = super()._start_retry(attempt, verdict, after_timeout)
        if begun:
            self._over(attempt)
        return begun

    def on_attempt_trailers(self, attempt: Attempt, trailers: Headers) -> None:
        """The response ends with trailers."""
        one = self._tries.get(attempt)
        if one is not None:
            tell_grpc(one.span.tags, trailers)
        super().on_attempt_trailers(attempt, trailers)

    def complete(self, attempt: Attempt) -> None:
        """The response has been read to its end."""
        super().complete(attempt)
        one = self._tries.get(attempt)
        if one is not None:
            one.done = True

    def on_attempt_failed(self, attempt: Attempt, reason: str, details: str) -> None:
        """A try ended without a complete response."""
        one = self._tries.get(attempt)
        if one is not None and not self.done and not attempt.abandoned:
            tags = one.span.tags
            one.done = True
            tags["error"] = b"true"
            tags["error.reason"] = reason.encode()
            one.flag = RESET_FLAGS.get(reason, 0)
            self._over(attempt)
        super().on_attempt_failed(attempt, reason, details)

    def on_per_try_timeout(self, attempt: Attempt, details: str) -> None:
        """A try took too long."""
        one = self._tries.get(attempt)
        if one is not None:
            one.flag |= flags.UT
        super().on_per_try_timeout(attempt, details)

    def _over(self, attempt: Attempt) -> None:
        one = self._tries.pop(attempt, None)
        if one is not None:
            if not one.done:
                one.span.tags["canceled"] = b"true"
            stream = self.stream
            tracing = stream.manager.tracing
            assert tracing is not None
            tracing.finish_try(stream, one.span, one.host, one.status, one.flag, self.router.clock() + stream.manager.wall_offset)

    def all_over(self) -> None:
        """The stream is over."""
        for attempt in list(self._tries):
            self._over(attempt)
