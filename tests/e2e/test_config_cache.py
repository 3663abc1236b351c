"""`--config-cache`: a sidecar that is restarted while its control plane is away, and what becomes of it when that is back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from meshproxy.api import convert, messages
from meshproxy.xds.cache import Cache
from meshproxy.xds.resources import CLUSTER, ROUTES, Resource, Update
from tests.differential import proxy
from tests.differential.config import Config
from tests.differential.test_xds_streams import ADS, Plane, api, eds, listener, server, started
from tests.differential.xds_rig import Site, assignment, beside, goes_to, play, says, static
from tests.polling import until

pytestmark = pytest.mark.slow
QUICK = ADS | {"initial_fetch_timeout": "0.5s"}


def run(scenario: Callable[[Site, Plane], Awaitable[None]], cache: Path) -> None:
    """Play a scenario on our sidecar."""
    command = ["warning" if part == "error" else part for part in proxy.our_command()]
    asyncio.run(play(beside(scenario, Plane), [*command, "--config-cache", str(cache)], "ours"))


def quickly(kind: str, cluster: str = "control") -> Config:
    """An ApiConfigSource that is tried again soon."""
    retry = {"retry_back_off": {"base_interval": "0.05s", "max_interval": "0.1s"}}
    return api(kind) | {"grpc_services": [{"envoy_grpc": {"cluster_name": cluster, "retry_policy": retry}}]}


async def start(site: Site, plane: Plane, *, kind: str = "GRPC") -> None:
    """Start the sidecar, perhaps once more."""
    site.proxy.stop()
    await started(site, plane, dynamic_resources={"ads_config": quickly(kind), "cds_config": QUICK, "lds_config": QUICK})


def full(plane: Plane) -> None:
    """Two of everything."""
    plane.put("cluster", "c1", eds("one"), eds("two"))
    plane.put("endpoint", "e1", assignment("one", "a"), assignment("two", "b"))
    plane.put("listener", "l1", listener("in"), listener("out", routes="more"))
    plane.put("route", "r1", goes_to("one"), goes_to("two", "more"))


async def kept(cache: Path, count: int) -> None:
    """Wait until so many files are there."""
    await until(lambda: len(list(cache.glob("*.pb"))) == count)


@pytest.mark.parametrize("kind", ["GRPC", "DELTA_GRPC"])
def test_what_went_meanwhile_goes_when_the_control_plane_is_back(tmp_path, kind):
    """By delta the server is told what we have, and with which versions: otherwise nobody would ever say that something has gone."""
    cache = tmp_path / "cache"

    async def scenario(site: Site, plane: Plane) -> None:
        await site.origin("a", "b")
        full(plane)
        await start(site, plane, kind=kind)
        await site.until_get("out", "200 b")
        await kept(cache, 6)
        await plane.stop()
        await start(site, plane, kind=kind)
        assert [await site.get("in"), await site.get("out")] == ["200 a", "200 b"]
        client = await site.connect("in")
        assert await client.get() == "200 a"
        plane.put("cluster", "c2", eds("one"), static("three", "a"))
        plane.put("listener", "l2", listener("in"))
        plane.log["cluster"].clear()
        await plane.start()
        await site.until_get("out", "refused")
        await site.until("cluster_manager.active_clusters", 3)
        if kind == "DELTA_GRPC":
            assert plane.log["cluster"][0] == "ask +* - one=c1,two=c1"
        assert await client.get() == "200 a"
        await plane.stop()
        await start(site, plane, kind=kind)  # what did not change was not said again, and is there
        assert [await site.get("in"), await site.get("out")] == ["200 a", "refused"]
        await site.until("cluster_manager.active_clusters", 3)

    run(scenario, cache)


def test_a_control_plane_that_says_nothing(tmp_path):
    """It is there and silent: after the time that there is for a first answer the cache is used; what then comes replaces it."""
    cache = tmp_path / "cache"

    async def scenario(site: Site, plane: Plane) -> None:
        await site.origin("a", "b")
        full(plane)
        await start(site, plane, kind="DELTA_GRPC")
        await site.until_get("out", "200 b")
        await kept(cache, 6)
        plane.hold.update(("cluster", "endpoint", "listener", "route"))
        await start(site, plane, kind="DELTA_GRPC")
        assert [await site.get("in"), await site.get("out")] == ["200 a", "200 b"]
        assert "using what was accepted" in site.proxy.stderr()
        plane.put("cluster", "c2", eds("one"))
        plane.put("listener", "l2", listener("in"))
        plane.hold.clear()
        await plane.push()
        await site.until_get("out", "refused")
        await site.until("cluster_manager.active_clusters", 2)
        assert await site.get("in") == "200 a"

    run(scenario, cache)


def test_files_go_with_who_subscribed(tmp_path):
    cache = tmp_path / "cache"

    async def scenario(site: Site, plane: Plane) -> None:
        await site.origin("a", "b")
        full(plane)
        await start(site, plane)
        await kept(cache, 6)
        await plane.set("cluster", "c2", eds("one", connect_timeout="31s"))  # its endpoints are subscribed to anew, and stay
        await plane.set("listener", "l2", listener("in"))
        await kept(cache, 4)
        await site.until_get("in", "200 a")
        site.proxy.stop()
        assert len(list(cache.glob("*.pb"))) == 4

    run(scenario, cache)


def test_sources_have_files_of_their_own(tmp_path):
    """Two sources may each have routes of the same name."""
    cache = tmp_path / "cache"
    others: list[Plane] = []

    async def scenario(site: Site, plane: Plane) -> None:
        other = Plane(site)
        others.append(other)
        await other.start()
        own = {"api_config_source": quickly("GRPC", "away"), "resource_api_version": "V3"}
        plane.put("cluster", "c1")
        plane.put("listener", "l1", listener("in"), listener("out", own))
        plane.put("route", "r1", says("one"))
        other.put("route", "s1", says("other"))
        await plane.start()
        bootstrap = {
            "dynamic_resources": {"ads_config": quickly("GRPC"), "cds_config": QUICK, "lds_config": QUICK},
            "static_resources": {"clusters": [server(plane), server(other, "away")]},
        }
        await site.start(bootstrap)
        await site.until_get("out", "200 other")
        await kept(cache, 4)
        await plane.stop()
        await other.stop()
        site.proxy.stop()
        await site.start(bootstrap)
        assert [await site.get("in"), await site.get("out")] == ["200 one", "200 other"]

    try:
        run(scenario, cache)
    finally:
        asyncio.run(others[0].stop())


class _Written:
    """A cache that another version of us may have written."""

    def __init__(self, folder: Path) -> None:
        loop = asyncio.new_event_loop()
        self._cache = Cache(str(folder), loop)
        loop.close()
        self._cache.changed = lambda entry: entry.write()  # type: ignore[method-assign]

    def put(self, type: Any, name: str, *documents: dict[str, Any]) -> None:
        source = convert.to_message(ADS, messages.known("envoy.config.core.v3.ConfigSource"))
        entry = self._cache.entry(type, name, source)
        made = [Resource(one["name"], "v", convert.to_message(one, type.message)) for one in documents]
        entry.accepted(Update(type, "v", made, complete=type.complete), 1.0)


def test_what_is_wrong_in_it_is_left_out(tmp_path):
    """Another version may have taken what this one does not: a value out of range, and a feature; the rest is used."""
    cache = tmp_path / "cache"

    async def scenario(site: Site, plane: Plane) -> None:
        await plane.start()
        await plane.stop()  # the port is known
        written = _Written(cache)
        good = site.render(static("good"))
        late = good | {"name": "late", "connect_timeout": "-1s"}
        new = good | {"name": "new", "track_cluster_stats": {"timeout_budgets": True}}
        written.put(CLUSTER, "*", late, good, new)
        await start(site, plane, kind="DELTA_GRPC")
        _, text = await site.proxy.admin("GET", "/config_dump?resource=dynamic_active_clusters")
        assert ('"good"' in text, '"late"' in text, '"new"' in text) == (True, False, False)
        assert "not all of it can be used: connect_timeout: late: " in site.proxy.stderr()
        assert "track_cluster_stats: new: is not supported" in site.proxy.stderr()
        plane.put("cluster", "c2", static("good"), static("late"))
        plane.put("listener", "l1")
        await plane.start()
        await site.until("cluster_manager.active_clusters", 3)
        assert plane.log["cluster"][0] == "ask +* - good=,late=,new="  # to be said again, whatever they were

    run(scenario, cache)


@pytest.mark.parametrize("damage", ["empty", "cut off", "other contents", "a folder"])
def test_what_is_damaged_is_not_used(tmp_path, damage):
    cache = tmp_path / "cache"

    async def scenario(site: Site, plane: Plane) -> None:
        await plane.start()
        await plane.stop()
        written = _Written(cache)
        written.put(CLUSTER, "*", *(site.render(static(name)) for name in ("one", "two")))
        (file,) = cache.iterdir()
        whole = file.read_bytes()
        if damage == "empty":
            file.write_bytes(b"")
        elif damage == "cut off":  # where one resource ends, so that what is left can be read
            response = messages.known("envoy.service.discovery.v3.DiscoveryResponse").FromString(whole)
            del response.resources[1:]
            file.write_bytes(response.SerializeToString())
        elif damage == "other contents":
            written.put(ROUTES, "routes", says("x"))
            (other,) = (path for path in cache.iterdir() if path != file)
            other.rename(file)
        else:
            file.unlink()
            file.mkdir()
        await start(site, plane)
        assert await site.stat("cluster_manager.active_clusters") == "1"
        assert await site.stat("cluster_manager.cds.config_cache_used") == ""
        assert f"cannot {'read' if damage == 'a folder' else 'use'} {file}" in site.proxy.stderr()

    run(scenario, cache)


def test_a_folder_that_is_none(tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("")

    async def scenario(site: Site, plane: Plane) -> None:
        with pytest.raises(proxy.ProxyError, match=f"--config-cache: {cache}: File exists"):
            await start(site, plane)

    run(scenario, cache)
