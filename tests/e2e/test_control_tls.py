"""xDS by mutual TLS: `meshctl serve --mtls-listen` and what `meshctl bootstrap` writes for it, with real Envoys and our own sidecar."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, fetch, write
from tests.e2e.proxy import PATIENCE, ROOT, Proxy, wait_until
from tests.e2e.test_authority import Meshctl, meshctl
from tests.e2e.web_and_api import DOCUMENTS, TEAPOT, Load

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]


class Mesh:
    """A control plane with an authority, which serves xDS by mutual TLS; `web` calls `api`."""

    def __init__(self, work: Path, *flags: str) -> None:
        self.work = work
        self.ports = Ports()
        self.service = Service("api")
        self.web = self.ports.take()
        folder = work / "mesh"
        folder.mkdir()
        write(folder, "mesh.yaml", DOCUMENTS.format(api=self.service.port, web=self.web))
        self.ca = str(work / "ca")
        self.socket = str(work / "ca.sock")
        words = ["--ca-dir", self.ca, "--ca-socket", self.socket, "--ca-user", f"{os.getuid()}=default/web", "--mtls-listen", "127.0.0.1:0"]
        self.control = ControlPlane(folder, work, flags=[*words, *flags])
        self.control.start()
        self.address = "127.0.0.1:" + re.search(r"mutual TLS on 127.0.0.1:(\d+)", self.control.log())[1]
        self.ended: list = []

    def sidecar(self, kind: str, account: str = "web", *, wait: bool = True) -> Proxy:
        """The sidecar of `web`, with a certificate of an account. Its agent, or it itself, shows a join token."""
        token = self.work / "token"
        token.write_text(meshctl("token", "create", f"default/{account}", "--ca-dir", self.ca))
        proof = ["--authority", f"unix:{self.socket}", "--join-token-file", str(token)]
        if kind == "envoy":
            path = str(self.work / "web.sock")
            agent = Meshctl(self.work, "agent", "--socket", path, *proof)
            self.ended.append(agent)
            wait_until(lambda: agent.alive() and Path(path).exists())
            flags = ["--sds", path]
        else:
            flags = proof
        made = meshctl("bootstrap", "web", "--server", self.address, "--tls", *flags)
        assert "ROOTCA" in made
        folder = self.work / "web"
        folder.mkdir()
        command = [envoy_binary() or "envoy", "--disable-hot-restart"] if kind == "envoy" else None
        proxy = Proxy(folder, made, "--concurrency", "1", "-l", "error", command=command, wait=wait)
        self.ended.append(proxy)
        return proxy

    def close(self) -> None:
        for one in reversed(self.ended):
            one.__exit__()
        self.control.kill()
        self.service.close()
        self.ports.close()


@pytest.fixture
def mesh(tmp_path):
    made = Mesh(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["envoy", "ours"])
def test_a_sidecar_with_its_certificate_gets_its_configuration(mesh, kind):
    proxy = mesh.sidecar(kind)
    assert fetch(mesh.web)[1]["name"] == "api"
    assert proxy.stat("cluster.xds-grpc.ssl.handshake") >= 1
    assert mesh.control.status("web.default")["CDS"] == "SYNCED"


@pytest.mark.parametrize("kind", ["envoy", "ours"])
def test_connections_are_made_anew_and_nobody_notices(tmp_path, kind):
    mesh = Mesh(tmp_path, "--certificate-life", "30s", "--max-connection-age", "1s")
    try:
        mesh.sidecar(kind)
        with Load(mesh.web) as load:
            wait_until(lambda: mesh.control.log().count("web.default has come") >= 3)
            write(tmp_path / "mesh", "rules.yaml", TEAPOT)
            wait_until(lambda: load.ruled)
        assert set(load.statuses) == {200}
        wait_until(lambda: {mesh.control.status("web.default")[one] for one in ("CDS", "EDS", "LDS", "RDS")} == {"SYNCED"})
    finally:
        mesh.close()


@pytest.mark.parametrize("kind", ["envoy", "ours"])
def test_a_certificate_of_somebody_else_gets_nothing(mesh, kind):
    mesh.sidecar(kind, "other", wait=False)
    wait_until(lambda: "spiffe://cluster.local/ns/default/sa/other may not have the configuration of web.default" in mesh.control.log())
    assert mesh.control.ask("proxy-status") == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", ".", "--listen", "0.0.0.0:0"], "--allow-plaintext"),
        (["serve", ".", "--listen", "[::]:0"], "--allow-plaintext"),
        (["serve", ".", "--mtls-listen", "127.0.0.1:0"], "--ca-dir"),
        (["serve", ".", "--ca-dir", "ca", "--mtls-listen", "127.0.0.1:0", "--certificate-life", "1h", "--max-connection-age", "30m"], "at most a third"),
        (["bootstrap", "web", "--server", "control.example:15010"], "a proxy must say who it is"),
        (["bootstrap", "web", "--tls"], "a proxy must say who it is"),
        (["bootstrap", "web", "--for", "grpc", "--server", "control.example:15010"], "--allow-plaintext"),
    ],
)
def test_what_is_not_safe_needs_a_word(arguments, says):
    run = subprocess.run([sys.executable, "-m", "control", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False)
    assert run.returncode == 2
    assert says in run.stderr
