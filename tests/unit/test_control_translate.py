"""Documents to xDS resources: names and values are those of Istio's own translation."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from control.kinds.store import Store
from control.translate.proxy import ProxyKey, of_node
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ORDER, ROUTES
from control.translate.translator import Translator
from meshproxy.api import convert, messages, support
from tests.unit.control_help import GRPC_CLIENT, MESH, WEB, cluster, endpoints, istio, listener, plain, routes, snapshot, view_of

REVIEWS = "outbound|9080||reviews.default.svc.cluster.local"
REVIEWS_V1 = "outbound|9080|v1|reviews.default.svc.cluster.local"
SUBSETS = istio("DestinationRule", "reviews", "{host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}")


def virtual_service(rules: str) -> str:
    return istio("VirtualService", "reviews", f"hosts: [reviews]\nhttp:\n{rules}")


def rule(policy: str, subsets: str = "[]") -> str:
    return istio("DestinationRule", "reviews", f"{{host: reviews, trafficPolicy: {policy}, subsets: {subsets}}}")


# --- clusters


def test_a_cluster_without_rules():
    made = cluster(view_of(), REVIEWS)
    assert made["type"] == "EDS"
    assert made["eds_cluster_config"]["service_name"] == REVIEWS
    assert made["connect_timeout"] == "10s"
    assert made["lb_policy"] == "LEAST_REQUEST"
    assert made["circuit_breakers"]["thresholds"] == [
        {"max_connections": 2**32 - 1, "max_pending_requests": 2**32 - 1, "max_requests": 2**32 - 1, "max_retries": 2**32 - 1, "track_remaining": True}
    ]
    assert "typed_extension_protocol_options" not in made


def test_subsets_have_clusters_and_endpoints_of_their_own():
    view = view_of(SUBSETS)
    assert {one.name for one in view.all(CLUSTER)} >= {REVIEWS, REVIEWS_V1}
    (group,) = endpoints(view, REVIEWS_V1)["endpoints"]
    assert [one["endpoint"]["address"]["socket_address"]["port_value"] for one in group["lb_endpoints"]] == [19080]
    assert group["locality"] == {"region": "eu", "zone": "a"}
    assert cluster(view, REVIEWS_V1)["metadata"]["filter_metadata"]["istio"]["subset"] == "v1"


def test_connection_pool():
    made = cluster(
        view_of(
            rule(
                "{connectionPool: {tcp: {maxConnections: 10, connectTimeout: 30ms, tcpKeepalive: {time: 7200s, interval: 75s}}, "
                "http: {http1MaxPendingRequests: 2, http2MaxRequests: 3, maxRequestsPerConnection: 4, maxRetries: 5, idleTimeout: 15s}}}"
            )
        ),
        REVIEWS,
    )
    limits = made["circuit_breakers"]["thresholds"][0]
    assert [limits[name] for name in ("max_connections", "max_pending_requests", "max_requests", "max_retries")] == [10, 2, 3, 5]
    assert made["connect_timeout"] == "0.030s"
    assert made["upstream_connection_options"] == {"tcp_keepalive": {"keepalive_time": 7200, "keepalive_interval": 75}}
    (options,) = made["typed_extension_protocol_options"].values()
    assert options["common_http_protocol_options"] == {"idle_timeout": "15s", "max_requests_per_connection": 4}
    assert "http_protocol_options" in options["explicit_http_config"]


def test_http2_where_the_port_or_the_pool_says_so():
    (options,) = cluster(view_of(rule("{connectionPool: {http: {h2UpgradePolicy: UPGRADE}}}")), REVIEWS)["typed_extension_protocol_options"].values()
    assert "http2_protocol_options" in options["explicit_http_config"]
    grpc = "{apiVersion: v1, kind: Service, metadata: {name: g}, spec: {ports: [{name: grpc, port: 50051}]}}"
    (options,) = cluster(view_of(grpc), "outbound|50051||g.default.svc.cluster.local")["typed_extension_protocol_options"].values()
    assert "http2_protocol_options" in options["explicit_http_config"]


def test_the_version_of_http_by_which_requests_came():
    pool = "{connectionPool: {http: {useClientProtocol: true, h2UpgradePolicy: UPGRADE, maxConcurrentStreams: 7}, tcp: {idleTimeout: 9s}}}"
    (options,) = cluster(view_of(rule(pool)), REVIEWS)["typed_extension_protocol_options"].values()
    assert options["use_downstream_protocol_config"] == {"http_protocol_options": {}, "http2_protocol_options": {"max_concurrent_streams": 7}}
    assert options["common_http_protocol_options"] == {"idle_timeout": "9s"}
    assert "explicit_http_config" not in options


def test_endpoints_are_told_who_calls():
    wrapper = cluster(view_of(rule("{proxyProtocol: {version: V2}}")), REVIEWS)["transport_socket"]
    assert wrapper["name"] == "envoy.transport_sockets.upstream_proxy_protocol"
    assert wrapper["typed_config"]["config"] == {"version": "V2"}
    assert wrapper["typed_config"]["transport_socket"]["typed_config"]["@type"].endswith(".RawBuffer")
    wrapper = cluster(view_of(rule("{proxyProtocol: {}, tls: {mode: SIMPLE}}")), REVIEWS)["transport_socket"]["typed_config"]
    assert wrapper["transport_socket"]["typed_config"]["@type"].endswith(".UpstreamTlsContext")
    mesh = MESH.replace("    inbound: [{port: 8000", "    identity: true\n    inbound: [{port: 8000")
    matches = cluster(Translator().view(WEB, snapshot(mesh, rule("{proxyProtocol: {}}"))), REVIEWS)["transport_socket_matches"]
    assert [one["transport_socket"]["typed_config"]["@type"].rpartition(".")[2] for one in matches] == ["ProxyProtocolUpstreamTransport"] * 2


def test_outlier_detection():
    made = cluster(
        view_of(
            rule("{outlierDetection: {consecutive5xxErrors: 7, consecutiveGatewayErrors: 0, interval: 5m, baseEjectionTime: 15m, maxEjectionPercent: 100}}")
        ),
        REVIEWS,
    )
    assert made["outlier_detection"] == {
        "enforcing_success_rate": 0,
        "consecutive_5xx": 7,
        "enforcing_consecutive_5xx": 100,
        "consecutive_gateway_failure": 0,
        "enforcing_consecutive_gateway_failure": 0,
        "interval": "300s",
        "base_ejection_time": "900s",
        "max_ejection_percent": 100,
    }
    assert made["common_lb_config"]["healthy_panic_threshold"] == {}


@pytest.mark.parametrize(
    ("balancer", "policy", "extra"),
    [
        ("{simple: ROUND_ROBIN}", None, {}),  # Envoy's default has no value on the wire
        ("{simple: RANDOM}", "RANDOM", {}),
        ("{simple: LEAST_CONN}", "LEAST_REQUEST", {}),
        ("{consistentHash: {httpHeaderName: x}}", "RING_HASH", {"ring_hash_lb_config": {"minimum_ring_size": "1024"}}),
        ("{consistentHash: {useSourceIp: true, maglev: {tableSize: 101}}}", "MAGLEV", {"maglev_lb_config": {"table_size": "101"}}),
        (
            "{simple: ROUND_ROBIN, warmup: {duration: 60s}}",
            None,
            {"round_robin_lb_config": {"slow_start_config": {"slow_start_window": "60s"}}},
        ),
    ],
)
def test_load_balancers(balancer, policy, extra):
    made = cluster(view_of(rule(f"{{loadBalancer: {balancer}}}")), REVIEWS)
    assert made.get("lb_policy") == policy
    assert {name: made[name] for name in extra} == extra


def test_a_subset_inherits_what_it_leaves_open_and_a_port_replaces_all():
    policy = (
        "{loadBalancer: {simple: RANDOM}, connectionPool: {tcp: {maxConnections: 1}},"
        " portLevelSettings: [{port: {number: 9080}, loadBalancer: {simple: ROUND_ROBIN}}]}"
    )
    made = cluster(view_of(rule(policy)), REVIEWS)
    assert "lb_policy" not in made
    assert made["circuit_breakers"]["thresholds"][0]["max_connections"] == 2**32 - 1
    subsets = "[{name: v1, labels: {version: v1}, trafficPolicy: {connectionPool: {tcp: {maxConnections: 2}}}}]"
    made = cluster(view_of(rule("{loadBalancer: {simple: RANDOM}, connectionPool: {tcp: {maxConnections: 1}}}", subsets)), REVIEWS_V1)
    assert made["lb_policy"] == "RANDOM"
    assert made["circuit_breakers"]["thresholds"][0]["max_connections"] == 2


def test_services_outside_by_dns_with_tls_begun_by_the_proxy():
    text = (
        istio("ServiceEntry", "outside", "{hosts: [api.example.com], resolution: DNS, ports: [{number: 443, name: https, protocol: HTTP, targetPort: 8443}]}")
        + "---\n"
        + istio("DestinationRule", "outside", "{host: api.example.com, trafficPolicy: {tls: {mode: SIMPLE}}}")
    )
    made = cluster(view_of(text), "outbound|443||api.example.com")
    assert made["type"] == "STRICT_DNS"
    assert made["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"] == {
        "address": "api.example.com",
        "port_value": 8443,
    }
    assert made["transport_socket"]["typed_config"]["auto_host_sni"] is True
    assert view_of(text).get(ENDPOINTS, "outbound|443||api.example.com") is None


# --- endpoints


def test_nearest_first_where_outlier_detection_finds_what_fails():
    groups = endpoints(view_of(rule("{outlierDetection: {consecutive5xxErrors: 1}}")), REVIEWS)["endpoints"]
    assert [(group["locality"]["zone"], group.get("priority", 0)) for group in groups] == [("b", 0), ("a", 1)]
    groups = endpoints(view_of(), REVIEWS)["endpoints"]
    assert [(group["locality"]["zone"], group.get("priority", 0)) for group in groups] == [("a", 0), ("b", 0)]


def test_distribution_by_locality():
    policy = "{loadBalancer: {localityLbSetting: {distribute: [{from: eu/b/*, to: {'eu/a/*': 80, 'eu/b/*': 20}}]}}}"
    view = view_of(rule(policy))
    groups = endpoints(view, REVIEWS)["endpoints"]
    assert [(group["locality"]["zone"], group["load_balancing_weight"]) for group in groups] == [("a", 80), ("b", 20)]
    assert "locality_weighted_lb_config" in cluster(view, REVIEWS)["common_lb_config"]


# --- routes


def test_the_default_route():
    (route,) = routes(view_of())
    assert route["name"] == "default"
    assert route["match"] == {"prefix": "/"}
    action = route["route"]
    assert action["cluster"] == REVIEWS
    assert action["timeout"] == "0s"
    assert action["retry_policy"]["retry_on"] == "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
    assert action["retry_policy"]["num_retries"] == 2
    assert action["retry_policy"]["host_selection_retry_max_attempts"] == "5"
    assert action["retry_policy"]["retry_host_predicate"][0]["name"] == "envoy.retry_host_predicates.previous_hosts"


def test_a_clients_deadline_counts_where_there_is_grpc():
    grpc = "{apiVersion: v1, kind: Service, metadata: {name: g}, spec: {ports: [{name: grpc, port: 50051}, {name: http, port: 80}]}}"
    sidecar = "{outbound: [{host: g, port: 50051, listen: 1}, {host: g, port: 80, listen: 2}], inbound: [{port: 50051, listen: 3}, {port: 80, listen: 4}]}"
    caller = f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: c}}, spec: {{ports: {{grpc: 50051, http: 80}}, sidecar: {sidecar}}}}}"
    key = ProxyKey("sidecar", "c", "default")
    view = view_of(grpc, caller, proxy=key)
    limits = {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"}
    assert routes(view, "g.default.svc.cluster.local:50051")[0]["route"]["max_stream_duration"] == limits
    assert "max_stream_duration" not in routes(view, "g.default.svc.cluster.local:80")[0]["route"]
    inbound = {port: listener(view, f"127.0.0.1_{port}")["filter_chains"][0]["filters"][-1]["typed_config"]["route_config"] for port in (3, 4)}
    found = {port: one["virtual_hosts"][0]["routes"][0]["route"].get("max_stream_duration") for port, one in inbound.items()}
    assert found == {3: limits, 4: None}
    rule = istio("VirtualService", "g", "{hosts: [g], http: [{timeout: 3s, route: [{destination: {host: g}}]}]}")
    (route,) = routes(view_of(grpc, caller, rule, proxy=key), "g.default.svc.cluster.local:50051")
    assert route["route"]["timeout"] == "3s"
    assert "max_stream_duration" not in route["route"]


def test_timeouts_retries_weights_and_headers():
    (route,) = routes(
        view_of(
            SUBSETS,
            virtual_service("""
            - timeout: 2s
              retries: {attempts: 3, perTryTimeout: 500ms, retryOn: "5xx,503", backoff: 100ms}
              headers: {request: {set: {x-a: b, host: other}, add: {x-b: c}}, response: {remove: [x-c]}}
              route:
              - {destination: {host: reviews, subset: v1}, weight: 90, headers: {response: {set: {x-v: "1"}}}}
              - {destination: {host: reviews, subset: v2}, weight: 10}
            """),
        )
    )
    action = route["route"]
    assert action["timeout"] == "2s"
    assert "max_stream_duration" not in action  # it would take the place of `timeout`
    retry = action["retry_policy"]
    assert (retry["retry_on"], retry["num_retries"], retry["per_try_timeout"], retry["retriable_status_codes"]) == (
        "5xx,retriable-status-codes",
        3,
        "0.500s",
        [503],
    )
    assert retry["retry_back_off"] == {"base_interval": "0.100s"}
    first, second = action["weighted_clusters"]["clusters"]
    assert (first["name"], first["weight"], second["weight"]) == (REVIEWS_V1, 90, 10)
    assert first["response_headers_to_add"][0]["header"] == {"key": "x-v", "value": "1"}
    assert action["host_rewrite_literal"] == "other"
    assert [(one["header"]["key"], one.get("append_action")) for one in route["request_headers_to_add"]] == [
        ("x-a", "OVERWRITE_IF_EXISTS_OR_ADD"),
        ("x-b", None),  # appending is Envoy's default
    ]
    assert route["response_headers_to_remove"] == ["x-c"]


def test_fault_mirror_and_cors():
    (route,) = routes(
        view_of(
            virtual_service("""
            - fault:
                delay: {fixedDelay: 7s, percentage: {value: 0.1}}
                abort: {httpStatus: 500}
              mirror: {host: reviews, subset: v2}
              mirrorPercentage: {value: 25}
              corsPolicy: {allowOrigins: [{prefix: "https://"}], allowMethods: [GET, POST], maxAge: 24h, allowCredentials: true}
              route: [{destination: {host: reviews}}]
            """)
        )
    )
    fault = route["typed_per_filter_config"]["envoy.filters.http.fault"]
    assert fault["delay"] == {"fixed_delay": "7s", "percentage": {"numerator": 1000, "denominator": "MILLION"}}
    assert fault["abort"] == {"http_status": 500, "percentage": {"denominator": "MILLION"}}  # no percentage: nothing is aborted
    (mirror,) = route["route"]["request_mirror_policies"]
    assert mirror["cluster"] == "outbound|9080|v2|reviews.default.svc.cluster.local"
    assert mirror["runtime_fraction"]["default_value"] == {"numerator": 250000, "denominator": "MILLION"}
    cors = route["typed_per_filter_config"]["envoy.filters.http.cors"]
    assert (cors["allow_methods"], cors["max_age"], cors["allow_credentials"]) == ("GET,POST", "86400", True)


def test_matches():
    made = routes(
        view_of(
            virtual_service("""
            - name: r
              match:
              - name: m
                uri: {prefix: /a}
                ignoreUriCase: true
                method: {exact: GET}
                headers: {end-user: {exact: jason}, any: {}}
                withoutHeaders: {x-no: {regex: "a.*"}}
                queryParams: {q: {exact: "1"}}
              - uri: {regex: "/b/[0-9]+"}
              - port: 1
              redirect: {uri: /new, authority: elsewhere, redirectCode: 302}
            - match: [{uri: {exact: /c}}]
              directResponse: {status: 418, body: {string: tea}}
            - rewrite: {uri: /, authority: inner}
              route: [{destination: {host: reviews}}]
            - match: [{uri: {exact: /never}}]
              route: [{destination: {host: reviews}}]
            """)
        )
    )
    first, second, third, fourth = made
    assert first["name"] == "r.m"
    assert first["match"] == {
        "prefix": "/a",
        "case_sensitive": False,
        "headers": [
            {"name": "any", "present_match": True},
            {"name": "end-user", "string_match": {"exact": "jason"}},
            {"name": "x-no", "string_match": {"safe_regex": {"regex": "a.*"}}, "invert_match": True, "treat_missing_header_as_empty": True},
            {"name": ":method", "string_match": {"exact": "GET"}},
        ],
        "query_parameters": [{"name": "q", "string_match": {"exact": "1"}}],
    }
    assert first["redirect"] == {"path_redirect": "/new", "host_redirect": "elsewhere", "response_code": "FOUND"}
    assert second["match"] == {"safe_regex": {"regex": "/b/[0-9]+"}}
    assert third["direct_response"] == {"status": 418, "body": {"inline_string": "tea"}}
    assert (fourth["route"]["prefix_rewrite"], fourth["route"]["host_rewrite_literal"]) == ("/", "inner")


def test_rules_for_some_callers_only():
    rules = virtual_service("""
    - match: [{sourceLabels: {app: web}}]
      route: [{destination: {host: reviews, subset: v1}}]
    - route: [{destination: {host: reviews, subset: v2}}]
    """)
    assert len(routes(view_of(rules))) == 1  # the first catches everything
    other = ProxyKey("sidecar", "web", "default", (("app", "other"),))
    assert [route["route"]["cluster"] for route in routes(view_of(rules, proxy=other))] == ["outbound|9080|v2|reviews.default.svc.cluster.local"]


def test_balancing_by_hash_needs_a_policy_on_the_route():
    (route,) = routes(view_of(rule("{loadBalancer: {consistentHash: {httpCookie: {name: user, ttl: 0s}}}}")))
    assert route["route"]["hash_policy"] == [{"cookie": {"name": "user", "ttl": "0s"}}]
    assert "retry_host_predicate" not in route["route"]["retry_policy"]


def test_export_and_the_callers_own_namespace():
    hidden = istio("VirtualService", "reviews", "{hosts: [reviews], exportTo: [elsewhere], http: [{route: [{destination: {host: reviews}}], timeout: 1s}]}")
    assert routes(view_of(hidden))[0]["route"]["timeout"] == "0s"


# --- listeners


def test_listeners_of_a_sidecar():
    view = view_of()
    assert sorted(one.name for one in view.all(LISTENER)) == ["127.0.0.1_13306", "127.0.0.1_15001", "127.0.0.1_18000", "127.0.0.1_19090"]
    manager = listener(view, "127.0.0.1_19090")["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["rds"]["route_config_name"] == "reviews.default.svc.cluster.local:9080"
    assert [one["name"].rpartition(".")[2] for one in manager["http_filters"]] == ["cors", "fault", "router"]
    proxy = listener(view, "127.0.0.1_13306")["filter_chains"][0]["filters"][0]["typed_config"]
    assert proxy["cluster"] == "outbound|3306||db.default.svc.cluster.local"
    inbound = listener(view, "127.0.0.1_18000")
    assert inbound["traffic_direction"] == "INBOUND"
    action = inbound["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert action["cluster"] == "inbound|8000||"
    assert cluster(view, "inbound|8000||")["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"] == 8000


def test_plain_connections_by_weight():
    rules = istio(
        "VirtualService",
        "db",
        "{hosts: [db], tcp: [{route: [{destination: {host: db}, weight: 1}, {destination: {host: reviews, port: {number: 9080}}, weight: 3}]}]}",
    )
    proxy = listener(view_of(rules), "127.0.0.1_13306")["filter_chains"][0]["filters"][0]["typed_config"]
    assert [(one["name"], one["weight"]) for one in proxy["weighted_clusters"]["clusters"]] == [
        ("outbound|3306||db.default.svc.cluster.local", 1),
        (REVIEWS, 3),
    ]


def ways(*texts: str, proxy: ProxyKey = WEB) -> list[tuple[dict, str]]:
    """What the filter chains of the port for db match, and the subset to which they lead."""
    chains = listener(view_of(*texts, proxy=proxy), "127.0.0.1_13306")["filter_chains"]
    return [(one.get("filter_chain_match", {}), one["filters"][-1]["typed_config"]["cluster"].split("|")[2]) for one in chains]


def ranges(*texts: str) -> dict:
    pairs = (text.split("/") for text in texts)
    return {"prefix_ranges": [{"address_prefix": address, "prefix_len": int(length)} for address, length in pairs]}


def test_plain_connections_by_the_address_to_which_they_go():
    def tcp(match: str, subset: str) -> str:
        return f"{{match: [{match}], route: [{{destination: {{host: db, subset: {subset}}}}}]}}"

    rules = [tcp("{destinationSubnets: [10.0.0.1/8, '::1']}", "a"), tcp("{destinationSubnets: [10.0.0.0/8]}, {destinationSubnets: [192.0.2.1]}", "b")]
    some = istio("VirtualService", "db", f"{{hosts: [db], tcp: [{', '.join(rules)}]}}")
    first = [(ranges("10.0.0.0/8", "::1/128"), "a"), (ranges("192.0.2.1/32"), "b")]
    assert ways(some) == [*first, ({}, "")]  # the others go to the service
    whole = istio("VirtualService", "db", f"{{hosts: [db], tcp: [{', '.join([*rules, tcp('{port: 3306}', 'c'), tcp('{}', 'd')])}]}}")
    assert ways(whole) == [*first, ({}, "c")]


def tunnel(*texts: str) -> dict | None:
    """Of the TCP proxy of the port for db."""
    proxy = listener(view_of(*texts), "127.0.0.1_13306")["filter_chains"][0]["filters"][0]["typed_config"]
    return proxy.get("tunneling_config")


def test_tunnels():
    own = "{name: s, labels: {a: b}, trafficPolicy: {tunnel: {targetHost: 'fd00::1', targetPort: 5432, protocol: POST}}}"
    bare = "{name: bare, labels: {a: c}, trafficPolicy: {connectionPool: {tcp: {idleTimeout: 7s}}}}"
    tunnelled = "trafficPolicy: {tunnel: {targetHost: db.example.com, targetPort: 3306}, portLevelSettings: [{port: {number: 3306}, tls: {mode: DISABLE}}]}"
    said = istio("DestinationRule", "db", f"{{host: db, {tunnelled}, subsets: [{own}, {bare}]}}")
    assert tunnel(said) == {"hostname": "db.example.com:3306"}  # whatever its port has of its own

    def to(*subsets: str) -> str:
        where = ", ".join(f"{{destination: {{host: db, subset: {subset}}}, weight: 1}}" for subset in subsets)
        return istio("VirtualService", "db", f"{{hosts: [db], tcp: [{{route: [{where}]}}]}}")

    assert tunnel(said, to("s")) == {"hostname": "[fd00::1]:5432", "use_post": True}
    assert tunnel(said, to("bare")) is None  # a subset has its own or none, as in Istio
    assert tunnel(said, to("s", "bare")) == {"hostname": "db.example.com:3306"}  # and of several it is the rule's that counts
    assert tunnel(istio("DestinationRule", "db", f"{{host: db, subsets: [{own}]}}"), to("s", "bare")) is None


def test_connections_by_name_and_address():
    def tls(match: str, subset: str) -> str:
        return f"{{match: [{match}], route: [{{destination: {{host: db, subset: {subset}}}}}]}}"

    rules = [tls("{sniHosts: [a.test], destinationSubnets: [10.0.0.0/8]}", "a"), tls("{sniHosts: [a.test, b.test], destinationSubnets: [10.0.0.0/8]}", "b")]
    text = istio("VirtualService", "db", f"{{hosts: [db, a.test, b.test], tls: [{', '.join([*rules, tls('{sniHosts: [a.test]}', 'c')])}]}}")
    names = {"server_names": ["a.test"]}
    assert ways(text) == [({**names, **ranges("10.0.0.0/8")}, "a"), ({"server_names": ["b.test"], **ranges("10.0.0.0/8")}, "b"), (names, "c")]


def test_connections_of_some_workloads():
    who = "sourceLabels: {tier: gold}, gateways: [mesh]"
    to = "route: [{destination: {host: db, subset: a}}]"
    for kind, match in (("tcp", f"{{{who}}}"), ("tls", f"{{sniHosts: [a.test], {who}}}")):
        text = istio("VirtualService", "db", f"{{hosts: [db, a.test], gateways: [g], {kind}: [{{match: [{match}], {to}}}]}}")
        assert [subset for _, subset in ways(text)] == [""]
        gold = ProxyKey("sidecar", "web", "default", (("app", "web"), ("tier", "gold")))
        assert [subset for _, subset in ways(text, proxy=gold)] == ["a"]


def flow(*texts: str) -> dict:
    """Of the TCP proxy of the port for db, what is said of how connections are carried."""
    proxy = listener(view_of(*texts), "127.0.0.1_13306")["filter_chains"][0]["filters"][0]["typed_config"]
    return {name: value for name, value in proxy.items() if name in ("idle_timeout", "max_downstream_connection_duration", "hash_policy")}


def test_how_plain_connections_are_carried():
    rules = "{host: db, trafficPolicy: %s, subsets: [{name: s, labels: {a: b}, trafficPolicy: {connectionPool: {tcp: {idleTimeout: 7s}}}}]}"
    times = "connectionPool: {tcp: {idleTimeout: 5s, maxConnectionDuration: 60s}}"
    said = istio("DestinationRule", "db", rules % f"{{{times}, loadBalancer: {{consistentHash: {{useSourceIp: true}}}}}}")
    whole = {"idle_timeout": "5s", "max_downstream_connection_duration": "60s"}
    assert flow(said) == {**whole, "hash_policy": [{"source_ip": {}}]}
    to = "{destination: {host: db, subset: s}, weight: 1}"
    one, two = (istio("VirtualService", "db", f"{{hosts: [db], tcp: [{{route: [{to}]}}]}}") for to in (to, f"{to}, {{destination: {{host: db}}, weight: 1}}"))
    assert flow(said, one)["idle_timeout"] == "7s"
    assert flow(said, two)["idle_timeout"] == "5s"
    of_port = "portLevelSettings: [{port: {number: 3306}, loadBalancer: {simple: RANDOM}}]"
    assert flow(istio("DestinationRule", "db", rules % f"{{{times}, {of_port}}}")) == whole


def test_a_port_keeps_what_ports_cannot_say():
    made = cluster(view_of(rule("{retryBudget: {percent: 10}, portLevelSettings: [{port: {number: 9080}, loadBalancer: {simple: RANDOM}}]}")), REVIEWS)
    assert made["circuit_breakers"]["thresholds"][0]["retry_budget"]["budget_percent"] == {"value": 10.0}


def test_the_http_proxy_knows_all_services_by_all_their_names():
    hosts = {host["name"]: host for host in plain(view_of(), ROUTES, "http_proxy")["virtual_hosts"]}
    assert hosts["reviews.default.svc.cluster.local:9080"]["domains"] == [
        "reviews.default.svc.cluster.local:9080",
        "reviews:9080",
        "reviews.default:9080",
        "reviews.default.svc:9080",
        "10.0.0.1:9080",
    ]
    assert hosts["block_all"]["routes"][0]["direct_response"] == {"status": 502}
    assert "db.default.svc.cluster.local:3306" not in hosts


def test_a_workload_that_nobody_described_gets_no_listeners():
    view = view_of(proxy=ProxyKey("sidecar", "unknown", "default"))
    assert not list(view.all(LISTENER))
    assert view.get(CLUSTER, REVIEWS) is not None


# --- gRPC's own clients


def test_grpc_clients_get_api_listeners_by_the_names_of_their_targets():
    view = view_of(virtual_service("- {route: [{destination: {host: reviews, subset: v1}}], corsPolicy: {}, timeout: 3s}"), proxy=GRPC_CLIENT)
    for name in ("reviews.default.svc.cluster.local:9080", "reviews:9080", "reviews.default:9080"):
        manager = listener(view, name)["api_listener"]["api_listener"]
        assert manager["rds"]["route_config_name"] == REVIEWS
    (route,) = routes(view, REVIEWS)
    assert route["route"]["cluster"] == REVIEWS_V1
    assert route["route"]["max_stream_duration"] == {"max_stream_duration": "3s"}
    assert "typed_per_filter_config" not in route
    assert "lb_policy" not in cluster(view, REVIEWS)  # round robin: they do not know least request


# --- proxies, sharing, and what changes


def node(**fields):
    return convert.to_message(fields, messages.known("envoy.config.core.v3.Node"))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"id": "web.shop"}, ProxyKey("sidecar", "web", "shop")),
        ({"id": "web"}, ProxyKey("sidecar", "web", "default")),
        ({"id": "sidecar~10.0.0.1~web-1.shop~shop.svc.cluster.local"}, ProxyKey("sidecar", "web-1", "shop")),
        ({"id": "x", "metadata": {"NAME": "web", "NAMESPACE": "shop", "LABELS": {"a": "b"}}}, ProxyKey("sidecar", "web", "shop", (("a", "b"),))),
        ({"id": "web.shop", "user_agent_name": "gRPC C-core Linux"}, ProxyKey("grpc", "web", "shop")),
        ({"id": "web.shop", "metadata": {"GENERATOR": "grpc", "NAME": 5, "LABELS": []}}, ProxyKey("grpc", "web", "shop")),
    ],
)
def test_nodes(fields, key):
    assert of_node(node(**fields)) == key


def test_proxies_share_what_is_the_same():
    translator, mesh = Translator(), snapshot(MESH, SUBSETS)
    one, other = (translator.view(ProxyKey("sidecar", name, "default"), mesh) for name in ("a", "b"))
    assert one.parts(CLUSTER)[0] is other.parts(CLUSTER)[0]
    assert one.parts(ENDPOINTS) == other.parts(ENDPOINTS)
    elsewhere = translator.view(ProxyKey("sidecar", "c", "elsewhere"), mesh)
    assert elsewhere.get(CLUSTER, REVIEWS) is not None
    assert elsewhere.get(CLUSTER, REVIEWS) is one.get(CLUSTER, REVIEWS)


def test_one_endpoint_more_changes_only_the_load_assignments_that_have_it():
    translator, store = Translator(), Store()
    first = snapshot(MESH, SUBSETS, store=store)
    before = translator.view(WEB, first)
    more = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: r3, labels: {app: reviews, version: v2}}}"
    after = translator.view(WEB, snapshot(MESH, SUBSETS, more, before=first, store=store))
    for url in (CLUSTER, LISTENER, ROUTES):
        assert all(new is old for new, old in zip(after.parts(url), before.parts(url), strict=True)), url
    new, old = after.parts(ENDPOINTS)[0], before.parts(ENDPOINTS)[0]
    assert [one.name for one in new.since(old).changed] == [REVIEWS, REVIEWS.replace("||", "|v2|")]
    assert not new.since(old).removed


def test_a_rule_that_changes_touches_only_its_own_resources():
    translator, store = Translator(), Store()
    first = snapshot(MESH, SUBSETS, store=store)
    before = translator.view(WEB, first)
    after = translator.view(
        WEB, snapshot(MESH, SUBSETS, virtual_service("- {route: [{destination: {host: reviews}}], timeout: 1s}"), before=first, store=store)
    )
    for url in (CLUSTER, ENDPOINTS, LISTENER):
        assert not any(new.since(old) for new, old in zip(after.parts(url), before.parts(url), strict=True)), url
    assert {one.name for new, old in zip(after.parts(ROUTES), before.parts(ROUTES), strict=True) for one in new.since(old).changed} == {
        "reviews.default.svc.cluster.local:9080",
        "http_proxy",
    }


def test_the_same_documents_give_the_same_bytes_in_any_order():
    one = Translator().view(WEB, snapshot(MESH, SUBSETS))
    pieces = (MESH + "---\n" + SUBSETS).split("---\n")
    other = Translator().view(WEB, snapshot("---\n".join(reversed(pieces))))
    for url in ORDER:
        assert {res.name: res.version for res in one.all(url)} == {res.name: res.version for res in other.all(url)}


def test_the_wire_forms_are_those_of_protobuf():
    (resource, *_) = view_of().all(CLUSTER)
    sotw = messages.known("envoy.service.discovery.v3.DiscoveryResponse").FromString(resource.packed)
    assert sotw.resources[0].value == resource.message.SerializeToString(deterministic=True)
    delta = messages.known("envoy.service.discovery.v3.DeltaDiscoveryResponse").FromString(resource.envelope)
    assert (delta.resources[0].name, delta.resources[0].version) == (resource.name, resource.version)
    assert delta.resources[0].resource == sotw.resources[0]


def test_our_own_sidecar_honours_all_of_it():
    view = view_of(
        rule(
            "{connectionPool: {tcp: {maxConnections: 1, tcpKeepalive: {time: 1s}}, http: {maxRetries: 1, idleTimeout: 1s}}, outlierDetection: {interval: 1s},"
            " loadBalancer: {consistentHash: {httpHeaderName: x}}, proxyProtocol: {version: V2}}",
            "[{name: v2, labels: {version: v2}}]",
        ),
        istio("DestinationRule", "db", "{host: db, trafficPolicy: {tunnel: {targetHost: a, targetPort: 1, protocol: POST}}}"),
        virtual_service("""
        - match: [{uri: {prefix: /a}, headers: {x: {regex: a}}, queryParams: {q: {exact: a}}}]
          fault: {delay: {fixedDelay: 1s, percentage: {value: 1}}, abort: {httpStatus: 500}}
          mirror: {host: reviews, subset: v2}
          corsPolicy: {allowOrigins: [{exact: a}]}
          retries: {attempts: 1, perTryTimeout: 1s, backoff: 1s}
          rewrite: {uriRegexRewrite: {match: a, rewrite: b}}
          route: [{destination: {host: reviews}}]
        """),
    )
    for url in ORDER:
        for resource in view.all(url):
            problems, _ = support.check(resource.message)
            assert not problems, resource


def test_versions_are_those_of_another_process():
    """A replica, or a control plane that is started anew, says the same of the same: also of mappings that are inside of filters."""
    code = textwrap.dedent("""
        from control.translate.resource import LISTENER, make, typed
        providers = {f"p{number}": {"issuer": "a", "local_jwks": {"inline_string": "a"}} for number in range(20)}
        inner = typed("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", providers=providers)
        chain = {"filters": [{"name": "a", "typed_config": inner}]}
        print(make(LISTENER, "a", {"name": "a", "filter_chains": [chain]}).version)
    """)
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout for _ in range(3)}
    assert len(found) == 1
