"""Messages between HTTP versions: what of a request and of a response passes from h1 to h2, from h2 to h1 and from h2 to h2, and in which form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Data,
    Ended,
    Got,
    Head,
    Headers,
    Heard,
    Hello,
    Open,
    Play,
    Request,
    Response,
    Script,
    Signal,
    Until,
    Wait,
    answer,
    ask,
    bootstrap,
    check_cases,
    cluster,
    get,
    h2_case,
    h2_cluster,
    head,
    http,
    lines,
    reply,
    req,
)

H1_TRAILERS = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@": "http_options",
        "explicit_http_config": {"http_protocol_options": {"enable_trailers": True}},
    },
}
DOWNSTREAM = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@": "http_options",
        "use_downstream_protocol_config": {"http_protocol_options": {}, "http2_protocol_options": {}},
    },
}


def vhost(name: str, to: str, *domains: str, **route: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test", f"{name}.test:*", *domains], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to, **route}}]}


HOSTS = [
    vhost("a", "a"),
    vhost("at", "at"),
    vhost("h2", "h2a"),
    vhost("same", "same"),
    vhost("same-h2", "same_h2"),
    vhost("literal", "h2a", host_rewrite_literal="other.test"),
    vhost("rewritten", "h2a", prefix_rewrite="/new"),
]
CONFIG = bootstrap(
    http("main", HOSTS),
    http("trailers", HOSTS, http_protocol_options={"enable_trailers": True}),
    http("edge", HOSTS, use_remote_address=True, forward_client_cert_details="SANITIZE_SET", via="proxy"),
    http("continue", HOSTS, proxy_100_continue=True),
    http("no_h1", HOSTS, codec_type="HTTP2"),
    http("no_h2", HOSTS, codec_type="HTTP1"),
    clusters=[
        cluster("a"),
        cluster("at", "a", typed_extension_protocol_options=H1_TRAILERS),
        h2_cluster("h2a"),
        cluster("same", "a", typed_extension_protocol_options=DOWNSTREAM),
        cluster("same_h2", "h2a", typed_extension_protocol_options=DOWNSTREAM),
    ],
)


def ways(
    name: str,
    method: str = "GET",
    path: str = "/",
    *headers: str,
    body: bytes | None = None,
    chunked: bool = False,
    h1: Script | bytes | None = None,
    h2: Script | None = None,
    **fields: Any,
) -> Iterator[Case]:
    """The same exchange from h1 to h2, from h2 to h1 and from h2 to h2. `h1` and `h2`: what the upstream answers to the whole request."""
    up = {"a": [Request(), *(h1 if isinstance(h1, list) else [h1 or answer()])], "h2a": [Ended(), *(h2 or reply())]}
    sent = body or b""
    if chunked:
        sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(sent), sent)
        request = req(method, path, "Transfer-Encoding: chunked", *headers, host="h2.test", body=sent)
    else:
        request = req(method, path, *headers, host="h2.test", body=sent)
    length = () if body is None or chunked else (f"content-length: {len(body)}",)
    lower = [header[: header.find(":")].lower() + header[header.find(":") :] for header in headers]
    yield Case(f"{name}_h1_h2", [request, Response(method)], up, **fields)
    yield h2_case(f"{name}_h2_h1", ask(method, path, *length, *lower, body=body, authority="a.test"), up=up, **fields)
    yield h2_case(f"{name}_h2_h2", ask(method, path, *length, *lower, body=body, authority="h2.test"), up=up, **fields)


LONG = bytes(range(256)) * 800  # 204,800 bytes: more than any window at the beginning
CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
H1_RESPONSE_TRAILERS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-check: sum\r\nx-more: 2\r\n\r\n"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n"

CASES = [
    # ---- requests
    *ways("get"),
    *ways("query", "GET", "/a%20b?x=1&y=%2F"),
    *ways("post", "POST", "/form", "Content-Type: text/plain", body=b"hello"),
    *ways("post_empty", "POST", body=b""),
    *ways("post_unknown_length", "POST", body=b"hello", chunked=True),
    *ways("put_long", "PUT", body=LONG),
    *ways("delete", "DELETE"),
    *ways("options", "OPTIONS"),
    *ways("custom_method", "PROPFIND"),
    *ways("get_with_body", "GET", body=b"hello"),
    *ways("head", "HEAD", h1=answer("200 OK", None, content_length="5"), h2=reply(200, "content-length: 5", body=None)),
    *ways("several_values", "GET", "/", "X-A: 1", "X-A: 2", "X-B:", "X-C: a, b"),
    *ways("cookies", "GET", "/", "Cookie: a=1; b=2", "X-Between: 1", "Cookie: c=3"),
    *ways("cookies_of_responses", h1=answer("200 OK", b"ok") .replace(b"\r\n\r\n", b"\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n\r\n"),
          h2=reply(200, "set-cookie: a=1", "set-cookie: b=2")),
    *ways("te_trailers", "GET", "/", "TE: trailers"),
    *ways("expect_100", "POST", "/", "Expect: 100-continue", body=b"hello"),
    *ways("own_headers", "GET", "/", "X-Request-Id: abc", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "X-Envoy-Original-Path: /x", on="edge"),
    *ways("user_agent_empty", "GET", "/", "User-Agent: "),
    *ways("obs_text", "GET", "/", "X-Text: gr\xfc\xdf"),
    Case("h1_connection_headers_do_not_pass", get("/", "Connection: keep-alive, X-Hop", "X-Hop: 1", "Keep-Alive: 5", "Proxy-Connection: keep-alive",
                                                  host="h2.test")),
    Case("h1_te_gzip", get("/", "TE: gzip", host="h2.test")),
    Case("h1_te_list", get("/", "TE: trailers, gzip", host="h2.test")),
    Case("h1_upgrade_header_does_not_pass", get("/", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
                                                host="h2.test")),
    Case("h1_host_with_port", get("/", host="h2.test:8080")),
    Case("h1_absolute_form", b"GET http://h2.test/x?y HTTP/1.1\r\nHost: other\r\n\r\n"),
    Case("h1_names_lower_cased", get("/", "X-CamelCase: 1", "ACCEPT: */*", host="h2.test")),
    Case("h1_host_rewritten", get("/", host="literal.test")),
    Case("h1_path_rewritten", get("/old/x?y", host="rewritten.test")),
    Case("h1_http10", [b"GET / HTTP/1.0\r\nHost: h2.test\r\n\r\n", Response()], then="closed"),
    Case("h1_pipelined", [get("/1", host="h2.test") + get("/2", host="h2.test"), Response(), Response()]),
    h2_case("h2_many_requests", ask(authority="h2.test"),
            [Open(head("GET", f"/{number}", authority="h2.test")) for number in range(8)], Ended(*range(3, 19, 2))),
    h2_case("h2_sequential_requests_to_h1", *[ask("GET", f"/{number}", authority="a.test") for number in range(3)]),
    h2_case("h2_cookie_crumbs", ask("GET", "/", "cookie: a=1", "x-between: 1", "cookie: b=2", "cookie: c=3", authority="h2.test")),
    h2_case("h2_cookie_crumbs_to_h1", ask("GET", "/", "cookie: a=1", "x-between: 1", "cookie: b=2", "cookie: c=3")),
    h2_case("h2_scheme_https", ask("GET", "/", scheme="https", authority="h2.test")),
    h2_case("h2_scheme_https_to_h1", ask("GET", "/", scheme="https")),
    h2_case("h2_scheme_https_at_the_edge", ask("GET", "/", scheme="https", authority="h2.test"), on="edge"),
    h2_case("h2_host_instead_of_authority", ask("GET", "/", "host: h2.test", authority=None)),
    h2_case("h2_host_equal_to_authority", ask("GET", "/", "host: h2.test", authority="h2.test")),
    h2_case("h2_host_differs_from_authority", ask("GET", "/", "host: a.test", authority="h2.test")),
    h2_case("h2_host_differs_from_authority_to_h1", ask("GET", "/", "host: other.test", authority="a.test")),
    h2_case("h2_authority_with_port", ask("GET", "/", authority="h2.test:81")),
    h2_case("h2_authority_upper_case", ask("GET", "/", authority="H2.TEST")),
    h2_case("h2_options_asterisk", ask("OPTIONS", "*", authority="h2.test")),
    h2_case("h2_options_asterisk_to_h1", ask("OPTIONS", "*")),
    h2_case("h2_host_rewritten", ask(authority="literal.test")),
    h2_case("h2_to_the_protocol_of_downstream", ask(authority="same-h2.test")),
    Case("h1_to_the_protocol_of_downstream", get(host="same.test")),
    h2_case("h2_te_trailers_dropped_to_h1", ask("GET", "/", "te: trailers", authority="at.test"), on="trailers"),
    h2_case("h2_edge", ask("GET", "/", authority="h2.test"), on="edge"),
    h2_case("h2_edge_to_h1", ask("GET", "/"), on="edge"),
    h2_case("h2_padded_data", Open(head("POST", authority="h2.test"), end=False), Data(b"hel", padding=7), Data(b"lo", end=True, padding=0), Ended()),
    h2_case("h2_end_by_empty_data", Open(head("POST", authority="a.test"), end=False), Data(b"hello"), Data(b"", end=True), Ended()),
    h2_case("h2_empty_body_by_empty_data", Open(head("POST", authority="a.test"), end=False), Data(b"", end=True), Ended()),
    h2_case("h2_continuation", Open(head("GET", "/", "x-a: " + "a" * 100, authority="h2.test"), split=20), Ended()),
    h2_case("h2_no_length_post_to_h1", ask("POST", body=b"hello")),
    h2_case("h2_get_with_body_of_unknown_length", ask("GET", body=b"hello")),
    h2_case("h2_long_header_to_h2", Open(head("GET", "/", "x-long: " + "v" * 30_000, authority="h2.test"), split=16_000), Ended(),
            note="the other side's header block needs a CONTINUATION too"),
    h2_case("h2_long_header_of_h1", ask(), up=[Request(), answer(x_long="v" * 30_000)]),
    # ---- responses
    *ways("chunked_response", h1=CHUNKS, h2=reply(body=b"abcde")),
    *ways("long_response", h1=answer("200 OK", LONG), h2=reply(body=LONG), joined=True),
    *ways("long_response_with_length", h1=answer("200 OK", LONG), h2=reply(200, f"content-length: {len(LONG)}", body=LONG)),
    *ways("empty_response", h1=answer("200 OK", b""), h2=reply(body=None)),
    *ways("empty_data_response", h1=answer("200 OK", b""), h2=reply(body=b"")),
    *ways("no_content", h1=answer("204 No Content", None), h2=reply(204, body=None)),
    *ways("no_content_with_length", h1=answer("204 No Content", None, content_length="0"), h2=reply(204, "content-length: 0", body=None)),
    *ways("no_content_with_length_of_something", h1=answer("204 No Content", None, content_length="7"), h2=reply(204, "content-length: 7", body=None)),
    *ways("not_modified", h1=answer("304 Not Modified", None, etag='"x"'), h2=reply(304, 'etag: "x"', body=None)),
    *ways("not_modified_with_length", h1=answer("304 Not Modified", None, content_length="7"), h2=reply(304, "content-length: 7", body=None)),
    *ways("odd_status", h1=answer("299 Odd"), h2=reply(299)),
    *ways("server_error", h1=answer("503 Busy", b"busy"), h2=reply(503, body=b"busy")),
    *ways("head_without_length", "HEAD", h1=answer("200 OK", None), h2=reply(200, body=None)),
    *ways("early_hints", h1=EARLY_HINTS + answer(), h2=[Headers(lines(":status: 103", "link: </a.css>")), *reply()]),
    *ways("continue_unasked", h1=b"HTTP/1.1 100 Continue\r\n\r\n" + answer(), h2=[Headers(lines(":status: 100")), *reply()]),
    *ways("continue_proxied", "POST", "/", "Expect: 100-continue", body=b"hello", h1=b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
          h2=[Headers(lines(":status: 100")), *reply()], on="continue"),
    *ways("early_hints_where_100_is_proxied", h1=EARLY_HINTS + answer(), h2=[Headers(lines(":status: 103", "link: </a.css>")), *reply()], on="continue"),
    *ways("several_informational", h1=EARLY_HINTS * 2 + answer(),
          h2=[Headers(lines(":status: 103", "x-n: 1")), Headers(lines(":status: 103", "x-n: 2")), *reply()]),
    *ways("response_headers", h1=answer("200 OK", b"ok", X_A="1", Server="mine", Date="Thu, 01 Jan 1970 00:00:00 GMT", X_Empty=""),
          h2=reply(200, "x-a: 1", "server: mine", "date: Thu, 01 Jan 1970 00:00:00 GMT", "x-empty:")),
    h2_case("h1_connection_headers_of_responses", ask(), up=[Request(), answer(connection="keep-alive, x-hop", x_hop="1", keep_alive="timeout=5")]),
    h2_case("h1_response_that_closes", ask(), up=[Request(), answer(connection="close")]),
    h2_case("h1_response_to_the_end_of_the_connection", ask(), up=[Request(), b"HTTP/1.1 200 OK\r\n\r\nto the end", Close()]),
    h2_case("h1_proxy_connection_of_responses", ask(), up=[Request(), answer(proxy_connection="keep-alive", upgrade="foo")]),
    h2_case("h2_response_in_many_frames", ask(authority="h2.test"),
            up=[Ended(), Headers(lines(":status: 200")), Data(b"a"), Data(b"b", padding=3), Data(b"c"), Data(b"", end=True)]),
    h2_case("h2_response_with_continuation", ask(authority="h2.test"),
            up=[Ended(), Headers(lines(":status: 200", "x-a: " + "a" * 90), split=10), Data(b"x", end=True)]),
    # ---- trailers
    h2_case("request_trailers_h2_h2", ask("POST", body=b"hello", trailers=("x-check: 1", "x-more: 2"), authority="h2.test")),
    h2_case("request_trailers_without_body_h2_h2", ask("POST", trailers=("x-check: 1",), authority="h2.test")),
    h2_case("request_trailers_h2_h1", ask("POST", body=b"hello", trailers=("x-check: 1",), authority="at.test")),
    h2_case("request_trailers_upstream_cannot", ask("POST", body=b"hello", trailers=("x-check: 1",), authority="a.test")),
    Case("request_trailers_h1_h2", req("POST", "/", "Transfer-Encoding: chunked", host="h2.test", body=b"3\r\nabc\r\n0\r\nX-Check: 1\r\n\r\n"), on="trailers"),
    Case("request_trailers_h1_h2_dropped", req("POST", "/", "Transfer-Encoding: chunked", host="h2.test", body=b"3\r\nabc\r\n0\r\nX-Check: 1\r\n\r\n")),
    h2_case("request_trailers_with_length_h2_h1", ask("POST", "/", "content-length: 5", body=b"hello", trailers=("x-check: 1",), authority="at.test")),
    h2_case("response_trailers_h2_h2", ask(authority="h2.test"), up=[Ended(), *reply(trailers=("x-check: sum", "x-more: 2"))]),
    h2_case("response_trailers_without_body_h2_h2", ask(authority="h2.test"), up=[Ended(), *reply(body=None, trailers=("x-check: sum",))]),
    h2_case("response_trailers_h1_h2", ask(authority="at.test"), up=[Request(), H1_RESPONSE_TRAILERS]),
    h2_case("response_trailers_of_h1_that_may_not", ask(authority="a.test"), up=[Request(), H1_RESPONSE_TRAILERS]),
    Case("response_trailers_h2_h1", get(host="h2.test"), [Ended(), *reply(trailers=("x-check: sum",))], on="trailers"),
    Case("response_trailers_h2_h1_that_cannot", get(host="h2.test"), [Ended(), *reply(trailers=("x-check: sum",))]),
    # ---- order of events
    h2_case("response_before_request_end_h2_h2", Open(head("POST", authority="h2.test"), end=False), Data(b"he"), Heard("end"), Data(b"llo", end=True), Ended(),
            up=[Got(b"he"), *reply(), Ended()]),
    h2_case("response_before_request_end_h2_h1", Open(head("POST", "/", "content-length: 5"), end=False), Data(b"he"), Heard("end"), Ended(),
            up=[Head(), Until(b"he"), answer()]),
    Case("response_before_request_end_h1_h2", [req("POST", "/", "Content-Length: 5", host="h2.test") + b"he", Response("POST")], [Got(b"he"), *reply()],
         then="closed"),
    h2_case("head_of_the_response_before_request_end", Open(head("POST", authority="h2.test"), end=False), Heard("headers"), Data(b"hello", end=True), Ended(),
            up=[Headers(lines(":status: 200")), Ended(), Data(b"bye", end=True)]),
    h2_case("both_directions_stream", Open(head("POST", authority="h2.test"), end=False),
            Data(b"one"), Got(b"ONE"), Data(b"two"), Got(b"TWO"), Data(end=True), Ended(),
            up=[Headers(lines(":status: 200")), Got(b"one"), Data(b"ONE"), Got(b"two"), Data(b"TWO"), Ended(), Data(end=True)]),
    h2_case("answers_out_of_order", Open(head("GET", "/slow", authority="h2.test")), Wait("slow"), Open(head("GET", "/fast", authority="h2.test")), Ended(1, 3),
            up=Play([[Ended(), Signal("slow"), Wait("fast"), *reply(body=b"slow")], [Ended(), *reply(body=b"fast"), Signal("fast")]])),
    # ---- which version a connection speaks
    Case("h1_where_only_h2_is_spoken", get(host="a.test"), on="no_h1", then="closed", skip=("client",), note="our SETTINGS go out at once, then GOAWAY"),
    h2_case("h2_where_only_h1_is_spoken", ask(), on="no_h2", then="closed"),
    h2_case("settings", Heard("settings"), Heard("settings_ack"), ask(), hello=Hello(show=("settings", "window_update", "settings_ack"))),
    h2_case("settings_upstream", ask(authority="h2.test"), up=Play(show=("settings", "window_update", "settings_ack"))),
]  # fmt: skip

test_case = check_cases(CASES)
