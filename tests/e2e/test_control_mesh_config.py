"""What a MeshConfig says of all proxies, over the real Envoy and over our own sidecar."""

from __future__ import annotations

import json
import socket

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import fetch
from tests.e2e.proxy import PATIENCE, wait_until
from tests.e2e.test_control_mtls import mesh_config
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]
DENY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: %s}
spec: {action: DENY, rules: [{to: [{operation: {paths: [/admin/x]}}]}]}
"""


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


def test_paths_and_policies_of_the_mesh(mesh):
    mesh.write("deny.yaml", DENY % "default")
    mesh.sidecar()

    def seen(*paths: str) -> list[int]:
        return [fetch(mesh.inbound, path)[0] for path in paths]

    paths = "/admin/x", "/admin/y/../x", "//admin//x", "/admin%2fx"
    wait_until(lambda: seen(*paths) == [403, 403, 200, 200])
    for word, expected in (
        ("MERGE_SLASHES", [403, 403, 403, 200]),
        ("DECODE_AND_MERGE_SLASHES", [403, 403, 403, 403]),
        ("NONE", [403, 200, 200, 200]),
    ):
        mesh.write("config.yaml", mesh_config(f"pathNormalization: {{normalization: {word}}}"))
        wait_until(lambda expected=expected: seen(*paths) == expected)

    mesh.write("deny.yaml", DENY % "root")
    wait_until(lambda: seen("/admin/x") == [200])
    mesh.write("config.yaml", mesh_config("rootNamespace: root"))
    wait_until(lambda: seen("/admin/x") == [403])


def test_how_often_requests_are_tried(mesh):
    (mesh.folder / "v2.yaml").unlink()
    mesh.sidecar()
    service = mesh.services["v1"]

    def answer() -> int:
        service.statuses = [500, 500]
        try:
            return fetch(mesh.port)[0]
        finally:
            service.statuses = []

    wait_until(lambda: answer() == 500)
    mesh.write("config.yaml", mesh_config("defaultHttpRetryPolicy: {attempts: 2, retryOn: 5xx}"))
    wait_until(lambda: answer() == 200)
    assert [answer() for _ in range(5)] == [200] * 5
    mesh.write("config.yaml", mesh_config("defaultHttpRetryPolicy: {attempts: 1, retryOn: 5xx}"))
    wait_until(lambda: answer() == 500)
    assert [answer() for _ in range(5)] == [500] * 5


def test_who_stands_in_front_of_a_gateway(mesh):
    port = mesh.ports.take()
    server = f"{{port: {{number: {port}, name: http, protocol: HTTP}}, hosts: [a.test]}}"
    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}")
    head = "apiVersion: networking.istio.io/v1, kind"
    mesh.write("gateway.yaml", f"{{{head}: Gateway, metadata: {{name: g}}, spec: {{selector: {{istio: edge}}, servers: [{server}]}}}}")
    rules = "{hosts: [a.test], gateways: [g], http: [{route: [{destination: {host: reviews}}]}]}"
    mesh.write("rules.yaml", f"{{{head}: VirtualService, metadata: {{name: a}}, spec: {rules}}}")
    mesh.sidecar("edge")

    def client() -> str:
        """Whom the service is told, of who says to come from two others."""
        status, told = fetch(port, host="a.test", x_forwarded_for="1.1.1.1, 2.2.2.2", x_forwarded_client_cert="By=me")
        return f"{told['headers'].get('x-envoy-external-address', '')} {told['headers'].get('x-forwarded-client-cert', '')}" if status == 200 else str(status)

    wait_until(lambda: client() == "127.0.0.1 ")
    topology = "defaultConfig: {gatewayTopology: {numTrustedProxies: %d, forwardClientCertDetails: %s}}"
    mesh.write("config.yaml", mesh_config(topology % (1, "UNDEFINED")))
    wait_until(lambda: client() == "2.2.2.2 ")
    mesh.write("config.yaml", mesh_config(topology % (2, "ALWAYS_FORWARD_ONLY")))
    wait_until(lambda: client() == "1.1.1.1 By=me")

    def by_proxy_protocol() -> str:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as one:
            one.sendall(b"PROXY TCP4 9.9.9.9 127.0.0.1 1 2\r\nGET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: one.recv(65536), b""))
        body = answer.partition(b"\r\n\r\n")[2]
        return json.loads(body)["headers"]["x-forwarded-for"] if body.startswith(b"{") else ""

    assert by_proxy_protocol() == ""
    mesh.write("config.yaml", mesh_config("defaultConfig: {gatewayTopology: {proxyProtocol: {}}}"))
    wait_until(lambda: by_proxy_protocol() == "9.9.9.9")
