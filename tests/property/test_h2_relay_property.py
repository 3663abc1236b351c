"""Data that goes on by relays: whatever comes, and however it is cut, peers get to the byte what they get the general way, and nobody can tell by any count."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.codec.h2 import frames
from tests.unit.h2_relay_help import Linked, Row, Side, data

STREAMS = 4
_SIZES = st.sampled_from([1, 2, 30, 1000, 1000, 1000, 4095, 4096, 9000, 16384])
_PLAIN = st.tuples(st.integers(0, STREAMS - 1), _SIZES, st.just(0))
# Many of one size are read ahead.
_ALIKE = st.builds(lambda size, streams: [(which, size, 0) for which in streams], _SIZES, st.lists(st.integers(0, STREAMS - 1), min_size=4, max_size=40))
_FRAMES = st.one_of(st.lists(_PLAIN, min_size=1, max_size=12), _ALIKE)
# One among others that is special: at the end, padded, empty or too long.
_ODD = st.tuples(
    st.integers(0, STREAMS - 1),
    st.sampled_from([0, 1, 2000, 3000, 16385]),
    st.sampled_from([0, frames.PADDED, frames.END_STREAM, frames.END_STREAM | frames.PADDED]),
)
_ODD_FRAMES = st.tuples(_FRAMES, _ODD, _FRAMES).map(lambda parts: [*parts[0], parts[1], *parts[2]])
_STEP = st.tuples(
    st.booleans(),  # which side
    st.integers(0, STREAMS - 1),
    st.one_of(
        st.tuples(st.just("frames"), _FRAMES),
        st.tuples(st.just("frames"), _FRAMES),
        st.tuples(st.just("frames"), _FRAMES),
        st.tuples(st.just("frames"), _FRAMES),
        st.tuples(st.just("frames"), _ODD_FRAMES),
        st.tuples(st.just("window"), st.sampled_from([1, 500, 20_000, frames.MAX_WINDOW - 60_000])),
        st.tuples(st.just("window of all"), st.sampled_from([500, 20_000, 70_000])),
        st.tuples(st.just("windows"), st.sampled_from([0, 3_000, 65_535, 100_000])),
        st.tuples(st.just("trailers"), st.none()),
        st.tuples(st.just("reset"), st.sampled_from([0, 7, 8])),
        st.tuples(st.just("ours"), st.sampled_from([2, 8])),
        st.tuples(st.just("goaway"), st.integers(0, 2 * STREAMS)),
        st.tuples(st.just("ping"), st.none()),
        st.tuples(st.just("writable"), st.booleans()),
        st.tuples(st.just("paused"), st.booleans()),
        st.tuples(st.just("later"), st.none()),
        st.tuples(st.just("settle"), st.none()),
    ),
)
_WINDOWS = st.sampled_from([{}, {"initial_stream_window_size": 9_000}, {"initial_stream_window_size": 65_535, "initial_connection_window_size": 65_535}])


def payload(size: int, flags: int) -> bytes:
    """Of a frame with so much data, and some padding if it is padded."""
    body = bytes(range(256)) * (size // 256 + 1)
    return b"\3" + body[:size] + bytes(3) if flags & frames.PADDED else body[:size]


def bytes_of(side: Side, stream: Linked, streams: list[Linked], what: str, value: object) -> bytes:
    """What a peer sends to do that."""
    if what == "frames":
        return b"".join(data(streams[which].id, payload(size, flags), flags) for which, size, flags in value)  # type: ignore[attr-defined]
    if what == "window":
        return frames.encode_window_update(stream.id, value)  # type: ignore[arg-type]
    if what == "window of all":
        return frames.encode_window_update(0, value)  # type: ignore[arg-type]
    if what == "windows":
        return frames.encode_settings([(frames.INITIAL_WINDOW_SIZE, value)])  # type: ignore[list-item]
    if what == "trailers":
        flags = frames.END_HEADERS | frames.END_STREAM
        return frames.encode(frames.HEADERS, flags, stream.id, side.encoder.encode([(b"x-end", b"1")]))
    if what == "reset":
        return frames.encode_reset(stream.id, value)  # type: ignore[arg-type]
    if what == "goaway":
        return frames.encode_goaway(value, 0)  # type: ignore[arg-type]
    return frames.encode(frames.PING, 0, 0, bytes(8))


def do(row: Row, upstream: bool, which: int, what: str, value: object, cuts: list[int]) -> None:
    side, streams = (row.up, row.responses) if upstream else (row.down, row.requests)
    stream = streams[which]
    if what == "later":
        row.now += 1.0
    elif what == "settle":
        stream.settle_relays()
    elif what == "writable":
        side.session.set_writable(bool(value))
    elif what == "paused":
        (stream.pause if value else stream.resume)()
    elif what == "ours":
        stream.reset(value)  # type: ignore[arg-type]
    else:
        text = bytes_of(side, stream, streams, what, value)
        start = 0
        for cut in cuts:
            side.feed(text[start : start + cut])
            start += cut
        side.feed(text[start:])


@given(st.lists(_STEP, max_size=25), st.lists(st.sampled_from([1, 5, 9, 700, 1009, 5000]), max_size=6), _WINDOWS, _WINDOWS)
@settings(max_examples=300)
def test_relays_do_what_the_general_way_does(steps, cuts, downstream, upstream) -> None:
    relayed, general = (Row(STREAMS, relays=relays, downstream=downstream, upstream=upstream) for relays in (True, False))
    for is_up, which, (what, value) in steps:
        for row in (relayed, general):
            do(row, is_up, which, what, value, cuts)
        assert relayed.take() == general.take()
    assert relayed.state() == general.state()
    for stream in (*relayed.requests, *relayed.responses):
        over = stream.session.streams.get(stream.id) is not stream
        assert stream.relay is None or not over
        assert stream.feeder is None or not over
