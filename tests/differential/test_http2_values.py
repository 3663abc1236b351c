"""What log commands say of the bytes of requests that go upstream over HTTP/2. How well we compress what we send is our own affair."""

from __future__ import annotations

from typing import Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    Case,
    Data,
    Ended,
    Got,
    Headers,
    Idle,
    Play,
    Response,
    Rst,
    bootstrap,
    check_cases,
    cluster,
    each,
    file_log,
    filter_,
    get,
    h2_case,
    h2_cluster,
    http,
    lines,
    reply,
    req,
)
from tests.differential.test_varying import VARYING, requests

BYTES = "|".join(f"{name}=%{name}%" for name in """
BYTES_RECEIVED BYTES_SENT UPSTREAM_WIRE_BYTES_RECEIVED UPSTREAM_HEADER_BYTES_RECEIVED UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT
UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED DOWNSTREAM_WIRE_BYTES_RECEIVED UPSTREAM_PROTOCOL RESPONSE_FLAGS
""".split()) + "\n"  # fmt: skip
RETRY = {"retry_policy": {"retry_on": "5xx,reset", "num_retries": 2, "retry_back_off": {"base_interval": "0.001s"}}}
HOSTS = [{"name": "a", "domains": ["a.test"], "routes": [
    {"match": {"path": "/retry"}, "route": {"cluster": "h2a", **RETRY}},
    {"match": {"path": "/mirror"}, "route": {"cluster": "h2a", "request_mirror_policies": [{"cluster": "h2b"}, {"cluster": "a"}]}},
    {"match": {"prefix": "/"}, "route": {"cluster": "h2a"}},
]}]  # fmt: skip
ROUTER = [filter_("router", suppress_envoy_headers=True)]  # no durations
CONFIG = bootstrap(
    http("main", HOSTS, access_log=[file_log(BYTES)], http_filters=ROUTER, http_protocol_options={"enable_trailers": True}),
    http("unmetered", HOSTS, http_filters=ROUTER),  # but its upstreams' connections are metered all the same
    clusters=[h2_cluster("h2a"), h2_cluster("h2b"), cluster("a")],
)

ID = "X-Request-Id: 11111111-2222-4333-8444-555555555555"
OK = Headers(lines(":status: 200", "x-one: something"))
CASES = [
    Case(name, steps, up, skip=("stats", "upstream"), then=then)
    for name, steps, up, then in (
        ("get", get("/", ID), reply(), "open"),
        ("three", [part for _ in range(3) for part in (get("/", ID), Response())], reply(), "open"),
        ("post", req("POST", "/", ID, body=b"hello"), [Ended(), *reply()], "open"),
        ("chunked", req("POST", "/", ID, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n", [Ended(), *reply()], "open"),
        ("body", get("/", ID), [OK, Data(b"a" * 100), Data(b"b" * 100, end=True)], "open"),
        ("body_apart", get("/", ID), [OK, Idle(0.02), Data(b"a" * 100), Idle(0.02), Data(b"", end=True)], "open"),
        ("trailers", get("/", ID), reply(trailers=("x-t: 1",)), "open"),
        ("head", req("HEAD", "/", ID), [Headers(lines(":status: 200", "content-length: 5"), end=True)], "open"),
        ("in_pieces", get("/", ID), [Headers(lines(":status: 200", *(f"x-{number}: {'v' * 100}" for number in range(9))), split=100), Data(b"", end=True)],
         "open"),
        ("informational", get("/", ID), [Headers(lines(":status: 103", "link: </a>")), *reply()], "open"),
        ("reset", get("/", ID), [Rst(h2.CANCEL)], "open"),
        ("reset_amid_the_body", get("/", ID), [OK, Data(b"part"), Idle(0.02), Rst(h2.CANCEL)], "closed"),
        ("retried", get("/retry", ID), each(reply(503), [Rst(h2.CANCEL)], reply()), "open"),
        ("early", req("POST", "/", ID, "Content-Length: 5") + b"he", [Got(2), *reply()], "closed"),
    )
]  # fmt: skip


def mirrored() -> Case:
    steps: list[Any] = [get("/mirror", ID), Response(), req("POST", "/mirror", ID, body=b"hello"), Response()]
    return Case("mirrored", steps, {name: Play([[Ended(), *reply()]]) for name in ("h2a", "h2b")}, skip=("stats", "upstream"))


UNMETERED = [
    h2_case(name, requests(*VARYING, indexed=False, method=method, body=body), on="unmetered", up=[Ended(), *reply()])
    for name, method, body in (("varying_get", "GET", b""), ("varying_post", "POST", b"hello"))
]

test_case = check_cases([*CASES, *UNMETERED, mirrored()])
