"""Istio's metrics by real proxies: two sidecars of ours, one before the other, and what their users scrape from them."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.proxy import ADMIN, PATIENCE, Proxy, cluster, listener, wait_until

pytestmark = pytest.mark.slow

PEERS = "{name: istio.metadata_exchange, typed_config: {'@type': type.googleapis.com/udpa.type.v1.TypedStruct, type_url: "
PEERS += "type.googleapis.com/io.istio.http.peer_metadata.Config, value: %s}}"
HEARS = "{downstream_discovery: [{istio_headers: {}}, {workload_discovery: {}}], downstream_propagation: [{istio_headers: {}}]}"
TELLS = "{upstream_discovery: [{istio_headers: {}}, {workload_discovery: {}}], upstream_propagation: [{istio_headers: {}}]}"
STATS = "{name: istio.stats, typed_config: {'@type': type.googleapis.com/stats.PluginConfig%s}}"
NODE = "node: {{id: {name}-1, metadata: {{NAME: {name}-1, WORKLOAD_NAME: {name}, NAMESPACE: shop, CLUSTER_ID: here, LABELS: {{app: {name}, version: v1, \
service.istio.io/canonical-name: {name}, service.istio.io/canonical-revision: v1}}}}}}\n"
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$")
TRAFFIC = 12


class Application:
    """Answers with the headers that it was sent, and a status that the path names."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
                self.send_response(int(self.path.rpartition("/")[2] or 200))
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    made = Application()
    yield made
    made.close()


def config(name: str, filters: list[str], direction: str, to: str, *, services: bool = False, extra: str = "", endpoint: str = "") -> str:
    """A sidecar of `name` with one listener, in front of or behind `to`, a cluster of its own."""
    text = NODE.format(name=name) + ADMIN + "stats_flush_interval: 0.05s\nstatic_resources:\n  listeners:"
    text += listener(
        0, "{match: {prefix: /}, route: {cluster: up}}", extra=f"traffic_direction: {direction}", filters="".join(f"\n          - {one}" for one in filters)
    )
    text = text.replace("          \n", "")
    if services:
        to = to.replace("name: up,", "name: up, metadata: {filter_metadata: {istio: {services: [{host: web.shop.svc, name: web, namespace: shop}]}}},", 1)
    if endpoint:
        to = to.replace("{endpoint: {address", f"{{metadata: {{filter_metadata: {{istio: {{workload: '{endpoint}'}}}}}}, endpoint: {{address", 1)
    return text + "  clusters:" + to + extra


def send(port: int, paths: list[str], **headers: str) -> list[tuple[int, dict[str, str], dict[str, str]]]:
    """Requests over one connection: status, what the application got, what came back."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    found = []
    try:
        for path in paths:
            connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            body = response.read()
            found.append((response.status, json.loads(body) if body.startswith(b"{") else {}, dict(response.headers)))
    finally:
        connection.close()
    return found


def samples(proxy: Proxy, name: str) -> list[tuple[dict[str, str], float]]:
    """The samples of a metric: labels and value."""
    found = []
    for line in proxy.admin("GET", "/stats/prometheus")[1].splitlines():
        match = SAMPLE.match(line)
        if match is not None and match[1] == name:
            found.append((dict(re.findall(r'(\w+)="([^"]*)"', match[2])), float(match[3])))
    return found


def by_code(proxy: Proxy, name: str) -> dict[str, float]:
    return {labels["response_code"]: value for labels, value in samples(proxy, name)}


HTTP2 = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
HTTP2 = f"typed_extension_protocol_options: {{{HTTP2}: {{'@type': type.googleapis.com/{HTTP2}, explicit_http_config: {{http2_protocol_options: {{}}}}}}}}"


@pytest.mark.parametrize("between", ["HTTP/1.1", "HTTP/2"])
def test_two_sidecars(tmp_path: Path, application: Application, between: str):
    """Each side counts each request once, under who the other one said it is; the application and the client see nothing of it."""
    for name in ("server", "client"):
        (tmp_path / name).mkdir()
    inbound = config("web", [PEERS % HEARS, STATS % ", disable_host_header_fallback: true"], "INBOUND", cluster("up", application.port))
    with Proxy(tmp_path / "server", inbound) as server:
        to = cluster("up", server.port())
        if between == "HTTP/2":
            to = to.replace("connect_timeout", f"{HTTP2}, connect_timeout")
        outbound = config("front", [PEERS % TELLS, STATS % ""], "OUTBOUND", to, services=True)
        with Proxy(tmp_path / "client", outbound) as client:
            port = client.port()
            answers = send(port, ["/"] * TRAFFIC + [f"/{number}/200" for number in range(TRAFFIC)] + ["/404"] * TRAFFIC)
            assert [status for status, _, _ in answers] == [200] * 2 * TRAFFIC + [404] * TRAFFIC
            for _, got, back in answers:
                assert not [name for name in {**got, **back} if "peer-metadata" in name.lower()]
            ends = {
                "source_workload": "front",
                "source_workload_namespace": "shop",
                "source_app": "front",
                "source_version": "v1",
                "source_canonical_service": "front",
                "source_canonical_revision": "v1",
                "source_cluster": "here",
                "destination_workload": "web",
                "destination_workload_namespace": "shop",
                "destination_app": "web",
                "destination_version": "v1",
                "destination_canonical_service": "web",
                "destination_canonical_revision": "v1",
                "destination_cluster": "here",
                "source_principal": "unknown",
                "destination_principal": "unknown",
                "request_protocol": "http",
                "grpc_response_status": "",
                "response_flags": "-",
            }
            services = {
                "source": {"destination_service": "web.shop.svc", "destination_service_name": "web", "destination_service_namespace": "shop"},
                "destination": {"destination_service": "web", "destination_service_name": "web", "destination_service_namespace": "shop"},
            }
            for proxy, reporter, security in ((client, "source", "unknown"), (server, "destination", "none")):
                same = {**ends, **services[reporter], "reporter": reporter, "connection_security_policy": security}
                counted = {labels.pop("response_code"): (labels, value) for labels, value in samples(proxy, "istio_requests_total")}
                assert counted == {"200": (same, 2 * TRAFFIC), "404": (same, TRAFFIC)}
                for metric in ("request_duration_milliseconds", "request_bytes", "response_bytes"):
                    wait_until(lambda: by_code(proxy, f"istio_{metric}_count") == {"200": 2 * TRAFFIC, "404": TRAFFIC})  # noqa: B023  # at once
                bounds = [labels["le"] for labels, _ in samples(proxy, "istio_request_bytes_bucket") if labels["response_code"] == "404"]
                assert bounds[:4] == ["0.5", "1", "5", "10"]
                assert bounds[-1] == "+Inf"
            [(labels, value)] = samples(client, "istio_build")
            assert (labels, value) == ({"component": "proxy", "tag": "unknown"}, 1)


def test_who_says_nothing(tmp_path: Path, application: Application):
    """A client without a sidecar is unknown, and gets no answer to what it has not asked; one that says half of it gets that half."""
    with Proxy(tmp_path, config("web", [PEERS % HEARS, STATS % ""], "INBOUND", cluster("up", application.port))) as server:
        port = server.port()
        for _, _, back in send(port, ["/"] * TRAFFIC):
            assert "x-envoy-peer-metadata" not in back
        for _, got, back in send(port, ["/"] * TRAFFIC, x_envoy_peer_metadata_id="me"):
            assert "x-envoy-peer-metadata-id" not in got
            assert back["x-envoy-peer-metadata-id"] == "web-1"
            assert "x-envoy-peer-metadata" not in back
        for _, _, back in send(port, ["/"] * TRAFFIC, x_envoy_peer_metadata_id="me", x_envoy_peer_metadata="!"):
            assert back["x-envoy-peer-metadata-id"] == "web-1"
            assert len(back["x-envoy-peer-metadata"]) > 100
        [(labels, value)] = samples(server, "istio_requests_total")
        assert value == 3 * TRAFFIC
        assert {labels[f"source_{name}"] for name in ("workload", "app", "cluster", "canonical_service", "principal")} == {"unknown"}
        assert labels["source_canonical_revision"] == "latest"


def test_an_endpoint_that_says_who_it_is(tmp_path: Path, application: Application):
    """Without an answer that tells, the metadata of the endpoint do."""
    text = config("front", [PEERS % TELLS, STATS % ""], "OUTBOUND", cluster("up", application.port), endpoint="web-7;shop;web;v7;there")
    with Proxy(tmp_path, text) as client:
        for _, got, _ in send(client.port(), ["/"] * TRAFFIC):
            assert got["x-envoy-peer-metadata-id"] == "front-1"
        [(labels, value)] = samples(client, "istio_requests_total")
        assert value == TRAFFIC
        wanted = ("web-7", "shop", "web", "v7", "there")
        assert (
            tuple(labels[f"destination_{name}"] for name in ("workload", "workload_namespace", "canonical_service", "canonical_revision", "cluster")) == wanted
        )
        assert labels["destination_service"] == labels["destination_service_name"] == f"127.0.0.1:{client.port()}"


def test_overrides(tmp_path: Path, application: Application):
    """Metrics that are dropped, labels that go, and labels with values of their own, constants and others."""
    metrics = """{metrics: [{name: request_bytes, drop: true}, {tags_to_remove: [destination_cluster]},
        {name: requests_total, dimensions: {who: "request.headers['x-user']", source_app: "'here'", what: request.method, port: node.id}}]}"""
    text = config("web", [STATS % f", {metrics[1:-1]}"], "INBOUND", cluster("up", application.port)).replace("\n        {name", " {name")
    with Proxy(tmp_path, text) as server:
        send(server.port(), ["/"] * TRAFFIC, x_user="ann")
        send(server.port(), ["/"] * TRAFFIC)
        counted = {labels["who"]: (labels, value) for labels, value in samples(server, "istio_requests_total")}
        assert {who: value for who, (_, value) in counted.items()} == {"ann": TRAFFIC, "unknown": TRAFFIC}
        labels = counted["ann"][0]
        assert (labels["source_app"], labels["what"], labels["port"]) == ("here", "GET", "web-1")
        assert "destination_cluster" not in labels
        assert samples(server, "istio_request_bytes_count") == []
        wait_until(lambda: by_code(server, "istio_response_bytes_count") == {"200": 2 * TRAFFIC})
        [(labels, _)] = samples(server, "istio_response_bytes_count")
        assert "who" not in labels
        assert "destination_cluster" not in labels


def test_workers_count_together(tmp_path: Path, application: Application):
    with Proxy(tmp_path, config("web", [STATS % ""], "INBOUND", cluster("up", application.port)), "--concurrency", "2") as server:
        for _ in range(TRAFFIC):
            send(server.port(), ["/", "/"])
        [(labels, value)] = samples(server, "istio_requests_total")
        assert labels["destination_service"] == f"127.0.0.1:{server.port()}"
        assert value == 2 * TRAFFIC
        [(_, value)] = samples(server, "istio_build")
        assert value == 1


TCP = """
  - name: l1
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    traffic_direction: OUTBOUND
    filter_chains:
    - filters:
      - {stats}
      - name: tcp
        typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: up}}
"""


def test_plain_connections(tmp_path: Path):
    """What they have moved is counted while they are open, and all of it when they are closed."""
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        to = cluster("up", upstream.getsockname()[1]).replace(
            "{endpoint: {address", "{metadata: {filter_metadata: {istio: {workload: db;shop;db;v1;c}}}, endpoint: {address"
        )
        text = NODE.format(name="front") + ADMIN + "static_resources:\n  listeners:"
        text += TCP.format(stats=STATS % ", tcp_reporting_duration: 0.05s") + "  clusters:" + to
        with Proxy(tmp_path, text) as client:
            names = ("connections_opened_total", "connections_closed_total", "received_bytes_total", "sent_bytes_total")

            def counted() -> list[float]:
                return [sum(value for _, value in samples(client, f"istio_tcp_{name}")) for name in names]

            with socket.create_connection(("127.0.0.1", client.port()), PATIENCE) as connection:
                served, _ = upstream.accept()
                with served:
                    connection.sendall(b"hello")
                    assert served.recv(5) == b"hello"
                    served.sendall(b"hi")
                    assert connection.recv(2) == b"hi"
                    wait_until(lambda: counted() == [1, 0, 5, 2])
            wait_until(lambda: counted() == [1, 1, 5, 2])
            [(labels, _)] = samples(client, "istio_tcp_connections_opened_total")
            assert labels["request_protocol"] == "tcp"
            assert (labels["source_workload"], labels["destination_workload"], labels["reporter"]) == ("front", "db", "source")
            assert "response_code" not in labels
