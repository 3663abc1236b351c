"""The on_demand filter: who waits and for what; what goes on at once; sources that can be none. Its way to main and back is in tests/differential."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.http.demand import CLUSTER, HOST, Demand
from meshproxy.http.filter_chain import Chain
from meshproxy.http.filters import on_demand
from meshproxy.http.stream import ANEW
from tests.unit.filter_help import Route, Stream, context, proto

CONFIG = "envoy.extensions.filters.http.on_demand.v3.OnDemand"
PER_ROUTE = "envoy.extensions.filters.http.on_demand.v3.PerRouteConfig"
ADS = "odcds: {source: {ads: {}, resource_api_version: V3}, timeout: 2s}"


def make(text: str = "", clusters: Any = ()) -> tuple[Any, list[Any], Any]:
    """A filter, what it asked for, and its surroundings."""
    ctx = context(clusters=clusters)
    asked: list[Any] = []
    ctx.context.demand = Demand(lambda what, timeout: asked.append((what, timeout)))
    return on_demand.compile(proto(CONFIG, f"{{{text}}}"), ctx), asked, ctx


def stream(route: Any, *, key: bytes | None = b"key", then: Any = None) -> Any:
    made = Stream(route=route)
    made.manager = SimpleNamespace(asks_for_hosts=key, match=lambda stream: then)
    made.request.authority = b"A.test:80"
    return made


async def answered(filter: Any, ctx: Any, asked: list[Any], made: Any, *, found: bool) -> Any:
    waiting = asyncio.ensure_future(filter.request_headers(made, True))
    await asyncio.sleep(0)
    ctx.context.demand.answered(asked[-1][0], found=found)
    return await waiting


async def test_a_virtual_host_is_waited_for():
    filter, asked, ctx = make()
    assert await answered(filter, ctx, asked, stream(None, then=Route()), found=True) is ANEW
    assert await answered(filter, ctx, asked, stream(None), found=True) is None, "there is none: on to the 404"
    assert asked == [((HOST, b"key", "a.test:80"), 0.0)] * 2


def test_without_virtual_hosts_by_discovery_nobody_waits():
    filter, asked, _ = make()
    assert filter.request_headers(stream(None, key=None), True) is None
    assert filter.request_headers(stream(Route(cluster_name="gone", reply=None)), True) is None, "clusters do not come by this one"
    assert not asked


async def test_a_cluster_is_waited_for():
    filter, asked, ctx = make(ADS, clusters={"here": None})
    assert filter.request_headers(stream(Route(cluster_name="here", reply=None)), True) is None
    assert filter.request_headers(stream(Route(cluster_name="any", reply=print)), True) is None, "answered without one"
    assert await answered(filter, ctx, asked, stream(Route(cluster_name="new", reply=None)), found=True) is ANEW
    assert await answered(filter, ctx, asked, stream(Route(cluster_name="none", reply=None)), found=False) is None
    assert [(what[0], what[2], timeout) for what, timeout in asked] == [(CLUSTER, "new", 2.0), (CLUSTER, "none", 2.0)]


@pytest.mark.parametrize("host", [b"a\xff.test", b"a" * 1025])
def test_what_can_be_no_name_is_not_asked_for(host):
    filter, asked, _ = make(ADS)
    made = stream(None)
    made.request.authority = host
    assert filter.request_headers(made, True) is None
    assert filter.request_headers(stream(Route(cluster_name="", select_cluster=lambda _: host, reply=None)), True) is None
    assert not asked


async def test_a_cluster_that_a_header_names_is_waited_for():
    filter, asked, ctx = make(ADS)
    made = stream(Route(cluster_name="", select_cluster=lambda stream: b"new", reply=None))
    assert await answered(filter, ctx, asked, made, found=True) is ANEW
    assert asked[0][0][2] == "new"
    assert filter.request_headers(stream(Route(cluster_name="", select_cluster=lambda stream: None, reply=None)), True) is None


async def test_a_request_that_is_reset_waits_no_longer():
    filter, asked, ctx = make()
    waiting = asyncio.ensure_future(filter.request_headers(stream(None), True))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    ctx.context.demand.answered(asked[0][0], found=True)  # nobody is there to be told
    assert [what for what, _ in asked] == [(HOST, b"key", "a.test:80")]
    assert not ctx.context.demand._waiting


def test_a_route_has_its_own():
    filter, _, ctx = make()
    special = on_demand.specialise(filter, [proto(PER_ROUTE, f"{{{ADS}}}")], ctx)
    assert not filter.source
    assert special.source
    assert special.timeout == 2.0


def test_it_stands_in_no_plans_way():
    chain = Chain([make()[0]])
    assert chain.plannable
    assert not chain.repeated


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("odcds: {}", r"odcds.source: clusters by xdstp:// names"),
        ("odcds: {source: {path_config_source: {path: /dev/null}}}", r"odcds.source: on-demand clusters: only 'DELTA_GRPC' or 'ADS'"),
        ("odcds: {source: {api_config_source: {api_type: GRPC, transport_api_version: V3}}}", r"odcds.source: on-demand clusters: only 'DELTA_GRPC'"),
    ],
)
def test_what_is_no_source(text, why):
    with pytest.raises(ConfigError, match=why):
        make(text)
