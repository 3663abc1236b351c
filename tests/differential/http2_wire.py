"""One end of an HTTP/2 connection of a script: sends any frames, right or wrong, and remembers what came by stream. Shares no code with codec/h2.

What came is compared as text (`Http2End.text`): for each stream its heads, its data in one piece however it was framed, its trailers and how it ended; for the
connection GOAWAY, and what `show` asks for besides (names of FRAMES in lower case). SETTINGS and PING are acknowledged and windows are given back at once,
unless `manual` says that the script does so itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import hpack

if TYPE_CHECKING:
    from tests.differential.wire import Wire

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAMES = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE", "CONTINUATION")
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
METADATA, END_METADATA = 0x4D, 0x4  # Envoy's extension: maps of a stream, in header blocks of their own
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
SETTING_NAMES = {1: "header_table_size", 2: "enable_push", 3: "max_concurrent_streams", 4: "initial_window_size", 5: "max_frame_size",
                 6: "max_header_list_size", 8: "enable_connect_protocol"}  # fmt: skip
TABLE_SIZE, PUSH, MAX_STREAMS, WINDOW, FRAME_SIZE, LIST_SIZE, CONNECT_PROTOCOL = SETTING_NAMES
ERRORS = ("NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR", "REFUSED_STREAM",
          "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED")  # fmt: skip
(NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR,
 CONNECT_ERROR, ENHANCE_YOUR_CALM, INADEQUATE_SECURITY, HTTP_1_1_REQUIRED) = range(14)  # fmt: skip

Fields = Iterable[tuple[str, str]]
_SHOWN_DATA = 300  # longer data is shown by length and checksum


def frame(type_: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of one frame; `length` if it is to lie about its payload's."""
    return struct.pack(">I", len(payload) if length is None else length)[1:] + struct.pack(">BBI", type_, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """The payload of a SETTINGS frame."""
    return b"".join(struct.pack(">HI", identifier, value) for identifier, value in values.items())


def error_name(code: int) -> str:
    return ERRORS[code] if code < len(ERRORS) else str(code)


class Seen:
    """What came on one stream, in order: ("headers", text), ("data", bytes), ("rst_stream", name), ("end", "")."""

    def __init__(self, send_window: int) -> None:
        self.events: list[tuple[str, bytes | bytearray]] = []
        self.data = bytearray()
        self.send_window = send_window
        self.ended = False  # by END_STREAM or RST_STREAM
        self.metadata = b""  # a block that has not ended

    def add(self, kind: str, value: bytes) -> None:
        last = self.events[-1][1] if self.events and self.events[-1][0] == kind == "data" else None
        if isinstance(last, bytearray):
            last += value
        else:
            self.events.append((kind, bytearray(value) if kind == "data" else value))
        self.ended = self.ended or kind in {"end", "rst_stream"}

    def text(self) -> bytes:
        """One line an event, headers one a line."""
        return b"".join(b"\r\n  " + _line(kind, value) for kind, value in self.events) or b"\r\n  nothing"


def _line(kind: str, value: bytes | bytearray) -> bytes:
    if kind == "data" and len(value) > _SHOWN_DATA:
        return b"data <%d bytes, crc %08x>" % (len(value), zlib.crc32(value))
    return kind.encode() + (b" " if value and not value.startswith(b"\r") else b"") + value


class Http2End:
    """Frames on a wire. `streams`: id -> what came; `connection`: what came on stream 0, as (kind, text)."""

    def __init__(self, wire: Wire, *, client: bool) -> None:
        self.wire = wire
        self.client = client
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder(max_header_list_size=1 << 24)
        self.streams: dict[int, Seen] = {}
        self.connection: list[tuple[str, bytes]] = []
        self.counts: dict[str, int] = {}
        self.show: set[str] = {"goaway"}
        self.manual: set[str] = set()
        self.on_stream: Callable[[int], None] | None = None
        self.hidden: set[int] = set()  # streams that are no part of the case
        self.send_window = self.initial_window = 65_535
        self.frame_size = 16_384
        self.next_id = 1
        self.garbage = ""
        self._block: tuple[int, int, bytearray] | None = None
        self._preface = b"" if client else PREFACE

    # ---- sending

    def begin(self, values: dict[int, int] | None) -> None:
        """The connection's first bytes."""
        self.wire.send((PREFACE if self.client else b"") + (b"" if values is None else frame(SETTINGS, 0, 0, settings(values))))

    def opened(self, stream: int) -> None:
        """Our own HEADERS for a stream go out; later streams have higher numbers."""
        self.stream(stream)
        self.next_id = max(self.next_id, stream + 2 - (stream + 1) % 2)

    def headers(self, stream: int, fields: Fields, *, end: bool, block: bytes | None = None, split: int = 0, literal: frozenset[str] = frozenset()) -> None:
        """HEADERS, and CONTINUATION frames of `split` bytes if it is given. Fields of the names `literal` go into no table."""
        self.stream(stream)
        if block is None:
            kinds = (hpack.HeaderTuple, hpack.NeverIndexedHeaderTuple)
            block = self.encoder.encode([kinds[name in literal](name.encode("latin-1"), value.encode("latin-1")) for name, value in fields])
        pieces = [block[at : at + split] for at in range(0, len(block), split)] if split else [block]
        flags = END_STREAM if end else 0
        for number, piece in enumerate(pieces):
            last = END_HEADERS if number == len(pieces) - 1 else 0
            self.wire.send(frame(CONTINUATION if number else HEADERS, last | (0 if number else flags), stream, piece))

    def data(self, stream: int, data: bytes, *, end: bool, padding: int | None = None) -> None:
        """One DATA frame, whatever the windows say."""
        payload = data if padding is None else bytes((padding,)) + data + bytes(padding)
        self.wire.send(frame(DATA, (END_STREAM if end else 0) | (0 if padding is None else PADDED), stream, payload))
        self.stream(stream).send_window -= len(payload)
        self.send_window -= len(payload)

    async def body(self, stream: int, data: bytes, *, end: bool) -> None:
        """DATA frames as the windows allow; gives up when the stream or the connection has ended."""
        seen = self.stream(stream)
        view = memoryview(data)
        if not data:
            self.data(stream, b"", end=end)
        while view:
            await self.wire.until(lambda: (self.send_window > 0 and seen.send_window > 0) or self._reset(seen))
            if self.wire.end or self._reset(seen):
                return
            count = min(self.frame_size, self.send_window, seen.send_window, len(view))
            self.data(stream, bytes(view[:count]), end=end and count == len(view))
            view = view[count:]

    @staticmethod
    def _reset(seen: Seen) -> bool:
        return bool(seen.events) and seen.events[-1][0] == "rst_stream"

    def stream(self, number: int) -> Seen:
        if number not in self.streams:
            self.streams[number] = Seen(self.initial_window)
        return self.streams[number]

    # ---- receiving

    def read(self) -> None:
        """Take every whole frame from the wire's buffer."""
        buffer = self.wire.buffer
        if self._preface:
            if len(buffer) < len(self._preface) and PREFACE.startswith(buffer):
                return
            if not buffer.startswith(self._preface):
                self.garbage = self.garbage or "no preface"
                return
            del buffer[: len(self._preface)]
            self._preface = b""
        while len(buffer) >= 9:
            length = int.from_bytes(buffer[:3])
            if len(buffer) < 9 + length or self.garbage:
                return
            type_, flags, stream = struct.unpack(">BBI", buffer[3:9])
            payload = bytes(buffer[9 : 9 + length])
            del buffer[: 9 + length]
            try:
                self._frame(type_, flags, stream & 0x7FFFFFFF, payload)
            except (hpack.HPACKError, struct.error, IndexError, AssertionError) as error:
                self.garbage = f"{FRAMES[type_] if type_ < len(FRAMES) else type_} on {stream}: {error!r}"

    def _frame(self, type_: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None:
            assert (type_, stream) == (CONTINUATION, self._block[1]), "no CONTINUATION"
            self._block[2].extend(payload)
            if flags & END_HEADERS:
                flags, stream, block = self._block
                self._block = None
                self._headers(flags, stream, bytes(block))
        elif type_ == DATA:
            self._data(flags, stream, payload)
        elif type_ == HEADERS:
            payload = _unpad(flags, payload)
            payload = payload[5:] if flags & HAS_PRIORITY else payload
            if flags & END_HEADERS:
                self._headers(flags, stream, payload)
            else:
                self._block = (flags, stream, bytearray(payload))
        elif type_ == RST_STREAM:
            assert stream in self.streams, "reset of an idle stream"
            self._event(stream, "rst_stream", error_name(*struct.unpack(">I", payload)).encode())
        elif type_ == SETTINGS:
            self._settings(flags, payload)
        elif type_ == PING:
            self._note("ping_ack" if flags & ACK else "ping", payload)
            if not flags & ACK and "ping" not in self.manual:
                self.wire.send(frame(PING, ACK, 0, payload))
        elif type_ == GOAWAY:
            last, code = struct.unpack(">II", payload[:8])
            self._note("goaway", b"last=%d %s" % (last, error_name(code).encode()))
        elif type_ == METADATA:
            self._metadata(flags, stream, payload)
        elif type_ == WINDOW_UPDATE:
            self._window_update(stream, *struct.unpack(">I", payload))
        else:
            self._note(FRAMES[type_].lower() if type_ < len(FRAMES) else f"type_{type_}", b"on %d" % stream)

    def _headers(self, flags: int, stream: int, block: bytes) -> None:
        assert stream, "HEADERS on stream 0"
        new = stream not in self.streams
        assert not (new and self.client), "HEADERS on an idle stream"
        fields = [b"\r\n" + name + b": " + value for name, value in self.decoder.decode(block, raw=True)]
        pseudo = sum(1 for line in fields if line.startswith(b"\r\n:"))
        text = b"".join(sorted(fields[:pseudo]) + fields[pseudo:])  # the order of pseudo fields means nothing (RFC 9113 8.3)
        after_data = any(kind == "data" for kind, _ in self.stream(stream).events)
        trailers = after_data or (b"\r\n:" not in text and not new)
        self._event(stream, "trailers" if trailers else "headers", text)
        if flags & END_STREAM:
            self._event(stream, "end", b"")
        if new and self.on_stream:
            self.on_stream(stream)

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        assert stream in self.streams, "DATA on an idle stream"
        data = _unpad(flags, payload)
        seen = self.streams[stream]
        seen.data += data
        if data or not flags & END_STREAM:
            self._event(stream, "data", data)
        if flags & END_STREAM:
            self._event(stream, "end", b"")
        if payload and "window" not in self.manual:
            self.wire.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload))))
            if not seen.ended:
                self.wire.send(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", len(payload))))

    def _metadata(self, flags: int, stream: int, payload: bytes) -> None:
        assert stream in self.streams, "METADATA on an idle stream"
        seen = self.streams[stream]
        seen.metadata += payload
        if flags & END_METADATA:
            block, seen.metadata = seen.metadata, b""
            pairs = sorted(hpack.Decoder(max_header_list_size=1 << 24).decode(block, raw=True))  # the order of a map means nothing
            self._event(stream, "metadata", b"".join(b"\r\n" + name + b": " + _short(value) for name, value in pairs))

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            self._note("settings_ack", b"")
            return
        values = [struct.unpack(">HI", payload[at : at + 6]) for at in range(0, len(payload), 6)]
        for identifier, value in values:
            if identifier == WINDOW:
                for seen in self.streams.values():
                    seen.send_window += value - self.initial_window
                self.initial_window = value
            elif identifier == FRAME_SIZE:
                self.frame_size = value
            elif identifier == TABLE_SIZE:
                self.encoder.header_table_size = min(value, 4096)
        self._note("settings", ", ".join(f"{SETTING_NAMES.get(identifier, identifier)}={value}" for identifier, value in values).encode())
        if "settings" not in self.manual:
            self.wire.send(frame(SETTINGS, ACK))

    def _window_update(self, stream: int, increment: int) -> None:
        if stream:
            assert stream in self.streams, "WINDOW_UPDATE of an idle stream"
            self.streams[stream].send_window += increment
        else:
            self.send_window += increment
        self._note("window_update", b"%d: %d" % (stream, increment))

    def _event(self, stream: int, kind: str, value: bytes) -> None:
        self.stream(stream).add(kind, value)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _note(self, kind: str, value: bytes) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.connection.append((kind, value))

    def text(self) -> bytes:
        """All that came, as it is compared."""
        text = b"".join(b"stream %d:%b\r\n" % (number, seen.text()) for number, seen in sorted(self.streams.items()) if number not in self.hidden)
        text += b"".join(b"%b %b\r\n" % (kind.encode(), value) for kind, value in sorted(self.connection, key=lambda event: event[0]) if kind in self.show)
        return text + (b"GARBAGE " + self.garbage.encode() + b"\r\n" if self.garbage else b"")


def _short(value: bytes) -> bytes:
    return value if len(value) <= _SHOWN_DATA else b"<%d bytes, crc %08x>" % (len(value), zlib.crc32(value))


def _unpad(flags: int, payload: bytes) -> bytes:
    return payload[1 : len(payload) - payload[0]] if flags & PADDED else payload
