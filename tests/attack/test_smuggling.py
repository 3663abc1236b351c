"""Requests that two servers could read differently. Whatever they look like: nothing of them is forwarded, or what is forwarded reads the same to everybody.

The catalogue is built from parts, as smugglers' tools build theirs: a character where none belongs, around each part of a framing header, with bodies that are
cut differently by length and by chunks; and what the years have brought (TE.0, CL.0, 0.CL, chunk extensions, Expect, Upgrade, trailers).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from tests.attack.readings import READERS, one_reading
from tests.attack.target import Target, arena, http
from tests.differential.config import cluster, to
from tests.differential.wire import OK, Head, Request, Response

# Only HTTP/1: what begins like HTTP/2 is a request line as any other.
_QUICK = {"codec_type": "HTTP1", "stream_idle_timeout": "0.15s", "request_headers_timeout": "0.15s", "delayed_close_timeout": "0.02s", "drain_timeout": "0.02s"}
CONFIG = arena(
    http("main", to("a")),
    http("quick", to("a"), **_QUICK, common_http_protocol_options={"idle_timeout": "0.15s"}),
    http("liberal", to("a"), **_QUICK, common_http_protocol_options={"idle_timeout": "0.15s"}, stream_error_on_invalid_http_message=True, upgrade_configs=[
        {"upgrade_type": "websocket"}], http_protocol_options={"accept_http_10": True, "default_host_for_http_10": "a.test", "enable_trailers": True}),
    clusters=[cluster("a"), cluster("b")],
)  # fmt: skip

TRIES = 5

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n"
# What is tried where no character belongs: controls, white space of all kinds, separators, the ends of Latin-1, the beginning of UTF-8.
CHARACTERS = [bytes((byte,)) for byte in (*range(1, 33), 0, 34, 39, 44, 58, 59, 61, 92, 95, 127, 128, 133, 160, 239, 255)] + [
    b"\r\n ",
    b"\r\n\t",
    b"\n ",
    b"\xe2\x80\x8b",
]

CHUNK_SIZES = (
    b"5;a=b", b"5 ;a", b"5;", b"5\t", b" 5", b"5;a\nb", b"5;a\rb", b"5\n", b"5\r", b"+5", b"0x5", b"05", b"5;\x00", b'5;a="b\r\n"', b"5;;;", b"5\xa0", b"5_",
    b"5h", b"00000000000000005", b"fffffffffffffffb", b"5;" + b"e" * 3000, b"5;" + b"e" * 5000,
)  # fmt: skip
CHUNK_ENDS = (
    b"5\r\nhelloX7\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"5\nhello\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0\n\r\n", b"5\r\nhello\r\n0\r\n\n", b"5\r\nhello\r\n0\r\n\r", b"5\r\nhello\r\n-0\r\n\r\n", b"5\r\nhello\r\n\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0;x=\n\r\n\r\n", b"5\r\nhello\r\n000\r\n\r\n",
)  # fmt: skip
REQUEST_LINES = (
    b"POST /outer HTTP/1.1\r\nX: y", b"GET /a HTTP/1.1\nHost: b", b"GET  /a HTTP/1.1", b"GET /a\x0bHTTP/1.1", b"GET /a HTTP/1.1\x00", b"GET /a\xa0 HTTP/1.1",
    b"GET /a HTTP/1.1 HTTP/1.1", b"GET http://b.test/a HTTP/1.1", b"GET //b.test/a HTTP/1.1", b"CONNECT b.test:80 HTTP/1.1", b"GET /a?\nX: y HTTP/1.1",
    b"GET /a HTTP/1.10", b"GET /a HTTP/2.0", b"PRI * HTTP/2.0",
)  # fmt: skip


def odd_lines(name: bytes, value: bytes) -> Iterator[bytes]:
    """A framing header's line with a character where none belongs."""
    for char in CHARACTERS:
        yield name + char + b": " + value
        yield name + b":" + char + value
        yield name + b": " + value + char
        yield char + name + b": " + value
        yield b"X: y" + char + name + b": " + value
        yield name[:3] + char + name[3:] + b": " + value
        yield name + b": " + value[:1] + char + value[1:]


def message(*lines: bytes, body: bytes = b"", method: bytes = b"POST", version: bytes = b"1.1") -> bytes:
    return b"\r\n".join((method + b" /outer HTTP/" + version, b"Host: a.test", *lines, b"", b"")) + body


# The body that ends by chunks before SMUGGLED, and by length behind it; and the other way round.
CHUNKS_SHORTER = b"0\r\n\r\n" + SMUGGLED
LENGTH_SHORTER = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)


def catalogue() -> Iterator[bytes]:
    """Every request that is tried."""
    chunked, length = b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(CHUNKS_SHORTER)
    for line in odd_lines(b"Transfer-Encoding", b"chunked"):
        yield message(length, line, body=CHUNKS_SHORTER)
        yield message(line, b"Content-Length: 4", body=LENGTH_SHORTER)
    for line in odd_lines(b"Content-Length", b"5"):
        yield message(line, chunked, body=CHUNKS_SHORTER)
        yield message(line, body=b"hello" + SMUGGLED)
        yield message(line, length, body=CHUNKS_SHORTER)
    codings = (
        b"chunked, identity", b"identity, chunked", b"chunked, chunked", b"gzip, chunked", b"xchunked", b"chunked;q=1", b",chunked", b"chunked,", b'"chunked"',
        b"CHUNKED", b"Chunked", b"chunKed", b"cow", b"chunked cow", b"tchunked", b"chunked\x00cow", b"\xefchunked", b"", b"identity", b"null", b"0",
    )  # fmt: skip
    for coding in codings:
        yield message(length, b"Transfer-Encoding: " + coding, body=CHUNKS_SHORTER)
        yield message(b"Transfer-Encoding: " + coding, body=CHUNKS_SHORTER)
        yield message(b"Transfer-Encoding: " + coding, b"Transfer-Encoding: chunked", body=CHUNKS_SHORTER)
        yield message(chunked, b"Transfer-Encoding: " + coding, body=CHUNKS_SHORTER)
        yield message(b"Transfer-Encoding: " + coding, body=CHUNKS_SHORTER, version=b"1.0")
        yield message(b"Transfer-Encoding: " + coding, body=CHUNKS_SHORTER, method=b"GET")
    for value in (
        b"5, 5",
        b"5,6",
        b"5;6",
        b"+5",
        b"-5",
        b"-0",
        b"0x5",
        b"5 5",
        b"1_0",
        b"5.0",
        b"05",
        b"0005",
        b"",
        b"5e0",
        b"\xb2",
        b"\xd9\xa5",
        b"18446744073709551621",
    ):
        yield message(b"Content-Length: " + value, body=b"hello" + SMUGGLED)
        yield message(b"Content-Length: 5", b"Content-Length: " + value, body=b"hello" + SMUGGLED)
        yield message(b"Content-Length: " + value, body=b"hello" + SMUGGLED, method=b"GET")
    for lines in (
        (b"Content_Length: 5",),
        (b"Transfer_Encoding: chunked",),
        (b"Content-Length: 5", b"Content_Length: 0"),
        (chunked, b"Transfer_Encoding: identity"),
    ):
        yield message(*lines, body=CHUNKS_SHORTER)
    # A framing header that the connection is told to forget (hop by hop)
    yield message(length, b"Connection: content-length", body=CHUNKS_SHORTER)
    yield message(length, b"Connection: close, content-length", body=CHUNKS_SHORTER)
    yield message(chunked, b"Connection: transfer-encoding", body=CHUNKS_SHORTER)
    yield message(length, b"Connection: host", body=CHUNKS_SHORTER)
    # Bodies where some servers see none: 0.CL, CL.0, TE.0
    for method in (b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE", b"PUT", b"PROPFIND", b"GARBAGE"):
        yield message(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED, method=method)
        yield message(chunked, body=LENGTH_SHORTER, method=method)
    # Expect, honest and not
    for value in (
        b"100-continue",
        b"100-Continue",
        b"y 100-continue",
        b"100-continue, 100-continue",
        b"100-continue;x",
        b"\x01100-continue",
        b"100-continu",
        b"200-ok",
        b"",
    ):
        yield message(b"Expect: " + value, b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED)
        yield message(b"Expect: " + value, chunked, body=LENGTH_SHORTER)
        yield message(b"Expect: " + value, b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED, method=b"GET")
    # Upgrades that nobody accepts: what follows is no tunnel yet
    for upgrade in (b"websocket", b"h2c", b"TLS/1.3", b"foo"):
        for framing in ((), (b"Content-Length: 5",), (chunked,)):
            yield message(b"Connection: upgrade", b"Upgrade: " + upgrade, *framing, body=CHUNKS_SHORTER, method=b"GET")
    yield message(b"Connection: upgrade, http2-settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__", body=SMUGGLED, method=b"GET")
    # Chunks
    for size in CHUNK_SIZES:
        yield message(chunked, body=size + b"\r\nhello\r\n0\r\n\r\n" + SMUGGLED)
    for body in CHUNK_ENDS:
        yield message(chunked, body=body + SMUGGLED)
    # Trailers that would frame or address another request
    for trailer in (
        b"Content-Length: 5",
        b"Transfer-Encoding: chunked",
        b"Host: evil.test",
        b"Authorization: x",
        b"X: y\r\n z",
        b"X : y",
        b"X\n: y",
        b"GET /smuggled HTTP/1.1",
        b" X: y",
    ):
        yield message(chunked, body=b"5\r\nhello\r\n0\r\n" + trailer + b"\r\n\r\n" + SMUGGLED)
    # Targets and lines
    for line in REQUEST_LINES:
        yield line + b"\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
    yield b"\r\n\r\n\r\n" + message(length, body=CHUNKS_SHORTER)
    yield message(b"Host: b.test", length, body=CHUNKS_SHORTER)
    yield message(length, body=CHUNKS_SHORTER + b"\r\n" + SMUGGLED)


def responses(data: bytes) -> list[int]:
    """The statuses of the final responses in `data`, in which every body has a length."""
    statuses = []
    while data:
        head, ended, data = data.partition(b"\r\n\r\n")
        assert ended, head
        status = int(head.split(b" ", 2)[1])
        if status < 200:
            continue
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head + b"\r\n")
        assert length, head
        if not data.startswith(b"HTTP/1.1 "):  # nor after a HEAD
            data = data[int(length[1]) :]
        statuses.append(status)
    return statuses


async def fire(target: Target, listener: str, requests: list[bytes], enough: int) -> list[tuple[bytes, list[int]]]:
    """Send each on a connection of its own, many at a time; what was answered to each up to the end of its connection.

    On a busy machine the timeouts may come before a request or its answer. Those without an answer are sent again, fewer at a time; all, if not even `enough`
    were complete.
    """
    answers: dict[bytes, list[int]] = {}

    async def shoot(waiting: list[bytes]) -> None:
        while waiting:
            request = waiting.pop()
            answers[request] = responses((await target.send(request, listener=listener)).data)

    for at_a_time in (100, 25, 5, 1):
        waiting = [request for request in requests if not answers.get(request)]
        if sum(status == 200 for statuses in answers.values() for status in statuses) < enough:
            waiting = requests.copy()
        await asyncio.gather(*(shoot(waiting) for _ in range(at_a_time)))
    return [(request, answers[request]) for request in requests]


def forwarded(target: Target) -> int:
    """How many requests the upstream saw; each connection's bytes read the same to everybody."""
    return sum(len(one_reading(bytes(wire.received))) for wire in target.upstreams["a"].connections)


@pytest.mark.parametrize(
    "request_",
    [
        message(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
        message(b"Content-Length: 40", b"Transfer-Encoding: x", body=CHUNKS_SHORTER[5:]),
        message(b"X: y", b" Content-Length: 5", body=b"hello"),
        message(b"Transfer-Encoding: chunked", body=b"5\nhello\r\n0\r\n\r\n"),
    ],
)
def test_readers_differ(request_: bytes):
    """The judges of this module would notice."""
    with pytest.raises(AssertionError):
        one_reading(request_)
    assert len(READERS) == 5


@pytest.mark.parametrize("listener", ["quick", "liberal"])
async def test_catalogue(target: Target, listener: str):
    requests = list(dict.fromkeys(catalogue()))
    assert len(requests) > 1000
    answers = await fire(target, listener, requests, enough=200)
    # What was not answered 200 may still have begun to be forwarded: a request whose body turned out bad.
    complete = sum(status == 200 for _, statuses in answers for status in statuses)
    assert forwarded(target) >= complete >= 200, complete
    for request, statuses in answers:
        assert statuses, f"no answer to {request!r}"
        assert set(statuses) <= {200, 400, 403, 404, 408, 417, 426, 431, 501, 502, 504}, (request, statuses)
        bad = [at for at, status in enumerate(statuses) if status in {400, 408, 431, 501}]
        assert not bad or bad == [len(statuses) - 1], f"the connection went on after {statuses}: {request!r}"


async def test_body_of_a_refused_request_is_never_a_request(target: Target):
    """An answer that comes before the body ends the connection: what follows is read by nobody."""
    for head in (b"POST /outer HTTP/1.1\r\nContent-Length: 500\r\n\r\n", b"POST outer HTTP/1.1\r\nHost: a.test\r\nContent-Length: 500\r\n\r\n"):
        answer = await target.send(head, SMUGGLED * 3)
        assert responses(answer.data) == [400]
    assert forwarded(target) == 0


async def test_early_answer_closes_both_connections(target: Target):
    """The upstream answers before the body has come: neither connection is used again, so the body cannot become the next request (0.CL, Expect)."""
    target.upstream("a", [Head(), OK], [Request(), OK])
    wire = await target.connect()
    wire.send(message(b"Content-Length: %d" % (2 * len(SMUGGLED)), body=SMUGGLED))
    await Response().run(wire, target.signals)
    wire.send(SMUGGLED + SMUGGLED)
    answer = await target.read(wire)
    assert responses(answer.data) == [200]
    assert responses((await target.send(message(b"Connection: close", method=b"GET"))).data) == [200]
    first, second = target.upstreams["a"].connections
    assert bytes(first.received).startswith(b"POST /outer ")
    assert [line for _, line, _ in one_reading(bytes(second.received))] == [b"/outer"]


async def test_body_before_the_upgrade_is_accepted_does_not_poison_the_pool(target: Target):
    """CVE-2026-73548: bytes sent behind an Upgrade request wait until the upstream has switched; if it does not, they reach nobody."""
    target.upstream("a", [Head(), OK], [Request(), OK])
    wire = await target.connect("liberal")
    wire.send(b"GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + SMUGGLED)
    assert responses((await target.read(wire)).data) == [200]
    assert responses((await target.send(message(b"Connection: close", method=b"GET"))).data) == [200]
    seen = [bytes(wire.received) for wire in target.upstreams["a"].connections]
    assert not any(b"/smuggled" in data for data in seen), seen


async def test_answer_that_was_not_asked_for_is_for_nobody(target: Target):
    """Two answers to one request: the second must not be the answer to somebody else's request (response queue poisoning)."""
    honest = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhonest"
    target.upstream("a", [Request(), OK + b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\npoisoned"], [Request(), honest])
    first = await target.send(message(b"Connection: close", method=b"GET"))
    second = await target.send(message(b"Connection: close", method=b"GET"))
    assert b"poisoned" not in first.data + second.data
    assert second.data.endswith(b"honest")


async def test_body_length_is_kept_to_the_byte(target: Target):
    """A body that says it is longer than it is, followed by a request on the same connection, is one request with a body that ends there."""
    for short in (1, 10, len(SMUGGLED)):
        body = b"x" * 40
        answer = await target.send(
            message(b"Content-Length: %d" % (len(body) + short), body=body + SMUGGLED[:short] + SMUGGLED), token=b"\r\n\r\nokHTTP/1.1 200 OK"
        )
        assert answer.data.count(b"HTTP/1.1 200 OK") == 2
    readings = [one_reading(bytes(wire.received)) for wire in target.upstreams["a"].connections]
    assert [line for reading in readings for _, line, _ in reading] == [b"/outer", b"/smuggled"] * 3


async def test_head_split_everywhere_is_refused_alike(target: Target):
    """Segmentation changes nothing: the last of the attacks, cut at every byte."""
    request = message(b"Content-Length: 5", b"Transfer-Encoding:\x0bchunked", body=CHUNKS_SHORTER)

    async def cut_at(position: int) -> None:
        wire = await target.connect()
        wire.send(request[:position])
        await asyncio.sleep(0)
        wire.send(request[position:])
        assert responses((await target.read(wire)).data) == [400], position

    await asyncio.gather(*(cut_at(position) for position in range(1, len(request) - len(CHUNKS_SHORTER))))
    assert forwarded(target) == 0


async def test_tunnel_that_was_refused_is_no_tunnel(target: Target):
    """CONNECT and upgrades to routes that do not allow them: what follows is not read as a tunnel, nor as a request."""
    for head in (
        b"CONNECT a.test:80 HTTP/1.1\r\nHost: a.test:80\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ):
        answer = await target.send(head + SMUGGLED)
        assert responses(answer.data)[0] in {403, 404}
        assert len(responses(answer.data)) == 1
    assert forwarded(target) == 0


async def test_switching_protocols_only_if_asked(target: Target):
    """An upstream that switches without being asked gets no tunnel to the client."""
    target.upstream(
        "a", [Request(), b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"]
    )
    answer = await target.send(message(b"Connection: close", method=b"GET"))
    assert responses(answer.data) == [502]
    assert b"101" not in answer.data
