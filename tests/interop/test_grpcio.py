"""grpcio, client and server, through the proxy: all four shapes, deadlines, cancellation, metadata, compression, large messages, a thousand streams at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from tests.e2e.proxy import PATIENCE, Proxy, wait_until
from tests.interop.http2_proxy import start

LARGE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
MB = 1 << 20


class Service(grpc.GenericRpcHandler):
    """Methods that take and give bytes."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.waiting = threading.Semaphore(0)
        self.release = threading.Event()

    def service(self, handler_call_details):
        """By the last part of the path."""
        method = handler_call_details.method.rpartition("/")[2]
        kinds = {
            "Echo": grpc.unary_unary_rpc_method_handler,
            "Metadata": grpc.unary_unary_rpc_method_handler,
            "Fail": grpc.unary_unary_rpc_method_handler,
            "Wait": grpc.unary_unary_rpc_method_handler,
            "Count": grpc.unary_stream_rpc_method_handler,
            "Endless": grpc.unary_stream_rpc_method_handler,
            "Sum": grpc.stream_unary_rpc_method_handler,
            "Talk": grpc.stream_stream_rpc_method_handler,
        }
        return kinds[method](getattr(self, method.lower())) if method in kinds else None

    def echo(self, request: bytes, context) -> bytes:
        return request

    def metadata(self, request: bytes, context) -> bytes:
        got = {key: value for key, value in context.invocation_metadata() if key.startswith("x-")}
        context.send_initial_metadata((("x-initial", got["x-text"]), ("x-initial-bin", got["x-data-bin"])))
        context.set_trailing_metadata((("x-trailing", got["x-text"]), ("x-trailing-bin", got["x-data-bin"])))
        return b""

    def fail(self, request: bytes, context) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nicht möglich: 100 %")

    def wait(self, request: bytes, context) -> bytes:
        context.add_callback(self.cancelled.set)
        self.waiting.release()
        self.release.wait(PATIENCE)
        return b"waited"

    def count(self, request: bytes, context) -> Iterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    def endless(self, request: bytes, context) -> Iterator[bytes]:
        context.add_callback(self.cancelled.set)
        while context.is_active():
            yield bytes(10_000)

    def sum(self, requests: Iterator[bytes], context) -> bytes:
        return b"%d" % sum(int(request) for request in requests)

    def talk(self, requests: Iterator[bytes], context) -> Iterator[bytes]:
        for request in requests:
            yield request[::-1]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Service, int]]:
    """A grpcio server; its service and port."""
    service = Service()
    server = grpc.server(futures.ThreadPoolExecutor(1100), handlers=[service], options=LARGE)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, port
    service.release.set()
    server.stop(None).wait(PATIENCE)


@pytest.fixture(scope="module")
def proxy(server: tuple[Service, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The proxy in front of it."""
    with start(tmp_path_factory.mktemp("grpc"), port=server[1]) as proxy:
        yield proxy


@pytest.fixture
def service(server: tuple[Service, int]) -> Service:
    """The service, as new."""
    service = server[0]
    service.cancelled.clear()
    service.release.clear()
    while service.waiting.acquire(blocking=False):
        pass
    return service


@pytest.fixture(params=["plaintext", "tls"])
def channel(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[grpc.Channel]:
    """A channel to the proxy."""
    if request.param == "tls":
        credentials = grpc.ssl_channel_credentials((proxy.folder / "ca.pem").read_bytes())
        options = [*LARGE, ("grpc.ssl_target_name_override", "a.test")]
        made = grpc.secure_channel(f"127.0.0.1:{proxy.port('tls')}", credentials, options)
    else:
        made = grpc.insecure_channel(f"127.0.0.1:{proxy.port()}", LARGE)
    with made as channel:
        yield channel


def test_unary(channel: grpc.Channel, service: Service):
    """One message each way."""
    assert channel.unary_unary("/t.Service/Echo")(b"hello", timeout=PATIENCE) == b"hello"
    assert channel.unary_unary("/t.Service/Echo")(b"", timeout=PATIENCE) == b""


def test_streams(channel: grpc.Channel, service: Service):
    """Of the server, of the client, and both."""
    counted = channel.unary_stream("/t.Service/Count")(b"1000", timeout=PATIENCE)
    assert list(counted) == [b"%d" % number for number in range(1000)]
    assert channel.stream_unary("/t.Service/Sum")(iter([b"1", b"2", b"3"]), timeout=PATIENCE) == b"6"
    assert channel.stream_unary("/t.Service/Sum")(iter([]), timeout=PATIENCE) == b"0"


def test_conversation(channel: grpc.Channel, service: Service):
    """The next question is asked when the last was answered: nothing is held back on the way."""
    answered = threading.Semaphore(1)

    def questions() -> Iterator[bytes]:
        for number in range(100):
            assert answered.acquire(timeout=PATIENCE)
            yield b"question %d" % number

    for number, answer in enumerate(channel.stream_stream("/t.Service/Talk")(questions(), timeout=PATIENCE)):
        assert answer == (b"question %d" % number)[::-1]
        answered.release()


def test_metadata(channel: grpc.Channel, service: Service):
    """Text and binary, both ways, at the beginning and at the end."""
    sent = (("x-text", "plain text"), ("x-data-bin", bytes(range(256))))
    _, call = channel.unary_unary("/t.Service/Metadata").with_call(b"", timeout=PATIENCE, metadata=sent)
    initial = {item.key: item.value for item in call.initial_metadata()}
    trailing = {item.key: item.value for item in call.trailing_metadata()}
    assert (initial["x-initial"], initial["x-initial-bin"]) == ("plain text", bytes(range(256)))
    assert (trailing["x-trailing"], trailing["x-trailing-bin"]) == ("plain text", bytes(range(256)))


def test_status(channel: grpc.Channel, service: Service):
    """Of the server, with its message; and of a method that there is not."""
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/t.Service/Fail")(b"", timeout=PATIENCE)
    assert (error.value.code(), error.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "nicht möglich: 100 %")
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/t.Service/Missing")(b"", timeout=PATIENCE)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_deadline(channel: grpc.Channel, service: Service):
    """The client's deadline ends the call for the server, too."""
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/t.Service/Wait")(b"", timeout=0.2)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert service.cancelled.wait(PATIENCE)
    service.release.set()


def test_cancellation(channel: grpc.Channel, service: Service):
    """The server hears of it, before an answer and in the middle of one."""
    call = channel.unary_unary("/t.Service/Wait").future(b"", timeout=PATIENCE)
    assert service.waiting.acquire(timeout=PATIENCE)
    call.cancel()
    assert service.cancelled.wait(PATIENCE)
    service.release.set()
    service.cancelled.clear()
    stream = channel.unary_stream("/t.Service/Endless")(b"", timeout=PATIENCE)
    assert next(stream) == bytes(10_000)
    stream.cancel()
    assert service.cancelled.wait(PATIENCE)


def test_compression(channel: grpc.Channel, service: Service):
    """gzip passes through untouched."""
    echo = channel.unary_unary("/t.Service/Echo")
    assert echo(b"x" * 100_000, timeout=PATIENCE, compression=grpc.Compression.Gzip) == b"x" * 100_000


def test_large_messages(channel: grpc.Channel, service: Service):
    """Sixteen megabytes there and back."""
    message = bytes(range(256)) * (16 * MB // 256)
    assert channel.unary_unary("/t.Service/Echo")(message, timeout=PATIENCE) == message


def test_a_thousand_streams(proxy: Proxy, service: Service):
    """All open at the same time, on one connection; all are answered."""
    with grpc.insecure_channel(f"127.0.0.1:{proxy.port()}", LARGE) as channel:
        calls = [channel.unary_unary("/t.Service/Wait").future(b"", timeout=2 * PATIENCE) for _ in range(1000)]
        for _ in range(1000):
            assert service.waiting.acquire(timeout=PATIENCE)
        service.release.set()
        assert {call.result() for call in calls} == {b"waited"}
    wait_until(lambda: proxy.stat("cluster.up.upstream_rq_active") == 0)
