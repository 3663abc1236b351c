"""Statistics as text, JSON and Prometheus: byte for byte what Envoy 1.40 showed for the same values."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from envoy.config.metrics.v3 import stats_pb2

from meshproxy.api import convert
from meshproxy.api.errors import ConfigError
from meshproxy.observe import histogram, prometheus, stats_render
from meshproxy.observe.stats import Store
from meshproxy.observe.stats_render import compact, parse_selection, shortest
from meshproxy.observe.tags import StatsConfig

QUANTILES = "P0({0}) P25({1}) P50({2}) P75({3}) P90({4}) P95({4}) P99({4}) P99.5({4}) P99.9({4}) P100({4})"


def render_text(*arguments: Any) -> str:
    return "".join(stats_render.render_text(*arguments))


def render_json(*arguments: Any) -> bytes:
    return b"".join(stats_render.render_json(*arguments))


def render_prometheus(*arguments: Any) -> str:
    return "".join(prometheus.render_prometheus(*arguments))


def filled() -> Store:
    store = Store()
    store.counter("cluster.up.upstream_rq_503").n = 2
    store.counter("cluster.up.upstream_rq_200").n = 5
    store.gauge("server.live").n = 1
    store.gauge("cluster.up.upstream_rq_active").seen = True
    store.scope("cluster.up.").declare("counter", ("upstream_rq_timeout",))
    store.scope("cluster.up.").declare("histogram", ("upstream_cx_length_ms",))
    store.text("control_plane.identifier").value = 'a "b"'
    for value in (0, 42, 43, 43, 43, 43, 43):
        store.histogram("cluster.up.upstream_rq_time").record(value)
    store.flush()
    return store


def select(**query: str) -> Any:
    return parse_selection(query)


def test_text() -> None:
    both = ["0,0", "42.5,42.5", "43.333333333333336,43.333333333333336", "43.666666666666664,43.666666666666664", "43.833333333333336,43.833333333333336"]
    assert render_text(filled(), StatsConfig()) == (
        'control_plane.identifier: "a "b""\n'
        "cluster.up.upstream_rq_200: 5\n"
        "cluster.up.upstream_rq_503: 2\n"
        "cluster.up.upstream_rq_active: 0\n"
        "cluster.up.upstream_rq_timeout: 0\n"
        "server.live: 1\n"
        "cluster.up.upstream_cx_length_ms: No recorded values\n"
        f"cluster.up.upstream_rq_time: {QUANTILES.format(*both)}\n"
    )


def test_an_interval_without_values() -> None:
    store = filled()
    store.flush()
    text = render_text(store, StatsConfig(), select(type="Histograms", usedonly=""))
    assert text.startswith("cluster.up.upstream_rq_time: P0(nan,0) P25(nan,42.5)")


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({"usedonly": ""}, ["control_plane.identifier", "cluster.up.upstream_rq_200", "cluster.up.upstream_rq_503", "cluster.up.upstream_rq_active"]),
        ({"type": "Gauges"}, ["cluster.up.upstream_rq_active", "server.live"]),
        ({"type": "TextReadouts"}, ["control_plane.identifier"]),
        ({"type": "Counters", "filter": "_rq_[0-9]"}, ["cluster.up.upstream_rq_200", "cluster.up.upstream_rq_503"]),
        ({"filter": "^nope"}, []),
    ],
)
def test_selection(query: dict[str, str], names: list[str]) -> None:
    shown = [line.partition(":")[0] for line in render_text(filled(), StatsConfig(), parse_selection(query)).splitlines()]
    assert shown[: len(names)] == names
    assert len(shown) == len(names) or query == {"usedonly": ""}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"type": "foo"}, "invalid &type= param"),
        ({"format": "foo"}, "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n"),
        ({"histogram_buckets": "foo"}, "usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n"),
        ({"filter": "("}, "Invalid re2 regex: missing ): ("),
    ],
)
def test_mistakes_in_the_query(query: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_selection(query)
    assert str(caught.value) == message


def test_json() -> None:
    text = render_json(filled(), StatsConfig())
    assert text.startswith(
        b'{"stats":[{"name":"control_plane.identifier","value":"a \\"b\\""},{"name":"cluster.up.upstream_rq_200","value":5},'
        b'{"name":"cluster.up.upstream_rq_503","value":2},'
    )
    assert b'{"histograms":{"supported_quantiles":[0,25,50,75,90,95,99,99.5,99.9,100],"computed_quantiles":[{"name":' in text
    histograms = json.loads(text)["stats"][-1]["histograms"]["computed_quantiles"]
    assert histograms[0]["values"][0] == {"cumulative": None, "interval": None}
    assert histograms[1]["values"][1] == {"cumulative": 42.5, "interval": 42.5}
    assert render_json(Store(), StatsConfig()) == b'{"stats":[]}'


def test_bucket_modes_as_text() -> None:
    store = filled()
    wanted = {"type": "Histograms", "usedonly": ""}
    assert render_text(store, StatsConfig(), select(histogram_buckets="cumulative", **wanted)) == (
        "cluster.up.upstream_rq_time: B0.5(1,1) B1(1,1) B5(1,1) B10(1,1) B25(1,1) B50(7,7) B100(7,7) B250(7,7) B500(7,7) B1000(7,7) B2500(7,7) B5000(7,7)"
        " B10000(7,7) B30000(7,7) B60000(7,7) B300000(7,7) B600000(7,7) B1.8e+06(7,7) B3.6e+06(7,7)\n"
    )
    assert render_text(store, StatsConfig(), select(histogram_buckets="disjoint", **wanted)).startswith(
        "cluster.up.upstream_rq_time: B0.5(1,1) B1(0,0) B5(0,0) B10(0,0) B25(0,0) B50(6,6) B100(0,0)"
    )
    assert render_text(store, StatsConfig(), select(histogram_buckets="detailed", **wanted)).startswith(
        "cluster.up.upstream_rq_time:\n  totals=0,0:1, 42,1:1, 43,1:5\n  intervals=0,0:1, 42,1:1, 43,1:5\n  summary=P0(0,0) P25(42.5,42.5)"
    )
    assert render_text(store, StatsConfig(), select(histogram_buckets="none", **wanted)) == render_text(store, StatsConfig(), select(**wanted))


def test_bucket_modes_as_json() -> None:
    store = filled()
    wanted = {"type": "Histograms", "filter": "rq_time"}
    text = render_json(store, StatsConfig(), select(histogram_buckets="cumulative", **wanted))
    assert text.startswith(b'{"stats":[{"histograms":[{"name":"cluster.up.upstream_rq_time","buckets":[{"upper_bound":0.5,"interval":1,"cumulative":1},')
    assert text.endswith(
        b'{"upper_bound":60000,"interval":7,"cumulative":7},{"upper_bound":3e+05,"interval":7,"cumulative":7},{"upper_bound":6e+05,"interval":7,"cumulative":7},'
        b'{"upper_bound":1800000,"interval":7,"cumulative":7},{"upper_bound":3600000,"interval":7,"cumulative":7}]}]}]}'
    )
    disjoint = json.loads(render_json(store, StatsConfig(), select(histogram_buckets="disjoint", **wanted)))
    assert [bucket["cumulative"] for bucket in disjoint["stats"][0]["histograms"][0]["buckets"]] == [1, 0, 0, 0, 0, 6] + [0] * 13
    detailed = render_json(store, StatsConfig(), select(histogram_buckets="detailed", **wanted))
    assert detailed.startswith(
        b'{"stats":[{"histograms":{"supported_percentiles":[0,25,50,75,90,95,99,99.5,99.9,100],"details":[{"name":"cluster.up.upstream_rq_time",'
        b'"totals":[{"lower_bound":0,"width":0,"count":1},{"lower_bound":42,"width":1,"count":1},{"lower_bound":43,"width":1,"count":5}],"intervals":['
    )


def test_prometheus() -> None:
    text = render_prometheus(filled(), StatsConfig(), select(filter="rq|live|control", text_readouts=""))
    assert text.startswith(
        "# TYPE envoy_cluster_upstream_rq counter\n"
        'envoy_cluster_upstream_rq{envoy_response_code="200",envoy_cluster_name="up"} 5\n'
        'envoy_cluster_upstream_rq{envoy_response_code="503",envoy_cluster_name="up"} 2\n'
        "# TYPE envoy_cluster_upstream_rq_timeout counter\n"
        'envoy_cluster_upstream_rq_timeout{envoy_cluster_name="up"} 0\n'
        "# TYPE envoy_cluster_upstream_rq_active gauge\n"
        'envoy_cluster_upstream_rq_active{envoy_cluster_name="up"} 0\n'
        "# TYPE envoy_server_live gauge\n"
        "envoy_server_live{} 1\n"
        "# TYPE envoy_control_plane_identifier gauge\n"
        'envoy_control_plane_identifier{text_value="a \\"b\\""} 0\n'
        "# TYPE envoy_cluster_upstream_rq_time histogram\n"
        'envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="up",le="0.5"} 1\n'
    )
    assert text.endswith(
        'envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="up",le="3600000"} 7\n'
        'envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="up",le="+Inf"} 7\n'
        'envoy_cluster_upstream_rq_time_sum{envoy_cluster_name="up"} 259.96538201487493324748356826603\n'
        'envoy_cluster_upstream_rq_time_count{envoy_cluster_name="up"} 7\n'
    )


def test_prometheus_summaries() -> None:
    text = render_prometheus(filled(), StatsConfig(), select(histogram_buckets="summary", type="Histograms"))
    assert text.startswith(
        '# TYPE envoy_cluster_upstream_cx_length_ms summary\nenvoy_cluster_upstream_cx_length_ms{envoy_cluster_name="up",quantile="0"} nan\n'
    )
    assert 'envoy_cluster_upstream_rq_time{envoy_cluster_name="up",quantile="0.5"} 43.333333333333335701809119200334\n' in text
    with pytest.raises(ConfigError, match="unsupported prometheus histogram bucket mode"):
        render_prometheus(filled(), StatsConfig(), select(histogram_buckets="detailed"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cluster.up.upstream_rq_503", 'cluster.upstream_rq{response_code="503",cluster_name="up"}'),
        ("cluster.up.external.upstream_rq_2xx", 'cluster.external.upstream_rq_xx{response_code_class="2",cluster_name="up"}'),
        ("cluster.b.dot_x.upstream_cx_total", 'cluster.dot_x.upstream_cx_total{cluster_name="b"}'),
        ("http.ing.downstream_rq_2xx", 'http.downstream_rq_xx{response_code_class="2",http_conn_manager_prefix="ing"}'),
        ("http.ing.rbac.allowed", 'http.rbac.allowed{http_conn_manager_prefix="ing"}'),
        ("http.ing.rbac.rsp.allowed", 'http.rbac.allowed{rbac_http_prefix="rsp",http_conn_manager_prefix="ing"}'),
        ("http.ing.rbac.policy.p1.allowed", 'http.rbac.policy.allowed{rbac_policy_name="p1",http_conn_manager_prefix="ing"}'),
        ("nrb.rbac.denied", 'rbac.denied{rbac_prefix="nrb"}'),
        ("lp.http_local_rate_limit.ok", 'http_local_rate_limit.ok{local_http_ratelimit_prefix="lp"}'),
        ("local_rate_limit.nlr.rate_limited", 'local_rate_limit.rate_limited{local_network_ratelimit_prefix="nlr"}'),
        ("connection_limit.clp.limited_connections", 'connection_limit.limited_connections{connection_limit_prefix="clp"}'),
        ("tcp.tp.downstream_cx_total", 'tcp.downstream_cx_total{tcp_prefix="tp"}'),
        ("vhost.vh.vcluster.vc.upstream_rq_200", 'vhost.vcluster.upstream_rq{response_code="200",virtual_cluster="vc",virtual_host="vh"}'),
        ("vhost.vh.route.rt.upstream_rq_total", 'vhost.route.upstream_rq_total{virtual_host="vh",route="rt"}'),
        ("listener.127.0.0.1_0.downstream_cx_total", 'listener.downstream_cx_total{listener_address="127.0.0.1_0"}'),
        ("listener.[__1]_0.downstream_cx_total", 'listener.downstream_cx_total{listener_address="[__1]_0"}'),
        ("listener.admin.downstream_cx_total", "listener.admin.downstream_cx_total{}"),
        ("listener.my.stat.ssl.ciphers.TLS_AES_256_GCM_SHA384", 'listener.stat.ssl.ciphers{ssl_cipher="TLS_AES_256_GCM_SHA384",listener_address="my"}'),
        ("listener.my.ssl.versions.TLSv1.3", 'listener.ssl.versions{ssl_version="TLSv1.3",listener_address="my"}'),
        (
            "listener.127.0.0.1_0.http.ing.downstream_rq_5xx",
            'listener.http.downstream_rq_xx{response_code_class="5",http_conn_manager_prefix="ing",listener_address="127.0.0.1_0"}',
        ),
        ("listener.127.0.0.1_0.worker_1.downstream_cx_total", 'listener.worker_downstream_cx_total{worker_id="1",listener_address="127.0.0.1_0"}'),
        ("proxy_proto.pp.versions.v2.found", 'proxy_proto.found{proxy_protocol_prefix="pp",proxy_protocol_version="2"}'),
        ("proxy_proto.versions.v1.found", 'proxy_proto.found{proxy_protocol_version="1"}'),
        ("server.live", "server.live{}"),
        ("cluster", "cluster{}"),
    ],
)
def test_default_tags(name: str, shown: str) -> None:
    base, tags = StatsConfig().tagged(name)
    labels = ",".join(f'{tag.removeprefix("envoy.")}="{value}"' for tag, value in tags)
    assert f"{base}{{{labels}}}" == shown


def config(**fields: Any) -> StatsConfig:
    return StatsConfig(convert.to_message(fields, stats_pb2.StatsConfig))


def test_configured_tags() -> None:
    made = config(
        stats_tags=[
            {"tag_name": "fixed", "fixed_value": "fv"},
            {"tag_name": "my.tag", "regex": r"^cluster\.((.*?)\.)external"},
            {"tag_name": "one", "regex": "(upstream_rq)_total$"},
        ]
    )
    assert made.tagged("cluster.up.upstream_rq_total") == ("cluster._total", [("fixed", "fv"), ("one", "upstream_rq"), ("envoy.cluster_name", "up")])
    assert made.tagged("cluster.up.external.upstream_rq_200") == (
        "cluster.external.upstream_rq",
        [("envoy.response_code", "200"), ("fixed", "fv"), ("envoy.cluster_name", "up"), ("my.tag", "up")],
    )
    assert config(use_all_default_tags=False).tagged("cluster.up.upstream_rq_200") == ("cluster.up.upstream_rq_200", [])
    few = config(use_all_default_tags=False, stats_tags=[{"tag_name": "envoy.cluster_name"}])
    assert few.tagged("cluster.up.upstream_rq_200") == ("cluster.upstream_rq_200", [("envoy.cluster_name", "up")])


def test_matchers() -> None:
    assert StatsConfig().accepts is None
    assert config().accepts is None
    assert config(stats_matcher={"reject_all": False}).accepts is None
    nothing = config(stats_matcher={"reject_all": True}).accepts
    included = config(stats_matcher={"inclusion_list": {"patterns": [{"prefix": "http."}, {"suffix": "total"}]}}).accepts
    excluded = config(stats_matcher={"exclusion_list": {"patterns": [{"prefix": "http."}]}}).accepts
    assert nothing is not None
    assert included is not None
    assert excluded is not None
    assert not nothing("http.x")
    assert [included(name) for name in ("http.x", "a.total", "a.b")] == [True, True, False]
    assert [excluded(name) for name in ("http.x", "a.b")] == [False, True]


def test_bucket_settings() -> None:
    made = config(histogram_bucket_settings=[{"match": {"suffix": "count"}, "buckets": [5.2, 4.9, 5]}, {"match": {"prefix": ""}, "bins": 100}])
    assert made.buckets("x.headers_count") == (4.9, 5.0, 5.2)
    assert made.buckets("x.rq_time") == histogram.DEFAULT_BUCKETS
    store = Store()
    store.histogram("x.count").record(5)
    store.flush()
    text = render_prometheus(store, made)
    assert 'envoy_x_count_bucket{le="4.9000000000000003552713678800501"} 0\n' in text
    assert 'envoy_x_count_bucket{le="5"} 1\n' in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stats_tags": [{"tag_name": "x"}]}, r"stats_tags\[0\].tag_name: No regex specified"),
        ({"stats_tags": [{"tag_name": "x", "regex": "("}]}, r"stats_tags\[0\].regex: invalid regular expression"),
        ({"stats_tags": [{"tag_name": "x", "regex": "x"}]}, r"stats_tags\[0\].regex: 'x' has no group"),
        ({"stats_matcher": {"inclusion_list": {"patterns": [{"safe_regex": {"regex": "("}}]}}}, r"stats_matcher.inclusion_list.patterns\[0\]"),
        ({"histogram_bucket_settings": [{"match": {"safe_regex": {"regex": "("}}}]}, r"histogram_bucket_settings\[0\].match"),
    ],
)
def test_mistakes_in_the_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("value", "text", "json_text"),
    [
        (0.0, "0", "0"),
        (42.5, "42.5", "42.5"),
        (43.333333333333336, "43.333333333333336", "43.333333333333336"),
        (10000.0, "10000", "10000"),
        (300000.0, "300000", "3e+05"),
        (1800000.0, "1800000", "1800000"),
        (12000000.0, "12000000", "1.2e+07"),
        (1e16, "1e+16", "1e+16"),
        (math.nan, "nan", "null"),
    ],
)
def test_numbers(value: float, text: str, json_text: str) -> None:
    assert (shortest(value), compact(value)) == (text, json_text)


def test_bins() -> None:
    for value, key in ((0, 0), (-3, 0), (1, 110), (9, 190), (10, 210), (99, 299), (100, 310), (109, 310), (110, 311), (123456, 612)):
        assert histogram.bin_of(value) == key
    assert histogram.bounds(612) == (120000.0, 10000.0)
    assert all(map(math.isnan, histogram.quantiles({})))


def test_fixed_tags() -> None:
    proto = stats_pb2.StatsConfig(
        stats_tags=[stats_pb2.TagSpecifier(tag_name="zone", fixed_value="z"), stats_pb2.TagSpecifier(tag_name="team", fixed_value="other")]
    )
    config = StatsConfig(proto, [("team", "b:c"), ("a", "1")])
    fixed = [("team", "b:c"), ("a", "1"), ("zone", "z")]
    tags = [("envoy.response_code", "200"), *fixed, ("envoy.cluster_name", "x")]
    assert config.tagged("cluster.x.upstream_rq_200") == ("cluster.upstream_rq", tags)
    assert config.tagged("server.live") == ("server.live", fixed)
    only = StatsConfig(None, [("a", "1")])
    assert [only.tagged(f"cluster.{name}.upstream_cx_total")[1] for name in "xy"] == [[("a", "1"), ("envoy.cluster_name", name)] for name in "xy"]
