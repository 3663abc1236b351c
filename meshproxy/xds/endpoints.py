"""EDS: the endpoints of one version of one cluster. See `upstream.discovery.Watch`, to which this is what a resolver of names is to other clusters."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from meshproxy.api.durations import seconds_of
from meshproxy.api.errors import ConfigError, fail, under
from meshproxy.xds.resources import ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Rules


class Eds:
    """A watcher of one ClusterLoadAssignment. `resolved` is set by the first answer, good or bad, or when there was time enough for one."""

    def __init__(self, cluster: Any, scope: Scope, on_changed: Callable[[Any], None], sources: Sources, context: Context, rules: Rules) -> None:
        config = cluster.eds_cluster_config
        self.resolved = asyncio.Event()
        self._name: str = config.service_name or cluster.name
        self._cluster: str = cluster.name
        self._on_changed = on_changed
        self._context = context
        self._rules = rules
        self._last = b""
        self._digest = 0  # of what `_last` was made of
        self._scope = scope
        self._stale: asyncio.TimerHandle | None = None
        with under("eds_cluster_config.eds_config"):
            self._subscription = sources.subscribe(config.eds_config, ENDPOINTS, self._name, self, scope)

    def start(self) -> None:
        """Begin to ask."""
        self._subscription.start()

    def close(self) -> None:
        """Stop."""
        self._subscription.close()
        self._watch_staleness(0.0)

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        try:
            if not update.resources:
                self._scope.counter("update_empty", shared=True).n += 1
                self.resolved.set()  # there is nothing to wait for
                return
            if len(update.resources) != 1:
                fail("", f"Unexpected EDS resource length: {len(update.resources)}")
            resource = update.resources[0]
            assignment = resource.message
            if assignment is None:
                return
            if assignment.cluster_name != self._name:
                fail("", f"Unexpected EDS cluster (expecting {self._name}): {assignment.cluster_name}")
            same = bool(resource.digest) and resource.digest == self._digest
            serialised = self._last if same else assignment.SerializeToString(deterministic=True)
            if serialised != self._last:  # what is in use was right
                self._rules.check_endpoints(assignment)
            self._digest = resource.digest
        except ConfigError:
            self.resolved.set()
            raise
        policy = assignment.policy
        stale_after = seconds_of(policy, "endpoint_stale_after", 0.0)
        if stale_after:
            self._scope.counter("assignment_timeout_received", shared=True).n += 1
        self._watch_staleness(stale_after)
        self._use(assignment, serialised)

    def _use(self, assignment: Any, serialised: bytes) -> None:
        if serialised == self._last and self.resolved.is_set():
            self._scope.counter("update_no_rebuild", shared=True).n += 1
        else:
            self._last = serialised
            self._on_changed(assignment)
        self.resolved.set()

    def _watch_staleness(self, seconds: float) -> None:
        if self._stale is not None:
            self._stale.cancel()
        self._stale = self._context.loop.call_later(seconds, self._has_become_stale) if seconds else None

    def _has_become_stale(self) -> None:
        """The endpoints are not to be used any longer."""
        self._stale = None
        self._scope.counter("assignment_stale", shared=True).n += 1
        self._digest = 0
        nothing = ENDPOINTS.message(cluster_name=self._name)
        self._use(nothing, nothing.SerializeToString(deterministic=True))

    def failed(self) -> None:
        """Nothing (good) came."""
        self.resolved.set()
