"""The TLS handshake of one downstream connection: its timeout, what is known after it, what its failure says."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from meshproxy.net.tls_stats import failure_text
from meshproxy.net.tls_transport import TlsTransport

if TYPE_CHECKING:
    from meshproxy.net.connection import ConnectionInfo
    from meshproxy.net.filter_chain import FilterChain
    from meshproxy.net.listener import Listener
    from meshproxy.net.tls import DownstreamTls

log = logging.getLogger("meshproxy.net.listener")

_TIMEOUT = 60.0  # seconds when transport_socket_connect_timeout is not set: half-open clients must not pile up


class Handshake:
    """The TLS handshake of one connection (net.tls_transport.Outcome)."""

    __slots__ = ("_chain", "_conn", "_listener", "_timed_out", "_timeouts", "_transport")

    def __init__(self, listener: Listener, conn: ConnectionInfo, chain: FilterChain) -> None:
        self._listener = listener
        self._conn = conn
        self._chain = chain
        self._timed_out = False

    def start(self, below: Any) -> TlsTransport:
        """Begin on a transport; what it becomes."""
        listener, chain = self._listener, self._chain
        assert chain.tls is not None
        transport = self._transport = TlsTransport(chain.tls.wrap, self)
        context = listener.context
        self._timeouts = context.timers.queue(chain.handshake_timeout or _TIMEOUT, Handshake.time_out)
        self._timeouts.start(self, context.clock())
        below.set_protocol(transport)
        transport.connection_made(below)
        return transport

    def time_out(self) -> None:
        """It takes too long."""
        self._timed_out = True
        self._transport.abort()

    def tls_ready(self, transport: TlsTransport) -> None:
        self._timeouts.stop(self)
        conn, chain, listener = self._conn, self._chain, self._listener
        assert chain.tls is not None
        owner: DownstreamTls = transport.ssl_object.context.owner  # type: ignore[attr-defined]  # which may be gone from the chain: certificates rotate
        conn.tls = owner.describe(transport.ssl_object)
        conn.handshake_end = listener.context.clock()
        listener.connected(conn, chain, transport)

    def tls_failed(self, transport: TlsTransport, error: OSError | None) -> None:
        self._timeouts.stop(self)
        conn, chain, listener = self._conn, self._chain, self._listener
        assert chain.tls is not None
        failure = failure_text(error) if error is not None else ""
        if self._timed_out and chain.handshake_timeout:
            listener.stats.downstream_cx_transport_socket_connect_timeout.n += 1
            conn.local_close_reason = "transport_socket_timeout"
            conn.termination_details = "transport socket timeout was reached"
        conn.transport_failure = failure or None
        conn.tls = chain.tls.describe(transport.ssl_object)
        log.info(
            "listener %s: TLS handshake failed: peer %s, SNI %s, reason: %s",
            listener.name,
            conn.remote.text,
            conn.server_name or "-",
            failure or conn.termination_details or "the peer closed the connection",
        )
        conn.closed()
