"""gRPC's own xDS clients and servers under our control plane, with certificates of our authority in files: mutual TLS without a sidecar."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from tests.e2e.control_plane import ControlPlane, Ports, write
from tests.e2e.proxy import PATIENCE, ROOT, Proxy, wait_until
from tests.interop.grpc_mesh import Client, end, run, service, write_rules

pytestmark = pytest.mark.slow

IDENTITY = "spiffe://cluster.local/ns/default/sa/"
STRICT = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: all}, spec: {mtls: {mode: STRICT}}}"


def workload(name: str, account: str, port: int, sidecar: str = "") -> str:
    head = f"apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: {name}, labels: {{app: {name.partition('-')[0]}, version: {name[-1]}}}}}"
    return f"{{{head}, spec: {{serviceAccount: {account}, ports: {{grpc: {port}}}, sidecar: {{identity: true{sidecar}}}}}}}"


class Mesh:
    """A control plane with its authority, and what runs under it.

    `life`: of certificates, which agents renew at half of it. `tls`: gRPC speaks TLS with the control plane, too.
    """

    def __init__(self, work: Path, life: str = "1h", *, tls: bool = False) -> None:
        self.work = work
        self.folder = work / "mesh"
        self.folder.mkdir()
        self.ports = Ports()
        self.stack = contextlib.ExitStack()
        self.stack.callback(self.ports.close)
        write(self.folder, "who.yaml", f"{service('{tls: {mode: ISTIO_MUTUAL}}')}---\n{STRICT}")
        write(self.folder, "client.yaml", workload("client", "client", 1))
        self.socket = work / "ca.sock"
        flags = ["--ca-dir", str(work / "ca"), "--ca-socket", str(self.socket), "--certificate-life", life]
        flags += ["--mtls-listen", "127.0.0.1:0"] if tls else []
        self.control = self.stack.enter_context(ControlPlane(self.folder, work, flags=flags))
        found = re.search(r"mutual TLS on (127.0.0.1:\d+)", self.control.log())
        self.by_tls = found[1] if found is not None else ""
        if self.by_tls:
            flags[-1] = self.by_tls  # the same when it comes again
        self.servers: dict[str, subprocess.Popen] = {}
        self.server_ports: dict[str, int] = {}

    def run(self, *command: str, **env: str) -> subprocess.Popen:
        """A module of ours as a process, until the end; `env` is added to its environment."""
        process = run(self.work / f"{command[0]}-{len(list(self.work.iterdir()))}.log", *command, **env)
        self.stack.callback(end, process)
        return process

    def token(self, account: str) -> str:
        """A file with a join token."""
        path = self.work / f"{account}.token"
        done = subprocess.run(
            [sys.executable, "-m", "control", "token", "create", f"default/{account}", "--ca-dir", str(self.work / "ca")],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            timeout=PATIENCE,
        )
        path.write_text(done.stdout)
        return str(path)

    def certificates(self, name: str, account: str) -> Path:
        """Start an agent for that account; the folder where it has written, and goes on to."""
        folder = self.work / f"{name}-{account}-certificates"
        own = ["--authority", f"unix:{self.socket}", "--join-token-file", self.token(account)]
        agent = self.run("control", "agent", "--socket", str(self.work / f"{name}-{account}.sock"), "--files", str(folder), *own)
        wait_until(lambda: agent.poll() is None and (folder / "root-cert.pem").exists())
        return folder

    def bootstrap(self, name: str, account: str, *flags: str) -> str:
        path = self.work / f"{name}-{account}.json"
        flags = ("--server", self.by_tls, "--tls", *flags) if self.by_tls else flags
        made = self.control.ask("bootstrap", name, "--for", "grpc", "--certificates", str(self.certificates(name, account)), *flags)
        for one in (*made["certificate_providers"].values(), *made["xds_servers"][0]["channel_creds"]):
            if "config" in one:
                one["config"]["refresh_interval"] = "1s"
        path.write_text(json.dumps(made))
        return str(path)

    def serve(self, version: str, account: str = "who") -> None:
        """A server behind `who`; documents say that it is `who`, its certificate that it is `account`."""
        name = f"who-{version}"
        port = self.server_ports[version] = self.ports.take()
        write(self.folder, f"{version}.yaml", workload(name, "who", port))
        self.servers[version] = self.run("tests.interop.grpc_xds_server", version, f"127.0.0.1:{port}", GRPC_XDS_BOOTSTRAP=self.bootstrap(name, account))

    def client(self) -> Client:
        made = Client(self.work / "client.log", self.bootstrap("client", "client"), secure=True)
        self.stack.callback(end, made.process)
        return made

    def rules(self, http: str) -> None:
        write_rules(self.folder, http)


@pytest.fixture
def mesh(tmp_path):
    made = Mesh(tmp_path)
    with made.stack:
        yield made


def test_both_sides_are_known_and_all_else_goes_on_as_without_tls(mesh):
    mesh.serve("a")
    mesh.serve("b")
    client = mesh.client()
    wait_until(lambda: client.who(20) == {"a", "b"})
    assert all(one["caller"] == [f"{IDENTITY}client"] for one in client.call(8))
    with grpc.insecure_channel(f"127.0.0.1:{mesh.server_ports['a']}") as plain:
        with pytest.raises(grpc.RpcError) as caught:
            plain.unary_unary("/t.Who/Are")(b"", timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    mesh.rules(
        "[{match: [{headers: {user: {exact: jason}}}], route: [{destination: {host: who, subset: b}}]}, {route: [{destination: {host: who, subset: a}}]}]"
    )
    wait_until(lambda: client.who() == {"a"})
    assert client.who(metadata="user=jason") == {"b"}

    mesh.rules("[{route: [{destination: {host: who, subset: a}, weight: 80}, {destination: {host: who, subset: b}, weight: 20}]}]")
    wait_until(lambda: client.who(50) == {"a", "b"})
    answers = [one["name"] for one in client.call(400)]
    assert 40 <= answers.count("b") <= 130  # 80 are expected

    (mesh.folder / "rules.yaml").unlink()
    mesh.servers["a"].kill()
    wait_until(lambda: client.who(20) == {"b"})


def test_whoever_has_another_identity_is_not_spoken_to(mesh):
    mesh.serve("a")
    client = mesh.client()
    wait_until(lambda: client.who() == {"a"})
    mesh.serve("b", account="intruder")
    wait_until(lambda: mesh.control.status("who-b.default")["LDS"] == "SYNCED")
    assert client.who(40) == {"a"}
    (mesh.folder / "a.yaml").unlink()
    wait_until(lambda: client.who() == {"UNAVAILABLE"})


def test_policies_say_who_may_call(mesh):
    mesh.serve("a")
    client = mesh.client()
    wait_until(lambda: client.who() == {"a"})
    head = "apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: who}"
    policy = f"{{{head}, spec: {{rules: [{{from: [{{source: {{principals: [cluster.local/ns/default/sa/CALLER]}}}}]}}]}}}}"
    write(mesh.folder, "policy.yaml", policy.replace("CALLER", "other"))
    wait_until(lambda: client.who() == {"PERMISSION_DENIED"})
    assert client.who(40) == {"PERMISSION_DENIED"}
    write(mesh.folder, "policy.yaml", policy.replace("CALLER", "client"))
    wait_until(lambda: client.who() == {"a"})
    assert client.who(40) == {"a"}


def test_certificates_are_renewed_under_calls(tmp_path):
    mesh = Mesh(tmp_path, life="6s")
    with mesh.stack:
        mesh.serve("a")
        client = mesh.client()
        wait_until(lambda: client.who() == {"a"})
        serials, failed = set(), []

        def called() -> bool:
            for one in client.call(5):
                serials.add(one["serial"]) if isinstance(one, dict) else failed.append(one)
            return len(serials) >= 4

        wait_until(called)
        assert failed == []


def test_a_server_behind_a_sidecar(mesh):
    """gRPC's client does not know what is in front of the server."""
    port, listen = mesh.ports.take(), mesh.ports.take()
    write(mesh.folder, "a.yaml", workload("who-a", "who", port, f", inbound: [{{port: {port}, listen: {listen}}}]"))
    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b'{"name": "a"}')
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t.Who", {"Are": handler})])
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    mesh.stack.callback(lambda: server.stop(None).wait())
    (mesh.work / "sidecar").mkdir()
    bootstrap = mesh.control.bootstrap("who-a", "--authority", f"unix:{mesh.socket}", "--join-token-file", mesh.token("who"))
    sidecar = mesh.stack.enter_context(Proxy(mesh.work / "sidecar", bootstrap, "--concurrency", "1", "-l", "error"))
    client = mesh.client()
    wait_until(lambda: client.who() == {"a"})
    assert sidecar.stat(f"listener.127.0.0.1_{listen}.ssl.handshake") >= 1


def test_the_control_plane_is_reached_by_tls(tmp_path):
    """Certificates of a few seconds: connections that are made anew show the one of then."""
    mesh = Mesh(tmp_path, life="6s", tls=True)
    with mesh.stack:
        mesh.serve("a")
        made = json.loads(Path(mesh.bootstrap("client", "client")).read_text())
        (credentials,) = made["xds_servers"][0]["channel_creds"]
        assert credentials["type"] == "tls"
        client = mesh.client()
        wait_until(lambda: client.who() == {"a"})
        mesh.rules("[{fault: {abort: {grpcStatus: ABORTED, percentage: {value: 100}}}, retries: {attempts: 0}, route: [{destination: {host: who}}]}]")
        wait_until(lambda: client.who() == {"ABORTED"})
        first = Path(credentials["config"]["certificate_file"]).read_bytes()
        wait_until(lambda: Path(credentials["config"]["certificate_file"]).read_bytes() != first)
        mesh.control.kill()
        mesh.control.start()
        mesh.rules("[{route: [{destination: {host: who}}]}]")
        wait_until(lambda: client.who() == {"a"})


def test_the_control_plane_tells_nothing_to_whoever_has_another_certificate(tmp_path):
    mesh = Mesh(tmp_path, tls=True)
    with mesh.stack:
        mesh.serve("a")
        client = mesh.client()
        wait_until(lambda: client.who() == {"a"})
        made = Client(mesh.work / "liar.log", mesh.bootstrap("client", "other"), secure=True)
        mesh.stack.callback(end, made.process)
        assert made.who(1) == {"UNAVAILABLE"}
        assert "may not have the configuration of client.default" in mesh.control.log()
