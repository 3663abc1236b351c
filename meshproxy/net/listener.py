"""A listener in a worker: accepts connections, inspects them, finds their filter chain, hands them over.

There are two ways to accept, chosen when the listener is compiled (docs/decisions/0003-accepting-connections.md). If no listener filter must look at bytes
first, no terminal filter wants the bare socket and workers do not balance, uvloop accepts and reads by itself and Python hears of a connection once.
Otherwise the listening sockets are watched here and every connection starts as a bare socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import select
import socket
from typing import TYPE_CHECKING, Any

from meshproxy.api import messages
from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import UNSUPPORTED, Collector
from meshproxy.api.metadata import metadata_dict
from meshproxy.net import sockets as net_sockets
from meshproxy.net.address import Address
from meshproxy.net.connection import DEFAULT_BUFFER_LIMIT, ConnectionInfo, next_id
from meshproxy.net.drain import Drain
from meshproxy.net.filter_chain import FilterChain, NetworkContext
from meshproxy.net.filter_chain_match import FilterChainMatcher
from meshproxy.net.gates import ClosingWatch, Counted, FirstDataGate, Waiting, allow
from meshproxy.net.handshake import Handshake
from meshproxy.net.inspect import Chain as InspectionChain
from meshproxy.net.inspect import Inspection
from meshproxy.net.listener_stats import ListenerStats, stat_prefix
from meshproxy.net.sockets import bind
from meshproxy.net.tasks import spawn
from meshproxy.observe import events, flags
from meshproxy.observe.stream_info import StreamInfo

if TYPE_CHECKING:
    from collections.abc import Container

    from meshproxy.context import Context
    from meshproxy.net.connection_balance import ConnectionBalance

__all__ = ["HONOURS", "Drain", "Listener", "ListenerRegistry", "bind"]

HONOURS = {
    "envoy.config.listener.v3.Listener": (
        "name address additional_addresses stat_prefix filter_chains use_original_dst default_filter_chain per_connection_buffer_limit_bytes metadata"
        " deprecated_v1 drain_type listener_filters listener_filters_timeout continue_on_listener_filters_timeout transparent freebind socket_options"
        " tcp_fast_open_queue_length traffic_direction enable_reuse_port access_log tcp_backlog_size"
        " max_connections_to_accept_per_socket_event bind_to_port ignore_global_conn_limit bypass_overload_manager connection_balance_config"
    ),
    "envoy.config.listener.v3.Listener.ConnectionBalanceConfig": "exact_balance",
    "envoy.config.listener.v3.Listener.ConnectionBalanceConfig.ExactBalance": "",
    "envoy.config.listener.v3.Listener.DeprecatedV1": "bind_to_port",
    "envoy.config.listener.v3.AdditionalAddress": "address socket_options",
}

log = logging.getLogger(__name__)

_ACCEPT_BATCH = 64  # connections accepted in a row before other sockets have their turn
_ACCEPT_PAUSE = 0.1  # seconds without accepting after the process ran out of descriptors


class ListenerRegistry:
    """The listeners of a worker by address, for `use_original_dst`: a redirected connection goes to the listener it was meant for."""

    def __init__(self) -> None:
        self._by_address: dict[Address, Listener] = {}

    def add(self, listener: Listener) -> None:
        """Known from now on under all its addresses."""
        for address in listener.addresses:
            self._by_address[address] = listener

    def remove(self, listener: Listener) -> None:
        """No longer known."""
        self._by_address = {address: known for address, known in self._by_address.items() if known is not listener}

    def find(self, address: Address) -> Listener | None:
        """The listener of that address, or of all addresses with that port."""
        found = self._by_address.get(address)
        if found is None and address.kind == "ip":
            found = self._by_address.get(Address("::" if address.is_v6 else "0.0.0.0", address.port))
        return found


class Listener:
    """One listener of a worker. Owns its listening sockets and knows its open connections.

    `addresses`: where it listens; ports as bound. `active`: connections it has now. `start` begins to accept, `stop_accepting` closes the listening
    sockets, `drain` tells connections to end, `close` drops them.
    """

    def __init__(
        self, proto: Any, sockets: list[socket.socket], context: Context, registry: ListenerRegistry | None = None, predecessor: Listener | None = None
    ) -> None:
        """Compile everything. `sockets`: from `bind`, one per address; empty for bind_to_port false. Raises ConfigError with paths relative to `proto`.

        `predecessor`: a listener that differs only in its filter chains; those that are the same are taken over as they are.
        """
        self.proto = proto
        self.context = context
        self.name: str = proto.name
        self.sockets = sockets
        self._registry = registry
        configured = net_sockets.addresses(proto)
        self.addresses = [Address.from_sockaddr(sock.family, sock.getsockname()) for sock in sockets] or configured
        scope = context.stats.scope(stat_prefix(proto))
        self.stats = ListenerStats(scope, f"worker_{context.worker_id}.")
        self.buffer_limit = _buffer_limit(proto)
        self.inbound: bool = proto.traffic_direction == 1
        self.modify_only: bool = proto.drain_type == 1
        self._timeout = seconds_of(proto, "listener_filters_timeout", 15.0)
        self._go_on_after_timeout: bool = proto.continue_on_listener_filters_timeout
        self._hands_off: bool = proto.use_original_dst.value
        self._batch: int = proto.max_connections_to_accept_per_socket_event.value or _ACCEPT_BATCH
        self._limit_key = f"envoy.resource_limits.listener.{proto.name}.connection_limit"
        self._limit = self._connection_limit()
        network = NetworkContext(context, context.stats.scope(""), proto, scope.prefix)
        errors = Collector()
        self._inspection = self._compile_inspection(errors)
        self._compile_balance(errors)
        self._compile_chains(network, scope, errors, predecessor.chains_by_proto() if predecessor is not None else {})
        self._logs = self._compile_logs(errors)
        errors.raise_any()
        self._loop: asyncio.AbstractEventLoop = context.loop
        # -> what ends it: its transport, the terminal filter's session, or the bare socket during a handshake
        self._connections: dict[ConnectionInfo, Any] = {}
        self._inspections: dict[ConnectionInfo, Inspection] = {}  # those that wait for bytes
        self._timeouts = context.timers.queue(self._timeout, _inspection_timed_out) if self._timeout else None
        self._servers: list[asyncio.Server] = []
        self._stopped = False
        self._paused: asyncio.TimerHandle | None = None

    # -- compiling

    def _compile_inspection(self, errors: Collector) -> InspectionChain:
        root = self.context.stats.scope("")
        chain = InspectionChain((), root)
        with errors.under("listener_filters"):
            chain = InspectionChain(self.proto.listener_filters, root)
        chains = self.proto.filter_chains
        if any(entry.use_proxy_proto.value for entry in chains) and "ProxyProtocol" not in chain.type_names:
            from meshproxy.net.inspect import compile as compile_filter

            chain.add(compile_filter(messages.known("envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol")(), root), first=True)
        if self._hands_off and "OriginalDst" not in chain.type_names:  # as Envoy does
            from meshproxy.net.inspect import compile as compile_filter

            chain.add(compile_filter(messages.known("envoy.extensions.filters.listener.original_dst.v3.OriginalDst")(), root))
        if "TlsInspector" not in chain.type_names and any(_needs_tls_inspector(entry.filter_chain_match) for entry in chains):
            log.warning("listener %s: filter chains are matched by what only the TLS inspector finds out, and it is not among the listener filters", self.name)
        return chain

    def _compile_balance(self, errors: Collector) -> None:
        self._balance: ConnectionBalance | None = None
        if not self.proto.connection_balance_config.HasField("exact_balance"):
            return
        if not net_sockets.binds(self.proto):
            # Envoy moves connections that another listener accepted, too; here they stay in the worker that has them.
            errors.add("connection_balance_config", "cannot balance what other listeners accept (bind_to_port: false)", UNSUPPORTED)
        if self.context.concurrency > 1 and self.context.cells is not None:
            from meshproxy.net import connection_balance  # few listeners need it

            self._balance = connection_balance.make(self.addresses[0].text, self.context)

    def chains_by_proto(self) -> dict[bytes, FilterChain]:
        """The compiled filter chains by what they were compiled from."""
        protos = list(self.proto.filter_chains)
        if self._default is not None:
            protos.append(self.proto.default_filter_chain)
        return {proto.SerializeToString(deterministic=True): chain for proto, chain in zip(protos, self.chains, strict=True)}

    def _compile_chains(self, network: NetworkContext, scope: Any, errors: Collector, known: dict[bytes, FilterChain]) -> None:
        def compile_chain(proto: Any) -> FilterChain:
            found = known.get(proto.SerializeToString(deterministic=True)) if known else None
            return found or FilterChain(proto, network, scope)

        compiled: list[tuple[Any, FilterChain]] = []
        chains: list[FilterChain] = []
        for at, proto in enumerate(self.proto.filter_chains):
            with errors.under(f"filter_chains[{at}]"):
                chain = compile_chain(proto)
                compiled.append((proto.filter_chain_match, chain))
                chains.append(chain)
        self._default: FilterChain | None = None
        if self.proto.HasField("default_filter_chain"):
            with errors.under("default_filter_chain"):
                self._default = compile_chain(self.proto.default_filter_chain)
                chains.append(self._default)
        elif not self.proto.filter_chains:
            errors.add("filter_chains", "no filter chains specified")
        if not errors.problems:
            with errors.under("filter_chains"):
                self._matcher: FilterChainMatcher[FilterChain] = FilterChainMatcher(compiled)
        self.chains = chains
        self.direct = (
            not self._inspection.filters
            and not self._hands_off
            and self._balance is None
            and not self.proto.HasField("max_connections_to_accept_per_socket_event")
            and not any(chain.takes_socket for chain in chains)
        )

    def _compile_logs(self, errors: Collector) -> tuple[Any, ...]:
        logs = []
        for at, entry in enumerate(self.proto.access_log):
            from meshproxy.observe import access_log  # workers that log nothing do not load it

            with errors.under(f"access_log[{at}]"):
                logs.append(access_log.compile(entry, self.context))
        return tuple(logs)

    def _connection_limit(self) -> int | None:
        """This worker's share of the limit; None for no limit. It is read when the listener is compiled."""
        runtime = self.context.runtime
        limit = runtime.integer(self._limit_key, -1) if runtime is not None else -1
        if limit < 0:
            return None
        workers = max(self.context.concurrency, 1)
        return limit // workers + (self.context.worker_id < limit % workers)

    # -- life

    async def start(self) -> None:
        """Begin to accept, unless it was stopped before."""
        if self._stopped:
            return
        if self._registry is not None:
            self._registry.add(self)
        if not self.direct:
            self._count()
            self._watch()
            return
        for sock, address in zip(self.sockets, self.addresses, strict=False):  # bind_to_port false: no sockets
            protocol = _Direct(self, sock.family, self._fixed_local(sock, address))
            backlog = self.proto.tcp_backlog_size.value or net_sockets.DEFAULT_BACKLOG
            make = self._loop.create_unix_server if sock.family == socket.AF_UNIX else self._loop.create_server
            server = await make(protocol, sock=sock, backlog=backlog)
            if self._stopped:  # in the meantime
                server.close()
                return
            self._servers.append(server)

    def _watch(self) -> None:
        for sock, address in zip(self.sockets, self.addresses, strict=False):
            self._loop.add_reader(sock.fileno(), self._accept, sock, self._fixed_local(sock, address))

    def _pause(self, seconds: float) -> None:
        """Leave new connections alone for a while."""
        for sock in self.sockets:
            self._loop.remove_reader(sock.fileno())
        self._paused = self._loop.call_later(seconds, self._watch)

    def _fixed_local(self, sock: socket.socket, address: Address) -> Address | None:
        """The local address of every connection, unless the listener listens on all addresses."""
        if address.kind == "ip" and (address.ip in ("0.0.0.0", "::") or self.proto.transparent.value):
            return None
        return address

    def stop_accepting(self) -> None:
        """Close the listening sockets of this worker. Connections stay. New ones are refused once main has closed its copies too."""
        if self._stopped:
            return
        self._stopped = True
        if self._registry is not None:
            self._registry.remove(self)
        if self._paused is not None:
            self._paused.cancel()
        if self._balance is not None:
            self._balance.leave()
        for server in self._servers:
            server.close()
        self._servers.clear()
        if not self.direct:
            for sock in self.sockets:
                self._loop.remove_reader(sock.fileno())
        for sock in self.sockets:
            with contextlib.suppress(OSError):  # the server closed it
                sock.close()

    def drain(self) -> None:
        """Tell the connections to end: HTTP ones after their response, the others when they are closed."""
        for chain in self.chains:
            drain = getattr(chain.terminal, "drain_connections", None)
            if drain is not None:
                drain()

    def close(self) -> None:
        """Stop, and drop every connection."""
        self.stop_accepting()
        for inspection in self._inspections.values():
            inspection.cancel()
        self._inspections.clear()
        self.close_connections(None)

    def close_connections(self, chains: Container[FilterChain] | None) -> None:
        """Drop the connections of these filter chains, or all."""
        for conn, connection in list(self._connections.items()):
            if chains is not None and conn.filter_chain not in chains:
                continue
            if isinstance(connection, socket.socket):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            elif connection is not None:
                connection.abort()

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """The listener's metadata as plain data."""
        return metadata_dict(self.proto.metadata)

    @property
    def active(self) -> int:
        """Connections open now."""
        return len(self._connections)

    # -- accepting

    def _accept(self, listening: socket.socket, local: Address | None) -> None:
        accepted = 0
        while accepted < self._batch and self._takes_next(listening):
            try:
                sock, peer = listening.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("listener %s: cannot accept: %s; trying again in %.1f s", self.name, error.strerror, _ACCEPT_PAUSE)
                    self._pause(_ACCEPT_PAUSE)
                    break
                continue  # ECONNABORTED: it was gone before we came
            accepted += 1
            if self._balance is not None:
                self._balance.took()
            sock.setblocking(False)
            self._admit(sock, peer, local)
        if accepted:
            self.stats.accepted_per_event.record(accepted)

    def _takes_next(self, listening: socket.socket) -> bool:
        """Whether the next connection, if there is one, is for this worker; if it is not, the workers that have fewer get time to take it."""
        if self._balance is None:
            return True
        mine = self._balance.is_mine(self._held, functools.partial(_is_readable, listening))
        if mine is False:
            self._pause(self._balance.PAUSE)
        return bool(mine)

    @property
    def _held(self) -> int:
        """Connections open, or on their way to be."""
        return len(self._connections) + len(self._inspections)

    def _count(self) -> None:
        """Let the other workers know how busy this one is."""
        if self._balance is not None and not self._stopped:
            self._balance.publish(self._held)

    def _admit(self, sock: socket.socket, peer: Any, local: Address | None) -> None:
        if self._limit is not None and self._held >= self._limit:
            self.stats.downstream_cx_overflow.n += 1
            sock.close()
            return
        family = sock.family
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conn = ConnectionInfo(
            next_id(),
            Address.from_sockaddr(family, peer),
            local if local is not None else Address.from_sockaddr(family, sock.getsockname()),
            self.context.clock(),
        )
        self.take(conn, sock)

    def take(self, conn: ConnectionInfo, sock: socket.socket, *, handed_off: bool = False) -> None:
        """Serve an accepted socket: inspect it first, if there are listener filters. `handed_off`: another listener accepted it for us, and it stays here."""
        conn.listener = self
        conn.buffer_limit = self.buffer_limit
        if not self._inspection.filters:
            self._serve(conn, sock)
            return
        self.stats.downstream_pre_cx_active.n += 1
        done = self._inspected_here if handed_off or not self._hands_off else self._inspected
        inspection = Inspection(self._inspection, self.context, conn, sock, done, self._inspection_failed)
        if not inspection.start():
            self._inspections[conn] = inspection
            self._count()
            if self._timeouts is not None:
                self._timeouts.start(inspection, self.context.clock())

    def _forget(self, conn: ConnectionInfo) -> None:
        self.stats.downstream_pre_cx_active.n -= 1
        inspection = self._inspections.pop(conn, None)
        if inspection is not None:
            self._count()
            if self._timeouts is not None:
                self._timeouts.stop(inspection)

    def _inspected_here(self, conn: ConnectionInfo, sock: socket.socket) -> None:
        self._forget(conn)
        self._serve(conn, sock)

    def _inspected(self, conn: ConnectionInfo, sock: socket.socket) -> None:
        self._forget(conn)
        if conn.local is not conn.direct_local and self._registry is not None:
            other = self._registry.find(conn.local)
            if other is not None and other is not self:
                other.take(conn, sock, handed_off=True)
                return
        self._serve(conn, sock)

    def _inspection_failed(self, conn: ConnectionInfo, sock: socket.socket, why: str) -> None:
        self._forget(conn)
        stats = self.stats
        if why == "remote":
            stats.downstream_listener_filter_remote_close.n += 1
        elif why == "error":
            stats.downstream_listener_filter_error.n += 1
        elif why == "timeout":
            stats.downstream_pre_cx_timeout.n += 1
        log.debug("listener %s: %r: closed by the listener filters: %s", self.name, conn, why)
        sock.close()
        if self._logs:
            self._log(conn)

    # -- connections

    def _serve(self, conn: ConnectionInfo, sock: socket.socket) -> None:
        chain = self._matcher.find(conn) or self._default
        if chain is None:
            self._no_chain(conn)
            sock.close()
            return
        self._opened(conn, chain, sock)
        if chain.takes_socket and not chain.on_connection:
            self._hand_over(conn, chain, sock)
            return
        spawn("downstream connection", self._adopt(conn, chain, sock))

    async def _adopt(self, conn: ConnectionInfo, chain: FilterChain, sock: socket.socket) -> None:
        """Give the socket to the event loop."""
        if chain.takes_socket:
            if await allow(conn, chain.on_connection):
                self._hand_over(conn, chain, sock)
            else:
                sock.close()
                conn.closed()
            return
        try:
            await self._loop.connect_accepted_socket(lambda: _Accepted(self, conn, chain), sock)
        except OSError as error:
            log.debug("listener %s: %r: cannot be taken over: %s", self.name, conn, error)
            sock.close()
            conn.closed()

    def _hand_over(self, conn: ConnectionInfo, chain: FilterChain, sock: socket.socket) -> None:
        """Give the bare socket to the terminal filter."""
        conn.served = True
        session = chain.terminal.accept_socket(conn, sock)
        if conn in self._connections:
            self._connections[conn] = session

    def _opened(self, conn: ConnectionInfo, chain: FilterChain, transport: Any) -> None:
        """Count a connection in. It has a filter chain from now on."""
        conn.filter_chain = chain
        conn.on_closed = self._closed
        self._connections[conn] = transport
        self._count()
        self.stats.opened()

    def _closed(self, conn: ConnectionInfo) -> None:
        self._connections.pop(conn, None)
        self._count()
        self.stats.closed((self.context.clock() - conn.start) * 1000)
        chain = conn.filter_chain
        for hook in chain.on_close:
            hook(conn)
        if self._logs:
            self._log(conn)
        if not conn.served and chain.missed is not None:
            chain.missed(conn, secure=chain.tls is not None)

    def _no_chain(self, conn: ConnectionInfo) -> None:
        self.stats.no_filter_chain_match.n += 1
        log.debug("listener %s: %r: no filter chain matches", self.name, conn)
        if self._logs:
            self._log(conn, flags.NR, "filter_chain_not_found")

    def _log(self, conn: ConnectionInfo, flag: int = 0, details: str | None = None) -> None:
        stream = conn.stream
        if stream is None:
            stream = StreamInfo()
            stream.connection = conn
        if type(stream) is StreamInfo:  # none that the terminal filter keeps
            stream.start = conn.start
            now = self.context.clock()
            stream.start_wall = self.context.wall() - (now - conn.start)
            stream.end = now
            stream.termination_details = conn.termination_details
            stream.requested_server_name = conn.server_name
            stream._metadata = conn.metadata
            stream._filter_state = conn.filter_state
            stream.details = details
        stream.flags |= flag | conn.flags
        for logger in self._logs:
            logger.log(stream, events.NOT_SET)

    # -- connections that have a transport

    def accepted_directly(self, transport: Any, family: int, local: Address | None) -> None:
        """uvloop accepted a connection."""
        peer = transport.get_extra_info("peername")
        name = transport.get_extra_info("sockname") if local is None else None
        if (peer is None and family != socket.AF_UNIX) or (name is None and local is None):
            transport.abort()  # gone before we came
            return
        if self._limit is not None and len(self._connections) >= self._limit:
            self.stats.downstream_cx_overflow.n += 1
            transport.abort()
            return
        conn = ConnectionInfo(
            next_id(), Address.from_sockaddr(family, peer), local if local is not None else Address.from_sockaddr(family, name), self.context.clock()
        )
        conn.listener = self
        conn.buffer_limit = self.buffer_limit
        chain = self._matcher.find(conn) or self._default
        if chain is None:
            self._no_chain(conn)
            transport.abort()
            return
        self._opened(conn, chain, transport)
        self.shake_hands(conn, chain, transport)

    def shake_hands(self, conn: ConnectionInfo, chain: FilterChain, transport: Any) -> None:
        """A connection has a transport: begin with TLS if the chain has it, else it is ready."""
        if chain.tls is None:
            self.connected(conn, chain, transport)
        elif not chain.tls.ready:
            chain.tls.refuse()
            transport.set_protocol(ClosingWatch(conn, None))
            transport.close()
        else:
            self._connections[conn] = Handshake(self, conn, chain).start(transport)

    def connected(self, conn: ConnectionInfo, chain: FilterChain, transport: Any) -> None:
        """A connection is ready (its handshake done): let the network filters see it."""
        self._connections[conn] = transport
        if self.buffer_limit != DEFAULT_BUFFER_LIMIT:
            transport.set_write_buffer_limits(self.buffer_limit, self.buffer_limit // 2)
        for at, hook in enumerate(chain.on_connection):
            verdict = hook(conn)
            if verdict is None:
                continue
            if verdict is False:
                transport.set_protocol(ClosingWatch(conn, None))
                transport.close()
            else:
                waiting = Waiting(conn, transport)
                transport.set_protocol(waiting)
                spawn("network filters", self._connected_later(conn, chain, waiting, transport, verdict, at))
            return
        self._begin(conn, chain, transport)

    async def _connected_later(self, conn: ConnectionInfo, chain: FilterChain, waiting: Waiting, transport: Any, verdict: Any, at: int) -> None:
        allowed = await allow(conn, chain.on_connection[at + 1 :], verdict)
        if transport.is_closing():
            return
        if not allowed:
            transport.close()
            return
        waiting.release(self._begin(conn, chain, transport))

    def _begin(self, conn: ConnectionInfo, chain: FilterChain, transport: Any) -> Any:
        conn.served = True
        protocol = chain.terminal.create_protocol(conn)
        if self._logs and conn.stream is None:
            stream = conn.stream = StreamInfo()
            stream.connection = conn
            protocol = Counted(stream, protocol)
        if chain.on_first_data:
            protocol = FirstDataGate(conn, protocol, chain.on_first_data, chain.reports_close)
        elif not chain.reports_close:
            protocol = ClosingWatch(conn, protocol)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        return protocol

    def __repr__(self) -> str:
        return f"<listener {self.name} {', '.join(map(str, self.addresses))} active={self.active}>"


class _Direct(asyncio.Protocol):
    """The first protocol of every connection that uvloop accepts: one object for all of them, because it has nothing to remember."""

    __slots__ = ("_family", "_listener", "_local")

    def __init__(self, listener: Listener, family: int, local: Address | None) -> None:
        self._listener = listener
        self._family = family
        self._local = local

    def __call__(self) -> _Direct:
        """The protocol factory."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._listener.accepted_directly(transport, self._family, self._local)


class _Accepted(asyncio.Protocol):
    """The first protocol of a connection that was accepted here."""

    __slots__ = ("_chain", "_conn", "_listener")

    def __init__(self, listener: Listener, conn: ConnectionInfo, chain: FilterChain) -> None:
        self._listener = listener
        self._conn = conn
        self._chain = chain

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._listener.shake_hands(self._conn, self._chain, transport)


def _inspection_timed_out(inspection: Inspection) -> None:
    listener: Listener = inspection.conn.listener
    if listener._go_on_after_timeout:
        listener.stats.downstream_pre_cx_timeout.n += 1
    inspection.time_out(listener._go_on_after_timeout)


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _needs_tls_inspector(match: Any) -> bool:
    return match.transport_protocol == "tls" or (not match.transport_protocol and bool(match.server_names or match.application_protocols))


def _buffer_limit(proto: Any) -> int:
    if not proto.HasField("per_connection_buffer_limit_bytes"):
        return DEFAULT_BUFFER_LIMIT
    return proto.per_connection_buffer_limit_bytes.value or 1 << 62  # 0: no limit
