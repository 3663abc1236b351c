"""The policy engine of both RBAC filters (envoy.config.rbac.v3.RBAC): policies become nested plain predicates on a StreamInfo.

Compiling removes what is constant: `any` permissions and principals cost nothing at run time, a policy that is one header matcher is that matcher. A
policy matches when any of its permissions and any of its principals match; policies are tried in the order of their names, and the first that matches
names the decision. Without policies nothing matches: ALLOW then denies all, DENY allows all.

In place of policies there may be a match tree (api.match_tree), whose leaves say themselves whether to allow; what reaches none is denied.

What could make a policy weaker when ignored (CEL conditions, unknown matchers) is always an error, also where other unsupported fields only warn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from meshproxy.api import errors, match_inputs, match_tree, matchers, registry
from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.api.matchers import HASH, QUESTION_MARK
from meshproxy.api.uri_template import UriTemplate

if TYPE_CHECKING:
    from envoy.config.core.v3.address_pb2 import CidrRange
    from envoy.config.rbac.v3.rbac_pb2 import RBAC, Permission, Policy, Principal, SourcedMetadata
    from xds.type.matcher.v3.matcher_pb2 import Matcher

# What a predicate looks at: an observe.stream_info.StreamInfo, which this package may not import.
Predicate = Callable[[Any], bool]
Compiled = Predicate | bool  # a bool: the same for every stream

HONOURS = {
    "envoy.config.rbac.v3.RBAC": "action policies",
    "envoy.config.rbac.v3.Policy": "permissions principals",
    "envoy.config.rbac.v3.Permission": (
        "and_rules or_rules any header url_path destination_ip destination_port destination_port_range metadata not_rule requested_server_name "
        "uri_template sourced_metadata"
    ),
    "envoy.config.rbac.v3.Permission.Set": "rules",
    "envoy.config.rbac.v3.Principal": (
        "and_ids or_ids any authenticated source_ip direct_remote_ip remote_ip header url_path metadata filter_state not_id sourced_metadata custom"
    ),
    "envoy.config.rbac.v3.Principal.Set": "ids",
    "envoy.config.rbac.v3.Principal.Authenticated": "principal_name",
    "envoy.config.rbac.v3.SourcedMetadata": "metadata_matcher metadata_source",
    "envoy.type.v3.Int32Range": "start end",
    "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config": "san_matcher any_validated_client_certificate",
    "envoy.config.rbac.v3.Action": "name action",
    **match_tree.HONOURS,
}

ALLOW, DENY, LOG = range(3)  # envoy.config.rbac.v3.RBAC.Action


class Engine:
    """Compiled rules. `match(stream_info)` is the name of the first policy that matches, or None; what else there is to know of a match, methods say.

    `logs`: decisions are for the access log, too.
    `repeatable`: it answers the same for all requests of one connection whose heads are equal but for the request id.
    """

    __slots__ = ("action", "logs", "match", "policies", "repeatable")

    def __init__(self, action: int, policies: Sequence[tuple[str, Predicate]], *, repeatable: bool = False) -> None:
        self.action = action
        self.logs = action == LOG
        self.policies = tuple(policies)
        self.repeatable = repeatable
        self.match = _first_match(self.policies)

    def allowed(self, policy: str | None) -> bool:
        """Whether a stream whose `match` was `policy` may pass."""
        if self.action == LOG:
            return True
        return (policy is not None) == (self.action == ALLOW)

    def passing(self) -> list[Any]:
        """All that `match` can be for a stream that may pass. Not for LOG."""
        return [name for name, _ in self.policies] if self.action == ALLOW else [None]

    def name(self, policy: str | None) -> str | None:
        """The name that a match goes by, in stats, metadata and details."""
        return policy

    def hint(self, policy: str | None) -> bool | None:
        """What to tell the access log, where `logs`; None for nothing."""
        return policy is not None


class Action(NamedTuple):
    """A leaf of a match tree (envoy.config.rbac.v3.Action)."""

    name: str
    action: int


class TreeEngine:
    """A compiled match tree, as an Engine is used: here `match(stream_info)` is the Action reached, or None."""

    __slots__ = ("_actions", "logs", "match", "repeatable")

    def __init__(self, tree: match_tree.Tree, actions: Sequence[Action], *, repeatable: bool) -> None:
        self._actions = list(dict.fromkeys(actions))
        self.logs = any(action.action == LOG for action in actions)
        self.repeatable = repeatable

        def match(info: Any) -> Action | None:
            action: Action | None = tree(info)
            return None if action is match_tree.INSUFFICIENT else action

        self.match = match

    def allowed(self, action: Action | None) -> bool:
        """Whether a stream whose `match` was `action` may pass."""
        return action is not None and action.action != DENY

    def passing(self) -> list[Any]:
        """All that `match` can be for a stream that may pass."""
        return [action for action in self._actions if self.allowed(action)]

    def name(self, action: Action | None) -> str | None:
        """The name that a match goes by, in stats, metadata and details."""
        return None if action is None else action.name

    def hint(self, action: Action | None) -> bool | None:
        """What to tell the access log, where `logs`; None for nothing."""
        return None if action is None else action.action == LOG


def compile_rules(rules: RBAC, *, network: bool = False) -> Engine:
    """Compile an envoy.config.rbac.v3.RBAC. `network`: for the network filter, which has no headers to match. Raises ConfigError."""
    found = errors.Collector()
    policies: list[tuple[str, Predicate]] = []
    for name in sorted(rules.policies):
        with found.under(f'policies["{name}"]'):
            predicate = _compile_policy(rules.policies[name], network)
            if predicate is True:
                policies.append((name, _always))
            elif predicate is not False:
                policies.append((name, predicate))
    found.raise_any()
    return Engine(rules.action, policies, repeatable=all(map(_repeatable, _rules_of(rules))))


def compile_tree(proto: Matcher, *, network: bool = False, counter: Callable[[str], Any] | None = None) -> TreeEngine:
    """Compile a match tree whose leaves are envoy.config.rbac.v3.Action. Raises ConfigError.

    `network`: for the network filter. `counter`: as match_tree.compile_tree takes it.
    """
    actions: list[Action] = []

    def leaf(packed: Any) -> Action:
        registry.module(packed.type_url, "RBAC action")
        proto = registry.unpack(packed)
        if not proto.name:
            errors.fail("name", "must not be empty")
        if proto.action not in (ALLOW, DENY, LOG):
            errors.fail("action", "is no action")
        actions.append(Action(proto.name, proto.action))
        return actions[-1]

    inputs, where = (match_inputs.CONNECTION, "the network RBAC filter") if network else (match_inputs.REQUEST, "the HTTP RBAC filter")
    tree, repeatable = match_tree.compile_tree(proto, inputs, leaf, where, counter)
    return TreeEngine(tree, actions, repeatable=repeatable)


def compile_either(
    proto: Any, rules: str, tree: str, found: errors.Collector, counter: Callable[[str], Any], *, network: bool = False
) -> Engine | TreeEngine | None:
    """The engine of a filter's proto that has `rules` and a match tree in the fields of these names; the tree goes before. None without either."""
    if proto.HasField(tree):
        with found.under(tree):
            return compile_tree(getattr(proto, tree), network=network, counter=counter)
    elif proto.HasField(rules):
        with found.under(rules):
            return compile_rules(getattr(proto, rules), network=network)
    return None


def _rules_of(rules: RBAC) -> Iterator[Any]:
    for policy in rules.policies.values():
        yield from policy.permissions
        yield from policy.principals


def _repeatable(rule: Any) -> bool:
    """Whether a permission or principal looks at the connection and at head fields only, request ids excepted."""
    kind = rule.WhichOneof("identifier" if "identifier" in rule.DESCRIPTOR.oneofs_by_name else "rule")
    value = getattr(rule, kind)
    if kind in ("and_rules", "or_rules"):
        return all(map(_repeatable, value.rules))
    if kind in ("and_ids", "or_ids"):
        return all(map(_repeatable, value.ids))
    if kind in ("not_rule", "not_id"):
        return _repeatable(value)
    if kind == "header":
        return bool(value.name.lower() != "x-request-id")
    return kind not in ("metadata", "sourced_metadata", "filter_state")


def response_details(policy: str | None) -> str:
    """Response code details (termination details for connections) of a denial by `policy`. White space would break the columns of access logs."""
    name = "none" if policy is None else "".join("_" if char.isspace() else char for char in policy)
    return f"rbac_access_denied_matched_policy[{name}]"


def _always(_: Any) -> bool:
    return True


def _first_match(policies: tuple[tuple[str, Predicate], ...]) -> Callable[[Any], str | None]:
    if not policies:
        return lambda _: None
    if len(policies) == 1:
        name, predicate = policies[0]
        return lambda info: name if predicate(info) else None

    def match(info: Any) -> str | None:
        for name, predicate in policies:
            if predicate(info):
                return name
        return None

    return match


def _compile_policy(policy: Policy, network: bool) -> Compiled:
    for field in ("condition", "checked_condition"):
        if policy.HasField(field):
            errors.fail(field, "CEL conditions are not supported", UNSUPPORTED)
    found = errors.Collector()
    permissions: Compiled = False
    principals: Compiled = False
    with found.under("permissions"):
        permissions = _any_of([_at(i, _permission, rule, network) for i, rule in enumerate(policy.permissions)])
    with found.under("principals"):
        principals = _any_of([_at(i, _principal, rule, network) for i, rule in enumerate(policy.principals)])
    found.raise_any()
    # Principals after permissions, as in Envoy: the path is cheaper to look at than certificates.
    return _all_of([permissions, principals])


def _at(index: int, compile: Callable[[Any, bool], Compiled], proto: Any, network: bool) -> Compiled:
    with errors.under(f"[{index}]"):
        return compile(proto, network)


# -- boolean algebra with constants removed --------------------------------------------------------------------------------------------------------------


def _all_of(parts: list[Compiled]) -> Compiled:
    predicates = [part for part in parts if part is not True]
    if False in predicates:
        return False
    if not predicates:
        return True
    first, *rest = predicates
    if not rest:
        return first
    if len(rest) == 1:
        second = rest[0]
        return lambda info: first(info) and second(info)  # type: ignore[operator]
    return lambda info: all(predicate(info) for predicate in predicates)  # type: ignore[operator]


def _any_of(parts: list[Compiled]) -> Compiled:
    predicates = [part for part in parts if part is not False]
    if True in predicates:
        return True
    if not predicates:
        return False
    if len(predicates) == 1:
        return predicates[0]
    return lambda info: any(predicate(info) for predicate in predicates)  # type: ignore[operator]


def _negate(part: Compiled) -> Compiled:
    return not part if isinstance(part, bool) else lambda info: not part(info)


# -- permissions and principals --------------------------------------------------------------------------------------------------------------------------


def _permission(rule: Permission, network: bool) -> Compiled:
    kind = rule.WhichOneof("rule")
    if kind is None:
        errors.fail("", "one kind of rule must be set")
    value = getattr(rule, kind)
    with errors.under(kind):
        match kind:
            case "and_rules":
                return _all_of([_at(i, _permission, part, network) for i, part in enumerate(_listed(value.rules, "rules"))])
            case "or_rules":
                return _any_of([_at(i, _permission, part, network) for i, part in enumerate(_listed(value.rules, "rules"))])
            case "not_rule":
                return _negate(_permission(value, network))
            case "destination_ip":
                return _address(value, lambda info: info.connection.local)
            case "destination_port":
                return _port(value, value + 1)
            case "destination_port_range":
                return _port_range(value)
            case "requested_server_name":
                return _server_name(value)
            case "uri_template":
                return _uri_template(value)
            case "matcher":
                errors.fail("", "permission matcher extensions are not supported", UNSUPPORTED)
        return _common(kind, value, network)


def _principal(rule: Principal, network: bool) -> Compiled:
    kind = rule.WhichOneof("identifier")
    if kind is None:
        errors.fail("", "one kind of principal must be set")
    value = getattr(rule, kind)
    with errors.under(kind):
        match kind:
            case "and_ids":
                return _all_of([_at(i, _principal, part, network) for i, part in enumerate(_listed(value.ids, "ids"))])
            case "or_ids":
                return _any_of([_at(i, _principal, part, network) for i, part in enumerate(_listed(value.ids, "ids"))])
            case "not_id":
                return _negate(_principal(value, network))
            case "authenticated":
                return _authenticated(matchers.compile_string(value.principal_name) if value.HasField("principal_name") else None)
            case "source_ip":
                return _address(value, lambda info: info.connection.remote)
            case "direct_remote_ip":
                return _address(value, lambda info: info.connection.direct_remote)
            case "remote_ip":
                return _address(value, lambda info: info.remote or info.connection.remote)
            case "filter_state":
                matches = matchers.compile_filter_state(value)
                return lambda info: matches(info.filter_state)
            case "custom":
                return _mtls_authenticated(value)
        return _common(kind, value, network)


def _common(kind: str, value: Any, network: bool) -> Compiled:
    """What permissions and principals have in common."""
    match kind:
        case "any":
            return True
        case "header":
            if network:
                errors.fail("", "a connection has no headers to match")
            header = matchers.compile_header(value)
            return lambda info: header(info.request)
        case "url_path":
            return _url_path(value, network)
        case "metadata":
            metadata = matchers.compile_metadata(value)
            return lambda info: metadata(info.metadata)
        case "sourced_metadata":
            return _sourced_metadata(value)
    raise ConfigError.at("", "is not supported", UNSUPPORTED)


def _url_path(proto: Any, network: bool) -> Compiled:
    if proto.WhichOneof("rule") is None:
        errors.fail("path", "must be set")
    with errors.under("path"):
        matches = matchers.compile_string(proto.path)
    if network:
        return False
    prefix = proto.path.prefix.encode()
    if prefix and not proto.path.ignore_case and QUESTION_MARK not in prefix and HASH not in prefix:
        # What follows the path plays no part then.
        return lambda info: info.request.path.startswith(prefix)

    def url_path(info: Any) -> bool:
        # As matchers.compile_path, without its call: this is most policies' whole cost.
        path = info.request.path
        return matches(matchers.strip_query(path) if QUESTION_MARK in path or HASH in path else path)

    return url_path


def _listed(parts: Sequence[Any], field: str) -> Sequence[Any]:
    if not parts:
        errors.fail(field, "at least one is needed")
    return parts


def _address(proto: CidrRange, address: Callable[[Any], Any]) -> Predicate:
    inside = matchers.compile_cidr([proto])
    return lambda info: inside(address(info))


def _port(start: int, end: int) -> Predicate:
    def matches(info: Any) -> bool:
        local = info.connection.local
        return local.kind == "ip" and start <= local.port < end

    return matches


def _port_range(proto: Any) -> Predicate:
    for field in ("start", "end"):
        if not 0 <= getattr(proto, field) <= 65536:
            errors.fail(field, "must be between 0 and 65536")
    if proto.start >= proto.end:
        errors.fail("", f"range start {proto.start} must be less than range end {proto.end}")
    return _port(proto.start, proto.end)


def _server_name(proto: Any) -> Predicate:
    matches = matchers.compile_string(proto)
    return lambda info: matches((info.connection.server_name or "").encode())


def _uri_template(extension: Any) -> Predicate:
    with errors.under("typed_config"):
        registry.module(extension.typed_config.type_url, "path match")
        template = UriTemplate(registry.unpack(extension.typed_config).path_template)
    return lambda info: info.request is not None and template.matches(matchers.strip_query(info.request.path))


def _sourced_metadata(proto: SourcedMetadata) -> Predicate:
    matches = matchers.compile_metadata(proto.metadata_matcher)
    if proto.metadata_source == 0:  # DYNAMIC
        return lambda info: matches(info.metadata)
    return lambda info: info.route is not None and matches(info.route.metadata or {})


def _authenticated(name: Callable[[bytes], bool] | None) -> Predicate:
    if name is None:
        return lambda info: info.connection.tls is not None

    def matches(info: Any) -> bool:
        tls = info.connection.tls
        if tls is None:
            return False
        certificate = tls.peer_certificate
        if certificate is None:
            return name(b"")
        # Whole names, so that a NUL in a SAN cannot cut an identity short.
        return any(name(san.encode()) for san in (*certificate.uri_sans, *certificate.dns_sans)) or name(certificate.subject.encode())

    return matches


def _mtls_authenticated(extension: Any) -> Predicate:
    """envoy.extensions.rbac.principals.mtls_authenticated.v3.Config: a certificate that was validated, and a SAN that matches."""
    with errors.under("typed_config"):
        proto = registry.unpack(extension.typed_config)
        if proto.DESCRIPTOR.full_name != "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config":
            errors.fail("", f"{proto.DESCRIPTOR.full_name} is not supported as principal", UNSUPPORTED)
        if not proto.HasField("san_matcher"):
            if not proto.any_validated_client_certificate:
                errors.fail("", "one of san_matcher and any_validated_client_certificate is needed")
            # Who presents nothing is not somebody who was validated.
            return lambda info: bool((tls := info.connection.tls) and tls.validated and tls.peer_certificate is not None)
        if proto.any_validated_client_certificate:
            errors.fail("any_validated_client_certificate", "must not be set together with san_matcher")
        from meshproxy.api.san import compile_san

        name = compile_san(proto.san_matcher, "san_matcher")

    def matches(info: Any) -> bool:
        tls = info.connection.tls
        return tls is not None and bool(tls.validated) and tls.peer_certificate is not None and name(tls.peer_certificate)

    return matches
