"""CDS: which clusters there are besides the static ones. A new version of a cluster warms (endpoints, names, health checks) while the old one is in use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import Collector, ConfigError, Problem
from meshproxy.net.tasks import spawn
from meshproxy.record import Record
from meshproxy.scheduling import turns
from meshproxy.upstream.discovery import Discovery, Watch

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.upstream.cluster_manager import ClusterManager
    from meshproxy.xds.resources import Resource, Update
    from meshproxy.xds.subscription import Rules

log = logging.getLogger("meshproxy.upstream")


class Dynamic(Record):
    """One version of a cluster. `updated`: Unix time."""

    name: str
    version: str
    serialised: bytes
    updated: float
    watch: Watch | None = None
    task: asyncio.Task[None] | None = None  # waits until it is warm
    release: Callable[[], None] = lambda: None  # lets go of what it needs besides


class Tell(Record):
    """How the workers hear of it."""

    changed: Callable[[str, bytes, bytes | None, dict[str, int]], None]  # name, Cluster, ClusterLoadAssignment, health
    removed: Callable[[list[str]], None]


class Clusters:
    """The watcher of CDS. `active` and `warming`: what came, by name. `on_first`: called once, when the first answer has come or will not come."""

    def __init__(
        self,
        manager: ClusterManager,
        discovery: Discovery,
        context: Context,
        rules: Rules,
        new_check: Callable[[], Callable[[Any], None]],
        tell: Tell,
        on_first: Callable[[], None],
    ) -> None:
        """`new_check` returns what raises ConfigError for Cluster messages that cannot be compiled: another one for each answer."""
        self.active: dict[str, Dynamic] = {}
        self.warming: dict[str, Dynamic] = {}
        self.version = ""
        self._manager = self.manager = manager
        self.on_active: Callable[[str], None] = lambda name: None  # a version of a cluster is in use, in the workers, too
        self._discovery = discovery
        self._context = context
        self._rules = rules
        self._new_check = new_check
        self._tell = tell
        self._on_first = on_first
        self._answered = False
        # Asked what a cluster needs besides: calls the second argument when it is there, and returns what lets go of it.
        self.acquire: Callable[[Any, Callable[[], None]], Callable[[], None]] = _acquire_nothing
        scope = context.stats.scope("cluster_manager.cds.")
        scope.declare("counter", ("config_reload",))
        scope.declare("gauge", ("config_reload_time_ms",))
        self._scope = scope

    def updated(self, update: Update) -> None:
        """An answer of CDS. Raises ConfigError; what was good of it is in use."""
        problems = Collector()
        added, removed = self._take(update, problems)
        if added or removed:
            self.version = update.version
        if added and not problems.problems and not update.repeated:
            self._scope.counter("config_reload").n += 1
            self._scope.gauge("config_reload_time_ms").n = int(self._context.wall() * 1000)
        self._first()
        problems.raise_any()

    def take(self, update: Update) -> None:
        """The same of what was asked for by name."""
        problems = Collector()
        self._take(update, problems)
        problems.raise_any()

    def _take(self, update: Update, problems: Collector) -> tuple[bool, bool]:
        """Add what is new, replace what has changed, then remove what is gone; whether there was such. Notes what is wrong."""
        added = False
        check = self._new_check()
        for resource in update.resources:
            turns.give_way()
            try:
                added |= self._add(resource, check)
            except ConfigError as error:
                problems.problems += [Problem(problem.path, f"{resource.name}: {problem.why}", problem.kind) for problem in error.problems]
        gone = set(update.removed)
        if update.complete:
            gone |= {*self.active, *self.warming} - {one.name for one in update.resources}
        return added, self._remove(gone)

    def failed(self) -> None:
        """Nothing (good) came: the start goes on."""
        self._first()

    def _first(self) -> None:
        if not self._answered:
            self._answered = True
            self._on_first()

    def _add(self, resource: Resource, check: Callable[[Any], None]) -> bool:
        """Add or replace a cluster; False when there is nothing to do."""
        message, name = resource.message, resource.name
        if message is None or (name in self._manager and not self._manager.via_api(name)):
            return False  # a heartbeat; a static cluster, which nobody may change
        serialised = message.SerializeToString(deterministic=True)
        known = self.warming.get(name) or self.active.get(name)
        if known is not None and known.serialised == serialised:
            return False
        self._rules.check(message)
        check(message)
        self._forget_warming(name)
        entry = Dynamic(name, resource.version, serialised, self._context.wall())
        ready = asyncio.Event()
        entry.release = self.acquire(message, ready.set)
        if ready.is_set() and not Watch.is_needed(message):
            self._manager.announce(known=known is not None)
            self._activate(entry)
            return True
        watch = None
        if Watch.is_needed(message):
            try:
                watch = entry.watch = Watch(message, self._discovery)
            except ConfigError:
                entry.release()
                raise
        self._manager.announce(known=known is not None)
        self.warming[name] = entry
        self._count_warming()
        if name not in self.active:
            self._manager.waiting.add(name)
        if watch is not None:
            watch.start()
        # Mostly there is an answer already, when it comes from a file or is a literal address.
        entry.task = spawn(f"warm {name}", self._warm(entry, ready))
        return True

    async def _warm(self, entry: Dynamic, ready: asyncio.Event) -> None:
        turns.give_way()  # clusters mostly come many at once, and get warm so
        await ready.wait()
        if entry.watch is not None:
            await entry.watch.wait_warm()
        turns.give_way()
        if self.warming.get(entry.name) is entry:
            del self.warming[entry.name]
            self._count_warming()
            self._activate(entry)
            self._manager.warmed(entry.name)

    def _activate(self, entry: Dynamic) -> None:
        name, watch = entry.name, entry.watch
        old = self.active.get(name)
        if watch is not None and watch.assignment is None and old is not None and old.watch is not None and watch.same_service(old.watch):
            # Better the endpoints of the version before than none: nobody has said that they are gone.
            watch.assignment = old.watch.assignment
            self._context.stats.scope(f"cluster.{watch.proto.alt_stat_name or name}.").counter("assignment_use_cached", shared=True).n += 1
        self.active[name] = entry
        self._manager.add(entry.serialised, via_api=True, counted=False)
        self._discovery.adopt(name, watch)
        assignment = watch.assignment if watch is not None else None
        health = watch.health if watch is not None else {}
        if assignment is not None:
            self._manager.update_endpoints(name, assignment)
        if health:
            self._manager.set_health(name, health)
        self._tell.changed(name, entry.serialised, assignment, health)
        self.on_active(name)
        if old is not None:
            old.release()

    def _remove(self, names: set[str]) -> bool:
        """Remove clusters; False when there is none that came by CDS."""
        removed = False
        gone = []
        for name in sorted(names):
            warmed = self._forget_warming(name)
            removed |= warmed
            self._manager.warmed(name)
            active = self.active.pop(name, None)
            if active is None and warmed:
                self._manager.renounce()
            elif active is not None:
                active.release()
                self._discovery.remove(name)
                gone.append(name)
        if gone:
            self._manager.remove(*gone)
            self._tell.removed(gone)
        return removed or bool(gone)

    def _forget_warming(self, name: str) -> bool:
        warming = self.warming.pop(name, None)
        if warming is None:
            return False
        if warming.task is not None:
            warming.task.cancel()
        if warming.watch is not None:
            warming.watch.close()
        warming.release()
        self._count_warming()
        return True

    def _count_warming(self) -> None:
        self._manager.warming.n = len(self.warming)


def _acquire_nothing(cluster: Any, ready: Callable[[], None]) -> Callable[[], None]:
    ready()
    return lambda: None
