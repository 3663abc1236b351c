"""The HTTP connection manager network filter: compiled once from its proto, shared by all its downstream connections.

Source: envoy.extensions.filters.network.http_connection_manager.v3. Start with `compile`, then `connection.py` (the codec's side), `stream.py` (a request).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, messages, registry
from meshproxy.codec.grpc import is_content_type
from meshproxy.codec.h1 import header_case
from meshproxy.codec.headers import NO_PLANS, Pair, RequestHead, ResponseHead
from meshproxy.http import extension_configs, filter_entry, local_reply, log_events, plan, route_configs, router, timeouts
from meshproxy.http.connection import ServerConnection
from meshproxy.http.downstream import DownstreamConnection
from meshproxy.http.filter_chain import EMPTY, Chain
from meshproxy.http.filter_entry import FilterEntry, NobodyAnswers, NoConfig
from meshproxy.http.filters import FilterContext
from meshproxy.http.lane import Lane, Tally, make_lane
from meshproxy.http.manager_options import AUTO, HTTP2, Options
from meshproxy.http.manager_stats import ManagerStats
from meshproxy.http.replies import UPGRADE_FAILED, Reply
from meshproxy.http.request_head import RequestHeadPreparer
from meshproxy.http.routes import RouteTable
from meshproxy.http.stream import Stream
from meshproxy.net.drain import Drain
from meshproxy.observe import access_log
from meshproxy.observe.http2_stats import Http2Stats
from meshproxy.upstream import pool

if TYPE_CHECKING:
    from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2

    from meshproxy.codec.h1.shapes import HeadShape
    from meshproxy.codec.h2.fields import RequestShape
    from meshproxy.codec.h2.settings import Options as Http2Options
    from meshproxy.http.planned_response import PlannedResponse
    from meshproxy.http.routes import Route
    from meshproxy.http.shape_plan import Shaped, ShapedPlans
    from meshproxy.http.tracing import Tracing
    from meshproxy.http.upgrade_filters import UpgradeFilters
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import NetworkContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
HONOURS = Options.HONOURS | local_reply.HONOURS | log_events.HONOURS | route_configs.HONOURS | extension_configs.HONOURS

_PRIOR_KNOWLEDGE = b"PRI * HTTP/2"  # as much of the preface as Envoy looks at; a client that sends less at first speaks HTTP/1
SAID_BOTH = 3  # as in http.filters.peer_metadata, which few need
_RESPONSE_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


def compile(proto: hcm_pb2.HttpConnectionManager, context: NetworkContext) -> HttpConnectionManager:
    """The terminal network filter. Raises ConfigError with paths relative to `proto`."""
    return HttpConnectionManager(proto, context)


class HttpConnectionManager:
    """What connections and streams share. Attributes read per request are plain values, decided here."""

    terminal = True
    reports_close = True

    def __init__(self, proto: hcm_pb2.HttpConnectionManager, network: NetworkContext) -> None:
        context = self.context = network.context
        self.loop = context.loop
        self.clock = context.clock
        options = self.options = Options(proto, network)
        self.stat_prefix = proto.stat_prefix
        self.stats = ManagerStats(context.stats, proto.stat_prefix, network.listener_prefix)
        self._filter_context = FilterContext(context, context.stats.scope(f"http.{proto.stat_prefix}."), proto.stat_prefix, network.listener)
        self._take(options)
        self.changes = context.changes
        self.logs_times = False
        self.preparer = RequestHeadPreparer(options.head, context.random)
        self.complete_head = self.preparer.complete
        # Requests that have begun, settled into the counters when statistics are collected, as `_by_status` is.
        self.rq_started = self.http2_started = 0
        self._by_status: dict[int, int] = {}
        self._settled = self._http2_settled = 0
        self._server: Pair = (b"server", options.server_name)
        self._server_transformation = options.server_header_transformation
        self._via = options.head.via
        self._echo_request_id = proto.always_set_request_id_in_response
        self._date: Pair = (b"date", b"")
        self.stream_class: type[Stream] = Stream
        self.date = b""
        self.next_second = 0.0
        self.wall_offset = context.wall() - context.clock()
        # -- the parts
        self._by_discovery = proto.HasField("rds")
        self._routes_key = route_configs.key_of(proto.rds) if self._by_discovery else b""
        self.asks_for_hosts: bytes | None = None  # the key of a route configuration that gets virtual hosts when they are needed
        self._retired: Drain | None = None  # of this connection manager alone
        with errors.under("route_config"):
            self.routes = RouteTable(self._first_routes(proto), context)
        self.match = self.routes.match
        self.times_routes = False  # how long it takes to find a route is logged
        self._replies = local_reply.compile(proto, context)
        self.logs = tuple(self._compile_logs(proto))
        self.logs_times = bool(self.logs)
        logged = [log.response_headers for log in self.logs]
        self.logged_response_headers = None if None in logged else frozenset[bytes]().union(*logged)  # None: who knows
        self._log_events = log_events.compile(proto, self.logs, context.loop)
        self._connection_class = self._metered_class() if any(log.metered for log in self.logs) else ServerConnection
        with errors.under("http_filters"):
            self._filters, self.router = self._compile_filters(proto.http_filters)
        self.routes.insert_original = not self.router.suppress
        self._upgrade_filters = self._compile_upgrade_filters(proto)  # by type, in lower case
        routers = [self.router, *(upgrade.router for upgrade in self._upgrade_filters.values())]
        for one in routers:
            one.scheme_matches_upstream = options.scheme_matches_upstream
            one.tells_callers = options.tells_callers
        self.tracing = self._compile_tracing(proto, network, routers)
        self._plain_chain = self._build(None)
        if context.loop is None:  # a dry run: what a worker compiles when it first needs it is compiled now, for its mistakes
            with errors.under("route_config"):
                self.routes.check(self._check_filters)
        self.chains: dict[Route | None, Chain] = {None: self._plain_chain}
        self.connections: set[DownstreamConnection] = set()
        self._begin_plans()
        self._drain = context.drain
        if context.drain is not None:
            context.drain.register(self)
        context.stats.collectors.append(self.settle)

    # -- compiling

    def _take(self, options: Options) -> None:
        """What is read on the hot path."""
        self.parser_options = options.parser
        self.accept_http_10 = options.accept_http_10
        self.max_requests = options.max_requests_per_connection
        self.idle_timeout = options.idle_timeout
        self.stream_idle_timeout = options.stream_idle_timeout
        self.headers_timeout = options.request_headers_timeout
        self.times_heads = bool(options.request_headers_timeout or options.request_timeout)
        self.has_stream_timers = bool(options.request_timeout)
        self.max_connection_duration = options.max_connection_duration
        self.delayed_close_timeout = options.delayed_close_timeout
        self.buffer_limit = options.buffer_limit
        self.proxy_100_continue = options.head.proxy_100_continue
        self.header_case = header_case.compile(options.header_case)
        self.codec_special = self.header_case is not None  # responses that `ServerConnection.send_whole` leaves to the general way

    def _begin_plans(self) -> None:
        # Of all lanes whose routes do not change responses, by version of HTTP downstream and what the chain does to responses.
        self.planned_responses: dict[Any, dict[Any, PlannedResponse | None]] = {}
        self.response_kinds: dict[Any, object] = {}
        self.tallies: dict[Any, Tally] = {}
        self.busy: set[Tally] = set()  # that have something to settle
        # By route, for clients that are not internal and for those that are: over HTTP/1, over HTTP/2 (2, 3), by gRPC (4, 5); once more (6 to 11) for those
        # that say who they are, where a filter wants to know. Valid as long as nothing changes. None: there is no lane.
        self._lanes: tuple[dict[Route | None, Lane | None], ...] = tuple({} for _ in range(12))
        self._said = self._find_said()
        self._lanes_of = self.changes.n
        self._plans = 0
        self._shapes: list[HeadShape | RequestShape] = []  # that have plans
        # Whether requests can go by plan at all.
        self._plannable = self._connection_class is ServerConnection and self.router.charges_plainly
        self._plannable &= not (self.codec_special or self.max_requests or self._echo_request_id)

    def _first_routes(self, proto: hcm_pb2.HttpConnectionManager) -> Any:
        """The RouteConfiguration to begin with."""
        if not self._by_discovery:
            if proto.route_config.HasField("vhds"):
                errors.fail("vhds", "virtual hosts by discovery need a route configuration by discovery (rds)", errors.UNSUPPORTED)
            return proto.route_config
        configs = self.context.routes
        routes = route_configs.RouteConfigs().use(b"", self) if configs is None else configs.use(self._routes_key, self)
        self._note_vhds(routes)
        return routes

    def _note_vhds(self, routes: Any) -> None:
        self.asks_for_hosts = self._routes_key if routes.HasField("vhds") else None

    def set_routes(self, proto: Any) -> None:
        """Route by another RouteConfiguration from the next request on."""
        self._note_vhds(proto)
        self.routes = RouteTable(proto, self.context, insert_original=not self.router.suppress)
        if self._connection_class is ServerConnection:
            self.match = self.routes.match
        self._forget_chains()
        if self.tracing is not None:
            self.tracing.forget_routes()
        self._forget_lanes()

    def _compile_filters(self, protos: Sequence[Any]) -> tuple[list[FilterEntry], router.Router]:
        """HttpFilter messages: the router is the last one."""
        filters: list[FilterEntry] = []
        count = len(protos)
        if not count:
            filters.append(FilterEntry("", router, NobodyAnswers(), disabled=False))
            return filters, router.compile(messages.known("envoy.extensions.filters.http.router.v3.Router")(), self._filter_context)
        last = False
        for position, entry in enumerate(protos):
            last = position == count - 1
            if entry.HasField("config_discovery"):
                with errors.under(f"[{position}].config_discovery"):
                    filters.append(filter_entry.by_discovery(entry, last, self._filter_context, self))
                continue
            if entry.is_optional and not registry.is_known(entry.typed_config, "http filter"):
                continue
            with errors.under(f"[{position}].typed_config"):
                config = registry.unpack(entry.typed_config)
                module = registry.module(registry.type_url(entry.typed_config), "http filter")
                compiled = module.compile(config, self._filter_context)
            if getattr(module, "TERMINAL", False) != last:
                which = "terminal filter must be the last in the chain" if not last else "the last filter must be a terminal filter (the router)"
                errors.fail(f"[{position}]", f"{entry.name}: {which}")
            if last:
                break
            if compiled is not None:
                compiled.name = entry.name
            filters.append(FilterEntry(entry.name, module, compiled, entry.disabled))
        return filters, compiled

    def _compile_upgrade_filters(self, proto: hcm_pb2.HttpConnectionManager) -> dict[str, UpgradeFilters]:
        found: dict[str, UpgradeFilters] = {}
        for position, config in enumerate(proto.upgrade_configs):
            if config.filters:
                from meshproxy.http.upgrade_filters import UpgradeFilters  # few have any

                with errors.under(f"upgrade_configs[{position}].filters"):
                    entries, last = self._compile_filters(config.filters)
                    if last.suppress != self.router.suppress:
                        at = f"[{len(config.filters) - 1}].typed_config.suppress_envoy_headers"
                        errors.fail(at, "is not what the router of http_filters has", errors.UNSUPPORTED)
                found[config.upgrade_type.lower()] = UpgradeFilters(entries, last, self._select)
        return found

    def _find_said(self) -> Callable[[RequestHead], int] | None:
        """What tells what requests say of their senders, if a filter wants to know."""
        return next((made.filter.said for made in self._filters if hasattr(made.filter, "said")), None)

    def filter_changed(self, key: bytes) -> None:
        """A filter by discovery has another configuration from the next request on."""
        for entries in (self._filters, *(upgrade.entries for upgrade in self._upgrade_filters.values())):
            for made in entries:
                if made.discovery is not None and made.discovery[0] == key:
                    filter_entry.take(made, self._filter_context)
        self._plain_chain = self._build(None)
        self._forget_chains()
        self._said = self._find_said()
        self._forget_lanes()

    def _compile_logs(self, proto: hcm_pb2.HttpConnectionManager) -> list[Any]:
        logs = []
        for position, entry in enumerate(proto.access_log):
            with errors.under(f"access_log[{position}]"):
                logs.append(access_log.compile(entry, self.context))
        return logs

    def _compile_tracing(self, proto: hcm_pb2.HttpConnectionManager, network: NetworkContext, routers: list[router.Router]) -> Tracing | None:
        if not proto.HasField("tracing"):
            return None
        from meshproxy.http.traced import TracedForwarding, TracedStream
        from meshproxy.http.tracing import Tracing

        head = self.options.head
        children = any(one.starts_spans for one in routers)
        with errors.under("tracing"):
            made = Tracing(proto.tracing, network, self.stats, packs_reason=head.packs_trace_reason, decides_by_id=head.traces_by_id, child_spans=children)
        self.preparer.new_id = self.preparer.ids.new_apart
        self.stream_class = TracedStream
        for one in routers:
            one.forwarding_class = TracedForwarding
        self.finish_response_head = self._finish_traced_head  # type: ignore[method-assign]
        self.logs_times |= made.verbose
        return made

    def _metered_class(self) -> type[ServerConnection]:
        from meshproxy.http.metered import MeteredConnection

        self.context.shared[pool.METERED] = True
        self.match = self._timed_match  # type: ignore[assignment]
        self.times_routes = True
        return MeteredConnection

    def _timed_match(self, stream: Stream) -> Route | None:
        started = self.clock()
        route = self.routes.match(stream)
        stream.route_time += self.clock() - started
        return route

    def compile_chain(self, route: Route | None) -> Chain:
        """The chain for `route`, compiled on its first request and kept."""
        chain = self._build(route)
        self.chains[route] = chain
        return chain

    def _build(self, route: Route | None) -> Chain:
        admission = route is not None and (
            route.idle_timeout is not None
            or route.max_stream_duration_ms is not None
            or route.grpc_timeout_header_max_ms is not None
            or bool(self.options.max_stream_duration)
        )
        if route is not None and not route.filter_configs and not admission and not route.cors:
            return self._plain_chain
        filters = self._select(route, self._filters)
        return Chain(filters, admission, route) if filters or admission else EMPTY

    def _check_filters(self, route: Route) -> None:
        """Compile all that a route says of filters. Raises ConfigError."""
        self._build(route)
        for upgrade in self._upgrade_filters.values():
            upgrade.build(route)

    def _forget_chains(self) -> None:
        self.chains = {None: self._plain_chain}
        for upgrade in self._upgrade_filters.values():
            upgrade.forget()

    def _select(self, route: Route | None, entries: list[FilterEntry]) -> list[Any]:
        """The filters of `entries` that do something for a route, as it wants them."""
        filters: list[Any] = [] if self._log_events is None else [self._log_events]
        for entry in entries:
            overrides = [] if route is None else [level[entry.name] for level in route.filter_configs if entry.name in level]
            # The most specific level decides whether the filter runs; configurations are handed over from all levels.
            disabled = overrides[-1].disabled if overrides else entry.disabled
            configs = [override.config for override in overrides if override.config is not None]
            if disabled:
                continue
            if entry.module is None:
                filters.append(NoConfig())
                break  # it answers
            compiled = entry.filter
            if entry.discovery is not None:
                configs = [config for config in configs if filter_entry.is_for(config, entry.module)]
            if configs and hasattr(entry.module, "specialise"):
                with errors.under(f'typed_per_filter_config["{entry.name}"]'):
                    compiled = entry.module.specialise(entry.filter, configs, self._filter_context)
                if compiled is not None:
                    compiled.name = entry.name
            if compiled is not None:
                filters.append(compiled)
        return filters

    # -- connections

    def create_protocol(self, info: ConnectionInfo) -> DownstreamConnection:
        """The protocol of a new downstream connection. With codec_type AUTO, one whose TLS handshake has not decided is HTTP/1 until it says otherwise."""
        if self.options.codec_type == HTTP2 or (self.options.codec_type == AUTO and info.tls is not None and info.tls.alpn == "h2"):
            return self.http2_protocol(info)
        return self._connection_class(self, info)

    def http2_protocol(self, info: ConnectionInfo) -> DownstreamConnection:
        """The protocol of a connection that is known to be HTTP/2."""
        if self._connection_class is not ServerConnection:
            from meshproxy.http.http2_metered import MeteredHttp2Connection

            return MeteredHttp2Connection(self, info)
        # Imported by the supervisor, beside the longest way of a start.
        from meshproxy.http.http2_connection import Http2ServerConnection

        return Http2ServerConnection(self, info)

    def speaks_http2(self, connection: DownstreamConnection, data: bytes) -> bool:
        """Whether a connection that begins with `data` is HTTP/2 by prior knowledge."""
        if self.options.codec_type != AUTO or not data.startswith(_PRIOR_KNOWLEDGE):
            return False
        tls = connection.info.tls
        return tls is None or tls.alpn is None

    @property
    def http2_options(self) -> Http2Options:
        """Of HTTP/2 connections; their statistics are there from the first one on."""
        options = self.options.http2
        if options.stats is None:
            options.stats = Http2Stats.of(self.context.stats.scope("http2."), self.context.shared)
        return options

    def connection_opened(self, connection: DownstreamConnection) -> None:
        """Count it in."""
        self.connections.add(connection)
        stats = self.stats
        stats.downstream_cx_total.n += 1
        stats.downstream_cx_active.n += 1
        if connection.info.tls is not None:
            stats.downstream_cx_ssl_total.n += 1
            stats.downstream_cx_ssl_active.n += 1

    def connection_closed(self, connection: DownstreamConnection) -> None:
        """Count it out."""
        self.connections.discard(connection)
        stats = self.stats
        stats.downstream_cx_active.n -= 1
        if connection.spoken:
            stats.by_protocol[connection.protocol][1].n -= 1
        stats.downstream_cx_destroy.n += 1
        (stats.downstream_cx_destroy_local if connection.closed_locally else stats.downstream_cx_destroy_remote).n += 1
        if connection.info.tls is not None:
            stats.downstream_cx_ssl_active.n -= 1
        stats.downstream_cx_length_ms.record((self.clock() - connection.started) * 1000)

    def missed(self, info: ConnectionInfo, *, secure: bool) -> None:
        """Count a connection that has ended before it came here."""
        stats = self.stats
        stats.downstream_cx_total.n += 1
        if secure:
            stats.downstream_cx_ssl_total.n += 1
        stats.downstream_cx_destroy.n += 1
        (stats.downstream_cx_destroy_remote if info.local_close_reason is None else stats.downstream_cx_destroy_local).n += 1
        stats.downstream_cx_length_ms.record((self.clock() - info.start) * 1000)

    def drain_close(self) -> bool:
        """Whether the connection of a response that is about to be sent should close."""
        drain, own = self._drain, self._retired
        return (drain is not None and drain.active and drain.close_now()) or (own is not None and own.close_now())

    def retire(self) -> None:
        """The listener has been replaced or removed: connections are told to close with their responses, little by little or at once."""
        shared = self.context.drain
        if self._retired is None and shared is not None:
            self._retired = Drain(self.clock, self.context.random, shared.seconds, immediate=shared.immediate)
            self._retired.start()
            self._forget_lanes()

    def dispose(self) -> None:
        """There are no connections any more, and none will come."""
        self.settle()
        collectors = self.context.stats.collectors
        if self.settle in collectors:
            collectors.remove(self.settle)

    def drain_connections(self) -> None:
        """Close idle connections and the others after their response."""
        for connection in list(self.connections):
            connection.drain()

    def drain_changed(self) -> None:
        """A drain began or ended: responses may have to say that the connection closes."""
        self._forget_lanes()

    # -- streams

    @property
    def plannable(self) -> bool:
        """Whether requests can have lanes at all: not while responses have to say that the connection closes."""
        return self._plannable and not self.drain_active()

    def lane(self, route: Route | None, head: RequestHead, internal: bool) -> Lane | None:
        """HOT: the lane of a route, if there can be one. `head`: of a request that has this route."""
        if self._lanes_of != self.changes.n:
            self._forget_lanes()
        if head.version == 20:
            grpc = is_content_type(head._index.get(b"content-type"))  # type: ignore[union-attr]  # a prepared head has one
            lanes = self._lanes[internal + (4 if grpc else 2)]
        else:
            grpc = False
            lanes = self._lanes[internal]
        said = 0
        if self._said is not None:
            said = self._said(head)
            if said:
                if said != SAID_BOTH:
                    return None
                lanes = self._lanes[internal + ((10 if grpc else 8) if head.version == 20 else 6)]
        try:
            return lanes[route]
        except KeyError:
            made = lanes[route] = make_lane(self, route, head, internal=internal, grpc=grpc, said=said)
            return made

    def plan(self, known: Any, additions: Any) -> plan.Plan | None:
        """The plan for a head that repeats itself, made now if there is none yet; None if there can be none."""
        made: Any = known.plans.get(additions, NO_PLANS)
        if made is NO_PLANS or (made is not None and made.generation != self.changes.n):
            if known.plans is NO_PLANS or len(known.plans) >= plan.MAX_PER_HEAD:
                known.plans = {}
            if self._plans >= plan.MAX_PLANS:
                self._forget_lanes()
            self._plans += 1
            if self.tracing is None:
                made = known.plans[additions] = plan.make_plan(self, known, additions)
            else:
                from meshproxy.http.traced_plan import make_traced_plan  # few trace

                made = known.plans[additions] = make_traced_plan(self, known, additions)
        return made

    def shaped_plans(self, known: Shaped, additions: Any) -> ShapedPlans | None:
        """The same for a head of a known shape."""
        if self.tracing is not None:
            return None
        shape = known.shape
        made: Any = shape.plans.get(additions, NO_PLANS)
        if made is NO_PLANS or (made is not None and made.generation != self.changes.n):
            from meshproxy.http.shape_plan import make_plans  # not all clients have heads of one shape

            if not self.preparer.is_plain_path(known.path):
                return None  # it says nothing about others
            if self._plans >= plan.MAX_PLANS:
                self._forget_lanes()
            if shape.plans is NO_PLANS or len(shape.plans) >= plan.MAX_PER_HEAD:
                shape.plans = {}
            made = shape.plans[additions] = make_plans(self, known, additions)
            self._shapes.append(shape)
            self._plans += 1
        return made

    def count_plan(self) -> None:
        """One plan more is remembered."""
        self._plans += 1

    def _forget_lanes(self) -> None:
        """Something changed, or there are too many plans: all are made anew when they are needed."""
        self.settle()
        for lanes in self._lanes:
            for lane in lanes.values():
                if lane is not None:
                    lane.retired = True
            lanes.clear()
        self.changes.n += 1
        self._lanes_of = self.changes.n
        self._plans = 0
        for shape in self._shapes:
            shape.plans = NO_PLANS
        self._shapes.clear()
        self.tallies.clear()
        self.planned_responses = {}

    def tick(self, now: float) -> None:
        """Once a second while there are requests: the date header."""
        wall = self.context.wall()
        self.wall_offset = wall - now
        self.date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(wall)).encode()
        self._date = (b"date", self.date)
        self.next_second = now + 1.0 - wall % 1.0

    def admit(self, stream: Stream) -> Reply | None:
        """What a route may say about a stream before its filters run: upgrades, and an idle timeout of its own."""
        route = stream.route
        if route is not None and route.idle_timeout is not None:
            stream.idle_timeout = route.idle_timeout or float("inf")
            stream.codec.watch_stream(stream.idle_timeout)
        if route is not None and stream.request is not None:
            duration = timeouts.stream_duration(route, stream.request, self.options.max_stream_duration, stream.is_grpc)
            if duration is not None:
                stream.add_timer(self.loop.call_later(duration, self._duration_reached, stream))
        return None if stream.upgrade is None else self._admit_upgrade(stream, stream.upgrade.lower().decode("latin-1"), route)

    def _admit_upgrade(self, stream: Stream, name: str, route: Route | None) -> Reply | None:
        allowed = route.upgrades.get(name) if route is not None and route.upgrades else None
        if allowed is None:
            allowed = self.options.upgrades.get(name, False)
        if not allowed:
            if route is None:
                return None
            self.stats.downstream_rq_ws_on_non_ws_route.n += 1
            return UPGRADE_FAILED
        self.stats.downstream_cx_upgrades_total.n += 1
        if not stream.upgrading:  # a request may begin anew
            self.stats.downstream_cx_upgrades_active.n += 1
            stream.upgrading = True
        filters = self._upgrade_filters.get(name)
        if filters is not None:
            stream.chain = filters.chain(route)
        return None

    def flush_timeout(self, stream: Stream) -> float:
        """How long a client may take for the end of a response that is blocked by its flow control, in seconds; 0.0 for ever."""
        route = stream.route
        if route is not None and route.flush_timeout is not None:
            timeout: float = route.flush_timeout
            return timeout
        if self.options.stream_flush_timeout is not None:
            return self.options.stream_flush_timeout
        return self.stream_idle_timeout

    def start_timers(self, stream: Stream) -> None:
        """request_timeout."""
        options, loop = self.options, self.loop
        if options.request_timeout and not stream.request_ended:
            stream.add_timer(loop.call_later(options.request_timeout, self._request_timed_out, stream))

    def _request_timed_out(self, stream: Stream) -> None:
        if not stream.ended and not stream.request_ended:
            self.stats.downstream_rq_timeout.n += 1
            stream.timed_out("request timeout", "request_overall_timeout", 0)
            stream.codec.flush()

    def _duration_reached(self, stream: Stream) -> None:
        if not stream.ended:
            self.stats.downstream_rq_max_duration_reached.n += 1
            stream.timed_out("downstream duration timeout", "max_duration_timeout", 0, grpc_status=4)
            stream.codec.flush()

    def finish_response_head(self, stream: Stream, head: ResponseHead, date: Pair | None = None) -> None:
        """The connection manager's own headers, on every response. `date`: instead of the present one."""
        items = head.items
        index = head._index
        if index is None:
            index = head._index = dict(reversed(items))
        if b"date" not in index:
            date = date or self._date
            items.append(date)
            index[b"date"] = date[1]
        server = index.get(b"server")
        if server is None:
            if self._server_transformation != 2:
                items.append(self._server)
                index[b"server"] = self._server[1]
        elif self._server_transformation == 0:
            if len(index) == len(items):
                items[items.index((b"server", server))] = self._server
                index[b"server"] = self._server[1]
            else:
                head.set(b"server", self._server[1])
                items = head.items
        if not _RESPONSE_HOP_BY_HOP.isdisjoint(index):
            self._remove_hop_by_hop(stream, head)
        if self._echo_request_id or self._via or stream.echoes_request_id:
            self._add_optional(stream, head)

    def _finish_traced_head(self, stream: Stream, head: ResponseHead, date: Pair | None = None) -> None:
        HttpConnectionManager.finish_response_head(self, stream, head, date)
        self.tracing.respond(stream, head)  # type: ignore[union-attr,arg-type]  # all its streams are traced ones

    def _remove_hop_by_hop(self, stream: Stream, head: ResponseHead) -> None:
        keep = (b"connection", b"upgrade") if stream.tunnel and head.status == 101 else ()
        head.items[:] = [pair for pair in head.items if pair[0] not in _RESPONSE_HOP_BY_HOP or pair[0] in keep]
        head.touch()

    def _add_optional(self, stream: Stream, head: ResponseHead) -> None:
        request = stream.request
        assert request is not None
        if self._echo_request_id or stream.echoes_request_id:
            value = request.get(b"x-request-id")
            if value is not None:
                head.set(b"x-request-id", value)
        if self._via:
            before = head.joined(b"via")
            head.set(b"via", before + b", " + self._via if before else self._via)

    def render_reply(self, stream: Stream, reply: Reply, finalize: Callable[[Stream], None] | None = None) -> tuple[ResponseHead, bytes]:
        """A local reply as a response: gRPC or plain, after the mappers of `local_reply_config`."""
        return self._replies.render(stream, reply, finalize)

    def stream_done(self, stream: Stream) -> None:
        """HOT: count and log a stream that has ended."""
        now = stream.end = self.clock()
        self.stats.downstream_rq_time.record((now - stream.start) * 1000)
        status = stream.status
        if stream.health_check:
            status = 0  # answered, but not counted among the responses
            self.stats.tracing_health_check.n += 1
        if self.tracing is not None:
            self.tracing.finish(stream)  # type: ignore[arg-type]  # all its streams are traced ones
        try:
            self._by_status[status] += 1
        except KeyError:
            self._by_status[status] = 1
        if stream.upgrading:
            self.stats.downstream_cx_upgrades_active.n -= 1
        self.watch(stream, stream.chain)

    def watch(self, stream: Stream, chain: Chain) -> None:
        """Tell those who watch streams end."""
        for hook in chain.complete:
            hook(stream)
        for log in self.logs:
            log.log(stream)

    def count_started(self, protocol: str) -> None:
        """A request has begun that nobody has counted."""
        if protocol == "HTTP/2":
            self.http2_started += 1
        else:
            self.rq_started += 1

    def count_responses(self, status: int, count: int) -> None:
        """Count responses, for `settle`."""
        self._by_status[status] = self._by_status.get(status, 0) + count

    def settle(self) -> None:
        """Before statistics are collected: spread what requests counted in one place over all the counters that it means."""
        stats = self.stats
        started = self.rq_started - self._settled
        self._settled = self.rq_started
        started_http2 = self.http2_started - self._http2_settled
        self._http2_settled = self.http2_started
        for tally in self.busy:
            if tally.version == 20:
                started_http2 += tally.settle()
            else:
                started += tally.settle()
        self.busy.clear()
        stats.downstream_rq_http1_total.n += started
        stats.downstream_rq_http2_total.n += started_http2
        started += started_http2
        stats.downstream_rq_total.n += started
        finished = 0
        for status, count in self._by_status.items():
            finished += count
            for counter in stats.by_class[status // 100]:
                counter.n += count
        self._by_status.clear()
        stats.downstream_rq_active.n += started - finished

    def drain_active(self) -> bool:
        """Whether a drain is going on."""
        return self._retired is not None or (self._drain is not None and self._drain.active)


__all__ = ["HONOURS", "TYPE_URL", "HttpConnectionManager", "compile"]
