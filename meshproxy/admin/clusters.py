"""/clusters: every cluster with its limits and hosts, as the workers that use it say, or as it is configured when none does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import re2

from meshproxy.admin.message import JSON, Request, Response
from meshproxy.upstream import status

if TYPE_CHECKING:
    from meshproxy.server import Server


async def clusters(request: Request, server: Server) -> Response:
    """Text, or JSON (envoy.admin.v3.Clusters) with `format=json`; `filter` is an RE2 that is searched in names."""
    pattern = request.query.get("filter", "")
    options = re2.Options()
    options.log_errors = False
    try:
        search = re2.compile(pattern, options).search
    except re2.error:
        return Response("Invalid re2 regex", 400)
    snapshots = await server.collect("clusters")
    statuses = status.collect(server.clusters, snapshots, lambda name: not pattern or search(name) is not None)
    if request.query.get("format") == "json":
        return Response(status.render_json(statuses), content_type=JSON)
    return Response(status.render_text(statuses))
