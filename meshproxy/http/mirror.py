"""Mirroring (shadowing): copies of requests to other clusters, fire and forget. Answers are read, counted and thrown away.

A copy is sent once the request is complete; a body over the buffer limit means no copy. Source: envoy.config.route.v3.RouteAction.RequestMirrorPolicy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h1.response import KnownResponse
from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http.tries import RESET_FLAGS
from meshproxy.net.interfaces import machine_address
from meshproxy.observe import flags
from meshproxy.observe.stream_info import StreamInfo

if TYPE_CHECKING:
    from meshproxy.http.router import Router
    from meshproxy.http.routes import Route
    from meshproxy.http.stream import Stream
    from meshproxy.tracing.span import Span
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.pool import Exchange, Pool

_DEFAULT_TIMEOUT = 15.0


def finish_copy(span: Span, cluster: Cluster, host: Host, status: int, flag: int, at: float) -> None:
    """The span of a copy that has been answered, or will not be: no custom tags, as in Envoy."""
    address = host.address.text.encode()
    span.tags = {
        "http.protocol": b"HTTP/1.1",  # Envoy says so of all requests of its own
        "upstream_address": address,
        "peer.address": address,
        "component": b"proxy",
        "upstream_cluster": cluster.name.encode(),
        "upstream_cluster.name": cluster.observability_name.encode(),
        "http.status_code": b"%d" % status,
        "response_flags": flags.short(flag).encode(),
    }
    if status >= 500:
        span.tags["error"] = b"true"
    span.finish(at=at)


def start(route: Route, stream: Stream, router: Router) -> Mirrors | None:
    """The copies to make of this request; None when the policies choose none."""
    copies = []
    for policy in route.mirrors:
        if not policy.chosen():
            continue
        name = policy.cluster_name(stream)
        cluster = router.clusters.get(name) if name else None
        if cluster is None:
            continue
        assert stream.request is not None
        head = stream.request.copy()
        policy.change(stream, head)
        if policy.shadow_suffix:
            head.authority = _with_suffix(head.authority)
        tracing = stream.manager.tracing
        span = None if tracing is None else tracing.begin_copy(stream, head)  # type: ignore[arg-type]  # of those that trace, all streams are traced ones
        head.set(b"x-envoy-internal", b"true")
        before = head.joined(b"x-forwarded-for")
        address = machine_address().encode()
        head.set(b"x-forwarded-for", before + b"," + address if before else address)
        router.async_rq_total.n += 1
        copies.append((cluster, head, span))
    return Mirrors(copies, router, route) if copies else None


def _with_suffix(authority: bytes) -> bytes:
    """`-shadow` after the host name, before the port."""
    host, colon, port = authority.rpartition(b":")
    if colon and port.isdigit() and (host.count(b":") == 0 or host.endswith(b"]")):
        return host + b"-shadow:" + port
    return authority + b"-shadow"


class Mirrors:
    """The copies of one request, until it is complete."""

    __slots__ = ("_copies", "_route", "_router")

    def __init__(self, copies: list[tuple[Cluster, RequestHead, Span | None]], router: Router, route: Route) -> None:
        self._copies = copies
        self._router = router
        self._route = route

    def finish(self, body: list[bytes] | tuple[bytes, ...] = ()) -> None:
        """The request is complete: send the copies."""
        copies, self._copies = self._copies, []
        for cluster, head, span in copies:
            host = cluster.pick(None) if not cluster.needs_context else None
            if host is None:
                cluster.stats.upstream_cx_none_healthy.n += 1
                continue
            copy = _Copy(cluster, head, b"".join(body), self._router, self._route.timeout or _DEFAULT_TIMEOUT)
            if span is not None:
                copy.trace = span, host
            copy.send(cluster.pool_for(host, 0, head))

    def cancel(self) -> None:
        """The request will not be complete, or its body is too large to keep."""
        self._copies = []


class _Copy:
    """One copy on its way: the request's side of the pool's contract, discarding what comes back."""

    __slots__ = ("_body", "_cluster", "_flag", "_head", "_pool", "_router", "_status", "_timer", "exchange", "started", "stream", "trace")

    def __init__(self, cluster: Cluster, head: RequestHead, body: bytes, router: Router, timeout: float) -> None:
        self._cluster = cluster
        self._head = head
        self._body = body
        self._router = router
        self._pool: Pool | None = None
        self.exchange: Exchange | None = None
        self._status = 503  # of the response, or in its place
        self._flag = 0
        self.trace: tuple[Span, Host] | None = None
        self.started = router.clock()
        self.stream = StreamInfo()  # exchanges count bytes for their request's stream; nobody logs those of a copy
        self._timer: Any = router.context.loop.call_later(timeout, self._timed_out)

    def send(self, pool: Pool) -> None:
        """Get an exchange and go."""
        self._pool = pool
        exchange = pool.acquire(self)
        if exchange is not None:
            self.on_connected(exchange)

    def on_connected(self, exchange: Exchange) -> None:
        self.exchange = exchange
        if self._body:
            exchange.send_head(self._head, (self._body,), ended=True, trailers=None, upgrade=None)
        else:
            exchange.send_whole(self._head)

    def on_pool_failure(self, reason: str, failure: str | None) -> None:
        self._flag = RESET_FLAGS.get(reason, flags.UR)
        self._cluster.stats.charge(503, internal=True)
        self._stop()

    def on_response_whole(self, known: KnownResponse, body: bytes) -> None:
        self._status = known.status
        self._cluster.stats.charge(known.status, internal=True)
        self._done()

    def on_response_headers(self, head: ResponseHead, end_stream: bool) -> None:
        if head.status >= 200:
            self._status = head.status
            self._cluster.stats.charge(head.status, internal=True)
            if end_stream:
                self._done()

    def on_response_data(self, data: bytes, end_stream: bool) -> None:
        if end_stream:
            self._done()

    def on_response_trailers(self, trailers: Headers) -> None:
        self._done()

    def on_upstream_reset(self, reason: str, details: str) -> None:
        self.exchange = None
        self._status, self._flag = 503, RESET_FLAGS.get(reason, flags.UR)
        self._cluster.stats.charge(503, internal=True)
        self._stop()

    def on_upstream_done_early(self) -> None:
        self.exchange = None
        self._stop()

    def on_read_end(self) -> None:
        """Nobody waits for what has come."""

    def on_upstream_writable(self, writable: bool) -> None:
        """The body is here already: there is nobody to hold back."""

    def _done(self) -> None:
        self._cluster.stats.charge_time((self._router.clock() - self.started) * 1000, internal=True)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.let_go()
        self._stop()

    def _timed_out(self) -> None:
        self._timer = None
        self._cluster.stats.upstream_rq_timeout.n += 1
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.abort()
        elif self._pool is not None:
            self._pool.cancel(self)
        self._status, self._flag = 504, flags.UT
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.trace is not None:
            (span, host), self.trace = self.trace, None
            finish_copy(span, self._cluster, host, self._status, self._flag, self._router.context.wall())
