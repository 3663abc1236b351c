"""Health checks over HTTP/2: of grpcio's servers, and of servers built on the h2 package that answer what they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.events
import pytest

from meshproxy.codec import grpc as codec
from meshproxy.upstream import host as hosts
from meshproxy.upstream.health import Checker
from tests.polling import until
from tests.unit import upstream_help as up

HTTP2 = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    },
}
CHECK = {"timeout": "30s", "interval": "5s", "unhealthy_threshold": 3, "healthy_threshold": 2}
GRPC = {**CHECK, "grpc_health_check": {}}
HTTP = {**CHECK, "http_health_check": {"path": "/healthz", "codec_client_type": "HTTP2"}}
FAILED = hosts.FAILED_ACTIVE_HC
SERVING = codec.frame(b"\x08\x01")


@asynccontextmanager
async def checked(check: dict[str, Any], port: int) -> AsyncIterator[tuple[Checker, Any]]:
    """A checker of one host, after the first check."""
    ctx = up.context()
    proto = up.proto(up.static(up.group(f"127.0.0.1:{port}"), health_checks=[check], typed_extension_protocol_options=HTTP2))
    checker = Checker(proto, ctx, ctx.stats.scope("cluster.c."), lambda flags: None)
    checker.update(proto.load_assignment)
    try:
        async with asyncio.timeout(90):
            await checker.wait_first_round()
        yield checker, ctx
    finally:
        checker.close()
        await asyncio.sleep(0)


def flags(checker: Checker) -> int:
    (found,) = checker.flags().values()
    return found


class Server:
    """An HTTP/2 server that answers each request with `answer(connection, stream_id)`."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.requests: list[dict[bytes, bytes]] = []
        self.bodies = b""
        self.connections = 0
        self.resets: list[int] = []
        self.reset = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[Any] | None] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*filter(None, self._tasks))
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        self._tasks.append(asyncio.current_task())
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        try:
            while data := await reader.read(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        self.requests.append(dict(event.headers))
                    elif isinstance(event, h2.events.DataReceived):
                        self.bodies += event.data
                    elif isinstance(event, h2.events.StreamEnded):
                        self.answer(connection, event.stream_id)
                    elif isinstance(event, h2.events.StreamReset):
                        self.resets.append(event.error_code)
                        self.reset.set()
                writer.write(connection.data_to_send())
        except ConnectionError:
            pass
        finally:
            writer.close()


def respond(status: int = 200, *, body: bytes = b"", trailers: dict[str, str] | None = None, end: bool = True, **headers: str) -> Any:
    """What a server answers."""

    def answer(connection: Any, stream: int) -> None:
        fields = [(":status", str(status)), *((name.replace("_", "-"), value) for name, value in headers.items())]
        connection.send_headers(stream, fields, end_stream=end and not body and trailers is None)
        for start in range(0, len(body), 16384):
            connection.send_data(stream, body[start : start + 16384], end_stream=end and trailers is None and start + 16384 >= len(body))
        if trailers is not None:
            connection.send_headers(stream, [(name.replace("_", "-"), value) for name, value in trailers.items()], end_stream=True)

    return answer


def rpc(*messages: bytes, status: str = "0", **more: Any) -> Any:
    return respond(body=b"".join(messages), trailers={"grpc_status": status}, content_type="application/grpc", **more)


async def test_grpc_request_as_configured() -> None:
    async with Server(rpc(SERVING)) as server:
        check = {
            **CHECK,
            "grpc_health_check": {
                "service_name": "pkg.Service",
                "authority": "who",
                "initial_metadata": [{"header": {"key": "X-One", "value": "1"}}, {"header": {"key": "user-agent", "value": "me"}}],
            },
        }
        async with checked(check, server.port) as (checker, ctx):
            assert flags(checker) == 0
            assert ctx.stats.value("cluster.c.health_check.success") == 1
        (head,) = server.requests
        assert head == {
            b":method": b"POST",
            b":scheme": b"http",
            b":authority": b"who",
            b":path": b"/grpc.health.v1.Health/Check",
            b"te": b"trailers",
            b"content-type": b"application/grpc",
            b"user-agent": b"Envoy/HC,me",
            b"x-one": b"1",
            b"grpc-timeout": b"30000m",
        }
        assert server.bodies == codec.frame(b"\x0a\x0bpkg.Service")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (rpc(SERVING), 0),
        (rpc(SERVING[:3], SERVING[3:]), 0),
        (rpc(codec.frame(b""), SERVING), 0),
        (rpc(codec.frame(b"\x08\x02")), FAILED),
        (rpc(codec.frame(b"")), FAILED),
        (rpc(), FAILED),
        (rpc(SERVING, status="14"), FAILED),
        (rpc(SERVING, status="soon"), FAILED),
        (rpc(SERVING, SERVING), FAILED),
        (rpc(SERVING + b"\0"), FAILED),
        (rpc(codec.frame(b"\x08\x01", 1)), FAILED),
        (rpc(codec.frame(b"\x08\x01", 0x80)), FAILED),
        (rpc(codec.frame(b"\xff\xff")), FAILED),
        (respond(200, grpc_status="0", content_type="application/grpc"), FAILED),
        (respond(200, grpc_status="12", content_type="application/grpc"), FAILED),
        (respond(200, body=SERVING, content_type="application/grpc"), FAILED),
        (respond(503, body=b"no", end=False), FAILED),
        (respond(200, body=b"page", content_type="text/html", end=False), FAILED),
        (respond(200, body=bytes(65536), content_type="application/grpc", end=False), FAILED),
    ],
)
async def test_grpc_answers(answer: Any, expected: int) -> None:
    async with Server(answer) as server, checked(GRPC, server.port) as (checker, ctx):
        assert flags(checker) == expected
        assert ctx.stats.value("cluster.c.health_check.network_failure") == 0


async def test_what_is_not_waited_for_is_reset() -> None:
    async with Server(respond(503, body=b"no", end=False)) as server, checked(GRPC, server.port), asyncio.timeout(90):
        await server.reset.wait()
        assert server.resets == [8]


@pytest.mark.parametrize("what", ["reset", "goaway", "graceful", "close", "garbage"])
async def test_connections_that_end(what: str) -> None:
    def answer(connection: Any, stream: int) -> None:
        if what == "reset":
            connection.reset_stream(stream, 2)
        elif what == "goaway":
            connection.close_connection(2, last_stream_id=stream)
        elif what == "graceful":
            connection.close_connection(0, last_stream_id=stream)
            connection.state_machine.state = h2.connection.ConnectionState.SERVER_OPEN
            rpc(SERVING)(connection, stream)
        elif what == "close":
            raise ConnectionResetError
        else:
            connection._data_to_send += b"\0\0\0\xff\xff" * 10 + b"\x01\0\0\5" + bytes(20)

    async with Server(answer) as server:
        check = {**GRPC, "no_traffic_interval": "0.001s", "no_traffic_healthy_interval": "0.001s", "interval": "0.001s"}
        async with checked(check, server.port) as (_, ctx):
            name = "success" if what == "graceful" else "network_failure"
            await until(lambda: ctx.stats.value(f"cluster.c.health_check.{name}") >= 2)
        assert server.connections >= 2 or what == "reset"


@pytest.mark.parametrize("reuse", [True, False])
async def test_connections_are_kept(reuse: bool) -> None:
    check = {**GRPC, "reuse_connection": reuse, "no_traffic_healthy_interval": "0.001s", "no_traffic_interval": "0.001s", "interval": "0.001s"}
    async with Server(rpc(SERVING)) as server, checked(check, server.port) as (_, ctx):
        await until(lambda: ctx.stats.value("cluster.c.health_check.success") >= 4)
        assert (server.connections == 1) is reuse


async def test_no_answer_is_a_timeout() -> None:
    async with Server(lambda connection, stream: None) as server, checked({**GRPC, "timeout": "0.05s"}, server.port) as (checker, _):
        assert flags(checker) == FAILED | hosts.ACTIVE_HC_TIMEOUT


async def test_http_over_http2() -> None:
    check = {
        **CHECK,
        "http_health_check": {"path": "/x", "method": "POST", "codec_client_type": "HTTP2", "send": {"text": b"hi".hex()}, "receive": [{"text": b"al".hex()}]},
    }
    async with Server(respond(200, body=b"alive")) as server, checked(check, server.port) as (checker, ctx):
        assert flags(checker) == 0
        assert server.requests[0][b":authority"] == b"c"
        assert (server.requests[0][b"content-length"], server.bodies) == (b"2", b"hi")
        assert ctx.stats.value("cluster.c.http2.streams_active") == 0
    for answer, expected in ((respond(503), FAILED), (respond(200, x_envoy_degraded="1"), hosts.DEGRADED_ACTIVE_HC)):
        async with Server(answer) as server, checked(HTTP, server.port) as (checker, _):
            assert flags(checker) == expected


async def test_grpcio() -> None:
    async def check(request: bytes, context: Any) -> bytes:
        if request == b"":
            return b"\x08\x01"
        if request == b"\x0a\x03bad":
            return b"\x08\x02"
        await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        raise AssertionError("abort raises")

    class Health(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(check) if details.method == "/grpc.health.v1.Health/Check" else None

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Health(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    for service, expected in (("", 0), ("bad", FAILED), ("none", FAILED)):
        async with checked({**CHECK, "grpc_health_check": {"service_name": service}}, port) as (checker, _):
            assert flags(checker) == expected
    await server.stop(None)
