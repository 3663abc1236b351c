"""Which policy a cluster asks for: `load_balancing_policy` with a typed message, or `lb_policy` with the older per-policy fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, registry
from meshproxy.api.errors import UNSUPPORTED, Collector, ConfigError
from meshproxy.upstream.balance.pipeline import Pipeline
from meshproxy.upstream.balance.slow_start import HONOURS as _SLOW_START
from meshproxy.upstream.balance.slow_start import SlowStart, compile_slow_start, runtime_double
from meshproxy.upstream.balance.weighted import legacy_locality_config, rounded_percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshproxy.upstream.balance.base import Balancer, Deps

_CLUSTER = "envoy.config.cluster.v3.Cluster."
HONOURS = {
    "envoy.config.cluster.v3.LoadBalancingPolicy": "policies",
    "envoy.config.cluster.v3.LoadBalancingPolicy.Policy": "typed_extension_config",
    _CLUSTER + "RoundRobinLbConfig": "slow_start_config",
    _CLUSTER + "LeastRequestLbConfig": "choice_count active_request_bias slow_start_config",
    _CLUSTER + "RingHashLbConfig": "minimum_ring_size hash_function maximum_ring_size",
    _CLUSTER + "MaglevLbConfig": "table_size",
    _CLUSTER + "CommonLbConfig.ZoneAwareLbConfig": "routing_enabled min_cluster_size fail_traffic_on_panic",
    _CLUSTER + "CommonLbConfig.LocalityWeightedLbConfig": "",
    _CLUSTER + "CommonLbConfig.ConsistentHashingLbConfig": "use_hostname_for_hashing hash_balance_factor",
    **_SLOW_START,
}

ROUND_ROBIN, LEAST_REQUEST, RING_HASH, RANDOM = 0, 1, 2, 3
MAGLEV, CLUSTER_PROVIDED, TYPED = 5, 6, 7  # numbers of envoy.config.cluster.v3.Cluster.LbPolicy


def compile_balancer(cluster: Any, deps: Deps) -> Balancer:
    """The balancer of an envoy.config.cluster.v3.Cluster. Sets the panic threshold in `deps`. Raises ConfigError."""
    common = cluster.common_lb_config
    deps.panic_threshold = rounded_percent(common, "healthy_panic_threshold", 50)
    if cluster.HasField("load_balancing_policy") or cluster.lb_policy == TYPED:
        return _typed(cluster, deps)
    deps.locality = legacy_locality_config(common)
    compile_legacy = _LEGACY.get(cluster.lb_policy)
    if compile_legacy is None:
        errors.fail("lb_policy", f"load balancing policy {cluster.lb_policy} is unknown")
    return compile_legacy(cluster, deps)


def _typed(cluster: Any, deps: Deps) -> Balancer:
    if not cluster.HasField("load_balancing_policy"):
        errors.fail("load_balancing_policy", "cluster: field load_balancing_policy need to be set")
    common = cluster.common_lb_config
    for field in ("zone_aware_lb_config", "locality_weighted_lb_config", "consistent_hashing_lb_config"):
        if common.HasField(field):
            errors.fail(
                f"common_lb_config.{field}",
                "cluster: load_balancing_policy cannot be combined with partial fields (zone_aware_lb_config, locality_weighted_lb_config,"
                " consistent_hashing_lb_config) of common_lb_config",
            )
    # The first policy that is known is taken, so that newer policies may be listed before older ones.
    unknown = Collector()
    for index, policy in enumerate(cluster.load_balancing_policy.policies):
        packed = policy.typed_extension_config.typed_config
        path = f"load_balancing_policy.policies[{index}].typed_extension_config.typed_config"
        try:
            module = registry.module(registry.type_url(packed), "load balancing policy")
        except ConfigError as error:
            unknown.problems.extend(problem.under(path) for problem in error.problems)
            continue
        with errors.under(path):
            balancer: Balancer = module.compile(registry.unpack(packed), deps)
            return balancer
    unknown.raise_any()
    raise ConfigError.at(
        "load_balancing_policy.policies", f"cluster: didn't find a registered load balancer factory implementation for cluster: '{cluster.name}'"
    )


def _slow_start(cluster: Any, field: str, deps: Deps) -> SlowStart | None:
    if not cluster.HasField(field):
        return None
    with errors.under(f"{field}.slow_start_config"):
        return compile_slow_start(getattr(cluster, field).slow_start_config, deps.clock, deps.runtime)


def _round_robin(cluster: Any, deps: Deps) -> Balancer:
    from meshproxy.upstream.balance.round_robin import RoundRobin

    return Pipeline(RoundRobin(deps, _slow_start(cluster, "round_robin_lb_config", deps)), deps)


def _least_request(cluster: Any, deps: Deps) -> Balancer:
    from meshproxy.upstream.balance.least_request import LeastRequest

    config = cluster.least_request_lb_config
    choices = config.choice_count.value if config.HasField("choice_count") else 2
    bias = runtime_double(config, "active_request_bias", 1.0, deps.runtime)
    return Pipeline(LeastRequest(deps, _slow_start(cluster, "least_request_lb_config", deps), choice_count=choices, bias=bias), deps)


def _random(cluster: Any, deps: Deps) -> Balancer:
    from meshproxy.upstream.balance.random import Random

    return Pipeline(Random(deps), deps)


def _ring_hash(cluster: Any, deps: Deps) -> Balancer:
    from meshproxy.upstream.balance.ring_hash import MAX_RING_SIZE, MIN_RING_SIZE, ring_hash

    config, common = cluster.ring_hash_lb_config, cluster.common_lb_config
    hashing = common.consistent_hashing_lb_config
    with errors.under("ring_hash_lb_config"):
        return ring_hash(
            deps,
            min_size=config.minimum_ring_size.value if config.HasField("minimum_ring_size") else MIN_RING_SIZE,
            max_size=config.maximum_ring_size.value if config.HasField("maximum_ring_size") else MAX_RING_SIZE,
            murmur=config.hash_function == 1,
            use_hostname=hashing.use_hostname_for_hashing,
            balance_factor=hashing.hash_balance_factor.value,
            locality_weighted=common.HasField("locality_weighted_lb_config"),
        )


def _maglev(cluster: Any, deps: Deps) -> Balancer:
    from meshproxy.upstream.balance.maglev import TABLE_SIZE, maglev

    config, common = cluster.maglev_lb_config, cluster.common_lb_config
    hashing = common.consistent_hashing_lb_config
    with errors.under("maglev_lb_config"):
        return maglev(
            deps,
            size=config.table_size.value if config.HasField("table_size") else TABLE_SIZE,
            use_hostname=hashing.use_hostname_for_hashing,
            balance_factor=hashing.hash_balance_factor.value,
            locality_weighted=common.HasField("locality_weighted_lb_config"),
        )


def _cluster_provided(cluster: Any, deps: Deps) -> Balancer:
    from meshproxy.upstream.balance.cluster_provided import ClusterProvided

    if cluster.type != 4 or cluster.HasField("cluster_type"):
        errors.fail("lb_policy", f"cluster: LB policy CLUSTER_PROVIDED cannot be used with cluster type of '{cluster.name}'", UNSUPPORTED)
    return ClusterProvided()


_LEGACY: dict[int, Callable[[Any, Deps], Balancer]] = {
    ROUND_ROBIN: _round_robin,
    LEAST_REQUEST: _least_request,
    RING_HASH: _ring_hash,
    RANDOM: _random,
    MAGLEV: _maglev,
    CLUSTER_PROVIDED: _cluster_provided,
}
