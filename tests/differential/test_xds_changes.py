"""Changes that come seldom: several control planes, what went while one was away, endpoints in every way, clusters of other types, two things of one name."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.differential import proxy
from tests.differential.config import Config
from tests.differential.test_load_reports import Loads
from tests.differential.test_xds_streams import ADS, Plane, answered, api, eds, listener, server, started
from tests.differential.xds_rig import (
    KINDS,
    LIMIT_S,
    QUICK_DRAIN,
    Client,
    Site,
    assignment,
    beside,
    compare,
    goes_to,
    http_listener,
    play,
    says,
    source,
    static,
)
from tests.polling import until


async def several_control_planes(site: Site, plane: Plane) -> None:
    """Clusters by delta from one, listeners from another, routes and endpoints from both and from a file; one is away, everything else goes on."""
    other = Plane(site)
    try:
        await site.origin("a", "b")
        await other.start()
        service = {"grpc_services": [{"envoy_grpc": {"cluster_name": "other"}}]}
        from_other = {"api_config_source": api("GRPC") | service, "resource_api_version": "V3"}
        by_delta = {"api_config_source": api("DELTA_GRPC") | service, "resource_api_version": "V3"}
        plane.put("cluster", "c1", eds("one"), eds("two", by_delta), static("three", "a"))
        plane.put("endpoint", "e1", assignment("one", "a"))
        plane.put("route", "r1", goes_to("two"))
        other.put("endpoint", "f1", assignment("two", "b"))
        other.put("listener", "m1", listener("in"), listener("out", by_delta, "more"), http_listener("file", rds="file"))
        other.put("route", "s1", goes_to("three", "more"))
        site.write("rds-file.json", "r1", "route", goes_to("one", "file"))
        await plane.start()
        site.ports.update(control=plane.port, other=other.port)
        dynamic = {"ads_config": api("DELTA_GRPC"), "cds_config": ADS, "lds_config": from_other}
        await site.start({"dynamic_resources": dynamic, "static_resources": {"clusters": [server(plane), server(other, "other")]}})
        for name, answer in (("in", "200 b"), ("out", "200 a"), ("file", "200 a")):
            await site.until_get(name, answer)
        await other.stop()
        await site.until("listener_manager.lds.control_plane.connected_state", 0)
        await plane.set("endpoint", "e2", assignment("one", "b"))
        await site.until_get("file", "200 b")
        site.write("rds-file.json", "r2", "route", goes_to("three", "file"))
        await site.until_get("file", "200 a")
        site.note([await site.get(name) for name in ("in", "out")])
        other.put("listener", "m2", listener("in"), http_listener("file", rds="file"))
        other.put("endpoint", "f2", assignment("two", "a"))
        await other.start()
        await site.until_get("out", "refused")
        await site.until_get("in", "200 a")
        await plane.set("cluster", "c2", eds("one"), static("three", "a"))
        await site.until_get("in", "503 ")
        await site.note_stats("listener_manager.listener_", "cluster_manager.cluster_", "cluster.one.member", "control_plane.connected")
    finally:
        await other.stop()


async def away(site: Site, plane: Plane, kind: str) -> None:
    await site.origin("a", "b")
    plane.put("cluster", "c1", eds("one"), eds("two"), static("three", "a"))
    plane.put("endpoint", "e1", assignment("one", "a"), assignment("two", "b"))
    plane.put("listener", "l1", listener("in"), listener("out", routes="more"), http_listener("more", goes_to("three")))
    plane.put("route", "r1", goes_to("one"), goes_to("two", "more"))
    await started(site, plane, kind=kind)
    for name, answer in (("in", "200 a"), ("out", "200 b"), ("more", "200 a")):
        await site.until_get(name, answer)
    client = await site.connect("in")
    site.note(await client.get())
    await plane.stop()
    await site.until("control_plane.connected_state", 0)
    for log in plane.log.values():
        log.clear()
    plane.put("cluster", "c2", eds("one"))
    plane.put("listener", "l2", listener("in"))
    plane.put("endpoint", "e2", assignment("one", "b"))
    plane.put("route", "r2", goes_to("one"))
    await plane.start()
    for name, answer in (("in", "200 b"), ("out", "refused"), ("more", "refused")):
        await site.until_get(name, answer)
    await site.until("cluster_manager.active_clusters", 2)
    site.note(await client.get())  # over the connection that it had all the time
    for each in KINDS:
        if plane.log[each]:
            site.note(each, plane.log[each][0])
    await site.note_stats("cluster_manager.cluster_", "listener_manager.listener_", "cluster.one.member")
    await site.note_dump("ClustersConfigDump", "EndpointsConfigDump")


async def what_went_while_it_was_away(site: Site, plane: Plane) -> None:
    await away(site, plane, "GRPC")


async def what_went_while_it_was_away_by_delta(site: Site, plane: Plane) -> None:
    await away(site, plane, "DELTA_GRPC")


def group(priority: int, zone: str, weight: int, *endpoints: tuple[str, int, str]) -> Config:
    """Endpoints of a locality: (origin, weight, health) each."""
    found = []
    for name, share, health in endpoints:
        address = {"socket_address": {"address": "127.0.0.1", "port_value": f"${{port:{name}}}"}}
        found.append({"endpoint": {"address": address}, "load_balancing_weight": share, "health_status": health})
    return {"priority": priority, "locality": {"region": "r", "zone": zone}, "lb_endpoints": found, "load_balancing_weight": weight}


async def _differs(site: Site, name: str, value: str) -> bool:
    return await site.stat(name) != value


async def endpoints_in_every_way(site: Site, plane: Plane) -> None:
    """Weights of endpoints and localities, priorities, health, how much there must be of it: what is chosen, and what is shown."""
    good, bad, leaving, half = "HEALTHY", "UNHEALTHY", "DRAINING", "DEGRADED"
    steps: list[tuple[list[Config], Config]] = [
        ([group(0, "x", 1, ("a", 1, good)), group(0, "y", 3, ("b", 1, good)), group(1, "z", 1, ("c", 1, good))], {}),
        ([group(0, "x", 3, ("a", 1, good)), group(0, "y", 1, ("b", 1, good)), group(1, "z", 1, ("c", 1, good))], {}),
        ([group(0, "x", 3, ("a", 1, bad)), group(0, "y", 1, ("b", 1, bad)), group(1, "z", 1, ("c", 1, good))], {}),
        ([group(0, "x", 3, ("a", 1, good), ("d", 3, good)), group(1, "y", 1, ("b", 1, good), ("c", 1, leaving))], {}),
        ([group(0, "x", 3, ("a", 1, half), ("d", 3, half)), group(1, "y", 1, ("b", 1, bad))], {}),
        ([group(0, "x", 1, ("a", 1, good), ("b", 1, bad)), group(1, "y", 1, ("c", 1, good))], {"overprovisioning_factor": 200}),
        ([group(0, "x", 1, ("b", 1, good)), group(1, "y", 1, ("a", 1, good)), group(2, "y", 1, ("c", 1, good)), group(2, "x", 1, ("d", 1, good))], {}),
        ([group(0, "x", 1, ("d", 1, good))], {"drop_overloads": [{"category": "x", "drop_percentage": {"numerator": 100}}]}),
        ([group(0, "x", 1, ("d", 1, good)), group(2, "x", 1, ("a", 1, good))], {}),
    ]
    await site.origin("a", "b", "c", "d")
    common = {"locality_weighted_lb_config": {}, "healthy_panic_threshold": {"value": 0}}
    plane.put("cluster", "c1", eds("one", common_lb_config=common))
    plane.put("endpoint", "e0", {"cluster_name": "one"})
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    await started(site, plane)
    client = await site.connect("in")
    for number, (groups, policy) in enumerate(steps):
        changes = await site.stat("cluster.one.membership_change")
        await plane.set("endpoint", f"e{number + 1}", {"cluster_name": "one", "endpoints": groups, "policy": policy})
        await plane.until_asked("endpoint", f"ack e{number + 1}")
        if number == 2:  # nobody comes or goes
            await site.until_get("in", "200 c")
        elif number != 1:  # where nothing but weights is another, which nobody counts
            await until(lambda: _differs(site, "cluster.one.membership_change", changes), LIMIT_S)  # noqa: B023
        site.note(number, sorted({await client.get() for _ in range(60)}))
        _, text = await site.proxy.admin("GET", "/clusters")
        names = {str(one.port): name for name, one in site.origins.items()}
        shown = [line.split("::") for line in text.splitlines() if line.startswith("one::127.0.0.1")]
        site.note(
            sorted([names[address.split(":")[1]], what, value] for _, address, what, value in shown if what in ("weight", "priority", "health_flags", "zone"))
        )
    await site.note_stats("cluster.one.membership", "cluster.one.update_success")


async def stale(site: Site, plane: Plane, kind: str) -> None:
    """Nobody says the endpoints again in time: they are not used any longer, until somebody does."""
    limit = {"policy": {"endpoint_stale_after": "1s"}}
    await site.origin("a", "b")
    plane.put("cluster", "c1", eds("one"))
    plane.put("endpoint", "e1", assignment("one", "a") | {"policy": {"endpoint_stale_after": "600s"}})
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    await started(site, plane, kind=kind)
    site.note(await site.get("in"))
    await plane.set("endpoint", "e2", assignment("one", "b") | limit)
    await site.until("cluster.one.assignment_stale", 1)
    await site.until_get("in", "503 no healthy upstream")
    await plane.set("endpoint", "e3", assignment("one", "a"))
    await site.until_get("in", "200 a")
    await site.note_stats("cluster.one.assignment", "cluster.one.member")


async def stale_endpoints(site: Site, plane: Plane) -> None:
    await stale(site, plane, "GRPC")


async def stale_endpoints_by_delta(site: Site, plane: Plane) -> None:
    await stale(site, plane, "DELTA_GRPC")


async def transformed(site: Site, plane: Plane, kind: str) -> None:
    """A cluster of one name: static, by discovery, by another name of it, by DNS; gone and there again."""
    await site.origin("a", "b")
    other = eds("one", eds_cluster_config={"eds_config": ADS, "service_name": "service"})
    plane.put("cluster", "d", static("one", "a"))
    plane.put("endpoint", "e1", assignment("one", "b"), assignment("service", "a"))
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    await started(site, plane, kind=kind)
    await site.until_get("in", "200 a")
    client = await site.connect("in")
    site.note(await client.get())
    for number, (cluster, answer) in enumerate((
        (eds("one"), "200 b"), (other, "200 a"), (static("one", "b", type="STRICT_DNS"), "200 b"), (static("one", "a"), "200 a"), (None, "503 "),
        (eds("one"), "200 b"), (None, "503 "), (other, "200 a"),
    )):  # fmt: skip
        await plane.set("cluster", f"d{number}", *([cluster] if cluster else []))
        await site.until_get("in", answer)
        site.note(await client.get())
    await site.note_stats("cluster_manager.")


async def a_cluster_is_transformed(site: Site, plane: Plane) -> None:
    await transformed(site, plane, "GRPC")


async def a_cluster_is_transformed_by_delta(site: Site, plane: Plane) -> None:
    await transformed(site, plane, "DELTA_GRPC")


async def what_warms_is_waited_for_or_given_up(site: Site, plane: Plane) -> None:
    """Without an end of patience; what goes before it is warm was never there."""
    patient = ADS | {"initial_fetch_timeout": "0s"}
    await site.origin("a")
    plane.put("cluster", "c1", static("one", "a"))
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    plane.hold.update(("endpoint", "route"))
    await started(site, plane)
    await plane.set("cluster", "c2", eds("one", patient), eds("two", patient))
    await plane.set("listener", "l2", listener("in", patient), listener("out", patient, "more"))
    await site.until("cluster_manager.warming_clusters", 2)
    await site.until("listener_manager.total_listeners_warming", 2)
    await plane.set("listener", "l3", listener("in", patient))
    await site.until("listener_manager.total_listeners_warming", 1)
    await plane.set("cluster", "c3", eds("one", patient))
    await site.until("cluster_manager.warming_clusters", 1)
    site.note(await site.get("in"), await site.get("out"))
    await site.note_dump("ClustersConfigDump")
    plane.hold.clear()
    plane.put("endpoint", "e1", assignment("one", "a"))
    plane.put("route", "r1", says("now"))
    await plane.push()
    await site.until_get("in", "200 now")
    await site.until("cluster_manager.warming_clusters", 0)
    await site.note_stats("cluster_manager.", "listener_manager.")
    await site.note_dump("ClustersConfigDump")


async def listeners_of_the_bootstrap_ask_for_their_routes_together(site: Site, plane: Plane) -> None:
    patient = ADS | {"initial_fetch_timeout": "0s"}
    plane.hold.add("route")
    plane.put("route", "r1", says("one", "one"), says("two", "two"))
    listeners = [listener("in", patient, "one"), listener("out", patient, "two")]
    starting = asyncio.ensure_future(started(site, plane, dynamic_resources={"ads_config": api("GRPC")}, listeners=listeners))
    await plane.until_asked("route", "one two")
    plane.hold.clear()
    await plane.push()
    await starting
    site.note(await site.get("in"), await site.get("out"))


async def repeated(site: Site, plane: Plane, kind: str) -> None:
    """Two clusters and two listeners of one name in an answer: it is refused, the first of each and all others are used."""
    await site.origin("a")
    plane.put("cluster", "c1", static("one", "a"))
    plane.put("listener", "l1", http_listener("in", says("one")))
    await started(site, plane, kind=kind)
    await site.until_get("in", "200 one")
    plane.put("cluster", "c2", static("one", "a"), static("two", "a"), static("again", "a"), static("three", "a"))
    plane.put("listener", "l2", http_listener("in", says("one")), http_listener("out", says("two")), http_listener("again", says("x")))
    plane.resources["cluster"]["again"] = plane.resources["cluster"]["two"]
    plane.resources["listener"]["again"] = plane.resources["listener"]["out"]
    await plane.push()
    await plane.until_asked("cluster", "nack")
    await plane.until_asked("listener", "nack")
    await site.until_get("out", "200 two")
    for each in ("cluster", "listener"):
        site.note([complaint.partition(": ")[2].rstrip("\n").rpartition(" ")[0].rpartition(" duplicate ")[2] for complaint in plane.complaints[each]])
    counted = ("config_reload", "update_rejected", "update_success", "version_text")
    await site.note_stats(*(f"{prefix}.{name}" for prefix in ("cluster_manager.cds", "listener_manager.lds") for name in counted), "listener_manager.listener_")
    await site.note_stats("cluster_manager.cluster_", "cluster_manager.active")
    await site.note_dump("ClustersConfigDump")


async def two_of_one_name(site: Site, plane: Plane) -> None:
    await repeated(site, plane, "GRPC")


async def two_of_one_name_by_delta(site: Site, plane: Plane) -> None:
    await repeated(site, plane, "DELTA_GRPC")


async def two_of_one_name_in_a_file(site: Site, plane: Plane) -> None:
    await site.origin("a")
    site.write("cds.json", "c1", "cluster", static("one", "a"), static("two", "a"), static("one"), static("three", "a"))
    await site.start({"dynamic_resources": {"cds_config": source("cds.json")}})
    await site.until("cluster_manager.cds.update_rejected", 1)
    await site.note_stats("cluster_manager.")
    await site.note_dump("ClustersConfigDump")


async def called_otherwise(site: Site, plane: Plane) -> None:
    """The envelope of a cluster has another name than the cluster: that of the cluster counts, also when the envelope's goes."""
    await site.origin("a")
    plane.put("cluster", "c1", static("one", "a"))
    plane.put("listener", "l1", http_listener("in", goes_to("named")))
    await started(site, plane, kind="DELTA_GRPC")
    plane.resources["cluster"]["other"] = "c2", plane.pack("cluster", static("named", "a"))
    await plane.push()
    await site.until_get("in", "200 a")
    await site.note_dump("ClustersConfigDump")
    del plane.resources["cluster"]["other"]
    await plane.push()
    await answered(plane, "DELTA_GRPC", 3, cluster="")
    site.note(await site.get("in"))


async def nothing_that_can_be_read(site: Site, plane: Plane) -> None:
    """The first answer has something else in it: the start goes on at once, and who subscribed has counted it."""
    patient = ADS | {"initial_fetch_timeout": "0s"}
    plane.put("cluster", "c1", static("one"))
    plane.resources["cluster"]["one"] = "c1", plane.pack("listener", http_listener("in", says("x")))
    plane.put("listener", "l1", http_listener("in", says("one")))
    await started(site, plane, dynamic_resources={"ads_config": api("GRPC"), "cds_config": patient, "lds_config": patient})
    await site.until_get("in", "200 one")
    site.note(len(plane.complaints["cluster"]))
    await site.note_stats("cluster_manager.cds.")


async def what_there_is_not_is_not_waited_for(site: Site, plane: Plane) -> None:
    """By delta the server says so of endpoints, certificates and runtime values: the start goes on, however patient it is."""
    patient = ADS | {"initial_fetch_timeout": "0s"}
    await site.origin("a")
    secure = http_listener("secure", says("x"))
    common = {"tls_certificate_sds_secret_configs": [{"name": "none", "sds_config": patient}]}
    secure["filter_chains"][0]["transport_socket"] = {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": common}}
    plane.put("cluster", "c1", eds("one", patient))
    plane.put("listener", "l1", http_listener("in", goes_to("one")), secure)
    layers = [{"name": "values", "rtds_layer": {"name": "none", "rtds_config": patient}}]
    await started(site, plane, kind="DELTA_GRPC", layered_runtime={"layers": layers})
    site.note(await site.get("in"), await site.get("secure"))
    await site.note_stats("cluster.one.update", "sds.", "runtime.update_", "listener_manager.total", "cluster_manager.warming")
    await plane.set("endpoint", "e1", assignment("one", "a"))
    await site.until_get("in", "200 a")


async def no_endpoints_in_a_file(site: Site, plane: Plane) -> None:
    site.write("cds.json", "c1", "cluster", eds("one", source("eds.json")))
    site.write("eds.json", "e1", "endpoint")
    site.write("lds.json", "l1", "listener", http_listener("in", goes_to("one")))
    await site.start({"dynamic_resources": {"cds_config": source("cds.json"), "lds_config": source("lds.json")}})
    site.note(await site.get("in"))
    await site.note_stats("cluster.one.update")


async def load_of_clusters_that_come_and_go(site: Site, plane: Plane) -> None:
    """All are asked for: those that there are at the time."""
    loads = Loads()
    plane.handlers += loads.handlers
    await site.origin("a", "b")
    plane.put("cluster", "c1", eds("one"), static("two", "b"))
    plane.put("endpoint", "e1", assignment("one", "a"))
    routes = [{"match": {"prefix": f"/{name}"}, "route": {"cluster": name}} for name in ("one", "two", "three")]
    hosts = [{"name": "all", "domains": ["*"], "routes": routes}]
    plane.put("listener", "l1", http_listener("in", {"name": "routes", "virtual_hosts": hosts, "validate_clusters": False}))
    await started(site, plane, cluster_manager={"load_stats_config": api("GRPC")})
    await site.until_get("in", "200 a", "/one")
    await loads.until(lambda: loads.first)
    loads.ask(send_all_clusters=True)
    await loads.until(lambda: loads.reports)
    for name in ("one", "two", "one"):
        site.note(await site.get("in", f"/{name}"))
    await loads.until(lambda: loads.issued("one") >= 2 and loads.issued("two") >= 1)
    await plane.set("cluster", "c2", eds("one"), static("three", "a"))
    await site.until_get("in", "200 a", "/three")
    await site.until_get("in", "503 ", "/two")
    await loads.a_period()
    since = len(loads.reports)
    for name in ("one", "three", "three"):
        site.note(await site.get("in", f"/{name}"))
    await loads.until(lambda: loads.issued("three", since) >= 2 and loads.issued("one", since) >= 1)
    await loads.a_period()
    site.note(sorted(stats.cluster_name for stats in loads.reports[-1].cluster_stats))
    site.note([loads.totals(name, since) for name in ("one", "two", "three")])
    await site.note_stats("load_reporter.errors", "load_reporter.retries")


async def runtime_values_from_several_sources(site: Site, plane: Plane) -> None:
    """Layers of which one is on the stream of all types, one on a stream of its own and the last is admin's; a fraction changes under a connection."""
    own = {"api_config_source": api("DELTA_GRPC"), "resource_api_version": "V3"}
    half = says("yes")
    half["virtual_hosts"][0]["routes"][0]["match"]["runtime_fraction"] = {"default_value": {"numerator": 100}, "runtime_key": "some.key"}
    half["virtual_hosts"][0]["routes"] += says("no")["virtual_hosts"][0]["routes"]
    layers = [
        {"name": "base", "static_layer": {"some": {"key": 100}}},
        {"name": "shared", "rtds_layer": {"name": "values", "rtds_config": ADS}},
        {"name": "own", "rtds_layer": {"name": "more", "rtds_config": own}},
        {"name": "admin", "admin_layer": {}},
    ]
    plane.put("cluster", "c1")
    plane.put("listener", "l1", http_listener("in", half))
    plane.put("runtime", "v0", {"name": "values", "layer": {"some.key": 0}}, {"name": "more", "layer": {}})
    await started(site, plane, layered_runtime={"layers": layers})
    await site.until_get("in", "200 no")
    client = await site.connect("in")
    values: list[tuple[Any, Config, str]] = [
        (100, {}, "yes"), ({"numerator": 0, "denominator": "HUNDRED"}, {}, "no"), ({"numerator": 1_000_000, "denominator": "MILLION"}, {}, "yes"),
        (0, {}, "no"), (0, {"some": {"key": 100}}, "yes"), ("0", {}, "no"), ("text", {}, "yes"),
    ]  # fmt: skip
    for number, (value, more, answer) in enumerate(values):
        await plane.set("runtime", f"v{number + 1}", {"name": "values", "layer": {"some.key": value}}, {"name": "more", "layer": more})
        await site.until_get("in", f"200 {answer}")
        site.note(value, sorted({await client.get() for _ in range(20)}))
    await plane.set("runtime", "half", {"name": "values", "layer": {"some.key": 50}}, {"name": "more", "layer": {}})
    await site.until_get("in", "200 no")
    site.note(100 < sum([await client.get() == "200 yes" for _ in range(300)]) < 200)
    await site.proxy.admin("POST", "/runtime_modify?some.key=100")
    await site.until_get("in", "200 yes")
    site.note(json.loads((await site.proxy.admin("GET", "/runtime"))[1]))


async def heartbeats(site: Site, plane: Plane) -> None:
    """A cluster lives as long as the server says that it does, without what it is; the other one does not."""
    await site.origin("a")
    plane.put("cluster", "c1", static("one", "a"), static("two", "a"), ttl=2)
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    serve, beats = plane._delta, []

    async def with_beats(requests: Any, context: Any) -> None:
        class Context:
            async def write(self, answer: Any) -> None:
                await context.write(answer)
                if answer.type_url == KINDS["cluster"]:
                    beats.append(asyncio.ensure_future(beat(type(answer))))

        async def beat(response: Any) -> None:
            for number in range(8):
                await asyncio.sleep(0.4)  # a heart that beats slower than this is what lets go of the other one, after its two seconds
                said = response(type_url=KINDS["cluster"], nonce=f"beat {number}")
                said.resources.add(name="one", version="c1").ttl.FromMilliseconds(2000)
                await context.write(said)

        await serve(requests, Context())

    plane._delta = with_beats  # type: ignore[method-assign]
    await started(site, plane, kind="DELTA_GRPC")
    await site.until_get("in", "200 a")
    await plane.until_asked("cluster", "ack", 9)
    site.note(await site.get("in"), await site.stat("cluster_manager.active_clusters"))  # the other one is gone by now
    await site.until_get("in", "503 ")
    site.note(plane.log["cluster"])
    await asyncio.gather(*beats)


async def a_port_that_is_taken(site: Site, plane: Plane) -> None:
    """By somebody else: a listener that would go there is refused, and stays where it is; it goes there when the port is free."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        site.ports["out"] = other.getsockname()[1]
        plane.put("listener", "l1", http_listener("in", says("one")))
        plane.put("cluster", "c1")
        await started(site, plane)
        await site.until_get("in", "200 one")
        client = await site.connect("in")
        moved = http_listener("out", says("two")) | {"name": "in", "stat_prefix": "in"}
        await plane.set("listener", "l2", moved, http_listener("more", says("more")))
        await plane.until_asked("listener", "nack")
        await site.until_get("more", "200 more")
        site.note(await site.get("in"), await client.get())
        site.note(["already in use" in complaint for complaint in plane.complaints["listener"]])
        await site.note_stats("listener_manager.")
    await plane.set("listener", "l3", moved, http_listener("more", says("more")))
    await site.until_get("out", "200 two")
    await site.until_get("in", "refused")
    site.note(await client.get())


async def a_path_is_taken_over(site: Site, plane: Plane) -> None:
    """A listener at a path changes, and another one takes its place there."""
    path = site.folder / "sock"

    def at_path(text: str, **fields: Any) -> Config:
        return http_listener("in", says(text)) | {"address": {"pipe": {"path": "${file:sock}"}}} | fields

    async def get() -> str:
        return await site.keep(Client(*await asyncio.open_unix_connection(str(path)))).get()

    plane.put("listener", "l1", at_path("one"))
    plane.put("cluster", "c1")
    await started(site, plane)
    site.note(await get())
    for number, changed in enumerate((at_path("two", per_connection_buffer_limit_bytes=50000), at_path("three", name="other"))):
        await plane.set("listener", f"l{number + 2}", changed)
        await until(lambda: _is(get, f"200 {('two', 'three')[number]}"), LIMIT_S)  # noqa: B023
    await site.until("listener_manager.total_listeners_draining", 0)
    site.note(await get(), plane.complaints["listener"])
    await site.note_stats("listener_manager.")


async def _is(get: Callable[[], Awaitable[str]], answer: str) -> bool:
    try:
        return await get() == answer
    except ConnectionError:
        return False


SCENARIOS = [
    several_control_planes, what_went_while_it_was_away, what_went_while_it_was_away_by_delta, endpoints_in_every_way, stale_endpoints,
    stale_endpoints_by_delta, a_cluster_is_transformed, a_cluster_is_transformed_by_delta, what_warms_is_waited_for_or_given_up,
    listeners_of_the_bootstrap_ask_for_their_routes_together, two_of_one_name, two_of_one_name_by_delta, two_of_one_name_in_a_file, called_otherwise,
    a_port_that_is_taken, a_path_is_taken_over, load_of_clusters_that_come_and_go, runtime_values_from_several_sources, heartbeats,
    nothing_that_can_be_read, what_there_is_not_is_not_waited_for, no_endpoints_in_a_file,
]  # fmt: skip


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_changes(scenario):
    compare(beside(scenario, Plane), *QUICK_DRAIN)


def test_routes_and_filters_that_there_are_not_may_come_yet():
    """They are waited for until the time is over. Envoy never stops waiting, and its start with it."""

    async def scenario(site: Site, plane: Plane) -> None:
        soon, patient = (ADS | {"initial_fetch_timeout": limit} for limit in ("0.1s", "0s"))
        discovered = http_listener("filtered", says("x"))
        fault = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"
        entry = {"name": "none", "config_discovery": {"config_source": soon, "type_urls": [fault]}}
        discovered["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"].insert(0, entry)
        plane.put("cluster", "c1")
        plane.put("listener", "l1", listener("in", soon, "none"), discovered)
        await started(site, plane, kind="DELTA_GRPC")
        assert [await site.get("in"), await site.get("filtered")] == ["404 ", "500 "]
        await plane.set("listener", "l2", listener("in", patient, "later"))
        await plane.until_asked("route", "+later")
        assert await site.get("in") == "404 "  # the version before
        await plane.set("route", "r1", says("late", "later"))
        await site.until_get("in", "200 late")

    asyncio.run(play(beside(scenario, Plane), proxy.our_command(), "ours"))
