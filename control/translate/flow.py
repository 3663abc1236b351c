"""How plain connections are carried: what a DestinationRule says of them that stands in the TCP proxy, and not in the cluster."""

from __future__ import annotations

from typing import Any, NamedTuple

from control.model.traffic import ConnectionPool, TrafficPolicy, Tunnel
from control.translate.resource import duration


class Flow(NamedTuple):
    """Times are seconds, None for the proxy's own. `by_source`: the caller's address chooses the endpoint. `tunnel`: the endpoint is a proxy on the way."""

    idle_s: float | None = None
    duration_s: float | None = None
    by_source: bool = False
    tunnel: Tunnel | None = None

    def fields(self) -> dict[str, Any]:
        """What a TcpProxy has of it."""
        made: dict[str, Any] = {}
        if self.idle_s is not None:
            made["idle_timeout"] = duration(self.idle_s)
        if self.duration_s is not None:
            made["max_downstream_connection_duration"] = duration(self.duration_s)
        if self.by_source:
            made["hash_policy"] = [{"source_ip": {}}]
        if self.tunnel is not None:
            made["tunneling_config"] = {"hostname": self.tunnel.target, **({"use_post": True} if self.tunnel.posts else {})}
        return made


STRAIGHT = Flow()


class Way(NamedTuple):
    """Where plain connections go: names and weights of clusters, none for nowhere."""

    clusters: tuple[tuple[str, int], ...]
    flow: Flow = STRAIGHT


NOWHERE = Way(())


def flow_of(policy: TrafficPolicy, whole: TrafficPolicy | None, default: ConnectionPool | None = None, tunnel: Tunnel | None = None) -> Flow:
    """What the policy of one port says of plain connections; times, if it says nothing of them, as in the policy of the `whole` rule, or the `default`.

    `tunnel` is that of the rule, or of the subset: ports have none, and nobody inherits one.
    """
    pool = policy.connection_pool or (whole.connection_pool if whole is not None else None) or default
    hash = policy.load_balancer.hash if policy.load_balancer is not None else None
    return Flow(
        pool.tcp_idle_timeout_s if pool is not None else None,
        pool.max_connection_duration_s if pool is not None else None,
        hash is not None and hash.source_ip,
        tunnel,
    )
