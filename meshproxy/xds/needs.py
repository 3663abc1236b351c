"""What listeners and clusters wait for: single resources (routes, secrets), each subscribed to once however many need it, and for as long as somebody does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api.errors import ConfigError

if TYPE_CHECKING:
    from meshproxy.xds.subscription import Subscription


class Need:
    """One resource. `settled`: it has come, or there was time enough. `users`: whoever needs it -> what for. Subclasses set `subscription`."""

    subscription: Subscription

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.settled = False
        self.users: dict[object, Any] = {}
        self.waiting: dict[object, Callable[[], None]] = {}

    def failed(self) -> None:
        """Nothing (good) came: those who wait go on without it."""
        self.settle()

    def settle(self) -> None:
        """Let those who wait go on."""
        self.settled = True
        waiting, self.waiting = self.waiting, {}
        for ready in waiting.values():
            ready()

    def dropped(self) -> None:
        """Nobody needs it any more."""


class Wanted:
    """One thing that somebody needs: the key of it, how it is made if nobody needs it yet (may raise ConfigError), and what for. `waits`: cannot do without
    until it has settled."""

    __slots__ = ("key", "make", "user", "waits")

    def __init__(self, key: bytes, make: Callable[[], Need], user: Any = None, *, waits: bool = True) -> None:
        self.key = key
        self.make = make
        self.user = user
        self.waits = waits


class Needs:
    """All of them, by key."""

    def __init__(self) -> None:
        self.known: dict[bytes, Need] = {}

    def acquire(self, wanted: Iterable[Wanted], ready: Callable[[], None]) -> Callable[[], None]:
        """Subscribe to everything; `ready` is called once all of it has settled, perhaps at once. Returns what gives it all back. Raises ConfigError."""
        held: list[tuple[Need, object]] = []
        missing: set[Need] = set()
        new: list[Need] = []
        waiting = True

        def settled(one: Need) -> None:
            missing.discard(one)
            if not missing and not waiting:
                ready()

        try:
            for want in wanted:
                one = self.known.get(want.key)
                if one is None:
                    one = self.known[want.key] = want.make()
                    new.append(one)
                token = object()
                one.users[token] = want.user
                held.append((one, token))
                if want.waits and not one.settled:
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

    def _release(self, held: list[tuple[Need, object]]) -> None:
        for one, token in held:
            one.users.pop(token, None)
            one.waiting.pop(token, None)
            if not one.users and self.known.get(one.key) is one:
                del self.known[one.key]
                one.subscription.close()
                one.dropped()
                scope = one.subscription.scope
                if all(other.subscription.scope.prefix != scope.prefix for other in self.known.values()):
                    scope.remove()
        held.clear()


def _bind(function: Callable[[Need], None], one: Need) -> Callable[[], None]:
    return lambda: function(one)
