"""What listeners tell about requests and connections: traces, Istio's metrics, access logs."""

from __future__ import annotations

from typing import Any, NamedTuple

from control.model.metrics import Condition, LogSettings, MetricsSettings
from control.model.telemetry import Tag, TracingSettings
from control.translate.resource import duration, typed

Traces = tuple[TracingSettings, str] | None  # what is traced and how, and the cluster of who gets it
Local = tuple[tuple[str, str], ...]  # of whom: fields of a node's metadata; labels as `LABELS.<name>`

_EXPORT_TIMEOUT_S = 10.0  # of a request with spans
_PEERS = "io.istio.http.peer_metadata.Config"
_STATS = "stats.PluginConfig"
_GRPC_STATS = "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig"
_FILE_LOG = "envoy.extensions.access_loggers.file.v3.FileAccessLog"
_HEADERS: list[dict[str, Any]] = [{"istio_headers": {}}]
_HEARS = {"name": "istio.metadata_exchange", "typed_config": typed(_PEERS, downstream_discovery=_HEADERS, downstream_propagation=_HEADERS)}
_TELLS = {
    "name": "istio.metadata_exchange",
    "typed_config": typed(_PEERS, upstream_discovery=_HEADERS, upstream_propagation=[{"istio_headers": {"skip_external_clusters": True}}]),
}
_MESSAGES = {"name": "envoy.filters.http.grpc_stats", "typed_config": typed(_GRPC_STATS, emit_filter_state=True, stats_for_all_methods=False)}
# Istio's format of access logs.
_FORMAT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% '
    '%CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% '
    '%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" '
    "%UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)


class Told(NamedTuple):
    """What one side of a proxy tells. `metrics` None: it counts nothing, or cannot; `local`: who it is."""

    traces: Traces = None
    metrics: MetricsSettings | None = None
    logs: tuple[LogSettings, ...] = ()
    local: Local = ()

    def http_filters(self, filters: list[dict[str, Any]], *, inbound: bool = False, edge: bool = False) -> list[dict[str, Any]]:
        """The filters of a connection manager, of which the last is the router, with those for metrics among them, where Istio has them."""
        if self.metrics is None:
            return filters
        counting = [_MESSAGES] if self.metrics.messages else []
        return [_HEARS if inbound else _TELLS, *filters[:-1], *counting, _stats(self.metrics, by_host=not (inbound or edge)), filters[-1]]

    def network_filters(self) -> list[dict[str, Any]]:
        """Of plain connections."""
        return [] if self.metrics is None else [_stats(self.metrics, by_host=False)]

    def manager(self) -> dict[str, Any]:
        """What a connection manager has for it besides."""
        return {**_tracing(self.traces), **self.access_log()}

    def metadata(self) -> dict[str, Any]:
        """Of the listener: who the proxy is, for its metrics."""
        if self.metrics is None:
            return {}
        plain = {name: value for name, value in self.local if not name.startswith("LABELS.")}
        labels = {name.removeprefix("LABELS."): value for name, value in self.local if name.startswith("LABELS.")}
        return {"metadata": {"filter_metadata": {"istio": {**plain, "LABELS": labels}}}}

    def access_log(self) -> dict[str, Any]:
        """Of a TCP proxy."""
        return {"access_log": [_log(one) for one in self.logs]} if self.logs else {}


QUIET = Told()


def _stats(settings: MetricsSettings, *, by_host: bool) -> dict[str, Any]:
    config: dict[str, Any] = {} if by_host else {"disable_host_header_fallback": True}
    if settings.interval_s is not None:
        config["tcp_reporting_duration"] = duration(settings.interval_s)
    if settings.metrics:
        config["metrics"] = [
            {"name": one.name, "drop": one.dropped, "tags_to_remove": list(one.removed), "dimensions": dict(one.values)} for one in settings.metrics
        ]
    return {"name": "istio.stats", "typed_config": typed(_STATS, **config)}


def _log(settings: LogSettings) -> dict[str, Any]:
    provider = settings.provider
    if provider.labels is not None:
        shape: dict[str, Any] = {"json_format": dict(provider.labels)}
    else:
        text = provider.text or _FORMAT
        shape = {"text_format_source": {"inline_string": text if text.endswith("\n") else f"{text}\n"}}
    made: dict[str, Any] = {"name": "envoy.access_loggers.file", "typed_config": typed(_FILE_LOG, path=provider.path, log_format=shape)}
    if settings.conditions:
        made["filter"] = _either("or_filter", [_either("and_filter", [_compared(one) for one in group]) for group in settings.conditions])
    return made


def _either(kind: str, filters: list[dict[str, Any]]) -> dict[str, Any]:
    return filters[0] if len(filters) == 1 else {kind: {"filters": filters}}


def _compared(one: Condition) -> dict[str, Any]:
    value = {"default_value": one.code, "runtime_key": "access_log.response_code"}
    return {"status_code_filter": {"comparison": {"op": one.op, "value": value}}}


def _tracing(traces: Traces) -> dict[str, Any]:
    """What a connection manager has for it."""
    if traces is None:
        return {}
    settings, cluster = traces
    target = settings.provider
    if target.http_path:
        host = f"[{target.host}]" if ":" in target.host else target.host
        uri = {"uri": f"http://{host}:{target.port}{target.http_path}", "cluster": cluster, "timeout": duration(target.http_timeout_s or _EXPORT_TIMEOUT_S)}
        headers = [{"header": {"key": name, "value": value}} for name, value in target.http_headers]
        way: dict[str, Any] = {"http_service": {"http_uri": uri, "request_headers_to_add": headers}}
    else:
        way = {"grpc_service": {"envoy_grpc": {"cluster_name": cluster, "authority": target.host}}}
    provider = typed("envoy.config.trace.v3.OpenTelemetryConfig", service_name=settings.service_name, **way)
    made: dict[str, Any] = {
        "client_sampling": {"value": 100},
        "random_sampling": {"value": settings.sampling},
        "overall_sampling": {"value": 100},
        "custom_tags": [_custom_tag(tag) for tag in settings.tags],
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": provider},
    }
    if settings.provider.max_tag_length:
        made["max_path_tag_length"] = settings.provider.max_tag_length
    if settings.by_request_id:
        return {"tracing": made}
    uuids = typed("envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig", use_request_id_for_trace_sampling=False)
    return {"tracing": made, "request_id_extension": {"typed_config": uuids}}


def _custom_tag(tag: Tag) -> dict[str, Any]:
    if tag.kind == "literal":
        return {"tag": tag.name, "literal": {"value": tag.value}}
    if tag.kind == "formatter":
        return {"tag": tag.name, "value": tag.value}
    return {"tag": tag.name, "environment" if tag.kind == "environment" else "request_header": {"name": tag.value, "default_value": tag.default}}
