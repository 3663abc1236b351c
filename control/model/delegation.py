"""VirtualServices that leave some of their requests to others, and rules that refer to what they may not: rules as they are in effect.

Every function gives the same object for the same arguments, since what is made of rules is remembered by them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from control.model.gateway import GATEWAY_API
from control.model.routing import NO_HEADERS, Destination, HttpRoute, PathMatch, RouteMatch, RouteRules, StringMatch, WeightedDestination
from control.model.secret import ReferenceGrant, Referent, Referrer, is_granted

_Key = tuple[str, str]  # namespace and name


def in_effect(rules: Iterable[RouteRules], grants: Iterable[ReferenceGrant]) -> tuple[RouteRules, ...]:
    """With delegates in the places that name them, and without destinations that nobody granted. Delegates are no rules of their own."""
    rules, grants = list(rules), list(grants)
    delegates = {(one.namespace, one.name): one for one in rules if not one.hosts}
    made = []
    for one in rules:
        if one.hosts:
            chosen = tuple(_delegate(one, route.delegate, delegates) for route in one.http if route.delegate is not None)
            made.append(_granted(_with_delegates(one, chosen) if chosen else one, grants))
    return tuple(made)


# --- delegation


def _delegate(root: RouteRules, key: _Key, delegates: Mapping[_Key, RouteRules]) -> RouteRules | None:
    found = delegates.get(key)
    if found is None:
        return None
    seen = any(where in ("*", root.namespace) or (where == "." and found.namespace == root.namespace) for where in found.export_to or ("*",))
    return found if seen else None


@functools.lru_cache(10_000)
def _with_delegates(root: RouteRules, delegates: tuple[RouteRules | None, ...]) -> RouteRules:
    """`delegates`: one for each route that delegates, None where there is none: then nothing is said about its requests."""
    chosen = iter(delegates)
    routes: list[HttpRoute] = []
    for route in root.http:
        if route.delegate is None:
            routes.append(route)
        elif (delegate := next(chosen)) is not None:
            routes += [made for one in delegate.http if (made := _merged(route, one)) is not None]
    return replace(root, http=tuple(routes))


def _merged(root: HttpRoute, own: HttpRoute) -> HttpRoute | None:
    """A delegate's route, with what it leaves open from the route that delegates to it. None when no request can match both."""
    matches = _matches(root.matches, own.matches)
    if matches is None:
        return None
    headers = own if own.request_headers is not NO_HEADERS or own.response_headers is not NO_HEADERS else root
    return replace(
        own,
        name="-".join(filter(None, (root.name, own.name))),
        matches=matches,
        rewrite=own.rewrite or root.rewrite,
        timeout_s=root.timeout_s if own.timeout_s is None else own.timeout_s,
        retries=own.retries or root.retries,
        fault=own.fault or root.fault,
        mirrors=own.mirrors or root.mirrors,
        cors=own.cors or root.cors,
        request_headers=headers.request_headers,
        response_headers=headers.response_headers,
    )


def _matches(root: tuple[RouteMatch, ...], own: tuple[RouteMatch, ...]) -> tuple[RouteMatch, ...] | None:
    if not root or not own:
        return root or own
    made = []
    for one in own:
        together = [_both(other, one) for other in root if not _conflict(other, one)]
        if not together:
            return None  # as in Istio: one match that can never be spoils the route
        made += together
    return tuple(made)


def _both(root: RouteMatch, own: RouteMatch) -> RouteMatch:
    return replace(
        own,
        name="-".join(filter(None, (root.name, own.name))),
        path=own.path or root.path,
        method=own.method or root.method,
        authority=own.authority or root.authority,
        scheme=own.scheme or root.scheme,
        headers={**root.headers, **own.headers},
        without_headers={**root.without_headers, **own.without_headers},
        query={**root.query, **own.query},
        port=own.port or root.port,
        source_labels={**root.source_labels, **own.source_labels},
        source_namespace=own.source_namespace or root.source_namespace,
        gateways=own.gateways or root.gateways,
        stat_prefix=own.stat_prefix or root.stat_prefix,
    )


def _conflict(root: RouteMatch, own: RouteMatch) -> bool:
    """Whether a delegate asks for what the route before it excludes, as far as Istio looks."""
    for one, other in ((root.path, own.path), (root.scheme, own.scheme), (root.method, own.method), (root.authority, own.authority)):
        if _texts_conflict(one, other):
            return True
    for before, after in ((root.headers, own.headers), (root.without_headers, own.without_headers), (root.query, own.query)):
        if any(_texts_conflict(before.get(key), match) for key, match in after.items()):
            return True
    if root.ignore_case != own.ignore_case or (root.port and own.port and root.port != own.port):
        return True
    if root.source_namespace and own.source_namespace != root.source_namespace:
        return True
    if any(root.source_labels.get(key, value) != value for key, value in own.source_labels.items()):
        return True
    return bool(root.gateways and own.gateways and not set(own.gateways) <= set(root.gateways))


def _texts_conflict(root: StringMatch | PathMatch | None, own: StringMatch | PathMatch | None) -> bool:
    """Only of texts can one tell that they go together."""
    if root is None or own is None:
        return False
    if root.kind == "exact":
        return own.kind != "exact" or own.text != root.text
    if root.kind == "prefix" and own.kind in ("prefix", "exact"):
        return not own.text.startswith(root.text)
    return True


# --- grants


def _granted(rules: RouteRules, grants: list[ReferenceGrant]) -> RouteRules:
    if rules.is_of_mesh:  # whoever sends may send there anyway: nothing is let in that was not
        return rules
    foreign = {one.foreign for one in rules.all_destinations() if one.foreign is not None}
    if not foreign:
        return rules
    who = Referrer(GATEWAY_API, rules.kind, rules.namespace)
    return _without(rules, frozenset(key for key in foreign if not is_granted(grants, who, Referent("", "Service", *key))))


@functools.lru_cache(10_000)
def _without(rules: RouteRules, denied: frozenset[_Key]) -> RouteRules:
    """Where requests would go to a service that is denied, they go nowhere: the others keep their shares."""
    if not denied:
        return rules

    def weighted(some: tuple[WeightedDestination, ...]) -> tuple[WeightedDestination, ...]:
        return tuple(replace(one, destination=Destination("")) if one.destination.foreign in denied else one for one in some)

    http = tuple(
        replace(
            rule,
            destinations=weighted(rule.destinations),
            mirrors=tuple(one for one in rule.mirrors if one.destination.foreign not in denied),
        )
        for rule in rules.http
    )
    tcp = tuple(replace(one, destinations=weighted(one.destinations)) for one in rules.tcp)
    return replace(rules, http=http, tcp=tcp, tls=tuple(replace(one, destinations=weighted(one.destinations)) for one in rules.tls))
