"""Dynamic configuration from a control plane: the same answers to Envoy and to us; requests, traffic, statistics and /config_dump compared."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import any_pb2

from meshproxy.api import messages
from tests.differential.config import Config
from tests.differential.xds_rig import KINDS, LIMIT_S, QUICK_DRAIN, Site, assignment, beside, compare, goes_to, http_listener, says, static
from tests.differential.xds_server import ControlPlane
from tests.polling import until

ADS: Config = {"ads": {}, "resource_api_version": "V3"}


def api(kind: str, **fields: Any) -> Config:
    """An ApiConfigSource."""
    return {"api_type": kind, "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "control"}}], **fields}


class Plane(ControlPlane):
    """A control plane that knows its site."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def pack(self, kind: str, message: Config) -> Any:
        return super().pack(kind, self.site.render(message))

    async def set(self, kind: str, version: str, *messages: Config, ttl: float = 0.0) -> None:
        """Replace all resources of a kind, and push."""
        self.put(kind, version, *messages, ttl=ttl)
        await self.push()


def server(plane: ControlPlane, name: str = "control") -> Config:
    """The cluster of a control plane."""
    options = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {"@": "http_options", "explicit_http_config": {"http2_protocol_options": {}}}}
    address = {"socket_address": {"address": "127.0.0.1", "port_value": plane.port}}
    assigned = {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}
    return {"name": name, "connect_timeout": "30s", "typed_extension_protocol_options": options, "load_assignment": assigned}


async def started(
    site: Site, plane: Plane, *, kind: str = "GRPC", separate: bool = False, ads: Config | None = None, listeners: list[Config] | None = None, **fields: Any
) -> None:
    """Start the control plane and the proxy. `ads`: more fields of its source. `listeners`: of the bootstrap."""
    if not plane.port:
        await plane.start()
    site.ports["control"] = plane.port
    source = {"api_config_source": api(kind), "resource_api_version": "V3"} if separate else ADS
    dynamic = {"cds_config": source, "lds_config": source} | ({} if separate else {"ads_config": api(kind, **(ads or {}))})
    resources = {"clusters": [server(plane)], "listeners": listeners or []}
    await site.start({"dynamic_resources": dynamic, "static_resources": resources} | fields)


def eds(name: str, source: Config = ADS, **fields: Any) -> Config:
    return {"name": name, "type": "EDS", "connect_timeout": "30s", "eds_cluster_config": {"eds_config": source}} | fields


def listener(name: str, source: Config = ADS, routes: str = "routes") -> Config:
    """A listener whose routes come from a source."""
    made = http_listener(name, says(""))
    manager = made["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["route_config"]
    manager["rds"] = {"route_config_name": routes, "config_source": source}
    return made


def note_log(site: Site, plane: Plane, *kinds: str) -> None:
    """Note what was asked, each kind by itself: in which order kinds are asked for is nobody's business."""
    for kind in kinds or KINDS:
        if plane.log[kind]:
            site.note(kind, list(plane.log[kind]))


async def answered(plane: Plane, kind: str, count: int, **versions: str) -> None:
    """Wait for the acknowledgement of these versions; in delta, where it does not name them, for so many answers."""
    for each, version in versions.items():
        if kind == "GRPC":
            await plane.until_asked(each, f"ack {version}")
        else:
            await plane.until_asked(each, "ack", count)


STATS = (
    "cluster_manager.cds.",
    "cluster_manager.cluster_",
    "listener_manager.",
    "http.in.rds.",
    "cluster.one.update_",
    "cluster.one.version",
    "control_plane.",
)


async def everything(site: Site, plane: Plane, kind: str, *, separate: bool = False) -> None:
    await site.origin("a", "b")
    source = {"api_config_source": api(kind), "resource_api_version": "V3"} if separate else ADS
    plane.put("cluster", "c1", eds("one", source))
    plane.put("listener", "l1", listener("in", source))
    plane.put("route", "r1", goes_to("one"))
    plane.put("endpoint", "e1", assignment("one", "a"))
    await started(site, plane, kind=kind, separate=separate)
    await site.until_get("in", "200 a")
    client = await site.connect("in")
    await plane.set("endpoint", "e2", assignment("one", "b"))
    await site.until_get("in", "200 b")
    site.note(await client.get())
    await plane.set("route", "r2", says("direct"))
    await site.until_get("in", "200 direct")
    site.note(await client.get())
    await answered(plane, kind, 2, route="r2", endpoint="e2")
    note_log(site, plane)
    await site.note_stats(*STATS)
    await site.note_dump("ClustersConfigDump", "EndpointsConfigDump", "ListenersConfigDump", "RoutesConfigDump")


async def state_of_the_world(site: Site, plane: Plane) -> None:
    await everything(site, plane, "GRPC")


async def delta(site: Site, plane: Plane) -> None:
    await everything(site, plane, "DELTA_GRPC")


async def separate_streams(site: Site, plane: Plane) -> None:
    await everything(site, plane, "GRPC", separate=True)


async def separate_delta_streams(site: Site, plane: Plane) -> None:
    await everything(site, plane, "DELTA_GRPC", separate=True)


async def refused(site: Site, plane: Plane, kind: str) -> None:
    await site.origin("a")
    plane.put("cluster", "c1", static("one", "a"))
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    await started(site, plane, kind=kind)
    site.note(await site.get("in"))
    await plane.set("cluster", "c2", static("one", "a"), static("two", "a", type="ORIGINAL_DST"), static("three", "a"))
    await plane.until_asked("cluster", "nack")
    await plane.set("listener", "l2", http_listener("in", goes_to("one")), http_listener("bad", says("x"), listener_filters_timeout="-1s"))
    await plane.until_asked("listener", "nack")
    site.note(await site.get("in"))
    await plane.set("listener", "l3", http_listener("in", goes_to("three"), per_connection_buffer_limit_bytes=50000))
    await site.until("listener_manager.lds.version_text", "l3")
    await plane.set("cluster", "c3", static("one", "a"), static("three", "a"))
    await site.until("cluster_manager.cds.version_text", "c3")
    site.note(await site.get("in"))
    await answered(plane, kind, 3, cluster="c3", listener="l3")
    note_log(site, plane)
    # Envoy counts an attempt twice that a watcher of a delta stream refuses.
    await site.note_stats(*(f"cluster_manager.cds.{name}" for name in ("config_reload", "update_success", "update_rejected", "version_text")))
    await site.note_stats("listener_manager.", "control_plane.")
    await site.note_dump("ClustersConfigDump", "ListenersConfigDump")


async def what_is_wrong_is_refused(site: Site, plane: Plane) -> None:
    await refused(site, plane, "GRPC")


async def what_is_wrong_is_refused_in_delta(site: Site, plane: Plane) -> None:
    await refused(site, plane, "DELTA_GRPC")


async def reconnected(site: Site, plane: Plane, kind: str) -> None:
    await site.origin("a", "b")
    plane.put("cluster", "c1", eds("one"))
    plane.put("endpoint", "e1", assignment("one", "a"))
    plane.put("listener", "l1", listener("in"))
    plane.put("route", "r1", goes_to("one"))
    await started(site, plane, kind=kind)
    await site.until_get("in", "200 a")
    site.note(await site.stat("control_plane.connected_state"))
    await plane.stop()
    await site.until("control_plane.connected_state", 0)
    site.note(await site.get("in"))
    for log in plane.log.values():
        log.clear()
    await plane.start()
    await plane.until_asked("route", "ask")
    plane.put("endpoint", "e2", assignment("one", "b"))
    await plane.push()
    await site.until_get("in", "200 b")
    site.note(await site.stat("control_plane.connected_state"))
    for each in KINDS:
        if plane.log[each]:
            site.note(each, plane.log[each][0])
    await site.note_dump("ClustersConfigDump", "ListenersConfigDump", "EndpointsConfigDump")


async def versions_are_kept_over_streams(site: Site, plane: Plane) -> None:
    await reconnected(site, plane, "GRPC")


async def versions_are_kept_over_delta_streams(site: Site, plane: Plane) -> None:
    await reconnected(site, plane, "DELTA_GRPC")


async def removed(site: Site, plane: Plane, kind: str) -> None:
    await site.origin("a")
    plane.put("cluster", "c1", eds("one"), eds("two"))
    plane.put("endpoint", "e1", assignment("one", "a"), assignment("two", "a"))
    plane.put("listener", "l1", http_listener("in", goes_to("one")), http_listener("out", goes_to("two")))
    await started(site, plane, kind=kind)
    await site.until_get("in", "200 a")
    await site.until_get("out", "200 a")
    await plane.set("listener", "l2", http_listener("in", goes_to("one")))
    await site.until_get("out", "refused")
    await plane.set("cluster", "c2", eds("one"))
    await site.until("cluster_manager.active_clusters", 2)
    await plane.until_asked("endpoint", "ask e1 one" if kind == "GRPC" else "-two")
    await answered(plane, kind, 2, cluster="c2", listener="l2")
    note_log(site, plane, "cluster", "listener")
    await site.note_stats("cluster_manager.", "listener_manager.")
    await site.note_dump("ClustersConfigDump", "ListenersConfigDump")


async def what_is_gone_is_removed(site: Site, plane: Plane) -> None:
    await removed(site, plane, "GRPC")


async def what_is_gone_is_removed_in_delta(site: Site, plane: Plane) -> None:
    await removed(site, plane, "DELTA_GRPC")


async def a_cluster_warms_while_the_old_one_serves(site: Site, plane: Plane) -> None:
    await site.origin("a", "b")
    plane.put("cluster", "c1", eds("one"))
    plane.put("endpoint", "e1", assignment("one", "a"))
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    await started(site, plane, kind="DELTA_GRPC")
    await site.until_get("in", "200 a")
    plane.hold.add("endpoint")
    await plane.set("cluster", "c2", eds("one", connect_timeout="31s"))
    await site.until("cluster_manager.warming_clusters", 1)
    site.note(await site.get("in"))
    await site.note_dump("ClustersConfigDump")
    plane.hold.clear()
    await plane.set("endpoint", "e2", assignment("one", "b"))
    await site.until("cluster_manager.warming_clusters", 0)
    await site.until_get("in", "200 b")
    await site.note_dump("ClustersConfigDump")


async def a_listener_waits_for_its_routes(site: Site, plane: Plane) -> None:
    plane.put("listener", "l1", listener("in"))
    plane.put("route", "r1", says("one"))
    await started(site, plane)
    await site.until_get("in", "200 one")
    await plane.set("listener", "l2", listener("in", routes="others") | {"per_connection_buffer_limit_bytes": 50000})
    await site.until("listener_manager.total_listeners_warming", 1)
    site.note(await site.get("in"))
    await site.note_dump("ListenersConfigDump")
    plane.put("route", "r2", says("one"), says("two", name="others"))
    await plane.push()
    await site.until_get("in", "200 two")
    await site.until("listener_manager.total_listeners_draining", 0)
    await site.note_dump("ListenersConfigDump", "RoutesConfigDump")


async def what_does_not_come_is_not_waited_for(site: Site, plane: Plane) -> None:
    source = ADS | {"initial_fetch_timeout": "0.3s"}
    plane.put("cluster", "c1", eds("one", source))
    plane.put("listener", "l1", listener("in", source))
    await started(site, plane)
    site.note(await site.get("in"))
    await site.note_stats("cluster.one.init", "http.in.rds.routes.init", "cluster_manager.active", "listener_manager.total")


async def expired(site: Site, plane: Plane, kind: str) -> None:
    await site.origin("a")
    plane.put("cluster", "c1", static("one", "a"), ttl=0.5)
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    await started(site, plane, kind=kind)
    site.note(await site.get("in"))
    await site.until("cluster_manager.active_clusters", 1)  # only the control plane's
    site.note(await site.get("in"))
    await site.note_dump("ClustersConfigDump")
    await plane.set("cluster", "c2", static("one", "a", connect_timeout="31s"), static("two", "a"))
    await site.until("cluster_manager.active_clusters", 3)
    await site.note_dump("ClustersConfigDump")


async def what_nobody_renews_expires(site: Site, plane: Plane) -> None:
    await expired(site, plane, "GRPC")


async def what_nobody_renews_expires_in_delta(site: Site, plane: Plane) -> None:
    await expired(site, plane, "DELTA_GRPC")


async def statistics_go_with_what_they_are_of(site: Site, plane: Plane) -> None:
    await site.origin("a")

    async def names() -> list[str]:
        """The scopes that there are, as deep as they tell anything."""
        _, text = await site.proxy.admin("GET", "/stats")
        found = [line.partition(":")[0] for line in text.splitlines()]
        wanted = ("http.in.", "http.out.", "http.both.", "listener.in.", "listener.out.", "listener.more.", "cluster.one.", "cluster.two.")
        return sorted({".".join(name.split(".")[: 2 + 2 * (".rds." in name)]) for name in found if name.startswith(wanted)})

    plane.put("cluster", "c1", static("one", "a"), static("two", "a"))
    plane.put("route", "r1", goes_to("two"))
    plane.put("listener", "l1", http_listener("in", goes_to("one"), prefix="both"), listener("out"), http_listener("more", goes_to("two"), prefix="both"))
    await started(site, plane)
    for name in ("in", "out", "more"):
        await site.until_get(name, "200 a")
    site.note(await names())
    await plane.set("listener", "l2", http_listener("in", goes_to("one"), prefix="both"))
    await site.until_get("out", "refused")
    await site.until("listener_manager.total_listeners_draining", 0)
    await plane.set("cluster", "c2", static("one", "a"))
    await site.until("cluster_manager.active_clusters", 2)

    async def gone() -> bool:
        return not {"listener.out", "listener.more", "http.out", "http.out.rds.routes", "cluster.two"} & set(await names())

    await until(gone, LIMIT_S)  # what goes, goes with the last that holds it
    site.note(await names())
    await plane.set("listener", "l3", http_listener("in", goes_to("one"), prefix="both"), listener("out"))
    await site.until_get("out", "503 ")
    site.note(await site.stat("http.out.downstream_cx_total"), await site.stat("listener.out.downstream_cx_total"))


_NEWER = b"\xf8\xff\x3f\x01"  # field 131071, a varint: of an API that nobody knows yet


def of_a_newer_api(plane: Plane, kind: str, name: str, version: str) -> None:
    """Put a field that nobody knows into a resource."""
    packed = plane.resources[kind][name][1]
    newer = type(packed)(type_url=packed.type_url, value=packed.value + _NEWER)
    plane.resources[kind][name] = version, newer
    plane.versions[kind] = version


async def unknown(site: Site, plane: Plane, kind: str) -> None:
    await site.origin("a")
    plane.put("cluster", "c1", static("one", "a"))
    plane.put("listener", "l1", http_listener("in", goes_to("one")))
    await started(site, plane, kind=kind)
    site.note(await site.get("in"))
    plane.put("cluster", "c2", static("one", "a"), static("two", "a"), static("three", "a"))
    of_a_newer_api(plane, "cluster", "two", "c2")
    of_a_newer_api(plane, "cluster", "three", "c2")
    await plane.push()
    await plane.until_asked("cluster", "ack", 2)
    plane.put("listener", "l2", http_listener("in", goes_to("two")))
    proto = messages.known(messages.full_name(KINDS["listener"])).FromString(plane.resources["listener"]["in"][1].value)
    proto.filter_chains[0].filters[0].typed_config.value += _NEWER
    packed = any_pb2.Any()
    packed.Pack(proto)
    plane.resources["listener"]["in"] = "l2", packed
    await plane.push()
    await plane.until_asked("listener", "ack", 2)
    site.note(await site.stat("server.dynamic_unknown_fields"))
    note_log(site, plane)
    await site.note_stats(*(f"{prefix}.update_{name}" for prefix in ("cluster_manager.cds", "listener_manager.lds") for name in ("rejected", "success")))
    await site.note_dump("ClustersConfigDump")


async def unknown_fields(site: Site, plane: Plane) -> None:
    await unknown(site, plane, "GRPC")


async def unknown_fields_in_delta(site: Site, plane: Plane) -> None:
    await unknown(site, plane, "DELTA_GRPC")


async def limited(site: Site, plane: Plane, kind: str) -> None:
    """What was asked for comes, later; while requests wait, that is told."""
    await site.origin("a")
    plane.put("cluster", "c1", eds("one"), eds("two"))
    plane.put("endpoint", "e1", assignment("one", "a"), assignment("two", "a"))
    plane.put("listener", "l1", listener("in"), listener("out", routes="more"))
    plane.put("route", "r1", goes_to("one"), goes_to("two", "more"))
    await started(site, plane, kind=kind, ads={"rate_limit_settings": {"max_tokens": 1, "fill_rate": 20.0}})
    await site.until_get("in", "200 a")
    await site.until_get("out", "200 a")
    await site.until("control_plane.pending_requests", 0)
    site.note(int(await site.stat("control_plane.rate_limit_enforced")) > 0)
    await site.note_dump("ClustersConfigDump", "RoutesConfigDump")


async def requests_are_limited(site: Site, plane: Plane) -> None:
    await limited(site, plane, "GRPC")


async def requests_by_delta_are_limited(site: Site, plane: Plane) -> None:
    await limited(site, plane, "DELTA_GRPC")


SCENARIOS = [
    statistics_go_with_what_they_are_of,
    state_of_the_world, delta, separate_streams, separate_delta_streams, what_is_wrong_is_refused, what_is_wrong_is_refused_in_delta,
    versions_are_kept_over_streams, versions_are_kept_over_delta_streams, what_is_gone_is_removed, what_is_gone_is_removed_in_delta,
    a_cluster_warms_while_the_old_one_serves, a_listener_waits_for_its_routes, what_does_not_come_is_not_waited_for, what_nobody_renews_expires,
    what_nobody_renews_expires_in_delta, requests_are_limited, requests_by_delta_are_limited,
]  # fmt: skip


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_streams(scenario):
    compare(beside(scenario, Plane), *QUICK_DRAIN)


@pytest.mark.differential
@pytest.mark.parametrize("flags", [[], ["--reject-unknown-dynamic-fields"], ["--ignore-unknown-dynamic-fields"]], ids=lambda flags: "".join(flags) or "warn")
@pytest.mark.parametrize("scenario", [unknown_fields, unknown_fields_in_delta], ids=lambda scenario: scenario.__name__)
def test_unknown_fields(scenario, flags):
    compare(beside(scenario, Plane), *QUICK_DRAIN, *flags)
