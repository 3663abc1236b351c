"""Our real process under attack, its scripted upstreams, and a polite neighbour who must notice nothing.

Configurations are those of tests/differential/config.py. `arena` and `http` add what the neighbour needs: a virtual host `polite.test` on every listener, and a
cluster of its own whose upstream says back what it was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure
from tests.differential import config as configs
from tests.differential.proxy import our_command
from tests.differential.rig import Rig
from tests.differential.wire import Play, Signals, Step, Wire, answer, read_body, read_head
from tests.e2e.proxy import children
from tests.polling import quiet, until

LIMIT_S = 90.0  # for anything that must happen at all; the machine may be busy
_PACE_S = 0.01  # between two questions of the neighbour: it is there to notice, not to be the load
_CALM = ("downstream_cx_active", "downstream_rq_active", "upstream_cx_active", "upstream_rq_active", "upstream_rq_pending_active", "downstream_pre_cx_active")

POLITE_HOST = "polite.test"
POLITE = {"name": "polite", "domains": [POLITE_HOST], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "polite", "timeout": "0s"}}]}


def http(name: str, hosts: str | list[Any], **fields: Any) -> configs.Config:
    """A listener with a connection manager that also serves the neighbour."""
    return configs.http(name, [*configs.y(hosts), POLITE], **fields)


def arena(*listeners: configs.Config, clusters: list[configs.Config] | None = None, **fields: Any) -> configs.Config:
    """A bootstrap with the neighbour's cluster."""
    return configs.bootstrap(*listeners, clusters=[*(clusters or []), configs.cluster("polite")], **fields)


@dataclass(frozen=True)
class Mirror:
    """Upstream: answer each request with its request line and body."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        head = await read_head(wire)
        body = await read_body(wire, head, to_the_end=False)
        wire.send(answer(body=head.partition(b"\r\n")[0] + b"\n" + body))


@dataclass(frozen=True)
class Pour:
    """Upstream: send a piece again and again, as fast as the proxy takes it; up to the end of the connection without a count. Never holds much of it."""

    piece: bytes
    count: int | None = None

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.transport.set_write_buffer_limits(1 << 16)
        sent = 0
        while wire.end is None and not wire.transport.is_closing() and sent != self.count:
            wire.send(self.piece)
            sent += 1
            if wire.full:
                await wire.until(lambda: not wire.full)
            if sent % 64 == 0:
                await asyncio.sleep(0)


@dataclass(frozen=True)
class Deaf:
    """Either side: read nothing until the signal."""

    until: str

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.transport.pause_reading()
        await signals[self.until].wait()
        wire.transport.resume_reading()


@dataclass(frozen=True)
class Answer:
    """What came on a connection up to its end, or up to what was waited for."""

    data: bytes
    end: str | None  # None: still open

    @property
    def statuses(self) -> list[int]:
        """Of all responses, as a naive reader finds them: for answers whose bodies hold no status lines."""
        return [int(code) for code in re.findall(rb"(?:^|(?<=\n)|(?<=alive)|(?<=ok))HTTP/1\.[01] (\d{3}) ", self.data)]


class Neighbour:
    """A client that behaves, on a connection of its own: it asks again and again, and each answer must be the one to its question."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.answered = 0
        self._more = asyncio.Event()
        self._leaving = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.target.proxy.ports["main"])
        await self.ask()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def leave(self) -> None:
        """Ask once more, after whatever happened, and go. Raises what went wrong."""
        self._leaving = True
        try:
            if self._task is not None:
                await self._task
                await self.ask()
        finally:
            self._writer.close()

    async def _run(self) -> None:
        while not self._leaving:
            await self.ask()
            await asyncio.sleep(_PACE_S)

    async def ask(self) -> None:
        """One exchange: a request that nobody else sends, and exactly its answer."""
        number = self.answered
        line, body = f"GET /polite/{number}", b""
        if number % 2:
            line, body = f"POST /polite/{number}", b"body %d" % number
        head = f"{line} HTTP/1.1\r\nhost: {POLITE_HOST}\r\nx-number: {number}\r\ncontent-length: {len(body)}\r\n\r\n"
        async with asyncio.timeout(LIMIT_S):
            self._writer.write(head.encode() + body)
            response = await self._reader.readuntil(b"\r\n\r\n")
            assert response.startswith(b"HTTP/1.1 200 OK\r\n"), response
            length = re.search(rb"\r\ncontent-length: (\d+)\r\n", response)
            assert length, response
            said = await self._reader.readexactly(int(length[1]))
        assert said == f"{line} HTTP/1.1\n".encode() + body, said
        self.answered += 1
        self._more.set()

    async def until_answered(self, count: int) -> None:
        """Wait for so many answers more."""
        count += self.answered
        async with asyncio.timeout(LIMIT_S):
            while self.answered < count:
                self._more.clear()
                await self._more.wait()


class Target(Rig):
    """The process under attack."""

    def __init__(self, config: configs.Config, pki: Path) -> None:
        super().__init__(our_command(), config, pki, "attack")

    async def start(self) -> None:
        await super().start()
        self.main = self.proxy.process.pid
        self.workers = children(self.main)
        self._said = ""

    async def renew(self) -> None:
        """Start anew, with nothing left of what was."""
        await self.stop()
        self.__init__(self.config, self.pki)
        await self.start()

    # -- a test

    async def begin(self) -> None:
        """What a test finds: upstreams that answer, and the neighbour at work."""
        for name, upstream in self.upstreams.items():
            upstream.begin(Play([[Mirror()]]) if name == "polite" else Play(), Signals())
        self._before = await self.proxy.stats()
        self.neighbour = Neighbour(self)
        await self.neighbour.start()

    async def end(self) -> None:
        """The neighbour has noticed nothing, the process is whole, and nothing of the attack is left in it."""
        await self.neighbour.leave()
        self.leave()
        for upstream in self.upstreams.values():
            upstream.end_case()
        await self.calm()
        assert self.proxy.alive(), self.proxy.stderr()
        assert children(self.main) == self.workers, "a worker died and was replaced"
        said, self._said = self.proxy.stderr().removeprefix(self._said), self.proxy.stderr()
        assert not said, said

    def leave(self) -> None:
        """End all connections of the attacker."""
        for wire in self._clients:
            wire.close()
        self._clients.clear()

    async def calm(self) -> None:
        """Wait until there is no connection and no request left."""
        busy: dict[str, int] = {}

        async def calm() -> bool:
            nonlocal busy
            busy = await self.busy()
            return not busy

        try:
            await until(calm, LIMIT_S)
        except TimeoutError:
            raise AssertionError(f"left behind: {busy}") from None

    async def busy(self) -> dict[str, int]:
        """The gauges that say that something is going on, the admin interface's own apart."""
        return {name: value for name, value in (await self.proxy.stats()).items() if value and name.endswith(_CALM) and ".admin." not in name}

    # -- attacking

    def upstream(self, name: str, *scripts: list[Step | bytes], on_connect: bool = False) -> None:
        """What an upstream does from now on: the n-th request gets the n-th script, the last one repeats."""
        self.signals = Signals()
        upstream = self.upstreams[name]
        connections = upstream.connections
        upstream.begin(Play(list(scripts), on_connect=on_connect), self.signals)
        upstream.connections = connections

    async def send(self, *pieces: bytes, listener: str = "main", token: bytes | None = None) -> Answer:
        """Send pieces on a connection of its own, and read to its end, or until `token` has come."""
        wire = await self.connect(listener)
        for piece in pieces:
            wire.send(piece)
        return await self.read(wire, token)

    async def read(self, wire: Wire, token: bytes | None = None) -> Answer:
        """Read to the connection's end, or until `token` has come."""
        seen = 0
        async with asyncio.timeout(LIMIT_S):
            while wire.end is None and (token is None or wire.received.find(token, max(0, seen - len(token))) < 0):
                seen = len(wire.received)
                wire._changed.clear()
                await wire._changed.wait()
        end = wire.end
        wire.close()
        self._clients.remove(wire)
        return Answer(bytes(wire.received), end)

    async def counted(self, name: str) -> int:
        """How much a counter has grown in this test."""
        return (await self.proxy.stats()).get(name, 0) - self._before.get(name, 0)

    async def wait_counted(self, name: str, value: int) -> None:
        """Wait until a counter has grown by `value` at least."""

        async def enough() -> bool:
            return await self.counted(name) >= value

        await until(enough, LIMIT_S)

    async def wait_gauge(self, name: str, value: int) -> None:
        """Wait until a gauge is at most `value`."""

        async def down() -> bool:
            return (await self.proxy.stats()).get(name, 0) <= value

        await until(down, LIMIT_S)

    async def stalled(self, name: str) -> int:
        """Wait until a counter has begun to grow and no longer does; by how much."""
        await self.wait_counted(name, 1)
        value: int = await quiet(lambda: self.counted(name), times=5)
        return value

    # -- memory

    def memory(self) -> int:
        """Bytes of anonymous memory of main and workers."""
        return int(measure.memory([self.main, *self.workers]).pss_anon * 2**20)

    @contextlib.asynccontextmanager
    async def within(self, growth: int) -> AsyncIterator[None]:
        """The processes' memory never grows by more than `growth` bytes while the block runs; looked at again and again, and at its end."""
        before = self.memory()
        highest = before

        async def watch() -> None:
            nonlocal highest
            while True:
                highest = max(highest, self.memory())
                await asyncio.sleep(0.05)

        watching = asyncio.get_running_loop().create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
        highest = max(highest, self.memory())
        assert highest - before <= growth, f"grew by {highest - before:,} bytes; {growth:,} are allowed"
