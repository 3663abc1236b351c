"""The sidecar's identity: renewal in virtual time, an authority that goes away and comes back, answers that cannot be used, SPIRE, and the secrets."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from control.ca import certificates
from control.ca.attestation import Caller, Rejected, Renewals
from control.ca.authority import Authority
from control.ca.calls import GrpcCalls
from control.ca.csr import BadRequest, parse_csr
from control.ca.service import CertificateService
from control.ca.tokens import JoinTokens
from meshproxy.api import identity_protos
from meshproxy.api.renewal import CHAIN_HEADER, SIGNATURE_HEADER
from meshproxy.identity import schedule
from meshproxy.identity.calls import UNAVAILABLE, CallFailed
from meshproxy.identity.provider import Provider
from meshproxy.identity.spire import SpireSource
from meshproxy.identity.svid import BadSvid, checked, read_der, read_key
from meshproxy.identity.workload import Wish, WorkloadSource
from tests.polling import PATIENCE
from tests.unit.ca_help import API, NOW, WEB, Clock, csr

DAY = 86400.0
HOUR = 3600.0


class Enough(Exception):
    """The test has seen what it wanted to see."""


class World:
    """An authority and a workload in virtual time: sleeping moves the clock. `away`: from when to when the authority does not answer."""

    def __init__(self, folder, wish: Wish, until: float = 0.0) -> None:
        self.clock = Clock()
        self.authority = Authority(str(folder / "ca"), "mesh.test", clock=self.clock)
        self.tokens = JoinTokens(str(folder / "tokens"), self.clock)
        self.service = CertificateService(self.authority, [self.tokens, Renewals("mesh.test", self.authority.bundle, clock=self.clock)])
        self.away: list[tuple[float, float]] = []
        self.until = NOW + until
        self.calls: list[tuple[float, list]] = []
        self.published: list[tuple[float, object]] = []
        self.lose_answers = 0
        self.mangle = lambda chain: chain
        self.source = WorkloadSource(self, wish, clock=self.clock, sleep=self.sleep, chance=lambda: 0.5)

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.clock.now += seconds
        if self.clock.now > self.until:
            raise Enough

    async def unary(self, method, request, metadata, timeout):
        assert method == identity_protos.CREATE_CERTIFICATE
        self.calls.append((self.clock.now - NOW, [key for key, _ in metadata]))
        if any(begin <= self.clock.now - NOW < end for begin, end in self.away):
            raise CallFailed(UNAVAILABLE, "connection refused")
        found = dict(metadata)
        asked = identity_protos.message("istio.v1.auth.IstioCertificateRequest").FromString(request)
        caller = Caller(
            tokens=tuple(value.removeprefix("Bearer ") for key, value in metadata if key == "authorization"),
            proof_chain=found.get(CHAIN_HEADER, b"").decode(),
            proof=found.get(SIGNATURE_HEADER, b""),
            csr=asked.csr,
        )
        try:
            issued = await self.service.sign(caller, asked.validity_duration)
        except (Rejected, BadRequest) as error:
            raise CallFailed(16, str(error)) from error
        if self.lose_answers:
            self.lose_answers -= 1
            raise CallFailed(UNAVAILABLE, "connection reset")
        chain = self.mangle([*(certificates.pem(one) for one in issued.chain), certificates.pem(*issued.bundle)])
        if chain is None:
            return b"\xff"
        return identity_protos.message("istio.v1.auth.IstioCertificateResponse")(cert_chain=chain).SerializeToString()

    async def run(self) -> None:
        with pytest.raises(Enough):
            await self.source.run(lambda svid: self.published.append((self.clock.now - NOW, svid)))


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path, Wish(WEB), 10 * DAY)
    made.source._wish = Wish(WEB, join_token=made.tokens.create(WEB))
    return made


async def test_renewal_at_half_life_with_a_new_key_each_time(world):
    await world.run()
    assert len(world.published) == pytest.approx(20, abs=1)
    for (before, first), (after, second) in itertools.pairwise(world.published):
        assert after - before == pytest.approx(DAY / 2, abs=120)
        assert first.key_pem != second.key_pem
    # The token is shown once, and from then on the certificate is the proof.
    assert [keys for _, keys in world.calls] == [["authorization"]] + [[CHAIN_HEADER, SIGNATURE_HEADER]] * (len(world.calls) - 1)
    assert world.source.failures == 0


async def test_the_authority_goes_away_past_half_life(world):
    """It is asked again with growing pauses, and the last certificate stays; one that has expired is renewed once the authority is back."""
    world.away = [(10 * HOUR, 40 * HOUR)]
    await world.run()
    times = [at for at, _ in world.published]
    assert not [at for at in times if 10 * HOUR <= at < 40 * HOUR]
    assert min(at for at in times if at >= 40 * HOUR) < 40 * HOUR + 31
    failed = [at for at, _ in world.calls if 10 * HOUR <= at < 40 * HOUR]
    pauses = [after - before for before, after in itertools.pairwise(failed)]
    assert pauses[:4] == pytest.approx([0.375, 0.75, 1.5, 3.0], rel=0.01)
    assert max(pauses) == pytest.approx(22.5)
    assert len(times) > 10


async def test_an_authority_that_is_away_at_the_start(world):
    world.away = [(0, 600)]
    await world.run()
    assert 600 <= world.published[0][0] < 631


async def test_a_lost_answer_does_not_cost_the_join_token(world):
    world.lose_answers = 2
    await world.run()
    assert world.published[0][0] < 2


async def test_clock_steps(tmp_path):
    """Past half of the life: renewed within a minute. Back before its beginning: renewed, too."""
    world = World(tmp_path, Wish(WEB), 3 * DAY)
    world.source._wish = Wish(WEB, join_token=world.tokens.create(WEB))
    steps = {1 * HOUR: 13 * HOUR, 20 * HOUR: -19 * HOUR}
    sleep = world.sleep

    async def stepping(seconds: float) -> None:
        await sleep(seconds)
        for at in [at for at in steps if world.clock.now - NOW >= at]:
            world.clock.now += steps.pop(at)

    world.source._sleep = stepping
    await world.run()
    times = [at for at, _ in world.published]
    assert times[1] == pytest.approx(14 * HOUR, abs=121)
    assert times[2] == pytest.approx(1 * HOUR, abs=181)
    assert len(times) < 12


@pytest.mark.parametrize(
    "mangle",
    [
        lambda chain: [],
        lambda chain: None,
        lambda chain: chain[:1],
        lambda chain: ["garbage"] * 3,
        lambda chain: [chain[1], chain[2]],
        lambda chain: [chain[0], chain[2]],
        lambda chain: [chain[0], chain[0], chain[2]],
    ],
)
async def test_answers_that_cannot_be_used_leave_what_there_is(world, mangle):
    world.until = NOW + 12.2 * HOUR
    world.mangle = lambda chain: chain if world.clock.now < NOW + HOUR else mangle(chain)
    await world.run()
    assert len(world.published) == 1
    assert world.source.failures > 20
    assert world.source.svid is world.published[0][1]


async def test_somebody_elses_certificate(tmp_path):
    world = World(tmp_path, Wish(WEB), 60)
    world.source._wish = Wish(None, join_token=world.tokens.create(API))
    await world.run()
    assert world.source.svid.identity == API
    other = World(tmp_path, Wish(WEB, token_file=str(tmp_path / "missing")), 60)
    await other.run()
    assert (other.published, other.calls, other.source.failures > 3) == ([], [], True)


def test_schedules():
    assert [schedule.renew_at(100, 200, lambda chance=chance: chance) for chance in (0.0, 0.5, 1.0)] == [145, 150, 155]
    assert [schedule.back_off(number, lambda: 1.0) for number in (1, 2, 3, 7, 8, 5000)] == [0.5, 1, 2, 30, 30, 30]
    assert schedule.back_off(1, lambda: 0.0) == 0.25


# -- what is held


def test_what_is_checked(tmp_path):
    clock = Clock()
    authority, other = (Authority(str(tmp_path / name), "mesh.test", clock=clock) for name in ("a", "b"))
    key = certificates.new_key()
    issued = authority.issue(parse_csr(csr(key=key)), [WEB])
    found = checked(key, [*issued.chain, *issued.bundle], issued.bundle, NOW)
    assert (found.identity, found.chain, "PRIVATE" in repr(found)) == (WEB, issued.chain, False)
    root = issued.bundle[0]
    for arguments, why in [
        ((key, [], issued.bundle, NOW), "empty"),
        ((certificates.new_key(), issued.chain, issued.bundle, NOW), "another key"),
        ((key, issued.chain, other.bundle(), NOW), "none of the roots"),
        ((key, issued.chain, [], NOW), "none of the roots"),
        ((key, issued.chain[:1], issued.bundle, NOW), "none of the roots"),
        ((key, (issued.chain[0], root), issued.bundle, NOW), "not signed by the next"),
        ((key, issued.chain, issued.bundle, NOW + 2 * DAY), "has expired"),
    ]:
        with pytest.raises(BadSvid, match=why):
            checked(*arguments)


@pytest.mark.parametrize(
    "data", [b"\x30", b"\x30\x82", b"\x30\x03abc", b"\x31\x00", b"\x30\x85\x00\x00\x00\x00\x01", b"\x30\x84\xff\xff\xff\xff", b"\x30\x05abc"]
)
def test_der_that_is_none(data):
    with pytest.raises(BadSvid):
        read_der(data)
    with pytest.raises(BadSvid):
        read_key(data)


def svid_of(authority: Authority, identity=WEB):
    key = certificates.new_key()
    issued = authority.issue(parse_csr(csr(identity, key=key)), [identity])
    return checked(key, issued.chain, issued.bundle, issued.not_after - 1)


def test_secrets_as_envoy_takes_them(tmp_path):
    authority = Authority(str(tmp_path / "ca"), "mesh.test", clock=Clock())
    provider, seen = Provider(), []
    early = provider.watch("default", lambda secret: seen.append(secret.proto))
    first = svid_of(authority)
    provider.publish(first)
    assert provider.get("default").proto.tls_certificate.private_key.inline_bytes == first.key_pem
    assert provider.get("ROOTCA").proto.validation_context.trusted_ca.inline_bytes.count(b"BEGIN CERTIFICATE") == 1
    assert provider.get(str(WEB)).version == provider.get("default").version
    assert provider.get("spiffe://mesh.test").proto.validation_context == provider.get("ROOTCA").proto.validation_context
    assert (provider.get("other"), "PRIVATE" in repr(provider.get("default"))) == (None, False)
    provider.publish(first)
    assert len(seen) == 1  # it is the same version
    provider.watch("default", lambda _: 1 / 0)  # harms nobody else
    provider.watch("default", lambda secret: seen.append(secret.proto))
    provider.publish(svid_of(authority))
    assert [one.name for one in seen] == ["default"] * 4
    early.close()
    provider.publish(svid_of(authority))
    assert len(seen) == 5


# -- SPIRE


class FakeAgent:
    """A Workload API on a Unix socket, that sends what it is told to."""

    def __init__(self, path: str) -> None:
        self.target = f"unix:{path}"
        self.streams: list[asyncio.Queue] = []
        self.opened = asyncio.Event()
        self.headers: list[bool] = []
        self.refuse: grpc.StatusCode | None = None
        self.server = grpc.aio.server()
        method = grpc.unary_stream_rpc_method_handler(self._fetch)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", {"FetchX509SVID": method}),))
        self.server.add_insecure_port(self.target)

    async def _fetch(self, _, context):
        self.headers.append(("workload.spiffe.io", "true") in list(context.invocation_metadata()))
        if self.refuse is not None:
            await context.abort(self.refuse, "no")
        queue: asyncio.Queue = asyncio.Queue()
        self.streams.append(queue)
        self.opened.set()
        while (answer := await queue.get()) is not None:
            yield answer


def answer_of(*svids, federated=(), **changed):
    response = identity_protos.message("X509SVIDResponse")()
    for svid in svids:
        fields = {
            "spiffe_id": str(svid.identity),
            "x509_svid": b"".join(one.public_bytes(Encoding.DER) for one in svid.chain),
            "x509_svid_key": svid.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            "bundle": b"".join(one.public_bytes(Encoding.DER) for one in svid.bundle),
        }
        response.svids.add(**fields | changed)
    for name, bundle in federated:
        response.federated_bundles[name] = b"".join(one.public_bytes(Encoding.DER) for one in bundle)
    return response.SerializeToString()


@pytest.fixture
async def agent(tmp_path):
    made = FakeAgent(str(tmp_path / "agent.sock"))
    await made.server.start()
    yield made
    await made.server.stop(None)


async def _next(queue: asyncio.Queue):
    """A source that has died says nothing: then the test fails instead of waiting for ever."""
    return await asyncio.wait_for(queue.get(), PATIENCE)


async def test_spire_pushes_and_we_follow(agent, tmp_path):
    authority, partner = Authority(str(tmp_path / "a"), "mesh.test"), Authority(str(tmp_path / "b"), "partner.test")
    first, second, other = svid_of(authority), svid_of(authority), svid_of(authority, API)
    seen: asyncio.Queue = asyncio.Queue()
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(0)

    async with grpc.aio.insecure_channel(agent.target) as channel:
        source = SpireSource(GrpcCalls(channel), sleep=sleep)
        task = asyncio.create_task(source.run(seen.put_nowait))
        await agent.opened.wait()
        stream = agent.streams[0]
        stream.put_nowait(answer_of(first, other, federated=[("spiffe://partner.test", partner.bundle())]))
        held = await _next(seen)
        assert held.chain == first.chain
        provider = Provider()
        provider.publish(held)
        assert provider.get("spiffe://partner.test").proto.validation_context.trusted_ca.inline_bytes == certificates.pem(*partner.bundle()).encode()
        # What cannot be used is passed over, and the stream goes on.
        for bad in (
            b"\xff", answer_of(), answer_of(second, spiffe_id=str(API)), answer_of(second, bundle=b""), answer_of(second, x509_svid=b"\x30"),
            answer_of(second, x509_svid_key=b"x"), answer_of(second, x509_svid_key=first.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())),
            answer_of(second, bundle=b"".join(one.public_bytes(Encoding.DER) for one in partner.bundle())),
        ):  # fmt: skip
            stream.put_nowait(bad)
        stream.put_nowait(answer_of(second))
        assert (await _next(seen)).chain == second.chain
        # The agent restarts: we ask again.
        agent.opened.clear()
        stream.put_nowait(None)
        await agent.opened.wait()
        agent.streams[1].put_nowait(answer_of(first))
        assert (await _next(seen)).chain == first.chain
        assert (agent.headers, len(slept)) == ([True, True], 1)
        # Asking wrongly is not tried again.
        agent.refuse = grpc.StatusCode.INVALID_ARGUMENT
        agent.streams[1].put_nowait(None)
        with pytest.raises(CallFailed, match="status 3"):
            await task


async def test_one_of_several_spire_identities(agent, tmp_path):
    authority = Authority(str(tmp_path / "a"), "mesh.test")
    seen: asyncio.Queue = asyncio.Queue()
    async with grpc.aio.insecure_channel(agent.target) as channel:
        task = asyncio.create_task(SpireSource(GrpcCalls(channel), API).run(seen.put_nowait))
        await agent.opened.wait()
        agent.streams[0].put_nowait(answer_of(svid_of(authority)))  # not ours: passed over
        agent.streams[0].put_nowait(answer_of(svid_of(authority), svid_of(authority, API)))
        assert (await _next(seen)).identity == API
        task.cancel()


async def test_a_spire_agent_that_is_away(tmp_path):
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            raise Enough
        await asyncio.sleep(0)

    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/nobody.sock") as channel:
        with pytest.raises(Enough):
            await SpireSource(GrpcCalls(channel), sleep=sleep, chance=lambda: 1.0).run(lambda _: None)
    assert waits == [0.5, 1, 2, 4]
