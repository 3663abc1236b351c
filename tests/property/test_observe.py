"""Formats and statistics under arbitrary input."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import RequestHead
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo
from meshproxy.observe import histogram, json_text
from meshproxy.observe.format import Compiler, compile_header_value, compile_json
from meshproxy.observe.operators import COMMANDS
from meshproxy.observe.stats import Store
from meshproxy.observe.stream_info import StreamInfo
from meshproxy.observe.tags import StatsConfig


def stream(**attributes: Any) -> StreamInfo:
    made = StreamInfo()
    made.connection = ConnectionInfo(1, Address("10.0.0.1", 1000), Address("127.0.0.1", 80), 1.0)
    made.protocol = "HTTP/1.1"
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(st.binary())
def test_any_bytes_make_a_json_string_on_one_line(value: bytes) -> None:
    text = json_text.quote(value)
    parsed = json.loads(text)
    assert re.search(rb"[\x00-\x1f]", text) is None
    try:
        assert parsed == value.decode()
    except UnicodeDecodeError:
        assert parsed == value.decode("latin-1")


@given(plain)
def test_plain_values_survive_json(value: Any) -> None:
    def finite(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        return [finite(inner) for inner in item] if isinstance(item, list) else item

    assert json.loads(json_text.dump(value)) == finite(value)


@given(st.binary())
def test_headers_pass_through_text_formats_unchanged(value: bytes) -> None:
    render = Compiler().text("<%REQ(x)%>")
    assert callable(render)
    assert render(stream(request=RequestHead(b"GET", b"/", b"", [(b"x", value)]))) == b"<%b>" % value


@given(st.binary())
def test_header_values_hold_no_line_ends(value: bytes) -> None:
    render = compile_header_value("%REQ(x)%%RESPONSE_CODE%")
    assert callable(render)
    assert not set(render(stream(request=RequestHead(b"GET", b"/", b"", [(b"x", value)])))) & set(b"\r\n\0")


command = st.builds(
    lambda name, parameter, length: f"%{name}{parameter}{length}%",
    st.sampled_from(sorted(COMMANDS)),
    st.sampled_from(["", "()", "(x)", "(:path)", "(a?b)", "(a:b:c)", "(%Y%%)", "('\"\\)", "(8)", "(DYNAMIC:a:{s}:%d)", '({"operators":["DURATION"]})']),
    st.sampled_from(["", ":0", ":3"]),
)


@given(st.lists(command | st.text() | st.sampled_from(["%%", "{", "'", '"', "\\", "\n"]), max_size=6).map("".join))
def test_a_format_compiles_and_runs_or_is_rejected(text: str) -> None:
    for request in (None, RequestHead(b"GET", b"/?a=b", b"host", [(b"x", b"1")])):
        try:
            render = Compiler().text(text)
            as_json = compile_json({"v": text, "w": [text, {"x": text}]})
            sparse = compile_json({"v": text, "w": [text, {"x": text}]}, omit_empty=True)
            header = compile_header_value(text)
        except ConfigError:
            return
        s = stream(request=request, end=2.0)
        line = render(s) if callable(render) else render
        assert isinstance(line, bytes)
        assert isinstance(header(s) if callable(header) else header, bytes)
        for made in (as_json(s), sparse(s)):
            json.loads(made)
            assert made.count(b"\n") == 1


@given(st.lists(st.integers(min_value=0, max_value=10**9), min_size=1))
def test_quantiles_are_near_the_values(values: list[int]) -> None:
    bins: histogram.Bins = {}
    histogram.fold(values, bins)
    assert histogram.count(bins) == len(values)
    ordered = sorted(values)
    quantiles = histogram.quantiles(bins)
    assert quantiles == sorted(quantiles)
    for fraction, found in zip(histogram.QUANTILES, quantiles, strict=True):
        exact = ordered[max(1, math.ceil(fraction * len(ordered))) - 1]
        assert exact * 0.9 - 1e-6 <= found <= exact * 1.11 + 1e-6
    assert abs(histogram.total(bins) - sum(values)) <= 0.051 * sum(values) + 1e-6


@given(st.integers(min_value=0, max_value=10**12))
def test_a_value_is_in_its_bin(value: int) -> None:
    left, width = histogram.bounds(histogram.bin_of(value))
    assert left - 1e-6 <= value < left + max(width, 1e-9) + 1e-6
    assert width <= max(value / 10, 0.1) + 1e-9


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(-5, 5), st.booleans())))
def test_workers_always_add_up(events: list[tuple[int, int, int, bool]]) -> None:
    main, workers = Store(), {index: Store() for index in range(3)}
    expected_counters = dict.fromkeys(range(4), 0)
    gauges = {(worker, name): 0 for worker in range(3) for name in range(4)}
    for worker, name, delta, dies in events:
        if dies:
            main.merge(worker, workers[worker].deltas())
            main.drop_worker(worker)
            workers[worker] = Store()
            for other in range(4):
                gauges[worker, other] = 0
        workers[worker].counter(f"c{name}").n += abs(delta)
        workers[worker].gauge(f"g{name}").n += delta
        expected_counters[name] += abs(delta)
        gauges[worker, name] += delta
    for worker, store in workers.items():
        main.merge(worker, store.deltas())
    for name in range(4):
        assert main.value(f"c{name}") == expected_counters[name]
        assert main.value(f"g{name}") == sum(gauges[worker, name] for worker in range(3))


@given(
    st.lists(st.sampled_from(["cluster", "http", "listener", "rbac", "ssl", "a", "upstream_rq_200", "x_rq_5xx", "worker_3", "admin", ""]), min_size=1).map(
        ".".join
    )
)
def test_tags_are_parts_of_the_name(name: str) -> None:
    base, tags = StatsConfig().tagged(name)
    assert len(base) <= len(name)
    assert len({tag for tag, _ in tags}) == len(tags)
    assert all(value in name for _, value in tags)
