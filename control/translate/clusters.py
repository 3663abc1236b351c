"""Clusters: what a proxy knows of one port of a service, or of a subset of it, and how it treats it.

The values are those that Istio's own translation gives, where documents leave them open: 10 s to connect, no circuit breakers, least request.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

from control.model.mesh import NO_CLUSTER_DEFAULTS, ClusterDefaults, pool_of
from control.model.service import Endpoint, Port, Resolution, Service
from control.model.traffic import ConnectionPool, LoadBalancer, OutlierDetection, TlsSettings, TrafficPolicy
from control.names import BLACK_HOLE, PASSTHROUGH, inbound_cluster, is_ip, outbound_cluster
from control.translate import mtls, tls
from control.translate.endpoints import load_assignment
from control.translate.resource import duration, typed

_NO_LIMIT = 2**32 - 1
_CONNECT_TIMEOUT_S = 10.0
DNS_REFRESH_S = 60.0  # of names whose records do not say it
_RAW = {"name": "envoy.transport_sockets.raw_buffer", "typed_config": typed("envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer")}
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
ADS = {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"}


def outbound(
    service: Service,
    port: Port,
    subset: str,
    policy: TrafficPolicy,
    endpoints: tuple[Endpoint, ...] | None,
    metadata: tuple[tuple[str, str], ...],
    identities: tuple[str, ...] | None,
    grpc: bool = False,
    dns_refresh_s: float = DNS_REFRESH_S,
    captured: bool = False,
) -> dict[str, Any]:
    """The cluster of a port. `endpoints` only for services that the proxy resolves by DNS; `metadata` says what tools want to know of its origin.

    `identities`: who may answer, for callers that have an identity themselves; None for those without one. `grpc`: it is for gRPC's own client, which cannot
    tell endpoints that take mutual TLS from others: it speaks it where a rule says so.
    """
    name = outbound_cluster(service.host, port.number, subset)
    cluster: dict[str, Any] = {
        "name": name,
        "connect_timeout": duration(_CONNECT_TIMEOUT_S),
        # What is not ready gets nothing, however few there are; a rule with outlier detection may say otherwise.
        "common_lb_config": {"healthy_panic_threshold": {}},
        "metadata": {"filter_metadata": {"istio": {**dict(metadata), "services": [_service_metadata(service)]}}},
    }
    if service.as_meant and (captured or service.host.startswith("*")):  # names under it are known from captured traffic only
        cluster["type"] = "ORIGINAL_DST"
    elif service.resolution is Resolution.ENDPOINTS:
        cluster.update(type="EDS", eds_cluster_config={"eds_config": ADS, "service_name": name})
    else:
        cluster.update(
            type="STRICT_DNS" if service.resolution is Resolution.DNS else "LOGICAL_DNS",
            dns_lookup_family="V4_PREFERRED" if all(is_ip(one.address) for one in endpoints or ()) else "V4_ONLY",
            dns_refresh_rate=duration(dns_refresh_s),
            respect_dns_ttl=True,
            load_assignment=load_assignment(name, endpoints or ()),
        )
    http: dict[str, Any] = {}
    _connection_pool(cluster, http, policy.connection_pool)
    if policy.retry_budget is not None:
        percent, least = policy.retry_budget
        cluster["circuit_breakers"]["thresholds"][0]["retry_budget"] = {"budget_percent": {"value": percent}, "min_retry_concurrency": least}
    _balancer(cluster, policy.load_balancer, policy.outlier_detection)
    if cluster["type"] == "ORIGINAL_DST":  # nothing is chosen
        cluster = {name: value for name, value in cluster.items() if not name.endswith("_lb_config")} | {"lb_policy": "CLUSTER_PROVIDED"}
    else:
        _outlier_detection(cluster, policy.outlier_detection)
    _tls(cluster, http, policy.tls, port, _speaks_http2(port, policy.connection_pool))
    _protocol(cluster, http, _speaks_http2(port, policy.connection_pool), policy.connection_pool, negotiated=_negotiates(policy.tls) and not grpc)
    if identities is not None and grpc:
        if policy.tls is not None and policy.tls.mode == "ISTIO_MUTUAL":
            cluster["transport_socket"] = mtls.grpc_upstream(policy.tls.subject_alt_names or identities)
    elif identities is not None:
        _mutual_tls(cluster, policy.tls, mtls.server_name(port.number, subset, service.host), identities, _speaks_http2(port, policy.connection_pool))
    if policy.proxy_protocol and not grpc:
        _tell_callers(cluster, policy.proxy_protocol)
    return cluster


def _tell_callers(cluster: dict[str, Any], version: int) -> None:
    """Connections begin with the PROXY protocol, whatever else they are wrapped in."""

    def wrapped(inner: dict[str, Any]) -> dict[str, Any]:
        fields = {"config": {"version": f"V{version}"}, "transport_socket": inner}
        socket = typed("envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport", **fields)
        return {"name": "envoy.transport_sockets.upstream_proxy_protocol", "typed_config": socket}

    matches = cluster.get("transport_socket_matches", ())
    if "transport_socket" in cluster or not matches:
        cluster["transport_socket"] = wrapped(cluster.get("transport_socket", _RAW))
    if matches:
        cluster["transport_socket_matches"] = [{**one, "transport_socket": wrapped(one["transport_socket"])} for one in matches]


def passed_on(service: Service, port: Port, subset: str, policy: TrafficPolicy, metadata: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The cluster by which a gateway passes the mutual TLS of others on: named as callers say it, and without any TLS of its own."""
    name = mtls.server_name(port.number, subset, service.host)
    cluster = outbound(service, port, subset, replace(policy, tls=None, proxy_protocol=0), None, metadata, None)
    return {**cluster, "name": name, "eds_cluster_config": {"eds_config": ADS, "service_name": name}}


def _service_metadata(service: Service) -> dict[str, str]:
    return {"host": service.host, "name": service.host.partition(".")[0], "namespace": service.namespace}


def black_hole() -> dict[str, Any]:
    """The cluster of what may not be reached: nobody is behind it."""
    return {"name": BLACK_HOLE, "type": "STATIC", "connect_timeout": duration(_CONNECT_TIMEOUT_S)}


def passthrough(defaults: ClusterDefaults = NO_CLUSTER_DEFAULTS) -> dict[str, Any]:
    """The cluster of what is not in the mesh and may be reached: at the address to which a captured connection was sent, or else that a request names as its
    host, as applications do that use the sidecar as their HTTP proxy."""
    cluster = {
        "name": PASSTHROUGH,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": duration(_CONNECT_TIMEOUT_S),
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": ":authority"},
    }
    http: dict[str, Any] = {}
    pool = pool_of(None, defaults)
    _connection_pool(cluster, http, pool)
    _protocol(cluster, http, False, pool)
    return cluster


def collector(name: str, host: str, port: int, http: bool) -> dict[str, Any]:
    """The cluster of a collector of traces that is no service of the mesh, reached as it is: by gRPC, or by HTTP/1."""
    made: dict[str, Any] = {
        "name": name,
        "type": "STATIC" if _is_address(host) else "STRICT_DNS",
        "connect_timeout": duration(_CONNECT_TIMEOUT_S),
        "circuit_breakers": _thresholds({}),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}}]}],
        },
    }
    if not http:
        made["typed_extension_protocol_options"] = _http_options({"explicit_http_config": {"http2_protocol_options": {}}})
    return made


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def inbound(port: int, endpoint: tuple[str, int], http2: bool, service: Service | None = None, pool: ConnectionPool | None = None) -> dict[str, Any]:
    """The cluster by which a sidecar reaches the application beside it, at an address and port, or at a path and 0. `service`: that it is part of."""
    name = inbound_cluster(port)
    host, number = endpoint
    address = {"socket_address": {"address": host, "port_value": number}} if number else {"pipe": {"path": host}}
    cluster: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": duration(_CONNECT_TIMEOUT_S),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
    if service is not None:
        cluster["metadata"] = {"filter_metadata": {"istio": {"services": [_service_metadata(service)]}}}
    http: dict[str, Any] = {}
    _connection_pool(cluster, http, pool)
    _protocol(cluster, http, http2, pool)
    return cluster


def _thresholds(limits: dict[str, int]) -> dict[str, Any]:
    unlimited = {"max_connections": _NO_LIMIT, "max_pending_requests": _NO_LIMIT, "max_requests": _NO_LIMIT, "max_retries": _NO_LIMIT}
    return {"thresholds": [{**unlimited, **limits, "track_remaining": True}]}


def _connection_pool(cluster: dict[str, Any], http: dict[str, Any], pool: ConnectionPool | None) -> None:
    if pool is None:
        cluster["circuit_breakers"] = _thresholds({})
        return
    limits = {
        "max_connections": pool.max_connections,
        "max_pending_requests": pool.max_pending_requests,
        "max_requests": pool.max_requests,
        "max_retries": pool.max_retries,
    }
    cluster["circuit_breakers"] = _thresholds({name: limit for name, limit in limits.items() if limit})
    if pool.connect_timeout_s is not None:
        cluster["connect_timeout"] = duration(pool.connect_timeout_s)
    if pool.tcp_keepalive:
        alive = {
            "keepalive_probes": pool.keepalive_probes,
            "keepalive_time": None if pool.keepalive_time_s is None else int(pool.keepalive_time_s),
            "keepalive_interval": None if pool.keepalive_interval_s is None else int(pool.keepalive_interval_s),
        }
        cluster["upstream_connection_options"] = {"tcp_keepalive": {name: value for name, value in alive.items() if value is not None}}
    common: dict[str, Any] = {}
    idle = pool.idle_timeout_s if pool.idle_timeout_s is not None else pool.tcp_idle_timeout_s
    if idle is not None:
        common["idle_timeout"] = duration(idle)
    if pool.max_requests_per_connection:
        common["max_requests_per_connection"] = pool.max_requests_per_connection
    if pool.max_connection_duration_s is not None:
        common["max_connection_duration"] = duration(pool.max_connection_duration_s)
    if common:
        http["common_http_protocol_options"] = common


def _protocol(cluster: dict[str, Any], http: dict[str, Any], http2: bool, pool: ConnectionPool | None, *, negotiated: bool = False) -> None:
    """One version of HTTP, or whatever the client speaks, or what the endpoint chooses by ALPN."""
    options = {"max_concurrent_streams": pool.max_concurrent_streams} if pool is not None and pool.max_concurrent_streams else {}
    if pool is not None and pool.use_client_protocol:
        http["use_downstream_protocol_config"] = {"http_protocol_options": {}, "http2_protocol_options": options}
    elif http2:
        http["explicit_http_config"] = {"http2_protocol_options": options}
    elif negotiated:
        http["auto_config"] = {"http_protocol_options": {}, "http2_protocol_options": options}
    elif http:
        http["explicit_http_config"] = {"http_protocol_options": {}}
    if http:
        cluster["typed_extension_protocol_options"] = _http_options(http)


def _negotiates(settings: TlsSettings | None) -> bool:
    """Whether TLS is what the service's own side asks for: its port's name then says little about what is spoken within."""
    return settings is not None and settings.by_service and settings.is_originated


def _speaks_http2(port: Port, pool: ConnectionPool | None) -> bool:
    if pool is not None and pool.use_client_protocol:
        return False  # not always, that is
    return port.protocol.is_http2 or (pool is not None and pool.h2_upgrade == "UPGRADE")


def _mutual_tls(cluster: dict[str, Any], tls: TlsSettings | None, sni: str, identities: tuple[str, ...], http2: bool) -> None:
    """TLS of the mesh: where a rule asks for it, and, without a rule, to the endpoints that take it."""
    if tls is None and cluster["type"] == "EDS":
        cluster["transport_socket_matches"] = mtls.upstream_matches(sni, identities, http2)
    elif tls is not None and tls.mode == "ISTIO_MUTUAL":
        cluster["transport_socket"] = mtls.upstream(tls.sni or sni, tls.subject_alt_names or identities, http2)


def _http_options(options: dict[str, Any]) -> dict[str, Any]:
    return {_HTTP_OPTIONS: typed(_HTTP_OPTIONS, **options)}


def _balancer(cluster: dict[str, Any], balancer: LoadBalancer | None, outlier: OutlierDetection | None) -> None:
    balancer = balancer or LoadBalancer()
    cluster["lb_policy"] = balancer.simple or "LEAST_REQUEST"
    if balancer.hash is not None:
        if balancer.hash.maglev_table_size:
            cluster.update(lb_policy="MAGLEV", maglev_lb_config={"table_size": balancer.hash.maglev_table_size})
        else:
            cluster.update(lb_policy="RING_HASH", ring_hash_lb_config={"minimum_ring_size": balancer.hash.minimum_ring_size})
    elif balancer.warmup_s is not None and cluster["lb_policy"] in ("LEAST_REQUEST", "ROUND_ROBIN"):
        start: dict[str, Any] = {"slow_start_window": duration(balancer.warmup_s)}
        if balancer.warmup_minimum_percent is not None:
            start["min_weight_percent"] = {"value": balancer.warmup_minimum_percent}
        if balancer.warmup_aggression is not None:
            start["aggression"] = {"default_value": balancer.warmup_aggression, "runtime_key": "upstream.slow_start.aggression"}
        cluster[f"{cluster['lb_policy'].lower()}_lb_config"] = {"slow_start_config": start}
    if balancer.locality is not None and balancer.locality.zone_aware:
        zones: dict[str, Any] = {} if balancer.locality.enabled else {"routing_enabled": {"value": 0}}
        if balancer.locality.minimum_cluster_size is not None:
            zones["min_cluster_size"] = balancer.locality.minimum_cluster_size
        cluster["common_lb_config"]["zone_aware_lb_config"] = zones
    elif balancer.locality is not None and balancer.locality.enabled and (balancer.locality.distribute or balancer.locality.always or outlier is not None):
        cluster["common_lb_config"]["locality_weighted_lb_config"] = {}


def _outlier_detection(cluster: dict[str, Any], outlier: OutlierDetection | None) -> None:
    if outlier is None:
        return
    out: dict[str, Any] = {"enforcing_success_rate": 0}
    for value, name in ((outlier.consecutive_5xx, "consecutive_5xx"), (outlier.consecutive_gateway, "consecutive_gateway_failure")):
        if value is not None:
            out[name] = value
            out[f"enforcing_{name}"] = 100 if value else 0
    if outlier.interval_s is not None:
        out["interval"] = duration(outlier.interval_s)
    if outlier.base_ejection_s is not None:
        out["base_ejection_time"] = duration(outlier.base_ejection_s)
    if outlier.max_ejection_percent:
        out["max_ejection_percent"] = outlier.max_ejection_percent
    if outlier.split_local_origin:
        out.update(split_external_local_origin_errors=True, enforcing_local_origin_success_rate=0)
        if outlier.consecutive_local_origin:
            out.update(consecutive_local_origin_failure=outlier.consecutive_local_origin, enforcing_consecutive_local_origin_failure=100)
    cluster["outlier_detection"] = out
    cluster["common_lb_config"]["healthy_panic_threshold"] = {"value": outlier.min_health_percent}


def _tls(cluster: dict[str, Any], http: dict[str, Any], settings: TlsSettings | None, port: Port, http2: bool) -> None:
    """TLS that the callers' proxies begin themselves. Where nothing says which server is meant, that is what a request names as its host, as in Istio."""
    if settings is None or not settings.is_originated:
        return
    resolved = cluster["type"] not in ("EDS", "ORIGINAL_DST")
    if not settings.sni and not resolved and port.protocol.is_http:
        checked = not settings.insecure_skip_verify and not settings.subject_alt_names
        http["upstream_http_protocol_options"] = {"auto_sni": True, **({"auto_san_validation": True} if checked else {})}
    cluster["transport_socket"] = tls.upstream(settings, http2=http2, resolved=resolved)
