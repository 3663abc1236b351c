"""Pools of HTTP/2 connections whose other end is the `h2` package, in the same process: no sockets, and nothing moves but when the test says so."""

from __future__ import annotations

import asyncio
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings

from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.net import dial
from meshproxy.observe.stream_info import StreamInfo
from meshproxy.upstream.pool import METERED
from tests.unit import upstream_help as up

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
URL = f"type.googleapis.com/{HTTP_OPTIONS}"


class Server:
    """One connection, from the server's side. `events`: what came on it; `transport` is what our end writes to."""

    def __init__(self, settings: dict[int, int]) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self.h2.initiate_connection()
        self.events: list[Any] = []
        self.protocol: Any = None
        self.closed = False
        self.reading = True
        self.unread: list[bytes] = []
        self.leaving = False  # GOAWAY was sent: from then on the h2 package hears nothing

    # -- the transport of our end

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def write(self, data: bytes) -> None:
        self.unread.append(bytes(data))
        if self.reading:
            self.read()

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.unread)) if not self.reading else 0

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return None

    # -- the server's

    def read(self) -> None:
        """Take what was written."""
        data, self.unread = b"".join(self.unread), []
        if data and not self.leaving:
            self.events += self.h2.receive_data(data)

    def flush(self) -> None:
        """Send what the server has to say."""
        data = self.h2.data_to_send()
        if data:
            self.protocol.data_received(data)

    def goaway(self, last: int) -> None:
        """GOAWAY."""
        self.h2.close_connection(last_stream_id=last)
        self.leaving = True
        self.flush()

    def hang_up(self) -> None:
        """Close from the server's side."""
        self.closed = True
        self.protocol.connection_lost(None)

    def answer(self, stream: int, body: bytes = b"ok", *headers: tuple[str, str], status: str = "200", end: bool = True) -> None:
        """A response."""
        self.h2.send_headers(stream, [(":status", status), *headers])
        self.h2.send_data(stream, body, end_stream=end)
        self.flush()

    def seen(self, kind: type) -> list[Any]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def heads(self) -> dict[int, list[tuple[bytes, bytes]]]:
        """Stream -> the fields of its request."""
        return {event.stream_id: event.headers for event in self.seen(h2.events.RequestReceived)}


class Caller:
    """What a pool and its exchanges call; `log` is what they said."""

    def __init__(
        self, head: RequestHead | None = None, *, body: bytes = b"", ended: bool = True, trailers: Headers | None = None, upgrade: bytes | None = None
    ) -> None:
        self.head = RequestHead(b"GET", b"/", b"a.test", []) if head is None else head
        self.body, self.ended, self.trailers, self.upgrade = body, ended, trailers, upgrade
        self.stream = StreamInfo()
        self.exchange: Any = None
        self.log: list[tuple[Any, ...]] = []
        self.reset = asyncio.Event()

    def go(self, pool: Any) -> Caller:
        """Ask for an exchange, and send when there is one."""
        exchange = pool.acquire(self)
        if exchange is not None:
            self.on_connected(exchange)
        return self

    def ends(self) -> list[str]:
        """How it ended, in the order in which it heard so."""
        return [entry[0] for entry in self.log if entry[0] in {"reset", "early", "no connection", "trailers"} or (entry[0] == "data" and entry[2])]

    def on_connected(self, exchange: Any) -> None:
        self.exchange = exchange
        if self.body or not self.ended or self.trailers is not None or self.upgrade is not None:
            exchange.send_head(self.head, [self.body] if self.body else [], ended=self.ended, trailers=self.trailers, upgrade=self.upgrade)
        else:
            exchange.send_whole(self.head)

    def _complete(self) -> None:
        if self.ended and self.exchange is not None:
            exchange, self.exchange = self.exchange, None
            exchange.let_go()

    def on_pool_failure(self, reason: str, failure: str | None) -> None:
        self.log.append(("no connection", reason))

    def on_response_headers(self, head: ResponseHead, end_stream: bool) -> None:
        self.log.append((head.status, [pair for pair in head.items if pair[0] != b"date"]))
        if end_stream:
            self._complete()

    def on_response_data(self, data: bytes, end_stream: bool) -> None:
        self.log.append(("data", data, end_stream))
        if end_stream:
            self._complete()

    def on_response_trailers(self, trailers: Headers) -> None:
        self.log.append(("trailers", trailers.items))
        self._complete()

    def on_upstream_reset(self, reason: str, details: str) -> None:
        self.exchange = None
        self.log.append(("reset", reason))
        self.reset.set()

    def on_upstream_done_early(self) -> None:
        self.exchange = None
        self.log.append(("early",))

    def on_upstream_writable(self, writable: bool) -> None:
        self.log.append(("writable", writable))

    def on_read_end(self) -> None:
        self.log.append(("read",))


class Link:
    """A cluster with one host, its pool, and the server's end of each connection that is dialled."""

    def __init__(
        self, monkeypatch: Any, *, settings: dict[int, int] | None = None, common: dict[str, Any] | None = None, metered: bool = False, **http2: Any
    ) -> None:
        options = {"@type": URL, "explicit_http_config": {"http2_protocol_options": http2}, "common_http_protocol_options": common or {}}
        context = up.context()
        context.loop = asyncio.get_running_loop()
        if metered:
            context.shared[METERED] = True
        self.clock = context.clock
        self.cluster = up.cluster(up.static(up.group("127.0.0.1:1"), typed_extension_protocol_options={HTTP_OPTIONS: options}), context)
        self.host = self.cluster.hosts[0]
        self.pool: Any = self.cluster.pool_for(self.host, 0, RequestHead(b"GET", b"/", b"", []))
        self.settings = settings or {}
        self.servers: list[Server] = []
        self.refuse: dial.DialError | None = None
        monkeypatch.setattr(dial, "connect", self._connect)

    async def _connect(self, address: Any, factory: Any, **options: Any) -> tuple[Any, Any]:
        if self.refuse is not None:
            raise self.refuse
        server = Server(self.settings)
        self.servers.append(server)
        server.protocol = factory()
        server.protocol.connection_made(server)
        return server, server.protocol

    async def run(self, rounds: int = 6) -> None:
        """Let everything happen that is due."""
        for _ in range(rounds):
            await asyncio.sleep(0)

    async def serve(self, *callers: Caller) -> list[Caller]:
        """Start requests, and go on until they have reached the server and its SETTINGS us."""
        for caller in callers:
            caller.go(self.pool)
        await self.run()
        for server in self.servers:
            server.flush()
        await self.run()
        return [*callers]

    def counts(self, *names: str) -> list[int]:
        """Counters and gauges of the cluster."""
        self.cluster.publish()
        return [self.cluster.context.stats.value(f"cluster.c.{name}") for name in names]

    def idle(self) -> bool:
        """Whether nothing is counted as going on."""
        return self.cluster.limits[0].rq == self.cluster.limits[0].pending == self.host.rq_active == self.counts("http2.streams_active")[0] == 0
