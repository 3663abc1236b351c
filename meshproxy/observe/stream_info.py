"""What is known of one stream: an HTTP request, or a TCP connection being proxied.

Access logs, format commands, header mutations, filters and the recorder read these attributes. Defaults are class attributes, so that a stream costs
only what it sets. Times are seconds of the monotonic clock, 0.0 when the event has not happened; `start_wall` alone is Unix time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.observe import events

if TYPE_CHECKING:
    from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
    from meshproxy.net.connection import ConnectionInfo


class TypedState(dict[str, Any]):
    """Filter state that has a form of its own in JSON, but none as plain text and no fields."""


class StreamInfo:
    """Base of `http.stream.Stream` and `tcp.proxy.Session`."""

    # -- who
    connection: ConnectionInfo
    codec: Any = None  # the downstream side of an HTTP stream, which counts bytes where the connection is metered
    request: RequestHead | None = None
    response_started: bool = False
    response: ResponseHead | None = None  # what went downstream
    request_trailers: Headers | None = None
    response_trailers: Headers | None = None
    protocol: str | None = None  # "HTTP/1.0", "HTTP/1.1", "HTTP/2"; None for TCP
    original_path: bytes | None = None  # :path before any rewrite
    remote: Any = None  # net.address.Address of the trusted client (XFF-aware); None: connection.remote

    # -- outcome
    status: int = 0  # response code, 0 when none was sent
    flags: int = 0  # observe.flags bits
    details: str | None = None  # response code details
    termination_details: str | None = None  # connection termination details
    local_reply_body: bytes = b""  # while a local reply is formatted
    access_log_type: str = events.NOT_SET  # the event that is being logged
    bytes_received: int = 0  # request body bytes (TCP: all bytes)
    bytes_sent: int = 0  # response body bytes (TCP: all bytes)
    upstream_bytes_sent: int = 0  # on the wire, header and body
    upstream_bytes_received: int = 0
    upstream_header_bytes_sent: int = 0  # all of these only where a log asks: see codec.metering
    upstream_header_bytes_received: int = 0
    upstream_decompressed_header_bytes_sent: int = 0
    upstream_decompressed_header_bytes_received: int = 0

    # -- when
    start_wall: float = 0.0
    start: float = 0.0
    head_end: float = 0.0  # end of the request's head, if it did not come in one piece
    request_end: float = 0.0  # last request byte received from downstream
    upstream_start: float = 0.0  # first byte sent upstream
    upstream_sent: float = 0.0  # last byte sent upstream
    upstream_first: float = 0.0  # first byte received from upstream
    upstream_last: float = 0.0  # last byte received from upstream
    response_start: float = 0.0  # first byte sent downstream
    upstream_body_first: float = 0.0  # first byte of the response's body received from upstream; only where a log asks for it
    end: float = 0.0  # last byte sent downstream, or the end of the stream

    # -- where to
    route: Any = None  # http.routes.Route
    cluster: Any = None  # upstream.cluster.Cluster
    host: Any = None  # upstream.host.Host of the last attempt
    upstream: Any = None  # net.connection.ConnectionInfo of the upstream connection (local address, TLS), or None
    upstream_protocol: str | None = None  # "HTTP/1.1", "HTTP/2"; None where it is not HTTP
    upstream_failure: str | None = None  # transport failure reason
    upstream_detected_close: str = "Normal"  # how the upstream connection ended, or a tunnel to there: 'Normal' | 'RemoteReset'
    attempts: int = 0

    route_changes: int = 0  # how often filters had it chosen anew
    route_time: float = 0.0  # seconds that choosing it took; only where a log asks
    virtual_cluster_name: str | None = None  # set when a try is counted

    # -- who is at the other ends (observe.peers.Peer), where http.filters.peer_metadata finds that out; `peer_said`: what the request told of its sender
    downstream_peer: Any = None
    upstream_peer: Any = None
    peer_said: int = 0

    # -- what it does not have in common with others
    # Of a stream that went by a lane or a plan (http.plan), when it has ended: (kind, repeated, connection, host, exchange, bytes_sent, request_id,
    # service_time, start, end, start_wall), where the exchange is the upstream's (upstream.pool.PlanExchange). The kind is an object that stands for all
    # streams that had the same route and response and, if `repeated`, the same request. Where that is False, they still have their `request`; where it is a
    # sequence, it has the values in which their requests differ. See `observe.codegen.Line`.
    facts: tuple[Any, ...] | None = None

    # -- what filters know
    _metadata: dict[str, dict[str, Any]] | None = None
    _filter_state: dict[str, Any] | None = None
    requested_server_name: str | None = None

    @property
    def metadata(self) -> dict[str, dict[str, Any]]:
        """Dynamic metadata: filter namespace -> plain JSON-like dict. Made when first asked for."""
        value = self._metadata
        if value is None:
            value = self._metadata = {}
        return value

    @property
    def filter_state(self) -> dict[str, Any]:
        """Filter state objects by name. Made when first asked for."""
        value = self._filter_state
        if value is None:
            value = self._filter_state = {}
        return value
