"""A downstream HTTP/2 connection whose client is the `h2` package, in the same process, on an event loop whose time the test moves."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings

from meshproxy.api.runtime import Layer, Runtime
from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.context import Context
from meshproxy.http.manager import HttpConnectionManager
from meshproxy.net.connection import ConnectionInfo
from meshproxy.net.drain import Drain
from meshproxy.net.filter_chain import NetworkContext
from meshproxy.net.timers import Timers
from meshproxy.observe.stats import Store
from tests.unit import filter_help

HCM = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
GET = [(":method", "GET"), (":scheme", "http"), (":authority", "a.test"), (":path", "/")]
POST = [(":method", "POST"), *GET[1:]]


class Handle:
    """A call that is due."""

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.call: Callable[..., Any] | None = call
        self.arguments = arguments

    def cancel(self) -> None:
        self.call = None


class Loop:
    """As much of an event loop as connections use. Time stands still until `pass_`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._number = itertools.count()
        self._due: list[tuple[float, int, Handle]] = []

    def call_soon(self, call: Callable[..., Any], *arguments: Any) -> Handle:
        return self.call_later(0.0, call, *arguments)

    def call_later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> Handle:
        handle = Handle(call, arguments)
        heapq.heappush(self._due, (self.now + seconds, next(self._number), handle))
        return handle

    def pass_(self, seconds: float = 0.0) -> None:
        """Do everything that is due within `seconds`."""
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.now, _, handle = heapq.heappop(self._due)
            if handle.call is not None:
                handle.call(*handle.arguments)
        self.now = until

    @property
    def waiting(self) -> int:
        """How many timers run."""
        return sum(handle.call is not None for _, _, handle in self._due)


class Router:
    """In place of the router: keeps the streams that come, with what they were told."""

    suppress = False
    charges_plainly = False

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.clusters: dict[str, Any] = {}

    def start(self, stream: Any, end_stream: bool, host: Any = None, finalized: bool = False) -> None:
        stream.forwarding = Forwarding()
        self.streams.append(stream)

    def cluster_of(self, stream: Any) -> None:
        return None


class Forwarding:
    """The way of a request, as far as its stream knows."""

    def __init__(self) -> None:
        self.done = False
        self.owner: Any = None
        self.body = b""
        self.ended = self.abandoned = False
        self.trailer: Headers | None = None
        self.writable: list[bool] = []
        self.winner: Any = None

    def data(self, data: bytes, end_stream: bool) -> None:
        self.body += data
        self.ended |= end_stream

    def trailers(self, trailers: Headers) -> None:
        self.trailer = trailers
        self.ended = True

    def abandon(self) -> None:
        self.abandoned = True

    def downstream_writable(self, writable: bool) -> None:
        self.writable.append(writable)


class Client:
    """A client, and the transport of our end. `written`: what our end wrote and the client has not read."""

    def __init__(self, options: str = "", *, settings: dict[int, int] | None = None, runtime: dict[str, int] | None = None, begin: bool = True) -> None:
        self.loop = Loop()
        context = Context(
            loop=self.loop,  # type: ignore[arg-type]
            stats=Store(),
            timers=Timers(self.loop, self.clock),  # type: ignore[arg-type]
            runtime=Runtime([Layer("static", {key: filter_help.parse_entry(str(value)) for key, value in (runtime or {}).items()})]),
            drain=Drain(self.clock, Random(1)),
            clock=self.clock,
            wall=self.clock,
            random=Random(1),
        )
        hosts = "[{name: a, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: c}}]}]"
        filters = "[{name: router, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]"
        text = f"{{stat_prefix: ing, http_filters: {filters}, route_config: {{virtual_hosts: {hosts}}}, {options}}}"
        self.manager = HttpConnectionManager(filter_help.proto(HCM, text), NetworkContext(context, context.stats.scope(""), None, "listener.l."))
        self.router = self.manager.router = Router()  # type: ignore[assignment]
        self.logged: list[Any] = []
        self.manager.logs = (self,)
        self.info = ConnectionInfo(1, *[filter_help.connection().remote] * 2, 0.0)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        if settings:
            self.h2.local_settings = h2.settings.Settings(client=True, initial_values=settings)
        self.written = b""
        self.closed = ""
        self.reading = True
        self.limit = 0
        self.protocol: Any = self.manager.create_protocol(self.info)
        self.protocol.connection_made(self)
        self.events: list[Any] = []
        if begin:
            self.h2.initiate_connection()
            self.send()

    def clock(self) -> float:
        return self.loop.now

    def log(self, stream: Any, event: str = "") -> None:
        self.logged.append((stream.status, stream.flags, stream.details))

    # -- the transport

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def write(self, data: bytes) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return len(self.written)

    def set_write_buffer_limits(self, high: int) -> None:
        self.limit = high

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return bool(self.closed)

    def close(self) -> None:
        self.closed = self.closed or "closed"
        self.loop.call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.closed = self.closed or "aborted"
        self.loop.call_soon(self.protocol.connection_lost, None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    # -- the client

    def send(self) -> list[Any]:
        """Send what the client has to say; returns what came since the last time."""
        data = self.h2.data_to_send()
        if data and not self.closed:
            self.protocol.data_received(data)
        return self.read()

    def read(self, seconds: float = 0.0) -> list[Any]:
        """Let time pass, and read what comes."""
        self.loop.pass_(seconds)
        data, self.written = self.written, b""
        events = self.h2.receive_data(data) if data else []
        self.events += events
        return events

    def ask(self, fields: list[tuple[str, str]] = GET, *, end: bool = True) -> Any:
        """A request; its stream, as the router has it."""
        self.h2.send_headers(self.h2.get_next_available_stream_id(), fields, end_stream=end)
        self.send()
        return self.router.streams[-1] if self.router.streams else None

    def seen(self, kind: type) -> list[Any]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def counters(self) -> dict[str, int]:
        """Every statistic of the connection manager that is not 0."""
        self.manager.settle()
        found = {name: getattr(metric, "n", 0) for name, metric in self.manager.context.stats._metrics.items()}
        return {name.removeprefix("http.ing."): n for name, n in found.items() if n and name.startswith(("http.ing.", "http2."))}


def answer(stream: Any, body: bytes = b"ok", status: int = 200) -> None:
    """A response of the upstream."""
    stream.send_headers(ResponseHead(status, [(b"content-length", b"%d" % len(body))]), False)
    stream.send_data(body, True)
