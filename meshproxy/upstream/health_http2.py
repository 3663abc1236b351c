"""Health checks over HTTP/2: `http_health_check` with `codec_client_type: HTTP2`, and `grpc_health_check` (grpc.health.v1.Health/Check)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from meshproxy.codec import grpc
from meshproxy.codec.h2 import errors as h2_errors
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.session import Session
from meshproxy.codec.h2.settings import Options
from meshproxy.codec.h2.stream import Http2Stream
from meshproxy.codec.headers import ResponseHead
from meshproxy.net import dial
from meshproxy.observe.http2_stats import Http2Stats
from meshproxy.upstream.health import Outcome, Target
from meshproxy.upstream.health_headers import add_headers

if TYPE_CHECKING:
    from meshproxy.codec.headers import Headers, Pair
    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.health_probe import HttpConfig, Prober, Verdict
    from meshproxy.upstream.options import ClusterOptions

ALPN = ("h2",)  # offered where neither the check nor the cluster's TLS context names protocols
_METHOD_AND_PATH = (b":method", b"POST"), (b":path", b"/grpc.health.v1.Health/Check")
_SERVING = 1
_MAX_BODY = 65536  # bytes of a gRPC answer, which has one number to say


def codec_options(options: ClusterOptions, scope: Scope) -> Options:
    """The codec's options of a cluster, with statistics in `scope` (`cluster.<name>.`)."""
    return Options(**options.http2, stats=Http2Stats(scope.scope("http2.")))


class Answer(Http2Stream):
    """One question and what comes back. `whole` is done when all of it is here, or when `enough` is."""

    __slots__ = ("body", "enough", "head", "limit", "trailers", "whole")

    def __init__(self, session: Session, limit: int, enough: Callable[[Answer], bool]) -> None:
        super().__init__(session)
        self.limit = limit
        self.enough = enough
        self.head: ResponseHead | None = None
        self.body = b""  # at most `limit` bytes of it
        self.trailers: Headers | None = None
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_head(self, known: Any, end_stream: bool) -> None:
        if known.final:
            self.head = known.head()
            self._note(end=end_stream)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        self.body += data[: self.limit - len(self.body)]
        self._note(end=end_stream)

    def on_trailers(self, trailers: Headers) -> None:
        self.trailers = trailers
        self._note(end=True)

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        self.fail(ConnectionResetError(f"the stream was reset: {details or code}"))

    def _note(self, *, end: bool) -> None:
        if (end or self.enough(self)) and not self.whole.done():
            self.whole.set_result(None)

    def fail(self, error: Exception) -> None:
        """There will be no answer."""
        if not self.whole.done():
            self.whole.set_exception(error)


class Http2ProbeConnection(asyncio.Protocol):
    """One connection: a question at a time. `reusable`: for another one."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._session: Any = None
        self._transport: Any = None
        self._answer: Answer | None = None
        self.closed = False
        self.reusable = True

    async def ask(self, items: list[Pair], body: bytes, limit: int, enough: Callable[[Answer], bool]) -> Answer:
        """Send a request, pseudo fields first, and wait for its answer. Raises ConnectionError, Http2Error."""
        answer = self._answer = Answer(self._session, limit, enough)
        self._session.open(answer)
        answer.send_headers(items, end_stream=not body)
        if body:
            answer.send_data(body, end_stream=True)
        self._flush()
        try:
            await answer.whole
            return answer
        finally:
            self._answer = None
            answer.reset(h2_errors.CANCEL)  # unless it is over
            self._flush()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._session = Session(self, self._options, client=True)
        self._session.start()

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        try:
            self._session.feed(data)
        except Http2Error as error:
            self._flush()
            self._fail(error)
            return
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error if isinstance(error, ConnectionError) else ConnectionResetError("closed by the host"))

    def new_stream(self) -> Http2Stream:
        """A server's only."""
        raise AssertionError("a server opens no streams")

    def on_output(self) -> None:
        """Whoever makes output flushes."""

    def on_settings(self) -> None:
        """One stream at a time is always allowed, or will be refused."""

    def on_goaway(self, last_id: int, code: int) -> None:
        """As in Envoy, a graceful one lets the check end; any other fails it."""
        self.reusable = False
        if code != h2_errors.NO_ERROR:
            self._fail(ConnectionResetError("the host sent GOAWAY"))

    def on_ping_ack(self, data: bytes) -> None:
        """Nobody sends PINGs here."""

    def _flush(self) -> None:
        if self._session.out and not self.closed:
            try:
                data = self._session.take()
            except Http2Error as error:
                self._fail(error)
                return
            self._transport.write(data)

    def _fail(self, error: Exception) -> None:
        if self._answer is not None:
            self._answer.fail(error)
        self.abort()

    def abort(self) -> None:
        """Drop the connection."""
        if not self.closed:
            self.closed = True
            if self._transport is not None:
                self._transport.abort()


class _Http2Probe:
    """What both kinds of checks have in common. `_options`: the codec's."""

    _options: Options

    def __init__(self, prober: Prober, target: Target) -> None:
        self._prober = prober
        self._target = target
        self._connection: Http2ProbeConnection | None = None

    async def check(self) -> Verdict:
        """See `health_probe.Probe.check`."""
        connection = self._connection
        try:
            if connection is None or connection.closed or not connection.reusable:
                self.close()
                self._connection = connection = await self._prober.connect(self._target, lambda: Http2ProbeConnection(self._options))
            verdict = await self._ask(connection)
        except (dial.DialError, ConnectionError, Http2Error):
            self.close()
            return Outcome.NETWORK, False
        if not self._prober.settings.reuse_connection or not connection.reusable:
            self.close()
        return verdict

    async def _ask(self, connection: Http2ProbeConnection) -> Verdict:
        raise NotImplementedError

    @property
    def _authority(self) -> Pair:
        return b":authority", self._target.hostname.encode()

    @property
    def _scheme(self) -> Pair:
        return b":scheme", b"http" if self._prober.options.transport is None else b"https"

    def close(self) -> None:
        """See `health_probe.Probe.close`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()


class Http2Probe(_Http2Probe):
    """An HttpHealthCheck over HTTP/2."""

    def __init__(self, prober: Prober, target: Target) -> None:
        super().__init__(prober, target)
        self._config: HttpConfig = prober.config
        self._options = prober.config.codec

    async def _ask(self, connection: Http2ProbeConnection) -> Verdict:
        config = self._config
        items = [(b":method", config.method), self._authority, (b":path", config.path), self._scheme, *config.items]
        answer = await connection.ask(items, config.body, config.buffer, lambda _: False)
        assert answer.head is not None
        return config.judge(answer.head, answer.body)


class GrpcConfig:
    """A GrpcHealthCheck, compiled."""

    def __init__(self, proto: Any, timeout: float, codec: Options | None) -> None:
        self.codec = codec
        items: list[Pair] = [(b"te", b"trailers"), (b"content-type", grpc.CONTENT_TYPE), (b"user-agent", b"Envoy/HC")]
        items = add_headers(items, proto.initial_metadata, "grpc_health_check.initial_metadata")
        self.items = [*(pair for pair in items if pair[0] != b"grpc-timeout"), (b"grpc-timeout", grpc.format_timeout(round(timeout * 1000)))]
        # HealthCheckRequest has one string, HealthCheckResponse one enumeration: on the wire these are what the wrappers are.
        self.request = grpc.frame(StringValue(value=proto.service_name).SerializeToString())


class GrpcProbe(_Http2Probe):
    """A GrpcHealthCheck: one unary call."""

    def __init__(self, prober: Prober, target: Target) -> None:
        super().__init__(prober, target)
        self._config: GrpcConfig = prober.config
        self._options = prober.config.codec

    async def _ask(self, connection: Http2ProbeConnection) -> Verdict:
        config = self._config
        answer = await connection.ask([*_METHOD_AND_PATH, self._authority, self._scheme, *config.items], config.request, _MAX_BODY, _is_hopeless)
        return (Outcome.SUCCESS if is_serving(answer) else Outcome.FAILED), False


def _is_hopeless(answer: Answer) -> bool:
    """Whether what has come of an answer already says that it is none."""
    head = answer.head
    assert head is not None
    return head.status != 200 or not grpc.is_content_type(head.get(b"content-type")) or len(answer.body) >= answer.limit


def is_serving(answer: Answer) -> bool:
    """Whether an answer says that the service is well: one message that says SERVING, and status 0."""
    head = answer.head
    assert head is not None
    if head.status != 200 or grpc.status_of(answer.trailers) != grpc.OK:
        return False
    decoder = grpc.MessageDecoder()
    try:
        messages = [(flags, message) for flags, message in decoder.feed(answer.body) if message]
        return decoder.between and len(messages) == 1 and not messages[0][0] and Int32Value.FromString(messages[0][1]).value == _SERVING
    except (grpc.FramingError, DecodeError):
        return False
