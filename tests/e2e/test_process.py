"""Life and death of the processes: main and its workers, signals, crashes, draining."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.proxies import make_certificate
from tests.e2e.proxy import ADMIN, HELLO, PATIENCE, Proxy, Upstream, alive, children, cluster, get, listener, refused, wait_until

pytestmark = pytest.mark.slow
STATIC = ADMIN + "static_resources:\n  listeners:"


@pytest.fixture
def upstream():
    service = Upstream()
    yield service
    service.close()


@pytest.fixture
def slow(tmp_path, upstream):
    """A proxy in front of a service that answers when told to, and answers /hello itself."""
    routes = "{match: {path: /hello}, direct_response: {status: 200}}, {match: {prefix: /}, route: {cluster: up}}"
    with Proxy(tmp_path, STATIC + listener(0, routes) + "  clusters:" + cluster("up", upstream.port), "--concurrency", "2", "--drain-time-s", "600") as proxy:
        yield proxy


def test_a_killed_worker_is_replaced_within_a_second_under_load(tmp_path):
    with Proxy(tmp_path, STATIC + listener(0, HELLO), "--concurrency", "2") as proxy:
        port = proxy.port()
        before = proxy.workers()
        assert len(before) == 2
        stop = threading.Event()

        def replaced_in(index: int) -> float:
            """Seconds until the place of a killed worker serves connections again."""
            accepted = f"listener.127.0.0.1_[0-9]+.worker_{index}.downstream_cx_total"
            os.kill(before[index], signal.SIGKILL)
            killed = time.monotonic()
            wait_until(lambda: proxy.stat("server.worker_restarts") == index + 1)
            served = proxy.stat(accepted)
            wait_until(lambda: proxy.stat(accepted) > served)
            return time.monotonic() - killed

        def load() -> tuple[int, int]:
            good = bad = 0
            while not stop.is_set():
                try:
                    good += get(port) == (200, "hello")
                except (OSError, http.client.HTTPException):
                    bad += 1  # the connection was in the worker's hands when it died
            return good, bad

        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(load) for _ in range(4)]
            wait_until(lambda: proxy.stat("http.l1.downstream_rq_total") > 50)
            took = [replaced_in(index) for index in range(2)]
            stop.set()
            outcomes = [run.result(PATIENCE) for run in runs]
        assert min(took) < 1.0, f"the new workers served after {took} s"  # one of them may have met a machine that was busy with something else
        assert len(proxy.workers()) == 2
        assert not set(proxy.workers()) & set(before)
        assert sum(bad for _, bad in outcomes) <= 16  # two each at most for each kill: accepted ones and those being accepted
        assert proxy.stat("server.worker_restarts") == 2
        assert "ended with signal SIGKILL" in proxy.stderr


def test_workers_die_with_main_even_when_they_hang(tmp_path):
    with Proxy(tmp_path, STATIC + listener(0, HELLO), "--concurrency", "2") as proxy:
        workers = proxy.workers()
        os.kill(workers[0], signal.SIGSTOP)  # as stuck as can be; SIGKILL still ends it
        proxy.signal(signal.SIGKILL)
        proxy.wait_exit()
        wait_until(lambda: not any(map(alive, workers)))


def test_sigterm_lets_requests_finish_and_accepts_no_more(slow, upstream):
    port = slow.port()
    idle = socket.create_connection(("127.0.0.1", port))
    idle.sendall(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
    assert idle.recv(1000).startswith(b"HTTP/1.1 200")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(get, port, "/slow")
        assert upstream.arrived.acquire(timeout=PATIENCE)
        slow.signal(signal.SIGTERM)
        wait_until(lambda: refused(port))
        assert slow.admin("GET", "/ready") == (503, "DRAINING\n")
        idle.settimeout(PATIENCE)
        assert idle.recv(100) == b"", "an idle connection is closed at once"
        assert slow.process.poll() is None
        upstream.release.set()
        assert request.result(PATIENCE) == (200, "done")
    assert slow.wait_exit() == 0
    idle.close()


def test_the_drain_time_ends_a_drain(tmp_path, upstream):
    config = STATIC + listener(0, "{match: {prefix: /}, route: {cluster: up}}") + "  clusters:" + cluster("up", upstream.port)
    with Proxy(tmp_path, config, "--concurrency", "1", "--drain-time-s", "1") as proxy, ThreadPoolExecutor(1) as pool:
        request = pool.submit(get, proxy.port(), "/slow")
        assert upstream.arrived.acquire(timeout=PATIENCE)
        started = time.monotonic()
        proxy.signal(signal.SIGTERM)
        assert proxy.wait_exit() == 0
        assert time.monotonic() - started > 0.9, "the request had the drain time to finish"
        with pytest.raises((OSError, http.client.HTTPException)):
            request.result(PATIENCE)


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_impatience_ends_at_once(slow, upstream, signals):
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(get, slow.port(), "/slow")
        assert upstream.arrived.acquire(timeout=PATIENCE)
        for position, number in enumerate(signals):
            slow.signal(number)
            if position + 1 < len(signals):  # two signals at once may be one
                wait_until(lambda: slow.admin("GET", "/ready")[0] == 503)
        assert slow.wait_exit() == 0
        with pytest.raises((OSError, http.client.HTTPException)):
            request.result(PATIENCE)


def test_sigterm_without_connections_ends_at_once(slow):
    workers = slow.workers()
    slow.signal(signal.SIGTERM)
    assert slow.wait_exit() == 0
    assert not any(map(alive, workers))


def test_hang_up_is_ignored_and_workers_ignore_the_terminal(slow):
    slow.signal(signal.SIGHUP)
    for worker in slow.workers():
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    assert get(slow.port(), "/hello")[0] == 200
    assert slow.process.poll() is None
    assert slow.stat("server.worker_restarts") == 0


def test_sigusr1_opens_logs_again(tmp_path):
    log = tmp_path / "app.log"
    with Proxy(tmp_path, STATIC + listener(0, HELLO), "--concurrency", "1", "--log-path", str(log)) as proxy:
        log.rename(tmp_path / "app.log.1")
        proxy.signal(signal.SIGUSR1)
        wait_until(log.exists)
        os.kill(proxy.workers()[0], signal.SIGKILL)
        wait_until(lambda: "SIGKILL" in log.read_text())


def test_a_replacement_knows_what_happened_before_it(tmp_path):
    health = """- name: health
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck
              pass_through_mode: false
              headers: [{name: ":path", string_match: {exact: /health}}]"""
    with Proxy(tmp_path, STATIC + listener(0, HELLO, filters=health), "--concurrency", "1") as proxy:
        port = proxy.port()
        assert get(port, "/health")[0] == 200
        proxy.admin("POST", "/healthcheck/fail")
        wait_until(lambda: get(port, "/health")[0] == 503)
        [worker] = proxy.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: proxy.stat("server.worker_restarts") == 1 and proxy.workers())
        assert get(port, "/health")[0] == 503


def test_counters_of_a_dead_worker_stay_and_its_gauges_go(tmp_path):
    with Proxy(tmp_path, STATIC + listener(0, HELLO), "--concurrency", "1") as proxy:
        held = socket.create_connection(("127.0.0.1", proxy.port()))
        held.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        held.recv(1000)
        assert proxy.stat("http.l1.downstream_cx_active") == 1
        os.kill(proxy.workers()[0], signal.SIGKILL)
        wait_until(lambda: proxy.stat("server.worker_restarts") == 1)
        assert proxy.stat("http.l1.downstream_cx_active") == 0
        assert proxy.stat("http.l1.downstream_rq_total") == 1
        held.close()


def test_a_worker_keeps_nothing_of_mains(tmp_path):
    with Proxy(tmp_path, STATIC + listener(0, HELLO), "--concurrency", "2") as proxy:
        port = proxy.port()
        admin_port = int(proxy.address_file.read_text().rpartition(":")[2])
        watcher = socket.create_connection(("127.0.0.1", admin_port))  # open while the next worker is forked
        watcher.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        watcher.recv(1000)
        os.kill(proxy.workers()[0], signal.SIGKILL)
        wait_until(lambda: proxy.stat("server.worker_restarts") == 1 and len(proxy.workers()) == 2)
        wait_until(lambda: get(port)[0] == 200)
        ours = _local_ports()
        for worker in proxy.workers():
            listening = [ours[inode] for inode in _inodes(worker) if inode in ours]
            assert listening == [port], "a worker has its own listening socket, and neither its sibling's nor admin's"
        watcher.close()


def _inodes(pid):
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return [link[8:-1] for link in links if link.startswith("socket:[")]


def _local_ports():
    """Inode -> local port, of TCP sockets that listen or are connected."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9]: int(row[1].rpartition(":")[2], 16) for row in rows}


def test_drain_listeners_stops_inbound_ones_only(tmp_path):
    config = STATIC + listener(0, HELLO, name="in", extra="traffic_direction: INBOUND") + listener(0, HELLO, name="out", extra="traffic_direction: OUTBOUND")
    with Proxy(tmp_path, config, "--concurrency", "2") as proxy:
        inbound, outbound = proxy.port("in"), proxy.port("out")
        assert proxy.admin("POST", "/drain_listeners?inboundonly") == (200, "OK\n")
        wait_until(lambda: refused(inbound))
        assert get(outbound)[0] == 200
        assert "in::" not in proxy.admin("GET", "/listeners")[1]
        os.kill(proxy.workers()[0], signal.SIGKILL)  # its replacement must not bring the listener back
        wait_until(lambda: proxy.stat("server.worker_restarts") == 1 and len(proxy.workers()) == 2)
        assert refused(inbound)
        wait_until(lambda: get(outbound)[0] == 200)


def test_quitquitquit_answers_and_ends(slow):
    assert slow.admin("POST", "/quitquitquit") == (200, "OK\n")
    assert slow.wait_exit() == 0


def test_unix_sockets_are_removed_at_the_end(tmp_path):
    path = tmp_path / "s.sock"
    config = STATIC + listener(0, HELLO).replace("{socket_address: {address: 127.0.0.1, port_value: 0}}", f"{{pipe: {{path: {path}}}}}")
    with Proxy(tmp_path, config, "--concurrency", "1") as proxy:
        assert path.is_socket()
        proxy.signal(signal.SIGTERM)
        assert proxy.wait_exit() == 0
    assert not path.exists()


def test_init_only_starts_and_ends(tmp_path):
    with Proxy(tmp_path, STATIC + listener(0, HELLO), "--mode", "init_only", "--concurrency", "2", wait=False) as proxy:
        assert proxy.wait_exit() == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a pid namespace")
def test_as_pid_1_it_reaps_orphans_and_obeys_signals(tmp_path):
    import sys

    # unshare's child is PID 1 of its namespace, as in a container.
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", "meshproxy"]
    with Proxy(tmp_path, STATIC + listener(0, HELLO), "--concurrency", "1", command=command) as proxy:
        [main] = children(proxy.process.pid)
        assert "NSpid:" in Path(f"/proc/{main}/status").read_text()
        orphan = "import os\nif os.fork() == 0: os._exit(0)\n"
        subprocess.run(["nsenter", "--target", str(main), "--pid", sys.executable, "-c", orphan], check=True, timeout=90)
        wait_until(lambda: _zombies_of(main) == [])
        assert get(proxy.port())[0] == 200
        os.kill(main, signal.SIGTERM)
        assert proxy.wait_exit() == 0


def _zombies_of(pid):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] == "Z":
                found.append(int(entry.name))
    return found


def test_tls_sessions_are_resumed_by_any_worker(tmp_path):
    """Also by one that replaced another."""
    make_certificate(tmp_path)
    files = f"{{certificate_chain: {{filename: {tmp_path}/cert.pem}}, private_key: {{filename: {tmp_path}/key.pem}}}}"
    tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    socket_config = f"{{name: tls, typed_config: {{'@type': {tls}, common_tls_context: {{tls_certificates: [{files}]}}}}}}"
    config = STATIC + listener(0, HELLO).replace("    - filters:", f"    - transport_socket: {socket_config}\n      filters:")
    context = ssl._create_unverified_context()

    def connect(port: int, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool]:
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), session=session) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            return sock.session, bool(sock.session_reused)

    with Proxy(tmp_path, config, "--concurrency", "2") as proxy:
        port = proxy.port()
        session, _ = connect(port, None)
        for killed in (False, True):
            if killed:
                os.kill(proxy.workers()[0], signal.SIGKILL)
                wait_until(lambda: proxy.stat("server.worker_restarts") == 1)
            for _ in range(20):
                session, reused = connect(port, session)
                assert reused
        assert all(proxy.stat(f"listener.127.0.0.1_0.worker_{index}.downstream_cx_total") for index in (0, 1))
