"""Spans that wait and are sent: how many, when, and what becomes of those that nobody takes."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from google.protobuf import text_format

from meshproxy.api import messages
from meshproxy.api.errors import ConfigError
from meshproxy.api.runtime import Layer, Runtime, parse_entry
from meshproxy.codec.headers import RequestHead
from meshproxy.http import opentelemetry, tracing
from meshproxy.tracing.batch import Batch
from meshproxy.tracing.opentelemetry import Tracer
from meshproxy.upstream.grpc_stream import GrpcError
from tests.polling import PATIENCE
from tests.unit import upstream_help

OTLP = 'grpc_service { envoy_grpc { cluster_name: "otlp" } }'


class Collector:
    """In place of the gRPC client."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.called = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.error: GrpcError | None = None

    async def unary(self, method: str, request: bytes, *, timeout: float) -> bytes:
        assert method.endswith("TraceService/Export")
        self.calls.append(request)
        self.called.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return b""


def config(text: str = OTLP) -> Any:
    return text_format.Parse(text, messages.known("envoy.config.trace.v3.OpenTelemetryConfig")())


def tracer(text: str = OTLP, **runtime: str) -> tuple[Tracer, Collector, Any]:
    context = upstream_help.context()
    context.loop = asyncio.get_running_loop()
    context.runtime = Runtime([Layer("l", {f"tracing.opentelemetry.{key}": parse_entry(value) for key, value in runtime.items()})])
    made, collector = opentelemetry.compile(config(text), context), Collector()
    made._exporter._client = collector  # type: ignore[attr-defined]
    return made, collector, context


def spans(made: Tracer, count: int) -> None:
    for _ in range(count):
        span = made.start(RequestHead(b"GET", b"/", b"a", []), b"name", client=False, traced=True, at=1e9)
        assert span is not None
        span.finish(at=1e9 + 1)


def counted(context: Any) -> dict[str, int]:
    scope = context.stats.scope("tracing.opentelemetry.")
    return {name: scope.counter(name).n for name in ("spans_sent", "spans_dropped", "timer_flushed")}


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_five_spans_go_together():
    made, collector, context = tracer()
    spans(made, 4)
    await settled()
    assert collector.calls == []
    spans(made, 1)
    await settled()
    assert len(collector.calls) == 1
    assert counted(context) == {"spans_sent": 5, "spans_dropped": 0, "timer_flushed": 0}


async def test_a_few_go_after_a_while():
    made, collector, context = tracer(flush_interval_ms="1")
    spans(made, 2)
    await asyncio.wait_for(collector.called.wait(), PATIENCE)
    await settled()
    assert counted(context) == {"spans_sent": 2, "spans_dropped": 0, "timer_flushed": 1}


async def test_no_more_than_so_many_wait():
    made, collector, context = tracer(OTLP + " max_cache_size { value: 7 }", min_flush_spans="5")
    collector.gate = asyncio.Event()
    spans(made, 10)
    await settled()
    assert len(collector.calls) == 1
    assert counted(context)["spans_dropped"] == 3
    (batch,) = context.shared["span batches"]
    batch.flush()
    assert batch.busy
    collector.gate.set()
    await settled()
    assert not batch.busy
    assert counted(context) == {"spans_sent": 7, "spans_dropped": 3, "timer_flushed": 0}


async def test_what_nobody_takes_is_counted_and_forgotten():
    made, collector, context = tracer(min_flush_spans="1")
    collector.error = GrpcError(14, "no")
    spans(made, 3)
    await settled()
    assert counted(context) == {"spans_sent": 0, "spans_dropped": 3, "timer_flushed": 0}
    collector.error = None
    spans(made, 1)
    await settled()
    assert counted(context)["spans_sent"] == 1


async def test_what_is_not_sampled_is_not_sent():
    made, collector, _ = tracer(min_flush_spans="1")
    head = RequestHead(b"GET", b"/", b"a", [])
    span = made.start(head, b"name", client=True, traced=False, at=1e9)
    assert span is not None
    span.child(b"child", at=1e9).finish(at=1e9)
    span.inject(head)
    span.finish(at=1e9)
    await settled()
    assert collector.calls == []
    assert (head.get(b"traceparent") or b"").endswith(b"-00")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", "grpc_service"),
        ('grpc_service { google_grpc { target_uri: "x" stat_prefix: "x" } }', "grpc_service.google_grpc"),
        (OTLP + ' sampler { name: "x" typed_config { type_url: "type.googleapis.com/envoy.config.core.v3.Node" } }', "sampler.typed_config"),
    ],
)
async def test_what_is_not_honoured_has_its_path(text, path):
    with pytest.raises(ConfigError) as caught:
        tracer(text)
    assert [problem.path for problem in caught.value.problems] == [path]


async def test_attributes_of_the_environment(monkeypatch):
    detector = (
        ' resource_detectors { name: "e" typed_config { type_url: '
        '"type.googleapis.com/envoy.extensions.tracers.opentelemetry.resource_detectors.v3.EnvironmentResourceDetectorConfig" } }'
    )
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=mesh%20people, region = eu")
    made, _, _ = tracer(OTLP + detector)
    assert b"mesh people" in made._resource
    assert b"region" in made._resource
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "nothing")
    with pytest.raises(ConfigError, match="key=value"):
        tracer(OTLP + detector)


async def test_a_batch_goes_on_after_an_accident():
    context = upstream_help.context()
    context.loop = asyncio.get_running_loop()
    context.runtime = Runtime([Layer("l", {"t.min_flush_spans": parse_entry("1")})])
    sent = []

    async def send(some: list[int]) -> None:
        sent.append(some)
        await asyncio.sleep(0)

    batch: Batch[int] = Batch(context, "t", 2, send, lambda: None)
    assert [batch.put(one) for one in range(3)] == [True, True, False]
    await settled()
    assert batch.put(4)
    await settled()
    assert sent == [[0], [1], [4]]


async def test_a_tracer_goes_with_those_who_have_it_once_its_spans_are_sent():
    context = upstream_help.context()
    context.loop = asyncio.get_running_loop()
    context.runtime = Runtime([Layer("l", {"tracing.opentelemetry.flush_interval_ms": parse_entry("1")})])
    proto = messages.known("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing")()
    proto.provider.typed_config.Pack(config())
    made, other = tracing._tracer(proto, context), tracing._tracer(proto, context)
    assert made is other
    collector = made._exporter._client = Collector()
    collector.gate = asyncio.Event()
    spans(made, 1)
    del made, other
    gc.collect()
    assert len(context.shared["tracers"]) == len(context.shared["span batches"]) == 1  # one waits
    await asyncio.wait_for(collector.called.wait(), PATIENCE)
    gc.collect()
    (batch,) = context.shared["span batches"]
    assert batch.busy
    del batch
    collector.gate.set()
    await settled()
    gc.collect()
    assert not context.shared["tracers"]
    assert not context.shared["span batches"]
