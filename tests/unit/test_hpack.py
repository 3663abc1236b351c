"""HPACK: the examples of RFC 7541, limits, malformed blocks, and what memos may and may not remember."""

from __future__ import annotations

import hpack
import pytest

from meshproxy.codec.hpack import decoder as decoder_module
from meshproxy.codec.hpack import encoder as encoder_module
from meshproxy.codec.hpack import huffman
from meshproxy.codec.hpack.decoder import Decoder, Fields, ShapedFields
from meshproxy.codec.hpack.encoder import Encoder, encode_literal
from meshproxy.codec.hpack.tables import FIRST_DYNAMIC, HpackError, decode_rest, encode_integer


@pytest.fixture(autouse=True)
def nothing_seen():
    """Blocks and fields that other tests have seen come for the first time again."""
    decoder_module._once.clear()
    decoder_module._shared.clear()
    decoder_module._shapes.clear()
    decoder_module._layouts.clear()
    encoder_module._once.clear()


def pairs(text: str):
    """`name: value` lines as fields; a name may begin with a colon."""
    fields = []
    for line in text.strip().splitlines():
        name, _, value = line.strip()[1:].partition(": ")
        fields.append(((line.strip()[0] + name).encode(), value.encode()))
    return tuple(fields)


def table_of(decoder: Decoder):
    """The dynamic table, newest first, as the peer could reference it."""
    entries = []
    while True:
        try:
            entries += decoder.decode(encode_integer(FIRST_DYNAMIC + len(entries), 7, 0x80)).items
        except HpackError:
            return tuple(entries)


def size_of(fields) -> int:
    return sum(len(name) + len(value) + 32 for name, value in fields)


STATUS = (b":status", b"200")

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
        (decoder_module._once, decoder_module._MAX_ONCE),
        (decoder_module._shared, decoder_module._MAX_SHARED),
        (decoder_module._literal_names, decoder_module._MAX_NAMES),
        (decoder_module._secrets, decoder_module._MAX_SECRETS),
        (decoder_module._shapes, decoder_module._MAX_SHARED_SHAPES),
    ):
        assert 0 < len(memo) <= limit
    for number in range(20000):
        decoder.decode(encode_literal(b"n", b"%d" % number).replace(b"\x00", b"\x40", 1))
    assert 0 < len(decoder_module._pairs) <= decoder_module._MAX_PAIRS
    assert size_of(table_of(decoder)) <= 4096


def test_an_idle_decoder_has_no_table_of_its_own():
    decoder = Decoder()
    decoder.decode(b"\x82\x84\x86")
    assert decoder._table is Decoder()._table
    assert decoder.known is Decoder().known


# -- encoding


def test_encoder_inserts_what_comes_twice():
    encoder = Encoder()
    decoder = Decoder()
    items = pairs(""":method: GET
    :path: /a?b
    host: a.example
    x-request-id: 1
    authorization: secret""")
    blocks = [encoder.encode(items) for _ in range(3)]
    assert blocks[0] == b"\x82\x04\x04/a?b\x0f\x17\x09a.example\x00\x0cx-request-id\x011\x1f\x08\x06secret"
    assert blocks[1] == b"\x82\x04\x04/a?b\x66\x09a.example\x00\x0cx-request-id\x011\x1f\x08\x06secret"
    assert blocks[2] == b"\x82\x04\x04/a?b\xbe\x00\x0cx-request-id\x011\x1f\x08\x06secret"
    for block in blocks:
        assert decoder.decode(block).items == items


def test_what_is_secret_is_never_indexed():
    encoder = Encoder()
    for _ in range(3):
        assert encoder.encode([(b"authorization", b"x" * 300)])[:2] == b"\x1f\x08"
        assert encoder.encode([(b"cookie", b"a=b")])[:2] == b"\x1f\x11"
        assert encoder.encode([(b"cookie", b"a" * 20)])[:2] == b"\x0f\x11"


def test_blocks_repeat_as_long_as_the_generation_stays():
    encoder, decoder = Encoder(), Decoder()
    first, second = ((b"x-a", b"1"), (b"x-b", b"2")), ((b"x-c", b"3"),)
    while True:
        generation = encoder.generation
        block = encoder.encode(first)
        assert decoder.decode(block).items == first
        if len(block) == 2:
            break
    assert encoder.generation == generation
    for _ in range(3):
        generation = encoder.generation
        decoder.decode(encoder.encode(second))
        if encoder.generation == generation:
            assert decoder.decode(block).items == first
        else:
            again = encoder.encode(first)
            assert again != block  # the indices have grown
            assert decoder.decode(again).items == first
            block = again
    assert decoder.decode(block).items == first


def test_known_blocks_follow_the_table():
    encoder, decoder = Encoder(), Decoder()
    key, other = object(), object()
    items, others = ((b"x-a", b"1"), (b"x-b", b"2")), ((b"x-c", b"3"),)
    for round_number in range(5):
        for _ in range(4):
            assert decoder.decode(encoder.encode_known(key, items)).items == items
        assert encoder.encode_known(key, items) is encoder.encode_known(key, ())  # the key stands for the items
        assert decoder.decode(encoder.encode_known(other, others)).items == others
        if round_number == 3:
            encoder.set_max_table_size(40)
            decoder.max_table_size = 40
    for number in range(1000):
        encoder.encode_known(number, items)
    assert len(encoder.blocks) <= encoder_module._MAX_BLOCKS


def test_size_updates_are_sent_once_the_smallest_first():
    encoder, decoder = Encoder(), Decoder()
    encoder.set_max_table_size(8192)  # more than we spend
    assert encoder.encode([STATUS]) == b"\x88"
    encoder.set_max_table_size(1000)
    encoder.set_max_table_size(0)
    encoder.set_max_table_size(2000)
    decoder.max_table_size = 0
    decoder.max_table_size = 2000
    block = encoder.encode([STATUS])
    assert block == b"\x20" + encode_integer(2000, 5, 0x20) + b"\x88"
    decoder.decode(block)
    assert encoder.encode([STATUS]) == b"\x88"
    encoder.set_max_table_size(0)
    assert encoder.encode([STATUS]) == b"\x20\x88"
    encoder.set_max_table_size(4096)
    assert encoder.encode([STATUS]) == encode_integer(4096, 5, 0x20) + b"\x88"


def test_a_larger_table_has_to_be_declared():
    encoder = Encoder(max_table_size=10000)
    assert encoder.encode([STATUS]) == b"\x88"
    encoder.set_max_table_size(20000)
    assert encoder.encode([STATUS]) == encode_integer(10000, 5, 0x20) + b"\x88"


def test_a_table_of_no_size_is_not_used():
    encoder, decoder = Encoder(max_table_size=0), Decoder()
    for _ in range(3):
        assert decoder.decode(encoder.encode([(b"x-a", b"1")])).items == ((b"x-a", b"1"),)
    assert table_of(decoder) == ()


def test_a_full_table_starts_anew_when_other_fields_repeat():
    encoder, decoder = Encoder(), Decoder()
    restarts = 0
    for number in range(400):
        items = ((b"x-field-%d" % number, b"v" * 20),)
        for _ in range(2):
            block = encoder.encode(items)
            restarts += block[0] == 0x20
            assert decoder.decode(block).items == items
        assert encoder._used == decoder._used
    assert restarts == 3  # 65 fields fit, then 64 do not: one round is 129 fields
    # What does not repeat does not disturb what does.
    for _ in range(4):
        decoder.decode(encoder.encode([(b"x-kept", b"1")]))
    for number in range(1000):
        decoder.decode(encoder.encode([(b"x-new", b"%d" % number)]))
    assert decoder.decode(encoder.encode([(b"x-kept", b"1")])).items == ((b"x-kept", b"1"),)
    assert len(encoder) <= encoder_module._MAX_KNOWN


def test_an_idle_encoder_has_nothing_of_its_own():
    encoder = Encoder()
    assert encoder._places is Encoder()._places
    assert encoder.blocks is Encoder().blocks


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
        kept.append(sum(layout._known for layout in decoder_module._layouts.values()))
    assert 0 < max(kept) <= decoder_module._MAX_LENGTHS


def test_layouts_that_are_shared_no_more_learn_nothing():
    first = Decoder()
    for number in range(4):
        first.decode(request(b"/%d" % number, b""))
    (layout,) = decoder_module._layouts.values()
    assert layout._known
    other = Decoder()
    for kind in range(decoder_module._MAX_LAYOUTS):
        for number in range(4):
            other.decode(b"\x82" * kind + b"\x00\x02%02d\x01%d" % (kind, number))
    assert layout not in decoder_module._layouts.values()
    assert len(decoder_module._layouts) <= decoder_module._MAX_LAYOUTS
    assert first.decode(request(b"/longer", b"x")).items[1] == (b":path", b"/longer")
    assert layout.start[1] == {}


def test_few_shapes_are_kept():
    decoder = Decoder()
    for kind in range(100):
        for number in range(4):
            decoder.decode(b"\x00\x02%02d\x01%d" % (kind, number))
    assert len(decoder._shapes) == decoder_module._MAX_SHAPES
    assert len(decoder_module._shapes) <= decoder_module._MAX_SHARED_SHAPES


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
        assert decoder._table[decoder_module._NEWEST :] == [(bytes(name), bytes(value)) for name, value in other.header_table.dynamic_entries]
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
        assert len(decoder._pending) <= decoder_module._MAX_PENDING + 4096 // 32
    decoder._settle()
    assert decoder._table[decoder_module._NEWEST :] == [(bytes(name), bytes(value)) for name, value in other.header_table.dynamic_entries]
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
    (shape,) = {shape for shape in decoder_module._shapes.values() if shape.starts}
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
    assert decoder_module._shapes
    assert all(len(shape.starts) <= decoder_module._MAX_STARTS for shape in decoder_module._shapes.values())


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
    assert 0 < len(decoder_module._steps) <= decoder_module._MAX_CHAINS


def test_blocks_that_index_everything_anew() -> None:
    """As nginx answers: all fields literal and with indexing, in every response. They decode the same, and the table turns over as it should."""
    decoder, other = Decoder(), hpack.Decoder()
    fields = [(b"server", b"nginx"), (b"date", b"Sat, 21 Nov 2026 10:00:00 GMT"), (b"content-type", b"text/plain"), (b"x-one-more", b"y" * 30)]
    block = b"\x88" + b"".join(b"\x40" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)
    for _ in range(60):
        assert decoder.decode(block).items == ((b":status", b"200"), *fields)
        assert [(bytes(name), bytes(value)) for name, value in other.decode(block, raw=True)] == [(b":status", b"200"), *fields]
        decoder._settle()
        assert decoder._table[decoder_module._NEWEST :] == [(bytes(name), bytes(value)) for name, value in other.header_table.dynamic_entries]
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
    assert b"Bearer 1" in decoder_module._secrets.values()
    alone = Decoder()
    for number in range(4):
        block = encoder.encode([(b"authorization", b"Basic %d" % number, True)])
        assert alone.decode(block).items == ((b"authorization", b"Basic %d" % number),)
    assert alone._shapes
    with pytest.raises(HpackError):
        alone.decode(block[:2] + b"\x81\x00")  # padding that is none
