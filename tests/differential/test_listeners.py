"""Listener filters and filter chains: SNI, ALPN, sniffed protocols, PROXY protocol, source and destination matches, addresses."""

import socket
import ssl
import struct
from typing import Any

from tests.differential.harness import (
    Case,
    Close,
    Response,
    Rig,
    Signal,
    Tls,
    Wait,
    bootstrap,
    check_cases,
    cluster,
    file_log,
    filter_,
    get,
    hcm,
    listener,
)

LOG = file_log(
    "%RESPONSE_CODE% chain=%FILTER_CHAIN_NAME% sni=%REQUESTED_SERVER_NAME% remote=%DOWNSTREAM_REMOTE_ADDRESS% direct=%DOWNSTREAM_DIRECT_REMOTE_ADDRESS% "
    "local=%DOWNSTREAM_LOCAL_ADDRESS% xff=%REQ(X-FORWARDED-FOR)% tls=%DOWNSTREAM_TLS_VERSION%\n",
)
LISTENER_LOG = [
    file_log("listener flags=%RESPONSE_FLAGS% details=%RESPONSE_CODE_DETAILS% termination=%CONNECTION_TERMINATION_DETAILS% sni=%REQUESTED_SERVER_NAME% "
             "failure=%DOWNSTREAM_TRANSPORT_FAILURE_REASON%\n")
]  # fmt: skip


def says(name: str, **options: Any) -> dict:
    """A connection manager that answers with a name."""
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": name}}}
    return hcm("chains", [{"name": "all", "domains": ["*"], "routes": [route]}], access_log=[LOG], **options)


def chain(name: str, match: dict | None = None, *, tls: str | None = None, alpn: tuple[str, ...] = (), **options: Any) -> dict:
    """A filter chain that answers with its name, with the certificate `tls` if given."""
    built: dict[str, Any] = {"name": name, "filters": [says(name, **options)]}
    if match is not None:
        built["filter_chain_match"] = match
    if tls:
        certificate = {"certificate_chain": {"filename": f"${{pem:{tls}}}"}, "private_key": {"filename": f"${{key:{tls}}}"}}
        context = {"tls_certificates": [certificate], "alpn_protocols": list(alpn)}
        built["transport_socket"] = {"name": "tls", "typed_config": {"@": "downstream_tls", "common_tls_context": context}}
    return built


TLS_INSPECTOR = [filter_("tls_inspector")]
LOOPBACK = [{"address_prefix": "127.0.0.0", "prefix_len": 8}]
CONFIG = bootstrap(
    listener("sni", chains=[
        chain("exact", {"server_names": ["a.test"]}, tls="server"),
        chain("wild", {"server_names": ["*.wild.test"]}, tls="server"),
        chain("deep_wild", {"server_names": ["*.deep.wild.test"]}, tls="server"),
        chain("any_tls", {"transport_protocol": "tls"}, tls="other"),
        chain("plain", {"transport_protocol": "raw_buffer"}),
    ], listener_filters=TLS_INSPECTOR, access_log=LISTENER_LOG),
    listener("no_inspector", chains=[chain("exact", {"server_names": ["a.test"]}, tls="server"), chain("rest", tls="server")]),
    listener("limited", filter_("connection_limit", stat_prefix="limited", max_connections=1), says("limited"), access_log=LISTENER_LOG),
    listener("proxy_v2_or_none", chains=[chain("v2_or_none")],
             listener_filters=[filter_("proxy_protocol", disallowed_versions=["V1"], allow_requests_without_proxy_protocol=True)]),
    listener("no_match", chains=[chain("exact", {"server_names": ["a.test"]}, tls="server")], listener_filters=TLS_INSPECTOR, access_log=LISTENER_LOG),
    listener("alpn", chains=[
        chain("foo", {"application_protocols": ["foo"]}, tls="server", alpn=("foo",)),
        chain("http", {"application_protocols": ["http/1.1"]}, tls="server", alpn=("http/1.1",)),
        chain("rest", tls="server"),
    ], listener_filters=TLS_INSPECTOR),
    listener("sniff", chains=[
        chain("http11", {"application_protocols": ["http/1.1"]}), chain("http10", {"application_protocols": ["http/1.0"]}), chain("neither"),
    ], listener_filters=[filter_("http_inspector")]),
    listener("default_chain", chains=[chain("never", {"prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}]})],
             default_filter_chain=chain("fallback"), access_log=LISTENER_LOG),
    listener("no_default_chain", chains=[chain("never", {"prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}]})], access_log=LISTENER_LOG),
    listener("balanced", chains=[chain("balanced")], connection_balance_config={"exact_balance": {}}),
    listener("balanced_tls", chains=[chain("balanced", tls="server")], listener_filters=TLS_INSPECTOR, connection_balance_config={"exact_balance": {}}),
    listener("addresses", chains=[
        chain("longest", {"prefix_ranges": [{"address_prefix": "127.0.0.1", "prefix_len": 32}]}),
        chain("shorter", {"prefix_ranges": LOOPBACK}),
    ]),
    listener("sources", chains=[
        chain("local_source", {"source_type": "SAME_IP_OR_LOOPBACK"}),
        chain("external_source", {"source_type": "EXTERNAL"}),
    ], listener_filters=[filter_("proxy_protocol", allow_requests_without_proxy_protocol=True)]),
    listener("source_ranges", chains=[
        chain("ten", {"source_prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}]}),
        chain("ten_port", {"source_prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}], "source_ports": [77]}),
        chain("direct", {"direct_source_prefix_ranges": LOOPBACK}),
    ], listener_filters=[filter_("proxy_protocol", allow_requests_without_proxy_protocol=True)]),
    listener("ports", chains=[chain("port_80", {"destination_port": 80}), chain("other_port")],
             listener_filters=[filter_("proxy_protocol", allow_requests_without_proxy_protocol=True)]),
    listener("proxy", chains=[chain("proxied", use_remote_address=True)], listener_filters=[filter_("proxy_protocol")], access_log=LISTENER_LOG),
    listener("proxy_optional", chains=[chain("proxied")], listener_filters=[filter_("proxy_protocol", allow_requests_without_proxy_protocol=True)]),
    listener("proxy_v2_only", chains=[chain("proxied")], listener_filters=[filter_("proxy_protocol", disallowed_versions=["V1"])]),
    listener("proxy_tlv", chains=[{"name": "tlv", "filters": [hcm("chains", [{"name": "all", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "route": {"cluster": "a"}, "request_headers_to_add": [
            {"header": {"key": "x-tlv", "value": "%DYNAMIC_METADATA(envoy.filters.listener.proxy_protocol:corp)%"}}]}]}])]}],
        listener_filters=[filter_("proxy_protocol", rules=[{"tlv_type": 0xE2, "on_tlv_present": {"key": "corp"}}])]),
    listener("proxy_then_tls", chains=[chain("secure", {"server_names": ["a.test"]}, tls="server")],
             listener_filters=[filter_("proxy_protocol"), *TLS_INSPECTOR]),
    listener("filters_timeout", chains=[chain("late")], listener_filters=TLS_INSPECTOR, listener_filters_timeout="0.1s"),
    listener("filters_timeout_continue", chains=[chain("late")], listener_filters=TLS_INSPECTOR, listener_filters_timeout="0.1s",
             continue_on_listener_filters_timeout=True),
    clusters=[cluster("a")],
)  # fmt: skip

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def v2(command: int, family: int, addresses: bytes, tlvs: bytes = b"", *, length: int | None = None) -> bytes:
    """A PROXY protocol v2 header."""
    body = addresses + tlvs
    return SIGNATURE + bytes([0x20 | command, family]) + struct.pack("!H", len(body) if length is None else length) + body


def ipv4(source: str, source_port: int, destination: str = "127.0.0.1", port: int = 80) -> bytes:
    return socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack("!HH", source_port, port)


def ipv6(source: str, source_port: int) -> bytes:
    return socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, "::1") + struct.pack("!HH", source_port, 80)


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + struct.pack("!H", len(value)) + value


V1 = b"PROXY TCP4 10.1.2.3 127.0.0.1 77 80\r\n"
HEADERS = {
    "v1": V1,
    "v1_ipv6": b"PROXY TCP6 2001:db8::7 ::1 77 80\r\n",
    "v1_unknown": b"PROXY UNKNOWN\r\n",
    "v1_unknown_with_rest": b"PROXY UNKNOWN ff::1 ff::2 1 2\r\n",
    "v2": v2(1, 0x11, ipv4("10.1.2.3", 77)),
    "v2_ipv6": v2(1, 0x21, ipv6("2001:db8::7", 77)),
    "v2_local": v2(0, 0, b""),
    "v2_local_with_addresses": v2(0, 0x11, ipv4("10.1.2.3", 77)),
    "v2_tlv": v2(1, 0x11, ipv4("10.1.2.3", 77), tlv(0xE2, b"acme") + tlv(0x04, b"")),
    "v2_unspecified": v2(1, 0x00, b""),
}
BAD_HEADERS = {
    "none": b"",
    "v1_bad_address": b"PROXY TCP4 10.1.2 127.0.0.1 77 80\r\n",
    "v1_bad_port": b"PROXY TCP4 10.1.2.3 127.0.0.1 77777 80\r\n",
    "v1_family_mismatch": b"PROXY TCP4 ::1 ::1 77 80\r\n",
    "v1_too_few": b"PROXY TCP4 10.1.2.3\r\n",
    "v1_no_end": b"PROXY TCP4 " + b"1" * 120,
    "v1_lower_case": b"proxy TCP4 10.1.2.3 127.0.0.1 77 80\r\n",
    "v1_leading_zero_port": b"PROXY TCP4 10.1.2.3 127.0.0.1 077 80\r\n",
    "v2_version_3": SIGNATURE + b"\x31\x11\x00\x0c" + ipv4("10.1.2.3", 77),
    "v2_bad_command": v2(5, 0x11, ipv4("10.1.2.3", 77)),
    "v2_udp": v2(1, 0x12, ipv4("10.1.2.3", 77)),
    "v2_unix": v2(1, 0x31, b"\0" * 216),
    "v2_too_short": v2(1, 0x11, b"\x0a\x01\x02\x03"),
    "v2_tlv_overruns": v2(1, 0x11, ipv4("10.1.2.3", 77), b"\xe2\xff\xff"),
}


def proxied(on: str, name: str, header: bytes, **fields: Any) -> Case:
    """A PROXY header in front of a request, in one piece."""
    return Case(f"{on}_{name}", [header + get(), Response()], on=on, **{"then": "leave"} | fields)


async def in_pieces(rig: Rig) -> Any:
    """A PROXY header of which each byte comes alone."""
    wire = await rig.connect("proxy")
    for byte in V1:
        wire.send(bytes([byte]))
    return await rig.exchange(wire, get())


async def one_too_many(rig: Rig) -> Any:
    """The second of two connections is closed by the network filter in front of the connection manager."""
    first = await rig.connect("limited")
    answer = await rig.exchange(first, get())
    second = await rig.connect("limited")
    await second.until(lambda: False)
    return [answer, bytes(second.received)]


async def client_hello_in_pieces(rig: Rig) -> Any:
    """A ClientHello record cut in two by TCP: the inspector waits for the rest."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    tls = context.wrap_bio(incoming, outgoing, server_hostname="a.test")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = outgoing.read()
    wire = await rig.connect("sni")
    wire.send(hello[:50])
    wire.send(hello[50:])
    await wire.until(lambda: len(wire.buffer) > 5)
    return [wire.buffer[0], bytes(wire.buffer[1:3]).hex()]


SNIFFED = {
    "get": get(),
    "post": b"POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: 0\r\n\r\n",
    "http_1_0": b"GET / HTTP/1.0\r\nhost: a.test\r\n\r\n",
    "garbage": b"\x00\x01\x02garbage\r\n\r\n",
    "smtp": b"EHLO x\r\n\r\n",
}
CASES = [
    *[Case(f"sni_{name}", get(), on="sni", tls=Tls(sni=sni)) for name, sni in {
        "exact": "a.test", "upper": "A.TEST", "wild": "x.wild.test", "deeper": "x.y.wild.test", "longest_wild": "x.deep.wild.test", "bare_wild": "wild.test",
        "other": "b.test", "absent": None,
    }.items()],
    Case("sni_plaintext", get(), on="sni"),
    Case("sni_hello_in_pieces", client_hello_in_pieces),
    Case("sni_garbage", [b"\x16\x03\x01\x00\x05hello", Response()], on="sni", then="closed"),
    Case("sni_no_hello", [b"\x16\x03\x01\x00\x05\x02\x00\x00\x01x", Response()], on="sni", then="closed"),
    Case("no_inspector", get(), on="no_inspector", tls=Tls()),
    Case("one_connection_too_many", one_too_many),
    Case("no_match_other_name", get(), on="no_match", tls=Tls(sni="b.test"), then="leave"),
    Case("no_match_plaintext", [get(), Response()], on="no_match", then="closed"),
    *[Case(f"alpn_{name}", get(), on="alpn", tls=Tls(alpn=alpn)) for name, alpn in {
        "foo": ("foo",), "http": ("http/1.1",), "both": ("foo", "http/1.1"), "both_other_order": ("http/1.1", "foo"), "unknown": ("bar",), "none": (),
    }.items()],
    *[Case(f"sniff_{name}", [request, Response()], on="sniff", then="open" if name in {"get", "post"} else "closed") for name, request in SNIFFED.items()],
    Case("default_filter_chain", get(), on="default_chain"),
    Case("no_filter_chain", [get(), Response()], on="no_default_chain", then="closed"),
    Case("balanced", get(), on="balanced"),
    Case("balanced_tls", get(), on="balanced_tls", tls=Tls()),
    Case("longest_prefix", get(), on="addresses"),
    Case("source_type_local", get(), on="sources"),
    proxied("sources", "external", V1),
    proxied("source_ranges", "ten", b"PROXY TCP4 10.1.2.3 127.0.0.1 78 80\r\n"),
    proxied("source_ranges", "ten_port", V1),
    proxied("source_ranges", "other", b"PROXY TCP4 11.1.2.3 127.0.0.1 78 80\r\n"),
    proxied("ports", "match", V1),
    proxied("ports", "other", b"PROXY TCP4 10.1.2.3 127.0.0.1 77 81\r\n"),
    *[proxied("proxy", name, header) for name, header in (HEADERS | BAD_HEADERS).items()],
    Case("proxy_in_pieces", in_pieces),
    proxied("proxy_optional", "with", V1),
    proxied("proxy_optional", "without", b""),
    proxied("proxy_v2_only", "v1", V1),
    proxied("proxy_v2_only", "v1_bad", BAD_HEADERS["v1_bad_address"]),
    proxied("proxy_v2_only", "v2", HEADERS["v2"]),
    proxied("proxy_v2_or_none", "v1", V1, then="closed"),
    proxied("proxy_v2_or_none", "none", b""),
    proxied("proxy_tlv", "present", HEADERS["v2_tlv"]),
    proxied("proxy_tlv", "absent", HEADERS["v2"]),
    Case("filters_timeout", [Response()], on="filters_timeout", then="closed"),
    Case("filters_timeout_continue", [Signal("silent"), Wait("silent")], on="filters_timeout_continue", then="open"),
    Case("closed_before_first_byte", [Close()], on="sni"),
]  # fmt: skip

test_case = check_cases(CASES)
