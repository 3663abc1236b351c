"""`meshctl serve --ca-dir`, `meshctl token create` and `meshctl agent` as processes: from an empty folder to a secret that a proxy can fetch."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys

import grpc
import pytest
import yaml

from control.ca import certificates
from control.ca.sds import TYPE_URL
from control.translate import mtls
from meshproxy.api import messages
from meshproxy.identity.svid import read_pem
from tests.e2e.proxy import PATIENCE, ROOT, Proxy, wait_until
from tests.e2e.test_mtls import cluster

pytestmark = pytest.mark.slow
SECRET = "envoy.extensions.transport_sockets.tls.v3.Secret"


class Meshctl:
    """One process."""

    def __init__(self, folder, *arguments: str) -> None:
        self.log = folder / f"{arguments[0]}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "control", *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def alive(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return True

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def meshctl(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "control", *arguments], capture_output=True, text=True, check=False, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def secret(path: str, name: str):
    """A secret from an agent, once it has one."""
    request = messages.known("envoy.service.discovery.v3.DiscoveryRequest")(type_url=TYPE_URL, resource_names=[name]).SerializeToString()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = channel.stream_stream("/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets")(timeout=PATIENCE)
        await call.write(request)
        response = messages.known("envoy.service.discovery.v3.DiscoveryResponse").FromString(await call.read())
        call.cancel()
    return messages.known(SECRET).FromString(response.resources[0].value)


def identity(found) -> str:
    return certificates.identity_of(read_pem(found.tls_certificate.certificate_chain.inline_bytes.decode())[0])


def test_from_an_empty_folder_to_a_secret(tmp_path):
    folder, ca, address = tmp_path / "mesh", str(tmp_path / "ca"), tmp_path / "address"
    folder.mkdir()
    user = f"{os.getuid()}=default/api"
    flags = ["--ca-dir", ca, "--trust-domain", "mesh.test", "--ca-socket", str(tmp_path / "ca.sock"), "--ca-user", user, "--certificate-life", "1h"]
    with Meshctl(tmp_path, "serve", str(folder), "--listen", "127.0.0.1:0", "--address-path", str(address), *flags) as serving:
        wait_until(lambda: serving.alive() and address.exists() and address.read_text())
        wait_until(lambda: serving.alive() and (tmp_path / "ca.sock").exists())
        # By the user that it is.
        with Meshctl(tmp_path, "agent", "--socket", str(tmp_path / "api.sock"), "--authority", f"unix:{tmp_path}/ca.sock") as agent:
            wait_until(lambda: agent.alive() and (tmp_path / "api.sock").exists())
            assert identity(asyncio.run(secret(str(tmp_path / "api.sock"), "default"))) == "spiffe://mesh.test/ns/default/sa/api"
            assert agent.end() == 0
        # By a token, which another process makes.
        (tmp_path / "token").write_text(meshctl("token", "create", "shop/web", "--ca-dir", ca))
        flags = ["--authority", f"unix:{tmp_path}/ca.sock", "--join-token-file", str(tmp_path / "token"), "--life", "10m"]
        with Meshctl(tmp_path, "agent", "--socket", str(tmp_path / "web.sock"), *flags) as agent:
            wait_until(lambda: agent.alive() and (tmp_path / "web.sock").exists())
            found = asyncio.run(secret(str(tmp_path / "web.sock"), "default"))
            roots = asyncio.run(secret(str(tmp_path / "web.sock"), "ROOTCA"))
        assert identity(found) == "spiffe://mesh.test/ns/shop/sa/web"
        leaf = read_pem(found.tls_certificate.certificate_chain.inline_bytes.decode())[0]
        assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds() == 600 + certificates.BACKDATED_S
        assert roots.validation_context.trusted_ca.inline_bytes.decode() == meshctl("certs", "--ca-dir", ca, "--bundle")
        assert serving.end() == 0
    assert not (tmp_path / "ca.sock").exists()


def test_a_sidecar_joins_by_tls(tmp_path):
    """What `meshctl bootstrap` writes is enough for a sidecar of ours: it verifies the control plane, shows its token, and has its certificate."""
    (tmp_path / "mesh").mkdir()
    ca, address = str(tmp_path / "ca"), tmp_path / "address"
    flags = ["--ca-dir", ca, "--trust-domain", "mesh.test", "--tls-listen", "127.0.0.1:0"]
    with Meshctl(tmp_path, "serve", str(tmp_path / "mesh"), "--listen", "127.0.0.1:0", "--address-path", str(address), *flags) as serving:
        wait_until(lambda: serving.alive() and address.exists() and address.read_text())
        tls = re.search(r"TLS on 127.0.0.1:(\d+)", serving.log.read_text())[1]
        (tmp_path / "roots.pem").write_text(meshctl("certs", "--ca-dir", ca, "--bundle"))
        (tmp_path / "token").write_text(meshctl("token", "create", "shop/web", "--ca-dir", ca))
        flags = ["--authority", f"localhost:{tls}", "--roots", str(tmp_path / "roots.pem"), "--join-token-file", str(tmp_path / "token")]
        made = yaml.safe_load(meshctl("bootstrap", "web.shop", "--server", address.read_text(), *flags))
        # Something that needs the certificate: the sidecar is ready once it is there.
        made["static_resources"]["clusters"].append(
            {**cluster("api", {"pipe": {"path": "/nowhere"}}), "transport_socket": mtls.upstream("api", (), http2=False)}
        )
        (tmp_path / "web").mkdir()
        with Proxy(tmp_path / "web", yaml.safe_dump(made), "--concurrency", "1") as sidecar:
            dump = json.loads(sidecar.admin("GET", "/config_dump?resource=dynamic_active_secrets")[1])["configs"]
        secrets = {one["name"]: one["secret"] for one in dump}
        chain = base64.b64decode(secrets["default"]["tls_certificate"]["certificate_chain"]["inline_bytes"]).decode()
        assert certificates.identity_of(read_pem(chain)[0]) == "spiffe://mesh.test/ns/shop/sa/web"
        assert set(secrets) == {"default", "ROOTCA"}
