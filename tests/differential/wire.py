"""Scripted ends of TCP connections: the client and the upstreams of a case are both written in the steps of this module.

A script is a list of steps; plain bytes mean "send them". Steps wait for events (bytes, end of stream, a named signal), never for time: but for `Idle`,
which is about that, and the limit after which a script is stuck.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from tests.differential.http2_steps import Ended, StreamWire, reply
from tests.differential.http2_wire import Http2End
from tests.polling import until

STEP_LIMIT_S = 60.0  # for what must happen at all; the machine may be busy, or stand still


class StuckError(Exception):
    """A step has waited longer than STEP_LIMIT_S for its event."""


class Signals(dict[str, asyncio.Event]):
    """Named events that the scripts of one case share. `counted(name)`: by how much the proxy's stats whose names end so have grown since the case began."""

    def __init__(self, counted: Callable[[str], Awaitable[int]] | None = None) -> None:
        self.counted = counted

    def __missing__(self, name: str) -> asyncio.Event:
        self[name] = event = asyncio.Event()
        return event


class Wire(asyncio.Protocol):
    """One end of a connection. `received` is all that came, `buffer` what no step has consumed, `end` how the peer ended: None, "eof" or "reset".

    `full`: the peer takes less than was written. `http2`: reads the frames of a connection that speaks HTTP/2; `current` is the stream that steps without one
    mean.
    """

    def __init__(self, on_connection: Callable[[Wire], None] | None = None) -> None:
        self.buffer = bytearray()
        self.received = bytearray()
        self.end: str | None = None
        self.ended_by_us = False
        self.full = False
        self.http2: Http2End | None = None
        self.current = 0
        self._frames = bytearray()  # that go out together
        self._on_connection = on_connection
        self._changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ssl_object = transport.get_extra_info("ssl_object")
        self.tls = self.ssl_object is not None
        if self._on_connection:
            self._on_connection(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.received += data
        if self.http2 is not None:
            self.http2.read()
        self._changed.set()

    def eof_received(self) -> bool:
        self.end = self.end or "eof"
        self._changed.set()
        return not self.tls  # keep our own direction open: half-close is what some cases are about

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended_by_us:
            self.end = self.end or ("reset" if isinstance(exc, ConnectionResetError | BrokenPipeError) else "eof")
        self._changed.set()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self._changed.set()

    async def until(self, predicate: Callable[[], object]) -> None:
        """Wait until the predicate holds or the peer has ended the connection."""
        try:
            async with asyncio.timeout(STEP_LIMIT_S):
                while not predicate() and self.end is None and not self.ended_by_us:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise StuckError from None

    def take(self, count: int) -> bytes:
        """Consume `count` bytes of the buffer."""
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def send(self, data: bytes) -> None:
        """Write at once. Frames are written when the script waits for something: the peer then reads together what was sent together, however busy it is."""
        if self.http2 is None:
            self._write(data)
            return
        if not self._frames:
            asyncio.get_running_loop().call_soon(self.flush)
        self._frames += data

    def flush(self) -> None:
        """Write the frames that wait."""
        if self._frames:
            self._write(bytes(self._frames))
            self._frames.clear()

    def _write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        self.flush()
        self.ended_by_us = True
        self._changed.set()
        self.transport.close()

    def reset(self) -> None:
        """End with RST."""
        self.flush()
        self.ended_by_us = True
        self._changed.set()
        sock = self.transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


# ---- messages ---------------------------------------------------------------------------------------------------------------------------------------


async def read_head(wire: Wire) -> bytes:
    """One message head with its empty line; b"" when the connection ended before it was whole."""
    await wire.until(lambda: b"\r\n\r\n" in wire.buffer)
    end = wire.buffer.find(b"\r\n\r\n")
    return wire.take(end + 4) if end >= 0 else b""


async def read_exactly(wire: Wire, count: int) -> bytes:
    await wire.until(lambda: len(wire.buffer) >= count)
    return wire.take(count)


async def read_line(wire: Wire) -> bytes:
    await wire.until(lambda: b"\r\n" in wire.buffer)
    end = wire.buffer.find(b"\r\n")
    return wire.take(end + 2) if end >= 0 else b""


async def read_chunked(wire: Wire) -> bytes:
    """A chunked body up to the end of its trailer section; returns the raw bytes."""
    raw = b""
    while True:
        line = await read_line(wire)
        raw += line
        size = int(line.split(b";")[0] or b"0", 16)
        if size == 0:
            break
        raw += await read_exactly(wire, size + 2)
    while True:
        line = await read_line(wire)
        raw += line
        if line in {b"\r\n", b""}:
            return raw


async def read_body(wire: Wire, head: bytes, *, to_the_end: bool) -> bytes:
    """The body that the head announces; without framing: up to the end of the connection if `to_the_end`, else nothing."""
    if re.search(rb"\r\ntransfer-encoding:[^\r]*chunked", head, re.IGNORECASE):
        return await read_chunked(wire)
    if length := re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE):
        return await read_exactly(wire, int(length[1]))
    if to_the_end:
        await wire.until(lambda: False)
        return wire.take(len(wire.buffer))
    return b""


# ---- steps -------------------------------------------------------------------------------------------------------------------------------------------


class Step(Protocol):
    """What a script is made of."""

    async def run(self, wire: Wire, signals: Signals) -> None: ...


Script = list["Step | bytes"]


@dataclass(frozen=True)
class Response:
    """Client: read one final response, and the 1xx ones before it. `method` is that of its request (HEAD and CONNECT responses have no body)."""

    method: str = "GET"

    async def run(self, wire: Wire, signals: Signals) -> None:
        while head := await read_head(wire):
            status = int(head.split(b" ", 2)[1][:3])
            if status >= 200 or status == 101:
                break
        if not head or self.method == "HEAD" or status in {101, 204, 304} or (self.method == "CONNECT" and status < 300):
            return
        await read_body(wire, head, to_the_end=True)


@dataclass(frozen=True)
class Head:
    """Upstream: read one request head."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        await read_head(wire)


@dataclass(frozen=True)
class Request:
    """Upstream: read one whole request."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        await read_body(wire, await read_head(wire), to_the_end=False)


@dataclass(frozen=True)
class Until:
    """Read until the bytes have come; consumes up to and with them."""

    token: bytes

    async def run(self, wire: Wire, signals: Signals) -> None:
        await wire.until(lambda: self.token in wire.buffer)
        wire.take(wire.buffer.find(self.token) + len(self.token))


@dataclass(frozen=True)
class Eof:
    """Wait until the peer ends its direction, whatever comes before."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        await wire.until(lambda: False)


@dataclass(frozen=True)
class Echo:
    """Send back whatever comes until the peer ends; then end too."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        while wire.end is None:
            if wire.buffer:
                wire.send(wire.take(len(wire.buffer)))
            await wire.until(lambda: wire.buffer)
        wire.send(wire.take(len(wire.buffer)))
        if not wire.transport.is_closing() and wire.transport.can_write_eof():
            wire.transport.write_eof()


@dataclass(frozen=True)
class HalfClose:
    """End our direction with FIN and go on reading."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.flush()
        if not wire.transport.is_closing():
            wire.transport.write_eof()


@dataclass(frozen=True)
class Close:
    """Close the connection."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.close()


@dataclass(frozen=True)
class Reset:
    """Reset the connection."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.reset()


@dataclass(frozen=True)
class Wait:
    """Wait for a signal of another script of the case."""

    name: str

    async def run(self, wire: Wire, signals: Signals) -> None:
        try:
            await asyncio.wait_for(signals[self.name].wait(), STEP_LIMIT_S)
        except TimeoutError:
            raise StuckError from None


@dataclass(frozen=True)
class Idle:
    """Let `seconds` pass: for timeouts that must not fire."""

    seconds: float

    async def run(self, wire: Wire, signals: Signals) -> None:
        await asyncio.sleep(self.seconds)


@dataclass(frozen=True)
class Signal:
    """Give a signal to the other scripts of the case."""

    name: str

    async def run(self, wire: Wire, signals: Signals) -> None:
        wire.flush()
        signals[self.name].set()


@dataclass(frozen=True)
class Counted:
    """Wait until the proxy has counted something: events on its other connections have no order that a script could rely on."""

    name: str
    count: int = 1

    async def run(self, wire: Wire, signals: Signals) -> None:
        async def enough() -> bool:
            assert signals.counted is not None
            return await signals.counted(self.name) >= self.count

        try:
            await until(enough, STEP_LIMIT_S)
        except TimeoutError:
            raise StuckError from None


async def play(script: Script, wire: Wire, signals: Signals) -> str | None:
    """Run a script. Returns None, or the step at which it was stuck or failed."""
    for step in script:
        try:
            if isinstance(step, bytes):
                wire.send(step)
            else:
                await step.run(wire, signals)
        except StuckError:
            return f"stuck at {step!r}"
        except (ValueError, IndexError) as error:
            return f"{step!r} read garbage: {error}"
    return None


# ---- upstreams -----------------------------------------------------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class Play:
    """What an upstream does: the n-th request (or connection, if `on_connect`) gets the n-th script; the last one repeats. Without scripts: a 200 for each.

    `settings`, `show`, `manual` concern connections that speak HTTP/2, see http2_wire.py; there each request's script runs beside the others. `tidy`: what came
    on a connection as it is compared, where not all of it is.
    """

    scripts: list[Script] | None = None
    on_connect: bool = False
    settings: dict[int, int] | None = None
    show: tuple[str, ...] = ()
    manual: tuple[str, ...] = ()
    tidy: Callable[[Wire], bytes] | None = None


def each(*scripts: Script) -> Play:
    """The n-th request gets the n-th script, the last one repeats."""
    return Play(list(scripts))


def answer(status_and_headers: str = "200 OK", body: bytes | None = b"ok", **headers: str) -> bytes:
    """An HTTP/1.1 response: `answer("503 No", x_why="tired")`; content-length is added unless the body is None."""
    lines = [f"HTTP/1.1 {status_and_headers}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + (body or b"")


class Upstream:
    """A scripted server on one port; keeps what it saw of the running case. `http2`: speaks HTTP/2, with TLS only if ALPN says so."""

    def __init__(self, name: str, sock: socket.socket, *, http2: bool = False) -> None:
        self.name = name
        self.http2 = http2
        self.sock = sock
        self.port: int = sock.getsockname()[1]
        self.connections: list[Wire] = []
        self.notes: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[Wire] = set()  # of this case and of earlier ones
        self.begin(Play(), Signals())

    async def start(self, ssl: object = None) -> None:
        loop = asyncio.get_running_loop()
        # What overflows a backlog is a connection for the proxy alone: nobody here knows of it, or would end it.
        self._server = await loop.create_server(lambda: Wire(self._accepted), sock=self.sock, ssl=ssl, backlog=4096)

    def begin(self, play_: Play, signals: Signals) -> None:
        """A new case begins."""
        self.play, self.signals, self._next = play_, signals, 0
        self._ended = False
        self._open = {wire for wire in self._open if not wire.transport.is_closing()}
        self.connections, self.notes = [], []

    def _accepted(self, wire: Wire) -> None:
        if self._ended:  # it was still on its way when the case ended
            wire.close()
            return
        self.connections.append(wire)
        self._open.add(wire)
        if self.http2 and (not wire.tls or wire.ssl_object.selected_alpn_protocol() == "h2"):
            self._accepted_http2(wire)
        else:
            self._spawn(self._serve(wire))

    def _accepted_http2(self, wire: Wire) -> None:
        wire.http2 = Http2End(wire, client=False)
        wire.http2.show |= set(self.play.show)
        wire.http2.manual |= set(self.play.manual)
        wire.http2.begin(self.play.settings or {})
        if self.play.on_connect:
            self._spawn(self._play(wire, self._next_script([Ended(), *reply()])))
        else:
            wire.http2.on_stream = lambda stream: self._spawn(self._play(StreamWire(wire, stream), self._next_script([Ended(), *reply()])))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _next_script(self, default: Script) -> Script:
        scripts = self.play.scripts or [default]
        self._next += 1
        return scripts[min(self._next, len(scripts)) - 1]

    async def _play(self, wire: Any, script: Script) -> None:
        if trouble := await play(script, wire, self.signals):
            self.notes.append(f"{self.name}: {trouble}")

    async def _serve(self, wire: Wire) -> None:
        while True:
            if not self.play.on_connect:
                await self._wait_first_byte(wire)
                if not wire.buffer:
                    return
            script = self._next_script([Request(), OK])
            if trouble := await play(script, wire, self.signals):
                self.notes.append(f"{self.name}: {trouble}")
                return
            if wire.end or wire.ended_by_us or self.play.on_connect:
                return

    @staticmethod
    async def _wait_first_byte(wire: Wire) -> None:
        while not wire.buffer and wire.end is None and not wire.ended_by_us:
            try:
                await wire.until(lambda: wire.buffer)
            except StuckError:  # an idle pooled connection is nothing wrong
                continue

    def seen(self) -> list[dict[str, str]]:
        """What came on each connection, for which SNI and with which ALPN, and whether the proxy has ended it."""
        return [self._seen(wire) for wire in self.connections]

    def _seen(self, wire: Wire) -> dict[str, str]:
        got = self.play.tidy(wire) if self.play.tidy is not None else wire.received if wire.http2 is None else wire.http2.text()
        seen = {"got": got.decode("latin-1"), "end": "closed by us" if wire.ended_by_us else wire.end or "kept"}
        if wire.tls:
            seen["sni"] = str(getattr(wire.ssl_object, "server_name_seen", None))
            seen["alpn"] = str(wire.ssl_object.selected_alpn_protocol())
        return seen

    def end_case(self) -> None:
        """Drop every connection that is still open, or comes late."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        for wire in self.connections:
            wire.close()

    async def stop(self) -> None:
        self.end_case()
        self._server.close()
        await asyncio.sleep(0)  # connections that were just accepted arrive
        for wire in self._open:
            wire.transport.abort()
        await asyncio.sleep(0)


def refusing_socket() -> socket.socket:
    """A bound socket that does not listen: connections to it are refused."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def hole_sockets() -> tuple[socket.socket, list[socket.socket]]:
    """A listening socket whose accept queue is full, so that new connections hang; and the sockets that fill it."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(0)
    fillers = []
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(sock.getsockname())
        fillers.append(filler)
    return sock, fillers
