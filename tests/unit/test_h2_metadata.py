"""METADATA frames: maps that go with streams, how much of them there may be, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import hpack
import pytest

from meshproxy.codec.h2 import errors, frames, metadata
from meshproxy.codec.h2.errors import Http2Error
from tests.unit.test_h2_session import POST, Peer, Recorder, Side

END = 4
LIMIT = 1000


class Hearer(Recorder):
    """A stream that hears of maps."""

    def on_metadata(self, fields: dict[bytes, bytes]) -> None:
        self.log.append(("metadata", self.id, fields))


class Server(Side):
    """With one request under way, on stream 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_metadata": True, "max_metadata_size": LIMIT, **options})
        self.peer = Peer(self)
        self.peer.headers(1, POST, end=False)
        self.log.clear()

    def new_stream(self) -> Recorder:
        return Hearer(self.session, self.log)

    def metadata(self, payload: bytes, flags: int = END, stream: int = 1) -> None:
        self.peer.frame(frames.METADATA, flags, stream, payload)


def block(**fields: str) -> bytes:
    return hpack.Encoder().encode(list(fields.items()))


def test_a_map_in_one_frame_and_in_many():
    server = Server()
    whole = block(key="value", other="x" * 50)
    server.metadata(whole)
    for byte in whole[:-1]:
        server.metadata(bytes((byte,)), 0)
    server.metadata(b"", 0)
    server.metadata(whole[-1:])
    assert server.log == [("metadata", 1, {b"key": b"value", b"other": b"x" * 50})] * 2


def test_maps_have_no_tables_in_common():
    server = Server()
    encoder = hpack.Encoder()
    server.metadata(encoder.encode([("key", "value")]))
    with pytest.raises(Http2Error):
        server.metadata(encoder.encode([("key", "value")]))  # one byte, which refers to the block before


def test_of_equal_names_the_first_counts():
    server = Server()
    server.metadata(hpack.Encoder().encode([("a", "1"), ("b", "2"), ("a", "3")]))
    assert server.log == [("metadata", 1, {b"a": b"1", b"b": b"2"})]


def test_nothing_comes_of_empty_maps_but_a_count():
    server = Server()
    server.metadata(b"")
    assert (server.log, server.stats.metadata_empty_frames.n) == ([], 1)


@pytest.mark.parametrize("stream", [0, 3, 7])
def test_streams_that_are_not_there(stream):
    server = Server()
    server.metadata(block(key="value"), stream=stream)
    server.metadata(b"\xff" * 10, stream=stream)
    assert server.log == []


def test_streams_whose_peer_has_ended_them():
    server = Server()
    server.peer.frame(frames.DATA, frames.END_STREAM, 1)
    server.log.clear()
    server.metadata(block(key="value"))
    assert server.log == []


def test_where_it_is_not_allowed_nobody_looks_at_it():
    server = Server(allow_metadata=False)
    server.metadata(b"\xff" * 2 * LIMIT)
    assert server.log == []
    server.session.streams[1].send_metadata({b"key": b"value"})
    assert server.session.take() == b""


@pytest.mark.parametrize(
    "payloads",
    [
        [b"\xff\xff\xff\xff\xff\xff"],
        [bytes(LIMIT + 1)],
        [block(k="v" * 8)] * (LIMIT // len(block(k="v" * 8)) + 1),  # in all
        [hpack.Encoder().encode([("k", "v" * 700)]) + b"\xbe" * 12],  # little that becomes much
    ],
    ids=["garbage", "long", "many", "expanding"],
)
def test_what_costs_the_peer_the_connection(payloads):
    server = Server()
    server.session.take()
    with pytest.raises(Http2Error) as caught:
        for payload in payloads:
            server.metadata(payload)
    assert (caught.value.code, caught.value.silent, caught.value.flood) == (errors.INTERNAL_ERROR, True, False)
    assert server.session.take() == b""  # as Envoy, without a word


@pytest.mark.parametrize("size", [1, 16_000, 16_370, 16_384, 40_000])
def test_what_is_sent_is_what_comes(size):
    fields = {b"Any Name": b"\x00\xff", b"": b"empty", b"long": b"v" * size}
    wire = b"".join(metadata.encode(1, fields))
    server = Server(max_metadata_size=1 << 20)
    lengths = []
    at = 0
    while at < len(wire):
        word, flags, stream = frames.unpack_head(wire, at)
        at += 9 + (word >> 8)
        lengths.append(word >> 8)
        assert (word & 0xFF, stream, flags) == (frames.METADATA, 1, END if at == len(wire) else 0)
    assert all(length == frames.DEFAULT_FRAME_SIZE for length in lengths[:-1])
    assert 0 < lengths[-1] <= frames.DEFAULT_FRAME_SIZE
    server.session.feed(wire)
    assert server.log == [("metadata", 1, fields)]


def test_a_peer_that_does_not_read_lets_so_many_frames_pile_up():
    server = Server(max_metadata_size=1 << 20, max_outbound_frames=9)
    server.session.take()
    server.session.drained()
    server.session.set_writable(False)
    stream = server.session.streams[1]
    for _ in range(3):  # three frames each
        stream.send_metadata({b"long": b"v" * 40_000})
        server.session.take()
    stream.send_metadata({b"one": b"more"})
    with pytest.raises(Http2Error) as caught:
        server.session.take()
    assert caught.value.flood
    assert server.stats.outbound_flood.n == 1
