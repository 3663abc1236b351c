"""A control plane with many proxies: what the first push costs, and what one endpoint more."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from benchmarks import measure, processes
from benchmarks.errors import BenchmarkError
from benchmarks.mesh import documents
from benchmarks.mesh.plane import Helper, Plane, need_grpc

if TYPE_CHECKING:
    from benchmarks.runner import Run

SERVICES, CLIENTS, EDITS = 1000, 500, 10
_QUICK = (50, 20, 2)
_LIMIT_S = 120.0
_QUIET_S = 0.5  # after what clients have said last, until the control plane has read it
_SAMPLE_S = 0.25
_EDITED = "service-0007"


def scale(run: Run) -> None:
    """The control plane on one core, clients and harness on the other."""
    need_grpc()
    services, clients, edits = _QUICK if run.result.quick else (SERVICES, CLIENTS, EDITS)
    for number in range(run.rounds):
        for line, _, _ in run.lines():
            with run.attempt(line):
                work = run.folder / f"round-{number}"
                folder = work / "mesh"
                folder.mkdir(parents=True)
                documents.many_services(folder, services)
                sidecar = {"inbound": [{"port": 8000, "listen": 18000}], "httpProxy": 15001}
                documents.write(folder, "proxies.yaml", *(documents.workload(f"proxy-{index:04d}", {"http": 8000}, sidecar) for index in range(clients)))
                with (
                    Plane(folder, work, [processes.PROXY_CPU], "--log-level", "warning") as plane,
                    Helper("benchmarks.mesh.clients", work, [processes.LOAD_CPU]) as crowd,
                ):
                    run.result.add(line, **_push(plane, crowd, clients))
                    run.result.add(line, **_edits(plane, crowd, folder, edits))


def _push(plane: Plane, crowd: Helper, clients: int) -> dict[str, float]:
    with _Peak(plane) as peak:
        before = sum(measure.cpu_seconds(plane.pids()))
        crowd.tell(connect=plane.address, clients=clients)
        done = crowd.hear(_LIMIT_S)
        time.sleep(_QUIET_S)
        cpu = sum(measure.cpu_seconds(plane.pids())) - before
    _check(plane, clients)
    return {"push_s": done["last"] - done["start"], "push_cpu_s": cpu, "push_mb": done["bytes"] / 1e6, "peak_alone": peak.alone}


def _edits(plane: Plane, crowd: Helper, folder: Path, edits: int) -> dict[str, float]:
    """One endpoint comes, one endpoint goes, and so on: the slowest, and what one costs."""
    slowest = 0.0
    before = sum(measure.cpu_seconds(plane.pids()))
    for turn in range(edits):
        crowd.tell(expect=f"outbound|{documents.PORT}||{_EDITED}.default.svc.cluster.local")
        crowd.hear(_LIMIT_S)
        start = time.monotonic()
        addresses = documents.addresses(7, 11 - turn % 2)
        documents.write(folder, f"{_EDITED}.yaml", documents.service(_EDITED), documents.slice_of(_EDITED, addresses))
        slowest = max(slowest, crowd.hear(_LIMIT_S)["last"] - start)
        time.sleep(_QUIET_S)
    cpu = sum(measure.cpu_seconds(plane.pids())) - before
    _check(plane, None)
    return {"acked_s": slowest, "edit_cpu_s": cpu / edits}


def _check(plane: Plane, clients: int | None) -> None:
    """The control plane must know of every client that it has everything."""
    status = plane.status()
    wrong = plane.not_synced()
    if wrong or (clients is not None and len(status) != clients):
        raise BenchmarkError(f"{len(status)} proxies are connected, {len(wrong)} of them not in step: {wrong[:1]}")


class _Peak:
    """The most memory that the control plane has between enter and exit: PSS as if alone, MB."""

    def __init__(self, plane: Plane) -> None:
        self.alone = 0.0
        self._plane = plane
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.alone = max(self.alone, measure.memory(self._plane.pids()).alone)
            if self._ended.wait(_SAMPLE_S):
                return
