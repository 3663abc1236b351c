"""A virtual host: an ordered list of routes, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import Collector, fail, under
from meshproxy.api.matchers import HASH, QUESTION_MARK
from meshproxy.api.metadata import metadata_dict
from meshproxy.http import header_mutations, rate_limits
from meshproxy.http.filter_overrides import FilterOverride, compile_overrides
from meshproxy.http.mirror_policy import MirrorPolicy, compile_mirrors
from meshproxy.http.retry import RetryPolicy, compile_retry_policy
from meshproxy.http.route import NO_LIMIT, REDIRECT, Route, compile_route
from meshproxy.http.route_index import PathIndex
from meshproxy.http.route_match import compile_head_test, compile_path_match, compile_stream_test, path_key
from meshproxy.http.route_replies import https_redirect
from meshproxy.http.virtual_clusters import VirtualClusters, compile_virtual_clusters
from meshproxy.http.weighted_clusters import stable_random

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.codec.headers import RequestHead
    from meshproxy.http.routes import RouteTable
    from meshproxy.observe.stream_info import StreamInfo

HONOURS = {
    "envoy.config.route.v3.VirtualHost": (
        "name domains routes require_tls virtual_clusters rate_limits request_headers_to_add request_headers_to_remove response_headers_to_add"
        " response_headers_to_remove typed_per_filter_config include_request_attempt_count include_attempt_count_in_response retry_policy hedge_policy"
        " include_is_timeout_retry_header per_request_buffer_limit_bytes request_body_buffer_limit request_mirror_policies metadata cors"
    ),
    "envoy.config.route.v3.CorsPolicy": (
        "allow_origin_string_match allow_methods allow_headers expose_headers max_age allow_credentials filter_enabled shadow_enabled"
        " allow_private_network_access forward_not_matching_preflights"
    ),
}

_INDEXED = 6  # routes; below, trying one after the other is quicker than looking up
_NONE, _EXTERNAL_ONLY, _ALL = range(3)  # VirtualHost.TlsRequirementType

# How a compiled route is tested: its path (None where the index has proved it), the rest of the head, the rest of the stream; then the route.
Entry = tuple[Callable[[bytes], bool], Callable[["RequestHead"], bool] | None, Callable[["StreamInfo"], bool] | None, Route]


class VirtualHost:
    """Compiled on the first request to it; `match` is then replaced by the way that suits its routes best.

    `match(stream)` gives the Route or None. Routes of large virtual hosts are compiled one by one, when first tried.
    """

    __slots__ = (
        "_compiled",
        "_connect",
        "_entries",
        "_index",
        "_sanitise",
        "_ssl_redirect",
        "buffer_limit",
        "cors",
        "domains",
        "filter_configs",
        "has_body_limit",
        "hedge_policy",
        "include_attempt_count_in_request",
        "include_attempt_count_in_response",
        "include_is_timeout_retry_header",
        "match",
        "metadata",
        "mirrors",
        "name",
        "proto",
        "rate_limits",
        "request_mutations",
        "response_mutations",
        "retry",
        "table",
        "virtual_clusters",
    )

    match: Callable[[StreamInfo], Route | None]

    def __init__(self, proto: route_components_pb2.VirtualHost, table: RouteTable) -> None:
        self.name = proto.name
        self.domains = tuple(proto.domains)
        self.table = table
        self.proto = proto
        self._compiled = False
        self.match = self._compile_and_match

    # -- compiling

    def compile(self) -> None:
        """Compile what the routes share. Raises ConfigError with paths relative to the virtual host."""
        if self._compiled:
            return
        proto, table = self.proto, self.table
        context = table.context
        if proto.HasField("matcher") and proto.routes:
            fail("matcher", "cannot set both matcher and routes on virtual host")
        self.metadata: dict[str, Any] = metadata_dict(proto.metadata)
        self.filter_configs: tuple[dict[str, FilterOverride], ...] = (table.filter_configs, compile_overrides(proto.typed_per_filter_config))
        request = header_mutations.compile_mutation(proto.request_headers_to_add, proto.request_headers_to_remove, "request_headers", request=True)
        response = header_mutations.compile_mutation(proto.response_headers_to_add, proto.response_headers_to_remove, "response_headers", request=False)
        self.request_mutations = request, table.request_mutation
        self.response_mutations = response, table.response_mutation
        self.retry: RetryPolicy | None = None
        if proto.HasField("retry_policy"):
            with under("retry_policy"):
                self.retry = compile_retry_policy(proto.retry_policy, context.runtime)
        self.hedge_policy = proto.hedge_policy if proto.HasField("hedge_policy") else None
        self.mirrors: tuple[MirrorPolicy, ...] = compile_mirrors(proto.request_mirror_policies, context) or table.mirrors
        self.virtual_clusters: VirtualClusters | None = compile_virtual_clusters(proto.name, proto.virtual_clusters, context)
        self.cors = proto.cors if proto.HasField("cors") else None
        self.rate_limits: Sequence[Any] = proto.rate_limits or ()
        if proto.rate_limits:
            with under("rate_limits"):
                rate_limits.RateLimitPolicy(proto.rate_limits, context)
        self.include_attempt_count_in_request = proto.include_request_attempt_count
        self.include_attempt_count_in_response = proto.include_attempt_count_in_response
        self.include_is_timeout_retry_header = proto.include_is_timeout_retry_header
        self.has_body_limit = proto.HasField("request_body_buffer_limit")
        self.buffer_limit = NO_LIMIT
        if self.has_body_limit:
            self.buffer_limit = proto.request_body_buffer_limit.value
        elif proto.HasField("per_request_buffer_limit_bytes"):
            self.buffer_limit = proto.per_request_buffer_limit_bytes.value
        self._compiled = True

    def _compile_and_match(self, stream: StreamInfo) -> Route | None:
        """The first request: build what matching needs, then match."""
        with self.table.errors_under(self):
            self.compile()
            routes = self.proto.routes
            self._sanitise = strip_parameters if self.table.ignore_path_parameters else None
            self._index = PathIndex(path_key(route.match) for route in routes) if len(routes) > _INDEXED else None
            self._connect = tuple(order for order, route in enumerate(routes) if route.match.HasField("connect_matcher"))
            self._entries: list[Entry | None] = [None] * len(routes)
            if len(routes) <= _INDEXED:
                for order in range(len(routes)):
                    self._compile_entry(order)
        by_path = self._match_linear if len(routes) <= _INDEXED else self._match_indexed
        if self.proto.require_tls == _NONE:
            self.match = by_path
        else:
            self._ssl_redirect = self._make_ssl_redirect()
            self.match = self._guard_tls(by_path, external_only=self.proto.require_tls == _EXTERNAL_ONLY)
        return self.match(stream)

    def _compile_entry(self, order: int) -> Entry:
        """Compile one route. Raises ConfigError."""
        proto = self.proto.routes[order]
        context = self.table.context
        with self.table.errors_under(self, f"routes[{order}]"):
            with under("match"):
                path = compile_path_match(proto.match, context.runtime)
                head_test = compile_head_test(proto.match, context.runtime)
                stream_test = compile_stream_test(proto.match, context, stable_random(context))
            route = compile_route(proto, path, self)
        entry = self._entries[order] = path.matches, head_test, stream_test, route
        return entry

    def check(self, also: Callable[[Route], object] | None = None) -> None:
        """Compile everything, keep nothing; call `also` with each route. Raises a ConfigError with all problems, paths relative to the virtual host."""
        problems = Collector()
        with problems.under(""):
            self.compile()
        context = self.table.context
        if self._compiled:
            for order, proto in enumerate(self.proto.routes):
                with problems.under(f"routes[{order}]"):
                    with under("match"):
                        path = compile_path_match(proto.match, context.runtime)
                        compile_head_test(proto.match, context.runtime)
                        compile_stream_test(proto.match, context, stable_random(context))
                    route = compile_route(proto, path, self)
                    if also is not None:
                        also(route)
        problems.raise_any()

    def _make_ssl_redirect(self) -> Route:
        route = Route(self, action=REDIRECT)
        route.reply = https_redirect
        return route

    def _guard_tls(self, by_path: Callable[[StreamInfo], Route | None], *, external_only: bool) -> Callable[[StreamInfo], Route | None]:
        redirect = self._ssl_redirect

        def match(stream: StreamInfo) -> Route | None:
            head = stream.request
            assert head is not None
            # Whether the client used TLS, which a proxy in front may say; not the URL's scheme.
            if head.get(b"x-forwarded-proto", head.scheme) != b"https" and not (external_only and head.get(b"x-envoy-internal") == b"true"):
                return redirect
            return by_path(stream)

        return match

    # -- matching (hot)

    def _match_linear(self, stream: StreamInfo) -> Route | None:
        """Few routes: one after the other."""
        head: RequestHead = stream.request  # type: ignore[assignment]
        path = head.path
        if QUESTION_MARK in path:
            path = path[: path.find(b"?")]
        if HASH in path:
            path = path[: path.find(b"#")]
        if self._sanitise is not None:
            path = self._sanitise(path)
        if not path or head.method == b"CONNECT":
            return self._match_connect(stream, path)
        for path_test, head_test, stream_test, route in self._entries:  # type: ignore[misc]  # all are compiled
            if path_test(path) and (head_test is None or head_test(head)) and (stream_test is None or stream_test(stream)):
                choose = route.choose
                return route if choose is None else choose(stream)
        return None

    def _match_indexed(self, stream: StreamInfo) -> Route | None:
        """Many routes: those that the index gives, one after the other."""
        head: RequestHead = stream.request  # type: ignore[assignment]
        path = head.path
        if QUESTION_MARK in path:
            path = path[: path.find(b"?")]
        if HASH in path:
            path = path[: path.find(b"#")]
        if self._sanitise is not None:
            path = self._sanitise(path)
        if not path or head.method == b"CONNECT":
            return self._match_connect(stream, path)
        entries = self._entries
        for order in self._index.candidates(path):  # type: ignore[union-attr]  # or this would be the other function
            path_test, head_test, stream_test, route = entries[order] or self._compile_entry(order)
            if path_test(path) and (head_test is None or head_test(head)) and (stream_test is None or stream_test(stream)):
                choose = route.choose
                return route if choose is None else choose(stream)
        return None

    def _match_connect(self, stream: StreamInfo, path: bytes) -> Route | None:
        """CONNECT: connect_matcher routes, and, where there is a path (extended CONNECT), the others in their turn."""
        head: RequestHead = stream.request  # type: ignore[assignment]
        is_connect = head.method == b"CONNECT"
        connect = self._connect if is_connect else ()
        others = range(len(self._entries)) if self._index is None else self._index.candidates(path)
        orders = sorted({*connect, *others}) if path else connect
        for order in orders:
            path_test, head_test, stream_test, route = self._entries[order] or self._compile_entry(order)
            if (order in connect or path_test(path)) and (head_test is None or head_test(head)) and (stream_test is None or stream_test(stream)):
                return route if route.choose is None else route.choose(stream)
        return None

    def __repr__(self) -> str:
        return f"<VirtualHost {self.name}, {len(self.proto.routes)} routes>"


def strip_parameters(path: bytes) -> bytes:
    """A path without the parameters (`;x=1`) of its segments."""
    if b";" not in path:
        return path
    return b"/".join([segment.partition(b";")[0] for segment in path.split(b"/")])
