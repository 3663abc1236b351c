"""EnvoyFilters: plain patches, what becomes of resources by them, and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import yaml

from control import bootstrap
from control.kinds.store import Store
from control.translate.proxy import ProxyKey, of_node
from control.translate.resource import CLUSTER, EXTENSION, LISTENER, ORDER, ROUTES
from control.translate.translator import Translator
from meshproxy.api import bootstrap as bootstraps
from meshproxy.api import convert, messages, support
from tests.differential.pki import Authority
from tests.unit.control_help import MESH, WEB, cluster, istio, listener, plain, snapshot, view_of
from tests.unit.test_control_gateway_tls import EDGE, KEY, TO_REVIEWS, certificate, gateway, https
from tests.unit.test_control_kinds import complaints

GROUP = "gateway.networking.k8s.io"
REVIEWS = "outbound|9080||reviews.default.svc.cluster.local"
HCM = "envoy.filters.network.http_connection_manager"
ROUTER = "envoy.filters.http.router"
T = "type.googleapis.com/envoy.extensions.filters."
HEADERS = f"{{name: headers, typed_config: {{'@type': {T}http.header_mutation.v3.HeaderMutation}}}}"
RBAC = f"{{name: rbac, typed_config: {{'@type': {T}network.rbac.v3.RBAC, stat_prefix: x}}}}"


def patch(place: str, operation: str, value: str = "", match: str = "", context: str = "ANY", name: str = "f", **more: str) -> str:
    """A document with one patch. `more`: `namespace`, `labels`, `priority`."""
    made = {"applyTo": place, "match": {"context": context, **(yaml.safe_load(match) or {})}, "patch": {"operation": operation}}
    if value:
        made["patch"]["value"] = yaml.safe_load(value)
    spec = {"configPatches": [made], "priority": int(more.get("priority", 0))}
    if "labels" in more:
        spec["workloadSelector"] = {"labels": yaml.safe_load(more["labels"])}
    meta = {"name": name, "namespace": more.get("namespace", "default")}
    return json.dumps({"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter", "metadata": meta, "spec": spec})


def view(*texts: str, proxy: ProxyKey = WEB):
    made = view_of(*texts, proxy=proxy)
    for url in ORDER:
        for one in made.all(url) if url != EXTENSION else ():  # what it is for, it does not say by itself
            assert not support.check(one.message)[0], one
    return made


def http_filters(*texts: str, name: str = "127.0.0.1_18000") -> list[str]:
    manager = listener(view(*texts), name)["filter_chains"][0]["filters"][-1]["typed_config"]
    return [one["name"].rpartition(".")[2] for one in manager["http_filters"]]


def after(filter: str, sub: str = "") -> str:
    below = f", subFilter: {{name: {sub}}}" if sub else ""
    return f"{{listener: {{filterChain: {{filter: {{name: {filter}{below}}}}}}}}}"


# --- HTTP filters


@pytest.mark.parametrize(
    ("operation", "match", "expected"),
    [
        ("INSERT_BEFORE", after(HCM, ROUTER), ["fault", "headers", "router"]),
        ("INSERT_BEFORE", after(HCM), ["headers", "fault", "router"]),
        ("INSERT_AFTER", after(HCM, "envoy.filters.http.fault"), ["fault", "headers", "router"]),
        ("INSERT_FIRST", after(HCM), ["headers", "fault", "router"]),
        ("INSERT_AFTER", after(HCM), ["fault", "headers", "router"]),
        ("ADD", after(HCM), ["fault", "headers", "router"]),
        ("REPLACE", after(HCM, "envoy.filters.http.fault"), ["headers", "router"]),
        ("INSERT_BEFORE", after(HCM, "missing"), ["fault", "router"]),
        ("INSERT_BEFORE", after("missing", ROUTER), ["fault", "router"]),
        ("INSERT_AFTER", after(HCM, ROUTER), ["fault", "router"]),  # what is last must stay so
    ],
)
def test_http_filters(operation, match, expected):
    assert http_filters(patch("HTTP_FILTER", operation, HEADERS, match)) == expected


def test_removing_and_merging_http_filters():
    assert http_filters(patch("HTTP_FILTER", "REMOVE", match=after(HCM, "envoy.filters.http.fault"))) == ["router"]
    assert http_filters(patch("HTTP_FILTER", "REMOVE", match=after(HCM, ROUTER))) == ["fault", "router"]
    value = f"{{typed_config: {{'@type': {T}http.router.v3.Router, suppress_envoy_headers: true}}}}"
    made = view(patch("HTTP_FILTER", "MERGE", value, after(HCM, ROUTER)))
    router = listener(made, "127.0.0.1_18000")["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][-1]
    assert router == {"name": ROUTER, "typed_config": {"@type": f"{T}http.router.v3.Router", "suppress_envoy_headers": True}}


@pytest.mark.parametrize(
    ("context", "changed"),
    [("ANY", {"127.0.0.1_18000", "127.0.0.1_15001", "127.0.0.1_19090"}), ("SIDECAR_INBOUND", {"127.0.0.1_18000"}), ("GATEWAY", set())],
)
def test_contexts(context, changed):
    made, before = view(patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, after(HCM), context)), view()
    assert {one.name for one in made.all(LISTENER) if one.version != before.get(LISTENER, one.name).version} == changed


@pytest.mark.parametrize(("port", "changed"), [(8000, True), (18000, True), (9080, False)])
def test_a_port_is_where_the_sidecar_listens_or_what_callers_mean(port, changed):
    match = f"{{listener: {{portNumber: {port}, filterChain: {{filter: {{name: {HCM}}}}}}}}}"
    assert ("headers" in http_filters(patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, match))) is changed


def test_who_is_meant():
    one = patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, after(HCM), labels="{app: web}")
    assert "headers" in http_filters(one)
    assert "headers" not in http_filters(one.replace('"app": "web"', '"app": "other"'))
    assert "headers" not in http_filters(one.replace('"namespace": "default"', '"namespace": "shop"'))
    assert "headers" in http_filters(one.replace('"namespace": "default"', '"namespace": "istio-system"'))


def test_low_priorities_first_and_those_of_the_mesh_before_others():
    texts = [
        patch("HTTP_FILTER", "INSERT_FIRST", HEADERS.replace("headers,", f"{name},"), after(HCM), name=name, priority=priority, namespace=namespace)
        for name, priority, namespace in (("late", "5", "default"), ("early", "-5", "default"), ("mesh", "0", "istio-system"), ("own", "0", "default"))
    ]
    assert http_filters(*texts)[:4] == ["late", "own", "mesh", "early"]


# --- network filters, chains, listeners


def test_network_filters_and_chains():
    def filters(*texts: str) -> list[str]:
        return [one["name"].rpartition(".")[2] for one in listener(view(*texts), "127.0.0.1_13306")["filter_chains"][0]["filters"]]

    tcp = after("envoy.filters.network.tcp_proxy")
    assert filters(patch("NETWORK_FILTER", "INSERT_BEFORE", RBAC, tcp)) == ["rbac", "tcp_proxy"]
    assert filters(patch("NETWORK_FILTER", "ADD", RBAC)) == ["rbac", "tcp_proxy"]
    assert filters(patch("NETWORK_FILTER", "REMOVE", match=tcp)) == ["tcp_proxy"]
    merged = patch("NETWORK_FILTER", "MERGE", f"{{typed_config: {{'@type': {T}network.tcp_proxy.v3.TcpProxy, idle_timeout: 5s}}}}", tcp)
    config = listener(view(merged), "127.0.0.1_13306")["filter_chains"][0]["filters"][0]["typed_config"]
    assert (config["idle_timeout"], config["cluster"]) == ("5s", "outbound|3306||db.default.svc.cluster.local")
    made = view(patch("FILTER_CHAIN", "MERGE", "{transport_socket_connect_timeout: 3s}", context="SIDECAR_INBOUND"))
    assert listener(made, "127.0.0.1_18000")["filter_chains"][0]["transport_socket_connect_timeout"] == "3s"


def test_listeners():
    made = view(patch("LISTENER", "MERGE", "{per_connection_buffer_limit_bytes: 1000}", "{listener: {name: 127.0.0.1_18000}}"))
    assert listener(made, "127.0.0.1_18000")["per_connection_buffer_limit_bytes"] == 1000
    assert "per_connection_buffer_limit_bytes" not in listener(made, "127.0.0.1_13306")
    assert view(patch("LISTENER", "REMOVE", match="{listener: {portNumber: 3306}}")).get(LISTENER, "127.0.0.1_13306") is None
    address = "{socket_address: {address: 127.0.0.1, port_value: 7}}"
    tcp = f"{{name: t, typed_config: {{'@type': {T}network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: c}}}}"
    own = f"{{name: own, address: {address}, filter_chains: [{{filters: [{tcp}]}}]}}"
    assert listener(view(patch("LISTENER", "ADD", own)), "own")["address"]["socket_address"]["port_value"] == 7
    assert view(patch("LISTENER", "ADD", own, context="GATEWAY")).get(LISTENER, "own") is None


# --- clusters


def test_clusters():
    value = "{connect_timeout: 0.25s, circuit_breakers: {thresholds: [{priority: HIGH}]}, upstream_connection_options: {tcp_keepalive: {keepalive_time: 7}}}"
    made = cluster(view(patch("CLUSTER", "MERGE", value, "{cluster: {service: reviews.default.svc.cluster.local, portNumber: 9080}}")), REVIEWS)
    assert made["connect_timeout"] == "0.250s"  # and not 10.25: durations are one value
    assert len(made["circuit_breakers"]["thresholds"]) == 2  # lists grow, as in Istio
    assert made["upstream_connection_options"]["tcp_keepalive"]["keepalive_time"] == 7
    own = "{name: own, type: STATIC, connect_timeout: 1s, load_assignment: {cluster_name: own}}"
    assert cluster(view(patch("CLUSTER", "ADD", own)), "own")["connect_timeout"] == "1s"
    assert view(patch("CLUSTER", "REMOVE", match=f"{{cluster: {{name: '{REVIEWS}'}}}}")).get(CLUSTER, REVIEWS) is None
    inbound = cluster(view(patch("CLUSTER", "MERGE", "{connect_timeout: 3s}", context="SIDECAR_INBOUND")), "inbound|8000||")
    assert inbound["connect_timeout"] == "3s"


def test_options_inside_of_an_any_are_merged():
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    value = (
        f"{{typed_extension_protocol_options: {{{options}: {{'@type': type.googleapis.com/{options}, common_http_protocol_options: {{idle_timeout: 9s}}}}}}}}"
    )
    pool = istio("DestinationRule", "r", "{host: reviews, trafficPolicy: {connectionPool: {http: {maxRequestsPerConnection: 3}}}}")
    (made,) = cluster(view(pool, patch("CLUSTER", "MERGE", value, f"{{cluster: {{name: '{REVIEWS}'}}}}")), REVIEWS)["typed_extension_protocol_options"].values()
    assert made["common_http_protocol_options"] == {"idle_timeout": "9s", "max_requests_per_connection": 3}


# --- routes


def vhost(more: str = "", name: str = "") -> str:
    return f"{{routeConfiguration: {{portNumber: 9080, vhost: {{name: '{name}'{', ' + more if more else ''}}}}}}}"


def configuration(*texts: str):
    return plain(view(*texts), ROUTES, "reviews.default.svc.cluster.local:9080")


def test_route_configurations_hosts_and_routes():
    made = configuration(patch("ROUTE_CONFIGURATION", "MERGE", "{response_headers_to_remove: [x]}", "{routeConfiguration: {portNumber: 9080}}"))
    assert made["response_headers_to_remove"] == ["x"]
    made = configuration(patch("VIRTUAL_HOST", "MERGE", "{request_headers_to_remove: [y]}", vhost()))
    assert made["virtual_hosts"][0]["request_headers_to_remove"] == ["y"]
    added = configuration(patch("VIRTUAL_HOST", "ADD", "{name: own, domains: [own.test]}", vhost()))
    assert [host["name"] for host in added["virtual_hosts"]] == ["reviews.default.svc.cluster.local:9080", "own"]
    first = "{name: own, match: {path: /own}, direct_response: {status: 204}}"
    made = configuration(patch("HTTP_ROUTE", "INSERT_FIRST", first, vhost()))["virtual_hosts"][0]["routes"]
    assert [route["name"] for route in made] == ["own", "default"]
    made = configuration(patch("HTTP_ROUTE", "MERGE", "{route: {timeout: 4s}}", vhost("route: {action: ROUTE}")))["virtual_hosts"][0]["routes"]
    assert (made[0]["route"]["timeout"], made[0]["route"]["cluster"]) == ("4s", REVIEWS)
    made = configuration(patch("HTTP_ROUTE", "MERGE", "{route: {timeout: 4s}}", vhost("route: {action: REDIRECT}")))["virtual_hosts"][0]["routes"]
    assert made[0]["route"]["timeout"] == "0s"
    assert "virtual_hosts" not in configuration(patch("VIRTUAL_HOST", "REMOVE", match=vhost()))


def test_routes_inside_of_inbound_listeners():
    match = "{routeConfiguration: {vhost: {name: 'inbound|http|8000', route: {action: ANY}}}}"
    made = view(patch("HTTP_ROUTE", "MERGE", "{route: {timeout: 4s}}", match, "SIDECAR_INBOUND"))
    manager = listener(made, "127.0.0.1_18000")["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["timeout"] == "4s"


def test_gateways():
    servers = gateway("{port: {number: 8080, name: http, protocol: HTTP}, hosts: ['*']}")
    one = patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, f"{{listener: {{portNumber: 8080, filterChain: {{filter: {{name: {HCM}}}}}}}}}", "GATEWAY")
    other = patch("VIRTUAL_HOST", "MERGE", "{request_headers_to_remove: [y]}", "{routeConfiguration: {name: http.8080}}", "GATEWAY", "g")
    made = view(EDGE, servers, TO_REVIEWS, one, other, proxy=KEY)
    assert listener(made, "0.0.0.0_8080")["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]["name"] == "headers"
    assert plain(made, ROUTES, "http.8080")["virtual_hosts"][0]["request_headers_to_remove"] == ["y"]
    sidecars_only = patch("CLUSTER", "MERGE", "{connect_timeout: 3s}", context="SIDECAR_OUTBOUND")
    assert cluster(view(EDGE, servers, sidecars_only, proxy=KEY), REVIEWS)["connect_timeout"] == "10s"


# --- what is right stays


def test_a_patch_that_would_spoil_a_resource_is_left_out_of_it(caplog):
    with caplog.at_level(logging.WARNING, "meshctl"):
        made = view(
            patch("HTTP_FILTER", "REMOVE", match=after(HCM, ROUTER), name="a"),
            patch("LISTENER", "MERGE", "{name: renamed}", "{listener: {name: 127.0.0.1_18000}}", name="b"),
            patch("HTTP_ROUTE", "MERGE", "{redirect: {path_redirect: /x, response_code: FOUND}, match: {headers: [{present_match: true}]}}", vhost(), name="c"),
            patch("VIRTUAL_HOST", "ADD", "{name: own, domains: ['*']}", vhost(), name="d"),
            patch("FILTER_CHAIN", "ADD", "{name: own}", name="e"),
            patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, after(HCM), name="right"),
        )
    assert http_filters(patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, after(HCM))) == ["headers", "fault", "router"]
    assert listener(made, "127.0.0.1_18000")["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]["name"] == "headers"
    assert plain(made, ROUTES, "reviews.default.svc.cluster.local:9080")["virtual_hosts"][0]["routes"][0]["route"]["cluster"] == REVIEWS
    said = [record.getMessage() for record in caplog.records]
    for name in "abcde":
        assert any(f"EnvoyFilter default/{name}: spec.configPatches[0] is not applied to" in one for one in said), said


def test_patches_cost_those_alone_who_have_some():
    translator, store = Translator(), Store()
    first = snapshot(MESH, store=store)
    before = translator.view(ProxyKey("sidecar", "other", "default"), first)
    second = snapshot(MESH, patch("CLUSTER", "MERGE", "{connect_timeout: 3s}", labels="{app: web}"), before=first, store=store)
    after_it = translator.view(ProxyKey("sidecar", "other", "default"), second)
    assert all(new is old for url in ORDER for new, old in zip(after_it.parts(url), before.parts(url), strict=True))
    third = snapshot(MESH, patch("CLUSTER", "MERGE", "{connect_timeout: 3s}", labels="{app: web}"), before=second, store=store)
    assert translator.view(WEB, third).parts(CLUSTER)[0] is translator.view(WEB, second).parts(CLUSTER)[0]


def test_proxies_with_the_same_patches_share_what_they_make(caplog):
    translator, store = Translator(), Store()
    other = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: web2, labels: {app: web}}, spec: {sidecar: {httpProxy: 15001}}}"
    texts = MESH, other, patch("CLUSTER", "MERGE", "{connect_timeout: 3s}"), patch("CLUSTER", "MERGE", "{name: spoilt}", name="wrong")
    first = snapshot(*texts, store=store)
    with caplog.at_level(logging.WARNING, "meshctl"):
        views = [translator.view(ProxyKey("sidecar", name, "default"), first) for name in ("web", "web2")]
        assert views[0].parts(CLUSTER)[0] is views[1].parts(CLUSTER)[0]
        said = len(caplog.records)
        more = "{apiVersion: v1, kind: Service, metadata: {name: more}, spec: {ports: [{name: http, port: 80}]}}"
        after_it = translator.view(WEB, snapshot(*texts, more, before=first, store=store))
        assert after_it.get(CLUSTER, REVIEWS) is views[0].get(CLUSTER, REVIEWS)
        assert len(caplog.records) == said + 1  # of what is new


# --- listener filters, extensions, and which proxies are meant

INSPECTOR = f"{{name: http, typed_config: {{'@type': {T}listener.http_inspector.v3.HttpInspector}}}}"
STRICT = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: p}, spec: {mtls: {mode: STRICT}}}"


def listener_filters(*texts: str) -> list[str]:
    web = MESH_WITH_IDENTITY
    return [one["name"].rpartition(".")[2] for one in listener(view(web, STRICT, *texts, proxy=CALLED), "127.0.0.1_18080").get("listener_filters", ())]


CALLED = ProxyKey("sidecar", "called", "default")
MESH_WITH_IDENTITY = (
    "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: called, labels: {app: called}}, "
    "spec: {ports: {http: 8080}, sidecar: {identity: true, inbound: [{port: 8080, listen: 18080}]}}}"
)


@pytest.mark.parametrize(
    ("operation", "match", "expected"),
    [
        ("ADD", "", ["tls_inspector", "http"]),
        ("INSERT_FIRST", "", ["http", "tls_inspector"]),
        ("INSERT_BEFORE", "{listener: {listenerFilter: envoy.filters.listener.tls_inspector}}", ["http", "tls_inspector"]),
        ("INSERT_AFTER", "{listener: {listenerFilter: envoy.filters.listener.tls_inspector}}", ["tls_inspector", "http"]),
        ("REPLACE", "{listener: {listenerFilter: envoy.filters.listener.tls_inspector}}", ["http"]),
        ("REPLACE", "{listener: {listenerFilter: other}}", ["tls_inspector"]),
        ("ADD", "{listener: {portNumber: 9}}", ["tls_inspector"]),
    ],
)
def test_listener_filters(operation, match, expected):
    assert listener_filters(patch("LISTENER_FILTER", operation, INSPECTOR, match)) == expected
    removed = patch("LISTENER_FILTER", "REMOVE", match="{listener: {listenerFilter: envoy.filters.listener.tls_inspector}}")
    assert listener_filters(removed) == []


def test_extensions_by_discovery():
    reference = (
        "{name: later, config_discovery: {config_source: {ads: {}, resource_api_version: V3}, "
        f"type_urls: ['{T}http.header_mutation.v3.HeaderMutation']}}}}"
    )
    extension = patch("EXTENSION_CONFIG", "ADD", HEADERS.replace("name: headers", "name: later"), name="e")
    made = view(extension, patch("HTTP_FILTER", "INSERT_FIRST", reference, after(HCM), name="f"))
    assert plain(made, EXTENSION, "later")["typed_config"]["@type"] == f"{T}http.header_mutation.v3.HeaderMutation"
    assert http_filters(extension, patch("HTTP_FILTER", "INSERT_FIRST", reference, after(HCM), name="f"))[0] == "later"


@pytest.mark.parametrize(
    ("match", "said", "applied"),
    [
        (r"{proxyVersion: '^1\.2.*'}", {"ISTIO_VERSION": "1.29.0"}, True),
        (r"{proxyVersion: '^1\.2.*'}", {"ISTIO_VERSION": "1.3.0"}, False),
        (r"{proxyVersion: '9'}", {"ISTIO_VERSION": "1.29.0"}, True),
        ("{proxyVersion: '.*'}", {}, False),
        ("{metadata: {CANARY: 'yes'}}", {"CANARY": "yes", "OTHER": "x"}, True),
        ("{metadata: {CANARY: 'yes'}}", {"CANARY": "no"}, False),
        ("{metadata: {CANARY: 'yes'}}", {}, False),
    ],
)
def test_proxies_by_what_their_nodes_say(match, said, applied):
    text = patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, f"{{proxy: {match}, {after(HCM)[1:]}")
    key = of_node(convert.to_message({"id": "web.default", "metadata": said}, messages.known("envoy.config.core.v3.Node")))
    manager = listener(view(text, proxy=key), "127.0.0.1_18000")["filter_chains"][0]["filters"][-1]["typed_config"]
    assert (manager["http_filters"][0]["name"] == "headers") is applied


def test_classes_of_filters():
    policy = "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: a}, spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}}"
    rule = "{issuer: a, jwksUri: 'http://keys.test/'}"
    tokens = f"{{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {{name: a}}, spec: {{jwtRules: [{rule}]}}}}"
    for name, neighbours in (
        ("AUTHN", ("jwt_authn", "headers", "allow")),
        ("AUTHZ", ("jwt_authn", "allow", "headers")),
        ("STATS", ("fault", "headers", "router")),
    ):
        text = patch("HTTP_FILTER", "ADD", HEADERS).replace('"ADD"', f'"ADD", "filterClass": "{name}"')
        found = http_filters(text, policy, tokens)
        index = found.index(neighbours[0])
        assert tuple(found[index : index + 3]) == neighbours, found


def test_gateways_by_target_and_by_name(tmp_path_factory):
    Authority(folder := tmp_path_factory.mktemp("pki"), "ca").issue("a", "a.test")
    pki = {path.name: path.read_text() for path in folder.iterdir()}
    texts = [EDGE, gateway(https("{mode: SIMPLE, credentialName: shop}", "[a.test]")), certificate(pki, "shop"), TO_REVIEWS]

    def is_patched(match: str) -> bool:
        text = patch("VIRTUAL_HOST", "MERGE", "{include_attempt_count_in_response: true}", f"{{routeConfiguration: {match}}}", "GATEWAY")
        (host,) = plain(view(*texts, text, proxy=KEY), ROUTES, "https.8443.https.g.default")["virtual_hosts"]
        return "include_attempt_count_in_response" in host

    assert [is_patched(f"{{{one}}}") for one in ("gateway: default/g", "portName: https", "gateway: default/g, portName: https, portNumber: 8443")] == [
        True
    ] * 3
    assert [is_patched(f"{{{one}}}") for one in ("gateway: default/other", "portName: http", "gateway: other/g")] == [False] * 3

    edge = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {gateway.networking.k8s.io/gateway-name: g}}}"
    listeners = "gatewayClassName: m, listeners: [{name: a, port: 80, protocol: HTTP}]"
    api = f"{{apiVersion: {GROUP}/v1, kind: Gateway, metadata: {{name: g}}, spec: {{{listeners}}}}}"
    for name, timeout in (("g", "7s"), ("other", "10s")):
        refs = f'"targetRefs": [{{"group": "{GROUP}", "kind": "Gateway", "name": "{name}"}}], "priority"'
        text = patch("CLUSTER", "MERGE", "{connect_timeout: 7s}").replace('"priority"', refs)
        made = view(edge, api, text, proxy=KEY)
        assert cluster(made, REVIEWS)["connect_timeout"] == timeout
        assert cluster(view(text), REVIEWS)["connect_timeout"] == "10s"


def test_ports_of_filter_chains_are_those_of_their_listeners():
    def headers(port: int) -> bool:
        match = f"{{listener: {{filterChain: {{destinationPort: {port}, filter: {{name: {HCM}}}}}}}}}"
        return "headers" in http_filters(patch("HTTP_FILTER", "INSERT_FIRST", HEADERS, match, "SIDECAR_INBOUND"))

    assert [headers(port) for port in (8000, 18000, 9)] == [True, True, False]


def bootstrap_with(*texts: str, name: str = "web") -> dict:
    made = bootstrap.envoy(name, "default", [("127.0.0.1", 15010)])
    return bootstrap.with_patches(made, bootstrap.patches_for(snapshot(MESH, *texts), name, "default"))


def test_bootstraps_are_merged():
    plain = bootstrap_with()
    runtime = "{layered_runtime: {layers: [{name: own, static_layer: {a: true}}]}, node: {metadata: {team: a}}}"
    made = bootstrap_with(patch("BOOTSTRAP", "MERGE", runtime))
    assert made["layered_runtime"] == {"layers": [{"name": "own", "static_layer": {"a": True}}]}
    assert made["node"] == {**plain["node"], "metadata": {"team": "a"}}
    assert made["static_resources"]["clusters"][0]["name"] == "xds-grpc"
    assert not bootstraps.check(bootstraps.from_value(made))
    of_web = patch("BOOTSTRAP", "MERGE", runtime, labels="{app: web}")
    assert bootstrap_with(of_web) == made
    assert bootstrap_with(of_web, name="reviews-v1") == bootstrap_with(name="reviews-v1")
    assert bootstrap_with(patch("BOOTSTRAP", "MERGE", runtime, context="GATEWAY")) == plain
    view(patch("BOOTSTRAP", "MERGE", runtime))  # says nothing of what proxies are sent
    twice = "{static_resources: {clusters: [{name: xds-grpc, type: STATIC, connect_timeout: 1s}]}}"
    with pytest.raises(ValueError, match=r"EnvoyFilter default/f: spec.configPatches\[0\] cannot be put into the bootstrap"):
        bootstrap_with(patch("BOOTSTRAP", "MERGE", twice))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (patch("BOOTSTRAP", "ADD", "{}"), "spec.configPatches[0].patch.operation: ADD cannot be done to BOOTSTRAP; MERGE can"),
        (patch("BOOTSTRAP", "MERGE", "{watchdogs: {}}"), "spec.configPatches[0].patch.value.watchdogs: is not supported"),
        (patch("NONSENSE", "MERGE", "{}"), "spec.configPatches[0].applyTo: 'NONSENSE' is not one of"),
        (patch("CLUSTER", "INSERT_FIRST", "{name: a}"), "spec.configPatches[0].patch.operation: INSERT_FIRST cannot be done to CLUSTER"),
        (patch("CLUSTER", "MERGE"), "spec.configPatches[0].patch.value: is needed for MERGE"),
        (patch("CLUSTER", "MERGE", "{connect_timeuot: 1s}"), "spec.configPatches[0].patch.value.connect_timeuot: envoy.config.cluster.v3.Cluster has no such"),
        (patch("CLUSTER", "MERGE", "{connect_timeout: x}"), "spec.configPatches[0].patch.value.connect_timeout:"),
        (patch("CLUSTER", "MERGE", "{outlier_detection: {monitors: [{name: a}]}}"), "spec.configPatches[0].patch.value.outlier_detection.monitors:"),
        (
            patch("HTTP_FILTER", "ADD", f"{{name: a, typed_config: {{'@type': {T}http.lua.v3.Lua}}}}"),
            "spec.configPatches[0].patch.value.typed_config: envoy.ex",
        ),
        (
            patch("HTTP_FILTER", "ADD", f"{{name: a, typed_config: {{'@type': {T}http.nothing.v3.X}}}}"),
            "spec.configPatches[0].patch.value.typed_config: unknown",
        ),
        (patch("HTTP_ROUTE", "ADD", "{name: a}"), "spec.configPatches[0].patch.value.match: is required"),
        (patch("CLUSTER", "REMOVE", match="{listener: {}}"), "spec.configPatches[0].match.listener: is not where CLUSTER is; use cluster"),
        (patch("CLUSTER", "REMOVE", match="{proxy: {proxyVersion: '['}}"), "spec.configPatches[0].match.proxy.proxyVersion: no regular expression"),
        (patch("LISTENER", "REMOVE", match="{listener: {portName: a}}"), "spec.configPatches[0].match.listener.portName: Istio does not implement it"),
        (patch("EXTENSION_CONFIG", "MERGE", "{name: a}"), "spec.configPatches[0].patch.operation: MERGE cannot be done to EXTENSION_CONFIG"),
        (patch("EXTENSION_CONFIG", "ADD", HEADERS, "{cluster: {}}"), "spec.configPatches[0].match.cluster: is not where EXTENSION_CONFIG is"),
        (
            patch("EXTENSION_CONFIG", "ADD", f"{{name: a, typed_config: {{'@type': {T}http.lua.v3.Lua}}}}"),
            "spec.configPatches[0].patch.value.typed_config: envoy.ex",
        ),
        (
            patch("LISTENER_FILTER", "ADD", f"{{name: a, typed_config: {{'@type': {T}listener.local_ratelimit.v3.LocalRateLimit}}}}"),
            "spec.configPatches[0].patch.value.typed_config: envoy.ex",
        ),
        (
            patch("CLUSTER", "REMOVE").replace('"REMOVE"', '"REMOVE", "filterClass": "AUTHN"'),
            "spec.configPatches[0].patch.filterClass: is for ADD of HTTP_FILTER",
        ),
        (
            patch("CLUSTER", "REMOVE", labels="{a: b}").replace(
                '"priority"', '"targetRefs": [{"group": "' + GROUP + '", "kind": "Gateway", "name": "g"}], "priority"'
            ),
            "spec.workloadSelector: there are targetRefs already",
        ),
    ],
)
def test_mistakes(text, complaint):
    found = complaints(text)
    assert any(one.startswith(complaint) for one in found), found
