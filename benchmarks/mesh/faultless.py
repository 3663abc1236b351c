"""What nobody may notice: certificates that change every ten seconds, and a control plane that is away. Real sidecars, ours and Envoys, under steady load."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks import processes, proxies
from benchmarks.backend import Backend
from benchmarks.errors import Missing
from benchmarks.mesh import BOTH_OURS, FROM_ENVOY, TO_ENVOY, documents
from benchmarks.mesh.documents import PORT
from benchmarks.mesh.plane import Helper, Plane, need_grpc
from benchmarks.mesh.sidecar import Authority, Sidecar
from benchmarks.processes import wait

if TYPE_CHECKING:
    from benchmarks.runner import Run

LIFE_S = 20  # of certificates: they are renewed at half of it
RATE, CONNECTIONS = 100, 4  # requests a second of each pair, and connections from the client
_REQUESTS_A_CONNECTION = 20  # between sidecars: every certificate is used in new handshakes
_QUICK_S = 10.0
_PATIENCE_S = 60.0
_LOOK_S = 1.0


def rotation(run: Run) -> None:
    """Certificates change all the time."""
    seconds = _QUICK_S if run.result.quick else run.seconds
    with _Mesh(run, LIFE_S // 4 if run.result.quick else LIFE_S) as mesh, Helper("benchmarks.mesh.traffic", run.folder, [processes.LOAD_CPU]) as load:
        mesh.send(load)
        seen: dict[str, set[str]] = {name: set() for name in mesh.sidecars}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            for name, sidecar in mesh.sidecars.items():
                seen[name] |= sidecar.serials()
        mesh.report(load, lambda client, server: {"certificates": min(len(seen[client]), len(seen[server])), "handshakes": mesh.handshakes(server)})


def alone(run: Run) -> None:
    """The control plane is killed, and comes back to sidecars that go on where they were."""
    seconds = _QUICK_S if run.result.quick else run.seconds
    with _Mesh(run, 24 * 3600) as mesh, Helper("benchmarks.mesh.traffic", run.folder, [processes.LOAD_CPU]) as load:
        mesh.send(load)
        mesh.plane.kill()
        start = time.monotonic()
        time.sleep(seconds)
        away = time.monotonic() - start
        documents.write(mesh.plane.folder, "rules.yaml", *mesh.rules("back"))
        mesh.plane.start()
        back = time.monotonic()
        wait(lambda: mesh.all_say("back"), _PATIENCE_S, "an edit reaches all sidecars once the control plane is back")
        followed = time.monotonic() - back
        mesh.report(load, lambda client, server: {"away_s": away, "followed_s": followed, "handshakes": mesh.handshakes(server)})


class _Mesh:
    """Two services, one behind each kind of sidecar, and a caller of each kind. A context manager that ends everything."""

    def __init__(self, run: Run, life_s: int) -> None:
        need_grpc()
        self._run = run
        self._stack = ExitStack()
        self.sidecars: dict[str, Sidecar] = {}
        try:
            self._envoy: str | None = proxies.ENVOY.find()
        except Missing as error:
            self._envoy = None
            run.warn(f"SKIPPED: {error}")
        try:
            self._start(run.folder, life_s)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, work: Path, life_s: int) -> None:
        port = self._stack.enter_context(Backend(work / "backend")).port
        self._folder = work / "mesh"
        self._folder.mkdir()
        self._listen = {name: processes.free_port() for name in ("api", "api2", BOTH_OURS, TO_ENVOY, FROM_ENVOY)}
        for name in ("api", "api2"):
            sidecar = {"identity": True, "inbound": [{"port": port, "listen": self._listen[name]}]}
            documents.write(self._folder, f"{name}.yaml", *self._service(name), documents.workload(name, {"http": port}, sidecar))
        for name, ways in (("web", {BOTH_OURS: "api", TO_ENVOY: "api2"}), ("web2", {FROM_ENVOY: "api"})):
            outbound = [{"host": host, "port": PORT, "listen": self._listen[label]} for label, host in ways.items()]
            documents.write(self._folder, f"{name}.yaml", documents.workload(name, {"http": port}, {"identity": True, "outbound": outbound}))
        strict = {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "all"}, "spec": {"mtls": {"mode": "STRICT"}}}
        documents.write(self._folder, "strict.yaml", strict)
        documents.write(self._folder, "rules.yaml", *self.rules("first"))
        authority = Authority(work)
        self.plane = self._stack.enter_context(Plane(self._folder, work, processes.CPUS, *authority.flags(life_s), "--log-level", "warning"))
        wanted = {"api": None, "web": None, **({"api2": self._envoy, "web2": self._envoy} if self._envoy is not None else {})}
        for name, envoy in wanted.items():
            self.sidecars[name] = authority.sidecar(self._stack, self.plane, work / name, envoy)

    def _service(self, name: str) -> list[dict[str, Any]]:
        pool = {"http": {"maxRequestsPerConnection": _REQUESTS_A_CONNECTION}}
        rule = {"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": name}}
        return [documents.service(name, {"app": name}), {**rule, "spec": {"host": name, "trafficPolicy": {"connectionPool": pool}}}]

    def rules(self, version: str) -> list[dict[str, Any]]:
        """Rules by which answers say which version of the rules they come by. Nothing is tried again: each failure is seen."""
        headers = {"response": {"set": {"x-version": version}}}
        return [
            documents.rule(name, [{"route": [{"destination": {"host": name}}], "headers": headers, "retries": {"attempts": 0}}]) for name in ("api", "api2")
        ]

    # --- load

    def targets(self) -> dict[str, int]:
        """Where clients send, by pair."""
        labels = [BOTH_OURS, *([TO_ENVOY, FROM_ENVOY] if self._envoy is not None else [])]
        return {label: self._listen[label] for label in labels}

    def all_say(self, version: str) -> bool:
        """Whether requests come through by these rules everywhere."""
        return all(_header(port) == version for port in self.targets().values())

    def send(self, load: Helper) -> None:
        """Begin, once requests come through."""
        wait(lambda: self.all_say("first"), _PATIENCE_S, "requests come through all sidecars", 0.1)
        load.tell(targets=self.targets(), rate=RATE, connections=CONNECTIONS)
        load.hear(_PATIENCE_S)

    def report(self, load: Helper, more: Callable[[str, str], dict[str, float]]) -> None:
        """End the load, and add what became of it; `more` says what else there is to say of a (client, server)."""
        load.tell()
        outcome = load.hear(_PATIENCE_S)
        pairs = {BOTH_OURS: ("web", "api"), TO_ENVOY: ("web", "api2"), FROM_ENVOY: ("web2", "api")}
        for line, case, _ in self._run.lines():
            found = outcome.get(case.label)
            if found is None:
                continue
            failed = sum(found["failed"].values())
            if failed:
                self._run.result.note(f"{line}: {failed} requests failed: {found['failed']}")
            self._run.result.add(line, requests=found["served"] + failed, failed=failed, **more(*pairs[case.label]))

    def handshakes(self, name: str) -> float:
        """TLS handshakes that a server's sidecar has completed."""
        return float(sum(self.sidecars[name].stats(r"^listener\..*\.ssl\.handshake$").values()))


def _header(port: int) -> str:
    """Which version of the rules answers; empty as long as nothing does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as response:
            return str(response.headers.get("x-version", ""))
    except OSError:
        return ""
