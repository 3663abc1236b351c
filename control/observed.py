"""What proxies have been seen to call, and Sidecars that let them see just that.

Requests are what load reports count, for as long as a proxy has been connected. Connections are not counted there: every service to which a listener of a
proxy leads plain connections is taken for one that it calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from control.ads.loads import URL as LOADS
from control.translate.proxy import of_node
from control.translate.resource import LISTENER, ROUTES
from meshproxy.api import messages

_TCP_PROXY = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
NAME = "observed"  # of the Sidecars


class Observed(NamedTuple):
    """Of one proxy. `requests`: host of a service -> how many; `hosts`: all that it must see, those that lead to these services among them."""

    name: str
    namespace: str
    requests: Mapping[str, int]
    hosts: frozenset[str]


def observed(response: Any) -> list[Observed]:
    """What a ClientStatusResponse with contents says of each proxy, in their order."""
    return sorted((_of_proxy(config) for config in response.config), key=lambda one: (one.namespace, one.name))


def sidecars(proxies: Iterable[Observed]) -> Iterator[dict[str, Any]]:
    """A Sidecar for each namespace: its proxies together see what any of them calls."""
    by_namespace: dict[str, set[str]] = defaultdict(set)
    for one in proxies:
        by_namespace[one.namespace] |= one.hosts
    for namespace, hosts in sorted(by_namespace.items()):
        yield {
            "apiVersion": "networking.istio.io/v1",
            "kind": "Sidecar",
            "metadata": {"name": NAME, "namespace": namespace},
            # Rules for a host are imported by the namespace that they are in, which need not be the service's: any.
            "spec": {"egress": [{"hosts": [f"*/{host}" for host in sorted(hosts)] or ["~/*"]}]},
        }


def _of_proxy(config: Any) -> Observed:
    key = of_node(config.node)
    requests: dict[str, int] = defaultdict(int)
    clusters: set[str] = set()
    for stats in _messages(config, LOADS):
        for one in stats.cluster_stats:
            count = sum(group.total_issued_requests for group in one.upstream_locality_stats)
            host = _host(one.cluster_name)
            if host and (count or one.total_dropped_requests):
                requests[host] += count
                clusters.add(one.cluster_name)
    for listener in _messages(config, LISTENER):
        clusters.update(_connections(listener))
    hosts = {host for name in clusters if (host := _host(name))}
    for routes in _messages(config, ROUTES):
        hosts.update(host for host, leads_to in _virtual_hosts(routes) if leads_to & clusters)
    return Observed(key.name, key.namespace, dict(requests), frozenset(hosts))


def _messages(config: Any, url: str) -> Iterator[Any]:
    for entry in config.generic_xds_configs:
        if entry.type_url == url and entry.xds_config.value:
            yield messages.known(messages.full_name(url)).FromString(entry.xds_config.value)


def _host(cluster: str) -> str:
    """The service of a cluster; "" for what is none."""
    parts = cluster.split("|")
    return parts[3] if len(parts) == 4 and parts[0] == "outbound" else ""


def _connections(listener: Any) -> Iterator[str]:
    """The clusters to which a listener leads plain connections."""
    for chain in listener.filter_chains:
        for one in chain.filters:
            if one.typed_config.type_url.endswith(_TCP_PROXY):
                yield from _clusters(messages.known(_TCP_PROXY).FromString(one.typed_config.value))


def _clusters(action: Any) -> set[str]:
    """Of a route's action, or of a TCP proxy."""
    found = {action.cluster} if action.cluster else set()
    if action.HasField("weighted_clusters"):
        found |= {one.name for one in action.weighted_clusters.clusters}
    return found


def _virtual_hosts(routes: Any) -> Iterator[tuple[str, set[str]]]:
    """(host, clusters that its routes lead to) of each, by its name `host:port`."""
    for one in routes.virtual_hosts:
        host, colon, port = one.name.rpartition(":")
        if colon and port.isdigit():
            leads_to: set[str] = set()
            for route in one.routes:
                if route.HasField("route"):
                    leads_to |= _clusters(route.route)
                    leads_to |= {mirror.cluster for mirror in route.route.request_mirror_policies}
            yield host, leads_to
