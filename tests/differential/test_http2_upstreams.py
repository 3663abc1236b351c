"""Upstream connections that speak HTTP/2: how many there are, how they end, what of a request is tried again, and tunnels through them."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    OK,
    Body,
    Case,
    Close,
    Counted,
    Data,
    EchoData,
    Ended,
    GoAway,
    Got,
    Headers,
    Heard,
    Idle,
    Play,
    Request,
    Response,
    Rig,
    Rst,
    Script,
    Settings,
    Signal,
    Until,
    Wait,
    bootstrap,
    check_cases,
    cluster,
    each,
    get,
    h2_cluster,
    http,
    http2_options,
    lines,
    reply,
    req,
)


def vhost(name: str, **route: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test", f"{name}.test:*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name, **route}}]}


def breaker(**limits: int) -> dict[str, Any]:
    return {"thresholds": [limits]}


TLS = {"transport_socket": {"name": "tls", "typed_config": {"@": "upstream_tls"}}}
# When a draining connection closes after its last stream, while Envoy still reads from it, Envoy counts a protocol error.
DRAINED = {"skip_stats": ("upstream_cx_protocol_error",)}
# A connection whose protocol ALPN decides is counted twice by Envoy, and sessions are not resumed here.
EXPIRED_1, EXPIRED_2 = (Counted("upstream_cx_max_duration_reached", count) for count in (1, 2))
AUTO = {"skip_stats": ("ssl.session_reused",)}
CLUSTERS = [
    h2_cluster("h2a"),
    h2_cluster("one_stream", "h2a", options={"max_concurrent_streams": 1}),
    h2_cluster("two_uses", "h2a", common={"max_requests_per_connection": 2}),
    h2_cluster("idle", "h2a", common={"idle_timeout": "0.2s"}),
    h2_cluster("short_lived", "h2a", common={"max_connection_duration": "0.3s"}),
    h2_cluster("short_streams", "h2a", common={"max_stream_duration": "0.3s"}),
    h2_cluster("kept_alive", "h2a", options={"connection_keepalive": {"interval": "0.2s", "timeout": "0.4s", "interval_jitter": {"value": 0}}}),
    h2_cluster("tried_when_idle", "h2a", options={"connection_keepalive": {"timeout": "5s", "connection_idle_interval": "0.1s"}}),
    h2_cluster("soon_given_up", "h2a", options={"connection_keepalive": {"timeout": "0.2s", "connection_idle_interval": "0.1s"}}),
    h2_cluster("tried_both_ways", "h2a", options={
        "connection_keepalive": {"interval": "0.15s", "timeout": "5s", "connection_idle_interval": "0.1s", "interval_jitter": {"value": 0.9}}}),
    h2_cluster("one_request", "h2a", circuit_breakers=breaker(max_requests=1)),
    h2_cluster("one_connection", "h2a", circuit_breakers=breaker(max_connections=1), options={"max_concurrent_streams": 1}),
    h2_cluster("no_pending", "h2a", circuit_breakers=breaker(max_pending_requests=0)),
    h2_cluster("retried", "h2a"),
    h2_cluster("timed", "h2a"),
    h2_cluster("ahead", "h2a", options={"max_concurrent_streams": 1}, preconnect_policy={"per_upstream_preconnect_ratio": 2.0}),
    h2_cluster("set_up", "h2a", options={
        "hpack_table_size": 1000, "max_concurrent_streams": 7, "initial_stream_window_size": 70000, "initial_connection_window_size": 90000,
        "allow_connect": True, "custom_settings_parameters": [{"identifier": 16, "value": 3}, {"identifier": 6, "value": 5000}],
    }),
    h2_cluster("little", "h2a", options={"initial_stream_window_size": 65535, "initial_connection_window_size": 65535}),
    h2_cluster("few_headers", "h2a", common={"max_headers_count": 5}),
    cluster("old", "h2a", http2_protocol_options={"max_concurrent_streams": 9}),
    cluster("old_as_downstream", "a", http2_protocol_options={}, protocol_selection="USE_DOWNSTREAM_PROTOCOL"),
    cluster("ahead_h1", "a", preconnect_policy={"per_upstream_preconnect_ratio": 1.5}),
    cluster("short_lived_h1", "a", common_http_protocol_options={"max_connection_duration": "0.3s"}),
    h2_cluster("mirrored", "h2b"),
    cluster("auto_h2", "tls_h2", typed_extension_protocol_options=http2_options("auto_config"), **TLS),
    cluster("auto_h1", "tls_a", typed_extension_protocol_options=http2_options("auto_config"), **TLS),
    cluster("tls_only_h1", "tls_a", typed_extension_protocol_options=http2_options(), **TLS),
    cluster("auto_one", "tls_h2", typed_extension_protocol_options=http2_options("auto_config", max_concurrent_streams=1), **TLS),
]  # fmt: skip
ROUTES: dict[str, dict[str, Any]] = {
    "h2a": {"upgrade_configs": [{"upgrade_type": "websocket"}, {"upgrade_type": "foo/1"}]},
    "retried": {"retry_policy": {"retry_on": "refused-stream", "num_retries": 1, "retry_back_off": {"base_interval": "0.001s"}}},
    "timed": {"timeout": "0.3s"},
    "mirrored": {"request_mirror_policies": [{"cluster": "h2a"}]},
}
HOSTS = [
    *(vhost(one["name"], **ROUTES.get(one["name"], {})) for one in CLUSTERS),
    {"name": "connect", "domains": ["connect.test:80"], "routes": [
        {"match": {"connect_matcher": {}}, "route": {"cluster": "h2a", "upgrade_configs": [{"upgrade_type": "CONNECT"}]}}]},
    {"name": "reset", "domains": ["reset.test"], "routes": [
        {"match": {"prefix": "/"}, "route": {"cluster": "h2a", "retry_policy": {"retry_on": "reset", "retry_back_off": {"base_interval": "0.001s"}}}}]},
    {"name": "per_try", "domains": ["per_try.test"], "routes": [
        {"match": {"prefix": "/"}, "route": {"cluster": "h2a", "timeout": "5s", "retry_policy": {
            "retry_on": "5xx", "per_try_timeout": "0.2s", "num_retries": 1, "retry_back_off": {"base_interval": "0.001s"}}}}]},
]  # fmt: skip
CONFIG = bootstrap(http("main", HOSTS), http("trailers", HOSTS, http_protocol_options={"enable_trailers": True}), clusters=CLUSTERS)


async def hosts_of_auto(rig: Rig) -> list[str]:
    """How many connections hosts count whose protocol ALPN decides."""
    for name in ("auto_h2", "auto_h1"):
        await rig.get(get(host=f"{name}.test"))
    _, text = await rig.proxy.admin("GET", "/clusters")
    return sorted(rig.normaliser.line(line) for line in text.splitlines() if line.startswith("auto_h") and "::cx_" in line)


def gets(host: str, *paths: str) -> list[Any]:
    """Requests one after the other, each with its answer."""
    return [part for path in paths for part in (get(path, host=f"{host}.test"), Response())]


def together(
    name: str,
    host: str,
    count: int,
    *,
    held: int = 0,
    first: Script | None = None,
    answer: Script | None = None,
    settings: Any = None,
    more: tuple[str, ...] = (),
    **fields: Any,
) -> Case:
    """`count` requests on as many connections, one after the other; `held` of them (by default all) get to the upstream, which answers when all were sent.

    The first of them is answered by `first`, if it is given: it has to signal "held0".
    """  # fmt: skip
    held = held or count

    async def run(rig: Rig) -> Any:
        tasks = []
        for number in range(count):
            wire = await rig.connect()
            tasks.append(asyncio.ensure_future(rig.exchange(wire, get(f"/{number}", host=f"{host}.test"))))
            await asyncio.sleep(0)
            await (rig.signals[f"held{number}"].wait() if number < held else rig.settled())
        rig.signals["go"].set()
        return sorted([await task for task in tasks])

    scripts = [[*([Request()] if answer else []), Signal(f"held{number}"), Wait("go"), *(answer or reply())] for number in range(held)]
    if first:
        scripts[0] = first
    up = Play([*scripts, answer or reply()], settings=settings)
    return Case(name, run, up, skip=("log", *more), note="which of them ends first differs", **fields)


def ws(host: str = "h2a", *more: str, upgrade: str = "websocket") -> bytes:
    return get("/chat", "Connection: Upgrade", f"Upgrade: {upgrade}", "Sec-WebSocket-Version: 13", *more, host=f"{host}.test")


ACCEPT = Headers(lines(":status: 200", "sec-websocket-accept: x"))
CAN_CONNECT = {h2.CONNECT_PROTOCOL: 1}

CASES = [
    # ---- what is said at the beginning
    Case("settings", get(host="h2a.test"), Play(show=("settings", "window_update", "settings_ack"))),
    Case("settings_of_options", get(host="set_up.test"), Play(show=("settings", "window_update"))),
    Case("settings_of_deprecated_options", get(host="old.test"), Play(show=("settings", "window_update"))),
    Case("deprecated_protocol_selection", get(host="old_as_downstream.test")),
    # ---- how many connections
    Case("one_after_the_other", gets("h2a", "/1", "/2", "/3")),
    together("side_by_side", "h2a", 4),
    together("one_stream_a_connection", "one_stream", 3),
    together("one_stream_by_settings", "h2a", 3, settings={h2.MAX_STREAMS: 1}),
    together("more_streams_by_settings_later", "h2a", 3, settings={h2.MAX_STREAMS: 1},
             first=[Settings({h2.MAX_STREAMS: 5}), Heard("settings_ack", 2), Signal("held0"), Wait("go"), *reply()]),
    together("too_many_requests", "one_request", 2, held=1),
    together("one_connection_with_one_stream", "one_connection", 2, held=1),
    Case("nobody_may_wait", gets("no_pending", "/1", "/2"), then="open"),
    Case("max_requests", gets("two_uses", "/1", "/2", "/3"), **DRAINED),
    together("max_requests_at_once", "two_uses", 3, **DRAINED),
    Case("preconnect_h1", gets("ahead_h1", "/1", "/2"), skip=("upstream",)),
    Case("preconnect_h2", gets("ahead", "/1", "/2"), skip=("upstream",)),
    # ---- how they end
    Case("idle", [*gets("idle", "/1"), Counted("upstream_cx_idle_timeout", 1), *gets("idle", "/2"), Counted("upstream_cx_idle_timeout", 2)]),
    Case("max_duration", [*gets("short_lived", "/1"), EXPIRED_1, *gets("short_lived", "/2"), EXPIRED_2]),
    Case("max_duration_of_a_busy_one", [*gets("short_lived", "/1"), *gets("short_lived", "/2"), EXPIRED_2],
         each([EXPIRED_1, *reply()], reply()), **DRAINED),
    Case("max_duration_h1", [*gets("short_lived_h1", "/1"), EXPIRED_1, *gets("short_lived_h1", "/2"), EXPIRED_2]),
    Case("max_stream_duration", get(host="short_streams.test"), [Ended()], skip=()),
    Case("goaway_between_requests", [*gets("h2a", "/1"), Counted("upstream_cx_close_notify", 1), *gets("h2a", "/2")],
         each([*reply(), GoAway(1)], reply()), **DRAINED),
    Case("goaway_with_an_error_between_requests", [*gets("h2a", "/1"), Counted("upstream_cx_close_notify", 1), *gets("h2a", "/2")],
         each([*reply(), GoAway(1, h2.ENHANCE_YOUR_CALM)], reply()), **DRAINED),
    Case("goaway_in_two_steps", [*gets("h2a", "/1"), Counted("upstream_cx_close_notify", 1), *gets("h2a", "/2")],
         each([GoAway((1 << 31) - 1), Headers(lines(":status: 200")), Data(b"a"), GoAway(1), Data(b"b", end=True)], reply()),
         **DRAINED),
    Case("goaway_before_the_stream", gets("h2a", "/1"), each([GoAway(0)], reply())),
    Case("goaway_before_the_stream_retried", gets("retried", "/1"), each([GoAway(0)], reply())),
    Case("closed_between_requests", [*gets("h2a", "/1"), Counted("upstream_cx_destroy_remote", 1), *gets("h2a", "/2")],
         each([Heard("settings_ack"), *reply(), Close()], reply())),
    Case("pings_are_answered", [*gets("kept_alive", "/1"), Signal("asked")], [*reply(), Heard("ping", 2), Wait("asked")], then="leave", skip=("upstream",)),
    Case("pings_are_not_answered", [get(host="kept_alive.test"), Response()], Play([[Ended(), Wait("never")]], manual=("ping",)), skip=("upstream",)),
    Case("ping_of_an_idle_connection", [*gets("tried_when_idle", "/1"), Idle(0.15), *gets("tried_when_idle", "/2")],
         each(reply(), [Heard("ping"), *reply()]), skip=("upstream",), then="leave"),
    Case("ping_of_an_idle_connection_not_answered", [*gets("soon_given_up", "/1"), Idle(0.15), *gets("soon_given_up", "/2")],
         Play([reply(), [Heard("ping"), Ended(), Wait("never")]], manual=("ping",)), skip=("upstream",)),
    Case("ping_of_an_idle_connection_not_answered_but_the_request", [*gets("soon_given_up", "/1"), Idle(0.15), *gets("soon_given_up", "/2")],
         Play([reply(), [Heard("ping"), *reply()]], manual=("ping",)), skip=("upstream",)),
    Case("no_ping_of_a_busy_connection", [*gets("soon_given_up", "/1"), *gets("soon_given_up", "/2")], Play([reply(), reply()], manual=("ping",))),
    Case("unanswered_pings_while_data_comes", [get(host="kept_alive.test"), Response()],
         Play([[Headers(lines(":status: 200")), *(step for n in range(5) for step in (Data(b"x"), Idle(0.15))), Data(b"y", end=True)]], manual=("ping",)),
         skip=("upstream",), then="leave"),
    Case("pings_of_both_kinds", [*gets("tried_both_ways", "/1"), Idle(0.12), *gets("tried_both_ways", "/2")],
         each(reply(), [Heard("ping", 2), *reply()]), skip=("upstream",), then="leave"),
    # ---- what is tried again
    Case("refused", gets("h2a", "/1"), [Rst(h2.REFUSED_STREAM)]),
    Case("refused_retried", gets("retried", "/1"), each([Rst(h2.REFUSED_STREAM)], reply())),
    Case("refused_twice", gets("retried", "/1"), [Rst(h2.REFUSED_STREAM)]),
    Case("refused_with_a_body_retried", [req("POST", "/1", host="retried.test", body=b"hello"), Response()], each([Ended(), Rst(h2.REFUSED_STREAM)], reply())),
    Case("reset_retried", gets("reset", "/1"), each([Rst(h2.CANCEL)], reply())),
    Case("reset_not_refused", gets("retried", "/1"), [Rst(h2.CANCEL)]),
    *[Case(f"reset_{h2.error_name(code)}", gets("h2a", "/1"), [Rst(code)]) for code in (*range(14), 77) if code != h2.REFUSED_STREAM],
    Case("timeout", get(host="timed.test"), [Wait("never")]),
    Case("timeout_amid_the_response", [get(host="timed.test"), Until(b"part")], [Headers(lines(":status: 200")), Data(b"part"), Wait("never")], then="closed"),
    Case("per_try_timeout", get(host="per_try.test"), each([Wait("never")], reply())),
    # ---- bodies
    Case("body_beyond_the_window", [req("POST", "/", host="h2a.test", body=b"x" * 200_000), Response()], [Ended(), *reply()]),
    Case("body_in_little_windows", [req("POST", "/", host="h2a.test", body=b"x" * 1000), Response()], Play([[Ended(), *reply()]], settings={h2.WINDOW: 10})),
    Case("body_in_large_frames", [req("POST", "/", host="h2a.test", body=b"x" * 60_000), Response()],
         Play([[Ended(), *reply()]], settings={h2.FRAME_SIZE: 1 << 20})),
    Case("response_beyond_the_window", [get(host="little.test"), Response()], [Headers(lines(":status: 200", "content-length: 200000")), Body(b"y" * 200_000)]),
    Case("early_response", [req("POST", "/", "Content-Length: 5", host="h2a.test") + b"he", Response()], [Got(2), *reply()], then="closed"),
    Case("early_response_with_reset", [req("POST", "/", "Content-Length: 5", host="h2a.test") + b"he", Response()],
         [Got(2), *reply(), Rst(h2.NO_ERROR)], then="closed", skip_stats=("http2.rx_reset",), note="it comes after our own"),
    Case("client_leaves", [req("POST", "/", "Content-Length: 5", host="h2a.test") + b"he", Wait("got")], [Got(2), Signal("got"), Ended()], then="leave"),
    Case("too_many_headers", get(host="few_headers.test"), reply(200, *(f"x-{number}: 1" for number in range(6)))),
    Case("too_long_headers", get(host="h2a.test"), [Headers(lines(":status: 200", *(f"x-{number}: {'v' * 9000}" for number in range(7))), split=16000)],
         skip_stats=("http2.header_",)),
    Case("too_many_trailers", get(host="few_headers.test"), reply(trailers=tuple(f"x-{number}: 1" for number in range(7))), on="trailers", then="closed"),
    Case("mirrored", gets("mirrored", "/1"), skip_stats=("upstream_rq_time",)),
    # ---- what ALPN says
    Case("auto_h2", gets("auto_h2", "/1", "/2"), **AUTO),
    Case("auto_h1", gets("auto_h1", "/1", "/2"), **AUTO),
    Case("h2_over_tls_with_one_that_cannot", get(host="tls_only_h1.test"), skip=("upstream",), note="the same frames in other bytes"),
    Case("auto_hosts", hosts_of_auto, **AUTO),
    together("auto_h1_at_once", "auto_h1", 2, answer=[OK], **AUTO),
    together("auto_h2_one_stream", "auto_one", 2, **AUTO),
    # ---- tunnels
    Case("upgrade", [ws(), Until(b"\r\n\r\n"), b"ping", Until(b"ping")], Play([[ACCEPT, EchoData()]], settings=CAN_CONNECT), then="leave"),
    Case("upgrade_of_another_kind", [ws(upgrade="foo/1"), Until(b"\r\n\r\n"), b"ping", Until(b"ping")],
         Play([[ACCEPT, EchoData()]], settings=CAN_CONNECT), then="leave"),
    Case("upgrade_that_settings_do_not_allow", [ws(), Until(b"\r\n\r\n"), b"ping", Until(b"ping")], [ACCEPT, EchoData()], then="leave"),
    Case("upgrade_early_data", [ws() + b"early", Until(b"\r\n\r\n"), Until(b"early")], Play([[ACCEPT, EchoData()]], settings=CAN_CONNECT), then="leave"),
    Case("upgrade_with_content_length_0", [ws("h2a", "Content-Length: 0"), Until(b"\r\n\r\n")],
         Play([[ACCEPT, EchoData()]], settings=CAN_CONNECT), then="leave"),
    Case("upgrade_ends_upstream", [ws(), Until(b"bye")], Play([[ACCEPT, Data(b"bye", end=True)]], settings=CAN_CONNECT), then="closed"),
    Case("upgrade_ends_at_once", [ws()], Play([[Headers(lines(":status: 200"), end=True)]], settings=CAN_CONNECT), then="closed"),
    Case("upgrade_reset_upstream", [ws(), Until(b"bye")], Play([[ACCEPT, Data(b"bye"), Rst(h2.CANCEL)]], settings=CAN_CONNECT), then="closed"),
    Case("upgrade_ends_downstream", [ws(), Until(b"\r\n\r\n"), Close()], Play([[ACCEPT, Ended()]], settings=CAN_CONNECT), then="leave"),
    Case("upgrade_refused", [ws(), Response()], Play([reply(403)], settings=CAN_CONNECT), then="leave"),
    Case("upgrade_answered_201", [ws(), Response()], Play([reply(201)], settings=CAN_CONNECT), then="leave"),
    Case("connect", [b"CONNECT connect.test:80 HTTP/1.1\r\nHost: connect.test:80\r\n\r\n", Until(b"\r\n\r\n"), b"ping", Until(b"ping")],
         [Headers(lines(":status: 200")), EchoData()], then="leave"),
    Case("connect_refused", [b"CONNECT connect.test:80 HTTP/1.1\r\nHost: connect.test:80\r\n\r\n", Response("CONNECT")], reply(403), then="leave"),
    Case("connect_error", [b"CONNECT connect.test:80 HTTP/1.1\r\nHost: connect.test:80\r\n\r\n", Response()], [Rst(h2.CONNECT_ERROR)], then="leave"),
]  # fmt: skip

test_case = check_cases(CASES)
