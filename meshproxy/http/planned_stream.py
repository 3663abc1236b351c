"""A stream on the short way (`http.plan`), and how it becomes an ordinary one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.http.forwarding import Forwarding
from meshproxy.http.stream import Stream

if TYPE_CHECKING:
    from meshproxy.codec.headers import Headers
    from meshproxy.http.lane import Lane
    from meshproxy.http.plan import Plan
    from meshproxy.http.planned_response import PlannedResponse

# Where a planned stream is: its filters run; its request has gone upstream; its response has gone downstream.
FILTERS, UPSTREAM, ANSWERED = range(3)


class PlannedStream(Stream):
    """A stream on the short way; see the module's docstring. Only this module sets its attributes."""

    __slots__ = ()

    @property
    def protocol(self) -> str:  # type: ignore[override]  # to be asked is no reason to leave the plan
        return self.codec.protocol

    lane: Lane
    plan: Plan | None
    body: bytes
    stage: int
    connected: Any  # upstream.pool.PlanExchange
    request_id: bytes
    known: Any  # ShapedRequest (codec.h1.shapes, codec.h2.fields), where the plan is http.shape_plan.ShapedPlan
    # The response, milliseconds, bytes of its body, its trailers; lane and plan, the exchanges upstream and downstream, bytes of the request's body; the values
    # in its head, if that has a shape.
    answer: tuple[PlannedResponse, int, int, Headers | None, Lane, Plan | None, Any, Any, int, tuple[bytes, ...] | None]
    facts: tuple[Any, ...] | None

    def __getattr__(self, name: str) -> Any:
        """Somebody asks for what the short way does not set: be an ordinary stream from here on."""
        self.leave_plan()
        return getattr(self.forwarding if name in _OF_ATTEMPTS else self, name)

    def leave_plan(self) -> None:
        """Become what it would be on the general way, wherever it is."""
        stage, lane, plan = self.stage, self.lane, self.plan
        # As in Stream.__init__; what those who make plans have set stays.
        self._request_hold = self._response_hold = self._timers = self.upgrade = self.forwarding = self.facts = None
        self.close_connection = self.tunnel = False
        self.flags = 0
        body = self.body
        if stage == FILTERS and body:  # comes after the head
            self.bytes_received, self.request_ended, self.request_end = 0, False, 0.0
        else:
            self.bytes_received, self.request_ended, self.request_end = len(body), True, self.start
        if plan is not None:
            if stage == FILTERS and plan.new_id is not None and not plan.decided:
                self.request_id = plan.new_id()
            self.request = plan.head(self, plan.filtered if stage == FILTERS else plan.finished)
            self.route, self.chain, self.is_internal = lane.route, lane.chain, lane.internal
            if plan.decided:
                plan.restore(self)  # type: ignore[attr-defined]  # http.traced_plan.TracedPlan
            if lane.chain.shaper is not None:
                self.peer_said, self.downstream_peer = lane.said, plan.peer
        if stage == FILTERS:
            self._before_sending(plan)
            self.__class__ = self.manager.stream_class  # type: ignore[assignment]
            return
        self.cluster = lane.cluster
        self._upstream = connected = self.connected
        self.host = connected.host
        self.upstream_start = self.upstream_sent = self.start
        self.attempts = 1
        if stage == UPSTREAM:
            self._nothing_back()
            self.codec.leave_plan(0)
            self.__class__ = self.manager.stream_class  # type: ignore[assignment]
            router = lane.manager.router
            self.forwarding = router.forwarding_class.under_way(router, self, connected, body, lane.queue, lane.queue_per_try)
        else:
            self._finished()
            self.__class__ = self.manager.stream_class  # type: ignore[assignment]

    def _before_sending(self, plan: Plan | None) -> None:
        """The filters run; nothing was counted yet."""
        self.cluster = self.host = self._upstream = None
        self.attempts = self.upstream_bytes_sent = 0
        self.upstream_start = self.upstream_sent = 0.0
        self._nothing_back()
        self.manager.count_started(self.codec.protocol)
        if plan is not None:
            self.codec.leave_plan(plan.received)

    def _nothing_back(self) -> None:
        self.response = self.details = None
        self.ended = self.response_started = False
        self.status = self.bytes_sent = self.upstream_bytes_received = 0
        self.upstream_first = self.upstream_last = self.response_start = 0.0

    def _finished(self) -> None:
        """The response went downstream: for those who want to know what it was."""
        response, milliseconds, size, self.response_trailers, *_, values = self.answer
        known = response.known
        self.ended = self.response_started = True
        self.details = "via_upstream"
        self.status = known.status
        self.bytes_sent = size
        self.upstream_bytes_received = known.size + size + (0 if values is None else sum(map(len, values)))
        self.upstream_first = self.upstream_last = self.response_start = self.end
        time = b"%d" % milliseconds if response.timed else b""
        date = self.manager.date if response.dated else b""
        self.response = response.head(time, date, values)


_OF_ATTEMPTS = frozenset(name for name in dir(Forwarding) if name.startswith("on_")) | {"stream"}
