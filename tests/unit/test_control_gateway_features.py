"""The Gateway API's features, by the names that its conformance suite has for them (v1.6): which of them are served, and why the others are not.

What those that are served do is in tests/e2e/test_gateway_features.py, and, for meshes, in test_control_traffic.py and test_control_gateways.py there.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, LISTENER, ROUTES, SECRET
from control.translate.translator import Translator
from tests.differential.pki import Authority
from tests.unit.control_help import MESH, plain, snapshot
from tests.unit.test_control_kinds import complaints

EDGE = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {gateway.networking.k8s.io/gateway-name: g}}}"
KEY = ProxyKey("sidecar", "edge", "default")
TO_REVIEWS = "backendRefs: [{name: reviews, port: 9080}]"


def api(kind: str, spec: str, name: str = "r", namespace: str = "default") -> str:
    return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"


def gateway(listener: str, more: str = "", namespaces: str = "") -> str:
    allowed = f", allowedRoutes: {{namespaces: {namespaces}}}" if namespaces else ""
    return api("Gateway", f"{{gatewayClassName: mesh, listeners: [{{{listener}{allowed}}}]{more}}}", "g")


HTTP = "name: http, port: 80, protocol: HTTP"


def route(rule: str, more: str = "", **where: str) -> str:
    return api("HTTPRoute", f"{{parentRefs: [{{name: g, namespace: default}}], rules: [{{{rule}}}]{more}}}", **where)


def namespace(name: str, labels: str) -> str:
    return f"{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {labels}}}}}"


def view(*texts: str):
    return Translator().view(KEY, snapshot(MESH, EDGE, *texts))


def domains(*texts: str) -> list[str]:
    return [domain for one in plain(view(*texts), ROUTES, "http.80").get("virtual_hosts", ()) for domain in one["domains"]]


# --- what is refused, and why

REFUSED = {
    "HTTPRouteExternalAuth": (route(f"filters: [{{type: ExternalAuth, externalAuth: {{}}}}], {TO_REVIEWS}"), "ExternalAuth is not served"),
    "HTTPRouteSessionPersistence": (route(f"sessionPersistence: {{type: Cookie}}, {TO_REVIEWS}"), "meshctl does not honour this field"),
    "HTTPRouteExtensionRef": (route(f"filters: [{{type: ExtensionRef, extensionRef: {{}}}}], {TO_REVIEWS}"), "ExtensionRef is not served"),
    "HTTPRouteInvalidBackendRefUnknownKind": (route("backendRefs: [{group: a.b, kind: C, name: d}]"), "C of a.b is no backend that meshctl serves"),
    "GatewayInvalidParametersRef": (gateway(HTTP, ", infrastructure: {parametersRef: {}}"), "there are no parameters of gateways"),
    "GatewayListenerUnsupportedProtocol": (gateway("name: a, port: 80, protocol: X"), "X is not served, only HTTP, HTTPS, TLS, TCP"),
    "GatewayInvalidRouteKind": (gateway(f"{HTTP}, allowedRoutes: {{kinds: [{{kind: X}}]}}"), "this is no kind of routes of HTTP"),
    "GatewayStaticAddresses of another type": (gateway(HTTP, ", addresses: [{type: a/b, value: c}]"), "a/b is not served, only IPAddress"),
    "BackendTLSPolicyInvalidKind": (
        api("BackendTLSPolicy", "{targetRefs: [{group: '', kind: Service, name: a}], validation: {hostname: a, caCertificateRefs: [{kind: X, name: a}]}}"),
        "X of core: only ConfigMaps are served",
    ),
    "GatewayFrontendClientCertificateValidationInsecureFallback": (
        gateway(HTTP, ", tls: {frontend: {default: {validation: {mode: AllowInsecureFallback, caCertificateRefs: [{kind: ConfigMap, name: a}]}}}}"),
        "AllowInsecureFallback is not served: our sidecar cannot take certificates that it does not trust",
    ),
    "UDPRoute": (api("UDPRoute", "{}"), "UDPRoute of gateway.networking.k8s.io is not served by meshctl"),
    "UDP": (gateway("name: a, port: 53, protocol: UDP"), "UDP is not served"),
    "backends that differ in more than headers": (
        route("backendRefs: [{name: a, port: 1}, {name: b, port: 1, filters: [{type: URLRewrite, urlRewrite: {hostname: b}}]}]"),
        "only header modifiers are served here, since there are several backends",
    ),
    "a rule and its backend that both rewrite": (
        route("filters: [{type: URLRewrite, urlRewrite: {}}], backendRefs: [{name: b, port: 1, filters: [{type: URLRewrite, urlRewrite: {}}]}]"),
        "the rule has such a filter already",
    ),
    "CORS with credentials for any header of responses": (
        route(f"filters: [{{type: CORS, cors: {{exposeHeaders: ['*'], allowCredentials: true}}}}], {TO_REVIEWS}"),
        "* cannot be with allowCredentials: which headers there will be is not known",
    ),
    "a selector without values": (
        gateway(HTTP, namespaces="{from: Selector, selector: {matchExpressions: [{key: a, operator: In}]}}"),
        "must not be empty for In",
    ),
    "Selector without one": (gateway(HTTP, namespaces="{from: Selector}"), "is needed"),
}


@pytest.mark.parametrize("feature", REFUSED)
def test_refused(feature):
    text, why = REFUSED[feature]
    assert any(why in one for one in complaints(text)), complaints(text)


# --- namespaces of routes


@pytest.mark.parametrize(
    ("namespaces", "expected"),
    [
        ("{from: Same}", {"default"}),
        ("{from: All}", {"default", "red", "blue", "plain"}),
        ("{from: None}", set()),
        ("{from: Selector, selector: {matchLabels: {color: red}}}", {"red"}),
        ("{from: Selector, selector: {matchExpressions: [{key: color, operator: Exists}]}}", {"red", "blue"}),
        ("{from: Selector, selector: {matchExpressions: [{key: color, operator: DoesNotExist}]}}", {"default", "plain"}),
        ("{from: Selector, selector: {matchExpressions: [{key: color, operator: NotIn, values: [red]}]}}", {"default", "blue", "plain"}),
        ("{from: Selector, selector: {matchExpressions: [{key: color, operator: In, values: [red, blue]}]}}", {"red", "blue"}),
        ("{from: Selector, selector: {matchLabels: {kubernetes.io/metadata.name: plain}}}", {"plain"}),  # which no document describes
        ("{from: Selector, selector: {matchLabels: {color: green}}}", set()),
    ],
)
def test_namespaces_of_routes(namespaces, expected):
    known = [namespace("red", "{color: red}"), namespace("blue", "{color: blue}")]
    routes = [route("", f", hostnames: [{name}.test]", namespace=name) for name in ("default", "red", "blue", "plain")]
    found = domains(gateway(HTTP, namespaces=namespaces), *known, *routes)
    assert {name.removesuffix(".test") for name in found} == expected


def test_a_namespace_is_labelled_anew():
    texts = gateway(HTTP, namespaces="{from: Selector, selector: {matchLabels: {a: b}}}"), route(TO_REVIEWS, namespace="red")
    before = snapshot(MESH, EDGE, *texts, namespace("red", "{}"))
    translator = Translator()
    assert not plain(translator.view(KEY, before), ROUTES, "http.80").get("virtual_hosts")
    after = snapshot(MESH, EDGE, *texts, namespace("red", "{a: b}"), before=before)
    assert plain(translator.view(KEY, after), ROUTES, "http.80")["virtual_hosts"]


# --- listeners


def test_isolated_listeners():
    """Requests of a host are those of the listener that names it most exactly, whatever routes of others say."""
    listeners = ", ".join(f"{{name: {name}, port: 80, protocol: HTTP, hostname: '{host}'}}" for name, host in (("wild", "*.a.test"), ("one", "x.a.test")))
    made = api("Gateway", f"{{gatewayClassName: mesh, listeners: [{{name: any, port: 80, protocol: HTTP}}, {listeners}]}}", "g")
    names = "hostnames: ['*.test', '*.a.test', x.a.test]"
    routes = [
        api("HTTPRoute", f"{{parentRefs: [{{name: g, sectionName: {name}}}], {names}, rules: [{{name: {name}, {TO_REVIEWS}}}]}}", name)
        for name in ("any", "wild", "one")
    ]
    found = plain(view(made, *routes), ROUTES, "http.80")["virtual_hosts"]
    assert {one["domains"][0]: [route["name"] for route in one.get("routes", ())] for one in found} == {
        "x.a.test": ["one"],
        "*.a.test": ["wild"],
        "*.test": ["any"],
        "*": [],
    }


def test_addresses_are_where_it_listens():
    made = view(gateway(HTTP, ", addresses: [{type: IPAddress, value: 127.0.0.3}, {value: 127.0.0.4}]"), route(TO_REVIEWS))
    assert {one.name for one in made.all(LISTENER)} == {"127.0.0.3_80", "127.0.0.4_80"}
    made = view(gateway(HTTP, ", addresses: [{type: IPAddress}], infrastructure: {labels: {a: b}, annotations: {c: d}}"), route(TO_REVIEWS))
    assert {one.name for one in made.all(LISTENER)} == {"0.0.0.0_80"}


# --- certificates


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("pki")
    Authority(folder, "ca").issue("a", "a.test")
    return {path.name: path.read_text() for path in folder.iterdir()}


def certificate(pki, name: str = "own", namespace: str = "default") -> str:
    data = {"tls.crt": pki["a.pem"], "tls.key": pki["a.key"]}
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": encoded})


def bundle(pki, name: str = "clients", namespace: str = "default") -> str:
    return json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": {"ca.crt": pki["ca.pem"]}})


HTTPS = "name: https, port: %d, protocol: HTTPS, tls: {certificateRefs: [{name: own}]}"


def frontend(reference: str = "{group: '', kind: ConfigMap, name: clients}", ports: str = "") -> str:
    return f", tls: {{frontend: {{default: {{validation: {{caCertificateRefs: [{reference}]}}}}{ports}}}}}"


def tls_of(view, name: str):
    return plain(view, LISTENER, name)["filter_chains"][0]["transport_socket"]["typed_config"]


def test_certificates_of_clients(pki):
    common = [certificate(pki), bundle(pki), route(TO_REVIEWS)]
    tls = tls_of(view(gateway(HTTPS % 443, frontend()), *common), "0.0.0.0_443")
    assert tls["require_client_certificate"] is True
    assert tls["common_tls_context"]["validation_context"] == {"trusted_ca": {"inline_string": pki["ca.pem"]}}
    ports = ", perPort: [{port: 443, tls: {}}]"
    tls = tls_of(view(gateway(HTTPS % 443, frontend(ports=ports)), *common), "0.0.0.0_443")
    assert tls["require_client_certificate"] is False  # a port's own settings go before those for all, also where they say nothing
    assert not [one.name for one in view(gateway(HTTPS % 443, frontend()), *common[::2]).all(LISTENER)]  # rather than for everybody


def test_certificates_of_clients_by_authorities_of_another_namespace(pki):
    made = gateway(HTTPS % 443, frontend("{group: '', kind: ConfigMap, name: clients, namespace: vault}"))
    common = [made, certificate(pki), bundle(pki, namespace="vault"), route(TO_REVIEWS)]
    assert not list(view(*common).all(LISTENER))
    origin = "{group: gateway.networking.k8s.io, kind: Gateway, namespace: default}"
    grant = api("ReferenceGrant", f"{{from: [{origin}], to: [{{group: '', kind: ConfigMap}}]}}", "x", "vault")
    assert list(view(*common, grant).all(LISTENER))


def test_what_a_gateway_shows_to_backends(pki):
    policy = "{targetRefs: [{group: '', kind: Service, name: reviews}], validation: {hostname: a.test, wellKnownCACertificates: System}}"
    shows = gateway(HTTP, ", tls: {backend: {clientCertificateRef: {name: own}}}")
    name = "outbound|9080||reviews.default.svc.cluster.local"
    made = view(shows, api("BackendTLSPolicy", policy, "p"), certificate(pki), route(TO_REVIEWS))
    common = plain(made, CLUSTER, name)["transport_socket"]["typed_config"]["common_tls_context"]
    assert [one["name"] for one in common["tls_certificate_sds_secret_configs"]] == ["kubernetes-gateway://default/own"]
    assert plain(made, SECRET, "kubernetes-gateway://default/own")["tls_certificate"]["private_key"]["inline_string"] == pki["a.key"]
    assert not list(made.without_secrets().all(SECRET))
    without = view(shows, api("BackendTLSPolicy", policy, "p"), route(TO_REVIEWS))
    assert "tls_certificate_sds_secret_configs" not in plain(without, CLUSTER, name)["transport_socket"]["typed_config"]["common_tls_context"]


# --- filters


def the_route(*rules: str):
    (host,) = plain(view(gateway(HTTP), *rules), ROUTES, "http.80")["virtual_hosts"]
    (found,) = host["routes"]
    return found


def test_filters_of_the_only_backend_are_those_of_the_rule():
    rewrite = "{type: URLRewrite, urlRewrite: {hostname: b.test, path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}}"
    found = the_route(route(f"matches: [{{path: {{value: /a}}}}], backendRefs: [{{name: reviews, port: 9080, filters: [{rewrite}]}}]"))
    assert (found["route"]["host_rewrite_literal"], found["route"]["prefix_rewrite"]) == ("b.test", "/x")
    redirect = "{type: RequestRedirect, requestRedirect: {hostname: b.test}}"
    found = the_route(route(f"backendRefs: [{{name: reviews, port: 9080, filters: [{redirect}]}}]"))
    assert found["redirect"]["host_redirect"] == "b.test"


def test_cors():
    cors = "{allowOrigins: ['https://a.test', 'https://*.b.test'], allowMethods: [GET, PUT], allowHeaders: [x-a], exposeHeaders: [x-b], allowCredentials: true}"
    found = the_route(route(f"filters: [{{type: CORS, cors: {cors}}}], {TO_REVIEWS}"))
    policy = found["typed_per_filter_config"]["envoy.filters.http.cors"]
    assert policy["allow_origin_string_match"] == [{"exact": "https://a.test"}, {"safe_regex": {"regex": r"https://.*\.b\.test"}}]
    assert (policy["allow_methods"], policy["allow_headers"], policy["expose_headers"], policy["max_age"]) == ("GET,PUT", "x-a", "x-b", "5")
    assert policy["allow_credentials"] is True
    assert policy["forward_not_matching_preflights"] is False
