"""What round robin and least request share: an EDF schedule when weights differ or hosts start slowly, and the locality part of their configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.upstream.balance.base import Deps, LbContext, LocalityConfig, Picker
from meshproxy.upstream.balance.edf import Edf

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from meshproxy.upstream.balance.pipeline import Key
    from meshproxy.upstream.balance.slow_start import SlowStart
    from meshproxy.upstream.host import Host, HostSet

HONOURS = {
    "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig": "zone_aware_lb_config locality_weighted_lb_config",
    "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig.LocalityWeightedLbConfig": "",
    "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig.ZoneAwareLbConfig": (
        "routing_enabled min_cluster_size fail_traffic_on_panic force_locality_direct_routing force_local_zone locality_basis"
    ),
    "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig.ZoneAwareLbConfig.ForceLocalZone": "min_size",
}


class WeightedPolicy:
    """Base of the two policies. Subclasses say what a host weighs now, and how to pick when all weigh the same."""

    looks_ahead = False
    observes_latency = False

    def __init__(self, deps: Deps, slow_start: SlowStart | None) -> None:
        self.slow_start = slow_start
        self._seed = deps.random.getrandbits(30)

    def refresh(self, host_sets: Sequence[HostSet]) -> None:
        """See `Policy.refresh`."""
        if self.slow_start is not None:
            for host_set in host_sets:
                self.slow_start.note(host_set.hosts)

    def source(self, hosts: list[Host], key: Key) -> Picker:
        """See `Policy.source`."""
        if len(hosts) == 1:
            return only(hosts[0])
        if _equal_weights(hosts) and (self.slow_start is None or not self.slow_start.running):
            return self.unweighted(hosts, key)
        return without_context(Edf(hosts, self.weight, self._seed).pick)

    def weight(self, host: Host) -> float:
        """What `host` weighs now; positive."""
        raise AssertionError("for subclasses")

    def unweighted(self, hosts: list[Host], key: Key) -> Picker:
        """A picker for at least two hosts of equal weight."""
        raise AssertionError("for subclasses")

    def observe(self, host: Host, seconds: float) -> None:
        """Latency plays no part."""


def only(host: Host) -> Picker:
    """The picker of a single host."""

    def pick(context: LbContext | None = None) -> Host:
        return host

    return pick


def without_context(choose: Callable[[], Host]) -> Picker:
    """A picker that does not look at the request."""

    def pick(context: LbContext | None = None) -> Host:
        return choose()

    return pick


def _equal_weights(hosts: list[Host]) -> bool:
    weight = hosts[0].weight
    return all(host.weight == weight for host in hosts)


def locality_config(proto: Any) -> LocalityConfig | None:
    """From a LocalityLbConfig, or None when it says nothing."""
    which = proto.WhichOneof("locality_config_specifier")
    if which == "locality_weighted_lb_config":
        return LocalityConfig(weighted=True)
    if which != "zone_aware_lb_config":
        return None
    zone = proto.zone_aware_lb_config
    forced = None
    if zone.HasField("force_local_zone"):
        forced = zone.force_local_zone.min_size.value if zone.force_local_zone.HasField("min_size") else 1
    elif zone.force_locality_direct_routing:
        forced = 1
    return LocalityConfig(
        routing_enabled=rounded_percent(zone, "routing_enabled", 100),
        min_cluster_size=zone.min_cluster_size.value if zone.HasField("min_cluster_size") else 6,
        fail_traffic_on_panic=zone.fail_traffic_on_panic,
        force_local_zone_min_size=forced,
        basis_weight=zone.locality_basis == 1,
    )


def legacy_locality_config(common: Any) -> LocalityConfig | None:
    """From a cluster's CommonLbConfig."""
    which = common.WhichOneof("locality_config_specifier")
    if which == "locality_weighted_lb_config":
        return LocalityConfig(weighted=True)
    if which != "zone_aware_lb_config":
        return None
    zone = common.zone_aware_lb_config
    return LocalityConfig(
        routing_enabled=rounded_percent(zone, "routing_enabled", 100),
        min_cluster_size=zone.min_cluster_size.value if zone.HasField("min_cluster_size") else 6,
        fail_traffic_on_panic=zone.fail_traffic_on_panic,
    )


def rounded_percent(proto: Any, field: str, default: int) -> int:
    """A Percent field as a whole number, rounded half away from zero; `default` when it is not set."""
    return int(getattr(proto, field).value + 0.5) if proto.HasField(field) else default
