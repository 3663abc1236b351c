"""The HTTP/1.1 codec: any split gives the same result, any garbage gives a ProtocolError and nothing else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.codec.h1.grammar import ProtocolError
from meshproxy.codec.h1.parser import Options
from meshproxy.codec.h1.request import RequestParser
from meshproxy.codec.h1.response import ResponseParser
from tests.unit.test_h1 import Recorder

MESSAGES = [
    b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\nPOST /b?c HTTP/1.1\r\nhost: b\r\nContent-Length: 5\r\nX: y\r\n\r\nhello",
    b"PUT / HTTP/1.1\r\nHost: c\r\nTransfer-Encoding: chunked\r\n\r\n4;e=1\r\nwiki\r\n5\r\npedia\r\n0\r\nT: 1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: c\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwikiX",
    b"GET / HTTP/1.1\r\nHost: d\r\nBad Header\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\n",
]
RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.0 404 Not Found\r\n\r\nuntil the end",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]


def run(parser_class, data: bytes, cuts: list[int]):
    """What a parser says to `data` cut at `cuts`: the events, and the error's status or None."""
    sink = Recorder()
    parser = parser_class(sink, Options(trailers=True))
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    try:
        for start, end in itertools.pairwise(edges):
            if data[start:end]:
                parser.feed(data[start:end])
            while parser.done and parser.buffer and parser_class is RequestParser:
                parser.next_message()
    except ProtocolError as error:
        return sink.events, error.status
    return sink.events, None


def without_partial_data(result):
    """How much of a body was seen before an error may depend on the cut."""
    events, error = result
    if error is not None and events and events[-1][0] == "data" and not events[-1][2]:
        events = events[:-1]
    return events, error


@pytest.mark.parametrize("message", MESSAGES)
def test_every_single_cut_of_a_request(message: bytes):
    whole = without_partial_data(run(RequestParser, message * 2, []))
    for cut in range(len(message) * 2):
        assert without_partial_data(run(RequestParser, message * 2, [cut])) == whole
    assert without_partial_data(run(RequestParser, message * 2, list(range(len(message) * 2)))) == whole


@pytest.mark.parametrize("message", RESPONSES)
def test_every_single_cut_of_a_response(message: bytes):
    whole = without_partial_data(run(ResponseParser, message, []))
    for cut in range(len(message)):
        assert without_partial_data(run(ResponseParser, message, [cut])) == whole
    assert without_partial_data(run(ResponseParser, message, list(range(len(message))))) == whole


LINE = st.sampled_from(
    [b"Host: a", b"Content-Length: 3", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Connection: close", b"X: \xff", b"Y:", b"bad", b"Upgrade: x"]
)


@settings(max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(lambda lines, body: b"POST /x HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body, st.lists(LINE, max_size=6), st.binary(max_size=40)),
        st.builds(
            lambda body: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body,
            st.text(alphabet="0123abcF;\r\n x", max_size=40).map(str.encode),
        ),
    ),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_garbage_is_refused_or_understood_alike_however_it_is_cut(data: bytes, cuts: list[int]):
    assert without_partial_data(run(RequestParser, data, cuts)) == without_partial_data(run(RequestParser, data, []))


@settings(max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(lambda lines, body: b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body, st.lists(LINE, max_size=6), st.binary(max_size=40)),
    ),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_garbage_from_upstream(data: bytes, cuts: list[int]):
    assert without_partial_data(run(ResponseParser, data, cuts)) == without_partial_data(run(ResponseParser, data, []))
