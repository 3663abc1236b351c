"""Answers to format operators that take more than reading an attribute: functions of a stream, called by compiled formats.

`None` means that there is nothing to say (`-` in text, null in JSON). Each follows the operator of the same name in Envoy's substitution formatter.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from meshproxy.codec import grpc
from meshproxy.codec.h1.encode import CHUNKED, NO_LENGTH
from meshproxy.observe import flags
from meshproxy.observe.stream_info import TypedState

if TYPE_CHECKING:
    from meshproxy.observe.stream_info import StreamInfo

_NO_CONNECTION = flags.UF | flags.UO
_TCP_INFO_RTT = 68  # where linux/tcp.h has tcpi_rtt, in microseconds


# -- the request and the response


def stream_id(s: Any) -> str | bytes | None:
    """The request id of an HTTP request; of a TCP connection, an id of its own that stays the same for all its log entries."""
    if s.protocol is not None:
        return None if s.request is None else s.request.get(b"x-request-id")
    known = getattr(s, "stream_id", None)
    if known is None:
        known = s.stream_id = unique_id()
    return known


def unique_id() -> str:
    """A new random identifier."""
    import uuid  # few formats ask, and it is 128 KiB in each worker

    return str(uuid.uuid4())


def is_grpc(s: StreamInfo) -> bool:
    """Whether the request is gRPC by its content type."""
    return s.request is not None and grpc.is_content_type(s.request.get(b"content-type"))


def grpc_code(s: StreamInfo) -> int | None:
    """The gRPC status: of the trailers, of the headers, or what the HTTP status stands for; -1 when it is no number."""
    for head in (s.response_trailers, s.response):
        code = grpc.status_of(head)
        if code is not None:
            return code
    return grpc.status_of_http(s.status) if s.status else None


def grpc_status(s: StreamInfo) -> int | None:
    """The gRPC status of a gRPC request; None for other requests."""
    return grpc_code(s) if is_grpc(s) else None


def grpc_status_name(s: StreamInfo, names: Sequence[str]) -> str | None:
    """The gRPC status by name, or as digits when it has none."""
    code = grpc_status(s)
    if code is None:
        return None
    return names[code] if 0 <= code < len(names) else str(code)


def details(s: StreamInfo) -> str | None:
    """Response code details without white space."""
    value = s.details
    return None if not value else value.translate(_UNDERSCORES)


_UNDERSCORES = {ord(space): "_" for space in " \t\n\v\f\r"}


def termination_details(s: StreamInfo) -> str | None:
    """Why the connection was closed for reasons below HTTP."""
    return s.termination_details or s.connection.termination_details


def server_name(s: StreamInfo) -> str | None:
    """The SNI."""
    return s.requested_server_name or s.connection.server_name or None


def original_path(s: StreamInfo) -> bytes | None:
    """The path before it was rewritten, if it was."""
    return None if s.request is None else s.request.get(b"x-envoy-original-path")


def path(s: StreamInfo) -> bytes | None:
    """The path as it now is."""
    return None if s.request is None else s.request.path or None


def any_path(s: StreamInfo) -> bytes | None:
    """The path that the client asked for."""
    return original_path(s) or path(s)


def original_host(s: StreamInfo) -> bytes | None:
    """The host before it was rewritten, if it was."""
    return None if s.request is None else s.request.get(b"x-envoy-original-host")


def host(s: StreamInfo) -> bytes | None:
    """The host as it now is."""
    return None if s.request is None else s.request.authority or None


def any_host(s: StreamInfo) -> bytes | None:
    """The host that the client asked for."""
    return original_host(s) or host(s)


def without_query(value: bytes | None) -> bytes | None:
    """A path without its query."""
    return None if value is None else value.partition(b"?")[0]


def query(s: StreamInfo) -> bytes | None:
    """The query as it was sent; None when the path has none."""
    value = path(s)
    if value is None or b"?" not in value:
        return None
    return value.partition(b"?")[2]


def query_parameter(s: StreamInfo, name: bytes) -> bytes | None:
    """The first value of one parameter, decoded."""
    value = query(s)
    if not value:
        return None
    for part in value.split(b"&"):
        key, _, text = part.partition(b"=")
        if percent_decode(key) == name:
            return percent_decode(text)
    return None


def percent_decode(value: bytes) -> bytes:
    """Decode `%XX`; what is malformed stays as it is."""
    if b"%" not in value:
        return value
    first, *parts = value.split(b"%")
    return first + b"".join([_HEX.get(part[:2], b"%" + part[:2]) + part[2:] for part in parts])


def decoded_query(s: StreamInfo) -> bytes | None:
    """The query for reading: escapes of URL characters are decoded, of others kept, and percent signs that escape nothing are dropped."""
    value = query(s)
    if value is None or b"%" not in value:
        return value
    first, *parts = value.split(b"%")
    out = [first]
    last = len(parts) - 1
    for position, part in enumerate(parts):
        char = _HEX.get(part[:2])
        if char is None:
            out.append(b"%" + part if position == last and len(part) < 2 else part)
        elif char in _URL_CHARACTERS:
            out.append(char + part[2:])
        else:
            out.append(b"%" + part)
    return b"".join(out)


_HEX = {b"%c%c" % (high, low): bytes((int(chr(high) + chr(low), 16),)) for high in b"0123456789abcdefABCDEF" for low in b"0123456789abcdefABCDEF"}
_URL_CHARACTERS = frozenset(
    bytes((code,)) for code in b"!#$%&'()*+,-./0123456789:;=?@[]_`~abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)  # fmt: skip


def downstream_wire_bytes_received(s: Any) -> int:
    """Everything that came of an HTTP request so far, where the connection is metered; all bytes of a TCP session."""
    return s.bytes_received if s.protocol is None else getattr(s.codec, "wire_bytes_received", 0)


def downstream_wire_bytes_sent(s: Any) -> int:
    """Everything that was written of an HTTP response so far, where the connection is metered; all bytes of a TCP session."""
    return s.bytes_sent if s.protocol is None else getattr(s.codec, "wire_bytes_sent", 0)


def downstream_header_bytes_received(s: Any) -> int:
    """What the request's header lines take, as Envoy counts them, where the connection is metered."""
    return 0 if s.protocol is None else getattr(s.codec, "header_bytes_received", 0)


def downstream_decompressed_header_bytes_received(s: StreamInfo) -> int:
    """The same before it was compressed."""
    sizes = 0 if s.protocol is None else getattr(s.codec, "decompressed_header_bytes_received", None)
    return downstream_header_bytes_received(s) if sizes is None else sizes


def request_header_map_bytes(s: StreamInfo) -> int:
    """Names and values of the request's headers, pseudo-headers included."""
    r = s.request
    if r is None or not r.method:  # the request line could not be read
        return 0
    # A request without a host is refused before it gets its scheme.
    pseudo = (7, r.method), (5, r.path), (10, r.authority), (7, r.scheme if r.authority else b"")
    return sum(name + len(value) for name, value in pseudo if value) + _map_bytes(r.items)


def response_header_map_bytes(s: StreamInfo) -> int:
    """Names and values of the response's headers, `:status` included, without what the codec appended to frame the body."""
    if s.response is None:
        return 0
    items = s.response.items
    framed = bool(items) and (items[-1] is CHUNKED or items[-1] is NO_LENGTH)
    return 10 + _map_bytes(items[:-1] if framed else items)


def downstream_header_bytes_sent(s: StreamInfo) -> int:
    """What the response's head takes on the wire: header lines of HTTP/1, without the status line; frames of HTTP/2, where the connection is metered."""
    if s.request is not None and s.request.version == 20:
        return getattr(s.codec, "header_bytes_sent", 0)
    return _header_lines_bytes(s)


def downstream_decompressed_header_bytes_sent(s: StreamInfo) -> int:
    """The same before it was compressed."""
    if s.request is not None and s.request.version == 20:
        return response_header_map_bytes(s) + response_trailer_map_bytes(s)
    return _header_lines_bytes(s)


def _header_lines_bytes(s: StreamInfo) -> int:
    return 0 if s.response is None else sum([len(name) + len(value) + 4 for name, value in s.response.items])


def response_trailer_map_bytes(s: StreamInfo) -> int:
    """Names and values of the response's trailers."""
    return 0 if s.response_trailers is None else _map_bytes(s.response_trailers.items)


def _map_bytes(items: Iterable[tuple[bytes, bytes]]) -> int:
    return sum([len(name) + len(value) for name, value in items])


# -- the route and the upstream


def route_name(s: StreamInfo) -> str | None:
    """The route's name."""
    return (s.route.name or None) if s.route is not None else None


def cluster_name(s: StreamInfo) -> str | None:
    """The cluster's name in statistics."""
    cluster = s.cluster
    return None if cluster is None else getattr(cluster, "observability_name", None) or cluster.name


def route_resolutions(s: StreamInfo) -> int:
    """How often the route was looked for: for every request whose head could be read, and whenever a filter asked for it again."""
    return 0 if s.protocol is None or s.request is None or not s.request.method else 1 + s.route_changes


def upstream_host_name(host: Any) -> str | None:
    """A host's name, or its address when it has none."""
    return None if host is None else host.hostname or host.address.text


def upstream_host_name_without_port(host: Any) -> str | None:
    """The same without a port."""
    if host is None:
        return None
    name = host.hostname
    if not name:
        return address_without_port(host.address)
    head, colon, port = name.rpartition(":")
    return head if colon and port.isdigit() and (":" not in head or head.endswith("]")) else name


def hosts_attempted(s: Any, render: Callable[[Any], str | None]) -> str | None:
    """The host of the last try, if there was a connection to it. (Envoy keeps no more than that of earlier ones either.)"""
    return None if s.upstream is None else render(s.host)


def host_address(host: Any) -> str:
    """`1.2.3.4:80`."""
    return host.address.text


def host_ip(host: Any) -> str | None:
    """`1.2.3.4`."""
    return address_without_port(host.address)


def upstream_local(s: StreamInfo) -> Any:
    """Our address of the upstream connection."""
    return None if s.upstream is None else s.upstream.local


def upstream_remote(s: StreamInfo) -> Any:
    """The upstream's address of the upstream connection."""
    return None if s.upstream is None else s.upstream.remote


def upstream_connections_attempted(s: StreamInfo) -> str | None:
    """Connection ids that were used."""
    return None if s.upstream is None else str(s.upstream.id)


# -- addresses


def address_without_port(address: Any) -> str | None:
    """An IP address; the path of a pipe."""
    if address is None:
        return None
    return address.ip if address.kind == "ip" else address.path


def address_masked(address: Any, length: int) -> str | None:
    """An IP address' network in CIDR notation; None for a pipe."""
    if address is None or address.kind != "ip":
        return None
    if length < 0:
        return ""
    ip = address.ip.partition("%")[0]
    import ipaddress

    return str(ipaddress.ip_network((ip, min(length, 128 if ":" in ip else 32)), strict=False))


def address_port(address: Any) -> int | None:
    """A port; None for a pipe."""
    return None if address is None or address.kind != "ip" else address.port


# -- TLS


def upstream_tls(s: StreamInfo) -> Any:
    """TLS of the upstream connection."""
    return None if s.upstream is None else s.upstream.tls


def tls_field(tls: Any, name: str) -> str | None:
    """`version`, `cipher` or `session_id`; TLS 1.3 has no session ids that a peer would know."""
    if tls is None or (name == "session_id" and tls.version == "TLSv1.3"):
        return None
    return getattr(tls, name) or None


def certificate_field(tls: Any, side: str, name: str) -> str | None:
    """A text of the peer's or our own certificate; several SANs are joined by commas."""
    certificate = None if tls is None else getattr(tls, side)
    if certificate is None:
        return None
    value = getattr(certificate, name)
    if isinstance(value, tuple):
        value = ",".join([_san_text(item) for item in value])
    return value or None


def _san_text(value: str | bytes | tuple[str, bytes]) -> str:
    if isinstance(value, bytes):
        import ipaddress

        return str(ipaddress.ip_address(value))
    return value if isinstance(value, str) else value[1].decode("utf-8", "surrogateescape")


def certificate_pem(tls: Any) -> str | None:
    """The peer's certificate as URL-encoded PEM."""
    certificate = None if tls is None else tls.peer_certificate
    if certificate is None:
        return None
    from urllib.parse import quote

    return quote(certificate.pem, safe="")


def certificate_time(tls: Any, name: str, render: Callable[[float], bytes]) -> bytes | None:
    """`not_before` or `not_after` of the peer's certificate."""
    certificate = None if tls is None else tls.peer_certificate
    return None if certificate is None else render(getattr(certificate, name))


# -- durations


def between(start: float, end: float, unit: int) -> int | None:
    """From one point in time to another; None when one of them did not happen or they are the wrong way round."""
    if not start or not end or end < start:
        return None
    # Differences of floats may fall just short of the whole number that was meant.
    return int((end - start) * unit + 1e-4)


def round_trip(s: StreamInfo) -> int:
    """The kernel's estimate of the downstream connection's round trip time, in milliseconds; 0 when there is none (any more)."""
    transport = None if s.codec is None else s.codec.transport
    sock = None if transport is None or s.connection.remote.kind != "ip" else transport.get_extra_info("socket")
    if sock is None:
        return 0
    try:
        info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_RTT + 4)
    except OSError:
        return 0
    return int.from_bytes(info[_TCP_INFO_RTT:], sys.byteorder) // 1000


def handshake_duration(s: StreamInfo) -> int | None:
    """From the stream's start to the end of the TLS handshake, in milliseconds: below zero for requests, which come after it."""
    end = s.connection.handshake_end
    return int((end - s.start) * 1000) if end else None


def response_start(s: Any) -> float:
    """When the response began. One that was sent in one piece began when the upstream's had come, or ended at once."""
    if s.response_start or s.protocol is None or not s.response_started:
        return float(s.response_start)
    return float(s.upstream_last or s.end)


def body_start(s: StreamInfo) -> float:
    """When the upstream's body began: known where connections are metered for it, else when the whole response came in one piece."""
    return s.upstream_body_first or (s.upstream_first if s.bytes_sent and s.upstream_first == s.upstream_last else 0.0)


def pool_ready(s: StreamInfo) -> float:
    """When the last try got its connection, or was told that it gets none."""
    if s.flags & _NO_CONNECTION and s.upstream is None:
        return s.end
    return s.upstream_start


def upstream_moment(s: StreamInfo, name: str) -> float:
    """A point in time of the upstream connection; 0.0 when it is not known."""
    return 0.0 if s.upstream is None else getattr(s.upstream, name, 0.0)


def connection_moment(s: StreamInfo, name: str) -> float:
    """Start or end of a TCP session; 0.0 for an HTTP stream, whose connection outlives it."""
    return 0.0 if s.protocol is not None else getattr(s, name)


# -- metadata and filter state


def dynamic_metadata(s: StreamInfo, namespace: str) -> Any:
    """What filters noted on the stream; for TCP, what listener and network filters noted on the connection as well."""
    metadata = s._metadata
    if metadata is not None and namespace in metadata:
        return metadata[namespace]
    if s.protocol is not None or s.connection.metadata is None:
        return None
    return s.connection.metadata.get(namespace)


def metadata_of(owner: Any, namespace: str) -> Any:
    """Configured metadata of a route, cluster, host, virtual host or listener: plain dicts by namespace."""
    metadata = None if owner is None else getattr(owner, "metadata", None)
    return None if metadata is None else metadata.get(namespace)


def virtual_host(s: StreamInfo) -> Any:
    """The route's virtual host."""
    return getattr(s.route, "virtual_host", None)


def dig(value: Any, keys: Sequence[str]) -> Any:
    """Follow keys through nested dicts; None when there is no way."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def filter_state(s: StreamInfo, key: str) -> Any:
    """A filter state object of the stream or of its connection."""
    for owner in (s._filter_state, s.connection.filter_state):
        if owner is not None and key in owner:
            return owner[key]
    return None


def filter_state_text(s: StreamInfo, key: str) -> str | None:
    """The object as plain text: JSON for one that is nothing but fields, its own text for others, None where it has none."""
    value = filter_state(s, key)
    if type(value) is dict:
        import json

        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return None if value is None or isinstance(value, TypedState) else str(value)


def filter_state_field(s: StreamInfo, key: str, field: str) -> str | None:
    """One field of the object."""
    value = filter_state(s, key)
    if isinstance(value, TypedState):
        return None
    found = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
    return None if found is None else str(found)
