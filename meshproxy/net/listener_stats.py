"""`listener.<address>.*`, under Envoy's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.net.sockets import addresses

if TYPE_CHECKING:
    from meshproxy.observe.stats import Counter, Gauge, Histogram, Scope

_COUNTERS = (
    "downstream_cx_destroy",
    "downstream_cx_overflow",
    "downstream_cx_overload_reject",
    "downstream_cx_total",
    "downstream_cx_transport_socket_connect_timeout",
    "downstream_global_cx_overflow",
    "downstream_listener_filter_error",
    "downstream_listener_filter_remote_close",
    "downstream_pre_cx_timeout",
    "extension_config_missing",
    "network_extension_config_missing",
    "no_filter_chain_match",
)
_GAUGES = ("downstream_cx_active", "downstream_pre_cx_active")
_HISTOGRAMS = ("connections_accepted_per_socket_event", "downstream_cx_length_ms")


def stat_prefix(proto: Any) -> str:
    """The prefix of the statistics of a `Listener`. Raises ConfigError."""
    return f"listener.{proto.stat_prefix or addresses(proto)[0].text}."


class ListenerStats:
    """The counters of one listener in one worker. Those that rarely count are made when the first of them does."""

    __slots__ = (
        "_active",
        "_destroyed",
        "_length",
        "_scope",
        "_total",
        "_worker_active",
        "_worker_total",
        "accepted_per_event",
        "downstream_pre_cx_active",
    )

    def __init__(self, scope: Scope, worker: str) -> None:
        """`worker`: `worker_0.` or `main_thread.`"""
        scope.declare("counter", _COUNTERS)
        scope.declare("gauge", _GAUGES)
        scope.declare("histogram", _HISTOGRAMS)
        self._scope = scope
        self._total: Counter = scope.counter("downstream_cx_total")
        self._active: Gauge = scope.gauge("downstream_cx_active")
        self._destroyed: Counter = scope.counter("downstream_cx_destroy")
        self._length: Histogram = scope.histogram("downstream_cx_length_ms")
        self._worker_total: Counter = scope.counter(f"{worker}downstream_cx_total")
        self._worker_active: Gauge = scope.gauge(f"{worker}downstream_cx_active")
        self.accepted_per_event: Histogram = scope.histogram("connections_accepted_per_socket_event")
        self.downstream_pre_cx_active: Gauge = scope.gauge("downstream_pre_cx_active")

    def opened(self) -> None:
        """A connection has found its filter chain."""
        self._total.n += 1
        self._active.n += 1
        self._worker_total.n += 1
        self._worker_active.n += 1

    def closed(self, milliseconds: float) -> None:
        """It has ended."""
        self._active.n -= 1
        self._destroyed.n += 1
        self._worker_active.n -= 1
        self._length.record(int(milliseconds))

    def __getattr__(self, name: str) -> Counter:
        if name not in _COUNTERS:
            raise AttributeError(name)
        return self._scope.counter(name)
