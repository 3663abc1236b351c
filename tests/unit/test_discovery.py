"""Names to addresses, in main: families, failures, what workers are told, initialisation."""

from __future__ import annotations

import asyncio
import socket

import pytest

from meshproxy.upstream import discovery
from meshproxy.upstream.cluster_manager import ClusterManager
from meshproxy.upstream.discovery import ALL, AUTO, V4_ONLY, V4_PREFERRED, V6_ONLY, Backoff, Discovery, choose_family
from tests.polling import PATIENCE, until
from tests.unit import upstream_help as up


class Names:
    """A resolver: the answers of each name in turn, the last one for ever. An exception is raised; an event is awaited before the next answer."""

    def __init__(self, **answers: list) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        answers = self.answers[name]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            return await self(name)
        if isinstance(answer, Exception):
            raise answer
        return answer


def dns(*groups, kind: str = "STRICT_DNS", **fields):
    return {**up.static(*groups), "type": kind, "dns_refresh_rate": "0.002s", **fields}


class Rig:
    """Main with its discovery, and one worker."""

    def __init__(self, names: Names, *configs: dict) -> None:
        self.main = up.manager(*configs)
        self.worker = up.manager(*configs)
        self.told: list[tuple[str, str]] = []
        self.names = names
        self.discovery = Discovery(self.main, self.main.context, on_endpoints=self.endpoints, on_health=self.health, resolve=names)

    def endpoints(self, name: str, assignment: bytes) -> None:
        self.told.append(("endpoints", name))
        self.worker.update_endpoints(name, assignment)

    def health(self, name: str, flags: dict[str, int]) -> None:
        self.told.append(("health", name))
        self.worker.set_health(name, flags)

    async def __aenter__(self) -> Rig:  # noqa: PYI034
        self.discovery.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.discovery.close()
        await asyncio.sleep(0)

    async def until(self, name: str, value: int) -> None:
        await until(lambda: self.stat(name) >= value)

    def stat(self, name: str) -> int:
        return self.main.context.stats.value(f"cluster.c.{name}")

    def hosts(self, manager: ClusterManager | None = None) -> list[str]:
        return [host.address.text for host in (manager or self.worker).get("c").hosts]


@pytest.mark.parametrize(
    ("family", "expected"),
    [(AUTO, ["::1", "::2"]), (V4_ONLY, ["1.1.1.1"]), (V6_ONLY, ["::1", "::2"]), (V4_PREFERRED, ["1.1.1.1"]), (ALL, ["::1", "1.1.1.1", "::2"])],
)
def test_families(family, expected):
    assert choose_family(["::1", "1.1.1.1", "::2", "::1"], family) == expected


def test_families_fall_back():
    assert choose_family(["1.1.1.1"], AUTO) == ["1.1.1.1"]
    assert choose_family(["::1"], V4_PREFERRED) == ["::1"]
    assert choose_family(["::1"], V4_ONLY) == []


async def test_strict_dns_makes_a_host_of_each_address():
    names = Names(a=[["10.0.0.1", "10.0.0.2"]], b=[["10.0.0.3"]])
    groups = (up.group(up.endpoint("a:80", load_balancing_weight=3)), up.group("b:81", "127.0.0.9:82", priority=1))
    async with Rig(names, dns(*groups)) as rig:
        assert rig.main.waiting_for() == {"c"}
        await rig.discovery.wait_initialised()
        await rig.until("update_success", 3)
        cluster = rig.worker.get("c")
        assert rig.hosts() == ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:81", "127.0.0.9:82"]
        assert [host.weight for host in cluster.hosts] == [3, 3, 1, 1]
        assert [host.hostname for host in cluster.hosts] == ["a", "a", "b", "127.0.0.9"]
        assert [host.priority for host in cluster.hosts] == [0, 0, 1, 1]
        assert rig.hosts(rig.main) == rig.hosts()
        assert rig.main.waiting_for() == set()
        assert "127.0.0.9" not in names.asked


async def test_only_changes_are_told():
    names = Names(a=[["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "10.0.0.1"], ["10.0.0.1", "10.0.0.2"], ["10.0.0.7"]])
    async with Rig(names, dns(up.group("a:80"))) as rig:
        await rig.until("update_success", 6)
        assert rig.told == [("endpoints", "c")] * 2
        assert rig.hosts() == ["10.0.0.7:80"]
        assert rig.stat("update_no_rebuild") >= 3


async def test_a_failure_keeps_the_hosts_and_an_empty_answer_removes_them():
    names = Names(a=[["10.0.0.1"], socket.gaierror(socket.EAI_AGAIN, "try again")])
    async with Rig(names, dns(up.group("a:80"))) as rig:
        await rig.until("update_failure", 2)
        assert rig.hosts() == ["10.0.0.1:80"]
    names = Names(a=[["10.0.0.1"], []])
    async with Rig(names, dns(up.group("a:80"))) as rig:
        await rig.until("update_success", 2)
        assert rig.hosts() == []


async def test_logical_dns_keeps_its_one_host():
    seen = asyncio.Event()
    names = Names(a=[["10.0.0.1", "10.0.0.2"], seen, ["10.0.0.3"], []])
    async with Rig(names, dns(up.group("a:80"), kind="LOGICAL_DNS")) as rig:
        await rig.until("update_success", 1)
        cluster = rig.worker.get("c")
        host = cluster.hosts[0]
        assert host.address.text == "10.0.0.1:80"
        host.pools = pools = {}
        seen.set()
        await rig.until("update_failure", 1)
        assert cluster.hosts == [host]
        assert host.address.text == "10.0.0.3:80"
        assert host.pools is pools


async def test_a_failing_name_does_not_hold_up_the_start():
    async with Rig(Names(a=[OSError("no resolver")]), dns(up.group("a:80"))) as rig:
        await asyncio.wait_for(rig.discovery.wait_initialised(), PATIENCE)
        assert rig.hosts() == []


async def test_wait_for_warm_on_init_false():
    answers = asyncio.Event()
    async with Rig(Names(a=[answers, ["10.0.0.1"]]), dns(up.group("a:80"), wait_for_warm_on_init=False)) as rig:
        await asyncio.wait_for(rig.discovery.wait_initialised(), PATIENCE)
        assert rig.names.asked == ["a"]
        assert rig.hosts() == []
        answers.set()
        await rig.until("update_success", 1)
        assert rig.hosts() == ["10.0.0.1:80"]


async def test_health_checks_follow_names():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    check = {"timeout": "60s", "interval": "60s", "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {}}
    async with Rig(Names(a=[["127.0.0.1", "127.0.0.77"]]), dns(up.group(f"a:{port}"), health_checks=[check])) as rig:
        await asyncio.wait_for(rig.discovery.wait_initialised(), PATIENCE)
        cluster = rig.worker.get("c")
        assert [host.healthy for host in cluster.hosts] == [True, False]
        assert rig.stat("health_check.healthy") == 1
        replacement = up.manager(dns(up.group(f"a:{port}"), health_checks=[check]))  # what a replaced worker is told
        replacement.update_endpoints("c", rig.main._known["c"].assignment)
        replacement.set_health("c", rig.main._known["c"].health)
        assert [host.healthy for host in replacement.get("c").hosts] == [True, False]
    server.close()
    await server.wait_closed()


async def test_typed_dns_cluster():
    typed = {"@type": "type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster", "dns_refresh_rate": "0.002s", "dns_lookup_family": "V4_ONLY"}
    config = up.static(up.group("a:80"))
    del config["type"]
    config["cluster_type"] = {"name": "envoy.cluster.dns", "typed_config": typed}
    async with Rig(Names(a=[["::1", "10.0.0.1"]]), config) as rig:
        await rig.until("update_success", 2)
        assert rig.hosts() == ["10.0.0.1:80"]


def test_backoff_doubles_up_to_its_maximum():
    plain = Backoff(up.proto({"name": "c"}), 5.0, lambda: 0.5)
    assert [plain.delay() for _ in range(3)] == [5.0] * 3
    rate = {"base_interval": "2s", "max_interval": "10s"}
    random = Backoff(up.proto({"name": "c", "dns_failure_refresh_rate": rate}), 5.0, lambda: 0.5)
    assert [random.delay() for _ in range(5)] == [1, 2, 4, 5, 5]
    random.reset()
    assert random.delay() == 1


async def test_refresh_rates():
    def once(answers, **fields):
        proto = up.proto({**up.static(up.group("a:80")), "type": "STRICT_DNS", **fields})
        ctx = up.context()
        cluster = discovery.DnsCluster(
            proto, discovery.discovery_options(proto), ctx, Names(a=[answers]), ctx.stats.scope("cluster.c."), lambda assignment: None
        )
        return cluster._once(cluster._targets[0], Backoff(proto, cluster._refresh_rate, lambda: 1.0))

    assert await once(["1.1.1.1"]) == 5
    assert await once(["1.1.1.1"], dns_refresh_rate="7s") == 7
    assert await once(["1.1.1.1"], respect_dns_ttl=True) == 60
    assert 7 <= await once(["1.1.1.1"], dns_refresh_rate="7s", dns_jitter="1s") <= 8
    assert await once(OSError("x"), dns_refresh_rate="7s") == 7


async def test_the_systems_resolver():
    assert "127.0.0.1" in await discovery.system_resolve("127.0.0.1")
