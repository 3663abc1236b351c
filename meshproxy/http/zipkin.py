"""The Zipkin tracer: B3 contexts, W3C's beside them where that is asked for, and spans as JSON (version 2) by HTTP to a cluster.

A server's span shares the id of its caller's, as Zipkin's own model has it, unless `shared_span_context` is off. Source: envoy.config.trace.v3.ZipkinConfig.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.codec.headers import RequestHead
from meshproxy.http.client import HttpClient, HttpError
from meshproxy.net.interfaces import machine_address
from meshproxy.tracing import context as contexts
from meshproxy.tracing.batch import Batch
from meshproxy.tracing.span import Span

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.tracing.context import SpanContext

TYPE_URL = "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig"
HONOURS = {
    "envoy.config.trace.v3.ZipkinConfig": (
        "collector_cluster collector_endpoint trace_id_128bit shared_span_context collector_endpoint_version collector_hostname trace_context_option"
    ),
}

_HTTP_JSON = 1  # CollectorEndpointVersion
_WITH_W3C = 1  # TraceContextOption
_LIMIT = 1024  # spans that wait or are being sent
_STATS = ("spans_sent", "timer_flushed", "reports_skipped_no_cluster", "reports_sent", "reports_dropped", "reports_failed")


def compile(proto: Any, context: Context) -> Tracer:
    """A tracer. Raises ConfigError relative to `proto`."""
    return Tracer(proto, context)


class Tracer:
    """Shared by all connection managers of a worker that have the same provider."""

    def __init__(self, proto: Any, context: Context) -> None:
        if not proto.collector_cluster:
            errors.fail("collector_cluster", "value is required: nobody would get the spans")
        if proto.collector_endpoint_version != _HTTP_JSON:
            errors.fail("collector_endpoint_version", "only HTTP_JSON is supported", UNSUPPORTED)
        self._bits = context.random.getrandbits
        self._wide = proto.trace_id_128bit
        self._shares = proto.shared_span_context.value if proto.HasField("shared_span_context") else True
        self._w3c = proto.trace_context_option == _WITH_W3C
        address = machine_address()
        node = context.node
        where = {"ipv6" if ":" in address else "ipv4": address, "port": 0}
        self._endpoint = {"serviceName": "" if node is None else node.cluster, **where}
        self._host = (proto.collector_hostname or proto.collector_cluster).encode()
        self._path = proto.collector_endpoint.encode()
        self._cluster = proto.collector_cluster
        self._context = context
        self._client = HttpClient(context, proto.collector_cluster, timeout=context.runtime.integer("tracing.zipkin.request_timeout", 5000) / 1000)
        scope = context.stats.scope("tracing.zipkin.")
        self._stats = {name: scope.counter(name) for name in _STATS}
        self._batch: Batch[dict[str, Any]] = Batch(context, "tracing.zipkin", _LIMIT, self._report, self._on_timer)

    # -- spans

    def start(self, head: RequestHead, name: bytes, *, client: bool, traced: bool, at: float) -> Span | None:
        """The span of a request; None where the context of its head cannot be understood: then nothing is said about it to anybody, as in Envoy."""
        try:
            sampled, parent = self._extract(head, traced)
        except contexts.Malformed:
            return None
        name = head.authority  # as Envoy names them
        if parent is None:
            id = self._new_id()
            span = Span(self, self._new_id() + id if self._wide else id, id, name, at, client=client, sampled=sampled)
        elif client or not self._shares:
            span = Span(self, parent.trace_id, self._new_id(), name, at, client=client, sampled=sampled)
            span.parent = parent.span_id
        else:
            span = Span(self, parent.trace_id, parent.span_id, name, at, client=client, sampled=sampled)
            span.parent = parent.parent_id
        span.shared = not client and self._shares
        span.single = contexts.B3 in head
        return span

    def _extract(self, head: RequestHead, traced: bool) -> tuple[bool, SpanContext | None]:
        """Whether the trace is sampled, and what the caller says of its span."""
        sampled = contexts.b3_sampled(head, traced)
        parent = contexts.extract_b3(head, sampled)
        if parent is None and self._w3c and contexts.B3 not in head and contexts.B3_SAMPLED not in head:
            with contextlib.suppress(contexts.Malformed):  # in this place what is wrong counts as not there
                parent = contexts.extract_w3c(head)
                if parent is not None:
                    sampled = parent.sampled
        return sampled, parent

    def child(self, of: Span, name: bytes, at: float, client: bool) -> Span:
        """A span within another; a server's shares its id, too."""
        shared = not client and self._shares
        span = Span(self, of.trace_id, of.id if shared else self._new_id(), name, at, client=client, sampled=of.sampled)
        span.parent = of.parent if shared else of.id
        span.shared = shared
        span.single = of.single
        return span

    def _new_id(self) -> bytes:
        return b"%016x" % (self._bits(64) or 1)

    def inject(self, span: Span, head: RequestHead) -> None:
        """Tell a server about a span, in the manner in which the client told us about its own."""
        contexts.inject_b3(head, span.trace_id, span.id, span.parent, span.sampled, single=span.single)
        if self._w3c:
            contexts.inject_w3c(head, span.trace_id, span.id, span.sampled, None)

    # -- sending

    def send(self, span: Span, end: float) -> None:
        """A sampled span has ended."""
        made: dict[str, Any] = {
            "traceId": span.trace_id.decode(),
            "id": span.id.decode(),
            "name": span.name.decode("utf-8", "replace"),
            "kind": "CLIENT" if span.client else "SERVER",
            "timestamp": int(span.start * 1e6),
            "duration": max(1, int((end - span.start) * 1e6)),
            "localEndpoint": self._endpoint,
            "tags": {name: value.decode("utf-8", "replace") for name, value in span.tags.items()},
            "annotations": [
                *({"timestamp": int(when * 1e6), "value": what} for when, what in span.events),
                {"timestamp": int(end * 1e6), "value": "cr" if span.client else "ss"},
            ],
        }
        if span.parent:
            made["parentId"] = span.parent.decode()
        if span.shared:
            made["shared"] = True
        if not self._batch.put(made):
            self._stats["reports_dropped"].n += 1

    def _on_timer(self) -> None:
        self._stats["timer_flushed"].n += 1

    async def _report(self, spans: list[dict[str, Any]]) -> None:
        stats = self._stats
        if self._context.clusters.get(self._cluster) is None:
            stats["reports_skipped_no_cluster"].n += 1
            return
        stats["spans_sent"].n += len(spans)
        body = json.dumps(spans, separators=(",", ":")).encode()
        head = RequestHead(b"POST", self._path, self._host, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))])
        try:
            answer = await self._client.request(head, body)
        except HttpError:
            stats["reports_failed"].n += 1
            return
        stats["reports_sent" if answer.head.status == 202 else "reports_dropped"].n += 1
