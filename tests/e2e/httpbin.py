"""A mesh of one service, `httpbin`, with a sidecar before it: what Istio's tasks about security begin with."""

from __future__ import annotations

from pathlib import Path

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, write
from tests.e2e.proxy import Proxy


class Httpbin:
    """The service, whose sidecar listens at `inbound`, and a control plane, which is still to be started. `kind` of proxies: "envoy" or "ours"."""

    def __init__(self, work: Path, kind: str) -> None:
        self.work, self.kind = work, kind
        self.folder = work / "mesh"
        self.folder.mkdir()
        self.ports = Ports()
        self.service = Service("httpbin")
        self.inbound = self.ports.take()
        self.write(
            "mesh.yaml",
            f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: httpbin, labels: {{app: httpbin}}}}
spec:
  ports: {{http: {self.service.port}}}
  sidecar: {{inbound: [{{port: {self.service.port}, listen: {self.inbound}}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: httpbin}}
spec: {{selector: {{app: httpbin}}, ports: [{{name: http, port: 80, targetPort: http}}]}}
""",
        )
        self.control = ControlPlane(self.folder, work)
        self.proxies: list[Proxy] = []

    def write(self, name: str, text: str) -> None:
        write(self.folder, name, text)

    def sidecar(self, name: str) -> None:
        """Start the proxy of a workload."""
        folder = self.work / name
        folder.mkdir()
        command = [envoy_binary() or "envoy", "--disable-hot-restart"] if self.kind == "envoy" else None
        self.proxies.append(Proxy(folder, self.control.bootstrap(name), "--concurrency", "1", "-l", "error", command=command))

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.__exit__()
        self.control.kill()
        self.service.close()
        self.ports.close()
