"""Plain values to messages: what Envoy accepts is accepted, and every mistake is found with its path."""

from __future__ import annotations

import pytest
from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.base_pb2 import DataSource, Metadata, Node
from envoy.extensions.transport_sockets.tls.v3.cert_pb2 import TlsParameters
from envoy.type.v3.percent_pb2 import FractionalPercent, Percent
from google.protobuf import any_pb2, duration_pb2, json_format, struct_pb2, wrappers_pb2

from meshproxy.api import convert, registry
from meshproxy.api.errors import ConfigError

RAW = "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"


def problems(value, cls=Cluster):
    with pytest.raises(ConfigError) as caught:
        convert.to_message(value, cls)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("value", "same_as"),
    [
        ({"connect_timeout": "0.25s"}, Cluster(connect_timeout=duration_pb2.Duration(nanos=250_000_000))),
        ({"connectTimeout": "1.5s"}, Cluster(connect_timeout=duration_pb2.Duration(seconds=1, nanos=500_000_000))),
        ({"connect_timeout": "-5.000000001s"}, Cluster(connect_timeout=duration_pb2.Duration(seconds=-5, nanos=-1))),
        ({"type": "STATIC"}, Cluster(type=Cluster.STATIC)),
        ({"type": "strict_dns"}, Cluster(type=Cluster.STRICT_DNS)),
        ({"type": "strict-dns"}, Cluster(type=Cluster.STRICT_DNS)),
        ({"type": 1}, Cluster(type=Cluster.STRICT_DNS)),
        ({"type": "1"}, Cluster(type=Cluster.STRICT_DNS)),
        ({"respect_dns_ttl": "true"}, Cluster(respect_dns_ttl=True)),
        ({"respect_dns_ttl": "No"}, Cluster(respect_dns_ttl=False)),
        ({"per_connection_buffer_limit_bytes": 5}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=5))),
        ({"per_connection_buffer_limit_bytes": 0}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value())),
        ({"per_connection_buffer_limit_bytes": "1e3"}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=1000))),
        ({"per_connection_buffer_limit_bytes": "5.0"}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=5))),
        ({"per_connection_buffer_limit_bytes": 5.0}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=5))),
        ({"per_connection_buffer_limit_bytes": {"value": 5}}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=5))),
        ({"per_connection_buffer_limit_bytes": {"value": "5"}}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value(value=5))),
        ({"per_connection_buffer_limit_bytes": {"value": None}}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value())),
        ({"per_connection_buffer_limit_bytes": {}}, Cluster(per_connection_buffer_limit_bytes=wrappers_pb2.UInt32Value())),
        ({"connect_timeout": {"seconds": "1", "nanos": 5}}, Cluster(connect_timeout=duration_pb2.Duration(seconds=1, nanos=5))),
        ({"per_connection_buffer_limit_bytes": None, "name": None}, Cluster()),
        ({"circuit_breakers": {}}, Cluster(circuit_breakers={})),
        ({"circuit_breakers": {"thresholds": {"priority": "HIGH"}}}, Cluster(circuit_breakers={"thresholds": [{"priority": 1}]})),
        ({"circuit_breakers": {"thresholds": [None, {}]}}, Cluster(circuit_breakers={"thresholds": [{}, {}]})),
        ({"transport_socket": {"typed_config": {}}}, Cluster(transport_socket={"typed_config": any_pb2.Any()})),
        ({"transport_socket": {"typed_config": {"@type": RAW}}}, Cluster(transport_socket={"typed_config": any_pb2.Any(type_url=RAW)})),
        (
            {"lb_subset_config": {"default_subset": {"a": 1}}},
            Cluster(lb_subset_config={"default_subset": struct_pb2.Struct(fields={"a": {"number_value": 1}})}),
        ),
    ],
)
def test_accepts(value, same_as):
    assert convert.to_message(value, Cluster) == same_as


def test_other_scalars():
    assert convert.to_message({"inline_bytes": "aGk="}, DataSource).inline_bytes == b"hi"
    assert convert.to_message({"inline_bytes": "_-8"}, DataSource).inline_bytes == b"\xff\xef"
    assert convert.to_message({"value": "12.5"}, Percent).value == 12.5
    assert convert.to_message({"value": "Infinity"}, Percent).value == float("inf")
    assert convert.to_message({"denominator": "MILLION"}, FractionalPercent).denominator == FractionalPercent.MILLION
    assert list(convert.to_message({"cipher_suites": ["a", None]}, TlsParameters).cipher_suites) == ["a", ""]


def test_struct_and_any_values():
    value = {"filter_metadata": {"envoy.lb": {"a": [1, 0.5, "x", True, None, {"b": {}}]}}, "typed_filter_metadata": {}}
    assert convert.to_message(value, Metadata) == json_format.ParseDict(value, Metadata())
    packed = convert.to_message({"typed_filter_metadata": {"d": {"@type": "a/google.protobuf.Duration", "value": "5s"}}}, Metadata)
    assert registry.unpack(packed.typed_filter_metadata["d"]) == duration_pb2.Duration(seconds=5)


def test_whole_configuration_like_json_format():
    endpoint = {"endpoint": {"address": {"socket_address": {"address": "10.0.0.1", "port_value": 80}}}, "load_balancing_weight": 3}
    value = {
        "node": {"id": "a", "metadata": {"x": [1, {"y": None}]}},
        "static_resources": {
            "clusters": [
                {
                    "name": "c",
                    "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [endpoint] * 3}]},
                    "transport_socket": {"name": "tls", "typed_config": {"@type": TLS, "sni": "x", "common_tls_context": {"alpn_protocols": ["h2"]}}},
                }
            ]
        },
    }
    registry.messages.descriptor("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext")
    assert convert.to_message(value, Bootstrap) == json_format.ParseDict(value, Bootstrap())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "expected a mapping with the fields of envoy.config.cluster.v3.Cluster, got a list"),
        ({"nam": "x"}, "nam: envoy.config.cluster.v3.Cluster has no such field; did you mean 'name'?"),
        ({"a b": "x"}, "['a b']: envoy.config.cluster.v3.Cluster has no such field"),
        ({"name": 5}, "name: expected a string, got 5 (put it in quotes)"),
        ({"name": {}}, "name: expected a string, got a mapping"),
        ({"connect_timeout": 5}, 'connect_timeout: expected a duration in seconds, such as "0.25s", got 5'),
        ({"connect_timeout": "5ms"}, "connect_timeout: expected a duration in seconds, such as \"0.25s\", got '5ms'"),
        ({"connect_timeout": "999999999999s"}, "connect_timeout: '999999999999s' is out of range: at most 315576000000s"),
        ({"respect_dns_ttl": "maybe"}, "respect_dns_ttl: expected true or false, got 'maybe'"),
        ({"respect_dns_ttl": 2}, "respect_dns_ttl: expected true or false, got 2"),
        ({"per_connection_buffer_limit_bytes": "5.5"}, "per_connection_buffer_limit_bytes: expected an integer, got '5.5'"),
        ({"per_connection_buffer_limit_bytes": True}, "per_connection_buffer_limit_bytes: expected an integer, got true"),
        (
            {"connect_timeout": {"seconds": 1, "nanos": -1}},
            "connect_timeout: out of range: at most 315576000000s, with less than a second of nanoseconds and of the same sign",
        ),
        ({"connect_timeout": {"second": 1}}, "connect_timeout.second: google.protobuf.Duration has no such field; did you mean 'seconds'?"),
        ({"per_connection_buffer_limit_bytes": {"value": {}}}, "per_connection_buffer_limit_bytes.value: expected an integer, got a mapping"),
        (
            {"per_connection_buffer_limit_bytes": {"values": 5}},
            "per_connection_buffer_limit_bytes.values: google.protobuf.UInt32Value has no such field; did you mean 'value'?",
        ),
        ({"per_connection_buffer_limit_bytes": 1 << 32}, "per_connection_buffer_limit_bytes: 4294967296 is out of range: 0 to 4294967295"),
        ({"circuit_breakers": {"thresholds": [{}, "x"]}}, "circuit_breakers.thresholds[1]: expected a mapping"),
        ({"type": "STATIK"}, "type: 'STATIK' is not one of STATIC, STRICT_DNS, LOGICAL_DNS, EDS, ORIGINAL_DST"),
        ({"type": True}, "type: expected one of STATIC"),
        ({"type": "STATIC", "cluster_type": {}}, "cluster_type: cannot be set together with type"),
        ({"connect_timeout": "1s", "connectTimeout": "1s"}, "connect_timeout: the field is there twice"),
        ({"transport_socket": {"typed_config": []}}, 'transport_socket.typed_config: expected a mapping with "@type"'),
        ({"transport_socket": {"typed_config": {"a": 1}}}, 'transport_socket.typed_config: "@type" is missing'),
        ({"transport_socket": {"typed_config": {"@type": 1}}}, 'transport_socket.typed_config: "@type" must be a string, not 1'),
        ({"transport_socket": {"typed_config": {"@type": "x.Y"}}}, 'transport_socket.typed_config: "@type" must look like'),
        ({"transport_socket": {"typed_config": {"@type": "a/os.path"}}}, "transport_socket.typed_config: unknown type 'a/os.path'"),
        ({"transport_socket": {"typed_config": {"@type": RAW, "x": 1}}}, "transport_socket.typed_config.x: envoy.extensions.transport_sockets.raw_buffer"),
        ({"typed_extension_protocol_options": {"a.b": {"@type": "x"}}}, 'typed_extension_protocol_options["a.b"]: "@type" must look like'),
        ({"typed_extension_protocol_options": []}, "typed_extension_protocol_options: expected a mapping, got a list"),
        ({"metadata": {"filter_metadata": {"a": 5}}}, 'metadata.filter_metadata["a"]: expected a mapping, got 5'),
    ],
)
def test_rejects(value, expected):
    (found,) = problems(value)
    assert found.startswith(expected)


def test_other_rejections():
    assert problems({"inline_bytes": "a"}, DataSource) == ["inline_bytes: 'a' is not base64"]
    assert problems({"value": "1 "}, Percent) == ["value: expected a number, got '1 '"]
    assert problems({"value": "1e999"}, Percent) == ["value: '1e999' is out of range"]
    assert problems({"typed_filter_metadata": {"d": {"@type": "a/google.protobuf.Duration", "seconds": 5}}}, Metadata) == [
        'typed_filter_metadata["d"]: google.protobuf.Duration has only the field "value" here'
    ]


def test_all_problems_at_once():
    found = problems({"static_resources": {"clusters": [{"name": 1}, {"foo": 2, "connect_timeout": "x"}]}, "node": {"id": []}}, Bootstrap)
    assert [problem.partition(":")[0] for problem in found] == [
        "static_resources.clusters[0].name",
        "static_resources.clusters[1].foo",
        "static_resources.clusters[1].connect_timeout",
        "node.id",
    ]


def test_depth_is_limited():
    deep: dict[str, object] = {}
    for _ in range(300):
        deep = {"a": deep}
    assert "nested too deeply" in problems({"metadata": deep}, Node)[0]
    deep = {}
    for _ in range(60):  # shallow enough to convert, too deep for the binary form
        deep = {"a": deep}
    assert problems({"metadata": deep}, Node) == ["nested too deeply"]


def test_struct_to_plain_values():
    struct = struct_pb2.Struct()
    value = {"a": 1, "b": 0.5, "c": "x", "d": [True, None, {"e": 2}]}
    struct.update(value)
    assert convert.from_struct(struct) == value
