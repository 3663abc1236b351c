"""Main's listeners, as they come and go at run time: what is bound, what workers are told, what still drains.

A new version of a listener warms while the old one serves (its routes and secrets must be there first), then takes its place in every worker. Sockets stay
open as long as the addresses are the same: no connection that waits to be accepted is lost. See docs/decisions/0010-updates.md.
"""

from __future__ import annotations

import asyncio
import marshal
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from meshproxy.api import registry
from meshproxy.api.errors import ConfigError, fail
from meshproxy.channel import Kind
from meshproxy.net import sockets
from meshproxy.net.address import Address
from meshproxy.net.listener_stats import stat_prefix
from meshproxy.observe.stats import sanitise
from meshproxy.record import Record
from meshproxy.server import Listener

if TYPE_CHECKING:
    import socket

    from meshproxy.observe.stats import Store
    from meshproxy.workers import Pool

_INBOUND = 1  # envoy.config.core.v3.TrafficDirection
_FILTERS = "envoy.extensions.filters.network."
# Network filters with statistics of their own, by the stat_prefix that they are given.
_FILTER_SCOPES = {
    f"{_FILTERS}http_connection_manager.v3.HttpConnectionManager": "http.{}.",
    f"{_FILTERS}tcp_proxy.v3.TcpProxy": "tcp.{}.",
    f"{_FILTERS}connection_limit.v3.ConnectionLimit": "connection_limit.{}.",
    f"{_FILTERS}local_ratelimit.v3.LocalRateLimit": "local_rate_limit.{}.",
}
_CHAINS = ("filter_chains", "default_filter_chain", "filter_chain_matcher")
# What the listening sockets of two versions must have in common to be the same sockets.
_SOCKET_FIELDS = (
    "address", "additional_addresses", "socket_options", "bind_to_port", "deprecated_v1", "enable_reuse_port", "transparent", "freebind",
    "tcp_fast_open_queue_length", "tcp_backlog_size", "connection_balance_config",
)  # fmt: skip


class Warming(Record, eq=False):
    """A version that is not in use yet. `bound`: its sockets, none if it takes those of the old one. `release` lets go of what it needs besides."""

    name: str
    proto: Any
    serialised: bytes
    version: str
    updated: float
    bound: list[list[socket.socket]]
    release: Callable[[], None]


class Draining(Record, eq=False):
    """What was replaced or removed, while its connections have time to end."""

    listener: Listener
    chains: int  # of it that drain; 0: all of it does
    timer: Any = None


class Listeners:
    """`active` is the list that workers inherit, and that admin shows.

    `acquire(proto, ready)` is asked what a version must wait for: it calls `ready()` when there is nothing (more), perhaps at once, and returns what lets go of
    what was acquired.
    """

    def __init__(self, active: list[Listener], pool: Pool, loop: asyncio.AbstractEventLoop, stats: Store, wall: Callable[[], float], drain_time: float) -> None:
        self.active = active
        self.warming: dict[str, Warming] = {}
        self.draining: list[Draining] = []
        self.acquire: Callable[[Any, Callable[[], None]], Callable[[], None]] = _acquire_nothing
        self._releases: dict[int, Callable[[], None]] = {}
        self._pool = pool
        self._loop = loop
        self._stats = stats
        self._wall = wall
        self._drain_time = drain_time
        self._last_key = 0
        self.generation = 0  # another one with every change
        self._settled = asyncio.Event()

    def add_static(self, proto: Any) -> None:
        """A listener of the bootstrap. Raises ConfigError when it cannot be bound."""
        self.active.append(self._make(proto, proto.SerializeToString(deterministic=True), self._bind(proto), ""))

    def _make(self, proto: Any, serialised: bytes, bound: list[list[socket.socket]], version: str, *, via_api: bool = False) -> Listener:
        addresses = [Address.from_sockaddr(sock.family, sock.getsockname()) for sock in bound[0]] or sockets.addresses(proto)
        self._last_key += 1
        return Listener(
            proto.name or addresses[0].text, addresses, proto.traffic_direction == _INBOUND, bound,
            serialised=serialised, key=self._last_key, via_api=via_api, version=version, updated=self._wall(),
        )  # fmt: skip

    def _bind(self, proto: Any) -> list[list[socket.socket]]:
        return sockets.bind(proto, self._pool.size)

    def find(self, name: str) -> Listener | None:
        """The active listener of that name."""
        return next((one for one in self.active if one.name == name), None)

    def dynamic_names(self) -> set[str]:
        """The listeners that came by an API, in use or warming."""
        return {one.name for one in self.active if one.via_api} | set(self.warming)

    async def wait_warm(self) -> None:
        """Wait until no listener is warming."""
        while self.warming:
            self._settled.clear()
            await self._settled.wait()

    # -- changes

    def update(self, proto: Any, version: str, validate: Callable[[Any], None]) -> bool:
        """Add a listener, or replace the one of its name; False when there is nothing to do. Raises ConfigError, and changes nothing."""
        name, serialised = proto.name, proto.SerializeToString(deterministic=True)
        old = self.find(name)
        if old is not None and not old.via_api:
            return False  # static: nobody may change it
        warming = self.warming.get(name)
        known = warming or old
        if known is not None and known.serialised == serialised:
            return False
        validate(proto)
        self._check_addresses(proto, old)
        try:
            bound = [] if old is not None and _same_sockets(_parse(old, proto), proto) else self._bind(proto)
        except ConfigError:
            self._counter("listener_create_failure").n += 1
            raise
        counter = self._counter("listener_modified" if known is not None else "listener_added")
        counter.n += 1
        if old is not None and warming is None and only_chains_differ(_parse(old, proto), proto):
            self._counter("listener_in_place_updated").n += 1
        self._forget_warming(name)
        entry = self.warming[name] = Warming(name, proto, serialised, version, self._wall(), bound, _nothing)
        self._count()
        release = self.acquire(proto, lambda: self._warmed(entry))
        if self.warming.get(name) is entry:
            entry.release = release
        else:
            active = self.find(name)
            assert active is not None
            self._releases[active.key] = release
        return True

    def _warmed(self, entry: Warming) -> None:
        """A version has all that it needs: it takes the place of the old one."""
        name = entry.name
        if self.warming.get(name) is not entry:
            return
        del self.warming[name]
        old = self.find(name)
        own = bool(entry.bound)
        listener = self._make(entry.proto, entry.serialised, entry.bound or (old.sockets if old is not None else [[]]), entry.version, via_api=True)
        listener.updated = entry.updated
        if entry.release is not _nothing:
            self._releases[listener.key] = entry.release
        chains = old is not None and only_chains_differ(_parse(old, entry.proto), entry.proto)
        body = marshal.dumps((listener.key, entry.serialised, old.key if old is not None else 0, chains))
        for index, worker in enumerate(self._pool.workers):
            if worker.channel is not None:
                worker.channel.send(Kind.LISTENER, body, [sock.fileno() for sock in listener.sockets[index]])
        self._counter("listener_create_success").n += self._pool.size
        if old is None:
            self.active.append(listener)
        else:
            self.active[self.active.index(old)] = listener
            if own:
                old.stop()
            self._drain(old, len(_gone_chains(_parse(old, entry.proto), entry.proto)) if chains else 0, keep=chains)
        self._count()

    def remove(self, name: str) -> bool:
        """Remove a listener that came by an API; False when there is none."""
        warming = self._forget_warming(name)
        old = self.find(name)
        if old is None or not old.via_api:
            if warming:
                self._counter("listener_removed").n += 1
            return warming
        self.active.remove(old)
        old.stop()
        self._counter("listener_removed").n += 1
        self._pool.broadcast(Kind.LISTENER_REMOVED, marshal.dumps(old.key))
        self._drain(old, 0)
        return True

    def _forget_warming(self, name: str) -> bool:
        warming = self.warming.pop(name, None)
        if warming is None:
            return False
        warming.release()
        _close(warming.bound)
        self._count()
        return True

    def _drain(self, old: Listener, chains: int, *, keep: bool = False) -> None:
        self._releases.pop(old.key, _nothing)()
        draining = Draining(old, chains)
        if not keep or chains:
            self.draining.append(draining)
        draining.timer = self._loop.call_later(self._drain_time, self._drained, draining)
        self._count()

    def _drained(self, draining: Draining) -> None:
        if draining in self.draining:
            self.draining.remove(draining)
        old = draining.listener
        kept = [one.serialised for one in (*self.active, *(one.listener for one in self.draining))] + [one.serialised for one in self.warming.values()]
        gone = sorted(_scopes(old.serialised).difference(*map(_scopes, kept)))
        self._pool.broadcast(Kind.LISTENER_DRAINED, marshal.dumps((old.key, gone, len(old.serialised))))
        if gone:
            self._stats.remove(*gone)
        self._count()

    def _check_addresses(self, proto: Any, old: Listener | None) -> None:
        """No two listeners have an address in common, as Envoy has it."""
        if not sockets.binds(proto):
            return
        wanted = {address for address in sockets.addresses(proto) if address.kind == "pipe" or address.port}
        for other in self.active:
            if other is not old and other.name != proto.name and wanted.intersection(other.addresses) and any(other.sockets):
                fail(
                    "address",
                    f"error adding listener: '{proto.name}' has duplicate address '{next(iter(wanted)).text}' as existing listener",
                )

    # -- figures

    def _counter(self, name: str) -> Any:
        return self._stats.counter(f"listener_manager.{name}")

    def _count(self) -> None:
        self.generation += 1
        if not self.warming:
            self._settled.set()
        gauge = self._stats.gauge
        gauge("listener_manager.total_listeners_warming").n = len(self.warming)
        gauge("listener_manager.total_listeners_draining").n = sum(1 for one in self.draining if not one.chains)
        gauge("listener_manager.total_filter_chains_draining").n = sum(one.chains for one in self.draining)


def only_chains_differ(old: Any, new: Any) -> bool:
    """Whether two Listener messages have everything but their filter chains in common."""
    copies = []
    for proto in (old, new):
        copy = type(proto)()
        copy.CopyFrom(proto)
        for field in _CHAINS:
            copy.ClearField(field)
        copies.append(copy)
    return bool(copies[0] == copies[1])


def _gone_chains(old: Any, new: Any) -> list[bytes]:
    """The filter chains of the old version that the new one does not have."""
    kept = {chain.SerializeToString(deterministic=True) for chain in _chains(new)}
    return [found for found in (chain.SerializeToString(deterministic=True) for chain in _chains(old)) if found not in kept]


def _chains(proto: Any) -> list[Any]:
    return [*proto.filter_chains, *([proto.default_filter_chain] if proto.HasField("default_filter_chain") else [])]


def _same_sockets(old: Any, new: Any) -> bool:
    copies = []
    for proto in (old, new):
        copy = type(proto)()
        copy.CopyFrom(proto)
        for field in proto.DESCRIPTOR.fields:
            if field.name not in _SOCKET_FIELDS:
                copy.ClearField(field.name)
        copies.append(copy)
    return bool(copies[0] == copies[1])


def _parse(listener: Listener, like: Any) -> Any:
    return type(like).FromString(listener.serialised)


@lru_cache(256)
def _scopes(serialised: bytes) -> frozenset[str]:
    """The prefixes of the statistics that a Listener and its filters have, as far as they tell of nothing else."""
    from meshproxy.api import messages

    proto = messages.known("envoy.config.listener.v3.Listener").FromString(serialised)
    found = {stat_prefix(proto)}
    for chain in _chains(proto):
        for entry in chain.filters:
            config = registry.unpack(entry.typed_config)
            scope = _FILTER_SCOPES.get(config.DESCRIPTOR.full_name)
            if scope is not None:
                found.add(scope.format(config.stat_prefix))
    return frozenset(map(sanitise, found))


def _close(bound: list[list[socket.socket]]) -> None:
    for sock in {sock for own in bound for sock in own}:
        sock.close()


def _nothing() -> None: ...


def _acquire_nothing(proto: Any, ready: Callable[[], None]) -> Callable[[], None]:
    ready()
    return _nothing
