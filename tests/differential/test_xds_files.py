"""Dynamic configuration from files: the same changes to Envoy and to us, compared by traffic, statistics and /config_dump."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.differential.xds_rig import QUICK_DRAIN, Site, assignment, compare, eds, goes_to, http_listener, says, source, static

DYNAMIC = {"dynamic_resources": {"cds_config": source("cds.json"), "lds_config": source("lds.json")}}
STATS = ("cluster_manager.", "listener_manager.", "http.in.rds.")


async def started(site: Site, *, clusters: list[Any] | None = None, listeners: list[Any] | None = None) -> None:
    site.write("cds.json", "c1", "cluster", *(clusters or []))
    site.write("lds.json", "l1", "listener", *(listeners or []))
    await site.start(DYNAMIC)


async def clusters_and_listeners_come_and_go(site: Site) -> None:
    await site.origin("a", "b")
    await started(site, clusters=[static("one", "a")], listeners=[http_listener("in", goes_to("one"))])
    site.note(await site.get("in"))
    await site.note_stats(*STATS)
    site.write("cds.json", "c2", "cluster", static("one", "b"), static("two", "a"))
    await site.until("cluster_manager.cds.version_text", "c2")
    await site.until_get("in", "200 b")
    await site.note_stats(*STATS)
    await site.note_dump("ClustersConfigDump", "EndpointsConfigDump")
    site.write("lds.json", "l2", "listener", http_listener("in", goes_to("one")), http_listener("out", goes_to("two")))
    await site.until("listener_manager.lds.version_text", "l2")
    await site.until_get("out", "200 a")
    await site.note_stats(*STATS)
    site.write("lds.json", "l3", "listener", http_listener("out", goes_to("two")))
    await site.until("listener_manager.lds.version_text", "l3")
    await site.until_get("in", "refused")
    site.write("cds.json", "c3", "cluster", static("one", "b"))
    await site.until("cluster_manager.cds.version_text", "c3")
    await site.until_get("out", "503 ")
    await site.note_stats(*STATS)
    await site.note_dump("ClustersConfigDump", "ListenersConfigDump", "RoutesConfigDump")


async def routes_change_under_a_connection(site: Site) -> None:
    site.write("rds-routes.json", "r1", "route", says("one"))
    await started(site, listeners=[http_listener("in", rds="routes")])
    client = await site.connect("in")
    site.note(await client.get())
    site.write("rds-routes.json", "r2", "route", says("two"))
    await site.until_get("in", "200 two")
    site.note(await client.get())
    await site.note_stats(*STATS)
    await site.note_dump("RoutesConfigDump")
    site.write("rds-routes.json", "r3", "route", says("two"))
    await site.until("http.in.rds.routes.version_text", "r3")
    await site.note_dump("RoutesConfigDump")
    site.write("rds-routes.json", "r4", "route", says("other", name="another"))
    await site.until("http.in.rds.routes.update_rejected", 1)
    site.write("rds-routes.json", "r5", "route")
    await site.until("http.in.rds.routes.update_empty", 1)
    site.note(await client.get())
    await site.note_stats(*STATS)
    await site.note_dump("RoutesConfigDump")


async def endpoints_change_under_a_connection(site: Site) -> None:
    await site.origin("a", "b")
    site.write("eds-service.json", "e1", "endpoint", assignment("service", "a"))
    await started(site, clusters=[eds("one", "service")], listeners=[http_listener("in", goes_to("one"))])
    client = await site.connect("in")
    site.note(await client.get())
    site.write("eds-service.json", "e2", "endpoint", assignment("service", "b"))
    await site.until_get("in", "200 b")
    site.note(await client.get())
    await site.note_stats("cluster.one.update", "cluster.one.member", "cluster.one.assignment", "cluster.one.version_text", "cluster.one.init")
    await site.note_dump("EndpointsConfigDump", "ClustersConfigDump")
    site.write("eds-service.json", "e3", "endpoint", assignment("wrong", "a"))
    await site.until("cluster.one.update_rejected", 1)
    site.write("eds-service.json", "e4", "endpoint")
    await site.until("cluster.one.update_empty", 1)
    site.write("eds-service.json", "e5", "endpoint", assignment("service", "b"))
    await site.until("cluster.one.version_text", "e5")
    site.note(await client.get())
    site.write("eds-service.json", "e6", "endpoint", assignment("service"))
    await site.until_get("in", "503 no healthy upstream")
    await site.note_stats("cluster.one.update", "cluster.one.member", "cluster.one.version_text")


async def what_changes_nothing_keeps_connections(site: Site) -> None:
    await started(site, listeners=[http_listener("in", says("same"))])
    client = await site.connect("in")
    site.note(await client.get())
    site.write("lds.json", "l2", "listener", http_listener("in", says("same")))
    await site.until("listener_manager.lds.version_text", "l2")
    site.note(await client.get())
    await site.note_stats(*STATS)
    await site.note_dump("ListenersConfigDump")


async def a_changed_listener_drains(site: Site) -> None:
    await started(site, listeners=[http_listener("in", says("old"))])
    client, idle = await site.connect("in"), await site.connect("in")
    site.note(await client.get(), await idle.get())
    site.write("lds.json", "l2", "listener", http_listener("in", says("new"), per_connection_buffer_limit_bytes=50000))
    await site.until("listener_manager.lds.version_text", "l2")
    await site.until_get("in", "200 new")
    site.note(await client.get())
    await site.note_stats(*STATS)
    await site.note_dump("ListenersConfigDump", "RoutesConfigDump")
    await site.until("listener_manager.total_listeners_draining", 0)  # --drain-time-s
    site.note(await idle.closed())
    site.note(await site.get("in"))
    await site.note_stats(*STATS)


def by_port(name: str, *texts: str) -> Any:
    """A listener with a filter chain for connections from this machine, and one for all others; their texts."""
    one, other = (http_listener(name, says(text), prefix=prefix)["filter_chains"][0] for text, prefix in zip(texts, ("local", "others"), strict=True))
    chains = [one | {"name": "local", "filter_chain_match": {"source_type": "SAME_IP_OR_LOOPBACK"}}, other | {"name": "others"}]
    return http_listener(name, says("")) | {"filter_chains": chains}


async def other_filter_chains_are_left_alone(site: Site) -> None:
    await started(site, listeners=[by_port("in", "here", "there")])
    client = await site.connect("in")
    site.note(await client.get())
    site.write("lds.json", "l2", "listener", by_port("in", "here", "elsewhere"))
    await site.until("listener_manager.listener_in_place_updated", 1)
    site.note(await client.get())
    await site.note_stats(*STATS)
    site.write("lds.json", "l3", "listener", by_port("in", "near", "elsewhere"))
    await site.until("listener_manager.listener_in_place_updated", 2)
    await site.until_get("in", "200 near")
    site.note(await client.get())
    await site.note_stats(*STATS)  # but not /config_dump, where Envoy shows the new contents with the old version
    site.note(await client.closed())


async def a_listener_moves_to_another_port(site: Site) -> None:
    await started(site, listeners=[http_listener("in", says("old"))])
    client = await site.connect("in")
    site.note(await client.get())
    moved = http_listener("other", says("new")) | {"name": "in"}
    site.write("lds.json", "l2", "listener", moved)
    await site.until("listener_manager.lds.version_text", "l2")
    await site.until_get("other", "200 new")
    await site.until_get("in", "refused")
    site.note(await client.get())
    await site.note_stats(*STATS)


async def wrong_ones_do_not_take_right_ones_down(site: Site) -> None:
    await site.origin("a")
    await started(site, clusters=[static("one", "a")], listeners=[http_listener("in", goes_to("one"))])
    wrong = static("two", "a", type="ORIGINAL_DST")
    site.write("cds.json", "c2", "cluster", wrong, static("three", "a"))
    await site.until("cluster_manager.cds.update_rejected", 1)
    duplicate = says("x")
    duplicate["virtual_hosts"].append(duplicate["virtual_hosts"][0] | {"name": "again"})
    site.write("lds.json", "l2", "listener", http_listener("bad", duplicate), http_listener("in", goes_to("three")))
    await site.until("listener_manager.lds.update_rejected", 1)
    await site.until_get("in", "200 a")
    await site.note_stats("cluster_manager.cds.", "listener_manager.")
    await site.note_dump("ClustersConfigDump")


async def broken_files_change_nothing(site: Site) -> None:
    await started(site, listeners=[http_listener("in", says("one"))])
    site.replace("lds.json", "{nonsense")
    await site.until("listener_manager.lds.update_failure", 1)
    site.write("lds.json", "l2", "listener", http_listener("in", says("one"), listener_filters_timeout="-1s"))
    await site.until("listener_manager.lds.update_rejected", 1)
    site.write("lds.json", "l3", "cluster", static("one"))
    await site.until("listener_manager.lds.update_rejected", 2)
    site.note(await site.get("in"))
    await site.note_stats(*STATS)
    await site.note_dump("ListenersConfigDump")


async def a_start_without_anything_good(site: Site) -> None:
    site.replace("cds.json", "{nonsense")
    site.replace("lds.json", "")
    await site.start(DYNAMIC)
    await site.note_stats("cluster_manager.cds", "listener_manager.lds")
    site.write("lds.json", "l1", "listener", http_listener("in", says("late")))
    await site.until_get("in", "200 late")
    await site.note_stats("cluster_manager.cds", "listener_manager.")


async def a_watched_folder(site: Site) -> None:
    (site.folder / "mounted").mkdir()
    (site.folder / "mounted" / "lds.json").symlink_to("..data/lds.json")

    def mount(name: str, text: str) -> None:
        # As the kubelet does it: a new folder, and a symbolic link moved over the old one.
        (site.folder / "mounted" / name).mkdir()
        site.write("lds.json", name, "listener", http_listener("in", says(text)))
        (site.folder / "lds.json").rename(site.folder / "mounted" / name / "lds.json")
        (site.folder / "mounted" / "..new").symlink_to(name)
        (site.folder / "mounted" / "..new").rename(site.folder / "mounted" / "..data")

    mount("v1", "one")
    config = {"path_config_source": {"path": "${file:mounted}/lds.json", "watched_directory": {"path": "${file:mounted}"}}}
    await site.start({"dynamic_resources": {"lds_config": config}})
    site.note(await site.get("in"))
    mount("v2", "two")
    await site.until_get("in", "200 two")
    await site.note_stats("listener_manager.lds.")


async def names_are_resolved_before_a_cluster_is_used(site: Site) -> None:
    await site.origin("a", "b")
    named = static("one", "a", type="STRICT_DNS")
    named["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["address"] = "localhost"
    await started(site, clusters=[named | {"dns_lookup_family": "V4_ONLY"}], listeners=[http_listener("in", goes_to("one"))])
    site.note(await site.get("in"))
    site.write("cds.json", "c2", "cluster", static("one", "b", type="STRICT_DNS"))
    await site.until_get("in", "200 b")
    site.note(await site.stat("cluster_manager.warming_clusters"))
    await site.note_dump("ClustersConfigDump")


async def static_ones_are_not_touched(site: Site) -> None:
    await site.origin("a", "b")
    site.write("cds.json", "c1", "cluster", static("one", "b"))
    site.write("lds.json", "l1", "listener", http_listener("in", says("dynamic")))
    await site.start(DYNAMIC | {"static_resources": {"clusters": [static("one", "a")], "listeners": [http_listener("in", goes_to("one"))]}})
    site.note(await site.get("in"))
    await site.note_stats(*STATS)
    site.write("cds.json", "c2", "cluster")
    await site.until("cluster_manager.cds.update_success", 2)
    site.note(await site.get("in"))
    await site.note_dump("ClustersConfigDump", "ListenersConfigDump")


async def static_ones_with_dynamic_parts(site: Site) -> None:
    await site.origin("a", "b")
    site.write("eds-one.json", "e1", "endpoint", assignment("one", "a"))
    site.write("rds-routes.json", "r1", "route", goes_to("one"))
    await site.start({"static_resources": {"clusters": [eds("one")], "listeners": [http_listener("in", rds="routes")]}})
    site.note(await site.get("in"))
    site.write("eds-one.json", "e2", "endpoint", assignment("one", "b"))
    await site.until_get("in", "200 b")
    await site.note_stats("cluster.one.update", "cluster.one.member", *STATS)
    await site.note_dump("ClustersConfigDump", "EndpointsConfigDump", "RoutesConfigDump")


async def runtime_values_change(site: Site) -> None:
    half = says("yes")
    half["virtual_hosts"][0]["routes"][0]["match"]["runtime_fraction"] = {"default_value": {"numerator": 100}, "runtime_key": "some.key"}
    layers = [
        {"name": "base", "static_layer": {"some": {"key": 100}, "other": 1}},
        {"name": "changing", "rtds_layer": {"name": "values", "rtds_config": source("rtds.json")}},
    ]
    site.write("rtds.json", "v1", "runtime", {"name": "values", "layer": {"some": {"key": 0}}})
    await site.start({"layered_runtime": {"layers": layers}, "static_resources": {"listeners": [http_listener("in", half)]}})
    site.note(await site.get("in"), json.loads((await site.proxy.admin("GET", "/runtime"))[1]))
    await site.note_stats("runtime.")
    site.write("rtds.json", "v2", "runtime", {"name": "values", "layer": {"some": {"key": 100}, "new": "text"}})
    await site.until_get("in", "200 yes")
    site.note(json.loads((await site.proxy.admin("GET", "/runtime"))[1]))
    site.write("rtds.json", "v3", "runtime", {"name": "wrong", "layer": {}})
    await site.until("runtime.update_rejected", 1)
    await site.note_stats("runtime.")


SCENARIOS = [
    clusters_and_listeners_come_and_go, routes_change_under_a_connection, endpoints_change_under_a_connection, what_changes_nothing_keeps_connections,
    a_changed_listener_drains, other_filter_chains_are_left_alone, a_listener_moves_to_another_port, wrong_ones_do_not_take_right_ones_down,
    broken_files_change_nothing, a_start_without_anything_good, a_watched_folder, names_are_resolved_before_a_cluster_is_used, static_ones_are_not_touched,
    static_ones_with_dynamic_parts, runtime_values_change,
]  # fmt: skip


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_files(scenario):
    compare(scenario, *QUICK_DRAIN)
