"""Retries: whether a failed try may be repeated, when, and on which host.

Everything here decides; nothing waits or sends. `RetryPolicy` is the compiled configuration, `RetryState` what one request has left of it. Decisions and
their order are those of Envoy's retry_state_impl.cc; back-off is what its code does (`random % next`), which differs from its documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.durations import milliseconds, seconds, seconds_of
from meshproxy.api.errors import fail, under
from meshproxy.api.matchers import HeaderPredicate, compile_header, parse_int64
from meshproxy.http import retry_hosts

if TYPE_CHECKING:
    import random

    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
    from meshproxy.http.routes import Route
    from meshproxy.upstream.host import Host

_P = "envoy.config.route.v3.RetryPolicy"
HONOURS = {
    **retry_hosts.HONOURS,
    _P: (
        "retry_on num_retries per_try_timeout per_try_idle_timeout retry_priority retry_host_predicate host_selection_retry_max_attempts"
        " retriable_status_codes retry_back_off rate_limited_retry_back_off retriable_headers retriable_request_headers"
    ),
    f"{_P}.RetryPriority": "name typed_config",
    f"{_P}.RetryHostPredicate": "name typed_config",
    f"{_P}.RetryBackOff": "base_interval max_interval",
    f"{_P}.RateLimitedRetryBackOff": "reset_headers max_interval",
    f"{_P}.ResetHeader": "name format",
    "envoy.config.route.v3.HedgePolicy": "hedge_on_per_try_timeout",
}

_OWN_RETRY_ON = "5xx,gateway-error,connect-failure,reset"  # of requests of our own

# What a decision can be.
NO, RETRY, NO_OVERFLOW, NO_LIMIT = range(4)

# Conditions of `retry_on`, as bits.
(
    ON_5XX, ON_GATEWAY_ERROR, ON_CONNECT_FAILURE, ON_ENVOY_RATELIMITED, ON_RETRIABLE_4XX, ON_REFUSED_STREAM, ON_RETRIABLE_STATUS_CODES, ON_RETRIABLE_HEADERS,
    ON_RESET, ON_RESET_BEFORE_REQUEST, ON_HTTP3_POST_CONNECT_FAILURE, ON_CANCELLED, ON_DEADLINE_EXCEEDED, ON_RESOURCE_EXHAUSTED, ON_UNAVAILABLE, ON_INTERNAL,
) = (1 << bit for bit in range(16))  # fmt: skip

_HTTP_CONDITIONS = {
    "5xx": ON_5XX,
    "gateway-error": ON_GATEWAY_ERROR,
    "connect-failure": ON_CONNECT_FAILURE,
    "envoy-ratelimited": ON_ENVOY_RATELIMITED,
    "retriable-4xx": ON_RETRIABLE_4XX,
    "refused-stream": ON_REFUSED_STREAM,
    "retriable-status-codes": ON_RETRIABLE_STATUS_CODES,
    "retriable-headers": ON_RETRIABLE_HEADERS,
    "reset": ON_RESET,
    "reset-before-request": ON_RESET_BEFORE_REQUEST,
    "http3-post-connect-failure": ON_HTTP3_POST_CONNECT_FAILURE,
}
_GRPC_CONDITIONS = {
    "cancelled": ON_CANCELLED,
    "deadline-exceeded": ON_DEADLINE_EXCEEDED,
    "resource-exhausted": ON_RESOURCE_EXHAUSTED,
    "unavailable": ON_UNAVAILABLE,
    "internal": ON_INTERNAL,
}
_ON_GRPC_STATUS = {1: ON_CANCELLED, 4: ON_DEADLINE_EXCEEDED, 8: ON_RESOURCE_EXHAUSTED, 13: ON_INTERNAL, 14: ON_UNAVAILABLE}
_ON_ANY_GRPC = ON_CANCELLED | ON_DEADLINE_EXCEEDED | ON_RESOURCE_EXHAUSTED | ON_UNAVAILABLE | ON_INTERNAL

# Reset reasons, as the upstream names them (upstream.pool).
_OVERFLOW = "overflow"
_CONNECT_FAILURES = frozenset(("remote connection failure", "local connection failure", "connection timeout"))
_REFUSED = "remote refused stream reset"

_DEFAULT_BASE_MS = 25  # runtime key upstream.base_retry_backoff_ms
_DEFAULT_RESET_MAX_MS = 300_000
_UNIX_TIMESTAMP = 1  # RetryPolicy.ResetHeaderFormat

ATTEMPT_COUNT = b"x-envoy-attempt-count"  # how often a request was tried, where a virtual host tells it
# What conditions look at in responses of any status. Few have one of them.
RESPONSE_HEADERS = frozenset((b"grpc-status", b"x-envoy-ratelimited"))
REQUEST_HEADERS = frozenset(
    (
        b"x-envoy-retry-on",
        b"x-envoy-retry-grpc-on",
        b"x-envoy-max-retries",
        b"x-envoy-hedge-on-per-try-timeout",
        b"x-envoy-retriable-header-names",
        b"x-envoy-retriable-status-codes",
        b"x-envoy-upstream-rq-per-try-timeout-ms",
    )
)


def parse_retry_on(text: str) -> tuple[int, bool]:
    """HTTP conditions, separated by commas -> their bits, and whether every name was one of them."""
    return _parse(text, _HTTP_CONDITIONS)


def parse_retry_grpc_on(text: str) -> tuple[int, bool]:
    """The same for gRPC conditions."""
    return _parse(text, _GRPC_CONDITIONS)


def _parse(text: str, conditions: dict[str, int]) -> tuple[int, bool]:
    bits, valid = 0, True
    for name in text.split(","):
        name = name.strip()
        if name:
            bit = conditions.get(name, 0)
            bits |= bit
            valid = valid and bit != 0
    return bits, valid


class RetryPolicy:
    """A compiled `RetryPolicy`. Times are milliseconds where the name says so, else seconds."""

    __slots__ = (
        "base_interval_ms",
        "from_status",
        "host_attempts",
        "host_predicates",
        "max_interval_ms",
        "num_retries",
        "per_try_idle_timeout",
        "per_try_timeout",
        "priority_update_frequency",
        "request_headers",
        "reset_headers",
        "reset_max_interval_ms",
        "response_headers",
        "retry_on",
        "status_codes",
    )

    def __init__(self) -> None:
        """The policy of a route that has none: it retries nothing until a request's headers ask for it."""
        self.retry_on = 0
        self.from_status = 400  # responses below are never retried, unless they have one of RESPONSE_HEADERS
        self.num_retries = 1
        self.per_try_timeout = 0.0  # 0: none
        self.per_try_idle_timeout = 0.0
        self.base_interval_ms: int | None = None  # None: the runtime's, or 25
        self.max_interval_ms: int | None = None  # None: 10 x base
        self.status_codes: frozenset[int] = frozenset()
        self.response_headers: tuple[HeaderPredicate, ...] = ()  # retriable_headers
        self.request_headers: tuple[HeaderPredicate, ...] = ()  # retriable_request_headers
        self.reset_headers: tuple[tuple[bytes, bool], ...] = ()  # name, and whether it holds a Unix time
        self.reset_max_interval_ms = _DEFAULT_RESET_MAX_MS
        self.host_predicates: tuple[retry_hosts.Predicate, ...] = ()
        self.host_attempts = 1
        self.priority_update_frequency = 0  # previous_priorities; 0: not configured


NO_POLICY = RetryPolicy()


def compile_retry_policy(proto: route_components_pb2.RetryPolicy, runtime: Any = None) -> RetryPolicy:
    """Raises ConfigError with paths relative to the policy."""
    policy = RetryPolicy()
    # Unknown conditions are ignored, as in Envoy: a control plane may know more than we do.
    policy.retry_on = parse_retry_on(proto.retry_on)[0] | parse_retry_grpc_on(proto.retry_on)[0]
    if proto.HasField("num_retries"):
        policy.num_retries = proto.num_retries.value
    policy.per_try_timeout = milliseconds(proto.per_try_timeout) / 1000
    policy.per_try_idle_timeout = milliseconds(proto.per_try_idle_timeout) / 1000
    policy.status_codes = frozenset(proto.retriable_status_codes)
    policy.response_headers = _matchers(proto.retriable_headers, "retriable_headers", runtime)
    policy.request_headers = _matchers(proto.retriable_request_headers, "retriable_request_headers", runtime)
    policy.host_attempts = proto.host_selection_retry_max_attempts or 1
    policy.host_predicates = retry_hosts.compile_predicates(proto.retry_host_predicate)
    if proto.HasField("retry_priority"):
        with under("retry_priority.typed_config"):
            policy.priority_update_frequency = retry_hosts.compile_priority(proto.retry_priority.typed_config)
    if policy.retry_on & ON_RETRIABLE_HEADERS:
        policy.from_status = 0
    elif policy.retry_on & ON_RETRIABLE_STATUS_CODES:
        policy.from_status = min(400, *policy.status_codes, 400)
    _compile_back_off(proto, policy)
    return policy


def _matchers(protos: Any, name: str, runtime: Any) -> tuple[HeaderPredicate, ...]:
    tests = []
    for index, proto in enumerate(protos):
        with under(f"{name}[{index}]"):
            tests.append(compile_header(proto, runtime))
    return tuple(tests)


def _compile_back_off(proto: route_components_pb2.RetryPolicy, policy: RetryPolicy) -> None:
    if proto.HasField("retry_back_off"):
        back_off = proto.retry_back_off
        policy.base_interval_ms = max(milliseconds(back_off.base_interval), 1)
        if back_off.HasField("max_interval"):
            policy.max_interval_ms = max(milliseconds(back_off.max_interval), 1)
            if policy.max_interval_ms < policy.base_interval_ms:
                fail("retry_back_off.max_interval", "retry_policy.max_interval must greater than or equal to the base_interval")
    if proto.HasField("rate_limited_retry_back_off"):
        limited = proto.rate_limited_retry_back_off
        policy.reset_headers = tuple((header.name.lower().encode(), header.format == _UNIX_TIMESTAMP) for header in limited.reset_headers)
        if limited.HasField("max_interval"):
            policy.reset_max_interval_ms = max(milliseconds(limited.max_interval), 1)


def start(route: Route, head: RequestHead, cluster: Any, random: random.Random, runtime: Any = None) -> RetryState | None:
    """The retry state of a request, from its route's policy and its own headers, which are consumed; None when nothing can be retried.

    `cluster` gives `limits`, `stats` and `context.wall`. `runtime` keys: upstream.base_retry_backoff_ms, upstream.use_retry.
    """
    policy = route.retry or NO_POLICY
    plain = b"x-envoy-retry-on" not in head  # the first look-up builds the index
    plain = plain and REQUEST_HEADERS.isdisjoint(head._index or ())
    if plain:
        return RetryState(policy, cluster, route.priority, random, runtime, head) if policy.retry_on else None
    state = None
    asked = head.get(b"x-envoy-retry-on"), head.get(b"x-envoy-retry-grpc-on")
    if policy.retry_on or asked != (None, None):
        state = RetryState(policy, cluster, route.priority, random, runtime, head)
        state.apply_headers(head)
    for name in REQUEST_HEADERS:
        head.remove(name)
    return state


def hedges(route: Route, head: RequestHead) -> bool:
    """Whether a per-try timeout starts another try and lets the slow one go on: the route's hedge policy, or the request's header."""
    asked = head.get(b"x-envoy-hedge-on-per-try-timeout")
    if asked is None:
        return route.hedge_on_per_try_timeout
    return True if asked == b"true" else False if asked == b"false" else route.hedge_on_per_try_timeout


class RetryState:
    """The retries of one request. Counts them in the cluster's statistics and holds its place in the cluster's retry limit until `finish`."""

    __slots__ = (
        "_active",
        "_cluster",
        "_limits",
        "_max_interval",
        "_next_interval",
        "_policy",
        "_random",
        "_rate_limit_ms",
        "_runtime",
        "_stats",
        "_tried",
        "left",
        "response_headers",
        "retry_on",
        "status_codes",
    )

    def __init__(self, policy: RetryPolicy, cluster: Any, priority: int, random: random.Random, runtime: Any = None, head: RequestHead | None = None) -> None:
        self._policy = policy
        self._cluster = cluster
        self._limits = cluster.limits[priority]
        self._stats = cluster.stats
        self._random = random
        self._runtime = runtime
        self._next_interval = 0  # set by the first back-off
        self._max_interval = 0
        self._rate_limit_ms = 0  # what a response asked for
        self._active = False  # a retry is under way and counted in the limits
        self._tried: list[Host] = []
        self.left = policy.num_retries
        self.retry_on = policy.retry_on
        self.status_codes = policy.status_codes
        self.response_headers = policy.response_headers
        if policy.request_headers and head is not None and not any(test(head) for test in policy.request_headers):
            self.retry_on = 0

    def apply_headers(self, head: RequestHead) -> None:
        """Merge in what the request's `x-envoy-*` headers ask for."""
        text = head.get(b"x-envoy-retry-on")
        if text is not None:
            self.retry_on |= parse_retry_on(text.decode("latin-1"))[0]
        text = head.get(b"x-envoy-retry-grpc-on")
        if text is not None:
            self.retry_on |= parse_retry_grpc_on(text.decode("latin-1"))[0]
        policy = self._policy
        if policy.request_headers and not any(test(head) for test in policy.request_headers):
            self.retry_on = 0
        number = _unsigned(head.get(b"x-envoy-max-retries"))
        if number is not None and self.retry_on:
            self.left = number
        text = head.get(b"x-envoy-retriable-status-codes")
        if text is not None:
            codes = (_unsigned(code) for code in text.split(b","))
            self.status_codes = self.status_codes.union(code for code in codes if code is not None)
        text = head.get(b"x-envoy-retriable-header-names")
        if text is not None:
            names = (name.strip().lower() for name in text.split(b","))
            self.response_headers = (*self.response_headers, *(_presence(name) for name in names if name))

    # -- decisions

    def should_retry_headers(self, head: ResponseHead) -> int:
        """The decision after a response's head."""
        wanted = self.would_retry_headers(head)
        if wanted and self._policy.reset_headers:
            self._rate_limit_ms = self._reset_interval(head)
        return self._decide(wanted)

    def would_retry_headers(self, head: ResponseHead) -> bool:
        """Whether a response is one to retry, limits aside."""
        on = self.retry_on
        if not on:
            return False
        if head.get(b"x-envoy-ratelimited") is not None:
            # An Envoy upstream limited this request: trying again makes it worse, unless that is what was asked for.
            return on & ON_ENVOY_RATELIMITED != 0
        status = head.status
        if on & ON_5XX and 500 <= status < 600:
            return True
        if on & ON_GATEWAY_ERROR and 502 <= status <= 504:
            return True
        if on & ON_RETRIABLE_4XX and status == 409:
            return True
        if on & ON_RETRIABLE_STATUS_CODES and status in self.status_codes:
            return True
        if on & ON_RETRIABLE_HEADERS and any(test(head) for test in self.response_headers):
            return True
        if on & _ON_ANY_GRPC:
            # Only a status in the headers counts: trailers come when the response has been passed on.
            grpc_status = _unsigned(head.get(b"grpc-status"))
            return grpc_status is not None and on & _ON_GRPC_STATUS.get(grpc_status, 0) != 0
        return False

    def should_retry_reset(self, reason: str, request_sent: bool) -> int:
        """The decision after a try that ended without a response. `request_sent`: some of the request went upstream."""
        return self._decide(self.would_retry_reset(reason, request_sent))

    def would_retry_reset(self, reason: str, request_sent: bool) -> bool:
        """Whether a reset is one to retry, limits aside."""
        on = self.retry_on
        if reason == _OVERFLOW:
            return False
        if on & ON_CONNECT_FAILURE and reason in _CONNECT_FAILURES:
            return True
        if on & ON_RESET_BEFORE_REQUEST and not request_sent:
            return True
        if on & (ON_RESET | ON_5XX | ON_GATEWAY_ERROR):
            return True
        return on & ON_REFUSED_STREAM != 0 and reason == _REFUSED

    def should_hedge(self) -> int:
        """The decision after a per-try timeout with hedging: whatever `retry_on` says, as long as retries are left."""
        return self._decide(True)

    def _decide(self, wanted: bool) -> int:
        stats = self._stats
        if self._active:
            if not wanted:
                stats.upstream_rq_retry_success.n += 1
            self._release()
        if not wanted:
            return NO
        if self.left == 0:
            stats.upstream_rq_retry_limit_exceeded.n += 1
            return NO_LIMIT
        self.left -= 1
        if not self._limits.can_retry():
            stats.upstream_rq_retry_overflow.n += 1
            return NO_OVERFLOW
        if self._runtime is not None and not self._enabled_by_runtime():
            return NO
        self._active = True
        self._limits.retries += 1
        stats.upstream_rq_retry.n += 1
        return RETRY

    def _enabled_by_runtime(self) -> bool:
        numerator, denominator = self._runtime.fraction("upstream.use_retry", (100, 100))
        return numerator >= denominator or self._random.getrandbits(64) % denominator < numerator

    def _release(self) -> None:
        self._active = False
        self._limits.retries -= 1

    def finish(self) -> None:
        """The request is over: give the place in the retry limit back."""
        if self._active:
            self._release()

    # -- when

    def backoff(self) -> float:
        """Seconds to wait before the retry that was just decided."""
        limited = self._rate_limit_ms
        if limited > 1:
            # What the upstream asked for, plus up to half of it.
            self._rate_limit_ms = 0
            self._stats.upstream_rq_retry_backoff_ratelimited.n += 1
            return (self._random.getrandbits(64) % (limited >> 1) + limited) / 1000
        self._stats.upstream_rq_retry_backoff_exponential.n += 1
        interval = self._next_interval
        if not interval:
            interval = self._first_interval()
        self._next_interval = min(interval * 2, self._max_interval)
        return self._random.getrandbits(64) % interval / 1000

    def _first_interval(self) -> int:
        policy = self._policy
        base = policy.base_interval_ms
        if base is None:
            base = _DEFAULT_BASE_MS
            if self._runtime is not None:
                base = self._runtime.integer("upstream.base_retry_backoff_ms", base) or 1
        self._max_interval = base * 10 if policy.max_interval_ms is None else policy.max_interval_ms
        return base

    def _reset_interval(self, head: ResponseHead) -> int:
        """Milliseconds that the response's rate limit headers ask to wait; 0 for none, or none that is within the maximum."""
        for name, is_time in self._policy.reset_headers:
            seconds = _unsigned(head.get(name))
            if seconds is None:
                continue
            if is_time:
                seconds -= int(self._cluster.context.wall())
                if seconds < 0:
                    continue
            if seconds * 1000 <= self._policy.reset_max_interval_ms:
                return seconds * 1000
        return 0

    # -- where

    def on_host_attempted(self, host: Host) -> None:
        """A try went to `host`: host predicates and the priority's choice look at it."""
        self._tried.append(host)

    def pick(self, cluster: Any, context: Any) -> Host | None:
        """Choose the host of the next try: as the balancer picks, again for as often as the policy allows while a predicate rejects it."""
        policy = self._policy
        tried = self._tried
        context.tried = tried
        if policy.priority_update_frequency and context.priority_load is None:
            context.priority_load = retry_hosts.PreviousPriorities(policy.priority_update_frequency, tried)
        context.attempt = 0
        host: Host | None = cluster.pick(context)
        if not policy.host_predicates:
            return host
        for attempt in range(1, policy.host_attempts + 1):
            if host is None or not any(rejects(host, tried) for rejects in policy.host_predicates):
                break
            context.attempt = attempt
            host = cluster.pick(context)
        return host


def compile_core_policy(proto: Any, runtime: Any) -> RetryPolicy:
    """A core.v3.RetryPolicy, of requests of our own, as the policy of a route."""
    from meshproxy.api import messages

    route = messages.known("envoy.config.route.v3.RetryPolicy")()
    route.retry_on = proto.retry_on or _OWN_RETRY_ON
    if proto.HasField("num_retries"):
        route.num_retries.value = proto.num_retries.value
    base = 1.0
    if proto.HasField("retry_back_off"):
        back_off = proto.retry_back_off
        base = seconds(back_off.base_interval)
        if base < 0.001:
            fail("retry_back_off.base_interval", "must be at least 1ms")
        if back_off.HasField("max_interval") and seconds(back_off.max_interval) < base:
            fail("retry_back_off.max_interval", "must not be less than base_interval")
    maximum = seconds_of(proto.retry_back_off, "max_interval", 10 * base)
    route.retry_back_off.base_interval.FromNanoseconds(round(base * 1e9))
    route.retry_back_off.max_interval.FromNanoseconds(round(maximum * 1e9))
    route.per_try_timeout.CopyFrom(route.retry_back_off.max_interval)  # as in Envoy, for no reason that it gives
    return compile_retry_policy(route, runtime)


def _unsigned(text: bytes | None) -> int | None:
    if text is None:
        return None
    number = parse_int64(text)
    return number if number is not None and number >= 0 else None


def _presence(name: bytes) -> Callable[[Headers], bool]:
    return lambda head: head.get(name) is not None
