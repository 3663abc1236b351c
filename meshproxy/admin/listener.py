"""The admin listener: an HTTP connection manager like any other, whose router is the table of endpoints. It runs on main's event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.admin import endpoints
from meshproxy.admin.message import Request, Response
from meshproxy.api import errors, messages
from meshproxy.api.matchers import compile_string
from meshproxy.codec.headers import ResponseHead
from meshproxy.http.manager import HttpConnectionManager
from meshproxy.net import sockets
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo
from meshproxy.net.filter_chain import NetworkContext
from meshproxy.net.tasks import spawn
from meshproxy.server import SLICE

if TYPE_CHECKING:
    from meshproxy.api.regex import BytesPredicate
    from meshproxy.codec.headers import Headers, Pair
    from meshproxy.context import Context
    from meshproxy.http.stream import Stream
    from meshproxy.server import Server

log = logging.getLogger("meshproxy.admin")

_Manager = messages.known("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager")
_Router = messages.known("envoy.extensions.filters.http.router.v3.Router")

MAX_BODY = 1 << 20  # bytes of a request body; only /runtime_modify reads one
BACKLOG = 128
PIECE = 1 << 16  # bytes of it that are sent at once
_COMMON = ((b"cache-control", b"no-cache, max-age=0"), (b"x-content-type-options", b"nosniff"))


class AdminListener:
    """Owns the admin socket. `bind` before the workers are forked (an address in use must stop the start), `start` on the running loop."""

    def __init__(self, admin: Any, context: Context) -> None:
        """Raises ConfigError with paths relative to the bootstrap's `admin`."""
        self._context = context
        self._allowed = _allowed(admin)
        self._manager = HttpConnectionManager(_manager_proto(admin), NetworkContext(context, context.stats.scope(""), None))
        with errors.under("address"):
            self._socket = bind(admin)
        self.address = Address.from_sockaddr(self._socket.family, self._socket.getsockname())

    def start(self, server: Server) -> None:
        """Listen and answer."""
        self._manager.router = AdminRouter(server, self._allowed)  # type: ignore[assignment]
        self._socket.listen(BACKLOG)
        self._context.loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, peer = self._socket.accept()
        except OSError as error:  # the peer is gone already, or we are out of descriptors: the next one may work
            log.debug("cannot accept: %s", error)
            return
        connection.setblocking(False)
        family = connection.family
        remote = Address.from_sockaddr(family, peer)
        local = Address.from_sockaddr(family, connection.getsockname())
        info = ConnectionInfo(0, remote, local, self._context.clock())
        spawn("admin connection", self._context.loop.connect_accepted_socket(lambda: self._manager.create_protocol(info), connection))

    def close(self) -> None:
        """Accept no more; connections end with the process."""
        self._context.loop.remove_reader(self._socket.fileno())
        self._socket.close()


def bind(admin: Any) -> socket.socket:
    """The bound, not yet listening socket of an `envoy.config.bootstrap.v3.Admin`. Raises ConfigError."""
    address = Address.from_proto(admin.address)
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if address.kind == "ip":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option in sockets.compile_options(admin.socket_options):
            option.apply(sock)
        sock.bind(address.sockaddr)
    except OSError as error:
        sock.close()
        errors.fail("", f"cannot bind '{address.text}': {error.strerror}")
    return sock


def _allowed(admin: Any) -> tuple[BytesPredicate, ...]:
    """What the targets (with queries) of requests must match one of; empty when all are allowed."""
    allowed = []
    for at, matcher in enumerate(admin.allow_paths):
        with errors.under(f"allow_paths[{at}]"):
            allowed.append(compile_string(matcher))
    return tuple(allowed)


def _manager_proto(admin: Any) -> Any:
    proto = _Manager(stat_prefix="admin", merge_slashes=True, access_log=admin.access_log)
    proto.normalize_path.value = True
    proto.route_config.name = "admin"
    if admin.access_log_path:
        # The older way to say the same.
        entry = proto.access_log.add(name="envoy.access_loggers.file")
        entry.typed_config.Pack(messages.known("envoy.extensions.access_loggers.file.v3.FileAccessLog")(path=admin.access_log_path))
    proto.http_filters.add(name="envoy.filters.http.router").typed_config.Pack(_Router())
    return proto


class AdminRouter:
    """Takes the router's place in the admin connection manager: every request is answered by an endpoint."""

    def __init__(self, server: Server, allowed: tuple[BytesPredicate, ...] = ()) -> None:
        self._server = server
        self._allowed = allowed

    def start(self, stream: Stream, end_stream: bool) -> None:
        """Take over a request; the answer comes when its body is here and the endpoint is done."""
        exchange = stream.forwarding = _Exchange(self._server, stream, self._allowed)
        if end_stream:
            exchange.answer()


class _Exchange:
    """One request. Has the methods that a stream calls on what forwards it."""

    def __init__(self, server: Server, stream: Stream, allowed: tuple[BytesPredicate, ...]) -> None:
        self._server = server
        self._stream = stream
        self._allowed = allowed
        self._body = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.done = False

    def data(self, data: bytes, end_stream: bool) -> None:
        """Request body."""
        if self.done or self._task is not None:
            return
        self._body += data
        if len(self._body) > MAX_BODY:
            self._send(Response("request body too large\n", 413))
        elif end_stream:
            self.answer()

    def trailers(self, trailers: Headers) -> None:
        """The request's end."""
        self.answer()

    def abandon(self) -> None:
        """The stream has ended, or has its answer."""
        self.done = True
        if self._task is not None and not self._task.done() and self._task is not asyncio.current_task():
            self._task.cancel()

    def downstream_writable(self, writable: bool) -> None:
        """Pieces of an answer are made as fast as they are read."""
        if writable:
            self._writable.set()
        else:
            self._writable.clear()

    @property
    def _only_head(self) -> bool:
        return self._stream.request is not None and self._stream.request.method == b"HEAD"

    def answer(self) -> None:
        """Ask the endpoint, and send what it says."""
        head = self._stream.request
        assert head is not None
        if self._allowed and not any(matches(head.path) for matches in self._allowed):
            self._send(Response(b"request to path %s not allowed" % head.path, 403))
            return
        request = Request.from_target(
            head.method.decode("latin-1"), head.path.decode("latin-1"), bytes(self._body), (head.get(b"content-type") or b"").decode("latin-1")
        )
        result = endpoints.handle(request, self._server)
        if isinstance(result, Response):
            self._send(result)
        else:
            self._task = spawn("admin request", self._wait(result))

    async def _wait(self, answer: Awaitable[Response]) -> None:
        response = await answer
        if isinstance(response.body, str | bytes):
            self._send(response)
        else:
            await self._send_pieces(response, response.body)

    def _send(self, response: Response) -> None:
        if self.done:
            return
        self.done = True
        assert isinstance(response.body, str | bytes)
        body = _encode([response.body])
        stream = self._stream
        stream.details = "admin_filter_response"
        ended = not body or self._only_head
        stream.send_headers(_head(response, (b"content-length", b"%d" % len(body))), ended)
        if not ended and not stream.ended:
            stream.send_data(body, True)
        stream.codec.flush()

    async def _send_pieces(self, response: Response, pieces: Iterator[str] | Iterator[bytes]) -> None:
        """Make and send a long answer in slices, between which the event loop serves others."""
        stream, clock = self._stream, self._stream.manager.clock
        stream.details = "admin_filter_response"
        if self._only_head:
            self.done = True
            stream.send_headers(_head(response), True)
            return
        stream.send_headers(_head(response), False)
        ready: list[Any] = []
        size = 0
        until = clock() + SLICE
        for piece in pieces:
            ready.append(piece)
            size += len(piece)
            if size < PIECE and clock() < until:
                continue
            if size:
                stream.send_data(_encode(ready), False)
                ready.clear()
                size = 0
            await asyncio.sleep(0)
            await self._writable.wait()
            until = clock() + SLICE
        self.done = True
        stream.send_data(_encode(ready), True)


def _head(response: Response, *more: Pair) -> ResponseHead:
    return ResponseHead(response.status, [(b"content-type", response.content_type.encode()), *_COMMON, *more])


def _encode(pieces: list[Any]) -> bytes:
    if pieces and isinstance(pieces[0], str):
        return "".join(pieces).encode("utf-8", "surrogateescape")
    return b"".join(pieces)
