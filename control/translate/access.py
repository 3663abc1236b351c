"""AuthorizationPolicies -> RBAC filters of those who are called.

AUDIT comes first, which only notes in metadata what its rules say, then DENY, then ALLOW; with an ALLOW for a workload, what none allows is denied. What is
only tried (`istio.io/dry-run`) is in shadow rules. CUSTOM comes before all of them, see `custom.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import Any

from control.model.security import ANY_REST, ANY_SEGMENT, AccessRule, AuthorizationPolicy, Condition, Operation, Source
from control.translate import tokens
from control.translate.resource import typed

_HTTP = "envoy.extensions.filters.http.rbac.v3.RBAC"
_TCP = "envoy.extensions.filters.network.rbac.v3.RBAC"
_ANY = {"any": True}
_ACTIONS = {"AUDIT": "LOG", "DENY": "DENY", "ALLOW": "ALLOW"}  # in their order, with the names that they have in RBAC
_DRY_RUN = {"DENY": "istio_dry_run_deny_", "ALLOW": "istio_dry_run_allow_"}  # prefixes of what shadow rules count and note
Rule = dict[str, Any]


def http_filters(policies: tuple[AuthorizationPolicy, ...], trust_domains: tuple[str, ...]) -> list[dict[str, Any]]:
    """Filters of a connection manager, in their order."""
    return [
        {"name": f"envoy.filters.http.rbac.{action.lower()}", "typed_config": typed(_HTTP, **rules)}
        for action in _ACTIONS
        if (rules := _rules(policies, action, trust_domains, http=True))
    ]


def network_filters(policies: tuple[AuthorizationPolicy, ...], trust_domains: tuple[str, ...]) -> list[dict[str, Any]]:
    """Filters of plain connections. What only requests can have denies, in a DENY, whatever they are, and allows nothing in an ALLOW, as in Istio."""
    return [
        {"name": f"envoy.filters.network.rbac.{action.lower()}", "typed_config": typed(_TCP, stat_prefix=f"tcp.{action.lower()}.", **rules)}
        for action in _ACTIONS
        if (rules := _rules(policies, action, trust_domains, http=False))
    ]


def _rules(policies: Iterable[AuthorizationPolicy], action: str, trust_domains: tuple[str, ...], *, http: bool) -> Rule:
    """`rules` and `shadow_rules` of a filter, as far as policies have this action."""
    made: Rule = {}
    for policy in policies:
        if policy.action != action:
            continue
        rules = made.setdefault("shadow_rules" if policy.dry_run else "rules", {"action": _ACTIONS[action], "policies": {}})
        rules["policies"].update(named_rules(policy, trust_domains, http=http))
    if "shadow_rules" in made and action in _DRY_RUN:
        made["shadow_rules_stat_prefix"] = _DRY_RUN[action]
    return made


def named_rules(policy: AuthorizationPolicy, trust_domains: tuple[str, ...], *, http: bool) -> dict[str, Rule]:
    """The rules of one policy, by the names that metadata and statistics have of them."""
    found = {
        f"ns[{policy.namespace}]-policy[{policy.name}]-rule[{index}]": _policy(rule, trust_domains, policy.action, http)
        for index, rule in enumerate(policy.rules)
    }
    return {name: rule for name, rule in found.items() if rule is not None}


def _policy(rule: AccessRule, trust_domains: tuple[str, ...], action: str, http: bool) -> Rule | None:
    sources, operations, conditions = rule.sources, rule.operations, rule.conditions
    parts: tuple[Source | Operation | Condition, ...] = (*sources, *operations, *conditions)
    if not http and any(one.is_http for one in parts):
        if action == "ALLOW":
            return None
        sources = tuple(dataclasses.replace(one, request_principals=(), not_request_principals=()) for one in sources)
        operations = tuple(Operation(ports=one.ports, not_ports=one.not_ports) for one in operations)
        conditions = tuple(one for one in conditions if not one.is_http)
    permissions = [_all([*_operation(one), *_permission_conditions(conditions)]) for one in operations or (Operation(),)]
    principals = [_all([*_source(one, trust_domains), *_principal_conditions(conditions, trust_domains)], "and_ids", "ids") for one in sources or (Source(),)]
    return {"permissions": permissions, "principals": principals}


def _all(parts: list[Rule], word: str = "and_rules", inner: str = "rules") -> Rule:
    return _ANY if not parts else parts[0] if len(parts) == 1 else {word: {inner: parts}}


def _one_of(values: Iterable[str], make: Callable[[str], Rule], word: str, inner: str) -> Rule:
    parts = [make(value) for value in values]
    return parts[0] if len(parts) == 1 else {word: {inner: parts}}


def _both(values: tuple[str, ...], others: tuple[str, ...], make: Callable[[str], Rule], *, principal: bool) -> list[Rule]:
    """One of `values`, and none of `others`, as far as there are some."""
    word, inner = ("or_ids", "ids") if principal else ("or_rules", "rules")
    made = [_one_of(values, make, word, inner)] if values else []
    if others:
        made.append({"not_id" if principal else "not_rule": _one_of(others, make, word, inner)})
    return made


def _operation(one: Operation) -> list[Rule]:
    def permission(values: tuple[str, ...], others: tuple[str, ...], make: Callable[[str], Rule]) -> list[Rule]:
        return _both(values, others, make, principal=False)

    return [
        *permission(one.hosts, one.not_hosts, lambda value: {"header": {"name": ":authority", "string_match": _string(value, ignore_case=True)}}),
        *permission(one.methods, one.not_methods, lambda value: {"header": _header(":method", value)}),
        *permission(one.paths, one.not_paths, _path),
        *permission(one.ports, one.not_ports, _destination_port),
    ]


def _path(value: str) -> Rule:
    if ANY_SEGMENT not in value and ANY_REST not in value:
        return {"url_path": {"path": _string(value)}}
    # As Envoy's own templates do it; those would be no rule to gRPC's servers.
    parts = (_WILD.get(part) or re.escape(part) for part in re.split(r"(\{\*\*?\})", value))
    return {"url_path": {"path": {"safe_regex": {"regex": "".join(parts)}}}}


def _source(one: Source, trust_domains: tuple[str, ...]) -> list[Rule]:
    def principal(values: tuple[str, ...], others: tuple[str, ...], make: Callable[[str], Rule]) -> list[Rule]:
        return _both(values, others, make, principal=True)

    return [
        *principal(one.principals, one.not_principals, _principal),
        *principal(one.namespaces, one.not_namespaces, _namespace),
        *principal(one.service_accounts, one.not_service_accounts, lambda value: _service_account(value, trust_domains)),
        *principal(one.ip_blocks, one.not_ip_blocks, _direct_remote_ip),
        *principal(one.remote_ip_blocks, one.not_remote_ip_blocks, _remote_ip),
        *principal(one.request_principals, one.not_request_principals, _request_principal),
    ]


def _permission_conditions(conditions: Iterable[Condition]) -> list[Rule]:
    made = []
    for one in conditions:
        make = _PERMISSIONS.get(one.key)
        if make is not None:
            made += _both(one.values, one.not_values, make, principal=False)
    return made


def _principal_conditions(conditions: Iterable[Condition], trust_domains: tuple[str, ...]) -> list[Rule]:
    made = []
    for one in conditions:
        make = _PRINCIPALS.get(one.key)
        claim = _claim_path(one.key)
        if claim:
            made += [_claim(claim, one.values)] if one.values else []
            made += [{"not_id": _claim(claim, one.not_values)}] if one.not_values else []
        elif one.key == "source.serviceAccount":
            make = functools.partial(_service_account, trust_domains=trust_domains)
        elif one.key.startswith("request.headers["):
            make = functools.partial(_header_of, one.key.removeprefix("request.headers[").removesuffix("]"))
        if make is not None:
            made += _both(one.values, one.not_values, make, principal=True)
    return made


def _header_of(name: str, value: str) -> Rule:
    return {"header": _header(name, value)}


def _header(name: str, value: str) -> Rule:
    return {"name": name, "present_match": True} if value == "*" else {"name": name, "string_match": _string(value)}


def _string(value: str, *, ignore_case: bool = False) -> Rule:
    """StringMatcher of a value that may begin or end with a star."""
    if value == "*":
        return {"safe_regex": {"regex": ".+"}}
    kind, text = ("suffix", value[1:]) if value.startswith("*") else ("prefix", value[:-1]) if value.endswith("*") else ("exact", value)
    return {kind: text, **({"ignore_case": True} if ignore_case else {})}


def _principal(value: str) -> Rule:
    """A SPIFFE ID, which documents write without its scheme."""
    if value == "*":
        return {"authenticated": {"principal_name": {"safe_regex": {"regex": ".+"}}}}
    if value.startswith("*"):
        return {"authenticated": {"principal_name": {"safe_regex": {"regex": f"spiffe://.*{re.escape(value[1:])}"}}}}
    return {"authenticated": {"principal_name": _string(f"spiffe://{value}")}}


def _request_principal(value: str) -> Rule:
    """`issuer/subject` of a verified token, one of which a star may shorten or, alone, stand for both; issuers have slashes themselves."""
    issuer, slash, subject = value.rpartition("/")
    if not slash:
        if value.startswith("*"):
            return _issuer_and_subject(_string("*"), _string(value))
        return _issuer_and_subject(_string(value), _string("*") if value.endswith("*") else {"exact": ""})
    if value.startswith("*"):
        return _issuer_and_subject(_string(issuer), {"exact": subject})
    return _issuer_and_subject({"exact": issuer}, _string(subject) if value.endswith("*") else {"exact": subject})


def _issuer_and_subject(issuer: Rule, subject: Rule) -> Rule:
    return _all([{"metadata": tokens.payload((name,), {"string_match": value})} for name, value in (("iss", issuer), ("sub", subject))], "and_ids", "ids")


def _claim_path(key: str) -> tuple[str, ...]:
    """Where the claim of a condition is; nothing when the condition is about something else."""
    if key.startswith("request.auth.claims["):
        return tuple(re.findall(r"\[([^\[\]]+)\]", key))
    return _CLAIMS.get(key, ())


def _claim(path: tuple[str, ...], values: tuple[str, ...]) -> Rule:
    """A claim that is one of some values, or a list with one of them."""
    alternatives: list[Rule] = [{"string_match": _string(value)} for value in values]
    value = alternatives[0] if len(alternatives) == 1 else {"or_match": {"value_matchers": alternatives}}
    return {"metadata": tokens.claim(path, value)}


def _namespace(value: str) -> Rule:
    pattern = re.escape(value).replace(r"\*", ".*")
    return {"authenticated": {"principal_name": {"safe_regex": {"regex": f".*/ns/{pattern}/.*"}}}}


def _service_account(value: str, trust_domains: tuple[str, ...]) -> Rule:
    namespace, _, name = value.partition("/")
    found = [{"authenticated": {"principal_name": {"exact": f"spiffe://{one}/ns/{namespace}/sa/{name}"}}} for one in trust_domains]
    return found[0] if len(found) == 1 else {"or_ids": {"ids": found}}


def _range(value: str) -> Rule:
    network = ipaddress.ip_network(value, strict=False)
    return {"address_prefix": str(network.network_address), "prefix_len": network.prefixlen}


def _direct_remote_ip(value: str) -> Rule:
    return {"direct_remote_ip": _range(value)}


def _remote_ip(value: str) -> Rule:
    return {"remote_ip": _range(value)}


def _destination_ip(value: str) -> Rule:
    return {"destination_ip": _range(value)}


def _destination_port(value: str) -> Rule:
    return {"destination_port": int(value)}


def _requested_server_name(value: str) -> Rule:
    return {"requested_server_name": _string(value)}


_PERMISSIONS: dict[str, Callable[[str], Rule]] = {
    "destination.ip": _destination_ip,
    "destination.port": _destination_port,
    "connection.sni": _requested_server_name,
}
_CHARACTERS = r"A-Za-z0-9\-._~%!$&'()+,;:@="  # of paths, RFC 3986
_WILD = {ANY_SEGMENT: f"[{_CHARACTERS}]+", ANY_REST: f"[{_CHARACTERS}/]*"}
_CLAIMS = {"request.auth.audiences": ("aud",), "request.auth.presenter": ("azp",)}
_PRINCIPALS: dict[str, Callable[[str], Rule]] = {
    "source.ip": _direct_remote_ip,
    "remote.ip": _remote_ip,
    "source.namespace": _namespace,
    "source.principal": _principal,
    "request.auth.principal": _request_principal,
}
