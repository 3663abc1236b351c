"""Two control planes over one folder, with one authority: a proxy that loses one goes to the other, and nobody who sends requests notices."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import ControlPlane, Ports, Service, write
from tests.e2e.proxy import Proxy, wait_until
from tests.e2e.test_authority import meshctl
from tests.e2e.web_and_api import DOCUMENTS, TEAPOT, Load

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

CHANGES = ("cluster_added", "cluster_modified", "cluster_removed")


class Mesh:
    """Two replicas and the sidecar of `web`, which calls `api`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.ports = Ports()
        self.service = Service("api")
        self.web = self.ports.take()
        self.folder = work / "mesh"
        self.folder.mkdir()
        write(self.folder, "mesh.yaml", DOCUMENTS.format(api=self.service.port, web=self.web))
        self.ca = str(work / "ca")
        self.replicas = []
        for name in ("one", "two"):
            (work / name).mkdir()
            flags = ["--ca-dir", self.ca, "--mtls-listen", "127.0.0.1:0", "--tls-listen", "127.0.0.1:0"]
            replica = ControlPlane(self.folder, work / name, flags=flags)
            replica.start()
            self.replicas.append(replica)
        self.proxies: list[Proxy] = []

    def start(self, kind: str, *flags: str) -> Proxy:
        made = meshctl("bootstrap", "web", *flags)
        (self.work / "web").mkdir()
        command = [envoy_binary() or "envoy", "--disable-hot-restart"] if kind == "envoy" else None
        self.proxies.append(Proxy(self.work / "web", made, "--concurrency", "1", "-l", "error", command=command))
        return self.proxies[-1]

    def tls(self, word: str) -> list[str]:
        """Where the replicas serve by TLS or mutual TLS."""
        return ["127.0.0.1:" + re.search(rf" {word} on 127.0.0.1:(\d+)", replica.log())[1] for replica in self.replicas]

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.__exit__()
        for replica in self.replicas:
            replica.kill()
        self.service.close()
        self.ports.close()


@pytest.fixture
def mesh(tmp_path):
    made = Mesh(tmp_path)
    yield made
    made.close()


def synced(replica: ControlPlane) -> bool:
    return [one["name"] for one in replica.ask("proxy-status") if {one[type] for type in ("CDS", "EDS", "LDS", "RDS")} == {"SYNCED"}] == ["web.default"]


@pytest.mark.parametrize(("kind", "flags"), [("envoy", []), ("ours", []), ("envoy", ["--sotw"]), ("ours", ["--sotw"])], ids=lambda one: "".join(one) or "delta")
def test_a_replica_is_killed_under_load(mesh, kind, flags):
    servers = [word for replica in mesh.replicas for word in ("--server", replica.address)]
    proxy = mesh.start(kind, *servers, *flags)
    wait_until(lambda: any(map(synced, mesh.replicas)))
    holds = next(replica for replica in mesh.replicas if synced(replica))
    other = next(replica for replica in mesh.replicas if replica is not holds)
    changes = {name: proxy.stat(f"cluster_manager.{name}") for name in CHANGES}
    assert changes["cluster_added"] > 1
    with Load(mesh.web) as load:
        wait_until(lambda: load.statuses[200])
        holds.kill()
        wait_until(lambda: synced(other))
        assert {name: proxy.stat(f"cluster_manager.{name}") for name in CHANGES} == changes  # it had all of it
        write(mesh.folder, "rules.yaml", TEAPOT)  # and goes on to learn what is new
        wait_until(lambda: "x-rules" in str(other.ask("proxy-config", "routes", "web.default")))
        holds.start()  # at its address; who has left it does not need to come back
        other.kill()
        wait_until(lambda: synced(holds))
        seen = load.statuses[200]
        wait_until(lambda: load.statuses[200] > seen + 10)
    assert set(load.statuses) == {200}


def test_replicas_share_an_authority(mesh):
    """A sidecar of ours that joins one of them is known to the other: its token is spent, its certificate good, and renewed by either."""
    (mesh.work / "roots.pem").write_text(meshctl("certs", "--ca-dir", mesh.ca, "--bundle"))
    token = mesh.work / "token"
    token.write_text(meshctl("token", "create", "default/web", "--ca-dir", mesh.ca))
    flags = [word for address in mesh.tls("mutual TLS") for word in ("--server", address)]
    flags += [word for address in mesh.tls("TLS") for word in ("--authority", address)]
    mesh.start("ours", *flags, "--tls", "--roots", str(mesh.work / "roots.pem"), "--join-token-file", str(token))
    wait_until(lambda: any(map(synced, mesh.replicas)))
    holds, other = sorted(mesh.replicas, key=lambda replica: not synced(replica))
    with Load(mesh.web) as load:
        wait_until(lambda: load.statuses[200])
        holds.kill()
        wait_until(lambda: synced(other))
    assert set(load.statuses) == {200}
    status = os.stat(mesh.ca)
    assert (status.st_mode & 0o777, status.st_uid) == (0o700, os.geteuid())
