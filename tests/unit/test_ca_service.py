"""The authority over gRPC: Unix sockets with the kernel's word for who calls, TLS, mutual TLS, and every way to be refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from control.ca import certificates
from control.ca.attestation import Renewals, UnixPeers
from control.ca.authority import Authority
from control.ca.csr import parse_csr
from control.ca.server import OwnCertificate, UnixFront
from control.ca.service import CertificateService
from control.ca.tokens import JoinTokens
from meshproxy.api import identity_protos, spiffe
from meshproxy.api.renewal import CHAIN_HEADER, SIGNATURE_HEADER, signed_text
from tests.unit.ca_help import API, WEB, Clock, csr, key_pem

OURS = spiffe.workload("mesh.test", "mesh-system", "meshctl")
ANSWER_S = 90.0


class Running:
    """An authority that listens on a Unix socket (and what a test adds)."""

    def __init__(self, folder) -> None:
        self.authority = Authority(str(folder / "ca"), "mesh.test")
        self.tokens = JoinTokens(str(folder / "tokens"))
        self.peers = UnixPeers()
        self.front = UnixFront(str(folder / "socket"))
        self.service = CertificateService(self.authority, [self.tokens, Renewals("mesh.test", self.authority.bundle), self.peers], self.front.peer_of)
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers(self.service.handlers())
        self.server.add_insecure_port(self.front.inner)
        self.plain_port = self.server.add_insecure_port("127.0.0.1:0")
        self.own = OwnCertificate(self.authority, OURS, ["localhost", "127.0.0.1"])
        self.tls_port = self.server.add_secure_port("127.0.0.1:0", self.own.credentials())
        self.mutual_port = self.server.add_secure_port("127.0.0.1:0", self.own.credentials(mutual=True))

    async def start(self) -> None:
        await self.server.start()
        await self.front.start()

    async def stop(self) -> None:
        await self.server.stop(None)
        await self.front.stop()

    @contextlib.asynccontextmanager
    async def channel(self, credentials: grpc.ChannelCredentials | None = None, port: int = 0):
        if port:
            target = f"127.0.0.1:{port}"
        else:
            target = f"unix:{self.front.path}"
        made = grpc.aio.secure_channel(target, credentials) if credentials else grpc.aio.insecure_channel(target)
        async with made as channel:
            yield channel

    def roots(self) -> bytes:
        return certificates.pem(*self.authority.bundle()).encode()


async def create(channel: grpc.aio.Channel, text: str, *metadata: tuple[str, str | bytes], life_s: int = 0) -> list[str]:
    request = identity_protos.message("istio.v1.auth.IstioCertificateRequest")(csr=text, validity_duration=life_s)
    answer = await channel.unary_unary(identity_protos.CREATE_CERTIFICATE)(request.SerializeToString(), metadata=metadata, timeout=ANSWER_S)
    return list(identity_protos.message("istio.v1.auth.IstioCertificateResponse").FromString(answer).cert_chain)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, why: str):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert (caught.value.code(), why in caught.value.details()) == (code, True), caught.value.details()


@pytest.fixture
async def running(tmp_path):
    made = Running(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def test_the_kernel_says_who_calls(running):
    async with running.channel() as channel:
        with refused(grpc.StatusCode.UNAUTHENTICATED, f"process {os.getpid()} of user {os.getuid()}"):
            await create(channel, csr())
        running.peers.register(WEB, uid=os.getuid(), pid=os.getpid())
        chain = await create(channel, csr(), life_s=60)
        leaf = x509.load_pem_x509_certificate(chain[0].encode())
        assert certificates.identity_of(leaf) == str(WEB)
        assert chain[-1].encode() == running.roots()
        with refused(grpc.StatusCode.PERMISSION_DENIED, f"may not be {API}"):
            await create(channel, csr(API))


async def test_an_address_without_a_process_proves_nothing(running):
    running.peers.register(WEB, uid=os.getuid())
    async with running.channel(port=running.plain_port) as channel:
        with refused(grpc.StatusCode.UNAUTHENTICATED, "proves nothing"):
            await create(channel, csr())
    inner = running.front.inner.removeprefix("unix:")
    assert stat.S_IMODE(os.stat(os.path.dirname(inner)).st_mode) == 0o700
    async with grpc.aio.insecure_channel(running.front.inner) as channel:
        with refused(grpc.StatusCode.UNAUTHENTICATED, "proves nothing"):
            await create(channel, csr())


async def test_requests_are_refused_with_a_reason(running):
    running.peers.register(WEB, uid=os.getuid())
    async with running.channel() as channel:
        for text in ("", "garbage", csr(extensions=[x509.BasicConstraints(ca=True, path_length=None)])):
            with refused(grpc.StatusCode.INVALID_ARGUMENT, ""):
                await create(channel, text)
        with refused(grpc.StatusCode.UNAUTHENTICATED, "join token"):
            await create(channel, csr(), ("authorization", "Bearer mpj_nonsense"))
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(identity_protos.CREATE_CERTIFICATE)(b"\xff\xff", timeout=ANSWER_S)
        assert await create(channel, csr())


async def test_join_by_token_then_renew_by_signature(running):
    token = ("authorization", f"Bearer {running.tokens.create(WEB)}")
    async with running.channel(grpc.ssl_channel_credentials(running.roots()), running.tls_port) as channel:
        with refused(grpc.StatusCode.UNAUTHENTICATED, "proves nothing"):
            await create(channel, csr())
        with refused(grpc.StatusCode.UNAUTHENTICATED, f"not for {API}"):
            await create(channel, csr(API), token)
        key, next_csr = certificates.new_key(), csr()
        chain = await create(channel, csr(key=key), token)
        with refused(grpc.StatusCode.UNAUTHENTICATED, "used by somebody else"):
            await create(channel, csr(), token)

        def proof(text: str) -> list[tuple[str, bytes]]:
            return [(CHAIN_HEADER, "".join(chain[:-1]).encode()), (SIGNATURE_HEADER, key.sign(signed_text(text), ec.ECDSA(hashes.SHA256())))]

        assert len(await create(channel, next_csr, *proof(next_csr))) == 3
        with refused(grpc.StatusCode.UNAUTHENTICATED, "not signed by the certificate's key"):
            await create(channel, csr(), *proof(next_csr))
        other = csr(API)
        with refused(grpc.StatusCode.PERMISSION_DENIED, f"may not be {API}"):
            await create(channel, other, *proof(other))


async def test_renew_by_mutual_tls(running):
    key = certificates.new_key()
    issued = running.authority.issue(parse_csr(csr(key=key)), [WEB])
    mine = grpc.ssl_channel_credentials(running.roots(), key_pem(key).encode(), certificates.pem(*issued.chain).encode())
    async with running.channel(mine, running.mutual_port) as channel:
        assert len(await create(channel, csr())) == 3
        with refused(grpc.StatusCode.PERMISSION_DENIED, f"may not be {API}"):
            await create(channel, csr(API))
    async with running.channel(grpc.ssl_channel_credentials(running.roots()), running.mutual_port) as channel:
        with refused(grpc.StatusCode.UNAVAILABLE, ""):
            await create(channel, csr())


async def test_bundles_are_told_when_they_change(running):
    request = identity_protos.message("X509BundlesRequest")().SerializeToString()
    async with running.channel() as channel:
        call = channel.unary_stream(identity_protos.FETCH_X509_BUNDLES)(request, metadata=[identity_protos.WORKLOAD_HEADER], timeout=ANSWER_S)
        seen = []
        async for data in call:
            bundles = identity_protos.message("X509BundlesResponse").FromString(data).bundles
            assert list(bundles) == ["spiffe://mesh.test"]
            seen.append(len(bundles["spiffe://mesh.test"]))
            if len(seen) == 2:
                break
            running.authority.rotate_root()
        assert seen[1] > 1.5 * seen[0]
        call.cancel()
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "security header"):
            async for _ in channel.unary_stream(identity_protos.FETCH_X509_BUNDLES)(request, timeout=ANSWER_S):
                pass


async def test_our_own_certificate_follows_the_roots(tmp_path):
    clock = Clock()
    authority = Authority(str(tmp_path / "ca"), "mesh.test", clock=clock)
    own = OwnCertificate(authority, OURS, ["istiod.istio-system.svc", "10.0.0.1"], clock)
    first = own.configuration()
    assert own.configuration() is first
    clock.now += 12 * 3600 + 1
    second = own.configuration()
    assert second is not first
    authority.rotate_root()
    assert own.configuration() is not second


async def test_connections_that_come_and_go(running):
    """The front forgets those that went, and takes a socket over that a former process left."""
    running.peers.register(WEB, uid=os.getuid())
    for _ in range(3):
        async with running.channel() as channel:
            await create(channel, csr())
    reader, writer = await asyncio.open_unix_connection(running.front.path)
    writer.write(b"garbage, not HTTP/2" * 100)
    await reader.read()
    writer.close()
    await running.front.stop()
    assert (running.front._peers, os.path.exists(running.front.path)) == ({}, False)


async def test_what_is_in_the_way_of_a_socket(tmp_path):
    (tmp_path / "socket").write_text("a file")
    front = UnixFront(str(tmp_path / "socket"))
    with pytest.raises(OSError):
        await front.start()
    await front.stop()
    assert (tmp_path / "socket").read_text() == "a file"


async def test_a_socket_of_another_control_plane_is_left_to_it(tmp_path):
    first, second = (UnixFront(str(tmp_path / "socket")) for _ in range(2))
    await first.start()
    try:
        with pytest.raises(OSError, match="listens there already"):
            await second.start()
        await second.stop()
        assert (tmp_path / "socket").exists()
    finally:
        await first.stop()
