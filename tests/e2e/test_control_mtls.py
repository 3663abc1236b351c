"""Mutual TLS and access between sidecars, ours and real Envoys: our authority, our agents, our control plane."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from control.ca import certificates
from control.ca.agent import Agent
from meshproxy.api import spiffe
from meshproxy.identity.svid import Svid
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, fetch, write
from tests.e2e.proxy import PATIENCE, Proxy, wait_until
from tests.e2e.test_mtls import Mesh as Authority

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: api}
spec: {selector: {app: api}, ports: [{name: http, port: 80, targetPort: http}]}
"""
STRICT = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: all}, spec: {mtls: {mode: STRICT}}}"


def mesh_config(text: str) -> str:
    return f"{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: istio-system}}, data: {{mesh: '{text}'}}}}"


def refusal(port: int) -> str:
    """Why a caller with TLS 1.2, and without a certificate, is refused; "" if it is not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["istio"])
    try:
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE)):
            return ""
    except ssl.SSLError as error:
        return error.reason or str(error)


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
        assert await asyncio.to_thread(_story, tmp_path / "m", identities, kinds) == [200, 200]


def _story(work: Path, identities: dict[str, list[str]], kinds: tuple[str, str]) -> list[int]:
    """How a plain request and one of the mesh end when all of it has been seen, and TLS is off."""
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

        mesh.write("config.yaml", mesh_config("meshMTLS: {minProtocolVersion: TLSV1_3}"))
        wait_until(lambda: refusal(mesh.inbound) == "TLSV1_ALERT_PROTOCOL_VERSION")
        assert mesh.call("web")[0] == 200

        mesh.write("strict.yaml", STRICT.replace("all}", "all, namespace: mesh}"))  # it is for all where its namespace is the mesh's
        wait_until(lambda: mesh.plain() == 200)
        mesh.write("config.yaml", mesh_config("rootNamespace: mesh"))
        wait_until(lambda: mesh.plain() == 0)
        assert refusal(mesh.inbound) not in ("", "TLSV1_ALERT_PROTOCOL_VERSION")

        mesh.write("config.yaml", mesh_config("enableAutoMtls: false"))
        wait_until(mesh.is_without_tls)
        mesh.write("strict.yaml", STRICT)
        wait_until(lambda: mesh.call("web")[0] == 503)
        (mesh.folder / "config.yaml").unlink()
        wait_until(lambda: mesh.call("web")[0] == 200)

        mesh.write("access.yaml", access("{rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/web]}}], to: [{operation: {methods: [GET]}}]}]}"))
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
        return [mesh.plain(), mesh.call("web")[0]]
    finally:
        mesh.close()


class Given:
    """A certificate that does not change, as a source of agents."""

    def __init__(self, svid: Svid) -> None:
        self._svid = svid

    async def run(self, publish: Callable[[Svid], None]) -> None:
        publish(self._svid)


def given(names: dict[str, str]) -> dict[str, Given]:
    """By workload, a certificate for it in a trust domain; one root has signed them all."""
    now, life = time.time(), 3600.0
    root_key = certificates.new_key()
    root = certificates.make_root(root_key, "mesh.test", now, life)
    made = {}
    for name, trust_domain in names.items():
        signer, key = certificates.new_key(), certificates.new_key()
        intermediate = certificates.make_intermediate(signer, root, root_key, trust_domain, now, life)
        identity = spiffe.workload(trust_domain, "default", name)
        made[name] = Given(Svid(identity, key, (certificates.make_leaf(key.public_key(), intermediate, signer, identity, now, life), intermediate), (root,)))
    return made


@pytest.mark.parametrize("aliased", ["web", "api"])
@pytest.mark.parametrize("kinds", [("ours", "envoy"), ("envoy", "ours")], ids="-".join)
async def test_an_alias_of_the_trust_domain(tmp_path, kinds, aliased):
    """Who calls, or who is called, has an identity of the old trust domain; that of a third one is taken by nobody."""
    async with contextlib.AsyncExitStack() as ending:
        flags = {}
        for name, source in given({"api": "mesh.test", "web": "mesh.test", "other": "strange.test"} | {aliased: "old.test"}).items():
            agent = Agent(source, str(tmp_path / f"{name}.sock"))
            await agent.start()
            ending.push_async_callback(agent.stop)
            flags[name] = ["--sds", str(tmp_path / f"{name}.sock")]
        assert await asyncio.to_thread(_story_of_an_alias, tmp_path / "m", flags, kinds, aliased) == [403, 503]


def _story_of_an_alias(work: Path, identities: dict[str, list[str]], kinds: tuple[str, str], aliased: str) -> list[int]:
    """What the caller and the stranger get when the caller is denied by its service account."""
    work.mkdir()
    mesh = Mesh(work, identities, kinds)
    try:
        mesh.write("strict.yaml", STRICT)
        wait_until(lambda: mesh.plain() == 0)
        assert [mesh.call(name)[0] for name in ("web", "other")] == [503, 503]

        mesh.write("alias.yaml", mesh_config("trustDomainAliases: [old.test]"))
        wait_until(lambda: mesh.call("web")[0] == 200)
        certificate = mesh.call("web")[1]["headers"]["x-forwarded-client-cert"]
        assert ("URI=spiffe://old.test/ns/default/sa/web" in certificate) == (aliased == "web")
        assert mesh.call("other")[0] == 503

        mesh.write("access.yaml", access("{action: DENY, rules: [{from: [{source: {serviceAccounts: [default/web]}}]}]}"))
        wait_until(lambda: mesh.call("web")[0] == 403)
        return [mesh.call(name)[0] for name in ("web", "other")]
    finally:
        mesh.close()
