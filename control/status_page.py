"""What a control plane says of itself over HTTP, for probes and people: no configuration, no names of objects that are right.

/healthz  200 as long as the process runs
/readyz   200 when xDS is served, 503 before
/status   JSON: the sources, what is wrong with documents, and which issuers of tokens have said their keys
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from control.app import Mesh
    from control.sources.issuers import Issuers


class StatusPage:
    """Serves the paths above. `ready`: set by whoever knows."""

    def __init__(self, mesh: Mesh, issuers: Issuers | None = None) -> None:
        self.ready = False
        self.address = ""
        self._mesh = mesh
        self._issuers = issuers
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/status", self._status)
        self._runner = web.AppRunner(application, access_log=None)

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n") if self.ready else web.Response(status=503, text="the sources are not read yet\n")

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(self.status())

    def status(self) -> dict[str, Any]:
        """As /status has it."""
        mesh = self._mesh
        cluster = mesh.cluster.statistics() if mesh.cluster is not None else []
        return {
            "ready": self.ready,
            "objects": len(mesh.store.objects),
            "complaints": [str(one) for one in mesh.troubles],
            "folder": mesh.folder.path if mesh.folder is not None else None,
            "kubernetes": [{**one._asdict(), "state": one.state.value} for one in cluster],
            "issuers": [one._asdict() for one in self._issuers.statistics()] if self._issuers is not None else [],
        }
