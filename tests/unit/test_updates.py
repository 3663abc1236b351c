"""What replaced configuration leaves behind: nothing. And what main says of two versions of a listener."""

from __future__ import annotations

import asyncio
import gc

import pytest
import yaml

from meshproxy import listeners, worker
from meshproxy.api import convert, messages
from meshproxy.cli import Options
from meshproxy.http.manager import HttpConnectionManager
from meshproxy.http.route_configs import RouteConfigs, key_of, managers
from meshproxy.http.routes import RouteTable
from meshproxy.net.listener import Listener
from meshproxy.upstream.cluster import Cluster

LISTENER = messages.known("envoy.config.listener.v3.Listener")
ROUTES = messages.known("envoy.config.route.v3.RouteConfiguration")
HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"


def chain(prefix: str, name: str = "") -> dict:
    manager = {
        "@type": HCM,
        "stat_prefix": prefix,
        "rds": {"route_config_name": "r", "config_source": {"ads": {}}},
        "http_filters": [{"name": "router", "typed_config": {"@type": ROUTER}}],
    }
    match = {"filter_chain_match": {"source_type": "EXTERNAL"}} if name else {}
    return {"name": name, "filters": [{"name": "hcm", "typed_config": manager}], **match}


def listener(*chains: dict, **fields):
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    return convert.to_message({"name": "l", "address": address, "filter_chains": list(chains), **fields}, LISTENER)


@pytest.fixture
async def context():
    bootstrap = messages.known("envoy.config.bootstrap.v3.Bootstrap")()
    plan = worker.Plan(options=Options(), concurrency=1, levels=None, log_handler=None)
    plan.node = bootstrap.node
    made = worker.make_context(asyncio.get_running_loop(), bootstrap, plan, 0)
    made.routes = RouteConfigs()
    return made


def count(cls) -> int:
    gc.collect()
    return sum(type(one) is cls for one in gc.get_objects())


async def test_a_replaced_listener_leaves_nothing(context):
    before = count(HttpConnectionManager)
    for turn in range(5):
        made = Listener(listener(chain(f"p{turn}")), [], context)
        for one in made.chains:
            one.retire()
            one.dispose()
    del made, one
    assert count(HttpConnectionManager) == before
    assert not context.stats.collectors or all(not isinstance(each.__self__, HttpConnectionManager) for each in context.stats.collectors)


async def test_equal_filter_chains_are_taken_over_as_they_are(context):
    old = Listener(listener(chain("a", "outside"), chain("b")), [], context)
    new = Listener(listener(chain("a", "outside"), chain("c")), [], context, predecessor=old)
    assert new.chains[0] is old.chains[0]
    assert new.chains[1] is not old.chains[1]


async def test_routes_are_replaced_where_they_are_used(context):
    proto = listener(chain("a"))
    made = Listener(proto, [], context)
    [manager] = managers(proto)
    routes = ROUTES(name="r")
    before = count(RouteTable)
    for turn in range(3):
        routes.metadata.filter_metadata["turn"]["n"] = turn
        context.routes.update(key_of(manager.rds), routes.SerializeToString())
    table = made.chains[0].terminal.routes
    assert (table.name, table.metadata) == ("r", {"turn": {"n": 2}})
    assert count(RouteTable) == before
    assert Listener(proto, [], context).chains[0].terminal.routes.metadata == {"turn": {"n": 2}}


async def test_a_cluster_that_is_in_use_is_replaced_at_once_and_the_old_one_forgotten(context):
    def take(timeout: str) -> None:
        text = f"{{name: c, connect_timeout: {timeout}, load_assignment: {{cluster_name: c}}}}"
        proto = convert.to_message(yaml.safe_load(text), messages.known("envoy.config.cluster.v3.Cluster"))
        context.clusters.take("c", proto.SerializeToString(), None, {})

    before = count(Cluster)
    take("1s")
    assert list(context.clusters.compiled()) == []
    assert context.clusters.get("c").connect_timeout == 1.0
    for seconds in (2, 3):
        take(f"{seconds}s")
    assert [one.connect_timeout for one in context.clusters.compiled()] == [3.0]
    assert count(Cluster) == before + 1


def test_versions_of_a_listener_are_compared():
    one = listener(chain("a"))
    assert listeners.only_chains_differ(one, listener(chain("b"), chain("c", "x")))
    assert not listeners.only_chains_differ(one, listener(chain("a"), per_connection_buffer_limit_bytes=1))
