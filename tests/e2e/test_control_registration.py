"""Workloads that nobody has written down: a sidecar says which WorkloadGroup it belongs to, and is called. Over the real Envoy and over our own sidecar."""

from __future__ import annotations

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.proxy import wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]
CLUSTER = "outbound|9080||reviews.default.svc.cluster.local"


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


def endpoints(mesh: Mesh) -> list[int]:
    """The ports of the endpoints that the caller's sidecar was told."""
    mesh.control.status("web.default")  # it is connected
    found = mesh.control.ask("proxy-config", "endpoints", "web.default", "--name", CLUSTER)
    groups = [group for one in found for group in one.get("endpoints", ())]
    return [one["endpoint"]["address"]["socket_address"]["port_value"] for group in groups for one in group["lb_endpoints"]]


def test_who_registers_is_called_until_it_has_gone(mesh):
    for version in ("v1", "v2"):
        (mesh.folder / f"{version}.yaml").unlink()
    port, listen = mesh.services["v2"].port, mesh.ports.take()
    group = f"""
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {{name: reviews}}
spec:
  metadata:
    labels: {{app: reviews}}
    annotations: {{meshproxy/sidecar: '{{"inbound": [{{"port": {port}, "listen": {listen}}}]}}'}}
  template: {{ports: {{http: {port}}}, labels: {{version: v1}}}}
"""
    mesh.write("group.yaml", group)
    mesh.sidecar("web")
    wait_until(lambda: endpoints(mesh) == [])

    machine = mesh.sidecar("vm-7", "--group", "reviews", "--address", "127.0.0.1", "--label", "version=v2")
    wait_until(lambda: endpoints(mesh) == [listen])
    wait_until(lambda: set(mesh.who(5)) == {"v2"})
    (listener,) = (one for one in mesh.control.ask("proxy-config", "listeners", "vm-7.default") if "inbound" in str(one))
    assert listener["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": listen}
    assert mesh.control.ask("diff", str(mesh.folder)) == []  # who has registered is no difference of documents

    mesh.write("group.yaml", group.replace("name: reviews}", "name: other}"))  # its group is gone, and with it what it is
    wait_until(lambda: endpoints(mesh) == [])
    wait_until(lambda: "vm-7.default is no workload of WorkloadGroup default/reviews: there is no WorkloadGroup default/reviews" in mesh.control.log())
    mesh.write("group.yaml", group)
    wait_until(lambda: endpoints(mesh) == [listen])

    mesh.control.kill()  # another one, or the same anew, is told again; who comes before keeps what it has until then

    def is_told() -> bool:
        assert set(mesh.who(2)) == {"v2"}
        return endpoints(mesh) == [listen]

    mesh.control.start()
    wait_until(is_told)
    assert set(mesh.who(5)) == {"v2"}

    machine.__exit__()
    wait_until(lambda: endpoints(mesh) == [])
