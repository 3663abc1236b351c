"""The tries of one request: when one fails or takes too long, whether another is made, or one beside it, or what is answered instead.

Behaviour: Envoy's router filter (`UpstreamRequest`s of one `Filter`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.http import replies, retry, timeouts
from meshproxy.http.attempt import Attempt
from meshproxy.http.replies import OVERLOADED, Reply
from meshproxy.http.retry import ATTEMPT_COUNT
from meshproxy.net.timers import TimeoutQueue
from meshproxy.observe import flags
from meshproxy.upstream import pool as pools
from meshproxy.upstream.cluster import LbContext

if TYPE_CHECKING:
    from meshproxy.codec.headers import ResponseHead
    from meshproxy.http.retry import RetryState
    from meshproxy.http.router import Router
    from meshproxy.http.routes import Route
    from meshproxy.upstream.cluster import Cluster
    from meshproxy.upstream.host import Host

RESET_FLAGS = {
    pools.OVERFLOW: flags.UO,
    pools.CONNECT_FAILURE: flags.UF,
    pools.LOCAL_CONNECT_FAILURE: flags.UF,
    pools.CONNECT_TIMEOUT: flags.UF,
    pools.TERMINATION: flags.UC,
    pools.PROTOCOL_ERROR: flags.UPE,
    pools.LOCAL_RESET: flags.LR,
    pools.REMOTE_RESET: flags.UR,
    pools.REFUSED: flags.UR,
}


class Tries(Attempt):
    """A request's first try, and what all its tries share. `http.forwarding.Forwarding` fills it in: one object, for most requests need no second try."""

    __slots__ = (
        "_lb",
        "_queue",
        "_retry_timer",
        "attempts",
        "cluster",
        "done",
        "ended",
        "hedges",
        "informed",
        "is_retry",
        "mirrors",
        "pending_retries",
        "retries",
        "retry",
        "route",
        "router",
        "timeout",
    )

    router: Router
    route: Route
    cluster: Cluster
    timeout: float  # seconds; 0 for none
    retry: RetryState | None  # made when the first decision is due, unless headers ask for retries
    retries: bool  # whether there may be retries
    is_retry: bool
    hedges: bool
    attempts: list[Attempt] | None  # all tries in flight, when there is or may be more than one
    pending_retries: int
    mirrors: Any
    ended: bool  # the request is complete
    winner: Attempt | None  # the one whose response is passed on
    grpc_open: bool  # the response has begun, and is a success or not by the status in its trailers
    informed: bool  # an informational response was passed on
    done: bool  # nothing more comes from upstream
    _queue: TimeoutQueue | None
    _retry_timer: Any
    _lb: LbContext | None

    # -- choosing

    def lb_context(self) -> LbContext:
        """What the balancer may look at, made for the first try and kept for retries."""
        context = self._lb
        if context is None:
            context = self._lb = LbContext()
            stream, route = self.stream, self.route
            context.stream = stream
            if route.hash is not None and self.cluster.needs_hash:
                context.hash = route.hash(stream)
            context.metadata_match = route.metadata_match
        return context

    # -- failures

    def on_attempt_failed(self, attempt: Attempt, reason: str, details: str) -> None:
        """A try ended without a complete response."""
        if self.done or attempt.abandoned:
            return
        cluster, stream = self.cluster, self.stream
        host = attempt.host
        if reason is not pools.OVERFLOW and cluster.outlier is not None and host is not None:
            cluster.outlier.local_failure(host, "connect_failed" if reason in (pools.CONNECT_FAILURE, pools.CONNECT_TIMEOUT) else "reset")
        if self.retries and not attempt.responded and not attempt.retried and not stream.response_started:
            verdict = self.retry_state().should_retry_reset(reason, request_sent=attempt.sent_all or attempt.sent > 0 or bool(stream.upstream_bytes_sent))
            if self._start_retry(attempt, verdict):
                if host is not None:
                    host.rq_error += 1
                return
        if stream.response_started:
            self._failed_late(attempt, reason, details)
            return
        status = 502 if reason == pools.PROTOCOL_ERROR else 503
        begun = self.informed or self.winner is not None  # filters may be holding what came
        if begun:
            self._count_late(attempt)
        else:
            self.charge(status, host)
        self._remove(attempt)
        if self._others_in_flight():
            return
        cluster.rq_dropped += reason is pools.OVERFLOW
        suffix = f"|{details}" if details else ""
        began = "after" if begun else "before"
        self.fail(
            Reply(
                status,
                f"upstream connect error or disconnect/reset before headers. {'retried and the latest ' * self.is_retry}reset reason: {reason}".encode(),
                details=f"upstream_reset_{began}_response_started{{{reason}{suffix}}}".replace(" ", "_"),
                flag=RESET_FLAGS.get(reason, flags.UR),
                headers=OVERLOADED if reason == pools.OVERFLOW and not self.router.suppress else (),
            )
        )

    def _failed_late(self, attempt: Attempt, reason: str, details: str) -> None:
        """The response had begun: the downstream can only be reset."""
        stream = self.stream
        self.done = True
        self._stop_timeout()
        self._cancel_retry()
        for other in self.attempts or ():
            if other is not attempt:
                other.cancel()
        self._count_late(attempt)
        stream.flags |= RESET_FLAGS.get(reason, flags.UR)
        suffix = f"|{details}" if details else ""
        stream.details = f"upstream_reset_after_response_started{{{reason}{suffix}}}".replace(" ", "_")
        stream.reset()

    def _count_late(self, attempt: Attempt) -> None:
        if self.grpc_open and attempt.host is not None:  # others were counted with their head
            attempt.host.rq_error += 1
            self.router.rq_reset_after_downstream_response_started.n += 1

    def fail(self, reply: Reply) -> None:
        """Answer the downstream ourselves; every attempt is over."""
        stream = self.stream
        self.abandon()
        if self.route.include_attempt_count_in_response:
            reply = Reply(
                reply.status,
                reply.body,
                details=reply.details,
                flag=reply.flag,
                headers=(*reply.headers, (ATTEMPT_COUNT, b"%d" % stream.attempts)),
                grpc_status=reply.grpc_status,
            )
        stream.local_reply(reply)

    def on_timeout(self) -> None:
        """The route's timeout."""
        self._queue = None
        if self.done:
            return
        stats = self.cluster.stats
        for attempt in self._in_flight():
            stats.upstream_rq_timeout.n += 1
            if self.route.virtual_cluster is not None:
                self.route.virtual_cluster.count(self.stream, "upstream_rq_timeout")
            host = attempt.host
            if host is not None:
                host.rq_timeout += 1
            if not attempt.responded:
                if self.cluster.outlier is not None and host is not None:
                    self.cluster.outlier.local_failure(host, "timeout")
                if self.informed:
                    self._count_late(attempt)
                else:
                    self.charge(self.timeout_status, host)
        self._timed_out("response_timeout")
        self.stream.codec.flush()

    @property
    def timeout_status(self) -> int:
        """504, or 204 where the client asked for it."""
        return 204 if self.stream.locals.get("timeout_204") else 504

    def _timed_out(self, details: str) -> None:
        status = self.timeout_status
        self.fail(Reply(status, b"upstream request timeout" if status == 504 else b"", details=details, flag=flags.UT))

    def on_per_try_timeout(self, attempt: Attempt, details: str) -> None:
        """A try took too long: retry, hedge, or give up."""
        cluster = self.cluster
        host = attempt.host
        if self.hedges:
            self._hedge(attempt)
            return
        (cluster.stats.upstream_rq_per_try_timeout if details == "upstream_per_try_timeout" else cluster.stats.upstream_rq_per_try_idle_timeout).n += 1
        if host is not None:
            host.rq_timeout += 1
            if cluster.outlier is not None:
                cluster.outlier.local_failure(host, "timeout")
        responded = attempt.responded
        sent = attempt.exchange is not None
        attempt.cancel()
        if self.retries and not responded:
            verdict = self.retry_state().should_retry_reset(pools.LOCAL_RESET, request_sent=sent)
            if self._start_retry(attempt, verdict, after_timeout=True):
                if host is not None:
                    host.rq_error += 1
                return
        if self.stream.response_started or self.informed:
            self._count_late(attempt)
        else:
            self.charge(self.timeout_status, host)
        self._timed_out(details)

    def _hedge(self, attempt: Attempt) -> None:
        """hedge_on_per_try_timeout: start another try and let this one go on."""
        if self.cluster.outlier is not None and attempt.host is not None:
            self.cluster.outlier.local_failure(attempt.host, "timeout")
        policy = self.route.retry
        if self.stream.response_started or attempt.retried or not self.retries or (self.retry is None and (policy is None or not policy.retry_on)):
            return
        verdict = self.retry_state().should_hedge()
        if verdict == retry.RETRY:
            attempt.retried = True
            if self.attempts is None:
                self.attempts = [attempt]
            self.pending_retries += 1
            self._retry_timer = self.router.context.loop.call_later(self.retry_state().backoff(), self._do_retry, True, True)
        elif verdict == retry.NO_OVERFLOW:
            self.stream.flags |= flags.UO
        elif verdict == retry.NO_LIMIT:
            self.stream.flags |= flags.URX

    # -- retries

    def _retry_response(self, attempt: Attempt, head: ResponseHead, end_stream: bool) -> bool:
        state = self.retry_state()
        if attempt.retried:
            verdict = retry.NO_LIMIT if state.would_retry_headers(head) else retry.NO
        else:
            verdict = state.should_retry_headers(head)
            if verdict == retry.RETRY:
                host = attempt.host
                if host is not None:
                    host.rq_error += 1
                self.cluster.stats.charge_prefixed("retry.", head.status)
                if not (end_stream and attempt.sent_all):
                    attempt.cancel()
                return self._start_retry(attempt, verdict)
            if verdict == retry.NO_OVERFLOW:
                self.stream.flags |= flags.UO
            elif verdict == retry.NO_LIMIT:
                self.stream.flags |= flags.URX
        if verdict != retry.NO:
            self._remove(attempt)
            if self._others_in_flight():
                # A bad answer, but another try may still bring a good one.
                if attempt.host is not None:
                    attempt.host.rq_error += 1
                attempt.cancel()
                return True
        return False

    def retry_state(self) -> RetryState:
        """The state of this request's retries, made when it is first needed: most requests succeed."""
        state = self.retry
        if state is None:
            policy = self.route.retry
            state = self.retry = retry.RetryState(
                policy,  # type: ignore[arg-type]  # asked for only where the route has one
                self.cluster,
                self.route.priority,
                self.router.random,
                self.router.context.runtime,
                self.stream.request,
            )
        return state

    def _end_retries(self) -> None:
        self.retries = False
        if self.retry is not None:
            self.retry.finish()
            self.retry = None

    def _start_retry(self, attempt: Attempt, verdict: int, after_timeout: bool = False) -> bool:
        """Begin the back-off when `verdict` allows; otherwise note why not."""
        stream = self.stream
        if verdict != retry.RETRY:
            if verdict == retry.NO_OVERFLOW:
                stream.flags |= flags.UO
            elif verdict == retry.NO_LIMIT:
                stream.flags |= flags.URX
            return False
        self._remove(attempt)
        self.pending_retries += 1
        context = self.lb_context()
        if attempt.host is not None:
            self.retry_state().on_host_attempted(attempt.host)
        context.attempt = stream.attempts
        delay = self.retry_state().backoff()
        if self.route.virtual_cluster is not None:
            self.route.virtual_cluster.count(stream, "upstream_rq_retry")
        self._retry_timer = self.router.context.loop.call_later(delay, self._do_retry, False, after_timeout)
        return True

    def _do_retry(self, hedged: bool, after_timeout: bool) -> None:
        self._retry_timer = None
        if self.done or self.stream.ended:
            return
        self.pending_retries -= 1
        self.is_retry = True
        stream = self.stream
        stream._upstream = None
        stream.attempts += 1
        head = stream.request
        assert head is not None
        if self.route.include_attempt_count_in_request:
            head.set(ATTEMPT_COUNT, b"%d" % stream.attempts)
        if self.route.include_is_timeout_retry_header:
            head.set(b"x-envoy-is-timeout-retry", b"true" if after_timeout else b"false")
        if self.timeout and not self.router.suppress and b"x-envoy-expected-rq-timeout-ms" in head:
            timeouts.refresh_expected(head, self, self.router.clock())
        host = self.retry_state().pick(self.cluster, self.lb_context())
        if host is None:
            self.cluster.stats.upstream_cx_none_healthy.n += 1
            self.charge(503, None)
            if not self._others_in_flight():
                self.fail(replies.NO_HEALTHY_UPSTREAM)
            return
        if hedged or (self.attempts is not None and self in self.attempts):
            attempt: Attempt = Attempt(self, stream)  # this one goes on
        else:
            attempt = self
            self._reset_state()
        if self.attempts is not None:
            self.attempts.append(attempt)
        self.before_try(attempt, host)
        attempt.try_host(host)
        stream.codec.flush()

    def before_try(self, attempt: Attempt, host: Host) -> None:
        """Another try is about to begin."""

    def _cancel_retry(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
            self.pending_retries = 0

    def _in_flight(self) -> list[Attempt]:
        if self.attempts is not None:
            return [attempt for attempt in self.attempts if not attempt.abandoned]
        return [] if self._retry_timer is not None else [self.winner or self]

    def _others_in_flight(self) -> bool:
        return self.pending_retries > 0 or (bool(self.attempts) and any(not attempt.responded and not attempt.abandoned for attempt in self.attempts or ()))

    def _remove(self, attempt: Attempt) -> None:
        if self.attempts is not None and attempt in self.attempts:
            self.attempts.remove(attempt)

    def _drop_others(self, winner: Attempt) -> None:
        for attempt in self.attempts or ():
            if attempt is not winner:
                attempt.cancel()
        self._cancel_retry()
        self.attempts = None
        self._end_retries()

    # -- the end

    def abandon(self) -> None:
        """Stop: the downstream has gone, or was answered otherwise."""
        if self.done:
            return
        self.done = True
        self._stop_timeout()
        self._cancel_retry()
        for attempt in self.attempts or (self.winner or self,):
            attempt.cancel()
        if self.retry is not None:
            self._end_retries()
        if self.mirrors is not None and not self.ended:
            self.mirrors.cancel()

    def _stop_timeout(self) -> None:
        queue = self._queue
        if queue is not None:
            self._queue = None
            queue.started.pop(self.stream, None)

    def charge(self, status: int, host: Host | None, head: ResponseHead | None = None) -> None:
        """Count a response code for the cluster, and an error for the host."""
        stream = self.stream
        if self.router.dynamic_stats and not stream.health_check:
            canary = (host is not None and host.canary) or (head is not None and head.get(b"x-envoy-upstream-canary") == b"true")
            if self.router.suppress_grpc_failures and stream.is_grpc:
                self.cluster.stats.charge_apart(status, stream.is_internal, canary, "" if host is None else host.zone_stat)
            else:
                self.cluster.stats.charge(status, stream.is_internal, canary, "" if host is None else host.zone_stat)
                if stream._locals is not None and (alternative := stream._locals.get("alt_stat")):
                    self.cluster.stats.charge_alternative(f"{alternative}.", status, stream.is_internal, canary)
            virtual_cluster = self.route.virtual_cluster
            if virtual_cluster is not None:
                virtual_cluster.charge(stream, status)
        if host is not None and status >= 500:
            host.rq_error += 1
