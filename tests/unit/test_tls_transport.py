"""TLS between a transport and a protocol: records in any pieces, the end of either direction, pausing, failures. The peer is OpenSSL in memory."""

from __future__ import annotations

import asyncio
import gc
import ssl
import weakref
from typing import Any

import pytest

from meshproxy.net import tls
from meshproxy.net.tls_transport import TlsTransport
from meshproxy.observe.stats import Store
from tests.unit.net_help import client_context, downstream_tls, message, run

DOWNSTREAM = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"


class Below:
    """The transport of an event loop. `sent` is what was written."""

    def __init__(self) -> None:
        self.sent = b""
        self.protocol: Any = None
        self.reading = True
        self.closed = ""
        self.limits: Any = None

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent += data

    def close(self) -> None:
        self._end("close")

    def abort(self) -> None:
        self._end("abort")

    def _end(self, how: str) -> None:
        if not self.closed:
            self.closed = how
            protocol, self.protocol = self.protocol, None
            asyncio.get_running_loop().call_soon(protocol.connection_lost, None)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_write_buffer_limits(self, high: int | None, low: int | None) -> None:
        self.limits = high, low

    def get_write_buffer_size(self) -> int:
        return 7

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Above(asyncio.Protocol):
    """The protocol. `heard` is what it was told, bytes in one piece as they came."""

    def __init__(self, *, keeps_open: bool = False, begins_paused: bool = False) -> None:
        self.heard: list[Any] = []
        self.keeps_open = keeps_open
        self.begins_paused = begins_paused
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.begins_paused:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)

    def eof_received(self) -> bool:
        self.heard.append("eof")
        return self.keeps_open

    def pause_writing(self) -> None:
        self.heard.append("full")

    def resume_writing(self) -> None:
        self.heard.append("writable")

    def connection_lost(self, error: Exception | None) -> None:
        self.heard.append(error or "lost")


class Connection:
    """A server's end made of what is tested, and a client of OpenSSL."""

    def __init__(self, above: Above | None = None, **fields: Any) -> None:
        self.above = above or Above()
        self.store = Store()
        server = tls.compile_downstream(message(DOWNSTREAM, downstream_tls(**fields)), self.store.scope("l."))
        self.below = Below()
        self.transport = self.below.protocol = TlsTransport(server.wrap, self)
        self.transport.connection_made(self.below)
        self.up, self.down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client_context().wrap_bio(self.down, self.up, server_hostname="server.example.com")
        self.failed: list[Any] = []

    def tls_ready(self, transport: TlsTransport) -> None:
        transport.set_protocol(self.above)
        self.above.connection_made(transport)

    def tls_failed(self, transport: TlsTransport, error: OSError | None) -> None:
        self.failed.append(error)

    def shake(self, *, together_with: bytes = b"", step: int = 1 << 20) -> None:
        """The handshake, delivered in pieces of `step` bytes; the client's first bytes may come together with its end."""
        for last in (False, True):
            try:
                self.client.do_handshake()
            except ssl.SSLWantReadError:
                assert not last
            if last and together_with:
                self.client.write(together_with)
            self.to_server(step)
            self.to_client()

    def to_server(self, step: int = 1 << 20) -> None:
        data = self.up.read()
        for at in range(0, len(data), step):
            self.transport.data_received(data[at : at + step])

    def to_client(self) -> None:
        self.down.write(self.below.sent)
        self.below.sent = b""

    def read(self) -> bytes:
        """What the client has got; b"" for a close_notify."""
        self.to_client()
        parts = []
        try:
            while part := self.client.read(1 << 20):
                parts.append(part)
        except ssl.SSLZeroReturnError:
            pass
        except ssl.SSLWantReadError:
            assert parts, "nothing came"
        return b"".join(parts)


async def turns() -> None:
    """Let the event loop run what is due."""
    for _ in range(4):
        await asyncio.sleep(0)


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_bytes_both_ways_in_any_pieces(step):
    async def main():
        connection = Connection()
        connection.shake(step=step)
        connection.client.write(b"question")
        connection.to_server(step)
        assert connection.above.heard == [b"question"]
        connection.transport.write(b"ans")
        connection.transport.writelines([b"w", b"er"])
        connection.transport.write(b"")
        assert connection.read() == b"answer"
        assert connection.transport.is_reading()
        assert connection.transport.get_protocol() is connection.above
        assert connection.transport.get_extra_info("ssl_object").version() == "TLSv1.3"

    run(main)


def test_many_records_are_one_delivery():
    async def main():
        connection = Connection()
        connection.shake()
        whole = bytes(range(256)) * 400
        connection.client.write(whole)
        connection.client.write(b"more")
        data = connection.up.read()
        connection.transport.data_received(data[:-3])  # the last record is not complete
        assert connection.above.heard == [whole]
        connection.transport.data_received(data[-3:])
        assert connection.above.heard == [whole, b"more"]
        connection.transport.write(whole * 3)
        assert connection.read() == whole * 3

    run(main)


def test_request_together_with_the_end_of_the_handshake():
    async def main():
        connection = Connection()
        connection.shake(together_with=b"hello")
        assert connection.above.heard == [b"hello"]
        connection.transport.write(b"there")  # the session tickets come with it
        assert connection.read() == b"there"
        assert connection.client.session is not None

    run(main)


def test_paused_from_the_beginning():
    async def main():
        connection = Connection(Above(begins_paused=True))
        connection.shake(together_with=b"hello")
        connection.above.transport.pause_reading()
        await turns()
        assert connection.above.heard == []
        assert not connection.below.reading
        connection.transport.resume_reading()
        await turns()
        assert connection.above.heard == [b"hello"]
        assert connection.below.reading

    run(main)


@pytest.mark.parametrize("clean", [True, False])
def test_the_end_waits_for_what_was_not_taken(clean):
    async def main():
        connection = Connection(Above(begins_paused=True, keeps_open=True))
        connection.shake(together_with=b"hello")
        if not clean:
            assert connection.transport.eof_received()
        await turns()
        assert connection.above.heard == []
        connection.transport.resume_reading()
        if clean:
            with pytest.raises(ssl.SSLWantReadError):
                connection.client.unwrap()
            connection.to_server()
        await turns()
        assert connection.above.heard == [b"hello", "eof"]
        connection.transport.pause_reading()
        connection.transport.resume_reading()
        await turns()
        assert connection.above.heard == [b"hello", "eof"]  # once

    run(main)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("keeps_open", [True, False])
def test_the_peer_ends_its_direction(clean, keeps_open):
    async def main():
        connection = Connection(Above(keeps_open=keeps_open))
        connection.shake()
        connection.client.write(b"last")
        if clean:
            with pytest.raises(ssl.SSLWantReadError):
                connection.client.unwrap()
        connection.to_server()
        assert connection.transport.eof_received()  # the end of the TCP stream follows in any case, and is told once
        if keeps_open:
            assert connection.above.heard == [b"last", "eof"]
            connection.transport.write(b"answer")
            assert connection.read() == b"answer"
            connection.transport.close()
        await turns()
        assert connection.above.heard == [b"last", "eof", "lost"]
        assert connection.below.closed == "close"
        assert connection.read() == b""
        assert connection.transport.is_closing()

    run(main)


@pytest.mark.parametrize("together", [True, False])
def test_our_direction_ends_first(together):
    async def main():
        connection = Connection()
        connection.shake()
        connection.transport.write(b"all")
        assert connection.transport.can_write_eof()
        connection.transport.write_eof()
        connection.transport.write_eof()
        connection.transport.write(b"too late")
        assert connection.read() == b"all"
        assert connection.read() == b""
        connection.client.write(b"still here")
        connection.to_server()
        assert connection.above.heard == [b"still here"]
        if together:
            connection.client.write(b"last")
        connection.client.unwrap()
        connection.to_server()
        assert connection.above.heard == [b"still here", *[b"last"][:together], "eof"]
        assert connection.below.sent == b""  # no second close_notify
        assert connection.below.closed == "close"

    run(main)


def test_our_direction_ends_while_we_do_not_read():
    async def main():
        connection = Connection(Above(begins_paused=True))
        connection.shake(together_with=b"question")
        connection.below.sent = b""
        connection.transport.write_eof()
        assert connection.below.sent == b""
        connection.transport.resume_reading()
        await turns()
        assert connection.above.heard == [b"question"]
        assert connection.below.sent

    run(main)


def test_close_with_bytes_that_nobody_reads():
    async def main():
        connection = Connection(Above(begins_paused=True))
        connection.shake(together_with=b"question")
        connection.transport.write(b"bye")
        connection.transport.close()
        connection.transport.close()
        connection.transport.write(b"no")
        connection.transport.resume_reading()
        await turns()
        assert connection.above.heard == ["lost"]
        connection.to_client()
        assert connection.client.read(10) == b"bye"
        assert connection.client.read(10) == b""

    run(main)


def test_abort():
    async def main():
        connection = Connection()
        connection.shake()
        connection.transport.abort()
        await turns()
        assert connection.below.closed == "abort"
        assert connection.above.heard == ["lost"]

    run(main)


def test_a_reset_is_told():
    async def main():
        connection = Connection()
        connection.shake()
        error = ConnectionResetError()
        connection.transport.connection_lost(error)
        assert connection.above.heard == [error]

    run(main)


def test_bytes_that_are_not_of_the_connection():
    async def main():
        connection = Connection()
        connection.shake()
        connection.client.write(b"good")
        data = connection.up.read()
        connection.transport.data_received(data + b"\x17\x03\x03\x00\x18" + bytes(24))
        await turns()
        assert connection.above.heard[0] == b"good"
        assert isinstance(connection.above.heard[1], ssl.SSLError)
        with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
            connection.read()

    run(main)


def test_handshake_with_somebody_who_does_not_speak_tls():
    async def main():
        connection = Connection()
        connection.transport.data_received(b"\x16\x03\x01\x00\x04\x63\x00\x00\x00")  # a record with a message that does not exist
        connection.transport.data_received(b"what it still sends")
        await turns()
        assert connection.failed[0].reason == "UNEXPECTED_MESSAGE"
        assert connection.below.sent[:1] == b"\x15"  # an alert
        assert connection.below.closed == "close"
        assert connection.store.value("l.ssl.connection_error") == 1

    run(main)


@pytest.mark.parametrize("how", ["eof", "abort", "reset"])
def test_handshake_that_is_broken_off(how):
    async def main():
        connection = Connection()
        error = None
        if how == "eof":
            assert connection.transport.eof_received()
        elif how == "abort":
            connection.transport.abort()
        else:
            error = ConnectionResetError()
            connection.transport.connection_lost(error)
        await turns()
        assert connection.failed == [error]
        assert connection.above.heard == []

    run(main)


def test_back_pressure_is_that_of_the_transport_below():
    async def main():
        connection = Connection()
        connection.transport.pause_writing()  # nobody to tell yet
        connection.transport.resume_writing()
        connection.shake()
        connection.transport.set_write_buffer_limits(100, 50)
        assert connection.below.limits == (100, 50)
        assert connection.transport.get_write_buffer_size() == 7
        connection.transport.pause_writing()
        connection.transport.resume_writing()
        assert connection.above.heard == ["full", "writable"]

    run(main)


def test_writes_while_openssl_renegotiates():
    """What it does not take is kept in order, and sent when something has come from the peer; the close_notify after it."""

    async def main():
        connection = Connection()
        connection.shake()
        transport = connection.transport
        takes = transport.ssl_object.write_plain

        def takes_nothing(data: bytes) -> int:
            raise ssl.SSLWantReadError

        transport._write_more = takes_nothing
        transport.write(b"one ")
        transport.write(b"two")
        transport.write_eof()
        assert connection.below.sent == b""
        transport._write_more = takes
        connection.client.write(b"done")
        connection.client.write(b"it")
        connection.to_server()
        assert connection.above.heard == [b"doneit"]
        assert connection.read() == b"one two"
        assert connection.read() == b""

    run(main)


def test_buffered_protocols():
    class Buffered(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer = bytearray(3)
            self.heard = b""

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.heard += self.buffer[:nbytes]

    async def main():
        connection = Connection()
        connection.shake()
        protocol = Buffered()
        connection.transport.set_protocol(protocol)
        connection.client.write(b"in pieces")
        connection.to_server()
        assert protocol.heard == b"in pieces"

    run(main)


def test_nothing_is_left_for_the_garbage_collector():
    async def main():
        connection = Connection()
        connection.shake()
        connection.client.write(b"question")
        connection.to_server()
        connection.transport.close()
        await turns()
        gone = weakref.ref(connection.transport.ssl_object)
        del connection.above.transport, connection.transport
        assert gone() is None

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()
