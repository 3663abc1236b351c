"""/runtime and /runtime_modify: the layers of runtime values, and changing the admin layer in main and in every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.admin.message import JSON, OK, Request, Response, parse_query, to_json
from meshproxy.api.errors import ConfigError

if TYPE_CHECKING:
    from meshproxy.server import Server

_USAGE = (
    "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n"
    "       or send the parameters as form values\n"
    "use an empty value to remove a previously added override"
)


def runtime(request: Request, server: Server) -> Response:
    """Every key with its value in each layer; the last layer that has one wins."""
    return Response(to_json(server.runtime.dump()), content_type=JSON)


def runtime_modify(request: Request, server: Server) -> Response:
    """Parameters are overrides, from the query or from a form body; an empty value removes one."""
    changes = request.query
    if not changes and request.content_type == "application/x-www-form-urlencoded":
        changes = parse_query(request.body.decode("latin-1").replace("+", " "))
    if not changes:
        return Response(_USAGE, 400)
    try:
        server.override_runtime(changes)
    except ConfigError as error:
        return Response(str(error), 503)
    return OK
