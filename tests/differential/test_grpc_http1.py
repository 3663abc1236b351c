"""gRPC through the proxy over HTTP/1.1 with trailers: local replies, what trailers mean for statistics, logs and outlier detection, and `grpc_stats`."""

from __future__ import annotations

import re
from typing import Any

from tests.differential.grpc_wire import OPTIONS, TRAILERS, call, frame, grpc_answer, trailers_only, up
from tests.differential.harness import Case, Close, Head, Play, Response, Rig, answer, bootstrap, check_cases, cluster, file_log, filter_, get, http, req, to

GRPC = "Content-Type: application/grpc"
OUTLIER = {"consecutive_5xx": 2, "enforcing_consecutive_5xx": 0, "interval": "3600s", "max_ejection_percent": 100}
LOG = (
    "%REQ(:PATH)% %RESPONSE_CODE% grpc=%GRPC_STATUS% number=%GRPC_STATUS_NUMBER% snake=%GRPC_STATUS(SNAKE_STRING)% flags=%RESPONSE_FLAGS% "
    "details=%RESPONSE_CODE_DETAILS% trailer=%TRAILER(grpc-message)% tx=%BYTES_SENT% "
    "state=%FILTER_STATE(envoy.filters.http.grpc_stats:PLAIN)% typed=%FILTER_STATE(envoy.filters.http.grpc_stats)% "
    "field=%FILTER_STATE(envoy.filters.http.grpc_stats:FIELD:request_message_count)%\n"
)


HOSTS = [
    *to("a", "a.test"),
    *to("outlier", "outlier.test"),
    *to("a", "retry.test", retry_policy={"retry_on": "unavailable,internal"}),
    *to("dead", "dead.test"),
    *to("nowhere", "unknown.test"),
    {
        "name": "direct",
        "domains": ["direct.test"],
        "routes": [
            {"match": {"prefix": "/line"}, "direct_response": {"status": 404, "body": {"inline_string": "lines\n\n"}}},
            {
                "match": {"prefix": "/status"},
                "direct_response": {"status": 404, "body": {"inline_string": "x"}},
                "response_headers_to_add": [{"header": {"key": "grpc-status", "value": "3"}}],
            },
            {"match": {"prefix": "/"}, "direct_response": {"status": 403, "body": {"inline_string": "100 % ~naïve~\ttab"}}},
        ],
    },
    {
        "name": "weighted",
        "domains": ["weighted.test"],
        "routes": [{"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": [{"name": "a", "weight": 1}, {"name": "dead", "weight": 0}]}}}],
    },
]  # fmt: skip
for number, host in enumerate(HOSTS):
    host["name"] = f"{host['name']}{number}"


COMMON = {"http_protocol_options": TRAILERS, "route_config": {"validate_clusters": False}}


def stats(name: str, **fields) -> dict:
    """A listener with grpc_stats."""
    return http(
        name,
        HOSTS,
        http_protocol_options=TRAILERS,
        route_config={"validate_clusters": False},
        access_log=[file_log(LOG)],
        filters=[filter_("grpc_stats", **fields)],
    )


ALLOWED = {"services": [{"name": "listed.Service", "method_names": ["Method", "Other"]}]}
CONFIG = bootstrap(
    http("main", HOSTS, **COMMON, access_log=[file_log(LOG)]),
    http(
        "filtered", HOSTS, **COMMON,
        access_log=[file_log(LOG, filter={"grpc_status_filter": {"statuses": ["UNAVAILABLE", "UNKNOWN", "INTERNAL"]}})],
    ),
    http("json", HOSTS, **COMMON, access_log=[file_log(LOG)], local_reply_config={"body_format": {"json_format": {"body": "%LOCAL_REPLY_BODY%"}}}),
    stats("default"),
    stats("all", stats_for_all_methods=True, emit_filter_state=True),
    stats("times", stats_for_all_methods=True, enable_upstream_stats=True),
    stats("dots", stats_for_all_methods=True, replace_dots_in_grpc_service_name=True),
    stats("some", individual_method_stats_allowlist=ALLOWED, emit_filter_state=True),
    clusters=[
        cluster("a", typed_extension_protocol_options=OPTIONS),
        cluster("dead"),
        cluster("outlier", typed_extension_protocol_options=OPTIONS, outlier_detection=OUTLIER),
    ],
)  # fmt: skip

BEGUN = answer(body=None, content_type="application/grpc", transfer_encoding="chunked") + b"3\r\nabc\r\n"
OK = grpc_answer(frame(b"abc"), grpc_status=0)
FAILED = grpc_answer(frame(b"abc"), grpc_status=14, grpc_message="come%20back")
CONNECT = "application/connect+json"
TWICE = [call(host="outlier.test"), Response("POST"), call(host="outlier.test"), Response("POST")]


def end_of_connect(text: str) -> bytes:
    return frame(text.encode(), 2)


def tags() -> Case:
    """How the statistics look to Prometheus."""

    async def run(rig: Rig) -> list[str]:
        for on in ("dots", "default"):
            await rig.get(call(frame(b"hi"), path="/tags/Method"), on)
        _, text = await rig.proxy.admin("GET", "/stats/prometheus?usedonly&filter=^cluster.a.grpc")
        return sorted(line for line in text.splitlines() if "tags" in line)

    return Case("stats_tags", run, up(OK), skip=("log",))


async def _host_counts(rig: Rig) -> dict[str, int]:
    while True:  # workers tell main of hosts once a second
        _, text = await rig.proxy.admin("GET", "/clusters")
        counts = {name: int(value) for name, value in re.findall(r"^a::[^:]+:\d+::(rq_\w+)::(\d+)$", text, re.MULTILINE)}
        if counts["rq_success"] + counts["rq_error"] >= counts["rq_total"] and not counts["rq_active"]:
            return counts


def host_statistics(name: str, response: bytes, request: bytes | None = None, **fields: Any) -> Case:
    """What a response counts as for its host."""

    async def run(rig: Rig) -> dict[str, int]:
        before = await _host_counts(rig)
        await rig.get(request or call(frame(b"x")))
        await rig.settled()
        after = before
        while after == before:
            after = await _host_counts(rig)
        return {key: after[key] - before[key] for key in after}

    return Case(f"host_{name}", run, up(response), **fields)


CASES = [
    # ---- what hosts have done well
    host_statistics("ok", OK),
    host_statistics("failed", FAILED),
    host_statistics("failed_by_the_client", grpc_answer(grpc_status=3)),
    host_statistics("garbage", grpc_answer(grpc_status="soon")),
    host_statistics("no_status", grpc_answer(frame(b"x"), x_more=1)),
    host_statistics("no_trailers", answer(body=frame(b"x"), content_type="application/grpc")),
    host_statistics("head_failed", trailers_only(14)),
    host_statistics("head_failed_by_the_client", trailers_only(3)),
    host_statistics("head_failed_whole", trailers_only(14), req("POST", "/s/m", GRPC, "Content-Length: 0")),
    host_statistics("http_404", answer("404 No", b"x")),
    host_statistics("http_404_head", answer("404 No", b"")),
    host_statistics("http_503", answer("503 No", b"x")),
    host_statistics("not_grpc", answer(grpc_status="14"), get()),
    # ---- what trailers and heads mean
    Case("ok", call(frame(b"hi")), up(OK)),
    Case("status_in_trailers", call(frame(b"hi")), up(FAILED)),
    Case("status_in_head", call(frame(b"hi")), up(trailers_only(7, grpc_message="no"))),
    Case("status_in_head_with_a_body", call(frame(b"hi")), up(grpc_answer(frame(b"x")).replace(b"application/grpc", b"application/grpc\r\ngrpc-status: 3"))),
    Case("status_in_both", call(frame(b"hi")), up(grpc_answer(frame(b"x"), grpc_status=5).replace(b"application/grpc", b"application/grpc\r\ngrpc-status: 3"))),
    Case("status_unknown_number", call(), up(grpc_answer(grpc_status=99))),
    Case("status_negative", call(), up(grpc_answer(grpc_status=-1))),
    Case("status_garbage", call(), up(grpc_answer(grpc_status="soon"))),
    Case("status_missing", call(), up(grpc_answer(frame(b"x"), x_other="1"))),
    Case("status_missing_no_trailers", call(), up(answer(content_type="application/grpc"))),
    Case("http_error", call(frame(b"hi")), up(answer("503 No", b"busy"))),
    Case("http_error_with_grpc_status", call(frame(b"hi")), up(answer("500 No", b"", content_type="application/grpc", grpc_status="13"))),
    Case("http_404", call(frame(b"hi")), up(answer("404 No", b"what"))),
    Case("content_type_with_parameter", call(frame(b"hi"), content_type="application/grpc;charset=utf-8", host="dead.test")),
    Case("content_type_with_format", call(frame(b"hi"), content_type="application/grpc+proto", host="dead.test")),
    Case("content_type_web", call(frame(b"hi"), content_type="application/grpc-web", host="dead.test")),
    Case("content_type_upper", call(frame(b"hi"), content_type="Application/gRPC", host="dead.test")),
    Case("not_grpc_with_status", get("/", host="a.test"), up(grpc_answer(b"x", grpc_status=14))),
    Case("message_encoded", call(host="direct.test")),
    Case("message_lines", call(host="direct.test", path="/line/x")),
    Case("message_json", call(host="direct.test"), on="json"),
    Case("status_of_the_route", call(host="direct.test", path="/status/x")),
    Case("message_encoded_plain", get(host="direct.test")),
    Case("cluster_unknown", call(host="unknown.test")),
    Case("upstream_gone_after_head", call(frame(b"hi")), [*up(BEGUN), Close()], then="closed"),
    Case("head_request", req("HEAD", "/s/m", GRPC, host="direct.test")),
    # ---- retries look at heads only
    Case("retry_on_head", call(frame(b"hi"), host="retry.test"), Play([up(trailers_only(14)), up(OK)])),
    Case("retry_not_on_trailers", call(frame(b"hi"), host="retry.test"), Play([up(FAILED), up(OK)])),
    Case("retry_not_on_others", call(frame(b"hi"), host="retry.test"), Play([up(trailers_only(7)), up(OK)])),
    # ---- outlier detection looks at heads only
    Case("outlier_by_head", TWICE, up(trailers_only(14))),
    Case("outlier_not_by_trailers", TWICE, up(grpc_answer(frame(b"x"), grpc_status=14))),
    Case("outlier_not_by_client_errors", TWICE, up(trailers_only(3))),
    Case("outlier_by_unknown_status", TWICE, up(trailers_only(77))),
    # ---- access log filter
    Case("log_filter_trailers", call(frame(b"hi")), up(FAILED), on="filtered"),
    Case("log_filter_trailers_ok", call(frame(b"hi")), up(OK), on="filtered"),
    Case("log_filter_head", call(frame(b"hi")), up(trailers_only(13)), on="filtered"),
    Case("log_filter_by_http_status", call(frame(b"hi"), host="dead.test"), on="filtered"),
    Case("log_filter_garbage", call(), up(grpc_answer(grpc_status="soon")), on="filtered"),
    # ---- grpc_stats
    *(
        Case(f"{name}_{on}", request, up(response), on=on)
        for on, path in (
            ("default", "/pkg.Service/Method"),
            ("all", "/pkg.Service/Method"),
            ("times", "/pkg.Service/Method"),
            ("dots", "/pkg.Service/Method"),
            ("some", "/listed.Service/Method"),
        )
        for name, request, response in (
            ("stats_ok", call(frame(b"hi"), frame(b""), frame(b"ho"), path=path), grpc_answer(frame(b"abc") + frame(b"de"), frame(b""), grpc_status=0)),
            ("stats_failed", call(frame(b"hi"), path=path), FAILED),
            ("stats_head_only", call(frame(b"hi"), path=path), trailers_only(7)),
        )
    ),
    Case("stats_split", call(b"\0", b"\0\0", b"\0\5ab", b"cde\0", frame(b"x")[1:]), up(grpc_answer(b"\0\0", b"\0\0\1", b"x\0", grpc_status=0)), on="all"),
    Case("stats_odd_flags", call(frame(b"x", 0x80), frame(b"y", 255)), up(grpc_answer(frame(b"x", 0x80), frame(b"y", 7), grpc_status=0)), on="all"),
    Case("stats_odd_status", call(frame(b"x")), up(grpc_answer(grpc_status="99")), on="all"),
    Case("stats_garbage_status", call(frame(b"x")), up(grpc_answer(grpc_status="soon x")), on="all"),
    Case("stats_zero_zero", call(frame(b"x")), up(grpc_answer(grpc_status="00")), on="all"),
    Case("stats_no_status", call(frame(b"x")), up(grpc_answer(frame(b"y"))), on="all"),
    Case("stats_no_trailers", call(frame(b"x")), up(answer(body=frame(b"y"), content_type="application/grpc")), on="all"),
    Case("stats_both", call(), up(grpc_answer(frame(b"x"), grpc_status=5).replace(b"application/grpc", b"application/grpc\r\ngrpc-status: 3")), on="all"),
    Case("stats_http_error", call(frame(b"x")), up(answer("503 No", b"busy")), on="all"),
    Case("stats_response_is_not_grpc", call(frame(b"x")), up(grpc_answer(frame(b"y"), content_type="text/plain", grpc_status=0)), on="all"),
    Case("stats_request_is_not_grpc", call(frame(b"x"), content_type="text/plain"), up(OK), on="all"),
    Case("stats_request_is_not_grpc_default", call(frame(b"x"), content_type="text/plain"), up(OK), on="default"),
    Case("stats_other_method", call(frame(b"x"), path="/listed.Service/Third"), up(OK), on="some"),
    Case("stats_listed_method", call(frame(b"x"), path="/listed.Service/Other?q=1"), up(OK), on="some"),
    Case("stats_no_method", call(frame(b"x"), path="/method"), up(OK), on="all"),
    Case("stats_no_method_default", call(frame(b"x"), path="/method"), up(OK), on="default"),
    Case("stats_three_parts", call(frame(b"x"), path="/a/b/c"), up(OK), on="all"),
    Case("stats_slashes", call(frame(b"x"), path="//a//b//"), up(OK), on="all"),
    Case("stats_odd_names", call(frame(b"x"), path="/a:b..c/d%20e"), up(OK), on="all"),
    Case("stats_local_reply", call(frame(b"x"), host="dead.test"), on="all"),
    Case("stats_local_reply_times", call(frame(b"x"), host="dead.test"), on="times"),
    Case("stats_direct", call(frame(b"x"), host="direct.test"), on="all"),
    Case("stats_weighted", call(frame(b"x"), host="weighted.test"), up(OK), on="all"),
    Case("stats_no_cluster", call(frame(b"x"), host="unknown.test"), on="all"),
    Case("stats_no_route", call(frame(b"x"), host="none.test"), on="all"),
    Case("stats_upstream_gone", call(frame(b"x")), [Head(), Close()], on="all"),
    tags(),
    Case("connect_unary", call(b"{}", content_type="application/json", headers=("connect-protocol-version: 1",)), up(answer(body=b"{}")), on="all"),
    Case("connect_unary_failed", call(b"{}", content_type="application/json", headers=("connect-protocol-version: 1",)), up(answer("404 No", b"{}")), on="all"),
    Case("connect_unary_empty", req("POST", "/a/b", "connect-protocol-version: 1", "Content-Length: 0"), up(answer(body=b"")), on="all"),
    *(
        Case(f"connect_streaming_{name}", call(*request, content_type=CONNECT), up(grpc_answer(*response, content_type=CONNECT)), on="all")
        for name, request, response in (
            ("ok", [frame(b"x"), frame(b"y")], [frame(b"1") + end_of_connect("{}")]),
            ("split", [frame(b"x")], [b"\2", b"\0\0\0\2{", b"}"]),
            ("failed", [], [end_of_connect('{"error": {"code": "not_found"}}')]),
            ("garbage", [], [end_of_connect("nonsense")]),
            ("without_end", [], [frame(b"x")]),
            ("after_the_end", [], [end_of_connect("{}") + frame(b"x")]),
        )
    ),
    Case("connect_streaming_http_error", call(content_type=CONNECT), up(answer("500 No", b"x")), on="all"),
    Case(
        "connect_streaming_both", call(b"{}", content_type=CONNECT, headers=("connect-protocol-version: 1",)),
        up(grpc_answer(end_of_connect("{}"), content_type=CONNECT)), on="all",
    ),
]  # fmt: skip

test_case = check_cases(CASES)
