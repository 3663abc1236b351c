"""Hosts that are told by the PROXY protocol who calls. Clients say it themselves, by the same protocol, so that no port of the machine is part of it."""

import struct
from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Echo,
    Head,
    Response,
    Rig,
    Until,
    answer,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    http,
    listener,
    to,
)

SAYS = {"listener_filters": [filter_("proxy_protocol", allow_requests_without_proxy_protocol=True)]}
LOG = file_log("%RESPONSE_CODE% flags=%RESPONSE_FLAGS% remote=%DOWNSTREAM_REMOTE_ADDRESS% failure=%UPSTREAM_TRANSPORT_FAILURE_REASON%\n")
RAW = {"name": "raw", "typed_config": {"@": "raw_buffer"}}
TLS = {"name": "tls", "typed_config": {"@": "upstream_tls", "common_tls_context": {"validation_context": {"trusted_ca": {"filename": "${pem:ca}"}}}}}


def told(version: str, inner: Any = RAW) -> dict:
    """A transport socket that tells who calls."""
    return {"name": "p", "typed_config": {"@": "upstream_proxy_protocol", "config": {"version": version}, "transport_socket": inner}}


def via(name: str, **options: Any) -> dict:
    return http(f"http_{name}", to(name), access_log=[LOG], listener_fields=SAYS, **options)


def tcp(name: str) -> dict:
    return listener(f"tcp_{name}", filter_("tcp_proxy", stat_prefix=f"tcp_{name}", cluster=name), **SAYS)


MATCHES = [{"name": "some", "match": {"a": "b"}, "transport_socket": told("V2")}, {"name": "all", "match": {}, "transport_socket": told("V1")}]
CONFIG = bootstrap(
    *(via(name) for name in ("v1", "v2", "matched", "tls")),
    via("v2", add_proxy_protocol_connection_state=False) | {"name": "http_silent_v2"},
    via("v1", use_remote_address=True, xff_num_trusted_hops=1) | {"name": "http_trusting"},
    http("http_mirrored", to("plain", request_mirror_policies=[{"cluster": "v2"}]), access_log=[LOG], listener_fields=SAYS),
    tcp("v1"), tcp("v2"),
    clusters=[
        cluster("v1", "a", transport_socket=told("V1")),
        cluster("v2", "a", transport_socket=told("V2")),
        cluster("tls", "a", transport_socket=told("V1", TLS)),
        cluster("plain", "b"),
        cluster("matched", "a", transport_socket_matches=MATCHES),
    ],
)  # fmt: skip
LINE = b"PROXY TCP4 10.1.2.3 10.4.5.6 1111 2222\r\n"
OTHER = b"PROXY TCP4 10.1.2.4 10.4.5.6 1111 2222\r\n"
SIX = b"PROXY TCP6 2001:db8::1 2001:db8::2 1111 2222\r\n"
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
BINARY = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack(">H4B4BHH", 12, 10, 1, 2, 3, 10, 4, 5, 6, 1111, 2222)


def heard(header: bytes, *more: Any) -> list:
    """An upstream's connection that must begin with these bytes; then a request is answered."""
    return [Until(header), *(more or [Head(), answer(200, b"ok")])]


def case(name: str, on: str, said: bytes, header: bytes, **fields: Any) -> Case:
    return Case(name, [said, get(), Response()], on=on, up={"a": heard(header)}, **fields)


async def several(rig: Rig) -> Any:
    """Callers share no connection with others, and each keeps its own."""
    return [await rig.exchange(await rig.connect("http_v1"), said + get()) for said in (LINE, OTHER, LINE)]


OKAY = answer(200, b"ok")
CASES = [
    case("v1", "http_v1", LINE, LINE),
    case("v1_ipv6", "http_v1", SIX, SIX),
    case("v2", "http_v2", LINE, BINARY),
    case("matched", "http_matched", LINE, LINE, skip_stats=("cluster.matched.all.total_match_count",)),
    Case("tcp_v1", [LINE, b"hello", Until(b"hello"), Close()], on="tcp_v1", up={"a": heard(LINE, Echo())}, then="leave"),
    Case("tcp_v2", [LINE, b"hello", Until(b"hello"), Close()], on="tcp_v2", up={"a": heard(BINARY, Echo())}, then="leave"),
    Case("nobody", [get(), Response()], on="http_silent_v2", up={"a": heard(LOCAL)}),
    case("said_before_us", "http_silent_v2", LINE, BINARY),
    Case("requests_after_each_other", [LINE, get(), Response(), get("/again"), Response()], on="http_v1", up={"a": heard(LINE, Head(), OKAY, Head(), OKAY)}),
    Case("requests_of_several_callers", several, on="http_v1", up={"a": heard(b" 2222\r\n", Head(), OKAY)}),
    Case("mirrored", [LINE, get(), Response()], on="http_mirrored", up={"a": heard(LOCAL), "b": [Head(), OKAY]}),
    Case("tls_comes_after_it", [LINE, get(), Response()], on="http_tls", up={"a": [Until(LINE + b"\x16\x03\x01"), Close()]}, skip=("upstream",)),
    Case("trusted_client", [LINE, get("/", "x-forwarded-for: 10.9.9.9, 10.8.8.8"), Response()], on="http_trusting",
         up={"a": heard(LINE)}),
]  # fmt: skip
test_case = check_cases(CASES)
