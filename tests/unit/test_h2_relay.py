"""Data that goes on from one session to another by relays: what passes, what does not, what is booked; see also tests/property/test_h2_relay_property.py."""

from __future__ import annotations

import pytest

from meshproxy.codec.h2 import errors, frames
from tests.unit.h2_relay_help import Row, data

SMALL = {"initial_stream_window_size": 65_535, "initial_connection_window_size": 65_535}


def sizes(output: bytes) -> list[tuple[int, int, int]]:
    """The frames of an output: type, stream, bytes."""
    found = []
    while output:
        word, _, stream = frames.unpack_head(output, 0)
        found.append((word & 0xFF, stream, word >> 8))
        output = output[9 + (word >> 8) :]
    return found


def split(output: bytes) -> list[bytes]:
    """The frames of an output."""
    found = []
    while output:
        size = 9 + int.from_bytes(output[:3], "big")
        found.append(output[:size])
        output = output[size:]
    return found


def test_frames_pass_in_one_piece_and_owners_hear_of_them_when_they_ask() -> None:
    row = Row(2)
    row.down.feed(data(1, b"-") + data(3, b"-"))
    row.take()
    row.now = 5.0
    outputs = row.up.outputs
    row.down.feed(data(1, b"one") + data(3, b"two") + data(1, b"three"))
    assert len(row.up.session.out) == 1
    assert row.up.outputs == outputs + 1
    assert row.up.take() == data(3, b"one") + data(1, b"two") + data(3, b"three")
    assert [request.passed for request in row.requests] == [0, 0]
    row.now = 6.0
    for request in row.requests:
        request.settle_relays()
    assert [(request.passed, request.heard_at, request.log) for request in row.requests] == [(9, 5.0, []), (4, 5.0, [])]


def test_both_directions_at_once() -> None:
    row = Row(1)
    row.down.feed(data(1, b"ask"))
    row.up.feed(data(1, b"answer"))
    assert row.take() == (data(1, b"answer"), data(1, b"ask"))


def test_every_split_comes_out_whole() -> None:
    text = data(1, b"x" * 20) + data(3, b"y" * 20)
    for cut in range(1, len(text)):
        row = Row(2)
        row.down.feed(text[:cut])
        row.down.feed(text[cut:])
        assert b"".join(frame[9:] for frame in split(row.up.take())) == b"x" * 20 + b"y" * 20
        row.requests[0].settle_relays()
        assert row.requests[0].passed == 20


@pytest.mark.parametrize(("frame", "out"), [(data(1, b"\1ab\0", frames.PADDED), data(1, b"ab")), (data(1, b"z", frames.END_STREAM), data(1, b"z", 1))])
def test_frames_that_are_not_plain_take_the_general_way_between_others(frame: bytes, out: bytes) -> None:
    row = Row(1)
    row.down.feed(data(1, b"first") + frame)
    assert row.up.take() == data(1, b"first") + out
    assert row.requests[0].received == (5 + 4 if out[4] == 0 else 5)


def test_the_end_of_a_request_leaves_the_response_its_relay() -> None:
    row = Row(1)
    row.down.feed(data(1, b"", frames.END_STREAM))
    assert row.requests[0].relay is None
    row.up.feed(data(1, b"more"))
    assert row.down.take() == data(1, b"more")
    assert row.responses[0].log == []


def test_the_end_of_a_response_ends_the_relay_of_its_request() -> None:
    row = Row(1)
    row.down.feed(data(1, b"four"))
    row.up.feed(data(1, b"", frames.END_STREAM))
    assert row.requests[0].passed == 4
    assert row.requests[0].relay is row.requests[0].feeder is row.responses[0].relay is None
    assert not row.down.session.relays
    assert not row.up.session.relays


def test_trailers_before_the_content_length_is_reached() -> None:
    row = Row(3)
    row.down.feed(data(5, b"x" * 1000))
    flags = frames.END_HEADERS | frames.END_STREAM
    row.down.feed(frames.encode(frames.HEADERS, flags, 5, row.down.encoder.encode([(b"x", b"y")])))
    assert row.down.error == errors.PROTOCOL_ERROR


def test_no_more_than_the_content_length() -> None:
    row = Row(3)
    row.down.feed(data(5, b"x" * 2999) + data(5, b"y") + data(5, b"z"))
    assert row.up.take()[: 9 + 2999 + 9 + 1] == data(1, b"x" * 2999) + data(1, b"y")
    assert ("reset", 5, errors.PROTOCOL_ERROR, errors.REMOTE_RESET, False) in row.events


def test_a_closed_window_keeps_what_comes_in_order() -> None:
    row = Row(1)
    row.up.feed(frames.encode_settings([(frames.INITIAL_WINDOW_SIZE, 100)]))
    row.take()
    row.down.feed(data(1, b"a" * 60) + data(1, b"b" * 60) + data(1, b"c" * 10))
    assert row.up.take() == data(1, b"a" * 60) + data(1, b"b" * 40)
    row.up.feed(frames.encode_window_update(1, 25))
    assert row.up.take() == data(1, b"b" * 20) + data(1, b"c" * 5)
    row.down.feed(data(1, b"d"))
    row.up.feed(frames.encode_window_update(1, 1000))
    assert row.up.take() == data(1, b"c" * 5 + b"d")
    row.down.feed(data(1, b"e"))
    assert row.up.take() == data(1, b"e")
    assert row.requests[0].log == ["general"] * 3


def test_nothing_overtakes_a_queue_while_windows_are_open() -> None:
    row = Row(1, upstream={"initial_stream_window_size": 100})
    session = row.up.session
    session.set_writable(False)
    row.down.feed(data(1, b"a" * 10_000) + data(1, b"b" * 10_000))
    session.set_writable(True)  # sends no more than the high watermark at a time
    assert row.responses[0].queued == 10_000
    row.down.feed(data(1, b"c"))
    session.set_writable(True)
    assert b"".join(frame[9:] for frame in split(row.up.take())) == b"a" * 10_000 + b"b" * 10_000 + b"c"


def test_windows_are_granted_anew_as_they_are_used() -> None:
    row = Row(1, downstream=SMALL)
    for _ in range(100):
        row.down.feed(data(1, b"x" * 1000))
        for kind, stream, _ in sizes(row.up.take()):
            assert (kind, stream) == (frames.DATA, 1)
    updates = sizes(row.down.take())
    assert updates == [(frames.WINDOW_UPDATE, 1, 4), (frames.WINDOW_UPDATE, 0, 4)] * 3
    assert row.up.error == row.down.error is None


def test_what_paused_streams_withhold_counts_against_the_connection() -> None:
    row = Row(2, downstream=SMALL | {"initial_stream_window_size": 200_000})
    row.requests[0].pause()
    for _ in range(4):
        row.down.feed(data(1, b"x" * 16_000))
    assert row.down.session._withheld == 64_000
    row.down.feed(data(3, b"y" * 1_000))
    assert row.down.error is None
    row.down.feed(data(3, b"y" * 1_000))
    assert row.down.error == errors.FLOW_CONTROL_ERROR


def test_a_stream_that_is_paused_withholds_what_still_comes() -> None:
    row = Row(1)
    row.down.feed(data(1, b"one"))
    row.requests[0].pause()
    row.down.feed(data(1, b"three"))
    assert (row.requests[0].unconsumed, row.requests[0].received) == (5, 8)
    row.requests[0].resume()
    row.down.feed(data(1, b"two"))
    row.requests[0].settle_relays()
    assert (row.requests[0].unconsumed, row.requests[0].received, row.requests[0].passed) == (0, 11, 11)
    assert row.up.take() == data(1, b"one") + data(1, b"three") + data(1, b"two")


def test_frames_are_counted_for_the_flood_of_window_updates() -> None:
    row = Row(1)
    row.down.feed(data(1, b"x") * 7)
    assert row.up.session.data_frames == 7


def test_a_peer_that_takes_nothing_is_a_flood_by_frames_and_not_by_pieces() -> None:
    row = Row(1, upstream={"max_outbound_frames": 20})
    session = row.up.session
    row.down.feed(data(1, b"x") * 20)
    session.set_writable(False)
    session.take()
    session.emit(frames.SETTINGS_ACK)
    with pytest.raises(errors.Http2Error, match="Too many frames"):
        session.take()


def test_large_pieces_are_not_copied_once_more() -> None:
    row = Row(1)
    row.up.feed(frames.encode_settings([(frames.INITIAL_WINDOW_SIZE, 1 << 20)]) + frames.encode_window_update(0, 1 << 20))
    row.take()
    row.down.feed(data(1, b"x" * 16_384) * 5)
    assert row.up.session.apart == 1
    (piece,) = row.up.session.take_parts()
    assert isinstance(piece, memoryview)
    assert sizes(bytes(piece)) == [(frames.DATA, 1, 16_384)] * 5
    assert row.up.session._frames == 5


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_reset_ends_both_directions(side: str) -> None:
    row = Row(1)
    row.down.feed(data(1, b"abc"))
    getattr(row, side).feed(frames.encode_reset(1, errors.CANCEL))
    assert row.requests[0].passed == 3
    assert row.requests[0].relay is row.requests[0].feeder is row.responses[0].relay is row.responses[0].feeder is None
    assert not row.down.session.streams
    assert not row.up.session.streams


def test_a_connection_that_ends_ends_its_relays() -> None:
    row = Row(2)
    row.down.feed(data(1, b"abc") + data(3, b"de"))
    row.up.feed(frames.encode(frames.PING, 0, 1, bytes(8)))
    assert [request.passed for request in row.requests] == [3, 2]
    assert not row.down.session.relays
    assert not row.up.session.relays


def test_a_goaway_ends_the_relays_of_streams_that_are_refused() -> None:
    row = Row(2)
    row.down.feed(data(1, b"abc") + data(3, b"de"))  # go to 3 and 1
    row.up.feed(frames.encode_goaway(1, errors.NO_ERROR))
    assert list(row.down.session.relays) == [3]
    row.take()
    row.down.feed(data(3, b"more"))
    assert row.up.take() == data(1, b"more")
