"""The health check filter and the buffer filter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.http.filters import buffer, health_check
from meshproxy.http.replies import Reply
from meshproxy.observe import flags
from tests.unit.filter_help import Stream, context, counters, proto, run

HEALTH = "envoy.extensions.filters.http.health_check.v3.HealthCheck"
HEADERS = "headers: [{name: ':path', string_match: {exact: /hc}}]"
BUFFER = "envoy.extensions.filters.http.buffer.v3.Buffer"
PER_ROUTE = "envoy.extensions.filters.http.buffer.v3.BufferPerRoute"


class Clusters(dict[str, Any]):
    """name -> (hosts, healthy, degraded)"""

    def get(self, name: str, default: Any = None) -> Any:
        counts = super().get(name)
        if counts is None:
            return default
        total, healthy, degraded = (SimpleNamespace(n=count) for count in counts)
        return SimpleNamespace(stats=SimpleNamespace(membership_total=total, membership_healthy=healthy, membership_degraded=degraded))


def make(text: str, **clusters: tuple[int, int, int]) -> tuple[Any, Any]:
    ctx = context(clusters=Clusters(clusters))
    return health_check.compile(proto(HEALTH, f"{{{text}, {HEADERS}}}"), ctx), ctx


def check(filter: Any, path: bytes = b"/hc", status: int = 200, headers: Any = ()) -> tuple[Reply | None, Stream]:
    stream = Stream(path)
    reply = filter.request_headers(stream, True)
    stream.response.status = status if reply is None else reply.status
    stream.response.items = list(headers)
    filter.response_headers(stream, True)
    return reply, stream


OWN = b"x-envoy-upstream-healthchecked-cluster", b"local"
FAILED = b"x-envoy-immediate-health-check-fail", b"true"


def test_answered_here() -> None:
    filter, ctx = make("pass_through_mode: false")
    reply, stream = check(filter)
    assert reply is not None
    assert (reply.status, reply.body, reply.details, reply.flag) == (200, b"", "health_check_ok", 0)
    assert stream.health_check
    assert stream.response.items == [OWN]
    assert counters(ctx) == {"http.ing.health_check.request_total": 1, "http.ing.health_check.ok": 1}


def test_other_requests_pass() -> None:
    filter, ctx = make("pass_through_mode: false")
    reply, stream = check(filter, b"/other")
    assert reply is None
    assert not stream.health_check
    assert stream.response.items == []
    assert counters(ctx) == {}


def test_failed() -> None:
    filter, ctx = make("pass_through_mode: false")
    ctx.context.drain.health_failed = True
    reply, stream = check(filter)
    assert reply is not None
    assert (reply.status, reply.details, reply.flag) == (503, "health_check_failed", flags.LH)
    assert stream.response.items == [OWN, FAILED]
    assert check(filter, b"/other")[1].response.items == [FAILED]
    assert counters(ctx) == {"http.ing.health_check.request_total": 1, "http.ing.health_check.failed": 1}
    passing, ctx = make("pass_through_mode: true")
    ctx.context.drain.health_failed = True
    reply, _ = check(passing)
    assert reply is not None
    assert reply.status == 503


def test_body_is_read_before_the_answer() -> None:
    filter, _ = make("pass_through_mode: false")
    reply = run(filter.request_headers(Stream(b"/hc", body=b"abc"), False))
    assert reply.status == 200


@pytest.mark.parametrize(
    ("counts", "minimum", "status", "details", "counter"),
    [
        ((4, 2, 0), 50, 200, "health_check_ok_cluster_healthy", "ok"),
        ((4, 1, 1), 50, 200, "health_check_ok_cluster_healthy", "ok"),
        ((4, 1, 0), 50, 503, "health_check_failed_cluster_unhealthy", "failed_cluster_unhealthy"),
        ((3, 1, 0), 33.9, 200, "health_check_ok_cluster_healthy", "ok"),
        ((0, 0, 0), 1, 503, "health_check_failed_cluster_empty", "failed_cluster_empty"),
        ((0, 0, 0), 0, 200, "health_check_ok_cluster_healthy", "ok"),
        (None, 0, 503, "health_check_failed_no_cluster_found", "failed_cluster_not_found"),
    ],
)
def test_clusters(counts: Any, minimum: float, status: int, details: str, counter: str) -> None:
    clusters = {} if counts is None else {"up": counts}
    filter, ctx = make(f"pass_through_mode: false, cluster_min_healthy_percentages: {{up: {{value: {minimum}}}}}", **clusters)
    reply, _ = check(filter)
    assert reply is not None
    assert (reply.status, reply.details, reply.flag) == (status, details, 0 if status == 200 else flags.LH)
    assert counters(ctx)[f"http.ing.health_check.{counter}"] == 1


def test_passed_through_and_cached() -> None:
    filter, ctx = make("pass_through_mode: true, cache_time: 10s")
    reply, stream = check(filter, status=503)
    assert reply is None
    assert stream.response.items == [OWN]
    reply, _ = check(filter)
    assert reply is not None
    assert (reply.status, reply.details, reply.flag) == (503, "health_check_cached", flags.LH)
    ctx.clock.now += 10
    degraded, _ = check(filter, headers=[(b"x-envoy-degraded", b"")])
    assert degraded is None
    reply, _ = check(filter)
    assert reply is not None
    assert (reply.status, reply.headers) == (200, ((b"x-envoy-degraded", b""),))
    assert counters(ctx) == {
        "http.ing.health_check.request_total": 2,
        "http.ing.health_check.cached_response": 2,
        "http.ing.health_check.failed": 1,
        "http.ing.health_check.ok": 1,
        "http.ing.health_check.degraded": 1,
    }


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("pass_through_mode: false, cache_time: 1s", "cache_time"),
        ("cache_time: 0s", "pass_through_mode"),
        ("pass_through_mode: false, cluster_min_healthy_percentages: {up: {value: NaN}}", 'cluster_min_healthy_percentages["up"]'),
    ],
)
def test_errors(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(text)
    assert caught.value.problems[0].path == path


# -- buffer


def test_buffer_waits_for_the_body() -> None:
    filter = buffer.compile(proto(BUFFER, "{max_request_bytes: 5}"), context())
    assert filter.request_headers(Stream(), True) is None
    stream = Stream(body=b"abcde")
    assert run(filter.request_headers(stream, False)) is None
    assert stream.request.get(b"content-length") == b"5"
    known = Stream(body=b"abc", headers=[(b"content-length", b"3")])
    assert run(filter.request_headers(known, False)) is None
    assert known.request.items == [(b"content-length", b"3")]


def test_buffer_refuses_what_is_too_long() -> None:
    ctx = context()
    filter = buffer.compile(proto(BUFFER, "{max_request_bytes: 5}"), ctx)
    stream = Stream(body=b"abcdef")
    reply = run(filter.request_headers(stream, False))
    assert (reply.status, reply.body, reply.details, reply.close) == (413, b"Payload Too Large", "request_payload_too_large", True)
    assert stream.request.items == []
    assert counters(ctx) == {"http.ing.downstream_rq_too_large": 1}


def test_buffer_of_a_route() -> None:
    base = buffer.compile(proto(BUFFER, "{max_request_bytes: 5}"), context())
    assert buffer.specialise(base, [proto(PER_ROUTE, "{buffer: {max_request_bytes: 9}}"), proto(PER_ROUTE, "{disabled: true}")], context()) is None
    larger = buffer.specialise(base, [proto(PER_ROUTE, "{disabled: true}"), proto(PER_ROUTE, "{buffer: {max_request_bytes: 9}}")], context())
    assert larger is not None
    assert larger.limit == 9


def test_buffer_errors() -> None:
    with pytest.raises(ConfigError, match="max_request_bytes"):
        buffer.compile(proto(BUFFER), context())
    with pytest.raises(ConfigError, match=r"buffer\.max_request_bytes"):
        buffer.specialise(None, [proto(PER_ROUTE, "{buffer: {max_request_bytes: 0}}")], context())
