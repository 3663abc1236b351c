"""All that one proxy gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from control.translate.resource import NO_RESOURCES, SECRET, Resource, ResourceSet

_NOWHERE: Mapping[str, frozenset[str]] = {}


class View:
    """All resources of one proxy: for each type, sets that others may share, always as many. Names are unique within a type.

    `led`: the services to which virtual hosts lead that the proxy asked for by their names.
    """

    __slots__ = ("_parts", "led")

    def __init__(self, parts: Mapping[str, tuple[ResourceSet, ...]], led: Mapping[str, frozenset[str]] = _NOWHERE) -> None:
        self._parts = parts
        self.led = led

    def parts(self, url: str) -> tuple[ResourceSet, ...]:
        """The sets of one type; empty for a type that we do not serve."""
        return self._parts.get(url, ())

    def without_secrets(self) -> View:
        """The same without keys: of secrets, only the last set stays, which has names of files."""
        there = self.parts(SECRET)
        return View({**self._parts, SECRET: (*(NO_RESOURCES for _ in there[1:]), *there[-1:])}, self.led) if there else self

    def get(self, url: str, name: str) -> Resource | None:
        """One resource."""
        return next((part[name] for part in self.parts(url) if name in part), None)

    def all(self, url: str) -> Iterator[Resource]:
        """All resources of a type."""
        for part in self.parts(url):
            yield from part.values()
