"""Istio's Sidecar over the real Envoy and over our own: what a proxy does not see it does not reach, and what it serves is where it is said to be."""

from __future__ import annotations

import json

import pytest

from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import Service, fetch
from tests.e2e.proxy import PATIENCE, wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]


def sidecar(spec: str) -> str:
    return f"{{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {{name: default}}, spec: {spec}}}"


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    yield made
    made.close()


def test_a_sidecar_scopes_what_is_reached(mesh):
    mesh.sidecar()

    def proxied(host: str) -> int:
        return fetch(mesh.proxy_port, f"http://{host}/", host=host)[0]

    def seen() -> set[str]:
        return {one["name"] for one in mesh.control.ask("proxy-config", "clusters", "web.default") if one["name"].startswith("outbound|")}

    assert proxied("reviews:9080") == 200
    outside = f"127.0.0.1:{mesh.services['v2'].port}"
    assert proxied(outside) == 502

    mesh.write("sidecar.yaml", sidecar("{egress: [{hosts: ['~/*']}], outboundTrafficPolicy: {mode: ALLOW_ANY}}"))
    wait_until(lambda: proxied(outside) == 200)  # not in the mesh, and reached by its address
    wait_until(lambda: not seen())
    assert proxied("reviews:9080") == 503  # a name that is no address is no original destination

    mesh.write("sidecar.yaml", sidecar("{egress: [{hosts: [./*]}], outboundTrafficPolicy: {mode: REGISTRY_ONLY}}"))
    wait_until(lambda: proxied("reviews:9080") == 200)
    assert proxied(outside) == 502
    assert seen() == {f"outbound|9080|{subset}|reviews.default.svc.cluster.local" for subset in ("", "v1", "v2")}

    (mesh.folder / "sidecar.yaml").unlink()
    wait_until(lambda: "BlackHoleCluster" not in str(mesh.control.ask("proxy-config", "clusters", "web.default")))
    assert proxied("reviews:9080") == 200
    status = mesh.control.status("web.default")
    assert [status[column] for column in ("CDS", "EDS", "LDS", "RDS")] == ["SYNCED"] * 4


def test_what_was_observed_is_enough(mesh):
    """Load reports become a Sidecar, and with it the same requests go on."""
    mesh.write("unused.yaml", "{apiVersion: v1, kind: Service, metadata: {name: unused}, spec: {ports: [{name: http, port: 80}]}}")
    mesh.sidecar()
    assert set(mesh.who(20)) == {"v1", "v2"}
    host = "reviews.default.svc.cluster.local"

    def told() -> dict | None:
        mesh.who()  # Envoy counts from the first report on
        (made,) = mesh.control.ask("observed")
        return made if made["spec"]["egress"] == [{"hosts": [f"*/{host}"]}] else None

    made = wait_until(told, limit=2 * PATIENCE)

    def seen() -> set[str]:
        return {one["name"].split("|")[3] for one in mesh.control.ask("proxy-config", "clusters", "web.default") if one["name"].startswith("outbound|")}

    assert seen() == {host, "unused.default.svc.cluster.local"}
    mesh.write("observed.yaml", json.dumps(made))
    wait_until(lambda: seen() == {host})
    assert set(mesh.who(20)) == {"v1", "v2"}
    assert fetch(mesh.proxy_port, "http://reviews:9080/", host="reviews:9080")[0] == 200


def test_ingress_leads_to_where_it_says(mesh):
    mesh.sidecar()
    wait_until(lambda: fetch(mesh.inbound)[1].get("name") == "v1")  # as the workload says
    elsewhere = Service("elsewhere")
    try:
        port = f"port: {{number: {mesh.services['v1'].port}, protocol: HTTP, name: http}}"
        mesh.write("sidecar.yaml", sidecar(f"{{ingress: [{{{port}, defaultEndpoint: '127.0.0.1:{elsewhere.port}'}}]}}"))
        wait_until(lambda: fetch(mesh.inbound)[1].get("name") == "elsewhere")
        (mesh.folder / "sidecar.yaml").unlink()
        wait_until(lambda: fetch(mesh.inbound)[1].get("name") == "v1")
    finally:
        elsewhere.close()
