"""A proxy beside a workload, ours or Envoy, with a bootstrap of `meshctl`'s, and with an identity if it is to have one."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks import processes
from benchmarks.mesh.plane import Plane, meshctl
from benchmarks.processes import Process

_PATIENCE_S = 60.0


class Sidecar:
    """One proxy; a context manager that ends it. It is ready."""

    def __init__(self, folder: Path, bootstrap: dict[str, Any], envoy: str | None = None, cpus: Collection[int] = processes.CPUS) -> None:
        self._port = processes.free_port()
        bootstrap["admin"]["address"]["socket_address"]["port_value"] = self._port
        path = folder / "bootstrap.json"
        path.write_text(json.dumps(bootstrap))
        program = [envoy, "--disable-hot-restart"] if envoy is not None else [sys.executable, "-m", "meshproxy"]
        self._process = Process([*program, "-c", str(path), "--concurrency", "1", "-l", "error"], folder / "output", cpus)
        self._process.wait(self._is_ready, _PATIENCE_S, f"the sidecar of {folder.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def pids(self) -> list[int]:
        """Its processes."""
        return self._process.pids()

    def _is_ready(self) -> bool:
        try:
            return self._get("/ready").startswith(b"LIVE")
        except OSError:
            return False

    def _get(self, target: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{target}", timeout=10) as response:
            return bytes(response.read())

    def serials(self) -> set[str]:
        """Of the leaves that it uses now."""
        found = json.loads(self._get("/certs"))["certificates"]
        return {chain["serial_number"] for one in found for chain in one["cert_chain"][:1]}

    def stats(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose name matches."""
        return {one["name"]: one["value"] for one in json.loads(self._get(f"/stats?format=json&filter={pattern}"))["stats"] if "value" in one}


class Authority:
    """What a control plane signs with, and what sidecars need to get an identity of it."""

    def __init__(self, work: Path) -> None:
        self._folder, self._socket = work / "ca", work / "ca.sock"

    def flags(self, life_s: int) -> list[str]:
        """Of `meshctl serve`."""
        return ["--ca-dir", str(self._folder), "--ca-socket", str(self._socket), "--certificate-life", f"{life_s}s"]

    def sidecar(self, stack: ExitStack, plane: Plane, folder: Path, envoy: str | None = None, cpus: Collection[int] = processes.CPUS) -> Sidecar:
        """The sidecar of the workload of the folder's name, which it makes. An Envoy gets its secrets from an agent, as Envoys do."""
        folder.mkdir()
        token = folder / "token"
        token.write_text(meshctl("token", "create", f"default/{folder.name}", "--ca-dir", str(self._folder)))
        own = ["--authority", f"unix:{self._socket}", "--join-token-file", str(token)]
        if envoy is not None:
            path = folder / "sds.sock"
            agent = stack.enter_context(Process([sys.executable, "-m", "control", "agent", "--socket", str(path), *own], folder / "agent.log", processes.CPUS))
            agent.wait(path.exists, _PATIENCE_S, "the agent")
            own = ["--sds", str(path)]
        bootstrap = yaml.safe_load(meshctl("bootstrap", folder.name, "--server", plane.address, *own))
        return stack.enter_context(Sidecar(folder, bootstrap, envoy, cpus))
