"""Starts real processes for the tests of this folder."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from tests.polling import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[2]
ADMIN = "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}\n"


def listener(port: int, routes: str, *, name: str = "l1", extra: str = "", filters: str = "") -> str:
    """A listener with a connection manager, as YAML of one item of a list."""
    return f"""
  - name: {name}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    {extra}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {name}
          route_config: {{name: r, virtual_hosts: [{{name: v, domains: ["*"], routes: [{routes}]}}]}}
          http_filters:
          {filters}
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"""


def cluster(name: str, port: int) -> str:
    """A static cluster of one host."""
    host = f"{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
    return f"\n  - {{name: {name}, connect_timeout: 30s, load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{host}]}}]}}}}\n"


HELLO = "{match: {prefix: /}, direct_response: {status: 200, body: {inline_string: hello}}}"


class Proxy:
    """One proxy process and what it says."""

    def __init__(self, folder: Path, config: str, *flags: str, command: list[str] | None = None, wait: bool = True) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text(config)
        self.address_file = folder / "admin-address"
        self.stderr_path = folder / "stderr"
        command = command or [sys.executable, "-m", "meshproxy"]
        with self.stderr_path.open("wb") as stderr, (folder / "stdout").open("wb") as stdout:
            self.process = subprocess.Popen(
                [*command, "-c", str(self.config), "--admin-address-path", str(self.address_file), *flags],
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )
        if wait:
            wait_until(self._is_ready)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.stderr
        try:
            return self.admin("GET", "/ready")[0] == 200
        except (OSError, ValueError):
            return False

    def admin(self, method: str, target: str) -> tuple[int, str]:
        """Status and body."""
        host, _, port = self.address_file.read_text().rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        try:
            connection.request(method, target)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def stat(self, name: str) -> int:
        """The value of one counter or gauge."""
        stats = json.loads(self.admin("GET", f"/stats?format=json&filter=^{name}$")[1])["stats"]
        return stats[0]["value"] if stats else 0

    def port(self, name: str = "l1") -> int:
        """Where a listener listens."""
        for line in self.admin("GET", "/listeners")[1].splitlines():
            if line.startswith(f"{name}::"):
                return int(line.rpartition(":")[2])
        raise AssertionError(f"no listener {name}")

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        return children(self.process.pid)

    def wait_exit(self, limit: float = PATIENCE) -> int:
        """The exit status."""
        return self.process.wait(limit)

    def signal(self, number: signal.Signals) -> None:
        """Send main a signal."""
        self.process.send_signal(number)


def children(pid: int) -> list[int]:
    """The living child processes of a process, oldest first."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found.append(int(entry))
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def get(port: int, path: str = "/", timeout: float = PATIENCE) -> tuple[int, str]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def refused(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Upstream:
    """A service that answers when it is told to. `arrived` counts requests that wait."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.arrived = threading.Semaphore(0)
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                upstream.arrived.release()
                upstream.release.wait(2 * PATIENCE)
                self.send_response(200)
                self.send_header("content-length", "4")
                self.end_headers()
                self.wfile.write(b"done")

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
