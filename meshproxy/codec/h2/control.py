"""The frames that carry no messages: settings, windows, resets, goodbyes. `handle` is called by `Session` for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from meshproxy.codec.h2 import errors, frames
from meshproxy.codec.h2.errors import Http2Error
from meshproxy.codec.h2.frames import (
    ACK,
    CONTINUATION,
    DEFAULT_FRAME_SIZE,
    GOAWAY,
    MAX_STREAM_ID,
    MAX_WINDOW,
    METADATA,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
)

if TYPE_CHECKING:
    from meshproxy.codec.h2.session import Session

# Setting -> lowest value, highest value, error of others.
_LIMITS = {
    frames.ENABLE_PUSH: (0, 1, errors.PROTOCOL_ERROR),
    frames.INITIAL_WINDOW_SIZE: (0, MAX_WINDOW, errors.FLOW_CONTROL_ERROR),
    frames.MAX_FRAME_SIZE: (DEFAULT_FRAME_SIZE, (1 << 24) - 1, errors.PROTOCOL_ERROR),
    frames.ENABLE_CONNECT_PROTOCOL: (0, 1, errors.PROTOCOL_ERROR),
}


def handle(session: Session, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
    """Do what a frame says. Raises Http2Error. Frames of kinds that nobody knows are extensions, and ignored."""
    handler = _HANDLERS.get(kind)
    if handler is not None:
        handler(session, flags, stream_id & MAX_STREAM_ID, payload)


def _ping(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    if stream_id or len(payload) != 8:
        raise Http2Error(errors.PROTOCOL_ERROR if stream_id else errors.FRAME_SIZE_ERROR, "bad PING")
    if flags & ACK:
        session.sink.on_ping_ack(payload)
    else:
        session.emit_control(frames.encode(PING, ACK, 0, payload))


def _push_promise(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    raise Http2Error(errors.PROTOCOL_ERROR, "PUSH_PROMISE is not allowed")


def _continuation(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    raise Http2Error(errors.PROTOCOL_ERROR, "CONTINUATION without HEADERS")


def _settings(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    if stream_id:
        raise Http2Error(errors.PROTOCOL_ERROR, "SETTINGS on a stream")
    if len(payload) % 6 or (flags & ACK and payload):
        raise Http2Error(errors.FRAME_SIZE_ERROR, "bad length of SETTINGS")
    if flags & ACK:
        session.unanswered -= 1
        if session.unanswered < 0:
            raise Http2Error(errors.PROTOCOL_ERROR, "SETTINGS acknowledged that nobody sent")
        if session.decoder.max_table_size != session.options.hpack_table_size:  # what the peer sent before came out of the default table
            session.decoder.max_table_size = session.options.hpack_table_size
        return
    for name, value in frames.decode_settings(payload):
        low, high, code = _LIMITS.get(name, (0, 1 << 32, 0))
        if not low <= value <= high:
            raise Http2Error(code, f"bad value of setting {name}")
        if name == frames.INITIAL_WINDOW_SIZE:
            _change_windows(session, value)
        elif name == frames.HEADER_TABLE_SIZE:
            session.encoder.set_max_table_size(value)
        elif name == frames.MAX_CONCURRENT_STREAMS:
            session.peer_max_streams = value
            session.settle_limit()
        elif name == frames.MAX_FRAME_SIZE:
            session.peer_frame_size = value
        elif name == frames.ENABLE_CONNECT_PROTOCOL:
            if session.peer_allows_connect and not value:
                raise Http2Error(errors.PROTOCOL_ERROR, "ENABLE_CONNECT_PROTOCOL was taken back")
            session.peer_allows_connect = bool(value)
        elif name == frames.ENABLE_PUSH and session.client and value:
            raise Http2Error(errors.PROTOCOL_ERROR, "a server enables push")
    session.emit_control(frames.SETTINGS_ACK)  # before data that the new windows allow: the peer may take its settings for valid only from here on
    if session.blocked:
        session.pump()
    session.sink.on_settings()


def _change_windows(session: Session, window: int) -> None:
    change = window - session.peer_stream_window
    session.peer_stream_window = window
    for stream in session.streams.values():
        if stream.feeder is not None:
            stream.feeder.settle()
        stream.send_window += change
        if stream.send_window > MAX_WINDOW:
            raise Http2Error(errors.FLOW_CONTROL_ERROR, "a stream's window overflows")


def _window_update(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    if len(payload) != 4:
        raise Http2Error(errors.FRAME_SIZE_ERROR, "bad length of WINDOW_UPDATE")
    session.window_updates += 1
    allowed = 5 + 2 * (session.opened + session.options.max_inbound_window_update_frames_per_data_frame_sent * session.data_frames)
    if session.window_updates > allowed:
        session.stats.inbound_window_update_frames_flood.n += 1
        raise Http2Error(errors.ENHANCE_YOUR_CALM, "Too many WINDOW_UPDATE frames", flood=True)
    increment = int.from_bytes(payload, "big") & MAX_WINDOW
    if not increment:
        raise Http2Error(errors.PROTOCOL_ERROR, "WINDOW_UPDATE by 0", stream=session.streams.get(stream_id))
    if not stream_id:
        session.send_window += increment
        if session.send_window > MAX_WINDOW:
            raise Http2Error(errors.FLOW_CONTROL_ERROR, "the connection's window overflows")
    else:
        stream = session.streams.get(stream_id)
        if stream is None:
            session.check_not_idle(stream_id, "WINDOW_UPDATE")
            return
        if stream.feeder is not None:
            stream.feeder.settle()
        stream.send_window += increment
        if stream.send_window > MAX_WINDOW:
            # Not only an error of the stream: a peer could have us reset any number of them.
            session.emit(frames.encode_reset(stream_id, errors.FLOW_CONTROL_ERROR))
            raise Http2Error(errors.FLOW_CONTROL_ERROR, "a stream's window overflows", stream=stream)
    if session.blocked:
        session.pump()


def _rst_stream(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    if len(payload) != 4:
        raise Http2Error(errors.FRAME_SIZE_ERROR, "bad length of RST_STREAM")
    stream = session.streams.get(stream_id)
    if stream is None:
        session.check_not_idle(stream_id, "RST_STREAM")
        return
    session.stats.rx_reset.n += 1
    code = int.from_bytes(payload, "big")
    session.drop(stream)
    stream.on_reset(code, errors.REMOTE_REFUSED if code == errors.REFUSED_STREAM else errors.REMOTE_RESET, True)


def _goaway(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    if stream_id:
        raise Http2Error(errors.PROTOCOL_ERROR, "GOAWAY on a stream")
    if len(payload) < 8:
        raise Http2Error(errors.FRAME_SIZE_ERROR, "GOAWAY too short")
    last_id = int.from_bytes(payload[:4], "big") & MAX_STREAM_ID
    session.peer_goaway = True
    session.settle_limit()
    if session.client:
        for stream in [stream for stream in session.streams.values() if stream.id > last_id]:
            session.drop(stream)
            stream.on_reset(errors.REFUSED_STREAM, errors.REMOTE_REFUSED, True)
    session.sink.on_goaway(last_id, int.from_bytes(payload[4:8], "big"))


def _priority(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    if not stream_id:
        raise Http2Error(errors.PROTOCOL_ERROR, "PRIORITY on stream 0")
    if len(payload) != 5:
        raise Http2Error(errors.FRAME_SIZE_ERROR, "bad length of PRIORITY")
    if int.from_bytes(payload[:4], "big") & MAX_STREAM_ID == stream_id:
        raise Http2Error(errors.PROTOCOL_ERROR, "a stream depends on itself")
    session.priorities += 1
    if session.priorities > session.options.max_inbound_priority_frames_per_stream * (1 + session.opened):
        session.stats.inbound_priority_frames_flood.n += 1
        raise Http2Error(errors.ENHANCE_YOUR_CALM, "Too many PRIORITY frames", flood=True)


def _metadata(session: Session, flags: int, stream_id: int, payload: bytes) -> None:
    if session.options.allow_metadata:
        from meshproxy.codec.h2.metadata import receive  # few have any

        receive(session, flags, stream_id, payload)


_HANDLERS: dict[int, Callable[[Session, int, int, bytes], None]] = {
    PRIORITY: _priority,
    RST_STREAM: _rst_stream,
    SETTINGS: _settings,
    PUSH_PROMISE: _push_promise,
    PING: _ping,
    GOAWAY: _goaway,
    WINDOW_UPDATE: _window_update,
    CONTINUATION: _continuation,
    METADATA: _metadata,
}
