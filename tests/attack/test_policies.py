"""Ways around what a configuration forbids: paths and headers that a rule reads differently from those behind it, and headers that clients may not send."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from tests.attack.readings import one_reading
from tests.attack.target import Target, arena, http
from tests.differential.config import cluster, filter_, to
from tests.differential.wire import OK, Request, answer

ANY = [{"any": True}]


def deny(*permissions: dict[str, Any], principals: list[dict[str, Any]] = ANY) -> dict[str, Any]:
    return filter_("rbac", rules={"action": "DENY", "policies": {"p": {"permissions": list(permissions), "principals": principals}}})


def allow(*permissions: dict[str, Any], principals: list[dict[str, Any]] = ANY) -> dict[str, Any]:
    return filter_("rbac", rules={"action": "ALLOW", "policies": {"p": {"permissions": list(permissions), "principals": principals}}})


def header(name: str, **match: Any) -> dict[str, Any]:
    return {"header": {"name": name, "string_match": match}}


STRICT = {"normalize_path": True, "merge_slashes": True, "path_with_escaped_slashes_action": "REJECT_REQUEST"}
ADMIN = {"url_path": {"path": {"prefix": "/admin"}}}
ROUTED = [
    {"name": "all", "domains": ["*"], "routes": [
        {"match": {"path_separated_prefix": "/admin"}, "direct_response": {"status": 403}}, {"match": {"prefix": "/"}, "route": {"cluster": "a"}},
    ]},
]  # fmt: skip
_TEMPLATE = {"@type": "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", "path_template": "/public/*/info"}
TEMPLATED = [
    {"name": "all", "domains": ["*"], "routes": [
        {"match": {"path_match_policy": {"name": "t", "typed_config": _TEMPLATE}}, "route": {"cluster": "a"}},
        {"match": {"prefix": "/"}, "direct_response": {"status": 403}},
    ]},
]  # fmt: skip
CONFIG = arena(
    http("main", to("a")),
    http("by_filter", to("a"), filters=[deny(ADMIN)], **STRICT),
    http("by_route", ROUTED, **STRICT),
    http("by_template", TEMPLATED, **STRICT),
    http("by_regex", to("a"), filters=[deny(header("x-role", safe_regex={"regex": ".*admin.*"}))]),
    http("by_contains", to("a"), filters=[deny(header("x-role", contains="admin"))]),
    http("by_allowed_regex", to("a"), filters=[allow(header("x-role", safe_regex={"regex": "user|guest"}))]),
    http("by_address", to("a"), use_remote_address=True,
         filters=[allow({"any": True}, principals=[{"remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}])]),
    http("edge", to("a", timeout="20s"), use_remote_address=True),
    http("secure", [{"name": "all", "domains": ["*"], "require_tls": "ALL", "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]}],
         use_remote_address=True),
    http("dropping", to("a"), common_http_protocol_options={"headers_with_underscores_action": "DROP_HEADER"}),
    http("refusing", to("a"), common_http_protocol_options={"headers_with_underscores_action": "REJECT_REQUEST"}),
    clusters=[cluster("a")],
)  # fmt: skip
PATHS = [
    "/admin", "/admin/", "/admin/x", "/admin?x", "/x/../admin", "/x/../admin/y", "//admin", "/./admin", "/x//../admin", "/x/y/../../admin", "/%61dmin",
    "/adm%69n", "/x/%2e%2e/admin", "/x/.%2e/admin", "/x/%2E./admin", "/x%2f..%2fadmin", "/x/..%2fadmin", "/%2fadmin", "/x/..%5cadmin", "/x\\..\\admin",
    "\\admin", "/\\admin", "/x/..;/admin", "/x/..;a=b/admin", "/.;/admin", "/admin;x", "/admin;/x", "/admin%3bx", "/%2561dmin", "/x/%252e%252e/admin",
    "/admin%00", "/admin%00.html", "/admin%20", "/admin%09", "/admin#x", "/x#/../admin", "/x?/../admin", "/x/...//admin", "/..../admin", "/x/../../../admin",
    "/../admin", "http://a.test/admin", "http://a.test/x/../admin", "http://a.test//admin", "http:/admin", "/%c0%ae%c0%ae/admin", "/%e2%80%ae/../admin",
    "/admin.", "/admin..", "/%", "/%a/../admin", "/x/../%61dmin", "/x/..//admin", "/////admin", "/x/././../admin", "/.//admin", "/x/.//../admin",
    "/%2e/admin", "/%2e%2e/admin", "/%2E%2E%2Fadmin",
]  # fmt: skip


def seen_by_a_server(target: bytes) -> bytes:
    """How a server behind us may read a path: decoded once, backslashes turned, parameters of dot segments and slashes dropped, dots resolved."""
    path = unquote_to_bytes(target.partition(b"?")[0]).replace(b"\\", b"/").partition(b"\0")[0]
    out: list[bytes] = []
    for segment in path.split(b"/"):
        name = segment.partition(b";")[0] if segment.startswith(b".") else segment
        if name == b"..":
            del out[-1:]
        elif name not in {b"", b"."}:
            out.append(segment)
    return b"/" + b"/".join(out)


def forwarded(target: Target) -> list[bytes]:
    """The request targets that the upstream saw."""
    return [line for wire in target.upstreams["a"].connections for _, line, _ in one_reading(bytes(wire.received))]


def raw(path: str, *lines: bytes, method: str = "GET") -> bytes:
    return b"\r\n".join((f"{method} {path} HTTP/1.1".encode("latin-1"), b"Host: a.test", b"Connection: close", *lines, b"", b""))


@pytest.mark.parametrize("listener", ["by_filter", "by_route"])
async def test_forbidden_path(target: Target, listener: str):
    """However it is written: what the upstream gets is not the forbidden path to any reader; and honest paths pass."""
    for path in PATHS:
        replies = await target.send(raw(path), listener=listener)
        assert replies.statuses[0] in {200, 400, 403, 404}, path
    for path in forwarded(target):
        assert not re.match(rb"/admin(/|$)", seen_by_a_server(path)), path
    assert (await target.send(raw("/administrators" if listener == "by_route" else "/other/admin"), listener=listener)).statuses == [200]


async def test_uri_template(target: Target):
    """CVE-2025-46821: `*` is one segment, of characters that segments have."""
    allowed = {"/public/x/info": 200, "/public/x-y_z.~/info": 200, "/public/%41/info": 200}
    refused = [
        "/public/x/y/info",
        "/public//info",
        "/public/../info",
        "/private/x/info",
        "/public/x/info/more",
        "/public/x%2Fy/info",
        "/public/../private/x/../public/../info",
    ]
    for path, status in allowed.items():
        assert (await target.send(raw(path), listener="by_template")).statuses == [status], path
    for path in refused:
        assert (await target.send(raw(path), listener="by_template")).statuses[0] in {400, 403}, path


VALUES = [
    b"admin", b"admin\xff", b"\xffadmin", b"\x80admin\x80", b"\xc3\x28admin", b"x admin y", b"user, admin", b"admin\t", b"caf\xc3\xa9 admin",
    b"admin" + b"x" * 5000, b"\xed\xa0\x80admin",
]  # fmt: skip


@pytest.mark.parametrize("listener", ["by_regex", "by_contains"])
async def test_denied_header_values(target: Target, listener: str):
    """CVE-2026-73552: a value that is no UTF-8 does not fail open; CVE-2020-25017: nor does the second of two lines, or one in another case."""
    for value in VALUES:
        for lines in ([b"X-Role: " + value], [b"X-Role: user", b"x-ROLE: " + value], [b"X-Role: " + value, b"X-Role: user"], [b"X-Role:", b"X-Role: " + value]):
            assert (await target.send(raw("/", *lines), listener=listener)).statuses == [403], lines
    assert not forwarded(target)
    assert (await target.send(raw("/", b"X-Role: user"), listener=listener)).statuses == [200]


async def test_allowed_header_values(target: Target):
    """A regular expression that allows matches a whole line; as for Envoy, one of several lines is enough."""
    for lines in ([b"X-Role: admin"], [b"X-Role: user\xff"], [b"X-Role: userx"], [b"X-Role: user, admin"], [b"X-Role: user,guest"], [], [b"X-Role:"]):
        assert (await target.send(raw("/", *lines), listener="by_allowed_regex")).statuses == [403], lines
    assert (await target.send(raw("/", b"X-Role: guest"), listener="by_allowed_regex")).statuses == [200]


async def test_forged_addresses(target: Target):
    """The address is that of the connection, whatever is said in headers (use_remote_address)."""
    for name in (
        b"X-Forwarded-For",
        b"X_Forwarded_For",
        b"X-Real-IP",
        b"Forwarded",
        b"X-Envoy-External-Address",
        b"X-Client-IP",
        b"True-Client-IP",
        b"X-Envoy-Internal",
    ):
        for value in (b"10.0.0.1", b"10.0.0.1, 127.0.0.1", b"127.0.0.1, 10.0.0.1", b"for=10.0.0.1", b"::ffff:10.0.0.1", b"10.0.0.1:80", b"true"):
            assert (await target.send(raw("/", name + b": " + value), listener="by_address")).statuses == [403], (name, value)


CONTROL = [
    b"X-Envoy-Upstream-Rq-Timeout-Ms: 1", b"X-Envoy-Upstream-Rq-Per-Try-Timeout-Ms: 1", b"X-Envoy-Expected-Rq-Timeout-Ms: 1", b"X-Envoy-Retry-On: 5xx,reset",
    b"X-Envoy-Max-Retries: 9", b"X-Envoy-Retry-Grpc-On: internal", b"X-Envoy-Retriable-Status-Codes: 503", b"X-Envoy-Hedge-On-Per-Try-Timeout: true",
    b"X-Envoy-Upstream-Alt-Stat-Name: evil", b"X-Envoy-Upstream-Rq-Timeout-Alt-Response: 1", b"X-Envoy-Force-Trace: 1", b"X-Envoy-Internal: true",
    b"X-Envoy-Ip-Tags: t", b"X-Envoy-Original-Url: u", b"X-Envoy-Original-Path: /p", b"X-Envoy-Decorator-Operation: o",
    b"X-Envoy-Downstream-Service-Cluster: c", b"X-Envoy-Downstream-Service-Node: n", b"X-Envoy-Retriable-Header-Names: x",
]  # fmt: skip


async def test_control_headers_of_strangers(target: Target):
    """Nobody outside sets our timeouts and retries: the headers are gone, and had no effect."""
    target.upstream("a", [Request(), answer("503 No", b"")], [Request(), OK])
    assert (await target.send(raw("/", *CONTROL), listener="edge")).statuses == [503]
    seen = b"".join(bytes(wire.received) for wire in target.upstreams["a"].connections).lower()
    assert seen.count(b"get / ") == 1
    for line in CONTROL:
        name, _, value = line.lower().partition(b": ")
        assert name + b": " + value + b"\r\n" not in seen, line
    assert await target.counted("cluster.a.upstream_rq_retry") == 0
    assert not [name for name in await target.proxy.stats() if "evil" in name]


async def test_forged_scheme(target: Target):
    """require_tls looks at the connection, not at what is said about it."""
    for lines in (
        [b"X-Forwarded-Proto: https"],
        [b"X-Forwarded-Proto: http", b"X-Forwarded-Proto: https"],
        [b"X_Forwarded_Proto: https"],
        [b"Forwarded: proto=https"],
    ):
        assert (await target.send(raw("/", *lines), listener="secure")).statuses == [301], lines
    assert (await target.send(raw("https://a.test/"), listener="secure")).statuses == [301]


async def test_underscores(target: Target):
    """Headers whose names some servers take for others, where the configuration says so."""
    lines = [b"X_Forwarded_For: 10.0.0.1", b"Content_Length: 5", b"Transfer_Encoding: chunked", b"X_Envoy_Internal: true", b"_: x", b"_Host: evil"]
    assert (await target.send(raw("/", *lines), listener="dropping")).statuses == [200]
    head = bytes(target.upstreams["a"].connections[0].received).partition(b"\r\n\r\n")[0]
    assert b"_" not in head
    for line in lines:
        assert (await target.send(raw("/", line), listener="refusing")).statuses == [400]


async def test_connection_cannot_name_what_others_stand_on(target: Target):
    """Headers that the mesh adds or trusts are not the client's to remove (hop-by-hop abuse)."""
    named = [
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "X-Forwarded-Host",
        "Host",
        "Authorization",
        "Cookie",
        "X-Request-Id",
        "Content-Length",
        "Transfer-Encoding",
        ":path",
        "TE",
    ]
    for name in named:
        request = f"GET / HTTP/1.1\r\nHost: a.test\r\nAuthorization: Bearer t\r\nCookie: a=b\r\nConnection: close, {name}\r\n\r\n".encode()
        assert (await target.send(request, listener="edge")).statuses[0] in {200, 400}
    for wire in target.upstreams["a"].connections:
        for head in bytes(wire.received).split(b"\r\n\r\n")[:-1]:
            for line in (b"host: a.test", b"authorization: Bearer t", b"cookie: a=b", b"x-forwarded-for: ", b"x-forwarded-proto: http", b"x-request-id: "):
                assert b"\r\n" + line in head, (line, head)
