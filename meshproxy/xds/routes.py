"""RDS: the route configurations that connection managers route by. One subscription for all that ask for the same one of the same source."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import ConfigError, fail
from meshproxy.http import route_configs
from meshproxy.xds.resources import ROUTES

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Rules

log = logging.getLogger("meshproxy.router")


class RouteSubscription:
    """The watcher of one route configuration. `settled`: there is one, or there was time enough for one."""

    def __init__(self, rds: Any, stat_prefix: str, owner: Routes) -> None:
        self.key = route_configs.key_of(rds)
        self.name: str = rds.route_config_name
        self.settled = False
        self.version = ""
        self.serialised = b""
        self.updated_at = 0.0
        self.users: dict[object, Any] = {}  # whoever acquired it -> its HttpConnectionManager message
        self.waiting: dict[object, Callable[[], None]] = {}
        self._owner = owner
        context = owner.context
        scope = self._scope = context.stats.scope(f"http.{stat_prefix}.rds.{self.name}.")
        scope.declare("counter", ("config_reload", "update_empty"))
        scope.declare("gauge", ("config_reload_time_ms",))
        self.subscription = owner.sources.subscribe(rds.config_source, ROUTES, self.name, self, scope)

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        if not update.resources and update.removed:
            return  # as Envoy: listeners say when it is no longer needed
        if not update.resources:
            self._scope.counter("update_empty").n += 1
            self._settle()
            return
        if len(update.resources) != 1:
            fail("", f"Unexpected RDS resource length: {len(update.resources)}")
        resource = update.resources[0]
        proto = resource.message
        if proto is None:
            return
        if proto.name != self.name:
            fail("", f"Unexpected RDS configuration (expecting {self.name}): {proto.name}")
        serialised = proto.SerializeToString(deterministic=True)
        if serialised != self.serialised:
            self._owner.rules.check(proto)
            for manager in list(self.users.values()):
                self._owner.validate(manager, proto)
            self.serialised = serialised
            self.version = update.version
            self.updated_at = self._owner.context.wall()
            self._scope.counter("config_reload").n += 1
            self._scope.gauge("config_reload_time_ms").n = int(self.updated_at * 1000)
            self._owner.tell(self.key, serialised)
        self._settle()

    def failed(self) -> None:
        """Nothing (good) came: listeners begin to work without it."""
        self._settle()

    def _settle(self) -> None:
        self.settled = True
        waiting, self.waiting = self.waiting, {}
        for ready in waiting.values():
            ready()


class Routes:
    """All of them. `validate(manager, routes)` raises ConfigError if a HttpConnectionManager cannot work with a RouteConfiguration; `tell(key, serialised)`
    is how the workers hear of a new one, empty when nobody needs it any more."""

    def __init__(self, sources: Sources, context: Context, rules: Rules, validate: Callable[[Any, Any], None], tell: Callable[[bytes, bytes], None]) -> None:
        self.sources = sources
        self.context = context
        self.rules = rules
        self.validate = validate
        self.tell = tell
        self.known: dict[bytes, RouteSubscription] = {}

    def acquire(self, managers: list[Any], ready: Callable[[], None]) -> Callable[[], None]:
        """Subscribe for connection managers (messages); `ready` is called once everything has settled. Returns what gives it all back. Raises ConfigError."""
        held: list[tuple[RouteSubscription, object]] = []
        missing: set[RouteSubscription] = set()
        new: list[RouteSubscription] = []
        waiting = True

        def settled(one: RouteSubscription) -> None:
            missing.discard(one)
            if not missing and not waiting:
                ready()

        try:
            for manager in managers:
                key = route_configs.key_of(manager.rds)
                one = self.known.get(key)
                if one is None:
                    one = self.known[key] = RouteSubscription(manager.rds, manager.stat_prefix, self)
                    new.append(one)
                token = object()
                one.users[token] = manager
                held.append((one, token))
                if not one.settled:
                    missing.add(one)
                    one.waiting[token] = _bind(settled, one)
        except ConfigError:
            self._release(held)
            raise
        for one in new:
            one.subscription.start()
        waiting = False
        if not missing:
            ready()
        return lambda: self._release(held)

    def _release(self, held: list[tuple[RouteSubscription, object]]) -> None:
        for one, token in held:
            one.users.pop(token, None)
            one.waiting.pop(token, None)
            if not one.users and self.known.get(one.key) is one:
                del self.known[one.key]
                one.subscription.close()
                self.tell(one.key, b"")
        held.clear()


def _bind(function: Callable[[RouteSubscription], None], one: RouteSubscription) -> Callable[[], None]:
    return lambda: function(one)
