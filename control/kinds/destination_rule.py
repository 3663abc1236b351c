"""Istio's DestinationRule."""

from __future__ import annotations

from dataclasses import replace

from control.kinds.common import Meta, export_to, host_of
from control.kinds.fields import Fields
from control.model.traffic import (
    MUTUAL,
    SIMPLE,
    ConnectionPool,
    ConsistentHash,
    DestinationRule,
    LoadBalancer,
    LocalitySettings,
    OutlierDetection,
    Subset,
    TlsSettings,
    TrafficPolicy,
    Tunnel,
)
from control.names import resolve_host

_SIMPLE = {
    "UNSPECIFIED": "",
    "RANDOM": "RANDOM",
    "ROUND_ROBIN": "ROUND_ROBIN",
    "LEAST_REQUEST": "LEAST_REQUEST",
    "LEAST_CONN": "LEAST_REQUEST",  # Istio's old name of it
    "PASSTHROUGH": "PASSTHROUGH",
}

_PLACES = ("topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone")


def parse(meta: Meta, body: Fields) -> DestinationRule:
    """`spec` of a DestinationRule."""
    spec = body.need("spec")
    selector = spec.child("workloadSelector")
    subsets = spec.each("subsets", _subset)
    names = [subset.name for subset in subsets]
    for index, name in enumerate(names):
        if name in names[:index]:
            spec.error(f"subsets[{index}].name", f"there are two subsets {name!r}")
    return DestinationRule(
        meta.name,
        meta.namespace,
        resolve_host(spec.text("host", required=True), meta.namespace),
        _policy(spec),
        subsets,
        export_to(spec),
        selector.string_map("matchLabels") if selector is not None else None,
    )


def _subset(fields: Fields) -> Subset:
    return Subset(fields.text("name", required=True), fields.string_map("labels"), _policy(fields))


def _policy(owner: Fields) -> TrafficPolicy | None:
    policy = owner.child("trafficPolicy")
    if policy is None:
        return None
    if "tunnel" in policy and "proxyProtocol" in policy:
        policy.error("tunnel", "cannot go with proxyProtocol")
    return replace(
        _settings(policy, dict(policy.each("portLevelSettings", _port_policy))),
        retry_budget=_retry_budget(policy.child("retryBudget")),
        proxy_protocol=_proxy_protocol(policy.child("proxyProtocol")),
        tunnel=_tunnel(policy.child("tunnel")),
    )


def _tunnel(fields: Fields | None) -> Tunnel | None:
    if fields is None:
        return None
    posts = fields.text("protocol", "CONNECT", choices=("", "CONNECT", "POST")) == "POST"
    host = fields.text("targetHost", required=True)
    if host.startswith("*"):
        fields.error("targetHost", f"{host!r}: one host is needed, no pattern")
    elif host:
        host_of(fields, "targetHost", host)
    return Tunnel(f"{f'[{host}]' if ':' in host else host}:{fields.port('targetPort', required=True)}", posts)


def _proxy_protocol(fields: Fields | None) -> int:
    return 0 if fields is None else {"V1": 1, "V2": 2}[fields.text("version", "V1", choices=("V1", "V2"))]


def _retry_budget(fields: Fields | None) -> tuple[float, int] | None:
    if fields is None:
        return None
    least = fields.integer("minRetryConcurrency", 3)
    return fields.number("percent", 20.0, high=100.0), 3 if least is None else least


def _port_policy(fields: Fields) -> tuple[int, TrafficPolicy]:
    return fields.need("port").port("number", required=True), _settings(fields, {})


def _settings(policy: Fields, ports: dict[int, TrafficPolicy]) -> TrafficPolicy:
    pool, outlier = connection_pool(policy.child("connectionPool")), outlier_detection(policy.child("outlierDetection"))
    return TrafficPolicy(_load_balancer(policy), pool, outlier, _tls(policy), ports)


def _load_balancer(policy: Fields) -> LoadBalancer | None:
    fields = policy.child("loadBalancer")
    if fields is None:
        return None
    fields.one_of("simple", "consistentHash")
    fields.one_of("warmup", "warmupDurationSecs")
    simple = fields.text("simple", choices=_SIMPLE)
    if simple == "PASSTHROUGH":
        fields.error("simple", "PASSTHROUGH is not served; resolution NONE of a ServiceEntry has connections go where they were meant to", "unsupported")
    hash = fields.child("consistentHash")
    warmup = fields.child("warmup")
    least = aggression = None
    if warmup is not None:
        least = warmup.number("minimumPercent", 0.0, high=100.0) if "minimumPercent" in warmup else None
        aggression = warmup.number("aggression", 1.0, low=1.0) if "aggression" in warmup else None
    return LoadBalancer(
        _SIMPLE[simple or "UNSPECIFIED"],
        None if hash is None else _consistent_hash(hash),
        warmup.duration("duration", required=True) if warmup is not None else fields.duration("warmupDurationSecs"),
        zone_aware(fields.child("zoneAwareLbSetting"))
        if fields.one_of("localityLbSetting", "zoneAwareLbSetting") == "zoneAwareLbSetting"
        else locality(fields.child("localityLbSetting")),
        least,
        aggression,
    )


def locality(fields: Fields | None) -> LocalitySettings | None:
    """Istio's LocalityLoadBalancerSetting."""
    if fields is None:
        return None
    fields.one_of("distribute", "failover")
    priority = fields.texts("failoverPriority")
    for index, label in enumerate(priority):
        if label.count("=") > 1 or label.startswith("="):
            fields.error(f"failoverPriority[{index}]", f"{label!r} is neither a label nor label=value")
        elif label in _PLACES and "failover" in fields:
            fields.error(f"failoverPriority[{index}]", f"{label} cannot go with failover, which says where to go from a region")
    enabled = fields.boolean("enabled", True) is not False
    return LocalitySettings(enabled, fields.each("distribute", _distribute), fields.each("failover", _failover), priority)


def zone_aware(fields: Fields | None) -> LocalitySettings | None:
    """Istio's ZoneAwareLoadBalancerSetting."""
    if fields is None:
        return None
    priority = fields.texts("failoverPriority")
    for index, label in enumerate(priority):
        if label.count("=") > 1 or label.startswith("="):
            fields.error(f"failoverPriority[{index}]", f"{label!r} is neither a label nor label=value")
        elif label in _PLACES:
            fields.error(f"failoverPriority[{index}]", f"{label} is what zone awareness is about already")
    failover = fields.each("failover", _failover)
    for index, (origin, to) in enumerate(failover):
        if origin == to or any(mark in one for one in (origin, to) for mark in "/*"):
            fields.error(f"failover[{index}]", "two regions are needed, without zones")
    enabled = fields.boolean("enabled", True) is not False
    size = fields.integer("minClusterSize")
    return LocalitySettings(enabled, (), failover, priority, enabled, True, size)


def _distribute(fields: Fields) -> tuple[str, dict[str, int]]:
    weights = fields.mapping("to", lambda below, key: below.integer(key, low=1, high=100))
    if sum(weights.values()) != 100:
        fields.error("to", f"the weights add up to {sum(weights.values())}, not 100")
    return fields.text("from", required=True), weights


def _failover(fields: Fields) -> tuple[str, str]:
    return fields.text("from", required=True), fields.text("to", required=True)


def _consistent_hash(fields: Fields) -> ConsistentHash:
    fields.one_of("httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName", required=True)
    fields.one_of("ringHash", "maglev", "minimumRingSize")
    cookie = fields.child("httpCookie")
    ring, maglev = fields.child("ringHash"), fields.child("maglev")
    size = fields.integer("minimumRingSize", low=1, high=8 << 20)
    return ConsistentHash(
        fields.text("httpHeaderName"),
        cookie.text("name", required=True) if cookie else "",
        cookie.text("path") if cookie else "",
        cookie.duration("ttl") if cookie else None,
        cookie.each("attributes", lambda one: (one.text("name", required=True), one.text("value"))) if cookie else (),
        bool(fields.boolean("useSourceIp")),
        fields.text("httpQueryParameterName"),
        (ring.integer("minimumRingSize", low=1, high=8 << 20) if ring else size) or 1024,
        maglev.integer("tableSize", 65537, low=2, high=5000011) or 65537 if maglev is not None else 0,
    )


def connection_pool(pool: Fields | None) -> ConnectionPool | None:
    """Istio's ConnectionPoolSettings."""
    if pool is None:
        return None
    empty = Fields({})
    tcp = pool.child("tcp") or empty
    http = pool.child("http") or empty
    keepalive = tcp.child("tcpKeepalive")
    alive = keepalive or empty
    return ConnectionPool(
        max_connections=tcp.integer("maxConnections", low=1),
        connect_timeout_s=tcp.duration("connectTimeout"),
        max_connection_duration_s=tcp.duration("maxConnectionDuration"),
        keepalive_probes=alive.integer("probes"),
        keepalive_time_s=alive.duration("time"),
        keepalive_interval_s=alive.duration("interval"),
        tcp_keepalive=keepalive is not None,
        max_pending_requests=http.integer("http1MaxPendingRequests"),
        max_requests=http.integer("http2MaxRequests"),
        max_requests_per_connection=http.integer("maxRequestsPerConnection"),
        max_retries=http.integer("maxRetries"),
        idle_timeout_s=http.duration("idleTimeout"),
        max_concurrent_streams=http.integer("maxConcurrentStreams", low=1, high=2**31 - 1),
        h2_upgrade=http.text("h2UpgradePolicy", choices=("DEFAULT", "UPGRADE", "DO_NOT_UPGRADE")).replace("DEFAULT", ""),
        tcp_idle_timeout_s=tcp.duration("idleTimeout"),
        use_client_protocol=bool(http.boolean("useClientProtocol")),
    )


def outlier_detection(fields: Fields | None) -> OutlierDetection | None:
    """Istio's OutlierDetection."""
    if fields is None:
        return None
    fields.not_honoured("consecutiveErrors", why="is no longer part of Istio's API; use consecutive5xxErrors")
    return OutlierDetection(
        consecutive_5xx=fields.integer("consecutive5xxErrors"),
        consecutive_gateway=fields.integer("consecutiveGatewayErrors"),
        consecutive_local_origin=fields.integer("consecutiveLocalOriginFailures"),
        split_local_origin=bool(fields.boolean("splitExternalLocalOriginErrors")),
        interval_s=fields.duration("interval", low=1e-3),
        base_ejection_s=fields.duration("baseEjectionTime", low=1e-3),
        max_ejection_percent=fields.integer("maxEjectionPercent", high=100),
        min_health_percent=fields.integer("minHealthPercent", 0, high=100) or 0,
    )


def _tls(policy: Fields) -> TlsSettings | None:
    fields = policy.child("tls")
    if fields is None:
        return None
    mode = fields.text("mode", "DISABLE", choices=("DISABLE", SIMPLE, MUTUAL, "ISTIO_MUTUAL"))
    files = {name: fields.text(name) for name in ("caCertificates", "caCrl", "clientCertificate", "privateKey")}
    credential, names, skip = fields.text("credentialName"), fields.texts("subjectAltNames"), bool(fields.boolean("insecureSkipVerify"))
    for name in ("clientCertificate", "privateKey"):
        if files[name] and mode != MUTUAL:
            fields.error(name, f"is for MUTUAL, not for {mode}")
        elif mode == MUTUAL and not files[name] and not credential:
            fields.error(name, "is needed for MUTUAL, or a credentialName")
    if credential:
        if mode not in (SIMPLE, MUTUAL):
            fields.error("credentialName", f"is for SIMPLE and MUTUAL, not for {mode}")
        if "/" in credential:
            fields.error("credentialName", f"{credential!r}: only names of Secrets are served", "unsupported")
        for name, file in files.items():
            if file:
                fields.error(name, "cannot go with credentialName, which is a Secret that has it")
    if files["caCrl"] and not files["caCertificates"] and not credential:
        fields.error("caCrl", "needs caCertificates")
    for name, there in (("caCertificates", files["caCertificates"]), ("subjectAltNames", names)):
        if skip and there:
            fields.error(name, "would not be looked at: insecureSkipVerify says so")
    return TlsSettings(
        mode,
        fields.text("sni"),
        files["caCertificates"],
        names,
        skip,
        crl=files["caCrl"],
        certificate=files["clientCertificate"],
        private_key=files["privateKey"],
        credential=credential,
    )
