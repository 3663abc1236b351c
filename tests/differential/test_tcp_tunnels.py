"""TCP proxies that carry their connections in HTTP requests (`tunneling_config`): CONNECT and POST, over HTTP/1.1 and HTTP/2; how tunnels begin and end.

A POST over HTTP/1.1 whose response ends is not here, since Envoy 1.40 dies of it: see tests/unit/test_tcp_tunnels.py.
"""

from __future__ import annotations

import re
from typing import Any

from tests.differential import http2_wire as h2
from tests.differential.harness import (
    Case,
    Close,
    Data,
    Echo,
    EchoData,
    Ended,
    Eof,
    Frame,
    GoAway,
    Got,
    HalfClose,
    Head,
    Headers,
    Heard,
    Idle,
    Play,
    Reset,
    Rig,
    Rst,
    Signal,
    Tls,
    Until,
    Wait,
    answer,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    h2_cluster,
    lines,
    listener,
    reply,
)
from tests.differential.wire import Signals, Wire, read_chunked

FORMAT = (
    "tcp flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% termination=%CONNECTION_TERMINATION_DETAILS% rx=%BYTES_RECEIVED% tx=%BYTES_SENT% "
    "upstream=%UPSTREAM_HOST% cluster=%UPSTREAM_CLUSTER% failure=%UPSTREAM_TRANSPORT_FAILURE_REASON% code=%RESPONSE_CODE% "
    "protocol=%PROTOCOL%/%UPSTREAM_PROTOCOL% attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% method=%REQ(:METHOD)% "
    "closed=%DOWNSTREAM_LOCAL_CLOSE_REASON%/%DOWNSTREAM_DETECTED_CLOSE_TYPE%/%UPSTREAM_DETECTED_CLOSE_TYPE%/%UPSTREAM_LOCAL_CLOSE_REASON% "
    "wire=%UPSTREAM_WIRE_BYTES_RECEIVED%/%DOWNSTREAM_WIRE_BYTES_SENT%/%DOWNSTREAM_WIRE_BYTES_RECEIVED% heads=%UPSTREAM_HEADER_BYTES_RECEIVED% "
    "from=%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% to=%UPSTREAM_REMOTE_ADDRESS% tls=%UPSTREAM_TLS_VERSION%/%UPSTREAM_PEER_SUBJECT% type=%ACCESS_LOG_TYPE% "
    "told=%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:TYPED)%/%FILTER_STATE(envoy.tcp_proxy.propagate_response_trailers:TYPED)%/"
    "%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:PLAIN)%/%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:FIELD:headers)%"
)
# What a head takes in HTTP/2 is up to who compresses it.
LOG = file_log(FORMAT + " sent=%UPSTREAM_WIRE_BYTES_SENT%/%UPSTREAM_HEADER_BYTES_SENT%\n")
LOG_HTTP2 = file_log(FORMAT + "\n")
HOST = "target.test:443"


def tunnel(name: str, to: str = "a", *, hostname: str = HOST, listener_fields: dict | None = None, proxy: dict | None = None, **config: Any) -> dict:
    """A listener whose connections go through tunnels; `config` is of the tunnels, `proxy` of the TCP proxy."""
    fields = {"cluster": to, **(proxy or {})}
    if "weighted_clusters" in fields:
        del fields["cluster"]
    log = LOG_HTTP2 if "h2" in to or to == "tls_auto" else LOG
    tcp = filter_("tcp_proxy", stat_prefix=name, access_log=[log], tunneling_config={"hostname": hostname, **config}, **fields)
    return listener(name, tcp, **(listener_fields or {}))


def add(name: str, value: str, **fields: Any) -> dict:
    return {"header": {"key": name, "value": value}, **fields}


INSPECTED = {"listener_filters": [filter_("tls_inspector")]}
TLS = {"transport_socket": {"name": "tls", "typed_config": {"@": "upstream_tls", "sni": "proxy.test"}}}
CONFIG = bootstrap(
    tunnel("main"),
    tunnel("h2", "h2a"),
    tunnel("post", use_post=True),
    tunnel("post_path", use_post=True, post_path="/tunnel?a=b"),
    tunnel("post_h2", "h2a", use_post=True, post_path="/tunnel"),
    tunnel("tls", "tls_a"),
    tunnel("tls_h2", "tls_h2a"),
    tunnel("tls_auto", "tls_auto"),
    tunnel("post_tls", "tls_a", use_post=True),
    tunnel("post_tls_h2", "tls_h2a", use_post=True),
    tunnel("by_sni", hostname="%REQUESTED_SERVER_NAME%:443", listener_fields=INSPECTED),
    tunnel("by_address", hostname="%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%:%%:%RESPONSE_FLAGS%"),
    tunnel("headers", headers_to_add=[
        add("x-one", "1"), add("X-From", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"), add("x-one", "2"), add("x-over", "a"),
        add("x-over", "b", append_action="OVERWRITE_IF_EXISTS_OR_ADD"), add("x-empty", ""), add("x-kept", "", keep_empty_value=True),
        add("x-absent", "%REQ(x)%"), add("proxy-authorization", "Basic YTpi"), add("x-attempt", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%")]),
    tunnel("headers_h2", "h2a", headers_to_add=[add("x-one", "1"), add("x-one", "2"), add("x-sni", "%REQUESTED_SERVER_NAME%")]),
    tunnel("told", propagate_response_headers=True, propagate_response_trailers=True),
    tunnel("told_h2", "h2a", propagate_response_headers=True, propagate_response_trailers=True),
    tunnel("identified", request_id_extension={"typed_config": {"@": "uuid_request_id"}}),
    tunnel("twice", proxy={"max_connect_attempts": 2}),
    tunnel("thrice", proxy={"max_connect_attempts": 3, "backoff_options": {"base_interval": "0.01s", "max_interval": "0.02s"}}),
    tunnel("twice_h2", "h2a", proxy={"max_connect_attempts": 2}),
    tunnel("dead", "dead"),
    tunnel("dead_h2", "dead_h2"),
    tunnel("dead_twice", "dead", proxy={"max_connect_attempts": 2}),
    tunnel("hole", "hole"),
    tunnel("hole_twice", "hole", proxy={"max_connect_attempts": 2}),
    tunnel("empty", "empty"),
    tunnel("missing", "not_there"),
    tunnel("full", "full"),
    tunnel("no_pending", "no_pending"),
    tunnel("no_requests", "no_requests"),
    tunnel("idle", proxy={"idle_timeout": "0.4s"}),
    tunnel("idle_h2", "h2a", proxy={"idle_timeout": "0.4s"}),
    tunnel("idle_hole", "long_hole", proxy={"idle_timeout": "0.3s"}),
    tunnel("lifetime", proxy={"max_downstream_connection_duration": "0.4s"}),
    tunnel("small_buffer", listener_fields={"per_connection_buffer_limit_bytes": 1024}),
    tunnel("small_buffer_h2", "h2a", listener_fields={"per_connection_buffer_limit_bytes": 1024}),
    tunnel("small_buffer_post", use_post=True, listener_fields={"per_connection_buffer_limit_bytes": 1024}),
    tunnel("early_log", proxy={"access_log_options": {"flush_access_log_on_connected": True}}),
    tunnel("weighted", proxy={"weighted_clusters": {"clusters": [{"name": "a", "weight": 3}]}}),
    tunnel("narrow", "h2_narrow"),
    tunnel("once", "h2_once"),
    tunnel("spelt", "spelt", headers_to_add=[add("x-one", "1")]),
    tunnel("auto_sni", "auto_sni"),
    clusters=[
        cluster("a"),
        cluster("dead"),
        h2_cluster("h2a"),
        h2_cluster("dead_h2", "dead"),
        cluster("tls_a", **TLS),
        h2_cluster("tls_h2a", **TLS),
        cluster("tls_auto", "tls_h2a", typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@": "http_options", "auto_config": {"http2_protocol_options": {}}}}, **TLS),
        cluster("hole", connect_timeout="0.1s"),
        cluster("long_hole", "hole"),
        cluster("empty", localities=[{"lb_endpoints": []}]),
        cluster("full", "a", circuit_breakers={"thresholds": [{"max_connections": 0}]}),
        cluster("no_pending", "a", circuit_breakers={"thresholds": [{"max_pending_requests": 0}]}),
        cluster("no_requests", "a", circuit_breakers={"thresholds": [{"max_requests": 0}]}),
        h2_cluster("h2_narrow", "h2a", options={"max_concurrent_streams": 1}),
        h2_cluster("h2_once", "h2a", common={"max_requests_per_connection": 1}),
        cluster("spelt", "a", typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@": "http_options", "explicit_http_config": {"http_protocol_options": {"header_key_format": {"proper_case_words": {}}}}}}),
        cluster("auto_sni", "tls_a", typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@": "http_options", "explicit_http_config": {"http_protocol_options": {}}, "upstream_http_protocol_options": {"auto_sni": True}}},
            transport_socket={"name": "tls", "typed_config": {"@": "upstream_tls"}}),
    ],
)  # fmt: skip

OPEN = b"HTTP/1.1 200 OK\r\n\r\n"
ACCEPT = Headers(lines(":status: 200"))
ECHO = [Head(), OPEN, Echo(), Close()]
ECHO_H2 = Play([[ACCEPT, EchoData()]])
TALK = [b"hello", Until(b"hello"), b"again", Until(b"again"), Close()]
RESUMED: dict[str, Any] = {"skip_stats": ("ssl.session_reused",)}  # sessions are not resumed here
NEVER = [Head(), Eof()]


def tcp(name: str, steps: Any, up: Any = None, on: str = "main", then: str = "closed", **fields: Any) -> Case:
    return Case(name, steps, ECHO if up is None else up, on=on, then=then, **fields)


class Chunked:
    """Upstream: read a chunked body to its end."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        await read_chunked(wire)


class EchoChunks:
    """Upstream of a POST: send chunks back as they come."""

    async def run(self, wire: Wire, signals: Signals) -> None:
        while wire.end is None and not wire.ended_by_us:
            if wire.buffer:
                wire.send(wire.take(len(wire.buffer)))
            await wire.until(lambda: wire.buffer)


POSTED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ECHO_POST = [Head(), POSTED, EchoChunks(), Close()]


async def many_bytes(rig: Rig, name: str) -> Any:
    """A megabyte there and back in uneven pieces, while the client reads late."""
    data = bytes(range(256)) * 4096
    wire = await rig.connect(name)
    wire.transport.pause_reading()
    for start in range(0, len(data), 77_777):
        wire.send(data[start : start + 77_777])
    wire.transport.resume_reading()
    await wire.until(lambda: len(wire.received) >= len(data))
    wire.close()
    return [len(wire.received), bytes(wire.received) == data]


def megabyte(name: str, up: Any, on: str) -> Case:
    return Case(name, lambda rig: many_bytes(rig, on), up, skip=("upstream", "log"), skip_stats=("flow_control", "_bytes"))


async def echo(wire: Wire, word: bytes = b"ping") -> str:
    before = len(wire.received)
    wire.send(word)
    await wire.until(lambda: word in wire.received[before:])
    return wire.received[before:].decode() or "closed"


async def three_at_once(rig: Rig, on: str) -> Any:
    """Tunnels beside each other, on as many connections as it takes."""
    wires: list[Wire] = []
    said: list[Any] = []
    for number in range(3):
        wires.append(await rig.connect(on))
        said.append(await echo(wires[-1], b"number %d" % number))
    said.append(await rig.counted("upstream_cx_active"))
    said.append(await rig.counted("upstream_rq_active"))
    for wire in wires:
        wire.transport.write_eof()
        await wire.until(lambda: False)
    return said


async def one_after_the_other(rig: Rig, on: str) -> Any:
    said = []
    for _ in range(3):
        wire = await rig.connect(on)
        said.append(await echo(wire))
        wire.transport.write_eof()
        await wire.until(lambda: False)
    return said


def several(name: str, scenario: Any, on: str, up: Any, **fields: Any) -> Case:
    return Case(name, lambda rig: scenario(rig, on), up, **fields)


_ID = re.compile(rb"(?<=x-request-id: )[0-9a-f]{8}-[0-9a-f]{4}-[49ab][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")


def anonymous(wire: Wire) -> bytes:
    return _ID.sub(b"UUID", bytes(wire.received))


CASES = [
    # ---- how they begin
    tcp("connect", TALK),
    tcp("connect_h2", TALK, ECHO_H2, "h2"),
    tcp("post", TALK, ECHO_POST, "post", skip=("upstream",)),
    tcp("post_path", [b"x", Until(b"x"), Close()], ECHO_POST, "post_path"),
    tcp("post_h2", TALK, ECHO_H2, "post_h2"),
    tcp("connect_tls", TALK, on="tls"),
    tcp("connect_tls_h2", TALK, ECHO_H2, "tls_h2"),
    tcp("connect_tls_alpn", TALK, ECHO_H2, "tls_auto"),
    tcp("post_tls", [b"x", Until(b"x"), Close()], ECHO_POST, "post_tls", **RESUMED),
    tcp("post_tls_h2", TALK, ECHO_H2, "post_tls_h2", **RESUMED),
    tcp("server_speaks_first", [Until(b"ready"), b"quit", Until(b"bye")], [Head(), OPEN, b"220 ready", Until(b"quit"), b"bye", Close()]),
    tcp("server_speaks_with_the_answer", [Until(b"ready"), b"quit", Until(b"bye")], [Head(), OPEN + b"220 ready", Until(b"quit"), b"bye", Close()]),
    tcp("server_speaks_first_h2", [Until(b"ready"), b"quit", Until(b"bye")],
        Play([[ACCEPT, Data(b"220 ready"), Got(b"quit"), Data(b"bye", end=True), Ended()]]), "h2"),
    tcp("nothing_before_the_answer", [b"early", Until(b"early"), Close()], [Head(), Signal("asked"), Idle(0.05), OPEN, Echo(), Close()]),
    tcp("name_by_sni", lambda rig: rig_hello(rig, "by_sni"), [Head(), OPEN, Until(b"\x16"), Close()], skip=("upstream", "log"), skip_stats=("_bytes",)),
    tcp("name_without_sni", [b"no TLS", Until(b"no TLS"), Close()], on="by_sni"),
    tcp("name_by_address", [b"x", Until(b"x"), Close()], on="by_address"),
    tcp("headers_added", [b"x", Until(b"x"), Close()], on="headers"),
    tcp("headers_added_h2", [b"x", Until(b"x"), Close()], ECHO_H2, "headers_h2"),
    tcp("headers_spelt", [b"x", Until(b"x"), Close()], on="spelt"),
    tcp("request_id", [b"x", Until(b"x"), Close()], Play([ECHO], tidy=anonymous), "identified"),
    tcp("weighted", TALK, on="weighted"),
    tcp("log_on_connect", TALK, on="early_log"),
    tcp("no_auto_sni", [b"x", Until(b"x"), Close()], on="auto_sni"),
    # ---- answers
    *[tcp(f"answer_{status}", [b"x", Until(b"x"), Close()], [Head(), b"HTTP/1.1 %d X\r\n\r\n" % status, Echo(), Close()]) for status in (201, 204, 299)],
    *[tcp(f"answer_{status}", [b"x"], [Head(), answer(f"{status} No", b"no"), Eof()]) for status in (300, 403, 407, 503)],
    *[tcp(f"answer_{status}_h2", [b"x"], Play([reply(status, body=b"no")]), "h2") for status in (201, 204, 407, 503)],
    tcp("answer_101", [b"x"], [Head(), b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", Eof()]),
    tcp("answer_after_100", TALK, [Head(), b"HTTP/1.1 100 Continue\r\n\r\n" * 2, *ECHO[1:]]),
    tcp("answer_after_100_h2", TALK, Play([[Headers(lines(":status: 100")), ACCEPT, EchoData()]]), "h2"),
    tcp("answer_with_length", [b"x", Until(b"hello"), Close()], [Head(), b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", b"hello", Eof()]),
    tcp("answer_chunked", [b"x", Until(b"hello"), Close()], [Head(), POSTED, b"hello", Eof()]),
    tcp("answer_that_ends_h2", [b"x"], Play([reply(200, body=None)]), "h2"),
    tcp("answer_with_its_end_h2", [b"x", Until(b"all")], Play([reply(200, body=b"all")]), "h2"),
    tcp("answer_to_post_that_is_empty", [b"x"], [Head(), answer(body=b""), Eof()], "post"),
    tcp("answer_to_post_204", [b"x"], [Head(), b"HTTP/1.1 204 No\r\n\r\n", Eof()], "post"),
    tcp("answer_to_post_403", [b"x"], [Head(), answer("403 No", b"no"), Eof()], "post"),
    tcp("answer_to_post_201_h2", [b"x"], Play([reply(201, body=None)]), "post_h2"),
    tcp("garbage_for_an_answer", [b"x"], [Head(), b"\x00garbage\r\n\r\n", Eof()]),
    tcp("end_instead", [b"x"], [Head(), Close()]),
    tcp("half_a_head", [b"x"], [Head(), b"HTTP/1.1 200 OK\r\nx: ", Close()], skip_stats=("protocol_error",), note="by chance there"),
    tcp("reset_instead", [b"x"], [Head(), Reset()]),
    tcp("end_instead_h2", [b"x"], Play([[Close()]]), "h2"),
    *[tcp(f"stream_reset_{name}_h2", [b"x"], Play([[Rst(getattr(h2, name))]]), "h2")
      for name in ("REFUSED_STREAM", "CANCEL", "CONNECT_ERROR", "PROTOCOL_ERROR")],
    tcp("goaway_instead_h2", [b"x"], Play([[GoAway(0), Eof()]]), "h2", skip=("log",), note="we count the frame for the stream that it refuses"),
    # ---- no connection, limits
    tcp("refused", [b"x"], on="dead"),
    tcp("refused_h2", [b"x"], on="dead_h2"),
    tcp("refused_twice", [b"x"], on="dead_twice"),
    tcp("connect_timeout", [b"x"], on="hole"),
    tcp("connect_timeout_twice", [b"x"], on="hole_twice"),
    tcp("no_hosts", [b"x"], on="empty"),
    tcp("no_such_cluster", [b"x"], on="missing"),
    tcp("no_connections_allowed", [b"x"], on="full"),
    tcp("no_pending_allowed", [b"x"], on="no_pending"),
    tcp("no_requests_allowed", [b"x"], on="no_requests"),
    # ---- retries
    tcp("second_try", TALK, Play([[Head(), answer("503 No", b""), Eof()], ECHO]), "twice"),
    tcp("second_try_after_reset", TALK, Play([[Head(), Reset()], ECHO]), "twice"),
    tcp("second_try_h2", TALK, Play([reply(503, body=None), [ACCEPT, EchoData()]]), "twice_h2"),
    tcp("second_try_after_goaway_h2", TALK, Play([[GoAway(0), Eof()], [ACCEPT, EchoData()]]), "twice_h2", skip=("log",)),
    tcp("two_tries_fail", [b"x"], Play([[Head(), answer("503 No", b""), Eof()]]), "twice"),
    tcp("third_try", TALK, Play([[Head(), answer("503 No", b""), Eof()], [Head(), Close()], ECHO]), "thrice"),
    tcp("three_tries_fail", [b"x"], Play([[Head(), answer("503 No", b""), Eof()]]), "thrice"),
    # ---- how they end
    tcp("client_half_close", [b"question", Until(b"ready"), HalfClose()], [Head(), OPEN, Until(b"question"), b"ready", Eof(), Close()]),
    tcp("client_half_close_at_once", [b"question", HalfClose()], [Head(), OPEN, Until(b"question"), Eof(), Close()]),
    tcp("client_half_close_h2", [b"question", HalfClose(), Until(b"answer")],
        Play([[ACCEPT, Got(b"question"), Ended(), Data(b"answer"), Data(b" to it", end=True)]]), "h2"),
    tcp("client_half_close_post", [b"question", Until(b"ready"), HalfClose()],
        [Head(), POSTED + b"5\r\nready\r\n", Chunked(), Eof(), Close()], "post"),
    tcp("client_half_close_post_h2", [b"question", HalfClose(), Until(b"answer")],
        Play([[ACCEPT, Got(b"question"), Ended(), Data(b"answer"), Data(b" to it", end=True)]]), "post_h2"),
    tcp("server_half_close", [b"x", Until(b"all")], [Head(), OPEN, Until(b"x"), b"all of it", HalfClose(), Eof()]),
    tcp("server_half_close_h2", [b"x", Until(b"all"), Wait("ended"), b"thanks", Close()],
        Play([[ACCEPT, Got(b"x"), Data(b"all of it", end=True), Signal("ended"), Got(b"thanks"), Ended()]]), "h2"),
    tcp("server_half_close_then_reset_h2", [b"x", Until(b"all")], Play([[ACCEPT, Got(b"x"), Data(b"all of it", end=True), Rst(h2.NO_ERROR)]]), "h2"),
    tcp("server_closes", [b"x", Until(b"last")], [Head(), OPEN, Until(b"x"), b"last", Close()]),
    tcp("server_closes_h2", [b"x", Until(b"last")], Play([[ACCEPT, Got(b"x"), Data(b"last"), Close()]]), "h2"),
    tcp("server_closes_post", [b"x", Until(b"last")], [Head(), POSTED, Until(b"x"), b"4\r\nlast\r\n", Close()], "post"),
    tcp("server_resets", [b"x"], [Head(), OPEN, Until(b"x"), Reset()]),
    *[tcp(f"server_resets_{name}_h2", [b"x"], Play([[ACCEPT, Got(b"x"), Rst(getattr(h2, name))]]), "h2")
      for name in ("NO_ERROR", "CANCEL", "REFUSED_STREAM", "CONNECT_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR")],
    tcp("server_resets_connection_h2", [b"x"], Play([[ACCEPT, Got(b"x"), Reset()]]), "h2"),
    tcp("server_resets_after_end_h2", [b"x", HalfClose()], Play([[ACCEPT, Ended(), Rst(h2.CANCEL)]]), "h2"),
    tcp("garbage_in_h2", [b"x"], Play([[ACCEPT, Got(b"x"), Frame(h2.PING, 0, 0, b"x")]]), "h2"),
    tcp("garbage_in_post", [b"x"], [Head(), POSTED, Until(b"x"), b"zz\r\n", Eof()], "post"),
    tcp("client_resets", [b"x", Wait("got"), Reset()], [Head(), OPEN, Until(b"x"), Signal("got"), Eof()]),
    tcp("client_resets_h2", [b"x", Wait("got"), Reset()], Play([[ACCEPT, Got(b"x"), Signal("got"), Ended()]]), "h2"),
    tcp("client_closes_at_once", [Close()], [Head(), OPEN, Eof()]),
    tcp("client_closes_at_once_h2", [Close()], Play([[ACCEPT, Ended(), Data(end=True)]]), "h2"),
    tcp("goaway_during_h2", [b"x", Until(b"y"), b"z", Until(b"last")],
        Play([[ACCEPT, Got(b"x"), Data(b"y"), GoAway(1), Got(b"xz"), Data(b"last", end=True), Ended()]]), "h2"),
    tcp("idle", [b"x", Until(b"x")], on="idle"),
    tcp("idle_h2", [b"x", Until(b"x")], Play([[ACCEPT, EchoData()]]), "idle_h2"),
    tcp("idle_while_connecting", [b"x"], on="idle_hole"),
    tcp("idle_before_the_answer", [b"x"], NEVER, "idle"),
    tcp("idle_before_the_answer_h2", [b"x"], Play([[Ended()]]), "idle_h2"),
    tcp("idle_after_half_close_h2", [b"x", HalfClose()], Play([[ACCEPT, Ended(), Heard("rst_stream")]]), "idle_h2"),
    tcp("longest_life", [b"x", Until(b"x")], on="lifetime"),
    tcp("longest_life_before_the_answer", [b"x"], NEVER, "lifetime", skip=("log",), note="DT,UF there, in the order in which they were found"),
    tcp("client_closes_before_the_answer", [b"x", Wait("asked"), Close()], [Head(), Signal("asked"), Eof()], "idle"),
    # ---- what is told of the answer
    tcp("told_headers", [b"x", Until(b"x"), Close()], [Head(), b"HTTP/1.1 200 OK\r\nX-One: 1\r\nx-one: 2\r\n\r\n", Echo(), Close()], "told"),
    tcp("told_headers_of_a_refusal", [b"x"], [Head(), answer("407 Who", b"", proxy_authenticate="Basic"), Eof()], "told"),
    tcp("told_trailers_h2", [b"x", Until(b"all"), Close()],
        Play([[ACCEPT, Got(b"x"), Data(b"all"), Headers(lines("x-end: 1", "x-more: 2"), end=True), Ended()]]), "told_h2"),
    # ---- many bytes, many tunnels
    megabyte("a_megabyte", ECHO, "small_buffer"),
    megabyte("a_megabyte_h2", ECHO_H2, "small_buffer_h2"),
    megabyte("a_megabyte_post", ECHO_POST, "small_buffer_post"),
    several("three_at_once", three_at_once, "main", ECHO, skip=("upstream",)),
    several("three_at_once_h2", three_at_once, "h2", ECHO_H2),
    several("three_at_once_narrow", three_at_once, "narrow", ECHO_H2, skip=("upstream",)),
    several("three_at_once_once", three_at_once, "once", ECHO_H2, skip=("upstream",)),
    several("one_after_the_other", one_after_the_other, "main", ECHO),
    several("one_after_the_other_h2", one_after_the_other, "h2", ECHO_H2),
    several("one_after_the_other_once", one_after_the_other, "once", ECHO_H2),
]  # fmt: skip


async def rig_hello(rig: Rig, on: str) -> Any:
    """A ClientHello through a tunnel; whom the tunnel was for is what counts."""
    try:
        await rig.connect(on, Tls("some.test"))
    except OSError as error:
        return [type(error).__name__, [seen["got"].partition("\r\n\r\n")[0] for seen in rig.upstreams["a"].seen()]]
    return "TLS?"


test_case = check_cases(CASES)
