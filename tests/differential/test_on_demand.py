"""Virtual hosts (VHDS) and clusters (ODCDS) that are asked for when a request needs them: the first request waits, and what is not there is not there."""

from __future__ import annotations

import asyncio

import pytest

from tests.differential.config import Config
from tests.differential.test_xds_streams import ADS, Plane, api, eds, started
from tests.differential.xds_rig import LIMIT_S, QUICK_DRAIN, Site, assignment, beside, compare, http_listener, says, static
from tests.polling import until

ON_DEMAND = "type.googleapis.com/envoy.extensions.filters.http.on_demand.v3.OnDemand"
OWN = {"api_config_source": api("DELTA_GRPC"), "resource_api_version": "V3"}


def listener(*, odcds: Config | None = None, name: str = "in") -> Config:
    """A listener that routes by RDS, with an on_demand filter."""
    made = http_listener(name, says(""))
    manager = made["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["route_config"]
    manager["rds"] = {"route_config_name": "routes", "config_source": ADS}
    config = {"@type": ON_DEMAND} | ({"odcds": odcds} if odcds else {})
    manager["http_filters"] = [{"name": "on_demand", "typed_config": config}, *manager["http_filters"]]
    manager["access_log"] = [{"name": "file", "typed_config": {"@": "file_log", "path": "${file:log}", "log_format": {"text_format_source": {
        "inline_string": "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%\n"}}}}]  # fmt: skip
    return made


def routes(*hosts: Config, source: Config = ADS) -> Config:
    """A RouteConfiguration with some virtual hosts, and more by discovery."""
    return {"name": "routes", "virtual_hosts": list(hosts), "vhds": {"config_source": source}, "validate_clusters": False}


def answers(host: str, text: str, name: str = "") -> Config:
    """A virtual host that answers everything with a text."""
    reply = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": text}}}
    return {"name": name or f"routes/{host}", "domains": [host], "routes": [reply]}


def leads(host: str, cluster: str) -> Config:
    return {"name": f"routes/{host}", "domains": [host], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}


def put(host: str, body: str = "12345") -> str:
    return f"PUT / HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n{body}"


async def begun(site: Site, plane: Plane, source: Config = ADS, odcds: Config | None = None) -> None:
    await site.origin("a", "b")
    plane.put("cluster", "c1", static("one", "a"))
    plane.put("listener", "l1", listener(odcds=odcds))
    plane.put("route", "r1", routes(answers("static.test", "static"), source=source))
    await started(site, plane, kind="DELTA_GRPC")


def asked_for(plane: Plane, kind: str) -> list[str]:
    """What was asked for so far, without acknowledgements."""
    return [line for line in plane.log[kind] if line.startswith("ask")]


async def logged(site: Site, count: int) -> list[str]:
    """The lines of the access log when there are so many."""
    log = site.folder / "log"
    await until(lambda: log.read_text().count("\n") >= count, LIMIT_S)
    return log.read_text().splitlines()


async def of_hosts(site: Site, plane: Plane, source: Config) -> None:
    plane.put("vhost", "v1", answers("a.test", "a"), answers("b.test", "b"))
    await begun(site, plane, source)
    client = await site.connect("in")
    site.note(await client.get(host="static.test"))
    for host in ("a.test", "a.test", "B.test", "a.test:80", "a.test:80", "none.test"):
        site.note(host, await client.get(host=host))
    site.note(asked_for(plane, "vhost"))
    await site.note_stats("http.in.rds.", "http.in.no_route")
    await site.note_dump("RoutesConfigDump")
    site.note(await logged(site, 7))


async def by_ads(site: Site, plane: Plane) -> None:
    await of_hosts(site, plane, ADS)


async def by_a_stream_of_its_own(site: Site, plane: Plane) -> None:
    await of_hosts(site, plane, OWN)


async def bodies(site: Site, plane: Plane) -> None:
    plane.put("vhost", "v1", answers("a.test", "a"), leads("b.test", "one"), leads("c.test", "one"))
    await begun(site, plane)
    client = await site.connect("in")
    for host in ("b.test", "b.test", "c.test", "none.test", "none.test"):
        client = await site.connect("in")
        site.note(await client.send(put(host)))


async def changes(site: Site, plane: Plane) -> None:
    """What has come is changed and taken away, what was not there comes, and the rest of the route configuration changes, too."""
    reloads = "http.in.rds.vhds.routes.config_reload"
    plane.put("vhost", "v1", answers("a.test", "a"), answers("b.test", "b"))
    await begun(site, plane)
    client = await site.connect("in")

    async def ask(*hosts: str) -> None:
        for host in hosts:
            site.note(host, await client.get(host=host))

    await ask("a.test", "b.test", "later.test", "later.test")
    site.note(asked_for(plane, "vhost"))
    await plane.set("vhost", "v2", answers("a.test", "another a"), answers("b.test", "b"), answers("later.test", "later"))
    await site.until(reloads, 5)
    await ask("a.test", "b.test", "later.test")
    await plane.set("vhost", "v3", answers("b.test", "b"))
    await site.until(reloads, 6)
    await ask("b.test")
    await plane.set("route", "r2", routes(answers("static.test", "changed")))
    await site.until_get("in", "200 changed", host="static.test")
    await ask("b.test")
    await site.note_dump("RoutesConfigDump")
    await site.note_stats("http.in.rds.routes.config_reload", reloads)
    await ask("a.test", "later.test")  # Envoy does not ask again
    await plane.set("vhost", "v4", answers("b.test", "b"), answers("a.test", "again"))
    await site.until_get("in", "200 again")
    await ask("b.test", "a.test")
    await plane.set("route", "r3", says("no more"))
    await site.until_get("in", "200 no more", host="b.test")
    await ask("b.test", "other.test")


async def refused(site: Site, plane: Plane) -> None:
    """Two virtual hosts for one domain: what was there stays."""
    plane.put("vhost", "v1", answers("a.test", "a"), answers("b.test", "b"))
    await begun(site, plane)
    client = await site.connect("in")
    site.note(await client.get(host="a.test"))
    await plane.set("vhost", "v2", answers("a.test", "a"), answers("b.test", "b") | {"domains": ["b.test", "a.test"]})
    other = await site.connect("in")
    asked = asyncio.ensure_future(other.get(host="b.test"))
    await plane.until_asked("vhost", "nack")
    site.note(await client.get(host="a.test"))
    await plane.set("vhost", "v3", answers("a.test", "a"), answers("b.test", "right"))
    site.note(await asked)


async def prefetched(site: Site, plane: Plane) -> None:
    """The server says more than it is asked for."""
    plane.prefetch = True
    plane.put("vhost", "v1", answers("a.test", "a"), leads("b.test", "one"))
    await begun(site, plane)
    client = await site.connect("in")
    for host in ("a.test", "b.test", "c.test"):
        site.note(host, await client.get(host=host))
    site.note(asked_for(plane, "vhost"))
    await plane.set("vhost", "v2", leads("b.test", "one"))
    await site.until_get("in", "404 ")
    await site.note_dump("RoutesConfigDump")


async def after_a_new_stream(site: Site, plane: Plane) -> None:
    """What was asked for is asked for again, with what is known of it; virtual hosts stay meanwhile."""
    plane.put("vhost", "v1", answers("a.test", "a"), answers("b.test", "b"))
    await begun(site, plane)
    client = await site.connect("in")
    for host in ("a.test", "none.test"):
        site.note(host, await client.get(host=host))
    await plane.until_asked("vhost", "ack", 3)
    await plane.stop()
    await site.until("control_plane.connected_state", 0)
    site.note(await client.get(host="a.test"))
    plane.log["vhost"].clear()
    asked = asyncio.ensure_future((await site.connect("in")).get(host="b.test"))
    await plane.start()
    site.note(await asked)
    site.note(plane.log["vhost"][0])


async def clusters(site: Site, plane: Plane, source: Config) -> None:
    """No CDS: whatever is needed is asked for by its name."""
    await site.origin("a", "b")
    plane.put("vhost", "v1", leads("a.test", "one"), leads("b.test", "two"), leads("more.test", "two"), leads("none.test", "none"))
    plane.put("cluster", "c1", static("one", "a"), eds("two"))
    plane.put("endpoint", "e1", assignment("two", "b"))
    plane.put("listener", "l1", listener(odcds={"source": source, "timeout": "60s"}))
    plane.put("route", "r1", routes())
    await started(site, plane, kind="DELTA_GRPC", dynamic_resources={"lds_config": ADS, "ads_config": api("DELTA_GRPC")})
    client = await site.connect("in")

    async def ask(*hosts: str) -> None:
        for host in hosts:
            site.note(host, await client.get(host=host))

    await ask("a.test", "b.test", "a.test", "more.test", "none.test")
    site.note(await client.send(put("b.test")))
    site.note(asked_for(plane, "cluster"))
    await site.note_stats("cluster_manager.cluster_", "http.in.no_cluster", "cluster_manager.odcds.update_success", "cluster_manager.odcds.update_rejected")
    await site.note_dump("ClustersConfigDump")
    await plane.set("cluster", "c2", static("one", "b"), eds("two"))
    await site.until("cluster_manager.cluster_modified", 1)
    await ask("a.test", "b.test")
    await plane.set("cluster", "c3", static("one", "b"))
    await site.until("cluster_manager.cluster_removed", 1)
    await ask("a.test")
    site.note(await logged(site, 9))


async def clusters_by_ads(site: Site, plane: Plane) -> None:
    await clusters(site, plane, ADS)


async def clusters_by_a_stream_of_their_own(site: Site, plane: Plane) -> None:
    await clusters(site, plane, OWN)


async def clusters_by_header(site: Site, plane: Plane) -> None:
    """Requests say which cluster they want."""
    await site.origin("a", "b")
    chosen = {"match": {"prefix": "/"}, "route": {"cluster_header": "x-cluster"}}
    some = [{"cluster_header": "x-cluster", "weight": 1}]
    weighted = {"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": some}}}
    hosts = [{"name": "one", "domains": ["a.test"], "routes": [chosen]}, {"name": "many", "domains": ["b.test"], "routes": [weighted]}]
    plane.put("cluster", "c1", static("one", "a"), static("two", "b"))
    plane.put("listener", "l1", listener(odcds={"source": ADS, "timeout": "60s"}))
    plane.put("route", "r1", {"name": "routes", "virtual_hosts": hosts, "validate_clusters": False})
    await started(site, plane, kind="DELTA_GRPC", dynamic_resources={"lds_config": ADS, "ads_config": api("DELTA_GRPC")})
    client = await site.connect("in")
    for host, cluster in (("a.test", "one"), ("a.test", "one"), ("b.test", "two"), ("a.test", "two"), ("b.test", "none")):
        site.note(host, cluster, await client.send(f"GET / HTTP/1.1\r\nhost: {host}\r\nx-cluster: {cluster}\r\n\r\n"))
    site.note(await client.get(host="a.test"))
    site.note(asked_for(plane, "cluster"))
    await plane.set("cluster", "c2", static("two", "b"))
    await site.until("cluster_manager.cluster_removed", 1)
    site.note(await client.send("GET / HTTP/1.1\r\nhost: a.test\r\nx-cluster: two\r\n\r\n"))
    site.note(await logged(site, 7))


async def beside_cds(site: Site, plane: Plane) -> None:
    """What CDS brings need not be asked for; what it takes away is gone."""
    await begun(site, plane, odcds={"source": ADS})
    plane.put("vhost", "v1", leads("a.test", "one"), leads("b.test", "two"))
    client = await site.connect("in")
    site.note(await client.get(host="a.test"), await client.send(put("a.test")))
    await plane.set("cluster", "c2", static("one", "a"), static("two", "b"))
    await site.until("cluster_manager.cluster_added", 3)
    site.note(await client.get(host="b.test"))
    site.note(asked_for(plane, "cluster"))
    await site.note_dump("ClustersConfigDump")


async def time_out(site: Site, plane: Plane) -> None:
    plane.put("vhost", "v1", leads("b.test", "two"))
    await begun(site, plane, odcds={"source": OWN, "timeout": "0.3s"})
    plane.hold.add("cluster")
    client = await site.connect("in")
    site.note(await client.get(host="b.test"))
    plane.hold.clear()
    await plane.set("cluster", "c2", static("one", "a"), static("two", "b"))
    await site.until_get("in", "200 b", host="b.test")
    site.note((await logged(site, 2))[0])


async def by_routes(site: Site, plane: Plane) -> None:
    """Without virtual hosts by discovery there are none; a route may say where its clusters come from."""
    per_route = {"on_demand": {"@type": f"{ON_DEMAND.replace('OnDemand', 'PerRouteConfig')}", "odcds": {"source": ADS}}}
    host = leads("a.test", "two") | {"typed_per_filter_config": per_route}
    plane.put("route", "r1", {"name": "routes", "virtual_hosts": [host, leads("b.test", "two")], "validate_clusters": False})
    await site.origin("a", "b")
    plane.put("cluster", "c1", static("two", "b"))
    plane.put("listener", "l1", listener())
    await started(site, plane, kind="DELTA_GRPC", dynamic_resources={"lds_config": ADS, "ads_config": api("DELTA_GRPC")})
    client = await site.connect("in")
    for host_name in ("b.test", "c.test", "a.test", "b.test"):
        site.note(host_name, await client.get(host=host_name))


SCENARIOS = [
    by_ads, by_a_stream_of_its_own, bodies, changes, refused, prefetched, after_a_new_stream, clusters_by_ads, clusters_by_a_stream_of_their_own,
    clusters_by_header, beside_cds, time_out, by_routes,
]  # fmt: skip


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_on_demand(scenario):
    compare(beside(scenario, Plane), *QUICK_DRAIN)
