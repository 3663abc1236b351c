"""HTTP/1.1 requests and responses that every proxy must carry: methods, bodies, framing, hop-by-hop headers, absolute-form, HEAD, 204, 304."""

from tests.differential.harness import (
    Case,
    Close,
    Head,
    Request,
    Response,
    Signal,
    Until,
    Wait,
    answer,
    bootstrap,
    check_cases,
    cluster,
    get,
    http,
    req,
    to,
)

CONFIG = bootstrap(http("main", to("a")), clusters=[cluster("a")])


def up(*script):
    """The upstream reads a whole request, then plays the script."""
    return [Request(), *script]


def head(*lines: str) -> bytes:
    """An empty response with these header lines."""
    return ("\r\n".join(["HTTP/1.1 200 OK", *lines, "content-length: 0", "", ""])).encode()


JOINED_IN_REQUESTS = """accept accept-language authorization cache-control content-encoding cookie expect if-match if-none-match origin pragma range referer
user-agent via x-client-trace-id x-envoy-attempt-count x-custom x-envoy-decorator-operation x-forwarded-for x-forwarded-host x-forwarded-port x-request-id
traceparent""".split()
JOINED_IN_RESPONSES = """age allow cache-control content-encoding etag expires last-modified link location retry-after server set-cookie vary via www-
authenticate x-custom x-envoy-degraded x-envoy-upstream-canary x-request-id""".split()
CASES = [
    Case("get", get("/")),
    Case("get_with_query", get("/a/b?c=d&e=%20f")),
    Case("header_order_and_case", get("/", "X-Second: 2", "Accept: */*", "x-first: 1", "User-Agent: probe/1")),
    Case("repeated_header", get("/", "X-Many: 1", "X-Other: o", "X-Many: 2")),
    Case("empty_header_value", get("/", "X-Empty:", "X-Blank:   ")),
    Case("value_whitespace_trimmed", get("/", "X-Padded: \t  inner  space \t ")),
    Case("obs_text_in_value", get("/", "X-Bytes: caf\xe9 \xff")),
    Case("no_space_after_colon", get("/", "X-Tight:yes")),
    *[Case(f"method_{m}", req(m, "/m")) for m in ("HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "PROPFIND", "M-SEARCH", "get", "GETX")],
    Case("post_content_length", req("POST", "/p", body=b"hello")),
    Case("post_empty_content_length", req("POST", "/p", "Content-Length: 0")),
    Case("post_without_framing", req("POST", "/p")),
    Case("get_with_body", req("GET", "/g", body=b"body of a get")),
    Case("delete_with_body", req("DELETE", "/g", body=b"x")),
    Case("post_chunked", req("POST", "/c", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")),
    Case("post_chunked_upper_case", req("POST", "/c", "Transfer-Encoding: CHUNKED", body=b"A\r\n0123456789\r\n0\r\n\r\n")),
    Case("post_chunked_empty", req("POST", "/c", "Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    Case("get_chunked", req("GET", "/c", "Transfer-Encoding: chunked", body=b"1\r\nx\r\n0\r\n\r\n")),
    Case("chunk_size_with_zeros", req("POST", "/c", "Transfer-Encoding: chunked", body=b"0005\r\nhello\r\n000\r\n\r\n")),
    Case("response_chunked", get(), up(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")),
    Case("response_chunk_extension_dropped", get(), up(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n")),
    Case(
        "response_head_does_not_wait_for_body",
        [get(), Until(b"\r\n\r\n"), Signal("seen"), Until(b"body")],
        up(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", Wait("seen"), b"body"),
    ),
    Case("response_until_close", get(), up(b"HTTP/1.1 200 OK\r\n\r\nuntil the end", Close())),
    Case("response_empty_until_close", get(), up(b"HTTP/1.1 200 OK\r\n\r\n", Close())),
    Case("response_content_length_0", get(), up(answer(body=b""))),
    Case("response_404_no_body", get(), up(answer("404 Not Found", b""))),
    Case("response_reason_replaced", get(), up(answer("200 Very Well"))),
    Case("response_without_reason", get(), up(b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n")),
    Case("response_empty_reason", get(), up(b"HTTP/1.1 404 \r\ncontent-length: 0\r\n\r\n")),
    *[Case(f"response_status_{s}", get(), up(answer(f"{s} Why"))) for s in (201, 206, 299, 308, 418, 429, 451, 500, 511, 599, 600, 799, 999)],
    Case("response_header_order", get(), up(answer(Zeta="z", Alpha="a", X_Mixed="m", server="theirs", date="Thu, 01 Jan 1970 00:00:00 GMT"))),
    Case("response_repeated_headers", get(), up(b"HTTP/1.1 200 OK\r\nset-cookie: a=1\r\nset-cookie: b=2\r\nvary: x\r\nvary: y\r\ncontent-length: 0\r\n\r\n")),
    Case("response_hop_by_hop_removed", get(), up(answer(connection="x-secret", keep_alive="timeout=5", x_secret="1", proxy_connection="x"))),
    Case("response_upgrade_header_without_request", get(), up(answer(upgrade="h2c", connection="upgrade"))),
    Case("response_upstream_close", get(), up(answer(connection="close"))),
    Case("response_http_1_0", get(), up(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok")),
    Case("response_http_1_0_keep_alive", get(), up(b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok")),
    Case("response_204", get(), up(b"HTTP/1.1 204 No Content\r\n\r\n")),
    Case("response_204_with_length_0", get(), up(b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n")),
    Case("response_304", get(), up(b'HTTP/1.1 304 Not Modified\r\netag: "x"\r\n\r\n')),
    Case("response_304_with_length", get(), up(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n")),
    Case("response_205", get(), up(b"HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n")),
    Case("head_with_content_length", req("HEAD", "/h"), up(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")),
    Case("head_chunked", req("HEAD", "/h"), up(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")),
    Case("head_without_framing", req("HEAD", "/h"), up(b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n")),
    Case("head_404_from_upstream", req("HEAD", "/h"), up(b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\n\r\n")),
    Case("request_hop_by_hop_removed", get("/", "Keep-Alive: 300", "Proxy-Connection: keep-alive", "TE: gzip", "Upgrade: h2c")),
    Case("te_trailers_kept", get("/", "TE: trailers")),
    Case("te_trailers_among_others", get("/", "TE: gzip;q=0.5, trailers")),
    Case("connection_names_header", get("/", "Connection: x-secret", "X-Secret: 1", "X-Open: 2")),
    Case("connection_names_several", get("/", "Connection: x-a, X-B ,keep-alive", "X-A: 1", "X-B: 2", "X-C: 3")),
    Case("connection_names_mesh_headers", get("/", "Connection: host, authorization, x-forwarded-for", "Authorization: t", "X-Forwarded-For: 1.2.3.4")),
    Case("proxy_authorization_kept", get("/", "Proxy-Authorization: Basic eA==", "Authorization: Bearer t", "Cookie: a=b; c=d", "Cookie: e=f")),
    Case("absolute_form", req("GET", "http://b.test/path?q=1")),
    Case("absolute_form_with_port", req("GET", "http://b.test:8080/path", host="a.test")),
    Case("absolute_form_without_path", req("GET", "http://b.test")),
    Case("absolute_form_query_only", req("GET", "http://b.test?x=1")),
    Case("absolute_form_upper_case_scheme", req("GET", "HTTP://b.test/x")),
    Case("absolute_form_https_over_plaintext", req("GET", "https://b.test/x")),
    Case("absolute_form_other_scheme", req("GET", "ftp://b.test/x")),
    Case("absolute_form_userinfo", req("GET", "http://user:pw@b.test/x"), stricter=400),
    Case("repeated_headers_are_joined", get("/", *[f"{name}: {n}" for n in (1, 2) for name in JOINED_IN_REQUESTS])),
    Case("repeated_response_headers_are_joined", get(), up(head(*[f"{name}: {n}" for n in (1, 2) for name in JOINED_IN_RESPONSES]))),
    Case("options_asterisk", req("OPTIONS", "*")),
    Case("get_asterisk", req("GET", "*")),
    Case("host_with_port", get(host="a.test:8080")),
    Case("host_ipv6", get(host="[::1]:80")),
    Case("host_upper_case", get(host="A.Test")),
    Case("path_percent_encoding_kept", get("/%41%2f%zz/;p=1/'()*")),
    Case("path_with_obs_text", get("/caf\xe9")),
    Case("path_of_4000_bytes", get("/" + "p" * 4000)),
    Case("empty_lines_before_request", b"\r\n\r\n" + get()),
    Case("head_in_pieces", [b"GET / HT", b"TP/1.1\r\nHo", b"st: a.test\r\nx-a:", b" b\r\n\r", b"\n", Response()]),
    Case("body_after_head", [req("POST", "/", "Content-Length: 5"), b"hel", b"lo", Response("POST")]),
    Case(
        "response_before_request_is_complete",
        [req("POST", "/", "Content-Length: 5"), b"he", Response("POST")],
        [Head(), answer("403 No")],
        then="closed",
        skip=("stats",),
        note="whether upstream bytes are counted before the reset depends on timing",
    ),
    Case(
        "early_response_then_rest_of_body",
        [req("POST", "/", "Content-Length: 5"), Until(b"ok"), b"hello"],
        [Head(), answer()],
        then="closed",
        skip=("upstream", "log"),
        note="whether the rest of the body still goes out depends on timing",
    ),
    Case("accept_encoding_and_range_pass", get("/", "Accept-Encoding: gzip, br", "Range: bytes=0-1", "If-None-Match: \"x\"")),
    Case("x_envoy_headers_of_clients", get("/", "x-envoy-internal: true", "x-envoy-max-retries: 3", "x-envoy-retry-on: 5xx", "x-envoy-decorator-operation: d")),
    Case("x_request_id_kept", get("/", "x-request-id: mine")),
    Case("x_request_id_empty", get("/", "x-request-id:")),
    Case("trace_headers_pass", get("/", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "b3: 0", "baggage: k=v")),
    Case("forwarded_headers_default", get("/", "X-Forwarded-For: 1.2.3.4, 5.6.7.8", "X-Forwarded-Proto: https", "X-Forwarded-Host: x", "Forwarded: for=x")),
    Case("x_forwarded_proto_invalid", get("/", "X-Forwarded-Proto: gopher")),
    Case("expected_rq_timeout_from_client", get("/", "x-envoy-expected-rq-timeout-ms: 77", "x-envoy-upstream-rq-timeout-ms: 99")),
    Case("referer_valid_and_invalid", get("/", "Referer: http://x.test/y")),
    Case("referer_invalid", get("/", "Referer: not a url")),
    Case("referer_twice", get("/", "Referer: http://x.test/y", "Referer: http://z.test/y")),
    Case("body_64k", req("POST", "/big", body=b"0123456789abcdef" * 4096)),
    Case("response_64k", get(), up(answer(body=b"0123456789abcdef" * 4096))),
    Case(
        "grpc_like_request",
        req("POST", "/s/m", "Content-Type: application/grpc", "TE: trailers", body=b"\0\0\0\0\0"),
        up(answer(body=b"", content_type="application/grpc")),
    ),
]  # fmt: skip

test_case = check_cases(CASES)
