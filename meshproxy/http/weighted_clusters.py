"""Routes whose cluster is decided per request: weighted clusters, and clusters that a header names.

Every choice is a `Route` of its own, compiled or copied once: what forwards a request looks at one flat object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail
from meshproxy.api.matchers import parse_int64

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.context import Context
    from meshproxy.http.route import Route
    from meshproxy.observe.stream_info import StreamInfo

_P = "envoy.config.route.v3.WeightedCluster"
HONOURS = {
    _P: "clusters total_weight runtime_key_prefix header_name use_hash_policy",
    f"{_P}.ClusterWeight": (
        "name cluster_header weight metadata_match request_headers_to_add request_headers_to_remove response_headers_to_add response_headers_to_remove"
        " typed_per_filter_config host_rewrite_literal"
    ),
}

_MAX_WEIGHT = (1 << 32) - 1
_MAX_NAMES = 1 << 16  # clusters remembered for one cluster_header


def stable_random(context: Context) -> Callable[[StreamInfo], int]:
    """A function that draws a stream's random number (64 bits): the same one each time its route is resolved."""
    bits = context.random.getrandbits

    def draw(stream: StreamInfo) -> int:
        state = stream.__dict__
        value: int | None = state.get("stable_random")
        if value is None:
            value = state["stable_random"] = bits(64)
        return value

    return draw


class ByHeader:
    """The cluster that a request header names (its first value). Clusters that do not exist share one route, which is answered with 503."""

    __slots__ = ("_clusters", "_header", "_route", "_routes")

    def __init__(self, route: Route, header: str, clusters: Any) -> None:
        self._route = route
        route.select_cluster = self.name
        self._header = header.lower().encode()
        self._clusters = clusters
        self._routes: dict[bytes, Route] = {}

    def __call__(self, stream: StreamInfo) -> Route:
        name = self.name(stream)
        if not name:
            return self._route
        return self._routes.get(name) or self._add(name)

    def name(self, stream: StreamInfo) -> bytes | None:
        """Which one that is, whether it is there or not."""
        assert stream.request is not None
        return stream.request.get(self._header)

    def _add(self, name: bytes) -> Route:
        text = name.decode("utf-8", "surrogateescape")
        if self._clusters is not None and self._clusters.get(text) is None:
            # Clients choose the names: only clusters that exist may take memory.
            return self._route
        if len(self._routes) >= _MAX_NAMES:
            self._routes.clear()
        route = copy.copy(self._route)
        route.cluster_name = text
        self._routes[name] = route
        return route


class Weighted:
    """Weighted clusters; callable: the route for a stream."""

    __slots__ = ("_draw", "_entries", "_hash", "_header", "_keys", "_runtime", "_total")

    def __init__(
        self,
        proto: route_components_pb2.WeightedCluster,
        entries: list[tuple[int, Route]],
        context: Context,
        hash_policy: Any,
    ) -> None:
        """`entries`: weight and route of each cluster. Raises ConfigError with paths relative to the proto."""
        self._draw = stable_random(context)
        self._header = proto.header_name.lower().encode()
        self._hash = hash_policy.without_cookies if proto.use_hash_policy.value and hash_policy is not None else None
        self._runtime = context.runtime
        self._entries = entries
        self._keys: tuple[str, ...] | None = None
        if proto.runtime_key_prefix and context.runtime is not None:
            self._keys = tuple(f"{proto.runtime_key_prefix}.{cluster.name}" for cluster in proto.clusters)
        self._total = sum(weight for weight, _ in self._weights())
        if self._total > _MAX_WEIGHT:
            fail("clusters", f"The sum of weights of all weighted clusters exceeds {_MAX_WEIGHT}")
        if self._total == 0:
            fail("clusters", "Sum of weights in the weighted_cluster must be greater than 0.")
        if self._keys is not None and not context.runtime.mutable:
            self._entries, self._keys = self._weights(), None

    def _weights(self) -> list[tuple[int, Route]]:
        if self._keys is None:
            return self._entries
        integer = self._runtime.integer
        return [(integer(key, weight), route) for key, (weight, route) in zip(self._keys, self._entries, strict=True)]

    def __call__(self, stream: StreamInfo) -> Route:
        entries, total = self._entries, self._total
        if self._keys is not None:
            entries = self._weights()
            total = sum(weight for weight, _ in entries) or 1
        left = self._value(stream) % total
        chosen = entries[-1][1]
        for weight, route in entries:
            if left < weight:
                chosen = route
                break
            left -= weight
        return chosen if chosen.choose is None else chosen.choose(stream)

    def _value(self, stream: StreamInfo) -> int:
        if self._header:
            assert stream.request is not None
            values = stream.request.get_all(self._header)
            number = parse_uint64(values[0]) if len(values) == 1 else None
            if number is not None:
                return number
        elif self._hash is not None:
            value: int | None = self._hash(stream)
            if value is not None:
                return value
        return self._draw(stream)


def parse_uint64(text: bytes) -> int | None:
    """An unsigned whole number of up to 64 bits, as absl::SimpleAtoi reads it."""
    number = parse_int64(text)
    if number is not None:
        return number if number >= 0 else None
    digits = text.strip().removeprefix(b"+").lstrip(b"0")
    if len(digits) > 20 or not digits.isdigit():
        return None
    large = int(digits)
    return large if large < 1 << 64 else None
