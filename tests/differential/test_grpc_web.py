"""`grpc_web`: clients speak gRPC-Web over HTTP/1.1, upstreams gRPC with trailers."""

from __future__ import annotations

import base64

from tests.differential.grpc_wire import OPTIONS, TRAILERS, call, frame, grpc_answer, trailers_only, up
from tests.differential.harness import (
    Case,
    Close,
    Eof,
    Head,
    Request,
    answer,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    http,
    req,
    to,
)  # fmt: skip

WEB = "application/grpc-web"
PROTO = "application/grpc-web+proto"
TEXT = "application/grpc-web-text"
TEXT_PROTO = "application/grpc-web-text+proto"
LOG = "%REQ(:PATH)% %RESPONSE_CODE% grpc=%GRPC_STATUS% flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT%\n"
CORS = {
    "cors": {
        "@": "cors_policy", "allow_origin_string_match": [{"exact": "http://app.test"}], "allow_methods": "POST", "allow_headers": "x-grpc-web,content-type",
        "expose_headers": "grpc-status,grpc-message", "max_age": "60",
    },
}  # fmt: skip
ADDED = {"response_headers_to_add": [{"header": {"key": "x-host", "value": "cors"}}]}
HOSTS = [
    {**to("a", "a.test")[0], "name": "a"},
    {**to("dead", "dead.test")[0], "name": "dead"},
    {**to("a", "cors.test")[0], "name": "cors", "typed_per_filter_config": CORS, **ADDED},
    {**to("a", "slow.test", timeout="0.2s")[0], "name": "slow"},
    {**to("plain", "plain.test")[0], "name": "plain"},
]
STATS = filter_("grpc_stats", stats_for_all_methods=True)


def listener(name: str, *filters: dict, **fields) -> dict:
    return http(name, HOSTS, access_log=[file_log(LOG)], filters=[filter_("cors"), *filters], **fields)


CONFIG = bootstrap(
    listener("main", filter_("grpc_web")),
    listener("stats_inside", filter_("grpc_web"), STATS),
    listener("stats_outside", STATS, filter_("grpc_web")),
    listener("trailers", filter_("grpc_web"), http_protocol_options=TRAILERS),
    listener("limited", filter_("grpc_web"), filter_("buffer", max_request_bytes=8)),
    clusters=[cluster("a", typed_extension_protocol_options=OPTIONS), cluster("dead"), cluster("plain")],
)

OK = grpc_answer(frame(b"abc"), grpc_status=0)
FAILED = grpc_answer(grpc_status=14, grpc_message="come%20back", x_more="1", X_Upper="2")
MESSAGE = frame(b"hello")


def web(body: bytes = MESSAGE, *headers: str, content_type: str = PROTO, path: str = "/pkg.Service/Method", host: str = "a.test") -> bytes:
    """A request with a length, as browsers send it."""
    return req("POST", path, f"Content-Type: {content_type}", "X-Grpc-Web: 1", *headers, host=host, body=body)


def text(body: bytes, *headers: str, content_type: str = TEXT, **more) -> bytes:
    """A request whose body is base64 text, and whose response too."""
    return web(body, *(headers or (f"Accept: {TEXT}",)), content_type=content_type, **more)


def b64(data: bytes) -> bytes:
    return base64.b64encode(data)


GRPC_HEAD = answer(body=None, content_type="application/grpc", transfer_encoding="chunked")
ORIGIN = "Origin: http://app.test"

CASES = [
    # ---- requests
    *(Case(f"content_type_{kind.partition('/')[2]}", web(content_type=kind), up(OK)) for kind in (WEB, PROTO)),
    *(Case(f"content_type_{kind.partition('/')[2]}", text(b64(MESSAGE), content_type=kind), up(OK)) for kind in (TEXT, TEXT_PROTO)),
    Case("content_type_json", web(content_type=f"{WEB}+json"), up(OK)),
    Case("content_type_upper", web(content_type="Application/gRPC-Web"), up(OK)),
    Case("content_type_parameter", web(content_type=f"{WEB}; x=1"), up(OK)),
    Case("content_type_grpc", call(MESSAGE), up(OK)),
    Case("no_content_type", req("POST", "/s/m", body=b"x"), up(OK)),
    Case("chunked_request", call(MESSAGE, content_type=WEB), up(OK)),
    Case("no_body", web(b""), up(OK)),
    Case("accept_encoding", web(MESSAGE, "grpc-accept-encoding: gzip", "TE: gzip"), up(OK)),
    Case("accepts_text", web(MESSAGE, f"Accept: {TEXT_PROTO}"), up(OK)),
    Case("accepts_text_and_more", web(MESSAGE, f"Accept: {TEXT}, */*"), up(OK)),
    Case("accepts_binary_after_text", text(b64(MESSAGE), f"Accept: {PROTO}"), up(OK)),
    Case("get", get("/s/m", f"Content-Type: {WEB}"), up(OK)),
    # ---- base64
    *(
        Case(f"text_{name}", text(body), up(OK))
        for name, body in (
            ("unpadded", b64(frame(b"x"))),
            ("one_pad", b64(frame(b""))),
            ("two_pads", b64(frame(b"xy"))),
            ("empty", b""),
            ("short", b"AAA"),
            ("not_a_multiple", b64(MESSAGE) + b"A"),
            ("odd_character", b"AAAA*AAA"),
            ("line_break", b"AAAA\r\nAA"),
            ("padding_inside", b64(frame(b"")) + b64(frame(b""))),
            ("only_padding", b"===="),
            ("three_pads", b"A==="),
            ("url_safe", b"-_-_"),
            ("left_over_bits", b"AAAAAAB="),
            ("left_over_bits_two", b"AAAAAB=="),
        )
    ),
    Case("text_in_pieces", call(b64(MESSAGE)[:3], b64(MESSAGE)[3:9], b64(MESSAGE)[9:], content_type=TEXT), up(OK)),
    # What Envoy sends upstream before it finds out, it also takes back.
    Case("text_short_at_the_end", call(b"AAAA", b"AA", content_type=TEXT), up(OK), skip=("upstream",), skip_stats=("cluster.",)),
    # ---- responses
    Case("ok", web(), up(OK)),
    Case("ok_text", text(b64(MESSAGE)), up(OK)),
    Case("failed", web(), up(FAILED)),
    Case("failed_text", text(b64(MESSAGE)), up(FAILED)),
    Case("two_messages", web(), up(grpc_answer(frame(b"abc"), frame(b"", 1), grpc_status=0))),
    Case("two_messages_text", text(b64(MESSAGE)), up(grpc_answer(frame(b"abc"), frame(b"", 1), grpc_status=0))),
    Case("split_message_text", text(b64(MESSAGE)), up(grpc_answer(b"\0\0\0", b"\0\3a", b"bc\0\0", b"\0\0\1x", grpc_status=0))),
    Case("half_a_message_text", text(b64(MESSAGE)), up(grpc_answer(frame(b"x"), b"\0\0\0", grpc_status=0))),
    Case("trailers_only", web(), up(trailers_only(7, grpc_message="no"))),
    Case("trailers_only_text", text(b64(MESSAGE)), up(trailers_only(7, grpc_message="no"))),
    Case("no_trailers", web(), up(answer(body=frame(b"x"), content_type="application/grpc"))),
    Case("empty_trailers", web(), up(grpc_answer(frame(b"x")))),
    Case("with_length", web(), up(answer(body=frame(b"x"), content_type="application/grpc+proto", grpc_status="0"))),
    Case("web_from_upstream", web(), up(answer(body=frame(b"x", 0x80), content_type=PROTO))),
    Case("web_from_upstream_parameter", web(), up(answer(body=frame(b"x", 0x80), content_type="Application/grpc-web ; charset=x"))),
    Case("upstream_without_trailers", web(host="plain.test"), up(OK)),
    Case("downstream_with_trailers", web(), up(OK), on="trailers"),
    Case("downstream_with_trailers_text", text(b64(MESSAGE)), up(FAILED), on="trailers"),
    # ---- no gRPC
    Case("http_error", web(), up(answer("503 No", b"100 % busy\n"))),
    Case("http_error_text", text(b64(MESSAGE)), up(answer("503 No", b"busy"))),
    Case("http_error_empty", web(), up(answer("404 No", b""))),
    Case("http_error_with_grpc_type", web(), up(answer("500 No", b"what", content_type="application/grpc"))),
    Case("http_ok_but_not_grpc", web(), up(answer(body=b"<html>", content_type="text/html"))),
    Case("http_error_with_trailers", web(), up(grpc_answer(b"page", status="500 No", content_type="text/html", x_more="1", grpc_status=9))),
    Case("http_error_without_body_with_trailers", web(), up(grpc_answer(status="500 No", content_type="text/html", x_more="1"))),
    Case("http_error_long", web(), up(answer("500 No", b"x" * 20_000))),
    Case("http_error_long_in_pieces", web(), up(grpc_answer(b"x" * 10_000, b"y" * 5_000, b"z" * 5_000, status="500 No", content_type="text/html", x="1"))),
    Case("connection_refused", web(host="dead.test")),
    Case("connection_refused_text", text(b64(MESSAGE), host="dead.test")),
    Case("connection_refused_head", req("HEAD", "/s/m", f"Content-Type: {WEB}", host="dead.test")),
    Case("no_route", web(host="nowhere.test")),
    Case("timeout", web(host="slow.test"), [Request(), Eof()]),
    Case("reset_before_head", web(), [Head(), Close()]),
    Case("reset_after_head", web(), [*up(GRPC_HEAD + b"3\r\n\0\0\0\r\n"), Close()], then="closed"),
    Case("reset_after_head_that_is_kept", web(), [*up(answer("500 No", None, transfer_encoding="chunked") + b"3\r\nabc\r\n"), Close()], then="leave"),
    Case("too_large_for_a_later_filter", web(b"x" * 20), up(OK), on="limited", then="leave"),
    # ---- CORS
    Case("cors", web(MESSAGE, ORIGIN, host="cors.test"), up(OK)),
    Case("cors_error", web(MESSAGE, ORIGIN, host="cors.test"), up(answer("503 No", b"busy"))),
    Case(
        "cors_preflight",
        req("OPTIONS", "/s/m", ORIGIN, "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: x-grpc-web", host="cors.test"),
    ),
    # ---- statistics
    Case("stats_no_method", web(path="/only"), up(OK)),
    Case("stats_refused", web(host="dead.test"), on="stats_inside"),
    Case("stats_refused_outside", web(host="dead.test"), on="stats_outside"),
    *(
        Case(f"{name}_{on}", request, up(response), on=on)
        for on in ("stats_inside", "stats_outside")
        for name, request, response in (
            ("ok", web(), OK),
            ("ok_text", text(b64(MESSAGE)), OK),
            ("failed", web(), FAILED),
            ("head_only", web(), trailers_only(7)),
            ("http_error", web(), answer("503 No", b"busy")),
        )
    ),
]  # fmt: skip

test_case = check_cases(CASES)
