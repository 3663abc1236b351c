"""Retries: what is retried, how often, on which host, with which budget, and what the client is told in the end."""

from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Head,
    Play,
    Request,
    Reset,
    Response,
    Rig,
    Until,
    answer,
    bootstrap,
    check_cases,
    cluster,
    each,
    endpoint,
    get,
    http,
    req,
    y,
)

LOCAL = {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}
INTERNAL = "X-Forwarded-For: 127.0.0.9"


def vhost(name: str, policy: str, to: str = "a", **fields: Any) -> dict:
    route = {"cluster": to, "timeout": "4s"} | ({"retry_policy": FAST | y(policy)} if policy else {})
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": route}], "include_request_attempt_count": True, **fields}


FAST = {"retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"}}
KINDS = (
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "envoy-ratelimited",
    "refused-stream",
    "retriable-status-codes",
)

HOSTS = [
    vhost("off", ""),
    *[vhost(kind, f"{{retry_on: '{kind}'}}") for kind in KINDS],
    vhost("codes", "{retry_on: 'retriable-status-codes', retriable_status_codes: [418, 429]}"),
    vhost("headers", "{retry_on: 'retriable-headers', retriable_headers: [{name: x-again, string_match: {exact: 'yes'}}]}"),
    vhost("request_headers", "{retry_on: '5xx', retriable_request_headers: [{name: ':method', string_match: {exact: GET}}]}"),
    vhost("three", "{retry_on: '5xx', num_retries: 3}"),
    vhost("zero", "{retry_on: '5xx', num_retries: 0}"),
    vhost("several", "{retry_on: '5xx,connect-failure, reset', num_retries: 2}"),
    vhost("grpc", "{retry_on: 'unavailable,cancelled'}"),
    vhost("dead", "{retry_on: 'connect-failure', num_retries: 2}", to="dead"),
    vhost("dead_5xx", "{retry_on: '5xx'}", to="dead"),
    vhost("dead_off", "", to="dead"),
    vhost("limited", "{retry_on: '5xx', num_retries: 5}", to="no_retries"),
    vhost("budget", "{retry_on: '5xx', num_retries: 5}", to="budget"),
    vhost("ratelimit_backoff", "{retry_on: '5xx', rate_limited_retry_back_off: {reset_headers: [{name: retry-after, format: SECONDS}], max_interval: 0.5s}}"),
    vhost(
        "previous_hosts",
        "{retry_on: '5xx', num_retries: 1, host_selection_retry_max_attempts: 20, retry_host_predicate: [{name: p, typed_config: {'@': previous_hosts}}]}",
        to="two",
    ),
    vhost(
        "omit_canary",
        "{retry_on: '5xx', num_retries: 1, host_selection_retry_max_attempts: 20, retry_host_predicate: [{name: p, typed_config: {'@': omit_canary}}]}",
        to="canary",
    ),
    vhost("vhost_level", "", retry_policy=FAST | {"retry_on": "5xx"}),
    vhost("small_buffer", "{retry_on: '5xx'}", per_request_buffer_limit_bytes=16),
    vhost("attempts_down", "{retry_on: '5xx'}", include_attempt_count_in_response=True),
]
CONFIG = bootstrap(
    http("main", HOSTS),
    http("internal", HOSTS, internal_address_config=LOCAL),
    clusters=[
        cluster("a"),
        cluster("dead"),
        cluster("no_retries", "a", circuit_breakers={"thresholds": [{"max_retries": 0}]}),
        cluster("budget", "a", circuit_breakers={"thresholds": [{"retry_budget": {"budget_percent": {"value": 0}, "min_retry_concurrency": 0}}]}),
        cluster("two", "a", "b"),
        cluster("canary", endpoint("a", metadata={"filter_metadata": {"envoy.lb": {"canary": True}}}), "b"),
    ],
)

FAIL = [Request(), answer("503 Busy", b"busy")]
GOOD = [Request(), OK]
TORN = [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\npart", Close()]
GRPC = "Content-Type: application/grpc"


def status(code: int, **headers: str) -> list:
    return [Request(), answer(f"{code} X", b"", **headers)]


def grpc(status: int) -> list:
    """A gRPC answer without a message."""
    return [Request(), answer(body=b"", content_type="application/grpc", grpc_status=str(status))]


def then_good(name: str, host: str, first: list, *lines: str, method: str = "GET", body: bytes = b"", **fields: Any) -> Case:
    """The upstream fails once in this way, then answers 200."""
    return Case(name, req(method, "/", *lines, host=f"{host}.test", body=body), each(first, GOOD), **fields)


async def other_host(rig: Rig) -> Any:
    """A retry goes to the other host whichever came first: both were asked once, and the answer is the second's."""
    response = await rig.get(get(host="previous_hosts.test"))
    asked = sorted(name for name, upstream in rig.upstreams.items() if any(wire.received for wire in upstream.connections))
    return [response, asked]


async def not_the_canary(rig: Rig) -> Any:
    """However often it is tried, a retry never goes to the canary host a."""
    worst = 0
    for _ in range(6):
        await rig.get(get(host="omit_canary.test"))
        worst = max(worst, sum(wire.received.count(b"attempt-count: 2") for wire in rig.upstreams["a"].connections))
    return worst


CASES = [
    Case("no_policy", get(host="off.test"), FAIL),
    *[then_good(f"{kind}_on_{code}", kind, status(code)) for kind in KINDS for code in (500, 503, 409)],
    *[then_good(f"{kind}_on_close", kind, [Request(), Close()]) for kind in KINDS],
    *[then_good(f"{kind}_on_reset", kind, [Request(), Reset()]) for kind in ("5xx", "reset", "connect-failure", "off")],
    *[then_good(f"5xx_on_{code}", "5xx", status(code)) for code in (404, 429, 502, 504, 599, 600)],
    *[then_good(f"gateway_error_on_{code}", "gateway-error", status(code)) for code in (501, 502, 504)],
    then_good("retriable_4xx_on_404", "retriable-4xx", status(404)),
    *[then_good(f"codes_on_{code}", "codes", status(code)) for code in (418, 429, 503)],
    then_good("header_matches", "headers", status(200, x_again="yes")),
    then_good("header_differs", "headers", status(200, x_again="no")),
    then_good("request_header_matches", "request_headers", FAIL),
    then_good("request_header_differs", "request_headers", FAIL, method="POST"),
    then_good("rate_limited_header_only_if_asked", "5xx", status(503, x_envoy_ratelimited="true")),
    then_good("rate_limited_header_asked", "envoy-ratelimited", status(429, x_envoy_ratelimited="true")),
    then_good("with_body", "5xx", FAIL, method="POST", body=b"hello"),
    then_good("with_chunked_body", "5xx", FAIL, "Transfer-Encoding: chunked", method="POST", body=b"5\r\nhello\r\n0\r\n\r\n"),
    then_good("head", "5xx", [Request(), answer("503 Busy", None, content_length="4")], method="HEAD"),
    Case("exhausted", get(host="5xx.test"), FAIL),
    Case("exhausted_after_three", get(host="three.test"), FAIL),
    Case("third_time_lucky", get(host="three.test"), each(FAIL, FAIL, GOOD)),
    Case("num_retries_zero", get(host="zero.test"), FAIL),
    Case("exhausted_by_close", get(host="several.test"), [Request(), Close()]),
    Case("status_then_close", get(host="several.test"), each(FAIL, [Request(), Close()])),
    Case("close_then_status", get(host="several.test"), each([Request(), Close()], FAIL)),
    Case("failing_body_is_dropped", get(host="5xx.test"), each([Request(), answer("503 Busy", b"x" * 1000)], GOOD)),
    Case("connect_failure", get(host="dead.test")),
    Case("connect_failure_5xx", get(host="dead_5xx.test")),
    Case("connect_failure_no_retry", get(host="dead_off.test")),
    Case("connect_failure_grpc", req("POST", "/", "Content-Type: application/grpc", host="dead.test")),
    Case("max_retries_zero", get(host="limited.test"), FAIL),
    Case("budget_of_nothing", get(host="budget.test"), FAIL),
    Case("retry_after_header", get(host="ratelimit_backoff.test"), each(status(503, retry_after="0"), GOOD)),
    Case("retry_after_too_long", get(host="ratelimit_backoff.test"), each(status(503, retry_after="99"), GOOD)),
    then_good("vhost_level_policy", "vhost_level", FAIL),
    then_good("attempt_count_in_response", "attempts_down", FAIL),
    then_good("body_over_retry_buffer", "small_buffer", FAIL, method="POST", body=b"x" * 64),
    Case(
        "early_failure_while_body_comes",
        [req("POST", "/", "Content-Length: 10", host="5xx.test") + b"half", Response("POST")],
        each([Until(b"half"), answer("503 Busy", b"")], [Until(b"half"), OK]),
        then="closed",
    ),
    Case("no_retry_after_response_started", [get(host="several.test"), Until(b"part")], TORN, then="closed"),
    *[
        then_good(f"grpc_status_{code}", "grpc", grpc(code), GRPC, method="POST")
        for code in (0, 1, 4, 14)
    ],
    Case("previous_hosts", other_host, {"a": each(FAIL, GOOD), "b": each(FAIL, GOOD)}, skip=("upstream", "log", "stats"), note="the first host is random"),
    Case("omit_canary", not_the_canary, {"a": Play([FAIL]), "b": Play([GOOD])}, skip=("upstream", "log", "stats"), note="the first host is random"),
    # ---- policies from headers
    then_good("header_from_external_client", "off", FAIL, "x-envoy-retry-on: 5xx"),
    then_good("header_from_internal_client", "off", FAIL, "x-envoy-retry-on: 5xx", INTERNAL, on="internal"),
    then_good("header_unknown_policy", "off", FAIL, "x-envoy-retry-on: whatever", INTERNAL, on="internal"),
    then_good("header_adds_to_policy", "reset", FAIL, "x-envoy-retry-on: gateway-error", INTERNAL, on="internal"),
    Case("header_max_retries", get("/", "x-envoy-retry-on: 5xx", "x-envoy-max-retries: 3", INTERNAL, host="reset.test"), FAIL, on="internal"),
    Case("header_max_retries_over_policy", get("/", "x-envoy-max-retries: 0", INTERNAL, host="three.test"), FAIL, on="internal"),
    then_good(
        "header_status_codes", "off", status(418), "x-envoy-retry-on: retriable-status-codes", "x-envoy-retriable-status-codes: 400,418", INTERNAL,
        on="internal",
    ),
    then_good(
        "header_names", "off", status(200, x_flaky="1"), "x-envoy-retry-on: retriable-headers", "x-envoy-retriable-header-names: x-flaky", INTERNAL,
        on="internal",
    ),
    then_good(
        "header_grpc", "off", grpc(14), GRPC, "x-envoy-retry-grpc-on: unavailable", INTERNAL, method="POST", on="internal",
    ),
    Case("head_only_read", [req("POST", "/", "Content-Length: 5", host="5xx.test") + b"hello", Response("POST")], each([Head(), Close()], GOOD)),
]  # fmt: skip

test_case = check_cases(CASES)
