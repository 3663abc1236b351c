"""Telling hosts who calls, by the PROXY protocol: the transport socket that wraps the one that carries the bytes.

Source: envoy.extensions.transport_sockets.proxy_protocol.v3 and Envoy's `proxy_protocol.cc`. A connection begins with the header and then is for one caller
alone: callers with other addresses have pools of their own. Connections that are for nobody (health checks, our own requests) name their own addresses by
version 1, and by version 2 say that they are LOCAL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.codec.proxy_protocol import write_local, write_v1, write_v2
from meshproxy.net.address import Address

if TYPE_CHECKING:
    import socket

    from meshproxy.net.dial import Preamble
    from meshproxy.upstream.host import Host

NAME = "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport"
HONOURS = {NAME: "config transport_socket", "envoy.config.core.v3.ProxyProtocolConfig": "version"}

Ends = tuple[Address, Address]  # who calls, and whom it called


def version_of(message: Any) -> int:
    """1 or 2, of a ProxyProtocolUpstreamTransport."""
    return 2 if message.config.version == 1 else 1


def preamble(host: Host, ends: Ends | None) -> Preamble:
    """What connections to a host begin with, which are for a caller with these ends, or for nobody. Counts what it makes."""
    header, sent = Header(host.proxy_protocol, ends), host.cluster.stats.upstream_cx_tx_bytes_total

    def counted(sock: socket.socket) -> bytes:
        made = header(sock)
        sent.n += len(made)
        return made

    return counted


class Header:
    """The header of a connection; called with its socket, once that is connected."""

    __slots__ = ("_ends", "_version")

    def __init__(self, version: int, ends: Ends | None) -> None:
        self._version = version
        self._ends = ends

    def __call__(self, sock: socket.socket) -> bytes:
        ends = self._ends
        if ends is None:
            if self._version == 2 or not sock.family.name.startswith("AF_INET"):
                return write_local() if self._version == 2 else b"PROXY UNKNOWN\r\n"
            ends = Address.from_sockaddr(sock.family, sock.getsockname()), Address.from_sockaddr(sock.family, sock.getpeername())
        (source, destination), write = ends, write_v2 if self._version == 2 else write_v1
        return write((source.ip, source.port), (destination.ip, destination.port))


def ends_of(stream: Any, *, said: bool = False) -> Ends | None:
    """Of the connection of a downstream stream, whatever its requests say of where they come from; None where it has no addresses that the protocol knows.

    `said`: only if somebody before us said it by the same protocol."""
    connection = stream.connection
    if connection is None or connection.local.kind != "ip" or connection.remote.kind != "ip":
        return None
    return None if said and connection.remote == connection.direct_remote else (connection.remote, connection.local)
