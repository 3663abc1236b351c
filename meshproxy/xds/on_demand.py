"""ODCDS: clusters by name, when a request needs them. What came on demand stays, and is kept up to date, until the server takes it away.

Clients may choose the names: of those that no cluster has, only so many (`demand.MAX_NAMES`) stay asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.http import demand
from meshproxy.xds.resources import CLUSTER

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.client import Mux
    from meshproxy.xds.clusters import Clusters
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Subscription


class OnDemandClusters:
    """Those of one ConfigSource. `answer(name, found)` is told of each that was asked for. Raises ConfigError."""

    def __init__(self, source: Any, sources: Sources, clusters: Clusters, context: Context, answer: Callable[[str, bool], None]) -> None:
        self._source = source
        self._sources = sources
        self._clusters = clusters
        self._context = context
        self._answer = answer
        self._scope = context.stats.scope("cluster_manager.odcds.")
        self._mux: Mux = sources.shared(source, CLUSTER, self._scope)
        self._watched: dict[str, _Watcher] = {}
        self._waiting: dict[str, asyncio.TimerHandle] = {}

    def demand(self, name: str, timeout: float) -> None:
        """A request needs a cluster: `answer` will be called after at most `timeout` seconds, perhaps at once."""
        if name in self._clusters.manager:
            self._answer(name, True)
            return
        if name not in self._watched and not self._make_room():
            self._answer(name, False)
            return
        if name not in self._waiting:
            self._waiting[name] = self._context.loop.call_later(timeout, self.settle, name, False)
        watcher = self._watched.get(name)
        if watcher is None:
            watcher = self._watched[name] = _Watcher(name, self)
            watcher.subscription = self._sources.on_shared(self._mux, self._source, CLUSTER, name, watcher, self._scope)
            watcher.subscription.start()
        elif watcher.came and name not in self._clusters.warming:
            # CDS has said that it is none of the clusters that there are. Envoy lets all requests wait in vain from then on.
            watcher.came = False
            self._mux.ask(CLUSTER, name)

    def _make_room(self) -> bool:
        """Ask no more for names that no cluster has, if there are too many; whether one more may be asked for."""
        clusters = self._clusters
        if len(self._watched) < len(clusters.active) + len(clusters.warming) + demand.MAX_NAMES:
            return True
        spare = [name for name in self._watched if name not in clusters.active and name not in clusters.warming and name not in self._waiting]
        for name in spare[: len(spare) // 2 + 1]:  # not one by one: to look for them takes time
            self._watched.pop(name).subscription.close()
        return bool(spare)

    def settle(self, name: str, found: bool) -> None:
        """A cluster is in use, or will not be."""
        timer = self._waiting.pop(name, None)
        if timer is not None:
            timer.cancel()
            self._answer(name, found)

    def took(self, name: str, update: Update) -> None:
        """An answer of the server. Raises ConfigError."""
        self._clusters.take(update)
        if update.removed:
            watcher = self._watched.pop(name, None)
            if watcher is not None:
                watcher.subscription.close()
            self.settle(name, False)
            return
        watcher = self._watched.get(name)
        if watcher is not None:
            watcher.came = True
        if name in self._clusters.manager:
            self.settle(name, True)


class _Watcher:
    """Of one cluster. `came`: since it was last asked for."""

    subscription: Subscription
    came = False

    def __init__(self, name: str, owner: OnDemandClusters) -> None:
        self._name = name
        self._owner = owner

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        self._owner.took(self._name, update)

    def failed(self) -> None:
        """Nothing (good) came; whoever waits has a timeout of its own."""
