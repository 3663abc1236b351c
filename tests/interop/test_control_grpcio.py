"""gRPC's own xDS client under our control plane: it resolves, balances, and follows weights, routes and endpoints."""

from __future__ import annotations

import json
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from tests.e2e.control_plane import ControlPlane, write
from tests.e2e.proxy import wait_until
from tests.interop.grpc_mesh import TARGET, Client, end, service, write_rules

pytestmark = pytest.mark.slow


def server(name: str) -> tuple[grpc.Server, int]:
    """A gRPC server that answers with its name."""
    made = grpc.server(futures.ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: name.encode())
    made.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t.Who", {"Are": handler})])
    port = made.add_insecure_port("127.0.0.1:0")
    made.start()
    return made, port


class Mesh:
    """Two servers behind one service, a control plane, and a client process."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "mesh"
        self.folder.mkdir()
        self.servers = {}
        write(self.folder, "who.yaml", service())
        for name in ("a", "b"):
            self.servers[name], port = server(name)
            write(
                self.folder,
                f"{name}.yaml",
                f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: who-{name}, labels: {{app: who, version: {name}}}}},"
                f" spec: {{ports: {{grpc: {port}}}}}}}",
            )
        self.control = ControlPlane(self.folder, work)
        self.control.start()
        bootstrap = work / "bootstrap.json"
        bootstrap.write_text(json.dumps(self.control.ask("bootstrap", "client", "--for", "grpc")))
        self.client = Client(work / "client-stderr", str(bootstrap))
        self.call = self.client.call

    def rules(self, http: str) -> None:
        write_rules(self.folder, http)

    def close(self) -> None:
        end(self.client.process)
        self.control.kill()
        for one in self.servers.values():
            one.stop(None).wait()


@pytest.fixture
def mesh(tmp_path):
    made = Mesh(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("target", [TARGET, "xds:///who.default:50051", "xds:///who.default.svc.cluster.local:50051"])
def test_it_resolves_and_balances(mesh, target):
    assert set(mesh.call(20, target=target)) == {"a", "b"}
    status = mesh.control.status("client.default")
    assert [status[column] for column in ("LDS", "RDS", "CDS", "EDS")] == ["SYNCED"] * 4


def test_it_follows_routes_weights_and_endpoints(mesh):
    mesh.call()
    mesh.rules(
        "[{match: [{headers: {user: {exact: jason}}}], route: [{destination: {host: who, subset: b}}]}, {route: [{destination: {host: who, subset: a}}]}]"
    )
    wait_until(lambda: set(mesh.call(8)) == {"a"})
    assert set(mesh.call(8, "user=jason")) == {"b"}
    mesh.rules("[{route: [{destination: {host: who, subset: a}, weight: 80}, {destination: {host: who, subset: b}, weight: 20}]}]")
    wait_until(lambda: set(mesh.call(50)) == {"a", "b"})
    answers = mesh.call(400)
    assert 40 <= answers.count("b") <= 130  # 80 are expected
    (mesh.folder / "rules.yaml").unlink()
    (mesh.folder / "a.yaml").unlink()
    wait_until(lambda: set(mesh.call(8)) == {"b"})


def test_faults_are_injected_by_the_client_itself(mesh):
    mesh.rules("[{fault: {abort: {grpcStatus: UNAVAILABLE, percentage: {value: 100}}}, retries: {attempts: 0}, route: [{destination: {host: who}}]}]")
    wait_until(lambda: mesh.call(3) == ["UNAVAILABLE"] * 3)
    assert mesh.call(20) == ["UNAVAILABLE"] * 20
    mesh.rules("[{route: [{destination: {host: who}}]}]")
    wait_until(lambda: set(mesh.call(8)) == {"a", "b"})
    assert "UNAVAILABLE" not in mesh.call(20)


def test_it_fails_over_when_a_server_dies(mesh):
    assert set(mesh.call(8)) == {"a", "b"}
    mesh.servers["a"].stop(None).wait()
    wait_until(lambda: "a" not in mesh.call(20))
    assert mesh.call(20) == ["b"] * 20


def test_the_control_plane_may_go(mesh):
    assert set(mesh.call(8)) == {"a", "b"}
    mesh.control.kill()
    assert set(mesh.call(20)) == {"a", "b"}
    mesh.control.start()
    mesh.rules("[{route: [{destination: {host: who, subset: a}}]}]")
    wait_until(lambda: set(mesh.call(8)) == {"a"})
