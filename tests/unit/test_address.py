"""Addresses."""

from __future__ import annotations

import socket

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.net.address import Address, canonical_ip
from tests.unit.net_help import message

ADDRESS = "envoy.config.core.v3.Address"


@pytest.mark.parametrize("text", ["1.2.3.4:80", "[::1]:80", "[2001:db8::1]:65535", "/run/x.sock", "@abstract"])
def test_text_round_trip(text):
    assert Address.parse(text).text == text


@pytest.mark.parametrize("text", ["", "1.2.3.4", "1.2.3.4:", "1.2.3.4:65536", "::1:80", "[::1]", "host:80", "1.2.3:80", "1.2.3.4:+8", "1.2.3.4:٣"])
def test_malformed(text):
    with pytest.raises(ValueError):
        Address.parse(text)


def test_equal_by_value():
    assert Address("1.2.3.4", 80) == Address.parse("1.2.3.4:80")
    assert len({Address("1.2.3.4", 80), Address.parse("1.2.3.4:80"), Address("1.2.3.4", 81), Address.pipe("/x")}) == 3
    assert Address("1.2.3.4", 80) != "1.2.3.4:80"


def test_bytes():
    assert Address("1.2.3.4", 80).ip_bytes == b"\x01\x02\x03\x04"
    assert Address.pipe("/x").ip_bytes == b""


def test_from_sockaddr():
    assert Address.from_sockaddr(socket.AF_INET, ("1.2.3.4", 5)).text == "1.2.3.4:5"
    assert Address.from_sockaddr(socket.AF_INET6, ("::1", 5, 0, 0)).text == "[::1]:5"
    # A dual-stack listener's IPv4 peers are IPv4 peers.
    assert Address.from_sockaddr(socket.AF_INET6, ("::ffff:1.2.3.4", 5, 0, 0)) == Address("1.2.3.4", 5)
    assert Address.from_sockaddr(socket.AF_UNIX, "").text == ""
    assert Address.from_sockaddr(socket.AF_UNIX, b"\0name").text == "@name"


def test_sockaddr_of_an_abstract_socket():
    assert Address.parse("@name").sockaddr == "\0name"


def test_from_proto():
    assert Address.from_proto(message(ADDRESS, {"socket_address": {"address": "2001:DB8:0::1", "port_value": 8}})).text == "[2001:db8::1]:8"
    assert Address.from_proto(message(ADDRESS, {"pipe": {"path": "/x"}})).kind == "pipe"
    for document, path in (
        ({"socket_address": {"address": "name", "port_value": 8}}, "socket_address.address"),
        ({"socket_address": {"address": "1.2.3.4", "named_port": "http"}}, "socket_address.named_port"),
        ({"envoy_internal_address": {"server_listener_name": "x"}}, "envoy_internal_address"),
        ({}, ""),
    ):
        with pytest.raises(ConfigError) as caught:
            Address.from_proto(message(ADDRESS, document))
        assert caught.value.problems[0].path == path


def test_canonical_ip():
    assert canonical_ip("FE80::1%eth0") == "fe80::1%eth0"
    for text in ("1.2.3.04", "1.2.3.4%1", "1.2.3.4\0", ""):
        if text == "1.2.3.4%1":
            assert canonical_ip(text) == "1.2.3.4"
            continue
        with pytest.raises(ValueError):
            canonical_ip(text)
