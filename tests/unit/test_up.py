"""What `meshctl up` makes of documents, and its processes and state."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

import pytest

from control import cli
from control.kinds.store import Store
from control.model.security import Mtls, mtls_mode
from control.model.snapshot import build
from control.up import process as processes
from control.up import reach
from control.up.arrange import Arrangement, environment
from control.up.ports import Ports, Use
from control.up.process import Process
from control.up.state import State, birth, end, is_alive
from tests.polling import PATIENCE

WEB = """
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: web, labels: {app: web}}
spec:
  ports: {http: 0, admin-port: 0}
  sidecar: {outbound: [{host: db, port: 3306}]}
  run: {command: [serve], env: {MINE: "1", http_proxy: ""}}
"""
FIXED = """
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: fixed}
spec: {ports: {http: 8000}, sidecar: {inbound: [{port: 8000, listen: 18000}], httpProxy: 15001, identity: false}, run: {}}
"""
OTHER = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: elsewhere}, spec: {ports: {http: 1}}}"


@pytest.fixture
def arrangement():
    ports = Ports()
    yield Arrangement(ports)
    ports.close()


def objects(*texts: str, store: Store | None = None):
    store = store or Store()
    store.put("a.yaml", "".join(f"{text}\n---\n" for text in texts).encode())
    store.settle()
    assert not store.troubles
    return store.objects


def test_what_is_left_open_is_chosen(arrangement):
    snapshot = build(arrangement(objects(WEB, FIXED, OTHER)))
    web, fixed, elsewhere = (snapshot.workloads["default", name] for name in ("web", "fixed", "elsewhere"))
    chosen = [*web.ports.values(), *web.sidecar.inbound.values(), web.sidecar.http_proxy, web.sidecar.outbound[0].listen]
    assert len({*chosen, 0}) == 7
    assert list(web.sidecar.inbound) == list(web.ports.values())
    assert web.sidecar.identity
    assert (fixed.ports, fixed.sidecar.inbound, fixed.sidecar.http_proxy, fixed.sidecar.identity) == ({"http": 8000}, {8000: 18000}, 15001, False)
    assert elsewhere.sidecar is None
    assert {one.name for one in arrangement.running()} == {"web", "fixed"}


def test_ports_stay_over_edits(arrangement):
    store = Store()
    before = build(arrangement(objects(WEB, store=store))).workloads["default", "web"]
    assert build(arrangement(objects(WEB, OTHER, store=store))).workloads["default", "web"] is before
    after = build(arrangement(objects(WEB.replace("serve", "serve2"), store=store))).workloads["default", "web"]
    assert after is not before
    assert (after.ports, after.sidecar.http_proxy, after.sidecar.inbound) == (before.ports, before.sidecar.http_proxy, before.sidecar.inbound)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("", Mtls.STRICT),
        ("{name: all, namespace: istio-system}, spec: {mtls: {mode: PERMISSIVE}}", Mtls.PERMISSIVE),
        ("{name: here}, spec: {mtls: {mode: DISABLE}}", Mtls.DISABLE),
    ],
)
def test_mutual_tls_is_the_rule(arrangement, text, mode):
    policy = f"{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {text}}}" if text else ""
    security = build(arrangement(objects(WEB, policy))).config.security
    assert mtls_mode(security.peer_authentication, "default", {"app": "web"}, 1) is mode


def test_what_a_process_is_told(arrangement):
    web = build(arrangement(objects(WEB))).workloads["default", "web"]
    told = environment(web)
    assert told["PORT"] == told["PORT_HTTP"] == str(web.ports["http"])
    assert told["PORT_ADMIN_PORT"] == str(web.ports["admin-port"])
    assert told["HTTP_PROXY"] == f"http://127.0.0.1:{web.sidecar.http_proxy}"
    assert told["DB_ADDRESS"] == f"127.0.0.1:{web.sidecar.outbound[0].listen}"
    assert (told["MINE"], told["http_proxy"]) == ("1", "")


def test_ports_are_held_until_they_are_let_go():
    ports = Ports()
    use = Use("default", "web", "port http")
    port = ports.take(use, "127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError):
        other.bind(("127.0.0.1", port))
    ports.let_go(use)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
    assert ports.take(use, "127.0.0.1") == port
    ports.forget("default", "web")
    ports.close()


async def test_a_process_that_ends_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "FIRST_PAUSE_S", 0.001)
    log = tmp_path / "log"
    third, pids, ended = asyncio.Event(), [], []

    def started(pid: int) -> None:
        pids.append(pid)
        if len(pids) == 3:
            third.set()

    process = Process("a", [sys.executable, "-c", "print('here'); raise SystemExit(3)"], {}, str(tmp_path), str(log), started=started, ended=ended.append)
    task = asyncio.create_task(process.run())
    await asyncio.wait_for(third.wait(), PATIENCE)
    task.cancel()
    await asyncio.wait([task])
    assert ended == pids
    assert process.restarts == 2
    assert log.read_text().startswith("here\nhere\n")
    assert not any(map(birth, pids))


async def test_what_a_process_has_started_ends_with_it(tmp_path):
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        script = f"""if True:
            import socket, subprocess
            child = subprocess.Popen(["sleep", "1000"])
            with socket.create_connection({listening.getsockname()!r}) as told:
                told.sendall(str(child.pid).encode())
            child.wait()"""
        task = asyncio.create_task(Process("a", [sys.executable, "-c", script], dict(os.environ), str(tmp_path), str(tmp_path / "log")).run())
        async with asyncio.timeout(PATIENCE):
            told, _ = await loop.sock_accept(listening)
            reader, writer = await asyncio.open_connection(sock=told)
            child = int(await reader.read())
    writer.close()
    ended = asyncio.Event()
    process = os.pidfd_open(child)
    loop.add_reader(process, ended.set)
    assert birth(child)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.wait_for(ended.wait(), PATIENCE)
    loop.remove_reader(process)
    os.close(process)


async def test_a_program_that_is_not_there(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(processes, "FIRST_PAUSE_S", 1000.0)
    task = asyncio.create_task(Process("a", ["/no/such/program"], {}, str(tmp_path), str(tmp_path / "log")).run())
    async with asyncio.timeout(PATIENCE):
        while not caplog.messages:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert caplog.messages == ["a: /no/such/program: No such file or directory; trying again in 1000.0 s"]


def test_only_what_was_started_is_ended(tmp_path):
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as ours, subprocess.Popen(["sleep", "1000"], start_new_session=True) as another:
        said = {"pid": ours.pid, "born": birth(ours.pid)}
        assert is_alive(said)
        end([said, {"pid": another.pid, "born": birth(another.pid) - 1}], PATIENCE)  # the number is the same, the process is not
        assert ours.wait(PATIENCE) == -signal.SIGTERM
        assert another.poll() is None
        another.kill()


def test_a_mesh_is_one_process(tmp_path):
    one, other = State(str(tmp_path / "state")), State(str(tmp_path / "state"))
    assert one.lock()
    assert not other.lock()
    one.write({"pid": 1})
    assert other.read() == {"pid": 1}
    one.unlock()
    assert other.lock()
    other.clear()
    assert other.read() == {}
    other.unlock()


def test_up_of_what_is_up_leaves_its_log_alone(tmp_path, capsys):
    (tmp_path / "mesh").mkdir()
    state = State(tmp_path / "state")
    state.logs.mkdir(parents=True)
    (state.logs / "meshctl.log").write_text("what happened")
    state.write({"pid": os.getpid(), "born": birth(os.getpid()), "ready": True})
    assert cli.main(["up", str(tmp_path / "mesh"), "--detach", "--state", str(state.path)]) == 2
    assert capsys.readouterr().err == f"meshctl: {tmp_path}/mesh is up already, by process {os.getpid()}\n"
    assert (state.logs / "meshctl.log").read_text() == "what happened"


def test_a_mesh_in_the_background_that_cannot_be(tmp_path, capsys):
    assert cli.main(["up", str(tmp_path / "none"), "--detach"]) == 2
    assert capsys.readouterr().err == f"meshctl: {tmp_path}/none: no such folder\n"
    (tmp_path / "mesh").mkdir()
    (tmp_path / "file").write_text("")
    assert cli.main(["up", str(tmp_path / "mesh"), "--detach", "--state", str(tmp_path / "file" / "state")]) == 2
    assert capsys.readouterr().err == f"meshctl: {tmp_path}/file/state/logs: Not a directory\n"
    assert cli.main(["up", str(tmp_path / "mesh"), "--state", str(tmp_path / "file" / "state")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"meshctl: {tmp_path}/file/state: Not a directory"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "mesh"]


def test_mistakes_in_the_call(tmp_path, capsys):
    assert cli.main(["down", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"meshctl: {tmp_path} is not up\n"
    assert cli.main(["up", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"meshctl: {tmp_path / 'none'}: no such folder\n"
    for address in ("127.0.0.1:99999", "15010"):
        assert cli.main(["up", str(tmp_path), "--listen", address]) == 2
        assert capsys.readouterr().err == f"meshctl: --listen {address}: host:port is needed\n"
    assert cli.main(["up", str(tmp_path), "--proxy", "/no/envoy"]) == 2
    assert capsys.readouterr().err == "meshctl: /no/envoy: no such program\n"


def test_a_workload_without_ports_is_not_run(arrangement, caplog):
    made = arrangement(objects(WEB.replace("spec:", "spec:\n  address: 192.0.2.1"), FIXED))  # of nobody, so not ours
    assert [one.name for one in arrangement.running()] == ["fixed"]
    assert build(made).workloads["default", "web"].ports == {"http": 0, "admin-port": 0}
    assert "Workload default/web cannot be run" in caplog.text


async def test_words_that_no_process_can_be_given(tmp_path, caplog):
    await Process("a", ["true"], {"A=B": ""}, str(tmp_path), str(tmp_path / "log")).run()
    assert caplog.messages == ["a: illegal environment variable name"]


GATEWAY = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g}
spec:
  selector: {app: web}
  servers:
  - {port: {number: 8080, name: http, protocol: HTTP}, hosts: ["*"], tls: {httpsRedirect: %s}}
  - {port: {number: 9090, name: plain, protocol: TCP}, hosts: ["*"], bind: "::1"}
"""
RULES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: v}
spec: {hosts: [%s], gateways: [g], http: [{match: [{uri: {regex: "/a.*"}}, {uri: {prefix: /shop}}], directResponse: {status: 204}}]}
"""


@pytest.mark.parametrize(
    ("redirect", "host", "texts", "expected"),
    [
        ("false", "'*'", (GATEWAY, RULES), "curl -i http://127.0.0.1:8080/shop"),
        ("false", "shop.test", (GATEWAY, RULES), "curl -i http://127.0.0.1:8080/shop -H 'host: shop.test'"),
        ("true", "'*'", (GATEWAY, RULES), ""),
        ("false", "'*'", (GATEWAY,), ""),
    ],
)
def test_where_a_gateway_is_reached(redirect, host, texts, expected):
    there = build(objects(WEB, *[text % (redirect if text is GATEWAY else host) for text in texts]))
    web = there.workloads["default", "web"]
    assert reach.places(there.config, web) == ["0.0.0.0:8080", "[::1]:9090"]
    assert reach.first(there.config, web) == expected
