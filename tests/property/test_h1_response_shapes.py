"""Response heads of one shape: what is recognised by its shape is what the parser makes of it, and nothing is that the parser would refuse."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from meshproxy.codec.h1.grammar import ProtocolError
from meshproxy.codec.h1.parser import DONE, Options
from meshproxy.codec.h1.response import KnownResponse, ResponseParser
from meshproxy.codec.h1.response_shapes import ResponseHeadShape

LEARN = 6
LINES = ("Server: theirs", "X-Tag: {tag}", "Date: {date}", "Content-Length: {length}")


class Sink:
    """Takes one response: head and body, as far as it is one with a content length."""

    def __init__(self) -> None:
        self.head: Any = None
        self.body = b""

    def on_whole(self, known: KnownResponse, body: bytes) -> None:
        self.head = known.status, known.reason, known.items, known.index
        self.body = body

    def on_headers(self, head: Any, end_stream: bool) -> None:
        assert self.head is None
        self.head = head.status, head.reason, head.items.copy(), dict(head._index)

    def on_data(self, data: bytes, end_stream: bool) -> None:
        self.body += data

    def on_trailers(self, trailers: object) -> None:
        raise AssertionError("none of these has any")


def response(body: bytes = b"ok", *, lines: tuple[str, ...] = LINES, status: str = "200 OK", **values: str) -> bytes:
    """A whole response; its length is that of the body unless another one is given."""
    values = {"length": str(len(body)), "tag": "t", "date": "d", **values}
    return "\r\n".join([f"HTTP/1.1 {status}", *(line.format(**values) for line in lines), "", ""]).encode("latin-1") + body


def parsed(data: bytes, parser: ResponseParser | None = None) -> Any:
    """What the parser says to one response; None if it refuses it, or sees no whole one in it."""
    sink = Sink()
    if parser is None:
        parser = ResponseParser(sink, Options())
    else:
        parser.sink = sink
    try:
        parser.feed(data)
    except (ProtocolError, AssertionError):
        return None
    if parser.state != DONE or parser.buffer or sink.head is None:
        return None
    parser.next_message()
    return *sink.head, sink.body


def taught(*responses: bytes) -> ResponseParser:
    """A parser that has seen these."""
    parser = ResponseParser(Sink(), Options())
    for one in responses:
        assert parsed(one, parser) is not None
    return parser


def learnt() -> ResponseParser:
    """One that knows what differs each time."""
    parser = taught(*(response(b"x" * n, tag=f"tag {n}", date=f"Mon, {n:02d} GMT") for n in range(LEARN)))
    assert len(parser.shapes) == 1
    return parser


def by_shape(parser: ResponseParser, data: bytes) -> Any:
    """As `parsed`, by a shape; None where it is of none."""
    end = data.find(b"\r\n\r\n") + 4
    found = parser.shaped(data, end)
    if found is None:
        return None
    shape, values = found
    head = shape.head(values)
    assert head._index is not None
    assert sum(map(len, values)) + shape.size == end
    return head.status, head.reason, head.items, dict(head._index), data[end:]


def test_lines_that_differ_are_what_varies() -> None:
    parser = learnt()
    (shape,) = parser.shapes
    assert isinstance(shape, ResponseHeadShape)
    assert shape.names == shape.response.names == (b"x-tag", b"date", b"content-length")
    data = response(b"some more", tag="new", date="a b c")
    assert shape.values(data[:-9]) == (b"new", b"a b c", b"9")
    assert by_shape(parser, data) == parsed(data) is not None


VALUES = st.text(st.characters(max_codepoint=255), max_size=12)


@given(st.lists(st.tuples(VALUES, VALUES, st.binary(max_size=12)), min_size=1, max_size=4))
@example([("a", "b c", b""), ("", "b", b"x"), ("a ", "b", b"x"), (" a", "b", b"x")])
@example([("a", "b", b"x"), ("a\r\nx-b: 1", "b", b"x"), ("a\tb", "b", b""), ("a  b", "c", b"d"), ("a b", "c", b"d")])
@example([("ab", "c", b"1"), ("a", "bc", b"2"), ("ab", "\n", b"3"), ("<value 0>", "<value 1>", b"4")])
def test_the_shape_says_what_the_parser_says_or_nothing(values: list[tuple[str, str, bytes]]) -> None:
    parser = learnt()
    for tag, date, body in values * 2:  # by the expression, and then by lengths that are known
        data = response(body, tag=tag, date=date)
        found = by_shape(parser, data)
        assert found is None or found == parsed(data)


@given(st.text("0123456789 +-xa\t", max_size=19), st.binary(max_size=3))
@example("18446744073709551618", b"xx")
@example("02", b"xx")
def test_lengths(length: str, body: bytes) -> None:
    parser = learnt()
    for _ in range(2):
        data = response(body, length=length)
        found = by_shape(parser, data)
        assert found is None or found == parsed(data)


@given(st.binary(max_size=4), st.integers(0, 120), st.integers(0, 4))
def test_nothing_passes_that_differs_elsewhere(inserted: bytes, at: int, left_out: int) -> None:
    parser = learnt()
    whole = response(b"xyz", tag="tag 1", date="Mon, 01 GMT")
    assert by_shape(parser, whole) is not None  # so that its lengths are known
    data = whole[:at] + inserted + whole[at + left_out :]
    found = by_shape(parser, data)
    assert found is None or found == parsed(data)


@given(st.lists(st.sampled_from(["{tag}", "constant", " {tag}", "a {tag} b", "{tag} ", ""]), min_size=1, max_size=5))
def test_any_head_that_keeps_its_names(values: list[str]) -> None:
    lines = (*(f"X-{number}: {value}" for number, value in enumerate(values)), "Content-Length: {length}")
    responses = [response(lines=lines, tag=f"t{n}") for n in range(2 * LEARN)]
    parser = taught(*responses[:LEARN])
    for one in responses:
        found = by_shape(parser, one)
        assert found is None or found == parsed(one)


def test_what_decides_how_a_response_is_read_does_not_vary() -> None:
    for name in ("Content-Type", "Content-Encoding", "Server", "X-Envoy-Peer-Metadata"):
        lines = (f"{name}: {{tag}}", "ETag: {date}", "Content-Length: {length}")
        parser = taught(*(response(lines=lines, tag=f"kind-{n % 2}", date=str(n)) for n in range(2 * LEARN)))
        assert {shape.names for shape in parser.shapes} == {(b"etag",)}
        assert {dict(shape.response.items)[name.lower().encode()] for shape in parser.shapes} == {b"kind-0", b"kind-1"}


def test_a_date_alone_is_no_reason() -> None:
    assert not taught(*(response(date=str(n)) for n in range(20))).shapes


def test_a_head_that_comes_again_is_known_as_a_whole() -> None:
    parser = learnt()
    data = response(tag="again")
    head = data[:-2]
    for known in (False, False, True):
        assert (head in parser.heads) is known
        assert by_shape(parser, data) is not None
    assert parsed(data, parser) == parsed(data)


def test_what_is_remembered_is_bounded() -> None:
    """An upstream that never says the same twice does not fill memory, and does not have us make shapes all the time."""
    options = Options()
    parser = ResponseParser(Sink(), options)
    for n in range(3000):
        assert parsed(response(lines=(f"X-{n % 300}: {n}", f"Y: {n}", "Content-Length: {length}"), status=f"{400 + n % 7} X"), parser) is not None
    shapes = options.response_shapes
    assert len(shapes._forms) <= 128
    assert shapes._made <= 64
    assert len(options.heads) <= options.heads.limit
    assert len(parser.shapes) <= 4
