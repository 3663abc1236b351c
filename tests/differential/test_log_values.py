"""What log commands say of bytes on the wire, of tries, and of points in time; which events are logged, and as what."""

from __future__ import annotations

import re
from itertools import count as count_from
from typing import Any

from tests.differential.harness import (
    OK,
    Case,
    Close,
    Echo,
    Eof,
    Head,
    Play,
    Request,
    Response,
    Rig,
    Signal,
    Tls,
    Until,
    Wait,
    answer,
    bootstrap,
    check_cases,
    cluster,
    each,
    endpoint,
    file_log,
    filter_,
    get,
    hcm,
    http,
    listener,
    req,
)

BYTES = """
BYTES_RECEIVED BYTES_SENT REQUEST_HEADERS_BYTES RESPONSE_HEADERS_BYTES RESPONSE_TRAILERS_BYTES
UPSTREAM_WIRE_BYTES_SENT UPSTREAM_WIRE_BYTES_RECEIVED UPSTREAM_HEADER_BYTES_SENT UPSTREAM_HEADER_BYTES_RECEIVED
UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED
DOWNSTREAM_WIRE_BYTES_SENT DOWNSTREAM_WIRE_BYTES_RECEIVED DOWNSTREAM_HEADER_BYTES_SENT DOWNSTREAM_HEADER_BYTES_RECEIVED
DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED
""".split()
OUTCOME = """
RESPONSE_CODE RESPONSE_FLAGS RESPONSE_CODE_DETAILS UPSTREAM_CLUSTER UPSTREAM_CLUSTER_RAW UPSTREAM_HOST UPSTREAM_PROTOCOL PROTOCOL
UPSTREAM_REQUEST_ATTEMPT_COUNT UPSTREAM_HOSTS_ATTEMPTED UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT UPSTREAM_HOST_NAMES_ATTEMPTED
UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT ACCESS_LOG_TYPE VIRTUAL_CLUSTER_NAME LOCAL_REPLY_BODY STREAM_ID ROUTE_NAME
UPSTREAM_REMOTE_ADDRESS DOWNSTREAM_LOCAL_CLOSE_REASON DOWNSTREAM_DETECTED_CLOSE_TYPE UPSTREAM_DETECTED_CLOSE_TYPE UPSTREAM_LOCAL_CLOSE_REASON
METADATA(UPSTREAM_HOST:mine:key) METADATA(VIRTUAL_HOST:mine:key) METADATA(LISTENER:mine:key) METADATA(LISTENER_FILTER_CHAIN:mine:key) FILTER_CHAIN_NAME
UPSTREAM_TRANSPORT_FAILURE_REASON LISTENER_NAME ROUTE_RESOLUTION_COUNT
""".split()
# Numbers that differ from run to run; what matters is whether there is one.
MOMENTS = ["DS_RX_BEG", "DS_RX_END", "US_CX_BEG", "US_CX_END", "US_HS_END", "US_TX_BEG", "US_TX_END", "US_RX_BEG", "US_RX_BODY_BEG", "US_RX_END",
           "DS_TX_BEG", "DS_TX_END", "DS_HS_BEG", "DS_HS_END", "DS_RX_HDR_END"]  # fmt: skip
TIMES = """
DURATION REQUEST_DURATION REQUEST_TX_DURATION RESPONSE_DURATION RESPONSE_TX_DURATION DOWNSTREAM_HANDSHAKE_DURATION ROUNDTRIP_DURATION
UPSTREAM_CONNECTION_POOL_READY_DURATION UPSTREAM_CONNECTION_ID UPSTREAM_CONNECTION_IDS_ATTEMPTED CONNECTION_ID ROUTE_RESOLUTION_TIME_US DOWNSTREAM_CX_RTT
""".split() + [f"COMMON_DURATION(DS_RX_BEG:{moment}:ns)" for moment in MOMENTS] + [f"COMMON_DURATION({moment}:DS_TX_END:ns)" for moment in MOMENTS]  # fmt: skip


ATTEMPTED = """
UPSTREAM_HOST UPSTREAM_HOSTS_ATTEMPTED UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT UPSTREAM_HOST_NAMES_ATTEMPTED UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT
UPSTREAM_REQUEST_ATTEMPT_COUNT RESPONSE_FLAGS UPSTREAM_REMOTE_ADDRESS
""".split()


TCP_TIMES = [f"COMMON_DURATION(DS_CX_BEG:{moment}:ns)" for moment in [*MOMENTS, "DS_CX_END"]]


def line(names: list[str]) -> str:
    return "|".join(f"{name}=%{name}%" for name in names) + "|\n"


def mine(value: str) -> dict[str, Any]:
    return {"filter_metadata": {"mine": {"key": value}}}


OTHER_HOST = {"retry_host_predicate": [{"name": "previous", "typed_config": {"@": "previous_hosts"}}], "host_selection_retry_max_attempts": 20}
HOSTS = [{
    "name": "values", "domains": ["a.test", "a.test:80"], "metadata": mine("from-virtual-host"),
    "virtual_clusters": [{"name": "posts", "headers": [{"name": ":method", "string_match": {"exact": "POST"}}]}],
    "routes": [
        {"match": {"path": "/direct"}, "direct_response": {"status": 201, "body": {"inline_string": "made"}}},
        {"match": {"path": "/redirect"}, "redirect": {"path_redirect": "/elsewhere"}},
        {"match": {"path": "/dead"}, "route": {"cluster": "dead"}},
        {"match": {"path": "/missing"}, "route": {"cluster": "missing"}},
        {"match": {"path": "/empty"}, "route": {"cluster": "empty"}},
        {"match": {"path": "/alias"}, "route": {"cluster": "aliased"}},
        {"match": {"path": "/maintenance"}, "route": {"cluster": "full"}},
        {"match": {"path": "/slow"}, "route": {"cluster": "a", "timeout": "0.1s"}},
        {"match": {"path": "/retry"}, "name": "retrying", "route": {"cluster": "a", "retry_policy": {"retry_on": "5xx,reset", "num_retries": 2}}},
        {"match": {"path": "/two"}, "route": {"cluster": "two", "retry_policy": {"retry_on": "5xx", "num_retries": 2, **OTHER_HOST}}},
        {"match": {"path": "/half-once"}, "route": {"cluster": "half"}},
        {"match": {"path": "/weighted"}, "route": {"weighted_clusters": {"clusters": [{"name": "aliased", "weight": 1}]}}},
        {"match": {"path": "/by-header"}, "route": {"cluster_header": "x-cluster"}},
        {"match": {"path": "/tls"}, "route": {"cluster": "tls"}},
        {"match": {"path": "/half"}, "route": {"cluster": "half", "retry_policy": {"retry_on": "5xx", "num_retries": 1, **OTHER_HOST}}},
        {"match": {"path": "/chat"}, "route": {"cluster": "a", "upgrade_configs": [{"upgrade_type": "websocket"}]}},
        {"match": {"connect_matcher": {}}, "route": {"cluster": "a", "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}},
        {"match": {"prefix": "/"}, "route": {"cluster": "a"}},
    ],
}]  # fmt: skip
# No durations in headers: they would make their lengths differ.
ANY_CLUSTER = {"validate_clusters": False}
ROUTER = [filter_("router", suppress_envoy_headers=True)]
DENY = filter_("rbac", rules={"action": "DENY", "policies": {"p": {"permissions": [{"header": {"name": "x-deny", "present_match": True}}],
                                                                   "principals": [{"any": True}]}}})  # fmt: skip
CHECK = filter_("health_check", pass_through_mode=False, headers=[{"name": ":path", "string_match": {"exact": "/healthz"}}])
PASS = filter_("health_check", pass_through_mode=True, headers=[{"name": ":path", "string_match": {"exact": "/healthz"}}])
MAPPERS = {"mappers": [{"filter": {"status_code_filter": {"comparison": {"op": "GE", "value": {"default_value": 400, "runtime_key": "none.such"}}}},
                        "body": {"inline_string": "mapped"}}],
           "body_format": {"text_format_source": {"inline_string": "<%LOCAL_REPLY_BODY%>"}}}  # fmt: skip
WHAT = "%ACCESS_LOG_TYPE% %RESPONSE_CODE% %RESPONSE_FLAGS% %REQ(:PATH)% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% upstream=%UPSTREAM_HOST% %PROTOCOL%\n"


def logged(name: str, *, filters: list[Any] | None = None, log: str = WHAT, **options: Any) -> dict[str, Any]:
    """A listener whose log has a format of its own."""
    return http(name, HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(log)], http_filters=[*(filters or []), *ROUTER], **options)


def tcp(name: str, to: str = "a", log: str = "", file: str = "access.log", **fields: Any) -> dict[str, Any]:
    text = log or "%ACCESS_LOG_TYPE% %RESPONSE_FLAGS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% upstream=%UPSTREAM_HOST% attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT%\n"
    return listener(name, filter_("tcp_proxy", stat_prefix=name, cluster=to, access_log=[file_log(text, file=file)], **fields))


CONFIG = bootstrap(
    http("bytes", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(line(BYTES))], http_filters=ROUTER, proxy_100_continue=True,
         http_protocol_options={"accept_http_10": True, "enable_trailers": True}),
    http("outcome", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(line(OUTCOME))], http_filters=[DENY, *ROUTER],
         listener_fields={"metadata": mine("from-listener")}, generate_request_id=True, preserve_external_request_id=True),
    http("mapped", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log("%RESPONSE_CODE% <%LOCAL_REPLY_BODY%>\n")], http_filters=ROUTER,
         local_reply_config=MAPPERS),
    http("attempted", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(line(ATTEMPTED), file="attempted.log")], http_filters=ROUTER),
    http("times", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(line(TIMES), file="times.log")], http_filters=ROUTER),
    listener("times_tls", chains=[{
        "filters": [hcm("times_tls", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(line(TIMES), file="times_tls.log")], http_filters=ROUTER)],
        "transport_socket": {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": {"tls_certificates": [
            {"certificate_chain": {"filename": "${pem:server}"}, "private_key": {"filename": "${key:server}"}}]}}},
    }]),
    tcp("times_tcp", log=line([name for name in TIMES if "ATTEMPTED" not in name] + TCP_TIMES), file="times_tcp.log"),
    http("trusting", HOSTS, route_config=ANY_CLUSTER, use_remote_address=True,
         internal_address_config={"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}),
    logged("on_request", access_log_options={"flush_access_log_on_new_request": True}),
    logged("on_request_old", flush_access_log_on_new_request=True),
    logged("on_tunnel", access_log_options={"flush_log_on_tunnel_successfully_established": True}),
    http("periodic", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(WHAT, file="periodic.log")], http_filters=ROUTER,
         access_log_options={"access_log_flush_interval": "0.03s"}),
    http("periodic_old", HOSTS, route_config=ANY_CLUSTER, access_log=[file_log(WHAT, file="periodic_old.log")], http_filters=ROUTER,
         access_log_flush_interval="0.03s"),
    logged("heads"),
    logged("heads_idle", stream_idle_timeout="0.1s"),
    logged("heads_timed", request_headers_timeout="0.1s"),
    logged("idle_short", common_http_protocol_options={"idle_timeout": "0.1s"}),
    http("heads_slow", HOSTS, route_config=ANY_CLUSTER, http_filters=ROUTER,
         access_log=[file_log("%REQ(:PATH)% %RESPONSE_CODE%\n", file="heads_slow.log", filter={"duration_filter": {"comparison": {
             "op": "GE", "value": {"default_value": 90, "runtime_key": "none.such"}}}})]),
    logged("checked", filters=[CHECK]),
    logged("checked_through", filters=[PASS]),
    listener("listener_log", filter_("hcm", stat_prefix="listener_log", route_config={"virtual_hosts": HOSTS, **ANY_CLUSTER}, http_filters=ROUTER),
             access_log=[file_log(WHAT)]),
    listener("listener_values", filter_("hcm", stat_prefix="listener_values", route_config={"virtual_hosts": HOSTS, **ANY_CLUSTER}, http_filters=ROUTER),
             access_log=[file_log(line(BYTES + OUTCOME))]),
    listener("listener_log_tcp", filter_("tcp_proxy", stat_prefix="listener_log_tcp", cluster="a"), access_log=[file_log(WHAT)]),
    tcp("tcp"),
    tcp("tcp_dead", "dead"),
    tcp("tcp_connected", access_log_options={"flush_access_log_on_connected": True}),
    tcp("tcp_periodic", file="tcp_periodic.log", access_log_options={"access_log_flush_interval": "0.03s"}),
    tcp("tcp_bytes", log=line(BYTES)),
    tcp("tcp_outcome", log=line([name for name in OUTCOME if "STREAM_ID" not in name])),
    clusters=[
        cluster("a", endpoint("a", metadata=mine("from-host"), hostname="host-a")),
        cluster("dead"),
        cluster("tls", "tls-a", transport_socket={"name": "tls", "typed_config": {"@": "upstream_tls", "sni": "a.test"}}),
        cluster("aliased", alt_stat_name="other_name"),
        cluster("empty", localities=[{"lb_endpoints": []}]),
        cluster("full", "a", circuit_breakers={"thresholds": [{"max_requests": 0}]}),
        cluster("two", endpoint("a", hostname="one.host:80"), endpoint("b", hostname="two.host")),
        cluster("half", endpoint("a", hostname="one.host:80"), endpoint("dead", hostname="two.host")),
    ],
)  # fmt: skip

UP = [Request(), answer(x_one="response-one")]
CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-a:  spaces \r\n\r\n5\r\nhello\r\n0\r\n\r\n"
TRAILERS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-trailer: one\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nx-a: b\r\n\r\nall of it"
WEBSOCKET = get("/chat", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
CHUNKED = req("POST", "/", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n"
ID = "X-Request-Id: 11111111-2222-4333-8444-555555555555"
EXCHANGES: dict[str, tuple[Any, Any]] = {
    "get": (get("/path?a=1", "X-One: something", ID), UP),
    "spaces": (get("/", "X-One:   something \t", "x-two:", ID), UP),
    "repeated": (get("/", "Accept: a", "Accept: b", "X-Mine: a", "X-Mine: b", ID), UP),
    "post": (req("POST", "/", ID, body=b"hello"), UP),
    "chunked": (req("POST", "/", ID, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n", UP),
    "chunked_response": (get("/", ID), [Request(), CHUNKS]),
    "trailers": (get("/", ID, "TE: trailers"), [Request(), TRAILERS]),
    "until_close": ([get("/", ID), Response()], [Request(), UNTIL_CLOSE, Close()]),
    "head": (req("HEAD", "/", ID), [Request(), answer(body=None, content_length="5")]),
    "no_content": (get("/", ID), [Request(), answer("204 No Content", body=None)]),
    "options": (req("OPTIONS", "/", ID), UP),
    "options_with_body": (req("OPTIONS", "/", ID, body=b"hello"), UP),
    "delete": (req("DELETE", "/", ID), UP),
    "put_without_body": (req("PUT", "/", ID), UP),
    "direct": (get("/direct", ID), UP),
    "redirect": (get("/redirect", ID), UP),
    "no_route": (get("/", ID, host="none.test"), UP),
    "missing": (get("/missing", ID), UP),
    "empty": (get("/empty", ID), UP),
    "full": (get("/maintenance", ID), UP),
    "alias": (get("/alias", ID), UP),
    "dead": (get("/dead", ID), UP),
    "timeout": (get("/slow", ID), [Request(), Eof()]),
    "torn": (get("/", ID), [Request(), Close()]),
    "garbage": ([get("/", ID), Response()], [Request(), b"nonsense\r\n\r\n"]),
    "retried": (get("/retry", ID), each([Request(), answer("503 X", body=b"no")], [Request(), answer("500 Y")], UP)),
    "retried_in_vain": (get("/retry", ID), each([Request(), answer("503 X")])),
    "retried_after_reset": (get("/retry", ID), each([Request(), Close()], UP)),
    "denied": (get("/", "X-Deny: yes", ID), UP),
    "denied_weighted": (get("/weighted", "X-Deny: yes", ID), UP),
    "denied_by_header": (get("/by-header", "X-Deny: yes", "X-Cluster: a", ID), UP),
    "denied_missing": (get("/missing", "X-Deny: yes", ID), UP),
    "denied_no_header": (get("/by-header", "X-Deny: yes", ID), UP),
    "denied_direct": (get("/direct", "X-Deny: yes", ID), UP),
    "denied_redirect": (get("/redirect", "X-Deny: yes", ID), UP),
    "denied_no_route": (get("/", "X-Deny: yes", ID, host="none.test"), UP),
    "denied_alias": (get("/alias", "X-Deny: yes", ID), UP),
    "no_cluster_header": (get("/by-header", ID), UP),
    "missing_host": ([b"GET / HTTP/1.1\r\n\r\n", Response()], UP),
    "invalid": ([b"GET / HTTP/1.1\r\nX Y: z\r\n\r\n", Response()], UP),
    "upgrade_refused": (get("/", "Connection: Upgrade", "Upgrade: websocket", ID), UP),
}


def cases_of(on: str) -> list[Case]:
    return [
        Case(f"{on}_{name}", steps, up, on=on, skip=("stats", "upstream"))
        for name, (steps, up) in EXCHANGES.items()
    ]  # fmt: skip


def times(on: str, *requests: bytes, tls: Tls | None = None, answer: bytes = b"") -> Case:
    """Numbers become N: whether there is one is what is compared, not which."""

    async def run(rig: Rig) -> list[str]:
        for request in requests:
            wire = await rig.connect(on, tls)
            if answer:
                wire.send(request)
                await wire.until(lambda wire=wire: answer in wire.received)
            else:
                await rig.exchange(wire, request)
            wire.close()
        return re.sub(r"-?\d+", "N", await rig.wait_lines(f"{on}.log", len(requests))).replace("|", "|\n").splitlines()

    play = Play([[Until(b"hello"), b"hello", Eof(), Close()]], on_connect=True) if answer else Play([[Request(), OK]])
    return Case(on, run, play, skip=("log", "stats", "upstream"))


async def slow_head(rig: Rig) -> str:
    """A request begins with its first byte: what a timeout takes that runs meanwhile is part of its duration."""
    wire = await rig.connect("heads_slow")
    wire.send(get("/one")[:20])
    await rig.get(get("/")[:20], "heads_idle")
    wire.send(get("/one")[20:])
    await wire.until(lambda: b"ok" in wire.received)
    return await rig.wait_lines("heads_slow.log", 1)


async def idle_after_a_long_request(rig: Rig) -> list[str]:
    """A request that takes longer than the idle timeout does not keep it from running afterwards."""
    wire = await rig.connect("idle_short")
    wire.send(get("/"))
    for _ in range(2):
        await rig.get(get("/")[:20], "heads_idle")
    rig.signals["go"].set()
    await wire.until(lambda: False)
    return [rig.normaliser.bytes(bytes(wire.received)), str(wire.end)]


async def alternative_stats(rig: Rig) -> list[str]:
    """The names of what is counted under the name that a trusted client gives."""
    for path in ("/", "/dead", "/direct", "/slow"):
        await rig.get(get(path, "X-Envoy-Upstream-Alt-Stat-Name: alternative"), "trusting")
    await rig.get(get("/", "X-Envoy-Upstream-Alt-Stat-Name: outside"), "bytes")
    await rig.settled()
    _, text = await rig.proxy.admin("GET", "/stats?usedonly&filter=alternative|outside")
    return [re.sub(r": P0.*", "", line) for line in text.splitlines()]


def until_logged(on: str, request: bytes, last: str) -> Case:
    """An exchange whose answer waits until the periodic log has been written twice; the first line and the last one."""

    async def run(rig: Rig) -> list[str]:
        wire = await rig.connect(on)
        wire.send(request)
        await rig.wait_lines(f"{on}.log", 2)
        rig.signals["go"].set()
        await wire.until(lambda: b"ok" in wire.received)
        wire.close()
        text = ""
        for count in count_from(2):
            text = await rig.wait_lines(f"{on}.log", count)
            if last in text:
                break
        lines = text.splitlines()
        return [rig.normaliser.line(line) for line in (lines[0], lines[1], lines[-1])]

    answer_late = [Until(b"x"), Wait("go"), OK]
    play = Play([[*answer_late, Eof(), Close()]], on_connect=True) if on.startswith("tcp") else Play([answer_late])
    return Case(on, run, play, skip=("log", "stats", "upstream"))


async def hosts_attempted(rig: Rig) -> list[str]:
    """Which host is first is a matter of chance: what is compared is the set of lines over many requests."""
    lines = set()
    for count, path in enumerate(["/two"] * 4 + ["/half", "/half", "/half-once"] * 4, 1):
        await rig.get(get(path), "attempted")
        text = await rig.wait_lines("attempted.log", count)
        lines.add(rig.normaliser.line(text.splitlines()[-1]))
    return sorted(lines)


END = b"\r\n\r\n"
PIPELINE = get("/one", ID) + get("/second", ID)
CASES = [
    *cases_of("bytes"),
    *cases_of("outcome"),
    *[Case(f"mapped_{name}", *EXCHANGES[name], on="mapped", skip=("stats", "upstream")) for name in ("get", "direct", "no_route", "dead")],
    Case("bytes_of_repetitions", [get("/", ID), Response(), get("/", ID), Response(), get("/", ID), Response()], UP, on="bytes", skip=("stats", "upstream")),
    Case("repetitions_on_metered_upstreams", [get("/"), Response()] * 5, UP, on="trusting", skip=("upstream",)),
    Case("bytes_pipelined", [PIPELINE, Response(), Response()], UP, on="bytes", skip=("stats", "upstream")),
    Case("bytes_pipelined_direct", [get("/direct", ID) + get("/direct", ID), Response(), Response()], on="bytes", skip=("stats", "upstream")),
    Case("bytes_of_old_client", [req("GET", "/", ID, version="1.0"), Response()], UP, on="bytes", then="closed", skip=("stats", "upstream")),
    Case("bytes_continue", [req("POST", "/", "Expect: 100-continue", "Content-Length: 5", ID), Until(END), b"hello", Response()],
         [Head(), b"HTTP/1.1 100 Continue\r\n\r\n", Until(b"hello"), OK], on="bytes", skip=("stats", "upstream")),
    Case("bytes_of_tunnel", [WEBSOCKET, Until(END), b"hello", Until(b"hello"), Close()], [Head(), SWITCH, Echo()], on="bytes",
         skip=("stats", "upstream")),
    Case("bytes_client_gone", [req("POST", "/", ID, "Content-Length: 10") + b"hello", Wait("there"), Close()],
         [Head(), Until(b"hello"), Signal("there"), Eof()], on="bytes", skip=("stats", "upstream")),
    Case("hosts_attempted", hosts_attempted, each([Request(), answer("503 X")]), skip=("log", "stats", "upstream")),
    times("times", get("/"), get("/"), req("POST", "/", body=b"x"), get("/direct"), get("/dead"), get("/slow"), get("/retry"), get("/none", host="none.test"),
          get("/empty"), get("/maintenance")),
    times("times_tls", get("/tls"), get("/tls"), get("/direct"), tls=Tls()),
    times("times_tcp", b"hello", answer=b"hello"),
    Case("alternative_stats", alternative_stats, each([Request(), answer(x_envoy_upstream_canary="true")]), skip=("log", "stats", "upstream")),
    Case("head_cut_short", [get("/")[:20], Close()], on="heads"),
    Case("head_cut_short_in_the_first_line", [get("/")[:3], Close()], on="heads"),
    Case("head_cut_short_later", [get("/"), Response(), get("/")[:20], Close()], UP, on="heads", skip=("upstream",)),
    Case("head_cut_short_in_a_pipeline", [get("/one") + get("/two")[:20], Response(), Close()], UP, on="heads", skip=("upstream",)),
    Case("head_cut_short_after_a_direct_response", [get("/direct") + get("/two")[:20], Response(), Close()], on="heads"),
    Case("head_in_pieces", [get("/")[:20], get("/")[20:], Response()], UP, on="heads", skip=("upstream",)),
    Case("head_that_stops", [get("/")[:20], Response()], on="heads_idle", then="closed"),
    Case("head_that_stops_later", [get("/"), Response(), get("/")[:20], Response()], UP, on="heads_idle", then="closed", skip=("upstream",)),
    Case("head_out_of_time", [get("/")[:20], Response()], on="heads_timed", then="closed"),
    Case("idle_after_a_long_request", idle_after_a_long_request, [Request(), Wait("go"), OK], skip=("log", "stats", "upstream")),
    Case("slow_head", slow_head, UP, skip=("log", "stats", "upstream")),
    until_logged("periodic", req("POST", "/", body=b"x"), "DownstreamEnd"),
    until_logged("periodic_old", req("POST", "/", body=b"x"), "DownstreamEnd"),
    until_logged("tcp_periodic", b"x", "TcpConnectionEnd"),
    Case("on_request", get("/"), UP, on="on_request", skip=("stats", "upstream")),
    Case("on_request_old", get("/"), UP, on="on_request_old", skip=("stats", "upstream")),
    Case("on_request_direct", get("/direct"), UP, on="on_request", skip=("stats", "upstream")),
    Case("on_request_no_route", get("/", host="none.test"), UP, on="on_request", skip=("stats", "upstream")),
    Case("on_request_post", req("POST", "/", body=b"hello"), UP, on="on_request", skip=("stats", "upstream")),
    Case("on_request_invalid", [b"GET / HTTP/1.1\r\nX Y: z\r\n\r\n", Response()], on="on_request", then="closed", skip=("stats", "upstream")),
    Case("on_request_missing_host", [b"GET / HTTP/1.1\r\n\r\n", Response()], on="on_request", then="closed", skip=("stats", "upstream")),
    Case("on_tunnel", [WEBSOCKET, Until(END), b"hello", Until(b"hello"), Close()], [Head(), SWITCH, Echo()], on="on_tunnel", skip=("stats", "upstream")),
    Case("on_tunnel_refused", WEBSOCKET, [Head(), answer("403 No")], on="on_tunnel", skip=("stats", "upstream")),
    Case("on_tunnel_get", get("/"), UP, on="on_tunnel", skip=("stats", "upstream")),
    Case("on_tunnel_connect", [req("CONNECT", "a.test:80", host="a.test:80"), Until(END), b"hello", Until(b"hello"), Close()],
         Play([[Echo()]], on_connect=True), on="on_tunnel", skip=("stats", "upstream")),
    Case("health_check", [get("/healthz"), Response(), get("/other"), Response()], UP, on="checked", skip=("upstream",)),
    Case("health_check_through", [get("/healthz"), Response(), get("/other"), Response()], UP, on="checked_through", skip=("upstream",)),
    Case("options_stays_as_it_is", req("OPTIONS", "/"), UP, on="bytes", skip=("log",)),
    Case("options_asterisk", req("OPTIONS", "*"), UP, on="bytes", skip=("log",)),
    Case("listener_log", [get("/"), Response(), get("/"), Response(), Close()], UP, on="listener_log", skip=("stats", "upstream")),
    Case("listener_values", [get("/", ID), Response(), req("POST", "/dead", ID, body=b"hello"), Response(), Close()], UP, on="listener_values",
         skip=("stats", "upstream")),
    Case("listener_log_no_request", [Close()], UP, on="listener_log", skip=("stats", "upstream")),
    Case("listener_log_tcp", [b"hello", Until(b"hello"), Close()], Play([[Echo()]], on_connect=True), on="listener_log_tcp", skip=("stats", "upstream")),
    Case("tcp", [b"hello", Until(b"hello"), Close()], Play([[Echo()]], on_connect=True), on="tcp", skip=("stats", "upstream")),
    Case("tcp_dead", [b"hello"], on="tcp_dead", then="closed", skip=("stats", "upstream")),
    Case("tcp_connected", [b"hello", Until(b"hello"), Close()], Play([[Echo()]], on_connect=True), on="tcp_connected", skip=("stats", "upstream")),
    Case("tcp_bytes", [b"hello", Until(b"hello"), Close()], Play([[Echo()]], on_connect=True), on="tcp_bytes", skip=("stats", "upstream")),
    Case("tcp_outcome", [b"hello", Until(b"hello"), Close()], Play([[Echo()]], on_connect=True), on="tcp_outcome", skip=("stats", "upstream")),
]  # fmt: skip

test_case = check_cases(CASES)
