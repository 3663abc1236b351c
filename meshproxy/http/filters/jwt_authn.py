"""Verifies JSON Web Tokens (envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication).

The first rule that matches a request says which tokens it needs; a route may say so instead, by the name of a requirement. What is wrong with a token is
answered 401, a wrong audience 403. What is in a good one can go into headers and into dynamic metadata, for routes, RBAC and logs. The parts: `http.jwt`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import datasource, errors
from meshproxy.api.errors import UNSUPPORTED
from meshproxy.http import route_match
from meshproxy.http.jwt.provider import Provider
from meshproxy.http.jwt.requirements import Providers, Requirement, Verdict, Verification, Waiting, compile_requirement
from meshproxy.http.jwt.status import Status
from meshproxy.http.replies import Reply

if TYPE_CHECKING:
    from envoy.extensions.filters.http.jwt_authn.v3.config_pb2 import JwtAuthentication as Proto
    from envoy.extensions.filters.http.jwt_authn.v3.config_pb2 import PerRouteConfig, RequirementRule

    from meshproxy.codec.headers import RequestHead
    from meshproxy.http.filters import FilterContext

_P = "envoy.extensions.filters.http.jwt_authn.v3"
TYPE_URL = f"type.googleapis.com/{_P}.JwtAuthentication"
ROUTE_TYPE_URLS = (f"type.googleapis.com/{_P}.PerRouteConfig",)
HONOURS = {
    f"{_P}.JwtAuthentication": "providers rules bypass_cors_preflight requirement_map strip_failure_response stat_prefix",
    f"{_P}.JwtProvider": (
        "issuer audiences subjects require_expiration max_lifetime remote_jwks local_jwks forward from_headers from_params from_cookies "
        "forward_payload_header pad_forward_payload_header payload_in_metadata normalize_payload_in_metadata header_in_metadata "
        "failed_status_in_metadata clock_skew_seconds jwt_cache_config claim_to_headers clear_route_cache"
    ),
    f"{_P}.JwtProvider.NormalizePayload": "space_delimited_claims",
    f"{_P}.JwtCacheConfig": "jwt_cache_size jwt_max_token_size",
    f"{_P}.JwtHeader": "name value_prefix",
    f"{_P}.JwtClaimToHeader": "header_name claim_name",
    f"{_P}.RemoteJwks": "http_uri cache_duration async_fetch retry_policy",
    f"{_P}.JwksAsyncFetch": "fast_listener failed_refetch_duration",
    f"{_P}.RequirementRule": "match requires requirement_name",
    f"{_P}.JwtRequirement": "provider_name provider_and_audiences requires_any requires_all allow_missing_or_failed allow_missing",
    f"{_P}.ProviderWithAudiences": "provider_name audiences",
    f"{_P}.JwtRequirementOrList": "requirements",
    f"{_P}.JwtRequirementAndList": "requirements",
    f"{_P}.PerRouteConfig": "disabled requirement_name",
    "google.protobuf.Empty": "",
    "envoy.config.core.v3.HttpUri": "uri cluster timeout",
    "envoy.config.core.v3.RetryPolicy": "retry_back_off num_retries retry_on",
    "envoy.config.core.v3.BackoffStrategy": "base_interval max_interval",
    **datasource.HONOURS,
    **route_match.HONOURS,
}

METADATA = "envoy.filters.http.jwt_authn"
_STATS = ("allowed", "cors_preflight_bypassed", "denied", "jwks_fetch_success", "jwks_fetch_failed", "jwt_cache_hit", "jwt_cache_miss")
_MAX_REALM = 256  # bytes of the path in www-authenticate

Rule = tuple[Callable[["RequestHead"], bool], Requirement | None]


class JwtAuthn:
    """The filter. `fixed`: what a route requires instead of the rules: a requirement, None for nothing, or the reply to a wrong name."""

    def __init__(self, base: Base, fixed: Requirement | Reply | None, *, by_rules: bool = False) -> None:
        self._base = base
        self._fixed = fixed
        self._by_rules = by_rules

    def request_headers(self, stream: Any, end_stream: bool) -> Reply | Awaitable[Reply | None] | None:
        """Let the request pass, refuse it, or hold it until keys have been fetched."""
        base = self._base
        head = stream.request
        if base.bypasses_preflights and _is_preflight(head):
            base.stats["cors_preflight_bypassed"].n += 1
            requirement = None
        elif self._by_rules:
            requirement = base.requirement(head)
        elif isinstance(self._fixed, Reply):
            base.stats["denied"].n += 1
            return self._fixed
        else:
            requirement = self._fixed
        if requirement is None:
            base.stats["allowed"].n += 1
            return None
        realm = _realm(head)
        verification = Verification(head)
        run = requirement.verify(verification)
        try:
            waiting = next(run)
        except StopIteration as done:
            return self._finish(stream, verification, realm, done.value)
        return self._wait(stream, verification, realm, run, waiting)

    async def _wait(self, stream: Any, verification: Verification, realm: bytes, run: Verdict, waiting: Waiting) -> Reply | None:
        """Go on when keys have come. A stream that ends meanwhile waits no more; the fetch goes on for the next one."""
        try:
            while True:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                waiting = next(run)
        except StopIteration as done:
            return self._finish(stream, verification, realm, done.value)
        finally:
            run.close()

    def _finish(self, stream: Any, verification: Verification, realm: bytes, status: Status) -> Reply | None:
        base = self._base
        if verification.extracted:
            stream.metadata[METADATA] = stream.metadata.get(METADATA, {}) | verification.extracted
        if verification.clears_route:
            stream.clear_route_cache()
        if status == Status.OK:
            base.stats["allowed"].n += 1
            return None
        base.stats["denied"].n += 1
        code = 403 if status == Status.AUDIENCE_NOT_ALLOWED else 401
        details = _details(status.text)
        if base.strips:
            return Reply(code, details=details)
        challenge = b'Bearer realm="%b"%b' % (realm, b"" if status == Status.MISSING else b', error="invalid_token"')
        return Reply(code, status.text.encode(), details=details, headers=((b"www-authenticate", challenge),))


class Base(JwtAuthn):
    """The filter as configured: with the rules, and with the requirements that routes name."""

    def __init__(self, proto: Proto, context: FilterContext) -> None:
        super().__init__(self, None, by_rules=True)
        prefix = proto.stat_prefix.removesuffix(".")
        scope = context.scope.scope(f"jwt_authn.{prefix}." if prefix else "jwt_authn.")
        scope.declare("counter", _STATS)
        self.stats = {name: scope.counter(name) for name in _STATS}
        self.bypasses_preflights: bool = proto.bypass_cors_preflight
        self.strips: bool = proto.strip_failure_response
        if proto.HasField("filter_state_rules"):
            # With --unsupported warn too: who relies on them must not lose them silently.
            errors.fail("filter_state_rules", "rules by filter state are not supported; use rules with a match", UNSUPPORTED)
        found = errors.Collector()
        compiled: dict[str, Provider] = {}
        for name in sorted(proto.providers):
            with found.under(f'providers["{name}"]'):
                compiled[name] = Provider(proto.providers[name], context, self.stats)
        found.raise_any()
        providers = Providers(proto.providers, compiled, context.context.wall, self.stats)
        self._named: dict[str, Requirement] = {}
        for name in sorted(proto.requirement_map):
            with found.under(f'requirement_map["{name}"]'):
                self._named[name] = compile_requirement(proto.requirement_map[name], providers)
        found.raise_any()
        self._rules: list[Rule] = []
        for index, rule in enumerate(proto.rules):
            with found.under(f"rules[{index}]"):
                self._rules.append(self._compile_rule(rule, providers, context))
        found.raise_any()

    def _compile_rule(self, rule: RequirementRule, providers: Providers, context: FilterContext) -> Rule:
        if not rule.HasField("match"):
            errors.fail("match", "is required")
        with errors.under("match"):
            matches = _compile_match(rule.match, context)
        match rule.WhichOneof("requirement_type"):
            case "requires":
                with errors.under("requires"):
                    return matches, compile_requirement(rule.requires, providers)
            case "requirement_name":
                requirement = self._named.get(rule.requirement_name)
                if requirement is None:
                    errors.fail("requirement_name", self._wrong_name(rule.requirement_name))
                return matches, requirement
        return matches, None

    def _wrong_name(self, name: str) -> str:
        return f"Wrong requirement_name: {name}. It should be one of [{','.join(self._named)}]"

    def requirement(self, head: RequestHead) -> Requirement | None:
        """What the first rule that matches requires."""
        for matches, requirement in self._rules:
            if matches(head):
                return requirement
        return None

    def for_route(self, proto: PerRouteConfig) -> JwtAuthn:
        """The filter for a route that requires something else."""
        if proto.WhichOneof("requirement_specifier") is None:
            errors.fail("", "one of disabled and requirement_name is required")
        if proto.disabled:
            return JwtAuthn(self, None)
        requirement = self._named.get(proto.requirement_name)
        if requirement is not None:
            return JwtAuthn(self, requirement)
        why = self._wrong_name(proto.requirement_name)
        return JwtAuthn(self, Reply(403, b"" if self.strips else f"Failed JWT authentication: {why}".encode(), details=_details(why)))


def _compile_match(proto: Any, context: FilterContext) -> Callable[[RequestHead], bool]:
    """A RouteMatch as this filter uses it: path, headers and query parameters; what else it may say plays no part here, as in Envoy."""
    for field in ("runtime_fraction", "grpc", "tls_context"):
        if proto.HasField(field):
            errors.fail(field, "plays no part in the rules of jwt_authn", UNSUPPORTED)
    for field in ("dynamic_metadata", "filter_state"):
        if len(getattr(proto, field)):
            errors.fail(field, "plays no part in the rules of jwt_authn", UNSUPPORTED)
    path = route_match.compile_path_match(proto, context.runtime)
    others = route_match.compile_head_test(proto, context.runtime)
    if path.kind == route_match.CONNECT:
        return lambda head: head.method == b"CONNECT" and (others is None or others(head))
    same = path.matches

    def matches(head: RequestHead) -> bool:
        bare = head.path.partition(b"?")[0].partition(b"#")[0]
        return same(bare) and (others is None or others(head))

    return matches


def _is_preflight(head: RequestHead) -> bool:
    return head.method == b"OPTIONS" and bool(head.get(b"origin")) and bool(head.get(b"access-control-request-method"))


def _realm(head: RequestHead) -> bytes:
    """The URI that was asked for, as www-authenticate names it."""
    path = (head.get(b"x-envoy-original-path") or head.path)[:_MAX_REALM]
    return b"%b://%b%b" % (head.get(b"x-forwarded-proto") or b"", head.authority, path)


def _details(text: str) -> str:
    """Response code details: white space would break the columns of access logs."""
    return f"jwt_authn_access_denied{{{'_'.join(text.split(' '))}}}"


def compile(proto: Proto, context: FilterContext) -> Base:
    """The filter for a JwtAuthentication proto. Raises ConfigError."""
    return Base(proto, context)


def specialise(base: Base, overrides: list[PerRouteConfig], context: FilterContext) -> JwtAuthn:
    """The filter for a route: the most specific override."""
    return base.for_route(overrides[-1])
