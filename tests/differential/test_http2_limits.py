"""Limits of HTTP/2 connections on either side: sizes of heads, numbers of streams, windows, floods, time; and what is told to whom when they are reached."""

from __future__ import annotations

import socket
import struct
from typing import Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    Body,
    Case,
    Counted,
    Data,
    Ended,
    Eof,
    Frame,
    GoAway,
    Got,
    Headers,
    Heard,
    Hello,
    Open,
    Play,
    Request,
    Rig,
    Rst,
    Settings,
    Signal,
    Sync,
    Update,
    Wait,
    answer,
    ask,
    bootstrap,
    check_cases,
    cluster,
    get,
    h2_case,
    h2_cluster,
    head,
    http,
    lines,
    reply,
)
from tests.differential.wire import play
from tests.polling import until

LONG = bytes(range(256)) * 800


def vhost(name: str, to: str | None = None, **route: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to or name, **route}}]}


NAMES = ("h2a", "h2_one", "h2_two", "h2_window", "h2_ping", "h2_idle", "h2_max_requests", "h2_duration", "h2_heads", "h2_headers", "h2_under")
HOSTS = [
    vhost("a"),
    *[vhost(name) for name in NAMES],
    vhost("slow", "h2a", timeout="0.3s"),
    vhost("idle", "h2a", idle_timeout="0.3s"),
    vhost("lasting", "h2a", max_stream_duration={"max_stream_duration": "0.3s"}),
    vhost("flood", "h2a", timeout="0s"),
]
SMALL = {"initial_stream_window_size": 65_535, "initial_connection_window_size": 65_535}
CONFIG = bootstrap(
    http("main", HOSTS),
    http("one_stream", HOSTS, http2_protocol_options={"max_concurrent_streams": 1}),
    http("small_windows", HOSTS, http2_protocol_options=SMALL),
    http("no_table", HOSTS, http2_protocol_options={"hpack_table_size": 0}),
    http("small_heads", HOSTS, max_request_headers_kb=1),
    http("few_headers", HOSTS, common_http_protocol_options={"max_headers_count": 10}),
    http("no_underscores", HOSTS, common_http_protocol_options={"headers_with_underscores_action": "REJECT_REQUEST"}),
    http("dropped_underscores", HOSTS, common_http_protocol_options={"headers_with_underscores_action": "DROP_HEADER"}),
    http("idle_connection", HOSTS, common_http_protocol_options={"idle_timeout": "0.3s"}, drain_timeout="0.05s"),
    http("lasting_connection", HOSTS, common_http_protocol_options={"max_connection_duration": "0.3s"}, drain_timeout="0.05s"),
    http("few_requests", HOSTS, common_http_protocol_options={"max_requests_per_connection": 2}, drain_timeout="0.05s"),
    http("lasting_stream", HOSTS, common_http_protocol_options={"max_stream_duration": "0.3s"}),
    http("idle_stream", HOSTS, stream_idle_timeout="0.3s"),
    http("slow_request", HOSTS, request_timeout="0.3s"),
    http("slow_headers", HOSTS, request_headers_timeout="0.3s"),
    http("keepalive", HOSTS, http2_protocol_options={"connection_keepalive": {"interval": "0.1s", "timeout": "0.2s", "interval_jitter": {"value": 0}}}),
    http("few_frames", HOSTS, http2_protocol_options={"max_outbound_frames": 20, "max_outbound_control_frames": 10}),
    http(
        "strict",
        HOSTS,
        http2_protocol_options={
            "max_consecutive_inbound_frames_with_empty_payload": 3,
            "max_inbound_priority_frames_per_stream": 5,
            "max_inbound_window_update_frames_per_data_frame_sent": 2,
        },
    ),
    clusters=[
        cluster("a"),
        h2_cluster("h2a"),
        h2_cluster("h2_one", options={"max_concurrent_streams": 1}),
        h2_cluster("h2_two", circuit_breakers={"thresholds": [{"max_requests": 2}]}),
        h2_cluster("h2_window", options=SMALL),
        h2_cluster("h2_ping", options={"connection_keepalive": {"interval": "0.1s", "timeout": "0.2s", "interval_jitter": {"value": 0}}}),
        h2_cluster("h2_idle", common={"idle_timeout": "0.3s"}),
        h2_cluster("h2_max_requests", common={"max_requests_per_connection": 2}),
        h2_cluster("h2_duration", common={"max_connection_duration": "0.3s"}),
        h2_cluster("h2_heads", common={"max_response_headers_kb": 1}),
        h2_cluster("h2_headers", common={"max_headers_count": 10}),
        h2_cluster("h2_under", common={"headers_with_underscores_action": "DROP_HEADER"}),
    ],
)

OPEN = [Open(head("POST", authority="h2a.test"), end=False), Wait("begun")]
ANSWER = [Signal("begun"), Ended(), *reply()]


def fields(count: int, size: int = 1) -> list[str]:
    return [f"x-{number}: {'v' * size}" for number in range(count)]


async def not_taken(rig: Rig) -> Any:
    """A client that gives windows and then does not read: frames wait for it. How many of them depends on buffers of the kernel."""
    gauges = "http2.outbound_frames_active", "http2.outbound_control_frames_active"
    wire = await rig.connect()
    await play([Hello({h2.WINDOW: 1 << 30}, manual=("window",)), Update(1 << 30), Sync()], wire, rig.signals)

    async def counted() -> list[int]:
        stats = await rig.proxy.stats()
        return [stats.get(name, 0) for name in gauges]

    async def held() -> int:
        return (await counted())[0]

    async def taken() -> bool:
        return await counted() == [0, 0]

    at_rest = await until(taken)
    wire.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    wire.transport.pause_reading()
    await play([Open(head())], wire, rig.signals)
    waiting = await until(held)
    wire.transport.resume_reading()
    await play([Ended()], wire, rig.signals)
    await until(taken)
    return {"at rest": at_rest, "waiting": waiting > 0, "left": await counted()}


async def pushed_back(rig: Rig) -> Any:
    """An upstream that reads nothing, and a client that sends as fast as it is allowed: how much it is allowed is bounded."""
    wire = await rig.connect("small_windows")
    await play([Hello(), Open(head("POST", authority="h2_window.test"), end=False), Body(bytes(60_000), end=False)], wire, rig.signals)
    return wire.http2 is not None and not wire.http2.streams[1].ended


CASES = [
    # ---- heads
    h2_case("head_within_its_limit", Open(head("GET", "/", *fields(2, 400)), end=True), Ended(), on="small_heads"),
    h2_case("head_over_its_limit", Open(head("GET", "/", *fields(2, 600)), end=True), Ended(), on="small_heads"),
    h2_case("head_over_its_limit_in_one_field", Open(head("GET", "/", "x-long: " + "v" * 2000)), Ended(), on="small_heads"),
    h2_case("head_over_its_limit_by_cookies", Open(head("GET", "/", *["cookie: " + "c" * 90] * 12)), Ended(), on="small_heads"),
    h2_case("head_over_its_limit_by_its_path", Open(head("GET", "/" + "p" * 1100)), Ended(), on="small_heads"),
    h2_case("head_over_the_default_limit", Open(head("GET", "/", *fields(8, 8000)), split=16_000), Ended()),
    h2_case("head_below_the_default_limit", Open(head("GET", "/", *fields(7, 8000)), split=16_000), Ended()),
    h2_case("other_streams_after_a_head_over_its_limit", Open(head("GET", "/", *fields(2, 600))), Ended(), ask("GET", "/next"), on="small_heads"),
    h2_case("table_after_a_head_over_its_limit", Open(head("GET", "/", "x-kept: 1", *fields(2, 600))), Ended(), ask("GET", "/next", "x-kept: 1"),
            on="small_heads"),
    h2_case("fields_within_their_number", ask("GET", "/", *fields(5)), on="few_headers"),
    h2_case("fields_at_their_number", ask("GET", "/", *fields(6)), on="few_headers"),
    h2_case("fields_over_their_number", Open(head("GET", "/", *fields(7))), Ended(), on="few_headers"),
    h2_case("fields_over_their_number_by_cookies", Open(head("GET", "/", *["cookie: a=1"] * 9)), Ended(), on="few_headers"),
    h2_case("fields_over_the_default_number", Open(head("GET", "/", *fields(101))), Ended()),
    h2_case("trailers_over_their_limit", Open(head("POST", authority="h2a.test"), end=False), Wait("begun"), Headers(lines(*fields(2, 600)), end=True), Ended(),
            on="small_heads", up=ANSWER),
    h2_case("trailers_over_their_number", Open(head("POST", authority="h2a.test"), end=False), Wait("begun"), Headers(lines(*fields(11)), end=True), Ended(),
            on="few_headers", up=ANSWER),
    h2_case("underscore_rejected", Open(head("GET", "/", "x_y: 1")), Ended(), on="no_underscores"),
    h2_case("underscore_dropped", ask("GET", "/", "x_y: 1", "x-z: 2"), on="dropped_underscores"),
    h2_case("underscore_allowed", ask("GET", "/", "x_y: 1", "x-z: 2", authority="h2a.test")),
    h2_case("response_head_over_its_limit", ask(authority="h2_heads.test"), up=[Ended(), *reply(200, *fields(2, 600))]),
    h2_case("response_fields_over_their_number", ask(authority="h2_headers.test"), up=[Ended(), *reply(200, *fields(11))]),
    h2_case("response_fields_within_their_number", ask(authority="h2_headers.test"), up=[Ended(), *reply(200, *fields(8))]),
    h2_case("response_underscore", ask(authority="h2_under.test"), up=[Ended(), *reply(200, "x_y: 1")]),
    h2_case("no_table", ask("GET", "/", "x-a: 1"), ask("GET", "/", "x-a: 1"), hello=Hello(show=("settings",)), on="no_table"),
    h2_case("client_without_table", Heard("settings_ack"), ask(), ask(), hello=Hello(settings={h2.TABLE_SIZE: 0})),
    h2_case("upstream_without_table", ask(authority="h2a.test"), ask(authority="h2a.test"), up=Play(settings={h2.TABLE_SIZE: 0})),
    # ---- streams
    h2_case("too_many_streams", Open(head("POST", authority="h2a.test"), end=False), Wait("begun"), Open(head()), Ended(3), Data(b"x", end=True, stream=1),
            Ended(1),
            on="one_stream", up={"h2a": ANSWER}),
    h2_case("streams_one_after_the_other", ask(), ask(), ask(), on="one_stream"),
    h2_case("upstream_allows_one_stream", Open(head(authority="h2a.test")), Wait("first"), Open(head("GET", "/2", authority="h2a.test")),
            Ended(1, 3), up=Play([[Ended(), Heard("settings_ack"), Signal("first"), Wait("second"), *reply()], [Ended(), Signal("second"), *reply()]],
            settings={h2.MAX_STREAMS: 1}), skip=("log",),
            note="the second waits, or has a connection of its own"),
    h2_case("cluster_allows_one_stream", Open(head(authority="h2_one.test")), Wait("first"), Open(head("GET", "/2", authority="h2_one.test")), Ended(3),
            Signal("second"),
            Ended(1), up=Play([[Ended(), Signal("first"), Wait("second"), *reply()], [Ended(), *reply()]])),
    h2_case("upstream_allows_no_other_stream", Open(head(authority="h2a.test")), Ended(), up=Play([[Ended(), Settings({h2.MAX_STREAMS: 0}), *reply()]])),
    h2_case("more_requests_than_the_cluster_allows", ask(authority="h2_two.test"), Open(head(authority="h2_two.test")), Open(head(authority="h2_two.test")),
            Counted("upstream_rq_total", 3), Open(head(authority="h2_two.test")), Ended(7), Signal("go"), Ended(3, 5),
            up=Play([[Ended(), *reply()], [Ended(), Wait("go"), *reply()]])),
    h2_case("upstream_refuses_a_stream", ask(authority="h2a.test"), up=[Ended(), Rst(h2.REFUSED_STREAM)]),
    # ---- windows
    h2_case("client_with_a_window_of_one_byte", Open(head()), Got(1), Update(1, None), Got(2), Ended(), hello=Hello(settings={h2.WINDOW: 1},
            manual=("window",)), then="leave"),
    h2_case("client_without_a_window", Open(head()), Heard("headers"), Sync(), Update(100, None), Ended(), hello=Hello(settings={h2.WINDOW: 0},
            manual=("window",)), then="leave"),
    h2_case("client_opens_its_windows_by_settings", Open(head()), Heard("headers"), Sync(), Settings({h2.WINDOW: 10}), Ended(),
            hello=Hello(settings={h2.WINDOW: 0}, manual=("window",)), then="leave"),
    h2_case("client_shrinks_its_windows", Open(head("GET", "/", authority="h2a.test")), Got(b"aaaa"), Settings({h2.WINDOW: 2}), Heard("settings_ack", 2),
            Signal("more"), Sync(),
            Update(3, None), Got(5), Sync(), Update(100, None), Ended(), hello=Hello(settings={h2.WINDOW: 4}, manual=("window",)), then="leave",
            up=[Ended(), Headers(lines(":status: 200")), Data(b"aaaa"), Wait("more"), Data(b"bbbb", end=True)]),
    h2_case("slow_client_long_response", ask(authority="h2_window.test"), hello=Hello(settings={h2.WINDOW: 30_000}),
            up={"h2_window": [Ended(), *reply(body=LONG)]}),
    h2_case("slow_upstream_long_request", ask("POST", body=LONG, authority="h2a.test"), up=Play([[Ended(), *reply()]], settings={h2.WINDOW: 30_000}),
            on="small_windows"),
    h2_case("upstream_without_a_window", Open(head("POST", authority="h2a.test"), end=False), Data(b"hello", end=True), Wait("headers"), Signal("open"),
            Ended(),
            up=Play([[Signal("headers"), Wait("open"), Update(100, None), Ended(), *reply()]], settings={h2.WINDOW: 0}, manual=("window",))),
    h2_case("small_windows_are_given_back", ask("POST", body=LONG, authority="h2_window.test"), on="small_windows"),
    h2_case("small_windows_are_given_back_for_answers", ask(authority="h2_window.test"), up=[Ended(), *reply(body=LONG)], on="small_windows"),
    Case("frames_not_taken", not_taken, up=[Request(), answer("200 OK", bytes(6 << 20))]),
    Case("bounded_by_windows", pushed_back, up=Play([[Wait("never")]], settings={h2.WINDOW: 0}, manual=("window",)), skip=("log", "stats", "upstream",
            "trouble")),
    h2_case("large_frames_upstream", ask("POST", body=bytes(60_000), authority="h2a.test"), up=Play(settings={h2.FRAME_SIZE: 1 << 20})),
    # ---- time
    h2_case("route_timeout", Open(head(authority="slow.test")), Ended(), up=[Ended(), Heard("rst_stream")]),
    h2_case("route_timeout_after_the_head", Open(head(authority="slow.test")), Ended(), up=[Ended(), Headers(lines(":status: 200")), Heard("rst_stream")]),
    h2_case("route_idle_timeout", Open(head("POST", authority="idle.test"), end=False), Ended(), up=[Heard("rst_stream")]),
    h2_case("route_idle_timeout_after_the_head", Open(head("POST", authority="idle.test"), end=False), Ended(),
            up=[Headers(lines(":status: 200")), Heard("rst_stream")]),
    h2_case("route_max_stream_duration", Open(head(authority="lasting.test")), Ended(), up=[Ended(), Heard("rst_stream")]),
    h2_case("stream_idle_timeout", Open(head("POST", authority="h2a.test"), end=False), Ended(), on="idle_stream", up=[Heard("rst_stream")]),
    h2_case("max_stream_duration", Open(head("POST", authority="h2a.test"), end=False), Ended(), on="lasting_stream", up=[Heard("rst_stream")]),
    h2_case("request_timeout", Open(head("POST", authority="h2a.test"), end=False), Ended(), on="slow_request", up=[Heard("rst_stream")]),
    h2_case("request_headers_timeout", Frame(h2.HEADERS, 1, 1, b"\x82"), Ended(1), on="slow_headers", hello=Hello(manual=("settings",))),
    h2_case("idle_connection", ask(), on="idle_connection", then="closed"),
    h2_case("idle_connection_without_requests", Heard("settings"), on="idle_connection", then="closed"),
    h2_case("max_connection_duration", ask(), on="lasting_connection", then="closed"),
    h2_case("max_connection_duration_with_a_request", ask(), Open(head("POST", authority="h2a.test"), end=False), Heard("goaway", 2), Data(b"x", end=True),
            Ended(),
            on="lasting_connection", then="closed"),
    h2_case("max_requests", ask(), ask(), on="few_requests", then="closed"),
    h2_case("keepalive_answered", Heard("ping", 2), ask(), on="keepalive", hello=Hello()),
    h2_case("keepalive_not_answered", Heard("ping"), on="keepalive", hello=Hello(manual=("ping",)), then="closed"),
    h2_case("keepalive_not_answered_with_a_request", Open(head("POST", authority="h2a.test"), end=False), Wait("begun"), Heard("ping"), Eof(), on="keepalive",
            hello=Hello(manual=("ping",)), then="closed", up=[Signal("begun"), Ended()]),
    h2_case("keepalive_upstream_not_answered", ask(authority="h2_ping.test"), up=Play([[Heard("ping"), Ended()]], manual=("ping",))),
    h2_case("keepalive_upstream_answered", ask(authority="h2_ping.test"), up=[Heard("ping", 2), Ended(), *reply()]),
    h2_case("upstream_idle", ask(authority="h2_idle.test"), Counted("upstream_cx_idle_timeout"), ask(authority="h2_idle.test"),
            Counted("upstream_cx_idle_timeout", 2)),
    h2_case("upstream_max_requests", *[ask(authority="h2_max_requests.test") for _ in range(3)]),
    h2_case("upstream_max_connection_duration", ask(authority="h2_duration.test"), Counted("upstream_cx_max_duration_reached"),
            ask(authority="h2_duration.test"), Counted("upstream_cx_max_duration_reached", 2)),
    # ---- upstreams that go away
    h2_case("upstream_goes_away_then_next", ask(authority="h2a.test"), Counted("upstream_cx_close_notify"), ask(authority="h2a.test"), up=Play([[Ended(),
            *reply(), GoAway(1)], [Ended(),
            *reply()]])),
    h2_case("upstream_goes_away_amid_two", Open(head("GET", "/1", authority="h2a.test")), Wait("first"), Open(head("GET", "/2", authority="h2a.test")),
            Ended(1, 3),
            up=Play([[Ended(), Signal("first"), Wait("second"), *reply(body=b"one")], [Ended(), GoAway(1), Signal("second")]]),
            note="the second was not processed: 503, and a retry if there is a policy"),
    h2_case("upstream_goes_away_in_two_steps", Open(head("GET", "/1", authority="h2a.test")), Ended(1), ask("GET", "/2", authority="h2a.test"),
            up=Play([[Ended(), GoAway((1 << 31) - 1), GoAway(1), *reply()], [Ended(), *reply()]])),
    Case("upstream_goes_away_to_h1", [get(host="h2a.test"), *Case("", get()).script()[1:], Counted("upstream_cx_close_notify"), get(host="h2a.test"),
            *Case("", get()).script()[1:]],
         Play([[Ended(), *reply(), GoAway(1)], [Ended(), *reply()]])),
    # ---- floods
    h2_case("some_pings", Frame(h2.PING, 0, 0, bytes(8), times=5), Heard("ping_ack", 5), ask()),
    h2_case("empty_data_frames", OPEN, Frame(h2.DATA, 0, 1, times=4), Ended(), on="strict", up=[Signal("begun"), Ended()]),
    h2_case("empty_data_frames_within_the_limit", OPEN, Frame(h2.DATA, 0, 1, times=3), Data(b"x", end=True), Ended(), on="strict", up=ANSWER),
    h2_case("empty_data_frames_by_default", OPEN, Frame(h2.DATA, 0, 1, times=2), Ended(), up=[Signal("begun"), Ended()]),
    h2_case("empty_continuations", Frame(h2.HEADERS, 1, 1, b"\x82\x86\x84"), Frame(h2.CONTINUATION, 0, 1, times=10), Ended(1), on="strict", then="closed"),
    h2_case("padding_only_data_frames", OPEN, Frame(h2.DATA, h2.PADDED, 1, b"\x05" + bytes(5), times=10), Data(b"x", end=True), Ended(), on="strict",
            up=ANSWER),
    h2_case("priority_flood", Frame(h2.PRIORITY, 0, 1, bytes(5), times=20), Sync(), on="strict"),
    h2_case("priorities_within_the_limit", Frame(h2.PRIORITY, 0, 1, bytes(5), times=5), ask(), on="strict"),
    h2_case("window_update_flood", Frame(h2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1), times=30), Sync(), on="strict"),
    h2_case("window_updates_within_the_limit", Frame(h2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1), times=4), ask(), on="strict"),
    h2_case("continuations_over_the_limit_of_heads", Frame(h2.HEADERS, 1, 1, b"\x82\x86\x84"),
            *[Frame(h2.CONTINUATION, 0, 1, b"\x00\x03x-a\x7f\xa9\x06" + b"v" * 936)] * 80, Frame(h2.CONTINUATION, 4, 1, b"\x00\x01y\x01z"), Ended(1),
            strictly="ENHANCE_YOUR_CALM", note="what is kept of a block is bounded while it comes"),
    h2_case("resets_of_requests", *[step for _ in range(30) for step in (Open(head("POST", authority="flood.test"), end=False), Rst())], Sync(), ask(),
            skip_stats=("cluster.",),
            skip=("upstream",), note="which of them reach the upstream is a matter of luck"),
    h2_case("upstream_floods_with_empty_frames", ask(authority="h2a.test"), up=[Ended(), Headers(lines(":status: 200")), Frame(h2.DATA, 0, 1, times=5), Eof()]),
    h2_case("upstream_floods_with_priorities", ask(authority="h2a.test"), up=[Ended(), Frame(h2.PRIORITY, 0, 1, bytes(5), times=500), *reply()]),
    h2_case("upstream_resets_each_stream", *[ask(authority="h2a.test")] * 5, up=[Ended(), Rst(h2.INTERNAL_ERROR)]),
]  # fmt: skip

test_case = check_cases(CASES)
