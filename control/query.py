"""`meshctl proxy-status` and `proxy-config`: asking a running control plane, and printing what it says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from control.ads.health import URL as HEALTH
from control.ads.loads import URL as LOADS
from control.ads.status import WHOLE
from control.model.snapshot import Key
from control.output import table
from control.translate.proxy import of_node
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES, SECRET, VIRTUAL_HOST
from meshproxy.api import messages

_METHOD = "/envoy.service.status.v3.ClientStatusDiscoveryService/FetchClientStatus"
READY = "APPLICATION"
_HEALTHY = 1
_COLUMNS = {CLUSTER: "CDS", LISTENER: "LDS", ENDPOINTS: "EDS", ROUTES: "RDS"}
_TOGETHER = {ROUTES: (ROUTES, VIRTUAL_HOST)}
TYPES = {"clusters": CLUSTER, "endpoints": ENDPOINTS, "listeners": LISTENER, "routes": ROUTES, "secrets": SECRET, "loads": LOADS}


class QueryError(Exception):
    """The control plane did not answer, or knows no such proxy."""


def ask(server: str, *, proxy: str = "", contents: bool, timeout_s: float = 10.0) -> Any:
    """ClientStatusResponse of all proxies, or of one by its node id. Raises QueryError."""
    request = messages.known("envoy.service.status.v3.ClientStatusRequest")(exclude_resource_contents=not contents)
    if proxy:
        request.node_matchers.add().node_id.exact = proxy
    with grpc.insecure_channel(server, options=[("grpc.max_receive_message_length", -1)]) as channel:
        try:
            data = channel.unary_unary(_METHOD)(request.SerializeToString(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise QueryError(f"{server}: {error.details() or error.code().name}") from error
    return messages.known("envoy.service.status.v3.ClientStatusResponse").FromString(data)


def node_id(response: Any, proxy: str) -> str:
    """The node id of a proxy by its name, as `proxy_status` has it, or its name alone in `default`; what was asked for if no such proxy is there."""
    wanted = proxy if "." in proxy else f"{proxy}.default"
    return next((str(config.node.id) for config in response.config if config.node.id == proxy or str(of_node(config.node)) == wanted), proxy)


def proxy_status(response: Any) -> list[dict[str, Any]]:
    """One mapping for each connected proxy: its name, and the state of each type, with the reason where one was refused."""
    made = []
    for config in response.config:
        states: dict[str, Any] = dict.fromkeys(_COLUMNS.values(), "NOT SENT")
        errors = {}
        for entry in config.generic_xds_configs:
            if entry.type_url == HEALTH:
                states[READY] = _application(entry.xds_config.value)
                continue
            column = _COLUMNS.get(entry.type_url, entry.type_url.rpartition(".")[2])
            states[column] = type(entry).DESCRIPTOR.fields_by_name["config_status"].enum_type.values_by_number[entry.config_status].name.replace("_", " ")
            if entry.error_state.details:
                errors[column] = entry.error_state.details
        made.append({"name": str(of_node(config.node)), **states, **({"errors": errors} if errors else {})})
    return made


def _application(data: bytes) -> str:
    """What an EndpointHealthResponse says."""
    report = messages.known(messages.full_name(HEALTH)).FromString(data)
    names = {one.health_status: type(one).DESCRIPTOR.fields_by_name["health_status"].enum_type for one in report.endpoints_health}
    found = [kind.values_by_number[status].name for status, kind in names.items() if status != _HEALTHY]
    return "READY" if not found else "NOT READY" if found == ["UNHEALTHY"] else f"NOT READY ({found[0].lower()})"


def unready(response: Any) -> frozenset[Key]:
    """The workloads whose applications are not, by what connected sidecars report."""
    found = set()
    for config in response.config:
        if any(entry.type_url == HEALTH and _application(entry.xds_config.value) != "READY" for entry in config.generic_xds_configs):
            key = of_node(config.node)
            found.add((key.namespace, key.name))
    return frozenset(found)


def status_table(proxies: Iterable[dict[str, Any]]) -> str:
    """For people."""
    proxies = list(proxies)
    columns = (*_COLUMNS.values(), *([READY] if any(READY in proxy for proxy in proxies) else []))
    rows = [("NAME", *columns)] + [tuple(str(proxy.get(column, "-")) for column in ("name", *columns)) for proxy in proxies]
    lines = [table(rows)]
    for proxy in proxies:
        for column, why in proxy.get("errors", {}).items():
            lines.append(f"{proxy['name']}: {column} was refused: {why}")
    return "\n".join(lines)


def resources(response: Any, url: str, proxy: str) -> list[Any]:
    """The resources of one type that a proxy has, as messages; virtual hosts that it asked for are among its routes. Raises QueryError when it is not
    connected."""
    if not response.config:
        raise QueryError(f"no proxy {proxy!r} is connected")
    if url == LOADS:  # with each stream the same
        mine = [
            messages.known(messages.full_name(url)).FromString(one.xds_config.value) for one in response.config[0].generic_xds_configs if one.type_url == url
        ]
        return [one for message in mine for one in message.cluster_stats]
    found: dict[tuple[str, str], Any] = {}
    for entry in (one for config in response.config for one in config.generic_xds_configs):  # a proxy may have a stream for each type
        if entry.type_url in _TOGETHER.get(url, (url,)) and entry.name != WHOLE and entry.xds_config.value:
            found[entry.type_url, entry.name] = messages.known(messages.full_name(entry.type_url)).FromString(entry.xds_config.value)
    return list(found.values())


def resource_table(kind: str, found: Iterable[Any]) -> str:
    """For people: one line a resource, or one a route or an endpoint."""
    return table([_HEADS[kind], *(row for one in found for row in _ROWS[kind](one))])


def _address(address: Any) -> str:
    return f"{address.socket_address.address}:{address.socket_address.port_value}" if address.HasField("socket_address") else "-"


def _clusters(one: Any) -> list[tuple[str, ...]]:
    parts = one.name.split("|")
    direction, port, subset, host = parts if len(parts) == 4 else ("-", "-", "", one.name)
    kind = type(one).DiscoveryType.Name(one.type)
    return [(host or "-", port, subset or "-", direction, kind, type(one).LbPolicy.Name(one.lb_policy))]


def _endpoints(one: Any) -> list[tuple[str, ...]]:
    return [(_address(item.endpoint.address), _health(item), str(group.priority), one.cluster_name) for group in one.endpoints for item in group.lb_endpoints]


def _health(item: Any) -> str:
    """HEALTHY is what Envoy makes of an endpoint of which nothing is said."""
    descriptor = type(item).DESCRIPTOR.fields_by_name["health_status"].enum_type
    return str(descriptor.values_by_number[item.health_status].name) if item.health_status else "HEALTHY"


def _listeners(one: Any) -> list[tuple[str, ...]]:
    if one.HasField("api_listener"):
        return [(one.name, "-", "API")]
    kinds = sorted({item.name.rpartition(".")[2] for chain in one.filter_chains for item in chain.filters})
    return [(one.name, _address(one.address), ", ".join(kinds))]


def _routes(one: Any) -> list[tuple[str, ...]]:
    if type(one).DESCRIPTOR.name == "VirtualHost":  # that of a route configuration, by the name of both
        return [(one.name.partition("/")[0], one.name.partition("/")[2], _match(route.match), _target(route)) for route in one.routes]
    return [(one.name, host.name, _match(route.match), _target(route)) for host in one.virtual_hosts for route in host.routes]


def _match(match: Any) -> str:
    kind = match.WhichOneof("path_specifier")
    path = {"prefix": f"{match.prefix}*", "path": match.path, "safe_regex": f"~{match.safe_regex.regex}"}.get(kind, f"{match.path_separated_prefix}/*")
    more = [header.name for header in match.headers] + [f"?{query.name}" for query in match.query_parameters]
    return path + (f" ({', '.join(more)})" if more else "")


def _target(route: Any) -> str:
    kind = route.WhichOneof("action")
    if kind == "redirect":
        return "redirect"
    if kind == "direct_response":
        return f"status {route.direct_response.status}"
    action = route.route
    if action.HasField("weighted_clusters"):
        return ", ".join(f"{one.name} ({one.weight.value})" for one in action.weighted_clusters.clusters)
    return str(action.cluster)


def _loads(one: Any) -> list[tuple[str, ...]]:
    rows = [
        (_address(item.address), *_requests(item), group.locality.zone or "-", one.cluster_name)
        for group in one.upstream_locality_stats
        for item in group.upstream_endpoint_stats
    ]
    return rows + ([("(dropped)", str(one.total_dropped_requests), "-", "-", "-", one.cluster_name)] if one.total_dropped_requests else [])


def _requests(item: Any) -> tuple[str, str, str]:
    return str(item.total_issued_requests), str(item.total_error_requests), str(item.total_requests_in_progress)


_HEADS = {
    "loads": ("ENDPOINT", "REQUESTS", "ERRORS", "UNDER WAY", "ZONE", "CLUSTER"),
    "clusters": ("SERVICE", "PORT", "SUBSET", "DIRECTION", "TYPE", "BALANCER"),
    "endpoints": ("ENDPOINT", "STATUS", "PRIORITY", "CLUSTER"),
    "listeners": ("NAME", "ADDRESS", "FILTERS"),
    "routes": ("NAME", "VIRTUAL HOST", "MATCH", "TARGET"),
}
_ROWS = {"loads": _loads, "clusters": _clusters, "endpoints": _endpoints, "listeners": _listeners, "routes": _routes}
