"""Of the Gateway API: TLSRoute, TCPRoute, grants for backends, BackendTLSPolicy."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, LISTENER, ORDER
from control.translate.translator import Translator
from meshproxy.api import support
from tests.differential.pki import Authority
from tests.unit.control_help import MESH, cluster, endpoints, istio, listener, routes, snapshot, view_of
from tests.unit.test_control_gateway_tls import API_EDGE, KEY, api, api_gateway
from tests.unit.test_control_kinds import complaints

REVIEWS = "outbound|9080||reviews.default.svc.cluster.local"


def view(*texts: str):
    made = Translator().view(KEY, snapshot(MESH, API_EDGE, *texts))
    for url in ORDER:
        for one in made.all(url):
            assert not support.check(one.message)[0], one
    return made


def clusters_of(chain) -> list[str]:
    proxy = chain["filters"][-1]["typed_config"]
    return [proxy["cluster"]] if "cluster" in proxy else [f"{one['name']}:{one['weight']}" for one in proxy["weighted_clusters"]["clusters"]]


# --- connections


def test_tcp_routes():
    gateway = api_gateway("[{name: a, port: 9000, protocol: TCP}, {name: b, port: 9001, protocol: TCP}]")
    route = api("TCPRoute", "t", "{parentRefs: [{name: g, sectionName: a}], rules: [{backendRefs: [{name: db, port: 3306}]}]}")
    made = view(gateway, route)
    (chain,) = listener(made, "0.0.0.0_9000")["filter_chains"]
    assert clusters_of(chain) == ["outbound|3306||db.default.svc.cluster.local"]
    assert made.get(LISTENER, "0.0.0.0_9001") is None
    split = route.replace("[{name: db, port: 3306}]", "[{name: db, port: 3306, weight: 3}, {name: reviews, port: 9080}, {name: x, port: 1, weight: 0}]")
    (chain,) = listener(view(gateway, split), "0.0.0.0_9000")["filter_chains"]
    assert clusters_of(chain) == ["outbound|3306||db.default.svc.cluster.local:3", f"{REVIEWS}:1"]


def test_tls_routes_by_server_name():
    gateway = api_gateway("[{name: a, port: 8443, protocol: TLS, hostname: '*.test', tls: {mode: Passthrough}}]")
    one = api("TLSRoute", "one", "{parentRefs: [{name: g}], hostnames: [a.test, elsewhere.com], rules: [{backendRefs: [{name: db, port: 3306}]}]}")
    rest = api("TLSRoute", "rest", "{parentRefs: [{name: g}], rules: [{backendRefs: [{name: reviews, port: 9080}]}]}")
    first, second = listener(view(gateway, one, rest), "0.0.0.0_8443")["filter_chains"]
    assert first["filter_chain_match"] == {"server_names": ["a.test"]}
    assert second["filter_chain_match"] == {"server_names": ["*.test"]}
    assert clusters_of(second) == [REVIEWS]


def test_routes_of_connections_with_a_service_as_parent():
    route = api("TCPRoute", "t", '{parentRefs: [{group: "", kind: Service, name: db}], rules: [{backendRefs: [{name: reviews, port: 9080}]}]}')
    (chain,) = listener(view_of(route), "127.0.0.1_13306")["filter_chains"]
    assert clusters_of(chain) == [REVIEWS]


# --- backends of other namespaces


def to_shop(weight: str = "") -> str:
    backends = f"[{{name: api, namespace: shop, port: 80{weight}}}{', {name: reviews, port: 9080, weight: 1}' if weight else ''}]"
    return api("HTTPRoute", "r", f'{{parentRefs: [{{group: "", kind: Service, name: reviews}}], rules: [{{backendRefs: {backends}}}]}}')


def grant(kind: str = "HTTPRoute", namespace: str = "default", to: str = "{group: '', kind: Service}") -> str:
    origin = f"{{group: gateway.networking.k8s.io, kind: {kind}, namespace: {namespace}}}"
    return api("ReferenceGrant", "x", f"{{from: [{origin}], to: [{to}]}}", "shop")


THERE = "{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop}, spec: {ports: [{name: http, port: 80}]}}"


def test_a_backend_of_another_namespace_needs_a_grant():
    (route,) = routes(view_of(THERE, to_shop(), grant()))
    assert route["route"]["cluster"] == "outbound|80||api.shop.svc.cluster.local"
    for denied in (grant("GRPCRoute"), grant(namespace="other"), grant(to="{group: '', kind: Service, name: other}"), grant(to="{group: '', kind: Secret}")):
        (route,) = routes(view_of(THERE, to_shop(), denied))
        assert (route["route"]["cluster"], route["route"]["cluster_not_found_response_code"]) == ("UnknownService", "INTERNAL_SERVER_ERROR")


def test_without_a_grant_the_other_backends_keep_their_shares():
    (route,) = routes(view_of(THERE, to_shop(", weight: 3")))
    assert [(one["name"], one["weight"]) for one in route["route"]["weighted_clusters"]["clusters"]] == [("UnknownService", 3), (REVIEWS, 1)]


# --- TLS towards backends


@pytest.fixture(scope="module")
def ca(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("pki")
    Authority(folder, "ca")
    return (folder / "ca.pem").read_text()


def config_map(pem: str, name: str = "roots") -> str:
    indented = pem.replace("\n", "\n    ")
    return f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata:\n  ca.crt: |\n    {indented}\n"


def policy(validation: str, target: str = "{group: '', kind: Service, name: reviews}", name: str = "p") -> str:
    return api("BackendTLSPolicy", name, f"{{targetRefs: [{target}], validation: {validation}}}")


FROM_MAP = "{hostname: reviews.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}"


def test_authorities_from_a_config_map(ca):
    made = cluster(view_of(policy(FROM_MAP), config_map(ca)), REVIEWS)
    tls = made["transport_socket"]["typed_config"]
    assert tls["sni"] == "reviews.test"
    validation = tls["common_tls_context"]["validation_context"]
    assert validation["trusted_ca"]["inline_string"].strip() == ca.strip()
    assert {one["matcher"]["exact"] for one in validation["match_typed_subject_alt_names"]} == {"reviews.test"}
    assert "transport_socket" not in cluster(view_of(policy(FROM_MAP), config_map(ca)), "outbound|3306||db.default.svc.cluster.local")


def test_without_its_authorities_nobody_is_trusted(ca):
    assert view_of(policy(FROM_MAP)).get(CLUSTER, REVIEWS) is None
    assert view_of(policy(FROM_MAP), config_map(ca, "other")).get(CLUSTER, REVIEWS) is None


def test_the_systems_authorities_and_other_names():
    names = "[{type: Hostname, hostname: a.test}, {type: URI, uri: 'spiffe://a/b'}]"
    validation = f"{{hostname: reviews.test, wellKnownCACertificates: System, subjectAltNames: {names}}}"
    tls = cluster(view_of(policy(validation)), REVIEWS)["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"]
    assert "filename" in tls["trusted_ca"]
    assert {one["matcher"]["exact"] for one in tls["match_typed_subject_alt_names"]} == {"a.test", "spiffe://a/b"}


def test_the_policy_of_a_port_goes_first_and_a_rule_of_callers_before_both(ca):
    system = "{hostname: all.test, wellKnownCACertificates: System}"
    texts = policy(system, name="a"), policy(FROM_MAP, "{group: '', kind: Service, name: reviews, sectionName: http}", "b"), config_map(ca)
    assert cluster(view_of(*texts), REVIEWS)["transport_socket"]["typed_config"]["sni"] == "reviews.test"
    other = policy(system, "{group: '', kind: Service, name: reviews, sectionName: other}")
    assert "transport_socket" not in cluster(view_of(other), REVIEWS)
    rule = istio("DestinationRule", "r", "{host: reviews, trafficPolicy: {tls: {mode: DISABLE}}}")
    assert "transport_socket" not in cluster(view_of(*texts, rule), REVIEWS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (policy("{hostname: a}"), "spec.validation: one of caCertificateRefs, wellKnownCACertificates is needed"),
        (policy("{wellKnownCACertificates: System}"), "spec.validation.hostname: is needed"),
        (policy("{hostname: a, caCertificateRefs: [{group: '', kind: Secret, name: s}]}"), "spec.validation.caCertificateRefs[0].kind: Secret of core"),
        (policy("{hostname: a, wellKnownCACertificates: System}", "{group: x, kind: K, name: z}"), "spec.targetRefs[0].kind: K of x is nothing"),
        (api("TCPRoute", "t", "{parentRefs: [{name: g}], rules: [{backendRefs: []}]}"), "spec.rules[0].backendRefs: must not be empty"),
        (api("TCPRoute", "t", "{parentRefs: [{name: g}], hostnames: [a], rules: [{backendRefs: [{name: a, port: 1}]}]}"), "spec.hostnames: no such field"),
        (config_map("nonsense"), "data[ca.crt]: no certificates in PEM"),
        (api("ReferenceGrant", "x", "{from: [], to: []}"), "spec.from: must not be empty"),
    ],
)
def test_mistakes(text, complaint):
    found = complaints(text)
    assert any(one.startswith(complaint) for one in found), found


def test_config_maps_for_others_are_passed_over():
    assert complaints("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {x: y}}") == []
    assert complaints("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}") == []


# --- localities by labels


def test_the_endpoints_that_are_most_like_the_caller_go_first():
    balancer = "{localityLbSetting: {failoverPriority: [topology.kubernetes.io/region, tier, version=v2]}}"
    rule = istio("DestinationRule", "r", f"{{host: reviews, trafficPolicy: {{loadBalancer: {balancer}, outlierDetection: {{interval: 1s}}}}}}")
    texts = [rule]
    for name, version, region, port in (("a", "v2", "eu", 1), ("b", "v1", "eu", 2), ("c", "v2", "us", 3)):
        meta = f"{{name: {name}, labels: {{app: reviews, tier: gold, version: {version}}}}}"
        texts.append(f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {meta}, spec: {{locality: {region}/a, ports: {{http: {port}}}}}}}")
    key = ProxyKey("sidecar", "web", "default", (("app", "web"), ("tier", "gold")))
    found = {}
    for group in endpoints(view_of(*texts, proxy=key), REVIEWS)["endpoints"]:
        for one in group["lb_endpoints"]:
            found[one["endpoint"]["address"]["socket_address"]["port_value"]] = group.get("priority", 0)
    assert found == {1: 0, 2: 1, 19080: 2, 19081: 2, 3: 3}


def test_labels_of_places_are_known_without_being_said():
    balancer = "{localityLbSetting: {failoverPriority: [topology.kubernetes.io/region, topology.kubernetes.io/zone]}}"
    rule = istio("DestinationRule", "r", f"{{host: reviews, trafficPolicy: {{loadBalancer: {balancer}, outlierDetection: {{interval: 1s}}}}}}")
    groups = endpoints(view_of(rule), REVIEWS)["endpoints"]
    assert [(group["locality"]["zone"], group.get("priority", 0)) for group in groups] == [("b", 0), ("a", 1)]
    wrong = istio("DestinationRule", "r", "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {failoverPriority: ['=a']}}}}")
    assert complaints(wrong) == ["spec.trafficPolicy.loadBalancer.localityLbSetting.failoverPriority[0]: '=a' is neither a label nor label=value"]
