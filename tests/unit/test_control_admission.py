"""Who gets whose configuration: xDS by TLS is for those who prove who they are, and for nobody else's proxies."""

from __future__ import annotations

import ipaddress
import time

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from control.ads.hub import Hub
from control.ads.server import XdsServer
from control.ca import certificates
from control.ca.admission import Admission
from control.ca.kubernetes import KubernetesTokens
from control.ca.running import Options, RunningAuthority
from control.names import is_local
from control.translate.resource import CLUSTER
from meshproxy.api import messages, spiffe
from tests.polling import PATIENCE
from tests.unit.control_help import MESH, snapshot

DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
HEALTH = "/envoy.service.health.v3.HealthDiscoveryService/StreamHealthCheck"
STATUS = "/envoy.service.status.v3.ClientStatusDiscoveryService/FetchClientStatus"
_D = "envoy.service.discovery.v3."
ACCOUNT = "apiVersion: meshproxy/v1\nkind: Workload\nmetadata: {name: own}\nspec: {serviceAccount: own}\n"


class Accounts:
    """An API server that knows one token."""

    async def review(self, token: str, audiences: tuple[str, ...]) -> dict:
        if token != "good":
            return {"error": "no such token"}
        return {"authenticated": True, "audiences": list(audiences), "user": {"username": "system:serviceaccount:default:own"}}


class Mesh:
    """A server with the authority's certificate, on a port for anybody, one for those with a certificate, and one in the clear."""

    def __init__(self, folder) -> None:
        self.authority = RunningAuthority(Options(str(folder / "ca"), "mesh.test"))
        self.now = 0.0  # what time the server thinks that it is, instead of what it is
        identify = Admission("mesh.test", KubernetesTokens("mesh.test", Accounts()), clock=self.clock)
        self.server = XdsServer(Hub(snapshot(MESH, ACCOUNT)), self.authority.handlers(), identify, clock=self.clock)
        self.tls = self.server.listen("127.0.0.1:0", self.authority.credentials())
        self.mutual = self.server.listen("127.0.0.1:0", self.authority.credentials(mutual=True))
        self.plain = self.server.listen("127.0.0.1:0")
        self.roots = certificates.pem(*self.authority.authority.bundle()).encode()

    def clock(self) -> float:
        return self.now or time.time()

    def credentials(self, account: str = "", namespace: str = "default") -> grpc.ChannelCredentials:
        """Of a caller with a certificate for a service account; without one, of a caller that has none."""
        if not account:
            return grpc.ssl_channel_credentials(self.roots)
        key = certificates.new_key()
        issued = self.authority.authority.issue_own(key.public_key(), spiffe.workload("mesh.test", namespace, account))
        self.end = issued.not_after
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return grpc.ssl_channel_credentials(self.roots, private, certificates.pem(*issued.chain).encode())


@pytest.fixture
async def mesh(tmp_path):
    made = Mesh(tmp_path)
    await made.server.start()
    yield made
    await made.server.stop()


async def clusters(channel: grpc.aio.Channel, node: str, metadata: tuple = ()) -> set[str]:
    """The first answer to a proxy that asks for its clusters."""
    request = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=CLUSTER)
    request.node.id = node
    async with channel:
        call = channel.stream_stream(DELTA)(timeout=PATIENCE, metadata=metadata)
        await call.write(request.SerializeToString())
        data = await call.read()
        assert data is not grpc.aio.EOF, await call.details()
        call.cancel()
    return {one.name for one in messages.known(f"{_D}DeltaDiscoveryResponse").FromString(data).resources}


async def refused(channel: grpc.aio.Channel, node: str, metadata: tuple = ()) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await clusters(channel, node, metadata)
    return caught.value.code(), caught.value.details()


async def turned_away(channel: grpc.aio.Channel, metadata: tuple) -> grpc.StatusCode:
    """The end of a stream that is refused before anything is asked: gRPC's client calls a request that comes too late an internal error of its own."""
    async with channel:
        return await channel.stream_stream(DELTA)(timeout=PATIENCE, metadata=metadata).code()


async def test_a_certificate_is_for_the_proxies_of_its_account(mesh):
    def channel(account: str, namespace: str = "default") -> grpc.aio.Channel:
        return grpc.aio.secure_channel(f"127.0.0.1:{mesh.mutual}", mesh.credentials(account, namespace))

    assert "outbound|9080||reviews.default.svc.cluster.local" in await clusters(channel("own"), "own.default")
    assert await clusters(channel("anybody"), "undescribed.default")
    code, why = await refused(channel("default"), "own.default")
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert why == "spiffe://mesh.test/ns/default/sa/default may not have the configuration of own.default, whose service account is own of default"
    assert (await refused(channel("own", "other"), "own.default"))[0] is grpc.StatusCode.PERMISSION_DENIED
    assert (await refused(channel("own"), "undescribed.other"))[0] is grpc.StatusCode.PERMISSION_DENIED


async def test_who_has_no_certificate_does_not_get_in(mesh):
    code, _ = await refused(grpc.aio.secure_channel(f"127.0.0.1:{mesh.mutual}", mesh.credentials()), "own.default")
    assert code is grpc.StatusCode.UNAVAILABLE  # the handshake fails


async def test_a_token_is_for_the_proxies_of_its_account(mesh):
    def channel() -> grpc.aio.Channel:
        return grpc.aio.secure_channel(f"127.0.0.1:{mesh.tls}", mesh.credentials())

    assert await clusters(channel(), "own.default", (("authorization", "Bearer good"),))
    assert (await refused(channel(), "reviews-v1.default", (("authorization", "Bearer good"),)))[0] is grpc.StatusCode.PERMISSION_DENIED
    for metadata in ((), (("authorization", "Bearer bad"),), (("authorization", f"Bearer {mesh.authority.tokens.create(_OWN)}"),)):
        assert await turned_away(channel(), metadata) is grpc.StatusCode.UNAUTHENTICATED


_OWN = spiffe.workload("mesh.test", "default", "own")


async def test_a_stream_ends_with_the_certificate_that_proved_whose_it_is(mesh):
    request = messages.known(f"{_D}DeltaDiscoveryRequest")(type_url=CLUSTER)
    request.node.id = "own.default"
    async with grpc.aio.secure_channel(f"127.0.0.1:{mesh.mutual}", mesh.credentials("own")) as channel:
        mesh.now = mesh.end - 1.0
        call = channel.stream_stream(DELTA)(timeout=PATIENCE)
        await call.write(request.SerializeToString())
        while await call.read() is not grpc.aio.EOF:
            """What it is told before."""
        assert await call.code() is grpc.StatusCode.OK
        mesh.now = mesh.end + 1.0
        code, why = await refused(channel, "own.default")  # over the same connection
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert why == "the certificate of spiffe://mesh.test/ns/default/sa/own has expired since the connection was made; a new connection needs a new one"


async def test_health_is_reported_by_nobody_else(mesh):
    hello = messages.known("envoy.service.health.v3.HealthCheckRequestOrEndpointHealthResponse")()
    hello.health_check_request.node.id = "own.default"
    for account, code in (("default", grpc.StatusCode.PERMISSION_DENIED), ("own", grpc.StatusCode.OK)):
        async with grpc.aio.secure_channel(f"127.0.0.1:{mesh.mutual}", mesh.credentials(account)) as channel:
            mesh.now = mesh.end - 1.0 if account == "own" else 0.0
            call = channel.stream_stream(HEALTH)(timeout=PATIENCE)
            await call.write(hello.SerializeToString())
            assert await call.code() is code  # of its own workload it ends well, when the certificate does


async def test_in_the_clear_the_machine_is_believed(mesh):
    assert await clusters(grpc.aio.insecure_channel(f"127.0.0.1:{mesh.plain}"), "own.default")


async def test_status_is_not_told_by_tls(mesh):
    async with grpc.aio.secure_channel(f"127.0.0.1:{mesh.mutual}", mesh.credentials("own")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(STATUS)(b"", timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("[::1]", True), ("::1", True), ("localhost", True), ("unix:/run/x", True)]
    + [(host, False) for host in ("0.0.0.0", "[::]", "", "10.0.0.1", "control.example", "localhost.example")],
)
def test_which_addresses_are_of_this_machine(host, local):
    assert is_local(host) is local
    if local and not host.startswith(("unix", "local")):
        assert ipaddress.ip_address(host.strip("[]")).is_loopback
