"""Access logs: command operators in text and JSON, their defaults, lengths and types; filters."""

import re
import socket
from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Eof,
    Request,
    Response,
    Rig,
    answer,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    http,
    req,
    y,
)

HOSTS = [
    {"name": "named-host", "domains": ["a.test"], "routes": [
        {"name": "named-route", "match": {"path": "/named"}, "route": {"cluster": "a", "prefix_rewrite": "/rewritten"},
         "metadata": {"filter_metadata": {"mine": {"key": "value", "list": [1, 2], "nested": {"deep": True}}}}},
        {"match": {"path": "/direct"}, "direct_response": {"status": 201, "body": {"inline_string": "made"}}},
        {"match": {"path": "/dead"}, "route": {"cluster": "dead"}},
        {"match": {"path": "/slow"}, "route": {"cluster": "a", "timeout": "0.2s"}},
        {"match": {"path": "/retry"}, "route": {"cluster": "a", "retry_policy": {"retry_on": "5xx"}}},
        {"match": {"prefix": "/"}, "route": {"cluster": "a"}},
    ]},
]  # fmt: skip

OPERATORS = """
PROTOCOL RESPONSE_CODE RESPONSE_CODE_DETAILS RESPONSE_FLAGS RESPONSE_FLAGS_LONG BYTES_RECEIVED BYTES_SENT CONNECTION_TERMINATION_DETAILS UPSTREAM_HOST
UPSTREAM_HOST_NAME UPSTREAM_HOST_NAME_WITHOUT_PORT UPSTREAM_CLUSTER UPSTREAM_CLUSTER_RAW UPSTREAM_REMOTE_ADDRESS UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT
UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT UPSTREAM_TRANSPORT_FAILURE_REASON UPSTREAM_REQUEST_ATTEMPT_COUNT UPSTREAM_TLS_VERSION UPSTREAM_TLS_CIPHER
UPSTREAM_PROTOCOL DOWNSTREAM_REMOTE_ADDRESS DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT
DOWNSTREAM_LOCAL_ADDRESS DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT REQUESTED_SERVER_NAME ROUTE_NAME VIRTUAL_CLUSTER_NAME FILTER_CHAIN_NAME
DOWNSTREAM_TLS_VERSION DOWNSTREAM_TLS_CIPHER DOWNSTREAM_PEER_SUBJECT DOWNSTREAM_PEER_URI_SAN DOWNSTREAM_PEER_CERT DOWNSTREAM_TRANSPORT_FAILURE_REASON
GRPC_STATUS GRPC_STATUS_NUMBER ACCESS_LOG_TYPE
REQ(:METHOD) REQ(:PATH) REQ(:AUTHORITY) REQ(X-ENVOY-ORIGINAL-PATH?:PATH) REQ(X-ONE) REQ(X-NONE) REQ(X-ONE):3 REQ(X-MANY) RESP(X-ONE) RESP(:STATUS) RESP(X-NONE)
TRAILER(X-ONE) GRPC_STATUS(SNAKE_STRING) PATH PATH(WQ) PATH(NQ) PATH(WQ:ORIG) PATH(NQ:PATH) QUERY_PARAM(a) QUERY_PARAM(none) QUERY_PARAMS QUERY_PARAMS(DECODED)
REQUEST_HEADERS_BYTES RESPONSE_TRAILERS_BYTES START_TIME(%Y) START_TIME_LOCAL(%Y) EMIT_TIME(%Y) ENVIRONMENT(NOT_SET_ANYWHERE) ENVIRONMENT(NOT_SET_ANYWHERE):3
DYNAMIC_METADATA(com.none) DYNAMIC_METADATA(com.none:key) CLUSTER_METADATA(mine) CLUSTER_METADATA(mine:key) CLUSTER_METADATA(mine:none)
UPSTREAM_METADATA(mine:key) METADATA(ROUTE:mine:key) METADATA(ROUTE:mine:list) METADATA(ROUTE:mine:nested) METADATA(ROUTE:mine) METADATA(CLUSTER:mine:key)
METADATA(LISTENER:mine:key) METADATA(UPSTREAM_HOST:mine:key) METADATA(VIRTUAL_HOST:mine:key) FILTER_STATE(none) FILTER_STATE(none:PLAIN)
UPSTREAM_WIRE_BYTES_RECEIVED DOWNSTREAM_WIRE_BYTES_RECEIVED
""".split()
CHANGING = """DURATION REQUEST_DURATION REQUEST_TX_DURATION RESPONSE_DURATION RESPONSE_TX_DURATION DOWNSTREAM_HANDSHAKE_DURATION
ROUNDTRIP_DURATION START_TIME START_TIME(%s.%3f) START_TIME(%FT%TZ) START_TIME(%H:%M:%E3S) START_TIME(%d/%b/%Y:%H:%M:%S.%9f)
COMMON_DURATION(DS_RX_BEG:US_TX_BEG:ms) COMMON_DURATION(DS_RX_BEG:DS_TX_END:us) COMMON_DURATION(US_RX_BEG:US_RX_END:ns) CONNECTION_ID STREAM_ID
UNIQUE_ID HOSTNAME UPSTREAM_CONNECTION_ID DOWNSTREAM_REMOTE_PORT DOWNSTREAM_DIRECT_REMOTE_PORT DOWNSTREAM_LOCAL_PORT
UPSTREAM_REMOTE_PORT UPSTREAM_LOCAL_ADDRESS RESPONSE_HEADERS_BYTES DOWNSTREAM_WIRE_BYTES_SENT UPSTREAM_WIRE_BYTES_SENT UPSTREAM_HEADER_BYTES_SENT""".split()
TEXT = "".join(f"{operator.replace('%', '')}=%{operator}%|" for operator in OPERATORS) + "\n"
SHAPES = "".join(f"{operator.replace('%', '')}=<%{operator}%>|" for operator in CHANGING) + "\n"
JSON = y("""
code: "%RESPONSE_CODE%"
code_text: "%RESPONSE_CODE% is it"
flags: "%RESPONSE_FLAGS%"
bytes: "%BYTES_SENT%"
method: "%REQ(:METHOD)%"
path: "%REQ(:PATH)%"
none: "%REQ(X-NONE)%"
both: "%REQ(X-NONE)% and %PROTOCOL%"
one: "%REQ(X-ONE)%"
cut: "%REQ(X-ONE):3%"
upstream: "%UPSTREAM_CLUSTER%"
attempts: "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"
constant: plain text
percent: "100%%"
number: 42
boolean: true
nothing: null
nested: {inner: "%PROTOCOL%", deeper: {code: "%RESPONSE_CODE%"}}
list: ["%PROTOCOL%", 7, "x"]
metadata: "%METADATA(ROUTE:mine)%"
metadata_key: "%METADATA(ROUTE:mine:key)%"
metadata_list: "%METADATA(ROUTE:mine:list)%"
no_metadata: "%DYNAMIC_METADATA(com.none)%"
unicode: "caf\\u00e9"
""")


def log_when(filter_text: str) -> list[dict[str, Any]]:
    """A log with a filter, that says only the code and path."""
    return [file_log("logged %RESPONSE_CODE% %REQ(:PATH)%\n", filter=y(filter_text))]


def comparison(op: str, value: int) -> str:
    return f"{{comparison: {{op: {op}, value: {{default_value: {value}, runtime_key: none.such}}}}}}"


FILTERS = {
    "status_ge_400": f"status_code_filter: {comparison('GE', 400)}",
    "status_eq_200": f"status_code_filter: {comparison('EQ', 200)}",
    "status_le_201": f"status_code_filter: {comparison('LE', 201)}",
    "status_ne_200": f"status_code_filter: {comparison('NE', 200)}",
    "duration_ge_40": f"duration_filter: {comparison('GE', 40)}",
    "duration_le_40": f"duration_filter: {comparison('LE', 40)}",
    "duration_ge_9000": f"duration_filter: {comparison('GE', 9000)}",
    "duration_le_9000": f"duration_filter: {comparison('LE', 9000)}",
    "not_health_check": "not_health_check_filter: {}",
    "traceable": "traceable_filter: {}",
    "runtime_none": "runtime_filter: {runtime_key: none.such, percent_sampled: {numerator: 0}}",
    "runtime_all": "runtime_filter: {runtime_key: none.such, percent_sampled: {numerator: 100}}",
    "and": f"and_filter: {{filters: [{{status_code_filter: {comparison('GE', 200)}}}, {{header_filter: {{header: {{name: x-log, present_match: true}}}}}}]}}",
    "or": f"or_filter: {{filters: [{{status_code_filter: {comparison('GE', 500)}}}, {{header_filter: {{header: {{name: x-log, present_match: true}}}}}}]}}",
    "header": "header_filter: {header: {name: x-log, string_match: {exact: 'yes'}}}",
    "flag_uf": "response_flag_filter: {flags: [UF]}",
    "flag_ut_or_dc": "response_flag_filter: {flags: [UT, DC]}",
    "flag_any": "response_flag_filter: {}",
    "grpc_unavailable": "grpc_status_filter: {statuses: [UNAVAILABLE]}",
    "grpc_excluded": "grpc_status_filter: {statuses: [UNAVAILABLE], exclude: true}",
    "log_type_end": "log_type_filter: {types: [DownstreamEnd]}",
    "log_type_start": "log_type_filter: {types: [DownstreamStart]}",
}
# What most logs say. The same request again and again, and requests that differ in their paths and ids, go short ways of their own (meshproxy.http.plan).
USUAL = (
    "START_TIME(%Y) REQ(:METHOD) REQ(X-ENVOY-ORIGINAL-PATH?:PATH) PROTOCOL RESPONSE_CODE RESPONSE_FLAGS RESPONSE_CODE_DETAILS BYTES_RECEIVED BYTES_SENT "
    "REQ(X-FORWARDED-FOR) REQ(X-ONE) REQ(X-MANY) REQ(:AUTHORITY) UPSTREAM_HOST UPSTREAM_CLUSTER ROUTE_NAME RESP(X-ONE) RESP(X-NONE) "
    "UPSTREAM_REQUEST_ATTEMPT_COUNT DOWNSTREAM_LOCAL_ADDRESS UPSTREAM_TRANSPORT_FAILURE_REASON CONNECTION_TERMINATION_DETAILS"
).split()
METADATA = {"filter_metadata": {"mine": {"key": "from-cluster"}}}
CONFIG = bootstrap(
    http("text", HOSTS, access_log=[file_log(TEXT)], listener_fields={"metadata": {"filter_metadata": {"mine": {"key": "from-listener"}}}}),
    http("shapes", HOSTS, access_log=[file_log(SHAPES, file="shapes.log")]),
    http("default", HOSTS, access_log=[{"name": "file", "typed_config": {"@": "file_log", "path": "${file:default.log}"}}]),
    http("json", HOSTS, access_log=[file_log(log_format={"json_format": JSON})]),
    http("json_omit", HOSTS, access_log=[file_log(log_format={"json_format": JSON, "omit_empty_values": True})]),
    http("json_content_type", HOSTS, access_log=[file_log(log_format={"json_format": {"b": "%PROTOCOL%", "a": "%RESPONSE_CODE%"}, "content_type": "x/y"})]),
    http("text_omit", HOSTS, access_log=[
        file_log(log_format={"text_format_source": {"inline_string": "[%REQ(X-NONE)%] %PROTOCOL%\n"}, "omit_empty_values": True})]),
    http("old_format", HOSTS, access_log=[file_log(log_format={"text_format": "old %PROTOCOL% %REQ(X-NONE)%\n"})]),
    http("two_logs", HOSTS, access_log=[file_log("first %RESPONSE_CODE%\n"), file_log("second %PROTOCOL%\n")]),
    http("health", HOSTS, access_log=log_when(FILTERS["not_health_check"]), filters=[
        filter_("health_check", pass_through_mode=False, headers=[{"name": ":path", "string_match": {"exact": "/healthz"}}])]),
    *[
        http(f"usual_{name}", HOSTS, access_log=[file_log(log_format=log_format)], use_remote_address=True)
        for name, log_format in {
            "text": {"text_format": "".join(f"{operator.replace('%', '')}=%{operator}%|" for operator in USUAL) + "%REQ(X-REQUEST-ID)%\n"},
            "json": {"json_format": {f"{operator} 100%": f"%{operator}%" for operator in [*USUAL, "REQ(X-REQUEST-ID)"]}},
            "more": {"text_format": "%RESPONSE_CODE% %REQ(:PATH)% %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\n"},
        }.items()
    ],
    *[http(f"filter_{name}", HOSTS, access_log=log_when(text)) for name, text in FILTERS.items()],
    clusters=[cluster("a", metadata=METADATA), cluster("dead")],
)  # fmt: skip

UP = [Request(), answer(x_one="response-one", x_many="r")]
LINES = ["X-One: something", "X-Many: a", "X-Many: b"]
REQUESTS = {
    "get": (get("/path?a=1&b=%20x", *LINES), UP),
    "named": (get("/named?a=b", *LINES), UP),
    "post": (req("POST", "/", *LINES, body=b"hello"), UP),
    "direct": (get("/direct", *LINES), UP),
    "dead": (get("/dead", *LINES), UP),
    "no_route": (get("/x", host="other.test"), UP),
    "timeout": (get("/slow"), [Request(), Eof()]),
    "quotes": (get('/"quo\\ted"', 'X-One: a"b\\c', "X-Many: tab\there"), UP),
    "obs_text": (get("/caf\xe9", "X-One: caf\xe9"), UP),
    "utf8": (get("/", "X-One: \xc3\xa9\xe2\x82\xac"), UP),
    "grpc": (req("POST", "/s/m", "Content-Type: application/grpc"), [Request(), answer(body=b"", content_type="application/grpc", grpc_status="14")]),
    "grpc_ok": (req("POST", "/s/m", "Content-Type: application/grpc"), [Request(), answer(body=b"", content_type="application/grpc", grpc_status="0")]),
    "not_grpc": (get("/"), [Request(), answer(grpc_status="5")]),
    "retried": (get("/retry"), [Request(), answer("503 X")]),
}
SAME = [get("/named?a=b", *LINES, "X-Request-Id: 7f1c2d3e-4b5a-4c6d-8e9f-000000000001"), Response()]
NEW = [part for number in range(5) for part in (get(f'/a"{number}', *LINES, f"X-Request-Id: 7f1c2d3e-4b5a-4c6d-8e9f-00000000000{number}"), Response())]
INVALID = b"GET / HTTP/1.1\r\nX Y: z\r\n\r\n"


async def shapes(rig: Rig) -> str:
    """Values that differ from run to run: digits become N (how many does not matter), a host name H."""
    await rig.get(get("/named"), "shapes")
    await rig.get(get("/direct"), "shapes")
    await rig.get(get("/"), "default")
    text = await rig.wait_lines("shapes.log", 2) + await rig.wait_lines("default.log", 1)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text).replace(socket.gethostname(), "H")
    return re.sub(r"\b(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\b", "MON", re.sub(r"\d+", "N", text)).replace("|", "|\n")


CASES = [
    *[
        Case(f"{on}_{name}", request, up, on=on, skip=("stats", "upstream"))
        for on in ("text", "json") for name, (request, up) in REQUESTS.items()
    ],
    Case("text_invalid", [INVALID, Response()], on="text", then="closed"),
    Case("json_invalid", [INVALID, Response()], on="json", then="closed"),
    Case("json_omit_empty", REQUESTS["get"][0], UP, on="json_omit"),
    Case("json_keys_sorted", get("/"), on="json_content_type"),
    Case("text_omit_empty", get("/"), on="text_omit"),
    Case("text_format_of_old", get("/"), on="old_format"),
    Case("two_logs", get("/"), on="two_logs"),
    Case("client_gone", [get("/"), Close()], on="text", skip=("log", "stats", "upstream"), note="a race by nature"),
    Case("health_check_not_logged", [get("/healthz"), Response(), get("/other"), Response()], on="health"),
    *[
        Case(f"filter_{name}_on_{what}", request, up, on=f"filter_{name}", skip=("stats", "upstream"))
        for name in FILTERS
        for what, (request, up) in {
            "200": (get("/"), [Request(), OK]),
            "404": (get("/"), [Request(), answer("404 Not Found")]),
            "dead": (get("/dead"), [Request(), OK]),
            "header": (get("/", "X-Log: yes"), [Request(), OK]),
            "grpc": REQUESTS["grpc"],
            "timeout": (get("/slow"), [Request(), Eof()]),
        }.items()
        if what == "timeout" or not name.endswith("_40")  # any other exchange may or may not take so long
    ],
    *[
        Case(f"{what}_{on}", steps, [part for _ in range(6) for part in up], on=f"usual_{on}", skip=("stats", "upstream"))
        for on in ("text", "json", "more")
        for what, steps, up in (
            ("same", SAME * 6, UP),
            ("new", NEW, UP),
            ("same_404", SAME * 6, [Request(), answer("404 Not Found", x_one="none")]),
            ("same_503", SAME * 6, [Request(), answer("503 Service Unavailable")]),
            ("same_then_other", SAME * 4 + NEW + SAME * 2, UP * 2),
        )
    ],
    Case("shapes_of_changing_values", shapes, UP, skip=("log", "stats", "upstream")),
]  # fmt: skip

test_case = check_cases(CASES)
