"""/logging: show and change the level of Envoy's loggers, in main and in every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy import logs
from meshproxy.admin.message import Request, Response

if TYPE_CHECKING:
    from meshproxy.server import Server

_USAGE = """
usage: /logging?<name>=<level> (change single level)
usage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)
usage: /logging?level=<level> (change all levels)
usage: /logging?group=<group_name>:<level> (change group of loggers)
"""


class _Refused(Exception):
    """The parameters make no sense; the text is Envoy's."""


def log_levels(request: Request, server: Server) -> Response:
    """With no parameter, or an empty value, nothing changes; either way all levels are listed."""
    try:
        changes = _parse(request.query)
    except _Refused as refused:
        levels = "levels: " + "".join(f"{level} " for level in logs.LEVELS)
        return Response(f"error: {refused}\n{_USAGE}{levels}\n{_listing(server)}", 400)
    if changes:
        server.change_log_levels(changes)
    return Response(_listing(server))


def _listing(server: Server) -> str:
    return "active loggers:\n" + "".join(f"  {name}: {level}\n" for name, level in server.levels.by_component.items()) + "\n"


def _parse(query: dict[str, str]) -> dict[str, str]:
    if not query:
        return {}
    if len(query) > 1:
        raise _Refused("invalid number of parameters")
    [(name, value)] = query.items()
    if not value:
        return {}
    if name == "group":
        raise _Refused("group parameter requires fine-grain logging to be enabled")
    if name == "level":
        return dict.fromkeys(logs.COMPONENTS, _level(value))
    if name != "paths":
        return {_logger(name): _level(value)}
    changes = {}
    for entry in value.split(","):
        logger, _, level = entry.partition(":")
        if not logger or not level:
            raise _Refused("empty logger name or empty logger level")
        changes[logger] = _level(level)
    return {_logger(logger): level for logger, level in changes.items()}


def _level(text: str) -> str:
    if text not in logs.LEVELS:
        raise _Refused("unknown logger level")
    return text


def _logger(name: str) -> str:
    if name not in logs.COMPONENTS:
        raise _Refused("unknown logger name")
    return name
