"""Tags: the parts of a stat's name that tell instances of the same stat apart, and what `stats_config` says about names.

`cluster.foo.upstream_rq_503` is the stat `cluster.upstream_rq` with the tags `envoy.cluster_name=foo` and `envoy.response_code=503`. Which parts are tags is
decided by Envoy's well-known patterns, by patterns of the configuration, or both.

Source: envoy.config.metrics.v3.StatsConfig; source/common/config/well_known_names in Envoy for the patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from meshproxy.api import matchers
from meshproxy.api.errors import fail, under
from meshproxy.observe.histogram import DEFAULT_BUCKETS

if TYPE_CHECKING:
    from envoy.config.metrics.v3 import stats_pb2

HONOURS = {
    "envoy.config.metrics.v3.StatsConfig": "stats_tags use_all_default_tags stats_matcher histogram_bucket_settings",
    "envoy.config.metrics.v3.TagSpecifier": "tag_name regex fixed_value",
    "envoy.config.metrics.v3.StatsMatcher": "reject_all exclusion_list inclusion_list",
    "envoy.config.metrics.v3.HistogramBucketSettings": "match buckets bins",
    "envoy.type.matcher.v3.ListStringMatcher": "patterns",
}

Tag = tuple[str, str]
# The tag's value and which part of the name goes, or None.
Extract = Callable[[str], tuple[str, int, int] | None]
_Extractor = tuple[str, str, Extract]  # tag, a text that every matching name contains, how to get it

_VALUE = r"[^\.]+"
_ADDRESS = r"(?:(?:\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[[_a-fA-F\d]+\])_\d+)"
_NAMED = r"(?:listener|cluster)\..*?"
_ROUTES = r"[\w\-\.]+"

# Tag, pattern, a text that every matching name contains, a value that does not count. The first group of a pattern is what goes, the second the value.
_PATTERNS: tuple[tuple[str, str, str, str], ...] = (
    ("envoy.response_code", r"_rq(_(\d{3}))$", "_rq_", ""),
    ("envoy.response_code_class", r"_rq_((\d))xx$", "_rq_", ""),
    ("envoy.ssl_cipher", r"^listener\..*?\.ssl\.ciphers(\.([\w-]+))$", ".ssl.ciphers.", ""),
    ("envoy.ssl_curve", rf"^{_NAMED}\.ssl\.curves(\.([\w-]+))$", ".ssl.curves.", ""),
    ("envoy.ssl_sigalg", rf"^{_NAMED}\.ssl\.sigalgs(\.([\w-]+))$", ".ssl.sigalgs.", ""),
    ("envoy.ssl_version", rf"^{_NAMED}\.ssl\.versions(\.(TLSv\d\.\d))$", ".ssl.versions.", ""),
    ("envoy.ssl_cipher_suite", rf"^cluster\.{_VALUE}\.ssl\.ciphers(\.([\w-]+))$", ".ssl.ciphers.", ""),
    ("envoy.tls_certificate", rf"^{_NAMED}\.ssl\.certificate\.(({_VALUE})\.).*$", ".ssl.certificate", ""),
    ("envoy.health_check_name", rf"^cluster\.{_VALUE}\.health_check(\.name\.({_VALUE}))\..+", ".health_check.", ""),
    ("envoy.http_conn_manager_prefix", rf"^listener\..*?\.http\.(({_VALUE})\.)", ".http.", ""),
    (
        "envoy.worker_id",
        rf"^(?:listener\.(?:{_ADDRESS}|{_VALUE})|server|listener_manager|thread_local_cluster_manager)\.worker_((\d+)\.)",
        "worker_",
        "",
    ),
    ("envoy.listener_address", rf"^listener\.(({_ADDRESS}|{_VALUE})\.)", "", "admin"),
    ("envoy.rds_route_config", rf"^http\.{_VALUE}\.rds\.(({_ROUTES})\.)\w+?$", ".rds.", ""),
    ("envoy.scoped_rds_config", rf"^http\.{_VALUE}\.scoped_rds\.(({_ROUTES})\.)\w+?$", ".scoped_rds.", ""),
    ("envoy.rbac_http_prefix", rf"^http\.{_VALUE}\.rbac\.(({_VALUE})\.).*?", "", "policy"),
    (
        "envoy.rbac_policy_name",
        rf"^http\.{_VALUE}\.rbac\.(?:{_VALUE}\.)?policy\.(({_VALUE})\.)(allowed|shadow_allowed|denied|shadow_denied)$",
        "",
        "",
    ),
    ("envoy.proxy_protocol_prefix", rf"^proxy_proto\.(({_VALUE})\.).+$", "proxy_proto", "versions"),
    ("envoy.proxy_protocol_version", rf"^proxy_proto\.((?:{_VALUE}\.)?versions\.v(\d)\.)\w+$", "proxy_proto", ""),
    ("envoy.xds_resource_name", rf"^sds\.(({_VALUE})\.).+", "sds.", ""),
)

# Tag and pattern of dot-separated parts: `$` is the tag, `*` any part, `**` any number of them.
_TOKENS: tuple[tuple[str, str], ...] = (
    ("envoy.grpc_bridge_method", "cluster.*.grpc.*.$.**"),
    ("envoy.http_user_agent", "http.*.user_agent.$.**"),
    ("envoy.virtual_cluster", "vhost.*.vcluster.$.**"),
    ("envoy.fault_downstream_cluster", "http.*.fault.$.**"),
    ("envoy.grpc_bridge_service", "cluster.*.grpc.$.**"),
    ("envoy.tcp_prefix", "tcp.$.**"),
    ("envoy.ratelimit_prefix", "ratelimit.$.**"),
    ("envoy.cluster_name", "cluster.$.**"),
    ("envoy.ext_authz_prefix", "cluster.*.ext_authz.$.**"),
    ("envoy.ext_authz_prefix", "http.*.ext_authz.$.**"),
    ("envoy.http_conn_manager_prefix", "http.$.**"),
    ("envoy.virtual_host", "vhost.$.**"),
    ("envoy.route", "vhost.*.route.$.**"),
    ("envoy.local_http_ratelimit_prefix", "$.http_local_rate_limit.**"),
    ("envoy.local_network_ratelimit_prefix", "local_rate_limit.$.**"),
    ("envoy.local_listener_ratelimit_prefix", "listener_local_ratelimit.$.**"),
    ("envoy.connection_limit_prefix", "connection_limit.$.**"),
    ("envoy.rbac_prefix", "$.rbac.**"),
)


_CLUSTER = "envoy.cluster_name"
_CACHE_LIMIT = 4096
_LITERAL_START = re.compile(r"\^(\w+)\\\.")


class StatsConfig:
    """`stats_config` of a bootstrap, compiled: which names exist, their tags, and histogram buckets."""

    def __init__(self, proto: stats_pb2.StatsConfig | None = None, fixed: Iterable[Tag] = ()) -> None:
        """`fixed`: tags that every stat has, besides those that `proto` says."""
        self.accepts: Callable[[str], bool] | None = None if proto is None else _compile_matcher(proto)
        self._buckets: list[tuple[Callable[[bytes], bool], tuple[float, ...]]] = []
        # Envoy first tries patterns that may match any name, then those that begin with a literal part; this is the order in which tags are shown.
        self._anywhere: list[_Extractor] = []
        self._prefixed: dict[str, list[_Extractor]] = {}
        # Envoy's own patterns see the same in every cluster's names but for the cluster's: what they find is kept by the rest of the name.
        defaults = proto is None or not proto.HasField("use_all_default_tags") or proto.use_all_default_tags.value
        self._uniform = defaults and (proto is None or not proto.stats_tags)
        self._of_clusters: dict[str, tuple[str, list[Tag]]] = {}
        if defaults:
            self._add_defaults(None)
        for tag, value in fixed:
            self._add_fixed(tag, value)
        if proto is not None:
            for index, specifier in enumerate(proto.stats_tags):
                with under(f"stats_tags[{index}]"):
                    self._add(specifier)
            for index, setting in enumerate(proto.histogram_bucket_settings):
                with under(f"histogram_bucket_settings[{index}]"):
                    self._buckets.append(_compile_buckets(setting))

    def tagged(self, name: str) -> tuple[str, list[Tag]]:
        """The name without its tags, and the tags in the order in which they are shown."""
        if not self._uniform or not name.startswith("cluster."):
            return self._extract(name)
        cluster, dot, rest = name[8:].partition(".")
        if not cluster or not dot:
            return self._extract(name)
        known = self._of_clusters.get(rest)
        if known is None:
            if len(self._of_clusters) >= _CACHE_LIMIT:
                self._of_clusters.clear()
            known = self._of_clusters[rest] = self._extract(f"cluster.x.{rest}")
        base, tags = known
        return base, [(tag, cluster) if tag == _CLUSTER else (tag, value) for tag, value in tags]

    def _extract(self, name: str) -> tuple[str, list[Tag]]:
        tags: list[Tag] = []
        taken: set[str] = set()
        cuts: list[tuple[int, int]] = []
        for extractors in (self._anywhere, self._prefixed.get(name.partition(".")[0], ())):
            for tag, contained, extract in extractors:
                if contained not in name or tag in taken:
                    continue
                found = extract(name)
                if found is not None:
                    value, start, end = found
                    taken.add(tag)
                    tags.append((tag, value))
                    cuts.append((start, end))
        return _without(name, cuts), tags

    def buckets(self, name: str) -> tuple[float, ...]:
        """Upper bounds of the buckets in which a histogram is shown."""
        for matches, bounds in self._buckets:
            if matches(name.encode()):
                return bounds
        return DEFAULT_BUCKETS

    def _add(self, specifier: stats_pb2.TagSpecifier) -> None:
        tag = specifier.tag_name
        if specifier.WhichOneof("tag_value") == "fixed_value":
            self._add_fixed(tag, specifier.fixed_value)
        elif specifier.regex:
            self._add_pattern(tag, specifier.regex, _compile_regex(specifier.regex))
        elif not self._add_defaults(tag):
            fail("tag_name", f"No regex specified for tag specifier and no default regex for name: '{tag}'")

    def _add_fixed(self, tag: str, value: str) -> None:
        self._anywhere.append((tag, "", lambda _: (value, 0, 0)))

    def _add_defaults(self, wanted: str | None) -> bool:
        """Envoy's patterns, all of them or those of one tag; whether there were any."""
        import re2

        found = False
        for tag, pattern, contained, excluded in _PATTERNS:
            if wanted in (None, tag):
                self._add_pattern(tag, pattern, re2.compile(pattern), contained, excluded)
                found = True
        for tag, tokens in _TOKENS:
            if wanted in (None, tag):
                parts = tokens.split(".")
                first = parts[0] if parts[0] not in "$*" else ""
                contained = next((f".{part}." for part in parts[1:-1] if part not in "$*"), "")
                self._place(first, (tag, contained, _by_tokens(parts)))
                found = True
        return found

    def _add_pattern(self, tag: str, pattern: str, compiled: Any, contained: str = "", excluded: str = "") -> None:
        literal = _LITERAL_START.match(pattern)
        self._place(literal[1] if literal else "", (tag, contained, _by_pattern(compiled, excluded)))

    def _place(self, first: str, extractor: _Extractor) -> None:
        if first:
            self._prefixed.setdefault(first, []).append(extractor)
        else:
            self._anywhere.append(extractor)


def _compile_regex(pattern: str) -> Any:
    import re2

    try:
        compiled = re2.compile(pattern)
    except re2.error as error:
        fail("regex", f"invalid regular expression {pattern!r}: {error}")
    if compiled.groups < 1:
        fail("regex", f"{pattern!r} has no group to say what the tag's value is")
    return compiled


def _by_pattern(pattern: Any, excluded: str) -> Extract:
    group = 2 if pattern.groups > 1 else 1

    def extract(name: str) -> tuple[str, int, int] | None:
        match = pattern.search(name)
        if match is None or match.start(1) < 0:
            return None
        value = match.group(group) or ""
        if excluded and value == excluded:
            return None
        return value, match.start(1), match.end(1)

    return extract


def _by_tokens(pattern: list[str]) -> Extract:
    # In all of these patterns `**` comes last.
    fixed = pattern[:-1]
    position = fixed.index("$")

    def extract(name: str) -> tuple[str, int, int] | None:
        parts = name.split(".", len(fixed))
        if len(parts) <= len(fixed):
            return None
        for wanted, part in zip(fixed, parts, strict=False):
            if wanted != part and wanted not in ("*", "$"):
                return None
        start = sum(len(part) + 1 for part in parts[:position])
        return parts[position], start, start + len(parts[position]) + 1

    return extract


def _without(name: str, cuts: list[tuple[int, int]]) -> str:
    if not cuts:
        return name
    kept: list[str] = []
    position = 0
    for start, end in sorted(cuts):
        if start > position:
            kept.append(name[position:start])
        position = max(position, end)
    kept.append(name[position:])
    return "".join(kept)


def _compile_matcher(proto: stats_pb2.StatsConfig) -> Callable[[str], bool] | None:
    matcher = proto.stats_matcher
    kind = matcher.WhichOneof("stats_matcher")
    if kind is None:
        return None
    if kind == "reject_all":
        return (lambda _: False) if matcher.reject_all else None
    tests = []
    for index, pattern in enumerate(getattr(matcher, kind).patterns):
        with under(f"stats_matcher.{kind}.patterns[{index}]"):
            tests.append(matchers.compile_string(pattern))
    if kind == "inclusion_list":
        return lambda name: any(test(name.encode()) for test in tests)
    return lambda name: not any(test(name.encode()) for test in tests)


def _compile_buckets(setting: stats_pb2.HistogramBucketSettings) -> tuple[Callable[[bytes], bool], tuple[float, ...]]:
    with under("match"):
        matches = matchers.compile_string(setting.match)
    # `bins` only sizes Envoy's storage. Without buckets the setting chooses the default ones.
    return matches, tuple(sorted(set(setting.buckets))) or DEFAULT_BUCKETS
