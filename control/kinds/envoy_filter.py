"""Istio's EnvoyFilter, as far as it is a plain patch: one value, put to one kind of place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from control.kinds.common import Meta
from control.kinds.fields import Fields
from control.kinds.security import targets
from control.kinds.virtual_service import check_regex
from control.model.envoy_filter import ANY, GATEWAY, INBOUND, OUTBOUND, PLACES, EnvoyFilter, Patch, PatchMatch
from meshproxy.api import convert, messages, support
from meshproxy.api.errors import INVALID, ConfigError, Problem

_CONTEXTS = (ANY, INBOUND, OUTBOUND, GATEWAY)
_OPERATIONS = ("MERGE", "ADD", "REMOVE", "INSERT_BEFORE", "INSERT_AFTER", "INSERT_FIRST", "REPLACE")
_LISTENERS = ("LISTENER", "LISTENER_FILTER", "FILTER_CHAIN", "NETWORK_FILTER", "HTTP_FILTER")
_ROUTES = ("ROUTE_CONFIGURATION", "VIRTUAL_HOST", "HTTP_ROUTE")
_T = "type.googleapis.com/envoy.extensions.filters."
_MANAGER = {"@type": f"{_T}network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "a", "route_config": {"name": "a"}}
_ROUTER = {"name": "router", "typed_config": {"@type": f"{_T}http.router.v3.Router"}}
_TCP = {"name": "tcp", "typed_config": {"@type": f"{_T}network.tcp_proxy.v3.TcpProxy", "stat_prefix": "a", "cluster": "a"}}


def parse(meta: Meta, body: Fields) -> EnvoyFilter:
    """`spec` of an EnvoyFilter."""
    spec = body.need("spec")
    names = targets(meta, spec, "workloadSelector")
    selector = spec.child("workloadSelector")
    labels = selector.string_map("labels") if selector is not None else {}
    patches = spec.each("configPatches", lambda fields: _patch(meta, fields), required=True)
    priority = spec.integer("priority", 0, low=-(2**31), high=2**31 - 1) or 0
    return EnvoyFilter(meta.name, meta.namespace, labels, priority, patches, names)


def _patch(meta: Meta, fields: Fields) -> Patch | None:
    place = fields.text("applyTo", required=True)
    patch = fields.need("patch")
    if place not in PLACES:
        if place:
            fields.error("applyTo", f"{place!r} is not one of {', '.join(PLACES)}")
        fields.rest()
        patch.rest()
        return None
    filter_class = patch.text("filterClass", choices=("UNSPECIFIED", "AUTHN", "AUTHZ", "STATS")).replace("UNSPECIFIED", "")
    operation = patch.text("operation", required=True, choices=_OPERATIONS)
    if operation and operation not in PLACES[place][1]:
        patch.error("operation", f"{operation} cannot be done to {place}; {', '.join(PLACES[place][1])} can")
    if filter_class and (place, operation) != ("HTTP_FILTER", "ADD"):
        patch.error("filterClass", f"is for ADD of HTTP_FILTER, not for {operation} of {place}")
    match = fields.child("match")
    context, found, version, metadata = ANY, PatchMatch(), "", {}
    if match is not None:
        proxy = match.child("proxy")
        if proxy is not None:
            version, metadata = proxy.text("proxyVersion"), proxy.string_map("metadata")
            check_regex(proxy, "proxyVersion", version)
        context = match.text("context", ANY, choices=_CONTEXTS)
        found = _match(match, place)
    value = _value(patch, place, operation)
    where = f"EnvoyFilter {meta.namespace}/{meta.name}: {fields.path}"
    return Patch(where, place, operation, context, found, value, filter_class, version, tuple(sorted(metadata.items())))


# --- where


def _match(fields: Fields, place: str) -> PatchMatch:
    field = "listener" if place in _LISTENERS else "routeConfiguration" if place in _ROUTES else "cluster" if place == "CLUSTER" else ""
    for other in ("listener", "routeConfiguration", "cluster"):
        if other != field and other in fields:
            fields.error(other, f"is not where {place} is" + (f"; use {field}" if field else ""))
            fields.child(other)
    below = fields.child(field) if field else None
    if below is None:
        return PatchMatch()
    return {"listener": _listener, "routeConfiguration": _route_configuration, "cluster": _cluster}[field](below)


def _listener(fields: Fields) -> PatchMatch:
    fields.not_honoured("portName", why="Istio does not implement it, either; use portNumber")
    chain = fields.child("filterChain") or Fields({})
    filter = chain.child("filter") or Fields({})
    sub = filter.child("subFilter") or Fields({})
    return PatchMatch(
        name=fields.text("name"),
        port=fields.port("portNumber"),
        chain=chain.text("name"),
        sni=chain.text("sni"),
        transport_protocol=chain.text("transportProtocol"),
        application_protocols=chain.text("applicationProtocols"),
        filter=filter.text("name"),
        sub_filter=sub.text("name"),
        listener_filter=fields.text("listenerFilter"),
        destination_port=chain.port("destinationPort"),
    )


def _route_configuration(fields: Fields) -> PatchMatch:
    host = fields.child("vhost") or Fields({})
    route = host.child("route") or Fields({})
    action = route.text("action", ANY, choices=(ANY, "ROUTE", "REDIRECT", "DIRECT_RESPONSE"))
    return PatchMatch(
        name=fields.text("name"),
        port=fields.port("portNumber"),
        virtual_host=host.text("name"),
        domain=host.text("domainName"),
        route=route.text("name"),
        action="" if action == ANY else action,
        gateway=fields.text("gateway"),
        port_name=fields.text("portName"),
    )


def _cluster(fields: Fields) -> PatchMatch:
    return PatchMatch(name=fields.text("name"), port=fields.port("portNumber"), service=fields.text("service"), subset=fields.text("subset"))


# --- what


def _value(patch: Fields, place: str, operation: str) -> Any:
    """The message, checked as far as it is one by itself: what it is merged into may have what it leaves out."""
    value = patch.child("value")
    if value is None:
        if operation not in ("REMOVE", ""):
            patch.error("value", f"is needed for {operation}")
        return None
    plain = value.rest()
    if operation == "REMOVE":
        return None
    cls = messages.known(PLACES[place][0])
    try:
        message = convert.to_message(dict(plain), cls)
        found = _checked(place, plain, complete=operation != "MERGE")
    except ConfigError as error:
        found = error.problems
        message = None
    for problem in found:
        value.error(problem.path, problem.why, problem.kind)
    return message


def _checked(place: str, plain: Mapping[str, Any], *, complete: bool) -> list[Problem]:
    """What our sidecar would say of the value, where it belongs."""
    whole, prefix = _around(place, plain)
    problems, _ = support.check(whole)
    kept = []
    for problem in problems:
        if complete or problem.kind != INVALID:
            path = problem.path.removeprefix(prefix).lstrip(".") if problem.path.startswith(prefix) else None
            if path is not None:
                kept.append(Problem(path, problem.why, problem.kind))
    return kept


def _around(place: str, plain: Mapping[str, Any]) -> tuple[Any, str]:
    """A message with the value in its place, and the path of it."""
    if place in ("BOOTSTRAP", "CLUSTER", "LISTENER", "ROUTE_CONFIGURATION"):
        return convert.to_message(dict(plain), messages.known(PLACES[place][0])), ""
    if place in _ROUTES:
        host: Mapping[str, Any] = plain if place == "VIRTUAL_HOST" else {"name": "a", "domains": ["*"], "routes": [plain]}
        prefix = "virtual_hosts[0]" + ("" if place == "VIRTUAL_HOST" else ".routes[0]")
        return convert.to_message({"name": "a", "virtual_hosts": [host]}, messages.known(PLACES["ROUTE_CONFIGURATION"][0])), prefix
    whole: dict[str, Any] = {"name": "a", "address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}}}
    if place == "LISTENER_FILTER":
        return convert.to_message({**whole, "listener_filters": [plain]}, messages.known(PLACES["LISTENER"][0])), "listener_filters[0]"
    if place == "FILTER_CHAIN":
        chain, prefix = plain, "filter_chains[0]"
    elif place == "NETWORK_FILTER":
        chain, prefix = {"filters": [plain, _TCP]}, "filter_chains[0].filters[0]"
    else:
        chain = {"filters": [{"name": "hcm", "typed_config": {**_MANAGER, "http_filters": [plain, _ROUTER]}}]}
        prefix = "filter_chains[0].filters[0].typed_config.http_filters[0]"
    return convert.to_message({**whole, "filter_chains": [chain]}, messages.known(PLACES["LISTENER"][0])), prefix
