"""grpcio's client and server with our proxy between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.e2e.proxy import ADMIN, PATIENCE, Proxy, cluster, listener
from tests.interop.grpc_service import Service
from tests.polling import until

UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
HTTP2 = """, typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}}
"""
ROUTES = """
{match: {prefix: /limited/, grpc: {}}, route: {cluster: c, timeout: 0.3s}},
{match: {prefix: /dead/}, route: {cluster: dead}},
{match: {prefix: /s/}, route: {cluster: c, timeout: 0s}}
"""
STATS = """- name: stats
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.grpc_stats.v3.FilterConfig, stats_for_all_methods: true}"""


class Setting:
    def __init__(self, service: Service, proxy: Proxy, channel: grpc.aio.Channel) -> None:
        self.service = service
        self.proxy = proxy
        self.channel = channel

    async def stat(self, name: str) -> int:
        return await asyncio.to_thread(self.proxy.stat, name)

    async def until(self, name: str, value: int) -> None:
        """Wait for a statistic: the worker tells main about what the client has seen already."""

        async def has() -> bool:
            return await self.stat(name) == value

        await until(has)


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    service = Service()
    server = grpc.aio.server(options=UNLIMITED)
    server.add_generic_rpc_handlers((service,))  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    # The breaker's default of 1024 requests is close to what the tests do at once.
    breaker = ", circuit_breakers: {thresholds: [{max_requests: 5000, max_pending_requests: 5000}]}"
    clusters = "".join(cluster(name, to).rstrip().removesuffix("}") + breaker + HTTP2 for name, to in (("c", port), ("dead", 1)))
    text = f"{ADMIN}static_resources:\n  listeners:{listener(0, ROUTES, filters=STATS)}  clusters:{clusters}"
    proxy = await asyncio.to_thread(Proxy, tmp_path, text, "--concurrency", "1")
    with proxy:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{await asyncio.to_thread(proxy.port)}", options=UNLIMITED)
        try:
            yield Setting(service, proxy, channel)
        finally:
            await channel.close()
            await server.stop(None)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_four_shapes(setting: Setting) -> None:
    channel = setting.channel
    assert await channel.unary_unary("/s/uu_echo")(b"hello") == b"hello"
    assert [part async for part in channel.unary_stream("/s/us_count")(b"100")] == [b"%d" % number for number in range(100)]

    async def requests() -> AsyncIterator[bytes]:
        for size in (1, 0, 100_000, 3):
            yield bytes(size)

    assert await channel.stream_unary("/s/su_sum")(requests()) == b"100004"
    both = channel.stream_stream("/s/ss_echo")()
    for number in range(30):
        await both.write(b"%d" % number)
        assert await both.read() == b"%d" % number
    await both.done_writing()
    assert await both.read() is grpc.aio.EOF
    await setting.until("cluster.c.grpc.s.ss_echo.request_message_count", 30)
    await setting.until("cluster.c.grpc.s.us_count.response_message_count", 100)
    await setting.until("cluster.c.grpc.s.su_sum.0", 1)


async def test_metadata_both_ways(setting: Setting) -> None:
    call = setting.channel.unary_unary("/s/uu_echo")(b"x", metadata=(("x-text", "a b"), ("x-raw-bin", b"\0\xff,\n")))
    assert await call == b"x"
    seen = setting.service.metadata
    assert (seen["x-text"], seen["x-raw-bin"]) == ("a b", b"\0\xff,\n")
    first = dict(await call.initial_metadata())
    assert (first["x-first"], first["x-raw-bin"]) == ("1", b"\0\xff")
    assert dict(await call.trailing_metadata())["x-last"] == "2"


async def test_statuses(setting: Setting) -> None:
    error = await failure(setting.channel.unary_unary("/s/uu_fail")(b""))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "100 % naïve\n")
    assert dict(error.trailing_metadata())["grpc-status-details-bin"] == b"\x08\x05"
    error = await failure(setting.channel.unary_unary("/s/unknown")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    error = await failure(setting.channel.unary_unary("/nowhere/x")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    error = await failure(setting.channel.unary_unary("/dead/x")(b""))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "remote connection failure" in (error.details() or "")
    stream = setting.channel.unary_stream("/s/us_fail")(b"")
    assert await stream.read() == b"one"
    error = await failure(stream.read())
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "no more")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(10_000)

    error = await failure(setting.channel.stream_unary("/s/su_refuse")(endless()))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_deadlines(setting: Setting) -> None:
    assert await setting.channel.unary_unary("/s/uu_echo")(b"", timeout=60) == b""
    assert setting.service.remaining is not None
    assert 0 < setting.service.remaining <= 60
    error = await failure(setting.channel.unary_unary("/s/uu_wait")(b"", timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(PATIENCE):
        await setting.service.cancelled.wait()
    # The proxy's own limit, which the client did not ask for.
    error = await failure(setting.channel.unary_unary("/limited/uu_wait")(b""))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "upstream request timeout"


async def test_cancellation_reaches_the_server(setting: Setting) -> None:
    call = setting.channel.unary_unary("/s/uu_wait")(b"")
    async with asyncio.timeout(PATIENCE):
        await setting.service.begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await setting.service.cancelled.wait()
    await setting.until("cluster.c.upstream_rq_active", 0)


async def test_a_server_that_ends_first(setting: Setting) -> None:
    """What it has said is all heard by a caller that takes its time and has not ended itself, and so is its status."""
    calls = [setting.channel.stream_stream("/s/ss_burst")() for _ in range(3)]
    for call in calls:
        await call.write(b"50")
    await setting.until("cluster.c.grpc.s.ss_burst.success", 3)  # the server is done, the callers have read nothing
    for call in calls:
        assert [len(await call.read()) for _ in range(50)] == [100_000] * 50
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_large_and_compressed_messages(setting: Setting) -> None:
    size = 16 * 1024 * 1024
    assert await setting.channel.unary_unary("/s/uu_echo")(bytes(size)) == bytes(size)
    assert await setting.channel.unary_unary("/s/uu_echo")(bytes(100_000), compression=grpc.Compression.Gzip) == bytes(100_000)


async def test_a_thousand_at_once(setting: Setting) -> None:
    streams = [setting.channel.stream_stream("/s/ss_echo")() for _ in range(1000)]
    for number, stream in enumerate(streams):
        await stream.write(b"%d" % number)
    assert await asyncio.gather(*(stream.read() for stream in streams)) == [b"%d" % number for number in range(1000)]
    await setting.until("cluster.c.upstream_rq_active", 1000)
    for stream in streams:
        await stream.done_writing()
    assert all(end is grpc.aio.EOF for end in await asyncio.gather(*(stream.read() for stream in streams)))
    await setting.until("cluster.c.grpc.s.ss_echo.success", 1000)
