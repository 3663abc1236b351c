"""LDS: which listeners there are besides the static ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.api.errors import Collector, ConfigError, Problem
from meshproxy.record import Record

if TYPE_CHECKING:
    from meshproxy.context import Context
    from meshproxy.xds.resources import Resource, Update


class Manager(Protocol):
    """Main's listeners (meshproxy.listeners.Listeners)."""

    def update(self, proto: Any, version: str, validate: Callable[[Any], None]) -> bool:
        """Add or replace; False when there is nothing to do. Raises ConfigError."""

    def remove(self, name: str) -> bool:
        """Remove; False when there is nothing to do."""

    def dynamic_names(self) -> set[str]:
        """The listeners that came by an API, in use or warming."""


class Failure(Record):
    """A listener that was refused."""

    message: Any
    version: str
    when: float  # Unix time
    details: str


class ListenerUpdates:
    """The watcher of LDS. `failures`: what was wrong in the last answer, by name. `on_first`: called once, when the first answer has come or will not come."""

    def __init__(self, manager: Manager, context: Context, validate: Callable[[Any], None], on_first: Callable[[], None]) -> None:
        self.version = ""
        self.failures: dict[str, Failure] = {}
        self._manager = manager
        self._context = context
        self._validate = validate
        self._on_first = on_first
        self._answered = False

    def updated(self, update: Update) -> None:
        """Remove what is gone, add what is new, replace what has changed. Raises ConfigError after that if some were wrong."""
        problems = Collector()
        gone = set(update.removed)
        if update.complete:
            gone |= self._manager.dynamic_names() - {one.name for one in update.resources}
        changed = False
        for name in sorted(gone):
            changed |= self._manager.remove(name)
        self.failures = {}
        for resource in update.resources:
            try:
                changed |= self._add(resource)
            except ConfigError as error:
                problems.problems += [Problem(problem.path, f"{resource.name}: {problem.why}", problem.kind) for problem in error.problems]
                self.failures[resource.name] = Failure(resource.message, resource.version, self._context.wall(), str(error))
        if changed:
            self.version = update.version
        self._first()
        problems.raise_any()

    def failed(self) -> None:
        """Nothing (good) came: the start goes on."""
        self._first()

    def _add(self, resource: Resource) -> bool:
        if resource.message is None:
            return False
        return self._manager.update(resource.message, resource.version, self._validate)

    def _first(self) -> None:
        if not self._answered:
            self._answered = True
            self._on_first()
