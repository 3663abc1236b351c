"""Bytes of messages on the wire, as logs show them."""

from __future__ import annotations

import pytest

from meshproxy.codec.metering import METERED, HeadMeter, sent_fields

REQUEST = b"POST /a HTTP/1.1\r\nHost: a.test\r\nX-Spaces:   two words \t\r\nX-Empty:\r\n\r\nbody"


def test_received_fields_count_names_values_and_three_bytes():
    meter = HeadMeter()
    assert meter.feed(REQUEST) == [4 + 6 + 3 + 8 + 9 + 3 + 7 + 3]
    assert meter.complete
    assert meter.rest == b"body"


@pytest.mark.parametrize("cut", range(1, len(REQUEST)))
def test_pieces_count_as_the_whole(cut: int):
    meter = HeadMeter()
    sizes = meter.feed(REQUEST[:cut])
    if not meter.complete:
        sizes += meter.feed(REQUEST[cut:])
    assert sizes == [43]


def test_informational_responses_are_followed_by_another_head():
    meter = HeadMeter()
    sizes = meter.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert (sizes, meter.complete) == ([3, 4 + 1 + 3], False)
    assert meter.feed(b"content-length: 0\r\n\r\n") == [14 + 1 + 3]
    assert meter.complete


def test_a_switch_of_protocols_ends_the_heads():
    meter = HeadMeter()
    assert meter.feed(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\nraw\r\n\r\n") == [7 + 1 + 3]
    assert meter.complete


def test_what_is_no_message_has_no_fields():
    assert HeadMeter().feed(b"nonsense\r\nA: b\r\n\r\n") == [0]


def test_a_meter_starts_again():
    meter = HeadMeter()
    meter.feed(REQUEST)
    meter.start()
    assert (meter.complete, meter.rest) == (False, b"")
    assert meter.feed(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n") == [4 + 1 + 3]


def test_sent_fields_are_their_lines():
    assert sent_fields(b"GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n\r\nbody") == len(b"host: a\r\nx: y\r\n")
    assert sent_fields(b"HTTP/1.1 204 No Content\r\n\r\n") == 0


@pytest.mark.parametrize(
    ("format", "asks"),
    [
        (b"%DOWNSTREAM_WIRE_BYTES_SENT%", True),
        (b"%UPSTREAM_HEADER_BYTES_RECEIVED%", True),
        (b"%UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT%", True),
        (b"%COMMON_DURATION(DS_RX_BEG:US_RX_BODY_BEG)%", True),
        (b"%BYTES_SENT% %REQUEST_HEADERS_BYTES% %DURATION%", False),
    ],
)
def test_only_some_formats_ask(format: bytes, asks: bool):
    assert (METERED(format) is not None) is asks
