"""Bootstraps: how a proxy, or gRPC's own client, finds this control plane."""

from __future__ import annotations

from typing import Any

from control.translate.mtls import SDS_CLUSTER
from control.translate.resource import typed

_XDS_CLUSTER = "xds-grpc"


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
