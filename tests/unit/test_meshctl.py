"""The `meshctl` command, as far as it needs no server."""

from __future__ import annotations

import json
import re
import socket

import pytest
import yaml

from control import cli, query
from control.ads import loads
from control.ads.hub import Hub
from control.ads.session import ProtocolError
from control.ads.status import client_status
from control.translate.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES
from meshproxy.api import bootstrap as bootstraps
from meshproxy.api import messages
from tests.unit.control_help import MESH, istio, snapshot

RULES = istio(
    "VirtualService",
    "reviews",
    """
    hosts: [reviews]
    http:
    - match: [{uri: {exact: /a}, headers: {x: {exact: z}}}, {uri: {regex: "/b.*"}}]
      redirect: {uri: /c}
    - match: [{uri: {prefix: /d}}]
      directResponse: {status: 503}
    - route: [{destination: {host: reviews}, weight: 1}, {destination: {host: reviews, subset: v1}, weight: 2}]
    """,
)


def test_validate(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(MESH + "---\n{apiVersion: v1, kind: Service, metadata: {name: x}, spec: {port: 1}}")
    assert cli.main(["validate", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a.yaml: document 6 (Service default/x): spec.port: no such field; did you mean 'ports'?",
        "5 documents are right, 1 complaints",
    ]
    assert cli.main(["validate", str(tmp_path), "-o", "json"]) == 1
    (complaint,) = json.loads(capsys.readouterr().out)["complaints"]
    assert (complaint["file"], complaint["document"], complaint["path"], complaint["kind"]) == ("a.yaml", 6, "spec.port", "unknown")
    (tmp_path / "a.yaml").write_text(MESH)
    assert cli.main(["validate", str(tmp_path), "-o", "yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"right": 5, "complaints": [], "notes": []}


def test_validate_knows_the_trust_domain_as_serve_does(tmp_path, capsys):
    config = "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: 'trustDomain: new.example'}}"
    (tmp_path / "a.yaml").write_text(config)
    for place in (tmp_path, tmp_path / "a.yaml"):
        assert cli.main(["validate", str(place)]) == 1
        assert "data.mesh.trustDomain: 'new.example' is not the one that is served, cluster.local: see --trust-domain" in capsys.readouterr().out
        assert cli.main(["validate", str(place), "--trust-domain", "new.example"]) == 0
        assert capsys.readouterr().out == "1 documents are right, 0 complaints\n"


VERSIONS = """
    host: reviews
    subsets: [{name: v1, labels: {version: v1}}]
    """
LOOSE = """
    hosts: [reviews]
    gateways: [mesh, nowhere, shop/edge]
    http:
    - route: [{destination: {host: reviews, subset: v9}, weight: 1}, {destination: {host: reviews, subset: v1}, weight: 1}]
      mirror: {host: gone}
    - route: [{destination: {host: reviews, port: {number: 1}}}]
    """


def test_what_leads_nowhere_is_noted(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(MESH)
    rules = (istio("VirtualService", "r", LOOSE), istio("DestinationRule", "d", "host: nobody"), istio("DestinationRule", "v", VERSIONS))
    (tmp_path / "b.yaml").write_text("\n---\n".join(rules))
    edge = istio("Gateway", "edge", "selector: {a: b}\nservers: [{port: {number: 80, protocol: HTTP, name: a}, hosts: ['*']}]")
    (tmp_path / "c.yaml").write_text(edge.replace("{name: edge}", "{name: edge, namespace: shop}"))
    assert cli.main(["validate", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "b.yaml: document 1 (VirtualService default/r): note: reviews.default.svc.cluster.local has no port 1",
        "b.yaml: document 1 (VirtualService default/r): note: reviews.default.svc.cluster.local has no subset 'v9'",
        "b.yaml: document 1 (VirtualService default/r): note: there is no Gateway default/nowhere",
        "b.yaml: document 1 (VirtualService default/r): note: there is no service gone.default.svc.cluster.local",
        "b.yaml: document 2 (DestinationRule default/d): note: there is no service nobody.default.svc.cluster.local",
        "9 documents are right, 0 complaints",
    ]
    assert cli.main(["validate", str(tmp_path), "-o", "json"]) == 0
    first = json.loads(capsys.readouterr().out)["notes"][0]
    assert first == {"file": "b.yaml", "document": 1, "object": "VirtualService default/r", "what": "reviews.default.svc.cluster.local has no port 1"}
    assert cli.main(["validate", str(tmp_path / "b.yaml")]) == 0
    assert capsys.readouterr().out == "3 documents are right, 0 complaints\n"


def test_a_folder_that_is_not_there(capsys):
    assert cli.main(["validate", "/no/such/folder"]) == 2
    assert capsys.readouterr().err == "meshctl: /no/such/folder: No such file or directory\n"


def test_validate_of_a_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(MESH)
    (tmp_path / "b.yaml").write_text("{")
    assert cli.main(["validate", str(tmp_path / "a.yaml")]) == 0
    assert capsys.readouterr().out == "5 documents are right, 0 complaints\n"
    (tmp_path / "notes.txt").write_text("")
    assert cli.main(["validate", str(tmp_path / "notes.txt")]) == 2
    assert "documents are in files that end in .yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--listen", "127.0.0.1:99999"], "--listen 127.0.0.1:99999: host:port is needed"),
        (["--listen", "nonsense"], "--listen nonsense: host:port is needed"),
        (["--ca-dir", "ca", "--tls-listen", "15012"], "--tls-listen 15012: host:port is needed"),
        (["--trust-domain", "a b"], "--trust-domain: 'a b' is no trust domain"),
        (["--ca-dir", "ca", "--ca-user", "1001"], "--ca-user 1001: UID=NAMESPACE/SERVICEACCOUNT is needed"),
        (["--ca-dir", "ca", "--ca-user", "me=shop/web"], "--ca-user me=shop/web: UID=NAMESPACE/SERVICEACCOUNT is needed"),
        (["--ca-dir", "ca", "--ca-user", "1=shop/w b"], "--ca-user 1=shop/w b: 'w b' is no segment"),
        (["--listen", "127.0.0.1:0", "--address-path", "no/such/file"], "no/such/file: No such file or directory"),
        (["--kubernetes", "--kubeconfig", "none"], "none: there is no such kubeconfig; --kubeconfig says where one is"),
        (["--token-reviews", "--kubeconfig", "none"], "none: there is no such kubeconfig; --kubeconfig says where one is"),
    ],
)
def test_calls_of_serve_that_are_wrong(tmp_path, capsys, monkeypatch, flags, why):
    """Nothing is made, nothing is served."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mesh").mkdir()
    assert cli.main(["serve", "mesh", *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"meshctl: {why}")
    assert [one.name for one in tmp_path.iterdir()] == ["mesh"]


def test_a_port_that_is_taken(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main(["serve", str(tmp_path), "--listen", address]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"meshctl: cannot listen on {address}: Address already in use"


def test_a_server_that_is_not_there(capsys):
    assert cli.main(["proxy-status", "--server", "127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.startswith("meshctl: 127.0.0.1:1: ")


@pytest.mark.parametrize("flags", [[], ["--sotw"], ["--admin-port", "15000"]])
def test_bootstrap_is_one(capsys, flags):
    assert cli.main(["bootstrap", "web.shop", "--server", "127.0.0.1:15010", *flags]) == 0
    made = bootstraps.parse(capsys.readouterr().out)
    assert made.node.id == "web.shop"
    assert made.dynamic_resources.ads_config.grpc_services[0].envoy_grpc.cluster_name == made.static_resources.clusters[0].name


def test_bootstrap_for_grpc(capsys):
    assert cli.main(["bootstrap", "web", "--for", "grpc", "-o", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["xds_servers"][0]["server_uri"] == "127.0.0.1:15010"
    assert made["node"]["metadata"] == {"GENERATOR": "grpc", "NAME": "web", "NAMESPACE": "default"}


def test_bootstrap_for_grpc_by_tls(capsys):
    arguments = ["bootstrap", "web", "--for", "grpc", "-o", "json", "--server", "control.example:15011"]
    assert cli.main(arguments) == 2
    assert "control.example is another machine, where a gRPC client must say who it is: by the certificate in --certificates" in capsys.readouterr().err
    assert cli.main([*arguments, "--certificates", "/certificates"]) == 0
    (server,) = json.loads(capsys.readouterr().out)["xds_servers"]
    assert server["server_uri"] == "control.example:15011"
    (credentials,) = server["channel_creds"]
    files = {"certificate_file": "cert-chain.pem", "private_key_file": "key.pem", "ca_certificate_file": "root-cert.pem"}
    assert credentials == {"type": "tls", "config": {**{key: f"/certificates/{name}" for key, name in files.items()}, "refresh_interval": "5s"}}
    assert cli.main([*arguments, "--certificates", "/certificates", "--allow-plaintext"]) == 0
    (server,) = json.loads(capsys.readouterr().out)["xds_servers"]
    assert server["channel_creds"] == [{"type": "insecure"}]


def test_bootstrap_needs_a_port(capsys):
    assert cli.main(["bootstrap", "web", "--server", "here"]) == 2
    assert "host:port" in capsys.readouterr().err


# --- status


def talk(connection, url, nonce="", why="", names=()):
    """One request, and the nonces of the responses."""
    request = messages.known("envoy.service.discovery.v3.DiscoveryRequest")(type_url=url, response_nonce=nonce, resource_names=names)
    request.node.id = "web.default"
    if why:
        request.error_detail.message = why
    connection.receive(request.SerializeToString())
    return [messages.known("envoy.service.discovery.v3.DiscoveryResponse").FromString(data).nonce for data in connection.responses()]


@pytest.fixture
def hub():
    hub = Hub(snapshot(MESH, RULES))
    connection = hub.open(delta=False)
    (nonce,) = talk(connection, CLUSTER)
    talk(connection, CLUSTER, nonce)
    (nonce,) = talk(connection, LISTENER)
    talk(connection, LISTENER, nonce, "no such filter")
    talk(connection, ROUTES, names=["reviews.default.svc.cluster.local:9080"])
    return hub


def status(hub, contents):
    return client_status(hub.connections, lambda _: True, contents)


def test_what_a_proxy_refuses_is_in_the_log(hub, caplog):
    (connection,) = hub.connections
    request = messages.known("envoy.service.discovery.v3.DiscoveryRequest")(type_url=ROUTES, response_nonce=connection.session.subscriptions[ROUTES].nonce)
    request.error_detail.message = "no such\nroute"
    for _ in range(2):  # what was answered already says nothing new
        connection.receive(request.SerializeToString())
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == ["web.default refuses RouteConfiguration: no such route"]


def test_proxy_status(hub):
    found = query.proxy_status(status(hub, False))
    assert found == [{"name": "web.default", "CDS": "SYNCED", "LDS": "ERROR", "EDS": "NOT SENT", "RDS": "STALE", "errors": {"LDS": "no such filter"}}]
    assert query.status_table(found).splitlines() == [
        "NAME          CDS      LDS     EDS        RDS",
        "web.default   SYNCED   ERROR   NOT SENT   STALE",
        "web.default: LDS was refused: no such filter",
    ]


def test_proxy_config(hub):
    response = status(hub, True)
    assert query.resource_table("clusters", query.resources(response, CLUSTER, "web.default")).splitlines() == [
        "SERVICE                             PORT   SUBSET   DIRECTION   TYPE     BALANCER",
        "db.default.svc.cluster.local        3306   -        outbound    EDS      LEAST_REQUEST",
        "reviews.default.svc.cluster.local   9080   -        outbound    EDS      LEAST_REQUEST",
        "-                                   8000   -        inbound     STATIC   ROUND_ROBIN",
    ]
    rows = [re.split("  +", line) for line in query.resource_table("routes", query.resources(response, ROUTES, "web.default")).splitlines()]
    assert [tuple(row[-2:]) for row in rows[1:]] == [
        ("/a (x)", "redirect"),
        ("~/b.*", "redirect"),
        ("/d*", "status 503"),
        ("/*", "outbound|9080||reviews.default.svc.cluster.local (1), outbound|9080|v1|reviews.default.svc.cluster.local (2)"),
    ]
    listeners = query.resource_table("listeners", query.resources(response, LISTENER, "web.default"))
    assert "127.0.0.1_13306   127.0.0.1:13306   tcp_proxy" in listeners
    assert query.resources(response, ENDPOINTS, "web.default") == []
    with pytest.raises(query.QueryError):
        query.resources(messages.known("envoy.service.status.v3.ClientStatusResponse")(), CLUSTER, "nobody")


def report(cluster, **numbers):
    """A LoadStatsRequest: of each endpoint (by its port) requests begun, failed, under way."""
    request = messages.known("envoy.service.load_stats.v3.LoadStatsRequest")()
    request.node.id = "web.default"
    stats = request.cluster_stats.add(cluster_name=cluster, total_dropped_requests=numbers.pop("dropped", 0))
    stats.load_report_interval.seconds = 10
    for zone, ports in numbers.items():
        group = stats.upstream_locality_stats.add()
        group.locality.zone = zone
        for port, (issued, error, active) in ports.items():
            one = group.upstream_endpoint_stats.add(total_issued_requests=issued, total_error_requests=error, total_requests_in_progress=active)
            one.address.socket_address.address = "10.0.0.1"
            one.address.socket_address.port_value = port
    return request.SerializeToString()


def test_loads_of_a_proxy(hub):
    stream = hub.loads.open()
    hello = messages.known("envoy.service.load_stats.v3.LoadStatsRequest")()
    hello.node.id = "web.default"
    answer = messages.known("envoy.service.load_stats.v3.LoadStatsResponse").FromString(stream.receive(hello.SerializeToString()))
    assert answer.send_all_clusters
    assert answer.report_endpoint_granularity
    assert answer.load_reporting_interval.seconds == loads.INTERVAL_S
    assert stream.receive(report("unused", dropped=0)) is None
    assert stream.receive(report("db", z1={80: (3, 1, 1), 81: (1, 0, 0)}, z2={82: (1, 0, 1)}, dropped=2)) is None
    stream.receive(report("db", z1={80: (2, 1, 0)}, dropped=1))
    response = client_status(hub.connections, lambda _: True, True, hub.loads)
    found = query.resources(response, loads.URL, "web.default")
    assert query.resource_table("loads", found).splitlines() == [
        "ENDPOINT      REQUESTS   ERRORS   UNDER WAY   ZONE   CLUSTER",
        "10.0.0.1:80   5          2        0           z1     db",
        "10.0.0.1:81   1          0        0           z1     db",
        "10.0.0.1:82   1          0        0           z2     db",
        "(dropped)     3          -        -           -      db",
    ]
    assert [one.load_report_interval.seconds for one in found] == [20]
    with pytest.raises(ProtocolError):
        stream.receive(b"\xff")
    hub.loads.close(stream)
    assert query.resources(client_status(hub.connections, lambda _: True, True, hub.loads), loads.URL, "web.default") == []


def test_endpoints_of_a_proxy():
    hub = Hub(snapshot(MESH))
    talk(hub.open(delta=False), ENDPOINTS, names=["outbound|9080||reviews.default.svc.cluster.local"])
    table = query.resource_table("endpoints", query.resources(status(hub, True), ENDPOINTS, "web.default"))
    assert table.splitlines()[1].split() == ["127.0.0.1:19080", "HEALTHY", "0", "outbound|9080||reviews.default.svc.cluster.local"]


def test_a_stream_that_ends_is_forgotten(hub):
    (connection,) = hub.connections
    hub.close(connection)
    assert query.proxy_status(status(hub, False)) == []
