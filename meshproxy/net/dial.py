"""Opens connections to upstream hosts: TCP or Unix socket, optionally with TLS on top.

A failure is one exception with a reason from a short list and a text as Envoy's `%UPSTREAM_TRANSPORT_FAILURE_REASON%` gives it.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo, next_id
from meshproxy.net.tls_stats import failure_text
from meshproxy.net.tls_transport import TlsTransport

if TYPE_CHECKING:
    from meshproxy.net.sockets import DialOptions
    from meshproxy.net.tls import HandshakeObject, UpstreamTls

Preamble = Callable[[socket.socket], bytes]
_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)

CONNECT_FAILURE = "connect_failure"
CONNECT_TIMEOUT = "connect_timeout"
TLS = "tls"


class DialError(Exception):
    """No connection. `reason` is 'connect_failure', 'connect_timeout' or 'tls'; `failure` is the transport failure reason, '' after a timeout.

    `immediate`: the system refused to even start connecting (no route, no free port, no such Unix socket).
    """

    def __init__(self, reason: str, failure: str, *, immediate: bool = False) -> None:
        super().__init__(f"{reason}: {failure}" if failure else reason)
        self.reason = reason
        self.failure = failure
        self.immediate = immediate


async def connect(
    address: Address,
    protocol_factory: Callable[[], _Protocol],
    *,
    timeout: float,
    transport: UpstreamTls | None = None,
    options: DialOptions | None = None,
    server_name: str | None = None,
    alpn: tuple[str, ...] = (),
    san: str | None = None,
    preamble: Preamble | None = None,
) -> tuple[asyncio.Transport, _Protocol]:
    """Connect to `address` within `timeout` seconds, TLS handshake included; the protocol's `connection_made` runs when the connection may be used.

    `server_name` overrides the SNI of the TLS context (auto_sni, auto_host_sni), `alpn` is offered when the context names no protocols, and `san` is a DNS
    name or IP address that the peer's certificate must have besides what the context asks for (auto_san_validation). `options` carries the bind address,
    keepalive and socket options of the cluster. `preamble` says of a connected socket which bytes come before all others, TLS included. Raises DialError.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            if transport is None and options is None and preamble is None and "%" not in address.ip:
                if address.kind == "ip":
                    return await loop.create_connection(protocol_factory, address.ip, address.port)
                return await loop.create_unix_connection(protocol_factory, address.sockaddr)
            sock = await open_socket(address, options, preamble)
            try:
                if transport is None:
                    return await _adopt(loop, protocol_factory, sock)
                wrap = functools.partial(transport.wrap, server_name=server_name, alpn=alpn, san=san)
                return await _Dialling(loop, protocol_factory, wrap).connect(sock)  # type: ignore[return-value]
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        if error.errno is not None:  # ETIMEDOUT: the kernel gave up before we did
            raise _failure(error, address) from error
        raise DialError(CONNECT_TIMEOUT, "") from None
    except OSError as error:
        raise _failure(error, address) from error


async def connect_socket(address: Address, *, timeout: float, options: DialOptions | None = None, preamble: Preamble | None = None) -> socket.socket:
    """A connected bare socket, within `timeout` seconds: for plaintext connections that are spliced. See `connect`. Raises DialError."""
    try:
        async with asyncio.timeout(timeout):
            return await open_socket(address, options, preamble)
    except TimeoutError as error:
        if error.errno is not None:
            raise _failure(error, address) from error
        raise DialError(CONNECT_TIMEOUT, "") from None
    except OSError as error:
        raise _failure(error, address) from error


def describe(transport: asyncio.BaseTransport, address: Address) -> ConnectionInfo:
    """What is known of a connection that was made to `address`: its local address and its TLS."""
    name = transport.get_extra_info("sockname")
    local = Address.from_sockaddr(address.family, name) if name else Address()
    info = ConnectionInfo(next_id(), address, local, asyncio.get_running_loop().time())
    ssl_object = transport.get_extra_info("ssl_object")
    if ssl_object is not None:
        info.transport_protocol = "tls"
        owner = getattr(ssl_object.context, "owner", None)
        if owner is not None:
            info.tls = owner.describe(ssl_object)
            info.server_name = ssl_object.server_hostname
    return info


async def open_socket(address: Address, options: DialOptions | None = None, preamble: Preamble | None = None) -> socket.socket:
    """A connected non-blocking socket (for splicing and for TLS). No timeout of its own. Raises OSError."""
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if address.kind == "ip":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if options is not None:
            options.apply(sock, address)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, address.sockaddr)
        if preamble is not None:
            await loop.sock_sendall(sock, preamble(sock))
        return sock
    except BaseException:
        sock.close()
        raise


class _Dialling:
    """A TLS handshake with an upstream host (net.tls_transport.Outcome)."""

    __slots__ = ("_factory", "_loop", "_made", "_wrap")

    def __init__(self, loop: asyncio.AbstractEventLoop, factory: Callable[[], _Protocol], wrap: Callable[..., HandshakeObject]) -> None:
        self._loop = loop
        self._factory = factory
        self._wrap = wrap
        self._made: asyncio.Future[tuple[TlsTransport, Any]] = loop.create_future()

    async def connect(self, sock: socket.socket) -> tuple[TlsTransport, Any]:
        """Shake hands on a connected socket. Raises DialError."""
        transport = TlsTransport(self._wrap, self)
        try:
            await _adopt(self._loop, lambda: transport, sock)
            return await self._made
        except BaseException:
            self._made.cancel()
            transport.abort()
            raise

    def tls_ready(self, transport: TlsTransport) -> None:
        protocol = self._factory()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)  # type: ignore[arg-type]
        if not self._made.done():
            self._made.set_result((transport, protocol))

    def tls_failed(self, transport: TlsTransport, error: OSError | None) -> None:
        if self._made.done():
            return
        # Closed or reset in the middle of the handshake is no fault of TLS.
        reason = TLS if isinstance(error, ssl.SSLError) else CONNECT_FAILURE
        failure = DialError(reason, failure_text(error) if error is not None else "")
        failure.__cause__ = error
        self._made.set_exception(failure)


async def _adopt(loop: asyncio.AbstractEventLoop, factory: Callable[[], _Protocol], sock: socket.socket) -> tuple[asyncio.Transport, _Protocol]:
    if sock.family == socket.AF_UNIX:
        return await loop.create_unix_connection(factory, sock=sock)
    return await loop.create_connection(factory, sock=sock)


# What connect() answers at once, as far as the error itself tells.
_IMMEDIATE = frozenset((errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EAFNOSUPPORT, errno.EMFILE))


def _failure(error: OSError, address: Address) -> DialError:
    what = os.strerror(error.errno) if error.errno else str(error)
    if address.kind == "pipe" or error.errno in _IMMEDIATE:
        return DialError(CONNECT_FAILURE, f"immediate connect error: {what}|remote address:{address.text}", immediate=True)
    return DialError(CONNECT_FAILURE, f"delayed connect error: {what}")
