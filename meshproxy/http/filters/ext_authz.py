"""Asks a service whether a request may go on (envoy.extensions.filters.http.ext_authz.v3.ExtAuthz).

The service is told of the request, with its body or the beginning of it where that is wanted, and lets it go on, changed as it says, or has it answered. What
becomes of a request that could not be checked is configured. Routes may switch it off, tell the service more, or ask another one. The parts: `http.ext_authz`.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, matchers
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.api.metadata import struct_dict
from meshproxy.api.runtime import compile_flag, compile_fraction
from meshproxy.http import header_mutations, mutation_rules
from meshproxy.http.ext_authz import mutations
from meshproxy.http.ext_authz.attributes import Attributes, add_metadata, bootstrap_labels
from meshproxy.http.ext_authz.grpc_service import GrpcService, check_version
from meshproxy.http.ext_authz.http_service import HttpService, list_matcher
from meshproxy.http.ext_authz.verdict import DENIED, OK, Mutation, Verdict
from meshproxy.http.header_mutations import APPEND
from meshproxy.http.replies import Reply
from meshproxy.observe import flags

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from meshproxy.http.filters import FilterContext
    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.cluster import Cluster

_P = "envoy.extensions.filters.http.ext_authz.v3"
TYPE_URL = f"type.googleapis.com/{_P}.ExtAuthz"
ROUTE_TYPE_URLS = (f"type.googleapis.com/{_P}.ExtAuthzPerRoute",)
HONOURS = {
    f"{_P}.ExtAuthz": (
        "grpc_service http_service transport_api_version failure_mode_allow failure_mode_allow_header_add with_request_body clear_route_cache status_on_error "
        "validate_mutations metadata_context_namespaces route_metadata_context_namespaces filter_enabled filter_enabled_metadata deny_at_disable "
        "include_peer_certificate include_tls_session stat_prefix bootstrap_metadata_labels_key allowed_headers disallowed_headers "
        "charge_cluster_response_stats encode_raw_headers decoder_header_mutation_rules enable_dynamic_metadata_ingestion filter_metadata "
        "emit_filter_state_stats max_denied_response_body_bytes enforce_response_header_limits"
    ),
    f"{_P}.BufferSettings": "max_request_bytes allow_partial_message pack_as_bytes",
    f"{_P}.HttpService": "server_uri path_prefix authorization_request authorization_response retry_policy",
    f"{_P}.AuthorizationRequest": "allowed_headers headers_to_add",
    f"{_P}.AuthorizationResponse": (
        "allowed_upstream_headers allowed_upstream_headers_to_append allowed_client_headers allowed_client_headers_on_success dynamic_metadata_from_headers"
    ),
    f"{_P}.ExtAuthzPerRoute": "disabled check_settings",
    f"{_P}.CheckSettings": "context_extensions disable_request_body_buffering with_request_body grpc_service http_service",
    "envoy.config.core.v3.HttpUri": "uri cluster timeout",
    "envoy.config.core.v3.RuntimeFeatureFlag": "default_value runtime_key",
    "envoy.config.core.v3.RuntimeFractionalPercent": "default_value runtime_key",
    "envoy.type.v3.FractionalPercent": "numerator denominator",
    "envoy.type.v3.HttpStatus": "code",
    **header_mutations.HONOURS,
    **matchers.HONOURS,
    **mutation_rules.HONOURS,
}

METADATA = "envoy.filters.http.ext_authz"
_STATS = (
    "ok", "denied", "error", "disabled", "failure_mode_allowed", "invalid", "ignored_dynamic_metadata", "filter_state_name_collision",
    "omitted_response_headers", "request_header_limits_reached", "response_header_limits_reached",
)  # fmt: skip
_OF_HTTP = (b"authorization", b":method", b":path", b":authority")  # what a service that is asked by HTTP gets in any case
_MAX_RESPONSE_HEADERS = 100  # of an upstream's response, and its status

_TOO_LARGE = Reply(413, b"Payload Too Large", details="request_payload_too_large", close=True, early=True)
_INVALID = Reply(500, details="ext_authz_invalid", flag=flags.UAEX)

Service = GrpcService | HttpService


class LoggingInfo:
    """The filter state that access logs read: fields have the names that they ask for."""

    latency_us: int | None = None
    bytesSent: int | None = None  # noqa: N815 - as access logs have it
    bytesReceived: int | None = None  # noqa: N815

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata


class ExtAuthz:
    """The filter, as a route has it. `extensions`: what the service is told of the route; `body`: the most bytes of it that the service gets, and whether the
    beginning is enough; None: none.
    """

    __slots__ = ("_base", "_body", "_extensions", "_service", "name")

    def __init__(self, base: Base, service: Service, extensions: Mapping[str, str], body: tuple[int, bool] | None) -> None:
        self._base = base
        self._service = service
        self._extensions = extensions
        self._body = body
        self.name = ""

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | Awaitable[Reply | None] | None:
        """Let the request pass, or hold it until the service has answered."""
        if stream.route is None:
            return None
        base = self._base
        if not base.is_enabled(stream):
            base.stats["disabled"].n += 1
            return base.on_error if base.denies_at_disable() else None
        if self._body is None or end_stream or (stream.upgrade or b"").lower() == b"websocket" or stream.request.protocol is not None:
            return self._check(stream, stream.bytes_received, None)
        return self._check_with_body(stream, *self._body)

    async def _check_with_body(self, stream: Any, limit: int, partly: bool) -> Reply | None:
        if not await stream.buffered_request(limit, partly=partly):
            self._base.too_large.n += 1
            return _TOO_LARGE
        return await self._check(stream, stream.bytes_received, stream.buffered_body(limit))

    async def _check(self, stream: Any, size: int, body: tuple[bytes, bool] | None) -> Reply | None:
        base = self._base
        clock = base.clock
        log = base.logging_info(stream, self.name)
        request = base.attributes.of_request(stream, base.random.getrandbits(64), self._extensions, size, body)
        base.add_metadata(stream, request.attributes)
        cluster: Cluster | None = stream.manager.router.cluster_of(stream)
        started = clock()
        verdict = await self._service.check(request, stream, log)
        took = clock() - started
        if log is not None:
            log.latency_us = round(took * 1e6)
        return base.decide(self, stream, verdict, cluster, took)

    def response_headers(self, stream: Any, end_stream: bool) -> Reply | None:
        """What the service wants in the response."""
        changes: list[Mutation] | None = stream.locals.get(self)
        if changes is None:
            return None
        head = stream.response
        mutations.change_response(head, changes)
        base = self._base
        if base.limits_responses and stream.forwarding is not None and len(head.items) >= _MAX_RESPONSE_HEADERS:
            base.stats["response_header_limits_reached"].n += 1
            return _INVALID
        return None


class Base(ExtAuthz):
    """The filter as configured, with what all routes have in common."""

    __slots__ = (
        "_allows_failures", "_charges_responses", "_clears_route", "_cluster_prefix", "_enabled", "_enabled_metadata", "_filter_metadata", "_ingests_metadata",
        "_marks_failures", "_max_denied_body", "_namespaces", "_route_namespaces", "_rules", "_tells_stats", "_validates", "attributes", "clock",
        "denies_at_disable", "limits_responses", "on_error", "random", "stats", "status_on_error", "too_large",
    )  # fmt: skip

    def __init__(self, proto: Any, context: FilterContext) -> None:
        runtime = context.runtime
        service = compile_service(proto, context)
        if service is None:
            errors.fail("", "one of grpc_service and http_service is required")
        if proto.HasField("grpc_service"):
            check_version(proto)
        super().__init__(self, service, {}, _buffering(proto))
        self.clock = context.clock
        self.random = context.random
        self.stats = declare(context.scope, proto.stat_prefix)
        self.too_large = context.scope.counter("downstream_rq_too_large")
        self._cluster_prefix = f"ext_authz.{proto.stat_prefix}." if proto.stat_prefix else "ext_authz."
        self.status_on_error: int = proto.status_on_error.code or 403
        self.on_error = Reply(self.status_on_error, details="ext_authz_error", flag=flags.UAEX)
        self._allows_failures: bool = proto.failure_mode_allow
        self._marks_failures: bool = proto.failure_mode_allow_header_add
        self._clears_route: bool = proto.clear_route_cache
        self._validates: bool = proto.validate_mutations
        self._charges_responses = not proto.HasField("charge_cluster_response_stats") or proto.charge_cluster_response_stats.value
        self._ingests_metadata = not proto.HasField("enable_dynamic_metadata_ingestion") or proto.enable_dynamic_metadata_ingestion.value
        self._max_denied_body: int = proto.max_denied_response_body_bytes
        self.limits_responses: bool = proto.enforce_response_header_limits
        self._tells_stats: bool = proto.emit_filter_state_stats
        self._filter_metadata = struct_dict(proto.filter_metadata) if proto.HasField("filter_metadata") else None
        self._namespaces = tuple(proto.metadata_context_namespaces)
        self._route_namespaces = tuple(proto.route_metadata_context_namespaces)
        self._rules = None
        if proto.HasField("decoder_header_mutation_rules"):
            with errors.under("decoder_header_mutation_rules"):
                self._rules = mutation_rules.MutationRules(proto.decoder_header_mutation_rules, runtime)
        enabled = compile_fraction(proto.filter_enabled if proto.HasField("filter_enabled") else None, runtime, context.random)
        self._enabled: Callable[[], bool] = _function(enabled)
        self._enabled_metadata = None
        if proto.HasField("filter_enabled_metadata"):
            with errors.under("filter_enabled_metadata"):
                self._enabled_metadata = matchers.compile_metadata(proto.filter_enabled_metadata, runtime)
        denies = compile_flag(proto.deny_at_disable if proto.HasField("deny_at_disable") else None, runtime, default=False)
        self.denies_at_disable: Callable[[], bool] = _function(denies)
        self.attributes = Attributes(
            certificate=proto.include_peer_certificate,
            session=proto.include_tls_session,
            labels=bootstrap_labels(proto.bootstrap_metadata_labels_key, context.context.node),
            raw_headers=proto.encode_raw_headers,
            raw_body=proto.HasField("http_service") or proto.with_request_body.pack_as_bytes,
            allows=_allowed_headers(proto, runtime),
            disallows=list_matcher(proto, "disallowed_headers", runtime) if proto.HasField("disallowed_headers") else None,
        )

    def is_enabled(self, stream: Any) -> bool:
        """Whether a request is checked at all."""
        return self._enabled() and (self._enabled_metadata is None or self._enabled_metadata(stream.metadata))

    def add_metadata(self, stream: Any, attributes: Any) -> None:
        """Tell the service what filters before this one, and the route, say in the namespaces that it may see."""
        attributes.metadata_context.SetInParent()
        attributes.route_metadata_context.SetInParent()
        add_metadata(attributes.metadata_context, self._namespaces, (stream.metadata, stream.connection.metadata))
        add_metadata(attributes.route_metadata_context, self._route_namespaces, (stream.route.metadata,))

    def logging_info(self, stream: Any, name: str) -> LoggingInfo | None:
        """What is kept for access logs, from now on in the stream's filter state; None: nothing that a check changes."""
        if not self._tells_stats and self._filter_metadata is None:
            return None
        state = stream.filter_state
        if name in state:
            self.stats["filter_state_name_collision"].n += 1
            return None
        info = state[name] = LoggingInfo(self._filter_metadata or {})
        return info if self._tells_stats else None

    def decide(self, owner: ExtAuthz, stream: Any, verdict: Verdict, cluster: Cluster | None, took: float) -> Reply | None:
        """What becomes of a request about which the service has said `verdict`, or about which it could not be asked."""
        try:
            if verdict.invalid and self._validates:
                raise mutations.InvalidError
            if verdict.metadata:
                self._ingest(stream, verdict, took)
            if verdict.outcome == OK:
                reply = self._let_pass(owner, stream, verdict)
                if reply is None:
                    self._count("ok", cluster)
                return reply
            if verdict.outcome == DENIED:
                self._count("denied", cluster)
                if cluster is not None and self._charges_responses:
                    cluster.stats.charge(verdict.status, internal=True)
                if self._validates:
                    mutations.check(verdict.reply)
                return self._refuse(verdict, verdict.status, "ext_authz_denied")
        except mutations.InvalidError:
            self._count("invalid", cluster)
            return _INVALID
        self._count("error", cluster)
        if self._allows_failures:
            self._count("failure_mode_allowed", cluster)
            if self._marks_failures:
                stream.request.add(b"x-envoy-auth-failure-mode-allowed", b"true")
            return None
        if not (verdict.status or verdict.body or verdict.reply):
            return self.on_error
        if self._validates and not all(mutations.is_valid(*pair) for pair in verdict.reply):
            return self.on_error
        return self._refuse(verdict, verdict.status or self.status_on_error, "ext_authz_error")

    def _count(self, what: str, cluster: Cluster | None) -> None:
        self.stats[what].n += 1
        if cluster is not None:
            cluster.stats.scope.counter(self._cluster_prefix + what).n += 1

    def _ingest(self, stream: Any, verdict: Verdict, took: float) -> None:
        if not self._ingests_metadata:
            self.stats["ignored_dynamic_metadata"].n += 1
            return
        if verdict.outcome == OK:
            verdict.metadata["ext_authz_duration"] = float(int(took * 1000))
        stream.metadata[METADATA] = stream.metadata.get(METADATA, {}) | verdict.metadata

    def _let_pass(self, owner: ExtAuthz, stream: Any, verdict: Verdict) -> Reply | None:
        head = stream.request
        mutations.change_request(head, verdict, self._rules, validates=self._validates)
        limits = stream.manager.parser_options
        count, size = mutations.size_of(head)
        if count > limits.max_headers or size > limits.max_head_bytes:
            self.stats["request_header_limits_reached"].n += 1
            raise mutations.InvalidError
        if verdict.response:
            stream.locals[owner] = verdict.response
        changes_route = any(one.action != APPEND for one in verdict.mutations) or verdict.remove or verdict.query or verdict.query_remove
        if self._clears_route and changes_route:
            stream.clear_route_cache()
        return None

    def _refuse(self, verdict: Verdict, status: int, details: str) -> Reply:
        body = verdict.body
        if self._max_denied_body:
            body = body[: self._max_denied_body]
        headers = mutations.reply_headers(verdict)
        return Reply(status, body, details=details, flag=flags.UAEX, headers=headers)

    def for_route(self, overrides: list[Any], context: FilterContext) -> ExtAuthz | None:
        """The filter for a route: what the overrides say of it together, and else the most specific one."""
        override = overrides[-1]
        if override.disabled:
            return None
        extensions: dict[str, str] = {}
        for one in overrides:
            extensions.update(one.check_settings.context_extensions)
        settings = override.check_settings
        body = self._body
        if settings.HasField("with_request_body"):
            if settings.disable_request_body_buffering:
                errors.fail(
                    "check_settings",
                    "Invalid configuration for check_settings. Only one of disable_request_body_buffering or with_request_body can be set.",
                )
            body = settings.with_request_body.max_request_bytes, settings.with_request_body.allow_partial_message
        elif settings.disable_request_body_buffering:
            body = None
        with errors.under("check_settings"):
            service = compile_service(settings, context) or self._service
        return ExtAuthz(self, service, extensions, body)


def declare(scope: Scope, stat_prefix: str) -> Any:
    """The filter's counters by name."""
    own = scope.scope(f"ext_authz.{stat_prefix.removesuffix('.')}." if stat_prefix else "ext_authz.")
    own.declare("counter", _STATS)
    return {name: own.counter(name) for name in _STATS}


def compile_service(proto: Any, context: FilterContext) -> Service | None:
    """The service that a message names in `grpc_service` or `http_service`, if any. Raises ConfigError relative to `proto`."""
    if proto.HasField("grpc_service"):
        with errors.under("grpc_service"):
            return GrpcService(proto.grpc_service, context.context)
    if proto.HasField("http_service"):
        with errors.under("http_service"):
            return HttpService(proto.http_service, context.context)
    return None


def _buffering(proto: Any) -> tuple[int, bool] | None:
    settings = proto.with_request_body
    return (settings.max_request_bytes, settings.allow_partial_message) if proto.HasField("with_request_body") else None


def _allowed_headers(proto: Any, runtime: Any) -> Callable[[bytes], bool] | None:
    if not proto.HasField("http_service"):
        return list_matcher(proto, "allowed_headers", runtime) if proto.HasField("allowed_headers") else None
    request = proto.http_service.authorization_request
    if request.HasField("allowed_headers"):
        if proto.HasField("allowed_headers"):
            errors.fail("allowed_headers", "Invalid duplicate configuration for allowed_headers.")
        with errors.under("http_service.authorization_request"):
            return list_matcher(request, "allowed_headers", runtime, always=_OF_HTTP)
    return list_matcher(proto, "allowed_headers", runtime, always=_OF_HTTP)


def _function(value: bool | Callable[[], bool]) -> Callable[[], bool]:
    return value if callable(value) else lambda: value


def compile(proto: Any, context: FilterContext) -> Base:
    """The filter for an ExtAuthz proto. Raises ConfigError."""
    return Base(proto, context)


def specialise(base: Base, overrides: list[Any], context: FilterContext) -> ExtAuthz | None:
    """The filter for a route."""
    for override in overrides:
        if override.WhichOneof("override") is None:
            errors.fail("", "one of disabled and check_settings is required")
        if override.check_settings.http_service.authorization_request.HasField("allowed_headers"):
            errors.fail("check_settings.http_service.authorization_request.allowed_headers", "routes share the filter's allowed_headers", UNSUPPORTED)
    return base.for_route(overrides, context)
