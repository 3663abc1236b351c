"""Listeners that others add to a Gateway: who may, what becomes of them, and which routes are theirs."""

from __future__ import annotations

import pytest

from control.translate.proxy import ProxyKey
from control.translate.resource import LISTENER, ROUTES, SECRET
from tests.unit.control_help import plain, view_of
from tests.unit.test_control_gateway_tls import certificate, pki  # noqa: F401  # a fixture
from tests.unit.test_control_kinds import complaints

EDGE = ProxyKey("sidecar", "edge", "infra")
WORKLOAD = """
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: edge, namespace: infra, labels: {gateway.networking.k8s.io/gateway-name: g}}
"""


def document(kind: str, name: str, namespace: str, spec: str, group: str = "gateway.networking.k8s.io/v1") -> str:
    return f"{{apiVersion: {group}, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"


def gateway(allowed: str = "{namespaces: {from: All}}") -> str:
    own = "{name: a, port: 80, protocol: HTTP, hostname: a.x}"
    return document("Gateway", "g", "infra", f"{{gatewayClassName: x, allowedListeners: {allowed}, listeners: [{own}]}}")


def listener_set(name: str, namespace: str, *listeners: str, **more: str) -> str:
    return document("ListenerSet", name, namespace, f"{{parentRef: {{name: g, namespace: infra}}, listeners: [{', '.join(listeners)}]}}", **more)


def route(name: str, namespace: str, parent: str) -> str:
    return document("HTTPRoute", name, namespace, f"{{parentRefs: [{parent}], rules: [{{backendRefs: [{{name: reviews, namespace: default, port: 9080}}]}}]}}")


GRANT = document(
    "ReferenceGrant",
    "g",
    "default",
    "{from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: team}], to: [{group: '', kind: Service}]}",
    "gateway.networking.k8s.io/v1beta1",
)
HTTP = "{name: http, port: 8080, protocol: HTTP}"
OF_SET = "{kind: ListenerSet, name: s}"


def listeners(*texts: str) -> list[str]:
    return sorted(one.name for one in view_of(WORKLOAD, *texts, proxy=EDGE).all(LISTENER))


def domains(view, name: str) -> dict[str, bool]:
    """The hosts that a route configuration knows, and whether anything is sent on."""
    hosts = plain(view, ROUTES, name).get("virtual_hosts", ())
    return {one["domains"][0]: any("route" in rule for rule in one.get("routes", ())) for one in hosts}


@pytest.mark.parametrize(
    ("allowed", "added"),
    [
        ("{namespaces: {from: All}}", True),
        ("{namespaces: {from: Same}}", False),
        ("{namespaces: {from: None}}", False),
        ("{}", False),
        ("{namespaces: {from: Selector, selector: {matchLabels: {kubernetes.io/metadata.name: team}}}}", True),
        ("{namespaces: {from: Selector, selector: {matchLabels: {kubernetes.io/metadata.name: other}}}}", False),
    ],
)
def test_a_gateway_says_whose_listeners_it_takes(allowed, added):
    assert ("0.0.0.0_8080" in listeners(gateway(allowed), listener_set("s", "team", HTTP))) is added


def test_routes_are_those_of_the_set_or_of_the_gateway():
    same_port = "{name: b, port: 80, protocol: HTTP, hostname: b.x}"
    texts = [WORKLOAD, GRANT, gateway(), listener_set("s", "team", HTTP, same_port), route("r", "team", OF_SET)]
    view = view_of(*texts, proxy=EDGE)
    assert domains(view, "http.8080") == {"*": True}
    assert domains(view, "http.80") == {"a.x": False, "b.x": True}
    view = view_of(*texts[:-1], route("r", "team", "{name: g, namespace: infra}"), proxy=EDGE)  # of another namespace than the gateway's listeners allow
    assert not any(domains(view, "http.80").values())
    assert not any(domains(view, "http.8080").values())
    view = view_of(*texts[:-1], route("r", "team", "{kind: ListenerSet, name: s, sectionName: b}"), proxy=EDGE)
    assert domains(view, "http.80")["b.x"] is True
    assert not any(domains(view, "http.8080").values())


def test_the_first_of_listeners_that_cannot_share_a_port_counts():
    raw = "{name: raw-%d, port: %d, protocol: TCP}"
    texts = [gateway(), listener_set("s", "team", raw % (80, 80), raw % (9000, 9000)), listener_set("t", "team", HTTP.replace("8080", "9000"))]
    view = view_of(WORKLOAD, *texts, proxy=EDGE)
    assert sorted(one.name for one in view.all(LISTENER)) == ["0.0.0.0_80"]  # a port for plain connections needs a route
    assert [one.name for one in view.all(ROUTES)] == ["http.80"]


def test_certificates_are_those_of_its_own_namespace(pki):  # noqa: F811
    tls = "{name: s, port: 443, protocol: HTTPS, hostname: s.x, tls: {certificateRefs: [{name: shop}]}}"
    own = certificate(pki, "shop", namespace="team")
    view = view_of(WORKLOAD, gateway(), listener_set("s", "team", tls), own, proxy=EDGE)
    assert [one.name for one in view.all(SECRET)] == ["kubernetes-gateway://team/shop"]
    assert [one.name for one in view.all(ROUTES) if one.name.startswith("https")] == ["https.443.s.ListenerSet:s.team"]
    assert listeners(gateway(), listener_set("s", "team", tls), certificate(pki, "shop")) == ["0.0.0.0_80"]


def test_its_older_name():
    old = listener_set("s", "team", HTTP, group="gateway.networking.x-k8s.io/v1alpha1").replace("ListenerSet", "XListenerSet")
    to_it = "{group: gateway.networking.x-k8s.io, kind: XListenerSet, name: s}"
    assert domains(view_of(WORKLOAD, GRANT, gateway(), old, route("r", "team", to_it), proxy=EDGE), "http.8080") == {"*": True}


def test_what_is_wrong_is_said():
    assert complaints(document("ListenerSet", "s", "a", "{parentRef: {name: g, kind: Service}, listeners: []}")) == [
        "spec.parentRef.kind: Service of gateway.networking.k8s.io is no Gateway",
        "spec.listeners: must not be empty",
    ]
    twice = listener_set("s", "a", HTTP, HTTP.replace("HTTP", "TCP"))
    assert "spec.listeners[1].port: there is a listener on 8080 that requests or connections could not be told apart from" in complaints(twice)
