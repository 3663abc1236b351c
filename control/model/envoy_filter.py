"""Patches to what proxies would get otherwise (Istio's EnvoyFilter)."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from control.model.security import ROOT_NAMESPACE

# What can be patched: its message, and what can be done with it.
_EDITS = ("MERGE", "ADD", "REMOVE")
_INSERTS = ("INSERT_BEFORE", "INSERT_AFTER", "INSERT_FIRST")
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "LISTENER": ("envoy.config.listener.v3.Listener", _EDITS),
    "FILTER_CHAIN": ("envoy.config.listener.v3.FilterChain", _EDITS),
    "NETWORK_FILTER": ("envoy.config.listener.v3.Filter", (*_EDITS, *_INSERTS, "REPLACE")),
    "HTTP_FILTER": ("envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter", (*_EDITS, *_INSERTS, "REPLACE")),
    "LISTENER_FILTER": ("envoy.config.listener.v3.ListenerFilter", (*_EDITS, *_INSERTS, "REPLACE")),
    "EXTENSION_CONFIG": ("envoy.config.core.v3.TypedExtensionConfig", ("ADD",)),
    "CLUSTER": ("envoy.config.cluster.v3.Cluster", _EDITS),
    "ROUTE_CONFIGURATION": ("envoy.config.route.v3.RouteConfiguration", ("MERGE",)),
    "VIRTUAL_HOST": ("envoy.config.route.v3.VirtualHost", _EDITS),
    "BOOTSTRAP": ("envoy.config.bootstrap.v3.Bootstrap", ("MERGE",)),
    "HTTP_ROUTE": ("envoy.config.route.v3.Route", (*_EDITS, *_INSERTS)),
}
ANY, INBOUND, OUTBOUND, GATEWAY = "ANY", "SIDECAR_INBOUND", "SIDECAR_OUTBOUND", "GATEWAY"


@dataclass(frozen=True, slots=True)
class PatchMatch:
    """Where a patch belongs: all that is set must hold. `name` and `port` are those of the listener, route configuration or cluster."""

    name: str = ""
    port: int = 0
    chain: str = ""
    sni: str = ""
    transport_protocol: str = ""
    application_protocols: str = ""  # with commas between
    filter: str = ""
    sub_filter: str = ""
    virtual_host: str = ""
    domain: str = ""
    route: str = ""
    action: str = ""  # ROUTE, REDIRECT or DIRECT_RESPONSE
    service: str = ""
    subset: str = ""
    listener_filter: str = ""
    gateway: str = ""  # namespace/name
    port_name: str = ""
    destination_port: int = 0  # of a filter chain


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """`place` is a key of PLACES, `value` the message of that place (None for REMOVE). `where` names the document, for messages.

    `filter_class`: behind what an HTTP filter is added, AUTHN, AUTHZ or (all) STATS. `version` is a pattern, and `metadata` has pairs, of the nodes of proxies.
    """

    where: str
    place: str
    operation: str
    context: str
    match: PatchMatch
    value: Any = None
    filter_class: str = ""
    version: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class EnvoyFilter:
    """Patches for the workloads with these labels (all, without) in its namespace; that of the mesh is every namespace.

    `targets`: only for those that serve Gateways of the Gateway API of these names in its namespace.
    """

    name: str
    namespace: str
    selector: Mapping[str, str]
    priority: int
    patches: tuple[Patch, ...]
    targets: tuple[str, ...] = ()

    def is_for(self, namespace: str, labels: Mapping[str, str], serves: Container[str] = (), root: str = ROOT_NAMESPACE) -> bool:
        """Whether a workload is meant; `serves`: the keys of its Gateways. What is in `root` is for all namespaces."""
        if self.targets:
            return self.namespace == namespace and any(f"{namespace}/{one}" in serves for one in self.targets)
        return self.namespace in (namespace, root) and self.selector.items() <= labels.items()

    def order(self, root: str = ROOT_NAMESPACE) -> tuple[int, bool, str, str]:
        """Low priorities first; of equals those of the mesh."""
        return self.priority, self.namespace != root, self.namespace, self.name
