"""The ways of OpenTelemetry's spans to a collector: OTLP over gRPC or HTTP, to a cluster. The tracer is `tracing.opentelemetry`.

Source: envoy.config.trace.v3.OpenTelemetryConfig.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy import __version__
from meshproxy.api import errors
from meshproxy.api.durations import seconds, seconds_of
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.codec.headers import RequestHead
from meshproxy.http import header_mutations, http_uri
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
        self._timeout = seconds_of(service, "timeout", 0.0) or _TIMEOUT
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
        parts = http_uri.split(uri.uri)
        if parts is None:
            errors.fail("http_uri.uri", f"{uri.uri!r} is no absolute URI")
        self._authority = parts.netloc.encode()
        self._path = http_uri.target(parts)
        self._client = HttpClient(context, uri.cluster, timeout=seconds(uri.timeout) or _TIMEOUT)

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
