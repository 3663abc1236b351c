"""Final timeouts: what Envoy 1.40 told the upstream for the same routes and headers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.codec.headers import RequestHead
from meshproxy.http import timeouts
from meshproxy.observe import flags
from tests.unit.route_help import only_route, stream

GRPC = (b"content-type", b"application/grpc")
PER_TRY = {"retry_policy": {"retry_on": "5xx", "per_try_timeout": "2s"}}
HEDGE = {"hedge_policy": {"hedge_on_per_try_timeout": True}}


def prepared(action: dict[str, Any], *items: tuple[bytes, bytes], suppress: bool = False, respect: bool = False) -> tuple[tuple[float, float], Any]:
    one = stream(b"/", *items)
    one.locals = {}
    one.is_grpc = GRPC in items
    found = timeouts.prepare(only_route("c", route=action), one, SimpleNamespace(suppress=suppress, respect_expected=respect))
    return found, one


def upstream(name: str, value: str) -> tuple[bytes, bytes]:
    return f"x-envoy-{name}".encode(), value.encode()


@pytest.mark.parametrize(
    ("action", "times", "expected"),
    [
        ({}, (15.0, 0.0), b"15000"),
        ({"timeout": "5s"}, (5.0, 0.0), b"5000"),
        ({"timeout": "0s"}, (0.0, 0.0), None),
        ({"timeout": "0.0015s"}, (0.001, 0.0), b"1"),
        ({"timeout": "5s", **PER_TRY}, (5.0, 2.0), b"2000"),
        ({"timeout": "1s", **PER_TRY}, (1.0, 0.0), b"1000"),
        ({"timeout": "0s", **PER_TRY}, (0.0, 2.0), b"2000"),
        ({"timeout": "5s", **PER_TRY, **HEDGE}, (5.0, 2.0), b"5000"),
        ({"timeout": "5s", "max_stream_duration": {"max_stream_duration": "7s"}}, (0.0, 0.0), None),
    ],
)
def test_routes(action, times, expected):
    found, one = prepared(action)
    assert (found, one.request.get(b"x-envoy-expected-rq-timeout-ms")) == (times, expected)


@pytest.mark.parametrize(
    ("items", "times", "expected"),
    [
        ([upstream("upstream-rq-timeout-ms", "3000")], (3.0, 2.0), b"2000"),
        ([upstream("upstream-rq-timeout-ms", "0")], (0.0, 2.0), b"2000"),
        ([upstream("upstream-rq-timeout-ms", "x")], (5.0, 2.0), b"2000"),
        ([upstream("upstream-rq-timeout-ms", "-1")], (5.0, 2.0), b"2000"),
        ([upstream("upstream-rq-per-try-timeout-ms", "700")], (5.0, 0.7), b"700"),
        ([upstream("upstream-rq-per-try-timeout-ms", "5000")], (5.0, 0.0), b"5000"),
        ([upstream("upstream-rq-timeout-ms", "500"), upstream("upstream-rq-per-try-timeout-ms", "700")], (0.5, 0.0), b"500"),
        ([upstream("hedge-on-per-try-timeout", "true")], (5.0, 2.0), b"5000"),
        ([upstream("expected-rq-timeout-ms", "123")], (5.0, 2.0), b"2000"),
    ],
)
def test_headers(items, times, expected):
    found, one = prepared({"timeout": "5s", **PER_TRY}, *items)
    assert (found, one.request.get(b"x-envoy-expected-rq-timeout-ms")) == (times, expected)
    assert one.request.get(b"x-envoy-upstream-rq-timeout-ms") is None
    assert one.request.get(b"x-envoy-upstream-rq-per-try-timeout-ms") is None


def test_expectation_of_the_hop_before():
    items = [upstream("expected-rq-timeout-ms", "123"), upstream("upstream-rq-timeout-ms", "77")]
    found, one = prepared({}, *items, respect=True)
    # The other header stays: Envoy assumes that the hop before has removed it.
    assert (found, one.request.get(b"x-envoy-upstream-rq-timeout-ms")) == ((0.123, 0.0), b"77")
    assert prepared({}, *items)[0] == (0.077, 0.0)


def test_suppressed_headers():
    for items in ([], [upstream("upstream-rq-timeout-ms", "10")]):
        assert prepared({}, *items, suppress=True)[1].request.items == []


def test_other_headers_are_consumed():
    items = [
        upstream("upstream-rq-timeout-alt-response", "1"),
        upstream("upstream-stream-duration-ms", "1500"),
        upstream("max-retries", "2"),
        upstream("retriable-header-names", "a"),
    ]
    _, one = prepared({}, *items)
    assert one.locals == {"timeout_204": True, "stream_duration": 1.5}
    assert [name for name, _ in one.request.items] == [b"x-envoy-expected-rq-timeout-ms"]


def test_retry_headers_are_left_to_the_retry_state():
    _, one = prepared({}, upstream("retry-on", "5xx"), upstream("max-retries", "2"))
    assert one.request.get(b"x-envoy-max-retries") == b"2"


@pytest.mark.parametrize(
    ("action", "timeout", "milliseconds", "sent"),
    [
        ({"max_grpc_timeout": "10s"}, None, 10000, b"10000m"),
        ({"max_grpc_timeout": "10s"}, b"1S", 1000, b"1000m"),
        ({"max_grpc_timeout": "10s"}, b"100S", 10000, b"10000m"),
        ({"max_grpc_timeout": "0s"}, None, 0, None),
        ({"max_grpc_timeout": "0s"}, b"1H", 3600000, b"3600000m"),
        ({"max_grpc_timeout": "0s"}, b"1500000u", 1500, b"1500m"),
        ({"max_grpc_timeout": "0s"}, b"1n", 1, b"1m"),
        ({"max_grpc_timeout": "0s", "grpc_timeout_offset": "1s"}, b"2500m", 1500, b"1500m"),
        ({"max_grpc_timeout": "0s", "grpc_timeout_offset": "1s"}, b"800m", 800, b"800m"),
        ({"max_grpc_timeout": "10s", "retry_policy": {"per_try_timeout": "2s"}}, b"5S", 5000, b"2000m"),
        ({"max_grpc_timeout": "0s"}, b"x", 0, b"x"),
    ],
)
def test_grpc(action, timeout, milliseconds, sent):
    items = [GRPC] if timeout is None else [GRPC, (b"grpc-timeout", timeout)]
    found, one = prepared(action, *items)
    assert (found[0], one.request.get(b"grpc-timeout")) == (milliseconds / 1000, sent)


def test_grpc_timeout_of_other_requests_does_not_matter():
    assert prepared({"max_grpc_timeout": "1s"}, (b"grpc-timeout", b"1S"))[0] == (15.0, 0.0)
    assert prepared({}, GRPC, (b"grpc-timeout", b"1S"))[0] == (15.0, 0.0)


@pytest.mark.parametrize(
    ("global_ms", "per_try_ms", "elapsed_ms", "expected"),
    [(5000, 2000, 0, 2000), (5000, 2000, 4000, 1000), (5000, 0, 4999, 1), (5000, 0, 6000, 1), (0, 2000, 9000, 2000), (0, 0, 5, 0)],
)
def test_what_is_left_for_a_retry(global_ms, per_try_ms, elapsed_ms, expected):
    assert timeouts.expected_ms(global_ms, per_try_ms, elapsed_ms) == expected


def test_refresh_before_a_retry():
    route = only_route("c", route={"timeout": "5s", **PER_TRY})
    one = stream(request_end=100.0, is_grpc=False)
    forwarding = SimpleNamespace(stream=one, route=route, timeout=5.0, per_try_timeout=2.0, hedges=False)
    timeouts.refresh_expected(one.request, forwarding, 104.25)
    assert one.request.get(b"x-envoy-expected-rq-timeout-ms") == b"750"
    one.request_end = 0.0
    timeouts.refresh_expected(one.request, forwarding, 104.25)
    assert one.request.get(b"x-envoy-expected-rq-timeout-ms") == b"2000"
    forwarding.hedges = True  # whoever asked for it
    timeouts.refresh_expected(one.request, forwarding, 104.25)
    assert one.request.get(b"x-envoy-expected-rq-timeout-ms") == b"5000"


MAX = {"max_stream_duration": "7s"}
HEADER_MAX = {"max_stream_duration": "7s", "grpc_timeout_header_max": "3s"}
OFFSET = {"grpc_timeout_header_max": "0s", "grpc_timeout_header_offset": "1s"}


@pytest.mark.parametrize(
    ("duration", "default", "timeout", "seconds", "sent"),
    [
        (None, None, None, None, None),
        (None, 9.0, None, 9.0, None),
        (MAX, 9.0, None, 7.0, b"7000m"),
        (MAX, 9.0, b"1S", 7.0, b"7000m"),
        ({"max_stream_duration": "0s"}, 9.0, b"1S", None, b"1S"),
        (HEADER_MAX, None, b"1S", 1.0, b"1000m"),
        (HEADER_MAX, None, b"100S", 3.0, b"3000m"),
        (HEADER_MAX, None, None, 7.0, b"7000m"),
        (OFFSET, None, b"2500m", 1.5, b"1500m"),
        (OFFSET, None, b"800m", 0.0, b"0m"),
        (OFFSET, None, None, None, None),
    ],
)
def test_stream_duration(duration, default, timeout, seconds, sent):
    route = only_route("c", route={} if duration is None else {"max_stream_duration": duration})
    head = RequestHead(b"POST", b"/", b"h", [] if timeout is None else [(b"grpc-timeout", timeout)])
    assert timeouts.stream_duration(route, head, default, True) == seconds
    assert head.get(b"grpc-timeout") == sent


def test_strict_headers():
    names = (b"x-envoy-upstream-rq-timeout-ms", b"x-envoy-retry-on", b"x-envoy-retry-grpc-on", b"x-envoy-max-retries")
    good = [upstream("upstream-rq-timeout-ms", "5"), upstream("retry-on", "5xx,reset"), upstream("retry-grpc-on", "cancelled")]
    assert timeouts.check_strict(RequestHead(b"GET", b"/", b"h", good), names) is None
    for item in (upstream("retry-on", "5xx,what"), upstream("max-retries", "x"), upstream("retry-grpc-on", "5xx")):
        reply = timeouts.check_strict(RequestHead(b"GET", b"/", b"h", [item]), names)
        name = item[0].decode()
        assert (reply.status, reply.flag, reply.details) == (400, flags.IH, f"request_headers_failed_strict_check{{{name}}}")
        assert reply.body == b"invalid header '" + item[0] + b"' with value '" + item[1] + b"'"
