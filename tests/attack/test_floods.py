"""Too much at once: requests, connections, empty lines, segments. Limits hold, what is over them is refused, memory stays, and all is well afterwards."""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

import pytest

from tests.attack.target import Mirror, Target, arena, http
from tests.differential.config import cluster, filter_
from tests.differential.wire import OK, Request, Wait

MB = 1 << 20
GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
BIG = {"match": {"prefix": "/big"}, "direct_response": {"status": 200, "body": {"inline_string": "b" * 65_536}}}
HOSTS = [
    {"name": "all", "domains": ["*"], "routes": [BIG, {"match": {"prefix": "/"}, "route": {"cluster": "a", "timeout": "0s"}}]},
    *[{"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}]} for name in ("two", "queue")],
]
ROUTES = {"max_direct_response_body_size_bytes": 65_536}
LIMIT = 20


def limited(name: str, **fields: Any) -> dict[str, Any]:
    """A listener whose connections a network filter limits."""
    made = http(name, HOSTS, route_config=ROUTES, **fields)
    made["filter_chains"][0]["filters"].insert(0, filter_("connection_limit", stat_prefix=name, max_connections=LIMIT))
    return made


CONFIG = arena(
    http("main", HOSTS, route_config=ROUTES),
    http("flood", HOSTS, route_config=ROUTES),
    http("limited", HOSTS, route_config=ROUTES),
    limited("filtered"),
    http("inspected", HOSTS, route_config=ROUTES, listener_fields={"listener_filters": [filter_("tls_inspector")]}),
    clusters=[
        cluster("a"),
        cluster("two", "a", circuit_breakers={"thresholds": [{"max_connections": 2, "max_pending_requests": 3}]}),
        cluster("queue", "a", circuit_breakers={"thresholds": [{"max_requests": 4}]}),
    ],
    layered_runtime={"layers": [{"name": "static", "static_layer": {"envoy.resource_limits.listener.limited.connection_limit": LIMIT}}]},
)


async def test_pipelined_requests_are_answered_in_order(target: Target):
    """Fifteen hundred requests in one write: one answer each, in order, and what waits is bounded."""
    target.upstream("a", [Mirror()])
    count = 1500
    async with target.within(8 * MB):
        requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: a.test\r\n\r\n" % number for number in range(count))
        answer = await target.send(requests, token=b"GET /%d HTTP/1.1\n" % (count - 1))
    answered = [int(line.split(b" ")[1][1:]) for line in answer.data.split(b"\n") if line.startswith(b"GET /")]
    assert answered == list(range(count))


@pytest.mark.parametrize("path", [b"/big", b"/up"])
async def test_pipelined_requests_of_a_client_that_does_not_read(target: Target, path: bytes):
    """Answers that nobody reads are not made: a small request must not become a large answer in our memory, a thousand times."""
    target.upstream("a", [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 65536\r\n\r\n" + bytes(65_536)])
    requests = b"GET %b HTTP/1.1\r\nHost: a.test\r\n\r\n" % path * 1000
    wire = await target.connect("flood")
    wire.transport.pause_reading()
    async with target.within(16 * MB):
        wire.send(requests)
        assert await target.stalled("http.flood.downstream_cx_tx_bytes_total") < 32 * MB
        wire.transport.resume_reading()
        await wire_has(wire, 1000 * 65_536)
    assert wire.end is None


async def wire_has(wire: Any, count: int) -> None:
    """Wait for so many bytes; the wire waits no longer than a few seconds for the next ones."""
    while (before := len(wire.received)) < count:
        await wire.until(lambda: len(wire.received) > before)
        assert len(wire.received) > before, "the connection ended"


async def test_requests_one_by_one_of_a_client_that_does_not_read(target: Target):
    """The same when each request comes alone."""
    wire = await target.connect("flood")
    wire.transport.pause_reading()
    async with target.within(16 * MB):
        for _ in range(1000):
            wire.send(b"GET /big HTTP/1.1\r\nHost: a.test\r\n\r\n")
            await asyncio.sleep(0)
        assert await target.stalled("http.flood.downstream_cx_tx_bytes_total") < 32 * MB
        wire.transport.resume_reading()
        await wire_has(wire, 1000 * 65_536)


async def test_empty_lines(target: Target):
    """A megabyte of nothing before a request."""
    async with target.within(16 * MB):
        answer = await target.send(b"\r\n" * (MB // 2), LAST)
    assert answer.statuses == [200]


async def test_one_byte_at_a_time(target: Target):
    """Requests in segments of one byte are requests."""
    request = (
        b"POST / HTTP/1.1\r\nHost: a.test\r\nX-Long: " + b"x" * 2000 + b"\r\nTransfer-Encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n0\r\nT: x\r\n\r\n" + LAST
    )
    wire = await target.connect()
    for byte in request:
        wire.send(bytes((byte,)))
        await asyncio.sleep(0)
    assert (await target.read(wire)).statuses == [200, 200]


@pytest.mark.parametrize("on", ["limited", "filtered"])
async def test_connections_over_the_limit_of_a_listener(target: Target, on: str):
    """Connections over the limit are closed at once; those below it work; when they go, others may come."""
    for _ in range(2):
        wires = [await target.connect(on) for _ in range(5 * LIMIT)]
        closed = await asyncio.gather(*(ended(target, wire) for wire in wires))
        assert closed.count(False) == LIMIT
        target.leave()
        await target.wait_gauge(f"listener.{on}.downstream_cx_active", 0)


async def ended(target: Target, wire: Any) -> bool:
    """Whether the proxy ended this connection; if not, it answers a request."""
    wire.send(GET)
    await wire.until(lambda: wire.received.endswith(b"ok"))
    return not wire.received


async def test_circuit_breaker_holds_under_a_flood(target: Target):
    """Two connections, three that wait: no more reach the upstream, all others hear 503 at once."""
    target.upstream("a", [Request(), Wait("go"), OK])
    request = LAST.replace(b"a.test", b"two.test")
    flood = [asyncio.ensure_future(target.send(request)) for _ in range(2)]
    await target.wait_counted("cluster.two.upstream_rq_total", 2)
    flood += [asyncio.ensure_future(target.send(request)) for _ in range(98)]
    await target.wait_counted("cluster.two.upstream_rq_pending_overflow", 95)
    assert len(target.upstreams["a"].connections) <= 2
    target.signals["go"].set()
    statuses = sorted([(await answer).statuses[0] for answer in flood])
    assert statuses == [200] * 5 + [503] * 95


async def test_request_limit_holds_under_a_flood(target: Target):
    """max_requests, over all connections of a cluster."""
    target.upstream("a", [Request(), Wait("go"), OK])
    flood = [asyncio.ensure_future(target.send(LAST.replace(b"a.test", b"queue.test"))) for _ in range(50)]
    await target.wait_counted("cluster.queue.upstream_rq_active_overflow", 46)
    target.signals["go"].set()
    statuses = sorted([(await answer).statuses[0] for answer in flood])
    assert statuses == [200] * 4 + [503] * 46


@pytest.mark.parametrize("on", ["main", "inspected"])
async def test_connections_that_come_and_go(target: Target, on: str):
    """Four hundred connections, closed or reset at once, half of them with a request behind them."""
    async with target.within(16 * MB):
        for number in range(400):
            wire = await target.connect(on)
            if number % 2:
                wire.send(GET)
            (wire.close if number % 3 else wire.reset)()
        target.leave()
        await target.wait_gauge(f"listener.{on}.downstream_cx_active", on == "main")  # which is the neighbour's
    assert (await target.send(LAST, listener=on)).statuses == [200]
    await target.neighbour.until_answered(2)


@pytest.mark.parametrize("on", ["main", "inspected"])
async def test_no_descriptors_left(target: Target, on: str):
    """A worker that runs out of file descriptors serves those whom it has, and accepts again when there are some."""
    worker = target.workers[0]
    soft, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{worker}/fd"))
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 10, hard))
    try:
        wires = [await target.connect(on) for _ in range(60)]
        for wire in wires:
            wire.send(GET)
        await target.neighbour.until_answered(20)
    finally:
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (soft, hard))
    target.leave()
    assert (await target.send(LAST, listener=on)).statuses == [200]


async def test_many_connections_at_once(target: Target):
    """A thousand idle connections, and one request on each: each costs little."""
    async with target.within(24 * MB):
        wires = [await target.connect() for _ in range(1000)]
        for wire in wires:
            wire.send(GET)
        for wire in wires:
            await wire.until(lambda wire=wire: wire.received.endswith(b"ok"))
    assert all(wire.received.startswith(b"HTTP/1.1 200 ") for wire in wires)
