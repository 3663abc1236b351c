"""RequestAuthentication over the real Envoy and over our own sidecar: Istio's task about tokens, with keys of one's own and from a service of the mesh."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import fetch
from tests.e2e.httpbin import Httpbin
from tests.jwt_help import jwks, token
from tests.polling import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

ISSUER = "testing@secure.istio.io"
GOOD = token("rsa", iss=ISSUER, sub=ISSUER, groups=["group1", "group2"], scope="read write")
OTHERS = token("rsa", iss=ISSUER, sub=ISSUER, groups=["group3"])
FORGED = token("rsa2", iss=ISSUER, sub=ISSUER, header={"alg": "RS256", "kid": "rsa"})


class KeyServer:
    """Serves a key set, and says as an issuer where it is."""

    def __init__(self) -> None:
        keys = self
        served = self.served = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.append(self.path)
                body = json.dumps(keys.metadata).encode() if "openid" in self.path else jwks("rsa").encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # who asked needs it no more
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.issuer = f"http://127.0.0.1:{self.port}"
        self.metadata = {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/discovered"}
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def document(kind: str, name: str, spec: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})


class Mesh(Httpbin):
    """A service with a sidecar before it, a gateway before the sidecar, and a service that has keys."""

    def __init__(self, work: Path, kind: str) -> None:
        super().__init__(work, kind)
        self.keys = KeyServer()
        self.edge = self.ports.take()
        self.write(
            "more.yaml",
            f"""
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
        self.control.start()

    def status(self, value: str = "", port: int = 0, path: str = "/headers") -> int:
        """Of a request with a token, or without."""
        return fetch(port or self.inbound, path, **({"authorization": f"Bearer {value}"} if value else {}))[0]

    def close(self) -> None:
        super().close()
        self.keys.close()


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
    # Envoy fetches for each provider that a requirement names, and hears no more of the second when the first has answered.
    assert len(fetched) in ((1, 2) if mesh.kind == "envoy" else (1,))
    assert fetch(mesh.inbound, x_token=FORGED)[0] == 401
    assert mesh.status(path=f"/?token={token('rsa', iss='lost')}") == 401  # nobody has its keys
    assert mesh.status() == 200
    assert mesh.keys.served == fetched


def test_an_issuer_is_asked_where_its_keys_are(mesh):
    """By the control plane, which tells proxies; as it does for keys whose host is no service of the mesh."""
    issuer, where = mesh.keys.issuer, f"{mesh.keys.issuer}/keys"
    rules = [{"issuer": issuer}, {"issuer": ISSUER, "jwksUri": where, "fromHeaders": [{"name": "x-token"}]}, {"issuer": "http://no-issuer.invalid"}]
    mesh.write("jwt.yaml", document("RequestAuthentication", "jwt-example", {"jwtRules": rules}))
    mesh.sidecar("httpbin")
    good, lost = token("rsa", iss=issuer), token("rsa", iss="http://no-issuer.invalid")
    wait_until(lambda: mesh.status(good) == 200)
    assert [mesh.status(value) for value in ("", token("rsa2", iss=issuer, header={"alg": "RS256", "kid": "rsa"}), lost)] == [200, 401, 401]
    wait_until(lambda: fetch(mesh.inbound, x_token=GOOD)[0] == 200)
    assert fetch(mesh.inbound, x_token=FORGED)[0] == 401
    assert sorted(mesh.keys.served) == ["/.well-known/openid-configuration", "/discovered", "/keys"], "only the control plane has asked"
    assert "keys of issuer http://no-issuer.invalid: http://no-issuer.invalid/.well-known/openid-configuration: " in mesh.control.log()
    assert mesh.control.ask("diff", str(mesh.folder)) == []

    mesh.control.kill()
    mesh.control.start()  # it has asked before anybody is told
    wait_until(lambda: mesh.control.status("httpbin.default")["LDS"] == "SYNCED")
    assert mesh.status(good) == 200

    mesh.control.kill()
    mesh.keys.metadata["issuer"] = "http://another.test"
    mesh.control.start()
    wait_until(lambda: mesh.status(good) == 401)  # nobody knows what the keys were
    assert "is about another issuer, 'http://another.test'; none of its tokens is good" in mesh.control.log()


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
