"""The SDS server: state of the world, delta, fetches; what is new is sent once, what nobody has is waited for."""

from __future__ import annotations

import asyncio
import os
import stat

import grpc
import pytest

from control.ca.agent import Agent
from control.ca.authority import Authority
from control.ca.sds import TYPE_URL
from meshproxy.api import messages
from tests.polling import until
from tests.unit.test_identity import svid_of

D = "envoy.service.discovery.v3."
SERVICE = "/envoy.service.secret.v3.SecretDiscoveryService/"
ANSWER_S = 90.0


class Told:
    """A source that publishes what a test says."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue = asyncio.Queue()

    async def run(self, publish) -> None:
        while True:
            publish(await self.queue.get())


class Proxy:
    """What a proxy's stream says and hears."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        self.delta = method == "DeltaSecrets"
        self.call = channel.stream_stream(f"{SERVICE}{method}")(timeout=ANSWER_S)

    async def send(self, **fields) -> None:
        cls = messages.known(f"{D}DeltaDiscoveryRequest" if self.delta else f"{D}DiscoveryRequest")
        await self.call.write(cls(type_url=TYPE_URL, **fields).SerializeToString())

    async def hear(self):
        data = await self.call.read()
        return messages.known(f"{D}DeltaDiscoveryResponse" if self.delta else f"{D}DiscoveryResponse").FromString(data)


def names(response) -> list[str]:
    secret = messages.known("envoy.extensions.transport_sockets.tls.v3.Secret")
    return [secret.FromString((one.resource if hasattr(one, "resource") else one).value).name for one in response.resources]


@pytest.fixture
def authority(tmp_path):
    return Authority(str(tmp_path / "ca"), "mesh.test")


@pytest.fixture
async def agent(tmp_path):
    made = Agent(Told(), str(tmp_path / "agent.sock"))
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def channel(agent, tmp_path):
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/agent.sock") as made:
        yield made


async def published(agent, svid) -> None:
    """The agent has it."""
    done = asyncio.Event()
    watch = agent.provider.watch("default", lambda secret: done.set() if secret.proto.tls_certificate.private_key.inline_bytes == svid.key_pem else None)
    agent._source.queue.put_nowait(svid)
    await asyncio.wait_for(done.wait(), ANSWER_S)
    watch.close()


async def test_the_socket_is_ours_alone(agent, tmp_path):
    assert stat.S_IMODE(os.stat(tmp_path / "agent.sock").st_mode) == 0o600


async def test_state_of_the_world(agent, authority, channel):
    proxy = Proxy(channel, "StreamSecrets")
    await proxy.send(resource_names=["default"])  # before there is one: it waits
    await published(agent, svid_of(authority))
    first = await proxy.hear()
    assert (names(first), first.type_url) == (["default"], TYPE_URL)
    await proxy.send(resource_names=["default"], version_info=first.version_info, response_nonce=first.nonce)
    await proxy.send(resource_names=["default", "ROOTCA", "unknown"], version_info=first.version_info, response_nonce=first.nonce)
    second = await proxy.hear()
    assert names(second) == ["ROOTCA", "default"]
    await proxy.send(resource_names=["default"], version_info=first.version_info, response_nonce="0")  # of long ago: ignored
    await proxy.send(resource_names=["default", "ROOTCA"], version_info=second.version_info, response_nonce=second.nonce)
    await published(agent, svid_of(authority))
    third = await proxy.hear()
    assert (names(third), third.version_info != second.version_info) == (["ROOTCA", "default"], True)
    # Refused: not sent again until it changes.
    refusal = messages.known("google.rpc.Status")(code=3, message="no good")
    await proxy.send(resource_names=["default", "ROOTCA"], version_info=second.version_info, response_nonce=third.nonce, error_detail=refusal)
    await until(lambda: agent.service.refused == 1)  # it has come before the next secret
    await published(agent, svid_of(authority))
    fourth = await proxy.hear()
    assert (fourth.nonce, agent.service.refused) == ("4", 1)
    # No name any more: nothing is sent; the end of the requests ends the stream.
    await proxy.send(resource_names=[], version_info=fourth.version_info, response_nonce=fourth.nonce)
    await proxy.call.done_writing()
    assert await proxy.call.read() is grpc.aio.EOF
    assert agent.service.streams == 0


async def test_delta(agent, authority, channel):
    proxy = Proxy(channel, "DeltaSecrets")
    await published(agent, svid_of(authority))
    await proxy.send(resource_names_subscribe=["default", "ROOTCA", "unknown"])
    first = await proxy.hear()
    assert names(first) == ["ROOTCA", "default"]
    versions = {one.name: one.version for one in first.resources}
    await published(agent, svid_of(authority))
    assert names(await proxy.hear()) == ["default"]  # the roots have not changed
    await proxy.send(resource_names_unsubscribe=["default", "never"])
    await proxy.send(resource_names_subscribe=["ROOTCA"])  # asked for once more
    assert names(await proxy.hear()) == ["ROOTCA"]
    await published(agent, svid_of(authority))
    again = Proxy(channel, "DeltaSecrets")
    await again.send(resource_names_subscribe=["default", "ROOTCA"], initial_resource_versions=versions)
    assert names(await again.hear()) == ["default"]
    authority.rotate_root()
    await published(agent, svid_of(authority))
    assert names(await proxy.hear()) == ["ROOTCA"]


async def test_fetch(agent, authority, channel):
    fetch = channel.unary_unary(f"{SERVICE}FetchSecrets")
    request = messages.known(f"{D}DiscoveryRequest")(resource_names=["default"]).SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fetch(request, timeout=ANSWER_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    await published(agent, svid_of(authority))
    assert names(messages.known(f"{D}DiscoveryResponse").FromString(await fetch(request, timeout=ANSWER_S))) == ["default"]


@pytest.mark.parametrize("fields", [{"type_url": "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, {"resource_names": [str(one) for one in range(65)]}])
async def test_what_is_refused(agent, channel, fields):
    call = channel.stream_stream(f"{SERVICE}StreamSecrets")(timeout=ANSWER_S)
    await call.write(messages.known(f"{D}DiscoveryRequest")(**fields).SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
