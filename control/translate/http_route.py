"""HTTP rules of VirtualServices and of the Gateway API's routes -> Envoy's routes."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from control.model.routing import NO_HEADERS, Cors, Destination, Fault, HeaderOperations, HttpRoute, Redirect, Retries, Rewrite, RouteMatch, StringMatch
from control.model.service import Service
from control.model.traffic import ConsistentHash
from control.names import outbound_cluster, routing_claim
from control.translate import tokens
from control.translate.flow import Flow
from control.translate.resource import duration, typed

UNKNOWN_SERVICE = "UnknownService"  # the cluster, which is never there, of what is none
FAULT_FILTER = "envoy.filters.http.fault"
CORS_FILTER = "envoy.filters.http.cors"
_DEFAULT_RETRY_ON = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
_PREVIOUS_HOSTS = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": typed("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
}
_PREVIOUS_PRIORITIES = {
    "name": "envoy.retry_priorities.previous_priorities",
    "typed_config": typed("envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig", update_frequency=1),
}
_STATUS = {301: "MOVED_PERMANENTLY", 302: "FOUND", 303: "SEE_OTHER", 307: "TEMPORARY_REDIRECT", 308: "PERMANENT_REDIRECT"}
_GRPC_CODES = {
    name: number
    for number, name in enumerate(
        "OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED "
        "OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED".split()
    )
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a rule's destination is to the proxy.

    By number of the port and name of the subset: `hash`, where a DestinationRule balances by hash, and `flows`, where it says something of plain connections.
    """

    service: Service | None
    hash: tuple[tuple[tuple[int, str], ConsistentHash], ...] = ()
    flows: tuple[tuple[tuple[int, str], Flow], ...] = ()


@dataclass(frozen=True, slots=True)
class Around:
    """Where routes are used: `port` is the one that requests were meant for, `grpc` says that the proxy is gRPC's own xDS client; `retries`: of rules that do
    not say it."""

    port: int
    targets: Mapping[str, Target]
    rules_name: str = ""
    gateway_api: bool = False
    grpc: bool = False
    retries: Retries | None = None


def routes(rule: HttpRoute, matches: tuple[RouteMatch | None, ...], around: Around) -> list[dict[str, Any]]:
    """The routes of one rule: one for each of the matches that concern this proxy; None matches everything."""
    made = []
    for match in matches:
        if rule.cors is not None and rule.cors.repeats and not around.grpc and (match is None or match.method is None):
            made.append(_preflight(rule.cors, match))
        made.append(_route(rule, match, around))
    return made


def catches_all(rule: HttpRoute, match: RouteMatch | None) -> bool:
    """Whether no request gets past this match."""
    if match is None:
        return True
    anything = not (match.headers or match.without_headers or match.query or match.method or match.authority or match.scheme)
    path = match.path
    return anything and (path is None or (path.kind in ("prefix", "path_prefix") and path.text == "/") or (path.kind == "regex" and path.text == ".*"))


def default_route(
    cluster: str, hash: ConsistentHash | None, operation: str, *, http2: bool = False, grpc: bool = False, retries: Retries | None = None
) -> dict[str, Any]:
    """The route to a service that no rule speaks of. `http2`: that is what its port speaks; `grpc` and `retries`: see `Around`."""
    action: dict[str, Any] = {"cluster": cluster, **_timeout(None, grpc, http2)}
    if retry := _retry_policy(retries, hash is not None):
        action["retry_policy"] = retry
    if hash is not None:
        action["hash_policy"] = [_hash_policy(hash)]
    return {"name": "default", "match": {"prefix": "/"}, "route": action, "decorator": {"operation": operation}}


def _route(rule: HttpRoute, match: RouteMatch | None, around: Around) -> dict[str, Any]:
    made: dict[str, Any] = {"match": _match(match, around.grpc)}
    name = f"{rule.name}.{match.name}" if match is not None and match.name else rule.name
    if name:
        made["name"] = name
    if match is not None and match.stat_prefix:
        made["stat_prefix"] = match.stat_prefix
    authority = _mutate(made, rule.request_headers, rule.response_headers)
    if rule.redirect is not None:
        made["redirect"] = _redirect(rule.redirect, around.port)
    elif rule.direct_response is not None:
        made["direct_response"] = {"status": rule.direct_response.status}
        if rule.direct_response.body:
            made["direct_response"]["body"] = _body(rule.direct_response.body)
    else:
        made["route"] = _action(rule, made, authority, around)
    made["decorator"] = {"operation": _operation(made, around)}
    per_filter = {}
    if rule.fault is not None:
        per_filter[FAULT_FILTER] = _fault(rule.fault)
    if rule.cors is not None and not around.grpc:
        per_filter[CORS_FILTER] = _cors(rule.cors)
    if per_filter:
        made["typed_per_filter_config"] = per_filter
    return made


def _operation(made: Mapping[str, Any], around: Around) -> str:
    """What traces call such requests."""
    match = made["match"]
    path = match.get("path") or match.get("path_separated_prefix") or (match["safe_regex"]["regex"] if "safe_regex" in match else f"{match.get('prefix')}*")
    cluster = made.get("route", {}).get("cluster", "")
    if cluster.count("|") == 3:
        _, port, _, host = cluster.split("|")
        return f"{host}:{port}{path}"
    return f"{around.rules_name}:{around.port}{path}"


# --- what is matched


def _match(match: RouteMatch | None, grpc: bool) -> dict[str, Any]:
    """gRPC's own clients know no metadata, and would let everything pass: for them claims are headers that no request has."""
    if match is None:
        return {"prefix": "/"}
    made: dict[str, Any] = _path(match)
    if match.ignore_case:
        made["case_sensitive"] = False
    claims = [_claim(name, one) for name, one in match.headers.items() if _is_claim(name, grpc)]
    claims += [{**_claim(name, one), "invert": True} for name, one in match.without_headers.items() if _is_claim(name, grpc)]
    if claims:
        made["dynamic_metadata"] = claims
    headers = [_header(name, one) for name, one in match.headers.items() if not _is_claim(name, grpc)]
    for name, one in match.without_headers.items():
        if _is_claim(name, grpc):
            continue
        without = {**_header(name, one), "invert_match": True}
        if one.kind != "present":
            without["treat_missing_header_as_empty"] = True
        headers.append(without)
    headers.sort(key=lambda header: str(header["name"]))
    for name, pseudo in ((":method", match.method), (":authority", match.authority), (":scheme", match.scheme)):
        if pseudo is not None:
            headers.append(_header(name, pseudo))
    if headers:
        made["headers"] = headers
    if match.query:
        made["query_parameters"] = [
            {"name": name, **({"present_match": True} if one.kind == "present" else {"string_match": string_matcher(one)})} for name, one in match.query.items()
        ]
    return made


def _path(match: RouteMatch) -> dict[str, Any]:
    path = match.path
    if path is None:
        return {"prefix": "/"}
    if path.kind == "exact":
        return {"path": path.text}
    if path.kind == "regex":
        return {"safe_regex": {"regex": path.text}}
    if path.kind == "path_prefix" and path.text.rstrip("/"):
        return {"path_separated_prefix": path.text.rstrip("/")}
    return {"prefix": path.text}


def string_matcher(match: StringMatch) -> dict[str, Any]:
    """envoy.type.matcher.v3.StringMatcher."""
    return {"safe_regex": {"regex": match.text}} if match.kind == "regex" else {match.kind: match.text}


def _is_claim(name: str, grpc: bool) -> bool:
    return not grpc and bool(routing_claim(name))


def _claim(name: str, match: StringMatch) -> dict[str, Any]:
    return tokens.claim(routing_claim(name), {"string_match": string_matcher(match)})


def _header(name: str, match: StringMatch) -> dict[str, Any]:
    return {"name": name, **({"present_match": True} if match.kind == "present" else {"string_match": string_matcher(match)})}


# --- what is done


def _action(rule: HttpRoute, made: dict[str, Any], authority: str, around: Around) -> dict[str, Any]:
    http2 = any(_speaks_http2(one.destination, around) for one in rule.destinations)
    action: dict[str, Any] = _timeout(rule.timeout_s, around.grpc, http2)
    if around.gateway_api:
        action["cluster_not_found_response_code"] = "INTERNAL_SERVER_ERROR"
    if rule.rewrite is not None:
        _rewrite(action, rule.rewrite, made["match"])
        authority = rule.rewrite.authority or authority
    hashed = False
    if len(rule.destinations) == 1:
        one = rule.destinations[0]
        action["cluster"] = _cluster(one.destination, around)
        authority = authority or _mutate(made, one.request_headers, one.response_headers)
        policy = _hash_of(one.destination, around)
        hashed = policy is not None
        policies = [policy] if policy is not None else []
    else:
        clusters, policies = [], []
        for one in rule.destinations:
            if not one.weight:
                continue
            weighted: dict[str, Any] = {"name": _cluster(one.destination, around), "weight": one.weight}
            its_authority = _mutate(weighted, one.request_headers, one.response_headers)
            if its_authority:
                weighted["host_rewrite_literal"] = its_authority
            clusters.append(weighted)
            policy = _hash_of(one.destination, around)
            if policy is not None:
                policies.append(policy)
        action["weighted_clusters"] = {"clusters": clusters}
    if policies:
        action["hash_policy"] = [_hash_policy(policy) for policy in policies]
    if authority:
        action["host_rewrite_literal"] = authority
    mirrors = [
        {"cluster": _cluster(mirror.destination, around), "runtime_fraction": {"default_value": fraction(mirror.percent)}}
        for mirror in rule.mirrors
        if mirror.percent > 0
    ]
    if mirrors:
        action["request_mirror_policies"] = mirrors
    retry = _retry_policy(rule.retries if rule.retries is not None else around.retries, hashed)
    if retry:
        action["retry_policy"] = retry
    return action


NO_DEADLINE = {"max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"}}  # but for what a request's grpc-timeout says


def _timeout(timeout_s: float | None, grpc: bool, http2: bool) -> dict[str, Any]:
    """No time-out unless a rule has one; then it is of the response, so that endpoints that are too slow count as failing.

    Without one, gRPC's own counts where there is gRPC. `max_stream_duration` would take the place of `timeout`: the two cannot be together.
    """
    timeout = duration(timeout_s or 0.0)
    if grpc:
        return {"max_stream_duration": {"max_stream_duration": timeout}}
    return {"timeout": timeout, **(NO_DEADLINE if http2 and not timeout_s else {})}


def _speaks_http2(destination: Destination, around: Around) -> bool:
    target = around.targets.get(destination.host)
    service = target.service if target is not None else None
    port = service.port(_port(destination, service, around)) if service is not None else None
    return port is not None and port.protocol.is_http2


def _cluster(destination: Destination, around: Around) -> str:
    if not destination.host:
        return UNKNOWN_SERVICE
    service = around.targets[destination.host].service
    return outbound_cluster(destination.host, _port(destination, service, around), destination.subset)


def _port(destination: Destination, service: Service | None, around: Around) -> int:
    if destination.port:
        return destination.port
    return service.ports[0].number if service is not None and len(service.ports) == 1 else around.port


def _hash_of(destination: Destination, around: Around) -> ConsistentHash | None:
    target = around.targets.get(destination.host, Target(None))
    return dict(target.hash).get((_port(destination, target.service, around), destination.subset))


def _hash_policy(hash: ConsistentHash) -> dict[str, Any]:
    if hash.header:
        return {"header": {"header_name": hash.header}}
    if hash.cookie:
        cookie: dict[str, Any] = {"name": hash.cookie}
        if hash.cookie_path:
            cookie["path"] = hash.cookie_path
        if hash.cookie_ttl_s is not None:
            cookie["ttl"] = duration(hash.cookie_ttl_s)
        if hash.cookie_attributes:
            cookie["attributes"] = [{"name": name, "value": value} for name, value in hash.cookie_attributes]
        return {"cookie": cookie}
    if hash.query_parameter:
        return {"query_parameter": {"name": hash.query_parameter}}
    return {"connection_properties": {"source_ip": True}}


def _rewrite(action: dict[str, Any], rewrite: Rewrite, match: Mapping[str, Any]) -> None:
    if rewrite.regex is not None:
        action["regex_rewrite"] = {"pattern": {"regex": rewrite.regex[0]}, "substitution": rewrite.regex[1]}
    elif rewrite.path:
        action["regex_rewrite"] = {"pattern": {"regex": "/.*"}, "substitution": rewrite.path.replace("\\", "\\\\")}
    elif rewrite.prefix == "/" and "path_separated_prefix" in match:
        # Replacing `/a` of `/a/b` by `/` would leave two slashes.
        action["regex_rewrite"] = {"pattern": {"regex": f"^{re.escape(match['path_separated_prefix'])}(/?)(.*)"}, "substitution": r"/\2"}
    elif rewrite.prefix:
        action["prefix_rewrite"] = rewrite.prefix


def _retry_policy(retries: Retries | None, hashed: bool) -> dict[str, Any]:
    """Empty: no retries. A request that is balanced by hash may go to the same endpoint again."""
    policy: dict[str, Any] = {"retry_on": _DEFAULT_RETRY_ON, "num_retries": 2, "host_selection_retry_max_attempts": 5}
    previous = not hashed
    if retries is not None:
        if retries.attempts <= 0:
            return {}
        policy["num_retries"] = retries.attempts
        if retries.retry_on:
            policy["retry_on"] = retries.retry_on
        if retries.status_codes:
            policy["retriable_status_codes"] = list(retries.status_codes)
        if retries.per_try_timeout_s is not None:
            policy["per_try_timeout"] = duration(retries.per_try_timeout_s)
        if retries.backoff_s is not None:
            policy["retry_back_off"] = {"base_interval": duration(retries.backoff_s)}
        if retries.ignore_previous_hosts is not None:
            previous = retries.ignore_previous_hosts
    if retries is not None and retries.remote_localities:
        policy["retry_priority"] = _PREVIOUS_PRIORITIES
    if previous:
        policy["retry_host_predicate"] = [_PREVIOUS_HOSTS]
    return policy


def _redirect(redirect: Redirect, port: int) -> dict[str, Any]:
    made: dict[str, Any] = {"response_code": _STATUS[redirect.code]}
    if redirect.authority:
        made["host_redirect"] = redirect.authority
    if redirect.prefix:
        made["prefix_rewrite"] = redirect.prefix
    elif redirect.path:
        made["path_redirect"] = redirect.path
    if redirect.scheme:
        made["scheme_redirect"] = redirect.scheme
    number = port if redirect.request_port else redirect.port
    if number and (number, redirect.scheme or "http") not in ((80, "http"), (443, "https")):
        made["port_redirect"] = number
    return made


def _body(body: bytes) -> dict[str, Any]:
    try:
        return {"inline_string": body.decode()}
    except UnicodeDecodeError:
        return {"inline_bytes": base64.b64encode(body).decode()}


def _mutate(holder: dict[str, Any], request: HeaderOperations, response: HeaderOperations) -> str:
    """Put header operations into a route or a weighted cluster, after those that it has; returns the authority that they set."""
    authority = ""
    for operations, name in ((request, "request"), (response, "response")):
        if operations is NO_HEADERS:
            continue
        added = []
        for values, action in ((operations.set, "OVERWRITE_IF_EXISTS_OR_ADD"), (operations.add, "APPEND_IF_EXISTS_OR_ADD")):
            for key in sorted(values):
                if name == "request" and key.lower() in (":authority", "host"):
                    authority = authority or values[key]
                if not _internal(key):
                    added.append({"header": {"key": key, "value": values[key]}, "append_action": action})
        if added:
            holder[f"{name}_headers_to_add"] = holder.get(f"{name}_headers_to_add", []) + added
        removed = [key for key in operations.remove if not _internal(key)]
        if removed:
            holder[f"{name}_headers_to_remove"] = holder.get(f"{name}_headers_to_remove", []) + removed
    return authority


def _internal(key: str) -> bool:
    return key.startswith(":") or key.lower() == "host"


def _preflight(cors: Cors, match: RouteMatch | None) -> dict[str, Any]:
    """The answer to preflights that Envoy's filter has none for: it knows no method and no header that it was not told."""
    patterns = [re.escape(one.text) if one.kind == "exact" else one.text for one in cors.origins]
    made = _match(match, False)
    made["headers"] = [
        *made.get("headers", ()),
        {"name": ":method", "string_match": {"exact": "OPTIONS"}},
        {"name": "access-control-request-method", "present_match": True},
        {"name": "origin", "string_match": {"safe_regex": {"regex": "|".join(f"(?:{one})" for one in patterns) or "$^"}}},
    ]
    told = {
        "allow-origin": "%REQ(ORIGIN)%",
        "allow-methods": "%REQ(ACCESS-CONTROL-REQUEST-METHOD)%" if "*" in cors.methods else ",".join(cors.methods),
        "allow-headers": "%REQ(ACCESS-CONTROL-REQUEST-HEADERS)%" if "*" in cors.headers else ",".join(cors.headers),
        "allow-credentials": "true",
        "expose-headers": ",".join(cors.expose),
        "max-age": str(int(cors.max_age_s)) if cors.max_age_s is not None else "",
    }
    added = [
        {"header": {"key": f"access-control-{name}", "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"} for name, value in told.items() if value
    ]
    return {"name": "preflight", "match": made, "direct_response": {"status": 200}, "response_headers_to_add": added}


def fraction(percent: float) -> dict[str, Any]:
    """envoy.type.v3.FractionalPercent."""
    return {"numerator": round(percent * 10_000), "denominator": "MILLION"}


def _fault(fault: Fault) -> dict[str, Any]:
    made = typed("envoy.extensions.filters.http.fault.v3.HTTPFault")
    if fault.delay_s is not None:
        made["delay"] = {"fixed_delay": duration(fault.delay_s), "percentage": fraction(fault.delay_percent)}
    if fault.http_status:
        made["abort"] = {"http_status": fault.http_status, "percentage": fraction(fault.abort_percent)}
    elif fault.grpc_status:
        made["abort"] = {"grpc_status": _GRPC_CODES[fault.grpc_status], "percentage": fraction(fault.abort_percent)}
    return made


def _cors(cors: Cors) -> dict[str, Any]:
    made = typed(
        "envoy.extensions.filters.http.cors.v3.CorsPolicy",
        allow_origin_string_match=[string_matcher(origin) for origin in cors.origins],
        filter_enabled={"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        forward_not_matching_preflights=cors.forward_unmatched,
    )
    for values, name in ((cors.methods, "allow_methods"), (cors.headers, "allow_headers"), (cors.expose, "expose_headers")):
        if values:
            made[name] = ",".join(values)
    if cors.max_age_s is not None:
        made["max_age"] = str(int(cors.max_age_s))
    if cors.credentials is not None:
        made["allow_credentials"] = cors.credentials
    return made
