"""Extensions: which module compiles which message type.

A new extension is one line here. Modules are imported when a configuration first names their type, so an extension that nobody uses costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from meshproxy.api import errors, messages
from meshproxy.api.errors import UNSUPPORTED, ConfigError

if TYPE_CHECKING:
    from types import ModuleType

TYPE_PREFIX = "type.googleapis.com/"
_TYPED_STRUCTS = ("xds.type.v3.TypedStruct", "udpa.type.v1.TypedStruct")

_E = "envoy.extensions."

# kind of extension -> {message name: module}. A module may compile several messages, such as a filter and its per-route overrides.
KINDS: dict[str, dict[str, str]] = {
    "http filter": {
        f"{_E}filters.http.router.v3.Router": "meshproxy.http.router",
        f"{_E}filters.http.rbac.v3.RBAC": "meshproxy.http.filters.rbac",
        f"{_E}filters.http.fault.v3.HTTPFault": "meshproxy.http.filters.fault",
        f"{_E}filters.http.local_ratelimit.v3.LocalRateLimit": "meshproxy.http.filters.local_ratelimit",
        f"{_E}filters.http.cors.v3.Cors": "meshproxy.http.filters.cors",
        f"{_E}filters.http.header_mutation.v3.HeaderMutation": "meshproxy.http.filters.header_mutation",
        f"{_E}filters.http.jwt_authn.v3.JwtAuthentication": "meshproxy.http.filters.jwt_authn",
        f"{_E}filters.http.ext_authz.v3.ExtAuthz": "meshproxy.http.filters.ext_authz",
        f"{_E}filters.http.health_check.v3.HealthCheck": "meshproxy.http.filters.health_check",
        f"{_E}filters.http.buffer.v3.Buffer": "meshproxy.http.filters.buffer",
        f"{_E}filters.http.on_demand.v3.OnDemand": "meshproxy.http.filters.on_demand",
        f"{_E}filters.http.grpc_stats.v3.FilterConfig": "meshproxy.http.filters.grpc_stats",
        f"{_E}filters.http.grpc_web.v3.GrpcWeb": "meshproxy.http.filters.grpc_web",
        f"{_E}filters.http.grpc_http1_bridge.v3.Config": "meshproxy.http.filters.grpc_http1_bridge",
        f"{_E}filters.http.grpc_http1_reverse_bridge.v3.FilterConfig": "meshproxy.http.filters.grpc_http1_reverse_bridge",
        "meshproxy.python.v1.Filter": "meshproxy.http.filters.python",
        "io.istio.http.peer_metadata.Config": "meshproxy.http.filters.peer_metadata",
        "stats.PluginConfig": "meshproxy.http.filters.istio_stats",
    },
    "per-route filter configuration": {
        f"{_E}filters.http.rbac.v3.RBACPerRoute": "meshproxy.http.filters.rbac",
        f"{_E}filters.http.fault.v3.HTTPFault": "meshproxy.http.filters.fault",
        f"{_E}filters.http.local_ratelimit.v3.LocalRateLimit": "meshproxy.http.filters.local_ratelimit",
        f"{_E}filters.http.cors.v3.CorsPolicy": "meshproxy.http.filters.cors",
        f"{_E}filters.http.header_mutation.v3.HeaderMutationPerRoute": "meshproxy.http.filters.header_mutation",
        f"{_E}filters.http.jwt_authn.v3.PerRouteConfig": "meshproxy.http.filters.jwt_authn",
        f"{_E}filters.http.ext_authz.v3.ExtAuthzPerRoute": "meshproxy.http.filters.ext_authz",
        f"{_E}filters.http.buffer.v3.BufferPerRoute": "meshproxy.http.filters.buffer",
        f"{_E}filters.http.on_demand.v3.PerRouteConfig": "meshproxy.http.filters.on_demand",
        f"{_E}filters.http.grpc_http1_reverse_bridge.v3.FilterConfigPerRoute": "meshproxy.http.filters.grpc_http1_reverse_bridge",
        "meshproxy.python.v1.Filter": "meshproxy.http.filters.python",
        "envoy.config.route.v3.FilterConfig": "meshproxy.http.routes",
    },
    "network filter": {
        f"{_E}filters.network.http_connection_manager.v3.HttpConnectionManager": "meshproxy.http.manager",
        f"{_E}filters.network.tcp_proxy.v3.TcpProxy": "meshproxy.tcp.proxy",
        f"{_E}filters.network.rbac.v3.RBAC": "meshproxy.tcp.filters.rbac",
        f"{_E}filters.network.ext_authz.v3.ExtAuthz": "meshproxy.tcp.filters.ext_authz",
        f"{_E}filters.network.connection_limit.v3.ConnectionLimit": "meshproxy.tcp.filters.connection_limit",
        f"{_E}filters.network.local_ratelimit.v3.LocalRateLimit": "meshproxy.tcp.filters.local_ratelimit",
        "stats.PluginConfig": "meshproxy.tcp.filters.istio_stats",
    },
    "listener filter": {
        f"{_E}filters.listener.tls_inspector.v3.TlsInspector": "meshproxy.net.inspect",
        f"{_E}filters.listener.http_inspector.v3.HttpInspector": "meshproxy.net.inspect",
        f"{_E}filters.listener.original_dst.v3.OriginalDst": "meshproxy.net.inspect",
        f"{_E}filters.listener.proxy_protocol.v3.ProxyProtocol": "meshproxy.net.inspect",
    },
    "downstream transport socket": {
        f"{_E}transport_sockets.tls.v3.DownstreamTlsContext": "meshproxy.net.tls",
        f"{_E}transport_sockets.raw_buffer.v3.RawBuffer": "meshproxy.net.tls",
    },
    "upstream transport socket": {
        f"{_E}transport_sockets.tls.v3.UpstreamTlsContext": "meshproxy.net.tls",
        f"{_E}transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport": "meshproxy.upstream.proxy_protocol",
        f"{_E}transport_sockets.raw_buffer.v3.RawBuffer": "meshproxy.net.tls",
    },
    "access logger": {
        f"{_E}access_loggers.file.v3.FileAccessLog": "meshproxy.observe.access_log",
        f"{_E}access_loggers.stream.v3.StdoutAccessLog": "meshproxy.observe.access_log",
        f"{_E}access_loggers.stream.v3.StderrAccessLog": "meshproxy.observe.access_log",
    },
    "load balancing policy": {
        f"{_E}load_balancing_policies.round_robin.v3.RoundRobin": "meshproxy.upstream.balance.round_robin",
        f"{_E}load_balancing_policies.least_request.v3.LeastRequest": "meshproxy.upstream.balance.least_request",
        f"{_E}load_balancing_policies.random.v3.Random": "meshproxy.upstream.balance.random",
        f"{_E}load_balancing_policies.ring_hash.v3.RingHash": "meshproxy.upstream.balance.ring_hash",
        f"{_E}load_balancing_policies.maglev.v3.Maglev": "meshproxy.upstream.balance.maglev",
        f"{_E}load_balancing_policies.wrr_locality.v3.WrrLocality": "meshproxy.upstream.balance.wrr_locality",
        f"{_E}load_balancing_policies.cluster_provided.v3.ClusterProvided": "meshproxy.upstream.balance.cluster_provided",
        f"{_E}load_balancing_policies.peak_ewma.v3alpha.PeakEwma": "meshproxy.upstream.balance.peak_ewma",
    },
    "cluster protocol options": {
        f"{_E}upstreams.http.v3.HttpProtocolOptions": "meshproxy.upstream.cluster",
        f"{_E}upstreams.tcp.v3.TcpProtocolOptions": "meshproxy.upstream.cluster",
    },
    "cluster type": {
        f"{_E}clusters.dns.v3.DnsCluster": "meshproxy.upstream.cluster",
    },
    "header formatter": {
        f"{_E}http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig": "meshproxy.http.manager",
    },
    "request id": {
        f"{_E}request_id.uuid.v3.UuidRequestIdConfig": "meshproxy.http.manager",
    },
    "original IP detection": {
        f"{_E}http.original_ip_detection.xff.v3.XffConfig": "meshproxy.http.manager",
    },
    "retry host predicate": {
        f"{_E}retry.host.previous_hosts.v3.PreviousHostsPredicate": "meshproxy.http.retry",
        f"{_E}retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate": "meshproxy.http.retry",
        f"{_E}retry.host.omit_host_metadata.v3.OmitHostMetadataConfig": "meshproxy.http.retry",
    },
    "retry priority": {
        f"{_E}retry.priority.previous_priorities.v3.PreviousPrioritiesConfig": "meshproxy.http.retry",
    },
    "RBAC principal": {
        f"{_E}rbac.principals.mtls_authenticated.v3.Config": "meshproxy.api.rbac_engine",
    },
    "RBAC action": {
        "envoy.config.rbac.v3.Action": "meshproxy.api.rbac_engine",
    },
    "match input": {
        f"{_E}matching.common_inputs.network.v3.DestinationIPInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.DestinationPortInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.SourceIPInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.SourcePortInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.DirectSourceIPInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.ServerNameInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.NetworkNamespaceInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.FilterStateInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.network.v3.DynamicMetadataInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.ssl.v3.UriSanInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.ssl.v3.DnsSanInput": "meshproxy.api.match_inputs",
        f"{_E}matching.common_inputs.ssl.v3.SubjectInput": "meshproxy.api.match_inputs",
        "envoy.type.matcher.v3.HttpRequestHeaderMatchInput": "meshproxy.api.match_inputs",
    },
    "input matcher": {
        f"{_E}matching.input_matchers.ip.v3.Ip": "meshproxy.api.match_tree",
        f"{_E}matching.input_matchers.metadata.v3.Metadata": "meshproxy.api.match_tree",
    },
    "match tree": {
        "xds.type.matcher.v3.IPMatcher": "meshproxy.api.match_tree",
    },
    "path match": {
        f"{_E}path.match.uri_template.v3.UriTemplateMatchConfig": "meshproxy.api.matchers",
    },
    "path rewrite": {
        f"{_E}path.rewrite.uri_template.v3.UriTemplateRewriteConfig": "meshproxy.http.routes",
    },
    "regex engine": {
        f"{_E}regex_engines.v3.GoogleRE2": "meshproxy.api.matchers",
    },
    "formatter": {
        f"{_E}formatter.metadata.v3.Metadata": "meshproxy.observe.format",
        f"{_E}formatter.req_without_query.v3.ReqWithoutQuery": "meshproxy.observe.format",
    },
    "bootstrap extension": {
        "meshproxy.identity.v1.Workload": "meshproxy.xds.identity",
    },
    "tracer": {
        "envoy.config.trace.v3.OpenTelemetryConfig": "meshproxy.http.opentelemetry",
        "envoy.config.trace.v3.ZipkinConfig": "meshproxy.http.zipkin",
    },
    "OpenTelemetry sampler": {
        f"{_E}tracers.opentelemetry.samplers.v3.AlwaysOnSamplerConfig": "meshproxy.tracing.samplers",
        f"{_E}tracers.opentelemetry.samplers.v3.TraceIdRatioBasedSamplerConfig": "meshproxy.tracing.samplers",
        f"{_E}tracers.opentelemetry.samplers.v3.ParentBasedSamplerConfig": "meshproxy.tracing.samplers",
    },
    "OpenTelemetry resource detector": {
        f"{_E}tracers.opentelemetry.resource_detectors.v3.EnvironmentResourceDetectorConfig": "meshproxy.tracing.resources",
        f"{_E}tracers.opentelemetry.resource_detectors.v3.StaticConfigResourceDetectorConfig": "meshproxy.tracing.resources",
    },
    "DNS resolver": {
        f"{_E}network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig": "meshproxy.upstream.discovery",
        f"{_E}network.dns_resolver.cares.v3.CaresDnsResolverConfig": "meshproxy.upstream.discovery",
    },
}

# type URL -> module, all kinds together.
EXTENSIONS: dict[str, str] = {TYPE_PREFIX + name: module for table in KINDS.values() for name, module in table.items()}


def module(type_url: str, kind: str | None = None) -> ModuleType:
    """The module that compiles the messages of `type_url`, imported. `kind` (a key of KINDS) restricts the search to extensions that fit the place.

    Raises ConfigError: unsupported when the API has such a message, invalid when it has not.
    """
    name = messages.full_name(type_url)
    path = KINDS[kind].get(name) if kind else EXTENSIONS.get(TYPE_PREFIX + name)
    if path is None:
        if messages.descriptor(name) is None:
            errors.fail("", f"unknown type {type_url!r}")
        errors.fail("", f"{name} is not supported{f' as {kind}' if kind else ''}", UNSUPPORTED)
    return importlib.import_module(path)


def type_url(packed: Any) -> str:
    """The canonical type URL of what is inside `packed`, seen through a TypedStruct."""
    name = messages.full_name(packed.type_url)
    if name in _TYPED_STRUCTS:
        name = messages.full_name(_decode(packed, name).type_url)
    return TYPE_PREFIX + name


def is_known(packed: Any, kind: str | None = None) -> bool:
    """Whether the API has the type of what `packed` holds, seen through a TypedStruct; with a `kind`: whether it is an extension of ours that fits there."""
    if messages.message_class(messages.full_name(packed.type_url)) is None:
        return False
    name = messages.full_name(type_url(packed))
    return messages.descriptor(name) is not None if kind is None else name in KINDS[kind]


def unpack(packed: Any) -> Any:
    """The message inside an Any; a TypedStruct is converted to the message that it describes. Raises ConfigError."""
    name = messages.full_name(packed.type_url)
    message = _decode(packed, name)
    if name not in _TYPED_STRUCTS:
        return message
    # Only the rare TypedStruct needs the converter, and the converter needs this module's tables.
    from meshproxy.api import convert

    target = messages.message_class(messages.full_name(message.type_url))
    if target is None:
        errors.fail("", f"unknown type {message.type_url!r}")
    with errors.under("value"):
        return convert.to_message(convert.from_struct(message.value), target)


def _decode(packed: Any, name: str) -> Any:
    cls = messages.message_class(name)
    if cls is None:
        errors.fail("", f"unknown type {packed.type_url!r}" if packed.type_url else "the type of an Any is missing")
    try:
        return cls.FromString(packed.value)
    except DecodeError as error:
        raise ConfigError(f"the value is not a serialised {name}") from error
