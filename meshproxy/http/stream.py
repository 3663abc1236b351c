"""One request and its response, from the downstream codec's first call to the access log.

The request runs through the filters of its route's chain to the router; the response comes back through the filters in reverse to the codec. Everything
is plain calls until a filter returns an awaitable: then only this stream is held (`Hold`), what arrives meanwhile waits in a queue, and the walk goes on
where it stopped.

Ownership: the exchange with the downstream (`codec`) owns the stream; the stream owns its `forwarding` (the router's part) and its tasks. `ended` is set once;
after that nothing may touch the downstream side through this stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.codec.grpc import is_content_type
from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.http.filter_chain import EMPTY, HOLD
from meshproxy.http.hold import DATA, TRAILERS, Buffering, Hold
from meshproxy.http.replies import Reply
from meshproxy.observe import flags
from meshproxy.observe.stream_info import StreamInfo

if TYPE_CHECKING:
    from meshproxy.http.exchange import Exchange
    from meshproxy.http.manager import HttpConnectionManager

_PROTOCOLS = {10: "HTTP/1.0", 11: "HTTP/1.1", 20: "HTTP/2"}
UNCHOSEN: Any = object()  # in place of a host
ANEW: Any = object()  # what a filter's awaitable is answered with when the request is to begin anew: there may be another route, with other filters
TAKEN: Any = object()  # what a filter returns that is the router of its chain: the connection manager's own has nothing to do


class Stream(StreamInfo):
    """A downstream request in flight. Filters see this object; see `docs/filters.md`."""

    # What every request sets or reads is a slot, filled in __init__; the rest are defaults of this class and its base, and cost a stream nothing.
    __slots__ = (
        "_request_hold",
        "_response_hold",
        "_timers",
        "_upstream",
        "answer",  # this, `body` and the others that __init__ does not set belong to http.plan
        "attempts",
        "body",
        "bytes_received",
        "bytes_sent",
        "chain",
        "close_connection",
        "cluster",
        "codec",
        "connected",
        "connection",
        "details",
        "end",
        "ended",
        "facts",
        "flags",
        "forwarding",
        "host",
        "is_internal",
        "known",
        "lane",
        "last_active",
        "manager",
        "plan",
        "request",
        "request_end",
        "request_ended",
        "request_id",
        "response",
        "response_start",
        "response_started",
        "route",
        "stage",
        "start",
        "status",
        "tunnel",
        "upgrade",
        "upstream_bytes_received",
        "upstream_bytes_sent",
        "upstream_first",
        "upstream_last",
        "upstream_sent",
        "upstream_start",
    )

    health_check: bool = False
    idle_timeout: float = 0.0
    upgrading: bool = False  # its upgrade was allowed, and is counted as active
    echoes_request_id: bool = False  # x-envoy-force-trace: the response names the request's id
    replies_grpc: bool | None = None  # whether local replies are gRPC, where a filter has changed the request's content type; None: `is_grpc` says so
    _locals: dict[Any, Any] | None = None
    _held: int | None = None  # a filter keeps the response's head: where the walk goes on

    def __init__(self, manager: HttpConnectionManager, codec: Exchange, head: RequestHead, now: float) -> None:
        self.manager = manager
        self.codec = codec
        self.connection = codec.info
        self.request: RequestHead | None = head
        self.response: ResponseHead | None = None
        self.start = self.last_active = now
        self.request_end = 0.0
        self.upstream_start = self.upstream_sent = self.upstream_first = self.upstream_last = self.response_start = self.end = 0.0
        self.chain = EMPTY
        self.route: Any = None
        self.cluster: Any = None
        self.host: Any = None
        self.forwarding: Any = None  # http.forwarding.Forwarding, from the moment that the router took the request
        self.details: str | None = None
        self.facts = None
        self.status = self.flags = self.attempts = 0
        self.bytes_received = self.bytes_sent = self.upstream_bytes_sent = self.upstream_bytes_received = 0
        self.request_ended = False  # the downstream has sent everything
        self.response_started = False  # response headers went to the codec
        self.ended = False
        self.upgrade: bytes | None = None  # the upgrade that was asked for; b"CONNECT" for that method
        self.tunnel = False  # after a successful upgrade or CONNECT: bytes, no messages
        self.close_connection = False  # close the downstream connection after this response
        self.is_internal = False
        self._request_hold: Hold | None = None
        self._response_hold: Hold | None = None
        self._timers: list[Any] | None = None
        self._upstream: Any = None

    # -- what filters use

    @property
    def locals(self) -> dict[Any, Any]:
        """A filter's own data for this stream: `stream.locals[self] = ...`."""
        value = self._locals
        if value is None:
            value = self._locals = {}
        return value

    @property
    def start_wall(self) -> float:  # type: ignore[override]  # derived here, plain data for TCP sessions
        return self.start + self.manager.wall_offset

    @property
    def protocol(self) -> str:  # type: ignore[override]  # derived here, plain data for TCP sessions
        """The version of HTTP, as logs name it."""
        request = self.request
        assert request is not None
        return _PROTOCOLS[request.version]

    @property
    def is_grpc(self) -> bool:
        """Whether the request is gRPC by its content type."""
        request = self.request
        assert request is not None
        return is_content_type(request.get(b"content-type"))

    @property
    def content_length(self) -> int | None:
        """The request's declared length."""
        assert self.request is not None
        value = self.request.get(b"content-length")
        return None if value is None else int(value)

    def clear_route_cache(self) -> None:
        """Choose the route anew, after a filter changed what routes look at. The filters that run are those of the first choice, as in Envoy."""
        self.route_changes += 1
        self.route = self.manager.match(self)

    async def buffered_request(self, limit: int, *, partly: bool = False) -> bool:
        """Wait until the whole request body is here; False when it is over `limit` bytes. For filters that hold the stream in `request_headers`.

        `partly`: or until `limit` bytes of it are here, which is no failure.
        """
        hold = self._request_hold
        assert hold is not None
        if self.request_ended:
            return partly or not hold.over(limit)
        buffering = Buffering(limit, asyncio.get_running_loop().create_future(), partly)
        hold.watch(buffering)
        hold.limit = max(limit, hold.limit)
        try:
            return await buffering.done
        finally:
            hold.unwatch()

    def buffered_body(self, limit: int) -> tuple[bytes, bool]:
        """What is here of the body while a filter holds the stream: `limit` bytes at most, and whether there is more."""
        assert self._request_hold is not None
        return self._request_hold.body(limit)

    def release_headers(self) -> None:
        """Let the response's head go on that this filter kept (`HOLD`). What the hook returns from which this is called follows it."""
        position, self._held = self._held, None
        assert position is not None, "no head is held"
        self._response_headers(position, False)

    def reply(self, reply: Reply) -> None:
        """Answer by ourselves, at any time before the response has started; later it resets the stream."""
        self.local_reply(reply)

    # -- the request comes in

    def begin(self, end_stream: bool) -> None:
        """Run a request whose head was prepared through its route's filters to the router."""
        self.route = self.manager.match(self)
        self.go(end_stream)

    def go(self, end_stream: bool) -> None:
        """The same when the route is chosen."""
        manager = self.manager
        route = self.route
        chain = self.chain = manager.chains.get(route) or manager.compile_chain(route)
        if chain.admission or self.upgrade is not None:
            reply = manager.admit(self)
            if reply is not None:
                self.local_reply(reply)
                return
            chain = self.chain  # an upgrade may have filters of its own
        if chain.request_headers:
            self._request_headers(0, end_stream)
            return
        reply = manager.router.start(self, end_stream)
        if reply is not None:
            self.local_reply(reply)

    def forward(self, end_stream: bool, host: Any = UNCHOSEN, *, finalized: bool = False) -> None:
        """Hand a request whose filters are done to the router; see `Router.start`."""
        reply = self.manager.router.start(self, end_stream, host, finalized)
        if reply is not None:
            self.local_reply(reply)

    def _request_headers(self, position: int, end_stream: bool) -> None:
        # HOT
        hooks = self.chain.request_headers
        for hook in hooks[position:] if position else hooks:
            position += 1
            result = hook(self, end_stream)
            if result is not None:
                self._hold_headers(result, position, end_stream)
                return
        if not self.ended:
            self.forward(end_stream)

    def _hold_headers(self, result: Any, position: int, end_stream: bool) -> None:
        # A function of its own: the closure would make the variables of the hot loop cells.
        if result is not TAKEN:
            self._intercept(result, lambda value: self._request_headers(position, end_stream) if value is not ANEW else self.begin(end_stream))

    def on_data(self, data: bytes, end_stream: bool) -> None:
        """Request body from the codec."""
        self.bytes_received += len(data)
        self.last_active = now = self.manager.clock()
        if end_stream:
            self._request_complete(now)
        hold = self._request_hold
        if hold is not None:
            hold.put(DATA, data, end_stream)
        elif not self.response_started or self.tunnel or not self.ended:
            self._request_data(0, data, end_stream)

    def _request_data(self, position: int, data: bytes, end_stream: bool) -> bool:
        """Walk; whether a filter has stopped it, to wait or to reply."""
        hooks = self.chain.request_data
        count = len(hooks)
        while position < count:
            result = hooks[position](self, data, end_stream)
            position += 1
            if result is None:
                continue
            if type(result) is bytes:
                data = result
            elif result is HOLD:
                return False
            else:
                before = data
                return self._intercept(result, lambda value: self._request_data(position, before if value is None else value, end_stream))
        if self.forwarding is not None:
            self.forwarding.data(data, end_stream)
        return False

    def on_trailers(self, trailers: Headers) -> None:
        """Request trailers from the codec: the request's end."""
        self.request_trailers = trailers
        self._request_complete(self.manager.clock())
        hold = self._request_hold
        if hold is not None:
            hold.put(TRAILERS, trailers, True)
        else:
            self._request_trailers(0, trailers)

    def _request_trailers(self, position: int, trailers: Headers, result: Any = None) -> None:
        """`result`: of the hook before `position`."""
        hooks = self.chain.request_trailers
        while True:
            if result and self._request_data(self.chain.request_data_after[position - 1], result, False):
                if self._request_hold is not None:
                    self._request_hold.put(TRAILERS, trailers, True, position)
                return
            if position == len(hooks):
                break
            result = hooks[position](self, trailers)
            position += 1
            if result is not None and type(result) is not bytes:
                self._intercept(result, lambda value: self._request_trailers(position, trailers, value))
                return
        if self.forwarding is not None:
            self.forwarding.trailers(trailers)

    def on_metadata(self, fields: dict[bytes, bytes]) -> None:
        """A map from the codec, for the upstream: no filter looks at it. While there is no upstream yet, it waits."""
        self.last_active = self.manager.clock()
        forwarding = self.forwarding
        if forwarding is None:
            self.locals.setdefault("metadata", []).append(fields)
        else:
            forwarding.metadata(fields)

    def _request_complete(self, now: float) -> None:
        self.request_ended = True
        self.request_end = now

    # -- waiting

    def _intercept(self, result: Any, resume: Callable[[Any], Any]) -> bool:
        """A request hook answered with something: reply, or hold the stream until the awaitable is done. True: the walk stops here."""
        if type(result) is Reply:
            self.local_reply(result)
            return True
        hold = self._request_hold
        if hold is None:
            hold = self._request_hold = Hold(self, self._replay_request, self.manager.buffer_limit)
        hold.wait(result, resume)
        return True

    def _intercept_response(self, result: Any, resume: Callable[[Any], Any]) -> bool:
        if type(result) is Reply:
            self.local_reply(result, replace=True)
            return True
        hold = self._response_hold
        if hold is None:
            hold = self._response_hold = Hold(self, self._replay_response, self.manager.buffer_limit)
        hold.wait(result, resume)
        return True

    def _replay_request(self, kind: int, payload: Any, end_stream: bool, position: int) -> None:
        if kind == DATA:
            self._request_data(position, payload, end_stream)
        else:
            self._request_trailers(position, payload)

    def _replay_response(self, kind: int, payload: Any, end_stream: bool, position: int) -> None:
        if kind == DATA:
            self._response_data(position, payload, end_stream)
        else:
            self._response_trailers(position, payload)

    def release_hold(self, hold: Hold) -> None:
        """A hold has replayed everything: back to plain calls."""
        if self._request_hold is hold:
            self._request_hold = None
        elif self._response_hold is hold:
            self._response_hold = None

    def pause_request(self) -> None:
        """Stop reading the request: someone further on is full."""
        self.codec.pause_reading()

    def resume_request(self) -> None:
        """Read on."""
        self.codec.resume_reading()

    # -- the response goes out

    def informational(self, head: ResponseHead) -> None:
        """Pass a 1xx response on."""
        if not self.response_started and not self.ended:
            self.codec.send_informational(head)

    def send_headers(self, head: ResponseHead, end_stream: bool) -> None:
        """The response's head, from the router: through the filters in reverse, then to the codec."""
        self.response = head
        self.last_active = self.manager.clock()
        hooks = self.chain.response_headers
        if hooks:
            self._response_headers(0, end_stream)
        else:
            self._encode_headers(head, end_stream)

    def _response_headers(self, position: int, end_stream: bool) -> None:
        hooks = self.chain.response_headers
        count = len(hooks)
        while position < count:
            result = hooks[position](self, end_stream)
            position += 1
            if result is HOLD:
                self._held = position
                if end_stream:
                    self._response_data(self.chain.response_data_at[position - 1], b"", True)
                return
            if result is not None and self._intercept_response(result, lambda _: self._response_headers(position, end_stream)):
                return
        assert self.response is not None
        self._encode_headers(self.response, end_stream)

    def _encode_headers(self, head: ResponseHead, end_stream: bool) -> None:
        if self.ended:
            return
        self.status = head.status
        self.response_started = True
        self.manager.finish_response_head(self, head)
        self.codec.send_headers(self, head, end_stream)
        if end_stream:
            self.finish()

    def send_whole(self, head: ResponseHead, body: bytes) -> None:
        """HOT: a complete response from the router in one piece."""
        chain = self.chain
        if chain.response_headers or chain.response_data or self._response_hold is not None:
            self.send_headers(head, not body)
            if body and not self.ended:
                self.send_data(body, True)
            return
        if self.ended:
            return
        self.response = head
        self.status = head.status
        self.response_started = True
        self.bytes_sent = len(body)
        self.manager.finish_response_head(self, head)
        self.codec.send_whole(self, head, body)
        self.finish()

    def send_data(self, data: bytes, end_stream: bool) -> None:
        """Response body from the router."""
        self.last_active = self.manager.clock()
        hold = self._response_hold
        if hold is not None:
            hold.put(DATA, data, end_stream)
        elif self.chain.response_data:
            self._response_data(0, data, end_stream)
        else:
            self._encode_data(data, end_stream)

    def _response_data(self, position: int, data: bytes, end_stream: bool) -> bool:
        """Walk; whether a filter has stopped it, to wait or to reply."""
        hooks = self.chain.response_data
        count = len(hooks)
        while position < count:
            result = hooks[position](self, data, end_stream)
            position += 1
            if result is None:
                pass
            elif type(result) is bytes:
                data = result
            elif result is HOLD:
                return False
            else:
                before = data
                return self._intercept_response(result, lambda value: self._response_data(position, before if value is None else value, end_stream))
            if end_stream and self.response_trailers is not None:
                return self._go_on_with_trailers(position, data)
            if self._head_waits:
                self._response_hold.put_back(DATA, data, end_stream, position)  # type: ignore[union-attr]  # that is what it says
                return True
        self._encode_data(data, end_stream)
        return False

    def _go_on_with_trailers(self, position: int, data: bytes) -> bool:
        """The data hook before `position` has added trailers: `data` is not the end any more."""
        trailers = self.response_trailers
        assert trailers is not None
        after = self.chain.response_trailers_after[position - 1]
        stopped = self._head_waits
        if stopped:
            self._response_hold.put_back(DATA, data, False, position)  # type: ignore[union-attr]  # that is what it says
        else:
            stopped = self._response_data(position, data, False)
        if not stopped:
            self._response_trailers(after, trailers)
        elif self._response_hold is not None:
            self._response_hold.put(TRAILERS, trailers, True, after)
        return stopped

    @property
    def _head_waits(self) -> bool:
        """Whether a hook has let the head go (`release_headers`) and a later filter holds it up: then what follows it waits too."""
        return not self.response_started and self._held is None and self._response_hold is not None

    def _encode_data(self, data: bytes, end_stream: bool) -> None:
        if self.ended:
            return
        self.bytes_sent += len(data)
        self.codec.send_data(data, end_stream)
        if end_stream:
            self.finish()

    def send_trailers(self, trailers: Headers) -> None:
        """Response trailers from the router: the response's end."""
        self.response_trailers = trailers
        hold = self._response_hold
        if hold is not None:
            hold.put(TRAILERS, trailers, True)
        else:
            self._response_trailers(0, trailers)

    def _response_trailers(self, position: int, trailers: Headers, result: Any = None) -> None:
        """`result`: of the hook before `position`."""
        hooks = self.chain.response_trailers
        while True:
            stopped = self._head_waits
            if result:
                after = self.chain.response_data_after[position - 1]
                if stopped:
                    self._response_hold.put_back(DATA, result, False, after)  # type: ignore[union-attr]  # that is what it says
                else:
                    stopped = self._response_data(after, result, False)
            if stopped:
                if self._response_hold is not None:
                    self._response_hold.put(TRAILERS, trailers, True, position)
                return
            if position == len(hooks):
                break
            result = hooks[position](self, trailers)
            position += 1
            if result is not None and type(result) is not bytes:
                self._intercept_response(result, lambda value: self._response_trailers(position, trailers, value))
                return
        if self.ended:
            return
        if trailers.items:
            self.codec.send_trailers(trailers)
        else:
            self.codec.send_data(b"", True)
        self.finish()

    # -- local replies

    def local_reply(self, reply: Reply, *, replace: bool = False, finalize: Callable[[Stream], None] | None = None) -> None:
        """Send `reply` through the response filters (unless `replace`, when one of them made it). Too late for a reply: reset the stream.

        `finalize`: a route's mutations of the head of its own direct response.
        """
        if self.ended:
            return
        self.flags |= reply.flag
        self.details = reply.details
        # As in Envoy, the filters do not see a reply in place of a response that is on its way through them.
        replace = replace or self._held is not None or self._response_hold is not None
        self._held = None
        self._drop_holds()
        if self.forwarding is not None:
            self.forwarding.abandon()
        if self.response_started:
            self.reset()
            return
        if reply.close or (reply.status == 400 and self._bad_request_closes()):
            self.close_connection = True
        if reply.early and self.request.version < 20:  # type: ignore[union-attr]  # being answered
            self.request_ended = False
        head, body = self.manager.render_reply(self, reply, finalize)
        if not self.request_ended and self._discards_request():
            self.codec.discard_request()
        self.response = head
        self.status = head.status
        if self.cluster is None and self.route is not None:
            self.cluster = self.manager.router.cluster_of(self)  # where it would have gone: logs say so
        if replace:
            self._encode_headers(head, not body)
            if body:
                self._encode_data(body, True)
            return
        self.send_headers(head, not body)
        if body and not self.ended:
            self.send_data(body, True)

    def _bad_request_closes(self) -> bool:
        """As Envoy: to HTTP/1, a bad request says that the two sides do not mean the same, whoever found that out."""
        assert self.request is not None
        return self.request.version < 20 and self.manager.options.closes_on_bad_request

    def _discards_request(self) -> bool:
        return not self.tunnel

    # -- the end

    def reset(self) -> None:
        """End at once without a proper response: the downstream connection is closed."""
        if not self.ended:
            stats = self.manager.stats
            stats.downstream_rq_tx_reset.n += 1
            stats.downstream_rq_rx_reset.n += 1
            self.codec.reset_stream(self)
            self.finish()

    def on_reset(self, flag: int, details: str | None) -> None:
        """The downstream went away, or broke the protocol."""
        if self.ended:
            return
        self.flags |= flag
        self.details = details
        if self.cluster is None and self.route is not None:  # a filter holds it
            self.cluster = self.manager.router.cluster_of(self)
        self.manager.stats.downstream_rq_rx_reset.n += 1
        self.finish()

    def on_idle(self) -> None:
        """Nothing moved for the stream idle timeout."""
        self.manager.stats.downstream_rq_idle_timeout.n += 1
        self.timed_out("stream timeout", "stream_idle_timeout", flags.SI)

    def timed_out(self, body: str, details: str, flag: int, *, grpc_status: int | None = None) -> None:
        """One of the connection manager's timers: 408 while the request is incomplete, else 504; a reset when the response has started."""
        self.local_reply(
            Reply(504 if self.request_ended else 408, body.encode(), details=details, flag=flag, grpc_status=grpc_status, close=not self.request_ended)
        )

    @property
    def upstream(self) -> Any:
        """The upstream connection's addresses and TLS (net.connection.ConnectionInfo), or None: made from the connection when somebody asks."""
        connection = self._upstream
        return None if connection is None else connection.info

    @property
    def upstream_protocol(self) -> str | None:  # type: ignore[override]  # derived here
        """The version of HTTP that the upstream was spoken to with."""
        exchange = self._upstream
        return None if exchange is None else exchange.protocol

    def finish(self) -> None:
        """The stream is over: release what it holds, count it, log it. Once."""
        if self.ended:
            return
        self.ended = True
        if self._request_hold is not None or self._response_hold is not None:
            self._drop_holds()
        forwarding = self.forwarding
        if forwarding is not None:
            if not forwarding.done:
                forwarding.abandon()
            # No cycles are left behind: a stream is freed when its last reference goes, not when the collector comes by.
            self.forwarding = forwarding.owner = forwarding.winner = forwarding.attempts = None
        if self._timers is not None:
            for timer in self._timers:
                timer.cancel()
        codec = self.codec
        if codec.queued:
            codec.linger(self)
            return
        self.manager.stream_done(self)
        codec.stream_done(self)

    def add_timer(self, handle: Any) -> None:
        """A timer to cancel when the stream ends."""
        if self._timers is None:
            self._timers = []
        self._timers.append(handle)

    def _drop_holds(self) -> None:
        for hold in (self._request_hold, self._response_hold):
            if hold is not None:
                hold.cancel()
        self._request_hold = self._response_hold = None

    def on_writable(self, writable: bool) -> None:
        """The downstream's write buffer crossed its watermark."""
        if self.forwarding is not None:
            self.forwarding.downstream_writable(writable)

    def __repr__(self) -> str:
        request = self.request
        state = "ended" if self.ended else "responding" if self.response_started else "waiting"
        return f"<Stream {request.method!r} {request.path!r} {state}>" if isinstance(request, RequestHead) else "<Stream>"
