"""Load balancing: one file a policy.

Start with `base` (what a balancer is), then `pipeline` (priorities and localities around a policy) or `hashing` (the same for consistent hashing).
`compile_balancer` makes the balancer that a cluster asks for, by its typed policy or by the older `lb_policy`.
"""

from meshproxy.upstream.balance.base import Balancer, Deps, LbContext, LocalityConfig, Picker, nobody
from meshproxy.upstream.balance.config import compile_balancer

__all__ = ["Balancer", "Deps", "LbContext", "LocalityConfig", "Picker", "compile_balancer", "nobody"]
