"""The grpc_stats filter; tests/differential/test_grpc_http1.py compares it with Envoy's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec import grpc
from meshproxy.codec.headers import Headers, ResponseHead
from meshproxy.http.filters import grpc_stats
from meshproxy.observe.stats import Scope
from tests.unit.filter_help import Route, Stream, context, counters, proto

CONFIG = "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig"
GRPC = [(b"content-type", b"application/grpc")]


def make(text: str = "{stats_for_all_methods: true}") -> tuple[grpc_stats.GrpcStats, Any]:
    clusters: dict[str, Any] = {}
    ctx = context(clusters=clusters)
    clusters["up"] = SimpleNamespace(stats=SimpleNamespace(scope=Scope(ctx.context.stats, "cluster.up.")))
    return grpc_stats.compile(proto(CONFIG, text), ctx), ctx


def run(filter_: grpc_stats.GrpcStats, stream: Any, *, head: list[tuple[bytes, bytes]], trailers: list[tuple[bytes, bytes]] | None) -> None:
    """One message each way."""
    assert filter_.request_headers(stream, False) is None
    assert filter_.request_data(stream, grpc.frame(b"x"), True) is None
    stream.response = ResponseHead(200, head)
    assert filter_.response_headers(stream, trailers is None) is None
    if trailers is not None:
        assert filter_.response_data(stream, grpc.frame(b"x"), False) is None
        assert filter_.response_trailers(stream, Headers(trailers)) is None


def request(path: bytes = b"/s/m", headers: Any = GRPC, **attributes: Any) -> Stream:
    return Stream(path, headers, route=Route(**attributes))


def test_sample_configuration() -> None:
    filter_, ctx = make()
    stream = request()
    run(filter_, stream, head=GRPC.copy(), trailers=[(b"grpc-status", b"0")])
    prefix = "cluster.up.grpc.s.m."
    assert counters(ctx) == {prefix + name: 1 for name in ("0", "success", "total", "request_message_count", "response_message_count")}
    assert not stream.filter_state


def test_a_status_in_the_head() -> None:
    filter_, ctx = make("{}")
    run(filter_, request(), head=[*GRPC, (b"grpc-status", b"14")], trailers=None)
    assert counters(ctx) == {f"cluster.up.grpc.{name}": 1 for name in ("14", "failure", "total", "request_message_count")}


def test_times_are_those_of_the_upstream() -> None:
    filter_, ctx = make("{enable_upstream_stats: true, stats_for_all_methods: true}")
    for sent, last in ((0.0, 7.0), (5.0, 0.0), (5.0, 5.25)):
        stream = request()
        stream.upstream_sent, stream.upstream_last = sent, last
        run(filter_, stream, head=GRPC.copy(), trailers=[(b"grpc-status", b"0")])
    histogram = ctx.context.stats.find("cluster.up.grpc.s.m.upstream_rq_time")
    assert histogram._pending == [250]


def test_what_has_no_cluster_is_not_counted() -> None:
    filter_, ctx = make("{stats_for_all_methods: true, emit_filter_state: true}")
    for stream in (request(action="reply"), request(cluster_name="gone"), request(b"/only"), Stream(b"/s/m", GRPC), request(headers=[])):
        run(filter_, stream, head=GRPC.copy(), trailers=[(b"grpc-status", b"0")])
        assert str(stream.filter_state[grpc_stats.FILTER_STATE]).endswith(",1")
    assert counters(ctx) == {}


def test_other_requests_cost_nothing() -> None:
    filter_, ctx = make()
    stream = request(headers=[])
    run(filter_, stream, head=GRPC.copy(), trailers=[(b"grpc-status", b"0")])
    assert stream.locals == counters(ctx) == {}


def test_a_reset_leaves_what_was_counted() -> None:
    filter_, ctx = make()
    stream = request()
    filter_.request_headers(stream, False)
    filter_.request_data(stream, b"\0", False)
    assert counters(ctx) == {"cluster.up.grpc.s.m.request_message_count": 1}
    assert not hasattr(filter_, "complete")


@given(
    st.lists(st.binary(max_size=9), max_size=4),
    st.sampled_from((b"{}", b'{"error": null}', b"[", b"[]", b"", b"[" * 100_000)),
    st.integers(0, 80),
    st.integers(0, 80),
)
def test_any_split_of_a_connect_response(messages: list[bytes], end: bytes, one: int, two: int) -> None:
    data = b"".join(grpc.frame(message) for message in messages) + grpc.frame(end, 2) + b"more"
    counter = grpc_stats.ResponseCounter()
    low, high = sorted((one, two))
    assert sum(counter.feed(piece) for piece in (data[:low], data[low:high], data[high:])) == len(messages)
    assert counter.success is (end == b"{}")


def test_an_end_of_any_size_is_not_kept() -> None:
    counter = grpc_stats.ResponseCounter()
    counter.feed(b"\2\xff\xff\xff\xff")
    for _ in range(100):
        counter.feed(bytes(10_000))
    assert len(counter._body) < 80_000
