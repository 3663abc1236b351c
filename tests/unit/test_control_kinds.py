"""Documents of each kind: what is made of them, and what is said of mistakes."""

from __future__ import annotations

import textwrap

import pytest

from control.kinds.store import Store
from control.model.service import Locality, Protocol, Resolution
from control.model.snapshot import build


def load(text: str, store: Store | None = None, name: str = "a.yaml"):
    """The store after reading one file."""
    store = store or Store()
    store.put(name, textwrap.dedent(text).encode())
    store.settle()
    return store


def only(text: str):
    """The object of a text that must be right."""
    store = load(text)
    assert [str(trouble) for trouble in store.troubles] == []
    (value,) = store.objects.values()
    return value


def complaints(text: str) -> list[str]:
    """Path and reason of everything that is wrong."""
    return [f"{trouble.problem.path}: {trouble.problem.why}" for trouble in load(text).troubles]


SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec:
  clusterIP: 10.0.0.1
  selector: {app: reviews}
  ports:
  - {name: http, port: 80, targetPort: web}
  - {name: grpc-admin, port: 81, targetPort: 9000}
  - {name: redis, port: 82}
  - {name: dns, port: 53, protocol: UDP}
"""
TUNNEL = (
    "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: a, trafficPolicy: "
    "{tunnel: {targetHost: a.test, targetPort: 443, protocol: CONNECT}}}}"
)
VIRTUAL = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - route: [{destination: {host: reviews, subset: v1}}]
"""


def test_service():
    service = only(SERVICE)
    assert service.host == "reviews.shop.svc.cluster.local"
    assert service.addresses == ("10.0.0.1",)
    assert [(port.number, port.protocol, port.target) for port in service.ports] == [
        (80, Protocol.HTTP, "web"),
        (81, Protocol.GRPC, 9000),
        (82, Protocol.TCP, ""),
    ]


def test_external_name_is_resolved_by_dns():
    service = only(
        "{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {type: ExternalName, externalName: db.example.com, ports: [{port: 3306, name: tcp}]}}"
    )
    assert service.resolution is Resolution.DNS
    assert service.static[0].address == "db.example.com"


def test_service_entry_makes_a_service_of_each_host():
    made = only("""
        apiVersion: networking.istio.io/v1
        kind: ServiceEntry
        metadata: {name: two}
        spec:
          hosts: [a.example.com, b.example.com]
          resolution: STATIC
          ports: [{number: 443, name: https, protocol: HTTPS}, {number: 80, name: http, protocol: HTTP, targetPort: 8080}]
          endpoints: [{address: 192.0.2.1, ports: {https: 8443}, labels: {v: a}, locality: eu/eu-1/x, weight: 3}]
        """)
    assert [service.host for service in made] == ["a.example.com", "b.example.com"]
    snapshot = build({("", "", "default", "two"): made})
    (endpoint,) = snapshot.endpoints["b.example.com", 443]
    assert (endpoint.address, endpoint.port, endpoint.labels, endpoint.locality, endpoint.weight) == (
        "192.0.2.1",
        8443,
        (("v", "a"),),
        Locality("eu", "eu-1", "x"),
        3,
    )
    assert snapshot.endpoints["b.example.com", 80][0].port == 8080


def test_workloads_behind_a_service_by_selector_reached_through_their_sidecars():
    store = load(
        SERVICE
        + """
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: r1, namespace: shop, labels: {app: reviews, version: v1}}
spec:
  ports: {web: 9080}
  sidecar: {inbound: [{port: 9080, listen: 19080}]}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: r2, namespace: shop, labels: {app: reviews}}
spec: {address: 127.0.0.2, ports: {web: 9081}, healthy: false}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: other, namespace: elsewhere, labels: {app: reviews}}
"""
    )
    assert not store.troubles
    found = build(store.objects).endpoints["reviews.shop.svc.cluster.local", 80]
    assert [(one.address, one.port, one.healthy, one.workload) for one in found] == [
        ("127.0.0.1", 19080, True, "r1;shop;reviews;v1;Kubernetes"),
        ("127.0.0.2", 9081, False, "r2;shop;reviews;latest;Kubernetes"),
    ]


def test_endpoint_slices_and_the_labels_of_their_pods():
    store = load(
        SERVICE
        + """
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: reviews-x, namespace: shop, labels: {kubernetes.io/service-name: reviews}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], conditions: {ready: true}, zone: z1, targetRef: {kind: Pod, name: p1, namespace: shop}}
- {addresses: [10.1.0.2], conditions: {ready: false}}
---
apiVersion: v1
kind: Pod
metadata: {name: p1, namespace: shop, labels: {version: v1}, uid: x}
spec: {containers: [{name: c, image: i, ports: [{name: web, containerPort: 8080}]}]}
status: {podIP: 10.1.0.1, conditions: [{type: Ready, status: "True"}]}
"""
    )
    assert not store.troubles
    first, second = build(store.objects).endpoints["reviews.shop.svc.cluster.local", 80]
    assert (first.labels, first.locality.zone, first.healthy) == ((("version", "v1"),), "z1", True)
    assert (second.labels, second.healthy) == ((), False)


def test_endpoints_of_the_older_form():
    store = load(
        SERVICE
        + """
---
apiVersion: v1
kind: Endpoints
metadata: {name: reviews, namespace: shop}
subsets: [{addresses: [{ip: 10.1.0.1}], notReadyAddresses: [{ip: 10.1.0.2}], ports: [{name: http, port: 8080}]}]
"""
    )
    assert not store.troubles
    found = build(store.objects).endpoints["reviews.shop.svc.cluster.local", 80]
    assert [(one.address, one.healthy) for one in found] == [("10.1.0.1", True), ("10.1.0.2", False)]


def test_a_list_is_its_items():
    store = load("{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 1}]}}]}")
    assert [str(identity) for identity in store.objects] == ["Service default/a"]


@pytest.mark.parametrize(
    "text",
    [
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}, spec: {anything: 1}}",
        "{apiVersion: v1, kind: ReplicationController, metadata: {name: a}}",
        "{apiVersion: monitoring.coreos.com/v1, kind: ServiceMonitor, metadata: {name: a}}",
        "{apiVersion: kustomize.config.k8s.io/v1beta1, kind: Kustomization, resources: [a.yaml]}",
    ],
)
def test_what_is_for_others_is_passed_over(text):
    store = load(text)
    assert not store.troubles
    assert not store.objects


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", ": a document must be a mapping with apiVersion, kind and metadata"),
        ("{kind: Service, metadata: {name: a}}", "apiVersion: is needed"),
        ("{apiVersion: v1, kind: Service, metadata: {name: -}, spec: {}}", "metadata.name: '-' is not a name"),
        ("{apiVersion: v9, kind: Service, metadata: {name: a}}", "apiVersion: v9 is not one of v1"),
        ("{apiVersion: x.y/v1, kind: Z, metadata: {name: a}}", "kind: Z of x.y is not served by meshctl"),
        ("{apiVersion: v1, kind: Servcie, metadata: {name: a}}", "kind: Servcie of core is not served by meshctl; did you mean 'Service'?"),
        (
            "{apiVersion: networking.istio.io/v1, kind: virtualservices, metadata: {name: a}}",
            "kind: virtualservices of networking.istio.io is not served by meshctl; did you mean 'VirtualService'?",
        ),
        (
            "{apiVersion: networking.istio.o/v1, kind: VirtualService, metadata: {name: a}}",
            "kind: VirtualService of networking.istio.o is not served by meshctl; did you mean 'networking.istio.io' in apiVersion?",
        ),
        ("{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 0}]}}", "spec.ports[0].port: 0 is not within 1 to 65535"),
        ("{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {prots: []}}", "spec.prots: no such field; did you mean 'ports'?"),
        (VIRTUAL.replace("subset: v1", "subset: 5"), "spec.http[0].route[0].destination.subset: must be text, not 5"),
        (VIRTUAL.replace("- route", "- timeout: 5\n    route"), "spec.http[0].timeout: must be a duration such as 1.5s, not 5"),
        (VIRTUAL.replace("- route", "- match: [{uri: {regex: '['}}]\n    route"), "spec.http[0].match[0].uri.regex: no regular expression of RE2"),
        (VIRTUAL.replace("- route", "- redirect: {uri: /}\n    route"), "spec.http[0].redirect: there is 'route' already"),
        (
            "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: a, subsets: [{name: x}, {name: x}]}}",
            "spec.subsets[1].name: there are two subsets 'x'",
        ),
        (
            "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: a, trafficPolicy: {tunnel: {}}}}",
            "spec.trafficPolicy.tunnel.targetHost: is needed",
        ),
        (TUNNEL.replace("a.test", "'*.test'"), "spec.trafficPolicy.tunnel.targetHost: '*.test': one host is needed, no pattern"),
        (TUNNEL.replace("a.test", "a_b/c"), "spec.trafficPolicy.tunnel.targetHost: 'a_b/c' is no host"),
        (TUNNEL.replace("443", "0"), "spec.trafficPolicy.tunnel.targetPort: 0 is not within 1 to 65535"),
        (TUNNEL.replace("CONNECT", "SOCKS"), "spec.trafficPolicy.tunnel.protocol: 'SOCKS' is not one of"),
        (TUNNEL.replace("tunnel:", "proxyProtocol: {}, tunnel:"), "spec.trafficPolicy.tunnel: cannot go with proxyProtocol"),
        (
            TUNNEL.replace("{tunnel:", "{portLevelSettings: [{port: {number: 1}, tunnel:").replace("}}}}", "}}]}}}"),
            "spec.trafficPolicy.portLevelSettings[0].tunnel: no such field",
        ),
        (
            "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: a}, spec: {hosts: ['*.b'], resolution: DNS, ports: []}}",
            "spec.hosts[0]: '*.b' cannot be resolved by DNS",
        ),
        (
            "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: a}, spec: {hosts: [b], endpoints: [{address: 10.0.0.1}]}}",
            "spec.endpoints: cannot be with resolution NONE, by which connections go where they were meant to",
        ),
        (
            "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {sidecar: {httpProxy: 5, inbound: [{port: 1, listen: 5}]}}}",
            "spec.sidecar.httpProxy: the sidecar listens on 5 already",
        ),
        (
            "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {ports: {http: 0}}}",
            "spec.ports.http: 0 is not within 1 to 65535",  # nobody chooses it, without `run`
        ),
        (
            "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: a}, spec: {run: {command: [a, 1]}}}",
            "spec.run.command[1]: must be text, not 1",
        ),
        ("a: [", ": line "),
    ],
)
def test_mistakes_are_named_by_their_path(text, complaint):
    found = complaints(text)
    assert any(one.startswith(complaint) for one in found), found
    assert not load(text).objects


def test_messages_name_file_document_and_field():
    store = load(SERVICE + "---\n" + VIRTUAL.replace("hosts", "host"), name="mesh/reviews.yaml")
    assert "mesh/reviews.yaml: document 2 (VirtualService default/reviews): spec.host: no such field; did you mean 'hosts'?" in map(str, store.troubles)
    assert len(store.objects) == 1


def test_lines_of_errors_are_those_of_the_file():
    assert complaints("a: 1\n---\nb: ]\n---\n")[-1].startswith(": line 3")


def test_the_last_good_state_of_a_wrong_document_is_kept():
    store = load(SERVICE + "---\n" + VIRTUAL)
    before = dict(store.objects)
    load(SERVICE + "---\n" + VIRTUAL.replace("subset: v1", "subset: []"), store)
    assert store.objects == before
    assert "[its last good state is kept]" in str(store.troubles[0])
    load(SERVICE, store)
    assert [str(identity) for identity in store.objects] == ["Service shop/reviews"]


def test_what_a_document_that_cannot_be_read_may_have_been_is_kept():
    store = load(SERVICE + "---\n" + VIRTUAL)
    before = dict(store.objects)
    load(SERVICE.replace("10.0.0.1", "10.0.0.2") + "---\n" + VIRTUAL + " {", store)
    assert store.objects.keys() == before.keys()
    assert store.troubles
    assert next(value for identity, value in store.objects.items() if identity[1] == "Service").addresses == ("10.0.0.2",)


def test_a_file_that_cannot_be_read_keeps_its_objects_until_it_is_gone():
    store = load(SERVICE)
    store.put("a.yaml", b"\xff")
    assert not store.settle()
    assert len(store.objects) == 1
    store.remove("a.yaml")
    assert store.settle()
    assert not store.objects


def test_the_first_of_two_documents_of_one_object_counts():
    store = load(SERVICE)
    load(SERVICE.replace("10.0.0.1", "10.0.0.2"), store, "b.yaml")
    (service,) = store.objects.values()
    assert service.addresses == ("10.0.0.1",)
    assert str(store.troubles[0]).startswith("b.yaml: document 1 (Service shop/reviews): metadata.name: Service shop/reviews is in a.yaml already")


def test_a_wrong_document_takes_nothing_from_a_right_one_of_its_object():
    """A copy of a file, half edited, that sorts before it."""
    store = load(SERVICE, name="b.yaml")
    before = dict(store.objects)
    load(SERVICE.replace("clusterIP", "clusterIp"), store)
    assert store.objects == before
    assert [str(one) for one in store.troubles] == [
        "a.yaml: document 1 (Service shop/reviews): spec.clusterIp: no such field; did you mean 'clusterIP'?",
    ]
    load(SERVICE.replace("10.0.0.1", "10.0.0.2"), store)  # it counts from when it is right
    assert [one.addresses for one in store.objects.values()] == [("10.0.0.2",)]


def test_the_last_good_state_of_a_document_that_moved_and_went_wrong_is_kept():
    store = load(SERVICE, name="b.yaml")
    before = dict(store.objects)
    store.remove("b.yaml")
    load(SERVICE.replace("clusterIP", "clusterIp"), store)
    assert store.objects == before
    assert str(store.troubles[0]).endswith("[its last good state is kept]")
    store.remove("a.yaml")
    assert store.settle()
    assert not store.objects


def test_a_document_that_did_not_change_is_the_same_object():
    store = load(SERVICE + "---\n" + VIRTUAL)
    before = dict(store.objects)
    load("# moved down\n" + SERVICE + "---\n" + VIRTUAL, store)
    assert next(value for identity, value in store.objects.items() if identity[1] == "VirtualService") in before.values()


def test_endpoints_that_did_not_change_are_the_same_objects():
    store = load(SERVICE + "---\n{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: r, namespace: shop, labels: {app: reviews}}}")
    first = build(store.objects)
    second = build(store.objects, first)
    assert all(second.endpoints[key] is value for key, value in first.endpoints.items())


def test_templates_are_for_others_and_settings_of_proxies_are_not_passed_over():
    head = "apiVersion: networking.istio.io/v1, metadata: {name: a}"
    assert complaints(f"{{{head}, kind: WorkloadGroup, spec: {{template: {{serviceAccount: a}}}}}}") == []
    assert complaints(f"{{{head}, kind: ProxyConfig, spec: {{concurrency: 1}}}}") == ["kind: ProxyConfig of networking.istio.io is not served by meshctl"]
