"""The admin listener with real sockets: long answers are made in slices, as fast as they are read; allowed paths."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.type.matcher.v3 import string_pb2

from meshproxy.admin import endpoints, listener
from meshproxy.admin.message import Response
from meshproxy.api.errors import ConfigError
from meshproxy.net import tasks
from meshproxy.observe.tags import StatsConfig
from tests.polling import until
from tests.unit.net_help import connect_to, context, run

NAMES = tuple(f"upstream_rq_{number}" for number in range(100))


class Admin:
    """A started admin listener, its stats and its address."""

    def __init__(self, **fields: Any) -> None:
        made = context()
        self.stats = made.stats
        proto = bootstrap_pb2.Admin(**fields)
        proto.address.socket_address.address = "127.0.0.1"
        proto.address.socket_address.port_value = 0
        self._listener = listener.AdminListener(proto, made)
        self._listener.start(SimpleNamespace(stats=self.stats, stats_config=StatsConfig(), collect_stats=self._collect, initialized=True))  # type: ignore[arg-type]

    async def _collect(self) -> None:
        pass

    async def send(self, target: str, method: str = "GET") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await connect_to(self._listener.address.port)
        writer.write(f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return reader, writer

    async def get(self, target: str, method: str = "GET") -> bytes:
        reader, writer = await self.send(target, method)
        answer = await reader.read()
        writer.close()
        return answer

    def close(self) -> None:
        self._listener.close()


def body_of(answer: bytes) -> bytes:
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


@pytest.mark.parametrize("target", ["/stats", "/stats/prometheus", "/stats?format=json", "/stats?format=html"])
def test_others_are_served_while_a_long_answer_is_made(target: str, monkeypatch):
    monkeypatch.setattr(listener, "SLICE", 0.0)

    async def main():
        admin = Admin()
        for number in range(20):
            admin.stats.scope(f"cluster.c{number}.").declare("counter", NAMES)
        reader, writer = await admin.send(target)
        await reader.readuntil(b"\r\n\r\n")
        pieces = 0
        other = asyncio.create_task(admin.get("/nothing"))
        while not other.done():
            assert await reader.read(1 << 16), "the long answer was complete before the short one"
            pieces += 1
        assert (await other).startswith(b"HTTP/1.1 404")
        while await reader.read(1 << 16):
            pieces += 1
        assert pieces > 10
        writer.close()
        admin.close()

    run(main)


def test_a_long_answer_is_whole():
    async def main():
        admin = Admin()
        for number in range(200):
            admin.stats.scope(f"cluster.c{number}.").declare("counter", NAMES)
        lines = body_of(await admin.get("/stats?filter=^cluster[.]")).decode().splitlines()
        names = sorted(f"cluster.c{number}.{name}" for number in range(200) for name in NAMES)
        assert lines == [f"{name}: 0" for name in names]
        admin.close()

    run(main)


@pytest.mark.parametrize("target", ["/stats", "/listeners"])
def test_head_is_answered_without_a_body(target: str, monkeypatch):
    monkeypatch.setattr(endpoints, "handle", lambda request, server: later("text") if target == "/stats" else Response("text"))

    async def main():
        admin = Admin()
        answer = await admin.get(target, "HEAD")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\n")
        admin.close()

    run(main)


async def later(*pieces: str) -> Response:
    return Response(iter(pieces))


class Endless:
    """Pieces that never end; `made`: how many were asked for."""

    def __init__(self) -> None:
        self.made = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> str:
        self.made += 1
        return "x" * listener.PIECE


def test_an_answer_that_nobody_reads_is_not_made(monkeypatch):
    pieces = Endless()

    async def answer() -> Response:
        return Response(pieces)

    monkeypatch.setattr(endpoints, "handle", lambda request, server: answer())

    async def main():
        admin = Admin()
        reader, writer = await admin.send("/stats")
        writer.transport.pause_reading()
        await until(lambda: pieces.made > 0)
        before = -1
        while pieces.made != before:  # until the buffers of both sides are full
            before = pieces.made
            for _ in range(100):
                await asyncio.sleep(0)
        writer.transport.resume_reading()
        while pieces.made < before + 50:  # it goes on
            assert await reader.read(1 << 20)
        writer.transport.abort()
        await until(lambda: not [task for task in tasks.running() if task.get_name() == "admin request"])
        admin.close()

    run(main)


def test_allowed_paths():
    """What none of the matchers matches, queries included, is refused; what an endpoint does not know is still unknown. As Envoy 1.40 answered."""

    async def main():
        admin = Admin(allow_paths=[string_pb2.StringMatcher(exact="/help"), string_pb2.StringMatcher(prefix="/stats")])
        for target, status in {
            "/help": 200,
            "/help?x=1": 403,
            "/HELP": 403,
            "/stats?filter=none": 200,
            "/stats/prometheus?filter=none": 200,
            "/statsx": 404,
            "/stats/../clusters": 403,
            "/clusters?/stats": 403,
            "/": 403,
        }.items():
            answer = await admin.get(target)
            assert answer.startswith(b"HTTP/1.1 %d " % status), target
        answer = await admin.get("/quitquitquit", "POST")
        assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert answer.endswith(b"\r\n\r\nrequest to path /quitquitquit not allowed")
        admin.close()

    run(main)


def test_a_wrong_matcher_of_allowed_paths_is_named():
    async def main():
        Admin(allow_paths=[string_pb2.StringMatcher(prefix="/"), string_pb2.StringMatcher(safe_regex={"regex": "("})])

    with pytest.raises(ConfigError) as caught:
        run(main)
    assert caught.value.problems[0].path == "allow_paths[1].safe_regex.regex"
