"""/stats and its relatives: what all processes have counted, brought up to date first, in the format asked for."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from meshproxy.admin.message import HTML, JSON, OK, Request, Response
from meshproxy.api.errors import ConfigError
from meshproxy.observe import stats_render

if TYPE_CHECKING:
    from meshproxy.server import Server

_PAGE = """<!DOCTYPE html>
<html lang='en'>
<head><meta charset='utf-8'><title>meshproxy stats</title></head>
<body><p><a href='/'>admin</a></p><pre>
{}</pre></body>
</html>
"""


async def stats(request: Request, server: Server) -> Response:
    """Text by default; `format` is json, prometheus, html or active-html (the same page)."""
    if request.query.get("format") == "prometheus":
        return await prometheus(request, server)
    try:
        selection = _selection(request)
    except ConfigError as error:
        return Response(str(error), 400)
    await server.collect_stats()
    config = server.stats_config
    if request.query.get("format") == "json":
        return Response(stats_render.render_json(server.stats, config, selection), content_type=JSON)
    pieces = stats_render.render_text(server.stats, config, selection)
    if request.query.get("format") in ("html", "active-html"):
        return Response(_page(pieces), content_type=HTML)
    return Response(pieces)


def _page(pieces: Iterator[str]) -> Iterator[str]:
    before, after = _PAGE.split("{}")
    yield before
    # Stat names hold names of clusters and listeners, which others choose.
    yield from map(escape, pieces)
    yield after


async def prometheus(request: Request, server: Server) -> Response:
    """The exposition format of Prometheus."""
    from meshproxy.observe.prometheus import render_prometheus

    try:
        selection = _selection(request)
        await server.collect_stats()
        return Response(render_prometheus(server.stats, server.stats_config, selection))
    except ConfigError as error:
        return Response(str(error), 400)


def _selection(request: Request) -> stats_render.Selection:
    return stats_render.parse_selection({name: value for name, value in request.query.items() if value or name not in ("format", "type")})


def recent_lookups(request: Request, server: Server) -> Response:
    """/stats/recentlookups: our stats are never looked up by name, so there is nothing to record."""
    return Response("Lookup tracking is not enabled. Use /stats/recentlookups/enable to enable.\n\ntotal: 0\n")


def recent_lookups_switch(request: Request, server: Server) -> Response:
    """/stats/recentlookups/enable, /disable and /clear."""
    return OK
