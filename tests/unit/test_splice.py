"""Moving bytes between two sockets: copying, splicing, back-pressure, half-closing, failing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest

from meshproxy.net import splice
from meshproxy.net.splice import COPY_SIZE, Pipes, Splice
from tests.polling import quiet, until
from tests.unit.net_help import run


class Observer:
    """Counts."""

    def __init__(self) -> None:
        self.got = {False: 0, True: 0}
        self.gave = {False: 0, True: 0}
        self.blocks: list[tuple[bool, bool]] = []
        self.ends: list[tuple[bool, OSError | None]] = []

    def received(self, upstream: bool, count: int) -> None:
        self.got[upstream] += count

    def sent(self, upstream: bool, count: int) -> None:
        self.gave[upstream] += count

    def blocked(self, upstream: bool, blocked: bool) -> None:
        self.blocks.append((upstream, blocked))

    def ended(self, upstream: bool, error: OSError | None) -> None:
        self.ends.append((upstream, error))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    client.setblocking(False)
    accepted.setblocking(False)
    return client, accepted


class Fixture:
    """A client and a server with a splice between them."""

    def __init__(self) -> None:
        self.client, downstream = tcp_pair()
        self.server, upstream = tcp_pair()
        self.observer = Observer()
        self.pipes = Pipes()
        self.splice = Splice(asyncio.get_running_loop(), downstream, upstream, self.pipes, self.observer)

    def close(self) -> None:
        self.splice.abort()
        self.client.close()
        self.server.close()
        self.pipes.close()


@contextlib.asynccontextmanager
async def spliced():
    fixture = Fixture()
    try:
        fixture.splice.start()
        yield fixture
    finally:
        fixture.close()


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not part:
            break
        data += part
    return bytes(data)


def test_small_messages_are_copied():
    async def main():
        loop = asyncio.get_running_loop()
        async with spliced() as it:
            for _ in range(20):
                await loop.sock_sendall(it.client, b"question")
                assert await read_exactly(it.server, 8) == b"question"
                await loop.sock_sendall(it.server, b"an answer")
                assert await read_exactly(it.client, 9) == b"an answer"
            assert it.splice._up._pipe is None
            assert it.observer.got == {False: 160, True: 180}
            assert it.observer.gave == {True: 160, False: 180}

    run(main)


def test_what_was_there_before_the_start():
    async def main():
        fixture = Fixture()
        fixture.client.send(b"early")
        fixture.splice.start()
        assert await read_exactly(fixture.server, 5) == b"early"
        fixture.close()

    run(main)


@pytest.mark.parametrize("size", [COPY_SIZE, 3 * COPY_SIZE, 3 * COPY_SIZE + 1, 5_000_000])
def test_bulk_is_the_same_bytes(size):
    async def main():
        loop = asyncio.get_running_loop()
        data = os.urandom(size)
        async with spliced() as it:
            sending = asyncio.ensure_future(loop.sock_sendall(it.client, data))
            back = asyncio.ensure_future(loop.sock_sendall(it.server, data[::-1]))
            up, down = await asyncio.gather(read_exactly(it.server, size), read_exactly(it.client, size))
            await sending
            await back
            assert up == data
            assert down == data[::-1]
            assert it.observer.gave == {True: size, False: size}

    run(main)


def test_bulk_changes_to_a_pipe_and_back():
    async def main():
        loop = asyncio.get_running_loop()
        async with spliced() as it:
            sending = asyncio.ensure_future(loop.sock_sendall(it.client, bytes(3_000_000)))
            await until(lambda: it.splice._up._pipe is not None)
            assert it.splice._down._pipe is None
            await read_exactly(it.server, 3_000_000)
            await sending
            for _ in range(40):
                await loop.sock_sendall(it.client, b"x")
                assert await read_exactly(it.server, 1) == b"x"
            assert it.splice._up._pipe is None
            assert len(it.pipes._spare) == 1

    run(main)


def test_back_pressure():
    async def main():
        loop = asyncio.get_running_loop()
        async with spliced() as it:
            sending = asyncio.ensure_future(loop.sock_sendall(it.client, bytes(50_000_000)))
            await until(lambda: (False, True) in it.observer.blocks)
            await quiet(lambda: it.observer.got[False])
            held = it.observer.got[False] - it.observer.gave[True]
            assert held <= 1 << 20
            assert not sending.done()
            assert len(await read_exactly(it.server, 50_000_000)) == 50_000_000
            assert (False, False) in it.observer.blocks
            await sending

    run(main)


@pytest.mark.parametrize("bulk", [False, True])
def test_half_close(bulk):
    async def main():
        loop = asyncio.get_running_loop()
        size = 1_000_000 if bulk else 10
        async with spliced() as it:
            sending = asyncio.ensure_future(loop.sock_sendall(it.client, bytes(size)))
            assert len(await read_exactly(it.server, size)) == size
            await sending
            it.client.shutdown(socket.SHUT_WR)
            assert await read_exactly(it.server, 1) == b""
            assert not it.observer.ends
            await loop.sock_sendall(it.server, b"the answer")
            assert await read_exactly(it.client, 10) == b"the answer"
            it.server.close()
            assert await read_exactly(it.client, 1) == b""
            await until(lambda: bool(it.observer.ends))
            assert it.observer.ends == [(True, None)]

    run(main)


@pytest.mark.parametrize("size", [5 * COPY_SIZE, 50_000_000])
def test_the_end_comes_while_the_destination_is_full(size, monkeypatch):
    """Everything still arrives, then the end; the other direction goes on, and nobody waits for the destination any more."""
    woken = 0
    writable = splice._Way._writable

    def counted(way) -> None:
        nonlocal woken
        woken += 1
        writable(way)

    monkeypatch.setattr(splice._Way, "_writable", counted)

    async def main():
        loop = asyncio.get_running_loop()
        async with spliced() as it:
            if size < 1_000_000:  # little enough to be copied
                for sock in (it.server, it.splice._upstream, it.splice._downstream):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            data = os.urandom(size)

            async def send() -> None:
                await loop.sock_sendall(it.client, data)
                it.client.shutdown(socket.SHUT_WR)

            sending = asyncio.ensure_future(send())
            await until(lambda: (False, True) in it.observer.blocks)
            assert await read_exactly(it.server, size + 1) == data
            await sending
            await until(lambda: it.splice._up.done)
            blocks = [blocked for upstream, blocked in it.observer.blocks if not upstream]
            assert blocks == [True, False] * (len(blocks) // 2)
            assert it.observer.got[False] == it.observer.gave[True] == size
            await quiet(lambda: woken)
            await loop.sock_sendall(it.server, b"the answer")
            assert await read_exactly(it.client, 10) == b"the answer"
            it.server.close()
            assert await read_exactly(it.client, 1) == b""
            await until(lambda: bool(it.observer.ends))
            assert it.observer.ends == [(True, None)]

    run(main)


@pytest.mark.parametrize("upstream", [False, True])
def test_reset(upstream):
    async def main():
        async with spliced() as it:
            sock = it.server if upstream else it.client
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
            await until(lambda: bool(it.observer.ends))
            side, error = it.observer.ends[0]
            assert side is upstream
            assert isinstance(error, ConnectionResetError)
            with pytest.raises(ConnectionResetError):  # the other side learns what happened
                await read_exactly(it.client if upstream else it.server, 1)

    run(main)


def test_reset_in_the_middle_of_bulk():
    async def main():
        loop = asyncio.get_running_loop()
        async with spliced() as it:
            sending = asyncio.ensure_future(loop.sock_sendall(it.client, bytes(50_000_000)))
            await until(lambda: (False, True) in it.observer.blocks)
            it.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            it.server.close()
            await until(lambda: bool(it.observer.ends))
            assert it.observer.ends[0][0] is True
            with pytest.raises(OSError):
                await sending
            assert not it.pipes._spare  # a pipe with bytes in it is not used again

    run(main)


def test_abort_tells_nobody():
    async def main():
        async with spliced() as it:
            it.splice.abort()
            it.splice.abort()
            assert await read_exactly(it.client, 1) == b""
            assert not it.observer.ends

    run(main)


def test_without_pipes():
    async def main():
        class NoPipes(Pipes):
            def take(self):
                return None

        fixture = Fixture()
        fixture.splice.pipes = NoPipes()
        fixture.splice.start()
        sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(fixture.client, bytes(500_000)))
        assert len(await read_exactly(fixture.server, 500_000)) == 500_000
        await sending
        fixture.close()

    run(main)
