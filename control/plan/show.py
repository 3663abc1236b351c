"""Changes, for people and for programs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from control.kinds.registry import Identity
from control.output import table
from control.plan.compare import Change, FieldChange

_FIELDS = 20  # of a resource that people are shown
_WIDTH = 100  # of a value
_NAMES = 3  # of proxies, in a line
CREATED, CONFIGURED, DELETED = "created", "configured", "deleted"


def documents(before: Mapping[Identity, Any], after: Mapping[Identity, Any]) -> list[tuple[str, str]]:
    """(object, what becomes of it) of those that differ, by what they say."""
    made = []
    for one in sorted(before.keys() | after.keys(), key=lambda one: (one[2:], one)):
        word = CREATED if one not in before else DELETED if one not in after else CONFIGURED if before[one] != after[one] else ""
        if word:
            made.append((str(one), word))
    return made


def as_table(changes: Mapping[str, list[Change]]) -> str:
    """A line for each resource and what happens to it, with the proxies that it happens to; then its fields."""
    proxies: dict[int, list[str]] = defaultdict(list)
    kinds: dict[int, Change] = {}
    same: dict[tuple[str, str, str, str], int] = {}
    for proxy, found in changes.items():
        for one in found:
            number = same.setdefault((one.type, one.name, one.kind, repr(one.fields)), len(same))
            kinds[number] = one
            proxies[number].append(proxy)
    if not kinds:
        return "nothing changes for any proxy"
    rows = [("CHANGE", "TYPE", "RESOURCE", "PROXIES")]
    rows += [(one.kind, one.type, one.name, _names(proxies[number])) for number, one in kinds.items()]
    lines = [table(rows)]
    for number, one in kinds.items():
        if one.fields:
            lines += ["", f"{one.type} {one.name} ({_names(proxies[number])})", *map(_field, one.fields[:_FIELDS])]
            if len(one.fields) > _FIELDS:
                lines.append(f"  and {len(one.fields) - _FIELDS} more fields (-o yaml has them)")
    return "\n".join(lines)


def _names(proxies: list[str]) -> str:
    more = len(proxies) - _NAMES
    return ", ".join(proxies) if more <= 1 else f"{', '.join(proxies[:_NAMES])} and {more} more"


def _field(one: FieldChange) -> str:
    if one.before is None:
        return f"  + {one.path}: {_value(one.after)}"
    if one.after is None:
        return f"  - {one.path}: {_value(one.before)}"
    return f"  ~ {one.path}: {_value(one.before)} -> {_value(one.after)}"


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def plain(changes: Mapping[str, list[Change]]) -> list[dict[str, Any]]:
    """One mapping for each proxy."""
    return [
        {
            "proxy": proxy,
            "changes": [
                {
                    "type": one.type,
                    "name": one.name,
                    "change": one.kind,
                    **({"fields": [field._asdict() for field in one.fields]} if one.fields else {}),
                }
                for one in found
            ],
        }
        for proxy, found in changes.items()
    ]
