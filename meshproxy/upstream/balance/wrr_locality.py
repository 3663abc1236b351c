"""WRR_LOCALITY: choose a locality by its weight, then let another policy choose among its hosts."""

from __future__ import annotations

from typing import Any

from meshproxy.api import errors, registry
from meshproxy.upstream.balance.base import Balancer, Deps, LocalityConfig
from meshproxy.upstream.balance.pipeline import Pipeline

TYPE_URL = "type.googleapis.com/envoy.extensions.load_balancing_policies.wrr_locality.v3.WrrLocality"
HONOURS = {
    "envoy.extensions.load_balancing_policies.wrr_locality.v3.WrrLocality": "endpoint_picking_policy",
    "envoy.config.cluster.v3.LoadBalancingPolicy": "policies",
    "envoy.config.cluster.v3.LoadBalancingPolicy.Policy": "typed_extension_config",
}


def compile(proto: Any, deps: Deps) -> Balancer:
    """The balancer that a WrrLocality message asks for. Raises ConfigError."""
    policies = proto.endpoint_picking_policy.policies
    if not policies:
        errors.fail("endpoint_picking_policy.policies", "at least one policy is required")
    with errors.under("endpoint_picking_policy.policies[0].typed_extension_config.typed_config"):
        inner = registry.unpack(policies[0].typed_extension_config.typed_config)
        module = registry.module(policies[0].typed_extension_config.typed_config.type_url, "load balancing policy")
        balancer = module.compile(inner, deps)
        if not isinstance(balancer, Pipeline):
            errors.fail("", "this policy cannot be used inside wrr_locality")
    balancer.weigh_localities(LocalityConfig(weighted=True))
    return balancer
