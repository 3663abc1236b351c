"""ECDS: the configurations of HTTP filters, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import fail, under
from meshproxy.http import extension_configs, filter_entry
from meshproxy.xds.needs import Need, Wanted
from meshproxy.xds.resources import EXTENSION

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.needs import Needs
    from meshproxy.xds.resources import Update
    from meshproxy.xds.sources import Sources
    from meshproxy.xds.subscription import Rules

User = tuple[Any, extension_configs.Place]  # a HttpConnectionManager and the place of the filter in it


class Extensions:
    """What all of them have in common. `validate(manager)` raises ConfigError for a HttpConnectionManager that cannot be; `tell(key, serialised)` is how the
    workers hear of a new configuration (google.protobuf.Any), empty when there is none any more."""

    def __init__(self, sources: Sources, context: Context, rules: Rules, validate: Callable[[Any], None], tell: Callable[[bytes, bytes], None]) -> None:
        self.sources = sources
        self.context = context
        self.rules = rules
        self.validate = validate
        self.tell = tell

    def wanted(self, listener: Any, known: Needs) -> Iterator[Wanted]:
        """What a Listener needs of it. One that has a default to begin with waits for nothing."""
        for user in extension_configs.filters(listener):
            entry = extension_configs.at(*user)
            key = b"extension:" + extension_configs.key_of(entry)
            subscription = known.known.get(key)
            if isinstance(subscription, ExtensionSubscription):
                subscription.count_conflict(entry)
            waits = not entry.config_discovery.apply_default_config_without_warming
            yield Wanted(key, lambda entry=entry: ExtensionSubscription(entry, self), user, waits=waits)  # type: ignore[misc]


class ExtensionSubscription(Need):
    """The watcher of one TypedExtensionConfig; `proto` is it, None when there is none."""

    def __init__(self, entry: Any, owner: Extensions) -> None:
        self._config = extension_configs.key_of(entry)
        super().__init__(b"extension:" + self._config)
        self.name: str = entry.name
        self.proto: Any = None
        self.version = ""
        self.updated_at = 0.0  # Unix time
        self._owner = owner
        scope = self._scope = owner.context.stats.scope(f"extension_config_discovery.http_filter.{self.name}.")
        scope.declare("counter", ("config_conflict", "config_fail", "config_reload"))
        with under(f"http_filters: {self.name}: config_discovery.config_source"):
            self.subscription = owner.sources.subscribe(entry.config_discovery.config_source, EXTENSION, self.name, self, scope)

    def count_conflict(self, entry: Any) -> None:
        """A filter is to have what has come already, and may not."""
        if self.proto is not None and not extension_configs.fits(entry, self.proto.typed_config):
            self._scope.counter("config_conflict").n += 1

    def updated(self, update: Update) -> None:
        """An answer. Raises ConfigError."""
        if not update.resources and update.removed:
            self._use(None, "")
            return
        if len(update.resources) != 1:
            fail("", f"Unexpected number of resources in ExtensionConfigDS response: {len(update.resources)}")
        proto = update.resources[0].message
        if proto is None:
            return
        if proto.name != self.name:
            fail("", f"Unexpected resource name in ExtensionConfigDS response: {proto.name}")
        if self.proto is None or proto.typed_config != self.proto.typed_config:
            for manager, place in list(self.users.values()):
                self._check(manager, place, proto)
            self._use(proto, update.version)
        self.settle()

    def _check(self, manager: Any, place: extension_configs.Place, proto: Any) -> None:
        """Compile a connection manager with the filter in its place, for what only that shows."""
        filter_entry.check_type(extension_configs.at(manager, place), proto.typed_config)
        whole = type(manager)()
        whole.CopyFrom(manager)
        entry = extension_configs.at(whole, place)
        entry.typed_config.CopyFrom(proto.typed_config)
        self._owner.rules.check(entry)
        self._owner.validate(whole)

    def _use(self, proto: Any, version: str) -> None:
        self.proto, self.version = proto, version
        self.updated_at = self._owner.context.wall()
        self._owner.tell(self._config, proto.typed_config.SerializeToString(deterministic=True) if proto is not None else b"")
        self._scope.counter("config_reload").n += 1

    def failed(self) -> None:
        """Nothing (good) came."""
        self._scope.counter("config_fail").n += 1
        super().failed()

    def dropped(self) -> None:
        """Nobody needs it any more."""
        self._owner.tell(self._config, b"")
