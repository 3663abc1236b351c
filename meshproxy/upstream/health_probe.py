"""How a host is asked whether it is well: by an HTTP request, by a gRPC call, by bytes on a TCP connection, or by connecting at all.

A probe belongs to one host and keeps its connection from check to check (`reuse_connection`). `check` may be cancelled at any time; `close` follows then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.api import errors, matchers
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.api.metadata import metadata_dict
from meshproxy.codec.h1.encode import encode_request_head
from meshproxy.codec.h1.grammar import ProtocolError
from meshproxy.codec.h1.parser import Options
from meshproxy.codec.h1.request import KnownRequest
from meshproxy.codec.h1.response import KnownResponse, ResponseParser
from meshproxy.codec.headers import ResponseHead
from meshproxy.net import dial
from meshproxy.upstream.health import Outcome, Settings, Target
from meshproxy.upstream.health_headers import add_headers
from meshproxy.upstream.options import ClusterOptions, compile_options, number

if TYPE_CHECKING:
    from meshproxy.codec.headers import Headers, Pair
    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope

RESPONSE_BUFFER = 1024  # bytes of a response that `receive` is searched in, by default
_MAX_BUFFER = 1024 * 1024  # the same when the configuration says "no limit"
_METHODS = {0: b"GET", 1: b"GET", 2: b"HEAD", 3: b"POST", 4: b"PUT", 5: b"DELETE", 6: b"CONNECT", 7: b"OPTIONS", 8: b"TRACE", 9: b"PATCH"}
_HTTP1, _HTTP2 = range(2)  # type.v3.CodecClientType
_WITHOUT_BODY = frozenset((b"GET", b"HEAD", b"DELETE", b"TRACE"))

Verdict = tuple[Outcome, bool]  # outcome, and whether the answer said x-envoy-immediate-health-check-fail


class Probe(Protocol):
    """Asks one host."""

    async def check(self) -> Verdict:
        """Ask once. Network errors are outcomes, not exceptions."""
        ...

    def close(self) -> None:
        """Give up the connection, if there is one."""
        ...


class Prober:
    """Makes the probes of one cluster."""

    def __init__(
        self, kind: Callable[[Prober, Target], Probe], options: ClusterOptions, settings: Settings, config: Any, check: Any, alpn: tuple[str, ...] = ()
    ) -> None:
        """`alpn`: offered where neither the check nor the cluster's TLS context names protocols."""
        self.kind = kind
        self.options = options
        self.settings = settings
        self.config = config
        self.alpn = tuple(check.tls_options.alpn_protocols) or alpn
        self._criteria = None
        if check.HasField("transport_socket_match_criteria"):
            from google.protobuf.json_format import MessageToDict

            self._criteria = {"envoy.transport_socket_match": MessageToDict(check.transport_socket_match_criteria)}

    def probe(self, target: Target) -> Probe:
        """A probe for one host."""
        return self.kind(self, target)

    async def connect(self, target: Target, factory: Callable[[], asyncio.BaseProtocol]) -> Any:
        """A protocol with a connection. Raises DialError."""
        options = self.options
        transport, version = options.transport, options.proxy_protocol
        if options.choose_transport is not None:
            metadata = self._criteria or (metadata_dict(target.metadata) if target.metadata is not None else None)
            transport, version = options.choose_transport(metadata, None)
        preamble = None
        if version:
            from meshproxy.upstream.proxy_protocol import Header

            preamble = Header(version, None)
        _, protocol = await dial.connect(
            target.check_address,
            factory,
            timeout=self.settings.timeout,
            transport=transport,
            options=options.dial_options,
            alpn=self.alpn,
            preamble=preamble,
        )
        return protocol


def compile_prober(cluster: Any, context: Context, scope: Scope) -> Prober:
    """From a Cluster message. Raises ConfigError."""
    check = cluster.health_checks[0]
    options = compile_options(cluster, scope, context.secrets)
    settings = Settings.from_proto(check)
    with errors.under("health_checks[0]"):
        which = check.WhichOneof("health_checker")
        if which == "tcp_health_check":
            return Prober(TcpProbe, options, settings, TcpConfig(check.tcp_health_check), check)
        if which == "http_health_check":
            config = HttpConfig(check.http_health_check, scope, context.runtime)
            if check.http_health_check.codec_client_type == _HTTP1:
                return Prober(HttpProbe, options, settings, config, check)
        # Who checks over HTTP/1.1 need not have HTTP/2 in memory.
        from meshproxy.upstream import health_http2

        codec = health_http2.codec_options(options, scope)
        if which == "http_health_check":
            config.codec = codec
            return Prober(health_http2.Http2Probe, options, settings, config, check, health_http2.ALPN)
        grpc_config = health_http2.GrpcConfig(check.grpc_health_check, settings.timeout, codec)
        return Prober(health_http2.GrpcProbe, options, settings, grpc_config, check, health_http2.ALPN)


def check_config(check: Any, *, speaks_http2: bool) -> None:
    """Find mistakes in a HealthCheck message. `speaks_http2`: the cluster's protocol can be HTTP/2. Raises ConfigError."""
    which = check.WhichOneof("health_checker")
    if which is None:
        errors.fail("", "one of http_health_check, tcp_health_check, grpc_health_check and custom_health_check is required")
    if which == "tcp_health_check":
        TcpConfig(check.tcp_health_check)
    elif which == "http_health_check":
        HttpConfig(check.http_health_check, None, None)
    elif which == "grpc_health_check":
        from meshproxy.upstream.health_http2 import GrpcConfig

        if not speaks_http2:
            errors.fail(which, "cluster must support HTTP/2 for gRPC healthchecking")
        GrpcConfig(check.grpc_health_check, 1.0, None)
    else:
        errors.fail(which, "only HTTP, TCP and gRPC health checks are supported", UNSUPPORTED)


def payload(proto: Any, path: str) -> bytes:
    """The bytes of a Payload: hexadecimal text, or binary."""
    if proto.WhichOneof("payload") == "binary":
        return bytes(proto.binary)
    try:
        data = bytes.fromhex(proto.text) if " " not in proto.text else None
    except ValueError:
        data = None
    if not data:
        errors.fail(f"{path}.text", f"invalid hex string '{proto.text}'")
    return data


def contains(segments: list[bytes], data: bytes) -> bool:
    """Whether all segments are there in their order, with anything between them."""
    position = 0
    for segment in segments:
        found = data.find(segment, position)
        if found < 0:
            return False
        position = found + len(segment)
    return True


# -- HTTP ----------------------------------------------------------------------------------------------------------------------------------------------------


class HttpConfig:
    """An HttpHealthCheck, compiled."""

    def __init__(self, proto: Any, scope: Scope | None, runtime: Any) -> None:
        self.method = _METHODS[proto.method]
        self.path: bytes = proto.path.encode()
        if proto.codec_client_type not in (_HTTP1, _HTTP2):
            errors.fail("http_health_check.codec_client_type", "only HTTP/1.1 and HTTP/2 health checks are supported", UNSUPPORTED)
        self.codec: Any = None  # codec.h2.settings.Options for HTTP/2
        self.body = payload(proto.send, "http_health_check.send") if proto.HasField("send") else b""
        if proto.HasField("send") and self.method in _WITHOUT_BODY:
            errors.fail(
                "http_health_check.send",
                f"HTTP health check cannot specify a request payload with method '{self.method.decode()}'."
                " Only methods that support a request body (POST, PUT, PATCH, OPTIONS) can be used with payload.",
            )
        self.receive = [payload(one, f"http_health_check.receive[{index}]") for index, one in enumerate(proto.receive)]
        self.buffer = number(proto, "response_buffer_size", RESPONSE_BUFFER)
        total = sum(map(len, self.receive))
        if self.buffer and total > self.buffer:
            errors.fail(
                "http_health_check.response_buffer_size",
                f"The expected response length '{total}' is over than http health response buffer size '{self.buffer}'",
            )
        self.buffer = self.buffer or _MAX_BUFFER
        self.expected = _ranges(proto.expected_statuses, "expected") or [(200, 201)]
        self.retriable = _ranges(proto.retriable_statuses, "retriable")
        self.items = _request_headers(proto, self.body)
        self.service_name = None
        if proto.HasField("service_name_matcher") and (runtime is None or runtime.integer("health_check.verify_cluster", 100) > 0):
            with errors.under("http_health_check.service_name_matcher"):
                self.service_name = matchers.compile_string(proto.service_name_matcher)
        self._scope = scope

    def judge(self, head: ResponseHead, body: bytes) -> Verdict:
        """What an answer means."""
        excluded = b"x-envoy-immediate-health-check-fail" in head
        if self.receive and not contains(self.receive, body):
            return Outcome.FAILED, excluded
        if not any(start <= head.status < end for start, end in self.expected):
            return (Outcome.RETRIABLE if any(start <= head.status < end for start, end in self.retriable) else Outcome.FAILED), excluded
        if self.service_name is not None:
            if self._scope is not None:
                self._scope.counter("health_check.verify_cluster").n += 1
            if not self.service_name(head.get(b"x-envoy-upstream-healthchecked-cluster") or b""):
                return Outcome.FAILED, False
        return (Outcome.DEGRADED if b"x-envoy-degraded" in head else Outcome.SUCCESS), False


def _ranges(protos: Any, kind: str) -> list[tuple[int, int]]:
    for index, one in enumerate(protos):
        why = None
        if one.start >= one.end:
            why = f"expecting start < end, but found start={one.start} and end={one.end}"
        elif one.start < 100:
            why = f"expecting start >= 100, but found start={one.start}"
        elif one.end > 600:
            why = f"expecting end <= 600, but found end={one.end}"
        if why:
            errors.fail(f"http_health_check.{kind}_statuses[{index}]", f"Invalid http {kind} status range: {why}")
    return [(one.start, one.end) for one in protos]


def _request_headers(proto: Any, body: bytes) -> list[Pair]:
    items = add_headers([(b"user-agent", b"Envoy/HC")], proto.request_headers_to_add, "http_health_check.request_headers_to_add")
    removed = {name.lower().encode() for name in proto.request_headers_to_remove}
    items = [pair for pair in items if pair[0] not in removed]
    if body:
        items.append((b"content-length", b"%d" % len(body)))
    return items


class HttpProbe:
    """Sends one request and judges the answer."""

    def __init__(self, prober: Prober, target: Target) -> None:
        self._prober = prober
        self._target = target
        self._config: HttpConfig = prober.config
        self._connection: _HttpConnection | None = None

    async def check(self) -> Verdict:
        """See `Probe.check`."""
        config = self._config
        connection = self._connection
        try:
            if connection is None or connection.closed:
                self._connection = connection = await self._prober.connect(self._target, lambda: _HttpConnection(config.buffer))
            assert connection is not None
            head = encode_request_head(config.method, config.path, self._target.hostname.encode(), config.items)
            answer = await connection.ask(config.method, head + config.body)
        except (dial.DialError, ConnectionError, ProtocolError):
            self.close()
            return Outcome.NETWORK, False
        verdict = config.judge(*answer)
        if not self._prober.settings.reuse_connection or not connection.parser.keep_alive:
            self.close()
        return verdict

    def close(self) -> None:
        """See `Probe.close`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()


class _HttpConnection(asyncio.Protocol):
    """One connection: a question at a time. Keeps at most `limit` bytes of a body."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.closed = False
        self.parser = ResponseParser(self, Options())
        self._transport: Any = None
        self._answer: asyncio.Future[tuple[ResponseHead, bytes]] | None = None
        self._head: ResponseHead | None = None
        self._body = b""

    async def ask(self, method: bytes, request: bytes) -> tuple[ResponseHead, bytes]:
        """Send a request and wait for the whole answer. Raises ConnectionError, ProtocolError."""
        if self.parser.buffer:
            raise ConnectionResetError("the host sent what nobody asked for")
        if self.parser.done:
            self.parser.next_message()
        self.parser.expect(method)
        self._head, self._body = None, b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.abort()  # nobody asked
            return
        try:
            self.parser.feed(data)
        except ProtocolError as error:
            self._fail(error)
            self.abort()

    def eof_received(self) -> bool:
        if self._answer is not None:
            self.parser.keep_alive = False
            self.parser.feed_eof()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._fail(error if isinstance(error, ConnectionError) else ConnectionResetError("closed by the host"))

    def on_whole(self, known: KnownResponse, body: bytes) -> None:
        self._head, self._body = ResponseHead(known.status, known.items.copy()), body[: self._limit]
        self._done()

    def on_known(self, known: KnownRequest, body: bytes) -> None:
        raise AssertionError("only a request parser knows requests")

    def on_headers(self, head: ResponseHead, end_stream: bool) -> None:
        if head.status >= 200:
            self._head = head
            if end_stream:
                self._done()

    def on_data(self, data: bytes, end_stream: bool) -> None:
        if len(self._body) < self._limit:
            self._body += data[: self._limit - len(self._body)]
        if end_stream:
            self._done()

    def on_trailers(self, trailers: Headers) -> None:
        self._done()

    def _done(self) -> None:
        if self._answer is not None and not self._answer.done() and self._head is not None:
            self._answer.set_result((self._head, self._body))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def abort(self) -> None:
        """Drop the connection."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


# -- TCP -----------------------------------------------------------------------------------------------------------------------------------------------------


class TcpConfig:
    """A TcpHealthCheck, compiled."""

    def __init__(self, proto: Any) -> None:
        self.send = payload(proto.send, "tcp_health_check.send") if proto.HasField("send") else b""
        self.receive = [payload(one, f"tcp_health_check.receive[{index}]") for index, one in enumerate(proto.receive)]


class TcpProbe:
    """Connects; if there is something to receive, sends and waits until all of it has come."""

    def __init__(self, prober: Prober, target: Target) -> None:
        self._prober = prober
        self._target = target
        self._config: TcpConfig = prober.config
        self._connection: _TcpConnection | None = None

    async def check(self) -> Verdict:
        """See `Probe.check`."""
        config = self._config
        connection = self._connection
        try:
            if connection is None or connection.closed:
                self._connection = connection = await self._prober.connect(self._target, lambda: _TcpConnection(config.receive))
            assert connection is not None
            if not config.receive:
                self.close()
                return Outcome.SUCCESS, False
            await connection.ask(config.send)
        except (dial.DialError, ConnectionError):
            self.close()
            return Outcome.NETWORK, False
        if not self._prober.settings.reuse_connection:
            self.close()
        return Outcome.SUCCESS, False

    def close(self) -> None:
        """See `Probe.close`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()


class _TcpConnection(asyncio.Protocol):
    """One connection on which `wanted` has to come. Keeps at most 1 MiB."""

    def __init__(self, wanted: list[bytes]) -> None:
        self._wanted = wanted
        self.closed = False
        self._transport: Any = None
        self._answer: asyncio.Future[None] | None = None
        self._data = b""

    async def ask(self, data: bytes) -> None:
        """Send `data` and wait. Raises ConnectionError."""
        self._answer = asyncio.get_running_loop().create_future()
        if data:
            self._transport.write(data)
        self._look()
        try:
            await self._answer
        finally:
            self._answer = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > _MAX_BUFFER:
            self.abort()
            return
        self._look()

    def _look(self) -> None:
        if self._answer is not None and not self._answer.done() and contains(self._wanted, self._data):
            self._data = b""
            self._answer.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error if isinstance(error, ConnectionError) else ConnectionResetError("closed by the host"))

    def abort(self) -> None:
        """Drop the connection."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
