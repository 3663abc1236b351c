"""TLS that proxies begin for callers, ours and real Envoys: certificates in files and in Secrets, and what becomes of them when they change."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
from pathlib import Path

import pytest

from tests.differential.pki import with_clients
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import Service, fetch
from tests.e2e.proxy import wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

BANK = """
{{apiVersion: v1, kind: Service, metadata: {{name: bank}}, spec: {{selector: {{app: bank}}, ports: [{{name: http, port: 80, targetPort: http}}]}}}}
---
{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: bank, labels: {{app: bank}}}}, spec: {{ports: {{http: {port}}}}}}}
"""


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Path:
    return with_clients(tmp_path_factory.mktemp("pki"), "bank")


@pytest.fixture
def bank(pki):
    """Speaks TLS only, and only with clients of the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "bank.pem", pki / "bank.key")
    context.load_verify_locations(pki / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    service = Service("bank", context)
    yield service
    service.close()


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path, bank):
    made = Mesh(tmp_path, request.param)
    made.write("bank.yaml", BANK.format(port=bank.port))
    yield made
    made.close()


def rule(tls: str, more: str = "") -> str:
    head = "apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: bank}"
    return f"{{{head}, spec: {{host: bank, trafficPolicy: {{tls: {tls}}}, {more}}}}}"


def secret(pki: Path, which: str) -> str:
    data = {"tls.crt": f"{which}.pem", "tls.key": f"{which}.key", "ca.crt": "ca.pem"}
    encoded = {key: base64.b64encode((pki / file).read_bytes()).decode() for key, file in data.items()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bank"}, "data": encoded})


def swap(source: Path, target: Path) -> None:
    """Replace a file at once, as those who renew certificates do."""
    scratch = target.with_suffix(".new")
    shutil.copy(source, scratch)
    os.rename(scratch, target)


def test_certificates_in_files(mesh, pki, tmp_path):
    held = tmp_path / "certificates"
    held.mkdir()
    for name in ("rogue.pem", "rogue.key", "ca.pem"):
        shutil.copy(pki / name, held / name.replace("rogue", "own"))
    files = f"clientCertificate: {held}/own.pem, privateKey: {held}/own.key, caCertificates: {held}/ca.pem"
    mesh.write("rule.yaml", rule(f"{{mode: MUTUAL, {files}, sni: bank.test, subjectAltNames: [bank.test]}}"))
    web = mesh.sidecar()

    def ask() -> int:
        return fetch(mesh.proxy_port, host="bank")[0]

    assert ask() == 503  # nobody that the bank knows
    swap(pki / "client.key", held / "own.key")
    swap(pki / "client.pem", held / "own.pem")
    wait_until(lambda: ask() == 200)
    mesh.write("rule.yaml", rule(f"{{mode: MUTUAL, {files}, sni: bank.test, subjectAltNames: [other.test]}}"))
    wait_until(lambda: ask() == 503)
    mesh.write("rule.yaml", rule(f"{{mode: MUTUAL, {files.partition(', caCert')[0]}, insecureSkipVerify: true}}"))
    wait_until(lambda: ask() == 200)
    mesh.write("rule.yaml", rule(f"{{mode: SIMPLE, caCertificates: {held}/ca.pem}}"))
    wait_until(lambda: ask() == 503)  # the bank wants a certificate
    assert web.stat("cluster_manager.cds.update_rejected") == 0


def test_a_port_has_its_own(mesh, pki):
    port = f"portLevelSettings: [{{port: {{number: 80}}, tls: {{mode: MUTUAL, clientCertificate: {pki}/client.pem, privateKey: {pki}/client.key, "
    head = "apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: bank}"
    policy = f"{port}caCertificates: {pki}/ca.pem, subjectAltNames: [bank.test]}}}}], tls: {{mode: DISABLE}}"
    mesh.write("rule.yaml", f"{{{head}, spec: {{host: bank, trafficPolicy: {{{policy}}}}}}}")
    mesh.sidecar()
    assert fetch(mesh.proxy_port, host="bank")[0] == 200


def test_a_secret_for_a_sidecar(mesh, pki):
    tls = "{mode: MUTUAL, credentialName: bank, sni: bank.test, subjectAltNames: [bank.test]}"
    mesh.write("secret.yaml", secret(pki, "rogue"))
    mesh.write("rule.yaml", rule(tls))
    web = mesh.sidecar()

    def ask() -> int:
        return fetch(mesh.proxy_port, host="bank")[0]

    assert ask() == 503
    assert "bank" not in web.admin("GET", "/clusters")[1]
    mesh.write("rule.yaml", rule(tls, "workloadSelector: {matchLabels: {app: web}}"))
    wait_until(lambda: "bank" in web.admin("GET", "/clusters")[1])
    assert ask() == 503  # the bank does not know the certificate
    mesh.write("secret.yaml", secret(pki, "client"))
    wait_until(lambda: ask() == 200)
    assert (pki / "client.key").read_text() not in mesh.control.log()


def test_a_secret_for_a_gateway_on_the_way_out(mesh, pki):
    port = mesh.ports.take()
    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}")
    head = "apiVersion: networking.istio.io/v1, metadata: {name: out}"
    servers = f"[{{port: {{number: {port}, name: http, protocol: HTTP}}, hosts: [bank.example]}}]"
    gateway = f"{{{head}, kind: Gateway, spec: {{selector: {{istio: edge}}, servers: {servers}}}}}"
    route = f"{{{head}, kind: VirtualService, spec: {{hosts: [bank.example], gateways: [out], http: [{{route: [{{destination: {{host: bank}}}}]}}]}}}}"
    mesh.write("out.yaml", f"{gateway}\n---\n{route}")
    mesh.write("rule.yaml", rule("{mode: MUTUAL, credentialName: bank, subjectAltNames: [bank.test]}"))
    mesh.sidecar("edge")
    wait_until(lambda: fetch(port, host="bank.example")[0] == 503)  # without the Secret there is no cluster
    mesh.write("secret.yaml", secret(pki, "client"))
    wait_until(lambda: fetch(port, host="bank.example")[0] == 200)
    assert fetch(port, host="bank.example")[1]["name"] == "bank"
