"""Routing of requests: what VirtualService, HTTPRoute and GRPCRoute say, in one form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from control.names import MESH


@dataclass(frozen=True, slots=True, eq=False)
class StringMatch:
    """`kind` is exact, prefix, regex or present."""

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class PathMatch:
    """`kind` is exact, prefix (of the text), path_prefix (of whole segments) or regex."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class RouteMatch:
    """All of these must hold. `source_labels`, `source_namespace` and `port` select the proxies and ports that get the route at all."""

    name: str = ""
    path: PathMatch | None = None
    ignore_case: bool = False
    method: StringMatch | None = None
    authority: StringMatch | None = None
    scheme: StringMatch | None = None
    headers: Mapping[str, StringMatch] = field(default_factory=dict)
    without_headers: Mapping[str, StringMatch] = field(default_factory=dict)
    query: Mapping[str, StringMatch] = field(default_factory=dict)
    port: int = 0
    source_labels: Mapping[str, str] = field(default_factory=dict)
    source_namespace: str = ""
    gateways: tuple[str, ...] = ()  # only for these, `mesh` being all sidecars; none: those of the rules
    stat_prefix: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class HeaderOperations:
    """Changes of headers, of requests or of responses."""

    set: Mapping[str, str] = field(default_factory=dict)
    add: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()


NO_HEADERS = HeaderOperations()


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """A service, one of its subsets, and a port; port 0 is the only one, or that of the request. Without a host, it is none that there is.

    `foreign`: namespace and name of a Service that the rules may only refer to if it is granted there.
    """

    host: str
    subset: str = ""
    port: int = 0
    foreign: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WeightedDestination:
    destination: Destination
    weight: int = 0
    request_headers: HeaderOperations = NO_HEADERS
    response_headers: HeaderOperations = NO_HEADERS


@dataclass(frozen=True, slots=True, eq=False)
class Retries:
    """attempts 0 turns retries off; an empty `retry_on` is the default's."""

    attempts: int
    retry_on: str = ""
    per_try_timeout_s: float | None = None
    backoff_s: float | None = None
    status_codes: tuple[int, ...] = ()
    ignore_previous_hosts: bool | None = None
    remote_localities: bool = False  # a retry goes elsewhere than the tries before it


@dataclass(frozen=True, slots=True, eq=False)
class Fault:
    """Percentages are 0 to 100; what a document leaves out is 0. `grpc_status` is a code's name, such as UNAVAILABLE."""

    delay_s: float | None = None
    delay_percent: float = 0.0
    http_status: int = 0
    grpc_status: str = ""
    abort_percent: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Mirror:
    destination: Destination
    percent: float = 100.0


@dataclass(frozen=True, slots=True, eq=False)
class Rewrite:
    """`prefix` replaces what the path matched; `path` the whole path; `regex` is pattern and substitution."""

    prefix: str = ""
    path: str = ""
    authority: str = ""
    regex: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Redirect:
    path: str = ""
    prefix: str = ""
    authority: str = ""
    scheme: str = ""
    port: int = 0
    request_port: bool = False  # the port of the request is repeated
    code: int = 301


@dataclass(frozen=True, slots=True, eq=False)
class DirectResponse:
    status: int
    body: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class Cors:
    origins: tuple[StringMatch, ...] = ()
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    max_age_s: float | None = None
    credentials: bool | None = None
    forward_unmatched: bool = True

    @property
    def repeats(self) -> bool:
        """Whether preflights are told what they asked for, since browsers take no `*` where there are credentials."""
        return bool(self.credentials) and "*" in (*self.methods, *self.headers)


@dataclass(frozen=True, slots=True, eq=False)
class HttpRoute:
    """One rule: where any of `matches` holds (all requests when there are none), do this. `delegate`: namespace and name of the rules that say what to do."""

    name: str = ""
    matches: tuple[RouteMatch, ...] = ()
    destinations: tuple[WeightedDestination, ...] = ()
    redirect: Redirect | None = None
    direct_response: DirectResponse | None = None
    rewrite: Rewrite | None = None
    timeout_s: float | None = None
    retries: Retries | None = None
    fault: Fault | None = None
    mirrors: tuple[Mirror, ...] = ()
    cors: Cors | None = None
    request_headers: HeaderOperations = NO_HEADERS
    response_headers: HeaderOperations = NO_HEADERS
    delegate: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TcpRoute:
    """Connections to `port` (0: any), to addresses in `subnets` (none: any), go to these."""

    destinations: tuple[WeightedDestination, ...]
    port: int = 0
    source_labels: Mapping[str, str] = field(default_factory=dict)
    source_namespace: str = ""
    gateways: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TlsRoute:
    """Connections whose ClientHello names one of `sni_hosts`, to addresses in `subnets` (none: any), go to these, as they are."""

    destinations: tuple[WeightedDestination, ...]
    sni_hosts: tuple[str, ...]
    port: int = 0
    source_labels: Mapping[str, str] = field(default_factory=dict)
    source_namespace: str = ""
    gateways: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RouteRules:
    """What a VirtualService or a route of the Gateway API says about requests to `hosts`.

    Without hosts, others may delegate to it.
    `ports` limits it to some ports of the service (a parentRef's port); `gateway_api` are the semantics of that API where they differ from Istio's.
    """

    name: str
    namespace: str
    hosts: tuple[str, ...]
    http: tuple[HttpRoute, ...] = ()
    tcp: tuple[TcpRoute, ...] = ()
    tls: tuple[TlsRoute, ...] = ()
    ports: tuple[int, ...] = ()
    gateway_api: bool = False
    gateways: tuple[str, ...] = (MESH,)  # `mesh`, or `namespace/name`
    section: str = ""  # only for the gateways' server of this name
    kind: str = ""  # of the document, where gateways limit that
    export_to: tuple[str, ...] = ("*",)
    created: str = ""  # in RFC 3339; of routes of the Gateway API that say the same, the oldest counts

    @property
    def is_of_mesh(self) -> bool:
        """Whether it is about what sidecars send, and nothing else."""
        return self.gateways == (MESH,)

    def destinations(self) -> set[str]:
        """All hosts that requests and connections are sent to."""
        return {one.host for one in self.all_destinations() if one.host}

    def all_destinations(self) -> Iterator[Destination]:
        """Where requests and connections are sent."""
        for rule in self.http:
            yield from (one.destination for one in rule.destinations)
            yield from (one.destination for one in rule.mirrors)
        for some in [*(one.destinations for one in self.tcp), *(one.destinations for one in self.tls)]:
            yield from (one.destination for one in some)
