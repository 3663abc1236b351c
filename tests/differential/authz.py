"""An authorisation service in the scripts of cases: what it answers, and what it was asked, made comparable."""

from __future__ import annotations

import json
import re
from typing import Any

from envoy.service.auth.v3 import external_auth_pb2
from google.protobuf import json_format

from tests.differential.harness import Body, Ended, Headers, Play, Request, answer, file_log, filter_, http, lines, message, y
from tests.differential.wire import Script, Wire

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_SHOWN = (":path", ":authority", "content-type", "te", "grpc-timeout", "x-own", "x-computed")


def allows(*, rest: dict[str, Any] | None = None, **ok: Any) -> Script:
    """An OK, with an OkHttpResponse if there is something to say. `rest`: other fields of the CheckResponse."""
    return says(0, **({"ok_response": ok} if ok else {}), **(rest or {}))


def denies(code: int = 7, *, http: int = 0, rest: dict[str, Any] | None = None, **denied: Any) -> Script:
    """A refusal."""
    inner = denied | ({"status": {"code": http}} if http else {})
    return says(code, **({"denied_response": inner} if inner else {}), **(rest or {}))


def errs(code: int = 13, *, http: int = 0, **error: Any) -> Script:
    """The service says that it could not decide."""
    return says(code, error_response=error | ({"status": {"code": http}} if http else {}))


def says(code: int, **fields: Any) -> Script:
    """Steps of a stream: a CheckResponse with a status and other fields as JSON has them."""
    response = json_format.ParseDict(fields, external_auth_pb2.CheckResponse())
    response.status.code = code
    trailers = Headers(lines("grpc-status: 0"), end=True)
    return [Ended(), Headers([(":status", "200"), ("content-type", "application/grpc")]), Body(message(response.SerializeToString()), end=False), trailers]


def grpc_play(*scripts: Script) -> Play:
    """A service that is asked by gRPC."""
    return Play(list(scripts) or [allows()], tidy=_tidy_grpc)


def http_play(*scripts: Script | bytes) -> Play:
    """A service that is asked by HTTP."""
    return Play([[Request(), script] if isinstance(script, bytes) else script for script in scripts] or [[Request(), answer(body=b"")]], tidy=_tidy_http)


def ask_http(*headers: str, status: str = "200 OK", body: bytes = b"") -> bytes:
    """An answer of a service that is asked by HTTP, with headers that may repeat."""
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", ""]).encode() + body


def _tidy_grpc(wire: Wire) -> bytes:
    assert wire.http2 is not None
    text = []
    for number, seen in sorted(wire.http2.streams.items()):
        text.append(f"stream {number}:")
        for kind, value in seen.events:
            if kind == "headers":
                fields = [line.partition(": ") for line in value.decode().split("\r\n") if line]
                text += sorted(f"  {name}: {value}" for name, _, value in fields if name in _SHOWN)
            elif kind == "data":
                text += _request(value)
            else:
                text.append(f"  {kind} {value.decode('latin-1')}")
    return "\r\n".join(text).encode("latin-1", "backslashreplace")


def _request(data: bytes) -> list[str]:
    """The lines of a CheckRequest."""
    request = external_auth_pb2.CheckRequest.FromString(data[5:])
    attributes = request.attributes
    if attributes.HasField("request"):
        assert attributes.request.http.id.isdigit()
        attributes.request.http.id = ""
        moment = attributes.request.time
        assert moment.seconds > 1_500_000_000
        attributes.request.ClearField("time")
        header_map = attributes.request.http.header_map
        ordered = sorted(header_map.headers, key=lambda one: one.key)  # stable: values of one name stay in their order
        pairs = [(one.key, one.raw_value) for one in ordered]
        del header_map.headers[:]
        for key, value in pairs:
            header_map.headers.add(key=key, value=value.decode("latin-1"))  # shown as text: ids in it become symbols
    plain = json_format.MessageToDict(request, preserving_proto_field_name=True)["attributes"]
    for end in ("source", "destination"):
        where = plain[end]["address"].get("socket_address")
        if where:
            plain[end]["address"] = f"{where['address']}:{where['port_value']}"
    return ["  " + line for line in json.dumps(plain, indent=1, sort_keys=True).split("\n")]


def _tidy_http(wire: Wire) -> bytes:
    """Heads with their lines sorted: the service gets them in no particular order."""
    rest, text = bytes(wire.received), []
    while rest:
        head, _, rest = rest.partition(b"\r\n\r\n")
        first, *fields = head.split(b"\r\n")
        length = int(found[1]) if (found := _LENGTH.search(head)) else 0
        text += [first, *sorted(fields), b"", rest[:length]]
        rest = rest[length:]
    return b"\r\n".join(text)


# ---- what the listeners of the cases have in common

LOG = file_log(
    "%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% flags=%RESPONSE_FLAGS% cluster=%UPSTREAM_CLUSTER% route=%ROUTE_NAME% "
    "%DYNAMIC_METADATA(envoy.filters.http.ext_authz:said)% rx=%BYTES_RECEIVED% tx=%BYTES_SENT%\n"
)
HOSTS = y("""
- name: all
  domains: ["*"]
  routes:
  - {match: {prefix: /, headers: [{name: x-tier, string_match: {exact: gold}}]}, name: gold, route: {cluster: b}}
  - match: {prefix: /query}
    name: query
    route: {cluster: a}
  - match: {prefix: /direct}
    direct_response: {status: 200, body: {inline_string: direct}}
  - match: {prefix: /nowhere}
    route: {cluster: nowhere}
  - match: {prefix: /, headers: [{name: x-no-route, present_match: true, invert_match: true}]}
    name: all
    route: {cluster: a}
    metadata: {filter_metadata: {of-route: {key: value, deep: {n: 1}}, other: {x: y}}}
""")
GRPC = {"envoy_grpc": {"cluster_name": "h2authz"}, "timeout": "10s"}
HTTP = {"server_uri": {"uri": "http://authz.test/base", "cluster": "authz", "timeout": "10s"}}


def authz(name: str, *, hosts: Any = HOSTS, before: tuple[Any, ...] = (), listener: Any = None, **fields: Any) -> dict[str, Any]:
    """A listener with the filter: by gRPC, unless there is an http_service."""
    service = {} if "http_service" in fields else {"grpc_service": GRPC}
    config = {"transport_api_version": "V3"} | service | fields
    return http(
        name, hosts, filters=[*before, filter_("ext_authz", **config)], access_log=[LOG], listener_fields=listener, route_config={"validate_clusters": False}
    )


def header(key: str, value: str, action: str | int | None = None, *, append: bool | None = None) -> dict[str, Any]:
    option: dict[str, Any] = {"header": {"key": key, "value": value}}
    if action is not None:
        option["append_action"] = action
    if append is not None:
        option["append"] = append
    return option


def patterns(*names: str, how: str = "exact") -> dict[str, Any]:
    return {"patterns": [{how: name} for name in names]}


TLS = {
    "name": "tls",
    "typed_config": {
        "@": "downstream_tls",
        "require_client_certificate": False,
        "common_tls_context": {
            "tls_certificates": [{"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}],
            "validation_context": {"trusted_ca": {"filename": "${pem:ca}"}},
        },
    },
}

SENT = ("X-There: 1", "X-There: 2", "X-One: 1", "Cookie: a=b", "Accept: x/y")
