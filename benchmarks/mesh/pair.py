"""What a request costs in a mesh as it is deployed: two sidecars that a control plane configures, and between them mutual TLS, identities and a policy."""

from __future__ import annotations

import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from benchmarks import processes, proxies
from benchmarks.mesh import documents
from benchmarks.mesh.documents import PORT
from benchmarks.mesh.plane import Plane, need_grpc
from benchmarks.mesh.sidecar import Authority, Sidecar
from benchmarks.processes import wait

_LIFE_S = 24 * 3600
_PATIENCE_S = 60.0


class Pair:
    """A caller's sidecar and a service's, both of one kind; what the runner asks of a proxy. A context manager that ends everything."""

    def __init__(self, kind: proxies.Kind, backend_port: int, work: Path) -> None:
        need_grpc()
        envoy = kind.find() if kind is proxies.ENVOY else None
        folder = work / "mesh"
        folder.mkdir(parents=True)
        self.port, behind = processes.free_port(), processes.free_port()
        _write(folder, backend_port, self.port, behind)
        self._stack = ExitStack()
        self._sidecars: list[Sidecar] = []
        try:
            authority = Authority(work)
            plane = self._stack.enter_context(Plane(folder, work, [processes.LOAD_CPU], *authority.flags(_LIFE_S), "--log-level", "warning"))
            for name in ("api", "web"):
                self._sidecars.append(authority.sidecar(self._stack, plane, work / name, envoy, [processes.PROXY_CPU]))
            wait(self._answers, _PATIENCE_S, "requests come through both sidecars", 0.1)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=10):
                return True
        except OSError:
            return False

    def pids(self) -> list[int]:
        """All processes of both sidecars."""
        return [pid for sidecar in self._sidecars for pid in sidecar.pids()]


def _write(folder: Path, backend_port: int, port: int, behind: int) -> None:
    """`web` calls `api`: by a rule with a match and retries, with an identity that `api` asks for, and outlier detection. Nothing else is said: what a mesh
    does without being told is measured, too."""
    caller = {"identity": True, "outbound": [{"host": "api", "port": PORT, "listen": port}]}
    server = {"identity": True, "inbound": [{"port": backend_port, "listen": behind}]}
    to_api = [{"destination": {"host": "api"}}]
    rules = [
        {"match": [{"headers": {"x-user": {"exact": "ann"}}}], "route": to_api, "headers": {"response": {"set": {"x-for": "ann"}}}},
        {"route": to_api, "timeout": "10s", "retries": {"attempts": 3, "retryOn": "connect-failure,reset-before-request"}},
    ]
    pool = {"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "api"}}
    outliers = {**pool, "spec": {"host": "api", "trafficPolicy": {"outlierDetection": {"consecutive5xxErrors": 5}}}}
    security = {"apiVersion": "security.istio.io/v1", "metadata": {"name": "api"}}
    strict = {**security, "kind": "PeerAuthentication", "spec": {"mtls": {"mode": "STRICT"}}}
    sources = [{"source": {"principals": ["cluster.local/ns/default/sa/web"]}}]
    allowed = {"from": sources, "to": [{"operation": {"methods": ["GET"], "paths": ["/", "/api/*"]}}]}
    policy = {**security, "kind": "AuthorizationPolicy", "spec": {"selector": {"matchLabels": {"app": "api"}}, "rules": [allowed]}}
    documents.write(folder, "api.yaml", documents.service("api", {"app": "api"}), documents.workload("api", {"http": backend_port}, server))
    documents.write(folder, "web.yaml", documents.workload("web", {"http": backend_port}, caller))
    documents.write(folder, "rules.yaml", documents.rule("api", rules), outliers)
    documents.write(folder, "security.yaml", strict, policy)
