"""The admin interface in the hands of somebody who should not have it: nonsense is an error, no file is read, no memory held, and traffic goes on."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.attack.target import LIMIT_S, Answer, Target, arena, http
from tests.differential.config import cluster, to
from tests.differential.wire import Wire

MB = 1 << 20
CONFIG = arena(
    http("main", to("a")),
    clusters=[cluster("a")],
    layered_runtime={"layers": [{"name": "static", "static_layer": {"key": 1}}, {"name": "admin", "admin_layer": {}}]},
)


async def connect(target: Target) -> Wire:
    _, wire = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", target.proxy._admin_port)
    target._clients.append(wire)
    return wire


async def tell(target: Target, *pieces: bytes) -> Answer:
    """Send pieces on a connection of its own, and read to its end."""
    wire = await connect(target)
    for piece in pieces:
        wire.send(piece)
    return await target.read(wire)


def get(path: bytes, *lines: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join((method + b" " + path + b" HTTP/1.1", b"Host: admin", b"Connection: close", *lines, b"", b""))


TRAVERSALS = [
    b"/../../../../etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"/..%2f..%2fetc/passwd", b"/stats/../../etc/passwd", b"//etc/passwd", b"/.git/config",
    b"/static/..\\..\\etc\\passwd", b"/%00/etc/passwd", b"/stats%00.html", b"/stats;x=/../../etc/passwd", b"/config_dump/../../../proc/self/environ",
    b"/file:///etc/passwd", b"/?file=/etc/passwd", b"/config_dump?resource=../../etc/passwd", b"/logging?paths=/etc/passwd:info", b"/certs?path=/etc/passwd",
]  # fmt: skip


async def test_paths_that_leave(target: Target):
    """There are no files behind the paths."""
    requests = [get(path, b"Content-Length: 0", method=method) for path in TRAVERSALS for method in (b"GET", b"POST")]
    for answer in await asyncio.gather(*(tell(target, request) for request in requests)):
        assert len(answer.statuses) == 1
        assert b"root:" not in answer.data
        assert b"PATH=" not in answer.data


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH"])
async def test_only_post_changes_anything(target: Target, method: bytes):
    """A page that makes a browser GET cannot end the process or change it."""
    for path in (
        b"/quitquitquit",
        b"/drain_listeners",
        b"/healthcheck/fail",
        b"/reset_counters",
        b"/logging?level=trace",
        b"/runtime_modify?key=9",
        b"/reopen_logs",
    ):
        answer = await tell(target, get(path, method=method))
        assert answer.statuses == [405], (path, answer)
    assert '"final_value": "1"' in (await target.proxy.admin("GET", "/runtime"))[1]
    assert (await target.proxy.admin("GET", "/ready"))[0] == 200


QUERIES = [
    b"/stats?filter=(", b"/stats?filter=" + b"(a+)" * 1000, b"/stats?filter=%ff%fe", b"/stats?filter=(a+)%2b$&usedonly", b"/stats?format=json&filter=[[[[",
    b"/stats?&&&&==&=&%&%zz", b"/stats?" + b"a&" * 20_000, b"/stats?" + b"&".join(b"k%d=v" % number for number in range(5000)),
    b"/stats/prometheus?filter=.*&histogram_buckets=\x7e", b"/config_dump?mask=" + b"a." * 5000, b"/config_dump?mask=..,,,..", b"/config_dump?name_regex=(",
    b"/config_dump?resource=" + b"x" * 5000, b"/clusters?filter=*", b"/clusters?format=%00", b"/logging?level=%00", b"/runtime_modify?" + b"=",
    b"/server_info?" + b"%" * 10_000, b"/listeners?format=" + b"j" * 10_000, b"/stats?filter=" + b".*" * 10_000, b"/stats?histogram_buckets=" + b"9" * 5000,
    b"/stats?type=" + b"9" * 5000,
]  # fmt: skip


async def test_queries(target: Target):
    """Nonsense in every parameter is an answer, never a failure inside."""
    requests = [get(query, b"Content-Length: 0", method=method) for query in QUERIES for method in (b"GET", b"POST")]
    for answer in await asyncio.gather(*(tell(target, request) for request in requests)):
        assert len(answer.statuses) == 1, answer
        assert answer.statuses[0] in {200, 400, 404, 405, 503}
        assert b"Traceback" not in answer.data


async def test_repetitions_in_a_filter_are_limited(target: Target):
    """A small expression that would be a big program is refused; the others cost no more than the text is long."""
    assert (await tell(target, get(b"/stats?filter=((a{1000}){1000}){1000}"))).statuses == [400]


async def test_host_headers(target: Target):
    """Whatever the host is called, the answer does not repeat it."""
    names = [b"evil.test", b"<script>", b"127.0.0.1:1", b"a.test, b.test"]
    for name, answer in zip(names, await asyncio.gather(*(tell(target, get(b"/ready").replace(b"admin", name)) for name in names)), strict=True):
        assert len(answer.statuses) == 1
        assert name not in answer.data


async def test_big_bodies(target: Target):
    """A body over a megabyte is refused and not kept."""
    paths = (b"/runtime_modify", b"/ready", b"/nonsense")
    heads = [get(path, b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: 67108864", method=b"POST") for path in paths]
    async with target.within(24 * MB):
        answers = await asyncio.gather(*(tell(target, head, b"k=" + b"v" * (4 * MB)) for head in heads * 3))
        assert [answer.statuses for answer in answers] == [[413]] * 9


async def test_runtime_is_not_filled(target: Target):
    """Many keys, and big ones."""
    async with target.within(24 * MB):
        for turn in range(5):
            body = b"&".join(b"k%d.%d=%d" % (turn, number, number) for number in range(2000))
            head = get(b"/runtime_modify", b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: %d" % len(body), method=b"POST")
            assert (await tell(target, head, body)).statuses[0] in {200, 400, 503}


BROKEN = [
    b"GET /ready\r\n\r\n", b"\x16\x03\x01\x00\xff", b"GET /ready HTTP/1.1\nHost: a\n\n", get(b"/ready", b"Content-Length: 1", b"Transfer-Encoding: chunked"),
    b"\0" * 100, b"GET /ready HTTP/1.1\r\n\r\n", get(b"/" + b"a" * 70_000),
]  # fmt: skip


async def test_broken_requests(target: Target):
    """The admin listener reads HTTP as strictly as the others."""
    answers = await asyncio.gather(*(tell(target, request) for request in BROKEN))
    assert [answer.statuses for answer in answers] == [[426], [400], [400], [400], [400], [400], [431]]


async def test_many_connections(target: Target):
    """Two hundred silent connections, and as many half-read answers: there is room for one more."""
    wires = [await connect(target) for _ in range(200)]
    for wire in wires[:100]:
        wire.transport.pause_reading()
        wire.send(get(b"/stats") + get(b"/stats"))
    async with asyncio.timeout(LIMIT_S):
        assert (await target.proxy.admin("GET", "/ready"))[0] == 200


async def test_flood_of_the_dearest_page(target: Target):
    """Fifty times everything that is counted, at once: bounded, and the workers go on."""
    async with target.within(48 * MB):
        answers = await asyncio.gather(*(tell(target, get(b"/stats?format=json")) for _ in range(50)))
    assert [answer.statuses for answer in answers] == [[200]] * 50
    assert all(re.search(rb"\r\ncontent-length: \d+\r\n|transfer-encoding: chunked", answer.data) for answer in answers)
