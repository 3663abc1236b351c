"""The endpoints that say how the process is: /ready, /server_info, /memory, and those that only exist for compatibility."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.admin.message import JSON, Request, Response, message_to_json, to_json
from meshproxy.api import messages
from meshproxy.logs import DEFAULT_FORMAT
from meshproxy.server import State
from meshproxy.version import HOT_RESTART_VERSION, version

if TYPE_CHECKING:
    from meshproxy.server import Server


def ready(request: Request, server: Server) -> Response:
    """/ready: 200 only when LIVE."""
    return Response(f"{server.state.name}\n", 200 if server.state is State.LIVE else 503)


def hot_restart_version(request: Request, server: Server) -> Response:
    """/hot_restart_version."""
    return Response(HOT_RESTART_VERSION)


def contention(request: Request, server: Server) -> Response:
    """/contention: workers share no locks."""
    return Response("Mutex contention tracing is not enabled. To enable, run Envoy with flag --enable-mutex-tracing.")


def init_dump(request: Request, server: Server) -> Response:
    """/init_dump: the clusters that initialisation still waits for."""
    waiting = [] if server.initialized or server.clusters is None else sorted(server.clusters.waiting_for())
    if not waiting or request.query.get("mask", "cluster") not in ("", "cluster", "unready_targets_dumps"):
        return Response("{}\n", content_type=JSON)
    return Response(
        to_json({"unready_targets_dumps": [{"name": "init manager Server", "target_names": [f"Cluster {name}" for name in waiting]}]}), content_type=JSON
    )


def tcmalloc(request: Request, server: Server) -> Response:
    """/memory/tcmalloc: there is none; CPython's allocator statistics would go to standard error only."""
    return Response("The current build does not use TCMalloc\n", content_type="text/plain")


async def memory(request: Request, server: Server) -> Response:
    """/memory: the figures of envoy.admin.v3.Memory, summed over all processes; `allocated` is anonymous memory, the physical bytes are PSS."""
    total: dict[str, int] = {}
    for figures in (memory_of_self(), *await server.collect("memory")):
        for name, value in figures.items():
            total[name] = total.get(name, 0) + value
    names = ("allocated", "heap_size", "pageheap_unmapped", "pageheap_free", "total_thread_cache", "total_physical_bytes")
    return Response(to_json({name: str(total.get(name, 0)) for name in names}), content_type=JSON)


def memory_of_self() -> dict[str, int]:
    """Bytes of this process by Envoy's names."""
    kb: dict[str, int] = {}
    try:
        with open("/proc/self/smaps_rollup") as file:
            for line in file:
                name, _, value = line.partition(":")
                if value.endswith("kB\n"):
                    kb[name] = int(value[:-3])
    except OSError:
        return {}
    return {
        "allocated": kb.get("Pss_Anon", 0) * 1024,
        "heap_size": kb.get("Pss_Dirty", kb.get("Pss_Anon", 0)) * 1024,
        "total_physical_bytes": kb.get("Pss", 0) * 1024,
    }


def server_info(request: Request, server: Server) -> Response:
    """/server_info."""
    info = messages.known("envoy.admin.v3.ServerInfo")(
        version=version(),
        state=int(server.state),
        hot_restart_version=HOT_RESTART_VERSION,
        command_line_options=_command_line(server),
        node=server.node,
    )
    info.uptime_current_epoch.FromSeconds(int(server.uptime))
    info.uptime_all_epochs.FromSeconds(int(server.uptime))
    return Response(message_to_json(info, defaults=True), content_type=JSON)


def _command_line(server: Server) -> Any:
    options = server.options
    message = messages.known("envoy.admin.v3.CommandLineOptions")(
        base_id=options.base_id,
        use_dynamic_base_id=options.use_dynamic_base_id,
        base_id_path=options.base_id_path,
        concurrency=server.concurrency,
        config_path=options.config_path,
        config_yaml=options.config_yaml,
        allow_unknown_static_fields=options.allow_unknown_static_fields or options.allow_unknown_fields,
        reject_unknown_dynamic_fields=options.reject_unknown_dynamic_fields,
        ignore_unknown_dynamic_fields=options.ignore_unknown_dynamic_fields,
        stats_tag=options.stats_tag,
        skip_deprecated_logs=options.skip_deprecated_logs,
        admin_address_path=options.admin_address_path,
        local_address_ip_version=options.local_address_ip_version,
        log_level=options.log_level,
        component_log_level=options.component_log_level,
        log_format=options.log_format or DEFAULT_FORMAT,
        log_format_escaped=options.log_format_escaped,
        log_path=options.log_path,
        service_cluster=options.service_cluster,
        service_node=options.service_node,
        service_zone=options.service_zone,
        mode={"serve": "Serve", "validate": "Validate", "init_only": "InitOnly"}[options.mode],
        disable_hot_restart=True,
        enable_mutex_tracing=options.enable_mutex_tracing,
        restart_epoch=options.restart_epoch,
        cpuset_threads=options.cpuset_threads,
        drain_strategy=options.drain_strategy.capitalize(),
        enable_fine_grain_logging=options.enable_fine_grain_logging,
        socket_path=options.socket_path,
        enable_core_dump=options.enable_core_dump,
        skip_hot_restart_on_no_parent=options.skip_hot_restart_on_no_parent,
        skip_hot_restart_parent_stats=options.skip_hot_restart_parent_stats,
    )
    message.file_flush_interval.FromMilliseconds(options.file_flush_interval_msec)
    message.drain_time.FromSeconds(options.drain_time_s)
    message.parent_shutdown_time.FromSeconds(options.parent_shutdown_time_s)
    return message
