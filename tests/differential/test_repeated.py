"""The same request again and again on one connection: what a proxy remembers of it must never show, whatever the third or fourth time brings."""

from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Play,
    Request,
    Reset,
    Response,
    Rig,
    Signal,
    Until,
    Wait,
    answer,
    bootstrap,
    check_cases,
    cluster,
    each,
    file_log,
    filter_,
    get,
    http,
    req,
    y,
)

TIMES = 6
FULL = {"numerator": 100}


def vhost(name: str, route: str = "", *, top: str = "", **fields: Any) -> dict[str, Any]:
    """A virtual host `<name>.test` with one route to cluster a."""
    return {
        "name": name,
        "domains": [f"{name}.test"],
        "routes": [
            {"match": {"prefix": "/"}, "route": y(f"{{{route}}}") if "cluster" in route.partition(",")[0] else {"cluster": "a"} | y(f"{{{route}}}")}
            | y(f"{{{top}}}")
        ],
        **fields,
    }


HOSTS = [
    vhost("a"),
    vhost("adds", top="request_headers_to_add: [{header: {key: x-added, value: constant}}], response_headers_to_add: [{header: {key: x-back, value: there}}]"),
    vhost("adds_id", top="request_headers_to_add: [{header: {key: x-copy, value: 'id %REQ(x-request-id)%'}}]"),
    vhost("adds_path", top="request_headers_to_add: [{header: {key: x-copy, value: '%REQ(:path)%|%REQ(x-a)%'}}]"),
    vhost("adds_address", top="request_headers_to_add: [{header: {key: x-from, value: '%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%'}}]"),
    vhost("adds_back", top="response_headers_to_add: [{header: {key: x-asked, value: '%REQ(:path)%'}}, {header: {key: x-code, value: '%RESPONSE_CODE%'}}]"),
    vhost("removes", top="request_headers_to_remove: [x-a, x-request-id], response_headers_to_remove: [x-up, server, x-envoy-upstream-service-time]"),
    vhost("prefix", "prefix_rewrite: /other/"),
    vhost("rehost", "host_rewrite_literal: other.test, append_x_forwarded_host: true"),
    vhost("auto", "auto_host_rewrite: true"),
    vhost("weighted", "weighted_clusters: {clusters: [{name: a, weight: 100}, {name: b, weight: 0}]}"),
    vhost("by_header", "cluster_header: x-to"),
    vhost("retries", "retry_policy: {retry_on: 5xx, retry_back_off: {base_interval: 0.001s}}, timeout: 4s"),
    vhost("resets", "retry_policy: {retry_on: reset, retry_back_off: {base_interval: 0.001s}}, timeout: 4s"),
    vhost("by_response", "timeout: 4s, retry_policy: {retry_on: retriable-headers, retriable_headers: [{name: x-again, string_match: {exact: 'yes'}}], "
          "retry_back_off: {base_interval: 0.001s}}"),
    vhost("by_code", "timeout: 4s, retry_policy: {retry_on: retriable-status-codes, retriable_status_codes: [202, 404], "
          "retry_back_off: {base_interval: 0.001s}}"),
    vhost("timeout", "timeout: 2s"),  # requests that are answered are answered in time, also on a busy machine
    vhost("endless", "timeout: 0s"),
    vhost("per_try", "timeout: 9s, retry_policy: {retry_on: 5xx, per_try_timeout: 1s, retry_back_off: {base_interval: 0.001s}}"),
    vhost("mirrored", "timeout: 15s, request_mirror_policies: [{cluster: b}]"),
    vhost("counted", include_request_attempt_count=True, include_attempt_count_in_response=True),
    vhost("counts_tries", "timeout: 4s, retry_policy: {retry_on: 5xx, retry_back_off: {base_interval: 0.001s}}", include_request_attempt_count=True,
          include_attempt_count_in_response=True),
    vhost("copies_count", top="request_headers_to_add: [{header: {key: x-copy, value: '%REQ(x-envoy-attempt-count)%'}}], "
          "response_headers_to_add: [{header: {key: x-tried, value: '%RESP(x-envoy-attempt-count)%'}}]",
          include_request_attempt_count=True, include_attempt_count_in_response=True),
    vhost("clustered", virtual_clusters=[{"name": "vc", "headers": [{"name": ":path", "string_match": {"prefix": "/"}}]}]),
    vhost("fraction", top="") | {"routes": [
        {"match": {"prefix": "/", "runtime_fraction": {"default_value": {"numerator": 0}, "runtime_key": "to.b"}}, "route": {"cluster": "b"}},
        {"match": {"prefix": "/"}, "route": {"cluster": "a"}}]},
    {"name": "many", "domains": ["many.test"], "routes": [
        {"match": {"prefix": "/", "headers": [{"name": "x-request-id", "string_match": {"prefix": "to-b"}}]}, "route": {"cluster": "b"}},
        {"match": {"prefix": "/by", "headers": [{"name": "x-a", "string_match": {"exact": "b"}}]}, "route": {"cluster": "b"}},
        {"match": {"path": "/query", "query_parameters": [{"name": "to", "string_match": {"exact": "b"}}]}, "route": {"cluster": "b"}},
        {"match": {"path": "/redirect"}, "redirect": {"path_redirect": "/there"}},
        {"match": {"path": "/direct"}, "direct_response": {"status": 200, "body": {"inline_string": "here"}}},
        {"match": {"prefix": "/a"}, "route": {"cluster": "a"}}]},
]  # fmt: skip

ORIGIN = "Origin: http://o.test"
POLICY = {"allow_origin_string_match": [{"exact": "http://o.test"}], "allow_methods": "GET", "expose_headers": "x-up"}
CORS_HOSTS = [
    vhost("a"),
    vhost("adds", top="response_headers_to_add: [{header: {key: x-back, value: there}}]"),
    vhost("host", cors=POLICY),
    vhost("typed", typed_per_filter_config={"envoy.filters.http.cors": {"@": "cors_policy", **POLICY}}),
    {"name": "some", "domains": ["some.test"], "routes": [
        {"match": {"prefix": "/cors"}, "route": {"cluster": "a", "cors": POLICY}}, {"match": {"prefix": "/"}, "route": {"cluster": "a"}}]},
]  # fmt: skip

ROLE = {"permissions": [{"any": True}], "principals": [{"header": {"name": "x-role", "string_match": {"exact": "admin"}}}]}
BY_ADDRESS = {"permissions": [{"any": True}], "principals": [{"direct_remote_ip": {"address_prefix": "127.0.0.0", "prefix_len": 8}}]}
LIMIT = {
    "stat_prefix": "limit",
    "token_bucket": {"max_tokens": 4, "tokens_per_fill": 1, "fill_interval": "1000s"},
    "filter_enabled": {"default_value": FULL},
    "filter_enforced": {"default_value": FULL},
}
JSON_LOG = {
    "log_format": {"json_format": {
        "method": "%REQ(:METHOD)%", "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "code": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%",
        "a": "%REQ(X-A)%", "quoted": 'a "b" %REQ(X-A?X-B)%', "up": "%RESP(X-UP)%", "server": "%RESP(SERVER)%", "host": "%UPSTREAM_HOST%",
        "cluster": "%UPSTREAM_CLUSTER%", "sent": "%BYTES_SENT%", "route": "%ROUTE_NAME%", "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "remote": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "details": "%RESPONSE_CODE_DETAILS%"}},
}  # fmt: skip
VALUES = """
UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT(8) UPSTREAM_REMOTE_ADDRESS UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT UPSTREAM_HOST_NAME
UPSTREAM_PROTOCOL UPSTREAM_CLUSTER_RAW UPSTREAM_TLS_VERSION UPSTREAM_PEER_SUBJECT UPSTREAM_TRANSPORT_FAILURE_REASON DOWNSTREAM_LOCAL_ADDRESS
DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT(8) DOWNSTREAM_TLS_VERSION DOWNSTREAM_PEER_URI_SAN REQUESTED_SERVER_NAME
DOWNSTREAM_TRANSPORT_FAILURE_REASON LISTENER_NAME FILTER_CHAIN_NAME METADATA(LISTENER:mine:key) METADATA(CLUSTER:mine:key) METADATA(ROUTE:mine:key)
METADATA(UPSTREAM_HOST:mine:key) GRPC_STATUS GRPC_STATUS_NUMBER ACCESS_LOG_TYPE VIRTUAL_CLUSTER_NAME ENVIRONMENT(NOT_SET_ANYWHERE) QUERY_PARAM(q) QUERY_PARAMS
PATH(NQ) START_TIME(%Y) CONNECTION_TERMINATION_DETAILS RESPONSE_CODE_DETAILS ROUTE_NAME UPSTREAM_REQUEST_ATTEMPT_COUNT BYTES_RECEIVED BYTES_SENT RESPONSE_FLAGS
""".split()
# As Istio's proxies have it by default, but for addresses and times.
ISTIO_LOG = (
    '"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% '
    '"%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% %BYTES_SENT% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" '
    '"%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_ADDRESS% '
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)
CONFIG = bootstrap(
    http("main", HOSTS),
    http("values", HOSTS, access_log=[file_log("".join(f"{name.replace('%', '')}=%{name}%|" for name in VALUES) + "\n")]),
    http("like_istio", HOSTS, access_log=[file_log(ISTIO_LOG)], generate_request_id=False),
    http("edge", HOSTS, use_remote_address=True),
    http("json", HOSTS, access_log=[file_log(**JSON_LOG)]),
    http(
        "filtered",
        HOSTS,
        access_log=[file_log(filter={"status_code_filter": {"comparison": {"op": "GE", "value": {"default_value": 500, "runtime_key": "x"}}}})],
    ),
    http("rbac", HOSTS, filters=[filter_("rbac", rules={"action": "ALLOW", "policies": {"role": ROLE}}, shadow_rules={"policies": {"here": BY_ADDRESS}})]),
    http("rbac_deny", HOSTS, filters=[filter_("rbac", rules={"action": "DENY", "policies": {"role": ROLE}})]),
    http("limit", HOSTS, filters=[filter_("local_ratelimit", **LIMIT)]),
    http("limit_each", HOSTS, filters=[filter_("local_ratelimit", **LIMIT, local_rate_limit_per_downstream_connection=True)]),
    http("fault", HOSTS, filters=[filter_("fault", abort={"http_status": 418, "percentage": FULL}, headers=[{"name": "x-break", "present_match": True}])]),
    http("no_fault", HOSTS, filters=[filter_("fault", abort={"http_status": 418, "percentage": {"numerator": 0}})]),
    http("plain_router", HOSTS, http_filters=[filter_("router", suppress_envoy_headers=True)]),
    http("pass_server", HOSTS, server_header_transformation="PASS_THROUGH", via="mesh"),
    http("echo_id", HOSTS, always_set_request_id_in_response=True),
    http("no_id", HOSTS, generate_request_id=False),
    http("cors", CORS_HOSTS, filters=[filter_("cors")]),
    http("few", HOSTS, common_http_protocol_options={"max_requests_per_connection": 4}),
    clusters=[
        cluster("a"),
        cluster("b"),
        cluster("two", "a", "b"),
    ],
    layered_runtime={"layers": [{"name": "static", "static_layer": {}}, {"name": "admin", "admin_layer": {}}]},
)


def again(name: str, request: bytes, up: Any = None, *, times: int = TIMES, method: str = "GET", **fields: Any) -> Case:
    """The request so many times, each after the response to the one before."""
    return Case(name, [request, Response(method)] * times, Play() if up is None else up, **fields)


def third(*script: Any) -> Play:
    """The fourth request gets this, all others an answer."""
    return each([Request(), OK], [Request(), OK], [Request(), OK], [Request(), *script], [Request(), OK])


def in_turn(name: str, *requests: bytes, **fields: Any) -> Case:
    """The requests one after the other, several times over."""
    return Case(name, [step for _ in range(4) for one in requests for step in (one, Response())], **fields)


def admin_in_between(name: str, path: str, host: str = "a") -> Case:
    """Something changes while the same request goes on."""

    async def run(rig: Rig) -> Any:
        wire = await rig.connect()
        answers = [await rig.exchange(wire, get(host=f"{host}.test")) for _ in range(4)]
        await rig.proxy.admin("POST", path)
        answers += [await rig.exchange(wire, get(host=f"{host}.test")) for _ in range(3)]
        undo = path.replace("/fail", "/ok").replace("=100", "=")
        await rig.proxy.admin("POST", undo)
        return answers

    return Case(name, run)


LARGE = b"x" * 100_000
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
THEIRS = answer(server="theirs", date="Thu, 01 Jan 1970 00:00:00 GMT", x_up="up")
ERROR = answer("503 No")

CASES = [
    again("get", get("/")),
    again("get_headers", get("/a?b=c", "User-Agent: probe", "X-A: 1", "X-A: 2", "Cookie: a=b", "Cookie: c=d")),
    *[again(f"method_{m}", req(m, "/m"), method=m) for m in ("HEAD", "DELETE", "OPTIONS", "TRACE", "POST")],
    again("post_body", req("POST", "/p", body=b"hello"), method="POST"),
    again("get_body", req("GET", "/p", body=b"hello")),
    again("own_request_id", get("/", "X-Request-Id: 11111111-2222-4333-8444-555555555555")),
    again("own_request_id_at_edge", get("/", "X-Request-Id: 11111111-2222-4333-8444-555555555555"), on="edge"),
    again("at_edge", get("/", "X-Forwarded-Proto: https"), on="edge"),
    again("plain_at_edge", get("/"), on="edge"),
    again("internal", get("/", "X-Forwarded-For: 10.0.0.1")),
    again("expects_timeout", get("/", "X-Envoy-Upstream-Rq-Timeout-Ms: 900", "X-Forwarded-For: 10.0.0.1")),
    again("grpc_timeout", get("/", "Grpc-Timeout: 1S")),
    *[again(f"connection_{v}", get("/", f"Connection: {v}", "X-A: 1")) for v in ("keep-alive", "Keep-Alive", "KEEP-alive", "keep-alive, keep-alive")],
    again("connection_header", get("/", "Connection: keep-alive, x-a", "X-A: 1")),
    again("no_request_id", get("/"), on="no_id"),
    # As sidecars get them from each other.
    *[again(f"relayed_{name}", get("/x", *lines, host="adds.test")) for name, lines in (
        ("http", ["X-Forwarded-Proto: http"]),
        ("https", ["X-Forwarded-Proto: https", "X-Request-Id: 11111111-2222-4333-8444-555555555555"]),
        ("expects", ["X-Forwarded-Proto: http", "X-Envoy-Expected-Rq-Timeout-Ms: 15000", "X-A: 1", "X-A: 2"]),
        ("internal_only", ["X-Forwarded-Proto: http", "X-Envoy-Max-Retries: 3", "X-Envoy-Retry-On: 5xx", "X-Envoy-Upstream-Rq-Timeout-Ms: 5"]),
        ("upper_case", ["X-Forwarded-Proto: HTTP"]),
        ("other_scheme", ["X-Forwarded-Proto: ftp"]),
        ("twice", ["X-Forwarded-Proto: http", "X-Forwarded-Proto: https"]),
        ("for", ["X-Forwarded-Proto: http", "X-Forwarded-For: 10.0.0.1", "X-Envoy-Expected-Rq-Timeout-Ms: 15000"]))],
    *[again(f"relayed_to_{on}", get("/x", "X-Forwarded-Proto: https", "X-Envoy-Expected-Rq-Timeout-Ms: 15000"), on=on) for on in (
        "edge", "json", "plain_router", "pass_server")],
    again("relayed_absolute", req("GET", "https://adds.test/x", "X-Forwarded-Proto: http")),
    again("http_1_0", req("GET", "/", "Connection: keep-alive", version="1.0")),
    again("absolute_form", req("GET", "http://adds.test/x")),
    again("path_to_normalise", get("/a/../b//c")),
    *[again(f"host_{h}", get("/x?y", "X-A: 1", host=f"{h}.test"), Play([[Request(), THEIRS]])) for h in (
        "adds", "adds_id", "adds_path", "adds_address", "adds_back", "removes", "prefix", "rehost", "auto", "weighted", "retries", "endless", "counted",
        "clustered", "fraction", "nowhere")],
    again("host_by_header", get("/", "X-To: b", host="by_header.test")),
    again("host_mirrored", get("/", host="mirrored.test"), skip=("upstream",), skip_stats=("cluster.b.upstream_cx_", "cluster.b.upstream_rq_pending"),
          note="mirrored requests come in any order, and use a connection again if it is free by then"),
    again("redirect", get("/redirect", host="many.test")),
    again("direct", get("/direct", host="many.test")),
    again("no_route", get("/nothing", host="many.test")),
    in_turn("two_paths", get("/a"), get("/b")),
    in_turn("two_hosts", get("/"), get("/", host="adds.test"), get("/", host="prefix.test")),
    in_turn("routes_by_header", get("/by", "X-A: a", host="many.test"), get("/by", "X-A: b", host="many.test"), get("/a", host="many.test")),
    in_turn("routes_by_query", get("/query?to=b", host="many.test"), get("/query?to=a", host="many.test")),
    in_turn(
        "routes_by_request_id", get("/a", "X-Request-Id: to-b", host="many.test"), get("/a", host="many.test"), get("/a", "X-Request-Id: c", host="many.test")
    ),
    in_turn("get_and_post", get("/"), req("POST", "/", body=b"x"), get("/")),
    # ---- pieces
    Case("pipelined", [get("/") * 5, *[Response()] * 5]),
    Case("pipelined_after_plain", [*[get("/"), Response()] * 3, get("/") * 4, *[Response()] * 4, get("/"), Response()]),
    Case("in_halves", [*[get("/"), Response()] * 3, get("/")[:10], get("/")[10:], Response(), get("/"), Response()]),
    Case("more_than_one", [*[get("/"), Response()] * 3, get("/") + get("/")[:7], Response(), get("/")[7:], Response(), get("/"), Response()]),
    Case("empty_line_between", [*[get("/"), Response(), b"\r\n"] * 4, get("/"), Response()]),
    Case("next_comes_early", [*[get("/"), Response()] * 3, get("/"), Wait("asked"), get("/2"), Signal("go"), Response(), Response(), get("/"), Response()],
         third(Signal("asked"), Wait("go"), OK)),
    Case("garbage_afterwards", [*[get("/"), Response()] * 4, b"garbage\r\n\r\n", Response()], then="closed"),
    Case("client_leaves", [*[get("/"), Response()] * 3, get("/"), Wait("asked"), Reset()], third(Signal("asked"), Until(b"never")), then="leave"),
    # ---- what upstreams answer
    again("theirs", get(), Play([[Request(), THEIRS]])),
    again("large", get(), Play([[Request(), answer(body=LARGE)]])),
    again("no_body", get(), Play([[Request(), answer(body=b"")]])),
    again("chunked", get(), Play([[Request(), CHUNKED]])),
    again("closing", get(), Play([[Request(), answer(connection="close")]])),
    again("not_found", get(), Play([[Request(), answer("404 Not Found")]])),
    again("error", get(), Play([[Request(), ERROR]])),
    again("no_content", get(), Play([[Request(), b"HTTP/1.1 204 No Content\r\n\r\n"]])),
    again("not_modified", get(), Play([[Request(), b'HTTP/1.1 304 Not Modified\r\netag: "x"\r\n\r\n']])),
    again("canary", get(), Play([[Request(), answer(x_envoy_upstream_canary="true")]])),
    again("names_service_time", get(), Play([[Request(), answer(x_envoy_upstream_service_time="7")]])),
    again("grpc_status", get("/", "Content-Type: application/grpc"), Play([[Request(), answer(grpc_status="3", content_type="application/grpc")]])),
    again("odd_reason", get(), Play([[Request(), answer("200 Very Well")]])),
    again("until_close", get(), Play([[Request(), b"HTTP/1.1 200 OK\r\n\r\nto the end", Close()]])),
    again("unlike", get(), each(*[[Request(), answer(f"{s} X", x_n=str(s))] for s in (200, 201, 404, 200, 500, 201)])),
    again("third_chunked", get(), third(CHUNKED)),
    again("third_slowly", get(), third(b"HTTP/1.1 200 OK\r\ncontent-le", b"ngth: 2\r\n\r\no", b"k")),
    again("third_error", get(), third(ERROR)),
    again("third_closed", get(), third(Close())),
    again("third_reset", get(), third(Reset())),
    again("third_closed_in_body", get(), third(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", Close()), then="closed", times=4),
    again("third_garbage", get(), third(b"garbage\r\n\r\n")),
    again("third_continue", get(), third(b"HTTP/1.1 100 Continue\r\n\r\n", OK)),
    again("third_large", get(), third(answer(body=LARGE))),
    again("third_names_lengths", get(), third(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok")),
    # ---- retries and timeouts
    again("retried", get(host="retries.test"), third(ERROR)),
    again("retried_by_response", get(host="by_response.test"), third(answer(x_again="yes"))),
    again("retried_by_response_first", get(host="by_response.test"), each([Request(), answer(x_again="yes")], [Request(), OK])),
    again("retried_by_code", get(host="by_code.test"), third(answer("202 Later"))),
    again("not_retried_by_code", get(host="by_code.test"), third(answer("203 Other"))),
    again("retried_reset", get(host="resets.test"), third(Reset())),
    again("retried_in_vain", get(host="retries.test"), Play([[Request(), ERROR]]), times=4),
    again("retried_by_request", get("/", "X-Envoy-Retry-On: 5xx", "X-Forwarded-For: 10.0.0.1"), third(ERROR)),
    *[again(f"post_{h}", req("POST", "/p", "X-A: 1", host=f"{h}.test", body=b"hello"), third(ERROR), method="POST") for h in (
        "a", "adds", "retries", "prefix", "weighted", "counted", "nowhere", "by_code")],
    again("post_retried_reset", req("POST", "/p", host="resets.test", body=b"hello"), third(Reset()), method="POST"),
    again("post_reset", req("POST", "/p", body=b"hello"), third(Reset()), method="POST"),
    again("post_timed_out", req("POST", "/p", host="timeout.test", body=b"hello"), third(Until(b"never")), method="POST"),
    again("post_try_timed_out", req("POST", "/p", host="per_try.test", body=b"hello"), third(Until(b"never")), method="POST"),
    again("post_direct", req("POST", "/direct", host="many.test", body=b"hello"), method="POST", times=1, then="leave"),
    again("post_rbac_denied", req("POST", "/p", body=b"hello"), on="rbac", method="POST", times=1, then="leave"),
    again("post_rbac_allowed", req("POST", "/p", "X-Role: admin", body=b"hello"), on="rbac", method="POST"),
    again("post_logged", req("POST", "/p", "X-A: 1", body=b"hello"), on="json", method="POST"),
    again("post_large", req("POST", "/p", body=LARGE), method="POST"),
    again("put_body", req("PUT", "/p", body=b"hello"), method="PUT"),
    again("head_body", req("HEAD", "/p", body=b"hello"), method="HEAD"),
    again("post_length_0", req("POST", "/p", "Content-Length: 0"), method="POST"),
    again("post_length_00", req("POST", "/p", "Content-Length: 05", body=b"hello"), method="POST", times=1, then="leave", stricter=400),
    Case("post_pipelined", [req("POST", "/1", body=b"hello") + get("/2") + req("POST", "/3", body=b"you"), Response("POST"), Response(), Response("POST")]),
    Case("post_in_halves", [*[req("POST", "/1", body=b"hello"), Response("POST")] * 2, req("POST", "/1", body=b"hello")[:-3], b"llo", Response("POST")]),
    again("timed_out", get(host="timeout.test"), third(Until(b"never"))),
    again("timed_out_in_body", get(host="timeout.test"), third(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", Until(b"never")), then="closed", times=4),
    again("try_timed_out", get(host="per_try.test"), third(Until(b"never"))),
    again("tries", get(host="per_try.test")),
    # ---- filters
    again("rbac_allowed", get("/", "X-Role: admin"), on="rbac"),
    again("rbac_denied", get("/"), on="rbac"),
    in_turn("rbac_in_turn", get("/", "X-Role: admin"), get("/"), on="rbac"),
    again("rbac_deny_denied", get("/", "X-Role: admin"), on="rbac_deny"),
    in_turn("rbac_deny_in_turn", get("/", "X-Role: admin"), get("/"), on="rbac_deny"),
    again("limited", get("/"), on="limit"),
    again("limited_each", get("/"), on="limit_each"),
    again("faulty", get("/", "X-Break: 1"), on="fault"),
    in_turn("faulty_in_turn", get("/", "X-Break: 1"), get("/"), on="fault"),
    again("fault_of_none", get("/"), on="no_fault"),
    *[again(f"cors_{h}{name}", get("/", *lines, host=f"{h}.test"), on="cors") for h in ("a", "adds", "host", "typed") for name, lines in (
        ("", ()), ("_asked", (ORIGIN,)), ("_asked_by_another", ("Origin: http://other.test",)))],
    in_turn("cors_in_turn", get("/", host="host.test"), get("/", ORIGIN, host="host.test"), get("/", ORIGIN), on="cors"),
    in_turn("cors_by_route", get("/cors", ORIGIN, host="some.test"), get("/", ORIGIN, host="some.test"), on="cors"),
    again("cors_preflight", req("OPTIONS", "/", ORIGIN, "Access-Control-Request-Method: GET", host="host.test"), on="cors", method="OPTIONS"),
    # ---- tries that are counted
    *[again(f"{h}_{name}", get("/", *lines, host=f"{h}.test"), up) for h in ("counted", "counts_tries", "copies_count") for name, lines, up in (
        ("told", ("X-Envoy-Attempt-Count: 7", "X-A: 1"), None),
        ("told_twice", ("X-Envoy-Attempt-Count: 7", "X-A: 1", "X-Envoy-Attempt-Count: 8"), None),
        ("told_by_internal", ("X-Envoy-Attempt-Count: 7", "X-Forwarded-For: 10.0.0.1"), None),
        ("upstream_counts", (), Play([[Request(), answer(x_envoy_attempt_count="9", x_up="1")]])),
        ("failed", (), third(ERROR)),
        ("lost", (), third(Close())))],
    again("post_counts_tries", req("POST", "/p", host="counts_tries.test", body=b"hello"), third(ERROR), method="POST"),
    again("counts_tries_to_json", get("/", "X-A: 1", host="counts_tries.test"), third(ERROR), on="json"),
    # ---- what the connection manager and the router add
    *[again(f"{on}_{h}", get("/", host=f"{h}.test"), Play([[Request(), THEIRS]]), on=on) for on in ("plain_router", "pass_server", "echo_id", "few") for h in (
        "a", "adds", "removes", "rehost")],
    # ---- logs
    *[
        again(f"logged_{h}", get('/"quoted"?%41', 'X-A: a "b" \\ \x80', host=f"{h}.test"), Play([[Request(), THEIRS]]), on="json")
        for h in ("a", "prefix", "retries")
    ],
    *[again(f"logged_{on}_{name}", get("/path?q=%41&r", "X-A: 1", "User-Agent: probe", *more, host="adds.test"), up, on=on)
      for on in ("values", "like_istio") for name, more, up in (
        ("often", (), None), ("when_one_fails", (), third(ERROR)), ("when_one_is_lost", (), third(Close())), ("of_theirs", (), Play([[Request(), THEIRS]])),
        ("with_ids", ("X-Request-Id: 11111111-2222-4333-8444-555555555555", "X-Forwarded-For: 10.0.0.1"), None))],
    again("logged_values_of_posts", req("POST", "/p?q=1", "X-A: 1", body=b"hello"), on="values", method="POST"),
    again("logged_values_retried", get("/", host="retries.test"), third(ERROR), on="values"),
    again("logged_values_of_grpc", get("/", "Content-Type: application/grpc"), Play([[Request(), answer(grpc_status="3", content_type="application/grpc")]]),
          on="values"),
    in_turn("logged_in_turn", get("/1", "X-A: 1"), get("/2"), get("/1", "X-B: 2"), on="json"),
    again("logged_filtered", get(), third(ERROR), on="filtered"),
    # ---- changes in between
    admin_in_between("drains", "/healthcheck/fail"),
    admin_in_between("runtime", "/runtime_modify?to.b=100", "fraction"),
    admin_in_between("maintenance", "/runtime_modify?upstream.maintenance_mode.a=100"),
]  # fmt: skip

test_case = check_cases(CASES)
