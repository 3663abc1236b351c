"""The CORS filter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.http.filter_chain import Chain
from meshproxy.http.filters import cors
from tests.unit.filter_help import Route, Stream, context, counters, proto

CORS = "envoy.extensions.filters.http.cors.v3.Cors"
POLICY = "envoy.extensions.filters.http.cors.v3.CorsPolicy"
SAMPLE = """
allow_origin_string_match: [{exact: 'http://a'}]
allow_methods: GET,POST
allow_headers: '*'
expose_headers: x-e
max_age: '60'
allow_credentials: true
allow_private_network_access: true
"""
PREFLIGHT = (
    (b"access-control-request-method", b"DELETE"),
    (b"access-control-request-headers", b"x-1,x-2"),
    (b"access-control-request-private-network", b"true"),
)


def make(*policies: str, ctx: Any = None) -> tuple[Any, Any]:
    """The filter for a route with these policies, least specific first."""
    ctx = ctx or context()
    return cors.specialise(cors.compile(proto(CORS), ctx), [proto(POLICY, policy) for policy in policies], ctx), ctx


def ask(filter: Any, origin: bytes, *headers: tuple[bytes, bytes], method: bytes = b"GET", **attributes: Any) -> tuple[Any, list[tuple[bytes, bytes]]]:
    """The reply, and the headers that the response filter adds."""
    stream = Stream(headers=[(b"origin", origin), *headers], method=method, **attributes)
    reply = filter.request_headers(stream, True)
    filter.response_headers(stream, True)
    return reply, stream.response.items


def test_preflight() -> None:
    filter, ctx = make(SAMPLE)
    reply, added = ask(filter, b"http://a", *PREFLIGHT, method=b"OPTIONS")
    assert (reply.status, reply.body, reply.details, reply.flag) == (200, b"", "cors_response", 0)
    assert reply.headers == (
        (b"access-control-allow-origin", b"http://a"),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-allow-methods", b"GET,POST"),
        (b"access-control-allow-headers", b"x-1,x-2"),
        (b"access-control-max-age", b"60"),
        (b"access-control-allow-private-network", b"true"),
    )
    assert (b"access-control-expose-headers", b"x-e") in added
    assert counters(ctx) == {"http.ing.cors.origin_valid": 1}


def test_request_of_an_allowed_origin() -> None:
    filter, _ = make(SAMPLE)
    assert ask(filter, b"http://a") == (
        None,
        [(b"access-control-allow-origin", b"http://a"), (b"access-control-allow-credentials", b"true"), (b"access-control-expose-headers", b"x-e")],
    )


def test_another_origin() -> None:
    filter, ctx = make(SAMPLE)
    assert ask(filter, b"http://b") == (None, [])
    assert ask(filter, b"http://b", *PREFLIGHT, method=b"OPTIONS") == (None, [])  # forwarded: somebody else may know
    assert counters(ctx) == {"http.ing.cors.origin_invalid": 2}


def test_preflight_of_another_origin_answered_here() -> None:
    filter, _ = make("{allow_origin_string_match: [{exact: 'http://a'}], allow_methods: '*', forward_not_matching_preflights: false}")
    reply, added = ask(filter, b"http://b", *PREFLIGHT, method=b"OPTIONS")
    assert reply.headers == ((b"access-control-allow-methods", b"DELETE"),)
    assert added == []


@pytest.mark.parametrize("headers", [[], [(b"origin", b"")]])
def test_no_origin(headers: list[tuple[bytes, bytes]]) -> None:
    filter, ctx = make(SAMPLE)
    stream = Stream(headers=headers)
    assert filter.request_headers(stream, True) is None
    filter.response_headers(stream, True)
    assert stream.response.items == []
    assert counters(ctx) == {}


def test_options_without_a_method_to_ask_for_is_no_preflight() -> None:
    filter, _ = make(SAMPLE)
    assert ask(filter, b"http://a", method=b"OPTIONS")[0] is None


def test_any_origin() -> None:
    filter, _ = make("{allow_origin_string_match: [{exact: '*'}]}")
    assert ask(filter, b"http://whatever")[1] == [(b"access-control-allow-origin", b"http://whatever")]


def test_the_most_specific_policy_that_sets_a_field_decides() -> None:
    filter, _ = make("{allow_origin_string_match: [{exact: 'http://vh'}], max_age: '1', expose_headers: x-vh}", "{max_age: '2', allow_methods: PUT}")
    reply, added = ask(filter, b"http://vh", *PREFLIGHT, method=b"OPTIONS")
    assert reply.headers == (
        (b"access-control-allow-origin", b"http://vh"),
        (b"access-control-allow-methods", b"PUT"),
        (b"access-control-max-age", b"2"),
    )
    assert (b"access-control-expose-headers", b"x-vh") in added


def test_shadow_only_counts() -> None:
    filter, ctx = make("{allow_origin_string_match: [{exact: 'http://a'}], filter_enabled: {}, shadow_enabled: {default_value: {numerator: 100}}}")
    assert ask(filter, b"http://a", *PREFLIGHT, method=b"OPTIONS") == (None, [])
    assert counters(ctx) == {"http.ing.cors.origin_valid": 1}


def test_switched_off() -> None:
    filter, _ = make("{allow_origin_string_match: [{exact: 'http://a'}], filter_enabled: {}}")
    assert filter is None
    ctx = context(mutable=True)
    filter, _ = make("{allow_origin_string_match: [{exact: 'http://a'}], filter_enabled: {default_value: {numerator: 100}, runtime_key: cors}}", ctx=ctx)
    assert ask(filter, b"http://a")[1]
    ctx.runtime.modify({"cors": "0"})
    assert not ask(filter, b"http://a")[1]


def test_fields_of_the_route() -> None:
    ctx = context()
    filter: Any = cors.compile(proto(CORS), ctx)
    policies = (
        proto("envoy.config.route.v3.CorsPolicy", "{allow_origin_string_match: [{prefix: http}], allow_methods: PUT}"),
        proto("envoy.config.route.v3.CorsPolicy", "{allow_origin_string_match: [{exact: 'http://vh'}], max_age: '1'}"),
    )
    route = Route(cors=policies)
    reply, added = ask(filter, b"http://x", *PREFLIGHT, method=b"OPTIONS", route=route)
    assert reply.headers == (
        (b"access-control-allow-origin", b"http://x"),
        (b"access-control-allow-methods", b"PUT"),
        (b"access-control-max-age", b"1"),
    )
    assert added == [(b"access-control-allow-origin", b"http://x")]
    for nowhere in (None, Route(), Route(cors=())):
        assert ask(filter, b"http://x", *PREFLIGHT, method=b"OPTIONS", route=nowhere) == (None, [])


def test_errors() -> None:
    with pytest.raises(ConfigError) as caught:
        make("{allow_origin_string_match: [{exact: a}, {safe_regex: {regex: '('}}]}")
    assert caught.value.problems[0].path.startswith("allow_origin_string_match[1].safe_regex")


def test_a_route_without_a_policy_is_not_held_up() -> None:
    """Requests keep their plans there; where there is a policy, answers change."""
    filter = cors.compile(proto(CORS), context())
    policy = proto(POLICY, SAMPLE)
    assert Chain([filter]).plannable
    assert Chain([filter], route=SimpleNamespace(cors=())).plannable
    assert not Chain([filter], route=SimpleNamespace(cors=(policy,))).plannable
    assert not Chain([make(SAMPLE)[0]]).plannable
