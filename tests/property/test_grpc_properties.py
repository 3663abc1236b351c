"""gRPC framing and headers, however a stream is cut and whatever it holds."""

from __future__ import annotations

import contextlib
import itertools

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec import grpc

MESSAGES = st.lists(st.tuples(st.sampled_from((0, 1)), st.binary(max_size=20)), max_size=8)
CUTS = st.lists(st.integers(0, 60), max_size=12)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(MESSAGES, CUTS)
def test_any_split_gives_the_same_messages(messages, cuts):
    data = b"".join(grpc.frame(message, flags) for flags, message in messages)
    decoder, counter = grpc.MessageDecoder(limit=20), grpc.MessageCounter()
    found, begun = [], 0
    for piece in pieces(data, cuts):
        found += decoder.feed(piece)
        begun += counter.feed(piece)
    assert found == messages
    assert decoder.between
    assert begun == counter.count == len(messages)


@given(st.binary(max_size=80), CUTS)
def test_any_bytes_are_counted_alike_however_they_come(data, cuts):
    whole, split = grpc.MessageCounter(), grpc.MessageCounter()
    whole.feed(data)
    assert sum(split.feed(piece) for piece in pieces(data, cuts)) == split.count == whole.count


@given(st.binary(max_size=40), CUTS)
def test_any_bytes_are_messages_or_refused(data, cuts):
    decoder = grpc.MessageDecoder(limit=16)
    messages = []
    with contextlib.suppress(grpc.FramingError):
        for piece in pieces(data, cuts):
            messages += decoder.feed(piece)
    assert all(len(message) <= 16 for _, message in messages)
    again = b"".join(grpc.frame(message, flags) for flags, message in messages)
    assert data.startswith(again)


@given(st.binary(max_size=60))
def test_texts_survive_grpc_message(text):
    value = grpc.encode_message(text)
    assert all(0x20 <= byte < 0x7E for byte in value)
    assert grpc.decode_message(value) == text


@given(st.integers(0, 1 << 60))
def test_timeouts_have_at_most_eight_digits_and_never_grow(milliseconds):
    text = grpc.format_timeout(milliseconds)
    assert len(text) <= 9
    back = grpc.parse_timeout(text)
    assert back is not None
    assert back <= milliseconds


@given(st.binary(max_size=12))
def test_any_timeout_is_a_number_or_nothing(text):
    found = grpc.parse_timeout(text)
    assert found is None or found >= 0
