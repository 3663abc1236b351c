"""`Http2ProtocolOptions`, of a connection manager or of a cluster, as plain values; and what Envoy refuses in them."""

from __future__ import annotations

from typing import Any

from meshproxy.api import errors
from meshproxy.api.durations import milliseconds

_CORE = "envoy.config.core.v3."
HONOURS = {
    f"{_CORE}Http2ProtocolOptions": (
        "hpack_table_size max_concurrent_streams initial_stream_window_size initial_connection_window_size allow_connect max_outbound_frames"
        " max_outbound_control_frames max_consecutive_inbound_frames_with_empty_payload max_inbound_priority_frames_per_stream"
        " max_inbound_window_update_frames_per_data_frame_sent stream_error_on_invalid_http_messaging override_stream_error_on_invalid_http_message"
        " custom_settings_parameters connection_keepalive use_oghttp2_codec allow_metadata max_metadata_size"
    ),
    f"{_CORE}Http2ProtocolOptions.SettingsParameter": "identifier value",
    f"{_CORE}KeepaliveSettings": "interval timeout interval_jitter connection_idle_interval",
}

_NUMBERS = (
    "hpack_table_size",
    "max_concurrent_streams",
    "initial_stream_window_size",
    "initial_connection_window_size",
    "max_outbound_frames",
    "max_outbound_control_frames",
    "max_consecutive_inbound_frames_with_empty_payload",
    "max_inbound_priority_frames_per_stream",
    "max_inbound_window_update_frames_per_data_frame_sent",
)
_ENABLE_PUSH, _ENABLE_CONNECT_PROTOCOL = 2, 8
_NAMED = {1: "hpack_table_size", 3: "max_concurrent_streams", 4: "initial_stream_window_size"}  # SETTINGS that have fields of their own


def compile_http2(proto: Any, stream_errors: bool | None = None) -> dict[str, Any]:
    """What an Http2ProtocolOptions message sets, by the names of `codec.h2.settings.Options`. Raises ConfigError with paths relative to the message.

    `stream_errors`: what a connection manager's `stream_error_on_invalid_http_message` says, None for nothing; the message's own field goes first.
    """
    values: dict[str, Any] = {name: getattr(proto, name).value for name in _NUMBERS if proto.HasField(name)}
    values["custom_settings"] = _custom_settings(proto)
    values["allow_connect"] = proto.allow_connect
    values["allow_metadata"] = proto.allow_metadata
    if proto.HasField("max_metadata_size"):
        values["max_metadata_size"] = proto.max_metadata_size.value
    lenient = proto.stream_error_on_invalid_http_messaging if stream_errors is None else stream_errors
    if proto.HasField("override_stream_error_on_invalid_http_message"):
        lenient = proto.override_stream_error_on_invalid_http_message.value
    values["stream_error_on_invalid_http_message"] = lenient
    if proto.HasField("connection_keepalive"):
        keepalive = proto.connection_keepalive
        values["keepalive_interval"] = milliseconds(keepalive.interval) / 1000
        values["keepalive_timeout"] = milliseconds(keepalive.timeout) / 1000
        values["keepalive_idle_interval"] = milliseconds(keepalive.connection_idle_interval) / 1000
        if keepalive.HasField("interval_jitter"):
            values["keepalive_jitter"] = keepalive.interval_jitter.value
    return values


def _custom_settings(proto: Any) -> tuple[tuple[int, int], ...]:
    """SETTINGS that are given by number, each once."""
    found: dict[int, int] = {}
    inconsistent: list[str] = []
    named: list[str] = []
    for position, parameter in enumerate(proto.custom_settings_parameters):
        identifier, value = parameter.identifier.value, parameter.value.value
        if found.setdefault(identifier, value) != value:
            inconsistent.append(f"0x{identifier:02x}")
        path = f"custom_settings_parameters[{position}]"
        if identifier == _ENABLE_PUSH and value == 1:
            errors.fail(path, "server push is not supported by Envoy and can not be enabled via a SETTINGS parameter.")
        if identifier == _ENABLE_CONNECT_PROTOCOL:
            errors.fail(path, 'the "allow_connect" SETTINGS parameter must only be configured through the named field')
        name = _NAMED.get(identifier)
        if name is not None and proto.HasField(name):
            named.append(name)
    if inconsistent:
        errors.fail("custom_settings_parameters", f"inconsistent HTTP/2 custom SETTINGS parameter(s) detected; identifiers = {{{','.join(inconsistent)}}}")
    if named:
        errors.fail(
            "custom_settings_parameters",
            f"the {{{','.join(named)}}} HTTP/2 SETTINGS parameter(s) can not be configured through both named and custom parameters",
        )
    return tuple(found.items())
