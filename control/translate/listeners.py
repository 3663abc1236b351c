"""Listeners of sidecars and the API listeners of gRPC's own xDS clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from control.model.gateway import ISTIO_MUTUAL, ServerTls
from control.model.security import AuthorizationPolicy, Mtls
from control.names import inbound_cluster, outbound_cluster
from control.translate import access, custom, mtls, tls, tokens
from control.translate.clusters import ADS
from control.translate.http_route import NO_DEADLINE
from control.translate.resource import typed
from control.translate.telling import QUIET, Told

_MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = {"name": "envoy.filters.http.router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router")}
_TLS_INSPECTOR = {"name": "envoy.filters.listener.tls_inspector", "typed_config": typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector")}
_FAULT = {"name": "envoy.filters.http.fault", "typed_config": typed("envoy.extensions.filters.http.fault.v3.HTTPFault")}
_ON_DEMAND = {
    "name": "envoy.filters.http.on_demand",
    "typed_config": typed("envoy.extensions.filters.http.on_demand.v3.OnDemand", odcds={"source": ADS}),
}
_CORS = {"name": "envoy.filters.http.cors", "typed_config": typed("envoy.extensions.filters.http.cors.v3.Cors")}


def address(host: str, port: int) -> dict[str, Any]:
    """envoy.config.core.v3.Address."""
    return {"socket_address": {"address": host, "port_value": port}}


def name(host: str, port: int) -> str:
    """As Istio names listeners."""
    return f"{host}_{port}"


def outbound_http(host: str, port: int, routes: str, told: Told = QUIET, on_demand: bool = False) -> dict[str, Any]:
    """Where an application sends its requests; their routes come by RDS. `on_demand`: and their virtual hosts and clusters when they are needed."""
    rds = {"config_source": ADS, "route_config_name": routes}
    filters = [*([_ON_DEMAND] if on_demand else []), *told.http_filters([_CORS, _FAULT, _ROUTER])]
    return _listener("OUTBOUND", host, port, _manager(f"outbound_{host}_{port}", filters, rds=rds, **told.manager()), told)


Clusters = tuple[tuple[str, int], ...]  # names and weights


def outbound_tcp(
    host: str, port: int, service: str, service_port: int, by_name: tuple[tuple[tuple[str, ...], Clusters], ...], rest: Clusters, told: Told = QUIET
) -> dict[str, Any]:
    """Where an application opens connections to a port of a service. `by_name`: where those go whose ClientHello says one of some names; `rest`: the others."""
    prefix = outbound_cluster(service, service_port)
    chains: list[dict[str, Any]] = []
    for names, clusters in by_name:
        match = {} if "*" in names else {"filter_chain_match": {"server_names": list(names)}}
        chains.append({**match, "filters": [*told.network_filters(), _tcp_to(prefix, list(clusters), told)]})
    if rest:
        chains.append({"filters": [*told.network_filters(), _tcp_to(prefix, list(rest), told)]})
    made = {"name": name(host, port), "address": address(host, port), "traffic_direction": "OUTBOUND", "filter_chains": chains, **told.metadata()}
    if any("filter_chain_match" in chain for chain in chains):
        made["listener_filters"] = [_TLS_INSPECTOR]
    return made


@dataclass(frozen=True, slots=True)
class Guard:
    """Whom a port lets in. `mode` None: the sidecar has no identity, everything is plain."""

    mode: Mtls | None
    trust_domain: str
    policies: tuple[AuthorizationPolicy, ...] = ()
    tokens: tokens.Tokens = ()
    authorizers: custom.Authorizers = ()

    def http_filters(self, *, edge: bool = False) -> list[dict[str, Any]]:
        """Of a connection manager: tokens before access, which may be a matter of what is in them; and first who is left the decision to, as in Istio."""
        return [
            *custom.http_filters(self.policies, self.trust_domain, self.authorizers),
            *tokens.http_filters(self.tokens, edge=edge),
            *access.http_filters(self.policies, self.trust_domain),
        ]

    def network_filters(self) -> list[dict[str, Any]]:
        """Of plain connections."""
        asking = custom.network_filters(self.policies, self.trust_domain, self.authorizers)
        return [*asking, *access.network_filters(self.policies, self.trust_domain)]


class GatewayChain(NamedTuple):
    """One filter chain of a gateway: clients who say one of `names` (any, without some) get to `routes`, or, as plain connections, to `clusters` by weight.

    `secrets`: names over SDS of the certificates for `tls`, and last of the authorities if it asks clients for theirs.
    """

    names: tuple[str, ...] = ()
    tls: ServerTls | None = None
    secrets: tuple[str, ...] = ()
    trust_domain: str = ""
    routes: str = ""
    clusters: Clusters = ()


def gateway(host: str, port: int, chains: tuple[GatewayChain, ...], guard: Guard, told: Told = QUIET) -> dict[str, Any]:
    """Where a gateway listens for the outside: what clients say of where they come from is not believed. `guard`: whom it lets in; its mode plays no part."""
    made: dict[str, Any] = {
        "name": name(host, port),
        "address": address(host, port),
        "traffic_direction": "OUTBOUND",
        "filter_chains": [_gateway_chain(host, port, chain, guard, told) for chain in chains],
        **told.metadata(),
    }
    if any(chain.names for chain in chains):
        made["listener_filters"] = [_TLS_INSPECTOR]
    return made


def _gateway_chain(host: str, port: int, chain: GatewayChain, guard: Guard, told: Told) -> dict[str, Any]:
    stat_prefix = f"outbound_{host}_{port}"
    if chain.routes:
        rds = {"config_source": ADS, "route_config_name": chain.routes}
        details: dict[str, Any] = {}
        if chain.tls is not None and (chain.tls.asks_clients or chain.tls.mode == ISTIO_MUTUAL):
            shown = {"subject": True, "cert": True, "dns": True, "uri": True}
            details = {"forward_client_cert_details": "SANITIZE_SET", "set_current_client_cert_details": shown}
        filters = told.http_filters([*guard.http_filters(edge=True), _CORS, _FAULT, _ROUTER], edge=True)
        last = [_manager(stat_prefix, filters, rds=rds, use_remote_address=True, **details, **told.manager())]
    else:
        last = [*guard.network_filters(), *told.network_filters(), _tcp_to(stat_prefix, list(chain.clusters), told)]
    made: dict[str, Any] = {"filters": last}
    if chain.names:
        made["filter_chain_match"] = {"server_names": list(chain.names)}
    if chain.tls is not None:
        made["transport_socket"] = mtls.downstream(chain.trust_domain) if chain.tls.mode == ISTIO_MUTUAL else tls.downstream(chain.tls, chain.secrets)
    return made


def inbound_http(host: str, port: int, target: int, operation: str, grpc: bool, guard: Guard, told: Told = QUIET) -> dict[str, Any]:
    """Where others send requests to the application, which listens on `target`."""
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
    if guard.mode is None:
        return _listener("INBOUND", host, port, _manager(f"inbound_{host}_{port}", filters, route_config=config, **told.manager()), told)
    manager = _manager(
        f"inbound_{host}_{port}",
        filters,
        route_config=config,
        forward_client_cert_details="APPEND_FORWARD",
        set_current_client_cert_details={"subject": True, "dns": True, "uri": True},
        **told.manager(),
    )
    return _guarded(host, port, [manager], guard, told)


def inbound_tcp(host: str, port: int, target: int, guard: Guard, told: Told = QUIET) -> dict[str, Any]:
    """Where others open connections to the application."""
    proxy = _tcp_proxy({"stat_prefix": inbound_cluster(target), "cluster": inbound_cluster(target), **told.access_log()})
    return _guarded(host, port, [*guard.network_filters(), *told.network_filters(), proxy], guard, told)


def _guarded(host: str, port: int, filters: list[dict[str, Any]], guard: Guard, told: Told) -> dict[str, Any]:
    """An inbound listener with mutual TLS, without, or with both, told apart by what a caller sends first."""
    plain = {"filters": filters}
    mutual = {"filters": filters, "transport_socket": mtls.downstream(guard.trust_domain)}
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
        http_filters=[*custom.http_filters(guard.policies, guard.trust_domain, ()), *access.http_filters(guard.policies, guard.trust_domain), _ROUTER],
    )
    chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    if guard.mode is Mtls.STRICT:
        chain["transport_socket"] = mtls.grpc_downstream()
    return {"name": resource, "address": address(host, port), "traffic_direction": "INBOUND", "filter_chains": [chain]}


def _listener(direction: str, host: str, port: int, last: dict[str, Any], told: Told) -> dict[str, Any]:
    chains = [{"filters": [last]}]
    return {"name": name(host, port), "address": address(host, port), "traffic_direction": direction, "filter_chains": chains, **told.metadata()}


def _tcp_to(stat_prefix: str, clusters: list[tuple[str, int]], told: Told) -> dict[str, Any]:
    """To one of some clusters, by their weights."""
    if len(clusters) == 1:
        return _tcp_proxy({"stat_prefix": stat_prefix, "cluster": clusters[0][0], **told.access_log()})
    weighted = [{"name": name, "weight": weight} for name, weight in clusters if weight]
    return _tcp_proxy({"stat_prefix": stat_prefix, "weighted_clusters": {"clusters": weighted}, **told.access_log()})


def _tcp_proxy(fields: dict[str, Any]) -> dict[str, Any]:
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", **fields)}


def _manager(stat_prefix: str, filters: list[dict[str, Any]], **routes: Any) -> dict[str, Any]:
    manager = typed(
        _MANAGER,
        stat_prefix=stat_prefix,
        http_filters=filters,
        normalize_path=True,
        merge_slashes=False,
        stream_idle_timeout="0s",
        http_protocol_options={"accept_http_10": True},
        upgrade_configs=[{"upgrade_type": "websocket"}],
        **routes,
    )
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
