"""What is remembered of messages to save work, attacked: it is bounded in bytes, and nobody ever gets what belongs to somebody else."""

from __future__ import annotations

import asyncio
import re
import ssl
import tracemalloc
from dataclasses import dataclass
from typing import Any

import hpack
import pytest

from meshproxy.codec.h1.parser import Options
from meshproxy.codec.h1.request import RequestParser
from meshproxy.codec.h1.response import ResponseParser
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.fields import ShapedFields
from tests.attack.target import LIMIT_S, Target, arena, http
from tests.differential.config import cluster, to
from tests.differential.wire import OK, Request, Signals, Wire, answer, read_body, read_head
from tests.unit.test_h1 import Recorder

MB = 1 << 20


def tls(listener: dict[str, Any]) -> dict[str, Any]:
    certificate = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
    context = {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate]}}
    listener["filter_chains"][0]["transport_socket"] = {"name": "tls", "typed_config": context}
    return listener


def secret(name: str) -> list[dict[str, Any]]:
    """Routes of a listener that adds a header of its own."""
    return [{"name": "all", "domains": ["*"], "request_headers_to_add": [{"header": {"key": "x-listener", "value": name}}],
             "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]}]  # fmt: skip


CONFIG = arena(
    http("main", to("a")),
    http("edge", secret("edge"), use_remote_address=True),
    http("other", secret("other"), use_remote_address=True, always_set_request_id_in_response=True),
    tls(http("tls", secret("tls"), use_remote_address=True)),
    clusters=[cluster("a")],
)


@dataclass(frozen=True)
class Repeat:
    """Upstream: say back the whole head and the body."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        head = await read_head(wire)
        wire.send(answer(body=head + await read_body(wire, head, to_the_end=False)))


async def ask(wire: Wire, request: bytes) -> bytes:
    """Send a request, and return its answer's body."""
    async with asyncio.timeout(LIMIT_S):
        wire.send(request)
        head = await read_head(wire)
        assert head.startswith(b"HTTP/1.1 200 "), head
        return await read_body(wire, head, to_the_end=False)


HEAD = b"GET /path/to/something?query=1 HTTP/1.1\r\nHost: a.test\r\nAuthorization: Bearer 0000\r\nCookie: session=0000\r\nX-Plain: value\r\n\r\n"


def fields(head: bytes) -> dict[bytes, bytes]:
    return dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)


async def test_heads_that_differ_in_one_byte(target: Target):
    """Every byte of a head is changed in turn, between repetitions of the original: the upstream sees what this request said, and not what another did."""
    target.upstream("a", [Repeat()])
    wire = await target.connect()
    places = [*range(5, HEAD.index(b" HTTP/1.1"))]
    for part in (b"a.test", b"Bearer", b"session=", b"value", b"X-Plain", b"0000"):
        places += range(HEAD.index(part), HEAD.index(part) + len(part))
    for at in places:
        if not HEAD[at : at + 1].isalnum():
            continue
        changed = HEAD[:at] + (b"q" if HEAD[at : at + 1] != b"q" else b"w") + HEAD[at + 1 :]
        for request in (HEAD, changed, HEAD, changed):
            seen = await ask(wire, request)
            sent = {name.lower(): value for name, value in fields(request).items()}
            found = fields(seen)
            assert seen.split(b"\r\n")[0] == request.split(b"\r\n")[0]
            assert {name: found.get(name) for name in sent} == sent


async def test_clients_with_the_same_head_but_for_a_secret(target: Target):
    """Twenty clients at once, each with its own credentials, again and again, and now and then all with the very same head."""
    target.upstream("a", [Repeat()])

    async def client(number: int) -> None:
        wire = await target.connect()
        mine = HEAD.replace(b"0000", b"%04d" % number)
        for turn in range(20):
            request = HEAD if turn % 5 == 4 else mine
            found = fields(await ask(wire, request))
            expected = b"0000" if request is HEAD else b"%04d" % number
            assert (found[b"authorization"], found[b"cookie"]) == (b"Bearer " + expected, b"session=" + expected)

    await asyncio.gather(*(client(number) for number in range(1, 21)))


async def test_same_head_from_different_addresses_and_listeners(target: Target):
    """What a head means depends on who sent it and where: forwarded address and scheme, and what the listener adds, are this connection's."""
    target.upstream("a", [Repeat()])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def client(listener: str, address: str) -> None:
        secure = {"ssl": context, "server_hostname": "a.test"} if listener == "tls" else {}
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(Wire, "127.0.0.1", target.proxy.ports[listener], local_addr=(address, 0), **secure)
        for _ in range(10):
            found = fields(await ask(wire, HEAD))
            assert found[b"x-forwarded-for"] == address.encode()
            assert found[b"x-envoy-external-address"] == address.encode()
            assert found[b"x-forwarded-proto"] == (b"https" if listener == "tls" else b"http")
            assert found[b"x-listener"] == listener.encode()
        wire.close()

    await asyncio.gather(*(client(listener, f"127.0.0.{last}") for listener in ("edge", "other", "tls") for last in range(2, 8)))


async def test_request_ids_are_never_repeated(target: Target):
    """A repeated head is a new request all the same."""
    target.upstream("a", [Repeat()])
    wires = [await target.connect(listener) for listener in ("edge", "other", "main") for _ in range(3)]
    ids = []
    for _ in range(40):
        ids += [fields(await ask(wire, HEAD))[b"x-request-id"] for wire in wires]
    assert len(set(ids)) == len(ids)


async def test_answers_with_the_same_head(target: Target):
    """Answers that begin alike: each client gets its own body, cookie, and length."""
    bodies = [b"%08d" % number for number in range(50)]
    target.upstream("a", *[[Request(), answer(body=body, x_same="same")] for body in bodies], [Request(), OK])
    wires = [await target.connect() for _ in range(5)]
    found = [await ask(wires[number % 5], HEAD) for number in range(50)]
    assert found == bodies
    cookies = [f"session={number:04d}" for number in range(50)]
    target.upstream("a", *[[Request(), answer(set_cookie=cookie)] for cookie in cookies], [Request(), OK])
    for number, cookie in enumerate(cookies):
        wire = wires[number % 5]
        wire.send(HEAD)
        head = await read_head(wire)
        await read_body(wire, head, to_the_end=False)
        assert re.findall(rb"\r\nset-cookie: ([^\r]*)", head) == [cookie.encode()]


@pytest.mark.parametrize("kind", ["requests", "hosts", "many_headers", "answers", "reasons"])
async def test_distinct_heads(target: Target, kind: str):
    """Fifteen hundred heads that are all different, of a kilobyte each: what is kept of them is a small part."""
    padding = b"x" * 900
    if kind == "answers":
        target.upstream("a", *[[Request(), answer(x_number=f"{number}", x_padding="y" * 900)] for number in range(1500)])
    elif kind == "reasons":
        target.upstream("a", *[[Request(), b"HTTP/1.1 200 reason-%d-%b\r\ncontent-length: 2\r\n\r\nok" % (number, padding)] for number in range(1500)])
    else:
        target.upstream("a", [Request(), OK])

    def request(number: int) -> bytes:
        if kind == "requests":
            return b"GET /%d HTTP/1.1\r\nHost: a.test\r\nX-Number: %d\r\nX-Padding: %b%d\r\n\r\n" % (number, number, padding, number)
        if kind == "hosts":
            return b"GET / HTTP/1.1\r\nHost: h%d.%b.test\r\n\r\n" % (number, b"h" * 200)
        if kind == "many_headers":
            return b"GET /%d HTTP/1.1\r\nHost: a.test\r\n" % number + b"".join(b"%x-%d:\r\n" % (number, at) for at in range(95)) + b"\r\n"
        return HEAD

    async def client(first: int) -> int:
        wire = await target.connect()
        return len([await ask(wire, request(number)) for number in range(first, 1500, 10)])

    async with target.within(10 * MB):
        answered = await asyncio.gather(*(client(first) for first in range(10)))
    assert sum(answered) == 1500


class Counted(Recorder):
    """A sink that keeps nothing."""

    def on_known(self, known: Any, body: bytes) -> None:
        pass

    def on_whole(self, known: Any, body: bytes) -> None:
        pass

    def on_headers(self, head: Any, end_stream: bool) -> None:
        pass


def growth(parser: Any, heads: list[bytes]) -> int:
    """Bytes that are still allocated after the parser has read these messages."""
    sink_parser = parser
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for head in heads:
            sink_parser.feed(head)
            sink_parser.next_message()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


WORST = [b"".join(b"%x%02x:\r\n" % (number, at) for at in range(96)) for number in range(500)]


def test_memo_of_request_heads_is_bounded():
    """The worst heads: as many header lines as are allowed, all new. What is kept of 500 of them, all memos of the parser together."""
    parser = RequestParser(Counted(), Options())
    assert growth(parser, [b"GET /%d HTTP/1.1\r\nHost: a\r\n" % number + lines + b"\r\n" for number, lines in enumerate(WORST)]) < 10 * MB


def test_memo_of_response_heads_is_bounded():
    """The same from upstreams."""
    parser = ResponseParser(Counted(), Options())
    assert growth(parser, [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + lines + b"\r\n" for lines in WORST]) < 10 * MB


@pytest.mark.parametrize("length", [100, 1000, 2000, 10_000, 60_000])
def test_memos_are_bounded_whatever_the_length(length: int):
    """Long targets, names, values, hosts, reasons."""
    parser = RequestParser(Counted(), Options())
    filler = b"f" * (length // 3)
    count = 1000 if length <= 10_000 else 300  # together more than may be kept of them
    heads = [b"GET /%d%b HTTP/1.1\r\nHost: h%d\r\nx%d%b: %b\r\n\r\n" % (number, filler, number, number, filler, filler) for number in range(count)]
    assert growth(parser, heads) < 10 * MB
    responses = ResponseParser(Counted(), Options())
    heads = [b"HTTP/1.1 200 r%d%b\r\nContent-Length: 0\r\nx%d%b: %b\r\n\r\n" % (number, filler, number, filler, filler) for number in range(count)]
    assert growth(responses, heads) < 10 * MB


@pytest.mark.parametrize(("kept", "indexed"), [(0, 1), (0, 30), (4, 1), (4, 10)])
def test_what_is_foreseen_of_header_blocks_is_bounded(kept: int, indexed: int):
    """Blocks with new values, short ones for the table and the longest that are kept out of it, as they are foreseen: each connection keeps some kilobytes."""
    encoder = hpack.Encoder()
    blocks = [
        encoder.encode(
            [(b":method", b"GET")]
            + [(b"kept-%d" % place, b"%0200d" % (number * 40 + place), True) for place in range(kept)]  # of digits, so that it is 126 bytes in a block
            + [(b"x%d" % place, b"%05d" % (number * 40 + place), False) for place in range(indexed)]
        )
        for number in range(400)
    ]
    for warm in (False, True):  # what connections share is not what is counted
        one = Decoder()
        foreseen = sum([type(one.decode(block)) is ShapedFields for block in blocks])
        assert not warm or foreseen > 300
    decoders = [Decoder() for _ in range(40)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number, decoder in enumerate(decoders):
            for block in blocks[: 200 + 5 * number]:  # some have just begun anew, and some are about to
                decoder.decode(block)
        each = (tracemalloc.get_traced_memory()[0] - before) / len(decoders)
    finally:
        tracemalloc.stop()
    assert each < 40 * 1024  # half of it is the table, of 4096 bytes as HPACK counts
