"""Tracing of a connection manager: which requests are traced, and what their spans say.

Source: HttpConnectionManager.Tracing and envoy.config.route.v3.Tracing; what is honoured of them is in `api.honoured`, for most configurations need nothing of
this. The order of decisions is Envoy's: a request id that says so, a client that asks, a service that insists, chance; and `overall_sampling` over all of
them. Chance is the request id's, so that all proxies on a request's way decide alike.

Untraced connection managers know nothing of this: those that trace have their streams, and the forwardings of those, from `http.traced`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from meshproxy.api import errors, registry, runtime
from meshproxy.observe import flags
from meshproxy.observe.format import Compiler
from meshproxy.tracing import tags as custom_tags

if TYPE_CHECKING:
    from meshproxy.codec.headers import RequestHead, ResponseHead
    from meshproxy.http.manager_stats import ManagerStats
    from meshproxy.http.traced import TracedStream
    from meshproxy.net.filter_chain import NetworkContext
    from meshproxy.tracing.span import Span

DECORATOR = b"x-envoy-decorator-operation"
_OUTBOUND = 2  # envoy.config.core.v3.TrafficDirection
_MAX_PATH = 256
_REASON_AT = 14  # in a request id: where a version 4 UUID has its version
# Why a request is traced, by what its id says of it; and the statistic that counts it.
_REASONS = {b"9": "random_sampling", b"a": "service_forced", b"b": "client_enabled"}
_MARKS = {reason: mark for mark, reason in _REASONS.items()}
_EVENTS = (  # of `verbose`: when, what; the first and the last two are the downstream's
    ("request_end", "last_downstream_rx_byte_received"),
    ("upstream_start", "first_upstream_tx_byte_sent"),
    ("upstream_sent", "last_upstream_tx_byte_sent"),
    ("upstream_first", "first_upstream_rx_byte_received"),
    ("upstream_last", "last_upstream_rx_byte_received"),
    ("response_start", "first_downstream_tx_byte_sent"),
    ("end", "last_downstream_tx_byte_sent"),
)
# gRPC statuses that Envoy takes for errors of the upstream.
_GRPC_ERRORS = frozenset((b"2", b"4", b"8", b"12", b"13", b"14", b"15"))

Chance = tuple[int, int]  # numerator, denominator


class RouteTracing:
    """What a route says about tracing (envoy.config.route.v3.Tracing). Raises ConfigError relative to it."""

    __slots__ = ("client", "operation", "overall", "random", "tags", "upstream_operation")

    def __init__(self, proto: Any) -> None:
        self.client = runtime.fraction_of(proto.client_sampling) if proto.HasField("client_sampling") else (100, 100)
        self.random = runtime.fraction_of(proto.random_sampling) if proto.HasField("random_sampling") else (100, 100)
        self.overall = runtime.fraction_of(proto.overall_sampling) if proto.HasField("overall_sampling") else (100, 100)
        with errors.under("custom_tags"):
            self.tags = custom_tags.compile_tags(proto.custom_tags)
        self.operation, self.upstream_operation = _operations(proto)


class _Effective:
    """What holds for requests of a route: its own, and for the rest the connection manager's."""

    __slots__ = ("client", "operation", "overall", "random", "tags", "upstream_operation")

    client: Chance
    random: Chance
    overall: Chance
    tags: tuple[tuple[str, custom_tags.Tag], ...]
    operation: Any
    upstream_operation: Any


class Tracing:
    """Compiled once with its connection manager. Raises ConfigError relative to `proto`."""

    def __init__(self, proto: Any, network: NetworkContext, stats: ManagerStats, *, packs_reason: bool, decides_by_id: bool, child_spans: bool = False) -> None:
        context = network.context
        self._runtime = context.runtime
        self._bits = context.random.getrandbits
        self._stats = stats
        self._counters = {reason: getattr(stats, f"tracing_{reason or 'not_traceable'}") for reason in (None, *_MARKS)}
        self._packs_reason = packs_reason
        self._decides_by_id = decides_by_id
        listener = network.listener
        self._egress = listener is not None and listener.traffic_direction == _OUTBOUND
        self.spawns = proto.spawn_upstream_span.value or child_spans  # the router's `start_child_span` leaves the kind of the request's own span as it is
        self._client = self._egress and not proto.spawn_upstream_span.value
        self._client_tries = self._egress or proto.spawn_upstream_span.value
        self.verbose = proto.verbose
        self._max_path = proto.max_path_tag_length.value if proto.HasField("max_path_tag_length") else _MAX_PATH
        node = network.context.node
        self._local = {
            "node_id": b"" if node is None else node.id.encode(),
            "zone": b"" if node is None else node.locality.zone.encode(),
        }
        own = self._own = _Effective()
        own.client = int(proto.client_sampling.value) if proto.HasField("client_sampling") else 100, 100
        own.random = int(10_000 * (proto.random_sampling.value / 100)) if proto.HasField("random_sampling") else 10_000, 10_000
        own.overall = int(10_000 * (proto.overall_sampling.value / 100)) if proto.HasField("overall_sampling") else 10_000, 10_000
        with errors.under("custom_tags"):
            self._tags = custom_tags.compile_tags(proto.custom_tags)
        own.tags = tuple(self._tags.items())
        own.operation, own.upstream_operation = _operations(proto)
        self._effective: dict[RouteTracing | None, _Effective] = {None: own}
        self.tracer = _tracer(proto, context)
        self.root: Any = getattr(self.tracer, "root", None)
        self.plans = decides_by_id and not self.spawns and self.root is not None

    def forget_routes(self) -> None:
        """There are others now."""
        self._effective = {None: self._own}

    def holds(self, route: Any) -> _Effective:
        """What holds for a route."""
        said: Any = None if route is None else route.tracing
        made = self._effective.get(said)
        if made is None:
            made = self._effective[said] = _Effective()
            made.client, made.random, made.overall = said.client, said.random, said.overall
            made.tags = tuple({**self._tags, **said.tags}.items())
            made.operation = self._own.operation if said.operation is None else said.operation
            made.upstream_operation = self._own.upstream_operation if said.upstream_operation is None else said.upstream_operation
        return made

    # -- the beginning

    def begin(self, stream: TracedStream) -> None:
        """Decide, and begin the span of a request that has its route."""
        head = stream.request
        assert head is not None
        holds = stream.tracing = self.holds(stream.route)
        reason = stream.reason = self._decide(head, holds)
        name = b"egress " + head.authority if self._egress else b"ingress"
        span = self.tracer.start(head, name, client=self._client, traced=reason is not None, at=stream.start_wall) if self.tracer is not None else None
        stream.span = span
        if holds.operation is None:
            self._decorate(stream, head, span)

    def stays_in_lane(self, stream: TracedStream) -> bool:
        """HOT: begin, and say whether nothing more is to be done than `begin_try` and `count`: the span of such a stream is not sent to anybody."""
        head: Any = stream.request
        decorated = not self._egress and DECORATOR in head._index  # what becomes of the response depends on it
        self.begin(stream)
        span = stream.span
        return not decorated and (span is None or not span.sampled)

    def lane_operation(self, route: Any) -> bytes | None:
        """What responses of a route's lane are told that it is called; None where its requests have no lane."""
        holds = self.holds(route)
        if self.spawns or holds.operation is not None:
            return None
        decorator = None if route is None else route.decorator
        return b"" if decorator is None or not decorator[1] else decorator[0].encode()

    def chance(self, route: Any) -> Chance:
        """Of being sampled, for requests of a route that ask for nothing; it holds as long as the runtime does not change."""
        found: Chance = self._runtime.fraction("tracing.random_sampling", self.holds(route).random)
        return found

    def tells_operation(self, operation: bytes | None) -> bool:
        """Whether requests say upstream what they are called."""
        return bool(self._egress and operation)

    def _decide(self, head: RequestHead, holds: _Effective) -> str | None:
        """The name of the statistic that counts why a request is traced, or None. Its id says so afterwards."""
        if not self._decides_by_id:
            return "random_sampling"
        request_id = head.get(b"x-request-id") or b""
        digits = request_id[:8]
        if len(digits) < 8 or not digits.isalnum():
            return None
        try:
            number = int(digits, 16) % 10_000
        except ValueError:
            return None
        get = self._runtime.fraction
        packs = self._packs_reason and len(request_id) == 36
        reason = _REASONS.get(request_id[_REASON_AT : _REASON_AT + 1]) if packs else None
        marked = reason
        if reason is None:
            if b"x-client-trace-id" in head and _applies(get("tracing.client_enabled", holds.client), self._bits(64)):
                reason = "client_enabled"
            elif b"x-envoy-force-trace" in head:
                reason = "service_forced"
            elif _applies(get("tracing.random_sampling", holds.random), number):
                reason = "random_sampling"
        if reason is None:
            return None
        if not _applies(get("tracing.global_enabled", holds.overall), number):
            reason = None
        if packs and (reason is None or reason != marked):
            mark = b"4" if reason is None else _MARKS[reason]
            head.set(b"x-request-id", request_id[:_REASON_AT] + mark + request_id[_REASON_AT + 1 :])
        return reason

    def _decorate(self, stream: TracedStream, head: RequestHead, span: Span | None) -> None:
        """The name that a route has for its requests, or that the caller had."""
        route = stream.route
        decorator = None if route is None else route.decorator
        if decorator is not None:
            operation = decorator[0].encode()
            if span is not None and operation:
                span.name = operation
            stream.operation = operation if decorator[1] else b""
        if self._egress:
            if stream.operation:
                head.set(DECORATOR, stream.operation)
            return
        said = head.get(DECORATOR)
        if said is not None:
            if said:
                if span is not None:
                    span.name = said
                stream.operation = b""
            head.remove(DECORATOR)

    def respond(self, stream: TracedStream, head: ResponseHead) -> None:
        """The head of a response goes out."""
        holds = stream.tracing
        if holds is None or holds.operation is not None:
            return
        if not self._egress:
            if stream.operation:
                head.set(DECORATOR, stream.operation)
            return
        said = head.get(DECORATOR)
        if said is not None:
            if said and stream.span is not None:
                stream.span.name = said
            head.remove(DECORATOR)

    # -- tries

    def begin_try(self, stream: TracedStream, head: RequestHead, at: float) -> Span | None:
        """A try at a host begins: say in its head who asks. Returns the span of its own that it has, if it has one."""
        span = stream.span
        if span is None:
            return None
        if not self.spawns:
            span.inject(head)
            return None
        child = span.child(b"router %b egress" % stream.cluster.observability_name.encode(), at=at, client=self._client_tries)
        if stream.attempts > 1:
            child.tags["retry.count"] = b"%d" % (stream.attempts - 1)
        child.inject(head)
        return child

    def begin_copy(self, stream: TracedStream, head: RequestHead) -> Span | None:
        """A mirrored request is about to be sent: it has a span of its own, of which its head tells."""
        if stream.span is None:
            return None
        context = stream.manager.context
        child = stream.span.child(b"mirror", at=context.wall())
        child.inject(head)
        return child

    def finish_try(self, stream: TracedStream, span: Span, host: Any, status: int, flag: int, at: float) -> None:
        """A try with a span of its own is over. `status`: of the upstream, or 0."""
        if not span.sampled or stream.health_check:
            return
        operation = stream.tracing.upstream_operation
        if operation is not None:
            span.name = _text(operation, stream)
        tags = span.tags
        tags["http.protocol"] = (stream.upstream_protocol or "-").encode()
        if host is not None:
            tags["upstream_address"] = tags["peer.address"] = host.address.text.encode()
        self._common(stream, tags, status, flag)
        if self.verbose:
            self._tell_times(stream, span, _EVENTS[1:-2])
        span.finish(at=at)

    # -- the end

    def count(self, reason: str | None) -> None:
        """HOT: a stream is over that has gone by its lane."""
        self._counters[reason].n += 1

    def finish(self, stream: TracedStream) -> None:
        """A stream is over."""
        if stream.tracing is None or stream.health_check:  # refused before there was anything to trace, or not to be traced after all
            self._stats.tracing_not_traceable.n += 1
            return
        getattr(self._stats, f"tracing_{stream.reason or 'not_traceable'}").n += 1
        span = stream.span
        if span is None or not span.sampled:
            return
        head = stream.request
        assert head is not None
        operation = stream.tracing.operation
        if operation is not None:
            span.name = _text(operation, stream)
        tags = span.tags
        tags.update(self._local)
        request_id = head.get(b"x-request-id")
        if request_id is not None:
            tags["guid:x-request-id"] = request_id
        path = head.get(b"x-envoy-original-path") or head.path
        tags["http.url"] = b"%b://%b%b" % (head.get(b"x-forwarded-proto") or b"", head.authority, path[: self._max_path])
        tags["http.method"] = head.method
        tags["downstream_cluster"] = head.get(b"x-envoy-downstream-service-cluster") or b"-"
        tags["user_agent"] = head.get(b"user-agent") or b"-"
        tags["http.protocol"] = stream.protocol.encode()
        remote = stream.connection.remote
        tags["peer.address"] = (remote.ip if remote.kind == "ip" else remote.path).encode()
        client_id = head.get(b"x-client-trace-id")
        if client_id is not None:
            tags["guid:x-client-trace-id"] = client_id
        if stream.is_grpc:
            tags["grpc.path"] = head.path
            tags["grpc.authority"] = head.authority
            tags["grpc.content_type"] = head.get(b"content-type") or b""
            timeout = head.get(b"grpc-timeout")
            if timeout is not None:
                tags["grpc.timeout"] = timeout
        tags["request_size"] = b"%d" % stream.bytes_received
        tags["response_size"] = b"%d" % stream.bytes_sent
        self._common(stream, tags, stream.status, stream.flags)
        tell_grpc(tags, stream.response)
        tell_grpc(tags, stream.response_trailers)
        if self.verbose:
            self._tell_times(stream, span, _EVENTS)
        span.finish(at=stream.end + stream.manager.wall_offset)

    def _common(self, stream: TracedStream, tags: dict[str, bytes], status: int, flag: int) -> None:
        tags["component"] = b"proxy"
        cluster = stream.cluster
        if cluster is not None:
            tags["upstream_cluster"] = cluster.name.encode()
            tags["upstream_cluster.name"] = cluster.observability_name.encode()
        tags["http.status_code"] = b"%d" % status
        tags["response_flags"] = flags.short(flag).encode()
        if not status or status >= 500:
            tags["error"] = b"true"
        for name, tag in stream.tracing.tags:
            value = tag(stream)
            if value:
                tags[name] = value

    @staticmethod
    def _tell_times(stream: TracedStream, span: Span, events: Any) -> None:
        offset = stream.manager.wall_offset
        for attribute, what in events:
            when = getattr(stream, attribute) or (stream.end if attribute == "response_start" and stream.response_started else 0.0)
            if when:
                span.events.append((when + offset, what))


def tell_grpc(tags: dict[str, bytes], headers: Any) -> None:
    """What a response's head or trailers say of a gRPC call."""
    status = None if headers is None else headers.get(b"grpc-status")
    if status is None:
        return
    tags["grpc.status_code"] = status
    message = headers.get(b"grpc-message")
    if message is not None:
        tags["grpc.message"] = message
    if status in _GRPC_ERRORS:
        tags["error"] = b"true"


def _applies(chance: Chance, number: int) -> bool:
    return number % chance[1] < chance[0]


def _text(operation: Any, stream: TracedStream) -> bytes:
    text: bytes = operation if operation.__class__ is bytes else operation(stream)
    return text


def _operations(proto: Any) -> tuple[Any, Any]:
    """`operation` and `upstream_operation`; None where they are empty."""
    made = []
    for field in ("operation", "upstream_operation"):
        text = getattr(proto, field)
        with errors.under(field):
            made.append(Compiler().text(text, omit_empty=True) if text else None)
    return made[0], made[1]


def _tracer(proto: Any, context: Any) -> Any:
    """The tracer of a provider: one for all connection managers that have the same; None without one: then nobody is told anything."""
    if not proto.HasField("provider"):
        return None
    with errors.under("provider.typed_config"):
        packed = proto.provider.typed_config
        # One that no connection manager has any more goes when the last of its spans is sent.
        tracers = context.shared.setdefault("tracers", WeakValueDictionary())
        key = packed.type_url, packed.value
        tracer = tracers.get(key)
        if tracer is None:
            module = registry.module(registry.type_url(packed), "tracer")
            tracer = tracers[key] = module.compile(registry.unpack(packed), context)
        return tracer
