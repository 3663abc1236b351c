"""The endpoints that change what the proxy does: draining, health, counters, log files, exit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.admin.message import OK, Request, Response

if TYPE_CHECKING:
    from meshproxy.server import Server


def drain_listeners(request: Request, server: Server) -> Response:
    """/drain_listeners: connections are told at once; listeners stop at once, after the drain time (`graceful`), or never (`skip_exit`)."""
    server.drain_listeners(
        inbound_only="inboundonly" in request.query,
        graceful="graceful" in request.query,
        keep_listeners="skip_exit" in request.query,
    )
    return OK


def healthcheck_fail(request: Request, server: Server) -> Response:
    """/healthcheck/fail: the health_check filter answers 503, /ready says DRAINING."""
    server.fail_health_checks(True)
    return OK


def healthcheck_ok(request: Request, server: Server) -> Response:
    """/healthcheck/ok: undoes /healthcheck/fail."""
    server.fail_health_checks(False)
    return OK


def quit_server(request: Request, server: Server) -> Response:
    """/quitquitquit: exit after this answer, without draining."""
    server.shut_down()
    return OK


def reopen_logs(request: Request, server: Server) -> Response:
    """/reopen_logs: access logs of all workers (and the application log)."""
    server.reopen_logs()
    return OK


async def reset_counters(request: Request, server: Server) -> Response:
    """/reset_counters: what workers have counted so far is gathered first, so that nothing from before shows up after."""
    await server.collect_stats()
    server.reset_counters()
    return OK
