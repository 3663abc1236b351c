"""Limits requests by token buckets of this proxy alone (envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit).

A request takes a token from the bucket of each configured descriptor that it has, the slowest first, and from the default bucket. Descriptors come from
the filter's own `rate_limits`, or else from the `rate_limits` of the route and its virtual host. A descriptor entry configured without value stands for
every value: each gets a bucket of its own, `max_dynamic_descriptors` (20) at most, the longest unused goes first.

Buckets are those of `net.token_bucket`. With several workers they are shared by content: routes whose configurations are equal in every field, stat_prefix
included, share their buckets then, while with one worker each has its own. Buckets of a connection (`local_rate_limit_per_downstream_connection`) need no
sharing; those of single wildcard values are split among the workers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, runtime
from meshproxy.codec.headers import Headers
from meshproxy.http import header_mutations, rate_limits
from meshproxy.http.rate_limits import Descriptor, Entry, RateLimitPolicy
from meshproxy.http.replies import Reply
from meshproxy.net import token_bucket
from meshproxy.net.token_bucket import TokenBucket
from meshproxy.observe import flags

if TYPE_CHECKING:
    from envoy.extensions.filters.http.local_ratelimit.v3.local_rate_limit_pb2 import LocalRateLimit as LocalRateLimitProto

    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"
ROUTE_TYPE_URLS = (TYPE_URL,)
HONOURS = {
    "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit": (
        "stat_prefix status token_bucket filter_enabled filter_enforced request_headers_to_add_when_not_enforced response_headers_to_add descriptors stage "
        "local_rate_limit_per_downstream_connection enable_x_ratelimit_headers vh_rate_limits always_consume_default_token_bucket "
        "rate_limited_as_resource_exhausted rate_limits max_dynamic_descriptors"
    ),
    "envoy.extensions.common.ratelimit.v3.LocalRateLimitDescriptor": "entries token_bucket",
    "envoy.extensions.common.ratelimit.v3.RateLimitDescriptor.Entry": "key value",
    "envoy.type.v3.TokenBucket": "max_tokens tokens_per_fill fill_interval",
    "envoy.type.v3.HttpStatus": "code",
    **rate_limits.HONOURS,
    **header_mutations.HONOURS,
}

_STATS = ("enabled", "enforced", "rate_limited", "ok", "shadow_mode")
_PER_CONNECTION = "per_connection_local_rate_limiter"  # key of the connection's filter state, as in Envoy
_RESOURCE_EXHAUSTED = 8
_OVERRIDE, _INCLUDE, _IGNORE = range(3)  # envoy.extensions.common.ratelimit.v3.VhRateLimitsOptions
_DRAFT_VERSION_03 = 1
_MAX_ROUTES = 10_000  # remembered overrides; more only come from routes that were replaced over and over

MakeBucket = Callable[[Any, bytes], TokenBucket]


class Wildcard:
    """A configured descriptor with empty values: a bucket for each combination of values that requests have."""

    __slots__ = ("_buckets", "_capacity", "_make", "entries")

    def __init__(self, entries: tuple[Entry, ...], make: Callable[[], TokenBucket], capacity: int) -> None:
        self.entries = entries
        self._make = make
        self._capacity = capacity
        self._buckets: OrderedDict[tuple[Entry, ...], TokenBucket] = OrderedDict()

    def matches(self, entries: tuple[Entry, ...]) -> bool:
        return len(entries) == len(self.entries) and all(
            key == wanted and (not allowed or value == allowed) for (key, value), (wanted, allowed) in zip(entries, self.entries, strict=True)
        )

    def bucket(self, entries: tuple[Entry, ...]) -> TokenBucket:
        bucket = self._buckets.get(entries)
        if bucket is None:
            bucket = self._buckets[entries] = self._make()
            if len(self._buckets) > self._capacity:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(entries)
        return bucket


class Limiter:
    """The buckets of one configuration, or of one connection under it. Raises ConfigError for buckets that cannot be."""

    __slots__ = ("_always_default", "_fixed", "_wildcards", "default")

    def __init__(self, proto: LocalRateLimitProto, make: MakeBucket) -> None:
        self.default: TokenBucket | None = None
        if proto.HasField("token_bucket"):
            with errors.under("token_bucket"):
                self.default = make(proto.token_bucket, b"default")
        self._always_default = proto.always_consume_default_token_bucket.value if proto.HasField("always_consume_default_token_bucket") else True
        self._fixed: dict[tuple[Entry, ...], TokenBucket] = {}
        self._wildcards: list[Wildcard] = []
        capacity = proto.max_dynamic_descriptors.value if proto.HasField("max_dynamic_descriptors") else 20
        for index, descriptor in enumerate(proto.descriptors):
            with errors.under(f"descriptors[{index}]"):
                self._add(descriptor, make, capacity)

    def _add(self, proto: Any, make: MakeBucket, capacity: int) -> None:
        entries = tuple((entry.key.encode(), entry.value.encode()) for entry in proto.entries)
        if entries in self._fixed or any(wildcard.entries == entries for wildcard in self._wildcards):
            errors.fail("", "duplicate descriptor in the local rate descriptor")
        with errors.under("token_bucket"):
            token_bucket.parse_bucket(proto.token_bucket)
        if all(value for _, value in entries):
            self._fixed[entries] = make(proto.token_bucket, repr(entries).encode())
        else:
            self._wildcards.append(Wildcard(entries, lambda: make(proto.token_bucket, b""), capacity))

    def check(self, descriptors: Sequence[Descriptor]) -> tuple[bool, TokenBucket | None]:
        """Take the tokens of a request: (whether they were there, the bucket that tells the client how it stands)."""
        matched = [(bucket, hits) for entries, hits in descriptors if (bucket := self._bucket(entries)) is not None]
        if len(matched) > 1:
            matched.sort(key=lambda pair: pair[0].fill_rate)
        for bucket, hits in matched:
            if hits == 0 or not bucket.consume(1 if hits is None else hits):  # who takes nothing counts as one who got nothing
                return False, bucket
        first = matched[0][0] if matched else None
        default = self.default
        if default is not None and (first is None or self._always_default):
            if not default.consume():
                return False, default
            return True, first or default
        return True, first

    def _bucket(self, entries: tuple[Entry, ...]) -> TokenBucket | None:
        bucket = self._fixed.get(entries)
        if bucket is None:
            for wildcard in self._wildcards:
                if wildcard.matches(entries):
                    return wildcard.bucket(entries)
        return bucket


class Base:
    """The filter as configured, without hooks of its own where nothing is limited, and the filters of routes made for it so far."""

    def __init__(self) -> None:
        self.name = "envoy.filters.http.local_ratelimit"
        # id of a route's configuration -> (the configuration itself, so that the id stays its own, the filter): routes under one virtual host must share.
        self.routes: dict[int, tuple[Any, Any]] = {}


class LocalRateLimit(Base):
    """The filter with something to limit."""

    def __init__(self, proto: LocalRateLimitProto, enabled: Callable[[], bool] | bool, context: FilterContext) -> None:
        super().__init__()
        self._proto = proto
        self._context = context
        self._enabled = enabled
        with errors.under("filter_enforced"):
            enforced = proto.filter_enforced if proto.HasField("filter_enforced") else None
            self._enforced = runtime.compile_fraction(enforced, context.runtime, context.random, default=False)
        identity = b"http:%b:%b:" % (context.stat_prefix.encode(), proto.SerializeToString(deterministic=True))
        self._limiter = Limiter(proto, lambda bucket, key: token_bucket.compile_bucket(bucket, context.context, key and identity + key))
        self._per_connection = proto.local_rate_limit_per_downstream_connection
        with errors.under("rate_limits"):
            self._policy = RateLimitPolicy(proto.rate_limits, context.context, of_filter=True) if proto.rate_limits else None
        self._has_descriptors = bool(proto.descriptors)
        self._stage = proto.stage
        self._vh_rate_limits = proto.vh_rate_limits
        self._route_policies: dict[int, tuple[Any, RateLimitPolicy]] = {}
        self._status = proto.status.code if proto.status.code >= 400 else 429
        self._grpc_status = _RESOURCE_EXHAUSTED if proto.rate_limited_as_resource_exhausted else None
        self._response_headers = header_mutations.compile_mutation(proto.response_headers_to_add, (), "response_headers", request=False)
        self._request_headers = header_mutations.compile_mutation(proto.request_headers_to_add_when_not_enforced, (), "request_headers", request=True)
        self._reply = self._make_reply(())
        self._stats = {name: _scope(proto, context).counter(name) for name in _STATS}
        default = self._limiter.default
        if enabled is True and default is not None and not self._has_descriptors and not self._per_connection and not proto.enable_x_ratelimit_headers:
            self.request_headers = self._only_default(default)  # type: ignore[method-assign]
            if self._request_headers is None:  # it looks at no request
                self.request_headers_repeated = self.request_headers_varying = self.request_headers

    def _only_default(self, bucket: TokenBucket) -> Callable[..., Reply | None]:
        """The hook where all requests take from one bucket."""
        enabled, ok = self._stats["enabled"], self._stats["ok"]
        take, refuse = bucket.taker(), self._over

        def request_headers(stream: Any, end_stream: bool = True) -> Reply | None:
            # HOT
            enabled.n += 1
            if take():
                ok.n += 1
                return None
            return refuse(stream)

        return request_headers

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | None:
        enabled = self._enabled
        if enabled is not True and not enabled():  # type: ignore[operator]  # never False: then there is no such filter
            return None
        stats = self._stats
        stats["enabled"].n += 1
        limiter = self._of_connection(stream) if self._per_connection else self._limiter
        allowed, bucket = limiter.check(self._descriptors(stream) if self._has_descriptors else ())
        self._remember(stream, bucket)
        if allowed:
            stats["ok"].n += 1
            return None
        return self._over(stream)

    def _over(self, stream: Any) -> Reply | None:
        """No tokens are left."""
        stats = self._stats
        stats["rate_limited"].n += 1
        enforced = self._enforced
        if not (enforced if isinstance(enforced, bool) else enforced()):
            if self._request_headers is not None:
                self._request_headers(stream, stream.request)
            return None
        stats["enforced"].n += 1
        if self._response_headers is None:
            return self._reply
        headers = Headers()
        self._response_headers(stream, headers)
        return self._make_reply(tuple(headers.items))

    def _remember(self, stream: Any, bucket: TokenBucket | None) -> None:
        """Keep what the response hook needs: nothing here."""

    def _make_reply(self, headers: tuple[tuple[bytes, bytes], ...]) -> Reply:
        return Reply(self._status, b"local_rate_limited", details="local_rate_limited", flag=flags.RL, headers=headers, grpc_status=self._grpc_status)

    def _of_connection(self, stream: Any) -> Limiter:
        connection = stream.connection
        if connection.filter_state is None:
            connection.filter_state = {}
        limiter = connection.filter_state.get(_PER_CONNECTION)
        if limiter is None:
            clock = self._context.clock
            limiter = Limiter(self._proto, lambda bucket, _: TokenBucket(*token_bucket.parse_bucket(bucket), clock))
            connection.filter_state[_PER_CONNECTION] = limiter
        return limiter

    def _descriptors(self, stream: Any) -> list[Descriptor]:
        if self._policy is not None:
            return self._policy.descriptors(stream)
        route = stream.route
        if route is None or route.action != "forward":
            return []
        own = getattr(route, "rate_limits", ())
        descriptors = self._of_route(own).descriptors(stream, self._stage) if own else []
        option = _INCLUDE if getattr(route, "include_vh_rate_limits", False) else self._vh_rate_limits
        if option == _INCLUDE or (option == _OVERRIDE and not own):
            general = getattr(route.virtual_host, "rate_limits", ())
            if general:
                descriptors += self._of_route(general).descriptors(stream, self._stage)
        return descriptors

    def _of_route(self, protos: Any) -> RateLimitPolicy:
        known = self._route_policies.get(id(protos))
        if known is None:
            if len(self._route_policies) >= _MAX_ROUTES:
                self._route_policies.clear()
            known = self._route_policies[id(protos)] = protos, RateLimitPolicy(protos, self._context.context)
        return known[1]


class TellingLocalRateLimit(LocalRateLimit):
    """The filter with x-ratelimit headers on every response."""

    def _remember(self, stream: Any, bucket: TokenBucket | None) -> None:
        if bucket is not None:
            stream.locals[self] = bucket

    def response_headers(self, stream: Any, end_stream: bool) -> None:
        bucket = stream.locals.get(self)
        if bucket is not None:
            response = stream.response
            response.add(b"x-ratelimit-limit", b"%d" % bucket.max_tokens)
            response.add(b"x-ratelimit-remaining", b"%d" % max(0, bucket.remaining()))
            response.add(b"x-ratelimit-reset", b"%d" % math.ceil(bucket.next_token()))


def compile(proto: LocalRateLimitProto, context: FilterContext) -> Base:
    """The filter for a LocalRateLimit proto. Raises ConfigError."""
    if not proto.stat_prefix:
        errors.fail("stat_prefix", "must not be empty")
    _scope(proto, context).declare("counter", _STATS)
    with errors.under("filter_enabled"):
        fraction = proto.filter_enabled if proto.HasField("filter_enabled") else None
        enabled = runtime.compile_fraction(fraction, context.runtime, context.random, default=False)
    cls = TellingLocalRateLimit if proto.enable_x_ratelimit_headers == _DRAFT_VERSION_03 else LocalRateLimit
    compiled = cls(proto, enabled, context)  # also when nothing is limited: its errors are errors
    return Base() if enabled is False else compiled


def specialise(base: Base | None, overrides: list[LocalRateLimitProto], context: FilterContext) -> Base:
    """The filter for a route: the most specific override, whole; one filter for all routes that share that override."""
    override = overrides[-1]
    assert base is not None
    known = base.routes.get(id(override))
    if known is None:
        if not override.HasField("token_bucket"):
            errors.fail("token_bucket", "must be set in a configuration of a route or virtual host")
        if len(base.routes) >= _MAX_ROUTES:
            base.routes.clear()
        known = base.routes[id(override)] = override, compile(override, context)
    return known[1]


def _scope(proto: LocalRateLimitProto, context: FilterContext) -> Any:
    return context.scope.store.scope(f"{proto.stat_prefix}.http_local_rate_limit.")
