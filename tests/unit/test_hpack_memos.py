"""HPACK, decoding: what memos may and may not remember, blocks of one shape, and what is foreseen."""

from __future__ import annotations

import hpack
import pytest

from meshproxy.codec.hpack import decoder as decoder_module
from meshproxy.codec.hpack import memos
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.encoder import encode_literal
from meshproxy.codec.hpack.fields import Fields, ShapedFields
from meshproxy.codec.hpack.foresight import MAX_STARTS
from meshproxy.codec.hpack.layout import MAX_LENGTHS
from meshproxy.codec.hpack.tables import FIRST_DYNAMIC, NEWEST, HpackError
from tests.unit.hpack_help import nothing_seen as nothing_seen
from tests.unit.hpack_help import size_of, table_of

# -- what is remembered


def test_blocks_that_repeat_share_their_fields():
    first, second = Decoder(), Decoder()
    block = b"\x82\x84\x86\x01\x01h"
    once = first.decode(block)
    again = first.decode(block)
    assert once.items == again.items
    assert first.decode(block) is again
    assert second.decode(block) is again
    assert again.known is None
    # Another representation of the same fields. It is looked at as one that comes again when its value is known.
    for _ in range(3):
        other = second.decode(b"\x82\x84\x86\x41\x81\x9f")
    assert other is again


def test_a_change_of_the_table_voids_what_is_remembered():
    decoder = Decoder()
    decoder.decode(b"\x40\x01a\x01b")
    for _ in range(3):
        assert decoder.decode(b"\xbe").items == ((b"a", b"b"),)
    decoder.decode(b"\x40\x01c\x01d")
    assert decoder.decode(b"\xbe").items == ((b"c", b"d"),)
    for _ in range(3):
        decoder.decode(b"\xbe")
    decoder.decode(b"\x20")
    with pytest.raises(HpackError):
        decoder.decode(b"\xbe")


def test_a_block_that_inserts_is_not_remembered():
    decoder = Decoder()
    for count in range(1, 5):
        decoder.decode(b"\x40\x01a\x01b")
        assert len(table_of(decoder)) == count


def test_memos_are_bounded():
    decoder = Decoder()
    for number in range(20000):
        block = encode_literal(b"n%d" % number, b"v")
        decoder.decode(block)
        decoder.decode(block)
        decoder.decode(b"\x40\x01%c\x04%04x" % (number % 256, number & 0xFFFF))  # new values in the table
    for number in range(1000):
        decoder.decode(hpack.Encoder().encode([(b"authorization", b"%d" % number, True)]))
    assert len(decoder.known) <= decoder_module._MAX_KNOWN
    for memo, limit in (
        (memos.ONCE, memos.MAX_ONCE),
        (memos.SHARED, memos.MAX_SHARED),
        (memos.LITERAL_NAMES, memos.MAX_NAMES),
        (memos.SECRETS, memos.MAX_SECRETS),
        (memos.SHAPES, memos.MAX_SHARED_SHAPES),
    ):
        assert 0 < len(memo) <= limit
    for number in range(20000):
        decoder.decode(encode_literal(b"n", b"%d" % number).replace(b"\x00", b"\x40", 1))
    assert 0 < len(memos.PAIRS) <= memos.MAX_PAIRS
    assert size_of(table_of(decoder)) <= 4096


def test_an_idle_decoder_has_no_table_of_its_own():
    decoder = Decoder()
    decoder.decode(b"\x82\x84\x86")
    assert decoder._table is Decoder()._table
    assert decoder.known is Decoder().known


# -- shapes


def request(path: bytes, number: bytes, coded: int = 0) -> bytes:
    return b"\x82\x04" + bytes((len(path) | coded,)) + path + b"\x86\x00\x01n" + bytes((len(number) | coded,)) + number + b"\x87"


def test_blocks_of_one_shape_say_so():
    first, second = Decoder(), Decoder()
    numbers = ((first, 2), (first, 3), (first, 4), (second, 5), (second, 6), (second, 7))
    shapes = [decoder.decode(request(b"/%d" % number, b"%d" % number)).shape for decoder, number in numbers]
    assert shapes[:2] == [None, None]
    shape = shapes[2]
    assert shape.items == ((b":method", b"GET"), (b":path", b""), (b":scheme", b"http"), (b"n", b""), (b":scheme", b"https"))
    assert shape.values == ((1, b":path"), (3, b"n"))
    assert shapes[3:] == [None, shape, shape]
    fields = first.decode(request(b"/abc", b"7"))
    assert fields.shape is shape
    assert fields.items == ((b":method", b"GET"), (b":path", b"/abc"), (b":scheme", b"http"), (b"n", b"7"), (b":scheme", b"https"))
    assert fields.size == size_of(fields.items)


def test_what_is_not_of_a_known_shape_is_parsed():
    decoder = Decoder()
    for number in range(3):
        decoder.decode(request(b"/%d" % number, b""))
    assert decoder._shapes
    block = request(b"/", b"1")
    for other, items in (
        (block[:-1], 4),
        (block + b"\x82", 6),
        (block[:-1] + b"\x86", 5),
        (b"\x83" + block[1:], 5),
        (b"\x82\x04\x81\x63\x86\x00\x01n\x01x\x87", 5),  # one value coded, the other not
        (b"\x82\x04\x7f\x01" + b"/" * 128 + b"\x86\x00\x01n\x01x\x87", 5),
        (b"", 0),
    ):
        decoded = decoder.decode(other)
        assert len(decoded.items) == items
        assert decoded.shape is None
    for malformed in (block[:2], block[:3], request(b"/", b"1234")[:-2], request(b"\x00", b"\x00", 0x80)):
        with pytest.raises(HpackError):
            decoder.decode(malformed)


def test_shapes_end_with_the_table_that_they_refer_to():
    decoder = Decoder()
    decoder.decode(b"\x40\x01a\x01b")
    for number in range(4):
        decoder.decode(b"\xbe\x04\x01%d\xbe" % number)
    assert decoder.decode(b"\xbe\x04\x019\xbe").shape is not None
    decoder.decode(b"\x40\x01c\x01d")
    assert decoder.decode(b"\xbe\x04\x018\xbe").items == ((b"c", b"d"), (b":path", b"8"), (b"c", b"d"))


def test_limits_hold_for_shapes():
    decoder = Decoder(max_list_size=250)
    for number in range(3):
        assert not decoder.decode(request(b"/%d" % number, b"")).over
    assert decoder._shapes
    assert decoder.decode(request(b"/" * 100, b"")).over


def test_values_of_any_lengths_are_found():
    """What is remembered of lengths is bounded, and says the same as parsing."""
    decoder, kept = Decoder(), []
    for number in range(3000):
        path, value = b"/" * (1 + number % 90), b"v" * (number * 7 % 83)
        fields = decoder.decode(request(path, value))
        assert (fields.items[1][1], fields.items[3][1]) == (path, value)
        kept.append(sum(layout._known for layout in memos.LAYOUTS.values()))
    assert 0 < max(kept) <= MAX_LENGTHS


def test_layouts_that_are_shared_no_more_learn_nothing():
    first = Decoder()
    for number in range(4):
        first.decode(request(b"/%d" % number, b""))
    (layout,) = memos.LAYOUTS.values()
    assert layout._known
    other = Decoder()
    for kind in range(memos.MAX_LAYOUTS):
        for number in range(4):
            other.decode(b"\x82" * kind + b"\x00\x02%02d\x01%d" % (kind, number))
    assert layout not in memos.LAYOUTS.values()
    assert len(memos.LAYOUTS) <= memos.MAX_LAYOUTS
    assert first.decode(request(b"/longer", b"x")).items[1] == (b":path", b"/longer")
    assert layout.start[1] == {}


def test_few_shapes_are_kept():
    decoder = Decoder()
    for kind in range(100):
        for number in range(4):
            decoder.decode(b"\x00\x02%02d\x01%d" % (kind, number))
    assert len(decoder._shapes) == decoder_module._MAX_SHAPES
    assert len(memos.SHAPES) <= memos.MAX_SHARED_SHAPES


def with_ids(number: int, *, name: bytes = b"accept") -> list[tuple[bytes, bytes, bool]]:
    """A request whose ids go into the table, as nghttp2 has it; whether a field is sensitive."""
    return [
        (b":method", b"GET", False),
        (b":path", b"/%d" % number, True),
        (name, b"*/*", False),
        (b"authorization", b"Bearer of-somebody", True),
        (b"x-request-id", b"%036d" % number, False),
        (b"traceparent", b"%055d" % number, False),
    ]


def test_ids_in_the_table_are_foreseen():
    """Each block moves all indices, and says the same of them as the one before."""
    decoder, other, encoder = Decoder(), hpack.Decoder(), hpack.Encoder()
    foreseen = 0
    for number in range(200):
        block = encoder.encode(with_ids(number))
        fields = decoder.decode(block)
        foreseen += type(fields) is ShapedFields
        assert fields.items == tuple((name, value) for name, value, _ in with_ids(number))
        assert [(bytes(name), bytes(value)) for name, value in other.decode(block, raw=True)] == [*fields.items]
        decoder._settle()
        assert decoder._table[NEWEST:] == [(bytes(name), bytes(value)) for name, value in other.header_table.dynamic_entries]
    assert foreseen > 190


def test_what_is_put_into_the_table_anew_is_known():
    """What fell out of the table comes again, in the same way each time: after a while nothing is parsed any more. The table is as if it had been."""
    decoder, other, encoder = Decoder(), hpack.Decoder(), hpack.Encoder()
    for number in range(600):
        block = encoder.encode(with_ids(number))
        fields = decoder.decode(block)
        assert fields.items == tuple((name, value) for name, value, _ in with_ids(number))
        other.decode(block, raw=True)
        assert number < 100 or type(fields) is ShapedFields
        assert decoder._spare >= 0
    decoder._settle()
    assert decoder._table[NEWEST:] == [(bytes(name), bytes(value)) for name, value in other.header_table.dynamic_entries]
    assert decoder._used == other.header_table._current_size
    # On another connection, nothing but the first two blocks.
    decoder, encoder = Decoder(), hpack.Encoder()
    parsed = [number for number in range(200) if type(decoder.decode(encoder.encode(with_ids(number)))) is not ShapedFields]
    assert len(parsed) <= 3


def test_what_comes_anew_with_other_values_is_parsed():
    """A block that looks as one that was seen before, where its references stand for something else."""
    decoder, encoder = Decoder(), hpack.Encoder()
    for number in range(100):
        decoder.decode(encoder.encode(with_ids(number)))
    (shape,) = {shape for shape in memos.SHAPES.values() if shape.starts}
    for start in shape.starts:
        assert all(start.fits([expected if type(expected) is tuple else (expected, b"") for expected in entries]) for entries in [_expected(start)])
        assert not start.fits([(b"other", b"entry")] * (start.deepest + 1)) or not start.references
        assert start.deepest < 0 or not start.fits([])


def _expected(start) -> list:
    by_place = dict(start.references)
    return [by_place.get(newer, (b"", b"")) for newer in range(start.deepest + 1)]


def test_few_starts_are_kept():
    decoder = Decoder()
    known = [b"%d" % number for number in range(40)]
    encoder = hpack.Encoder()
    for number in range(200):
        decoder.decode(encoder.encode([(b":method", b"GET", False), (b"x-request-id", b"%036d" % number, False), (b"x", known[number % 40], False)]))
    assert memos.SHAPES
    assert all(len(shape.starts) <= MAX_STARTS for shape in memos.SHAPES.values())


def test_what_is_not_as_foreseen_is_parsed():
    def begin() -> tuple[Decoder, bytes]:
        decoder, encoder = Decoder(), hpack.Encoder()
        for number in range(6):
            decoder.decode(encoder.encode(with_ids(number)))
        block = encoder.encode(with_ids(7))
        assert decoder._step
        return decoder, block

    decoder, block = begin()
    other = block.replace(bytes((block[block.index(b"\x1f\x08") - 1],)), b"\xbe", 1)  # another entry in the place of `accept`
    assert decoder.decode(other).items[2] == (b"traceparent", b"%055d" % 5)
    decoder, block = begin()
    assert decoder.decode(block.replace(b"\x82", b"\x83", 1)).items[0] == (b":method", b"POST")
    decoder, block = begin()
    with pytest.raises(HpackError):
        decoder.decode(block[:-1])
    for between in (b"\x40\x01n\x01v", b"\x20\x3f\xe1\x1f"):  # the table moves on, or is emptied
        decoder, block = begin()
        decoder.decode(between)
        fields = either(decoder, block)
        assert fields is None or fields.items[2] != (b"accept", b"*/*")


def either(decoder: Decoder, block: bytes) -> Fields | None:
    """The fields, or None for a block that is malformed."""
    try:
        return decoder.decode(block)
    except HpackError:
        return None


def test_an_entry_that_is_gone_is_not_foreseen():
    """What a reference meant one block ago is out of the table in the end."""
    decoder = Decoder()
    entry = (b"a", b"b")
    decoder.decode(b"\x3f\xe1\x03\x40\x01a\x01b")  # 512 bytes
    size = len(b"x-id") + 40 + 32
    for number in range(512 // size + 1):
        fields = decoder.decode(bytes((0x80 + FIRST_DYNAMIC + number,)) + b"\x40\x04x-id\x28%040d" % number)
        assert fields.items == (entry, (b"x-id", b"%040d" % number))
    assert type(fields) is ShapedFields
    with pytest.raises(HpackError):
        decoder.decode(bytes((0x80 + FIRST_DYNAMIC + number + 1,)) + b"\x40\x04x-id\x28%040d" % 99)


def test_blocks_of_several_shapes_that_move_the_table():
    decoder, encoder = Decoder(), hpack.Encoder()
    for number in range(200):
        fields = with_ids(number, name=b"accept" if number % 3 else b"accept-language")
        assert decoder.decode(encoder.encode(fields)).items == tuple((name, value) for name, value, _ in fields)


def test_few_steps_are_kept():
    for kind in range(100):
        decoder, encoder = Decoder(), hpack.Encoder()
        for number in range(5):
            decoder.decode(encoder.encode(with_ids(number, name=b"x-%d" % (7**kind))))
    assert 0 < len(memos.STEPS) <= memos.MAX_CHAINS


def test_blocks_that_index_everything_anew() -> None:
    """As nginx answers: all fields literal and with indexing, in every response. They decode the same, and the table turns over as it should."""
    decoder, other = Decoder(), hpack.Decoder()
    fields = [(b"server", b"nginx"), (b"date", b"Sat, 21 Nov 2026 10:00:00 GMT"), (b"content-type", b"text/plain"), (b"x-one-more", b"y" * 30)]
    block = b"\x88" + b"".join(b"\x40" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)
    for _ in range(60):
        assert decoder.decode(block).items == ((b":status", b"200"), *fields)
        assert [(bytes(name), bytes(value)) for name, value in other.decode(block, raw=True)] == [(b":status", b"200"), *fields]
        decoder._settle()
        assert decoder._table[NEWEST:] == [(bytes(name), bytes(value)) for name, value in other.header_table.dynamic_entries]
    # The entries are the ones that references mean.
    assert decoder.decode(bytes((0x80 | FIRST_DYNAMIC, 0x80 | FIRST_DYNAMIC + 3))).items == (fields[3], fields[0])


def test_a_table_of_no_bytes_changes_nothing() -> None:
    decoder = Decoder()
    block = b"\x88\x40\x01a\x01b"
    assert decoder.decode(b"\x20" + block).items == ((b":status", b"200"), (b"a", b"b"))
    first = decoder.decode(block)
    assert decoder.decode(block) is decoder.decode(block)
    assert first.items == decoder.decode(block).items
    assert decoder.known  # so it is remembered
    with pytest.raises(HpackError):
        decoder.decode(bytes((0x80 | FIRST_DYNAMIC,)))


def test_secrets_are_decoded_once() -> None:
    """And others are not taken for them."""
    decoder, encoder = Decoder(), hpack.Encoder()
    for number in range(12):
        token = b"Bearer %d" % (number // 3 % 3)
        fields = [(b":method", b"GET"), (b":path", b"/%d" % number), (b"authorization", token), (b"cookie", b"n=%d" % number), (b":scheme", b"http")]
        assert decoder.decode(encoder.encode([(*field, field[0][1:] != b"method") for field in fields])).items == tuple(fields)
    assert {secret for *_, secret in decoder._shapes} >= {(1, b"Bearer 0")}
    assert b"Bearer 1" in memos.SECRETS.values()
    alone = Decoder()
    for number in range(4):
        block = encoder.encode([(b"authorization", b"Basic %d" % number, True)])
        assert alone.decode(block).items == ((b"authorization", b"Basic %d" % number),)
    assert alone._shapes
    with pytest.raises(HpackError):
        alone.decode(block[:2] + b"\x81\x00")  # padding that is none
