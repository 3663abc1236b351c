"""What one side of a connection allows and wants, as plain values: envoy.config.core.v3.Http2ProtocolOptions with Envoy's defaults, and limits on heads."""

from __future__ import annotations

from typing import Any

from meshproxy.codec.h2 import frames
from meshproxy.record import Record

ALLOW, REJECT_REQUEST, DROP_HEADER = range(3)  # core.v3.HttpProtocolOptions.HeadersWithUnderscoresAction


class Options(Record):
    """Sizes in bytes, times in seconds. Field names are Envoy's where it has one."""

    hpack_table_size: int = 4096
    max_concurrent_streams: int = 1024  # of a client: more than that it does not open, whatever the server allows
    initial_stream_window_size: int = 16 * 1024 * 1024
    initial_connection_window_size: int = 24 * 1024 * 1024
    allow_connect: bool = False
    allow_metadata: bool = False
    max_metadata_size: int = 1024 * 1024  # of all that comes on a stream
    max_outbound_frames: int = 10000
    max_outbound_control_frames: int = 1000
    max_consecutive_inbound_frames_with_empty_payload: int = 1
    max_inbound_priority_frames_per_stream: int = 100
    max_inbound_window_update_frames_per_data_frame_sent: int = 10
    stream_error_on_invalid_http_message: bool = False  # a malformed message ends its stream, and not the connection
    custom_settings: tuple[tuple[int, int], ...] = ()
    keepalive_interval: float = 0.0  # 0: no PINGs
    keepalive_timeout: float = 0.0
    keepalive_jitter: float = 15.0  # per cent of the interval
    keepalive_idle_interval: float = 0.0  # a client's connection that was idle for so long is tried by a PING with its next request; 0: never
    # -- from the connection manager or the cluster
    max_head_bytes: int = 60 * 1024
    max_headers: int = 100
    headers_with_underscores: int = ALLOW
    stats: Any = None  # observe.http2_stats.Http2Stats

    def announced(self, *, client: bool) -> list[tuple[int, int]]:
        """The SETTINGS that a connection begins with: those that Envoy sends, in its order."""
        named = [
            (frames.HEADER_TABLE_SIZE, self.hpack_table_size),
            (frames.ENABLE_CONNECT_PROTOCOL, int(self.allow_connect)),
            (frames.MAX_CONCURRENT_STREAMS, self.max_concurrent_streams),
            (frames.INITIAL_WINDOW_SIZE, self.initial_stream_window_size),
        ]
        return [*([(frames.ENABLE_PUSH, 0)] if client else []), *self.custom_settings, *named]
