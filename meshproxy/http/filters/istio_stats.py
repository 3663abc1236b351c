"""Istio's standard metrics of requests (stats.PluginConfig, the filter `istio.stats`); docs/metrics.md says what they are.

The filter only looks at streams that have ended, so that requests keep their lanes. Who is at the other end says `peer_metadata`, which runs before it. What
requests and responses take on the wire is what their heads take in HTTP/1 and their bodies: chunks, and the frames and the compression of HTTP/2, are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.grpc import is_content_type
from meshproxy.http.filters.grpc_stats import FILTER_STATE
from meshproxy.observe import peers
from meshproxy.observe.istio_metrics import NO_PRINCIPALS, Ends, IstioMetrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshproxy.codec.headers import Pair
    from meshproxy.http.filters import FilterContext
    from meshproxy.observe.istio_metrics import Request

TYPE_URL = "type.googleapis.com/stats.PluginConfig"
ROUTE_TYPE_URLS = ()  # what is honoured of it says tcp.filters.istio_stats, which is of the same type
_STATUS_LINE = 17  # bytes of `HTTP/1.1 200 OK` and the ends of the head's lines
_REQUEST_LINE = 24  # of `HTTP/1.1`, `Host: ` and the like
_MAX_AUTHORITY = 256  # bytes of one that is remembered: nobody shall fill memory


class IstioStats:
    """The filter."""

    __slots__ = ("_changes", "_generation", "_metrics", "name")

    def __init__(self, metrics: IstioMetrics, context: FilterContext) -> None:
        self._metrics = metrics
        self._changes = context.context.changes
        self._generation = self._changes.n

    def complete(self, stream: Any) -> None:
        """HOT: count a stream that has ended."""
        metrics = self._metrics
        facts = stream.facts
        if facts is None or metrics.dynamic:
            self._complete(stream)
            return
        if self._generation != self._changes.n:  # what is remembered are lanes of before
            self._generation = self._changes.n
            metrics.forget()
        # A stream that went by a lane: only what lanes set may be read, or it would become an ordinary one. To read anything of it is dear.
        response, milliseconds, size, trailers, lane, plan, exchange, codec, body, values = stream.answer
        known = response.known
        downstream_peer = None
        if metrics.inbound:
            tls = facts[2].tls
            downstream_peer = stream.downstream_peer if plan is None else plan.peer
        else:
            tls = exchange.info.tls
        if plan is None:
            head = stream.request
            authority = head.authority
            received = codec.head_size or _request_size(head)
        else:
            authority = plan.authority
            received = plan.received or codec.head_size or plan.size
        key = (
            lane,
            authority,
            facts[3],
            known.status,
            downstream_peer,
            response.peer,
            None if tls is None else tls.principals,
            None if not lane.grpc else known.index.get(b"grpc-status") if trailers is None else trailers.grpc_status,
        )
        request = metrics.remembered.get(key) or self._learn(key)
        times = request.times
        if not times:
            metrics.busy.append(request)
        times[milliseconds] = times.get(milliseconds, 0) + 1
        received += body
        sizes = request.received
        sizes[received] = sizes.get(received, 0) + 1
        size += response.head_size or response.measure()
        if values is not None:
            size += sum(map(len, values))
        sizes = request.sent
        sizes[size] = sizes.get(size, 0) + 1

    def _learn(self, key: Any) -> Request:
        lane, authority, host, status, downstream_peer, upstream_peer, principals, grpc_status = key
        peer = downstream_peer if self._metrics.inbound else upstream_peer or peers.of_host(host)
        ends = Ends(peer, principals or NO_PRINCIPALS, lane.cluster, lane.route.name, authority.decode("latin-1"), upstream_peer)
        request = self._metrics.request(ends, status=status, flags=0, grpc=lane.grpc, grpc_status=_grpc_text(grpc_status))
        if len(authority) <= _MAX_AUTHORITY:
            self._metrics.remember(key, request)
        return request

    def _complete(self, stream: Any) -> None:
        """The same for any stream."""
        metrics = self._metrics
        head = stream.request
        if head is None:
            return
        if metrics.inbound:
            peer = stream.downstream_peer
            tls = stream.connection.tls
        else:
            peer = stream.upstream_peer or peers.of_host(stream.host)
            upstream = stream.upstream
            tls = None if upstream is None else upstream.tls
        principals = NO_PRINCIPALS if tls is None else tls.principals
        route = stream.route
        ends = Ends(peer, principals, stream.cluster, "" if route is None else route.name, head.authority.decode("latin-1"), stream.upstream_peer)
        grpc = is_content_type(head.get(b"content-type"))
        status = _grpc_status(stream) if grpc else ""
        request = metrics.request(ends, status=stream.status, flags=stream.flags, grpc=grpc, grpc_status=status, stream=stream)
        response = stream.response
        metrics.count(
            request,
            int((stream.end - stream.start) * 1000),
            (stream.codec.head_size or _request_size(head)) + stream.bytes_received,
            (0 if response is None else _STATUS_LINE + _size(response.items)) + stream.bytes_sent,
        )
        if grpc:
            counts = stream.filter_state.get(FILTER_STATE)
            if counts is not None:
                metrics.count_messages(ends, counts.requests, counts.responses, stream)


def _grpc_status(stream: Any) -> str:
    """As far as there is one: a number, in trailers or in the head."""
    for headers in (stream.response_trailers, stream.response):
        value = None if headers is None else headers.get(b"grpc-status")
        if value is not None:
            return _grpc_text(value)
    return ""


def _grpc_text(status: bytes | int | None) -> str:
    """A status as a label has it: what is none may be anything."""
    text = b"" if status is None else status if isinstance(status, bytes) else b"%d" % status
    return text.decode() if text.isdigit() and len(text) < 4 else ""


def _request_size(head: Any) -> int:
    """About what a head takes in HTTP/1."""
    return _REQUEST_LINE + len(head.method) + len(head.path) + len(head.authority) + _size(head.items)


def _size(items: Iterable[Pair]) -> int:
    return sum([len(name) + len(value) + 4 for name, value in items])


def compile(proto: Any, context: FilterContext) -> IstioStats:
    """The filter for a PluginConfig. Equal ones count together."""
    return IstioStats(IstioMetrics.of(proto, context.context, context.listener), context)
