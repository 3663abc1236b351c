"""HTTP filters: one file each, one line in `api/registry.py`. `docs/filters.md` has the contract and a ten-line example.

Start with `fault.py` for a filter that waits, `header_mutation.py` for one that never does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.record import Record

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from meshproxy.context import Context
    from meshproxy.observe.stats import Scope
    from meshproxy.upstream.cluster_manager import ClusterManager


class FilterContext(Record, frozen=True):
    """What a filter may use when it is compiled. `scope` is `http.<stat_prefix>.`; `stat_prefix` is the connection manager's. `listener`: its proto, None where
    there is none."""

    context: Context
    scope: Scope
    stat_prefix: str
    listener: Any = None

    @property
    def runtime(self) -> Any:
        """The runtime layers."""
        return self.context.runtime

    @property
    def clusters(self) -> ClusterManager:
        """All clusters by name."""
        return self.context.clusters

    @property
    def clock(self) -> Callable[[], float]:
        """The monotonic clock, in seconds."""
        return self.context.clock

    @property
    def random(self) -> random.Random:
        """The process's source of randomness."""
        return self.context.random
