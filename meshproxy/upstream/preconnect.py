"""Connections made ahead of requests for the whole of a cluster: `preconnect_policy.predictive_preconnect_ratio`.

Before a request goes out, connections are dialled at the hosts that the next requests will be for, as long as the cluster has room for less than the ratio
times what is going on. That takes a balancer that can say whose turn is next: ROUND_ROBIN and RANDOM; with others the ratio means nothing, as in Envoy
(but for its LEAST_REQUEST with weights). Envoy looks at the streams and the room of all clusters together; here a cluster looks at its own.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from meshproxy.upstream.balance.base import nobody

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshproxy.upstream.balance.base import LbContext, Picker
    from meshproxy.upstream.host import Host
    from meshproxy.upstream.pool import Pool

_MOST = 3  # dials that one request sets off


class Preconnect:
    """The hosts that were chosen ahead, and when to dial them."""

    __slots__ = ("_chosen", "_picker", "_ratio")

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._chosen: deque[Host] = deque()  # in the order in which requests will get them
        self._picker: Picker = nobody

    def follow(self, picker: Picker) -> Picker:
        """The hosts have changed: choose by `picker` from now on. Returns the picker for requests."""
        self._picker = picker
        self._chosen.clear()
        return self.pick

    def pick(self, context: LbContext | None = None) -> Host | None:
        """The host for a request."""
        return self._chosen.popleft() if self._chosen else self._picker(context)

    def before_request(self, hosts: Iterable[Host], healthy: int, pool_of: Callable[[Host], Pool]) -> None:
        """A request is about to take a connection. `hosts`: of the cluster; `healthy`: how many of them are; `pool_of`: where a host's connections are."""
        for _ in range(_MOST):
            streams = room = 0
            for host in hosts:
                for pool in (host.pools or {}).values():
                    waiting, active, free = pool.load()
                    streams += waiting + active
                    room += active + free
            if (streams + 1) * self._ratio <= room or len(self._chosen) >= healthy:
                return
            chosen = self._picker(None)
            if chosen is None:
                return
            self._chosen.append(chosen)
            if not pool_of(chosen).dial_ahead(self._ratio):
                return
