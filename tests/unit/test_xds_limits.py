"""How often a stream asks, and how often it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import pytest

from meshproxy.api import convert, messages, support
from meshproxy.api.errors import ConfigError, Problem
from meshproxy.xds import client
from meshproxy.xds.client import FILL_RATE, MAX_TOKENS, Api, Backoff, Mux, StreamSubscription
from meshproxy.xds.resources import CLUSTER, ENDPOINTS, WILDCARD
from meshproxy.xds.session import Session
from meshproxy.xds.subscription import Rules
from tests.polling import PATIENCE
from tests.unit import upstream_help as up

Source = messages.known("envoy.config.core.v3.ApiConfigSource")
Request = messages.known("envoy.service.discovery.v3.DiscoveryRequest")
Response = messages.known("envoy.service.discovery.v3.DiscoveryResponse")
DeltaRequest = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")
DeltaResponse = messages.known("envoy.service.discovery.v3.DeltaDiscoveryResponse")
BAD = Response(type_url=CLUSTER.url, version_info="1", nonce="n")
BAD.resources.add().Pack(convert.to_message({"name": "a", "connect_timeout": "-1s"}, CLUSTER.message))


class Stubborn:
    """A control plane that says the same again as soon as it was refused, so many times; then it waits. It is its own stream."""

    cluster_name = "control"

    def __init__(self, times: int, said: Any = BAD) -> None:
        self.refused = 0
        self.why: list[str] = []
        self.asked = 0
        self.streams = 0
        self._says = said.SerializeToString()
        self._times = times
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        self.done = asyncio.Event()

    @contextlib.asynccontextmanager
    async def stream(self, method):
        self.streams += 1
        yield self

    def cancel(self):
        self._said.put_nowait(None)

    async def send(self, data):
        request = Request.FromString(data)
        self.asked += 1
        if request.HasField("error_detail"):
            self.refused += 1
            self.why.append(request.error_detail.message)
        if self.refused < self._times:
            self._said.put_nowait(self._says)
        else:
            self.done.set()

    def __aiter__(self):
        return self

    async def __anext__(self):
        said = await self._said.get()
        if said is None:
            raise StopAsyncIteration
        return said


class Nobody:
    def updated(self, update):
        pytest.fail("nothing was right")

    def failed(self):
        """It is told each time."""


@pytest.fixture
def clock(monkeypatch):
    """Of the context; moved by whoever waits."""
    made = up.Clock()

    async def pause(seconds):
        assert seconds > 0
        made.advance(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(client, "_pause", pause)
    return made


def stream(plane, clock, rate=None):
    context = up.context(clock=clock)
    mux = Mux(plane, "method", Session(context.node, delta=False), context.stats.scope("x."), context, Backoff(lambda: 0.5), rate)
    StreamSubscription(mux, False, CLUSTER, WILDCARD, Nobody(), context.stats.scope("y."), context, Rules(), 0.0).start()
    return mux, context.stats


async def play(plane, mux):
    mux.start()
    async with asyncio.timeout(PATIENCE):
        await plane.done.wait()
    mux.close()


def test_a_server_that_answers_each_refusal_with_the_same_is_heard_ten_times_a_second(clock):
    async def run():
        plane = Stubborn(MAX_TOKENS + 51)
        start = clock()
        mux, _ = stream(plane, clock)
        await play(plane, mux)
        assert plane.refused == MAX_TOKENS + 51
        assert 50 / FILL_RATE - 0.001 <= clock() - start <= 51 / FILL_RATE + 0.001  # the last one has perhaps waited, too

    asyncio.run(run())


def test_requests_are_limited_where_it_is_asked_for(clock):
    async def run():
        plane = Stubborn(30)
        start = clock()
        mux, stats = stream(plane, clock, (5, 2.0))
        await play(plane, mux)
        assert plane.asked == 31
        assert clock() - start == pytest.approx((31 - 5) / 2.0)
        assert stats.scope("x.").counter("control_plane.rate_limit_enforced").n == 31 - 5
        assert stats.scope("x.").gauge("control_plane.pending_requests").n == 0

    asyncio.run(run())


def test_requests_that_wait_are_told():
    async def run():
        plane = Stubborn(1)
        mux, stats = stream(plane, up.Clock(), (1, 0.001))
        mux.start()
        gauge = stats.scope("x.").gauge("control_plane.pending_requests")
        async with asyncio.timeout(PATIENCE):
            while not gauge.n:
                await asyncio.sleep(0)
        assert (plane.asked, gauge.n) == (1, 1)
        mux.close()
        async with asyncio.timeout(PATIENCE):
            while gauge.n:
                await asyncio.sleep(0)

    asyncio.run(run())


def test_who_fails_refuses(clock, caplog):
    """And the stream goes on."""

    class Failing(Nobody):
        def updated(self, update):
            raise RuntimeError("on purpose")

    async def run():
        plane = Stubborn(3, Response(type_url=ENDPOINTS.url, version_info="1", nonce="n"))
        context = up.context(clock=clock)
        mux = Mux(plane, "method", Session(context.node, delta=False), context.stats.scope("x."), context, Backoff(lambda: 0.5))
        StreamSubscription(mux, False, ENDPOINTS, WILDCARD, Failing(), context.stats.scope("y."), context, Rules(), 0.0).start()
        await play(plane, mux)
        assert plane.why == ["internal error: RuntimeError"] * 3
        assert plane.streams == 1
        assert "could not be taken" in caplog.text

    asyncio.run(run())


def test_what_cannot_be_read_is_refused_for_all_who_subscribed(clock, caplog):
    """They wait no longer for a first answer, and count it."""

    class Waiting(Nobody):
        failures = 0

        def failed(self):
            self.failures += 1

    async def run():
        said = Response(type_url=ENDPOINTS.url, version_info="1", nonce="n")
        said.resources.add(type_url=CLUSTER.url)
        plane = Stubborn(1, said)
        context = up.context(clock=clock)
        mux = Mux(plane, "method", Session(context.node, delta=False), context.stats.scope("x."), context, Backoff(lambda: 0.5))
        watchers = {name: Waiting() for name in "ab"}
        for name, watcher in watchers.items():
            StreamSubscription(mux, False, ENDPOINTS, name, watcher, context.stats.scope(f"{name}."), context, Rules(), 0.0).start()
        await play(plane, mux)
        assert plane.why == [f"a resource is of type {CLUSTER.url!r} in a response of {ENDPOINTS.url!r}"]
        assert [watcher.failures for watcher in watchers.values()] == [1, 1]
        for name in watchers:
            scope = context.stats.scope(f"{name}.")
            assert (scope.counter("update_rejected").n, scope.counter("update_attempt", shared=True).n) == (1, 2)
        assert caplog.text.count("refused") == 1

    asyncio.run(run())


def test_each_of_the_bad_ones_is_named(clock):
    """Whatever is wrong with it."""

    class Wrong(Nobody):
        def updated(self, update):
            raise ConfigError([Problem("policy", "is wrong")])

    async def run():
        said = Response(type_url=ENDPOINTS.url, version_info="1", nonce="n")
        for name in "abc":
            said.resources.add().Pack(ENDPOINTS.message(cluster_name=name))
        plane = Stubborn(1, said)
        context = up.context(clock=clock)
        mux = Mux(plane, "method", Session(context.node, delta=False), context.stats.scope("x."), context, Backoff(lambda: 0.5))
        for name in "ab":
            StreamSubscription(mux, False, ENDPOINTS, name, Wrong(), context.stats.scope(f"{name}."), context, Rules(), 0.0).start()
        await play(plane, mux)
        assert plane.why == ["policy: a: is wrong\npolicy: b: is wrong"]

    asyncio.run(run())


def test_a_heartbeat_is_no_first_answer(clock):
    """Nobody is told of it, and who waits for the resource still has an end to that."""

    async def run():
        said = Response(type_url=ENDPOINTS.url, version_info="1", nonce="n")
        beat = messages.known("envoy.service.discovery.v3.Resource")(name="a", version="1")
        beat.ttl.seconds = 60
        said.resources.add().Pack(beat)
        plane = Stubborn(1, said)
        context = up.context(clock=clock)
        context.loop = asyncio.get_running_loop()
        mux = Mux(plane, "method", Session(context.node, delta=False), context.stats.scope("x."), context, Backoff(lambda: 0.5))
        one = StreamSubscription(mux, False, ENDPOINTS, "a", Nobody(), context.stats.scope("a."), context, Rules(), 60.0)
        one.start()
        mux.start()
        async with asyncio.timeout(20):
            while plane.asked < 2:  # the acknowledgement
                await asyncio.sleep(0)
        assert plane.refused == 0
        assert one._timer is not None
        assert context.stats.scope("a.").counter("update_success", shared=True).n == 0
        one.close()
        mux.close()

    asyncio.run(run())


@pytest.mark.parametrize("where", ["requests", "receive"])
def test_a_stream_that_fails_is_begun_anew(clock, monkeypatch, caplog, where):
    failed = []
    whole = getattr(Session, where)

    def fail(self, *of):
        if failed:
            return whole(self, *of)
        failed.append(True)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(Session, where, fail)

    async def run():
        plane = Stubborn(2)
        mux, _ = stream(plane, clock)
        mux._backoff.delay = lambda: 0.0
        await play(plane, mux)
        assert plane.streams == 2
        assert "on purpose" in caplog.text

    asyncio.run(run())


class Silent:
    """A control plane that notes what it is asked by delta. It is its own stream."""

    cluster_name = "control"

    def __init__(self) -> None:
        self.asked: asyncio.Queue[list[str]] = asyncio.Queue()
        self.says: asyncio.Queue[bytes] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def stream(self, method):
        yield self

    async def send(self, data):
        self.asked.put_nowait(list(DeltaRequest.FromString(data).resource_names_subscribe))

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self.says.get()


def test_who_subscribes_again_by_delta_gives_the_server_some_time_to_speak_by_itself(monkeypatch):
    class Watcher:
        def updated(self, update):
            """It is right."""

        def failed(self):
            pytest.fail("it was right")

    async def run():
        loop = asyncio.get_running_loop()
        timers = []
        monkeypatch.setattr(client, "ASK_AGAIN", 3600)
        plane, context, rules = Silent(), up.context(), Rules()
        context.loop = type("Loop", (), {"call_later": lambda self, seconds, what: timers.append((seconds, what)) or loop.call_later(seconds, what)})()
        mux = Mux(plane, "method", Session(context.node, delta=True), context.stats.scope("x."), context, Backoff(lambda: 0.5))

        def subscribe(name):
            StreamSubscription(mux, False, ENDPOINTS, name, Watcher(), context.stats.scope("y."), context, rules, 0.0).start()

        subscribe("a")
        subscribe("b")
        mux.start()
        assert await plane.asked.get() == ["a", "b"]
        subscribe("a")
        subscribe("b")
        ((seconds, ask),) = timers
        assert seconds == client.ASK_AGAIN
        response = DeltaResponse(type_url=ENDPOINTS.url, nonce="1")
        one = response.resources.add(name="a", version="1")
        one.resource.Pack(ENDPOINTS.message(cluster_name="a"))
        plane.says.put_nowait(response.SerializeToString())
        assert await plane.asked.get() == []  # an acknowledgement
        ask()
        assert await plane.asked.get() == ["b"]
        mux.close()

    asyncio.run(run())


def source(**fields):
    return convert.to_message(
        {"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "control"}}], **fields}, Source
    )


@pytest.mark.parametrize(
    ("settings", "rate"),
    [(None, None), ({}, (100, 10.0)), ({"max_tokens": 3}, (3, 10.0)), ({"fill_rate": 0.5}, (100, 0.5)), ({"max_tokens": 0, "fill_rate": 7}, (0, 7.0))],
)
def test_settings_are_read(settings, rate):
    read = source(**({} if settings is None else {"rate_limit_settings": settings}))
    assert support.check(read) == ([], [])
    assert Api(read, lambda name: True).rate == rate


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_a_rate_is_a_number(rate):
    one = source()
    one.rate_limit_settings.fill_rate.value = rate
    with pytest.raises(ConfigError, match=r"rate_limit_settings.fill_rate: The value of fill_rate in RateLimitSettings \((nan|inf)\) must not be NaN nor Inf"):
        Api(one, lambda name: True)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_is_more_than_nothing(rate):
    (problem,), _ = support.check(source(rate_limit_settings={"fill_rate": rate}))
    assert problem.path.startswith("rate_limit_settings.fill_rate")
