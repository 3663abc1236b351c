"""gRPC over HTTP/1.1 with trailers, for scripts of cases."""

from __future__ import annotations

from tests.differential.harness import Request, answer, req

TRAILERS = {"enable_trailers": True}
OPTIONS = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {"@": "http_options", "explicit_http_config": {"http_protocol_options": TRAILERS}}}


def frame(message: bytes, flags: int = 0) -> bytes:
    """A gRPC message."""
    return bytes((flags,)) + len(message).to_bytes(4, "big") + message


def chunked(*pieces: bytes, **trailers: str | int) -> bytes:
    """A chunked body with trailers."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)
    return body + b"0\r\n" + b"".join(f"{name.replace('_', '-')}: {value}\r\n".encode() for name, value in trailers.items()) + b"\r\n"


def grpc_answer(*pieces: bytes, status: str = "200 OK", content_type: str = "application/grpc", **trailers: str | int) -> bytes:
    """A response with messages and trailers."""
    return answer(status, None, content_type=content_type, transfer_encoding="chunked") + chunked(*pieces, **trailers)


def call(
    *pieces: bytes, path: str = "/pkg.Service/Method", host: str = "a.test", content_type: str = "application/grpc", headers: tuple[str, ...] = ()
) -> bytes:
    """A request with messages."""
    return req("POST", path, f"Content-Type: {content_type}", "TE: trailers", "Transfer-Encoding: chunked", *headers, host=host, body=chunked(*pieces))


def trailers_only(status: int, **headers: str) -> bytes:
    """A response whose status is in its head."""
    return answer(body=b"", content_type="application/grpc", grpc_status=str(status), **headers)


def up(*steps: bytes) -> list:
    return [Request(), *steps]
