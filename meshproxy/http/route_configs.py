"""Route configurations that come by discovery (RDS), as a worker has them: what main sent last, and which connection managers use it.

A table is replaced whole between two requests; a request that has its route keeps it, and no connection notices (docs/decisions/0010-updates.md).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.api import messages, registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HCM = "envoy.extensions.filters.network.http_connection_manager.v3."
HONOURS = {_HCM + "Rds": "config_source route_config_name"}


class User(Protocol):
    """Who routes by a configuration."""

    def set_routes(self, proto: Any) -> None:
        """There is a new RouteConfiguration."""


class RouteConfigs:
    """By key (`key_of`). Main's copy only holds what a new worker inherits."""

    def __init__(self, known: Mapping[bytes, bytes] | None = None) -> None:
        self.serialised: dict[bytes, bytes] = dict(known or {})
        self._users: dict[bytes, weakref.WeakSet[User]] = {}

    def use(self, key: bytes, user: User) -> Any:
        """The present RouteConfiguration, one without virtual hosts while there is none. `user` hears of others as long as it lives. Held weakly."""
        self._users.setdefault(key, weakref.WeakSet()).add(user)
        return _parse(self.serialised.get(key, b""))

    def update(self, key: bytes, serialised: bytes) -> None:
        """There is a new one."""
        self.serialised[key] = serialised
        for user in list(self._users.get(key, ())):
            user.set_routes(_parse(serialised))

    def forget(self, key: bytes) -> None:
        """Nobody needs it any more."""
        self.serialised.pop(key, None)
        self._users.pop(key, None)


def key_of(rds: Any) -> bytes:
    """What an Rds message is known by: two of equal contents are one subscription."""
    return bytes(rds.SerializeToString(deterministic=True))


def managers(listener: Any) -> Iterator[Any]:
    """The connection managers of a `Listener` that route by discovery."""
    for chain in (*listener.filter_chains, *([listener.default_filter_chain] if listener.HasField("default_filter_chain") else ())):
        for entry in chain.filters:
            if messages.full_name(entry.typed_config.type_url) == _HCM + "HttpConnectionManager":
                manager = registry.unpack(entry.typed_config)
                if manager.HasField("rds"):
                    yield manager


def _parse(serialised: bytes) -> Any:
    return messages.known("envoy.config.route.v3.RouteConfiguration").FromString(serialised)
