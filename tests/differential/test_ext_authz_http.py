"""The ext_authz filter with a service that is asked by HTTP."""

from typing import Any

from tests.differential.authz import HTTP, SENT, ask_http, authz, http_play, patterns
from tests.differential.harness import (
    Case,
    Close,
    Request,
    Reset,
    Script,
    Wait,
    bootstrap,
    check_cases,
    cluster,
    get,
    req,
)

RESPONSE = {
    "allowed_upstream_headers": patterns("x-up", "x-tier", "x-existing"),
    "allowed_upstream_headers_to_append": patterns("x-append", "x-up-both", "accept"),
    "allowed_client_headers": patterns("x-why", "set-cookie"),
    "allowed_client_headers_on_success": patterns("x-ok", how="prefix"),
    "dynamic_metadata_from_headers": patterns("said", "x-meta"),
}

PARTLY = {"max_request_bytes": 16, "allow_partial_message": True}
CONFIG = bootstrap(
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
    clusters=[cluster("a"), cluster("b"), cluster("authz"), cluster("dead", "dead")],
)


def by_http(on: str, name: str, script: Script | bytes, *said: Any, **fields: Any) -> Case:
    return Case(f"{on}_{name}", script, {"authz": http_play(*said)}, on=on, **fields)


CASES = [
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
    *[by_http(on, "malformed", get("/"), b"HTTP/1.1 whatever\r\n\r\n") for on in ("http", "http_open")],
    by_http("http", "closed_in_the_body", get("/"), [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", Close()]),
    by_http("http_open", "closed_in_the_body", get("/"), [Request(), b"HTTP/1.1 403 No\r\ncontent-length: 10\r\n\r\nabc", Close()]),
    by_http("http", "denied_until_the_end", get("/"), [Request(), b"HTTP/1.1 403 No\r\n\r\nabc", Close()]),
    by_http("http", "denied_with_trailers", get("/"), b"HTTP/1.1 403 No\r\ntransfer-encoding: chunked\r\n\r\n2\r\nno\r\n0\r\nx-t: 1\r\n\r\n"),
    by_http("http", "informed", get("/"), b"HTTP/1.1 103 Early\r\nx-a: 1\r\n\r\nHTTP/1.1 102 Wait\r\n\r\n" + ask_http("x-b: 1", status="403 No")),
    by_http("http", "continued", get("/"), b"HTTP/1.1 100 Continue\r\n\r\n" + ask_http()),
    by_http("http", "not_modified", get("/"), b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\netag: a\r\n\r\n"),
    by_http("http", "head", req("HEAD", "/p"), ask_http(status="403 No", body=b"why")),
    by_http("http_body", "upgrade", get("/", "Connection: Upgrade", "Upgrade: websocket")),
    by_http("http_retry", "second_is_good", get("/"), ask_http(status="500 No"), ask_http()),
    by_http("http_retry", "none_is_good", get("/"), ask_http(status="500 No"), ask_http(status="500 No")),
    by_http("http_retry", "denied", get("/"), ask_http(status="403 No")),
]
test_case = check_cases(CASES)
