"""The OpenTelemetry tracer: W3C contexts, and spans by OTLP over gRPC to a cluster.

Spans wait until there are some (`tracing.opentelemetry.min_flush_spans`, 5) or some time has passed (`tracing.opentelemetry.flush_interval_ms`, 5000), both
runtime keys of Envoy's. No more than `max_cache_size` wait or are on their way at a time; those that come on top are counted and dropped, as are those
whose call fails.

Source: envoy.config.trace.v3.OpenTelemetryConfig.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from meshproxy import __version__
from meshproxy.api import errors
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.tracing import context, otlp, resources, samplers
from meshproxy.tracing.batch import Batch
from meshproxy.tracing.span import Span
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError

if TYPE_CHECKING:
    from meshproxy.codec.headers import RequestHead
    from meshproxy.context import Context

log = logging.getLogger("meshproxy.tracing")

TYPE_URL = "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig"
HONOURS = {
    "envoy.config.trace.v3.OpenTelemetryConfig": "grpc_service service_name resource_detectors sampler max_cache_size",
    **resources.HONOURS,
    **samplers.HONOURS,
}

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_MAX_CACHE = 1024  # spans
_TIMEOUT = 10.0  # of a call, in seconds: the default of OTLP's exporters


def compile(proto: Any, context: Context) -> Tracer:
    """A tracer. Raises ConfigError relative to `proto`."""
    return Tracer(proto, context)


class Tracer:
    """Shared by all connection managers of a worker that have the same provider."""

    def __init__(self, proto: Any, context: Context) -> None:
        self._bits = context.random.getrandbits
        self._sampler = None
        if proto.HasField("sampler"):
            with errors.under("sampler"):
                self._sampler = samplers.compile_sampler(proto.sampler)
        self._resource = otlp.encode_resource(resources.detect(proto.service_name, proto.resource_detectors))
        self._scope = otlp.encode_scope("meshproxy", __version__)
        self._client, self._timeout = _client(proto, context)
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
        """A span within another."""
        span = Span(self, of.trace_id, self._new_id(), name, at, client=client, sampled=of.sampled)
        span.parent = of.id
        span.state = of.state
        return span

    def _new_id(self) -> bytes:
        return b"%016x" % (self._bits(64) or 1)

    def inject(self, span: Span, head: RequestHead) -> None:
        """Tell a server about a span."""
        context.inject_w3c(head, span.trace_id, span.id, span.sampled, span.state)

    # -- sending

    def send(self, span: Span, end: float) -> None:
        """A sampled span has ended."""
        if not self._batch.put(otlp.encode_span(span, end)):
            self._dropped.n += 1

    def _on_timer(self) -> None:
        self._flushed_by_timer.n += 1

    async def _export(self, spans: list[bytes]) -> None:
        try:
            await self._client.unary(_EXPORT, otlp.encode_request(self._resource, self._scope, spans), timeout=self._timeout)
            self._sent.n += len(spans)
        except GrpcError as error:
            self._dropped.n += len(spans)
            log.debug("%d spans were not taken: %s", len(spans), error)


def _client(proto: Any, context: Context) -> tuple[Any, float]:
    if not proto.HasField("grpc_service"):
        errors.fail("grpc_service", "value is required: nobody would get the spans")
    with errors.under("grpc_service"):
        service = proto.grpc_service
        if service.WhichOneof("target_specifier") != "envoy_grpc":
            errors.fail("google_grpc", "only envoy_grpc is supported", UNSUPPORTED)
        target = service.envoy_grpc
        metadata = [(one.key, one.value) for one in service.initial_metadata]
        timeout = service.timeout.seconds + service.timeout.nanos / 1e9 if service.HasField("timeout") else 0.0
    metadata = [("user-agent", f"OTel-OTLP-Exporter-meshproxy/{__version__}"), *metadata]
    return GrpcClient(context.clusters, target.cluster_name, authority=target.authority, metadata=metadata), timeout or _TIMEOUT
