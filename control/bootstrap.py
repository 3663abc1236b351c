"""Bootstraps: how a proxy, or gRPC's own client, finds this control plane."""

from __future__ import annotations

import ipaddress
from typing import Any

from control.translate.mtls import SDS_CLUSTER
from control.translate.resource import typed
from meshproxy.record import Record

_XDS_CLUSTER = "xds-grpc"
_AUTHORITY_CLUSTER = "authority"
_WORKLOAD = "meshproxy.identity.v1.Workload"
_UPSTREAM_TLS = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"


def envoy(name: str, namespace: str, host: str, port: int, *, delta: bool = True, admin_port: int = 0, sds: str = "") -> dict[str, Any]:
    """For Envoy and for our own sidecar: clusters and listeners by ADS, and, with `sds`, certificates from the Unix socket of an agent."""
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http2 = {options: typed(options, explicit_http_config={"http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "5s"}}})}
    clusters = [_cluster(_XDS_CLUSTER, {"socket_address": {"address": host, "port_value": port}}, http2)]
    if sds:
        clusters.append(_cluster(SDS_CLUSTER, {"pipe": {"path": sds}}, http2))
    return {
        "node": {"id": f"{name}.{namespace}", "cluster": f"{name}.{namespace}"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC" if delta else "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": _XDS_CLUSTER}}],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {"clusters": clusters},
    }


class Identity(Record, frozen=True):
    """How a sidecar of ours gets its certificate. `authority`: unix:PATH, or host:port, where `roots` (a file) says whom to trust; at most one of the files of
    tokens is set."""

    authority: str
    roots: str = ""
    token_file: str = ""
    join_token_file: str = ""


def with_identity(bootstrap: dict[str, Any], identity: Identity) -> dict[str, Any]:
    """The bootstrap of a sidecar of ours that needs no agent. Raises ValueError for an authority that is no address."""
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http2 = {options: typed(options, explicit_http_config={"http2_protocol_options": {}})}
    fields = {name: value for name in ("token_file", "join_token_file") if (value := getattr(identity, name))}
    workload = {"@type": f"type.googleapis.com/{_WORKLOAD}", "authority": _AUTHORITY_CLUSTER, **fields}
    if identity.authority.startswith("unix:"):
        cluster = _cluster(_AUTHORITY_CLUSTER, {"pipe": {"path": identity.authority.removeprefix("unix:")}}, http2)
    else:
        host, _, port = identity.authority.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdigit():
            raise ValueError(f"{identity.authority}: unix:PATH or host:port is needed")
        cluster = _cluster(_AUTHORITY_CLUSTER, {"socket_address": {"address": host, "port_value": int(port)}}, http2)
        is_ip = _is_ip(host)
        cluster["type"] = "STATIC" if is_ip else "STRICT_DNS"
        if identity.roots:
            names = [{"san_type": "IP_ADDRESS" if is_ip else "DNS", "matcher": {"exact": host}}]
            common = {"alpn_protocols": ["h2"], "validation_context": {"trusted_ca": {"filename": identity.roots}, "match_typed_subject_alt_names": names}}
            tls = typed(_UPSTREAM_TLS, common_tls_context=common, **({} if is_ip else {"sni": host}))
            cluster["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": tls}
    static = bootstrap["static_resources"]
    return {
        **bootstrap,
        "bootstrap_extensions": [{"name": "meshproxy.identity", "typed_config": workload}],
        "static_resources": {**static, "clusters": [*static["clusters"], cluster]},
    }


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _cluster(name: str, address: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": options,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
    }


def grpc(name: str, namespace: str, host: str, port: int) -> dict[str, Any]:
    """The file that GRPC_XDS_BOOTSTRAP names."""
    return {
        "xds_servers": [{"server_uri": f"{host}:{port}", "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}],
        "node": {"id": f"{name}.{namespace}", "metadata": {"GENERATOR": "grpc", "NAME": name, "NAMESPACE": namespace}},
    }
