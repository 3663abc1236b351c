"""One HTTP/2 connection, seen from either side: frames in, calls on streams out, and what has to be sent in `out`.

Strict: what RFC 9113 calls an error is one. Errors of the connection leave `feed` as `Http2Error` when the GOAWAY is queued; errors of a stream reset it
and tell its owner. Splitting the input differently changes neither the calls (data may be cut elsewhere) nor the errors.

Nothing a peer does makes a session use memory without bound: header blocks are limited while they come, data by the windows that were granted, frames that
only ask for answers by what the peer has taken of them (`Options.max_outbound_*`), and frames that ask for nothing by Envoy's counts.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from meshproxy.codec.h2 import control, errors, fields, frames
from meshproxy.codec.h2.errors import Http2Error, MalformedError
from meshproxy.codec.h2.fields import FieldsOfResponse, KnownRequest, KnownResponse, RequestShape
from meshproxy.codec.h2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_SIZE,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    MAX_STREAM_ID,
    PADDED,
    PING,
    PREFACE,
    SETTINGS,
    WITH_PRIORITY,
    unpack_sort,
)
from meshproxy.codec.h2.output import Output, Sink
from meshproxy.codec.h2.relay import Relay, pass_on
from meshproxy.codec.h2.settings import Options
from meshproxy.codec.h2.stream import Http2Stream
from meshproxy.codec.hpack.decoder import Decoder
from meshproxy.codec.hpack.tables import HpackError

_MAX_CONTINUATIONS = 8  # of one header block, as for nghttp2
_MAX_RESET = 512  # streams that we reset lately, of which frames may still be under way
_DEFAULT_STREAMS = 1024  # a client's guess before the server's SETTINGS, as Envoy's


# What frames are mostly (see `unpack_sort`): header blocks and nothing besides, of messages with more to come and without; the end of a body.
_HEAD = HEADERS << 8 | END_HEADERS
_WHOLE_HEAD = _HEAD | END_STREAM
_LAST_DATA = DATA << 8 | END_STREAM


class Session(Output):
    """The state of a connection. `sink` and the streams belong to the owner, which writes what `take` returns and calls `feed` with what it reads."""

    __slots__ = (
        "_block",
        "_block_flags",
        "_block_stream",
        "_consumed",
        "_data_end",
        "_data_left",
        "_data_stream",
        "_empty_frames",
        "_expecting",
        "_greeted",
        "_max_head_bytes",
        "_most",
        "_next_peer_id",
        "priorities",
        "_reset",
        "_rest",
        "_skipped",
        "stream_window",
        "unanswered",
        "_window",
        "_withheld",
        "window_updates",
        "client",
        "decoder",
        "going_away",
        "limit",
        "next_id",
        "peer_allows_connect",
        "peer_goaway",
        "peer_max_streams",
        "peer_stream_window",
        "relays",
        "streams",
    )

    def __init__(self, sink: Sink, options: Options, *, client: bool) -> None:
        super().__init__(sink, options)
        self.client = client
        self.streams: dict[int, Any] = {}
        self.relays: dict[int, Relay] = {}  # of streams whose data goes on to others
        self.decoder = Decoder(max_list_size=options.max_head_bytes + 32 * (options.max_headers + 8), max_fields=options.max_headers)
        # -- what the peer allows
        self.peer_stream_window = DEFAULT_WINDOW
        self.peer_max_streams = _DEFAULT_STREAMS
        self.peer_allows_connect = False
        self.peer_goaway = False
        self.limit = min(_DEFAULT_STREAMS, options.max_concurrent_streams)  # of a client's streams at once; 0 when it opens no more
        # -- what it has sent
        self._next_peer_id = 0 if client else 1  # the lowest stream that it may open
        self._most = 0 if client else options.max_concurrent_streams  # of its streams at once; 0 after our GOAWAY
        self._max_head_bytes = options.max_head_bytes
        self.next_id = 1  # of the next stream that a client opens
        self._window = DEFAULT_WINDOW  # of the connection, towards us
        self._consumed = 0  # bytes that count against it, and may be granted again
        self._withheld = 0  # those that may not, since their streams are paused
        self.stream_window = options.initial_stream_window_size
        self._rest = b""
        self._greeted = 0 if client else len(PREFACE)  # bytes of the preface still to come
        self._expecting = client  # only SETTINGS, or the rest of a header block, may come next
        self._data_left = 0  # of a DATA frame whose beginning was handed over
        self._data_stream = 0
        self._data_end = False
        self._block: list[bytes] | None = None  # a header block that goes on in CONTINUATION frames
        self._block_stream = self._block_flags = 0
        self._reset: deque[int] | None = None
        self._skipped: list[range] | None = None  # identifiers that the peer left out: idle then, closed since
        self.going_away = MAX_STREAM_ID + 1  # streams of the peer above this are not looked at
        self.unanswered = 0  # SETTINGS of ours
        # -- counts against floods
        self._empty_frames = self.priorities = self.window_updates = 0

    # -- output

    def start(self) -> None:
        """Say hello: the preface (client), SETTINGS, and the connection's window."""
        self.stats.sessions.add(self)
        options = self.options
        hello = frames.encode_settings(options.announced(client=self.client))
        self.emit(PREFACE + hello if self.client else hello)
        self.unanswered = 1
        window = options.initial_connection_window_size
        if window > DEFAULT_WINDOW:
            self._window = window
            self.emit(frames.encode_window_update(0, window - DEFAULT_WINDOW))

    def end(self) -> None:
        """The connection is over. No cycles are left behind."""
        self.stats.sessions.discard(self)
        self.sink = None  # type: ignore[assignment]

    # -- streams

    @property
    def last_peer_id(self) -> int:
        """The highest stream that the peer has opened; 0 for none."""
        return max(self._next_peer_id - 2, 0)

    @property
    def opened(self) -> int:
        """About how many streams there were."""
        return (self.next_id if self.client else self._next_peer_id) >> 1

    @property
    def free(self) -> int:
        """How many streams a client can still open at once; 0 when it never can again."""
        return self.limit - len(self.streams) if self.limit else 0

    def settle_limit(self) -> None:
        """Work `limit` out anew."""
        over = self.peer_goaway or self.next_id > MAX_STREAM_ID
        self.limit = 0 if over else min(self.peer_max_streams, self.options.max_concurrent_streams)

    def open(self, stream: Http2Stream) -> None:
        """A client's: give `stream` an identifier. Its head goes out next."""
        stream.id = self.next_id
        self.next_id += 2
        if self.next_id > MAX_STREAM_ID:
            self.settle_limit()
        self.streams[stream.id] = stream

    def forget(self, stream: Http2Stream) -> None:
        """HOT: both sides have ended. No-op for a stream that is forgotten already."""
        if self.streams.pop(stream.id, None) is not None:
            if self._withheld and stream.unconsumed:
                self._give_back(stream)
            stream.on_done()

    def reset_stream(self, stream: Http2Stream, code: int) -> None:
        """Send RST_STREAM and forget."""
        self.drop(stream)
        self._remember_reset(stream.id)
        self.stats.tx_reset.n += 1
        self.emit_control(frames.encode_reset(stream.id, code))

    def drop(self, stream: Http2Stream) -> None:
        del self.streams[stream.id]
        stream.local_closed = stream.remote_closed = True
        stream.drop_queue()
        if stream.unconsumed:
            self._give_back(stream)

    def _remember_reset(self, stream_id: int) -> None:
        if self._reset is None:
            self._reset = deque(maxlen=_MAX_RESET)
        self._reset.append(stream_id)

    def _fail_stream(self, stream: Http2Stream, code: int, details: str) -> None:
        """What came on a stream was wrong."""
        self.reset_stream(stream, code)
        stream.on_reset(code, details, False)

    def consumed(self, stream: Http2Stream) -> None:
        """A paused stream goes on."""
        if stream.unconsumed:
            self._give_back(stream)
            self._grant(stream)

    def can_pass(self, target: Session) -> int:
        """How many bytes of data can go on to another session before a window between us and either peer is closed, or has to be granted anew."""
        if not target.writable:
            return 0
        window = self._window
        return min((window - 1 >> 1) - self._consumed, window - self._withheld - self._consumed, target.send_window)

    def passed(self, size: int) -> None:
        """So much data, which is not empty, has gone on to another session."""
        self._consumed += size
        self._empty_frames = 0

    def _give_back(self, stream: Http2Stream) -> None:
        self._consumed += stream.unconsumed
        self._withheld -= stream.unconsumed
        stream.unconsumed = 0
        if self._consumed * 2 >= self._window:
            self._grant_connection()

    def _grant(self, stream: Http2Stream) -> None:
        if not stream.remote_closed and stream.received * 2 >= self.stream_window:
            self.emit(frames.encode_window_update(stream.id, stream.received))
            stream.received = 0

    def _grant_connection(self) -> None:
        self.emit(frames.encode_window_update(0, self._consumed))
        self._consumed = 0

    # -- the end

    def shutdown_notice(self) -> None:
        """The first step of a graceful end: no more streams, please; those under way already are still served."""
        self.emit(frames.encode_goaway(MAX_STREAM_ID, errors.NO_ERROR))

    def goaway(self, code: int = errors.NO_ERROR) -> None:
        """Say which streams were seen; later ones are not looked at."""
        self.going_away = self.last_peer_id
        self._most = 0
        self.stats.goaway_sent.n += code == errors.NO_ERROR
        self.emit(frames.encode_goaway(self.last_peer_id, code))

    def ping(self, data: bytes) -> None:
        """PING with eight bytes."""
        self.emit(frames.encode(PING, 0, 0, data))

    # -- input

    def feed(self, data: bytes) -> None:
        """HOT: parse `data`. Raises Http2Error, and must not be called again after that."""
        try:
            self._feed(data)
        except Http2Error as error:
            if not (error.flood or error.silent):
                self.emit(frames.encode_goaway(self.last_peer_id, error.code))
            raise

    def _feed(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        position = 0
        if self._greeted > 0:
            position = self._greet(data)
            if self._greeted > 0:
                return
        size = len(data)
        if self._data_left:
            position = self._more_data(data, position, size)
        relays = self.relays
        copy: bytearray | None = None
        last = size - 9
        while position <= last:
            excess, length, sort, stream_id = unpack_sort(data, position)
            if excess or length > DEFAULT_FRAME_SIZE:
                raise Http2Error(errors.FRAME_SIZE_ERROR, "frame too large")
            start = position + 9
            end = start + length
            if (sort == _HEAD or sort == _WHOLE_HEAD) and end <= size and length and not (self._expecting or self._empty_frames):
                if stream_id == self._next_peer_id and len(self.streams) < self._most:
                    position = end
                    self._request(sort, stream_id, data[start:end])
                else:
                    position = self._fields(sort, stream_id & MAX_STREAM_ID, data[start:end], data, end)
                continue
            kind = sort >> 8
            if relays and stream_id in relays and kind == DATA and not self._expecting:
                if copy is None:
                    copy = bytearray(data)
                begun, position = position, pass_on(self, data, copy, position, size)
                if position != begun:
                    continue
            flags = sort & 0xFF
            if end > size:
                if kind == DATA and start < size and not flags & PADDED and not self._expecting:
                    self._begin_data(flags, stream_id, length, data[start:])
                    return
                break
            payload = data[start:end]
            position = end
            if self._expecting:
                self._expected(kind, flags, stream_id, payload)
            elif kind == HEADERS:
                self._headers(flags, stream_id, payload)
            elif kind == DATA:
                self._data(flags, stream_id, length, payload)
            else:
                control.handle(self, kind, flags, stream_id, payload)
        if position < size:
            self._rest = data[position:] if position else data

    def _greet(self, data: bytes) -> int:
        """The client's preface. Returns where frames begin."""
        got = len(PREFACE) - self._greeted
        part = data[: self._greeted]
        if not PREFACE.startswith(part, got):
            raise Http2Error(errors.PROTOCOL_ERROR, "bad connection preface")
        self._greeted -= len(part)
        self._expecting = True
        return len(part)

    def _expected(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """A frame where only one sort can follow: SETTINGS after the preface, CONTINUATION after a header block that has not ended."""
        if self._block is None:
            if kind != SETTINGS or flags & ACK:
                raise Http2Error(errors.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._expecting = False
            control.handle(self, kind, flags, stream_id, payload)
            return
        if kind != CONTINUATION or stream_id & MAX_STREAM_ID != self._block_stream:
            error = Http2Error(errors.PROTOCOL_ERROR, "CONTINUATION expected", "")
            error.stream = self._interrupted()
            raise error
        try:
            self._track_empty(not payload)
        except Http2Error as error:
            error.stream = self._interrupted()
            raise
        self._block.append(payload)
        if len(self._block) > _MAX_CONTINUATIONS + 1:
            raise Http2Error(errors.ENHANCE_YOUR_CALM, "too many CONTINUATION frames")
        if flags & END_HEADERS:
            block = b"".join(self._block)
            self._block = None
            self._expecting = False
            self._fields(self._block_flags, self._block_stream, block)

    def _interrupted(self) -> Http2Stream | None:
        """The stream whose header block does not go on; a new one is made for it to be known."""
        stream_id = self._block_stream
        stream: Http2Stream | None = self.streams.get(stream_id)
        if stream is None and self._opens(stream_id):
            self._next_peer_id = stream_id + 2
            stream = self.streams[stream_id] = self.sink.new_stream()
            stream.id = stream_id
        return stream

    def _track_empty(self, empty: bool, stream: Http2Stream | None = None) -> None:
        if not empty:
            self._empty_frames = 0
            return
        self._empty_frames += 1
        if self._empty_frames > self.options.max_consecutive_inbound_frames_with_empty_payload:
            self.stats.inbound_empty_frames_flood.n += 1
            raise Http2Error(
                errors.ENHANCE_YOUR_CALM, "Too many consecutive frames with an empty payload", errors.EMPTY_FRAMES_FLOOD, flood=True, stream=stream
            )

    # -- DATA

    def _data(self, flags: int, stream_id: int, length: int, data: bytes) -> None:
        """HOT: a whole DATA frame."""
        stream = self.streams.get(stream_id)
        consumed = self._consumed = self._consumed + length
        if consumed + self._withheld > self._window:
            raise Http2Error(errors.FLOW_CONTROL_ERROR, "connection window exceeded")
        if stream is None or stream.remote_closed or not stream.headed:
            self._stray_data(stream, stream_id & MAX_STREAM_ID)
            return
        if flags & PADDED:
            data = _unpadded(data)
        if stream.received + length > self.stream_window:
            raise Http2Error(errors.FLOW_CONTROL_ERROR, "stream window exceeded")
        if flags & END_STREAM:
            left = stream.left
            if left >= 0 and left != len(data):
                self._fail_stream(stream, errors.PROTOCOL_ERROR, errors.REMOTE_RESET)
                return
            if self._empty_frames:
                self._empty_frames = 0
            if stream_id in self.relays:
                self._end_relay(stream)
            stream.remote_closed = True
            stream.on_data(data, True)
            if stream.local_closed and stream.queue is None:
                self.forget(stream)
        else:
            self._part(stream, length, data)
        if self._consumed * 2 >= self._window:
            self._grant_connection()

    def _end_relay(self, stream: Http2Stream) -> None:
        """The peer's message ends. With a response, the request is over too, whatever still comes of it."""
        if self.client:
            stream.end_relays()
        elif stream.relay is not None:
            stream.relay.close()

    def _part(self, stream: Http2Stream, length: int, data: bytes) -> None:
        """HOT: data that is not the last of its stream."""
        if data:
            self._empty_frames = 0
        else:
            self._track_empty(True, stream)
        left = stream.left
        if left >= 0:
            left = stream.left = left - len(data)
            if left < 0:
                self._fail_stream(stream, errors.PROTOCOL_ERROR, errors.REMOTE_RESET)
                return
        stream.received += length
        if data:
            stream.on_data(data, False)
        if stream.remote_closed:  # reset meanwhile
            return
        if stream.paused:
            self._consumed -= length
            self._withheld += length
            stream.unconsumed += length
        elif stream.received * 2 >= self.stream_window:
            self._grant(stream)

    def _begin_data(self, flags: int, stream_id: int, length: int, data: bytes) -> None:
        """A DATA frame of which only a part is here: it is handed over as if it were several frames."""
        stream = self.streams.get(stream_id)
        if stream is not None and 0 <= stream.left < length and not stream.remote_closed:
            self._fail_stream(stream, errors.PROTOCOL_ERROR, errors.REMOTE_RESET)
        self._data_left = length - len(data)
        self._data_stream = stream_id
        self._data_end = bool(flags & END_STREAM)
        self._data(0, stream_id, len(data), data)

    def _more_data(self, data: bytes, position: int, size: int) -> int:
        """What comes of a frame that was begun. Returns where it ends."""
        end = min(size, position + self._data_left)
        part = data[position:end]
        self._data_left -= len(part)
        flags = END_STREAM if self._data_end and not self._data_left else 0
        if part:
            self._data(flags, self._data_stream, len(part), part)
        return end

    def _stray_data(self, stream: Http2Stream | None, stream_id: int) -> None:
        if self._consumed * 2 >= self._window:
            self._grant_connection()
        if stream is not None:
            if not stream.remote_closed:
                raise Http2Error(errors.PROTOCOL_ERROR, "DATA before HEADERS")
            self._fail_stream(stream, errors.STREAM_CLOSED, errors.UNKNOWN)
        elif not self._was_reset(stream_id):
            self.check_not_idle(stream_id, "DATA")
            if stream_id <= self.going_away:
                self._remember_reset(stream_id)
                self.emit_control(frames.encode_reset(stream_id, errors.STREAM_CLOSED))

    # -- HEADERS

    def _headers(self, flags: int, stream_id: int, block: bytes) -> None:
        """HOT: a HEADERS frame."""
        if flags & (PADDED | WITH_PRIORITY):
            block = self._stripped(flags, stream_id, block)
        if block or flags & END_STREAM:
            self._empty_frames = 0
        else:
            self._track_empty(True)
        stream_id &= MAX_STREAM_ID
        if flags & END_HEADERS:
            self._fields(flags, stream_id, block)
        else:
            if not stream_id or (self.client and stream_id not in self.streams):
                self._refuse(stream_id)  # what must not be is refused before the rest of it comes, which it may never do
            self._block = [block]
            self._expecting = True
            self._block_stream = stream_id
            self._block_flags = flags

    @property
    def unfinished(self) -> int:
        """The stream whose header block has begun and is not complete; 0: none."""
        return 0 if self._block is None else self._block_stream

    def open_unfinished(self) -> Http2Stream | None:
        """A server's: the stream of a request whose head is not complete, for an owner that does not want to wait; None when it is no new one."""
        return None if self._block_stream in self.streams else self._interrupted()

    def _stripped(self, flags: int, stream_id: int, block: bytes) -> bytes:
        if flags & PADDED:
            block = _unpadded(block)
        if flags & WITH_PRIORITY:
            if len(block) < 5:
                raise Http2Error(errors.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            if int.from_bytes(block[:4], "big") & MAX_STREAM_ID == stream_id & MAX_STREAM_ID:
                raise Http2Error(errors.PROTOCOL_ERROR, "a stream depends on itself")
            block = block[5:]
        return block

    def _request(self, flags: int, stream_id: int, block: bytes) -> None:
        """HOT: the head of a request with the identifier that was expected. The same as `_fields`. `flags`: all but END_STREAM is of no interest."""
        self._next_peer_id = stream_id + 2
        stream = self.streams[stream_id] = self.sink.new_stream()
        stream.id = stream_id
        try:
            decoder = self.decoder
            decoded = decoder.known.get(block)
            if decoded is None:
                decoded = decoder.decode_new(block)
            known = decoded.known
            if known.__class__ is not KnownRequest:
                shape = decoded.shape
                if shape is None or shape.known.__class__ is not RequestShape:
                    known = fields.request(decoded, self.options)
                else:
                    known = shape.known.take(decoded) or fields.request(decoded, self.options)
            if decoded.size > self._max_head_bytes:
                self._check_size(decoded)
            length = known.length
            if length >= 0:
                if flags & END_STREAM and length:
                    raise MalformedError(errors.MESSAGING)
                stream.left = length
        except MalformedError as failure:
            self._malformed(stream, failure.details, failure.code)
            return
        except HpackError as failure:
            raise Http2Error(errors.COMPRESSION_ERROR, str(failure), "", stream=stream) from failure
        if flags & END_STREAM:
            stream.remote_closed = True
            stream.on_head(known, True)
            if stream.local_closed and stream.queue is None:
                self.forget(stream)
        else:
            stream.on_head(known, False)

    def _fields(self, flags: int, stream_id: int, block: bytes, data: bytes = b"", position: int = 0) -> int:
        """HOT: a whole header block. `data` from `position` on is what follows, as far as it is here; returns how far that is done with, too."""
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._opens(stream_id):
                self._skip(self._next_peer_id, stream_id)
                self._request(flags, stream_id, block)
                return position
            self._refuse(stream_id)
        try:
            decoder = self.decoder
            decoded = decoder.known.get(block)
            if decoded is None:
                decoded = decoder.decode_new(block)
        except HpackError as failure:
            raise Http2Error(errors.COMPRESSION_ERROR, str(failure), "", stream=stream) from failure
        if stream is None:
            return position
        end = flags & END_STREAM
        if stream.headed:
            self._trailers(stream, decoded, end)
            return position
        known = decoded.known
        values = None
        if known.__class__ is not KnownResponse:
            shape = decoded.shape
            if shape is not None and shape.known.__class__ is FieldsOfResponse and not end:
                values = shape.known.values(decoded)
                if values is not None:
                    known = shape.known.response
        start = position + 9
        size = len(data)
        if (values is not None or (known.__class__ is KnownResponse and known.bodied)) and not end and start <= size and decoded.size <= self._max_head_bytes:
            # What most responses are: a head that came before, and one DATA frame in the same read. Nothing of it is special, or the general way has to see
            # it; it is as long as it should be, and lets no window fall due.
            excess, length, sort, next_id = unpack_sort(data, position)
            behind = start + length
            stated = known.length if values is None else known.length_of(values)
            if (
                sort == _LAST_DATA
                and next_id == stream_id
                and behind <= size
                and (length == stated or stated == -1)
                and length <= DEFAULT_FRAME_SIZE
                and not excess
            ):
                consumed = self._consumed + length
                window = self._window
                if consumed * 2 < window and (not self._withheld or consumed + self._withheld <= window) and length <= self.stream_window:
                    stream.headed = stream.remote_closed = True
                    if stream.on_whole(known, data[start:behind], values):
                        self._consumed += length
                        self._empty_frames = 0
                        return behind
                    stream.headed = stream.remote_closed = False
        try:
            if known.__class__ is not KnownResponse:
                known = fields.response(decoded, self.options)
            if decoded.size > self._max_head_bytes:
                self._check_size(decoded)
            if known.final:
                stream.headed = True
                if not known.bodied or stream.bodiless:
                    stream.left = 0
                else:
                    length = stream.left = known.length
                    if end and length > 0:
                        raise MalformedError(errors.MESSAGING)
            elif end:
                raise MalformedError(errors.MESSAGING)
        except MalformedError as failure:
            self._malformed(stream, failure.details, failure.code)
            return position
        if end:
            stream.remote_closed = True
            stream.on_head(known, True)
            if stream.local_closed and stream.queue is None:
                self.forget(stream)
            return position
        stream.on_head(known, False)
        return position

    def _opens(self, stream_id: int) -> bool:
        """Whether a head on a stream that is not there opens it."""
        return bool(not self.client and stream_id & 1 and stream_id >= self._next_peer_id and len(self.streams) < self._most)

    def _check_size(self, decoded: Any) -> None:
        """Envoy's limit is on names and values alone."""
        if decoded.size - 32 * len(decoded.items) > self.options.max_head_bytes:
            raise MalformedError(errors.HEADERS_TOO_LARGE, errors.INTERNAL_ERROR)

    def _refuse(self, stream_id: int) -> None:
        """A header block that opens no stream: raise if it must not be, else it is passed over."""
        if not stream_id:
            raise Http2Error(errors.PROTOCOL_ERROR, "HEADERS on stream 0")
        if self._was_reset(stream_id):
            return
        if self.client or not stream_id & 1:
            self.check_not_idle(stream_id, "HEADERS")
            raise Http2Error(errors.STREAM_CLOSED, "HEADERS on a closed stream")
        if stream_id < self._next_peer_id:
            if self._skipped is not None and any(stream_id in ids for ids in self._skipped):
                raise Http2Error(errors.PROTOCOL_ERROR, "stream identifiers must rise")
            raise Http2Error(errors.STREAM_CLOSED, "HEADERS on a closed stream")
        if stream_id > self.going_away:
            return
        self._skip(self._next_peer_id, stream_id)
        self._next_peer_id = stream_id + 2
        if not self.unanswered:  # it knows our limit
            raise Http2Error(errors.PROTOCOL_ERROR, "more streams than allowed")
        self.stats.stream_refused_errors.n += 1
        self.stats.tx_reset.n += 1
        self._remember_reset(stream_id)
        self.emit_control(frames.encode_reset(stream_id, errors.REFUSED_STREAM))

    def _skip(self, first: int, stop: int) -> None:
        if first == stop:
            return
        skipped = self._skipped
        if skipped is None:
            skipped = self._skipped = []
        elif len(skipped) >= 64:
            skipped.pop(0)
        skipped.append(range(first, stop, 2))

    def _trailers(self, stream: Http2Stream, decoded: Any, end: int) -> None:
        if stream.remote_closed:
            self._fail_stream(stream, errors.STREAM_CLOSED, errors.UNKNOWN)
            return
        if stream.id in self.relays:
            self._end_relay(stream)
        if not self.client:
            self.stats.trailers.n += 1
        if not end or stream.left > 0:
            self._malformed(stream, errors.MESSAGING)
            return
        try:
            known = fields.trailers(decoded, self.options)
        except MalformedError as error:
            self._malformed(stream, error.details, error.code)
            return
        stream.remote_closed = True
        stream.on_trailers(known)
        if stream.local_closed and stream.queue is None:
            self.forget(stream)

    def _malformed(self, stream: Http2Stream, details: str, code: int = errors.PROTOCOL_ERROR) -> None:
        """A message that is none. As Envoy, it costs the peer the connection, unless it is only too long or options say otherwise."""
        if code == errors.PROTOCOL_ERROR:
            self.stats.rx_messaging_error.n += 1
            if not self.options.stream_error_on_invalid_http_message:
                error = Http2Error(code, details, details)
                error.stream = stream
                raise error
        elif details == errors.TOO_MANY_HEADERS:
            self.stats.header_overflow.n += 1
        elif details == errors.HEADERS_TOO_LARGE:
            self.stats.header_list_size_too_large.n += 1
        self._fail_stream(stream, code, details)

    # -- what streams there were

    def _was_reset(self, stream_id: int) -> bool:
        return self._reset is not None and stream_id in self._reset

    def check_not_idle(self, stream_id: int, what: str) -> None:
        """Raise for a stream that was never opened (or, after our GOAWAY, was never looked at)."""
        if stream_id > self.going_away:
            return
        idle = stream_id >= self.next_id if self.client else stream_id > self.last_peer_id
        if not stream_id or bool(stream_id & 1) is False or idle:
            raise Http2Error(errors.PROTOCOL_ERROR, f"{what} on an idle stream")


def _unpadded(payload: bytes) -> bytes:
    padding = payload[0] + 1 if payload else 1
    if padding > len(payload):
        raise Http2Error(errors.PROTOCOL_ERROR, "padding longer than its frame")
    return payload[1 : len(payload) - padding + 1]
