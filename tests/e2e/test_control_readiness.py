"""Readiness: each sidecar asks the application beside it, and who is not ready gets nothing from anybody. Over the real Envoy and over our own sidecar."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane
from tests.e2e.proxy import Proxy, wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]
CLUSTER = "outbound|9080||reviews.default.svc.cluster.local"


class Ready(Mesh):
    """The same, with a sidecar before each of the two that are called: they ask, and report."""

    def __init__(self, work: Path, kind: str) -> None:
        super().__init__(work, kind)
        self.at = {version: self.ports.take() for version in self.services}
        for version in self.services:
            self.describe(version, "readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 0.1, failureThreshold: 2}")
        self.sidecar("web")
        self.sidecars = {version: self.sidecar(f"reviews-{version}", "--readiness") for version in self.services}

    def describe(self, version: str, probe: str) -> None:
        port = self.services[version].port
        self.write(
            f"{version}.yaml",
            f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: reviews-{version}, labels: {{app: reviews, version: {version}}}}}
spec:
  ports: {{http: {port}}}
  sidecar: {{inbound: [{{port: {port}, listen: {self.at[version]}}}]}}
  {probe}
""",
        )

    def at_web(self) -> ControlPlane:
        """The control plane of the caller's sidecar."""
        return self.control

    def told(self) -> dict[str, str]:
        """What the caller's sidecar was told of each endpoint."""
        (found,) = self.at_web().ask("proxy-config", "endpoints", "web.default", "--name", CLUSTER)
        versions = {port: version for version, port in self.at.items()}
        endpoints = [one for group in found.get("endpoints", ()) for one in group["lb_endpoints"]]
        ports = {versions.get(one["endpoint"]["address"]["socket_address"]["port_value"], "?"): one.get("health_status", "UNKNOWN") for one in endpoints}
        return dict(sorted(ports.items()))

    def states(self) -> dict[str, str]:
        """Of applications, by what `proxy-status` says."""
        return {one["name"]: one["APPLICATION"] for one in self.control.ask("proxy-status") if "APPLICATION" in one}

    def wait_told(self, v1: str, v2: str) -> None:
        wait_until(lambda: self.told() == {"v1": v1, "v2": v2})


class Replicas(Ready):
    """Two replicas that share what is reported: one for the caller's sidecar, and one for those that report."""

    def __init__(self, work: Path, kind: str) -> None:
        (work / "two").mkdir()
        self.two: ControlPlane | None = None
        super().__init__(work, kind)

    def control_flags(self) -> list[str]:
        return ["--share-readiness", str(self.work / "shared")]

    def at_web(self) -> ControlPlane:
        assert self.two is not None
        return self.two

    def sidecar(self, name: str = "web", *flags: str) -> Proxy:
        if name != "web":
            return super().sidecar(name, *flags)
        one, self.two = self.control, ControlPlane(self.folder, self.work / "two", flags=self.control_flags())
        self.two.start()
        self.control = self.two
        try:
            return super().sidecar(name, *flags)
        finally:
            self.control = one

    def close(self) -> None:
        super().close()
        self.at_web().kill()


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Ready(tmp_path, request.param)
    yield made
    made.close()


def test_who_is_not_ready_gets_nothing(mesh):
    mesh.wait_told("UNKNOWN", "UNKNOWN")
    wait_until(lambda: mesh.states() == {"reviews-v1.default": "READY", "reviews-v2.default": "READY"})
    wait_until(lambda: set(mesh.who(10)) == {"v1", "v2"})

    mesh.services["v1"].status = 503
    mesh.wait_told("UNHEALTHY", "UNKNOWN")
    wait_until(lambda: set(mesh.who(20)) == {"v2"})
    assert set(mesh.who(20)) == {"v2"}
    assert mesh.states() == {"reviews-v1.default": "NOT READY", "reviews-v2.default": "READY"}

    assert mesh.control.ask("diff", str(mesh.folder)) == []  # what is not ready is no difference of documents

    mesh.services["v2"].status = 503  # nobody is left, and nobody is asked
    mesh.wait_told("UNHEALTHY", "UNHEALTHY")
    wait_until(lambda: set(mesh.who(20)) == {None})

    mesh.services["v1"].status = 200
    mesh.wait_told("UNKNOWN", "UNHEALTHY")
    wait_until(lambda: set(mesh.who(20)) == {"v1"})

    mesh.control.kill()  # and comes back, knowing nothing, and is told
    mesh.control.start()
    mesh.control.status("web.default")
    mesh.wait_told("UNKNOWN", "UNHEALTHY")

    mesh.describe("v2", "readinessProbe: {tcpSocket: {port: http}, periodSeconds: 0.1}")  # somebody listens
    mesh.wait_told("UNKNOWN", "UNKNOWN")
    mesh.describe("v2", "readinessProbe: {grpc: {port: http}, periodSeconds: 0.1}")  # that is no gRPC
    mesh.wait_told("UNKNOWN", "UNHEALTHY")
    mesh.describe("v2", "locality: r/z")  # nobody asks any more
    mesh.wait_told("UNKNOWN", "UNKNOWN")
    wait_until(lambda: mesh.states() == {"reviews-v1.default": "READY"})


def test_an_application_that_hangs(mesh):
    wait_until(lambda: mesh.states() == {"reviews-v1.default": "READY", "reviews-v2.default": "READY"})
    mesh.services["v1"].hang()
    mesh.wait_told("UNHEALTHY", "UNKNOWN")
    assert mesh.states()["reviews-v1.default"] in ("NOT READY (timeout)", "NOT READY")
    wait_until(lambda: set(mesh.who(20)) == {"v2"})
    mesh.services["v1"].go_on()
    mesh.wait_told("UNKNOWN", "UNKNOWN")


def test_replicas_tell_each_other(tmp_path):
    mesh = Replicas(tmp_path, "ours")
    try:
        wait_until(lambda: mesh.states() == {"reviews-v1.default": "READY", "reviews-v2.default": "READY"})
        mesh.wait_told("UNKNOWN", "UNKNOWN")
        mesh.services["v1"].status = 503
        mesh.wait_told("UNHEALTHY", "UNKNOWN")
        wait_until(lambda: set(mesh.who(20)) == {"v2"})
        assert set(mesh.who(20)) == {"v2"}
        mesh.at_web().kill()  # and comes back, and is told by the other one
        mesh.at_web().start()
        mesh.at_web().status("web.default")
        mesh.wait_told("UNHEALTHY", "UNKNOWN")
        mesh.services["v1"].status = 200
        mesh.wait_told("UNKNOWN", "UNKNOWN")
    finally:
        mesh.close()
