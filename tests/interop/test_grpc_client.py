"""Our gRPC client against grpcio's server: all four shapes, and how calls end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from meshproxy.codec import grpc as codec
from meshproxy.context import Context
from meshproxy.observe.stats import Store
from meshproxy.upstream.cluster_manager import ClusterManager
from meshproxy.upstream.grpc_client import GrpcClient
from meshproxy.upstream.grpc_stream import GrpcError
from tests.interop.grpc_service import Service
from tests.polling import quiet
from tests.unit.upstream_help import group, proto, static

OPTIONS = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    },
}


class Setting:
    def __init__(self, service: Service, server: grpc.aio.Server, port: int) -> None:
        self.service = service
        self.server = server
        self.context = Context(loop=asyncio.get_running_loop(), stats=Store(), timers=None)  # type: ignore[arg-type]
        self.clusters = ClusterManager(self.context)
        self.clusters.add(proto(static(group(f"127.0.0.1:{port}"), typed_extension_protocol_options=OPTIONS)))
        self.client = GrpcClient(self.clusters, "c", metadata=(("x-ours", "always"),))

    def stat(self, name: str) -> int:
        self.clusters.publish()
        return self.context.stats.value(f"cluster.c.{name}")


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    service = Service()
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)))
    server.add_generic_rpc_handlers((service,))  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made = Setting(service, server, port)
    yield made
    cluster = made.clusters.get("c")
    assert cluster is not None
    for host in cluster.hosts:
        for pool in (host.pools or {}).values():
            for connection in list(pool.connections):
                connection.close()
    await server.stop(None)


async def test_unary(setting: Setting) -> None:
    assert await setting.client.unary("/s/uu_echo", b"hello", metadata=(("X-Text", "a b"), ("x-some-bin", b"\0\1\2")), timeout=60) == b"hello"
    seen = setting.service.metadata
    assert (seen["x-text"], seen["x-some-bin"], seen["x-ours"]) == ("a b", b"\0\1\2", "always")
    assert setting.service.remaining is not None
    assert 0 < setting.service.remaining <= 60
    assert setting.stat("upstream_rq_total") == setting.stat("upstream_rq_200") == setting.stat("internal.upstream_rq_200") == 1
    assert setting.stat("upstream_rq_active") == 0


async def test_metadata_of_the_response(setting: Setting) -> None:
    async with setting.client.stream("/s/uu_echo") as stream:
        await stream.send(b"x", done=True)
        assert await stream.read() == b"x"
        assert stream.initial_metadata is not None
        assert ("x-first", "1") in stream.initial_metadata
        assert ("x-raw-bin", b"\0\xff") in stream.initial_metadata
        assert await stream.read() is None
        assert stream.trailing_metadata == [("x-last", "2")]
        assert stream.status == codec.OK


async def test_errors_have_what_the_server_said(setting: Setting) -> None:
    with pytest.raises(GrpcError, match="NOT_FOUND: 100 % naïve") as caught:
        await setting.client.unary("/s/uu_fail", b"")
    assert (caught.value.status, caught.value.message, caught.value.details_bin) == (codec.NOT_FOUND, "100 % naïve\n", b"\x08\x05")
    assert ("x-why", "tired") in caught.value.trailing_metadata
    with pytest.raises(GrpcError, match="UNIMPLEMENTED"):
        await setting.client.unary("/s/nothing", b"")


async def test_server_streaming(setting: Setting) -> None:
    async with setting.client.stream("/s/us_count") as stream:
        await stream.send(b"100", done=True)
        assert [message async for message in stream] == [b"%d" % number for number in range(100)]


async def test_an_error_after_messages(setting: Setting) -> None:
    async with setting.client.stream("/s/us_fail") as stream:
        await stream.send(b"", done=True)
        assert await stream.read() == b"one"
        with pytest.raises(GrpcError, match="UNAVAILABLE: no more"):
            await stream.read()
        with pytest.raises(GrpcError, match="UNAVAILABLE: no more"):
            await stream.read()


async def test_client_streaming(setting: Setting) -> None:
    async with setting.client.stream("/s/su_sum") as stream:
        for size in (1, 0, 70_000, 3):
            await stream.send(bytes(size))
        await stream.done_writing()
        assert await stream.read() == b"70004"
        assert await stream.read() is None


async def test_a_server_that_does_not_listen(setting: Setting) -> None:
    async with setting.client.stream("/s/su_refuse") as stream:
        with pytest.raises(GrpcError, match="PERMISSION_DENIED: no"):
            for _ in range(10_000):
                await stream.send(bytes(10_000))
                await asyncio.sleep(0)
        with pytest.raises(GrpcError, match="PERMISSION_DENIED: no"):
            await stream.read()


async def test_bidirectional_streaming(setting: Setting) -> None:
    async with setting.client.stream("/s/ss_echo") as stream:
        for number in range(50):
            await stream.send(b"%d" % number)
            assert await stream.read() == b"%d" % number
        await stream.done_writing()
        assert await stream.read() is None
        with pytest.raises(AssertionError):
            await stream.send(b"more")


async def test_many_at_once(setting: Setting) -> None:
    assert await asyncio.gather(*(setting.client.unary("/s/uu_echo", b"%d" % number) for number in range(300))) == [b"%d" % number for number in range(300)]


async def test_large_messages(setting: Setting) -> None:
    size = 16 * 1024 * 1024
    assert await setting.client.unary("/s/uu_echo", bytes(size)) == bytes(size)
    limited = GrpcClient(setting.clusters, "c", max_receive_message_length=1000)
    assert await limited.unary("/s/uu_large", b"1000") == bytes(1000)
    with pytest.raises(GrpcError, match=r"RESOURCE_EXHAUSTED: .* 1001 bytes is over the limit of 1000"):
        await limited.unary("/s/uu_large", b"1001")


async def test_a_slow_reader_holds_the_server_back(setting: Setting) -> None:
    cluster = setting.clusters.get("c")
    assert cluster is not None
    async with setting.client.stream("/s/us_flood") as stream:
        await stream.send(b"400", done=True)
        assert await stream.read() == bytes(100_000)
        await quiet(lambda: setting.service.taken)  # until the server can do no more
        assert setting.service.taken < 400
        assert sum([1 async for _ in stream]) == 399


async def test_deadline(setting: Setting) -> None:
    with pytest.raises(GrpcError, match="DEADLINE_EXCEEDED"):
        await setting.client.unary("/s/uu_wait", b"", timeout=2.0)  # the call has begun by then, also on a busy machine
    async with asyncio.timeout(90):
        await setting.service.cancelled.wait()
    # Both ends have a clock, and the server's may be the first to be looked at: it answers then (test_the_server_keeps_a_deadline), and no timeout is counted.
    timeouts = setting.stat("upstream_rq_timeout")
    assert timeouts == setting.stat("upstream_rq_504") == setting.stat("internal.upstream_rq_504")
    assert timeouts + setting.stat("upstream_rq_200") == setting.stat("upstream_rq_total") == 1
    assert setting.stat("upstream_rq_active") == 0


async def test_the_server_keeps_a_deadline(setting: Setting) -> None:
    with pytest.raises(GrpcError, match="DEADLINE_EXCEEDED: Deadline Exceeded"):
        await setting.client.unary("/s/uu_wait", b"", metadata=(("grpc-timeout", "200m"),))
    assert setting.stat("upstream_rq_200") == setting.stat("upstream_rq_total") == 1
    assert setting.stat("upstream_rq_timeout") == 0


async def test_cancelling_the_caller_cancels_the_call(setting: Setting) -> None:
    task = asyncio.create_task(setting.client.unary("/s/uu_wait", b""))
    async with asyncio.timeout(90):
        await setting.service.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await setting.service.cancelled.wait()
    assert setting.stat("upstream_rq_active") == 0


async def test_cancel(setting: Setting) -> None:
    stream = setting.client.stream("/s/ss_echo")
    await stream.send(b"x")
    assert await stream.read() == b"x"
    stream.cancel()
    stream.cancel()
    with pytest.raises(GrpcError, match="CANCELLED"):
        await stream.read()
    with pytest.raises(GrpcError, match="CANCELLED"):
        await stream.send(b"y")
    assert setting.stat("upstream_rq_active") == 0


async def test_a_server_that_goes_away(setting: Setting) -> None:
    stream = setting.client.stream("/s/ss_echo")
    await stream.send(b"x")
    assert await stream.read() == b"x"
    await setting.server.stop(None)
    with pytest.raises(GrpcError):
        await stream.read()
    with pytest.raises(GrpcError, match="UNAVAILABLE: upstream connect error"):
        await setting.client.unary("/s/uu_echo", b"")


async def test_no_cluster_no_host() -> None:
    context = Context(loop=asyncio.get_running_loop(), stats=Store(), timers=None)  # type: ignore[arg-type]
    clusters = ClusterManager(context)
    clusters.add(proto(static(name="empty")))
    with pytest.raises(GrpcError, match="UNAVAILABLE: there is no cluster 'none'"):
        await GrpcClient(clusters, "none").unary("/s/m", b"")
    with pytest.raises(GrpcError, match="UNAVAILABLE: no healthy upstream"):
        await GrpcClient(clusters, "empty").unary("/s/m", b"")
