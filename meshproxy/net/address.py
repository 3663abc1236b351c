"""Where a connection comes from or goes to: an IP address with a port, or a Unix socket.

Addresses are values: equal when they name the same place. Their text forms are made when first asked for, because most connections never need them all.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail

if TYPE_CHECKING:
    from envoy.config.core.v3 import address_pb2

IP = "ip"
PIPE = "pipe"
_V4_MAPPED = "::ffff:"


class Address:
    """One end of a connection. `kind` is 'ip' (`ip`, `port`) or 'pipe' (`path`; an abstract socket's path starts with '@'; '' is an unnamed peer).

    `ip` is in its canonical form; a link-local IPv6 address may carry its zone (`fe80::1%eth0`).
    """

    __slots__ = ("_bytes", "_text", "ip", "kind", "path", "port")

    def __init__(self, ip: str = "", port: int = 0, path: str = "", kind: str = IP) -> None:
        self.kind = kind
        self.ip = ip
        self.port = port
        self.path = path
        self._text: str | None = None
        self._bytes: bytes | None = None

    @classmethod
    def pipe(cls, path: str) -> Address:
        """The address of a Unix socket."""
        return cls(path=path, kind=PIPE)

    @classmethod
    def parse(cls, text: str) -> Address:
        """`1.2.3.4:80`, `[::1]:80`, or a path (`/run/x.sock`, `@abstract`). ValueError for anything else."""
        if text[:1] in ("/", "@"):
            return cls.pipe(text)
        host, colon, port = text.rpartition(":")
        if host[:1] == "[" and host[-1:] == "]":
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"malformed address: {text}")
        if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"malformed address: {text}")
        return cls(canonical_ip(host), int(port))

    @classmethod
    def from_proto(cls, proto: address_pb2.Address) -> Address:
        """From `envoy.config.core.v3.Address`: a pipe, or a socket address that is an IP address. ConfigError otherwise, host names included."""
        which = proto.WhichOneof("address")
        if which == "pipe":
            return cls.pipe(proto.pipe.path)
        if which != "socket_address":
            fail(which or "", "an internal address is not supported here" if which else "an address is required")
        inner = proto.socket_address
        if inner.WhichOneof("port_specifier") == "named_port":
            fail("socket_address.named_port", "a named port needs a resolver: give port_value")
        try:
            return cls(canonical_ip(inner.address), inner.port_value)
        except ValueError:
            fail(
                "socket_address.address",
                f"malformed IP address: {inner.address}. Consider setting resolver_name or setting cluster type to 'STRICT_DNS' or 'LOGICAL_DNS'",
            )

    @classmethod
    def from_sockaddr(cls, family: int, sockaddr: Any) -> Address:
        """From what the socket module calls an address. A v4-mapped IPv6 address (a dual-stack listener's peer) becomes the IPv4 address that it is."""
        if family == socket.AF_INET:
            return cls(sockaddr[0], sockaddr[1])
        if family == socket.AF_INET6:
            host: str = sockaddr[0]
            return cls(host[7:] if host.startswith(_V4_MAPPED) and "." in host else host, sockaddr[1])
        if isinstance(sockaddr, bytes):
            return cls.pipe("@" + sockaddr[1:].decode("utf-8", "surrogateescape") if sockaddr[:1] == b"\0" else sockaddr.decode("utf-8", "surrogateescape"))
        return cls.pipe(sockaddr or "")

    @property
    def text(self) -> str:
        """`1.2.3.4:80`, `[::1]:80` or the path."""
        text = self._text
        if text is None:
            if self.kind == PIPE:
                text = self.path
            else:
                text = f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"
            self._text = text
        return text

    @property
    def ip_bytes(self) -> bytes:
        """The IP address as 4 or 16 bytes in network order; empty for a pipe."""
        packed = self._bytes
        if packed is None:
            packed = self._bytes = pack_ip(self.ip) if self.kind == IP else b""
        return packed

    @property
    def is_v6(self) -> bool:
        """Whether this is an IPv6 address."""
        return ":" in self.ip

    @property
    def family(self) -> int:
        """The socket family: AF_INET, AF_INET6 or AF_UNIX."""
        if self.kind == PIPE:
            return socket.AF_UNIX
        return socket.AF_INET6 if ":" in self.ip else socket.AF_INET

    @property
    def sockaddr(self) -> Any:
        """What `socket.bind` and `socket.connect` take."""
        if self.kind == PIPE:
            return "\0" + self.path[1:] if self.path[:1] == "@" else self.path
        if "%" in self.ip:
            host, _, zone = self.ip.partition("%")
            return host, self.port, 0, int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
        return self.ip, self.port

    def with_port(self, port: int) -> Address:
        """The same IP address with another port."""
        return Address(self.ip, port)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self.ip == other.ip and self.port == other.port and self.path == other.path and self.kind == other.kind

    def __hash__(self) -> int:
        return hash((self.ip, self.port, self.path))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Address({self.text!r})"


def canonical_ip(text: str) -> str:
    """The canonical form of an IP address. ValueError when `text` is not one."""
    host, percent, zone = text.partition("%")
    try:
        if ":" not in host:
            socket.inet_pton(socket.AF_INET, host)
            return host  # no other form of an IPv4 address is taken
        canonical = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host))
    except (OSError, ValueError) as error:  # ValueError: an embedded NUL or a lone surrogate
        raise ValueError(f"malformed IP address: {text}") from error
    return f"{canonical}%{zone}" if percent else canonical


def pack_ip(text: str) -> bytes:
    """4 or 16 bytes in network order. ValueError when `text` is not an IP address."""
    host = text.partition("%")[0]
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError as error:
        raise ValueError(f"malformed IP address: {text}") from error
