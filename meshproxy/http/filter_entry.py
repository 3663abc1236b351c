"""The entries of `http_filters`, as a connection manager keeps them: compiled, and what is needed to compile them once more for a route.

One whose configuration comes by discovery (ECDS) is compiled whenever another one has come: see `extension_configs`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, messages, registry
from meshproxy.http import extension_configs
from meshproxy.http.replies import NO_FILTER_CONFIG, Reply

if TYPE_CHECKING:
    from meshproxy.http.filters import FilterContext
    from meshproxy.http.stream import Stream

log = logging.getLogger("meshproxy.http")


class FilterEntry:
    """One entry. `filter` is None when it does nothing, `module` when nothing is there to be compiled: by discovery, and not come yet. `discovery`: the key
    of one that comes by discovery, and its HttpFilter message."""

    __slots__ = ("disabled", "discovery", "filter", "module", "name")

    def __init__(self, name: str, module: Any, compiled: Any, disabled: bool) -> None:
        self.name = name
        self.module = module
        self.filter = compiled
        self.disabled = disabled
        self.discovery: tuple[bytes, Any] | None = None


class NobodyAnswers:
    """In place of filters where there are none: a request waits until a timeout or its client ends it, as in Envoy."""

    name = ""

    async def request_headers(self, stream: Stream, end_stream: bool) -> None:
        """Wait for ever."""
        await asyncio.get_running_loop().create_future()


class NoConfig:
    """In place of a filter by discovery of which nothing has come: requests are refused."""

    name = ""

    def request_headers(self, stream: Stream, end_stream: bool) -> Reply:
        """500."""
        return NO_FILTER_CONFIG


def by_discovery(entry: Any, last: bool, context: FilterContext, user: extension_configs.User) -> FilterEntry:
    """A filter whose configuration comes by discovery. `user` hears of others. Raises ConfigError with paths relative to `config_discovery`."""
    discovery = entry.config_discovery
    if last:
        errors.fail("", f"{entry.name}: the last filter, the router, cannot come by discovery", errors.UNSUPPORTED)
    for at, url in enumerate(discovery.type_urls):
        with errors.under(f"type_urls[{at}]"):
            registry.module(registry.TYPE_PREFIX + messages.full_name(url), "http filter")
    if discovery.apply_default_config_without_warming and not discovery.HasField("default_config"):
        errors.fail("apply_default_config_without_warming", f"Error: filter config {entry.name} applied without warming but has no default config.")
    made = FilterEntry(entry.name, None, None, entry.disabled)
    made.discovery = extension_configs.key_of(entry), entry
    if discovery.HasField("default_config"):
        with errors.under("default_config"):
            check_type(entry, discovery.default_config)
            _configure(made, discovery.default_config, context)
    known = context.context.extensions
    if known is not None:
        known.use(made.discovery[0], user)
        take(made, context)
    return made


def check_type(entry: Any, packed: Any) -> None:
    """Raise ConfigError for a configuration of a type that the filter may not have."""
    if not extension_configs.fits(entry, packed):
        url = registry.type_url(packed).removeprefix(registry.TYPE_PREFIX)
        errors.fail("", f"Error: filter config has type URL {url} but expect {', '.join(entry.config_discovery.type_urls)}.")


def take(made: FilterEntry, context: FilterContext) -> None:
    """Compile what has come, or the default if nothing has that may be used."""
    assert made.discovery is not None
    key, entry = made.discovery
    packed = context.context.extensions.get(key)
    if packed is None or not extension_configs.fits(entry, packed):
        packed = entry.config_discovery.default_config if entry.config_discovery.HasField("default_config") else None
    if packed is None:
        made.module = made.filter = None
        return
    try:
        _configure(made, packed, context)
    except errors.ConfigError as error:  # what main has found right: files have changed since
        log.error("filter %s: it stays as it was: %s", made.name, error)


def is_for(config: Any, module: Any) -> bool:
    """Whether a per-route configuration is one of that filter: another one may have come in its place."""
    return registry.module(registry.TYPE_PREFIX + config.DESCRIPTOR.full_name, "per-route filter configuration") is module


def _configure(made: FilterEntry, packed: Any, context: FilterContext) -> None:
    """Compile a configuration of a filter that is not the last one. Raises ConfigError."""
    module = registry.module(registry.type_url(packed), "http filter")
    if getattr(module, "TERMINAL", False):
        kind = packed.type_url.rpartition(".")[2]
        errors.fail("", f"Error: terminal filter named {made.name} of type {kind} must be the last filter in a http filter chain.")
    compiled = module.compile(registry.unpack(packed), context)
    if compiled is not None:
        compiled.name = made.name
    made.module, made.filter = module, compiled
