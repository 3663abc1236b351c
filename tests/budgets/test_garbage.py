"""Requests leave nothing for the garbage collector, which would stop the worker to find it: the data plane runs in this process, its peers do not."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
from collections.abc import AsyncIterator

import pytest
import uvloop

from benchmarks import load
from benchmarks.backend import Backend
from benchmarks.configs import Place, Spec, envoy
from benchmarks.proxies import make_certificate
from meshproxy import worker
from meshproxy.api import bootstrap as bootstraps
from meshproxy.cli import Options
from meshproxy.net import sockets
from meshproxy.net.listener import Listener

FEW, MANY = 200, 1200
CEILING = 0.05  # objects per request; a few of a whole burst come from elsewhere
ROUNDS = 6  # at most; what a timer of the worker made during one burst, it does not make during all of them


@contextlib.asynccontextmanager
async def data_plane(spec: Spec, backend_port: int, folder) -> AsyncIterator[int]:
    """A listener of a worker, in the running loop: its port."""
    file = folder / "bootstrap.json"
    file.write_text(envoy(spec, Place(folder, 0, 0, backend_port)))
    bootstrap, _ = bootstraps.validate(str(file))
    plan = worker.Plan(Options(), 1, levels=None, log_handler=None, node=bootstrap.node)
    context = worker.make_context(asyncio.get_running_loop(), bootstrap, plan, worker_id=0)
    for cluster in bootstrap.static_resources.clusters:
        context.clusters.add(cluster)
    proto = bootstrap.static_resources.listeners[0]
    (bound,) = sockets.bind(proto, 1)
    listener = Listener(proto, bound, context)
    await listener.start()
    try:
        yield bound[0].getsockname()[1]
    finally:
        listener.close()
        context.clusters.close()
        await asyncio.sleep(0)


async def send(port: int, what: load.Load, requests: int) -> None:
    """So many requests from another process."""
    job = {"port": port, "template": what.template().decode(), "connections": 16, "limit": 1, "digits": "%d", "requests": requests}
    pipe = asyncio.subprocess.PIPE
    sender = await asyncio.create_subprocess_exec(sys.executable, "-m", "benchmarks.sender", stdin=pipe, stdout=pipe)
    output, _ = await sender.communicate(json.dumps(job).encode())
    assert sender.returncode == 0
    assert json.loads(output)["requests"] == requests


async def leftovers(port: int, what: load.Load, requests: int) -> tuple[int, int]:
    """What so many requests leave: objects in cycles, and objects that are still there."""
    gc.collect()
    gc.disable()
    alive = len(gc.get_objects())
    await send(port, what, requests)
    cycles = gc.collect()
    gc.enable()
    return cycles, len(gc.get_objects()) - alive


async def leftovers_of_a_request(port: int, what: load.Load) -> tuple[float, float]:
    """The same of one request: the least of some rounds, as only what every request leaves is in each of them."""
    cycles = kept = float("inf")
    for _ in range(ROUNDS):
        few, many = await leftovers(port, what, FEW), await leftovers(port, what, MANY)
        cycles = min(cycles, (many[0] - few[0]) / (MANY - FEW))
        kept = min(kept, (many[1] - few[1]) / (MANY - FEW))
        if cycles <= CEILING and kept <= CEILING:
            break
    return cycles, kept


# A client that makes a connection for each of its requests.
CALLER = """
import socket, ssl, sys
port, count, tls = map(int, sys.argv[1:])
context = ssl._create_unverified_context()
for _ in range(count):
    sock = socket.create_connection(("127.0.0.1", port))
    if tls:
        sock = context.wrap_socket(sock)
    with sock:
        sock.sendall(b"GET / HTTP/1.1\\r\\nhost: catalogue.mesh.test\\r\\nconnection: close\\r\\n\\r\\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        while sock.recv(65536):
            pass
"""
CONNECTIONS = 40


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
def test_connections_leave_no_cycles(tls, backend, tmp_path):
    """Above all not those with TLS: OpenSSL's part of one is 30 KiB, of which the collector knows nothing."""

    async def call(port: int) -> int:
        gc.collect()
        gc.disable()
        caller = await asyncio.create_subprocess_exec(sys.executable, "-c", CALLER, str(port), str(CONNECTIONS), str(int(tls)))
        assert await caller.wait() == 0
        await asyncio.sleep(0)
        gc.enable()
        return gc.collect()

    async def measure() -> int:
        if tls:
            make_certificate(tmp_path)
        async with data_plane(Spec(tls=tls), backend.port, tmp_path) as port:
            await call(port)
            return await call(port)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure())
    assert found < CONNECTIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "what"),
    [("minimal", load.MINIMAL), ("mesh", load.ELEVEN), ("mesh", load.VARYING), ("mesh", load.TAGGED)],
    ids=["minimal", "mesh", "varying", "tagged"],
)
def test_requests_leave_no_cycles(base, what, backend, tmp_path):
    async def measure() -> tuple[float, float]:
        async with data_plane(Spec(base), backend.port, tmp_path) as port:
            await send(port, what, FEW)
            return await leftovers_of_a_request(port, what)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        cycles, kept = runner.run(measure())
    print(f"per request: {cycles:.3f} unreachable objects, {kept:.3f} objects kept")
    assert cycles <= CEILING
    assert kept <= CEILING


# All kinds of requests over HTTP/2 connections that come and go, some of them reset or abandoned by the client, some tried again when the service says GOAWAY.
MIXED = """
import sys
from benchmarks.soak_client import Clients
clients = Clients(int(sys.argv[1]))
clients.run(1)
clients.finish()
assert clients.tally.answered and not clients.tally.lost, clients.tally
"""


def test_mixed_http2_leaves_no_cycles(folder, tmp_path):
    async def call(port: int) -> int:
        gc.collect()
        gc.disable()
        caller = await asyncio.create_subprocess_exec(sys.executable, "-c", MIXED, str(port))
        assert await caller.wait() == 0
        await asyncio.sleep(0)
        gc.enable()
        return gc.collect()

    async def measure(backend_port: int) -> int:
        async with data_plane(Spec("soak", http2=True), backend_port, tmp_path) as port:
            await call(port)
            return await call(port)

    with Backend(folder / "mixed", "mixed", goaway_after=300) as service, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(service.port))
    assert found < CONNECTIONS  # requests are hundreds
