"""The control plane as a process: a folder, a cluster or both are watched, snapshots are made of them and served. Everything is wired together here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from control.ads.hub import Hub, Scope
from control.ads.server import Identify, XdsServer
from control.kinds.store import Store, Trouble
from control.model.registration import Registration
from control.model.security import DEFAULT_TRUST_DOMAIN, KeySource
from control.model.service import EXPECTED
from control.model.snapshot import Key, MeshSnapshot, build, with_unready
from control.model.telemetry import NO_MESH_CONFIG, MeshConfig
from control.sources.folder import Folder
from control.sources.reports import SharedReports
from control.translate import tokens

if TYPE_CHECKING:
    import grpc

    from control.sources.issuers import Issuers
    from control.sources.kubernetes import Kubernetes

_log = logging.getLogger("meshctl")
Arrange = Callable[[Mapping[Any, Any]], Mapping[Any, Any]]
LOOK_EVERY_S = 0.2
TIDY_EVERY_S = 1.0
TOGETHER_S = 0.02  # health that changes within so long is told in one go
EXPECTED_S = 35.0  # a control plane that begins is found by all proxies within so long: Envoy tries every half minute at least
QUIET_S = 0.05  # a change is taken when nothing more changed for so long ...
FIRST_KEYS_S = 5.0  # at the start, for issuers to answer
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
        self.store = Store(trust_domain)
        self.folder = Folder(folder, self.store) if folder else None
        self.cluster = cluster(self.store) if cluster is not None else None
        self._unready: frozenset[Key] = frozenset()
        self._registered: tuple[Registration, ...] = ()
        self.expects = False  # that proxies come which register, and came to another control plane before
        self._fetched: Mapping[KeySource, str] = {}
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
            async with asyncio.timeout(LOOK_EVERY_S if self.folder is not None else None):  # wait_for may lose a cancellation, in Python 3.11
                await self.cluster.changed.wait()

    def settle(self) -> bool:
        """Make a snapshot of what was read; returns whether it is another one."""
        if not self.store.settle():
            return False
        self._build()
        return True

    def _build(self) -> None:
        objects: Mapping[Any, Any] = self.store.objects
        if self._arrange is not None:
            objects = self._arrange(objects)
        self.snapshot = build(objects, self.snapshot, self.trust_domain, self._defaults, self._unready, self._registered, self._fetched, expects=self.expects)

    def registered(self, proxies: Iterable[Registration]) -> None:
        """These proxies say which groups they belong to: makes another snapshot."""
        self._registered = tuple(proxies)
        self._build()

    def expect_no_more(self) -> bool:
        """Whoever wanted to register has; returns whether that makes another snapshot."""
        self.expects = False
        if not any(found and found[0] is EXPECTED for found in self.snapshot.endpoints.values()):
            return False
        self._build()
        return True

    def fetched(self, keys: Mapping[KeySource, str]) -> None:
        """These are the keys of issuers that are known: makes another snapshot."""
        self._fetched = keys
        self._build()

    def heard(self, unready: frozenset[Key]) -> bool:
        """These workloads are known not to be ready; returns whether that makes another snapshot."""
        changed, self._unready = self._unready ^ unready, unready
        if changed:
            self.snapshot = with_unready(self.snapshot, unready, changed)
        return bool(changed)


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
        max_age_s: float = 0.0,
        issuers: Issuers | None = None,
        reports: SharedReports | None = None,
    ) -> None:
        self.issuers = issuers
        self.mesh = Mesh(folder, trust_domain, arrange, defaults, cluster)
        self.hub = Hub(self.mesh.snapshot, scope)
        self.server = XdsServer(self.hub, handlers, identify, max_age_s)
        self._reported: list[str] = []
        self._reports = reports
        self._heard = asyncio.Event()
        self.hub.health.changed = self._heard.set
        self._come = asyncio.Event()
        self.hub.registrations.changed = self._come.set
        self._unregistered: Mapping[Registration, str] = {}

    def load(self) -> None:
        """The first look. Raises OSError without the folder."""
        self.mesh.expects = True
        self.mesh.look()
        self.mesh.settle()
        self._publish()
        self._report()

    async def wait_keys(self) -> None:
        """After the first look, until issuers of tokens were asked once, or have had their time: proxies that come to a control plane that is started anew
        are not to refuse what they took before."""
        if self.issuers is not None:
            await self.issuers.wait_tried(FIRST_KEYS_S)
            self._take_keys()

    def _publish(self) -> None:
        """Serve the snapshot, and ask for the keys that it needs."""
        if self.issuers is not None:
            self.issuers.want(tokens.wanted(self.mesh.snapshot.config.security.request_authentication, self.mesh.snapshot.config.services))
        self.hub.publish(self.mesh.snapshot)

    def _take_keys(self) -> None:
        if self.issuers is not None and self.issuers.changed.is_set():
            self.issuers.changed.clear()
            self.mesh.fetched(self.issuers.known)
            self.hub.publish(self.mesh.snapshot)

    async def _follow_keys(self) -> None:
        """Keys of issuers that come, and new ones, are in the snapshot at once."""
        while self.issuers is not None:
            await self.issuers.changed.wait()
            await asyncio.sleep(TOGETHER_S)
            self._take_keys()

    async def run(self, on_change: Callable[[], None] | None = None) -> None:
        """Watch the sources until cancelled. While one is away, what was there last is served."""
        others = [
            asyncio.create_task(doing, name=name)
            for doing, name in (
                (self._tidy(), "tidy"),
                (self._follow_health(), "follow health"),
                (self._follow_proxies(), "follow proxies"),
                (self._follow_keys(), "follow keys"),
                (self._expect_no_more(), "expect no more"),
            )
        ]
        if self._reports is not None:
            others.append(asyncio.create_task(self._share_health(self._reports), name="share health"))
        try:
            await self._watch(on_change)
        finally:
            for one in others:
                one.cancel()

    async def _expect_no_more(self) -> None:
        """Who was there before we were has come by now."""
        await asyncio.sleep(EXPECTED_S)
        if self.mesh.expect_no_more():
            self._publish()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            self.hub.tidy()

    async def _share_health(self, reports: SharedReports) -> None:
        """Replicas are told what sidecars report here, and tell what is reported to them."""
        trouble = ""
        while True:
            try:
                reports.write(self.hub.health.reported())
                self.hub.health.elsewhere(reports.read())
                trouble = ""
            except OSError as error:
                if str(error) != trouble:
                    _log.error("readiness is not shared with other replicas: %s", error)
                trouble = str(error)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _follow_health(self) -> None:
        """What sidecars report of applications is in the endpoints at once, without another look at documents."""
        while True:
            await self._heard.wait()
            await asyncio.sleep(TOGETHER_S)
            self._heard.clear()
            if self.mesh.heard(self.hub.health.unready):
                self.hub.publish(self.mesh.snapshot)

    async def _follow_proxies(self) -> None:
        """Who registers is a workload at once, too."""
        known: Mapping[Key, Registration] = {}
        while True:
            await self._come.wait()
            await asyncio.sleep(TOGETHER_S)
            self._come.clear()
            now = self.hub.registrations.known
            self.mesh.registered(now.values())
            self.hub.publish(self.mesh.snapshot)
            self._report_unregistered()
            for key, one in now.items():
                if known.get(key) != one and one not in self._unregistered:
                    _log.info("%s (%s) is a workload of WorkloadGroup %s/%s", one, one.address, one.namespace, one.group)
            for key, one in known.items():
                if key not in now:
                    _log.info("%s, of WorkloadGroup %s/%s, has been away for long: it is no workload any more", one, one.namespace, one.group)
            known = now

    def _report_unregistered(self) -> None:
        """Say who would be a workload and cannot be."""
        before, self._unregistered = self._unregistered, self.mesh.snapshot.unregistered
        for one, why in self._unregistered.items():
            if before.get(one) != why:
                _log.warning("%s is no workload of WorkloadGroup %s/%s: %s", one, one.namespace, one.group, why)

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
                    self._publish()
                self._report()
                self._report_unregistered()
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
