"""Endpoints of EndpointSlices: their conditions, their places, and those that are in two slices."""

from __future__ import annotations

from control.model.service import Locality
from control.translate.endpoints import load_assignment
from tests.unit.control_help import snapshot

SERVICE = "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{name: http, port: 80}]}}"
HOST = ("web.default.svc.cluster.local", 80)


def of_slice(name: str, *endpoints: str) -> str:
    return f"""
    apiVersion: discovery.k8s.io/v1
    kind: EndpointSlice
    metadata: {{name: {name}, labels: {{kubernetes.io/service-name: web}}}}
    addressType: IPv4
    ports: [{{name: http, port: 8080}}]
    endpoints: [{", ".join(endpoints)}]
    """


def found(*texts: str) -> list:
    return list(snapshot(SERVICE, *texts).endpoints[HOST])


def test_conditions():
    made = found(
        of_slice(
            "a",
            "{addresses: [10.0.0.1]}",
            "{addresses: [10.0.0.2], conditions: {ready: true, serving: true, terminating: false}}",
            "{addresses: [10.0.0.3], conditions: {ready: false, serving: false, terminating: false}}",
            "{addresses: [10.0.0.4], conditions: {ready: false, serving: true, terminating: true}}",
            "{addresses: [10.0.0.5], conditions: {ready: false, serving: false, terminating: true}}",
            "{addresses: [10.0.0.6], conditions: {ready: false}, hints: {forZones: [{name: a}]}}",
        )
    )
    (group,) = load_assignment("c", made)["endpoints"]
    status = [one.get("health_status", "") for one in group["lb_endpoints"]]
    assert status == ["", "", "UNHEALTHY", "DRAINING", "UNHEALTHY", "UNHEALTHY"]


def test_one_that_is_in_two_slices_counts_once():
    """As while it moves from one to the other; the better news counts."""
    waiting, ready = "{addresses: [10.0.0.1], conditions: {ready: false}}", "{addresses: [10.0.0.1], conditions: {ready: true}}"
    for slices in ((waiting, ready), (ready, waiting)):
        (one,) = found(*(of_slice(f"s{index}", text) for index, text in enumerate(slices)))
        assert one.healthy


NODE = "{{apiVersion: v1, kind: Node, metadata: {{name: node, labels: {{{}}}}}}}"
POD = """
apiVersion: v1
kind: Pod
metadata: {name: p, labels: {app: web}}
spec: {nodeName: node, containers: [{name: c}]}
status: {podIP: 10.0.0.1}
"""


def test_places_come_from_nodes():
    node = NODE.format("topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1, topology.istio.io/subzone: rack")
    for zone, place in (("", Locality("eu", "eu-1", "rack")), ("eu-1", Locality("eu", "eu-1", "rack")), ("eu-9", Locality("", "eu-9"))):
        text = of_slice("a", f"{{addresses: [10.0.0.1], zone: '{zone}', targetRef: {{kind: Pod, name: p}}}}")
        (one,) = found(node, POD, text)
        assert one.locality == place
    (one,) = found(NODE.format("failure-domain.beta.kubernetes.io/zone: old"), POD, of_slice("a", "{addresses: [10.0.0.1], targetRef: {kind: Pod, name: p}}"))
    assert one.locality == Locality("", "old")


def test_a_snapshot_of_the_same_is_the_same():
    """A node's place makes another workload once, and not at each look."""
    from control.kinds.store import Store

    store = Store()
    texts = [NODE.format("topology.kubernetes.io/region: eu"), POD, SERVICE, of_slice("a", "{addresses: [10.0.0.1], targetRef: {kind: Pod, name: p}}")]
    first = snapshot(*texts, store=store)
    second = snapshot(*texts, store=store, before=first)
    assert second.config is first.config
    assert second.endpoints is first.endpoints
    assert second.workloads["default", "p"] is first.workloads["default", "p"]


def test_what_a_pod_says_of_its_sidecar():
    from control.kinds import registry

    def pod(annotation: str) -> dict:
        meta = {"name": "p", "annotations": {"meshproxy/sidecar": annotation}}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {}, "status": {"podIP": "10.0.0.1"}}

    made, problems = registry.parse(pod("{inbound: [{port: 80, listen: 18080}], identity: true, httpProxy: 15001}"))
    assert problems == []
    assert (made.sidecar.inbound, made.sidecar.identity, made.sidecar.http_proxy) == ({80: 18080}, True, 15001)
    for text in ("{inbound: [{port: 80}]}", "{inbound: 1}", "[]", "{", "{outbond: []}"):
        made, problems = registry.parse(pod(text), pruned=True)
        assert problems, text
        assert all(one.path.startswith("metadata.annotations[meshproxy/sidecar]") for one in problems)
