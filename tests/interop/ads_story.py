"""A story that a control plane tells our sidecar, in steps, and what is to be seen of it: the same from the real one and from a recording."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.differential import proxy
from tests.differential.xds_rig import KINDS, Client, Origin
from tests.polling import until

Config = dict[str, Any]
ADS: Config = {"ads": {}, "resource_api_version": "V3"}
_FILTERS = "type.googleapis.com/envoy.extensions.filters."
_HTTP_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def cluster(name: str, **fields: Any) -> Config:
    return {"@type": KINDS["cluster"], "name": name, "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": {"eds_config": ADS}} | fields


def endpoint(name: str, origin: str) -> Config:
    """By a Unix socket in the folder of the sidecar: the same wherever it runs."""
    return {
        "@type": KINDS["endpoint"],
        "cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": f"{origin}.sock"}}}}]}],
    }


def routes(**action: Any) -> Config:
    return {"@type": KINDS["route"], "name": "routes", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, **action}]}]}


def listener(*filters: Config, **fields: Any) -> Config:
    manager = {
        "@type": f"{_FILTERS}network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "in",
        "rds": {"route_config_name": "routes", "config_source": ADS},
        "http_filters": [*filters, {"name": "router", "typed_config": {"@type": f"{_FILTERS}http.router.v3.Router"}}],
    }  # fmt: skip
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    return {"@type": KINDS["listener"], "name": "in", "address": address, "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}]} | fields


TO_ONE = routes(route={"cluster": "one"})
TO_TWO = routes(route={"cluster": "two"})
FAULT = f"{_FILTERS}http.fault.v3.HTTPFault"
DISCOVERED = {"name": "fault", "config_discovery": {"config_source": ADS, "type_urls": [FAULT]}}


def fault(status: int) -> Config:
    return {"@type": KINDS["extension"], "name": "fault", "typed_config": {"@type": FAULT, "abort": {"http_status": status, "percentage": {"numerator": 100}}}}


# Step -> (what the control plane has, what a client then gets).
STEPS: dict[str, tuple[list[Config], str]] = {
    "begin": ([cluster("one"), endpoint("one", "a"), listener(), TO_ONE], "200 a"),
    "other endpoints": ([cluster("one"), endpoint("one", "b"), listener(), TO_ONE], "200 b"),
    "another cluster and routes to it": ([cluster("one"), cluster("two"), endpoint("one", "b"), endpoint("two", "a"), listener(), TO_TWO], "200 a"),
    "a listener that is wrong": (
        [cluster("one"), cluster("two"), endpoint("one", "b"), endpoint("two", "a"), listener(listener_filters_timeout="-1s"), TO_TWO], "200 a"),
    "a filter by discovery": ([cluster("two"), endpoint("two", "a"), listener(DISCOVERED), TO_TWO, fault(418)], "418 fault filter abort"),
    "cut": ([cluster("two"), endpoint("two", "a"), listener(DISCOVERED), TO_TWO, fault(418)], "418 fault filter abort"),
    "after the cut": ([cluster("two", connect_timeout="2s"), endpoint("two", "b"), listener(), TO_TWO], "200 b"),
}  # fmt: skip


class Sidecar:
    """Our sidecar, with its origins, in a folder."""

    def __init__(self, folder: Path, port: int, *, delta: bool) -> None:
        self._proxy = proxy.Proxy(["env", "-C", str(folder), *proxy.our_command()], folder)
        self._folder = folder
        self._origins: list[UnixOrigin] = []
        api = {"api_type": "DELTA_GRPC" if delta else "GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "control"}}]}
        options = {_HTTP_OPTIONS.rpartition("/")[2]: {"@type": _HTTP_OPTIONS, "explicit_http_config": {"http2_protocol_options": {}}}}
        address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
        control = {"name": "control", "connect_timeout": "1s", "typed_extension_protocol_options": options, "load_assignment": {
            "cluster_name": "control", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}}  # fmt: skip
        self._bootstrap = {
            "node": {"id": "test-node", "cluster": "test-cluster"},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
            "dynamic_resources": {"ads_config": api, "cds_config": ADS, "lds_config": ADS},
            "static_resources": {"clusters": [control]},
        }

    async def start(self) -> None:
        for name in ("a", "b"):
            self._origins.append(UnixOrigin(name, self._folder / f"{name}.sock"))
            await self._origins[-1].start()
        await self._proxy.start(self._bootstrap)

    def stop(self) -> None:
        self._proxy.stop()
        for origin in self._origins:
            origin.stop()

    async def get(self) -> str:
        """What a client gets from the listener; "" while there is none."""
        listeners = json.loads((await self._proxy.admin("GET", "/listeners?format=json"))[1]).get("listener_statuses", [])
        if not listeners:
            return ""
        reader, writer = await asyncio.open_connection("127.0.0.1", listeners[0]["local_address"]["socket_address"]["port_value"])
        answer = await Client(reader, writer).get()
        writer.close()
        return answer

    async def until_get(self, answer: str) -> None:
        """Wait until that is it."""
        seen = ""

        async def answered() -> bool:
            nonlocal seen
            seen = await self.get()
            return seen == answer

        try:
            await until(answered)
        except TimeoutError:
            raise AssertionError(f"{seen!r} instead of {answer!r}: {self._proxy.stderr()}") from None

    async def stat(self, name: str) -> str:
        _, text = await self._proxy.admin("GET", "/stats")
        return next((line.partition(": ")[2].strip('"') for line in text.splitlines() if line.partition(": ")[0] == name), "")

    async def until(self, name: str, value: object) -> None:
        """Wait for a statistic."""

        async def has() -> bool:
            return await self.stat(name) == str(value)

        await until(has)

    async def dynamic(self) -> dict[str, list[str]]:
        """The names of what is in use, by the parts of /config_dump."""
        _, text = await self._proxy.admin("GET", "/config_dump?include_eds")
        found: dict[str, list[str]] = {}
        for section in json.loads(text)["configs"]:
            for key, entries in section.items():
                if key.startswith("dynamic_") or key == "ecds_filters":
                    found[key] = sorted(f"{_name(entry)} {entry.get('version_info', '')}".strip() for entry in entries)
        return found


def _name(entry: Config) -> str:
    inner = entry.get("cluster") or entry.get("route_config") or entry.get("ecds_filter") or entry.get("endpoint_config") or entry
    return str(inner.get("name") or inner.get("cluster_name"))


class UnixOrigin(Origin):
    """One at a Unix socket."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self._path = path

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)


async def tell(sidecar: Sidecar, serve: Callable[[str, str, list[Config]], Awaitable[None]], settled: Callable[[], Awaitable[None]]) -> None:
    """The whole story. `serve(step, version, resources)` begins a step; `settled()` waits until the control plane has been answered."""
    started = False
    for version, (step, (resources, answer)) in enumerate(STEPS.items(), 1):
        await serve(step, str(version), resources)
        if not started:
            await sidecar.start()
            started = True
        if step == "a listener that is wrong":
            await sidecar.until("listener_manager.lds.update_rejected", 1)
        await sidecar.until_get(answer)
        await settled()
        assert await sidecar.get() == answer
    dynamic = await sidecar.dynamic()
    assert [name.split()[0] for name in dynamic["dynamic_active_clusters"]] == ["two"]
    assert [name.split()[0] for name in dynamic["dynamic_listeners"]] == ["in"]
    assert "ecds_filters" not in dynamic
    assert await sidecar.stat("cluster_manager.cds.update_rejected") == "0"
    assert await sidecar.stat("listener_manager.lds.update_rejected") == "1"
    assert await sidecar.stat("cluster.two.membership_total") == "1"
