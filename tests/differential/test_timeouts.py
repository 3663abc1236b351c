"""Timeouts of routes, tries, streams, requests and connections, and who says what when they fire.

They are long enough for what has to happen before, also where the machine has much else to do.
"""

from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Eof,
    Head,
    Idle,
    Play,
    Request,
    Response,
    Until,
    answer,
    bootstrap,
    check_cases,
    cluster,
    get,
    http,
    req,
    y,
)

LOCAL = {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}
INTERNAL = "X-Forwarded-For: 127.0.0.9"


def vhost(name: str, text: str, to: str = "a", **fields: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to, **y(text)}, **fields}]}


HOSTS = [
    vhost("none", "{}"),
    vhost("short", "{timeout: 0.3s}"),
    vhost("off", "{timeout: 0s, idle_timeout: 0.4s}"),
    vhost("per_try", "{timeout: 5s, retry_policy: {retry_on: '5xx', num_retries: 1, per_try_timeout: 0.3s}}"),
    vhost("per_try_no_retry", "{timeout: 5s, retry_policy: {retry_on: 'connect-failure', per_try_timeout: 0.3s}}"),
    vhost("per_try_over_global", "{timeout: 0.3s, retry_policy: {retry_on: '5xx', num_retries: 2, per_try_timeout: 9s}}"),
    vhost("per_try_idle", "{timeout: 5s, retry_policy: {retry_on: 'connect-failure', per_try_idle_timeout: 0.3s}}"),
    vhost("max_duration", "{timeout: 5s, max_stream_duration: {max_stream_duration: 0.3s}}"),
    vhost("grpc_max", "{timeout: 5s, max_stream_duration: {grpc_timeout_header_max: 0.5s}}"),
    vhost("grpc_old", "{timeout: 5s, max_grpc_timeout: 0.5s}"),
    vhost("grpc_offset", "{timeout: 5s, max_grpc_timeout: 10s, grpc_timeout_offset: 0.3s}"),
    vhost("cluster_duration", "{timeout: 5s}", to="short_lived"),
    vhost("idle", "{timeout: 0s, idle_timeout: 0.3s}"),
    vhost("connect", "{timeout: 5s}", to="hole"),
    vhost("connect_retry", "{timeout: 5s, retry_policy: {retry_on: 'connect-failure', num_retries: 1}}", to="hole"),
    vhost("connect_global", "{timeout: 0.15s}", to="hole"),
]
CONFIG = bootstrap(
    http("main", HOSTS),
    http("internal", HOSTS, internal_address_config=LOCAL),
    http(
        "respecting", HOSTS, internal_address_config=LOCAL,
        http_filters=[{"name": "router", "typed_config": {"@": "router", "respect_expected_rq_timeout": True}}],
    ),
    http("request", HOSTS, request_timeout="0.3s"),
    http("request_headers", HOSTS, request_headers_timeout="0.3s"),
    http("stream_idle", HOSTS, stream_idle_timeout="0.3s"),
    http("no_filters", HOSTS, stream_idle_timeout="0.3s", http_filters=[]),
    http("stream_duration", HOSTS, common_http_protocol_options={"max_stream_duration": "0.3s"}),
    clusters=[
        cluster("a"),
        cluster("short_lived", "a", typed_extension_protocol_options={
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@": "http_options", "explicit_http_config": {"http_protocol_options": {}}, "common_http_protocol_options": {"max_stream_duration": "0.3s"},
            },
        }),
        cluster("hole", connect_timeout="0.6s"),
    ],
)  # fmt: skip

SILENT = [Request(), Eof()]
STALLED = [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart", Eof()]
DRIBBLE = [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", *[step for byte in b"slow" for step in (Idle(0.15), bytes((byte,)))]]
SLOW_POST = [req("POST", "/", "Content-Length: 10", host="none.test") + b"half", Response("POST")]
GRPC = ["Content-Type: application/grpc", "TE: trailers"]


def silent(name: str, request: bytes, **fields: Any) -> Case:
    return Case(name, request, SILENT, **fields)


CASES = [
    silent("route_timeout", get(host="short.test")),
    silent("route_timeout_post", req("POST", "/", host="short.test", body=b"hello")),
    silent("route_timeout_head", req("HEAD", "/", host="short.test")),
    silent("route_timeout_grpc", req("POST", "/", *GRPC, host="short.test")),
    Case("route_timeout_after_headers", [get(host="short.test"), Until(b"part")], STALLED, then="closed"),
    silent("per_try_timeout_both_tries", get(host="per_try.test")),
    Case("per_try_timeout_second_answers", get(host="per_try.test"), Play([[Request(), Eof()], [Request(), OK]])),
    silent("per_try_timeout_no_retry", get(host="per_try_no_retry.test")),
    silent("per_try_over_global_ignored", get(host="per_try_over_global.test")),
    silent("per_try_idle", get(host="per_try_idle.test")),
    Case("per_try_idle_after_headers", [get(host="per_try_idle.test"), Until(b"part")], STALLED, then="closed"),
    silent("max_stream_duration_of_route", get(host="max_duration.test")),
    Case("max_stream_duration_after_headers", [get(host="max_duration.test"), Until(b"part")], STALLED, then="closed"),
    silent("max_stream_duration_of_cluster", get(host="cluster_duration.test")),
    silent("max_stream_duration_of_manager", get(host="none.test"), on="stream_duration"),
    silent("max_stream_duration_of_manager_grpc", req("POST", "/", *GRPC, host="none.test"), on="stream_duration"),
    Case("max_stream_duration_half_request", SLOW_POST, [Head(), Eof()], on="stream_duration", then="closed"),
    silent("route_idle_timeout", get(host="idle.test")),
    silent("route_idle_timeout_off_route", get(host="off.test")),
    Case("route_idle_half_request", [req("POST", "/", "Content-Length: 10", host="idle.test") + b"half", Response("POST")], [Head(), Eof()], then="closed"),
    Case("route_idle_after_headers", [get(host="idle.test"), Until(b"part")], STALLED, then="closed"),
    silent("stream_idle_timeout", get(host="none.test"), on="stream_idle"),
    Case("stream_idle_slow_response", get(host="none.test"), DRIBBLE, on="stream_idle"),
    silent("no_filters_at_all", get(host="none.test"), on="no_filters"),
    silent("stream_idle_timeout_grpc", req("POST", "/", *GRPC, host="none.test"), on="stream_idle"),
    Case("stream_idle_half_request", SLOW_POST, [Head(), Eof()], on="stream_idle", then="closed"),
    Case("request_timeout_half_body", SLOW_POST, [Head(), Eof()], on="request", then="closed"),
    Case("request_timeout_half_head", [b"GET / HTTP/1.1\r\nHost: none.test\r\nX-", Response()], on="request", then="closed"),
    Case("request_timeout_not_for_whole_requests", get(host="none.test"), on="request"),
    Case("request_headers_timeout", [b"GET / HTTP/1.1\r\nHost: none.test\r\nX-", Response()], on="request_headers", then="closed"),
    Case("request_headers_timeout_in_line", [b"GE", Response()], on="request_headers", then="closed"),
    Case("request_headers_timeout_second_request", [get(host="none.test"), Response(), b"GET / H", Response()], on="request_headers", then="closed"),
    silent("connect_timeout", get(host="connect.test")),
    silent("connect_timeout_retried", get(host="connect_retry.test")),
    silent("connect_slower_than_route_timeout", get(host="connect_global.test")),
    # ---- timeouts from headers
    silent("header_timeout_external_ignored", get("/", "x-envoy-upstream-rq-timeout-ms: 1", host="short.test")),
    silent("header_timeout_internal", get("/", "x-envoy-upstream-rq-timeout-ms: 250", INTERNAL, host="none.test"), on="internal"),
    silent("header_per_try_internal", get("/", "x-envoy-upstream-rq-per-try-timeout-ms: 250", INTERNAL, host="none.test"), on="internal"),
    silent(
        "header_alt_response",
        get("/", "x-envoy-upstream-rq-timeout-alt-response: 1", "x-envoy-upstream-rq-timeout-ms: 250", INTERNAL, host="none.test"), on="internal",
    ),
    silent("header_expected_respected", get("/", "x-envoy-expected-rq-timeout-ms: 250", INTERNAL, host="none.test"), on="respecting"),
    Case("header_timeout_garbage", get("/", "x-envoy-upstream-rq-timeout-ms: abc", INTERNAL, host="none.test"), on="internal"),
    Case("header_timeout_zero", get("/", "x-envoy-upstream-rq-timeout-ms: 0", INTERNAL, host="none.test"), on="internal"),
    *[
        silent(f"grpc_timeout_{value}_{host}", req("POST", "/", *GRPC, f"grpc-timeout: {value}", host=f"{host}.test"))
        for value, host in [
            ("250m", "grpc_max"), ("9S", "grpc_max"), ("250m", "grpc_old"), ("9S", "grpc_old"), ("0m", "grpc_old"), ("600m", "grpc_offset"),
            ("250000u", "grpc_max"),
        ]
    ],
    Case(
        "grpc_timeout_garbage",
        req("POST", "/", *GRPC, "grpc-timeout: soon", host="grpc_max.test"), [Request(), answer(body=b"", content_type="application/grpc")],
    ),
]  # fmt: skip

test_case = check_cases(CASES)
