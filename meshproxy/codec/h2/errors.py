"""What a peer can do wrong, and the codes that tell it so (RFC 9113 7)."""

from __future__ import annotations

(
    NO_ERROR,
    PROTOCOL_ERROR,
    INTERNAL_ERROR,
    FLOW_CONTROL_ERROR,
    SETTINGS_TIMEOUT,
    STREAM_CLOSED,
    FRAME_SIZE_ERROR,
    REFUSED_STREAM,
    CANCEL,
    COMPRESSION_ERROR,
    CONNECT_ERROR,
    ENHANCE_YOUR_CALM,
    INADEQUATE_SECURITY,
    HTTP_1_1_REQUIRED,
) = range(14)

# Envoy's response code details.
INVALID_FIELD = "http2.invalid.header.field"
MESSAGING = "http2.violation.of.messaging.rule"
UNKNOWN = "http2.unknown.nghttp2.error"
TOO_MANY_HEADERS = "http2.too_many_headers"
HEADERS_TOO_LARGE = "http2.header_list_size_too_large"
OUTBOUND_FLOOD = "http2.outbound_frames_flood"
EMPTY_FRAMES_FLOOD = "http2.inbound_empty_frames_flood"
UNDERSCORE = "http2.unexpected_underscore"
REMOTE_REFUSED = "http2.remote_refuse"
REMOTE_RESET = "http2.remote_reset"


class Http2Error(Exception):
    """The connection cannot go on. `code`: of the GOAWAY that says so, queued already; `details`: Envoy's response code details for the stream that did it.

    `flood`: the peer is not reading, or drowns us; it is not worth being waited for. `stream`: the one that did it, if it was one. `reason`: what Envoy
    makes of it in the details of the other streams.
    """

    silent = False  # as flood, but that it counts as an error of the protocol

    def __init__(self, code: int, message: str, details: str = UNKNOWN, *, flood: bool = False, stream: object = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = details
        self.flood = flood
        self.stream = stream
        self.reason = message if flood else "The user callback function failed"


class MalformedError(Exception):
    """A list of fields that is no message: an error of its stream (RFC 9113 8.1.1). Stays inside this package."""

    def __init__(self, details: str = INVALID_FIELD, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(details)
        self.details = details
        self.code = code
