"""RANDOM: any host with the same probability, whatever its weight.

Envoy draws one number for both the priority and the host; we draw two, so that a priority that gets part of the load spreads it over all of its hosts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.upstream.balance.pipeline import Key, Pipeline
from meshproxy.upstream.balance.weighted import HONOURS as _LOCALITY
from meshproxy.upstream.balance.weighted import locality_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshproxy.upstream.balance.base import Balancer, Deps, LbContext, Picker
    from meshproxy.upstream.host import Host, HostSet

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.random.v3.Random"
HONOURS = {"envoy.extensions.load_balancing_policies.random.v3.Random": "locality_lb_config", **_LOCALITY}


def compile(proto: Any, deps: Deps) -> Balancer:
    """The balancer that a Random message asks for."""
    deps.locality = locality_config(proto.locality_lb_config)
    return Pipeline(Random(deps), deps)


class Random:
    """Any of them."""

    looks_ahead = True
    observes_latency = False

    def __init__(self, deps: Deps) -> None:
        self._random = deps.random.random

    def refresh(self, host_sets: Sequence[HostSet]) -> None:
        """Nothing to keep."""

    def source(self, hosts: list[Host], key: Key) -> Picker:
        """See `Policy.source`."""
        random, count = self._random, len(hosts)

        def pick(context: LbContext | None = None) -> Host:
            return hosts[int(random() * count)]

        return pick

    def observe(self, host: Host, seconds: float) -> None:
        """Latency plays no part."""
