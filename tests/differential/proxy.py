"""A proxy process under test, real Envoy or ours, and its admin interface."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.differential.wire import Response, Signals, Wire, play
from tests.polling import until

READY_LIMIT_S = 90.0
STOP_LIMIT_S = 30.0
_PR_SET_PDEATHSIG = 1
_FLAGS = ["--concurrency", "1", "-l", "error", "--file-flush-interval-msec", "20", "--file-flush-min-size-kb", "0"]


def envoy_binary() -> str | None:
    """The real Envoy: $ENVOY, beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "envoy"
    return os.environ.get("ENVOY") or (str(beside) if beside.exists() else shutil.which("envoy"))


def envoy_command() -> list[str]:
    return [envoy_binary() or "envoy", "--disable-hot-restart", *_FLAGS]


def our_command() -> list[str]:
    return [sys.executable, "-m", "meshproxy", *_FLAGS]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ProxyError(Exception):
    """The proxy did not start, or died."""


class Proxy:
    """Owns one process. `ports`: listener name -> port; `folder` holds its configuration, stderr and logs."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command = command
        self.folder = folder
        self.ports: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._admin: Wire | None = None
        self._admin_lock = asyncio.Lock()

    async def start(self, config: dict[str, Any]) -> None:
        """Start, and wait until /ready says so."""
        path, admin = self.folder / "config.json", self.folder / "admin-address"
        path.write_text(json.dumps(config, indent=1))
        admin.unlink(missing_ok=True)
        with (self.folder / "stderr").open("ab") as stderr, (self.folder / "stdout").open("ab") as stdout:
            self.process = subprocess.Popen(
                [*self.command, "-c", str(path), "--admin-address-path", str(admin)],
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - the tests run no threads
            )

        async def ready() -> bool:
            if not self.alive():
                raise ProxyError(f"exit status {self.process and self.process.returncode}: {self.stderr()}")
            if not admin.exists() or ":" not in (text := admin.read_text()):
                return False
            self._admin_port = int(text.strip().rpartition(":")[2])
            try:
                return (await self.admin("GET", "/ready"))[0] == 200
            except ConnectionError:
                return False

        try:
            await until(ready, READY_LIMIT_S)
        except TimeoutError:
            self.stop()
            raise ProxyError(f"not ready within {READY_LIMIT_S} s: {self.stderr()}") from None
        listeners = json.loads((await self.admin("GET", "/listeners?format=json"))[1])
        for entry in listeners.get("listener_statuses", []):
            self.ports[entry["name"]] = entry["local_address"].get("socket_address", {}).get("port_value", 0)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stderr(self) -> str:
        """What the process wrote there, shortened in the middle."""
        text = (self.folder / "stderr").read_text(errors="replace")
        return text if len(text) < 4000 else f"{text[:2000]}\n...\n{text[-2000:]}"

    async def admin_raw(self, request: bytes, method: str = "GET") -> bytes:
        """One exchange on the admin port; the connection is kept."""
        async with self._admin_lock:
            for attempt in (1, 2):
                fresh = self._admin is None or bool(self._admin.end) or self._admin.transport.is_closing()
                if fresh:
                    _, self._admin = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", self._admin_port)
                assert self._admin is not None
                self._admin.received.clear()
                trouble = "broken off"
                try:
                    trouble = await play([request, Response(method)], self._admin, Signals())
                finally:
                    if trouble:  # what is still to come belongs to no later question
                        self._admin.transport.abort()
                if self._admin.received or attempt == 2 or fresh:
                    break
        if trouble or not self._admin.received:
            raise ConnectionError(f"admin: {trouble or 'no answer'}")
        return bytes(self._admin.received)

    async def admin(self, method: str, target: str) -> tuple[int, str]:
        """Status and body (chunks joined)."""
        raw = await self.admin_raw(f"{method} {target} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\n\r\n".encode(), method)
        head, _, body = raw.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            body = dechunk(body)
        return int(head.split(b" ")[1]), body.decode("utf-8", "replace")

    async def stats(self) -> dict[str, int]:
        """All counters and gauges that were ever used."""
        _, text = await self.admin("GET", "/stats?usedonly")
        stats = {}
        for line in text.splitlines():
            name, _, value = line.rpartition(": ")
            if value.isdigit():
                stats[name] = int(value)
        return stats

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL."""
        if self._admin is not None:
            self._admin.transport.abort()
            self._admin = None
        if self.process is None:
            return
        if self.alive():
            self.process.terminate()
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def dechunk(body: bytes) -> bytes:
    """The content of a chunked body."""
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        if count == 0:
            break
        content += body[:count]
        body = body[count + 2 :]
    return content
