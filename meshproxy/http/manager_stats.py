"""The connection manager's statistics, by Envoy's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshproxy.observe.stats import Store

COUNTERS = tuple(
    """downstream_cx_delayed_close_timeout downstream_cx_destroy downstream_cx_destroy_active_rq downstream_cx_destroy_local
    downstream_cx_destroy_local_active_rq downstream_cx_destroy_remote downstream_cx_destroy_remote_active_rq downstream_cx_drain_close
    downstream_cx_http1_total downstream_cx_http2_total downstream_cx_http3_total downstream_cx_idle_timeout
    downstream_cx_max_duration_reached downstream_cx_max_requests_reached downstream_cx_overload_disable_keepalive downstream_cx_protocol_error
    downstream_cx_rx_bytes_total downstream_cx_ssl_total downstream_cx_total downstream_cx_tx_bytes_total downstream_cx_upgrades_total
    downstream_flow_control_paused_reading_total downstream_flow_control_resumed_reading_total downstream_rq_1xx downstream_rq_2xx downstream_rq_3xx
    downstream_rq_4xx downstream_rq_5xx downstream_rq_completed downstream_rq_failed_path_normalization downstream_rq_header_timeout
    downstream_rq_http1_total downstream_rq_http2_total downstream_rq_http3_total downstream_rq_idle_timeout downstream_rq_max_duration_reached
    downstream_rq_non_relative_path downstream_rq_overload_close downstream_rq_redirected_with_normalized_path downstream_rq_rejected_via_ip_detection
    downstream_rq_response_before_rq_complete downstream_rq_rx_reset downstream_rq_timeout downstream_rq_too_large downstream_rq_too_many_premature_resets
    downstream_rq_total downstream_rq_tx_reset downstream_rq_ws_on_non_ws_route rs_too_large""".split()
)
GAUGES = (
    "downstream_cx_active",
    "downstream_cx_http1_active",
    "downstream_cx_http1_soft_drain",
    "downstream_cx_http2_active",
    "downstream_cx_http3_active",
    "downstream_cx_rx_bytes_buffered",
    "downstream_cx_ssl_active",
    "downstream_cx_tx_bytes_buffered",
    "downstream_cx_upgrades_active",
    "downstream_rq_active",
)
HISTOGRAMS = ("downstream_cx_length_ms", "downstream_rq_time")
TRACING_COUNTERS = ("client_enabled", "health_check", "not_traceable", "random_sampling", "service_forced")
CODEC_COUNTERS = ("dropped_headers_with_underscores", "metadata_not_supported_error", "requests_rejected_with_underscores_in_headers", "response_flood")


class ManagerStats:
    """`http.<stat_prefix>.*`: one attribute a statistic. `by_class[status // 100]` are the counters that one response moves."""

    downstream_rq_http1_total: Any
    downstream_cx_http1_total: Any
    downstream_cx_http1_active: Any
    downstream_cx_http2_total: Any
    downstream_cx_http2_active: Any

    def __init__(self, store: Store, stat_prefix: str, listener_prefix: str) -> None:
        scope = store.scope(f"http.{stat_prefix}.")
        for name in COUNTERS:
            setattr(self, name, scope.counter(name))
        for name in GAUGES:
            setattr(self, name, scope.gauge(name))
        for name in HISTOGRAMS:
            setattr(self, name, scope.histogram(name))
        for name in TRACING_COUNTERS:
            setattr(self, f"tracing_{name}", scope.counter(f"tracing.{name}"))
        codec = store.scope("http1.")
        for name in CODEC_COUNTERS:
            setattr(self, name, codec.counter(name))
        # Connections: how many there were, and how many there are.
        self.by_protocol: dict[str, tuple[Any, Any]] = {
            "HTTP/1.1": (self.downstream_cx_http1_total, self.downstream_cx_http1_active),
            "HTTP/2": (self.downstream_cx_http2_total, self.downstream_cx_http2_active),
        }
        classes = [(getattr(self, f"downstream_rq_{digit}xx"), self.downstream_rq_completed) for digit in range(1, 6)]
        if listener_prefix:
            listener = store.scope(f"{listener_prefix}http.{stat_prefix}.")
            completed = listener.counter("downstream_rq_completed")
            classes = [(*pair, listener.counter(f"downstream_rq_{digit}xx"), completed) for digit, pair in enumerate(classes, 1)]  # type: ignore[misc]
        # Statuses without a class are only counted as completed.
        others = (self.downstream_rq_completed, completed) if listener_prefix else (self.downstream_rq_completed,)
        self.by_class: tuple[tuple[Any, ...], ...] = ((), *classes, others, others, others, others)

    def __getattr__(self, name: str) -> Any:  # only for type checkers: every statistic is set in __init__
        raise AttributeError(name)
