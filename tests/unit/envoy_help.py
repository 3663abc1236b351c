"""The real Envoy as an oracle for load balancing: which host it picks for a request, without any host being there.

Nobody listens at the hosts' addresses; the local reply to the refused connection carries `%UPSTREAM_HOST%`.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.polling import wait_until

BINARY = shutil.which("envoy", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


class Envoy:
    """One Envoy process that knows some clusters; requests to `/<cluster>` go there, hashed by the header x-hash if there is one."""

    def __init__(self, clusters: list[dict[str, Any]], *, node: dict[str, Any] | None = None, manager: dict[str, Any] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        admin_path = folder / "admin"
        config = {
            "node": {"id": "n", "cluster": "n", **(node or {})},
            "admin": {"address": _address("127.0.0.1", 0)},
            "static_resources": {"clusters": clusters, "listeners": [_listener([one["name"] for one in clusters])]},
        }
        if manager:
            config["cluster_manager"] = manager
        (folder / "envoy.json").write_text(json.dumps(config))
        self._process = subprocess.Popen(
            [
                str(BINARY),
                "-c",
                str(folder / "envoy.json"),
                "-l",
                "critical",
                "--concurrency",
                "1",
                "--disable-hot-restart",
                "--admin-address-path",
                str(admin_path),
            ]
        )
        try:
            self._wait(admin_path)
        except BaseException:
            self._stop()
            raise
        self._admin = admin_path.read_text()
        self.port = json.loads(self.admin("/listeners?format=json"))["listener_statuses"][0]["local_address"]["socket_address"]["port_value"]
        self._socket = socket.create_connection(("127.0.0.1", self.port))
        self._file = self._socket.makefile("rb")

    def _wait(self, path: Path) -> None:
        def live() -> bool:
            if self._process.poll() is not None:
                raise RuntimeError("Envoy did not start")
            return path.exists() and bool(address := path.read_text()) and _get(f"http://{address}/ready") == "LIVE\n"

        wait_until(live)

    def admin(self, path: str) -> str:
        return _get(f"http://{self._admin}{path}")

    def stat(self, name: str) -> int:
        return int(json.loads(self.admin(f"/stats?format=json&filter=^{name}$"))["stats"][0]["value"])

    def pick(self, cluster: str, hash_value: str | None = None) -> str | None:
        """The address of the host that Envoy picks, or None."""
        header = "" if hash_value is None else f"x-hash: {hash_value}\r\n"
        self._socket.sendall(f"GET /{cluster} HTTP/1.1\r\nhost: x\r\n{header}\r\n".encode())
        length, picked = 0, None
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            if name == "content-length":
                length = int(value)
            elif name == "x-picked":
                picked = value.strip()
        self._file.read(length)
        return None if picked in (None, "-") else picked

    def hold(self, cluster: str, hash_value: str) -> socket.socket:
        """Send a request to hosts that never answer, on a connection of its own, which keeps the request open."""
        one = socket.create_connection(("127.0.0.1", self.port))
        one.sendall(f"GET /{cluster} HTTP/1.1\r\nhost: x\r\nx-hash: {hash_value}\r\n\r\n".encode())
        return one

    def active(self, cluster: str) -> dict[str, int]:
        """The active requests of each host."""
        prefix = f"{cluster}::"
        parts = [line.split("::") for line in self.admin("/clusters").splitlines() if line.startswith(prefix) and "::rq_active::" in line]
        return {address: int(count) for _, address, _, count in parts}

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def _address(ip: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": ip, "port_value": port}}


def _listener(names: list[str]) -> dict[str, Any]:
    routes = [{"match": {"path": f"/{name}"}, "route": {"cluster": name, "hash_policy": [{"header": {"header_name": "x-hash"}}]}} for name in names]
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "h",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "v",
                    "domains": ["*"],
                    "routes": routes,
                    "response_headers_to_add": [{"header": {"key": "x-picked", "value": "%UPSTREAM_HOST%"}}],
                }
            ]
        },
        "http_filters": [{"name": "r", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    }
    return {"name": "l", "address": _address("127.0.0.1", 0), "filter_chains": [{"filters": [{"name": "h", "typed_config": manager}]}]}
