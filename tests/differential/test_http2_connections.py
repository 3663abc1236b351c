"""Downstream HTTP/2 connections: how they begin, drain and end, timeouts and resets of their streams, flow control, tunnels, and what logs say of it all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.differential.harness import (
    OK,
    Body,
    Case,
    Close,
    Counted,
    Data,
    Echo,
    Ended,
    Eof,
    Frame,
    GoAway,
    Got,
    Head,
    Headers,
    Heard,
    Hello,
    Idle,
    Open,
    Request,
    Reset,
    Rst,
    Settings,
    Signal,
    Sync,
    Until,
    Update,
    Wait,
    answer,
    ask,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    h2_case,
    head,
    http,
    lines,
)

TOLD = "we say why in a GOAWAY"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def vhost(name: str, to: str = "a", *, match: dict | None = None, **route: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": match or {"prefix": "/"}, "route": {"cluster": to, **route}}]}


REPLY = {"status": 200, "body": {"inline_string": "hello"}}
HOSTS = [
    vhost("a"),
    vhost("short", timeout="0.3s"),
    vhost("idle", timeout="0s", idle_timeout="0.3s"),
    vhost("duration", max_stream_duration={"max_stream_duration": "0.3s"}),
    vhost("flush", flush_timeout="0.3s"),
    vhost("dead", "dead"),
    vhost("ws", upgrade_configs=[{"upgrade_type": "websocket"}]),
    vhost("ws-dead", "dead", upgrade_configs=[{"upgrade_type": "websocket"}]),
    vhost("connect", match={"connect_matcher": {}}, upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {}}]),
    vhost("connect-dead", "dead", match={"connect_matcher": {}}, upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {}}]),
    vhost("connect-on", match={"connect_matcher": {}}, upgrade_configs=[{"upgrade_type": "CONNECT"}]),
    {"name": "direct", "domains": ["direct.test"], "routes": [{"match": {"prefix": "/"}, "direct_response": REPLY}]},
    {"name": "secure", "domains": ["secure.test"], "require_tls": "ALL", "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]},
]
BYTES = (
    "%PROTOCOL% %RESPONSE_CODE% flags=%RESPONSE_FLAGS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% wire_rx=%DOWNSTREAM_WIRE_BYTES_RECEIVED%"
    " header_rx=%DOWNSTREAM_HEADER_BYTES_RECEIVED% "
    "decompressed_rx=%DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED% scheme=%REQ(:SCHEME)% host=%REQ(HOST)% proto=%REQ(X-FORWARDED-PROTO)% te=%REQ(TE)%"
    " cookie=%REQ(COOKIE)% trailer=%TRAILER(X-T)%\n"
)
SENT = "tx=%BYTES_SENT% decompressed_tx=%DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT%\n"
DRAIN = {"drain_timeout": "0.2s"}
CONFIG = bootstrap(
    http("main", HOSTS),
    http("only_h1", HOSTS, codec_type="HTTP1"),
    http("only_h2", HOSTS, codec_type="HTTP2"),
    http("stream_idle", HOSTS, stream_idle_timeout="0.3s"),
    http("flush", HOSTS, stream_flush_timeout="0.3s"),
    http("request", HOSTS, request_timeout="0.3s"),
    http("request_headers", HOSTS, request_headers_timeout="0.3s"),
    http("duration", HOSTS, common_http_protocol_options={"max_connection_duration": "0.4s"}, **DRAIN),
    http("idle", HOSTS, common_http_protocol_options={"idle_timeout": "0.3s"}, **DRAIN),
    http("few", HOSTS, common_http_protocol_options={"max_requests_per_connection": 2}, **DRAIN),
    http("one_at_a_time", HOSTS, http2_protocol_options={"max_concurrent_streams": 1}),
    http("pinging_idle", HOSTS, http2_protocol_options={"connection_keepalive": {"timeout": "0.1s", "connection_idle_interval": "0.05s"}}),
    http("pinging", HOSTS, http2_protocol_options={"connection_keepalive": {"interval": "0.2s", "timeout": "0.3s", "interval_jitter": {"value": 0}}}),
    http("small", HOSTS, max_request_headers_kb=1, common_http_protocol_options={"max_headers_count": 10}),
    http("underscores", HOSTS, common_http_protocol_options={"headers_with_underscores_action": "REJECT_REQUEST"}),
    http("no_underscores", HOSTS, common_http_protocol_options={"headers_with_underscores_action": "DROP_HEADER"}),
    http("buffering", HOSTS, filters=[filter_("buffer", max_request_bytes=10)]),
    http("tunnels", HOSTS, http2_protocol_options={"allow_connect": True}),
    http("bytes", HOSTS, access_log=[file_log(BYTES)]),
    http("sent", HOSTS, access_log=[file_log(SENT)]),
    http("edge", HOSTS, use_remote_address=True),
    http("scheme", HOSTS, scheme_header_transformation={"scheme_to_overwrite": "https"}),
    http("tight", HOSTS, listener_fields={"per_connection_buffer_limit_bytes": 20000}, http2_protocol_options={"initial_stream_window_size": 65535}),
    http("announcing", HOSTS, http2_protocol_options={
        "hpack_table_size": 1000, "max_concurrent_streams": 7, "initial_stream_window_size": 70000, "initial_connection_window_size": 80000,
        "allow_connect": True,
        "custom_settings_parameters": [{"identifier": 0x77, "value": 5}],
    }),
    http("continue", HOSTS, proxy_100_continue=True),
    clusters=[cluster("a"), cluster("dead")],
)  # fmt: skip

GRPC = ("content-type: application/grpc", "te: trailers")
SILENT = [Request(), Eof()]
BIG = bytes(range(256)) * 1000
ALL_READ = Counted("cluster.a.upstream_cx_rx_bytes_total", len(BIG))  # from the upstream
STALLED = [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart", Eof()]
TORN = [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart", Close()]
DRIBBLE = [Request(), b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", *[step for byte in b"slow" for step in (Idle(0.15), bytes((byte,)))]]
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n"
NO_ACK = ("settings",)


def websocket(authority: str = "ws.test", path: str = "/chat", *headers: str, protocol: str = "websocket") -> list[tuple[str, str]]:
    """The head of an extended CONNECT."""
    fields = head("CONNECT", path, "sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==", *headers, authority=authority)
    return [fields[0], (":protocol", protocol), *fields[1:]]


def beginnings() -> Iterator[Case]:
    """Which protocol a connection speaks."""
    yield h2_case("prior_knowledge", ask())
    yield Case("h1_where_both_are_spoken", get())
    yield h2_case("h2_where_only_h1_is_spoken", Idle(0.05), on="only_h1", then="closed")
    yield h2_case("h2_where_only_h2_is_spoken", ask(), on="only_h2")
    yield Case("h1_where_only_h2_is_spoken", [get(), Eof()], on="only_h2", then="closed", skip=("client",), note=TOLD)
    yield Case("half_a_preface", [PREFACE[:10], Idle(0.1), PREFACE[10:], Eof()], then="closed")
    yield Case("preface_without_end", [PREFACE[:20], Idle(0.1), b"x" * 20, Eof()], then="closed", skip=("client",), note=TOLD)
    yield Case("upgrade_to_h2c_is_not_taken", get("/", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"))
    yield h2_case("settings", Heard("settings"), hello=Hello(show=("settings", "window_update")), on="announcing")
    yield h2_case("settings_by_default", Heard("settings"), hello=Hello(show=("settings", "window_update")))


def responses() -> Iterator[Case]:
    """Answers of ours, and what becomes of requests that are not complete."""
    yield h2_case("direct_response", ask(authority="direct.test"))
    yield h2_case("direct_response_head", ask("HEAD", authority="direct.test"))
    yield h2_case("direct_response_to_half_a_request", Open(head("POST", authority="direct.test"), end=False), Ended(), Idle(0.05), Data(b"late", end=True))
    yield h2_case("direct_response_to_half_a_request_with_length", Open(head("POST", "/", "content-length: 10", authority="direct.test"), end=False), Ended())
    yield h2_case("no_route", ask(authority="nowhere.test"))
    yield h2_case("no_route_grpc", ask("POST", "/p.S/M", *GRPC, authority="nowhere.test"))
    yield h2_case("tls_is_required", ask(authority="secure.test"))
    yield h2_case("dead_upstream", ask(authority="dead.test"))
    yield h2_case("dead_upstream_half_request", Open(head("POST", authority="dead.test"), end=False), Ended())
    yield h2_case("dead_upstream_grpc", ask("POST", "/p.S/M", *GRPC, authority="dead.test"))
    yield h2_case("two_requests", ask(), ask("POST", body=b"hello"))
    yield h2_case("two_at_once", Open(head()), Open(head(authority="direct.test")), Ended(1, 3))
    yield h2_case("early_response", Open(head("POST"), end=False), Ended(), up=[Head(), OK, Eof()])
    yield h2_case("early_response_and_then_data", Open(head("POST"), end=False), Ended(), Data(b"late"), up=[Head(), OK, Eof()])
    yield h2_case(
        "early_error_response",
        Open(head("POST", "/", "content-length: 10"), end=False),
        Data(b"half"),
        Ended(),
        up=[Until(b"half"), answer("403 Forbidden", b"no"), Eof()],
    )
    yield h2_case("request_too_large", Open(head("POST"), end=False), Data(b"x" * 20), Ended(), on="buffering")
    yield h2_case("request_not_too_large", ask("POST", body=b"x" * 5), on="buffering")
    yield h2_case("no_content", ask(), up=[Request(), b"HTTP/1.1 204 No Content\r\n\r\n"])
    yield h2_case("not_modified", ask(), up=[Request(), b'HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\netag: "x"\r\n\r\n'])
    yield h2_case("response_without_length", ask(), up=[Request(), b"HTTP/1.1 200 OK\r\n\r\nto the end", Close()])
    yield h2_case("continue_by_us", Open(head("POST", "/", "expect: 100-continue"), end=False), Heard("headers"), Body(b"hello"), Ended())
    yield h2_case(
        "continue_by_upstream",
        Open(head("POST", "/", "expect: 100-continue"), end=False),
        Heard("headers"),
        Body(b"hello"),
        Ended(),
        on="continue",
        up=[Head(), b"HTTP/1.1 100 Continue\r\nx-a: 1\r\n\r\n", Until(b"0\r\n\r\n"), OK],
    )
    yield h2_case("early_hints", ask(), up=[Request(), b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n", OK])
    yield h2_case("early_hints_proxied", ask(), up=[Request(), b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n", OK], on="continue")
    yield h2_case("scheme_of_the_client", ask(scheme="https"))
    yield h2_case("scheme_in_capitals", ask(scheme="HTTPS"), on="edge")
    yield h2_case("scheme_overwritten", ask(scheme="http"), on="scheme")
    yield h2_case("edge", ask("GET", "/", "x-forwarded-proto: https", "x-request-id: abc"), on="edge")


def resets() -> Iterator[Case]:
    """Streams that do not end in order."""
    yield h2_case("reset_by_client", Open(head()), Wait("asked"), Rst(), up=[Request(), Signal("asked"), Eof()])
    yield h2_case("reset_by_client_no_error", Open(head()), Wait("asked"), Rst(0), up=[Request(), Signal("asked"), Eof()])
    yield h2_case("reset_by_client_refused", Open(head()), Wait("asked"), Rst(7), up=[Request(), Signal("asked"), Eof()])
    yield h2_case(
        "reset_by_client_half_request", Open(head("POST"), end=False), Data(b"half"), Wait("asked"), Rst(), up=[Until(b"half"), Signal("asked"), Eof()]
    )
    yield h2_case("reset_by_client_half_response", Open(head()), Got(b"part"), Rst(), up=STALLED)
    yield h2_case(
        "reset_at_once", Open(head("POST"), end=False), Rst(), skip=("upstream", "stats"), note="whether the request still reaches the upstream is a race"
    )
    yield h2_case(
        "reset_other_streams_go_on",
        Open(head()),
        Wait("asked"),
        Open(head(authority="direct.test")),
        Ended(),
        Rst(stream=1),
        up=[Request(), Signal("asked"), Eof()],
    )
    yield h2_case("upstream_torn", Open(head()), Ended(), up=TORN)
    yield h2_case("upstream_torn_half_request", Open(head("POST"), end=False), Data(b"half"), Ended(), up=[Until(b"half"), *TORN[1:]])
    yield h2_case("upstream_resets", Open(head()), Ended(), up=[Request(), Reset()])
    yield h2_case("upstream_bad_chunk", Open(head()), Ended(), up=[Request(), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", Eof()])
    yield h2_case("client_closes", Open(head()), Wait("asked"), Close(), up=[Request(), Signal("asked"), Eof()], then="leave")
    yield h2_case("client_closes_half_request", Open(head("POST"), end=False), Wait("asked"), Close(), up=[Head(), Signal("asked"), Eof()], then="leave")
    yield h2_case("client_closes_half_response", Open(head()), Got(b"part"), Close(), up=STALLED, then="leave")
    yield h2_case("client_says_goodbye", Open(head()), GoAway(), Ended(), up=[Request(), OK], then="leave")
    yield h2_case("client_says_goodbye_with_error", Open(head()), GoAway(0, 2), Ended(), up=[Request(), OK], then="leave")
    yield h2_case(
        "refused_streams",
        Open(head()),
        Wait("asked"),
        Open(head()),
        Ended(),
        Signal("go"),
        Ended(1),
        skip=("client",),
        note=TOLD,
        on="one_at_a_time",
        up=[Request(), Signal("asked"), Wait("go"), OK],
    )


def timeouts() -> Iterator[Case]:
    """Times that are over."""
    yield h2_case("route_timeout", ask(authority="short.test"), up=SILENT)
    yield h2_case("route_timeout_grpc", ask("POST", "/p.S/M", *GRPC, body=b"x", authority="short.test"), up=SILENT)
    yield h2_case("route_timeout_after_head", Open(head(authority="short.test")), Ended(), up=STALLED)
    yield h2_case("route_idle", ask(authority="idle.test"), up=SILENT)
    yield h2_case("route_idle_half_request", Open(head("POST", authority="idle.test"), end=False), Ended(), up=[Head(), Eof()])
    yield h2_case("route_idle_after_head", Open(head(authority="idle.test")), Ended(), up=STALLED)
    yield h2_case("stream_idle", ask(), up=SILENT, on="stream_idle")
    yield h2_case("stream_idle_half_request", Open(head("POST"), end=False), Data(b"half"), Ended(), up=[Until(b"half"), Eof()], on="stream_idle")
    yield h2_case("stream_idle_after_head", Open(head()), Ended(), up=STALLED, on="stream_idle")
    yield h2_case("stream_idle_slow_response", Open(head()), Ended(), up=DRIBBLE, on="stream_idle")
    yield h2_case("stream_idle_grpc", ask("POST", "/p.S/M", *GRPC, body=b"x"), up=SILENT, on="stream_idle")
    yield h2_case(
        "stream_idle_half_head", Frame(1, 0, 1, b"\x82"), Heard("headers"), on="stream_idle", then="leave", hello=Hello(manual=("settings", "window"))
    )
    yield h2_case("request_timeout", Open(head("POST"), end=False), Data(b"half"), Ended(), up=[Until(b"half"), Eof()], on="request")
    yield h2_case("request_timeout_not_for_whole_requests", Open(head()), Ended(), up=DRIBBLE, on="request")
    yield h2_case(
        "request_headers_timeout", Frame(1, 0, 1, b"\x82"), Heard("headers"), on="request_headers", then="leave", hello=Hello(manual=("settings", "window"))
    )
    yield h2_case("max_stream_duration", ask(authority="duration.test"), up=SILENT)
    yield h2_case("max_stream_duration_half_request", Open(head("POST", authority="duration.test"), end=False), Ended(), up=[Head(), Eof()])
    yield h2_case("max_stream_duration_after_head", Open(head(authority="duration.test")), Ended(), up=STALLED)
    slow = {"hello": Hello({4: 10}, manual=("window",)), "up": [Request(), answer("200 OK", b"x" * 100)], "then": "leave"}
    yield h2_case("not_taken", Open(head()), Ended(), on="stream_idle", **slow)
    yield h2_case("not_taken_in_flush_timeout", Open(head()), Ended(), on="flush", **slow)
    yield h2_case("not_taken_in_flush_timeout_of_route", Open(head(authority="flush.test")), Ended(), **slow)
    yield h2_case("taken_late", Open(head()), Got(10), Idle(0.1), Update(1000, None), Ended(), **slow)
    yield h2_case("not_taken_and_reset", Open(head()), Got(10), Idle(0.1), Rst(), **slow)
    yield h2_case("not_taken_and_closed", Open(head()), Got(10), Idle(0.1), Close(), **slow)
    # By decision: a response that is all there before its request has ended, and is taken late, is delivered. Envoy resets the stream, and the rest is lost.
    early = slow | {"up": [Head(), answer("200 OK", b"x" * 100), Eof()], "then": "open"}
    post, take, told, whole = Open(head("POST"), end=False), Update(1000, None), {"strictly": "rst_stream NO_ERROR"}, {"strictly": "x" * 100}
    yield h2_case("early_response_taken_late", post, Got(10), Idle(0.1), take, Ended(), **early, **told)
    bits = [step for n in range(9) for step in (Update(10, None), Got(10 * n + 20))]
    yield h2_case("early_response_taken_bit_by_bit", post, Got(10), *bits, Ended(), **early, **told)
    yield h2_case("early_response_and_then_more", post, Got(10), *[Data(b"late")] * 5, Sync(), take, Ended(), **early, **told)
    length = Open(head("POST", "/", "content-length: 4"), end=False)
    early_to_all = early | {"up": [Request(), answer("200 OK", b"x" * 100)]}
    yield h2_case("early_response_to_all_of_a_body", length, Data(b"body"), Got(10), Idle(0.1), take, Ended(), **early_to_all, **told)
    yield h2_case("early_response_and_then_the_end", post, Got(10), Data(b"late", end=True), Idle(0.1), take, Ended(), **early, **whole)
    trailers = Headers(lines("x-t: 1"), end=True)
    yield h2_case("early_response_and_then_trailers", post, Got(10), Data(b"late"), trailers, Idle(0.1), take, Ended(), **early, **whole)
    lost = {"skip_stats": ("downstream_rq_rx_reset", "tx_flush_timeout"), "note": "Envoy did not wait for it"}
    yield h2_case("early_response_never_taken", post, Got(10), Ended(), on="flush", **early, **lost)


def drains() -> Iterator[Case]:
    """Connections that end by themselves."""
    yield h2_case("idle_connection", ask(), Eof(), on="idle", then="closed")
    yield h2_case("idle_connection_without_requests", Heard("goaway", 2), Eof(), on="idle", then="closed")
    yield Case("idle_connection_without_anything", [Eof()], on="idle", then="closed")
    yield h2_case("max_connection_duration", ask(), Eof(), on="duration", then="closed")
    yield h2_case(
        "max_connection_duration_busy",
        Open(head()),
        Heard("goaway", 2),
        Signal("go"),
        Ended(),
        Eof(),
        on="duration",
        then="closed",
        up=[Request(), Wait("go"), OK],
    )
    yield h2_case("max_connection_duration_while_draining", Heard("goaway", 1), ask(authority="direct.test"), Eof(), on="duration", then="closed")
    yield h2_case(
        "max_connection_duration_too_late",
        Open(head()),
        Heard("goaway", 2),
        Open(head(authority="direct.test")),
        Idle(0.05),
        Signal("go"),
        Ended(1),
        Eof(),
        on="duration",
        then="closed",
        up=[Request(), Wait("go"), OK],
    )
    yield Case("max_connection_duration_without_anything", [Eof()], on="duration", then="closed")
    yield h2_case("max_requests", ask(authority="direct.test"), ask(authority="direct.test"), ask(authority="direct.test"), Eof(), on="few", then="closed")
    yield h2_case("keepalive", Heard("ping", 2), on="pinging", then="leave")
    yield h2_case("keepalive_of_idle_connections_is_for_upstreams", ask(), Idle(0.15), ask(), on="pinging_idle", hello=Hello(manual=("ping",)))
    yield h2_case("keepalive_not_answered", Eof(), on="pinging", then="closed", hello=Hello(manual=("ping",)))
    yield h2_case("keepalive_not_answered_busy", Open(head()), Eof(), on="pinging", then="closed", hello=Hello(manual=("ping",)), up=SILENT)
    yield h2_case("ping", Frame(6, 0, 0, b"12345678"), Heard("ping_ack"), hello=Hello(show=("ping_ack",)))


def limits() -> Iterator[Case]:
    """Heads that are too much."""
    yield h2_case("head_too_large", ask("GET", "/", "x-a: " + "y" * 2000), on="small")
    yield h2_case("head_not_too_large", ask("GET", "/", "x-a: " + "y" * 700), on="small")
    yield h2_case("too_many_fields", ask("GET", "/", *[f"x-{n}: 1" for n in range(10)]), on="small")
    yield h2_case("not_too_many_fields", ask("GET", "/", *[f"x-{n}: 1" for n in range(6)]), on="small")
    yield h2_case(
        "too_many_fields_others_go_on",
        Open(head()),
        Wait("asked"),
        ask("GET", "/", *[f"x-{n}: 1" for n in range(12)]),
        Signal("go"),
        Ended(1),
        on="small",
        up=[Request(), Signal("asked"), Wait("go"), OK],
    )
    yield h2_case(
        "trailers_too_large",
        Open(head("POST"), end=False),
        Data(b"x"),
        Headers(lines("x-a: " + "y" * 2000), end=True),
        Ended(),
        on="small",
        skip=("upstream", "stats"),
        note="how much of it still reaches the upstream is a race",
    )
    yield h2_case("underscore_rejected", ask("GET", "/", "a_b: 1"), on="underscores")
    yield h2_case("underscore_rejected_others_go_on", ask("GET", "/", "a_b: 1"), ask("GET", "/"), on="underscores")
    yield h2_case("underscore_dropped", ask("GET", "/", "a_b: 1", "a-b: 2"), on="no_underscores")
    yield h2_case("cookies_too_large", ask("GET", "/", *["cookie: " + "y" * 200] * 9), on="small")
    yield h2_case("cookies_not_too_large", ask("GET", "/", *["cookie: " + "y" * 50] * 9), on="small")
    yield h2_case("many_cookies", ask("GET", "/", *["cookie: y"] * 20), on="small")
    yield h2_case("underscore_allowed", ask("GET", "/", "a_b: 1"))


def flows() -> Iterator[Case]:
    """Flow control."""
    big = [Request(), answer("200 OK", BIG)]
    yield h2_case("big_response", Open(head()), Update(1 << 20), Update(1 << 20, None), Ended(), up=big)
    yield h2_case(
        "big_response_bit_by_bit", Open(head()), Got(65535), Update(1 << 20, None), Idle(0.05), Update(100000), Got(165535), Update(1 << 20), Ended(), up=big
    )
    yield h2_case(
        "no_window_at_first",
        Open(head()),
        Heard("headers"),
        Idle(0.05),
        Settings({4: 1000}),
        Ended(),
        hello=Hello({4: 0}),
        up=[Request(), answer("200 OK", b"x" * 500)],
    )
    yield h2_case(
        "window_taken_back",
        Open(head()),
        Got(1000),
        Settings({4: 500}),
        Heard("settings_ack", 2),
        Update(100, None),
        Idle(0.05),
        Update(500, None),
        Ended(),
        hello=Hello({4: 1000}),
        up=[Request(), answer("200 OK", b"x" * 1050)],
    )
    yield h2_case("big_request", ask("POST", "/", f"content-length: {len(BIG)}", body=BIG))
    yield h2_case("big_request_through_small_buffers", ask("POST", "/", f"content-length: {len(BIG)}", body=BIG), on="tight")
    yield h2_case("big_response_through_small_buffers", Open(head()), Update(1 << 20), Update(1 << 20, None), Ended(), up=big, on="tight")
    yield h2_case(
        "reset_while_blocked", Open(head()), Got(1000), ALL_READ, Rst(), up=[Request(), answer("200 OK", BIG)], hello=Hello({4: 1000}, manual=("window",))
    )
    yield h2_case(
        "closed_while_blocked",
        Open(head()),
        Got(1000),
        ALL_READ,
        Close(),
        up=[Request(), answer("200 OK", BIG)],
        then="leave",
        hello=Hello({4: 1000}, manual=("window",)),
    )


def tunnels() -> Iterator[Case]:
    """CONNECT, and extended CONNECT (RFC 8441)."""
    echo = [Head(), SWITCH, Echo()]
    yield h2_case(
        "websocket",
        Open(websocket(), end=False),
        Heard("headers"),
        Data(b"ping"),
        Got(b"ping"),
        Data(end=True),
        Idle(0.05),
        Close(),
        on="tunnels",
        then="leave",
        up=[Head(), SWITCH, Echo()],
    )
    yield h2_case(
        "websocket_closed_by_upstream",
        Open(websocket(), end=False),
        Heard("headers"),
        Data(b"ping"),
        Ended(),
        on="tunnels",
        up=[Head(), SWITCH, Until(b"ping"), b"pong", Close()],
    )
    yield h2_case("websocket_reset_by_client", Open(websocket(), end=False), Heard("headers"), Data(b"ping"), Got(b"ping"), Rst(), on="tunnels", up=echo)
    yield h2_case("websocket_refused", Open(websocket(), end=False), Ended(), on="tunnels", up=[Head(), answer("403 Forbidden", b"no"), Eof()])
    yield h2_case("websocket_answered_otherwise", Open(websocket(), end=False), Ended(), on="tunnels", up=[Head(), answer("200 OK", b"hello"), Eof()])
    yield h2_case("websocket_not_allowed_on_route", Open(websocket("a.test"), end=False), Ended(), on="tunnels")
    yield h2_case("websocket_to_dead_upstream", Open(websocket("ws-dead.test"), end=False), Ended(), on="tunnels")
    yield h2_case("websocket_not_announced", Open(websocket(), end=False), Ended(), then="closed", skip=("client",), note=TOLD)
    yield h2_case("other_protocol", Open(websocket(protocol="foo"), end=False), Ended(), on="tunnels")
    yield h2_case(
        "connect",
        Open(head("CONNECT", None, authority="connect.test", scheme=None), end=False),
        Heard("headers"),
        Data(b"ping"),
        Got(b"ping"),
        Data(end=True),
        Ended(),
        up=[Echo()],
    )
    yield h2_case(
        "connect_closed_by_upstream",
        Open(head("CONNECT", None, authority="connect.test", scheme=None), end=False),
        Heard("headers"),
        Data(b"ping"),
        Ended(),
        up=[Until(b"ping"), b"pong", Close()],
    )
    yield h2_case(
        "connect_reset_by_upstream",
        Open(head("CONNECT", None, authority="connect.test", scheme=None), end=False),
        Heard("headers"),
        Data(b"ping"),
        Ended(),
        up=[Until(b"ping"), Reset()],
    )
    yield h2_case(
        "connect_reset_by_client",
        Open(head("CONNECT", None, authority="connect.test", scheme=None), end=False),
        Heard("headers"),
        Data(b"ping"),
        Got(b"ping"),
        Rst(),
        up=[Echo()],
    )
    yield h2_case("connect_to_dead_upstream", Open(head("CONNECT", None, authority="connect-dead.test", scheme=None), end=False), Ended())
    yield h2_case(
        "connect_forwarded",
        Open(head("CONNECT", None, authority="connect-on.test", scheme=None), end=False),
        Heard("headers"),
        Data(b"ping"),
        Got(b"ping"),
        Data(end=True),
        Ended(),
        up=[Head(), b"HTTP/1.1 200 OK\r\n\r\n", Echo()],
    )
    yield h2_case(
        "connect_refused",
        Open(head("CONNECT", None, authority="connect-on.test", scheme=None), end=False),
        Ended(),
        up=[Head(), answer("403 Forbidden", b"no"), Eof()],
    )
    yield h2_case("connect_not_allowed", Open(head("CONNECT", None, authority="a.test", scheme=None), end=False), Ended())


def logged() -> Iterator[Case]:
    """Values that logs show."""
    yield h2_case("log_get", ask("GET", "/", "cookie: a=1", "cookie: b=2"), on="bytes")
    yield h2_case("log_sent", ask(authority="direct.test"), on="sent")
    yield h2_case("log_post", ask("POST", "/", "te: trailers", body=b"hello"), on="bytes")
    yield h2_case(
        "log_two_frames", Open(head("POST", "/", "content-length: 5"), end=False), Data(b"hel", padding=5), Data(b"lo", end=True), Ended(), on="bytes"
    )
    yield h2_case("log_continuation", Open(head("GET", "/", "x-a: " + "b" * 100), split=20), Ended(), on="bytes")
    yield h2_case(
        "log_response_trailers", ask(), on="bytes", up=[Request(), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-t: 1\r\n\r\n"]
    )
    yield h2_case("log_reset", Open(head()), Wait("asked"), Rst(), on="bytes", up=[Request(), Signal("asked"), Eof()])


CASES = [*beginnings(), *responses(), *resets(), *timeouts(), *drains(), *limits(), *flows(), *tunnels(), *logged()]

test_case = check_cases(CASES)
