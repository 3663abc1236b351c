"""The control plane as a process: a folder, a cluster or both are watched, snapshots are made of them and served. Everything is wired together here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from control.ads.hub import Hub, Scope
from control.ads.server import Identify, XdsServer
from control.kinds.store import Store, Trouble
from control.model.security import DEFAULT_TRUST_DOMAIN
from control.model.snapshot import MeshSnapshot, build
from control.model.telemetry import NO_MESH_CONFIG, MeshConfig
from control.sources.folder import Folder

if TYPE_CHECKING:
    import grpc

    from control.sources.kubernetes import Kubernetes

_log = logging.getLogger("meshctl")
Arrange = Callable[[Mapping[Any, Any]], Mapping[Any, Any]]
LOOK_EVERY_S = 0.2
TIDY_EVERY_S = 1.0
QUIET_S = 0.05  # a change is taken when nothing more changed for so long ...
PATIENCE_S = 0.5  # ... or when it has waited for so long


class Mesh:
    """Sources of documents and the snapshot of them that is served. Decides nothing by the clock: `App` says when to look.

    `folder` "" is none. `cluster`: makes a Kubernetes source for a store. `arrange`: completes what the documents say, and gives the same objects for the same
    ones. `defaults`: what holds where they say nothing.
    """

    def __init__(
        self,
        folder: str,
        trust_domain: str,
        arrange: Arrange | None = None,
        defaults: MeshConfig = NO_MESH_CONFIG,
        cluster: Callable[[Store], Kubernetes] | None = None,
    ) -> None:
        self.trust_domain = trust_domain
        self._defaults = defaults
        self._arrange = arrange
        self.store = Store()
        self.folder = Folder(folder, self.store) if folder else None
        self.cluster = cluster(self.store) if cluster is not None else None
        self.snapshot: MeshSnapshot = build({}, None, trust_domain, defaults)

    @property
    def troubles(self) -> list[Trouble]:
        """What is wrong with the documents."""
        return self.store.troubles

    def look(self) -> bool:
        """Read what has changed; returns whether anything had. Raises OSError without the folder, when the cluster has been looked at."""
        changed = self.cluster is not None and self.cluster.take()
        if self.folder is None:
            return changed
        try:
            return self.folder.scan(time.time_ns()) or changed
        except OSError:
            if changed:
                return True
            raise

    async def wait(self) -> None:
        """Until it is time to look again."""
        if self.cluster is None:
            await asyncio.sleep(LOOK_EVERY_S)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.cluster.changed.wait(), LOOK_EVERY_S if self.folder is not None else None)

    def settle(self) -> bool:
        """Make a snapshot of what was read; returns whether it is another one."""
        if not self.store.settle():
            return False
        objects: Mapping[Any, Any] = self.store.objects
        if self._arrange is not None:
            objects = self._arrange(objects)
        self.snapshot = build(objects, self.snapshot, self.trust_domain, self._defaults)
        return True


class App:
    """One running control plane."""

    def __init__(
        self,
        folder: str,
        handlers: Sequence[grpc.GenericRpcHandler] = (),
        trust_domain: str = DEFAULT_TRUST_DOMAIN,
        arrange: Arrange | None = None,
        identify: Identify | None = None,
        defaults: MeshConfig = NO_MESH_CONFIG,
        cluster: Callable[[Store], Kubernetes] | None = None,
        scope: Scope = Scope(),  # noqa: B008  immutable
    ) -> None:
        self.mesh = Mesh(folder, trust_domain, arrange, defaults, cluster)
        self.hub = Hub(self.mesh.snapshot, scope)
        self.server = XdsServer(self.hub, handlers, identify)
        self._reported: list[str] = []

    def load(self) -> None:
        """The first look. Raises OSError without the folder."""
        self.mesh.look()
        self.mesh.settle()
        self.hub.publish(self.mesh.snapshot)
        self._report()

    async def run(self, on_change: Callable[[], None] | None = None) -> None:
        """Watch the sources until cancelled. While one is away, what was there last is served."""
        tidying = asyncio.create_task(self._tidy(), name="tidy")
        try:
            await self._watch(on_change)
        finally:
            tidying.cancel()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            self.hub.tidy()

    async def _watch(self, on_change: Callable[[], None] | None) -> None:
        missing = False
        while True:
            await self.mesh.wait()
            try:
                changed = self.mesh.look()
            except OSError as error:
                if not missing:
                    _log.error("%s: %s; serving what was there last", self.mesh.folder.path if self.mesh.folder else "", error.strerror)
                missing = True
                continue
            missing = False
            if changed:
                await self._quiet()
                if self.mesh.settle():
                    self.hub.publish(self.mesh.snapshot)
                self._report()
                if on_change is not None:
                    on_change()

    async def _quiet(self) -> None:
        """Wait until the sources rest: tools write many files one after another."""
        waited = 0.0
        while waited < PATIENCE_S:
            await asyncio.sleep(QUIET_S)
            waited += QUIET_S
            try:
                if not self.mesh.look():
                    return
            except OSError:
                return

    def _report(self) -> None:
        """Say what is newly wrong, and what no longer is."""
        now = [str(trouble) for trouble in self.mesh.troubles]
        for one in now:
            if one not in self._reported:
                _log.warning("%s", one)
        if self._reported and not now:
            _log.info("all documents are right again")
        self._reported = now
