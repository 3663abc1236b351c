"""What DestinationRules and their like say of connections, over the real Envoy and over our own sidecar."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import fetch
from tests.e2e.proxy import PATIENCE, refused, wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


class Listening:
    """A server that notes what comes first on each connection, answers it if it was told with what, and keeps the connection."""

    def __init__(self, answer: bytes = b"") -> None:
        self.first: list[bytes] = []
        self._answer = answer
        self._held: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._held.append(connection)
            threading.Thread(target=self._note, args=(connection,), daemon=True).start()

    def _note(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            self.first.append(data)
            if self._answer:
                connection.sendall(self._answer)
        except OSError:
            pass

    def close(self) -> None:
        for one in (self._socket, *self._held):
            one.close()


@contextmanager
def listening(answer: bytes = b"") -> Iterator[Listening]:
    made = Listening(answer)
    try:
        yield made
    finally:
        made.close()


def service(name: str, protocol: str, port: int) -> str:
    """A Service and the one workload behind it; callers' port is 9000."""
    ports = f"[{{name: {protocol}, port: 9000, targetPort: {port}}}]"
    return f"""
{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{selector: {{app: {name}}}, ports: {ports}}}}}
---
{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: {name}, labels: {{app: {name}}}}}, spec: {{ports: {{main: {port}}}}}}}
"""


def policy(host: str, policy: str) -> str:
    return f"{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: {host}}}, spec: {{host: {host}, trafficPolicy: {policy}}}}}"


def caller(mesh: Mesh, host: str) -> int:
    """The port by which the workload `app`, whose sidecar is started, reaches a service."""
    listen = mesh.ports.take()
    spec = f"{{sidecar: {{outbound: [{{host: {host}, port: 9000, listen: {listen}}}]}}}}"
    mesh.write("app.yaml", f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: app, labels: {{app: app}}}}, spec: {spec}}}")
    mesh.sidecar("app")
    wait_until(lambda: not refused(listen))
    return listen


def send(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    connection.sendall(data)
    return connection


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0" + b"\0\0\x0e\1\5\0\0\0\1\x82\x86\x84\x41\x09localhost"  # GET / with all its headers


def test_requests_go_on_by_the_version_by_which_they_came(mesh):
    with listening(OK) as server:
        mesh.write("other.yaml", service("other", "http", server.port))
        mesh.write("rule.yaml", policy("other", "{connectionPool: {http: {useClientProtocol: true}}}"))
        port = caller(mesh, "other")
        assert fetch(port)[0] == 200
        assert server.first[0].startswith(b"GET / HTTP/1.1")
        with send(port, HTTP2):
            wait_until(lambda: len(server.first) == 2)
        assert server.first[1].startswith(b"PRI * HTTP/2.0")


def test_plain_connections_end_when_nothing_is_said(mesh):
    with listening(b"hello") as server:
        mesh.write("db.yaml", service("db", "tcp", server.port))
        mesh.write("rule.yaml", policy("db", "{connectionPool: {tcp: {idleTimeout: 200ms}}}"))
        with send(caller(mesh, "db"), b"hi") as connection:
            assert connection.recv(5) == b"hello"
            assert connection.recv(5) == b""


def test_plain_connections_do_not_last_for_ever(mesh):
    with listening(b"hello") as server:
        mesh.write("db.yaml", service("db", "tcp", server.port))
        mesh.write("rule.yaml", policy("db", json.dumps({"connectionPool": {"tcp": {"maxConnectionDuration": "200ms"}}})))
        with send(caller(mesh, "db"), b"hi") as connection:
            assert connection.recv(5) == b"hello"
            assert connection.recv(5) == b""


def test_who_calls_is_told_to_those_who_want_to_know(mesh):
    with listening(OK) as server:
        mesh.write("other.yaml", service("other", "http", server.port))
        mesh.write("rule.yaml", policy("other", "{proxyProtocol: {version: V1}}"))
        port = caller(mesh, "other")
        assert fetch(port)[0] == 200
        first = server.first[0].split(b" ")
        assert first[:4] == [b"PROXY", b"TCP4", b"127.0.0.1", b"127.0.0.1"]
        assert first[5].startswith(f"{port}\r\n".encode())


def test_others_add_listeners_to_a_gateway(mesh):
    own, added = mesh.ports.take(), mesh.ports.take()

    def api(kind: str, name: str, spec: str) -> str:
        return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: team}}, spec: {spec}}}"

    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {gateway.networking.k8s.io/gateway-name: g}}}")
    gateway = f"gatewayClassName: mesh, listeners: [{{name: a, port: {own}, protocol: HTTP}}]"
    head = api("Gateway", "g", "%s").replace("namespace: team", "namespace: default")
    mesh.write("gateway.yaml", head % f"{{{gateway}, allowedListeners: {{namespaces: {{from: All}}}}}}")
    of_set = f"{{parentRef: {{name: g, namespace: default}}, listeners: [{{name: a, port: {added}, protocol: HTTP}}]}}"
    rules = "rules: [{filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: /team}}}]}]"
    route = api("HTTPRoute", "r", f"{{parentRefs: [{{kind: ListenerSet, name: s}}], {rules}}}")
    mesh.write("team.yaml", f"{api('ListenerSet', 's', of_set)}\n---\n{route}")
    mesh.sidecar("edge")
    wait_until(lambda: not refused(added))
    assert fetch(added)[0] == 302
    assert fetch(own)[0] == 404
    mesh.write("gateway.yaml", head % f"{{{gateway}}}")  # nobody may, any more
    wait_until(lambda: refused(added))
    assert fetch(own)[0] == 404


def test_connections_by_the_address_to_which_they_go(mesh):
    port = mesh.ports.take()
    api = "apiVersion: networking.istio.io/v1"
    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}")
    servers = f"[{{port: {{number: {port}, name: tcp, protocol: TCP}}, hosts: ['*']}}]"
    gateway = f"{{{api}, kind: Gateway, metadata: {{name: g}}, spec: {{selector: {{istio: edge}}, servers: {servers}}}}}"

    def to(version: str) -> str:
        return f"route: [{{destination: {{host: reviews, subset: {version}, port: {{number: 9080}}}}}}]"

    tcp = f"[{{match: [{{destinationSubnets: [127.0.0.2, 127.1.0.0/16]}}], {to('v2')}}}, {{{to('v1')}}}]"
    mesh.write("gateway.yaml", f"{gateway}\n---\n{{{api}, kind: VirtualService, metadata: {{name: s}}, spec: {{hosts: ['*'], gateways: [g], tcp: {tcp}}}}}")
    mesh.sidecar("edge")
    wait_until(lambda: not refused(port))
    found = {}
    for address in ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.1.2.3"):
        with socket.create_connection((address, port), PATIENCE) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            found[address] = b'"name": "v2"' in connection.makefile("rb").read()
    assert found == {"127.0.0.1": False, "127.0.0.2": True, "127.0.0.3": False, "127.1.2.3": True}


def test_a_host_without_endpoints_is_found_by_its_name(mesh):
    mesh.write(
        "outside.yaml",
        "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: outside}, spec: {hosts: [localhost], addresses: [10.0.0.0/8], "
        f"ports: [{{name: http, number: {mesh.services['v2'].port}, protocol: HTTP}}]}}}}",
    )
    mesh.sidecar()
    wait_until(lambda: fetch(mesh.proxy_port, host=f"localhost:{mesh.services['v2'].port}")[0] == 200)
    assert fetch(mesh.proxy_port, host=f"localhost:{mesh.services['v2'].port}")[1]["name"] == "v2"
    assert fetch(mesh.proxy_port, host="localhost:1")[0] == 502


def test_bootstraps_have_what_patches_say(mesh):
    value = {"layered_runtime": {"layers": [{"name": "own", "static_layer": {"a.key": 7}}]}}
    patch = {"applyTo": "BOOTSTRAP", "patch": {"operation": "MERGE", "value": value}}
    spec = {"workloadSelector": {"labels": {"app": "web"}}, "configPatches": [patch]}
    mesh.write("patch.yaml", json.dumps({"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter", "metadata": {"name": "b"}, "spec": spec}))
    web = mesh.sidecar("web", "--documents", str(mesh.folder))
    assert fetch(mesh.port)[0] == 200
    assert json.loads(web.admin("GET", "/runtime")[1])["entries"]["a.key"]["final_value"] == "7"


def test_templates_of_paths_say_who_gets_in(mesh):
    spec = "{selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {paths: ['/shops/{*}/orders/{**}']}}]}]}"
    mesh.write("access.yaml", f"{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: a}}, spec: {spec}}}")
    mesh.sidecar()
    found = {path: fetch(mesh.inbound, path)[0] for path in ("/shops/a/orders/1/2?x", "/shops/a/orders/", "/shops/a/b/orders/1", "/shops//orders/1", "/")}
    assert found == {"/shops/a/orders/1/2?x": 200, "/shops/a/orders/": 200, "/shops/a/b/orders/1": 403, "/shops//orders/1": 403, "/": 403}


def test_connections_to_the_application_are_limited(mesh):
    spec = "{workloadSelector: {labels: {app: web}}, inboundConnectionPool: {http: {maxRequestsPerConnection: 1}, tcp: {maxConnections: 3}}}"
    mesh.write("limits.yaml", f"{{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {{name: limits}}, spec: {spec}}}")
    web = mesh.sidecar()
    name = f"inbound|{mesh.services['v1'].port}||"
    assert f"{name}::default_priority::max_connections::3" in web.admin("GET", "/clusters")[1].splitlines()
    assert [fetch(mesh.inbound)[0] for _ in range(3)] == [200] * 3
    wait_until(lambda: web.stat(f"cluster.{name}.upstream_cx_max_requests".replace("|", "[|]")) == 3)


def test_the_near_endpoints_of_a_service_go_first(mesh):
    for version, zone in (("v1", "a"), ("v2", "b")):
        text = (mesh.folder / f"{version}.yaml").read_text().replace("spec: {", f"spec: {{locality: eu/{zone}, ")
        mesh.write(f"{version}.yaml", text)
    mesh.write("web.yaml", (mesh.folder / "web.yaml").read_text().replace("spec:", "spec:\n  locality: eu/b"))
    mesh.sidecar()
    assert set(mesh.who(20)) == {"v1", "v2"}
    near = (mesh.folder / "reviews.yaml").read_text().replace("selector: {app: reviews}", "selector: {app: reviews}\n  trafficDistribution: PreferClose")
    mesh.write("reviews.yaml", near)
    wait_until(lambda: set(mesh.who(20)) == {"v2"})
    (mesh.folder / "v2.yaml").unlink()  # then those that are further away
    wait_until(lambda: set(mesh.who(20)) == {"v1"})


def test_requests_stay_in_their_zone_if_that_is_fair(mesh):
    for version, zone in (("v1", "a"), ("v2", "b")):
        text = (mesh.folder / f"{version}.yaml").read_text().replace("spec: {", f"spec: {{locality: eu/{zone}, ")
        mesh.write(f"{version}.yaml", text)
    mesh.write("web.yaml", (mesh.folder / "web.yaml").read_text().replace("spec:", "spec:\n  locality: eu/b"))
    beside = "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: beside, labels: {app: web}}, spec: {locality: eu/a, ports: {http: 1}}}"
    service = "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}}"
    mesh.write("beside.yaml", f"{beside}\n---\n{service}")
    web = mesh.sidecar("web", "--locality", "eu/b")
    assert set(mesh.who(20)) == {"v1", "v2"}
    name = "outbound|9080||reviews.default.svc.cluster.local"
    aware = "host: reviews\n  trafficPolicy: {loadBalancer: {zoneAwareLbSetting: {minClusterSize: 1}}}"  # each of two zones has half of callers and called
    mesh.write("reviews.yaml", (mesh.folder / "reviews.yaml").read_text().replace("host: reviews", aware))
    wait_until(lambda: set(mesh.who(20)) == {"v2"})
    assert set(mesh.who(10)) == {"v2"}
    wait_until(lambda: web.stat(f"cluster.{name}.lb_zone_routing_all_directly".replace("|", "[|]")) >= 10)
