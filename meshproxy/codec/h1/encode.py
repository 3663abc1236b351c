"""Messages to bytes: heads, chunks, trailers."""

from __future__ import annotations

from meshproxy.codec.headers import Pair

# How a body without a known length, and one that is not there, are framed. These very objects: logs tell them from a peer's own fields.
CHUNKED: Pair = (b"transfer-encoding", b"chunked")
NO_LENGTH: Pair = (b"content-length", b"0")

_field = b": ".join


def encode_request_head(method: bytes, target: bytes, authority: bytes, items: list[Pair]) -> bytes:
    """A request's head, Host first. `items` end with the framing header if the request has one."""
    if items:
        return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b\r\n\r\n" % (method, target, authority, b"\r\n".join(map(_field, items)))
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n\r\n" % (method, target, authority)


def encode_spelt_request_head(method: bytes, target: bytes, items: list[Pair]) -> bytes:
    """A request's head from items that include Host, whose names are as they go on the wire."""
    return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (method, target, b"\r\n".join(map(_field, items)))


def encode_response_head(status: int, items: list[Pair], reason: bytes | None = None) -> bytes:
    """A response's head, with the standard reason phrase unless `reason` is given."""
    line = STATUS_LINES.get(status) if reason is None else None
    if line is None:
        line = b"HTTP/1.1 %d %b\r\n" % (status, b"Unknown" if reason is None else reason)
    if items:
        return line + b"\r\n".join(map(_field, items)) + b"\r\n\r\n"
    return line + b"\r\n"


def encode_chunk(data: bytes) -> bytes:
    """One chunk; `data` is not empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_trailers(items: list[Pair]) -> bytes:
    """The end of a chunked body, with its trailers."""
    if items:
        return b"0\r\n%b\r\n\r\n" % b"\r\n".join(map(_field, items))
    return b"0\r\n\r\n"


LAST_CHUNK = b"0\r\n\r\n"

_REASONS = {
    100: "Continue", 101: "Switching Protocols",
    200: "OK", 201: "Created", 202: "Accepted", 203: "Non-Authoritative Information", 204: "No Content", 205: "Reset Content", 206: "Partial Content",
    207: "Multi-Status", 208: "Already Reported", 226: "IM Used",
    300: "Multiple Choices", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified", 305: "Use Proxy", 307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 406: "Not Acceptable",
    407: "Proxy Authentication Required", 408: "Request Timeout", 409: "Conflict", 410: "Gone", 411: "Length Required", 412: "Precondition Failed",
    413: "Payload Too Large", 414: "URI Too Long", 415: "Unsupported Media Type", 416: "Range Not Satisfiable", 417: "Expectation Failed",
    421: "Misdirected Request", 422: "Unprocessable Entity", 423: "Locked", 424: "Failed Dependency", 425: "Too Early", 426: "Upgrade Required",
    428: "Precondition Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
    505: "HTTP Version Not Supported", 506: "Variant Also Negotiates", 507: "Insufficient Storage", 508: "Loop Detected", 510: "Not Extended",
    511: "Network Authentication Required", 599: "Last Unassigned Server Error Code",
}  # fmt: skip

STATUS_LINES: dict[int, bytes] = {status: f"HTTP/1.1 {status} {reason}\r\n".encode() for status, reason in _REASONS.items()}


def reason_phrase(status: int) -> bytes:
    """The standard reason phrase; `Unknown` for others, as Envoy prints."""
    return _REASONS.get(status, "Unknown").encode()
