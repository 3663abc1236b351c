"""What a cluster's configuration says besides its endpoints: timeouts, protocol options, transport sockets, and what does not go together.

`ClusterOptions` is made once per cluster and never changes. Defaults are Envoy's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, registry
from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.api.http2_options import compile_http2
from meshproxy.api.secrets import Secrets, discovered, inline
from meshproxy.codec.h1.parser import MAX_HEADERS
from meshproxy.codec.h1.parser import Options as ParserOptions
from meshproxy.record import Record, field

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.net.sockets import DialOptions
    from meshproxy.net.tls import UpstreamTls
    from meshproxy.observe.stats import Scope

_PROPER_CASE = 1  # PreserveCaseFormatterConfig.FormatterTypeOnEnvoyHeaders
_MAX_RESPONSE_HEADERS_KB = 80  # Envoy's default for what upstreams may send
_MAX_HTTP2_RESPONSE_HEADERS_KB = 60  # the same for HTTP/2
_CLUSTER = "envoy.config.cluster.v3.Cluster"
HONOURS = {
    _CLUSTER: (
        "transport_socket_matches name alt_stat_name type cluster_type eds_cluster_config connect_timeout per_connection_buffer_limit_bytes lb_policy"
        " load_assignment health_checks max_requests_per_connection circuit_breakers upstream_http_protocol_options common_http_protocol_options"
        " http_protocol_options http2_protocol_options"
        " typed_extension_protocol_options dns_refresh_rate dns_jitter dns_failure_refresh_rate respect_dns_ttl dns_lookup_family"
        " typed_dns_resolver_config wait_for_warm_on_init outlier_detection cleanup_interval upstream_bind_config ring_hash_lb_config"
        " preconnect_policy maglev_lb_config original_dst_lb_config least_request_lb_config round_robin_lb_config common_lb_config transport_socket metadata"
        " protocol_selection upstream_connection_options ignore_health_on_host_removal load_balancing_policy lrs_server"
    ),
    _CLUSTER + ".CustomClusterType": "name typed_config",
    _CLUSTER + ".EdsClusterConfig": "eds_config service_name",
    _CLUSTER + ".TransportSocketMatch": "name match transport_socket",
    _CLUSTER + ".CommonLbConfig": (
        "healthy_panic_threshold zone_aware_lb_config locality_weighted_lb_config update_merge_window ignore_new_hosts_until_first_hc"
        " close_connections_on_host_set_change consistent_hashing_lb_config"
    ),
    _CLUSTER + ".PreconnectPolicy": "per_upstream_preconnect_ratio predictive_preconnect_ratio",
    "envoy.config.cluster.v3.UpstreamConnectionOptions": "tcp_keepalive",
    "envoy.config.core.v3.TransportSocket": "name typed_config",
    "envoy.config.core.v3.UpstreamHttpProtocolOptions": "auto_sni auto_san_validation override_auto_sni_header",
    "envoy.config.core.v3.Metadata": "filter_metadata",
    "envoy.config.core.v3.TypedExtensionConfig": "name typed_config",
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": (
        "common_http_protocol_options upstream_http_protocol_options explicit_http_config use_downstream_protocol_config auto_config"
    ),
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig": "http_protocol_options http2_protocol_options",
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.UseDownstreamHttpConfig": "http_protocol_options http2_protocol_options",
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.AutoHttpConfig": "http_protocol_options http2_protocol_options",
    "envoy.extensions.upstreams.tcp.v3.TcpProtocolOptions": "idle_timeout",
}

STATIC, STRICT_DNS, LOGICAL_DNS, EDS, ORIGINAL_DST = range(5)  # envoy.config.cluster.v3.Cluster.DiscoveryType
_TYPE_NAMES = ("envoy.cluster.static", "envoy.cluster.strict_dns", "envoy.cluster.logical_dns", "envoy.cluster.eds", "envoy.cluster.original_dst")
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_TCP_OPTIONS = "envoy.extensions.upstreams.tcp.v3.TcpProtocolOptions"

HTTP1, HTTP2, DOWNSTREAM, AUTO = range(4)  # what is spoken: the last two as with the client, and as ALPN has it
_EXPLICIT = {"http_protocol_options": HTTP1, "http2_protocol_options": HTTP2}

CONNECT_TIMEOUT = 5.0
BUFFER_LIMIT = 1024 * 1024
IDLE_TIMEOUT = 3600.0
TCP_POOL_IDLE_TIMEOUT = 600.0


class ClusterOptions(Record):
    """See the proto fields of the same names. Times are seconds, sizes bytes; 0 means no timeout, no limit."""

    type: int = STATIC
    dns: Any = None  # extensions.clusters.dns.v3.DnsCluster of a cluster that has one; its fields override the cluster's own
    connect_timeout: float = CONNECT_TIMEOUT
    per_connection_buffer_limit: int = BUFFER_LIMIT
    max_requests_per_connection: int = 0
    preconnect_ratio: float = 1.0  # how many connections there should be for what is going on, to the next whole one
    predictive_ratio: float = 1.0  # the same for the cluster as a whole: see upstream.preconnect
    max_connection_duration: float = 0.0
    max_stream_duration: float = 0.0
    idle_timeout: float = IDLE_TIMEOUT
    tcp_pool_idle_timeout: float = TCP_POOL_IDLE_TIMEOUT
    headers_with_underscores: int = 0  # core.v3.HttpProtocolOptions.HeadersWithUnderscoresAction: allow, reject, drop
    protocol: int = HTTP1
    allows_http2: bool = False  # it has options for it
    http2: dict[str, Any] = field(default_factory=dict)  # arguments of codec.h2.settings.Options
    h1_options: ParserOptions = field(default_factory=ParserOptions)
    header_style: str | None = None  # None (lower case), "proper" or "preserve"
    auto_sni: bool = False
    auto_san_validation: bool = False
    auto_sni_header: str = ""  # lower case; "" means :authority
    dial_options: DialOptions | None = None
    transport: UpstreamTls | None = None
    proxy_protocol: int = 0  # version by which hosts are told who calls, 0 for none; of `transport`
    tells_callers: bool = False  # some hosts are
    choose_transport: Callable[[dict[str, Any] | None, dict[str, Any] | None], tuple[UpstreamTls | None, int]] | None = None  # and its version


def compile_options(proto: Any, scope: Scope, secrets: Secrets | None, default_bind: Any = None) -> ClusterOptions:
    """Check a Cluster message and take out what does not change. Reads certificates. Raises ConfigError with all problems."""
    options = ClusterOptions()
    problems = errors.Collector()
    for part in (_discovery, _timeouts, _http, _tcp):
        with problems.under(""):
            part(proto, options)
    with problems.under("upstream_bind_config"):
        _dialling(proto, options, default_bind)
    with problems.under(""):
        _transport(proto, options, scope, secrets)
    problems.raise_any()
    return options


def number(proto: Any, field: str, default: int) -> int:
    """A wrapped number; `default` when it is not set."""
    return int(getattr(proto, field).value) if proto.HasField(field) else default


def discovery_options(proto: Any) -> ClusterOptions:
    """Only what discovery needs to know: `type` and `dns`."""
    options = ClusterOptions()
    _discovery(proto, options)
    return options


def _discovery(proto: Any, options: ClusterOptions) -> None:
    if proto.HasField("lrs_server") and proto.lrs_server.WhichOneof("config_source_specifier") != "self":
        errors.fail("lrs_server", "load is only reported to where the cluster comes from (self)", UNSUPPORTED)
    if proto.WhichOneof("cluster_discovery_type") == "cluster_type":
        with errors.under("cluster_type.typed_config"):
            registry.module(registry.type_url(proto.cluster_type.typed_config), "cluster type")
            options.dns = registry.unpack(proto.cluster_type.typed_config)
        options.type = LOGICAL_DNS if options.dns.all_addresses_in_single_endpoint else STRICT_DNS
    else:
        options.type = proto.type
    if proto.common_lb_config.consistent_hashing_lb_config.use_hostname_for_hashing and options.type != STRICT_DNS:
        errors.fail(
            "common_lb_config.consistent_hashing_lb_config.use_hostname_for_hashing",
            f"Cannot use hostname for consistent hashing loadbalancing for cluster of type: '{_TYPE_NAMES[options.type]}'",
        )
    if options.type == EDS:
        if not proto.HasField("eds_cluster_config") or not proto.eds_cluster_config.HasField("eds_config"):
            errors.fail("eds_cluster_config.eds_config", "EDS cluster must have eds_cluster_config set")
    elif proto.HasField("eds_cluster_config"):
        errors.fail("eds_cluster_config", "eds_cluster_config set in a non-EDS cluster")
    if options.type == ORIGINAL_DST:
        if proto.lb_policy != 6 and not _typed_cluster_provided(proto):
            errors.fail("lb_policy", f"cluster: LB policy {proto.lb_policy} is not valid for Cluster type ORIGINAL_DST. Only 'CLUSTER_PROVIDED' is allowed.")
        if proto.HasField("load_assignment"):
            errors.fail("load_assignment", "ORIGINAL_DST clusters must have no load assignment configured")
    elif options.type == LOGICAL_DNS:
        endpoints = proto.load_assignment.endpoints
        if len(endpoints) != 1 or len(endpoints[0].lb_endpoints) != 1:
            errors.fail("load_assignment.endpoints", "LOGICAL_DNS clusters must have a single locality_lb_endpoint and a single lb_endpoint")


def _typed_cluster_provided(proto: Any) -> bool:
    policies = proto.load_balancing_policy.policies
    return bool(policies) and policies[0].typed_extension_config.typed_config.type_url.endswith("cluster_provided.v3.ClusterProvided")


def _timeouts(proto: Any, options: ClusterOptions) -> None:
    options.connect_timeout = seconds_of(proto, "connect_timeout", CONNECT_TIMEOUT)
    if options.connect_timeout <= 0:
        errors.fail("connect_timeout", "value must be greater than 0s")
    options.per_connection_buffer_limit = number(proto, "per_connection_buffer_limit_bytes", BUFFER_LIMIT)
    if proto.preconnect_policy.HasField("per_upstream_preconnect_ratio"):
        options.preconnect_ratio = proto.preconnect_policy.per_upstream_preconnect_ratio.value
    if proto.preconnect_policy.HasField("predictive_preconnect_ratio"):
        options.predictive_ratio = proto.preconnect_policy.predictive_preconnect_ratio.value


def _http(proto: Any, options: ClusterOptions) -> None:
    packed = _extension(proto, _HTTP_OPTIONS)
    if packed is None:
        common, protocols, upstream = proto.common_http_protocol_options, proto, proto.upstream_http_protocol_options
        base = ""
        if proto.protocol_selection == proto.USE_DOWNSTREAM_PROTOCOL:
            options.protocol = DOWNSTREAM
        elif proto.HasField("http2_protocol_options"):
            if proto.HasField("http_protocol_options"):
                errors.fail("http2_protocol_options", "Both HTTP1 and HTTP2 options may only be configured with non-default 'protocol_selection' values")
            options.protocol = HTTP2
    else:
        base = f'typed_extension_protocol_options["{_HTTP_OPTIONS}"]'
        which = packed.WhichOneof("upstream_protocol_options")
        if which is None:
            errors.fail(base, "one of explicit_http_config, use_downstream_protocol_config and auto_config is required")
        protocols = getattr(packed, which)
        base = f"{base}.{which}"
        if which == "explicit_http_config":
            protocol = protocols.WhichOneof("protocol_config")
            if protocol is None:
                errors.fail(base, "one of http_protocol_options, http2_protocol_options and http3_protocol_options is required")
            if protocol not in _EXPLICIT:
                errors.fail(f"{base}.{protocol}", "HTTP/3 is not supported", UNSUPPORTED)
            options.protocol = _EXPLICIT[protocol]
        else:
            options.protocol = AUTO if which == "auto_config" else DOWNSTREAM
        common, upstream = packed.common_http_protocol_options, packed.upstream_http_protocol_options
    _common_http(proto, common, options)
    _http1(protocols.http_protocol_options, common, options, errors.join(base, "http_protocol_options"))
    with errors.under(errors.join(base, "http2_protocol_options")):
        options.http2 = compile_http2(protocols.http2_protocol_options)
    options.allows_http2 = protocols.HasField("http2_protocol_options")
    options.http2["max_head_bytes"] = number(common, "max_response_headers_kb", _MAX_HTTP2_RESPONSE_HEADERS_KB) * 1024
    options.http2["max_headers"] = options.h1_options.max_headers
    options.auto_sni = upstream.auto_sni
    options.auto_san_validation = upstream.auto_san_validation
    options.auto_sni_header = upstream.override_auto_sni_header.lower()


def _extension(proto: Any, name: str) -> Any:
    """The protocol options of that type. Their keys are type names by convention; a message of another type under that key is an error."""
    if name not in proto.typed_extension_protocol_options:
        return None
    packed = proto.typed_extension_protocol_options[name]
    with errors.under(f'typed_extension_protocol_options["{name}"]'):
        if registry.type_url(packed) != registry.TYPE_PREFIX + name:
            errors.fail("", f"{name} is expected here, not {packed.type_url!r}")
        return registry.unpack(packed)


def _common_http(proto: Any, common: Any, options: ClusterOptions) -> None:
    if proto.HasField("max_requests_per_connection") and common.HasField("max_requests_per_connection"):
        errors.fail("max_requests_per_connection", "Only one of max_requests_per_connection from Cluster or HttpProtocolOptions can be specified")
    options.max_requests_per_connection = number(common, "max_requests_per_connection", number(proto, "max_requests_per_connection", 0))
    options.idle_timeout = seconds_of(common, "idle_timeout", IDLE_TIMEOUT)
    options.max_connection_duration = seconds_of(common, "max_connection_duration", 0.0)
    options.max_stream_duration = seconds_of(common, "max_stream_duration", 0.0)
    options.headers_with_underscores = common.headers_with_underscores_action


def _http1(http1: Any, common: Any, options: ClusterOptions, path: str) -> None:
    reason = proper_else = False
    if http1.HasField("header_key_format"):
        if http1.header_key_format.WhichOneof("header_format") == "proper_case_words":
            options.header_style = "proper"
        else:
            with errors.under(f"{path}.header_key_format.stateful_formatter.typed_config"):
                config: Any = registry.unpack(http1.header_key_format.stateful_formatter.typed_config)
            options.header_style = "preserve"
            reason, proper_else = config.forward_reason_phrase, config.formatter_type_on_envoy_headers == _PROPER_CASE
    options.h1_options = ParserOptions(
        max_head_bytes=number(common, "max_response_headers_kb", _MAX_RESPONSE_HEADERS_KB) * 1024,
        max_headers=number(common, "max_headers_count", MAX_HEADERS),
        trailers=http1.enable_trailers,
        keep_case=options.header_style == "preserve",
        keep_reason=reason,
        proper_else=proper_else,
    )


def _tcp(proto: Any, options: ClusterOptions) -> None:
    packed = _extension(proto, _TCP_OPTIONS)
    if packed is not None:
        options.tcp_pool_idle_timeout = seconds_of(packed, "idle_timeout", TCP_POOL_IDLE_TIMEOUT)
    for name in proto.typed_extension_protocol_options:
        if name not in (_HTTP_OPTIONS, _TCP_OPTIONS):
            errors.fail(f'typed_extension_protocol_options["{name}"]', "these protocol options are not supported", UNSUPPORTED)


def _dialling(proto: Any, options: ClusterOptions, default_bind: Any) -> None:
    bind = proto.upstream_bind_config if proto.HasField("upstream_bind_config") else None
    keepalive = proto.upstream_connection_options.tcp_keepalive if proto.upstream_connection_options.HasField("tcp_keepalive") else None
    if bind is None and keepalive is None and default_bind is None:
        return
    from meshproxy.net import sockets

    options.dial_options = sockets.compile_dial_options(bind, keepalive, default_bind)


def _transport(proto: Any, options: ClusterOptions, scope: Scope, secrets: Secrets | None) -> None:
    if proto.HasField("transport_socket"):
        with errors.under("transport_socket.typed_config"):
            options.transport, options.proxy_protocol = _compile_transport(proto.transport_socket, scope, secrets)
    options.tells_callers = bool(options.proxy_protocol)
    if options.protocol == AUTO and options.transport is None:
        errors.fail("transport_socket", f"ALPN configured for cluster {proto.name} which has a non-ALPN transport socket")
    if proto.transport_socket_matches:
        rules = _rules(proto, scope, secrets, alpn=options.protocol == AUTO)
        options.tells_callers |= any(version for _, (_, version), _ in rules)
        options.choose_transport = _matches(rules, (options.transport, options.proxy_protocol), scope)


def _compile_transport(socket: Any, scope: Scope, secrets: Secrets | None) -> tuple[UpstreamTls | None, int]:
    """An upstream TransportSocket: its TLS, None for raw buffers, and the version of the PROXY protocol, 0 for none. Paths of errors are relative to its
    `typed_config`."""
    if not socket.HasField("typed_config"):
        return None, 0
    url = registry.type_url(socket.typed_config)
    module = registry.module(url, "upstream transport socket")
    if url.endswith(".RawBuffer"):
        return None, 0
    message = registry.unpack(socket.typed_config)
    if url.endswith(".ProxyProtocolUpstreamTransport"):
        with errors.under("transport_socket.typed_config"):
            tls, inner = _compile_transport(message.transport_socket, scope, secrets)
            if inner:
                errors.fail("", "one PROXY header within another is not supported", UNSUPPORTED)
        return tls, module.version_of(message)
    if any(True for _ in discovered(message.common_tls_context)):
        from meshproxy.net.tls_sds import UpstreamSds  # few workers need it

        return UpstreamSds(message, scope, secrets or Secrets()), 0
    with errors.under("common_tls_context"):
        inline(message.common_tls_context, secrets)
    return module.compile_upstream(message, scope), 0


def _rules(proto: Any, scope: Scope, secrets: Secrets | None, *, alpn: bool) -> list[tuple[Any, tuple[UpstreamTls | None, int], Any]]:
    """Of `transport_socket_matches`: what is to match, how hosts are then reached, and the counter of those that are."""
    from google.protobuf.json_format import MessageToDict

    rules = []
    for index, match in enumerate(proto.transport_socket_matches):
        with errors.under(f"transport_socket_matches[{index}].transport_socket.typed_config"):
            way = _compile_transport(match.transport_socket, scope, secrets)
            if way[0] is None and alpn:
                errors.fail("", f"ALPN configured for cluster {proto.name} which has a non-ALPN transport socket matcher")
        rules.append((MessageToDict(match.match), way, scope.counter(f"{match.name}.total_match_count", shared=True)))
    return rules


def _matches(rules: list[tuple[Any, Any, Any]], default: Any, scope: Scope) -> Callable[[dict[str, Any] | None, dict[str, Any] | None], Any]:
    unmatched = scope.counter("default.total_match_count", shared=True)

    def choose(metadata: dict[str, Any] | None, locality_metadata: dict[str, Any] | None) -> Any:
        # The endpoint's own metadata first; what its locality says only if that matched nothing.
        for source in (metadata, locality_metadata):
            found = (source or {}).get("envoy.transport_socket_match", {})
            for wanted, way, counter in rules:
                if _covers(wanted, found):
                    counter.n += 1
                    return way
        unmatched.n += 1
        return default

    return choose


def _covers(wanted: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether everything that is wanted is found with an equal value."""
    return all(key in found and found[key] == value for key, value in wanted.items())
