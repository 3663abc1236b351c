"""Filters written by users in Python (meshproxy.python.v1.Filter): an importable `module:attribute` and a `config` for it.

The attribute (`compile` when none is named) is called as `attribute(config, context)` with the config as a dict and the FilterContext, once for the
filter and once for each route that overrides it, in every worker. It returns an object with any of a filter's hooks, or None: see `docs/filters.md`.

What a user's code raises stays here: the stream is answered 500 with the details `python_filter_error{<module>}` (reset when its response has begun), the
first failure of each hook is logged with its traceback, and all are counted in `http.<stat_prefix>.python_filter.failed`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import convert, errors
from meshproxy.api.errors import ConfigError
from meshproxy.http.filter_chain import HOLD
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/meshproxy.python.v1.Filter"
ROUTE_TYPE_URLS = (TYPE_URL,)
HONOURS = {"meshproxy.python.v1.Filter": "module config"}

_NOTHING = type(None)
# What each hook may return at once; an awaitable may result in the same but HOLD.
_KEPT = type(HOLD)
_HOOKS = {
    "request_headers": (_NOTHING, Reply),
    "request_data": (_NOTHING, bytes, Reply, _KEPT),
    "request_trailers": (_NOTHING, bytes, Reply),
    "response_headers": (_NOTHING, Reply, _KEPT),
    "response_data": (_NOTHING, bytes, Reply, _KEPT),
    "response_trailers": (_NOTHING, bytes, Reply),
}

log = logging.getLogger("meshproxy.filter")


class PythonFilter:
    """A user's filter object with a net under it. Has exactly the hooks that the object has."""

    __slots__ = (
        "_failed", "_reply", "_seen", "complete", "module", "name", "request_data", "request_headers", "request_trailers", "response_data",
        "response_headers", "response_trailers",
    )  # fmt: skip

    def __init__(self, module: str, user: Any, context: FilterContext) -> None:
        self.module = module
        self._failed = context.scope.counter("python_filter.failed")
        self._reply = Reply(500, details=f"python_filter_error{{{module}}}")
        self._seen: set[str] = set()
        for name, allowed in _HOOKS.items():
            hook = getattr(user, name, None)
            if hook is not None:
                setattr(self, name, self._guard(name, hook, allowed))
        if hasattr(user, "complete"):
            self.complete = self._guard_complete(user.complete)

    def _guard(self, name: str, hook: Callable[..., Any], allowed: tuple[type, ...]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            try:
                result = hook(*arguments)
            except Exception as error:  # noqa: BLE001  # a user's code may raise anything; _fail logs it
                return self._fail(name, error)
            if type(result) in allowed:
                return result
            if inspect.isawaitable(result):
                return self._wait(name, result, allowed)
            return self._refuse(name, result)

        return guarded

    async def _wait(self, name: str, awaitable: Awaitable[Any], allowed: tuple[type, ...]) -> Any:
        try:
            result = await awaitable
        except Exception as error:  # noqa: BLE001  # as in _guard
            return self._fail(name, error)
        return result if type(result) in allowed and result is not HOLD else self._refuse(name, result)

    def _guard_complete(self, hook: Callable[[Any], Any]) -> Callable[[Any], None]:
        def complete(stream: Any) -> None:
            try:
                hook(stream)
            except Exception as error:  # noqa: BLE001  # as in _guard
                self._fail("complete", error)

        return complete

    def _refuse(self, name: str, result: Any) -> Reply:
        return self._fail(name, TypeError(f"{name} returned {type(result).__name__}"))

    def _fail(self, name: str, error: Exception) -> Reply:
        self._failed.n += 1
        if name not in self._seen:
            self._seen.add(name)
            log.error("the Python filter %s failed in %s (logged once)", self.module, name, exc_info=error)
        return self._reply


def compile(proto: Any, context: FilterContext, *, default_module: str = "") -> PythonFilter | None:
    """The filter for a meshproxy.python.v1.Filter proto. Raises ConfigError when it cannot be made, whatever the user's code raised."""
    module = proto.module.value or default_module
    if not module:
        errors.fail("module", "must name the Python code: module or module:attribute")
    factory = _load(module)
    try:
        user = factory(convert.from_struct(proto.config), context)
    except ConfigError as error:
        raise error.under("config") from error
    except Exception as error:
        raise ConfigError.at("config", f"{module} does not take it: {type(error).__name__}: {error}") from error
    return None if user is None else PythonFilter(module, user, context)


def specialise(base: PythonFilter | None, overrides: list[Any], context: FilterContext) -> PythonFilter | None:
    """The filter for a route: the most specific override, whole; `module` may be left out when it stays the same."""
    return compile(overrides[-1], context, default_module=base.module if base is not None else "")


def _load(name: str) -> Callable[[dict[str, Any], FilterContext], Any]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute or "compile")
    except Exception as error:
        raise ConfigError.at("module", f"cannot load {name!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        errors.fail("module", f"{name!r} is not callable")
    return found
