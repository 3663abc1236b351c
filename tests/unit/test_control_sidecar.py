"""Istio's Sidecar and `exportTo`: which proxy gets what of the mesh."""

from __future__ import annotations

import textwrap

import pytest

from control.kinds.store import Store
from control.model.snapshot import build
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES, SECRET
from control.translate.translator import Asked, Translator
from tests.unit.control_help import GRPC_CLIENT, WEB, cluster, endpoints, listener, plain, snapshot

PROXY_WEB = ProxyKey("sidecar", "web", "shop")
HEAD = "apiVersion: networking.istio.io/v1\nkind: {}\nmetadata: {{name: {}, namespace: {}}}\nspec: {}\n"


def service(name: str, namespace: str, annotation: str = "") -> str:
    annotations = f", annotations: {{networking.istio.io/exportTo: '{annotation}'}}" if annotation else ""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}{annotations}}}
spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80}}]}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec: {{ports: {{http: 8080}}, sidecar: {{inbound: [{{port: 8080, listen: 18080}}], httpProxy: 15001}}}}
"""


def istio(kind: str, spec: str, name: str = "default", namespace: str = "shop") -> str:
    return HEAD.format(kind, name, namespace, textwrap.dedent(spec).strip())


def sidecar(spec: str, name: str = "default", namespace: str = "shop") -> str:
    return istio("Sidecar", spec, name, namespace)


TEAPOT = "fault: {abort: {httpStatus: 418, percentage: {value: 100}}}, route: [{destination: {host: pay.bank.svc.cluster.local}}]"
WORLD = [service("web", "shop"), service("cart", "shop"), service("pay", "bank"), service("vault", "bank", ".")]


def seen(*texts: str, proxy: ProxyKey = PROXY_WEB, url: str = CLUSTER) -> set[str]:
    """`name.namespace` of the services whose outbound clusters, or whose endpoints, a proxy has."""
    return seen_in(Translator().view(proxy, snapshot(*WORLD, *texts)), url)


def seen_in(view, url: str = CLUSTER) -> set[str]:
    return {one.name.split("|")[3].removesuffix(".svc.cluster.local") for one in view.all(url) if one.name.startswith("outbound|")}


def domains(*texts: str, proxy: ProxyKey = PROXY_WEB) -> set[str]:
    hosts = plain(Translator().view(proxy, snapshot(*WORLD, *texts)), ROUTES, "http_proxy")["virtual_hosts"]
    return {domain for host in hosts for domain in host["domains"]}


# --- egress


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("[./*]", {"web.shop", "cart.shop"}),
        ("['*/*']", {"web.shop", "cart.shop", "pay.bank"}),
        ("['~/*']", set()),
        ("[bank/*]", {"pay.bank"}),
        ("[./cart.shop.svc.cluster.local, bank/*]", {"cart.shop", "pay.bank"}),
        ("['*/*.bank.svc.cluster.local']", {"pay.bank"}),
        ("[shop/pay.bank.svc.cluster.local]", set()),  # it is not in that namespace
        ("['*/pay.bank.svc.cluster.local']", {"pay.bank"}),
        ("[bank/vault.bank.svc.cluster.local]", set()),  # it is not exported
    ],
)
def test_egress_hosts(hosts, expected):
    text = sidecar(f"{{egress: [{{hosts: {hosts}}}]}}")
    assert seen(text) == expected
    assert seen(text, url=ENDPOINTS) == expected
    assert {one.removesuffix(".svc.cluster.local") for one in domains(text) if one.endswith(".svc.cluster.local")} == expected


def test_several_egress_listeners_add_up():
    assert seen(sidecar("{egress: [{hosts: [./cart.shop.svc.cluster.local]}, {hosts: [bank/*]}]}")) == {"cart.shop", "pay.bank"}


def test_a_sidecar_without_egress_sees_everything():
    assert seen(sidecar("{}")) == {"web.shop", "cart.shop", "pay.bank"}


def test_grpc_clients_are_scoped_too():
    client = ProxyKey("grpc", "client", "shop")
    view = Translator().view(client, snapshot(*WORLD, sidecar("{egress: [{hosts: [bank/*]}]}")))
    assert {one.name for one in view.all(LISTENER)} == {f"pay.bank{rest}:80" for rest in ("", ".svc", ".svc.cluster.local")}


@pytest.mark.parametrize(
    ("sidecars", "expected"),
    [
        ([("root", "istio-system", "", "./*")], {"web.shop", "cart.shop"}),  # the mesh's own: `.` is the proxy's namespace
        ([("root", "istio-system", "", "./*"), ("all", "shop", "", "bank/*")], {"pay.bank"}),
        ([("all", "shop", "", "bank/*"), ("some", "shop", "web", "./*")], {"web.shop", "cart.shop"}),
        ([("all", "shop", "", "bank/*"), ("some", "shop", "cart", "./*")], {"pay.bank"}),
        ([("other", "bank", "web", "~/*")], {"web.shop", "cart.shop", "pay.bank"}),
        ([("root", "istio-system", "web", "~/*")], {"web.shop", "cart.shop", "pay.bank"}),  # a selector is for its own namespace
        ([("b", "shop", "web", "~/*"), ("a", "shop", "web", "bank/*")], {"pay.bank"}),  # of equals the first by name
    ],
)
def test_precedence(sidecars, expected):
    texts = []
    for name, namespace, app, hosts in sidecars:
        selector = f"workloadSelector: {{labels: {{app: {app}}}}}, " if app else ""
        texts.append(sidecar(f"{{{selector}egress: [{{hosts: ['{hosts}']}}]}}", name, namespace))
    assert seen(*texts) == expected


def test_gateways_see_everything():
    gateway = istio("Gateway", "{selector: {app: web}, servers: [{port: {number: 8000, name: http, protocol: HTTP}, hosts: ['*']}]}")
    assert seen(gateway, sidecar("{egress: [{hosts: ['~/*']}]}")) == {"web.shop", "cart.shop", "pay.bank"}


def test_where_imported_rules_lead_comes_along():
    """As in Istio: who may see the rules of a host reaches their destinations, without naming them; but not what is not exported."""
    to = "route: [{destination: {host: pay.bank.svc.cluster.local}, weight: 1}, {destination: {host: vault.bank.svc.cluster.local}, weight: 1}]"
    rules = istio("VirtualService", f"{{hosts: [cart], http: [{{{to}, mirror: {{host: web}}}}]}}", "cart")
    assert seen(rules, sidecar("{egress: [{hosts: [./cart.shop.svc.cluster.local]}]}")) == {"cart.shop", "pay.bank", "web.shop"}
    assert seen(rules, sidecar("{egress: [{hosts: [./web.shop.svc.cluster.local]}]}")) == {"web.shop"}


def test_rules_of_others_are_not_seen_where_only_the_service_is():
    """A VirtualService is imported by its own namespace."""
    rules = istio("VirtualService", f"{{hosts: [pay.bank.svc.cluster.local], http: [{{{TEAPOT}}}]}}", "teapot")
    made = Translator().view(PROXY_WEB, snapshot(*WORLD, rules, sidecar("{egress: [{hosts: [bank/*]}]}")))
    assert "418" not in str(plain(made, ROUTES, "http_proxy"))
    made = Translator().view(PROXY_WEB, snapshot(*WORLD, rules, sidecar("{egress: [{hosts: [bank/*, ./*]}]}")))
    assert "418" in str(plain(made, ROUTES, "http_proxy"))


def test_what_a_proxy_needs_itself_comes_along():
    """Where traces go, and where the keys of tokens are, whatever the application calls; but not what is not exported."""
    collector = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders: [{name: otel, opentelemetry: {service: %s.bank.svc.cluster.local, port: 80}}]
    defaultProviders: {tracing: [otel]}
"""
    tokens = """
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: a, namespace: shop}
spec: {jwtRules: [{issuer: a, jwksUri: 'http://cart.shop.svc.cluster.local/keys'}]}
"""
    nothing = sidecar("{egress: [{hosts: ['~/*']}]}")
    assert seen(nothing, collector % "pay") == {"pay.bank"}
    assert seen(nothing, tokens) == {"cart.shop"}
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, nothing, collector % "vault"))
    assert seen_in(view) == set()
    assert "vault" not in str([one.message for one in view.all(LISTENER)])  # Envoy would refuse a listener with a cluster that is not there


def test_subsets_and_policies_stay_those_of_the_mesh():
    rule = istio("DestinationRule", "{host: pay.bank.svc.cluster.local, subsets: [{name: v1, labels: {app: pay}}]}", "pay", "bank")
    made = Translator().view(PROXY_WEB, snapshot(*WORLD, rule, sidecar("{egress: [{hosts: [bank/*]}]}")))
    assert len(endpoints(made, "outbound|80|v1|pay.bank.svc.cluster.local")["endpoints"]) == 1


# --- listeners for some of the services


def entry(host: str, port: str, namespace: str = "shop") -> str:
    """A service outside, with one port."""
    spec = f"{{hosts: [{host}], resolution: STATIC, endpoints: [{{address: 10.1.1.1}}], ports: [{port}]}}"
    return istio("ServiceEntry", spec, host.partition(".")[0], namespace)


def exits(*listeners: str) -> str:
    return sidecar(f"{{egress: [{', '.join(listeners)}]}}")


def test_an_egress_for_requests_listens_on_its_port():
    """With the services that have this port, by names without it; and with the policy for what is not in the mesh."""
    other = entry("other.test", "{number: 81, name: http, protocol: HTTP}")
    texts = other, exits("{hosts: [./*], port: {number: 80, protocol: HTTP, name: a}}", "{hosts: [bank/*]}")
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, *texts))
    made = listener(view, "127.0.0.1_80")
    manager = made["filter_chains"][0]["filters"][-1]["typed_config"]
    assert (made["address"]["socket_address"], manager["rds"]["route_config_name"]) == ({"address": "127.0.0.1", "port_value": 80}, "80")
    hosts = plain(view, ROUTES, "80")["virtual_hosts"]
    assert [one["name"] for one in hosts] == ["cart.shop.svc.cluster.local:80", "web.shop.svc.cluster.local:80", "block_all"]
    assert {"web", "web:80", "web.shop.svc.cluster.local"} <= set(hosts[1]["domains"])
    assert seen(*texts) == {"web.shop", "cart.shop", "pay.bank", "other.test"}
    assert {one.name for one in view.all(LISTENER)} == {"127.0.0.1_80", "127.0.0.1_18080", "127.0.0.1_15001"}


def test_an_egress_on_a_port_of_its_own_names_services_with_that_port():
    """As in Istio: a port that no service has leads nowhere."""
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, exits("{hosts: [./*], port: {number: 9999, protocol: HTTP}, bind: 127.0.0.2, captureMode: NONE}")))
    assert listener(view, "127.0.0.2_9999")
    assert [one["name"] for one in plain(view, ROUTES, "9999")["virtual_hosts"]] == ["block_all"]


@pytest.mark.parametrize(
    ("listens", "name", "route"),
    [
        ("port: {number: 9999, protocol: HTTP_PROXY}", "127.0.0.1_9999", "9999"),
        ("port: {number: 0, protocol: HTTP}, bind: 'unix:///run/out.sock'", "/run/out.sock_0", "unix:///run/out.sock"),
    ],
)
def test_an_egress_for_requests_to_any_port(listens, name, route):
    other = entry("other.test", "{number: 81, name: http, protocol: HTTP}")
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, other, exits(f"{{hosts: [./*], {listens}}}")))
    address = listener(view, name)["address"]
    assert address in ({"socket_address": {"address": "127.0.0.1", "port_value": 9999}}, {"pipe": {"path": "/run/out.sock"}})
    hosts = {one["name"]: one["domains"] for one in plain(view, ROUTES, route)["virtual_hosts"]}
    assert hosts["other.test:81"] == ["other.test:81"]
    assert "web" in hosts["web.shop.svc.cluster.local:80"]


def test_an_egress_for_connections_leads_to_the_first_service():
    """And not to where rules for it go, which need not be imported."""
    texts = [entry(f"{name}.test", "{number: 3306, name: tcp, protocol: TCP}") for name in ("b", "c", "a")]
    rules = istio("VirtualService", "{hosts: [b.test], tcp: [{route: [{destination: {host: a.test}}]}]}")
    view = Translator().view(PROXY_WEB, snapshot(*texts, rules, exits("{hosts: [./b.test, ./c.test], port: {number: 3306, protocol: MySQL}}")))
    (chain,) = listener(view, "127.0.0.1_3306")["filter_chains"]
    assert chain["filters"][-1]["typed_config"]["cluster"] == "outbound|3306||a.test"
    view = Translator().view(PROXY_WEB, snapshot(*texts, exits("{hosts: [./b.test, ./c.test], port: {number: 3306, protocol: TCP}}")))
    (chain,) = listener(view, "127.0.0.1_3306")["filter_chains"]
    assert chain["filters"][-1]["typed_config"]["cluster"] == "outbound|3306||b.test"


def test_an_egress_for_tls_tells_services_by_their_names():
    texts = [entry(f"{name}.test", "{number: 443, name: tls, protocol: TLS}") for name in ("a", "b")]
    routed = "{match: [{sniHosts: [b.test]}], route: [{destination: {host: a.test}}]}"
    rules = istio("VirtualService", f"{{hosts: [b.test], tls: [{routed}]}}")
    view = Translator().view(PROXY_WEB, snapshot(*texts, rules, exits("{hosts: [./*], port: {number: 443, protocol: TLS}}")))
    made = listener(view, "127.0.0.1_443")
    found = [(one["filter_chain_match"]["server_names"], one["filters"][-1]["typed_config"]["cluster"]) for one in made["filter_chains"]]
    assert found == [(["a.test"], "outbound|443||a.test"), (["b.test"], "outbound|443||a.test")]
    assert [one["name"] for one in made["listener_filters"]] == ["envoy.filters.listener.tls_inspector"]


def test_an_egress_without_services_is_no_listener_of_connections():
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, exits("{hosts: [./*], port: {number: 3306, protocol: TCP}}")))
    assert view.get(LISTENER, "127.0.0.1_3306") is None


def test_ports_of_a_workload_are_its_own():
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, exits("{hosts: [./*], port: {number: 15001, protocol: TCP}}")))
    manager = listener(view, "127.0.0.1_15001")["filter_chains"][0]["filters"][-1]["typed_config"]
    assert manager["rds"]["route_config_name"] == "http_proxy"


def test_listeners_of_a_sidecar_are_for_whom_it_selects_also_without_a_workload():
    text = exits("{hosts: [./*], port: {number: 80, protocol: HTTP}}").replace("{egress", "{workloadSelector: {labels: {app: x}}, egress")
    made = snapshot(*WORLD, text)
    labelled = ProxyKey("sidecar", "new", "shop", (("app", "x"),))
    assert {one.name for one in Translator().view(labelled, made).all(LISTENER)} == {"127.0.0.1_80"}
    assert Translator().view(ProxyKey("sidecar", "new", "shop"), made).get(LISTENER, "127.0.0.1_80") is None
    assert Translator().view(ProxyKey("grpc", "new", "shop", (("app", "x"),)), made).get(LISTENER, "127.0.0.1_80") is None


def test_a_sidecar_that_is_sent_what_it_calls_has_its_listeners_services():
    text = exits("{hosts: [./cart.shop.svc.cluster.local], port: {number: 80, protocol: HTTP}}", "{hosts: ['*/*']}")
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, text), Asked(frozenset()))
    assert seen_in(view) == {"cart.shop"}
    assert "cart.shop.svc.cluster.local:80" in [one["name"] for one in plain(view, ROUTES, "80")["virtual_hosts"]]


def test_what_an_egress_does_not_see_makes_nothing_anew():
    translator, store = Translator(), Store()
    texts = [*WORLD, exits("{hosts: [bank/*], port: {number: 80, protocol: HTTP}}")]
    first = snapshot(*texts, store=store)
    before = translator.view(PROXY_WEB, first)
    store.put("new.yaml", service("more", "shop").encode())
    store.settle()
    after = translator.view(PROXY_WEB, build(store.objects, first))
    assert after.parts(ROUTES)[1] is before.parts(ROUTES)[1]


# --- TLS of an ingress

_FILES = "serverCertificate: /a.pem, privateKey: /a.key"


@pytest.mark.parametrize("protocol", ["HTTP", "TCP"])
def test_tls_that_a_sidecar_ends(protocol):
    """Where there is no mutual TLS of the mesh: callers from outside."""
    ingress = "{{workloadSelector: {{labels: {{app: web}}}}, ingress: [{{port: {{number: 8080, protocol: {}, name: x}}, tls: {{mode: {}, {}}}}}]}}"
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, sidecar(ingress.format(protocol, "MUTUAL", f"{_FILES}, caCertificates: /ca.pem"))))
    (chain,) = listener(view, "127.0.0.1_18080")["filter_chains"]
    context = chain["transport_socket"]["typed_config"]
    assert context["require_client_certificate"] is True
    assert context["common_tls_context"]["tls_certificate_sds_secret_configs"][0]["name"] == "file-cert:/a.pem~/a.key"
    assert {one.name for one in view.all(SECRET)} == {"file-cert:/a.pem~/a.key", "file-root:/ca.pem"}
    assert plain(view, SECRET, "file-root:/ca.pem")["validation_context"]["trusted_ca"] == {"filename": "/ca.pem"}
    mesh = [text.replace("httpProxy: 15001", "httpProxy: 15001, identity: true") for text in WORLD]
    simple = sidecar(ingress.format(protocol, "SIMPLE", _FILES))
    made = listener(Translator().view(PROXY_WEB, snapshot(*mesh, simple)), "127.0.0.1_18080")
    assert "file-cert" not in str(made), "as in Istio, mutual TLS of the mesh goes before it"
    off = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: none, namespace: shop}, spec: {mtls: {mode: DISABLE}}}"
    (chain,) = listener(Translator().view(PROXY_WEB, snapshot(*mesh, simple, off)), "127.0.0.1_18080")["filter_chains"]
    assert "file-cert" in str(chain["transport_socket"])


def test_an_ingress_may_leave_the_host_of_its_endpoint_open():
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, sidecar(INGRESS.format(8080, "HTTP", "defaultEndpoint: ':9000'"))))
    made = cluster(view, "inbound|8080||")["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert made == {"address": "127.0.0.1", "port_value": 9000}


# --- what is not in the mesh


@pytest.mark.parametrize(("mode", "name"), [("ALLOW_ANY", "PassthroughCluster"), ("REGISTRY_ONLY", "BlackHoleCluster")])
def test_outbound_traffic_policy(mode, name):
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, sidecar(f"{{outboundTrafficPolicy: {{mode: {mode}}}}}")))
    assert {"PassthroughCluster", "BlackHoleCluster"} & {one.name for one in view.all(CLUSTER)} == {name}
    last = plain(view, ROUTES, "http_proxy")["virtual_hosts"][-1]
    assert last["domains"] == ["*"]
    if mode == "ALLOW_ANY":
        assert last["routes"][0]["route"]["cluster"] == name
        assert cluster(view, name)["type"] == "ORIGINAL_DST"
    else:
        assert last["routes"][0]["direct_response"] == {"status": 502}
        assert "load_assignment" not in cluster(view, name)


def test_outbound_traffic_policy_of_the_mesh():
    """It holds for proxies without a Sidecar that says otherwise."""
    mesh = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "outboundTrafficPolicy: {mode: ALLOW_ANY}"}
"""
    for texts, name in (([], "PassthroughCluster"), ([sidecar("{}")], "PassthroughCluster"), ([sidecar("{outboundTrafficPolicy: {}}")], "BlackHoleCluster")):
        view = Translator().view(PROXY_WEB, snapshot(*WORLD, mesh, *texts))
        assert {"PassthroughCluster", "BlackHoleCluster"} & {one.name for one in view.all(CLUSTER)} == {name}


def test_without_a_policy_only_the_mesh_is_reached():
    view = Translator().view(PROXY_WEB, snapshot(*WORLD))
    assert plain(view, ROUTES, "http_proxy")["virtual_hosts"][-1]["name"] == "block_all"


# --- ingress

INGRESS = "{{workloadSelector: {{labels: {{app: web}}}}, ingress: [{{port: {{number: {}, protocol: {}, name: x}}, {}}}]}}"


def test_ingress_leads_the_port_elsewhere():
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, sidecar(INGRESS.format(8080, "HTTP2", "defaultEndpoint: '127.0.0.1:9000'"))))
    made = cluster(view, "inbound|8080||")
    assert made["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9000}
    assert "http2_protocol_options" in str(made["typed_extension_protocol_options"])
    assert listener(view, "127.0.0.1_18080")["traffic_direction"] == "INBOUND"  # where traffic to 8080 goes, as the workload says


def test_ingress_on_a_port_of_its_own_is_where_callers_go():
    """A Unix socket is behind it, so that the sidecar can have the port itself; and what is not among the ingress is not served."""
    text = sidecar(INGRESS.format(9080, "HTTP", "bind: 0.0.0.0, defaultEndpoint: 'unix:///run/web.sock'"))
    target = service("web", "shop").replace("port: 80}", "port: 80, targetPort: 9080}")
    view = Translator().view(PROXY_WEB, snapshot(*WORLD[1:], target, text))
    assert {one.name for one in view.all(LISTENER)} == {"0.0.0.0_9080", "127.0.0.1_15001"}
    address = cluster(view, "inbound|9080||")["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    assert address == {"pipe": {"path": "/run/web.sock"}}
    behind = endpoints(view, "outbound|80||web.shop.svc.cluster.local")["endpoints"][0]["lb_endpoints"][0]
    assert behind["endpoint"]["address"]["socket_address"]["port_value"] == 9080


def test_ingress_never_calls_itself():
    view = Translator().view(PROXY_WEB, snapshot(*WORLD, sidecar(INGRESS.format(9080, "HTTP", "defaultEndpoint: '127.0.0.1:9080'"))))
    assert {one.name for one in view.all(LISTENER)} == {"127.0.0.1_15001"}


# --- exportTo


def test_export_to_of_a_service():
    assert "vault.bank" not in seen()
    assert "vault.bank" in seen(proxy=ProxyKey("sidecar", "pay", "bank"))
    assert "vault.bank" in seen_in(Translator().view(PROXY_WEB, snapshot(*WORLD[:3], service("vault", "bank", "other, shop"))))
    assert "vault.bank" not in seen_in(Translator().view(ProxyKey("sidecar", "pay", "bank"), snapshot(*WORLD[:3], service("vault", "bank", "~"))))


def test_export_to_of_rules():
    teapot = "{hosts: [pay.bank.svc.cluster.local], exportTo: [%s], http: [{%s}]}"
    for where, applies in ((".", False), ("shop", True), ("'*'", True), ("other", False)):
        made = Translator().view(PROXY_WEB, snapshot(*WORLD, istio("VirtualService", teapot % (where, TEAPOT), "teapot", "bank")))
        assert ("418" in str(plain(made, ROUTES, "http_proxy"))) is applies
        rule = istio("DestinationRule", f"{{host: pay.bank.svc.cluster.local, exportTo: [{where}], subsets: [{{name: v1}}]}}", "pay", "bank")
        names = {one.name for one in Translator().view(PROXY_WEB, snapshot(*WORLD, rule)).all(CLUSTER)}
        assert ("outbound|80|v1|pay.bank.svc.cluster.local" in names) is applies


def test_export_to_of_rules_for_gateways():
    """What counts is where the gateway's proxies run."""
    gateway = istio("Gateway", "{selector: {app: web}, servers: [{port: {number: 8000, name: http, protocol: HTTP}, hosts: ['*/*']}]}")
    rules = "{hosts: [a.test], gateways: [shop/default], exportTo: [%s], http: [{route: [{destination: {host: pay}}]}]}"
    for where, applies in ((".", False), ("shop", True)):
        made = Translator().view(PROXY_WEB, snapshot(*WORLD, gateway, istio("VirtualService", rules % where, "a", "bank")))
        assert ("a.test" in str(plain(made, ROUTES, "http.8000"))) is applies


def test_a_host_that_several_namespaces_have():
    """Each has its own; others have the first that is exported to them, or the one that they import."""

    def entry(namespace: str, address: str, export: str) -> str:
        ports = "[{number: 80, name: http, protocol: HTTP}]"
        spec = f"{{hosts: [api.test], resolution: STATIC, ports: {ports}, endpoints: [{{address: {address}}}], exportTo: [{export}]}}"
        return istio("ServiceEntry", spec, "api", namespace)

    def address(namespace: str, *texts: str) -> str:
        view = Translator().view(ProxyKey("sidecar", "web", namespace), snapshot(*texts))
        if view.get(CLUSTER, "outbound|80||api.test") is None:
            return ""
        (group,) = endpoints(view, "outbound|80||api.test")["endpoints"]
        return group["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["address"]

    own = [entry(namespace, f"10.0.0.{number}", "'.'") for number, namespace in enumerate(("bank", "shop", "zoo"), 1)]
    assert [address(namespace, *own) for namespace in ("bank", "shop", "zoo", "else")] == ["10.0.0.1", "10.0.0.2", "10.0.0.3", ""]
    public = [*own[:2], entry("zoo", "10.0.0.3", "'*'")]
    assert [address(namespace, *public) for namespace in ("bank", "shop", "else")] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    imports = sidecar("{egress: [{hosts: [zoo/*]}]}")
    assert [address(namespace, *public, imports) for namespace in ("shop", "bank")] == ["10.0.0.3", "10.0.0.1"]


def test_nobody_takes_the_host_of_a_kubernetes_service_for_others():
    """A ServiceEntry of a namespace that sorts before it."""
    host = "pay.shop.svc.cluster.local"
    service = "{apiVersion: v1, kind: Service, metadata: {name: pay, namespace: shop}, spec: {selector: {app: pay}, ports: [{name: http, port: 80}]}}"
    pay = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: pay, namespace: shop, labels: {app: pay}}, spec: {address: 10.0.0.1}}"
    ports = "[{number: 80, name: http, protocol: HTTP}]"
    entry = istio("ServiceEntry", f"{{hosts: [{host}], resolution: STATIC, ports: {ports}, endpoints: [{{address: 10.6.6.6}}]}}", "evil", "a")

    def address(namespace: str) -> str:
        view = Translator().view(ProxyKey("sidecar", "web", namespace), snapshot(service, pay, entry))
        (group,) = endpoints(view, f"outbound|80||{host}")["endpoints"]
        return group["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["address"]

    assert [address(namespace) for namespace in ("shop", "zoo", "a")] == ["10.0.0.1", "10.0.0.1", "10.6.6.6"]


def test_rules_of_third_namespaces_say_nothing_about_a_service():
    """As in Istio, callers have their own, then the service's, then the mesh's: nobody else switches off a service's mutual TLS."""
    service = "{apiVersion: v1, kind: Service, metadata: {name: pay, namespace: shop}, spec: {ports: [{name: http, port: 80}]}}"

    def timeout(*namespaces: str) -> str:
        rules = [
            istio(
                "DestinationRule", f"{{host: pay.shop.svc.cluster.local, trafficPolicy: {{connectionPool: {{tcp: {{connectTimeout: {number}s}}}}}}}}", "d", one
            )
            for number, one in enumerate(namespaces, 1)
        ]
        view = Translator().view(ProxyKey("sidecar", "web", "zoo"), snapshot(service, *rules))
        return plain(view, CLUSTER, "outbound|80||pay.shop.svc.cluster.local")["connect_timeout"]

    assert [timeout(), timeout("evil"), timeout("evil", "istio-system")] == ["10s", "10s", "2s"]
    assert [timeout("evil", "istio-system", "shop"), timeout("evil", "istio-system", "shop", "zoo")] == ["3s", "4s"]


# --- mistakes


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("{egress: [{hosts: [reviews]}]}", "spec.egress[0].hosts[0]"),
        ("{egress: [{hosts: [./reviews]}]}", "spec.egress[0].hosts[0]"),
        ("{egress: [{hosts: ['./*x.y']}]}", "spec.egress[0].hosts[0]"),
        ("{egress: [{hosts: ['sh*p/*']}]}", "spec.egress[0].hosts[0]"),
        ("{egress: [{}]}", "spec.egress[0].hosts"),
        ("{egress: [{hosts: [./*], port: {number: 1, protocol: X, name: a}}]}", "spec.egress[0].port.protocol"),
        ("{egress: [{hosts: [./*], port: {protocol: HTTP, name: a}}]}", "spec.egress[0].port.number"),
        ("{egress: [{hosts: [./*], port: {number: 1, protocol: HTTP}, bind: 'unix:///a'}]}", "spec.egress[0].port.number"),
        ("{egress: [{hosts: [./*], port: {protocol: HTTP}, bind: 'unix://a'}]}", "spec.egress[0].bind"),
        ("{egress: [{hosts: [./*], port: {number: 1, protocol: HTTP}, bind: a.test}]}", "spec.egress[0].bind"),
        ("{egress: [{hosts: [./*], bind: 127.0.0.1}]}", "spec.egress[0].bind"),
        ("{egress: [{hosts: [./*], captureMode: IPTABLES}]}", "spec.egress[0].captureMode"),
        ("{egress: [{hosts: [./*], port: {number: 1, protocol: TCP}}, {hosts: [./*], port: {number: 1, protocol: TCP}}]}", "spec.egress[1].port"),
        ("{ingress: [{port: {number: 1, protocol: TCP}, captureMode: IPTABLES}]}", "spec.ingress[0].captureMode"),
        ("{outboundTrafficPolicy: {mode: SOME}}", "spec.outboundTrafficPolicy.mode"),
        ("{ingress: [{port: {number: 1, protocol: X, name: a}}]}", "spec.ingress[0].port.protocol"),
        ("{ingress: [{port: {number: 1, protocol: TCP, name: a}, defaultEndpoint: '10.0.0.1:80'}]}", "spec.ingress[0].defaultEndpoint"),
        ("{ingress: [{port: {number: 1, protocol: TCP, name: a}}, {port: {number: 1, protocol: TCP, name: b}}]}", "spec.ingress[1].port.number"),
        ("{inboundConnectionPool: {tcp: {maxConnections: 0}}}", "spec.inboundConnectionPool.tcp.maxConnections"),
        ("{ingress: [{port: {number: 1, protocol: TCP, name: a}, tls: {mode: SIMPLE}}]}", "spec.ingress[0].tls.credentialName"),
        ("{ingress: [{port: {number: 1, protocol: TCP, name: a}, tls: {mode: SIMPLE, credentialName: a}}]}", "spec.ingress[0].tls.credentialName"),
        ("{ingress: [{port: {number: 1, protocol: TCP, name: a}, tls: {mode: ISTIO_MUTUAL}}]}", "spec.ingress[0].tls.mode"),
    ],
)
def test_mistakes_have_their_path(spec, path):
    store = Store()
    store.put("a", sidecar(spec).encode())
    store.settle()
    assert [one.problem.path for one in store.troubles] == [path]


# --- sharing


def test_proxies_that_see_the_same_share_it():
    translator = Translator()
    made = snapshot(*WORLD, sidecar("{workloadSelector: {labels: {app: web}}, egress: [{hosts: [bank/*]}]}", "web"),
                    sidecar("{egress: [{hosts: [bank/*]}]}"))  # fmt: skip
    web, cart = (translator.view(ProxyKey("sidecar", name, "shop"), made) for name in ("web", "cart"))
    assert web.parts(CLUSTER)[0] is cart.parts(CLUSTER)[0]
    assert web.parts(ENDPOINTS)[0] is cart.parts(ENDPOINTS)[0]
    whole = translator.view(ProxyKey("sidecar", "pay", "bank"), made)
    name = "outbound|80||pay.bank.svc.cluster.local"
    assert whole.get(CLUSTER, name) is web.get(CLUSTER, name)  # serialised once for all


def test_what_is_not_seen_makes_nothing_anew():
    translator, store = Translator(), Store()
    texts = [*WORLD, sidecar("{egress: [{hosts: [bank/*]}]}")]
    first = snapshot(*texts, store=store)
    before = translator.view(PROXY_WEB, first)
    store.put("new.yaml", service("more", "shop").encode())
    store.settle()
    second = build(store.objects, first)
    assert second.config is not first.config
    after = translator.view(PROXY_WEB, second)
    assert after.parts(CLUSTER)[0] is before.parts(CLUSTER)[0]
    assert after.parts(ROUTES)[0] is before.parts(ROUTES)[0]


def test_without_any_sidecar_nothing_is_different():
    for proxy in (WEB, GRPC_CLIENT):
        assert seen(proxy=proxy) == {"web.shop", "cart.shop", "pay.bank"}
