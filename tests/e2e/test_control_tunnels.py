"""The way out through an HTTP proxy, as DestinationRules with a `tunnel` say: our sidecars and real Envoys, through forward proxies of either kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.differential.pki import with_clients
from tests.differential.proxy import envoy_binary
from tests.e2e.control_plane import Service, fetch
from tests.e2e.proxy import ADMIN, Proxy, cluster, wait_until
from tests.e2e.test_control_traffic import Mesh

pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"


def door(name: str, port: int, socket: str = "") -> str:
    """A listener that ends CONNECT and POST: whoever asks by the name of the bank gets to it."""
    upgrade = "{upgrade_type: CONNECT, connect_config: {allow_post: true}}"
    to = f"route: {{cluster: bank, upgrade_configs: [{upgrade}]}}"
    routes = f"[{{match: {{connect_matcher: {{}}}}, {to}}}, {{match: {{prefix: /}}, {to}}}]"
    hosts = f"[{{name: bank, domains: ['bank.example:7000'], routes: {routes}}}]"
    return f"""
  - name: {name}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": {HCM}
          stat_prefix: {name}
          http2_protocol_options: {{allow_connect: true}}
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          route_config: {{name: r, virtual_hosts: {hosts}}}
          http_filters: [{{name: router, typed_config: {{"@type": {ROUTER}}}}}]
      {socket}
"""


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Path:
    return with_clients(tmp_path_factory.mktemp("pki"), "bank")


@pytest.fixture
def bank() -> Iterator[Service]:
    """What is to be reached, by nobody but the forward proxy."""
    service = Service("bank")
    yield service
    service.close()


@pytest.fixture(params=["ours through ours", "ours through envoy", "envoy through ours"])
def mesh(request, tmp_path, bank, pki) -> Iterator[Mesh]:
    """A mesh whose callers have a port for the bank, and a forward proxy with a plain door and one with TLS."""
    sidecars, _, forward = request.param.partition(" through ")
    made = Mesh(tmp_path, sidecars)
    plain, secure, made.way_out = made.ports.take(), made.ports.take(), made.ports.take()
    certificate = f"{{certificate_chain: {{filename: {pki}/bank.pem}}, private_key: {{filename: {pki}/bank.key}}}}"
    context = f'{{"@type": {TLS}, common_tls_context: {{alpn_protocols: [h2, http/1.1], tls_certificates: [{certificate}]}}}}'
    tls = f"transport_socket: {{name: tls, typed_config: {context}}}"
    folder = tmp_path / "forward"
    folder.mkdir()
    config = f"{ADMIN}static_resources:\n  listeners:{door('plain', plain)}{door('secure', secure, tls)}\n  clusters:{cluster('bank', bank.port)}"
    command = [envoy_binary() or "envoy", "--disable-hot-restart"] if forward == "envoy" else None
    made.forward = Proxy(folder, config, "--concurrency", "1", "-l", "error", command=command)
    made.write(
        "web.yaml",
        f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: web, labels: {{app: web}}}}
spec: {{sidecar: {{outbound: [{{host: bank.example, port: 7000, listen: {made.way_out}}}]}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: bank}}
spec: {{hosts: [bank.example], ports: [{{number: 7000, name: tcp, protocol: TCP}}], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}]}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: forward}}
spec:
  hosts: [forward.example]
  ports:
  - {{number: 3128, name: http-connect, protocol: HTTP, targetPort: {plain}}}
  - {{number: 4128, name: http-tls, protocol: HTTP, targetPort: {secure}}}
  - {{number: 5128, name: http2-connect, protocol: HTTP2, targetPort: {plain}}}
  - {{number: 6128, name: http2-tls, protocol: HTTP2, targetPort: {secure}}}
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1}}]
""",
    )
    yield made
    made.forward.__exit__()
    made.close()


def through(mesh: Mesh, pki: Path, port: int, protocol: str, target: str = "bank.example", gateway: str = "mesh") -> None:
    """Have connections to the bank go through the forward proxy, by one of its ports: those of callers, or those that come to a gateway."""
    tls = f"{{mode: SIMPLE, caCertificates: {pki}/ca.pem, sni: bank.test, subjectAltNames: [bank.test]}}"
    secured = "".join(f"{{port: {{number: {number}}}, tls: {tls}}}, " for number in (4128, 6128))
    tunnel = f"{{targetHost: {target}, targetPort: 7000, protocol: {protocol}}}"
    mesh.write(
        "rules.yaml",
        f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: forward}}
spec:
  host: forward.example
  trafficPolicy: {{portLevelSettings: [{secured}]}}
  subsets: [{{name: bank, trafficPolicy: {{tunnel: {tunnel}}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: bank}}
spec: {{hosts: [bank.example], gateways: [{gateway}], tcp: [{{route: [{{destination: {{host: forward.example, subset: bank, port: {{number: {port}}}}}}}]}}]}}
""",
    )


def test_the_way_out(mesh, pki):
    doors = {3128: ("plain", "http1"), 4128: ("secure", "http1"), 5128: ("plain", "http2"), 6128: ("secure", "http2")}
    through(mesh, pki, 3128, "CONNECT")
    web = mesh.sidecar()

    def asked(protocol: str, port: int) -> bool:
        """Whether the bank answers, and by the way that was meant: the forward proxy has counted it."""
        door, version = doors[port]
        names = f"http.{door}.downstream_cx_{version}_total", f"http.{door}.downstream_rq_total", "cluster.bank.upstream_cx_total"
        before = [mesh.forward.stat(name) for name in names]
        try:
            status, answer = fetch(mesh.way_out)
        except OSError:
            return False
        assert (status, answer["name"]) == (200, "bank")
        after = [mesh.forward.stat(name) for name in names]
        return after[1] > before[1] and after[2] > before[2] and after[0] > 0

    for protocol in ("CONNECT", "POST"):
        for port in doors:
            through(mesh, pki, port, protocol)
            wait_until(lambda protocol=protocol, port=port: asked(protocol, port))
    assert web.stat("listener_manager.lds.update_rejected") == web.stat("cluster_manager.cds.update_rejected") == 0


def test_who_is_refused(mesh, pki):
    through(mesh, pki, 3128, "CONNECT", "nobody.example")
    web = mesh.sidecar()
    with pytest.raises(OSError):
        fetch(mesh.way_out)
    assert web.stat(r"cluster.outbound.3128.bank.forward.example.upstream_cx_connect_attempts_exceeded") == 1
    through(mesh, pki, 3128, "CONNECT")
    wait_until(lambda: answers(mesh.way_out))


def test_by_an_egress_gateway(mesh, pki):
    """Istio's task: callers get to the gateway, and it alone to the forward proxy."""
    port = mesh.ports.take()
    mesh.write(
        "egress.yaml",
        f"""
apiVersion: meshproxy/v1
kind: Workload
metadata: {{name: egress, labels: {{istio: egressgateway}}}}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: out}}
spec:
  selector: {{istio: egressgateway}}
  servers: [{{port: {{number: {port}, name: tcp, protocol: TCP}}, hosts: [bank.example]}}]
""",
    )
    for number, protocol in ((3128, "CONNECT"), (6128, "POST")):
        through(mesh, pki, number, protocol, gateway="out")
        if not mesh.proxies:
            mesh.sidecar("egress")
        before = mesh.forward.stat("cluster.bank.upstream_cx_total")
        wait_until(lambda: answers(port))
        assert mesh.forward.stat("cluster.bank.upstream_cx_total") > before


def answers(port: int) -> bool:
    """Whether the bank does."""
    try:
        return fetch(port)[0] == 200
    except OSError:
        return False
