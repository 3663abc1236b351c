"""The ways of OpenTelemetry's spans to a collector: OTLP over gRPC or HTTP, to a cluster. The tracer is `tracing.opentelemetry`.

Source: envoy.config.trace.v3.OpenTelemetryConfig.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from meshproxy import __version__
from meshproxy.api import errors
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.codec.headers import RequestHead
from meshproxy.http import header_mutations
from meshproxy.http.client import HttpClient, HttpError
from meshproxy.observe.stream_info import StreamInfo
from meshproxy.tracing import resources, samplers
from meshproxy.tracing.opentelemetry import Exporter, NotTakenError, Tracer
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError

if TYPE_CHECKING:
    from meshproxy.context import Context

TYPE_URL = "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig"
HONOURS = {
    "envoy.config.trace.v3.OpenTelemetryConfig": "grpc_service http_service service_name resource_detectors sampler max_cache_size",
    "envoy.config.core.v3.HttpService": "http_uri request_headers_to_add",
    "envoy.config.core.v3.HttpUri": "uri cluster timeout",
    **header_mutations.HONOURS,
    **resources.HONOURS,
    **samplers.HONOURS,
}

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_USER_AGENT = f"OTel-OTLP-Exporter-meshproxy/{__version__}"
_TIMEOUT = 10.0  # of a call, in seconds: the default of OTLP's exporters


def compile(proto: Any, context: Context) -> Tracer:
    """A tracer. Raises ConfigError relative to `proto`."""
    return Tracer(proto, context, _exporter(proto, context))


class _ByGrpc:
    """Calls of the collector's service."""

    def __init__(self, service: Any, context: Context) -> None:
        if service.WhichOneof("target_specifier") != "envoy_grpc":
            errors.fail("google_grpc", "only envoy_grpc is supported", UNSUPPORTED)
        target = service.envoy_grpc
        metadata = [("user-agent", _USER_AGENT), *((one.key, one.value) for one in service.initial_metadata)]
        self._timeout = (_seconds(service.timeout) if service.HasField("timeout") else 0.0) or _TIMEOUT
        self._client = GrpcClient(context.clusters, target.cluster_name, authority=target.authority, metadata=metadata)

    async def export(self, request: bytes) -> None:
        """One call."""
        try:
            await self._client.unary(_EXPORT, request, timeout=self._timeout)
        except GrpcError as error:
            raise NotTakenError(str(error)) from error


class _ByHttp:
    """Requests to the collector, usually to `/v1/traces`."""

    def __init__(self, service: Any, context: Context) -> None:
        uri = service.http_uri
        with errors.under("request_headers_to_add"):
            self._mutate = header_mutations.compile_mutation(service.request_headers_to_add, (), "request_headers_to_add", request=True)
        try:
            parts = urlsplit(uri.uri)
            valid = parts.scheme in ("http", "https") and bool(parts.netloc) and uri.uri.isascii() and uri.uri.isprintable() and " " not in uri.uri
        except ValueError:
            valid = False
        if not valid:
            errors.fail("http_uri.uri", f"{uri.uri!r} is no absolute URI")
        self._authority = parts.netloc.encode()
        self._path = (parts.path or "/").encode() + (b"?" + parts.query.encode() if parts.query else b"")
        self._client = HttpClient(context, uri.cluster, timeout=_seconds(uri.timeout) or _TIMEOUT)

    async def export(self, request: bytes) -> None:
        """One request."""
        items = [(b"content-type", b"application/x-protobuf"), (b"user-agent", _USER_AGENT.encode()), (b"content-length", b"%d" % len(request))]
        head = RequestHead(b"POST", self._path, self._authority, items)
        if self._mutate is not None:
            self._mutate(StreamInfo(), head)
        try:
            answer = await self._client.request(head, request)
        except HttpError as error:
            raise NotTakenError(str(error)) from error
        if not 200 <= answer.head.status < 300:
            raise NotTakenError(f"the collector answered with status {answer.head.status}")


def _exporter(proto: Any, context: Context) -> Exporter:
    if proto.HasField("grpc_service") == proto.HasField("http_service"):
        errors.fail("grpc_service", "OpenTelemetry Tracer: exactly one of grpc_service and http_service is needed: nobody else would get the spans")
    if proto.HasField("http_service"):
        with errors.under("http_service"):
            return _ByHttp(proto.http_service, context)
    with errors.under("grpc_service"):
        return _ByGrpc(proto.grpc_service, context)


def _seconds(duration: Any) -> float:
    """A Duration."""
    return float(duration.seconds + duration.nanos / 1e9)
