"""RDS: the route configurations that connection managers route by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail, under
from meshproxy.http import route_configs
from meshproxy.xds.needs import Need, Wanted
from meshproxy.xds.resources import ROUTES
from meshproxy.xds.virtual_hosts import VirtualHosts

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Rules


class Routes:
    """What all of them have in common. `validate(manager, routes)` raises ConfigError if a HttpConnectionManager cannot work with a RouteConfiguration;
    `tell(key, serialised)` is how the workers hear of a new one, empty when nobody needs it any more; `answer(key, host)`: that there is an answer for the
    requests that wait for the virtual host of a host."""

    def __init__(
        self,
        sources: Sources,
        context: Context,
        rules: Rules,
        validate: Callable[[Any, Any], None],
        tell: Callable[[bytes, bytes], None],
        answer: Callable[[bytes, str], None],
    ) -> None:
        self.sources = sources
        self.context = context
        self.rules = rules
        self.validate = validate
        self.tell = tell
        self.answer = answer

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
        self._proto: Any = None  # as it came
        self._came = b""  # the same, serialised
        self.hosts: VirtualHosts | None = None  # that come on their own
        self._stat_prefix: str = manager.stat_prefix
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
        if serialised != self._came:
            self._owner.rules.check(proto)
            more = self._more_hosts(proto)
            self._use(proto, more.hosts if more is not None else {}, update.version)
            self._came, self._proto = serialised, proto
            if more is None or more is self.hosts:
                self._count_reload()  # else with the first virtual hosts
            if more is not self.hosts:
                old, self.hosts = self.hosts, more
                if old is not None:
                    old.close()
                if more is not None:
                    more.start()
        if self.hosts is None:
            self.settle()

    def _more_hosts(self, proto: Any) -> VirtualHosts | None:
        """The virtual hosts by discovery of a RouteConfiguration: the same as before, if it gets them from where it got them."""
        if not proto.HasField("vhds"):
            return None
        if self.hosts is not None and self.hosts.config == proto.vhds.SerializeToString(deterministic=True):
            return self.hosts
        scope = self._owner.context.stats.scope(f"http.{self._stat_prefix}.rds.vhds.{self.name}.")
        return VirtualHosts(proto, self._owner.sources, scope, self._use_hosts, lambda host: self._owner.answer(self._table, host), self.settle)

    def _use_hosts(self, hosts: dict[str, Any], version: str) -> None:
        assert self.hosts is not None
        if hosts != self.hosts.hosts:
            for one in hosts.values():
                self._owner.rules.check(one)
            self._use(self._proto, hosts, version)
        self.version = version
        self._count_reload()

    def _use(self, proto: Any, hosts: dict[str, Any], version: str) -> None:
        """Route by a RouteConfiguration, with more virtual hosts. Raises ConfigError."""
        whole = proto
        if hosts:
            whole = type(proto)()
            whole.CopyFrom(proto)
            whole.virtual_hosts.extend(hosts[name] for name in sorted(hosts))
        for manager in list(self.users.values()):
            self._owner.validate(manager, whole)
        self.serialised = whole.SerializeToString(deterministic=True)
        self.version = version
        self.updated_at = self._owner.context.wall()
        self._owner.tell(self._table, self.serialised)

    def _count_reload(self) -> None:
        self._scope.counter("config_reload").n += 1
        self._scope.gauge("config_reload_time_ms").n = int(self._owner.context.wall() * 1000)

    def dropped(self) -> None:
        """Nobody needs it any more."""
        if self.hosts is not None:
            self.hosts.close()
        self._owner.tell(self._table, b"")
