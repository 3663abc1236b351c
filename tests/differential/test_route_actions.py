"""What routes do: redirects, direct responses, rewrites, header mutations, choice of cluster."""

from typing import Any

from tests.differential.harness import Case, Request, Rig, answer, bootstrap, check_cases, cluster, endpoint, get, http, req, y


def vhost(name: str, *routes: dict, **fields: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test", f"{name}.test:*"], "routes": list(routes), **fields}


def route(match: str, text: str = "", **fields: Any) -> dict:
    """A route whose action's name is the first key of the text: `route('/x', 'redirect: {...}')`."""
    where = {"path": match[1:]} if match.startswith("=") else {"prefix": match}
    return {"match": where, **(y(text) if text else {"route": {"cluster": "a"}}), **fields}


def forward(match: str, text: str = "", **fields: Any) -> dict:
    return {"match": {"prefix": match}, "route": {"cluster": "a"} | (y(text) or {} if text else {}), **fields}


def add(key: str, value: str, action: str = "APPEND_IF_EXISTS_OR_ADD", **fields: Any) -> dict:
    return {"header": {"key": key, "value": value}, "append_action": action, **fields}


def regex_rewrite(pattern: str, substitution: str) -> dict:
    return {"regex_rewrite": {"pattern": {"regex": pattern}, "substitution": substitution}}


REDIRECTS = vhost(
    "redirect",
    route("/host", "redirect: {host_redirect: other.test}"),
    route("/port", "redirect: {port_redirect: 8443}"),
    route("/hostport", "redirect: {host_redirect: other.test, port_redirect: 99}"),
    route("/path", "redirect: {path_redirect: /new}"),
    route("/qpath", "redirect: {path_redirect: '/new?fixed=1'}"),
    route("/prefix", "redirect: {prefix_rewrite: /p2}"),
    route("/regex", "redirect: {regex_rewrite: {pattern: {regex: '/regex/([0-9]+)'}, substitution: '/n/\\1'}}"),
    route("/https", "redirect: {https_redirect: true}"),
    route("/scheme", "redirect: {scheme_redirect: https}"),
    route("/schemehost", "redirect: {scheme_redirect: http, host_redirect: 'o.test:80'}"),
    route("/strip", "redirect: {path_redirect: /s, strip_query: true}"),
    *[
        route(f"/c{status}", f"redirect: {{path_redirect: /x, response_code: {name}}}")
        for status, name in {301: "MOVED_PERMANENTLY", 302: "FOUND", 303: "SEE_OTHER", 307: "TEMPORARY_REDIRECT", 308: "PERMANENT_REDIRECT"}.items()
    ],
    route("/headers", "redirect: {path_redirect: /x}", response_headers_to_add=[add("x-why", "moved")]),
)
DIRECT = vhost(
    "direct",
    route("/plain", "direct_response: {status: 200, body: {inline_string: hello}}"),
    route("/empty", "direct_response: {status: 204}"),
    route("/bytes", "direct_response: {status: 200, body: {inline_bytes: AAEC}}"),
    route("/s404", "direct_response: {status: 404, body: {inline_string: gone}}"),
    route("/s400", "direct_response: {status: 400, body: {inline_string: bad}}"),
    route("/s599", "direct_response: {status: 599}"),
    route("/s201", "direct_response: {status: 201, body: {inline_string: made}}", response_headers_to_add=[add("location", "/here")]),
    route(
        "/typed",
        "direct_response: {status: 200, body: {inline_string: '{}'}}",
        response_headers_to_add=[add("content-type", "application/json", "OVERWRITE_IF_EXISTS_OR_ADD")],
    ),
    route("/removed", "direct_response: {status: 200, body: {inline_string: x}}", response_headers_to_remove=["content-type", "server", "date"]),
    route(
        "/formatted",
        "direct_response: {status: 200, body_format: {text_format_source: {inline_string: '%REQ(:METHOD)% %REQ(:PATH)% %PROTOCOL% %RESPONSE_CODE%'}}}",
    ),
)
REWRITES = vhost(
    "rewrite",
    forward("/prefix/", "{prefix_rewrite: /new/}"),
    forward("/toroot/", "{prefix_rewrite: /}"),
    {"match": {"path": "/exact"}, "route": {"cluster": "a", "prefix_rewrite": "/replaced"}},
    {"match": {"path": "/CASE", "case_sensitive": False}, "route": {"cluster": "a", "prefix_rewrite": "/replaced"}},
    {"match": {"path_separated_prefix": "/sep"}, "route": {"cluster": "a", "prefix_rewrite": "/s2"}},
    {"match": {"prefix": "/re"}, "route": {"cluster": "a", **regex_rewrite("^/re/([^/]+)(/.*)$", "\\2/of/\\1")}},
    {"match": {"prefix": "/all"}, "route": {"cluster": "a", **regex_rewrite("o", "0")}},
    {"match": {"safe_regex": {"regex": "/sr/.*"}}, "route": {"cluster": "a", "prefix_rewrite": "/whole"}},
    forward("/hostlit", "{host_rewrite_literal: new.test}"),
    forward("/hostauto", "{auto_host_rewrite: true, cluster: named}"),
    forward("/hostheader", "{host_rewrite_header: x-new-host}"),
    forward("/hostregex", "{host_rewrite_path_regex: {pattern: {regex: '^/hostregex/(\\w+).*'}, substitution: '\\1.test'}}"),
    forward("/hostxfh", "{host_rewrite_literal: new.test, append_x_forwarded_host: true}"),
    forward("/xfhonly", "{append_x_forwarded_host: true}"),
    forward("/both", "{prefix_rewrite: /b2, host_rewrite_literal: b2.test}"),
    {
        "match": {
            "path_match_policy": {
                "name": "t",
                "typed_config": {"@": "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", "path_template": "/tpl/{first}/{rest=**}"},
            },
        },
        "route": {
            "cluster": "a",
            "path_rewrite_policy": {
                "name": "t",
                "typed_config": {"@": "envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig", "path_template_rewrite": "/{rest}/{first}"},
            },
        },
    },
)
FORMATS = {
    "x-literal": "text", "x-percent": "100%%", "x-method": "%REQ(:METHOD)%",
    "x-path": "%REQ(:PATH)%", "x-alt": "%REQ(X-NONE?X-SOME)%", "x-none": "%REQ(X-NONE)%",
    "x-cut": "%REQ(X-SOME):3%", "x-protocol": "%PROTOCOL%", "x-remote": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "x-local-ip": "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%",
    "x-route": "%ROUTE_NAME%", "x-cluster": "%UPSTREAM_CLUSTER%", "x-mixed": "a=%REQ(X-SOME)%;b=%PROTOCOL%", "x-hostname-of": "%REQ(:AUTHORITY)%",
    "x-vhost": "%VIRTUAL_CLUSTER_NAME%", "x-env": "%ENVIRONMENT(NOT_SET_ANYWHERE)%", "x-query": "%QUERY_PARAM(a)%", "x-pathonly": "%PATH(NQ)%",
}  # fmt: skip
HEADERS = vhost(
    "headers",
    forward(
        "/route",
        request_headers_to_add=[add("x-level", "route"), add("x-route", "1")],
        request_headers_to_remove=["x-secret"],
        response_headers_to_add=[add("x-level", "route")],
        response_headers_to_remove=["x-internal"],
    ),
    forward("/actions", request_headers_to_add=[
        add("x-append", "added"), add("x-if-absent", "added", "ADD_IF_ABSENT"), add("x-overwrite", "added", "OVERWRITE_IF_EXISTS_OR_ADD"),
        add("x-only-existing", "added", "OVERWRITE_IF_EXISTS"),
    ]),
    forward("/old", request_headers_to_add=[
        {"header": {"key": "x-append", "value": "new"}, "append": True}, {"header": {"key": "x-set", "value": "new"}, "append": False},
    ]),
    forward("/formats", request_headers_to_add=[add(key, value) for key, value in FORMATS.items()], response_headers_to_add=[
        add("x-code", "%RESPONSE_CODE%"), add("x-details", "%RESPONSE_CODE_DETAILS%"), add("x-flags", "[%RESPONSE_FLAGS%]"), add("x-up", "%UPSTREAM_HOST%"),
        add("x-resp", "%RESP(X-FROM-UPSTREAM)%"), add("x-req", "%REQ(X-SOME)%"), add("x-bytes", "%BYTES_RECEIVED%"), add("x-cluster", "%UPSTREAM_CLUSTER%"),
        add("x-start", "%START_TIME(%Y)%"), add("x-trailer", "%TRAILER(X)%"), add("x-attempts", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"),
    ]),
    forward("/keepempty", request_headers_to_add=[add("x-empty", "%REQ(X-NONE)%", keep_empty_value=True), add("x-dropped", "%REQ(X-NONE)%")]),
    forward("/case", request_headers_to_add=[add("X-Mixed-Case", "Value")], request_headers_to_remove=["X-SECRET"]),
    forward("/hop", request_headers_to_add=[add("connection", "close"), add("te", "gzip")], response_headers_to_add=[add("x-a", "1"), add("x-a", "2")]),
    forward("/injected", request_headers_to_add=[add("x-copy", "%REQ(X-SOME)%")]),
    request_headers_to_add=[add("x-level", "vhost")],
    response_headers_to_add=[add("x-level", "vhost")],
    include_request_attempt_count=True,
    include_attempt_count_in_response=True,
)  # fmt: skip
CLUSTERS = vhost(
    "clusters",
    forward("/header", "{cluster_header: x-cluster}"),
    {"match": {"prefix": "/none"}, "route": {"cluster": "not_there"}},
    {"match": {"prefix": "/n404"}, "route": {"cluster_header": "x-cluster", "cluster_not_found_response_code": "NOT_FOUND"}},
    {"match": {"prefix": "/n500"}, "route": {"cluster_header": "x-cluster", "cluster_not_found_response_code": "INTERNAL_SERVER_ERROR"}},
    {
        "match": {"prefix": "/weighted"},
        "route": {
            "weighted_clusters": {
                "clusters": [
                    {
                        "name": "a",
                        "weight": 30,
                        "request_headers_to_add": [add("x-picked", "a")],
                        "response_headers_to_add": [add("x-picked", "a")],
                        "request_headers_to_remove": ["x-gone"],
                    },
                    {"name": "b", "weight": 70, "host_rewrite_literal": "b.test"},
                ],
                "header_name": "x-pick",
            },
        },
    },
    {"match": {"prefix": "/wzero"}, "route": {"weighted_clusters": {"clusters": [{"name": "a", "weight": 0}, {"name": "b", "weight": 1}]}}},
    {
        "match": {"prefix": "/whash"},
        "route": {
            "weighted_clusters": {"clusters": [{"name": "a", "weight": 50}, {"name": "b", "weight": 50}], "use_hash_policy": True},
            "hash_policy": [{"header": {"header_name": "x-user"}}],
        },
    },
    {"match": {"prefix": "/high"}, "route": {"cluster": "a", "priority": "HIGH"}},
)
for _routes in CLUSTERS["routes"][:1]:
    del _routes["route"]["cluster"]

HOSTS = [REDIRECTS, DIRECT, REWRITES, HEADERS, CLUSTERS]
VIRTUAL_CLUSTERS = vhost(
    "virtual",
    forward("/"),
    virtual_clusters=[
        {"name": "posts", "headers": [{"name": ":method", "string_match": {"exact": "POST"}}, {"name": ":path", "string_match": {"prefix": "/v"}}]},
        {"name": "slow", "headers": [{"name": ":path", "string_match": {"prefix": "/slow"}}]},
    ],
)

CONFIG = bootstrap(
    http("main", [*HOSTS, VIRTUAL_CLUSTERS], route_config={"validate_clusters": False}),
    http(
        "global_headers",
        [HEADERS],
        route_config={
            "request_headers_to_add": [add("x-level", "global")],
            "response_headers_to_add": [add("x-level", "global")],
            "response_headers_to_remove": ["x-from-upstream"],
            "internal_only_headers": ["x-internal-only"],
        },
    ),
    http(
        "most_specific_wins",
        [HEADERS],
        route_config={
            "request_headers_to_add": [add("x-level", "global", "OVERWRITE_IF_EXISTS_OR_ADD")],
            "response_headers_to_add": [add("x-level", "global", "OVERWRITE_IF_EXISTS_OR_ADD")],
            "most_specific_header_mutations_wins": True,
        },
    ),
    http(
        "suppressed", HOSTS, route_config={"validate_clusters": False},
        http_filters=[{"name": "router", "typed_config": {"@": "router", "suppress_envoy_headers": True}}],
    ),
    clusters=[cluster("a"), cluster("b"), cluster("named", endpoint("a", hostname="real.test"))],
)  # fmt: skip


async def weighted_by_header(rig: Rig) -> list[str]:
    """Which cluster each value of the header picks."""
    picks = []
    for value in ("0", "1", "29", "30", "99", "100", "129", "130", "18446744073709551615"):
        response = await rig.get(get("/weighted", f"x-pick: {value}", "x-gone: 1", host="clusters.test"))
        picks.append(f"{value}: {response}")
    return picks


async def weighted_by_hash(rig: Rig) -> list[str]:
    """Which cluster each user gets."""
    return [f"{user}: {await rig.get(get('/whash', f'x-user: {user}', host='clusters.test'))}" for user in range(20)]


BOTH = {"a": [Request(), answer(x_who="a")], "b": [Request(), answer(x_who="b")]}
CASES = [
    *[Case(f"redirect{path.replace('/', '_').replace('?', '_q_')}", get(path, host="redirect.test")) for path in (
        "/host/x?q=1", "/port/x", "/hostport/x", "/path/x?q=1", "/qpath/x?q=1", "/prefix/rest?q=1", "/regex/12/x?q=1", "/regex/none", "/https/x?q=1",
        "/scheme/x", "/schemehost/x", "/strip/x?q=1", "/c301", "/c302", "/c303", "/c307", "/c308", "/headers",
    )],
    *[Case(f"redirect_from_port_{name}", get(path, host=host)) for name, path, host in [
        ("https_80", "/https/x", "redirect.test:80"), ("https_8080", "/https/x", "redirect.test:8080"), ("port_over_port", "/port/x", "redirect.test:8080"),
        ("host_keeps_port", "/host/x", "redirect.test:8080"), ("path_keeps_port", "/path/x", "redirect.test:8080"),
    ]],
    Case("redirect_post", req("POST", "/c307", host="redirect.test", body=b"hello"), then="closed"),
    Case("redirect_head", req("HEAD", "/c301", host="redirect.test")),
    *[Case(f"direct{path.replace('/', '_')}", get(path, host="direct.test")) for path in (
        "/plain", "/empty", "/bytes", "/s404", "/s400", "/s599", "/s201", "/typed", "/removed", "/formatted?x=1",
    )],
    Case("direct_head", req("HEAD", "/plain", host="direct.test")),
    Case("direct_post", req("POST", "/plain", host="direct.test", body=b"hello")),
    Case("direct_grpc", req("POST", "/s404", "Content-Type: application/grpc", host="direct.test")),
    *[Case(f"rewrite{path.replace('/', '_').replace('?', '_q_')}", get(path, *lines, host="rewrite.test")) for path, *lines in [
        ["/prefix/a/b?q=1"], ["/toroot/a"], ["/exact?q=1"], ["/case"],
        ["/sep"], ["/sep/x?y"], ["/re/one/two?q=1"], ["/re/none"], ["/all/foo?oo=o"], ["/sr/x/y?q=1"],
        ["/hostlit/x"], ["/hostauto"], ["/hostheader", "X-New-Host: from.header"], ["/hostheader/none"], ["/hostregex/name/x?q"], ["/hostxfh"], ["/xfhonly"],
        ["/both/x"], ["/tpl/1/2/3"], ["/tpl/1/2/3?q=1"], ["/hostxfh/with", "X-Forwarded-Host: client.test"], ["/prefix/x", "X-Envoy-Original-Path: /client"],
    ]],
    Case("rewrite_suppressed", get("/prefix/a", host="rewrite.test"), on="suppressed"),
    Case("suppressed_response_headers", get("/route", host="headers.test"), on="suppressed"),
    Case("suppressed_503", get("/none", host="clusters.test"), on="suppressed"),
    *[Case(f"headers_{path[1:]}_{on}", get(path, "X-Secret: 1", "X-Some: something", "X-Level: client", "X-Internal-Only: 1", host="headers.test"),
           [Request(), answer(x_internal="1", x_from_upstream="yes", x_level="upstream")], on=on)
      for path in ("/route", "/formats?a=b", "/case", "/hop", "/keepempty") for on in ("main", "global_headers", "most_specific_wins")],
    Case("headers_actions_absent", get("/actions", host="headers.test")),
    Case("headers_actions_present", get(
        "/actions", "X-Append: old", "X-If-Absent: old", "X-Overwrite: old", "X-Overwrite: old2", "X-Only-Existing: old", host="headers.test")),
    Case("headers_old_append", get("/old", "X-Append: old", "X-Set: old", host="headers.test")),
    Case("headers_on_404", get("/nothing", host="headers.test")),
    Case("headers_copied_obs_text", get("/injected", "X-Some: caf\xe9", host="headers.test")),
    Case("headers_percent_in_value_not_formatted", get("/injected", "X-Some: %REQ(HOST)%", host="headers.test")),
    Case("cluster_header", get("/header", "X-Cluster: b", host="clusters.test"), BOTH),
    Case("cluster_header_twice", req("GET", "/header", "X-Cluster: b", "X-Cluster: a", host="clusters.test"), BOTH),
    Case("cluster_header_missing", get("/header", host="clusters.test")),
    Case("cluster_header_unknown", get("/header", "X-Cluster: nope", host="clusters.test")),
    Case("cluster_unknown_404", get("/n404", "X-Cluster: nope", host="clusters.test")),
    Case("cluster_unknown_500", get("/n500", "X-Cluster: nope", host="clusters.test")),
    Case("cluster_unknown_post", req("POST", "/none", host="clusters.test", body=b"hello")),
    Case("cluster_unknown_grpc", req("POST", "/none", "Content-Type: application/grpc", host="clusters.test")),
    Case("weighted_by_header", weighted_by_header, BOTH),
    Case("weighted_by_hash", weighted_by_hash, BOTH),
    Case("weighted_zero", get("/wzero", host="clusters.test"), BOTH),
    Case("high_priority", get("/high", host="clusters.test")),
    Case("virtual_cluster_first", req("POST", "/v1", host="virtual.test")),
    Case("virtual_cluster_second", get("/slow/x", host="virtual.test")),
    Case("virtual_cluster_other", get("/x", host="virtual.test")),
]  # fmt: skip

test_case = check_cases(CASES)
