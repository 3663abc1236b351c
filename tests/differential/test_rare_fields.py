"""Fields that few set: of connection managers, routes, HTTP filters and listeners, each with what it changes."""

from __future__ import annotations

from typing import Any

from tests.differential.harness import Case, Head, Play, Request, Response, answer, bootstrap, check_cases, cluster, each, file_log, filter_, get, http, req

ALWAYS = {"numerator": 100}
FULL = {"default_value": ALWAYS, "runtime_key": "none"}
ADDRESSES = [file_log("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% %REQ(X-FORWARDED-FOR)%\n")]


def route(path: str, *, match: dict | None = None, config: dict | None = None, fields: dict | None = None, **action: Any) -> dict:
    """A route by prefix to the cluster a."""
    filters = {"typed_per_filter_config": config} if config else {}
    return {"match": {"prefix": path, **(match or {})}, "route": {"cluster": "a", **action}, **filters, **(fields or {})}


def hosts(*routes: dict, **fields: Any) -> list[dict]:
    return [{"name": "all", "domains": ["*"], "routes": [*routes, route("/")], **fields}]


# ---- rate limit actions: each route has a bucket of one token for what its actions say of a request
def limited(path: str, *actions: dict, key: str, value: str, **fields: Any) -> dict:
    bucket = {"max_tokens": 100, "tokens_per_fill": 100, "fill_interval": "600s"}
    one = {"max_tokens": 1, "tokens_per_fill": 1, "fill_interval": "600s"}
    limit = {"@": "local_ratelimit", "stat_prefix": "limited", "token_bucket": bucket, "filter_enabled": FULL, "filter_enforced": FULL,
             "descriptors": [{"entries": [{"key": key, "value": value}], "token_bucket": one}]}  # fmt: skip
    return route(path, config={"local_ratelimit": limit}, rate_limits=[{"actions": list(actions), **fields}])


X_MATCH = {"name": "x-a", "string_match": {"exact": "1"}}
Q_MATCH = {"name": "q", "string_match": {"exact": "1"}}
LIMITED = hosts(
    limited("/source", {"source_cluster": {}}, key="source_cluster", value="test-cluster"),
    limited("/destination", {"destination_cluster": {}}, key="destination_cluster", value="a"),
    limited("/remote", {"remote_address": {}}, key="remote_address", value="127.0.0.1"),
    limited("/masked", {"masked_remote_address": {"v4_prefix_mask_len": 8}}, key="masked_remote_address", value="127.0.0.0/8"),
    limited("/generic", {"generic_key": {"descriptor_value": "v"}}, key="generic_key", value="v"),
    limited("/named", {"generic_key": {"descriptor_value": "v", "descriptor_key": "k"}}, key="k", value="v"),
    limited("/header", {"header_value_match": {"descriptor_value": "v", "headers": [X_MATCH]}}, key="header_match", value="v"),
    limited("/no-header", {"header_value_match": {"descriptor_value": "v", "headers": [X_MATCH], "expect_match": False}}, key="header_match", value="v"),
    limited("/query", {"query_parameter_value_match": {"descriptor_value": "v", "query_parameters": [Q_MATCH]}}, key="query_match", value="v"),
    limited("/no-query", {"query_parameter_value_match": {"descriptor_value": "v", "query_parameters": [Q_MATCH], "expect_match": False}},
            key="query_match", value="v"),
    limited("/parameter", {"query_parameters": {"query_parameter_name": "q", "descriptor_key": "k"}}, key="k", value="1"),
    limited("/stage", {"generic_key": {"descriptor_value": "v"}}, key="generic_key", value="v", stage=1),
    limited("/stranger", {"generic_key": {"descriptor_value": "w"}}, key="generic_key", value="v"),
)  # fmt: skip


def twice(path: str, *headers: str, name: str = "") -> Case:
    """The first takes the token."""
    request = get(path, *headers)
    return Case(f"limit{name or path.replace('/', '_')}", [request, Response(), request, Response()], on="limits")


# ---- header mutations
SET = {"header": {"key": "x-set", "value": "%REQ(X-A)%"}}
MUTATIONS = {
    "query_parameter_mutations": [
        {"append": {"record": {"key": "added", "value": "a b&c"}, "action": "APPEND_IF_EXISTS_OR_ADD"}},
        {"append": {"record": {"key": "once", "value": "new"}, "action": "ADD_IF_ABSENT"}},
        {"append": {"record": {"key": "over", "value": "%REQ(X-A)%"}, "action": "OVERWRITE_IF_EXISTS"}},
        {"append": {"record": {"key": "set", "value": "1"}, "action": "OVERWRITE_IF_EXISTS_OR_ADD"}},
        {"remove": "gone"},
    ],
    "request_mutations": [{"remove_on_match": {"key_matcher": {"prefix": "x-drop"}}}],
    "response_mutations": [{"remove_on_match": {"key_matcher": {"suffix": "-secret"}}}],
    "response_trailers_mutations": [{"append": {"header": {"key": "x-more", "value": "t"}}}, {"remove": "x-gone"}],
    "request_trailers_mutations": [{"append": {"header": {"key": "x-more", "value": "t"}}}, {"remove": "x-gone"}],
}
TRAILERS = {"enable_trailers": True}
CHUNKED = "Transfer-Encoding: chunked"
WITH_TRAILERS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-a-secret: 1\r\nx-b: 2\r\n\r\n2\r\nok\r\n0\r\nx-gone: 1\r\nx-here: 1\r\n\r\n"

# ---- faults
RUNTIME = {"my.delay": 0, "my.abort": 100, "my.status": 418, "my.grpc": 5, "my.active": 0}


def fault(**fields: Any) -> dict:
    return {"fault": {"@": "fault", **fields}}


ABORT = {"http_status": 500, "percentage": ALWAYS}
FAULTS = hosts(
    route("/runtime-off", config=fault(abort=ABORT, abort_percent_runtime="my.delay")),
    route("/runtime-on", config=fault(abort={"http_status": 500, "percentage": {"numerator": 0}}, abort_percent_runtime="my.abort")),
    route("/runtime-status", config=fault(abort=ABORT, abort_http_status_runtime="my.status")),
    route("/runtime-grpc", config=fault(abort={"grpc_status": 3, "percentage": ALWAYS}, abort_grpc_status_runtime="my.grpc")),
    route("/runtime-delay", config=fault(delay={"fixed_delay": "9s", "percentage": ALWAYS}, delay_percent_runtime="my.delay")),
    route("/runtime-duration", config=fault(delay={"fixed_delay": "9s", "percentage": ALWAYS}, delay_duration_runtime="my.abort")),
    route("/none-active", config=fault(abort=ABORT, max_active_faults=0)),
    route("/none-active-by-runtime", config=fault(abort=ABORT, max_active_faults=9, max_active_faults_runtime="my.active")),
    route("/no-stats", config=fault(abort=ABORT, disable_downstream_cluster_stats=True)),
    route("/nodes", config=fault(abort=ABORT, downstream_nodes=["one"])),
)  # fmt: skip
SERVICE = "X-Envoy-Downstream-Service-Cluster: caller"

# ---- routes
CANARY = {"append": {"header": {"key": "x-mirrored", "value": "yes"}}}
ROUTES = hosts(
    route("/small", fields={"request_body_buffer_limit": 4}, retry_policy={"retry_on": "5xx", "retry_back_off": {"base_interval": "0.001s"}}),
    route("/mirrored", request_mirror_policies=[{"cluster": "m", "request_headers_mutations": [CANARY, {"remove": "x-a"}]}]),
    route("/mirrored-elsewhere", request_mirror_policies=[{"cluster": "m", "host_rewrite_literal": "other.test", "disable_shadow_host_suffix_append": True}]),
    {"match": {"path": "/exact"}, "route": {"cluster": "a", "prefix_rewrite": "/was-exact"}},
    {"match": {"safe_regex": {"regex": "/re[0-9]+"}}, "direct_response": {"status": 202}},
)
WEIGHTED = [{"name": "w", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"weighted_clusters": {
    "runtime_key_prefix": "weights", "clusters": [{"name": "a", "weight": 100}, {"name": "m", "weight": 0}]}}}]}]  # fmt: skip
POST = [{"name": "p", "domains": ["*"], "routes": [{"match": {"connect_matcher": {}}, "route": {"cluster": "a", "upgrade_configs": [
    {"upgrade_type": "CONNECT", "connect_config": {"allow_post": True}}]}}, route("/")]}]  # fmt: skip
PROPER = {"header_key_format": {"stateful_formatter": {"name": "p", "typed_config": {
    "@": "preserve_case", "forward_reason_phrase": True, "formatter_type_on_envoy_headers": "PROPER_CASE"}}}}  # fmt: skip
REASON = {"header_key_format": {"stateful_formatter": {"name": "p", "typed_config": {"@": "preserve_case", "forward_reason_phrase": True}}}}
XFF = {"name": "xff", "typed_config": {"@": "xff", "xff_num_trusted_hops": 1, "skip_xff_append": False}}
STRICT = ["x-envoy-upstream-rq-timeout-ms", "x-envoy-upstream-rq-per-try-timeout-ms", "x-envoy-max-retries", "x-envoy-retry-on", "x-envoy-retry-grpc-on"]
LOCAL = {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}
INTERNAL = "X-Forwarded-For: 127.0.0.9"
JSON = {"json_format": {"z": "%REQ(:PATH)%", "a": {"y": "%RESPONSE_CODE%", "b": "%REQ(X-A)%"}, "n": None}, "json_format_options": {"sort_properties": False},
        "omit_empty_values": True}  # fmt: skip

CONFIG = bootstrap(
    http("main", ROUTES),
    http("limits", LIMITED, filters=[filter_("local_ratelimit", stat_prefix="none")]),
    http("mutated", hosts(), filters=[filter_("header_mutation", mutations=MUTATIONS)], http_protocol_options=TRAILERS),
    http("faults", FAULTS, filters=[filter_("fault")]),
    http("parameters", hosts(), route_config={"ignore_path_parameters_in_path_matching": True, "virtual_hosts": ROUTES}),
    http("weighted", WEIGHTED),
    http("connect_post", POST),
    http("custom", hosts(), http_protocol_options={"allow_custom_methods": True}),
    http("cased", hosts(), http_protocol_options=PROPER),
    http("cased_up", hosts(route("/up", cluster="cased_up"), route("/reason", cluster="reason")), http_protocol_options=PROPER),
    http("uncased", hosts(route("/up", cluster="cased_up"), route("/reason", cluster="reason"))),
    http("strict", hosts(), http_filters=[filter_("router", strict_check_headers=STRICT)], internal_address_config=LOCAL),
    http("no_grpc_stats", hosts(), http_filters=[filter_("router", suppress_grpc_request_failure_code_stats=True)]),
    http("xff", hosts(), original_ip_detection_extensions=[XFF], access_log=ADDRESSES),
    http("json", hosts(), access_log=[file_log(log_format=JSON)]),
    http("json_sorted", hosts(), access_log=[file_log(log_format=JSON | {"json_format_options": {"sort_properties": True}})]),
    clusters=[
        cluster("a"),
        cluster("m", "b"),
        cluster("cased_up", "a", http_protocol_options=PROPER),
        cluster("reason", "a", http_protocol_options=REASON),
    ],
    layered_runtime={"layers": [{"name": "s", "static_layer": RUNTIME | {"weights.a": 0, "weights.m": 100}}]},
)
NOT_OK = [Request(), answer("503 Busy", b"busy")]

CASES = [
    *(twice(path) for path in ("/source", "/destination", "/remote", "/masked", "/generic", "/named", "/stage", "/stranger")),
    *(twice(path, *headers, name=f"{path.replace('/', '_')}_{len(headers)}") for path in ("/header", "/no-header") for headers in ((), ("X-A: 1",))),
    *(twice(path, name=path.replace("/", "_").replace("?", "_")) for path in ("/query", "/query?q=1", "/query?q=2", "/no-query", "/no-query?q=1",
                                                                             "/parameter", "/parameter?q=1", "/parameter?q=2")),
    # ---- header mutations
    *(Case(f"query_{number}", get(path, "X-A: v w"), on="mutated") for number, path in enumerate((
        "/", "/?", "/?once=old&over=x&gone=1&a", "/?set=0&set=2&gone&gone=", "/?a=1&added=x#f", "/?over=&once="))),
    Case("query_value_is_missing", get("/?over=1"), on="mutated"),
    Case("removed_by_name", get("/", "X-Drop: 1", "X-Drop-2: 2", "X-Dro: 3", "x-dropped: 4"), on="mutated"),
    Case("response_removed_by_name_and_trailers", get("/"), [Head(), WITH_TRAILERS], on="mutated"),
    Case("request_trailers", [req("POST", "/", CHUNKED, body=b"2\r\nhi\r\n0\r\nx-gone: 1\r\nx-here: 1\r\n\r\n"), Response()], on="mutated"),
    # ---- faults
    *(Case(f"fault{path.replace('/', '_').replace('-', '_')}", get(path, SERVICE), on="faults") for path in (
        "/runtime-off", "/runtime-on", "/runtime-status", "/runtime-grpc", "/runtime-delay", "/runtime-duration", "/none-active", "/none-active-by-runtime",
        "/no-stats", "/nodes")),
    Case("fault_of_a_node", get("/nodes", "X-Envoy-Downstream-Service-Node: one"), on="faults"),
    Case("fault_status_by_runtime_of_the_caller", get("/runtime-status"), on="faults"),
    # ---- routes
    Case("body_within_its_limit", [req("POST", "/small", body=b"1234"), Response()], each(NOT_OK, [Request(), answer()])),
    Case("body_beyond_its_limit", [req("POST", "/small", body=b"12345"), Response()], each(NOT_OK, [Request(), answer()])),
    Case("mirror_has_headers_of_its_own", get("/mirrored", "X-A: 1", "X-B: 2"), Play([[Request(), answer()]]), skip=("stats",)),
    Case("mirror_has_a_host_of_its_own", get("/mirrored-elsewhere"), Play([[Request(), answer()]]), skip=("stats",)),
    *(Case(f"parameters_{number}", get(path), on="parameters") for number, path in enumerate((
        "/exact;a=b", "/exact;", "/exact", "/exact;a?b", "/exact/;a", "/re1;x", "/re1;x=1/y", "/small;a", "/re;1"))),
    Case("parameters_count_without", get("/exact;a=b")),
    Case("weights_by_runtime", get("/"), on="weighted"),
    *(Case(f"method_{on}_{method.replace('!', '_')}", [req(method, "/"), Response()], on=on)
      for on, methods in (("main", ("PURGE",)), ("custom", ("PURGE", "X!Y", "get"))) for method in methods),
    *(Case(f"case_and_reason_{on}{path.replace('/', '_')}", get(path, "X-CamelCase: 1", "x-lower: 2"),
           [Request(), b"HTTP/1.1 200 Fine Then\r\nX-CaMeL: 1\r\nContent-Length: 0\r\n\r\n"], on=on)
      for on in ("main", "cased", "cased_up", "uncased") for path in ("/", "/up", "/reason")),
    *(Case(f"strict_{name}_{number}", get("/", f"{name}: {value}", INTERNAL), on="strict") for name in STRICT
      for number, value in enumerate(("100000", "x", "", "5xx", "unavailable", "5xx,nonsense"))),
    Case("grpc_failure_not_counted", [req("POST", "/s/m", "Content-Type: application/grpc"), Response()],
         [Request(), answer("200 OK", b"", content_type="application/grpc", grpc_status="14")], on="no_grpc_stats"),
    *(Case(f"xff_{number}", get("/", *values), on="xff") for number, values in enumerate((
        (), ("X-Forwarded-For: 1.2.3.4",), ("X-Forwarded-For: 1.2.3.4, 5.6.7.8",), ("X-Forwarded-For: a, b",),
        ("X-Forwarded-For: ::1, 2001:db8::1, 9.9.9.9",)))),
    *(Case(f"{on}_{number}", get("/", *values), on=on) for on in ("json", "json_sorted") for number, values in enumerate(((), ("X-A: 1",)))),
    Case("connect_by_post", [req("POST", "/", host="a.test", body=b"hello"), Response()], [Request(), answer()], on="connect_post"),
]  # fmt: skip

test_case = check_cases(CASES)
