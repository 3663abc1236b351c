"""An HTTP/2 session against the `h2` package, and by hand where `h2` is too polite."""

from __future__ import annotations

from typing import Any

import h2.config
import h2.connection
import h2.events
import hpack
import pytest

from meshproxy.codec.h2 import errors, frames
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.metered import MeteredSession, MeteredStream
from meshproxy.codec.h2.session import Session
from meshproxy.codec.h2.settings import Options
from meshproxy.codec.h2.stream import Http2Stream
from meshproxy.codec.headers import Headers
from meshproxy.codec.hpack.encoder import Encoder
from meshproxy.observe.http2_stats import Http2Stats
from meshproxy.observe.stats import Store

GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]
POST = [(b":method", b"POST"), *GET[1:]]
OK = [(b":status", b"200")]


class Recorder(Http2Stream):
    """A stream that writes down what happens to it."""

    def __init__(self, session: Session, log: list[Any]) -> None:
        super().__init__(session)
        self.log = log

    def on_head(self, known: Any, end_stream: bool) -> None:
        self.log.append(("head", self.id, known.head(), end_stream))

    def on_data(self, data: bytes, end_stream: bool) -> None:
        self.log.append(("data", self.id, data, end_stream))

    def on_trailers(self, trailers: Headers) -> None:
        self.log.append(("trailers", self.id, trailers.items))

    def on_reset(self, code: int, details: str, remote: bool) -> None:
        self.log.append(("reset", self.id, code, details, remote))

    def on_writable(self, writable: bool) -> None:
        self.log.append(("writable", self.id, writable))

    def on_done(self) -> None:
        self.log.append(("done", self.id))


class Side:
    """A session and its owner."""

    def __init__(self, *, client: bool = False, **options: Any) -> None:
        self.log: list[Any] = []
        self.stats = Http2Stats(Store().scope("http2."))
        self.session = Session(self, Options(stats=self.stats, **options), client=client)
        self.session.start()

    def new_stream(self) -> Recorder:
        return Recorder(self.session, self.log)

    def open(self) -> Recorder:
        stream = self.new_stream()
        self.session.open(stream)
        return stream

    def on_output(self) -> None:
        """Tests take what there is when they want it."""

    def on_settings(self) -> None:
        self.log.append(("settings",))

    def on_goaway(self, last_id: int, code: int) -> None:
        self.log.append(("goaway", last_id, code))

    def on_ping_ack(self, data: bytes) -> None:
        self.log.append(("ack", data))


class Peer:
    """The other side by hand: frames in and out."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.encoder = Encoder()
        hello = frames.encode_settings([])
        side.session.feed(hello if side.session.client else frames.PREFACE + hello)
        self.sent()
        side.log.clear()

    def headers(self, stream_id: int, items: list[tuple[bytes, bytes]], *, end: bool = True) -> None:
        flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
        self.side.session.feed(frames.encode(frames.HEADERS, flags, stream_id, self.encoder.encode(items)))

    def frame(self, kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> None:
        self.side.session.feed(frames.encode(kind, flags, stream_id, payload))

    def sent(self) -> list[tuple[int, int, int, bytes]]:
        """Frames that came out since the last call: (type, flags, stream, payload)."""
        data = self.side.session.take()
        found = []
        while data:
            word, flags, stream_id = frames.unpack_head(data, 0)
            kind = word & 0xFF
            end = 9 + (word >> 8)
            found.append((kind, flags, stream_id, data[9:end]))
            data = data[end:]
        return found


def exchange(side: Side, other: h2.connection.H2Connection) -> list[Any]:
    """Until both have nothing more to say."""
    seen = []
    while True:
        out = other.data_to_send()
        if out:
            side.session.feed(out)
        back = side.session.take()
        for event in other.receive_data(back) if back else ():
            seen.append(event)
            if isinstance(event, h2.events.DataReceived):
                other.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        if not out and not back:
            return seen


def package(*, client: bool) -> h2.connection.H2Connection:
    made = h2.connection.H2Connection(h2.config.H2Configuration(client_side=client, header_encoding=False))
    made.initiate_connection()
    return made


def test_requests_of_the_h2_package() -> None:
    side, other = Side(), package(client=True)
    exchange(side, other)
    for stream_id in (1, 3, 5):
        other.send_headers(stream_id, [*POST, (b"content-length", b"5"), (b"cookie", b"a=b"), (b"x", b"y"), (b"cookie", b"c=d")])
        other.send_data(stream_id, b"hello", end_stream=True)
        exchange(side, other)
        kind, number, head, end = side.log[-2]
        assert (kind, number, head.method, head.path, head.authority, head.scheme, end) == ("head", stream_id, b"POST", b"/", b"a", b"http", False)
        assert head.items == [(b"content-length", b"5"), (b"x", b"y"), (b"cookie", b"a=b; c=d")]
        assert side.log[-1] == ("data", stream_id, b"hello", True)
        stream = side.session.streams[stream_id]
        stream.send_headers(OK, False)
        stream.send_data(b"z" * 100000, False)
        stream.send_trailers([(b"t", b"v")])
        events = exchange(side, other)
        assert sum(len(event.data) for event in events if isinstance(event, h2.events.DataReceived)) == 100000
        assert [event.headers for event in events if isinstance(event, h2.events.TrailersReceived)] == [[(b"t", b"v")]]
        assert side.log[-1] == ("done", stream_id)
    assert not side.session.streams
    side.stats.settle()
    assert side.stats.streams_active.n == side.stats.pending_send_bytes.n == 0


def test_trailers_of_a_shell() -> None:
    class Shell(Recorder):
        """What plays an exchange has a `send_headers` of another shape."""

        def send_headers(self, *_: Any) -> None:
            raise AssertionError("the session does not know this one")

    side, other = Side(client=True), package(client=False)
    stream = Shell(side.session, side.log)
    side.session.open(stream)
    Http2Stream.send_headers(stream, POST, False)
    stream.send_trailers([(b"t", b"v")])
    events = exchange(side, other)
    assert [event.headers for event in events if isinstance(event, h2.events.TrailersReceived)] == [[(b"t", b"v")]]


def test_large_data_is_not_copied() -> None:
    side, other = Side(client=True), package(client=False)
    exchange(side, other)
    data = b"d" * 10000
    stream = side.open()
    stream.send_headers(POST, False)
    stream.send_data(b"small", False)
    assert not side.session.apart
    stream.send_data(data, False)
    stream.send_data(data * 3, True)
    assert side.session.apart == 3
    parts = side.session.take_parts()
    assert any(part is data for part in parts)
    assert not side.session.out
    assert not side.session.apart
    events = other.receive_data(b"".join(parts))
    assert b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived)) == b"small" + data * 4


def test_responses_of_the_h2_package() -> None:
    side, other = Side(client=True), package(client=False)
    exchange(side, other)
    for _ in range(3):
        stream = side.open()
        stream.send_headers(POST, False)
        stream.send_data(b"q" * 200000, True)
        events = exchange(side, other)
        assert sum(len(event.data) for event in events if isinstance(event, h2.events.DataReceived)) == 200000
        other.send_headers(stream.id, [(b":status", b"103")])
        other.send_headers(stream.id, [*OK, (b"content-length", b"4")])
        other.send_data(stream.id, b"abcd", end_stream=True)
        exchange(side, other)
        assert [(entry[0], *entry[2:]) for entry in side.log[-2:]] == [("data", b"abcd", True), ("done",)]
        assert [entry[2].status for entry in side.log[-4:-2]] == [103, 200]
    assert not side.session.streams


def test_a_paused_stream_grants_nothing_and_the_connection_goes_on() -> None:
    side = Side(initial_stream_window_size=65535, initial_connection_window_size=131070)
    peer = Peer(side)
    peer.headers(1, POST, end=False)
    peer.headers(3, POST, end=False)
    side.session.streams[1].pause()
    for _ in range(3):
        peer.frame(frames.DATA, 0, 1, b"x" * 16384)
        peer.frame(frames.DATA, 0, 3, b"x" * 16384)
    updates = [(stream_id, int.from_bytes(payload, "big")) for kind, _, stream_id, payload in peer.sent() if kind == frames.WINDOW_UPDATE]
    assert updates == [(3, 2 * 16384)]  # half of its window; the connection's is not half consumed, for stream 1 keeps its part
    side.session.streams[1].resume()
    updates = [(stream_id, int.from_bytes(payload, "big")) for kind, _, stream_id, payload in peer.sent() if kind == frames.WINDOW_UPDATE]
    assert updates == [(0, 6 * 16384), (1, 3 * 16384)]


def test_more_than_the_window() -> None:
    peer = Peer(Side(initial_stream_window_size=65535))
    peer.headers(1, POST, end=False)
    peer.side.session.streams[1].pause()
    with pytest.raises(Http2Error) as caught:
        for _ in range(5):
            peer.frame(frames.DATA, 0, 1, b"x" * 16384)
    assert caught.value.code == errors.FLOW_CONTROL_ERROR
    assert peer.sent()[-1] == (frames.GOAWAY, 0, 0, bytes([0, 0, 0, 1, 0, 0, 0, errors.FLOW_CONTROL_ERROR]))


def test_data_waits_for_windows_in_turn() -> None:
    side = Side()
    peer = Peer(side)
    for stream_id in (1, 3):
        peer.headers(stream_id, GET)
        stream = side.session.streams[stream_id]
        stream.send_headers(OK, False)
        stream.send_data(bytes([stream_id]) * 60000, True)
    assert sum(len(frame[3]) for frame in peer.sent() if frame[0] == frames.DATA) == 65535
    assert side.stats.pending_send_bytes.n == 120000 - 65535
    peer.frame(frames.WINDOW_UPDATE, 0, 0, (1 << 20).to_bytes(4, "big"))
    data = [frame for frame in peer.sent() if frame[0] == frames.DATA]
    assert sum(len(frame[3]) for frame in data) == 120000 - 65535
    assert data[-1][1] == frames.END_STREAM
    assert not side.session.streams
    assert not side.session.blocked


def test_a_slow_transport_keeps_data_on_its_stream() -> None:
    side = Side(initial_stream_window_size=100000)
    side.session.high_watermark = 40000
    peer = Peer(side)
    peer.headers(1, GET)
    stream = side.session.streams[1]
    stream.send_headers(OK, False)
    side.session.set_writable(False)
    stream.send_data(b"x" * 30000, False)
    assert side.log[1:] == []
    stream.send_data(b"x" * 30000, False)
    assert side.log[1:] == [("writable", 1, False)]
    assert [frame[0] for frame in peer.sent()] == [frames.HEADERS]
    side.session.set_writable(True)
    assert side.log[2:] == [("writable", 1, True)]
    assert 40000 <= sum(len(frame[3]) for frame in peer.sent() if frame[0] == frames.DATA) < 60000  # so much at once
    assert side.session.more
    side.session.pump()
    assert not side.session.more
    stream.send_data(b"", True)
    assert sum(len(frame[3]) for frame in peer.sent() if frame[0] == frames.DATA) >= 60000 - 40000 - 16384
    assert side.log[3:] == [("done", 1)]


def test_reset_by_the_peer_and_by_us() -> None:
    side = Side()
    peer = Peer(side)
    peer.headers(1, POST, end=False)
    peer.frame(frames.RST_STREAM, 0, 1, errors.CANCEL.to_bytes(4, "big"))
    assert side.log[-1] == ("reset", 1, errors.CANCEL, errors.REMOTE_RESET, True)
    peer.headers(3, POST, end=False)
    side.session.streams[3].reset(errors.INTERNAL_ERROR)
    assert peer.sent() == [(frames.RST_STREAM, 0, 3, errors.INTERNAL_ERROR.to_bytes(4, "big"))]
    peer.frame(frames.DATA, 0, 3, b"late")
    peer.frame(frames.DATA, 0, 3, b"later")
    peer.headers(3, [(b"t", b"v")])
    assert peer.sent() == []  # it did not know yet
    assert side.log[-1][0] == "head"


def test_goaway_refuses_what_came_too_late() -> None:
    side = Side(client=True)
    peer = Peer(side)
    streams = [side.open() for _ in range(3)]
    for stream in streams:
        stream.send_headers(GET, True)
    peer.frame(frames.GOAWAY, 0, 0, bytes([0, 0, 0, 3, 0, 0, 0, 0]))
    assert side.log == [("reset", 5, errors.REFUSED_STREAM, errors.REMOTE_REFUSED, True), ("goaway", 3, 0)]
    assert side.session.free == 0
    assert set(side.session.streams) == {1, 3}


def test_streams_after_our_goaway_are_not_looked_at() -> None:
    side = Side()
    peer = Peer(side)
    peer.headers(1, POST, end=False)
    side.session.goaway()
    peer.sent()
    peer.headers(3, POST, end=False)
    peer.frame(frames.DATA, 0, 3, b"x")
    peer.frame(frames.WINDOW_UPDATE, 0, 3, b"\x00\x00\x00\x01")
    peer.frame(frames.DATA, frames.END_STREAM, 1, b"x")
    assert [entry[:2] for entry in side.log] == [("head", 1), ("data", 1)]
    assert peer.sent() == []


def test_too_many_streams() -> None:
    side = Side(max_concurrent_streams=1)
    peer = Peer(side)
    peer.headers(1, POST, end=False)
    peer.headers(3, POST, end=False)
    assert peer.sent() == [(frames.RST_STREAM, 0, 3, errors.REFUSED_STREAM.to_bytes(4, "big"))]
    assert side.stats.stream_refused_errors.n == 1


@pytest.mark.parametrize(
    ("kind", "flags", "payload", "stat"),
    [
        (frames.DATA, 0, b"", "inbound_empty_frames_flood"),
        (frames.PRIORITY, 0, b"\x00\x00\x00\x00\x00", "inbound_priority_frames_flood"),
        (frames.WINDOW_UPDATE, 0, b"\x00\x00\x00\x01", "inbound_window_update_frames_flood"),
    ],
)
def test_floods(kind: int, flags: int, payload: bytes, stat: str) -> None:
    peer = Peer(Side())
    peer.headers(1, POST, end=False)
    with pytest.raises(Http2Error) as caught:
        for _ in range(1000):
            peer.frame(kind, flags, 1, payload)
    assert caught.value.flood
    assert getattr(peer.side.stats, stat).n == 1


@pytest.mark.parametrize("frame", [frames.encode(frames.PING, 0, 0, bytes(8)), frames.encode_settings([])])
def test_answers_that_nobody_takes(frame: bytes) -> None:
    peer = Peer(Side(max_outbound_control_frames=100))
    peer.side.session.set_writable(False)
    with pytest.raises(Http2Error) as caught:
        for _ in range(1000):
            peer.side.session.feed(frame)
    assert caught.value.flood
    assert peer.side.stats.outbound_control_flood.n == 1


def test_endless_header_block() -> None:
    peer = Peer(Side(max_head_bytes=1024))
    peer.frame(frames.HEADERS, 0, 1, b"\x00" * 100)
    with pytest.raises(Http2Error) as caught:
        for _ in range(10000):
            peer.frame(frames.CONTINUATION, 0, 1, b"\x00" * 100)
    assert caught.value.code == errors.ENHANCE_YOUR_CALM
    assert peer.sent()[-1][0] == frames.GOAWAY


def test_headers_too_large_cost_the_stream_only() -> None:
    side = Side(max_head_bytes=1024)
    peer = Peer(side)
    peer.headers(1, [*GET, (b"x", b"y" * 2000)])
    assert side.log == [("reset", 1, errors.INTERNAL_ERROR, errors.HEADERS_TOO_LARGE, False)]
    assert side.stats.header_list_size_too_large.n == 1
    peer.headers(3, GET)
    assert side.log[-1][:2] == ("head", 3)


@pytest.mark.parametrize(
    "items",
    [
        GET[:3],
        GET[1:],
        [*GET, (b":path", b"/")],
        [*GET, (b"x", b"y"), (b":method", b"GET")],
        [*GET, (b":status", b"200")],
        [*GET, (b"X", b"y")],
        [*GET, (b"x y", b"z")],
        [*GET, (b"x", b"a\nb")],
        [*GET, (b"x", b"a\x00b")],
        [*GET, (b"connection", b"close")],
        [*GET, (b"transfer-encoding", b"chunked")],
        [*GET, (b"te", b"gzip")],
        [*GET, (b"content-length", b"1"), (b"content-length", b"1")],
        [*GET, (b"content-length", b"5")],
        [*GET[:3], (b":path", b"a")],
        [*GET[:3], (b":path", b"/ a")],
        [*GET[:3], (b":path", b"")],
        [*GET, (b":protocol", b"websocket")],
        [(b":method", b"CONNECT"), *GET[1:]],
        [(b":method", b"G T"), *GET[1:]],
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_malformed_requests(items: list[tuple[bytes, bytes]], lenient: bool) -> None:
    side = Side(stream_error_on_invalid_http_message=lenient)
    peer = Peer(side)
    for stream_id in (1, 3):  # also when the same comes again
        if lenient:
            peer.headers(stream_id, items)
            assert [entry[0] for entry in side.log] == ["reset"]
            assert peer.sent() == [(frames.RST_STREAM, 0, stream_id, errors.PROTOCOL_ERROR.to_bytes(4, "big"))]
            side.log.clear()
            continue
        with pytest.raises(Http2Error) as caught:
            peer.headers(stream_id, items)
        assert caught.value.code == errors.PROTOCOL_ERROR
        assert isinstance(caught.value.stream, Recorder)
        break
    assert side.stats.rx_messaging_error.n == (2 if lenient else 1)


@pytest.mark.parametrize("size", [0, 100])
def test_a_smaller_header_table_holds_from_its_acknowledgement_on(size: int) -> None:
    side = Side(hpack_table_size=size)
    peer = Peer(side)
    for stream_id in (1, 3):  # before it has heard of our SETTINGS
        peer.headers(stream_id, [*GET, (b"x-before", b"y")])
        assert side.log[-1][2].items == [(b"x-before", b"y")]
    peer.frame(frames.SETTINGS, frames.ACK)
    peer.encoder.set_max_table_size(size)
    for stream_id in (5, 7, 9):
        peer.headers(stream_id, [*GET, (b"x-before", b"y")])
        assert side.log[-1][2].items == [(b"x-before", b"y")]
    side = Side(hpack_table_size=size)
    peer = Peer(side)
    peer.frame(frames.SETTINGS, frames.ACK)
    with pytest.raises(Http2Error) as caught:
        peer.headers(1, GET)
    assert caught.value.code == errors.COMPRESSION_ERROR


class Counted(MeteredStream, Recorder):
    """A stream of a session that counts. What frames take is of no interest here."""

    def count_received(self, size: int, *, head: bool) -> None:
        """See `MeteredStream`."""

    def count_sent(self, size: int, *, head: bool) -> None:
        """See `MeteredStream`."""

    def on_head(self, known: Any, end_stream: bool) -> None:
        self.log.append((known.head().items, self.session.decoder.decoded_bytes))


def test_a_metered_session_counts_what_its_blocks_say() -> None:
    """Also of those that came before; and its table gets smaller when others' do."""
    side = Side()
    side.new_stream = lambda: Counted(side.session, side.log)  # type: ignore[method-assign,arg-type,return-value]
    side.session = MeteredSession(side, Options(stats=side.stats, hpack_table_size=100), client=False)
    side.session.start()
    peer = Peer(side)
    size = sum(len(name) + len(value) for name, value in GET)
    value = b"y"
    for number in range(12):
        if number == 6:
            peer.frame(frames.SETTINGS, frames.ACK)
            peer.encoder.set_max_table_size(100)
        if number % 3 == 0:
            value += b"y"
        peer.headers(2 * number + 1, [*GET, (b"x-before", value)])
        assert side.log.pop() == ([(b"x-before", value)], size + 8 + len(value))


@pytest.mark.parametrize("pieces", [[b"123456"], [b"123", b"456"], [b"12"]])
def test_a_body_of_another_length_costs_the_stream_only(pieces: list[bytes]) -> None:
    side = Side()
    peer = Peer(side)
    peer.headers(1, [*POST, (b"content-length", b"5")], end=False)
    for piece in pieces:
        peer.frame(frames.DATA, frames.END_STREAM if piece is pieces[-1] else 0, 1, piece)
    assert side.log[-1] == ("reset", 1, errors.PROTOCOL_ERROR, errors.REMOTE_RESET, False)
    assert peer.sent() == [(frames.RST_STREAM, 0, 1, errors.PROTOCOL_ERROR.to_bytes(4, "big"))]
    peer.headers(3, GET)
    assert side.log[-1][:2] == ("head", 3)


def test_settings_are_acknowledged_before_what_they_allow() -> None:
    side = Side()
    peer = Peer(side)
    peer.frame(frames.SETTINGS, 0, 0, b"\x00\x04\x00\x00\x00\x00")
    peer.headers(1, GET)
    stream = side.session.streams[1]
    stream.send_headers(OK, False)
    stream.send_data(b"x", True)
    assert [frame[0] for frame in peer.sent()] == [frames.SETTINGS, frames.HEADERS]
    peer.frame(frames.SETTINGS, 0, 0, b"\x00\x04\x00\x00\x00\x01")
    assert [frame[0] for frame in peer.sent()] == [frames.SETTINGS, frames.DATA]


VARYING = [*GET[:3], (b":path", b"/1"), (b"accept", b"*/*"), (b"x-request-id", b"1"), (b"cookie", b"a=b"), (b"traceparent", b"1")]


def varied(number: int, **values: bytes) -> list[tuple[bytes, bytes]]:
    """A request with values of its own; `values` for those with other ones."""
    own = {b":path": b"/%d" % number, b"x-request-id": b"id-%d" % number, b"traceparent": b"trace-%d" % number}
    own |= {name.replace("_", "-").replace("pseudo-", ":").encode(): value for name, value in values.items()}
    return [(name, own.get(name, value)) for name, value in VARYING]


@pytest.mark.parametrize("indexed", [True, False])
def test_requests_that_differ_in_values(indexed: bool) -> None:
    """What is concluded from their shape is what is concluded from each of them."""
    side = Side()
    peer = Peer(side)
    encoder = hpack.Encoder()
    for number in range(60):
        items = varied(number)
        block = encoder.encode([(name, value, not indexed and name in (b":path", b"x-request-id", b"traceparent")) for name, value in items])
        side.session.feed(frames.encode(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 2 * number + 1, block))
        head = side.log.pop()[2]
        assert (head.method, head.scheme, head.authority, head.path, head.version) == (b"GET", b"http", b"a", b"/%d" % number, 20)
        assert head.items == items[4:]
        assert [head.get(name) for name, _ in items[4:]] == [value for _, value in items[4:]]
        head.set(b"x-request-id", b"changed")  # nobody else sees that
        head.add(b"one-more", b"1")
        peer.sent()
    assert type(head) is not type(varied_head(peer, 0))


def varied_head(peer: Peer, number: int) -> Any:
    """The head of a request with a field that others do not have."""
    stream_id = peer.side.session.last_peer_id + 2
    peer.headers(stream_id, [*varied(number), (b"only-%d" % number, b"")])
    return peer.side.log.pop()[2]


@pytest.mark.parametrize("values", [{"pseudo_path": b"x"}, {"pseudo_path": b""}, {"pseudo_path": b"/ "}, {"x_request_id": b"a\nb"}, {"traceparent": b"\0"}])
def test_values_of_a_known_shape_are_checked(values: dict[str, bytes]) -> None:
    side = Side()
    Peer(side)
    encoder = hpack.Encoder()
    for number in range(8):
        items = varied(number, **(values if number == 7 else {}))
        frame = frames.encode(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 2 * number + 1, encoder.encode(items))
        if number < 7:
            side.session.feed(frame)
        else:
            with pytest.raises(Http2Error):
                side.session.feed(frame)
    assert side.stats.rx_messaging_error.n == 1


def test_a_path_that_is_none() -> None:
    """`OPTIONS *` has the shape of others, and is looked at on its own."""
    side = Side()
    Peer(side)
    encoder = hpack.Encoder()
    for number, path in enumerate((b"/1", b"/2", b"/3", b"/4", b"*", b"/5")):
        items = [(b":method", b"OPTIONS"), *varied(number, pseudo_path=path)[1:]]
        side.session.feed(frames.encode(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 2 * number + 1, encoder.encode(items)))
        assert side.log.pop()[2].path == path


class Whole(Recorder):
    """A stream that takes responses as a whole."""

    def on_whole(self, known: Any, data: bytes, values: tuple[bytes, ...] | None = None) -> bool:
        assert self.remote_closed
        self.log.append(("whole", self.id))
        self.on_head(known, False)
        self.on_data(data, True)
        self.session.forget(self)
        return True


class Asked(Whole):
    """One that could, and does not want to."""

    def on_whole(self, known: Any, data: bytes, values: tuple[bytes, ...] | None = None) -> bool:
        return False


def responses(kind: type[Recorder], texts: list[bytes], **options: Any) -> tuple[list[Any], list[bytes], list[int]]:
    """What is heard of a response, what is said to it, and how much of the connection's window is used, each time that a server answers by `texts`."""
    side = Side(client=True, **options)
    peer = Peer(side)
    said, used = [], []
    length, first, *later = texts
    for _ in range(100):
        stream = kind(side.session, side.log)
        side.session.open(stream)
        stream.send_headers(GET, True)
        side.session.take()
        try:
            head = [*OK, (b"content-length", length)] if length else OK
            block = frames.encode(frames.HEADERS, frames.END_HEADERS, stream.id, peer.encoder.encode(head))
            for text in (block + first, *later):
                side.session.feed(text.replace(b"????", stream.id.to_bytes(4, "big")))
        except Http2Error as error:
            side.log.append((error.code, error.stream is stream))
            break
        finally:
            said.append(side.session.take())
            used.append(side.session._consumed)
    log = [(kind, number, more[0].items, *more[1:]) if kind == "head" else (kind, number, *more) for kind, number, *more in side.log]
    return log, said, used


def body(payload: bytes, flags: int = frames.END_STREAM) -> bytes:
    """DATA of a stream that is not known yet."""
    return frames.encode(frames.DATA, flags, int.from_bytes(b"????", "big"), payload)


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        ([b"", body(b"x" * 1000)], True),
        ([b"1000", body(b"x" * 1000)], True),
        ([b"999", body(b"x" * 1000)], False),
        ([b"1001", body(b"x" * 1000)], False),
        ([b"", body(b"")], True),
        ([b"0", body(b"")], True),
        ([b"", body(b"x" * 16_385)], False),
        ([b"", body(b"x" * 16_384)], True),
        ([b"", body(b"\3abc" + bytes(3), frames.END_STREAM | frames.PADDED)], False),
        ([b"", body(b"abc", 0) + body(b"")], False),
        ([b"", body(b"abc")[:-1], b"c"], False),
        ([b"", body(b"abc")[:9], b"abc"], False),
        ([b"", body(b"abc")[:5], body(b"abc")[5:]], False),
        ([b"", b"", body(b"abc")], False),
        ([b"", body(b"abc") + body(b"more")], True),
    ],
)
def test_whole_responses_are_what_they_are_in_parts(texts: list[bytes], whole: bool) -> None:
    windows = {"initial_stream_window_size": 65_535, "initial_connection_window_size": 65_535}
    log, said, used = responses(Whole, texts, **windows)
    assert any(entry[0] == "whole" for entry in log) == whole
    assert responses(Asked, texts, **windows) == responses(Recorder, texts, **windows) == ([entry for entry in log if entry[0] != "whole"], said, used)


def test_a_whole_response_beyond_its_streams_window_is_an_error() -> None:
    log, _, _ = responses(Whole, [b"", body(b"x" * 200)], initial_stream_window_size=100)
    assert log[-1] == (errors.FLOW_CONTROL_ERROR, False)
