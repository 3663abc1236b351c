"""A small HTTP/2 service (prior knowledge) on uvloop, cheap enough to keep up with a proxy: it decodes no heads, and its answers are always the same.

As a program: `python -m benchmarks.h2_service PORT http2|grpc|mixed [GOAWAY_AFTER]`. "http2" answers every request with 128 bytes. "grpc" sends every message
back as it comes, and the status OK when the caller has ended: unary or streaming, it is the same to it. "mixed" does the first with requests that have no body,
the second with others. After GOAWAY_AFTER streams, a connection says GOAWAY and ignores what is opened later; the proxy closes it when the rest is
done.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import hpack

from benchmarks import h2_frames
from benchmarks.backend import BODY
from benchmarks.h2_frames import ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, frame

_FIELDS = {
    "http2": [(":status", "200"), ("content-type", "text/plain"), ("content-length", str(len(BODY)))],
    "grpc": [(":status", "200"), ("content-type", "application/grpc"), ("grpc-accept-encoding", "identity, deflate, gzip")],
    "trailers": [("grpc-status", "0"), ("grpc-message", "")],
}
_CREDIT = 1 << 30  # bytes received before the connection's window is opened again


class Service(asyncio.Protocol):
    """One connection."""

    def __init__(self, kind: str, goaway_after: int) -> None:
        self._kind = kind
        self._goaway_after = goaway_after
        self._reader = h2_frames.Reader()
        self._preface = len(h2_frames.PREFACE)
        self._window = h2_frames.FIRST_WINDOW
        self._received = 0
        self._last = 0  # the stream opened last, of those that are answered
        self._opened = 0
        self._open: dict[int, str] = {}  # stream -> whose answer it gets
        self._encoder = hpack.Encoder()
        self._blocks: dict[str, bytes] = {}
        self._in_table: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance
        self._transport.write(h2_frames.hello({h2_frames.MAX_CONCURRENT_STREAMS: 1024}))

    def data_received(self, data: bytes) -> None:
        if self._preface:
            skipped = min(self._preface, len(data))
            self._preface -= skipped
            data = data[skipped:]
        answers: list[bytes] = []
        for kind, flags, stream, payload in self._reader.frames(data):
            if kind == DATA:
                self._on_data(stream, payload, answers)
            elif kind == HEADERS and stream > self._last and not self._going:
                self._on_head(stream, flags, answers)
            elif kind == SETTINGS and not flags & ACK:
                answers.append(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                answers.append(frame(PING, ACK, 0, payload))
            elif kind == WINDOW_UPDATE and not stream:
                self._window += int.from_bytes(payload, "big")
            elif kind == RST_STREAM:
                self._open.pop(stream, None)
            if kind <= HEADERS and flags & END_STREAM and stream in self._open:
                self._on_end(stream, answers)
        if answers:
            self._transport.write(b"".join(answers))

    @property
    def _going(self) -> bool:
        return 0 < self._goaway_after <= self._opened

    def _on_head(self, stream: int, flags: int, answers: list[bytes]) -> None:
        kind = self._kind
        if kind == "mixed":
            kind = "http2" if flags & END_STREAM else "grpc"
        self._open[stream] = kind
        self._last = stream
        self._opened += 1
        answers.append(frame(HEADERS, END_HEADERS, stream, self._block(kind)))
        if self._going:
            answers.append(frame(GOAWAY, 0, 0, stream.to_bytes(4, "big") + bytes(4)))

    def _on_data(self, stream: int, payload: bytes, answers: list[bytes]) -> None:
        self._received += len(payload)
        if self._received >= _CREDIT:
            answers.append(h2_frames.window_update(0, self._received))
            self._received = 0
        if payload and self._open.get(stream) == "grpc":
            self._send(stream, payload, 0, answers)

    def _on_end(self, stream: int, answers: list[bytes]) -> None:
        if self._open.pop(stream) == "http2":
            self._send(stream, BODY, END_STREAM, answers)
            return
        answers.append(frame(HEADERS, END_HEADERS | END_STREAM, stream, self._block("trailers")))

    def _block(self, name: str) -> bytes:
        block = self._blocks.get(name)
        if block is None:
            block = self._encoder.encode(_FIELDS[name])
            if name in self._in_table:
                self._blocks[name] = block
            else:  # its new entries move the others
                self._in_table.add(name)
                self._blocks.clear()
        return block

    def _send(self, stream: int, payload: bytes, flags: int, answers: list[bytes]) -> None:
        self._window -= len(payload)
        if self._window < 0:  # what is under way is far less than any window that a proxy opens
            raise RuntimeError("the connection's window is used up")
        answers.append(frame(DATA, flags, stream, payload))


async def _serve(port: int, kind: str, goaway_after: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Service(kind, goaway_after), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0))
