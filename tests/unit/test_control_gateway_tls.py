"""Gateways with TLS: servers and listeners of both APIs, the Secrets that they name, and who gets those."""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
from pathlib import Path

import pytest
from cryptography import x509

from control import held, query
from control.ads.hub import Hub
from control.ads.status import client_status
from control.kinds.store import Store
from control.peers import proven
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ORDER, ROUTES, SECRET
from control.translate.translator import Translator
from meshproxy.api import convert, messages, support
from tests.differential.pki import Authority
from tests.unit.control_help import MESH, istio, listener, plain, snapshot
from tests.unit.test_control_kinds import complaints

EDGE = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}"
KEY = ProxyKey("sidecar", "edge", "default")
SERVICE = "{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {ports: [{name: tls, port: 443}]}}"


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("pki")
    ca = Authority(folder, "ca")
    ca.issue("a", "a.test")
    ca.issue("b", "b.test")
    return {path.name: path.read_text() for path in folder.iterdir()}


def secret(name: str, kind: str = "kubernetes.io/tls", namespace: str = "default", **data: str) -> str:
    """`data`: field names with `_` for `.`."""
    encoded = {key.replace("_", "."): base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "type": kind, "metadata": {"name": name, "namespace": namespace}, "data": encoded})


def certificate(pki, name: str, which: str = "a", **more: str) -> str:
    return secret(name, tls_crt=pki[f"{which}.pem"], tls_key=pki[f"{which}.key"], **more)


def gateway(*servers: str, name: str = "g") -> str:
    return istio("Gateway", name, f"selector: {{istio: edge}}\nservers: [{', '.join(servers)}]")


def https(tls: str, hosts: str = "['*']", port: int = 8443, protocol: str = "HTTPS", name: str = "https") -> str:
    return f"{{port: {{number: {port}, name: {name}, protocol: {protocol}}}, hosts: {hosts}, tls: {tls}}}"


TO_REVIEWS = istio("VirtualService", "v", "hosts: ['*']\ngateways: [g]\nhttp: [{route: [{destination: {host: reviews}}]}]")


def view(*texts: str, proxy: ProxyKey = KEY):
    made = Translator().view(proxy, snapshot(MESH, EDGE, *texts))
    for url in ORDER:
        for one in made.all(url):
            problems, _ = support.check(one.message)
            assert not problems, (one, problems)
    return made


def chains(*texts: str, port: int = 8443):
    return listener(view(*texts), f"0.0.0.0_{port}")["filter_chains"]


def tls_of(chain):
    return chain["transport_socket"]["typed_config"]


# --- Istio's Gateway


def test_simple(pki):
    made = view(gateway(https("{mode: SIMPLE, credentialName: shop, minProtocolVersion: TLSV1_3}", "[a.test]")), TO_REVIEWS, certificate(pki, "shop"))
    (chain,) = listener(made, "0.0.0.0_8443")["filter_chains"]
    assert chain["filter_chain_match"] == {"server_names": ["a.test"]}
    tls = tls_of(chain)
    assert tls["require_client_certificate"] is False
    common = tls["common_tls_context"]
    assert common["alpn_protocols"] == ["h2", "http/1.1"]
    assert common["tls_certificate_sds_secret_configs"] == [{"name": "kubernetes://shop", "sds_config": {"ads": {}, "resource_api_version": "V3"}}]
    assert common["tls_params"] == {"tls_minimum_protocol_version": "TLSv1_3"}
    manager = chain["filters"][0]["typed_config"]
    assert manager["rds"]["route_config_name"] == "https.8443.https.g.default"
    (host,) = plain(made, ROUTES, "https.8443.https.g.default")["virtual_hosts"]
    assert host["domains"] == ["a.test"]
    shown = plain(made, SECRET, "kubernetes://shop")["tls_certificate"]
    assert (shown["certificate_chain"]["inline_string"], shown["private_key"]["inline_string"]) == (pki["a.pem"], pki["a.key"])


@pytest.mark.parametrize("mode", ["MUTUAL", "OPTIONAL_MUTUAL"])
def test_mutual(pki, mode):
    server = https(f"{{mode: {mode}, credentialName: shop, subjectAltNames: [web.test], cipherSuites: [ECDHE-ECDSA-AES128-GCM-SHA256]}}")
    made = view(gateway(server), TO_REVIEWS, certificate(pki, "shop", ca_crt=pki["ca.pem"]))
    (chain,) = listener(made, "0.0.0.0_8443")["filter_chains"]
    assert "filter_chain_match" not in chain
    tls = tls_of(chain)
    assert tls["require_client_certificate"] is (mode == "MUTUAL")
    validation = tls["common_tls_context"]["combined_validation_context"]
    assert validation["validation_context_sds_secret_config"]["name"] == "kubernetes://shop-cacert"
    names = validation["default_validation_context"]["match_typed_subject_alt_names"]
    assert {one["san_type"] for one in names} == {"DNS", "URI"}
    assert plain(made, SECRET, "kubernetes://shop-cacert")["validation_context"] == {"trusted_ca": {"inline_string": pki["ca.pem"]}}
    assert chain["filters"][0]["typed_config"]["forward_client_cert_details"] == "SANITIZE_SET"


def test_the_authorities_may_be_in_a_secret_of_their_own(pki):
    server = gateway(https("{mode: MUTUAL, credentialName: shop}"))
    generic = secret("shop", "Opaque", cert=pki["a.pem"], key=pki["a.key"])
    made = view(server, TO_REVIEWS, generic, secret("shop-cacert", "Opaque", cacert=pki["ca.pem"]))
    assert {one.name for one in made.all(SECRET)} == {"kubernetes://shop", "kubernetes://shop-cacert"}
    other = gateway(https("{mode: MUTUAL, credentialName: shop, caCertCredentialName: theirs}"))
    made = view(other, TO_REVIEWS, generic, secret("theirs", "Opaque", cacert=pki["ca.pem"]))
    assert {one.name for one in made.all(SECRET)} == {"kubernetes://shop", "kubernetes://theirs"}


def test_a_server_without_its_secret_is_not_served_and_harms_no_other(pki):
    servers = gateway(https("{mode: SIMPLE, credentialName: shop}", "[a.test]"), https("{mode: SIMPLE, credentialName: missing}", "[b.test]", name="b"))
    (chain,) = chains(servers, TO_REVIEWS, certificate(pki, "shop"))
    assert chain["filter_chain_match"] == {"server_names": ["a.test"]}
    mutual = gateway(https("{mode: MUTUAL, credentialName: shop}"))
    assert view(mutual, TO_REVIEWS, certificate(pki, "shop")).get(LISTENER, "0.0.0.0_8443") is None  # no authorities


def test_no_name_leads_to_two_chains(pki):
    one = gateway(https("{mode: SIMPLE, credentialName: shop}", "[a.test, '*.c.test']"), name="g")
    other = gateway(https("{mode: SIMPLE, credentialName: shop}", "[a.test, b.test]"), name="h")
    made = chains(one, other, TO_REVIEWS, certificate(pki, "shop"))
    assert [chain["filter_chain_match"]["server_names"] for chain in made] == [["*.c.test", "a.test"], ["b.test"]]


def test_names_in_capitals_are_the_same_names(pki):
    one = gateway(https("{mode: SIMPLE, credentialName: shop}", "[A.test]"), name="g")
    other = gateway(https("{mode: SIMPLE, credentialName: shop}", "[a.TEST, B.test]"), name="h")
    made = chains(one, other, TO_REVIEWS.replace("'*'", "A.Test"), certificate(pki, "shop"))
    assert [chain["filter_chain_match"]["server_names"] for chain in made] == [["a.test"], ["b.test"]]


def test_mutual_tls_of_the_mesh():
    server = gateway(https("{mode: ISTIO_MUTUAL}"))
    assert view(server, TO_REVIEWS).get(LISTENER, "0.0.0.0_8443") is None  # this workload has no certificate of the mesh
    with_identity = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}, spec: {sidecar: {identity: true}}}"
    made = Translator().view(KEY, snapshot(MESH, with_identity, server, TO_REVIEWS))
    tls = tls_of(listener(made, "0.0.0.0_8443")["filter_chains"][0])
    assert [one["name"] for one in tls["common_tls_context"]["tls_certificate_sds_secret_configs"]] == ["default"]
    assert tls["require_client_certificate"] is True


def test_tls_that_is_passed_on_by_its_server_name():
    rules = istio(
        "VirtualService",
        "v",
        """
        hosts: ["*.test"]
        gateways: [g]
        tls:
        - {match: [{sniHosts: [a.test]}, {port: 1, sniHosts: [never.test]}], route: [{destination: {host: db}}]}
        - match: [{sniHosts: [a.test, b.test]}]
          route: [{destination: {host: db}, weight: 1}, {destination: {host: reviews, port: {number: 9080}}, weight: 3}]
        """,
    )
    made = view(SERVICE.replace("db", "db2"), gateway(https("{mode: PASSTHROUGH}", "['*.test']", protocol="TLS")), rules)
    first, second = listener(made, "0.0.0.0_8443")["filter_chains"]
    assert first["filter_chain_match"] == {"server_names": ["a.test"]}
    assert "transport_socket" not in first
    assert first["filters"][0]["typed_config"]["cluster"] == "outbound|3306||db.default.svc.cluster.local"
    assert second["filter_chain_match"] == {"server_names": ["b.test"]}
    assert [one["weight"] for one in second["filters"][0]["typed_config"]["weighted_clusters"]["clusters"]] == [1, 3]
    assert listener(made, "0.0.0.0_8443")["listener_filters"][0]["name"] == "envoy.filters.listener.tls_inspector"


def test_mutual_tls_of_the_mesh_that_is_passed_on_by_what_callers_say():
    subsets = istio("DestinationRule", "reviews", "{host: reviews, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}, subsets: [{name: v1, labels: {version: v1}}]}")
    made = view(gateway(https("{mode: AUTO_PASSTHROUGH}", "['*.local']", 15443, "TLS")), subsets)
    found = {chain["filter_chain_match"]["server_names"][0]: chain for chain in listener(made, "0.0.0.0_15443")["filter_chains"]}
    names = {f"outbound_.{port}_._.{host}.default.svc.cluster.local" for port, host in ((9080, "reviews"), (3306, "db"))}
    subset = "outbound_.9080_.v1_.reviews.default.svc.cluster.local"
    assert found.keys() == names | {subset}
    assert found[subset]["filters"][0]["typed_config"]["cluster"] == subset
    passed = plain(made, CLUSTER, subset)
    assert "transport_socket" not in passed
    assert passed["eds_cluster_config"]["service_name"] == subset
    (group,) = plain(made, ENDPOINTS, subset)["endpoints"]
    assert [one["endpoint"]["address"]["socket_address"]["port_value"] for one in group["lb_endpoints"]] == [19080]
    only = view(gateway(https("{mode: AUTO_PASSTHROUGH}", "[db.default.svc.cluster.local]", 15443, "TLS")))
    assert [one.name for one in only.all(CLUSTER) if one.name.startswith("outbound_")] == ["outbound_.3306_._.db.default.svc.cluster.local"]
    assert not [one.name for one in view().all(CLUSTER) if one.name.startswith("outbound_")]


def test_tunnels_are_for_whom_a_gateway_routes(pki):
    rule = istio("DestinationRule", "db", "{host: db, trafficPolicy: {tunnel: {targetHost: a.test, targetPort: 443}}}")
    wanted = {"hostname": "a.test:443"}
    for kind in ("tcp: [{route: [{destination: {host: db}}]}]", "tls: [{match: [{sniHosts: [a.test]}], route: [{destination: {host: db}}]}]"):
        rules = istio("VirtualService", "v", f"hosts: ['*']\ngateways: [g]\n{kind}")
        mode = "PASSTHROUGH" if kind.startswith("tls") else "SIMPLE, credentialName: shop"
        (chain,) = chains(gateway(https(f"{{mode: {mode}}}", "['*.test']", protocol="TLS")), rules, rule, certificate(pki, "shop"))
        assert chain["filters"][0]["typed_config"]["tunneling_config"] == wanted
    passed_on = view(gateway(https("{mode: AUTO_PASSTHROUGH}", "['*.local']", 15443, "TLS")), rule)
    assert all("tunneling_config" not in chain["filters"][0]["typed_config"] for chain in listener(passed_on, "0.0.0.0_15443")["filter_chains"])


def test_tls_ended_for_plain_connections(pki):
    rules = istio("VirtualService", "v", "hosts: ['*']\ngateways: [g]\ntcp: [{route: [{destination: {host: db}}]}]")
    (chain,) = chains(gateway(https("{mode: SIMPLE, credentialName: shop}", protocol="TLS")), rules, certificate(pki, "shop"))
    assert chain["filters"][0]["typed_config"]["cluster"] == "outbound|3306||db.default.svc.cluster.local"
    assert "transport_socket" in chain


def test_certificates_in_files():
    server = https("{mode: MUTUAL, serverCertificate: /c, privateKey: /k, caCertificates: /ca, caCrl: /crl}")
    made = view(gateway(server), TO_REVIEWS)
    (chain,) = listener(made, "0.0.0.0_8443")["filter_chains"]
    common = tls_of(chain)["common_tls_context"]
    assert [one["name"] for one in common["tls_certificate_sds_secret_configs"]] == ["file-cert:/c~/k"]
    assert common["combined_validation_context"]["validation_context_sds_secret_config"]["name"] == "file-root:/ca~/crl"
    assert {one.name for one in made.without_secrets().all(SECRET)} == {"file-cert:/c~/k", "file-root:/ca~/crl"}
    two = "[{serverCertificate: /rsa, privateKey: /rsa.key}, {serverCertificate: /ecdsa, privateKey: /ecdsa.key}]"
    (chain,) = chains(gateway(https(f"{{mode: SIMPLE, tlsCertificates: {two}}}")), TO_REVIEWS)
    names = [one["name"] for one in tls_of(chain)["common_tls_context"]["tls_certificate_sds_secret_configs"]]
    assert names == ["file-cert:/rsa~/rsa.key", "file-cert:/ecdsa~/ecdsa.key"]


def test_where_servers_listen():
    http = "port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']"
    made = view(gateway(f"{{{http}, bind: 127.0.0.7}}", f"{{{http}}}"), TO_REVIEWS)
    assert {one.name for one in made.all(LISTENER)} == {"127.0.0.7_80", "0.0.0.0_80"}
    assert listener(made, "127.0.0.7_80")["address"]["socket_address"] == {"address": "127.0.0.7", "port_value": 80}
    assert {one.name for one in made.all(ROUTES)} == {"http.80.127.0.0.7", "http.80"}
    made = view(gateway(f"{{{http.replace('number: 80', 'number: 80, targetPort: 8080')}}}"), TO_REVIEWS)
    assert {one.name for one in made.all(LISTENER)} == {"0.0.0.0_8080"}


def test_a_gateway_listens_where_its_service_sends():
    http = gateway("{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}")
    service = "{apiVersion: v1, kind: Service, metadata: {name: edge}, spec: {selector: {istio: edge}, ports: [{name: http, port: 80, targetPort: 8080}]}}"
    rules = TO_REVIEWS.replace("http: [{", "http: [{match: [{port: 80}], ")
    made = view(http, service, rules)
    assert {one.name for one in made.all(LISTENER)} == {"0.0.0.0_8080"}
    (host,) = plain(made, ROUTES, "http.8080")["virtual_hosts"]
    assert host["routes"][0]["route"]["cluster"] == "outbound|9080||reviews.default.svc.cluster.local"
    elsewhere = view(http, service.replace("istio: edge", "istio: other"), rules)
    assert {one.name for one in elsewhere.all(LISTENER)} == {"0.0.0.0_80"}


def test_redirects_to_https(pki):
    plain_server = "{port: {number: 8080, name: http, protocol: HTTP}, hosts: ['a.test', 'other/b.test'], tls: {httpsRedirect: true}}"
    rules = TO_REVIEWS.replace("'*'", "a.test")
    made = view(gateway(plain_server), rules)
    found = {host["domains"][0]: host["require_tls"] for host in plain(made, ROUTES, "http.8080")["virtual_hosts"]}
    assert found == {"a.test": "ALL", "b.test": "ALL"}  # also where there are no rules


def test_sidecars_route_by_server_name_too():
    rules = istio("VirtualService", "v", "hosts: [db, a.test]\ntls: [{match: [{sniHosts: [a.test]}], route: [{destination: {host: reviews}}]}]")
    made = Translator().view(ProxyKey("sidecar", "web", "default"), snapshot(MESH, rules))
    (chain,) = listener(made, "127.0.0.1_13306")["filter_chains"]
    assert chain["filter_chain_match"] == {"server_names": ["a.test"]}
    rules += "tcp: [{route: [{destination: {host: db}}]}]"
    made = Translator().view(ProxyKey("sidecar", "web", "default"), snapshot(MESH, rules.replace("tcp:", "  tcp:")))
    assert len(listener(made, "127.0.0.1_13306")["filter_chains"]) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (gateway(https("{mode: SIMPLE}")), "spec.servers[0].tls.credentialName: is needed for SIMPLE"),
        (gateway(https("{mode: SIMPLE, serverCertificate: /a}")), "spec.servers[0].tls.privateKey: is needed"),
        (gateway(https("{mode: MUTUAL, serverCertificate: /a, privateKey: /b}")), "spec.servers[0].tls.caCertificates: is needed for MUTUAL"),
        (gateway(https("{mode: SIMPLE, credentialName: a, serverCertificate: /a, privateKey: /b}")), "spec.servers[0].tls.serverCertificate: there is"),
        (gateway(https("{mode: MUTUAL, credentialName: a, caCertificates: /a}")), "spec.servers[0].tls.caCertificates: cannot go with credentialName"),
        (gateway(https("{mode: PASSTHROUGH, serverCertificate: /a, privateKey: /b}")), "spec.servers[0].tls.serverCertificate: is not for PASSTHROUGH"),
        (gateway(https("{mode: PASSTHROUGH}, bind: 'unix:///a'")), "spec.servers[0].bind: 'unix:///a' is no IP address"),
        (gateway(https("{mode: PASSTHROUGH}, defaultEndpoint: '127.0.0.1:1'")), "spec.servers[0].defaultEndpoint: Istio's gateways do without, too"),
        (gateway(https("{mode: SIMPLE, credentialName: a, cipherSuites: [RC4]}")), "spec.servers[0].tls.cipherSuites[0]: 'RC4' is not one of"),
        (gateway(https("{mode: SIMPLE, credentialName: a, subjectAltNames: [b]}")), "spec.servers[0].tls.subjectAltNames: is about certificates of clients"),
        (gateway(https("{mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_3, maxProtocolVersion: TLSV1_2}")), "spec.servers[0].tls.maxProtocol"),
        (gateway(https("{mode: SIMPLE, credentialName: a, maxProtocolVersion: TLSV1_1}")), "spec.servers[0].tls.maxProtocolVersion: is older than"),
        (gateway(https("{mode: SIMPLE, credentialName: a}", protocol="HTTP")), "spec.servers[0].tls: HTTP is without TLS"),
        (gateway("{port: {number: 1, name: a, protocol: HTTPS}, hosts: ['*']}"), "spec.servers[0].tls: is needed for HTTPS"),
        (gateway(https("{mode: PASSTHROUGH}"), https("{mode: SIMPLE, credentialName: a}", name="b")), "spec.servers[1].port.number: there is a server on 8443"),
        (gateway(https("{mode: PASSTHROUGH}", "['w*.test']")), "spec.servers[0].hosts[0]: 'w*.test' is no host"),
        (gateway(https("{mode: PASSTHROUGH}", "['a/b*c']")), "spec.servers[0].hosts[0]: 'b*c' is no host"),
        (istio("VirtualService", "v", "hosts: [a*b]\nhttp: [{route: [{destination: {host: b}}]}]"), "spec.hosts[0]: 'a*b' is no host"),
        (secret("a", tls_crt="x"), "data[tls.key]: is needed in a Secret of type kubernetes.io/tls"),
        (secret("a", tls_crt="x", tls_key="y"), "data[tls.crt]: no certificates in PEM"),
        (secret("a", "Opaque", cacert="x"), "data[cacert]: no certificates in PEM"),
        ("{apiVersion: v1, kind: Secret, metadata: {name: a}, data: {tls.crt: '-', tls.key: 'Cg=='}}", "data[tls.crt]: must be base64 of PEM"),
        (
            istio("VirtualService", "v", "hosts: [a.test]\ntls: [{match: [{sniHosts: [b.test]}], route: [{destination: {host: b}}]}]"),
            "spec.tls[0].match[0].sniHosts[0]",
        ),
    ],
)
def test_mistakes(text, complaint):
    found = complaints(text)
    assert any(one.startswith(complaint) for one in found), found


def test_a_key_of_another_certificate(pki):
    text = secret("a", tls_crt=pki["a.pem"], tls_key=pki["b.key"])
    assert complaints(text) == ["data[tls.key]: is not the key of tls.crt"]


def test_secrets_for_others_are_passed_over():
    store = Store()
    store.put("a", secret("a", "Opaque", password="x").encode())
    store.settle()
    assert (store.troubles, store.objects) == ([], {})


# --- the Gateway API


def api(kind: str, name: str, spec: str, namespace: str = "default") -> str:
    return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"


def api_gateway(listeners: str) -> str:
    return api("Gateway", "g", f"{{gatewayClassName: mesh, listeners: {listeners}}}")


API_EDGE = EDGE.replace("istio: edge", "gateway.networking.k8s.io/gateway-name: g")
ROUTE = api("HTTPRoute", "r", "{parentRefs: [{name: g}], hostnames: [a.test], rules: [{backendRefs: [{name: reviews, port: 9080}]}]}")


def api_view(*texts: str):
    made = Translator().view(KEY, snapshot(MESH, API_EDGE, *texts))
    for url in ORDER:
        for one in made.all(url):
            assert not support.check(one.message)[0], one
    return made


def test_listeners_that_end_tls(pki):
    two = api_gateway(
        "[{name: a, port: 8443, protocol: HTTPS, hostname: a.test, tls: {certificateRefs: [{name: shop}]}},"
        " {name: b, port: 8443, protocol: HTTPS, hostname: b.test, tls: {certificateRefs: [{name: missing}]}}]"
    )
    made = api_view(two, ROUTE, certificate(pki, "shop"))
    (chain,) = listener(made, "0.0.0.0_8443")["filter_chains"]
    assert chain["filter_chain_match"] == {"server_names": ["a.test"]}
    assert [one["name"] for one in tls_of(chain)["common_tls_context"]["tls_certificate_sds_secret_configs"]] == ["kubernetes-gateway://default/shop"]
    (host,) = plain(made, ROUTES, "https.8443.a.g.default")["virtual_hosts"]
    assert host["domains"] == ["a.test"]
    assert [one.name for one in made.all(SECRET)] == ["kubernetes-gateway://default/shop"]


def test_a_secret_of_another_namespace_needs_a_grant(pki):
    one = api_gateway("[{name: a, port: 8443, protocol: HTTPS, tls: {certificateRefs: [{name: shop, namespace: vault}]}}]")
    there = secret("shop", namespace="vault", tls_crt=pki["a.pem"], tls_key=pki["a.key"])
    assert api_view(one, ROUTE, there).get(LISTENER, "0.0.0.0_8443") is None
    origin = "{group: gateway.networking.k8s.io, kind: Gateway, namespace: default}"
    grant = api("ReferenceGrant", "x", f"{{from: [{origin}], to: [{{group: '', kind: Secret, name: shop}}]}}", "vault")
    made = api_view(one, ROUTE, there, grant)
    assert [one.name for one in made.all(SECRET)] == ["kubernetes-gateway://vault/shop"]
    assert made.get(LISTENER, "0.0.0.0_8443") is not None
    assert api_view(one, ROUTE, there, grant.replace("name: shop", "name: other")).get(LISTENER, "0.0.0.0_8443") is None


def test_kinds_of_routes_that_a_listener_takes():
    grpc_only = "[{name: a, port: 8080, protocol: HTTP, allowedRoutes: {kinds: [{kind: GRPCRoute}]}}]"
    assert not plain(api_view(api_gateway(grpc_only), ROUTE), ROUTES, "http.8080").get("virtual_hosts")
    assert plain(api_view(api_gateway(grpc_only.replace("GRPC", "HTTP")), ROUTE), ROUTES, "http.8080")["virtual_hosts"]


# --- who gets them


def test_nobody_else_gets_secrets(pki):
    texts = (gateway(https("{mode: SIMPLE, credentialName: shop}")), TO_REVIEWS, certificate(pki, "shop"))
    assert list(view(*texts).all(SECRET))
    for other in (ProxyKey("sidecar", "web", "default"), ProxyKey("sidecar", "edge", "other")):
        assert not list(view(*texts, proxy=other).all(SECRET))
    liar = ProxyKey("sidecar", "stranger", "default", (("istio", "edge"),))
    assert not list(view(*texts, proxy=liar).all(SECRET))


@pytest.mark.parametrize(
    ("peer", "names", "served"),
    [
        ("ipv4:127.0.0.1:5000", (), True),
        ("unix:", (), True),
        ("ipv4:192.0.2.1:5000", (), False),
        ("ipv4:192.0.2.1:5000", (b"spiffe://cluster.local/ns/default/sa/default",), True),
        ("ipv4:192.0.2.1:5000", (b"spiffe://cluster.local/ns/default/sa/other", b"a.test"), False),
    ],
)
def test_whom_the_control_plane_believes(pki, peer, names, served):
    hub = Hub(snapshot(MESH, EDGE, gateway(https("{mode: SIMPLE, credentialName: shop}")), TO_REVIEWS, certificate(pki, "shop")))
    connection = hub.open(delta=False)
    connection.proven = proven(peer, {"x509_subject_alternative_name": names})
    request = {"node": {"id": "edge.default"}, "type_url": SECRET, "resource_names": ["kubernetes://shop"]}
    connection.receive(convert.to_message(request, messages.known("envoy.service.discovery.v3.DiscoveryRequest")).SerializeToString())
    responses = [messages.known("envoy.service.discovery.v3.DiscoveryResponse").FromString(one) for one in connection.responses()]
    assert [len(one.resources) for one in responses] == ([1] if served else [])


def test_a_new_certificate_changes_nothing_but_the_secret(pki):
    store, translator = Store(), Translator()
    texts = (MESH, EDGE, gateway(https("{mode: SIMPLE, credentialName: shop}")), TO_REVIEWS)
    first = snapshot(*texts, certificate(pki, "shop"), store=store)
    before = translator.view(KEY, first)
    second = snapshot(*texts, certificate(pki, "shop", "b"), before=first, store=store)
    assert second.config is first.config
    after = translator.view(KEY, second)
    for url in ORDER:
        changed = [one.name for new, old in zip(after.parts(url), before.parts(url), strict=True) for one in new.since(old).changed]
        assert changed == (["kubernetes://shop"] if url == SECRET else [])


def test_a_stream_lives_on_when_its_gateway_or_its_entitlement_goes_and_comes(pki):
    store = Store()
    texts = (gateway(https("{mode: SIMPLE, credentialName: shop}")), TO_REVIEWS, certificate(pki, "shop"))
    there = snapshot(MESH, EDGE, *texts, store=store)
    hub = Hub(there)
    connection = hub.open(delta=True)
    connection.proven = frozenset(["spiffe://cluster.local/ns/default/sa/default"])

    def said() -> list[tuple[list[str], list[str]]]:
        found = [messages.known("envoy.service.discovery.v3.DeltaDiscoveryResponse").FromString(one) for one in connection.responses()]
        for one in found:
            answer = {"type_url": SECRET, "response_nonce": one.nonce}
            connection.receive(convert.to_message(answer, messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")).SerializeToString())
        return [([resource.name for resource in one.resources], list(one.removed_resources)) for one in found]

    request = {"node": {"id": "edge.default"}, "type_url": SECRET, "resource_names_subscribe": ["kubernetes://shop"]}
    connection.receive(convert.to_message(request, messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")).SerializeToString())
    assert said() == [(["kubernetes://shop"], [])]
    hub.publish(snapshot(MESH, EDGE, TO_REVIEWS, TO_REVIEWS.replace("name: v}", "name: w}"), certificate(pki, "shop"), before=there, store=store))
    assert said() == [([], ["kubernetes://shop"])]
    hub.publish(there)
    assert said() == [(["kubernetes://shop"], [])]
    account = EDGE.replace("{istio: edge}}}", "{istio: edge}}, spec: {serviceAccount: other}}")
    hub.publish(snapshot(MESH, account, *texts, store=Store()))
    assert said() == [([], ["kubernetes://shop"])]
    hub.publish(there)
    assert said() == [(["kubernetes://shop"], [])]


# --- what is told of them


def test_certificates_are_told_and_keys_are_not(pki):
    texts = (gateway(https("{mode: MUTUAL, credentialName: shop}")), TO_REVIEWS, certificate(pki, "shop", ca_crt=pki["ca.pem"]))
    hub = Hub(snapshot(MESH, EDGE, *texts))
    connection = hub.open(delta=False)
    request = {"node": {"id": "edge.default"}, "type_url": SECRET, "resource_names": ["kubernetes://shop", "kubernetes://shop-cacert"]}
    connection.receive(convert.to_message(request, messages.known("envoy.service.discovery.v3.DiscoveryRequest")).SerializeToString())
    list(connection.responses())
    response = client_status(hub.connections, lambda _: True, True)
    found = sorted(query.resources(response, query.TYPES["secrets"], "edge.default"), key=lambda one: one.name)
    assert found[0].tls_certificate.private_key.inline_string == "[redacted]"
    body = "".join(pki["a.key"].splitlines()[1:-1])
    assert body[:40] not in response.SerializeToString().decode(errors="replace").replace("\n", "")
    leaf, root = (x509.load_pem_x509_certificate(pki[name].encode()) for name in ("a.pem", "ca.pem"))
    late = leaf.not_valid_after_utc + dt.timedelta(seconds=1)
    for now, valid in ((leaf.not_valid_before_utc, "yes"), (leaf.not_valid_before_utc - dt.timedelta(seconds=1), "not yet"), (late, "expired")):
        rows = [line.split() for line in held.secret_table(found, now).splitlines()[1:]]
        assert " ".join(rows[0]).startswith(f"kubernetes://shop certificate {valid} {leaf.serial_number:x} ")
        assert rows[0][-1] == "a.test"
        assert rows[1][:2] == ["kubernetes://shop-cacert", "authority"]
        assert f"{root.serial_number:x}" in rows[1]


def test_secrets_without_certificates_to_look_at():
    def of(**fields):
        return convert.to_message(fields, messages.known("envoy.extensions.transport_sockets.tls.v3.Secret"))

    found = [
        of(name="file", tls_certificate={"certificate_chain": {"filename": "/c.pem"}, "private_key": {"filename": "/k.pem"}}),
        of(name="broken", validation_context={"trusted_ca": {"inline_string": "no certificate"}}),
        of(name="word", generic_secret={"secret": {"inline_string": "x"}}),
        of(name="late"),
    ]
    rows = [re.split("   +", line) for line in held.secret_table(found, dt.datetime.now(dt.UTC)).splitlines()[1:]]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("file", "certificate", "-", "/c.pem"),
        ("broken", "authority", "-", "-"),
        ("word", "other", "-", "-"),
        ("late", "waits for it", "-", "-"),
    ]
