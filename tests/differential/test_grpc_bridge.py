"""`grpc_http1_bridge`: HTTP/1.1 clients that know nothing of trailers, in front of gRPC services."""

from __future__ import annotations

from tests.differential.grpc_wire import OPTIONS, TRAILERS, call, frame, grpc_answer, trailers_only, up
from tests.differential.harness import Case, Close, Request, answer, bootstrap, check_cases, cluster, file_log, filter_, http, req, to

PROTOBUF = "application/x-protobuf"
LOG = "%REQ(:PATH)% %RESPONSE_CODE% grpc=%GRPC_STATUS% flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT%\n"
HOSTS = [
    {
        "name": "a",
        "domains": ["a.test"],
        "routes": [
            {"match": {"prefix": "/", "grpc": {}}, "route": {"cluster": "a"}, "response_headers_to_add": [{"header": {"key": "x-route", "value": "grpc"}}]},
            {"match": {"prefix": "/"}, "route": {"cluster": "a"}, "response_headers_to_add": [{"header": {"key": "x-route", "value": "other"}}]},
        ],
    },
    {**to("dead", "dead.test")[0], "name": "dead", "response_headers_to_add": [{"header": {"key": "x-route", "value": "dead"}}]},
]
STATS = filter_("grpc_stats", stats_for_all_methods=True)


def listener(name: str, *filters: dict, **fields) -> dict:
    return http(name, HOSTS, access_log=[file_log(LOG)], filters=filters, **fields)


CONFIG = bootstrap(
    listener("main", filter_("grpc_http1_bridge")),
    listener("upgrading", filter_("grpc_http1_bridge", upgrade_protobuf_to_grpc=True, ignore_query_parameters=True)),
    listener("trailers", filter_("grpc_http1_bridge"), http_protocol_options=TRAILERS),
    listener("stats_inside", filter_("grpc_http1_bridge", upgrade_protobuf_to_grpc=True), STATS),
    listener("stats_outside", STATS, filter_("grpc_http1_bridge", upgrade_protobuf_to_grpc=True)),
    listener("small", filter_("grpc_http1_bridge"), listener_fields={"per_connection_buffer_limit_bytes": 1024}),
    clusters=[cluster("a", typed_extension_protocol_options=OPTIONS), cluster("dead")],
)

OK = grpc_answer(frame(b"abc"), grpc_status=0)
FAILED = grpc_answer(frame(b"abc"), grpc_status=14, grpc_message="come%20back", x_more=1)


def protobuf(body: bytes = b"proto", path: str = "/pkg.Service/Method?q=1", host: str = "a.test", content_type: str = PROTOBUF) -> bytes:
    """A request with a message and nothing around it."""
    return req("POST", path, f"Content-Type: {content_type}", host=host, body=body)


def chunked_protobuf(*pieces: bytes) -> bytes:
    return call(*pieces, content_type=PROTOBUF)


CASES = [
    Case("ok", call(frame(b"hi")), up(OK)),
    Case("ok_with_length", req("POST", "/s/m?q=1", "Content-Type: application/grpc", body=frame(b"hi")), up(OK)),
    Case("failed", call(frame(b"hi")), up(FAILED)),
    Case("failed_in_head", call(frame(b"hi")), up(trailers_only(5, grpc_message="no"))),
    Case("status_garbage", call(frame(b"hi")), up(grpc_answer(frame(b"x"), grpc_status="soon"))),
    Case("status_zero_zero", call(frame(b"hi")), up(grpc_answer(frame(b"x"), grpc_status="00"))),
    Case("status_missing", call(frame(b"hi")), up(grpc_answer(frame(b"x"), x_more=1))),
    Case("message_only", call(frame(b"hi")), up(grpc_answer(frame(b"x"), grpc_message="hm"))),
    Case("no_trailers", call(frame(b"hi")), up(answer(body=frame(b"x"), content_type="application/grpc"))),
    Case("no_trailers_chunked", call(frame(b"hi")), up(grpc_answer(frame(b"x"), frame(b"y")))),
    Case("empty_body", call(frame(b"hi")), up(grpc_answer(grpc_status=0))),
    Case("several_pieces", call(frame(b"hi")), up(grpc_answer(frame(b"x"), frame(b"y" * 300), grpc_status=0))),
    Case("downstream_with_trailers", call(frame(b"hi")), up(OK), on="trailers"),
    Case("http_error", call(frame(b"hi")), up(answer("503 No", b"busy"))),
    Case("http_error_with_trailers", call(frame(b"hi")), up(grpc_answer(b"x", status="404 No", grpc_status=0))),
    Case("not_grpc", req("POST", "/s/m?q=1", "Content-Type: text/plain", body=b"x"), up(grpc_answer(b"x", grpc_status=14))),
    Case("protobuf_not_upgraded", protobuf(), up(OK)),
    Case("query_kept", call(frame(b"hi"), path="/s/m?a=1"), up(OK)),
    Case("query_ignored", call(frame(b"hi"), path="/s/m?a=1?b"), up(OK), on="upgrading"),
    Case("connection_refused", call(frame(b"hi"), host="dead.test")),
    Case("reset_after_head", call(frame(b"hi")), [*up(OK[: OK.index(b"0\r\ngrpc")]), Close()], then="leave"),
    Case("large_response", call(frame(b"hi")), [Request(), grpc_answer(frame(b"x" * 2000), grpc_status=0)], on="small", then="leave"),
    # ---- upgrading
    Case("upgraded", protobuf(), up(OK), on="upgrading"),
    Case("upgraded_failed", protobuf(), up(FAILED), on="upgrading"),
    Case("upgraded_failed_in_head", protobuf(), up(trailers_only(5, grpc_message="no")), on="upgrading"),
    Case("upgraded_chunked", chunked_protobuf(b"pro", b"to"), up(OK), on="upgrading"),
    Case("upgraded_empty", chunked_protobuf(), up(OK), on="upgrading"),
    Case("upgraded_without_body", protobuf(b""), up(OK), on="upgrading"),
    Case("upgraded_parameter", protobuf(content_type=f"{PROTOBUF}; x=1"), up(OK), on="upgrading"),
    Case("upgraded_grpc", call(frame(b"hi")), up(OK), on="upgrading"),
    Case("upgraded_two_messages", protobuf(), up(grpc_answer(frame(b"abc") + frame(b"de"), grpc_status=0)), on="upgrading"),
    Case("upgraded_empty_message", protobuf(), up(grpc_answer(frame(b""), grpc_status=0)), on="upgrading"),
    Case("upgraded_no_message", protobuf(), up(grpc_answer(grpc_status=0)), on="upgrading"),
    Case("upgraded_no_trailers", protobuf(), up(grpc_answer(frame(b"abc"))), on="upgrading"),
    Case("upgraded_refused", protobuf(host="dead.test"), on="upgrading"),
    Case("upgraded_no_route", protobuf(host="nowhere.test"), on="upgrading"),
    # ---- statistics
    *(
        Case(f"{name}_{on}", request, up(response), on=on)
        for on in ("stats_inside", "stats_outside")
        for name, request, response in (
            ("ok", call(frame(b"hi")), OK),
            ("upgraded", protobuf(path="/pkg.Service/Method"), OK),
            ("upgraded_failed", protobuf(path="/pkg.Service/Method"), FAILED),
        )
    ),
]  # fmt: skip

test_case = check_cases(CASES)
