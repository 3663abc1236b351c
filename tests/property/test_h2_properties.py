"""An HTTP/2 session and the `h2` package talk to each other, in both roles: whatever they say, however it is cut, both have heard the same. And no input at all
makes a session do anything but go on or raise Http2Error."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import corpus
from tests.conformance.http2_peer import End, Owned, block, continuation, data, headers, literal, priority, reset, update
from tests.conformance.http2_peer import settings as settings_frame
from tests.differential import http2_wire as wire

_NAME = st.sampled_from(["x-a", "x-b", "accept", "x-long-name-that-is-not-indexed", "user-agent", "content-type"])
_VALUE = st.one_of(st.sampled_from(["", "1", "gzip, deflate", "v" * 300]), st.text("abcXYZ019 ,;=/%\\u00e4", max_size=40).map(str.strip))
_FIELDS = st.lists(st.one_of(st.tuples(_NAME, _VALUE), st.tuples(st.just("cookie"), st.sampled_from(["a=1", "b=2"]))), max_size=8)
_DATA = st.one_of(st.binary(max_size=50), st.integers(0, 70_000).map(lambda size: (b"0123456789abcdef" * (size // 16 + 1))[:size]))
_CUTS = st.lists(st.integers(1, 400), max_size=30)

# One step of a conversation: who, on which of the streams, does what.
_STEP = st.tuples(
    st.booleans(),
    st.integers(0, 3),
    st.one_of(
        st.tuples(st.just("open"), _FIELDS, st.booleans()),
        st.tuples(st.just("open"), _FIELDS, st.just(False)),
        st.tuples(st.just("data"), _DATA, st.booleans()),
        st.tuples(st.just("data"), _DATA, st.just(False)),
        st.tuples(st.just("trailers"), _FIELDS, st.just(True)),
        st.tuples(st.just("reset"), st.sampled_from([0, 2, 7, 8, 11]), st.just(False)),
        st.tuples(st.just("ping"), st.binary(min_size=8, max_size=8), st.just(False)),
        st.tuples(st.just("window"), st.sampled_from([0, 1, 100, 65_535, 1 << 20]), st.just(False)),
        st.tuples(st.just("table"), st.sampled_from([0, 64, 4096]), st.just(False)),
        st.tuples(st.just("hold"), st.none(), st.booleans()),
    ),
)


@dataclass
class Said:
    """What one side has sent on a stream, as far as it was allowed to."""

    head: list[tuple[str, str]] | None = None
    data: bytes = b""
    trailers: list[tuple[str, str]] | None = None
    ended: bool = False
    reset: int | None = None


@dataclass
class Heard(Said):
    """What a side heard on a stream."""

    resets: list[int] = field(default_factory=list)


class Talk:
    """Our session and one of `h2`, wired back to back; every byte goes through `cut`."""

    def __init__(self, *, client: bool, cuts: list[int]) -> None:
        self.ours = End(client=client, answers=False, requests=0, initial_stream_window_size=100_000, initial_connection_window_size=200_000)
        self.session = self.ours.session
        self.theirs = h2.connection.H2Connection(h2.config.H2Configuration(client_side=not client, header_encoding="latin-1"))
        self.theirs.initiate_connection()
        self.client = client
        self.cuts = cuts
        self.streams: list[int] = []
        self.said: tuple[dict[int, Said], dict[int, Said]] = ({}, {})  # by us, by them
        self.heard: dict[int, Heard] = {}  # by them
        self.gone: set[int] = set()  # reset by somebody: what was under way is lost
        self.queues: dict[int, list[tuple[bytes, bool]]] = {}  # their data that waits for our windows
        self.pongs: list[bytes] = []
        self.held: set[int] = set()
        self.pump()

    # -- transport

    def pump(self) -> None:
        """Deliver everything both ways until both are silent."""
        while True:
            mine = b"".join(self._sent())
            for event in self.theirs.receive_data(mine) if mine else []:
                self._on(event)
            self._push()
            yours = self.theirs.data_to_send()
            for piece in self._cut(yours):
                self.ours.feed(piece)
                assert self.ours.error is None, self.ours.error
            if not yours and not mine:
                return

    def _sent(self) -> Iterator[bytes]:
        frames, self.ours.frames = self.ours.frames, []
        if self.client and not getattr(self, "greeted", False):
            self.greeted = True
            yield wire.PREFACE
        for frame in frames:
            yield wire.frame(frame.type, frame.flags, frame.stream, frame.payload)

    def _cut(self, stream: bytes) -> Iterator[bytes]:
        at = 0
        for size in self.cuts:
            if at < len(stream):
                yield stream[at : at + size]
            at += size
        if at < len(stream):
            yield stream[at:]

    def _on(self, event: h2.events.Event) -> None:
        number = getattr(event, "stream_id", None)
        heard = self.heard.setdefault(number, Heard()) if number else Heard()
        if isinstance(event, h2.events.RequestReceived | h2.events.ResponseReceived):
            heard.head = list(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            heard.data += event.data
            if event.flow_controlled_length:
                self.theirs.acknowledge_received_data(event.flow_controlled_length, number)
        elif isinstance(event, h2.events.TrailersReceived):
            heard.trailers = list(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            heard.ended = True
        elif isinstance(event, h2.events.StreamReset):
            heard.resets.append(int(event.error_code))
        elif isinstance(event, h2.events.PingAckReceived):
            self.pongs.append(event.ping_data)

    def _push(self) -> None:
        """Send their data as our windows allow."""
        for number, queue in self.queues.items():
            while queue and number not in self.gone:
                data, end = queue[0]
                room = min(self.theirs.local_flow_control_window(number), self.theirs.max_outbound_frame_size)
                if data and room <= 0:
                    break
                if len(data) <= room:
                    self.theirs.send_data(number, data, end)
                    queue.pop(0)
                else:
                    self.theirs.send_data(number, data[:room])
                    queue[0] = (data[room:], end)

    # -- steps

    def step(self, by_us: bool, which: int, what: str, value, end: bool) -> None:
        """One step, if it makes sense now."""
        opens = by_us == self.client
        if what == "open" and opens and not (number := self._current(which)):
            self._open(by_us, which, value, end)
        elif what == "open" and not opens and (number := self._current(which)) and self._said(by_us, number).head is None:
            self._answer(by_us, number, value, end)
        elif what in {"ping", "window", "table"}:
            self._connection(by_us, what, value)
        elif (number := self._current(which)) and self._said(by_us, number).head is not None and number not in self.gone:
            said = self._said(by_us, number)
            if what == "reset":
                self._reset(by_us, number, value)
            elif what == "hold" and (stream := self.session.streams.get(number)) is not None:
                (stream.pause if end else stream.resume)()
                (self.held.add if end else self.held.discard)(number)
            elif what == "data" and not said.ended:
                said.data += value
                said.ended = end
                self._data(by_us, number, value, end)
            elif what == "trailers" and not said.ended and not self.queues.get(number) and (value or by_us):
                said.ended = True
                said.trailers = value or None
                self._trailers(by_us, number, value)
        self.pump()

    def _current(self, which: int) -> int:
        """The newest stream of those that share a place, if it is not over."""
        number = self.streams[which] if which < len(self.streams) else 0
        if number and (number in self.gone or all(side.get(number, Said()).ended for side in self.said)):
            return 0
        return number

    def _said(self, by_us: bool, number: int) -> Said:
        return self.said[not by_us].setdefault(number, Said())

    def _open(self, by_us: bool, which: int, value: list[tuple[str, str]], end: bool) -> None:
        fields = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/"), *value]
        if by_us:
            stream = self.ours.new_stream()
            self.session.open(stream)
            self.ours.owned[stream.id] = stream.seen
            number = stream.id
            stream.send_headers(_bytes(fields), end)
            self.ours._take()
        else:
            number = self.theirs.get_next_available_stream_id()
            self.theirs.send_headers(number, fields, end)
        while len(self.streams) <= which:
            self.streams.append(0)
        self.streams[which] = number
        said = self._said(by_us, number)
        said.head, said.ended = fields, end

    def _answer(self, by_us: bool, number: int, value: list[tuple[str, str]], end: bool) -> None:
        fields = [(":status", "200"), *value]
        if by_us:
            self.session.streams[number].send_headers(_bytes(fields), end)
            self.ours._take()
        else:
            self.theirs.send_headers(number, fields, end)
        said = self._said(by_us, number)
        said.head, said.ended = fields, end

    def _data(self, by_us: bool, number: int, value: bytes, end: bool) -> None:
        if by_us:
            self.session.streams[number].send_data(value, end)
            self.ours._take()
        else:
            self.queues.setdefault(number, []).append((value, end))

    def _trailers(self, by_us: bool, number: int, value: list[tuple[str, str]]) -> None:
        if by_us:
            self.session.streams[number].send_trailers(_bytes(value))
            self.ours._take()
        else:
            self.theirs.send_headers(number, value, True)

    def _reset(self, by_us: bool, number: int, code: int) -> None:
        self.gone.add(number)
        self._said(by_us, number).reset = code
        if by_us:
            self.session.streams[number].reset(code)
            self.ours._take()
        else:
            self.theirs.reset_stream(number, code)

    def _connection(self, by_us: bool, what: str, value) -> None:
        if what == "ping":
            if by_us:
                self.session.ping(value)
                self.ours._take()
            else:
                before = len(self.pongs)
                self.theirs.ping(value)
                self.pump()
                assert self.pongs[before:] == [value]
        elif not by_us:
            setting = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE if what == "window" else h2.settings.SettingCodes.HEADER_TABLE_SIZE
            self.theirs.update_settings({setting: value})

    # -- the end

    def finish(self) -> None:
        """Open all windows, and compare what was said with what was heard."""
        for number in list(self.held):
            if (stream := self.session.streams.get(number)) is not None:
                stream.resume()
                self.ours._take()
        self.theirs.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
        self.pump()
        for number in self.said[0].keys() | self.said[1].keys():
            if number not in self.gone:
                _compare(self.said[0].get(number, Said()), self.heard.get(number, Heard()))
                owned = self.ours.owned.get(number, Owned())
                _compare(self.said[1].get(number, Said()), _as_heard(owned))
            else:
                self._compare_reset(number)
        done = {number for number in self.said[0] if number not in self.gone and all(side.get(number, Said()).ended for side in self.said)}
        assert not done & self.session.streams.keys(), "a stream that is over is still there"
        assert not self.gone & self.session.streams.keys()
        assert self.session.pending_bytes.n == 0

    def _compare_reset(self, number: int) -> None:
        ours, theirs = self.said[0].get(number, Said()), self.said[1].get(number, Said())
        owned = self.ours.owned.get(number, Owned())
        if theirs.reset is not None:
            assert owned.reset is not None
            assert owned.reset[::2] == (theirs.reset, True)
        if ours.reset is not None:
            assert self.heard[number].resets == [ours.reset]
        assert ours.data.startswith(self.heard.get(number, Heard()).data)
        assert theirs.data.startswith(owned.data)


def _bytes(fields: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]


def _regular(fields: list[tuple[str, str]] | None) -> dict[str, list[str]] | None:
    """Values by name: of cookies the crumbs, of others the members of their lists; an owner may join or part them."""
    if fields is None:
        return None
    values: dict[str, list[str]] = {}
    for name, value in fields:
        if name[0] != ":":
            values.setdefault(name, []).extend(part.strip() for part in value.split(";" if name == "cookie" else ","))
    return values


def _compare(said: Said, heard: Said) -> None:
    assert _regular(heard.head) == _regular(said.head)
    assert heard.data == said.data
    assert _regular(heard.trailers) == _regular(said.trailers)
    assert heard.ended == said.ended


def _as_heard(owned: Owned) -> Heard:
    head = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in owned.head] if owned.heads else None
    trailers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in owned.trailers] if owned.trailers is not None else None
    return Heard(head, owned.data, trailers or None, owned.ended)


@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
@given(steps=st.lists(_STEP, max_size=25), cuts=_CUTS)
@settings(max_examples=150)
def test_what_is_said_is_heard(client: bool, steps: list, cuts: list[int]):
    """A conversation of a session with `h2`: heads, data, trailers, resets, PINGs, windows of any size, back-pressure; cut anywhere."""
    talk = Talk(client=client, cuts=cuts)
    for by_us, which, (what, value, end) in steps:
        talk.step(by_us, which, what, value, end)
    talk.finish()


# ---- the same verdict on frames ------------------------------------------------------------------------------------------------------------------------

_STREAM = st.sampled_from([0, 1, 1, 1, 3, 3, 2, 5, 7])
_ODD = [(b"x-a", b"1"), (b"te", b"trailers"), (b"X-A", b"1"), (b"te", b"gzip"), (b"connection", b"close"), (b":path", b"/"), (b"content-length", b"4")]
_WITH_LENGTH = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/"), ("content-length", "4")]
_FRAME = st.one_of(
    st.builds(lambda stream, end, pair: headers(stream, end=end, extra=literal(*pair)), _STREAM, st.booleans(), st.sampled_from(_ODD)),
    st.builds(lambda stream: headers(stream, fields=[("x-trailer", "1")]), _STREAM),
    st.builds(lambda stream: headers(stream, fields=_WITH_LENGTH, end=False), _STREAM),
    st.builds(lambda stream: headers(stream, flags=0) + continuation(stream, b""), _STREAM),
    st.builds(lambda stream: wire.frame(wire.HEADERS, 1, stream, block()[:7]) + continuation(stream, block()[7:]), _STREAM),
    st.builds(lambda stream, payload, end: data(stream, payload, end=end), _STREAM, st.sampled_from([b"", b"x", b"test"]), st.booleans()),
    st.builds(lambda stream, padding: wire.frame(wire.DATA, wire.PADDED, stream, bytes((padding,)) + b"test" + bytes(4)), _STREAM, st.integers(0, 10)),
    st.builds(reset, _STREAM, st.sampled_from([0, 8, 99])),
    st.builds(update, _STREAM, st.sampled_from([1, 1000, 0, (1 << 31) - 1])),
    st.builds(priority, _STREAM, st.sampled_from([0, 1, 9])),
    st.builds(settings_frame, st.dictionaries(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 99]), st.sampled_from([0, 1, 100, 16_384, 1 << 31]), max_size=2)),
    st.builds(lambda stream: wire.frame(wire.PING, 0, stream, bytes(8)), st.sampled_from([0, 0, 0, 1])),
    st.builds(lambda length: wire.frame(wire.PING, 0, 0, bytes(length)), st.sampled_from([8, 8, 7])),
    st.builds(lambda type_: wire.frame(type_, 0xFF, 0, b"unknown"), st.integers(0x20, 0xFF)),
)  # fmt: skip


def verdict_of_h2(stream: bytes) -> tuple[bool, dict[int, tuple[bytes, bool]]]:
    """Whether `h2` takes all of it without an error of the connection or of a stream, and each stream's data and whether it has ended."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="latin-1"))
    connection.initiate_connection()
    connection.data_to_send()
    streams: dict[int, tuple[bytes, bool]] = {}
    try:
        for event in connection.receive_data(stream):
            number = getattr(event, "stream_id", 0)
            if isinstance(event, h2.events.RequestReceived):
                streams[number] = (b"", False)
            elif isinstance(event, h2.events.DataReceived):
                streams[number] = (streams[number][0] + event.data, False)
            elif isinstance(event, h2.events.StreamEnded):
                streams[number] = (streams[number][0], True)
            elif isinstance(event, h2.events.StreamReset):
                if not event.remote_reset:
                    return False, streams
                streams.pop(number, None)
    except h2.exceptions.ProtocolError:
        return False, streams
    sent = connection.data_to_send()
    return not any(type_ == wire.RST_STREAM for type_ in types(sent)), streams


def types(stream: bytes) -> Iterator[int]:
    """Types of frames."""
    while stream:
        yield stream[3]
        stream = stream[9 + int.from_bytes(stream[:3]) :]


@given(st.lists(_FRAME, max_size=12), _CUTS)
@settings(max_examples=400)
def test_what_both_take_both_understand_alike(frames: list[bytes], cuts: list[int]):
    """What neither `h2` nor we object to means the same to both; and how it is cut makes no difference to us."""
    stream = wire.PREFACE + settings_frame({}) + b"".join(frames)
    end = End(answers=False).feed(stream)
    assert snapshot(end) == snapshot(End(answers=False).feed(*pieces(stream, cuts)))
    takes, streams = verdict_of_h2(stream)
    refused = end.error is not None or end.of(wire.RST_STREAM) or end.of(wire.GOAWAY)
    if takes and not refused:
        alive = {number: (owned.data, owned.ended) for number, owned in end.owned.items() if owned.reset is None}
        assert alive == streams


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    """Cut at some places."""
    parts, at = [], 0
    for size in cuts:
        parts.append(stream[at : at + size])
        at += size
    return [*(part for part in parts if part), stream[at:]] if at < len(stream) else [part for part in parts if part]


def snapshot(end: End) -> tuple:
    """All that is to be seen of a session from outside; how often windows are opened is up to it, and how header blocks are encoded."""
    sent = [(frame.type, frame.flags, frame.stream, frame.fields or frame.payload) for frame in end.frames if frame.type != wire.WINDOW_UPDATE]
    return end.error and (end.error.code, end.error.details), end.owned, sent, end.acked


# ---- anything ------------------------------------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.booleans(), _CUTS)
@example(bytes(9), False, [1])
@example(b"\xff" * 30, True, [4])
@settings(max_examples=300)
def test_any_bytes(garbage: bytes, client: bool, cuts: list[int]):
    """Garbage after the beginning: an error of the connection, or waiting for more; the same however it is cut."""
    stream = (b"" if client else wire.PREFACE) + settings_frame({}) + garbage
    whole = End(client=client).feed(stream)
    assert snapshot(whole) == snapshot(End(client=client).feed(*pieces(stream, cuts)))
    assert (whole.error is None) == (not whole.of(wire.GOAWAY)) or whole.error.flood


@pytest.mark.parametrize("seed", range(8))
def test_damaged_conversations(seed: int):
    """Real conversations with bytes changed, left out and repeated."""
    source = random.Random(seed)
    for stream in corpus.mutants("h2_server", 150, seed):
        cut = source.randrange(1, len(stream)) if len(stream) > 1 else 1
        assert snapshot(End().feed(stream)) == snapshot(End().feed(stream[:cut], stream[cut:]))
    for stream in corpus.mutants("h2_client", 150, seed):
        assert snapshot(End(client=True).feed(stream)) == snapshot(End(client=True).feed(stream, split=True))
