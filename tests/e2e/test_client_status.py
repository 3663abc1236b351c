"""CSDS: what the sidecar itself says of each resource that it asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.differential import proxy
from tests.differential.test_xds_streams import ADS, Plane, eds, listener, started
from tests.differential.xds_rig import KINDS, Site, assignment, beside, http_listener, play, says, static

pytestmark = pytest.mark.slow


async def status(site: Site, kind: str) -> dict[str, tuple[Any, ...]]:
    """Name -> status, version in use, version and reason of the last refusal, of one kind of resources."""
    code, text = await site.proxy.admin("GET", "/v3/discovery:client_status")
    assert code == 200
    (config,) = json.loads(text)["config"]
    assert config["node"]["id"] == "test-node"
    found = {}
    for one in config["generic_xds_configs"]:
        if one["type_url"] == KINDS[kind]:
            error = one.get("error_state", {})
            assert ("xds_config" in one, "last_updated" in one) == ("version_info" in one, "version_info" in one)
            found[one["name"]] = one["client_status"], one.get("version_info", ""), error.get("version_info", ""), error.get("details", "")
    return found


def test_each_resource_has_a_status():
    async def scenario(site: Site, plane: Plane) -> None:
        await site.origin("a")
        soon = ADS | {"initial_fetch_timeout": "0.1s"}
        plane.put("cluster", "c1", eds("one"), eds("two"), static("wrong", "a"))
        plane.put("endpoint", "e1", assignment("one", "a"))
        plane.put("listener", "l1", listener("in"), listener("out", soon, "none"))
        plane.put("route", "r1", says("one"))
        await started(site, plane, kind="DELTA_GRPC")
        await site.until_get("in", "200 one")
        accepted = ("ACKED", "c1", "", "")
        assert await status(site, "cluster") == {"one": accepted, "two": accepted, "wrong": accepted}
        assert await status(site, "endpoint") == {"one": ("ACKED", "e1", "", ""), "two": ("DOES_NOT_EXIST", "", "", "")}
        routes = await status(site, "route")
        assert routes["routes"][0] == "ACKED"
        assert routes["none"][0] == "DOES_NOT_EXIST"
        wrong = static("wrong", "a", type="ORIGINAL_DST")
        await plane.set("cluster", "c2", eds("one"), eds("two"), wrong, static("worse", "a", type="ORIGINAL_DST"), static("good", "a"))
        await plane.until_asked("cluster", "nack")
        found = await status(site, "cluster")
        assert [found[name] for name in ("one", "two", "good")] == [accepted, accepted, ("ACKED", "c2", "", "")]
        assert found["wrong"][:3] == ("NACKED", "c1", "c2")
        assert found["wrong"][3].startswith("lb_policy: wrong: ")
        assert found["worse"][:3] == ("NACKED", "", "c2")
        twice = says("x")
        twice["virtual_hosts"].append(twice["virtual_hosts"][0] | {"name": "again"})
        await plane.set("route", "r2", twice)
        await plane.until_asked("route", "nack")
        assert (await status(site, "route"))["routes"][0] == "NACKED"
        await plane.set("listener", "l2", listener("in"), http_listener("out", twice))
        await plane.until_asked("listener", "nack")
        found = await status(site, "listener")
        assert {name: entry[:3] for name, entry in found.items()} == {"in": ("ACKED", "l1", ""), "out": ("NACKED", "l1", "l2")}
        await plane.set("cluster", "c3", static("wrong", "a"))  # everything is right again
        await plane.set("route", "r3", says("one"))
        await plane.set("listener", "l3", listener("in"))
        await site.until_get("out", "refused")
        await site.until("cluster_manager.active_clusters", 2)
        assert await status(site, "cluster") == {"wrong": accepted}  # as it was
        assert await status(site, "listener") == {"in": ("ACKED", "l1", "", "")}
        await site.until("http.in.rds.routes.update_success", 2)
        assert {name: entry[0] for name, entry in (await status(site, "route")).items()} == {"routes": "ACKED"}

    asyncio.run(play(beside(scenario, Plane), proxy.our_command(), "ours"))


def test_what_does_not_come_is_told():
    async def scenario(site: Site, plane: Plane) -> None:
        soon, patient = (ADS | {"initial_fetch_timeout": limit} for limit in ("0.1s", "0s"))
        plane.put("cluster", "c1")
        plane.put("listener", "l1", listener("in", soon))
        plane.hold.add("route")
        await started(site, plane)
        assert await status(site, "route") == {"routes": ("TIMEOUT", "", "", "")}
        await plane.set("listener", "l2", listener("in", soon), listener("out", patient, "patient"))
        await plane.until_asked("route", "patient")
        assert await status(site, "route") == {"patient": ("REQUESTED", "", "", ""), "routes": ("TIMEOUT", "", "", "")}

    asyncio.run(play(beside(scenario, Plane), proxy.our_command(), "ours"))
