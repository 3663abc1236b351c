"""The `meshproxy` command: Envoy's flags with Envoy's meanings.

The flags are a table, `FLAGS`; the parser below it is small because start-up time and memory of a sidecar count (argparse costs both). Everything that a
flag says ends up in `Options`, which main and the workers read.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from meshproxy.deferred import defer
from meshproxy.record import Record
from meshproxy.version import HOT_RESTART_VERSION, version_line


class Options(Record):
    """The command line, checked. Durations are seconds."""

    config_path: str = ""
    config_yaml: str = ""
    mode: str = "serve"  # serve, validate, init_only
    concurrency: int = 0  # 0: one worker a CPU that we may use
    service_node: str = ""
    service_cluster: str = ""
    service_zone: str = ""
    log_level: str = "info"
    component_log_level: str = ""
    log_format: str = ""
    log_format_escaped: bool = False
    log_path: str = ""
    admin_address_path: str = ""
    base_id: int = 0
    base_id_path: str = ""
    use_dynamic_base_id: bool = False
    restart_epoch: int = 0
    drain_time_s: int = 600
    drain_strategy: str = "gradual"  # gradual, immediate
    parent_shutdown_time_s: int = 900
    file_flush_interval_msec: int = 10_000
    file_flush_min_size_kb: int = 64
    local_address_ip_version: str = "v4"
    allow_unknown_static_fields: bool = False
    allow_unknown_fields: bool = False
    config_cache: str = ""
    reject_unknown_dynamic_fields: bool = False
    ignore_unknown_dynamic_fields: bool = False
    skip_deprecated_logs: bool = False
    stats_tag: tuple[str, ...] = ()  # each name:value
    disable_hot_restart: bool = False
    cpuset_threads: bool = False
    enable_fine_grain_logging: bool = False
    enable_mutex_tracing: bool = False
    enable_core_dump: bool = False
    log_stacktrace_single_entry: bool = False
    skip_hot_restart_on_no_parent: bool = False
    skip_hot_restart_parent_stats: bool = False
    socket_path: str = "@envoy_domain_socket"
    socket_mode: str = ""
    unsupported: str = "reject"  # reject, warn


class UsageError(Exception):
    """A command line that cannot be understood; the text says why and what to do."""


class Flag(Record, frozen=True):
    """One flag. `kind` is str, int (unsigned 32 bits), bool (a switch) or tuple (text, may be given again); `attribute` of Options is the name with _."""

    name: str
    kind: type
    help: str
    short: str = ""
    choices: tuple[str, ...] = ()
    complaint: str = ""  # Envoy's words for a wrong choice

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def usage(self) -> str:
        value = {str: "<string>", int: "<uint32_t>", bool: "", tuple: "<string>"}[self.kind]
        names = f"-{self.short}, --{self.name}" if self.short else f"--{self.name}"
        return f"{names} {value}".rstrip()


_NO_HOT_RESTART = "Accepted for compatibility: hot restart does not exist yet, so it changes nothing."

FLAGS = (
    Flag("config-path", str, "Bootstrap configuration file, YAML or JSON by its extension (.yaml, .yml, .json, .pb, .pb_text).", short="c"),
    Flag("config-yaml", str, "Bootstrap configuration as inline YAML; merged over the contents of --config-path."),
    Flag(
        "mode",
        str,
        "'serve' (default): check the configuration, then serve. 'validate': check it and exit. 'init_only': start completely, then exit.",
        choices=("serve", "validate", "init_only"),
        complaint="unknown mode '{}'",
    ),
    Flag("concurrency", int, "Number of worker processes; default: the number of CPUs that this process may run on."),
    Flag("service-node", str, "Node id; overrides node.id of the bootstrap."),
    Flag("service-cluster", str, "Service cluster name; overrides node.cluster of the bootstrap."),
    Flag("service-zone", str, "Zone; overrides node.locality.zone of the bootstrap."),
    Flag("log-level", str, "Application log level: trace, debug, info (default), warning or warn, error, critical, off.", short="l"),
    Flag("component-log-level", str, "Levels of single components: upstream:debug,config:trace. They override --log-level."),
    Flag("log-format", str, 'Application log line as an spdlog pattern. Default "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v".'),
    Flag("log-format-escaped", bool, "Escape C-style escape sequences in the application log, so that an entry stays on one line."),
    Flag("log-path", str, "Application log file; default: standard error. SIGUSR1 opens it again."),
    Flag("admin-address-path", str, "File to write the admin server's address to, once it listens."),
    Flag("drain-time-s", int, "How long draining may take: /drain_listeners?graceful, SIGTERM. Default 600."),
    Flag(
        "drain-strategy",
        str,
        "'gradual' (default): while draining, the share of answers that close their connection grows from 0 to 100 %. 'immediate': all of them do.",
        choices=("gradual", "immediate"),
        complaint="unknown drain-strategy '{}'",
    ),
    Flag(
        "unsupported",
        str,
        "Not an Envoy flag. What to do with a configuration field that is valid, but that we do not honour: 'reject' (default) or 'warn'.",
        choices=("reject", "warn"),
        complaint="unknown --unsupported value '{}'",
    ),
    Flag("allow-unknown-static-fields", bool, "Warn about fields of the bootstrap that the Envoy API does not know, instead of rejecting them."),
    Flag("allow-unknown-fields", bool, "Old name of --allow-unknown-static-fields."),
    Flag(
        "config-cache",
        str,
        "Not an Envoy flag. Folder to keep the last accepted dynamic configuration in, without secrets: used while the control plane is away after a restart.",
    ),
    Flag("reject-unknown-dynamic-fields", bool, "Reject dynamic resources in files with unknown fields instead of warning about them."),
    Flag("ignore-unknown-dynamic-fields", bool, "Do not warn about unknown fields of dynamic resources in files."),
    Flag("skip-deprecated-logs", bool, "Do not warn about deprecated fields; they are still counted (runtime.deprecated_feature_use)."),
    Flag("stats-tag", tuple, "A tag of every stat, as name:value. May be given again."),
    Flag("file-flush-interval-msec", int, "How long an access log line may wait in memory. Default 10000; we write after a second at the latest."),
    Flag("file-flush-min-size-kb", int, "How much access log may wait in memory. Default 64."),
    Flag(
        "local-address-ip-version",
        str,
        "IP version of the local address: v4 (default) or v6.",
        choices=("v4", "v6"),
        complaint="unknown IP address version '{}'",
    ),
    Flag("cpuset-threads", bool, "Count the CPUs of the cpuset when --concurrency is absent; we always do."),
    Flag("base-id", int, _NO_HOT_RESTART),
    Flag("base-id-path", str, "File to write the base id to."),
    Flag("use-dynamic-base-id", bool, _NO_HOT_RESTART),
    Flag("restart-epoch", int, _NO_HOT_RESTART + " Only 0 can start, as there is no parent to take over from."),
    Flag("parent-shutdown-time-s", int, _NO_HOT_RESTART + " Default 900."),
    Flag("disable-hot-restart", bool, "Accepted: it is always disabled."),
    Flag("skip-hot-restart-on-no-parent", bool, _NO_HOT_RESTART),
    Flag("skip-hot-restart-parent-stats", bool, _NO_HOT_RESTART),
    Flag("socket-path", str, _NO_HOT_RESTART),
    Flag("socket-mode", str, _NO_HOT_RESTART),
    Flag("enable-fine-grain-logging", bool, "Accepted: every Python module has its own logger anyway."),
    Flag("enable-mutex-tracing", bool, "Accepted: workers share no locks, so there is no contention to trace."),
    Flag("enable-core-dump", bool, "Accepted: a worker that crashes logs its traceback and is replaced."),
    Flag("log-stacktrace-single-entry", bool, "Accepted: a traceback is always one entry."),
)
_BY_NAME = {f"--{flag.name}": flag for flag in FLAGS} | {f"-{flag.short}": flag for flag in FLAGS if flag.short}
_REFUSED = {
    "--disable-extensions": "is not supported: extensions that the configuration does not use are never loaded, and there is no list to take others from",
}
_OTHERS = ("--version", "--help", "-h", "--hot-restart-version")


def parse(arguments: Sequence[str]) -> Options | str:
    """Options, or the text to print when the command line only asks for one (--version, --help). Raises UsageError."""
    values: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-h", "--help"):
            return help_text()
        if argument == "--version":
            return version_line()
        if argument == "--hot-restart-version":
            return HOT_RESTART_VERSION
        if argument in ("--", "--ignore_rest"):
            break
        name, equals, value = argument.partition("=") if argument.startswith("--") else (argument, "", "")
        flag = _BY_NAME.get(name)
        if flag is None:
            raise UsageError(_unknown(argument))
        if flag.attribute in values and flag.kind is not tuple:
            raise UsageError(f"{flag.usage}: given twice")
        if flag.kind is bool:
            if equals:
                raise UsageError(f"{flag.usage}: takes no value")
            values[flag.attribute] = True
            continue
        if not equals:
            value = next(rest, None)  # type: ignore[assignment]
            if value is None:
                raise UsageError(f"{flag.usage}: missing a value")
        if flag.kind is tuple:
            values[flag.attribute] = (*values.get(flag.attribute, ()), _stats_tag(value))
        else:
            values[flag.attribute] = _convert(flag, value)
    options = Options(**values)
    if options.restart_epoch:
        raise UsageError(f"--restart-epoch {options.restart_epoch}: there is no parent to take over from: hot restart does not exist yet. Use 0.")
    return options


def _convert(flag: Flag, value: str) -> str | int:
    if flag.kind is int:
        # Envoy's parser takes any strtoul text; we want the number that is meant.
        if not (value.isascii() and value.isdecimal()) or int(value) >= 1 << 32:
            raise UsageError(f"{flag.usage}: '{value}' is not a number between 0 and 4294967295")
        return int(value)
    if flag.choices and value not in flag.choices:
        raise UsageError(f"{flag.complaint.format(value)}; one of {', '.join(flag.choices)}")
    return value


def _stats_tag(value: str) -> str:
    name, colon, rest = value.partition(":")
    if not colon:
        raise UsageError(f"misformatted stats-tag '{value}': it must be name:value")
    if not (name.isascii() and name.isalnum()):
        raise UsageError(f"misformatted stats-tag '{value}' contains invalid char in '{name}': a name is made of letters and digits")
    if not rest or "." in rest:
        raise UsageError(f"misformatted stats-tag '{value}' contains invalid char in '{rest}': a value is not empty and has no dots")
    return value


def _unknown(argument: str) -> str:
    import difflib

    name = argument.partition("=")[0]
    if name in _REFUSED:
        return f"{name} {_REFUSED[name]}"
    if not name.startswith("-"):
        return f"'{argument}' is not a flag. A configuration file is given as: -c {argument}"
    close = difflib.get_close_matches(name, [*_BY_NAME, *_OTHERS], n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else "; see --help"
    return f"unknown flag {name}{hint}"


def help_text() -> str:
    """All flags, each with what it does."""
    import textwrap

    lines = ["usage: meshproxy -c <config-path> [flags]", "", "An Envoy-compatible sidecar proxy: Envoy's bootstrap, Envoy's flags.", ""]
    entries = [*((flag.usage, flag.help) for flag in FLAGS)]
    entries += [
        ("--hot-restart-version", "Print the hot restart compatibility version and exit."),
        ("--version", "Print the version and exit."),
        ("-h, --help", "Print this text and exit."),
        ("--, --ignore_rest", "Ignore everything after it."),
    ]
    for usage, text in entries:
        lines += [f"  {usage}", *textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")]
    lines += [
        "",
        "Signals: SIGTERM drains, then exits (at the latest after --drain-time-s); a second one, or SIGINT, exits at once. SIGUSR1 opens log files again.",
        "Exit status: 0, or 1 after an error.",
    ]
    return "\n".join(lines)


def defer_little_used() -> None:
    """Import later, if ever, what others import for little.

    asyncio and protobuf do, for tracebacks and dates in words: it compiles patterns, and makes large tables. Only uvloop looks into inspect.
    """
    defer("calendar", "inspect", "linecache", "locale", "textwrap", "tokenize")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `meshproxy` command."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if isinstance(options, str):
        print(options)
        sys.exit(0)
    # Importing makes no garbage worth a collection; `launch` turns the collector on again.
    gc.disable()
    defer_little_used()
    # Only now: --help and mistakes are answered without loading the proxy.
    from meshproxy import launch

    status = launch.run(options)
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing of value happens in interpreter shutdown, and it would touch every shared page.
    os._exit(status)
