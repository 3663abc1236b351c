"""Health reports (HDS): what is checked, what is taken over from the specifier before, and what is said of it."""

from __future__ import annotations

import asyncio

import pytest

from meshproxy.api import convert, messages
from meshproxy.api.errors import ConfigError
from meshproxy.xds.health import Checks
from meshproxy.xds.subscription import Rules
from tests.polling import PATIENCE
from tests.unit import upstream_help as up
from tests.unit.test_health import OK, Server

_Specifier = messages.known("envoy.service.health.v3.HealthCheckSpecifier")
SICK = b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n"
HTTP = {"timeout": "30s", "interval": "0.001s", "no_traffic_interval": "0.001s", "unhealthy_threshold": 1, "healthy_threshold": 1,
        "http_health_check": {"path": "/"}}  # fmt: skip


class Held:
    """What clusters need of secrets: `held` is how many."""

    def __init__(self) -> None:
        self.held = 0

    def acquire(self, cluster, ready):
        self.held += 1
        return self.release

    def release(self) -> None:
        self.held -= 1


def checks(held: Held | None = None) -> tuple[Checks, up.Context]:
    ctx = up.context()
    ctx.clusters = {}  # no others
    return Checks(ctx, Rules(), (held or Held()).acquire), ctx


def at(address: str, **fields):
    host, _, port = address.rpartition(":")
    return {"address": {"socket_address": {"address": host, "port_value": int(port)}}} | fields


def specifier(*clusters, **fields):
    return convert.to_message({"cluster_health_checks": list(clusters), **fields}, _Specifier)


def cluster(name: str, *endpoints, health_checks=None, **fields):
    return {"cluster_name": name, "health_checks": health_checks or [HTTP], "locality_endpoints": [{"endpoints": list(endpoints)}]} | fields


def statuses(one: Checks) -> list[int]:
    """envoy.config.core.v3.HealthStatus of the flat list."""
    return [endpoint.health_status for endpoint in one.response().endpoint_health_response.endpoints_health]


async def until(condition) -> None:
    """Checks go on as often as they can: look after each turn of the loop."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


async def test_health_is_said_by_locality_and_flat():
    async with Server(*[OK] * 10000) as well, Server(*[SICK] * 10000) as ill:
        one, _ = checks()
        groups = [{"locality": {"zone": "z"}, "endpoints": [at(well.address)]}, {"locality": {"zone": "empty"}}, {"endpoints": [at(ill.address)]}]
        assert one.take(specifier(cluster("c", locality_endpoints=groups), interval="2s"))
        assert one.interval == 2.0
        assert statuses(one) == [2, 2]  # nobody has answered yet
        await until(lambda: statuses(one) == [1, 2])
        (said,) = one.response().endpoint_health_response.cluster_endpoints_health
        assert said.cluster_name == "c"
        assert [(group.locality.zone, [endpoint.health_status for endpoint in group.endpoints_health]) for group in said.locality_endpoints_health] == [
            ("z", [1]),
            ("", [2]),
        ]
        one.close()
        assert not one.response().HasField("endpoint_health_response")


async def test_what_stays_is_checked_on():
    async with Server(*[OK] * 100000) as server, Server(*[OK] * 100000) as other:
        one, ctx = checks()
        one.take(specifier(cluster("c", at(server.address))))
        await until(lambda: statuses(one) == [1])
        assert not one.take(specifier(cluster("c", at(server.address))))
        assert one.take(specifier(cluster("c", at(other.address), at(server.address))))
        assert statuses(one) == [2, 1]
        await until(lambda: statuses(one) == [1, 1])
        assert server.connections == 1
        # Another way to check: what was found out counts until it says something else.
        assert one.take(specifier(cluster("c", at(server.address), health_checks=[HTTP | {"interval": "3s"}])))
        assert statuses(one) == [1]
        # Another way to reach it: nothing is known any more.
        matches = [{"name": "m", "match": {}, "transport_socket": {"name": "raw", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"}}}]  # fmt: skip
        assert one.take(specifier(cluster("c", at(server.address), transport_socket_matches=matches)))
        assert statuses(one) == [2]
        assert "cluster.c.health_check.attempt" in set(ctx.stats.names("counter"))
        one.take(specifier())
        assert "cluster.c.health_check.attempt" not in set(ctx.stats.names("counter"))
        one.close()


async def test_several_checks_have_to_agree():
    async with Server(*[OK] * 100000) as server:
        one, _ = checks()
        never = HTTP | {"http_health_check": {"path": "/", "expected_statuses": [{"start": 201, "end": 202}]}}
        one.take(specifier(cluster("c", at(server.address), health_checks=[HTTP, never]), cluster("d", at(server.address))))
        await until(lambda: statuses(one) == [2, 1])
        one.close()


async def test_on_another_stream_the_same_is_news():
    async with Server(*[OK] * 100000) as server:
        one, _ = checks()
        one.take(specifier(cluster("c", at(server.address))))
        await until(lambda: statuses(one) == [1])
        one.begin()
        assert one.interval is None
        assert one.take(specifier(cluster("c", at(server.address))))
        assert (one.interval, statuses(one), server.connections) == (1.0, [1], 1)
        one.close()


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (cluster("c", {"address": {"socket_address": {"address": "a.test", "port_value": 1}}}), "locality_endpoints[0].endpoints[0].address.socket_address"),
        (cluster("c", {}), "locality_endpoints[0].endpoints[0].address"),
        (cluster("c", health_checks=[{**HTTP, "timeout": "0s"}]), "health_checks[0].timeout"),
        (cluster("c", health_checks=[{**HTTP, "http_health_check": None, "tcp_health_check": {"send": {"text": "zz"}}}]), "health_checks[0].tcp_health_check"),
        (cluster("c", health_checks=[{**HTTP, "http_health_check": None, "custom_health_check": {"name": "redis"}}]), "health_checks[0].custom_health_check"),
    ],
)
async def test_what_is_wrong_changes_nothing(bad, path):
    async with Server(*[OK] * 100000) as server:
        held = Held()
        one, _ = checks(held)
        one.take(specifier(cluster("c", at(server.address)), interval="2s"))
        await until(lambda: statuses(one) == [1])
        with pytest.raises(ConfigError) as caught:
            one.take(specifier(cluster("good", at(server.address)), bad, interval="3s"))
        assert caught.value.problems[0].path.startswith(f"cluster_health_checks[1].{path}")
        assert (one.interval, statuses(one), server.connections, held.held) == (2.0, [1], 1, 1)
        one.close()
        assert held.held == 0
