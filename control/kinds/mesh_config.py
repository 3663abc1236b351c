"""Fields of Istio's MeshConfig that are not about telemetry or authorisation.

Istio's own installations write many of them. What says nothing where traffic is not captured and proxies are started by others is passed over; what has a
meaning here is honoured; all else would make a mesh another one than this, and is refused.
"""

from __future__ import annotations

import re
from dataclasses import replace

from control.kinds.destination_rule import connection_pool, locality, outlier_detection, zone_aware
from control.kinds.fields import Fields
from control.kinds.gateway import CIPHER_SUITES
from control.kinds.virtual_service import retries_of
from control.model.mesh import NO_DEFAULTS, NORMAL, ClusterDefaults, ListenerDefaults, MeshDefaults, TlsLimits
from control.model.security import ROOT_NAMESPACE
from control.model.traffic import ConnectionPool, LocalitySettings
from meshproxy.api.errors import UNSUPPORTED

# About captured traffic, Ingresses, Istio's other parts, several clusters, names of statistics.
_MEANINGLESS = (
    "proxyListenPort", "proxyInboundListenPort", "protocolDetectionTimeout", "inboundTrafficPolicy", "ingressClass", "ingressService", "ingressControllerMode",
    "ingressSelector", "disableEnvoyListenerLog", "enablePrometheusMerge", "serviceSettings", "serviceScopeConfigs", "certificates", "inboundClusterStatName",
    "outboundClusterStatName", "thriftConfig",
)  # fmt: skip

# How Istio's agent starts a proxy, and what it has on its disk.
_OF_PROCESSES = (
    "configPath", "binaryPath", "serviceCluster", "discoveryAddress", "discoveryRefreshDelay", "drainDuration", "parentShutdownDuration",
    "terminationDrainDuration", "proxyAdminPort", "controlPlaneAuthPolicy", "customConfigFile", "statNameLength", "concurrency", "proxyBootstrapTemplatePath",
    "interceptionMode", "availabilityZone", "proxyMetadata", "statusPort", "readinessProbe", "holdApplicationUntilProxyStarts", "image", "meshId",
    "extraStatTags", "proxyStatsMatcher", "fileFlushInterval", "fileFlushMinSizeKb",
)  # fmt: skip

_TRACERS = ("zipkin", "lightstep", "datadog", "stackdriver", "openCensusAgent")
_TLS_VERSIONS = {"TLS_AUTO": "", "TLSV1_2": "TLSv1_2", "TLSV1_3": "TLSv1_3"}
_CURVES = "P-256", "P-384", "P-521", "X25519"
PATHS = {name: name for name in ("NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES")} | {"DEFAULT": NORMAL}  # what is done to paths
_CERTIFICATES = "UNDEFINED", "SANITIZE", "FORWARD_ONLY", "APPEND_FORWARD", "SANITIZE_SET", "ALWAYS_FORWARD_ONLY"
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_CONNECT_TIMEOUT_S = 10.0  # what is so anyway


def is_trust_domain(name: str) -> bool:
    """Whether principals may begin with it."""
    return "/" not in name and "*" not in name


def trust_domain(mesh: Fields) -> tuple[str, tuple[str, ...]]:
    """Its name, "" where it says none, and older names that policies may still use."""
    name, aliases = mesh.text("trustDomain"), mesh.texts("trustDomainAliases")
    for index, one in enumerate(aliases):
        if not is_trust_domain(one):
            mesh.error(f"trustDomainAliases[{index}]", f"{one!r:.80} is no trust domain")
    return name, aliases


def is_namespace(name: str) -> bool:
    return _NAMESPACE.fullmatch(name) is not None


def general(mesh: Fields, proxies: Fields | None) -> MeshDefaults:
    """`proxies`: its defaultConfig. What holds where nothing else says it. Refuses what would not be honoured. Raises nothing; problems are in the Fields."""
    mesh.ignore(*_MEANINGLESS)
    _refuse(mesh)
    root = mesh.text("rootNamespace") or ROOT_NAMESPACE
    if not is_namespace(root):
        mesh.error("rootNamespace", f"{root!r:.80} is no name of a namespace")
    retries = mesh.child("defaultHttpRetryPolicy")
    refresh = mesh.duration("dnsRefreshRate", low=1e-3)
    usual = _tls_limits(mesh.child("tlsDefaults"))
    paths = mesh.child("pathNormalization")
    listeners = ListenerDefaults(
        PATHS[paths.text("normalization", "DEFAULT", choices=PATHS)] if paths is not None else NORMAL,
        _of_mesh(_tls_limits(mesh.child("meshMTLS"), curves=False)),
        usual,
    )
    made = MeshDefaults(
        root,
        _exported(mesh, "defaultServiceExportTo"),
        _exported(mesh, "defaultVirtualServiceExportTo"),
        _exported(mesh, "defaultDestinationRuleExportTo"),
        _clusters(mesh),
        _gateways(proxies.child("gatewayTopology") if proxies is not None else None, listeners),
        retries_of(retries) if retries is not None else None,
        60.0 if refresh is None else refresh,
        replace(usual, min_version=""),
    )
    return made if made != NO_DEFAULTS else NO_DEFAULTS


def _refuse(mesh: Fields) -> None:
    _unless(mesh, "proxyHttpPort", not mesh.integer("proxyHttpPort", 0), "sidecar.httpProxy of a Workload says where its HTTP proxy is")
    _unless(mesh, "enableEnvoyAccessLogService", not mesh.boolean("enableEnvoyAccessLogService"), "access logs go to files")
    mesh.not_honoured("caCertificates", why="who is trusted is a matter of the authority, see `meshctl certs`")
    mesh.not_honoured("discoverySelectors", why="all namespaces are seen; exportTo and Sidecars say who sees what")
    mesh.not_honoured("configSources", "ca", "verifyCertificateAtClient")


def _exported(mesh: Fields, name: str) -> tuple[str, ...]:
    """Who sees what does not say so; nothing for everybody."""
    where = mesh.texts(name)
    for index, one in enumerate(where):
        if one not in ("*", ".", "~") and not is_namespace(one):
            mesh.error(f"{name}[{index}]", f"{one!r:.80} is neither a namespace, nor one of *, ., ~")
    return () if "*" in where else where


def _clusters(mesh: Fields) -> ClusterDefaults:
    keepalive = mesh.child("tcpKeepalive")
    alive = None
    if keepalive is not None:
        alive = ConnectionPool(
            keepalive_probes=keepalive.integer("probes"),
            keepalive_time_s=keepalive.duration("time"),
            keepalive_interval_s=keepalive.duration("interval"),
            tcp_keepalive=True,
        )
    near = zone_aware(mesh.child("zoneAwareLbSetting")), locality(mesh.child("localityLbSetting"))  # as in Istio, the former goes before the latter
    chosen = near[0] or near[1]
    traffic = mesh.child("defaultTrafficPolicy")
    timeout = mesh.duration("connectTimeout", low=1e-3)
    return ClusterDefaults(
        None if timeout == _CONNECT_TIMEOUT_S else timeout,
        alive,
        None if chosen is None or _is_usual(chosen) else chosen,
        mesh.text("h2UpgradePolicy", "DO_NOT_UPGRADE", choices=("DO_NOT_UPGRADE", "UPGRADE")) == "UPGRADE",
        mesh.boolean("enableAutoMtls", True) is not False,
        connection_pool(traffic.child("connectionPool")) if traffic is not None else None,
        outlier_detection(traffic.child("outlierDetection")) if traffic is not None else None,
    )


def _is_usual(settings: LocalitySettings) -> bool:
    """Whether it says no more than that the nearest go first."""
    return settings.enabled and not (settings.distribute or settings.failover or settings.priority or settings.zone_aware)


def _tls_limits(fields: Fields | None, *, curves: bool = True) -> TlsLimits:
    if fields is None:
        return TlsLimits()
    suites, named = fields.texts("cipherSuites"), fields.texts("ecdhCurves") if curves else ()
    for name, found, known in (("cipherSuites", suites, CIPHER_SUITES), ("ecdhCurves", named, _CURVES)):
        for index, one in enumerate(found):
            if one not in known:
                fields.error(f"{name}[{index}]", f"{one!r:.80} is not one of {', '.join(known)}")
    if len(named) > 1:
        fields.error("ecdhCurves", "our sidecar can be held to one curve, not to several", UNSUPPORTED)
    if not curves:
        fields.not_honoured("ecdhCurves", why="is not for TLS of the mesh, in Istio either")
    return TlsLimits(_TLS_VERSIONS[fields.text("minProtocolVersion", "TLS_AUTO", choices=_TLS_VERSIONS)], tuple(dict.fromkeys(suites)), named)


def _of_mesh(limits: TlsLimits) -> TlsLimits:
    return limits if limits.min_version else replace(limits, min_version="TLSv1_2")


def _gateways(topology: Fields | None, listeners: ListenerDefaults) -> ListenerDefaults:
    """With what is said of who stands in front of gateways."""
    if topology is None:
        return listeners
    details = topology.text("forwardClientCertDetails", "UNDEFINED", choices=_CERTIFICATES)
    return replace(
        listeners,
        trusted_proxies=topology.integer("numTrustedProxies", 0) or 0,
        client_certificates="" if details == "UNDEFINED" else details,
        told_clients=topology.child("proxyProtocol") is not None,
    )


def check_proxy(config: Fields, *, traced: bool) -> Fields | None:
    """The same for `defaultConfig`. Returns its `tracing`, whose rest somebody else reads; tracers say nothing where nothing is traced."""
    config.ignore(*_OF_PROCESSES)
    tracing = config.child("tracing")
    if tracing is not None and not traced:
        tracing.ignore(*_TRACERS, "tlsSettings", "maxPathTagLength")
    elif tracing is not None:
        tracing.not_honoured(*_TRACERS, why="spans go to a provider `opentelemetry` of extensionProviders that defaultProviders.tracing names")
        tracing.not_honoured("tlsSettings", why="a DestinationRule says it for the collector's host")
        tracing.not_honoured("maxPathTagLength", why="maxTagLength of the provider is honoured")
        tracing.not_honoured("enableIstioTags", why="the tags of Istio's are always set")
    config.not_honoured("envoyAccessLogService", "envoyMetricsService", "statsdUdpAddress", why="statistics are scraped, and access logs go to files")
    config.not_honoured("runtimeValues", "proxyHeaders", "caCertificatesPem", "privateKeyProvider", "sds")
    return tracing


def _unless(fields: Fields, name: str, so: object, why: str) -> None:
    if not so:
        fields.error(name, why, UNSUPPORTED)
