"""How often a stream asks, and how often it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import math

import pytest

from meshproxy.api import convert, messages, support
from meshproxy.api.errors import ConfigError
from meshproxy.xds import client
from meshproxy.xds.client import FILL_RATE, MAX_TOKENS, Api, Backoff, Mux, StreamSubscription
from meshproxy.xds.resources import CLUSTER, ENDPOINTS, WILDCARD
from meshproxy.xds.session import Session
from meshproxy.xds.subscription import Rules
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

    def __init__(self, times: int) -> None:
        self.refused = 0
        self.asked = 0
        self._times = times
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        self.done = asyncio.Event()

    @contextlib.asynccontextmanager
    async def stream(self, method):
        yield self

    async def send(self, data):
        request = Request.FromString(data)
        self.asked += 1
        self.refused += request.HasField("error_detail")
        if self.refused < self._times:
            self._said.put_nowait(BAD.SerializeToString())
        else:
            self.done.set()

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self._said.get()


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
    async with asyncio.timeout(20):
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
        async with asyncio.timeout(20):
            while not gauge.n:
                await asyncio.sleep(0)
        assert (plane.asked, gauge.n) == (1, 1)
        mux.close()
        async with asyncio.timeout(20):
            while gauge.n:
                await asyncio.sleep(0)

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
