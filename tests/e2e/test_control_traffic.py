"""Our control plane over the real Envoy and over our own sidecar, with real traffic: what documents say is what happens."""

from __future__ import annotations

import http.client
import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, fetch, write
from tests.e2e.proxy import PATIENCE, Proxy, refused, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

REVIEWS = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 9080, targetPort: http}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
"""


def workload(version: str, port: int) -> str:
    return f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: reviews-{version}, labels: {{app: reviews, version: {version}}}}}
spec: {{ports: {{http: {port}}}}}
"""


def rules(http: str) -> str:
    """A VirtualService for reviews; `http` is the list of its rules, as YAML."""
    head = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: reviews}"
    return json.dumps({**yaml.safe_load(head + "}"), "spec": {"hosts": ["reviews"], "http": yaml.safe_load(http)}})


ALL_TO = "[{{route: [{{destination: {{host: reviews, subset: {}}}}}]}}]"


class Mesh:
    """A folder, a control plane over it, and the sidecar of `web`, which calls `reviews`."""

    def __init__(self, work: Path, kind: str) -> None:
        self.work = work
        self.kind = kind
        self.folder = work / "mesh"
        self.folder.mkdir()
        self.ports = Ports()
        self.services = {version: Service(version) for version in ("v1", "v2")}
        self.port, self.proxy_port, self.inbound = self.ports.take(), self.ports.take(), self.ports.take()
        self.write("reviews.yaml", REVIEWS)
        for version, service in self.services.items():
            self.write(f"{version}.yaml", workload(version, service.port))
        self.write(
            "web.yaml",
            f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: web, labels: {{app: web}}}}
spec:
  ports: {{http: {self.services["v1"].port}}}
  sidecar:
    inbound: [{{port: {self.services["v1"].port}, listen: {self.inbound}}}]
    httpProxy: {self.proxy_port}
    outbound: [{{host: reviews, port: 9080, listen: {self.port}}}]
""",
        )
        self.control = ControlPlane(self.folder, work, flags=self.control_flags())
        self.control.start()
        self.proxies: list[Proxy] = []

    def write(self, name: str, text: str) -> None:
        write(self.folder, name, text)

    def control_flags(self) -> list[str]:
        """More than the folder."""
        return []

    def sidecar(self, name: str = "web", *flags: str) -> Proxy:
        """The sidecar of a workload; it is ready when it has all its configuration."""
        folder = self.work / name
        folder.mkdir()
        command = [envoy_binary() or "envoy", "--disable-hot-restart"] if self.kind == "envoy" else None
        proxy = Proxy(folder, self.control.bootstrap(name, *flags), "--concurrency", "1", "-l", "error", command=command)
        self.proxies.append(proxy)
        return proxy

    def who(self, count: int = 1, **headers: str) -> Counter:
        """Which versions answer so many requests."""
        return Counter(fetch(self.port, **headers)[1].get("name") for _ in range(count))

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.__exit__()
        self.control.kill()
        for service in self.services.values():
            service.close()
        self.ports.close()


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("flags", [[], ["--sotw"]], ids=["delta", "sotw"])
def test_traffic_follows_the_folder(mesh, flags):
    web = mesh.sidecar("web", *flags)
    assert set(mesh.who(20)) == {"v1", "v2"}  # no rules: least request over all

    mesh.write("rules.yaml", rules(ALL_TO.format("v2")))
    wait_until(lambda: set(mesh.who(20)) == {"v2"})
    assert set(mesh.who(10)) == {"v2"}

    jason = """
    - {match: [{headers: {end-user: {exact: jason}}}], route: [{destination: {host: reviews, subset: v2}}]}
    - {route: [{destination: {host: reviews, subset: v1}}]}
    """
    mesh.write("rules.yaml", rules(jason))
    wait_until(lambda: set(mesh.who(20)) == {"v1"})
    assert set(mesh.who(5, end_user="jason")) == {"v2"}

    (mesh.folder / "rules.yaml").unlink()
    (mesh.folder / "v1.yaml").unlink()  # an endpoint less
    wait_until(lambda: set(mesh.who(20)) == {"v2"})

    status = mesh.control.status("web.default")
    assert [status[column] for column in ("CDS", "EDS", "LDS", "RDS")] == ["SYNCED"] * 4
    assert web.stat("runtime.deprecated_feature_use") == 0


def test_faults_headers_rewrites_and_redirects_happen(mesh):
    mesh.sidecar()
    to_v1 = "route: [{destination: {host: reviews, subset: v1}}]"
    mesh.write("rules.yaml", rules(f"[{{fault: {{abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}, {to_v1}}}]"))
    wait_until(lambda: fetch(mesh.port)[0] == 418)
    mesh.write(
        "rules.yaml",
        rules(
            f"[{{timeout: 30s, fault: {{delay: {{fixedDelay: 100s, percentage: {{value: 0}}}}}}, {to_v1}, headers: {{request: {{set: {{x-mesh: yes-1}}}}}}}}]"
        ),
    )
    wait_until(lambda: fetch(mesh.port)[0] == 200)
    assert fetch(mesh.port)[1]["headers"]["x-mesh"] == "yes-1"
    mesh.write("rules.yaml", rules(f"[{{match: [{{uri: {{prefix: /old}}}}], rewrite: {{uri: /new}}, {to_v1}}}, {{redirect: {{uri: /elsewhere}}}}]"))
    wait_until(lambda: fetch(mesh.port)[0] == 301)
    assert fetch(mesh.port, "/old/x")[1]["path"] == "/new/x"


def test_retries_go_to_another_endpoint(mesh):
    mesh.sidecar()
    mesh.services["v1"].status = 503
    mesh.write("rules.yaml", rules("[{retries: {attempts: 3, retryOn: '503'}, route: [{destination: {host: reviews}}]}]"))
    wait_until(lambda: all(fetch(mesh.port)[0] == 200 for _ in range(10)))
    assert mesh.services["v1"].requests


def test_applications_may_use_the_sidecar_as_their_http_proxy(mesh):
    mesh.sidecar()
    for host in ("reviews:9080", "reviews.default:9080", "reviews.default.svc.cluster.local:9080"):
        assert fetch(mesh.proxy_port, host=host)[0] == 200
    assert fetch(mesh.proxy_port, host="elsewhere")[0] == 502
    assert fetch(mesh.inbound)[1]["name"] == "v1"


def test_from_sidecar_to_sidecar(mesh):
    listen, port = mesh.ports.take(), mesh.services["v1"].port
    (mesh.folder / "v2.yaml").unlink()
    mesh.write("v1.yaml", workload("v1", port).replace("spec: {", f"spec: {{sidecar: {{inbound: [{{port: {port}, listen: {listen}}}]}}, "))
    behind = mesh.sidecar("reviews-v1")
    mesh.sidecar("web")
    wait_until(lambda: fetch(mesh.port)[0] == 200)
    assert fetch(mesh.port)[1]["name"] == "v1"
    assert behind.stat(f"http.inbound_127.0.0.1_{listen}.downstream_rq_2xx") >= 2


def test_a_wrong_document_changes_nothing_for_anybody(mesh):
    mesh.write("rules.yaml", rules(ALL_TO.format("v2")))
    mesh.sidecar()
    mesh.write("rules.yaml", rules("[{route: [{destination: {host: reviews, subset: v1}}], timeuot: 1s}]"))
    wait_until(lambda: "rules.yaml: document 1 (VirtualService default/reviews): spec.http[0].timeuot" in mesh.control.log())
    (mesh.folder / "v1.yaml").unlink()
    wait_until(
        lambda: (
            len(
                mesh.control.ask("proxy-config", "endpoints", "web.default", "--name", "outbound|9080||reviews.default.svc.cluster.local")[0]["endpoints"][0][
                    "lb_endpoints"
                ]
            )
            == 1
        )
    )
    assert set(mesh.who(5)) == {"v2"}


def test_what_a_proxy_refuses_is_in_its_status_and_harms_nothing_else(mesh):
    mesh.sidecar()
    context = {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"}
    context["common_tls_context"] = {"validation_context": {"trusted_ca": {"filename": "/no/such/file"}}}
    patch = {"operation": "MERGE", "value": {"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context}}}
    spec = {"configPatches": [{"applyTo": "CLUSTER", "match": {"cluster": {"service": "other.default.svc.cluster.local"}}, "patch": patch}]}
    rule = {"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter", "metadata": {"name": "other"}, "spec": spec}
    service = "{apiVersion: v1, kind: Service, metadata: {name: other}, spec: {ports: [{name: http, port: 80}]}}"
    mesh.write("other.yaml", f"{service}\n---\n{json.dumps(rule)}")
    status = wait_until(lambda: (one := mesh.control.status("web.default"))["CDS"] == "ERROR" and one)
    assert "/no/such/file" in status["errors"]["CDS"]
    assert set(mesh.who(20)) == {"v1", "v2"}
    mesh.write("other.yaml", service)
    wait_until(lambda: mesh.control.status("web.default")["CDS"] == "SYNCED")


def test_the_control_plane_may_go_and_come_again(mesh):
    mesh.sidecar()
    mesh.control.kill()
    assert set(mesh.who(20)) == {"v1", "v2"}
    mesh.write("rules.yaml", rules(ALL_TO.format("v2")))
    mesh.control.start()
    wait_until(lambda: set(mesh.who(20)) == {"v2"})
    assert mesh.control.status("web.default")["RDS"] == "SYNCED"


def test_a_listener_goes_with_its_document_and_clusters_after_it(mesh):
    mesh.sidecar()
    assert set(mesh.who(10)) == {"v1", "v2"}
    (mesh.folder / "reviews.yaml").unlink()
    wait_until(
        lambda: not refused(mesh.inbound) and not mesh.control.ask("proxy-config", "routes", "web.default", "--name", "reviews.default.svc.cluster.local:9080")
    )
    wait_until(lambda: not [one for one in mesh.control.ask("proxy-config", "clusters", "web.default") if one["name"].startswith("outbound")])
    assert fetch(mesh.proxy_port, host="reviews:9080")[0] == 502


def test_it_ends_when_it_is_told_to(mesh):
    mesh.sidecar()
    mesh.control.process.send_signal(signal.SIGTERM)
    assert mesh.control.process.wait(30) == 0


def test_a_gateway_and_routes_of_the_gateway_api(mesh):
    port = mesh.ports.take()
    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}")
    servers = f"[{{port: {{number: {port}, name: http, protocol: HTTP}}, hosts: ['*.example.com']}}]"
    gateway = f"{{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {{name: g}}, spec: {{selector: {{istio: edge}}, servers: {servers}}}}}"
    to_reviews = "[{match: [{uri: {prefix: /r}}], route: [{destination: {host: reviews, subset: v2}}]}]"
    rules_at_edge = "apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: edge}"
    mesh.write("gateway.yaml", f"{gateway}\n---\n{{{rules_at_edge}, spec: {{hosts: [shop.example.com], gateways: [g], http: {to_reviews}}}}}")
    mesh.sidecar("edge")
    wait_until(lambda: not refused(port))
    wait_until(lambda: fetch(port, "/r", host="shop.example.com")[1].get("name") == "v2")
    assert fetch(port, "/r", host=f"shop.example.com:{port}")[0] == 200
    assert fetch(port, "/other", host="shop.example.com")[0] == 404
    assert fetch(port, "/r", host="elsewhere.com")[0] == 404

    mesh.sidecar("web")
    versions = (
        "{apiVersion: v1, kind: Service, metadata: {name: reviews-v1}, spec: {selector: {version: v1}, ports: [{name: http, port: 80, targetPort: http}]}}"
    )
    parent = '{group: "", kind: Service, name: reviews}'
    head = "apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r}"
    backends = "[{name: reviews-v1, port: 80}]"
    mesh.write("route.yaml", f"{versions}\n---\n{{{head}, spec: {{parentRefs: [{parent}], rules: [{{backendRefs: {backends}}}]}}}}")
    wait_until(lambda: set(mesh.who(20)) == {"v1"})
    mesh.write("route.yaml", f"{{{head}, spec: {{parentRefs: [{parent}], rules: [{{backendRefs: {backends}}}]}}}}")
    wait_until(lambda: fetch(mesh.port)[0] == 500)  # a backend that is not there


def test_attributes_of_the_cookie_that_keeps_a_caller_with_its_endpoint(mesh):
    cookie = "{name: whom, ttl: 60s, path: /, attributes: [{name: SameSite, value: Strict}, {name: Secure}]}"
    rule = yaml.safe_load(REVIEWS.partition("---")[2])
    rule["spec"]["trafficPolicy"] = yaml.safe_load(f"{{loadBalancer: {{consistentHash: {{httpCookie: {cookie}}}}}}}")
    mesh.write("reviews.yaml", f"{REVIEWS.partition('---')[0]}---\n{json.dumps(rule)}")
    mesh.sidecar("web")
    connection = http.client.HTTPConnection("127.0.0.1", mesh.port, timeout=PATIENCE)
    connection.request("GET", "/")
    response = connection.getresponse()
    name = json.loads(response.read())["name"]
    made = response.headers["set-cookie"]
    connection.close()
    assert made.startswith("whom=")
    assert "SameSite=Strict" in made
    assert "Secure" in made
    assert set(mesh.who(10, cookie=made.partition(";")[0])) == {name}
