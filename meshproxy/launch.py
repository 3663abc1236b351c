"""The way from the command line to a running main process, in the order that makes it short.

A child reads, checks and dry-run compiles the configuration while this process imports the rest of the proxy. So main never holds what only checking needs
(the YAML parser, the constraints, a throw-away compilation of everything), and on two cores the check costs no time. Both start from what they have in
common, which is imported before.
"""

from __future__ import annotations

import gc
import logging
import sys
from typing import TYPE_CHECKING, Any

from meshproxy import logs, process, worker
from meshproxy.api.errors import ConfigError, Problem

if TYPE_CHECKING:
    from meshproxy.cli import Options

log = logging.getLogger("meshproxy.main")


def run(options: Options) -> int:
    """The life of a proxy; returns the exit status."""
    try:
        levels, handler = _set_up_logs(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    plan = worker.Plan(options=options, concurrency=options.concurrency or process.cpu_count(), levels=levels, log_handler=handler)
    errand = process.Errand(lambda: _check(plan))
    if options.mode != "validate":
        from meshproxy import supervisor
    serialised, problems, warnings = errand.result()
    try:
        if problems:
            raise ConfigError(Problem(*fields) for fields in problems)
        for fields in warnings:
            log.warning("not honoured: %s", Problem(*fields))
        if options.mode == "validate":
            print(f"configuration '{options.config_path}' OK")
            return 0
        main = supervisor.Supervisor(_adopt(plan, serialised), plan)
    except ConfigError as error:
        print(f"error initializing configuration '{options.config_path}':\n{error}", file=sys.stderr)
        return 1
    # Nothing made so far is garbage, and there is a lot of it: the first collection shall not look at it.
    gc.freeze()
    gc.enable()
    return main.serve()


def _set_up_logs(options: Options) -> tuple[logs.Levels, logs.Handler]:
    pattern = options.log_format or logs.DEFAULT_FORMAT
    if options.log_format_escaped:
        pattern = pattern.replace("%v", "%_")
    try:
        return logs.set_up(logs.parse_level(options.log_level), options.component_log_level, pattern, options.log_path or None)
    except OSError as error:
        raise ConfigError(f"cannot open log file '{options.log_path}': {error.strerror}") from error


def _check(plan: worker.Plan) -> tuple[bytes, list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """In the child: the serialised bootstrap, and the problems and warnings as plain data."""
    from meshproxy.api import bootstrap as bootstraps

    def dry_run(bootstrap: Any) -> None:
        plan.node = node_of(bootstrap, plan.options)
        worker.dry_run(bootstrap, plan)

    options = plan.options
    try:
        bootstrap, warnings = bootstraps.validate(options.config_path or None, options.config_yaml, unsupported=options.unsupported, dry_run=dry_run)
    except ConfigError as error:
        return b"", [_plain(problem) for problem in error.problems], []
    return bootstrap.SerializeToString(), [], [_plain(problem) for problem in warnings]


def _plain(problem: Problem) -> tuple[str, str, str]:
    return problem.path, problem.why, problem.kind


def _adopt(plan: worker.Plan, serialised: bytes) -> Any:
    """Complete the plan with the checked configuration; returns it as a message."""
    from envoy.config.bootstrap.v3 import bootstrap_pb2

    bootstrap = bootstrap_pb2.Bootstrap.FromString(serialised)
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
