"""What clients are told when an upstream is absent, ends early, resets, or answers what is no HTTP; and the local reply mapper."""

from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Counted,
    Head,
    Play,
    Request,
    Reset,
    Response,
    Signal,
    Until,
    Wait,
    answer,
    bootstrap,
    check_cases,
    cluster,
    endpoint,
    file_log,
    filter_,
    get,
    http,
    req,
    to,
    y,
)

MAPPED = y("""
mappers:
- filter: {status_code_filter: {comparison: {op: EQ, value: {default_value: 404, runtime_key: none}}}}
  status_code: 410
  body: {inline_string: "gone for good"}
- filter: {response_flag_filter: {flags: [UH]}}
  headers_to_add: [{header: {key: x-mapped, value: "%RESPONSE_FLAGS%"}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]
  body_format_override: {json_format: {code: "%RESPONSE_CODE%", why: "%LOCAL_REPLY_BODY%", path: "%REQ(:PATH)%"}}
- filter: {response_flag_filter: {flags: [UF]}}
  body_format_override: {text_format_source: {inline_string: "<b>%LOCAL_REPLY_BODY%</b>"}, content_type: "text/html; charset=UTF-8"}
- filter: {header_filter: {header: {name: x-ask, string_match: {exact: teapot}}}}
  status_code: 418
body_format: {text_format_source: {inline_string: "%RESPONSE_CODE% %LOCAL_REPLY_BODY% %RESPONSE_CODE_DETAILS%\\n"}}
""")


def vhost(name: str, to_cluster: str, **route: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to_cluster, **route}}]}


HOSTS = [
    vhost("dead", "dead"),
    vhost("empty", "empty"),
    vhost("unhealthy", "unhealthy"),
    vhost("drained", "maintenance"),
    vhost("small_response_head", "small_response_head"),
    {
        "name": "some",
        "domains": ["some.test"],
        "routes": [
            {"match": {"path": "/direct"}, "direct_response": {"status": 404, "body": {"inline_string": "direct"}}},
            {"match": {"path": "/up"}, "route": {"cluster": "a"}},
        ],
    },
]
MUTATION = {"response_mutations": [{"append": {"header": {"key": "x-filter", "value": "saw %RESPONSE_CODE%"}}}]}
CONFIG = bootstrap(
    http("main", [*to("a"), *HOSTS]),
    http("mapped", HOSTS, local_reply_config=MAPPED),
    http("filtered", HOSTS, filters=[filter_("header_mutation", mutations=MUTATION)]),
    http("lenient", to("a"), http_protocol_options={"enable_trailers": True}, access_log=[file_log()]),
    clusters=[
        cluster("a"),
        cluster("dead"),
        cluster("empty", localities=[{"lb_endpoints": []}]),
        cluster("unhealthy", endpoint("a", health_status="UNHEALTHY"), common_lb_config={"healthy_panic_threshold": {"value": 0}}),
        cluster("maintenance", "a", load_assignment={
            "cluster_name": "maintenance", "endpoints": [{"lb_endpoints": [endpoint("a")]}],
            "policy": {"drop_overloads": [{"category": "all", "drop_percentage": {"numerator": 100}}]},
        }),
        cluster("small_response_head", "a", typed_extension_protocol_options={
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@": "http_options", "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"max_headers_count": 3, "max_response_headers_kb": 1},
            },
        }),
    ],
)  # fmt: skip


def bad(name: str, *answers: Any, request: bytes | None = None, **fields: Any) -> Case:
    """The upstream reads a request and plays this; the client's connection ends unless nothing was forwarded."""
    return Case(name, request or get(), [Request(), *answers], **fields)


def head(*lines: str) -> bytes:
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


H = "HTTP/1.1 200 OK"
PART = head(H, "content-length: 100") + b"part"
CHUNK = head(H, "transfer-encoding: chunked") + b"4\r\npart\r\n"

CASES = [
    # ---- nobody there
    Case("connection_refused", get(host="dead.test")),
    Case("connection_refused_post", req("POST", "/", host="dead.test", body=b"hello")),
    Case("connection_refused_head", req("HEAD", "/", host="dead.test")),
    Case("connection_refused_grpc", req("POST", "/", "Content-Type: application/grpc", host="dead.test")),
    Case("no_hosts", get(host="empty.test")),
    Case("no_hosts_head", req("HEAD", "/", host="empty.test")),
    Case("no_hosts_grpc", req("POST", "/", "Content-Type: application/grpc", host="empty.test")),
    Case("no_healthy_host", get(host="unhealthy.test")),
    Case("drop_overload", get(host="drained.test")),
    # ---- ends early
    bad("closed_after_request", Close()),
    bad("reset_after_request", Reset()),
    Case("closed_after_head_of_post", [req("POST", "/", "Content-Length: 5"), Response("POST")], [Head(), Close()], then="closed"),
    Case("reset_in_request_body", [req("POST", "/", "Content-Length: 10") + b"half", Response("POST")], [Until(b"half"), Reset()], then="closed"),
    bad("closed_in_status_line", b"HTTP/1.1 2", Close()),
    bad("closed_in_headers", b"HTTP/1.1 200 OK\r\ncontent-le", Close()),
    bad("reset_in_headers", b"HTTP/1.1 200 OK\r\ncontent-le", Reset()),
    bad("closed_after_1xx", head("HTTP/1.1 103 Early Hints", "link: x"), Close()),
    Case("closed_in_body", [get(), Until(b"part"), Signal("seen")], [Request(), PART, Wait("seen"), Close()], then="closed"),
    Case("reset_in_body", [get(), Until(b"part"), Signal("seen")], [Request(), PART, Wait("seen"), Reset()], then="closed"),
    Case("closed_in_chunk", [get(), Until(b"part"), Signal("seen")], [Request(), CHUNK, Wait("seen"), Close()], then="closed"),
    Case("closed_in_chunk_size", [get(), Until(b"part"), Signal("seen")], [Request(), CHUNK + b"5", Wait("seen"), Close()], then="closed"),
    Case("closed_in_trailers", [get(), Until(b"part"), Signal("seen")], [Request(), CHUNK + b"0\r\nx: y\r\n", Wait("seen"), Close()], then="closed"),
    bad("closed_after_complete_response", OK, Close()),
    bad("connection_close_and_close", answer(connection="close"), Close()),
    # ---- a pooled connection ends
    Case("pooled_connection_closed_before_reuse", [get("/1"), Response(), Counted("upstream_cx_destroy_remote"), get("/2"), Response()],
         Play([[Request(), OK, Close()], [Request(), OK]])),
    # ---- no HTTP
    bad("garbage", b"garbage\r\n\r\n"),
    bad("binary", b"\x00\x01\x02\xff\r\n\r\n"),
    bad("smtp_banner", b"220 ready\r\n", Close()),
    bad("http_0_9_body", b"<html>hello</html>", Close()),
    bad("status_not_a_number", head("HTTP/1.1 2x0 OK")),
    Case("status_two_digits", [get(), Until(b"\r\n\r\n")], [Request(), head("HTTP/1.1 20 OK")], stricter=502),
    Case("status_four_digits", [get(), Until(b"\r\n\r\n")], [Request(), head("HTTP/1.1 2000 OK")], stricter=502),
    Case("status_099", [get(), Until(b"\r\n\r\n")], [Request(), head("HTTP/1.1 099 X", "content-length: 0")], stricter=502),
    Case("status_000", [get(), Until(b"\r\n\r\n")], [Request(), head("HTTP/1.1 000 X", "content-length: 0")], stricter=502),
    bad("version_2_0", head("HTTP/2.0 200 OK", "content-length: 0"), stricter=502),
    bad("version_1_2", head("HTTP/1.2 200 OK", "content-length: 0"), stricter=502),
    bad("lower_case_version", head("http/1.1 200 OK", "content-length: 0")),
    bad("header_without_colon", head(H, "what", "content-length: 0")),
    bad("header_space_before_colon", head(H, "x : y", "content-length: 0")),
    bad("header_nul", head(H, "x: a\0b", "content-length: 0")),
    bad("header_control", head(H, "x: a\x01b", "content-length: 0")),
    bad("header_obs_text", head(H, "x: caf\xe9", "content-length: 0")),
    bad("reason_obs_text", head("HTTP/1.1 200 caf\xe9", "content-length: 0")),
    # ---- framing
    bad("length_twice_equal", head(H, "content-length: 2", "content-length: 2") + b"ok"),
    bad("length_twice_different", head(H, "content-length: 2", "content-length: 3") + b"ok"),
    bad("length_negative", head(H, "content-length: -2")),
    bad("length_garbage", head(H, "content-length: x")),
    bad("length_plus", head(H, "content-length: +2") + b"ok"),
    bad("length_list", head(H, "content-length: 2, 2") + b"ok"),
    bad("length_and_chunked", head(H, "content-length: 2", "transfer-encoding: chunked") + b"2\r\nok\r\n0\r\n\r\n"),
    bad("coding_gzip", head(H, "transfer-encoding: gzip") + b"x", Close()),
    bad("coding_gzip_chunked", head(H, "transfer-encoding: gzip, chunked") + b"2\r\nok\r\n0\r\n\r\n"),
    bad("coding_identity", head(H, "transfer-encoding: identity") + b"ok", Close()),
    bad("coding_twice", head(H, "transfer-encoding: chunked", "transfer-encoding: chunked") + b"2\r\nok\r\n0\r\n\r\n"),
    bad("chunked_in_http_1_0", head("HTTP/1.0 200 OK", "transfer-encoding: chunked") + b"2\r\nok\r\n0\r\n\r\n", stricter=502),
    bad("bad_chunk_size_at_once", head(H, "transfer-encoding: chunked") + b"zz\r\nok\r\n0\r\n\r\n", skip=("client", "fate", "log", "stats"),
        note="whether the head went out before the chunk was read is ours to choose"),
    Case("bad_chunk_size_later", [get(), Until(b"part"), Signal("seen")], [Request(), CHUNK, Wait("seen"), b"zz\r\n"], then="closed"),
    bad("status_204_with_body", head("HTTP/1.1 204 No Content", "content-length: 5") + b"hello"),
    bad("status_204_chunked", head("HTTP/1.1 204 No Content", "transfer-encoding: chunked") + b"0\r\n\r\n"),
    bad("status_304_with_body", head("HTTP/1.1 304 Not Modified", "content-length: 5")),
    bad("head_with_body", answer(body=b"hello"), request=req("HEAD", "/")),
    bad("bytes_after_response", OK + b"extra"),
    bad("second_response_at_once", OK + answer(body=b"smuggled")),
    Case("second_response_is_not_for_the_next_request", [get("/1"), Response(), get("/2"), Response()],
         Play([[Request(), OK + answer(body=b"smuggled")], [Request(), answer(body=b"honest")]])),
    Case("response_before_any_request", [get(), Response()], Play([[OK]], on_connect=True), skip=("client", "fate", "log", "stats", "upstream"),
         note="a race between the dial and the bytes"),
    # ---- limits
    bad("response_head_of_61_kb", head(H, "x: " + "v" * 61_500, "content-length: 0")),
    bad("response_100_headers", head(H, *[f"x-{n}: {n}" for n in range(99)], "content-length: 0")),
    bad("response_101_headers", head(H, *[f"x-{n}: {n}" for n in range(100)], "content-length: 0")),
    bad("response_3_headers_of_3", head(H, "a: 1", "b: 2", "content-length: 0"), request=get(host="small_response_head.test")),
    bad("response_4_headers_of_3", head(H, "a: 1", "b: 2", "c: 3", "content-length: 0"), request=get(host="small_response_head.test")),
    bad("response_head_over_1_kb", head(H, "a: " + "v" * 1100, "content-length: 0"), request=get(host="small_response_head.test")),
    # ---- the mapper
    Case("mapper_no_route", get("/none", host="some.test"), on="mapped"),
    Case("mapper_direct_response", get("/direct", host="some.test"), on="mapped"),
    Case("mapper_not_for_upstream_404", get("/up", host="some.test"), [Request(), answer("404 Not Found", b"theirs")], on="mapped"),
    Case("mapper_json", get("/p?q=1", host="empty.test"), on="mapped"),
    Case("mapper_json_path_with_quotes", get('/p"q\\', host="empty.test"), on="mapped"),
    Case("mapper_html", get(host="dead.test"), on="mapped"),
    Case("mapper_status_by_request_header", get("/", "X-Ask: teapot", host="drained.test"), on="mapped"),
    Case("mapper_default_format", get(host="drained.test"), on="mapped"),
    Case("mapper_head", req("HEAD", "/", host="empty.test"), on="mapped"),
    Case("mapper_grpc", req("POST", "/", "Content-Type: application/grpc", host="empty.test"), on="mapped"),
    Case("mapper_for_invalid_requests", [b"GET / HTTP/1.1\r\nX A: b\r\n\r\n", Response()], on="mapped", then="closed"),
    # ---- local replies run through the response filters
    Case("filters_see_local_reply", get(host="empty.test"), on="filtered"),
    Case("filters_see_no_route", get("/none", host="some.test"), on="filtered"),
]  # fmt: skip

test_case = check_cases(CASES)
