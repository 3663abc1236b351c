"""Filter chain match: Envoy's order, most specific first, no way back."""

from __future__ import annotations

from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.net.address import Address
from meshproxy.net.connection import ConnectionInfo
from meshproxy.net.filter_chain_match import FilterChainMatcher
from tests.unit.net_help import message


def matcher(**matches: dict[str, Any]) -> FilterChainMatcher[str]:
    return FilterChainMatcher((message("envoy.config.listener.v3.FilterChainMatch", match), name) for name, match in matches.items())


def conn(
    remote: str = "10.9.9.9:1234",
    local: str = "10.0.0.1:80",
    *,
    sni: str | None = None,
    alpn: tuple[str, ...] = (),
    transport: str = "raw_buffer",
    direct: str | None = None,
) -> ConnectionInfo:
    made = ConnectionInfo(1, Address.parse(remote), Address.parse(local), 0.0)
    made.server_name = sni
    made.application_protocols = alpn
    made.transport_protocol = transport
    if direct is not None:
        made.direct_remote = Address.parse(direct)
    return made


def prefix(text: str) -> dict[str, Any]:
    ip, _, length = text.partition("/")
    return {"address_prefix": ip, "prefix_len": int(length)}


def test_one_chain_for_everything():
    assert matcher(all={}).find(conn()) == "all"
    assert matcher(all={}).find(conn(remote="@x", local="/run/x")) == "all"


def test_destination_port_has_no_way_back():
    found = matcher(port={"destination_port": 80, "server_names": ["a.com"]}, any={})
    assert found.find(conn(sni="a.com")) == "port"
    assert found.find(conn(local="10.0.0.1:81")) == "any"
    # There is a branch for port 80, so the catch-all is out of reach.
    assert found.find(conn()) is None


def test_most_specific_destination():
    found = matcher(
        wide={"prefix_ranges": [prefix("10.0.0.0/8")]},
        narrow={"prefix_ranges": [prefix("10.0.0.0/24"), prefix("2001:db8::/32")]},
        host={"prefix_ranges": [prefix("10.0.0.7/32")]},
    )
    assert found.find(conn(local="10.0.0.7:1")) == "host"
    assert found.find(conn(local="10.0.0.8:1")) == "narrow"
    assert found.find(conn(local="10.1.0.8:1")) == "wide"
    assert found.find(conn(local="[2001:db8::5]:1")) == "narrow"
    assert found.find(conn(local="192.0.2.1:1")) is None
    assert found.find(conn(local="[2001:db9::5]:1")) is None
    assert found.find(conn(local="/run/x")) is None


def test_unix_sockets_count_as_the_last_address():
    assert matcher(all={"prefix_ranges": [prefix("0.0.0.0/0")]}).find(conn(local="/run/x", remote="@y")) == "all"


def test_server_names():
    found = matcher(
        exact={"server_names": ["www.Example.com"]},
        wild={"server_names": ["*.example.com"]},
        wider={"server_names": ["*.com"]},
        none={},
    )
    assert found.find(conn(sni="www.example.com")) == "exact"
    assert found.find(conn(sni="a.example.com")) == "wild"
    assert found.find(conn(sni="a.b.example.com")) == "wild"
    assert found.find(conn(sni="example.com")) == "wider"
    assert found.find(conn(sni="com")) == "none"
    assert found.find(conn(sni="example.org")) == "none"
    assert found.find(conn()) == "none"
    assert found.find(conn(sni=".example.com")) == "wild"


def test_server_name_has_no_way_back():
    found = matcher(exact={"server_names": ["a.com"], "transport_protocol": "tls"}, wild={"server_names": ["*.com"]}, none={})
    assert found.find(conn(sni="a.com")) is None
    assert found.find(conn(sni="a.com", transport="tls")) == "exact"


def test_transport_and_application_protocols():
    found = matcher(
        tls={"transport_protocol": "tls"},
        h2={"transport_protocol": "tls", "application_protocols": ["h2"]},
        h1={"transport_protocol": "tls", "application_protocols": ["http/1.1"]},
        plain={"transport_protocol": "raw_buffer"},
    )
    assert found.find(conn(transport="tls")) == "tls"
    assert found.find(conn(transport="tls", alpn=("spdy", "http/1.1", "h2"))) == "h1"
    assert found.find(conn(transport="tls", alpn=("h2", "http/1.1"))) == "h2"
    assert found.find(conn()) == "plain"


def test_source_type():
    found = matcher(local={"source_type": "SAME_IP_OR_LOOPBACK"}, external={"source_type": "EXTERNAL"})
    assert found.find(conn(remote="127.0.0.2:1", local="127.0.0.1:1")) == "local"
    assert found.find(conn(remote="10.0.0.1:1", local="10.0.0.1:80")) == "local"
    assert found.find(conn(remote="[::1]:1", local="[::1]:80")) == "local"
    assert found.find(conn(remote="@x", local="/run/y")) == "local"
    assert found.find(conn()) == "external"
    found = matcher(external={"source_type": "EXTERNAL"}, any={})
    assert found.find(conn(remote="127.0.0.1:1", local="127.0.0.1:1")) == "any"


def test_source_ip_and_port():
    found = matcher(
        ports={"source_prefix_ranges": [prefix("10.9.0.0/16")], "source_ports": [1234, 1235]},
        net={"source_prefix_ranges": [prefix("10.9.0.0/16")]},
        any={},
    )
    assert found.find(conn()) == "ports"
    assert found.find(conn(remote="10.9.9.9:9")) == "net"
    assert found.find(conn(remote="10.8.9.9:1234")) == "any"


def test_source_prefix_has_no_way_back():
    found = matcher(ports={"source_prefix_ranges": [prefix("10.9.9.0/24")], "source_ports": [1]}, net={"source_prefix_ranges": [prefix("10.9.0.0/16")]})
    assert found.find(conn()) is None


def test_direct_source_is_the_tcp_peer():
    found = matcher(balancer={"direct_source_prefix_ranges": [prefix("192.0.2.0/24")]}, any={})
    assert found.find(conn(direct="192.0.2.5:1")) == "balancer"
    assert found.find(conn()) == "any"


def test_order_of_criteria():
    # The destination decides before the server name, however much better the name would fit.
    found = matcher(ip={"prefix_ranges": [prefix("10.0.0.1/32")]}, name={"server_names": ["a.com"]})
    assert found.find(conn(sni="a.com")) == "ip"


@pytest.mark.parametrize(
    ("matches", "path", "why"),
    [
        ({"a": {}, "b": {}}, "[1]", "same matching rules"),
        ({"a": {"server_names": ["a", "b"]}, "b": {"server_names": ["b", "c"]}}, "[1]", "overlapping"),
        ({"a": {"server_names": ["a"]}, "b": {"server_names": ["A"]}}, "[1]", "overlapping"),
        ({"a": {"prefix_ranges": [prefix("10.0.0.0/8")]}, "b": {"prefix_ranges": [prefix("10.1.0.0/8")]}}, "[1]", "overlapping"),
        ({"a": {"server_names": ["w*.a.com"]}}, "[0].filter_chain_match.server_names[0]", "partial wildcards"),
        ({"a": {"prefix_ranges": [prefix("10.0.0/8")]}}, "[0].filter_chain_match.prefix_ranges[0].address_prefix", "malformed"),
    ],
)
def test_refused(matches, path, why):
    with pytest.raises(ConfigError) as caught:
        matcher(**matches)
    assert caught.value.problems[0].path == path
    assert why in caught.value.problems[0].why
