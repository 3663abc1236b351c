"""Istio's security.istio.io: PeerAuthentication and AuthorizationPolicy."""

from __future__ import annotations

import ipaddress
import re

from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.model.security import AccessRule, AuthorizationPolicy, Condition, Mtls, Operation, PeerAuthentication, Source

_MODES = {"UNSET": None, "DISABLE": Mtls.DISABLE, "PERMISSIVE": Mtls.PERMISSIVE, "STRICT": Mtls.STRICT}
_KEYS = ("source.ip", "remote.ip", "source.namespace", "source.principal", "source.serviceAccount", "destination.ip", "destination.port", "connection.sni")
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
    spec.not_honoured("provider", "targetRef", "targetRefs")
    action = spec.text("action", "ALLOW", choices=("ALLOW", "DENY", "AUDIT", "CUSTOM"))
    if action in ("CUSTOM", "AUDIT"):
        spec.error("action", f"{action} is not served yet", "unsupported")
    rules = spec.each("rules", _rule)
    if action == "DENY" and not rules:
        spec.error("rules", "a DENY without rules denies nothing")
    return AuthorizationPolicy(meta.name, meta.namespace, action, rules, _selector(spec))


def _rule(fields: Fields) -> AccessRule:
    return AccessRule(
        fields.each("from", lambda below: _source(below.need("source"))),
        fields.each("to", lambda below: _operation(below.need("operation"))),
        fields.each("when", _condition),
    )


def _source(fields: Fields) -> Source:
    fields.not_honoured("requestPrincipals", "notRequestPrincipals", why="claims of tokens are not served yet")
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
    )
    if not fields.names():
        fields.error("", "at least one field is needed")
    return made


def _check_blocks(fields: Fields, name: str, blocks: tuple[str, ...]) -> None:
    for index, block in enumerate(blocks):
        try:
            ipaddress.ip_network(block, strict=False)
        except ValueError:
            fields.error(f"{name}[{index}]", f"{block!r} is no IP address or CIDR range")


def _operation(fields: Fields) -> Operation:
    for name in ("ports", "notPorts"):
        for index, port in enumerate(fields.texts(name)):
            if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
                fields.error(f"{name}[{index}]", f"{port!r} is no port")
    for name in ("paths", "notPaths"):
        for index, path in enumerate(fields.texts(name)):
            if "{" in path or "}" in path:
                fields.error(f"{name}[{index}]", "path templates are not served yet", "unsupported")
    if not fields.names():
        fields.error("", "at least one field is needed")
    return Operation(
        fields.texts("hosts"),
        fields.texts("notHosts"),
        fields.texts("ports"),
        fields.texts("notPorts"),
        fields.texts("methods"),
        fields.texts("notMethods"),
        fields.texts("paths"),
        fields.texts("notPaths"),
    )


def _condition(fields: Fields) -> Condition:
    key = fields.text("key", required=True)
    if key and key not in _KEYS and not _HEADER.fullmatch(key):
        fields.error("key", f"{key!r} is not served", "unsupported")
    values, others = fields.texts("values"), fields.texts("notValues")
    if not values and not others:
        fields.error("", "one of values, notValues is needed")
    for name, found in (("values", values), ("notValues", others)):
        if key.endswith(".ip"):
            _check_blocks(fields, name, found)
        elif key == "destination.port":
            for index, value in enumerate(found):
                if not (value.isascii() and value.isdigit() and 0 < int(value[:6]) < 65536):
                    fields.error(f"{name}[{index}]", f"{value!r} is no port")
    return Condition(key, values, others)
