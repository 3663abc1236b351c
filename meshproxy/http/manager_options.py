"""The connection manager's proto, read: durations in seconds (0: off), sizes in bytes, choices as plain values."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from meshproxy.api import errors, registry
from meshproxy.api.cidr import CidrSet, compile_cidr
from meshproxy.api.durations import seconds_of
from meshproxy.api.http2_options import compile_http2
from meshproxy.codec.h1.parser import Options as ParserOptions
from meshproxy.codec.h2.settings import Options as Http2Options
from meshproxy.http.paths import KEEP, REJECT, UNESCAPE_AND_FORWARD, UNESCAPE_AND_REDIRECT, PathOptions
from meshproxy.http.request_head import RequestHeadOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm_pb2

    from meshproxy.net.address import Address
    from meshproxy.net.filter_chain import NetworkContext

_HCM = "envoy.extensions.filters.network.http_connection_manager.v3."
_KB = 1024
AUTO, HTTP1, HTTP2, _HTTP3 = range(4)  # CodecType
# What is internal when an `internal_address_config` names no range.
_PRIVATE = CidrSet(
    (socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address), length)
    for address, length in (("10.0.0.0", 8), ("172.16.0.0", 12), ("192.168.0.0", 16), ("127.0.0.1", 32), ("fd00::", 8), ("::1", 128))
)
_XFCC = ("sanitize", "forward_only", "append_forward", "sanitize_set", "always_forward_only")
_PROPER_CASE = 1  # PreserveCaseFormatterConfig.FormatterTypeOnEnvoyHeaders
_REJECT_REQUEST, _DROP_HEADER = 1, 2  # HeadersWithUnderscoresAction
# PathWithEscapedSlashesAction: IMPLEMENTATION_SPECIFIC_DEFAULT is KEEP_UNCHANGED.
_ESCAPED_SLASHES = (KEEP, KEEP, REJECT, UNESCAPE_AND_REDIRECT, UNESCAPE_AND_FORWARD)


def wrapped(proto: Any, field: str, default: Any) -> Any:
    """A wrapper field's value, or `default` when it is not set."""
    return getattr(proto, field).value if proto.HasField(field) else default


class Options:
    """Every field of HttpConnectionManager that is not a part of its own (routes, filters, logs, local replies)."""

    HONOURS = {
        _HCM + "HttpConnectionManager": (
            "codec_type stat_prefix route_config rds http_filters add_user_agent common_http_protocol_options http_protocol_options"
            " http2_protocol_options http1_safe_max_connection_duration server_name"
            " server_header_transformation scheme_header_transformation max_request_headers_kb stream_idle_timeout stream_flush_timeout"
            " request_timeout"
            " request_headers_timeout drain_timeout delayed_close_timeout access_log use_remote_address xff_num_trusted_hops"
            " original_ip_detection_extensions internal_address_config skip_xff_append via generate_request_id preserve_external_request_id"
            " always_set_request_id_in_response forward_client_cert_details set_current_client_cert_details proxy_100_continue"
            " represent_ipv4_remote_address_as_ipv4_mapped_ipv6 upgrade_configs normalize_path merge_slashes path_with_escaped_slashes_action"
            " request_id_extension local_reply_config access_log_options access_log_flush_interval flush_access_log_on_new_request"
            " tracing strip_matching_host_port strip_any_host_port stream_error_on_invalid_http_message strip_trailing_host_dot append_x_forwarded_port"
            " add_proxy_protocol_connection_state"
            # Without an effect: there is no overload manager to tell of.
            " append_local_overload"
        ),
        _HCM + "HttpFilter": "name typed_config config_discovery is_optional disabled",
        _HCM + "HttpConnectionManager.UpgradeConfig": "upgrade_type enabled filters",
        _HCM + "HttpConnectionManager.InternalAddressConfig": "unix_sockets cidr_ranges",
        _HCM + "HttpConnectionManager.SetCurrentClientCertDetails": "subject cert chain dns uri",
        _HCM + "RequestIDExtension": "typed_config",
        "envoy.config.core.v3.SchemeHeaderTransformation": "scheme_to_overwrite match_upstream",
        "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig": "forward_reason_phrase formatter_type_on_envoy_headers",
        "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig": "pack_trace_reason use_request_id_for_trace_sampling",
        "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig": "xff_num_trusted_hops skip_xff_append",
    }

    def __init__(self, proto: hcm_pb2.HttpConnectionManager, network: NetworkContext) -> None:
        common, h1 = proto.common_http_protocol_options, proto.http_protocol_options
        self.codec_type: int = proto.codec_type
        if self.codec_type == _HTTP3:
            errors.fail("codec_type", "HTTP/3 codec configured on non-QUIC listener.")
        if proto.WhichOneof("route_specifier") is None:
            errors.fail("route_config", "a route configuration is required")
        self.buffer_limit: int = network.buffer_limit
        # -- timeouts
        self.idle_timeout = seconds_of(common, "idle_timeout", 3600.0)
        self.stream_idle_timeout = seconds_of(proto, "stream_idle_timeout", 300.0)
        self.stream_flush_timeout = seconds_of(proto, "stream_flush_timeout", 0.0) if proto.HasField("stream_flush_timeout") else None
        self.request_timeout = seconds_of(proto, "request_timeout", 0.0)
        self.request_headers_timeout = seconds_of(proto, "request_headers_timeout", 0.0)
        self.max_connection_duration = seconds_of(common, "max_connection_duration", 0.0)
        self.http1_safe_max_connection_duration: bool = proto.http1_safe_max_connection_duration
        self.max_stream_duration = seconds_of(common, "max_stream_duration", 0.0)
        self.drain_timeout = seconds_of(proto, "drain_timeout", 5.0)
        self.delayed_close_timeout = seconds_of(proto, "delayed_close_timeout", 1.0)
        self.max_requests_per_connection: int = wrapped(common, "max_requests_per_connection", 0)
        # -- the codec
        self.accept_http_10: bool = h1.accept_http_10
        self.header_case, proper_else = _header_case(h1)
        self.parser = ParserOptions(
            max_head_bytes=wrapped(proto, "max_request_headers_kb", 60) * _KB,
            max_headers=wrapped(common, "max_headers_count", 100),
            absolute_url=wrapped(h1, "allow_absolute_url", True),
            trailers=h1.enable_trailers,
            keep_case=self.header_case == "preserve",
            proper_else=proper_else,
            accept_http_10=h1.accept_http_10,
            any_method=h1.allow_custom_methods,
            rejects_underscores=common.headers_with_underscores_action == _REJECT_REQUEST,
        )
        lenient = proto.stream_error_on_invalid_http_message.value if proto.HasField("stream_error_on_invalid_http_message") else None
        with errors.under("http2_protocol_options"):
            http2 = compile_http2(proto.http2_protocol_options, lenient)
        self.http2 = Http2Options(
            **http2,
            max_head_bytes=self.parser.max_head_bytes,
            max_headers=self.parser.max_headers,
            headers_with_underscores=common.headers_with_underscores_action,
        )
        self.closes_on_bad_request: bool = not wrapped(h1, "override_stream_error_on_invalid_http_message", bool(lenient))
        # -- responses
        self.server_name = (proto.server_name or "envoy").encode()
        self.tells_callers: bool = wrapped(proto, "add_proxy_protocol_connection_state", True)
        self.scheme_matches_upstream: bool = proto.scheme_header_transformation.match_upstream
        self.server_header_transformation: int = proto.server_header_transformation
        self.upgrades = {entry.upgrade_type.lower(): wrapped(entry, "enabled", True) for entry in proto.upgrade_configs}
        if len(self.upgrades) != len(proto.upgrade_configs):
            errors.fail("upgrade_configs", "multiple upgrade configurations of the same type")
        self.head = self._head_options(proto, network)
        for position, entry in enumerate(proto.original_ip_detection_extensions):
            with errors.under(f"original_ip_detection_extensions[{position}].typed_config"):
                xff = registry.unpack(entry.typed_config)
                if proto.use_remote_address.value or proto.xff_num_trusted_hops:
                    errors.fail("", "original IP detection extensions and use_remote_address or xff_num_trusted_hops may not be mixed")
                self.head.xff_num_trusted_hops = xff.xff_num_trusted_hops
                self.head.appends_xff = not wrapped(xff, "skip_xff_append", True)

    def _head_options(self, proto: hcm_pb2.HttpConnectionManager, network: NetworkContext) -> RequestHeadOptions:
        head = RequestHeadOptions()
        node = network.context.node
        head.use_remote_address = wrapped(proto, "use_remote_address", False)
        head.xff_num_trusted_hops = proto.xff_num_trusted_hops
        head.skip_xff_append = proto.skip_xff_append
        head.internal = self._internal(proto)
        head.internal_only = tuple(name.lower().encode() for name in proto.route_config.internal_only_headers)
        head.via = proto.via.encode()
        head.generate_request_id = wrapped(proto, "generate_request_id", True)
        head.preserve_external_request_id = proto.preserve_external_request_id
        if proto.request_id_extension.HasField("typed_config"):
            with errors.under("request_id_extension.typed_config"):
                request_id: Any = registry.unpack(proto.request_id_extension.typed_config)
                head.packs_trace_reason = wrapped(request_id, "pack_trace_reason", True)
                head.traces_by_id = wrapped(request_id, "use_request_id_for_trace_sampling", True)
        if wrapped(proto, "add_user_agent", False) and node is not None:
            head.user_agent = node.cluster.encode()
            head.node_name = node.id.encode()
        action = proto.path_with_escaped_slashes_action
        head.paths = PathOptions(normalize=wrapped(proto, "normalize_path", False), merge_slashes=proto.merge_slashes, escaped_slashes=_ESCAPED_SLASHES[action])
        which = proto.WhichOneof("strip_port_mode")
        head.strip_port = "any" if which == "strip_any_host_port" and proto.strip_any_host_port else "matching" if proto.strip_matching_host_port else None
        head.strip_trailing_host_dot = proto.strip_trailing_host_dot
        head.default_host = proto.http_protocol_options.default_host_for_http_10.encode()
        head.drops_underscores = proto.common_http_protocol_options.headers_with_underscores_action == _DROP_HEADER
        head.xfcc = _XFCC[proto.forward_client_cert_details]
        head.xfcc_details = _xfcc_details(proto.set_current_client_cert_details)
        head.append_x_forwarded_port = proto.append_x_forwarded_port
        head.proxy_100_continue = proto.proxy_100_continue
        if proto.scheme_header_transformation.scheme_to_overwrite:
            head.scheme_override = proto.scheme_header_transformation.scheme_to_overwrite.encode()
        return head

    @staticmethod
    def _internal(proto: hcm_pb2.HttpConnectionManager) -> Callable[[Address], bool] | None:
        if not proto.HasField("internal_address_config"):
            return None
        config = proto.internal_address_config
        with errors.under("internal_address_config.cidr_ranges"):
            in_ranges = compile_cidr(config.cidr_ranges) if config.cidr_ranges else _PRIVATE
        pipes = config.unix_sockets
        return lambda address: in_ranges(address) if address.kind == "ip" else pipes


def _header_case(h1: Any) -> tuple[str | None, bool]:
    """How header names go out: None (lower case), 'proper' or 'preserve'; and whether names that the sender did not write go out 'proper' then."""
    if not h1.HasField("header_key_format"):
        return None, False
    which = h1.header_key_format.WhichOneof("header_format")
    if which == "proper_case_words":
        return "proper", False
    with errors.under("http_protocol_options.header_key_format.stateful_formatter.typed_config"):
        config: Any = registry.unpack(h1.header_key_format.stateful_formatter.typed_config)
    return "preserve", config.formatter_type_on_envoy_headers == _PROPER_CASE


def _xfcc_details(details: Any) -> tuple[str, ...]:
    names = []
    if details.cert:
        names.append("cert")
    if details.chain:
        names.append("chain")
    if wrapped(details, "subject", False):
        names.append("subject")
    if details.uri:
        names.append("uri")
    if details.dns:
        names.append("dns")
    return tuple(names)
