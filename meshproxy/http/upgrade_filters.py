"""Filters of their own for a type of upgrade (`upgrade_configs[].filters`): in place of all of `http_filters`, with a router of their own as the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.http.filter_chain import Chain
from meshproxy.http.stream import TAKEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.http.filter_entry import FilterEntry
    from meshproxy.http.replies import Reply
    from meshproxy.http.router import Router
    from meshproxy.http.routes import Route
    from meshproxy.http.stream import Stream


class UpgradeFilters:
    """Those of one type of upgrade. `select` is the connection manager's, for what routes say of filters."""

    def __init__(self, entries: list[FilterEntry], router: Router, select: Callable[[Route | None, list[FilterEntry]], list[Any]]) -> None:
        self.entries = entries
        self.router = router
        self._select = select
        self._last = _Last(router)
        self._chains: dict[Route | None, Chain] = {}

    def build(self, route: Route | None) -> Chain:
        """The chain for `route`. Raises ConfigError for what the route says of a filter."""
        return Chain([*self._select(route, self.entries), self._last])

    def chain(self, route: Route | None) -> Chain:
        """The same, kept from the first request on."""
        found = self._chains.get(route)
        if found is None:
            found = self._chains[route] = self.build(route)
        return found

    def forget(self) -> None:
        """There are other routes, or another configuration of a filter."""
        self._chains = {}


class _Last:
    """The router as the last filter: it takes the request from the connection manager's own."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def request_headers(self, stream: Stream, end_stream: bool) -> Reply | Any:
        """Begin, or say why that cannot be."""
        return self._router.start(stream, end_stream) or TAKEN
