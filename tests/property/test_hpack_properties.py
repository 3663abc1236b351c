"""HPACK against others: the `hpack` package both ways, what fourteen encoders wrote (http2jp/hpack-test-case), and garbage."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import hpack
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec.hpack import huffman
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.encoder import Encoder, encode_literal
from meshproxy.codec.hpack.tables import NEWEST, STATIC, HpackError, encode_integer

SAMPLE = Path(__file__).parent.parent / "data" / "hpack" / "stories.json.xz"

huffman_encode = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode


def test_the_static_table_is_that_of_the_hpack_package():
    assert list(STATIC[1:]) == list(hpack.table.HeaderTable.STATIC_TABLE)


def test_the_huffman_code_is_that_of_the_hpack_package():
    codes = {f"{code:0{length}b}": symbol for symbol, (code, length) in enumerate(zip(REQUEST_CODES, REQUEST_CODES_LENGTH, strict=True)) if symbol < 256}
    assert huffman._codes() == codes


def test_every_symbol_after_every_padding():
    """The state that a string leaves the common decoder in does not matter to the next one."""
    for first in range(256):
        data = huffman_encode(bytes((first,)) * 3)
        assert huffman.decode(data) == bytes((first,)) * 3
        assert huffman.decode(huffman_encode(b"a path/")) == b"a path/"


# -- strings

printable = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=80).map(str.encode)
strings = st.one_of(st.binary(max_size=40), printable, st.sampled_from([b"0\0-", b"9a00\0-", b"\0", b"{" * 9, b"\xff" * 5, b"\\\\"]))


def either(function, *arguments):
    """What a function returns, or that it says that its argument is malformed."""
    try:
        return function(*arguments)
    except HpackError:
        return HpackError


@given(strings)
def test_huffman_round_trip(text):
    assert huffman.decode(huffman_encode(text)) == text


@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from([0xFF, 0x7F, 0xFE, 0xF8, 0, 0x1F, 1, 0xC0]), max_size=30).map(bytes)))
def test_both_huffman_decoders_agree(data):
    assert either(huffman.decode, data) == either(huffman._decode_slowly, data)


@given(st.lists(st.one_of(strings.map(huffman_encode), st.binary(max_size=10)), min_size=1, max_size=6))
def test_strings_decoded_together(data):
    expected = either(lambda: [huffman._decode_slowly(each) for each in data])
    visible = either(huffman.decode_visible, data)
    if visible is None:
        assert expected is HpackError or not _VISIBLE.issuperset(b"".join(expected)) or 255 in b"".join(data)  # many ones follow each other in it
    else:
        assert visible == expected
        assert visible is HpackError or _VISIBLE.issuperset(b"".join(visible))


_VISIBLE = frozenset(range(32, 127)) - {92}  # the backslash's code is a long one


# -- blocks

names = st.one_of(
    st.sampled_from([b":method", b":path", b":status", b"cookie", b"authorization", b"x-request-id", b"traceparent", b"content-length", b"x-custom", b"date"]),
    st.binary(min_size=1, max_size=70),
)
values = st.one_of(st.sampled_from([b"GET", b"200", b"", b"a" * 200, b"0"]), st.integers(0, 9).map(lambda number: b"value-%d" % number), strings)
fields = st.one_of(st.sampled_from(STATIC[1:]), st.tuples(names, values), st.tuples(st.just(b"x-large"), st.integers(0, 3000).map(lambda size: b"v" * size)))
blocks = st.lists(fields, max_size=12).map(tuple)


@given(st.lists(st.one_of(blocks, st.integers(0, 9000)), max_size=30))
def test_what_we_encode_the_hpack_package_decodes(steps):
    ours, theirs, own = Encoder(max_table_size=6000), hpack.Decoder(max_header_list_size=1 << 24), Decoder(max_list_size=1 << 24)
    for step in steps:
        if isinstance(step, int):
            ours.set_max_table_size(step)
            theirs.max_allowed_table_size = step
            own.max_table_size = step
            continue
        for repeated in range(3):
            block = ours.encode(step) if repeated else ours.encode_known(step, step)
            assert tuple(map(tuple, theirs.decode(block, raw=True))) == step
            assert own.decode(block).items == step
            assert own._used <= own._size
            assert ours._used <= ours._size
        own._settle()
        assert own._used == theirs.header_table._current_size


@given(st.lists(st.one_of(st.tuples(blocks, st.booleans()), st.integers(0, 9000)), max_size=30))
def test_what_the_hpack_package_encodes_we_decode(steps):
    theirs, ours = hpack.Encoder(), Decoder(max_table_size=9000, max_list_size=1 << 24)
    for step in steps:
        if isinstance(step, int):
            if step != theirs.header_table_size:  # the same again, and the package forgets to say what it was changed to
                theirs.header_table_size = step
            continue
        items, huffman_coded = step
        for _ in range(4):
            decoded = ours.decode(theirs.encode(items, huffman=huffman_coded))
            assert decoded.items == items
            assert decoded.size == sum(len(name) + len(value) + 32 for name, value in items)
        ours._settle()
        assert ours._used == theirs.header_table._current_size


def literal(name: bytes, value: bytes, kind: int, coded: bool) -> bytes:
    """A literal with a literal name."""
    parts = [encode_integer(0, 6 if kind == 0x40 else 4, kind)]
    for text in (name, value):
        data = huffman_encode(text) if coded else text
        parts += [encode_integer(len(data), 7, 0x80 if coded else 0), data]
    return b"".join(parts)


@given(st.lists(st.tuples(names, st.lists(values, min_size=5, max_size=5), st.sampled_from([0, 0, 0x10, 0x40]), st.booleans()), max_size=6))
def test_blocks_of_one_shape(template):
    """Blocks that differ in the values of their literals only, in any representation: the same whoever decodes them."""
    ours = Decoder()
    theirs = hpack.Decoder()
    for number in range(5):
        block = b"\x82" + b"".join(literal(name, texts[number], kind, coded) + b"\x84" for name, texts, kind, coded in template)
        decoded = ours.decode(block)
        assert decoded.items == tuple(map(tuple, theirs.decode(block, raw=True)))
        if decoded.shape is not None:
            merged = [*decoded.shape.items]
            for place, name in decoded.shape.values:
                assert merged[place] == (name, b"")
                merged[place] = decoded.items[place]
            assert tuple(merged) == decoded.items


class _Indexing(hpack.Encoder):
    """Puts into the table what it is told to, and what it finds there it references."""

    def __init__(self, size: int, coded: bool) -> None:
        super().__init__()
        self.coded = coded
        if size != 4096:
            self.header_table_size = size

    def block(self, fields: list[tuple[bytes, bytes, bool]]) -> bytes:
        return self.encode([(name, value, not indexed) for name, value, indexed in fields], huffman=self.coded)


_template = st.lists(
    st.tuples(
        st.sampled_from([b":path", b"x-request-id", b"traceparent", b"authorization", b"cookie", b"accept", b"n", b"a-longer-name"]),
        st.sampled_from(["same", "same", "unique", "unique", "now and then"]),
        st.booleans(),
        st.integers(0, 40),
    ),
    min_size=1,
    max_size=7,
)


@given(_template, st.sampled_from([0, 90, 150, 300, 600, 1200, 4096]), st.booleans(), st.sampled_from([0, 7, 13]), st.sampled_from([1, 5, 29, 61]), st.data())
def test_blocks_that_move_the_table(template, size, coded, other, looks, data):
    """What differs from block to block goes into the table, or not: fields and table are what the `hpack` package has, and so is what is damaged.

    `looks`: blocks from one look at the table to the next, meanwhile it need not be up to date.
    """
    ours, theirs = Decoder(max_list_size=1 << 24), hpack.Decoder(max_header_list_size=1 << 24)
    encoder = _Indexing(size, coded)
    damaged = data.draw(st.none() | st.integers(4, 59))
    for number in range(60):
        fields = []
        for name, kind, indexed, length in template:
            tail = {"same": b"s", "unique": b"%04d" % (number * 37 % 9973), "now and then": b"%d" % (number // 9)}[kind]
            fields.append((name, b"x" * length + tail, indexed))
        if other and number % other == other - 1:
            fields = [(b"other", b"%d" % number, True)]
        block = encoder.block(fields)
        if number == damaged:
            broken = bytearray(block)
            broken[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
            block = bytes(broken)
        decoded = either(ours.decode, block)
        if decoded is HpackError:
            assert number == damaged
            return
        assert decoded.items == tuple(map(tuple, theirs.decode(block, raw=True)))
        assert decoded.size == sum(32 + len(name) + len(value) for name, value in decoded.items)
        if number % looks == looks - 1 or number == damaged:
            ours._settle()
            assert ours._used == theirs.header_table._current_size
            assert ours._table[NEWEST:] == [(bytes(name), bytes(value)) for name, value in theirs.header_table.dynamic_entries]
        if decoded.shape is not None:
            merged = [*decoded.shape.items]
            for place, _ in decoded.shape.values:
                merged[place] = decoded.items[place]
            assert tuple(merged) == decoded.items
        if number == damaged:
            return


@given(blocks, blocks)
def test_blocks_may_be_put_together(first, second):
    encoder, decoder = Encoder(), Decoder(max_list_size=1 << 24)
    encoder.set_max_table_size(100)
    decoder.max_table_size = 100
    for _ in range(3):
        block = encoder.encode(first) + encode_literal(b"x-request-id", b"1") + encoder.encode_known(second, second, begun=True)
        assert decoder.decode(block).items == (*first, (b"x-request-id", b"1"), *second)


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=5))
def test_garbage(garbage):
    """What we decode, the `hpack` package decodes too, and to the same fields; all else is an HpackError."""
    ours, theirs = Decoder(max_list_size=1 << 24), hpack.Decoder(max_header_list_size=1 << 24)
    for block in garbage:
        decoded = either(ours.decode, block)
        if decoded is HpackError:
            return
        assert decoded.items == tuple(map(tuple, theirs.decode(block, raw=True)))


@given(blocks, st.data())
def test_damaged_blocks(items, data):
    ours, theirs = Decoder(max_list_size=1 << 24), hpack.Decoder(max_header_list_size=1 << 24)
    block = bytearray(hpack.Encoder().encode(items))
    for _ in range(data.draw(st.integers(1, 3))):
        if block:
            block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    for damaged in (bytes(block), bytes(block[: data.draw(st.integers(0, len(block)))])):
        decoded = either(ours.decode, damaged)
        if decoded is HpackError:
            return
        assert decoded.items == tuple(map(tuple, theirs.decode(damaged, raw=True)))


# -- http2jp/hpack-test-case


def stories_of_checkout(folder: Path) -> Iterator[tuple[str, list, list]]:
    """(encoder and story, headers of each block, [table size or None, block] of each block) in a checkout."""
    for path in sorted(folder.glob("*/story_*.json")):
        cases = json.loads(path.read_text())["cases"]
        if "wire" in cases[0]:
            headers = [[pair for field in case["headers"] for pair in field.items()] for case in cases]
            yield f"{path.parent.name}/{path.name}", headers, [[case.get("header_table_size"), case["wire"]] for case in cases]


def stories_of_sample() -> Iterator[tuple[str, list, list]]:
    for story in json.loads(lzma.decompress(SAMPLE.read_bytes())):
        for encoder, wires in story["encoders"].items():
            yield f"{encoder}/{story['name']}", story["headers"], wires


def run_story(name: str, headers: list, wires: list) -> None:
    decoder, encoder = Decoder(), Encoder()
    theirs, own = hpack.Decoder(max_header_list_size=1 << 24), Decoder()
    for number, (fields_of_block, (table_size, wire)) in enumerate(zip(headers, wires, strict=True)):
        items = tuple((key.encode(), value.encode()) for key, value in fields_of_block)
        if table_size is not None:
            decoder.max_table_size = table_size
        assert decoder.decode(bytes.fromhex(wire)).items == items, (name, number)
        block = encoder.encode(items)
        assert own.decode(block).items == items, (name, number)
        assert tuple(map(tuple, theirs.decode(block, raw=True))) == items, (name, number)


@pytest.mark.slow
def test_stories():
    names = set()
    for name, headers, wires in stories_of_sample():
        run_story(name, headers, wires)
        names.add(name.partition("/")[0])
    assert len(names) == 14


@pytest.mark.slow
@pytest.mark.skipif("HPACK_TEST_CASE" not in os.environ, reason="HPACK_TEST_CASE names no checkout of http2jp/hpack-test-case: only the sample was run")
def test_all_stories():
    count = 0
    for name, headers, wires in stories_of_checkout(Path(os.environ["HPACK_TEST_CASE"])):
        run_story(name, headers, wires)
        count += 1
    assert count >= 446
