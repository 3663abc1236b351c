"""A client's side of HTTP/2 by the book, RFC 9113 and 7541, in process: what servers may send, and what they may not. Named by section.

Each case is fed whole and byte by byte, after the server's SETTINGS, to a session that has sent a GET on stream 1 (and on 3, if it says so).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.conformance.http2_peer import GET, PING, End, block, continuation, data, literal, priority, reset, settings, update
from tests.conformance.http2_peer import headers as request_headers
from tests.differential import http2_wire as h2

U32 = struct.Struct(">I").pack
MAX = (1 << 31) - 1
OK = [(":status", "200")]


def headers(stream: int = 1, fields: list[tuple[str, str]] | None = None, *, end: bool = True, **more: Any) -> bytes:
    """The head of a response."""
    return request_headers(stream, OK if fields is None else fields, end=end, **more)


def status(code: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [(":status", code), *more]


@dataclass
class Case:
    """`pieces` after the server's SETTINGS (unless `bare`)."""

    section: str
    title: str
    pieces: list[bytes]
    bare: bool = False
    requests: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, split: bool) -> End:
        end = End(client=True, requests=self.requests, **self.options)
        return end.feed(*([] if self.bare else [settings({})]), *self.pieces, split=split)

    def __str__(self) -> str:
        return f"{self.section} {self.title}".replace(" ", "_")


split = pytest.mark.parametrize("split", [False, True], ids=["whole", "bytes"])
HEAD = headers(end=False)

# ---- what must be taken: the case, and the data that the owner of stream 1 has at its end

TAKEN = [
    (Case("8.1", "head only", [headers()]), b""),
    (Case("8.1", "head and data", [HEAD, data()]), b"test"),
    (Case("8.1", "data in several frames", [HEAD, data(end=False), data(end=False), data()]), b"testtesttest"),
    (Case("8.1", "end by empty DATA", [HEAD, data(end=False), data(payload=b"")]), b"test"),
    (Case("8.1", "trailers", [HEAD, data(end=False), headers(fields=[("x-t", "1")])]), b"test"),
    (Case("8.1", "trailers without data", [HEAD, headers(fields=[("x-t", "1")])]), b""),
    (Case("8.1", "informational heads", [headers(fields=status("103"), end=False), headers(fields=status("103"), end=False), HEAD, data()]), b"test"),
    (Case("8.1", "100 before the head", [headers(fields=status("100"), end=False), HEAD, data()]), b"test"),
    (Case("8.1.1", "content-length", [headers(fields=status("200", ("content-length", "8")), end=False), data(end=False), data()]), b"testtest"),
    (Case("8.1.1", "content-length of 304 without a body", [headers(fields=status("304", ("content-length", "9")))]), b""),
    (Case("8.1", "RST_STREAM NO_ERROR after a whole response", [HEAD, data(), reset(code=h2.NO_ERROR)]), b"test"),
    (Case("6.1", "padding", [HEAD, h2.frame(h2.DATA, 9, 1, b"\x03test" + bytes(3))]), b"test"),
    (Case("6.2", "HEADERS with padding and priority",
          [h2.frame(h2.HEADERS, 4 | h2.PADDED | h2.HAS_PRIORITY, 1, b"\x01" + U32(0) + b"\x10" + block(OK) + b"\0"), data()]), b"test"),
    (Case("6.10", "CONTINUATION", [h2.frame(h2.HEADERS, 0, 1, block(OK)[:4]), continuation(payload=block(OK)[4:]), data()]), b"test"),
    (Case("6.3", "PRIORITY", [priority(1), HEAD, priority(3), data()]), b"test"),
    (Case("4.1", "unknown frames", [HEAD, h2.frame(0x42, 0xFF, 1, b"abc"), h2.frame(0x43, 0, 0, b""), data()]), b"test"),
    (Case("6.5", "SETTINGS later", [HEAD, settings({h2.WINDOW: 100, h2.MAX_STREAMS: 7}), data()]), b"test"),
    (Case("6.5.2", "ENABLE_PUSH 0 of a server", [settings({h2.PUSH: 0}), HEAD, data()]), b"test"),
    (Case("6.7", "PING", [PING, HEAD, data()]), b"test"),
    (Case("6.8", "GOAWAY that covers the stream", [h2.frame(h2.GOAWAY, 0, 0, U32(1) + U32(0)), HEAD, data()]), b"test"),
    (Case("6.8", "GOAWAY in two steps", [h2.frame(h2.GOAWAY, 0, 0, U32(MAX) + U32(0)), HEAD, h2.frame(h2.GOAWAY, 0, 0, U32(1) + U32(0)), data()]), b"test"),
    (Case("6.9", "WINDOW_UPDATE", [update(0, 1000), update(1, 1000), HEAD, data(), update(1, 1)]), b"test"),
    (Case("5.1", "streams beside each other", [headers(3, end=False), HEAD, data(3), data()], requests=2), b"test"),
    (Case("7541 6.3", "size update", [h2.frame(h2.HEADERS, 4, 1, b"\x3f\x61" + block(OK)), data()]), b"test"),
]  # fmt: skip


@split
@pytest.mark.parametrize(("case", "body"), TAKEN, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_is_taken(case: Case, body: bytes, split: bool):
    """The response arrives whole."""
    end = case.run(split)
    assert end.error is None, end.error
    owned = end.owned[1]
    assert owned.reset is None
    assert (owned.ended, owned.done, owned.data) == (True, True, body)


def errors(section: str, title: str, *pieces: bytes, code: str = "PROTOCOL_ERROR", **more: Any) -> tuple[Case, str]:
    return Case(section, title, list(pieces), **more), code


SIZE, FLOW, CLOSED, COMPRESSION = "FRAME_SIZE_ERROR", "FLOW_CONTROL_ERROR", "STREAM_CLOSED", "COMPRESSION_ERROR"
CONNECTION_ERRORS = [
    errors("3.4", "no SETTINGS at first", PING, bare=True),
    errors("3.4", "HTTP/1.1", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", bare=True, code=SIZE),
    errors("4.2", "frame too large", HEAD, data(payload=bytes(16_385)), code=SIZE),
    errors("4.3", "header block interrupted", h2.frame(h2.HEADERS, 0, 1, block(OK)[:4]), data()),
    errors("5.1", "HEADERS on idle stream", headers(9)),
    errors("5.1", "HEADERS on idle stream that go on", h2.frame(h2.HEADERS, 0, 9, b"\x88")),
    errors("5.1", "DATA on idle stream", data(9)),
    errors("5.1", "RST_STREAM on idle stream", reset(9)),
    errors("5.1", "WINDOW_UPDATE on idle stream", update(9, 1)),
    errors("5.1", "DATA before HEADERS", data()),
    errors("5.1.1", "HEADERS on even stream that was not promised", headers(2)),
    errors("6.1", "DATA on stream 0", data(0)),
    errors("6.1", "invalid padding", HEAD, h2.frame(h2.DATA, 9, 1, b"\x09test")),
    errors("6.2", "HEADERS on stream 0", headers(0)),
    errors("6.2", "HEADERS on stream 0 that go on", h2.frame(h2.HEADERS, 0, 0, b"\x88")),
    errors("6.4", "RST_STREAM on stream 0", reset(0)),
    errors("6.4", "RST_STREAM of 5 bytes", h2.frame(h2.RST_STREAM, 0, 1, bytes(5)), code=SIZE),
    errors("6.5", "SETTINGS of 7 bytes", h2.frame(h2.SETTINGS, 0, 0, bytes(7)), code=SIZE),
    errors("6.5", "SETTINGS on a stream", h2.frame(h2.SETTINGS, 0, 1, bytes(6))),
    errors("6.5", "ACK with payload", h2.frame(h2.SETTINGS, h2.ACK, 0, bytes(6)), code=SIZE),
    errors("6.5.2", "ENABLE_PUSH 1 of a server", settings({h2.PUSH: 1})),
    errors("6.5.2", "INITIAL_WINDOW_SIZE above the maximum", settings({h2.WINDOW: 1 << 31}), code=FLOW),
    errors("6.5.2", "MAX_FRAME_SIZE below the minimum", settings({h2.FRAME_SIZE: 1})),
    errors("8441 3", "ENABLE_CONNECT_PROTOCOL is taken back", settings({h2.CONNECT_PROTOCOL: 1}), settings({h2.CONNECT_PROTOCOL: 0})),
    errors("8441 3", "ENABLE_CONNECT_PROTOCOL 2", settings({h2.CONNECT_PROTOCOL: 2})),
    errors("6.6", "PUSH_PROMISE although we said no", h2.frame(h2.PUSH_PROMISE, 4, 1, U32(2) + block(GET))),
    errors("6.7", "PING of 7 bytes", h2.frame(h2.PING, 0, 0, bytes(7)), code=SIZE),
    errors("6.8", "GOAWAY of 4 bytes", h2.frame(h2.GOAWAY, 0, 0, bytes(4)), code=SIZE),
    errors("6.9", "WINDOW_UPDATE by 0", update(0, 0)),
    errors("6.9.1", "window of the connection overflows", update(0, MAX), code=FLOW),
    errors("6.10", "CONTINUATION alone", continuation(payload=block(OK))),
    errors("7541 2.3.3", "invalid index", headers(extra=b"\xff\x40"), code=COMPRESSION),
    errors("7541 6.1", "index 0", headers(extra=b"\x80"), code=COMPRESSION),
]  # fmt: skip


@split
@pytest.mark.parametrize(("case", "code"), CONNECTION_ERRORS, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_is_an_error_of_the_connection(case: Case, code: str, split: bool):
    """GOAWAY with the code of the RFC, and nothing after it."""
    end = case.run(split)
    assert end.error is not None
    last = end.frames[-1]
    assert (last.type, last.code) == (h2.GOAWAY, code), end.frames[-3:]


MALFORMED = [
    Case("8.3.2", "no :status", [headers(fields=[("x-a", "1")])]),
    Case("8.3.2", ":status twice", [headers(fields=[*OK, *OK])]),
    *[Case("8.3.2", f":status {value!r}", [headers(fields=status(value))]) for value in ("", "20", "2000", "abc", "2x0", " 200", "+20", "099")],
    Case("8.3.2", ":status after a regular field", [headers(fields=[("x-a", "1"), *OK])]),
    Case("8.3", "pseudo field of requests", [headers(fields=status("200", (":path", "/")))]),
    Case("8.3", "unknown pseudo field", [headers(fields=status("200", (":what", "1")))]),
    Case("8.3", "nothing at all", [h2.frame(h2.HEADERS, 5, 1, b"")]),
    Case("8.6", "101", [headers(fields=status("101"), end=False)]),
    Case("8.1", "informational head that ends the stream", [headers(fields=status("103"))]),
    Case("8.1", "second head", [HEAD, headers(end=False)]),
    Case("8.1", "trailers without END_STREAM", [HEAD, data(end=False), headers(fields=[("x-t", "1")], end=False)]),
    Case("8.1", "trailers with :status", [HEAD, data(end=False), headers()]),
    *[Case("8.2.2", name, [headers(fields=status("200", (name, "x")))]) for name in ("connection", "keep-alive", "proxy-connection", "transfer-encoding",
            "upgrade")],
    Case("8.2", "name in upper case", [headers(fields=status("200", ("X-A", "1")))]),
    *[Case("8.2.1", f"value with {ord(char):#x}", [headers(fields=status("200", ("x", f"a{char}b")))]) for char in "\0\r\n"],
    Case("8.2.1", "name with a byte above 0x7f", [headers(extra=literal(b"x\xe4", b"1"))]),
    Case("8.1.1", "content-length too long", [headers(fields=status("200", ("content-length", "9")), end=False), data()]),
    Case("8.1.1", "content-length too short", [headers(fields=status("200", ("content-length", "3")), end=False), data()]),
    Case("8.1.1", "content-length without a body", [headers(fields=status("200", ("content-length", "3")))]),
    Case("8.1.1", "content-length twice", [headers(fields=status("200", ("content-length", "0"), ("content-length", "1")))]),
    Case("8.1.1", "content-length that is none", [headers(fields=status("200", ("content-length", "x")))]),
]  # fmt: skip


@split
@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_is_malformed(case: Case, split: bool):
    """An error PROTOCOL_ERROR of the stream or of the connection; nobody sees a whole response."""
    end = case.run(split)
    assert [frame.code for frame in end.frames if frame.type in {h2.RST_STREAM, h2.GOAWAY}] == ["PROTOCOL_ERROR"]
    assert not end.owned[1].ended


@split
@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_is_malformed_and_costs_only_its_stream(case: Case, split: bool):
    """With `override_stream_error_on_invalid_http_message` the other response on the connection arrives."""
    options = {"stream_error_on_invalid_http_message": True}
    end = Case(case.section, case.title, case.pieces, requests=2, options=options).run(split)
    assert [frame.code for frame in end.of(h2.RST_STREAM, 1)] == ["PROTOCOL_ERROR"]
    reset_by_us = end.owned[1].reset
    assert reset_by_us is not None
    assert not reset_by_us[2]
    end.feed(headers(3, end=False), data(3))
    assert (end.owned[3].ended, end.owned[3].data, end.error) == (True, b"test", None)


# ---- what owners hear --------------------------------------------------------------------------------------------------------------------------------

RESETS: list[tuple[Case, Callable[[End], bool]]] = [
    (Case("6.4", "RST_STREAM before the head", [reset(code=h2.CANCEL)]), lambda end: end.owned[1].reset[::2] == (h2.CANCEL, True)),
    (Case("6.4", "RST_STREAM REFUSED_STREAM", [reset(code=h2.REFUSED_STREAM)]), lambda end: end.owned[1].reset[::2] == (h2.REFUSED_STREAM, True)),
    (Case("6.4", "RST_STREAM with an unknown code", [HEAD, reset(code=77)]), lambda end: end.owned[1].reset[::2] == (77, True)),
    (Case("6.8", "GOAWAY that does not cover the stream", [h2.frame(h2.GOAWAY, 0, 0, U32(0) + U32(0))]),
     lambda end: end.owned[1].reset[::2] == (h2.REFUSED_STREAM, True) and end.error is None),
    (Case("6.8", "GOAWAY that covers one of two", [h2.frame(h2.GOAWAY, 0, 0, U32(1) + U32(0)), HEAD, data()], requests=2),
     lambda end: end.owned[1].ended and end.owned[3].reset[::2] == (h2.REFUSED_STREAM, True)),
]  # fmt: skip


@split
@pytest.mark.parametrize(("case", "check"), RESETS, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_owners_hear_of_the_end(case: Case, check: Callable[[End], bool], split: bool):
    """By whom, and why; what was never processed is told to be refused."""
    assert check(case.run(split))


def test_no_more_streams_than_the_server_allows():
    """MAX_CONCURRENT_STREAMS of the server (RFC 9113 5.1.2) and its GOAWAY bound what can be opened."""
    end = End(client=True, requests=2).feed(settings({h2.MAX_STREAMS: 3}))
    assert end.session.free == 1
    end.feed(headers(1))
    assert end.session.free == 2
    end.feed(settings({h2.MAX_STREAMS: 0}))
    assert end.session.free <= 0
    end.feed(settings({h2.MAX_STREAMS: 100}), h2.frame(h2.GOAWAY, 0, 0, U32(3) + U32(0)))
    assert end.session.free == 0
    end.feed(headers(3))
    assert end.owned[3].done
