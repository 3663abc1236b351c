"""A mesh whose documents are the objects of a cluster: sidecars follow what its API server says, and go on without it."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.e2e.control_plane import ControlPlane, Ports, Service, fetch
from tests.e2e.proxy import Proxy, wait_until
from tests.e2e.test_control_faults import Asking
from tests.kube.client import Client, crd, kubeconfig
from tests.kube.memory import MemoryApiServer

pytestmark = pytest.mark.slow
ISTIO = "networking.istio.io"
TO_V2 = [{"route": [{"destination": {"host": "reviews", "subset": "v2"}}]}]
TO_V1 = [{"route": [{"destination": {"host": "reviews", "subset": "v1"}}]}]


def istio(kind: str, spec: dict) -> dict:
    return {"apiVersion": f"{ISTIO}/v1", "kind": kind, "metadata": {"name": "reviews", "namespace": "default"}, "spec": spec}


RULES = istio("VirtualService", {"hosts": ["reviews"], "http": TO_V1})
SUBSETS = istio("DestinationRule", {"host": "reviews", "subsets": [{"name": one, "labels": {"version": one}} for one in ("v1", "v2")]})
REVIEWS = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "reviews", "namespace": "default"},
    "spec": {"clusterIP": "10.0.0.7", "selector": {"app": "reviews"}, "ports": [{"name": "http", "port": 9080, "targetPort": "http"}]},
}


class Mesh:
    """A cluster, a control plane over it, and the sidecar of `web`, which calls `reviews`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.server = MemoryApiServer()
        self.server.install([crd(ISTIO, "destinationrules", "DestinationRule")])
        self.client = Client(self.server)
        self.ports = Ports()
        self.services = {version: Service(version) for version in ("v1", "v2")}
        self.port = self.ports.take()
        with socket.create_server(("127.0.0.1", 0)) as free:  # the status page shares its port with nobody
            self.status_port = free.getsockname()[1]
        self.client.create(REVIEWS)
        self.client.create(SUBSETS)
        self.run(self.pod("web", "web", {"outbound": [{"host": "reviews", "port": 9080, "listen": self.port}]}))
        for version in self.services:
            self.run(self.pod(f"reviews-{version}", version))
            self.client.create(self.slice(version))
        self.token = work / "token"
        self.token.write_text("first")
        self.server.tokens["first"] = "us"
        where = kubeconfig(work, self.server, {"tokenFile": str(self.token)})
        flags = ["--kubernetes", "--kubeconfig", str(where), "--status-listen", f"127.0.0.1:{self.status_port}", "--write-status", "default"]
        self.control = ControlPlane(None, work, flags=flags)
        self.control.start()
        folder = work / "web"
        folder.mkdir()
        self.proxy = Proxy(folder, self.control.bootstrap("web"), "--concurrency", "1", "-l", "error")

    def run(self, pod: dict) -> None:
        """As the kubelet does."""
        self.client.create(pod)
        self.client.patch(pod, {"status": {"phase": "Running", "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}}, "status")

    @staticmethod
    def pod(name: str, version: str, sidecar: dict | None = None) -> dict:
        annotations = {"meshproxy/sidecar": json.dumps(sidecar)} if sidecar is not None else {}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": name.partition("-")[0], "version": version}, "annotations": annotations},
            "spec": {"containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 80}]}]},
        }

    def slice(self, version: str, *, ready: bool = True) -> dict:
        """A slice of its own for each version, since on one machine they differ in their ports."""
        endpoint = {"addresses": ["127.0.0.1"], "conditions": {"ready": ready}, "targetRef": {"kind": "Pod", "name": f"reviews-{version}"}}
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"reviews-{version}", "namespace": "default", "labels": {"kubernetes.io/service-name": "reviews"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": self.services[version].port, "protocol": "TCP"}],
            "endpoints": [endpoint],
        }

    def who(self, count: int = 20) -> Counter:
        """Which versions answer so many requests; too many for one of two to be left out by chance."""
        return Counter(fetch(self.port)[1].get("name") for _ in range(count))

    def status(self) -> dict:
        return httpx.get(f"http://127.0.0.1:{self.status_port}/status").json()

    def states(self) -> set[str]:
        return {one["state"] for one in self.status()["kubernetes"]} - {"absent"}

    def close(self) -> None:
        self.proxy.__exit__()
        self.control.kill()
        self.client.close()
        self.server.close()
        for service in self.services.values():
            service.close()
        self.ports.close()


@pytest.fixture
def mesh(tmp_path):
    made = Mesh(tmp_path)
    yield made
    made.close()


def test_traffic_follows_the_cluster(mesh):
    """One after the other what happens to a cluster in a year, without a request that fails."""
    wait_until(lambda: set(mesh.who()) == {"v1", "v2"})
    with Asking.around(lambda: fetch(mesh.port)[0]):
        mesh.client.delete(mesh.slice("v2"))
        wait_until(lambda: set(mesh.who()) == {"v1"})
        mesh.client.create(mesh.slice("v2"))
        wait_until(lambda: set(mesh.who()) == {"v1", "v2"})

        # A kind that is installed later, an object of it, and a wrong one.
        mesh.server.install([crd(ISTIO, "virtualservices", "VirtualService")])
        mesh.client.create(RULES)
        wait_until(lambda: set(mesh.who()) == {"v1"})
        mesh.client.replace({**RULES, "spec": {"hosts": ["reviews"], "http": TO_V2}})
        wait_until(lambda: set(mesh.who()) == {"v2"})
        mesh.client.replace({**RULES, "spec": {"hosts": ["reviews"], "htpt": TO_V1}})
        complaints = wait_until(lambda: mesh.status()["complaints"])
        assert "VirtualService.networking.istio.io default/reviews: spec.htpt: no such field" in " ".join(complaints)
        assert set(mesh.who()) == {"v2"}
        events = wait_until(lambda: mesh.client.list("v1", "events"))
        assert {(one["reason"], one["involvedObject"]["kind"], one["involvedObject"]["name"]) for one in events} == {("Refused", "VirtualService", "reviews")}
        mesh.client.replace({**RULES, "spec": {"hosts": ["reviews"], "http": TO_V1}})
        wait_until(lambda: set(mesh.who()) == {"v1"})
        assert mesh.status()["complaints"] == []

        # The API server is away, and has forgotten what was when it is back.
        mesh.server.stop()
        wait_until(lambda: mesh.states() == {"away"})
        assert set(mesh.who()) == {"v1"}
        mesh.server.start()
        mesh.client.replace({**RULES, "spec": {"hosts": ["reviews"], "http": TO_V2}})
        mesh.server.compact()
        wait_until(lambda: set(mesh.who()) == {"v2"})
        wait_until(lambda: mesh.states() == {"watching"})

        # Our token is another one.
        mesh.token.write_text("second")
        mesh.server.tokens["second"] = "us"
        del mesh.server.tokens["first"]
        mesh.server.drop_watches()
        mesh.client.replace({**RULES, "spec": {"hosts": ["reviews"], "http": TO_V1}})
        wait_until(lambda: set(mesh.who()) == {"v1"})
        wait_until(lambda: mesh.states() == {"watching"})
    assert mesh.control.status("web.default")["RDS"] == "SYNCED"


def test_nothing_is_served_before_the_cluster_is_read(mesh):
    """A control plane that knows nothing yet would take everything away from proxies."""
    mesh.control.kill()
    mesh.server.stop()
    starting = threading.Thread(target=mesh.control.start)
    starting.start()
    try:

        def ready() -> int:
            try:
                return httpx.get(f"http://127.0.0.1:{mesh.status_port}/readyz").status_code
            except httpx.HTTPError:
                return 0

        wait_until(lambda: ready() == 503 and mesh.states() >= {"away"})
        assert set(mesh.who()) == {"v1", "v2"}
    finally:
        mesh.server.start()
        starting.join()
    wait_until(lambda: ready() == 200)
    mesh.client.delete(mesh.slice("v2"))
    wait_until(lambda: set(mesh.who()) == {"v1"})
