"""Options of the HTTP connection manager that change requests and responses: paths, hosts, forwarded headers, request ids, via, server, scheme."""

from tests.differential.harness import Case, Request, answer, bootstrap, check_cases, cluster, file_log, get, http, req

LOCAL = {"address_prefix": "127.0.0.0", "prefix_len": 8}
ONE_ADDRESS = {"address_prefix": "10.0.0.0", "prefix_len": 8}

HOSTS = [
    {"name": "echo", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]},
    {
        "name": "match",
        "domains": ["match.test"],
        "routes": [
            {"name": "admin", "match": {"prefix": "/admin"}, "direct_response": {"status": 403}},
            {"name": "exact", "match": {"path": "/a/b"}, "route": {"cluster": "a"}},
        ],
    },
    {"name": "port", "domains": ["port.test:8080"], "routes": [{"name": "with_port", "match": {"prefix": "/"}, "route": {"cluster": "a"}}]},
    {"name": "noport", "domains": ["port.test"], "routes": [{"name": "no_port", "match": {"prefix": "/"}, "route": {"cluster": "a"}}]},
]  # fmt: skip


def manager(name: str, **options: object):
    return http(name, HOSTS, **options)


REMOTE_LOG = [
    file_log(
        "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% direct=%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% xff=%REQ(X-FORWARDED-FOR)% "
        "internal=%REQ(X-ENVOY-INTERNAL)% external=%REQ(X-ENVOY-EXTERNAL-ADDRESS)%\n",
    ),
]

CONFIG = bootstrap(
    manager("main"),
    # paths
    manager("normalize", normalize_path=True),
    manager("merge", merge_slashes=True),
    manager("normalize_merge", normalize_path=True, merge_slashes=True),
    *[
        manager(f"escaped_{action.lower()}", normalize_path=True, path_with_escaped_slashes_action=action)
        for action in ("KEEP_UNCHANGED", "REJECT_REQUEST", "UNESCAPE_AND_REDIRECT", "UNESCAPE_AND_FORWARD")
    ],
    *[
        manager(f"underscores_{action.lower()}", common_http_protocol_options={"headers_with_underscores_action": action})
        for action in ("ALLOW", "REJECT_REQUEST", "DROP_HEADER")
    ],
    # forwarded headers
    manager("edge", use_remote_address=True, access_log=REMOTE_LOG),
    manager("edge_hops_1", use_remote_address=True, xff_num_trusted_hops=1, access_log=REMOTE_LOG),
    manager("edge_skip_append", use_remote_address=True, skip_xff_append=True, access_log=REMOTE_LOG),
    manager("edge_internal", use_remote_address=True, internal_address_config={"cidr_ranges": [LOCAL]}, access_log=REMOTE_LOG),
    manager("trusting", access_log=REMOTE_LOG),
    manager("trusting_hops_1", xff_num_trusted_hops=1, access_log=REMOTE_LOG),
    manager("trusting_hops_2", xff_num_trusted_hops=2, access_log=REMOTE_LOG),
    manager("trusting_internal", internal_address_config={"cidr_ranges": [LOCAL, ONE_ADDRESS]}, access_log=REMOTE_LOG),
    # request ids
    manager("id_echo", always_set_request_id_in_response=True),
    manager("id_off", generate_request_id=False),
    manager("id_edge", use_remote_address=True),
    manager("id_edge_preserve", use_remote_address=True, preserve_external_request_id=True),
    manager(
        "id_no_pack",
        request_id_extension={"typed_config": {"@": "uuid_request_id", "pack_trace_reason": False}},
        always_set_request_id_in_response=True,
    ),
    # the rest
    manager("via", via="proxy-1"),
    manager("server_name", server_name="mesh/1"),
    manager("server_append_if_absent", server_header_transformation="APPEND_IF_ABSENT"),
    manager("server_pass_through", server_header_transformation="PASS_THROUGH"),
    manager("scheme_https", scheme_header_transformation={"scheme_to_overwrite": "https"}),
    manager("strip_matching", strip_matching_host_port=True),
    manager("strip_any", strip_any_host_port=True),
    manager("strip_dot", strip_trailing_host_dot=True),
    manager("user_agent", add_user_agent=True),
    manager("append_port", append_x_forwarded_port=True),
    clusters=[cluster("a")],
)

PATHS = {
    "dot": "/a/./b", "dot_dot": "/x/../a/b", "dot_dot_above_root": "/../a/b", "encoded_dot_dot": "/x/%2e%2e/a/b", "encoded_dot_upper": "/x/%2E%2e/a/b",
    "traversal_to_admin": "/a/../admin/x", "double_slash": "//a//b", "slash_dot_slash": "/a//./b", "trailing_dot_dot": "/a/b/..", "trailing_dot": "/a/b/.",
    "backslash": "/x\\..\\a/b", "semicolon_dot_dot": "/x/..;/a/b", "encoded_slash": "/a%2fb", "encoded_slash_upper": "/a%2Fb", "encoded_backslash": "/a%5cb",
    "encoded_letter": "/%61/b", "encoded_unreserved": "/%41%7e%2d", "lower_case_escape": "/a%c3%a9", "bad_escape": "/a%zz", "incomplete_escape": "/a%",
    "encoded_nul": "/a%00b", "query_not_touched": "/a/b?x=/../%2f//y", "dots_in_query_only": "/a/b?..", "obs_text": "/caf\xe9/../a", "only_slashes": "////",
    "double_encoded": "/a%252fb", "plus_and_reserved": "/a+b:c@d!$&'()*,;=e",
}  # fmt: skip

CASES = [
    *[Case(f"path_{name}_{on}", get(path), on=on) for name, path in PATHS.items() for on in ("main", "normalize", "merge", "normalize_merge")],
    *[
        Case(f"path_{name}_{on}", get(PATHS[name]), on=on)
        for name in ("encoded_slash", "encoded_slash_upper", "encoded_backslash", "double_encoded", "encoded_dot_dot", "query_not_touched")
        for on in ("escaped_keep_unchanged", "escaped_reject_request", "escaped_unescape_and_redirect", "escaped_unescape_and_forward")
    ],
    Case("escaped_redirect_of_post", req("POST", "/a%2fb", body=b"x"), on="escaped_unescape_and_redirect"),
    Case("normalised_path_is_matched", get("/x/../admin/y", host="match.test"), on="normalize"),
    Case("raw_path_is_matched", get("/x/../admin/y", host="match.test")),
    Case("fragment_rejected", get("/a/b#frag"), on="normalize"),
    # ---- underscores
    *[
        Case(f"underscore_{on}", get("/", "X_Under_Score: 1", "X-Fine: 2"), on=f"underscores_{on}", then="closed" if on == "reject_request" else "open")
        for on in ("allow", "reject_request", "drop_header")
    ],
    Case("underscore_content_length_dropped", req("POST", "/", "Content_Length: 3", "Content-Length: 5", body=b"hello"), on="underscores_drop_header"),
    Case("underscore_forwarded_for_allowed", get("/", "X_Forwarded_For: 1.2.3.4"), on="underscores_allow"),
    # ---- X-Forwarded-For
    *[
        Case(f"xff_{name}_{on}", get("/", *lines), on=on)
        for on in ("edge", "edge_hops_1", "edge_skip_append", "edge_internal", "trusting", "trusting_hops_1", "trusting_hops_2", "trusting_internal")
        for name, lines in {
            "none": [],
            "one": ["X-Forwarded-For: 9.9.9.9"],
            "two": ["X-Forwarded-For: 9.9.9.9, 10.0.0.8"],
            "three": ["X-Forwarded-For: 9.9.9.9, 8.8.8.8,7.7.7.7"],
            "internal_one": ["X-Forwarded-For: 10.0.0.1"],
            "garbage": ["X-Forwarded-For: unknown, abc"],
            "ipv6": ["X-Forwarded-For: 2001:db8::1"],
        }.items()
    ],
    Case("xff_two_lines_trusting", get("/", "X-Forwarded-For: 9.9.9.9", "X-Forwarded-For: 8.8.8.8"), on="trusting"),
    Case("xff_two_lines_edge", get("/", "X-Forwarded-For: 9.9.9.9", "X-Forwarded-For: 8.8.8.8"), on="edge"),
    Case("xff_empty_edge", get("/", "X-Forwarded-For:"), on="edge"),
    Case("xff_with_port_trusting", get("/", "X-Forwarded-For: 9.9.9.9:1234"), on="trusting"),
    Case("xff_trailing_comma_trusting", get("/", "X-Forwarded-For: 9.9.9.9,"), on="trusting"),
    # ---- what external and internal clients may say
    *[
        Case(
            f"envoy_headers_{on}",
            get(
                "/", "X-Envoy-Internal: true", "X-Envoy-Retry-On: 5xx", "X-Envoy-Max-Retries: 5", "X-Envoy-Upstream-Rq-Timeout-Ms: 5000",
                "X-Envoy-Expected-Rq-Timeout-Ms: 77", "X-Envoy-Force-Trace: 1", "X-Envoy-Decorator-Operation: op", "X-Envoy-Downstream-Service-Cluster: c",
                "X-Envoy-Downstream-Service-Node: n", "X-Envoy-Original-Path: /o", "X-Envoy-Original-Url: u", "X-Envoy-Ip-Tags: t", "X-Envoy-Attempt-Count: 9",
                "X-Envoy-External-Address: 6.6.6.6", "X-Envoy-Peer-Metadata: keep", "X-Envoy-Upstream-Alt-Stat-Name: alt", *extra,
            ),
            on=on,
        )
        for on, extra in {"edge": [], "edge_internal": [], "trusting": [], "trusting_internal": ["X-Forwarded-For: 10.0.0.1"]}.items()
    ],
    # ---- X-Forwarded-Proto, -Host, -Port and the scheme
    *[
        Case(f"xfp_{value}_{on}", get("/", f"X-Forwarded-Proto: {value}"), on=on)
        for value in ("http", "https", "HTTPS", "ws")
        for on in ("edge", "edge_hops_1", "trusting")
    ],
    Case("xfp_absent_edge_hops_1", get(), on="edge_hops_1"),
    Case("xfp_twice", get("/", "X-Forwarded-Proto: http", "X-Forwarded-Proto: https"), on="trusting"),
    Case("scheme_overwritten", get(), on="scheme_https"),
    Case("x_forwarded_port", get(), on="append_port"),
    Case("x_forwarded_port_kept", get("/", "X-Forwarded-Port: 99"), on="append_port"),
    # ---- request ids
    *[Case(f"id_{name}_{on}", get("/", *lines), on=on) for on in ("id_echo", "id_off", "id_edge", "id_edge_preserve", "id_no_pack") for name, lines in {
        "none": [],
        "uuid": ["X-Request-Id: 7e3f1c1e-8f0a-4c6b-9c7a-1b2c3d4e5f60"],
        "text": ["X-Request-Id: mine"],
        "uuid_traced": ["X-Request-Id: 7e3f1c1e-8f0a-9c6b-9c7a-1b2c3d4e5f60"],
        "client_trace_id": ["X-Client-Trace-Id: c1"],
    }.items()],
    Case("id_upstream_sends_one", get(), [Request(), answer(x_request_id="theirs")], on="id_echo"),
    # ---- via, server
    Case("via_added", get(), on="via"),
    Case("via_appended", get("/", "Via: 1.1 other"), [Request(), answer(via="1.1 origin")], on="via"),
    *[
        Case(f"{on}_{name}", get(), [Request(), response], on=on)
        for on in ("server_name", "server_append_if_absent", "server_pass_through")
        for name, response in {"server": answer(server="origin/2"), "no_server": answer()}.items()
    ],
    # ---- hosts
    *[
        Case(f"host_{name}_{on}", get(host=host), on=on)
        for on in ("main", "strip_matching", "strip_any", "strip_dot")
        for name, host in {
            "plain": "port.test", "port_8080": "port.test:8080", "port_80": "port.test:80", "dot": "port.test.", "dot_and_port": "port.test.:8080",
            "ipv6": "[::1]:8080", "upper": "PORT.TEST",
        }.items()
    ],
    Case("user_agent_added", get(), on="user_agent"),
    Case("user_agent_kept", get("/", "User-Agent: mine"), on="user_agent"),
]  # fmt: skip

test_case = check_cases(CASES)
