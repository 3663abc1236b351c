"""The stats of the process as a whole, with Envoy's names: server.*, listener_manager.*, runtime.*, filesystem.*; counted and computed by main."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from meshproxy.admin.certs import days_until_first_expires
from meshproxy.admin.info import memory_of_self
from meshproxy.version import ENVOY_VERSION

if TYPE_CHECKING:
    from meshproxy.server import Server

_NO_CERTIFICATE = 4_294_967_295  # days_until_first_cert_expiring when there is none
_COUNTERS = """
    envoy.overload_actions.reset_high_memory_stream.count listener_manager.listener_added listener_manager.listener_create_failure
    listener_manager.listener_create_success listener_manager.listener_in_place_updated listener_manager.listener_modified
    listener_manager.listener_removed listener_manager.listener_stopped main_thread.watchdog_mega_miss main_thread.watchdog_miss
    runtime.deprecated_feature_use runtime.load_error runtime.load_success runtime.override_dir_exists runtime.override_dir_not_exists
    server.debug_assertion_failures server.dropped_stat_flushes server.dynamic_unknown_fields server.envoy_bug_failures server.envoy_notifications
    server.main_thread.watchdog_mega_miss server.main_thread.watchdog_miss server.static_unknown_fields server.wip_protos workers.watchdog_mega_miss
    workers.watchdog_miss
""".split()
_GAUGES = """
    listener_manager.total_filter_chains_draining listener_manager.total_listeners_active listener_manager.total_listeners_draining
    listener_manager.total_listeners_warming listener_manager.workers_pinned listener_manager.workers_started runtime.admin_overrides_active
    runtime.deprecated_feature_seen_since_process_start runtime.num_keys runtime.num_layers server.compilation_settings.fips_mode server.concurrency
    server.days_until_first_cert_expiring server.hot_restart_epoch server.live server.memory_allocated server.memory_heap_size
    server.memory_physical_size server.parent_connections server.seconds_until_first_ocsp_response_expiring server.state server.stats_recent_lookups
    server.total_connections server.uptime server.version server.workers_restarting
""".split()


class ServerStats:
    """Brings the gauges up to date at each scrape; counts what happens in between."""

    def __init__(self, server: Server) -> None:
        self._server = server
        stats = server.stats
        stats.declare("counter", "", tuple(_COUNTERS))
        stats.declare("gauge", "", tuple(_GAUGES))
        self.initialization_time = stats.histogram("server.initialization_time_ms")
        self.worker_restarts = stats.counter("server.worker_restarts")  # ours: Envoy's workers cannot die alone
        stats.declare("counter", "server.", tuple(f"worker_{i}.{name}" for i in range(server.concurrency) for name in ("watchdog_mega_miss", "watchdog_miss")))
        self._set("server.concurrency", server.concurrency)
        self._set("server.version", int("".join(f"{int(part):02x}" for part in ENVOY_VERSION.split(".")), 16))
        stats.counter("runtime.load_success").n = 1
        stats.counter("runtime.override_dir_not_exists").n = 1
        self._set("runtime.num_layers", len(server.runtime.layers))

    def _set(self, name: str, value: int) -> None:
        self._server.stats.gauge(name).n = value

    def configured(self, unknown: int, deprecated: int) -> None:
        """What the bootstrap had that the API does not know, or will not know."""
        stats = self._server.stats
        stats.counter("server.static_unknown_fields").n += unknown
        stats.counter("runtime.deprecated_feature_use").n += deprecated
        self._set("runtime.deprecated_feature_seen_since_process_start", deprecated)

    def listeners_added(self, count: int) -> None:
        """Static listeners, created once in every worker."""
        server = self._server
        server.stats.counter("listener_manager.listener_added").n += count
        server.stats.counter("listener_manager.listener_create_success").n += count * server.concurrency

    def initialized(self) -> None:
        """Everything that had to come up has."""
        self.initialization_time.record(int(self._server.uptime * 1000))
        self._set("listener_manager.workers_started", 1)

    def update(self) -> None:
        """Compute the gauges."""
        server = self._server
        memory = memory_of_self()
        active = sum(not listener.stopped for listener in server.listeners)
        connections = sum(
            server.stats.value(name)
            for name in server.stats.metrics
            if name.startswith("listener.") and name.endswith(".downstream_cx_active") and ".worker_" not in name
        )
        for name, value in {
            "server.uptime": int(server.uptime),
            "server.state": int(server.state),
            "server.live": int(server.initialized and not server.health_failed and not server.terminating),
            "server.memory_allocated": memory.get("allocated", 0),
            "server.memory_heap_size": memory.get("heap_size", 0),
            "server.memory_physical_size": memory.get("total_physical_bytes", 0),
            "server.total_connections": connections,
            "server.days_until_first_cert_expiring": days_until_first_expires(server.certificates.bundles(server), time.time(), _NO_CERTIFICATE),
            "server.workers_restarting": server.concurrency - server.workers_ready if server.initialized else 0,
            "listener_manager.total_listeners_active": active,
            "runtime.num_keys": server.runtime.size,
            "runtime.admin_overrides_active": int(bool(server.runtime.overrides)),
        }.items():
            self._set(name, value)
