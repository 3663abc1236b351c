"""Hash policies, against the choices that Envoy 1.40 made among 97 equally weighted clusters."""

from __future__ import annotations

from typing import Any

import pytest
import xxhash

from meshproxy.net.address import Address
from tests.unit.route_help import one_host, only_route, problems, stream, to

CLUSTERS = 97
HEADER = {"header": {"header_name": "X-A"}}
REWRITTEN = {"header": {"header_name": "x-a", "regex_rewrite": {"pattern": {"regex": "([a-z]+)[0-9]*"}, "substitution": "\\1"}}}
COOKIE = {"cookie": {"name": "k"}}
QUERY = {"query_parameter": {"name": "k"}}
SOURCE = {"connection_properties": {"source_ip": True}}
TERMINAL = {"terminal": True}


def hashed(policies: list[dict[str, Any]], path: bytes = b"/", *items: tuple[bytes, bytes], remote: str = "127.0.0.1", **attributes: Any) -> int | None:
    one = stream(path, *items, **attributes)
    one.connection.remote = Address(remote, 1)
    policy = only_route("c", route={"hash_policy": policies}).hash
    return None if policy is None else policy(one)


@pytest.mark.parametrize(
    ("policies", "path", "items", "cluster"),
    [
        ([HEADER], b"/", [(b"x-a", b"v1")], 72),
        ([HEADER], b"/", [(b"x-a", b"b"), (b"x-a", b"a")], 69),
        ([HEADER], b"/", [(b"x-a", b"a"), (b"x-a", b"b")], 69),
        ([REWRITTEN], b"/", [(b"x-a", b"foo12")], 6),
        ([REWRITTEN], b"/", [(b"x-a", b"foo3bar4")], 5),
        ([COOKIE], b"/", [(b"cookie", b"a=1; k=v; k=w")], 62),
        ([COOKIE], b"/", [(b"cookie", b'k="quoted"')], 9),
        ([COOKIE], b"/", [(b"cookie", b"a=1"), (b"cookie", b"k=second")], 74),
        ([COOKIE], b"/", [(b"cookie", b"k=a=b ;k=c")], 3),
        ([COOKIE], b"/", [(b"cookie", b"k= sp")], 41),
        ([QUERY], b"/q?k=v&k=w", [], 62),
        ([QUERY], b"/q?k", [], 11),
        ([QUERY], b"/q?a&k=%41", [], 10),
        ([SOURCE], b"/", [], 55),
        ([HEADER, QUERY], b"/?k=z", [(b"x-a", b"q")], 36),
        ([HEADER, QUERY], b"/", [(b"x-a", b"q")], 10),
        ([HEADER, QUERY], b"/?k=z", [], 50),
        ([HEADER, HEADER], b"/", [(b"x-a", b"q")], 56),
        ([HEADER | TERMINAL, QUERY], b"/?k=z", [(b"x-a", b"q")], 10),
        ([HEADER | TERMINAL, QUERY], b"/?k=z", [], 50),
    ],
)
def test_hashes(policies, path, items, cluster):
    found = hashed(policies, path, *items)
    assert found is not None
    assert found % CLUSTERS == cluster


@pytest.mark.parametrize(
    ("policies", "path", "items"),
    [([HEADER], b"/", []), ([COOKIE], b"/", [(b"cookie", b"k=; k=x")]), ([COOKIE], b"/", [(b"cookie", b"kk=1; k")]), ([QUERY], b"/k", [])],
)
def test_no_hash(policies, path, items):
    assert hashed(policies, path, *items) is None


def test_source_ip():
    expected = xxhash.xxh64_intdigest(b"2001:db8::1")
    assert hashed([SOURCE], remote="2001:db8::1") == expected
    assert hashed([SOURCE], remote="10.0.0.1") == xxhash.xxh64_intdigest(b"10.0.0.1")
    # The trusted client address wins over the connection's.
    one = stream()
    one.remote = Address("2001:db8::1", 5)
    assert only_route("c", route={"hash_policy": [SOURCE]}).hash(one) == expected
    assert only_route("c", route={"hash_policy": [{"connection_properties": {}}]}).hash is None


def test_filter_state():
    policy = only_route("c", route={"hash_policy": [{"filter_state": {"key": "k"}}]}).hash
    one = stream()
    assert policy(one) is None
    one.filter_state["k"] = "value"
    assert policy(one) == xxhash.xxh64_intdigest(b"value")


def test_generated_cookies():
    """As Envoy set them on a response, for a connection between the same addresses."""
    attributes = [{"name": "SameSite", "value": "Lax"}, {"name": "Secure"}]
    policies = [
        {"cookie": {"name": "k", "ttl": "60s", "path": "/p", "attributes": attributes}},
        {"cookie": {"name": "s", "ttl": "0s"}},
        {"cookie": {"name": "n"}},
    ]
    header = {"header": {"key": "set-cookie", "value": "own=1"}}
    route = only_route("c", route={"hash_policy": policies}, response_headers_to_add=[header])
    one = stream()
    one.remote = Address("9.9.9.9", 1)
    first = route.hash(one)
    assert first == route.hash(one)
    value = b"%016x" % xxhash.xxh64_intdigest(b"10.0.0.1:123410.0.0.2:80")
    route.finalize_response(one)
    assert one.response.items == [
        (b"set-cookie", b'k="' + value + b'"; Max-Age=60; Path=/p; SameSite=Lax; Secure; HttpOnly'),
        (b"set-cookie", b's="' + value + b'"; HttpOnly'),
        (b"set-cookie", b"own=1"),
    ]
    known = stream(b"/", (b"cookie", b"k=1; s=2"))
    route.hash(known)
    known.response.items.clear()
    route.finalize_response(known)
    assert known.response.items == [(b"set-cookie", b"own=1")]


def test_weighted_clusters_make_no_cookies():
    policies = [{"cookie": {"name": "k", "ttl": "60s"}}]
    policy = only_route("c", route={"hash_policy": policies}).hash
    one = stream()
    assert policy.without_cookies(one) is None
    assert "new_cookies" not in vars(one)
    assert policy(one) is not None


def test_errors():
    bad = {"header": {"header_name": "a", "regex_rewrite": {"pattern": {"regex": "("}}}}
    where = "virtual_hosts[0].routes[0].route.hash_policy"
    assert problems(one_host(to("c", route={"hash_policy": [HEADER, bad]})))[0][0] == f"{where}[1].header.regex_rewrite.pattern.regex"
    assert problems(one_host(to("c", route={"hash_policy": [{}]})))[0][0] == f"{where}[0].policy_specifier"
