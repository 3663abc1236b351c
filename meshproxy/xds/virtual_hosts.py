"""VHDS: virtual hosts of a route configuration that come on their own, at the start or when a request asks for one. Always by delta.

A name is asked for once. That there is nothing of that name is an answer, too (a resource without contents), and stays known: the server says when there is
something after all. What the server takes away will be asked for again. Clients choose the names: of those that no virtual host has, only so many are kept
(`demand.MAX_NAMES`), the last ones; who waits for an older one waits in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import under
from meshproxy.http import demand
from meshproxy.http.filters.on_demand import check_delta
from meshproxy.xds.resources import VIRTUAL_HOST, WILDCARD

if TYPE_CHECKING:
    from meshproxy.observe.stats import Scope
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources


class VirtualHosts:
    """Those of one RouteConfiguration. `hosts`: name -> VirtualHost. `use(hosts, version)` takes new ones or raises ConfigError; `answer(host)` is told of
    each that was asked for, whether it is there or not; `ready()` is called when the first answer has come or will not come."""

    def __init__(
        self,
        routes: Any,
        sources: Sources,
        scope: Scope,
        use: Callable[[dict[str, Any], str], None],
        answer: Callable[[str], None],
        ready: Callable[[], None],
    ) -> None:
        """Raises ConfigError with paths relative to `routes`, a RouteConfiguration."""
        self.config = routes.vhds.SerializeToString(deterministic=True)
        self.hosts: dict[str, Any] = {}
        self._prefix = f"{routes.name}/"
        self._use = use
        self._answer = answer
        self._ready = ready
        self._waiting: dict[str, None] = {}  # names that are asked for, oldest first
        self._known: dict[str, None] = {}  # those that were answered
        self._scope = scope
        scope.declare("counter", ("config_reload", "update_empty"))
        with under("vhds.config_source"):
            check_delta(routes.vhds.config_source, "vhds")
            self._subscription: Any = sources.subscribe(routes.vhds.config_source, VIRTUAL_HOST, WILDCARD, self, scope, delta=True)

    def start(self) -> None:
        """Ask for what the server would have known from the beginning."""
        self._subscription.start()

    def close(self) -> None:
        """No longer wanted; who waits is told."""
        for name in (*self._waiting, *self._known):
            self._subscription.let_go(name)
        self._subscription.close()
        for name in list(self._waiting):
            self._answer(name.removeprefix(self._prefix))
        self._scope.remove()

    def demand(self, host: str) -> None:
        """A request needs the virtual host of a host: `answer` will be called, perhaps at once."""
        name = self._prefix + host
        if name in self._known:
            self._answer(host)
        elif name not in self._waiting:
            if len(self._waiting) >= demand.MAX_NAMES:
                oldest = next(iter(self._waiting))
                self._subscription.let_go(oldest)
                self._settle(oldest)
            self._waiting[name] = None
            self._subscription.ask(name)

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        ours = [one for one in update.resources if one.name.startswith(self._prefix)]
        removed = [name for name in update.removed if name.startswith(self._prefix)]
        if not ours and not removed:
            self._ready()  # the server has nothing to begin with
            return
        hosts = {name: host for name, host in self.hosts.items() if name not in removed}
        hosts.update((one.message.name, one.message) for one in ours if one.message is not None)
        self._use(hosts, update.version)
        self.hosts = hosts
        self._scope.counter("config_reload").n += 1
        answered = {name for one in ours for name in (one.name, *one.aliases)}
        for name in removed:
            if name in self._known:
                del self._known[name]
                self._subscription.let_go(name)
        self._ready()
        for name in [name for name in self._waiting if name in answered]:
            self._known[name] = None
            self._settle(name)
        if len(self._known) > len(hosts) + demand.MAX_NAMES:
            spare = [name for name in self._known if name not in hosts]
            for name in spare[: len(spare) // 2]:  # not one by one: to look for them takes time
                del self._known[name]
                self._subscription.let_go(name)

    def _settle(self, name: str) -> None:
        del self._waiting[name]
        self._answer(name.removeprefix(self._prefix))

    def failed(self) -> None:
        """Nothing (good) came."""
        self._ready()
