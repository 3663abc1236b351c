"""Filter chains, compiled per route: flat tuples of bound hooks, so that an absent hook or a filter that a route disables costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Hook = Callable[..., Any]


class _Hold:
    """The type of HOLD."""

    def __repr__(self) -> str:
        return "HOLD"


# What a filter's hook returns that keeps what it was given: a response's head, until the filter calls `stream.release_headers()`, or a piece of a body.
HOLD: Any = _Hold()

# In place of a filter's `request_headers_repeated`: a request that repeats itself would not be held up by it.
SETTLED: Any = object()

_RESPONSES = ("response_headers", "response_data", "response_trailers")
_NAMES = ("request_headers", "request_data", "request_trailers", *_RESPONSES, "complete")


class Chain:
    """The hooks of some filters, in the order in which they run: request hooks first to last, response hooks last to first."""

    __slots__ = (
        *_NAMES,
        "admission",
        "plannable",
        "positions",
        "repeated",
        "request_data_after",
        "response_data_after",
        "response_data_at",
        "response_trailers_after",
        "shaper",
        "varying",
    )

    request_headers: tuple[Hook, ...]
    request_data: tuple[Hook, ...]
    request_trailers: tuple[Hook, ...]
    response_headers: tuple[Hook, ...]
    response_data: tuple[Hook, ...]
    response_trailers: tuple[Hook, ...]
    complete: tuple[Hook, ...]

    def __init__(self, filters: Iterable[Any], admission: bool = False, route: Any = None) -> None:
        """`admission`: `route` has something to say before its filters run (see `HttpConnectionManager.admit`).

        `plannable`: requests that repeat themselves can go by plan (`http.plan`), with the hooks `repeated`; those that differ in a few values with the hooks
        `varying`, or not at all if that is None. `positions`: how many of `request_headers` have run with each of those. `shaper`: a filter that does nothing
        but change heads, in the same way each time (`filters.peer_metadata`), and is the first to see requests: plans are made of what it makes of them.
        Filters that do nothing as long as the route stays this one (`idles`) have no part in plans.
        """
        filters = tuple(filters)
        self.admission = admission
        for name in _NAMES:
            hooks = [hook for filter_ in filters if (hook := getattr(filter_, name, None)) is not None]
            if name.startswith("response"):
                hooks.reverse()
            setattr(self, name, tuple(hooks))
        # Where data goes on that the n-th trailers hook gives back: at the data hooks of the filters after it.
        self.request_data_after = _positions(filters, "request_trailers", "request_data", own=True)
        backwards = filters[::-1]
        self.response_data_after = _positions(backwards, "response_trailers", "response_data", own=True)
        # The data hook of the filter with the n-th head hook; and where trailers begin that the n-th data hook adds.
        self.response_data_at = _positions(backwards, "response_headers", "response_data", own=False)
        self.response_trailers_after = _positions(backwards, "response_data", "response_trailers", own=True)
        awake = [one for one in filters if not (hasattr(one, "idles") and one.idles(route))]
        looking = [one for one in awake if hasattr(one, "request_headers") and getattr(one, "request_headers_repeated", None) is not SETTLED]
        self.shaper: Any = looking[0] if looking and hasattr(looking[0], "shape_request") else None
        others = [filter_ for filter_ in looking if filter_ is not self.shaper]
        hooked = [id(filter_) for filter_ in filters if hasattr(filter_, "request_headers")]
        self.positions = (*(hooked.index(id(filter_)) + 1 for filter_ in others),)
        repeated = [getattr(filter_, "request_headers_repeated", None) for filter_ in others]
        changing = [name for one in awake for name in _RESPONSES if getattr(one, name, None) is not None][self.shaper is not None :]
        self.plannable = None not in repeated and not (changing or admission)
        self.repeated: tuple[Hook, ...] = tuple(hook for hook in repeated if hook is not None) if self.plannable else ()
        varying = [getattr(filter_, "request_headers_varying", None) for filter_ in others]
        self.varying: tuple[Hook, ...] | None = (*varying,) if self.plannable and None not in varying else None  # type: ignore[arg-type]


def _positions(filters: tuple[Any, ...], name: str, other: str, *, own: bool) -> tuple[int, ...]:
    """For each hook `name` how many hooks `other` the filters before it have; `own`: and its own filter."""
    positions = []
    count = 0
    for filter_ in filters:
        has_other = getattr(filter_, other, None) is not None
        if getattr(filter_, name, None) is not None:
            positions.append(count + (own and has_other))
        count += has_other
    return tuple(positions)


EMPTY = Chain(())
