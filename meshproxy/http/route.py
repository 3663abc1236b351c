"""One compiled route: everything that the connection manager, the filters and the router ask of it, as plain attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api.durations import milliseconds
from meshproxy.api.errors import UNSUPPORTED, ConfigError, fail, under
from meshproxy.api.metadata import metadata_dict, struct_dict
from meshproxy.http import header_mutations, rate_limits, timeouts
from meshproxy.http.filter_overrides import FilterOverride, compile_overrides
from meshproxy.http.hash_policy import HashPolicy, compile_hash_policy
from meshproxy.http.mirror_policy import MirrorPolicy, compile_mirrors
from meshproxy.http.retry import RetryPolicy, compile_retry_policy
from meshproxy.http.route_replies import Answer, Redirect, compile_direct_response
from meshproxy.http.route_rewrite import (
    ORIGINAL_PATH,
    HostRewrite,
    PathRewrite,
    compile_host_rewrite,
    compile_path_rewrite,
    update_authority,
)
from meshproxy.http.weighted_clusters import ByHeader, Weighted

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.context import Context
    from meshproxy.http.route_match import PathMatch
    from meshproxy.http.virtual_host import VirtualHost
    from meshproxy.observe.stream_info import StreamInfo

_P = "envoy.config.route.v3"
HONOURS = {
    f"{_P}.Route": (
        "name match route redirect direct_response non_forwarding_action metadata decorator tracing typed_per_filter_config request_headers_to_add"
        " request_headers_to_remove response_headers_to_add response_headers_to_remove per_request_buffer_limit_bytes request_body_buffer_limit"
    ),
    f"{_P}.RouteAction": (
        "cluster cluster_header weighted_clusters cluster_not_found_response_code metadata_match prefix_rewrite regex_rewrite path_rewrite_policy"
        " path_rewrite host_rewrite_literal auto_host_rewrite host_rewrite_header host_rewrite_path_regex host_rewrite append_x_forwarded_host timeout"
        " idle_timeout flush_timeout retry_policy request_mirror_policies priority rate_limits include_vh_rate_limits hash_policy max_grpc_timeout"
        " grpc_timeout_offset"
        " upgrade_configs hedge_policy max_stream_duration cors"
    ),
    f"{_P}.RouteAction.UpgradeConfig": "upgrade_type enabled connect_config",
    f"{_P}.RouteAction.UpgradeConfig.ConnectConfig": "allow_post",
    f"{_P}.RouteAction.MaxStreamDuration": "max_stream_duration grpc_timeout_header_max grpc_timeout_header_offset",
    f"{_P}.NonForwardingAction": "",
    f"{_P}.Decorator": "operation propagate",
    "envoy.config.core.v3.Metadata": "filter_metadata",
}

FORWARD, REDIRECT, DIRECT_RESPONSE, NON_FORWARDING = "forward", "redirect", "direct_response", "non_forwarding"

NO_LIMIT = 1 << 62  # buffer_limit of a route that sets none
_DEFAULT_TIMEOUT_MS = 15_000
_CLUSTER_NOT_FOUND = (503, 404, 500)  # RouteAction.ClusterNotFoundResponseCode
_LB = "envoy.lb"

Finalize = Callable[["StreamInfo"], None]


class Route:
    """A route, or one choice of a route whose cluster is chosen per request. Identity is what tells routes apart; a configuration update makes new ones.

    Times are seconds, whole milliseconds where the name says so; 0 means no timeout, None that the route does not say.
    """

    __slots__ = (
        "action",  # 'forward', 'redirect', 'direct_response', 'non_forwarding'
        "append_x_forwarded_host",
        "auto_host_rewrite",  # the router sets the host to the chosen upstream host's name (route_rewrite.update_authority)
        "buffer_limit",  # bytes of a request body to keep for retries, NO_LIMIT: the connection's limit
        "careful",  # the router's `before_sending` has something to do
        "choose",  # Callable[[StreamInfo], Route] | None: the table has called it already on what `match` returns
        "cluster_name",  # '' when the request names none
        "cluster_not_found_status",
        "connect_config",  # proto of upgrade_configs[].connect_config, or None
        "cors",  # the CorsPolicy protos of the route and its virtual host; the cors filter compiles them
        "decorator",  # (operation, propagate) or None
        "expected_timeout",  # constant x-envoy-expected-rq-timeout-ms, or None
        "filter_configs",  # tuple[dict[str, FilterOverride], ...], least specific first
        "finalize_request",  # Callable[[StreamInfo], None] | None: header mutations and rewrites of stream.request
        "finalize_response",  # the same for stream.response
        "grpc_timeout_header_max_ms",
        "grpc_timeout_header_offset_ms",
        "grpc_timeout_offset_ms",
        "hash",  # HashPolicy | None: Callable[[StreamInfo], int | None]
        "hedge_on_per_try_timeout",
        "flush_timeout",
        "idle_timeout",
        "include_attempt_count_in_request",
        "include_attempt_count_in_response",
        "include_is_timeout_retry_header",
        "include_vh_rate_limits",
        "max_grpc_timeout_ms",
        "max_stream_duration_ms",
        "metadata",  # dict of the route's filter_metadata
        "metadata_match",  # dict for subset load balancing, or None
        "mirrors",
        "name",
        "needs_lb_context",  # whatever the cluster says of itself: it has a metadata match. A cluster that hashes says so itself (`needs_hash`)
        "per_try_idle_timeout",
        "per_try_timeout",
        "per_try_timeout_ms",  # as configured, even where the route's timeout is shorter
        "priority",
        "rate_limits",  # the protos; http.rate_limits compiles them where a filter asks
        "reply",  # Callable[[StreamInfo], Reply] | None
        "retry",  # RetryPolicy | None
        "select_cluster",  # says which cluster a request wants by its header, where that is not there; None
        "timeout",
        "timeout_ms",
        "tracing",  # http.tracing.RouteTracing, or None
        "upgrades",  # dict[str, bool], lower-case upgrade type
        "uses_stream_duration",  # max_stream_duration replaces timeout and max_grpc_timeout
        "virtual_cluster",  # VirtualClusters | None
        "virtual_host",
    )

    name: str
    virtual_host: VirtualHost
    action: str
    choose: Callable[[StreamInfo], Route] | None
    cluster_name: str
    select_cluster: Callable[[StreamInfo], bytes | None] | None
    hash: HashPolicy | None
    retry: RetryPolicy | None
    reply: Answer | None
    mirrors: tuple[MirrorPolicy, ...]
    finalize_request: Finalize | None
    finalize_response: Finalize | None
    filter_configs: tuple[dict[str, FilterOverride], ...]
    expected_timeout: bytes | None
    flush_timeout: float | None  # seconds, as the next
    idle_timeout: float | None
    max_grpc_timeout_ms: int | None
    grpc_timeout_offset_ms: int | None
    max_stream_duration_ms: int | None
    grpc_timeout_header_max_ms: int | None
    grpc_timeout_header_offset_ms: int | None
    metadata: dict[str, Any]
    metadata_match: dict[str, Any] | None
    upgrades: dict[str, bool] | None
    rate_limits: Sequence[Any]
    cors: tuple[Any, ...]
    decorator: tuple[str, bool] | None
    connect_config: Any
    tracing: Any

    def __init__(self, virtual_host: VirtualHost, name: str = "", action: str = FORWARD) -> None:
        """A route that does nothing yet; see `compile_route`."""
        self.name = name
        self.virtual_host = virtual_host
        self.action = action
        self.cluster_name = ""
        self.choose = self.select_cluster = self.hash = self.retry = self.reply = None
        self.finalize_request = self.finalize_response = None
        self.filter_configs = self.mirrors = ()
        self.rate_limits = self.cors = ()
        self.include_vh_rate_limits = False
        self.metadata = {}
        self.metadata_match = self.upgrades = self.decorator = self.connect_config = self.tracing = None
        self.append_x_forwarded_host = self.auto_host_rewrite = self.needs_lb_context = self.careful = False
        self.cluster_not_found_status = 503
        self.priority = 0
        self.buffer_limit = virtual_host.buffer_limit
        self.timeout_ms = self.per_try_timeout_ms = 0
        self.timeout = self.per_try_timeout = self.per_try_idle_timeout = 0.0
        self.expected_timeout = None
        self.idle_timeout = self.flush_timeout = None
        self.max_grpc_timeout_ms = self.grpc_timeout_offset_ms = None
        self.max_stream_duration_ms = self.grpc_timeout_header_max_ms = self.grpc_timeout_header_offset_ms = None
        self.uses_stream_duration = self.hedge_on_per_try_timeout = False
        self.include_attempt_count_in_request = virtual_host.include_attempt_count_in_request
        self.include_attempt_count_in_response = virtual_host.include_attempt_count_in_response
        self.include_is_timeout_retry_header = virtual_host.include_is_timeout_retry_header
        self.virtual_cluster = virtual_host.virtual_clusters

    def __repr__(self) -> str:
        where = self.cluster_name if self.action == FORWARD else self.action
        return f"<Route {self.name or '(unnamed)'} of {self.virtual_host.name}: {where}>"


def compile_route(proto: route_components_pb2.Route, match: PathMatch, virtual_host: VirtualHost) -> Route:
    """Raises ConfigError with paths relative to the route."""
    return _Compiler(proto, match, virtual_host).compile()


class _Compiler:
    """What the steps of compiling one route share."""

    def __init__(self, proto: route_components_pb2.Route, match: PathMatch, virtual_host: VirtualHost) -> None:
        self._proto = proto
        self._match = match
        self._host = virtual_host
        self._context: Context = virtual_host.table.context
        self._insert_original = virtual_host.table.insert_original

    def compile(self) -> Route:
        proto, host = self._proto, self._host
        which = proto.WhichOneof("action")
        route = Route(host, proto.name, {"route": FORWARD, "redirect": REDIRECT, "direct_response": DIRECT_RESPONSE}.get(which or "", NON_FORWARDING))
        overrides = compile_overrides(proto.typed_per_filter_config)
        route.filter_configs = tuple(level for level in (*host.filter_configs, overrides) if level)
        route.metadata = metadata_dict(proto.metadata)
        if proto.HasField("decorator"):
            propagate = proto.decorator.propagate
            route.decorator = proto.decorator.operation, propagate.value if proto.decorator.HasField("propagate") else True
        if proto.HasField("tracing"):
            from meshproxy.http.tracing import RouteTracing  # few routes say something about it

            with under("tracing"):
                route.tracing = RouteTracing(proto.tracing)
        if proto.HasField("request_body_buffer_limit"):
            route.buffer_limit = proto.request_body_buffer_limit.value
        elif proto.HasField("per_request_buffer_limit_bytes") and not host.has_body_limit:
            route.buffer_limit = proto.per_request_buffer_limit_bytes.value
        request, response = self._mutations()
        if which == "route":
            with under("route"):
                self._forward(route, proto.route, request, response)
            return route
        if which == "redirect":
            with under("redirect"):
                route.reply = Redirect(proto.redirect, self._match, insert_original=self._insert_original, runtime=self._context.runtime)
        elif which == "direct_response":
            with under("direct_response"):
                route.reply = compile_direct_response(proto.direct_response, host.table.max_direct_response_body)
        elif which != "non_forwarding_action":
            fail(which or "action", "is not supported" if which else "value is required", UNSUPPORTED if which else "invalid")
        route.finalize_response = response_finalizer(response)
        return route

    def _mutations(self) -> tuple[Any, Any]:
        """The header mutations of all levels, for requests and responses."""
        proto, host = self._proto, self._host
        own_request = header_mutations.compile_mutation(proto.request_headers_to_add, proto.request_headers_to_remove, "request_headers", request=True)
        own_response = header_mutations.compile_mutation(proto.response_headers_to_add, proto.response_headers_to_remove, "response_headers", request=False)
        request = [own_request, *host.request_mutations]
        response = [own_response, *host.response_mutations]
        if host.table.most_specific_wins:
            request.reverse()
            response.reverse()
        return header_mutations.combine(request), header_mutations.combine(response)

    # -- forwarding

    def _forward(self, route: Route, action: route_components_pb2.RouteAction, request: Any, response: Any) -> None:
        runtime = self._context.runtime
        self._timeouts(route, action)
        route.cluster_not_found_status = _CLUSTER_NOT_FOUND[action.cluster_not_found_response_code]
        route.priority = action.priority
        route.append_x_forwarded_host = action.append_x_forwarded_host
        route.auto_host_rewrite = action.auto_host_rewrite.value
        route.rate_limits = action.rate_limits or ()
        if action.rate_limits:
            with under("rate_limits"):
                rate_limits.RateLimitPolicy(action.rate_limits, self._context)  # the filter compiles them; mistakes are to be found now
        route.include_vh_rate_limits = action.include_vh_rate_limits.value
        self._cors(route, action)
        with under("hash_policy"):
            route.hash = compile_hash_policy(action.hash_policy, runtime)
        route.mirrors = compile_mirrors(action.request_mirror_policies, self._context) or self._host.mirrors
        lb = action.metadata_match.filter_metadata
        route.metadata_match = struct_dict(lb[_LB]) if _LB in lb else None
        self._upgrades(route, action)
        path = compile_path_rewrite(action, self._match, runtime)
        host = compile_host_rewrite(action, runtime)
        self._finalizers(route, request, response, path, host)
        route.needs_lb_context = route.metadata_match is not None
        posts = route.connect_config is not None and route.connect_config.allow_post  # in place of CONNECT: no lane is for them
        route.careful = route.auto_host_rewrite or bool(route.per_try_idle_timeout) or route.virtual_cluster is not None or posts
        self._clusters(route, action, request, response, path, host)

    def _cors(self, route: Route, action: route_components_pb2.RouteAction) -> None:
        route.cors = tuple(policy for policy in (action.cors if action.HasField("cors") else None, self._host.cors) if policy is not None)
        if route.cors:
            from meshproxy.http.filters.cors import Policy  # few routes have these deprecated fields

            with under("cors"):
                Policy(route.cors, self._context)  # mistakes are to be found now

    def _finalizers(self, route: Route, request: Any, response: Any, path: PathRewrite | None, host: HostRewrite | None) -> None:
        route.finalize_request = request_finalizer(request, path, host, append_forwarded=route.append_x_forwarded_host, keep_original=self._insert_original)
        route.finalize_response = response_finalizer(response, sets_cookies=route.hash is not None and bool(route.hash.cookies))

    def _clusters(
        self, route: Route, action: route_components_pb2.RouteAction, request: Any, response: Any, path: PathRewrite | None, host: HostRewrite | None
    ) -> None:
        which = action.WhichOneof("cluster_specifier")
        if which == "cluster":
            route.cluster_name = action.cluster
        elif which == "cluster_header":
            route.choose = ByHeader(route, action.cluster_header, self._context.clusters)
        elif which == "weighted_clusters":
            entries = []
            for index, cluster in enumerate(action.weighted_clusters.clusters):
                with under(f"weighted_clusters.clusters[{index}]"):
                    entries.append((cluster.weight.value, self._weighted(route, cluster, request, response, path, host)))
            with under("weighted_clusters"):
                route.choose = Weighted(action.weighted_clusters, entries, self._context, route.hash)
        else:
            raise ConfigError.at(which or "cluster_specifier", "is not supported" if which else "value is required", UNSUPPORTED if which else "invalid")

    def _weighted(
        self,
        base: Route,
        cluster: route_components_pb2.WeightedCluster.ClusterWeight,
        request: Any,
        response: Any,
        path: PathRewrite | None,
        host: HostRewrite | None,
    ) -> Route:
        """The route of one weighted cluster: a copy with its own name, headers, metadata and filters."""
        if cluster.name and cluster.cluster_header:
            fail("cluster_header", "Only one of name or cluster_header can be specified")
        if not cluster.name and not cluster.cluster_header:
            fail("name", "At least one of name or cluster_header need to be specified")
        route = copy.copy(base)
        route.choose = None
        route.cluster_name = cluster.name
        overrides = compile_overrides(cluster.typed_per_filter_config)
        if overrides:
            route.filter_configs = (*base.filter_configs, overrides)
        lb = cluster.metadata_match.filter_metadata
        if _LB in lb:
            route.metadata_match = {**(base.metadata_match or {}), **struct_dict(lb[_LB])}
            route.needs_lb_context = True
        # The cluster's own mutations come first, so that those of the route have the last word, whatever most_specific_header_mutations_wins says.
        own = header_mutations.compile_mutation(cluster.request_headers_to_add, cluster.request_headers_to_remove, "request_headers", request=True)
        literal = _set_host(cluster.host_rewrite_literal.encode()) if cluster.host_rewrite_literal else None
        request = header_mutations.combine((own, literal, request))
        own = header_mutations.compile_mutation(cluster.response_headers_to_add, cluster.response_headers_to_remove, "response_headers", request=False)
        response = header_mutations.combine((own, response))
        self._finalizers(route, request, response, path, host)
        if cluster.cluster_header:
            route.choose = ByHeader(route, cluster.cluster_header, self._context.clusters)
        return route

    # -- timeouts, retries, upgrades

    def _timeouts(self, route: Route, action: route_components_pb2.RouteAction) -> None:
        host = self._host
        if action.HasField("retry_policy"):
            with under("retry_policy"):
                route.retry = compile_retry_policy(action.retry_policy, self._context.runtime)
        else:
            route.retry = host.retry
        hedge = action.hedge_policy if action.HasField("hedge_policy") else host.hedge_policy
        route.hedge_on_per_try_timeout = hedge is not None and hedge.hedge_on_per_try_timeout
        route.timeout_ms = milliseconds(action.timeout) if action.HasField("timeout") else _DEFAULT_TIMEOUT_MS
        route.max_grpc_timeout_ms = _optional_ms(action, "max_grpc_timeout")
        route.grpc_timeout_offset_ms = _optional_ms(action, "grpc_timeout_offset")
        if action.HasField("idle_timeout"):
            route.idle_timeout = milliseconds(action.idle_timeout) / 1000
        if action.HasField("flush_timeout"):
            route.flush_timeout = milliseconds(action.flush_timeout) / 1000
        if action.HasField("max_stream_duration"):
            route.uses_stream_duration = True
            route.timeout_ms = 0
            duration = action.max_stream_duration
            route.max_stream_duration_ms = _optional_ms(duration, "max_stream_duration")
            route.grpc_timeout_header_max_ms = _optional_ms(duration, "grpc_timeout_header_max")
            route.grpc_timeout_header_offset_ms = _optional_ms(duration, "grpc_timeout_header_offset")
        if route.retry is not None:
            route.per_try_timeout_ms = round(route.retry.per_try_timeout * 1000)
            route.per_try_idle_timeout = route.retry.per_try_idle_timeout
        per_try_ms = 0 if route.timeout_ms and route.per_try_timeout_ms >= route.timeout_ms else route.per_try_timeout_ms
        route.timeout = route.timeout_ms / 1000
        route.per_try_timeout = per_try_ms / 1000
        expected = timeouts.expected_ms(route.timeout_ms, per_try_ms, 0, hedging=route.hedge_on_per_try_timeout)
        route.expected_timeout = b"%d" % expected if expected else None

    def _upgrades(self, route: Route, action: route_components_pb2.RouteAction) -> None:
        upgrades: dict[str, bool] = {}
        for index, config in enumerate(action.upgrade_configs):
            name = config.upgrade_type.lower()
            if name in upgrades:
                fail(f"upgrade_configs[{index}].upgrade_type", f"Duplicate upgrade {config.upgrade_type}")
            upgrades[name] = config.enabled.value if config.HasField("enabled") else True
            if config.HasField("connect_config"):
                if name not in ("connect", "connect-udp"):
                    fail(f"upgrade_configs[{index}].connect_config", f"Non-CONNECT upgrade type {config.upgrade_type} has ConnectConfig")
                route.connect_config = config.connect_config
        route.upgrades = upgrades or None


def request_finalizer(mutate: Any, path: PathRewrite | None, host: HostRewrite | None, *, append_forwarded: bool, keep_original: bool) -> Finalize | None:
    """Header mutations, then the host, then the path; None when there is nothing to do."""
    if path is None and host is None:
        return _only(mutate, "request") if mutate is not None else None

    def finalize(stream: StreamInfo) -> None:
        head = stream.request
        assert head is not None
        if mutate is not None:
            mutate(stream, head)
        if host is not None:
            name = host(stream, head)
            if name:
                update_authority(head, name, append_forwarded=append_forwarded, keep_original=keep_original)
        if path is not None:
            old = head.path
            new = path(stream, old)
            if new is not None:
                if keep_original:
                    head.set(ORIGINAL_PATH, old)
                head.path = new

    return finalize


def _set_host(host: bytes) -> header_mutations.Mutation:
    """A weighted cluster's own host, which leaves no trace in other headers."""

    def mutate(stream: StreamInfo, head: Any) -> None:
        head.authority = host

    return mutate


def response_finalizer(mutate: Any, *, sets_cookies: bool = False) -> Finalize | None:
    """Generated cookies and header mutations of a response; None when there are none."""
    if not sets_cookies:
        return _only(mutate, "response") if mutate is not None else None
    from meshproxy.http.hash_policy import set_new_cookies

    def finalize(stream: StreamInfo) -> None:
        head = stream.response
        assert head is not None
        set_new_cookies(stream, head)
        if mutate is not None:
            mutate(stream, head)

    return finalize


def _only(mutate: Any, which: str) -> Finalize:
    if which == "request":
        return lambda stream: mutate(stream, stream.request)
    return lambda stream: mutate(stream, stream.response)


def _optional_ms(message: Any, field: str) -> int | None:
    return milliseconds(getattr(message, field)) if message.HasField(field) else None
