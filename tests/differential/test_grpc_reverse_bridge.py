"""`grpc_http1_reverse_bridge`: gRPC clients in front of services that know HTTP only. Clients speak HTTP/1.1 with trailers, or HTTP/2."""

from __future__ import annotations

from typing import Any

from tests.differential.grpc_wire import OPTIONS, TRAILERS, call, frame, grpc_answer
from tests.differential.harness import (
    Body,
    Case,
    Close,
    Ended,
    Open,
    Request,
    answer,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    grpc_head,
    h2_case,
    http,
    req,
    to,
)  # fmt: skip

PROTOBUF = "application/x-protobuf"
LOG = "%REQ(:PATH)% %RESPONSE_CODE% grpc=%GRPC_STATUS% flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT%\n"
HOSTS = [
    {**to("a", "a.test")[0], "name": "a"},
    {**to("dead", "dead.test")[0], "name": "dead"},
    {
        **to("a", "off.test")[0], "name": "off",
        "typed_per_filter_config": {"grpc_http1_reverse_bridge": {"@": "grpc_http1_reverse_bridge_per_route", "disabled": True}},
    },
]  # fmt: skip
STATS = filter_("grpc_stats", stats_for_all_methods=True)


def listener(name: str, *filters: dict, **fields: Any) -> dict:
    bridge = filter_("grpc_http1_reverse_bridge", content_type=PROTOBUF, **fields)
    return http(name, HOSTS, access_log=[file_log(LOG)], filters=[*filters, bridge], http_protocol_options=TRAILERS)


CONFIG = bootstrap(
    listener("main"),
    listener("withholding", withhold_grpc_frames=True),
    listener("sized", withhold_grpc_frames=True, response_size_header="X-Size"),
    listener("counted", STATS, withhold_grpc_frames=True),
    clusters=[cluster("a", typed_extension_protocol_options=OPTIONS), cluster("dead")],
)

HELLO = frame(b"hello")


def up(response: bytes) -> list:
    return [Request(), response]


def plain(body: bytes = b"world", status: str = "200 OK", **headers: str) -> bytes:
    return answer(status, body, content_type=PROTOBUF, **headers)


def h2_call(name: str, response: bytes, *, on: str = "withholding", **fields: Any) -> Case:
    return h2_case(f"h2_{name}", Open(grpc_head(authority="a.test"), end=False), Body(HELLO), Ended(), up=up(response), on=on, **fields)


CASES = [
    *(
        Case(f"{name}_{on}", request, up(response), on=on)
        for on in ("main", "withholding")
        for name, request, response in (
            ("length", req("POST", "/s/m", "Content-Type: application/grpc+proto", body=HELLO), plain()),
            ("chunked", call(HELLO), grpc_answer(b"wor", b"ld", content_type=PROTOBUF)),
            ("chunked_with_trailers", call(HELLO), grpc_answer(b"wor", b"ld", content_type=PROTOBUF, x_more=1, grpc_status=9)),
            ("error", call(HELLO), plain(b"why", "404 No")),
            ("accepted", call(HELLO), plain(b"why", "202 Accepted")),
            ("no_body", call(HELLO), plain(b"")),
            ("no_body_error", call(HELLO), plain(b"", "503 No")),
            ("other_type", call(HELLO), answer(body=b"page", content_type="text/html")),
            ("no_type", call(HELLO), answer("500 No", b"page")),
            ("parameter", call(HELLO), answer(body=b"x", content_type=f"{PROTOBUF}; a=b")),
            ("not_grpc", req("POST", "/s/m", "Content-Type: text/plain", body=HELLO), plain()),
            ("refused", call(HELLO, host="dead.test"), b""),
            ("off", call(HELLO, host="off.test"), plain()),
            ("empty_request", req("POST", "/s/m", "Content-Type: application/grpc", "Content-Length: 0"), plain()),
        )
    ),
    Case("short_request", call(b"\0\0\0"), up(plain()), on="withholding"),
    Case("reset_in_the_body", call(HELLO), [*up(plain()[:-2]), Close()], on="withholding", then="leave"),
    Case("counted", call(HELLO), up(plain()), on="counted"),
    Case("size", call(HELLO), up(plain(x_size="5")), on="sized"),
    Case("size_chunked", call(HELLO), up(grpc_answer(b"wor", b"ld", content_type=f"{PROTOBUF}\r\nx-size: 5")), on="sized"),
    Case("size_missing", call(HELLO), up(plain()), on="sized"),
    Case("size_garbage", call(HELLO), up(plain(x_size="five")), on="sized"),
    Case("size_no_body", call(HELLO), up(plain(b"", x_size="0")), on="sized"),
    h2_call("length", plain()),
    h2_call("chunked", grpc_answer(b"wor", b"ld", content_type=PROTOBUF)),
    h2_call("error", plain(b"why", "404 No")),
    h2_call("no_body", plain(b"", "503 No")),
    h2_call("other_type", answer(body=b"page", content_type="text/html")),
    h2_call("unchanged", plain(), on="main"),
    h2_call("size", plain(x_size="5"), on="sized"),
]  # fmt: skip

test_case = check_cases(CASES)
