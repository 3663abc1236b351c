"""An agent beside a proxy that cannot hold an identity itself, such as the real Envoy: it gets the certificate and serves it by SDS over a Unix socket.

    agent = Agent(WorkloadSource(GrpcCalls(channel), Wish(identity)), "/run/mesh/web.sock")
    await agent.start()

The proxy's bootstrap has a cluster of the socket (HTTP/2), and its TLS contexts name the secrets `default` and `ROOTCA` with that cluster as their source.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import grpc

from control.ca.files import IdentityFiles
from control.ca.sds import SecretService
from control.ca.server import UnixFront
from meshproxy.identity.provider import Provider
from meshproxy.identity.svid import Svid

log = logging.getLogger("meshctl.agent")


class Source(Protocol):
    """Where the identity comes from: `meshproxy.identity.workload.WorkloadSource` or `spire.SpireSource`."""

    def run(self, publish: Callable[[Svid], None]) -> Coroutine[Any, Any, None]: ...


class Agent:
    """Serves one identity. `mode`: of the socket; private keys go through it, so it is the owner's alone unless the proxy is another user's. `files`: a folder
    where it is written, too, see `IdentityFiles`."""

    def __init__(self, source: Source, path: str, *, mode: int = 0o600, files: str = "") -> None:
        self.provider = Provider()
        self._files = IdentityFiles(files) if files else None
        self.service = SecretService(self.provider)
        self._source = source
        self._front = UnixFront(path, mode)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers(self.service.handlers())
        self._server.add_insecure_port(self._front.inner)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and get the identity; proxies that ask meanwhile wait. Raises OSError when the socket cannot be made."""
        await self._server.start()
        try:
            await self._front.start()
        except OSError:
            await self._server.stop(None)
            raise
        self._task = asyncio.create_task(self._source.run(self._publish), name="agent: identity")
        self._task.add_done_callback(_ended)

    def _publish(self, svid: Svid) -> None:
        self.provider.publish(svid)
        if self._files is not None:
            self._files.publish(svid)

    async def stop(self) -> None:
        """Close the socket."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._server.stop(None)
        await self._front.stop()


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the identity is renewed no more: %s", task.exception())
