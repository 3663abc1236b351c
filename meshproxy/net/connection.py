"""What is known of one connection, downstream or upstream: addresses, TLS, and what the listener filters found out."""

from __future__ import annotations

import itertools
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.net.certificate import Certificate

if TYPE_CHECKING:
    from meshproxy.net.address import Address

__all__ = ["Certificate", "ConnectionInfo", "TlsInfo"]


class ConnectionInfo:
    """One connection. Made when it is accepted or dialled, completed by the listener filters and the TLS handshake, read-only from then on.

    Defaults are shared: a connection costs what differs from them. Times are seconds of the monotonic clock.
    """

    __slots__ = (
        "application_protocols",  # ALPN offered (ClientHello) or detected (http_inspector): tuple[str, ...]
        "buffer_limit",  # per_connection_buffer_limit_bytes: soft limit of what is buffered in each direction
        "connected",  # of an upstream connection: when the TCP connection was there; 0.0 when that is not known
        "detected_close",  # how it ended: 'Normal' | 'RemoteReset'
        "direct_local",  # Address the socket has
        "direct_remote",  # Address of the TCP peer
        "filter_chain",  # net.filter_chain.FilterChain | None, once it was chosen
        "filter_state",  # dict[str, Any] | None, from listener and network filters
        "flags",  # response flags that are the connection's own, not a request's
        "handshake_end",  # when the TLS handshake was done; 0.0 for none
        "id",  # unique within the process
        "listener",  # net.listener.Listener | None
        "local",  # Address after original_dst or PROXY protocol
        "local_close_reason",  # str | None: why this side closed it, in Envoy's words
        "metadata",  # dict[str, dict] | None: dynamic metadata from listener and network filters
        "on_closed",  # Callable[[ConnectionInfo], None] | None: the listener's; call `closed`
        "proxy_tlvs",  # dict[int, bytes] | None
        "remote",  # Address after PROXY protocol
        "served",  # whether the terminal filter has it
        "server_name",  # SNI, lower case, or None
        "start",
        "stream",  # StreamInfo | None: what the listener's access log shows of the connection, when the terminal filter keeps one for it
        "termination_details",  # str | None: why a filter closed it
        "tls",  # TlsInfo | None
        "transport_failure",  # str | None: why the transport socket failed (DOWNSTREAM_TRANSPORT_FAILURE_REASON)
        "transport_protocol",  # 'raw_buffer' | 'tls', as detected on the wire
    )

    def __init__(self, id: int, remote: Address, local: Address, start: float) -> None:
        self.id = id
        self.remote = self.direct_remote = remote
        self.local = self.direct_local = local
        self.start = start
        self.tls: TlsInfo | None = None
        self.server_name: str | None = None
        self.application_protocols: tuple[str, ...] = ()
        self.transport_protocol = "raw_buffer"
        self.filter_chain: Any = None
        self.listener: Any = None
        self.proxy_tlvs: dict[int, bytes] | None = None
        self.metadata: dict[str, dict[str, Any]] | None = None
        self.filter_state: dict[str, Any] | None = None
        self.termination_details: str | None = None
        self.transport_failure: str | None = None
        self.buffer_limit = DEFAULT_BUFFER_LIMIT
        self.stream: Any = None
        self.handshake_end = 0.0
        self.connected = 0.0
        self.local_close_reason: str | None = None
        self.detected_close = "Normal"
        self.flags = 0
        self.served = False
        self.on_closed: Callable[[ConnectionInfo], None] | None = None

    def closed(self) -> None:
        """The connection has ended: for terminal filters that set `reports_close`, at the end of `connection_lost`. Only the first call counts."""
        on_closed = self.on_closed
        if on_closed is not None:
            self.on_closed = None
            on_closed(self)

    def __repr__(self) -> str:
        return f"<connection {self.id} {self.remote.text} -> {self.local.text}{' TLS' if self.tls else ''}>"


DEFAULT_BUFFER_LIMIT = 1 << 20  # Envoy's default of per_connection_buffer_limit_bytes
next_id = itertools.count().__next__  # connection ids, unique within a process: only logs read them


class TlsInfo:
    """The outcome of one TLS handshake. Everything is read from OpenSSL when first asked for: most connections are only ever asked for little of it."""

    __slots__ = ("_local", "_object", "_peer", "_principals", "_verifies", "forwarded")

    def __init__(self, ssl_object: ssl.SSLObject, local_certificate: Certificate | None = None, verifies: bool = False) -> None:
        self._object = ssl_object
        self._local = local_certificate
        self._peer: Certificate | bool | None = False  # False: not asked for yet
        self._principals: tuple[str, str] | None = None
        self._verifies = verifies  # what the peer presents, if it does
        self.forwarded: bytes | None = None  # what X-Forwarded-Client-Cert says of it, once somebody has worked it out

    @property
    def version(self) -> str:
        """'TLSv1.2', 'TLSv1.3'."""
        return self._object.version() or ""

    @property
    def cipher(self) -> str:
        """The cipher suite by OpenSSL's name."""
        cipher = self._object.cipher()
        return cipher[0] if cipher else ""

    @property
    def alpn(self) -> str | None:
        """The negotiated application protocol."""
        return self._object.selected_alpn_protocol()

    @property
    def peer_certificate(self) -> Certificate | None:
        """The peer's leaf certificate, None when it presented none."""
        peer = self._peer
        if isinstance(peer, bool):
            try:
                der = self._object.getpeercert(True)
            except ValueError:  # the handshake failed before there was one
                der = None
            peer = self._peer = Certificate(der) if der else None
        return peer

    @property
    def validated(self) -> bool:
        """The peer presented a certificate, and it was verified."""
        return self._verifies and self.peer_certificate is not None

    @property
    def local_certificate(self) -> Certificate | None:
        """The certificate that this side presented."""
        return self._local

    @property
    def principals(self) -> tuple[str, str]:
        """Who the peer is and who we are, by the first URI in each certificate; "" for who has none."""
        both = self._principals
        if both is None:
            peer, local = self.peer_certificate, self._local
            both = self._principals = (peer.uri_sans or ("",))[0] if peer else "", (local.uri_sans or ("",))[0] if local else ""
        return both

    @property
    def presented(self) -> bool:
        """Whether the peer presented a certificate."""
        return self.peer_certificate is not None

    @property
    def session_id(self) -> str:
        """The TLS session's id in hexadecimal, '' when it has none."""
        session = self._object.session
        return session.id.hex() if session is not None else ""

    @property
    def session_reused(self) -> bool:
        """Whether the handshake resumed an earlier session."""
        return bool(self._object.session_reused)
