"""Istio's Sidecar over the real Envoy and over our own: what a proxy does not see it does not reach, and what it serves is where it is said to be."""

from __future__ import annotations

import json
import socket
import ssl

import pytest

from tests.differential.pki import Authority
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import Service, fetch
from tests.e2e.proxy import PATIENCE, refused, wait_until
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
    assert fetch(mesh.inbound)[1]["name"] == "v1"  # and nobody asks the one that is gone


def test_listeners_for_some_services(mesh):
    """On ports and a Unix socket of their own, each with what it names."""
    http, tcp, proxy, path = mesh.ports.take(), mesh.ports.take(), mesh.ports.take(), mesh.work / "out.sock"
    for name, port, protocol in (("api", http, "HTTP"), ("db", tcp, "TCP")):
        listens = f"[{{number: {port}, targetPort: {mesh.services['v2'].port}, name: a, protocol: {protocol}}}]"
        spec = f"{{hosts: [{name}.test], resolution: STATIC, endpoints: [{{address: 127.0.0.1}}], ports: {listens}}}"
        mesh.write(f"{name}.yaml", f"{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {name}}}, spec: {spec}}}")
    egress = [
        f"{{hosts: [./api.test], port: {{number: {http}, protocol: HTTP, name: a}}}}",
        f"{{hosts: [./db.test], port: {{number: {tcp}, protocol: TCP, name: b}}, captureMode: NONE}}",
        f"{{hosts: [./reviews.default.svc.cluster.local], port: {{number: {proxy}, protocol: HTTP_PROXY, name: c}}, bind: 127.0.0.1}}",
        f"{{hosts: [./*], port: {{number: 0, protocol: HTTP, name: d}}, bind: 'unix://{path}'}}",
    ]
    mesh.write("sidecar.yaml", sidecar(f"{{egress: [{', '.join(egress)}]}}"))
    mesh.sidecar()

    def asked(port: int, host: str) -> tuple[int, str]:
        status, body = fetch(port, f"http://{host}/" if port == proxy else "/", host=host)
        return status, body.get("name", "")

    wait_until(lambda: asked(http, "api.test") == (200, "v2"))
    assert asked(http, f"api.test:{http}") == (200, "v2")
    assert asked(http, "reviews:9080") == (502, "")
    assert asked(tcp, "anything") == (200, "v2")
    assert asked(proxy, "reviews:9080")[0] == 200
    assert asked(proxy, f"api.test:{http}") == (502, "")
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(PATIENCE)
        one.connect(str(path))
        one.sendall(f"GET / HTTP/1.1\r\nhost: api.test:{http}\r\nconnection: close\r\n\r\n".encode())
        assert b'"name": "v2"' in b"".join(iter(lambda: one.recv(65536), b""))
    status = mesh.control.status("web.default")
    assert [status[column] for column in ("CDS", "EDS", "LDS", "RDS")] == ["SYNCED"] * 4

    mesh.write("sidecar.yaml", sidecar(f"{{egress: [{egress[2]}]}}"))
    wait_until(lambda: refused(http))
    assert asked(proxy, "reviews:9080")[0] == 200


def test_tls_that_a_sidecar_ends(mesh):
    """Of callers from outside, with files of its machine."""
    Authority(mesh.work, "ca").issue("a", "a.test")
    mesh.sidecar()
    wait_until(lambda: fetch(mesh.inbound)[0] == 200)
    port = f"port: {{number: {mesh.services['v1'].port}, protocol: HTTP, name: http}}"
    tls = f"tls: {{mode: SIMPLE, serverCertificate: {mesh.work}/a.pem, privateKey: {mesh.work}/a.key}}"
    mesh.write("sidecar.yaml", sidecar(f"{{ingress: [{{{port}, {tls}}}]}}"))
    context = ssl.create_default_context(cafile=str(mesh.work / "ca.pem"))

    def answer() -> bytes:
        try:
            with context.wrap_socket(socket.create_connection(("127.0.0.1", mesh.inbound), PATIENCE), server_hostname="a.test") as one:
                one.sendall(b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n")
                return b"".join(iter(lambda: one.recv(65536), b""))
        except OSError:
            return b""

    wait_until(lambda: b'"name": "v1"' in answer())
    assert answer().startswith(b"HTTP/1.1 200 OK\r\n")
