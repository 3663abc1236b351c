"""Istio's telemetry.istio.io Telemetry, and its MeshConfig."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from control.kinds import ext_authz, mesh_config, security, sidecar
from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.model.metrics import METRICS, PROMETHEUS, STDOUT, Condition, Defaults, Logging, LogProvider, Metrics, Override
from control.model.security import ROOT_NAMESPACE, Authorizer
from control.model.telemetry import DEFAULT_SAMPLING, MeshConfig, Provider, Tag, Telemetry, Tracing
from meshproxy.api import attributes, document
from meshproxy.api.errors import ConfigError

MESH_CONFIG = "istio"  # the ConfigMap in the root namespace whose `mesh` is the MeshConfig
_COMPARISON = re.compile(r"response\.code\s*(==|>=|<=|>|<)\s*([0-9]{1,5})")
# What a line says as JSON where nothing else is asked for, as in Istio.
_JSON_LOG = tuple(sorted({
    "authority": "%REQ(:AUTHORITY)%", "bytes_received": "%BYTES_RECEIVED%", "bytes_sent": "%BYTES_SENT%",
    "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%", "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%", "duration": "%DURATION%", "method": "%REQ(:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "protocol": "%PROTOCOL%", "request_id": "%REQ(X-REQUEST-ID)%",
    "requested_server_name": "%REQUESTED_SERVER_NAME%", "response_code": "%RESPONSE_CODE%", "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "response_flags": "%RESPONSE_FLAGS%", "route_name": "%ROUTE_NAME%", "start_time": "%START_TIME%", "upstream_cluster": "%UPSTREAM_CLUSTER%",
    "upstream_host": "%UPSTREAM_HOST%", "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
    "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%", "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    "user_agent": "%REQ(USER-AGENT)%", "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
}.items()))  # fmt: skip
_TAGS = {"literal": "value", "environment": "name", "header": "name", "formatter": "value"}


def parse(meta: Meta, body: Fields) -> Telemetry:
    """`spec` of a Telemetry."""
    spec = body.child("spec") or Fields({})
    selector = spec.child("selector")
    labels = (selector.string_map("matchLabels") or None) if selector is not None else None
    targets = security.targets(meta, spec)
    parts = spec.each("tracing", _tracing), spec.each("metrics", _metrics), spec.each("accessLogging", _logging)
    return Telemetry(meta.name, meta.namespace, labels, *parts, targets)


def _sides(match: Fields | None) -> tuple[bool, bool]:
    """Of clients, of servers."""
    mode = match.text("mode", "CLIENT_AND_SERVER", choices=("CLIENT_AND_SERVER", "CLIENT", "SERVER")) if match is not None else "CLIENT_AND_SERVER"
    return "CLIENT" in mode, "SERVER" in mode


def _metrics(fields: Fields) -> Metrics:
    return Metrics(
        fields.each("providers", lambda one: one.text("name", required=True)), fields.duration("reportingInterval"), fields.each("overrides", _override)
    )


def _override(fields: Fields) -> Override:
    match = fields.child("match")
    metric = ""
    if match is not None:
        match.not_honoured("customMetric", why="there are Istio's standard metrics, and no others")
        metric = match.text("metric", "ALL_METRICS", choices=("ALL_METRICS", *METRICS))
    names = (METRICS[metric],) if metric in METRICS else ()
    return Override(*_sides(match), names, fields.boolean("disabled", None), tuple(fields.mapping("tagOverrides", _tag_override).values()))


def _tag_override(fields: Fields, name: str) -> tuple[str, str | None]:
    one = fields.need(name)
    value = one.text("value")
    if one.text("operation", "UPSERT", choices=("UPSERT", "REMOVE")) == "REMOVE":
        return name, None
    try:
        attributes.parse(value)
    except ConfigError as error:
        one.error("value", str(error), "unsupported")
    return name, value


def _logging(fields: Fields) -> Logging:
    condition = fields.child("filter")
    sides = _sides(fields.child("match"))
    providers = fields.each("providers", lambda one: one.text("name", required=True))
    return Logging(*sides, providers, bool(fields.boolean("disabled")), _conditions(condition) if condition is not None else ())


def _conditions(fields: Fields) -> tuple[tuple[Condition, ...], ...]:
    """Comparisons of the response's code; CEL is more than that."""
    text = fields.text("expression", required=True)
    made = []
    for alternative in text.split("||"):
        group = []
        for part in alternative.split("&&"):
            found = _COMPARISON.fullmatch(part.strip())
            if found is None:
                fields.error("expression", f"{part.strip()!r} is no comparison of response.code with a number: no other conditions are served", "unsupported")
                return ()
            op, code = found[1], int(found[2])
            group.append({"==": Condition("EQ", code), ">=": Condition("GE", code), "<=": Condition("LE", code)}.get(op) or _strict(op, code))
        made.append(tuple(group))
    return tuple(made)


def _strict(op: str, code: int) -> Condition:
    return Condition("GE", code + 1) if op == ">" else Condition("LE", max(code - 1, 0))


def _tracing(fields: Fields) -> Tracing:
    sides = _sides(fields.child("match"))
    fields.not_honoured("enableIstioTags", why="the tags of Istio's are always set")
    providers = fields.each("providers", lambda one: one.text("name", required=True)) if "providers" in fields else None
    if providers is not None and len(providers) > 1:
        fields.error("providers", "a proxy sends its spans to one provider", "unsupported")
    return Tracing(
        *sides,
        providers,
        fields.number("randomSamplingPercentage", 0.0, high=100.0) if "randomSamplingPercentage" in fields else None,
        fields.boolean("disableSpanReporting", None),
        tuple(fields.mapping("customTags", _tag).values()) if "customTags" in fields else None,
        fields.boolean("useRequestIdForTraceSampling", None),
    )


def _tag(fields: Fields, name: str) -> Tag | None:
    one = fields.need(name)
    kind = one.one_of(*_TAGS, required=True)
    if not kind:
        return None
    inner = one.need(kind)
    default = inner.text("defaultValue") if _TAGS[kind] == "name" else ""
    return Tag(name, kind, inner.text(_TAGS[kind], required=True), default)


def is_mesh_config(meta: Meta) -> bool:
    """Whether a ConfigMap is Istio's own, with the MeshConfig."""
    return meta.name == MESH_CONFIG and meta.namespace == ROOT_NAMESPACE


def parse_mesh_config(body: Fields) -> MeshConfig | None:
    """`data.mesh` of that ConfigMap: a document of its own."""
    data = body.rest_of("data")
    text = data.text("mesh")
    if not text:
        return None
    try:
        value: Any = document.parse(text)
    except ConfigError as error:
        body.error("data.mesh", str(error))
        return None
    if not isinstance(value, dict):
        body.error("data.mesh", "must be a mapping")
        return None
    mesh = Fields(value, "data.mesh", body.problems)
    each = mesh.each("extensionProviders", _provider)
    found = dict(each)
    if len(found) < len(each):
        mesh.error("extensionProviders", "names must differ")
    providers = {name: one for name, one in found.items() if isinstance(one, Provider)}
    logs = {STDOUT: LogProvider(), **{name: one for name, one in found.items() if isinstance(one, LogProvider)}}
    authorizers = {name: one for name, one in found.items() if isinstance(one, Authorizer)}
    counters = frozenset((PROMETHEUS, *(name for name, one in found.items() if one is None)))
    chosen = mesh.child("defaultProviders") or Fields({})
    defaults = _chosen(mesh, chosen, "tracing", providers)
    beside = Defaults(
        counters,
        _chosen(mesh, chosen, "metrics", counters) if "metrics" in chosen else (PROMETHEUS,),
        tuple(sorted(logs.items())),
        _chosen(mesh, chosen, "accessLogging", logs),
        _log_file(mesh),
    )
    unknown = sidecar.unknown_of(mesh.child("outboundTrafficPolicy"))
    traced = mesh.boolean("enableTracing", True) is not False
    proxies = mesh.child("defaultConfig")
    sampling, tags = _default_tracing(proxies, traced) if proxies is not None else (DEFAULT_SAMPLING, ())
    domain, aliases = mesh_config.trust_domain(mesh)
    general = mesh_config.general(mesh, proxies)
    made = MeshConfig(providers, defaults, sampling, traced, unknown, beside, authorizers, tags, domain, aliases, general=general)
    mesh.end()
    return made


def _default_tracing(config: Fields, traced: bool) -> tuple[float, tuple[Tag, ...]]:
    """Of defaultConfig: percent of requests that are sampled, and custom tags."""
    tracing = mesh_config.check_proxy(config, traced=traced)
    if tracing is None:
        return DEFAULT_SAMPLING, ()
    return tracing.number("sampling", DEFAULT_SAMPLING, high=100.0), tuple(tracing.mapping("customTags", _tag).values())


def _chosen(mesh: Fields, chosen: Fields, what: str, known: Container[str]) -> tuple[str, ...]:
    """Names of default providers."""
    names = chosen.texts(what)
    for position, name in enumerate(names):
        if name not in known:
            mesh.error(f"defaultProviders.{what}[{position}]", f"there is no provider {name!r} in extensionProviders")
    return names


def _log_file(mesh: Fields) -> LogProvider | None:
    """The older way to have access logs, of everybody."""
    path, text = mesh.text("accessLogFile"), mesh.text("accessLogFormat")
    if mesh.text("accessLogEncoding", "TEXT", choices=("TEXT", "JSON")) == "TEXT":
        return LogProvider(path, text) if path else None
    labels = _JSON_LOG
    if text:
        try:
            value: Any = document.parse(text)
        except ConfigError as error:
            value, why = None, str(error)
        else:
            why = "must be a mapping of names to texts, since accessLogEncoding is JSON"
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            mesh.error("accessLogFormat", why)
            return None
        labels = tuple(sorted(value.items()))
    return LogProvider(path, labels=labels) if path else None


def _file_log(fields: Fields) -> LogProvider:
    form = fields.child("logFormat")
    path = fields.text("path", "/dev/stdout")
    fields.not_honoured("omitEmptyValues")
    if form is None:
        return LogProvider(path)
    kind = form.one_of("text", "labels")
    if kind == "labels":
        return LogProvider(path, labels=tuple(sorted(form.string_map("labels").items())))
    return LogProvider(path, form.text("text"))


def _provider(fields: Fields) -> tuple[str, Provider | LogProvider | Authorizer | None] | None:
    """Its name, and what it is; None: metrics, to be scraped."""
    name = fields.text("name", required=True)
    kind = fields.one_of("opentelemetry", "envoyFileAccessLog", "prometheus", *ext_authz.KINDS, *_OTHER_PROVIDERS, required=True)
    if kind == "envoyFileAccessLog":
        return name, _file_log(fields.need(kind))
    if kind in ext_authz.KINDS:
        return name, ext_authz.parse(fields, name, kind)
    if kind == "prometheus":
        fields.child(kind)
        return name, None
    if kind and kind != "opentelemetry":
        fields.error(kind, f"{kind} is not served; opentelemetry is for traces, prometheus for metrics, envoyFileAccessLog for access logs", "unsupported")
        fields.rest()
    if kind != "opentelemetry":
        return None
    below = fields.need(kind)
    below.not_honoured("resourceDetectors", "dynatraceSampler", "grpc", "serviceAttributeEnrichment")
    host = below.text("service", required=True).rpartition("/")[2]  # [<namespace>/]<host name>
    http = below.child("http")
    path, headers, timeout = _http(http) if http is not None else ("", (), 0.0)
    return name, Provider(name, host, below.port("port", required=True), below.integer("maxTagLength", 0) or 0, path, headers, timeout)


def _http(fields: Fields) -> tuple[str, tuple[tuple[str, str], ...], float]:
    path = fields.text("path", required=True)
    if path and (not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path):
        fields.error("path", f"{path!r} is no path")
    headers = fields.each("headers", lambda one: (one.text("name", required=True), one.text("value", required=True)))
    return path, headers, fields.duration("timeout") or 0.0


_OTHER_PROVIDERS = (
    "zipkin", "lightstep", "datadog", "stackdriver", "opencensus", "skywalking", "envoyHttpAls", "envoyTcpAls",
    "envoyOtelAls", "sds",
)  # fmt: skip
