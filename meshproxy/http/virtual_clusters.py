"""Virtual clusters: groups of requests, by header matchers, that get statistics of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail, under
from meshproxy.api.matchers import HeaderPredicate, compile_headers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from envoy.config.route.v3 import route_components_pb2

    from meshproxy.context import Context
    from meshproxy.observe.stream_info import StreamInfo

HONOURS = {"envoy.config.route.v3.VirtualCluster": "headers name"}

_OTHER = "other"


class VirtualClusters:
    """Those of one virtual host; callable: the name of a stream's virtual cluster, None when none matches (its statistics are those of `other`).

    Statistics: `vhost.<virtual host>.vcluster.<name>.upstream_rq_{total,completed,Nxx,NNN,...}`.
    """

    __slots__ = ("_counters", "_entries", "_prefix", "_responses", "_stats")

    def __init__(self, virtual_host: str, entries: list[tuple[str, HeaderPredicate]], stats: Any) -> None:
        self._entries = entries
        self._stats = stats
        self._prefix = f"vhost.{virtual_host}.vcluster."
        self._responses: dict[tuple[str, int], tuple[Any, ...]] = {}
        self._counters: dict[tuple[str, str], Any] = {}

    def __call__(self, stream: StreamInfo) -> str | None:
        head = stream.request
        assert head is not None
        for name, matches in self._entries:
            if matches(head):
                return name
        return None

    def charge(self, stream: StreamInfo, status: int) -> None:
        """Count a response."""
        key = self._name(stream), status
        counters = self._responses.get(key)
        if counters is None:
            scope = self._stats.scope(f"{self._prefix}{key[0]}.")
            names = ("upstream_rq_completed", f"upstream_rq_{status // 100}xx", f"upstream_rq_{status}")
            counters = self._responses[key] = tuple(scope.counter(name) for name in names)
        for counter in counters:
            counter.n += 1

    def count(self, stream: StreamInfo, what: str) -> None:
        """Count `upstream_rq_total` (a try), `upstream_rq_timeout`, `upstream_rq_retry` and the like."""
        key = self._name(stream), what
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._stats.scope(f"{self._prefix}{key[0]}.").counter(what)
        counter.n += 1

    def _name(self, stream: StreamInfo) -> str:
        """The stream's virtual cluster, decided once and noted for access logs."""
        known = stream.__dict__
        if "virtual_cluster_name" not in known:
            known["virtual_cluster_name"] = self(stream)
        return known["virtual_cluster_name"] or _OTHER


def compile_virtual_clusters(virtual_host: str, protos: Iterable[route_components_pb2.VirtualCluster], context: Context) -> VirtualClusters | None:
    """`virtual_clusters` of a virtual host; None when it has none. Raises ConfigError."""
    entries = []
    for index, proto in enumerate(protos):
        with under(f"virtual_clusters[{index}]"):
            if not proto.headers:
                fail("headers", "virtual clusters must define 'headers'")
            with under("headers"):
                matches = compile_headers(proto.headers, context.runtime)
            assert matches is not None
            entries.append((proto.name, matches))
    return VirtualClusters(virtual_host, entries, context.stats) if entries else None
