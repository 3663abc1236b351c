"""RequestAuthentication over the real Envoy and over our own sidecar: Istio's task about tokens, with keys of one's own and from a service of the mesh."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, fetch, write
from tests.e2e.proxy import Proxy, wait_until
from tests.jwt_help import jwks, token

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

ISSUER = "testing@secure.istio.io"
GOOD = token("rsa", iss=ISSUER, sub=ISSUER, groups=["group1", "group2"], scope="read write")
OTHERS = token("rsa", iss=ISSUER, sub=ISSUER, groups=["group3"])
FORGED = token("rsa2", iss=ISSUER, sub=ISSUER, header={"alg": "RS256", "kid": "rsa"})


class KeyServer:
    """Serves a key set."""

    def __init__(self) -> None:
        body = jwks("rsa").encode()
        served = self.served = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.append(self.path)
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def document(kind: str, name: str, spec: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})


class Mesh:
    """A service with a sidecar before it, a gateway before the sidecar, and a service that has keys."""

    def __init__(self, work: Path, kind: str) -> None:
        self.work, self.kind = work, kind
        self.folder = work / "mesh"
        self.folder.mkdir()
        self.ports = Ports()
        self.service, self.keys = Service("httpbin"), KeyServer()
        self.inbound, self.edge = self.ports.take(), self.ports.take()
        self.write(
            "mesh.yaml",
            f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: httpbin, labels: {{app: httpbin}}}}
spec:
  ports: {{http: {self.service.port}}}
  sidecar: {{inbound: [{{port: {self.service.port}, listen: {self.inbound}}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: keys}}
spec: {{selector: {{app: keys}}, ports: [{{name: http, port: 8000, targetPort: http}}]}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: keys, labels: {{app: keys}}}}
spec: {{ports: {{http: {self.keys.port}}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: httpbin}}
spec: {{selector: {{app: httpbin}}, ports: [{{name: http, port: 80, targetPort: http}}]}}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: gw}}
spec: {{selector: {{istio: ingressgateway}}, servers: [{{port: {{number: {self.edge}, name: http, protocol: HTTP}}, hosts: ['*']}}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: all}}
spec: {{hosts: ['*'], gateways: [gw], http: [{{route: [{{destination: {{host: httpbin}}}}]}}]}}
---
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: edge, labels: {{istio: ingressgateway}}}}
""",
        )
        self.control = ControlPlane(self.folder, work)
        self.control.start()
        self.proxies: list[Proxy] = []

    def write(self, name: str, text: str) -> None:
        write(self.folder, name, text)

    def sidecar(self, name: str) -> None:
        folder = self.work / name
        folder.mkdir()
        command = [envoy_binary() or "envoy", "--disable-hot-restart"] if self.kind == "envoy" else None
        self.proxies.append(Proxy(folder, self.control.bootstrap(name), "--concurrency", "1", "-l", "error", command=command))

    def status(self, value: str = "", port: int = 0, path: str = "/headers") -> int:
        """Of a request with a token, or without."""
        return fetch(port or self.inbound, path, **({"authorization": f"Bearer {value}"} if value else {}))[0]

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.__exit__()
        self.control.kill()
        self.service.close()
        self.keys.close()
        self.ports.close()


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


def require(*rules: dict[str, Any], action: str = "ALLOW") -> str:
    return document("AuthorizationPolicy", "require-jwt", {"selector": {"matchLabels": {"app": "httpbin"}}, "action": action, "rules": list(rules)})


def test_the_task_about_tokens(mesh):
    mesh.sidecar("httpbin")
    assert mesh.status() == 200
    rule = {"issuer": ISSUER, "jwks": jwks("rsa"), "outputPayloadToHeader": "x-payload", "outputClaimToHeaders": [{"header": "x-sub", "claim": "sub"}]}
    mesh.write("jwt.yaml", document("RequestAuthentication", "jwt-example", {"selector": {"matchLabels": {"app": "httpbin"}}, "jwtRules": [rule]}))
    wait_until(lambda: mesh.status("deadbeef") == 401)
    assert [mesh.status(value) for value in ("", GOOD, FORGED, token("rsa", iss="other"), token("rsa", iss=ISSUER, exp=1))] == [200, 200, 401, 401, 401]
    _, seen = fetch(mesh.inbound, authorization=f"Bearer {GOOD}", x_sub="forged")
    assert seen["headers"]["x-sub"] == ISSUER
    assert seen["headers"]["x-payload"] == GOOD.split(".")[1]
    assert "authorization" not in seen["headers"]

    mesh.write("access.yaml", require({"from": [{"source": {"requestPrincipals": [f"{ISSUER}/{ISSUER}"]}}]}))
    wait_until(lambda: mesh.status() == 403)
    assert [mesh.status(value) for value in ("", GOOD, OTHERS, FORGED)] == [403, 200, 200, 401]

    by_group = {"from": [{"source": {"requestPrincipals": ["*"]}}], "when": [{"key": "request.auth.claims[groups]", "values": ["group1"]}]}
    mesh.write("access.yaml", require(by_group))
    wait_until(lambda: mesh.status(OTHERS) == 403)
    assert [mesh.status(value) for value in ("", GOOD, OTHERS)] == [403, 200, 403]

    by_scope = {"when": [{"key": "request.auth.claims[scope]", "values": ["write"]}]}
    mesh.write("access.yaml", require(by_scope, action="DENY"))
    wait_until(lambda: mesh.status(OTHERS) == 200)
    assert [mesh.status(value) for value in ("", GOOD, OTHERS)] == [200, 403, 200]

    audited = require({"from": [{"source": {"notRequestPrincipals": ["*"]}}]}, action="AUDIT")
    mesh.write("access.yaml", audited)
    wait_until(lambda: mesh.status(GOOD) == 200)
    assert [mesh.status(value) for value in ("", GOOD, OTHERS)] == [200, 200, 200]


def test_keys_come_from_a_service_of_the_mesh(mesh):
    rule = {"issuer": ISSUER, "jwksUri": "http://keys:8000/jwks", "forwardOriginalToken": True, "fromHeaders": [{"name": "x-token"}]}
    lost = {"issuer": "lost", "jwksUri": "http://nowhere.test/jwks", "fromParams": ["token"]}
    mesh.write("jwt.yaml", document("RequestAuthentication", "jwt-example", {"jwtRules": [rule, lost]}))
    mesh.sidecar("httpbin")
    assert not mesh.keys.served
    status, seen = fetch(mesh.inbound, x_token=GOOD)
    assert (status, seen["headers"]["x-token"]) == (200, GOOD)
    fetched = list(mesh.keys.served)
    assert set(fetched) == {"/jwks"}
    assert len(fetched) == (2 if mesh.kind == "envoy" else 1)  # Envoy fetches for each provider that a requirement names
    assert fetch(mesh.inbound, x_token=FORGED)[0] == 401
    assert mesh.status(path=f"/?token={token('rsa', iss='lost')}") == 401  # nobody has its keys
    assert mesh.status() == 200
    assert mesh.keys.served == fetched


def test_at_a_gateway(mesh):
    at_edge = {"selector": {"matchLabels": {"istio": "ingressgateway"}}}
    rule = {"issuer": ISSUER, "jwks": jwks("rsa"), "forwardOriginalToken": True}
    mesh.write("jwt.yaml", document("RequestAuthentication", "edge", {**at_edge, "jwtRules": [rule]}))
    only = {**at_edge, "action": "DENY", "rules": [{"from": [{"source": {"notRequestPrincipals": ["*"]}}]}]}
    mesh.write("access.yaml", document("AuthorizationPolicy", "edge", only))
    mesh.sidecar("httpbin")
    mesh.sidecar("edge")
    assert [mesh.status(value, mesh.edge) for value in ("", GOOD, FORGED)] == [403, 200, 401]
    assert fetch(mesh.edge, authorization=f"Bearer {GOOD}")[1]["name"] == "httpbin"
    staff = {"match": [{"headers": {"@request.auth.claims.groups": {"exact": "group1"}}}], "directResponse": {"status": 418}}
    other = {"match": [{"withoutHeaders": {"@request.auth.claims[groups]": {"exact": "group3"}}}], "directResponse": {"status": 419}}
    spec = {"hosts": ["*"], "gateways": ["gw"], "http": [staff, other, {"directResponse": {"status": 420}}]}
    head = {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "all"}}
    (mesh.folder / "mesh.yaml").write_text(
        (mesh.folder / "mesh.yaml").read_text().replace("metadata: {name: all}", "metadata: {name: all, namespace: elsewhere}")
    )
    mesh.write("claims.yaml", json.dumps({**head, "spec": spec}))
    wait_until(lambda: mesh.status(GOOD, mesh.edge) == 418)
    assert [mesh.status(value, mesh.edge) for value in (GOOD, OTHERS, token("rsa", iss=ISSUER))] == [418, 420, 419]
