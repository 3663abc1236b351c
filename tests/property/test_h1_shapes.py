"""Heads of one shape (`codec.h1.shapes`): what is recognised by its shape is what the parser makes of it, and nothing is that the parser would refuse."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from meshproxy.codec.h1.grammar import ProtocolError
from meshproxy.codec.h1.parser import Options
from meshproxy.codec.h1.request import KnownRequest, RequestParser
from meshproxy.codec.h1.shapes import HeadShape, ShapedRequest

LEARN = 6
LINES = ("Host: a.test", "User-Agent: probe (any)", "X-Request-Id: {id}", "Cookie: session={id}; theme=dark", "traceparent: {trace}")


class Sink:
    """Takes requests; as connections do, it changes the heads that it gets."""

    def __init__(self) -> None:
        self.heads: list[tuple[bytes, bytes, bytes, list[tuple[bytes, bytes]], dict[bytes, bytes]]] = []

    def on_known(self, known: KnownRequest, body: bytes) -> None:
        head = known.head()
        assert head._index is not None
        self.heads.append((head.method, head.path, head.authority, head.items.copy(), head._index.copy()))
        head.items.append((b"x-added", b"1"))
        head._index[b"x-added"] = b"1"

    def on_headers(self, head: object, end_stream: bool) -> None:
        raise AssertionError("none of these is special")


def request(path: str = "/", *, lines: tuple[str, ...] = LINES, **values: str) -> bytes:
    """A head."""
    return "\r\n".join([f"GET {path} HTTP/1.1", *(line.format(**values) for line in lines), "", ""]).encode("latin-1")


def parsed(data: bytes, parser: RequestParser | None = None) -> object:
    """What the parser says to one head; None if it refuses it, or sees no whole request in it."""
    sink = Sink()
    if parser is None:
        parser = RequestParser(sink, Options())  # type: ignore[arg-type]
    else:
        sink = parser.sink = Sink()  # type: ignore[assignment]
    try:
        parser.feed(data)
    except (ProtocolError, AssertionError):
        return None
    if not parser.done or parser.buffer or len(sink.heads) != 1:
        return None
    parser.next_message()
    return sink.heads[0]


def taught(*heads: bytes, options: Options | None = None) -> RequestParser:
    """A parser that has seen these."""
    parser = RequestParser(Sink(), options or Options())  # type: ignore[arg-type]
    for head in heads:
        assert parsed(head, parser) is not None
    return parser


def learnt() -> HeadShape:
    """The shape of what has other values each time."""
    parser = taught(*(request(f"/p/{n}", id=f"id{n}", trace=f"00-{n}") for n in range(LEARN)))
    (shape,) = parser.shapes
    return shape


def by_shape(shape: HeadShape, data: bytes) -> object:
    """As `parsed`, by the shape; None where it is none of that shape."""
    values = shape.values(data)
    if values is None:
        return None
    known: ShapedRequest = shape.take(values)
    head = known.head()
    assert head.path == known.path
    assert head._index is not None
    return head.method, head.path, head.authority, head.items, head._index


def test_lines_that_differ_are_what_varies() -> None:
    shape = learnt()
    assert shape.names == (b":path", b"x-request-id", b"cookie", b"traceparent")
    data = request("/q?r", id="new", trace="t")
    assert shape.values(data) == (b"/q?r", b"new", b"session=new; theme=dark", b"t")
    assert by_shape(shape, data) == parsed(data) is not None


VALUES = st.text(st.characters(max_codepoint=255), max_size=12)


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=4))
@example([("/", "a", "b"), ("/x", "", "b"), ("/", "a ", "b")])
@example([("/a b", "a", "b"), ("/a", "a\r\nx-b: 1", "b"), ("/", "a\tb", "b"), ("x", "a", "b")])
@example([("/ab", "c", "d"), ("/a", "bc", "d"), ("/ab", "c", "\n")])
def test_the_shape_says_what_the_parser_says_or_nothing(values: list[tuple[str, str, str]]) -> None:
    shape = learnt()
    for path, number, trace in values * 2:  # by the expression, and then by lengths that are known
        data = request("/" + path, id=number, trace=trace)
        found = by_shape(shape, data)
        assert found is None or found == parsed(data)


@given(st.binary(max_size=4), st.integers(0, 200), st.integers(0, 4))
def test_nothing_passes_that_differs_elsewhere(inserted: bytes, at: int, left_out: int) -> None:
    shape = learnt()
    whole = request("/p/1", id="id1", trace="00-1")
    assert shape.values(whole) is not None  # so that its lengths are known
    data = whole[:at] + inserted + whole[at + left_out :]
    found = by_shape(shape, data)
    assert found is None or found == parsed(data)


@given(st.lists(st.sampled_from(["{id}", "{trace}", "constant", " {id}", "a {id} b", "{id} "]), min_size=1, max_size=5), st.booleans())
def test_any_head_that_keeps_its_names(values: list[str], moving: bool) -> None:
    lines = ("Host: a.test", *(f"X-{number}: {value}" for number, value in enumerate(values)))
    heads = [request(f"/{n}" if moving else "/", lines=lines, id=f"id{n}", trace=f"t{n}") for n in range(2 * LEARN)]
    parser = taught(*heads[:LEARN])
    for shape in parser.shapes:
        for head in heads:
            assert by_shape(shape, head) == parsed(head)


def test_few_values_do_not_vary() -> None:
    """What comes in three ways has a shape for each."""
    heads = [request(f"/{n}", lines=("Host: a.test", "X-Canary: {id}"), id=("yes", "no", "so")[n % 3], trace="") for n in range(24)]
    parser = taught(*heads)
    assert len(parser.shapes) == 3
    assert all(shape.names == (b":path",) for shape in parser.shapes)
    assert {sum(shape.values(head) is not None for head in heads) for shape in parser.shapes} == {8}


def test_a_shape_that_turns_out_too_narrow_is_replaced() -> None:
    heads = [request(f"/{n}", id="same", trace="same") for n in range(LEARN)] + [request(f"/{n}", id=f"id{n}", trace="same") for n in range(LEARN)]
    parser = taught(*heads)
    assert parser.shapes[0].names == (b":path", b"x-request-id", b"cookie")
    assert not any(shape.retired for shape in parser.shapes)


def test_requests_with_bodies_have_no_shape() -> None:
    lines = ("Host: a.test", "Content-Length: {id}", "X-A: {trace}")
    heads = [request(f"/{n}", lines=lines, id=str(n), trace=str(n)) + b"x" * n for n in range(1, 2 * LEARN)]
    parser = taught(*heads)
    assert not parser.shapes


def test_what_is_remembered_is_bounded() -> None:
    """Nobody has us make shapes all the time: they have to be paid for by requests."""
    options = Options()
    made: set[int] = set()
    kept = []
    for n in range(400):
        parser = taught(*(request(f"/{i}", lines=("Host: a.test", f"X-{n}: 1"), id="", trace="") for i in range(LEARN)), options=options)
        kept.append(parser.shapes)
        made.update(map(id, parser.shapes))
    assert 20 <= len(made) <= 20 + 400 * LEARN // 200
    assert len(options.shapes._forms) <= 128


def test_long_heads_have_no_shape() -> None:
    heads = [request(f"/{n}", lines=("Host: a.test", "X-Long: {id}"), id="x" * 5000, trace="") for n in range(LEARN)]
    assert not taught(*heads).shapes
    small = [request(f"/{n}", lines=("Host: a.test",), id="", trace="") for n in range(LEARN)]
    (shape,) = taught(*small).shapes
    assert shape.values(request("/" + "x" * 5000, lines=("Host: a.test",), id="", trace="")) is None


def test_sizes_are_remembered_and_bounded() -> None:
    shape = learnt()
    heads = [request("/" + "x" * n, id="id", trace="t") for n in range(300)]
    for head in heads * 2:
        assert by_shape(shape, head) == parsed(head) is not None
    assert 0 < len(shape._by_size) <= 64
    shape.retire()
    assert not shape._by_size
    assert by_shape(shape, heads[0]) is None  # and who has it goes to the parser for another one


def test_shapes_are_bounded() -> None:
    """Too many, and all are learnt anew."""
    options = Options()
    options.shapes._credit = 10**9
    kept = {}
    for n in range(100):
        parser = taught(*(request(f"/{i}", lines=("Host: a.test", f"X-{n}: 1"), id="", trace="") for i in range(LEARN)), options=options)
        kept[n] = parser.shapes
    alive = [shape for shapes in kept.values() for shape in shapes if not shape.retired]
    assert 0 < len(alive) <= 64
    assert all(not shape._by_size for shapes in kept.values() for shape in shapes if shape.retired)
