"""The fault filter."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.http.filters import fault
from meshproxy.http.replies import Reply
from meshproxy.observe import flags
from tests.unit.filter_help import Route, Stream, context, counters, proto, run

FAULT = "envoy.extensions.filters.http.fault.v3.HTTPFault"
ALWAYS = "percentage: {numerator: 100}"
ABORT = f"abort: {{http_status: 418, {ALWAYS}}}"
DELAY = f"delay: {{fixed_delay: 0.1s, {ALWAYS}}}"


class Sleep:
    """Counts instead of sleeping."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def make(text: str, ctx: Any = None) -> tuple[Any, Any, Sleep]:
    ctx = ctx or context()
    compiled = fault.compile(proto(FAULT, f"{{{text}}}"), ctx)
    sleep = Sleep()
    if compiled is not None:
        compiled._sleep = sleep
    return compiled, ctx, sleep


def result(filter: Any, stream: Stream) -> Reply | None:
    answer = filter.request_headers(stream, True)
    return answer if answer is None or isinstance(answer, Reply) else run(answer)


def test_abort() -> None:
    filter, ctx, _ = make(f"{ABORT}, filter_metadata: {{k: v}}")
    stream = Stream()
    reply = filter.request_headers(stream, True)
    assert (reply.status, reply.body, reply.details, reply.flag, reply.grpc_status) == (418, b"fault filter abort", "fault_filter_abort", flags.FI, None)
    assert stream.metadata == {"envoy.filters.http.fault": {"k": "v"}}
    assert counters(ctx) == {"http.ing.fault.aborts_injected": 1, "http.ing.fault.active_faults": 1}
    filter.complete(stream)
    assert counters(ctx) == {"http.ing.fault.aborts_injected": 1}


def test_abort_with_grpc_status() -> None:
    filter, _, _ = make(f"abort: {{grpc_status: 5, {ALWAYS}}}")
    reply = filter.request_headers(Stream(), True)
    assert (reply.status, reply.grpc_status) == (200, 5)


def test_delay_then_go_on() -> None:
    filter, ctx, sleep = make(DELAY)
    stream = Stream()
    assert result(filter, stream) is None
    assert sleep.seconds == [0.1]
    assert stream.flags == flags.DI
    assert counters(ctx) == {"http.ing.fault.delays_injected": 1}  # no longer active once the delay is over
    filter.complete(stream)
    assert counters(ctx) == {"http.ing.fault.delays_injected": 1}


def test_delay_then_abort() -> None:
    filter, ctx, sleep = make(f"{DELAY}, {ABORT}")
    stream = Stream()
    reply = result(filter, stream)
    assert reply is not None
    assert reply.status == 418
    assert sleep.seconds == [0.1]
    filter.complete(stream)
    assert counters(ctx) == {"http.ing.fault.delays_injected": 1, "http.ing.fault.aborts_injected": 1}


def test_reset_while_delayed() -> None:
    async def scenario() -> None:
        ctx = context()
        filter = fault.compile(proto(FAULT, f"{{{DELAY}}}"), ctx)
        assert filter is not None
        forever: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def sleep(_: float) -> None:
            await forever

        filter._sleep = sleep
        stream = Stream()
        task = asyncio.ensure_future(filter.request_headers(stream, True))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert counters(ctx)["http.ing.fault.active_faults"] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        filter.complete(stream)
        assert "http.ing.fault.active_faults" not in counters(ctx)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("headers", "status", "grpc_status", "slept"),
    [
        ([], None, None, []),
        ([(b"x-envoy-fault-abort-request", b"444")], 444, None, []),
        ([(b"x-envoy-fault-abort-request", b"199")], None, None, []),
        ([(b"x-envoy-fault-abort-request", b"600")], None, None, []),
        ([(b"x-envoy-fault-abort-request", b"4x4")], None, None, []),
        ([(b"x-envoy-fault-abort-grpc-request", b"7")], 200, 7, []),
        ([(b"x-envoy-fault-abort-request", b"444"), (b"x-envoy-fault-abort-request-percentage", b"0")], None, None, []),
        ([(b"x-envoy-fault-abort-request", b"444"), (b"x-envoy-fault-abort-request-percentage", b"200")], 444, None, []),
        ([(b"x-envoy-fault-delay-request", b"50")], None, None, [0.05]),
        ([(b"x-envoy-fault-delay-request", b"0")], None, None, []),
        ([(b"x-envoy-fault-delay-request", b"-5")], None, None, []),
        ([(b"x-envoy-fault-delay-request", b"99999999999999999999")], None, None, []),
        ([(b"x-envoy-fault-delay-request", b"50"), (b"x-envoy-fault-delay-request-percentage", b"0")], None, None, []),
    ],
)
def test_by_headers(headers: list[tuple[bytes, bytes]], status: int | None, grpc_status: int | None, slept: list[float]) -> None:
    filter, _, sleep = make(f"abort: {{header_abort: {{}}, {ALWAYS}}}, delay: {{header_delay: {{}}, {ALWAYS}}}")
    reply = result(filter, Stream(headers=headers))
    assert (status, grpc_status) == (None, None) if reply is None else (reply.status, reply.grpc_status) == (status, grpc_status)
    assert sleep.seconds == slept


def test_headers_cannot_raise_the_percentage() -> None:
    filter, _, _ = make("abort: {header_abort: {}, percentage: {numerator: 50}}")
    asked = [(b"x-envoy-fault-abort-request", b"500"), (b"x-envoy-fault-abort-request-percentage", b"100")]
    aborted = sum(filter.request_headers(Stream(headers=asked), True) is not None for _ in range(400))
    assert 150 < aborted < 250


@pytest.mark.parametrize(
    ("condition", "stream", "expected"),
    [
        ("upstream_cluster: up", Stream(route=Route()), True),
        ("upstream_cluster: other", Stream(route=Route()), False),
        ("upstream_cluster: up", Stream(route=None), False),
        ("upstream_cluster: up", Stream(route=Route(action="redirect")), False),
        ("downstream_nodes: [a, b]", Stream(headers=[(b"x-envoy-downstream-service-node", b"b")]), True),
        ("downstream_nodes: [a]", Stream(headers=[(b"x-envoy-downstream-service-node", b"b")]), False),
        ("downstream_nodes: [a]", Stream(), False),
        ("headers: [{name: x-f, string_match: {exact: yes!}}]", Stream(headers=[(b"x-f", b"yes!")]), True),
        ("headers: [{name: x-f, string_match: {exact: yes!}}]", Stream(), False),
    ],
)
def test_conditions(condition: str, stream: Stream, expected: bool) -> None:
    filter, _, _ = make(f"{ABORT}, {condition}")
    assert (filter.request_headers(stream, True) is not None) is expected


def test_max_active_faults() -> None:
    filter, ctx, _ = make(f"{ABORT}, max_active_faults: 1")
    first = Stream()
    assert filter.request_headers(first, True) is not None
    assert filter.request_headers(Stream(), True) is None
    assert counters(ctx)["http.ing.fault.faults_overflow"] == 1
    filter.complete(first)
    assert filter.request_headers(Stream(), True) is not None


def test_faults_of_all_routes_count_together() -> None:
    ctx = context()
    one, _, _ = make(f"{ABORT}, max_active_faults: 1", ctx)
    other, _, _ = make(f"{ABORT}, max_active_faults: 1", ctx)
    assert one.request_headers(Stream(), True) is not None
    assert other.request_headers(Stream(), True) is None


def test_counters_of_the_downstream_cluster() -> None:
    of_cluster = [(b"x-envoy-downstream-service-cluster", b"dc")]
    filter, ctx, _ = make(ABORT)
    filter.request_headers(Stream(headers=of_cluster), True)
    assert counters(ctx)["http.ing.fault.dc.aborts_injected"] == 1
    filter, ctx, _ = make(f"{ABORT}, disable_downstream_cluster_stats: true")
    filter.request_headers(Stream(headers=of_cluster), True)
    assert "http.ing.fault.dc.aborts_injected" not in counters(ctx)


def test_downstream_clusters_that_clients_make_up_get_no_counters_without_end() -> None:
    filter, ctx, _ = make(ABORT)
    for i in range(1200):
        filter.request_headers(Stream(headers=[(b"x-envoy-downstream-service-cluster", b"dc%d" % i)]), True)
    assert len(counters(ctx)) == 1000 + 2
    assert counters(ctx)["http.ing.fault.aborts_injected"] == 1200


def test_runtime() -> None:
    ctx = context(mutable=True)
    filter, _, sleep = make("abort: {http_status: 418, percentage: {numerator: 0}}, delay: {fixed_delay: 0.1s, percentage: {numerator: 0}}", ctx)
    values = ctx.runtime
    assert result(filter, Stream()) is None
    values.modify({"fault.http.abort.abort_percent": "100", "fault.http.abort.http_status": "501"})
    reply = result(filter, Stream())
    assert reply is not None
    assert reply.status == 501
    of_cluster = Stream(headers=[(b"x-envoy-downstream-service-cluster", b"dc")])
    assert result(filter, of_cluster) is None  # a cluster has keys of its own
    values.modify({"fault.http.dc.abort.abort_percent": "100", "fault.http.dc.abort.http_status": "502"})
    reply = result(filter, of_cluster)
    assert reply is not None
    assert reply.status == 502
    values.modify({"fault.http.abort.abort_percent": "0", "fault.http.delay.fixed_delay_percent": "100", "fault.http.delay.fixed_duration_ms": "30"})
    assert result(filter, Stream()) is None
    assert sleep.seconds == [0.03]
    values.modify({"fault.http.max_active_faults": "0", "fault.http.abort.abort_percent": "100"})
    assert result(filter, Stream()) is None


def test_what_can_never_happen_costs_nothing() -> None:
    assert fault.compile(proto(FAULT), context()) is None
    never = "{abort: {http_status: 418, percentage: {numerator: 0}}, delay: {fixed_delay: 1s}, response_rate_limit: {fixed_limit: {limit_kbps: 1}}}"
    assert fault.compile(proto(FAULT, never), context()) is None
    assert fault.compile(proto(FAULT, never), context({"other": "1"})) is None
    assert fault.compile(proto(FAULT, never), context(mutable=True)) is not None
    assert fault.compile(proto(FAULT, never), context({"fault.http.dc.abort.abort_percent": "1"})) is not None
    half, _, _ = make(f"{ABORT}, delay: {{fixed_delay: 1s}}")
    assert half.delay is None
    assert not hasattr(half, "response_data")


def test_route_replaces_it() -> None:
    base, ctx, _ = make(ABORT)
    assert fault.specialise(base, [proto(FAULT, f"{{{ABORT}}}"), proto(FAULT)], ctx) is None
    filter = fault.specialise(None, [proto(FAULT, f"{{abort: {{http_status: 500, {ALWAYS}}}}}")], ctx)
    assert filter is not None
    reply = filter.request_headers(Stream(), True)
    assert isinstance(reply, Reply)
    assert reply.status == 500


def test_slow_response() -> None:
    filter, ctx, sleep = make(f"response_rate_limit: {{fixed_limit: {{limit_kbps: 10}}, {ALWAYS}}}")
    stream = Stream()
    assert filter.request_headers(stream, True) is None
    assert filter.response_data(stream, b"", False) is None
    assert run(filter.response_data(stream, bytes(20480), False)) is None
    assert sleep.seconds == pytest.approx([1.95])  # 2 s for 20 KiB, of which one slice of 50 ms was there
    ctx.clock.now += 1.95
    run(filter.response_data(stream, bytes(512), True))
    assert sleep.seconds[1] == pytest.approx(0.05)
    assert counters(ctx) == {"http.ing.fault.response_rl_injected": 1, "http.ing.fault.active_faults": 1}
    filter.complete(stream)
    assert counters(ctx) == {"http.ing.fault.response_rl_injected": 1}


def test_slow_response_saves_up_one_second_at_most() -> None:
    filter, ctx, sleep = make(f"response_rate_limit: {{fixed_limit: {{limit_kbps: 10}}, {ALWAYS}}}")
    stream = Stream()
    filter.request_headers(stream, True)
    ctx.clock.now += 60
    assert filter.response_data(stream, bytes(10240), False) is None
    run(filter.response_data(stream, bytes(10240), False))
    assert sleep.seconds == pytest.approx([1.0])


def test_slow_response_by_header() -> None:
    filter, _ctx, _ = make(f"response_rate_limit: {{header_limit: {{}}, {ALWAYS}}}")
    for value, limited in ((b"5", True), (b"0", False), (b"x", False)):
        stream = Stream(headers=[(b"x-envoy-fault-throughput-response", value)])
        filter.request_headers(stream, True)
        assert (stream.locals.get(filter) is not None) is limited


def test_stream_that_nothing_happened_to() -> None:
    filter, ctx, _ = make(f"{ABORT}, headers: [{{name: x, present_match: true}}]")
    filter.complete(Stream())
    assert counters(ctx) == {}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("abort: {http_status: 199}", "abort.http_status"),
        ("abort: {percentage: {numerator: 1}}", "abort"),
        ("delay: {fixed_delay: 0s}", "delay.fixed_delay"),
        ("delay: {}", "delay"),
        ("response_rate_limit: {}", "response_rate_limit"),
        ("response_rate_limit: {fixed_limit: {limit_kbps: 0}}", "response_rate_limit.fixed_limit.limit_kbps"),
        ("headers: [{name: a}, {name: ''}]", "headers[1].name"),
    ],
)
def test_errors(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(text)
    assert caught.value.problems[0].path == path
