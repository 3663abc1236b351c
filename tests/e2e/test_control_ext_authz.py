"""AuthorizationPolicies with the action CUSTOM over the real Envoy and over our own sidecar: Istio's task about external authorisation, by HTTP and by gRPC."""

from __future__ import annotations

import json
import socket
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.auth.v3 import external_auth_pb2

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import fetch
from tests.e2e.httpbin import Httpbin
from tests.polling import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

HEADER = "x-ext-authz"


class Authorizer:
    """As the server of Istio's sample: lets pass what has the header `x-ext-authz: allow`, and says so in another one. By HTTP and by gRPC."""

    def __init__(self) -> None:
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(("http", self.path))
                allowed = self.headers.get(HEADER) == "allow"
                self.send_response(200 if allowed else 403)
                self.send_header("x-ext-authz-check-result", "allowed" if allowed else "denied")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http_port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.grpc_port: int = self._reserved.getsockname()[1]
        self._grpc: Any = None

    def serve_grpc(self) -> None:
        """From here on by gRPC too: its threads would be in the way of a fork."""
        self._grpc = grpc.server(ThreadPoolExecutor(1))
        handler = grpc.unary_unary_rpc_method_handler(self._check, external_auth_pb2.CheckRequest.FromString, external_auth_pb2.CheckResponse.SerializeToString)
        self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": handler}),))
        assert self._grpc.add_insecure_port(f"127.0.0.1:{self.grpc_port}") == self.grpc_port
        self._grpc.start()

    def _check(self, request: external_auth_pb2.CheckRequest, context: grpc.ServicerContext) -> Any:
        http = request.attributes.request.http
        self.asked.append(("grpc", http.path))
        response = external_auth_pb2.CheckResponse()
        if not request.attributes.HasField("request") or http.headers.get(HEADER) == "allow":
            response.ok_response.headers.add().header.key = "x-ext-authz-check-result"
            response.ok_response.headers[0].header.value = "allowed"
            return response
        response.status.code = 7
        response.denied_response.status.code = 403
        return response

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        if self._grpc is not None:
            self._grpc.stop(None).wait()
        self._reserved.close()


class Mesh(Httpbin):
    """A service with a sidecar before it, and who decides."""

    def __init__(self, work: Path, kind: str) -> None:
        super().__init__(work, kind)
        self.authorizer = Authorizer()
        self.write(
            "authorizer.yaml",
            f"""
apiVersion: v1
kind: Service
metadata: {{name: ext-authz}}
spec: {{selector: {{app: ext-authz}}, ports: [{{name: http, port: 8000, targetPort: http}}, {{name: grpc, port: 9000, targetPort: grpc}}]}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: ext-authz, labels: {{app: ext-authz}}}}
spec: {{ports: {{http: {self.authorizer.http_port}, grpc: {self.authorizer.grpc_port}}}}}
""",
        )
        self.control.start()
        self.sidecar("httpbin")
        self.authorizer.serve_grpc()

    def mesh_config(self, **more: Any) -> None:
        host = "ext-authz.default.svc.cluster.local"
        providers = [
            {"name": "by-http", "envoyExtAuthzHttp": {"service": host, "port": 8000, "includeRequestHeadersInCheck": [HEADER], **more,
             "headersToUpstreamOnAllow": ["x-ext-authz-*"], "headersToDownstreamOnDeny": ["x-ext-authz-*"]}},
            {"name": "by-grpc", "envoyExtAuthzGrpc": {"service": host, "port": 9000}},
        ]  # fmt: skip
        head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n"
        self.write("config.yaml", head + textwrap.indent(json.dumps({"extensionProviders": providers}), "    ") + "\n")

    def policy(self, provider: str) -> None:
        spec = {"selector": {"matchLabels": {"app": "httpbin"}}, "action": "CUSTOM", "provider": {"name": provider},
                "rules": [{"to": [{"operation": {"paths": ["/headers"]}}]}]}  # fmt: skip
        document = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "ext-authz"}, "spec": spec}
        self.write("policy.yaml", json.dumps(document))

    def status(self, path: str = "/headers", **headers: str) -> int:
        return fetch(self.inbound, path, **headers)[0]

    def close(self) -> None:
        super().close()
        self.authorizer.close()


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_task_about_external_authorisation(mesh, way):
    assert mesh.status() == 200
    mesh.mesh_config()
    mesh.policy(f"by-{way}")
    wait_until(lambda: mesh.status(x_ext_authz="deny") == 403)
    status, seen = fetch(mesh.inbound, "/headers", x_ext_authz="allow")
    assert (status, seen["headers"]["x-ext-authz-check-result"]) == (200, "allowed")
    assert mesh.authorizer.asked[-1] == (way, "/headers")
    mesh.authorizer.asked.clear()
    assert mesh.status("/ip") == 200
    assert mesh.authorizer.asked == []


def test_who_is_not_there_lets_nobody_in(mesh):
    mesh.policy("nobody")
    wait_until(lambda: mesh.status() == 403)
    assert mesh.status("/ip") == 200
    assert mesh.authorizer.asked == []
    mesh.mesh_config()
    mesh.policy("by-http")
    wait_until(lambda: mesh.status(x_ext_authz="allow") == 200)
    assert mesh.status() == 403
