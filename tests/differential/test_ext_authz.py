"""The ext_authz filter with a service that is asked by gRPC: what it is asked, and what becomes of what it says. By HTTP: test_ext_authz_http.py."""

from typing import Any

from tests.differential.authz import GRPC, HTTP, SENT, TLS, allows, ask_http, authz, denies, errs, grpc_play, header, http_play, patterns, says
from tests.differential.harness import (
    Body,
    Case,
    Close,
    Ended,
    Head,
    Headers,
    Response,
    Rst,
    Script,
    Signal,
    Tls,
    Wait,
    ask,
    bootstrap,
    check_cases,
    cluster,
    filter_,
    get,
    h2_case,
    h2_cluster,
    lines,
    message,
    reply,
    req,
)

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


UPGRADES = [
    {
        "name": "all",
        "domains": ["*"],
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a", "upgrade_configs": [{"upgrade_type": "websocket"}]}}],
    }
]
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
    authz("upgrades", hosts=UPGRADES, with_request_body=BODY),
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
    clusters=[cluster("a"), cluster("b"), cluster("authz"), h2_cluster("h2authz"), h2_cluster("h2other"), cluster("dead", "dead")],
) | {"node": {"id": "test-node", "cluster": "test-cluster", "metadata": {"labels": {"app": "a", "n": 1}}}}


def case(on: str, name: str, script: Script | bytes, *said: Script, **fields: Any) -> Case:
    return Case(f"{on}_{name}", script, {"h2authz": grpc_play(*said), "h2other": grpc_play(*said)}, on=on, **fields)


ADD, ABSENT, OVER, EXISTING = "APPEND_IF_EXISTS_OR_ADD", "ADD_IF_ABSENT", "OVERWRITE_IF_EXISTS_OR_ADD", "OVERWRITE_IF_EXISTS"
ACTIONS = [
    header(key, f"{key}-{action}", action) for action in (ADD, ABSENT, OVER, EXISTING) for key in ("x-there", "x-new-" + action.lower().replace("_", "-"))
]

CASES = [
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
    case("grpc", "pseudo_unknown", get("/"), allows(headers=[header(":foo", "bar"), header(":status", "200"), header(":protocol", "websocket")])),
    case("grpc", "path_with_space", get("/"), allows(headers=[header(":path", "/a b")])),
    case("grpc", "method_with_space", get("/"), allows(headers=[header(":method", "G T")])),
    case("grpc", "framing", req("POST", "/", body=b"hello"), allows(headers=[header("content-length", "3")])),
    case("grpc", "framing_chunked", req("POST", "/", body=b"hello"), allows(headers=[header("transfer-encoding", "chunked")])),
    case("grpc", "framing_removed", req("POST", "/", body=b"hello"), allows(headers_to_remove=["content-length"])),
    case("grpc", "hop_by_hop", get("/"), allows(headers=[header("connection", "close"), header("keep-alive", "5"), header("te", "trailers")])),
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
    case("grpc", "status_after_message", get("/"), [*allows()[:-1], Headers(lines("grpc-status: 7"), end=True)]),
    case("grpc", "half_a_message", get("/"), [*allows()[:2], Body(message(b"abc")[:-1], end=False), Headers(lines("grpc-status: 0"), end=True)]),
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
    case("body", "gone_while_it_comes", [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe", Close()]),
    case(
        "partly",
        "more_while_it_is_asked",
        [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n0123456789abcdef", Wait("asked"), b"0123", Response()],
        [Ended(), Signal("asked"), *allows()[1:]],
    ),
    case("upgrades", "websocket", get("/", "Connection: Upgrade", "Upgrade: websocket")),
    case("upgrades", "spelt_otherwise", get("/", "Connection: upgrade", "Upgrade: WebSocket")),
    case("upgrades", "denied", get("/", "Connection: upgrade", "Upgrade: WebSocket"), denies()),
    case("body", "expect", req("POST", "/", "Expect: 100-continue", body=b"hello")),
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
    # -- which headers it gets
    case("narrow", "allowed", get("/", "X-A: 1", "X-A: 2", "X-B: 3")),
    case("disallowing", "allowed", get("/", "X-A: 1", "X-B: 3")),
]
test_case = check_cases(CASES)
