"""Routes of the Gateway API with services as parents, and gateways of both APIs."""

from __future__ import annotations

import json

import pytest
import yaml

from control.translate.proxy import ProxyKey
from control.translate.resource import LISTENER, ROUTES
from tests.unit.control_help import plain, routes, view_of
from tests.unit.test_control_kinds import complaints

V1 = "{apiVersion: v1, kind: Service, metadata: {name: reviews-v1}, spec: {ports: [{name: http, port: 9080}]}}"
PARENT = '{group: "", kind: Service, name: reviews}'


def route(spec: str, kind: str = "HTTPRoute", namespace: str = "default", name: str = "r") -> str:
    return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"


def rules(text: str, kind: str = "HTTPRoute") -> str:
    return route(f"{{parentRefs: [{PARENT}], rules: {json.dumps(yaml.safe_load(text))}}}", kind)


def made(text: str, kind: str = "HTTPRoute"):
    return routes(view_of(V1, rules(text, kind)))


TO_V1 = "backendRefs: [{name: reviews-v1, port: 9080}]"


def test_backends_by_weight():
    (one,) = made("[{backendRefs: [{name: reviews-v1, port: 9080, weight: 3}, {name: reviews, port: 9080}]}]")
    assert [(item["name"], item["weight"]) for item in one["route"]["weighted_clusters"]["clusters"]] == [
        ("outbound|9080||reviews-v1.default.svc.cluster.local", 3),
        ("outbound|9080||reviews.default.svc.cluster.local", 1),
    ]
    assert one["route"]["cluster_not_found_response_code"] == "INTERNAL_SERVER_ERROR"


@pytest.mark.parametrize("text", ["[{}]", "[{backendRefs: [{name: reviews-v1, port: 9080, weight: 0}]}]", "[]"])
def test_without_backends_it_is_500(text):
    (one,) = made(text)
    assert one["direct_response"] == {"status": 500}


def test_the_most_exact_match_counts_first_across_documents():
    first = route(f"{{parentRefs: [{PARENT}], rules: [{{matches: [{{path: {{value: /a}}}}], {TO_V1}}}, {{{TO_V1}}}]}}", name="a")
    second = route(
        f"{{parentRefs: [{PARENT}], rules: [{{matches: [{{path: {{value: /a/b}}}}, {{path: {{type: Exact, value: /a}}}},"
        f" {{path: {{value: /a}}, method: GET}}], {TO_V1}}}]}}",
        name="b",
    )
    found = [one["match"] for one in routes(view_of(V1, first, second))]
    assert [match.get("path") or match.get("path_separated_prefix") or match["prefix"] for match in found] == ["/a", "/a/b", "/a", "/a", "/"]
    assert "headers" in found[2]


def test_matches_filters_and_timeouts():
    (one,) = made(f"""
    - matches:
      - path: {{type: RegularExpression, value: "/x[0-9]+"}}
        headers: [{{name: h, value: v}}, {{name: g, type: RegularExpression, value: "a.*"}}]
        queryParams: [{{name: q, value: "1"}}]
      filters:
      - {{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: a, value: b}}], remove: [c]}}}}
      - {{type: ResponseHeaderModifier, responseHeaderModifier: {{add: [{{name: d, value: e}}]}}}}
      - {{type: RequestMirror, requestMirror: {{backendRef: {{name: reviews, port: 9080}}, fraction: {{numerator: 1, denominator: 4}}}}}}
      timeouts: {{request: 10s, backendRequest: 2s}}
      retry: {{attempts: 5, codes: [500, 503], backoff: 100ms}}
      {TO_V1}
    """)
    assert one["match"]["safe_regex"] == {"regex": "/x[0-9]+"}
    assert [header["name"] for header in one["match"]["headers"]] == ["g", "h"]
    assert one["request_headers_to_remove"] == ["c"]
    action = one["route"]
    assert action["timeout"] == "10s"
    assert action["retry_policy"]["per_try_timeout"] == "2s"
    assert (action["retry_policy"]["num_retries"], action["retry_policy"]["retriable_status_codes"]) == (5, [500, 503])
    assert action["request_mirror_policies"][0]["runtime_fraction"]["default_value"]["numerator"] == 250_000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("{type: ReplacePrefixMatch, replacePrefixMatch: /new}", {"prefix_rewrite": "/new"}),
        ("{type: ReplacePrefixMatch, replacePrefixMatch: /}", {"regex_rewrite": {"pattern": {"regex": "^/old(/?)(.*)"}, "substitution": r"/\2"}}),
        ("{type: ReplaceFullPath, replaceFullPath: /all}", {"regex_rewrite": {"pattern": {"regex": "/.*"}, "substitution": "/all"}}),
    ],
)
def test_rewrites(change, expected):
    (one,) = made(f"[{{matches: [{{path: {{value: /old}}}}], filters: [{{type: URLRewrite, urlRewrite: {{hostname: h, path: {change}}}}}], {TO_V1}}}]")
    assert {name: one["route"][name] for name in expected} == expected
    assert one["route"]["host_rewrite_literal"] == "h"


def test_redirects():
    change = "{scheme: https, hostname: h, statusCode: 307, path: {type: ReplaceFullPath, replaceFullPath: /x}}"
    (one,) = made(f"[{{filters: [{{type: RequestRedirect, requestRedirect: {change}}}]}}]")
    assert one["redirect"] == {"host_redirect": "h", "scheme_redirect": "https", "path_redirect": "/x", "response_code": "TEMPORARY_REDIRECT"}


def test_grpc_methods():
    found = made(f"[{{matches: [{{method: {{service: a.B, method: C}}}}, {{method: {{service: a.B}}}}, {{method: {{method: C}}}}], {TO_V1}}}]", "GRPCRoute")
    assert [one["match"] for one in found] == [{"path": "/a.B/C"}, {"prefix": "/a.B/"}, {"safe_regex": {"regex": "/[^/]+/C"}}]


def test_a_parents_port():
    other = route(f'{{parentRefs: [{{group: "", kind: Service, name: reviews, port: 1}}], rules: [{{{TO_V1}}}]}}')
    assert routes(view_of(V1, other))[0]["name"] == "default"


def test_routes_of_callers_own_namespace_are_for_them_alone():
    theirs = route(
        '{parentRefs: [{group: "", kind: Service, name: reviews, namespace: default}], rules: [{backendRefs: [{name: mine, port: 80}]}]}', namespace="shop"
    )
    view = view_of(V1, theirs, rules(f"[{{{TO_V1}}}]"))
    assert routes(view)[0]["route"]["cluster"] == "outbound|9080||reviews-v1.default.svc.cluster.local"
    sidecar = (
        "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: w, namespace: shop},"
        " spec: {sidecar: {outbound: [{host: reviews.default.svc.cluster.local, port: 9080, listen: 5}]}}}"
    )
    view = view_of(V1, theirs, rules(f"[{{{TO_V1}}}]"), sidecar, proxy=ProxyKey("sidecar", "w", "shop"))
    assert routes(view)[0]["route"]["cluster"] == "outbound|80||mine.shop.svc.cluster.local"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (route("{rules: []}"), "spec.parentRefs: is needed"),
        (route("{parentRefs: [{kind: Mesh, group: x, name: a}]}"), "spec.parentRefs[0].kind: Mesh of x is no parent that meshctl serves"),
        (rules("[{filters: [{type: CORS}]}]"), "spec.rules[0].filters[0].cors: is needed"),
        (rules("[{matches: [{path: {value: a}}]}]"), "spec.rules[0].matches[0].path.value: 'a' must start with a slash"),
        (rules("[{retry: {codes: [200, x]}}]"), "spec.rules[0].retry.codes[1]: must be a whole number"),
    ],
)
def test_mistakes(text, complaint):
    found = complaints(text)
    assert any(one.startswith(complaint) for one in found), found


# --- gateways

EDGE = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}"
EDGE_KEY = ProxyKey("sidecar", "edge", "default")


def gateway(servers: str, name: str = "g") -> str:
    return f"{{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {{name: {name}}}, spec: {{selector: {{istio: edge}}, servers: {servers}}}}}"


def virtual_service(hosts: str, gateways: str = "[g]", name: str = "v", http: str = "[{route: [{destination: {host: reviews}}]}]") -> str:
    spec = f"{{hosts: {hosts}, gateways: {gateways}, http: {http}}}"
    return f"{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: {name}}}, spec: {spec}}}"


def hosts_of(*texts: str, port: int = 8080):
    view = view_of(EDGE, *texts, proxy=EDGE_KEY)
    return {host["domains"][0]: len(host["routes"]) for host in plain(view, ROUTES, f"http.{port}").get("virtual_hosts", ())}


def http_gateway(hosts: str) -> str:
    return gateway(f"[{{port: {{number: 8080, name: http, protocol: HTTP}}, hosts: {hosts}}}]")


def test_a_gateway_serves_what_both_it_and_its_rules_name():
    one = http_gateway('[shop.example.com, "*.wild.example.com"]')
    assert hosts_of(one, virtual_service('["*"]')) == {"shop.example.com": 1, "*.wild.example.com": 1}
    assert hosts_of(one, virtual_service("[a.wild.example.com, elsewhere.com]")) == {"a.wild.example.com": 1}
    assert hosts_of(one, virtual_service('["*"]', "[other]")) == {}
    assert hosts_of(http_gateway("[other/*]"), virtual_service('["*"]')) == {}


def test_rules_of_one_host_come_one_after_another():
    two = [
        virtual_service("[a.com]", name=name, http=f"[{{match: [{{uri: {{prefix: /{name}}}}}], route: [{{destination: {{host: reviews}}}}]}}]") for name in "ab"
    ]
    assert hosts_of(http_gateway('["*"]'), *two) == {"a.com": 2}


def test_a_gateway_does_not_believe_what_clients_say_of_their_addresses():
    view = view_of(EDGE, http_gateway('["*"]'), proxy=EDGE_KEY)
    manager = plain(view, LISTENER, "0.0.0.0_8080")["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["use_remote_address"] is True
    assert manager["rds"]["route_config_name"] == "http.8080"


def test_rules_for_a_gateway_are_not_for_sidecars():
    assert routes(view_of(http_gateway('["*"]'), virtual_service("[reviews]")))[0]["name"] == "default"
    assert routes(view_of(virtual_service("[reviews]", "[g, mesh]")))[0].get("name") is None
