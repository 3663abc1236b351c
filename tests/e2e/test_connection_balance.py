"""exact_balance: connections go to the worker that has the fewest, and wait for nobody who does not come."""

from __future__ import annotations

import os
import signal
import socket
import ssl

import pytest

from benchmarks.proxies import make_certificate
from tests.e2e.proxy import ADMIN, HELLO, PATIENCE, Proxy, listener, wait_until

pytestmark = pytest.mark.slow
INSPECTOR = "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"
TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
STALLS = 4  # connections that may go astray: where the machine keeps a worker from running for some milliseconds, the other one does not wait for it
FIELDS = {
    "plain": "",
    "tls": "",
    "inspected": f"listener_filters: [{{name: i, typed_config: {{'@type': {INSPECTOR}}}}}]",
}


class Balanced(Proxy):
    """Two workers behind one balanced listener, and the clients' connections to it, which stay open."""

    def __init__(self, folder, kind):
        config = ADMIN + "static_resources:\n  listeners:"
        config += listener(0, HELLO, extra="connection_balance_config: {exact_balance: {}}\n    " + FIELDS[kind])
        self.context = None
        if kind != "plain":
            make_certificate(folder)
            files = f"{{certificate_chain: {{filename: {folder}/cert.pem}}, private_key: {{filename: {folder}/key.pem}}}}"
            chain = f"{{name: tls, typed_config: {{'@type': {TLS}, common_tls_context: {{tls_certificates: [{files}]}}}}}}"
            config = config.replace("    - filters:", f"    - transport_socket: {chain}\n      filters:")
            self.context = ssl._create_unverified_context()
        self.held = []
        super().__init__(folder, config, "--concurrency", "2")
        self.listens_on = self.port()

    def __exit__(self, *details):
        for sock in self.held:
            sock.close()
        super().__exit__(*details)

    def open(self):
        """One more connection, which has been served once."""
        sock = socket.create_connection(("127.0.0.1", self.listens_on), timeout=PATIENCE)
        if self.context is not None:
            sock = self.context.wrap_socket(sock)
        self.held.append(sock)
        sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")

    def spread(self, what="active"):
        """Connections of each worker."""
        return [self.stat(f"listener.127.0.0.1_0.worker_{worker}.downstream_cx_{what}") for worker in (0, 1)]

    def level(self, busy, idle):
        """After one worker got `busy` connections more than the other: those that come now go to the other one."""

        def is_back():
            self.open()
            return self.spread()[idle]

        wait_until(is_back)
        counts = self.spread()
        missing = counts[busy] - counts[idle]
        assert missing > 10
        opened = 0
        while counts[0] != counts[1]:
            self.open()
            opened += 1
            assert opened <= missing + STALLS, counts
            counts = self.spread()


@pytest.mark.parametrize("kind", FIELDS)
def test_connections_are_spread_evenly(tmp_path, kind):
    with Balanced(tmp_path, kind) as proxy:
        even = 0
        for _ in range(20):
            proxy.open()
            first, second = proxy.spread()
            even += abs(first - second) <= 1
        assert even >= 20 - STALLS
        assert proxy.spread("total") == [first, second]
        assert first + second == proxy.stat("listener.127.0.0.1_0.downstream_cx_active") == 20


@pytest.mark.parametrize("kind", FIELDS)
def test_a_stuck_worker_keeps_no_connection_waiting(tmp_path, kind):
    with Balanced(tmp_path, kind) as proxy:
        stuck = proxy.workers()[0]
        os.kill(stuck, signal.SIGSTOP)
        for _ in range(20):
            proxy.open()
        os.kill(stuck, signal.SIGCONT)
        assert proxy.spread() == [0, 20]
        proxy.level(busy=1, idle=0)


def test_a_replacement_catches_up(tmp_path):
    with Balanced(tmp_path, "plain") as proxy:
        for _ in range(40):
            proxy.open()
        killed = proxy.workers()[1]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: proxy.stat("server.worker_restarts") == 1 and len(proxy.workers()) == 2)
        proxy.level(busy=0, idle=1)
