"""Istio's own samples: each is accepted, or refused for a reason that is written down here; and what is accepted does what the task that uses it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.kinds.store import Store
from control.model.snapshot import build
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, LISTENER, ROUTES
from control.translate.translator import Translator
from tests.unit.control_help import cluster, plain

SAMPLES = Path(__file__).parents[1] / "data" / "istio_samples"
FILES = sorted(str(path.relative_to(SAMPLES)) for path in SAMPLES.rglob("*.yaml"))
REFUSED = {
    "ambient-argo/application/details-waypoint.yaml": "spec.listeners[0].protocol: HBONE is not served, only HTTP, HTTPS, TLS, TCP",  # of the ambient mode
    "bookinfo/policy/productpage_envoy_ratelimit.yaml": (
        "spec.configPatches[0].patch.value.typed_config: envoy.extensions.filters.http.ratelimit.v3.RateLimit is not supported as http filter"
    ),
    "security/spire/clusterspiffeid.yaml": "kind: ClusterSPIFFEID of spire.spiffe.io is not served by meshctl",
}
# A proxy that calls others, and one at the edge, as documents of ours.
PROXIES = """
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: caller, labels: {app: productpage}}
spec: {sidecar: {httpProxy: 15001}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: edge, labels: {istio: ingressgateway}}
spec: {sidecar: {identity: true}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: bookinfo, labels: {gateway.networking.k8s.io/gateway-name: bookinfo-gateway}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: httpbin-edge, labels: {gateway.networking.k8s.io/gateway-name: httpbin-gateway}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: tcp-echo, labels: {gateway.networking.k8s.io/gateway-name: tcp-echo-gateway}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: eastwest, labels: {istio: eastwestgateway}}
"""


def load(*names: str) -> Store:
    store = Store()
    for name in names:
        store.put(name, (SAMPLES / name).read_bytes())
    store.put("proxies.yaml", PROXIES.encode())
    store.settle()
    return store


def view(*names: str, proxy: str = "caller"):
    """What a proxy gets of some samples."""
    store = load(*names)
    assert not store.troubles
    return Translator().view(ProxyKey("sidecar", proxy, "default"), build(store.objects))


@pytest.mark.parametrize("name", FILES)
def test_verdict(name):
    store = load(name)
    reason = REFUSED.get(name)
    if reason is None:
        assert [str(trouble) for trouble in store.troubles] == []
        assert [identity for identity in store.objects if identity[1] != "Workload"]
    else:
        assert {str(trouble.problem) for trouble in store.troubles} == {reason}


def test_every_refusal_is_of_a_sample():
    assert set(FILES) >= REFUSED.keys()


# --- what the tasks say

ALL = "bookinfo/networking/destination-rule-all.yaml"
NETWORKING = "bookinfo/networking/virtual-service-"


def routes_to(host: str, *names: str) -> list[tuple[str, str]]:
    """(what is matched beyond the path, where it goes) of requests to a service on port 9080, in their order."""
    hosts = plain(view("bookinfo/platform/kube/bookinfo.yaml", *names), ROUTES, "http_proxy")["virtual_hosts"]
    (found,) = (one for one in hosts if one["name"] == f"{host}.default.svc.cluster.local:9080")
    made = []
    for route in found["routes"]:
        match = "; ".join(f"{one['name']}={next(iter(one['string_match'].values()))}" for one in route["match"].get("headers", ()))
        made.append((match, _target(route)))
    return made


def _target(route) -> str:
    action = route["route"]
    if "weighted_clusters" in action:
        return " ".join(f"{_short(one['name'])}:{one['weight']}" for one in action["weighted_clusters"]["clusters"])
    return _short(action["cluster"])


def _short(name: str) -> str:
    _, _, subset, host = name.split("|")
    return "/".join(filter(None, (host.partition(".")[0], subset)))


@pytest.mark.parametrize(
    ("sample", "host", "expected"),
    [
        ("all-v1", "reviews", [("", "reviews/v1")]),
        ("all-v1", "productpage", [("", "productpage/v1")]),
        ("details-v2", "details", [("", "details/v2")]),
        ("ratings-db", "ratings", [("", "ratings/v2")]),
        ("ratings-mysql", "ratings", [("", "ratings/v2-mysql")]),
        ("ratings-mysql-vm", "ratings", [("", "ratings/v2-mysql-vm")]),
        ("ratings-test-abort", "ratings", [("end-user=jason", "ratings/v1"), ("", "ratings/v1")]),
        ("reviews-50-v3", "reviews", [("", "reviews/v1:50 reviews/v3:50")]),
        ("reviews-80-20", "reviews", [("", "reviews/v1:80 reviews/v2:20")]),
        ("reviews-90-10", "reviews", [("", "reviews/v1:90 reviews/v2:10")]),
        ("reviews-jason-v2-v3", "reviews", [("end-user=jason", "reviews/v2"), ("", "reviews/v3")]),
        ("reviews-test-v2", "reviews", [("end-user=jason", "reviews/v2"), ("", "reviews/v1")]),
        ("reviews-v2-v3", "reviews", [("", "reviews/v2:50 reviews/v3:50")]),
        ("reviews-v3", "reviews", [("", "reviews/v3")]),
    ],
)
def test_request_routing_and_traffic_shifting(sample, host, expected):
    assert routes_to(host, ALL, f"{NETWORKING}{sample}.yaml") == expected


@pytest.mark.parametrize(
    ("sample", "fault"),
    [
        ("ratings-test-abort", {"abort": {"http_status": 500, "percentage": {"numerator": 1_000_000, "denominator": "MILLION"}}}),
        ("ratings-test-delay", {"delay": {"fixed_delay": "7s", "percentage": {"numerator": 1_000_000, "denominator": "MILLION"}}}),
    ],
)
def test_fault_injection(sample, fault):
    hosts = plain(view("bookinfo/platform/kube/bookinfo.yaml", f"{NETWORKING}{sample}.yaml"), ROUTES, "http_proxy")["virtual_hosts"]
    jason, rest = next(one for one in hosts if one["name"].startswith("ratings."))["routes"]
    made = jason["typed_per_filter_config"]["envoy.filters.http.fault"]
    assert {key: value for key, value in made.items() if key != "@type"} == fault
    assert "typed_per_filter_config" not in rest


def test_mutual_tls_where_a_rule_asks_for_it():
    files = ("bookinfo/platform/kube/bookinfo.yaml", "bookinfo/networking/destination-rule-all-mtls.yaml")
    name = "outbound|9080|v1|reviews.default.svc.cluster.local"
    tls = cluster(view(*files, proxy="edge"), name)["transport_socket"]["typed_config"]
    assert tls["sni"] == "outbound_.9080_.v1_.reviews.default.svc.cluster.local"
    assert [one["name"] for one in tls["common_tls_context"]["tls_certificate_sds_secret_configs"]] == ["default"]
    assert view(*files).get(CLUSTER, name) is None  # a caller without certificates


def test_egress_with_tls_begun_by_the_sidecar():
    made = view("bookinfo/networking/egress-rule-google-apis.yaml")
    tls = cluster(made, "outbound|443||www.googleapis.com")
    assert tls["type"] == "STRICT_DNS"
    assert tls["transport_socket"]["name"] == "envoy.transport_sockets.tls"
    assert "transport_socket" not in cluster(made, "outbound|80||www.googleapis.com")
    (host,) = (one for one in plain(made, ROUTES, "http_proxy")["virtual_hosts"] if one["name"] == "www.googleapis.com:80")
    assert host["domains"] == ["www.googleapis.com", "www.googleapis.com:80"]
    assert host["routes"][0]["route"]["cluster"] == "outbound|443||www.googleapis.com"


def test_the_gateway_of_bookinfo():
    made = view("bookinfo/platform/kube/bookinfo.yaml", "bookinfo/networking/bookinfo-gateway.yaml", proxy="edge")
    (listener,) = made.all(LISTENER)
    assert listener.name == "0.0.0.0_8080"
    (host,) = plain(made, ROUTES, "http.8080")["virtual_hosts"]
    assert host["domains"] == ["*"]
    matches = [route["match"].get("path") or route["match"]["prefix"] for route in host["routes"]]
    assert matches == ["/productpage", "/static", "/login", "/logout", "/api/v1/products"]
    assert {route["route"]["cluster"] for route in host["routes"]} == {"outbound|9080||productpage.default.svc.cluster.local"}
    assert not list(view("bookinfo/networking/bookinfo-gateway.yaml", proxy="bookinfo").all(LISTENER))


def test_the_gateway_of_bookinfo_by_the_gateway_api():
    made = view("bookinfo/platform/kube/bookinfo.yaml", "bookinfo/gateway-api/bookinfo-gateway.yaml", proxy="bookinfo")
    (host,) = plain(made, ROUTES, "http.80")["virtual_hosts"]
    matches = [route["match"].get("path") or route["match"]["path_separated_prefix"] for route in host["routes"]]
    assert matches == ["/productpage", "/logout", "/login", "/api/v1/products", "/static"]  # exact ones, then the longest


def test_traffic_shifting_by_the_gateway_api():
    versions = "bookinfo/platform/kube/bookinfo-versions.yaml"
    assert routes_to("reviews", versions, "bookinfo/gateway-api/route-reviews-90-10.yaml") == [("", "reviews-v1:90 reviews-v2:10")]
    assert routes_to("reviews", versions, "bookinfo/gateway-api/route-all-v1.yaml") == [("", "reviews-v1")]


def test_plain_connections_through_a_gateway_by_weight():
    made = view("tcp-echo/tcp-echo-services.yaml", "tcp-echo/tcp-echo-all-v1.yaml", proxy="edge")
    proxy = plain(made, LISTENER, "0.0.0.0_31400")["filter_chains"][0]["filters"][0]["typed_config"]
    assert proxy["cluster"] == "outbound|9000|v1|tcp-echo.default.svc.cluster.local"


def test_the_gateway_of_httpbin_by_the_gateway_api():
    made = view("httpbin/httpbin.yaml", "httpbin/gateway-api/httpbin-gateway.yaml", proxy="httpbin-edge")
    (host,) = plain(made, ROUTES, "http.80")["virtual_hosts"]
    assert host["routes"][0]["route"]["cluster"] == "outbound|8000||httpbin.default.svc.cluster.local"


def test_plain_connections_by_the_gateway_api():
    gateway = "tcp-echo/gateway-api/tcp-echo-all-v1.yaml"
    store = load(gateway)

    def proxy():
        assert not store.troubles
        made = Translator().view(ProxyKey("sidecar", "tcp-echo", "default"), build(store.objects))
        return plain(made, LISTENER, "0.0.0.0_31400")["filter_chains"][0]["filters"][0]["typed_config"]

    assert proxy()["cluster"] == "outbound|9000||tcp-echo-v1.default.svc.cluster.local"
    # The task applies the second file over the first, whose route it replaces.
    store.put(gateway, (SAMPLES / gateway).read_text().rpartition("---")[0].encode())
    store.put("route.yaml", (SAMPLES / "tcp-echo/gateway-api/tcp-echo-20-v2.yaml").read_bytes())
    store.settle()
    shares = [(one["name"].split("|")[3].partition(".")[0], one["weight"]) for one in proxy()["weighted_clusters"]["clusters"]]
    assert shares == [("tcp-echo-v1", 80), ("tcp-echo-v2", 20)]


def test_tls_that_a_gateway_between_clusters_passes_on():
    made = view("multicluster/expose-istiod.yaml", proxy="eastwest")
    found = {
        listener.name: plain(made, LISTENER, listener.name)["filter_chains"][0]["filters"][0]["typed_config"]["cluster"] for listener in made.all(LISTENER)
    }
    assert found == {
        "0.0.0.0_15012": "outbound|15012||istiod.istio-system.svc.cluster.local",
        "0.0.0.0_15017": "outbound|443||istiod.istio-system.svc.cluster.local",
    }


def test_a_gateway_that_ends_tls_waits_for_its_certificate():
    """The sample's Secret is to be made by the reader: until it is there, nothing listens."""
    assert not list(view("multicluster/expose-istiod-https.yaml", proxy="eastwest").all(LISTENER))


def test_a_gateway_between_networks_passes_on_the_mutual_tls_of_the_mesh():
    made = view("bookinfo/platform/kube/bookinfo.yaml", "multicluster/expose-services.yaml", proxy="eastwest")
    names = {chain["filter_chain_match"]["server_names"][0] for chain in plain(made, LISTENER, "0.0.0.0_15443")["filter_chains"]}
    assert names == {f"outbound_.9080_._.{host}.default.svc.cluster.local" for host in ("details", "ratings", "reviews", "productpage")}
