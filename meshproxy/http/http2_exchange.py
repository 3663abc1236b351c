"""A request on a downstream HTTP/2 connection: a stream of its session, and the exchange of `http.stream.Stream`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.h2 import errors
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.fields import ShapedRequest
from meshproxy.codec.h2.frames import DEFAULT_FRAME_SIZE
from meshproxy.codec.h2.relay import Relay
from meshproxy.codec.h2.stream import Http2Stream
from meshproxy.codec.headers import RequestHead, ResponseHead
from meshproxy.codec.hpack.encoder import encode_literal
from meshproxy.http import plan as plans
from meshproxy.http.planned_response import SERVICE_TIME
from meshproxy.http.replies import UPGRADE_FAILED, Reply
from meshproxy.http.stream import Stream
from meshproxy.observe import flags
from meshproxy.upstream.http2 import Http2Request

if TYPE_CHECKING:
    from meshproxy.codec.h2.fields import KnownRequest, KnownTrailers
    from meshproxy.codec.hpack.encoder import Encoder
    from meshproxy.http.http2_connection import Http2ServerConnection
    from meshproxy.http.manager import HttpConnectionManager
    from meshproxy.http.planned_response import PlannedResponse
    from meshproxy.net.connection import ConnectionInfo


class _Literals(dict[bytes, bytes]):
    """Value -> a field of one name, encoded for any connection; bounded."""

    __slots__ = ("name",)

    def __init__(self, name: bytes) -> None:
        super().__init__()
        self.name = name

    def __missing__(self, value: bytes) -> bytes:
        if len(self) >= _MAX_LITERALS:
            self.clear()
        field = self[value] = encode_literal(self.name, value)
        return field


_MAX_LITERALS = 1024
_service_times = _Literals(SERVICE_TIME)
_dates = _Literals(b"date")
_CONTINUE = ((b":status", b"100"),)
# What a response that accepts an upgrade says in HTTP/1, and HTTP/2 says otherwise.
_UPGRADE = (b"connection", b"upgrade")
_STATUS = {status: (b":status", b"%d" % status) for status in range(100, 600)}


class Http2Exchange(Http2Stream):
    """Owned by the session while the stream is open; owns its request until that has ended.

    What `Stream` sends as body and trailers goes to the session as it is: `send_data`, `send_trailers` and `queued` are those of `Http2Stream`.
    """

    __slots__ = ("connection", "info", "manager", "stream", "waiting")

    protocol = "HTTP/2"
    head_size = 0

    connection: Http2ServerConnection
    manager: HttpConnectionManager
    info: ConnectionInfo
    stream: Stream | None
    waiting: Any  # a head whose body may be here, too; not set before there is a head

    # -- the session's calls

    def on_head(self, known: Any, end_stream: bool) -> None:
        """HOT"""
        self.waiting = None
        connection = self.connection
        if known.__class__ is ShapedRequest and connection.plans and not connection._discarding:
            if not end_stream:
                self.waiting = known
                connection.waiting.append(self)
                return
            # As `_shaped`, without a body.
            plans = known.plans.get(connection.additions)
            if plans is None or plans.generation != connection.changes.n:
                plans = self.manager.shaped_plans(known, connection.additions)
            plan = None if plans is None else plans.find(known, b"")
            if plan is not None:
                plan.start(self, connection.begin_planned(), b"", known)
                return
            known = known.head()
        elif end_stream and connection.plans and not connection._discarding:
            plan = known.plans.get(connection.additions)
            if plan is not None and plan.generation == connection.changes.n and not plan.bodied and (not plan.hooks or plan is connection.passed):
                plan.start(self, connection.begin_planned(), b"")
                return
        if connection._discarding:
            return
        if connection.plans and self._is_plain(known):
            if end_stream:
                self._whole(known, b"")
            else:
                self.waiting = known
                connection.waiting.append(self)
            return
        self._begin(known, end_stream)

    def _is_plain(self, known: Any) -> bool:
        """HOT: whether a head is one that lanes take. Afterwards `known.plain` says whether that is for not being `RequestHeadPreparer.is_relayed`."""
        connection = self.connection
        preparer = connection.preparer
        if known.protocol is not None:  # of an extended CONNECT
            return False
        if known.plain is preparer or preparer.is_plain(known, known.index, http2=True):
            known.plain = preparer
            plain: bool = known.scheme == connection.additions.scheme  # else it is the client's own choice
            return plain
        return preparer.is_relayed(known, known.index, http2=True)

    def _shaped(self, known: ShapedRequest, body: bytes) -> bool:
        """HOT: a whole request with a head of a known shape. False, and nothing done, where its shape has no plan."""
        connection = self.connection
        plans = known.plans.get(connection.additions)
        if plans is None or plans.generation != connection.changes.n:
            plans = self.manager.shaped_plans(known, connection.additions)
            if plans is None:
                return False
        plan = plans.find(known, body)
        if plan is None:
            return False
        stream = plan.start(self, connection.begin_planned(), body, known)
        if body and not stream.stage:
            self._data(body, True)  # it takes the general way
        return True

    def _whole(self, known: KnownRequest, body: bytes) -> None:
        """HOT: a whole request with a plain head (see `RequestHeadPreparer.is_plain`)."""
        connection = self.connection
        now = connection.begin_planned()
        preparer = connection.preparer
        additions = connection.additions if known.plain is preparer else connection.additions.relayed
        plan = self.manager.plan(known, additions) if known.kept else None
        if plan is None or plan.bodied != bool(body) or len(body) > plan.lane.body_limit:
            stream = plans.start(self, known, body, additions, now)
            plan = None
        elif plan.hooks and plan is not connection.passed:
            stream = plans.start(self, known, body, additions, now)
        else:
            stream = plan.start(self, now, body)
        if body and not stream.stage:
            self._data(body, True)  # it takes the general way
        if plan is not None and stream.stage:
            connection.passed = plan  # every filter let it pass, at once

    def general(self) -> None:
        """The body of a head that waited for it is not here: the general way."""
        known = self.waiting
        if known is not None:
            self.waiting = None
            self._begin(known, end_stream=False)

    def _begin(self, known: Any, end_stream: bool) -> None:
        connection = self.connection
        manager = self.manager
        now = manager.clock()
        if now >= manager.next_second:
            manager.tick(now)
        head = known.head()
        stream = self.stream = manager.stream_class(manager, self, head, now)
        manager.http2_started += 1
        if connection.head_since:
            stream.start, stream.head_end = connection.head_since, now
        if end_stream:
            stream.request_ended = True
            stream.request_end = now
        connection.begin_request(now)
        if manager.has_stream_timers:
            manager.start_timers(stream)
        if head.method == b"CONNECT":
            _accept_connect(stream, head)
        expect = head.get(b"expect")
        if expect is not None and expect.lower() == b"100-continue" and not manager.proxy_100_continue:
            self._inform(_CONTINUE)
        reply = manager.preparer.prepare(stream)
        if reply is not None:
            stream.local_reply(reply)
            return
        stream.begin(end_stream)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        """HOT"""
        known = self.waiting
        if known is not None:
            self.waiting = None
            if end_stream and data:
                if known.__class__ is ShapedRequest:
                    if self._shaped(known, data):
                        return
                    known = known.head()
                    if not self._is_plain(known):
                        self._begin(known, end_stream=False)
                        self._data(data, True)
                        return
                self._whole(known, data)
                return
            self._begin(known, end_stream=False)
        if self.relay is not None:
            self.relay.send(data)
            return
        self._data(data, end_stream)

    def _data(self, data: bytes, end_stream: bool) -> None:
        stream = self.stream
        if stream is not None and not stream.ended:  # else its response, which came early, is still being sent
            stream.on_data(data, end_stream)

    def on_relayed(self, size: int, now: float) -> None:
        stream: Any = self.stream
        stream.bytes_received += size
        stream.last_active = max(stream.last_active, now)

    def on_trailers(self, trailers: KnownTrailers) -> None:
        self.general()
        stream = self.stream
        if stream is not None and not stream.ended:
            stream.on_trailers(trailers.own())

    def on_metadata(self, fields: dict[bytes, bytes]) -> None:
        if hasattr(self, "waiting"):
            self.general()
        stream = self.stream
        if stream is not None and not stream.ended:
            stream.on_metadata(fields)

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        if hasattr(self, "waiting"):
            self.general()
        stream = self.stream
        if remote and code == errors.NO_ERROR and stream is not None and stream.request_ended:
            self.end(0, "")
        else:
            # As for Envoy, a stream that we had to reset because of its head (too long) was reset by the client.
            by_client = code != errors.PROTOCOL_ERROR if remote else code == errors.INTERNAL_ERROR
            self.end(flags.DR if by_client else flags.DPE, details)

    def end(self, flag: int, details: str) -> None:
        """The client is gone, or broke the protocol: nothing can be sent on this stream any more."""
        stream = self.stream
        if stream is None:
            if hasattr(self, "waiting"):
                return
            stream = self.stream = self._broken_stream()
        if stream.ended:  # its response was not taken to the end
            stream.flags |= flag
            stream.details = details or stream.details
            self.connection.stats.downstream_rq_rx_reset.n += 1
            self._completed(stream)
        else:
            stream.on_reset(flag, details or None)

    def on_writable(self, writable: bool) -> None:
        stream = self.stream
        if stream is not None and not self.connection.full:
            stream.on_writable(writable)

    def on_sent(self) -> None:
        self.on_done()

    def on_done(self) -> None:
        stream = self.stream
        if stream is not None and stream.ended:
            self._completed(stream)

    def _broken_stream(self) -> Stream:
        """A stream for a request that could not be parsed: only to be counted and logged."""
        manager = self.connection.manager
        now = manager.clock()
        if now >= manager.next_second:
            manager.tick(now)
        manager.http2_started += 1
        self.connection.begin_request(now)
        return manager.stream_class(manager, self, RequestHead(b"", b"", version=20), now)

    def refuse(self, reply: Reply) -> None:
        """Answer a request whose head does not come to its end."""
        since = self.connection.head_since
        stream = self.stream = self._broken_stream()
        stream.start = since
        stream.local_reply(reply)

    def _completed(self, stream: Stream) -> None:
        """The last of a response was sent, or dropped, some time after `stream` had ended."""
        stream.manager.stream_done(stream)
        self.stream_done(stream)

    # -- the stream's calls

    @property
    def transport(self) -> Any:
        """The connection's."""
        return self.connection.transport

    @property
    def full(self) -> bool:
        """Too much of the response waits to be sent, or of all responses of the connection."""
        return self._warned or self.connection.full

    def send_informational(self, head: ResponseHead) -> None:
        """As Envoy, passed on only where 100-continue is proxied."""
        if self.connection.manager.proxy_100_continue:
            self._inform((_STATUS[head.status], *head.items))

    def _inform(self, items: Any) -> None:
        for counter in self.connection.stats.by_class[1]:
            counter.n += 1
        super().send_headers(items, end_stream=False)

    def send_headers(self, stream: Stream, head: ResponseHead, end_stream: bool) -> None:  # type: ignore[override]  # that one is the session's, and only we call it
        """The response's head."""
        connection = self.connection
        manager = connection.manager
        if not stream.request_ended:
            connection.stats.downstream_rq_response_before_rq_complete.n += 1
            if self.remote_closed:  # its end came with its head, which had waited for it: as Envoy, a reset, though there is nothing to send one for
                connection.stats.downstream_rq_rx_reset.n += 1
        if manager.drain_close():
            connection.announce_drain()
        status = head.status
        items = head.items
        if stream.upgrade is not None:
            if stream.details == UPGRADE_FAILED.details:
                connection.begin_drain()  # as Envoy
            items = [pair for pair in items if pair[0] not in _UPGRADE]
            if status == 101:
                status = 200
        if manager.logs_times:
            stream.response_start = manager.clock()
        if not self.local_closed:
            self.send_block(self.session.encoder.encode([_STATUS.get(status) or (b":status", b"%d" % status), *items]), end_stream)
        if not end_stream:
            if connection.full:
                stream.on_writable(False)
            self._relay(stream)

    def _relay(self, stream: Stream) -> None:
        """Both heads are through: where nobody looks at data in between, it goes on from stream to stream."""
        forwarding, chain = stream.forwarding, stream.chain
        if forwarding is None or stream.tunnel or chain.request_data or chain.response_data:
            return
        attempt = forwarding.winner
        if attempt is None or forwarding.keeps_body or forwarding.tunnel or forwarding.route.per_try_idle_timeout:
            return
        exchange = attempt.exchange
        if exchange.__class__ is Http2Request and stream._request_hold is None and stream._response_hold is None:
            if not self.remote_closed:
                Relay(self, exchange, self.manager.clock)
            if not exchange.remote_closed:
                Relay(exchange, self, self.manager.clock)

    def send_whole(self, stream: Stream, head: ResponseHead, body: bytes) -> None:
        """HOT: a whole response with a content length."""
        self.send_headers(stream, head, not body)
        if body:
            self.send_data(body, True)

    def takes(self, size: int) -> bool:
        """HOT: see `PlanExchange`."""
        session = self.session
        return (
            self.queue is None
            and size <= self.send_window
            and size <= session.send_window
            and size <= DEFAULT_FRAME_SIZE
            and session.writable
            and not self.connection.ending
        )

    def answer(
        self,
        response: PlannedResponse,
        service_time: bytes,
        body: bytes,
        trailers: KnownTrailers | None,
        now: float,
        values: tuple[bytes, ...] | None = None,
    ) -> None:
        """HOT: see `PlanExchange`."""
        self.stream = None
        connection = self.connection
        connection.idle_since = now
        connection.ended += 1
        session = self.session
        if self.remote_closed:  # as Session.forget: a planned stream was never paused, so nothing has to be granted for it
            del session.streams[self.id]
        encoder = session.encoder
        date = self.manager.date
        if values is None:
            known = encoder.whole.get(response)
            if known is None or known[0] is not date:
                known = self._encode(encoder, response, date)
            _, block, rest = known
            time = _service_times[service_time] if response.timed else b""
        else:
            block = response.block(encoder, values, service_time, date)  # type: ignore[attr-defined]  # a ShapedResponse
            time = rest = b""
        if trailers is not None:
            block += time + rest
            items = trailers.items
            if items:
                end = (encoder.blocks.get(trailers) or encoder.encode_known(trailers, items)) if trailers.kept else encoder.encode(items)
                self.send_with_trailers(block, body, end)
            else:
                self.send_block(block, False)
                self.send_data(body, True)
        elif body:
            self.send_message(block, time, rest, body)
        else:
            self.send_whole_head(block, time, rest)

    def _encode(self, encoder: Encoder, response: PlannedResponse, date: bytes) -> tuple[bytes, bytes, bytes]:
        """The block of `response`, in two parts if the service time comes between them; with the date that is in it."""
        before, between, after = response.before, response.between, response.after
        block = encoder.blocks.get(before) or encoder.encode_known(before, before.pairs)
        rest = b""
        parts = [before]
        if between.pairs:
            rest += encoder.blocks.get(between) or encoder.encode_known(between, between.pairs, begun=bool(block) or response.timed)
            parts.append(between)
        if response.dated:
            rest += _dates[date]
            if after.pairs:
                rest += encoder.blocks.get(after) or encoder.encode_known(after, after.pairs, begun=True)
                parts.append(after)
        known = (date, block, rest) if response.timed else (date, block + rest, b"")
        encoder.keep(response, known, parts)
        return known

    def leave_plan(self, received: int) -> None:
        """See `PlanExchange`: bytes are counted as they come."""

    def flush(self) -> None:
        """The connection's output goes out by itself."""

    def pause_reading(self) -> None:
        """Grant the client no more than it has. Idempotent."""
        if not self.paused:
            self.connection.stats.downstream_flow_control_paused_reading_total.n += 1
            self.pause()

    def resume_reading(self) -> None:
        """Grant it more again. Idempotent."""
        if self.paused:
            self.connection.stats.downstream_flow_control_resumed_reading_total.n += 1
            self.resume()

    def watch_stream(self, seconds: float) -> None:
        """The stream's idle timeout is `seconds`."""
        self.connection.watch_stream(seconds)

    def discard_request(self) -> None:
        """Nothing to be done: what is left of the request is refused once the response is sent."""

    def linger(self, stream: Stream) -> None:
        """The client has to take the rest of the response in time."""
        stream.last_active = self.manager.clock()
        timeout = self.manager.flush_timeout(stream)
        if timeout:
            self.connection.watch_stream(timeout)

    def reset_stream(self, stream: Stream) -> None:
        """RST_STREAM."""
        self._reset(stream, errors.INTERNAL_ERROR)

    def stream_done(self, stream: Stream) -> None:
        """Count the stream out. A request that goes on after its response is told to stop (RFC 9113 8.1)."""
        self.stream = None
        if not self.remote_closed:
            self.connection.stats.downstream_rq_rx_reset.n += 1
            self._reset(stream, errors.NO_ERROR)
        self.connection.request_done(stream)

    def _reset(self, stream: Stream, code: int) -> None:
        """RST_STREAM, where a tunnel has ended with its upstream's connection with the code that says so (RFC 9113 8.5)."""
        broken = stream.upgrade is not None and stream.flags & (flags.UF | flags.UC)
        try:
            self.reset(errors.CONNECT_ERROR if broken else code)
        except Http2Error as error:
            self.connection.flooded(error)


def _accept_connect(stream: Stream, head: RequestHead) -> None:
    """CONNECT; an extended one (RFC 8441) is from here on the upgrade that it would be in HTTP/1."""
    protocol = head.protocol
    if protocol is None:
        stream.upgrade = b"CONNECT"
        return
    stream.upgrade = protocol
    head.method = b"GET"
    head.protocol = None
    head.add(b"upgrade", protocol)
    head.add(b"connection", b"upgrade")
