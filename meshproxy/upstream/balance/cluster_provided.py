"""CLUSTER_PROVIDED: the cluster itself knows the host, as an ORIGINAL_DST cluster does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.upstream.balance.base import Balancer, Deps, Picker, nobody

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshproxy.upstream.host import Host, HostSet

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.cluster_provided.v3.ClusterProvided"
HONOURS = {"envoy.extensions.load_balancing_policies.cluster_provided.v3.ClusterProvided": ""}


def compile(proto: Any, deps: Deps) -> Balancer:
    """A balancer that never picks: the cluster replaces its picker."""
    return ClusterProvided()


class ClusterProvided:
    """Nothing to choose from."""

    needs_hash = False
    looks_ahead = False
    observes_latency = False

    def rebuild(self, host_sets: Sequence[HostSet]) -> Picker:
        """See `Balancer.rebuild`."""
        return nobody

    def observe(self, host: Host, seconds: float) -> None:
        """Latency plays no part."""
