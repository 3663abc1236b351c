"""Which headers of a request a service may change (envoy.config.common.mutation_rules.v3.HeaderMutationRules)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, regex
from meshproxy.codec.grammar import VALUE

if TYPE_CHECKING:
    from collections.abc import Callable

HONOURS = {
    "envoy.config.common.mutation_rules.v3.HeaderMutationRules": (
        "allow_all_routing allow_envoy disallow_system disallow_all allow_expression disallow_expression disallow_is_error"
    ),
    **regex.HONOURS,
}

SET, ADD, REMOVE = "set", "append", "remove"
ALLOWED, IGNORED, FAILED = range(3)

_ROUTING = frozenset((b"host", b":authority", b":method", b":scheme"))
_SCHEMES = (b"http", b"https")


class MutationRules:
    """Compiled rules."""

    __slots__ = ("_all_routing", "_allow", "_disallow", "_disallows_all", "_envoy", "_refusal", "_system")

    def __init__(self, proto: Any, runtime: Any = None) -> None:
        """Raises ConfigError relative to `proto`."""
        self._all_routing: bool = proto.allow_all_routing.value
        self._envoy: bool = proto.allow_envoy.value
        self._system: bool = not proto.disallow_system.value
        self._disallows_all: bool = proto.disallow_all.value
        self._refusal = FAILED if proto.disallow_is_error.value else IGNORED
        self._allow = _compile(proto, "allow_expression", runtime)
        self._disallow = _compile(proto, "disallow_expression", runtime)

    def check(self, operation: str, name: bytes, value: bytes = b"") -> int:
        """ALLOWED; IGNORED: the mutation is left out; FAILED: the whole answer is invalid. `name` is in lower case."""
        if self._allows(operation, name) and (operation == REMOVE or _is_valid(name, value)):
            return ALLOWED
        return self._refusal

    def _allows(self, operation: str, name: bytes) -> bool:
        if operation == REMOVE and (name.startswith(b":") or name == b"host"):
            return False
        if self._disallow is not None and self._disallow(name):
            return False
        if self._allow is not None and self._allow(name):
            return True
        if self._disallows_all or (name in _ROUTING and not self._all_routing):
            return False
        if name.startswith(b":") and (operation == ADD or not self._system):
            return False
        return self._envoy or not name.startswith(b"x-envoy")


def _compile(proto: Any, field: str, runtime: Any) -> Callable[[bytes], bool] | None:
    if not proto.HasField(field):
        return None
    with errors.under(field):
        return regex.compile_regex(getattr(proto, field), runtime)


def _is_valid(name: bytes, value: bytes) -> bool:
    if not name.startswith(b":") and value.translate(VALUE) != value:
        return False
    if name in (b"host", b":authority"):
        return is_authority(value)
    if name == b":scheme":
        return value.lower() in _SCHEMES
    if name == b":status":
        return value.isdigit() and int(value) >= 200
    return True


def is_authority(value: bytes) -> bool:
    """Whether the characters are such as an authority may have (RFC 3986 3.2)."""
    return all(byte in _AUTHORITY for byte in value)


_AUTHORITY = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._~%!$&'()*+,;=:@[]")
