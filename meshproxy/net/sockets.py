"""Socket options, and binding: what is done to a socket before it listens or connects.

Main binds the listening sockets (it may have the rights for low ports, and an error must be known before a configuration is accepted); workers inherit
them. Options are those of Envoy's `core.v3.SocketOption`, `TcpKeepalive` and `BindConfig`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, Any

from meshproxy.api import messages
from meshproxy.api.errors import UNSUPPORTED, ConfigError, fail, under
from meshproxy.net.address import Address
from meshproxy.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

HONOURS = {
    "envoy.config.core.v3.Address": "socket_address pipe",
    "envoy.config.core.v3.SocketAddress": "protocol address port_value ipv4_compat resolver_name",
    "envoy.config.core.v3.Pipe": "path mode",
    "envoy.config.core.v3.SocketOption": "description level name int_value buf_value state type",
    "envoy.config.core.v3.SocketOption.SocketType": "stream",
    "envoy.config.core.v3.SocketOption.SocketType.Stream": "",
    "envoy.config.core.v3.SocketOptionsOverride": "socket_options",
    "envoy.config.core.v3.TcpKeepalive": "keepalive_probes keepalive_time keepalive_interval",
    "envoy.config.core.v3.BindConfig": "source_address freebind socket_options extra_source_addresses additional_source_addresses",
    "envoy.config.core.v3.ExtraSourceAddress": "address socket_options",
}

# socket module constants that Python 3.11 does not have, from the Linux headers
IP_FREEBIND = 15
IP_TRANSPARENT = getattr(socket, "IP_TRANSPARENT", 19)
IPV6_FREEBIND = 78
IPV6_TRANSPARENT = 75
DEFAULT_BACKLOG = socket.SOMAXCONN

_PREBIND, _BOUND, _LISTENING = 0, 1, 2  # core.v3.SocketOption.SocketState


class Option(Record, frozen=True):
    """One socket option. `state`: 0 set before bind, 1 after bind, 2 after listen."""

    level: int
    name: int
    value: int | bytes
    state: int = _PREBIND

    def apply(self, sock: socket.socket) -> None:
        """Set it. OSError when the kernel does not want it."""
        sock.setsockopt(self.level, self.name, self.value)


def compile_options(protos: Iterable[Any], path: str = "socket_options") -> tuple[Option, ...]:
    """From a list of `core.v3.SocketOption`; those for datagram sockets only are left out. ConfigError for an option without a value."""
    options = []
    for at, proto in enumerate(protos):
        if proto.type.HasField("datagram") and not proto.type.HasField("stream"):
            continue
        which = proto.WhichOneof("value")
        if which is None:
            fail(f"{path}[{at}]", "int_value or buf_value is required")
        value = proto.int_value if which == "int_value" else proto.buf_value
        if isinstance(value, int) and not -(1 << 31) <= value < 1 << 32:
            fail(f"{path}[{at}].int_value", "does not fit into 32 bits")
        if isinstance(value, int) and value >= 1 << 31:
            value -= 1 << 32
        options.append(Option(proto.level, proto.name, value, proto.state))
    return tuple(options)


def compile_keepalive(proto: Any) -> tuple[Option, ...]:
    """From `core.v3.TcpKeepalive`: keepalive is on as soon as the message is there; all three fields at 0 turn it off. Times are seconds."""
    fields = (
        (socket.TCP_KEEPCNT, "keepalive_probes"),
        (socket.TCP_KEEPIDLE, "keepalive_time"),
        (socket.TCP_KEEPINTVL, "keepalive_interval"),
    )
    given = [(name, getattr(proto, field).value) for name, field in fields if proto.HasField(field)]
    if len(given) == len(fields) and not any(value for _, value in given):
        return ()
    on = Option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return (on, *(Option(socket.IPPROTO_TCP, name, value) for name, value in given if value))


class DialOptions:
    """How upstream connections of one cluster are made: source address, keepalive, socket options. Made once per cluster; `apply` runs for each dial."""

    __slots__ = ("_by_family", "_options", "_source", "freebind")

    def __init__(self, source: Address | None, options: tuple[Option, ...], freebind: bool, extra: tuple[tuple[Address, tuple[Option, ...]], ...] = ()) -> None:
        self._source = source
        self._options = options
        self.freebind = freebind
        # The first source address of the family that is dialled is taken (BindConfig.extra_source_addresses).
        self._by_family: dict[int, tuple[Address, tuple[Option, ...]]] = {}
        if source is not None:
            self._by_family[source.family] = source, options
        for address, own in extra:
            self._by_family.setdefault(address.family, (address, own))

    def source(self, family: int) -> Address | None:
        """The local address used towards addresses of `family`; None: the kernel chooses."""
        found = self._by_family.get(family)
        return found[0] if found else None

    def apply(self, sock: socket.socket, address: Address) -> None:
        """Set the options and bind the source address. Raises OSError."""
        if address.kind != "ip":
            for option in self._options:
                if option.level == socket.SOL_SOCKET and option.name != socket.SO_KEEPALIVE:
                    option.apply(sock)
            return
        family = address.family
        found = self._by_family.get(family) or (self._by_family.get(self._source.family) if self._source is not None else None)
        source, options = found if found is not None else (None, self._options)
        for option in options:
            if option.state == _PREBIND:
                option.apply(sock)
        if source is not None:
            if self.freebind:
                _freebind(sock, family)
            # The kernel may choose the port at connect, by the whole 4-tuple, instead of using up one of 28,000 ports at bind.
            sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
            sock.bind(source.sockaddr)
        for option in options:
            if option.state != _PREBIND:
                option.apply(sock)


def compile_dial_options(bind_config: Any | None, keepalive: Any | None, defaults: Any | None = None) -> DialOptions | None:
    """From a cluster's `upstream_bind_config` and `upstream_connection_options.tcp_keepalive`; `defaults` is the bootstrap's bind config.

    The arguments are messages or None for unset. None when there is nothing to set. Paths of errors are relative to the bind config.
    """
    common = compile_keepalive(keepalive) if keepalive is not None else ()
    proto = bind_config if bind_config is not None else defaults
    if proto is None:
        return DialOptions(None, common, False) if common else None
    with under("source_address"):
        source = _source(proto.source_address) if proto.HasField("source_address") else None
    own = compile_options(proto.socket_options)
    if not own and defaults is not None and proto is not defaults:
        own = compile_options(defaults.socket_options)
    extra = []
    for at, entry in enumerate(proto.extra_source_addresses):
        with under(f"extra_source_addresses[{at}]"):
            options = compile_options(entry.socket_options.socket_options, "socket_options.socket_options") if entry.HasField("socket_options") else own
            with under("address"):
                extra.append((_source(entry.address), common + options))
    for at, address in enumerate(proto.additional_source_addresses):
        with under(f"additional_source_addresses[{at}]"):
            extra.append((_source(address), common + own))
    if extra and source is None:
        fail("source_address", "extra source addresses need a source address")
    families = [address.family for address, _ in extra]
    if len(extra) > 1 or (source is not None and source.family in families):
        fail("extra_source_addresses", "one source address of each IP version is possible")
    return DialOptions(source, common + own, proto.freebind.value, tuple(extra))


def _source(proto: Any) -> Address:
    try:
        return Address(Address.from_proto(_as_address(proto)).ip, proto.port_value)
    except ConfigError as error:
        raise ConfigError([p if not p.path.startswith("socket_address.") else type(p)(p.path[15:], p.why, p.kind) for p in error.problems]) from error


def _as_address(socket_address: Any) -> Any:
    return messages.known("envoy.config.core.v3.Address")(socket_address=socket_address)


class _Place(Record, frozen=True):
    """One address of a listener, with what binding it needs."""

    address: Address
    proto: Any
    options: tuple[Option, ...]
    path: str


def bind(listener: Any, count: int) -> list[list[socket.socket]]:
    """Bind and listen on every address of a `Listener`, for `count` workers: one list of sockets per worker, in the order of the addresses.

    With `enable_reuse_port` (the default) each worker gets its own socket, among which the kernel spreads connections; without it, with `exact_balance`
    (see net.connection_balance), and for Unix sockets, all workers share one. `bind_to_port: false` gives empty lists. ConfigError with Envoy's wording when
    an address cannot be bound; nothing stays bound then. Port 0: the port that the kernel chose for the first socket is used for the others.
    """
    if not binds(listener):
        return [[] for _ in range(count)]
    reuse_port = not listener.HasField("enable_reuse_port") or listener.enable_reuse_port.value
    shared = not reuse_port or listener.connection_balance_config.HasField("exact_balance")
    workers: list[list[socket.socket]] = [[] for _ in range(count)]
    try:
        for place in _places(listener):
            own = count if not shared and place.address.kind == "ip" else 1
            bound: list[socket.socket] = []
            address = place.address
            for _ in range(own):
                with under(place.path):
                    sock = _bind_one(listener, place, address, reuse_port)
                bound.append(sock)
                workers[len(bound) - 1].append(sock)
                if address.kind == "ip" and address.port == 0:
                    address = address.with_port(sock.getsockname()[1])
            for worker in workers[own:]:
                worker.append(bound[0])
    except BaseException:
        for sock in {sock for worker in workers for sock in worker}:
            sock.close()
        raise
    return workers


def binds(listener: Any) -> bool:
    """Whether a `Listener` listens itself; else it has only connections that another listener hands to it."""
    return all(place.bind_to_port.value or not place.HasField("bind_to_port") for place in (listener, listener.deprecated_v1))


def addresses(listener: Any) -> list[Address]:
    """The addresses of a `Listener` as configured, its own first. Raises ConfigError."""
    return [place.address for place in _places(listener)]


def _places(listener: Any) -> list[_Place]:
    own = compile_options(listener.socket_options)
    entries = [("address", listener.address, own)]
    for at, extra in enumerate(listener.additional_addresses):
        options = compile_options(extra.socket_options.socket_options) if extra.HasField("socket_options") else own
        entries.append((f"additional_addresses[{at}].address", extra.address, options))
    places = []
    for path, proto, options in entries:
        with under(path):
            if proto.WhichOneof("address") == "socket_address" and proto.socket_address.protocol:
                fail("socket_address.protocol", "UDP listeners are not supported", UNSUPPORTED)
            places.append(_Place(Address.from_proto(proto), proto, options, path))
    if len({place.address for place in places if place.address.port or place.address.kind == "pipe"}) < sum(
        1 for place in places if place.address.port or place.address.kind == "pipe"
    ):
        fail("additional_addresses", "an address is there twice")
    return places


def _bind_one(listener: Any, place: _Place, address: Address, reuse_port: bool) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if address.kind == "ip":
            _prepare_ip(sock, listener, place, address, reuse_port)
        elif address.path[:1] != "@":
            _remove_stale(address.path)
        _apply(place.options, sock, _PREBIND)
        try:
            sock.bind(address.sockaddr)
        except OSError as error:
            fail("", f"cannot bind '{address.text}': {os.strerror(error.errno) if error.errno else error}")
        if address.kind == "pipe" and place.proto.pipe.mode and address.path[:1] != "@":
            os.chmod(address.path, place.proto.pipe.mode)
        _apply(place.options, sock, _BOUND)
        backlog = listener.tcp_backlog_size.value if listener.HasField("tcp_backlog_size") else DEFAULT_BACKLOG
        try:
            sock.listen(min(backlog, (1 << 31) - 1))
        except OSError as error:
            fail("", f"cannot listen on '{address.text}': {error.strerror}")
        _apply(place.options, sock, _LISTENING)
        if listener.HasField("tcp_fast_open_queue_length") and address.kind == "ip":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, listener.tcp_fast_open_queue_length.value)
    except BaseException:
        sock.close()
        raise
    return sock


def _prepare_ip(sock: socket.socket, listener: Any, place: _Place, address: Address, reuse_port: bool) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if address.is_v6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not place.proto.socket_address.ipv4_compat)
    try:
        if listener.transparent.value:
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            if address.is_v6:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        if listener.freebind.value:
            _freebind(sock, address.family)
    except OSError as error:
        fail("", f"Setting socket options failed on listening socket: {error.strerror}" + (": it needs CAP_NET_ADMIN" if error.errno == errno.EPERM else ""))


def _freebind(sock: socket.socket, family: int) -> None:
    sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)


def _apply(options: tuple[Option, ...], sock: socket.socket, state: int) -> None:
    for option in options:
        if option.state == state:
            try:
                option.apply(sock)
            except OSError as error:
                fail("", f"Setting socket options failed: level {option.level} name {option.name}: {error.strerror}")


def _remove_stale(path: str) -> None:
    """A Unix socket left behind by an earlier process keeps its path; nobody listens on it any more once we start, so it goes, as Envoy does."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
