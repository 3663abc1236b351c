"""Every parser of ours with its corpus, with damaged copies of it, and with anything: a result that holds, or the parser's own error, and no other."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable
from typing import Any

import pytest
from envoy.config.core.v3 import address_pb2, base_pb2, substitution_format_string_pb2
from envoy.type.v3 import percent_pb2
from google.protobuf import duration_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.admin import message as admin
from meshproxy.api import bootstrap, cidr, convert, datasource, document, matchers, runtime, uri_template
from meshproxy.api.errors import ConfigError
from meshproxy.codec import client_hello, grpc, proxy_protocol
from meshproxy.codec.h1.grammar import ProtocolError, parse_header_line
from meshproxy.codec.h1.request import RequestParser
from meshproxy.codec.h1.response import ResponseParser
from meshproxy.codec.headers import RequestHead
from meshproxy.http.hash_policy import cookie_value
from meshproxy.http.paths import KEEP, PASS, REJECT, UNESCAPE_AND_FORWARD, UNESCAPE_AND_REDIRECT, PathOptions, normalise
from meshproxy.http.request_head import _from_right
from meshproxy.net import address
from meshproxy.observe import format as formats
from tests import corpus
from tests.property.test_h1_properties import run, without_partial_data
from tests.property.test_observe import stream

Check = Callable[[bytes], Any]


def text(data: bytes) -> str:
    return data.decode("latin-1")


# -- messages


def h1_request(data: bytes) -> None:
    assert without_partial_data(run(RequestParser, data, list(range(0, len(data), 3)))) == without_partial_data(run(RequestParser, data, []))


def h1_response(data: bytes) -> None:
    assert without_partial_data(run(ResponseParser, data, list(range(0, len(data), 3)))) == without_partial_data(run(ResponseParser, data, []))


def chunks(data: bytes) -> None:
    h1_request(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    h1_response(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data)


def header_line(data: bytes) -> None:
    name, value = parse_header_line(data)
    assert re.fullmatch(rb"[a-z0-9!#$%&'*+.^_`|~-]+", name)
    assert not set(value) & set(b"\r\n\0")
    assert value.strip(b" \t") == value
    assert data.lower().startswith(name + b":")
    assert value in data


def proxy_header(data: bytes) -> None:
    header = proxy_protocol.parse(data)
    assert header is None or 0 < header.size <= len(data)


def tls_hello(data: bytes) -> None:
    hello = client_hello.parse(data)
    assert hello is None or 0 < hello.size <= len(data)


# -- parts of requests


def path(data: bytes) -> None:
    for escaped in (KEEP, REJECT, UNESCAPE_AND_REDIRECT, UNESCAPE_AND_FORWARD):
        for normalize in (False, True):
            for merge in (False, True):
                options = PathOptions(normalize=normalize, merge_slashes=merge, escaped_slashes=escaped)
                result, verdict = normalise(data, options)
                if verdict != PASS or not data.startswith(b"/"):
                    continue
                if options.is_plain(data):
                    assert result == data
                bare, _, rest = result.partition(b"?")
                assert rest == data.partition(b"?")[2]
                assert bare.startswith(b"/")
                if normalize:
                    assert not {b".", b".."} & set(bare.split(b"/")[1:])
                    if escaped == KEEP:
                        assert normalise(result, options) == (result, PASS)


def query(data: bytes) -> None:
    found = matchers.parse_query(data)
    for name, value in found.items():
        assert name + b"=" + value in data or (not value and name in data)
        assert b"&" not in name + value
    request = admin.Request.from_target("GET", text(data))
    assert set(request.query) <= set(admin.parse_query(text(data).partition("?")[2]))
    assert "" not in request.query


def cookie(data: bytes) -> None:
    head = RequestHead(b"GET", b"/", b"a", [(b"cookie", data)])
    for name in (b"a", b"c", b"__Host-a", b"", b"\xff"):
        parts = [part.partition(b"=") for part in data.split(b";")]
        values = [value for key, equals, value in parts if equals and key.lstrip(b" ") == name]
        expected = values[0] if values else b""
        quoted = re.fullmatch(rb'(?s)"(.*)"', expected) if len(expected) > 1 else None
        assert cookie_value(head, name) == (quoted[1] if quoted else expected)


def forwarded_for(data: bytes) -> None:
    parts = [part.strip(b" \t") for part in data.split(b",")]
    for skip in range(4):
        found, alone = _from_right(data, skip)
        assert not alone or (found is not None and len(parts) == 1)
        if found is not None:
            assert ipaddress.ip_address(found.ip.partition("%")[0]) == ipaddress.ip_address(text(parts[-1 - skip]).partition("%")[0])


def timeout_headers(data: bytes) -> None:
    milliseconds = grpc.parse_timeout(data)
    assert milliseconds is None or 0 <= milliseconds < 1 << 63
    number = matchers.parse_int64(data)
    assert number is None or -(1 << 63) <= number < 1 << 63


# -- configuration


def ip_address(data: bytes) -> None:
    for prefix in (0, 8, 200):
        proto = address_pb2.CidrRange(address_prefix=text(data))
        proto.prefix_len.value = prefix
        try:
            packed, length = cidr.parse_cidr(proto)
        except ConfigError:
            continue
        assert len(packed) in {4, 16}
        assert 0 <= length <= 8 * len(packed)
    canonical = address.canonical_ip(text(data))
    assert address.canonical_ip(canonical) == canonical
    assert address.pack_ip(canonical) == ipaddress.ip_address(text(data).partition("%")[0]).packed


def template(data: bytes) -> None:
    compiled = uri_template.UriTemplate(text(data))
    rewrite = uri_template.compile_rewrite("/new", compiled)
    for some in corpus.load("path"):
        bare = some.partition(b"?")[0]
        assert rewrite(bare) == (b"/new" if compiled.matches(bare) else None)


def template_rewrite(data: bytes) -> None:
    rewrite = uri_template.compile_rewrite(text(data), uri_template.UriTemplate("/{x}/{y}"))
    assert rewrite(b"/1") is None
    assert isinstance(rewrite(b"/1/2"), bytes)


def duration(data: bytes) -> None:
    message = convert.to_message(text(data), duration_pb2.Duration)
    whole, _, fraction = text(data).removesuffix("s").partition(".")
    assert abs(message.seconds) <= 315_576_000_000
    assert message.seconds == int(whole or 0)
    assert abs(message.nanos) == int(fraction.ljust(9, "0") or 0)


def percentage(data: bytes) -> None:
    value = document.parse(data)
    with contextlib.suppress(ConfigError):
        convert.to_message(value, percent_pb2.Percent)
    fraction = convert.to_message(value, percent_pb2.FractionalPercent)
    made = base_pb2.RuntimeFractionalPercent(default_value=fraction, runtime_key="k")
    chance = runtime.compile_chance(made, runtime.Runtime())
    assert isinstance(chance if isinstance(chance, bool) else chance(5), bool)


def data_source(data: bytes) -> None:
    source = convert.to_message(document.parse(data), base_pb2.DataSource)
    assert len(datasource.read(source, allow_empty=True, max_size=1 << 20)) <= 1 << 20


def runtime_value(data: bytes) -> None:
    entry = runtime.parse_entry(data.decode())
    assert isinstance(entry.raw, str)


def configuration(data: bytes) -> None:
    document.parse(data)
    bootstrap.parse(data)


def access_log_format(data: bytes) -> None:
    render = formats.compile_format(text(data))
    made = stream(request=RequestHead(b"GET", b'/\xff"', b"a", [(b"x", b'\xff"')]))
    assert isinstance(render(made), str)
    formats.compile_header_value(text(data))


def local_reply(data: bytes) -> None:
    proto = convert.to_message(document.parse(data), substitution_format_string_pb2.SubstitutionFormatString)
    compiled = formats.compile_substitution_format(proto)
    made = stream(request=RequestHead(b"GET", b'/\xff"', b"a", [(b"x", b'\xff"')]))
    assert isinstance(compiled(made) if callable(compiled) else compiled, bytes)


OWN: dict[str, tuple[Check, str, tuple[type[Exception], ...]]] = {
    "h1_request": (h1_request, "h1_request", ()),
    "h1_response": (h1_response, "h1_response", ()),
    "chunks": (chunks, "chunks", ()),
    "header_line": (header_line, "header_line", (ProtocolError,)),
    "proxy_protocol": (proxy_header, "proxy_protocol", (proxy_protocol.ProxyProtocolError,)),
    "client_hello": (tls_hello, "client_hello", (client_hello.NotClientHelloError, client_hello.TooLargeError)),
    "path": (path, "path", ()),
    "query": (query, "query", ()),
    "cookie": (cookie, "cookie", ()),
    "forwarded_for": (forwarded_for, "forwarded_for", ()),
    "timeout_headers": (timeout_headers, "duration", ()),
    "address": (ip_address, "address", (ValueError,)),
    "uri_template": (template, "uri_template", (ConfigError,)),
    "uri_template_rewrite": (template_rewrite, "uri_template", (ConfigError,)),
    "duration": (duration, "duration", (ConfigError,)),
    "percentage": (percentage, "percentage", (ConfigError,)),
    "data_source": (data_source, "data_source", (ConfigError,)),
    "runtime_value": (runtime_value, "runtime_value", (ConfigError, UnicodeDecodeError)),
    "document": (configuration, "document", (ConfigError,)),
    "access_log_format": (access_log_format, "access_log_format", (ConfigError,)),
    "local_reply": (local_reply, "local_reply", (ConfigError,)),
}


def attempt(name: str, data: bytes) -> bool:
    """Whether the parser accepts the data; its own errors are no failure."""
    check, _, own = OWN[name]
    try:
        check(data)
    except own:
        return False
    return True


@pytest.mark.parametrize("name", OWN)
def test_corpus(name: str):
    """Each line; and a corpus in which nothing is right, or nothing wrong, would test little."""
    verdicts = {attempt(name, data) for data in corpus.load(OWN[name][1])}
    assert True in verdicts
    if OWN[name][2]:
        assert False in verdicts


@pytest.mark.parametrize("name", OWN)
def test_damaged(name: str):
    for data in corpus.mutants(OWN[name][1], 300, seed=1):
        attempt(name, data)


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80) | st.text(st.characters(max_codepoint=255), max_size=40).map(lambda value: value.encode("latin-1")))
def test_anything(name: str, data: bytes):
    attempt(name, data)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_long_numbers(name: str, digits: int):
    """Python refuses to read numbers of more than 4,300 digits with an error of its own."""
    for data in corpus.load(OWN[name][1])[:12]:
        attempt(name, re.sub(rb"[0-9]+", b"9" * digits, data))
    attempt(name, b"1" * digits)
