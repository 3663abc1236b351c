"""TLS with the world outside the mesh: what gateways end, and what callers begin.

Certificates come over SDS: those of Secrets, and the names of those that are files of the proxy's own machine, which are read again when they are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from control.model.gateway import ServerTls
from control.model.mesh import NO_LIMITS, TlsLimits
from control.model.secret import CA_SUFFIX, Secret
from control.model.traffic import MUTUAL, TlsSettings
from control.translate.resource import typed

_TLS = "envoy.extensions.transport_sockets.tls.v3."
_SYSTEM_CAS = "/etc/ssl/certs/ca-certificates.crt"
# Unlike routes and endpoints, a secret is not waited for without end: one that never comes must not keep a listener from its other names.
_SDS = {"ads": {}, "resource_api_version": "V3"}


def downstream(tls: ServerTls, names: tuple[str, ...], usual: TlsLimits = NO_LIMITS) -> dict[str, Any]:
    """The transport socket of a gateway's server. `names` of secrets: see `listeners.GatewayChain`; `usual`: where the server leaves it open."""
    certificates = names[:-1] if tls.asks_clients and not tls.bundles else names
    common: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_certificate_sds_secret_configs": [_reference(name) for name in certificates],
    }
    if tls.asks_clients:
        checks: dict[str, Any] = {}
        if tls.subject_alt_names:
            checks["match_typed_subject_alt_names"] = _named(tls.subject_alt_names)
        if tls.spki:
            checks["verify_certificate_spki"] = list(tls.spki)
        if tls.hashes:
            checks["verify_certificate_hash"] = list(tls.hashes)
        if tls.bundles:
            common["validation_context"] = {"trusted_ca": {"inline_string": tls.ca_pem}}
        else:
            common["combined_validation_context"] = {"default_validation_context": checks, "validation_context_sds_secret_config": _reference(names[-1])}
    limits = {
        "tls_minimum_protocol_version": tls.min_version or ("" if tls.max_version and tls.max_version < usual.min_version else usual.min_version),
        "tls_maximum_protocol_version": tls.max_version,
        "cipher_suites": list(tls.cipher_suites or usual.cipher_suites),
        "ecdh_curves": list(usual.curves),
    }
    if any(limits.values()):
        common["tls_params"] = _limits(limits)
    context = {"require_client_certificate": tls.mode == "MUTUAL", "common_tls_context": common}
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(f"{_TLS}DownstreamTlsContext", **context)}


def _limits(limits: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in limits.items() if value}


def upstream(settings: TlsSettings, *, http2: bool, resolved: bool) -> dict[str, Any]:
    """The transport socket of callers, for SIMPLE and MUTUAL. `resolved`: endpoints are known by the names that DNS was asked for."""
    common: dict[str, Any] = {}
    if settings.mode == MUTUAL:
        common["tls_certificate_sds_secret_configs"] = [_reference(certificate_name(settings))]
    if not settings.insecure_skip_verify:
        common.update(_trust(settings))
    if http2:
        common["alpn_protocols"] = ["h2"]
    if settings.cipher_suites or settings.curves:
        common["tls_params"] = _limits({"cipher_suites": list(settings.cipher_suites), "ecdh_curves": list(settings.curves)})
    context: dict[str, Any] = {"common_tls_context": common}
    if settings.sni:
        context["sni"] = settings.sni
    elif resolved:
        context.update(auto_host_sni=True, auto_sni_san_validation=not settings.insecure_skip_verify)
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(f"{_TLS}UpstreamTlsContext", **context)}


def _trust(settings: TlsSettings) -> dict[str, Any]:
    """Of a CommonTlsContext: who may answer."""
    checks: dict[str, Any] = {}
    if settings.subject_alt_names:
        checks["match_typed_subject_alt_names"] = _named(settings.subject_alt_names)
    name = authorities_name(settings)
    if name:
        return {"combined_validation_context": {"default_validation_context": checks, "validation_context_sds_secret_config": _reference(name)}}
    return {"validation_context": {"trusted_ca": {"inline_string": settings.ca_pem} if settings.ca_pem else {"filename": _SYSTEM_CAS}, **checks}}


def certificate_name(settings: TlsSettings) -> str:
    """Over SDS, of what callers show."""
    if settings.shown:
        return settings.shown
    return f"kubernetes://{settings.credential}" if settings.credential else file_certificate(settings.certificate, settings.private_key)


def authorities_name(settings: TlsSettings) -> str:
    """Over SDS, of whom callers trust; nothing where that is part of the cluster."""
    if settings.credential:
        return f"kubernetes://{settings.credential}{CA_SUFFIX}"
    return file_authorities(settings.ca_certificates, settings.crl) if settings.ca_certificates else ""


def _named(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """SubjectAltNameMatchers."""
    return [{"san_type": kind, "matcher": {"exact": name}} for name in names for kind in ("DNS", "URI")]


# --- what comes over SDS


def file_certificate(chain: str, key: str) -> str:
    """The name of a certificate and its key that are files, as Istio has it."""
    return f"file-cert:{chain}~{key}"


def file_authorities(ca: str, crl: str = "") -> str:
    """The name of authorities that are a file, and of what they have revoked."""
    return f"file-root:{ca}~{crl}" if crl else f"file-root:{ca}"


def names_of_files(tls: ServerTls) -> tuple[str, ...]:
    """Of all that a server needs of files: its certificates, and last the authorities of clients if it asks them for theirs."""
    certificates = tuple(file_certificate(*pair) for pair in tls.files)
    return (*certificates, file_authorities(tls.ca_file, tls.crl_file)) if tls.asks_clients else certificates


def files_of_settings(settings: TlsSettings) -> Iterator[str]:
    """Names of all that callers need of files."""
    if settings.credential or not settings.is_originated:
        return
    if settings.mode == MUTUAL:
        yield certificate_name(settings)
    if settings.ca_certificates and not settings.insecure_skip_verify:
        yield authorities_name(settings)


def files(name: str) -> dict[str, Any]:
    """envoy.extensions.transport_sockets.tls.v3.Secret: what a name stands for that was made of files."""
    kind, _, paths = name.partition(":")
    first, _, second = paths.partition("~")
    if kind == "file-cert":
        return {"name": name, "tls_certificate": {"certificate_chain": {"filename": first}, "private_key": {"filename": second}}}
    context = {"trusted_ca": {"filename": first}}
    if second:
        context["crl"] = {"filename": second}
    return {"name": name, "validation_context": context}


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
