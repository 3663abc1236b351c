"""A server's side of HTTP/2 by the book, RFC 9113 and 7541: the requirements that h2spec tries, and some more, in process. Named by section.

Each case is fed whole and byte by byte. A stream error may also end the connection, with the same code (RFC 9113 5.4.2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.conformance.http2_peer import BODY, GET, PING, POST, End, block, continuation, data, headers, literal, priority, reset, settings, update
from tests.differential import http2_wire as h2

HELLO = h2.PREFACE + settings({})
U32 = struct.Struct(">I").pack
MAX = (1 << 31) - 1


@dataclass
class Case:
    """`pieces` after the client's preface and SETTINGS (unless `bare`); `answers`: the owner answers whole requests at once."""

    section: str
    title: str
    pieces: list[bytes]
    bare: bool = False
    answers: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, split: bool) -> End:
        end = End(answers=self.answers, **self.options)
        return end.feed(*([] if self.bare else [HELLO]), *self.pieces, split=split)

    def __str__(self) -> str:
        return f"{self.section} {self.title}".replace(" ", "_")


split = pytest.mark.parametrize("split", [False, True], ids=["whole", "bytes"])


# ---- what must be taken --------------------------------------------------------------------------------------------------------------------------------


def fields(*more: tuple[str, str], method: str = "GET") -> list[tuple[str, str]]:
    return [(":method", method), *GET[1:], *more]


def hpack_block(tail: bytes) -> bytes:
    """A request whose header block ends in `tail`."""
    return h2.frame(h2.HEADERS, 5, 1, block(GET) + tail)


ANSWERED = [
    Case("3.4", "preface", [headers()]),
    Case("3.4", "preface and SETTINGS with values", [h2.PREFACE, settings({h2.MAX_STREAMS: 1, h2.WINDOW: 65_535}), headers()], bare=True),
    Case("3.4", "SETTINGS are acknowledged later", [headers(), h2.frame(h2.SETTINGS, h2.ACK)]),
    Case("4.1", "frame of unknown type", [h2.frame(0xFF, 0, 0, b"x" * 8), headers()]),
    Case("4.1", "frame of unknown type on a stream", [headers(end=False), h2.frame(0x42, 0xFF, 1, b"abc"), data()]),
    Case("4.1", "undefined flags", [h2.frame(h2.PING, 0x16, 0, bytes(8)), headers()]),
    Case("4.1", "reserved bit", [h2.frame(h2.HEADERS, 5, 0x80000001, block())]),
    Case("4.2", "DATA of 2^14 bytes", [headers(fields=POST, end=False), data(payload=bytes(16_384))]),
    Case("4.2", "DATA of 2^14 bytes with padding", [headers(fields=POST, end=False), h2.frame(h2.DATA, 9, 1, b"\xff" + bytes(16_383))]),
    Case("4.3", "header block in several frames", [h2.frame(h2.HEADERS, 1, 1, block()[:10]), continuation(payload=block()[10:])]),
    Case("5.1", "WINDOW_UPDATE on half-closed stream", [headers(), update(1, 100)]),
    Case("5.1", "PRIORITY on idle stream", [priority(1), headers()]),
    Case("5.1", "PRIORITY on half-closed stream", [headers(), priority(1)]),
    Case("5.1", "PRIORITY on closed stream", [headers(), priority(1), PING]),
    Case("5.1", "RST_STREAM on closed stream", [headers(), reset()]),
    Case("5.1", "WINDOW_UPDATE on closed stream", [headers(), update(1, 1), update(0, 1)]),
    Case("5.1.1", "identifiers may be left out", [headers(7)]),
    Case("5.5", "unknown frame among DATA", [headers(fields=POST, end=False), data(end=False), h2.frame(0x16, 0, 0, b""), data()]),
    Case("6.1", "several DATA frames", [headers(fields=POST, end=False), data(end=False), data(end=False), data()]),
    Case("6.1", "DATA with padding", [headers(fields=POST, end=False), h2.frame(h2.DATA, 9, 1, b"\x06test" + bytes(6))]),
    Case("6.1", "DATA of nothing but padding", [headers(fields=POST, end=False), h2.frame(h2.DATA, 9, 1, b"\x06" + bytes(6))]),
    Case("6.2", "HEADERS with padding", [h2.frame(h2.HEADERS, 5 | h2.PADDED, 1, b"\x03" + block() + bytes(3))]),
    Case("6.2", "HEADERS with priority", [h2.frame(h2.HEADERS, 5 | h2.HAS_PRIORITY, 1, U32(0) + b"\xff" + block())]),
    Case("6.2", "HEADERS with padding and priority", [h2.frame(h2.HEADERS, 5 | h2.PADDED | h2.HAS_PRIORITY, 1, b"\x01" + U32(0) + b"\xff" + block() + b"\0")]),
    Case("6.3", "weight 1", [priority(1, weight=0), headers()]),
    Case("6.3", "weight 256", [priority(1, weight=255), headers()]),
    Case("6.3", "dependency", [priority(1, 3), headers()]),
    Case("6.3", "exclusive dependency", [priority(1, 3, exclusive=True), headers()]),
    Case("6.3", "PRIORITY for idle stream, HEADERS for a lower one", [priority(9), headers()]),
    Case("6.5", "unknown setting", [settings({0xFF: 1}), headers()]),
    Case("6.5", "several settings", [settings({h2.MAX_STREAMS: 100, h2.WINDOW: 65_535, h2.FRAME_SIZE: 16_384, h2.LIST_SIZE: 4096, h2.PUSH: 0}), headers()]),
    Case("6.5.2", "ENABLE_PUSH 1 of a client", [settings({h2.PUSH: 1}), headers()]),
    Case("6.5.2", "largest values",
         [settings({h2.WINDOW: MAX, h2.FRAME_SIZE: (1 << 24) - 1, h2.LIST_SIZE: (1 << 32) - 1, h2.TABLE_SIZE: (1 << 32) - 1}), headers()]),
    Case("6.5.2", "table size 0", [settings({h2.TABLE_SIZE: 0}), headers()]),
    Case("6.7", "PING", [PING, headers()]),
    Case("6.7", "PING with ACK", [h2.frame(h2.PING, h2.ACK, 0, b"12345678"), headers()]),
    Case("6.8", "GOAWAY with unknown code", [headers(), h2.frame(h2.GOAWAY, 0, 0, U32(0) + U32(0xFF))]),
    Case("6.8", "GOAWAY with debug data", [headers(), h2.frame(h2.GOAWAY, 0, 0, bytes(8) + b"why not")]),
    Case("6.9", "WINDOW_UPDATE on the connection", [update(0, 1), headers()]),
    Case("6.9", "WINDOW_UPDATE on a stream", [headers(end=False, fields=POST), update(1, 1), data()]),
    Case("6.10", "several CONTINUATION frames",
         [h2.frame(h2.HEADERS, 1, 1, block()[:3]), continuation(payload=block()[3:9], end=False), continuation(payload=block()[9:])]),
    Case("7", "GOAWAY with error before a request", [headers(), h2.frame(h2.GOAWAY, 0, 0, U32(0) + U32(h2.INTERNAL_ERROR))]),
    Case("7", "RST_STREAM with unknown code", [headers(fields=POST, end=False), reset(code=0xFF), headers(3)]),
    Case("8.1", "HEAD", [headers(fields=fields(method="HEAD"))]),
    Case("8.1", "POST with trailers", [headers(fields=POST, end=False), data(end=False), headers(fields=[("x-check", "1")])]),
    Case("8.1", "POST with an empty body and trailers", [headers(fields=POST, end=False), headers(fields=[("x-check", "1")])]),
    Case("8.1.1", "content-length is right", [headers(fields=fields(("content-length", "8"), method="POST"), end=False), data(end=False), data()]),
    Case("8.1.1", "content-length 0 with an empty DATA", [headers(fields=fields(("content-length", "0"), method="POST"), end=False), data(payload=b"")]),
    Case("8.2.2", "te: trailers", [headers(fields=fields(("te", "trailers")))]),
    Case("8.2.3", "cookie crumbs", [headers(fields=fields(("cookie", "a=1"), ("cookie", "b=2")))]),
    Case("7541 6.1", "indexed", [h2.frame(h2.HEADERS, 5, 1, b"\x82\x86\x84" + literal(b":authority", b"a"))]),
    Case("7541 6.2.1", "incremental indexing, indexed name", [hpack_block(b"\x66\x01x")]),
    Case("7541 6.2.1", "incremental indexing, indexed name, Huffman", [hpack_block(b"\x58\x86\xa8\xeb\x10\x64\x9c\xbf")]),
    Case("7541 6.2.1", "incremental indexing, new name", [hpack_block(b"\x40\x01a\x01b")]),
    Case("7541 6.2.1", "incremental indexing, new name, Huffman",
         [hpack_block(b"\x40\x88\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f\x89\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf")]),
    Case("7541 6.2.2", "without indexing, indexed name", [hpack_block(b"\x0f\x17\x01x")]),
    Case("7541 6.2.2", "without indexing, new name", [hpack_block(b"\x00\x01a\x01b")]),
    Case("7541 6.2.3", "never indexed, indexed name", [hpack_block(b"\x1f\x17\x01x")]),
    Case("7541 6.2.3", "never indexed, new name", [hpack_block(b"\x10\x01a\x01b")]),
    Case("7541 6.3", "size update", [h2.frame(h2.HEADERS, 5, 1, b"\x3f\x61" + block())]),
    Case("7541 6.3", "two size updates", [h2.frame(h2.HEADERS, 5, 1, b"\x20\x3f\x61" + block())]),
    Case("7541 4.4", "entry larger than the table", [hpack_block(b"\x40\x01a\x7f\xa1\x21" + b"v" * 4384)]),
]  # fmt: skip


def frames_of(sent: bytes) -> Iterator[tuple[int, int]]:
    """Types and flags."""
    while sent:
        yield sent[3], sent[4]
        sent = sent[9 + int.from_bytes(sent[:3]) :]


@split
@pytest.mark.parametrize("case", ANSWERED, ids=str)
def test_is_answered(case: Case, split: bool):
    """What is allowed: the request is answered, and the connection works afterwards."""
    end = case.run(split)
    assert end.error is None, end.error
    assert end.answered(max(end.owned)), end.frames
    sent = b"".join([*([] if case.bare else [HELLO]), *case.pieces]).removeprefix(h2.PREFACE)
    assert end.acknowledged() == sum((type_, flags) == (h2.SETTINGS, 0) for type_, flags in frames_of(sent))
    assert end.alive()


# ---- errors of the connection --------------------------------------------------------------------------------------------------------------------------


def errors(section: str, title: str, *pieces: bytes, code: str = "PROTOCOL_ERROR", **more: Any) -> tuple[Case, str]:
    return Case(section, title, list(pieces), **more), code


SIZE, FLOW, CLOSED, COMPRESSION = "FRAME_SIZE_ERROR", "FLOW_CONTROL_ERROR", "STREAM_CLOSED", "COMPRESSION_ERROR"
OPEN = headers(fields=POST, end=False)
HALF_BLOCK = h2.frame(h2.HEADERS, 1, 1, block()[:10])
CONNECTION_ERRORS = [
    errors("3.4", "wrong preface", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", bare=True),
    errors("3.4", "wrong beginning of the preface", b"GET / HTTP/1.1\r\n", bare=True),
    errors("3.4", "preface without SETTINGS", h2.PREFACE + PING, bare=True),
    errors("3.4", "preface with acknowledged SETTINGS", h2.PREFACE + h2.frame(h2.SETTINGS, h2.ACK), bare=True),
    errors("4.2", "DATA too large", OPEN, data(payload=bytes(16_385)), code=SIZE),
    errors("4.2", "HEADERS too large", h2.frame(h2.HEADERS, 5, 1, bytes(16_385)), code=SIZE),
    errors("4.2", "SETTINGS too large", settings(dict.fromkeys(range(100, 2900), 1)), code=SIZE),
    errors("4.2", "unknown frame too large", h2.frame(0x77, 0, 0, bytes(16_385)), code=SIZE),
    errors("4.3", "invalid header block", h2.frame(h2.HEADERS, 5, 1, b"\x00\xff\xff\xff\xff\xff"), code=COMPRESSION),
    errors("4.3", "header block interrupted by PRIORITY", HALF_BLOCK, priority(1)),
    errors("4.3", "header block interrupted by HEADERS of another stream", HALF_BLOCK, headers(3)),
    errors("5.1", "idle: DATA", data()),
    errors("5.1", "idle: RST_STREAM", reset()),
    errors("5.1", "idle: WINDOW_UPDATE", update(1, 100)),
    errors("5.1", "idle: CONTINUATION", continuation(payload=block())),
    errors("5.1", "half closed (remote): CONTINUATION", headers(), continuation(payload=block()), answers=False),
    errors("5.1", "closed: HEADERS", headers(), headers(), code=CLOSED),
    errors("5.1", "closed: CONTINUATION", headers(), continuation(payload=block())),
    errors("5.1", "closed by RST_STREAM: CONTINUATION", OPEN, reset(), continuation(payload=block())),
    errors("5.1.1", "even identifier", headers(2)),
    errors("5.1.1", "identifier lower than an earlier one", headers(5), headers(3)),
    errors("5.1.1", "DATA on even stream", data(2)),
    errors("5.5", "unknown frame in the middle of a header block", HALF_BLOCK, h2.frame(0x16, 0, 0, bytes(8)), continuation(payload=block()[10:])),
    errors("6.1", "DATA on stream 0", data(0)),
    errors("6.1", "DATA with invalid padding", OPEN, h2.frame(h2.DATA, 9, 1, b"\x06test")),
    errors("6.1", "DATA padded by itself", OPEN, h2.frame(h2.DATA, 9, 1, b"\x05test")),
    errors("6.1", "DATA without its length of padding", OPEN, h2.frame(h2.DATA, 9, 1, b"")),
    errors("6.2", "HEADERS on stream 0", headers(0)),
    errors("6.2", "HEADERS on stream 0 that go on", h2.frame(h2.HEADERS, 0, 0, b"\x88")),
    errors("6.2", "HEADERS with invalid padding", h2.frame(h2.HEADERS, 5 | h2.PADDED, 1, b"\xff" + block())),
    errors("6.2", "HEADERS without END_HEADERS, and DATA", HALF_BLOCK, data()),
    errors("6.3", "PRIORITY on stream 0", priority(0, 1)),
    errors("6.3", "PRIORITY of 4 bytes", h2.frame(h2.PRIORITY, 0, 1, bytes(4)), code=SIZE),
    errors("6.4", "RST_STREAM on stream 0", reset(0)),
    errors("6.4", "RST_STREAM of 3 bytes", OPEN, h2.frame(h2.RST_STREAM, 0, 1, bytes(3)), code=SIZE),
    errors("6.5", "SETTINGS with ACK and payload", h2.frame(h2.SETTINGS, h2.ACK, 0, bytes(6)), code=SIZE),
    errors("6.5", "SETTINGS on a stream", h2.frame(h2.SETTINGS, 0, 1, bytes(6))),
    errors("6.5", "SETTINGS of 5 bytes", h2.frame(h2.SETTINGS, 0, 0, bytes(5)), code=SIZE),
    errors("6.5.2", "ENABLE_PUSH 2", settings({h2.PUSH: 2})),
    errors("6.5.2", "INITIAL_WINDOW_SIZE above the maximum", settings({h2.WINDOW: 1 << 31}), code=FLOW),
    errors("6.5.2", "MAX_FRAME_SIZE below the minimum", settings({h2.FRAME_SIZE: 16_383})),
    errors("6.5.2", "MAX_FRAME_SIZE above the maximum", settings({h2.FRAME_SIZE: 1 << 24})),
    errors("6.6", "PUSH_PROMISE of a client", OPEN, h2.frame(h2.PUSH_PROMISE, 4, 1, U32(2) + block())),
    errors("6.7", "PING on a stream", h2.frame(h2.PING, 0, 1, bytes(8))),
    errors("6.7", "PING of 6 bytes", h2.frame(h2.PING, 0, 0, bytes(6)), code=SIZE),
    errors("6.8", "GOAWAY on a stream", h2.frame(h2.GOAWAY, 0, 1, bytes(8))),
    errors("6.8", "GOAWAY of 7 bytes", h2.frame(h2.GOAWAY, 0, 0, bytes(7)), code=SIZE),
    errors("6.9", "WINDOW_UPDATE by 0", update(0, 0)),
    errors("6.9", "WINDOW_UPDATE of 3 bytes", h2.frame(h2.WINDOW_UPDATE, 0, 0, bytes(3)), code=SIZE),
    errors("6.9.1", "window of the connection overflows", update(0, MAX), update(0, MAX), code=FLOW),
    errors("6.9.2", "windows of streams overflow by SETTINGS", OPEN, update(1, MAX - 65_535), settings({h2.WINDOW: 65_536}), code=FLOW),
    errors("6.10", "CONTINUATION followed by DATA", HALF_BLOCK, continuation(payload=b"", end=False), data()),
    errors("6.10", "CONTINUATION on stream 0", HALF_BLOCK, continuation(0, block()[10:])),
    errors("6.10", "CONTINUATION after END_HEADERS", OPEN, continuation(payload=block())),
    errors("6.10", "CONTINUATION after CONTINUATION with END_HEADERS", HALF_BLOCK,
           continuation(payload=block()[10:]), continuation(payload=block()), answers=False),
    errors("6.10", "CONTINUATION after DATA", OPEN, data(end=False), continuation(payload=block())),
    errors("8.4", "PUSH_PROMISE", h2.frame(h2.PUSH_PROMISE, 4, 1, U32(2) + block())),
    errors("7541 2.3.3", "indexed field with invalid index", hpack_block(b"\xc7"), code=COMPRESSION),
    errors("7541 2.3.3", "literal with invalid index of the name", hpack_block(b"\x7f\x07\x01x"), code=COMPRESSION),
    errors("7541 4.2", "size update at the end of a block", hpack_block(b"\x20"), code=COMPRESSION),
    errors("7541 5.1", "integer too long", hpack_block(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), code=COMPRESSION),
    errors("7541 5.2", "Huffman padding longer than 7 bits", hpack_block(b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x49\x50\x9f\xff"), code=COMPRESSION),
    errors("7541 5.2", "Huffman padding of zeros", hpack_block(b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90"), code=COMPRESSION),
    errors("7541 5.2", "Huffman with EOS", hpack_block(b"\x00\x85\xf2\xb2\x4a\x87\xff\xff\xff\xfd\x25\x42\x7f"), code=COMPRESSION),
    errors("7541 5.2", "string longer than its block", hpack_block(b"\x00\x7f"), code=COMPRESSION),
    errors("7541 6.1", "index 0", hpack_block(b"\x80"), code=COMPRESSION),
    errors("7541 6.3", "size update beyond SETTINGS_HEADER_TABLE_SIZE", h2.frame(h2.HEADERS, 5, 1, b"\x3f\xe2\x1f" + block()), code=COMPRESSION),
]  # fmt: skip


@split
@pytest.mark.parametrize(("case", "code"), CONNECTION_ERRORS, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_is_an_error_of_the_connection(case: Case, code: str, split: bool):
    """GOAWAY with the code of the RFC, and nothing after it."""
    end = case.run(split)
    assert end.error is not None
    last = end.frames[-1]
    assert (last.type, last.code) == (h2.GOAWAY, code), end.frames[-3:]
    assert h2.error_name(end.error.code) == code


# ---- errors of a stream --------------------------------------------------------------------------------------------------------------------------------

STREAM_ERRORS = [
    errors("5.1", "half closed (remote): DATA", headers(), data(), code=CLOSED, answers=False),
    errors("5.1", "half closed (remote): HEADERS", headers(), headers(), code=CLOSED, answers=False),
    errors("5.1", "closed: DATA", headers(), data(), code=CLOSED),
    errors("5.1", "closed by RST_STREAM: DATA", OPEN, reset(), data(), code=CLOSED),
    errors("5.1", "closed by RST_STREAM: HEADERS", OPEN, reset(), headers(), code=CLOSED),
    errors("5.1.2", "more streams than allowed", headers(3, POST, end=False), headers(1 + 4, POST, end=False), headers(7), code="REFUSED_STREAM", answers=False,
           options={"max_concurrent_streams": 2}),
    errors("6.9", "WINDOW_UPDATE by 0 on a stream", OPEN, update(1, 0)),
    errors("6.9.1", "window of a stream overflows", OPEN, update(1, MAX), update(1, MAX), code=FLOW),
    errors("5.3.1", "HEADERS that depend on themselves", h2.frame(h2.HEADERS, 5 | h2.HAS_PRIORITY, 1, U32(1) + b"\x10" + block())),
    errors("5.3.1", "PRIORITY that depends on itself", priority(2, 2)),
]  # fmt: skip


@split
@pytest.mark.parametrize(("case", "code"), STREAM_ERRORS, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_is_an_error_of_a_stream(case: Case, code: str, split: bool):
    """RST_STREAM, or GOAWAY, with the code of the RFC."""
    end = case.run(split)
    codes = [frame.code for frame in end.frames if frame.type in {h2.RST_STREAM, h2.GOAWAY}]
    assert codes == [code] or (end.error is not None and codes == [code, code])
    assert end.error is not None or end.alive()


# ---- malformed messages --------------------------------------------------------------------------------------------------------------------------------

MALFORMED = [
    Case("8.1", "second HEADERS without END_STREAM", [OPEN, headers(fields=POST, end=False)]),
    Case("8.1", "trailers without END_STREAM", [OPEN, data(end=False), headers(fields=[("x-check", "1")], end=False)]),
    Case("8.2", "name in upper case", [headers(fields=fields(("X-Test", "1")))]),
    Case("8.2", "empty name", [headers(fields=fields(("", "1")))]),
    *[Case("8.2.1", f"name with {ord(char):#x}", [headers(fields=fields((f"x{char}y", "1")))]) for char in "\0\x01\t\n\r ,/:;<=>?@[]\\{}\"()\x7f"],
    Case("8.2.1", "name with a byte above 0x7f", [headers(extra=literal(b"x\xe4", b"1"))]),
    *[Case("8.2.1", f"value with {ord(char):#x}", [headers(fields=fields(("x", f"a{char}b")))]) for char in "\0\r\n"],
    Case("8.2.2", "connection", [headers(fields=fields(("connection", "keep-alive")))]),
    Case("8.2.2", "keep-alive", [headers(fields=fields(("keep-alive", "5")))]),
    Case("8.2.2", "proxy-connection", [headers(fields=fields(("proxy-connection", "keep-alive")))]),
    Case("8.2.2", "transfer-encoding", [headers(fields=fields(("transfer-encoding", "chunked")))]),
    Case("8.2.2", "upgrade", [headers(fields=fields(("upgrade", "h2c")))]),
    Case("8.2.2", "te other than trailers", [headers(fields=fields(("te", "trailers, deflate;q=0.5")))]),
    Case("8.3", "unknown pseudo field", [headers(fields=fields((":test", "test")))]),
    Case("8.3", "unknown pseudo field at the beginning", [headers(fields=[(":test", "test"), *GET])]),
    Case("8.3", "pseudo field of responses", [headers(fields=fields((":status", "200")))]),
    Case("8.3", "pseudo field in trailers", [OPEN, data(end=False), headers(fields=[(":method", "200")])]),
    Case("8.3", "pseudo field after a regular one", [headers(fields=[*GET[:3], ("x-test", "ok"), GET[3]])]),
    Case("8.3.1", "empty :path", [headers(fields=[*GET[:3], (":path", "")])]),
    *[Case("8.3.1", f"no {left_out[0]}", [headers(fields=[field_ for field_ in GET if field_ != left_out])]) for left_out in (GET[0], GET[1], GET[3])],
    *[Case("8.3.1", f"{twice[0]} twice", [headers(fields=[*GET, twice])]) for twice in GET],
    Case("8.3.1", "nothing at all", [h2.frame(h2.HEADERS, 5, 1, b"")]),
    Case("8.3.1", ":path without a slash", [headers(fields=[*GET[:3], (":path", "x")])]),
    Case("8.3.1", ":path with a space", [headers(fields=[*GET[:3], (":path", "/a b")])]),
    Case("8.3.1", "userinfo in :authority", [headers(fields=[*GET[:2], (":authority", "u@a.test"), GET[3]])]),
    Case("8.5", "CONNECT with :path", [headers(fields=[(":method", "CONNECT"), (":authority", "a:1"), (":path", "/")])]),
    Case("8.5", "CONNECT with :scheme", [headers(fields=[(":method", "CONNECT"), (":authority", "a:1"), (":scheme", "http")])]),
    Case("8.5", "CONNECT without :authority", [headers(fields=[(":method", "CONNECT")])]),
    Case("8441 4", ":protocol where it was not announced", [headers(fields=[(":method", "CONNECT"), *GET[1:], (":protocol", "websocket")])]),
    Case("8441 4", ":protocol without CONNECT", [headers(fields=[*GET, (":protocol", "websocket")])], options={"allow_connect": True}),
    Case("8.1.1", "content-length too long", [headers(fields=fields(("content-length", "9"), method="POST"), end=False), data()]),
    Case("8.1.1", "content-length too short", [headers(fields=fields(("content-length", "1"), method="POST"), end=False), data()]),
    Case("8.1.1", "content-length too short for several frames",
         [headers(fields=fields(("content-length", "1"), method="POST"), end=False), data(end=False), data()]),
    Case("8.1.1", "content-length too long for several frames",
         [headers(fields=fields(("content-length", "9"), method="POST"), end=False), data(end=False), data()]),
    Case("8.1.1", "content-length without a body", [headers(fields=fields(("content-length", "1"), method="POST"))]),
    Case("8.1.1", "content-length before trailers", [headers(fields=fields(("content-length", "9"), method="POST"), end=False), data(end=False),
                                                     headers(fields=[("x-check", "1")])]),
    Case("8.1.1", "content-length twice", [headers(fields=fields(("content-length", "0"), ("content-length", "1")))]),
    Case("8.1.1", "content-length that is none", [headers(fields=fields(("content-length", "-1")))]),
]  # fmt: skip


@split
@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_is_malformed(case: Case, split: bool):
    """An error PROTOCOL_ERROR of the stream or of the connection; nobody sees a whole request."""
    end = case.run(split)
    codes = [frame.code for frame in end.frames if frame.type in {h2.RST_STREAM, h2.GOAWAY}]
    assert codes == ["PROTOCOL_ERROR"]
    assert not any(owned.ended for owned in end.owned.values())
    assert not end.of(h2.HEADERS)


@split
@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_is_malformed_and_costs_only_its_stream(case: Case, split: bool):
    """With `override_stream_error_on_invalid_http_message` the connection goes on."""
    case = Case(case.section, case.title, case.pieces, options={**case.options, "stream_error_on_invalid_http_message": True})
    end = case.run(split)
    assert [frame.code for frame in end.of(h2.RST_STREAM, 1)] == ["PROTOCOL_ERROR"]
    assert not any(owned.ended for owned in end.owned.values())
    end.feed(headers(3))
    assert end.answered(3)
    assert end.alive()


@split
@pytest.mark.parametrize(
    "name",
    ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "X-Upper", ":path", ":unknown"],
)  # fmt: skip
def test_trailers_are_malformed(name: str, split: bool):
    """Trailers have neither pseudo fields nor those of a connection."""
    end = End().feed(HELLO, OPEN, data(end=False), headers(fields=[("x-check", "1"), (name, "1")]), split=split)
    assert [frame.code for frame in end.frames if frame.type in {h2.RST_STREAM, h2.GOAWAY}] == ["PROTOCOL_ERROR"]


# ---- flow control, PING, SETTINGS ----------------------------------------------------------------------------------------------------------------------


def sizes(end: End, stream: int = 1) -> list[int]:
    return [len(frame.payload) for frame in end.of(h2.DATA, stream)]


def acknowledges(end: End, count: int) -> bool:
    return end.acknowledged() == count


def by_one_byte(end: End) -> bool:
    return sizes(end) == [1]


CHECKS: list[tuple[Case, Callable[[End], bool]]] = [
    (Case("6.5.3", "SETTINGS are acknowledged", []), lambda end: acknowledges(end, 1)),
    (Case("6.5.3", "each SETTINGS is acknowledged", [settings({}), settings({h2.PUSH: 0})]), lambda end: acknowledges(end, 3)),
    (Case("6.5.3", "of several values the last holds", [h2.frame(h2.SETTINGS, 0, 0, h2.settings({h2.WINDOW: 100}) + h2.settings({h2.WINDOW: 1})), headers()]),
     by_one_byte),
    (Case("6.7", "PING is answered with its data", [PING]), lambda end: [(f.flags, f.payload) for f in end.of(h2.PING)] == [(h2.ACK, b"12345678")]),
    (Case("6.7", "PING with ACK is not answered", [h2.frame(h2.PING, h2.ACK, 0, b"invalid!")]), lambda end: not end.of(h2.PING) and end.acked == [b"invalid!"]),
    (Case("6.9.1", "one byte of window", [settings({h2.WINDOW: 1}), headers()]), by_one_byte),
    (Case("6.9.1", "no window", [settings({h2.WINDOW: 0}), headers()]), lambda end: sizes(end) == [] and len(end.of(h2.HEADERS, 1)) == 1),
    (Case("6.9.1", "one byte more", [settings({h2.WINDOW: 1}), headers(), update(1, 1)]), lambda end: sizes(end) == [1, 1]),
    (Case("6.9.1", "all the rest", [settings({h2.WINDOW: 1}), headers(), update(1, 1000)]), lambda end: sizes(end) == [1, len(BODY) - 1] and end.answered(1)),
    (Case("6.9.1", "the window of another stream is its own", [settings({h2.WINDOW: 0}), headers(), headers(3), update(3, 1000)]),
     lambda end: sizes(end) == [] and end.answered(3)),
    (Case("6.9.2", "SETTINGS open the windows of streams", [settings({h2.WINDOW: 0}), headers(), settings({h2.WINDOW: 1})]), by_one_byte),
    (Case("6.9.2", "a window below zero", [settings({h2.WINDOW: 3}), headers(), settings({h2.WINDOW: 2}), update(1, 2)]), lambda end: sizes(end) == [3, 1]),
    (Case("6.9.2", "a window far below zero", [settings({h2.WINDOW: 3}), headers(), settings({h2.WINDOW: 0}), update(1, 3), update(1, 1)]),
     lambda end: sizes(end) == [3, 1]),
    (Case("6.8", "after our GOAWAY of the first step streams are still taken", [headers()]), lambda end: end.answered(1)),
    (Case("8.1", "a response before the request has ended", [OPEN]), lambda end: not end.of(h2.HEADERS)),
]  # fmt: skip


@split
@pytest.mark.parametrize(("case", "check"), CHECKS, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_behaves(case: Case, check: Callable[[End], bool], split: bool):
    """What is to be seen on the wire."""
    end = case.run(split)
    assert check(end), end.frames
    assert end.alive()


def test_the_window_of_the_connection_holds_all_streams():
    """65,535 bytes for all, until it is opened: and then each has its turn (RFC 9113 6.9.1)."""
    end = End(answers=False).feed(HELLO, settings({h2.WINDOW: 1 << 20}), headers(1), headers(3))
    for number in (1, 3):
        stream = end.session.streams[number]
        stream.send_headers([(b":status", b"200")], False)
        stream.send_data(bytes(50_000), True)
    end.feed()
    end._take()
    assert sum(sizes(end, 1) + sizes(end, 3)) == 65_535
    assert sum(sizes(end, 1)) == 50_000
    end.feed(update(0, 100_000))
    assert sum(sizes(end, 3)) == 50_000
    assert end.of(h2.DATA, 3)[-1].flags & h2.END_STREAM


def test_a_peer_that_exceeds_its_window():
    """FLOW_CONTROL_ERROR (RFC 9113 6.9.1): of a stream, or of the connection."""
    end = End(answers=False, initial_stream_window_size=65_535, initial_connection_window_size=1 << 20)
    end.feed(HELLO, OPEN)
    end.session.streams[1].pause()
    end.feed(*[data(payload=bytes(16_384), end=False)] * 4)
    assert "FLOW_CONTROL_ERROR" in [frame.code for frame in end.frames if frame.type in {h2.RST_STREAM, h2.GOAWAY}]
    end = End(answers=False, initial_stream_window_size=1 << 20, initial_connection_window_size=65_535)
    end.feed(HELLO, OPEN)
    end.session.streams[1].pause()
    end.feed(*[data(payload=bytes(16_384), end=False)] * 4)
    assert [frame.code for frame in end.of(h2.GOAWAY)] == ["FLOW_CONTROL_ERROR"]


def test_padding_counts_against_windows_and_is_given_back():
    """RFC 9113 6.1: the whole payload of DATA, with its padding."""
    end = End(answers=False, initial_stream_window_size=65_535, initial_connection_window_size=65_535).feed(HELLO, OPEN)
    padded = h2.frame(h2.DATA, h2.PADDED, 1, b"\xff" + b"x" + bytes(255))
    for _ in range(1000):
        end.feed(padded)
    assert end.error is None
    assert end.owned[1].data == b"x" * 1000
    given = sum(int.from_bytes(frame.payload) for frame in end.of(h2.WINDOW_UPDATE, 1))
    assert 257_000 - given < 65_535


def test_going_away_in_two_steps():
    """RFC 9113 6.8: the first GOAWAY refuses nothing, the second names the last stream; what comes above it is passed over, the rest is served."""
    end = End(answers=False).feed(HELLO, headers(1))
    end.session.shutdown_notice()
    end.feed(headers(3))
    end.session.goaway()
    end.feed(headers(5), PING)
    assert [int.from_bytes(frame.payload[:4]) for frame in end.of(h2.GOAWAY)] == [MAX, 3]
    assert sorted(end.owned) == [1, 3]
    for number in (1, 3):
        end.session.streams[number].send_headers([(b":status", b"204")], True)
    end.feed(PING)
    assert [frame.stream for frame in end.of(h2.HEADERS)] == [1, 3]
    assert not end.session.streams


def test_header_blocks_of_refused_streams_are_still_decoded():
    """RFC 9113 4.3: the compression state is the connection's, whatever becomes of the stream."""
    indexed = b"\x40\x06x-kept\x05value"
    end = End(answers=False, max_concurrent_streams=1).feed(HELLO, headers(1, POST, end=False), headers(3, extra=indexed), reset(1), headers(5, extra=b"\xbe"))
    assert (b"x-kept", b"value") in end.owned[5].head
    end = End(answers=False).feed(HELLO, headers(1, POST, end=False), reset(1))
    end.session.goaway()
    end.feed(headers(3, extra=indexed))
    assert end.error is None
