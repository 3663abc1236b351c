"""The HTTP/1.1 codec: framing, strictness, pipelining."""

from __future__ import annotations

import pytest

from meshproxy.codec.h1.encode import encode_chunk, encode_request_head, encode_response_head, encode_trailers
from meshproxy.codec.h1.grammar import HeaderLines, ProtocolError, parse_header_line, parse_request_line
from meshproxy.codec.h1.parser import Heads, Options
from meshproxy.codec.h1.request import RequestParser
from meshproxy.codec.h1.response import ResponseParser
from meshproxy.codec.headers import Headers


class Recorder:
    """A sink that remembers its calls; data is joined, so that tests do not depend on how it was cut."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def on_headers(self, head, end_stream):
        if hasattr(head, "method"):
            self.events.append(("request", head.method, head.path, head.authority, tuple(head.items), end_stream))
        else:
            self.events.append(("response", head.status, tuple(head.items), end_stream))

    def on_known(self, known, body):
        self.events.append(("request", known.method, known.path, known.authority, tuple(known.items), not body))
        if body:
            self.events.append(("data", body, True))

    def on_whole(self, known, body):
        self.events.append(("response", known.status, tuple(known.items), not body))
        if body:
            self.events.append(("data", body, True))

    def on_data(self, data, end_stream):
        last = self.events[-1]
        if last[0] == "data" and not last[2]:
            self.events[-1] = ("data", last[1] + data, end_stream)
        elif data or end_stream:
            self.events.append(("data", data, end_stream))

    def on_trailers(self, trailers: Headers):
        self.events.append(("trailers", tuple(trailers.items)))


def parse_requests(data: bytes, **options):
    """All messages of `data`; the parser goes on after each, as a server does that answers at once."""
    sink = Recorder()
    parser = RequestParser(sink, Options(**options))
    parser.feed(data)
    while parser.done and parser.buffer:
        parser.next_message()
    return sink.events, parser


def parse_response(data: bytes, method: bytes = b"GET", *, tunnel: bool = False, **options):
    sink = Recorder()
    parser = ResponseParser(sink, Options(**options))
    parser.expect(method, tunnel=tunnel)
    parser.feed(data)
    return sink.events, parser


def refused(data: bytes, **options) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        parse_requests(data, **options)
    return caught.value


def test_a_request_without_a_body_ends_with_its_head():
    events, parser = parse_requests(b"GET /a?b=c HTTP/1.1\r\nHost: example.com\r\nX-Thing:  two words \r\n\r\n")
    assert events == [("request", b"GET", b"/a?b=c", b"example.com", ((b"x-thing", b"two words"),), True)]
    assert parser.done
    assert parser.keep_alive


def test_content_length_body_and_pipelined_requests():
    events, parser = parse_requests(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET /2 HTTP/1.1\r\nHost: b\r\n\r\nGET /3")
    assert [event[0] for event in events] == ["request", "data", "request"]
    assert events[1] == ("data", b"abc", True)
    parser.next_message()
    assert not parser.done
    assert parser.buffer == b"GET /3"


def test_chunked_body_with_extensions_and_dropped_trailers():
    data = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-Trailer: 1\r\n\r\n"
    events, parser = parse_requests(data)
    assert events[1:] == [("data", b"abc0123456789", True)]
    events, _ = parse_requests(data, trailers=True)
    assert events[1:] == [("data", b"abc0123456789", False), ("trailers", ((b"x-trailer", b"1"),))]
    assert parser.done


def test_absolute_form_replaces_host():
    events, _ = parse_requests(b"GET http://other:81/?q HTTP/1.1\r\nHost: a\r\n\r\n")
    assert events[0][2:4] == (b"/?q", b"other:81")
    events, _ = parse_requests(b"GET http://other HTTP/1.1\r\nHost: a\r\n\r\n")
    assert events[0][2:4] == (b"/", b"other")
    events, _ = parse_requests(b"GET http://other/ HTTP/1.1\r\nHost: a\r\n\r\n", absolute_url=False)
    assert events[0][2:4] == (b"http://other/", b"a")
    assert refused(b"GET http://other:99999/ HTTP/1.1\r\nHost: a\r\n\r\n").details == "http1.invalid_url"


def test_methods_that_nobody_knows_are_refused_unless_allowed():
    assert refused(b"GETX / HTTP/1.1\r\nHost: a\r\n\r\n").status == 400
    events, _ = parse_requests(b"GETX / HTTP/1.1\r\nHost: a\r\n\r\n", any_method=True)
    assert events[0][1] == b"GETX"


def test_versions_other_than_1_1_need_an_upgrade():
    assert refused(b"GET / HTTP/2.0\r\nHost: a\r\n\r\n").status == 426
    assert refused(b"GET /\r\n\r\n").status == 426
    assert refused(b"GET / HTTP/1.0\r\n\r\n", accept_http_10=False).status == 426


def test_what_is_no_http_is_refused_at_once():
    assert refused(b"\x16\x03\x01").status == 400
    assert refused(b"EHLO there\r\n").status == 400


def test_http_10_and_connection_headers():
    _, parser = parse_requests(b"GET / HTTP/1.0\r\n\r\n")
    assert not parser.keep_alive
    _, parser = parse_requests(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
    assert parser.keep_alive
    _, parser = parse_requests(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: foo, close\r\n\r\n")
    assert not parser.keep_alive


@pytest.mark.parametrize(
    ("lines", "stays"),
    [
        (b"Connection: close\r\n", False),
        (b"Connection: Close\r\n", False),
        (b"Connection: CLOSE\r\n", False),
        (b"Connection: keep-alive\r\n", True),
        (b"Connection: close\r\nConnection: keep-alive\r\n", False),
        (b"Connection: keep-alive\r\nProxy-Connection: close\r\n", False),
        (b"Connection: close\r\nProxy-Connection: keep-alive\r\n", False),
        (b"Connection: keep-alive\r\nExpect: 100-continue\r\n", True),
        (b"Connection: close\r\nExpect: 100-continue\r\n", False),
        (b"Connection: close\r\nTransfer-Encoding: chunked\r\n", False),
    ],
)
@pytest.mark.parametrize("length", [0, 3])
def test_whether_a_connection_stays_is_said_in_one_place_or_several(lines, stays, length):
    chunked = b"chunked" in lines
    body = b"3\r\nabc\r\n0\r\n\r\n" if chunked else b"abc"[:length]
    framing = b"" if chunked or not length else b"Content-Length: 3\r\n"
    events, parser = parse_requests(b"POST / HTTP/1.1\r\nHost: a\r\n" + framing + lines + b"\r\n" + body)
    assert parser.keep_alive == stays
    assert parser.done
    assert parser.expect_continue == (b"Expect" in lines)
    assert [event[1] for event in events if event[0] == "data"] == ([b"abc"] if chunked or length else [])


def test_close_goes_no_further_than_the_parser():
    for data in (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: y\r\n\r\n", b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: y\r\n\r\n"):
        events, _ = parse_requests(data)
        assert events == [("request", b"GET", b"/", b"a", ((b"x", b"y"),), True)]


def test_an_upgrade_starts_a_tunnel_but_h2c_does_not():
    events, parser = parse_requests(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nraw")
    assert parser.upgrade == b"websocket"
    assert events[0][-1] is False
    assert events[1] == ("data", b"raw", False)
    events, parser = parse_requests(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n")
    assert parser.upgrade is None
    assert events[0][-1] is True


def test_connect_takes_its_authority_from_the_target():
    events, _ = parse_requests(b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\nbytes")
    assert events == [("request", b"CONNECT", b"", b"example.com:443", (), False), ("data", b"bytes", False)]


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Content-Length: 05\r\n\r\n",
        HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n",
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n",
        HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
        HEAD + b"Content-Length: 1, 1\r\n\r\n",
        HEAD + b"Content-Length: +5\r\n\r\n",
        HEAD + b"Content-Length: -0\r\n\r\n",
        HEAD + b"Content-Length: 0x5\r\n\r\n",
        HEAD + b"Content-Length: 5 5\r\n\r\n",
        HEAD + b"Content-Length: 1_0\r\n\r\n",
        HEAD + b"Content-Length:\r\n\r\n",
        HEAD + b"Content-Length: 9223372036854775808\r\n\r\n",
        HEAD + b"Content-Length: \xb2\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nNo colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n: empty\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX\x00Y: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / http/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.32\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n",
        b"G@T / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        CHUNKED + b"3\nabc\r\n0\r\n\r\n",
        CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"3\r\nabcX7\r\n",
        CHUNKED + b"3\r\nabc\r\r\n0\r\n\r\n",
        CHUNKED + b"0x3\r\nabc\r\n",
        CHUNKED + b"+3\r\nabc\r\n",
        CHUNKED + b" 3\r\nabc\r\n",
        CHUNKED + b"1_0\r\nabc\r\n",
        CHUNKED + b"11111111111111111\r\n",
        CHUNKED + b"ffffffffffffffff\r\n",
        CHUNKED + b"3;" + b"x" * 5000 + b"\r\nabc\r\n",
        CHUNKED + b"0\r\nbad trailer\r\n\r\n",
        CHUNKED + b"0\r\nX: a\nb: c\r\n\r\n",
        CHUNKED + b"\r\nabc",
    ],
)
def test_ambiguous_or_malformed_requests_are_refused(data: bytes):
    assert refused(data).status == 400


@pytest.mark.parametrize("value", [b"chunked\r\nTransfer-Encoding: chunked", b"chunked, identity", b",chunked", b"gzip, chunked", b"identity", b""])
def test_codings_other_than_chunked_are_not_implemented(value: bytes):
    assert refused(HEAD + b"Transfer-Encoding: " + value + b"\r\n\r\n").status == 501


def test_unknown_transfer_coding_is_501():
    assert refused(HEAD + b"Transfer-Encoding: gzip\r\n\r\n").status == 501


def test_limits():
    assert refused(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70000).status == 431
    assert refused(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 101 + b"\r\n").status == 431
    assert refused(CHUNKED + b"0\r\n" + b"X: 1\r\n" * 101).status == 431


def test_responses_are_framed_by_request_method_and_status():
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    assert parse_response(ok)[0][1:] == [("data", b"hi", True)]
    events, parser = parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"HEAD")
    assert events[0][-1] is True
    assert parser.done
    for status, length in ((b"204 No Content", b"0"), (b"304 Not Modified", b"5")):
        events, parser = parse_response(b"HTTP/1.1 " + status + b"\r\nContent-Length: " + length + b"\r\n\r\n")
        assert events[0][-1] is True
        assert parser.done
    with pytest.raises(ProtocolError):
        parse_response(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n")


def test_a_response_without_length_lasts_until_the_connection_closes():
    events, parser = parse_response(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    assert not parser.keep_alive
    assert not parser.done
    assert parser.feed_eof()
    assert events[-1] == ("data", b"all of it", True)
    _, parser = parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut")
    assert not parser.feed_eof()


def test_informational_responses_come_before_the_final_one():
    events, parser = parse_response(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert [event[1] for event in events] == [100, 103, 200]
    assert parser.done


def test_switching_protocols_only_when_asked():
    events, _ = parse_response(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nraw", tunnel=True)
    assert events[-1] == ("data", b"raw", False)
    with pytest.raises(ProtocolError):
        parse_response(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    ],
)
def test_malformed_responses_are_refused(data: bytes):
    with pytest.raises(ProtocolError):
        parse_response(data)


def test_case_is_remembered_only_when_asked():
    class HeadKeeper(Recorder):
        def on_headers(self, head, end_stream):
            self.head = head

    sink = HeadKeeper()
    RequestParser(sink, Options(keep_case=True)).feed(b"GET / HTTP/1.1\r\nHost: a\r\nX-FoO: 1\r\nX-foo: 2\r\n\r\n")
    assert sink.head.case == {b"host": b"Host", b"x-foo": b"X-FoO"}
    RequestParser(sink, Options()).feed(b"GET / HTTP/1.0\r\nHost: a\r\nX-FoO: 1\r\n\r\n")
    assert sink.head.case is None


def test_encoding():
    assert encode_request_head(b"GET", b"/", b"a", [(b"x", b"1")]) == b"GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n\r\n"
    assert encode_response_head(200, []) == b"HTTP/1.1 200 OK\r\n\r\n"
    assert encode_response_head(299, [(b"a", b"b")]) == b"HTTP/1.1 299 Unknown\r\na: b\r\n\r\n"
    assert encode_chunk(b"abc") + encode_trailers([(b"t", b"1")]) == b"3\r\nabc\r\n0\r\nt: 1\r\n\r\n"


def test_the_line_memo_is_bounded():
    lines = HeaderLines(limit=4)
    for number in range(10):
        assert lines[b"X-%d: v" % number] == (b"x-%d" % number, b"v")
    assert len(lines) <= 4
    assert lines[b"X-Request-Id: 1"] == (b"x-request-id", b"1")
    assert b"X-Request-Id: 1" not in lines


@pytest.mark.parametrize("line", [b"X-Seen: a\x7f", b"X-Seen: a\0b", b"X-Seen", b"X-Seen : a", b"X Seen: a", b": a", b"Host: a b", b"host: \x01"])
def test_a_name_that_is_known_does_not_excuse_the_rest(line):
    assert parse_header_line(b"X-Seen: a\tb \xff ") == (b"x-seen", b"a\tb \xff")
    assert parse_header_line(b"Host: a") == (b"host", b"a")
    for _ in range(2):
        with pytest.raises(ProtocolError):
            parse_header_line(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET /a?b HTTP/1.1", (b"GET", b"/a?b", 11)),
        (b"OPTIONS * HTTP/1.0", (b"OPTIONS", b"*", 10)),
        (b"GET  HTTP/1.1", None),
        (b"GET / HTTP/1.1 ", None),
        (b"GET /\x7f HTTP/1.1", None),
        (b"GET /\xe9 HTTP/1.1", None),
        (b"PLEASE / HTTP/1.1", None),
        (b"GET / HTTP/2.0", None),
    ],
)
def test_request_lines(line, expected):
    if expected is not None:
        assert parse_request_line(line) == expected
    else:
        with pytest.raises(ProtocolError):
            parse_request_line(line)


def test_methods_that_nobody_knows():
    assert parse_request_line(b"PLEASE / HTTP/1.1", any_method=True) == (b"PLEASE", b"/", 11)
    with pytest.raises(ProtocolError):
        parse_request_line(b"PLE@SE / HTTP/1.1", any_method=True)


def test_setting_a_header():
    head = Headers([(b"a", b"1"), (b"b", b"2"), (b"c", b"3")])
    head.set(b"b", b"x")
    head.set(b"d", b"4")
    assert head.items == [(b"a", b"1"), (b"b", b"x"), (b"c", b"3"), (b"d", b"4")]
    assert (head.get(b"b"), head.get(b"d")) == (b"x", b"4")
    head = Headers([(b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"a", b"4")])
    head.set(b"a", b"x")
    assert head.items == [(b"a", b"x"), (b"b", b"2")]
    assert (head.get(b"a"), len(head)) == (b"x", 2)


def test_only_heads_that_come_twice_are_remembered():
    class Sink(Recorder):
        def on_known(self, known, body):
            head = known.head()
            assert head.items == known.items == [(b"a", b"1")]
            assert known.kept == (head.items is not known.items)
            head.add(b"b", b"2")
            self.events.append((known.path, known.kept))

    sink, options = Sink(), Options()
    parser = RequestParser(sink, options)
    for path in (b"/a", b"/b", b"/a", b"/a", b"/c"):
        parser.feed(b"GET %b HTTP/1.1\r\nHost: a\r\nA: 1\r\n\r\n" % path)
        parser.next_message()
    assert sink.events == [(b"/a", False), (b"/b", False), (b"/a", True), (b"/a", True), (b"/c", False)]
    assert [known.path for known in options.heads.values()] == [b"/a"]


def test_the_memory_of_heads_is_bounded():
    heads = Heads(limit=2)
    for number in range(5000):
        head = b"%d" % number
        assert heads.is_new(head)
        assert not heads.is_new(head)
        heads.remember(head, number)
    assert len(heads) <= 2
    assert len(heads._once) <= Heads._MAX_ONCE
