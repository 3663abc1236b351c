"""The ext_authz filter: what the authorisation service is asked, and what becomes of what it says."""

from typing import Any

from tests.differential.authz import allows, ask_http, denies, errs, grpc_play, http_play, says
from tests.differential.harness import (
    Body,
    Case,
    Close,
    Echo,
    Ended,
    Eof,
    Head,
    Headers,
    Play,
    Request,
    Reset,
    Response,
    Rst,
    Script,
    Signal,
    Tls,
    Until,
    Wait,
    ask,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    h2_case,
    h2_cluster,
    http,
    lines,
    listener,
    message,
    reply,
    req,
    y,
)

LOG = file_log(
    "%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% flags=%RESPONSE_FLAGS% cluster=%UPSTREAM_CLUSTER% route=%ROUTE_NAME% "
    "%DYNAMIC_METADATA(envoy.filters.http.ext_authz:said)% rx=%BYTES_RECEIVED% tx=%BYTES_SENT%\n"
)
HOSTS = y("""
- name: all
  domains: ["*"]
  routes:
  - {match: {prefix: /, headers: [{name: x-tier, string_match: {exact: gold}}]}, name: gold, route: {cluster: b}}
  - match: {prefix: /query}
    name: query
    route: {cluster: a}
  - match: {prefix: /direct}
    direct_response: {status: 200, body: {inline_string: direct}}
  - match: {prefix: /nowhere}
    route: {cluster: nowhere}
  - match: {prefix: /, headers: [{name: x-no-route, present_match: true, invert_match: true}]}
    name: all
    route: {cluster: a}
    metadata: {filter_metadata: {of-route: {key: value, deep: {n: 1}}, other: {x: y}}}
""")
GRPC = {"envoy_grpc": {"cluster_name": "h2authz"}, "timeout": "10s"}
HTTP = {"server_uri": {"uri": "http://authz.test/base", "cluster": "authz", "timeout": "10s"}}


def authz(name: str, *, hosts: Any = HOSTS, before: tuple[Any, ...] = (), listener: Any = None, **fields: Any) -> dict[str, Any]:
    """A listener with the filter: by gRPC, unless there is an http_service."""
    service = {} if "http_service" in fields else {"grpc_service": GRPC}
    config = {"transport_api_version": "V3"} | service | fields
    return http(
        name, hosts, filters=[*before, filter_("ext_authz", **config)], access_log=[LOG], listener_fields=listener, route_config={"validate_clusters": False}
    )


def header(key: str, value: str, action: str | int | None = None, *, append: bool | None = None) -> dict[str, Any]:
    option: dict[str, Any] = {"header": {"key": key, "value": value}}
    if action is not None:
        option["append_action"] = action
    if append is not None:
        option["append"] = append
    return option


def patterns(*names: str, how: str = "exact") -> dict[str, Any]:
    return {"patterns": [{how: name} for name in names]}


RESPONSE = {
    "allowed_upstream_headers": patterns("x-up", "x-tier", "x-existing"),
    "allowed_upstream_headers_to_append": patterns("x-append", "x-up-both", "accept"),
    "allowed_client_headers": patterns("x-why", "set-cookie"),
    "allowed_client_headers_on_success": patterns("x-ok", how="prefix"),
    "dynamic_metadata_from_headers": patterns("said", "x-meta"),
}
BODY = {"max_request_bytes": 16}
PARTLY = {"max_request_bytes": 16, "allow_partial_message": True}
RBAC_SHADOW = filter_(
    "rbac",
    shadow_rules={
        "action": "DENY",
        "policies": {"of-shadow": {"permissions": [{"header": {"name": "x-check", "present_match": True}}], "principals": [{"any": True}]}},
    },
    shadow_rules_stat_prefix="istio_ext_authz_",
)
NEVER = {"default_value": {"numerator": 0}}
RULES = {"disallow_expression": {"google_re2": {}, "regex": "x-bad.*"}, "allow_expression": {"google_re2": {}, "regex": "x-envoy-mine"}}


def per_route(**routes: Any) -> list[Any]:
    """Routes /<name>, each with these ExtAuthzPerRoute fields; the virtual host says something too."""
    made = []
    for name, fields in routes.items():
        config = {"@": "filter_config", "disabled": True} if fields == "off" else {"@": "ext_authz_per_route", **fields}
        made.append({"match": {"prefix": f"/{name}"}, "route": {"cluster": "a"}, "typed_per_filter_config": {"ext_authz": config}})
    made.append({"match": {"prefix": "/"}, "route": {"cluster": "a"}})
    host = {
        "@": "ext_authz_per_route",
        "check_settings": {"context_extensions": {"host": "yes", "both": "host"}, "with_request_body": {"max_request_bytes": 4}},
    }
    return [{"name": "all", "domains": ["*"], "routes": made, "typed_per_filter_config": {"ext_authz": host}}]


ROUTES = per_route(
    disabled={"disabled": True},
    off="off",
    told={"check_settings": {"context_extensions": {"both": "route", "route": "yes"}}},
    bodiless={"check_settings": {"disable_request_body_buffering": True}},
    longer={"check_settings": {"with_request_body": {"max_request_bytes": 64}}},
    partly={"check_settings": {"with_request_body": {"max_request_bytes": 4, "allow_partial_message": True}}},
    elsewhere={"check_settings": {"http_service": HTTP | {"path_prefix": "/prefix", "authorization_response": {"allowed_upstream_headers": patterns("x-up")}}}},
    other={
        "check_settings": {
            "grpc_service": {"envoy_grpc": {"cluster_name": "h2other", "authority": "other.test"}, "initial_metadata": [{"key": "x-own", "value": "1"}]}
        }
    },
)
TLS = {
    "name": "tls",
    "typed_config": {
        "@": "downstream_tls",
        "require_client_certificate": False,
        "common_tls_context": {
            "tls_certificates": [{"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}],
            "validation_context": {"trusted_ca": {"filename": "${pem:ca}"}},
        },
    },
}


def with_tls(name: str, **fields: Any) -> dict[str, Any]:
    made = authz(name, **fields)
    made["filter_chains"][0]["transport_socket"] = TLS
    return made


CONFIG = bootstrap(
    authz("grpc"),
    authz("raw", encode_raw_headers=True),
    authz("validating", validate_mutations=True),
    authz("clearing", clear_route_cache=True),
    authz("open", failure_mode_allow=True, failure_mode_allow_header_add=True, stat_prefix="waf"),
    authz("quietly_open", failure_mode_allow=True),
    authz("own_status", status_on_error={"code": 503}),
    authz("body", with_request_body=BODY),
    authz("body_bytes", with_request_body=BODY | {"pack_as_bytes": True}),
    authz("body_raw", with_request_body=PARTLY, encode_raw_headers=True),
    authz("partly", with_request_body=PARTLY),
    authz("narrow", allowed_headers=patterns("x-a", ":path"), disallowed_headers=patterns("x-a-not", how="prefix")),
    authz("disallowing", disallowed_headers=patterns("x-a", ":method")),
    authz("metadata", metadata_context_namespaces=["envoy.filters.http.rbac", "nobody"], route_metadata_context_namespaces=["of-route"], before=(RBAC_SHADOW,)),
    authz(
        "shadow",
        before=(RBAC_SHADOW,),
        filter_enabled_metadata={
            "filter": "envoy.filters.http.rbac",
            "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
            "value": {"string_match": {"prefix": "of-"}},
        },
    ),
    authz("never", filter_enabled=NEVER),
    authz("never_denies", filter_enabled=NEVER, deny_at_disable={"default_value": True, "runtime_key": "deny"}, status_on_error={"code": 429}),
    authz("prefixed", stat_prefix="waf."),
    authz("labelled", bootstrap_metadata_labels_key="labels", include_tls_session=True, include_peer_certificate=True),
    authz("uncharged", charge_cluster_response_stats=False),
    authz("ruled", decoder_header_mutation_rules=RULES),
    authz("ruled_strictly", decoder_header_mutation_rules={"disallow_all": True, "disallow_is_error": True}),
    authz("ruled_routing", decoder_header_mutation_rules={"allow_all_routing": True, "allow_envoy": True}),
    authz("no_system", decoder_header_mutation_rules={"allow_all_routing": True, "disallow_system": True}),
    authz("no_metadata", enable_dynamic_metadata_ingestion=False),
    authz("cut", max_denied_response_body_bytes=3),
    authz("limited", enforce_response_header_limits=True),
    authz("slow", grpc_service={"envoy_grpc": {"cluster_name": "h2authz"}, "timeout": "0.05s"}),
    authz("default_time", grpc_service={"envoy_grpc": {"cluster_name": "h2authz"}}),
    authz("own_metadata", grpc_service=GRPC | {"initial_metadata": [{"key": "x-own", "value": "1"}, {"key": "x-computed", "value": "%REQ(x-a)%"}]}),
    authz("dead", grpc_service={"envoy_grpc": {"cluster_name": "dead"}}),
    authz("routes", hosts=ROUTES),
    authz("stats", emit_filter_state_stats=True, filter_metadata={"a": "b"}),
    with_tls("tls", listener={"listener_filters": [filter_("tls_inspector")]}, include_tls_session=True, include_peer_certificate=True),
    authz("http", http_service=HTTP),
    authz(
        "http_more",
        http_service=HTTP
        | {
            "path_prefix": "/check",
            "authorization_request": {"headers_to_add": [{"key": "x-added", "value": "1"}, {"key": "x-b", "value": "%PROTOCOL%"}]},
            "authorization_response": RESPONSE,
        },
        allowed_headers=patterns("x-", how="prefix"),
    ),
    authz("http_old", http_service=HTTP | {"authorization_request": {"allowed_headers": patterns("x-a")}}, disallowed_headers=patterns("authorization")),
    authz("http_clearing", http_service=HTTP | {"authorization_response": RESPONSE}, clear_route_cache=True),
    authz("http_body", http_service=HTTP, with_request_body=PARTLY, allowed_headers=patterns("content-type", "x-envoy-auth-partial-body")),
    authz("http_raw", http_service=HTTP, encode_raw_headers=True, allowed_headers=patterns("x-a", "cookie")),
    authz("http_open", http_service=HTTP, failure_mode_allow=True),
    authz("http_status", http_service=HTTP, status_on_error={"code": 503}),
    authz("http_slow", http_service=HTTP | {"server_uri": {"uri": "http://x/", "cluster": "authz", "timeout": "0.05s"}}),
    authz(
        "http_retry",
        http_service=HTTP | {"retry_policy": {"retry_on": "5xx", "num_retries": 1, "retry_back_off": {"base_interval": "0.001s", "max_interval": "10s"}}},
    ),
    authz("http_dead", http_service=HTTP | {"server_uri": {"uri": "http://x/", "cluster": "dead", "timeout": "10s"}}),
    clusters=[cluster("a"), cluster("b"), cluster("authz"), h2_cluster("h2authz"), h2_cluster("h2other"), cluster("dead", "dead")],
) | {"node": {"id": "test-node", "cluster": "test-cluster", "metadata": {"labels": {"app": "a", "n": 1}}}}


def case(on: str, name: str, script: Script | bytes, *said: Script, **fields: Any) -> Case:
    return Case(f"{on}_{name}", script, {"h2authz": grpc_play(*said), "h2other": grpc_play(*said)}, on=on, **fields)


def by_http(on: str, name: str, script: Script | bytes, *said: Any, **fields: Any) -> Case:
    return Case(f"{on}_{name}", script, {"authz": http_play(*said)}, on=on, **fields)


ADD, ABSENT, OVER, EXISTING = "APPEND_IF_EXISTS_OR_ADD", "ADD_IF_ABSENT", "OVERWRITE_IF_EXISTS_OR_ADD", "OVERWRITE_IF_EXISTS"
SENT = ("X-There: 1", "X-There: 2", "X-One: 1", "Cookie: a=b", "Accept: x/y")
ACTIONS = [
    header(key, f"{key}-{action}", action) for action in (ADD, ABSENT, OVER, EXISTING) for key in ("x-there", "x-new-" + action.lower().replace("_", "-"))
]

GRPC_CASES = [
    case("grpc", "allowed", get("/p?a=b&c#d", *SENT, "Authorization: secret", "X-Envoy-Auth-Partial-Body: mine")),
    case("grpc", "allowed_post", req("POST", "/p", body=b"hello")),
    case("grpc", "allowed_chunked", req("POST", "/p", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n")),
    case("grpc", "not_utf8", get("/p\xff", "X-Bytes: \xe4\xf6 ok \xc3\xa4")),
    h2_case("grpc_h2", ask("GET", "/p"), up={"h2authz": grpc_play()}, on="grpc"),
    h2_case("grpc_h2_body", ask("POST", "/p", body=b"hello"), up={"h2authz": grpc_play()}, on="grpc"),
    case("grpc", "http10", req("GET", "/", version="1.0"), then="closed"),
    case("grpc", "no_route", get("/", "X-No-Route: 1")),
    case("grpc", "direct", get("/direct")),
    case("grpc", "direct_denied", get("/direct"), denies()),
    case("grpc", "nowhere", get("/nowhere")),
    case("grpc", "nowhere_denied", get("/nowhere"), denies()),
    case("grpc", "service_cluster", get("/", "x-envoy-downstream-service-cluster: caller")),
    case("grpc", "twice", [get("/1"), Response(), get("/2"), Response()], allows(), denies()),
    case("raw", "headers", get("/p", *SENT, "X-Bytes: \xe4")),
    # -- denied
    case("grpc", "denied", get("/"), denies()),
    case("grpc", "denied_post", req("POST", "/", body=b"hello"), denies()),
    case("grpc", "denied_status", get("/"), denies(http=401, body="who are you?", headers=[header("www-authenticate", "Basic"), header("x-a", "1")])),
    case(
        "grpc",
        "denied_with_headers",
        get("/"),
        denies(
            headers=[
                header("set-cookie", "a", ADD),
                header("set-cookie", "b", ADD),
                header("content-type", "text/html"),
                header("server", "mine"),
                header("date", "never"),
                header("content-length", "99"),
                header("X-Upper", "1"),
                header(":status", "201"),
            ],
            body="<p>",
        ),
    ),
    case(
        "grpc",
        "denied_actions",
        get("/"),
        denies(
            headers=[
                header("x-a", "1", OVER),
                header("x-a", "2", OVER),
                header("x-b", "1", ABSENT),
                header("x-b", "2", ABSENT),
                header("x-c", "1", EXISTING),
                header("x-d", "1", ADD),
                header("x-d", "2", ADD),
                header("x-d", "3", OVER),
                header("x-e", "1", append=True),
                header("x-e", "2", append=True),
            ]
        ),
    ),
    case("grpc", "denied_empty_body", get("/"), denies(http=401, headers=[header("content-type", "text/html")])),
    case("grpc", "denied_gets_300", get("/"), denies(http=302, headers=[header("location", "/login")])),
    case("grpc", "denied_200", get("/"), denies(http=200, body="fine")),
    case("grpc", "denied_no_response", get("/"), says(16)),
    case("grpc", "denied_ok_response", get("/"), says(16, ok_response={"headers": [header("x-a", "1")]})),
    case("grpc", "ok_denied_response", get("/"), says(0, denied_response={"status": {"code": 401}})),
    case("grpc", "denied_head", req("HEAD", "/"), denies(http=401, body="who")),
    h2_case("grpc_h2_denied", ask("GET", "/"), up={"h2authz": grpc_play(denies(http=401, body="x", headers=[header("x-a", "1")]))}, on="grpc"),
    case(
        "grpc",
        "denied_grpc",
        req("POST", "/s/m", "Content-Type: application/grpc", "TE: trailers"),
        denies(http=401, body="no way", headers=[header("x-a", "1")]),
    ),
    case("grpc", "denied_connection_goes_on", [get("/1"), Response(), get("/2"), Response()], denies(http=401), allows()),
    case("cut", "denied", get("/"), denies(body="12345")),
    case("cut", "short", get("/"), denies(body="123")),
    case("cut", "error", get("/"), errs(body="12345")),
    case("uncharged", "denied", get("/"), denies()),
    case("prefixed", "denied", get("/"), denies()),
    case("prefixed", "allowed", get("/")),
    # -- headers of requests
    case("grpc", "actions", get("/", *SENT), allows(headers=ACTIONS)),
    case(
        "grpc", "actions_default", get("/", *SENT), allows(headers=[header("x-there", "3"), header("x-new", "1"), header("X-Upper", "1"), header("x-one", "2")])
    ),
    case(
        "grpc",
        "append_old",
        get("/", *SENT),
        allows(
            headers=[
                header("x-there", "3", append=True),
                header("x-new", "1", append=True),
                header("x-one", "2", append=True),
                header("cookie", "c=d", append=True),
                header("accept", "z", append=True),
            ]
        ),
    ),
    case("grpc", "append_old_false", get("/", *SENT), allows(headers=[header("x-there", "3", append=False), header("x-new", "1", append=False)])),
    case("grpc", "append_after_set", get("/", *SENT), allows(headers=[header("x-new", "0"), header("x-new", "1", append=True), header("x-new", "2", ADD)])),
    case(
        "grpc",
        "set_after_append",
        get("/", *SENT),
        allows(headers=[header("x-new", "1", ADD), header("x-new", "2", OVER), header("x-there", "1", ADD), header("x-there", "2", OVER)]),
    ),
    case(
        "grpc",
        "inline",
        get("/", *SENT),
        allows(headers=[header("accept", "1", ADD), header("cookie", "c=d", ADD), header("user-agent", "x", OVER), header("authorization", "y", ADD)]),
    ),
    case(
        "grpc",
        "pseudo",
        get("/old?x"),
        allows(headers=[header(":path", "/new"), header(":method", "PUT"), header(":authority", "b.test"), header("host", "c.test")]),
    ),
    case("grpc", "remove", get("/", *SENT), allows(headers_to_remove=["x-there", "X-One", "host", ":path", "absent", "cookie"])),
    case("grpc", "set_and_remove", get("/", *SENT), allows(headers=[header("x-there", "3"), header("x-new", "1")], headers_to_remove=["x-there", "x-new"])),
    case("grpc", "empty_value", get("/", *SENT), allows(headers=[header("x-there", ""), header("x-new", "")])),
    case("grpc", "unknown_action", get("/", *SENT), allows(headers=[header("x-new", "1", 7)])),
    # -- responses
    case(
        "grpc",
        "response",
        get("/"),
        allows(
            response_headers_to_add=[header("x-up", "mine", action) for action in (ADD, ABSENT, OVER, EXISTING)]
            + [header(f"x-new-{n}", "mine", action) for n, action in enumerate((ADD, ABSENT, OVER, EXISTING))]
        ),
    ),
    Case(
        "grpc_response_there",
        get("/"),
        {
            "h2authz": grpc_play(
                allows(
                    response_headers_to_add=[
                        header("x-a", "1", ADD),
                        header("x-b", "2", ABSENT),
                        header("x-c", "3", OVER),
                        header("x-d", "4", EXISTING),
                        header("x-e", "5", append=True),
                        header("x-f", "6", append=False),
                        header("set-cookie", "a"),
                        header("x-g", "", ADD),
                    ]
                )
            ),
            "a": [Head(), ask_http("x-a: up", "x-b: up", "x-c: up", "x-c: again", "x-d: up", "x-e: up", "x-f: up", body=b"ok")],
        },
        on="grpc",
    ),
    case("grpc", "response_of_ours", get("/nowhere"), allows(response_headers_to_add=[header("x-a", "1")])),
    case(
        "grpc",
        "response_direct",
        get("/direct"),
        allows(response_headers_to_add=[header("x-a", "1"), header("set-cookie", "1", ADD), header("set-cookie", "2", ADD)]),
    ),
    # -- queries
    *[
        case("grpc", f"query_{name}", get(path), allows(query_parameters_to_set=[{"key": k, "value": v} for k, v in sets], query_parameters_to_remove=removes))
        for name, path, sets, removes in (
            ("set", "/q?a=1&b=2", [("b", "3"), ("c", "4")], []),
            ("remove", "/q?a=1&b=2&a=3", [], ["a"]),
            ("both", "/q?a=1", [("b", "2")], ["a"]),
            ("none_before", "/q", [("b", "2")], []),
            ("all_gone", "/q?a=1", [], ["a"]),
            ("twice", "/q?z=1&a=1&a=2", [("a", "3")], []),
            ("order", "/q?z=1&y=2&x=3", [("m", "4")], []),
            ("odd", "/q?=x&y&&z=", [("m", "4")], []),
            ("encoded", "/q?a=%20b+c", [("m", "a%20b")], []),
            ("unencoded", "/q?a=1", [("m", "a&b=c")], []),
            ("absent", "/q?b=1&a=1", [], ["m"]),
            ("fragment", "/q?b=1&a=1#f", [("c", "1")], []),
        )
    ],
    case("validating", "query", get("/q?a=1"), allows(query_parameters_to_set=[{"key": "m", "value": "a&b"}])),
    case("validating", "query_space", get("/q?a=1"), allows(query_parameters_to_set=[{"key": "m", "value": "a b"}])),
    case("validating", "query_good", get("/q?a=1"), allows(query_parameters_to_set=[{"key": "m", "value": "a%20b*-._~+"}])),
    case("validating", "query_good_2", get("/q?a=1"), allows(query_parameters_to_set=[{"key": "m", "value": "a*-._Z9"}])),
    case("validating", "query_remove", get("/q?a=1"), allows(query_parameters_to_remove=["a b", "a"])),
    # -- validation
    *[
        case("validating", f"{where}_{name}", get("/"), maker(header(key, value)), stricter=500 if name == "empty_name" else None)
        for where, maker in (
            ("request", lambda h: allows(headers=[h])),
            ("response", lambda h: allows(response_headers_to_add=[h])),
            ("denied", lambda h: denies(headers=[h])),
            ("error", lambda h: errs(headers=[h], body="x", http=502)),
        )
        for name, key, value in (
            ("good", "x-a", "1"),
            ("value", "x-a", "a\nb"),
            ("name", "x a", "1"),
            ("empty_name", "", "1"),
            ("pseudo", ":path", "/p"),
            ("tab", "x-a", "a\tb"),
            ("upper", "X-A", "1"),
            ("del", "x-a", "\x7f"),
        )
        if (where, name) != ("error", "empty_name")
    ],
    case("validating", "remove_invalid", get("/", "X-A: 1"), allows(headers_to_remove=["x a", "x-a"])),
    case("validating", "unknown_action", get("/"), allows(headers=[header("x-new", "1", 7)])),
    case("validating", "unknown_action_denied", get("/"), denies(headers=[header("x-new", "1", 7)])),
    case("validating", "append", get("/", "X-A: 1"), allows(headers=[header("x-a", "a\nb", append=True)])),
    # -- rules
    case(
        "ruled",
        "headers",
        get("/", "X-A: 1"),
        allows(
            headers=[
                header("x-bad-1", "1"),
                header("x-a", "2"),
                header("x-envoy-mine", "1"),
                header("x-envoy-other", "1"),
                header(":path", "/new"),
                header("host", "b.test"),
                header(":method", "PUT"),
                header("x-v", "a\x01b"),
            ],
            headers_to_remove=["x-bad", "host", "x-a", "x-envoy-x"],
        ),
    ),
    case("ruled_strictly", "set", get("/"), allows(headers=[header("x-a", "1")])),
    case("ruled_strictly", "remove", get("/"), allows(headers_to_remove=["x-a"])),
    case("ruled_strictly", "response", get("/"), allows(response_headers_to_add=[header("x-a", "1")])),
    case("ruled_strictly", "nothing", get("/")),
    case(
        "ruled_routing",
        "headers",
        get("/"),
        allows(
            headers=[
                header(":path", "/new"),
                header("host", "b.test"),
                header(":method", "PUT"),
                header(":scheme", "gopher"),
                header("x-envoy-a", "1"),
                header(":authority", "c test"),
            ]
        ),
    ),
    case(
        "ruled_routing", "append", get("/"), allows(headers=[header(":path", "/new", ADD), header("host", "b.test", ADD)], headers_to_remove=["host", ":path"])
    ),
    case("no_system", "headers", get("/"), allows(headers=[header(":path", "/new"), header("host", "b.test"), header(":method", "PUT")])),
    # -- routes
    case("clearing", "gold", get("/"), allows(headers=[header("x-tier", "gold")])),
    case("clearing", "appended", get("/"), allows(headers=[header("x-tier", "gold", ADD)])),
    case("clearing", "removed", get("/", "X-Tier: gold"), allows(headers_to_remove=["x-tier"])),
    case("clearing", "query", get("/"), allows(query_parameters_to_set=[{"key": "a", "value": "b"}])),
    case("clearing", "path", get("/"), allows(headers=[header(":path", "/query")])),
    case("clearing", "nothing", get("/")),
    case("clearing", "gone", get("/"), allows(headers=[header("x-no-route", "1")])),
    case("clearing", "response_only", get("/"), allows(response_headers_to_add=[header("x-tier", "gold")])),
    case("grpc", "not_cleared", get("/"), allows(headers=[header("x-tier", "gold")])),
    # -- metadata
    case("grpc", "metadata", get("/"), allows(rest={"dynamic_metadata": {"said": {"a": 1, "b": [True, None]}}})),
    case("grpc", "metadata_old", get("/"), allows(dynamic_metadata={"said": "old"}, rest={"dynamic_metadata": {"said": "new"}})),
    case("grpc", "metadata_denied", get("/"), denies(rest={"dynamic_metadata": {"said": "no"}})),
    case("grpc", "metadata_error", get("/"), says(13, error_response={}, dynamic_metadata={"said": "no"})),
    case("no_metadata", "ignored", get("/"), allows(rest={"dynamic_metadata": {"said": 1}})),
    case("metadata", "told", get("/", "X-Check: 1")),
    case("shadow", "checked", get("/", "X-Check: 1"), denies()),
    case("shadow", "unchecked", get("/"), denies()),
    case("never", "unchecked", get("/"), denies()),
    case("never_denies", "denied", get("/")),
    case("labelled", "labels", get("/")),
    case("own_metadata", "initial", get("/", "X-A: from-request")),
    # -- errors
    case("grpc", "error_response", get("/"), errs()),
    case("grpc", "error_response_more", get("/"), errs(http=502, body="broken", headers=[header("x-a", "1", ADD), header("x-a", "2", ADD)])),
    case(
        "grpc",
        "error_response_append",
        get("/"),
        errs(headers=[header("x-a", "1", append=True), header("x-b", "1", append=False), header("x-c", "1", EXISTING)]),
    ),
    case("grpc", "denied_old", get("/"), denies(headers=[header("x-a", "0"), header("x-a", "1", append=True), header("x-b", "1", append=False)])),
    case("grpc", "response_status", get("/"), allows(response_headers_to_add=[header(":status", "201", OVER)])),
    case("validating", "response_unknown_action", get("/"), allows(response_headers_to_add=[header("x-new", "1", 7), header("x-b", "1")])),
    case("grpc", "response_unknown_action", get("/"), allows(response_headers_to_add=[header("x-new", "1", 7), header("x-b", "1")])),
    case("grpc", "error_response_ok_status", get("/"), says(0, error_response={"status": {"code": 502}})),
    case("own_status", "error_response", get("/"), errs(body="b")),
    case("open", "error_response", get("/"), errs(http=502, headers=[header("x-a", "1")])),
    *[
        case(
            on,
            f"grpc_status_{status}",
            get("/"),
            [Ended(), Headers([(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", str(status))], end=True)],
        )
        for on, status in (("grpc", 7), ("open", 7), ("own_status", 14), ("quietly_open", 2))
    ],
    *[case(on, f"http_{status}", get("/"), reply(status, body=None)) for on, status in (("grpc", 503), ("grpc", 200), ("open", 403))],
    case(
        "grpc",
        "garbage",
        get("/"),
        [
            Ended(),
            Headers([(":status", "200"), ("content-type", "application/grpc")]),
            Body(message(b"\xff\xff\xff"), end=False),
            Headers(lines("grpc-status: 0"), end=True),
        ],
    ),
    case(
        "grpc",
        "no_message",
        get("/"),
        [Ended(), Headers([(":status", "200"), ("content-type", "application/grpc")]), Headers(lines("grpc-status: 0"), end=True)],
    ),
    case(
        "grpc",
        "empty_message",
        get("/"),
        [
            Ended(),
            Headers([(":status", "200"), ("content-type", "application/grpc")]),
            Body(message(b""), end=False),
            Headers(lines("grpc-status: 0"), end=True),
        ],
    ),
    case("grpc", "reset", get("/"), [Ended(), Rst()]),
    case("open", "reset", get("/"), [Ended(), Rst()]),
    case("slow", "timeout", get("/"), [Ended(), Wait("never")]),
    case("default_time", "timeout", get("/"), [Ended(), Wait("never")]),
    case("default_time", "allowed", get("/")),
    case("dead", "refused", get("/")),
    case("grpc", "client_gone", [get("/"), Wait("asked"), Close()], [Ended(), Signal("asked")]),
    # -- bodies
    *[
        case(on, f"body_{name}", script)
        for on in ("body", "body_bytes", "body_raw", "partly")
        for name, script in (
            ("none", get("/")),
            ("short", req("POST", "/", body=b"hello")),
            ("exact", req("POST", "/", body=b"0123456789abcdef")),
            ("long", req("POST", "/", body=b"0123456789abcdefg")),
            ("chunked", req("POST", "/", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n")),
            ("bytes", req("POST", "/", body=b"\xff\xfea\xc3\xa4\xe2\x82")),
            ("zero", req("POST", "/", "Content-Length: 0")),
            ("chunked_empty", req("POST", "/", "Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
        )
    ],
    case("body", "denied", req("POST", "/", body=b"hello"), denies()),
    case("partly", "denied_long", req("POST", "/", body=b"x" * 50), denies()),
    h2_case("body_h2", ask("POST", "/", body=b"hello"), up={"h2authz": grpc_play()}, on="body"),
    h2_case("body_h2_long", ask("POST", "/", body=b"x" * 50), up={"h2authz": grpc_play()}, on="body"),
    h2_case("partly_h2_long", ask("POST", "/", body=b"x" * 50), up={"h2authz": grpc_play()}, on="partly"),
    h2_case("body_h2_trailers", ask("POST", "/", body=b"hello", trailers=("x-t: 1",)), up={"h2authz": grpc_play()}, on="body"),
    # -- per route
    *[
        case("routes", name, script)
        for name, script in (
            ("disabled", get("/disabled")),
            ("off", get("/off")),
            ("told", get("/told")),
            ("host", req("POST", "/", body=b"1234")),
            ("host_too_long", req("POST", "/", body=b"12345")),
            ("told_body", req("POST", "/told", body=b"12345")),
            ("bodiless", req("POST", "/bodiless", body=b"12345")),
            ("longer", req("POST", "/longer", body=b"12345")),
            ("partly", req("POST", "/partly", body=b"12345")),
            ("other", get("/other")),
        )
    ],
    Case("routes_elsewhere", get("/elsewhere?x=y", "X-A: 1"), {"h2authz": grpc_play(), "authz": http_play(ask_http("x-up: 1", "x-not: 1"))}, on="routes"),
    # -- TLS
    case("tls", "anonymous", get("/"), tls=Tls()),
    case("tls", "client", get("/"), tls=Tls(certificate="client")),
    case("tls", "no_sni", get("/"), tls=Tls(sni=None)),
    # -- limits
    case("grpc", "many_headers", get("/"), allows(headers=[header(f"x-{n}", "1") for n in range(120)]), skip=("stats",)),
    case("grpc", "large_headers", get("/"), allows(headers=[header(f"x-{n}", "1" * 10_000) for n in range(7)])),
    case("grpc", "many_response_headers", get("/"), allows(response_headers_to_add=[header(f"x-{n}", "1", ADD) for n in range(120)])),
    case(
        "limited",
        "many_response_headers",
        get("/"),
        allows(response_headers_to_add=[header(f"x-{n}", "1", ADD) for n in range(120)]),
        skip=("upstream",),
        skip_stats=("cluster.a.",),
        note="whether the rest of the upstream's response is here already",
    ),
    case("limited", "many_denied_headers", get("/"), denies(headers=[header(f"x-{n}", "1", ADD) for n in range(120)])),
    case("stats", "logged", get("/")),
]
HTTP_CASES = [
    by_http("http", "allowed", get("/p?a=b", *SENT, "Authorization: secret")),
    by_http("http", "allowed_post", req("POST", "/p", body=b"hello")),
    by_http("http", "denied", get("/"), ask_http("x-why: no", "set-cookie: a", "set-cookie: b", "content-type: text/html", status="403 Forbidden", body=b"no")),
    by_http("http", "denied_plain", get("/"), ask_http(status="401 Unauthorized")),
    by_http("http", "denied_chunked", get("/"), b"HTTP/1.1 403 Forbidden\r\ntransfer-encoding: chunked\r\nx-a: 1\r\n\r\n2\r\nno\r\n0\r\n\r\n"),
    by_http(
        "http",
        "denied_odd_headers",
        get("/"),
        ask_http("date: never", "server: theirs", "x-envoy-upstream-service-time: 1", "connection: keep-alive", "via: x", status="401 X"),
    ),
    *[
        by_http("http", f"status_{status.split()[0]}", get("/"), ask_http("location: /x", status=status))
        for status in ("201 Created", "204 No Content", "302 Found", "404 Not Found", "429 Slow", "500 No", "503 No")
    ],
    by_http("http", "denied_grpc", req("POST", "/s/m", "Content-Type: application/grpc", "TE: trailers"), ask_http(status="401 No", body=b"no")),
    by_http("http", "ok_headers", get("/"), ask_http("x-a: 1", "x-envoy-auth-headers-to-remove: x-there, x-one")),
    by_http("http", "remove", get("/", *SENT), ask_http("x-envoy-auth-headers-to-remove: x-there,  x-one ,,host", "x-envoy-auth-headers-to-remove: cookie")),
    by_http("http", "direct", get("/direct")),
    by_http(
        "http_more",
        "allowed",
        get("/p?a=b", *SENT, "X-B: client"),
        ask_http(
            "x-up: 1",
            "x-up: 2",
            "x-append: 3",
            "x-up-both: 4",
            "x-ok-1: 5",
            "x-ok-1: 6",
            "said: something",
            "x-meta: m",
            "x-not: 7",
            "x-there: 8",
            "accept: z",
            "x-existing: n",
        ),
    ),
    by_http(
        "http_more",
        "append_existing",
        get("/p", "X-Append: mine", "X-Up: mine", "X-Up: more", "Accept: a/b"),
        ask_http("x-append: 3", "x-append: 4", "accept: c/d", "x-up: 9"),
    ),
    by_http(
        "http_more",
        "denied",
        get("/"),
        ask_http(
            "x-why: no",
            "set-cookie: a",
            "x-other: b",
            "www-authenticate: Basic",
            "location: /x",
            "x-ok-1: 5",
            "said: no",
            "content-type: text/html",
            status="401 No",
            body=b"<p>",
        ),
    ),
    by_http("http_more", "post", req("POST", "/", body=b"hello")),
    by_http("http_old", "allowed", get("/", "X-A: 1", "X-B: 2", "Authorization: secret")),
    by_http("http_clearing", "gold", get("/"), ask_http("x-tier: gold")),
    by_http("http_clearing", "appended", get("/"), ask_http("x-append: gold")),
    by_http("http_clearing", "nothing", get("/"), ask_http("x-other: gold")),
    by_http("http_body", "short", req("POST", "/", "Content-Type: text/x", body=b"hello")),
    by_http("http_body", "long", req("POST", "/", body=b"hello" * 10)),
    by_http("http_body", "none", get("/")),
    by_http("http_body", "denied", req("POST", "/", body=b"hello"), ask_http(status="403 No")),
    by_http("http_raw", "allowed", get("/", "X-A: 1", "X-A: 2", "X-B: 3", "Cookie: a=b", "Cookie: c=d")),
    by_http("http_open", "error", get("/"), ask_http(status="500 No")),
    by_http("http_open", "denied", get("/"), ask_http(status="404 No")),
    by_http("http_status", "error", get("/"), ask_http(status="502 No", body=b"x")),
    by_http("http_slow", "timeout", get("/"), [Request(), Wait("never")]),
    by_http("http_dead", "refused", get("/")),
    by_http("http", "reset", get("/"), [Request(), Reset()]),
    by_http("http_retry", "second_is_good", get("/"), ask_http(status="500 No"), ask_http()),
    by_http("http_retry", "none_is_good", get("/"), ask_http(status="500 No"), ask_http(status="500 No")),
    by_http("http_retry", "denied", get("/"), ask_http(status="403 No")),
]
TCP_LOG = file_log("%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %DYNAMIC_METADATA(envoy.filters.network.ext_authz:said)% rx=%BYTES_RECEIVED% tx=%BYTES_SENT%\n")


def network(name: str, *before: Any, tls: bool = False, **fields: Any) -> dict[str, Any]:
    """A plain listener with the network filter."""
    config = {"transport_api_version": "V3", "grpc_service": GRPC, "stat_prefix": name} | fields
    made = listener(name, *before, filter_("network_ext_authz", **config), filter_("tcp_proxy", stat_prefix=name, cluster="a", access_log=[TCP_LOG]))
    if tls:
        made["filter_chains"][0]["transport_socket"] = TLS
        made["listener_filters"] = [filter_("tls_inspector")]
    return made


SHADOW = {"action": "DENY", "policies": {"of-shadow": {"permissions": [{"any": True}], "principals": [{"any": True}]}}}
CONFIG["static_resources"]["listeners"] += [
    network("tcp"),
    network("tcp_open", failure_mode_allow=True),
    network("tcp_labelled", bootstrap_metadata_labels_key="labels", metadata_context_namespaces=["envoy.filters.network.rbac"]),
    network("tcp_tls", tls=True, include_peer_certificate=True, include_tls_session=True),
    network("tcp_slow", grpc_service={"envoy_grpc": {"cluster_name": "h2authz"}}),
    *[
        network(
            f"tcp_{name}",
            filter_("network_rbac", stat_prefix="x.", shadow_rules=SHADOW, shadow_rules_stat_prefix="istio_ext_authz_"),
            filter_enabled_metadata={
                "filter": "envoy.filters.network.rbac",
                "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
                "value": {"string_match": {"prefix": prefix}},
            },
        )
        for name, prefix in (("enabled", "of-"), ("disabled", "not-"))
    ],
]


def tcp(on: str, name: str, *said: Script, steps: Script | None = None, **fields: Any) -> Case:
    script = steps or [b"hello", Until(b"hello")]
    return Case(f"{on}_{name}", script, {"h2authz": grpc_play(*said), "a": Play([[Echo()]], on_connect=True)}, on=on, then="leave", **fields)


METADATA = {"dynamic_metadata": {"said": "yes"}}
ENDED: Script = [b"hello", Eof()]
TCP_CASES = [
    tcp("tcp", "allowed"),
    tcp("tcp", "allowed_with_metadata", allows(rest=METADATA)),
    tcp("tcp", "denied", denies(), steps=ENDED),
    tcp("tcp", "denied_with_metadata", denies(rest=METADATA), steps=ENDED),
    tcp("tcp", "error", errs(), steps=ENDED),
    tcp("tcp", "reset", [Ended(), Rst()], steps=ENDED),
    tcp("tcp_open", "error", errs()),
    tcp("tcp_open", "denied", denies(), steps=ENDED),
    tcp("tcp_slow", "timeout", [Ended(), Wait("never")], steps=ENDED),
    tcp("tcp_labelled", "allowed"),
    tcp("tcp_tls", "client", tls=Tls(certificate="client")),
    tcp("tcp_enabled", "denied", denies(), steps=ENDED),
    tcp("tcp_disabled", "denied", denies(), skip_stats=(".disabled",), note="Envoy counts each piece of data"),
]
CASES = GRPC_CASES + HTTP_CASES + TCP_CASES
test_case = check_cases(CASES)
