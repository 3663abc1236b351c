"""Reading a document field by field, noticing every mistake in it.

A parser asks a `Fields` for what it honours. Whatever it has not asked for when `end` is called is refused: as no field at all, or, when it is one of those
that `not_honoured` was told, as one that this control plane does not honour. All problems of a document are found in one go.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from meshproxy.api.errors import UNKNOWN, UNSUPPORTED, Problem, join

_T = TypeVar("_T")

_DURATION = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LABEL_LIMIT = 1024
FLAW = "flaw"  # a part of an object that is told to whoever wrote it, and makes only that part useless


class Fields:
    """One mapping of a document, at `path`; `problems` are those of the whole document."""

    __slots__ = ("_asked", "_children", "_refused", "_value", "path", "problems")

    def __init__(self, value: Mapping[str, Any], path: str = "", problems: list[Problem] | None = None) -> None:
        self._value = value
        self._asked: set[str] = set()
        self._refused: dict[str, str] = {}
        self._children: list[Fields] = []
        self.path = path
        self.problems: list[Problem] = [] if problems is None else problems

    def __contains__(self, name: str) -> bool:
        return self._value.get(name) is not None

    def names(self) -> list[str]:
        """The fields that are there."""
        return [name for name, value in self._value.items() if value is not None]

    # --- what goes wrong

    def error(self, name: str, why: str, kind: str = "invalid") -> None:
        """Note a problem with the field `name`; "" is the mapping itself."""
        self.problems.append(Problem(join(self.path, name), why, kind))

    def flaw(self, name: str, why: str) -> None:
        """Note a mistake that leaves the rest of the object as it is: what the field is about is then not served, or answered with an error."""
        self.error(name, why, FLAW)

    def not_honoured(self, *names: str, why: str = "meshctl does not honour this field") -> None:
        """Fields of the API that are refused when they are there."""
        self._refused.update(dict.fromkeys(names, why))

    def ignore(self, *names: str) -> None:
        """Fields that say nothing to a mesh."""
        self._asked.update(names)

    def one_of(self, *names: str, required: bool = False) -> str:
        """The one of these fields that is there, "" without any."""
        there = [name for name in names if name in self]
        if len(there) > 1:
            self.error(there[1], f"there is {there[0]!r} already; only one of {', '.join(names)} can be")
        elif required and not there:
            self.error("", f"one of {', '.join(names)} is needed")
        return there[0] if there else ""

    def end(self) -> None:
        """Refuse what nobody asked for, here and below."""
        for name, value in self._value.items():
            if name in self._asked or value is None:
                continue
            if name in self._refused:
                self.error(name, self._refused[name], UNSUPPORTED)
                continue
            near = difflib.get_close_matches(name, self._asked | self._refused.keys(), 1)
            self.error(name, f"no such field; did you mean {near[0]!r}?" if near else "no such field", UNKNOWN)
        for child in self._children:
            child.end()

    # --- plain values

    def _get(self, name: str, required: bool) -> Any:
        self._asked.add(name)
        value = self._value.get(name)
        if value is None and required:
            self.error(name, "is needed")
        return value

    def text(self, name: str, default: str = "", *, required: bool = False, choices: Iterable[str] = ()) -> str:
        """A string, one of `choices` if there are any."""
        value = self._get(name, required)
        if value is None:
            return default
        if not isinstance(value, str):
            self.error(name, f"must be text, not {value!r}")
            return default
        if required and not value:
            self.error(name, "must not be empty")
        if choices and value not in choices:
            self.error(name, f"{value!r} is not one of {', '.join(choices)}")
            return default
        return value

    def integer(self, name: str, default: int | None = None, *, low: int = 0, high: int = 2**32 - 1, required: bool = False) -> int | None:
        """A whole number within limits."""
        value = self._get(name, required)
        if value is None:
            return default
        if isinstance(value, str) and value.isdigit() and len(value) < 20:  # beyond 31 bits, whole numbers are read as text
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            self.error(name, f"must be a whole number, not {value!r}")
            return default
        if not low <= value <= high:
            self.error(name, f"{value} is not within {low} to {high}")
            return default
        return value

    def port(self, name: str, *, required: bool = False) -> int:
        """A port number, 0 when there is none."""
        return self.integer(name, 0, low=1, high=65535, required=required) or 0

    def number(self, name: str, default: float, *, low: float = 0.0, high: float = math.inf) -> float:
        """A number, possibly with a fraction."""
        value = self._get(name, False)
        if value is None:
            return default
        try:
            result = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            result = math.nan
        if math.isnan(result):
            self.error(name, f"must be a number, not {value!r}")
            return default
        if not low <= result <= high:
            self.error(name, f"{value} is not within {low:g} to {high:g}")
            return default
        return result

    def boolean(self, name: str, default: bool | None = False) -> bool | None:
        value = self._get(name, False)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.error(name, f"must be true or false, not {value!r}")
            return default
        return value

    def duration(self, name: str, *, required: bool = False, low: float = 0.0) -> float | None:
        """Seconds of a duration such as 1.5s, 100ms or 1h30m."""
        value = self._get(name, required)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            self.error(name, f"must be a duration such as 1.5s, not {value!r}")
            return None
        parts = _DURATION.findall(value)
        if "".join(parts) != value or len(value) > 40:
            self.error(name, f"must be a duration such as 1.5s, not {value!r}")
            return None
        seconds = 0.0
        for part in parts:
            unit = part.lstrip("0123456789.")
            seconds += float(part[: -len(unit)]) * _UNITS[unit]
        if seconds < low or seconds > 315576000000 or 0 < seconds < 1e-3:
            self.error(name, f"{value} must be at least {max(low, 1e-3):g}s" if seconds < 1 else f"{value} is too long")
            return None
        return seconds

    # --- values with values inside

    def child(self, name: str, *, required: bool = False) -> Fields | None:
        """The mapping in the field `name`."""
        value = self._get(name, required)
        return None if value is None else self._below(value, name)

    def need(self, name: str) -> Fields:
        """The mapping in a field that must be there; an empty one when it is not, which was noted."""
        return self.child(name, required=True) or Fields({}, join(self.path, name), self.problems)

    def _below(self, value: Any, name: str) -> Fields | None:
        if not isinstance(value, dict):
            self.error(name, f"must be a mapping, not {value!r:.60}")
            return None
        child = Fields(value, join(self.path, name), self.problems)
        self._children.append(child)
        return child

    def _list(self, name: str, required: bool = False) -> list[Any]:
        value = self._get(name, required)
        if value is None:
            return []
        if not isinstance(value, list):
            self.error(name, f"must be a list, not {value!r:.60}")
            return []
        if required and not value:
            self.error(name, "must not be empty")
        return value

    def count(self, name: str) -> int:
        """How many there are in a list."""
        value = self._value.get(name)
        return len(value) if isinstance(value, list) else 0

    def each(self, name: str, parse: Callable[[Fields], _T | None], *, required: bool = False) -> tuple[_T, ...]:
        """What `parse` makes of each mapping of a list; None is left out."""
        made = []
        for index, item in enumerate(self._list(name, required)):
            below = self._below(item, f"{name}[{index}]")
            result = None if below is None else parse(below)
            if result is not None:
                made.append(result)
        return tuple(made)

    def texts(self, name: str, *, required: bool = False) -> tuple[str, ...]:
        """A list of strings."""
        found = []
        for index, item in enumerate(self._list(name, required)):
            if isinstance(item, str) and item:
                found.append(item)
            else:
                self.error(f"{name}[{index}]", f"must be text, not {item!r:.60}")
        return tuple(found)

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        found = []
        for index, item in enumerate(self._list(name)):
            if isinstance(item, int) and not isinstance(item, bool):
                found.append(item)
            else:
                self.error(f"{name}[{index}]", f"must be a whole number, not {item!r:.60}")
        return tuple(found)

    def mapping(self, name: str, parse: Callable[[Fields, str], _T | None]) -> dict[str, _T]:
        """A mapping with any keys: what `parse(mapping, key)` makes of each value."""
        below = self.child(name)
        if below is None:
            return {}
        made = {}
        for key in below._value:
            result = parse(below, key)
            if result is not None:
                made[key] = result
        return made

    def string_map(self, name: str) -> dict[str, str]:
        """A mapping of strings to strings, such as labels."""
        return self.mapping(name, lambda below, key: below.text(key) if len(key) < _LABEL_LIMIT else None)

    def int_or_text(self, name: str) -> int | str:
        """A port number or the name of one; "" when there is none."""
        if isinstance(self._value.get(name), str):
            return self.text(name)
        return self.port(name) or ""

    def rest_of(self, name: str) -> Fields:
        """The mapping in the field `name` (of this one itself, without a name), of which only some fields matter; empty when there is none."""
        fields = (self.child(name) if name else self) or Fields({}, join(self.path, name), self.problems)
        fields.rest()
        return fields

    def rest(self) -> Mapping[str, Any]:
        """The plain mapping, for what only needs to be there; it counts as asked for."""
        self._asked.update(self._value)
        return self._value
