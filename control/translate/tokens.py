"""RequestAuthentications -> the jwt_authn filter, as Istio makes it.

A token that comes must be good, and a request without one passes. Where several issuers' tokens may stand in the same place, one that is good for one of them
is enough: so the requirement is one of the providers, or else nothing wrong with any of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterable, Mapping
from typing import Any

from control.model.security import NO_KEYS, JwtRule, KeySource, RequestAuthentication
from control.names import CLUSTER_DOMAIN, outbound_cluster
from control.translate.resource import typed

NAME = "envoy.filters.http.jwt_authn"
PAYLOAD = "payload"  # of the token, in dynamic metadata of that name: where access rules find claims
_TYPE = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
_SPACE_DELIMITED = "permission", "scope"  # always, as in Istio
_CACHE_DURATION = "300s"
Json = dict[str, Any]
_MISSING: Json = {"allow_missing": {}}

# A rule, and the cluster where its keys are, if it does not hold them.
Tokens = tuple[tuple[JwtRule, str], ...]


def with_clusters(rules: tuple[JwtRule, ...], hosts: Container[str], fetched: Mapping[KeySource, str]) -> Tokens:
    """Rules with the clusters of their keys. `hosts`: of the services that there are; `fetched`: keys from elsewhere. What is in neither is not known, and no
    token of that issuer is good."""
    return tuple(_with_cluster(rule, hosts, fetched) for rule in rules)


def _with_cluster(rule: JwtRule, hosts: Container[str], fetched: Mapping[KeySource, str]) -> tuple[JwtRule, str]:
    source = rule.source
    if source is not None and not _is_near(rule, hosts):
        if source in fetched:
            return _holding(rule, fetched[source]), ""
        if not rule.jwks_uri:
            rule = _without_keys(rule)
    return rule, _cluster(rule, hosts)


@functools.lru_cache(1000)
def _holding(rule: JwtRule, keys: str) -> JwtRule:
    """The same object for the same arguments, since what is made of it is remembered by it."""
    return dataclasses.replace(rule, jwks=keys, jwks_uri="")


@functools.lru_cache(1000)
def _without_keys(rule: JwtRule) -> JwtRule:
    return dataclasses.replace(rule, jwks_uri=f"https://{NO_KEYS}/", keys_at=(NO_KEYS, 443))


def _is_near(rule: JwtRule, hosts: Container[str]) -> bool:
    """Whether proxies reach its keys, as those of a service."""
    return any(name in hosts for name in _names(rule.keys_at[0])) if rule.jwks_uri else False


def wanted(policies: Iterable[RequestAuthentication], services: Container[str]) -> dict[KeySource, float]:
    """Where keys are that no proxy can fetch, and for how many seconds one may wait for them."""
    found: dict[KeySource, float] = {}
    for policy in policies:
        for rule in policy.rules if not policy.stands_in else ():
            source = rule.source
            if source is not None and not _is_near(rule, services):
                found[source] = max(rule.timeout, found.get(source, 0.0))
    return found


def _cluster(rule: JwtRule, hosts: Container[str]) -> str:
    if not rule.jwks_uri:
        return ""
    host, port = rule.keys_at
    return outbound_cluster(next((name for name in _names(host) if name in hosts), host), port)


def hosts(rule: JwtRule) -> tuple[str, ...]:
    """The services by which the keys of a rule may be reached: the first one that there is."""
    return _names(rule.keys_at[0]) if rule.jwks_uri else ()


def _names(host: str) -> tuple[str, ...]:
    return host, f"{host}.svc.{CLUSTER_DOMAIN}", f"{host}.{CLUSTER_DOMAIN}"


def http_filters(tokens: Tokens, *, edge: bool) -> list[Json]:
    """The filter of a connection manager, if there are rules. `edge`: routes may depend on claims."""
    if not tokens:
        return []
    providers = {f"origins-{index}": _provider(rule, cluster, edge) for index, (rule, cluster) in enumerate(tokens)}
    each = [{"provider_name": name} for name in providers]
    optional = [_any_of(one, _MISSING) for one in each]
    requirement = optional[0] if len(each) == 1 else _any_of(*each, {"requires_all": {"requirements": optional}})
    rules = [{"match": {"prefix": "/"}, "requires": requirement}]
    return [{"name": NAME, "typed_config": typed(_TYPE, providers=providers, rules=rules, bypass_cors_preflight=True)}]


def payload(path: tuple[str, ...], value: Json) -> Json:
    """MetadataMatcher of what is in a verified token; `value` is a ValueMatcher."""
    return {"filter": NAME, "path": [{"key": key} for key in (PAYLOAD, *path)], "value": value}


def claim(path: tuple[str, ...], value: Json) -> Json:
    """MetadataMatcher of a claim that is as `value` says, or a list with one that is."""
    return payload(path, {"or_match": {"value_matchers": [{"list_match": {"one_of": value}}, value]}})


def _any_of(*requirements: Json) -> Json:
    return {"requires_any": {"requirements": list(requirements)}}


def _provider(rule: JwtRule, cluster: str, edge: bool) -> Json:
    made: Json = {
        "issuer": rule.issuer,
        "payload_in_metadata": PAYLOAD,
        "normalize_payload_in_metadata": {"space_delimited_claims": sorted({*_SPACE_DELIMITED, *rule.space_delimited})},
    }
    if rule.jwks_uri:
        uri = {"uri": rule.jwks_uri, "cluster": cluster, "timeout": f"{rule.timeout:.9g}s"}
        made["remote_jwks"] = {"http_uri": uri, "cache_duration": _CACHE_DURATION}
    else:
        made["local_jwks"] = {"inline_string": rule.jwks}
    optional = {
        "audiences": list(rule.audiences),
        "from_headers": [{"name": name, **({"value_prefix": prefix} if prefix else {})} for name, prefix in rule.from_headers],
        "from_params": list(rule.from_params),
        "from_cookies": list(rule.from_cookies),
        "forward": rule.forward,
        "forward_payload_header": rule.payload_header,
        "claim_to_headers": [{"header_name": name, "claim_name": claim} for name, claim in rule.claim_headers],
        "clear_route_cache": edge,
    }
    return made | {name: value for name, value in optional.items() if value}
