"""The OpenTelemetry tracer: W3C contexts, and spans by OTLP to an exporter (`http.opentelemetry`).

Spans wait until there are some (`tracing.opentelemetry.min_flush_spans`, 5) or some time has passed (`tracing.opentelemetry.flush_interval_ms`, 5000), both
runtime keys of Envoy's. No more than `max_cache_size` wait or are on their way at a time; those that come on top are counted and dropped, as are those
whose call fails.

Source: envoy.config.trace.v3.OpenTelemetryConfig.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy import __version__
from meshproxy.api import errors
from meshproxy.tracing import context, otlp, resources, samplers
from meshproxy.tracing.batch import Batch
from meshproxy.tracing.span import Span

if TYPE_CHECKING:
    from meshproxy.codec.headers import RequestHead
    from meshproxy.context import Context

log = logging.getLogger("meshproxy.tracing")

_MAX_CACHE = 1024  # spans


class NotTakenError(Exception):
    """A collector that did not take what it was sent; the text says why."""


class Exporter(Protocol):
    """The way to a collector."""

    async def export(self, request: bytes) -> None:
        """An ExportTraceServiceRequest. Raises NotTakenError."""


class Tracer:
    """Shared by all connection managers of a worker that have the same provider."""

    def __init__(self, proto: Any, context: Context, exporter: Exporter) -> None:
        self._bits = context.random.getrandbits
        self._sampler = None
        if proto.HasField("sampler"):
            with errors.under("sampler"):
                self._sampler = samplers.compile_sampler(proto.sampler)
        self._resource = otlp.encode_resource(resources.detect(proto.service_name, proto.resource_detectors))
        self._scope = otlp.encode_scope("meshproxy", __version__)
        self._exporter = exporter
        scope = context.stats.scope("tracing.opentelemetry.")
        self._sent = scope.counter("spans_sent")
        self._flushed_by_timer = scope.counter("timer_flushed")
        self._dropped = scope.counter("spans_dropped")
        limit = proto.max_cache_size.value if proto.HasField("max_cache_size") else _MAX_CACHE
        self._batch: Batch[bytes] = Batch(context, "tracing.opentelemetry", limit, self._export, self._on_timer)

    # -- spans

    def start(self, head: RequestHead, name: bytes, *, client: bool, traced: bool, at: float) -> Span | None:
        """The span of a request; None where the context of its head cannot be understood: then nothing is said about it to anybody, as in Envoy."""
        try:
            parent = context.extract_w3c(head)
        except context.Malformed:
            return None
        trace_id = b"%032x" % (self._bits(128) or 1) if parent is None else parent.trace_id
        if not traced:
            sampled = False
        elif self._sampler is not None:
            sampled = self._sampler(parent, trace_id)
        else:
            sampled = parent is None or parent.sampled
        span = Span(self, trace_id, self._new_id(), name, at, client=client, sampled=sampled)
        if parent is not None:
            span.parent = parent.span_id
            span.remote = True
            span.state = parent.state
        return span

    def child(self, of: Span, name: bytes, at: float, client: bool) -> Span:
        """A span within another: always a client's."""
        span = Span(self, of.trace_id, self._new_id(), name, at, client=True, sampled=of.sampled)
        span.parent = of.id
        span.state = of.state
        return span

    def _new_id(self) -> bytes:
        return b"%016x" % (self._bits(64) or 1)

    def inject(self, span: Span, head: RequestHead) -> None:
        """Tell a server about a span."""
        context.inject_w3c(head, span.trace_id, span.id, span.sampled, span.state)

    def root(self) -> bytes:
        """HOT: the `traceparent` of a new trace that is not sampled."""
        return b"00-%032x-%016x-00" % (self._bits(128) or 1, self._bits(64) or 1)

    @staticmethod
    def inject_root(head: RequestHead, value: bytes) -> bool:
        """What `inject` does for such a span; False, and nothing done, where a head says something of another."""
        if context.TRACEPARENT in head or context.TRACESTATE in head:
            return False
        head.add(context.TRACEPARENT, value)
        head.add(context.TRACESTATE, b"")
        return True

    # -- sending

    def send(self, span: Span, end: float) -> None:
        """A sampled span has ended."""
        if not self._batch.put(otlp.encode_span(span, end)):
            self._dropped.n += 1

    def _on_timer(self) -> None:
        self._flushed_by_timer.n += 1

    async def _export(self, spans: list[bytes]) -> None:
        try:
            await self._exporter.export(otlp.encode_request(self._resource, self._scope, spans))
            self._sent.n += len(spans)
        except NotTakenError as error:
            self._dropped.n += len(spans)
            log.debug("%d spans were not taken: %s", len(spans), error)
