"""Injects faults: delays, aborts, slow responses (envoy.extensions.filters.http.fault.v3.HTTPFault).

A delay and an abort are drawn independently; a delayed request may be aborted afterwards. Percentages, durations and statuses can be overridden by the
runtime, per downstream cluster as well, and (where the configuration says so) by request headers, which can never raise a percentage.

What can never happen is left out when compiling: a filter whose percentages are all constantly 0 does not exist. A route's HTTPFault replaces the
filter's whole.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import convert, errors, matchers, messages, runtime
from meshproxy.http.replies import Reply
from meshproxy.net import shared
from meshproxy.observe import flags

if TYPE_CHECKING:
    from envoy.extensions.filters.http.fault.v3.fault_pb2 import HTTPFault

    from meshproxy.codec.headers import RequestHead
    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"
ROUTE_TYPE_URLS = (TYPE_URL,)
HONOURS = {
    "envoy.extensions.filters.http.fault.v3.HTTPFault": (
        "delay abort upstream_cluster headers downstream_nodes max_active_faults response_rate_limit delay_percent_runtime abort_percent_runtime "
        "delay_duration_runtime abort_http_status_runtime max_active_faults_runtime response_rate_limit_percent_runtime abort_grpc_status_runtime "
        "disable_downstream_cluster_stats filter_metadata"
    ),
    "envoy.extensions.filters.http.fault.v3.FaultAbort": "http_status grpc_status header_abort percentage",
    "envoy.extensions.filters.http.fault.v3.FaultAbort.HeaderAbort": "",
    "envoy.extensions.filters.common.fault.v3.FaultDelay": "fixed_delay header_delay percentage",
    "envoy.extensions.filters.common.fault.v3.FaultDelay.HeaderDelay": "",
    "envoy.extensions.filters.common.fault.v3.FaultRateLimit": "fixed_limit header_limit percentage",
    "envoy.extensions.filters.common.fault.v3.FaultRateLimit.FixedLimit": "limit_kbps",
    "envoy.extensions.filters.common.fault.v3.FaultRateLimit.HeaderLimit": "",
}

_COUNTERS = ("aborts_injected", "delays_injected", "faults_overflow", "response_rl_injected")
_GAUGES = ("active_faults",)
_ABORT_HEADER = b"x-envoy-fault-abort-request"
_ABORT_GRPC_HEADER = b"x-envoy-fault-abort-grpc-request"
_DELAY_HEADER = b"x-envoy-fault-delay-request"
_THROUGHPUT_HEADER = b"x-envoy-fault-throughput-response"
_MAX_CLUSTERS = 1000  # downstream cluster names come from a header: only so many get counters of their own
_NO_LIMIT = (1 << 64) - 1
_NUMBER = re.compile(rb"[ \t]*\+?(\d{1,20})[ \t]*")

Sleep = Callable[[float], Awaitable[None]]


def number(head: RequestHead, name: bytes) -> int | None:
    """The unsigned 64-bit number in a header's first value, None when there is none."""
    value = head.get(name)
    match = None if value is None else _NUMBER.fullmatch(value)
    if match is None:
        return None
    parsed = int(match[1])
    return parsed if parsed <= _NO_LIMIT else None


class Percentage:
    """Whether a fault happens: a FractionalPercent that the runtime may override and, if `header` is set, a request header may lower."""

    __slots__ = ("_constant", "_context", "_draw", "_fraction", "_header", "_key")

    def __init__(self, fraction: Any, key: str, header: bytes | None, context: FilterContext) -> None:
        self._fraction = fraction
        self._key = key
        self._header = header
        self._context = context
        drawn = self._compile(fraction, key)
        self._constant = drawn if isinstance(drawn, bool) else None
        self._draw = drawn

    @property
    def never(self) -> bool:
        """Whether it cannot happen, whatever a request says."""
        # What the general key forbids, the configuration may allow to clusters whose name is another key.
        if self._constant is not False or self._fraction.numerator:
            return False
        values = self._context.runtime
        return not values.mutable and not any(key.startswith("fault.http.") for key in values.dump()["entries"])

    def draw(self, head: RequestHead, cluster_key: str | None) -> bool:
        """Decide for one request. `cluster_key`: the runtime key of the downstream cluster, used instead of the general one."""
        numerator = None if self._header is None else number(head, self._header)
        if numerator is None and cluster_key is None:
            return _evaluate(self._draw)
        fraction = self._fraction
        if numerator is not None and numerator < fraction.numerator:
            fraction = type(fraction)(numerator=numerator, denominator=fraction.denominator)
        return _evaluate(self._compile(fraction, cluster_key or self._key))

    def _compile(self, fraction: Any, key: str) -> Callable[[], bool] | bool:
        proto = messages.known("envoy.config.core.v3.RuntimeFractionalPercent")(default_value=fraction, runtime_key=key)
        return runtime.compile_fraction(proto, self._context.runtime, self._context.random)


def _evaluate(drawn: Callable[[], bool] | bool) -> bool:
    return drawn if isinstance(drawn, bool) else drawn()


class Delay:
    """How long to delay, in milliseconds: fixed, or from x-envoy-fault-delay-request."""

    __slots__ = ("_fixed", "percentage")

    def __init__(self, proto: Any, key: str, context: FilterContext) -> None:
        kind = proto.WhichOneof("fault_delay_secifier")  # the API's own spelling
        if kind is None:
            errors.fail("", "one of fixed_delay and header_delay must be set")
        self._fixed: int | None = None
        if kind == "fixed_delay":
            self._fixed = proto.fixed_delay.ToMilliseconds()
            if proto.fixed_delay.ToNanoseconds() <= 0:
                errors.fail("fixed_delay", "must be greater than 0s")
        header = None if kind == "fixed_delay" else b"x-envoy-fault-delay-request-percentage"
        self.percentage = Percentage(proto.percentage, key, header, context)

    def milliseconds(self, head: RequestHead) -> int | None:
        return number(head, _DELAY_HEADER) if self._fixed is None else self._fixed


class Abort:
    """With what to abort: (HTTP status, None) or (None, gRPC status), fixed or from headers; (None, None) when the headers name none."""

    __slots__ = ("_grpc", "_http", "_kind", "percentage")

    def __init__(self, proto: Any, key: str, context: FilterContext) -> None:
        self._kind = proto.WhichOneof("error_type")
        if self._kind is None:
            errors.fail("", "one of http_status, grpc_status and header_abort must be set")
        if self._kind == "http_status" and not 200 <= proto.http_status < 600:
            errors.fail("http_status", "must be between 200 and 599")
        self._http = proto.http_status
        self._grpc = proto.grpc_status
        header = b"x-envoy-fault-abort-request-percentage" if self._kind == "header_abort" else None
        self.percentage = Percentage(proto.percentage, key, header, context)

    def status(self, head: RequestHead) -> tuple[int | None, int | None]:
        if self._kind == "http_status":
            return self._http, None
        if self._kind == "grpc_status":
            return None, self._grpc
        status = number(head, _ABORT_HEADER)
        if status is not None and 200 <= status < 600:
            return status, None
        return None, number(head, _ABORT_GRPC_HEADER)


class Throughput:
    """How fast responses may be, in KiB/s: fixed, or from x-envoy-fault-throughput-response."""

    __slots__ = ("_fixed", "percentage")

    def __init__(self, proto: Any, key: str, context: FilterContext) -> None:
        kind = proto.WhichOneof("limit_type")
        if kind is None:
            errors.fail("", "one of fixed_limit and header_limit must be set")
        self._fixed: int | None = None
        if kind == "fixed_limit":
            self._fixed = proto.fixed_limit.limit_kbps
            if self._fixed < 1:
                errors.fail("fixed_limit.limit_kbps", "must be at least 1")
        header = None if kind == "fixed_limit" else b"x-envoy-fault-throughput-response-percentage"
        self.percentage = Percentage(proto.percentage, key, header, context)

    def kbps(self, head: RequestHead) -> int | None:
        return (number(head, _THROUGHPUT_HEADER) or None) if self._fixed is None else self._fixed


class Limiter:
    """When bytes of one response may go on: at `rate` bytes a second, with up to one second's worth saved up while nothing came."""

    __slots__ = ("_clock", "_free_at", "_rate")

    def __init__(self, kbps: int, clock: Callable[[], float]) -> None:
        self._rate = kbps * 1024
        self._clock = clock
        self._free_at = clock() - _SLICE

    def delay(self, size: int) -> float:
        """Seconds until the last of the next `size` bytes may go, in whole slices as Envoy's timer has them."""
        now = self._clock()
        self._free_at = max(self._free_at, now - 1.0) + size / self._rate
        slices = math.ceil((self._free_at - now) / _SLICE - 1e-6)  # a rounding error is not one more slice
        return max(0, slices) * _SLICE


_SLICE = 0.05  # seconds


class State:
    """What a fault filter holds of a stream."""

    __slots__ = ("active", "limiter")

    def __init__(self) -> None:
        self.active = False
        self.limiter: Limiter | None = None


class Fault:
    """The filter. `delay`, `abort` and `throughput` are None when they can never happen."""

    def __init__(self, proto: HTTPFault, context: FilterContext, *, sleep: Sleep = asyncio.sleep) -> None:
        self.name = "envoy.filters.http.fault"
        self._sleep = sleep
        self._clock = context.clock
        self._runtime = context.runtime
        self.delay = _part(proto, "delay", Delay, proto.delay_percent_runtime or "fault.http.delay.fixed_delay_percent", context)
        self.abort = _part(proto, "abort", Abort, proto.abort_percent_runtime or "fault.http.abort.abort_percent", context)
        key = proto.response_rate_limit_percent_runtime or "fault.http.rate_limit.response_percent"
        self.throughput = _part(proto, "response_rate_limit", Throughput, key, context)

        self._upstream_cluster = proto.upstream_cluster
        self._nodes = frozenset(node.encode() for node in proto.downstream_nodes)
        with errors.under("headers"):
            self._matches = matchers.compile_headers(proto.headers)
        self._max_active = proto.max_active_faults.value if proto.HasField("max_active_faults") else _NO_LIMIT
        self._max_active_key = proto.max_active_faults_runtime or "fault.http.max_active_faults"
        self._duration_key = proto.delay_duration_runtime or "fault.http.delay.fixed_duration_ms"
        self._http_status_key = proto.abort_http_status_runtime or "fault.http.abort.http_status"
        self._grpc_status_key = proto.abort_grpc_status_runtime or "fault.http.abort.grpc_status"
        self._cluster_stats = not proto.disable_downstream_cluster_stats
        self._metadata = convert.from_struct(proto.filter_metadata)

        self._scope = context.scope.scope("fault.")
        self._scope.declare("counter", _COUNTERS)
        self._scope.declare("gauge", _GAUGES)
        self._counters = {name: self._scope.counter(name) for name in _COUNTERS}
        self._gauge = self._scope.gauge("active_faults")
        self._active, self._share = _active_faults(context)
        self._clusters: set[str] = set()

    # -- hooks

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | Awaitable[Reply | None] | None:
        head = stream.request
        if not self._concerns(stream, head):
            return None
        cluster = head.get(b"x-envoy-downstream-service-cluster")
        cluster = None if cluster is None else cluster.decode("utf-8", "replace")
        if self.throughput is not None:
            self._limit_response(stream, head)
        if self.delay is not None and self.delay.percentage.draw(head, _key(cluster, "delay.fixed_delay_percent")):
            milliseconds = self._duration(head, cluster)
            if milliseconds > 0 and self._activate(stream):
                self._injected("delays_injected", cluster)
                stream.flags |= flags.DI
                stream.metadata[self.name] = self._metadata.copy()
                return self._delayed(stream, milliseconds / 1000, cluster)
        return self._maybe_abort(stream, cluster)

    def complete(self, stream: Any) -> None:
        state = stream.locals.get(self)
        if state is not None and state.active:
            self._deactivate(state)

    # -- conditions

    def _concerns(self, stream: Any, head: RequestHead) -> bool:
        if self._upstream_cluster:
            route = stream.route
            if route is None or route.action != "forward" or route.cluster_name != self._upstream_cluster:
                return False
        if self._nodes and head.get(b"x-envoy-downstream-service-node") not in self._nodes:
            return False
        return self._matches is None or self._matches(head)

    def _activate(self, stream: Any) -> bool:
        """Count the stream among those with faults, once; False when there are too many."""
        state = stream.locals.get(self)
        if state is None:
            state = stream.locals[self] = State()
        if not state.active:
            limit = self._runtime.integer(self._max_active_key, self._max_active)
            if self._active.total() >= -(-limit // self._share):
                self._counters["faults_overflow"].n += 1
                return False
            self._active.add(1)
            self._gauge.n += 1
            state.active = True
        return True

    def _deactivate(self, state: State) -> None:
        state.active = False
        self._active.add(-1)
        self._gauge.n -= 1

    # -- faults

    def _duration(self, head: RequestHead, cluster: str | None) -> int:
        assert self.delay is not None
        configured = self.delay.milliseconds(head)
        if configured is None:
            return 0
        duration = self._runtime.integer(self._duration_key, configured)
        key = _key(cluster, "delay.fixed_duration_ms")
        return duration if key is None else self._runtime.integer(key, duration)

    async def _delayed(self, stream: Any, seconds: float, cluster: str | None) -> Reply | None:
        await self._sleep(seconds)
        reply = self._maybe_abort(stream, cluster)
        if reply is None and self.throughput is None:
            self._deactivate(stream.locals[self])
        return reply

    def _maybe_abort(self, stream: Any, cluster: str | None) -> Reply | None:
        head = stream.request
        if self.abort is None or not self.abort.percentage.draw(head, _key(cluster, "abort.abort_percent")):
            return None
        status, grpc_status = self.abort.status(head)
        if status is not None:
            status = self._override(status, self._http_status_key, _key(cluster, "abort.http_status"))
        elif grpc_status is not None:
            status, grpc_status = 200, self._override(grpc_status, self._grpc_status_key, _key(cluster, "abort.grpc_status"))
        else:
            return None
        if not self._activate(stream):
            return None
        self._injected("aborts_injected", cluster)
        stream.metadata[self.name] = self._metadata.copy()
        return Reply(status, b"fault filter abort", details="fault_filter_abort", flag=flags.FI, grpc_status=grpc_status)

    def _override(self, status: int, key: str, cluster_key: str | None) -> int:
        return self._runtime.integer(cluster_key or key, status)

    def _limit_response(self, stream: Any, head: RequestHead) -> None:
        assert self.throughput is not None
        if not self.throughput.percentage.draw(head, None):
            return
        kbps = self.throughput.kbps(head)
        if kbps is None or not self._activate(stream):
            return
        self._counters["response_rl_injected"].n += 1
        stream.locals[self].limiter = Limiter(kbps, self._clock)

    def _injected(self, name: str, cluster: str | None) -> None:
        self._counters[name].n += 1
        if not cluster or not self._cluster_stats:
            return
        if cluster in self._clusters or len(self._clusters) < _MAX_CLUSTERS:
            self._clusters.add(cluster)
            self._scope.counter(f"{cluster}.{name}").n += 1


class ThrottlingFault(Fault):
    """A fault filter that may slow responses down."""

    def response_data(self, stream: Any, data: bytes, end_stream: bool) -> Awaitable[None] | None:
        state = stream.locals.get(self)
        if state is None or state.limiter is None or not data:
            return None
        seconds = state.limiter.delay(len(data))
        return self._sleep(seconds) if seconds > 0 else None


def compile(proto: HTTPFault, context: FilterContext) -> Fault | None:
    """The filter for an HTTPFault proto; None when no fault can ever happen. Raises ConfigError."""
    fault = (ThrottlingFault if proto.HasField("response_rate_limit") else Fault)(proto, context)
    return None if fault.delay is fault.abort is fault.throughput is None else fault


def specialise(base: Fault | None, overrides: list[HTTPFault], context: FilterContext) -> Fault | None:
    """The filter for a route: the most specific override, whole."""
    return compile(overrides[-1], context)


def _active_faults(context: FilterContext) -> tuple[shared.Counter | shared.LocalCounter, int]:
    """The count that `max_active_faults` limits: one for all fault filters under a stat prefix, those of routes included, as it is one gauge."""
    common = context.context.shared
    key = ("active faults", context.stat_prefix)
    found = common.get(key)
    if found is None:
        found = common[key] = shared.counter_for(context.context, b"fault:" + context.stat_prefix.encode())
    return found


def _part(proto: HTTPFault, field: str, cls: Callable[[Any, str, FilterContext], Any], key: str, context: FilterContext) -> Any:
    if not proto.HasField(field):
        return None
    with errors.under(field):
        part = cls(getattr(proto, field), key, context)
    return None if part.percentage.never else part


def _key(cluster: str | None, rest: str) -> str | None:
    return None if cluster is None else f"fault.http.{cluster}.{rest}"
