"""Istio's telemetry.istio.io Telemetry, and of its MeshConfig what concerns traces."""

from __future__ import annotations

from typing import Any

from control.kinds import sidecar
from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.model.security import ROOT_NAMESPACE
from control.model.telemetry import DEFAULT_SAMPLING, MeshConfig, Provider, Tag, Telemetry, Tracing
from meshproxy.api import document
from meshproxy.api.errors import ConfigError

MESH_CONFIG = "istio"  # the ConfigMap in the root namespace whose `mesh` is the MeshConfig
_TAGS = {"literal": "value", "environment": "name", "header": "name", "formatter": "value"}


def parse(meta: Meta, body: Fields) -> Telemetry:
    """`spec` of a Telemetry."""
    spec = body.child("spec") or Fields({})
    spec.not_honoured("targetRef", "targetRefs", why="only a selector says which workloads are meant")
    spec.not_honoured("metrics", why="proxies have Envoy's statistics, and there is nothing to override in them")
    spec.not_honoured("accessLogging", why="access logs by policy are not served yet")
    selector = spec.child("selector")
    labels = (selector.string_map("matchLabels") or None) if selector is not None else None
    return Telemetry(meta.name, meta.namespace, labels, spec.each("tracing", _tracing))


def _tracing(fields: Fields) -> Tracing:
    match = fields.child("match")
    mode = match.text("mode", "CLIENT_AND_SERVER", choices=("CLIENT_AND_SERVER", "CLIENT", "SERVER")) if match is not None else "CLIENT_AND_SERVER"
    fields.not_honoured("enableIstioTags", why="the tags of Istio's are always set")
    providers = fields.each("providers", lambda one: one.text("name", required=True)) if "providers" in fields else None
    if providers is not None and len(providers) > 1:
        fields.error("providers", "a proxy sends its spans to one provider", "unsupported")
    return Tracing(
        "CLIENT" in mode,
        "SERVER" in mode,
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
    providers = {one.name: one for one in mesh.each("extensionProviders", _provider)}
    chosen = mesh.child("defaultProviders")
    defaults = chosen.texts("tracing") if chosen is not None else ()
    for position, name in enumerate(defaults):
        if name not in providers:
            mesh.error(f"defaultProviders.tracing[{position}]", f"there is no provider {name!r} in extensionProviders")
    config = mesh.child("defaultConfig")
    tracing = config.child("tracing") if config is not None else None
    sampling = tracing.number("sampling", DEFAULT_SAMPLING, high=100.0) if tracing is not None else DEFAULT_SAMPLING
    unknown = sidecar.unknown_of(mesh.child("outboundTrafficPolicy"))
    made = MeshConfig(providers, defaults, sampling, mesh.boolean("enableTracing", True) is not False, unknown)
    mesh.end()
    return made


def _provider(fields: Fields) -> Provider | None:
    name = fields.text("name", required=True)
    kind = fields.one_of("opentelemetry", *_OTHER_PROVIDERS, required=True)
    if kind and kind != "opentelemetry":
        fields.error(kind, f"{kind} is not served; of providers for traces opentelemetry is", "unsupported")
        fields.rest()
    if kind != "opentelemetry":
        return None
    below = fields.need(kind)
    below.not_honoured("resourceDetectors", "dynatraceSampler", "grpc", "serviceAttributeEnrichment")
    host = below.text("service", required=True).rpartition("/")[2]  # [<namespace>/]<host name>
    http = below.child("http")
    path, headers, timeout = _http(http) if http is not None else ("", (), 0.0)
    return Provider(name, host, below.port("port", required=True), below.integer("maxTagLength", 0) or 0, path, headers, timeout)


def _http(fields: Fields) -> tuple[str, tuple[tuple[str, str], ...], float]:
    path = fields.text("path", required=True)
    if path and (not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path):
        fields.error("path", f"{path!r} is no path")
    headers = fields.each("headers", lambda one: (one.text("name", required=True), one.text("value", required=True)))
    return path, headers, fields.duration("timeout") or 0.0


_OTHER_PROVIDERS = (
    "zipkin", "lightstep", "datadog", "stackdriver", "opencensus", "skywalking", "prometheus", "envoyFileAccessLog", "envoyHttpAls", "envoyTcpAls",
    "envoyOtelAls", "envoyExtAuthzHttp", "envoyExtAuthzGrpc", "sds",
)  # fmt: skip
