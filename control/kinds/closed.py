"""What stands in for rules about access that are wrong, and that nobody knows from better times: none of it may let in more than what was meant.

Of a wrong document is taken what can be read. Where that does not say whom it is for, it is for the whole namespace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from control.kinds import mesh_config as mesh_fields
from control.kinds import telemetry
from control.kinds.common import Meta
from control.kinds.security import DRY_RUN, HEADER_NAME, is_true
from control.model.mesh import NO_DEFAULTS, TlsLimits
from control.model.security import NO_KEYS, AccessRule, AuthorizationPolicy, JwtRule, Mtls, PeerAuthentication, RequestAuthentication
from control.model.telemetry import MeshConfig
from meshproxy.api import document
from meshproxy.api.errors import ConfigError

_OTHER_TARGETS = "Service", "ServiceEntry", "GatewayClass"  # of waypoints
_Labels = dict[str, str] | None
_Json = Mapping[str, Any]


def authorization_policy(written: _Json) -> AuthorizationPolicy | None:
    """An ALLOW allows nothing, what else decides denies everything. None: it would decide nothing, or is for Gateways."""
    name, namespace, spec = _parts(written)
    annotations = written["metadata"].get("annotations")
    action = spec.get("action") or "ALLOW"
    tried = isinstance(annotations, dict) and is_true(str(annotations.get(DRY_RUN)))
    if tried or action == "AUDIT" or spec.get("targetRef") or spec.get("targetRefs"):
        return None
    allows = action == "ALLOW"
    rules = () if allows else (AccessRule(),)
    return AuthorizationPolicy(name, namespace, "ALLOW" if allows else "DENY", rules, _selector(spec)[0], stands_in="it lets nobody in")


def peer_authentication(written: _Json) -> PeerAuthentication:
    """Those whom it is for take mutual TLS only, on all of their ports."""
    name, namespace, spec = _parts(written)
    selector, known = _selector(spec)
    whole = written.get("spec")
    if (whole is not None and not isinstance(whole, dict)) or not known or spec.keys() - {"selector", "mtls", "portLevelMtls"}:
        selector = selector or {}  # what is no field may have been meant as a selector
    return PeerAuthentication(name, namespace, selector, Mtls.STRICT, stands_in="mutual TLS is STRICT there")


def request_authentication(written: _Json) -> RequestAuthentication | None:
    """Where it looks for tokens none is good, so that a request that brings one is refused; headers that it makes of tokens come from nobody else. None: it is
    for others than sidecars and gateways."""
    name, namespace, spec = _parts(written)
    rules = tuple(_rule(one) for one in _mappings(spec.get("jwtRules"))) or (_rule({}),)
    targets = [*_mappings(spec.get("targetRefs")), *_mappings([spec.get("targetRef")])]
    names = tuple(one["name"] for one in targets if one.get("kind") == "Gateway" and isinstance(one.get("name"), str))
    if targets and all(one.get("kind") in _OTHER_TARGETS for one in targets):
        return None
    return RequestAuthentication(name, namespace, rules, None if names else _selector(spec)[0], names, stands_in="no token is good there")


def mesh_config(written: _Json) -> MeshConfig | None:
    """What may make a mesh stricter: aliases of the trust domain, since a DENY may name a principal by one, the namespace whose policies are for all, what is
    done to paths before policies see them, and the least version of TLS. None: it says nothing of these."""
    name, namespace, _ = _parts(written)
    data = written.get("data")
    if not telemetry.is_mesh_config(Meta(name, namespace, {}, {})) or not isinstance(data, dict) or not isinstance(data.get("mesh"), str):
        return None
    try:
        mesh: Any = document.parse(data["mesh"])
    except ConfigError:
        return None
    if not isinstance(mesh, dict):
        return None
    aliases = tuple(one for one in _texts(mesh.get("trustDomainAliases")) if mesh_fields.is_trust_domain(one))
    general = NO_DEFAULTS
    root, paths, versions = mesh.get("rootNamespace"), _below(mesh, "pathNormalization", "normalization"), _below(mesh, "meshMTLS", "minProtocolVersion")
    if isinstance(root, str) and mesh_fields.is_namespace(root):
        general = replace(general, root=root)
    if paths in mesh_fields.PATHS:
        general = replace(general, listeners=replace(general.listeners, paths=mesh_fields.PATHS[paths]))
    if versions == "TLSV1_3":
        general = replace(general, listeners=replace(general.listeners, mesh_tls=TlsLimits("TLSv1_3")))
    if not aliases and general == NO_DEFAULTS:
        return None
    why = "of it only rootNamespace, pathNormalization, meshMTLS.minProtocolVersion, and, against callers, trustDomainAliases count"
    return MeshConfig(aliases=aliases, stands_in=why, general=general)


def _below(written: _Json, name: str, field: str) -> str:
    inner = written.get(name)
    return _text(inner.get(field)) if isinstance(inner, dict) else ""


def _rule(written: _Json) -> JwtRule:
    """Without an issuer it is for tokens of all of them."""
    headers = _mappings(written.get("fromHeaders"))
    claims = _mappings(written.get("outputClaimToHeaders"))
    payload = written.get("outputPayloadToHeader")
    return JwtRule(
        "",
        jwks_uri=f"https://{NO_KEYS}/",
        keys_at=(NO_KEYS, 443),
        from_headers=tuple((one["name"], _text(one.get("prefix"))) for one in headers if _is_header(one.get("name"))),
        from_params=_texts(written.get("fromParams")),
        from_cookies=_texts(written.get("fromCookies")),
        payload_header=_text(payload) if _is_header(payload) else "",
        claim_headers=tuple((one["header"], _text(one.get("claim")) or "sub") for one in claims if _is_header(one.get("header"))),
    )


def _parts(written: _Json) -> tuple[str, str, _Json]:
    """Name, namespace, and `spec` as far as it is one."""
    meta, spec = written["metadata"], written.get("spec")
    return meta["name"], meta.get("namespace") or "default", spec if isinstance(spec, dict) else {}


def _selector(spec: _Json) -> tuple[_Labels, bool]:
    """The labels that it names, None without some; and whether it can be read."""
    selector = spec.get("selector")
    if selector is None or selector == {}:
        return None, True
    labels = selector.get("matchLabels") if isinstance(selector, dict) and selector.keys() == {"matchLabels"} else None
    known = isinstance(labels, dict) and all(isinstance(one, str) for one in (*labels, *labels.values()))
    return ((labels or None) if known else None), known


def _mappings(value: Any) -> list[_Json]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str) and one) if isinstance(value, list) else ()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_header(value: Any) -> bool:
    return isinstance(value, str) and HEADER_NAME.fullmatch(value) is not None
