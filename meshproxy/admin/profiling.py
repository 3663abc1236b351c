"""The profiler endpoints. Envoy answers that a build has no profiler; ours has none either, since perf and py-spy attach from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshproxy.admin.message import Request, Response

if TYPE_CHECKING:
    from meshproxy.server import Server


def cpuprofiler(request: Request, server: Server) -> Response:
    """/cpuprofiler."""
    if request.query.get("enable") not in ("y", "n"):
        return Response("?enable=<y|n>\n", 400)
    return Response("failure to start the profiler" if request.query["enable"] == "y" else "OK\n", 500 if request.query["enable"] == "y" else 200)


def heapprofiler(request: Request, server: Server) -> Response:
    """/heapprofiler."""
    return Response("The current build does not support heap profiler", 501)


def allocprofiler(request: Request, server: Server) -> Response:
    """/allocprofiler."""
    if request.query.get("enable") not in ("y", "n"):
        return Response("?enable=<y|n>\n", 400)
    return Response("The current build does not support allocation profiler", 501)


def heap_dump(request: Request, server: Server) -> Response:
    """/heap_dump and /peak_heap_dump."""
    return Response("The current build does not support heap dump", 501)
