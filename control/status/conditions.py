"""Objects with a status, and conditions: what they say, and since when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from control.kinds.registry import Identity

CONTROLLER = "meshproxy/gateway"


class Object(NamedTuple):
    """A document of the API server, what is served of it, and what is wrong with it."""

    identity: Identity
    document: Mapping[str, Any]
    value: Any
    problems: tuple[str, ...]

    @property
    def generation(self) -> int:
        return int(self.document["metadata"].get("generation") or 0)

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.document.get("spec") or {}

    @property
    def status(self) -> Mapping[str, Any]:
        return self.document.get("status") or {}


class Said(NamedTuple):
    """A condition without its history."""

    type: str
    holds: bool
    reason: str
    message: str = ""


def conditions(one: Object, before: Any, said: Iterable[Said], now: str) -> list[dict[str, Any]]:
    """A list of conditions. Their times are those of their last change; conditions of others stay. `now`: RFC 3339."""
    known = {entry.get("type"): entry for entry in before or ()}
    for each in said:
        status = "True" if each.holds else "False"
        old = known.get(each.type) or {}
        since = old["lastTransitionTime"] if old.get("status") == status and old.get("lastTransitionTime") else now
        known[each.type] = {
            "type": each.type,
            "status": status,
            "reason": each.reason,
            "message": each.message,
            "observedGeneration": one.generation,
            "lastTransitionTime": since,
        }
    return list(known.values())


def of_others(entries: Any) -> list[dict[str, Any]]:
    """Of the entries of a list of parents or ancestors, those that other controllers wrote."""
    return [entry for entry in entries or () if isinstance(entry, dict) and entry.get("controllerName") != CONTROLLER]


def of_ours(entries: Any, name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Those that we wrote, by what they are about, which is in the field `name`."""
    found = [entry for entry in entries or () if isinstance(entry, dict) and entry.get("controllerName") == CONTROLLER]
    return {key_of(entry.get(name) or {}): entry for entry in found}


def key_of(reference: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells parents, and ancestors, apart."""
    group, kind = reference.get("group", "gateway.networking.k8s.io"), reference.get("kind", "Gateway")
    return group, kind, reference.get("namespace"), reference.get("name"), reference.get("sectionName"), reference.get("port")
