"""Builders of the bootstraps of the cases: ordinary Envoy v3 configuration, written as dicts or YAML text, with the boilerplate taken away.

`${...}` in a string is replaced for each proxy: `${port:a}` the port of the scripted upstream `a`, `${file:x}` a file in the proxy's own folder,
`${pem:server}`, `${key:server}` and `${crl:ca}` files of tests/differential/pki.py, `${sha256:server}` and `${spki:server}` how a certificate is pinned.
An `"@"` key is a short `@type` (table TYPES).
Upstreams whose names begin with `dead` refuse connections, with `hole` never answer the SYN, with `tls` or `mtls` speak TLS
(`tls_with_rsa`: with the certificate `rsa`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

_HTTP = "envoy.extensions.filters.http"
_NET = "envoy.extensions.filters.network"
_LISTENER = "envoy.extensions.filters.listener"
_COMMON_INPUTS = "envoy.extensions.matching.common_inputs"
TYPES = {
    "hcm": f"{_NET}.http_connection_manager.v3.HttpConnectionManager",
    "tcp_proxy": f"{_NET}.tcp_proxy.v3.TcpProxy",
    "network_rbac": f"{_NET}.rbac.v3.RBAC",
    "network_ext_authz": f"{_NET}.ext_authz.v3.ExtAuthz",
    "connection_limit": f"{_NET}.connection_limit.v3.ConnectionLimit",
    "network_ratelimit": f"{_NET}.local_ratelimit.v3.LocalRateLimit",
    "router": f"{_HTTP}.router.v3.Router",
    "rbac": f"{_HTTP}.rbac.v3.RBAC",
    "rbac_per_route": f"{_HTTP}.rbac.v3.RBACPerRoute",
    "jwt_authn": f"{_HTTP}.jwt_authn.v3.JwtAuthentication",
    "jwt_authn_per_route": f"{_HTTP}.jwt_authn.v3.PerRouteConfig",
    "ext_authz": f"{_HTTP}.ext_authz.v3.ExtAuthz",
    "ext_authz_per_route": f"{_HTTP}.ext_authz.v3.ExtAuthzPerRoute",
    "fault": f"{_HTTP}.fault.v3.HTTPFault",
    "local_ratelimit": f"{_HTTP}.local_ratelimit.v3.LocalRateLimit",
    "on_demand": f"{_HTTP}.on_demand.v3.OnDemand",
    "cors": f"{_HTTP}.cors.v3.Cors",
    "cors_policy": f"{_HTTP}.cors.v3.CorsPolicy",
    "header_mutation": f"{_HTTP}.header_mutation.v3.HeaderMutation",
    "header_mutation_per_route": f"{_HTTP}.header_mutation.v3.HeaderMutationPerRoute",
    "health_check": f"{_HTTP}.health_check.v3.HealthCheck",
    "buffer": f"{_HTTP}.buffer.v3.Buffer",
    "grpc_stats": f"{_HTTP}.grpc_stats.v3.FilterConfig",
    "grpc_web": f"{_HTTP}.grpc_web.v3.GrpcWeb",
    "grpc_http1_bridge": f"{_HTTP}.grpc_http1_bridge.v3.Config",
    "grpc_http1_reverse_bridge": f"{_HTTP}.grpc_http1_reverse_bridge.v3.FilterConfig",
    "grpc_http1_reverse_bridge_per_route": f"{_HTTP}.grpc_http1_reverse_bridge.v3.FilterConfigPerRoute",
    "buffer_per_route": f"{_HTTP}.buffer.v3.BufferPerRoute",
    "filter_config": "envoy.config.route.v3.FilterConfig",
    "file_log": "envoy.extensions.access_loggers.file.v3.FileAccessLog",
    "tls_inspector": f"{_LISTENER}.tls_inspector.v3.TlsInspector",
    "http_inspector": f"{_LISTENER}.http_inspector.v3.HttpInspector",
    "proxy_protocol": f"{_LISTENER}.proxy_protocol.v3.ProxyProtocol",
    "original_dst": f"{_LISTENER}.original_dst.v3.OriginalDst",
    "downstream_tls": "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
    "upstream_tls": "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
    "upstream_proxy_protocol": "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport",
    "mtls_authenticated": "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config",
    "raw_buffer": "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer",
    "http_options": "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
    "previous_hosts": "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
    "omit_canary": "envoy.extensions.retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate",
    "omit_metadata": "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig",
    "preserve_case": "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig",
    "xff": "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig",
    "rbac_action": "envoy.config.rbac.v3.Action",
    "header_input": "envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
    **{
        f"{name}_input": f"{_COMMON_INPUTS}.network.v3.{message}Input"
        for name, message in (
            ("source_ip", "SourceIP"),
            ("source_port", "SourcePort"),
            ("direct_source_ip", "DirectSourceIP"),
            ("destination_ip", "DestinationIP"),
            ("destination_port", "DestinationPort"),
            ("server_name", "ServerName"),
            ("namespace", "NetworkNamespace"),
            ("filter_state", "FilterState"),
            ("metadata", "DynamicMetadata"),
        )
    },
    "uri_san_input": f"{_COMMON_INPUTS}.ssl.v3.UriSanInput",
    "dns_san_input": f"{_COMMON_INPUTS}.ssl.v3.DnsSanInput",
    "subject_input": f"{_COMMON_INPUTS}.ssl.v3.SubjectInput",
    "ip_matcher": "envoy.extensions.matching.input_matchers.ip.v3.Ip",
    "metadata_matcher": "envoy.extensions.matching.input_matchers.metadata.v3.Metadata",
    "ip_tree": "xds.type.matcher.v3.IPMatcher",
    "uuid_request_id": "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
}

LOG_FORMAT = (
    "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL% %RESPONSE_CODE% flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% "
    "termination=%CONNECTION_TERMINATION_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% host=%REQ(:AUTHORITY)% upstream=%UPSTREAM_HOST% "
    "cluster=%UPSTREAM_CLUSTER% route=%ROUTE_NAME% failure=%UPSTREAM_TRANSPORT_FAILURE_REASON% attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT%\n"
)
PROBE_HOST = "probe.test"
BARRIER = "rig.barrier"  # name and stat prefix of a listener that answers the probe
PROBE = {
    "name": "probe",
    "domains": [PROBE_HOST],
    "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "alive"}}}],
}

Config = dict[str, Any]


def y(text: str | list[Any] | Config) -> Any:
    """YAML text -> data; data passes."""
    return yaml.safe_load(text) if isinstance(text, str) else text


def filter_(name: str, **fields: Any) -> Config:
    """An HTTP, network or listener filter by its short type name."""
    return {"name": name, "typed_config": {"@": name, **fields}}


def file_log(format: str = LOG_FORMAT, *, filter: Config | None = None, file: str = "access.log", **fields: Any) -> Config:
    """A file access log."""
    log_format = fields.pop("log_format", {"text_format_source": {"inline_string": format}})
    log: Config = {"name": "file", "typed_config": {"@": "file_log", "path": f"${{file:{file}}}", "log_format": log_format, **fields}}
    return log | ({"filter": filter} if filter else {})


def hcm(name: str, hosts: str | list[Any], *, filters: tuple[Config, ...] | list[Config] = (), route_config: Config | None = None, **options: Any) -> Config:
    """An HTTP connection manager filter. `hosts`: virtual hosts as data or YAML; the probe's host is added."""
    return {
        "name": "hcm",
        "typed_config": {
            "@": "hcm",
            "stat_prefix": name,
            "delayed_close_timeout": "0.05s",
            "access_log": [file_log()],
            "route_config": {"name": name, "virtual_hosts": [*y(hosts), PROBE], **(route_config or {})},
            "http_filters": [*filters, filter_("router")],
        }
        | options,
    }


def listener(name: str, *filters: Config, chains: list[Config] | None = None, **fields: Any) -> Config:
    """A listener on a port of its own on 127.0.0.1, with one filter chain of `filters`, or with `chains`."""
    return {
        "name": name,
        "stat_prefix": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": chains or [{"filters": list(filters)}],
        **fields,
    }


def http(name: str, hosts: str | list[Any], *, listener_fields: Config | None = None, **options: Any) -> Config:
    """A listener with an HTTP connection manager; `options` as for `hcm`."""
    return listener(name, hcm(name, hosts, **options), **(listener_fields or {}))


def to(cluster: str, *domains: str, **route: Any) -> list[Config]:
    """Virtual hosts with one route: everything to a cluster."""
    return [{"name": "all", "domains": list(domains) or ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster, **route}}]}]


def endpoint(upstream: str, **fields: Any) -> Config:
    """An lb_endpoint for a scripted upstream."""
    inner = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": f"${{port:{upstream}}}"}}}
    for name in ("hostname", "health_check_config"):
        if name in fields:
            inner[name] = fields.pop(name)
    return {"endpoint": inner, **fields}


def cluster(name: str, *endpoints: str | Config, localities: list[Config] | None = None, **fields: Any) -> Config:
    """A STATIC cluster; endpoints are names of upstreams (default: one, named as the cluster) or lb_endpoints."""
    lb_endpoints = [endpoint(e) if isinstance(e, str) else e for e in endpoints or (name,)]
    return {
        "name": name,
        "connect_timeout": "30s",
        "load_assignment": {"cluster_name": name, "endpoints": localities or [{"lb_endpoints": lb_endpoints}]},
        **fields,
    }


def bootstrap(*listeners: Config, clusters: list[Config] | None = None, **fields: Any) -> Config:
    """A bootstrap with an admin listener on a port of its own, and the listener by which the rig asks whether the worker has done what it was given."""
    return {
        "node": {"id": "test-node", "cluster": "test-cluster", "locality": {"region": "r1", "zone": "z1"}},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "static_resources": {"listeners": [*listeners, http(BARRIER, [], access_log=[])], "clusters": clusters or []},
        **fields,
    }


_TOKEN = re.compile(r"\$\{(\w+):([\w.-]+)\}")


def tokens(config: Any, kind: str) -> list[str]:
    """The names that `${kind:name}` tokens of the configuration use, in order of appearance."""
    return list(dict.fromkeys(name for found, name in _TOKEN.findall(yaml.safe_dump(config, width=10_000)) if found == kind))


def render(config: Any, value: Callable[[str, str], str | int]) -> Any:
    """Replace the tokens and short types; `value(kind, name)` says with what."""
    if isinstance(config, dict):
        return {
            "@type" if key == "@" else key: "type.googleapis.com/" + TYPES.get(item, item) if key == "@" else render(item, value)
            for key, item in config.items()
        }
    if isinstance(config, list | tuple):
        return [render(item, value) for item in config]
    if isinstance(config, str):
        if whole := _TOKEN.fullmatch(config):
            return value(whole[1], whole[2])
        return _TOKEN.sub(lambda found: str(value(found[1], found[2])), config)
    return config
