"""`meshctl up` and `down`: a whole mesh on this machine, from the example's folder."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import write
from tests.e2e.proxy import PATIENCE, ROOT, alive, wait_until

pytestmark = pytest.mark.slow
IDENTITY = "spiffe://cluster.local/ns/default/sa/"


class Up:
    """`meshctl up` over a copy of a folder."""

    def __init__(self, work: Path, source: Path, *flags: str) -> None:
        self.folder = work / "mesh"
        self.state = work / "state"
        shutil.copytree(source, self.folder)
        self._errors = work / "stderr"
        command = [sys.executable, "-m", "control", "up", str(self.folder), "--state", str(self.state), *flags]
        with self._errors.open("wb") as stderr, (work / "stdout").open("wb") as stdout:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=ROOT, start_new_session=True)
        self.pids: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What a test that failed has left."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE)

    @property
    def log(self) -> str:
        return self._errors.read_text()

    def said(self) -> dict:
        """What the state folder's file says; remembers who was in it."""
        assert self.process.poll() is None, self.log
        path = self.state / "up.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        self.pids |= {one["pid"] for one in found.get("processes", ())}
        return found

    def wait_ready(self) -> dict:
        return wait_until(lambda: (said := self.said()).get("ready") and said)

    def pid(self, name: str) -> int:
        return next((one["pid"] for one in self.said()["processes"] if one["name"] == name), 0)

    def workload(self, name: str) -> dict:
        return next(one for one in self.said()["workloads"] if one["name"] == name)

    def get(self, at: str, **headers: str) -> tuple[int, dict]:
        """Status and body of a request to an address."""
        host, _, port = at.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        try:
            connection.request("GET", "/", headers={name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            body = response.read()
            return response.status, json.loads(body) if body.startswith(b"{") else {}
        finally:
            connection.close()

    def chain(self, **headers: str) -> list[dict]:
        """Each service that a request to the front went through; empty when it did not get to the end."""
        status, said = self.get(self.workload("front")["inbound"]["http"], **headers)
        return unfolded(said) if status == 200 else []

    def versions(self, **headers: str) -> set[str]:
        """Which versions of the last service answer to some requests."""
        return {chain[-1]["version"] if (chain := self.chain(**headers)) else "none" for _ in range(10)}

    def down(self) -> str:
        """`meshctl down`; afterwards nothing that was started may be left."""
        self.said()
        run = meshctl("down", self.folder, "--state", str(self.state))
        assert run.returncode == 0, run.stderr
        return run.stdout


def unfolded(said: dict) -> list[dict]:
    """An answer of the front, service by service."""
    return [said, *(unfolded(said["asked"]) if isinstance(said.get("asked"), dict) else [])]


def refuses(up: Up, at: str) -> bool:
    """Whether plain requests are not taken."""
    try:
        up.get(at)
    except (OSError, http.client.HTTPException):
        return True
    return False


@pytest.mark.parametrize("proxy", ["meshproxy", "envoy"])
def test_a_mesh_from_a_folder(tmp_path, proxy):
    flags = []
    if proxy == "envoy":
        binary = envoy_binary()
        if binary is None:
            pytest.skip("no envoy binary")
        flags = ["--proxy", str(binary)]
    with Up(tmp_path, ROOT / "examples/mesh", *flags) as up:
        said = up.wait_ready()
        assert len(said["processes"]) == 8
        assert [one["mtls"]["http"] for one in said["workloads"]] == ["PERMISSIVE", "STRICT", "STRICT", "STRICT"]
        identities(up)
        if proxy == "meshproxy":
            counts(up)
        routes(up)
        mistakes(up)
        denials(up)
        restarts(up)
        comings_and_goings(up)
        assert up.down().endswith("is down\n")
        assert up.process.wait(PATIENCE) == 0
        assert not [pid for pid in up.pids if pid and alive(pid)]
        assert not (up.state / "up.json").exists()


def identities(up: Up) -> None:
    """Every hop is mutual TLS, between the identities of the documents, and nobody gets in without."""
    front, orders, prices = wait_until(up.chain)
    assert [front["service"], orders["service"], prices["service"]] == ["front", "orders", "prices"]
    assert front["called_by"] == ""
    assert f"URI={IDENTITY}front" in orders["called_by"]
    assert f"URI={IDENTITY}orders" in prices["called_by"]
    for name in ("orders", "prices-v1"):
        assert refuses(up, up.workload(name)["inbound"]["http"])
        stats = stat(up.workload(name)["admin"], r"^listener\..*ssl\.handshake$")
        assert sum(stats) >= 1
    told = meshctl("proxy-config", "secrets", "orders", "--folder", str(up.state))
    rows = {row[0]: row for row in map(str.split, told.stdout.splitlines()[1:])}
    assert (rows["default"][1:3], rows["default"][-1]) == (["certificate", "yes"], f"{IDENTITY}orders"), told.stderr
    assert (rows["ROOTCA"][1:3], rows["ROOTCA"][-1]) == (["authority", "yes"], "spiffe://cluster.local")
    host, _, port = up.workload("front")["proxy"].removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    connection.request("GET", "http://prices/")  # as the front, which no policy lets in
    assert connection.getresponse().status == 403
    connection.close()


def counts(up: Up) -> None:
    """Both sides of a hop count its requests, and agree on who speaks to whom."""
    wait_until(lambda: counted(up, "front", "source") == counted(up, "orders", "destination") != 0)
    found = samples(up, "orders")
    inbound = next(labels for labels in found if labels["reporter"] == "destination" and labels["response_code"] == "200")
    outbound = next(labels for labels in found if labels["reporter"] == "source" and labels["response_code"] == "200")
    principals = [f"{IDENTITY}{name}" for name in ("front", "orders", "prices")]
    assert [inbound["source_principal"], inbound["destination_principal"], outbound["destination_principal"]] == principals
    assert inbound["connection_security_policy"] == "mutual_tls"
    assert [inbound[f"source_{name}"] for name in ("workload", "app", "canonical_service", "cluster")] == ["front", "front", "front", "Kubernetes"]
    assert [inbound[f"destination_{name}"] for name in ("workload", "service", "service_name")] == ["orders", "orders.default.svc.cluster.local", "orders"]
    assert [outbound[f"destination_{name}"] for name in ("workload", "version", "service")] == ["prices-v1", "v1", "prices.default.svc.cluster.local"]


def counted(up: Up, name: str, reporter: str) -> float:
    """Requests to orders as a sidecar sees them."""
    host = "orders.default.svc.cluster.local"
    return sum(float(labels["="]) for labels in samples(up, name) if labels["reporter"] == reporter and labels["destination_service"] == host)


def samples(up: Up, name: str) -> list[dict[str, str]]:
    """The labels of the requests that a sidecar has counted; `=` is how many."""
    host, _, port = up.workload(name)["admin"].rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    connection.request("GET", "/stats/prometheus?filter=istio_requests_total")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return [{**dict(re.findall(r'(\w+)="([^"]*)"', line)), "=": line.rpartition(" ")[2]} for line in lines if line.startswith("istio_requests_total{")]


def stat(admin: str, pattern: str) -> list[int]:
    host, _, port = admin.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    connection.request("GET", f"/stats?format=json&filter={pattern}")
    found = json.loads(connection.getresponse().read())["stats"]
    connection.close()
    return [one["value"] for one in found if "value" in one]


def routes(up: Up) -> None:
    """What is edited is what is done, soon after."""
    assert up.versions() == {"v1"}
    assert up.versions(x_user="ann") == {"v2"}
    text = (up.folder / "prices.yaml").read_text()
    write(up.folder, "prices.yaml", text.replace("weight: 100", "weight: 1000").replace("weight: 0", "weight: 100").replace("weight: 1000", "weight: 0"))
    wait_until(lambda: up.chain()[-1]["version"] == "v2")
    assert up.versions() == {"v2"}


def mistakes(up: Up) -> None:
    """A document that is wrong is told, and harms nothing."""
    text = (up.folder / "prices.yaml").read_text()
    write(up.folder, "prices.yaml", text.replace("retries:", "retrys:"))
    wait_until(lambda: "prices.yaml: document 1 (VirtualService default/prices): spec.http[1].retrys: no such field" in up.log)
    assert up.versions() == {"v2"}
    what = "spec.http[1].retrys: no such field; did you mean 'retries'? [its last good state is kept]"
    complaint = f"prices.yaml: document 1 (VirtualService default/prices): {what}"
    wait_until(lambda: up.said()["complaints"] == [complaint])
    told = meshctl("proxy-status", "--folder", str(up.state))
    assert told.stdout.splitlines()[-2:] == ["documents that are wrong:", complaint]
    write(up.folder, "prices.yaml", text)
    wait_until(lambda: "all documents are right again" in up.log)


def denials(up: Up) -> None:
    """A policy holds soon after for who keeps a connection, too: sidecars keep those between them."""
    policy = {"selector": {"matchLabels": {"app": "orders"}}, "action": "DENY", "rules": [{}]}
    document = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "denied"}, "spec": policy}
    admin, updates = up.workload("orders")["admin"], r"^listener_manager\.listener_modified$"
    before = stat(admin, updates)
    write(up.folder, "denied.json", json.dumps(document))
    wait_until(lambda: stat(admin, updates) > before)
    for _ in range(10):  # each connection that there is may have one more answer, which ends it
        up.chain()
    assert not up.chain()
    (up.folder / "denied.json").unlink()
    wait_until(lambda: len(up.chain()) == 3)


def restarts(up: Up) -> None:
    """Who dies comes again: a process, and a sidecar with its identity."""
    for name in ("orders.default", "orders.default sidecar"):
        old = up.pid(name)
        os.kill(old, signal.SIGKILL)
        wait_until(lambda name=name, old=old: up.pid(name) not in (0, old))
        chain = wait_until(up.chain)
        assert f"URI={IDENTITY}front" in chain[1]["called_by"]


def comings_and_goings(up: Up) -> None:
    """A Workload that is written down runs; one that is no more, does not."""
    gone = up.pid("prices-v1.default"), up.pid("prices-v1.default sidecar")
    write(
        up.folder,
        "workloads.yaml",
        (up.folder / "workloads.yaml").read_text().replace("name: prices-v1", "name: prices-v3").replace("VERSION: v1", "VERSION: v3"),
    )
    wait_until(lambda: not any(map(alive, gone)))
    text = (up.folder / "prices.yaml").read_text()
    write(up.folder, "prices.yaml", text.replace("weight: 100", "weight: 50").replace("weight: 0", "weight: 50"))
    wait_until(lambda: "v3" in up.versions())


def test_it_ends_by_itself_when_told_so(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.yaml").write_text("{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {run: {command: [sleep, '1000']}}}")
    with Up(tmp_path, tmp_path / "source") as up:
        up.wait_ready()
        assert all(alive(up.pid(name)) for name in ("a.default", "a.default sidecar"))
        again = meshctl("up", up.folder, "--state", str(up.state))
        assert again.returncode == 2
        assert f"is up already, by process {up.process.pid}" in again.stderr
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(PATIENCE) == 0
        assert not [pid for pid in up.pids if pid and alive(pid)]


def test_it_can_be_ended_while_it_begins(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.yaml").write_text("{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {run: {command: [sleep, '1000']}}}")
    with Up(tmp_path, tmp_path / "source") as up:
        wait_until(lambda: up.said().get("pid"))
        assert up.down().endswith("is down\n")
        assert up.process.wait(PATIENCE) in (0, -signal.SIGTERM)  # the latter before there is anything to be ended
        assert not [pid for pid in up.pids if pid and alive(pid)]
        assert not (up.state / "up.json").exists()


def test_what_was_left_of_one_that_was_killed(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.yaml").write_text("{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {run: {command: [sleep, '1000']}}}")
    with Up(tmp_path, tmp_path / "source") as up:
        sockets = Path(up.wait_ready()["sockets"])
        assert sockets.is_dir()
        up.process.kill()
        up.process.wait()
        left = [pid for pid in up.pids if alive(pid)]
        assert left
        run = meshctl("down", up.folder, "--state", str(up.state))
        assert run.returncode == 0
        assert not [pid for pid in left if alive(pid)]
        assert not sockets.exists()


SLOW_SERVICE = """
import http.server, os, sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"name": "%s"}' % sys.argv[1].encode())


if len(sys.argv) > 2:
    open(sys.argv[2]).read()  # until somebody has written into it
http.server.ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"""
SLOW_MESH = """
{apiVersion: v1, kind: Service, metadata: {name: s}, spec: {selector: {app: s}, ports: [{name: http, port: 80, targetPort: http}]}}
---
{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: caller}, spec: {run: {}}}
---
{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: early, labels: {app: s}}, spec: {ports: {http: 0}, run: {command: [python, service.py, early]}}}
---
{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: late, labels: {app: s}}, spec: {ports: {http: 0}, run: {command: [python, service.py, late, PIPE]}}}
"""


@pytest.mark.parametrize("proxy", ["meshproxy", "envoy"])
def test_who_does_not_listen_gets_nothing(tmp_path, proxy):
    binary = envoy_binary()
    if proxy == "envoy" and binary is None:
        pytest.skip("no envoy binary")
    source, pipe = tmp_path / "source", tmp_path / "pipe"
    source.mkdir()
    os.mkfifo(pipe)
    (source / "service.py").write_text(SLOW_SERVICE)
    (source / "mesh.yaml").write_text(SLOW_MESH.replace("PIPE", str(pipe)))
    with Up(tmp_path, source, *(["--proxy", str(binary)] if proxy == "envoy" else [])) as up:

        def answers() -> set[object]:
            """Of some requests of the caller to the service, by their names or else their statuses."""
            at = up.workload("caller")["proxy"].removeprefix("http://")
            found = [up.get(at, host="s") for _ in range(6)]
            return {said.get("name", status) for status, said in found}

        wait_until(lambda: len(up.said().get("workloads", ())) == 3)
        wait_until(lambda: applications(up) == {"early.default": "READY", "late.default": "NOT READY"})
        wait_until(lambda: answers() == {"early"})
        assert answers() == {"early"}
        with pipe.open("w"):
            pass
        wait_until(lambda: applications(up)["late.default"] == "READY")
        wait_until(lambda: answers() == {"early", "late"})
        up.down()


def applications(up: Up) -> dict[str, str]:
    """Which are ready, by what `proxy-status` says."""
    command = [sys.executable, "-m", "control", "proxy-status", "--folder", str(up.state), "-o", "json"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return {one["name"]: one["APPLICATION"] for one in json.loads(run.stdout) if "APPLICATION" in one}


def test_detached(tmp_path):
    folder = tmp_path / "mesh"
    folder.mkdir()
    (folder / "a.yaml").write_text("{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {run: {command: [sleep, '1000']}}}")
    up = meshctl("up", folder, "--detach")
    try:
        said = json.loads((tmp_path / "mesh.state" / "up.json").read_text())
        assert re.search(r"^a\.default +ready ", up.stdout, re.MULTILINE), up
        assert "a.default is ready (1 of 1)" in up.stdout
        listen = said["control"]
        other = tmp_path / "other"
        other.mkdir()
        taken = meshctl("up", other, "--detach", "--listen", listen)
        assert taken.returncode == 2
        assert f"cannot listen on {listen}: Address already in use" in taken.stdout
        assert "it did not come up" in taken.stderr
        assert f"meshctl proxy-status --folder {folder}\n" in up.stdout
        status = (sys.executable, "-m", "control", "proxy-status", "-o", "json")
        for where, flags in ((folder, ()), (tmp_path, ()), (ROOT, ("--folder", folder)), (ROOT, ("--folder", f"{folder}.state"))):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            run = subprocess.run([*status, *map(str, flags)], cwd=where, env=environment, capture_output=True, text=True, check=True)
            assert [one["name"] for one in json.loads(run.stdout)] == ["a.default"]
        pids = [said["pid"], *(one["pid"] for one in said["processes"])]
        assert said["unready"] == []
        assert len(pids) == 3
        assert all(map(alive, pids))
    finally:
        down = meshctl("down", folder)
    assert down.returncode == 0
    assert not any(map(alive, pids))


def test_who_is_not_ready_is_told(tmp_path):
    """One cannot listen, since somebody else does, and would even answer for it; and the mesh is up all the same, until it is told to end."""
    folder = tmp_path / "mesh"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = f"{{command: [python, -m, http.server, '{port}', --bind, 127.0.0.1]}}"
        (folder / "a.yaml").write_text(f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: a}}, spec: {{ports: {{http: {port}}}, run: {run}}}}}")
        (folder / "b.yaml").write_text(
            "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: b}, spec: {ports: {http: 0}, run: {command: [sleep, '99']}}}"
        )
        up = meshctl("up", folder, "--detach", "--state", str(tmp_path / "kept"))
        try:
            assert up.returncode == 1
            assert up.stderr.splitlines()[-1] == f"meshctl: it is up, but not ready are a.default, b.default: see {tmp_path}/kept/logs"
            assert len(re.findall(r"^[ab]\.default +not ready ", up.stdout, re.MULTILINE)) == 2
            assert f"meshctl down {folder} --state {tmp_path}/kept, or Ctrl-C\n" in up.stdout
        finally:
            assert meshctl("down", folder, "--state", str(tmp_path / "kept")).returncode == 0


def test_an_address_that_is_not_ours(tmp_path):
    run = meshctl("up", tmp_path, "--listen", "192.0.2.1:1", "--state", str(tmp_path / "state"))
    assert run.returncode == 2
    assert "--allow-plaintext" in run.stderr  # it would be open to others
    run = meshctl("up", tmp_path, "--listen", "192.0.2.1:1", "--state", str(tmp_path / "state"), "--allow-plaintext")
    assert run.returncode == 2
    assert "192.0.2.1:1" in run.stderr
    assert meshctl("down", tmp_path, "--state", str(tmp_path / "state")).returncode == 2


def meshctl(command: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """One run of it, to its end."""
    words = [sys.executable, "-m", "control", command, str(folder), *flags]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False)
