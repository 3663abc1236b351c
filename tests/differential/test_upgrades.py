"""Upgrade and CONNECT: when a connection becomes a tunnel, what is forwarded, how it ends."""

from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Echo,
    Eof,
    HalfClose,
    Head,
    Reset,
    Response,
    Signal,
    Until,
    Wait,
    answer,
    bootstrap,
    check_cases,
    cluster,
    filter_,
    get,
    http,
    req,
)


def vhost(name: str, *, match: dict | None = None, **route: Any) -> dict:
    return {"name": name, "domains": [f"{name}.test", f"{name}.test:*"], "routes": [{"match": match or {"prefix": "/"}, "route": {"cluster": "a", **route}}]}


def marked(name: str, **fields: Any) -> dict:
    """A filter that says of requests and responses that it saw them."""
    mutation = [{"append": {"header": {"key": "x-seen", "value": name}, "append_action": "APPEND_IF_EXISTS_OR_ADD"}}]
    return {**filter_("header_mutation", mutations={"request_mutations": mutation, "response_mutations": mutation}), "name": name, **fields}


def own(kind: str, *filters: dict, **fields: Any) -> dict:
    """A type of upgrade with filters of its own."""
    return {"upgrade_type": kind, "filters": [*filters, filter_("router", dynamic_stats=False)], **fields}


CONNECT = {"connect_matcher": {}}
DENY = filter_("rbac", rules={"action": "DENY", "policies": {"all": {"permissions": [{"any": True}], "principals": [{"any": True}]}}})
SLOW = filter_("fault", delay={"fixed_delay": "0.05s", "percentage": {"numerator": 100}})
HEADERS_OFF = {"typed_per_filter_config": {"upgrade": {"@": "filter_config", "disabled": True}}}
HEADERS_ON = {"typed_per_filter_config": {"off": {"@": "filter_config", "config": {}}}}
HEADERS_MORE = {"typed_per_filter_config": {"upgrade": {"@": "header_mutation_per_route", "mutations": {"response_mutations": [
    {"append": {"header": {"key": "x-route", "value": "yes"}}}]}}}}  # fmt: skip
HOSTS = [
    vhost("plain"),
    vhost("on", upgrade_configs=[{"upgrade_type": "websocket"}]),
    vhost("off", upgrade_configs=[{"upgrade_type": "websocket", "enabled": False}]),
    vhost("other", upgrade_configs=[{"upgrade_type": "foo/1"}]),
    vhost("rewritten", upgrade_configs=[{"upgrade_type": "websocket"}], prefix_rewrite="/ws/"),
    vhost("short", upgrade_configs=[{"upgrade_type": "websocket"}], timeout="0.4s"),
    vhost("idle", upgrade_configs=[{"upgrade_type": "websocket"}], idle_timeout="0.4s"),
    vhost("retried", upgrade_configs=[{"upgrade_type": "websocket"}], retry_policy={"retry_on": "5xx"}),
    vhost("connect", match=CONNECT, upgrade_configs=[{"upgrade_type": "CONNECT"}]),
    vhost("terminate", match=CONNECT, upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {}}]),
    vhost("terminate-dead", match=CONNECT, upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {}}], cluster="dead"),
    vhost("connect-denied", match=CONNECT),
    vhost("post", upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {"allow_post": True}}]),
    vhost("post-dead", upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {"allow_post": True}}], cluster="dead"),
    vhost("post-not-allowed", upgrade_configs=[{"upgrade_type": "CONNECT", "connect_config": {}}]),
    {**vhost("own-off"), **HEADERS_OFF},
    {**vhost("own-on"), **HEADERS_ON},
    {**vhost("own-more"), **HEADERS_MORE},
    {"name": "direct", "domains": ["direct.test"], "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}]},
]
CONFIG = bootstrap(
    http("main", HOSTS),
    http("websocket", HOSTS, upgrade_configs=[{"upgrade_type": "websocket"}]),
    http("websocket_off", HOSTS, upgrade_configs=[{"upgrade_type": "websocket", "enabled": False}]),
    http("connect", HOSTS, upgrade_configs=[{"upgrade_type": "CONNECT"}]),
    http(
        "own",
        HOSTS,
        filters=[marked("usual"), DENY | {"name": "usual_rbac", "disabled": True}],
        upgrade_configs=[
            own("WebSocket", marked("upgrade"), marked("off", disabled=True)),
            own("foo/1", marked("foo"), SLOW, enabled=False),
            own("deny", marked("before"), DENY, marked("after")),
            own("CONNECT", SLOW, marked("connect")),
            {"upgrade_type": "usual"},
        ],
    ),
    clusters=[cluster("a"), cluster("dead")],
)


def ws(host: str, *lines: str, upgrade: str = "websocket", path: str = "/chat") -> bytes:
    handshake = ["Connection: Upgrade", f"Upgrade: {upgrade}", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    return get(path, *handshake, *lines, host=f"{host}.test")


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
ACCEPT = [Head(), SWITCH, Echo()]
END = b"\r\n\r\n"


def tunnel(name: str, host: str, *, on: str = "main", up: list | None = None, request: bytes | None = None, **fields: Any) -> Case:
    """Upgrade, an echo, and the client ends."""
    return Case(name, [request or ws(host), Until(END), b"hello", Until(b"hello"), b"again", Until(b"again"), Close()], up or ACCEPT, on=on, **fields)


def connect(host: str, *lines: str) -> bytes:
    return "\r\n".join([f"CONNECT {host}.test:443 HTTP/1.1", f"Host: {host}.test:443", *lines, "", ""]).encode()


def post(host: str) -> bytes:
    return req("POST", "/", "Transfer-Encoding: chunked", host=f"{host}.test")


CASES = [
    Case("not_enabled", ws("plain")),
    Case("not_enabled_for_this_type", ws("other")),
    tunnel("enabled_by_manager", "plain", on="websocket"),
    tunnel("enabled_by_route", "on"),
    Case("disabled_by_route", ws("off"), on="websocket"),
    Case("disabled_by_manager", ws("plain"), on="websocket_off"),
    tunnel("enabled_by_route_over_manager", "on", on="websocket_off"),
    tunnel("upper_case", "plain", on="websocket", request=ws("plain", upgrade="WebSocket")),
    tunnel("connection_list", "plain", on="websocket", request=get("/chat", "Connection: keep-alive, Upgrade", "Upgrade: websocket", host="plain.test")),
    tunnel("path_rewritten", "rewritten"),
    tunnel("other_type", "other", request=ws("other", upgrade="foo/1"), up=[Head(), SWITCH.replace(b"websocket\r\nsec", b"foo/1\r\nsec"), Echo()]),
    Case("upgrade_header_without_connection", get("/", "Upgrade: websocket", host="on.test"), [Head(), answer()]),
    Case("connection_upgrade_without_header", get("/", "Connection: upgrade", host="on.test"), [Head(), answer()]),
    Case("several_types", ws("on", upgrade="foo, websocket"), [Head(), answer()]),
    Case("upstream_refuses", ws("on"), [Head(), answer("403 No", b"no")]),
    Case("upstream_refuses_with_close", ws("on"), [Head(), answer("400 No", b"no", connection="close"), Close()], then="closed"),
    Case("upstream_answers_200", ws("on"), [Head(), answer()]),
    *[Case(f"upstream_answers_{status}", ws("on"), [Head(), answer(f"{status} X", b"")]) for status in (204, 301, 304, 404)],
    Case("upstream_closes_instead", ws("on"), [Head(), Close()]),
    Case("upstream_503_is_retried", ws("retried"), [Head(), answer("503 X", b"")]),
    Case("route_timeout_before_101", ws("short"), [Head(), Eof()]),
    Case("route_timeout_does_not_end_tunnel", [ws("short"), Until(END), Wait("late"), b"hello", Until(b"hello"), Close()],
         [Head(), SWITCH, Signal("late"), Until(b"hello"), b"hello", Eof()]),
    Case("idle_tunnel_ends", [ws("idle"), Until(END)], ACCEPT, then="closed"),
    Case("upstream_ends_tunnel", [ws("on"), Until(END), b"bye", Until(b"goodbye")], [Head(), SWITCH, Until(b"bye"), b"goodbye", Close()], then="closed"),
    Case("upstream_resets_tunnel", [ws("on"), Until(END), b"bye"], [Head(), SWITCH, Until(b"bye"), Reset()], then="closed"),
    Case("client_resets_tunnel", [ws("on"), Until(END), b"bye", Wait("got"), Reset()], [Head(), SWITCH, Until(b"bye"), Signal("got"), Eof()]),
    Case("upstream_half_close", [ws("on"), Until(END), b"bye", Until(b"last")], [Head(), SWITCH, Until(b"bye"), b"last", HalfClose(), Eof()], then="closed"),
    Case("data_with_101", [ws("on"), Until(b"first"), b"x", Until(b"x"), Close()], [Head(), SWITCH + b"first", Echo()]),
    Case("data_before_101", [ws("on") + b"early", Until(END), Until(b"early"), Close()], ACCEPT, skip=("stats", "log"),
         note="early bytes are held back until the upstream accepts (CVE-2026-73548)"),
    Case("post_upgrade_with_body", [req("POST", "/", "Connection: Upgrade", "Upgrade: websocket", host="on.test", body=b"hello"), Response("POST")],
         [Head(), answer("400 No", b"")]),
    Case("connect_to_a_name_with_underscore", [connect("a_b"), Response("CONNECT")], then="closed"),
    # ---- CONNECT
    Case("connect_refused", [connect("plain"), Response("CONNECT")], then="closed"),
    Case("connect_not_allowed_by_route", [connect("connect-denied"), Response("CONNECT")], then="closed"),
    tunnel("connect_forwarded", "connect", on="connect", request=connect("connect"), up=[Head(), b"HTTP/1.1 200 OK\r\n\r\n", Echo()]),
    tunnel("connect_enabled_by_route", "connect", request=connect("connect"), up=[Head(), b"HTTP/1.1 200 OK\r\n\r\n", Echo()]),
    Case("connect_upstream_closes", [connect("connect"), Until(END), b"bye", Until(b"last")],
         [Head(), b"HTTP/1.1 200 OK\r\n\r\n", Until(b"bye"), b"last", Close()], then="closed"),
    Case("connect_upstream_half_closes", [connect("connect"), Until(END), b"bye", Until(b"last")],
         [Head(), b"HTTP/1.1 200 OK\r\n\r\n", Until(b"bye"), b"last", HalfClose(), Eof()], then="closed"),
    Case("connect_upstream_closes_instead", [connect("connect"), Response("CONNECT")], [Head(), Close()]),
    Case("connect_client_half_closes", [connect("connect"), Until(END), b"bye", HalfClose()], [Head(), b"HTTP/1.1 200 OK\r\n\r\n", Until(b"bye"), Eof()],
         then="closed"),
    Case("connect_refused_by_upstream", [connect("connect"), Response("CONNECT")], [Head(), answer("403 No", b"")]),
    tunnel("connect_terminated", "terminate", request=connect("terminate"), up=[Echo()]),
    Case("connect_terminated_upstream_speaks_first", [connect("terminate"), Until(END), b"x", Until(b"banner"), Close()], [Until(b"x"), b"banner", Eof()]),
    Case("connect_terminated_upstream_closes", [connect("terminate"), Until(END), b"bye", Until(b"last")], [Until(b"bye"), b"last", Close()], then="closed"),
    Case("connect_terminated_dead", [connect("terminate-dead"), Response("CONNECT")]),
    # ---- filters of their own
    tunnel("own_filters", "plain", on="own"),
    tunnel("own_filters_upper_case", "plain", on="own", request=ws("plain", upgrade="WEBSOCKET")),
    tunnel("own_filters_enabled_by_route", "on", on="own"),
    tunnel("own_filters_one_is_disabled_by_route", "own-off", on="own"),
    tunnel("own_filters_one_is_enabled_by_route", "own-on", on="own"),
    tunnel("own_filters_configured_by_route", "own-more", on="own"),
    tunnel("own_filters_disabled_by_manager_enabled_by_route_with_a_delay", "other", on="own", request=ws("other", upgrade="foo/1"),
           up=[Head(), SWITCH.replace(b"websocket\r\nsec", b"foo/1\r\nsec"), Echo()]),
    tunnel("no_own_filters", "plain", on="own", request=ws("plain", upgrade="usual"),
           up=[Head(), SWITCH.replace(b"websocket\r\nsec", b"usual\r\nsec"), Echo()]),
    Case("own_filters_not_for_others", get("/", host="on.test"), [Head(), answer()], on="own"),
    Case("own_filters_disabled_by_route", ws("off"), on="own"),
    Case("own_filters_disabled_by_manager", ws("plain", upgrade="foo/1"), on="own"),
    Case("own_filters_reply", ws("plain", upgrade="deny"), on="own"),
    Case("own_filters_upstream_refuses", ws("plain"), [Head(), answer("403 No", b"no")], on="own"),
    Case("own_filters_upstream_503", ws("plain"), [Head(), answer("503 X", b"no")], on="own"),
    Case("own_filters_without_route", ws("nowhere"), on="own"),
    Case("own_filters_direct_response", ws("direct"), on="own"),
    Case("upgrade_without_route", ws("nowhere"), on="websocket"),
    Case("upgrade_without_route_not_enabled", ws("nowhere")),
    Case("upgrade_of_a_direct_response", ws("direct"), on="websocket"),
    tunnel("own_filters_connect", "connect", on="own", request=connect("connect"), up=[Head(), b"HTTP/1.1 200 OK\r\n\r\n", Echo()]),
    tunnel("own_filters_connect_terminated", "terminate", on="own", request=connect("terminate"), up=[Echo()]),
    Case("own_filters_connect_dead", [connect("terminate-dead"), Response("CONNECT")], on="own"),
    # ---- POST in its place
    Case("post_terminated", [post("post"), Until(END), b"5\r\nhello\r\n", Until(b"hello"), b"5\r\nagain\r\n0\r\n\r\n", Until(b"0\r\n\r\n")],
         [Until(b"hello"), b"hello", Until(b"again"), b"again", Eof(), Close()], joined=True, skip_stats=("delayed_close_timeout",)),
    Case("post_terminated_whole", [req("POST", "/", host="post.test", body=b"hello"), Response("POST")], [Until(b"hello"), b"answer", Eof(), Close()]),
    *[Case(f"post_terminated_whole_{number}", [req("POST", "/", host="post.test", body=b"hello"), Response("POST")], [Until(b"hello"), b"hi", Eof(), Close()])
      for number in range(3)],
    Case("post_terminated_upstream_closes", [post("post"), Until(END), b"5\r\nhello\r\n", Until(b"0\r\n\r\n")], [Until(b"hello"), b"bye", Close()],
         then="closed"),
    Case("post_terminated_dead", [req("POST", "/", host="post-dead.test", body=b"hello"), Response("POST")]),
    Case("post_that_is_only_forwarded", [req("POST", "/", host="post-not-allowed.test", body=b"hello"), Response("POST")]),
    Case("get_where_post_is_terminated", get(host="post.test")),
    Case("connect_with_content_length", [connect("connect", "Content-Length: 5") + b"hello", Response("CONNECT")], then="closed"),
]  # fmt: skip

test_case = check_cases(CASES)
