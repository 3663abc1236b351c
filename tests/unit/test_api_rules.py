"""Declared constraints: one case per kind of rule that the API uses."""

from __future__ import annotations

import pytest
from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, health_check_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.buffer.v3 import buffer_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from google.protobuf import any_pb2

from meshproxy.api import convert, registry, rules
from meshproxy.api.errors import INVALID

Cluster = cluster_pb2.Cluster
HCM = http_connection_manager_pb2.HttpConnectionManager
ROUTE = {"match": {"prefix": "/"}, "route": {"cluster": "c"}}


def check(cls, **fields):
    found = rules.check(convert.to_message(fields, cls))
    assert all(problem.kind == INVALID for problem in found)
    return [str(problem) for problem in found]


@pytest.mark.parametrize(
    ("cls", "fields", "expected"),
    [
        # strings
        (Cluster, {}, "name: must not be empty"),
        (base_pb2.HeaderValue, {"key": "a\nb"}, "key: 'a\\nb' must not hold line breaks or NUL"),
        (base_pb2.HeaderValue, {"key": ""}, "key: must not be empty"),
        (base_pb2.HeaderValue, {"key": "k", "value": "x" * 16385}, "value: must have at most 16384 bytes, has 16385"),
        (route_components_pb2.RouteMatch, {"path_separated_prefix": "/a/"}, "path_separated_prefix: '/a/' does not match"),
        (router_pb2.Router, {"strict_check_headers": ["x-foo"]}, "strict_check_headers[0]: 'x-foo' is not one of 'x-envoy-upstream-rq-timeout-ms', "),
        (accesslog_pb2.ResponseFlagFilter, {"flags": ["UH", "XX"]}, "flags[1]: 'XX' is not one of 'LH', "),
        # numbers, wrappers, durations
        (address_pb2.SocketAddress, {"address": "a", "port_value": 65536}, "port_value: 65536 is out of range: must be at most 65535"),
        (Cluster, {"name": "c", "ring_hash_lb_config": {"minimum_ring_size": 8388609}}, "ring_hash_lb_config.minimum_ring_size: 8388609 is out of range"),
        (buffer_pb2.Buffer, {"max_request_bytes": 0}, "max_request_bytes: 0 is out of range: must be greater than 0"),
        (buffer_pb2.Buffer, {}, "max_request_bytes: is required"),
        (Cluster, {"name": "c", "connect_timeout": "0s"}, "connect_timeout: 0s is out of range: must be greater than 0s"),
        (HCM, {"stat_prefix": "x", "route_config": {}, "stream_idle_timeout": "-0.5s"}, "stream_idle_timeout: -0.5s is negative"),
        (
            health_check_pb2.HealthCheck,
            {"tcp_health_check": {}, "timeout": "1s", "interval": "1s", "unhealthy_threshold": 1},
            "healthy_threshold: is required",
        ),
        # enums and booleans
        (Cluster, {"name": "c", "lb_policy": 99}, "lb_policy: 99 is not one of ROUND_ROBIN, "),
        (buffer_pb2.BufferPerRoute, {"disabled": False}, "disabled: must be true"),
        (
            health_check_pb2.HealthCheck.HttpHealthCheck,
            {"path": "/", "method": "CONNECT"},
            "method: CONNECT is not allowed here",
        ),
        # messages, oneofs, lists, maps, Any
        (route_components_pb2.Route, {"route": {"cluster": "c"}}, "match: is required"),
        (route_components_pb2.Route, {"match": {"prefix": "/"}}, "route or redirect or direct_response or filter_action or non_forwarding_action must be set"),
        (route_components_pb2.VirtualHost, {"name": "v"}, "domains: must not be empty"),
        (route_components_pb2.WeightedCluster, {}, "clusters: must not be empty"),
        (route_pb2.RouteConfiguration, {"virtual_hosts": [{"name": "", "domains": ["*"]}]}, "virtual_hosts[0].name: must not be empty"),
        (base_pb2.Metadata, {"filter_metadata": {"": {}}}, 'filter_metadata[""]: must not be empty'),
        (route_components_pb2.Route, {**ROUTE, "request_headers_to_add": [{"header": {"key": "a"}}] * 1001}, "request_headers_to_add: must have at most 1000"),
        (
            Cluster,
            {"name": "c", "health_checks": [{"tcp_health_check": {}, "timeout": "1s", "interval": "1s", "healthy_threshold": 1}]},
            "health_checks[0].unhealthy_threshold: is required",
        ),
    ],
)
def test_one_problem(cls, fields, expected):
    (found,) = check(cls, **fields)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (Cluster, {"name": "c"}),
        (Cluster, {"name": "c", "connect_timeout": "0.000000001s"}),
        (address_pb2.SocketAddress, {"address": "a", "port_value": 0}),
        (route_components_pb2.Route, ROUTE),
        (route_components_pb2.RouteMatch, {"path_separated_prefix": "/a/b"}),
        (buffer_pb2.BufferPerRoute, {"disabled": True}),
        (base_pb2.Metadata, {"filter_metadata": {"a": {}}}),
        (bootstrap_pb2.Bootstrap, {}),
        (
            HCM,
            {
                "stat_prefix": "x",
                "route_config": {},
                "access_log": [{"name": "a", "filter": {"status_code_filter": {"comparison": {"value": {"runtime_key": "k"}}}}}],
            },
        ),
    ],
)
def test_fine(cls, fields):
    assert check(cls, **fields) == []


def test_required_oneof_member_is_only_checked_when_chosen():
    assert check(route_components_pb2.RouteMatch, safe_regex={"regex": "a"}) == []
    assert check(route_components_pb2.RouteMatch, prefix="") == []


def test_through_any_and_typed_struct():
    tcp = any_pb2.Any()
    tcp.Pack(tcp_proxy_pb2.TcpProxy(cluster="c"))
    message = bootstrap_pb2.Bootstrap()
    message.static_resources.listeners.add().filter_chains.add().filters.add(name="f").typed_config.CopyFrom(tcp)
    path = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config"
    assert [str(problem) for problem in rules.check(message)] == [f"{path}.stat_prefix: must not be empty"]
    typed_struct = {"@type": "a/xds.type.v3.TypedStruct", "type_url": "a/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "value": {"cluster": "c"}}
    config = {"static_resources": {"listeners": [{"filter_chains": [{"filters": [{"name": "f", "typed_config": typed_struct}]}]}]}}
    assert check(bootstrap_pb2.Bootstrap, **config) == [f"{path}.stat_prefix: must not be empty"]
    typed_struct["value"] = {"clustre": "c"}
    assert check(bootstrap_pb2.Bootstrap, **config)[0].startswith(f"{path}.value.clustre: ")


def test_broken_any():
    message = bootstrap_pb2.Bootstrap()
    message.static_resources.clusters.add(name="c").transport_socket.name = "x"
    packed = message.static_resources.clusters[0].transport_socket.typed_config
    packed.type_url, packed.value = "a/envoy.config.cluster.v3.Cluster", b"\xff"
    (found,) = rules.check(message)
    assert found.path == "static_resources.clusters[0].transport_socket.typed_config"
    assert found.why == "the value is not a serialised envoy.config.cluster.v3.Cluster"


def test_nested_any_is_bounded():
    packed = any_pb2.Any(type_url="a/envoy.config.core.v3.TransportSocket", value=base_pb2.TransportSocket(name="x").SerializeToString())
    for _ in range(1000):
        outer = base_pb2.TransportSocket(name="x")
        outer.typed_config.CopyFrom(packed)
        packed = any_pb2.Any(type_url="a/envoy.config.core.v3.TransportSocket", value=outer.SerializeToString())
    (found,) = rules.check(registry.unpack(packed))
    assert found.why == "nested too deeply"


def test_every_rule_of_the_registered_extensions_compiles():
    for url in registry.EXTENSIONS:
        rules.check(registry.messages.message_class(registry.messages.full_name(url))())
