"""Whatever is given as a configuration: either a message or a ConfigError with problems, never another exception."""

from __future__ import annotations

import contextlib
import json

import pytest
from envoy.config.bootstrap.v3.bootstrap_pb2 import Bootstrap
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.base_pb2 import Metadata
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.api import bootstrap, convert, document, messages, registry, rules, semantics, support
from meshproxy.api.errors import ConfigError
from meshproxy.api.scalars import Walk

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["5s", "-1s", "STATIC", "1e3", "0x10", "a/google.protobuf.Struct", "127.0.0.1", "yes", "*.a", "[::1]"])
)
# Field names that exist, so that the walk gets below the first level.
NAMES = st.sampled_from(
    """node id metadata static_resources listeners clusters name address socket_address port_value filter_chains filters typed_config @type value type
    connect_timeout load_assignment endpoints lb_endpoints endpoint filter_chain_match server_names prefix_ranges address_prefix prefix_len route_config
    virtual_hosts domains routes match prefix route cluster timeout layered_runtime layers static_layer admin http_filters stat_prefix transport_socket
    typed_extension_protocol_options lb_policy circuit_breakers thresholds additional_addresses weighted_clusters request_mirror_policies""".split()
) | st.text(max_size=5)
TYPES = st.sampled_from([*registry.EXTENSIONS, "a/google.protobuf.Duration", "a/xds.type.v3.TypedStruct", "a/google.protobuf.Any"])
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=4)
        | st.builds(lambda url, fields: {"@type": url, **fields}, TYPES, st.dictionaries(NAMES, inner, max_size=3))
    ),
    max_leaves=25,
)


def load_and_check(text: str | bytes) -> None:
    message = bootstrap.parse(text)
    support.check(message)
    semantics.check(message)


@given(st.text(max_size=60) | st.binary(max_size=60))
@settings(max_examples=150)
def test_garbage(text):
    with contextlib.suppress(ConfigError):
        load_and_check(text)


@given(DOCUMENTS)
@settings(max_examples=150)
def test_any_document(value):
    with contextlib.suppress(ConfigError):
        load_and_check(json.dumps(value))


@given(st.lists(st.tuples(NAMES, DOCUMENTS), max_size=4), st.sampled_from(["clusters", "listeners"]))
@settings(max_examples=150)
def test_any_resource(fields, kind):
    with contextlib.suppress(ConfigError):
        load_and_check(json.dumps({"static_resources": {kind: [dict(fields)]}}))


@given(TYPES, st.binary(max_size=40))
@settings(max_examples=150)
def test_any_binary_extension(url, value):
    message = Bootstrap()
    filter_chain = message.static_resources.listeners.add().filter_chains.add()
    filter_chain.filters.add(name="x").typed_config.type_url = url
    filter_chain.filters[0].typed_config.value = value
    support.check(message)
    semantics.check(message)


@given(st.binary(max_size=80))
@settings(max_examples=150)
def test_any_binary_bootstrap(data):
    with contextlib.suppress(ConfigError):
        message = bootstrap.from_binary(data)
        support.check(message)
        semantics.check(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31 - 1) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
@settings(max_examples=150)
def test_json_text_gives_the_value_back(value):
    assert document.parse(json.dumps(value)) == value
    assert document.parse(json.dumps(value, ensure_ascii=False), json_only=True) == value


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
@settings(max_examples=150)
def test_structs_convert_like_json_format(value):
    wanted = json_format.ParseDict({"filter_metadata": {"x": value}}, Metadata())
    assert convert.to_message({"filter_metadata": {"x": value}}, Metadata) == wanted
    assert convert.from_struct(wanted.filter_metadata["x"]) == value


@given(st.text(max_size=80))
@settings(max_examples=150)
def test_no_name_loads_anything_outside_the_api(name):
    descriptor = messages.descriptor(name)
    assert descriptor is None or descriptor.full_name == name


@pytest.mark.parametrize("name", ["os.path", "meshproxy.api.errors", "envoy..x", "envoy.config.core.v3.", "...", "envoy.__init__", "google.protobuf.Foo", ""])
def test_names_that_are_no_messages(name):
    assert messages.descriptor(name) is None


def _mostly(usual, unusual):
    return st.one_of(*[st.just(usual)] * 6, unusual)


def _optional(**fields):
    return st.fixed_dictionaries({}, optional=fields)


PORTS = _mostly(
    {"address": "10.0.0.1", "port_value": 80}, _optional(address=SCALARS, portValue=st.sampled_from([1, "2", 2.0, True, -1, 1 << 40]), named_port=st.just("x"))
)
ENDPOINTS = st.lists(
    _mostly({"endpoint": {}}, _optional(endpoint=_optional(address=_optional(socket_address=PORTS, pipe=SCALARS)), health_status=SCALARS)), max_size=4
)
CLUSTERS = st.lists(
    _optional(
        name=_mostly("a", SCALARS),
        connect_timeout=_mostly("1s", SCALARS),
        connectTimeout=st.just("2s"),
        type=_mostly("STATIC", SCALARS),
        load_assignment=_optional(endpoints=_mostly([], st.lists(_optional(lb_endpoints=ENDPOINTS, lbEndpoints=SCALARS)) | ENDPOINTS)),
        per_connection_buffer_limit_bytes=_mostly(4096, SCALARS),
        typed_extension_protocol_options=_mostly({}, DOCUMENTS),
        metadata=DOCUMENTS,
        unknown=st.none(),
    ),
    max_size=5,
)


@given(CLUSTERS)
@settings(max_examples=400)
def test_conversion_by_columns_is_conversion(clusters):
    value = {"static_resources": {"clusters": clusters}}
    walk = Walk()
    arguments = convert._plan(Bootstrap.DESCRIPTOR)(value, walk)
    found = []
    message = None
    try:
        message = convert.to_message(value, Bootstrap)
    except ConfigError as error:
        found = error.problems
    assert found == walk.problems
    assert message == (None if found else Bootstrap(**arguments))


@given(CLUSTERS)
@settings(max_examples=400)
def test_checks_by_columns_miss_nothing(clusters):
    good = []
    for cluster in clusters:
        with contextlib.suppress(ConfigError):
            good.append(convert.to_message(cluster, Cluster))
    message = Bootstrap(static_resources={"clusters": good})
    for checker in (rules.Checker(), support.checker()):
        walk = rules._Walk()
        checker.plan(Bootstrap.DESCRIPTOR)(message, walk)
        assert checker.check(message) == walk.problems
