"""Who may speak to whom, and how connections are secured."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

ROOT_NAMESPACE = "istio-system"  # policies without a selector there are for the whole mesh
DEFAULT_TRUST_DOMAIN = "cluster.local"


class Mtls(Enum):
    """What a port takes: PERMISSIVE is both."""

    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


@dataclass(frozen=True, slots=True, eq=False)
class PeerAuthentication:
    """What workloads take. `mode` None: what the policy around it says. `ports` are those of the application, and only with a selector.

    `stands_in`: in place of a wrong document, what it does (see `kinds.closed`). Its `selector` is empty where nobody can tell whom it is for: it is then for
    every workload of its namespace, before those that name some, and in the root namespace for the mesh as well.
    """

    name: str
    namespace: str
    selector: Mapping[str, str] | None = None
    mode: Mtls | None = None
    ports: Mapping[int, Mtls | None] = field(default_factory=dict)
    stands_in: str = ""


def mtls_mode(policies: Iterable[PeerAuthentication], namespace: str, labels: Mapping[str, str], port: int, root: str = ROOT_NAMESPACE) -> Mtls:
    """What a port of a workload takes: as the policy for the workload says, else that of its namespace, else that of the mesh (namespace `root`), else both."""
    narrowest: dict[str, PeerAuthentication] = {}
    for one in sorted(policies, key=lambda one: not one.stands_in):  # of those for the same, what stands in for one goes before the first of the others
        if one.namespace == namespace and one.selector is not None:
            if one.selector.items() <= labels.items():
                narrowest.setdefault("workload", one)
        elif one.selector is None and one.namespace == namespace:
            narrowest.setdefault("namespace", one)
        if not one.selector and one.namespace == root:
            narrowest.setdefault("mesh", one)
    workload = narrowest.get("workload")
    candidates = [workload.ports.get(port), workload.mode] if workload is not None else []
    candidates += [narrowest[where].mode for where in ("namespace", "mesh") if where in narrowest]
    return next((mode for mode in candidates if mode is not None), Mtls.PERMISSIVE)


def spiffe_id(trust_domain: str, namespace: str, service_account: str) -> str:
    """The identity of a workload."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Who asks: all that is set must hold, and of each one value. The `not_` fields must not hold."""

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    service_accounts: tuple[str, ...] = ()  # `namespace/name`
    not_service_accounts: tuple[str, ...] = ()
    ip_blocks: tuple[str, ...] = ()
    not_ip_blocks: tuple[str, ...] = ()
    remote_ip_blocks: tuple[str, ...] = ()
    not_remote_ip_blocks: tuple[str, ...] = ()
    request_principals: tuple[str, ...] = ()  # `issuer/subject` of the request's token
    not_request_principals: tuple[str, ...] = ()

    @property
    def is_http(self) -> bool:
        """Whether plain connections cannot have it."""
        return bool(self.request_principals or self.not_request_principals)


ANY_SEGMENT, ANY_REST = "{*}", "{**}"  # in paths


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """What is asked, in the same way."""

    hosts: tuple[str, ...] = ()
    not_hosts: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    not_ports: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    not_methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    not_paths: tuple[str, ...] = ()

    @property
    def is_http(self) -> bool:
        """Whether plain connections cannot have it."""
        return bool(self.hosts or self.not_hosts or self.methods or self.not_methods or self.paths or self.not_paths)


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A key such as `request.headers[x-user]`, and what its value must be, or must not."""

    key: str
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()

    @property
    def is_http(self) -> bool:
        return self.key.startswith("request.")


@dataclass(frozen=True, slots=True, eq=False)
class AccessRule:
    """One of `sources` (any, without some), one of `operations`, and all of `conditions`."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    conditions: tuple[Condition, ...] = ()


def _is_for(policy: AuthorizationPolicy | RequestAuthentication, namespace: str, labels: Mapping[str, str], serves: Container[str], root: str) -> bool:
    """Whether a policy is for a workload in `namespace` that serves some Gateways; one with targets is for whoever serves these."""
    if policy.targets:
        return any(f"{policy.namespace}/{name}" in serves for name in policy.targets)
    return policy.namespace in (namespace, root) and (policy.selector is None or policy.selector.items() <= labels.items())


@dataclass(frozen=True, slots=True)
class Authorizer:
    """An authorisation service that policies with the action CUSTOM name: asked by HTTP, or else by gRPC.

    `body`: bytes of the request's body that it gets, whether their beginning is enough, and whether they are bytes rather than text. Names of headers may
    begin or end with a star; `headers` are those of requests that it gets, `added` what it gets besides; `upstream`, `refused` and `allowed` are of its
    answer: what goes into a request that it lets pass, into the answer to one that it does not, and into the response to one that it does.
    """

    name: str
    host: str
    port: int
    http: bool
    timeout_s: float
    fail_open: bool = False
    status_on_error: int = 0  # 0: the proxy's default
    clears_route: bool = False
    body: tuple[int, bool, bool] | None = None
    path_prefix: str = ""
    headers: tuple[str, ...] = ()
    added: tuple[tuple[str, str], ...] = ()
    upstream: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class AuthorizationPolicy:
    """`action` is ALLOW, DENY, AUDIT or CUSTOM, which leaves the decision to the Authorizer `provider`. An ALLOW without rules allows nothing. `targets`: names
    of Gateways. `dry_run`: it is only counted what it would do. `stands_in`: see PeerAuthentication.
    """

    name: str
    namespace: str
    action: str
    rules: tuple[AccessRule, ...]
    selector: Mapping[str, str] | None = None
    targets: tuple[str, ...] = ()
    dry_run: bool = False
    provider: str = ""
    stands_in: str = ""

    def is_for(self, namespace: str, labels: Mapping[str, str], serves: Container[str] = (), root: str = ROOT_NAMESPACE) -> bool:
        """Whether a workload is meant; `serves`: the keys of its Gateways. What is in `root` is for all namespaces."""
        return _is_for(self, namespace, labels, serves, root)


def _under_all_names(principal: str, names: tuple[str, ...]) -> list[str]:
    """A principal, which may begin with a star and the end of a trust domain's name."""
    said, slash, rest = principal.partition("/")
    if not slash or said == "*":
        return [principal]
    if said.startswith("*"):
        others = [one for one in names if not one.endswith(said[1:])]
        return [principal, *(f"{one}/{rest}" for one in others if len(others) < len(names))]
    return [f"{one}/{rest}" for one in names] if said in (*names, DEFAULT_TRUST_DOMAIN) else [principal]


@functools.lru_cache(10_000)
def under_all_names(policy: AuthorizationPolicy, trust_domain: str, aliases: tuple[str, ...] = (), *, closing: bool = False) -> AuthorizationPolicy:
    """The policy where a principal of the trust domain, or of an alias, is that of all of them; the same object for the same arguments. DEFAULT_TRUST_DOMAIN
    stands for the trust domain, whatever its name, as in Istio.

    `closing`: only where that lets nobody in whom the policy does not let in as it is.
    """
    names = (trust_domain, *aliases)
    wanted, unwanted = not closing or policy.action != "ALLOW", not closing or policy.action == "ALLOW"

    def each(principals: tuple[str, ...], so: bool) -> tuple[str, ...]:
        if not so:
            return principals
        return tuple(dict.fromkeys(name for one in principals for name in _under_all_names(one, names)))

    def of_rule(rule: AccessRule) -> AccessRule:
        sources = tuple(replace(one, principals=each(one.principals, wanted), not_principals=each(one.not_principals, unwanted)) for one in rule.sources)
        conditions = tuple(
            Condition(one.key, each(one.values, wanted), each(one.not_values, unwanted)) if one.key == "source.principal" else one for one in rule.conditions
        )
        return replace(rule, sources=sources, conditions=conditions)

    return replace(policy, rules=tuple(map(of_rule, policy.rules)))


NO_KEYS = "no-keys.invalid"  # a host that is never there (RFC 6761): keys that cannot be fetched verify nothing


class KeySource(NamedTuple):
    """Where keys are: at a URI, or, without one, where their issuer says when it is asked."""

    issuer: str
    uri: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class JwtRule:
    """Tokens of one issuer: where they stand, which keys they are signed with (`jwks`, what is at `jwks_uri`, or else what the issuer says), and what becomes
    of them.

    `keys_at`: host and port of `jwks_uri`; a name without dots is a Service of the policy's namespace. Headers are pairs: name and prefix in `from_headers`,
    name and claim in `claim_headers`. `timeout`: seconds for fetching keys.
    """

    issuer: str
    audiences: tuple[str, ...] = ()
    jwks: str = ""
    jwks_uri: str = ""
    keys_at: tuple[str, int] = ("", 0)
    from_headers: tuple[tuple[str, str], ...] = ()
    from_params: tuple[str, ...] = ()
    from_cookies: tuple[str, ...] = ()
    payload_header: str = ""
    claim_headers: tuple[tuple[str, str], ...] = ()
    forward: bool = False
    timeout: float = 5.0
    space_delimited: tuple[str, ...] = ()

    @property
    def source(self) -> KeySource | None:
        """Where its keys are, if it does not hold them."""
        return None if self.jwks else KeySource(self.issuer, self.jwks_uri)


@dataclass(frozen=True, slots=True, eq=False)
class RequestAuthentication:
    """Which tokens requests may bring. A request without one passes: who needs one, says an AuthorizationPolicy. `stands_in`: see PeerAuthentication."""

    name: str
    namespace: str
    rules: tuple[JwtRule, ...]
    selector: Mapping[str, str] | None = None
    targets: tuple[str, ...] = ()
    stands_in: str = ""

    def is_for(self, namespace: str, labels: Mapping[str, str], serves: Container[str] = (), root: str = ROOT_NAMESPACE) -> bool:
        """Whether a workload is meant; `serves`: the keys of its Gateways. What is in `root` is for all namespaces."""
        return _is_for(self, namespace, labels, serves, root)


def jwt_rules(
    policies: Iterable[RequestAuthentication], namespace: str, labels: Mapping[str, str], serves: Container[str] = (), root: str = ROOT_NAMESPACE
) -> tuple[JwtRule, ...]:
    """The rules of all policies for a workload together, in the order of their issuers, as in Istio."""
    found = [rule for one in policies if one.is_for(namespace, labels, serves, root) for rule in one.rules]
    return tuple(sorted(found, key=lambda rule: rule.issuer))
