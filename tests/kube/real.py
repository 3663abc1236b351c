"""The real API server: etcd and kube-apiserver as processes, where KUBEBUILDER_ASSETS says they are, as for envtest. `.ci/kube-apiserver` builds them."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx

from tests.differential.pki import Authority
from tests.e2e.control_plane import Ports
from tests.polling import wait_until

WHY_NOT = "NO KUBE-APISERVER: set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver (.ci/kube-apiserver makes one)"
_PATIENCE = 120.0
_AUDIT = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived", "ResponseStarted"], "rules": [{"level": "Metadata"}]}


def assets() -> Path | None:
    """The folder with the programs."""
    found = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/usr/local/kubebuilder/bin")
    return found if all((found / name).exists() for name in ("etcd", "kube-apiserver")) else None


class RealApiServer:
    """As MemoryApiServer, as far as tests of both go."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._ports = Ports()
        self.port, self._etcd, self._peer = (self._ports.take() for _ in range(3))
        self._ports.close()  # neither of them shares ports
        folder = assets()
        assert folder is not None
        self._folder = folder
        self.crds = folder / "crds"
        (work / "tokens.csv").write_text("admin-token,admin,admin,system:masters\nmeshctl-token,system:serviceaccount:mesh-system:meshctl,meshctl\n")
        self.clients = Authority(work, "clients")
        (work / "audit.yaml").write_text(json.dumps(_AUDIT))
        subprocess.run(["openssl", "genrsa", "-out", str(work / "sa.key"), "2048"], check=True, capture_output=True)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._spawn(
            "etcd", "--data-dir", str(work / "etcd"), "--listen-client-urls", self._etcd_url, "--advertise-client-urls", self._etcd_url,
            "--listen-peer-urls", f"http://127.0.0.1:{self._peer}", "--log-level", "error", "--unsafe-no-fsync",
        )  # fmt: skip
        self.start()

    @property
    def _etcd_url(self) -> str:
        return f"http://127.0.0.1:{self._etcd}"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def authority(self) -> Path:
        return self.work / "certs" / "apiserver.crt"

    def start(self) -> None:
        """Serve, on the same port as before."""
        self._spawn(
            "kube-apiserver", "--etcd-servers", self._etcd_url, "--secure-port", str(self.port), "--bind-address", "127.0.0.1",
            "--cert-dir", str(self.work / "certs"), "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", str(self.work / "sa.key"), "--service-account-signing-key-file", str(self.work / "sa.key"),
            "--token-auth-file", str(self.work / "tokens.csv"), "--client-ca-file", str(self.work / "clients.pem"),
            "--authorization-mode", "RBAC", "--service-cluster-ip-range", "10.0.0.0/24",
            "--disable-admission-plugins", "ServiceAccount", "--allow-privileged",
            "--audit-policy-file", str(self.work / "audit.yaml"), "--audit-log-path", str(self.work / "audit.log"), "--audit-log-mode", "blocking-strict",
        )  # fmt: skip
        wait_until(self._ready, _PATIENCE)

    def stop(self) -> None:
        """End, with every connection."""
        self._kill("kube-apiserver")

    def close(self) -> None:
        self.stop()
        self._kill("etcd")

    def compact(self) -> None:
        """Forget what happened so far, also what the API server itself remembers, which ends with it."""
        self.stop()
        with httpx.Client(base_url=self._etcd_url) as etcd:
            key = base64.b64encode(b"/registry").decode()
            revision = etcd.post("/v3/kv/range", json={"key": key}).json()["header"]["revision"]
            etcd.post("/v3/kv/compaction", json={"revision": revision, "physical": True}).raise_for_status()
        self.start()

    def install(self, crds: list[dict[str, Any]]) -> None:
        """CustomResourceDefinitions, until they are served."""
        with httpx.Client(base_url=self.url, verify=False, headers={"authorization": "Bearer admin-token"}) as client:
            for one in crds:
                assert client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json=one).status_code == 201
            for one in crds:
                spec = one["spec"]
                path = f"/apis/{spec['group']}/{next(one['name'] for one in spec['versions'] if one['served'])}/{spec['names']['plural']}"
                wait_until(lambda path=path: client.get(path).status_code == 200, _PATIENCE)

    def uninstall(self, group: str, plural: str) -> None:
        with httpx.Client(base_url=self.url, verify=False, headers={"authorization": "Bearer admin-token"}) as client:
            client.delete(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.{group}")

    def asked_by(self, user: str) -> list[dict[str, Any]]:
        """What somebody asked so far, and whether he might: events of audit.k8s.io/v1, one for each request that has ended."""
        found = [json.loads(line) for line in (self.work / "audit.log").read_text().splitlines()]
        return [one for one in found if one["user"].get("username") == user]

    def _ready(self) -> bool:
        assert self._processes["kube-apiserver"].poll() is None, (self.work / "kube-apiserver.log").read_text()[-3000:]
        if not self.authority.exists():
            return False
        try:
            return httpx.get(f"{self.url}/readyz", verify=False, headers={"authorization": "Bearer admin-token"}).status_code == 200
        except httpx.HTTPError:
            return False

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self.work / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen([str(self._folder / name), *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _kill(self, name: str) -> None:
        process = self._processes[name]
        if process.poll() is None:
            process.kill()
        process.wait()
