"""What `meshctl proxy-config` prints."""

from __future__ import annotations

import json

import pytest
import yaml
from google.protobuf import any_pb2

from control import query
from control.ads.hub import Hub, Scope
from control.ads.status import client_status
from control.output import plain, show
from control.translate.resource import CLUSTER, LISTENER, ROUTES, VIRTUAL_HOST
from meshproxy.api import messages
from tests.unit.control_help import MESH, snapshot

CONTEXT = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_configuration_within_configuration(form, read):
    cluster = messages.known("envoy.config.cluster.v3.Cluster")(name="a")
    packed = any_pb2.Any()
    packed.Pack(messages.known(CONTEXT)(sni="a.test"))
    cluster.transport_socket.typed_config.CopyFrom(packed)
    cluster.transport_socket_matches.add(name="b").transport_socket.typed_config.CopyFrom(packed)
    typed = {"@type": f"type.googleapis.com/{CONTEXT}", "sni": "a.test"}
    assert read(show([plain(cluster)], form)) == [
        {"name": "a", "transport_socket": {"typed_config": typed}, "transport_socket_matches": [{"name": "b", "transport_socket": {"typed_config": typed}}]}
    ]


def test_states_of_endpoints_are_told_apart():
    assignment = messages.known("envoy.config.endpoint.v3.ClusterLoadAssignment")(cluster_name="a")
    group = assignment.endpoints.add()
    for port, state in enumerate(("UNKNOWN", "HEALTHY", "UNHEALTHY", "DRAINING", "DEGRADED"), 1):
        one = group.lb_endpoints.add(health_status=state)
        one.endpoint.address.socket_address.address = "10.0.0.1"
        one.endpoint.address.socket_address.port_value = port
    lines = query.resource_table("endpoints", [assignment]).splitlines()
    assert [line.split()[1] for line in lines] == ["STATUS", "HEALTHY", "HEALTHY", "UNHEALTHY", "DRAINING", "DEGRADED"]


def asked(hub: Hub, url: str, *names: str, only: str = "") -> None:
    """A stream of web.default that asks for resources and is sent them."""
    connection = hub.open(delta=True, only=only)
    request = messages.known("envoy.service.discovery.v3.DeltaDiscoveryRequest")(type_url=url, resource_names_subscribe=names)
    request.node.id = "web.default"
    connection.receive(request.SerializeToString())
    list(connection.responses())


def test_virtual_hosts_that_came_when_they_were_called_are_routes():
    hub = Hub(snapshot(MESH), Scope(observed=True))
    asked(hub, VIRTUAL_HOST, "http_proxy/reviews:9080", "http_proxy/nowhere:1")
    found = query.resources(client_status(hub.connections, lambda _: True, True), ROUTES, "web.default")
    rows = [line.split() for line in query.resource_table("routes", found).splitlines()]
    assert rows[1:] == [
        ["http_proxy", "nowhere:1", "/*", "status", "502"],
        ["http_proxy", "reviews:9080", "/*", "outbound|9080||reviews.default.svc.cluster.local"],
    ]
    assert all(plain(one) for one in found)


def test_a_proxy_with_a_stream_for_each_type():
    hub = Hub(snapshot(MESH))
    asked(hub, LISTENER, "*", only=LISTENER)
    asked(hub, CLUSTER, "*", only=CLUSTER)
    response = client_status(hub.connections, lambda _: True, True)
    assert len(response.config) == 2
    for url in (LISTENER, CLUSTER):
        names = [one.name for one in query.resources(response, url, "web.default")]
        assert names
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("asked", ["web", "web.default", "sidecar~10.0.0.1~web.default~default.svc.cluster.local"])
def test_proxies_are_known_by_name_and_namespace(asked):
    node = "sidecar~10.0.0.1~web.default~default.svc.cluster.local"
    response = messages.known("envoy.service.status.v3.ClientStatusResponse")()
    for name in ("other.default", node, "web.shop"):
        response.config.add().node.id = name
    assert [one["name"] for one in query.proxy_status(response)] == ["other.default", "web.default", "web.shop"]
    assert query.node_id(response, asked) == node
    assert query.node_id(response, "nobody") == "nobody"
