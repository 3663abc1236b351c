"""Extensions by type: every line of the table leads somewhere, and a type at the wrong place is said to be so."""

from __future__ import annotations

import subprocess
import sys

import pytest
from envoy.config.core.v3.base_pb2 import Node
from google.protobuf import any_pb2, duration_pb2, struct_pb2

from meshproxy.api import messages, registry
from meshproxy.api.errors import INVALID, UNSUPPORTED, ConfigError

BUFFER = "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer"
LUA = "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"


@pytest.mark.parametrize("url", registry.EXTENSIONS)
def test_every_extension_has_a_message_and_a_module_that_honours_it(url):
    name = messages.full_name(url)
    assert messages.descriptor(name).full_name == name
    registry.module(url)
    from meshproxy.api.support import Support

    assert Support().fields(name) is not None


def test_module_by_kind():
    assert registry.module(BUFFER, "http filter").__name__ == "meshproxy.http.filters.buffer"
    for url, kind, expected, problem in [
        (BUFFER, "network filter", "envoy.extensions.filters.http.buffer.v3.Buffer is not supported as network filter", UNSUPPORTED),
        (LUA, None, "envoy.extensions.filters.http.lua.v3.Lua is not supported", UNSUPPORTED),
        ("a/foo.Bar", None, "unknown type 'a/foo.Bar'", INVALID),
    ]:
        with pytest.raises(ConfigError) as caught:
            registry.module(url, kind)
        assert (str(caught.value), caught.value.problems[0].kind) == (expected, problem)


def test_unpack():
    packed = any_pb2.Any()
    packed.Pack(duration_pb2.Duration(seconds=3))
    assert registry.unpack(packed) == duration_pb2.Duration(seconds=3)
    assert registry.type_url(packed) == "type.googleapis.com/google.protobuf.Duration"


@pytest.mark.parametrize("name", ["xds.type.v3.TypedStruct", "udpa.type.v1.TypedStruct"])
def test_unpack_typed_struct(name):
    value = struct_pb2.Struct()
    value.update({"max_request_bytes": 5})
    packed = any_pb2.Any()
    packed.Pack(messages.message_class(name)(type_url=BUFFER, value=value))
    assert registry.type_url(packed) == BUFFER
    assert registry.unpack(packed).max_request_bytes.value == 5
    value.update({"max_request_bytes": "x"})
    packed.Pack(messages.message_class(name)(type_url=BUFFER, value=value))
    with pytest.raises(ConfigError, match=r"^value\.max_request_bytes: expected an integer"):
        registry.unpack(packed)
    packed.Pack(messages.message_class(name)(type_url="a/foo.Bar"))
    with pytest.raises(ConfigError, match=r"unknown type 'a/foo\.Bar'"):
        registry.unpack(packed)


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (any_pb2.Any(), "the type of an Any is missing"),
        (any_pb2.Any(type_url="a/os.path"), "unknown type 'a/os.path'"),
        (any_pb2.Any(type_url="a/envoy.config.core.v3.Node", value=b"\xff"), "the value is not a serialised envoy.config.core.v3.Node"),
    ],
)
def test_unpack_errors(packed, why):
    with pytest.raises(ConfigError) as caught:
        registry.unpack(packed)
    assert str(caught.value) == why


def test_messages_are_found_nested_and_memoised():
    assert messages.descriptor("envoy.config.route.v3.RouteAction.HashPolicy.Header").name == "Header"
    assert messages.descriptor("envoy.config.core.v3.Node") is Node.DESCRIPTOR
    assert messages.message_class("envoy.config.core.v3.Node") is Node
    assert messages.message_class("envoy.config.core.v3.Nope") is None


def test_peak_ewma_is_ours():
    message = messages.message_class("envoy.extensions.load_balancing_policies.peak_ewma.v3alpha.PeakEwma")()
    message.decay_time.seconds = 10
    message.penalty_value.value = 0.5
    assert type(message).FromString(message.SerializeToString()) == message


def test_the_registry_loads_nothing_by_itself():
    code = "import sys; from meshproxy.api import registry; print([m for m in sys.modules if m.startswith(('envoy', 'meshproxy.http', 'meshproxy.net'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
