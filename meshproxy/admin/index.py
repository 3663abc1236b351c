"""/ and /help: what people see first. The page has no script and takes nothing from the request or from stat names, so it has nothing to escape wrongly."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from meshproxy.admin import endpoints
from meshproxy.admin.message import HTML, Request, Response

if TYPE_CHECKING:
    from meshproxy.server import Server

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1a2433;background:#fff}
h1{font-size:1.4rem;margin:0}p{color:#5a6a80;margin:.2rem 0 1.5rem}
table{border-collapse:collapse;width:100%}td{border-top:1px solid #e3e8ef;padding:.4rem .5rem;vertical-align:top}
td:first-child{white-space:nowrap;font-family:ui-monospace,monospace}
form{margin:0}a,button{color:#0b62c4;font:inherit;background:none;border:0;padding:0;cursor:pointer;text-decoration:underline}
small{display:block;color:#5a6a80}label{display:block;font-size:.85rem;color:#5a6a80}input,select{font:inherit;margin-left:.4rem}
@media(prefers-color-scheme:dark){body{background:#10161f;color:#dde5ef}td{border-color:#26303d}a,button{color:#6db3ff}}
"""


def home(request: Request, server: Server) -> Response:
    """The index for people: every endpoint with its parameters as a form."""
    node = " · ".join(filter(None, (server.node.id, server.node.cluster))) or "no node id"
    rows = "".join(_row(endpoint) for endpoint in endpoints.ENDPOINTS if endpoint.path != "/")
    return Response(
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<title>meshproxy admin</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>meshproxy admin</h1>\n<p>{escape(node)} · {escape(server.state.name)}</p>\n"
        f"<table>\n{rows}</table>\n</body>\n</html>\n",
        content_type=HTML,
    )


def _row(endpoint: endpoints.Endpoint) -> str:
    path = escape(endpoint.path)
    method = "post" if endpoint.mutates else "get"
    if endpoint.mutates or endpoint.parameters:
        fields = "".join(map(_field, endpoint.parameters))
        # A POST keeps its parameters in the query, where the handlers look: the form's own encoding would put them into the body.
        action = f"<form action='{path}' method='{method}'><button>{path[1:]}</button>{fields if method == 'get' else ''}</form>"
    else:
        action = f"<a href='{path}'>{path[1:]}</a>"
    hints = "".join(f"<small>{escape(parameter.name)}: {escape(parameter.help)}</small>" for parameter in endpoint.parameters)
    return f"<tr><td>{action}</td><td>{escape(endpoint.help)}{hints}</td></tr>\n"


def _field(parameter: endpoints.Parameter) -> str:
    name = escape(parameter.name)
    if parameter.choices:
        options = "".join(f"<option>{escape(choice)}</option>" for choice in parameter.choices)
        return f"<label>{name}<select name='{name}'>{options}</select></label>"
    if parameter.name in ("usedonly", "text_readouts", "include_eds", "invert_filter"):
        return f"<label>{name}<input type='checkbox' name='{name}'></label>"
    return f"<label>{name}<input name='{name}'></label>"


def help_page(request: Request, server: Server) -> Response:
    """/help."""
    return Response(endpoints.help_text())
