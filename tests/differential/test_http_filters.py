"""HTTP filters: RBAC, fault, local rate limit, CORS, header mutation, health check, buffer; their per-route configuration."""

from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Request,
    Response,
    Rig,
    answer,
    bootstrap,
    check_cases,
    cluster,
    filter_,
    get,
    http,
    req,
    y,
)


def route(prefix: str, filters: dict[str, Any] | None = None, **fields: Any) -> dict:
    """A route to cluster a with per-route filter configuration."""
    return {"match": {"prefix": prefix}, "route": {"cluster": "a"}} | ({"typed_per_filter_config": filters} if filters else {}) | fields


def host(*routes: dict, **fields: Any) -> list[dict]:
    return [{"name": "all", "domains": ["*"], "routes": [*routes, route("/")], **fields}]


DISABLED = {"@": "filter_config", "disabled": True}

# ---- RBAC
POLICIES = y("""
admins: {permissions: [{header: {name: x-role, string_match: {exact: admin}}}], principals: [{any: true}]}
get_public:
  permissions: [{and_rules: {rules: [{header: {name: ":method", string_match: {exact: GET}}}, {url_path: {path: {prefix: /public}}}]}}]
  principals: [{any: true}]
not_evil:
  permissions: [{url_path: {path: {exact: /checked}}}]
  principals: [{not_id: {header: {name: x-evil, present_match: true}}}]
from_loopback:
  permissions: [{url_path: {path: {exact: /loopback}}}]
  principals: [{direct_remote_ip: {address_prefix: 127.0.0.0, prefix_len: 8}}]
by_forwarded_address:
  permissions: [{url_path: {path: {exact: /forwarded}}}]
  principals: [{remote_ip: {address_prefix: 9.9.9.0, prefix_len: 24}}]
by_source_ip:
  permissions: [{url_path: {path: {exact: /source}}}]
  principals: [{direct_remote_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}]
or_and_not:
  permissions: [{or_rules: {rules: [{url_path: {path: {exact: /or1}}}, {not_rule: {url_path: {path: {safe_regex: {regex: "/([^n]|n[^o]|no[^t]).*"}}}}}]}}]
  principals:
  - or_ids:
      ids:
      - {header: {name: x-a, string_match: {exact: "1"}}}
      - {and_ids: {ids: [{any: true}, {header: {name: x-b, string_match: {exact: "1"}}}]}}
server_port: {permissions: [{destination_ip: {address_prefix: 127.0.0.1, prefix_len: 32}}], principals: [{header: {name: x-dst, present_match: true}}]}
authenticated: {permissions: [{url_path: {path: {exact: /tls}}}], principals: [{authenticated: {}}]}
query: {permissions: [{header: {name: ":path", string_match: {contains: "secret=1"}}}], principals: [{any: true}]}
sni: {permissions: [{requested_server_name: {exact: ""}}], principals: [{header: {name: x-sni, present_match: true}}]}
""")  # fmt: skip
ALL = {"permissions": [{"any": True}], "principals": [{"any": True}]}
ROLE = {"permissions": [{"any": True}], "principals": [{"header": {"name": "x-role", "string_match": {"exact": "admin"}}}]}
RBAC_ROUTES = host(
    route("/open", {"rbac": {"@": "rbac_per_route"}}),
    route("/strict", {"rbac": {"@": "rbac_per_route", "rbac": {"rules": {"action": "ALLOW", "policies": {"p": ROLE}}}}}),
    route("/disabled", {"rbac": DISABLED}),
)
SHADOW_STATS = {"shadow_rules_stat_prefix": "dry_", "rules_stat_prefix": "real_"}

# ---- fault
FAULT_ROUTES = host(
    route("/off", {"fault": DISABLED}),
    route("/teapot", {"fault": {"@": "fault", "abort": {"http_status": 418, "percentage": {"numerator": 100}}}}),
    route("/delay", {"fault": {"@": "fault", "delay": {"fixed_delay": "0.05s", "percentage": {"numerator": 100}}}}),
    route("/both", {"fault": {"@": "fault", "delay": {"fixed_delay": "0.02s", "percentage": {"numerator": 100}},
                              "abort": {"http_status": 500, "percentage": {"numerator": 100}}}}),
    route("/never", {"fault": {"@": "fault", "abort": {"http_status": 500, "percentage": {"numerator": 0}}}}),
    route("/grpc", {"fault": {"@": "fault", "abort": {"grpc_status": 5, "percentage": {"numerator": 100}}}}),
    route("/matching", {"fault": {"@": "fault", "abort": {"http_status": 500, "percentage": {"numerator": 100}},
                                  "headers": [{"name": "x-break", "present_match": True}]}}),
    route("/cluster", {"fault": {"@": "fault", "abort": {"http_status": 500, "percentage": {"numerator": 100}}, "upstream_cluster": "other"}}),
    route("/headers", {"fault": {"@": "fault", "abort": {"header_abort": {}, "percentage": {"numerator": 100}},
                                 "delay": {"header_delay": {}, "percentage": {"numerator": 100}}}}),
    route("/slow", {"fault": {"@": "fault", "response_rate_limit": {"fixed_limit": {"limit_kbps": 100}, "percentage": {"numerator": 100}}}}),
)  # fmt: skip

# ---- local rate limit
FULL = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}, "runtime_key": "none"}


def bucket(tokens: int) -> dict:
    """A bucket that does not refill while a test runs."""
    return {"max_tokens": tokens, "tokens_per_fill": tokens, "fill_interval": "600s"}


def limit(prefix: str, tokens: int = 1, **fields: Any) -> dict:
    return {"@": "local_ratelimit", "stat_prefix": prefix, "token_bucket": bucket(tokens), "filter_enabled": FULL, "filter_enforced": FULL, **fields}


ADD = {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD", "header": {"key": "x-limited", "value": "yes"}}
BY_USER = [{"actions": [{"request_headers": {"header_name": "x-user", "descriptor_key": "user"}}]}]
LIMIT_ROUTES = host(
    route("/one", {"local_ratelimit": limit("one")}),
    route("/two", {"local_ratelimit": limit("two", 2)}),
    route("/status", {"local_ratelimit": limit("status", 1, status={"code": 503}, response_headers_to_add=[ADD])}),
    route("/low_status", {"local_ratelimit": limit("low_status", 1, status={"code": 200})}),
    route("/xrl", {"local_ratelimit": limit("xrl", 2, enable_x_ratelimit_headers="DRAFT_VERSION_03")}),
    route("/shadow", {"local_ratelimit": limit("shadow", 1) | {"filter_enforced": {"default_value": {"numerator": 0}},
                                                             "request_headers_to_add_when_not_enforced": [ADD]}}),
    route("/grpc", {"local_ratelimit": limit("grpc", 1)}),
    route("/grpc_exhausted", {"local_ratelimit": limit("grpc_exhausted", 1, rate_limited_as_resource_exhausted=True)}),
    route("/default_off", {"local_ratelimit": {"@": "local_ratelimit", "stat_prefix": "default_off", "token_bucket": bucket(1)}}),
    route("/disabled", {"local_ratelimit": DISABLED}),
    {"match": {"prefix": "/by_user"}, "route": {"cluster": "a", "rate_limits": BY_USER}, "typed_per_filter_config": {"local_ratelimit": limit(
        "by_user", 100, descriptors=[
            {"entries": [{"key": "user", "value": "ann"}], "token_bucket": bucket(1)},
            {"entries": [{"key": "user", "value": "bob"}], "token_bucket": bucket(2)},
        ])}},
)  # fmt: skip

# ---- CORS
CORS_POLICY = y("""
"@": cors_policy
allow_origin_string_match: [{exact: "http://good.test"}, {suffix: ".wild.test"}]
allow_methods: "GET, PUT"
allow_headers: "x-custom"
expose_headers: "x-seen"
max_age: "600"
allow_credentials: true
""")
CORS_ROUTES = host(
    route("/plain", {"cors": {"@": "cors_policy", "allow_origin_string_match": [{"prefix": "http"}]}}),
    route("/off", {"cors": {"@": "cors_policy", "filter_enabled": {"default_value": {"numerator": 0}}, "allow_origin_string_match": [{"prefix": "http"}]}}),
    route("/shadow", {"cors": CORS_POLICY | {"filter_enabled": {"default_value": {"numerator": 0}}, "shadow_enabled": {"default_value": {"numerator": 100}}}}),
    route("/star", {"cors": {"@": "cors_policy", "allow_origin_string_match": [{"exact": "*"}], "allow_methods": "*"}}),
    route("/forward", {"cors": CORS_POLICY | {"forward_not_matching_preflights": False}}),
    route("/private", {"cors": CORS_POLICY | {"allow_private_network_access": True}}),
    typed_per_filter_config={"cors": CORS_POLICY},
)


def mutate(*items: str, response: tuple[str, ...] = ()) -> dict:
    """`name=value` appends, `!name=value` overwrites, `-name` removes."""

    def one(item: str) -> dict:
        if item.startswith("-"):
            return {"remove": item[1:]}
        name, _, value = item.lstrip("!").partition("=")
        action = "OVERWRITE_IF_EXISTS_OR_ADD" if item.startswith("!") else "APPEND_IF_EXISTS_OR_ADD"
        return {"append": {"header": {"key": name, "value": value}, "append_action": action}}

    return {"request_mutations": [one(i) for i in items], "response_mutations": [one(i) for i in response]}


MUTATION_ROUTES = host(
    route("/route", {"header_mutation": {"@": "header_mutation_per_route", "mutations": mutate("x-level=route", response=("x-level=route",))}}),
    route("/formats", {"header_mutation": {"@": "header_mutation_per_route", "mutations": mutate(
        "x-copy=%REQ(X-IN)%", "x-empty=%REQ(X-NONE)%", response=("x-code=%RESPONSE_CODE%", "x-method=%REQ(:METHOD)%"))}}),
    typed_per_filter_config={"header_mutation": {"@": "header_mutation_per_route", "mutations": mutate("x-level=host", response=("x-level=host",))}},
)  # fmt: skip

BUFFER_ROUTES = host(
    route("/small", {"buffer": {"@": "buffer_per_route", "buffer": {"max_request_bytes": 4}}}),
    route("/off", {"buffer": {"@": "buffer_per_route", "disabled": True}}),
    route("/disabled", {"buffer": DISABLED}),
)

HEALTH = {"headers": [{"name": ":path", "string_match": {"exact": "/healthz"}}]}
CONFIG = bootstrap(
    http("rbac_allow", RBAC_ROUTES, filters=[filter_("rbac", rules={"action": "ALLOW", "policies": POLICIES})]),
    http("rbac_deny", RBAC_ROUTES, filters=[filter_("rbac", rules={"action": "DENY", "policies": POLICIES})]),
    http("rbac_nobody", host(), filters=[filter_("rbac", rules={"action": "ALLOW", "policies": {}})]),
    http("rbac_no_rules", host(), filters=[filter_("rbac")]),
    http("rbac_log", host(), filters=[filter_("rbac", rules={"action": "LOG", "policies": {"p": ROLE}})]),
    http("rbac_shadow", host(), filters=[
        filter_("rbac", rules={"action": "ALLOW", "policies": {"all": ALL}}, shadow_rules={"action": "ALLOW", "policies": {"p": ROLE}}, **SHADOW_STATS)]),
    http("fault", FAULT_ROUTES, filters=[filter_("fault")]),
    http("fault_all", FAULT_ROUTES, filters=[filter_("fault", abort={"http_status": 503, "percentage": {"numerator": 100}})]),
    http("limit", LIMIT_ROUTES, filters=[filter_("local_ratelimit", stat_prefix="main")]),
    http("limit_all", host(), filters=[filter_("local_ratelimit", **{k: v for k, v in limit("all", 1, ).items() if k != "@"},
                                              local_rate_limit_per_downstream_connection=True)]),
    http("cors", CORS_ROUTES, filters=[filter_("cors")]),
    http("mutation", MUTATION_ROUTES, filters=[
        filter_("header_mutation", mutations=mutate("x-level=filter", "-x-gone", response=("x-level=filter", "-server")))]),
    http("health", host(), filters=[filter_("health_check", pass_through_mode=False, **HEALTH)]),
    http("health_pass", host(), filters=[filter_("health_check", pass_through_mode=True, **HEALTH)]),
    http("health_cached", host(), filters=[filter_("health_check", pass_through_mode=True, cache_time="600s", **HEALTH)]),
    http("health_clusters", host(), filters=[
        filter_("health_check", pass_through_mode=False, cluster_min_healthy_percentages={"a": {"value": 50}, "nobody": {"value": 1}}, **HEALTH)]),
    http("buffer", BUFFER_ROUTES, filters=[filter_("buffer", max_request_bytes=16)]),
    http("off_by_default", host(route("/on", {"fault": {"@": "filter_config", "disabled": False, "config": {"@": "fault", "abort": {
        "http_status": 418, "percentage": {"numerator": 100}}}}})),
        filters=[filter_("fault", abort={"http_status": 503, "percentage": {"numerator": 100}}) | {"disabled": True}]),
    clusters=[cluster("a"), cluster("nobody", localities=[{"lb_endpoints": []}])],
)  # fmt: skip


def case(on: str, name: str, request: bytes, up: Any = None, **fields: Any) -> Case:
    return Case(f"{on}_{name}", request, up or [Request(), OK], on=on, **fields)


def repeated(on: str, path: str, count: int, *lines: str, method: str = "GET") -> Case:
    """The same request several times on one connection."""
    step = req(method, path, *lines)
    return Case(f"{on}{path.replace('/', '_')}{'_' + lines[0][-3:] if lines else ''}", [part for _ in range(count) for part in (step, Response())], on=on)


RBAC_REQUESTS = {
    "nothing": get("/x"),
    "admin": get("/x", "X-Role: admin"),
    "public": get("/public/x"),
    "public_post": req("POST", "/public/x"),
    "public_traversal": get("/public/../x"),
    "checked": get("/checked"),
    "checked_query": get("/checked?a=b"),
    "evil": get("/checked", "X-Evil: 1"),
    "loopback": get("/loopback"),
    "forwarded": get("/forwarded", "X-Forwarded-For: 9.9.9.9"),
    "forwarded_other": get("/forwarded", "X-Forwarded-For: 8.8.8.8"),
    "source": get("/source", "X-Forwarded-For: 10.1.1.1"),
    "or_first": get("/or1", "X-A: 1"),
    "or_second": get("/or1", "X-B: 1"),
    "or_neither": get("/or1"),
    "not_rule": get("/not/x", "X-A: 1"),
    "destination": get("/x", "X-Dst: 1"),
    "tls": get("/tls"),
    "query": get("/x?secret=1"),
    "sni": get("/x", "X-Sni: 1"),
    "post_with_body": req("POST", "/x", body=b"hello"),
    "head": req("HEAD", "/x"),
    "grpc": req("POST", "/x", "Content-Type: application/grpc"),
    "open_route": get("/open"),
    "strict_route": get("/strict"),
    "strict_route_admin": get("/strict", "X-Role: admin"),
    "disabled_route": get("/disabled"),
}
ORIGIN = "Origin: http://good.test"
PREFLIGHT = ["Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: x-custom"]


async def failing_health(rig: Rig) -> Any:
    """The health check filter and ordinary responses while the admin has set the health check to fail."""
    before = await rig.get(get("/healthz"), "health")
    told = (await rig.proxy.admin("POST", "/healthcheck/fail"))[1]
    during = [await rig.get(get("/healthz"), "health"), await rig.get(get("/x"), "health"), await rig.get(get("/healthz"), "health_pass")]
    back = (await rig.proxy.admin("POST", "/healthcheck/ok"))[1]
    return [before, told, *during, back, await rig.get(get("/healthz"), "health")]


CASES = [
    *[case(on, name, request) for on in ("rbac_allow", "rbac_deny") for name, request in RBAC_REQUESTS.items()],
    case("rbac_nobody", "denied", get("/")),
    case("rbac_no_rules", "allowed", get("/")),
    case("rbac_log", "never_denies", get("/")),
    case("rbac_shadow", "denied", get("/")),
    case("rbac_shadow", "allowed", get("/", "X-Role: admin")),
    # ---- fault
    *[case("fault", path[1:], get(path)) for path in ("/none", "/teapot", "/delay", "/both", "/never", "/cluster", "/matching", "/headers")],
    case("fault", "teapot_head", req("HEAD", "/teapot")),
    case("fault", "teapot_post", req("POST", "/teapot", body=b"hello")),
    case("fault", "teapot_grpc", req("POST", "/teapot", "Content-Type: application/grpc")),
    case("fault", "grpc_status", req("POST", "/grpc", "Content-Type: application/grpc")),
    case("fault", "grpc_status_to_http", get("/grpc")),
    case("fault", "matching_header", get("/matching", "X-Break: 1")),
    case("fault", "abort_by_header", get("/headers", "x-envoy-fault-abort-request: 503")),
    case("fault", "abort_by_header_bad_request", get("/headers", "x-envoy-fault-abort-request: 400")),
    case("fault", "abort_by_bad_header", get("/headers", "x-envoy-fault-abort-request: 42")),
    case("fault", "abort_by_grpc_header", req("POST", "/headers", "Content-Type: application/grpc", "x-envoy-fault-abort-grpc-request: 7")),
    case("fault", "abort_by_header_percentage_0", get("/headers", "x-envoy-fault-abort-request: 503", "x-envoy-fault-abort-request-percentage: 0")),
    case("fault", "delay_by_header", get("/headers", "x-envoy-fault-delay-request: 20")),
    case("fault", "abort_header_without_configuration", get("/none", "x-envoy-fault-abort-request: 503")),
    case("fault", "slow_response", get("/slow"), [Request(), answer(body=b"x" * 3000)]),
    case("fault_all", "aborted", get("/")),
    case("fault_all", "off_for_route", get("/off")),
    case("off_by_default", "off", get("/")),
    case("off_by_default", "on_for_route", get("/on")),
    # ---- local rate limit
    repeated("limit", "/one", 3),
    repeated("limit", "/two", 3),
    repeated("limit", "/status", 2),
    repeated("limit", "/low_status", 2),
    repeated("limit", "/xrl", 3),
    repeated("limit", "/shadow", 2),
    repeated("limit", "/grpc", 2, "Content-Type: application/grpc", method="POST"),
    repeated("limit", "/grpc_exhausted", 2, "Content-Type: application/grpc", method="POST"),
    repeated("limit", "/default_off", 2),
    repeated("limit", "/disabled", 2),
    repeated("limit", "/none", 2),
    repeated("limit", "/by_user", 3, "X-User: ann"),
    repeated("limit", "/by_user", 3, "X-User: bob"),
    repeated("limit", "/by_user", 3, "X-User: cyd"),
    repeated("limit", "/by_user", 2),
    Case("limit_per_connection", [get(), Response(), get(), Response()], on="limit_all"),
    Case("limit_per_connection_again", [get(), Response(), get(), Response()], on="limit_all"),
    # ---- CORS
    case("cors", "no_origin", get("/")),
    case("cors", "good_origin", get("/", ORIGIN), [Request(), answer(access_control_allow_origin="theirs")]),
    case("cors", "wild_origin", get("/", "Origin: https://a.wild.test")),
    case("cors", "bad_origin", get("/", "Origin: http://bad.test")),
    case("cors", "empty_origin", get("/", "Origin:")),
    case("cors", "preflight", req("OPTIONS", "/", ORIGIN, *PREFLIGHT)),
    case("cors", "preflight_bad_origin", req("OPTIONS", "/", "Origin: http://bad.test", *PREFLIGHT)),
    case("cors", "preflight_without_method", req("OPTIONS", "/", ORIGIN)),
    case("cors", "preflight_private_network", req("OPTIONS", "/private", ORIGIN, *PREFLIGHT, "Access-Control-Request-Private-Network: true")),
    case("cors", "preflight_not_forwarded", req("OPTIONS", "/forward", "Origin: http://bad.test", *PREFLIGHT)),
    *[case("cors", f"{kind}_{path}", req(method, f"/{path}", ORIGIN, *lines))
      for path in ("plain", "off", "shadow", "star") for kind, method, lines in (("get", "GET", []), ("preflight", "OPTIONS", PREFLIGHT))],
    # ---- header mutation
    *[case("mutation", path[1:], get(path, "X-Gone: 1", "X-In: in", "X-Level: client"), [Request(), answer(x_level="upstream", server="origin")])
      for path in ("/route", "/formats", "/other")],
    # ---- health check
    case("health", "healthy", get("/healthz")),
    case("health", "head", req("HEAD", "/healthz")),
    case("health", "other_path", get("/other")),
    case("health", "query_does_not_match", get("/healthz?x")),
    case("health_pass", "goes_to_upstream", get("/healthz"), [Request(), answer("201 Created")]),
    Case("health_cached_once", [get("/healthz"), Response(), get("/healthz"), Response()], [Request(), answer("201 Created")], on="health_cached"),
    case("health_clusters", "one_too_few", get("/healthz")),
    Case("healthcheck_fail", failing_health, on="health"),
    # ---- buffer
    case("buffer", "no_body", get("/")),
    case("buffer", "fits", req("POST", "/", body=b"0123456789abcdef")),
    case("buffer", "too_large", req("POST", "/", body=b"0123456789abcdefg"), then="closed"),
    case("buffer", "chunked_gets_length", req("POST", "/", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n")),
    case("buffer", "chunked_too_large", req("POST", "/", "Transfer-Encoding: chunked", body=b"14\r\n" + b"x" * 20 + b"\r\n0\r\n\r\n"), then="closed"),
    Case("buffer_waits_for_whole_body", [req("POST", "/", "Content-Length: 10") + b"half", b"-other", Response("POST")], on="buffer"),
    case("buffer", "small_route_too_large", req("POST", "/small", body=b"hello"), then="closed"),
    case("buffer", "small_route_fits", req("POST", "/small", body=b"four")),
    case("buffer", "off_route", req("POST", "/off", body=b"x" * 100)),
    case("buffer", "disabled_route", req("POST", "/disabled", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n")),
]  # fmt: skip

test_case = check_cases(CASES)
