"""Life of downstream connections: keep-alive, pipelining, who closes when, HTTP/1.0, 1xx and Expect, limits per connection."""

from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Eof,
    HalfClose,
    Head,
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
    each,
    file_log,
    get,
    http,
    req,
    to,
)

ENDS = [file_log("connection flags=%RESPONSE_FLAGS% closed=%DOWNSTREAM_LOCAL_CLOSE_REASON%/%DOWNSTREAM_DETECTED_CLOSE_TYPE%\n")]


def server(name: str, **options: Any) -> dict:
    """A listener that also logs how its connections end."""
    return http(name, to("a"), listener_fields={"access_log": ENDS}, **options)


CONFIG = bootstrap(
    server("main"),
    server("http10", http_protocol_options={"accept_http_10": True, "default_host_for_http_10": "default.test"}),
    server("http10_no_default", http_protocol_options={"accept_http_10": True}),
    server("continue", proxy_100_continue=True),
    server("two_requests", common_http_protocol_options={"max_requests_per_connection": 2}),
    server("idle", common_http_protocol_options={"idle_timeout": "0.4s"}, drain_timeout="0.1s"),
    server("old_age", common_http_protocol_options={"max_connection_duration": "0.4s"}, drain_timeout="0.1s"),
    server("absolute_off", http_protocol_options={"allow_absolute_url": False}),
    clusters=[cluster("a")],
)

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </s.css>\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"

CASES = [
    Case("two_requests_in_turn", [get("/1"), Response(), get("/2"), Response()]),
    Case("ten_requests_in_turn", [step for n in range(10) for step in (get(f"/{n}"), Response())]),
    Case("pipelined_two", [get("/1") + get("/2"), Response(), Response()]),
    Case("pipelined_five_with_bodies", [b"".join(req("POST", f"/{n}", body=b"x" * n) for n in range(5)), *[Response()] * 5]),
    Case(
        "pipelined_answers_keep_order",
        [get("/slow") + get("/fast"), Response(), Response()],
        each([Request(), answer(body=b"first")], [Request(), answer(body=b"second")]),
    ),
    Case("pipelined_after_close", [get("/1", "Connection: close") + get("/2"), Response()], then="closed"),
    Case("pipelined_then_garbage", [get("/1") + b"garbage\r\n\r\n", Response(), Response()], then="closed"),
    Case("connection_close", get("/", "Connection: close"), then="closed"),
    Case("connection_close_upper_case", get("/", "CONNECTION: Close"), then="closed"),
    Case("connection_close_in_list", get("/", "Connection: x-a, close"), then="closed"),
    Case("connection_keep_alive", get("/", "Connection: keep-alive")),
    Case("proxy_connection_close", get("/", "Proxy-Connection: close")),
    Case("connection_close_head", req("HEAD", "/", "Connection: close"), then="closed"),
    Case("upstream_close_does_not_close_downstream", get(), [Request(), answer(connection="close"), Close()]),
    Case("client_half_close_after_request", [get(), HalfClose(), Response()], then="closed", skip=("log", "stats", "upstream"), note="a race by nature"),
    Case(
        "client_gone_while_waiting",
        [get(), Wait("asked"), Close()],
        [Head(), Signal("asked"), Eof()],
    ),
    Case("client_reset_while_waiting", [get(), Wait("asked"), Reset()], [Head(), Signal("asked"), Eof()]),
    Case("client_gone_in_request_body", [req("POST", "/", "Content-Length: 10") + b"hal", Wait("asked"), Close()], [Until(b"hal"), Signal("asked"), Eof()]),
    Case(
        "client_gone_in_response_body",
        [get(), Until(b"part"), Close()],
        [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart", Eof()],
    ),
    # ---- idle, age, requests per connection
    Case("idle_connection_is_closed", [get(), Response()], on="idle", then="closed"),
    Case("idle_without_request", [b""], on="idle", then="closed"),
    Case("max_requests_per_connection", [get("/1"), Response(), get("/2"), Response()], on="two_requests", then="closed"),
    Case("max_requests_pipelined", [get("/1") + get("/2") + get("/3"), Response(), Response()], on="two_requests", then="closed"),
    Case("max_connection_duration_idle", [get(), Response()], on="old_age", then="closed"),
    # ---- HTTP/1.0 and older
    Case("http_1_0_refused", req("GET", "/", version="1.0"), then="closed"),
    *[
        Case(f"version_and_target_{number}", [f"{line}\r\nHost: a.test\r\n\r\n".encode(), Response()], then="closed")
        for number, line in enumerate(
            (
                "GET /",
                "GET foo",
                "GET *",
                "GET http://a/",
                "GET HTTP/1.1",
                "GET HTTP/1.0",
                "GET foo HTTP/1.0",
                "GET foo HTTP/1.2",
                "GET * HTTP/1.2",
                "OPTIONS *",
                "OPTIONS *a",
                "OPTIONS * HTTP/1.2",
                "CONNECT foo",
                "CONNECT a:1",
                "CONNECT a:1 HTTP/1.2",
                "GET foo HTTP/2.0",
                "GET ftp://a/",
                "GET http://a",
            )
        )
    ],
    Case("http_1_0_without_host_refused", b"GET / HTTP/1.0\r\n\r\n", then="closed"),
    Case("http_1_0_closes", req("GET", "/", version="1.0"), on="http10", then="closed"),
    Case("http_1_0_keep_alive", req("GET", "/", "Connection: keep-alive", version="1.0"), on="http10"),
    Case("http_1_0_keep_alive_mixed_case", req("GET", "/", "Connection: Keep-Alive", version="1.0"), on="http10"),
    Case("http_1_0_default_host", b"GET /x HTTP/1.0\r\n\r\n", on="http10", then="closed"),
    Case("http_1_0_no_default_host", b"GET /x HTTP/1.0\r\n\r\n", on="http10_no_default", then="closed"),
    Case("http_1_0_post", req("POST", "/", version="1.0", body=b"hello"), on="http10", then="closed"),
    Case("http_1_0_head", req("HEAD", "/", version="1.0"), on="http10", then="closed"),
    Case(
        "http_1_0_gets_no_chunks",
        req("GET", "/", version="1.0"),
        [Request(), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
        on="http10",
        then="closed",
    ),
    Case(
        "http_1_0_keep_alive_with_chunked_response",
        req("GET", "/", "Connection: keep-alive", version="1.0"),
        [Request(), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
        on="http10",
        then="closed",
    ),
    Case("http_1_0_gets_no_1xx", req("GET", "/", version="1.0"), [Request(), EARLY_HINTS, OK], on="http10", then="closed"),
    Case("http_1_0_expect", req("POST", "/", "Expect: 100-continue", version="1.0", body=b"x"), on="http10", then="closed"),
    Case("http_0_9", b"GET /\r\n\r\n", then="closed"),
    Case("http_1_1_on_http10_listener", get(), on="http10"),
    Case("http_1_1_without_host_on_http10_listener", get(host=None), on="http10", then="closed"),
    Case("absolute_form_not_allowed", req("GET", "http://b.test/x"), on="absolute_off"),
    # ---- Expect and 1xx
    Case("expect_continue", [req("POST", "/", "Expect: 100-continue", "Content-Length: 5"), Until(b"100 Continue\r\n\r\n"), b"hello", Response("POST")]),
    Case("expect_continue_body_at_once", req("POST", "/", "Expect: 100-continue", body=b"hello")),
    Case("expect_continue_upper_case", [req("POST", "/", "Expect: 100-Continue", "Content-Length: 5"), Until(b"100 Continue\r\n\r\n"), b"hello", Response()]),
    Case("expect_other", req("POST", "/", "Expect: 200-ok", body=b"hello")),
    Case("expect_on_get", get("/", "Expect: 100-continue")),
    Case(
        "expect_continue_proxied",
        [req("POST", "/", "Expect: 100-continue", "Content-Length: 5"), Until(b"100 Continue\r\n\r\n"), b"hello", Response("POST")],
        [Head(), CONTINUE, Until(b"hello"), OK],
        on="continue",
    ),
    Case(
        "expect_continue_refused_by_upstream",
        [req("POST", "/", "Expect: 100-continue", "Content-Length: 5"), Response("POST")],
        [Head(), answer("417 No", b"")],
        on="continue",
        then="closed",
    ),
    Case("upstream_sends_100_unasked", get(), [Request(), CONTINUE, OK]),
    Case("upstream_sends_100_proxied", get(), [Request(), CONTINUE, OK], on="continue"),
    Case("upstream_sends_103", get(), [Request(), EARLY_HINTS, OK]),
    Case("upstream_sends_103_twice", get(), [Request(), EARLY_HINTS, EARLY_HINTS, OK]),
    Case("upstream_sends_103_proxied", get(), [Request(), EARLY_HINTS, OK], on="continue"),
    Case("upstream_sends_102", get(), [Request(), PROCESSING, OK]),
    Case("upstream_sends_101_unasked", get(), [Request(), SWITCHING], stricter=502),
]

test_case = check_cases(CASES)
