"""Protocols that stand in front of a terminal filter's protocol for a while, or for its whole life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.codec.metering import CountingTransport
from meshproxy.net.tasks import spawn
from meshproxy.observe import flags

if TYPE_CHECKING:
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.observe.stream_info import StreamInfo

log = logging.getLogger(__name__)


class ClosingWatch(asyncio.Protocol):
    """Passes everything on to `protocol` and reports the end of the connection to the listener: for terminal filters that do not do so themselves.

    Without a protocol it drops what comes: the connection is being closed.
    """

    __slots__ = ("_conn", "_protocol", "_transport")

    def __init__(self, conn: ConnectionInfo, protocol: Any) -> None:
        self._conn = conn
        self._protocol = protocol
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self._protocol is not None:
            self._protocol.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._protocol is not None:
            deliver(self._protocol, data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received() if self._protocol is not None else None

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        try:
            if self._protocol is not None:
                self._protocol.connection_lost(error)
        finally:
            self._conn.closed()


class Counted(ClosingWatch):
    """Counts what goes over a connection for the listener's log. `stream`: what the log shows of it, which is also what is spoken, once a read was in order."""

    __slots__ = ("_stream",)

    def __init__(self, stream: StreamInfo, protocol: Any) -> None:
        super().__init__(stream.connection, protocol)
        self._stream = stream

    def connection_made(self, transport: Any) -> None:
        super().connection_made(CountingTransport(transport))

    def data_received(self, data: bytes) -> None:
        self._stream.bytes_received += len(data)
        super().data_received(data)
        if self._stream.protocol is None and not self._conn.flags & flags.DPE:
            self._stream.protocol = getattr(self._protocol, "protocol", None)

    def connection_lost(self, error: Exception | None) -> None:
        self._stream.bytes_sent = self._transport.written
        super().connection_lost(error)


class Waiting(asyncio.Protocol):
    """Holds a connection until its network filters have decided: keeps one read of what comes, and leaves the rest to the kernel."""

    __slots__ = ("_conn", "_eof", "_held", "_transport")

    def __init__(self, conn: ConnectionInfo, transport: Any) -> None:
        self._conn = conn
        self._transport = transport
        self._held = b""
        self._eof = False

    def data_received(self, data: bytes) -> None:
        # Pausing takes effect only once the transport reads: what it read first comes here.
        self._held += data
        self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._eof = True
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._conn.closed()

    def release(self, protocol: Any) -> None:
        """Tell `protocol`, which has the transport by now, what came in the meantime."""
        if self._held:
            self._transport.resume_reading()
            deliver(protocol, self._held)
        if self._eof and not protocol.eof_received():
            self._transport.close()


class FirstDataGate(ClosingWatch):
    """Asks network filters (`on_first_data`) before the first bytes reach the terminal filter; then it is out of the way if it can be.

    The terminal filter knows of the connection from the start, as in Envoy: a server that speaks first is not held up.
    """

    __slots__ = ("_held", "_hooks", "_leaves", "_waiting")

    def __init__(self, conn: ConnectionInfo, protocol: Any, hooks: tuple[Callable[..., Any], ...], leaves: bool) -> None:
        super().__init__(conn, protocol)
        self._hooks = hooks
        self._leaves = leaves  # the terminal filter reports the end of the connection by itself
        self._held: list[bytes] = []
        self._waiting = False

    def data_received(self, data: bytes) -> None:
        if self._hooks:
            self._held.append(data)
            if not self._waiting:
                self._ask()
        else:
            deliver(self._protocol, data)

    def eof_received(self) -> bool | None:
        if self._waiting:
            return True  # told again by the delivery below
        return super().eof_received()

    def _ask(self) -> None:
        hooks, conn = self._hooks, self._conn
        for at, hook in enumerate(hooks):
            verdict = hook(conn)
            if verdict is None:
                continue
            if verdict is False:
                self._refuse()
            else:
                self._waiting = True
                self._transport.pause_reading()
                spawn("network filters", self._ask_later(verdict, hooks[at + 1 :]))
            return
        self._deliver()

    async def _ask_later(self, verdict: Any, hooks: tuple[Callable[..., Any], ...]) -> None:
        allowed = await allow(self._conn, hooks, verdict)
        self._waiting = False
        if self._transport.is_closing():
            return
        self._transport.resume_reading()
        if allowed:
            self._deliver()
        else:
            self._refuse()

    def _refuse(self) -> None:
        stream = self._conn.stream
        if stream is not None:  # its terminal filter never sees the bytes
            stream.bytes_received += sum(map(len, self._held))
        self._held.clear()
        self._transport.close()

    def _deliver(self) -> None:
        self._hooks = ()
        if self._leaves:
            self._transport.set_protocol(self._protocol)
        held, self._held = self._held, []
        deliver(self._protocol, b"".join(held))


async def allow(conn: ConnectionInfo, hooks: tuple[Callable[..., Any], ...], verdict: Any = None) -> bool:
    """Ask network filters one after the other; False as soon as one refuses, or fails. `verdict`: what the one before them is going to say."""
    try:
        if verdict is not None and await verdict is False:
            return False
        for hook in hooks:
            verdict = hook(conn)
            if verdict is not None and verdict is not False:
                verdict = await verdict
            if verdict is False:
                return False
    except Exception:
        log.exception("a network filter failed for %r", conn)
        return False
    return True


def replace(transport: Any, before: Any, protocol: Any) -> None:
    """Let `protocol` have the connection of a terminal filter's protocol, `before`, behind the gates that stand in front of it."""
    gate = transport.get_protocol()
    if gate is before:
        transport.set_protocol(protocol)
        return
    while gate._protocol is not before:
        gate = gate._protocol
    gate._protocol = protocol


def deliver(protocol: Any, data: bytes) -> None:
    """Give bytes to a protocol of either kind."""
    if not isinstance(protocol, asyncio.BufferedProtocol):
        protocol.data_received(data)
        return
    while data:
        buffer = memoryview(protocol.get_buffer(len(data)))
        part = data[: len(buffer)]
        buffer[: len(part)] = part
        protocol.buffer_updated(len(part))
        data = data[len(part) :]
