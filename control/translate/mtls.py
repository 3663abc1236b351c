"""Mutual TLS between sidecars, as Istio's proxies speak it: names of secrets, server names and ALPN are Istio's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from control.model.mesh import NO_LIMITS, TlsLimits
from control.translate.resource import typed

SDS_CLUSTER = "sds-grpc"  # of the bootstrap: where a proxy finds its certificates
_SDS = {
    "api_config_source": {
        "api_type": "GRPC",
        "transport_api_version": "V3",
        "set_node_on_first_message_only": True,
        "grpc_services": [{"envoy_grpc": {"cluster_name": SDS_CLUSTER}}],
    },
    "initial_fetch_timeout": "0s",
    "resource_api_version": "V3",
}
_IN_MESH = ["istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"]
_TLS = "envoy.extensions.transport_sockets.tls.v3."
TLS_MODE = "tlsMode"
MUTUAL = "istio"  # the value of that label of endpoints that take mutual TLS


def server_name(port: int, subset: str, host: str) -> str:
    """What callers say in their ClientHello."""
    return f"outbound_.{port}_.{subset}_.{host}"


def upstream(sni: str, identities: tuple[str, ...], http2: bool) -> dict[str, Any]:
    """The transport socket of callers. `identities`: the SPIFFE IDs that the other side may have; without some, any of the mesh."""
    names = [{"san_type": "URI", "matcher": {"exact": one}} for one in identities]
    context = {"sni": sni, "common_tls_context": _common(["istio", "h2"] if http2 else ["istio"], names)}
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(f"{_TLS}UpstreamTlsContext", **context)}


def upstream_matches(sni: str, identities: tuple[str, ...], http2: bool) -> list[dict[str, Any]]:
    """Automatic: mutual TLS to endpoints that take it, plain to the others."""
    plain = {"name": "envoy.transport_sockets.raw_buffer", "typed_config": typed("envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer")}
    return [
        {"name": f"{TLS_MODE}-{MUTUAL}", "match": {TLS_MODE: MUTUAL}, "transport_socket": upstream(sni, identities, http2)},
        {"name": f"{TLS_MODE}-disabled", "match": {}, "transport_socket": plain},
    ]


def downstream(trust_domains: Iterable[str], limits: TlsLimits = NO_LIMITS) -> dict[str, Any]:
    """The transport socket of those who are called: callers must be of the mesh, by one of its names."""
    names = [{"san_type": "URI", "matcher": {"prefix": f"spiffe://{one}/"}} for one in trust_domains]
    common = _common(["h2", "http/1.1"], names)
    if limits.min_version:
        common["tls_params"]["tls_minimum_protocol_version"] = limits.min_version
    if limits.cipher_suites:
        common["tls_params"]["cipher_suites"] = list(limits.cipher_suites)
    context = {"require_client_certificate": True, "common_tls_context": common}
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(f"{_TLS}DownstreamTlsContext", **context)}


# --- gRPC's own clients and servers, whose certificates are where their bootstrap says

PROVIDER = "default"  # of the bootstrap's certificate_providers


def grpc_upstream(identities: tuple[str, ...]) -> dict[str, Any]:
    """The transport socket of a gRPC client. The newer field of names is unknown to it: it would take anybody of the mesh."""
    context = _provided({"match_subject_alt_names": [{"exact": one} for one in identities]})
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(f"{_TLS}UpstreamTlsContext", common_tls_context=context)}


def grpc_downstream() -> dict[str, Any]:
    """The transport socket of a gRPC server: callers must be of the mesh. It takes no names here; who may call is for policies to say."""
    context = {"require_client_certificate": True, "common_tls_context": _provided({})}
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(f"{_TLS}DownstreamTlsContext", **context)}


def _provided(validation: dict[str, Any]) -> dict[str, Any]:
    instance = {"instance_name": PROVIDER}
    return {"tls_certificate_provider_instance": instance, "validation_context": {"ca_certificate_provider_instance": instance, **validation}}


def permissive_match() -> dict[str, Any]:
    """TLS of the mesh, and not that of applications."""
    return {"transport_protocol": "tls", "application_protocols": _IN_MESH}


def _common(alpn: list[str], names: list[dict[str, Any]]) -> dict[str, Any]:
    return {"alpn_protocols": alpn, "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"}, **secrets(names)}


def secrets(names: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a CommonTlsContext: the proxy's own certificate, and the roots of the mesh for peers that have one of `names` (SubjectAltNameMatchers)."""
    return {
        "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": _SDS}],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": names},
            "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": _SDS},
        },
    }
