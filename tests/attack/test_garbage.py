"""Damaged bytes on every port, from clients and from upstreams: an error or an answer, and a process that is as it was."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests import corpus
from tests.attack.target import Target, arena, http
from tests.differential.config import cluster, endpoint, file_log, filter_, listener
from tests.differential.wire import OK, Close, Head, Request

QUICK = {"stream_idle_timeout": "0.3s", "request_headers_timeout": "0.2s", "delayed_close_timeout": "0.02s", "drain_timeout": "0.02s",
         "common_http_protocol_options": {"idle_timeout": "0.2s"}}  # fmt: skip
COMMANDS = (
    "REQ(:PATH) REQ(X):3 QUERY_PARAM(a) PROTOCOL DURATION BYTES_RECEIVED REQUEST_HEADERS_BYTES UPSTREAM_HOST RESP(X) RESPONSE_CODE_DETAILS GRPC_STATUS TRACE_ID"
)
LOGS = [
    file_log("|".join(f"%{name}%" for name in COMMANDS.split()) + "\n", file="text.log"),
    file_log(file="json.log", log_format={"json_format": {name: f"%{name}%" for name in COMMANDS.split()}}),
]
ROUTES: list[dict[str, Any]] = [
    {"match": {"prefix": "/", "headers": [{"name": "x-range", "range_match": {"start": 1, "end": 99}}]}, "direct_response": {"status": 200}},
    {"match": {"prefix": "/", "query_parameters": [{"name": "a", "string_match": {"safe_regex": {"regex": "(x+)+y"}}}]}, "direct_response": {"status": 201}},
    {"match": {"safe_regex": {"regex": "/re/(a+)+"}}, "redirect": {"prefix_rewrite": "/new"}},
    {"match": {"connect_matcher": {}}, "route": {"cluster": "a", "upgrade_configs": [{"upgrade_type": "CONNECT"}]}},
    {"match": {"prefix": "/", "grpc": {}}, "route": {"cluster": "a", "max_stream_duration": {"grpc_timeout_header_max": "1s"}}},
    {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "ring", "retry_policy": {"retry_on": "5xx", "num_retries": 1}, "prefix_rewrite": "/sink/",
            "hash_policy": [{"cookie": {"name": "c", "ttl": "60s"}}, {"header": {"header_name": "x"}}, {"query_parameter": {"name": "a"}}],
        },
        "request_headers_to_add": [{"header": {"key": "x-made", "value": "%REQ(X)% %QUERY_PARAM(a)% %PROTOCOL%"}}],
    },
]  # fmt: skip
SINK = [
    {"name": "all", "domains": ["*"], "routes": ROUTES, "virtual_clusters": [{"name": "v", "headers": [{"name": ":path", "string_match": {"prefix": "/v"}}]}]}
]
FILTERS = [
    filter_("cors"),
    filter_("fault", abort={"header_abort": {}, "percentage": {"numerator": 100}}, delay={"header_delay": {}, "percentage": {"numerator": 100}}),
]


def tls(base: dict[str, Any]) -> dict[str, Any]:
    certificate = {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}
    context = {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [certificate]}}
    base["filter_chains"][0] |= {"transport_socket": {"name": "tls", "typed_config": context}, "transport_socket_connect_timeout": "0.2s"}
    return base


def inspected(*names: str) -> dict[str, Any]:
    return {"listener_filters": [filter_(name) for name in names], "listener_filters_timeout": "0.2s"}


CONFIG = arena(
    http("main", SINK),
    http("sink", SINK, **QUICK, access_log=LOGS, filters=FILTERS, use_remote_address=True, xff_num_trusted_hops=1, normalize_path=True, merge_slashes=True,
         path_with_escaped_slashes_action="UNESCAPE_AND_REDIRECT", strip_matching_host_port=True, always_set_request_id_in_response=True, via="v",
         forward_client_cert_details="APPEND_FORWARD", upgrade_configs=[{"upgrade_type": "websocket"}],
         http_protocol_options={"accept_http_10": True, "default_host_for_http_10": "a", "enable_trailers": True}, proxy_100_continue=True),
    http("spelt", SINK, **QUICK, strip_any_host_port=True, http_protocol_options={"header_key_format": {"stateful_formatter": {
        "name": "preserve_case", "typed_config": {"@": "preserve_case"}}}}, append_x_forwarded_port=True, xff_num_trusted_hops=2),
    tls(http("tls", SINK, **QUICK)),
    http("inspected", SINK, **QUICK, listener_fields=inspected("tls_inspector", "http_inspector")),
    http("proxied", SINK, **QUICK, listener_fields=inspected("proxy_protocol")),
    http("all", SINK, **QUICK, listener_fields=inspected("proxy_protocol", "tls_inspector", "http_inspector", "original_dst")),
    listener("tcp", filter_("tcp_proxy", stat_prefix="tcp", cluster="a", idle_timeout="0.3s")),
    clusters=[
        cluster("a"),
        cluster("ring", endpoint("a"), endpoint("b"), lb_policy="RING_HASH", outlier_detection={"consecutive_5xx": 1000},
                typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@": "http_options", "explicit_http_config": {"http_protocol_options": {"enable_trailers": True}}}}),
    ],
)  # fmt: skip


async def volley(target: Target, listener: str, requests: list[bytes]) -> int:
    """Send each on a connection of its own, fifty at a time, up to the connection's end; how many got an answer."""
    waiting = list(requests)
    answered = 0

    async def shoot() -> None:
        nonlocal answered
        while waiting:
            answer = await target.send(waiting.pop(), listener=listener)
            answered += bool(answer.data)

    await asyncio.gather(*(shoot() for _ in range(50)))
    return answered


@pytest.mark.parametrize(
    ("name", "listener", "count"),
    [
        ("h1_request", "sink", 250), ("h1_request", "spelt", 150), ("h1_request", "inspected", 100), ("h1_request", "tcp", 50), ("h1_request", "tls", 50),
        ("proxy_protocol", "proxied", 120), ("proxy_protocol", "all", 80),
        ("client_hello", "inspected", 100), ("client_hello", "tls", 100), ("client_hello", "all", 50),
    ],
)  # fmt: skip
async def test_damaged_bytes_of_clients(target: Target, name: str, listener: str, count: int):
    """Corpora of parsers and their damaged copies, against whole processes."""
    for upstream in ("a", "b"):
        target.upstream(upstream, [Request(), OK, Close()])
    requests = corpus.load(name) + list(corpus.mutants(name, count, seed=2))
    if name == "proxy_protocol" and listener == "all":
        requests += [header.partition(b"GET ")[0] + hello for header in corpus.load("proxy_protocol") for hello in corpus.load("client_hello")[:4]]
    await volley(target, listener, requests)


async def test_damaged_bytes_of_upstreams(target: Target):
    """The client gets an answer or the end of its connection, and never two answers."""
    answers = corpus.load("h1_response") + list(corpus.mutants("h1_response", 120, seed=3))
    target.upstream("a", *[[Head(), data, Close()] for data in answers])
    target.upstream("b", *[[Head(), data, Close()] for data in answers])
    for _ in range(len(answers) // 20):
        replies = await asyncio.gather(*(target.send(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % number, listener="sink") for number in range(20)))
        assert all(reply.end for reply in replies)


NUMBERS = [
    b"9" * 20,
    b"9" * 400,
    b"9" * 5000,
    b"-1",
    b"+1",
    b"0x10",
    b"1e9",
    b"1_0",
    b" 1 ",
    b"\xb2",
    b"\xd9\xa1",
    b"1.5",
    b"nan",
    b"-" + b"9" * 5000,
    b"0" * 5000 + b"1",
    b"",
]
NUMERIC = [
    b"X-Range", b"Grpc-Timeout", b"X-Envoy-Upstream-Rq-Timeout-Ms", b"X-Envoy-Upstream-Rq-Per-Try-Timeout-Ms", b"X-Envoy-Max-Retries", b"Max-Forwards",
    b"X-Envoy-Retriable-Status-Codes", b"X-Envoy-Fault-Delay-Request", b"X-Envoy-Fault-Abort-Request", b"X-Envoy-Fault-Abort-Grpc-Request", b"Keep-Alive",
    b"X-Envoy-Fault-Delay-Request-Percentage", b"X-Forwarded-Port", b"X-Envoy-Expected-Rq-Timeout-Ms", b"X-Forwarded-For", b"X-Request-Id", b"Content-Length",
    b"X-Envoy-Attempt-Count", b"Grpc-Status", b"X-Envoy-Hedge-On-Per-Try-Timeout", b"X-Envoy-Fault-Throughput-Response", b"X-Envoy-Original-Dst-Host",
]  # fmt: skip


@pytest.mark.parametrize("listener", ["sink", "spelt"])
async def test_huge_numbers_in_headers(target: Target, listener: str):
    """Numbers where headers have numbers, which are none, or which Python does not read."""
    requests = [
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nConnection: close\r\n%b: %b\r\n\r\n" % (name, value)
        for name in NUMERIC
        for value in NUMBERS
    ]
    requests += [b"GET / HTTP/1.1\r\nHost: a:%b\r\nConnection: close\r\n\r\n" % value for value in NUMBERS]
    requests += [b"GET http://a:%b/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % value for value in NUMBERS]
    requests += [b"CONNECT a:%b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % value for value in NUMBERS]
    answered = await volley(target, listener, requests)
    idle = await target.counted(f"http.{listener}.downstream_cx_idle_timeout")  # where the machine is so busy that a request came too late
    assert answered + idle == len(requests), (answered, idle)


async def test_huge_numbers_from_upstreams(target: Target):
    """The same in answers."""
    names = [b"Content-Length", b"Retry-After", b"X-RateLimit-Reset", b"Grpc-Status", b"Age", b"X-Envoy-Upstream-Service-Time", b"X-Envoy-Attempt-Count"]
    answers = [b"HTTP/1.1 200 OK\r\n%b: %b\r\nConnection: close\r\n\r\n" % (name, value) for name in names for value in NUMBERS]
    answers += [b"HTTP/1.1 %b OK\r\nContent-Length: 0\r\n\r\n" % value for value in NUMBERS]
    for upstream in ("a", "b"):
        target.upstream(upstream, *[[Head(), data, Close()] for data in answers])
    requests = [b"GET /%d HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nConnection: close\r\n\r\n" % number for number in range(len(answers))]
    await volley(target, "sink", requests)
