"""Headers that a configuration adds to the requests of health checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors
from meshproxy.api.errors import UNSUPPORTED

if TYPE_CHECKING:
    from meshproxy.codec.headers import Pair

# What checks have of their own, and Envoy keeps in one field each.
_JOINED = frozenset((b"content-type", b"te", b"user-agent"))
_ADD_IF_ABSENT, _OVERWRITE_OR_ADD, _OVERWRITE_IF_EXISTS = 1, 2, 3


def add_headers(items: list[Pair], options: Iterable[Any], path: str) -> list[Pair]:
    """`items` and what the HeaderValueOptions at `path` make of them. Raises ConfigError."""
    for index, option in enumerate(options):
        value = option.header.value or option.header.raw_value.decode("latin-1")
        if "%" in value:
            errors.fail(f"{path}[{index}].header.value", "format commands are not supported in health checks", UNSUPPORTED)
        name = option.header.key.lower().encode()
        action = option.append_action
        present = any(key == name for key, _ in items)
        if (action == _ADD_IF_ABSENT and present) or (action == _OVERWRITE_IF_EXISTS and not present):
            continue
        raw = value.encode("latin-1")
        if action in (_OVERWRITE_OR_ADD, _OVERWRITE_IF_EXISTS) or (option.HasField("append") and not option.append.value):
            items = [pair for pair in items if pair[0] != name]
        elif present and name in _JOINED:
            items = [(key, before + b"," + raw if key == name else before) for key, before in items]
            continue
        items = [*items, (name, raw)]
    return items
