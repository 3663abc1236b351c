"""RDS: the route configurations that connection managers route by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail, under
from meshproxy.http import route_configs
from meshproxy.xds.needs import Need, Wanted
from meshproxy.xds.resources import ROUTES

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Rules


class Routes:
    """What all of them have in common. `validate(manager, routes)` raises ConfigError if a HttpConnectionManager cannot work with a RouteConfiguration;
    `tell(key, serialised)` is how the workers hear of a new one, empty when nobody needs it any more."""

    def __init__(self, sources: Sources, context: Context, rules: Rules, validate: Callable[[Any, Any], None], tell: Callable[[bytes, bytes], None]) -> None:
        self.sources = sources
        self.context = context
        self.rules = rules
        self.validate = validate
        self.tell = tell

    def wanted(self, listener: Any) -> Iterator[Wanted]:
        """What a Listener needs of it."""
        for manager in route_configs.managers(listener):
            yield Wanted(b"routes:" + route_configs.key_of(manager.rds), lambda manager=manager: RouteSubscription(manager, self), manager)  # type: ignore[misc]


class RouteSubscription(Need):
    """The watcher of one route configuration; its users are HttpConnectionManager messages."""

    def __init__(self, manager: Any, owner: Routes) -> None:
        rds = manager.rds
        self._table = route_configs.key_of(rds)
        super().__init__(b"routes:" + self._table)
        self.name: str = rds.route_config_name
        self.version = ""
        self.serialised = b""
        self.updated_at = 0.0  # Unix time
        self._owner = owner
        scope = self._scope = owner.context.stats.scope(f"http.{manager.stat_prefix}.rds.{self.name}.")
        scope.declare("counter", ("config_reload", "update_empty"))
        scope.declare("gauge", ("config_reload_time_ms",))
        with under("rds.config_source"):
            self.subscription = owner.sources.subscribe(rds.config_source, ROUTES, self.name, self, scope)

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        if not update.resources and update.removed:
            return  # as Envoy: listeners say when it is no longer needed
        if not update.resources:
            self._scope.counter("update_empty").n += 1
            self.settle()
            return
        if len(update.resources) != 1:
            fail("", f"Unexpected RDS resource length: {len(update.resources)}")
        proto = update.resources[0].message
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
            self._owner.tell(self._table, serialised)
        self.settle()

    def dropped(self) -> None:
        """Nobody needs it any more."""
        self._owner.tell(self._table, b"")
