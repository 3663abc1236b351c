"""Mutual TLS and access between sidecars, ours and real Envoys: our authority, our agents, our control plane."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from meshproxy.api import spiffe
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, fetch, write
from tests.e2e.proxy import Proxy, wait_until
from tests.e2e.test_mtls import Mesh as Authority

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: api}
spec: {selector: {app: api}, ports: [{name: http, port: 80, targetPort: http}]}
"""
STRICT = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: all}, spec: {mtls: {mode: STRICT}}}"


def access(spec: str) -> str:
    return f"{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: api}}, spec: {spec}}}"


class Mesh:
    """`web` and `other` call `api`, each with a sidecar. `kinds`: of the sidecar of `api`, and of the others; `identities`: flags for its bootstrap."""

    def __init__(self, work: Path, identities: dict[str, list[str]], kinds: tuple[str, str]) -> None:
        self.work = work
        self.folder = work / "mesh"
        self.folder.mkdir()
        self.ports = Ports()
        self.service = Service("api")
        self.inbound = self.ports.take()
        self.callers = {"web": self.ports.take(), "other": self.ports.take()}
        write(self.folder, "api.yaml", SERVICE + "---\n" + self.workload("api", f"inbound: [{{port: {self.service.port}, listen: {self.inbound}}}]"))
        for name, port in self.callers.items():
            write(self.folder, f"{name}.yaml", self.workload(name, f"outbound: [{{host: api, port: 80, listen: {port}}}]"))
        self.control = ControlPlane(self.folder, work, flags=["--trust-domain", "mesh.test"])
        self.control.start()
        self.proxies = []
        for name, flags in identities.items():
            (work / name).mkdir()
            kind = kinds[0] if name == "api" else kinds[1]
            command = [envoy_binary() or "envoy", "--disable-hot-restart"] if kind == "envoy" else None
            bootstrap = self.control.bootstrap(name, *flags)
            self.proxies.append(Proxy(work / name, bootstrap, "--concurrency", "1", "-l", "error", command=command))

    def workload(self, name: str, sidecar: str) -> str:
        return f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec: {{serviceAccount: {name}, ports: {{http: {self.service.port if name == "api" else 1}}}, sidecar: {{identity: true, {sidecar}}}}}
"""

    def write(self, name: str, text: str) -> None:
        write(self.folder, name, text)

    def call(self, caller: str) -> tuple[int, dict]:
        return fetch(self.callers[caller])

    def is_without_tls(self) -> bool:
        """Whether a request comes through, and not by mutual TLS."""
        status, seen = self.call("web")
        return status == 200 and "x-forwarded-client-cert" not in seen["headers"]

    def plain(self) -> int:
        """The status of a request past all sidecars of callers; 0 when the connection is not taken."""
        try:
            return fetch(self.inbound)[0]
        except OSError:
            return 0

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.__exit__()
        self.control.kill()
        self.service.close()
        self.ports.close()


@pytest.mark.parametrize("kinds", [("envoy", "envoy"), ("ours", "envoy"), ("envoy", "ours"), ("ours", "ours")], ids="-".join)
async def test_mutual_tls_and_access(tmp_path, kinds):
    """Real Envoys have agents, ours get their certificates themselves."""
    async with Authority(tmp_path, 3600) as authority:
        identities = {}
        for name in ("api", "web", "other"):
            identity = spiffe.workload("mesh.test", "default", name)
            if kinds[name != "api"] == "envoy":
                identities[name] = ["--sds", await authority.agent(identity)]
            else:
                token = tmp_path / f"{name}.token"
                token.write_text(authority.tokens.create(identity))
                identities[name] = ["--authority", f"unix:{authority.front.path}", "--join-token-file", str(token)]
        await asyncio.to_thread(_story, tmp_path / "m", identities, kinds)


def _story(work: Path, identities: dict[str, list[str]], kinds: tuple[str, str]) -> None:
    work.mkdir()
    mesh = Mesh(work, identities, kinds)
    try:
        wait_until(lambda: mesh.call("web")[0] == 200)
        identity = mesh.call("web")[1]["headers"]["x-forwarded-client-cert"]
        assert "URI=spiffe://mesh.test/ns/default/sa/web" in identity
        assert mesh.plain() == 200  # by default a port takes both

        mesh.write("strict.yaml", STRICT)
        wait_until(lambda: mesh.plain() == 0)
        assert mesh.call("web")[0] == 200

        mesh.write("access.yaml", access("{rules: [{from: [{source: {principals: [mesh.test/ns/default/sa/web]}}], to: [{operation: {methods: [GET]}}]}]}"))
        wait_until(lambda: mesh.call("other")[0] == 403)
        assert mesh.call("web")[0] == 200

        mesh.write("access.yaml", access("{}"))  # an ALLOW of nothing
        wait_until(lambda: mesh.call("web")[0] == 403)

        mesh.write("access.yaml", access("{action: DENY, rules: [{from: [{source: {serviceAccounts: [default/other]}}]}]}"))
        wait_until(lambda: mesh.call("web")[0] == 200)
        assert mesh.call("other")[0] == 403

        (mesh.folder / "access.yaml").unlink()
        mesh.write("strict.yaml", STRICT.replace("STRICT", "DISABLE"))
        wait_until(lambda: mesh.plain() == 200)
        wait_until(mesh.is_without_tls)
    finally:
        mesh.close()
