"""Gateways with TLS, ours and real Envoys: what documents and their Secrets say is what clients from outside meet."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
from pathlib import Path

import pytest

from meshproxy.net.certificate import Certificate
from tests.differential.pki import Authority
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import Service, fetch
from tests.e2e.proxy import PATIENCE, refused, wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("pki")
    ca = Authority(folder, "ca")
    for name in ("a", "b", "new", "client"):
        ca.issue(name, f"{name}.test")
    Authority(folder, "rogue-ca").issue("rogue", "client.test")
    return folder


@pytest.fixture(params=["envoy", "ours"])
def mesh(request, tmp_path):
    made = Mesh(tmp_path, request.param)
    made.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {istio: edge}}}")
    yield made
    made.close()


def secret(pki: Path, name: str, which: str, ca: bool = False) -> str:
    data = {"tls.crt": f"{which}.pem", "tls.key": f"{which}.key", **({"ca.crt": "ca.pem"} if ca else {})}
    encoded = {key: base64.b64encode((pki / file).read_bytes()).decode() for key, file in data.items()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": name}, "data": encoded})


def gateway(*servers: str) -> str:
    head = "apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: g}"
    return f"{{{head}, spec: {{selector: {{istio: edge}}, servers: [{', '.join(servers)}]}}}}"


def server(port: int, tls: str, host: str, protocol: str = "HTTPS") -> str:
    return f"{{port: {{number: {port}, name: s-{host.partition('.')[0]}, protocol: {protocol}}}, hosts: [{host}], tls: {tls}}}"


def virtual_service(rest: str) -> str:
    return f"{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: edge}}, spec: {{hosts: ['*.test'], gateways: [g], {rest}}}}}"


TO_V1 = virtual_service("http: [{route: [{destination: {host: reviews, subset: v1}}]}]")


def connect(port: int, name: str, pki: Path, client: str = "") -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    context.check_hostname = False
    context.set_alpn_protocols(["http/1.1"])
    if client:
        context.load_cert_chain(pki / f"{client}.pem", pki / f"{client}.key")
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE), server_hostname=name)


def ask(port: int, name: str, pki: Path, client: str = "") -> tuple[str, int, dict]:
    """(name in the certificate, status, body) of a request; all are empty when there is no answer."""
    try:
        with connect(port, name, pki, client) as tls:
            shown = Certificate(tls.getpeercert(True)).dns_sans[0]
            connection = http.client.HTTPConnection(name)
            connection.sock = tls
            connection.request("GET", "/")
            response = connection.getresponse()
            body = response.read()
            return shown, response.status, json.loads(body) if body.startswith(b"{") else {}
    except (OSError, http.client.HTTPException):
        return "", 0, {}


def test_certificates_by_server_name_and_new_ones_without_a_new_listener(mesh, pki):
    port, plain = mesh.ports.take(), mesh.ports.take()
    redirect = f"{{port: {{number: {plain}, name: http, protocol: HTTP}}, hosts: ['*.test'], tls: {{httpsRedirect: true}}}}"
    names = [server(port, f"{{mode: SIMPLE, credentialName: {one}}}", f"{one}.test") for one in ("a", "b", "missing")]
    mesh.write("gateway.yaml", f"{gateway(*names, redirect)}\n---\n{TO_V1}")
    mesh.write("a.yaml", secret(pki, "a", "a"))
    mesh.write("b.yaml", secret(pki, "b", "b"))
    edge = mesh.sidecar("edge")
    wait_until(lambda: ask(port, "a.test", pki)[1] == 200)
    assert ask(port, "a.test", pki)[::2][0] == "a.test"
    shown, status, seen = ask(port, "b.test", pki)
    assert (shown, status, seen["name"], seen["headers"]["x-forwarded-proto"]) == ("b.test", 200, "v1", "https")
    assert ask(port, "missing.test", pki) == ("", 0, {})  # its Secret is not there; the others are served
    assert fetch(plain, host="a.test")[0] == 301

    mesh.write("a.yaml", secret(pki, "a", "new"))
    wait_until(lambda: ask(port, "a.test", pki)[0] == "new.test")
    mesh.write("a.yaml", secret(pki, "a", "new").replace("tls.key", "tls.kye"))
    wait_until(lambda: "a.yaml: document 1 (Secret default/a): data[tls.key]" in mesh.control.log())
    mesh.write("missing.yaml", secret(pki, "missing", "new"))
    wait_until(lambda: ask(port, "missing.test", pki)[1] == 200)
    assert ask(port, "a.test", pki)[0] == "new.test"  # the last one that was right
    assert ask(port, "b.test", pki)[:2] == ("b.test", 200)
    assert edge.stat("listener_manager.listener_create_failure") == 0
    assert edge.stat("runtime.deprecated_feature_use") == 0
    assert (pki / "a.key").read_text() not in mesh.control.log()
    assert "PRIVATE" not in json.dumps(mesh.control.ask("proxy-config", "listeners", "edge.default"))


def test_clients_with_certificates(mesh, pki):
    port = mesh.ports.take()
    mesh.write("gateway.yaml", f"{gateway(server(port, '{mode: MUTUAL, credentialName: a, subjectAltNames: [client.test]}', 'a.test'))}\n---\n{TO_V1}")
    mesh.write("a.yaml", secret(pki, "a", "a", ca=True))
    mesh.sidecar("edge")
    wait_until(lambda: ask(port, "a.test", pki, "client")[1] == 200)
    assert "DNS=client.test" in ask(port, "a.test", pki, "client")[2]["headers"]["x-forwarded-client-cert"]
    assert ask(port, "a.test", pki)[1] == 0
    assert ask(port, "a.test", pki, "rogue")[1] == 0
    assert ask(port, "a.test", pki, "b")[1] == 0  # of the same authority, with another name

    mesh.write("gateway.yaml", f"{gateway(server(port, '{mode: OPTIONAL_MUTUAL, credentialName: a}', 'a.test'))}\n---\n{TO_V1}")
    wait_until(lambda: ask(port, "a.test", pki)[1] == 200)
    assert ask(port, "a.test", pki, "b")[1] == 200
    assert ask(port, "a.test", pki, "rogue")[1] == 0


def test_certificates_in_files_and_where_servers_listen(mesh, pki, tmp_path):
    port, target = mesh.ports.take(), mesh.ports.take()
    held = {name: tmp_path / name for name in ("a.pem", "a.key")}
    for name, path in held.items():
        path.write_bytes((pki / name).read_bytes())
    files = f"serverCertificate: {held['a.pem']}, privateKey: {held['a.key']}, caCertificates: {pki}/ca.pem"
    one = server(port, f"{{mode: OPTIONAL_MUTUAL, {files}}}, bind: 127.0.0.1", "a.test")
    mesh.write("gateway.yaml", f"{gateway(one)}\n---\n{TO_V1}")
    service = f"selector: {{istio: edge}}, ports: [{{name: https, port: {port}, targetPort: {target}}}]"
    mesh.write("service.yaml", f"{{apiVersion: v1, kind: Service, metadata: {{name: edge}}, spec: {{{service}}}}}")
    edge = mesh.sidecar("edge")
    wait_until(lambda: ask(target, "a.test", pki)[1] == 200)
    assert refused(port)
    assert "DNS=client.test" in ask(target, "a.test", pki, "client")[2]["headers"]["x-forwarded-client-cert"]
    assert ask(target, "a.test", pki, "rogue")[1] == 0
    for name, path in held.items():  # renewed: each file is replaced at once
        scratch = path.with_suffix(".new")
        scratch.write_bytes((pki / name.replace("a.", "new.")).read_bytes())
        scratch.rename(path)
    wait_until(lambda: ask(target, "a.test", pki)[0] == "new.test")
    assert edge.stat("listener_manager.listener_create_failure") == 0


def test_tls_that_is_passed_on(mesh, pki):
    """A second gateway ends TLS; the first only looks at the server names."""
    port, inner = mesh.ports.take(), mesh.ports.take()
    mesh.write("inner.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: inner, labels: {app: inner}}}")
    service = f"{{apiVersion: v1, kind: Service, metadata: {{name: inner}}, spec: {{selector: {{app: inner}}, ports: [{{name: tls, port: {inner}}}]}}}}"
    ends = gateway(server(inner, "{mode: SIMPLE, credentialName: a}", "a.test")).replace("name: g}", "name: ends}").replace("istio: edge", "app: inner")
    passes = gateway(server(port, "{mode: PASSTHROUGH}", "'*.test'", "TLS"))
    by_name = virtual_service("tls: [{match: [{sniHosts: [a.test]}], route: [{destination: {host: inner}}]}]")
    at_the_end = TO_V1.replace("name: edge", "name: at-the-end").replace("[g]", "[ends]")
    mesh.write("gateway.yaml", "\n---\n".join([service, ends, passes, by_name, at_the_end, secret(pki, "a", "a")]))
    mesh.sidecar("inner")
    mesh.sidecar("edge")
    wait_until(lambda: ask(port, "a.test", pki)[1] == 200)
    assert ask(port, "a.test", pki)[0] == "a.test"
    assert ask(port, "b.test", pki)[1] == 0

    automatic = gateway(server(port, "{mode: AUTO_PASSTHROUGH}", "'*.local'", "TLS"))
    at_any_name = [ends.replace("hosts: [a.test]", "hosts: ['*']"), at_the_end.replace("'*.test'", "'*'")]
    mesh.write("gateway.yaml", "\n---\n".join([service, *at_any_name, automatic, secret(pki, "a", "a")]))
    wait_until(lambda: ask(port, f"outbound_.{inner}_._.inner.default.svc.cluster.local", pki)[1] == 200)
    assert ask(port, "a.test", pki)[1] == 0


def test_listeners_and_routes_of_the_gateway_api(mesh, pki):
    port = mesh.ports.take()
    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {gateway.networking.k8s.io/gateway-name: g}}}")

    def api(kind: str, name: str, spec: str, namespace: str = "default") -> str:
        return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"

    tls = "{certificateRefs: [{name: a, namespace: vault}]}"
    listeners = f"[{{name: a, port: {port}, protocol: HTTPS, hostname: a.test, tls: {tls}}}]"
    route = api("HTTPRoute", "r", "{parentRefs: [{name: g}], rules: [{backendRefs: [{name: reviews, port: 9080}]}]}")
    there = secret(pki, "a", "a").replace('"name": "a"', '"name": "a", "namespace": "vault"')
    mesh.write("gateway.yaml", "\n---\n".join([api("Gateway", "g", f"{{gatewayClassName: mesh, listeners: {listeners}}}"), route, there]))
    mesh.sidecar("edge")
    assert refused(port)  # nothing is granted
    origin = "{group: gateway.networking.k8s.io, kind: Gateway, namespace: default}"
    mesh.write("grant.yaml", api("ReferenceGrant", "x", f"{{from: [{origin}], to: [{{group: '', kind: Secret}}]}}", "vault"))
    wait_until(lambda: ask(port, "a.test", pki)[1] == 200)
    assert ask(port, "a.test", pki)[0] == "a.test"
    (mesh.folder / "grant.yaml").unlink()
    wait_until(lambda: refused(port))


def test_tls_towards_a_backend_and_connections_by_route(mesh, pki):
    """Requests come plain and go on by TLS, as the backend asks; connections go on as they are."""
    port, raw, inner = mesh.ports.take(), mesh.ports.take(), mesh.ports.take()
    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {gateway.networking.k8s.io/gateway-name: g}}}")
    mesh.write("inner.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: inner, labels: {app: inner}}}")
    service = f"{{apiVersion: v1, kind: Service, metadata: {{name: inner}}, spec: {{selector: {{app: inner}}, ports: [{{name: http, port: {inner}}}]}}}}"
    ends = gateway(server(inner, "{mode: SIMPLE, credentialName: a}", "a.test")).replace("name: g}", "name: ends}").replace("istio: edge", "app: inner")
    at_the_end = TO_V1.replace("name: edge", "name: at-the-end").replace("[g]", "[ends]").replace("'*.test'", "'*'")
    mesh.write("inner-gateway.yaml", "\n---\n".join([service, ends.replace("hosts: [a.test]", "hosts: ['*']"), at_the_end, secret(pki, "a", "a")]))

    def api(kind: str, name: str, spec: str) -> str:
        return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}}}, spec: {spec}}}"

    listeners = f"[{{name: http, port: {port}, protocol: HTTP}}, {{name: raw, port: {raw}, protocol: TCP}}]"
    backend = f"rules: [{{backendRefs: [{{name: inner, port: {inner}}}]}}]"
    routes = [
        api("HTTPRoute", "r", f"{{parentRefs: [{{name: g, sectionName: http}}], {backend}}}"),
        api("TCPRoute", "t", f"{{parentRefs: [{{name: g, sectionName: raw}}], {backend}}}"),
    ]
    mesh.write("gateway.yaml", "\n---\n".join([api("Gateway", "g", f"{{gatewayClassName: mesh, listeners: {listeners}}}"), *routes]))
    validation = "{hostname: %s.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]}"
    policy = api("BackendTLSPolicy", "p", f"{{targetRefs: [{{group: '', kind: Service, name: inner}}], validation: {validation}}}")
    mesh.write("policy.yaml", policy % "a")
    mesh.sidecar("inner")
    mesh.sidecar("edge")
    wait_until(lambda: not refused(port))
    assert fetch(port)[0] == 500  # without its authorities nobody is trusted
    roots = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "roots"}, "data": {"ca.crt": (pki / "ca.pem").read_text()}}
    mesh.write("roots.yaml", json.dumps(roots))
    wait_until(lambda: fetch(port)[0] == 200)
    assert fetch(port)[1]["name"] == "v1"
    mesh.write("policy.yaml", policy % "b")
    wait_until(lambda: fetch(port)[0] == 503)  # the certificate has another name
    (mesh.folder / "policy.yaml").unlink()
    wait_until(lambda: ask(raw, "a.test", pki)[1] == 200)


def test_certificates_of_clients_and_for_backends(mesh, pki):
    """As the Gateway API says it: whom HTTPS listeners let in, and what a gateway shows to backends that want to know who calls."""
    port, open_to_all = mesh.ports.take(), mesh.ports.take()
    mesh.write("edge.yaml", "{apiVersion: meshproxy/v1, kind: Workload, metadata: {name: edge, labels: {gateway.networking.k8s.io/gateway-name: g}}}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "b.pem", pki / "b.key")
    context.load_verify_locations(pki / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    bank = Service("bank", context)

    def api(kind: str, name: str, spec: str) -> str:
        return f"{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: {name}}}, spec: {spec}}}"

    authorities = "caCertificateRefs: [{group: '', kind: ConfigMap, name: roots}]"
    ports = f"[{{port: {open_to_all}, tls: {{}}}}]"
    frontend = f"{{default: {{validation: {{{authorities}}}}}, perPort: {ports}}}"
    listeners = ", ".join(f"{{name: l{one}, port: {one}, protocol: HTTPS, tls: {{certificateRefs: [{{name: a}}]}}}}" for one in (port, open_to_all))
    shown = "backend: {clientCertificateRef: {name: shown}}"
    spec = f"{{gatewayClassName: mesh, listeners: [{listeners}], tls: {{frontend: {frontend}, %s}}}}"
    roots = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "roots"}, "data": {"ca.crt": (pki / "ca.pem").read_text()}}
    documents = [
        "{apiVersion: v1, kind: Service, metadata: {name: bank}, spec: {selector: {app: bank}, ports: [{name: http, port: 80, targetPort: http}]}}",
        f"{{apiVersion: meshproxy/v1, kind: Workload, metadata: {{name: bank, labels: {{app: bank}}}}, spec: {{ports: {{http: {bank.port}}}}}}}",
        api("HTTPRoute", "r", "{parentRefs: [{name: g}], rules: [{backendRefs: [{name: bank, port: 80}]}]}"),
        api("BackendTLSPolicy", "p", f"{{targetRefs: [{{group: '', kind: Service, name: bank}}], validation: {{hostname: b.test, {authorities}}}}}"),
        json.dumps(roots),
        secret(pki, "a", "a"),
        secret(pki, "shown", "client"),
    ]
    mesh.write("others.yaml", "\n---\n".join(documents))
    mesh.write("gateway.yaml", api("Gateway", "g", spec % ""))
    mesh.sidecar("edge")
    try:
        wait_until(lambda: ask(port, "a.test", pki, "client")[1] == 503)  # the bank wants to know who calls
        mesh.write("gateway.yaml", api("Gateway", "g", spec % shown))
        wait_until(lambda: ask(port, "a.test", pki, "client")[1] == 200)
        assert ask(port, "a.test", pki, "client")[2]["name"] == "bank"
        assert [ask(port, "a.test", pki, client)[1] for client in ("", "rogue")] == [0, 0]
        assert [ask(open_to_all, "a.test", pki, client)[1] for client in ("client", "", "rogue")] == [200, 200, 200]
    finally:
        bank.close()
