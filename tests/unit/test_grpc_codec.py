"""gRPC's headers and message framing."""

from __future__ import annotations

import pytest

from meshproxy.codec import grpc
from meshproxy.codec.headers import Headers


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        (b"1H", 3600000),
        (b"2M", 120000),
        (b"3S", 3000),
        (b"4m", 4),
        (b"5001u", 6),
        (b"1000001n", 2),
        (b"0S", 0),
        (b"-0S", 0),
        (b" +7 m", 7),
        (b"000000000000000000000099999999m", 99999999),
        (b"100000000m", None),
        (b"999999999999m", None),
        (b"S", None),
        (b"", None),
        (None, None),
        (b"1x", None),
        (b"-1S", None),
    ],
)
def test_parse_timeout(text, milliseconds):
    assert grpc.parse_timeout(text) == milliseconds


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, b"0m"), (99_999_999, b"99999999m"), (100_000_000, b"100000S"), (99_999_999_999, b"99999999S"), (100_000_000_000, b"1666666M"), (10**18, b"99999999H")],
)
def test_format_timeout(milliseconds, text):
    assert grpc.format_timeout(milliseconds) == text


@pytest.mark.parametrize(
    ("value", "status"),
    [(b"0", 0), (b"14", 14), (b"99", 99), (b"x", -1), (b"-1", -1), (b"", None), (b"1" * 5000, -1)],
)
def test_status_of(value, status):
    assert grpc.status_of(Headers([(b"grpc-status", value)])) == status


def test_no_status():
    assert grpc.status_of(Headers([])) is None
    assert grpc.status_of(None) is None


def test_statuses_and_http():
    assert [grpc.status_of_http(status) for status in (200, 400, 401, 403, 404, 408, 429, 500, 502, 503, 504)] == [2, 13, 16, 7, 12, 2, 14, 2, 14, 14, 14]
    assert [grpc.http_of_status(status) for status in range(-1, 18)] == [
        500, 200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401, 500,
    ]  # fmt: skip
    assert len(grpc.NAMES) == len(grpc.SNAKE_NAMES) == 17
    assert (grpc.NAMES[grpc.DATA_LOSS], grpc.SNAKE_NAMES[grpc.UNAUTHENTICATED]) == ("DataLoss", "UNAUTHENTICATED")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc-web", False),
        (b"application/grpcx", False),
        (b"application/json", False),
        (None, False),
    ],
)
def test_content_type(value, expected):
    assert grpc.is_content_type(value) is expected


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (b"/a.B/C", ("a.B", "C")),
        (b"/a.B/C?x=/y/", ("a.B", "C")),
        (b"//a//b//", ("a", "b")),
        (b"/a", None),
        (b"/a/b/c", None),
        (b"", None),
    ],
)
def test_method_of(path, method):
    assert grpc.method_of(path) == method


def test_messages_are_percent_encoded():
    text = "100 %, naïve\r\n~tilde".encode()
    assert grpc.encode_message(text) == b"100 %25, na%C3%AFve%0D%0A%7Etilde"
    assert grpc.decode_message(grpc.encode_message(text)) == text
    assert grpc.decode_message(b"50% of %zz %4") == b"50% of %zz %4"


def test_frames():
    assert grpc.frame(b"abc") == b"\x00\x00\x00\x00\x03abc"
    assert grpc.frame(b"", grpc.COMPRESSED) == b"\x01\x00\x00\x00\x00"


def test_decoder():
    decoder = grpc.MessageDecoder()
    assert decoder.feed(b"") == []
    assert decoder.between
    assert decoder.feed(grpc.frame(b"a") + grpc.frame(b"", 1) + b"\0\0") == [(0, b"a"), (1, b"")]
    assert not decoder.between
    assert decoder.feed(b"\0\0\2x") == []
    assert decoder.feed(b"y") == [(0, b"xy")]
    assert decoder.between


def test_decoder_refuses_unknown_flags():
    decoder = grpc.MessageDecoder()
    with pytest.raises(grpc.FramingError, match="flags 0x80") as caught:
        decoder.feed(b"\x80\0\0\0\0")
    assert caught.value.status == grpc.INTERNAL


def test_decoder_refuses_long_messages_by_their_length():
    decoder = grpc.MessageDecoder(limit=3)
    assert decoder.feed(grpc.frame(b"abc")) == [(0, b"abc")]
    with pytest.raises(grpc.FramingError, match="4 bytes is over the limit of 3") as caught:
        decoder.feed(b"\0\0\0\0\4")
    assert caught.value.status == grpc.RESOURCE_EXHAUSTED


def test_counter_counts_messages_as_they_begin():
    counter = grpc.MessageCounter()
    assert counter.feed(b"\x00") == 1
    assert counter.feed(b"\0\0\0\2") == 0
    assert counter.feed(b"ab\xff\0\0\0") == 1
    assert counter.feed(b"\0" + grpc.frame(b"x") + grpc.frame(b"")) == 2
    assert counter.count == 4
