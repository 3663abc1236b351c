"""ConfigSource messages: where resources of a type come from, made into subscriptions."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import UNSUPPORTED, fail, under
from meshproxy.xds.client import Api, Mux, StreamSubscription
from meshproxy.xds.files import FileSubscription
from meshproxy.xds.identity import LocalSubscription
from meshproxy.xds.inotify import Watches
from meshproxy.xds.subscription import init_timeout

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.xds.cache import Cache
    from meshproxy.xds.identity import LocalIdentity
    from meshproxy.xds.resources import ResourceType
    from meshproxy.xds.subscription import Rules, Subscription, Watcher


class Sources:
    """Makes subscriptions, and owns what they share: the watches of files, and the stream of all types, if there is one (`ads`, an ApiConfigSource).

    `local`: the identity that this process gets for itself. `cache`: what control planes said, on disk.
    """

    def __init__(
        self, context: Context, rules: Rules, ads: Any, is_static: Callable[[str], bool], local: LocalIdentity | None = None, cache: Cache | None = None
    ) -> None:
        self._cache = cache
        self._context = context
        self._rules = rules
        self._is_static = is_static
        self._local = local
        self.watches = Watches(context.loop)
        self._made: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self.ads: Mux | None = None
        if ads is not None:
            with under("dynamic_resources.ads_config"):
                self.ads = Api(ads, is_static).ads(context)

    def subscribe(self, source: Any, type: ResourceType, name: str, watcher: Watcher, scope: Scope, *, delta: bool = False) -> Subscription:
        """A subscription for a resource of that name (or xds.resources.WILDCARD), not started. Raises ConfigError, with paths relative to `source`.

        `delta`: it makes sense by delta only.
        """
        made = self._subscription(source, type, name, watcher, scope, delta)
        self._made.add(made)
        return made

    def _subscription(self, source: Any, type: ResourceType, name: str, watcher: Watcher, scope: Scope, delta: bool) -> Subscription:
        check(source, self._is_static, has_ads=self.ads is not None)
        which = source.WhichOneof("config_source_specifier")
        if which in ("path", "path_config_source"):
            path, watched = path_of(source)
            return FileSubscription(path, watched, self.watches, type, name, watcher, scope, self._context, self._rules)
        if which == "api_config_source" and self._local is not None and self._local.answers(source):
            return LocalSubscription(self._local, source, type, name, watcher, scope, self._context, self._rules)
        own = which != "ads"
        mux = Api(source.api_config_source, self._is_static).single(type, scope, self._context) if own else self.ads
        assert mux is not None
        if delta and not mux.delta:
            fail("ads", "ADS must use DELTA_GRPC api_type for this")
        kept = self._cache.entry(type, name, source) if self._cache is not None else None
        return StreamSubscription(mux, own, type, name, watcher, scope, self._context, self._rules, init_timeout(source), kept)

    def shared(self, source: Any, type: ResourceType, scope: Scope) -> Mux:
        """The stream of a source (one of delta), for several subscriptions: that of all types, or one of their own. Raises ConfigError."""
        check(source, self._is_static, has_ads=self.ads is not None)
        if source.WhichOneof("config_source_specifier") == "ads":
            assert self.ads is not None
            if not self.ads.delta:
                fail("ads", "ADS must use DELTA_GRPC api_type for this")
            return self.ads
        return Api(source.api_config_source, self._is_static).single(type, scope, self._context)

    def on_shared(self, mux: Mux, source: Any, type: ResourceType, name: str, watcher: Watcher, scope: Scope) -> Subscription:
        """A subscription on such a stream."""
        mux.start()
        made = StreamSubscription(mux, False, type, name, watcher, scope, self._context, self._rules, init_timeout(source))
        self._made.add(made)
        return made

    @property
    def subscriptions(self) -> list[Subscription]:
        """All that somebody wants."""
        return [one for one in self._made if not one.closed]

    def close(self) -> None:
        """Watch nothing any more."""
        if self._cache is not None:
            self._cache.flush()
        if self._local is not None:
            self._local.close()
        self.watches.close()


def path_of(source: Any) -> tuple[str, str]:
    """The file of a ConfigSource, and the folder that is watched instead of the file's own or ""."""
    if source.WhichOneof("config_source_specifier") == "path":
        return source.path, ""
    return source.path_config_source.path, source.path_config_source.watched_directory.path


def check(source: Any, is_static: Callable[[str], bool], *, has_ads: bool) -> None:
    """Raise ConfigError for a ConfigSource that can be no source."""
    which = source.WhichOneof("config_source_specifier")
    if which is None:
        fail("", "Missing config source specifier in envoy.config.core.v3.ConfigSource")
    if which == "ads":
        if not has_ads:
            fail("ads", "there is no dynamic_resources.ads_config")
    elif which == "api_config_source":
        with under(which):
            Api(source.api_config_source, is_static)
    elif which in ("path", "path_config_source"):
        path, _ = path_of(source)
        if not os.path.exists(path):
            fail("path" if which == "path" else f"{which}.path", f"paths must refer to an existing path in the system: '{path}' does not exist")
    else:
        fail(which, f"configuration by {which} is not supported", UNSUPPORTED)
