"""Configurations of HTTP filters that come by discovery (ECDS), as a worker has them: what main sent last, and which connection managers use it.

A filter is replaced between two requests; one that is under way keeps the chain that it began with, and no connection notices.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from google.protobuf import any_pb2

from meshproxy.api import messages, registry

_HCM = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
HONOURS = {"envoy.config.core.v3.ExtensionConfigSource": "config_source default_config apply_default_config_without_warming type_urls"}

Place = tuple[int, int]  # of a filter in a HttpConnectionManager: in which of the `upgrade_configs`, -1 for `http_filters`; and where in it


class User(Protocol):
    """Who has such filters."""

    def filter_changed(self, key: bytes) -> None:
        """There is another configuration, or none any more."""


class ExtensionConfigs:
    """By key (`key_of`), as serialised google.protobuf.Any. Main's copy only holds what a new worker inherits."""

    def __init__(self, known: Mapping[bytes, bytes] | None = None) -> None:
        self.serialised: dict[bytes, bytes] = dict(known or {})
        self._users: dict[bytes, weakref.WeakSet[User]] = {}

    def use(self, key: bytes, user: User) -> None:
        """`user` hears of others as long as it lives. Held weakly."""
        self._users.setdefault(key, weakref.WeakSet()).add(user)

    def get(self, key: bytes) -> any_pb2.Any | None:
        """The present configuration."""
        serialised = self.serialised.get(key)
        return any_pb2.Any.FromString(serialised) if serialised is not None else None

    def update(self, key: bytes, serialised: bytes) -> None:
        """There is a new one; empty: there is none any more."""
        if serialised:
            self.serialised[key] = serialised
        else:
            self.serialised.pop(key, None)
        for user in list(self._users.get(key, ())):
            user.filter_changed(key)


def key_of(entry: Any) -> bytes:
    """What an HttpFilter with a `config_discovery` is known by: two of one name from one source are one subscription."""
    return entry.name.encode() + b"\0" + entry.config_discovery.config_source.SerializeToString(deterministic=True)


def fits(entry: Any, packed: Any) -> bool:
    """Whether a configuration is of a type that the filter may have."""
    return registry.type_url(packed) in {registry.TYPE_PREFIX + messages.full_name(url) for url in entry.config_discovery.type_urls}


def filters(listener: Any) -> Iterator[tuple[Any, Place]]:
    """The HTTP filters of a `Listener` that come by discovery: the connection manager, and at which place in it."""
    for chain in (*listener.filter_chains, *([listener.default_filter_chain] if listener.HasField("default_filter_chain") else ())):
        for entry in chain.filters:
            if messages.full_name(entry.typed_config.type_url) == _HCM:
                manager = registry.unpack(entry.typed_config)
                for upgrade, entries in enumerate((manager.http_filters, *(config.filters for config in manager.upgrade_configs)), -1):
                    for position, one in enumerate(entries):
                        if one.HasField("config_discovery"):
                            yield manager, (upgrade, position)


def at(manager: Any, place: Place) -> Any:
    """The HttpFilter there."""
    upgrade, position = place
    return (manager.http_filters if upgrade < 0 else manager.upgrade_configs[upgrade].filters)[position]


def path(place: Place) -> str:
    """How errors name it."""
    upgrade, position = place
    return f"http_filters[{position}]" if upgrade < 0 else f"upgrade_configs[{upgrade}].filters[{position}]"
