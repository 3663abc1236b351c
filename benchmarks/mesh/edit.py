"""From a file that somebody saves to what requests find: ten sidecars of ours, and a whole mesh from nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import processes
from benchmarks.errors import BenchmarkError
from benchmarks.mesh import EDITS, documents
from benchmarks.mesh.documents import PORT
from benchmarks.mesh.plane import Plane, meshctl, need_grpc
from benchmarks.mesh.sidecar import Sidecar
from benchmarks.processes import ROOT, Process, wait
from benchmarks.sender import percentile

if TYPE_CHECKING:
    from benchmarks.runner import Run

PROXIES, COUNT = 10, 30
_QUICK = (2, 3)
_PATIENCE_S = 60.0
_ASK_EVERY_S = 0.01  # each sidecar, after an edit: what is measured is not more exact than that
_UP_ROUNDS = 5
_REQUEST = b"GET / HTTP/1.1\r\nHost: mesh.test\r\n\r\n"


def edit(run: Run) -> None:
    """All processes on all cores."""
    need_grpc()
    for line, case, _ in run.lines():
        with run.attempt(line):
            if case.label == EDITS:
                samples = sorted(_edits(run))
                run.result.add(line, followed_p50_s=percentile(samples, 0.5), followed_p99_s=percentile(samples, 0.99))
            else:
                for number in range(1 if run.result.quick else _UP_ROUNDS):
                    run.result.add(line, first_request_s=_up(run.folder / f"up-{number}"))


def _edits(run: Run) -> list[float]:
    """Seconds from the rename of the file until a sidecar's answers are different: of each sidecar, for each edit."""
    proxies, count = _QUICK if run.result.quick else (PROXIES, COUNT)
    folder = run.folder / "mesh"
    folder.mkdir()
    with ExitStack() as stack:
        backend = stack.enter_context(run.backend())
        documents.write(folder, "api.yaml", documents.service("api", {"app": "api"}), documents.workload("api", {"http": backend.port}))
        _write(folder, "0")
        ports = [processes.free_port() for _ in range(proxies)]
        for number, port in enumerate(ports):
            outbound = {"outbound": [{"host": "api", "port": PORT, "listen": port}]}
            documents.write(folder, f"proxy-{number}.yaml", documents.workload(f"proxy-{number}", {"http": 8000}, outbound))
        plane = stack.enter_context(Plane(folder, run.folder, processes.CPUS, "--log-level", "warning"))
        for number in range(proxies):
            bootstrap = json.loads(meshctl("bootstrap", f"proxy-{number}", "--server", plane.address, "-o", "json"))
            work = run.folder / f"proxy-{number}"
            work.mkdir()
            stack.enter_context(Sidecar(work, bootstrap))
        return asyncio.run(_follow(folder, ports, count))


def _write(folder: Path, version: str) -> None:
    route = {"route": [{"destination": {"host": "api"}}], "headers": {"response": {"set": {"x-version": version}}}}
    documents.write(folder, "rules.yaml", documents.rule("api", [route]))


async def _follow(folder: Path, ports: list[int], count: int) -> list[float]:
    connections = [await asyncio.open_connection("127.0.0.1", port) for port in ports]
    samples: list[float] = []
    async with asyncio.timeout(_PATIENCE_S + count * 10):
        await asyncio.gather(*(_until(*connection, "0") for connection in connections))
        for number in range(1, count + 1):
            start = time.monotonic()
            _write(folder, str(number))
            seen = await asyncio.gather(*(_until(*connection, str(number)) for connection in connections))
            samples += [one - start for one in seen]
            await asyncio.sleep(0.1 + number / count / 5)  # the folder is looked at five times a second: edits come at any time between two looks
    for _, writer in connections:
        writer.close()
    return samples


async def _until(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, version: str) -> float:
    """When answers were first by this version of the rules."""
    expected = f"\r\nx-version: {version}\r\n".encode()
    while True:
        writer.write(_REQUEST)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        if expected in head:
            return time.monotonic()
        await asyncio.sleep(_ASK_EVERY_S)


def _up(work: Path) -> float:
    """Seconds from the start of `meshctl up` with the example until a request has gone through all of it."""
    shutil.copytree(ROOT / "examples" / "mesh", work / "mesh")
    state = work / "state"
    command = [sys.executable, "-m", "control", "up", str(work / "mesh"), "--state", str(state)]
    with Process(command, work / "output", processes.CPUS) as process:
        address: str = wait(lambda: process.check_alive() or _front(state / "up.json"), _PATIENCE_S, "meshctl up says where the front is")
        wait(lambda: process.check_alive() or _answers(address), _PATIENCE_S, "the front answers")
        return time.monotonic() - process.started


def _front(path: Path) -> str:
    """Where the front of the example is reached, once that is known."""
    try:
        said = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return ""
    return next((str(one["inbound"]["http"]) for one in said.get("workloads", ()) if one["name"] == "front" and one.get("inbound")), "")


def _answers(address: str) -> bool:
    """Whether a request gets through to the last service."""
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    if response.status != 200:
        return False
    said = json.loads(body)
    if not isinstance(said.get("asked"), dict):
        raise BenchmarkError(f"the front answers {said}")
    return isinstance(said["asked"].get("asked"), dict)
