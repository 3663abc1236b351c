"""What the core honours of the messages that belong to no single module, and which kind of extension belongs into which field."""

from __future__ import annotations

_BOOTSTRAP = "envoy.config.bootstrap.v3."
_CLUSTER = "envoy.config.cluster.v3."
_CORE = "envoy.config.core.v3."
_HCM = "envoy.extensions.filters.network.http_connection_manager.v3."
_LISTENER = "envoy.config.listener.v3."
_ROUTE = "envoy.config.route.v3."
_RULES = "envoy.config.common.mutation_rules.v3."
_TLS = "envoy.extensions.transport_sockets.tls.v3."
_TRACE = "envoy.config.trace.v3."
_TAG = "envoy.type.tracing.v3.CustomTag"
_METADATA = "envoy.type.metadata.v3.Metadata"

HONOURS = {
    f"{_BOOTSTRAP}Bootstrap": "node static_resources cluster_manager stats_config stats_flush_interval layered_runtime admin default_regex_engine"
    " dynamic_resources hds_config bootstrap_extensions",
    f"{_BOOTSTRAP}Bootstrap.DynamicResources": "lds_config cds_config ads_config",
    f"{_BOOTSTRAP}Bootstrap.StaticResources": "listeners clusters secrets",
    f"{_BOOTSTRAP}Admin": "access_log access_log_path address socket_options allow_paths",
    f"{_BOOTSTRAP}ClusterManager": "local_cluster_name upstream_bind_config load_stats_config",
    f"{_CORE}AggregatedConfigSource": "",
    f"{_CORE}SelfConfigSource": "",
    f"{_CORE}ApiConfigSource": "api_type transport_api_version grpc_services set_node_on_first_message_only rate_limit_settings",
    f"{_CORE}RateLimitSettings": "max_tokens fill_rate",
    f"{_CORE}BackoffStrategy": "base_interval max_interval",
    f"{_CORE}GrpcService": "envoy_grpc timeout initial_metadata",  # the timeout is one of unary calls; xDS has streams, in Envoy too
    f"{_CORE}GrpcService.EnvoyGrpc": "cluster_name authority retry_policy",
    f"{_CORE}HeaderValue": "key value raw_value",
    f"{_CORE}RetryPolicy": "retry_back_off num_retries retry_on",
    f"{_CORE}ConfigSource": "path path_config_source api_config_source ads self initial_fetch_timeout resource_api_version",
    f"{_CORE}PathConfigSource": "path watched_directory",
    f"{_CORE}WatchedDirectory": "path",
    f"{_CORE}Node": "id cluster metadata locality user_agent_name user_agent_version user_agent_build_version",
    f"{_CORE}BuildVersion": "version metadata",
    f"{_CORE}Locality": "region zone sub_zone",
    f"{_CORE}Metadata": "filter_metadata",
    f"{_CORE}RuntimeUInt32": "default_value runtime_key",
    f"{_CORE}TypedExtensionConfig": "name typed_config",
    # Of connection managers and of clusters: either may be there without the other.
    f"{_CORE}HttpProtocolOptions": (
        "idle_timeout max_connection_duration max_headers_count max_stream_duration headers_with_underscores_action max_requests_per_connection"
        " max_response_headers_kb"
    ),
    f"{_CORE}Http1ProtocolOptions": (
        "allow_absolute_url accept_http_10 default_host_for_http_10 header_key_format enable_trailers"
        " override_stream_error_on_invalid_http_message use_balsa_parser allow_custom_methods"
    ),
    f"{_CORE}Http1ProtocolOptions.HeaderKeyFormat": "proper_case_words stateful_formatter",
    f"{_CORE}Http1ProtocolOptions.HeaderKeyFormat.ProperCaseWords": "",
    # Of the filter and of mirror policies.
    f"{_RULES}HeaderMutation": "remove append remove_on_match",
    f"{_RULES}HeaderMutation.RemoveOnMatch": "key_matcher",
    # Of transport sockets, of static secrets that none of them may use, and of RBAC principals.
    f"{_TLS}TlsCertificate": "certificate_chain private_key password watched_directory",
    f"{_TLS}CertificateValidationContext": (
        "trusted_ca system_root_certs verify_certificate_spki verify_certificate_hash match_typed_subject_alt_names match_subject_alt_names crl"
        " allow_expired_certificate trust_chain_verification only_verify_leaf_cert_crl watched_directory"
    ),
    f"{_TLS}CertificateValidationContext.SystemRootCerts": "",
    f"{_TLS}SubjectAltNameMatcher": "san_type matcher oid",
    # Of http.tracing and tracing.tags, which are loaded only where there is tracing.
    f"{_HCM}HttpConnectionManager.Tracing": (
        "client_sampling random_sampling overall_sampling verbose max_path_tag_length custom_tags provider spawn_upstream_span operation upstream_operation"
    ),
    f"{_ROUTE}Tracing": "client_sampling random_sampling overall_sampling custom_tags operation upstream_operation",
    f"{_TRACE}Tracing.Http": "name typed_config",
    _TAG: "tag literal environment request_header metadata value",
    f"{_TAG}.Literal": "value",
    f"{_TAG}.Environment": "name default_value",
    f"{_TAG}.Header": "name default_value",
    f"{_TAG}.Metadata": "kind metadata_key default_value",
    f"{_METADATA}Key": "key path",
    f"{_METADATA}Key.PathSegment": "key",
    f"{_METADATA}Kind": "request route cluster host",
    f"{_METADATA}Kind.Request": "",
    f"{_METADATA}Kind.Route": "",
    f"{_METADATA}Kind.Cluster": "",
    f"{_METADATA}Kind.Host": "",
    "envoy.type.v3.Int32Range": "start end",
    "envoy.type.v3.Percent": "value",
    "envoy.type.v3.SemanticVersion": "major_number minor_number patch",
    "xds.core.v3.CidrRange": "address_prefix prefix_len",
}

# Full name of a field -> the kind of extension (a key of registry.KINDS) in its Any, or in the Any of the message in it.
KIND_OF_FIELD = {
    f"{_LISTENER}Filter.typed_config": "network filter",
    f"{_LISTENER}ListenerFilter.typed_config": "listener filter",
    f"{_LISTENER}FilterChain.transport_socket": "downstream transport socket",
    f"{_CLUSTER}Cluster.transport_socket": "upstream transport socket",
    f"{_CLUSTER}Cluster.TransportSocketMatch.transport_socket": "upstream transport socket",
    "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport.transport_socket": "upstream transport socket",
    f"{_CLUSTER}Cluster.CustomClusterType.typed_config": "cluster type",
    f"{_CLUSTER}Cluster.typed_extension_protocol_options": "cluster protocol options",
    f"{_CLUSTER}Cluster.typed_dns_resolver_config": "DNS resolver",
    f"{_CLUSTER}LoadBalancingPolicy.Policy.typed_extension_config": "load balancing policy",
    "envoy.extensions.clusters.dns.v3.DnsCluster.typed_dns_resolver_config": "DNS resolver",
    f"{_BOOTSTRAP}Bootstrap.default_regex_engine": "regex engine",
    f"{_BOOTSTRAP}Bootstrap.bootstrap_extensions": "bootstrap extension",
    f"{_CORE}Http1ProtocolOptions.HeaderKeyFormat.stateful_formatter": "header formatter",
    f"{_CORE}SubstitutionFormatString.formatters": "formatter",
    "envoy.config.accesslog.v3.AccessLog.typed_config": "access logger",
    f"{_HCM}HttpFilter.typed_config": "http filter",
    f"{_HCM}HttpFilter.config_discovery": "http filter",
    f"{_HCM}HttpConnectionManager.original_ip_detection_extensions": "original IP detection",
    f"{_HCM}RequestIDExtension.typed_config": "request id",
    "envoy.config.rbac.v3.Principal.custom": "RBAC principal",
    "xds.type.matcher.v3.Matcher.OnMatch.action": "RBAC action",
    "xds.type.matcher.v3.Matcher.MatcherList.Predicate.SinglePredicate.input": "match input",
    "xds.type.matcher.v3.Matcher.MatcherList.Predicate.SinglePredicate.custom_match": "input matcher",
    "xds.type.matcher.v3.Matcher.MatcherTree.input": "match input",
    "xds.type.matcher.v3.Matcher.MatcherTree.custom_match": "match tree",
    f"{_TRACE}Tracing.Http.typed_config": "tracer",
    f"{_TRACE}OpenTelemetryConfig.sampler": "OpenTelemetry sampler",
    f"{_TRACE}OpenTelemetryConfig.resource_detectors": "OpenTelemetry resource detector",
    "envoy.extensions.tracers.opentelemetry.samplers.v3.ParentBasedSamplerConfig.wrapped_sampler": "OpenTelemetry sampler",
    f"{_ROUTE}FilterConfig.config": "per-route filter configuration",
    f"{_ROUTE}RouteConfiguration.typed_per_filter_config": "per-route filter configuration",
    f"{_ROUTE}VirtualHost.typed_per_filter_config": "per-route filter configuration",
    f"{_ROUTE}Route.typed_per_filter_config": "per-route filter configuration",
    f"{_ROUTE}WeightedCluster.ClusterWeight.typed_per_filter_config": "per-route filter configuration",
    f"{_ROUTE}RouteMatch.path_match_policy": "path match",
    f"{_ROUTE}RouteAction.path_rewrite_policy": "path rewrite",
    f"{_ROUTE}RetryPolicy.RetryHostPredicate.typed_config": "retry host predicate",
    f"{_ROUTE}RetryPolicy.RetryPriority.typed_config": "retry priority",
}
