"""A request on its way upstream, and its response back: what goes where, and what is held back.

`Forwarding` is at the same time the first try at a host, so that a request that is not retried needs no second object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.grpc import http_of_status, status_of
from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http.replies import Reply
from meshproxy.http.retry import ATTEMPT_COUNT
from meshproxy.http.route import NO_LIMIT
from meshproxy.http.route_rewrite import update_authority
from meshproxy.http.tries import Tries
from meshproxy.net.timers import TimeoutQueue
from meshproxy.observe import flags
from meshproxy.upstream.host import count_grpc

if TYPE_CHECKING:
    from meshproxy.http.attempt import Attempt
    from meshproxy.http.router import Router
    from meshproxy.http.routes import Route
    from meshproxy.http.stream import Stream
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.pool import Pool

_NOTHING: list[bytes] = []  # the body of requests without one; never appended to


class Forwarding(Tries):
    """A request on its way upstream, and its response on the way back."""

    __slots__ = (
        "_duration_timer",
        "bodiless",
        "body",
        "body_size",
        "careful",
        "grpc_open",
        "keeps_body",
        "paused_for_connection",
        "per_try_timeout",
        "request_trailers",
        "terminates",
        "tunnel",
        "waited",
        "winner",
    )

    def __init__(self, router: Router, stream: Stream, route: Route, cluster: Cluster) -> None:
        # All in one place, for every request comes here: first what every attempt has.
        self.owner = self
        self.stream = stream
        self.exchange = self.pool = self.host = None
        self.sent = 0
        self.sent_all = self.responded = self.retried = self.abandoned = self.backed_up = False
        self._per_try_timer = self._idle_timer = None
        self.router = router
        self.route = route
        self.cluster = cluster
        self.timeout = self.per_try_timeout = 0.0
        self.retry = None
        self.retries = False
        self.hedges = False
        self.mirrors = None
        self.body: list[bytes] = _NOTHING
        self.body_size = 0
        self.bodiless = False  # the request ended with its head
        # Something that few routes ask for is due before a try is sent: `before_sending`.
        self.careful = route.careful or cluster.max_stream_duration > 0 or stream._locals is not None
        self.waited = False  # a connection had to be made or waited for
        self.keeps_body = self.tunnel = self.terminates = self.is_retry = self.paused_for_connection = self.informed = False
        self.grpc_open = False  # the response has begun, and is a success or not by the status in its trailers
        self.ended = False
        self.done = False
        self.winner: Attempt | None = None  # the attempt whose response is passed on
        self.attempts = None
        self.pending_retries = 0
        self.request_trailers: Headers | None = None
        self._queue = None
        self._retry_timer = None
        self._duration_timer: Any = None
        self._lb = None

    @classmethod
    def under_way(cls, router: Router, stream: Stream, connection: Any, body: bytes, queue: TimeoutQueue | None, per_try: TimeoutQueue | None) -> Forwarding:
        """The forwarding of a whole request that has gone out already, on `connection`. `queue`, `per_try`: where its timeouts run."""
        self = cls(router, stream, stream.route, stream.cluster)
        self.timeout = self.route.timeout
        self.per_try_timeout = self.route.per_try_timeout
        if per_try is not None and (started := per_try.started.pop(stream, None)) is not None:
            left = max(0.0, started + self.per_try_timeout - router.clock())
            self._per_try_timer = router.context.loop.call_later(left, self._per_try_timed_out)
        self.retries = self.keeps_body = self.route.retry is not None
        self.ended = self.sent_all = True
        self.bodiless = not body
        if body and self.keeps_body:
            self.body = [body]
            self.body_size = len(body)
            self.sent = 1
        self.exchange = connection
        self.pool = connection.pool
        self.host = connection.host
        self._queue = queue
        connection.leave_plan(self, stream.request.method)  # type: ignore[union-attr]
        return self

    # -- the request

    def pool_for(self, host: Host) -> Pool:
        """The pool of `host` for this request."""
        head = self.stream.request
        assert head is not None
        ends = None
        if host.proxy_protocol:
            from meshproxy.upstream.proxy_protocol import ends_of  # few workers need it

            ends = ends_of(self.stream, said=not self.router.tells_callers)
        return self.cluster.pool_for(host, self.route.priority, head, raw=self.terminates, ends=ends)

    def begin(self, host: Host, end_stream: bool) -> None:
        """HOT: send the head; `end_stream`: that is all."""
        stream = self.stream
        self.keeps_body = self.retries or self.mirrors is not None
        cluster = self.cluster
        if self.careful:
            config = self.route.connect_config
            self.terminates = config is not None and config.allow_post and stream.request.method == b"POST"  # type: ignore[union-attr]  # it has a head
        if stream.upgrade is not None:
            self.tunnel = True
            self.ended = end_stream
            self.terminates = self.route.connect_config is not None and stream.upgrade == b"CONNECT"
            if self.timeout:  # until the tunnel is there: what is in it has no end that could be timed
                queue = self._queue = self.router.timeout_queue(self.timeout)
                queue.start(stream, stream.last_active)
        elif end_stream:
            self.ended = self.bodiless = True
            timeout = self.timeout
            if timeout:
                queue = self._queue = self.router._timeouts.get(timeout) or self.router.timeout_queue(timeout)
                if queue.handle is None:
                    queue.start(stream, stream.request_end)
                else:
                    queue.started[stream] = stream.request_end
            if self.mirrors is not None:
                self.mirrors.finish()
        pools_of_host = host.pools
        pool = pools_of_host.get(self.route.priority) if pools_of_host is not None and cluster.one_pool and not self.terminates else None
        if pool is None:
            pool = self.pool_for(host)
        self.host = host
        self.pool = pool
        exchange = pool.acquire(self)
        if exchange is not None:
            self.on_connected(exchange)
        else:
            self.waited = True

    def before_sending(self, attempt: Attempt, head: RequestHead) -> None:
        """What some routes ask for once the host of a try is known: its name as the request's host, timers, counts by virtual cluster."""
        stream, route = self.stream, self.route
        host = attempt.host
        if route.auto_host_rewrite and host is not None and host.hostname:
            update_authority(
                head, host.hostname.encode(), append_forwarded=route.append_x_forwarded_host, keep_original=not self.router.suppress and not self.is_retry
            )
        if route.virtual_cluster is not None:
            route.virtual_cluster.count(stream, "upstream_rq_total")
        if route.per_try_idle_timeout and self.ended:  # else when the request is complete
            attempt.restart_idle_timer()
        if (maps := stream.locals.pop("metadata", None)) is not None:
            attempt.exchange.add_metadata(maps)
        duration = stream.locals.get("stream_duration", self.cluster.max_stream_duration)
        if duration and self._duration_timer is None:
            self._duration_timer = self.router.context.loop.call_later(duration, self._duration_reached)
            stream.add_timer(self._duration_timer)

    def _duration_reached(self) -> None:
        if self.done:
            return
        self.cluster.stats.upstream_rq_max_duration_reached.n += 1
        stream = self.stream
        self.fail(
            Reply(
                504 if stream.request_ended else 408,
                b"upstream max stream duration reached",
                details="upstream_max_stream_duration_reached",
                flag=flags.UMSDR,
            )
        )
        stream.codec.flush()

    def data(self, data: bytes, end_stream: bool) -> None:
        """More of the request body."""
        if self.done:
            return
        if self.tunnel and not self.stream.tunnel:
            # Nothing goes upstream before the upgrade is accepted: a server that refuses it would read the bytes as a request.
            self._keep(data)
            return
        if end_stream:
            self.ended = True
        attempt = self.winner or (self.attempts[-1] if self.attempts else self)
        connected = attempt.exchange is not None
        if self.keeps_body or not connected:
            self._keep(data)
        if connected:
            attempt.sent = len(self.body)
            attempt.send(data, end_stream)
        if end_stream:
            self._request_complete()

    def trailers(self, trailers: Headers) -> None:
        """The request's trailers: its end."""
        if self.done:
            return
        self.ended = True
        self.request_trailers = trailers
        attempt = self.winner or (self.attempts[-1] if self.attempts else self)
        if attempt.exchange is not None:
            attempt.send_trailers(trailers)
        self._request_complete()

    def metadata(self, fields: dict[bytes, bytes]) -> None:
        """A map that goes with the request (codec.h2.metadata): to the try that there is, or the next one. As Envoy, no other one gets it."""
        if self.done:
            return
        attempt = self.winner or (self.attempts[-1] if self.attempts else self)
        if attempt.exchange is not None:
            attempt.exchange.send_metadata(fields)
        else:
            self.stream.locals.setdefault("metadata", []).append(fields)
            self.careful = True

    def _keep(self, data: bytes) -> None:
        if data:
            if self.body is _NOTHING:
                self.body = []
            self.body.append(data)
            self.body_size += len(data)
        limit = self.route.buffer_limit
        if limit == NO_LIMIT:
            limit = self.stream.manager.buffer_limit
        if self.body_size <= limit:
            return
        if self.keeps_body:
            self.keeps_body = False
            self.cluster.stats.retry_or_shadow_abandoned.n += 1
            self._end_retries()
            if self.mirrors is not None:
                self.mirrors.cancel()
                self.mirrors = None
            if self._retry_timer is not None:
                self._cancel_retry()
                self.stream.local_reply(
                    Reply(507, b"exceeded request buffer limit while retrying upstream", details="request_payload_exceeded_retry_buffer_limit")
                )
                return
            attempt = self.attempts[-1] if self.attempts else self
            if attempt.exchange is not None:
                self.body = []
                return
        if not self.paused_for_connection:
            self.paused_for_connection = True
            self.stream.pause_request()

    def _request_complete(self) -> None:
        if self.done:
            return
        if self.timeout:
            queue = self._queue = self.router.timeout_queue(self.timeout)
            queue.start(self.stream, self.stream.request_end)
        if self.per_try_timeout:
            for attempt in self.attempts or (self,):
                if attempt.exchange is not None and not attempt.responded:
                    attempt.start_per_try_timer()
        if self.route.per_try_idle_timeout:
            for attempt in self.attempts or (self,):
                if attempt.exchange is not None:
                    attempt.restart_idle_timer()
        if self.mirrors is not None:
            self.mirrors.finish(self.body)

    # -- the response

    def on_informational(self, attempt: Attempt, head: ResponseHead) -> None:
        """100 to 199 but 101. As Envoy, only the first one counts and is passed on."""
        if self.informed:
            return
        self.informed = True
        self.charge(head.status, attempt.host)
        if self.attempts is not None:  # this try has won
            self.winner = attempt
            self._drop_others(attempt)
        else:
            self._end_retries()
        self.stream.informational(head)

    def on_switching(self, attempt: Attempt, head: ResponseHead) -> None:
        """101 Switching Protocols: from here on bytes go both ways."""
        attempt.responded = True
        stream = self.stream
        stream.tunnel = True
        self._stop_timeout()
        self.on_attempt_headers(attempt, head, False)
        if self.body and attempt.exchange is not None:
            body, self.body = self.body, []
            attempt.send(b"".join(body), False)

    def on_raw_connection(self, attempt: Attempt) -> None:
        """A CONNECT that ends here: the connection itself is the answer, and carries the tunnel's bytes as they are."""
        attempt.responded = True
        stream = self.stream
        stream.upstream_start = stream.upstream_sent = self.router.clock()
        self.on_attempt_headers(attempt, ResponseHead(200, []), False)
        if not self.tunnel and attempt.exchange is not None:  # a POST, which has no upgrade to wait for
            body, self.body = self.body, _NOTHING
            self.keeps_body = False
            if self.paused_for_connection:
                self.paused_for_connection = False
                stream.resume_request()
            if body or self.ended:
                attempt.send(b"".join(body), self.ended)
        stream.codec.flush()

    def on_attempt_headers(self, attempt: Attempt, head: ResponseHead, end_stream: bool) -> None:
        """A final response's head: retry, or pass it on."""
        stream = self.stream
        cluster = self.cluster
        host = attempt.host
        assert host is not None
        status = head.status
        now = self.router.clock()
        stream.upstream_first = now
        grpc = stream.is_grpc
        grpc_status = status_of(head) if grpc else None
        if cluster.outlier is not None:
            cluster.outlier.result(host, status if grpc_status is None else http_of_status(grpc_status))
        if cluster.checks_health and b"x-envoy-immediate-health-check-fail" in head:
            cluster.fail_immediately(host)
        if self.tunnel and stream.request is not None and stream.request.method == b"CONNECT" and status < 300:
            stream.tunnel = True
            self._stop_timeout()
        if self.retries and self._retry_response(attempt, head, end_stream):
            return
        if self.tunnel and 200 <= status < 400 and not stream.tunnel and self._is_handshake():
            self._refused_handshake(head)
            return
        self.winner = attempt
        if self.attempts is not None:
            self._drop_others(attempt)
        if self.mirrors is None and not self.tunnel and attempt.sent == len(self.body):
            self.keeps_body = False  # it will not be sent again
            self.body = _NOTHING
            attempt.sent = 0
        if stream.request_end and not self.router.suppress:
            head.set(b"x-envoy-upstream-service-time", b"%d" % ((now - stream.request_end) * 1000))
        self.charge(status, host, head)
        if status < 500:
            if not grpc:
                host.rq_success += 1
            elif end_stream:
                count_grpc(host, grpc_status)
            else:
                self.grpc_open = True
        route = self.route
        stream.details = "via_upstream"
        stream.response = head
        stream.status = status
        if route.finalize_response is not None:
            route.finalize_response(stream)
        if route.include_attempt_count_in_response:
            head.set(ATTEMPT_COUNT, b"%d" % stream.attempts)
        if end_stream:
            self.complete(attempt)
        stream.send_headers(head, end_stream)
        if stream.tunnel and self.body and not self.done and attempt.exchange is not None and status != 101:
            body, self.body = self.body, []
            attempt.send(b"".join(body), False)

    def _is_handshake(self) -> bool:
        """Whether anything but 101 refuses a tunnel that was asked for: HTTP/2 asks otherwise."""
        stream = self.stream
        return stream.upgrade.lower() == b"websocket" and stream._upstream.protocol == "HTTP/1.1"  # type: ignore[union-attr]

    def _refused_handshake(self, head: ResponseHead) -> None:
        """A WebSocket handshake that came to something else than 101 or an error: the client gets the head, and that is all; Envoy does not count it."""
        self.stream.close_connection = True  # whatever the client sent after asking for a tunnel was not meant to be a request
        stream = self.stream
        head.remove(b"content-length")
        stream.details = "websocket_handshake_unsuccessful"
        stream.response = head
        stream.status = head.status
        self.abandon()
        stream.send_headers(head, True)

    def on_attempt_trailers(self, attempt: Attempt, trailers: Headers) -> None:
        """The response ends with trailers."""
        if self.grpc_open:
            self.grpc_open = False
            count_grpc(attempt.host, status_of(trailers))  # type: ignore[arg-type]  # it has answered
        self.complete(attempt)
        self.stream.send_trailers(trailers)

    def complete(self, attempt: Attempt) -> None:
        """The response has been read to its end."""
        self.done = True
        self._stop_timeout()
        if self.grpc_open:
            count_grpc(attempt.host, None)  # type: ignore[arg-type]  # it has answered
        stream = self.stream
        if attempt._idle_timer is not None:
            attempt._idle_timer.cancel()
            attempt._idle_timer = None
        now = self.router.clock()
        stream.upstream_last = now
        if self.router.dynamic_stats and not stream.health_check and stream.request_end:
            cluster = self.cluster
            host = attempt.host
            canary, zone = (host.canary, host.zone_stat) if host is not None else (False, "")
            cluster.stats.charge_time((now - stream.request_end) * 1000, stream.is_internal, canary, zone)
            if cluster.observes_latency and host is not None:
                cluster.observe(host, now - stream.upstream_start)
        if self.retry is not None:
            self._end_retries()

    # -- the downstream

    def downstream_writable(self, writable: bool) -> None:
        """The downstream's write buffer crossed its watermark: hold the upstream back."""
        attempt = self.winner
        exchange = None if attempt is None else attempt.exchange
        if exchange is None or exchange.closed:
            return
        stats = self.cluster.stats
        if writable:
            stats.upstream_flow_control_resumed_reading_total.n += 1
            exchange.resume_reading()
        else:
            stats.upstream_flow_control_paused_reading_total.n += 1
            exchange.pause_reading()


def _grpc_status(headers: Headers) -> int | None:
    value = headers.get(b"grpc-status")
    if value is None or not value.isdigit() or len(value) > 9:  # Python refuses to read some thousands of digits
        return None
    return int(value)
