"""Whatever happens to requests and connections, in whatever order: nothing is lost, nothing is counted that is over, and nobody hears anything twice."""

from __future__ import annotations

import asyncio

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec.headers import RequestHead
from meshproxy.net import dial
from tests.unit.http2_upstream_help import Caller, Link, Server

POST = RequestHead(b"POST", b"/", b"a.test", [])
WHAT = st.sampled_from(
    """ask ask ask ask post stream stream more end end answer answer answer answer head head data data finish finish trailers trailers reset refuse goaway
    goaway_low close garbage settings abort cancel pause resume full drained drained drain run""".split()
)
CODES = (h2.errors.ErrorCodes.CANCEL, h2.errors.ErrorCodes.PROTOCOL_ERROR, h2.errors.ErrorCodes.NO_ERROR)


class Attr:
    """In place of pytest's monkeypatch: Hypothesis runs many examples in one test."""

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, object]] = []

    def setattr(self, target: object, name: str, value: object) -> None:
        self._undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def undo(self) -> None:
        for target, name, value in reversed(self._undo):
            setattr(target, name, value)


class World:
    """Requests, and servers that do what they like."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.callers: list[Caller] = []
        self.gone: list[Caller] = []  # those that gave up

    async def do(self, what: str, which: int) -> None:
        link = self.link
        if what == "run":
            await link.run(3)
        elif what == "drain":
            link.pool.drain()
            link.host.pools = None
            link.pool = link.cluster.pool_for(link.host, 0, POST)
        elif what in {"ask", "post", "stream"}:
            caller = {"ask": Caller, "post": lambda: Caller(POST, body=b"x" * 50), "stream": lambda: Caller(POST, ended=False)}[what]()
            self.callers.append(caller)
            caller.go(link.pool)
        elif what in {"more", "end", "abort", "cancel", "pause", "resume"}:
            self.of_a_caller(what, which)
        elif link.servers:
            server = link.servers[which % len(link.servers)]
            if not server.closed:
                self.of_a_server(server, what, which)
        if which % 3:
            await link.run(3)

    def of_a_caller(self, what: str, which: int) -> None:
        if not self.callers:
            return
        caller = self.callers[which % len(self.callers)]
        exchange = caller.exchange
        if what == "cancel":
            if caller in self.link.pool.pending:
                self.gone.append(caller)
            self.link.pool.cancel(caller)
        elif exchange is None:
            return
        elif what == "abort":
            caller.exchange = None
            self.gone.append(caller)
            exchange.abort()
        elif what == "pause":
            exchange.pause_reading()
        elif what == "resume":
            exchange.resume_reading()
        elif not caller.ended:
            caller.ended = what == "end"
            exchange.send_data(b"y" * 30, caller.ended)

    def of_a_server(self, server: Server, what: str, which: int) -> None:
        connection = server.h2
        open_streams = [number for number, stream in connection.streams.items() if not stream.closed]
        try:
            if what == "close":
                server.hang_up()
                return
            if what == "garbage":
                server.protocol.data_received(b"\0\0\1\x09\4\0\0\0\0x")
                return
            if what == "settings":
                connection.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: which % 4})
            elif what == "goaway":
                server.goaway(max(server.heads(), default=0))
            elif what == "goaway_low":
                server.goaway(which % 6)
            elif what == "full":
                server.protocol.pause_writing()
            elif what == "drained":
                server.protocol.resume_writing()
            elif open_streams:
                self.of_a_stream(server, what, open_streams[which % len(open_streams)], which)
            server.flush()
        except h2.exceptions.ProtocolError:
            pass  # the server may not do that now

    def of_a_stream(self, server: Server, what: str, stream: int, which: int) -> None:
        connection = server.h2
        if what == "answer":
            connection.send_headers(stream, [(":status", "200")])
            connection.send_data(stream, b"ok", end_stream=True)
        elif what == "head":
            connection.send_headers(stream, [(":status", "200")])
        elif what == "data":
            connection.send_data(stream, b"z" * (which % 40))
        elif what == "finish":
            connection.end_stream(stream)
        elif what == "trailers":
            connection.send_headers(stream, [("x", "1")], end_stream=True)
        elif what == "reset":
            connection.reset_stream(stream, CODES[which % 3])
        elif what == "refuse":
            connection.reset_stream(stream, h2.errors.ErrorCodes.REFUSED_STREAM)

    def check(self) -> None:
        """What holds at any time."""
        limits, host = self.link.cluster.limits[0], self.link.host
        attached = sum(caller.exchange is not None for caller in self.callers)
        assert limits.rq == host.rq_active == attached
        assert 0 <= limits.pending <= len(self.callers)
        assert limits.cx == host.cx_active >= len(self.link.pool.connections)
        assert all(connection.room > 0 and not connection.closed for connection in self.link.pool.ready)
        for caller in self.callers:
            assert caller.ends() in ([], ["reset"], ["no connection"], ["data"], ["trailers"], ["data", "early"], ["trailers", "early"]), caller.log
            heads = [entry for entry in caller.log if isinstance(entry[0], int)]
            assert len(heads) <= 1

    async def end(self) -> None:
        """Everything goes away; nothing is left."""
        link = self.link
        link.refuse = dial.DialError(dial.CONNECT_FAILURE, "")  # no more connections, once those are gone that are there
        await link.run()
        for server in link.servers:
            if not server.closed:
                server.hang_up()
        await link.run()


@given(st.integers(1, 3), st.integers(0, 3), st.lists(st.tuples(WHAT, st.integers(0, 11)), max_size=60))
def test_accounts_hold(streams, requests, events):
    async def run() -> None:
        attr = Attr()
        try:
            common = {"max_requests_per_connection": requests} if requests else {}
            world = World(Link(attr, common=common, max_concurrent_streams=streams))
            world.link.pool.learns = bool(streams & 1)
            for what, which in events:
                await world.do(what, which)
                world.check()
            await world.end()
            world.check()
            assert world.link.idle()
            assert world.link.counts("upstream_cx_active", "http2.pending_send_bytes", "upstream_rq_pending_active") == [0, 0, 0]
            for caller in world.callers:
                assert caller.ends() or caller in world.gone, caller.log
        finally:
            attr.undo()

    asyncio.run(run())
