"""Listeners with real sockets: network filters in front of the terminal one."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.polling import PATIENCE, until
from tests.unit.listener_help import chain, connect
from tests.unit.listener_help import filters as filters
from tests.unit.net_help import (
    client_context,
    context,
    downstream_tls,
    listener_proto,
    reset,
    run,
    start,
    value,
)


class Gate:
    """A network filter that answers as it is told."""

    def __init__(self, **hooks: Any) -> None:
        self.closed: list[Any] = []
        for name, answer in hooks.items():
            setattr(self, name, answer)

    def on_close(self, conn: Any) -> None:
        self.closed.append(conn)


async def later(answer: Any) -> Any:
    await asyncio.sleep(0)
    return answer


@pytest.mark.parametrize("hook", ["on_connection", "on_first_data"])
@pytest.mark.parametrize("tls", [None, downstream_tls()], ids=["plain", "tls"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("answer", "passes"), [(None, True), (False, False)])
def test_network_filters(filters, hook, tls, late, answer, passes):
    async def main():
        sent = asyncio.Event()

        async def when_sent():
            await sent.wait()
            return answer

        gate = Gate(**{hook: lambda _: when_sent() if late else answer})
        filters.insert(0, gate)
        made = context()
        listener = await start(made, listener_proto(chain(tls=tls)))
        options = {"ssl": client_context(), "server_hostname": "server.example.com"} if tls else {}
        reader, writer = await connect(listener, **options)
        writer.write(b"first ")
        await asyncio.sleep(0)
        writer.write(b"second")
        sent.set()
        if passes:
            await reader.readline()
            assert await reader.readexactly(12) == b"first second"
            writer.close()
        else:
            with contextlib.suppress(OSError):
                assert b"second" not in await reader.read()
            writer.transport.abort()
        await until(lambda: not listener.active)
        assert len(gate.closed) == 1
        assert value(made, "downstream_cx_destroy") == 1
        listener.close()

    run(main)


@pytest.mark.parametrize("hook", ["on_connection", "on_first_data"])
@pytest.mark.parametrize("first", [False, True])
def test_a_filter_that_fails_lets_nobody_pass(filters, caplog, hook, first):
    async def main():
        async def fail():
            raise ValueError("on purpose")

        def fail_at_once(_):
            raise ValueError("on purpose")

        gates = [Gate(**{hook: lambda _: fail()})] if first else [Gate(**{hook: lambda _: later(None)}), Gate(**{hook: fail_at_once})]
        filters[:0] = gates
        listener = await start(context(), listener_proto(chain()))
        reader, writer = await connect(listener)
        writer.write(b"secret")
        with contextlib.suppress(OSError):
            async with asyncio.timeout(PATIENCE):
                assert b"secret" not in await reader.read()
        writer.transport.abort()
        await until(lambda: not listener.active)
        assert "a network filter failed" in caplog.text
        listener.close()

    run(main)


def test_all_filters_are_asked(filters):
    async def main():
        asked = []
        gates = [
            Gate(on_connection=lambda _: asked.append(1) or later(None), on_first_data=lambda _: asked.append(4)),
            Gate(on_connection=lambda _: asked.append(2)),
            Gate(on_connection=lambda _: asked.append(3) or later(None), on_first_data=lambda _: asked.append(5) or later(None)),
        ]
        filters[:-1] = gates
        listener = await start(context(), listener_proto(chain()))
        reader, writer = await connect(listener)
        await reader.readline()
        assert asked == [1, 2, 3]  # a server that speaks first is not held up
        writer.write(b"x")
        writer.write_eof()
        assert await reader.read() == b"x"
        assert asked == [1, 2, 3, 4, 5]
        writer.close()
        listener.close()

    run(main)


def test_client_leaves_while_filters_think(filters):
    async def main():
        decided = asyncio.Event()
        thinking = []

        async def think() -> None:
            thinking.append(asyncio.current_task())
            await decided.wait()

        filters.insert(0, Gate(on_connection=lambda _: think()))
        listener = await start(context(), listener_proto(chain()))
        _, writer = await connect(listener)
        await until(lambda: bool(thinking))
        reset(writer)
        await until(lambda: not listener.active)
        decided.set()
        await until(thinking[0].done)
        assert not filters[-1].connections
        listener.close()

    run(main)


def test_buffer_limit(filters):
    async def main():
        listener = await start(context(), listener_proto(chain(), per_connection_buffer_limit_bytes=1234))
        reader, writer = await connect(listener)
        await reader.readline()
        assert filters[0].connections[0].buffer_limit == 1234
        transport = next(iter(listener._connections.values()))
        assert transport.get_write_buffer_limits() == (617, 1234)
        writer.close()
        listener.close()

    run(main)
