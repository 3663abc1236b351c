"""The way from the command line to a running main process, in the order that makes it short.

One child reads the configuration (and makes a message of it, if it is large) while this process imports what is needed to check it; a second one checks
and dry-run compiles it while this process imports the rest. So main never holds what only checking needs (the YAML parser, the constraints, a throw-away
compilation of everything), and on two cores much of the work costs no time. What is imported when is what this file is about, so it imports inside
functions: docs/decisions/0005-start-up.md.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from meshproxy import process, start_cache
from meshproxy.api import document
from meshproxy.api.errors import DEPRECATED, UNKNOWN, ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshproxy import logs, worker
    from meshproxy.cli import Options

_BOOTSTRAP = "envoy.config.bootstrap.v3.Bootstrap"
_Problems = list[tuple[str, str, str]]  # as plain data, for the way from a child
_LARGE_TEXT = 300_000  # bytes of a file that takes longer to convert than what that needs takes to import once more
_LARGE = 100_000  # bytes of a bootstrap that takes longer to compile than another child takes to start


def run(options: Options) -> int:
    """The life of a proxy; returns the exit status."""
    reading = process.Errand(lambda: _read(options))
    start_cache.end_group()
    from meshproxy.api import messages

    # What the second child needs for nearly every configuration, and main too.
    messages.known(_BOOTSTRAP)
    messages.known("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager")
    start_cache.end_group()
    from meshproxy import worker
    from meshproxy.http import manager  # noqa: F401

    try:
        levels, handler = _set_up_logs(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    plan = worker.Plan(options=options, concurrency=options.concurrency or process.cpu_count(), levels=levels, log_handler=handler)
    start_cache.end_group()
    checking = process.Errand(lambda: _check(plan, *reading.read()))
    reading.close()
    if options.mode != "validate":
        from meshproxy import supervisor

        start_cache.keep(wait=options.mode == "init_only")
    serialised, problems, warnings = checking.read()
    try:
        if problems:
            raise ConfigError(_problems(problems))
        _warn(_problems(warnings), plan)
        if options.mode == "validate":
            print(f"configuration '{options.config_path}' OK")
            return 0
        main = supervisor.Supervisor(_adopt(plan, serialised), plan)
    except ConfigError as error:
        print(f"error initializing configuration '{options.config_path}':\n{error}", file=sys.stderr)
        return 1
    for errand in (reading, checking):
        errand.wait()
    # Nothing made so far is garbage, and there is a lot of it: the first collection shall not look at it.
    gc.freeze()
    gc.enable()
    return main.serve()


def _warn(warnings: list[Problem], plan: worker.Plan) -> None:
    import logging

    log = logging.getLogger("meshproxy.main")
    for problem in warnings:
        if problem.kind != DEPRECATED or not plan.options.skip_deprecated_logs:
            log.warning("%s: %s", {UNKNOWN: "unknown field", DEPRECATED: "deprecated field"}.get(problem.kind, "not honoured"), problem)
    plan.unknown_fields = sum(problem.kind == UNKNOWN for problem in warnings)
    plan.deprecated_fields = sum(problem.kind == DEPRECATED for problem in warnings)


def _set_up_logs(options: Options) -> tuple[logs.Levels, logs.Handler]:
    from meshproxy import logs

    pattern = options.log_format or logs.DEFAULT_FORMAT
    if options.log_format_escaped:
        pattern = pattern.replace("%v", "%_")
    try:
        return logs.set_up(logs.parse_level(options.log_level), options.component_log_level, pattern, options.log_path or None)
    except OSError as error:
        raise ConfigError(f"cannot open log file '{options.log_path}': {error.strerror}") from error


def _read(options: Options) -> tuple[list[document.Source], _Problems, _Problems]:
    """In the first child: the configuration as plain data or, when it is large, as a message; or what is wrong with it, and warnings."""
    large = _is_large(options.config_path) and process.cpu_count() > 1
    if not large:
        start_cache.leave()  # of what is kept together, this child needs little
    try:
        sources = document.read(options.config_path or None, options.config_yaml)
        if large:
            bootstrap, warnings = _convert(sources, options)
            return [("pb", bootstrap.SerializeToString())], [], _plain(warnings)
    except ConfigError as error:
        return [], _plain(error.problems), []
    return sources, [], []


def _is_large(path: str) -> bool:
    try:
        return os.path.getsize(path) > _LARGE_TEXT
    except OSError:
        return False  # none was given, or it went away after it was read


def _convert(sources: list[document.Source], options: Options) -> tuple[Any, list[Problem]]:
    """The bootstrap, and warnings of fields that the API does not have, where they are allowed."""
    from meshproxy.api import messages  # noqa: F401, I001  before any part of protobuf: it defers what we do not need of that
    from meshproxy.api import bootstrap as bootstraps

    unknown: list[Problem] = []
    allowed = options.allow_unknown_static_fields or options.allow_unknown_fields
    return bootstraps.from_sources(sources, unknown if allowed else None), unknown


def _check(plan: worker.Plan, sources: list[document.Source], problems: _Problems, warnings: _Problems) -> tuple[bytes, _Problems, _Problems]:
    """In the second child: the serialised bootstrap, problems and warnings."""
    if problems:
        return b"", problems, []
    from meshproxy.api import bootstrap as bootstraps

    try:
        bootstrap, unknown = _convert(sources, plan.options)
        early = bootstrap.ByteSize() > _LARGE and process.cpu_count() > 1
        compiling = process.Errand(lambda: _compile_early(bootstrap, plan)) if early else None

        def dry_run(bootstrap: Any) -> None:
            problems = compiling.result() if compiling is not None else None
            if problems is None:
                problems = _compile(bootstrap, plan)
            if problems:
                raise ConfigError(_problems(problems))

        unknown += bootstraps.check(bootstrap, plan.options.unsupported, dry_run)
    except ConfigError as error:
        return b"", _plain(error.problems), []
    return bootstrap.SerializeToString(), [], warnings + _plain(unknown)


def _compile(bootstrap: Any, plan: worker.Plan) -> _Problems:
    """What only compiling everything shows."""
    from meshproxy import worker

    plan.node = node_of(bootstrap, plan.options)
    try:
        worker.dry_run(bootstrap, plan)
    except ConfigError as error:
        return _plain(error.problems)
    return []


def _compile_early(bootstrap: Any, plan: worker.Plan) -> _Problems | None:
    """The same in a third child, while the second one still finds out whether the declared constraints hold: if they do not, anything may happen here."""
    try:
        return _compile(bootstrap, plan)
    except Exception:  # noqa: BLE001  who needs the result compiles once more, and fails where it is seen
        return None


def _plain(problems: Iterable[Problem]) -> _Problems:
    return [(problem.path, problem.why, problem.kind) for problem in problems]


def _problems(plain: _Problems) -> list[Problem]:
    return [Problem(*fields) for fields in plain]


def _adopt(plan: worker.Plan, serialised: bytes) -> Any:
    """Complete the plan with the checked configuration; returns it as a message."""
    from meshproxy.api import messages

    bootstrap = messages.known(_BOOTSTRAP).FromString(serialised)
    plan.bootstrap = serialised
    plan.node = node_of(bootstrap, plan.options)
    if plan.concurrency > 1:
        from meshproxy.net.shared import Cells

        plan.cells = Cells.create()
    return bootstrap


def node_of(bootstrap: Any, options: Options) -> Any:
    """The bootstrap's node, with what the command line says about it."""
    node = type(bootstrap.node)()
    node.CopyFrom(bootstrap.node)
    node.id = options.service_node or node.id
    node.cluster = options.service_cluster or node.cluster
    if options.service_zone:
        node.locality.zone = options.service_zone
    node.user_agent_name = "meshproxy"
    return node
