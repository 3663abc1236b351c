"""Bytes of an idle downstream connection: the growth of the proxy's anonymous memory by a thousand of them."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from benchmarks import measure
from benchmarks.configs import Spec
from benchmarks.proxies import HOST, OURS, Proxy

CONNECTIONS = 1000
CEILINGS = {"minimal": 5_000, "mesh": 5_000}  # bytes per connection
REQUEST = f"GET /api/orders HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


def open_and_use(port: int) -> socket.socket:
    """A connection that has had one answer and waits for the next request."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=90)
    sock.sendall(REQUEST)
    answer = b""
    while not answer.endswith(b"abcdef"):  # the end of the service's body
        received = sock.recv(65536)
        assert received
        answer += received
    assert answer.startswith(b"HTTP/1.1 200")
    return sock


@pytest.mark.slow
@pytest.mark.parametrize("base", CEILINGS)
def test_bytes_per_idle_connection(base, backend, folder):
    with Proxy(OURS, Spec(base), backend.port, folder / base) as proxy, ExitStack() as stack:
        for _ in range(100):  # what the first connections make once is not theirs
            open_and_use(proxy.port).close()
        before = measure.memory(proxy.pids()).pss_anon
        for _ in range(CONNECTIONS):
            stack.enter_context(open_and_use(proxy.port))
        each = (measure.memory(proxy.pids()).pss_anon - before) * 2**20 / CONNECTIONS
    print(f"{base}: {each:,.0f} bytes per idle connection; ceiling {CEILINGS[base]:,}")
    assert each <= CEILINGS[base]
