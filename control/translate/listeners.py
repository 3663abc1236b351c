"""Listeners of sidecars and the API listeners of gRPC's own xDS clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from control.model.gateway import ISTIO_MUTUAL, ServerTls
from control.model.mesh import NO_LISTENER_DEFAULTS, NORMAL, ListenerDefaults
from control.model.security import AuthorizationPolicy, Mtls
from control.names import BLACK_HOLE, PASSTHROUGH, VIRTUAL_OUTBOUND, inbound_cluster, outbound_cluster
from control.translate import access, custom, mtls, tls, tokens
from control.translate.clusters import ADS
from control.translate.flow import NOWHERE, Way
from control.translate.http_route import NO_DEADLINE
from control.translate.resource import typed
from control.translate.telling import QUIET, Told

_MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = {"name": "envoy.filters.http.router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router")}
_TLS_INSPECTOR = {"name": "envoy.filters.listener.tls_inspector", "typed_config": typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector")}
_PROXY_PROTOCOL = {
    "name": "envoy.filters.listener.proxy_protocol",
    "typed_config": typed("envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol"),
}
_FAULT = {"name": "envoy.filters.http.fault", "typed_config": typed("envoy.extensions.filters.http.fault.v3.HTTPFault")}
_ON_DEMAND = {
    "name": "envoy.filters.http.on_demand",
    "typed_config": typed("envoy.extensions.filters.http.on_demand.v3.OnDemand", odcds={"source": ADS}),
}
_CORS = {"name": "envoy.filters.http.cors", "typed_config": typed("envoy.extensions.filters.http.cors.v3.Cors")}


def address(host: str, port: int) -> dict[str, Any]:
    """envoy.config.core.v3.Address; without a port, of a Unix socket at this path."""
    return {"socket_address": {"address": host, "port_value": port}} if port else {"pipe": {"path": host}}


def name(host: str, port: int) -> str:
    """As Istio names listeners."""
    return f"{host}_{port}"


def outbound_http(
    host: str, port: int, routes: str, told: Told = QUIET, on_demand: bool = False, usual: ListenerDefaults = NO_LISTENER_DEFAULTS
) -> dict[str, Any]:
    """Where an application sends its requests; their routes come by RDS. `on_demand`: and their virtual hosts and clusters when they are needed."""
    rds = {"config_source": ADS, "route_config_name": routes}
    filters = [*([_ON_DEMAND] if on_demand else []), *told.http_filters([_CORS, _FAULT, _ROUTER])]
    return _listener("OUTBOUND", host, port, _manager(f"outbound_{host}_{port}", filters, usual, rds=rds, **told.manager()), told)


class Some(NamedTuple):
    """Connections whose ClientHello says one of `names` (any, without or with `*`), to an address in one of `subnets` (any, without), and where they go."""

    way: Way
    names: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()

    def match(self) -> dict[str, Any]:
        """With a FilterChainMatch, if there is anything to match."""
        return chain_match(() if "*" in self.names else self.names, self.subnets)


def chain_match(names: tuple[str, ...], subnets: tuple[str, ...]) -> dict[str, Any]:
    """What a filter chain has for them."""
    made: dict[str, Any] = {"server_names": list(names)} if names else {}
    if subnets:
        pairs = (subnet.split("/") for subnet in subnets)
        made["prefix_ranges"] = [{"address_prefix": address, "prefix_len": int(length)} for address, length in pairs]
    return {"filter_chain_match": made} if made else {}


def virtual_outbound(host: str, port: int, allows: bool, told: Told = QUIET) -> dict[str, Any]:
    """Where what an application opens is redirected to. It is for the listener of the address that was meant; what there is none for passes if the policy
    `allows` it. Who connects to the port itself gets nowhere: it would be sent to itself for ever."""
    direct = {"filter_chain_match": {"destination_port": port}, "filters": [_tcp_to(BLACK_HOLE, Way(((BLACK_HOLE, 0),)), told)]}
    cluster = PASSTHROUGH if allows else BLACK_HOLE
    rest = {"filters": [*told.network_filters(), _tcp_to(cluster, Way(((cluster, 0),)), told)]}
    made = {"name": VIRTUAL_OUTBOUND, "address": address(host, port), "traffic_direction": "OUTBOUND", "use_original_dst": True}
    return {**made, "filter_chains": [direct, rest], **told.metadata()}


def captured(make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A listener that is given its connections by `virtual_outbound`."""
    return {**make(*arguments), "bind_to_port": False}


class ByName(NamedTuple):
    """A port of a service, to which connections get by the names in their ClientHello, or as rules say."""

    service: str
    port: int
    some: tuple[Some, ...]


def outbound_tls(host: str, port: int, services: tuple[ByName, ...], told: Told = QUIET, rest: str = "") -> dict[str, Any]:
    """Where an application opens connections to any of some services. No name leads to two of them; `rest`: the cluster of those with another, or none."""
    chains: list[dict[str, Any]] = []
    for one in services:
        prefix = outbound_cluster(one.service, one.port)
        chains += [{**some.match(), "filters": [*told.network_filters(), _tcp_to(prefix, some.way, told)]} for some in one.some]
    if rest:
        chains.append({"filters": [*told.network_filters(), _tcp_to(rest, Way(((rest, 0),)), told)]})
    made = {"name": name(host, port), "address": address(host, port), "traffic_direction": "OUTBOUND", "filter_chains": chains, **told.metadata()}
    return {**made, "listener_filters": [_TLS_INSPECTOR]}


def outbound_tcp(host: str, port: int, service: str, service_port: int, some: tuple[Some, ...], rest: Way, told: Told = QUIET) -> dict[str, Any]:
    """Where an application opens connections to a port of a service. `rest`: where those go that are none of `some`."""
    prefix = outbound_cluster(service, service_port)
    chains: list[dict[str, Any]] = []
    for one in some:
        chains.append({**one.match(), "filters": [*told.network_filters(), _tcp_to(prefix, one.way, told)]})
    if rest.clusters:
        chains.append({"filters": [*told.network_filters(), _tcp_to(prefix, rest, told)]})
    made = {"name": name(host, port), "address": address(host, port), "traffic_direction": "OUTBOUND", "filter_chains": chains, **told.metadata()}
    if any("server_names" in chain.get("filter_chain_match", ()) for chain in chains):
        made["listener_filters"] = [_TLS_INSPECTOR]
    return made


@dataclass(frozen=True, slots=True)
class Guard:
    """Whom a port lets in. `mode` None: the sidecar has no identity, everything is plain."""

    mode: Mtls | None
    trust_domains: tuple[str, ...]
    policies: tuple[AuthorizationPolicy, ...] = ()
    tokens: tokens.Tokens = ()
    authorizers: custom.Authorizers = ()

    def http_filters(self, *, edge: bool = False) -> list[dict[str, Any]]:
        """Of a connection manager: tokens before access, which may be a matter of what is in them; and first who is left the decision to, as in Istio."""
        return [
            *custom.http_filters(self.policies, self.trust_domains, self.authorizers),
            *tokens.http_filters(self.tokens, edge=edge),
            *access.http_filters(self.policies, self.trust_domains),
        ]

    def network_filters(self) -> list[dict[str, Any]]:
        """Of plain connections."""
        asking = custom.network_filters(self.policies, self.trust_domains, self.authorizers)
        return [*asking, *access.network_filters(self.policies, self.trust_domains)]


class GatewayChain(NamedTuple):
    """One filter chain of a gateway: clients who say one of `names` (any, without some), to an address in `subnets` (any, without some), get to `routes`, or,
    as plain connections, on their `way`.

    `secrets`: names over SDS of the certificates for `tls`, and last of the authorities if it asks clients for theirs.
    """

    names: tuple[str, ...] = ()
    tls: ServerTls | None = None
    secrets: tuple[str, ...] = ()
    trust_domains: tuple[str, ...] = ()
    routes: str = ""
    way: Way = NOWHERE
    subnets: tuple[str, ...] = ()


def gateway(
    host: str, port: int, chains: tuple[GatewayChain, ...], guard: Guard, told: Told = QUIET, usual: ListenerDefaults = NO_LISTENER_DEFAULTS
) -> dict[str, Any]:
    """Where a gateway listens for the outside: what clients say of where they come from is not believed, unless it is by proxies that are. `guard`: whom it
    lets in; its mode plays no part."""
    made: dict[str, Any] = {
        "name": name(host, port),
        "address": address(host, port),
        "traffic_direction": "OUTBOUND",
        "filter_chains": [_gateway_chain(host, port, chain, guard, told, usual) for chain in chains],
        **told.metadata(),
    }
    filters = [*([_PROXY_PROTOCOL] if usual.told_clients else []), *([_TLS_INSPECTOR] if any(chain.names for chain in chains) else [])]
    if filters:
        made["listener_filters"] = filters
    return made


def _gateway_chain(host: str, port: int, chain: GatewayChain, guard: Guard, told: Told, usual: ListenerDefaults) -> dict[str, Any]:
    stat_prefix = f"outbound_{host}_{port}"
    if chain.routes:
        rds = {"config_source": ADS, "route_config_name": chain.routes}
        details: dict[str, Any] = {}
        asks = chain.tls is not None and (chain.tls.asks_clients or chain.tls.mode == ISTIO_MUTUAL)
        forward = usual.client_certificates or ("SANITIZE_SET" if asks else "")
        if forward:
            details["forward_client_cert_details"] = forward
        if forward in ("SANITIZE_SET", "APPEND_FORWARD"):
            details["set_current_client_cert_details"] = {"subject": True, "cert": True, "dns": True, "uri": True}
        if usual.trusted_proxies:
            details["xff_num_trusted_hops"] = usual.trusted_proxies
        filters = told.http_filters([*guard.http_filters(edge=True), _CORS, _FAULT, _ROUTER], edge=True)
        last = [_manager(stat_prefix, filters, usual, rds=rds, use_remote_address=True, **details, **told.manager())]
    else:
        last = [*guard.network_filters(), *told.network_filters(), _tcp_to(stat_prefix, chain.way, told)]
    made: dict[str, Any] = {"filters": last, **chain_match(chain.names, chain.subnets)}
    if chain.tls is not None:
        mutual = chain.tls.mode == ISTIO_MUTUAL
        made["transport_socket"] = mtls.downstream(chain.trust_domains, usual.mesh_tls) if mutual else tls.downstream(chain.tls, chain.secrets, usual.other_tls)
    return made


def inbound_http(
    host: str,
    port: int,
    target: int,
    operation: str,
    grpc: bool,
    guard: Guard,
    told: Told = QUIET,
    usual: ListenerDefaults = NO_LISTENER_DEFAULTS,
    ends: ServerTls | None = None,
) -> dict[str, Any]:
    """Where others send requests to the application, which listens on `target`. `ends`: TLS that ends here where there is none of the mesh."""
    cluster = inbound_cluster(target)
    action: dict[str, Any] = {"cluster": cluster, "timeout": "0s"}
    if grpc:
        action.update(NO_DEADLINE)
    else:  # a request that the application closed an idle connection on was never seen by it
        action["retry_policy"] = {"retry_on": "reset-before-request", "num_retries": 2}
    route = {"name": "default", "match": {"prefix": "/"}, "route": action, "decorator": {"operation": operation}}
    config = {
        "name": cluster,
        "virtual_hosts": [{"name": f"inbound|http|{target}", "domains": ["*"], "routes": [route]}],
        "validate_clusters": False,
    }
    filters = told.http_filters([*guard.http_filters(), _FAULT, _ROUTER], inbound=True)
    if guard.mode is None and ends is None:
        return _listener("INBOUND", host, port, _manager(f"inbound_{host}_{port}", filters, usual, route_config=config, **told.manager()), told)
    manager = _manager(
        f"inbound_{host}_{port}",
        filters,
        usual,
        route_config=config,
        forward_client_cert_details="APPEND_FORWARD",
        set_current_client_cert_details={"subject": True, "dns": True, "uri": True},
        **told.manager(),
    )
    return _guarded(host, port, [manager], guard, told, usual, ends)


def inbound_tcp(
    host: str,
    port: int,
    target: int,
    guard: Guard,
    told: Told = QUIET,
    usual: ListenerDefaults = NO_LISTENER_DEFAULTS,
    ends: ServerTls | None = None,
) -> dict[str, Any]:
    """Where others open connections to the application."""
    proxy = _tcp_proxy({"stat_prefix": inbound_cluster(target), "cluster": inbound_cluster(target), **told.access_log()})
    return _guarded(host, port, [*guard.network_filters(), *told.network_filters(), proxy], guard, told, usual, ends)


def _guarded(host: str, port: int, filters: list[dict[str, Any]], guard: Guard, told: Told, usual: ListenerDefaults, ends: ServerTls | None) -> dict[str, Any]:
    """An inbound listener with mutual TLS, without, or with both, told apart by what a caller sends first."""
    plain: dict[str, Any] = {"filters": filters}
    if ends is not None and guard.mode in (None, Mtls.DISABLE):
        plain["transport_socket"] = tls.downstream(ends, tls.names_of_files(ends), usual.other_tls)
    mutual = {"filters": filters, "transport_socket": mtls.downstream(guard.trust_domains, usual.mesh_tls)}
    chains = {
        None: [plain],
        Mtls.DISABLE: [plain],
        Mtls.PERMISSIVE: [{**mutual, "filter_chain_match": mtls.permissive_match()}, plain],
        Mtls.STRICT: [{**mutual, "filter_chain_match": {"transport_protocol": "tls"}}],
    }[guard.mode]
    made = {"name": name(host, port), "address": address(host, port), "traffic_direction": "INBOUND", "filter_chains": chains, **told.metadata()}
    if guard.mode in (Mtls.PERMISSIVE, Mtls.STRICT):
        made["listener_filters"] = [_TLS_INSPECTOR]
    return made


def api(listener: str, routes: str) -> dict[str, Any]:
    """What gRPC's own clients ask for by the name of their target."""
    rds = {"config_source": {"ads": {}, "resource_api_version": "V3"}, "route_config_name": routes}
    manager = typed(_MANAGER, stat_prefix=listener, http_filters=[_FAULT, _ROUTER], rds=rds)
    return {"name": listener, "api_listener": {"api_listener": manager}}


def grpc_server(resource: str, host: str, port: int, operation: str, guard: Guard) -> dict[str, Any]:
    """What a gRPC server asks for by the address on which it listens. It cannot take both kinds of connections: mutual TLS where STRICT says so."""
    route = {"match": {"prefix": "/"}, "non_forwarding_action": {}, "decorator": {"operation": operation}}
    manager = typed(
        _MANAGER,
        stat_prefix=resource,
        route_config={"name": resource, "virtual_hosts": [{"name": resource, "domains": ["*"], "routes": [route]}]},
        http_filters=[*custom.http_filters(guard.policies, guard.trust_domains, ()), *access.http_filters(guard.policies, guard.trust_domains), _ROUTER],
    )
    chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    if guard.mode is Mtls.STRICT:
        chain["transport_socket"] = mtls.grpc_downstream()
    return {"name": resource, "address": address(host, port), "traffic_direction": "INBOUND", "filter_chains": [chain]}


def _listener(direction: str, host: str, port: int, last: dict[str, Any], told: Told) -> dict[str, Any]:
    chains = [{"filters": [last]}]
    return {"name": name(host, port), "address": address(host, port), "traffic_direction": direction, "filter_chains": chains, **told.metadata()}


def _tcp_to(stat_prefix: str, way: Way, told: Told) -> dict[str, Any]:
    """To one of some clusters, by their weights."""
    common = {"stat_prefix": stat_prefix, **way.flow.fields(), **told.access_log()}
    if len(way.clusters) == 1:
        return _tcp_proxy({"cluster": way.clusters[0][0], **common})
    weighted = [{"name": name, "weight": weight} for name, weight in way.clusters if weight]
    return _tcp_proxy({"weighted_clusters": {"clusters": weighted}, **common})


def _tcp_proxy(fields: dict[str, Any]) -> dict[str, Any]:
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", **fields)}


# Istio's names of what is done to paths -> fields of a connection manager.
_PATHS: dict[str, dict[str, Any]] = {
    "NONE": {"normalize_path": False, "merge_slashes": False},
    NORMAL: {"normalize_path": True, "merge_slashes": False},
    "MERGE_SLASHES": {"normalize_path": True, "merge_slashes": True},
    "DECODE_AND_MERGE_SLASHES": {"normalize_path": True, "merge_slashes": True, "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD"},
}


def _manager(stat_prefix: str, filters: list[dict[str, Any]], usual: ListenerDefaults, **routes: Any) -> dict[str, Any]:
    manager = typed(
        _MANAGER,
        stat_prefix=stat_prefix,
        http_filters=filters,
        **_PATHS[usual.paths],
        stream_idle_timeout="0s",
        http_protocol_options={"accept_http_10": True},
        upgrade_configs=[{"upgrade_type": "websocket"}],
        **routes,
    )
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
