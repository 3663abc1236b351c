"""Checks that need the whole configuration: names that must be unique, references that must lead somewhere, filters in a sensible order.

They mirror what Envoy rejects when it loads a bootstrap. Stricter than Envoy: two listeners of one name are an error, where Envoy drops the second silently.
What concerns a single message is checked by its own compiler.
"""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from meshproxy.api import messages, registry
from meshproxy.api.errors import ConfigError, Problem

if TYPE_CHECKING:
    from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap
    from envoy.config.core.v3.address_pb2 import Address
    from envoy.config.listener.v3.listener_components_pb2 import FilterChain, FilterChainMatch
    from envoy.config.listener.v3.listener_pb2 import Listener
    from envoy.config.route.v3.route_components_pb2 import RouteAction

_HCM = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = "envoy.extensions.filters.http.router.v3.Router"
_TERMINAL_NETWORK = frozenset((_HCM, "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"))
_TERMINAL_HTTP = frozenset((_ROUTER,))
MAX_MATCH_COMBINATIONS = 100_000  # of one filter chain's match: beyond it overlaps are left to the runtime to resolve


def check(bootstrap: Bootstrap) -> list[Problem]:
    """Everything wrong that one message alone does not show. Expects a bootstrap without constraint violations, but never raises for one with."""
    resources = bootstrap.static_resources
    problems = list(_duplicates("static_resources.clusters", (cluster.name for cluster in resources.clusters)))
    clusters = {cluster.name for cluster in resources.clusters}
    local = bootstrap.cluster_manager.local_cluster_name
    if local and local not in clusters:
        problems.append(Problem("cluster_manager.local_cluster_name", f"no cluster is called {local!r}"))
    problems += _duplicates("static_resources.listeners", (listener.name for listener in resources.listeners))
    problems += _duplicate_addresses(resources.listeners)
    for i, listener in enumerate(resources.listeners):
        problems += (problem.under(f"static_resources.listeners[{i}]") for problem in _listener(listener, clusters))
    return problems


def _duplicates(path: str, names: Iterable[str]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        first = seen.setdefault(name, i) if name else i
        if first != i:
            yield Problem(f"{path}[{i}].name", f"{name!r} is already the name of {path}[{first}]")


def _duplicate_addresses(listeners: Iterable[Listener]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for i, listener in enumerate(listeners):
        if listener.HasField("bind_to_port") and not listener.bind_to_port.value:
            continue  # whoever does not bind has no address of its own
        addresses = [("address", listener.address)]
        addresses += [(f"additional_addresses[{j}].address", one.address) for j, one in enumerate(listener.additional_addresses)]
        for path, address in addresses:
            text = _address_text(address)
            first = seen.setdefault(text, i) if text else i
            if first != i:
                yield Problem(f"static_resources.listeners[{i}].{path}", f"{text} is already an address of static_resources.listeners[{first}]")


def _address_text(address: Address) -> str:
    """What two listeners cannot share; "" for port 0, which is a different port each time."""
    if address.HasField("pipe"):
        return address.pipe.path
    where = address.socket_address
    return f"{where.address}:{where.port_value}" if where.port_value else ""


def check_listener(listener: Listener, clusters: Container[str]) -> None:
    """Raise ConfigError with everything wrong of that kind with one listener. `clusters`: the names of those that there are."""
    problems = list(_listener(listener, clusters))
    if problems:
        raise ConfigError(problems)


def _listener(listener: Listener, clusters: Container[str]) -> Iterator[Problem]:
    if not listener.HasField("address"):
        yield Problem("address", "is required")
    default = listener.HasField("default_filter_chain")
    if not listener.filter_chains and not default:
        yield Problem("filter_chains", "must not be empty: without a filter chain nothing can be done with a connection")
    yield from _overlaps(listener.filter_chains)
    chains = [(f"filter_chains[{i}]", chain) for i, chain in enumerate(listener.filter_chains)]
    if default:
        chains.append(("default_filter_chain", listener.default_filter_chain))
    for path, chain in chains:
        yield from (problem.under(path) for problem in _filter_chain(chain, clusters))
    for i, listener_filter in enumerate(listener.listener_filters):
        yield from _untyped(f"listener_filters[{i}]", listener_filter)


def _filter_chain(chain: FilterChain, clusters: Container[str]) -> Iterator[Problem]:
    if chain.HasField("transport_socket"):
        yield from _untyped("transport_socket", chain.transport_socket)
    yield from _order(chain.filters, "filters", _TERMINAL_NETWORK, "network filter")
    for i, network_filter in enumerate(chain.filters):
        if messages.full_name(network_filter.typed_config.type_url) == _HCM:
            try:
                manager = registry.unpack(network_filter.typed_config)
            except ConfigError:
                continue  # reported by the check of the message itself
            yield from (problem.under(f"filters[{i}].typed_config") for problem in _manager(manager, clusters))


def _order(filters: Any, path: str, terminal: frozenset[str], kind: str) -> Iterator[Problem]:
    """The terminal filter must be the last one, and the last one must be terminal."""
    table = registry.KINDS[kind]
    last = len(filters) - 1
    for i, one in enumerate(filters):
        if not one.HasField("typed_config"):
            if not one.HasField("config_discovery"):
                yield Problem(f"{path}[{i}].typed_config", f"is required: it says what {one.name!r} is")
            continue
        name = messages.full_name(one.typed_config.type_url)
        if name in terminal and i != last:
            yield Problem(f"{path}[{i}]", f"{one.name!r} is a terminal filter: it must be the last one")
        elif i == last and name in table and name not in terminal and not getattr(one, "disabled", False):
            yield Problem(f"{path}[{i}]", f"{one.name!r} is not a terminal filter: it cannot be the last one")


def _untyped(path: str, extension: Any) -> Iterator[Problem]:
    if not extension.HasField("typed_config") and "config_discovery" not in [field.name for field, _ in extension.ListFields()]:
        yield Problem(f"{path}.typed_config", f"is required: it says what {extension.name!r} is")


# -- HTTP


def _manager(manager: Any, clusters: Container[str]) -> Iterator[Problem]:
    yield from _order(manager.http_filters, "http_filters", _TERMINAL_HTTP, "http filter")
    for i, upgrade in enumerate(manager.upgrade_configs):
        yield from _order(upgrade.filters, f"upgrade_configs[{i}].filters", _TERMINAL_HTTP, "http filter")
    table = manager.route_config
    if not manager.HasField("route_config") or (table.HasField("validate_clusters") and not table.validate_clusters.value):
        return
    yield from (problem.under("route_config") for problem in _missing_mirrors(table, clusters))
    for i, host in enumerate(table.virtual_hosts):
        yield from (problem.under(f"route_config.virtual_hosts[{i}]") for problem in _missing_mirrors(host, clusters))
        for j, route in enumerate(host.routes):
            if route.HasField("route"):
                action = route.route
                if action.cluster in clusters and not action.request_mirror_policies:
                    continue  # by far the most frequent case
                yield from (problem.under(f"route_config.virtual_hosts[{i}].routes[{j}].route") for problem in _missing(action, clusters))


def _missing(action: RouteAction, clusters: Container[str]) -> Iterator[Problem]:
    kind = action.WhichOneof("cluster_specifier")
    if kind == "cluster" and action.cluster not in clusters:
        yield Problem("cluster", f"no cluster is called {action.cluster!r}")
    elif kind == "weighted_clusters":
        for i, one in enumerate(action.weighted_clusters.clusters):
            if one.name and one.name not in clusters:
                yield Problem(f"weighted_clusters.clusters[{i}].name", f"no cluster is called {one.name!r}")
    yield from _missing_mirrors(action, clusters)


def _missing_mirrors(holder: Any, clusters: Container[str]) -> Iterator[Problem]:
    for i, policy in enumerate(holder.request_mirror_policies):
        if policy.cluster and policy.cluster not in clusters:
            yield Problem(f"request_mirror_policies[{i}].cluster", f"no cluster is called {policy.cluster!r}")


# -- filter chain matches


def _overlaps(chains: Any) -> Iterator[Problem]:
    """Two filter chains must not claim the same connections."""
    seen: dict[tuple[Any, ...], int] = {}
    for i, chain in enumerate(chains):
        match = chain.filter_chain_match
        try:
            parts = _dimensions(match)
        except ValueError as error:
            yield Problem(f"filter_chains[{i}].filter_chain_match", str(error))
            continue
        count = 1
        for part in parts:
            count *= len(part)
        if count > MAX_MATCH_COMBINATIONS:
            continue
        for combination in product(*parts):
            first = seen.setdefault(combination, i)
            if first != i:
                yield Problem(f"filter_chains[{i}].filter_chain_match", f"matches the same connections as filter_chains[{first}]")
                break


def _dimensions(match: FilterChainMatch) -> list[list[Any]]:
    """The alternatives of each part of a match. Raises ValueError for an address or a name that Envoy does not take."""
    for name in match.server_names:
        if "*" in name and not (name.startswith("*.") and "*" not in name[1:]):
            raise ValueError(f"server_names: {name!r}: a wildcard must be a whole first label, such as '*.example.com'")
    return [
        [match.destination_port.value],
        _ranges(match.prefix_ranges),
        [name.lower() for name in match.server_names] or [""],
        [match.transport_protocol],
        list(match.application_protocols) or [""],
        _ranges(match.direct_source_prefix_ranges),
        [match.source_type],
        _ranges(match.source_prefix_ranges),
        list(match.source_ports) or [0],
    ]


def _ranges(ranges: Any) -> list[tuple[int, int, int]]:
    """(family, network, prefix length) of each range."""
    result = []
    for one in ranges:
        family, bits = (socket.AF_INET6, 128) if ":" in one.address_prefix else (socket.AF_INET, 32)
        try:
            packed = socket.inet_pton(family, one.address_prefix)
        except OSError:
            raise ValueError(f"{one.address_prefix!r} is not an IP address") from None
        length = min(one.prefix_len.value, bits)
        result.append((int(family), int.from_bytes(packed, "big") >> (bits - length), length))
    return result or [(0, 0, 0)]
