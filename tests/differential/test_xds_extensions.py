"""HTTP filters by discovery (ECDS): replaced under connections that stay, with a default and without, refused, taken away; over files and streams."""

from __future__ import annotations

from typing import Any

import pytest

from tests.differential.config import Config
from tests.differential.test_xds_streams import ADS, Plane, answered, api, note_log, started
from tests.differential.xds_rig import LIMIT_S, QUICK_DRAIN, Site, beside, compare, http_listener, says, source
from tests.polling import until

FAULT = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"
BUFFER = "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
STATS = ("extension_config_discovery.", "listener_manager.listener_", "listener_manager.total_")


def abort(status: int) -> Config:
    """A fault filter that answers everything with a status."""
    return {"@type": FAULT, "abort": {"http_status": status, "percentage": {"numerator": 100}}}


def extension(status: int, name: str = "first") -> Config:
    return {"name": name, "typed_config": abort(status)}


def listener(*filters: Config, name: str = "in", **fields: Any) -> Config:
    """A listener with filters by discovery before its router."""
    made = http_listener(name, says("hello"), **fields)
    manager = made["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"] = [*filters, *manager["http_filters"]]
    manager["access_log"] = [{"name": "file", "typed_config": {"@": "file_log", "path": "${file:log}", "log_format": {"text_format_source": {
        "inline_string": "%RESPONSE_CODE% %RESPONSE_FLAGS%\n"}}}}]  # fmt: skip
    return made


def discovered(config_source: Config, name: str = "first", **fields: Any) -> Config:
    return {"name": name, "config_discovery": {"config_source": config_source, "type_urls": [FAULT], **fields}}


async def from_a_file(site: Site, plane: Plane) -> None:
    site.write("ecds.json", "x1", "extension", extension(418))
    site.write("lds.json", "l1", "listener", listener(discovered(source("ecds.json"))))
    await site.start({"dynamic_resources": {"lds_config": source("lds.json")}})
    client = await site.connect("in")
    site.note(await client.get())
    site.write("ecds.json", "x2", "extension", extension(503))
    await site.until_get("in", "503 fault filter abort")
    site.note(await client.get())
    await site.note_stats(*STATS)
    await site.note_dump("EcdsConfigDump", "ListenersConfigDump")
    for version, wrong in (
        ("x3", {"name": "first", "typed_config": {"@type": BUFFER, "max_request_bytes": 1}}),
        ("x4", {"name": "other", "typed_config": abort(400)}),
        ("x5", {"name": "first", "typed_config": {"@type": FAULT, "abort": {"http_status": 1}}}),
    ):
        site.write("ecds.json", version, "extension", wrong)
        await site.until("extension_config_discovery.http_filter.first.update_rejected", int(version[1]) - 2)
        site.note(await client.get())
    await site.note_stats("extension_config_discovery.")
    site.write("ecds.json", "x6", "extension", extension(503))  # the same as what is in use
    await site.until("extension_config_discovery.http_filter.first.version_text", "x6")
    await site.note_stats("extension_config_discovery.")
    await site.note_dump("EcdsConfigDump")


async def nothing_comes(site: Site, plane: Plane) -> None:
    """Requests are refused, but for those at listeners with a default."""
    short = ADS | {"initial_fetch_timeout": "0.3s"}
    plane.put("listener", "l1", listener(discovered(short)), listener(discovered(short, "second", default_config=abort(403)), name="out"))
    await started(site, plane)
    await site.until("extension_config_discovery.http_filter.first.init_fetch_timeout", 1)
    await site.until_get("in", "500 ")
    await site.until_get("out", "403 fault filter abort")
    await plane.until_asked("extension", "first second")
    await site.note_stats("extension_config_discovery.")
    await site.note_dump("EcdsConfigDump")
    await plane.set("extension", "x1", extension(418), extension(419, "second"))
    await site.until_get("in", "418 fault filter abort")
    await site.until_get("out", "419 fault filter abort")
    await site.note_stats("extension_config_discovery.")
    log = site.folder / "log"  # written by and by
    await until(lambda: {"418 FI", "419 FI"} <= set(log.read_text().splitlines()), LIMIT_S)
    site.note(sorted(set(log.read_text().splitlines())))


async def warmed(site: Site, plane: Plane, kind: str) -> None:
    """A listener waits for its filter, one with a default to begin with does not; what changes later drains nobody."""
    plane.put("listener", "l1", http_listener("in", says("before")))
    plane.hold.add("extension")
    await started(site, plane, kind=kind)
    await plane.set("listener", "l2", listener(discovered(ADS)), listener(
        discovered(ADS, "second", default_config=abort(403), apply_default_config_without_warming=True), name="out"))  # fmt: skip
    await plane.until_asked("extension", "first")
    await site.until_get("out", "403 fault filter abort")
    site.note(await site.stat("listener_manager.total_listeners_warming"), await site.get("in"))
    plane.hold.clear()
    await plane.set("extension", "x1", extension(418))
    await site.until_get("in", "418 fault filter abort")
    await site.until_get("out", "403 fault filter abort")
    client, other = await site.connect("in"), await site.connect("out")
    site.note(await client.get(), await other.get())
    await plane.set("extension", "x2", extension(419), extension(420, "second"))
    await site.until_get("out", "420 fault filter abort")
    await site.until_get("in", "419 fault filter abort")
    site.note(await client.get(), await other.get())
    await answered(plane, kind, 2, extension="x2")
    await site.note_stats(*STATS)
    await site.note_dump("EcdsConfigDump")
    plane.put("extension", "x3", {"name": "first", "typed_config": {"@type": ROUTER}}, extension(420, "second"))
    await plane.push()
    await plane.until_asked("extension", "nack")
    site.note(await client.get())
    if kind == "DELTA_GRPC":
        await plane.set("extension", "x4")
        await site.until_get("out", "403 fault filter abort")
        await site.until_get("in", "500 ")
        site.note(await client.get(), await other.get())
        await site.note_dump("EcdsConfigDump")
    await site.note_stats("extension_config_discovery.http_filter.first.config_")
    await plane.set("listener", "l3")
    await site.until_get("in", "refused")
    if kind == "DELTA_GRPC":
        await plane.until_asked("extension", "-first")


async def state_of_the_world(site: Site, plane: Plane) -> None:
    await warmed(site, plane, "GRPC")


async def delta(site: Site, plane: Plane) -> None:
    await warmed(site, plane, "DELTA_GRPC")


async def a_stream_of_its_own(site: Site, plane: Plane) -> None:
    own = {"api_config_source": api("GRPC"), "resource_api_version": "V3"}
    plane.put("listener", "l1", listener(discovered(own)), listener(discovered(own), name="out"))
    plane.put("extension", "x1", extension(418))
    await started(site, plane)
    await site.until_get("in", "418 fault filter abort")
    await site.until_get("out", "418 fault filter abort")
    await plane.set("extension", "x2", extension(419))
    await site.until_get("out", "419 fault filter abort")
    await site.until_get("in", "419 fault filter abort")
    await plane.until_asked("extension", "ack x2")
    note_log(site, plane, "extension")
    await site.note_stats("extension_config_discovery.")


async def a_filter_that_may_not_have_what_has_come(site: Site, plane: Plane) -> None:
    """Another listener wants the same filter to be of another type: it has its default."""
    plane.put("listener", "l1", listener(discovered(ADS)))
    plane.put("extension", "x1", extension(418))
    await started(site, plane)
    await site.until_get("in", "418 fault filter abort")
    other = discovered(ADS) | {"config_discovery": {
        "config_source": ADS, "type_urls": [BUFFER], "default_config": {"@type": BUFFER, "max_request_bytes": 10}}}  # fmt: skip
    await plane.set("listener", "l2", listener(discovered(ADS)), listener(other, name="out"))
    await site.until_get("out", "200 hello")
    site.note(await site.get("in"))
    await site.note_stats("extension_config_discovery.http_filter.first.config_")


async def per_route_and_switched_off(site: Site, plane: Plane) -> None:
    """What routes say of a filter counts for the one that comes."""
    made = listener(discovered(ADS))
    manager = made["filter_chains"][0]["filters"][0]["typed_config"]
    reply = {"status": 200, "body": {"inline_string": "hello"}}
    off = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": True}
    routes = [
        {"match": {"prefix": "/other"}, "direct_response": reply, "typed_per_filter_config": {"first": abort(410)}},
        {"match": {"prefix": "/off"}, "direct_response": reply, "typed_per_filter_config": {"first": off}},
        {"match": {"prefix": "/"}, "direct_response": reply},
    ]
    manager["route_config"]["virtual_hosts"][0]["routes"] = routes
    plane.put("listener", "l1", made)
    plane.put("extension", "x1", extension(418))
    await started(site, plane)
    await site.until_get("in", "418 fault filter abort")
    for path in ("/", "/other", "/off"):
        site.note(path, await site.get("in", path))
    await plane.set("extension", "x2", extension(419))
    await site.until_get("in", "419 fault filter abort")
    for path in ("/", "/other", "/off"):
        site.note(path, await site.get("in", path))


async def of_the_bootstrap(site: Site, plane: Plane) -> None:
    site.write("ecds.json", "x1", "extension", extension(418))
    await site.start({"static_resources": {"listeners": [listener(discovered(source("ecds.json")))]}})
    await site.until_get("in", "418 fault filter abort")
    site.write("ecds.json", "x2", "extension", extension(419))
    await site.until_get("in", "419 fault filter abort")
    await site.note_stats("extension_config_discovery.")


async def of_an_upgrade(site: Site, plane: Plane) -> None:
    """Among the filters that a type of upgrade has for itself; wrong ones are refused."""
    made = listener()
    manager = made["filter_chains"][0]["filters"][0]["typed_config"]
    manager["upgrade_configs"] = [{"upgrade_type": "websocket", "filters": [discovered(ADS), *manager["http_filters"]]}]
    plane.put("listener", "l1", made)
    plane.put("extension", "x1", extension(418))
    await started(site, plane)
    await site.until_get("in", "200 hello")
    client = await site.connect("in")

    async def upgrade() -> str:
        other = await site.connect("in")
        answer = await other.send("GET / HTTP/1.1\r\nhost: a.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        other.close()
        return answer

    for status in (418, 419, 420):
        if status > 418:
            await plane.set("extension", f"x{status - 417}", extension(status))

        async def answered(status: int = status) -> bool:
            return (await upgrade()).startswith(f"{status} fault filter abort")

        await until(answered, LIMIT_S)
        site.note(await client.get())
    plane.put("extension", "x4", {"name": "first", "typed_config": {"@type": ROUTER}})
    await plane.push()
    await plane.until_asked("extension", "nack")
    site.note(await client.get(), await upgrade())
    await site.note_stats("extension_config_discovery.")
    await site.note_dump("EcdsConfigDump")


SCENARIOS = [
    from_a_file, nothing_comes, state_of_the_world, delta, a_stream_of_its_own, a_filter_that_may_not_have_what_has_come, per_route_and_switched_off,
    of_an_upgrade, of_the_bootstrap,
]  # fmt: skip


@pytest.mark.differential
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_extensions(scenario):
    compare(beside(scenario, Plane), *QUICK_DRAIN)
