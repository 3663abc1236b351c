"""Who is at the other end, told by headers, as Istio's proxies do (io.istio.http.peer_metadata.Config, the filter `istio.metadata_exchange`).

Requests say who sends them, and responses who answers, if the request has said it. What was found out is left in `downstream_peer` and `upstream_peer` of the
stream for `istio_stats`. What others say of themselves goes no further than here.

All that the filter does to a head depends on that head alone: so it shapes the heads of lanes and plans when these are made (see `http.plan`), and costs a
request that goes by plan nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.http.grpc_context import cluster_of
from meshproxy.observe import peers
from meshproxy.observe.peers import HEADER, ID_HEADER

if TYPE_CHECKING:
    from meshproxy.codec.headers import Headers
    from meshproxy.http.filters import FilterContext
    from meshproxy.observe.peers import Peer

TYPE_URL = "type.googleapis.com/io.istio.http.peer_metadata.Config"
ROUTE_TYPE_URLS = ()
HONOURS = {
    "io.istio.http.peer_metadata.Config": "downstream_discovery upstream_discovery downstream_propagation upstream_propagation",
    # Workloads are only discovered by xDS where a bootstrap extension of Istio's is configured: without it, Envoy finds nobody either.
    "io.istio.http.peer_metadata.Config.DiscoveryMethod": "istio_headers workload_discovery",
    "io.istio.http.peer_metadata.Config.PropagationMethod": "istio_headers",
    "io.istio.http.peer_metadata.Config.IstioHeaders": "skip_external_clusters",
    "io.istio.http.peer_metadata.Config.WorkloadDiscovery": "",
}

SAID_ID, SAID_WHO = 1, 2  # what a request told of its sender
SAID_BOTH = SAID_ID | SAID_WHO


class PeerMetadata:
    """The filter. `_listens_to_requests` and so on: which of its four tasks it has."""

    __slots__ = ("_answers", "_asks", "_context", "_listens_to_requests", "_listens_to_responses", "_pairs", "_skips_external", "name")

    def __init__(self, proto: Any, context: FilterContext) -> None:
        node = context.context.node
        self._context = context
        self._listens_to_requests = any(one.HasField("istio_headers") for one in proto.downstream_discovery)
        self._listens_to_responses = any(one.HasField("istio_headers") for one in proto.upstream_discovery)
        self._answers = any(one.HasField("istio_headers") for one in proto.downstream_propagation)
        self._asks = any(one.HasField("istio_headers") for one in proto.upstream_propagation)
        self._skips_external = any(one.istio_headers.skip_external_clusters for one in (*proto.downstream_propagation, *proto.upstream_propagation))
        local = peers.of_local(node, context.listener)
        self._pairs = ((ID_HEADER, b"" if node is None else node.id.encode()), (HEADER, peers.to_header(local)))

    # -- the general way

    def request_headers(self, stream: Any, end_stream: bool) -> None:
        head = stream.request
        if self._answers:
            said = self.said(head)
            if said:
                stream.peer_said = said
        peer = self.shape_request(head, cluster_of(stream, self._context) if self._asks else None)
        if peer is not None:
            stream.downstream_peer = peer

    def response_headers(self, stream: Any, end_stream: bool) -> None:
        said = stream.peer_said
        if said and self.skips(cluster_of(stream, self._context)):
            said = 0
        peer = self.shape_response(stream.response, said)
        if peer is not None:
            stream.upstream_peer = peer

    # -- what it does to heads

    def said(self, head: Headers) -> int:
        """What a request tells of its sender; 0 where nobody wants to know."""
        if not self._answers:
            return 0
        return (SAID_ID if ID_HEADER in head else 0) | (SAID_WHO if HEADER in head else 0)

    def shape_request(self, head: Headers, cluster: Any) -> Peer | None:
        """Take from the head of a request what it says of its sender, and say who we are to `cluster`."""
        peer = self._take(head) if self._listens_to_requests else None
        if self._asks and not self.skips(cluster):
            for name, value in self._pairs:
                head.set(name, value)
        return peer

    def shape_response(self, head: Headers, said: int) -> Peer | None:
        """The same for that of a response. `said`: by its request."""
        peer = self._take(head) if self._listens_to_responses else None
        if said:
            for bit, (name, value) in zip((SAID_ID, SAID_WHO), self._pairs, strict=True):
                if said & bit:
                    head.set(name, value)
        return peer

    def skips(self, cluster: Any) -> bool:
        """Whether `cluster` is not told who we are."""
        if cluster is None:
            return False
        said = cluster.metadata.get("istio") or {}
        external = self._skips_external and (cluster.name == "PassthroughCluster" or said.get("external") is True)
        return external or said.get("disable_mx") is True

    @staticmethod
    def _take(head: Headers) -> Peer | None:
        value = head.get(HEADER)
        head.remove(ID_HEADER)
        if value is None:
            return None
        head.remove(HEADER)
        return peers.of_header(value) if value else None


def compile(proto: Any, context: FilterContext) -> PeerMetadata:
    """The filter for a Config."""
    return PeerMetadata(proto, context)
