"""What the gRPC filters share: of which cluster, service and method a request is, and the statistics that are kept of these.

The names are those of Envoy's Grpc::Context: `cluster.<name>.grpc.<service>.<method>.<what>`, or without service and method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshproxy.http.filters import FilterContext
    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.cluster import Cluster

GRPC = "grpc."
GRPC_WEB = "grpc-web."


class Charges:
    """Where the statistics of a request go: made for each request, metrics are looked up when they are needed."""

    __slots__ = ("_prefix", "_scope")

    def __init__(self, cluster: Cluster, protocol: str, method: tuple[str, str] | None) -> None:
        """`protocol`: GRPC or GRPC_WEB. `method`: service and method, None: they are not told apart."""
        self._scope: Scope = cluster.stats.scope
        self._prefix = protocol if method is None else f"{protocol}{method[0]}.{method[1]}."

    def status(self, value: bytes | None) -> None:
        """A head or trailers with this `grpc-status`, if there is one."""
        if value is not None:
            self.count(value.decode("latin-1"))
            self.outcome(success=value == b"0")

    def outcome(self, *, success: bool) -> None:
        """The end of a request."""
        self.count("success" if success else "failure")
        self.count("total")

    def count(self, name: str, amount: int = 1) -> None:
        """Count something."""
        self._scope.counter(self._prefix + name).n += amount

    def time(self, seconds: float) -> None:
        """How long the upstream took to answer."""
        self._scope.histogram(self._prefix + "upstream_rq_time").record(int(seconds * 1000))


def cluster_of(stream: Any, context: FilterContext) -> Cluster | None:
    """The cluster that a stream's route names at present."""
    route = stream.route
    if route is None or route.action != "forward":
        return None
    return context.clusters.get(route.cluster_name)
