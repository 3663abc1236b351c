"""AuthorizationPolicies with the action CUSTOM -> the ext_authz filter, as Istio makes it.

For each service that policies leave the decision to there is a pair of filters: RBAC with the rules as shadow rules, which notes in metadata which of them
matched, and ext_authz, which asks the service where one has. What names a service that is not there is denied where its rules match.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from control.model.security import AuthorizationPolicy, Authorizer
from control.translate.access import named_rules
from control.translate.resource import typed

_PREFIX = "istio_ext_authz_"  # of what the shadow rules note
_MATCHED = "istio-ext-authz"  # the beginning of the names of their policies
_BAD = "-deny-due-to-bad-CUSTOM-action"
_NEVER = {"permissions": [{"not_rule": {"any": True}}], "principals": [{"not_id": {"any": True}}]}
_HTTP_RBAC, _TCP_RBAC = "envoy.filters.http.rbac", "envoy.filters.network.rbac"
_HTTP_TYPES = "envoy.extensions.filters.http.rbac.v3.RBAC", "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"
_TCP_TYPES = "envoy.extensions.filters.network.rbac.v3.RBAC", "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz"
Json = dict[str, Any]

# Services that can be asked, and the clusters by which they are reached.
Authorizers = tuple[tuple[Authorizer, str], ...]


def http_filters(policies: Iterable[AuthorizationPolicy], trust_domains: tuple[str, ...], authorizers: Authorizers) -> list[Json]:
    """Filters of a connection manager, by the names of the services."""
    made = []
    known = {one.name: (one, cluster) for one, cluster in authorizers}
    for name, rules in _by_provider(policies, trust_domains, http=True).items():
        if name not in known:
            made.append({"name": f"{_HTTP_RBAC}.custom.{name}", "typed_config": typed(_HTTP_TYPES[0], rules=_denying(rules))})
            continue
        one, cluster = known[name]
        shadow = typed(_HTTP_TYPES[0], shadow_rules={"action": "DENY", "policies": rules}, shadow_rules_stat_prefix=_PREFIX)
        service = {"http_service": _http_service(one, cluster)} if one.http else {"grpc_service": _grpc_service(one, cluster)}
        fields: Json = {
            **service,
            "transport_api_version": "V3",
            "filter_enabled_metadata": _matched(_HTTP_RBAC, name),
            "failure_mode_allow": one.fail_open,
            "clear_route_cache": one.clears_route,
            "allowed_headers": _patterns(one.headers),
            "status_on_error": {"code": one.status_on_error} if one.status_on_error else None,
        }
        if one.body is not None:
            most, partly, as_bytes = one.body
            fields["with_request_body"] = {"max_request_bytes": most, "allow_partial_message": partly, "pack_as_bytes": as_bytes}
        made.append({"name": f"{_HTTP_RBAC}.custom.{name}", "typed_config": shadow})
        made.append({"name": f"envoy.filters.http.ext_authz.{name}", "typed_config": typed(_HTTP_TYPES[1], **_set(fields))})
    return made


def network_filters(policies: Iterable[AuthorizationPolicy], trust_domains: tuple[str, ...], authorizers: Authorizers) -> list[Json]:
    """Filters of plain connections. Services that are asked by HTTP know nothing of them, and are not asked, as in Istio."""
    made = []
    known = {one.name: (one, cluster) for one, cluster in authorizers}
    for name, rules in _by_provider(policies, trust_domains, http=False).items():
        rbac: Json = {"name": f"{_TCP_RBAC}.custom.{name}"}
        if name not in known:
            made.append(rbac | {"typed_config": typed(_TCP_TYPES[0], stat_prefix="tcp.custom.", rules=_denying(rules))})
            continue
        one, cluster = known[name]
        if one.http:
            continue
        shadow = {"shadow_rules": {"action": "DENY", "policies": rules}, "shadow_rules_stat_prefix": _PREFIX}
        fields: Json = {
            "stat_prefix": "tcp.",
            "grpc_service": _grpc_service(one, cluster),
            "transport_api_version": "V3",
            "filter_enabled_metadata": _matched(_TCP_RBAC, name),
            "failure_mode_allow": one.fail_open,
        }
        made.append(rbac | {"typed_config": typed(_TCP_TYPES[0], stat_prefix="tcp.custom.", **shadow)})
        made.append({"name": f"envoy.filters.network.ext_authz.{name}", "typed_config": typed(_TCP_TYPES[1], **_set(fields))})
    return made


def _by_provider(policies: Iterable[AuthorizationPolicy], trust_domains: tuple[str, ...], *, http: bool) -> dict[str, Json]:
    """The rules for each service, sorted by its name."""
    found: dict[str, Json] = {}
    for policy in sorted((one for one in policies if one.action == "CUSTOM"), key=lambda one: one.provider):
        prefix = f"{_MATCHED}-{policy.provider}-"
        rules = {prefix + name: rule for name, rule in named_rules(policy, trust_domains, http=http).items()}
        if not policy.rules:
            rules = {f"{prefix}ns[{policy.namespace}]-policy[{policy.name}]-rule[0]": _NEVER}
        found.setdefault(policy.provider, {}).update(rules)
    return found


def _denying(rules: Json) -> Json:
    return {"action": "DENY", "policies": {name + _BAD: rule for name, rule in rules.items()}}


def _matched(filter_: str, name: str) -> Json:
    """MetadataMatcher: a rule has matched that leaves the decision to this service. With the bracket: names may begin alike."""
    path = [{"key": f"{_PREFIX}shadow_effective_policy_id"}]
    return {"filter": filter_, "path": path, "value": {"string_match": {"prefix": f"{_MATCHED}-{name}-ns["}}}


def _grpc_service(one: Authorizer, cluster: str) -> Json:
    return {"envoy_grpc": {"cluster_name": cluster, "authority": one.host}, "timeout": _duration(one.timeout_s)}


def _http_service(one: Authorizer, cluster: str) -> Json:
    response = _set(
        {
            "allowed_upstream_headers": _patterns(one.upstream),
            "allowed_client_headers": _patterns(one.refused),
            "allowed_client_headers_on_success": _patterns(one.allowed),
        }
    )
    added = {"headers_to_add": [{"key": name, "value": value} for name, value in one.added]}
    return _set(
        {
            "server_uri": {"uri": f"http://{one.host}", "cluster": cluster, "timeout": _duration(one.timeout_s)},
            "path_prefix": one.path_prefix,
            "authorization_request": added if one.added else None,
            "authorization_response": response or None,
        }
    )


def _patterns(names: tuple[str, ...]) -> Json | None:
    """ListStringMatcher of names that may begin or end with a star."""
    if not names:
        return None
    return {"patterns": [{**_pattern(name), "ignore_case": True} for name in names]}


def _pattern(name: str) -> Json:
    if name.startswith("*"):
        return {"suffix": name[1:]}
    return {"prefix": name[:-1]} if name.endswith("*") else {"exact": name}


def _duration(seconds: float) -> str:
    return f"{seconds:.9g}s"


def _set(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value}
