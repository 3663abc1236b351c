"""The statistics of HTTP/2 codecs: `http2.*` for downstream connections, `cluster.<name>.http2.*` for upstream ones. Names are Envoy's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshproxy.observe.stats import Counter, Gauge, Scope

_COUNTERS = tuple(
    """cookies_total_bytes_too_large dropped_headers_with_underscores goaway_sent header_list_size_too_large header_overflow headers_cb_no_stream
    inbound_empty_frames_flood inbound_priority_frames_flood inbound_window_update_frames_flood keepalive_timeout metadata_empty_frames
    outbound_control_flood outbound_flood requests_rejected_with_underscores_in_headers rx_messaging_error rx_reset stream_refused_errors trailers
    tx_flush_timeout tx_reset""".split(),
)
_GAUGES = ("deferred_stream_close", "outbound_control_frames_active", "outbound_frames_active", "pending_send_bytes", "streams_active")


class Http2Stats:
    """One attribute per statistic; `.n` is counted up and down."""

    cookies_total_bytes_too_large: Counter
    dropped_headers_with_underscores: Counter
    goaway_sent: Counter
    header_list_size_too_large: Counter
    header_overflow: Counter
    headers_cb_no_stream: Counter
    inbound_empty_frames_flood: Counter
    inbound_priority_frames_flood: Counter
    inbound_window_update_frames_flood: Counter
    keepalive_timeout: Counter
    metadata_empty_frames: Counter
    outbound_control_flood: Counter
    outbound_flood: Counter
    requests_rejected_with_underscores_in_headers: Counter
    rx_messaging_error: Counter
    rx_reset: Counter
    stream_refused_errors: Counter
    trailers: Counter
    tx_flush_timeout: Counter
    tx_reset: Counter
    deferred_stream_close: Gauge
    outbound_control_frames_active: Gauge
    outbound_frames_active: Gauge
    pending_send_bytes: Gauge
    streams_active: Gauge

    def __init__(self, scope: Scope) -> None:
        """`scope`: "http2." or "cluster.<name>.http2."."""
        self.sessions: set[Any] = set()  # codec.h2.session.Session, as long as it is in use
        scope.store.collectors.append(self.settle)
        for name in _COUNTERS:
            setattr(self, name, scope.counter(name))
        for name in _GAUGES:
            setattr(self, name, scope.gauge(name))

    @classmethod
    def of(cls, scope: Scope, shared: dict[Any, Any]) -> Http2Stats:
        """Those of that scope: the same for everybody with the same `shared` (context.Context.shared), as sessions of all are counted together."""
        key = cls, scope.prefix
        made = shared.get(key)
        if made is None:
            made = shared[key] = cls(scope)
        return made

    def settle(self) -> None:
        """Before statistics are collected: what nobody counts while it happens."""
        streams = frames = control_frames = 0
        for session in self.sessions:
            streams += len(session.streams)
            transport = getattr(session.sink, "transport", None)
            if transport is not None:
                if left := transport.get_write_buffer_size():
                    session.remain(left)
                else:
                    session.drained()
            waiting = session.outbound
            frames += waiting[0]
            control_frames += waiting[1]
        self.streams_active.n = streams
        self.outbound_frames_active.n = frames
        self.outbound_control_frames_active.n = control_frames
