"""Every admin endpoint: its path, what /help says about it, its parameters, its handler; and the dispatch.

A handler is named as `module:function`, relative to this package, and imported when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Awaitable
from importlib import import_module
from typing import TYPE_CHECKING

from meshproxy.admin.message import Request, Response
from meshproxy.record import Record

if TYPE_CHECKING:
    from meshproxy.server import Server


class Parameter(Record, frozen=True):
    """One query parameter; `choices` are printed after its description."""

    name: str
    help: str
    choices: tuple[str, ...] = ()


class Endpoint(Record, frozen=True):
    """One path. `mutates`: POST only."""

    path: str
    help: str
    handler: str
    mutates: bool = False
    parameters: tuple[Parameter, ...] = ()

    @property
    def lines(self) -> str:
        text = f"  {self.path}{' (POST)' if self.mutates else ''}: {self.help}\n"
        for parameter in self.parameters:
            choices = f"; One of ({', '.join(parameter.choices)})" if parameter.choices else ""
            text += f"      {parameter.name}: {parameter.help}{choices}\n"
        return text


_STATS_FILTER = Parameter("filter", "Regular expression (Google re2) for filtering stats")
_STATS_INVERT = Parameter("invert_filter", "Invert the filter regex")
_STATS_USED = Parameter("usedonly", "Only include stats that have been written by system since restart")
_YES_NO = ("y", "n")

ENDPOINTS = (
    Endpoint("/", "Admin home page", "index:home"),
    Endpoint(
        "/allocprofiler",
        "enable/disable the allocation profiler (if supported)",
        "profiling:allocprofiler",
        mutates=True,
        parameters=(Parameter("enable", "enable/disable the allocation profiler", _YES_NO),),
    ),
    Endpoint("/certs", "print certs on machine", "certs:certs"),
    Endpoint(
        "/clusters",
        "upstream cluster status",
        "clusters:clusters",
        parameters=(Parameter("filter", "Regular expression (Google re2) for filtering clusters by name"),),
    ),
    Endpoint(
        "/config_dump",
        "dump current Envoy configs",
        "config_dump:config_dump",
        parameters=(
            Parameter("resource", "The resource to dump"),
            Parameter(
                "mask",
                "The mask to apply. When both resource and mask are specified, the mask is applied to every element in the desired repeated field so that "
                "only a subset of fields are returned. The mask is parsed as a Protobuf::FieldMask",
            ),
            Parameter(
                "name_regex",
                "Dump only the currently loaded configurations whose names match the specified regex. Can be used with both resource and mask query "
                "parameters.",
            ),
            Parameter("include_eds", "Dump currently loaded configuration including EDS. See the response definition for more information"),
        ),
    ),
    Endpoint("/contention", "dump current Envoy mutex contention stats (if enabled)", "info:contention"),
    Endpoint(
        "/cpuprofiler",
        "enable/disable the CPU profiler",
        "profiling:cpuprofiler",
        mutates=True,
        parameters=(Parameter("enable", "enables the CPU profiler", _YES_NO),),
    ),
    Endpoint(
        "/drain_listeners",
        "drain listeners",
        "control:drain_listeners",
        mutates=True,
        parameters=(
            Parameter(
                "graceful",
                "When draining listeners, enter a graceful drain period prior to closing listeners. This behaviour and duration is configurable via server "
                "options or CLI",
            ),
            Parameter(
                "skip_exit",
                "When draining listeners, drain the connections but never stop the listeners. The graceful parameter has no effect when this is set, since "
                "the drain period only delays stopping the listeners",
            ),
            Parameter(
                "inboundonly",
                "Drains all inbound listeners. traffic_direction field in envoy_v3_api_msg_config.listener.v3.Listener is used to determine whether a "
                "listener is inbound or outbound.",
            ),
        ),
    ),
    Endpoint("/healthcheck/fail", "cause the server to fail health checks", "control:healthcheck_fail", mutates=True),
    Endpoint("/healthcheck/ok", "cause the server to pass health checks", "control:healthcheck_ok", mutates=True),
    Endpoint("/heap_dump", "dump current Envoy heap (if supported)", "profiling:heap_dump"),
    Endpoint(
        "/heapprofiler",
        "enable/disable the heap profiler",
        "profiling:heapprofiler",
        mutates=True,
        parameters=(Parameter("enable", "enable/disable the heap profiler", _YES_NO),),
    ),
    Endpoint("/help", "print out list of admin commands", "index:help_page"),
    Endpoint("/hot_restart_version", "print the hot restart compatibility version", "info:hot_restart_version"),
    Endpoint(
        "/init_dump",
        "dump current Envoy init manager information (experimental)",
        "info:init_dump",
        parameters=(
            Parameter(
                "mask",
                "The desired component to dump unready targets. The mask is parsed as a Protobuf::FieldMask. For example, get the unready targets of all "
                "listeners with /init_dump?mask=listener`",
            ),
        ),
    ),
    Endpoint("/listeners", "print listener info", "listeners:listeners", parameters=(Parameter("format", "File format to use", ("text", "json")),)),
    Endpoint(
        "/logging",
        "query/change logging levels",
        "logging:log_levels",
        mutates=True,
        parameters=(
            Parameter(
                "paths",
                "Change multiple logging levels by setting to <logger_name1>:<desired_level1>,<logger_name2>:<desired_level2>. If fine grain logging is "
                "enabled, use __FILE__ or a glob experision as the logger name. For example, source/common*:warning",
            ),
            Parameter(
                "group",
                "Change given logger group to desired level, set to <logger_group_name>:<desired_level>. logger_group_name must be a logger name.",
            ),
            Parameter(
                "level",
                "desired logging level, this will change all loggers's level",
                ("", "trace", "debug", "info", "warning", "error", "critical", "off"),
            ),
        ),
    ),
    Endpoint("/memory", "print current allocation/heap usage", "info:memory"),
    Endpoint("/memory/tcmalloc", "print TCMalloc stats", "info:tcmalloc"),
    Endpoint("/peak_heap_dump", "dump peak Envoy heap (if supported)", "profiling:heap_dump"),
    Endpoint("/quitquitquit", "exit the server", "control:quit_server", mutates=True),
    Endpoint("/ready", "print server state, return 200 if LIVE, otherwise return 503", "info:ready"),
    Endpoint("/reopen_logs", "reopen access logs", "control:reopen_logs", mutates=True),
    Endpoint("/reset_counters", "reset all counters to zero", "control:reset_counters", mutates=True),
    Endpoint("/runtime", "print runtime values", "runtime:runtime"),
    Endpoint(
        "/runtime_modify",
        "Adds or modifies runtime values as passed in query parameters. To delete a previously added key, use an empty string as the value. Note that "
        "deletion only applies to overrides added via this endpoint; values loaded from disk can be modified via override but not deleted. E.g. "
        "?key1=value1&key2=value2...",
        "runtime:runtime_modify",
        mutates=True,
    ),
    Endpoint("/server_info", "print server version/status information", "info:server_info"),
    Endpoint(
        "/stats",
        "print server stats",
        "stats:stats",
        parameters=(
            _STATS_USED,
            _STATS_FILTER,
            _STATS_INVERT,
            Parameter("format", "Format to use", ("html", "active-html", "text", "json")),
            Parameter("type", "Stat types to include.", ("All", "Counters", "Histograms", "Gauges", "TextReadouts")),
            Parameter("histogram_buckets", "Histogram bucket display mode", ("cumulative", "disjoint", "detailed", "summary")),
        ),
    ),
    Endpoint(
        "/stats/prometheus",
        "print server stats in prometheus format",
        "stats:prometheus",
        parameters=(
            _STATS_USED,
            Parameter("text_readouts", "Render text_readouts as new gaugues with value 0 (increases Prometheus data size)"),
            _STATS_FILTER,
            _STATS_INVERT,
            Parameter("histogram_buckets", "Histogram bucket display mode", ("cumulative", "summary")),
        ),
    ),
    Endpoint("/stats/recentlookups", "Show recent stat-name lookups", "stats:recent_lookups"),
    Endpoint("/stats/recentlookups/clear", "clear list of stat-name lookups and counter", "stats:recent_lookups_switch", mutates=True),
    Endpoint("/stats/recentlookups/disable", "disable recording of reset stat-name lookup names", "stats:recent_lookups_switch", mutates=True),
    Endpoint("/stats/recentlookups/enable", "enable recording of reset stat-name lookup names", "stats:recent_lookups_switch", mutates=True),
)
# What Envoy has not, and what /help does not list, therefore: programs compare its text.
OURS = (Endpoint("/v3/discovery:client_status", "what became of each resource that is subscribed to (CSDS)", "client_status:client_status"),)
_BY_PATH = {endpoint.path: endpoint for endpoint in (*ENDPOINTS, *OURS)}


def handle(request: Request, server: Server) -> Response | Awaitable[Response]:
    """Answer one admin request."""
    endpoint = _BY_PATH.get(request.path)
    if endpoint is None:
        return Response("invalid path. " + help_text(), 404)
    if endpoint.mutates and request.method != "POST":
        return Response(f"Method {request.method} not allowed, POST required.", 405)
    module, _, function = endpoint.handler.partition(":")
    handler = getattr(import_module(f"meshproxy.admin.{module}"), function)
    return handler(request, server)


def help_text() -> str:
    """The list of commands, as /help prints it."""
    return "admin commands are:\n" + "".join(endpoint.lines for endpoint in ENDPOINTS)
