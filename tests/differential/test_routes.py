"""Which virtual host and which route a request gets: every matcher. The name of the route is in the response and in the log."""

from tests.differential.harness import Case, bootstrap, check_cases, cluster, get, http, req, y


def route(name: str, match: str | dict, **fields: object) -> dict:
    """A route that answers with its own name."""
    return {"name": name, "match": y(match), "direct_response": {"status": 200, "body": {"inline_string": name}}, **fields}


def host(name: str, *domains: str, routes: list | None = None, **fields: object) -> dict:
    return {"name": name, "domains": list(domains), "routes": routes or [route(name, "prefix: /")], **fields}


def headers(name: str, *matchers: str, rest: str = "") -> dict:
    """A route for /<name> with header matchers."""
    more = ", ".join(filter(None, [f"headers: [{', '.join(matchers)}]" if matchers else "", rest]))
    return route(name, f"{{path: /{name}, {more}}}")


def template(name: str, text: str) -> dict:
    policy = {"name": "template", "typed_config": {"@": "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", "path_template": text}}
    return route(name, {"path_match_policy": policy})


DOMAINS = [
    host("exact", "exact.test"),
    host("exact_port", "exact.test:8080"),
    host("suffix", "*.exact.test", "*.foo.test"),
    host("longer_suffix", "*.bar.foo.test"),
    host("dash_suffix", "*-bar.foo.test"),
    host("prefix", "foo.*", "www.foo.*"),
    host("dash_prefix", "foo-*"),
    host("upper", "UPPER.Test"),
    host("no_routes_match", "none.test", routes=[route("never", "path: /never")]),
    host("tls_all", "tlsall.test", require_tls="ALL"),
    host("tls_external", "tlsexternal.test", require_tls="EXTERNAL_ONLY"),
]
PATHS = [
    route("exact_path", "path: /exact"),
    route("exact_case", "{path: /CaseLess, case_sensitive: false}"),
    route("prefix_case", "{prefix: /PreFix/, case_sensitive: false}"),
    route("separated", "path_separated_prefix: /sep"),
    route("separated_case", "{path_separated_prefix: /SEPC, case_sensitive: false}"),
    route("regex", "safe_regex: {regex: '/re/[0-9]+(/x)?'}"),
    route("regex_any", "safe_regex: {regex: '/any/.*'}"),
    template("template", "/t/{a}/*/z"),
    template("template_tail", "/tt/**"),
    route("query_in_prefix", "prefix: /q?a"),
    route("long_prefix", "prefix: /pre/fix"),
    route("short_prefix", "prefix: /pre"),
    route("connect", "connect_matcher: {}"),
    route("grpc", "{prefix: /grpc, grpc: {}}"),
    route("half", "{path: /half, runtime_fraction: {default_value: {numerator: 0}}}"),
    route("whole", "{path: /whole, runtime_fraction: {default_value: {numerator: 100}}}"),
    route("tls_presented", "{path: /tls, tls_context: {presented: true}}"),
    route("not_tls", "{path: /tls, tls_context: {presented: false}}"),
]  # fmt: skip
HEADERS = [
    headers("h_exact", "{name: x, string_match: {exact: v}}"),
    headers("h_exact_case", "{name: x, string_match: {exact: V, ignore_case: true}}"),
    headers("h_prefix", "{name: x, string_match: {prefix: ab}}"),
    headers("h_suffix", "{name: x, string_match: {suffix: yz}}"),
    headers("h_contains", "{name: x, string_match: {contains: mid}}"),
    headers("h_regex", "{name: x, string_match: {safe_regex: {regex: 'a+b*'}}}"),
    headers("h_old_exact", "{name: x, exact_match: v}"),
    headers("h_old_prefix", "{name: x, prefix_match: ab}"),
    headers("h_old_suffix", "{name: x, suffix_match: yz}"),
    headers("h_old_contains", "{name: x, contains_match: mid}"),
    headers("h_old_regex", "{name: x, safe_regex_match: {regex: 'a+b*'}}"),
    headers("h_present", "{name: x, present_match: true}"),
    headers("h_absent", "{name: x, present_match: false}"),
    headers("h_present_inverted", "{name: x, present_match: true, invert_match: true}"),
    headers("h_name_only", "{name: x}"),
    headers("h_range", "{name: x, range_match: {start: -10, end: 10}}"),
    headers("h_range_inverted", "{name: x, range_match: {start: 0, end: 10}, invert_match: true}"),
    headers("h_inverted", "{name: x, string_match: {exact: v}, invert_match: true}"),
    headers("h_empty_exact", "{name: x, string_match: {exact: v}, treat_missing_header_as_empty: true}"),
    headers("h_empty_inverted", "{name: x, string_match: {exact: v}, invert_match: true, treat_missing_header_as_empty: true}"),
    headers("h_two", "{name: x, string_match: {exact: v}}", "{name: z, string_match: {exact: w}}"),
    headers("h_joined", "{name: x, string_match: {exact: 'a,b'}}"),
    headers("h_method", "{name: ':method', string_match: {exact: POST}}"),
    headers("h_path", "{name: ':path', string_match: {prefix: /h_path}}"),
    headers("h_authority", "{name: ':authority', string_match: {exact: headers.test}}"),
    headers("h_scheme", "{name: ':scheme', string_match: {exact: http}}"),
    headers("h_host", "{name: host, string_match: {exact: headers.test}}"),
    headers("h_upper_name", "{name: X-Upper, string_match: {exact: v}}"),
    headers("q_exact", rest="query_parameters: [{name: a, string_match: {exact: v}}]"),
    headers("q_present", rest="query_parameters: [{name: a, present_match: true}]"),
    headers("q_name_only", rest="query_parameters: [{name: a}]"),
    headers("q_regex", rest="query_parameters: [{name: a, string_match: {safe_regex: {regex: '[0-9]+'}}}]"),
    headers("q_two", rest="query_parameters: [{name: a, string_match: {exact: v}}, {name: b, present_match: true}]"),
]

CONFIG = bootstrap(
    http(
        "main",
        [
            *DOMAINS,
            host("paths", "paths.test", routes=PATHS),
            host("headers", "headers.test", routes=HEADERS),
            host("default", "*", routes=[route("default", "path: /"), route("default_any", "prefix: /")]),
        ],
    ),
    http("no_default", [host("only", "only.test")]),
    http("ignore_port", [host("only", "only.test"), host("with_port", "port.test:1")], route_config={"ignore_port_in_host_matching": True}),
    http(
        "vhost_header",
        [host("v1", "v1.test"), host("v2", "v2.test")],
        route_config={"vhost_header": "x-route-as"},
    ),
    clusters=[cluster("a")],
)


def h(name: str, *lines: str, method: str = "GET", query: str = "") -> bytes:
    return req(method, f"/{name}{query}", *lines, host="headers.test")


def each_value(name: str, *values: str) -> list[Case]:
    """The route with header x at each value, and without it."""
    cases = [Case(f"{name}_with_{value or 'empty'}".replace(" ", "_"), h(name, f"X: {value}")) for value in values]
    return [*cases, Case(f"{name}_missing", h(name))]


CASES = [
    *[
        Case(f"host_{name}", get(host=value))
        for name, value in {
            "exact": "exact.test", "exact_upper": "EXACT.Test", "exact_port": "exact.test:8080", "exact_other_port": "exact.test:81", "suffix": "a.exact.test",
            "suffix_deep": "a.b.exact.test", "suffix_empty": ".exact.test", "longest_suffix": "x.bar.foo.test", "dash_suffix": "x-bar.foo.test",
            "dash_suffix_empty": "-bar.foo.test", "prefix": "foo.com", "prefix_deep": "foo.com.org", "longest_prefix": "www.foo.com", "prefix_empty": "foo.",
            "dash_prefix": "foo-x", "suffix_before_prefix": "foo.foo.test", "upper_in_config": "upper.test", "none": "unknown.test", "ipv6": "[::1]",
        }.items()
    ],
    Case("no_fall_through_to_default_host", get("/other", host="none.test")),
    Case("no_default_host", get(host="x.test"), on="no_default"),
    Case("ignore_port", get(host="only.test:99"), on="ignore_port"),
    Case("ignore_port_when_configured_with_port", get(host="port.test:1"), on="ignore_port"),
    Case("vhost_header", get("/", "x-route-as: v2.test", host="v1.test"), on="vhost_header"),
    Case("vhost_header_missing", get(host="v1.test"), on="vhost_header"),
    Case("require_tls_all", get("/p?q=1", host="tlsall.test")),
    Case("require_tls_all_with_port", get("/p?q=1", host="tlsall.test:80")),
    Case("require_tls_all_post", req("POST", "/p", host="tlsall.test", body=b"x")),
    Case("require_tls_all_forwarded_proto", get("/", "X-Forwarded-Proto: https", host="tlsall.test")),
    Case("require_tls_external", get(host="tlsexternal.test")),
    *[
        Case(f"path_{name}", get(path, host="paths.test"))
        for name, path in {
            "exact": "/exact", "exact_query": "/exact?x=y", "exact_slash": "/exact/", "exact_upper": "/EXACT", "case_less": "/caseLESS",
            "prefix_case": "/PREFIX/x", "separated": "/sep",
            "separated_slash": "/sep/", "separated_below": "/sep/a/b", "separated_other": "/separate", "separated_query": "/sep?x",
            "separated_case": "/sepc/x", "regex": "/re/123", "regex_group": "/re/1/x", "regex_partial": "/re/123/y", "regex_query": "/re/5?x=y",
            "regex_newline_free": "/any/%0a", "template": "/t/1/2/z", "template_short": "/t/1/z", "template_deep": "/t/1/2/3/z", "template_tail": "/tt/a/b",
            "query_in_prefix": "/q?abc", "longer_prefix_first": "/pre/fix/x", "short_prefix": "/pre", "fraction_none": "/half", "fraction_all": "/whole",
            "not_tls": "/tls", "no_match": "/zzz", "root": "/",
        }.items()
    ],
    Case("grpc_matches", req("POST", "/grpc/x", "Content-Type: application/grpc+proto", host="paths.test")),
    Case("grpc_does_not_match", req("POST", "/grpc/x", "Content-Type: application/json", host="paths.test")),
    Case("grpc_not_found_reply", req("POST", "/nothing", "Content-Type: application/grpc", host="none.test")),
    *each_value("h_exact", "v", "V", "vv", ""),
    *each_value("h_exact_case", "v", "V"),
    *each_value("h_prefix", "abc", "ABC", "a"),
    *each_value("h_suffix", "xyz", "z"),
    *each_value("h_contains", "a mid b", "none"),
    *each_value("h_regex", "aab", "aabc"),
    *each_value("h_old_exact", "v", "w"),
    *each_value("h_old_prefix", "abc", "b"),
    *each_value("h_old_suffix", "xyz", "b"),
    *each_value("h_old_contains", "amidb", "b"),
    *each_value("h_old_regex", "ab", "c"),
    *each_value("h_present", "v", ""),
    *each_value("h_absent", "v", ""),
    *each_value("h_present_inverted", "v"),
    *each_value("h_name_only", "v", ""),
    *each_value("h_range", "-10", "0", "9", "10", "1x", "+5", " 5", "5.0", "99999999999999999999", ""),
    *each_value("h_range_inverted", "5", "50", "x"),
    *each_value("h_inverted", "v", "w"),
    *each_value("h_empty_exact", "v", "w"),
    *each_value("h_empty_inverted", "v", "w"),
    *each_value("h_joined", "a,b", "a, b", "a"),
    Case("h_joined_two_lines", h("h_joined", "X: a", "X: b")),
    Case("h_two_both", h("h_two", "X: v", "Z: w")),
    Case("h_two_one", h("h_two", "X: v")),
    Case("h_method_post", h("h_method", method="POST")),
    Case("h_method_get", h("h_method")),
    Case("h_path", h("h_path")),
    Case("h_authority", h("h_authority")),
    Case("h_scheme", h("h_scheme")),
    Case("h_host", h("h_host")),
    Case("h_upper_name", h("h_upper_name", "x-upper: v")),
    *[
        Case(f"{name}_{query.strip('?') or 'none'}", h(name, query=query))
        for name, queries in {
            "q_exact": ["?a=v", "?a=w", "?b=v", "?a=w&a=v", "?a=v&a=w", "?A=v", "?a=%76", "", "?a", "?&a=v&"],
            "q_present": ["?a=", "?a", "?b=a", ""],
            "q_name_only": ["?a=1", "?b=1"],
            "q_regex": ["?a=12", "?a=12x", "?a=1+2"],
            "q_two": ["?a=v&b", "?b=1&a=v", "?a=v"],
        }.items()
        for query in queries
    ],
]  # fmt: skip

test_case = check_cases(CASES)
