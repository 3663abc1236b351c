"""Route tables: from a request to its route. `RouteTable` finds the virtual host, `VirtualHost` the route.

A host is looked up as Envoy does: exactly, then by the longest `*suffix`, then by the longest `prefix*`, then `*`. Exactly one virtual host is asked; when
none of its routes matches there is no route. Answers that took more than one look are remembered by host, so the hot path is one or two dictionary
look-ups and the virtual host's match.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshproxy.api import datasource, matchers, runtime
from meshproxy.api.errors import Collector, join, under
from meshproxy.api.metadata import metadata_dict
from meshproxy.http import (
    filter_overrides,
    hash_policy,
    header_mutations,
    mirror_policy,
    rate_limits,
    retry,
    route,
    route_match,
    route_replies,
    route_rewrite,
    virtual_clusters,
    virtual_host,
    weighted_clusters,
)
from meshproxy.http.filter_overrides import FilterOverride, compile_overrides
from meshproxy.http.mirror_policy import MirrorPolicy, compile_mirrors
from meshproxy.http.route import Route
from meshproxy.http.virtual_host import VirtualHost

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_components_pb2, route_pb2

    from meshproxy.context import Context
    from meshproxy.observe.stream_info import StreamInfo

__all__ = ["FilterOverride", "Route", "RouteTable", "VirtualHost"]

HONOURS = {
    "envoy.config.route.v3.RouteConfiguration": (
        "name virtual_hosts internal_only_headers response_headers_to_add response_headers_to_remove request_headers_to_add request_headers_to_remove"
        " most_specific_header_mutations_wins validate_clusters max_direct_response_body_size_bytes request_mirror_policies ignore_port_in_host_matching"
        " vhost_header ignore_path_parameters_in_path_matching typed_per_filter_config metadata vhds"
    ),
    "envoy.config.route.v3.Vhds": "config_source",
    **datasource.HONOURS,
    **matchers.HONOURS,
    **{name: fields for name, fields in runtime.HONOURS.items() if "Fraction" in name},
    **filter_overrides.HONOURS,
    **hash_policy.HONOURS,
    **header_mutations.HONOURS,
    **mirror_policy.HONOURS,
    **rate_limits.HONOURS,
    **retry.HONOURS,
    **route.HONOURS,
    **route_match.HONOURS,
    **route_replies.HONOURS,
    **route_rewrite.HONOURS,
    **virtual_clusters.HONOURS,
    **virtual_host.HONOURS,
    **weighted_clusters.HONOURS,
}

_MEMO_SIZE = 4096  # hosts whose virtual host is remembered


class RouteTable:
    """A compiled `RouteConfiguration`. Made whole by one update and replaced by the next; routes refer to it through their virtual host.

    Virtual hosts and routes are compiled when first needed: `check` compiles everything, to find what is wrong before a table is used.
    """

    __slots__ = (
        "_as_configured",
        "_default",
        "_exact",
        "_hosts",
        "_key",
        "_memo",
        "_prefixes",
        "_suffixes",
        "context",
        "filter_configs",
        "ignore_path_parameters",
        "insert_original",
        "max_direct_response_body",
        "metadata",
        "mirrors",
        "most_specific_wins",
        "name",
        "request_mutation",
        "response_mutation",
        "vhost_header",
    )

    def __init__(self, proto: route_pb2.RouteConfiguration, context: Context, *, insert_original: bool = True) -> None:
        """`insert_original`: rewrites leave `x-envoy-original-path` and `-host`; false with the router's `suppress_envoy_headers`.

        Raises ConfigError for what concerns the whole table: domains, its own header mutations, mirror policies and filter configurations.
        """
        self.context = context
        self.insert_original = insert_original
        self.name = proto.name
        self.most_specific_wins = proto.most_specific_header_mutations_wins
        self.ignore_path_parameters = proto.ignore_path_parameters_in_path_matching
        limit = proto.max_direct_response_body_size_bytes
        self.max_direct_response_body = limit.value if proto.HasField("max_direct_response_body_size_bytes") else route_replies.DEFAULT_MAX_BODY
        self.metadata: dict[str, Any] = metadata_dict(proto.metadata)
        self.filter_configs: dict[str, FilterOverride] = compile_overrides(proto.typed_per_filter_config)
        self.request_mutation = header_mutations.compile_mutation(
            proto.request_headers_to_add, proto.request_headers_to_remove, "request_headers", request=True
        )
        self.response_mutation = header_mutations.compile_mutation(
            proto.response_headers_to_add, proto.response_headers_to_remove, "response_headers", request=False
        )
        self.mirrors: tuple[MirrorPolicy, ...] = compile_mirrors(proto.request_mirror_policies, context)
        self.vhost_header = proto.vhost_header.lower().encode()
        self._hosts = [VirtualHost(one, self) for one in proto.virtual_hosts]
        self._index_domains()
        strip_port = proto.ignore_port_in_host_matching
        self._key: Callable[[bytes], bytes] = _without_port if strip_port else bytes.lower
        # A host that is as it was configured needs no other look: nothing goes before an exact match.
        self._as_configured = {} if strip_port else self._exact
        self._memo: dict[bytes, VirtualHost] = {}

    def _index_domains(self) -> None:
        self._default: VirtualHost | None = None
        self._exact: dict[bytes, VirtualHost] = {}
        suffixes: dict[int, dict[bytes, VirtualHost]] = {}
        prefixes: dict[int, dict[bytes, VirtualHost]] = {}
        problems = Collector()
        for index, host in enumerate(self._hosts):
            for position, text in enumerate(host.domains):
                domain = text.lower().encode()
                where = f"virtual_hosts[{index}].domains[{position}]"
                if domain == b"*":
                    if self._default is not None:
                        problems.add(where, f"Only a single wildcard domain is permitted in route {self.name}")
                    self._default = host
                    continue
                if domain.startswith(b"*"):
                    table, key = suffixes.setdefault(len(domain) - 1, {}), domain[1:]
                elif domain.endswith(b"*"):
                    table, key = prefixes.setdefault(len(domain) - 1, {}), domain[:-1]
                else:
                    table, key = self._exact, domain
                if key in table:
                    problems.add(where, f"Only unique values for domains are permitted. Duplicate entry of domain {text.lower()} in route {self.name}")
                table[key] = host
        problems.raise_any()
        # Longest first: the more a wildcard says, the better it fits.
        self._suffixes = sorted(suffixes.items(), reverse=True)
        self._prefixes = sorted(prefixes.items(), reverse=True)

    # -- matching (hot)

    def match(self, stream: StreamInfo) -> Route | None:
        """The route of `stream.request`, or None. The same stream gets the same answer as long as its head and metadata stay the same."""
        if self.vhost_header:
            return self._match_by_header(stream)
        name = stream.request.authority  # type: ignore[union-attr]
        host = self._as_configured.get(name) or self._memo.get(name) or self._find(name)
        return None if host is None else host.match(stream)

    def virtual_host(self, authority: bytes) -> VirtualHost | None:
        """That of all requests to a host; None also where it depends on more."""
        if self.vhost_header:
            return None
        return self._as_configured.get(authority) or self._memo.get(authority) or self._find(authority)

    def _match_by_header(self, stream: StreamInfo) -> Route | None:
        """`vhost_header`: a header takes the place of the host."""
        assert stream.request is not None
        name = stream.request.get(self.vhost_header)
        host = self._find(name) if name is not None else None
        return None if host is None else host.match(stream)

    def _find(self, name: bytes) -> VirtualHost | None:
        """The virtual host for a host, remembered."""
        host = self._look_up(self._key(name))
        if host is not None:
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            self._memo[name] = host
        return host

    def _look_up(self, name: bytes) -> VirtualHost | None:
        if not (self._exact or self._suffixes or self._prefixes):
            return self._default
        if not name:
            return None
        found = self._exact.get(name)
        if found is not None:
            return found
        size = len(name)
        for length, table in self._suffixes:
            # The wildcard stands for at least one character.
            if length < size and (found := table.get(name[size - length :])) is not None:
                return found
        for length, table in self._prefixes:
            if length < size and (found := table.get(name[:length])) is not None:
                return found
        return self._default

    # -- the whole

    def check(self, also: Callable[[Route], object] | None = None) -> None:
        """Compile every virtual host and route, and keep nothing; call `also` with each route, for what others compile of it.

        Of virtual hosts that differ only in names, domains (whose mistakes the table itself finds) and clusters the first one is compiled, at about 50 us a
        route. Raises a ConfigError with all problems.
        """
        problems = Collector()
        good: set[bytes] = set()
        for index, host in enumerate(self._hosts):
            kind = _without_names(host.proto)
            if kind not in good:
                with problems.under(f"virtual_hosts[{index}]"):
                    VirtualHost(host.proto, self).check(also)
                    good.add(kind)
        problems.raise_any()

    def errors_under(self, host: VirtualHost, path: str = "") -> under:
        """Complete the paths of errors in a virtual host."""
        return under(lambda: join(f"virtual_hosts[{self._hosts.index(host)}]", path))

    def __repr__(self) -> str:
        return f"<RouteTable {self.name}, {len(self._hosts)} virtual hosts>"


def _without_names(proto: route_components_pb2.VirtualHost) -> bytes:
    """What virtual hosts must have in common for one of them to stand for all when they are checked."""
    kind = type(proto)()
    kind.CopyFrom(proto)
    kind.ClearField("name")
    kind.ClearField("domains")
    for one in kind.routes:
        one.ClearField("name")
        if one.route.cluster:
            one.route.cluster = "any"
    return kind.SerializeToString(deterministic=True)


def _without_port(name: bytes) -> bytes:
    """A host in lower case without its port; brackets belong to an IPv6 address."""
    name = name.lower()
    colon = name.rfind(b":")
    return name if colon < 0 or colon < name.rfind(b"]") else name[:colon]
