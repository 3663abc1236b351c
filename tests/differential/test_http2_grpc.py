"""gRPC through the proxy: messages and trailers in all bridges, statuses of local replies, deadlines, retries, filters and statistics."""

from __future__ import annotations

from typing import Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    Body,
    Case,
    Close,
    Data,
    Ended,
    Got,
    Headers,
    Heard,
    Open,
    Play,
    Request,
    Reset,
    Response,
    Rst,
    Script,
    Signal,
    Wait,
    bootstrap,
    check_cases,
    cluster,
    filter_,
    get,
    grpc_head,
    h2_case,
    h2_cluster,
    head,
    http,
    lines,
    message,
    reply,
    req,
)

FAST = {"retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"}}
RETRIABLE = ("cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable")


def vhost(name: str, to: str = "h2a", **route: Any) -> dict:
    extra = {key: route.pop(key) for key in ("typed_per_filter_config", "request_headers_to_add") if key in route}
    return {"name": name, "domains": [f"{name}.test"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to, **route}, **extra}]}


def retried(name: str, on: str, **policy: Any) -> dict:
    return vhost(name, timeout="4s", retry_policy={**FAST, "retry_on": on, **policy})


def direct(status: int, body: str | None = "said \u00fcber \x01 100 %\n") -> dict:
    response: dict[str, Any] = {"status": status} | ({"body": {"inline_string": body}} if body is not None else {})
    return {"name": f"d{status}", "domains": [f"d{status}.test"], "routes": [{"match": {"prefix": "/"}, "direct_response": response}]}


STATUSES = (200, 201, 204, 302, 400, 401, 403, 404, 405, 408, 409, 412, 413, 415, 418, 429, 500, 501, 502, 503, 504)
HOSTS = [
    vhost("h2"),
    vhost("a", "a"),
    vhost("at", "at"),
    vhost("dead", "h2dead"),
    vhost("short", timeout="0.3s"),
    vhost("dated", timeout="0.3s", max_grpc_timeout="0.2s"),
    vhost("undated", timeout="5s", max_grpc_timeout="0s"),
    vhost("shifted", timeout="5s", max_grpc_timeout="5s", grpc_timeout_offset="0.1s"),
    vhost("modern", timeout="5s", max_stream_duration={"grpc_timeout_header_max": "0.2s"}),
    vhost("modern-offset", timeout="5s", max_stream_duration={"grpc_timeout_header_max": "0s", "grpc_timeout_header_offset": "0.1s"}),
    *[retried(name, name) for name in RETRIABLE],
    retried("all", ",".join(RETRIABLE)),
    retried("reset", "reset"),
    retried("refused", "refused-stream"),
    retried("connect", "connect-failure"),
    retried("fivexx", "5xx"),
    vhost("mirrored", request_mirror_policies=[{"cluster": "h2shadow"}]),
    vhost("hashed", hash_policy=[{"header": {"header_name": "x-key"}}]),
    vhost("full", "h2_full"),
    {"name": "only", "domains": ["only.test"], "routes": [{"match": {"prefix": "/", "grpc": {}}, "route": {"cluster": "h2a"}}]},
    {"name": "redirect", "domains": ["redirect.test"], "routes": [{"match": {"prefix": "/"}, "redirect": {"path_redirect": "/x"}}]},
    *[direct(status) for status in STATUSES],
    direct(505, None),
]
H1_TRAILERS = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@": "http_options",
        "explicit_http_config": {"http_protocol_options": {"enable_trailers": True}},
    },
}
LIMITED = {"token_bucket": {"max_tokens": 1, "fill_interval": "3600s"}, "filter_enabled": {"default_value": {"numerator": 100}}}
ENFORCED = LIMITED | {"filter_enforced": {"default_value": {"numerator": 100}}, "stat_prefix": "limit"}
DENY = {"rules": {"action": "DENY", "policies": {"all": {"permissions": [{"any": True}], "principals": [{"any": True}]}}}}
CONFIG = bootstrap(
    http("main", HOSTS),
    http("trailers", HOSTS, http_protocol_options={"enable_trailers": True}),
    http("fault", HOSTS, filters=[filter_("fault", abort={"grpc_status": 7, "percentage": {"numerator": 100}})]),
    http("fault_http", HOSTS, filters=[filter_("fault", abort={"http_status": 503, "percentage": {"numerator": 100}})]),
    http("rbac", HOSTS, filters=[filter_("rbac", **DENY)]),
    http("limited", HOSTS, filters=[filter_("local_ratelimit", **ENFORCED)]),
    http("exhausted", HOSTS, filters=[filter_("local_ratelimit", **ENFORCED, rate_limited_as_resource_exhausted=True)]),
    http("cors", HOSTS, filters=[filter_("cors")]),
    http("counted", HOSTS, filters=[filter_("grpc_stats", stats_for_all_methods=True, emit_filter_state=True)]),
    http(
        "counted_some",
        HOSTS,
        filters=[filter_("grpc_stats", individual_method_stats_allowlist={"services": [{"name": "some.Service", "method_names": ["Method"]}]})],
    ),
    http("web", HOSTS, filters=[filter_("grpc_web")]),
    http("bridge", HOSTS, filters=[filter_("grpc_http1_bridge")]),
    http(
        "logged",
        HOSTS,
        access_log=[
            {
                "name": "file",
                "filter": {"grpc_status_filter": {"statuses": ["NOT_FOUND", "UNAVAILABLE"]}},
                "typed_config": {
                    "@": "file_log",
                    "path": "${file:access.log}",
                    "log_format": {
                        "text_format_source": {"inline_string": "%GRPC_STATUS% %GRPC_STATUS_NUMBER% %TRAILER(grpc-message)% %RESPONSE_CODE% %REQ(:PATH)%\n"}
                    },
                },
            },
        ],
    ),
    clusters=[
        cluster("a"),
        cluster("at", "a", typed_extension_protocol_options=H1_TRAILERS),
        h2_cluster("h2a"),
        h2_cluster("h2shadow"),
        h2_cluster("h2dead", "dead_h2"),
        h2_cluster("h2_full", "h2a", circuit_breakers={"thresholds": [{"max_requests": 0}]}),
        h2_cluster("h2_ejecting", "h2a", outlier_detection={"consecutive_5xx": 2}),
    ],
)


def call(path: str = "/pkg.Service/Method", *headers: str, host: str = "h2", body: bytes | None = None, **fields: Any) -> Script:
    """A whole unary call."""
    sent = message() if body is None else body
    return [Open(grpc_head(path, *headers, authority=f"{host}.test", **fields), end=False), Body(sent), Ended()]


def bare(path: str = "/pkg.Service/Method", *headers: str, host: str = "h2") -> Script:
    """A call without a message, for answers that do not wait for one."""
    return [Open(grpc_head(path, *headers, authority=f"{host}.test")), Ended()]


def said(status: int = 0, text: str = "", data: bytes | None = None, *more: str) -> Script:
    """An answer with one message and its status in trailers."""
    trailers = (f"grpc-status: {status}", *((f"grpc-message: {text}",) if text else ()), *more)
    return reply(200, "content-type: application/grpc", body=message(b"world") if data is None else data, trailers=trailers)


def only(status: int, *more: str, code: int = 200) -> Script:
    """A status in the head, and nothing else."""
    return reply(code, "content-type: application/grpc", f"grpc-status: {status}", *more, body=None)


def up(*scripts: Script) -> Play:
    return Play([[Ended(), *script] for script in scripts])


H1_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\ngrpc-status: 0\r\n\r\n"
WEB = "content-type: application/grpc-web+proto"
TEXT = "content-type: application/grpc-web-text"


def web(kind: str, body: bytes, *headers: str, host: str = "h2") -> Script:
    return [Open(head("POST", "/pkg.Service/Method", kind, "x-grpc-web: 1", *headers, authority=f"{host}.test"), end=False), Body(body), Ended()]


CASES = [
    # ---- calls
    h2_case("unary", call(), up=up(said())),
    h2_case("unary_with_metadata", call("/s/m", "x-meta: 1", "x-data-bin: AAEC", "grpc-encoding: gzip", "grpc-accept-encoding: gzip"), up=up(said(0, "",
            None, "x-end: 1"))),
    h2_case("unary_status_13", call(), up=up(said(13, "went%20wrong"))),
    h2_case("trailers_only", call(), up=up(only(5, "grpc-message: not here"))),
    h2_case("http_404", call(), up=up(reply(404, body=None))),
    h2_case("http_503_with_text", call(), up=up(reply(503, "content-type: text/plain", body=b"busy"))),
    h2_case("no_grpc_status_at_all", call(), up=up(reply(200, "content-type: application/grpc", body=message()))),
    h2_case("several_messages", call(body=message(b"a") + message(b"b")), up=up(said(0, "", message(b"c") + message(b"d")))),
    h2_case("bidirectional", Open(grpc_head(authority="h2.test"), end=False), Data(message(b"1")), Got(b"one"), Data(message(b"2")), Got(b"two"),
            Data(end=True), Ended(),
            up=[Headers(lines(":status: 200", "content-type: application/grpc")), Got(b"1"), Data(message(b"one")), Got(b"2"), Data(message(b"two")), Ended(),
                Headers(lines("grpc-status: 0"), end=True)]),
    h2_case("status_before_the_request_has_ended", Open(grpc_head(authority="h2.test"), end=False), Data(message(b"1")), Ended(), up=[Got(b"1"), *only(8),
            Ended()]),
    h2_case("client_cancels", Open(grpc_head(authority="h2.test"), end=False), Data(message()), Wait("got"), Rst(h2.CANCEL), up=[Got(b"hello"),
            Signal("got"), Ended()]),
    h2_case("upstream_resets_before_the_head", call(), up=up([Rst(h2.CANCEL)])),
    h2_case("upstream_resets_after_the_head", Open(grpc_head(authority="h2.test"), end=True), Got(b"hello"), Signal("got"), Ended(),
            up=[Ended(), Headers(lines(":status: 200", "content-type: application/grpc")), Data(message()), Wait("got"), Rst(h2.INTERNAL_ERROR)]),
    h2_case("content_type_with_suffix", [Open(head("POST", "/s/m", "content-type: application/grpc+json", "te: trailers", authority="nowhere.test")), Ended()]),
    h2_case("content_type_like_grpc", [Open(head("POST", "/s/m", "content-type: application/grpcx", authority="nowhere.test")), Ended()]),
    h2_case("h2_to_h1", call(host="at"), up=[Request(), H1_ANSWER]),
    h2_case("h2_to_h1_without_trailers", call(host="a"), up=[Request(), H1_ANSWER]),
    Case("h1_to_h2", [req("POST", "/pkg.Service/Method", "Content-Type: application/grpc", "TE: trailers", host="h2.test", body=message()), Response("POST")],
         up(said()), on="trailers"),
    Case("h1_local_reply", [req("POST", "/s/m", "Content-Type: application/grpc", host="nowhere.test", body=message()), Response("POST")]),
    h2_case("route_matches_grpc", call(host="only"), up=up(said())),
    h2_case("route_matches_only_grpc", [Open(head(authority="only.test")), Ended()]),
    # ---- local replies
    h2_case("no_route", bare(host="nowhere")),
    h2_case("redirect", bare(host="redirect")),
    *[h2_case(f"direct_{status}", bare(host=f"d{status}")) for status in (*STATUSES, 505)],
    *[h2_case(f"direct_{status}_not_grpc", [Open(head(authority=f"d{status}.test")), Ended()]) for status in (200, 404)],
    h2_case("direct_204_not_grpc", [Open(head(authority="d204.test")), Ended()], strictly=":status: 204\r\ndate", note="no content means none"),
    h2_case("dead_upstream", bare(host="dead")),
    h2_case("overflow", bare(host="full")),
    h2_case("upstream_closes", call(), up=up([Close()])),
    h2_case("upstream_tcp_reset", call(), up=up([Reset()])),
    h2_case("timeout", call(host="short"), up=[Heard("rst_stream")]),
    h2_case("timeout_after_the_head", call(host="short"), up=[Headers(lines(":status: 200", "content-type: application/grpc")), Heard("rst_stream")]),
    h2_case("bad_path", call("/a%00b"), up=up(said())),
    h2_case("head_method", [Open(head("HEAD", "/s/m", "content-type: application/grpc", authority="nowhere.test")), Ended()]),
    # ---- deadlines
    h2_case("deadline_forwarded", call("/s/m", "grpc-timeout: 3S"), up=up(said())),
    h2_case("deadline_capped", call("/s/m", "grpc-timeout: 3S", host="dated"), up=[Heard("rst_stream")]),
    h2_case("deadline_of_the_client", call("/s/m", "grpc-timeout: 100m", host="undated"), up=[Heard("rst_stream")]),
    h2_case("deadline_zero_is_infinite", call("/s/m", "grpc-timeout: 0m", host="undated"), up=up(said())),
    h2_case("deadline_shifted", call("/s/m", "grpc-timeout: 250m", host="shifted"), up=[Heard("rst_stream")]),
    h2_case("deadline_absent", call(host="undated"), up=up(said())),
    *[h2_case(f"deadline_unit_{unit}", call("/s/m", f"grpc-timeout: 9{unit}", host="undated"), up=up(said())) for unit in "HMS"],
    *[h2_case(f"deadline_malformed_{number}", call("/s/m", f"grpc-timeout: {value}", host="undated"), up=up(said()))
      for number, value in enumerate(["", "5", "S", "-1S", "123456789S", "5X", "1 S"])],
    h2_case("deadline_modern", call("/s/m", "grpc-timeout: 3S", host="modern"), up=[Heard("rst_stream")]),
    h2_case("deadline_modern_offset", call("/s/m", "grpc-timeout: 250m", host="modern-offset"), up=[Heard("rst_stream")]),
    h2_case("deadline_not_of_grpc", [Open(head("POST", "/", "grpc-timeout: 100m", authority="undated.test")), Ended()], up=up(reply())),
    # ---- retries
    *[h2_case(f"retry_{name}", call(host=name), up=up(only(code), said())) for name, code in zip(RETRIABLE, (1, 4, 13, 8, 14), strict=True)],
    h2_case("retry_other_status", call(host="unavailable"), up=up(only(2), said())),
    h2_case("retry_status_in_trailers", call(host="all"), up=up(said(14), said())),
    h2_case("retry_status_with_data", call(host="all"), up=up(reply(200, "grpc-status: 14", body=message()), said())),
    h2_case("retry_status_but_not_grpc", [Open(head("POST", "/", authority="all.test")), Ended()], up=up(reply(200, "grpc-status: 14", body=None), reply())),
    h2_case("retry_gives_up", call(host="unavailable"), up=up(only(14))),
    h2_case("retry_by_header", call("/s/m", "x-envoy-retry-grpc-on: unavailable,cancelled", "x-envoy-max-retries: 2"), up=up(only(14), only(1), said())),
    h2_case("retry_503", call(host="fivexx"), up=up(reply(503, body=None), said())),
    h2_case("retry_reset", call(host="reset"), up=up([Rst(h2.INTERNAL_ERROR)], said())),
    h2_case("retry_refused_stream", call(host="refused"), up=up([Rst(h2.REFUSED_STREAM)], said())),
    h2_case("retry_refused_stream_not_for_other_codes", call(host="refused"), up=up([Rst(h2.CANCEL)], said())),
    h2_case("retry_not_after_the_head", call(host="reset"), up=up([Headers(lines(":status: 200")), Rst(h2.CANCEL)], said())),
    h2_case("retry_connection_closed", call(host="reset"), up=up([Close()], said())),
    h2_case("retry_amid_the_request", Open(grpc_head(authority="reset.test"), end=False), Data(message(b"1")), Wait("second"), Data(message(b"2"), end=True),
            Ended(),
            up=Play([[Got(b"1"), Rst(h2.INTERNAL_ERROR)], [Got(b"1"), Signal("second"), Ended(), *said()]])),
    # ---- filters
    h2_case("fault_grpc_status", bare(), on="fault"),
    h2_case("fault_grpc_status_not_grpc", [Open(head(authority="h2.test")), Ended()], on="fault"),
    h2_case("fault_http_status", bare(), on="fault_http"),
    h2_case("rbac", bare(), on="rbac"),
    h2_case("local_ratelimit", call(), bare(), up=up(said()), on="limited", then="leave"),
    h2_case("local_ratelimit_exhausted", call(), bare(), up=up(said()), on="exhausted", then="leave"),
    h2_case("cors", call("/s/m", "origin: https://a.example"), up=up(said()), on="cors"),
    h2_case("mirrored", call(host="mirrored"), up={"h2a": up(said()), "h2shadow": up(said())}),
    h2_case("hashed", call("/s/m", "x-key: 1", host="hashed"), up=up(said())),
    h2_case("logged_by_status", call(), call("/s/missing"), call("/s/busy"), up=up(said(0), said(5, "gone"), only(14)), on="logged"),
    h2_case("logged_by_status_again_and_again", *[call("/s/missing")] * 12, up=up(said(5, "gone")), on="logged"),
    # ---- statistics
    h2_case("stats", call(), call("/pkg.Service/Other"), call("/odd"), up=up(said(0), said(13), only(14)), on="counted"),
    h2_case("stats_of_messages", call(body=message(b"a") + message(b"b")), up=up(said(0, "", message(b"c") * 3)), on="counted"),
    h2_case("stats_of_some", call("/some.Service/Method"), call("/some.Service/Other"), up=up(said()), on="counted_some"),
    h2_case("stats_of_local_replies", bare(host="nowhere"), on="counted"),
    h2_case("stats_not_grpc", [Open(head(authority="h2.test")), Ended()], up=up(reply()), on="counted"),
    # ---- gRPC-web and the bridge
    h2_case("web", web(WEB, message()), up=up(said()), on="web"),
    h2_case("web_text", web(TEXT, b"AAAAAAVoZWxsbw=="), up=up(said()), on="web"),
    h2_case("web_text_in_pieces", [Open(head("POST", "/s/m", TEXT, authority="h2.test"), end=False), Wait("begun"), Data(b"AAAAAA"), Data(b"I=aGk=",
            end=True), Ended()],
            up=[Signal("begun"), Ended(), *said()], on="web"),
    h2_case("web_text_garbage", [Open(head("POST", "/s/m", TEXT, authority="h2.test"), end=False), Wait("begun"), Data(b"!!!!"), Ended()],
            up=[Signal("begun"), Ended()], on="web"),
    h2_case("web_trailers_only", web(WEB, message()), up=up(only(5, "grpc-message: no")), on="web"),
    h2_case("web_accepts_text", web(WEB, message(), "accept: application/grpc-web-text"), up=up(said()), on="web"),
    h2_case("web_local_reply", [Open(head("POST", "/s/m", WEB, authority="nowhere.test")), Ended()], on="web"),
    h2_case("web_http_503", web(WEB, message()), up=up(reply(503, "content-type: text/plain", body=b"busy")), on="web"),
    h2_case("web_not_at_all", call(), up=up(said()), on="web"),
    Case("web_h1", [req("POST", "/pkg.Service/Method", WEB, host="h2.test", body=message()), Response("POST")],
         up(said()), on="web", joined=True),
    Case("web_h1_text", [req("POST", "/pkg.Service/Method", TEXT, host="h2.test", body=b"AAAAAAVoZWxsbw=="), Response("POST")], up(said()), on="web",
            joined=True),
    Case("bridge", [req("POST", "/pkg.Service/Method", "content-type: application/grpc", host="h2.test", body=message()), Response("POST")], up(said()),
            on="bridge"),
    Case("bridge_status", [req("POST", "/pkg.Service/Method", "content-type: application/grpc", host="h2.test", body=message()), Response("POST")],
         up(said(5, "gone")), on="bridge"),
    Case("bridge_trailers_only", [req("POST", "/pkg.Service/Method", "content-type: application/grpc", host="h2.test", body=message()), Response("POST")],
         up(only(14)), on="bridge"),
    Case("bridge_not_grpc", get(host="h2.test"), up(reply()), on="bridge"),
    h2_case("bridge_h2", call(), up=up(said()), on="bridge"),
]  # fmt: skip

test_case = check_cases(CASES)
