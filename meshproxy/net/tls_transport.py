"""TLS on top of a transport of the event loop: to the transport below it is a protocol, to the protocol above a transport.

Instead of the event loop's own TLS, because that leaves each connection to the garbage collector (300 KiB of it, for uvloop), needs a task for every
handshake, parses the peer's certificate whether anybody asks or not, and cannot keep one direction open when the other has ended. Figures:
docs/decisions/0006-tls-and-splice.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.net.gates import deliver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshproxy.net.tls import HandshakeObject

_MORE = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Outcome(Protocol):
    """Who started a handshake. One of the two is called, once."""

    def tls_ready(self, transport: TlsTransport) -> None:
        """The handshake is done: give the transport its protocol (`set_protocol`) and call that protocol's `connection_made`."""

    def tls_failed(self, transport: TlsTransport, error: OSError | None) -> None:
        """There will be no connection. None: it was closed, by the peer or by us, in the middle of the handshake."""


class TlsTransport(asyncio.Protocol):
    """One connection with TLS. `ssl_object` stays readable after its end.

    What the protocol above gets is what the transports of the event loop give, with one difference: `write_eof` sends a close_notify and leaves the other
    direction open, and what `eof_received` returns is heeded. The end of the peer's bytes is its close_notify or, as for Envoy, the end of the TCP stream.
    """

    __slots__ = (
        "_backlog",
        "_closing",
        "_deliver",
        "_eof",
        "_eof_due",
        "_error",
        "_flowing",
        "_goodbye_due",
        "_incoming",
        "_outcome",
        "_outgoing",
        "_paused",
        "_pending",
        "_protocol",
        "_raw",
        "_raw_write",
        "_read_more",
        "_ready",
        "_take",
        "_writable",
        "_write_ended",
        "_write_more",
        "ssl_object",
    )

    def __init__(self, wrap: Callable[[ssl.MemoryBIO, ssl.MemoryBIO], HandshakeObject], outcome: Outcome) -> None:
        """`wrap` makes the TLS object of the connection. The handshake begins with `connection_made`."""
        incoming, outgoing = self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        ssl_object = self.ssl_object = wrap(incoming, outgoing)
        self._outcome: Outcome | None = outcome
        self._read_more = ssl_object.read_plain
        self._write_more = ssl_object.write_plain
        self._pending = ssl_object.pending_plain
        self._take = outgoing.read
        self._raw: Any = None
        self._protocol: Any = None
        self._deliver: Callable[[bytes], object] = _nobody
        self._backlog: list[bytes] = []  # what OpenSSL does not take while it renegotiates
        self._ready = False
        self._flowing = False  # ready, and what comes may be delivered
        self._writable = True  # what is written goes to OpenSSL
        self._paused = False
        self._eof = False  # the peer has said all
        self._eof_due = False  # and the protocol is to hear of it once it has taken the rest
        self._write_ended = False
        self._goodbye_due = False  # a close_notify is to be sent once what was read is taken
        self._closing = False
        self._error: OSError | None = None

    # -- the protocol of the transport below

    def connection_made(self, transport: Any) -> None:
        self._raw = transport
        self._raw_write = transport.write
        if not self.ssl_object.server_side:
            self._shake()

    def data_received(self, data: bytes) -> None:
        # HOT
        size = len(data)
        incoming = self._incoming
        incoming.write(data)
        if not self._flowing:
            if not self._ready and not self._closing:
                self._shake()
            return
        try:
            plain = self._read_more(size)
        except ssl.SSLError as error:
            self._nothing(error)
            return
        # One record, and nothing after it. Plain bytes are fewer than encrypted ones, unless OpenSSL had some of them before.
        if plain and len(plain) < size and not incoming.pending:
            self._deliver(plain)
        else:
            self._read_on(plain)

    def eof_received(self) -> bool:
        if not self._ready:
            self.abort()
        elif not self._eof:
            self._eof = True
            if self._left():
                self._eof_due = True
            else:
                self._tell_eof()
        return True  # we close it ourselves

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        protocol, outcome = self._protocol, self._outcome
        # What refers to this object from here would keep all of it alive until the garbage collector comes.
        self._protocol = self._outcome = None
        self._deliver = _nobody
        if error is None:
            error = self._error
        if protocol is not None:
            protocol.connection_lost(error)
        elif outcome is not None:
            outcome.tls_failed(self, error if isinstance(error, OSError) else None)

    # -- the handshake

    def _shake(self) -> None:
        ssl_object = self.ssl_object
        try:
            ssl_object.do_handshake()
        except _MORE:
            self._flush()
            return
        except ssl.SSLError as error:
            self._error = error
            self._stop()
            if ssl_object.last_words:
                self._raw.write(ssl_object.last_words)
            self._raw.close()
            return
        outcome, self._outcome = self._outcome, None
        self._ready = True
        self._flowing = not self._paused
        waiting = bool(self._incoming.pending)
        if not waiting:
            self._flush()  # else what is left of the handshake (session tickets) goes out together with the answer
        if outcome is not None:
            outcome.tls_ready(self)
        if waiting and self._flowing:
            if ssl_object.server_side:
                self._read()
            else:  # whoever dialled hears first that there is a connection
                asyncio.get_running_loop().call_soon(self._read_later)

    # -- reading

    def _left(self) -> bool:
        """Whether there is something that the protocol has not been given because it paused."""
        return self._paused and (bool(self._incoming.pending) or bool(self._pending()))

    def _read(self) -> None:
        """Give the protocol all that is there, in one piece."""
        try:
            data = self._read_more(self._incoming.pending or self._pending())
        except ssl.SSLError as error:
            self._nothing(error)
        else:
            self._read_on(data)

    def _nothing(self, error: ssl.SSLError) -> None:
        """Nothing could be read."""
        if isinstance(error, ssl.SSLZeroReturnError):  # the same as an empty read, when our own close_notify was first
            self._read_on(b"")
        elif not isinstance(error, _MORE):
            self._fail(error)
        elif self._outgoing.pending or self._backlog:
            self._write_backlog()

    def _read_on(self, data: bytes) -> None:
        """Give the protocol `data` and all that follows. An empty read is the peer's close_notify."""
        incoming, pending, read = self._incoming, self._pending, self._read_more
        parts = [data]
        failure: ssl.SSLError | None = None
        try:
            while data and (size := pending() or incoming.pending):
                data = read(size)
                parts.append(data)
        except _MORE:
            pass
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLError as error:
            failure = error
        if self._outgoing.pending or self._backlog:
            self._write_backlog()
        if whole := b"".join(parts):
            self._deliver(whole)
        if failure is not None:
            self._fail(failure)
        elif not data and not self._eof:
            self._eof = True
            self._tell_eof()

    def _read_later(self) -> None:
        """What `_read` left, from the event loop."""
        if self._closing or self._protocol is None:
            return
        try:
            if self._flowing and (self._incoming.pending or self._pending()):
                self._read()
            if self._eof_due and not self._left():
                self._tell_eof()
            if self._goodbye_due and not self._paused:
                self._say_goodbye()
        except BaseException:
            self.abort()
            raise

    def _tell_eof(self) -> None:
        self._eof_due = False
        protocol = self._protocol
        if protocol is not None and not self._closing and not protocol.eof_received():
            self.close()

    def _fail(self, error: ssl.SSLError) -> None:
        """What came is not TLS of this connection: say so and close."""
        self._error = error
        self._stop()
        self._flush()
        self._raw.close()

    def _stop(self) -> None:
        """Nothing is read or written from now on."""
        self._closing = True
        self._flowing = self._writable = False

    # -- writing

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self._raw.write(data)

    def _write_backlog(self) -> None:
        backlog = self._backlog
        with contextlib.suppress(*_MORE):
            while backlog:
                self._write_more(backlog[0])
                del backlog[0]
            self._writable = not self._write_ended and not self._closing
        self._flush()
        if self._goodbye_due and not self._paused and not backlog:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Send our close_notify. Not while bytes wait that the protocol has not taken: OpenSSL would take them for bytes after the peer's end."""
        self._goodbye_due = False
        with contextlib.suppress(ssl.SSLError):  # mostly that the peer's own has not come yet
            self.ssl_object.unwrap()
        self._flush()

    # -- the transport of the protocol above

    def write(self, data: bytes) -> None:
        """Send `data`; see asyncio.Transport. Nothing is sent once the connection is closing."""
        # HOT
        if not self._writable or not data:
            if self._backlog and data and not self._write_ended:
                self._backlog.append(data)
            return
        try:
            self._write_more(data)
        except ssl.SSLError as error:
            if not isinstance(error, _MORE):
                self._fail(error)
                return
            self._backlog.append(data)
            self._writable = False
        self._raw_write(self._take())

    def writelines(self, parts: Iterable[bytes]) -> None:
        """Send several pieces as one."""
        self.write(b"".join(parts))

    def can_write_eof(self) -> bool:
        """TLS can close one direction alone."""
        return True

    def write_eof(self) -> None:
        """Send a close_notify after what was written. Reading goes on."""
        if self._write_ended or self._closing:
            return
        self._write_ended = True
        self._writable = False
        if self._paused or self._backlog:
            self._goodbye_due = True
        else:
            self._say_goodbye()

    def close(self) -> None:
        """Send a close_notify, flush, close."""
        if self._closing:
            return
        if self._ready and (not self._write_ended or self._goodbye_due):
            self._say_goodbye()
        self._stop()
        self._raw.close()

    def abort(self) -> None:
        """Close at once."""
        self._stop()
        if self._raw is not None:
            self._raw.abort()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._closing

    def pause_reading(self) -> None:
        """The protocol wants no more bytes for now."""
        if not self._paused:
            self._paused = True
            self._flowing = False
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """The protocol wants bytes again."""
        if not self._paused or self._closing:
            return
        self._paused = False
        self._flowing = self._ready
        self._raw.resume_reading()
        if self._goodbye_due or self._eof_due or self._incoming.pending or self._pending():
            asyncio.get_running_loop().call_soon(self._read_later)

    def is_reading(self) -> bool:
        """Whether the protocol is given what comes."""
        return not self._paused and not self._closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Bytes, as encrypted, from which on (until which) the protocol is told to pause writing."""
        self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Bytes that the socket has not taken yet."""
        size: int = self._raw.get_write_buffer_size()
        return size

    def set_protocol(self, protocol: Any) -> None:
        """Who gets what comes from now on."""
        self._protocol = protocol
        if isinstance(protocol, asyncio.BufferedProtocol):
            self._deliver = lambda data: deliver(protocol, data)
        else:
            self._deliver = protocol.data_received

    def get_protocol(self) -> Any:
        """The present protocol."""
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`ssl_object`, or what the transport below knows."""
        return self.ssl_object if name == "ssl_object" else self._raw.get_extra_info(name, default)

    def __repr__(self) -> str:
        state = "closing" if self._closing else "ready" if self._ready else "handshake"
        return f"<TLS {state} on {self._raw!r}>"


def _nobody(data: bytes) -> None:
    """Where bytes go when there is no protocol."""
