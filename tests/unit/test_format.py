"""Format strings: what each command answers. Expected values were taken from Envoy 1.40 for the same requests."""

from __future__ import annotations

import json
import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from envoy.config.core.v3 import substitution_format_string_pb2

from meshproxy.api import convert
from meshproxy.api.errors import UNSUPPORTED, ConfigError
from meshproxy.codec.headers import Headers, RequestHead, ResponseHead
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo
from meshproxy.observe import flags, operators
from meshproxy.observe.format import DEFAULT, Compiler, compile_format, compile_header_value, compile_json, compile_substitution_format
from meshproxy.observe.stream_info import StreamInfo


class Stream(StreamInfo):
    """A request as in the captured logs of the real proxy: POST /a/b, rewritten to /re/a/b, answered by a named upstream."""

    def __init__(self, **attributes: Any) -> None:
        self.connection = ConnectionInfo(2, Address("127.0.0.1", 45102), Address("127.0.0.1", 38461), 99.0)
        self.connection.filter_chain = SimpleNamespace(name="fc", metadata={})
        self.remote = Address("1.2.3.4", 0)
        self.protocol = "HTTP/1.1"
        self.request = RequestHead(
            b"POST",
            b"/re/a/b?q=1%20x&r=2",
            b"foo.example:80",
            [
                (b"x-forwarded-for", b"1.2.3.4"),
                (b"content-length", b"5"),
                (b"user-agent", b't"\\\xc3\xa9\xff'),
                (b"x-forwarded-proto", b"http"),
                (b"x-request-id", b"b0cc4201-28cc-48d9-bbcf-5124dcbfb229"),
                (b"x-envoy-original-path", b"/a/b?q=1%20x&r=2"),
            ],
        )
        self.response = ResponseHead(200, [(b"content-length", b"11"), (b"x-resp", b"r1"), (b"server", b"envoy")])
        self.status = 200
        self.details = "via_upstream"
        self.bytes_received, self.bytes_sent = 5, 11
        self.upstream_bytes_sent, self.upstream_bytes_received = 286, 135
        self.start_wall = 1795234962.277539
        self.start, self.request_end, self.upstream_start, self.upstream_sent = 100.0, 100.0002, 100.0003, 100.0005
        self.upstream_first, self.upstream_last, self.response_start, self.end = 100.0011, 100.0012, 100.00122, 100.001256
        self.route = SimpleNamespace(name="rt", metadata={"r": {"k": "rv"}}, virtual_host=SimpleNamespace(metadata=None))
        metadata = {"c": {"k": "v", "n": 1.5, "o": {"x": [1.0, "a", None, True]}}}
        self.cluster = SimpleNamespace(name="up", observability_name="altup", metadata=metadata)
        self.host = SimpleNamespace(address=Address("127.0.0.1", 32815), hostname="up.example", metadata={"h": {"k": "hv"}})
        self.upstream_protocol = "HTTP/1.1"
        self.upstream = ConnectionInfo(3, Address("127.0.0.1", 32815), Address("127.0.0.1", 46414), 100.0)
        self.attempts = 1
        for name, value in attributes.items():
            setattr(self, name, value)


def bare(**attributes: Any) -> Stream:
    """A stream about which next to nothing is known."""
    stream = Stream(request=None, response=None, status=0, details=None, bytes_received=0, bytes_sent=0, attempts=0)
    stream.remote = stream.route = stream.cluster = stream.host = stream.upstream = stream.upstream_protocol = None
    stream.upstream_bytes_sent = stream.upstream_bytes_received = 0
    stream.request_end = stream.upstream_start = stream.upstream_sent = stream.upstream_first = stream.upstream_last = stream.response_start = 0.0
    for name, value in attributes.items():
        setattr(stream, name, value)
    return stream


def typed(command: str, stream: StreamInfo) -> Any:
    """The value of one command in JSON."""
    return json.loads(compile_json({"v": command})(stream))["v"]


KNOWN: list[tuple[str, Any]] = [
    ("%REQUEST_HEADER(x-forwarded-for)%", "1.2.3.4"),
    ("%REQ(missing)%", None),
    ("%REQ(a?host)%", "foo.example:80"),
    ("%REQ(?host)%", "foo.example:80"),
    ("%REQ(a?)%", None),
    ("%REQ(A?:METHOD)%", "POST"),
    ("%REQ(:path)%", "/re/a/b?q=1%20x&r=2"),
    ("%REQ(:scheme)%", "http"),
    ("%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/a/b?q=1%20x&r=2"),
    ("%REQ(x-request-id):4%", "b0cc"),
    ("%REQ(x-request-id):0%", ""),
    ("%RESP(:STATUS)%", "200"),
    ("%RESPONSE_HEADER(content-length)%", "11"),
    ("%RESP(x-resp?server):2%", "r1"),
    ("%TRAILER(x)%", None),
    ("%START_TIME%", "2026-11-21T04:22:42.277Z"),
    ("%START_TIME(%s.%3f)%", "1795234962.277"),
    ("%START_TIME(a)b)%", "a)b"),
    ("%REQUEST_HEADERS_BYTES%", 229),
    ("%RESPONSE_HEADERS_BYTES%", 45),
    ("%RESPONSE_TRAILERS_BYTES%", 0),
    ("%BYTES_RECEIVED%", 5),
    ("%BYTES_SENT%", 11),
    ("%BYTES_RETRANSMITTED%", 0),
    ("%UPSTREAM_WIRE_BYTES_SENT%", 286),
    ("%UPSTREAM_WIRE_BYTES_RECEIVED%", 135),
    ("%PROTOCOL%", "HTTP/1.1"),
    ("%UPSTREAM_PROTOCOL%", "HTTP/1.1"),
    ("%RESPONSE_CODE%", 200),
    ("%RESPONSE_CODE_DETAILS%", "via_upstream"),
    ("%CONNECTION_TERMINATION_DETAILS%", None),
    ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", 1),
    ("%DURATION%", 1),
    ("%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%", 1256),
    ("%COMMON_DURATION(DS_RX_BEG:DS_TX_END)%", 1),
    ("%COMMON_DURATION(US_TX_BEG:US_RX_END:us)%", 900),
    ("%COMMON_DURATION(DS_TX_END:DS_RX_BEG:us)%", None),
    ("%COMMON_DURATION(DS_RX_BEG:foo:us)%", None),
    ("%COMMON_DURATION(DS_CX_BEG:DS_CX_END:us)%", None),
    ("%REQUEST_DURATION%", 0),
    ("%REQUEST_TX_DURATION%", 0),
    ("%RESPONSE_DURATION%", 1),
    ("%RESPONSE_TX_DURATION%", 0),
    ("%ROUNDTRIP_DURATION%", None),
    ("%DOWNSTREAM_HANDSHAKE_DURATION%", None),
    ("%RESPONSE_FLAGS%", "-"),
    ("%RESPONSE_FLAGS_LONG%", "-"),
    ("%ROUTE_NAME%", "rt"),
    ("%VIRTUAL_CLUSTER_NAME%", None),
    ("%UPSTREAM_HOST%", "127.0.0.1:32815"),
    ("%UPSTREAM_HOST_NAME%", "up.example"),
    ("%UPSTREAM_HOST_NAME_WITHOUT_PORT%", "up.example"),
    ("%UPSTREAM_HOSTS_ATTEMPTED%", "127.0.0.1:32815"),
    ("%UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT%", "127.0.0.1"),
    ("%UPSTREAM_HOST_NAMES_ATTEMPTED%", "up.example"),
    ("%UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT%", "up.example"),
    ("%UPSTREAM_CLUSTER%", "altup"),
    ("%UPSTREAM_CLUSTER_RAW%", "up"),
    ("%UPSTREAM_LOCAL_ADDRESS%", "127.0.0.1:46414"),
    ("%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%", "127.0.0.1"),
    ("%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT(8)%", "127.0.0.0/8"),
    ("%UPSTREAM_LOCAL_PORT%", 46414),
    ("%UPSTREAM_REMOTE_ADDRESS%", "127.0.0.1:32815"),
    ("%UPSTREAM_REMOTE_PORT%", 32815),
    ("%UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID%", ""),
    ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", None),
    ("%UPSTREAM_DETECTED_CLOSE_TYPE%", "Normal"),
    ("%DOWNSTREAM_DETECTED_CLOSE_TYPE%", "Normal"),
    ("%DOWNSTREAM_REMOTE_ADDRESS%", "1.2.3.4:0"),
    ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "1.2.3.4"),
    ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(8)%", "1.0.0.0/8"),
    ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(32)%", "1.2.3.4/32"),
    ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(33)%", "1.2.3.4/32"),
    ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(x)%", "1.2.3.4"),
    ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(-1)%", ""),
    ("%DOWNSTREAM_REMOTE_PORT%", 0),
    ("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%", "127.0.0.1:45102"),
    ("%DOWNSTREAM_DIRECT_REMOTE_PORT%", 45102),
    ("%DOWNSTREAM_LOCAL_ADDRESS%", "127.0.0.1:38461"),
    ("%DOWNSTREAM_LOCAL_PORT%", 38461),
    ("%DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT(8)%", "127.0.0.0/8"),
    ("%CONNECTION_ID%", 2),
    ("%UPSTREAM_CONNECTION_ID%", 3),
    ("%UPSTREAM_CONNECTION_IDS_ATTEMPTED%", "3"),
    ("%STREAM_ID%", "b0cc4201-28cc-48d9-bbcf-5124dcbfb229"),
    ("%GRPC_STATUS%", None),
    ("%CLUSTER_METADATA(c)%", {"k": "v", "n": 1.5, "o": {"x": [1, "a", None, True]}}),
    ("%CLUSTER_METADATA(c:n)%", 1.5),
    ("%CLUSTER_METADATA(c:o:x)%", [1, "a", None, True]),
    ("%CLUSTER_METADATA(c:zz)%", None),
    ("%UPSTREAM_METADATA(h:k)%", "hv"),
    ("%METADATA(ROUTE:r:k)%", "rv"),
    ("%METADATA(ROUTE:r):1%", {"k": "rv"}),
    ("%METADATA(ROUTE:r:k):1%", "r"),
    ("%METADATA(LISTENER:a)%", None),
    ("%METADATA(VIRTUAL_HOST:a)%", None),
    ("%METADATA(LISTENER_FILTER_CHAIN:a)%", None),
    ("%DYNAMIC_METADATA(a:b)%", None),
    ("%FILTER_STATE(a)%", None),
    ("%FILTER_STATE(a:PLAIN)%", None),
    ("%FILTER_STATE(a:FIELD:b)%", None),
    ("%REQUESTED_SERVER_NAME%", None),
    ("%REQUESTED_SERVER_NAME(SNI_FIRST)%", "foo.example:80"),
    ("%REQUESTED_SERVER_NAME(HOST_FIRST:ORIG)%", None),
    ("%REQUESTED_SERVER_NAME(HOST_FIRST:)%", "foo.example:80"),
    ("%DOWNSTREAM_PEER_URI_SAN%", None),
    ("%DOWNSTREAM_TLS_VERSION%", None),
    ("%UPSTREAM_TLS_CIPHER%", None),
    ("%DOWNSTREAM_PEER_CERT_V_START(%s)%", None),
    ("%TLS_JA3_FINGERPRINT%", None),
    ("%HOSTNAME%", socket.gethostname()),
    ("%LOCAL_REPLY_BODY%", ""),
    ("%FILTER_CHAIN_NAME%", "fc"),
    ("%ACCESS_LOG_TYPE%", "NotSet"),
    ("%TRACE_ID%", None),
    ("%CUSTOM_FLAGS%", ""),
    ("%ENVIRONMENT(NOT_THERE)%", "-"),
    ("%QUERY_PARAM(q)%", "1 x"),
    ("%QUERY_PARAM(q):1%", "1"),
    ("%QUERY_PARAM(z)%", None),
    ("%QUERY_PARAMS%", "q=1%20x&r=2"),
    ("%QUERY_PARAMS:3%", "q=1"),
    ("%PATH%", "/a/b?q=1%20x&r=2"),
    ("%PATH:3%", "/a/"),
    ("%PATH(NQ)%", "/a/b"),
    ("%PATH(WQ:PATH)%", "/re/a/b?q=1%20x&r=2"),
    ("%PATH(:PATH)%", "/re/a/b?q=1%20x&r=2"),
    ('%COALESCE({"operators": ["REQUESTED_SERVER_NAME", {"command": "REQ", "param": ":authority"}]})%', "foo.example:80"),
    ('%COALESCE({"operators": [{"command": "REQ", "param": ":authority", "max_length": 3}]})%', "foo"),
    ('%COALESCE({"operators": ["ROUTE_NAME"]}):1%', "r"),
    ('%COALESCE({"operators": ["GRPC_STATUS"]})%', None),
]


@pytest.mark.parametrize(("command", "expected"), KNOWN)
def test_commands(command: str, expected: Any) -> None:
    value = typed(command, Stream())
    assert value == expected
    assert type(value) is type(expected)
    text = compile_format(command)(Stream())
    if expected is None:
        assert text == "-"
    elif isinstance(expected, (str, int)):
        assert text == str(expected)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("%REQ(:method)%", None),
        ("%REQ(x)%", None),
        ("%RESP(:status)%", None),
        ("%REQUEST_HEADERS_BYTES%", 0),
        ("%RESPONSE_HEADERS_BYTES%", 0),
        ("%RESPONSE_CODE%", 0),
        ("%RESPONSE_CODE_DETAILS%", None),
        ("%UPSTREAM_PROTOCOL%", None),
        ("%UPSTREAM_HOST%", None),
        ("%UPSTREAM_HOST_NAME%", None),
        ("%UPSTREAM_HOST_NAME_WITHOUT_PORT%", None),
        ("%UPSTREAM_HOSTS_ATTEMPTED%", None),
        ("%UPSTREAM_CLUSTER%", None),
        ("%UPSTREAM_CLUSTER_RAW%", None),
        ("%UPSTREAM_LOCAL_ADDRESS%", None),
        ("%UPSTREAM_LOCAL_PORT%", None),
        ("%UPSTREAM_CONNECTION_ID%", 0),
        ("%UPSTREAM_CONNECTION_IDS_ATTEMPTED%", None),
        ("%UPSTREAM_DETECTED_CLOSE_TYPE%", None),
        ("%UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID%", None),
        ("%UPSTREAM_SERVER_NAME%", None),
        ("%DOWNSTREAM_REMOTE_ADDRESS%", "127.0.0.1:45102"),
        ("%ROUTE_NAME%", None),
        ("%REQUEST_DURATION%", None),
        ("%RESPONSE_DURATION%", None),
        ("%STREAM_ID%", None),
        ("%PATH%", None),
        ("%QUERY_PARAMS%", None),
        ("%QUERY_PARAM(q)%", None),
        ("%GRPC_STATUS_NUMBER%", None),
        ("%METADATA(ROUTE:r:k)%", None),
        ("%METADATA(VIRTUAL_HOST:r)%", None),
        ("%UPSTREAM_PEER_SUBJECT%", None),
        ("%UPSTREAM_PEER_CERT%", None),
    ],
)
def test_commands_without_answers(command: str, expected: Any) -> None:
    assert typed(command, bare()) == expected


def test_tcp_sessions() -> None:
    stream = bare(protocol=None, bytes_received=49, bytes_sent=135, end=100.001176, access_log_type="TcpConnectionEnd")
    stream.connection.metadata = {"ns": {"k": 1.0}}
    assert typed("%PROTOCOL%", stream) is None
    assert typed("%BYTES_SENT%", stream) == 135
    assert typed("%COMMON_DURATION(DS_CX_BEG:DS_CX_END:us)%", stream) == 1176
    assert typed("%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%", stream) is None
    assert typed("%REQUEST_DURATION%", stream) is None
    assert typed("%ACCESS_LOG_TYPE%", stream) == "TcpConnectionEnd"
    assert typed("%DYNAMIC_METADATA(ns:k)%", stream) == 1
    first = typed("%STREAM_ID%", stream)
    assert len(first) == 36
    assert typed("%STREAM_ID%", stream) == first


def certificate(name: str) -> Any:
    return SimpleNamespace(
        subject=f"CN={name},O=Ex\\, Inc,C=DE",
        issuer="O=Ex,CN=ca",
        serial="6c34",
        sha256="60d2",
        sha1="b5fc",
        uri_sans=(f"spiffe://td/ns/a/sa/{name}", "https://b"),
        dns_sans=(f"{name}.example", "*.x"),
        ip_sans=(b"\1\2\3\4", b"\0" * 15 + b"\1"),
        email_sans=("a@b.c",),
        other_sans=(("1.2.3.4", b"other"),),
        not_before=1795235140,
        not_after=1796099140,
        pem="-----BEGIN CERTIFICATE-----\nMIID/+=\n-----END CERTIFICATE-----\n",
    )


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("TLS_VERSION", "TLSv1.3"),
        ("TLS_CIPHER", "TLS_AES_256_GCM_SHA384"),
        ("TLS_SESSION_ID", None),
        ("PEER_SUBJECT", "CN=peer,O=Ex\\, Inc,C=DE"),
        ("PEER_ISSUER", "O=Ex,CN=ca"),
        ("PEER_URI_SAN", "spiffe://td/ns/a/sa/peer,https://b"),
        ("PEER_DNS_SAN", "peer.example,*.x"),
        ("PEER_IP_SAN", "1.2.3.4,::1"),
        ("LOCAL_URI_SAN", "spiffe://td/ns/a/sa/own,https://b"),
        ("LOCAL_DNS_SAN", "own.example,*.x"),
        ("PEER_CERT", "-----BEGIN%20CERTIFICATE-----%0AMIID%2F%2B%3D%0A-----END%20CERTIFICATE-----%0A"),
        ("PEER_CERT_V_START", "2026-11-21T04:25:40.000Z"),
        ("PEER_CERT_V_END(%b %e %H:%M:%S %Y %Z)", "Dec  1 04:25:40 2026 UTC"),
    ],
)
@pytest.mark.parametrize("direction", ["DOWNSTREAM", "UPSTREAM"])
def test_tls(direction: str, command: str, expected: str | None) -> None:
    stream = Stream()
    tls: Any = SimpleNamespace(
        version="TLSv1.3", cipher="TLS_AES_256_GCM_SHA384", session_id="ab", peer_certificate=certificate("peer"), local_certificate=certificate("own")
    )
    if direction == "DOWNSTREAM":
        stream.connection.tls = tls
    else:
        stream.upstream.tls = tls
    assert typed(f"%{direction}_{command}%", stream) == expected


def test_downstream_only_tls_fields() -> None:
    stream = Stream()
    stream.connection.tls = SimpleNamespace(peer_certificate=certificate("peer"), local_certificate=None)  # type: ignore[assignment]
    assert typed("%DOWNSTREAM_PEER_FINGERPRINT_256%", stream) == "60d2"
    assert typed("%DOWNSTREAM_PEER_FINGERPRINT_1%", stream) == "b5fc"
    assert typed("%DOWNSTREAM_PEER_SERIAL%", stream) == "6c34"
    assert typed("%DOWNSTREAM_PEER_EMAIL_SAN%", stream) == "a@b.c"
    assert typed("%DOWNSTREAM_PEER_OTHERNAME_SAN%", stream) == "other"
    assert typed("%DOWNSTREAM_LOCAL_SUBJECT%", stream) is None


@pytest.mark.parametrize(
    ("value", "camel", "snake", "number"),
    [
        (b"0", "OK", "OK", 0),
        (b"1", "Canceled", "CANCELLED", 1),
        (b"3", "InvalidArgument", "INVALID_ARGUMENT", 3),
        (b"16", "Unauthenticated", "UNAUTHENTICATED", 16),
        (b"17", "17", "17", 17),
        (b"-1", "-1", "-1", -1),
        (b"abc", "-1", "-1", -1),
        (None, "Unknown", "UNKNOWN", 2),
    ],
)
def test_grpc_status(value: bytes | None, camel: str, snake: str, number: int) -> None:
    stream = Stream()
    assert stream.request is not None
    stream.request.add(b"content-type", b"application/grpc+proto")
    stream.response = ResponseHead(200, [] if value is None else [(b"grpc-status", value)])
    assert typed("%GRPC_STATUS%", stream) == camel
    assert typed("%GRPC_STATUS(SNAKE_STRING)%", stream) == snake
    assert typed("%GRPC_STATUS(NUMBER)%", stream) == number
    assert typed("%GRPC_STATUS_NUMBER%", stream) == number
    stream.response_trailers = Headers([(b"grpc-status", b"5")])
    assert typed("%GRPC_STATUS%", stream) == "NotFound"


def test_grpc_status_of_a_local_reply() -> None:
    stream = Stream(status=503, response=None)
    assert stream.request is not None
    stream.request.add(b"content-type", b"application/grpc")
    assert typed("%GRPC_STATUS%", stream) == "Unavailable"


@pytest.mark.parametrize(
    ("query", "parameter", "decoded"),
    [
        (b"a=%41b%zz%&a=2&c=+d", b"Ab%zz%", b"a=Abzz&a=2&c=+d"),
        (b"a=%e9%C3%A9+%", b"\xe9\xc3\xa9+%", b"a=%e9%C3%A9+%"),
        (b"a", b"", b"a"),
        (b"%61=%4", b"%4", b"a=%4"),
        (b"a=%%41%00&d%20d=1", b"%A\0", b"a=A%00&d%20d=1"),
        (b"a=c?d=e", b"c?d=e", b"a=c?d=e"),
        (b"", None, b""),
    ],
)
def test_query(query: bytes, parameter: bytes | None, decoded: bytes) -> None:
    stream = Stream()
    assert stream.request is not None
    stream.request.path = b"/p?" + query
    assert Compiler().text("%QUERY_PARAM(a)%")(stream) == (b"-" if parameter is None else parameter)  # type: ignore[operator]
    assert Compiler().text("%QUERY_PARAMS(DECODED)%")(stream) == decoded  # type: ignore[operator]


def test_flags_and_termination() -> None:
    stream = Stream(flags=flags.UF | flags.URX, upstream_failure="tls: no", details="upstream reset: a b")
    stream.connection.termination_details = "rbac_access_denied"
    assert typed("%RESPONSE_FLAGS%", stream) == "URX,UF"
    assert typed("%RESPONSE_FLAGS%", Stream(flags=flags.UF | flags.URX | flags.DI)) == "DI,URX,UF"
    assert typed("%RESPONSE_FLAGS_LONG%", stream) == "UpstreamRetryLimitExceeded,UpstreamConnectionFailure"
    assert typed("%CONNECTION_TERMINATION_DETAILS%", stream) == "rbac_access_denied"
    assert typed("%UPSTREAM_TRANSPORT_FAILURE_REASON%", stream) == "tls:_no"
    assert typed("%RESPONSE_CODE_DETAILS%", stream) == "upstream_reset:_a_b"
    assert typed("%RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)%", stream) == "upstream reset: a b"


def test_metadata_and_filter_state() -> None:
    metadata = {"ns": {"s": 'str"x', "n": 1.5, "i": 42.0, "b": True, "nul": None, "l": [1.0, "a"], "o": {"z": 1.0, "a": 'é"<'}, "e": ""}}
    stream = Stream(_metadata=metadata, _filter_state={"k": "text", "d": {"f": 7}})
    stream.connection.filter_state = {"c": "from the connection"}
    for key, expected in (("s", 'str"x'), ("n", "1.5"), ("i", "42"), ("b", "true"), ("nul", "-"), ("l", '[1,"a"]'), ("o", '{"a":"é\\"<","z":1}'), ("e", "")):
        assert compile_format(f"%DYNAMIC_METADATA(ns:{key})%")(stream) == expected
    assert compile_format("%DYNAMIC_METADATA(ns:o):4%")(stream) == '{"a"'
    assert typed("%DYNAMIC_METADATA(ns:o):4%", stream) == {"z": 1, "a": 'é"<'}
    assert typed("%DYNAMIC_METADATA(ns:i)%", stream) == 42
    assert typed("%FILTER_STATE(k:PLAIN)%", stream) == "text"
    assert compile_format("%FILTER_STATE(c:PLAIN):4%")(stream) == "from"
    assert typed("%FILTER_STATE(d:FIELD:f)%", stream) == "7"


def test_environment_is_read_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHPROXY_TEST", "value")
    assert os.environ["MESHPROXY_TEST"]
    assert typed("%ENVIRONMENT(MESHPROXY_TEST):3%", Stream()) == "val"


def test_clocks() -> None:
    compiler = Compiler(clock=lambda: 107.5, wall=lambda: 5.25)
    assert compiler.text("%DURATION% %EMIT_TIME(%s.%3f)%")(Stream(end=0.0)) == b"7500 5.250"  # type: ignore[operator]


def test_the_default_line() -> None:
    assert compile_format(DEFAULT)(Stream(request=RequestHead(b"GET", b"/", b"h"))) == (
        '[2026-11-21T04:22:42.277Z] "GET / HTTP/1.1" 200 - 5 11 1 - "-" "-" "-" "h" "127.0.0.1:32815"\n'
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"clean", b'"clean"'),
        (b'q"b\\/', b'"q\\"b\\\\/"'),
        (b"caf\xc3\xa9", b'"caf\xc3\xa9"'),
        (b"bad\xff", b'"bad\\u00ff"'),
        (b'"\xff\xc3\xa9', b'"\\u0022\\u00ff\\u00c3\\u00a9"'),
        (b"tab\tx", b'"tab\\tx"'),
        (b"\xe2\x80\xa8 <&>'", b'"\xe2\x80\xa8 <&>\'"'),
        (b"\xed\xa0\x80", b'"\\u00ed\\u00a0\\u0080"'),
        (b'\xf0\x9f\x98\x80"', b'"\xf0\x9f\x98\x80\\""'),
        (b"\xc0\x80", b'"\\u00c0\\u0080"'),
        (b"\xf4\x90\x80\x80", b'"\\u00f4\\u0090\\u0080\\u0080"'),
        (b"\x00\x1b", b'"\\u0000\\u001b"'),
    ],
)
def test_json_escapes_hostile_bytes(value: bytes, text: bytes) -> None:
    stream = Stream(request=RequestHead(b"GET", b"/", b"", [(b"x", value)]))
    render = compile_json({"v": "%REQ(x)%"})
    assert render(stream) == render(stream) == b'{"v":%b}\n' % text
    assert compile_json({"v": "a%REQ(x)%b"})(stream) == b'{"v":"a%bb"}\n' % text[1:-1]


def test_lines_of_a_kind_differ_in_the_rest() -> None:
    """Status, details, route and the like are filled in once for all lines that have them in common."""
    json_line = compile_json({"a%": "%RESPONSE_CODE%", "b": "%ROUTE_NAME%", "c": "%BYTES_SENT%", "d": "%REQUEST_HEADER(X-REQUEST-ID)%", "e": "100%%"})
    text_line = Compiler().text("%RESPONSE_CODE% %ROUTE_NAME% %BYTES_SENT% %REQ(X-REQUEST-ID)% 100%% %RESPONSE_CODE_DETAILS%")
    assert callable(text_line)
    for status, name, sent, request_id in (
        (200, "r%d", 1, b"x"),
        (200, "r%d", 2, b'"%s\\'),
        (404, "r%d", 2, b"y"),
        (200, "other", 2, b"y"),
        (200, "", 2, b"y"),
    ):
        stream = Stream(status=status, route=SimpleNamespace(name=name), bytes_sent=sent)
        stream.request.set(b"x-request-id", request_id)
        expected = {"a%": status, "b": name or None, "c": sent, "d": request_id.decode(), "e": "100%"}
        assert json.loads(json_line(stream)) == expected
        assert text_line(stream) == b"%d %b %d %b 100%% via_upstream" % (status, name.encode() or b"-", sent, request_id)


class Planned(Stream):
    """A stream that went by a plan: whoever reads anything else than its facts makes it an ordinary one."""

    facts: Any = None
    _repeated = True
    _read: set[str] = set()

    def __init__(self, request_id: bytes, service_time: bytes, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.request.set(b"x-request-id", request_id)
        self.response.set(b"x-envoy-upstream-service-time", service_time)
        self.remote = None
        exchange = SimpleNamespace(info=self.upstream, protocol=self.upstream_protocol)
        self._rest = self.connection, self.host, exchange, self.bytes_sent, request_id, service_time, self.start, self.end, self.start_wall

    def of(self, kind: object) -> Planned:
        self.facts = (kind, self._repeated, *self._rest)
        return self

    def __getattribute__(self, name: str) -> Any:
        if name[:1] != "_" and name not in ("facts", "of") and (self._repeated or name != "request"):
            self._read.add(name)
            self.facts = None
        return super().__getattribute__(name)


PLANNABLE = (
    "%START_TIME% %REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %BYTES_SENT% "
    "%DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %REQ(X-REQUEST-ID)% %REQ(:AUTHORITY)% %UPSTREAM_HOST% %UPSTREAM_CLUSTER% "
    "%DOWNSTREAM_REMOTE_ADDRESS% 100%%"
)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("repeated", [True, False])
def test_streams_of_one_kind(text: bool, repeated: bool) -> None:
    commands = PLANNABLE.split()
    line = Compiler().text(PLANNABLE + "\n") if text else compile_json({f"{index:02d}%": command for index, command in enumerate(commands)})
    assert callable(line)
    kind = object()
    for number, request_id, kept in ((1, b"one%d", False), (2, b"two", True), (3, b'th"ree', True)):
        host = SimpleNamespace(address=Address("127.0.0.1", number))
        planned = Planned(request_id, b"%d" % number, end=100.0 + number, start_wall=1795234962.0 + number, host=host)
        planned._repeated = repeated
        if not repeated:
            planned.request.set(b"x-envoy-original-path", b"/%d" % number)
        expected = line(planned)
        assert line(planned.of(kind)) == expected
        assert (planned.facts is not None) is kept  # the first one was read
        assert str(number).encode() in expected


SAID_BY_FACTS = """
UPSTREAM_LOCAL_ADDRESS UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT(8) UPSTREAM_LOCAL_PORT UPSTREAM_REMOTE_ADDRESS
UPSTREAM_REMOTE_PORT UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT UPSTREAM_HOST_NAME UPSTREAM_HOST_NAME_WITHOUT_PORT UPSTREAM_PROTOCOL UPSTREAM_CLUSTER_RAW
UPSTREAM_CONNECTION_ID UPSTREAM_SERVER_NAME UPSTREAM_TLS_VERSION UPSTREAM_PEER_SUBJECT UPSTREAM_TRANSPORT_FAILURE_REASON UPSTREAM_METADATA(h:k)
METADATA(UPSTREAM_HOST:h:k) DOWNSTREAM_LOCAL_ADDRESS DOWNSTREAM_LOCAL_PORT DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(8)
DOWNSTREAM_DIRECT_REMOTE_PORT DOWNSTREAM_TLS_VERSION DOWNSTREAM_TLS_CIPHER DOWNSTREAM_PEER_URI_SAN DOWNSTREAM_PEER_SUBJECT DOWNSTREAM_PEER_CERT_V_START
REQUESTED_SERVER_NAME CONNECTION_ID DOWNSTREAM_TRANSPORT_FAILURE_REASON LISTENER_NAME FILTER_CHAIN_NAME METADATA(LISTENER:l:k) METADATA(CLUSTER:c:k)
METADATA(ROUTE:r:k) CONNECTION_TERMINATION_DETAILS REQUEST_DURATION REQUEST_TX_DURATION RESPONSE_DURATION RESPONSE_TX_DURATION ROUNDTRIP_DURATION
START_TIME(%Y) GRPC_STATUS GRPC_STATUS_NUMBER ROUTE_NAME HOSTNAME VIRTUAL_CLUSTER_NAME ACCESS_LOG_TYPE ENVIRONMENT(NOT_SET_ANYWHERE) BYTES_RECEIVED
UPSTREAM_REQUEST_ATTEMPT_COUNT
""".split()
OF_PATHS = "PATH PATH(NQ) QUERY_PARAM(a) QUERY_PARAMS QUERY_PARAMS(DECODED)".split()


@pytest.mark.parametrize("command", [*SAID_BY_FACTS, *OF_PATHS])
def test_commands_that_let_a_stream_keep_its_plan(command: str) -> None:
    """What they say of it is what they say of any stream."""
    line = Compiler().text(f"%{command}%|%REQ(X-REQUEST-ID)%\n")
    assert callable(line)
    kind = object()
    for kept in (False, True):
        planned = Planned(b"x", b"1")
        # As those of a plan: all of the request came at once, and so did the response.
        planned.request_end = planned.upstream_sent = planned.start
        planned.upstream_first = planned.end
        planned._rest = *planned._rest[:6], planned.start, planned.end, planned.start_wall
        expected = line(planned)
        allowed = {"connection_termination_details", "termination_details", "requested_server_name", "access_log_type", "connection"}
        planned._read = set()
        assert line(planned.of(kind)) == expected
        assert not kept or planned._read <= allowed, planned._read


def test_formats_that_look_further_read_the_stream() -> None:
    line = compile_json({"a": "%RESPONSE_CODE%", "b": "%REQ(:METHOD)%", "c": "%RESP(DATE)%"})
    kind = object()
    for _ in range(2):
        planned = Planned(b"x", b"1").of(kind)
        assert json.loads(line(planned)) == {"a": 200, "b": "POST", "c": None}


def test_more_kinds_of_lines_than_are_kept() -> None:
    line = compile_json({"a": "%RESPONSE_CODE%"})
    for _ in range(2):
        assert [json.loads(line(Stream(status=status)))["a"] for status in range(700)] == [*range(700)]


def test_values_that_come_again_and_those_that_do_not() -> None:
    line = compile_json({"unique": "%REQ(:PATH)%", "other": "%REQ(USER-AGENT)%"})
    for text in (b"/plain", b'/"quoted"', b"/\xc3\xa9", b"/\xff", b"/a\\b"):
        stream = Stream()
        stream.request.path = text
        stream.request.set(b"user-agent", text)
        values = json.loads(line(stream))
        assert values["unique"] == values["other"] == text.decode("latin-1" if b"\xff" in text else "utf-8")


def test_json_layout() -> None:
    fields = {
        "empty": "",
        "lit": 'lit"\\\t%%',
        "num": "%RESPONSE_CODE%x",
        "two": "%RESPONSE_CODE%%BYTES_SENT%",
        "nest": {"z": "%BYTES_SENT%", "a": ["%PROTOCOL%", {"q": "%REQ(nope)%"}, "x%REQ(nope)%"]},
        "n": 5,
        "f": 1.25,
        "b": True,
        "nul": None,
    }
    assert compile_json(fields)(Stream()) == (
        b'{"b":true,"empty":"","f":1.25,"lit":"lit\\"\\\\\\t%","n":5,"nest":{"a":["HTTP/1.1",{"q":null},"x-"],"z":11},"nul":null,"num":"200x","two":"20011"}\n'
    )


def test_json_without_empty_values() -> None:
    fields = {
        "z": "%REQ(nope)%",
        "mix": "a%REQ(nope)%b",
        "two": "%REQ(nope)%%REQ(nope)%",
        "nest": {"q": "%REQ(nope)%"},
        "l": ["%REQ(nope)%", "x"],
        "a": "1",
        "F": "%RESPONSE_FLAGS%",
        "n": 5,
        "code": "%RESPONSE_CODE%",
    }
    assert compile_json(fields, omit_empty=True)(Stream()) == b'{"F":"-","a":"1","code":200,"l":["x"],"mix":"ab","n":5,"two":""}\n'
    assert compile_json({"q": "%REQ(nope)%"}, omit_empty=True)(Stream()) == b"{}\n"


def substitution(**fields: Any) -> Any:
    return compile_substitution_format(convert.to_message(fields, substitution_format_string_pb2.SubstitutionFormatString))


def test_substitution_formats() -> None:
    text = "%REQ(nope)% %ENVIRONMENT(NOT_THERE)% %RESPONSE_FLAGS% %CUSTOM_FLAGS%|%REQ(nope):0% 100%% %START_TIME(%%)%\n"
    assert substitution(text_format_source={"inline_string": text})(Stream()) == b"- - - |- 100% %\n"
    assert substitution(text_format_source={"inline_string": text}, omit_empty_values=True)(Stream()) == b" - - | 100% %\n"
    assert substitution(text_format="fixed")(Stream()) == b"fixed"
    assert substitution(json_format={"a": "%BYTES_SENT%"})(Stream()) == b'{"a":11}\n'
    extension = {"name": "x", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery"}}
    query = substitution(text_format_source={"inline_string": "%REQ_WITHOUT_QUERY(X-ENVOY-ORIGINAL-PATH?:PATH):3%"}, formatters=[extension])
    assert query(Stream()) == b"/a/"


def test_header_values() -> None:
    stream = Stream(_filter_state={"x": "state"}, _metadata={"ns": {"k": {"a": 1.0}}})
    assert compile_header_value("plain 100%%") == b"plain 100%"
    for text, expected in (
        ("%REQ(nope)%", b""),
        ("a%REQ(nope)%b", b"ab"),
        ('%UPSTREAM_METADATA(["h", "k"])%', b"hv"),
        ('%DYNAMIC_METADATA(["ns","k"])%', b'{"a":1}'),
        ("%PER_REQUEST_STATE(x)%", b"state"),
        ("%REQ(user-agent)%", b't"\\\xc3\xa9\xff'),
        ("%RESPONSE_FLAGS% %ACCESS_LOG_TYPE%", b"- NotSet"),
    ):
        value = compile_header_value(text)
        assert callable(value)
        assert value(stream) == expected


def test_header_values_cannot_end_the_line() -> None:
    stream = Stream()
    assert stream.request is not None
    stream.request.path = b"/?q=a%0d%0aX:y%00"
    value = compile_header_value("v=%QUERY_PARAM(q)%")
    assert callable(value)
    assert value(stream) == b"v=a  X:y "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%", "Couldn't find valid command at position 0"),
        ("abc % x", "Couldn't find valid command at position 4"),
        ("%foo%", "Couldn't find valid command at position 0"),
        ("%%%", "Couldn't find valid command at position 2"),
        ("%DURATION%%", "Couldn't find valid command at position 10"),
        ("%REQ(a", "Couldn't find valid command"),
        ("%REQ(a):x%", "Couldn't find valid command"),
        ("%REQ(a\nb)%", "Couldn't find valid command"),
        ("%REQ(a):99999999999999999999999%", "Couldn't find valid command"),
        ("%START_TIME(%H)%M)%", "Couldn't find valid command at position 18"),
        ("%FOO%", "Not supported field in StreamInfo: FOO"),
        ("%REQ_WITHOUT_QUERY(a)%", "Not supported field in StreamInfo"),
        ("%REQ%", "REQ requires parameters"),
        ("%REQ()%", "REQ requires parameters"),
        ("%DYNAMIC_METADATA()%", "requires parameters"),
        ("%REQ(a?b?c)%", "More than 1 alternative header"),
        ("%REQ(a b)%", "invalid characters"),
        ("%REQ(a:b)%", "invalid characters"),
        ("%PROTOCOL(x)%", "does not take any parameters or length"),
        ("%PROTOCOL:3%", "does not take any parameters or length"),
        ("%START_TIME:3%", "does not allow length"),
        ("%CLUSTER_METADATA(a):3%", "does not allow length"),
        ("%START_TIME(%n)%", "contains newline"),
        ("%COMMON_DURATION(a:b:s)%", "Invalid common duration precision: s"),
        ("%COMMON_DURATION(a)%", "Invalid common duration"),
        ("%GRPC_STATUS(x)%", "GrpcStatusFormatter only supports"),
        ("%REQUESTED_SERVER_NAME(X)%", "Invalid REQUESTED_SERVER_NAME option: 'X'"),
        ("%REQUESTED_SERVER_NAME(SNI_FIRST:X)%", "Invalid REQUESTED_SERVER_NAME option: 'X'"),
        ("%PATH(X)%", "Invalid PATH option: 'X'"),
        ("%PATH(NQ:X)%", "Invalid PATH option: 'X'"),
        ("%QUERY_PARAMS(x)%", "Invalid QUERY_PARAMS option: 'x'"),
        ("%FILTER_STATE(a:X)%", "only support PLAIN/TYPED/FIELD"),
        ("%FILTER_STATE(a:FIELD)%", "FIELD should be used with the field name"),
        ("%FILTER_STATE(:PLAIN)%", "key cannot be empty"),
        ("%METADATA(FOO:x)%", "FOO is not supported type of metadata"),
        ("%COALESCE(x)%", "failed to parse JSON"),
        ("%COALESCE({})%", "must contain 'operators' array"),
        ('%COALESCE({"operators":1})%', "must contain 'operators' array"),
        ("%COALESCE([])%", "must contain 'operators' array"),
        ('%COALESCE({"operators":[]})%', "must not be empty"),
        ('%COALESCE({"operators":[1]})%', "index 0: operator entry must be"),
        ('%COALESCE({"operators":["PROTOCOL","FOO"]})%', "index 1: Not supported field"),
        ('%COALESCE({"operators":["REQ"]})%', "index 0: REQ requires parameters"),
        ('%COALESCE({"operators":[{"param":"x"}]})%', "must have 'command' field"),
        ('%COALESCE({"operators":[{"command":"REQ","param":"x","max_length":-1}]})%', "must be a positive integer"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_format(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("command", ["CEL(response.code)", "DOWNSTREAM_TLS_GROUP", "DOWNSTREAM_PEER_CHAIN_SERIALS"])
def test_what_we_cannot_say_is_unsupported(command: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_format(f"%{command}%")
    assert caught.value.problems[0].kind == UNSUPPORTED


def test_unsupported_formatter_extensions() -> None:
    extension = {"name": "cel", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.formatter.cel.v3.Cel"}}
    with pytest.raises(ConfigError, match=r"formatters\[0\].typed_config: the formatter extension"):
        substitution(text_format="x", formatters=[extension])


def test_tls_session_ids() -> None:
    stream = Stream()
    tls = SimpleNamespace(version="TLSv1.2", session_id="ab")
    stream.connection.tls = tls  # type: ignore[assignment]
    assert typed("%DOWNSTREAM_TLS_SESSION_ID%", stream) == "ab"


def test_a_request_that_could_not_be_read_has_no_line() -> None:
    stream = Stream(request=RequestHead(b"", b""), status=400)
    for command in ("%REQ(:METHOD)%", "%REQ(:PATH)%", "%REQ(x?:PATH)%", "%PATH%", "%PATH(NQ:PATH)%", "%QUERY_PARAMS%"):
        assert typed(command, stream) is None
    assert typed("%REQUEST_HEADERS_BYTES%", stream) == 0


_PARAMETERS = {
    "REQ": "x", "REQUEST_HEADER": "x", "RESP": "x", "RESPONSE_HEADER": "x", "TRAILER": "x", "RESPONSE_TRAILER": "x", "COMMON_DURATION": "DS_RX_BEG:DS_TX_BEG",
    "QUERY_PARAM": "x", "ENVIRONMENT": "X", "METADATA": "LISTENER:x", "DYNAMIC_METADATA": "x", "CLUSTER_METADATA": "x", "UPSTREAM_METADATA": "x",
    "FILTER_STATE": "x", "COALESCE": '{"operators": ["PROTOCOL"]}',
}  # fmt: skip


@pytest.mark.parametrize("protocol", [None, "HTTP/1.1"])
@pytest.mark.parametrize("command", sorted(operators.COMMANDS - {"REQ_WITHOUT_QUERY"}))
def test_every_command_can_be_asked_of_a_connection_without_requests(command: str, protocol: str | None):
    # What a listener's log shows of an HTTP connection: no request, response, route or codec.
    stream = StreamInfo()
    stream.connection = ConnectionInfo(1, Address("127.0.0.1", 1), Address("127.0.0.1", 2), 1.0)
    stream.protocol = protocol
    parameter = _PARAMETERS.get(command)
    assert isinstance(compile_format(f"[%{command}{f'({parameter})' if parameter else ''}%]")(stream), str)


def test_round_trip_time_is_asked_of_the_kernel():
    class Socket:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
            return (bytes(68) + (5999).to_bytes(4, sys.byteorder))[:size]

    class Closed:
        def getsockopt(self, *_: int) -> bytes:
            raise OSError("bad file descriptor")

    def told(sock: Any) -> str:
        return compile_format("%DOWNSTREAM_CX_RTT%")(Stream(codec=SimpleNamespace(transport=SimpleNamespace(get_extra_info=lambda _: sock))))

    assert [told(Socket()), told(Closed()), told(None)] == ["5", "0", "0"]
    assert compile_format("%DOWNSTREAM_CX_RTT%")(Stream()) == "0"
