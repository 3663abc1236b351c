"""What documents of every kind become is configuration that the real Envoy takes, and our own sidecar."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from control.bootstrap import envoy as bootstrap
from control.translate.proxy import ProxyKey
from control.translate.resource import CLUSTER, LISTENER, ROUTES
from control.translate.translator import Translator
from control.translate.view import View
from tests.differential.proxy import envoy_binary
from tests.e2e.proxy import PATIENCE, ROOT
from tests.unit import test_control_envoy_filter as patches
from tests.unit.control_help import MESH, istio, plain, snapshot
from tests.unit.test_control_gateway_api_more import FROM_MAP, config_map, grant, policy, to_shop
from tests.unit.test_control_gateway_tls import api, certificate, gateway, https, pki, secret

__all__ = ["pki"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.envoy, pytest.mark.skipif(envoy_binary() is None, reason="no envoy binary")]

EDGE = """
apiVersion: meshproxy/v1
kind: Workload
metadata: {name: edge, labels: {istio: edge, gateway.networking.k8s.io/gateway-name: g}}
spec: {sidecar: {identity: true}}
"""


def documents(pki: dict[str, str]) -> list[str]:
    """A mesh with something of every kind that gateways, routes and patches know."""
    servers = gateway(
        https("{mode: SIMPLE, credentialName: shop, minProtocolVersion: TLSV1_2, cipherSuites: [ECDHE-ECDSA-AES128-GCM-SHA256]}", "[a.test]"),
        https("{mode: MUTUAL, credentialName: shop, subjectAltNames: [spiffe://a/b]}", "['*.b.test']", name="b"),
        https("{mode: OPTIONAL_MUTUAL, credentialName: shop}", "[c.test]", name="c"),
        https("{mode: ISTIO_MUTUAL}", "[d.test]", name="d"),
        https("{mode: SIMPLE, credentialName: shop}", "[e.test]", 8444, "TLS", "e"),
        https("{mode: PASSTHROUGH}", "['*']", 8445, "TLS", "f"),
        "{port: {number: 8080, name: http, protocol: HTTP}, hosts: ['*'], tls: {httpsRedirect: true}}",
        "{port: {number: 9000, name: tcp, protocol: TCP}, hosts: ['*']}",
    )
    rules = istio(
        "VirtualService",
        "v",
        """
        hosts: ["*"]
        gateways: [g, mesh]
        http:
        - {match: [{uri: {prefix: /a}}], delegate: {name: child}}
        - {route: [{destination: {host: reviews}}], timeout: 2s}
        tcp: [{route: [{destination: {host: db}}]}]
        tls:
        - match: [{sniHosts: [x.test, "*.y.test"]}]
          route: [{destination: {host: db}, weight: 1}, {destination: {host: api.shop.svc.cluster.local}, weight: 2}]
        - {match: [{sniHosts: ["*"]}], route: [{destination: {host: db}}]}
        """,
    )
    child = istio("VirtualService", "child", "http: [{match: [{uri: {prefix: /a/b}}], route: [{destination: {host: reviews}}]}]")
    locality = "{localityLbSetting: {failoverPriority: [topology.kubernetes.io/region, version=v1]}}"
    balance = istio("DestinationRule", "db", f"{{host: db, trafficPolicy: {{loadBalancer: {locality}, outlierDetection: {{interval: 1s}}}}}}")
    by_name = istio("VirtualService", "db", "hosts: [db, z.test]\ntls: [{match: [{sniHosts: [z.test]}], route: [{destination: {host: reviews}}]}]")
    listeners = (
        "[{name: h, port: 7000, protocol: HTTP}, {name: s, port: 7001, protocol: HTTPS, hostname: a.test, tls: {certificateRefs: [{name: shop}]}},"
        " {name: p, port: 7002, protocol: TLS, tls: {mode: Passthrough}}, {name: t, port: 7003, protocol: TCP}]"
    )
    backend = "rules: [{backendRefs: [{name: db, port: 3306}]}]"
    return [
        MESH,
        EDGE,
        servers,
        rules,
        child,
        balance,
        by_name,
        certificate(pki, "shop", ca_crt=pki["ca.pem"]),
        secret("shop-cacert", "Opaque", cacert=pki["ca.pem"]),
        api("Gateway", "g", f"{{gatewayClassName: mesh, listeners: {listeners}}}").replace("name: g,", "name: g, labels: {},"),
        api("HTTPRoute", "h", "{parentRefs: [{name: g}], rules: [{backendRefs: [{name: reviews, port: 9080}]}]}"),
        api("TLSRoute", "p", f"{{parentRefs: [{{name: g}}], hostnames: [q.test], {backend}}}"),
        api("TCPRoute", "t", f"{{parentRefs: [{{name: g}}], {backend}}}"),
        "{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop}, spec: {ports: [{name: http, port: 80}]}}",
        to_shop(", weight: 3"),
        grant(),
        policy(FROM_MAP),
        config_map(pki["ca.pem"]),
        patches.patch("NETWORK_FILTER", "INSERT_FIRST", patches.RBAC, patches.after("envoy.filters.network.tcp_proxy"), name="network"),
        patches.patch("HTTP_FILTER", "INSERT_FIRST", patches.HEADERS, patches.after(patches.HCM), name="http"),
        patches.patch("ROUTE_CONFIGURATION", "MERGE", "{response_headers_to_remove: [x]}", name="routes"),
        patches.patch("VIRTUAL_HOST", "MERGE", "{request_headers_to_remove: [y]}", name="hosts"),
        patches.patch("HTTP_ROUTE", "INSERT_FIRST", "{name: own, match: {path: /own}, direct_response: {status: 204}}", name="route"),
        patches.patch("CLUSTER", "MERGE", "{connect_timeout: 3s}", name="cluster"),
        patches.patch("LISTENER", "MERGE", "{per_connection_buffer_limit_bytes: 4096}", name="listener"),
        patches.patch("FILTER_CHAIN", "MERGE", "{transport_socket_connect_timeout: 3s}", name="chain"),
    ]


def static(view: View) -> str:
    """All that a proxy gets as one bootstrap. Secrets stay over ADS, which nobody asks before the configuration is found right."""
    made = bootstrap("edge", "default", [("127.0.0.1", 1)], sds="/nonexistent")
    clusters = [plain(view, CLUSTER, one.name) for one in view.all(CLUSTER)]
    listeners = [_with_routes(plain(view, LISTENER, one.name), view) for one in view.all(LISTENER)]
    made["static_resources"]["clusters"] += clusters
    made["static_resources"]["listeners"] = listeners
    del made["dynamic_resources"]["cds_config"], made["dynamic_resources"]["lds_config"]
    return json.dumps(made)


def _with_routes(listener, view: View):
    """Routes inside of the listener, since nothing asks for them while it is only looked at."""
    for chain in listener["filter_chains"]:
        for one in chain["filters"]:
            rds = one["typed_config"].pop("rds", None)
            if rds is not None:
                one["typed_config"]["route_config"] = plain(view, ROUTES, rds["route_config_name"])
    return listener


@pytest.mark.parametrize("proxy", ["edge", "web"])
def test_both_proxies_take_all_of_it(tmp_path: Path, pki, proxy):
    view = Translator().view(ProxyKey("sidecar", proxy, "default"), snapshot(*documents(pki)))
    names = {one.name for one in view.all(LISTENER)}
    if proxy == "edge":
        assert names >= {f"0.0.0.0_{port}" for port in (8443, 8444, 8445, 8080, 9000, 7000, 7001, 7002, 7003)}
    (tmp_path / "config.json").write_text(static(view))
    for command in ([envoy_binary() or "envoy"], [sys.executable, "-m", "meshproxy"]):
        run = subprocess.run(
            [*command, "-c", str(tmp_path / "config.json"), "--mode", "validate"], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE * 4, check=False
        )
        assert run.returncode == 0, run.stderr[-3000:] + run.stdout[-1000:]
        assert "eprecated" not in run.stderr
