"""HPACK, encoding: what goes into the table, and when blocks are the same again."""

from __future__ import annotations

from meshproxy.codec.hpack import encoder as encoder_module
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.encoder import Encoder
from meshproxy.codec.hpack.tables import encode_integer
from tests.unit.hpack_help import nothing_seen as nothing_seen
from tests.unit.hpack_help import pairs, table_of

STATUS = (b":status", b"200")


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
