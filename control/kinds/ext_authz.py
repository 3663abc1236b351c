"""Who decides about requests besides the mesh: envoyExtAuthzHttp and envoyExtAuthzGrpc of the MeshConfig's extensionProviders."""

from __future__ import annotations

import re

from control.kinds.fields import Fields
from control.model.security import Authorizer
from meshproxy.api import messages

HTTP, GRPC = "envoyExtAuthzHttp", "envoyExtAuthzGrpc"
KINDS = HTTP, GRPC
_DEFAULT_TIMEOUT_S = 600.0  # Istio's
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # it becomes a part of names of policies


def parse(fields: Fields, name: str, kind: str) -> Authorizer:
    """The entry of a provider of one of KINDS."""
    if not _NAME.fullmatch(name):
        fields.error("name", f"{name!r} is no DNS label")
    below = fields.need(kind)
    host = below.text("service", required=True).rpartition("/")[2]  # [<namespace>/]<host name>
    timeout = below.duration("timeout")
    common = (
        name,
        host,
        below.port("port", required=True),
        kind == HTTP,
        _DEFAULT_TIMEOUT_S if timeout is None else timeout,
        bool(below.boolean("failOpen")),
        _status(below),
        bool(below.boolean("clearRouteCache")),
        _body(below.child("includeRequestBodyInCheck")),
    )
    if kind == GRPC:
        return Authorizer(*common)
    prefix = below.text("pathPrefix")
    if prefix and (not prefix.startswith("/") or not prefix.isascii() or not prefix.isprintable() or " " in prefix):
        below.error("pathPrefix", f"{prefix!r} is no path")
    old = _headers(below, "includeHeadersInCheck")
    return Authorizer(
        *common,
        prefix,
        _headers(below, "includeRequestHeadersInCheck") or old,
        tuple(sorted(below.string_map("includeAdditionalHeadersInCheck").items())),
        _headers(below, "headersToUpstreamOnAllow"),
        _headers(below, "headersToDownstreamOnDeny"),
        _headers(below, "headersToDownstreamOnAllow"),
    )


def _status(fields: Fields) -> int:
    text = fields.text("statusOnError")
    if not text:
        return 0
    known = messages.known("envoy.type.v3.HttpStatus").DESCRIPTOR.fields_by_name["code"].enum_type.values_by_number
    if not (text.isascii() and text.isdigit() and int(text[:6]) in known and int(text[:6])):
        fields.error("statusOnError", f"{text!r} is no status that proxies know")
        return 0
    return int(text)


def _body(fields: Fields | None) -> tuple[int, bool, bool] | None:
    if fields is None:
        return None
    most = fields.integer("maxRequestBytes", low=1, required=True) or 1
    return most, bool(fields.boolean("allowPartialMessage")), bool(fields.boolean("packAsBytes"))


def _headers(fields: Fields, name: str) -> tuple[str, ...]:
    found = fields.texts(name)
    for index, header in enumerate(found):
        if header == "*":
            fields.error(f"{name}[{index}]", "a star alone is not served, in Istio either; put it before or after some text")
    return found
