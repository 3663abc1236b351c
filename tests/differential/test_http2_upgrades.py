"""WebSocket and other upgrades over HTTP/2 (extended CONNECT, RFC 8441), and CONNECT: in all bridges, how tunnels begin and how they end."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha1
from typing import TYPE_CHECKING, Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    Body,
    Case,
    Close,
    Data,
    Echo,
    EchoData,
    Ended,
    Eof,
    Got,
    Head,
    Headers,
    Heard,
    Hello,
    Open,
    Play,
    Reset,
    Response,
    Rst,
    Script,
    Signal,
    Until,
    Wait,
    answer,
    ask,
    bootstrap,
    check_cases,
    cluster,
    filter_,
    get,
    h2_case,
    h2_cluster,
    head,
    http,
    lines,
    reply,
)

if TYPE_CHECKING:
    from tests.differential.wire import Signals, Wire


def vhost(name: str, to: str, *, match: dict | None = None, **route: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test", f"{name}.test:*"], "routes": [{"match": match or {"prefix": "/"}, "route": {"cluster": to, **route}}]}


WS = {"upgrade_configs": [{"upgrade_type": "websocket"}]}
CONNECT = {"connect_matcher": {}}
HOSTS = [
    vhost("plain", "a"),
    vhost("h1", "a", **WS),
    vhost("h2", "h2a", **WS),
    vhost("off", "h2a", upgrade_configs=[{"upgrade_type": "websocket", "enabled": False}]),
    vhost("unable", "h2plain", **WS),
    vhost("short", "h2a", timeout="0.3s", **WS),
    vhost("idle", "h2a", idle_timeout="0.3s", **WS),
    vhost("rewritten", "h2a", prefix_rewrite="/ws/", **WS),
    vhost("other", "h2a", upgrade_configs=[{"upgrade_type": "foo"}]),
    vhost("connect-h1", "a", match=CONNECT, upgrade_configs=[{"upgrade_type": "CONNECT"}]),
    vhost("connect-h2", "h2a", match=CONNECT, upgrade_configs=[{"upgrade_type": "CONNECT"}]),
    vhost("terminate", "a", match=CONNECT, upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {}}]),
    vhost("terminate-dead", "dead", match=CONNECT, upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {}}]),
    vhost("denied", "h2a", match=CONNECT),
    vhost("post", "a", upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {"allow_post": True}}]),
]
ALLOWED = {"allow_connect": True}
SEEN, SEEN_UPGRADE = (
    filter_(
        "header_mutation", mutations={name: [{"append": {"header": {"key": "x-seen", "value": value}}}] for name in ("request_mutations", "response_mutations")}
    )
    for value in ("usual", "upgrade")
)
CONFIG = bootstrap(
    http("main", HOSTS, http2_protocol_options=ALLOWED),
    http("managed", HOSTS, http2_protocol_options=ALLOWED, upgrade_configs=[{"upgrade_type": "websocket"}]),
    http(
        "own",
        HOSTS,
        http2_protocol_options=ALLOWED,
        filters=[SEEN],
        upgrade_configs=[
            {
                "upgrade_type": "websocket",
                "filters": [filter_("fault", delay={"fixed_delay": "0.05s", "percentage": {"numerator": 100}}), SEEN_UPGRADE, filter_("router")],
            },
            {"upgrade_type": "CONNECT", "filters": [SEEN_UPGRADE, filter_("router")]},
        ],
    ),
    http("not_announced", HOSTS, upgrade_configs=[{"upgrade_type": "websocket"}]),
    clusters=[cluster("a"), cluster("dead"), h2_cluster("h2a", options=ALLOWED), h2_cluster("h2plain", "h2a")],
)

WEBSOCKET = ("sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
ACCEPT_H1: Script = [Head(), SWITCH, Echo()]
ACCEPT = Headers(lines(":status: 200", "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="))
ACCEPT_H2: Script = [ACCEPT, EchoData()]
END = b"\r\n\r\n"


def able(*script: Any, **fields: Any) -> Play:
    """An upstream that allows extended CONNECT."""
    return Play([list(script)], settings={h2.CONNECT_PROTOCOL: 1}, **fields)


def extended(host: str, *headers: str, protocol: str = "websocket", path: str = "/chat", end: bool = False) -> Open:
    """Extended CONNECT."""
    fields = [(":method", "CONNECT"), (":protocol", protocol), (":scheme", "http"), (":path", path), (":authority", f"{host}.test")]
    return Open([*fields, *lines(*WEBSOCKET, *headers)], end=end)


def upgrade(host: str, *headers: str, upgrade: str = "websocket", path: str = "/chat") -> bytes:
    """The same in HTTP/1."""
    handshake = ["Connection: Upgrade", f"Upgrade: {upgrade}", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    return get(path, *handshake, *headers, host=f"{host}.test")


def h2_tunnel(name: str, host: str, up: Any, *, first: Open | None = None, end: Script | None = None, **fields: Any) -> Case:
    """Something back and forth, and the client ends: by END_STREAM, or as `end` says. Envoy has no half-close towards HTTP/1."""
    echoed: Script = [Heard("headers"), Data(b"hello"), Got(b"hello"), Data(b"again"), Got(b"again")]
    return h2_case(name, first or extended(host), echoed, end or [Data(end=True), Ended()], up=up, **fields)


def h1_tunnel(name: str, host: str, up: Any, *, request: bytes | None = None, **fields: Any) -> Case:
    return Case(name, [request or upgrade(host), Until(END), b"hello", Until(b"hello"), b"again", Until(b"again"), Close()], up, **fields)


class Handshake:
    """Upstream: a WebSocket server by the book (RFC 6455 4.2)."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        await Head().run(wire, signals)
        key = re.search(rb"\r\nsec-websocket-key: ([A-Za-z0-9+/=]{24})\r\n", wire.received)
        if key is None:
            wire.send(answer("400 No key", b"no"))
            return
        accept = b64encode(sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest())
        wire.send(b"HTTP/1.1 101 Go\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: " + accept + b"\r\n\r\nhi")


def keyless(host: str) -> Open:
    """Extended CONNECT as browsers send it: in HTTP/2 there is no key (RFC 8441 5)."""
    whole = extended(host)
    return Open([(name, value) for name, value in whole.fields if name != "sec-websocket-key"], end=False)


def connect(host: str, *headers: str) -> Open:
    return Open([(":method", "CONNECT"), (":authority", f"{host}.test:443"), *lines(*headers)], end=False)


def post() -> Open:
    return Open(head("POST", "/", authority="post.test"), end=False)


def h1_connect(host: str) -> bytes:
    return f"CONNECT {host}.test:443 HTTP/1.1\r\nHost: {host}.test:443\r\n\r\n".encode()


CASES = [
    # ---- how they begin
    h2_tunnel("h2_to_h1", "h1", ACCEPT_H1, end=[Rst()]),
    h2_tunnel("h2_to_h2", "h2", able(*ACCEPT_H2)),
    h1_tunnel("h1_to_h2", "h2", able(*ACCEPT_H2)),
    h2_tunnel("h2_to_h1_by_manager", "plain", ACCEPT_H1, end=[Rst()], on="managed"),
    h2_tunnel("h2_to_h2_path_rewritten", "rewritten", able(*ACCEPT_H2)),
    h2_tunnel("h2_to_h2_other_protocol", "other", able(*ACCEPT_H2), first=extended("other", protocol="foo")),
    h2_tunnel("h2_to_h2_other_headers", "h2", able(*ACCEPT_H2), first=extended("h2", "sec-websocket-protocol: chat", "cookie: a=1", "cookie: b=2")),
    h1_tunnel("h1_to_h2_upper_case", "h2", able(*ACCEPT_H2), request=upgrade("h2", upgrade="WebSocket")),
    # By decision: Envoy translates the request and not the handshake, so that no server that speaks HTTP/1, and no client, takes it for one.
    h2_case("handshake_of_h2_to_h1", keyless("h1"), Heard("data"), Rst(), up=[Handshake(), Eof()], strictly="hi", note="the server has its key"),
    h2_case("handshake_of_h2_to_h1_answered_wrongly", keyless("h1"), Heard("headers"), Rst(), up=[Head(), SWITCH, Eof()], strictly="502"),
    h2_case("handshake_of_h2_to_h1_refused", keyless("h1"), Ended(), up=[Head(), answer("403 No", b"no")], skip=("upstream",)),
    h2_tunnel("handshake_of_h2_to_h2", "h2", able(*ACCEPT_H2), first=keyless("h2")),
    Case("handshake_of_h1_to_h2", [upgrade("h2"), Until(END), Close()], able(Headers(lines(":status: 200")), EchoData()),
         strictly="sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
    h2_case("settings_announce_it", ask(authority="plain.test"), hello=Hello(show=("settings",))),
    h2_case("settings_of_the_client_role_announce_it", ask(authority="h2.test"), up=Play(show=("settings",))),
    h2_case("not_announced", extended("plain"), Ended(), on="not_announced"),
    h2_case("not_enabled", extended("plain"), Ended()),
    h2_case("not_enabled_for_this_type", extended("h2", protocol="foo"), Ended()),
    h2_case("disabled_by_route", extended("off"), Ended(), on="managed"),
    Case("h1_not_enabled", [upgrade("other"), Response()]),
    h2_case("upstream_cannot", extended("unable"), Ended(), up=reply(501)),
    h2_case("upstream_has_not_allowed_it", extended("h2"), Ended(), up=Play([[Headers(lines(":status: 200")), Data(b"hi", end=True), Ended()]])),
    Case("upstream_has_not_allowed_it_h1", [upgrade("h2"), Until(b"hello"), Close()], Play([[ACCEPT, Data(b"hello"), Ended()]])),
    h2_case("end_stream_at_once", extended("h2", end=True), Ended(), up=able(*ACCEPT_H2)),
    h2_case("upstream_h1_refuses", extended("h1"), Ended(), up=[Head(), answer("403 No", b"no")]),
    h2_case("upstream_h1_answers_200", extended("h1"), Ended(), up=[Head(), answer()]),
    h2_case("upstream_h2_refuses", extended("h2"), Ended(), up=able(*reply(403, body=b"no"))),
    h2_case("upstream_h2_answers_201", extended("h2"), Ended(), up=able(*reply(201, body=b"made"))),
    Case("upstream_h2_refuses_h1", [upgrade("h2"), Response()], able(*reply(403, "content-length: 2", body=b"no"))),
    h2_case("upstream_h1_closes_instead", extended("h1"), Ended(), up=[Head(), Close()]),
    h2_case("upstream_h2_resets_instead", extended("h2"), Ended(), up=able(Rst(h2.REFUSED_STREAM))),
    h2_case("timeout_before_the_answer", extended("short"), Ended(), up=able(Heard("rst_stream"))),
    h2_case("data_before_the_answer", extended("h2"), Data(b"early"), Heard("headers"), Got(b"early"), Data(end=True), Ended(), up=able(*ACCEPT_H2)),
    h2_case("data_with_the_answer", extended("h1"), Got(b"first"), Data(b"x"), Got(b"x"), Rst(), up=[Head(), SWITCH + b"first", Echo()]),
    # ---- how they end
    h2_case("no_timeout_of_the_route", extended("short"), Heard("headers"), Wait("late"), Data(b"hello"), Got(b"hello"), Data(end=True), Ended(),
            up=able(Headers(lines(":status: 200")), Signal("late"), EchoData())),
    h2_case("idle", extended("idle"), Heard("headers"), Ended(), up=able(Headers(lines(":status: 200")), Heard("rst_stream"))),
    Case("idle_h1", [upgrade("idle"), Until(END)], able(ACCEPT, Heard("rst_stream")), then="closed"),
    h2_case("client_resets", extended("h2"), Heard("headers"), Rst(), up=able(Headers(lines(":status: 200")), Heard("rst_stream"))),
    h2_case("client_resets_to_h1", extended("h1"), Heard("headers"), Rst(), up=[Head(), SWITCH, Eof()]),
    Case("client_closes_to_h2", [upgrade("h2"), Until(END), Close()], able(ACCEPT, Heard("rst_stream"))),
    Case("client_resets_connection_to_h2", [upgrade("h2"), Until(END), Reset()], able(ACCEPT, Heard("rst_stream"))),
    h2_case("upstream_h1_ends", extended("h1"), Heard("headers"), Data(b"bye"), Got(b"last"), Ended(), up=[Head(), SWITCH, Until(b"bye"), b"last", Close()]),
    h2_case("upstream_h2_ends", extended("h2"), Heard("headers"), Data(b"bye"), Got(b"last"), Ended(),
            up=able(Headers(lines(":status: 200")), Got(b"bye"), Data(b"last", end=True))),
    Case("upstream_h2_ends_h1", [upgrade("h2"), Until(END), b"bye", Until(b"last")], able(ACCEPT, Got(b"bye"), Data(b"last", end=True)),
         then="closed"),
    h2_case("upstream_h2_resets", extended("h2"), Heard("headers"), Data(b"bye"), Ended(), up=able(Headers(lines(":status: 200")), Got(b"bye"),
            Rst(h2.CANCEL))),
    Case("upstream_h2_resets_h1", [upgrade("h2"), Until(END), b"bye"], able(ACCEPT, Got(b"bye"), Rst(h2.CANCEL)), then="closed"),
    h2_case("upstream_h1_resets", extended("h1"), Heard("headers"), Data(b"bye"), Ended(), up=[Head(), SWITCH, Until(b"bye"), Reset()]),
    h2_case("long_tunnel", extended("h2"), Heard("headers"), Body(bytes(300_000), end=False), Got(300_000), Data(end=True), Ended(), up=able(*ACCEPT_H2)),
    h2_case("tunnels_beside_requests", extended("h2"), Heard("headers"), Data(b"one"), Got(b"one"), ask(authority="h2.test"), Data(b"two", stream=1),
            Got(b"two", 1),
            Data(end=True, stream=1), Ended(1), up=Play([ACCEPT_H2, [Ended(), *reply()]], settings={h2.CONNECT_PROTOCOL: 1})),
    # ---- filters of their own
    h2_tunnel("own_filters_h2_to_h1", "plain", ACCEPT_H1, end=[Rst()], on="own"),
    h2_tunnel("own_filters_h2_to_h2", "h2", able(*ACCEPT_H2), on="own"),
    h1_tunnel("own_filters_h1_to_h2", "h2", able(*ACCEPT_H2), on="own"),
    h2_case("own_filters_disabled_by_route", extended("off"), Ended(), on="own"),
    h2_case("own_filters_not_for_others", ask(authority="h2.test"), up=Play([[Ended(), *reply()]]), on="own"),
    h2_case("own_filters_without_route", extended("nowhere"), Ended(), on="own"),
    h2_case("own_filters_upstream_refuses", extended("h2"), Ended(), up=able(*reply(403, body=b"no")), on="own"),
    h2_case("own_filters_end_stream_at_once", extended("h2", end=True), Ended(), up=able(*ACCEPT_H2), on="own"),
    h2_tunnel("own_filters_connect", "", Play([ACCEPT_H2]), first=connect("connect-h2"), on="own"),
    # ---- CONNECT
    h2_tunnel("connect_h2_to_h2", "", Play([ACCEPT_H2]), first=connect("connect-h2")),
    h2_tunnel("connect_h2_to_h1", "", [Head(), b"HTTP/1.1 200 OK\r\n\r\n", Echo()], first=connect("connect-h1")),
    h1_tunnel("connect_h1_to_h2", "", Play([ACCEPT_H2]), request=h1_connect("connect-h2")),
    h2_tunnel("connect_terminated", "", [Echo()], first=connect("terminate")),
    h2_case("connect_terminated_dead", connect("terminate-dead"), Ended()),
    h2_case("connect_terminated_upstream_speaks_first", connect("terminate"), Heard("headers"), Data(b"x"), Got(b"banner"), Data(end=True), Ended(),
            up=[Until(b"x"), b"banner", Eof(), Close()]),
    h2_case("connect_terminated_upstream_closes", connect("terminate"), Heard("headers"), Data(b"bye"), Got(b"last"), Ended(), up=[Until(b"bye"), b"last",
            Close()]),
    h2_case("connect_terminated_client_resets", connect("terminate"), Heard("headers"), Data(b"x"), Wait("got"), Rst(), up=[Until(b"x"), Signal("got"), Eof()]),
    h2_case("connect_h2_to_h1_upstream_closes", connect("connect-h1"), Heard("headers"), Data(b"bye"), Got(b"last"), Ended(),
            up=[Head(), b"HTTP/1.1 200 OK\r\n\r\n", Until(b"bye"), b"last", Close()]),
    h2_case("post_terminated", post(), Heard("headers"), Data(b"hello"), Got(b"hello"), Data(end=True), Ended(), up=[Echo(), Close()]),
    h2_case("post_terminated_upstream_speaks_first", post(), Got(b"banner"), Data(b"x", end=True), Ended(),
            up={"a": Play([[b"banner", Until(b"x"), Eof(), Close()]], on_connect=True)}),
    *[h2_case(f"post_terminated_again_{number}", ask("POST", "/", authority="post.test", body=b"hello"), up=[Until(b"hello"), b"hi", Eof(), Close()])
      for number in range(3)],
    h2_case("post_terminated_client_resets", post(), Heard("headers"), Data(b"x"), Wait("got"), Rst(), up=[Until(b"x"), Signal("got"), Eof()]),
    h2_case("connect_denied", connect("denied"), Ended()),
    h2_case("connect_refused_by_upstream", connect("connect-h2"), Ended(), up=reply(403)),
    h2_case("connect_without_route", connect("plain"), Ended()),
    h2_case("connect_with_content_length", Open([(":method", "CONNECT"), (":authority", "connect-h2.test:443"), ("content-length", "5")], end=False),
            Data(b"hello"), Ended(),
            up=Play([[Headers(lines(":status: 200")), Got(b"hello"), Data(end=True)]])),
]  # fmt: skip

test_case = check_cases(CASES)
