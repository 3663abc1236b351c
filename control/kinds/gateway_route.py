"""The Gateway API's routes: HTTPRoute, GRPCRoute, TLSRoute and TCPRoute, for services of the mesh (as parents) and for gateways."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from control.kinds.common import Meta, hosts_of
from control.kinds.fields import Fields
from control.kinds.gateway_api import LISTENER_SETS
from control.kinds.virtual_service import check_regex
from control.model import listener_set
from control.model.gateway import GATEWAY_API as GROUP
from control.model.routing import (
    NO_HEADERS,
    Cors,
    Destination,
    DirectResponse,
    HeaderOperations,
    HttpRoute,
    Mirror,
    PathMatch,
    Redirect,
    Retries,
    Rewrite,
    RouteMatch,
    RouteRules,
    StringMatch,
    TcpRoute,
    TlsRoute,
    WeightedDestination,
)
from control.names import MESH, service_host

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_RETRY_ON = "connect-failure,refused-stream,unavailable,cancelled"
_INVALID_BACKEND = DirectResponse(500)


def parse_http_route(meta: Meta, body: Fields) -> tuple[RouteRules, ...]:
    """`spec` of an HTTPRoute."""
    return _Route(meta, "HTTPRoute", _http_match).parse(body.need("spec"))


def parse_grpc_route(meta: Meta, body: Fields) -> tuple[RouteRules, ...]:
    """`spec` of a GRPCRoute."""
    return _Route(meta, "GRPCRoute", _grpc_match).parse(body.need("spec"))


def parse_tcp_route(meta: Meta, body: Fields) -> tuple[RouteRules, ...]:
    """`spec` of a TCPRoute."""
    return _Route(meta, "TCPRoute").parse(body.need("spec"))


def parse_tls_route(meta: Meta, body: Fields) -> tuple[RouteRules, ...]:
    """`spec` of a TLSRoute."""
    return _Route(meta, "TLSRoute").parse(body.need("spec"))


class _Route:
    """Parses one document. `match` reads one of its matches, if it is about requests."""

    def __init__(self, meta: Meta, kind: str, match: Callable[[Fields], RouteMatch] | None = None) -> None:
        self._meta = meta
        self._kind = kind
        self._match = match

    def parse(self, spec: Fields) -> tuple[RouteRules, ...]:
        """One set of rules for each parent."""
        http: tuple[HttpRoute, ...] = ()
        tcp: tuple[TcpRoute, ...] = ()
        tls: tuple[TlsRoute, ...] = ()
        hostnames = hosts_of(spec, "hostnames") if self._kind != "TCPRoute" else ()
        if self._match is not None:
            http = spec.each("rules", self._rule) or (HttpRoute(direct_response=_INVALID_BACKEND),)
        elif self._kind == "TLSRoute":
            tls = tuple(TlsRoute(some, hostnames or ("*",)) for some in spec.each("rules", self._connections, required=True) if some)
        else:
            tcp = tuple(TcpRoute(some) for some in spec.each("rules", self._connections, required=True) if some)
        made = RouteRules(
            self._meta.name, self._meta.namespace, hostnames or ("*",), http, tcp, tls, gateway_api=True, kind=self._kind, created=self._meta.created
        )
        return spec.each("parentRefs", lambda fields: self._parent(fields, made), required=True)

    def _parent(self, fields: Fields, rules: RouteRules) -> RouteRules:
        group, kind = fields.text("group", GROUP), fields.text("kind", "Gateway")  # an empty group is the core's
        name, namespace, port = fields.text("name", required=True), fields.text("namespace", self._meta.namespace), fields.port("port")
        section = fields.text("sectionName")
        ports = (port,) if port else ()
        if (group, kind) == ("", "Service"):
            if section:
                fields.error("sectionName", "ports of services are chosen by `port`", "unsupported")
            # A route beside its service is for every caller; one elsewhere is for the callers of its own namespace.
            export_to = ("*",) if namespace == self._meta.namespace else (self._meta.namespace,)
            return replace(rules, hosts=(service_host(name, namespace),), ports=ports, gateways=(MESH,), export_to=export_to)
        if (group, kind) == (GROUP, "Gateway"):
            return replace(rules, ports=ports, gateways=(f"{namespace}/{name}",), section=section)
        if (group, kind) in LISTENER_SETS:
            return replace(rules, ports=ports, gateways=(listener_set.key(name, namespace),), section=section)
        fields.flaw("kind", f"{kind} of {group or 'core'} is no parent that meshctl serves")
        return replace(rules, gateways=())

    def _connections(self, fields: Fields) -> tuple[WeightedDestination, ...]:
        """Where a rule of TCPRoute or TLSRoute sends them; nothing when that is nowhere."""
        fields.text("name")
        fields.not_honoured("filters", "matches")
        return tuple(one for one in fields.each("backendRefs", self._plain_backend, required=True) if one.weight)

    def _plain_backend(self, fields: Fields) -> WeightedDestination:
        weight = fields.integer("weight", 1, high=1_000_000)
        return WeightedDestination(self._target(fields), 1 if weight is None else weight)

    def _rule(self, fields: Fields) -> HttpRoute:
        fields.not_honoured("sessionPersistence")
        filters = self._filters(fields)
        backends = fields.each("backendRefs", lambda below: self._backend(below, filters))
        timeouts, retry = fields.child("timeouts"), fields.child("retry")
        request_s = timeouts.duration("request") if timeouts is not None else None
        backend_s = timeouts.duration("backendRequest") if timeouts is not None else None
        redirect = filters.redirect
        usable = any(one.weight for one in backends)
        return HttpRoute(
            name=fields.text("name"),
            matches=fields.each("matches", self._match) if self._match is not None else (),
            destinations=backends if usable and redirect is None else (),
            redirect=redirect,
            direct_response=None if usable or redirect is not None else _INVALID_BACKEND,
            rewrite=filters.rewrite,
            timeout_s=request_s if request_s is not None or retry is not None else backend_s,  # that of a try is none of all tries together
            retries=_retries(retry, backend_s) if retry is not None or backend_s is not None else None,
            mirrors=tuple(filters.mirrors),
            cors=filters.cors,
            request_headers=filters.request,
            response_headers=filters.response,
        )

    def _backend(self, fields: Fields, rule: _Filters) -> WeightedDestination:
        """A backend. Where it is the only one, what its filters do is what the rule does."""
        filters = self._filters(fields)
        if filters.beyond_headers:
            if not fields.path.endswith("backendRefs[0]") or rule.several:
                fields.error("filters", "only header modifiers are served here, since there are several backends", "unsupported")
            elif rule.clashes(filters):
                fields.error("filters", "the rule has such a filter already")
            rule.take(filters)
        weight = fields.integer("weight", 1, high=1_000_000)
        return WeightedDestination(self._target(fields), 1 if weight is None else weight, filters.request, filters.response)

    def _target(self, fields: Fields) -> Destination:
        group, kind = fields.text("group"), fields.text("kind", "Service")
        if (group, kind) != ("", "Service"):
            fields.flaw("kind", f"{kind} of {group or 'core'} is no backend that meshctl serves")
            fields.ignore("name", "namespace", "port")
            return Destination("")
        name, namespace = fields.text("name", required=True), fields.text("namespace", self._meta.namespace)
        foreign = (namespace, name) if namespace != self._meta.namespace else None
        return Destination(service_host(name, namespace), "", fields.port("port", required=True), foreign)

    # --- filters

    def _filters(self, fields: Fields) -> _Filters:
        made = _Filters(fields.count("backendRefs") > 1)
        for read in fields.each("filters", lambda below: _Read(self, below)):
            read.into(made)
        return made

    def mirror(self, fields: Fields) -> Mirror:
        """RequestMirror."""
        fields.one_of("percent", "fraction")
        fraction = fields.child("fraction")
        percent = float(fields.integer("percent", 100, high=100) or 0)
        if fraction is not None:
            percent = 100.0 * (fraction.integer("numerator", 0) or 0) / (fraction.integer("denominator", 100, low=1) or 100)
        return Mirror(self._target(fields.need("backendRef")), min(percent, 100.0))


class _Filters:
    """What the filters of a rule or a backend say together."""

    def __init__(self, several: bool = False) -> None:
        self.several = several  # backends
        self.request = NO_HEADERS
        self.response = NO_HEADERS
        self.redirect: Redirect | None = None
        self.rewrite: Rewrite | None = None
        self.mirrors: list[Mirror] = []
        self.cors: Cors | None = None

    @property
    def beyond_headers(self) -> bool:
        return bool(self.redirect or self.rewrite or self.mirrors or self.cors)

    def clashes(self, other: _Filters) -> bool:
        """Whether both say something that only one of them can."""
        return any(mine and theirs for mine, theirs in ((self.redirect, other.redirect), (self.rewrite, other.rewrite), (self.cors, other.cors)))

    def take(self, other: _Filters) -> None:
        """Do what these do, too, but for headers."""
        self.redirect, self.rewrite, self.cors = self.redirect or other.redirect, self.rewrite or other.rewrite, self.cors or other.cors
        self.mirrors += other.mirrors


class _Read:
    """One filter."""

    def __init__(self, route: _Route, fields: Fields) -> None:
        self._route = route
        self._fields = fields
        self._kind = fields.text("type", required=True)

    def into(self, made: _Filters) -> None:
        fields = self._fields
        if self._kind == "RequestHeaderModifier":
            made.request = _modifier(fields.need("requestHeaderModifier"))
        elif self._kind == "ResponseHeaderModifier":
            made.response = _modifier(fields.need("responseHeaderModifier"))
        elif self._kind == "RequestMirror":
            made.mirrors.append(self._route.mirror(fields.need("requestMirror")))
        elif self._kind == "RequestRedirect":
            made.redirect = _redirect(fields.need("requestRedirect"))
        elif self._kind == "URLRewrite":
            made.rewrite = _rewrite(fields.need("urlRewrite"))
        elif self._kind == "CORS":
            made.cors = _cors(fields.need("cors"))
        elif self._kind:
            fields.rest()
            fields.error("type", f"{self._kind} is not served", "unsupported")


def _modifier(fields: Fields) -> HeaderOperations:
    def pairs(name: str) -> dict[str, str]:
        return dict(fields.each(name, lambda below: (below.text("name", required=True), below.text("value", required=True))))

    return HeaderOperations(pairs("set"), pairs("add"), fields.texts("remove"))


def _redirect(fields: Fields) -> Redirect:
    path = fields.child("path")
    full, prefix = _path_change(path) if path is not None else (None, None)
    code = fields.integer("statusCode", 302) or 302
    if code not in (301, 302, 303, 307, 308):
        fields.error("statusCode", f"{code} is not one of 301, 302, 303, 307, 308")
    scheme = fields.text("scheme", choices=("http", "https"))
    port = fields.port("port")
    return Redirect(full or "", prefix or "", fields.text("hostname"), scheme, port, not port and not scheme, code)


def _rewrite(fields: Fields) -> Rewrite:
    path = fields.child("path")
    full, prefix = _path_change(path) if path is not None else (None, None)
    return Rewrite(prefix or "", full or "", fields.text("hostname"))


def _cors(fields: Fields) -> Cors:
    """CORS. Answers to preflights are the gateway's, also where an origin is none of those that are allowed."""
    credentials = bool(fields.boolean("allowCredentials"))
    lists = {name: fields.texts(name) for name in ("allowMethods", "allowHeaders", "exposeHeaders")}
    if credentials and "*" in lists["exposeHeaders"]:
        fields.error("exposeHeaders", "* cannot be with allowCredentials: which headers there will be is not known", "unsupported")
    age = fields.integer("maxAge", 5, low=1, high=2**31 - 1)
    origins = tuple(map(_origin, fields.texts("allowOrigins")))
    return Cors(origins, lists["allowMethods"], lists["allowHeaders"], lists["exposeHeaders"], float(age or 5), credentials or None, False)


def _origin(text: str) -> StringMatch:
    return StringMatch("regex", ".*".join(map(re.escape, text.split("*")))) if "*" in text else StringMatch("exact", text)


def _path_change(fields: Fields) -> tuple[str | None, str | None]:
    """(the whole path, what replaces the prefix that matched): one of them."""
    kind = fields.text("type", required=True, choices=("ReplaceFullPath", "ReplacePrefixMatch"))
    full, prefix = fields.text("replaceFullPath"), fields.text("replacePrefixMatch")
    if kind == "ReplaceFullPath":
        return full or "/", None
    return None, prefix or "/"


def _retries(fields: Fields | None, per_try_s: float | None) -> Retries:
    if fields is None:
        return Retries(2, _RETRY_ON, per_try_s)
    codes = []
    for index, code in enumerate(fields.numbers("codes")):
        if not 400 <= code <= 599:
            fields.error(f"codes[{index}]", f"{code} is not within 400 to 599")
        codes.append(code)
    attempts = fields.integer("attempts", 2, high=2**31 - 1)
    # Who asks for retries has them also where no answer came: resets, and tries that took too long.
    retry_on = f"{_RETRY_ON},reset" + (",retriable-status-codes" if codes else "")
    return Retries(2 if attempts is None else attempts, retry_on, per_try_s, fields.duration("backoff", low=1e-3), tuple(codes))


# --- matches


def _http_match(fields: Fields) -> RouteMatch:
    method = fields.text("method", choices=_METHODS)
    return RouteMatch(
        path=_path(fields.child("path")),
        method=StringMatch("exact", method) if method else None,
        headers=_named(fields, "headers"),
        query=_named(fields, "queryParams"),
    )


def _path(fields: Fields | None) -> PathMatch | None:
    if fields is None:
        return None
    kind, value = fields.text("type", "PathPrefix", choices=("Exact", "PathPrefix", "RegularExpression")), fields.text("value", "/")
    if kind == "RegularExpression":
        check_regex(fields, "value", value)
        return PathMatch("regex", value)
    if not value.startswith("/"):
        fields.error("value", f"{value!r} must start with a slash")
    return PathMatch("exact" if kind == "Exact" else "path_prefix", value)


def _named(owner: Fields, name: str) -> dict[str, StringMatch]:
    def one(fields: Fields) -> tuple[str, StringMatch]:
        kind, value = fields.text("type", "Exact", choices=("Exact", "RegularExpression")), fields.text("value", required=True)
        if kind == "RegularExpression":
            check_regex(fields, "value", value)
        return fields.text("name", required=True), StringMatch("exact" if kind == "Exact" else "regex", value)

    found: dict[str, StringMatch] = {}
    for key, match in owner.each(name, one):
        found.setdefault(key, match)  # of two for one header, the first counts
    return found


def _grpc_match(fields: Fields) -> RouteMatch:
    method = fields.child("method")
    path = None
    if method is not None:
        kind = method.text("type", "Exact", choices=("Exact", "RegularExpression"))
        service, name = method.text("service"), method.text("method")
        if not service and not name:
            method.error("", "one of service, method is needed")
        if kind == "RegularExpression":
            pattern = f"/{service or '[^/]+'}/{name or '[^/]+'}"
            check_regex(method, "service" if service else "method", pattern)
            path = PathMatch("regex", pattern)
        elif service and name:
            path = PathMatch("exact", f"/{service}/{name}")
        else:
            path = PathMatch("prefix", f"/{service}/") if service else PathMatch("regex", f"/[^/]+/{re.escape(name)}")
    return RouteMatch(path=path, headers=_named(fields, "headers"))
