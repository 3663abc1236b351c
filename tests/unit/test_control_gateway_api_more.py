"""Of the Gateway API: TLSRoute, TCPRoute, grants for backends, BackendTLSPolicy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from control.model.service import Locality
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ORDER
from control.translate.translator import Translator
from meshproxy.api import support
from tests.differential.pki import Authority
from tests.unit.control_help import MESH, WEB, cluster, endpoints, istio, listener, routes, snapshot, view_of
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
    return api("HTTPRoute", "r", f"{{parentRefs: [{{name: g}}], rules: [{{backendRefs: {backends}}}]}}")


def grant(kind: str = "HTTPRoute", namespace: str = "default", to: str = "{group: '', kind: Service}") -> str:
    origin = f"{{group: gateway.networking.k8s.io, kind: {kind}, namespace: {namespace}}}"
    return api("ReferenceGrant", "x", f"{{from: [{origin}], to: [{to}]}}", "shop")


SHOP = "{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop}, spec: {ports: [{name: http, port: 80}]}}"
THERE = f"{SHOP}\n---\n{api_gateway('[{name: a, port: 80, protocol: HTTP}]')}"


def test_a_backend_of_another_namespace_needs_a_grant():
    (route,) = routes(view(THERE, to_shop(), grant()), "http.80")
    assert route["route"]["cluster"] == "outbound|80||api.shop.svc.cluster.local"
    for denied in (grant("GRPCRoute"), grant(namespace="other"), grant(to="{group: '', kind: Service, name: other}"), grant(to="{group: '', kind: Secret}")):
        (route,) = routes(view(THERE, to_shop(), denied), "http.80")
        assert (route["route"]["cluster"], route["route"]["cluster_not_found_response_code"]) == ("UnknownService", "INTERNAL_SERVER_ERROR")


def test_without_a_grant_the_other_backends_keep_their_shares():
    (route,) = routes(view(THERE, to_shop(", weight: 3")), "http.80")
    assert [(one["name"], one["weight"]) for one in route["route"]["weighted_clusters"]["clusters"]] == [("UnknownService", 3), (REVIEWS, 1)]


def test_callers_in_the_mesh_need_no_grant():
    """They may call the backend anyway."""
    of_mesh = view_of(SHOP, to_shop().replace("name: g", "group: '', kind: Service, name: reviews"))
    assert routes(of_mesh)[0]["route"]["cluster"] == "outbound|80||api.shop.svc.cluster.local"


def test_retries_that_are_asked_for_are_those_of_tries_that_take_too_long():
    def action(rule: str):
        parent = "{group: '', kind: Service, name: reviews}"
        text = api("HTTPRoute", "r", f"{{parentRefs: [{parent}], rules: [{{{rule}, backendRefs: [{{name: reviews, port: 9080}}]}}]}}")
        (route,) = routes(view_of(text))
        return route["route"]

    made = action("retry: {attempts: 3}, timeouts: {backendRequest: 200ms}")
    assert (made["timeout"], made["retry_policy"]["num_retries"], made["retry_policy"]["per_try_timeout"]) == ("0s", 3, "0.200s")
    assert "reset" in made["retry_policy"]["retry_on"].split(",")
    made = action("retry: {attempts: 3}, timeouts: {backendRequest: 200ms, request: 400ms}")
    assert (made["timeout"], made["retry_policy"]["per_try_timeout"]) == ("0.400s", "0.200s")
    made = action("timeouts: {backendRequest: 200ms}")
    assert (made["timeout"], made["retry_policy"]["per_try_timeout"]) == ("0.200s", "0.200s")
    assert "reset" not in made["retry_policy"]["retry_on"].split(",")


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


def test_what_is_spoken_within_is_for_the_service_to_say(ca):
    """A port's name says little about what is within TLS: gRPC goes to one that only speaks HTTP/2."""
    http = "outbound|443||api.default.svc.cluster.local"

    def version(port: str) -> list[str]:
        service = f"{{apiVersion: v1, kind: Service, metadata: {{name: api}}, spec: {{ports: [{{port: 443, {port}}}]}}}}"
        made = cluster(view_of(service, policy(FROM_MAP, "{group: '', kind: Service, name: api}"), config_map(ca)), http)
        (options,) = made["typed_extension_protocol_options"].values()
        return [key for key in options if key.endswith("_config")] + list(options.get("explicit_http_config", {}))

    assert version("name: btls") == version("name: http") == ["auto_config"]
    assert version("appProtocol: grpc") == ["explicit_http_config", "http2_protocol_options"]


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


def test_zones_are_left_to_the_proxy_and_regions_fail_over():
    def found(balancer: str) -> tuple[dict, dict[str, int]]:
        rule = istio("DestinationRule", "r", f"{{host: reviews, trafficPolicy: {{loadBalancer: {{zoneAwareLbSetting: {balancer}}}}}}}")
        far = [
            f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: {region}, labels: {{app: reviews}}}}, spec: {{locality: {region}/a}}}}"
            for region in ("asia", "us")
        ]
        view = view_of(rule, *far)
        groups = endpoints(view, REVIEWS)["endpoints"]
        where = {f"{one['locality']['region']}/{one['locality']['zone']}": one.get("priority", 0) for one in groups}
        return cluster(view, REVIEWS)["common_lb_config"]["zone_aware_lb_config"], where

    assert found("{}") == ({}, {"eu/a": 0, "eu/b": 0, "asia/a": 1, "us/a": 1})
    assert found("{minClusterSize: 3, failover: [{from: eu, to: us}]}") == ({"min_cluster_size": "3"}, {"eu/a": 0, "eu/b": 0, "us/a": 1, "asia/a": 2})
    assert found("{enabled: false}") == ({"routing_enabled": {}}, dict.fromkeys(("asia/a", "eu/a", "eu/b", "us/a"), 0))
    head = "{host: a, trafficPolicy: {loadBalancer: {%s}}}"
    path = "spec.trafficPolicy.loadBalancer"
    zone = "topology.kubernetes.io/zone"
    for text, complaint in (
        ("zoneAwareLbSetting: {}, localityLbSetting: {}", f"{path}.zoneAwareLbSetting: there is 'localityLbSetting' already"),
        ("zoneAwareLbSetting: {failover: [{from: eu, to: eu/a}]}", f"{path}.zoneAwareLbSetting.failover[0]: two regions are needed"),
        (f"zoneAwareLbSetting: {{failoverPriority: [{zone}]}}", f"{path}.zoneAwareLbSetting.failoverPriority[0]: {zone} is what zone"),
    ):
        said = complaints(istio("DestinationRule", "r", head % text))
        assert any(one.startswith(complaint) for one in said), said


def test_proxies_that_say_where_they_are_learn_who_is_beside_them():
    service = "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8000}]}}"
    others = [
        f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: w{index}, labels: {{app: web}}}}, spec: {{locality: {where}}}}}"
        for index, where in enumerate(("eu/a", "us/b"))
    ]
    told = view_of(service, *others, proxy=replace(WEB, locality=Locality("eu", "b")))
    groups = endpoints(told, "local_cluster")["endpoints"]
    assert [(one["locality"], one.get("priority", 0)) for one in groups] == [({"region": "eu", "zone": "a"}, 0), ({"region": "eu", "zone": "b"}, 0)]
    assert "local_cluster" not in [one.name for one in view_of(service, *others).all(ENDPOINTS)]


def near(word: str, *texts: str, caller: str = "caller") -> dict[int, int]:
    """Priorities of the endpoints of `near`, by their ports, for a caller on n1 in eu/b; each endpoint is in a place, the first on the same machine."""
    places = {1: ("n1", "eu/b"), 2: ("n2", "eu/b"), 3: ("n3", "eu/a"), 4: ("n4", "us/b")}
    made = [word]
    for node, place in {*places.values()}:
        region, _, zone = place.partition("/")
        labels = f"{{topology.kubernetes.io/region: {region}, topology.kubernetes.io/zone: {zone}}}"
        made.append(f"{{apiVersion: v1, kind: Node, metadata: {{name: {node}, labels: {labels}}}}}")
    ready = "conditions: [{type: Ready, status: 'True'}]"
    for name, labels, node, ip in [("caller", "{app: caller}", "n1", 9), *((f"p{one}", "{app: near}", places[one][0], one) for one in places)]:
        spec = f"{{nodeName: {node}, containers: [{{name: c, ports: [{{name: http, containerPort: {8000 + ip}}}]}}]}}"
        status = f"{{podIP: 10.0.0.{ip}, phase: Running, {ready}}}"
        made.append(f"{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {labels}}}, spec: {spec}, status: {status}}}")
    found = {}
    told = view_of(*made, *texts, proxy=ProxyKey("sidecar", caller, "default"))
    for group in endpoints(told, "outbound|80||near.default.svc.cluster.local").get("endpoints", ()):
        for one in group["lb_endpoints"]:
            found[int(one["endpoint"]["address"]["socket_address"]["address"].rpartition(".")[2])] = group.get("priority", 0)
    return found


def test_services_say_how_near_their_endpoints_should_be():
    def service(spec: str, annotations: str = "{}") -> str:
        ports = "ports: [{name: http, port: 80, targetPort: http}]"
        return f"{{apiVersion: v1, kind: Service, metadata: {{name: near, annotations: {annotations}}}, spec: {{selector: {{app: near}}, {ports}{spec}}}}}"

    assert near(service("")) == dict.fromkeys((1, 2, 3, 4), 0)
    zones = {1: 0, 2: 0, 3: 1, 4: 2}
    assert near(service(", trafficDistribution: PreferClose")) == zones
    assert near(service("", "{networking.istio.io/traffic-distribution: PreferSameZone}")) == zones
    assert near(service(", trafficDistribution: PreferSameNode")) == {1: 0, 2: 1, 3: 2, 4: 3}
    assert near(service(", internalTrafficPolicy: Cluster")) == dict.fromkeys((1, 2, 3, 4), 0)
    local = service(", internalTrafficPolicy: Local")
    assert near(local) == {1: 0}
    assert near(local, caller="p3") == {3: 0}
    assert near(local, caller="nobody") == {}  # nobody knows where it is, and it is on no machine that has an endpoint
    off = istio("DestinationRule", "near", "{host: near, trafficPolicy: {loadBalancer: {localityLbSetting: {enabled: false}}}}")
    assert near(service(", trafficDistribution: PreferClose"), off) == dict.fromkeys((1, 2, 3, 4), 0)


def test_labels_of_places_are_known_without_being_said():
    balancer = "{localityLbSetting: {failoverPriority: [topology.kubernetes.io/region, topology.kubernetes.io/zone]}}"
    rule = istio("DestinationRule", "r", f"{{host: reviews, trafficPolicy: {{loadBalancer: {balancer}, outlierDetection: {{interval: 1s}}}}}}")
    groups = endpoints(view_of(rule), REVIEWS)["endpoints"]
    assert [(group["locality"]["zone"], group.get("priority", 0)) for group in groups] == [("b", 0), ("a", 1)]
    balancer = "{localityLbSetting: {failoverPriority: [version=v1], failover: [{from: eu, to: us}]}}"  # the nearest of those that are equally like the caller
    rule = istio("DestinationRule", "r", f"{{host: reviews, trafficPolicy: {{loadBalancer: {balancer}, outlierDetection: {{interval: 1s}}}}}}")
    far = [
        f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: {region}, labels: {{app: reviews, version: v2}}}}, spec: {{locality: {region}}}}}"
        for region in ("us", "asia")
    ]
    groups = endpoints(view_of(rule, *far), REVIEWS)["endpoints"]
    assert [(group["locality"]["region"], group.get("priority", 0)) for group in groups] == [("eu", 0), ("eu", 1), ("us", 2), ("asia", 3)]
    wrong = istio("DestinationRule", "r", "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {failoverPriority: ['=a']}}}}")
    assert complaints(wrong) == ["spec.trafficPolicy.loadBalancer.localityLbSetting.failoverPriority[0]: '=a' is neither a label nor label=value"]
