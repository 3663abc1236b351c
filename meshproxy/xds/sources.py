"""ConfigSource messages: where resources of a type come from, made into subscriptions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import UNSUPPORTED, fail
from meshproxy.xds.files import FileSubscription
from meshproxy.xds.inotify import Watches

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.xds.resources import ResourceType
    from meshproxy.xds.subscription import Rules, Subscription, Watcher

_V3 = 2  # envoy.config.core.v3.ApiVersion; AUTO (0) and V2 (1) are gone


class Sources:
    """Makes subscriptions, and owns what they share: the watches of files."""

    def __init__(self, context: Context, rules: Rules) -> None:
        self._context = context
        self._rules = rules
        self._watches = Watches(context.loop)

    def subscribe(self, source: Any, type: ResourceType, name: str, watcher: Watcher, scope: Scope) -> Subscription:
        """A subscription for a resource of that name (or xds.resources.WILDCARD), not started. Raises ConfigError, with paths relative to `source`."""
        check(source)
        path, watched = path_of(source)
        return FileSubscription(path, watched, self._watches, type, name, watcher, scope, self._context, self._rules)

    def close(self) -> None:
        """Watch nothing any more."""
        self._watches.close()


def path_of(source: Any) -> tuple[str, str]:
    """The file of a ConfigSource, and the folder that is watched instead of the file's own or ""."""
    if source.WhichOneof("config_source_specifier") == "path":
        return source.path, ""
    return source.path_config_source.path, source.path_config_source.watched_directory.path


def check(source: Any) -> None:
    """Raise ConfigError for a ConfigSource that can be no source."""
    which = source.WhichOneof("config_source_specifier")
    if which is None:
        fail("", "Missing config source specifier in envoy.config.core.v3.ConfigSource")
    if which not in ("path", "path_config_source"):
        fail(which, f"configuration by {which} is not supported", UNSUPPORTED)
    path, _ = path_of(source)
    if not os.path.exists(path):
        fail("path" if which == "path" else f"{which}.path", f"paths must refer to an existing path in the system: '{path}' does not exist")
