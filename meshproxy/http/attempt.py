"""One try of a request at one host: what the pool and the exchange on its connection call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.headers import ResponseHead
from meshproxy.http import retry
from meshproxy.http.retry import ATTEMPT_COUNT
from meshproxy.upstream import pool as pools

if TYPE_CHECKING:
    from meshproxy.codec.h1.response import KnownResponse
    from meshproxy.codec.headers import Headers, RequestHead
    from meshproxy.http.stream import Stream
    from meshproxy.http.tries import Tries
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.pool import Pool

_SERVICE_TIMES = [(b"x-envoy-upstream-service-time", b"%d" % milliseconds) for milliseconds in range(256)]


class Attempt:
    """One try at one host: what the pool and its exchange call."""

    __slots__ = (
        "_idle_timer",
        "_per_try_timer",
        "abandoned",
        "backed_up",
        "exchange",
        "host",
        "owner",
        "pool",
        "responded",
        "retried",
        "sent",
        "sent_all",
        "stream",
    )

    def __init__(self, owner: Tries, stream: Stream) -> None:
        self.owner: Any = owner  # the Forwarding that this is a try of; None once the stream is over
        self.stream = stream
        self._reset_state()

    def _reset_state(self) -> None:
        self.exchange: Any = None  # upstream.pool.Exchange, while there is one
        self.pool: Pool | None = None
        self.host: Host | None = None
        self.backed_up = False  # the exchange takes no more of the request for now, and the downstream was told
        self.sent = 0  # chunks of owner.body that went out
        self.sent_all = False
        self.responded = False  # response headers came
        self.retried = False  # a hedged retry has taken over; this one may still win
        self.abandoned = False
        self._per_try_timer: Any = None
        self._idle_timer: Any = None

    # -- to the upstream

    def try_host(self, host: Host) -> None:
        """Get an exchange with `host` and send what there is of the request."""
        self.host = self.stream.host = host
        owner = self.owner
        pool = owner.pool_for(host)
        self.pool = pool
        exchange = pool.acquire(self)
        if exchange is not None:
            self.on_connected(exchange)

    def on_connected(self, exchange: Any) -> None:
        """HOT: the pool has an exchange for us."""
        self.exchange = exchange
        owner = self.owner
        stream = self.stream
        stream._upstream = exchange
        head = stream.request
        assert head is not None
        if owner.terminates:
            owner.on_raw_connection(self)
            return
        if owner.careful:
            owner.before_sending(self, head)
        if owner.bodiless:
            self.sent_all = True
            now = stream.upstream_sent = stream.last_active if not owner.is_retry and not owner.waited else owner.router.clock()
        else:
            now = owner.router.clock()
            if owner.ended:
                self.sent_all = True
                stream.upstream_sent = now
        if not stream.upstream_start:
            stream.upstream_start = now
        if owner.per_try_timeout and owner.ended:
            self.start_per_try_timer()
        if owner.bodiless:
            exchange.send_whole(head)
        else:
            self._send_head(head)

    def _send_head(self, head: RequestHead) -> None:
        """The head, and as much of the body as is here."""
        owner = self.owner
        body = owner.body if not owner.tunnel or self.stream.tunnel else ()
        if body:
            self.sent = len(body)
            if not owner.keeps_body:
                owner.body = []
                self.sent = 0
        if owner.paused_for_connection:
            owner.paused_for_connection = False
            self.stream.resume_request()
        self.exchange.send_head(head, body, ended=owner.ended, trailers=owner.request_trailers, upgrade=self.stream.upgrade)

    def send(self, data: bytes, last: bool) -> None:
        """More of the body."""
        if last:
            self._sent_all()
        if data or last:
            self.exchange.send_data(data, last)

    def send_trailers(self, trailers: Headers) -> None:
        """The request's end."""
        self._sent_all()
        self.exchange.send_trailers(trailers)

    def _sent_all(self) -> None:
        self.sent_all = True
        self.stream.upstream_sent = self.owner.router.clock()

    def start_per_try_timer(self) -> None:
        """The per-try timeout runs from the time that both the request is complete and the connection is there."""
        self._per_try_timer = self.owner.router.context.loop.call_later(self.owner.per_try_timeout, self._per_try_timed_out)

    def restart_idle_timer(self) -> None:
        """per_try_idle_timeout: nothing came from the upstream for too long."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        owner = self.owner
        self._idle_timer = owner.router.context.loop.call_later(owner.route.per_try_idle_timeout, self._idle_timed_out)

    def _per_try_timed_out(self) -> None:
        self._per_try_timer = None
        if not self.abandoned and not self.responded:
            self.owner.on_per_try_timeout(self, "upstream_per_try_timeout")
            self.stream.codec.flush()

    def _idle_timed_out(self) -> None:
        self._idle_timer = None
        if not self.abandoned and not self.owner.done:
            self.owner.on_per_try_timeout(self, "upstream_per_try_idle_timeout")
            self.stream.codec.flush()

    # -- from the upstream

    def on_pool_failure(self, reason: str, failure: str | None) -> None:
        """No connection: refused by a circuit breaker, or it could not be made."""
        self.exchange = None
        if self.owner is None:
            return
        if failure:
            self.stream.upstream_failure = failure
        if reason is pools.OVERFLOW and self.pool is not None and self.pool.limits.rq < self.pool.limits.max_rq:
            self.host = self.stream.host = None  # it did not get as far as a connection of the host
        self.owner.on_attempt_failed(self, reason, failure or "")
        self.stream.codec.flush()

    def on_response_headers(self, head: ResponseHead, end_stream: bool) -> None:
        """A response's head, informational ones included."""
        if head.status < 200:
            if head.status == 101:
                self.owner.on_switching(self, head)
            else:
                self.owner.on_informational(self, head)
            return
        self.responded = True
        if self._per_try_timer is not None:
            self._per_try_timer.cancel()
            self._per_try_timer = None
        if self._idle_timer is not None and not end_stream:
            self.restart_idle_timer()
        if end_stream and self.sent_all:
            self._let_go()
        self.owner.on_attempt_headers(self, head, end_stream)

    def on_response_whole(self, known: KnownResponse, body: bytes) -> None:
        """HOT: a complete response in one piece."""
        owner = self.owner
        stream = self.stream
        status = known.status
        head = ResponseHead(status, known.items.copy(), known.index.copy(), reason=known.reason)
        exchange = self.exchange
        may_retry = owner.retries and (owner.retry is not None or status >= owner.route.retry.from_status or not retry.RESPONSE_HEADERS.isdisjoint(known.index))
        if may_retry or b"grpc-status" in known.index or not self.sent_all or not owner.bodiless or owner.attempts is not None:
            self.on_response_headers(head, not body)
            if body and not self.abandoned:
                self.on_response_data(body, True)
            return
        router = owner.router
        now = router.clock()
        host = exchange.host
        self.exchange = None
        exchange.let_go()
        self.responded = owner.done = True
        if self._per_try_timer is not None:
            self._per_try_timer.cancel()
            self._per_try_timer = None
        queue = owner._queue
        if queue is not None:
            owner._queue = None
            del queue.started[stream]
        cluster = owner.cluster
        if cluster.outlier is not None:
            cluster.outlier.result(host, status)
        index = head._index
        if cluster.checks_health and b"x-envoy-immediate-health-check-fail" in index:  # type: ignore[operator]
            cluster.fail_immediately(host)
        elapsed = now - stream.request_end
        if not router.suppress:
            milliseconds = int(elapsed * 1000)
            pair = _SERVICE_TIMES[milliseconds] if milliseconds < 256 else (b"x-envoy-upstream-service-time", b"%d" % milliseconds)
            if b"x-envoy-upstream-service-time" in index:  # type: ignore[operator]
                head.set(*pair)
            else:
                head.items.append(pair)
                index[b"x-envoy-upstream-service-time"] = pair[1]  # type: ignore[index]
        if (
            router.charges_plainly
            and stream._locals is None
            and not stream.health_check
            and not host.canary
            and owner.route.virtual_cluster is None
            and b"x-envoy-upstream-canary" not in index  # type: ignore[operator]
        ):
            key = status, stream.is_internal, False, host.zone_stat
            codes = cluster.stats._codes
            try:
                codes[key] += 1
            except KeyError:
                codes[key] = 1
            if status >= 500:
                host.rq_error += 1
            cluster.stats.charge_time(elapsed * 1000, stream.is_internal, False, host.zone_stat)
        else:
            owner.charge(status, host, head)
            if router.dynamic_stats and not stream.health_check:
                cluster.stats.charge_time(elapsed * 1000, stream.is_internal, host.canary, host.zone_stat)
        if status < 500:
            host.rq_success += 1
        stream.upstream_first = stream.upstream_last = now
        stream.details = "via_upstream"
        route = owner.route
        if cluster.observes_latency:
            cluster.observe(host, now - stream.upstream_start)
        stream.response = head
        stream.status = status
        if route.finalize_response is not None:
            route.finalize_response(stream)
        if route.include_attempt_count_in_response:
            head.set(ATTEMPT_COUNT, b"%d" % stream.attempts)
        stream.send_whole(head, body)

    def on_response_data(self, data: bytes, end_stream: bool) -> None:
        """Response body."""
        owner = self.owner
        if owner is None:  # the stream ended with the head
            return
        if end_stream:
            if self.sent_all:
                self._let_go()
            owner.complete(self)
        elif self._idle_timer is not None:
            self.restart_idle_timer()
        self.stream.send_data(data, end_stream)

    def on_response_trailers(self, trailers: Headers) -> None:
        """Response trailers."""
        owner = self.owner
        if owner is None:
            return
        if self.sent_all:
            self._let_go()
        owner.on_attempt_trailers(self, trailers)

    def on_metadata(self, fields: dict[bytes, bytes]) -> None:
        """A map that goes with the response (codec.h2.metadata); it does not wait for the head."""
        if self.owner is not None and not self.abandoned:
            stream = self.stream
            stream.last_active = self.owner.router.clock()
            stream.codec.send_metadata(fields)

    def on_upstream_reset(self, reason: str, details: str) -> None:
        """The exchange broke under us."""
        self.exchange = None
        if self.owner is not None:
            if self.backed_up:
                self._flow_again()
            self.owner.on_attempt_failed(self, reason, details)
        self.stream.codec.flush()

    def on_upstream_done_early(self) -> None:
        """The response is complete and the exchange over although we had not sent everything."""
        self.exchange = None

    def on_read_end(self) -> None:
        """A head whose body is still to come does not wait for it."""
        self.stream.codec.flush()

    def on_upstream_writable(self, writable: bool) -> None:
        """The upstream's write buffer crossed its watermark: hold the downstream back."""
        if self.owner is None:
            return
        if not writable:
            self.backed_up = True
            self.owner.cluster.stats.upstream_flow_control_backed_up_total.n += 1
            self.stream.pause_request()
        elif self.backed_up:
            self._flow_again()

    def _flow_again(self) -> None:
        self.backed_up = False
        self.owner.cluster.stats.upstream_flow_control_drained_total.n += 1
        self.stream.resume_request()

    def _let_go(self) -> None:
        """Everything was sent and received."""
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.let_go()

    def cancel(self) -> None:
        """Give this try up: leave the queue, or break the exchange off."""
        if self.abandoned:
            return
        self.abandoned = True
        for timer in (self._per_try_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        self._per_try_timer = self._idle_timer = None
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.abort()
            if self.backed_up:
                self._flow_again()
        elif self.pool is not None and not self.responded:
            self.pool.cancel(self)
