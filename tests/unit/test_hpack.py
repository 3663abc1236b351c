"""HPACK, decoding: the examples of RFC 7541, Huffman's code, malformed blocks, the table's size, limits."""

from __future__ import annotations

import pytest

from meshproxy.codec.hpack import huffman
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.encoder import encode_literal
from meshproxy.codec.hpack.tables import FIRST_DYNAMIC, HpackError, decode_rest, encode_integer
from tests.unit.hpack_help import nothing_seen as nothing_seen
from tests.unit.hpack_help import pairs, size_of, table_of

# -- RFC 7541 appendix C

REQUESTS = [
    """:method: GET
    :scheme: http
    :path: /
    :authority: www.example.com""",
    """:method: GET
    :scheme: http
    :path: /
    :authority: www.example.com
    cache-control: no-cache""",
    """:method: GET
    :scheme: https
    :path: /index.html
    :authority: www.example.com
    custom-key: custom-value""",
]
REQUEST_TABLES = [
    ":authority: www.example.com",
    """cache-control: no-cache
    :authority: www.example.com""",
    """custom-key: custom-value
    cache-control: no-cache
    :authority: www.example.com""",
]
RESPONSES = [
    """:status: 302
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:21 GMT
    location: https://www.example.com""",
    """:status: 307
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:21 GMT
    location: https://www.example.com""",
    """:status: 200
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:22 GMT
    location: https://www.example.com
    content-encoding: gzip
    set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1""",
]
RESPONSE_TABLES = [
    """location: https://www.example.com
    date: Mon, 21 Oct 2013 20:13:21 GMT
    cache-control: private
    :status: 302""",
    """:status: 307
    location: https://www.example.com
    date: Mon, 21 Oct 2013 20:13:21 GMT
    cache-control: private""",
    """set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1
    content-encoding: gzip
    date: Mon, 21 Oct 2013 20:13:22 GMT""",
]
TABLE_SIZES = {"requests": (57, 110, 164), "responses": (222, 222, 215)}
C3 = ["828684410f7777772e6578616d706c652e636f6d", "828684be58086e6f2d6361636865", "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565"]
C4 = ["828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf", "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"]
C5 = [
    "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e1768747470733a2f2f7777772e6578616d706c652e636f6d",
    "4803333037c1c0bf",
    (
        "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b425a584f5157454f5049554158515745"
        "4f49553b206d61782d6167653d333630303b2076657273696f6e3d31"
    ),
]
C6 = [
    "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
    "4883640effc1c0bf",
    (
        "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c0"
        "03ed4ee5b1063d5007"
    ),
]


@pytest.mark.parametrize(
    ("block", "fields", "table"),
    [
        ("400a637573746f6d2d6b65790d637573746f6d2d686561646572", "custom-key: custom-header", "custom-key: custom-header"),
        ("040c2f73616d706c652f70617468", ":path: /sample/path", ""),
        ("100870617373776f726406736563726574", "password: secret", ""),
        ("82", ":method: GET", ""),
    ],
)
def test_representations(block, fields, table):
    decoder = Decoder()
    assert decoder.decode(bytes.fromhex(block)).items == pairs(fields)
    assert table_of(decoder) == pairs(table)


@pytest.mark.parametrize("blocks", [C3, C4])
def test_requests(blocks):
    decoder = Decoder()
    for block, fields, table, table_size in zip(blocks, REQUESTS, REQUEST_TABLES, TABLE_SIZES["requests"], strict=True):
        decoded = decoder.decode(bytes.fromhex(block))
        assert decoded.items == pairs(fields)
        assert decoded.size == size_of(pairs(fields))
        assert not decoded.over
        assert table_of(decoder) == pairs(table)
        assert size_of(table_of(decoder)) == table_size


@pytest.mark.parametrize("blocks", [C5, C6])
def test_responses_with_eviction(blocks):
    decoder = Decoder()
    decoder.max_table_size = 256
    update = encode_integer(256, 5, 0x20)
    for block, fields, table, table_size in zip(blocks, RESPONSES, RESPONSE_TABLES, TABLE_SIZES["responses"], strict=True):
        assert decoder.decode(update + bytes.fromhex(block)).items == pairs(fields)
        assert table_of(decoder) == pairs(table)
        assert size_of(table_of(decoder)) == table_size
        update = b""


@pytest.mark.parametrize(
    ("value", "bits", "encoded"), [(10, 5, b"\x0a"), (1337, 5, b"\x1f\x9a\x0a"), (42, 8, b"\x2a"), (31, 5, b"\x1f\x00"), (127, 7, b"\x7f\x00")]
)
def test_integers(value, bits, encoded):
    assert encode_integer(value, bits, 0) == encoded
    if len(encoded) > 1:
        assert decode_rest(encoded, 1, (1 << bits) - 1) == (value, len(encoded))


# -- Huffman


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("", b""),
        ("f1e3c2e5f23a6ba0ab90f4ff", b"www.example.com"),
        ("a8eb10649cbf", b"no-cache"),
        ("d07abe941054d444a8200595040b8166e082a62d1bff", b"Mon, 21 Oct 2013 20:13:21 GMT"),
        ("07", b"0"),
        ("fffe00", b"\\0"),
        ("fffffbbf", b"\xff"),
        ("fffffff3", b"\n"),
        ("fffdfffbfff7ffef", b"{{{{"),
        ("ff3fcff3feffeffeff", b"???>>>"),
    ],
)
def test_huffman_strings(data, text):
    assert huffman.decode(bytes.fromhex(data)) == text
    assert huffman._decode_slowly(bytes.fromhex(data)) == text


@pytest.mark.parametrize(
    "data",
    [
        "00",  # a padding of zeros
        "fe",  # seven bits of a longer code: not ones only
        "ff",  # eight ones
        "07ff",  # a padding of eleven ones
        "ffff",
        "ffffffff",  # the end of string
        "07ffffffff",
        "fffffffc07",  # ... in the middle
    ],
)
def test_huffman_strings_that_are_malformed(data):
    with pytest.raises(HpackError):
        huffman.decode(bytes.fromhex(data))
    with pytest.raises(HpackError):
        huffman._decode_slowly(bytes.fromhex(data))


def test_a_decoder_that_ran_out_of_memory_is_replaced(monkeypatch):
    def fail(data):
        raise MemoryError

    for decode in (huffman.decode, lambda data: huffman.decode_visible([data])):
        with monkeypatch.context() as patched:
            patched.setattr(huffman, "_inflate", fail)
            with pytest.raises(MemoryError):
                decode(b"\x07")
            assert huffman.decode(b"\x07") == b"0"


# -- what is malformed


@pytest.mark.parametrize(
    "block",
    [
        "80",  # index 0
        "be",  # the dynamic table is empty
        "ff00",
        "ffffffffff0f",
        "ff8080808000",  # an index of 127 in six bytes is within the limit, but nothing has it
        "ff808080808000",  # one byte too many
        "7fffffffffff",
        "ff",
        "ff80",
        "40",
        "4001",
        "400161",
        "40016105",
        "4001610568",
        "7e",
        "00836107",
        "0003616263",
        "000161ff",
        "000161017fe1",  # the length goes on, as another field that is cut off
        "0f",
        "1f80",
        "8220",  # a size update within a block
        "3fe21f",  # a size update beyond 4096
        "3fffffffffff",
        "0001618107ff",
    ],
)
def test_malformed_blocks(block):
    with pytest.raises(HpackError):
        Decoder().decode(bytes.fromhex(block))


def test_a_block_that_is_cut_off_is_malformed_or_another_block():
    block = bytes.fromhex("828684418cf1e3c2e5f23a6ba0ab90f4ff5886a8eb10649cbf408825a849e95ba97d7f8925a849e95bb8e8b4bf")
    whole = Decoder().decode(block).items
    complete = 0
    for end in range(len(block)):
        try:
            items = Decoder().decode(block[:end]).items
        except HpackError:
            continue
        assert items == whole[: len(items)]
        complete += 1
    assert complete == len(whole)  # nothing, and after each field but the last


def test_integers_as_long_as_they_may_be():
    name = encode_integer(FIRST_DYNAMIC, 4, 0)
    assert Decoder().decode(b"\x40\x01a\x01b" + name[:1] + bytes((name[1] | 0x80, 0x80, 0x80, 0x80, 0)) + b"\x01c").items == ((b"a", b"b"), (b"a", b"c"))
    long = b"v" * 5000
    assert Decoder().decode(b"\x00" + encode_integer(5000, 7, 0) + long + encode_integer(5000, 7, 0) + long).items == ((long, long),)


# -- the table's size


def test_size_updates_evict():
    decoder = Decoder()
    decoder.decode(encode_literal(b"a", b"1").replace(b"\x00", b"\x40", 1) + b"\x40\x01b\x012")
    assert table_of(decoder) == ((b"b", b"2"), (b"a", b"1"))
    decoder.decode(encode_integer(34, 5, 0x20))
    assert table_of(decoder) == ((b"b", b"2"),)
    decoder.decode(encode_integer(33, 5, 0x20) + encode_integer(4096, 5, 0x20))
    assert table_of(decoder) == ()


def test_an_entry_larger_than_the_table_empties_it():
    decoder = Decoder()
    decoder.decode(b"\x20\x3f\x15\x40\x01a\x01b")
    assert table_of(decoder) == ((b"a", b"b"),)
    assert decoder.decode(b"\x7e" + encode_integer(100, 7, 0) + b"x" * 100).items == ((b"a", b"x" * 100),)
    assert table_of(decoder) == ()


def test_a_smaller_setting_needs_a_size_update():
    for first in (b"", b"\x82", encode_integer(101, 5, 0x20)):
        decoder = Decoder()
        decoder.max_table_size = 100
        with pytest.raises(HpackError):
            decoder.decode(first)
    decoder = Decoder()
    decoder.max_table_size = 100
    decoder.max_table_size = 4096
    with pytest.raises(HpackError):
        decoder.decode(encode_integer(101, 5, 0x20))
    decoder = Decoder()
    decoder.max_table_size = 100
    decoder.max_table_size = 4096
    decoder.decode(encode_integer(100, 5, 0x20) + encode_integer(4096, 5, 0x20) + b"\x82")
    decoder.decode(b"\x82")


def test_a_smaller_setting_holds_for_blocks_that_are_known():
    decoder = Decoder()
    for _ in range(3):
        decoder.decode(b"\x82\x84")
    decoder.max_table_size = 0
    with pytest.raises(HpackError):
        decoder.decode(b"\x82\x84")


def test_a_larger_setting_allows_more():
    decoder = Decoder()
    decoder.max_table_size = 8192
    decoder.decode(b"\x82")
    decoder.decode(encode_integer(8192, 5, 0x20) + b"\x40\x01a" + encode_integer(5000, 7, 0) + b"x" * 5000)
    assert size_of(table_of(decoder)) == 5033


# -- limits


def test_the_list_size_is_limited_and_the_table_stays_in_step():
    decoder = Decoder(max_list_size=100)
    fields = decoder.decode(b"\x82\x40\x01a" + encode_integer(100, 7, 0) + b"x" * 100 + b"\x40\x01b\x01c")
    assert fields.over
    assert fields.items == ((b":method", b"GET"),)
    assert fields.size == 42
    assert table_of(Decoder()) == ()
    assert decoder.decode(b"\xbe").items == ((b"b", b"c"),)
    assert decoder.decode(b"\xbf").over


def test_the_number_of_fields_is_limited():
    decoder = Decoder(max_fields=3)
    assert not decoder.decode(b"\x82\x84\x86").over
    fields = decoder.decode(b"\x82\x84\x86\x82")
    assert fields.over
    assert len(fields.items) == 3


def test_a_bomb_is_not_unpacked():
    """Twelve thousand references to an entry that fills the table: 48 MB."""
    decoder = Decoder()
    decoder.decode(b"\x40\x01a" + encode_integer(4000, 7, 0) + b"x" * 4000)
    for _ in range(3):
        fields = decoder.decode(b"\xbe" * 12000)
        assert fields.over
        assert len(fields.items) == 65536 // 4033
        assert fields.size == 65536 // 4033 * 4033
    assert not decoder.decode(b"\xbe").over


def test_fields_after_the_limit_still_go_into_the_table():
    decoder = Decoder(max_list_size=1000)
    block = b"\x82" * 10000 + b"\x40\x01a\x01b" + b"\x82" * 10000 + b"\x40\x01c\x01d"
    fields = decoder.decode(block)
    assert fields.over
    assert fields.items == ((b":method", b"GET"),) * 23
    assert table_of(decoder) == ((b"c", b"d"), (b"a", b"b"))
