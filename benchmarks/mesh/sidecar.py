"""A proxy beside a workload, ours or Envoy, with a bootstrap of `meshctl`'s."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

from benchmarks import processes
from benchmarks.processes import Process

_PATIENCE_S = 60.0


class Sidecar:
    """One proxy; a context manager that ends it. It is ready."""

    def __init__(self, folder: Path, bootstrap: dict[str, Any], envoy: str | None = None) -> None:
        self._port = processes.free_port()
        bootstrap["admin"]["address"]["socket_address"]["port_value"] = self._port
        path = folder / "bootstrap.json"
        path.write_text(json.dumps(bootstrap))
        program = [envoy, "--disable-hot-restart"] if envoy is not None else [sys.executable, "-m", "meshproxy"]
        self._process = Process([*program, "-c", str(path), "--concurrency", "1", "-l", "error"], folder / "output", processes.CPUS)
        self._process.wait(self._is_ready, _PATIENCE_S, f"the sidecar of {folder.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

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
