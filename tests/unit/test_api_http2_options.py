"""Http2ProtocolOptions as plain values, and what is refused in them."""

from __future__ import annotations

import pytest
from envoy.config.core.v3.protocol_pb2 import Http2ProtocolOptions
from google.protobuf import json_format

from meshproxy.api.errors import ConfigError
from meshproxy.api.http2_options import compile_http2


def options(value):
    return json_format.ParseDict(value, Http2ProtocolOptions())


def custom(*pairs):
    return {"custom_settings_parameters": [{"identifier": identifier, "value": value} for identifier, value in pairs]}


def test_what_is_not_set_is_left_to_the_defaults():
    assert compile_http2(options({})) == {
        "custom_settings": (),
        "allow_connect": False,
        "allow_metadata": False,
        "stream_error_on_invalid_http_message": False,
    }


def test_every_field_is_read():
    value = {
        "hpack_table_size": 0,
        "max_concurrent_streams": 7,
        "initial_stream_window_size": 65535,
        "initial_connection_window_size": 65536,
        "allow_connect": True,
        "allow_metadata": True,
        "max_metadata_size": 5,
        "max_outbound_frames": 1,
        "max_outbound_control_frames": 2,
        "max_consecutive_inbound_frames_with_empty_payload": 0,
        "max_inbound_priority_frames_per_stream": 4,
        "max_inbound_window_update_frames_per_data_frame_sent": 5,
        "override_stream_error_on_invalid_http_message": True,
        "connection_keepalive": {"interval": "1.5s", "timeout": "0.0015s", "interval_jitter": {"value": 0}, "connection_idle_interval": "10s"},
        **custom((16, 3), (16, 3), (2, 0)),
    }
    assert compile_http2(options(value)) == {
        **{name: value[name] for name in value if name.startswith(("hpack", "max_", "initial_"))},
        "custom_settings": ((16, 3), (2, 0)),
        "allow_connect": True,
        "allow_metadata": True,
        "stream_error_on_invalid_http_message": True,
        "keepalive_interval": 1.5,
        "keepalive_timeout": 0.001,
        "keepalive_idle_interval": 10.0,
        "keepalive_jitter": 0.0,
    }


@pytest.mark.parametrize(
    ("value", "manager", "lenient"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"stream_error_on_invalid_http_messaging": True}, None, True),
        ({"stream_error_on_invalid_http_messaging": True}, False, False),
        ({"override_stream_error_on_invalid_http_message": False}, True, False),
    ],
)
def test_whose_word_on_malformed_messages_counts(value, manager, lenient):
    assert compile_http2(options(value), manager)["stream_error_on_invalid_http_message"] is lenient


@pytest.mark.parametrize(
    ("value", "path", "why"),
    [
        (custom((2, 1)), "custom_settings_parameters[0]", "server push is not supported"),
        (custom((9, 0), (8, 1)), "custom_settings_parameters[1]", 'the "allow_connect" SETTINGS parameter must only be configured through the named field'),
        (custom((16, 1), (16, 2), (9, 1), (9, 0)), "custom_settings_parameters", "identifiers = {0x10,0x09}"),
        (
            {"hpack_table_size": 1, "max_concurrent_streams": 1, "initial_stream_window_size": 65535, **custom((1, 1), (3, 1), (4, 70000))},
            "custom_settings_parameters",
            "the {hpack_table_size,max_concurrent_streams,initial_stream_window_size} HTTP/2 SETTINGS parameter(s) can not be configured through both",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(value, path, why):
    with pytest.raises(ConfigError) as caught:
        compile_http2(options(value))
    (problem,) = caught.value.problems
    assert problem.path == path
    assert why in problem.why
