"""What objects of the Gateway API are told about themselves, without a cluster: documents in, conditions out.

The scenarios are those of the API's own conformance suite (v1.6), in our words; tests/e2e/test_gateway_api_suite.py runs the suite itself.
"""

from __future__ import annotations

import json

import pytest
import yaml

from control.kinds.fields import FLAW
from control.kinds.registry import identity
from control.kinds.store import Store
from control.model.secret import CaBundle
from control.model.snapshot import build
from control.status.conditions import CONTROLLER, Object
from control.status.gateway_api import statuses
from tests.differential.pki import Authority

GROUP = "gateway.networking.k8s.io"
BASE = f"""
{{apiVersion: {GROUP}/v1, kind: GatewayClass, metadata: {{name: ours}}, spec: {{controllerName: {CONTROLLER}}}}}
---
{{apiVersion: v1, kind: Pod, metadata: {{name: edge, labels: {{{GROUP}/gateway-name: g}}}}, spec: {{}}, status: {{podIP: 10.0.0.9}}}}
---
{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {{selector: {{app: web}}, ports: [{{name: http, port: 80}}]}}}}
"""
HTTP = "{name: http, port: 80, protocol: HTTP}"


def api(kind: str, name: str, spec: str, namespace: str = "default") -> str:
    return f"{{apiVersion: {GROUP}/v1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"


def gateway(*listeners: str, more: str = "") -> str:
    return api("Gateway", "g", f"{{gatewayClassName: ours, listeners: [{', '.join(listeners)}]{more}}}")


def route(rule: str = "backendRefs: [{name: web, port: 80}]", parent: str = "name: g", kind: str = "HTTPRoute", namespace: str = "default") -> str:
    return api(kind, "r", f"{{parentRefs: [{{{parent}}}], rules: [{{{rule}}}]}}", namespace)


def listener_set(name: str, *listeners: str, namespace: str = "default") -> str:
    return api("ListenerSet", name, f"{{parentRef: {{name: g, namespace: default}}, listeners: [{', '.join(listeners)}]}}", namespace)


ALLOWED = ", allowedListeners: {namespaces: {from: Same}}"


def told(*texts: str) -> dict[str, dict]:
    """Statuses by kind and name, with conditions as TYPE: (holds, reason)."""
    store = Store()
    text = "\n---\n".join([BASE, *texts])
    store.put("all.yaml", text.encode())
    store.settle()
    refused = {str(one.identity): str(one.problem) for one in store.troubles if one.problem.kind != FLAW}
    objects = []
    for document in yaml.safe_load_all(text):
        who = identity(document)
        assert who is not None
        document["metadata"]["generation"] = 1
        objects.append(Object(who, document, store.objects.get(who), (refused[str(who)],) if str(who) in refused else ()))
    bundles = {(one.namespace, one.name) for one in store.objects.values() if isinstance(one, CaBundle)}
    return {f"{one.identity[1]} {one.identity[3]}": status for one, status in statuses(objects, build(store.objects), "2026-01-01T00:00:00Z", bundles)}


def said(status: dict) -> dict[str, tuple[bool, str]]:
    return {one["type"]: (one["status"] == "True", one["reason"]) for one in status["conditions"]}


def listeners(status: dict) -> dict[str, dict[str, tuple[bool, str]]]:
    return {one["name"]: said(one) for one in status["listeners"]}


def parent(status: dict) -> dict[str, tuple[bool, str]]:
    (one,) = status["parents"]
    return said(one)


SERVED = {"Accepted": (True, "Accepted"), "Conflicted": (False, "NoConflicts"), "ResolvedRefs": (True, "ResolvedRefs"), "Programmed": (True, "Programmed")}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pki")
    Authority(folder, "ca").issue("shop", "shop.test")
    data = {"tls.crt": (folder / "shop.pem").read_text(), "tls.key": (folder / "shop.key").read_text()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "shop"}, "type": "kubernetes.io/tls", "stringData": data})


# --- Gateways and their listeners


def test_a_protocol_that_is_not_served_costs_its_listener_alone():
    found = told(gateway(HTTP, "{name: x, port: 81, protocol: X}"))["Gateway g"]
    assert said(found) == {"Accepted": (True, "ListenersNotValid"), "Programmed": (True, "Programmed"), "ResolvedRefs": (True, "ResolvedRefs")}
    assert listeners(found)["http"] == SERVED
    assert listeners(found)["x"]["Accepted"] == (False, "UnsupportedProtocol")
    assert [(one["name"], one["supportedKinds"]) for one in found["listeners"]][1] == ("x", [])
    alone = told(gateway("{name: x, port: 81, protocol: UDP}"))["Gateway g"]
    assert said(alone) | {"ResolvedRefs": None} == {"Accepted": (False, "ListenersNotValid"), "Programmed": (False, "Invalid"), "ResolvedRefs": None}


@pytest.mark.parametrize(
    ("listener", "kinds"),
    [
        ("{name: a, port: 80, protocol: HTTP, allowedRoutes: {kinds: [{kind: X}]}}", []),
        ("{name: a, port: 80, protocol: HTTP, allowedRoutes: {kinds: [{kind: X}, {kind: HTTPRoute}]}}", ["HTTPRoute"]),
        ("{name: a, port: 80, protocol: HTTP, allowedRoutes: {kinds: [{group: x.test, kind: HTTPRoute}, {kind: GRPCRoute}]}}", ["GRPCRoute"]),
        ("{name: a, port: 80, protocol: TLS, tls: {mode: Passthrough}, allowedRoutes: {kinds: [{kind: TCPRoute}, {kind: TLSRoute}]}}", ["TLSRoute"]),
    ],
)
def test_kinds_of_routes_that_a_listener_cannot_have(listener, kinds):
    found = told(gateway(listener))["Gateway g"]
    assert listeners(found)["a"]["ResolvedRefs"] == (False, "InvalidRouteKinds")
    assert [one["kind"] for one in found["listeners"][0]["supportedKinds"]] == kinds


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("{name: none}", "InvalidCertificateRef"),
        ("{group: x.test, kind: Secret, name: shop}", "InvalidCertificateRef"),
        ("{kind: X, name: shop}", "InvalidCertificateRef"),
        ("{name: shop, namespace: elsewhere}", "RefNotPermitted"),
    ],
)
def test_certificates_that_cannot_be_shown(shop, reference, reason):
    listener = f"{{name: a, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{reference}]}}}}"
    found = told(shop, gateway(HTTP, listener))["Gateway g"]
    assert (listeners(found)["a"]["ResolvedRefs"], listeners(found)["a"]["Programmed"]) == ((False, reason), (False, "Invalid"))
    assert listeners(found)["http"] == SERVED
    shown = gateway(HTTP, more=f", tls: {{backend: {{clientCertificateRef: {reference}}}}}")
    expected = "RefNotPermitted" if reason == "RefNotPermitted" else "InvalidClientCertificateRef"
    assert said(told(shop, shown)["Gateway g"])["ResolvedRefs"] == (False, expected)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("{group: '', kind: ConfigMap, name: none}", "InvalidCACertificateRef"),
        ("{group: '', kind: Service, name: web}", "InvalidCACertificateKind"),
        ("{group: '', kind: ConfigMap, name: roots, namespace: elsewhere}", "RefNotPermitted"),
    ],
)
def test_authorities_of_clients_that_are_missing_concern_their_listeners(shop, reference, reason):
    https = [f"{{name: l{port}, port: {port}, protocol: HTTPS, tls: {{certificateRefs: [{{name: shop}}]}}}}" for port in (443, 8443)]
    per_port = f", tls: {{frontend: {{default: {{}}, perPort: [{{port: 8443, tls: {{validation: {{caCertificateRefs: [{reference}]}}}}}}]}}}}"
    found = listeners(told(shop, gateway(HTTP, *https, more=per_port))["Gateway g"])
    assert found["http"] == found["l443"] == SERVED
    assert (found["l8443"]["ResolvedRefs"], found["l8443"]["Accepted"]) == ((False, reason), (False, "NoValidCACertificate"))
    assert not found["l8443"]["Programmed"][0]


def test_parameters_are_nobodys():
    found = told(gateway(HTTP, more=", infrastructure: {parametersRef: {group: a, kind: B, name: c}}"))["Gateway g"]
    assert said(found)["Accepted"] == (False, "InvalidParameters")


# --- routes


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("backendRefs: [{group: x.test, kind: X, name: web}]", "InvalidKind"),
        ("backendRefs: [{name: none, port: 80}]", "BackendNotFound"),
        ("backendRefs: [{name: web, port: 81}]", "BackendNotFound"),
        ("backendRefs: [{name: web, namespace: elsewhere, port: 80}]", "RefNotPermitted"),
    ],
)
@pytest.mark.parametrize("kind", ["HTTPRoute", "TCPRoute"])
def test_backends_that_lead_nowhere(rule, reason, kind):
    listener = HTTP if kind == "HTTPRoute" else HTTP.replace("HTTP", "TCP")
    found = parent(told(gateway(listener), route(rule, kind=kind))[f"{kind} r"])
    assert found == {"Accepted": (True, "Accepted"), "ResolvedRefs": (False, reason)}


def test_parents_that_are_not_ours_say_nothing_about_ours():
    both = route(parent="group: x.test, kind: X, name: other}, {name: g")
    assert parent(told(gateway(HTTP), both)["HTTPRoute r"])["Accepted"] == (True, "Accepted")
    assert "HTTPRoute r" not in told(gateway(HTTP), route(parent="group: x.test, kind: X, name: other"))


def test_routes_of_the_mesh_need_no_grants():
    mesh = route("backendRefs: [{name: web, namespace: default, port: 80}]", "group: '', kind: Service, name: web, namespace: default", namespace="caller")
    found = parent(told(gateway(HTTP), mesh)["HTTPRoute r"])
    assert found == {"Accepted": (True, "Accepted"), "ResolvedRefs": (True, "ResolvedRefs")}


# --- ListenerSets


def test_listeners_that_are_added():
    added = listener_set("s", "{name: a, port: 80, protocol: HTTP, hostname: a.test}")
    found = told(gateway(HTTP, more=ALLOWED), added, route(parent="kind: ListenerSet, name: s"))
    assert said(found["ListenerSet s"]) == {"Accepted": (True, "Accepted"), "Programmed": (True, "Programmed")}
    assert listeners(found["ListenerSet s"]) == {"a": SERVED}
    assert found["ListenerSet s"]["listeners"][0]["attachedRoutes"] == 1
    assert found["Gateway g"]["attachedListenerSets"] == 1
    assert found["Gateway g"]["listeners"][0]["attachedRoutes"] == 0
    assert parent(found["HTTPRoute r"])["Accepted"] == (True, "Accepted")
    assert parent(told(gateway(HTTP, more=ALLOWED), added, route(parent="kind: ListenerSet, name: s, sectionName: b"))["HTTPRoute r"])["Accepted"] == (
        False,
        "NoMatchingParent",
    )


def test_listeners_that_nobody_allows():
    found = told(gateway(HTTP), listener_set("s", HTTP.replace("80", "81")))
    assert said(found["ListenerSet s"]) == {"Accepted": (False, "NotAllowed"), "Programmed": (False, "NotAllowed")}
    assert "attachedListenerSets" not in found["Gateway g"]
    refused = told(gateway(HTTP, more=f"{ALLOWED}, infrastructure: {{parametersRef: {{}}}}"), listener_set("s", HTTP))
    assert said(refused["ListenerSet s"]) == {"Accepted": (False, "ParentNotAccepted"), "Programmed": (False, "ParentNotProgrammed")}


@pytest.mark.parametrize(
    ("second", "reason"),
    [("{name: b, port: 80, protocol: HTTP, hostname: a.test}", "HostnameConflict"), ("{name: b, port: 80, protocol: TCP}", "ProtocolConflict")],
)
def test_of_listeners_that_cannot_be_together_the_first_counts(second, reason):
    first = "{name: a, port: 80, protocol: HTTP, hostname: a.test}"
    found = told(
        gateway(first, more=ALLOWED), listener_set("one", "{name: c, port: 80, protocol: HTTP, hostname: c.test}", second), listener_set("two", second)
    )
    assert listeners(found["Gateway g"]) == {"a": SERVED}
    assert listeners(found["ListenerSet one"])["c"] == SERVED
    conflicted = {"Accepted": (False, reason), "Programmed": (False, reason), "Conflicted": (True, reason), "ResolvedRefs": (True, "ResolvedRefs")}
    assert listeners(found["ListenerSet one"])["b"] == listeners(found["ListenerSet two"])["b"] == conflicted
    assert said(found["ListenerSet one"]) == {"Accepted": (True, "ListenersNotValid"), "Programmed": (True, "Programmed")}
    assert said(found["ListenerSet two"]) == {"Accepted": (False, "ListenersNotValid"), "Programmed": (False, "ListenersNotValid")}
    assert found["Gateway g"]["attachedListenerSets"] == 1


def test_a_set_whose_certificates_are_missing(shop):
    https = "{name: a, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: shop, namespace: elsewhere}]}}"
    found = told(shop, gateway(HTTP, more=ALLOWED), listener_set("s", https))["ListenerSet s"]
    assert said(found) == {"Accepted": (False, "ListenersNotValid"), "Programmed": (False, "ListenersNotValid")}
    assert listeners(found)["a"]["ResolvedRefs"] == (False, "RefNotPermitted")


def aged(document: str, year: int) -> str:
    return document.replace("metadata: {", f"metadata: {{creationTimestamp: '{year}-01-01T00:00:00Z', ", 1)


def test_of_sets_that_conflict_the_oldest_counts():
    first, second = listener_set("one", "{name: a, port: 81, protocol: HTTP}"), listener_set("two", "{name: a, port: 81, protocol: HTTP}")
    by_name = told(gateway(HTTP, more=ALLOWED), first, second)
    by_age = told(gateway(HTTP, more=ALLOWED), aged(first, 2026), aged(second, 2025))
    assert [said(found[f"ListenerSet {name}"])["Accepted"][0] for found in (by_name, by_age) for name in ("one", "two")] == [True, False, False, True]


# --- BackendTLSPolicies


def test_of_policies_that_conflict_the_oldest_counts():
    target = "targetRefs: [{group: '', kind: Service, name: web}]"
    one, two = (
        api("BackendTLSPolicy", name, f"{{{target}, validation: {{hostname: {name}.test, wellKnownCACertificates: System}}}}") for name in ("one", "two")
    )
    for texts, reasons in (((one, two), ["Accepted", "Conflicted"]), ((aged(one, 2026), aged(two, 2025)), ["Conflicted", "Accepted"])):
        found = told(gateway(HTTP), *texts)
        assert [said(found[f"BackendTLSPolicy {name}"]["ancestors"][0])["Accepted"][1] for name in ("one", "two")] == reasons


@pytest.mark.parametrize(("reference", "reason"), [("{kind: X, name: a}", "InvalidKind"), ("{group: '', kind: ConfigMap, name: a}", "InvalidCACertificateRef")])
def test_authorities_of_services_that_are_missing(reference, reason):
    validation = f"{{hostname: a.test, caCertificateRefs: [{reference}]}}"
    policy = api("BackendTLSPolicy", "p", f"{{targetRefs: [{{group: '', kind: Service, name: web}}], validation: {validation}}}")
    (ancestor,) = told(gateway(HTTP), route(), policy)["BackendTLSPolicy p"]["ancestors"]
    assert ancestor["ancestorRef"]["kind"] == "Gateway"
    assert said(ancestor) == {"Accepted": (False, "NoValidCACertificate"), "ResolvedRefs": (False, reason)}
