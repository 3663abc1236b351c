"""Istio's metrics: who peers are, labels, overrides, what is remembered, and how it is shown."""

from __future__ import annotations

import base64
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import struct_pb2

from meshproxy.api import attributes
from meshproxy.api.errors import ConfigError
from meshproxy.codec.headers import RequestHead
from meshproxy.http.filter_chain import Chain
from meshproxy.http.filters import istio_stats, peer_metadata
from meshproxy.net.connection import TlsInfo
from meshproxy.observe import flags, istio_metrics, peers
from meshproxy.observe.istio_metrics import NO_PRINCIPALS, Ends, IstioMetrics
from meshproxy.observe.peers import Peer
from meshproxy.observe.prometheus import render_prometheus
from meshproxy.observe.stats import Counter, Store
from meshproxy.observe.tags import StatsConfig
from tests.unit.filter_help import Stream, context, proto

WEB = Peer("web", "shop", "web", "v1", "here", "web", "v1", "web-1", "", "kubernetes://apis/apps/v1/namespaces/shop/deployments/web")
FRONT = "spiffe://cluster.local/ns/edge/sa/front"


class Cluster:
    def __init__(self, name: str = "outbound|80||web.shop.svc", **istio: Any) -> None:
        self.name = name
        self.metadata = {"istio": istio} if istio else {}


class Lane:
    def __init__(self, *, grpc: bool) -> None:
        self.cluster = SERVICE
        self.route = SimpleNamespace(name="")
        self.grpc = grpc


SERVICE = Cluster(services=[{"host": "web.shop.svc", "name": "web", "namespace": "shop"}])


def ends(**given: Any) -> Ends:
    return Ends(**{"peer": None, "principals": NO_PRINCIPALS, "cluster": None, "route_name": "", "host": "", **given})


def metrics(text: str = "{}", *, inbound: bool = False, local: Peer = WEB) -> IstioMetrics:
    return IstioMetrics(proto("stats.PluginConfig", text), Store(), local, inbound=inbound)


def counted(made: IstioMetrics, name: str = "requests_total") -> list[dict[str, str]]:
    store = made._store
    store.collect()
    return [dict(tags) for base, tags in store.tags.values() if base == f"istiocustom.istio_{name}"]


# -- peers


def test_a_header_tells_who_one_is():
    value = peers.to_header(WEB)
    assert peers.of_header(value) == WEB
    assert peers.of_header(value.rstrip(b"=")) == WEB
    struct = struct_pb2.Struct.FromString(base64.b64decode(value))
    assert struct["LABELS"]["service.istio.io/canonical-name"] == "web"
    assert struct["WORKLOAD_NAME"] == "web"


@pytest.mark.parametrize("value", [b"?", b"AAAA", b"Q" * 8193, b"Cg==", b"\xff"])
def test_what_is_no_such_header_tells_nothing(value):
    assert peers.of_header(value) is None


def test_values_that_are_no_text_are_not_taken():
    struct = struct_pb2.Struct()
    struct.update({"WORKLOAD_NAME": "a\nb", "NAMESPACE": 7.0, "LABELS": "none"})
    assert peers.of_header(base64.b64encode(struct.SerializeToString())) == Peer()


def test_qualified_labels_go_before_plain_ones():
    labels = {"app": "a", "app.kubernetes.io/name": "b", "version": "1"}
    found = peers.of_metadata({"LABELS": labels})
    assert (found.app, found.version) == ("b", "1")


def test_endpoints_say_who_they_are():
    assert peers.of_endpoint("web;shop;web;v1;here") == Peer("web", "shop", "web", "v1", "here")
    assert peers.of_endpoint("web.shop") is None


def test_principals_are_those_of_certificates(monkeypatch):
    class Certificate:
        def __init__(self, *uris: str) -> None:
            self.uri_sans = uris

    info = TlsInfo(None, Certificate("spiffe://a", "spiffe://b"))  # type: ignore[arg-type]
    info._peer = Certificate()  # type: ignore[assignment]
    assert info.principals == ("", "spiffe://a")


# -- the exchange


def test_the_exchange_of_a_server():
    ctx = context()
    made = peer_metadata.compile(
        proto("io.istio.http.peer_metadata.Config", "{downstream_discovery: [{istio_headers: {}}], downstream_propagation: [{istio_headers: {}}]}"), ctx
    )
    stream = Stream(headers=[(b"x-envoy-peer-metadata-id", b"a"), (b"x-envoy-peer-metadata", peers.to_header(WEB)), (b"x-other", b"1")])
    made.request_headers(stream, True)
    assert stream.downstream_peer == WEB
    assert stream.request.items == [(b"x-other", b"1")]
    stream.response.add(b"x-envoy-peer-metadata", b"from the application")
    made.response_headers(stream, True)
    assert stream.upstream_peer is None
    assert dict(stream.response.items)[b"x-envoy-peer-metadata-id"] == b"node"


@pytest.mark.parametrize(
    ("cluster", "told"),
    [(Cluster(), True), (Cluster(external=True), False), (Cluster(disable_mx=True), False), (Cluster("PassthroughCluster"), False), (None, True)],
)
def test_who_is_told(cluster, told):
    made = peer_metadata.compile(
        proto("io.istio.http.peer_metadata.Config", "{upstream_propagation: [{istio_headers: {skip_external_clusters: true}}]}"), context()
    )
    head = RequestHead(b"GET", b"/", b"h", [])
    assert made.shape_request(head, cluster) is None
    assert (b"x-envoy-peer-metadata" in head) is told


def test_chains_that_only_shape_heads_keep_their_lanes():
    shaper = peer_metadata.compile(proto("io.istio.http.peer_metadata.Config", "{}"), context())
    stats = istio_stats.compile(proto("stats.PluginConfig"), context())
    chain = Chain([shaper, stats])
    assert chain.plannable
    assert chain.shaper is shaper
    assert chain.repeated == ()

    class Looks:
        def request_headers(self, stream, end_stream): ...
        def request_headers_repeated(self, stream): ...

    assert not Chain([Looks(), shaper]).plannable  # it would have seen what the other has taken away
    assert Chain([shaper, Looks()]).plannable
    assert not Chain([shaper, shaper]).plannable


# -- labels


def test_an_inbound_request():
    made = metrics(inbound=True)
    principals = FRONT, "spiffe://cluster.local/ns/shop/sa/web"
    made.request(ends(peer=Peer("front", "elsewhere", app="f"), principals=principals, cluster=SERVICE), status=200, flags=0, grpc=True, grpc_status="0")
    [labels] = counted(made)
    assert set(labels) == istio_metrics.LABELS
    assert labels["source_workload_namespace"] == "edge"  # as the certificate says
    assert (labels["source_principal"], labels["destination_principal"]) == principals
    assert (labels["source_workload"], labels["source_app"], labels["source_version"], labels["source_canonical_revision"]) == (
        "front",
        "f",
        "unknown",
        "latest",
    )
    assert (labels["destination_service"], labels["destination_service_name"], labels["destination_service_namespace"]) == ("web.shop.svc", "web", "shop")
    assert (labels["reporter"], labels["request_protocol"], labels["grpc_response_status"]) == ("destination", "grpc", "0")
    assert labels["connection_security_policy"] == "mutual_tls"


@pytest.mark.parametrize(
    ("given", "service"),
    [
        ({"cluster": SERVICE, "host": "any"}, ("web.shop.svc", "web", "shop")),
        ({"cluster": Cluster(), "host": "example.org"}, ("example.org", "example.org", "unknown")),
        ({"cluster": None, "host": "example.org"}, ("example.org", "example.org", "unknown")),
        ({"cluster": Cluster("PassthroughCluster"), "host": "example.org"}, ("example.org", "PassthroughCluster", "unknown")),
        ({"route_name": "block_all", "host": "example.org"}, ("example.org", "BlackHoleCluster", "unknown")),
        ({"cluster": SERVICE, "route_name": "allow_any"}, ("unknown", "PassthroughCluster", "unknown")),
    ],
)
def test_the_service_of_an_outbound_request(given, service):
    made = metrics()
    made.request(ends(**given), status=503, flags=flags.UH, grpc=False, grpc_status="")
    [labels] = counted(made)
    assert (labels["destination_service"], labels["destination_service_name"], labels["destination_service_namespace"]) == service
    assert (labels["response_code"], labels["response_flags"], labels["connection_security_policy"]) == ("503", "UH", "unknown")
    assert (labels["source_workload"], labels["reporter"]) == ("web", "source")


def test_the_host_does_not_count_where_it_is_not_to():
    made = metrics("{disable_host_header_fallback: true}")
    made.request(ends(host="example.org"), status=200, flags=0, grpc=False, grpc_status="")
    [labels] = counted(made)
    assert labels["destination_service"] == "unknown"


def test_a_gateway_of_a_set_of_workloads():
    made = metrics("{reporter: SERVER_GATEWAY}")
    made.request(ends(peer=Peer("front"), upstream=WEB, cluster=SERVICE), status=200, flags=0, grpc=False, grpc_status="")
    [labels] = counted(made)
    assert (labels["reporter"], labels["source_workload"], labels["destination_workload"]) == ("waypoint", "front", "web")


def test_names_do_not_fill_memory(monkeypatch):
    monkeypatch.setattr(istio_metrics, "_MAX_LABEL_SETS", 3)
    made = metrics(inbound=True)
    for number in range(10):
        made.request(ends(peer=Peer(f"liar-{number}")), status=200, flags=0, grpc=False, grpc_status="")
    assert sorted({one["source_workload"] for one in counted(made)}) == ["liar-0", "liar-1", "liar-2", "unknown"]


def test_what_requests_say_of_themselves_does_not_fill_memory(monkeypatch):
    monkeypatch.setattr(istio_metrics, "_MAX_LABEL_SETS", 3)
    made = metrics("{metrics: [{dimensions: {path: request.path, fixed: \"'a'\"}}]}")
    for number in range(10):
        stream = Stream(path=b"/%d" % number)
        made.request(ends(), status=200, flags=0, grpc=False, grpc_status="", stream=stream)
        made.connection(ends(), 0, stream)
        made.count_messages(ends(), 1, 1, stream)
    for name in ("requests_total", "tcp_sent_bytes_total", "request_messages_total"):
        assert sorted({(one["path"], one["fixed"]) for one in counted(made, name)}) == [("/0", "a"), ("/1", "a"), ("/2", "a"), ("unknown", "a")]


def test_long_values_do_not_fill_memory():
    struct = struct_pb2.Struct()
    struct.update({"WORKLOAD_NAME": "a" * 1000})
    assert peers.of_header(base64.b64encode(struct.SerializeToString())) == Peer("a" * 256)
    before = peers._of_header.cache_info().currsize
    assert peers.of_header(b"Q" * 8193) is None
    assert peers._of_header.cache_info().currsize == before


@pytest.mark.parametrize(("status", "text"), [(None, ""), (b"0", "0"), (b"14", "14"), (7, "7"), (b"1000", ""), (-1, ""), (b"a", ""), (b"", "")])
def test_a_grpc_status_is_a_number(status, text):
    made = istio_stats.compile(proto("stats.PluginConfig"), context())
    lane = Lane(grpc=True)
    request = made._learn((lane, b"h", None, 200, None, None, None, status))
    assert made._metrics.remembered[lane, b"h", None, 200, None, None, None, status] is request
    assert [labels["grpc_response_status"] for labels in counted(made._metrics)] == [text]


def test_long_hosts_are_not_remembered():
    made = istio_stats.compile(proto("stats.PluginConfig"), context())
    made._learn((Lane(grpc=False), b"h" * 257, None, 200, None, None, None, None))
    assert not made._metrics.remembered


# -- overrides


def test_metrics_that_are_not_wanted_and_labels_that_are_others():
    text = (
        """{metrics: [{name: response_bytes, drop: true}, {name: requests_total, tags_to_remove: [source_app], dimensions: {who: "'me'", reporter: '"r"'}}]}"""
    )
    made = metrics(text)
    request = made.request(ends(), status=200, flags=0, grpc=False, grpc_status="")
    made.count(request, 7, 100, 200)
    [labels] = counted(made)
    assert "source_app" not in labels
    assert (labels["who"], labels["reporter"]) == ("me", "r")
    assert counted(made, "response_bytes") == []
    [labels] = counted(made, "request_bytes")
    assert "who" not in labels
    assert "source_app" in labels


def test_drop_needs_a_name():
    made = metrics("{metrics: [{drop: true}]}")
    made.request(ends(), status=200, flags=0, grpc=False, grpc_status="")
    assert len(counted(made)) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{metrics: [{name: nonsense}]}", "metrics[0].name: 'nonsense' is not one of"),
        ("{metrics: [{dimensions: {a: 'request.size > 3'}}]}", "metrics[0].dimensions[\"a\"]: 'request.size > 3' is neither"),
    ],
)
def test_what_is_refused(text, problem):
    with pytest.raises(ConfigError) as caught:
        metrics(text)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "attribute"),
    [
        ("'a b'", ("", "a b")),
        ('"x"', ("", "x")),
        ("''", ("", "")),
        ("17", ("", "17")),
        ("true", ("", "true")),
        (" request.host ", ("request.host", "")),
        ("request.headers['x-user']", ("request.headers", "x-user")),
        ('node.metadata["A"]', ("node.metadata", "A")),
    ],
)
def test_attributes(text, attribute):
    assert attributes.parse(text) == attribute


@pytest.mark.parametrize("text", ["", "request", "request.headers", "request.host['a']", "'a' + 'b'", "'a\\'", "node.metadata['A'].b"])
def test_what_are_no_attributes(text):
    with pytest.raises(ConfigError):
        attributes.parse(text)


# -- counting


def test_equal_requests_are_one_series_and_settled_when_read():
    made = metrics()
    one = made.request(ends(cluster=SERVICE), status=200, flags=0, grpc=False, grpc_status="")
    assert made.request(ends(cluster=SERVICE), status=200, flags=0, grpc=False, grpc_status="") is one
    made.count(one, 5, 100, 1000)
    made.count(one, 5, 100, 2000)
    store = made._store
    name = next(name for name, (base, _) in store.tags.items() if base.endswith("requests_total"))
    assert store.value(name) == 0
    store.collect()
    assert store.value(name) == 2
    store.collect()
    assert store.value(name) == 2


def test_messages():
    made = metrics()
    made.count_messages(ends(cluster=SERVICE), 3, 4)
    [labels] = counted(made, "response_messages_total")
    assert "response_code" not in labels
    assert sorted(metric.n for metric in made._store.metrics.values() if isinstance(metric, Counter) and "messages" in metric.name) == [3, 4]


def test_equal_configurations_count_together():
    ctx = context()
    one, two = (istio_stats.compile(proto("stats.PluginConfig"), ctx) for _ in range(2))
    assert one._metrics is two._metrics
    assert istio_stats.compile(proto("stats.PluginConfig", "{disable_host_header_fallback: true}"), ctx)._metrics is not one._metrics


def test_metrics_that_no_filter_has_go_and_are_counted():
    ctx = context()
    store = ctx.context.stats
    before = list(store.collectors)
    old = istio_stats.compile(proto("stats.PluginConfig"), ctx)
    request = old._metrics.request(ends(cluster=SERVICE), status=200, flags=0, grpc=False, grpc_status="")
    old._metrics.count(request, 5, 100, 1000)
    old._metrics.remember((Lane(grpc=False), old), request)  # a lane knows its connection manager, and that its filters
    new = istio_stats.compile(proto("stats.PluginConfig", "{disable_host_header_fallback: true}"), ctx)
    del old, request
    gc.collect()
    assert [*ctx.context.shared["istio metrics"].values()] == [new._metrics]
    assert len(store.collectors) == len(before) + 1
    name = next(name for name, (base, _) in store.tags.items() if base.endswith("requests_total"))
    assert store.value(name) == 1


# -- how it is shown


def test_tags_go_from_worker_to_main_and_to_prometheus():
    worker, main = Store(), Store()
    tags = ("reporter", "source"), ("grpc_response_status", ""), ("odd", 'a.b"c')
    worker.tagged(Counter, "istiocustom.istio_requests_total", tags).n += 3
    main.merge(0, worker.deltas())
    text = "".join(render_prometheus(main, StatsConfig()))
    assert text == '# TYPE istio_requests_total counter\nistio_requests_total{reporter="source",grpc_response_status="",odd="a.b\\"c"} 3\n'
    assert main.value('istiocustom.istio_requests_total.reporter.source.grpc_response_status.odd.a.b"c') == 3
    worker.remove("istiocustom.")
    assert worker.tags == {}


def test_what_is_not_accepted_has_no_tags():
    store = Store(lambda name: False)
    store.tagged(Counter, "istiocustom.istio_requests_total", (("a", "b"),)).n += 1
    assert store.tags == {}
    assert not store.metrics
