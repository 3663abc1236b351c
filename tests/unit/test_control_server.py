"""The gRPC side of the xDS server: what holds however many streams there are."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from control.ads.hub import Hub
from control.ads.server import Turns, XdsServer
from control.model.snapshot import build
from control.translate.health import nothing
from meshproxy.api import messages
from tests.polling import PATIENCE
from tests.unit.control_help import snapshot

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"


async def test_turns_are_taken_one_after_another():
    turns, log = Turns(1, 60), []

    async def one(name: str, ended: asyncio.Event):
        async with turns.take():
            log.append(f"{name} begins")
            await ended.wait()
            log.append(f"{name} ends")

    ended = asyncio.Event()
    tasks = [asyncio.create_task(one(name, ended)) for name in ("first", "second")]
    await asyncio.sleep(0)
    assert log == ["first begins"]
    ended.set()
    await asyncio.gather(*tasks)
    assert log == ["first begins", "first ends", "second begins", "second ends"]


async def test_who_takes_too_long_holds_up_nobody():
    turns, begun, never = Turns(1, 0.01), asyncio.Semaphore(0), asyncio.Event()

    async def one():
        async with turns.take():
            begun.release()
            await never.wait()

    tasks = [asyncio.create_task(one()) for _ in range(3)]
    async with asyncio.timeout(PATIENCE):
        for _ in tasks:
            await begun.acquire()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(PATIENCE):  # nothing was given back twice or lost
        async with turns.take():
            waiting = asyncio.create_task(one())
            assert await begun.acquire()  # when this turn has been too long
    waiting.cancel()


@pytest.fixture
async def served():
    hub = Hub(build({}, None, "mesh.test"))
    server = XdsServer(hub)
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield hub, server, channel
    await server.stop()


async def test_streams_end_in_order_when_the_server_does(served, caplog):
    caplog.set_level(logging.WARNING)
    hub, server, channel = served
    call = channel.stream_stream(METHOD)(timeout=PATIENCE)
    request = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")
    await call.write(request(type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster", node={"id": "a.default"}).SerializeToString())
    await call.read()
    await server.stop()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert not hub.connections
    assert not caplog.records


HEALTH = "/envoy.service.health.v3.HealthDiscoveryService/StreamHealthCheck"
_Health = messages.known("envoy.service.health.v3.HealthCheckRequestOrEndpointHealthResponse")


async def test_health_is_asked_for_and_heard():
    hub = Hub(snapshot("{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {readinessProbe: {tcpSocket: {port: 9}}}}"))
    server = XdsServer(hub)
    port = server.listen("127.0.0.1:0")
    await server.start()
    changed = asyncio.Event()
    hub.health.changed = changed.set
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(HEALTH)(timeout=PATIENCE)
        await call.write(_Health(health_check_request={"node": {"id": "a.default"}}).SerializeToString())
        said = messages.known("envoy.service.health.v3.HealthCheckSpecifier").FromString(await call.read())
        name = said.cluster_health_checks[0].cluster_name
        ill = {"cluster_name": name, "locality_endpoints_health": [{"endpoints_health": [{"health_status": 2}]}]}
        await call.write(_Health(endpoint_health_response={"cluster_endpoints_health": [ill]}).SerializeToString())
        await changed.wait()
        assert hub.health.unready == {("default", "a")}
        hub.publish(snapshot("{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}}"))
        assert hub.health.unready == frozenset()
        assert await call.read() == nothing()
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        stranger = channel.stream_stream(HEALTH)(timeout=PATIENCE)
        await stranger.write(_Health().SerializeToString())
        assert await stranger.code() is grpc.StatusCode.INVALID_ARGUMENT
    await server.stop()
    assert not hub.health.streams
