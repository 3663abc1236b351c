"""TLS with the world outside the mesh: what gateways end, with certificates from documents that come over SDS."""

from __future__ import annotations

from typing import Any

from control.model.gateway import ServerTls
from control.model.secret import Secret
from control.translate.resource import typed

_TLS = "envoy.extensions.transport_sockets.tls.v3."
# Unlike routes and endpoints, a secret is not waited for without end: one that never comes must not keep a listener from its other names.
_SDS = {"ads": {}, "resource_api_version": "V3"}


def downstream(tls: ServerTls, names: tuple[str, ...]) -> dict[str, Any]:
    """The transport socket of a gateway's server. `names` of secrets: see `listeners.GatewayChain`."""
    certificates = names[:-1] if tls.asks_clients else names
    common: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_certificate_sds_secret_configs": [_reference(name) for name in certificates],
    }
    if tls.asks_clients:
        checks: dict[str, Any] = {}
        if tls.subject_alt_names:
            checks["match_typed_subject_alt_names"] = [
                {"san_type": kind, "matcher": {"exact": name}} for name in tls.subject_alt_names for kind in ("DNS", "URI")
            ]
        if tls.spki:
            checks["verify_certificate_spki"] = list(tls.spki)
        if tls.hashes:
            checks["verify_certificate_hash"] = list(tls.hashes)
        common["combined_validation_context"] = {"default_validation_context": checks, "validation_context_sds_secret_config": _reference(names[-1])}
    limits = {
        "tls_minimum_protocol_version": tls.min_version,
        "tls_maximum_protocol_version": tls.max_version,
        "cipher_suites": list(tls.cipher_suites),
    }
    if any(limits.values()):
        common["tls_params"] = {field: value for field, value in limits.items() if value}
    context = {"require_client_certificate": tls.mode == "MUTUAL", "common_tls_context": common}
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(f"{_TLS}DownstreamTlsContext", **context)}


def secret(name: str, one: Secret, authorities: bool) -> dict[str, Any]:
    """envoy.extensions.transport_sockets.tls.v3.Secret: a certificate, or the authorities that a Secret brings."""
    if not authorities:
        return {"name": name, "tls_certificate": {"certificate_chain": {"inline_string": one.chain}, "private_key": {"inline_string": one.key}}}
    context: dict[str, Any] = {"trusted_ca": {"inline_string": one.ca}}
    if one.crl:
        context["crl"] = {"inline_string": one.crl}
    return {"name": name, "validation_context": context}


def _reference(name: str) -> dict[str, Any]:
    return {"name": name, "sds_config": _SDS}
