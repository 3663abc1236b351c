"""The scenarios of the Gateway API's conformance suite (v1.6, github.com/kubernetes-sigs/gateway-api), with a verdict each:
`tests/data/gateway-api-conformance.tsv`.

The verdicts are those of the suite itself, over kube-apiserver 1.34 with our control plane and our sidecar, in network namespaces that stood in for pods. (For
its three scenarios about mirrors, and those of the mesh, something of ours took the place of a kubelet that has logs and runs commands; callers in the mesh
used their sidecar's HTTP proxy, since nothing is captured, and outbound traffic was ALLOW_ANY.) What the suite asks for is asked again by tests of our own:
test_control_conditions.py about statuses, tests/e2e/test_gateway_features.py about traffic, with the real Envoy, too.

Its manifests are not ours: point `GATEWAY_API` at a checkout to load them, and to see whether it has scenarios that the table lacks.
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest
import yaml

from control.kinds.registry import identity
from control.kinds.store import Store
from control.model.snapshot import build
from control.status.conditions import CONTROLLER, Object
from control.status.gateway_api import FEATURES, statuses
from control.translate.proxy import ProxyKey
from control.translate.resource import ORDER
from control.translate.translator import Translator
from meshproxy.api import support

TABLE = Path(__file__).parents[1] / "data" / "gateway-api-conformance.tsv"
CHECKOUT = Path(os.environ.get("GATEWAY_API", "")) / "conformance" if os.environ.get("GATEWAY_API") else None
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="NO GATEWAY API: set GATEWAY_API to a checkout of github.com/kubernetes-sigs/gateway-api")
MANIFESTS = sorted((CHECKOUT / "tests").rglob("*.yaml")) if CHECKOUT is not None else [None]


def rows() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_table_is_one():
    names = [one["scenario"] for one in rows()]
    assert names == sorted(set(names))
    for one in rows():
        assert one["verdict"] in ("passes", "not served"), one
        assert bool(one["why"]) is (one["verdict"] != "passes"), one


def test_what_a_class_says_it_serves_is_what_passes():
    """A scenario passes if and only if all of its features are among them."""
    claimed = set(FEATURES.split())
    assert claimed == {name for one in rows() if one["verdict"] == "passes" for name in one["features"].split() if not name.startswith("Mesh")}
    for one in rows():
        asked = {name for name in one["features"].split() if not name.startswith("Mesh")}
        assert (asked <= claimed) is (one["verdict"] == "passes"), one
    assert FEATURES.split() == sorted(claimed)
    assert len(claimed) <= 64  # that the API has room for


@needs_checkout
def test_the_suite_has_no_other_scenarios():
    assert CHECKOUT is not None
    found = re.findall(r'ShortName:\s*"(\w+)"', "".join(path.read_text() for path in (CHECKOUT / "tests").rglob("*.go")))
    assert sorted(found) == [one["scenario"] for one in rows()]


if CHECKOUT is not None:
    BASE, MESH = CHECKOUT / "base" / "manifests.yaml", CHECKOUT / "mesh" / "manifests.yaml"
CLASS = f"{{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {{name: meshproxy}}, spec: {{controllerName: {CONTROLLER}}}}}"
POD = """
apiVersion: v1
kind: Pod
metadata: {{name: edge-{name}, namespace: {namespace}, labels: {{gateway.networking.k8s.io/gateway-name: {label}}}}}
spec: {{}}
status: {{podIP: 10.0.0.1}}
"""

# What is said of manifests, by file; of all others, nothing is.
COMPLAINTS = {
    "backendtlspolicy-invalid-kind": {"spec.validation.caCertificateRefs[0].kind"},
    "gateway-invalid-listeners-unsupported-protocol": {"spec.listeners[0].protocol", "spec.listeners[1].protocol"},
    "gateway-invalid-parameters-ref": {"spec.infrastructure.parametersRef"},
    "gateway-invalid-route-kind": {"spec.listeners[0].allowedRoutes.kinds[0]"},
    "gateway-invalid-tls-backend-configuration": {"spec.tls.backend.clientCertificateRef.kind"},
    "gateway-invalid-tls-configuration": {"data[tls.crt]", "spec.listeners[0].tls.certificateRefs[0].kind"},
    "gateway-static-addresses": {"spec.addresses[0].type", "spec.addresses[1].value", "spec.addresses[2].value"},
    "gateway-with-clientcertificate-validation-insecure-fallback": {
        "spec.tls.frontend.default.validation.mode",
        "spec.tls.frontend.perPort[0].tls.validation.mode",
    },
    "gateway-with-invalid-clientcertificate-validation": {"spec.tls.frontend.perPort[1].tls.validation.caCertificateRefs[0].kind"},
    "httproute-invalid-backendref-unknown-kind": {"spec.rules[0].backendRefs[0].kind"},
    "listenerset-allowed-routes-supported-kinds": {"spec.listeners[0].allowedRoutes.kinds[0]"},
    "listenerset-protocol-conflict": {"spec.listeners[1].port"},
    "tlsroute-invalid-backendref-unknown-kind": {"spec.rules[0].backendRefs[0].kind"},
    "tlsroute-listener-passthrough-supported-kinds": {"spec.listeners[0].allowedRoutes.kinds[0]"},
    "udproute-invalid-backendref-nonexistent": {"kind", "spec.listeners[0].protocol"},
    "udproute-invalid-cross-namespace-backend-ref": {"kind", "spec.listeners[0].protocol"},
    "udproute-multiple-routes-attachment": {"kind", "spec.listeners[0].protocol"},
    "udproute-not-allowed-by-listeners": {"kind"},
    "udproute-parentref-attach-all-listeners": {"kind", "spec.listeners[0].protocol", "spec.listeners[1].protocol", "spec.listeners[2].protocol"},
    "udproute-parentref-port-and-section-name": {"kind", "spec.listeners[0].protocol", "spec.listeners[1].protocol", "spec.listeners[2].protocol"},
    "udproute-reference-grant": {"kind", "spec.listeners[0].protocol"},
    "udproute-simple": {"kind", "spec.listeners[0].protocol"},
    "udproute-weighted-routing": {"kind", "spec.listeners[0].protocol"},
}


@needs_checkout
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem if path else "none")
def test_manifests(path):
    """Each, over those that all scenarios stand on: what is refused, what its gateways are sent, and that there is a status."""
    assert CHECKOUT is not None
    store, documents = Store(), list(yaml.safe_load_all(CLASS))
    files = {name: file.read_text().replace("{GATEWAY_CLASS_NAME}", "meshproxy") for name, file in (("base", BASE), ("mesh", MESH), ("own", path))}
    documents += [one for text in files.values() for one in yaml.safe_load_all(text) if one]
    gateways = [one["metadata"] for one in documents if one["kind"] == "Gateway"]
    files["pods"] = "\n---\n".join(POD.format(name=one["name"][:200], label=one["name"][:63], namespace=one["namespace"]) for one in gateways)
    for name, text in files.items():
        store.put(f"{name}.yaml", text.encode())
    store.settle()
    assert {one.problem.path for one in store.troubles} == COMPLAINTS.get(path.stem, set())
    snapshot, sent = build(store.objects), 0
    own = {(one["metadata"]["namespace"], one["metadata"]["name"]) for one in yaml.safe_load_all(files["own"]) if one and one["kind"] == "Gateway"}
    for gateway in gateways:
        if (gateway["namespace"], gateway["name"]) not in own and gateway["name"] != "same-namespace":
            continue
        view = Translator().view(ProxyKey("sidecar", f"edge-{gateway['name'][:200]}", gateway["namespace"]), snapshot)
        for one in (one for url in ORDER for one in view.all(url)):
            assert not support.check(one.message)[0], one
            sent += 1
    assert sent > 10  # that of the base has services, and a listener
    objects = []
    for document in documents:
        document["metadata"]["generation"] = 1
        who = identity(document)
        assert who is not None
        objects.append(Object(who, document, store.objects.get(who), ()))
    told = {one.identity for one, _ in statuses(objects, snapshot, "2026-01-01T00:00:00Z")}
    ours = [one.identity for one in objects if one.identity[1] == "Gateway" and one.spec["gatewayClassName"] == "meshproxy"]
    assert told >= set(ours)
