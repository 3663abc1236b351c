"""Istio's security.istio.io: PeerAuthentication, RequestAuthentication and AuthorizationPolicy."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
from urllib.parse import urlsplit

from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.model.gateway import GATEWAY_API
from control.model.security import (
    ANY_REST,
    ANY_SEGMENT,
    AccessRule,
    AuthorizationPolicy,
    Condition,
    JwtRule,
    Mtls,
    Operation,
    PeerAuthentication,
    RequestAuthentication,
    Source,
)
from control.names import resolve_host

_MODES = {"UNSET": None, "DISABLE": Mtls.DISABLE, "PERMISSIVE": Mtls.PERMISSIVE, "STRICT": Mtls.STRICT}
_KEYS = (
    "source.ip", "remote.ip", "source.namespace", "source.principal", "source.serviceAccount", "destination.ip", "destination.port", "connection.sni",
    "request.auth.principal", "request.auth.audiences", "request.auth.presenter",
)  # fmt: skip
_CLAIM = re.compile(r"request\.auth\.claims(\[[^\[\]]+\])+")
DRY_RUN = "istio.io/dry-run"
_LITERAL = re.compile(r"[A-Za-z0-9\-._~%!$&'()+,;:@=]+")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER = re.compile(r"request\.headers\[[!-~]+\]")


def parse_peer_authentication(meta: Meta, body: Fields) -> PeerAuthentication:
    """`spec` of a PeerAuthentication."""
    spec = body.child("spec") or Fields({})
    selector = _selector(spec)
    mode = _mode(spec.child("mtls"))
    ports = spec.mapping("portLevelMtls", lambda below, key: (_port(below, key), _mode(below.child(key))))
    if ports and not selector:
        spec.error("portLevelMtls", "needs a selector: ports are those of workloads")
    return PeerAuthentication(meta.name, meta.namespace, selector, mode, dict(ports.values()))


def _port(fields: Fields, key: str) -> int:
    if not (key.isascii() and key.isdigit() and 0 < int(key[:6]) < 65536):
        fields.error(key, f"{key!r} is no port")
        return 0
    return int(key)


def _mode(fields: Fields | None) -> Mtls | None:
    return None if fields is None else _MODES[fields.text("mode", "UNSET", choices=_MODES)]


def _selector(spec: Fields) -> dict[str, str] | None:
    fields = spec.child("selector")
    return (fields.string_map("matchLabels") or None) if fields is not None else None


def parse_authorization_policy(meta: Meta, body: Fields) -> AuthorizationPolicy:
    """`spec` of an AuthorizationPolicy."""
    spec = body.child("spec") or Fields({})
    action = spec.text("action", "ALLOW", choices=("ALLOW", "DENY", "AUDIT", "CUSTOM"))
    provider = spec.child("provider")
    named = provider.text("name", required=True) if provider is not None else ""
    if provider is None and action == "CUSTOM":
        spec.error("provider", "is required: who is asked")
    elif provider is not None and action != "CUSTOM":
        spec.error("provider", f"only the action CUSTOM asks somebody, not {action}")
    dry_run = is_true(meta.annotations.get(DRY_RUN, ""))
    if dry_run and action == "CUSTOM":
        spec.error("action", f"{DRY_RUN} of CUSTOM is not served: whoever is asked decides", "unsupported")
    rules = tuple(_at_home(one, meta.namespace) for one in spec.each("rules", _custom_rule if action == "CUSTOM" else _rule))
    if action == "DENY" and not rules:
        spec.error("rules", "a DENY without rules denies nothing")
    return AuthorizationPolicy(meta.name, meta.namespace, action, rules, _selector(spec), targets(meta, spec), dry_run, named)


def is_true(text: str) -> bool:
    return text in ("1", "t", "T", "true", "TRUE", "True")


def targets(meta: Meta, spec: Fields, selector: str = "selector") -> tuple[str, ...]:
    """Names of Gateways of the Gateway API, in the policy's namespace. `selector`: the field that cannot be beside them."""
    single = spec.child("targetRef")
    names = spec.each("targetRefs", lambda below: _target(meta, below))
    if single is not None:
        names = (*names, _target(meta, single))
    if names and selector in spec:
        spec.error(selector, "there are targetRefs already; only one of them can be")
    return names


def _target(meta: Meta, fields: Fields) -> str:
    group, kind = fields.text("group"), fields.text("kind", required=True)
    if (group, kind) != (GATEWAY_API, "Gateway"):
        fields.error("kind", f"{kind} of {group or 'core'} is nothing that meshctl serves policies for; a Gateway of {GATEWAY_API} is", "unsupported")
    namespace = fields.text("namespace")
    if namespace not in ("", meta.namespace):
        fields.error("namespace", f"must be the policy's own, {meta.namespace}")
    return fields.text("name", required=True)


def parse_request_authentication(meta: Meta, body: Fields) -> RequestAuthentication:
    """`spec` of a RequestAuthentication."""
    spec = body.child("spec") or Fields({})
    return RequestAuthentication(meta.name, meta.namespace, spec.each("jwtRules", lambda below: _jwt_rule(meta, below)), _selector(spec), targets(meta, spec))


def _jwt_rule(meta: Meta, fields: Fields) -> JwtRule:
    issuer = fields.text("issuer", required=True)
    if not fields.one_of("jwksUri", "jwks") and issuer and _host_and_port(issuer, meta.namespace) is None:
        fields.error("issuer", f"{issuer!r} is no http or https URL, so that it cannot be asked where its keys are: one of jwksUri, jwks is needed")
    jwks, uri = fields.text("jwks"), fields.text("jwksUri")
    if "jwks" in fields:
        _check_jwks(fields, jwks)
    keys_at = _host_and_port(uri, meta.namespace)
    if "jwksUri" in fields and keys_at is None:
        fields.error("jwksUri", f"{uri!r} is no http or https URL")
    timeout = fields.duration("timeout")
    return JwtRule(
        issuer,
        fields.texts("audiences"),
        jwks,
        uri,
        keys_at or ("", 0),
        fields.each("fromHeaders", lambda below: (_header_name(below, "name"), below.text("prefix"))),
        fields.texts("fromParams"),
        fields.texts("fromCookies"),
        _header_name(fields, "outputPayloadToHeader", required=False),
        fields.each("outputClaimToHeaders", lambda below: (_header_name(below, "header"), below.text("claim", required=True))),
        bool(fields.boolean("forwardOriginalToken")),
        5.0 if timeout is None else timeout,
        fields.texts("spaceDelimitedClaims"),
    )


def _header_name(fields: Fields, name: str, *, required: bool = True) -> str:
    text = fields.text(name, required=required)
    if text and not HEADER_NAME.fullmatch(text):
        fields.error(name, f"{text!r} is no name of a header")
    return text


def _host_and_port(url: str, namespace: str) -> tuple[str, int] | None:
    """Where an http or https URL leads; None when it is none."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        return None
    return resolve_host(parts.hostname, namespace), port


def _check_jwks(fields: Fields, text: str) -> None:
    """Proxies refuse a listener with keys that they cannot use."""
    from jwt import PyJWKSet  # only where there are keys
    from jwt.exceptions import PyJWTError

    try:
        keys = json.loads(text)
        PyJWKSet.from_dict({"keys": [one for one in keys["keys"] if isinstance(one, dict)]})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PyJWTError) as error:
        fields.error("jwks", f"holds no key that can be used: {error}")


def _rule(fields: Fields) -> AccessRule:
    for name in ("from", "to", "when"):
        if name in fields and not fields.count(name):
            fields.error(name, "must not be empty: without it, the rule is for all")
    return AccessRule(
        fields.each("from", lambda below: _source(below.need("source"))),
        fields.each("to", lambda below: _operation(below.need("operation"))),
        fields.each("when", _condition),
    )


def _at_home(rule: AccessRule, namespace: str) -> AccessRule:
    """Service accounts of which only the name is said are those of the policy's namespace."""

    def whole(accounts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one if "/" in one else f"{namespace}/{one}" for one in accounts)

    sources = tuple(
        dataclasses.replace(one, service_accounts=whole(one.service_accounts), not_service_accounts=whole(one.not_service_accounts)) for one in rule.sources
    )
    conditions = tuple(Condition(one.key, whole(one.values), whole(one.not_values)) if one.key == "source.serviceAccount" else one for one in rule.conditions)
    return dataclasses.replace(rule, sources=sources, conditions=conditions)


def _custom_rule(fields: Fields) -> AccessRule:
    """Tokens are verified after the service was asked, as in Istio: what is in them cannot decide whether it is."""
    made = _rule(fields)
    if any(one.is_http for one in made.sources) or any(one.key.startswith("request.auth.") for one in made.conditions):
        fields.error("", "what is in a token cannot be asked for here: CUSTOM comes before tokens are verified", "unsupported")
    return made


def _source(fields: Fields) -> Source:
    for name in ("ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks"):
        _check_blocks(fields, name, fields.texts(name))
    made = Source(
        fields.texts("principals"),
        fields.texts("notPrincipals"),
        fields.texts("namespaces"),
        fields.texts("notNamespaces"),
        fields.texts("serviceAccounts"),
        fields.texts("notServiceAccounts"),
        fields.texts("ipBlocks"),
        fields.texts("notIpBlocks"),
        fields.texts("remoteIpBlocks"),
        fields.texts("notRemoteIpBlocks"),
        fields.texts("requestPrincipals"),
        fields.texts("notRequestPrincipals"),
    )
    for name, principals in (("principals", made.principals), ("notPrincipals", made.not_principals)):
        _check_principals(fields, name, principals)
    if not any(getattr(made, one.name) for one in dataclasses.fields(made)):
        fields.error("", "at least one field is needed, with a value: an empty one is for all")
    return made


def _check_principals(fields: Fields, name: str, principals: tuple[str, ...]) -> None:
    for index, one in enumerate(principals):
        if one.startswith("spiffe://"):
            fields.error(f"{name}[{index}]", f"must begin with the trust domain, {one.removeprefix('spiffe://')!r}: as it is, it matches nobody")


def _check_blocks(fields: Fields, name: str, blocks: tuple[str, ...]) -> None:
    for index, block in enumerate(blocks):
        try:
            ipaddress.ip_network(block, strict=False)
        except ValueError:
            fields.error(f"{name}[{index}]", f"{block!r} is no IP address or CIDR range")


def _wrong_in_template(path: str) -> str:
    """What is wrong with a template of paths such as /shops/{*}/orders/{**}."""
    segments = path.strip("/").split("/")
    for index, segment in enumerate(segments):
        if segment == ANY_REST:
            if index < len(segments) - 1:
                return f"nothing can come after {ANY_REST}"
        elif segment != ANY_SEGMENT and not _LITERAL.fullmatch(segment):
            return f"{segment!r} is neither plain text, nor {ANY_SEGMENT} for one segment of the path, nor {ANY_REST} for the rest of it"
    return ""


def _operation(fields: Fields) -> Operation:
    for name in ("ports", "notPorts"):
        for index, port in enumerate(fields.texts(name)):
            if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
                fields.error(f"{name}[{index}]", f"{port!r} is no port")
    for name in ("paths", "notPaths"):
        for index, path in enumerate(fields.texts(name)):
            wrong = _wrong_in_template(path) if "{" in path or "}" in path else ""
            if wrong:
                fields.error(f"{name}[{index}]", wrong)
    made = Operation(
        fields.texts("hosts"),
        fields.texts("notHosts"),
        fields.texts("ports"),
        fields.texts("notPorts"),
        fields.texts("methods"),
        fields.texts("notMethods"),
        fields.texts("paths"),
        fields.texts("notPaths"),
    )
    if not any(getattr(made, one.name) for one in dataclasses.fields(made)):
        fields.error("", "at least one field is needed, with a value: an empty one is for all")
    return made


def _condition(fields: Fields) -> Condition:
    key = fields.text("key", required=True)
    if key and key not in _KEYS and not _HEADER.fullmatch(key) and not _CLAIM.fullmatch(key):
        fields.error("key", f"{key!r} is not served", "unsupported")
    values, others = fields.texts("values"), fields.texts("notValues")
    if not values and not others:
        fields.error("", "one of values, notValues is needed")
    for name, found in (("values", values), ("notValues", others)):
        if key.endswith(".ip"):
            _check_blocks(fields, name, found)
        elif key == "source.principal":
            _check_principals(fields, name, found)
        elif key == "destination.port":
            for index, value in enumerate(found):
                if not (value.isascii() and value.isdigit() and 0 < int(value[:6]) < 65536):
                    fields.error(f"{name}[{index}]", f"{value!r} is no port")
    return Condition(key, values, others)
