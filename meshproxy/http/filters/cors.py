"""Cross-origin resource sharing (envoy.extensions.filters.http.cors.v3.Cors, with a CorsPolicy per virtual host or route).

Preflight requests of allowed origins are answered here; responses to other cross-origin requests get the access-control headers. The filter itself has
no settings: it does nothing where no policy applies. Of several policies the most specific one that sets a field decides that field.

When no policy comes from typed_per_filter_config, the `cors` fields of the route and its virtual host apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, matchers, runtime
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from envoy.extensions.filters.http.cors.v3.cors_pb2 import Cors as CorsProto
    from envoy.extensions.filters.http.cors.v3.cors_pb2 import CorsPolicy

    from meshproxy.codec.headers import RequestHead
    from meshproxy.context import Context
    from meshproxy.http.filters import FilterContext

TYPE_URL = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"
ROUTE_TYPE_URLS = ("type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",)
HONOURS = {
    "envoy.extensions.filters.http.cors.v3.Cors": "",
    "envoy.extensions.filters.http.cors.v3.CorsPolicy": (
        "allow_origin_string_match allow_methods allow_headers expose_headers max_age allow_credentials filter_enabled shadow_enabled "
        "allow_private_network_access forward_not_matching_preflights"
    ),
}

_STATS = ("origin_valid", "origin_invalid")
Fraction = Callable[[], bool] | bool


class Policy:
    """What applies to a route: CorsPolicy protos, most specific first, merged field by field."""

    __slots__ = (
        "allow_credentials", "allow_headers", "allow_methods", "allow_private_network", "enabled", "expose_headers", "forward_preflights", "max_age",
        "origins", "shadow_enabled",
    )  # fmt: skip

    def __init__(self, protos: Sequence[Any], context: FilterContext | Context) -> None:
        first = protos[0]
        self.enabled = _fraction(first, "filter_enabled", context, default=True)
        self.shadow_enabled = _fraction(first, "shadow_enabled", context, default=False)
        origins = next((proto.allow_origin_string_match for proto in protos if proto.allow_origin_string_match), ())
        self.origins = [_compile_origin(i, origin) for i, origin in enumerate(origins)]
        self.allow_methods = _text(protos, "allow_methods")
        self.allow_headers = _text(protos, "allow_headers")
        self.expose_headers = _text(protos, "expose_headers")
        self.max_age = _text(protos, "max_age")
        self.allow_credentials = _flag(protos, "allow_credentials", default=False)
        self.allow_private_network = _flag(protos, "allow_private_network_access", default=False)
        self.forward_preflights = _flag(protos, "forward_not_matching_preflights", default=True)

    def allows(self, origin: bytes) -> bool:
        return any(matches(origin) for matches in self.origins)

    def preflight(self, head: RequestHead, origin: bytes | None) -> Reply:
        """The answer to a preflight request; `origin` is None when it is not allowed."""
        headers: list[tuple[bytes, bytes]] = []
        if origin is not None:
            headers.append((b"access-control-allow-origin", origin))
        if self.allow_credentials:
            headers.append((b"access-control-allow-credentials", b"true"))
        for name, allowed, asked in (
            (b"access-control-allow-methods", self.allow_methods, b"access-control-request-method"),
            (b"access-control-allow-headers", self.allow_headers, b"access-control-request-headers"),
        ):
            value = head.get(asked, b"") if allowed == b"*" else allowed
            if allowed:
                headers.append((name, value or b""))
        if self.max_age:
            headers.append((b"access-control-max-age", self.max_age))
        if self.allow_private_network and head.get(b"access-control-request-private-network") == b"true":
            headers.append((b"access-control-allow-private-network", b"true"))
        return Reply(200, details="cors_response", headers=tuple(headers), as_is=True)


class Cors:
    """The filter with the policy of a route."""

    __slots__ = ("_invalid", "_policy", "_valid", "name")

    def __init__(self, policy: Policy, context: FilterContext) -> None:
        self._policy = policy
        scope = context.scope.scope("cors.")
        self._valid = scope.counter("origin_valid")
        self._invalid = scope.counter("origin_invalid")

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | None:
        head = stream.request
        origin = head.get(b"origin")
        if not origin:
            return None
        policy = self._policy
        enabled = _draw(policy.enabled)
        if not enabled and not _draw(policy.shadow_enabled):
            return None
        allowed = policy.allows(origin)
        if allowed:
            self._valid.n += 1
        else:
            self._invalid.n += 1
        if not enabled:
            return None
        if allowed:
            stream.locals[self] = origin
        if head.method != b"OPTIONS" or not head.get(b"access-control-request-method"):
            return None
        if not allowed and policy.forward_preflights:
            return None
        return policy.preflight(head, origin if allowed else None)

    def response_headers(self, stream: Any, end_stream: bool) -> None:
        origin = stream.locals.get(self)
        if origin is None:
            return
        response = stream.response
        response.set(b"access-control-allow-origin", origin)
        if self._policy.allow_credentials:
            response.set(b"access-control-allow-credentials", b"true")
        if self._policy.expose_headers:
            response.set(b"access-control-expose-headers", self._policy.expose_headers)


class RouteCors:
    """The filter where no typed policy applies: it looks for `cors` fields of the route and its virtual host."""

    __slots__ = ("_compiled", "_context", "name")

    def __init__(self, context: FilterContext) -> None:
        self._context = context
        self._compiled: dict[int, tuple[Any, Cors]] = {}

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | None:
        if b"origin" not in stream.request or stream.route is None:
            return None
        cors = self._of(stream.route)
        if cors is None:
            return None
        stream.locals[self] = cors
        return cors.request_headers(stream, end_stream)

    def response_headers(self, stream: Any, end_stream: bool) -> None:
        cors = stream.locals.get(self)
        if cors is not None:
            cors.response_headers(stream, end_stream)

    def idles(self, route: Any) -> bool:
        """Whether requests of `route` are let through as they are; see `Chain`."""
        return route is None or not route.cors

    def _of(self, route: Any) -> Cors | None:
        protos = getattr(route, "cors", None)
        if not protos:
            return None
        key = id(protos)
        known = self._compiled.get(key)
        if known is None:
            # The protos are kept beside what was made of them, so that their id stays theirs.
            known = self._compiled[key] = protos, Cors(Policy(protos, self._context), self._context)
        return known[1]


def compile(proto: CorsProto, context: FilterContext) -> RouteCors:
    """The filter where no typed policy applies."""
    context.scope.scope("cors.").declare("counter", _STATS)
    return RouteCors(context)


def specialise(base: RouteCors | None, overrides: list[CorsPolicy], context: FilterContext) -> Cors | None:
    """The filter for a route with typed policies."""
    policy = Policy(overrides[::-1], context)
    return None if policy.enabled is False and policy.shadow_enabled is False else Cors(policy, context)


def _compile_origin(index: int, proto: Any) -> Callable[[bytes], bool]:
    with errors.under(f"allow_origin_string_match[{index}]"):
        matches = matchers.compile_string(proto)
    # A matcher that would match a literal "*" stands for every origin.
    return (lambda _: True) if matches(b"*") else matches


def _text(protos: Sequence[Any], field: str) -> bytes:
    return next((value.encode() for proto in protos if (value := getattr(proto, field))), b"")


def _flag(protos: Sequence[Any], field: str, *, default: bool) -> bool:
    return next((getattr(proto, field).value for proto in protos if proto.HasField(field)), default)


def _fraction(proto: Any, field: str, context: FilterContext | Context, *, default: bool) -> Fraction:
    if not proto.HasField(field):
        return default
    with errors.under(field):
        return runtime.compile_fraction(getattr(proto, field), context.runtime, context.random)


def _draw(fraction: Fraction) -> bool:
    return fraction if isinstance(fraction, bool) else fraction()
