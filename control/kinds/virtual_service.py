"""Istio's VirtualService."""

from __future__ import annotations

import base64
import binascii

from control.kinds.common import Meta, export_to, hosts_of, subnets_of
from control.kinds.fields import Fields
from control.model.routing import (
    NO_HEADERS,
    Cors,
    Destination,
    DirectResponse,
    Fault,
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
from control.names import MESH, host_matches, resolve_host, routing_claim
from meshproxy.api.errors import ConfigError
from meshproxy.api.regex import compile_captures

_GRPC_CODES = (
    "CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED "
    "OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED"
).split()
_NO_SOURCE_SUBNET = "Istio does not implement it, either; use sourceLabels"
_MAX_BODY = 1 << 20  # what Istio allows direct responses


def parse(meta: Meta, body: Fields) -> RouteRules:
    """`spec` of a VirtualService."""
    return _VirtualService(meta).parse(body.need("spec"))


class _VirtualService:
    """Parses one document; `_namespace` is where its short names are."""

    def __init__(self, meta: Meta) -> None:
        self._meta = meta
        self._namespace = meta.namespace

    def parse(self, spec: Fields) -> RouteRules:
        hosts = hosts_of(spec, "hosts")
        if not hosts:  # others delegate to it
            spec.not_honoured("gateways", "tcp", "tls", why="hosts are needed, except of a VirtualService that others delegate HTTP to")
        gateways = (self._gateways(spec) or (MESH,)) if hosts else ()
        http = spec.each("http", self._http)
        for index, route in enumerate(http if not hosts else ()):
            if route.delegate is not None:
                spec.error(f"http[{index}].delegate", "a delegate cannot delegate further")
        tcp = tuple(route for some in spec.each("tcp", self._tcp) for route in some) if hosts else ()
        tls = tuple(route for some in spec.each("tls", lambda fields: self._tls(fields, hosts)) for route in some) if hosts else ()
        if not http and not tcp and not tls and not spec.problems:
            spec.error("", "one of http, tls, tcp is needed")
        return RouteRules(
            self._meta.name,
            self._namespace,
            tuple(resolve_host(host, self._namespace) for host in hosts),
            http,
            tcp,
            tls,
            gateways=gateways,
            export_to=export_to(spec),
        )

    def _gateways(self, fields: Fields) -> tuple[str, ...]:
        """`namespace/name` of each, or `mesh`."""
        return tuple(name if name == MESH or "/" in name else f"{self._namespace}/{name}" for name in fields.texts("gateways"))

    # --- HTTP

    def _http(self, fields: Fields) -> HttpRoute:
        fields.one_of("route", "redirect", "directResponse", "delegate", required=True)
        delegate = fields.child("delegate")
        destinations = fields.each("route", self._destination)
        self._check_weights(fields, destinations)
        redirect, direct = fields.child("redirect"), fields.child("directResponse")
        if redirect or direct:
            for name in ("fault", "rewrite"):
                if name in fields:
                    fields.error(name, f"cannot go with {'redirect' if redirect else 'directResponse'}")
        request, response = _header_operations(fields)
        cors, retries, rewrite = fields.child("corsPolicy"), fields.child("retries"), fields.child("rewrite")
        fault = fields.child("fault")
        return HttpRoute(
            name=fields.text("name"),
            matches=fields.each("match", self._match),
            destinations=destinations,
            redirect=_redirect(redirect) if redirect is not None else None,
            direct_response=_direct_response(direct) if direct is not None else None,
            rewrite=_rewrite(rewrite) if rewrite is not None else None,
            timeout_s=fields.duration("timeout"),
            retries=retries_of(retries) if retries is not None else None,
            fault=_fault(fault) if fault is not None else None,
            mirrors=self._mirrors(fields),
            cors=_cors(cors) if cors is not None else None,
            request_headers=request,
            response_headers=response,
            delegate=(delegate.text("namespace", self._namespace), delegate.text("name", required=True)) if delegate is not None else None,
        )

    def _match(self, fields: Fields) -> RouteMatch:
        uri = _string_match(fields, "uri")
        return RouteMatch(
            name=fields.text("name"),
            path=PathMatch(uri.kind, uri.text) if uri is not None and uri.kind != "present" else None,
            ignore_case=bool(fields.boolean("ignoreUriCase")),
            method=_string_match(fields, "method"),
            authority=_string_match(fields, "authority"),
            scheme=_string_match(fields, "scheme"),
            headers=fields.mapping("headers", _header_match),
            without_headers=fields.mapping("withoutHeaders", _header_match),
            query=fields.mapping("queryParams", _string_match),
            port=fields.port("port"),
            source_labels=fields.string_map("sourceLabels"),
            source_namespace=fields.text("sourceNamespace"),
            gateways=self._gateways(fields),
            stat_prefix=fields.text("statPrefix"),
        )

    def _destination(self, fields: Fields) -> WeightedDestination:
        request, response = _header_operations(fields)
        return WeightedDestination(self._target(fields.need("destination")), fields.integer("weight", 0, high=2**31 - 1) or 0, request, response)

    def _target(self, fields: Fields) -> Destination:
        port = fields.child("port")
        return Destination(
            resolve_host(fields.text("host", required=True), self._namespace), fields.text("subset"), port.port("number", required=True) if port else 0
        )

    def _mirrors(self, fields: Fields) -> tuple[Mirror, ...]:
        if fields.one_of("mirror", "mirrors") == "mirrors":
            return fields.each("mirrors", lambda below: Mirror(self._target(below.need("destination")), _percentage(below, "percentage")))
        fields.one_of("mirrorPercentage", "mirrorPercent", "mirror_percent")
        old = fields.integer("mirrorPercent", fields.integer("mirror_percent", 100, high=100), high=100)
        percent = _percentage(fields, "mirrorPercentage") if "mirrorPercentage" in fields else float(100 if old is None else old)
        mirror = fields.child("mirror")
        return (Mirror(self._target(mirror), percent),) if mirror is not None else ()

    # --- TCP

    def _tcp(self, fields: Fields) -> tuple[TcpRoute, ...]:
        """One route for each of the matches."""
        destinations = fields.each("route", self._destination, required=True)
        self._check_plain(fields, destinations)
        matches = fields.each("match", self._tcp_match)
        return tuple(TcpRoute(destinations, *match) for match in matches) or (TcpRoute(destinations),)

    def _tls(self, fields: Fields, hosts: tuple[str, ...]) -> tuple[TlsRoute, ...]:
        """One route for each of the matches."""
        destinations = fields.each("route", self._destination, required=True)
        self._check_plain(fields, destinations)
        return fields.each("match", lambda below: self._tls_match(below, destinations, hosts), required=True)

    def _tls_match(self, fields: Fields, destinations: tuple[WeightedDestination, ...], hosts: tuple[str, ...]) -> TlsRoute:
        fields.not_honoured("sourceSubnet", why=_NO_SOURCE_SUBNET)
        names = hosts_of(fields, "sniHosts", required=True)
        for index, name in enumerate(names):
            if not any(host == name or host_matches(host, name) for host in hosts):
                fields.error(f"sniHosts[{index}]", f"{name!r} is not within any of the hosts of this VirtualService")
        port, labels, namespace, gateways = fields.port("port"), fields.string_map("sourceLabels"), fields.text("sourceNamespace"), self._gateways(fields)
        return TlsRoute(destinations, names, port, labels, namespace, gateways, subnets_of(fields, "destinationSubnets"))

    def _check_plain(self, fields: Fields, destinations: tuple[WeightedDestination, ...]) -> None:
        for index, destination in enumerate(destinations):
            if destination.request_headers is not NO_HEADERS or destination.response_headers is not NO_HEADERS:
                fields.error(f"route[{index}].headers", "connections that are no HTTP have no headers")
        self._check_weights(fields, destinations)

    def _check_weights(self, fields: Fields, destinations: tuple[WeightedDestination, ...]) -> None:
        total = sum(destination.weight for destination in destinations)
        if len(destinations) > 1 and not total:
            fields.error("route", "of several destinations, one at least needs a weight")
        if total >= 2**32:
            fields.error("route", "the weights add up to more than 32 bits")

    def _tcp_match(self, fields: Fields) -> tuple[int, dict[str, str], str, tuple[str, ...], tuple[str, ...]]:
        fields.not_honoured("sourceSubnet", why=_NO_SOURCE_SUBNET)
        labels, namespace, subnets = fields.string_map("sourceLabels"), fields.text("sourceNamespace"), subnets_of(fields, "destinationSubnets")
        return fields.port("port"), labels, namespace, self._gateways(fields), subnets


def _string_match(owner: Fields, name: str) -> StringMatch | None:
    fields = owner.child(name)
    if fields is None:
        return None
    kind = fields.one_of("exact", "prefix", "regex")
    texts = {name: fields.text(name) for name in ("exact", "prefix", "regex")}
    if not kind or (kind == "regex" and texts[kind] == "*"):  # the second is how Istio's users have come to write it
        return StringMatch("present")
    if not texts[kind]:
        fields.error(kind, "must not be empty")
    if kind == "regex":
        check_regex(fields, "regex", texts[kind])
    return StringMatch(kind, texts[kind])


def _header_match(owner: Fields, name: str) -> StringMatch | None:
    match = _string_match(owner, name)
    if name.startswith("@"):
        if not all(routing_claim(name) or ("",)):
            owner.error(name, "is no claim such as @request.auth.claims.group or @request.auth.claims[group]")
        elif match is not None and match.kind == "present":
            owner.error(name, "needs one of exact, prefix, regex: that a claim is there cannot be matched", "unsupported")
    return match


def check_regex(fields: Fields, name: str, pattern: str) -> None:
    """Note a pattern that RE2 does not take."""
    try:
        compile_captures(pattern)
    except ConfigError as error:
        fields.error(name, f"no regular expression of RE2: {error.problems[0].why}")


def _percentage(owner: Fields, name: str, default: float = 100.0) -> float:
    fields = owner.child(name)
    return default if fields is None else fields.number("value", 0.0, high=100.0)


def _delay_percentage(delay: Fields) -> float:
    """`percentage`, or its older name with a whole number."""
    delay.one_of("percentage", "percent")
    return float(delay.integer("percent", high=100) or 0) if "percent" in delay else _percentage(delay, "percentage", 0.0)


def _header_operations(owner: Fields) -> tuple[HeaderOperations, HeaderOperations]:
    fields = owner.child("headers")
    if fields is None:
        return NO_HEADERS, NO_HEADERS
    return _operations(fields.child("request")), _operations(fields.child("response"))


def _operations(fields: Fields | None) -> HeaderOperations:
    if fields is None:
        return NO_HEADERS
    return HeaderOperations(fields.string_map("set"), fields.string_map("add"), fields.texts("remove"))


def _redirect(fields: Fields) -> Redirect:
    fields.one_of("port", "derivePort")
    code = fields.integer("redirectCode", 301) or 301
    if code not in (301, 302, 303, 307, 308):
        fields.error("redirectCode", f"{code} is not one of 301, 302, 303, 307, 308")
    derive = fields.text("derivePort", choices=("FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"))
    return Redirect(
        path=fields.text("uri"),
        authority=fields.text("authority"),
        scheme=fields.text("scheme"),
        port=fields.port("port"),
        request_port=derive == "FROM_REQUEST_PORT",
        code=code,
    )


def _direct_response(fields: Fields) -> DirectResponse:
    status = fields.integer("status", 200, low=200, high=599, required=True) or 200
    holder = fields.child("body")
    body = b""
    if holder is not None:
        holder.one_of("string", "bytes", required=True)
        body = holder.text("string").encode()
        if "bytes" in holder:
            try:
                body = base64.b64decode(holder.text("bytes"), validate=True)
            except binascii.Error:
                holder.error("bytes", "must be base64")
    if len(body) > _MAX_BODY:
        fields.error("body", f"is longer than {_MAX_BODY} bytes")
    return DirectResponse(status, body)


def _rewrite(fields: Fields) -> Rewrite:
    fields.one_of("uri", "uriRegexRewrite")
    regex = fields.child("uriRegexRewrite")
    pair = None
    if regex is not None:
        pair = (regex.text("match", required=True), regex.text("rewrite"))
        check_regex(regex, "match", pair[0])
    return Rewrite(prefix=fields.text("uri"), authority=fields.text("authority"), regex=pair)


def retries_of(fields: Fields) -> Retries:
    """Istio's HTTPRetry."""
    codes, conditions = [], []
    for word in fields.text("retryOn").split(","):
        word = word.strip()
        if word.isdigit() and 100 <= int(word) < 600:
            codes.append(int(word))
        elif word:
            conditions.append(word)
    if codes and "retriable-status-codes" not in conditions:
        conditions.append("retriable-status-codes")
    return Retries(
        fields.integer("attempts", 0, high=2**31 - 1) or 0,
        ",".join(conditions),
        fields.duration("perTryTimeout"),
        fields.duration("backoff", low=1e-3),
        tuple(codes),
        fields.boolean("retryIgnorePreviousHosts", None),
        bool(fields.boolean("retryRemoteLocalities")),
    )


def _fault(fields: Fields) -> Fault:
    delay, abort = fields.child("delay"), fields.child("abort")
    if delay is None and abort is None:
        fields.error("", "one of delay, abort is needed")
    delay, abort = delay or Fields({}), abort or Fields({})
    delay.not_honoured("exponentialDelay")
    if "abort" in fields:
        abort.one_of("httpStatus", "grpcStatus", required=True)
    abort.not_honoured("http2Error")
    return Fault(
        delay.duration("fixedDelay", required="delay" in fields, low=1e-3),
        _delay_percentage(delay),
        abort.integer("httpStatus", 0, low=200, high=599) or 0,
        abort.text("grpcStatus", choices=_GRPC_CODES),
        _percentage(abort, "percentage", 0.0),
    )


def _cors(fields: Fields) -> Cors:
    fields.not_honoured("allowOrigin", why="is no longer part of Istio's API; use allowOrigins")
    return Cors(
        fields.each("allowOrigins", _origin),
        fields.texts("allowMethods"),
        fields.texts("allowHeaders"),
        fields.texts("exposeHeaders"),
        fields.duration("maxAge"),
        fields.boolean("allowCredentials", None),
        fields.text("unmatchedPreflights", "FORWARD", choices=("UNSPECIFIED", "FORWARD", "IGNORE")) != "IGNORE",
    )


def _origin(fields: Fields) -> StringMatch | None:
    kind = fields.one_of("exact", "prefix", "regex", required=True)
    texts = {name: fields.text(name) for name in ("exact", "prefix", "regex")}
    if kind == "regex":
        check_regex(fields, "regex", texts[kind])
    return StringMatch(kind, texts[kind]) if kind else None
